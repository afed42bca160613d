"""Gradients of single examples with respect to one weight, and how alike they are (paper D, section 4.2).

A linear module's gradient is `dW = sum_t delta_t x_t^T`, with `x_t` its input at token t and `delta_t` the loss's
gradient at its output. Both are read where the module runs, so the weight may be packed in 4 bits and frozen, and
inner products of gradients follow without a single `[d_out, d_in]` matrix:
`<dW_i, dW_j> = sum_{s,t} (x_is . x_jt)(delta_is . delta_jt)`.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rim_core import stats
from rim_core.editing import Frame
from rim_core.errors import InputError
from rim_core.loading import Model
from rim_core.sites import Layout, in_features, reading
from rim_core.stats import Interval
from rim_core.tracing import encode, pad_left, run_batches, token_budget

if TYPE_CHECKING:
    import altair as alt

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
# x `[token, d_in]` and delta `[token, d_out]` of the tokens that carry any gradient.
Factors = tuple[Tensor, Tensor]

LARGEST_EXPLICIT = 1e9  # bytes
RESAMPLES = 2000
FEWEST_EXAMPLES = 3
# Examples of each label in a heat map: more cells than these cannot be told apart on a page.
DRAWN = 20
_LOGITS_HELD = 2**24
_ELEMENTS_HELD = 2**24


@dataclass(frozen=True, eq=False)
class CosineStatistics:
    """Cosines of gradients and their means by label; examples of one pair are in none of the means but `matched`.

    Intervals are a percentile bootstrap over examples (or pairs), those of one label among themselves. They are
    up to 1.4 times too wide where cosines vary between examples without any example being unlike the rest.

    Attributes:
        cosines: `[example, example]`, -1 to 1.
        within: mean over all pairs of examples that share a label. cross: of those that do not.
        difference: within minus cross, with the interval of the same resamples.
        group_means: mean by two labels, `(a, b)` with a before b, and `(a, a)`.
        matched: mean over examples of one pair with different labels; None without pairs.
        null_low, null_high: ends of the middle 95 % of the difference when labels are permuted.
        p_value: two-sided, of the difference among the permuted ones.
    """

    cosines: Floats
    within: Interval
    cross: Interval
    difference: Interval
    group_means: Mapping[tuple[str, str], Interval]
    matched: Interval | None
    null_low: float
    null_high: float
    p_value: float


@dataclass(frozen=True, eq=False)
class GradientCosines:
    """How alike the gradients of examples are, as they come and after the published centring.

    Centring subtracts the mean over *all* examples from each gradient. That alone makes cosines across groups
    negative: with two groups of equal size the centred group means are `m` and `-m`, whatever angle the gradients
    had before, so the mean cross product is `-|m|^2`. A negative centred cross cosine therefore says that the group
    means differ, which the permuted labels test, and never that the gradients oppose each other; that is what a
    negative `raw.cross` would say.

    Attributes:
        raw, centred: cosines, means, intervals and the label-permuted null before and after centring.
        labels: `[example]`. norms: L2 norm of each gradient before centring, `[example]`.
        about: which weight and loss, in words.
    """

    raw: CosineStatistics
    centred: CosineStatistics
    labels: tuple[str, ...]
    norms: Floats
    about: str

    def to_frame(self) -> pd.DataFrame:
        """Give a row a kind ("raw", "centred") and comparison: kind, comparison, cosine, low, high, n, and null_low,
        null_high, p_value, which only the comparison "within minus cross" has.
        """
        rows = []
        for kind, found in (("raw", self.raw), ("centred", self.centred)):
            means = {"within": found.within, "cross": found.cross, "within minus cross": found.difference}
            means |= {f"{a} with {b}": mean for (a, b), mean in found.group_means.items()}
            means |= {"same pair": found.matched} if found.matched else {}
            for comparison, mean in means.items():
                row = {"kind": kind, "comparison": comparison, "cosine": mean.estimate}
                rows.append(row | {"low": mean.low, "high": mean.high, "n": mean.n})
                if comparison == "within minus cross":
                    rows[-1] |= {"null_low": found.null_low, "null_high": found.null_high}
                    rows[-1] |= {"p_value": found.p_value}
        return pd.DataFrame(rows)

    def plot(self, title: str = "Which mean cosines does centring turn negative?") -> "alt.LayerChart":
        """Draw the mean cosine of each two labels, raw and centred, with intervals."""
        from rim_core import charts

        frame = self.to_frame()
        frame = frame[~frame["comparison"].isin(["within", "cross", "within minus cross"])]
        said = "; ".join(
            f"{row.comparison}, {row.kind}: {row.cosine:.2f} ({row.low:.2f} to {row.high:.2f})"
            for row in frame.itertuples()
        )
        return charts.intervals(
            frame,
            "cosine",
            label="comparison",
            series="kind",
            title=title,
            x_title="mean cosine of gradients",
            description=f"Mean cosines of gradients ({self.about}), with 95 % intervals. {said}.",
            reference=0.0,
        )

    def plot_pairs(
        self, kind: Literal["raw", "centred"] = "raw", title: str = "Are gradients alike within a label?"
    ) -> "alt.LayerChart":
        """Draw the cosine of every two examples, ordered by label: the first 20 of each label."""
        from rim_core import charts

        if kind not in ("raw", "centred"):
            raise InputError(f"unknown kind {kind!r} of cosine: choose 'raw' or 'centred'")
        found = self.raw if kind == "raw" else self.centred
        names = list(dict.fromkeys(self.labels))
        order = [row for name in names for row in np.flatnonzero(np.array(self.labels) == name)[:DRAWN]]
        ends = np.cumsum([min(self.labels.count(name), DRAWN) for name in names])
        spans = ", ".join(
            f"{name} {start}-{end - 1}" for name, start, end in zip(names, [0, *ends], ends, strict=False)
        )
        first, second = np.divmod(np.arange(len(order) ** 2), len(order))
        frame = pd.DataFrame(
            {"first": first, "second": second, "cosine": found.cosines[np.ix_(order, order)].ravel()}
        )
        return charts.heatmap(
            frame,
            "cosine",
            x="first",
            y="second",
            title=title,
            x_title=f"example ({spans})",
            y_title="example",
            value_title=f"{kind} cosine",
            description=(
                f"Cosines of gradients ({self.about}), {kind}, between {len(order)} examples ordered by label: "
                f"{spans}. Mean within labels {found.within.estimate:.2f}, across {found.cross.estimate:.2f}."
            ),
            diverging=True,
        )


def gradient_cosines(
    model: Model,
    prompts: Sequence[str],
    completions: Sequence[str],
    labels: Sequence[object],
    pairs: Sequence[object] | None = None,
    layer: int = -1,
    weight: Literal["attention_out", "mlp_out"] = "attention_out",
    loss_on: Literal["completion", "all"] = "completion",
    seed: int = 0,
) -> GradientCosines:
    """Compare examples by the gradient of their loss with respect to one weight (paper D, section 4.2).

    The loss of an example is the mean negative log likelihood (nats) of its completion's tokens. The paper's code
    takes it over the prompt too (`loss_on="all"`, every token but the first), so that its gradients differ
    by prompt even where completions are equal. Published: the attention output of the last layer.

    The gradient is that of the module's effective weight: dequantised, and with an active LoRA adapter
    `W + scale * B A` and not A or B. Memory: `4 * (d_in + d_out)` bytes a token that carries gradient.

    Args:
        prompts: as the model is to see them (see `format_chat`), `[example]`.
        completions: what follows, tokenised apart as in training and generation, `[example]`.
        labels: the set each example is from, at least 3 examples a set, `[example]`.
        pairs: names of what belongs together (one completion under two prompts, say), `[example]`, or None. Pairs
            are resampled whole, labels are permuted within them, and their own cosines are kept apart: else
            equal completions would pass for likeness across labels.
        layer: from 0, or from the end if negative.
        weight: the output projection of attention, or the down projection of the MLP.
        loss_on: the tokens that the loss counts.
        seed: of resamples and permutations.

    Raises:
        InputError: lists of different lengths, an empty text, a layer or weight that the model does not have, too
            few examples of a label, or a gradient that is zero or not finite.
        IdentityError: padding changes this model's numbers, or its logits are not those of its readout.
    """
    names, codes = _labels(labels, len(prompts), "gradient_cosines")
    clusters = stats.group_codes(pairs, len(codes), "gradient_cosines")
    factors = _factors(model, prompts, completions, layer, weight, loss_on, "gradient_cosines")
    about = f"{weight} of layer {layer % model.n_layers}, loss on {loss_on}"
    return _compare(_gram(factors), names, codes, clusters, pairs is not None, seed, about)


def compare_gradients(
    gradients: Any, labels: Sequence[object], pairs: Sequence[object] | None = None, seed: int = 0
) -> GradientCosines:
    """Compare gradients that are there already, such as those of two models side by side.

    Args:
        gradients: `[example, ...]`, array or tensor, as `per_example_gradients` gives them.
        labels, pairs, seed: as in `gradient_cosines`.

    Raises:
        InputError: as in `gradient_cosines`.
    """
    flat = torch.as_tensor(gradients).detach().flatten(1)
    names, codes = _labels(labels, len(flat), "compare_gradients")
    clusters = stats.group_codes(pairs, len(codes), "compare_gradients")
    gram = np.zeros((len(flat), len(flat)))
    for part in flat.split(max(1, _ELEMENTS_HELD // len(flat)), dim=1):
        block = part.double().cpu()
        gram += (block @ block.T).numpy()
    return _compare(gram, names, codes, clusters, pairs is not None, seed, "as given")


def per_example_gradients(
    model: Model,
    prompts: Sequence[str],
    completions: Sequence[str],
    layer: int = -1,
    weight: Literal["attention_out", "mlp_out"] = "attention_out",
    loss_on: Literal["completion", "all"] = "completion",
) -> Tensor:
    """Give each example's gradient, float32 `[example, d_out, d_in]` on the CPU (GPT-2 stores its weights transposed).

    Arguments and loss as in `gradient_cosines`.

    Raises:
        InputError: as there, or a result above 1 GB.
    """
    d_in = in_features(_module(model, layer, weight))
    size = 4 * len(prompts) * model.d_model * d_in
    if size > LARGEST_EXPLICIT:
        raise InputError(
            f"per_example_gradients: {len(prompts)} gradients of {model.d_model} x {d_in} take {size / 1e9:.1f} GB "
            f"(at most {LARGEST_EXPLICIT / 1e9:.0f}): use gradient_cosines, which never holds them, or fewer examples"
        )
    factors = _factors(model, prompts, completions, layer, weight, loss_on, "per_example_gradients")
    return torch.stack([delta.T @ x for x, delta in factors])


def _module(model: Model, layer: int, weight: str) -> nn.Module:
    if weight not in ("attention_out", "mlp_out"):
        raise InputError(f"unknown weight {weight!r}: choose 'attention_out' or 'mlp_out'")
    if not -model.n_layers <= layer < model.n_layers:
        raise InputError(f"layer {layer} is out of range: {model.name} has layers 0 to {model.n_layers - 1}")
    if weight == "mlp_out" and model.layout.mlp_out[layer] is None:
        raise InputError(
            f"the MLP of layer {layer} of {model.name} is a mixture of experts, without one down projection: "
            "choose weight='attention_out'"
        )
    return getattr(model.layout, weight)[layer]


def _labels(labels: Sequence[object], n: int, tool: str) -> tuple[list[str], Ints]:
    codes = stats.group_codes(labels, n, tool)
    given = labels.tolist() if hasattr(labels, "tolist") else list(labels)
    names = [str(given[int(np.flatnonzero(codes == code)[0])]) for code in range(codes.max() + 1)]
    counts = np.bincount(codes)
    if counts.min() < FEWEST_EXAMPLES:
        raise InputError(
            f"{tool}: label {names[counts.argmin()]!r} has {counts.min()} examples; give at least {FEWEST_EXAMPLES}"
        )
    return names, codes


def _factors(
    model: Model,
    prompts: Sequence[str],
    completions: Sequence[str],
    layer: int,
    weight: str,
    loss_on: str,
    tool: str,
) -> list[Factors]:
    """The two factors of each example's gradient."""
    if loss_on not in ("completion", "all"):
        raise InputError(f"unknown loss_on {loss_on!r}: choose 'completion' or 'all'")
    module = _module(model, layer, weight)
    model.require(tool, "lens", "padding")
    if len(prompts) != len(completions):
        raise InputError(f"{tool}: {len(prompts)} prompts and {len(completions)} completions; give one each")
    heads = encode(model.tokenizer, prompts)
    tails = [model.tokenizer(text, add_special_tokens=False).input_ids for text in completions]
    if empty := [number for number, tail in enumerate(tails) if not tail]:
        raise InputError(f"{tool}: completion {empty[0]} is empty: remove it")

    def run(rows: list[int]) -> list[Factors]:
        return _pass(model, module, [heads[row] for row in rows], [tails[row] for row in rows], loss_on)

    # Everything above the module is kept for the way back.
    budget = token_budget(model.layout, model.device) // (model.n_layers - layer % model.n_layers)
    factors: dict[int, Factors] = {}
    for rows, found in run_batches([len(h) + len(t) for h, t in zip(heads, tails, strict=True)], budget, run):
        factors.update(zip(rows, found, strict=True))
    for number in range(len(prompts)):
        if not all(torch.isfinite(factor).all() for factor in factors[number]):
            raise InputError(
                f"{tool}: the gradient of example {number} is not finite in {model.dtype}: load the model in float32"
            )
    return [factors[number] for number in range(len(prompts))]


