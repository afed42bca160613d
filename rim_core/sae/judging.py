"""How good a sparse autoencoder is, beside controls: faithfulness, and what its latents follow.

`evaluate_sae` asks how faithful it is to activations, `cross_entropy_recovered` to the predictions of the model that it
is put into. The best of thousands of latents correlates with anything: `latent_correlations` judges it against the
best of thousands by chance, and `random_features` is a dictionary of random directions that fire as often.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import scipy.stats
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from rim_core import checking, stats
from rim_core.errors import InputError
from rim_core.models.batching import batches
from rim_core.models.hooks import Edit, editing
from rim_core.models.model import Model
from rim_core.models.padding import pad_left
from rim_core.sae.autoencoder import ROWS, SparseAutoencoder, checked_rows, splice
from rim_core.stats import Floats, Groups, Interval, Ints
from rim_core.tables import interval_frame
from rim_core.texts import encode

if TYPE_CHECKING:
    import altair as alt


@dataclass(frozen=True, eq=False)
class SaeEvaluation:
    """How well a sparse autoencoder does on activations it was not trained on.

    Attributes:
        variance_explained: 1 - sum ||x - x'||^2 / sum ||x - mean||^2; 0 is what the mean alone explains.
        l0: latents active at once, on average.
        frequency: share of the activations on which each latent is active, `[d_sae]`.
        n: activations.
    """

    variance_explained: Interval
    l0: Interval
    frequency: Floats = field(repr=False)
    n: int

    @property
    def dead(self) -> int:
        """Latents that are active on none of the activations."""
        return int((self.frequency == 0).sum())

    def to_frame(self) -> pd.DataFrame:
        """Give a row a measure: measure, estimate, low, high, n; the share of dead latents has no interval."""
        dead = Interval(self.dead / len(self.frequency), np.nan, np.nan, self.n)
        return _frame(variance_explained=self.variance_explained, l0=self.l0, dead_share=dead)


@torch.no_grad()
def evaluate_sae(
    sae: SparseAutoencoder, activations: "Tensor | ArrayLike", *, groups: Groups = None, seed: int = 0
) -> SaeEvaluation:
    """Measure variance explained, L0 and dead latents on held-out activations.

    Args:
        sae: of any kind.
        activations: `[n, d]`, best not those it was trained on.
        groups: `[n]` of what varies together, such as the text each position is from; intervals are a bootstrap
            over them, or over activations.
        seed: of the bootstrap.

    Raises:
        InputError: activations that are not `[n, d]`, not finite, all equal, or of another width.

    Example:
        >>> x = rim.capture(model, texts, "resid_post", positions=[-3, -2, -1])["resid_post"][:, :, 1].flatten(0, 1)
        >>> sae = rim.train_sae(x, n_latents=12, kind="topk", k=3, steps=5, progress=False)
        >>> rim.evaluate_sae(sae, x).to_frame()["measure"].tolist()
        ['variance_explained', 'l0', 'dead_share']
    """
    data = checked_rows(activations, "evaluate_sae")
    sae = sae.to(data.device)
    total = (data - data.mean(0)).double().square().sum(1)
    if not total.mean() > 1e-12 * data.mean(0).double().square().sum():
        raise InputError("evaluate_sae: all activations are equal, so there is no variance to explain")
    missed, active, fired = [], [], torch.zeros(sae.d_sae, device=data.device)
    for part in data.split(ROWS):
        latents = sae.encode(part)
        missed.append((part - sae.decode(latents)).double().square().sum(1))
        active.append((latents > 0).sum(1).double())
        fired += (latents > 0).sum(0)
    columns = torch.stack([torch.cat(missed), total, torch.cat(active)], dim=1).cpu().numpy()

    def measures(mean: Floats) -> Floats:
        return np.stack([1 - mean[:, 0] / mean[:, 1], mean[:, 2]], axis=1)

    found = stats.of_means(columns, measures, groups, n_resamples=1000, seed=seed, over="activations")
    return SaeEvaluation(found[0], found[1], (fired / len(data)).double().cpu().numpy(), len(data))


def _frame(**measures: Interval) -> pd.DataFrame:
    return interval_frame({(name,): found for name, found in measures.items()}, ["measure"])


@dataclass(frozen=True, eq=False)
class CrossEntropyRecovered:
    """What the model keeps of its predictions when it runs on the reconstruction.

    Attributes:
        recovered: (zeroed - spliced) / (zeroed - clean); 1 is no loss, 0 is as bad as zeros in that place.
        clean: cross-entropy of the next token in nats, of the model as it is.
        spliced: the same on the reconstruction.
        zeroed: the same on zeros.
        n_tokens: tokens predicted. Intervals are a bootstrap over texts; their n is the number of texts.
    """

    recovered: Interval
    clean: Interval
    spliced: Interval
    zeroed: Interval
    n_tokens: int

    def to_frame(self) -> pd.DataFrame:
        """Give a row a measure: measure, estimate, low, high, n (texts)."""
        return _frame(recovered=self.recovered, clean=self.clean, spliced=self.spliced, zeroed=self.zeroed)


@torch.no_grad()
def cross_entropy_recovered(
    model: Model, sae: SparseAutoencoder, texts: Sequence[str], layer: int, *, site: str = "resid_post", seed: int = 0
) -> CrossEntropyRecovered:
    """Measure how much of the model's cross-entropy survives the reconstruction at every position.

    Args:
        model: a loaded model; the adapter and edits now active apply.
        sae: trained on this site of this layer.
        texts: at least two, which the model predicts token by token.
        layer: where the reconstruction goes.
        site: the site of that layer.
        seed: of the bootstrap over texts.

    Raises:
        InputError: fewer than two texts, a text of one token, another width, or a model that predicts these texts
            no worse on zeros, which leaves nothing to recover.
        IdentityError: padding changes this model's numbers.

    Example:
        >>> x = rim.capture(model, texts, "resid_post", positions=[-3, -2, -1])["resid_post"][:, :, 1].flatten(0, 1)
        >>> sae = rim.train_sae(x, steps=5, progress=False)
        >>> rim.cross_entropy_recovered(model, sae, texts, 1)  # of a random model, which predicts nothing
        Traceback (most recent call last):
        rim_core.errors.InputError: cross_entropy_recovered: ... predicts these texts no worse with zeros at layer 1 ...
    """
    model.require("cross_entropy_recovered", "padding")
    ids = encode(model, texts)
    if len(ids) < 2 or min(map(len, ids)) < 2:
        raise InputError(
            "cross_entropy_recovered: give at least two texts, each of two tokens or more: one predicts the next"
        )
    clean = _losses(model, ids)
    with splice(model, sae, layer, error_term=False, site=site):
        spliced = _losses(model, ids)
    with editing(model, [Edit(site, layer, lambda values, _: torch.zeros_like(values))]):
        zeroed = _losses(model, ids)
    counts = [len(row) - 1 for row in ids]

    def measures(sums: Floats) -> Floats:
        clean, spliced, zeroed = (sums[:, column] / sums[:, 3] for column in range(3))
        return np.stack([(zeroed - spliced) / (zeroed - clean), clean, spliced, zeroed], axis=1)

    columns = np.stack([clean, spliced, zeroed, counts], axis=1)
    found = stats.of_means(columns, measures, seed=seed, over="texts")
    _, before, _, without = found.estimate
    if not without > before:
        raise InputError(
            f"cross_entropy_recovered: {model.name} predicts these texts no worse with zeros at layer {layer} "
            f"({without:.2f} against {before:.2f} nats): give texts like those it was trained on"
        )
    return CrossEntropyRecovered(found[0], found[1], found[2], found[3], sum(counts))


def _losses(model: Model, ids: list[list[int]]) -> Floats:
    """Sum over each text's tokens, from the second on, of minus their log-probability, `[text]`."""
    total = np.empty(len(ids))
    # Logits and their logarithms are two tensors of this many numbers: 2 x 128 MB.
    max_tokens = max(1, 2**25 // model.layout.d_vocab)
    for rows in batches([len(row) for row in ids], max_tokens):
        inputs = pad_left([ids[row] for row in rows], model.tokenizer.pad_token_id, model.device)
        logits = model.hf(**inputs, use_cache=False).logits[:, :-1].float()
        targets = inputs["input_ids"][:, 1:].masked_fill(inputs["attention_mask"][:, :-1] == 0, -100)
        losses = cross_entropy(logits.transpose(1, 2), targets, reduction="none")
        total[rows] = losses.double().sum(1).cpu().numpy()
    return total


@dataclass(frozen=True, eq=False)
class LatentCorrelations:
    """Correlation of each latent with a target, and how large the largest gets by chance.

    Latents that never vary are left out. All arrays but `null_max` are `[tested]`, the largest correlation in size
    first.

    Attributes:
        latent: number of the latent in the autoencoder.
        correlation: Pearson's r with the target. Of a latent picked because its r is large, r and interval are too
            large: measure it again on other activations.
        low: lower end of its 95 % interval, by Fisher's z.
        high: its upper end.
        p_value: of r alone, by Student's t; exact for a normal target, close for balanced labels.
        q_value: `p_value` after Benjamini-Hochberg over the latents tested.
        p_max: share of permutations of the target whose largest `|r|` over all latents reaches this one's: the
            chance that the best of so many gets there, whatever the distributions (Westfall & Young 1993).
        frequency: share of the activations on which the latent is active.
        null_max: the largest `|r|` of each permutation, `[permutation]`.
        n: activations.
    """

    latent: Ints = field(repr=False)
    correlation: Floats = field(repr=False)
    low: Floats = field(repr=False)
    high: Floats = field(repr=False)
    p_value: Floats = field(repr=False)
    q_value: Floats = field(repr=False)
    p_max: Floats = field(repr=False)
    frequency: Floats = field(repr=False)
    null_max: Floats = field(repr=False)
    n: int

    def to_frame(self) -> pd.DataFrame:
        """Give a row a latent: latent, estimate (r), low, high, n, p_value, q_value, p_max, frequency."""
        columns = {"latent": self.latent, "estimate": self.correlation, "low": self.low, "high": self.high, "n": self.n}
        names = ("p_value", "q_value", "p_max", "frequency")
        return pd.DataFrame(columns | {name: getattr(self, name) for name in names})

    def plot(self, *, top: int = 10, title: str | None = None) -> "alt.LayerChart":
        """Draw the strongest latents in size; the reference line is what chance's best reaches in 1 of 20 cases."""
        from rim_core import charts

        frame = self.to_frame().head(top)
        against = frame["estimate"] < 0
        frame = frame.assign(
            latent=np.where(against, "- latent ", "+ latent ") + frame["latent"].astype(str),
            size=frame["estimate"].abs(),
            low=frame["low"].mask(against, -frame["high"]),
            high=frame["high"].mask(against, -frame["low"]),
        )
        limit = float(np.percentile(self.null_max, 95))
        return charts.intervals(
            frame,
            "size",
            label="latent",
            title=title or "Do the best latents beat the best of chance?",
            x_title=f"correlation with the target, size (n = {self.n})",
            description=(
                f"Size of the correlation of the {len(frame)} strongest of {len(self.latent)} latents, with sign "
                f"and 95 % interval; strongest {self.correlation[0]:.2f}. The largest of a permuted target "
                f"reaches {limit:.2f} in 1 of 20 permutations (the line)."
            ),
            reference=limit,
        )


@torch.no_grad()
def latent_correlations(
    sae: SparseAutoencoder,
    activations: "Tensor | ArrayLike",
    target: "Tensor | ArrayLike",
    *,
    groups: Groups = None,
    n_permutations: int = 1000,
    seed: int = 0,
) -> LatentCorrelations:
    """Correlate every latent with a label or a projection, and judge the best against the best by chance.

    Paper C (figures 14 and 15) singles out one latent of thousands; here the target is permuted to see how large
    the largest correlation gets when there is none. Run it on `random_features` as well: a real direction in the
    activations shows through random features too.

    Args:
        sae: of any kind.
        activations: `[n, d]`, one a prompt: rows must be exchangeable.
        target: `[n]`, 0 and 1 or any numbers.
        groups: `[n]`; the target is then permuted within groups (categories, pairs), so that what differs
            between groups cannot pass for the target.
        n_permutations: of the target.
        seed: of the permutations.

    Raises:
        InputError: wrong shapes, numbers that are not finite, a target without spread, or no latent that varies.

    Example:
        >>> x = rim.capture(model, texts, "resid_post")["resid_post"][:, 1]
        >>> sae = rim.train_sae(x, steps=5, progress=False)
        >>> found = rim.latent_correlations(sae, x, [0, 1, 0, 1], n_permutations=20)
        >>> bool((found.p_max >= 1 / 21).all())  # never 0
        True
    """
    data = checked_rows(activations, "latent_correlations", at_least=4)
    if hasattr(target, "detach"):
        target = target.detach().cpu()
    wanted = np.asarray(target, dtype=np.float64)
    n = len(data)
    if wanted.shape != (n,) or not np.isfinite(wanted).all() or wanted.min() == wanted.max():
        raise InputError(
            f"latent_correlations: the target must hold {n} finite numbers that are not all equal, one an "
            f"activation; it has shape {list(wanted.shape)}"
        )
    n_permutations = checking.whole(n_permutations, "latent_correlations: n_permutations", 1)
    sae = sae.to(data.device)
    latents = torch.cat([sae.encode(part) for part in data.split(ROWS)])
    tested = (latents.amin(0) < latents.amax(0)).nonzero()[:, 0]
    if not len(tested):
        raise InputError("latent_correlations: no latent varies on these activations; train it on more like them")
    latents = latents[:, tested]
    frequency = (latents > 0).double().mean(0).cpu().numpy()
    units = normalize(latents - latents.mean(0), dim=0)
    codes = None if groups is None else stats.group_codes(groups, n)
    rng = stats.derive_generator(seed, "sae", "permutations")
    orders = [np.arange(n), *(_shuffled(codes, n, rng) for _ in range(n_permutations))]
    r, null_max = _correlations(wanted, orders, units)
    with np.errstate(divide="ignore"):
        t = r * np.sqrt((n - 2) / (1 - r**2))
        ends = np.tanh(np.arctanh(r)[:, None] + np.array([-1, 1]) * scipy.stats.norm.ppf(0.975) / np.sqrt(n - 3))
    p = 2 * scipy.stats.t.sf(np.abs(t), n - 2)
    # Float32 rounding must not turn a tie, common with labels, into a win over chance.
    hits = n_permutations - np.searchsorted(np.sort(null_max), np.abs(r) - 1e-5)
    ranked = np.argsort(-np.abs(r), kind="stable")
    return LatentCorrelations(
        latent=tested.cpu().numpy()[ranked],
        correlation=r[ranked],
        low=ends[ranked, 0],
        high=ends[ranked, 1],
        p_value=p[ranked],
        q_value=stats.benjamini_hochberg(p)[ranked],
        p_max=((hits + 1) / (n_permutations + 1))[ranked],
        frequency=frequency[ranked],
        null_max=null_max,
        n=n,
    )


def _correlations(target: Floats, orders: list[Ints], units: Tensor) -> tuple[Floats, Floats]:
    """Of the target in the first order, each latent's; in every other order, the largest in size."""
    direction = (target - target.mean()) / np.linalg.norm(target - target.mean())
    largest = []
    # The first order goes with the others: alone it would be summed, and rounded, another way.
    for start in range(0, len(orders), 128):
        targets = torch.from_numpy(direction[np.stack(orders[start : start + 128])]).float().to(units.device)
        found = targets @ units
        if start == 0:
            own = found[0].double().clamp(-1, 1).cpu().numpy()
        largest.append(found.abs().amax(1))
    return own, torch.cat(largest)[1:].double().cpu().numpy()


def _shuffled(codes: Ints | None, n: int, rng: np.random.Generator) -> Ints:
    """A random order of n rows; with group codes, one that keeps every row in its group."""
    if codes is None:
        return rng.permutation(n)
    order = np.empty(n, dtype=np.int64)
    order[np.argsort(codes, kind="stable")] = np.lexsort((rng.random(n), codes))
    return order


@torch.no_grad()
def random_features(sae: SparseAutoencoder, activations: "Tensor | ArrayLike", *, seed: int = 0) -> SparseAutoencoder:
    """The control paper C lacks: random directions, each active on as many activations as the latent it replaces.

    Args:
        sae: whose width, number of latents and frequencies are matched.
        activations: `[n, d]` on which they are matched.
        seed: of the directions.

    Returns:
        A "relu" autoencoder with unit decoder rows, the same directions as encoder, and biases set by the
        frequencies; `b_dec` is the activations' mean.

    Example:
        >>> x = rim.capture(model, texts, "resid_post")["resid_post"][:, 1]
        >>> control = rim.random_features(rim.train_sae(x, n_latents=12, steps=5, progress=False), x)
        >>> control.d_sae, control.kind
        (12, 'relu')
    """
    data = checked_rows(activations, "random_features")
    sae = sae.to(data.device)
    counts = torch.zeros(sae.d_sae, dtype=torch.long, device=data.device)
    for part in data.split(ROWS):
        counts += (sae.encode(part) > 0).sum(0)
    drawn = stats.derive_generator(seed, "sae", "random_features").standard_normal(
        (sae.d_sae, sae.d_in), dtype=np.float32
    )
    W_dec = normalize(torch.from_numpy(drawn)).to(data.device)
    centred = data - data.mean(0)
    biases = []
    for directions, count in zip(W_dec.split(256), counts.split(256), strict=True):
        raw = (centred @ directions.T).sort(dim=0, descending=True).values
        # One more at each end, so that there is a middle for latents that are active never or always.
        raw = torch.cat([raw[:1] + 1e-3 * raw[:1].abs(), raw, raw[-1:] - 1e-3 * raw[-1:].abs()])
        biases.append(-(raw.gather(0, count[None]) + raw.gather(0, count[None] + 1))[0] / 2)
    metadata = {"random_features": {"seed": seed, "n": len(data)}}
    made = SparseAutoencoder(W_dec.T.contiguous(), torch.cat(biases), W_dec, data.mean(0), metadata=metadata)
    return made.to("cpu")
