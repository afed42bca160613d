"""The notebooks' sources: which there are, what a user means by a name, and the parameters each one takes."""

import ast
import contextlib
import json
import math
import re
import tokenize
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from rim_core import checking, paths
from rim_core.errors import InputError
from rim_core.paths import did_you_mean
from rim_core.prompts import FILE_SUFFIXES

# Lists within lists beyond this are refused: neither papermill nor JSON's readers go on without end.
_DEEPEST = 20
_PLAIN: dict[str, Any] = {"int": int, "float": float, "str": str, "bool": bool, "Any": Any, "object": Any, "None": None}
_CONTAINERS: dict[str, Any] = {
    **{"list": list, "List": list, "Sequence": list, "Iterable": list},
    **{"tuple": tuple, "Tuple": tuple, "dict": dict, "Dict": dict, "Mapping": dict},
}
_NUMBER = r"([-+]?\d+(?:\.\d+)?)"
_BOUNDS = re.compile(
    rf"(?:{_NUMBER} to {_NUMBER}|between {_NUMBER} and {_NUMBER}|at least {_NUMBER}|at most {_NUMBER}"
    rf"|above {_NUMBER}|below {_NUMBER}|one of (\w[\w.-]*(?:, \w[\w.-]*)+))"
)
_LIKE_BOUNDS = re.compile(r"[-+]?\d|(?:between|at least|at most|above|below|one of)\b")


@dataclass(frozen=True)
class Bounds:
    """What a parameter's value (of a list each of its values) may be, as its comment says it.

    `low` and `high` are allowed themselves unless `open`; `options` are the only words allowed.
    """

    text: str
    low: float = -math.inf
    high: float = math.inf
    open: bool = False
    options: tuple[str, ...] = ()

    def allow(self, value: Any) -> bool:
        """Whether a value, and each value in a list or mapping, is allowed."""
        if isinstance(value, (list, tuple, dict)):
            return all(map(self.allow, value.values() if isinstance(value, dict) else value))
        if self.options:
            return value in self.options
        if value is None:
            return True
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return False
        return self.low < value < self.high if self.open else self.low <= value <= self.high


@dataclass(frozen=True)
class Parameter:
    """One parameter of a notebook: a comment that says what it is, then `n_prompts: int = 80  # 4 to 240`.

    The comment on the parameter's own line bounds its value, where it is one of: `4 to 240`, `between 0 and 1`
    (neither itself), `at least 1`, `at most -1`, `above 0`, `below 1`, `one of nf4, int8, none`. Any other comment
    there is help. `seeds` are distinct whole numbers, at least one, whatever their comment says.
    """

    name: str
    type: str
    default: Any
    help: str
    adapter: "TypeAdapter[Any]"
    bounds: Bounds | None = None


def names(project: Path) -> list[str]:
    """Name every notebook as `section/name`, in reading order."""
    found = (project / "notebooks").glob("*/*.ipynb")
    return sorted(f"{path.parent.name}/{path.stem}" for path in found if not path.name.startswith("."))


def resolve(project: Path, wanted: Sequence[str]) -> list[str]:
    """Give the notebooks meant by section, `section/name` or path, in order; all where none is named.

    Raises `InputError` with the closest name for one that is unknown.
    """
    known = names(project)
    if not known:
        raise InputError(f"no notebooks in {project.name}/notebooks; is this the companion's folder?")
    sections = sorted({name.split("/")[0] for name in known})
    chosen: set[str] = set()
    for word in wanted:
        name = _name_of_path(project, word) or word.strip("/")
        if name in known:
            chosen.add(name)
        elif name in sections:
            chosen |= {other for other in known if other.startswith(f"{name}/")}
        else:
            hint = did_you_mean(name, [*known, *sections])
            raise InputError(f"unknown notebook {word!r}{hint}; rim run --list shows them all")
    return [name for name in known if not wanted or name in chosen]


def _name_of_path(project: Path, word: str) -> str | None:
    """Give the name of a notebook, or of a section, that is given by its path."""
    path = Path(word)
    folder = (project / "notebooks").resolve()
    for candidate in (path.expanduser().resolve(), project.resolve() / path):
        if candidate.is_relative_to(folder) and candidate != folder:
            return candidate.relative_to(folder).with_suffix("").as_posix()
    return None


def path_of(project: Path, name: str) -> Path:
    """Give the path of a notebook's source."""
    return project / "notebooks" / f"{name}.ipynb"


