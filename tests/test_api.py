"""Every public name is documented, and the API page shows all of them as they are."""

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY

import rim_core as rim
from rim_core import errors

EXTENSION = REPOSITORY / "book" / "_ext"
sys.path.insert(0, str(EXTENSION))

import rim_api  # noqa: E402
from rim_source import Entry, Item, Section, Source, SourceError, parse_docstring  # noqa: E402

TEXT = (REPOSITORY / "book" / "api.md").read_text(encoding="utf-8")
SOURCE = Source(REPOSITORY / "rim_core")
PAGE = rim_api.Page(TEXT, SOURCE)
ENTRIES = [each for group in PAGE.groups for entry in group for each in (entry, *entry.members)]
NAMES = sorted(rim._PUBLIC)
FUNCTIONS = [name for name in NAMES if not inspect.isclass(getattr(rim, name))]
# "Arguments are those of `refusals`": described there.
ELSEWHERE = re.compile(r"[Aa]rguments[\w ]* (?:as in|as for|those of)\s`(\w+)`")


def entry_of(name: str) -> Entry:
    return SOURCE.entry(rim_api.place(name))


def described(entry: Entry) -> set[str]:
    """The arguments that an entry describes: as items, in its prose, or in the entry to which it sends its reader."""
    shown = [section for section in entry.sections if section.heading != "Raises"]
    prose = " ".join(text for s in shown for text in (s.text, *(item.text for item in s.items)))
    found = entry.described | set(re.findall(r"`(\w+)(?:\([^`]*\))?`", prose))
    for other in ELSEWHERE.findall(prose):
        found |= described(SOURCE.entry(f"{entry.module}.{other}"))
    return found


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_argument_is_described(name):
    parameters = inspect.signature(getattr(rim, name)).parameters
    missing = [parameter for parameter in parameters if parameter not in described(entry_of(name))]
    assert not missing, f"the docstring of rim.{name} says nothing of {', '.join(missing)}"


@pytest.mark.parametrize("name", [name for name in PAGE.names if name.endswith("()")])
def test_every_argument_of_a_class_that_readers_make_is_described(name):
    entry = entry_of(name)
    missing = [parameter.name for parameter in entry.parameters if parameter.name not in described(entry)]
    # What an edit's site and layer are is said by the page's table of sites.
    assert set(missing) <= ({"site", "layer"} if entry.module == "editing" else set())


@pytest.mark.parametrize("name", NAMES)
def test_the_page_shows_what_python_sees(name):
    value, entry = getattr(rim, name), entry_of(name)
    if not inspect.isclass(value):
        expected = list(inspect.signature(value).parameters)
        assert [each.name.lstrip("*") for each in entry.parameters if each.name != "*"] == expected
        return
    own = [vars(each) for each in value.__mro__ if each.__module__.startswith("rim_core")]
    public = {key for scope in own for key in scope if not key.startswith("_")}
    assert public <= {each.name.rpartition(".")[2] for each in entry.members} | set(entry.fields)


def test_defaults_are_those_of_python():
    for name in FUNCTIONS:
        parameters = inspect.signature(getattr(rim, name)).parameters
        for shown in entry_of(name).parameters:
            if shown.name != "*":
                default = parameters[shown.name.lstrip("*")].default
                assert (shown.default is None) == (default is inspect.Parameter.empty), (name, shown.name)
                if isinstance(default, (int, float, str, bool, type(None))):
                    assert eval(shown.default or "default", {"default": default}) == default, (name, shown.name)


def test_errors_that_docstrings_name_exist():
    named = {name for e in ENTRIES for s in e.sections if s.heading == "Raises" for i in s.items for name in i.names}
    assert {"InputError", "IdentityError"} <= named
    for name in named:
        assert issubclass(getattr(errors, name), errors.RimError), name


def test_every_public_name_is_on_the_page_once_and_no_other():
    assert PAGE.wrong == []
    assert [name for name in PAGE.names if rim_api.place(name) is None] == []


