"""What is taken for a sample, a count and a level."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rim_core import checking
from rim_core.errors import InputError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
# Counts beyond this, and numbers beyond that, are refused: exact intervals, and sums of squares, go wrong there.
_MOST = 10**9
_LARGEST = 1e150


def sample(values: ArrayLike, what: str, at_least: int = 1, axes: tuple[str, ...] = ("[n]",)) -> Floats:
    """Finite numbers as float64, with as many axes as one of `axes` names, `at_least` along the first."""
    data = checking.numbers(values, what)
    if data.ndim not in [names.count(",") + 1 for names in axes]:
        raise InputError(f"{what} have shape {data.shape}; give numbers {' or '.join(axes)}")
    if len(data) < at_least or 0 in data.shape:
        raise InputError(f"{what} hold {min(data.shape)} of the {at_least} needed; measure more")
    if broken := int((~np.isfinite(data)).sum()):
        raise InputError(f"{what} hold {broken} that are NaN or infinite; find out why before going on")
    # A p-value or an interval of numbers whose squares, summed up, are infinite means nothing.
    if np.abs(data).max() > _LARGEST:
        raise InputError(f"{what} hold numbers beyond {_LARGEST:g}, whose squares overflow; give them in a larger unit")
    return data


def yes_or_no(values: ArrayLike, what: str) -> Floats:
    """Outcomes `[item]` as 1.0 (yes, True) and 0.0; raises InputError, in the name `what`, for anything else.

    Example:
        >>> rim.stats.yes_or_no([True, False], "compare_rates: before")
        array([1., 0.])
    """
    outcomes = sample(values, what)
    if not np.isin(outcomes, (0.0, 1.0)).all():
        raise InputError(f"{what}: an outcome is neither yes nor no; give True and False")
    return outcomes


def paired_outcomes(a: ArrayLike, b: ArrayLike, caller: str) -> tuple[Floats, Floats]:
    """Two samples of yes-no outcomes of the same items."""
    first, second = yes_or_no(a, f"{caller}: a"), yes_or_no(b, f"{caller}: b")
    require_pairs(first, second, caller)
    return first, second


def require_pairs(first: Floats, second: Floats, caller: str) -> None:
    """Refuse samples of two sizes."""
    if len(first) != len(second):
        raise InputError(
            f"{caller}: {len(first)} and {len(second)} values cannot be paired; give the same items in one order"
        )


def share(successes: Any, n: Any, caller: str) -> tuple[int, int]:
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


def coverage(level: Any) -> float:
    """An interval's nominal coverage."""
    return checking.number(level, "level (such as 0.95)", above=0, below=1)
