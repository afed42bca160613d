"""A beginning that prompts share, run once and laid under all of them as the model's cache.

`checks` measures on each model whether this gives each prompt's own numbers (identity `cache_batch`): a cache that
holds more than keys and values, such as the state of a linear-attention or state-space layer, may not be laid so.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from rim_core.models.batching import pad_left, pad_right


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
