"""The API page lists every public name once, and docstrings describe what is there; test_docstrings.py runs them."""

import inspect
import re
import typing
from collections.abc import Iterator
from pathlib import Path

import altair
import pytest
from conftest import REPOSITORY
from docutils.core import publish_doctree
from docutils.parsers.rst import roles
from docutils.utils import Reporter
from sphinx.ext.napoleon import Config, GoogleDocstring

import rim_core as rim
from companion.sphinx.rim_api import shown_as
from rim_core import errors

TEXT = (REPOSITORY / "book" / "api.md").read_text(encoding="utf-8")
LISTED = re.findall(r"^\.\. auto(\w+):: (\S+)$", TEXT, re.M)
KINDS = {
    "function": inspect.isroutine,
    "class": inspect.isclass,
    "exception": inspect.isclass,
    "module": inspect.ismodule,
}
STYLE = Config(napoleon_use_param=False, napoleon_custom_sections=[("Attributes", "params_style")])
# "Arguments are those of `refusals`": described there.
ELSEWHERE = re.compile(r"[Aa]rguments[\w ]* (?:as in|as for|those of)\s`(\w+)`")


def found(name: str):
    value = rim
    for part in name.split(".")[1:]:
        value = getattr(value, part, None)
    return value


GONE = [name for _, name in LISTED if found(name) is None]
VALUES = {name: found(name) for _, name in LISTED if name not in GONE}
FUNCTIONS = [name for kind, name in LISTED if kind == "function" and name in VALUES]


def members(name: str) -> Iterator[tuple[str, object]]:
    """A listed name with its docstring's owner, and the public methods and properties of a class of the package."""
    value = VALUES[name]
    yield name, value
    for base in value.__mro__ if inspect.isclass(value) else ():
        if base.__module__.startswith("rim_core"):
            yield from ((f"{name}.{key}", each) for key, each in vars(base).items() if _is_member(key, each))


def _is_member(key: str, value: object) -> bool:
    return (
        not key.startswith("_") and (inspect.isfunction(value) or isinstance(value, property)) and bool(value.__doc__)
    )


ENTRIES = dict(entry for name in VALUES for entry in members(name))


def sections(docstring: str | None) -> dict[str, str]:
    """A docstring's parts by their headings; its prose by the empty one."""
    parts = re.split(r"^(\w+):\n((?: +.*\n?|\n)*)", inspect.cleandoc(docstring or "") + "\n", flags=re.M)
    return {"": " ".join(parts[::3]), **dict(zip(parts[1::3], parts[2::3], strict=True))}


def items(section: str) -> list[str]:
    """The names described by `name, other (unit): text`."""
    heads = re.findall(r"^ {4}(\*{0,2}\w[^:\n]*):(?:\s|$)", section, re.M)
    return [name.strip(" *") for head in heads for name in re.sub(r"\([^()]*\)", "", head).split(",")]


def parameters(value) -> list[str]:
    return [name for name in inspect.signature(value).parameters if name != "self"]


def described(value) -> set[str]:
    """The arguments that a docstring describes: as items, in its prose, or in the one to which it sends its reader."""
    parts = sections(value.__doc__)
    prose = " ".join(text for heading, text in parts.items() if heading not in ("Raises", "Example"))
    told = {name for heading in ("Args", "Attributes") for name in items(parts.get(heading, ""))}
    told |= set(re.findall(r"`(\w+)(?:\([^`]*\))?`", prose))
    for other in ELSEWHERE.findall(prose):
        told |= described(getattr(inspect.getmodule(inspect.unwrap(value)), other))
    return told


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_argument_is_described(name):
    missing = [each for each in parameters(VALUES[name]) if each not in described(VALUES[name])]
    assert not missing, f"the docstring of {name} says nothing of {', '.join(missing)}"


