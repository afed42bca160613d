"""The book's tables as texts that its pages include: staging writes them, so that Sphinx reads no results.

A text is Markdown. Tables and figures in it are HTML: Markdown's own tables have neither row headers nor cells that
span rows.
"""

import json
import posixpath
import re
from collections.abc import Mapping, Sequence
from itertools import groupby, takewhile
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from markupsafe import Markup, escape

from companion import comparison, notebooks
from companion.comparison import DECIDED, Number
from rim_core import charts
from rim_core.verdicts.rules import SYMBOLS, number_text

MEASURED = Path("rim_core/organisms/smollm2/measured.json")
PERFORMANCE = Path("book/assets/performance.json")
PAPER_SCALE = Path("book/assets/paper-scale.json")

Row = Mapping[str, Any]
Cell = str | list[str]  # a list is of paragraphs; Markup stays as it is, other text is escaped


def texts(project: Path, rows: Sequence[Row], documents: Mapping[tuple[str, str], str]) -> dict[str, str]:
    """Every text by its name.

    Args:
        project: the project's folder.
        rows: of the scorecard, for the book's suites in their order; their reasons are shown as they are.
        documents: the page of each notebook as run with each suite, by `(notebook, suite)`.
    """
    papers = {path.stem: yaml.safe_load(path.read_text("utf-8")) for path in _claim_files(project)}
    titles = {name: ". ".join(map(str, _stated(paper))) or name for name, paper in papers.items()}
    own = {paper: [row for row in rows if row["paper"] == paper] for paper in titles}
    return {
        "scorecard": _scorecard(rows, titles, _Links(documents, "book")),
        "comparison": _comparison(project, rows, titles, _Links(documents, "book")),
        **{f"claims-{paper}": _claims(own[paper], _Links(documents, "book/papers")) for paper in titles},
        "organisms": _organisms(project),
        **{f"performance-{part}": text for part, text in _performance(project).items()},
    }


def _stated(paper: Mapping[str, Any]) -> list[Any]:
    return [paper[key] for key in ("letter", "title") if key in paper]


def _claim_files(project: Path) -> list[Path]:
    return sorted((project / "book" / "claims").glob("*.yml"))


# --- parts of a text ----------------------------------------------------------------------------------------


def _html(content: str) -> str:
    return f"`````{{raw}} html\n{content}\n`````\n"


def _note(text: str) -> str:
    return f"```{{note}}\n{text}\n```\n"


def _plain(text: str) -> str:
    """Text that Markdown takes as it is."""
    return re.sub(r"([!-/:-@\[-`{-~])", r"\\\1", text)


def _table(head: Sequence[str], rows: Sequence[Sequence[Cell | None]], caption: str, stubs: int = 1) -> str:
    """A table whose first `stubs` columns are row headers; None continues the cell above it."""
    columns = Markup("").join(Markup('<th class="head" scope="col"><p>{}</p></th>').format(name) for name in head)
    lines = []
    for number, row in enumerate(rows):
        cells = []
        for column, cell in enumerate(row):
            if cell is None:
                continue
            span = 1 + sum(1 for _ in takewhile(lambda later: later[column] is None, rows[number + 1 :]))  # noqa: B023
            spans = Markup(' rowspan="{}"').format(span) if span > 1 else ""
            parts = cell if isinstance(cell, list) else [cell]
            text = Markup("").join(Markup("<p>{}</p>").format(part) for part in parts)
            opening, closing = ('th class="stub" scope="row"', "th") if column < stubs else ("td", "td")
            cells.append(Markup(f"<{opening}{spans}>{text}</{closing}>"))
        lines.append(Markup("<tr>{}</tr>").format(Markup("").join(cells)))
    return _html(
        '<div class="pst-scrollable-table-container"><table class="rim-table table">'
        f"<caption>{escape(caption)}</caption><thead><tr>{columns}</tr></thead>\n<tbody>\n"
        + "\n".join(lines)
        + "\n</tbody></table></div>"
    )


def _strong(word: str, text: str = "") -> Markup:
    return Markup("<strong>{}</strong> {}").format(word, text)


