"""Checks of arguments that several tools share: each gives the value as the tool goes on with it, or one line.

`what` names the argument as its caller knows it (`"capture: positions"`), and begins the line. NumPy's and torch's
whole numbers are whole numbers here; truth values, fractions and numbers in quotes are not.
"""

import math
import operator
from collections.abc import Collection, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from rim_core.errors import InputError

T = TypeVar("T")


def shown(value: Any, width: int = 60) -> str:
    """Give a value as a message shows it: on one line, and cut where it is long."""
    text = " ".join(repr(value).split())
    return text if len(text) <= width else f"{text[: width - 3]}..."


def is_whole(value: Any) -> bool:
    """Whether a value is a whole number: an int, or a scalar of NumPy or torch of such a type."""
    kind = str(getattr(value, "dtype", type(value).__name__))
    if "bool" in kind or getattr(value, "ndim", None):
        return False
    try:
        operator.index(value)
    except (TypeError, ValueError):
        return False
    return True


def whole(value: Any, what: str, low: int | None = None, high: int | None = None) -> int:
    """Give a whole number from `low` to `high` as an int.

    Raises:
        InputError: it is none, or lies outside.
    """
    number = operator.index(value) if is_whole(value) else None
    if number is None or (low is not None and number < low) or (high is not None and number > high):
        raise InputError(f"{what} must be a whole number{_range(low, high)}, not {shown(value)}")
    return number


def whole_numbers(
    values: Any, what: str, low: int | None = None, high: int | None = None, *, distinct: bool = False
) -> list[int]:
    """Give one or several whole numbers from `low` to `high` as a list of ints; never an empty one.

    Args:
        values: a list, range, array or tensor; a single number is a list of one.
        distinct: refuse a number that stands twice.

    Raises:
        InputError: none given, one that is no whole number or lies outside, or one that stands twice.
    """
    given = [values] if is_whole(values) else listed(values, what)
    if not given:
        raise InputError(f"{what}: none given; give at least one whole number{_range(low, high)}")
    found = [whole(value, f"{what}: each", low, high) for value in given]
    if distinct and (twice := [number for i, number in enumerate(found) if number in found[:i]]):
        raise InputError(f"{what}: {twice[0]} stands twice; name each once")
    return found


def seeds(values: Any, what: str = "seeds") -> list[int]:
    """Give seeds as distinct ints: one seed named twice would count as two draws that are one.

    Raises:
        InputError: none given, one that is no whole number of at least 0, or one that stands twice.
    """
    return whole_numbers(values, what, low=0, distinct=True)


def listed(values: Any, what: str) -> list[Any]:
    """Give what can be gone through as a list; raises InputError for a text, a mapping or a single thing."""
    single = getattr(values, "ndim", None) == 0
    if not single and not isinstance(values, (str, bytes, dict)):
        try:
            return list(values)
        except TypeError:
            pass
    raise InputError(f"{what} must be a list, not {shown(values)}")


def one_of(value: T, options: Collection[T], what: str) -> T:
    """Give the value if it is among the options; raises InputError naming them where it is not."""
    try:
        found = value in options
    except TypeError:
        found = False
    if not found:
        raise InputError(f"unknown {what} {shown(value)}: choose from {', '.join(map(str, options))}")
    return value


def number(
    value: Any,
    what: str,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    above: float = -math.inf,
    below: float = math.inf,
) -> float:
    """Give a finite number as a float: `low` and `high` are allowed themselves, `above` and `below` are not.

    Raises:
        InputError: it is no number, is not finite, or lies outside.
    """
    given = getattr(value, "dtype", None)
    kinds = ("bool", "complex", "str")
    scalar = not isinstance(value, (str, bytes, bool)) and not any(kind in str(given) for kind in kinds)
    try:
        found = float(value) if scalar and not getattr(value, "ndim", None) else math.nan
    except (TypeError, ValueError, OverflowError):
        found = math.nan
    if not (math.isfinite(found) and low <= found <= high and above < found < below):
        words = [f"of at least {low:g}"] if low > -math.inf else []
        words += [f"above {above:g}"] if above > -math.inf else []
        words += [f"of at most {high:g}"] if high < math.inf else []
        words += [f"below {below:g}"] if below < math.inf else []
        told = f" {' and '.join(words)}" if words else ""
        raise InputError(f"{what} must be a finite number{told}, not {shown(value)}")
    return found


class TwiceError(ValueError):
    """A key that stands twice in one JSON object; its message is the key as a message shows it."""


