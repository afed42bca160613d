"""Resampling, and the seeded draws and divisions that it and other tools rest on."""

import hashlib
import json
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import scipy.stats
from numpy.typing import ArrayLike, NDArray

from rim_core import checking
from rim_core.errors import InputError
from rim_core.stats._formulas import Interval
from rim_core.stats._samples import Floats, Ints, coverage, sample

# What must not be split or is resampled whole: a label a value, or None.
Groups = Sequence[object] | NDArray | None


def bootstrap(
    values: ArrayLike,
    statistic: Callable[[Floats], float] = np.mean,
    groups: Groups = None,
    *,
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

    Example:
        >>> topics = ["tax", "tax", "loans", "loans", "pensions", "pensions"]
        >>> rim.stats.bootstrap([0.9, 0.8, 0.4, 0.5, 0.7, 0.6], groups=topics).method
        'cluster bootstrap over 3 groups'
    """
    data = sample(values, "bootstrap: values", 2)
    level = coverage(level)
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


def resampled_means(values: ArrayLike, groups: Groups = None, *, n_resamples: int = 2000, seed: int = 0) -> Floats:
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

    Example:
        >>> rim.stats.resampled_means([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0]], n_resamples=500).shape
        (500, 2)
    """
    data = sample(values, "resampled_means: values", 2, ("[n, column]",))
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
        >>> missed_and_total = [[1.0, 4.0], [2.0, 5.0], [1.5, 4.0], [0.5, 3.0]]
        >>> rim.stats.of_means(missed_and_total, lambda mean: 1 - mean[:, 0] / mean[:, 1]).estimate
        0.6875
    """
    data = sample(columns, "of_means: columns", 2, ("[n, column]",))
    drawn = resampled_means(data, groups, n_resamples=n_resamples, seed=seed)
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
        >>> print(rim.stats.percentiles([0.5, 0.4, 0.5, 0.6], n=20))
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


def derive_generator(seed: int, *labels: str | int) -> np.random.Generator:
    """Give a generator that depends on the seed and on what it is for, and on nothing else.

    Draws for one purpose thus never shift when another purpose draws more; the state comes from SHA-256,
    so it is the same on every machine and Python.

    Args:
        seed: of the notebook, say.
        labels: what the draws are for.

    Raises:
        InputError: a seed that is no whole number of at least 0: 1 and 1.5 must not draw the same.

    Example:
        >>> int(rim.stats.derive_generator(0, "pinned").integers(10**6))
        788605
    """
    digest = hashlib.sha256(json.dumps([checking.whole(seed, "seed", 0), *labels]).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest, "big"))


def group_codes(groups: Groups, n: int) -> Ints:
    """Number the groups 0, 1, ... in order of appearance, `[n]`; without groups each value is its own.

    Args:
        groups: a name a value, or None.
        n: how many values there are.

    Raises:
        InputError: not one group a value, a missing group, or a single group.

    Example:
        >>> rim.stats.group_codes(["tax", "loans", "tax"], 3)
        array([0, 1, 0])
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


def split(n: int, holdout: float, groups: Groups = None, *, seed: int = 0, salt: str = "halves") -> tuple[Ints, Ints]:
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

    Example:
        >>> fit, held_out = rim.stats.split(8, 0.5, [1, 1, 2, 2, 3, 3, 4, 4])
        >>> len(fit), len(held_out)
        (4, 4)
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
