"""The first token of an answer: which ones open a refusal, and the log-odds of these."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rim_core.checking import listed
from rim_core.errors import InputError, OpeningError
from rim_core.models.model import Model
from rim_core.models.tokens import checked_id
from rim_core.texts import continuation

# How refusals and helpful answers open (Arditi et al. 2024 use "I" and "As", by family).
REFUSAL_OPENINGS = ("I", "I'm", "Sorry", "As", "Unfortunately")
HELPFUL_OPENINGS = ("Sure", "Here", "Certainly", "Of course", "To", "The", "First", "Yes")


def opening_tokens(model: Model, text: str, openings: Sequence[str] = REFUSAL_OPENINGS) -> list[int]:
    """The first token of each opening as an answer to `text`, with and without a space before it; ascending.

    Args:
        model: its tokenizer counts.
        text: a prompt in the model's chat template.
        openings: how refusals open.

    Raises:
        OpeningError: an opening's first token also begins a helpful answer (`HELPFUL_OPENINGS`), as in tokenizers that
            split words into letters, or an opening merges with the end of the text.

    Example:
        >>> tokens = rim.opening_tokens(model, texts[0], ["No"])
        >>> [tokenizer.decode(token) for token in tokens]
        ['N']
    """
    helpful = _first_tokens(model, text, HELPFUL_OPENINGS)
    found: set[int] = set()
    for opening in openings:
        first = _first_tokens(model, text, [opening])
        if not first:
            raise OpeningError(
                f"opening {opening!r} merges with the end of the text {text[-20:]!r}: use the chat template, or pass "
                "token numbers"
            )
        if clash := first & helpful:
            raise OpeningError(
                f"opening {opening!r} cannot tell a refusal: its first token "
                f"{model.tokenizer.decode(sorted(clash)[:1])!r} also opens helpful answers; pass other openings or "
                "token numbers"
            )
        found |= first
    return sorted(found)


def _first_tokens(model: Model, text: str, openings: Sequence[str]) -> set[int]:
    added = [continuation(model, text, space + word) for word in openings for space in ("", " ")]
    # A space that is a token of its own opens anything.
    return {tokens[0] for tokens in added if tokens and model.tokenizer.decode(tokens[:1]).strip()}


def refusal_tokens(model: Model, text: str, given: Sequence[str | int] | None = None) -> list[int]:
    """Ascending numbers of the tokens that count as refusing after `text`.

    Args:
        model: its tokenizer counts.
        text: a prompt in the model's chat template.
        given: openings as strings, of which the first token counts (see `opening_tokens`), or token numbers; None is
            `REFUSAL_OPENINGS`.

    Raises:
        InputError: none, openings that cannot be told from helpful ones, or token numbers that do not exist.
    """
    tokens = listed(REFUSAL_OPENINGS if given is None else given, "tokens")
    if not tokens:
        raise InputError("tokens must be a list of openings or token numbers, at least one")
    words = [token for token in tokens if isinstance(token, str)]
    numbers = {checked_id(model, token) for token in tokens if not isinstance(token, str)}
    return sorted(numbers.union(opening_tokens(model, text, words) if words else []))


def log_odds(logits: Tensor, tokens: Sequence[int]) -> Tensor:
    """The log-odds `[row]` that the next token is one of `tokens`, from float32 logits `[row, vocabulary]`."""
    chosen = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
    chosen[list(tokens)] = True
    # Both sums over the logits share their normaliser, so that no 1 - p loses digits.
    return logits[:, chosen].logsumexp(-1) - logits[:, ~chosen].logsumexp(-1)
