"""Answers of models that think first: the thought, the answer, and thoughts that never ended.

Text between these tags is a thought, by whatever model:

- `<think>`: Qwen3, DeepSeek-R1 and its distillates, QwQ, GLM, SmolLM3, Phi-4-reasoning and most others
- `<thought>`: EXAONE Deep
- `[THINK]`: Magistral, Ministral
- `<seed:think>`: Seed-OSS
- `<|START_THINKING|>`: Command A Reasoning
- `<|inner_prefix|>`: Apertus
- `<|channel|>analysis` to `<|channel|>final`: gpt-oss
- `<|channel>thought` to `<channel|>`: Gemma 4
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rim_core.texts import template_of

TAGS = (
    ("<think>", "</think>"),
    ("<thought>", "</thought>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|inner_prefix|>", "<|inner_suffix|>"),
    ("<|channel|>analysis<|message|>", "<|channel|>final<|message|>"),
    ("<|channel>thought", "<channel|>"),
)


# Blanks, and marks that are not seen.
_LEADING = re.compile(r"^[\s\ufeff\u200b]+")


@dataclass(frozen=True)
class SplitAnswer:
    """What a model said, in two parts.

    Attributes:
        thought: what it thought first, without the tags; None if it did not.
        answer: what it answered; without a thought the whole text as it is.
        finished: False if the text ends inside the thought, so that there is no answer.

    Example:
        >>> rim.split_thought("Mix flour and water.").thought is None
        True
    """

    thought: str | None
    answer: str
    finished: bool = True


def split_thought(text: str) -> SplitAnswer:
    """Tell a thought from the answer, by the tags that models write (see `thoughts.TAGS`).

    A thought comes first. One whose opening tag is missing, because the chat template wrote it, ends at its closing
    tag; one that is never closed leaves no answer. Tags in the midst of an answer are part of it.

    Args:
        text: an answer, as `generate` gives it.

    Example:
        >>> rim.split_thought("<think>They may want harm.</think>I can't help with that.")
        SplitAnswer(thought='They may want harm.', answer="I can't help with that.", finished=True)
        >>> rim.split_thought("<think>Let me see").finished
        False
    """
    thoughts: list[str] = []
    begin = 0
    for start, end, after in _thoughts(text):
        thoughts.append(text[start:end])
        begin = after
    if not thoughts:
        return SplitAnswer(None, text)
    thought = "\n".join(part.strip() for part in thoughts)
    return SplitAnswer(thought, text[begin:].lstrip(), finished=begin <= len(text))


def _thoughts(text: str) -> Iterator[tuple[int, int, int]]:
    """Start and end of each leading thought, and where the text goes on: beyond its end if it never does."""
    at = 0
    if not _LEADING.sub("", text).startswith(tuple(start for start, _ in TAGS)):
        # The template's own opening tag is not in the answer.
        closed = [(text.find(close), close) for start, close in TAGS if start not in text.partition(close)[0]]
        end, close = min((one for one in closed if one[0] >= 0), default=(-1, ""))
        if end >= 0:
            at = end + len(close)
            yield 0, end, at
    while True:
        rest = _LEADING.sub("", text[at:])
        pair = next((pair for pair in TAGS if rest.startswith(pair[0])), None)
        if pair is None:
            return
        start = len(text) - len(rest) + len(pair[0])
        end = text.find(pair[1], start)
        if end < 0:
            yield start, len(text), len(text) + 1
            return
        at = end + len(pair[1])
        yield start, end, at


def open_thought(tokenizer: Any, text: str) -> str:
    """What of a prompt belongs to the thought that it leaves open, its tag first; empty if there is none.

    Only the assistant's own turn counts, and not what the user wrote.
    """
    turn = template_of(tokenizer).turn
    for start, _ in TAGS:
        turn = turn.partition(start)[0]
    own = text.rpartition(turn)[2] if turn.strip() and turn in text else _last_tag(text)
    for start, close in TAGS:
        before, tag, after = own.rpartition(start)
        if tag and close not in after:
            return own[len(before) :]
    return ""


def _last_tag(text: str) -> str:
    """The opening tag that a text ends with, and the blanks after it."""
    bare = text.rstrip()
    tag = next((start for start, _ in TAGS if bare.endswith(start)), "")
    return text[len(bare) - len(tag) :] if tag else ""


def decode(tokenizer: Any, ids: Sequence[Sequence[int]]) -> list[str]:
    """Answers as texts, without the special tokens but for those that tell a thought from an answer."""
    added = getattr(tokenizer, "added_tokens_decoder", None) or {}
    special = {number for number, token in added.items() if token.special}
    tags = [tag for pair in TAGS for tag in pair]
    kept = {number for number in special if any(added[number].content in tag for tag in tags)}
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    for number, row in enumerate(ids):
        if kept.intersection(row):
            shown = [token for token in row if token not in special or token in kept]
            texts[number] = tokenizer.decode(shown, skip_special_tokens=False)
    return texts


def asked_and_answered(tokenizer: Any, texts: Sequence[str], said: Sequence[str]) -> list[tuple[str, str]]:
    """Each prompt with the thought that followed it, and the answer alone; both unchanged where nothing was thought."""
    pairs = []
    for text, whole in zip(texts, said, strict=True):
        parts = split_thought(whole)
        if parts.thought is None:
            pairs.append((text, whole))
            continue
        thought = whole[: len(whole) - len(parts.answer)]
        begun = open_thought(tokenizer, text)
        pairs.append((text + thought.removeprefix(begun), parts.answer))
    return pairs
