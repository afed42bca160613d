"""The page that draws what the book's suites share: `{rim-comparison}`."""

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx

from companion import comparison, notebooks
from companion.comparison import DECIDED, Number
from companion.sphinx.rim_book import _FromData, _note, _paragraph, _table
from rim_core import charts

_ALONE = (
    "This book shows one suite, `{0}`. To put a model of your own beside it, run it, `rim run --suite NAME`, and "
    "build the book with both: `rim book --suite {0} --suite NAME`."
)
_APART = "No claim was measured on more than one of the suites {0} so far. `rim claims` tells what each of them lacks."


class Comparison(_FromData):
    """Every number that at least two suites have, side by side: small figures by claim, and a table a paper."""

    def _draw(self) -> list[nodes.Node]:
        rows = self.rows
        suites = list(dict.fromkeys(row["suite"] for row in rows))
        if len(suites) < 2:
            return [_note(_ALONE.format(*suites))] if suites else [_note("No claims are declared yet.")]
        groups = comparison.shared(comparison.numbers(self.project / "results", rows))
        if not groups:
            return [_note(_APART.format(", ".join(suites)))]
        drawn: list[nodes.Node] = [_paragraph(_agreement(rows))]
        for paper in dict.fromkeys(row["paper"] for row in rows):
            mine = [row for row in rows if row["paper"] == paper]
            drawn += self._paper(mine, [group for group in groups if group[0].paper == paper], suites)
        return drawn

    def _paper(self, rows: list[dict[str, Any]], groups: list[list[Number]], suites: Sequence[str]) -> list[nodes.Node]:
        paper = rows[0]["paper"]
        section = _section(self.title_of(paper), f"compared-{paper}")
        by_claim = {claim: list(each) for claim, each in groupby(groups, lambda group: group[0].claim)}
        shared = [row for row in rows if row["claim"] in by_claim]
        for notebook in dict.fromkeys(row["notebook"] for row in shared):
            title = notebooks.title(notebooks.read_source(self.project, notebook)) or notebook
            inner = _section(title, f"compared-{notebook}")
            for claim in dict.fromkeys(row["claim"] for row in shared if row["notebook"] == notebook):
                inner += self._claim([row for row in rows if row["claim"] == claim], by_claim[claim], suites)
            section += inner
        if groups:
            section += _numbers(groups, suites)
        if rest := [row for row in rows if row["claim"] not in by_claim]:
            section += _paragraph(f"Not compared, since fewer than two suites have a number: {_states(rest)}.")
        return [section]

    def _claim(self, rows: list[dict[str, Any]], groups: list[list[Number]], suites: Sequence[str]) -> list[nodes.Node]:
        stated = _paragraph(nodes.strong("", rows[0]["claim"]), " ", rows[0]["statement"])
        verdicts = nodes.container(classes=["rim-verdicts"])
        for row in rows:
            verdict = self.outcome(row)
            verdict.insert(0, [nodes.literal("", row["suite"]), nodes.Text(" ")])
            verdicts += verdict
        figures = "".join(charts.render(comparison.figure(group, suites).to_dict())["text/html"] for group in groups)
        return [stated, verdicts, nodes.raw("", f'<div class="rim-panels">{figures}</div>', format="html")]


def _agreement(rows: list[dict[str, Any]]) -> str:
    claims: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row["outcome"] in DECIDED:
            claims.setdefault((row["paper"], row["claim"]), []).append(row["outcome"])
    shared = [each for each in claims.values() if len(each) > 1]
    alike = sum(len(set(each)) == 1 for each in shared)
    measured = "1 claim was" if len(shared) == 1 else f"{len(shared)} claims were"
    return f"{measured} measured on more than one suite, {alike} with the same outcome on all of them."


def _states(rows: list[dict[str, Any]]) -> str:
    """What became of some claims: `C3 (a validated, b not tested); C5 (...)`."""
    told = []
    for claim, each in groupby(rows, lambda row: row["claim"]):
        states = ", ".join(f"{row['suite']} {row['outcome'].replace('_', ' ')}" for row in each)
        told.append(f"{claim} ({states})")
    return "; ".join(told)


def _section(title: str, name: str) -> nodes.section:
    return nodes.section("", nodes.title("", title), ids=[nodes.make_id(name)])


def _numbers(groups: list[list[Number]], suites: Sequence[str]) -> nodes.table:
    lines = []
    for group in groups:
        one, texts = group[0], {number.suite: number.text for number in group}
        name = _paragraph(nodes.strong("", one.claim), f" {one.title}")
        unit = [_paragraph(one.unit)] if one.unit else []
        lines.append([[name, *unit], one.asked or "–", *(texts.get(suite, "–") for suite in suites)])
    head = ["Number", "Rule", *suites]
    return _table(head, lines, caption="Every shared number, with its 95 % interval")


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directive."""
    app.add_directive("rim-comparison", Comparison)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
