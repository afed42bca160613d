"""Rotations from one model's activations to another's, scored on prompts that they were not fitted on.

No `[d, d]` matrix is formed where there are fewer prompts than dimensions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import scipy.stats
import torch
from torch import Tensor

from rim_core import checking, stats
from rim_core.errors import InputError
from rim_core.measures._linear import checked, principal, slices, times
from rim_core.stats import Floats, Groups, Interval, Ints
from rim_core.tables import interval_frame

if TYPE_CHECKING:
    import altair as alt

# Cross-covariance below this share of the largest leaves a rotation undetermined there: it is rounding.
_DETERMINED = 1e-12


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
            raise InputError(f"Rotation.apply: x is {list(x.shape)}; the rotation is of {len(self.basis)} dimensions")
        basis = self.basis.to(x.device)
        flat = x.reshape(-1, x.shape[-1])
        turned = [
            (piece + ((piece @ basis) @ (self.turn - torch.eye(self.rank)).to(basis)) @ basis.T).to(x.dtype)
            for rows in slices(*flat.shape)
            for piece in [flat[rows].double()]
        ]
        return torch.cat(turned).reshape(x.shape)

    def to_frame(self) -> pd.DataFrame:
        """Give a row a series: rank, series, estimate (the residual), low, high, n."""
        return RankScan({self.rank: self.residuals}).to_frame()

    def plot(self, title: str = "Does a rotation carry one model's activations to the other's?") -> "alt.LayerChart":
        """Draw the residuals of the rotation and its controls."""
        from rim_core import charts

        return charts.intervals(self.to_frame(), label="series", title=title, x_title="relative residual")


@dataclass(frozen=True, eq=False)
class RankScan:
    """Residuals of rotations by the rank of the subspace that they turn; all on the same split.

    Attributes:
        residuals: rank -> series -> residual, the series being those of `Rotation.residuals`.
    """

    residuals: Mapping[int, Mapping[str, Interval]]

    def to_frame(self) -> pd.DataFrame:
        """Give a row a rank and series: rank, series, estimate (the residual), low, high, n."""
        found = {(rank, name): each for rank, series in self.residuals.items() for name, each in series.items()}
        return interval_frame(found, ("rank", "series"))

    def plot(self, title: str = "How many dimensions does the rotation need?") -> "alt.LayerChart":
        """Draw the residuals by rank, side by side for the rotation and its controls."""
        from rim_core import charts

        frame = self.to_frame()
        frame["rank"] = "rank " + frame["rank"].astype(str)
        return charts.intervals(frame, label="rank", series="series", title=title, x_title="relative residual")


def procrustes(
    source: Tensor,
    target: Tensor,
    *,
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

    Example:
        Two models of which the second is the first, turned:

        >>> import torch
        >>> source, turn = torch.randn(40, 6), torch.linalg.qr(torch.randn(6, 6))[0]
        >>> found = rim.procrustes(source, source @ turn)
        >>> bool(found.residuals["rotation"].estimate < 1e-5 < found.gain.low)
        True
        >>> torch.allclose(found.apply(source), source @ turn, atol=1e-4)
        True
    """
    alignment = _Alignment(source, target, rank, holdout, groups, seed)
    turn, residuals, gain = alignment.score(alignment.basis.shape[1])
    return Rotation(alignment.basis, turn, residuals, gain, alignment.fit, alignment.held_out)


def procrustes_ranks(
    source: Tensor, target: Tensor, ranks: Sequence[int], *, holdout: float = 0.5, groups: Groups = None, seed: int = 0
) -> RankScan:
    """Give the residuals of `procrustes` for several ranks, on one split and one set of principal directions.

    Choosing the rank of smallest held-out residual makes that residual optimistic: confirm it on other prompts.

    Args:
        ranks: each at least 1.
        source, target, holdout, groups, seed: as in `procrustes`.

    Raises:
        InputError: as `procrustes`, or no rank.

    Example:
        >>> import torch
        >>> source = torch.randn(40, 6)
        >>> scan = rim.procrustes_ranks(source, source.roll(1, dims=1), [1, 6])
        >>> scan.residuals[6]["rotation"].estimate < scan.residuals[1]["rotation"].estimate
        True
    """
    ranks = checking.whole_numbers(ranks, "procrustes_ranks: ranks", 1)
    alignment = _Alignment(source, target, max(ranks), holdout, groups, seed)
    return RankScan({rank: alignment.score(rank)[1] for rank in sorted(set(ranks))})


class _Alignment:
    """Source and target in the principal directions of the part to fit on, ready for a rotation of any rank."""

    def __init__(
        self, source: Tensor, target: Tensor, rank: int | None, holdout: float, groups: Groups, seed: int
    ) -> None:
        x = checked(source, "procrustes: source", shape=("prompt", "d"))
        y = checked(target, "procrustes: target", shape=tuple(x.shape))
        self.seed, self.codes = seed, None if groups is None else stats.group_codes(groups, len(x))
        self.fit, self.held_out = stats.split(len(x), holdout, self.codes, seed=seed, salt="procrustes")
        self.basis, _ = principal([x, y], self.fit, rank)
        if rank is not None and not 1 <= rank <= self.basis.shape[1]:
            raise InputError(
                f"procrustes: rank {rank} is not 1 to {self.basis.shape[1]}, the dimensions that the {len(self.fit)} "
                "prompts fitted on span"
            )
        self.x, self.y = times(x, self.basis), times(y, self.basis)
        pieces = slices(*x.shape)
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
            [(x @ turn - y).square().sum(1) + outside, self.apart, (x @ haar - y).square().sum(1) + outside, self.size],
            dim=1,
        ).numpy()
        held_out, fit = self._residuals(squares, self.held_out), self._residuals(squares, self.fit)
        series = {name: held_out[place] for place, name in enumerate(("rotation", "identity", "random"))}
        return turn, series | {"rotation, in sample": fit[0]}, held_out[3]

    def _residuals(self, squares: Floats, rows: Ints) -> Interval:
        """Relative residuals of rotation, identity and random turn, and how much the first gains on the second."""

        def of_squares(means: Floats) -> Floats:
            residuals = np.sqrt(means[:, :-1] / means[:, -1:])
            return np.column_stack([residuals, residuals[:, 1] - residuals[:, 0]])

        codes = None if self.codes is None else self.codes[rows]
        return stats.of_means(squares[rows], of_squares, codes, seed=self.seed)


def _nearest_turn(x: Tensor, y: Tensor) -> Tensor:
    """The orthogonal minimiser of `||x turn - y||`, and of all minimisers the one nearest to the identity."""
    u, s, vh = torch.linalg.svd(x.T @ y)
    known = s > s[0] * _DETERMINED
    free_u, free_vh = u[:, ~known], vh[~known]
    # What the data leave open is itself a Procrustes problem: of the open directions against themselves.
    a, _, bh = torch.linalg.svd(free_u.T @ free_vh.T)
    return u[:, known] @ vh[known] + free_u @ (a @ bh) @ free_vh
