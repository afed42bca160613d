"""From texts to token ids: the one way by which every tool of the package reads a prompt.

A text in the model's chat template gets exactly the tokens of `apply_chat_template(messages, tokenize=True,
add_generation_prompt=True)`: what begins and ends it is the template's own. Any other text gets what the tokenizer puts
before it (BOS), and nothing after it: the last token is the text's own, and not an end of sequence, because every
prompt is to be continued.
"""

import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from rim_core.errors import InputError, first_line

Offsets = list[tuple[int, int]]


class ChatText(str):
    """A text in a model's chat template, as `format_chat` makes it: a string that says so.

    Joined with what follows (`text + answer`) it stays one. Stored elsewhere and read back as a plain string it is
    known again by how the template begins; only `words` are lost then.

    Attributes:
        words: the `(start, end)` of each piece in which control tokens are to be read as plain text.
    """

    words: tuple[tuple[int, int], ...]

    def __new__(cls, text: str, words: Iterable[tuple[int, int]] = ()) -> "ChatText":
        """The text, with the pieces of it that are to be plain."""
        made = super().__new__(cls, text)
        made.words = tuple(words)
        return made

    def __add__(self, more: str) -> "ChatText":
        return ChatText(super().__add__(more), self.words)


def listed(given: Any, noun: str = "text") -> list[Any]:
    """The items of a list, tuple, pandas Series or array; raises InputError for anything else, such as one string."""
    one_by_one = hasattr(given, "__len__") and hasattr(given, "__getitem__")
    if isinstance(given, str | bytes):
        raise InputError(f"{noun}s must be a list of strings, not one string: put it in a list")
    if not one_by_one or isinstance(given, Mapping) or getattr(given, "ndim", 1) != 1:
        raise InputError(f"{noun}s must be a list of strings, not a {type(given).__name__}: give one a prompt")
    return list(given)


def checked(given: Any, noun: str = "text", empty: bool = False) -> list[str]:
    """The texts as a list of strings.

    Args:
        given: a list, tuple, pandas Series or array.
        noun: what they are, for messages.
        empty: whether a text may be.

    Raises:
        InputError: another kind of value, no text, or one that is empty, no string, or no Unicode.
    """
    texts = listed(given, noun)
    if not texts:
        raise InputError(f"no {noun}s were given: pass at least one")
    return [checked_one(text, f"{noun} {number}", empty) for number, text in enumerate(texts)]


def checked_one(text: Any, what: str, empty: bool = False) -> str:
    """The text, as a plain string or a `ChatText`; raises InputError as `checked`, in the name `what`."""
    if not isinstance(text, str):
        kind = type(text).__name__
        if kind == "Prompt":
            raise InputError(f"{what} is a Prompt, not yet in a chat template: use rim.format_chat(model, prompts)")
        raise InputError(f"{what} is no string but of type {kind}: give strings, and leave out what is missing")
    if not text and not empty:
        raise InputError(f"{what} is empty: remove it")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"{what} has half a surrogate pair at character {error.start}, which is no Unicode: repair it where the "
            "text was read"
        ) from None
    # Tokenizers take NumPy's own strings only in part.
    return text if type(text) in (str, ChatText) else str(text)


def tokenizer_of(model: Any) -> Any:
    """The tokenizer of a model, or the tokenizer itself."""
    return getattr(model, "tokenizer", model)


def encode(model: Any, texts: Sequence[str], new_tokens: int = 0) -> list[list[int]]:
    """Token ids of each text, as the head of this module says.

    Args:
        model: a `Model`, by whose context the texts are measured; or a tokenizer, which sets no limit.
        texts: a list, tuple, pandas Series or array of strings.
        new_tokens: how many are to follow each text.

    Raises:
        InputError: no texts, one that is empty or no text, or one that is longer than the model's context.
    """
    tokenizer = tokenizer_of(model)
    ids = [tokenised(tokenizer, text)[0] for text in checked(texts)]
    if empty := [number for number, row in enumerate(ids) if not row]:
        raise InputError(f"text {empty[0]} is empty: remove it")
    require_room(model, [len(row) for row in ids], new_tokens)
    return ids


def encode_more(model: Any, texts: Sequence[str], noun: str = "completion") -> list[list[int]]:
    """Token ids of texts that follow others, without BOS or EOS; none for an empty one.

    Raises:
        InputError: as `checked`.
    """
    tokenizer = tokenizer_of(model)
    return [_ids(tokenizer, text, special=False)[0] for text in checked(texts, noun, empty=True)]


def continuation(model: Any, text: str, word: str) -> list[int] | None:
    """The tokens that `word` adds after `text`, or None where they merge with the text's own."""
    before, after = encode(model, [text, text + word])
    return after[len(before) :] if after[: len(before)] == before else None


# The context ----------------------------------------------------------------------------------------------------------

