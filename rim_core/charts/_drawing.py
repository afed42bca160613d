"""How a figure gets onto a page: the theme and the renderer `rim`, and files that open without a network."""

import json
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

import altair as alt

from rim_core import paths
from rim_core.errors import InputError, first_line

# Okabe & Ito's colour-blind-safe palette; the first four stand out against both white and near-black.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
_MIME = "application/vnd.vegalite.v6+json"


@alt.theme.register("rim", enable=True)
def _theme() -> alt.theme.ThemeConfig:
    font = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
    text = {"labelFont": font, "titleFont": font, "labelFontSize": 12, "titleFontSize": 13}
    # Colours of text, axes and background are the page's to choose: see book/assets/charts.js.
    config: Any = {
        "axis": {**text, "titleFontWeight": "normal", "labelLimit": 180},
        "legend": {**text, "titleFontWeight": "normal", "labelLimit": 260, "symbolSize": 90},
        "range": {"category": list(PALETTE)},
        "title": {"font": font, "fontSize": 14, "fontWeight": 600, "anchor": "start", "offset": 12},
        "view": {"stroke": None},
    }
    return alt.theme.ThemeConfig(config=config)


def render(spec: dict[str, Any], **_: Any) -> dict[str, Any]:
    """Turn a Vega-Lite `spec` into the MIME bundle a notebook stores.

    The bundle holds the figure as `text/html`, the specification for front ends that draw Vega-Lite
    themselves, and the description as `text/plain`. Raises InputError where the chart has no description.
    """
    parts = _parts(spec)
    description = " ".join(str(part.get("description") or "").strip() for part in [spec, *(parts * (len(parts) > 1))])
    if not (description := description.strip()):
        raise InputError(
            "chart without a description: say what it shows in .properties(description=...) "
            "or description=... of the rim_core.charts function"
        )
    if "layer" in spec:  # charts side by side have no container's width to fill
        fit = {"width": "container", "autosize": {"type": "fit-x", "contains": "padding"}}
        spec = {**fit, **spec}
    # "<" is written as an escape, so that no text in the data can end the script element.
    body = json.dumps(spec, sort_keys=True, ensure_ascii=False).replace("<", "\\u003c")
    label = escape(description, quote=True)
    tables = "".join(_table(part, spec.get("datasets", {})) for part in parts)
    # role=img covers the drawing only: the table beside it must stay reachable.
    figure = (
        '<figure class="rim-chart">'
        f'<div class="rim-vega" role="img" aria-label="{label}">{label}</div>'
        f'<script type="application/json">{body}</script>'
        f'<details class="rim-data"><summary>Description and data</summary><p>{label}</p>'
        '<div class="rim-table" role="region" aria-label="Data of the figure" tabindex="0">'
        f"{tables}</div>"
        "</details></figure>"
    )
    return {_MIME: spec, "text/html": figure, "text/plain": description}


alt.renderers.register("rim", render)
alt.renderers.enable("rim")


def _parts(spec: dict[str, Any]) -> list[dict[str, Any]]:
    """The charts that a chart is composed of, or it alone."""
    inner = [part for key in ("vconcat", "hconcat", "concat") for part in spec.get(key, ())]
    shared = {"data": spec["data"]} if "data" in spec else {}  # of parts that draw the same table
    return [found for part in inner for found in _parts({**shared, **part})] or [spec]


def _table(part: dict[str, Any], datasets: dict[str, Any]) -> str:
    """A chart's largest data set as an HTML table: the columns that its tooltip names, else all."""
    data = [unit["data"] for unit in _units(part) if "data" in unit]
    rows: list[dict[str, Any]] = max(
        (each.get("values") or datasets.get(each.get("name"), []) for each in data), key=len, default=[]
    )
    if not rows:
        return ""
    tips = [unit.get("encoding", {}).get("tooltip") for unit in _units(part)]
    named = next((tip for tip in tips if isinstance(tip, list)), None) or [{"field": name} for name in rows[0]]
    head = "".join(f'<th scope="col">{escape(str(column.get("title", column["field"])))}</th>' for column in named)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(_text(row.get(column['field'])))}</td>" for column in named) + "</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _units(spec: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield spec
    for layer in spec.get("layer", ()):
        yield from _units(layer)


def _text(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def save(chart: alt.TopLevelMixin, path: str | Path) -> Path:
    """Write a chart, or charts composed with `&` and `|`, to a file that opens without a network.

    Args:
        chart: of this module, or any Altair chart with a description.
        path: ends in `.html` (the figure as in the book, with its data) or `.json` (Vega-Lite); for `.svg` and `.png`
            Altair needs the package `vl-convert-python`.

    Raises:
        InputError: another ending, a chart without a description, a file that cannot be written, or, for `.html`, no
            project here, whose `book/assets` hold what draws it.

    Example:
        >>> import tempfile
        >>> frame = pd.DataFrame({"layer": [0, 1], "head": [0, 0], "estimate": [0.1, -0.2]})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     rim.charts.save(rim.charts.heatmap(frame), f"{folder}/heads.html").stat().st_size > 800_000
        True
    """
    path, spec = Path(path), chart.to_dict()
    if path.suffix == ".json":
        paths.write_json(path, spec)
    elif path.suffix == ".html":
        assets = paths.root() / "book" / "assets"
        scripts = [*(f"vega/{name}.min.js" for name in ("vega", "vega-lite", "vega-embed")), "charts.js"]
        try:
            style, *code = ((assets / name).read_text(encoding="utf-8") for name in ("rim.css", *scripts))
        except OSError as error:
            raise InputError(f"charts.save: cannot read {error.filename}: {error.strerror}") from None
        page = "".join(f"<script>{each}</script>\n" for each in code)
        head = (
            f'<!DOCTYPE html>\n<html lang="en">\n<meta charset="utf-8">\n<title>Figure</title>\n<style>{style}</style>'
        )
        paths.write_text(path, f"{head}\n{page}{render(spec)['text/html']}\n</html>\n")
    elif path.suffix in (".svg", ".png", ".pdf"):
        try:
            chart.save(str(path))
        except (ImportError, ValueError) as error:
            raise InputError(f"cannot write {path}: {first_line(error)}") from None
    else:
        raise InputError(f"charts.save: {path} must end in .html, .json, .svg or .png")
    return path
