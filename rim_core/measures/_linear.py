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
    parts = zip(values.unbind(-vectors.ndim), vectors, strict=True)
    return torch.stack([dot(*pair) for pair in parts], dim=1 - vectors.ndim)


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


def checked(values: Any, name: str, shape: Sequence[int | str] | None = None) -> Tensor:
    """Floating-point, finite values as a tensor on the CPU; `name` begins the line of an `InputError`."""
    given = checking.array(values, name, shape=shape)
    if isinstance(given, np.ndarray):
        # Torch reads neither negative strides nor foreign byte orders nor long doubles.
        kind = "f8" if given.dtype.itemsize > 8 else given.dtype.newbyteorder("=")
        given = torch.tensor(np.ascontiguousarray(given, dtype=kind).reshape(given.shape))
    if not given.is_floating_point():
        raise InputError(f"{name} is of {given.dtype}; give activations, which are floating-point numbers")
    return given.cpu()


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
