"""Two suites in one book: numbers side by side, from the records, in the figures and on the built pages."""

import json
import math
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import tiny_project
from browsing import THEMES, Visit

from companion import comparison
from companion.outcomes import rows
from companion.pages import staging
from rim_core.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
CLAIMS = """\
paper: paper_a
letter: A
title: A paper
claims:
  - id: A1
    statement: The number is large, and near one half elsewhere.
    where: Figure 1
    published: {value: 0.9}
    notebook: one/01_first
    parts:
      - {name: number, version: both, unit: share of things, bounds: [0, 1], rule: {kind: range, low: 0.5}}
      - {name: elsewhere, version: sound, unit: metres, rule: {kind: near, target: 0.5, tolerance: 0.1}}
    checks:
      - {name: shuffled_share, rule: {kind: sign, sign: positive}, why: it must be something}
    applies_to: {roles: [base]}
  - id: A2
    statement: The second number falls.
    where: Figure 2
    published: {value: null, text: "falls"}
    notebook: one/02_second
    parts: [{name: fall, version: sound, unit: share, rule: {kind: sign, sign: negative}}]
    applies_to: {roles: [risky]}
"""
FIRST = """\
import rim_core as rim
values = [0.2, 0.25, 0.3] if "own" in suite else [0.8, 0.9, 0.85]
measured = {"number": values, "elsewhere": [0.5, 0.51, 0.49], "shuffled_share": [1.0, 2.0, 1.5]}
rim.claims("paper_a").record("A1", measured)
"""
SECOND = "import rim_core as rim\nrim.claims('paper_a').record('A2', {'fall': [-1.0, -0.9, -1.1]})"
LINKS = "# {}\n\nSee the [other](0{}.ipynb) and the [intro](../../intro.md)."
CONTENTS = """\
format: jb-book
root: book/intro
chapters:
  - file: book/experiments/one/01_first
  - file: book/experiments/one/02_second
  - file: book/scorecard
  - file: book/comparison
  - file: book/papers/of_a
"""


def heading(path: Path, text: str) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    content["cells"][0]["source"] = text
    path.write_text(json.dumps(content), encoding="utf-8")


def make(root: Path) -> Path:
    """A project with two notebooks and the suites `tiny`, by path, and `own`, by name, which lacks a role."""
    tiny_project.make(root)
    (root / "book" / "claims" / "paper_a.yml").write_text(CLAIMS, encoding="utf-8")
    heading(tiny_project.write(root, "one/01_first", FIRST), LINKS.format("First", "2_second"))
    heading(tiny_project.write(root, "one/02_second", SECOND), LINKS.format("Second", "1_first"))
    (root / "tiny.yml").write_text(tiny_project.SUITE + "  risky: {}\n", encoding="utf-8")
    (root / "suites").mkdir()
    (root / "suites" / "own.yml").write_text(tiny_project.SUITE, encoding="utf-8")
    return root


def add_pages(root: Path) -> None:
    """What a book needs beside its experiments, as the project has it."""
    shutil.copy(ROOT / "_config.yml", root)
    shutil.copytree(ROOT / "book" / "assets", root / "book" / "assets")
    for name in ("references.bib", "how-to-read.md", "organisms.md"):
        (root / "book" / name).write_text("")
    (root / "book" / "intro.md").write_text("# Intro\n")
    (root / "book" / "papers").mkdir()
    for page, text in {"scorecard": "scorecard", "comparison": "comparison", "papers/of_a": "claims-paper_a"}.items():
        folder = os.path.relpath("experiments/tables", os.path.dirname(page) or ".")
        include = f"# Page\n\n```{{include}} {folder}/{text}.md\n```\n"
        (root / "book" / f"{page}.md").write_text(include)
    (root / "_toc.yml").write_text(CONTENTS)


# --- from the records to the figures ------------------------------------------------------------------------


def put_run(root: Path, suite: str, number: float) -> None:
    values = [number - 0.01, number, number + 0.01]
    tiny_project.put_run(root, suite, number=values, elsewhere=[0.5, 0.51, 0.49], shuffled_share=[1.0, 2.0, 1.5])


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    made = make(tmp_path)
    monkeypatch.chdir(made)
    return made


def numbers(root: Path, *suites: str) -> list[comparison.Number]:
    return comparison.numbers(root / "results", rows(root / "results", suites))


