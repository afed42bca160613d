"""The API page: public names of `rim_core` with signatures and docstrings, read from the source at every build.

`{rim-api}` takes one name a line: a public name (`capture`), one of a public module (`stats.bootstrap`), or a public
module (`sites`), of which it shows the text. A class that the reader makes is listed as `Projection()` and shown with
its arguments. Classes that these give follow on their own. Each name can be linked from any page:
{py:func}`rim.capture`, {py:class}`rim.Model`.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

import rim_core
from companion.sphinx.rim_source import HEADINGS, Entry, Parameter, Section, Source, SourceError

_BLOCK = re.compile(r"^```\{rim-api\}\n(.*?)^```", re.MULTILINE | re.DOTALL)
# A signature longer than this has a line for each parameter.
WIDE = 76

log = logging.getLogger(__name__)


def listed(page: str) -> list[list[str]]:
    """The names that the text of an API page lists, by group."""
    return [block.split() for block in _BLOCK.findall(page)]


def place(name: str) -> str | None:
    """Where a listed name is, as `module.name` or `module`; None if it is not public."""
    name = name.removesuffix("()")
    if name in rim_core._PUBLIC:
        return f"{rim_core._PUBLIC[name]}.{name}"
    return name if name.partition(".")[0] in rim_core._MODULES else None


def shown(entry: Entry) -> str:
    """The name under which a reader reaches an entry."""
    if rim_core._PUBLIC.get(entry.name.partition(".")[0]) == entry.module:
        return f"rim.{entry.name}"
    package = "rim" if entry.module in rim_core._MODULES else "rim_core"
    return ".".join(filter(None, (package, entry.module, entry.name)))


class Page:
    """Everything that one API page describes, by group."""

    def __init__(self, text: str, source: Source) -> None:
        self.source = source
        groups = listed(text)
        self.names = [name for group in groups for name in group]
        self.made = {place(name) for name in self.names if name.endswith("()")}
        self.wrong: list[str] = []
        self.groups = [self._entries(group) for group in groups]
        self._follow()
        entries = [entry for group in self.groups for entry in group]
        self.ids = {f"{e.module}.{e.name}".rstrip("."): shown(e) for each in entries for e in (each, *each.members)}
        self.classes = {entry.name: shown(entry) for entry in entries if entry.kind == "class"}
        self._check()

    def _entries(self, names: Sequence[str]) -> list[Entry]:
        entries = []
        for name in names:
            if (where := place(name)) is not None:
                try:
                    entries.append(self.source.entry(where))
                except SourceError as error:
                    self.wrong.append(str(error))
        return entries

    def _follow(self) -> None:
        """Add the classes that entries give or hold after them, each where it is first given.

        What only a class's members give is followed into public modules alone.
        """
        seen = {f"{entry.module}.{entry.name}" for group in self.groups for entry in group}
        for group in self.groups:
            for i, entry in enumerate(group):
                inner = [name for member in entry.members for name in member.gives if place(name)]
                new = [name for name in dict.fromkeys([*entry.gives, *inner]) if name not in seen]
                seen.update(new)
                try:
                    group[i + 1 : i + 1] = [self.source.entry(name) for name in new]
                except SourceError as error:
                    self.wrong.append(str(error))

    def _check(self) -> None:
        places = [place(name) for name in self.names]
        for name in rim_core._PUBLIC:
            if place(name) not in places:
                self.wrong.append(f"rim.{name} is public and in no group of the API page: list it in one")
        for name, where in zip(self.names, places, strict=True):
            if places.count(where) > 1 and where is not None:
                self.wrong.append(f"{name} is listed twice on the API page")
        entries = [entry for group in self.groups for entry in group if entry.kind == "class"]
        for entry in entries:
            if self.classes[entry.name] != shown(entry):
                self.wrong.append(f"{shown(entry)} has the name of {self.classes[entry.name]}: links would mix them up")

    def link(self, text: str, near: Entry) -> str | None:
        """The entry that a code word in a docstring means, if any; raises SourceError for a name that is gone."""
        match = re.fullmatch(r"(?:rim\.|rim_core\.)?([A-Za-z_][\w.]*)(?:\(.*\))?", text)
        if match is None or match[1] in near.described | {parameter.name for parameter in near.parameters}:
            return None
        name = match[1]
        owner = near.name.partition(".")[0]
        for candidate in (place(name) or name, f"{near.module}.{name}", f"{near.module}.{owner}.{name}"):
            if candidate in self.ids:
                return self.ids[candidate]
        if name in self.classes:
            return self.classes[name]
        module, _, inside = name.partition(".")
        if inside and module in rim_core._MODULES and not self.source.has(name):
            raise SourceError(f"{shown(near)}: its docstring names `{text}`, which is not there")
        return None


class Api(SphinxDirective):
    """One group of the API page: `{rim-api}` with a name a line."""

    has_content = True

    def run(self) -> list[nodes.Node]:
        """The group's entries; what is wrong anywhere on the page is told once, by its first group."""
        self.env.note_reread()
        text = Path(self.env.doc2path(self.env.docname)).read_text(encoding="utf-8")
        # One page has many groups, and is read once for all of them.
        if "rim-api" not in self.env.temp_data:
            self.env.temp_data["rim-api"] = Page(text, Source(Path(rim_core.__file__).parent))
        self.page: Page = self.env.temp_data["rim-api"]
        group = listed(text).index([name for line in self.content for name in line.split()])
        for message in self.page.wrong if group == 0 else ():
            log.warning(message, location=self.get_location())
        return [self._entry(entry) for entry in self.page.groups[group]]

    def _entry(self, entry: Entry) -> nodes.Node:
        name = shown(entry)
        member = "." in entry.name
        kind = {"context manager": "method" if member else "function"}.get(entry.kind, entry.kind)
        # Quotation marks stay straight: docstrings speak of values such as "last".
        drawn = addnodes.desc("", domain="py", objtype=kind, classes=["py", kind], support_smartquotes=False)
        signature = addnodes.desc_signature("", "", ids=[name], classes=["sig", "sig-object", "py"])
        signature["_toc_parts"] = (name,)
        signature["_toc_name"] = "" if member else entry.name or entry.module
        signature += self._signature(entry, name, member)
        if not member:
            before, _, last = name.rpartition(".")
            drawn += addnodes.index(entries=[("single", f"{last} ({before})", name, "", None)])
        drawn += signature
        if kind != "module":
            self.env.domains["py"].note_object(name, kind, name, location=signature)
        content = addnodes.desc_content()
        for section in entry.sections:
            content += self._section(entry, section)
        if entry.kind == "class":
            content += self._further_fields(entry)
        content += [self._entry(each) for each in entry.members]
        drawn += content
        return drawn

    def _signature(self, entry: Entry, name: str, member: bool) -> list[nodes.Node]:
        words = {"context manager": "with ", "class": "class ", "module": "module ", "property": "property "}
        before, _, last = name.rpartition(".")
        parts: list[nodes.Node] = []
        if entry.kind in words:
            parts.append(addnodes.desc_annotation("", words[entry.kind]))
        if not member:
            parts.append(addnodes.desc_addname("", f"{before}."))
        parts.append(addnodes.desc_name("", last))
        called = entry.kind in ("function", "method", "context manager")
        if called or f"{entry.module}.{entry.name}" in self.page.made:
            parts += self._parameters(entry.parameters, len(name))
        if entry.returns and entry.kind == "property":
            parts += [nodes.Text(": "), *self._type(entry.returns)]
        elif entry.returns and called and entry.kind != "context manager":
            parts += [nodes.Text(" → "), *self._type(entry.returns)]
        return parts

    def _parameters(self, parameters: Sequence[Parameter], before: int) -> list[nodes.Node]:
        texts = (f"{p.name}: {p.annotation}{'' if p.default is None else f' = {p.default}'}, " for p in parameters)
        length = before + sum(len(text) for text in texts)
        drawn: list[nodes.Node] = [nodes.Text("(")]
        for parameter in parameters:
            # Of several on one line the comma belongs to the parameter before it, also where lines break.
            end = "" if parameter is parameters[-1] else ", "
            part = nodes.inline(
                "", "", classes=["rim-parameter", "rim-own-line"] if length > WIDE else ["rim-parameter"]
            )
            part += addnodes.desc_sig_name("", parameter.name)
            if parameter.annotation:
                part += [nodes.Text(": "), *self._type(parameter.annotation)]
            if parameter.default is not None:
                equals = " = " if parameter.annotation else "="
                part += [nodes.Text(equals), nodes.inline("", parameter.default, classes=["default_value"])]
            part += nodes.Text(end)
            drawn.append(part)
        return [*drawn, nodes.Text(")")]

    def _type(self, text: str) -> list[nodes.Node]:
        """A type with its classes linked to their entries."""
        parts = re.split(r"([A-Za-z_][\w.]*)", text)
        linked = [self._reference(self.page.classes.get(part), nodes.Text(part)) for part in parts if part]
        return [nodes.inline("", "", *linked, classes=["rim-type"])]

    def _reference(self, target: str | None, node: nodes.Node) -> nodes.Node:
        return node if target is None else nodes.reference("", "", node, refid=target, internal=True)

    def _section(self, entry: Entry, section: Section) -> list[nodes.Node]:
        if not section.heading:
            return self._markdown(section.text, entry)
        heading = nodes.paragraph("", HEADINGS[section.heading], classes=["rim-part"])
        if not section.items:
            return [heading, *self._markdown(section.text, entry)]
        rows = []
        for item in section.items:
            term = nodes.term("", "", *self._head(item.head, section.heading))
            types = list(dict.fromkeys(entry.fields.get(name, "") for name in item.names))
            if section.heading == "Attributes" and any(types):
                term += [nodes.Text(": "), *self._type(", ".join(filter(None, types)))]
            rows.append((term, self._markdown(item.text, entry)))
        return [heading, self._list(rows)]

    def _head(self, head: str, heading: str) -> list[nodes.Node]:
        parts = re.split(r"(\w+)(?=$|, | \()(?![^()]*\))", head)
        names: list[nodes.Node] = [
            nodes.literal("", part) if i % 2 else nodes.Text(part) for i, part in enumerate(parts) if part
        ]
        if heading == "Raises":
            return [self._reference(self.page.classes.get(node.astext()), node) for node in names]
        return names

    def _further_fields(self, entry: Entry) -> list[nodes.Node]:
        """Attributes that the docstring has no item for, with their types; unless they stand in the signature."""
        if f"{entry.module}.{entry.name}" in self.page.made:
            return []
        members = {member.name.rpartition(".")[2] for member in entry.members}
        rest = {name: kind for name, kind in entry.fields.items() if name not in entry.described | members}
        if not rest:
            return []
        rows = [
            (nodes.term("", "", nodes.literal("", name), nodes.Text(": "), *self._type(kind)), [])
            for name, kind in rest.items()
        ]
        headed = any(section.heading == "Attributes" for section in entry.sections)
        heading = [] if headed else [nodes.paragraph("", HEADINGS["Attributes"], classes=["rim-part"])]
        return [*heading, self._list(rows)]

    def _list(self, rows: Sequence[tuple[nodes.term, list[nodes.Node]]]) -> nodes.definition_list:
        items = [nodes.definition_list_item("", term, nodes.definition("", *text)) for term, text in rows]
        return nodes.definition_list("", *items, classes=["rim-items"])

    def _markdown(self, text: str, entry: Entry) -> list[nodes.Node]:
        """A docstring's text, its code words linked to the entries they name."""
        holder = nodes.container("", *self.parse_text_to_nodes(text))
        for literal in list(holder.findall(nodes.literal)):
            try:
                target = self.page.link(literal.astext(), entry)
            except SourceError as error:
                log.warning(str(error), location=self.get_location())
                continue
            if target is not None and target != shown(entry) and not isinstance(literal.parent, nodes.reference):
                literal.replace_self(self._reference(target, literal.deepcopy()))
        return list(holder.children)


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the directive."""
    app.add_directive("rim-api", Api)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
