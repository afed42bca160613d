"""The book's Sphinx extension: figures drawn offline, and tables read from results when the book is built."""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.docutils import SphinxDirective
from sphinx.util.osutil import relative_uri

from companion import scorecard
from companion.pages.staging import SUITES
from rim_core import charts
from rim_core.paths import suite_name
from rim_core.verdicts import rules

ASSETS = Path(__file__).resolve().parents[2] / "book" / "assets"
# In this order: vega-lite needs vega, vega-embed needs both, charts.js needs all three.
SCRIPTS = ("vega/vega.min.js", "vega/vega-lite.min.js", "vega/vega-embed.min.js", "charts.js")
MEASURED = Path("rim_core/organisms/smollm2/measured.json")
PERFORMANCE = Path("book/assets/performance.json")
PAPER_SCALE = Path("book/assets/paper-scale.json")

Cell = str | nodes.Node | list[nodes.Node]


def _paragraph(*parts: str | nodes.Node) -> nodes.paragraph:
    inline = (nodes.Text(part) if isinstance(part, str) else part for part in parts)
    # Commands may stand in the text, and "--suite" must stay as it is.
    return nodes.paragraph("", "", *inline, support_smartquotes=False)


def _blocks(cell: Cell) -> list[nodes.Node]:
    if isinstance(cell, str):
        return [_paragraph(cell)]
    return cell if isinstance(cell, list) else [cell]


def _table(head: Sequence[str], rows: Iterable[Sequence[Cell | None]], caption: str, stubs: int = 1) -> nodes.table:
    """A table whose first `stubs` columns are row headers; None continues the cell above it."""
    table = nodes.table("", nodes.title("", caption), classes=["rim-table"])
    group = nodes.tgroup(cols=len(head))
    table += group
    for column in range(len(head)):
        spec = nodes.colspec(colwidth=1)
        if column < stubs:
            spec["stub"] = 1
        group += spec

    group += nodes.thead("", nodes.row("", *(nodes.entry("", *_blocks(cell)) for cell in head)))
    above: list[nodes.entry] = [nodes.entry()] * len(head)
    body = nodes.tbody()
    for cells in rows:
        line = nodes.row()
        for column, cell in enumerate(cells):
            if cell is None:
                above[column]["morerows"] = above[column].get("morerows", 0) + 1
            else:
                above[column] = nodes.entry("", *_blocks(cell))
                line += above[column]
        body += line
    group += body
    return table


def _note(text: str) -> nodes.note:
    """A note; words between backticks are set as code."""
    parts = re.split(r"`([^`]+)`", text)
    inline = [nodes.literal("", part) if i % 2 else part for i, part in enumerate(parts)]
    return nodes.note("", _paragraph(*inline))


