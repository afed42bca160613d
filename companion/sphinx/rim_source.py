"""What the API page shows of the package, read from its source: signatures as written, docstrings by section.

Nothing is imported, so that types are those that a person wrote, and the book needs no torch.
"""

import ast
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

PACKAGE = "rim_core"
# A docstring's headings, and what the page calls them.
HEADINGS = {"Args": "Arguments", "Attributes": "Attributes", "Returns": "Returns", "Raises": "Raises"}
_NAME = r"\w+(?: \([^()]*\))?"
_HEAD = re.compile(rf"(?:^|(?<=\. ))({_NAME}(?:, {_NAME})*):(?: |$)")

Definition = ast.FunctionDef | ast.ClassDef


class SourceError(Exception):
    """A name that the package lacks, or a docstring that describes what is not there; the message says which."""


@dataclass(frozen=True)
class Parameter:
    """One parameter as written; `name` carries its stars, a lone `*` parts off what is given by name only."""

    name: str
    annotation: str = ""
    default: str | None = None


@dataclass(frozen=True)
class Item:
    """What a docstring says of one or several names: `low, high (nats): text`."""

    names: tuple[str, ...]
    head: str
    text: str


@dataclass(frozen=True)
class Section:
    """A part of a docstring: prose where `heading` is empty; `items` for names with their descriptions."""

    heading: str
    text: str = ""
    items: tuple[Item, ...] = ()


@dataclass(frozen=True)
class Entry:
    """One thing that the page describes.

    Attributes:
        module, name: where it is, without the package's name; a member's name holds its class.
        kind: "module", "function", "context manager", "class", "method" or "property".
        parameters, returns: as written, aliases of types replaced by what they stand for.
        fields: types of a class's attributes by name, "" where none is written.
        gives: classes of the package in what it returns or holds, as `module.name`.
    """

    module: str
    name: str
    kind: str
    sections: tuple[Section, ...]
    parameters: tuple[Parameter, ...] = ()
    returns: str = ""
    fields: Mapping[str, str] = field(default_factory=dict)
    members: tuple["Entry", ...] = ()
    gives: tuple[str, ...] = ()

    @property
    def described(self) -> set[str]:
        """The names that the docstring's items describe."""
        return {name for section in self.sections for item in section.items for name in item.names}


