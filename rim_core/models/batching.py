"""Texts in batches of what fits in memory: halved where it does not, put back in the callers' order."""

import contextlib
import gc
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

import psutil
import torch
from torch import Tensor

from rim_core.errors import InputError, RimError, first_line

if TYPE_CHECKING:
    from rim_core.models.layout import Layout

T = TypeVar("T")


def batches(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Indices of texts in batches of at most `max_tokens` padded tokens (at least one text), neighbours in length."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i], reverse=True):
        width = lengths[batch[0]] if batch else lengths[index]
        if batch and width * (len(batch) + 1) > max_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def run_batches(
    lengths: Sequence[int], max_tokens: int, run: Callable[[list[int]], T]
) -> Iterator[tuple[list[int], T]]:
    """Yield `(rows, run(rows))` a batch; where memory runs out, this batch and those that wait are halved.

    Raises:
        InputError: one text alone does not fit in memory.
    """
    waiting = list(batches(lengths, max_tokens))[::-1]
    while waiting:
        rows = waiting.pop()
        try:
            result = run(rows)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            if len(rows) == 1:
                raise no_room(lengths[rows[0]]) from None
        else:
            yield rows, result
            continue
        # Outside the handler, so that the failed pass's tensors are gone.
        free_memory()
        waiting = [half for group in [*waiting, rows] for half in _halves(group)]


def by_rows(ids: Sequence[Sequence[int]], run: Callable[[list[int]], Tensor], budget: int) -> Tensor:
    """`run(rows)` `[row, ...]` of every text, in batches of at most `budget` padded tokens, put together by text."""
    result: Tensor | None = None
    for rows, values in run_batches([len(row) for row in ids], budget, run):
        if result is None:
            result = values.new_empty(len(ids), *values.shape[1:])
        result[rows] = values
    assert result is not None, "no texts"
    return result


def no_room(length: int) -> InputError:
    """What is said where one text alone does not fit."""
    return InputError(f"a text of {length} tokens does not fit in memory: shorten it, or free memory")


def free_memory() -> None:
    """Give back what a failed pass has left."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _halves(rows: list[int]) -> list[list[int]]:
    middle = len(rows) // 2
    return [half for half in (rows[middle:], rows[:middle]) if half]


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on whatever device."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "not enough memory" in str(error)


@contextlib.contextmanager
def told_of(where: str) -> Iterator[None]:
    """Within the context what a user's function raises is one InputError that begins with `where`; want of memory,
    which halves a batch, and the package's own errors pass.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, RimError) or out_of_memory(error):
            raise
        raise InputError(f"{where}: {type(error).__name__}: {first_line(error)}") from error


def free_on_gpus(layout: "Layout") -> int:
    """Bytes free on the fullest of the CUDA devices that hold the layers."""
    devices = {parameter.device for layer in layout.layers for parameter in itertools.islice(layer.parameters(), 1)}
    return min(torch.cuda.mem_get_info(device)[0] for device in devices if device.type == "cuda")


def token_budget(layout: "Layout", device: torch.device) -> int:
    """Padded tokens that one pass may hold: working memory of at most 1 GB, and at most half of what is free."""
    if device.type == "cuda":
        free, ceiling = free_on_gpus(layout), 32768
    else:
        free, ceiling = psutil.virtual_memory().available, 4096
    width = layout.n_heads * layout.head_dim
    values = 8 * layout.d_model + 4 * (layout.d_mlp or 4 * layout.d_model) + 4 * width
    cached = 2 * len(layout.layers) * layout.n_kv_heads * layout.head_dim
    return max(256, min(ceiling, int(min(1e9, free / 2) / (4 * (values + cached)))))
