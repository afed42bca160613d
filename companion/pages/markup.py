"""Parts of a page as Markdown. Tables and figures in it are HTML: Markdown's own tables have neither row headers nor
cells that span rows.
"""

import re
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

from markupsafe import Markup, escape

from rim_core import charts

Row = Mapping[str, Any]
Cell = str | list[str]  # a list is of paragraphs; Markup stays as it is, other text is escaped


class Block(Markup):
    """HTML that is no line of text: it stands beside paragraphs, and not in one."""


def html(content: str) -> str:
    """HTML within Markdown."""
    return f"`````{{raw}} html\n{content}\n`````\n"


def note(text: str) -> str:
    """A note set apart."""
    return f"```{{note}}\n{text}\n```\n"


def plain(text: str) -> str:
    """Text that Markdown takes as it is."""
    return re.sub(r"([!-/:-@\[-`{-~])", r"\\\1", text)


def table(head: Sequence[str], rows: Sequence[Sequence[Cell | None]], caption: str, stubs: int = 1) -> str:
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
            text = Markup("").join(p if isinstance(p, Block) else Markup("<p>{}</p>").format(p) for p in parts)
            opening, closing = ('th class="stub" scope="row"', "th") if column < stubs else ("td", "td")
            cells.append(Markup(f"<{opening}{spans}>{text}</{closing}>"))
        lines.append(Markup("<tr>{}</tr>").format(Markup("").join(cells)))
    return html(
        '<div class="pst-scrollable-table-container"><table class="rim-table table">'
        f"<caption>{escape(caption)}</caption><thead><tr>{columns}</tr></thead>\n<tbody>\n"
        + "\n".join(lines)
        + "\n</tbody></table></div>"
    )


def folded(summary: str, paragraphs: Sequence[str]) -> Block:
    """Paragraphs behind a line that opens them."""
    inside = Markup("").join(Markup("<p>{}</p>").format(text) for text in paragraphs)
    return Block(Markup("<details><summary>{}</summary>{}</details>").format(summary, inside))


def strong(word: str, text: str = "") -> Markup:
    """A word in bold, and text after it."""
    return Markup("<strong>{}</strong> {}").format(word, text)


def figure(chart: Any) -> str:
    """A chart as HTML, with its description and its data."""
    return str(charts.render(chart.to_dict())["text/html"])