# By families' names for it; where positions are scaled up, the first of these is the scaled one.
_WINDOWS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "n_ctx")


def window(model: Any) -> int | None:
    """Tokens that a model (or a Hugging Face model) can hold, prompt and answer together; None if it does not say."""
    # Of the modules, since a model at NDIF has no weights here.
    body = getattr(getattr(model, "layout", None), "body", model)
    config = getattr(body, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        return None
    found = (getattr(config.get_text_config(), name, None) for name in _WINDOWS)
    return next((int(size) for size in found if isinstance(size, int) and size > 0), None)


def require_room(model: Any, lengths: Sequence[int], new_tokens: int = 0, noun: str = "text") -> None:
    """Refuse texts of these many tokens if one, with the tokens that are to follow, passes the model's context.

    Beyond it rotary models give numbers that mean nothing, and others an index error.

    Raises:
        InputError: names the longest text, its tokens and the limit.
    """
    limit = window(model)
    longest = max(range(len(lengths)), key=lambda row: lengths[row])
    if limit is None or lengths[longest] + new_tokens <= limit:
        return
    has = f"{noun} {longest} has {lengths[longest]} tokens"
    name = getattr(model, "name", "the model")
    if new_tokens:
        raise InputError(
            f"{has}, and with {new_tokens} new ones passes the {limit} that {name} can hold: shorten it, or lower "
            "max_new_tokens"
        )
    raise InputError(f"{has}, more than the {limit} that {name} can hold: shorten it")


# The chat template ----------------------------------------------------------------------------------------------------


def render(tokenizer: Any, user: str, system: str | None = None, generation: bool = True, **extra: Any) -> str:
    """One user turn in the chat template, as text, up to where the answer begins.

    Raises:
        InputError: the template refuses the messages.
    """
    messages = [] if system is None else [{"role": "system", "content": system}]
    messages.append({"role": "user", "content": user})
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation, **extra)
    except Exception as error:  # templates raise their own Jinja errors, e.g. for a system role
        raise InputError(f"the chat template refuses these messages: {first_line(error)}") from None


@dataclass(frozen=True)
class Template:
    """What a tokenizer's chat template always writes.

    Attributes:
        source: the template.
        beginnings: what a text in it begins with, blanks apart: a control token, or whatever is the same in all.
        turn: what opens the assistant's turn; empty where nothing does.
    """

    source: Any
    beginnings: tuple[str, ...]
    turn: str


_TEMPLATES: WeakKeyDictionary[Any, Template] = WeakKeyDictionary()


def template_of(tokenizer: Any) -> Template:
    """The constant parts of the tokenizer's chat template, worked out by rendering two chats that share no letter."""
    source = getattr(tokenizer, "chat_template", None)
    known = _TEMPLATES.get(tokenizer)
    if known is None or known.source != source:
        known = _TEMPLATES[tokenizer] = _template(tokenizer, source)
    return known


def _template(tokenizer: Any, source: Any) -> Template:
    beginnings, turn = set(), ""
    controls = sorted((token.content for token in _added(tokenizer).values()), key=len, reverse=True)
    for has_system in (False, True) if source else ():
        try:
            chats = [render(tokenizer, word, word if has_system else None) for word in ("Aa", "bB")]
            if not has_system:
                bare = render(tokenizer, "Aa", generation=False)
                turn = chats[0].removeprefix(bare) if chats[0].startswith(bare) else ""
        except InputError:
            continue  # a template that takes no system message
        pairs = zip(*chats, strict=False)
        same = "".join(a for a, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)).strip()
        beginnings.add(next((control for control in controls if control and same.startswith(control)), same))
    return Template(source, tuple(sorted(beginnings - {""})), turn)


def in_template(tokenizer: Any, text: str) -> bool:
    """Whether a text is in the chat template: made by `format_chat`, or begun as the template begins, or with BOS."""
    if isinstance(text, ChatText):
        return True
    beginnings = template_of(tokenizer).beginnings
    if tokenizer.bos_token:
        beginnings = (*beginnings, tokenizer.bos_token)
    return text.lstrip().startswith(beginnings)


# Tokens ---------------------------------------------------------------------------------------------------------------


def tokenised(tokenizer: Any, text: str, offsets: bool = False) -> tuple[list[int], Offsets]:
    """Ids of a prompt's tokens and, if asked for, where each lies in the text."""
    if in_template(tokenizer, text):
        if words := getattr(text, "words", ()):
            return _with_plain_words(tokenizer, text, words)
        return _ids(tokenizer, text, special=False, offsets=offsets)
    ids, where = _ids(tokenizer, text, special=True, offsets=offsets)
    # What is put after every text, such as EOS, would take the place of the prompt's last token.
    probe = "a"
    full, bare = (_ids(tokenizer, probe, special=special)[0] for special in (True, False))
    starts = range(len(full) - len(bare) + 1)
    begin = next((i for i in starts if full[i : i + len(bare)] == bare), len(full) - len(bare))
    keep = len(ids) - (len(full) - len(bare) - begin)
    return ids[:keep], where[:keep]


