"""Directions and subspaces of activations: differences of means, rotations between models, shared subspaces, erosion.

Pure tensor work on captured activations; float64 inside. What is fitted (a rotation, a direction) is scored on
prompts that it was not fitted on, beside controls, and no `[d, d]` matrix is formed where there are fewer prompts
than dimensions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import scipy.linalg
import scipy.stats
import torch
from numpy.typing import NDArray
from sklearn.covariance import ledoit_wolf_shrinkage
from torch import Tensor

from rim_core import stats
from rim_core.errors import InputError
from rim_core.stats import Interval

if TYPE_CHECKING:
    import altair as alt

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Groups = Sequence[object] | NDArray | None

# Numbers turned into float64 at a time: 64 MB.
_PIECE = 2**23
# Cross-covariance below this share of the largest leaves a rotation undetermined there: it is rounding.
_DETERMINED = 1e-12


def difference_in_means(a: Tensor, b: Tensor, normalise: bool = False) -> Tensor:
    """Give the mean of `a` minus the mean of `b`, accumulated in float64 (Arditi et al. 2024, section 2.3).

    Args:
        a, b: activations `[prompt, ..., d]`, the same shape but for the number of prompts.
        normalise: scale each direction to length 1.

    Returns:
        float32 `[..., d]`, in the unit of the activations.

    Raises:
        InputError: shapes that differ, no prompts, values that are not finite, or a zero direction to normalise.
    """
    first = _checked(a, "difference_in_means: a", at_least=2)
    second = _checked(b, "difference_in_means: b", at_least=2)
    if first.shape[1:] != second.shape[1:]:
        raise InputError(
            f"difference_in_means: a is {_shape(first)} and b {_shape(second)}; only the prompts may differ"
        )
    direction = first.mean(0, dtype=torch.float64) - second.mean(0, dtype=torch.float64)
    return (_unit(direction, "difference_in_means") if normalise else direction).float()


def project(values: Tensor, direction: Tensor) -> Tensor:
    """Give the scalar projection of activations onto the unit vector along a direction.

    Args:
        values: `[..., d]`, or `[..., layer, d]` for a direction a layer.
        direction: `[d]`, or `[layer, d]`; its length is of no account.

    Returns:
        float32 `[...]` or `[..., layer]`, in the unit of the activations (not a cosine).

    Raises:
        InputError: shapes that do not fit, values that are not finite, or a direction of length 0.
    """
    return _project(_checked(values, "project: values"), direction, "project").float()


def cosine(u: Tensor, v: Tensor) -> Tensor:
    """Give the cosine of directions `u` and `v`, `[..., d]` each: float32 `[...]`, such as one a layer.

    Raises:
        InputError: shapes that differ, values that are not finite, or a direction of length 0.
    """
    first, second = _checked(u, "cosine: u"), _checked(v, "cosine: v")
    if first.shape != second.shape:
        raise InputError(f"cosine: u is {_shape(first)} and v {_shape(second)}; give the same shape")
    return (_unit(first, "cosine: u") * _unit(second, "cosine: v")).sum(-1).float()


def whitened_cosine(
    u: Tensor, v: Tensor, samples: Tensor, shrinkage: float | Literal["ledoit-wolf"] = "ledoit-wolf"
) -> Tensor:
    """Give the cosine of two directions in the metric of the inverse covariance of activations.

    `u' C^-1 v / sqrt(u' C^-1 u * v' C^-1 v)`: a few dimensions of large variance, which make unrelated directions
    look alike, count no more than the others (arXiv 2608.23497, the follow-up of paper A). The covariance
    (over n, about the mean) is shrunk, `C = (1 - s) S + s tr(S) / d I`, and inverted in the samples' span.

    Args:
        u, v: `[d]` or `[layer, d]`.
        samples: `[sample, d]` or `[sample, layer, d]`; take each class's mean away first if the classes' distance
            should not count as variance.
        shrinkage: s in 0 to 1, or "ledoit-wolf": estimated from the samples (Ledoit & Wolf 2004, by scikit-learn).

    Returns:
        float32 `[]` or `[layer]`, -1 to 1.

    Raises:
        InputError: shapes that do not fit, a zero direction, fewer than two samples, or s = 0 with a covariance
            that has no inverse.
    """
    first, second = _checked(u, "whitened_cosine: u"), _checked(v, "whitened_cosine: v")
    data = _checked(samples, "whitened_cosine: samples", at_least=2)
    if first.ndim > 2 or not first.shape == second.shape == data.shape[1:] or len(data) < 2:
        raise InputError(
            f"whitened_cosine: u {_shape(first)}, v {_shape(second)}, samples {_shape(data)}; give [d], [d] and at "
            "least two [sample, d], or all with layers before d"
        )
    if first.ndim == 2:
        parts = zip(first, second, data.unbind(1), strict=True)
        return torch.stack([whitened_cosine(*part, shrinkage) for part in parts])
    centred = data.double() - data.mean(0, dtype=torch.float64)
    basis, variances = _principal([centred])
    variances = variances / len(data)
    share = ledoit_wolf_shrinkage(centred.numpy()) if shrinkage == "ledoit-wolf" else float(shrinkage)
    floor = share * float(variances.sum()) / data.shape[1]
    if not 0 <= share <= 1 or (floor <= 0 and len(variances) < data.shape[1]):
        raise InputError(
            f"whitened_cosine: the covariance of {len(data)} samples in {data.shape[1]} dimensions has no inverse at "
            f"shrinkage {share:g}; use 'ledoit-wolf' or a number above 0, at most 1"
        )
    inside = ((1 - share) * variances + floor).rsqrt()

    def whiten(direction: Tensor) -> Tensor:
        """Twice the direction's length: its part in the samples' span and the rest, both scaled."""
        coordinates = direction @ basis
        rest = direction - basis @ coordinates
        return torch.cat([coordinates * inside, rest * floor**-0.5 if floor > 0 else 0 * rest])

    return cosine(whiten(_unit(first, "whitened_cosine: u")), whiten(_unit(second, "whitened_cosine: v")))


@dataclass(frozen=True, eq=False)
class Rotation:
    """An orthogonal map from one model's activations to another's: a turn in a subspace, elsewhere the identity.

    `R = I + basis (turn - I) basis'`, applied on the right: `x R`.

    Attributes:
        basis: orthonormal columns, float64 `[d, rank]`.
        turn: orthogonal, float64 `[rank, rank]`.
        residuals: relative residual `||source R - target|| / ||target||` (Frobenius) by series: "rotation",
            "identity" and "random" (a Haar-random turn of the same subspace) on held-out prompts, and
            "rotation, in sample" on the prompts fitted on, as published.
        gain: the identity's held-out residual minus the rotation's, paired.
        fit, held_out: indices of the prompts on either side of the split.
    """

    basis: Tensor
    turn: Tensor
    residuals: Mapping[str, Interval]
    gain: Interval
    fit: Ints
    held_out: Ints

    @property
    def rank(self) -> int:
        """Dimensions of the subspace that is turned."""
        return len(self.turn)

    def apply(self, x: Tensor) -> Tensor:
        """Map activations or directions `[..., d]` from the source's space to the target's; keeps the dtype.

        Raises:
            InputError: another width than d.
        """
        if x.shape[-1] != len(self.basis):
            raise InputError(
                f"Rotation.apply: x is {_shape(x)}; the rotation is of {len(self.basis)} dimensions"
            )
        basis = self.basis.to(x.device)
        flat = x.reshape(-1, x.shape[-1])
        turned = [
            (piece + ((piece @ basis) @ (self.turn - torch.eye(self.rank)).to(basis)) @ basis.T).to(x.dtype)
            for rows in _slices(*flat.shape)
            for piece in [flat[rows].double()]
        ]
        return torch.cat(turned).reshape(x.shape)

    def to_frame(self) -> pd.DataFrame:
        """Give a row a series: rank, series, residual, low, high, n."""
        return _residual_frame({self.rank: self.residuals})

    def plot(
        self, title: str = "Does a rotation carry one model's activations to the other's?"
    ) -> "alt.LayerChart":
        """Draw the residuals of the rotation and its controls."""
        return _residual_chart(self.to_frame(), title, "series", None)


@dataclass(frozen=True, eq=False)
class RankScan:
    """Residuals of rotations by the rank of the subspace that they turn; all on the same split.

    Attributes:
        residuals: rank -> series -> residual, the series being those of `Rotation.residuals`.
    """

    residuals: Mapping[int, Mapping[str, Interval]]

    def to_frame(self) -> pd.DataFrame:
        """Give a row a rank and series: rank, series, residual, low, high, n."""
        return _residual_frame(self.residuals)

    def plot(self, title: str = "How many dimensions does the rotation need?") -> "alt.LayerChart":
        """Draw the residuals by rank, side by side for the rotation and its controls."""
        frame = self.to_frame()
        return _residual_chart(
            frame.assign(rank=[f"rank {rank}" for rank in frame["rank"]]), title, "rank", "series"
        )


def procrustes(
    source: Tensor,
    target: Tensor,
    rank: int | None = None,
    holdout: float = 0.5,
    groups: Groups = None,
    seed: int = 0,
) -> Rotation:
    """Fit the orthogonal map from one model's activations to another's, and score it on held-out prompts.

    `R = argmin ||source R - target||_F` over orthogonal R: with `U S V' = SVD(source' target)`, `R = U V'`
    (Schönemann 1966; paper C, section III.B, without a held-out part or a control). With fewer prompts than
    dimensions the minimiser is not unique: of all minimisers this is the one nearest to the identity, which leaves
    alone what neither row space reaches. With `rank` the fit is confined to the leading `rank` principal
    directions (about 0) of source and target together; compare ranks by `procrustes_ranks`. Nothing is centred, as
    published: activations with a large common mean have small residuals under the identity too.

    Args:
        source, target: `[prompt, d]`, the two models' activations for the same prompts.
        rank: dimensions to turn in, at most those of the row space; None is the whole row space. Give one for
            thousands of prompts: the subspace takes `8 d rank` bytes.
        holdout: share of prompts (with groups: of groups) to score on. The paper held out none.
        groups: `[prompt]` of what must not be split (category, pair), or None.
        seed: of the split, the random control and the bootstrap.

    Raises:
        InputError: shapes that differ or are not `[prompt, d]`, values that are not finite, fewer than two prompts
            or groups on a side, or a rank larger than the row space.
    """
    alignment = _Alignment(source, target, rank, holdout, groups, seed)
    turn, residuals, gain = alignment.score(alignment.basis.shape[1])
    return Rotation(alignment.basis, turn, residuals, gain, alignment.fit, alignment.held_out)


def procrustes_ranks(
    source: Tensor,
    target: Tensor,
    ranks: Sequence[int],
    holdout: float = 0.5,
    groups: Groups = None,
    seed: int = 0,
) -> RankScan:
    """Give the residuals of `procrustes` for several ranks, on one split and one set of principal directions.

    Choosing the rank of smallest held-out residual makes that residual optimistic: confirm it on other prompts.

    Raises:
        InputError: as `procrustes`, or no rank.
    """
    if not ranks or min(ranks) < 1:
        raise InputError(
            f"procrustes_ranks: ranks are {list(ranks)}; give ranks of at least 1, such as [1, 4, 16]"
        )
    alignment = _Alignment(source, target, max(ranks), holdout, groups, seed)
    return RankScan({rank: alignment.score(rank)[1] for rank in sorted(set(ranks))})


def principal_angles(A: Tensor, B: Tensor) -> Tensor:
    """Give the principal angles between the spans of the rows of `A` and `B` (Björck & Golub 1973).

    Args:
        A, B: `[rank, d]`; rows need be neither orthogonal nor of length 1, and their signs do not matter.

    Returns:
        float32 `[smaller dimension of the two spans]`, in radians, ascending, 0 to pi / 2.

    Raises:
        InputError: not `[rank, d]` with the same d, values that are not finite, or only zeros.
    """
    first = _checked(A, "principal_angles: A", at_least=2)
    second = _checked(B, "principal_angles: B", at_least=2)
    if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[1]:
        raise InputError(
            f"principal_angles: A {_shape(first)}, B {_shape(second)}; give [rank, d] of the same d"
        )
    if not first.any() or not second.any():
        raise InputError("principal_angles: a set of directions is all zeros and spans nothing")
    angles = scipy.linalg.subspace_angles(first.double().numpy().T, second.double().numpy().T)
    return torch.from_numpy(np.sort(angles)).float()


@dataclass(frozen=True, eq=False)
class Overlap:
    """How far two leading subspaces coincide.

    Attributes:
        cosines: of the principal angles, `[rank]`, descending, 0 to 1.
        null_mean, null_low, null_high: mean and 95 % range of the same cosines for random subspaces, `[rank]`.
    """

    cosines: Floats
    null_mean: Floats
    null_low: Floats
    null_high: Floats


@dataclass(frozen=True, eq=False)
class SharedSubspace:
    """Leading subspaces of several data sets' residual differences, and how far each two coincide.

    Attributes:
        bases: name -> orthonormal rows, float32 `[rank, d]`, in order of explained variance; signs are arbitrary.
        explained: name -> share of the total variance by component, `[rank]`.
        overlaps: (name, name) -> `Overlap`; a name with itself compares two random halves of that data set, the
            most that two data sets of half its size could reach.
    """

    bases: Mapping[str, Tensor]
    explained: Mapping[str, Floats]
    overlaps: Mapping[tuple[str, str], Overlap]

    def component_cosines(self, a: str, b: str) -> Tensor:
        """Absolute cosine of each component of `a` with each of `b`, `[rank, rank]` (paper D, figure 6).

        No entry exceeds the first principal cosine, so that the null of that one bounds the null of these.
        """
        for name in (a, b):
            if name not in self.bases:
                raise InputError(
                    f"component_cosines: no data set {name!r}; there are {', '.join(self.bases)}"
                )
        return (self.bases[a] @ self.bases[b].T).abs()

    def to_frame(self) -> pd.DataFrame:
        """Give a row a pair and principal angle: a, b, angle (0 is the smallest), cosine, null_mean, null_low, ..."""
        return pd.concat(
            [
                pd.DataFrame({"a": a, "b": b, "angle": np.arange(len(overlap.cosines)), "cosine": overlap.cosines})
                .assign(null_mean=overlap.null_mean, null_low=overlap.null_low, null_high=overlap.null_high)
                for (a, b), overlap in self.overlaps.items()
            ],
            ignore_index=True,
        )  # fmt: skip

    def plot(
        self, angle: int = 0, title: str = "Do the data sets share their leading directions?"
    ) -> "alt.LayerChart":
        """Draw the cosine of one principal angle for each pair beside the range of random subspaces."""
        from rim_core import charts

        frame = self.to_frame()
        frame = frame[frame["angle"] == angle]
        pair = [
            f"halves of {a}" if a == b else f"{a} and {b}"
            for a, b in zip(frame["a"], frame["b"], strict=True)
        ]
        measured = {"pair": pair, "series": "measured", "value": frame["cosine"]}
        null = {"pair": pair, "series": "random subspaces", "value": frame["null_mean"]}
        rows = [
            pd.DataFrame({**measured, "low": frame["cosine"], "high": frame["cosine"]}),
            pd.DataFrame({**null, "low": frame["null_low"], "high": frame["null_high"]}),
        ]
        above = int((frame["cosine"] > frame["null_high"]).sum())
        return charts.intervals(
            pd.concat(rows, ignore_index=True),
            "value",
            label="pair",
            series="series",
            title=title,
            x_title=f"cosine of principal angle {angle}",
            description=(
                f"Cosine of principal angle {angle} between leading subspaces for {len(frame)} pairs; {above} lie "
                "above the 95 % range of random subspaces."
            ),
        )


def shared_subspace(
    residuals: Mapping[str, Tensor],
    rank: int,
    centre: bool = True,
    draws: int = 200,
    seed: int = 0,
) -> SharedSubspace:
    """Compare the leading directions in which two models differ, across data sets (paper D, section 4.4).

    For each data set the differences of paired activations (instruct minus base, say) are decomposed by SVD, and
    each two leading subspaces compared by principal angles, which know neither sign nor order. The paper compared
    single components by signed cosine and without a null.

    The null is pairs of subspaces of the same rank, uniform in the span of the two data sets' rows: chance agreement
    at this number of prompts. (Subspaces drawn with the rows' own covariance would hold the shared directions.) Two
    causes of agreement pass it that have nothing to do with safety, and are to be put beside the others as data sets
    of their own: differences of mismatched prompts (instruct on one, base on another) hold the dimensions that
    dominate every activation; a benign data set holds what any fine-tuning shares (the paper's overlapped as much).

    Args:
        residuals: name -> differences `[prompt, d]`, the same d.
        rank: leading directions to compare; the paper shows 8.
        centre: take the columns' means away first, as the paper did: the mean shift from one model to the other is
            then not among the directions.
        draws: pairs of random subspaces.
        seed: of the null and of the halves.

    Raises:
        InputError: no data set, other shapes, values that are not finite, or half a data set of fewer dimensions
            than the rank.
    """
    data = {
        name: _checked(value, f"shared_subspace: {name}", at_least=2) for name, value in residuals.items()
    }
    widths = {value.shape[1:] for value in data.values()}
    if [len(width) for width in widths] != [1] or min(rank, draws - 1) < 1:
        shapes = ", ".join(f"{name} {_shape(value)}" for name, value in data.items())
        raise InputError(
            f"shared_subspace: rank {rank}, draws {draws}, data {shapes or 'none'}; give rank >= 1, draws >= 2 and "
            "differences [prompt, d] of the same d"
        )
    leading = {name: _leading(_moved(value, centre), rank, name) for name, value in data.items()}
    overlaps = {}
    for a, b in combinations_with_replacement(data, 2):
        pair, bases = [data[a], data[b]], [leading[a][0], leading[b][0]]
        if a == b:
            pair = [data[a][half] for half in _split(len(data[a]), 0.5, None, seed, f"shared_subspace: {a}")]
            bases = [_leading(_moved(half, centre), rank, a)[0] for half in pair]
        span = len(_principal([_moved(part, centre) for part in pair])[1])
        rng = stats.derive_generator(seed, "shared_subspace", a, b)
        null = np.stack([_random_overlap(span, rank, rng) for _ in range(draws)])
        low, high = np.percentile(null, [2.5, 97.5], axis=0)
        cosines = torch.linalg.svdvals(bases[0].T @ bases[1]).clamp(max=1).numpy()
        overlaps[a, b] = Overlap(cosines, null.mean(0), low, high)
    return SharedSubspace(
        bases={name: basis.T.float() for name, (basis, _) in leading.items()},
        explained={name: shares for name, (_, shares) in leading.items()},
        overlaps=overlaps,
    )


@dataclass(frozen=True, eq=False)
class LayerEstimates:
    """A value a layer with the ends of its 95 % bootstrap interval, each `[layer]`."""

    value: Floats
    low: Floats
    high: Floats


@dataclass(frozen=True, eq=False)
class Erosion:
    """How far a fine-tuned model has gone back from instruct to base, along the direction between those two.

    Attributes:
        fraction: 0 is at instruct, 1 at base, on held-out prompts; the interval is unbounded where base and instruct
            do not differ reliably along the direction, and the value NaN where they are equal (below an adapter).
        same_data: the same with direction and projections from all prompts, as published; None where the direction
            was given.
        projections: mean projections on held-out prompts by model: "base", "other", "instruct".
        direction: unit vectors, float32 `[layer, d]`; zero where base and instruct are equal.
        fit, held_out: indices of the prompts on either side of the split.
    """

    fraction: LayerEstimates
    same_data: LayerEstimates | None
    projections: Mapping[str, LayerEstimates]
    direction: Tensor
    fit: Ints
    held_out: Ints

    def to_frame(self, measure: Literal["fraction", "projection"] = "fraction") -> pd.DataFrame:
        """Give a row a layer and series: layer, series, value, low, high.

        Series of the fraction are "held out" and "same data"; of the projection the models.
        """
        if measure not in ("fraction", "projection"):
            raise InputError(f"erosion_fraction: no measure {measure!r}; use 'fraction' or 'projection'")
        series: dict[str, LayerEstimates] = {"held out": self.fraction}
        if self.same_data is not None:
            series["same data"] = self.same_data
        chosen = series if measure == "fraction" else self.projections
        return pd.concat(
            [
                pd.DataFrame({"layer": np.arange(len(found.value)), "series": name, **vars(found)})
                for name, found in chosen.items()
            ],
            ignore_index=True,
        )

    def plot(
        self, measure: Literal["fraction", "projection"] = "fraction", title: str | None = None
    ) -> "alt.LayerChart":
        """Draw the fraction, or the three models' mean projections (paper D, figure 5), over layers."""
        from rim_core import charts

        of_fraction = measure == "fraction"
        return charts.by_layer(
            self.to_frame(measure),
            "value",
            series="series",
            title=title or "How far has fine-tuning gone back to base?",
            y_title="erosion: 0 instruct, 1 base"
            if of_fraction
            else "mean projection on instruct minus base",
            description=(
                f"{measure.capitalize()} over {len(self.direction)} layers on {len(self.held_out)} prompts; "
                f"fraction at the last layer {self.fraction.value[-1]:.2f}."
            ),
            chance=0.0 if of_fraction else None,
        )


def erosion_fraction(
    base: Tensor,
    instruct: Tensor,
    other: Tensor,
    direction: Tensor | None = None,
    holdout: float = 0.5,
    groups: Groups = None,
    seed: int = 0,
) -> Erosion:
    """Measure by layer how far a fine-tuned model has gone back from instruct to base (paper D, section 4.3).

    `e = (p_instruct - p_other) / (p_instruct - p_base)` of mean projections on `v = mean_instruct - mean_base`.
    The paper took v and the projections from the same prompts, which separates the two models whatever they are;
    here v is fitted on one part and everything else measured on the other, and both are given. Intervals are a
    bootstrap of held-out prompts or groups; they leave out the uncertainty of v itself.

    Args:
        base, instruct, other: `[prompt, layer, d]`, three models' activations for the same prompts.
        direction: `[layer, d]` to project on instead; nothing is then fitted, and all prompts are measured.
        holdout: share of prompts (with groups: of groups) to measure on.
        groups: `[prompt]` of what must not be split, or None.
        seed: of the split and the bootstrap.

    Raises:
        InputError: shapes that differ, values that are not finite, base and instruct equal in every layer, a given
            direction of length 0, or fewer than two prompts or groups on a side.
    """
    models = {
        name: _checked(value, f"erosion_fraction: {name}", at_least=3)
        for name, value in (("base", base), ("other", other), ("instruct", instruct))
    }
    if len({value.shape for value in models.values()}) > 1 or base.ndim != 3:
        shapes = ", ".join(f"{name} {_shape(value)}" for name, value in models.items())
        raise InputError(f"erosion_fraction: {shapes}; give the same [prompt, layer, d] for all three")
    n = len(models["base"])
    codes = stats.group_codes(groups, n, "erosion_fraction")
    everything = np.arange(n)
    if direction is not None:
        if direction.shape != base.shape[1:]:
            raise InputError(
                f"erosion_fraction: direction {_shape(direction)}, activations {_shape(base)}; give [layer, d]"
            )
        fit, held_out = everything[:0], everything
        unit = _unit(_checked(direction, "erosion_fraction: direction"), "erosion_fraction: direction")
        same_data = None
    else:
        fit, held_out = _split(n, holdout, codes, seed, "erosion_fraction")
        unit = _shift(models, fit)
        same_data = _erosion(models, _shift(models, everything), everything, codes, seed)[0]
    fraction, projections = _erosion(models, unit, held_out, codes, seed)
    return Erosion(fraction, same_data, projections, unit.float(), fit, held_out)


def _erosion(
    models: Mapping[str, Tensor], unit: Tensor, rows: Ints, codes: Ints, seed: int
) -> tuple[LayerEstimates, dict[str, LayerEstimates]]:
    projected = [_dot(value[rows], unit).numpy() for value in models.values()]
    together = np.concatenate(projected, axis=1)
    drawn = stats.resampled_means(together, codes[rows], seed=seed)
    means, (low, high) = together.mean(0), np.percentile(drawn, [2.5, 97.5], axis=0)
    thirds = zip(*(np.split(values, 3) for values in (means, low, high)), strict=True)
    projections = {name: LayerEstimates(*third) for name, third in zip(models, thirds, strict=True)}

    base, other, instruct = np.split(means, 3)
    drawn_base, drawn_other, drawn_instruct = np.split(drawn, 3, axis=1)
    gap = drawn_instruct - drawn_base
    gap_low, gap_high = np.percentile(gap, [2.5, 97.5], axis=0)
    # A quotient whose denominator may be 0 has no bounded interval (Fieller 1954).
    reliable = (gap_low > 0) | (gap_high < 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        value = (instruct - other) / (instruct - base)
        ends = np.percentile((drawn_instruct - drawn_other) / gap, [2.5, 97.5], axis=0)
    fraction = LayerEstimates(
        value, np.where(reliable, ends[0], -np.inf), np.where(reliable, ends[1], np.inf)
    )
    return fraction, projections


def _shift(models: Mapping[str, Tensor], rows: Ints) -> Tensor:
    """Unit vectors from base to instruct, float64 `[layer, d]`; zero where the two are equal, as below an adapter."""
    means = [models[name][rows].mean(0, dtype=torch.float64) for name in ("instruct", "base")]
    shift = means[0] - means[1]
    if not shift.any():
        raise InputError(
            "erosion_fraction: base and instruct are equal in every layer; give two models that differ"
        )
    lengths = shift.norm(dim=-1, keepdim=True)
    return torch.where(lengths > 0, shift / lengths, 0.0)


class _Alignment:
    """Source and target in the principal directions of the part to fit on, ready for a rotation of any rank."""

    def __init__(
        self,
        source: Tensor,
        target: Tensor,
        rank: int | None,
        holdout: float,
        groups: Groups,
        seed: int,
    ) -> None:
        x = _checked(source, "procrustes: source", at_least=2)
        y = _checked(target, "procrustes: target", at_least=2)
        if x.ndim != 2 or x.shape != y.shape:
            raise InputError(
                f"procrustes: source {_shape(x)}, target {_shape(y)}; give the same [prompt, d] for both"
            )
        self.seed, self.method = seed, "percentile bootstrap" if groups is None else "bootstrap over groups"
        self.codes = stats.group_codes(groups, len(x), "procrustes")
        self.fit, self.held_out = _split(len(x), holdout, self.codes, seed, "procrustes")
        self.basis, _ = _principal([x, y], self.fit, rank)
        if rank is not None and not 1 <= rank <= self.basis.shape[1]:
            raise InputError(
                f"procrustes: rank {rank} is not 1 to {self.basis.shape[1]}, the dimensions that the {len(self.fit)} "
                "prompts fitted on span"
            )
        self.x, self.y = _times(x, self.basis), _times(y, self.basis)
        pieces = _slices(*x.shape)
        self.apart = torch.cat([(x[i].double() - y[i].double()).square().sum(1) for i in pieces])
        self.size = torch.cat([y[i].double().square().sum(1) for i in pieces])

    def score(self, rank: int) -> tuple[Tensor, dict[str, Interval], Interval]:
        """The turn in the leading `rank` directions, its residuals and the controls', and its gain on the identity."""
        x, y = self.x[:, :rank], self.y[:, :rank]
        turn = _nearest_turn(x[self.fit], y[self.fit])
        rng = stats.derive_generator(self.seed, "procrustes", "random", rank)
        haar = torch.from_numpy(np.atleast_2d(scipy.stats.ortho_group.rvs(rank, random_state=rng)))
        outside = (self.apart - (x - y).square().sum(1)).clamp(min=0)
        squares = torch.stack(
            [
                (x @ turn - y).square().sum(1) + outside,
                self.apart,
                (x @ haar - y).square().sum(1) + outside,
                self.size,
            ],
            dim=1,
        ).numpy()
        held, drawn = self._residuals(squares, self.held_out)
        inside, drawn_inside = self._residuals(squares, self.fit)
        series = {
            "rotation": self._interval(held[0], drawn[:, 0], len(self.held_out)),
            "identity": self._interval(held[1], drawn[:, 1], len(self.held_out)),
            "random": self._interval(held[2], drawn[:, 2], len(self.held_out)),
            "rotation, in sample": self._interval(inside[0], drawn_inside[:, 0], len(self.fit)),
        }
        return turn, series, self._interval(held[1] - held[0], drawn[:, 1] - drawn[:, 0], len(self.held_out))

    def _interval(self, estimate: float, drawn: Floats, n: int) -> Interval:
        low, high = np.percentile(drawn, [2.5, 97.5])
        return Interval(float(estimate), float(low), float(high), n, method=self.method)

    def _residuals(self, squares: Floats, rows: Ints) -> tuple[Floats, Floats]:
        """Relative residuals of the series, and their bootstrap `[resample, series]`."""
        chosen = squares[rows]
        drawn = stats.resampled_means(chosen, self.codes[rows], seed=self.seed)
        means = chosen.mean(0)
        return np.sqrt(means[:-1] / means[-1]), np.sqrt(drawn[:, :-1] / drawn[:, -1:])


def _nearest_turn(x: Tensor, y: Tensor) -> Tensor:
    """The orthogonal minimiser of `||x turn - y||`, and of all minimisers the one nearest to the identity."""
    u, s, vh = torch.linalg.svd(x.T @ y)
    known = s > s[0] * _DETERMINED
    free_u, free_vh = u[:, ~known], vh[~known]
    # What the data leave open is itself a Procrustes problem: of the open directions against themselves.
    a, _, bh = torch.linalg.svd(free_u.T @ free_vh.T)
    return u[:, known] @ vh[known] + free_u @ (a @ bh) @ free_vh


def _residual_frame(residuals: Mapping[int, Mapping[str, Interval]]) -> pd.DataFrame:
    rows = [
        (rank, name, found.estimate, found.low, found.high, found.n)
        for rank, series in residuals.items()
        for name, found in series.items()
    ]
    return pd.DataFrame(rows, columns=["rank", "series", "residual", "low", "high", "n"])


def _residual_chart(frame: pd.DataFrame, title: str, label: str, series: str | None) -> "alt.LayerChart":
    from rim_core import charts

    best = frame.iloc[frame["residual"].to_numpy().argmin()]
    return charts.intervals(
        frame,
        "residual",
        label=label,
        series=series,
        title=title,
        x_title="relative residual",
        description=(
            "Relative residual of mapping one model's activations to the other's; the smallest is "
            f"{best['residual']:.3g} ({best['series']})."
        ),
    )


def _principal(
    parts: Sequence[Tensor], rows: Ints | None = None, rank: int | None = None
) -> tuple[Tensor, Tensor]:
    """Principal directions about 0 of all parts' rows together, `[d, rank]`, and their squared singular values.

    Directions without variance are left out. Works on the smaller of the Gram and the covariance matrix, a piece
    of the data at a time.
    """
    chosen: Any = slice(None) if rows is None else rows
    counts = [len(part) if rows is None else len(rows) for part in parts]
    n, d = sum(counts), parts[0].shape[1]
    size = min(n, d)
    square = torch.zeros(size, size, dtype=torch.float64)
    if n < d:

        def columns(piece: slice) -> Tensor:
            return torch.cat([part[:, piece][chosen].double() for part in parts])

        for piece in _slices(d, n):
            square += columns(piece) @ columns(piece).T
    else:
        for part in parts:
            kept = part[chosen]
            for piece in _slices(*kept.shape):
                square += kept[piece].double().T @ kept[piece].double()
    values, vectors = torch.linalg.eigh(square)
    values, vectors = values.flip(0), vectors.flip(1)
    kept_values = values > values[0].clamp(min=0) * 10 * size * torch.finfo(torch.float64).eps
    values, vectors = values[kept_values][:rank], vectors[:, kept_values][:, :rank]
    if n >= d:
        return vectors, values
    basis = torch.cat([columns(piece).T @ (vectors * values.rsqrt()) for piece in _slices(d, n)])
    # Directions of small variance lose their right angles in the Gram matrix; the span is kept.
    return torch.linalg.qr(basis)[0], values


def _moved(values: Tensor, centre: bool) -> Tensor:
    return values.double() - values.mean(0, dtype=torch.float64) if centre else values.double()


def _leading(values: Tensor, rank: int, name: str) -> tuple[Tensor, Floats]:
    basis, squares = _principal([values])
    if len(squares) < rank:
        raise InputError(
            f"shared_subspace: {len(values)} differences of {name!r} span {len(squares)} dimensions, fewer than rank "
            f"{rank}; give more prompts (each half must span the rank) or a smaller rank"
        )
    return basis[:, :rank], (squares[:rank] / squares.sum()).numpy()


def _random_overlap(d: int, rank: int, rng: np.random.Generator) -> Floats:
    """Principal cosines, descending, of two subspaces drawn uniformly in `d` dimensions."""
    first, second = (np.linalg.qr(rng.standard_normal((d, rank)))[0] for _ in "ab")
    return np.linalg.svd(first.T @ second, compute_uv=False).clip(max=1)


def _split(n: int, holdout: float, codes: Ints | None, seed: int, caller: str) -> tuple[Ints, Ints]:
    """Indices to fit on and to hold out, whole groups on a side."""
    codes = np.arange(n) if codes is None else codes
    units = int(codes.max()) + 1
    held = round(units * holdout)
    if not 2 <= held <= units - 2:
        raise InputError(
            f"{caller}: {units} prompts or groups leave {held} to hold out and {units - held} to fit on at "
            f"holdout={holdout}; at least 2 are needed on each side"
        )
    order = stats.derive_generator(seed, caller, "split").permutation(units)
    out = np.isin(codes, order[:held])
    return np.flatnonzero(~out), np.flatnonzero(out)


def _project(values: Tensor, direction: Tensor, caller: str) -> Tensor:
    unit = _unit(direction.detach().cpu(), f"{caller}: direction")
    if unit.ndim not in (1, 2) or values.shape[values.ndim - unit.ndim :] != unit.shape:
        raise InputError(
            f"{caller}: values {_shape(values)} do not end in the direction's shape {_shape(unit)}; give [d] or "
            "[layer, d]"
        )
    return _dot(values, unit)


def _dot(values: Tensor, vectors: Tensor) -> Tensor:
    """Products of `[..., d]` with `[d]`, or of `[..., layer, d]` with `[layer, d]`, float64."""
    if vectors.ndim == 1:
        return _times(values, vectors[:, None])[..., 0]
    return torch.stack([_dot(*pair) for pair in zip(values.unbind(-2), vectors, strict=True)], dim=-1)


def _times(values: Tensor, matrix: Tensor) -> Tensor:
    """`values @ matrix` in float64, `[..., d] -> [..., k]`, without a float64 copy of all values."""
    flat = values.reshape(-1, values.shape[-1])
    product = torch.cat([flat[piece].double() @ matrix for piece in _slices(*flat.shape)])
    return product.reshape(*values.shape[:-1], matrix.shape[1])


def _slices(count: int, width: int) -> list[slice]:
    """Slices of `count` rows such that a piece holds at most `_PIECE` numbers."""
    step = max(1, _PIECE // width)
    return [slice(start, start + step) for start in range(0, count, step)]


def _unit(direction: Tensor, name: str) -> Tensor:
    """Directions `[..., d]` at length 1, float64."""
    vectors = direction.double()
    lengths = vectors.norm(dim=-1, keepdim=True)
    if zero := (lengths[..., 0] == 0).nonzero().tolist():
        where = f" at index {zero[0][0]}" if zero[0] else ""
        raise InputError(
            f"{name} has length 0{where} and points nowhere; leave it out, or check what it was made of"
        )
    return vectors / lengths


def _checked(values: Tensor, name: str, at_least: int = 1) -> Tensor:
    """The values on the CPU, if they are floating-point, finite, and have `at_least` axes."""
    tensor = values.detach().cpu()
    if not tensor.is_floating_point() or tensor.ndim < at_least or 0 in tensor.shape:
        raise InputError(
            f"{name} is {tensor.dtype} {_shape(tensor)}; give activations with {at_least} or more axes, none empty"
        )
    if not tensor.isfinite().all():
        raise InputError(f"{name} holds NaN or infinity; capture in float32 or drop those prompts")
    return tensor


def _shape(tensor: Tensor) -> str:
    return str(list(tensor.shape))
