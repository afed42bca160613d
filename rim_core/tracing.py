"""Running a model on texts: left-padded batches with explicit positions, and nnsight's tracer for free-form work.

This is the only module that imports nnsight. The measured paths of `rim_core` use plain PyTorch hooks (see
`sites.reading`), which cost next to nothing; `trace` gives the same sites by nnsight's paths for exploration.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from rim_core.errors import InputError


def encode(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, with the tokenizer's special tokens unless the text already starts with them.

    Raises:
        InputError: no text, or a text without a token.
    """
    if isinstance(texts, str):
        raise InputError("texts must be a list of strings, not one string: put it in a list")
    if not texts:
        raise InputError("no texts were given: pass at least one")
    bos = tokenizer.bos_token
    ids = [tokenizer(text, add_special_tokens=not (bos and text.startswith(bos))).input_ids for text in texts]
    if empty := [number for number, row in enumerate(ids) if not row]:
        raise InputError(f"text {empty[0]} is empty: remove it")
    return ids


def pad_left(ids: Sequence[Sequence[int]], pad: int, device: Any = "cpu") -> dict[str, Tensor]:
    """Model inputs `input_ids`, `attention_mask`, `position_ids`, each `[prompt, width]`, padded on the left.

    Positions count from each prompt's own first token, so that a model with absolute positions gives one prompt
    the same numbers alone and in a batch.
    """
    width = max(map(len, ids))
    tokens = torch.full((len(ids), width), pad, dtype=torch.long)
    mask = torch.zeros(len(ids), width, dtype=torch.long)
    for row, sequence in enumerate(ids):
        tokens[row, width - len(sequence) :] = torch.tensor(sequence)
        mask[row, width - len(sequence) :] = 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    inputs = {"input_ids": tokens, "attention_mask": mask, "position_ids": positions}
    return {name: tensor.to(device) for name, tensor in inputs.items()}


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


def nnsight_model(hf: Any, tokenizer: Any) -> Any:
    """The model wrapped by nnsight; its trace gives the Hugging Face forward bit for bit."""
    from nnsight import TransformersModel

    return TransformersModel(hf, tokenizer=tokenizer)
