"""Suites' files written: whole or not at all, with the comments of whoever wrote them before."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from rim_core.errors import InputError


def write_text(path: Path, text: str) -> None:
    """Put a file in place whole: a temporary sibling, renamed.

    Raises:
        InputError: the folder cannot be written to.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from None
    finally:
        temporary.unlink(missing_ok=True)


def dump(data: Mapping[str, Any]) -> str:
    """A suite's data as YAML, keys in the order given."""
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=110)


def add_role(path: Path, name: str, entry: Mapping[str, Any]) -> None:
    """Put a role into a suite's file, in place of one of that name; comments and order elsewhere are kept."""
    text = path.read_text(encoding="utf-8")
    wanted = yaml.safe_load(text)
    wanted["roles"][name] = dict(entry)
    edited = _with_role(text, name, entry)
    if yaml.safe_load(edited) != wanted:  # anchors, or another form that a local edit cannot serve
        edited = dump(wanted)
    write_text(path, edited)


def _with_role(text: str, name: str, entry: Mapping[str, Any]) -> str:
    document: Any = yaml.compose(text)
    roles = next(value for key, value in document.value if key.value == "roles")
    if roles.flow_style:
        return text
    indent = " " * roles.start_mark.column
    lines = dump({name: dict(entry)}).splitlines()
    written = "\n".join(f"{indent}{line}" for line in lines)
    old = next((pair for pair in roles.value if pair[0].value == name), None)
    start = text.rfind("\n", 0, old[0].start_mark.index) + 1 if old else None
    end = text.find("\n", _end(old[1] if old else roles))
    end = len(text) if end < 0 else end
    if start is None:
        return f"{text[:end]}\n{written}{text[end:] or chr(10)}"
    return text[:start] + written + text[end:]


def _end(node: Any) -> int:
    """Where a node's last value ends; the mark of a block is behind the blank lines and comments after it."""
    if isinstance(node, yaml.CollectionNode) and not node.flow_style and node.value:
        last = node.value[-1]
        return _end(last[1] if isinstance(last, tuple) else last)
    return int(node.end_mark.index)