class _FromData(SphinxDirective):
    """A directive whose page is read again at every build, since the data under it may have changed."""

    has_content = False

    @property
    def project(self) -> Path:
        return Path(self.env.srcdir)

    def run(self) -> list[nodes.Node]:
        self.env.note_reread()
        return self._draw()

    def _draw(self) -> list[nodes.Node]:
        raise NotImplementedError

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The scorecard of the suites that the book was staged with, in their order; else of those with results."""
        staged = self.project / SUITES
        given = json.loads(staged.read_text(encoding="utf-8")) if staged.is_file() else None
        rows = scorecard.scorecard(self.project, given)
        # Of a suite's own file only the name: pages tell nothing of the machine.
        files = {suite_name(suite): suite for suite in given or [] if suite != suite_name(suite)}
        for row in rows:
            if file := files.get(row["suite"]):
                row["reasons"] = [reason.replace(file, Path(file).name) for reason in row["reasons"]]
        for row in rows:
            if stale := scorecard.stale_text(row):
                row["reasons"].append(stale)
        return rows

    def page_of(self, notebook: str | None, suite: str) -> str | None:
        """The document staged for `notebook` as run with `suite`, where there is one."""
        if notebook is None:
            return None
        for name in (f"book/experiments/{notebook}", f"book/experiments/{suite}/{notebook}"):
            path = self.project / f"{name}.ipynb"
            if path.is_file() and name in self.env.found_docs:
                metadata = json.loads(path.read_text(encoding="utf-8"))["metadata"]
                if metadata.get("rim", {}).get("suite") == suite:
                    return name
        return None

    def title_of(self, paper: str) -> str:
        """A paper's letter and title, as its file of claims states them."""
        text = (self.project / "book" / "claims" / f"{paper}.yml").read_text(encoding="utf-8")
        stated = yaml.safe_load(text)
        return f"{stated['letter']}. {stated['title']}"

    def link(self, text: str, page: str, anchor: str = "") -> nodes.reference:
        uri = relative_uri(f"{self.env.docname}.html", f"{page}.html") + anchor
        return nodes.reference("", text, internal=True, refuri=uri)

    def outcome(self, row: dict[str, Any]) -> nodes.paragraph:
        """An outcome's symbol and word, linked to the experiment and its run card where the book has them."""
        words = f"{rules.SYMBOLS[row['outcome']]} {row['outcome'].replace('_', ' ')}"
        words += {True: ", stale", False: "", None: ", perhaps stale"}[row["stale"]]
        page = self.page_of(row["notebook"], row["suite"])
        if page is None:
            parts: list[nodes.Node | str] = [words]
        else:
            parts = [self.link(words, page), " (", self.link("run", page, "#run-card"), ")"]
        paragraph = _paragraph(*parts)
        paragraph["classes"] = ["rim-outcome", f"rim-{row['outcome'].replace('_', '-')}"]
        return paragraph


class Scorecard(_FromData):
    """Every claim against every suite: `{rim-scorecard}`."""

    def _draw(self) -> list[nodes.Node]:
        rows = self.rows
        suites = list(dict.fromkeys(row["suite"] for row in rows))
        tables: list[nodes.Node] = []
        for paper in dict.fromkeys(row["paper"] for row in rows):
            cells = {(row["claim"], row["suite"]): row for row in rows if row["paper"] == paper}
            statements = {claim: row["statement"] for (claim, _), row in cells.items()}
            lines = [
                [
                    _paragraph(nodes.strong("", claim), " ", statement),
                    *(self.outcome(cells[claim, suite]) for suite in suites),
                ]
                for claim, statement in statements.items()
            ]
            tables.append(_table(["Claim", *suites], lines, caption=self.title_of(paper)))
        return tables or [_note("No claims are declared yet.")]


class Claims(_FromData):
    """The claims of one paper, what was published, what was measured: `{rim-claims} self_aware`."""

    required_arguments = 1

    def _draw(self) -> list[nodes.Node]:
        rows = [row for row in self.rows if row["paper"] == self.arguments[0]]
        if not rows:
            return [_note("No claims are declared for this paper yet.")]
        suites = list(dict.fromkeys(row["suite"] for row in rows))
        several = len(suites) > 1
        lines: list[list[Cell | None]] = []
        for row in rows:
            # A claim's rows, one a suite, share its first cells.
            first = row["suite"] == suites[0]
            claim = _paragraph(nodes.strong("", row["claim"]), " ", row["statement"])
            measured = rules.number_text(row["value"], row["low"], row["high"])
            lines.append(
                [
                    claim if first else None,
                    (row["published"] or "–") if first else None,
                    _paragraph(nodes.strong("", row["suite"]), f" {measured}") if several else measured,
                    [self.outcome(row), *(_paragraph(part) for part in row["reasons"])],
                ]
            )
        head = ["Claim", "Published", "Measured", "Outcome"]
        suite = f"suite{'s' if several else ''} {', '.join(suites)}"
        return [_table(head, lines, caption=f"Claims measured with the {suite}")]


