"""Subspaces of activations: the angles between two, and the leading ones that data sets share."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations_with_replacement
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import scipy.linalg
import torch
from torch import Tensor

from rim_core import stats
from rim_core.errors import InputError
from rim_core.measures._linear import checked, principal, shape_of
from rim_core.stats import Floats

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
    """
    first = checked(A, "principal_angles: A", at_least=2)
    second = checked(B, "principal_angles: B", at_least=2)
    if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[1]:
        raise InputError(f"principal_angles: A {shape_of(first)}, B {shape_of(second)}; give [rank, d] of the same d")
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
        """Give a row a pair and principal angle: a, b, angle (0 is the smallest), cosine, null_mean, null_low, ..."""
        frames = [
            pd.DataFrame({"a": a, "b": b, "angle": np.arange(len(overlap.cosines)), **vars(overlap)})
            for (a, b), overlap in self.overlaps.items()
        ]
        return pd.concat(frames, ignore_index=True).rename(columns={"cosines": "cosine"})

    def plot(self, angle: int = 0, title: str = "Do the data sets share their leading directions?") -> "alt.LayerChart":
        """Draw the cosine of one principal angle for each pair beside the range of random subspaces."""
        from rim_core import charts

        frame = self.to_frame()
        frame = frame[frame["angle"] == angle]
        pair = [f"halves of {a}" if a == b else f"{a} and {b}" for a, b in zip(frame["a"], frame["b"], strict=True)]
        series = {"measured": ["cosine"] * 3, "random subspaces": ["null_mean", "null_low", "null_high"]}
        rows = [
            pd.DataFrame({"pair": pair, "series": name, "value": frame[value], "low": frame[low], "high": frame[high]})
            for name, (value, low, high) in series.items()
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
    residuals: Mapping[str, Tensor], rank: int, centre: bool = True, draws: int = 200, seed: int = 0
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
    data = {name: checked(value, f"shared_subspace: {name}", at_least=2) for name, value in residuals.items()}
    widths = {value.shape[1:] for value in data.values()}
    if [len(width) for width in widths] != [1] or min(rank, draws - 1) < 1:
        shapes = ", ".join(f"{name} {shape_of(value)}" for name, value in data.items())
        raise InputError(
            f"shared_subspace: rank {rank}, draws {draws}, data {shapes or 'none'}; give rank >= 1, draws >= 2 and "
            "differences [prompt, d] of the same d"
        )
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
