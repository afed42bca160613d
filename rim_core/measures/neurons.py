"""Neurons that differ, safety-critical ones, and how fine-tuning moves activation from safety to a task.

`safety_neurons` and `activation_shift` are paper A's (A.4 and A.5), `neurons_above` is paper C's (section III.D).

Activations are `rim.capture(model, texts, "mlp_neurons")["mlp_neurons"]`, `[prompt, layer, d_mlp]`: the inputs of the
MLPs' down projections at the last position. Neurons are named `(layer, neuron)`, as `ablate` takes them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from rim_core import checking, stats
from rim_core.errors import InputError
from rim_core.measures._linear import checked
from rim_core.stats import Floats, Interval
from rim_core.tables import by_layer, interval_frame

if TYPE_CHECKING:
    import altair as alt

Neuron = tuple[int, int]

AXES = ("prompt", "layer", "d_mlp")
AGGREGATORS = ("harmonic", "arithmetic", "geometric", "ratio")
PERMUTATIONS = 200
RESAMPLES = 1000
_ELEMENTS_HELD = 2**24


@dataclass(frozen=True, eq=False)
class SafetyNeurons:
    """The neurons that every counterfactual set puts among the top of their layer.

    The sets share their original prompts, so that even meaningless differences overlap far above independence, and
    a neuron that varies much is often on top: the size alone says nothing. The test weighs each neuron found by how
    consistently it rises: its mean difference over the root mean square, 1 where all prompts agree, in the set
    where that is lowest.

    Attributes:
        mask: bool `[layer, d_mlp]`.
        scores: mean over the sets of the mean difference, float32 `[layer, d_mlp]`.
        top: neurons a layer that each set proposes (`m` in the paper).
        n_sets: counterfactual sets (`K`).
        n_prompts: pairs in each.
        expected_independent: size of the intersection if the sets proposed independently.
        expected_permuted: its mean size when each prompt's differences change sign at random, in all sets and layers
            together.
        weighted: neurons found, each weighed by its consistency, `[layer]`.
        null_weighted: the same with permuted signs, `[permutation, layer]`.
        p_value: one-sided, of the weighted size over all layers among the permuted ones.
    """

    mask: NDArray[np.bool_]
    scores: NDArray[np.float32]
    top: int
    n_sets: int
    n_prompts: int
    expected_independent: float
    expected_permuted: float
    weighted: Floats
    null_weighted: Floats
    p_value: float

    @property
    def size(self) -> int:
        """Neurons found, over all layers."""
        return int(self.mask.sum())

    @property
    def neurons(self) -> list[Neuron]:
        """The neurons found, `(layer, neuron)`, ascending."""
        return neuron_list(self.mask)

    def to_frame(self) -> pd.DataFrame:
        """Give a row for each neuron found: layer, neuron, score."""
        layers, neurons = np.nonzero(self.mask)
        return pd.DataFrame({"layer": layers, "neuron": neurons, "score": self.scores[self.mask]})

    def plot(self, title: str = "In which layers do neurons rise in all sets?") -> "alt.LayerChart":
        """Draw the weighted number of neurons by layer beside the middle 95 % of the permuted ones."""
        from rim_core import charts

        found = Interval(self.weighted, self.weighted, self.weighted, self.n_prompts)
        drawn = self.null_weighted
        null = stats.percentiles(np.vstack([drawn.mean(0, keepdims=True), drawn]), len(drawn), "permuted signs")
        return charts.by_layer(
            by_layer({"found": found, "permuted signs": null}),
            series="series",
            title=title,
            y_title="neurons, weighed by consistency",
            description=(
                f"Neurons among the top {self.top} of their layer in all {self.n_sets} sets: {self.size} over "
                f"{len(self.mask)} layers; weighed by consistency {self.weighted.sum():.1f}, and with permuted signs "
                f"{null.estimate.sum():.1f} on average (p = {self.p_value:.2g})."
            ),
        )


@dataclass(frozen=True, eq=False)
class ActivationShift:
    """How far fine-tuning moved a set of neurons from safety to a task.

    Attributes:
        score: the two joined by `aggregator`.
        lost: relative loss of activation on safety prompts.
        gained: relative growth on task prompts.
        aggregator: as in `activation_shift`.
        n_neurons: neurons averaged over.
    """

    score: Interval
    lost: Interval
    gained: Interval
    aggregator: str
    n_neurons: int

    def to_frame(self) -> pd.DataFrame:
        """Give three rows ("score", "lost", "gained"): quantity, estimate, low, high, n, n_neurons, aggregator."""
        found = {(name,): getattr(self, name) for name in ("score", "lost", "gained")}
        return interval_frame(found, ("quantity",)).assign(n_neurons=self.n_neurons, aggregator=self.aggregator)


def neurons_above(source: ArrayLike | Tensor, destination: ArrayLike | Tensor, *, factor: float = 1.0) -> list[Neuron]:
    """Give the neurons whose mean difference between two sets of prompts is above `factor` times their layer's mean.

    Paper C, section III.D: neurons with an above-mean activation difference.

    Args:
        source, destination: activations of two sets of prompts, `[prompt, layer, d_mlp]`.
        factor: of the layer's mean absolute difference.

    Returns:
        `(layer, neuron)`, ascending, as `patch(units=...)` and `ablate(neurons=...)` take them.

    Raises:
        InputError: shapes that differ in more than the prompts, or values that are not finite.

    Example:
        >>> import torch
        >>> rim.neurons_above(torch.tensor([[[0.0, 3.0, 0.1]]]), torch.zeros(2, 1, 3))
        [(0, 1)]
    """
    first = checked(source, "neurons_above: source", AXES)
    second = checked(destination, "neurons_above: destination", ("prompt", *first.shape[1:]))
    gap = (first.double().mean(0) - second.double().mean(0)).abs()
    return neuron_list(gap > factor * gap.mean(dim=-1, keepdim=True))


def safety_neurons(
    original: ArrayLike | Tensor, counterfactuals: Sequence[ArrayLike | Tensor], *, share: float = 0.01, seed: int = 0
) -> SafetyNeurons:
    """Find the neurons that rise most on forced-refusal counterfactuals, in every set of them (paper A, A.4).

    `A_safe = intersection over k of Top-m(f(counterfactual_k) - f(original))` in each layer, f the mean
    activation over prompts at the last position.

    Args:
        original: activations on the harmful requests, `[prompt, layer, d_mlp]`.
        counterfactuals: one a set, on the same requests rewritten, in the same order.
        share: of a layer's neurons that each set proposes, at least one neuron. Not stated by the paper, and neither
            are the number of sets nor the position.
        seed: of the permuted signs.

    Raises:
        InputError: no set, shapes that differ, fewer than two prompts, values not finite, or a share outside 0 to 1.

    Example:
        One neuron that rises in both sets:

        >>> import torch
        >>> original = torch.randn(8, 2, 50)
        >>> rewritten = [original + 0.1 * torch.randn(8, 2, 50) for _ in range(2)]
        >>> for each in rewritten: each[:, 1, 7] += 2
        >>> (1, 7) in rim.safety_neurons(original, rewritten, share=0.02).neurons
        True
    """
    before = _activations(original, "safety_neurons: original")
    if isinstance(counterfactuals, Tensor | np.ndarray) and counterfactuals.ndim == 3:
        raise InputError("safety_neurons: counterfactuals is one set; give a list of sets")
    sets = [_activations(found, f"safety_neurons: set {k}", before) for k, found in enumerate(counterfactuals)]
    if not sets:
        raise InputError("safety_neurons: no counterfactual set was given; give at least one")
    checking.number(share, "safety_neurons: share", above=0, below=1)
    n_prompts, n_layers, width = before.shape
    top = max(1, round(share * width))
    differences = torch.stack([found - before for found in sets], dim=1).flatten(1)
    spread = differences.square().mean(0).sqrt().clamp(min=torch.finfo(torch.float32).tiny)

    def agree(signs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mask and weights `[row, layer, d_mlp]` and means `[row, set, layer, d_mlp]` for each row of signs."""
        means = signs @ differences / n_prompts
        shape = (len(sets), n_layers, width)
        consistency, means = (means / spread).unflatten(1, shape), means.unflatten(1, shape)
        chosen = torch.zeros_like(means, dtype=torch.bool)
        mask = chosen.scatter_(-1, means.topk(top, dim=-1).indices, True).all(1)
        return mask, consistency.amin(1) * mask, means

    mask, weights, means = (found[0] for found in agree(torch.ones(1, n_prompts)))
    rng = stats.derive_generator(seed, "neurons", "signs")
    signs = torch.from_numpy(rng.choice([-1.0, 1.0], size=(PERMUTATIONS, n_prompts)).astype(np.float32))
    sizes, null = [], []
    for part in signs.split(max(1, _ELEMENTS_HELD // differences.shape[1])):
        null_mask, null_weights, _ = agree(part)
        sizes.append(null_mask.sum((1, 2)))
        null.append(null_weights.sum(-1))
    weighted, permuted = weights.sum(-1).double().numpy(), torch.cat(null).double().numpy()
    hits = int((permuted.sum(1) >= weighted.sum()).sum())
    return SafetyNeurons(
        mask=mask.numpy(),
        scores=means.mean(0).numpy(),
        top=top,
        n_sets=len(sets),
        n_prompts=n_prompts,
        expected_independent=n_layers * width * (top / width) ** len(sets),
        expected_permuted=float(torch.cat(sizes).double().mean()),
        weighted=weighted,
        null_weighted=permuted,
        p_value=(hits + 1) / (PERMUTATIONS + 1),
    )


def neuron_list(mask: ArrayLike | Tensor) -> list[Neuron]:
    """Give a mask as the list of its `(layer, neuron)`, ascending.

    Args:
        mask: boolean `[layer, d_mlp]`.

    Example:
        >>> import numpy as np
        >>> rim.neurons.neuron_list(np.eye(2, dtype=bool))
        [(0, 0), (1, 1)]
    """
    return [(int(layer), int(neuron)) for layer, neuron in zip(*np.nonzero(_mask(mask)), strict=True)]


def random_like(mask: ArrayLike | Tensor, *, seed: int = 0) -> list[Neuron]:
    """Give as many random neurons in each layer as the mask has there, none of them in the mask: the control.

    Args:
        mask: boolean `[layer, d_mlp]`, as `SafetyNeurons.mask`.
        seed: of the draw.

    Raises:
        InputError: not a boolean mask `[layer, d_mlp]`, or a layer with more neurons in the mask than outside.

    Example:
        >>> import numpy as np
        >>> [layer for layer, _ in rim.neurons.random_like(np.eye(2, 50, dtype=bool))]
        [0, 1]
    """
    given = _mask(mask)
    rng = stats.derive_generator(seed, "neurons", "random_like")
    drawn: list[Neuron] = []
    for layer, row in enumerate(given):
        rest = np.flatnonzero(~row)
        if row.sum() > len(rest):
            raise InputError(
                f"random_like: layer {layer} has {row.sum()} of {len(row)} neurons in the mask, too many to draw others"
            )
        chosen = np.sort(rng.choice(rest, size=int(row.sum()), replace=False))
        drawn += [(layer, int(neuron)) for neuron in chosen]
    return drawn


def activation_shift(
    before_safety: ArrayLike | Tensor,
    after_safety: ArrayLike | Tensor,
    before_task: ArrayLike | Tensor,
    after_task: ArrayLike | Tensor,
    neurons: Sequence[Neuron],
    *,
    aggregator: Literal["harmonic", "arithmetic", "geometric", "ratio"] = "harmonic",
    eps: float = 0.1,
    seed: int = 0,
) -> ActivationShift:
    """Measure the reciprocal activation shift of fine-tuning, RAS (paper A, A.5).

    `RAS = 2 lost gained / (lost + gained)`. The paper does not state how the two are measured; ours:
    `lost = mean_j relu(f_before - f_after) / (|f_before| + e)` on safety prompts, `gained` the same with
    `f_after - f_before` on task prompts, f_j the neuron's mean over prompts. `e` is `eps` times the mean of
    `|f_before|` over the neurons, so that the scale of activations does not matter and a neuron near zero
    cannot outweigh the others.

    Both are 0 or more, and above 0 as soon as anything moves, by chance too: only a comparison, with
    `random_like` or between fine-tunes, says anything. Intervals are a percentile bootstrap over prompts.

    Args:
        before_safety, after_safety: activations on the same safety prompts before and after, `[prompt, layer, d_mlp]`.
        before_task, after_task: the same on task prompts.
        neurons: `(layer, neuron)`, as `SafetyNeurons.neurons` and `random_like` give them.
        aggregator: `"harmonic"` as published; the others ours, to see what it decides: `"arithmetic"` and
            `"geometric"` means, and `"ratio"`, lost over gained. Where either is 0, harmonic and geometric are 0;
            where nothing is gained the ratio is NaN.
        eps: as above; ours.
        seed: of the resampling.

    Raises:
        InputError: shapes that differ, fewer than two prompts, values not finite, no neurons or neurons that do
            not exist, an unknown aggregator, eps not above 0, or neurons that were all silent before.

    Example:
        A neuron that halves on safety prompts and doubles on the task's:

        >>> import torch
        >>> before = torch.ones(6, 1, 1)
        >>> found = rim.activation_shift(before, before / 2, before, before * 2, [(0, 0)], aggregator="ratio", eps=1e-9)
        >>> round(found.lost.estimate, 3), round(found.gained.estimate, 3), round(found.score.estimate, 3)
        (0.5, 1.0, 0.5)
    """
    checking.one_of(aggregator, AGGREGATORS, "activation_shift: aggregator")
    checking.number(eps, "activation_shift: eps", above=0)
    lost, n_safety = _shift(before_safety, after_safety, neurons, eps, -1, seed, "safety")
    gained, n_task = _shift(before_task, after_task, neurons, eps, 1, seed, "task")
    over = "percentile bootstrap over prompts"
    return ActivationShift(
        score=stats.percentiles(_join(lost, gained, aggregator), n_safety + n_task, over),
        lost=stats.percentiles(lost, n_safety, over),
        gained=stats.percentiles(gained, n_task, over),
        aggregator=aggregator,
        n_neurons=len(neurons),
    )


def _shift(
    before: Any, after: Any, neurons: Sequence[Neuron], eps: float, sign: int, seed: int, what: str
) -> tuple[Floats, int]:
    """Mean relative growth (`sign` 1) or fall (-1), of the sample and of each resample, and the number of prompts."""
    first = _activations(before, f"activation_shift: before_{what}")
    second = _activations(after, f"activation_shift: after_{what}", first)
    chosen = np.array(neurons, dtype=np.int64).reshape(-1, 2)
    if not len(chosen) or (chosen < 0).any() or (chosen >= first.shape[1:]).any():
        raise InputError(
            f"activation_shift: {len(chosen)} neurons for {first.shape[1]} layers of {first.shape[2]}; give at least "
            "one, each (layer, neuron)"
        )
    picked = [found[:, chosen[:, 0], chosen[:, 1]].double().numpy() for found in (first, second)]
    values = np.concatenate(picked, axis=1)
    # Before and after are resampled together; safety and task prompts apart.
    own = int(stats.derive_generator(seed, what).integers(2**31))
    draws = stats.resampled_means(values, n_resamples=RESAMPLES, seed=own)
    old, new = np.split(np.concatenate([values.mean(0, keepdims=True), draws]), 2, axis=1)
    size = np.abs(old)
    # The sample's own floor for all resamples: a resample may be silent where the sample is not.
    if not (floor := eps * size[0].mean()):
        raise InputError(f"activation_shift: the neurons are all silent in before_{what}: nothing to compare with")
    return (np.maximum(sign * (new - old), 0) / (size + floor)).mean(1), len(first)


def _join(lost: Floats, gained: Floats, aggregator: str) -> Floats:
    if aggregator == "arithmetic":
        return (lost + gained) / 2
    if aggregator == "geometric":
        return np.sqrt(lost * gained)
    if aggregator == "ratio":
        return np.divide(lost, gained, out=np.full(len(lost), np.nan), where=gained > 0)
    total = lost + gained
    return np.divide(2 * lost * gained, total, out=np.zeros(len(lost)), where=total > 0)


def _activations(values: Any, name: str, like: Tensor | None = None) -> Tensor:
    """Activations of two prompts or more as float32 on the CPU, `[prompt, layer, d_mlp]`, of the shape of `like`."""
    given = checked(values, name, AXES if like is None else tuple(like.shape)).float()
    if len(given) < 2:
        raise InputError(f"{name} is of a single prompt; give at least two")
    return given


def _mask(mask: Any) -> NDArray[np.bool_]:
    given = np.asarray(mask)
    if given.ndim != 2 or given.dtype != np.bool_:
        raise InputError(f"a mask of neurons is boolean [layer, d_mlp], not {given.dtype} {given.shape}")
    return given