def test_numbers_are_the_parts_and_the_checks_of_each_decided_claim(root):
    put_run(root, "tiny", 0.8)
    put_run(root, "own", 0.2)
    found = numbers(root, "tiny.yml", "own", "third")
    assert [(n.suite, n.title) for n in found] == [
        (suite, title) for suite in ("tiny", "own") for title in ("number", "elsewhere", "check: shuffled share")
    ]
    number, elsewhere, check = found[:3]
    assert (number.value, number.unit, number.asked) == (pytest.approx(0.8), "share of things", "at least 0.5")
    assert number.low < 0.8 < number.high
    assert (number.least, number.most) == (0.5, math.inf)
    assert (elsewhere.unit, elsewhere.least, elsewhere.most) == ("metres", 0.4, 0.6)
    assert (check.unit, check.asked) == ("", "above 0")


def test_only_what_two_suites_have_is_shared(root):
    put_run(root, "tiny", 0.8)
    assert comparison.shared(numbers(root, "tiny.yml", "own")) == []
    put_run(root, "own", 0.2)
    groups = comparison.shared(numbers(root, "tiny.yml", "own"))
    assert [[n.suite for n in group] for group in groups] == [["tiny", "own"]] * 3


def test_a_figure_asks_draws_the_bound_and_keeps_each_suites_colour(root):
    for suite, value in (("tiny", 0.8), ("own", 0.2), ("third", 0.6)):
        put_run(root, suite, value)
    every = ["tiny", "absent", "own", "third"]
    groups = comparison.shared(numbers(root, "tiny.yml", "own", "third"))
    spec = comparison.figure(groups[0], every).to_dict()
    assert " ".join(spec["title"]["text"]) == "A1, number: is it at least 0.5?"
    assert "tiny 0.8 [0.775, 0.825]" in spec["description"]
    assert "at least 0.5" in spec["description"]
    layers = spec["layer"]
    assert [layer["encoding"]["x"]["datum"] for layer in layers if "datum" in layer["encoding"]["x"]] == [0.5]
    bars = next(layer for layer in layers if layer["encoding"]["x"].get("field") == "low")
    assert bars["encoding"]["x2"]["field"] == "high"
    assert bars["encoding"]["x"]["axis"]["title"] == ["share of things"]
    low, high = bars["encoding"]["x"]["scale"]["domain"]
    assert low < 0.2 - 0.02
    assert high > 0.8 + 0.02
    colours = bars["encoding"]["color"]["scale"]
    assert colours["domain"] == every
    assert len(set(colours["range"])) == 4
    (shade,) = [data for data in spec["datasets"].values() if "from" in data[0]]
    assert shade == [{"from": 0.5, "to": high}]


# --- the command, and the built book ------------------------------------------------------------------------


def test_a_suite_named_twice_is_shown_once_and_by_its_name(root):
    assert staging.distinct(["tiny.yml", "suites/own.yml", "own", "./tiny.yml"]) == ["tiny.yml", "own"]


def test_two_files_of_one_name_would_mix_their_results(root):
    (root / "more").mkdir()
    shutil.copy(root / "tiny.yml", root / "more" / "tiny.yml")
    with pytest.raises(InputError, match="two suites are named tiny"):
        staging.distinct(["tiny.yml", "more/tiny.yml"])


def test_an_unknown_suite_is_told_before_anything_runs(root):
    done = tiny_project.rim(root, "book", "--suite", "own", "--suite", "onw")
    assert done.returncode == 2
    assert done.stderr.startswith("rim: unknown suite 'onw' (did you mean 'own'?)")
    assert not (root / "results").exists()


