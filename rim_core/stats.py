"""Intervals, effect sizes and tests: each number a claim rests on, with its n and how it was made.

Every function refuses empty or non-finite input with an `InputError` instead of returning NaN.
"""

import hashlib
import json
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import comb
from typing import Any, Literal

import numpy as np
import pandas as pd
import scipy.stats
from numpy.typing import ArrayLike, NDArray

from rim_core import checking
from rim_core.errors import InputError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
# What must not be split or is resampled whole: a label a value, or None.
Groups = Sequence[object] | NDArray | None
# Counts beyond this, and numbers beyond that, are refused: exact intervals, and sums of squares, go wrong there.
_MOST = 10**9
_LARGEST = 1e150


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


@dataclass(frozen=True)
class Comparison:
    """The result of testing whether two samples differ.

    Attributes:
        statistic: the test's statistic, signed as a minus b where it has a sign.
        p_value: two-sided, 0 to 1.
        n_a, n_b: sizes of the two samples.
        method: which test, in words.
    """

    statistic: float
    p_value: float
    n_a: int
    n_b: int
    method: str


def proportion(successes: int, n: int, level: float = 0.95) -> Interval:
    """Give a share of successes with its exact interval (Clopper & Pearson 1934).

    Raises:
        InputError: unless both are whole numbers with 0 <= successes <= n and n >= 1.
    """
    hits, of = _share(successes, n, "proportion")
    level = _level(level)
    ends = scipy.stats.binomtest(hits, of).proportion_ci(level, method="exact")
    return Interval(hits / of, float(ends.low), float(ends.high), of, level, "Clopper-Pearson")


def _share(successes: Any, n: Any, caller: str) -> tuple[int, int]:
    """Both counts of a proportion as ints."""
    hits, of = _count(successes), _count(n)
    if hits is None or of is None or not 0 <= hits <= of or not 1 <= of <= _MOST:
        raise InputError(
            f"{caller}: {checking.shown(successes)} successes of {checking.shown(n)} is no proportion; give whole "
            "numbers, 0 <= successes <= n, n >= 1 and at most a billion"
        )
    return hits, of


def _count(value: Any) -> int | None:
    """A count as an int, or None where it is none; one that was summed as a float (5.0) is a count all the same."""
    try:
        number = checking.number(value, "count")
    except InputError:
        return None
    return int(number) if number.is_integer() else None


def t_interval(values: ArrayLike, level: float = 0.95) -> Interval:
    """Give the mean of a few values (seeds, say) with Student's t interval; zero-width if all are equal.

    Raises:
        InputError: fewer than two values, or a value that is not finite.
    """
    data = _sample(values, "t_interval: values", at_least=2)
    level = _level(level)
    half = float(scipy.stats.t.ppf((1 + level) / 2, data.size - 1) * scipy.stats.sem(data))
    mean = float(data.mean())
    return Interval(mean, mean - half, mean + half, data.size, level, "Student t")


