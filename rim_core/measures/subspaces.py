"""Subspaces of activations: the angles between two, those that data sets share, and erosion along one."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import combinations_with_replacement
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd
import scipy.linalg
import torch
from torch import Tensor

from rim_core import checking, stats
from rim_core.errors import InputError
from rim_core.measures._linear import checked, dot, normalised, principal
from rim_core.stats import Floats, Groups, Interval, Ints
from rim_core.tables import by_layer

if TYPE_CHECKING:
    import altair as alt


def principal_angles(A: Tensor, B: Tensor) -> Tensor:
    """Give the principal angles between the spans of the rows of `A` and `B` (Björck & Golub 1973).

    Args:
        A, B: `[rank, d]`; rows need be neither orthogonal nor of length 1, and their signs do not matter.

    Returns:
        float32 `[smaller dimension of the two spans]`, in radians, ascending, 0 to pi / 2.

    Raises:
        InputError: not `[rank, d]` with the same d, values that are not finite, or only zeros.

    Example:
        >>> import torch
        >>> rim.principal_angles(torch.eye(4)[:2], torch.eye(4)[1:3])
        tensor([0.0000, 1.5708])
    """
    first = checked(A, "principal_angles: A", shape=("rank", "d"))
    second = checked(B, "principal_angles: B", shape=("rank", first.shape[1]))
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
                raise InputError(f"component_cosines: no data set {name!r}; there are {', '.join(self.bases)}")
        return (self.bases[a] @ self.bases[b].T).abs()

    def to_frame(self) -> pd.DataFrame:
        """Give a row a pair and angle: a, b, angle (0 is the smallest), estimate (its cosine), `null_mean`, ..."""
        frames = [
            pd.DataFrame({"a": a, "b": b, "angle": np.arange(len(overlap.cosines)), **vars(overlap)})
            for (a, b), overlap in self.overlaps.items()
        ]
        return pd.concat(frames, ignore_index=True).rename(columns={"cosines": "estimate"})

    def plot(self, angle: int = 0, title: str = "Do the data sets share their leading directions?") -> "alt.LayerChart":
        """Draw the cosine of one principal angle for each pair beside the range of random subspaces."""
        from rim_core import charts

        frame = self.to_frame().query("angle == @angle")
        pair = [f"halves of {a}" if a == b else f"{a} and {b}" for a, b in zip(frame["a"], frame["b"], strict=True)]
        series = {"measured": ["estimate"] * 3, "random subspaces": ["null_mean", "null_low", "null_high"]}
        rows = [
            frame[columns].set_axis(["estimate", "low", "high"], axis=1).assign(pair=pair, series=name)
            for name, columns in series.items()
        ]
        cosine = f"cosine of principal angle {angle}"
        return charts.intervals(pd.concat(rows), label="pair", series="series", title=title, x_title=cosine)


def shared_subspace(
    residuals: Mapping[str, Tensor], rank: int, *, centre: bool = True, draws: int = 200, seed: int = 0
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

    Example:
        Two data sets in which one direction varies most:

        >>> import torch
        >>> common, noise = torch.zeros(10), torch.randn(2, 40, 10)
        >>> common[3] = 9.0
        >>> a, b = noise + torch.randn(2, 40, 1) * common
        >>> overlap = rim.shared_subspace({"a": a, "b": b}, rank=1).overlaps["a", "b"]
        >>> bool(overlap.cosines[0] > overlap.null_high[0])
        True
    """
    if not residuals:
        raise InputError("shared_subspace: no data set; give {name: differences [prompt, d]}")
    data: dict[str, Tensor] = {}
    for name, value in residuals.items():
        d = next(iter(data.values())).shape[1] if data else "d"
        data[name] = checked(value, f"shared_subspace: {name}", shape=("prompt", d))
    checking.whole(rank, "shared_subspace: rank", 1)
    checking.whole(draws, "shared_subspace: draws", 2)
    leading = {name: _leading(_moved(value, centre), rank, name) for name, value in data.items()}
    overlaps = {}
    for a, b in combinations_with_replacement(data, 2):
        pair, bases = [data[a], data[b]], [leading[a][0], leading[b][0]]
        if a == b:
            pair = [data[a][half] for half in stats.split(len(data[a]), 0.5, seed=seed, salt=f"shared_subspace: {a}")]
            bases = [_leading(_moved(half, centre), rank, a)[0] for half in pair]
        span = len(principal([_moved(part, centre) for part in pair])[1])
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


def _moved(values: Tensor, centre: bool) -> Tensor:
    return values.double() - values.mean(0, dtype=torch.float64) if centre else values.double()


def _leading(values: Tensor, rank: int, name: str) -> tuple[Tensor, Floats]:
    basis, squares = principal([values])
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