def test_every_public_name_is_on_the_page_once_under_its_kind():
    names = [name for _, name in LISTED]
    assert GONE == [], "are on the page and nowhere else"
    assert [name for name in rim._PUBLIC if f"rim.{name}" not in names] == [], "list them in a group of book/api.md"
    assert [name for name in names if names.count(name) > 1] == []
    wrong = [name for kind, name in LISTED if not KINDS[kind](found(name))]
    assert wrong == []
    exceptions = {name for name, value in VALUES.items() if inspect.isclass(value) and issubclass(value, Exception)}
    assert exceptions == {name for kind, name in LISTED if kind == "exception"}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_classes_that_a_function_gives_are_on_the_page(name):
    shown = [value for value in VALUES.values() if inspect.isclass(value)]
    known = {"alt": altair} | {value.__name__: value for value in shown}  # imported for types alone in some modules
    hint = typing.get_type_hints(inspect.unwrap(VALUES[name]), localns=known).get("return")
    missing = [each for each in _classes(hint) if each.__module__.startswith("rim_core") and each not in shown]
    assert not missing, f"{name} gives {missing[0].__module__}.{missing[0].__name__}: list it in book/api.md"


def _classes(hint) -> Iterator[type]:
    if inspect.isclass(hint) and not typing.get_args(hint):
        yield hint
    for inner in typing.get_args(hint):
        yield from _classes(inner)


@pytest.mark.parametrize("name", ENTRIES)
def test_a_docstring_describes_what_is_there(name):
    value = ENTRIES[name]
    parts = sections(value.__doc__)
    assert parts[""].strip(), f"{name} has no docstring"
    for heading in ("Args", "Raises", "Attributes"):
        assert heading not in parts or items(parts[heading]), f"{name}: no names under {heading}"
    if inspect.isroutine(value):
        gone = set(items(parts.get("Args", ""))) - set(inspect.signature(value).parameters)
        assert not gone, f"{name}: its docstring describes {gone}, which are not there"
    for error in items(parts.get("Raises", "")):
        assert issubclass(getattr(errors, error), errors.RimError), f"{name} raises {error}?"
    for module, inside in re.findall(r"`(?:rim\.)?(\w+)\.(\w+)[^`]*`", value.__doc__):
        # `model.using` is a model's.
        known = module not in rim._MODULES or module == "model" or not inspect.ismodule(getattr(rim, module))
        assert known or hasattr(getattr(rim, module), inside), f"{name}: `{module}.{inside}` is not there"


@pytest.mark.parametrize("name", ENTRIES)
def test_a_docstring_is_restructured_text(name, monkeypatch):
    """Said here in a moment; the book would fail to build."""
    monkeypatch.setitem(roles._roles, "", roles._role_registry["code"])
    text = str(GoogleDocstring(inspect.cleandoc(ENTRIES[name].__doc__), STYLE))
    told: list[str] = []
    monkeypatch.setattr(Reporter, "system_message", _listening(Reporter.system_message, told))
    publish_doctree(text, settings_overrides={"report_level": 5})
    assert told == [], name
    assert "|--" not in text, f"{name}: a list in place of a Markdown table"


def _listening(method, told: list[str]):
    def system_message(self, level, message, *children, **kwargs):
        told.append(str(message))
        return method(self, level, message, *children, **kwargs)

    return system_message


def test_a_public_name_is_never_also_a_module():
    """`from rim_core import NAME` would give whichever was imported last."""
    modules = {path.stem for path in (REPOSITORY / "rim_core").glob("*.py")}
    assert modules & set(rim._PUBLIC) == set()


def test_types_are_looked_for_where_the_page_shows_them():
    assert "rim.Model" in shown_as("rim_core.models.loading.Model")
    assert "rim.sites.Layout" in shown_as("rim_core.models.layout.Layout")
    assert "rim.errors.InputError" in shown_as("InputError")


@pytest.mark.timeout(1500)  # waits for the book
def test_the_built_page_has_every_name_and_links_between_them(built_book):
    html = (Path(built_book).parent / "book" / "api.html").read_text(encoding="utf-8")
    ids = set(re.findall(r'id="([^"]+)"', html))
    assert {f"module-{name}" if kind == "module" else name for kind, name in LISTED} <= ids
    assert {"rim.probes.ProbeResult.plot", "rim.patching.Patched.to_frame"} <= ids
    assert set(re.findall(r'href="#(rim[^"]+)"', html)) <= ids
    patch = html[html.index('id="rim.patch"') :].partition("</dd></dl>")[0]
    assert re.search(r'href="#rim\.Model"[^>]*><span class="pre">Model<', patch)  # a type
    assert re.search(r'href="#rim\.neurons_above"[^>]*><code', patch)  # a code word
    text = re.sub(r"<[^>]+>", "", html[html.index("<article") :])
    assert not [raw for raw in ("`", "|---", "ForwardRef", "&lt;factory&gt;") if raw in text]