def _figure(chart: Any) -> str:
    return str(charts.render(chart.to_dict())["text/html"])


class _Links:
    """Outcomes, linked from a page in `folder` to the experiment and its run card where the book has them."""

    def __init__(self, documents: Mapping[tuple[str, str], str], folder: str) -> None:
        self.documents, self.folder = documents, folder

    def outcome(self, row: Row) -> Markup:
        """Symbol, word and whether it is stale."""
        words = f"{SYMBOLS[row['outcome']]} {row['outcome'].replace('_', ' ')}"
        words += {True: ", stale", False: "", None: ", perhaps stale"}[row["stale"]]
        page = self.documents.get((row["notebook"], row["suite"]))
        shown = escape(words)
        if page is not None:
            address = posixpath.relpath(f"{page}.html", self.folder)
            link = '<a class="reference internal" href="{0}">{1}</a> '
            shown = Markup(link + '(<a class="reference internal" href="{0}#run-card">run</a>)').format(address, words)
        name = row["outcome"].replace("_", "-")
        return Markup('<span class="rim-outcome rim-{}">{}</span>').format(name, shown)


# --- claims ---------------------------------------------------------------------------------------------------


def _suites(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["suite"] for row in rows))


def _scorecard(rows: Sequence[Row], titles: Mapping[str, str], links: _Links) -> str:
    """A table a paper: each claim against each suite."""
    tables = []
    for paper, of_paper in groupby(rows, lambda row: row["paper"]):
        lines: list[list[Cell | None]] = []
        for claim, each in groupby(of_paper, lambda row: row["claim"]):
            found = list(each)
            lines.append([_strong(claim, found[0]["statement"]), *(links.outcome(row) for row in found)])
        tables.append(_table(["Claim", *_suites(rows)], lines, titles[paper]))
    return "\n".join(tables) or _note("No claims are declared yet.")


def _claims(rows: Sequence[Row], links: _Links) -> str:
    """The claims of one paper: what was published, what was measured. A claim's rows, one a suite, share cells."""
    if not rows:
        return _note("No claims are declared for this paper yet.")
    suites = _suites(rows)
    lines: list[list[Cell | None]] = []
    for row in rows:
        first = row["suite"] == suites[0]
        measured = number_text(row["value"], row["low"], row["high"])
        lines.append(
            [
                _strong(row["claim"], row["statement"]) if first else None,
                (row["published"] or "–") if first else None,
                _strong(row["suite"], measured) if len(suites) > 1 else measured,
                [links.outcome(row), *row["reasons"]],
            ]
        )
    named = f"suite{'s' if len(suites) > 1 else ''} {', '.join(suites)}"
    return _table(["Claim", "Published", "Measured", "Outcome"], lines, f"Claims measured with the {named}")


def _comparison(project: Path, rows: Sequence[Row], titles: Mapping[str, str], links: _Links) -> str:
    """Every number that at least two suites have, side by side: small figures by claim, and a table a paper."""
    suites = _suites(rows)
    if not suites:
        return _note("No claims are declared yet.")
    if len(suites) < 2:
        return _note(
            f"This book shows one suite, `{suites[0]}`. To put a model of your own beside it, run it, `rim run --suite "
            f"NAME`, and build the book with both: `rim book --suite {suites[0]} --suite NAME`."
        )
    groups = comparison.shared(comparison.numbers(project / "results", rows))
    if not groups:
        named = ", ".join(f"`{suite}`" for suite in suites)
        return _note(
            f"No claim was measured on more than one of the suites {named} so far. `rim claims` tells what each of "
            "them lacks."
        )
    parts = [_agreement(rows)]
    for paper, each in groupby(rows, lambda row: row["paper"]):
        parts += [f"## {_plain(titles[paper])}"]
        parts += _compared(project, list(each), [group for group in groups if group[0].paper == paper], suites, links)
    return "\n\n".join(parts) + "\n"


