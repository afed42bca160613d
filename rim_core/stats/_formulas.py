"""Intervals from formulas: what an estimate is, and how sure."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import scipy.stats
from numpy.typing import ArrayLike

from rim_core.errors import InputError
from rim_core.stats._samples import coverage, paired_outcomes, sample, share

_COLUMNS = ("[n]", "[n, column]")


@dataclass(frozen=True)
class Interval:
    """An estimate with a two-sided interval, or many that were made alike: `interval[layer]` is one of them.

    Attributes:
        estimate: the statistic on the whole sample, in the unit of the values; a float, or an array.
        low: the interval's lower end, in the same unit; of the shape of `estimate`.
        high: its upper end.
        n: observations behind the estimate.
        level: the interval's nominal coverage, 0 to 1.
        method: how the interval was made, in words.

    Example:
        >>> print(rim.stats.Interval(0.9, 0.55, 1.0, n=10))
        0.9 (95% 0.55 to 1, n=10)
    """

    estimate: Any
    low: Any
    high: Any
    n: int
    level: float = 0.95
    method: str = ""

    def __str__(self) -> str:
        if np.ndim(self.estimate):
            return "\n".join(f"{place}: {self[place]}" for place in np.ndindex(np.shape(self.estimate)))
        return f"{self.estimate:.3g} ({self.level:.0%} {self.low:.3g} to {self.high:.3g}, n={self.n})"

    def __getitem__(self, place: Any) -> "Interval":
        """The interval at a place of an array of them; several for a slice."""
        if not np.ndim(self.estimate):
            raise InputError("this is a single interval, which has no parts")
        estimate, low, high = (
            part if np.ndim(part := values[place]) else float(part) for values in (self.estimate, self.low, self.high)
        )
        return replace(self, estimate=estimate, low=low, high=high)

    def to_frame(self, **axes: Sequence[object]) -> pd.DataFrame:
        """Give a row an estimate: estimate, low, high and n, after a column of labels for each axis, by name."""
        shape = np.shape(self.estimate)
        columns = {name: np.ravel(getattr(self, name)) for name in ("estimate", "low", "high")}
        frame = pd.DataFrame(columns).assign(n=self.n)
        if not axes:
            return frame
        if tuple(map(len, axes.values())) != shape:
            raise InputError(f"to_frame: axes {', '.join(axes)} do not fit estimates of shape {list(shape)}")
        return frame.set_index(pd.MultiIndex.from_product(list(axes.values()), names=list(axes))).reset_index()


def proportion(successes: int, n: int, *, level: float = 0.95) -> Interval:
    """Give a share of successes with its exact interval (Clopper & Pearson 1934).

    Args:
        successes: a count.
        n: of how many.
        level: nominal coverage.

    Raises:
        InputError: unless both are whole numbers with 0 <= successes <= n and n >= 1.

    Example:
        >>> print(rim.stats.proportion(0, 30))
        0 (95% 0 to 0.116, n=30)
    """
    hits, of = share(successes, n, "proportion")
    level = coverage(level)
    half = (1 + level) / 2
    low = float(scipy.stats.beta.ppf(1 - half, hits, of - hits + 1)) if hits else 0.0
    high = float(scipy.stats.beta.ppf(half, hits + 1, of - hits)) if hits < of else 1.0
    return Interval(hits / of, low, high, of, level, "Clopper-Pearson")


def t_interval(values: ArrayLike, *, level: float = 0.95) -> Interval:
    """Give the mean of a few values (seeds, say) with Student's t interval; zero-width if all are equal.

    Args:
        values: `[n]`, or `[n, column]` for an interval a column.
        level: nominal coverage.

    Raises:
        InputError: fewer than two values, or a value that is not finite.

    Example:
        >>> print(rim.stats.t_interval([0.91, 0.94, 0.97]))
        0.94 (95% 0.865 to 1.01, n=3)
    """
    data = sample(values, "t_interval: values", 2, _COLUMNS)
    level = coverage(level)
    half = scipy.stats.t.ppf((1 + level) / 2, len(data) - 1) * scipy.stats.sem(data)
    return _around(data.mean(axis=0), half, len(data), level, "Student t")


def cohens_d(a: ArrayLike, b: ArrayLike, *, level: float = 0.95) -> Interval:
    """Give Cohen's d of a against b: difference of means over the pooled standard deviation (Cohen 1988).

    The interval is the large-sample one of Hedges & Olkin (1985, chapter 5):
    `d +- z * sqrt((n_a + n_b) / (n_a n_b) + d^2 / (2 (n_a + n_b)))`.

    Args:
        a: `[n]`, or `[n, column]` for an effect a column, such as a layer.
        b: likewise, of as many columns.
        level: nominal coverage.

    Raises:
        InputError: fewer than two values in a sample, values that are not finite, or no spread in either.

    Example:
        >>> print(rim.stats.cohens_d([4, 6, 8], [2, 3, 4]))
        1.9 (95% -0.0297 to 3.82, n=6)
        >>> rim.stats.cohens_d([[4, 0], [6, 1]], [[2, 0], [3, 1]]).estimate.round(2)
        array([2.24, 0.  ])
    """
    first, second = sample(a, "cohens_d: a", 2, _COLUMNS), sample(b, "cohens_d: b", 2, _COLUMNS)
    if first.shape[1:] != second.shape[1:]:
        raise InputError(f"cohens_d: a {first.shape} and b {second.shape} differ in columns; give the same ones")
    level = coverage(level)
    n_a, n_b = len(first), len(second)
    variances = (n_a - 1) * first.var(axis=0, ddof=1) + (n_b - 1) * second.var(axis=0, ddof=1)
    pooled = np.sqrt(variances / (n_a + n_b - 2))
    # Rounding leaves a constant sample with a spread of a few ulps, which would make d astronomically large.
    flat = pooled <= 1e-12 * np.maximum(np.abs(first).max(axis=0), np.abs(second).max(axis=0))
    if flat.any():
        where = f" in column {int(np.flatnonzero(flat)[0])}" if flat.ndim else ""
        raise InputError(
            f"cohens_d: neither sample has any spread{where}, so d is undefined; compare the means instead"
        )
    d = (first.mean(axis=0) - second.mean(axis=0)) / pooled
    error = np.sqrt((n_a + n_b) / (n_a * n_b) + d**2 / (2 * (n_a + n_b)))
    half = scipy.stats.norm.ppf((1 + level) / 2) * error
    return _around(d, half, n_a + n_b, level, "Hedges-Olkin large-sample")


def _around(centre: Any, half: Any, n: int, level: float, method: str) -> Interval:
    estimate, low, high = (end if np.ndim(end) else float(end) for end in (centre, centre - half, centre + half))
    return Interval(estimate, low, high, n, level, method)


def paired_difference(a: ArrayLike, b: ArrayLike, *, level: float = 0.95) -> Interval:
    """Give the rate of a minus that of b, two yes-no outcomes of the same items, with Newcombe's interval.

    The two Wilson intervals are combined with the correlation between the outcomes (Newcombe 1998, Statistics in
    Medicine 17, 2635-2650, method 10); it never leaves -1 to 1 and has a width where all pairs agree.

    Args:
        a, b: `[item]` of yes (True, 1) and no (False, 0), in the same order.
        level: nominal coverage.

    Raises:
        InputError: as `mcnemar`.

    Example:
        >>> print(rim.stats.paired_difference([1, 1, 1, 1, 0], [0, 0, 1, 1, 0]))
        0.4 (95% -0.163 to 0.726, n=5)
    """
    first, second = paired_outcomes(a, b, "paired_difference")
    level = coverage(level)
    n = first.size
    yes_a, yes_b, both = first.sum(), second.sum(), (first * second).sum()
    ends_a, ends_b = (
        scipy.stats.binomtest(int(yes), n).proportion_ci(level, method="wilson") for yes in (yes_a, yes_b)
    )
    determinant = n * both - yes_a * yes_b
    if determinant > 0:
        # The method's continuity correction: a small positive correlation counts as none.
        determinant = max(determinant - n / 2, 0.0)
    spread = np.sqrt(yes_a * (n - yes_a) * yes_b * (n - yes_b))
    phi = determinant / spread if spread else 0.0

    def reach(x: float, y: float) -> float:
        return float(np.sqrt(max(x**2 - 2 * phi * x * y + y**2, 0.0)))

    rate_a, rate_b = yes_a / n, yes_b / n
    difference = float(rate_a - rate_b)
    low = difference - reach(rate_a - ends_a.low, ends_b.high - rate_b)
    high = difference + reach(ends_a.high - rate_a, rate_b - ends_b.low)
    return Interval(difference, low, high, n, level, "Newcombe, paired")
