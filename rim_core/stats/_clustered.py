"""Means, shares and rankings of what comes in clusters: prompts in topics, and these in trainings."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import scipy.stats
from numpy.typing import ArrayLike

from rim_core import checking
from rim_core.errors import InputError
from rim_core.stats._formulas import Interval
from rim_core.stats._resampling import Groups, group_codes
from rim_core.stats._samples import Floats, Ints, coverage, sample, yes_or_no


def clustered_proportion(outcomes: ArrayLike, groups: Groups, *, level: float = 0.95) -> Interval:
    """Give a share of successes with an interval for outcomes that come in clusters (Korn & Graubard 1998).

    Clopper-Pearson's interval for as many outcomes as the clustered ones are worth: `n / deff`, where `deff` is the
    variance of the share between clusters over that of independent outcomes, taken as at least 1, and corrected for
    the number of clusters by Student's t. It never has zero width.

    Args:
        outcomes: yes or no, `[n]`.
        groups: which cluster each is of (category, topic), `[n]`; at least two clusters; None: each of its own.
        level: nominal coverage.

    Raises:
        InputError: no outcomes, values that are neither yes nor no, or fewer than two clusters.

    Example:
        >>> topics = ["tax", "loans", "pensions", "trading"] * 5
        >>> print(rim.stats.clustered_proportion([1] * 20, topics))
        1 (95% 0.653 to 1, n=20)
    """
    values = yes_or_no(outcomes, "clustered_proportion: outcomes")
    codes, level, n = group_codes(groups, len(values)), coverage(level), len(values)
    clusters = int(codes.max()) + 1
    p = float(values.mean())
    between = clusters / (clusters - 1) * float((np.bincount(codes, values - p) ** 2).sum()) / n**2
    alone = p * (1 - p) / n
    deff = max(1.0, between / alone) if alone else 1.0
    half = (1 + level) / 2
    worth = n / deff * (scipy.stats.t.ppf(half, n - 1) / scipy.stats.t.ppf(half, clusters - 1)) ** 2
    hits = p * worth
    low = float(scipy.stats.beta.ppf(1 - half, hits, worth - hits + 1)) if p > 0 else 0.0
    high = float(scipy.stats.beta.ppf(half, hits + 1, worth - hits)) if p < 1 else 1.0
    return Interval(p, low, high, n, level, f"Korn-Graubard, {clusters} clusters")


def clustered_mean(
    values: ArrayLike, groups: Groups, *, bounds: tuple[float, float] | None = None, level: float = 0.95
) -> Interval:
    """Give a mean with Student's t interval for values that come in clusters (Liang & Zeger 1986, with `g - 1` degrees
    of freedom for `g` clusters); a paired difference is the mean of differences.

    The variance is that of the clusters' sums about the mean, and at least that of as many independent values, so that
    few clusters which happen to agree do not make it small. Where all values are equal, at most a share
    `1 - ((1 - level) / 2) ** (1 / n)` of others would be missed in `n`: the interval is as wide as if these lay at the
    bounds.

    Args:
        values: `[n]`, or `[n, column]` for an interval a column, such as a layer.
        groups: which cluster each is of (category, topic), `[n]`; at least two clusters; None: each of its own.
        bounds: what a value can be at all; ends of the interval stay within.
        level: nominal coverage.

    Raises:
        InputError: fewer than two values or clusters, values that are not finite or outside the bounds, or all equal
            and no bounds given.

    Example:
        >>> topics = ["tax", "loans", "pensions", "trading"] * 5
        >>> print(rim.stats.clustered_mean([0.5, 0.75, 1, 1] * 5, topics, bounds=(0, 1)))
        0.812 (95% 0.432 to 1, n=20)
    """
    data = sample(values, "clustered_mean: values", 2, ("[n]", "[n, column]"))
    level, n = coverage(level), len(data)
    codes = group_codes(groups, n)
    clusters = int(codes.max()) + 1
    least, most = bounds or (-math.inf, math.inf)
    if data.min() < least or data.max() > most:
        raise InputError(f"clustered_mean: a value is outside the bounds {checking.shown(bounds)}")
    mean = data.mean(axis=0)
    half = scipy.stats.t.ppf((1 + level) / 2, clusters - 1) * np.sqrt(_variance_of_mean(data, codes))
    low, high = mean - half, mean + half
    flat = data.max(axis=0) == data.min(axis=0)
    if flat.any():
        if bounds is None:
            raise InputError("clustered_mean: all values are equal, which leaves their spread unknown; give bounds")
        missed = 1 - ((1 - level) / 2) ** (1 / n)
        low = np.where(flat, mean - missed * (mean - least), low)
        high = np.where(flat, mean + missed * (most - mean), high)
    low, high = np.maximum(low, least), np.minimum(high, most)
    estimate, low, high = (end if np.ndim(end) else float(end) for end in (mean, low, high))
    return Interval(estimate, low, high, n, level, f"cluster-robust t, {clusters} clusters")


def _variance_of_mean(data: Floats, codes: Ints) -> Floats:
    """Of values `[n]` or `[n, column]` in clusters `[n]`: that of the clusters' sums about the mean, and at least that
    of as many independent values.
    """
    n, clusters = len(data), int(codes.max()) + 1
    about = data - data.mean(axis=0)
    sums = np.zeros((clusters, *data.shape[1:]))
    np.add.at(sums, codes, about)
    between = clusters / (clusters - 1) * (sums**2).sum(axis=0) / n**2
    alone = (about**2).sum(axis=0) / (n - 1) / n
    return np.asarray(np.maximum(between, alone))


def crossed_mean(values: ArrayLike, groups: Groups = None, *, level: float = 0.95) -> Interval:
    """Give the mean of what was measured on the same prompts in each of several trainings, as a statement on trainings
    and prompts that were not drawn: with the variance between the trainings' means and that between the clusters of
    prompts, added, and Satterthwaite's (1946) degrees of freedom. Of a single training it is `clustered_mean`, a
    statement on prompts alone.

    The part of the variance that belongs to a training and a prompt together is in both and so is counted twice: the
    interval is a little too wide rather than too narrow.

    Args:
        values: `[training, prompt]`, or `[training, prompt, column]` for an interval a column, such as a layer.
        groups: which cluster each prompt is of (category, topic), `[prompt]`; None: each of its own.
        level: nominal coverage.

    Raises:
        InputError: no training, fewer than two prompts or clusters, values that are not finite, or all equal.

    Example:
        >>> print(rim.stats.crossed_mean([[0.5, 0.75, 1, 1], [0.25, 0.75, 0.75, 1]]))
        0.75 (95% 0.332 to 1.17, n=8)
    """
    data = sample(values, "crossed_mean: values", 1, ("[training, prompt]", "[training, prompt, column]"))
    if len(data) == 1:
        return clustered_mean(data[0], groups, level=level)
    level, (trainings, prompts) = coverage(level), data.shape[:2]
    if prompts < 2:
        raise InputError("crossed_mean: values need at least two prompts")
    codes = group_codes(groups, prompts)
    clusters = int(codes.max()) + 1
    means, of_prompts = data.mean(axis=1), data.mean(axis=0)
    parts = (means.var(axis=0, ddof=1) / trainings, _variance_of_mean(of_prompts, codes))
    total = parts[0] + parts[1]
    if (total <= 0).any():
        raise InputError("crossed_mean: all values are equal, which leaves their spread unknown")
    freedom = total**2 / (parts[0] ** 2 / (trainings - 1) + parts[1] ** 2 / (clusters - 1))
    half = scipy.stats.t.ppf((1 + level) / 2, freedom) * np.sqrt(total)
    mean = means.mean(axis=0)
    estimate, low, high = (end if np.ndim(end) else float(end) for end in (mean, mean - half, mean + half))
    method = f"crossed t, {trainings} trainings and {clusters} clusters"
    return Interval(estimate, low, high, trainings * prompts, level, method)


def jackknife(
    statistic: Callable[[Ints], float],
    groups: Sequence[object],
    *,
    bounds: tuple[float, float] | None = None,
    level: float = 0.95,
) -> Interval:
    """Give a statistic of prompts with Student's t interval from leaving out one cluster at a time (Tukey 1958).

    For what resampling would distort, such as the likeness of two rankings or of two subspaces: prompts drawn twice
    make both less alike than they are.

    Args:
        statistic: of the rows that it is given, numbers `[n]` from 0, one number.
        groups: which cluster each row is of (category, topic), `[row]`; at least two clusters.
        bounds: what the statistic can be at all; ends of the interval stay within.
        level: nominal coverage.

    Raises:
        InputError: fewer than two clusters, or a statistic that is not finite.

    Example:
        Of a mean it is the interval over clusters' means:

        >>> import numpy as np
        >>> values = np.array([1.0, 2.0, 3.0, 6.0])
        >>> print(rim.stats.jackknife(lambda rows: values[rows].mean(), ["a", "b", "c", "d"]))
        3 (95% -0.437 to 6.44, n=4)
    """
    codes, level = group_codes(groups, len(groups)), coverage(level)
    rows, clusters = np.arange(len(codes)), int(codes.max()) + 1
    found = checking.number(statistic(rows), "jackknife: the statistic")
    without = [statistic(rows[codes != code]) for code in range(clusters)]
    about = np.array([checking.number(each, "jackknife: the statistic") for each in without])
    error = math.sqrt((clusters - 1) / clusters * float(((about - about.mean()) ** 2).sum()))
    half = float(scipy.stats.t.ppf((1 + level) / 2, clusters - 1)) * error
    least, most = bounds or (-math.inf, math.inf)
    low, high = max(found - half, least), min(found + half, most)
    return Interval(found, low, high, len(codes), level, f"jackknife, {clusters} clusters")


def auc_parts(positive: ArrayLike, negative: ArrayLike) -> Floats:
    """Give what each pair adds to the area under the ROC curve: numbers whose mean is the area, and whose spread, over
    clusters of pairs, gives its interval by `clustered_mean` or `crossed_mean` (DeLong et al. 1988; Obuchowski 1997).

    Of pair `i` it is `a_i + b_i - AUC`, where `a_i` is the share of negatives below its positive, `b_i` the share of
    positives above its negative, and ties count half. So a part can lie outside 0 to 1.

    Args:
        positive: scores `[pair]`, or `[pair, column]` for an area a column, such as a layer.
        negative: likewise, in the same order.

    Returns:
        Of the shape of `positive`.

    Raises:
        InputError: fewer than two pairs, shapes that differ, or scores that are not finite.

    Example:
        >>> rim.stats.auc_parts([3, 2, 4], [1, 2, 0])
        array([1.05555556, 0.72222222, 1.05555556])
    """
    columns = ("[pair]", "[pair, column]")
    first, second = (
        sample(positive, "auc_parts: positive", 2, columns),
        sample(negative, "auc_parts: negative", 2, columns),
    )
    if first.shape != second.shape:
        raise InputError(f"auc_parts: positive {first.shape} and negative {second.shape} differ; give pairs")
    beats = (first[:, None] > second[None]) + 0.5 * (first[:, None] == second[None])
    return np.asarray(beats.mean(axis=1) + beats.mean(axis=0) - beats.mean(axis=(0, 1)))


def ratio_parts(numerator: ArrayLike, denominator: ArrayLike) -> Floats:
    """Give what each prompt adds to a share of means: numbers whose mean is `mean(numerator) / mean(denominator)`, and
    whose spread, over clusters, gives its interval by `clustered_mean` or `crossed_mean` (the delta method; Cochran
    1977, section 6). Trust it only where the denominator's mean is well away from 0.

    Args:
        numerator: `[n]`, or `[n, column]` for a share a column, such as a layer.
        denominator: likewise, in the same order.

    Raises:
        InputError: shapes that differ, values that are not finite, or a denominator whose mean is 0.

    Example:
        >>> rim.stats.ratio_parts([1.0, 3.0], [4.0, 4.0])
        array([0.25, 0.75])
    """
    columns = ("[n]", "[n, column]")
    first = sample(numerator, "ratio_parts: numerator", 1, columns)
    second = sample(denominator, "ratio_parts: denominator", 1, columns)
    if first.shape != second.shape:
        raise InputError(f"ratio_parts: numerator {first.shape} and denominator {second.shape} differ; give pairs")
    below = second.mean(axis=0)
    if not np.all(below):
        raise InputError("ratio_parts: the denominator's mean is 0, of which nothing is a share")
    share = first.mean(axis=0) / below
    return np.asarray(share + (first - share * second) / below)
