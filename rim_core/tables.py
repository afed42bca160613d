"""Tidy tables: a row a measurement, its axes first, then estimate, low, high and n.

`means` and `tidy` are for readers; `by_axes`, `by_layer` and `interval_frame` are what results' `to_frame` is made of.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pandas as pd
import scipy.stats
from numpy.typing import ArrayLike

from rim_core import checking
from rim_core.errors import InputError
from rim_core.stats import Comparison, Interval, t_interval


def means(frame: pd.DataFrame, value: str, by: str | Sequence[str] = ()) -> pd.DataFrame:
    """Give the mean of a column in each group of rows, with Student's 95 % interval over the group's rows.

    Args:
        frame: a row an observation, such as a prompt or a seed.
        value: the column to average; rows without a value (NaN) do not count.
        by: the column or columns that make the groups, which come in the order of their first rows; none for one
            group of all rows.

    Returns:
        The columns `by`, then estimate, low, high (NaN for a single row) and n.

    Raises:
        InputError: no such column, or a value that is infinite.

    Example:
        >>> frame = pd.DataFrame({"layer": [0, 0, 1, 1], "accuracy": [0.5, 0.7, 0.9, 0.9]})
        >>> rim.tables.means(frame, "accuracy", "layer")["estimate"].tolist()
        [0.6, 0.9]
    """
    keys = [by] if isinstance(by, str) else list(by)
    if missing := [name for name in (*keys, value) if name not in frame]:
        raise InputError(f"tables.means: no column {missing[0]}; the frame has {', '.join(map(str, frame))}")
    groups = frame.groupby(keys, sort=False, dropna=False)[value] if keys else [((), frame[value])]
    rows = [(*key, *_mean(part.dropna().to_numpy())) for key, part in groups]
    return pd.DataFrame(rows, columns=[*keys, "estimate", "low", "high", "n"])


def _mean(values: np.ndarray) -> tuple[float, float, float, int]:
    if len(values) < 2:
        return (float(values[0]) if len(values) else np.nan), np.nan, np.nan, len(values)
    found = t_interval(values)
    return found.estimate, found.low, found.high, found.n


def tidy(results: Mapping[str, Any]) -> pd.DataFrame:
    """Give several results as one long table, ready for `to_csv`: each result's rows below those before, named.

    Args:
        results: by name, each a result of this package (anything with `to_frame()`), a table, an `Interval`, a
            `Comparison`, or a number. Their columns need not be the same.

    Returns:
        A column `name`, then all columns of the results; where a result has no such column its rows are empty.

    Raises:
        InputError: nothing given, a value that is none of these, or a table that has a column `name`.

    Example:
        >>> table = rim.tidy({"refusals": rim.stats.proportion(9, 10), "chance": 0.5})
        >>> table[["name", "estimate", "n"]].to_dict("list")
        {'name': ['refusals', 'chance'], 'estimate': [0.9, 0.5], 'n': [10.0, nan]}
    """
    if not isinstance(results, Mapping):
        raise InputError(f"tidy: give results by name, as {{'name': result}}, not a {type(results).__name__}")
    if not results:
        raise InputError("tidy: no results given; pass at least one, as {'name': result}")
    frames = []
    for name, result in results.items():
        frame = _frame(result, f"tidy: {name}")
        if "name" in frame:
            raise InputError(f"tidy: {name} has a column 'name' of its own; rename that")
        frames.append(frame.assign(name=name)[["name", *frame]])
    return pd.concat(frames, ignore_index=True)


def _frame(result: Any, what: str) -> pd.DataFrame:
    if isinstance(result, pd.DataFrame):
        return result
    if hasattr(result, "to_frame"):
        return result.to_frame()
    if isinstance(result, Comparison):
        return pd.DataFrame([asdict(result)]).rename(columns={"statistic": "estimate"})
    return pd.DataFrame([{"estimate": checking.number(result, what)}])


def by_axes(values: ArrayLike, **axes: Sequence[object]) -> pd.DataFrame:
    """Give a row for each combination of the axes after the first: the mean over the first, its interval, n.

    Args:
        values: `[n, ...]`; NaNs do not count.
        axes: the labels of each axis after the first, by name; where there is one label the axis may be absent.

    Returns:
        A column for each axis, then estimate, low and high (Student's 95 % interval, NaN for a single value), n.

    Example:
        >>> by_axes([[1.0, 2.0], [3.0, 4.0]], layer=[10, 11])["estimate"].tolist()
        [2.0, 3.0]
    """
    data = np.asarray(values, dtype=np.float64)
    flat = pd.DataFrame(data.reshape(len(data), -1))
    mean, n = flat.mean(), flat.count()
    half = scipy.stats.t.ppf(0.975, n - 1) * flat.sem()
    index = pd.MultiIndex.from_product(list(axes.values()), names=list(axes))
    summary = pd.DataFrame({"estimate": mean, "low": mean - half, "high": mean + half, "n": n})
    return summary.set_index(index).reset_index()


def interval_frame(found: Mapping[Any, Interval], keys: Sequence[str]) -> pd.DataFrame:
    """Give a row an interval: a column for each part of its key, then estimate, low, high and n."""
    rows = [(*key, each.estimate, each.low, each.high, each.n) for key, each in found.items()]
    return pd.DataFrame(rows, columns=[*keys, "estimate", "low", "high", "n"])


def by_layer(series: Mapping[str, Interval]) -> pd.DataFrame:
    """Give a row a layer and series, of intervals that hold a number for each layer: layer, series, estimate, ...

    Example:
        >>> found = rim.stats.t_interval([[0.4, 0.8], [0.6, 1.0]])  # [seed, layer]
        >>> rim.tables.by_layer({"probe": found})[["layer", "series", "estimate", "n"]]
           layer series  estimate  n
        0      0  probe       0.5  2
        1      1  probe       0.9  2
    """
    frames = [found.to_frame(layer=range(len(found.estimate))) for found in series.values()]
    for frame, name in zip(frames, series, strict=True):
        frame.insert(1, "series", name)
    return pd.concat(frames, ignore_index=True)