def _pass(
    model: Model, module: nn.Module, heads: list[list[int]], tails: list[list[int]], loss_on: str
) -> list[Factors]:
    layout, last = model.layout, model.n_layers - 1
    ids = [head + tail for head, tail in zip(heads, tails, strict=True)]
    inputs = pad_left(ids, model.tokenizer.pad_token_id, model.device)
    real = inputs["attention_mask"].bool()
    # Edits of "the last prompt token" mean the token before the completion here too.
    lengths = torch.tensor([len(tail) for tail in tails], device=model.device)
    positions = torch.arange(real.shape[1], device=model.device) - (real.shape[1] - lengths)[:, None]
    # The text's first token is predicted from nothing.
    scored = real[:, :-1] & real[:, 1:]
    if loss_on == "completion":
        scored &= positions[:, 1:] >= 0
    before, model.frame = model.frame, Frame(positions, positions)
    try:
        with (
            _leaf_at(module) as held,
            reading(layout, ("resid_post",), lambda tensor: tensor.clone(), [last]) as found,
        ):
            layout.body(**inputs, use_cache=False)
            states = found["resid_post", last][:, :-1][scored]
            gradient = _loss_gradient(layout, states.detach(), inputs["input_ids"][:, 1:][scored])
            (delta,) = torch.autograd.grad(states, held["leaf"], gradient)
    finally:
        model.frame = before
    carrying = real & delta.any(-1)
    # The loss was summed over tokens: small numbers survive half precision better undivided.
    counts = scored.sum(1)
    return [
        (
            held["x"][row][carrying[row]].to("cpu", torch.float32),
            (delta[row][carrying[row]].float() / counts[row]).cpu(),
        )
        for row in range(len(ids))
    ]