def read_source(project: Path, name: str) -> dict[str, Any]:
    """Read a notebook's source as JSON data; raises `InputError` where it is no notebook."""
    try:
        data = json.loads(path_of(project, name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"notebook {name}: there is no notebooks/{name}.ipynb") from None
    except (ValueError, RecursionError) as error:
        what = "nested too deeply" if isinstance(error, RecursionError) else error
        raise InputError(f"notebook {name}: not valid JSON: {what}") from None
    if not isinstance(data, dict) or not isinstance(data.get("cells"), list):
        raise InputError(f"notebook {name}: holds no cells; it must be in notebook format 4")
    return data


def source_of(cell: Mapping[str, Any]) -> str:
    """Give a cell's source as one text; the format allows a list of lines too."""
    source = cell.get("source", "")
    return source if isinstance(source, str) else "".join(source)


def title(notebook: Mapping[str, Any]) -> str:
    """Give a notebook's first heading, or nothing where it has none."""
    for cell in notebook["cells"]:
        if cell.get("cell_type") == "markdown":
            for line in source_of(cell).splitlines():
                if line.startswith("# "):
                    return line[2:].strip()
    return ""


def parameters(name: str, notebook: Mapping[str, Any]) -> dict[str, Parameter]:
    """Read the `parameters` cell: assignments of literals, typed by annotation or by their default.

    Read with `ast`, since papermill's own line patterns miss annotations such as `int | None`.

    Raises:
        InputError: code that cannot be read, an annotation that says no type of JSON's values, a default that is no
            literal or is not of its own type and bounds, or a comment that begins like a bound and is none.
    """
    tagged = [cell for cell in notebook["cells"] if "parameters" in cell.get("metadata", {}).get("tags", [])]
    if not tagged:
        return {}
    source = source_of(tagged[0])
    try:
        tree = ast.parse(source)
        own_line, above = _comments(source)
    except (SyntaxError, tokenize.TokenError, ValueError, RecursionError, MemoryError) as error:
        line = f", line {error.lineno}" if isinstance(error, SyntaxError) else ""
        what = getattr(error, "msg", None) or str(error) or "nested too deeply"
        raise InputError(f"notebook {name}: parameters cell{line}: {what}") from None
    found = {}
    for node in tree.body:
        annotation: ast.expr | None = None
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
            target, annotation, assigned = node.target.id, node.annotation, node.value
        elif isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            target, assigned = node.targets[0].id, node.value
        else:
            continue
        at = f"notebook {name}: parameter {target}"
        try:
            default = ast.literal_eval(assigned)
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            raise InputError(f"{at}: its default is not a literal") from None
        end = node.end_lineno or node.lineno
        comment = own_line.get(end, "")
        bounds = _bounds(comment, at)
        said = above.get(node.lineno, "")
        told = "; ".join(filter(None, (said, bounds.text))) if bounds else comment or said
        kind, adapter = _type_of(annotation, default, at)
        found[target] = Parameter(target, kind, default, told, adapter, bounds)
        _convert(found[target], default, f"{at}: its default")
    return found


def _comments(source: str) -> tuple[dict[int, str], dict[int, str]]:
    """The comments after code, by their line; and those on lines of their own, by the line of code below them."""
    own_line, above, waiting = {}, {}, ""
    for token in tokenize.generate_tokens(StringIO(source).readline):
        text = token.string.lstrip("# ").rstrip()
        if token.type == tokenize.COMMENT and token.line[: token.start[1]].strip():
            own_line[token.start[0]] = text
        elif token.type == tokenize.COMMENT:
            waiting = f"{waiting} {text}".strip()
        elif token.type not in (tokenize.NL, tokenize.NEWLINE) and waiting:
            above[token.start[0]], waiting = waiting, ""
    return own_line, above


def _bounds(comment: str, at: str) -> Bounds | None:
    """The bounds that a comment gives, or None where it is help."""
    match = _BOUNDS.fullmatch(comment)
    if match is None:
        if _LIKE_BOUNDS.match(comment):
            raise InputError(
                f"{at}: {comment!r} is no bound that can be checked; write it as '1 to 9', 'between 0 and 1', "
                "'at least 1', 'at most 9', 'above 0', 'below 9' or 'one of a, b'"
            )
        return None
    low, high, over, under, least, most, above, below, options = match.groups()
    if options:
        return Bounds(comment, options=tuple(options.split(", ")))
    ends = [low or over or least or above, high or under or most or below]
    lower, upper = (float(end) if end else sign * math.inf for end, sign in zip(ends, (-1, 1), strict=True))
    return Bounds(comment, lower, upper, open=bool(over or above or below))


# --- types ----------------------------------------------------------------------------------------------


def _type_of(annotation: ast.expr | None, default: Any, at: str) -> tuple[str, "TypeAdapter[Any]"]:
    """A parameter's type as its notebook writes it, and what reads it; without an annotation its default's."""
    if annotation is None:
        kind = Any if default is None else type(default)
        return ("Any" if default is None else kind.__name__), TypeAdapter(kind)
    text = ast.unparse(annotation)
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        text = annotation.value.strip()
    try:
        return text, TypeAdapter(_resolved(annotation))
    except (_UnknownTypeError, SyntaxError, TypeError, ValueError) as error:
        what = f"; {error} is none" if isinstance(error, _UnknownTypeError) else ""
        raise InputError(
            f"{at}: its type {checking.shown(text)} cannot be checked{what}; use int, float, str, bool, list, tuple, "
            "dict, Literal, Optional, Union or |"
        ) from None


class _UnknownTypeError(Exception):
    """An annotation that is none of those that a parameter may have."""


def _resolved(node: ast.expr) -> Any:
    """The type that an annotation means, also one in quotes; nothing is evaluated."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return _resolved(ast.parse(node.value.strip(), mode="eval").body)
    if isinstance(node, ast.Constant) and node.value is None:
        return None
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return typing.Union[_resolved(node.left), _resolved(node.right)]  # noqa: UP007
    if isinstance(node, ast.Subscript):
        return _resolved_generic(node)
    word = _word(node)
    if word not in _PLAIN and word not in _CONTAINERS:
        raise _UnknownTypeError(ast.unparse(node))
    return _PLAIN[word] if word in _PLAIN else _CONTAINERS[word]


def _resolved_generic(node: ast.Subscript) -> Any:
    word = _word(node.value)
    inner = list(node.slice.elts) if isinstance(node.slice, ast.Tuple) else [node.slice]
    if word == "Literal":
        return typing.Literal[tuple(ast.literal_eval(option) for option in inner)]
    many = word in ("tuple", "Tuple") and len(inner) == 2 and ast.unparse(inner[1]) == "..."
    parts = [_resolved(part) for part in (inner[:1] if many else inner)]
    if word in ("Optional", "Union"):
        return typing.Union[tuple([*parts, None] if word == "Optional" else parts)]  # noqa: UP007
    if word not in _CONTAINERS:
        raise _UnknownTypeError(ast.unparse(node))
    return _CONTAINERS[word][(parts[0], ...) if many else tuple(parts)]


def _word(node: ast.expr) -> str:
    """A type's bare name: `List` of `List`, `typing.List` and `t.List`."""
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


# --- values ---------------------------------------------------------------------------------------------


def check_overrides(
    name: str, known: Mapping[str, Parameter], given: Mapping[str, Any], project: Path | None = None
) -> dict[str, Any]:
    """Convert what a user set to each parameter's type; texts are read as typed on a command line.

    A value equal to the notebook's own is no override and is left out. A file that is named from where the user
    stands is given as the notebook, which runs in the project's folder, finds it.

    Raises:
        InputError: naming the notebook, the parameter and the known ones, or the type, the bounds or the file that is
            needed.
    """
    settable = [other for other in known if other != "suite"]
    checked = {}
    for key, value in given.items():
        if key == "suite":
            raise InputError(f"notebook {name}: parameter suite: set it with --suite")
        if key not in known:
            hint = did_you_mean(key, settable)
            listed = ", ".join(settable) or "none"
            raise InputError(f"notebook {name}: unknown parameter {checking.shown(key)}{hint}; parameters: {listed}")
        at = f"notebook {name}: parameter {key}"
        converted = _convert(known[key], value, at)
        converted = with_texts(
            key,
            converted,
            lambda place, text: (
                _found(text, project, f"notebook {name}: parameter {place}") if _names_file(place, text) else text
            ),
        )
        if converted != known[key].default or type(converted) is not type(known[key].default):
            checked[key] = converted
    return checked


def files_of(parameters: Mapping[str, Any], project: Path | None = None) -> dict[str, Path]:
    """Give the files that parameters' values name and that are there, by place: what a run reads beside its models.

    A value, or one in a list, tuple or dict, names a file if it is a text that ends like a prompt file (.csv, .tsv,
    .jsonl), or if its parameter's name ends in `_file` and it is not empty. One that is not absolute is meant from
    the project's folder. The places are those of `with_texts`.
    """
    base = project or paths.root()
    found: dict[str, Path] = {}

    def look(place: str, text: str) -> str:
        if _names_file(place, text):
            with contextlib.suppress(OSError, ValueError):  # too long, a null byte
                if (base / text).is_file():
                    found[place] = base / text
        return text

    for name, value in parameters.items():
        with_texts(name, value, look)
    return found


def with_texts(place: str, value: Any, change: Callable[[str, str], Any]) -> Any:
    """Give a parameter's value with each text in it as `change(place, text)` makes it.

    A place is the parameter's name, and within its value as Python would write it: `sets[1]`, `m['a'][0]`.
    """
    if isinstance(value, str):
        return change(place, value)
    if isinstance(value, dict):
        return {key: with_texts(f"{place}[{key!r}]", item, change) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [with_texts(f"{place}[{i}]", item, change) for i, item in enumerate(value)]
        return items if isinstance(value, list) else tuple(items)
    return value


def _names_file(place: str, text: str) -> bool:
    if not text or text.startswith("hub:"):
        return False
    return place.partition("[")[0].endswith("_file") or Path(text).suffix.lower() in FILE_SUFFIXES


def _found(value: str, project: Path | None, at: str) -> str:
    """A file that the user named, relative to the project where it lies inside."""
    try:
        path = Path(value).expanduser().resolve()
        there = path.is_file()
    except (OSError, ValueError, RuntimeError):  # too long, a null byte, the home of nobody
        there = False
    if not there:
        raise InputError(f"{at}: there is no file {checking.shown(value)} here; check the path")
    base = (project or paths.root()).resolve()
    return path.relative_to(base).as_posix() if path.is_relative_to(base) else str(path)


def _convert(parameter: Parameter, value: Any, at: str) -> Any:
    """Convert a value to a parameter's type and check its bounds; a text is read as typed on a command line."""
    told = f"{at}: {checking.shown(value)}"
    why = f"is not of type {parameter.type}{_example(parameter)}"
    try:
        # What is a text alone is not read: two keys of one name in it lose nothing.
        readings = [value] if parameter.type == "str" else _readings(value)
    except _NotJsonError as error:
        raise InputError(f"{told} {error}") from None
    for reading in readings:
        try:
            # Strict, so that 3.0 is no int and 1 no bool; as JSON, so that a list may be a tuple.
            converted = parameter.adapter.validate_json(_as_json(reading), strict=True)
            break
        except _NotJsonError as error:
            why = str(error)
        except (ValidationError, RecursionError):
            continue
    else:
        raise InputError(f"{told} {why}")
    if parameter.name == "seeds":
        converted = type(converted)(checking.seeds(converted, at))
    if parameter.bounds and not parameter.bounds.allow(converted):
        raise InputError(f"{told} is not allowed; it must be {parameter.bounds.text}")
    return converted


class _NotJsonError(Exception):
    """A value that no JSON can hold; its text goes on from the value."""


def _readings(value: Any) -> list[Any]:
    """What a value may mean: of a text what JSON reads in it, before the text itself."""
    if not isinstance(value, str):
        return [value]
    words = {"true": True, "false": False, "none": None, "null": None}
    if (word := value.strip().lower()) in words:
        return [words[word], value]
    readers: tuple[Callable[[str], Any], ...] = (_from_json, int, float)
    for read in readers:
        try:
            parsed = read(value)
        except checking.TwiceError as error:
            raise _NotJsonError(f"names {error} twice; name each key once") from None
        except ValueError:
            continue
        except RecursionError:
            raise _NotJsonError("is nested too deeply") from None
        return [value] if isinstance(parsed, str) else [parsed, value]
    return [value]


def _from_json(text: str) -> Any:
    return json.loads(text, object_pairs_hook=checking.distinct_keys)


def _as_json(value: Any) -> str:
    """A value as JSON; raises `_NotJsonError` where none can hold it."""
    try:
        text = json.dumps(_plain(value), allow_nan=False, ensure_ascii=False)
        text.encode()
    except UnicodeEncodeError:
        raise _NotJsonError("holds half of a character (a lone surrogate)") from None
    except ValueError:
        raise _NotJsonError("holds NaN or infinity; give finite numbers") from None
    except TypeError:
        raise _NotJsonError("is no value that JSON can hold") from None
    return text


def _plain(value: Any, depth: int = 0) -> Any:
    """A value with NumPy's numbers and arrays as Python's."""
    if depth > _DEEPEST:
        raise _NotJsonError("is nested too deeply")
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, dict):
        return {key: _plain(item, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, depth + 1) for item in value]
    return value


def _example(parameter: Parameter) -> str:
    kind = parameter.type
    if re.search(r"\b(list|tuple|dict|sequence|mapping)\b", kind, re.IGNORECASE):
        return "; write it as JSON, such as '[1, 2]'"
    return "; write true or false" if kind == "bool" else ""
