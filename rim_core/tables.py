"""Tidy tables of what results hold: means over texts, and estimates with their intervals."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import scipy.stats
from numpy.typing import ArrayLike

from rim_core.stats import Interval


def mean_frame(values: ArrayLike, **axes: Sequence[object]) -> pd.DataFrame:
    """Give a row for each combination of the axes after the first: the mean over the first, its interval, n.

    Args:
        values: `[n, ...]`; NaNs do not count.
        axes: the labels of each axis after the first, by name; where there is one label the axis may be absent.

    Returns:
        A column for each axis, then mean, low and high (Student's 95 % interval, NaN for a single value), n.
    """
    data = np.asarray(values, dtype=np.float64)
    flat = pd.DataFrame(data.reshape(len(data), -1))
    mean, n = flat.mean(), flat.count()
    half = scipy.stats.t.ppf(0.975, n - 1) * flat.sem()
    index = pd.MultiIndex.from_product(list(axes.values()), names=list(axes))
    summary = pd.DataFrame({"mean": mean, "low": mean - half, "high": mean + half, "n": n})
    return summary.set_index(index).reset_index()


def interval_frame(found: Mapping[Any, Interval], keys: Sequence[str], value: str) -> pd.DataFrame:
    """Give a row an interval: a column for each part of its key, the estimate as `value`, low, high, n."""
    rows = [(*key, each.estimate, each.low, each.high, each.n) for key, each in found.items()]
    return pd.DataFrame(rows, columns=[*keys, value, "low", "high", "n"])
