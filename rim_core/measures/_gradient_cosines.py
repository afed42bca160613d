"""How alike gradients are by label: cosines, their means, bootstrap intervals and a permuted null.

Everything follows from the gradients' inner products, so that no gradient is needed here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations_with_replacement
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from rim_core import stats
from rim_core.errors import InputError
from rim_core.stats import Floats, Groups, Interval, Ints
from rim_core.tables import interval_frame

if TYPE_CHECKING:
    import altair as alt

RESAMPLES = 2000
FEWEST_EXAMPLES = 3


@dataclass(frozen=True, eq=False)
class CosineStatistics:
    """Cosines of gradients and their means by label; examples of one pair are in none of the means but `matched`.

    Intervals are a percentile bootstrap over examples (or pairs), those of one label among themselves. They are
    up to 1.4 times too wide where cosines vary between examples without any example being unlike the rest.

    Attributes:
        cosines: `[example, example]`, -1 to 1.
        within: mean over all pairs of examples that share a label.
        cross: of those that do not.
        difference: within minus cross, with the interval of the same resamples.
        group_means: mean by two labels, `(a, b)` with a before b, and `(a, a)`.
        matched: mean over examples of one pair with different labels; None without pairs.
        null_low: lower end of the middle 95 % of the difference when labels are permuted.
        null_high: its upper end.
        p_value: two-sided, of the difference among the permuted ones.
    """

    cosines: Floats = field(repr=False)
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
        raw: cosines, means, intervals and the label-permuted null before centring.
        centred: the same after it.
        labels: `[example]`.
        norms: L2 norm of each gradient before centring, `[example]`.
        about: which weight and loss, in words.
    """

    raw: CosineStatistics
    centred: CosineStatistics
    labels: tuple[str, ...] = field(repr=False)
    norms: Floats = field(repr=False)
    about: str

    def to_frame(self) -> pd.DataFrame:
        """Give a row a kind ("raw", "centred") and comparison: kind, comparison, estimate (mean cosine), low, high, n,
        and null_low, null_high, p_value, which only the comparison "within minus cross" has.
        """
        kinds = {"raw": self.raw, "centred": self.centred}
        means: dict[tuple[str, str], Interval] = {}
        for kind, found in kinds.items():
            means[kind, "within"], means[kind, "cross"] = found.within, found.cross
            means[kind, "within minus cross"] = found.difference
            means |= {(kind, f"{a} with {b}"): mean for (a, b), mean in found.group_means.items()}
            means |= {(kind, "same pair"): found.matched} if found.matched else {}
        frame = interval_frame(means, ("kind", "comparison"))
        tested = frame["comparison"] == "within minus cross"
        for name in ("null_low", "null_high", "p_value"):
            frame.loc[tested, name] = [getattr(found, name) for found in kinds.values()]
        return frame

    def plot(self, *, title: str = "Which mean cosines does centring turn negative?") -> "alt.LayerChart":
        """Draw the mean cosine of each two labels, raw and centred, with intervals."""
        from rim_core import charts

        frame = self.to_frame()
        return charts.intervals(
            frame[~frame["comparison"].isin(["within", "cross", "within minus cross"])],
            label="comparison",
            series="kind",
            title=title,
            x_title="mean cosine of gradients",
            reference=0.0,
        )


@dataclass(frozen=True, eq=False)
class Labelled:
    """Which examples belong together: `codes[i]` numbers the label `names[code]`, `clusters[i]` the pair."""

    names: tuple[str, ...]
    codes: Ints
    clusters: Ints
    paired: bool


def labelled(labels: Sequence[object], pairs: Groups, n: int, tool: str) -> Labelled:
    """Number the labels and pairs of `n` examples; without pairs each example is its own.

    Raises:
        InputError: not one label or pair an example, or too few examples of a label.
    """
    codes = stats.group_codes(labels, n)
    given = labels.tolist() if hasattr(labels, "tolist") else list(labels)
    names = tuple(str(given[first]) for first in np.unique(codes, return_index=True)[1])
    counts = np.bincount(codes)
    if counts.min() < FEWEST_EXAMPLES:
        raise InputError(
            f"{tool}: label {names[counts.argmin()]!r} has {counts.min()} examples; give at least {FEWEST_EXAMPLES}"
        )
    return Labelled(names, codes, stats.group_codes(pairs, n), pairs is not None)


def compare(gram: Floats, examples: Labelled, seed: int, about: str) -> GradientCosines:
    """Compare gradients by label, given their inner products `[example, example]`.

    Raises:
        InputError: a gradient that is not finite or zero, before centring or after; or no two examples of different
            pairs that share a label, or that differ in it.
    """
    squares = gram.diagonal()
    if not np.isfinite(gram).all():
        raise InputError("a gradient is not finite: find out which, or load the model in float32")
    if (squares <= 0).any():
        raise InputError(f"the gradient of example {squares.argmin()} is zero, which has no direction: drop it")
    centred = gram - gram.mean(0) - gram.mean(1)[:, None] + gram.mean()
    if (centred.diagonal() <= 1e-12 * squares).any():
        raise InputError("a gradient equals the mean of all: centring leaves no direction; give other examples")
    return GradientCosines(
        raw=_statistics(gram, examples, seed),
        centred=_statistics(centred, examples, seed),
        labels=tuple(examples.names[code] for code in examples.codes),
        norms=np.sqrt(squares),
        about=about,
    )


def _statistics(products: Floats, examples: Labelled, seed: int) -> CosineStatistics:
    squares = products.diagonal()
    cosines = (products / np.sqrt(np.outer(squares, squares))).clip(-1, 1)
    codes, clusters = examples.codes, examples.clusters
    apart, same = clusters[:, None] != clusters, codes[:, None] == codes
    if not ((apart & same).any() and (apart & ~same).any()):
        raise InputError("no examples of different pairs share a label, or none differ in it: give more pairs")
    # The first draw is the sample itself.
    draws = np.concatenate([np.ones((1, len(codes))), _resamples(codes, clusters, seed)])
    method = "percentile bootstrap over " + ("pairs" if examples.paired else "examples")

    def resampled(which: NDArray[np.bool_], drawn: Floats) -> Floats:
        total, size = (((drawn @ part) * drawn).sum(1) for part in (cosines * which, which.astype(float)))
        return np.divide(total, size, out=np.full(len(drawn), np.nan), where=size > 0)

    def summary(which: NDArray[np.bool_], drawn: Floats = draws) -> Interval:
        return stats.percentiles(resampled(which, drawn), int(which.any(1).sum()), method)

    groups = {}
    for a, b in combinations_with_replacement(range(len(examples.names)), 2):
        both = np.outer(codes == a, codes == b)
        if (which := (both | both.T) & apart).any():
            groups[examples.names[a], examples.names[b]] = summary(which)
    mates = ~apart & ~same
    difference = resampled(apart & same, draws) - resampled(apart & ~same, draws)
    null = _permuted_differences(cosines, apart.astype(float), codes, clusters, seed)
    hits = int((np.abs(null) >= abs(difference[0]) - 1e-12).sum())
    null_low, null_high = np.percentile(null, [2.5, 97.5])
    return CosineStatistics(
        cosines=cosines,
        within=summary(apart & same),
        cross=summary(apart & ~same),
        difference=stats.percentiles(difference, int(apart.any(1).sum()), method),
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