def _ids(tokenizer: Any, text: str, special: bool, offsets: bool = False) -> tuple[list[int], Offsets]:
    found = tokenizer(text, add_special_tokens=special, return_offsets_mapping=offsets)
    return list(found["input_ids"]), list(found["offset_mapping"]) if offsets else []


def _added(tokenizer: Any) -> dict[int, Any]:
    """Tokens by id that are found in a text before it is split into words."""
    return getattr(tokenizer, "added_tokens_decoder", None) or {}


def control_tokens(tokenizer: Any) -> dict[str, int]:
    """The tokens by which a chat is steered: the special ones, and those that the chat template writes.

    Other added tokens, such as runs of blanks, are ordinary text.
    """
    source = json.dumps(getattr(tokenizer, "chat_template", None) or "", ensure_ascii=False)
    return {
        token.content: number
        for number, token in _added(tokenizer).items()
        if token.special or json.dumps(token.content, ensure_ascii=False)[1:-1] in source
    }


class _Twin(NamedTuple):
    """A tokenizer whose control tokens have other names: one private character each, which no text holds."""

    backend: Any
    names: dict[str, str]
    ids: dict[int, int]
    controls: dict[str, int]


_TWINS: WeakKeyDictionary[Any, _Twin] = WeakKeyDictionary()
_PRIVATE = 0x100000


def require_plain_words(tokenizer: Any) -> None:
    """Raise InputError where a tokenizer cannot read control tokens as plain text in a part of a text."""
    if not getattr(tokenizer, "is_fast", False):
        raise InputError("plain=True needs a fast tokenizer, which reads control tokens as text: leave plain out")


def _twin(tokenizer: Any) -> _Twin:
    controls = control_tokens(tokenizer)
    known = _TWINS.get(tokenizer)
    if known is None or known.controls != controls:
        from tokenizers import Tokenizer

        content = json.loads(tokenizer.backend_tokenizer.to_str())
        content["truncation"] = content["padding"] = None
        names = {token: chr(_PRIVATE + number) for number, token in enumerate(controls)}
        old: dict[str, int] = {}
        for token in content["added_tokens"]:
            name = names.get(token["content"], token["content"])
            old[name] = token["id"]
            token.update(content=name, normalized=token["normalized"] and name == token["content"])
        backend = Tokenizer.from_str(json.dumps(content))
        ids = {number: old[token.content] for number, token in backend.get_added_tokens_decoder().items()}
        known = _TWINS[tokenizer] = _Twin(backend, names, ids, controls)
    return known


def _with_plain_words(tokenizer: Any, text: str, words: Sequence[tuple[int, int]]) -> tuple[list[int], Offsets]:
    """The text's tokens, with control tokens only outside of `words`.

    Everything is tokenised together, so that words and template merge as they do without control tokens in them.

    Raises:
        InputError: a tokenizer that cannot do so.
    """
    require_plain_words(tokenizer)
    ids, offsets = _ids(tokenizer, text, special=False, offsets=True)
    controls = set(control_tokens(tokenizer).values())
    ruled = [span for token, span in zip(ids, offsets, strict=True) if token in controls]
    if not any(a < end and b > start for a, b in ruled for start, end in words):
        return ids, offsets
    twin = _twin(tokenizer)
    if any(chr(_PRIVATE) <= letter < chr(_PRIVATE + len(twin.names)) for letter in text):
        raise InputError("plain=True cannot read a text with characters of Unicode's last private plane: remove them")
    renamed, places = _rename(text, words, twin.names)
    found = twin.backend.encode(renamed, add_special_tokens=False)
    ids = [twin.ids.get(token, token) for token in found.ids]
    if sum(token in controls for token in ids) != sum(letter in set(twin.names.values()) for letter in renamed):
        raise InputError(
            "this tokenizer reads control tokens in ordinary text too, so plain=True cannot keep them out: remove them "
            "from the prompts"
        )
    return ids, [(places[a], places[b]) for a, b in found.offsets]


def _rename(text: str, words: Sequence[tuple[int, int]], names: Mapping[str, str]) -> tuple[str, list[int]]:
    """The text with control tokens outside of `words` renamed, and where each of its characters was before."""
    pattern = re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))))
    pieces: list[str] = []
    places: list[int] = []

    def keep(start: int, end: int) -> None:
        pieces.append(text[start:end])
        places.extend(range(start, end))

    begin = 0
    for start, end in [*words, (len(text), len(text))]:
        for match in pattern.finditer(text[:start], begin):
            keep(begin, match.start())
            pieces.append(names[match.group()])
            places.append(match.start())
            begin = match.end()
        keep(begin, start)
        keep(start, end)
        begin = end
    return "".join(pieces), [*places, len(text)]