class Source:
    """The modules of the package, parsed when they are asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._trees: dict[str, ast.Module] = {}
        self._scopes: dict[str, dict[str, Definition | ast.expr | str]] = {}

    def entry(self, name: str) -> Entry:
        """The entry of `module` or `module.name`; raises SourceError where there is none or it has no docstring."""
        module, _, inside = name.partition(".")
        if not inside:
            return Entry(module, "", "module", parse_docstring(name, ast.get_docstring(self._tree(module)), ()))
        found = self._resolve(module, inside)
        if found is None or isinstance(found[1], ast.expr):
            raise SourceError(f"{PACKAGE}.{name}: there is no such function or class")
        module, node = found
        if isinstance(node, ast.ClassDef):
            return self._class(module, node)
        return self._function(module, node, "function")

    def has(self, name: str) -> bool:
        """Whether `module.name` is anything at all in that module."""
        module, _, inside = name.partition(".")
        return self._resolve(module, inside.split(".")[0]) is not None

    def _path(self, module: str) -> Path:
        path = self.folder / f"{module}.py"
        return path if path.is_file() else self.folder / module / "__init__.py"

    def _tree(self, module: str) -> ast.Module:
        if module not in self._trees:
            path = self._path(module)
            if not path.is_file():
                raise SourceError(f"{PACKAGE}.{module}: there is no such module")
            self._trees[module] = ast.parse(path.read_text(encoding="utf-8"))
        return self._trees[module]

    def _resolve(self, module: str, name: str) -> tuple[str, Definition | ast.expr] | None:
        """Where a name used in a module is defined, and its definition, or the expression an alias stands for."""
        if module not in self._scopes:
            self._scopes[module] = _scope(self._tree(module))
        outer, _, inner = name.partition(".")
        found = self._scopes[module].get(outer)
        if not isinstance(found, str):
            return None if inner or found is None else (module, found)
        origin, _, original = found.partition(".")
        if not origin:
            return self._resolve(original, inner) if inner else None
        return None if inner else self._resolve(origin, original)

    def _function(self, module: str, node: ast.FunctionDef, kind: str, inside: str = "") -> Entry:
        name = f"{inside}.{node.name}" if inside else node.name
        decorators = {ast.unparse(decorator) for decorator in node.decorator_list}
        if decorators & {"property", "cached_property", "functools.cached_property"}:
            kind = "property"
        elif any(decorator.endswith("contextmanager") for decorator in decorators):
            kind = "context manager"
        own = bool(inside) and "staticmethod" not in decorators
        parameters = tuple(self._parameters(module, node.args))[own:]
        return Entry(
            module,
            name,
            kind,
            parse_docstring(f"{module}.{name}", ast.get_docstring(node), [p.name.lstrip("*") for p in parameters]),
            parameters,
            self._type(module, node.returns),
            gives=tuple(self._classes(module, node.returns)),
        )

    def _class(self, module: str, node: ast.ClassDef) -> Entry:
        lineage = list(self._lineage(module, node))
        fields: dict[str, str] = {}
        parameters: dict[str, Parameter] = {}
        members: dict[str, Entry] = {}
        items: list[Item] = []
        gives: list[str] = []
        for owner, each in reversed(lineage):
            for line in each.body:
                if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
                    parameter = self._field(owner, line.target.id, line)
                    fields[line.target.id] = self._type(owner, line.annotation)
                    gives += self._classes(owner, line.annotation)
                    if parameter is not None:
                        parameters[parameter.name] = parameter
                elif isinstance(line, ast.FunctionDef) and line.name == "__init__":
                    own = list(self._parameters(owner, line.args))[1:]
                    parameters = {parameter.name: parameter for parameter in own}
                elif isinstance(line, ast.FunctionDef) and not line.name.startswith("_"):
                    members[line.name] = self._function(owner, line, "method", inside=node.name)
                else:
                    members |= _short_properties(owner, node.name, line)
            known = [*fields, *parameters, *members, *_assigned(each)]
            sections = parse_docstring(f"{owner}.{each.name}", ast.get_docstring(each), known)
            items += [i for section in sections if section.heading == "Attributes" for i in section.items]
        # Attributes that bases describe come first, as their fields do.
        rest = tuple(section for section in sections if section.heading != "Attributes")
        described = (*rest, Section("Attributes", items=tuple(items))) if items else rest
        properties = {name for name, member in members.items() if member.kind == "property"}
        fields = {name: kind for name, kind in fields.items() if name not in properties}
        return Entry(
            module,
            node.name,
            "class",
            described,
            tuple(parameters.values()),
            fields=fields,
            members=tuple(members.values()),
            gives=tuple(gives),
        )

    def _lineage(self, module: str, node: ast.ClassDef) -> Iterator[tuple[str, ast.ClassDef]]:
        yield module, node
        for base in node.bases:
            found = self._resolve(module, ast.unparse(base))
            if found and isinstance(found[1], ast.ClassDef):
                yield from self._lineage(found[0], found[1])

    def _parameters(self, module: str, arguments: ast.arguments) -> Iterator[Parameter]:
        plain = [*arguments.posonlyargs, *arguments.args]
        defaults = [None] * (len(plain) - len(arguments.defaults)) + list(arguments.defaults)
        for argument, default in zip(plain, defaults, strict=True):
            yield self._parameter(module, argument, default)
        if arguments.vararg:
            yield self._parameter(module, arguments.vararg, None, "*")
        elif arguments.kwonlyargs:
            yield Parameter("*")
        for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
            yield self._parameter(module, argument, default)
        if arguments.kwarg:
            yield self._parameter(module, arguments.kwarg, None, "**")

    def _parameter(self, module: str, argument: ast.arg, default: ast.expr | None, stars: str = "") -> Parameter:
        shown = None if default is None else self._default(module, default)
        return Parameter(stars + argument.arg, self._type(module, argument.annotation), shown)

    def _field(self, module: str, name: str, line: ast.AnnAssign) -> Parameter | None:
        """A dataclass field as its constructor takes it; None where it does not."""
        default = None if line.value is None else self._default(module, line.value)
        if isinstance(line.value, ast.Call) and ast.unparse(line.value.func) in ("field", "dataclasses.field"):
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in line.value.keywords}
            if given.get("init") == "False":
                return None
            default = given.get("default") or {"dict": "{}", "list": "[]"}.get(given.get("default_factory", ""))
        return Parameter(name, self._type(module, line.annotation), default)

    def _default(self, module: str, node: ast.expr) -> str:
        """A default as written; a constant's name gives way to its value where that is short."""
        if isinstance(node, ast.Name):
            found = self._resolve(module, node.id)
            if found and isinstance(found[1], (ast.Constant, ast.Tuple)) and len(ast.unparse(found[1])) <= 60:
                node = found[1]
        return _text(node)

    def _type(self, module: str, node: ast.expr | None) -> str:
        return "" if node is None else _text(_Plain(self, module).visit(_parsed(node)))

    def _classes(self, module: str, node: ast.expr | None) -> list[str]:
        """The package's classes that an annotation names."""
        names = re.findall(r"[A-Za-z_][\w.]*", "" if node is None else ast.unparse(_parsed(node)))
        found = (self._resolve(module, name) for name in names)
        return [f"{each[0]}.{each[1].name}" for each in found if each and isinstance(each[1], ast.ClassDef)]


