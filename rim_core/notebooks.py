"""The notebooks' sources: which there are, what a user means by a name, and the parameters each one takes."""

import ast
import json
import math
import tokenize
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from rim_core.errors import InputError
from rim_core.workspace import did_you_mean


@dataclass(frozen=True)
class Parameter:
    """One parameter of a notebook: `seed: int = 0  # what it does`."""

    name: str
    type: str
    default: Any
    help: str


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
    except ValueError as error:
        raise InputError(f"notebook {name}: not valid JSON: {error}") from None
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
    """
    tagged = [cell for cell in notebook["cells"] if "parameters" in cell.get("metadata", {}).get("tags", [])]
    if not tagged:
        return {}
    source = source_of(tagged[0])
    try:
        tree = ast.parse(source)
    except SyntaxError as error:
        raise InputError(f"notebook {name}: parameters cell, line {error.lineno}: {error.msg}") from None
    comments = _comments(source)
    found = {}
    for node in tree.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
            target, kind, assigned = node.target.id, ast.unparse(node.annotation), node.value
        elif (
            isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name)
        ):
            target, kind, assigned = node.targets[0].id, "", node.value
        else:
            continue
        try:
            default = ast.literal_eval(assigned)
        except ValueError:
            raise InputError(f"notebook {name}: parameter {target}: its default is not a literal") from None
        kind = kind or ("Any" if default is None else type(default).__name__)
        found[target] = Parameter(target, kind, default, comments.get(node.end_lineno or node.lineno, ""))
    return found


def _comments(source: str) -> dict[int, str]:
    tokens = tokenize.generate_tokens(StringIO(source).readline)
    return {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}


def check_overrides(name: str, known: Mapping[str, Parameter], given: Mapping[str, Any]) -> dict[str, Any]:
    """Convert what a user set to each parameter's type; texts are read as typed on a command line.

    A value equal to the notebook's own is no override and is left out. Raises `InputError` naming the
    notebook, the parameter and the known ones, or the type that is needed.
    """
    settable = [other for other in known if other != "suite"]
    checked = {}
    for key, value in given.items():
        if key == "suite":
            raise InputError(f"notebook {name}: parameter suite: set it with --suite")
        if key not in known:
            hint = did_you_mean(key, settable)
            listed = ", ".join(settable) or "none"
            raise InputError(f"notebook {name}: unknown parameter {key!r}{hint}; parameters: {listed}")
        parameter = known[key]
        annotation = ast.parse(parameter.type, mode="eval").body
        try:
            converted = _convert(value, annotation)
        except ValueError:
            raise InputError(
                f"notebook {name}: parameter {key}: {value!r} is not of type {parameter.type}"
                + _example(annotation)
            ) from None
        if converted != parameter.default or type(converted) is not type(parameter.default):
            checked[key] = converted
    return checked


def _example(annotation: ast.expr) -> str:
    if isinstance(annotation, ast.Subscript) or getattr(annotation, "id", "") in ("list", "tuple", "dict"):
        return "; write it as JSON, such as '[1, 2]'"
    return "; write true or false" if getattr(annotation, "id", "") == "bool" else ""


def _convert(value: Any, kind: ast.expr) -> Any:
    """Convert a value to an annotation's type, or raise `ValueError`."""
    if isinstance(kind, ast.BinOp):  # X | Y
        return _first_fit(value, [kind.left, kind.right])
    if isinstance(kind, ast.Constant) and kind.value is None:
        if value is None or (isinstance(value, str) and value.lower() in ("none", "null")):
            return None
        raise ValueError
    if isinstance(kind, ast.Subscript):
        return _convert_generic(value, kind)
    word = kind.attr if isinstance(kind, ast.Attribute) else getattr(kind, "id", "")
    if word in ("list", "tuple", "dict"):
        return _container(value, word)
    if word in ("str", "bool", "int", "float"):
        return _scalar(value, word)
    return value


def _first_fit(value: Any, kinds: Sequence[ast.expr]) -> Any:
    # `str` takes any text, so it comes last: `int | str` must give 3 for "3".
    for kind in sorted(kinds, key=lambda kind: getattr(kind, "id", "") == "str"):
        try:
            return _convert(value, kind)
        except ValueError:
            continue
    raise ValueError


def _convert_generic(value: Any, kind: ast.Subscript) -> Any:
    base = kind.value.attr if isinstance(kind.value, ast.Attribute) else getattr(kind.value, "id", "")
    inner = list(kind.slice.elts) if isinstance(kind.slice, ast.Tuple) else [kind.slice]
    if base == "Optional":
        return _first_fit(value, [*inner, ast.Constant(None)])
    if base == "Literal":
        allowed = [ast.literal_eval(option) for option in inner]
        match = [option for option in allowed if option == value or str(option) == value]
        if not match:
            raise ValueError
        return match[0]
    container = _container(value, base)
    if base == "dict":
        return {key: _convert(item, inner[1]) for key, item in container.items()}
    if base == "tuple" and not (len(inner) == 2 and isinstance(inner[1], ast.Constant)):
        if len(inner) != len(container):
            raise ValueError
        return tuple(_convert(item, one) for item, one in zip(container, inner, strict=True))
    items = [_convert(item, inner[0]) for item in container]
    return tuple(items) if base == "tuple" else items


def _container(value: Any, word: str) -> Any:
    if isinstance(value, str):
        value = json.loads(value)  # its error is a ValueError
    if word == "dict" and isinstance(value, dict):
        return value
    if word in ("list", "tuple") and isinstance(value, (list, tuple)):
        return tuple(value) if word == "tuple" else list(value)
    raise ValueError


def _scalar(value: Any, word: str) -> Any:
    if word == "str":
        if isinstance(value, str):
            return value
        raise ValueError
    if word == "bool":
        if isinstance(value, bool):
            return value
        if isinstance(value, str) and value.lower() in ("true", "false"):
            return value.lower() == "true"
        raise ValueError
    if isinstance(value, bool):
        raise ValueError
    if word == "int":
        if isinstance(value, (int, str)):
            return int(value)
        raise ValueError
    if not isinstance(value, (int, float, str)) or not math.isfinite(float(value)):
        raise ValueError
    return float(value)


def files_of(parameters: Mapping[str, Any]) -> dict[str, Path]:
    """The parameters that name files, by name."""
    return {
        name: Path(value)
        for name, value in parameters.items()
        if isinstance(value, str) and name.endswith("_file") and Path(value).is_file()
    }
