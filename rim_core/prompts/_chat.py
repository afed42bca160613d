"""Prompts as texts in a model's chat template."""

import re
from collections.abc import Callable, Sequence
from typing import Any

from rim_core.checking import shown
from rim_core.errors import InputError
from rim_core.prompts._prompt import Prompt
from rim_core.texts import ChatText, checked_one, listed, render, require_plain_words, tokenizer_of


def words_of(prompts: Sequence[Prompt | str]) -> list[str]:
    """The users' words; raises InputError for one prompt instead of several, or what is none."""
    if isinstance(prompts, Prompt):
        raise InputError("prompts must be a list of prompts, not one: put it in a list")
    words = [prompt.text if isinstance(prompt, Prompt) else prompt for prompt in listed(prompts, "prompt")]
    return [checked_one(text, f"prompt {number}", empty=True) for number, text in enumerate(words)]


def format_chat(
    model: Any,
    prompts: Sequence[Prompt | str],
    *,
    system: str | None = None,
    thinking: bool | None = None,
    prefill: str | None = None,
    plain: bool = False,
) -> list[str]:
    """Prompts as texts in the model's own chat template, ending where the answer begins.

    Every tool tokenises such a text as `apply_chat_template(messages, tokenize=True)` does. Control tokens in a
    prompt, such as `<|im_end|>`, are then control tokens, as in transformers: a prompt that holds them can end the
    user's turn. With `plain=True` they are ordinary letters. Pass such texts on as they are: which of their words are
    plain is lost where a text is stored as a plain string, or cut.

    Args:
        model: a `Model` or a tokenizer.
        prompts: `Prompt` objects or plain strings, one user turn each.
        system: a system message; None leaves the template's default.
        thinking: passed to templates that know `enable_thinking` or `thinking` (Qwen3, DeepSeek-V3.1 and others); None
            leaves their default.
        prefill: words put into the assistant's mouth, after the generation prompt; control tokens in it are such.
        plain: read control tokens in the prompts and in `system` as plain text.

    Raises:
        InputError: one string instead of a list, the tokenizer has no chat template, or the template refuses the
            messages or ignores `system` or `thinking`.

    Example:
        >>> print(rim.format_chat(model, ["Why is the sky blue?"])[0])
        <|im_start|>user
        Why is the sky blue?<|im_end|>
        <|im_start|>assistant
        <BLANKLINE>
    """
    tokenizer = tokenizer_of(model)
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(
            f"{getattr(model, 'name', 'this model')} has no chat template: use a chat model, "
            "or set tokenizer.chat_template"
        )
    for name, text in (("system", system), ("prefill", prefill)):
        if text is not None:
            checked_one(text, name, empty=True)
    # Not `in`: 1 and 0 equal True and False.
    if thinking is not None and not isinstance(thinking, bool):
        raise InputError(f"thinking must be True, False or None, not {shown(thinking)}")
    if not isinstance(plain, bool):
        raise InputError(f"plain must be True or False, not {shown(plain)}")
    extra = {} if thinking is None else {"enable_thinking": thinking, "thinking": thinking}
    _require_heard(tokenizer, system, thinking, extra)
    texts = []
    for words in words_of(prompts):
        text = render(tokenizer, words, system, **extra)
        if words.strip() not in text:
            raise InputError(
                f"the chat template leaves out or rewrites the user's words ({shown(words)}): use another template "
                "(tokenizer.chat_template, or chat_template in the suite)"
            )
        spans = _spans(tokenizer, text, words, system, extra) if plain else ()
        texts.append(ChatText(text + (prefill or ""), spans))
    return list(texts)


def _require_heard(tokenizer: Any, system: str | None, thinking: bool | None, extra: dict[str, bool]) -> None:
    """Raise InputError where the chat template does the same whatever `system` or `thinking` say."""
    if system and render(tokenizer, "a", system, **extra) == render(tokenizer, "a", f"x{system}", **extra):
        raise InputError("the chat template ignores system=...: leave it out, or write it into the prompts")
    # Not compared with the default, which may be the same as what was asked for.
    other = {name: not value for name, value in extra.items()}
    if extra and render(tokenizer, "a", system, **extra) == render(tokenizer, "a", system, **other):
        raise InputError(f"the chat template ignores thinking={thinking}: leave it out")


def _spans(tokenizer: Any, text: str, words: str, system: str | None, extra: dict[str, bool]) -> list[tuple[int, int]]:
    """Where the user's and the system's words lie in a text: at the places of two private characters in the same chat.

    Raises:
        InputError: the template does more to them than leave out blanks around them.
    """
    require_plain_words(tokenizer)
    user, above = "\U0010fffc", None if system is None else "\U0010fffd"
    marks = {user: words} if above is None or system is None else {user: words, above: system}
    pattern = render(tokenizer, user, above, **extra)
    parts = re.split(f"([{''.join(marks)}])", pattern)
    strips: tuple[Callable[[str], str], ...] = (str, str.strip, str.lstrip, str.rstrip)
    for strip in strips if sorted(parts[1::2]) == sorted(marks) else ():
        spans, written = [], ""
        for part in parts:
            start, written = len(written), written + (strip(marks[part]) if part in marks else part)
            if part in marks:
                spans.append((start, len(written)))
        if written == text:
            return spans
    raise InputError("the chat template rewrites what is put into it, so plain=True cannot be kept: leave plain out")
