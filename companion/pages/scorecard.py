"""The scorecard, the claims of a paper and the comparison of suites, as texts that the book's pages include.

Staging writes them, so that Sphinx reads no results.
"""

import posixpath
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path

from markupsafe import Markup, escape

from companion import comparison, notebooks
from companion.comparison import DECIDED, Number
from companion.pages.markup import Cell, Row, figure, folded, html, note, plain, strong, table
from companion.pages.measured import organisms, performance, prompts
from rim_core.verdicts.rules import number_text, outcome_text, reproduced_text
from rim_core.verdicts.schema import Change, Paper, every_paper


def texts(project: Path, rows: Sequence[Row], documents: Mapping[tuple[str, str], str]) -> dict[str, str]:
    """Every text by its name.

    Args:
        project: the project's folder.
        rows: of the scorecard, for the book's suites in their order; their reasons are shown as they are.
        documents: the page of each notebook as run with each suite, by `(notebook, suite)`.
    """
    papers = every_paper(project / "book" / "claims")
    titles = {each.paper: ". ".join(filter(None, [each.letter, each.title])) or each.paper for each in papers}
    own = {paper: [row for row in rows if row["paper"] == paper] for paper in titles}
    return {
        "scorecard": _scorecard(rows, titles, _Links(documents, "book")),
        "comparison": _comparison(project, rows, titles, _Links(documents, "book")),
        "changes": _changes(papers, titles),
        **{f"claims-{paper}": _claims(own[paper], _Links(documents, "book/papers")) for paper in titles},
        "organisms": organisms(project),
        "prompts": prompts(),
        **{f"performance-{part}": text for part, text in performance(project).items()},
    }


class _Links:
    """Outcomes, linked from a page in `folder` to the experiment and its run card where the book has them."""

    def __init__(self, documents: Mapping[tuple[str, str], str], folder: str) -> None:
        self.documents, self.folder = documents, folder

    def outcome(self, row: Row) -> Markup:
        """Symbol, word and whether it is stale."""
        words = outcome_text(row["outcome"])
        words += {True: ", stale", False: "", None: ", perhaps stale"}[row["stale"]]
        page = self.documents.get((row["notebook"], row["suite"]))
        shown = escape(words)
        if page is not None:
            address = posixpath.relpath(f"{page}.html", self.folder)
            link = '<a class="reference internal" href="{0}">{1}</a> '
            shown = Markup(link + '(<a class="reference internal" href="{0}#run-card">run</a>)').format(address, words)
        name = row["outcome"].replace("_", "-")
        return Markup('<span class="rim-outcome rim-{}">{}</span>').format(name, shown)

    def both(self, row: Row) -> list[str]:
        """Whether the claim holds, and under it what the paper's own method gave, where a paper has one."""
        published = [f"as published: {reproduced_text(row['reproduced'])}"] if row["reproduced"] else []
        return [self.outcome(row), *published]


def _suites(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["suite"] for row in rows))


def _scorecard(rows: Sequence[Row], titles: Mapping[str, str], links: _Links) -> str:
    """A table a paper: each claim against each suite."""
    tables = []
    for paper, of_paper in groupby(rows, lambda row: row["paper"]):
        lines: list[list[Cell | None]] = []
        for claim, each in groupby(of_paper, lambda row: row["claim"]):
            found = list(each)
            lines.append([strong(claim, found[0]["statement"]), *(links.both(row) for row in found)])
        tables.append(table(["Claim", *_suites(rows)], lines, titles[paper]))
    return "\n".join(tables) or note("No claims are declared yet.")


def _claims(rows: Sequence[Row], links: _Links) -> str:
    """The claims of one paper: what was published, what was measured. A claim's rows, one a suite, share cells."""
    if not rows:
        return note("No claims are declared for this paper yet.")
    suites = _suites(rows)
    lines: list[list[Cell | None]] = []
    for row in rows:
        first = row["suite"] == suites[0]
        measured = number_text(row["value"], row["low"], row["high"])
        measured = f"{row['number'].replace('_', ' ')} {measured}".strip()
        lines.append(
            [
                strong(row["claim"], row["statement"]) if first else None,
                (row["published"] or "–") if first else None,
                strong(row["suite"], measured) if len(suites) > 1 else measured,
                [*links.both(row), folded("Each part against its rule", row["reasons"])],
            ]
        )
    named = f"suite{'s' if len(suites) > 1 else ''} {', '.join(suites)}"
    return table(["Claim", "Published", "Measured", "Outcome"], lines, f"Claims measured with the {named}")


def _changes(papers: Sequence[Paper], titles: Mapping[str, str]) -> str:
    """A list a paper: what was changed in each claim's rules, when, why, and what had been seen by then."""
    lists = []
    for paper in papers:
        items = []
        for claim in paper.claims:
            told = Markup("").join(_change(change) for change in claim.changes)
            items.append(Markup("<li><p>{}</p><ul>{}</ul></li>").format(strong(claim.id, claim.statement), told))
        if items:
            lists.append(f"## {plain(titles[paper.paper])}\n\n{html(f'<ul>{Markup().join(items)}</ul>')}")
    return "\n".join(lists) or note("No claims are declared yet.")


def _change(change: Change) -> Markup:
    parts = [(change.what, ""), (change.why, "Why: "), (change.seen, "Seen by then: ")]
    told = " ".join(f"{label}{text}" for text, label in parts if text)
    return Markup("<li><strong>{}</strong>: {}</li>").format(change.date.isoformat(), told)


def _comparison(project: Path, rows: Sequence[Row], titles: Mapping[str, str], links: _Links) -> str:
    """Every number that at least two suites have, side by side: small figures by claim, and a table a paper."""
    suites = _suites(rows)
    if not suites:
        return note("No claims are declared yet.")
    if len(suites) < 2:
        return note(
            f"This book shows one suite, `{suites[0]}`. To put a model of your own beside it, run it, `rim run --suite "
            f"NAME`, and build the book with both: `rim book --suite {suites[0]} --suite NAME`."
        )
    groups = comparison.shared(comparison.numbers(project / "results", rows))
    if not groups:
        named = ", ".join(f"`{suite}`" for suite in suites)
        return note(
            f"No claim was measured on more than one of the suites {named} so far. `rim claims` tells what each of "
            "them lacks."
        )
    parts = [_agreement(rows)]
    for paper, each in groupby(rows, lambda row: row["paper"]):
        parts += [f"## {plain(titles[paper])}"]
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
        parts.append(f"### {plain(title)}")
        for claim in dict.fromkeys(row["claim"] for row in shared if row["notebook"] == notebook):
            mine = [row for row in rows if row["claim"] == claim]
            verdicts = Markup("").join(
                Markup("<p><code>{}</code> {}</p>").format(row["suite"], links.outcome(row)) for row in mine
            )
            figures = "".join(figure(comparison.figure(group, suites)) for group in by_claim[claim])
            stated = Markup("<p>{}</p>").format(strong(claim, mine[0]["statement"]))
            inner = f'<div class="rim-verdicts">{verdicts}</div><div class="rim-panels">{figures}</div>'
            parts.append(html(f"{stated}{inner}"))
    if groups:
        parts.append(_numbers(groups, suites))
    if rest := [row for row in rows if row["claim"] not in by_claim]:
        parts.append(f"Not compared, since fewer than two suites have a number: {plain(_states(rest))}.")
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
        name: Cell = [strong(one.claim, one.title), *([one.unit] if one.unit else [])]
        lines.append([name, one.asked or "–", *(told.get(suite, "–") for suite in suites)])
    return table(["Number", "Rule", *suites], lines, "Every shared number, with its 95 % interval")
