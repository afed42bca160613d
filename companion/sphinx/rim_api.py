"""The API page, by autodoc: the package under its usual name `rim`, and links from the code words of docstrings."""

import inspect
import re
import sys
from types import ModuleType
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.docutils import SphinxRole

import rim_core

_NAME = re.compile(r"`(?:rim\.|rim_core\.)?([A-Za-z_][\w.]*)(?:\(.*\))?`", re.DOTALL)


class _Rim(ModuleType):
    """What `import rim_core as rim` gives: no package, so that nothing is imported a second time under this name."""

    def __getattr__(self, name: str) -> Any:
        return getattr(rim_core, name)


class CodeWord(SphinxRole):
    """What stands between single backticks in a docstring: code, and a link where it names something on the page."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        """A literal, in a cross-reference where it can be a name."""
        literal = nodes.literal(self.rawtext, self.rawtext.strip("`"), support_smartquotes=False)
        named = _NAME.fullmatch(self.rawtext)
        if named is None:
            return [literal], []
        # As in the role `py:obj`, but what is shown stays as written.
        near = {key: self.env.ref_context.get(key) for key in ("py:module", "py:class")}
        target = {"refdomain": "py", "reftype": "obj", "reftarget": named[1], "refdoc": self.env.docname}
        return [addnodes.pending_xref(self.rawtext, literal, **target, **near)], []


def shown_as(name: str) -> list[str]:
    """Where the page may show a name of a type or an error: `rim_core.models.layout.Layout` as `rim.sites.Layout`."""
    path, _, last = name.removeprefix("rim_core.").removeprefix("rim.").rpartition(".")
    modules = [path, *(short for short, full in rim_core._MODULES.items() if full == path), "errors"]
    return [f"rim.{last}", *(f"rim.{module}.{last}" for module in modules)]


def _resolve(
    app: Sphinx, env: BuildEnvironment, node: addnodes.pending_xref, content: nodes.TextElement
) -> nodes.Element | None:
    """Lead types, which Sphinx names by where they are defined, to where the page shows them."""
    domain = env.get_domain("py")
    names = shown_as(node["reftarget"]) if node.get("refdomain") == "py" else []
    name = next((name for name in names if name in domain.data["objects"]), None)
    return name and domain.resolve_xref(env, node["refdoc"], app.builder, "obj", name, node, content)


def _signature(
    app: Sphinx, what: str, name: str, value: Any, options: Any, arguments: str | None, returns: str | None
) -> tuple[str | None, str | None]:
    """Name a context manager as such, which is made of a generator; leave out how a dataclass makes its defaults."""
    if returns and inspect.isgeneratorfunction(inspect.unwrap(value)) and hasattr(value, "__wrapped__"):
        returns = re.sub(r"^~?[\w.]*\b(Iterator|Generator)\b", "~contextlib.AbstractContextManager", returns)
    return arguments and arguments.replace("<factory>", "..."), returns


def _docstring(app: Sphinx, what: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    """Keep napoleon from taking what stands before a colon in a property's first line for its type."""
    if what == "property":
        lines.insert(0, "")


def setup(app: Sphinx) -> dict[str, bool]:
    """Give autodoc the name `rim`, and docstrings their role for what stands between backticks."""
    sys.modules.setdefault("rim", _Rim("rim"))
    app.add_role("code-word", CodeWord())
    app.connect("missing-reference", _resolve)
    app.connect("autodoc-process-signature", _signature)
    app.connect("autodoc-process-docstring", _docstring, priority=400)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