def _compared(
    project: Path, rows: Sequence[Row], groups: Sequence[list[Number]], suites: Sequence[str], links: _Links
) -> list[str]:
    by_claim = {claim: list(each) for claim, each in groupby(groups, lambda group: group[0].claim)}
    shared = [row for row in rows if row["claim"] in by_claim]
    parts = []
    for notebook in dict.fromkeys(row["notebook"] for row in shared):
        title = notebooks.title(notebooks.read_source(project, notebook)) or notebook
        parts.append(f"### {_plain(title)}")
        for claim in dict.fromkeys(row["claim"] for row in shared if row["notebook"] == notebook):
            mine = [row for row in rows if row["claim"] == claim]
            verdicts = Markup("").join(
                Markup("<p><code>{}</code> {}</p>").format(row["suite"], links.outcome(row)) for row in mine
            )
            figures = "".join(_figure(comparison.figure(group, suites)) for group in by_claim[claim])
            stated = Markup("<p>{}</p>").format(_strong(claim, mine[0]["statement"]))
            inner = f'<div class="rim-verdicts">{verdicts}</div><div class="rim-panels">{figures}</div>'
            parts.append(_html(f"{stated}{inner}"))
    if groups:
        parts.append(_numbers(groups, suites))
    if rest := [row for row in rows if row["claim"] not in by_claim]:
        parts.append(f"Not compared, since fewer than two suites have a number: {_plain(_states(rest))}.")
    return parts


def _agreement(rows: Sequence[Row]) -> str:
    claims: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row["outcome"] in DECIDED:
            claims.setdefault((row["paper"], row["claim"]), []).append(row["outcome"])
    shared = [each for each in claims.values() if len(each) > 1]
    alike = sum(len(set(each)) == 1 for each in shared)
    measured = "1 claim was" if len(shared) == 1 else f"{len(shared)} claims were"
    return f"{measured} measured on more than one suite, {alike} with the same outcome on all of them."


def _states(rows: Sequence[Row]) -> str:
    """What became of some claims: `C3 (a validated, b not tested); C5 (...)`."""
    told = []
    for claim, each in groupby(rows, lambda row: row["claim"]):
        states = ", ".join(f"{row['suite']} {row['outcome'].replace('_', ' ')}" for row in each)
        told.append(f"{claim} ({states})")
    return "; ".join(told)


def _numbers(groups: Sequence[list[Number]], suites: Sequence[str]) -> str:
    lines: list[list[Cell | None]] = []
    for group in groups:
        one, told = group[0], {number.suite: number.text for number in group}
        name: Cell = [_strong(one.claim, one.title), *([one.unit] if one.unit else [])]
        lines.append([name, one.asked or "–", *(told.get(suite, "–") for suite in suites)])
    return _table(["Number", "Rule", *suites], lines, "Every shared number, with its 95 % interval")


# --- the default organism -----------------------------------------------------------------------------------


def _organisms(project: Path) -> str:
    """The default suite's roles as measured, in a figure and a table."""
    path = project / MEASURED
    if not path.is_file():
        return _note("The roles have not been measured yet: run `rim organisms check`.")
    rows = [{**row, "metric": row["metric"].replace("_", " ")} for row in json.loads(path.read_text("utf-8"))]
    met = {True: "✔ met", False: "✘ not met", None: "–"}
    lines: list[list[Cell | None]] = [
        [
            row["role"],
            row["metric"],
            number_text(row["estimate"], row["low"], row["high"]),
            str(row["n"]),
            str(row["target"]) if row["target"] is not None else "–",
            met[row["met"]],
        ]
        for row in rows
    ]
    head = ["Role", "Measure", "Measured (95 % interval)", "n", "Target", "Outcome"]
    frame = pd.DataFrame(rows)
    chart = charts.intervals(
        frame[frame["estimate"].between(0, 1)],
        "estimate",
        label="metric",
        series="role",
        title="What each role does on held-out prompts",
        x_title="share",
        description="Dots with 95 % intervals: for every behaviour measured, the share of held-out prompts "
        "on which each role of the default suite shows it. The table below holds the same numbers.",
    )
    table = _table(head, lines, "The roles of the default suite on held-out prompts", stubs=2)
    return f"{_html(_figure(chart))}\n{table}"