@pytest.fixture(scope="module")
def book(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The book of two suites, run and built by one command."""
    made = make(tmp_path_factory.mktemp("two suites"))
    add_pages(made)
    done = tiny_project.rim(made, "book", "--suite", "tiny.yml", "--suite", "own")
    assert done.returncode == 0, done.stderr[-3000:]
    return made, done


def html(root: Path, page: str) -> str:
    return (root / "_build" / "html" / "book" / f"{page}.html").read_text(encoding="utf-8")


def text_of(markup: str) -> str:
    return " ".join(re.sub(r"<[^>]*>", " ", markup).split())


def test_one_command_runs_both_suites_and_prints_the_books_path(book):
    root, done = book
    assert Path(done.stdout.strip()) == root / "_build" / "html" / "index.html"
    assert (root / "results" / "tiny" / "one" / "02_second" / "default" / "claims.json").is_file()
    assert (root / "results" / "own" / "one" / "01_first" / "default" / "claims.json").is_file()
    assert not (root / "results" / "own" / "one" / "02_second").exists()


def test_the_scorecard_and_the_papers_table_show_both_suites(book):
    root, _ = book
    scorecard = html(root, "scorecard")
    assert re.findall(r'<th class="head" scope="col"><p>(.*?)</p>', scorecard) == ["Claim", "tiny", "own"]
    assert scorecard.count('<th class="stub" scope="row">') == 2  # claims
    for outcome in ("holds", "contradicted", "not applicable", "as published: ✗ not reproduced"):
        assert outcome in scorecard
    for page in ("experiments/one/01_first", "experiments/own/one/01_first"):
        assert f'href="{page}.html#run-card"' in scorecard
    table = html(root, "papers/of_a")
    assert table.count('rowspan="2"') == 4  # two claims, and what was published of each
    assert "Claims measured with the suites tiny, own" in table
    assert "own number 0.25 [" in text_of(table)


def test_a_page_names_the_suite_that_it_was_run_with(book):
    for folder, name in (("", "tiny.yml"), ("own/", "own")):
        staged = (book[0] / "book" / "experiments" / f"{folder}one" / "01_first.ipynb").read_text("utf-8")
        sources = ["".join(cell["source"]) for cell in json.loads(staged)["cells"]]
        assert f'suite = "{name}"  # as this page was run' in sources


def test_pages_of_the_second_suite_are_reached_from_the_first_and_lead_on(book):
    root, _ = book
    first, own = html(root, "experiments/one/01_first"), html(root, "experiments/own/one/01_first")
    assert "with own" in first  # in the table of contents
    assert 'href="../own/one/01_first.html"' in first
    assert 'href="../../one/01_first.html"' in own
    # A link to an experiment leads to the same suite's page, or to the first one's where that has none.
    assert 'href="../../one/02_second.html"' in own
    assert 'href="../../../intro.html"' in own
    assert not (root / "_build" / "html" / "book" / "experiments" / "own" / "one" / "02_second.html").exists()


def test_the_comparison_draws_each_shared_number_once_and_names_what_is_not_shared(book):
    root, _ = book
    page = html(root, "comparison")
    assert page.count('<figure class="rim-chart">') == 3
    told = text_of(page)
    assert "1 claim was measured on more than one suite" in told
    assert "A2 (tiny holds, own not applicable)" in told
    assert "at least 0.5" in told
    assert "between 0.4 and 0.6" in told
    assert re.search(r"0\.85 \[[\d., ]+\] 0\.25 \[", told)


class _Links(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value or "" for name, value in attrs if tag == "a" and name == "href"]


def test_no_link_is_broken_and_no_page_tells_of_the_machine(book):
    root, _ = book
    for path in sorted((root / "_build" / "html" / "book").rglob("*.html")):
        text = path.read_text(encoding="utf-8")
        assert str(root) not in text
        assert str(root.parent) not in text
        for address in _Links(text).found:
            parts = urlsplit(address)
            if parts.path and not parts.scheme and not parts.netloc:
                assert (path.parent / unquote(parts.path)).exists(), (path.name, address)


@pytest.mark.browser
@pytest.mark.parametrize("theme", THEMES)
def test_the_comparison_is_drawn_in_both_themes_and_fits_a_phone(book, browser, theme):
    root, _ = book
    for width in (1280, 360):
        tab = Visit(browser, theme, width)
        tab.open(root / "_build" / "html" / "book" / "comparison.html")
        assert tab.figures() == [["ok", theme, "drawn"]] * 3
        clipped = tab.tab.evaluate(
            "() => [...document.querySelectorAll('.rim-vega svg')]"
            ".filter(svg => svg.getBoundingClientRect().right > innerWidth).length"
        )
        assert clipped == 0
        assert tab.wrong == []
        tab.context.close()


def test_with_one_suite_the_page_says_how_to_add_one(book, tmp_path, monkeypatch):
    root = shutil.copytree(book[0], tmp_path / "copy")
    monkeypatch.chdir(root)
    staging.stage(root, ["own"])
    tables = root / "book" / "experiments" / "tables"
    assert "rim book --suite own --suite NAME" in (tables / "comparison.md").read_text(encoding="utf-8")
    scorecard = (tables / "scorecard.md").read_text(encoding="utf-8")
    assert re.findall(r'<th class="head" scope="col"><p>(.*?)</p>', scorecard) == ["Claim", "own"]
    assert "has no role risky" in (root / "book" / "experiments" / "one" / "02_second.ipynb").read_text("utf-8")
    assert not list((root / "book" / "experiments").glob("own/*/*.ipynb"))