def test_a_public_name_is_never_also_a_module():
    """`from rim_core import NAME` would give whichever was imported last."""
    modules = {path.stem for path in (REPOSITORY / "rim_core").glob("*.py")}
    assert modules & set(rim._PUBLIC) == set()


def test_code_words_lead_where_they_mean():
    capture = next(entry for entry in ENTRIES if rim_api.shown(entry) == "rim.capture")
    assert PAGE.link("format_chat", capture) == "rim.format_chat"
    assert PAGE.link("rim.capture(model, texts)", capture) == "rim.capture"
    assert PAGE.link("stats.bootstrap", capture) == "rim.stats.bootstrap"
    assert PAGE.link("texts", capture) is None
    with pytest.raises(SourceError, match=r"rim\.capture: its docstring names `stats\.gone`"):
        PAGE.link("stats.gone", capture)


def test_a_docstring_is_taken_apart():
    doc = """Give it.

    | a | b |
    |---|---|
    | 1 | 2 |

    Args:
        x, y: two `[n]`. z (nats), w: more: of
            both. last: the end. Note: no name.

    Raises:
        InputError, RimError: as there. WeightsError: damaged.
    """
    prose, arguments, raised = parse_docstring("m.f", inspect.cleandoc(doc), ["x", "y", "z", "w", "last"])
    assert prose == Section("", "Give it.\n\n| a | b |\n|---|---|\n| 1 | 2 |")
    assert arguments.items == (
        Item(("x", "y"), "x, y", "two `[n]`."),
        Item(("z", "w"), "z (nats), w", "more: of both."),
        Item(("last",), "last", "the end. Note: no name."),
    )
    assert [item.names for item in raised.items] == [("InputError", "RimError"), ("WeightsError",)]


@pytest.mark.parametrize(
    ("doc", "told"),
    [
        (None, r"rim_core\.m\.f has no docstring"),
        ("Do.\n\nArgs:\n    gone: it.", r"m\.f: its docstring describes 'gone', which is not there"),
        ("Do.\n\nRaises:\n    when it rains.", r"'when it rains\.' in its docstring describes no name"),
    ],
)
def test_what_is_wrong_with_a_docstring_is_told(doc, told):
    with pytest.raises(SourceError, match=told):
        parse_docstring("m.f", doc, ["x"])


def build(folder: Path, text: str) -> subprocess.CompletedProcess[str]:
    (folder / "api.md").write_text(text, encoding="utf-8")
    options = ["-C", "-n", "-W", "--keep-going", "-q", "-D", "root_doc=api", "-D", "extensions=myst_parser,rim_api"]
    return subprocess.run(
        [sys.executable, "-m", "sphinx", *options, str(folder), str(folder / "html")],
        env={**os.environ, "PYTHONPATH": str(EXTENSION)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_page_builds_and_its_links_lead_somewhere(tmp_path):
    done = build(tmp_path, TEXT)
    assert done.returncode == 0, done.stderr
    html = (tmp_path / "html" / "api.html").read_text(encoding="utf-8")
    ids = set(re.findall(r'id="([^"]+)"', html))
    assert {f"rim.{name}" for name in NAMES} <= ids
    assert {"rim.probes.ProbeResult.plot", "rim.patching.Patched.to_frame"} <= ids
    assert set(re.findall(r'href="#([^"]+)"', html)) <= ids
    article = html[html.index('id="api"') :]
    # Markdown of the docstrings is rendered, and signatures hold what a person wrote.
    text = re.sub(r"<[^>]+>", "", article)
    for raw in ("`", "|---", "ForwardRef", "typing.", "&lt;factory&gt;"):
        assert raw not in text, raw
    assert re.search(r"<td><p>.*resid_pre.*</p></td>", article)


def test_a_public_name_in_no_group_fails_the_build_with_its_name(tmp_path):
    done = build(tmp_path, "# API\n\n```{rim-api}\ncosine\nstats.gone\n```\n")
    assert done.returncode != 0
    assert "rim.patch is public and in no group of the API page" in done.stderr
    assert "rim_core.stats.gone: there is no such function or class" in done.stderr
