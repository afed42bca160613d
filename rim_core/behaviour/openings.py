"""Refusal before a word is said: the log-odds that the first token of an answer opens a refusal."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rim_core.models.batching import by_rows, token_budget
from rim_core.models.first_tokens import HELPFUL_OPENINGS as HELPFUL_OPENINGS
from rim_core.models.first_tokens import REFUSAL_OPENINGS as REFUSAL_OPENINGS
from rim_core.models.first_tokens import log_odds, refusal_tokens
from rim_core.models.first_tokens import opening_tokens as opening_tokens
from rim_core.models.model import Model
from rim_core.models.padding import pad_left, padded_right, shared_beginning
from rim_core.models.remembering import resuming
from rim_core.texts import checked, encode


@torch.no_grad()
def refusal_log_odds(model: Model, texts: Sequence[str], tokens: Sequence[str | int] | None = None) -> Tensor:
    """How much likelier than not a refusal opens the answer: `log p_ref - log(1 - p_ref)` `[prompt]`, where `p_ref`
    is the probability of the refusal tokens right after the prompt (Arditi et al. 2024, section 2.4).

    It needs one forward pass and no judge, but sees the first token only: a helpful answer that begins with "I" counts
    as refusing. Comparisons between conditions are safer than the sign.

    Args:
        model: a loaded model; the adapter and edits now active apply.
        texts: prompts in the model's chat template.
        tokens: openings as strings, of which the first token counts (see `opening_tokens`), or token numbers; None is
            `REFUSAL_OPENINGS`.

    Raises:
        InputError: no texts, openings that cannot be told from helpful ones, or token numbers that do not exist.
        IdentityError: padding changes this model's numbers.

    Example:
        >>> rim.refusal_log_odds(model, texts, [5, 17]).shape == (len(texts),)
        True
    """
    model.require("refusal_log_odds", "padding")
    ids = encode(model, texts)
    chosen = refusal_tokens(model, checked(texts)[0], tokens)

    return next_token(model, ids, lambda logits: log_odds(logits, chosen))


def next_token(model: Model, ids: Sequence[Sequence[int]], read: Callable[[Tensor], Tensor]) -> Tensor:
    """`read(logits)` `[row]` of the logits `[row, vocabulary]` after each text's last token, put together by text.

    A beginning that all texts share is run once a batch, where that gives each text's own numbers (see `capture`).
    """
    pad, sharing = model.tokenizer.pad_token_id, model.checks["cache_batch"].holds and model.checks["lens"].holds
    if any(edit.positional for edit in model.edits):
        sharing = False  # such an edit counts from each text's end, which the shared part does not have
    shared = shared_beginning(ids, 1) if sharing else 0

    def run(rows: list[int]) -> Tensor:
        batch = [ids[row][shared:] for row in rows]
        known = (shared, *(tuple(ids[row]) for row in rows))
        if not shared:
            inputs = pad_left(batch, pad, model.device)
            with resuming(model, known):
                logits = model.hf(**inputs, use_cache=False, logits_to_keep=1).logits
            return read(logits[:, -1].float()).cpu()
        inputs, ends = padded_right(model.layout.body, ids[0][:shared], batch, pad, model.device)
        with resuming(model, known):
            states = model.layout.body(**inputs).last_hidden_state
        last = states[torch.arange(len(rows)), ends.to(states.device) - 1]
        return read(model.layout.logits(last).float()).cpu()

    return by_rows([row[shared:] for row in ids], run, token_budget(model.layout, model.device))
