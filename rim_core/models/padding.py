"""Texts side by side: positions from their ends, padding with explicit position ids, a beginning laid under all.

`checks` measures on each model whether a shared beginning, laid under a batch as the model's cache, gives each prompt's
own numbers (identity `cache_batch`): a cache that holds more than keys and values, such as the state of a
linear-attention or state-space layer, may not be laid so.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from rim_core.checking import is_whole, listed, shown, whole_numbers
from rim_core.errors import InputError

Positions = str | int | Sequence[int]


def positions(
    given: Positions | Sequence[Sequence[int]], lengths: Sequence[int], what: str = "positions"
) -> list[list[int]]:
    """The positions meant in each text of so many tokens, counted from its end.

    Args:
        given: `"last"`, `"all"`, one or several whole numbers below 0, or a list of these for each text.
        lengths: each text's tokens.
        what: the argument's name, for messages.

    Raises:
        InputError: anything else, or a position that a text does not have.
    """
    if isinstance(given, str):
        if given not in ("last", "all"):
            raise InputError(f"unknown {what} {shown(given)}: 'last', 'all', or whole numbers below 0")
        return [[-1] if given == "last" else list(range(-length, 0)) for length in lengths]
    rows = [given] if is_whole(given) else listed(given, what)
    if not rows or is_whole(rows[0]):
        found = [whole_numbers(rows, what)] * len(lengths)
    elif len(rows) == len(lengths):
        found = [whole_numbers(row, f"{what}, text {text}") for text, row in enumerate(rows)]
    else:
        raise InputError(f"{what}: {len(rows)} lists for {len(lengths)} texts; give one for each")
    for text, (row, length) in enumerate(zip(found, lengths, strict=True)):
        if wrong := [position for position in row if not -length <= position < 0]:
            raise InputError(
                f"{what}: position {wrong[0]} is out of range: text {text} has {length} tokens; count from its end, "
                f"-1 to -{length}"
            )
    return found


def pad_left(ids: Sequence[Sequence[int]], pad: int, device: Any = "cpu") -> dict[str, Tensor]:
    """Model inputs `input_ids`, `attention_mask`, `position_ids`, each `[prompt, width]`, padded on the left.

    Positions count from each prompt's own first token, so that a model with absolute positions gives one prompt
    the same numbers alone and in a batch.
    """
    tokens, real = pad_right([row[::-1] for row in ids], pad)
    mask = real.flip(1).long()
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
    inputs = {"input_ids": tokens.flip(1), "attention_mask": mask, "position_ids": position_ids}
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def pad_right(ids: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Token ids `[prompt, width]` padded on the right, and the mask of real tokens, both on the CPU."""
    lengths = torch.tensor([len(row) for row in ids])
    width = int(lengths.max())
    tokens = torch.tensor([[*row, *[pad] * (width - len(row))] for row in ids], dtype=torch.long)
    return tokens, torch.arange(width) < lengths[:, None]


# Shorter beginnings are not worth a pass of their own.
_WORTH_SHARING = 8


def shared_beginning(ids: Sequence[Sequence[int]], keep: int) -> int:
    """Tokens that all prompts start with, short of the last `keep` of each; 0 where sharing them does not pay."""
    if len(ids) < 2:
        return 0
    first, limit = ids[0], max(0, min(map(len, ids)) - keep)
    length = next((i for i in range(limit) if any(row[i] != first[i] for row in ids)), limit)
    return length if length >= _WORTH_SHARING else 0


def _laid(body: nn.Module, beginning: Sequence[int], copies: int, device: Any) -> Any:
    start = torch.tensor([beginning], device=device)
    cache = body(input_ids=start, use_cache=True).past_key_values
    cache.batch_repeat_interleave(copies)
    return cache


def padded_right(
    body: nn.Module, beginning: Sequence[int], batch: Sequence[Sequence[int]], pad: int, device: Any
) -> tuple[dict[str, Any], Tensor]:
    """The body's inputs for the rest of each prompt on top of `beginning`, and where each prompt ends, on the CPU.

    Padded on the right no gap comes after the beginning, so sliding windows see the distances of a prompt alone.
    """
    past = _laid(body, beginning, len(batch), device)
    tokens, real = pad_right(batch, pad)
    shared, width = len(beginning), tokens.shape[1]
    mask = torch.cat([torch.ones(len(batch), shared, dtype=torch.bool), real], dim=1).long()
    inputs = {
        "input_ids": tokens.to(device),
        "attention_mask": mask.to(device),
        "position_ids": torch.arange(shared, shared + width, device=device).expand(len(batch), -1),
        "past_key_values": past,
        "use_cache": True,
    }
    return inputs, real.sum(dim=1)  # on the CPU: indices there fit activations on any device


def outgrows_window(config: Any, longest: int) -> bool:
    """Whether a prompt of `longest` tokens is longer than a sliding window of the model.

    Padding between the shared beginning and the rest of a prompt then counts as distance: on the left, share none.
    """
    window = getattr(config.get_text_config(), "sliding_window", None)
    return bool(window and window < longest)


def padded_left(body: nn.Module, ids: Sequence[Sequence[int]], shared: int, pad: int, device: Any) -> dict[str, Any]:
    """Left-padded inputs of the body with a cache, which holds the `shared` tokens that all prompts begin with."""
    inputs: dict[str, Any] = pad_left([row[shared:] for row in ids], pad, device)
    cache = DynamicCache()
    if shared:
        cache = _laid(body, ids[0][:shared], len(ids), device)
        inputs["position_ids"] = inputs["position_ids"] + shared
        seen = inputs["attention_mask"]
        inputs["attention_mask"] = torch.cat([seen.new_ones(len(ids), shared), seen], dim=1)
    return {**inputs, "past_key_values": cache, "use_cache": True}