@contextlib.contextmanager
def _leaf_at(module: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Within the context a forward leaves the module's input `x`, and `leaf`, a zero added to its output.

    The gradient at the leaf is that at the output. Autograd is switched on from here up: a frozen model has no other
    leaf, and what lies below must leave no graph, even under an adapter whose weights ask for gradients.
    """
    held: dict[str, Tensor] = {}

    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        torch.set_grad_enabled(True)
        held["x"], held["leaf"] = args[0].detach().clone(), torch.zeros_like(output, requires_grad=True)
        return output + held["leaf"]

    handle = module.register_forward_hook(hook)
    try:
        with torch.no_grad():
            yield held
    finally:
        handle.remove()


def _loss_gradient(layout: Layout, states: Tensor, targets: Tensor) -> Tensor:
    """Gradient of the summed negative log likelihood of `targets` `[n]` at the last `resid_post`, `[n, d_model]`."""
    parts = []
    head: Any = layout.lm_head
    chunk = max(1, _LOGITS_HELD // head.out_features)
    for part, wanted in zip(states.split(chunk), targets.split(chunk), strict=True):
        leaf = part.detach().requires_grad_()
        loss = nn.functional.cross_entropy(layout.readout(leaf).float(), wanted, reduction="sum")
        parts.append(torch.autograd.grad(loss, leaf)[0])
    return torch.cat(parts)


def _gram(factors: Sequence[Factors]) -> Floats:
    """Inner products of all gradients, `[example, example]`, by the cheaper of two exact routes."""
    tokens, examples = sum(len(x) for x, _ in factors), len(factors)
    d_in, d_out = (factor.shape[1] for factor in factors[0])
    if tokens**2 * (d_in + d_out) <= (tokens + examples**2) * d_in * d_out:
        return _gram_by_token(factors)
    return _gram_by_row(factors)


def _gram_by_token(factors: Sequence[Factors]) -> Floats:
    x, delta = (torch.cat(part).double() for part in zip(*factors, strict=True))
    owner = torch.repeat_interleave(torch.tensor([len(part) for part, _ in factors]))
    rows = []
    for own_x, own_delta in factors:
        products = ((own_x.double() @ x.T) * (own_delta.double() @ delta.T)).sum(0)
        rows.append(torch.zeros(len(factors), dtype=torch.float64).index_add(0, owner, products))
    return torch.stack(rows).numpy()


def _gram_by_row(factors: Sequence[Factors]) -> Floats:
    """A few rows of every gradient at a time."""
    d_in, d_out = (factor.shape[1] for factor in factors[0])
    gram = torch.zeros(len(factors), len(factors), dtype=torch.float64)
    height = max(1, _ELEMENTS_HELD // (len(factors) * d_in))
    for start in range(0, d_out, height):
        rows = torch.stack(
            [(delta[:, start : start + height].double().T @ x.double()).flatten() for x, delta in factors]
        )
        gram += rows @ rows.T
    return gram.numpy()


def _compare(
    gram: Floats, names: list[str], codes: Ints, clusters: Ints, paired: bool, seed: int, about: str
) -> GradientCosines:
    squares = gram.diagonal()
    if not np.isfinite(gram).all():
        raise InputError("a gradient is not finite: find out which, or load the model in float32")
    if (squares <= 0).any():
        raise InputError(
            f"the gradient of example {squares.argmin()} is zero, which has no direction: drop it"
        )
    centred = gram - gram.mean(0) - gram.mean(1)[:, None] + gram.mean()
    if (centred.diagonal() <= 1e-12 * squares).any():
        raise InputError(
            "a gradient equals the mean of all: centring leaves no direction; give other examples"
        )
    results = [
        _statistics(
            products / np.sqrt(np.outer(products.diagonal(), products.diagonal())),
            names,
            codes,
            clusters,
            paired,
            seed,
        )
        for products in (gram, centred)
    ]
    labels = tuple(names[code] for code in codes)
    return GradientCosines(results[0], results[1], labels, np.sqrt(squares), about)


def _statistics(
    cosines: Floats, names: list[str], codes: Ints, clusters: Ints, paired: bool, seed: int
) -> CosineStatistics:
    cosines = cosines.clip(-1, 1)
    apart, same = clusters[:, None] != clusters, codes[:, None] == codes
    if not ((apart & same).any() and (apart & ~same).any()):
        raise InputError(
            "no examples of different pairs share a label, or none differ in it: give more pairs"
        )
    # The first draw is the sample itself.
    draws = np.concatenate([np.ones((1, len(codes))), _resamples(codes, clusters, seed)])
    method = "percentile bootstrap over " + ("pairs" if paired else "examples")

    def resampled(which: NDArray[np.bool_], drawn: Floats) -> Floats:
        total, size = (((drawn @ part) * drawn).sum(1) for part in (cosines * which, which.astype(float)))
        return np.divide(total, size, out=np.full(len(drawn), np.nan), where=size > 0)

    def interval(values: Floats, which: NDArray[np.bool_]) -> Interval:
        low, high = np.nanpercentile(values[1:], [2.5, 97.5])
        return Interval(float(values[0]), float(low), float(high), int(which.any(1).sum()), 0.95, method)

    def summary(which: NDArray[np.bool_], drawn: Floats = draws) -> Interval:
        return interval(resampled(which, drawn), which)

    groups = {}
    for a, b in combinations_with_replacement(range(len(names)), 2):
        both = np.outer(codes == a, codes == b)
        if (which := (both | both.T) & apart).any():
            groups[names[a], names[b]] = summary(which)
    mates = ~apart & ~same
    difference = resampled(apart & same, draws) - resampled(apart & ~same, draws)
    null = _permuted_differences(cosines, apart.astype(float), codes, clusters, seed)
    hits = int((np.abs(null) >= abs(difference[0]) - 1e-12).sum())
    null_low, null_high = np.percentile(null, [2.5, 97.5])
    return CosineStatistics(
        cosines=cosines,
        within=summary(apart & same),
        cross=summary(apart & ~same),
        difference=interval(difference, apart),
        group_means=groups,
        # Both mates are drawn at once: the square root keeps them from counting twice.
        matched=summary(mates, np.sqrt(draws)) if mates.any() else None,
        null_low=float(null_low),
        null_high=float(null_high),
        p_value=(hits + 1) / (len(null) + 1),
    )


def _resamples(codes: Ints, clusters: Ints, seed: int) -> Floats:
    """How often each example is drawn, `[resample, n]`: clusters are drawn among those with the same labels."""
    rng = stats.derive_generator(seed, "gradients", "bootstrap")
    kinds: dict[tuple[int, ...], list[int]] = {}
    for cluster in range(clusters.max() + 1):
        kinds.setdefault(tuple(sorted(codes[clusters == cluster])), []).append(cluster)
    drawn = np.zeros((RESAMPLES, clusters.max() + 1))
    for members in kinds.values():
        share = np.full(len(members), 1 / len(members))
        drawn[:, members] = rng.multinomial(len(members), share, size=RESAMPLES)
    return drawn[:, clusters]


def _permuted_differences(cosines: Floats, apart: Floats, codes: Ints, clusters: Ints, seed: int) -> Floats:
    """Within minus cross for permuted labels: clusters of one size trade their labels, and shuffle them within."""
    rng = stats.derive_generator(seed, "gradients", "permutation")
    members = [np.flatnonzero(clusters == cluster) for cluster in range(clusters.max() + 1)]
    blocks = [np.array([m for m in members if len(m) == size]) for size in {len(m) for m in members}]
    permuted = np.tile(codes, (RESAMPLES, 1))
    for row in permuted:
        for block in blocks:
            row[block] = rng.permuted(codes[block][rng.permutation(len(block))], axis=1)
    total, size = np.zeros(RESAMPLES), np.zeros(RESAMPLES)
    for code in range(codes.max() + 1):
        own = (permuted == code).astype(float)
        total += ((own @ (cosines * apart)) * own).sum(1)
        size += ((own @ apart) * own).sum(1)
    return total / size - ((cosines * apart).sum() - total) / (apart.sum() - size)