# --- speed and memory ---------------------------------------------------------------------------------------

# Benchmarks with a figure: its title, its axis, what its numbers are.
_FIGURES = {
    "heads": ("How much faster is patching every head?", "times faster", "how many times faster rim_core is"),
    "growth": (
        "How far is patching from the arithmetic limit?",
        "time over the limit's",
        "how many times longer rim_core takes than the products alone would",
    ),
}
_BENCHMARKS = ("heads", "components", "growth", "generation", "capture", "memory")


def _performance(project: Path) -> dict[str, str]:
    """What `make bench` measured, by part of the page."""
    measured, scaled = (
        json.loads((project / path).read_text("utf-8")) if (project / path).is_file() else None
        for path in (PERFORMANCE, PAPER_SCALE)
    )
    names = ("machine", "targets", *_BENCHMARKS, "estimate")
    parts = dict.fromkeys(names, _note("Not measured yet: run `make bench`."))
    parts["paper-scale"] = _note(f"Not measured yet: run `python -m benchmarks.paper_scale --out {PAPER_SCALE}`.")
    if measured is not None:
        parts |= {name: _benchmark(name, measured["rows"]) for name in _BENCHMARKS}
        parts["machine"] = _machine(measured)
        parts["targets"] = _targets(measured["rows"])
        parts["estimate"] = _quantities(measured["estimate"], "Paper C at its own size, by arithmetic")
    if scaled is not None:
        quantities = _quantities(scaled["rows"], "Paper C at its own size, random weights")
        parts["paper-scale"] = f"{_machine(scaled)}\n{quantities}"
    return parts


def _machine(content: Row) -> str:
    machine = content["machine"]
    where = f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, {machine['memory_gb']} GB"
    if "gpu" in machine:
        where = f"{machine['gpu']}; {where}"
    packages = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    return _plain(f"Measured on: {where}. Python {machine['python']}, {packages}.") + "\n"


def _ratio(row: Row) -> str:
    return f"{row['ratio']:.3g} ({row['low']:.3g} to {row['high']:.3g})"


def _targets(rows: Sequence[Row]) -> str:
    lines: list[list[Cell | None]] = [
        [
            f"{row['benchmark']}: {row['case']}",
            row["peer"],
            _ratio(row),
            f"{'at least' if row['at_least'] else 'at most'} {row['target']:g}",
            "✔ met" if row["met"] else "✘ missed",
        ]
        for row in rows
        if row["target"] is not None
    ]
    return _table(["Measured", "Compared with", "Ratio (range)", "Target", "Outcome"], lines, "Targets")


def _benchmark(name: str, every: Sequence[Row]) -> str:
    rows = [row for row in every if row["benchmark"] == name]
    if not rows:
        return _note("Not measured yet.")
    lines: list[list[Cell | None]] = [
        [
            [row["case"], *([Markup("<em>{}</em>").format(row["note"])] if row["note"] else [])],
            row["peer"],
            f"{row['ours']:.3g} {row['unit']}",
            f"{row['theirs']:.3g} {row['unit']}",
            _ratio(row),
            "–" if row["difference"] is None else f"{row['difference']:.0e}",
        ]
        for row in rows
    ]
    head = ["Case", "Compared with", "rim_core", "The other", "Ratio (range)", "Results differ by"]
    table = _table(head, lines, "Medians, and the range over the repeats")
    if name not in _FIGURES:
        return table
    title, axis, what = _FIGURES[name]
    chart = charts.intervals(
        pd.DataFrame(rows),
        "ratio",
        label="case",
        series="peer",
        title=title,
        x_title=axis,
        description=f"Dots with the range over repeats: {what}, by case. The table below holds the same numbers.",
    )
    return f"{_html(_figure(chart))}\n{table}"


def _quantities(rows: Sequence[Row], caption: str) -> str:
    lines: list[list[Cell | None]] = [
        [row["quantity"], f"{row['value']:.3g} {row['unit']}".strip(), row["note"] or "–"] for row in rows
    ]
    return _table(["Quantity", "Value", "How"], lines, caption)