class _Plain(ast.NodeTransformer):
    """Types as a reader needs them: aliases replaced by what they stand for, the package's modules left out."""

    def __init__(self, source: Source, module: str) -> None:
        self.source, self.module = source, module

    def visit_Name(self, node: ast.Name) -> ast.expr:
        found = self.source._resolve(self.module, node.id)
        if found and isinstance(found[1], (ast.Subscript, ast.BinOp)):
            return _Plain(self.source, found[0]).visit(_parsed(found[1]))
        return node

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        found = self.source._resolve(self.module, ast.unparse(node))
        return ast.Name(found[1].name) if found and isinstance(found[1], ast.ClassDef) else node

    def visit_Constant(self, node: ast.Constant) -> ast.expr:
        return self.visit(_parsed(node)) if isinstance(node.value, str) else node

    def visit_Subscript(self, node: ast.Subscript) -> ast.expr:
        return node if ast.unparse(node.value) == "Literal" else self.generic_visit(node)


def parse_docstring(where: str, docstring: str | None, names: Sequence[str]) -> tuple[Section, ...]:
    """The parts of a docstring in their order.

    Args:
        where: for messages, such as `patching.patch`.
        docstring: as `ast.get_docstring` cleans it.
        names: what "Args" and "Attributes" may describe.

    Raises:
        SourceError: no docstring, or a described name that is not there.
    """
    if not docstring:
        raise SourceError(f"{PACKAGE}.{where} has no docstring")
    parts = re.split(rf"^({'|'.join(HEADINGS)}):\n((?:(?:[ ]+.*)?\n?)*)", docstring, flags=re.MULTILINE)
    sections = [Section("", parts[0].strip())]
    for heading, block, prose in zip(parts[1::3], parts[2::3], parts[3::3], strict=True):
        text = re.sub(r"^    ", "", block, flags=re.MULTILINE).strip()
        if heading == "Returns":
            sections.append(Section(heading, text))
        else:
            known = None if heading == "Raises" else names
            sections.append(Section(heading, items=tuple(_items(where, text, known))))
        sections.append(Section("", prose.strip()))
    return tuple(section for section in sections if section.text or section.items)


def _items(where: str, text: str, known: Iterable[str] | None) -> Iterator[Item]:
    """Items `name: text`: each begins a line or, where all its names are known, a sentence."""
    for block in re.split(r"\n(?! )", text):
        joined = re.sub(r"\n +", " ", block)
        heads = [match for match in _HEAD.finditer(joined) if match.start() == 0 or _known(match[1], known)]
        if not heads or heads[0].start():
            raise SourceError(f"{PACKAGE}.{where}: {block.strip()[:60]!r} in its docstring describes no name")
        ends = [match.start() for match in heads[1:]] + [len(joined)]
        for match, end in zip(heads, ends, strict=True):
            if not _known(match[1], known):
                raise SourceError(f"{PACKAGE}.{where}: its docstring describes {match[1]!r}, which is not there")
            yield Item(_names(match[1]), match[1], joined[match.end() : end].strip())


def _names(head: str) -> tuple[str, ...]:
    return tuple(re.sub(r" \([^()]*\)", "", head).split(", "))


def _known(head: str, known: Iterable[str] | None) -> bool:
    if known is None:
        return all(re.fullmatch(r"[A-Z]\w*Error", name) for name in _names(head))
    return set(_names(head)) <= set(known)


def _short_properties(module: str, inside: str, line: ast.stmt) -> dict[str, Entry]:
    """`name = property(..., doc="...")` in a class."""
    if not isinstance(line, ast.Assign) or not isinstance(line.value, ast.Call):
        return {}
    docs = [ast.literal_eval(each.value) for each in line.value.keywords if each.arg == "doc"]
    names = [target.id for target in line.targets if isinstance(target, ast.Name)]
    if ast.unparse(line.value.func) != "property" or not docs:
        return {}
    return {name: Entry(module, f"{inside}.{name}", "property", (Section("", docs[0]),)) for name in names}


def _scope(tree: ast.Module) -> dict[str, Definition | ast.expr | str]:
    """What a module's names are: definitions, the values of constants, and `module.name` of imports from the package.

    A module of the package imported whole is `.module`.
    """
    scope: dict[str, Definition | ast.expr | str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == PACKAGE:
            origin = (node.module or "").partition(".")[2]
            scope |= {alias.asname or alias.name: f"{origin}.{alias.name}" for alias in node.names}
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            scope[node.name] = node
        elif isinstance(node, ast.Assign):
            scope |= {target.id: node.value for target in node.targets if isinstance(target, ast.Name)}
    return scope


def _assigned(node: ast.ClassDef) -> list[str]:
    """Names that the class's methods assign on `self`."""
    return [
        each.attr
        for each in ast.walk(node)
        if isinstance(each, ast.Attribute) and isinstance(each.ctx, ast.Store) and ast.unparse(each.value) == "self"
    ]


def _parsed(node: ast.expr) -> ast.expr:
    """A copy that may be changed; an annotation in quotes without them."""
    quoted = isinstance(node, ast.Constant) and isinstance(node.value, str)
    return ast.parse(node.value if quoted else ast.unparse(node), mode="eval").body


def _text(node: ast.expr) -> str:
    text = ast.unparse(node)
    return text if '"' in text else text.replace("'", '"')