class Organisms(_FromData):
    """The default suite's roles as measured, in a figure and a table: `{rim-organisms}`."""

    def _draw(self) -> list[nodes.Node]:
        path = self.project / MEASURED
        self.env.note_dependency(str(path))
        if not path.is_file():
            return [_note("The roles have not been measured yet: run `rim organisms check`.")]
        rows = json.loads(path.read_text(encoding="utf-8"))
        lines = [
            [
                row["role"],
                row["metric"].replace("_", " "),
                rules.number_text(row["estimate"], row["low"], row["high"]),
                str(row["n"]),
                str(row["target"]) if row["target"] is not None else "–",
                {True: "✔ met", False: "✘ not met", None: "–"}[row["met"]],
            ]
            for row in rows
        ]
        head = ["Role", "Measure", "Measured (95 % interval)", "n", "Target", "Outcome"]
        table = _table(head, lines, caption="The roles of the default suite on held-out prompts", stubs=2)
        return [_figure(rows), table]


def _figure(rows: list[dict[str, Any]]) -> nodes.raw:
    import pandas as pd

    frame = pd.DataFrame(rows).assign(metric=[row["metric"].replace("_", " ") for row in rows])
    shares = frame[frame["estimate"].between(0, 1)]
    chart = charts.intervals(
        shares,
        "estimate",
        label="metric",
        series="role",
        title="What each role does on held-out prompts",
        x_title="share",
        description="Dots with 95 % intervals: for every behaviour measured, the share of held-out prompts "
        "on which each role of the default suite shows it. The table below holds the same numbers.",
    )
    return nodes.raw("", charts.render(chart.to_dict())["text/html"], format="html")


class Performance(_FromData):
    """What `make bench` measured: `{rim-performance} PART`, a benchmark's name, `machine`, `targets`, `estimate`
    or `paper-scale`."""

    required_arguments = 1

    def _draw(self) -> list[nodes.Node]:
        part = self.arguments[0]
        name, command = PERFORMANCE, "make bench"
        if part == "paper-scale":
            name, command = PAPER_SCALE, f"python -m benchmarks.paper_scale --out {PAPER_SCALE}"
        path = self.project / name
        self.env.note_dependency(str(path))
        if not path.is_file():
            return [_note(f"Not measured yet: run `{command}`.")]
        content = json.loads(path.read_text(encoding="utf-8"))
        if part == "machine":
            return [_machine(content)]
        if part == "targets":
            return [_targets(content["rows"])]
        if part == "estimate":
            return [_quantities(content["estimate"], "Paper C at its own size, by arithmetic")]
        if part == "paper-scale":
            return [_machine(content), _quantities(content["rows"], "Paper C at its own size, random weights")]
        rows = [row for row in content["rows"] if row["benchmark"] == part]
        return [*_ratios(part, rows), _comparisons(rows)] if rows else [_note("Not measured yet.")]


def _machine(content: dict[str, Any]) -> nodes.paragraph:
    machine = content["machine"]
    where = f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, {machine['memory_gb']} GB"
    if "gpu" in machine:
        where = f"{machine['gpu']}; {where}"
    packages = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    return _paragraph(f"Measured on: {where}. Python {machine['python']}, {packages}.")


def _ratio(row: dict[str, Any]) -> str:
    return f"{row['ratio']:.3g} ({row['low']:.3g} to {row['high']:.3g})"


def _goal(row: dict[str, Any]) -> str:
    return f"{'at least' if row['at_least'] else 'at most'} {row['target']:g}"


def _targets(rows: list[dict[str, Any]]) -> nodes.table:
    lines = [
        [
            f"{row['benchmark']}: {row['case']}",
            row["peer"],
            _ratio(row),
            _goal(row),
            "✔ met" if row["met"] else "✘ missed",
        ]
        for row in rows
        if row["target"] is not None
    ]
    head = ["Measured", "Compared with", "Ratio (range)", "Target", "Outcome"]
    return _table(head, lines, caption="Targets")


def _comparisons(rows: list[dict[str, Any]]) -> nodes.table:
    lines = [
        [
            [_paragraph(row["case"]), _paragraph(nodes.emphasis("", row["note"]))] if row["note"] else row["case"],
            row["peer"],
            f"{row['ours']:.3g} {row['unit']}",
            f"{row['theirs']:.3g} {row['unit']}",
            _ratio(row),
            "–" if row["difference"] is None else f"{row['difference']:.0e}",
        ]
        for row in rows
    ]
    head = ["Case", "Compared with", "rim_core", "The other", "Ratio (range)", "Results differ by"]
    return _table(head, lines, caption="Medians, and the range over the repeats")


