"""The data of the figures in an executed notebook, as its charts hold it."""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_VEGA_LITE = "application/vnd.vegalite."


def specifications(notebook: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Give the Vega-Lite specification of each chart that a notebook shows, in order."""
    for cell in notebook["cells"]:
        for output in cell.get("outputs", []):
            for kind, value in output.get("data", {}).items():
                if kind.startswith(_VEGA_LITE) and isinstance(value, dict):
                    yield value


def largest(spec: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Give the rows of a chart's largest data set; others are such as a line of reference."""
    own = spec.get("data") or {}
    sets = [*spec.get("datasets", {}).values(), own.get("values", [])]
    return max((rows for rows in sets if isinstance(rows, list)), key=len, default=[])


def to_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Write rows as CSV, with a column for every key that one of them has."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
