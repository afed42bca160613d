"""What a model says: batched greedy generation. Whether an answer refuses is in `rates`, and who judges in `judges`."""

from collections.abc import Sequence
from typing import Any

import torch
from tqdm import tqdm

from rim_core.checking import whole
from rim_core.models.batching import free_on_gpus, run_batches, token_budget
from rim_core.models.model import Model
from rim_core.models.padding import pad_left
from rim_core.texts import checked, encode
from rim_core.thoughts import decode, open_thought

# Greedy, whatever a checkpoint's generation settings are: several penalise words that were said, and with them the
# padding, so that an answer would depend on the other prompts of its batch.
_GREEDY: dict[str, Any] = {
    "do_sample": False,
    "num_beams": 1,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "temperature": None,
    "top_p": None,
    "top_k": None,
}


@torch.no_grad()
def generate(
    model: Model, texts: Sequence[str], *, max_new_tokens: int = 64, max_batch: int = 64, max_tokens: int | None = None
) -> list[str]:
    """Greedy answers, one a text, without the special tokens; batches are left-padded, so an answer is the same
    alone and among others up to rounding. Each ends where the model ends its turn.

    A model that thinks first gives thought and answer in one text, with the tags between them, also those that are
    special tokens or that the template wrote: `split_thought` tells the two apart, and every judge and rate does so.

    Args:
        model: a loaded model; the adapter and edits now active hold at every step.
        texts: prompts in the model's chat template (see `format_chat`).
        max_new_tokens: of each answer.
        max_batch: texts generated side by side, at most.
        max_tokens: padded prompt tokens a batch; by default from the free memory. A batch that does not fit is halved.

    Raises:
        InputError: no texts, or one that with its answer is longer than the model's context.
        IdentityError: padding changes this model's numbers, or decoding token by token does.

    Example:
        >>> answers = rim.generate(model, texts, max_new_tokens=4)
        >>> len(answers) == len(texts)
        True
    """
    max_new_tokens = whole(max_new_tokens, "max_new_tokens", 1)
    max_batch = whole(max_batch, "max_batch", 1)
    model.require("generate", "padding", "cache")
    texts = checked(texts)
    ids = encode(model, texts, max_new_tokens)
    settings = {
        **_GREEDY,
        "max_new_tokens": max_new_tokens,
        "pad_token_id": model.tokenizer.pad_token_id,
        "eos_token_id": _end_tokens(model),
    }
    # Neighbours in length share a batch, so that little is padded.
    order = sorted(range(len(ids)), key=lambda row: len(ids[row]), reverse=True)
    budget = max_tokens or token_budget(model.layout, model.device)
    costs = _costs([len(ids[row]) for row in order], max_new_tokens, max_batch, budget, _cache_tokens(model))

    def run(rows: list[int]) -> list[str]:
        batch = [ids[order[row]] for row in rows]
        inputs = pad_left(batch, model.tokenizer.pad_token_id, model.device)
        out = model.hf.generate(**inputs, **settings)
        said = decode(model.tokenizer, out[:, inputs["input_ids"].shape[1] :].tolist())
        return [open_thought(model.tokenizer, texts[order[row]]) + new for row, new in zip(rows, said, strict=True)]

    answers = [""] * len(ids)
    with tqdm(total=len(ids), desc="generating", unit="answer", delay=5, disable=None, leave=False) as bar:
        for rows, new in run_batches(costs, budget, run):
            for row, answer in zip(rows, new, strict=True):
                answers[order[row]] = answer
            bar.update(len(rows))
    return answers


def _end_tokens(model: Model) -> list[int]:
    """The tokens that end a turn: those the checkpoint names, and the tokenizer's own."""
    named = model.hf.generation_config.eos_token_id
    ends = {*(named if isinstance(named, list) else [named]), model.tokenizer.eos_token_id}
    return sorted(end for end in ends if end is not None)


def _cache_tokens(model: Model) -> int:
    """Tokens whose keys and values may be held at once: 1 GB of them, on CUDA half of what is free."""
    size = 2 * model.n_layers * model.n_kv_heads * model.head_dim * model.dtype.itemsize
    space = free_on_gpus(model.layout) / 2 if model.device.type == "cuda" else 1e9
    return max(1, int(space / size))


def _costs(lengths: Sequence[int], new: int, max_batch: int, budget: int, cached: int) -> list[int]:
    """Each text's share of the budget, so that its batch keeps to `max_batch` texts and to `cached` tokens too."""
    return [
        max(length, -(-budget // max_batch), min(budget, -(-(length + new) * budget // cached))) for length in lengths
    ]
