"""Tokens by name, a string that is one token or an id; and where a fragment's tokens lie in a text."""

from collections.abc import Sequence
from typing import Any

from rim_core.checking import is_whole, listed, shown
from rim_core.errors import InputError
from rim_core.models.model import Model
from rim_core.texts import checked, encode_more, tokenised, tokenizer_of

Tokens = str | int | Sequence[str | int]
# Labels and ids.
Named = tuple[tuple[str, ...], tuple[int, ...]]


def single_tokens(model: Model, tokens: Tokens) -> Named:
    """Labels and ids of tokens given by text or id; a text that is one token only with (or without) a leading
    space is taken so, and the label shows the space as "␣".

    Raises:
        InputError: no token, a text of several tokens, an id outside the vocabulary, or one token twice.
    """
    given: list[Any] = [tokens] if isinstance(tokens, str) or is_whole(tokens) else listed(tokens, "tokens")
    if not given:
        raise InputError("no tokens were named: give at least one")
    ids = [_from_text(model, token) if isinstance(token, str) else checked_id(model, token) for token in given]
    labels = [label(model, token) for token in ids]
    for number, token in enumerate(ids):
        if (first := ids.index(token)) < number:
            raise InputError(f"{given[first]!r} and {given[number]!r} are one token ({labels[number]}): name it once")
    return tuple(labels), tuple(ids)


def two_sides(model: Model, toward: Tokens, against: Tokens) -> tuple[Named, Named]:
    """The tokens on either side of a difference of logits, as `single_tokens` gives them.

    Raises:
        InputError: as `single_tokens`, or one token on both sides.
    """
    sides = single_tokens(model, toward), single_tokens(model, against)
    if shared := set(sides[0][1]) & set(sides[1][1]):
        raise InputError(f"token {label(model, min(shared))} is on both sides: a difference needs two tokens")
    return sides


def checked_id(model: Model, token: int) -> int:
    """The id itself; raises InputError where the model has no such token."""
    if not is_whole(token) or not 0 <= token < model.layout.d_vocab:
        raise InputError(f"no token {shown(token)}: ids go from 0 to {model.layout.d_vocab - 1}")
    return int(token)


def label(model: Model, token: int) -> str:
    """The token's piece of text, a leading space shown as "␣"."""
    # Vocabularies are often padded beyond what the tokenizer names.
    piece = model.tokenizer.convert_ids_to_tokens(token) or f"<{token}>"
    return f"␣{piece[1:]}" if piece[0] in "Ġ▁" else piece


def _from_text(model: Model, text: str) -> int:
    tokenizer = model.tokenizer
    for spelling in (text, text[1:] if text.startswith(" ") else f" {text}"):
        found = encode_more(tokenizer, [spelling], "token")[0]
        if text and len(found) == 1 and found[0] != tokenizer.unk_token_id:
            return int(found[0])
    pieces = tokenizer.convert_ids_to_tokens(encode_more(tokenizer, [text], "token")[0])
    raise InputError(
        f"{text!r} is no single token, with or without a leading space, but {' | '.join(pieces)}: choose another "
        "word, or give the id of its first token"
    )


def find_span(model: Any, texts: Sequence[str], fragment: Any) -> list[list[int]]:
    """Where the last occurrence of a fragment lies in each text: its tokens' positions from the end, ascending.

    A token that holds a part of the fragment belongs to it. Tokens are those that every tool reads.

    Args:
        model: a `Model`, or its tokenizer.
        texts: prompts as the model is to see them.
        fragment: what to look for in all of them, a string or a `Prompt`; or a list of these, one for each.

    Raises:
        InputError: a text without its fragment, fragments that are not one a text, or a tokenizer that does not tell
            where tokens begin.

    Example:
        >>> rim.find_span(model, ["Why is the sky blue?"], "blue?")[0][-1]
        -1
    """
    tokenizer = tokenizer_of(model)
    if not getattr(tokenizer, "is_fast", False):
        raise InputError("spans need a fast tokenizer, which knows where each token begins in the text")
    found, fragment = checked(texts), getattr(fragment, "text", fragment)
    if isinstance(fragment, str):
        fragments = [fragment] * len(found)
    else:
        fragments = [getattr(one, "text", one) for one in listed(fragment, "find_span: fragment")]
        if len(fragments) != len(found):
            raise InputError(f"find_span: {len(fragments)} fragments for {len(found)} texts; give one, or one for each")
    spans = []
    for number, (text, wanted) in enumerate(zip(found, fragments, strict=True)):
        start = text.rfind(wanted) if wanted and isinstance(wanted, str) else -1
        if start < 0:
            raise InputError(f"text {number} does not contain {shown(wanted)}")
        offsets = tokenised(tokenizer, text, offsets=True)[1]
        inside = [i for i, (a, b) in enumerate(offsets) if a < start + len(wanted) and b > start]
        spans.append([i - len(offsets) for i in inside])
    return spans