def bootstrap(
    values: ArrayLike,
    statistic: Callable[[Floats], float] = np.mean,
    groups: Groups = None,
    n_resamples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Give a statistic with its percentile bootstrap interval (Efron & Tibshirani 1993, chapter 13).

    Args:
        values: `[n]`.
        statistic: maps `[n]` values to one number.
        groups: `[n]` labels or None. With groups whole groups are resampled, because values that share
            a topic or a template do not vary independently (Field & Welsh 2007).
        n_resamples: bootstrap samples drawn.
        seed: of the resampling.
        level: nominal coverage; with few values or groups (under about 20) the true one is lower.

    Where all resamples give the same number the interval has no width.

    Raises:
        InputError: fewer than two values or groups, a value that is not finite, lengths that differ, no resamples,
            or a statistic that is not one finite number on the sample or on a resample of it.
    """
    data = _sample(values, "bootstrap: values", at_least=2)
    level = _level(level)
    n_resamples = checking.whole(n_resamples, "bootstrap: n_resamples", 2)
    codes = group_codes(groups, data.size)
    members = [np.flatnonzero(codes == code) for code in range(codes.max() + 1)]

    estimate = _one_number(statistic(data), "the sample")

    def resampled_statistic(drawn: Ints) -> float:
        found = statistic(data[np.concatenate([members[i] for i in drawn])])
        return _one_number(found, "a resample of it")

    ends = scipy.stats.bootstrap(
        (np.arange(len(members)),),
        resampled_statistic,
        vectorized=False,
        n_resamples=n_resamples,
        confidence_level=level,
        method="percentile",
        rng=derive_generator(seed, "bootstrap"),
    ).confidence_interval
    method = "percentile bootstrap" if groups is None else f"cluster bootstrap over {len(members)} groups"
    return Interval(estimate, float(ends.low), float(ends.high), data.size, level, method)


def _one_number(value: Any, of: str) -> float:
    """A statistic's value as a finite float."""
    try:
        number = math.nan if isinstance(value, str) or np.iscomplexobj(value) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise InputError(
            f"bootstrap: the statistic of {of} is {checking.shown(value)}, not one finite number; give more values, or "
            "another statistic"
        )
    return number


def resampled_means(values: ArrayLike, groups: Groups = None, n_resamples: int = 2000, seed: int = 0) -> Floats:
    """Give many columns' means under one shared (cluster) bootstrap: the intervals of all layers at once.

    Args:
        values: `[n, column]`.
        groups: `[n]` labels of what is resampled whole, or None to resample rows.
        n_resamples: bootstrap samples drawn.
        seed: of the resampling.

    Returns:
        `[n_resamples, column]`; percentiles of it are intervals of the column means.

    Raises:
        InputError: not two-dimensional, not finite, fewer than two rows or groups, no resamples, or lengths that
            differ.
    """
    data = _numbers(values, "resampled_means: values", "numbers [n, column]")
    if data.ndim != 2 or len(data) < 2 or not np.isfinite(data).all():
        raise InputError(
            f"resampled_means: values {data.shape} must be finite and [n, column], n at least 2; check the input"
        )
    _refuse_overflow(data, "resampled_means: values")
    n_resamples = checking.whole(n_resamples, "resampled_means: n_resamples", 2)
    codes = group_codes(groups, len(data))
    sizes = np.bincount(codes)
    sums = np.zeros((len(sizes), data.shape[1]))
    np.add.at(sums, codes, data)
    draws = derive_generator(seed, "resampled_means").multinomial(
        len(sizes), np.full(len(sizes), 1 / len(sizes)), size=n_resamples
    )
    return (draws @ sums) / (draws @ sizes)[:, None]


def of_means(
    columns: ArrayLike,
    function: Callable[[Floats], ArrayLike] | None = None,
    groups: Groups = None,
    *,
    n_resamples: int = 2000,
    seed: int = 0,
    over: str = "rows",
) -> Interval:
    """Give a function of columns' means with percentile intervals, all from one shared (cluster) bootstrap.

    A share of variance, a ratio of two means, a correlation: whatever is made of means of what was measured for each
    prompt. The draws are those of `resampled_means`.

    Args:
        columns: `[n, column]`.
        function: of means `[row, column]`, the sample's own in row 0 and a resample's in each other, to
            `[row]` or `[row, value]`; without one the means themselves are meant.
        groups: `[n]` labels of what is resampled whole, or None to resample rows.
        n_resamples: bootstrap samples drawn.
        seed: of the resampling.
        over: what a row is, for the interval's `method`.

    Returns:
        An `Interval` of floats, or of arrays `[value]`. Undefined values (NaN) of resamples are left out.

    Raises:
        InputError: as `resampled_means`.

    Example:
        >>> missed, total = [[1.0], [2.0], [1.5], [0.5]], [[4.0], [5.0], [4.0], [3.0]]
        >>> of_means(np.hstack([missed, total]), lambda mean: 1 - mean[:, 0] / mean[:, 1], n_resamples=200).estimate
        0.6875
    """
    data = _numbers(columns, "of_means: columns", "numbers [n, column]")
    drawn = resampled_means(data, groups, n_resamples, seed)
    means = np.concatenate([data.mean(0, keepdims=True), drawn])
    found = means if function is None else np.asarray(function(means), dtype=np.float64)
    unit = over if groups is None else f"{len(set(group_codes(groups, len(data))))} groups"
    return percentiles(found, len(data), f"percentile bootstrap over {unit}")


def percentiles(values: ArrayLike, n: int, method: str = "percentile bootstrap") -> Interval:
    """Give a 95 % interval from a statistic on a sample and on its resamples; undefined ones (NaN) are left out.

    Args:
        values: `[1 + resample]` or `[1 + resample, value]`, the sample's own first.
        n: observations in the sample.
        method: how it was resampled, in words.

    Example:
        >>> print(percentiles([0.5, 0.4, 0.5, 0.6], n=20))
        0.5 (95% 0.405 to 0.595, n=20)
    """
    data = np.asarray(values, dtype=np.float64)
    estimate, resampled = data[0], data[1:]
    of = np.nanpercentile if np.isnan(resampled).any() else np.percentile
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of a column without any defined value, whose ends are NaN
        low, high = of(resampled, [2.5, 97.5], axis=0)
    if data.ndim == 1:
        return Interval(float(estimate), float(low), float(high), n, method=method)
    return Interval(estimate, low, high, n, method=method)


def cohens_d(a: ArrayLike, b: ArrayLike, level: float = 0.95) -> Interval:
    """Give Cohen's d of a against b: difference of means over the pooled standard deviation (Cohen 1988).

    The interval is the large-sample one of Hedges & Olkin (1985, chapter 5):
    `d +- z * sqrt((n_a + n_b) / (n_a n_b) + d^2 / (2 (n_a + n_b)))`.

    Raises:
        InputError: fewer than two values in a sample, values that are not finite, or no spread in either.
    """
    first, second = _sample(a, "cohens_d: a", at_least=2), _sample(b, "cohens_d: b", at_least=2)
    level = _level(level)
    n_a, n_b = first.size, second.size
    pooled = np.sqrt(((n_a - 1) * first.var(ddof=1) + (n_b - 1) * second.var(ddof=1)) / (n_a + n_b - 2))
    # Rounding leaves a constant sample with a spread of a few ulps, which would make d astronomically large.
    if pooled <= 1e-12 * max(np.abs(first).max(), np.abs(second).max()):
        raise InputError("cohens_d: neither sample has any spread, so d is undefined; compare the means instead")
    d = float((first.mean() - second.mean()) / pooled)
    error = np.sqrt((n_a + n_b) / (n_a * n_b) + d**2 / (2 * (n_a + n_b)))
    half = float(scipy.stats.norm.ppf((1 + level) / 2) * error)
    return Interval(d, d - half, d + half, n_a + n_b, level, "Hedges-Olkin large-sample")


def ks(a: ArrayLike, b: ArrayLike) -> Comparison:
    """Compare two samples' distributions by the two-sample Kolmogorov-Smirnov test.

    The statistic is the largest gap between the two cumulative distributions (0 to 1); the p-value is
    exact up to 10,000 values a sample and asymptotic above. It assumes independent observations.

    Raises:
        InputError: an empty sample or values that are not finite.
    """
    first, second = _sample(a, "ks: a"), _sample(b, "ks: b")
    result = scipy.stats.ks_2samp(first, second)
    return Comparison(float(result.statistic), float(result.pvalue), first.size, second.size, "Kolmogorov-Smirnov")


def permutation_test(
    a: ArrayLike,
    b: ArrayLike,
    statistic: Literal["mean", "median"] = "mean",
    paired: bool = False,
    n: int = 10000,
    seed: int = 0,
) -> Comparison:
    """Test two-sidedly whether a and b differ in mean or median, by permutation.

    When all distinct permutations number at most `n` they are enumerated and the p-value is exact;
    otherwise it is `(hits + 1) / (n + 1)`, never 0 (Phipson & Smyth 2010). A hit is a permutation whose
    difference is at least as large in size as the observed one.

    Args:
        a, b: the samples; with `paired`, of equal length and in the same order.
        statistic: what is compared; the result's statistic is that of a minus that of b.
        paired: exchange a and b within pairs, not across them.
        n: random permutations, and the most that are enumerated.
        seed: of the random permutations.

    Raises:
        InputError: samples of fewer than two values, not finite, or (paired) of different lengths.
    """
    first, second = (_sample(x, f"permutation_test: {name}", at_least=2) for name, x in (("a", a), ("b", b)))
    if statistic not in ("mean", "median"):
        raise InputError(f"permutation_test: no statistic {statistic!r}; use 'mean' or 'median'")
    if paired and first.size != second.size:
        raise InputError(
            f"permutation_test: {first.size} and {second.size} values cannot be paired; "
            "give equal lengths or paired=False"
        )
    n = checking.whole(n, "permutation_test: n", 1)
    centre = np.mean if statistic == "mean" else np.median

    def size_of_difference(x: Floats, y: Floats, axis: int = -1) -> Floats:
        return np.abs(centre(x, axis=axis) - centre(y, axis=axis))

    distinct = 2**first.size if paired else comb(first.size + second.size, first.size)
    result = scipy.stats.permutation_test(
        (first, second),
        size_of_difference,
        permutation_type="samples" if paired else "independent",
        vectorized=True,
        n_resamples=n,
        batch=max(1, 2_000_000 // (first.size + second.size)),
        alternative="greater",
        rng=derive_generator(seed, "permutation_test"),
    )
    return Comparison(
        float(centre(first) - centre(second)),
        float(result.pvalue),
        first.size,
        second.size,
        f"{'paired ' if paired else ''}permutation of the {statistic}, "
        + (f"all {distinct}" if distinct <= n else f"{n} random"),
    )


def mcnemar(a: ArrayLike, b: ArrayLike) -> Comparison:
    """Test two-sidedly whether two yes-no outcomes of the same items differ in rate (McNemar 1947, exact).

    Only the items whose outcomes differ count: under no difference they go either way like a fair coin, so the
    p-value is binomial and holds for any n. The statistic is the rate of a minus that of b.

    Args:
        a, b: `[item]` of yes (True, 1) and no (False, 0), in the same order.

    Raises:
        InputError: samples that are empty, of different lengths, or hold anything else.
    """
    first, second = _paired_outcomes(a, b, "mcnemar")
    only_a, only_b = int((first > second).sum()), int((second > first).sum())
    differing = only_a + only_b
    p_value = float(scipy.stats.binomtest(only_a, differing).pvalue) if differing else 1.0
    method = f"McNemar, exact, {differing} of {first.size} pairs differ"
    return Comparison((only_a - only_b) / first.size, p_value, first.size, second.size, method)


def paired_difference(a: ArrayLike, b: ArrayLike, level: float = 0.95) -> Interval:
    """Give the rate of a minus that of b, two yes-no outcomes of the same items, with Newcombe's interval.

    The two Wilson intervals are combined with the correlation between the outcomes (Newcombe 1998, Statistics in
    Medicine 17, 2635-2650, method 10); it never leaves -1 to 1 and has a width where all pairs agree.

    Args:
        a, b: `[item]` of yes (True, 1) and no (False, 0), in the same order.
        level: nominal coverage.

    Raises:
        InputError: as `mcnemar`.
    """
    first, second = _paired_outcomes(a, b, "paired_difference")
    level = _level(level)
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


def fisher(successes_a: int, n_a: int, successes_b: int, n_b: int) -> Comparison:
    """Test two-sidedly whether two independent shares differ (Fisher's exact test); for paired items use `mcnemar`.

    The statistic is the share of a minus that of b.

    Raises:
        InputError: counts that are no proportion.
    """
    hits_a, of_a = _share(successes_a, n_a, "fisher: a")
    hits_b, of_b = _share(successes_b, n_b, "fisher: b")
    table = [[hits_a, of_a - hits_a], [hits_b, of_b - hits_b]]
    p_value = float(scipy.stats.fisher_exact(table).pvalue)
    return Comparison(hits_a / of_a - hits_b / of_b, p_value, of_a, of_b, "Fisher, exact")


def benjamini_hochberg(p: ArrayLike) -> Floats:
    """Adjust p-values so that calling those below q significant keeps the false discovery rate at q.

    Source: Benjamini & Hochberg (1995).

    Args:
        p: `[test]`, each 0 to 1.

    Returns:
        Adjusted p-values `[test]`, in the order given.

    Raises:
        InputError: none given, or one outside 0 to 1.
    """
    values = _sample(p, "benjamini_hochberg: p")
    if values.min() < 0 or values.max() > 1:
        raise InputError("benjamini_hochberg: a p-value lies outside 0 to 1; pass p-values, not statistics")
    return np.asarray(scipy.stats.false_discovery_control(values, method="bh"), dtype=np.float64)


def derive_generator(seed: int, *labels: str | int) -> np.random.Generator:
    """Give a generator that depends on the seed and on what it is for, and on nothing else.

    Draws for one purpose thus never shift when another purpose draws more; the state comes from SHA-256,
    so it is the same on every machine and Python.

    Raises:
        InputError: a seed that is no whole number of at least 0: 1 and 1.5 must not draw the same.
    """
    digest = hashlib.sha256(json.dumps([checking.whole(seed, "seed", 0), *labels]).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest, "big"))


def group_codes(groups: Groups, n: int) -> Ints:
    """Number the groups 0, 1, ... in order of appearance, `[n]`; without groups each value is its own.

    Raises:
        InputError: not one group a value, a missing group, or a single group.
    """
    if groups is None:
        return np.arange(n)
    # A tensor iterates as objects that hash by identity, which would make each value a group of its own.
    labels = checking.listed(groups.tolist() if hasattr(groups, "tolist") else groups, "groups")
    try:
        codes, distinct = pd.factorize(pd.Series(labels, dtype=object))
    except TypeError:
        raise InputError(
            f"groups: one is no name or number, such as {checking.shown(labels[0])}; give a flat list of labels"
        ) from None
    if len(codes) != n:
        raise InputError(f"groups: {len(codes)} groups for {n} values; give one group a value")
    if (codes < 0).any():
        raise InputError(f"groups: {int((codes < 0).sum())} values have no group; name a group for each")
    if len(distinct) < 2:
        raise InputError("groups: all values are in one group; give at least two groups")
    return codes.astype(np.int64)


def split(n: int, holdout: float, groups: Groups = None, seed: int = 0, *, salt: str = "halves") -> tuple[Ints, Ints]:
    """Give the indices to fit on and to hold out, whole groups on a side, drawn by `seed`.

    Args:
        n: values to divide.
        holdout: share of the values (with groups: of the groups) held out, between 0 and 1.
        groups: `[n]` labels of what must not be divided, or None.
        seed: of the draw.
        salt: part of the draw too: two salts give two independent divisions at one seed. A tool has its own, which
            never changes, so that its divisions stay what they were.

    Raises:
        InputError: fewer than two values or groups on a side, or groups that are not one a value.
    """
    n = checking.whole(n, "split: n", 1)
    holdout = checking.number(holdout, "split: holdout", above=0, below=1)
    codes = group_codes(groups, n)
    units = int(codes.max()) + 1
    held = round(units * holdout)
    if not 2 <= held <= units - 2:
        raise InputError(
            f"split: {units} prompts or groups leave {held} to hold out and {units - held} to fit on at "
            f"holdout={holdout:g}; at least 2 are needed on each side"
        )
    order = derive_generator(seed, salt, "split").permutation(units)
    out = np.isin(codes, order[:held])
    return np.flatnonzero(~out), np.flatnonzero(out)


def _sample(values: ArrayLike, name: str, at_least: int = 1) -> Floats:
    data = _numbers(values, name, "a flat list of numbers")
    if data.ndim != 1:
        raise InputError(f"{name} have shape {data.shape}; give a flat list of numbers")
    if data.size < at_least:
        raise InputError(f"{name} hold {data.size} of the {at_least} needed; measure more")
    broken = int((~np.isfinite(data)).sum())
    if broken:
        raise InputError(f"{name} hold {broken} that are NaN or infinite; find out why before going on")
    _refuse_overflow(data, name)
    return data


def _numbers(values: Any, name: str, wanted: str) -> Floats:
    """Real numbers as float64; of complex ones and of numbers in quotes NumPy would make others without a word."""
    wrong = InputError(f"{name} are not numbers; give {wanted}")
    try:
        if isinstance(values, (list, tuple)):
            values = [item.tolist() if hasattr(item, "tolist") else item for item in values]
        if str(getattr(values, "dtype", "")) == "torch.bfloat16":
            values = values.double()
        raw = np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)
        texts = raw.dtype.kind == "O" and any(isinstance(x, (str, bytes, complex)) for x in raw.flat)
        if raw.dtype.kind not in "biufO" or texts:
            raise wrong
        return raw.astype(np.float64)
    except OverflowError:
        raise InputError(f"{name} hold a number too large for a float; give them in a larger unit") from None
    except (TypeError, ValueError, RuntimeError):
        raise wrong from None


def _refuse_overflow(data: Floats, name: str) -> None:
    """Refuse numbers whose squares, summed up, would be infinite: a p-value or an interval of those means nothing."""
    if data.size and np.abs(data).max() > _LARGEST:
        raise InputError(f"{name} hold numbers beyond {_LARGEST:g}, whose squares overflow; give them in a larger unit")


def _paired_outcomes(a: ArrayLike, b: ArrayLike, caller: str) -> tuple[Floats, Floats]:
    first, second = _sample(a, f"{caller}: a"), _sample(b, f"{caller}: b")
    if first.size != second.size:
        raise InputError(
            f"{caller}: {first.size} and {second.size} outcomes cannot be paired; give the same items in one order"
        )
    if not np.isin([*first, *second], (0.0, 1.0)).all():
        raise InputError(f"{caller}: an outcome is neither yes nor no; give True and False")
    return first, second


def _level(level: Any) -> float:
    try:
        return checking.number(level, "level", above=0, below=1)
    except InputError:
        raise InputError(
            f"level {checking.shown(level)} is no coverage; give a number between 0 and 1, such as 0.95"
        ) from None
