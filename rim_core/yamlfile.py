"""YAML files that people write, read into typed entries: a mistake is one line that names file, line and key.

An entry is a pydantic model, so that what a file may hold is written once, as the types of its fields.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self, TypeVar

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    Strict,
    ValidationError,
    ValidationInfo,
    model_validator,
)
from pydantic_core import PydanticCustomError

from rim_core.checking import shown
from rim_core.errors import InputError
from rim_core.paths import did_you_mean

E = TypeVar("E", bound="Entry")
Key = str | int
# Ten times as fast, where PyYAML was built with it.
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("text is needed")
    return text.strip()


Text = Annotated[str, AfterValidator(_not_blank)]
Number = Annotated[float, Strict(), Field(allow_inf_nan=False)]
Whole = Annotated[int, Strict()]
Truth = Annotated[bool, Strict()]


def mistake(problem: str, *keys: Key) -> PydanticCustomError:
    """What a validator of a whole entry raises: a problem, and the keys from there to where it is."""
    return PydanticCustomError("mistake", "{problem}", {"problem": problem, "keys": keys})


class Entry(BaseModel):
    """A mapping of a file whose keys are known; `_given` are fields that its reader adds and no file holds."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    _given: ClassVar[frozenset[str]] = frozenset()

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown(cls, data: Any, info: ValidationInfo) -> Any:
        known = sorted(set(cls.model_fields) - (cls._given if info.context else set()))
        for key in data if isinstance(data, dict) else ():
            if key not in known:
                hint = did_you_mean(str(key), known)
                raise mistake(f"not a key here{hint}; keys: {', '.join(known)}", key)
        return data

    def with_fields(self, **fields: Any) -> Self:
        """The same entry with other values of fields, which are not checked."""
        return self.model_copy(update=fields)


def read(kind: type[E], path: Path) -> E:
    """Read a file into an entry; validators find its path in `info.context["path"]`.

    Args:
        kind: what the file holds.
        path: of the file; relative paths in it start from its folder.

    Raises:
        InputError: names the file, the line and the key.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise InputError(f"{path} is not readable YAML: it is no UTF-8 text") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    return parse(kind, text, path)


def parse(kind: type[E], text: str, path: Path) -> E:
    """Read the text of a file into an entry (see `read`)."""
    try:
        data = _loaded(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise InputError(f"{path}{line}: not readable YAML: {problem}") from None
    try:
        return kind.model_validate({} if data is None else data, context={"path": path})
    except ValidationError as error:
        where, problem = _told(error, data)
        tree = yaml.compose(text, _LOADER)
        line = f":{_line(tree, where)}" if tree else ""
        key = _shown(where, data)
        raise InputError(f"{path}{line}: {f'{key}: ' if key else ''}{problem}") from None


def _loaded(text: str) -> Any:
    try:
        return yaml.load(text, _LOADER)
    except yaml.YAMLError:
        return yaml.safe_load(text)  # which says better where the mistake is


def _told(error: ValidationError, data: Any) -> tuple[list[Key], str]:
    """Where the first mistake is, as keys from the top of the file, and what it is."""
    found = error.errors(include_url=False)[0]
    context, given = found.get("ctx", {}), found["input"]
    where: list[Key] = []
    here = data
    for part in found["loc"]:
        # A part that names which kind of entry this is, or that a mapping's key is meant, is in no file.
        tag = isinstance(here, dict) and here.get("kind") == part and not (where and where[-1] == "kind")
        if tag or part == "[key]":
            here = {**here, "kind": None} if tag else here
            continue
        where.append(part)
        here = _within(here, part)
    match found["type"]:
        case "mistake":
            return [*where, *context["keys"]], context["problem"]
        case "missing":
            return where, "missing"
        case "string_type":
            return where, "text is needed"
        case "float_type" | "int_type" | "finite_number":
            return where, f"{shown(given)} is not a {'whole ' if 'int' in found['type'] else ''}number"
        case "bool_type":
            return where, "true or false is needed"
        case "model_type" | "model_attributes_type" | "dict_type" | "mapping_type":
            return where, "a mapping of keys to values is needed"
        case "list_type" | "tuple_type":
            return where, "a list is needed"
        case "union_tag_invalid" | "union_tag_not_found":
            kinds = context.get("expected_tags", "").replace("'", "")
            kind = given.get("kind") if isinstance(given, dict) else given
            return [*where, "kind"], f"{shown(kind)} is not a rule; kinds: {kinds}"
        case "value_error":
            return where, str(context["error"])
    message = re.sub(r"^Input should", "should", found["msg"])
    return where, f"{message[0].lower()}{message[1:]}, not {shown(given)}"


def _shown(where: Sequence[Key], data: Any) -> str:
    """Keys as a message names them, an entry of a list by its own name where it has one: `claims[C1].rule.low`."""
    text = ""
    for part in where:
        data = _within(data, part)
        if isinstance(part, int):
            named = data if isinstance(data, dict) else {}
            text += f"[{named.get('id') or named.get('name') or part}]"
        else:
            text += f".{part}" if text else str(part)
    return text


def _within(data: Any, part: Key) -> Any:
    try:
        return data[part]
    except (KeyError, IndexError, TypeError):
        return None


def _line(tree: yaml.Node, where: Sequence[Key]) -> int:
    """The line of the deepest of these keys that the file has."""
    line = tree.start_mark.line
    for part in where:
        if isinstance(tree, yaml.MappingNode):
            pair = next(((key, value) for key, value in tree.value if key.value == str(part)), None)
            if pair is None:
                break
            line, tree = pair[0].start_mark.line, pair[1]
        elif isinstance(tree, yaml.SequenceNode) and isinstance(part, int) and part < len(tree.value):
            tree = tree.value[part]
            line = tree.start_mark.line
        else:
            break
    return int(line) + 1