def _quantities(rows: list[dict[str, Any]], caption: str) -> nodes.table:
    lines = [[row["quantity"], f"{row['value']:.3g} {row['unit']}".strip(), row["note"] or "–"] for row in rows]
    return _table(["Quantity", "Value", "How"], lines, caption=caption)


# Benchmarks that get a figure: its title, its axis, what its numbers are.
_FIGURES = {
    "heads": ("How much faster is patching every head?", "times faster", "how many times faster rim_core is"),
    "growth": (
        "How far is patching from the arithmetic limit?",
        "time over the limit's",
        "how many times longer rim_core takes than the products alone would",
    ),
}


def _ratios(benchmark: str, rows: list[dict[str, Any]]) -> list[nodes.raw]:
    import pandas as pd

    if benchmark not in _FIGURES:
        return []
    title, axis, what = _FIGURES[benchmark]
    chart = charts.intervals(
        pd.DataFrame(rows),
        "ratio",
        label="case",
        series="peer",
        title=title,
        x_title=axis,
        description=f"Dots with the range over repeats: {what}, by case. The table below holds the same numbers.",
    )
    return [nodes.raw("", charts.render(chart.to_dict())["text/html"], format="html")]


def _repair_page(
    app: Sphinx, pagename: str, templatename: str, context: dict[str, Any], doctree: nodes.document | None
) -> None:
    """Keep the first of equal scripts: sphinx-thebe adds its constants twice, an error in every browser.

    The bibliography's entries become items of the list they stand in, which docutils' role for them is not.
    """
    kept: dict[str, Any] = {}
    for script in context.get("script_files", []):
        body = getattr(script, "attributes", {}).get("body")
        kept.setdefault(body or str(getattr(script, "filename", script)), script)
    context["script_files"] = list(kept.values())
    if "body" in context:
        context["body"] = context["body"].replace('role="doc-biblioentry"', 'role="listitem"')


def _forget_late_style(app: Sphinx) -> None:
    """Remove myst-nb's style sheet, which it copies after the pages are written: only a second build would
    find it and stamp its checksum into them, and equal results must give equal pages."""
    for path in (Path(app.outdir) / "_static").glob("mystnb.*.css"):
        path.unlink()


def _write_all(app: Sphinx, env: BuildEnvironment) -> list[str]:
    """Write every page at every build: from the search index Sphinx 7 drops the terms of unwritten pages."""
    return sorted(env.found_docs)


class Diagram(SphinxDirective):
    """`{rim-diagram} name`: the drawing `assets/diagrams/name.svg`, inline, so that it follows light and dark mode.

    The drawing's `<title>` and `<desc>` are what a screen reader says; the content is the caption.
    """

    has_content = True
    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """The drawing as it is, in a figure."""
        path = ASSETS / "diagrams" / f"{self.arguments[0]}.svg"
        self.env.note_dependency(str(path))
        try:
            drawing = path.read_text(encoding="utf-8")
        except OSError:
            raise self.error(f"there is no drawing {path.name} in {path.parent}") from None
        opening = nodes.raw("", f'<figure class="rim-diagram">{drawing}<figcaption>', format="html")
        return [opening, *self.parse_content_to_nodes(), nodes.raw("", "</figcaption></figure>", format="html")]


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the assets, the directives, and the repairs of the theme."""
    app.config.html_static_path.append(str(ASSETS))
    for i, script in enumerate(SCRIPTS):
        app.add_js_file(script, priority=600 + i)
    app.add_css_file("rim.css")
    app.add_directive("rim-scorecard", Scorecard)
    app.add_directive("rim-claims", Claims)
    app.add_directive("rim-organisms", Organisms)
    app.add_directive("rim-performance", Performance)
    app.add_directive("rim-diagram", Diagram)
    app.connect("builder-inited", _forget_late_style)
    app.connect("env-updated", _write_all)
    app.connect("html-page-context", _repair_page, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
