"""Numbers read off the activations of many texts, without holding all activations at once."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rim_core.checking import whole_numbers
from rim_core.errors import InputError
from rim_core.models.batching import batches
from rim_core.models.capture import Activations, capture
from rim_core.models.loading import Model
from rim_core.texts import checked, encode

Positions = str | int | Sequence[int]

# Activations held at a time, in numbers.
_HELD = 2**27


def measure(
    model: Model,
    texts: Sequence[str],
    sites: Sequence[str],
    positions: Positions,
    read: Callable[[Activations], dict[str, Tensor]],
) -> tuple[tuple[int, ...], dict[str, Tensor]]:
    """The positions read, counted from the end, and `read` of the texts' activations, put together by text.

    The tensors are `[prompt, (position,) ...]`, NaN where "all" positions have padding.

    Args:
        sites, positions: as in `capture`.
        read: gives tensors `[prompt, (position,) ...]` by name.
    """
    texts = checked(texts)
    lengths = [len(row) for row in encode(model, texts)]
    if isinstance(positions, str) and positions == "all":
        listed, kept = tuple(range(-max(lengths), 0)), lengths
    else:
        chosen = [-1] if isinstance(positions, str) else whole_numbers(positions, "positions")
        listed, kept = tuple(chosen), [len(chosen)] * len(lengths)
    a_token = len(sites) * model.n_layers * max(model.d_model, model.n_heads * model.head_dim)
    result: dict[str, Tensor] = {}
    for rows in batches(kept, max(1, _HELD // a_token)):
        acts = capture(model, [texts[row] for row in rows], sites, positions)
        for name, values in read(acts).items():
            if acts.mask is not None:
                padded = values.new_full((len(rows), len(listed), *values.shape[2:]), torch.nan)
                padded[:, -values.shape[1] :][acts.mask] = values[acts.mask]
                values = padded
            whole = result.setdefault(name, values.new_empty(len(lengths), *values.shape[1:]))
            whole[rows] = values
    return listed, result


def one_of(positions: Sequence[int], position: int | None, caller: str) -> int:
    """The position to draw, by default the last one read; raises InputError in the caller's name for any other."""
    chosen = positions[-1] if position is None else position
    if chosen not in positions:
        raise InputError(f"{caller}: position {chosen} was not read; this holds {', '.join(map(str, positions))}")
    return chosen
