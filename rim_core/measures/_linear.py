"""Linear algebra on captured activations: float64 inside, a piece of the data at a time."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rim_core import checking
from rim_core.errors import InputError
from rim_core.stats import Ints

# Numbers turned into float64 at a time: 64 MB.
_PIECE = 2**23


def dot(values: Tensor, vectors: Tensor) -> Tensor:
    """Products of `[..., d]` with `[d]`, or of `[..., layer, d]` with `[layer, d]`, float64."""
    if vectors.ndim == 1:
        return times(values, vectors[:, None])[..., 0]
    return torch.stack([dot(*pair) for pair in zip(values.unbind(-2), vectors, strict=True)], dim=-1)


def times(values: Tensor, matrix: Tensor) -> Tensor:
    """`values @ matrix` in float64, `[..., d] -> [..., k]`, without a float64 copy of all values."""
    flat = values.reshape(-1, values.shape[-1])
    product = torch.cat([flat[piece].double() @ matrix for piece in slices(*flat.shape)])
    return product.reshape(*values.shape[:-1], matrix.shape[1])


def slices(count: int, width: int) -> list[slice]:
    """Slices of `count` rows such that a piece holds at most `_PIECE` numbers."""
    step = max(1, _PIECE // width)
    return [slice(start, start + step) for start in range(0, count, step)]


def normalised(direction: Tensor, name: str) -> Tensor:
    """Directions `[..., d]` at length 1, float64."""
    vectors = direction.double()
    lengths = vectors.norm(dim=-1, keepdim=True)
    if zero := (lengths[..., 0] == 0).nonzero().tolist():
        where = f" at index {zero[0][0]}" if zero[0] else ""
        raise InputError(f"{name} has length 0{where} and points nowhere; leave it out, or check what it was made of")
    return vectors / lengths


def as_tensor(values: Any, name: str) -> Tensor:
    """A tensor as it is, or an array or lists of real numbers as one; raises `InputError` for anything else."""
    if isinstance(values, Tensor):
        return values
    try:
        array = np.asarray(values)
        if array.dtype.kind in "biuf":
            # Torch reads neither negative strides nor foreign byte orders nor long doubles.
            kind = "f8" if array.dtype.itemsize > 8 else array.dtype.newbyteorder("=")
            return torch.tensor(np.ascontiguousarray(array, dtype=kind).reshape(array.shape))
    except (TypeError, ValueError, RuntimeError, OverflowError):
        pass
    raise InputError(f"{name} must be a tensor or an array of real numbers, not {checking.shown(values)}")


def checked(values: Any, name: str, at_least: int = 1) -> Tensor:
    """The values on the CPU, if they are floating-point, finite, and have `at_least` axes; NumPy's as a tensor."""
    tensor = as_tensor(values, name).detach().cpu()
    if not tensor.is_floating_point() or tensor.ndim < at_least or 0 in tensor.shape:
        raise InputError(
            f"{name} is {tensor.dtype} {shape_of(tensor)}; give activations with {at_least} or more axes, none empty"
        )
    if not tensor.isfinite().all():
        raise InputError(f"{name} holds NaN or infinity; capture in float32 or drop those prompts")
    return tensor


def shape_of(tensor: Tensor) -> str:
    """The shape as error messages show it."""
    return str(list(tensor.shape))


def principal(parts: Sequence[Tensor], rows: Ints | None = None, rank: int | None = None) -> tuple[Tensor, Tensor]:
    """Principal directions about 0 of all parts' rows together, `[d, rank]`, and their squared singular values.

    Directions without variance are left out. Works on the smaller of the Gram and the covariance matrix, a piece
    of the data at a time.
    """
    chosen: Any = slice(None) if rows is None else rows
    counts = [len(part) if rows is None else len(rows) for part in parts]
    n, d = sum(counts), parts[0].shape[1]
    size = min(n, d)
    square = torch.zeros(size, size, dtype=torch.float64)
    if n < d:

        def columns(piece: slice) -> Tensor:
            return torch.cat([part[:, piece][chosen].double() for part in parts])

        for piece in slices(d, n):
            square += columns(piece) @ columns(piece).T
    else:
        for part in parts:
            kept = part[chosen]
            for piece in slices(*kept.shape):
                square += kept[piece].double().T @ kept[piece].double()
    values, vectors = torch.linalg.eigh(square)
    values, vectors = values.flip(0), vectors.flip(1)
    kept_values = values > values[0].clamp(min=0) * 10 * size * torch.finfo(torch.float64).eps
    values, vectors = values[kept_values][:rank], vectors[:, kept_values][:, :rank]
    if n >= d:
        return vectors, values
    basis = torch.cat([columns(piece).T @ (vectors * values.rsqrt()) for piece in slices(d, n)])
    # Directions of small variance lose their right angles in the Gram matrix; the span is kept.
    return torch.linalg.qr(basis)[0], values