def distinct_keys(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object as a dict, for `json.loads(..., object_pairs_hook=distinct_keys)`.

    Raises:
        TwiceError: a key that stands twice, of whose values JSON's reader would keep the last alone.
    """
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise TwiceError(shown(key))
        found[key] = value
    return found


def array(
    values: Any,
    what: str,
    *,
    shape: Sequence[int | str] | None = None,
    ndim: int | Collection[int] | None = None,
    finite: bool = True,
) -> Any:
    """Give real numbers as an array: a tensor as it is but without gradient, anything else as NumPy's, none empty.

    Args:
        values: a tensor, an array, or lists of numbers or truth values (or of tensors).
        shape: a size or a name for each axis, such as `("prompt", 30, "d_model")`; what is named may have any size.
        ndim: how many axes, or which numbers of them there may be, where they need no names.
        finite: refuse NaN and infinity.

    Raises:
        InputError: what is no number (text and complex numbers among them), lists of unequal length, an axis too many
            or too few, one of another size, or one of size 0.

    Example:
        >>> from rim_core import checking
        >>> checking.array([[1, 2], [3, 4]], "steer: direction", shape=("layer", 2)).shape
        (2, 2)
        >>> checking.array([1.0, 2.0], "project: direction", shape=("layer", 2))
        Traceback (most recent call last):
        rim_core.errors.InputError: project: direction has shape [2]; give numbers [layer, 2]
    """
    given = values.detach() if hasattr(values, "detach") else _as_numpy(values)
    if given is None or "complex" in str(given.dtype):
        wanted = "" if shape is None else f" [{', '.join(map(str, shape))}]"
        raise InputError(f"{what} must be an array of real numbers{wanted}, not {shown(values)}")
    axes = (ndim,) if isinstance(ndim, int) else ndim
    fits = axes is None or given.ndim in axes
    if shape is not None:
        sizes = zip(shape, given.shape, strict=False)
        fits = fits and given.ndim == len(shape) and all(isinstance(want, str) or want == has for want, has in sizes)
    if not fits or 0 in given.shape:
        wanted = f"numbers [{', '.join(map(str, shape))}]" if shape is not None else "numbers"
        wanted += f" in {' or '.join(map(str, axes))} axes" if axes is not None else ""
        raise InputError(f"{what} has shape {list(given.shape)}; give {wanted}{', none empty' * (0 in given.shape)}")
    return _finite(given, what) if finite else given


def numbers(values: Any, what: str) -> NDArray[np.float64]:
    """Give real numbers of any shape as a float64 NumPy array; raises InputError for texts and complex numbers."""
    found = _as_numpy(values)
    if found is None:
        raise InputError(f"{what} must be real numbers, not {shown(values)}")
    return found.astype(np.float64)


def _as_numpy(values: Any) -> NDArray | None:
    """Real numbers as an array; None for what is none: of texts NumPy would make numbers without a word."""
    try:
        if isinstance(values, (list, tuple)):
            values = [item.tolist() if hasattr(item, "tolist") else item for item in values]
        elif hasattr(values, "detach"):
            values = values.detach().cpu()
            values = values.double() if values.is_floating_point() else values  # NumPy has no bfloat16
        raw = np.asarray(values)
        if raw.dtype.kind == "O":
            texts = any(item is None or isinstance(item, (str, bytes, complex)) for item in raw.flat)
            return None if texts else raw.astype(np.float64)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return None
    return raw if raw.dtype.kind in "biuf" else None


def same_length(what: str = "", /, **lists: Any) -> int:
    """Give the length that all the lists have; `what` is the tool that asks.

    Raises:
        InputError: two lengths differ, or one is no list.

    Example:
        >>> from rim_core import checking
        >>> checking.same_length("patch", source=[1, 2], destination=[3])
        Traceback (most recent call last):
        rim_core.errors.InputError: patch: source has 2 items and destination 1; give equally many
    """
    start = f"{what}: " if what else ""
    lengths = {
        name: len(given) if hasattr(given, "__len__") else len(listed(given, f"{start}{name}"))
        for name, given in lists.items()
    }
    first, *others = lengths
    for name in others:
        if lengths[name] != lengths[first]:
            raise InputError(f"{start}{first} has {lengths[first]} items and {name} {lengths[name]}; give equally many")
    return lengths[first]


def finite(
    values: Any, what: str, axis: int | None = None, along: str = "layer", names: Sequence[object] | None = None
) -> Any:
    """Give an array or tensor back if it holds no NaN and no infinity.

    Args:
        axis: the message says where along it the first such number stands.
        along: what the axis is.
        names: of the places along it; their numbers by default.

    Raises:
        InputError: it holds one.
    """
    # One pass without a copy; a sum of finite numbers that overflows is looked at again below.
    with np.errstate(over="ignore"):
        if math.isfinite(float(values.sum())):
            return values
    good = values.isfinite() if hasattr(values, "isfinite") else np.isfinite(values)
    if bool(good.all()):
        return values
    bad = ~np.asarray(good.cpu() if hasattr(good, "cpu") else good)
    where = ""
    if axis is not None:
        moved = np.moveaxis(bad, axis, 0).reshape(bad.shape[axis], -1).any(axis=1)
        place = int(np.flatnonzero(moved)[0])
        where = f", {along} {place if names is None else names[place]}"
    count = int(bad.sum())
    raise InputError(
        f"{what}{where}: {count} of {bad.size} numbers are NaN or infinite; nothing can be read off them (look for "
        "what made them: a function or an edit, or a model in 16 bits, which dtype='float32' mends)"
    )


def _range(low: int | None, high: int | None) -> str:
    if low is not None and high is not None:
        return f" from {low} to {high}"
    return f" of at least {low}" if low is not None else "" if high is None else f" of at most {high}"


# For `array`, of whose arguments one has this name.
_finite = finite