@dataclass(frozen=True, eq=False)
class Erosion:
    """How far a fine-tuned model has gone back from instruct to base, along the direction between those two.

    Attributes:
        fraction: `[layer]`, 0 is at instruct, 1 at base, on held-out prompts; the interval is unbounded where base
            and instruct do not differ reliably along the direction, and the value NaN where they are equal (below an
            adapter).
        same_data: the same with direction and projections from all prompts, as published; None where the direction
            was given.
        projections: mean projections on held-out prompts, `[layer]`, by model: "base", "other", "instruct".
        direction: unit vectors, float32 `[layer, d]`; zero where base and instruct are equal.
        fit, held_out: indices of the prompts on either side of the split.
    """

    fraction: Interval
    same_data: Interval | None
    projections: Mapping[str, Interval]
    direction: Tensor
    fit: Ints
    held_out: Ints

    def to_frame(self, measure: Literal["fraction", "projection"] = "fraction") -> pd.DataFrame:
        """Give a row a layer and series: layer, series, estimate, low, high, n.

        Series of the fraction are "held out" and "same data"; of the projection the models.
        """
        if checking.one_of(measure, ("fraction", "projection"), "measure") == "projection":
            return by_layer(self.projections)
        same_data = {} if self.same_data is None else {"same data": self.same_data}
        return by_layer({"held out": self.fraction, **same_data})

    def plot(
        self,
        measure: Literal["fraction", "projection"] = "fraction",
        title: str = "How far has fine-tuning gone back to base?",
    ) -> "alt.LayerChart":
        """Draw the fraction, or the three models' mean projections (paper D, figure 5), over layers."""
        from rim_core import charts

        of_fraction = measure == "fraction"
        y_title = "erosion: 0 instruct, 1 base" if of_fraction else "mean projection on instruct minus base"
        chance = 0.0 if of_fraction else None
        return charts.by_layer(self.to_frame(measure), series="series", title=title, y_title=y_title, chance=chance)


def erosion_fraction(
    base: Tensor,
    instruct: Tensor,
    other: Tensor,
    *,
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

    Example:
        A model that is a quarter of the way back, in each of two layers:

        >>> import torch
        >>> base, instruct = torch.randn(2, 20, 2, 8)
        >>> instruct += 3
        >>> found = rim.erosion_fraction(base, instruct, 0.75 * instruct + 0.25 * base)
        >>> found.fraction.estimate.round(4).tolist()
        [0.25, 0.25]
    """
    first = checked(base, "erosion_fraction: base", shape=("prompt", "layer", "d"))
    others = {
        name: checked(value, f"erosion_fraction: {name}", shape=tuple(first.shape))
        for name, value in (("other", other), ("instruct", instruct))
    }
    models = {"base": first, **others}
    codes = None if groups is None else stats.group_codes(groups, len(first))
    everything = np.arange(len(first))
    if direction is not None:
        fit, held_out = everything[:0], everything
        given = checked(direction, "erosion_fraction: direction", shape=tuple(first.shape[1:]))
        unit, same_data = normalised(given, "erosion_fraction: direction"), None
    else:
        fit, held_out = stats.split(len(first), holdout, codes, seed=seed, salt="erosion_fraction")
        unit = _shift(models, fit)
        same_data = _erosion(models, _shift(models, everything), everything, codes, seed)[0]
    fraction, projections = _erosion(models, unit, held_out, codes, seed)
    return Erosion(fraction, same_data, projections, unit.float(), fit, held_out)


def _erosion(
    models: Mapping[str, Tensor], unit: Tensor, rows: Ints, codes: Ints | None, seed: int
) -> tuple[Interval, dict[str, Interval]]:
    """The fraction by layer, and the models' mean projections."""
    projected = np.concatenate([dot(value[rows], unit).numpy() for value in models.values()], axis=1)

    def all_of(means: Floats) -> Floats:
        """The projections, the gap between instruct and base, and the fraction, side by side."""
        base, other, instruct = np.split(means, 3, axis=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.hstack([means, instruct - base, (instruct - other) / (instruct - base)])

    found = stats.of_means(projected, all_of, None if codes is None else codes[rows], seed=seed)
    parts = [found[part] for part in np.split(np.arange(5 * len(unit)), 5)]
    gap, fraction = parts[3:]
    # A quotient whose denominator may be 0 has no bounded interval (Fieller 1954).
    reliable = (gap.low > 0) | (gap.high < 0)
    ends = np.where(reliable, fraction.low, -np.inf), np.where(reliable, fraction.high, np.inf)
    return replace(fraction, low=ends[0], high=ends[1]), dict(zip(models, parts, strict=False))


def _shift(models: Mapping[str, Tensor], rows: Ints) -> Tensor:
    """Unit vectors from base to instruct, float64 `[layer, d]`; zero where the two are equal, as below an adapter."""
    means = [models[name][rows].mean(0, dtype=torch.float64) for name in ("instruct", "base")]
    shift = means[0] - means[1]
    if not shift.any():
        raise InputError("erosion_fraction: base and instruct are equal in every layer; give two models that differ")
    lengths = shift.norm(dim=-1, keepdim=True)
    return torch.where(lengths > 0, shift / lengths, 0.0)
