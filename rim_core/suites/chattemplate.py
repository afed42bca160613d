"""A chat template of a suite's own: a Jinja file, read and tried before any model is loaded."""

from pathlib import Path
from typing import Any

from rim_core.errors import InputError, first_line

_MESSAGE = "Is this message shown?"
_LIMIT = 1_000_000  # bytes; the longest templates known are a tenth of that


def read_template(path: str | Path) -> str:
    """The text of a chat template, after a conversation of one message was put into it as transformers does.

    Raises:
        InputError: no such file, no text, no Jinja, or a template that fails or leaves the message out.
    """
    path = Path(path)
    try:
        if path.stat().st_size > _LIMIT:
            raise InputError(f"chat template {path} is too large to be one: name the .jinja file")
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise InputError(f"chat template {path} is no UTF-8 text: name the .jinja file") from None
    except OSError as error:
        raise InputError(f"chat template {path} cannot be read: {error.strerror}; correct the path") from None
    from jinja2 import TemplateSyntaxError
    from transformers.utils.chat_template_utils import render_jinja_template

    # A model's own tokens take these places later.
    tokens: dict[str, Any] = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), "")
    turns = [{"role": "user", "content": _MESSAGE}]
    try:
        shown: Any = render_jinja_template([turns], chat_template=text, add_generation_prompt=True, **tokens)
    except TemplateSyntaxError as error:
        raise InputError(
            f"chat template {path} is not readable Jinja: {error.message} in line {error.lineno}"
        ) from None
    except Exception as error:  # a template may fail in whatever way
        raise InputError(f"chat template {path} fails on a message: {first_line(error)}") from None
    if _MESSAGE not in shown[0][0]:
        raise InputError(f"chat template {path} leaves the user's message out: it must show each message's 'content'")
    return text
