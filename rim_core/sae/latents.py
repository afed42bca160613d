"""What single latents of a sparse autoencoder follow, beside controls.

The best of thousands of latents correlates with anything: `latent_correlations` judges it against the best of
thousands by chance, and `random_features` is a dictionary of random directions that fire as often.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import scipy.stats
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torch.nn.functional import normalize

from rim_core import stats
from rim_core.errors import InputError
from rim_core.sae.autoencoder import ROWS, SparseAutoencoder, checked_rows
from rim_core.stats import Floats, Groups, Ints

if TYPE_CHECKING:
    import altair as alt


@dataclass(frozen=True, eq=False)
class LatentCorrelations:
    """Correlation of each latent with a target, and how large the largest gets by chance.

    Latents that never vary are left out. All arrays but `null_max` are `[tested]`, the largest correlation in size
    first.

    Attributes:
        latent: number of the latent in the autoencoder.
        correlation: Pearson's r with the target.
        low, high: its 95 % interval by Fisher's z. Of a latent picked because its r is large, r and interval are too
            large: measure it again on other activations.
        p_value: of r alone, by Student's t; exact for a normal target, close for balanced labels.
        q_value: `p_value` after Benjamini-Hochberg over the latents tested.
        p_max: share of permutations of the target whose largest `|r|` over all latents reaches this one's: the
            chance that the best of so many gets there, whatever the distributions (Westfall & Young 1993).
        frequency: share of the activations on which the latent is active.
        null_max: the largest `|r|` of each permutation, `[permutation]`.
        n: activations.
    """

    latent: Ints
    correlation: Floats
    low: Floats
    high: Floats
    p_value: Floats
    q_value: Floats
    p_max: Floats
    frequency: Floats
    null_max: Floats
    n: int

    def to_frame(self) -> pd.DataFrame:
        """Give a row a latent: latent, correlation, low, high, p_value, q_value, p_max, frequency."""
        names = ("latent", "correlation", "low", "high", "p_value", "q_value", "p_max", "frequency")
        return pd.DataFrame({name: getattr(self, name) for name in names})

    def plot(self, top: int = 10, title: str | None = None) -> "alt.LayerChart":
        """Draw the strongest latents in size; the reference line is what chance's best reaches in 1 of 20 cases."""
        from rim_core import charts

        frame = self.to_frame().head(top)
        against = frame["correlation"] < 0
        frame = frame.assign(
            latent=np.where(against, "- latent ", "+ latent ") + frame["latent"].astype(str),
            size=frame["correlation"].abs(),
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
    if n_permutations < 1:
        raise InputError(f"latent_correlations: n_permutations is {n_permutations}; ask for at least one")
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
def random_features(sae: SparseAutoencoder, activations: "Tensor | ArrayLike", seed: int = 0) -> SparseAutoencoder:
    """The control paper C lacks: random directions, each active on as many activations as the latent it replaces.

    Args:
        sae: whose width, number of latents and frequencies are matched.
        activations: `[n, d]` on which they are matched.
        seed: of the directions.

    Returns:
        A "relu" autoencoder with unit decoder rows, the same directions as encoder, and biases set by the
        frequencies; `b_dec` is the activations' mean.
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
