"""The book's figures: Altair charts that draw offline, in light and dark, with a description and their data.

Importing this module enables the theme and the renderer `rim`. The renderer writes a figure that the
book's script draws with the vendored Vega, beside the chart's JSON for notebook front ends. It refuses a
chart without a description, so that no figure is lost on a reader who cannot see it.
"""

import json
import math
import textwrap
from collections.abc import Sequence
from html import escape
from typing import Any

import altair as alt
import pandas as pd

from rim_core.errors import InputError

# Okabe & Ito's colour-blind-safe palette; the first four stand out against both white and near-black.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
# Dashes and shapes repeat what colour says.
_DASHES: tuple[list[int], ...] = ([1, 0], [6, 3], [2, 2], [8, 3, 2, 3], [4, 4], [1, 3], [10, 4])
_SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "stroke")
# Read equally well on white and on near-black.
_NEUTRAL = "#808080"
_MIME = "application/vnd.vegalite.v6+json"
_PHONE_CHARACTERS = 36


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


def _table(spec: dict[str, Any]) -> str:
    """The chart's largest data set as an HTML table: the columns a helper below named, else all."""
    rows = max([*spec.get("datasets", {}).values(), spec.get("data", {}).get("values", [])], key=len)
    if not rows:
        return ""
    columns = spec.get("usermeta", {}).get("rim", {}).get("columns") or [[name, name] for name in rows[0]]
    head = "".join(f'<th scope="col">{escape(title)}</th>' for _, title in columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(_text(row.get(name)))}</td>" for name, _ in columns) + "</tr>" for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _text(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def render(spec: dict[str, Any], **_: Any) -> dict[str, Any]:
    """Turn a Vega-Lite `spec` into the MIME bundle a notebook stores.

    The bundle holds the figure as `text/html`, the specification for front ends that draw Vega-Lite
    themselves, and the description as `text/plain`. Raises InputError where the chart has no description.
    """
    description = str(spec.get("description") or "").strip()
    if not description:
        raise InputError(
            "chart without a description: say what it shows in .properties(description=...) "
            "or description=... of the rim_core.charts function"
        )
    # "<" is written as an escape, so that no text in the data can end the script element.
    body = json.dumps(spec, sort_keys=True, ensure_ascii=False).replace("<", "\\u003c")
    label = escape(description, quote=True)
    # role=img covers the drawing only: the table beside it must stay reachable.
    figure = (
        '<figure class="rim-chart">'
        f'<div class="rim-vega" role="img" aria-label="{label}">{label}</div>'
        f'<script type="application/json">{body}</script>'
        f'<details class="rim-data"><summary>Description and data</summary><p>{label}</p>'
        '<div class="rim-table" role="region" aria-label="Data of the figure" tabindex="0">'
        f"{_table(spec)}</div>"
        "</details></figure>"
    )
    return {_MIME: spec, "text/html": figure, "text/plain": description}


alt.renderers.register("rim", render)
alt.renderers.enable("rim")


def _need(frame: pd.DataFrame, columns: Sequence[str], function: str) -> None:
    missing = [name for name in columns if name not in frame.columns]
    if missing:
        known = ", ".join(map(str, frame.columns))
        raise InputError(f"charts.{function}: no column {', '.join(missing)}; the frame has {known}")
    if frame.empty:
        raise InputError(f"charts.{function}: the frame has no rows; there is nothing to draw")


def _finish(
    layers: Sequence[alt.Chart], *, title: str, description: str, height: float, columns: Sequence[tuple[str, str]]
) -> alt.LayerChart:
    return alt.LayerChart(layer=list(layers)).properties(
        title=alt.TitleParams(textwrap.wrap(title, _PHONE_CHARACTERS)),
        description=description,
        width="container",
        height=height,
        autosize=alt.AutoSizeParams(type="fit-x", contains="padding"),
        usermeta={"rim": {"columns": [list(column) for column in columns]}},
    )


def _legend(names: Sequence[str]) -> alt.Legend:
    """A legend above the plot: in one row where a phone has room for it, else a row for each series."""
    fits = sum(len(name) + 5 for name in names) <= _PHONE_CHARACTERS
    # An interval's band is pale; its legend must not be.
    return alt.Legend(orient="top", title=None, symbolOpacity=1, columns=len(names) if fits else 1)


def _scale(names: Sequence[str], values: Sequence[Any]) -> alt.Scale:
    return alt.Scale(domain=list(names), range=[values[i % len(values)] for i in range(len(names))])


def by_layer(
    frame: pd.DataFrame,
    value: str,
    *,
    series: str,
    title: str,
    y_title: str,
    description: str,
    x: str = "layer",
    x_title: str = "layer",
    low: str = "low",
    high: str = "high",
    chance: float | None = None,
    y_domain: tuple[float, float] | None = None,
) -> alt.LayerChart:
    """Draw `value` over the column `x` of whole numbers, such as layers or tokens: a line for each `series`, with
    its interval as a band.

    `low` and `high` name the columns with the interval's ends; `chance`, in the units of `value`, adds a
    reference line; `y_domain` fixes the vertical axis. Raises InputError where a column is missing.
    """
    _need(frame, [x, series, value, low, high], "by_layer")
    names = [str(name) for name in frame[series].unique()]
    legend = _legend(names)
    y_scale = alt.Scale(domain=list(y_domain)) if y_domain else alt.Scale(zero=False)
    across = alt.X(
        f"{x}:Q", title=x_title, axis=alt.Axis(format="d", tickMinStep=1, grid=False), scale=alt.Scale(nice=False)
    )
    colour = alt.Color(f"{series}:N", scale=_scale(names, PALETTE), legend=legend)
    tooltip = [
        alt.Tooltip(f"{series}:N"),
        alt.Tooltip(f"{x}:Q"),
        alt.Tooltip(f"{value}:Q", title=y_title, format=".4g"),
        alt.Tooltip(f"{low}:Q", format=".4g"),
        alt.Tooltip(f"{high}:Q", format=".4g"),
    ]
    base = alt.Chart(frame).encode(x=across, color=colour)
    y = alt.Y(f"{value}:Q", title=y_title, scale=y_scale)
    band = base.mark_area(opacity=0.2).encode(y=alt.Y(f"{low}:Q", title=y_title, scale=y_scale), y2=f"{high}:Q")
    line = base.mark_line(strokeWidth=2).encode(
        y=y, strokeDash=alt.StrokeDash(f"{series}:N", scale=_scale(names, _DASHES), legend=legend)
    )
    points = base.mark_point(filled=True, size=36, opacity=1).encode(
        y=y, shape=alt.Shape(f"{series}:N", scale=_scale(names, _SHAPES), legend=legend), tooltip=tooltip
    )
    layers: list[alt.Chart] = [band, line, points]
    if chance is not None:
        layers += _reference(chance, "y", "chance")
    return _finish(
        layers,
        title=title,
        description=description,
        height=300,
        columns=[(x, x_title), (series, series), (value, y_title), (low, "low"), (high, "high")],
    )


def _reference(at: float, channel: str, label: str) -> list[alt.Chart]:
    """A dashed line at `at` along `channel` ("x" or "y"), named at its end."""
    base = alt.Chart(pd.DataFrame({"reference": [label]})).encode(**{channel: alt.datum(at)})
    rule = base.mark_rule(color=_NEUTRAL, strokeDash=[4, 3], strokeWidth=1.5, aria=False)
    if channel == "x":
        return [rule]
    name = base.mark_text(align="left", dx=4, fontSize=11, color=_NEUTRAL, aria=False)
    return [rule, name.encode(x=alt.value("width"), text="reference:N")]


def intervals(
    frame: pd.DataFrame,
    value: str,
    *,
    label: str,
    title: str,
    x_title: str,
    description: str,
    low: str = "low",
    high: str = "high",
    series: str | None = None,
    reference: float | None = None,
) -> alt.LayerChart:
    """Draw one row for each `label`: a dot at `value` and its interval, side by side for each `series`.

    `reference`, in the units of `value`, adds a vertical line. Rows keep the frame's order. Raises InputError
    where a column is missing.
    """
    _need(frame, [label, value, low, high, *([series] if series else [])], "intervals")
    wrapped = frame.assign(**{label: ["\n".join(textwrap.wrap(str(text), 20)) for text in frame[label]]})
    rows = list(dict.fromkeys(wrapped[label]))
    names = [str(name) for name in frame[series].unique()] if series else []
    axis = alt.Axis(labelExpr="split(datum.label, '\\n')", title=None, ticks=False, domain=False, labelPadding=8)
    base = alt.Chart(wrapped).encode(y=alt.Y(f"{label}:N", sort=rows, axis=axis))
    if series:
        base = base.encode(
            yOffset=alt.YOffset(f"{series}:N", sort=names),
            color=alt.Color(f"{series}:N", scale=_scale(names, PALETTE), legend=_legend(names)),
        )
    tooltip = [
        *([alt.Tooltip(f"{series}:N")] if series else []),
        alt.Tooltip(f"{value}:Q", title=x_title, format=".4g"),
    ]
    tooltip += [alt.Tooltip(f"{low}:Q", format=".4g"), alt.Tooltip(f"{high}:Q", format=".4g")]
    bars = base.mark_rule(strokeWidth=2.5).encode(
        x=alt.X(f"{low}:Q", title=x_title, scale=alt.Scale(zero=False)), x2=f"{high}:Q"
    )
    dots = base.mark_point(filled=True, size=80, opacity=1).encode(
        x=alt.X(f"{value}:Q", title=x_title), tooltip=tooltip
    )
    if series:
        dots = dots.encode(shape=alt.Shape(f"{series}:N", scale=_scale(names, _SHAPES), legend=_legend(names)))
    else:
        bars, dots = (mark.encode(color=alt.value(PALETTE[0])) for mark in (bars, dots))
    layers = [bars, dots]
    if reference is not None:
        layers = [*_reference(reference, "x", "reference"), *layers]
    lines = max(text.count("\n") + 1 for text in rows)
    columns = [(label, label), *([(series, series)] if series else []), (value, x_title), (low, "low"), (high, "high")]
    return _finish(
        layers,
        title=title,
        description=description,
        height=len(rows) * max(22 * max(len(names), 1), 16 * lines + 10) + 20,
        columns=columns,
    )


def compared(
    frame: pd.DataFrame,
    value: str,
    *,
    label: str,
    names: Sequence[str],
    title: str,
    x_title: str,
    description: str,
    low: str = "low",
    high: str = "high",
    allowed: tuple[float, float] = (-math.inf, math.inf),
) -> alt.LayerChart:
    """Draw one number measured several times: a row for each `label`, a dot at `value`, its interval.

    `names` are all labels of the page, so that each keeps its colour and shape from figure to figure; rows need
    no legend. The range `allowed` by a rule is shaded and its ends are dashed lines. Raises InputError where a
    column is missing.
    """
    _need(frame, [label, value, low, high], "compared")
    finite = [float(end) for end in allowed if math.isfinite(end)]
    ends = [float(n) for column in (value, low, high) for n in frame[column].dropna()] + finite
    # An end of the shade that lies at infinity is the edge of the figure.
    margin = 0.08 * (max(ends) - min(ends)) or 0.08 * abs(max(ends)) or 0.1
    domain = [min(ends) - margin, max(ends) + margin]
    left, right = max(allowed[0], domain[0]), min(allowed[1], domain[1])
    wrapped = frame.assign(**{label: ["\n".join(textwrap.wrap(str(text), 16)) for text in frame[label]]})
    every = ["\n".join(textwrap.wrap(name, 16)) for name in names]
    rows = list(dict.fromkeys(wrapped[label]))
    axis = alt.Axis(labelExpr="split(datum.label, '\\n')", title=None, ticks=False, domain=False, labelPadding=8)
    across = alt.Scale(domain=domain, nice=False, zero=False)
    x_axis = alt.Axis(title=textwrap.wrap(x_title, _PHONE_CHARACTERS), tickCount=4, grid=False)
    base = alt.Chart(wrapped).encode(
        y=alt.Y(f"{label}:N", sort=rows, axis=axis),
        color=alt.Color(f"{label}:N", scale=_scale(every, PALETTE), legend=None),
    )
    bars = base.mark_rule(strokeWidth=2.5).encode(x=alt.X(f"{low}:Q", scale=across, axis=x_axis), x2=f"{high}:Q")
    dots = base.mark_point(filled=True, size=80, opacity=1).encode(
        x=alt.X(f"{value}:Q", scale=across, axis=x_axis),
        shape=alt.Shape(f"{label}:N", scale=_scale(every, _SHAPES), legend=None),
        tooltip=[
            alt.Tooltip(f"{label}:N"),
            *(alt.Tooltip(f"{column}:Q", format=".4g") for column in (value, low, high)),
        ],
    )
    layers: list[alt.Chart] = [bars, dots]
    if finite:
        shade = alt.Chart(pd.DataFrame({"from": [left], "to": [right]}))
        shade = shade.mark_rect(color=_NEUTRAL, opacity=0.18, aria=False)
        layers = [
            shade.encode(x=alt.X("from:Q", scale=across, axis=x_axis), x2="to:Q"),
            *(line for end in finite for line in _reference(end, "x", "rule")),
            *layers,
        ]
    lines = max(text.count("\n") + 1 for text in rows)
    return _finish(
        layers,
        title=title,
        description=description,
        height=len(rows) * max(28, 16 * lines + 10),
        columns=[(label, label), (value, value), (low, "low"), (high, "high")],
    )


def distribution(
    frame: pd.DataFrame,
    value: str,
    *,
    series: str,
    title: str,
    x_title: str,
    description: str,
    bins: int = 20,
    reference: float | None = None,
) -> alt.LayerChart:
    """Draw how `value` is spread: a histogram for each `series`, all in the same bins.

    Bars are shares of the series' own rows, so that series of unequal size compare. `reference`, in the units of
    `value`, adds a vertical line. Raises InputError where a column is missing or a number is not finite.
    """
    _need(frame, [series, value], "distribution")
    numbers = frame[value].astype(float)
    if broken := int((~numbers.abs().lt(math.inf)).sum()):
        raise InputError(f"charts.distribution: {broken} values of {value} are NaN or infinite; leave them out")
    start = float(numbers.min())
    width = (float(numbers.max()) - start) / bins or 1.0
    places = ((numbers - start) / width).astype(int).clip(upper=bins - 1)
    names = [str(name) for name in frame[series].unique()]
    rows = []
    for name in names:
        shares = places[frame[series].astype(str) == name].value_counts(normalize=True)
        # An empty bin on either side brings the outline back to zero.
        for place in range(-1, bins + 1):
            left = start + place * width
            share = float(shares.get(place, 0.0))
            rows.append({series: name, "from": left, "to": left + width, "share": share})
    colour = alt.Color(f"{series}:N", scale=_scale(names, PALETTE), legend=_legend(names))
    base = alt.Chart(pd.DataFrame(rows)).encode(
        x=alt.X("from:Q", title=x_title, scale=alt.Scale(zero=False), axis=alt.Axis(grid=False)),
        y=alt.Y("share:Q", title="share"),
        color=colour,
    )
    bars = base.mark_rect(opacity=0.3).encode(
        x2="to:Q",
        y2=alt.datum(0),
        tooltip=[
            alt.Tooltip(f"{series}:N"),
            alt.Tooltip("from:Q", format=".4g"),
            alt.Tooltip("to:Q", format=".4g"),
            alt.Tooltip("share:Q", format=".1%"),
        ],
    )
    outline = base.mark_line(interpolate="step-after", strokeWidth=2).encode(
        strokeDash=alt.StrokeDash(f"{series}:N", scale=_scale(names, _DASHES), legend=_legend(names))
    )
    layers: list[alt.Chart] = [bars, outline]
    if reference is not None:
        layers = [*_reference(reference, "x", "reference"), *layers]
    return _finish(
        layers,
        title=title,
        description=description,
        height=260,
        columns=[(series, series), ("from", f"{x_title}, from"), ("to", "to"), ("share", "share")],
    )


def scatter(
    frame: pd.DataFrame, x: str, y: str, *, series: str, title: str, x_title: str, y_title: str, description: str
) -> alt.LayerChart:
    """Draw a point for each row at columns `x` and `y`, coloured and shaped by `series`.

    Axes fit the points and need not hold zero. Raises InputError where a column is missing.
    """
    _need(frame, [x, y, series], "scatter")
    names = [str(name) for name in frame[series].unique()]
    legend = _legend(names)
    points = (
        alt.Chart(frame)
        .mark_point(filled=True, size=42, opacity=0.7)
        .encode(
            x=alt.X(f"{x}:Q", title=x_title, scale=alt.Scale(zero=False), axis=alt.Axis(grid=False)),
            y=alt.Y(f"{y}:Q", title=y_title, scale=alt.Scale(zero=False), axis=alt.Axis(grid=False)),
            color=alt.Color(f"{series}:N", scale=_scale(names, PALETTE), legend=legend),
            shape=alt.Shape(f"{series}:N", scale=_scale(names, _SHAPES), legend=legend),
            tooltip=[
                alt.Tooltip(f"{series}:N"),
                alt.Tooltip(f"{x}:Q", title=x_title, format=".4g"),
                alt.Tooltip(f"{y}:Q", title=y_title, format=".4g"),
            ],
        )
    )
    return _finish(
        [points],
        title=title,
        description=description,
        height=300,
        columns=[(series, series), (x, x_title), (y, y_title)],
    )


def heatmap(
    frame: pd.DataFrame,
    value: str,
    *,
    x: str,
    y: str,
    title: str,
    x_title: str,
    y_title: str,
    value_title: str,
    description: str,
    diverging: bool = False,
) -> alt.LayerChart:
    """Draw `value` as coloured cells over the columns `x` and `y`.

    `diverging` centres the colours on zero, for signed effects. Raises InputError where a column is missing.
    """
    _need(frame, [x, y, value], "heatmap")
    if diverging:
        bound = max(abs(float(number)) for number in frame[value] if not math.isnan(number)) or 1.0
        scale = alt.Scale(scheme="blueorange", domain=[-bound, bound])
    else:
        scale = alt.Scale(scheme="viridis")
    legend = alt.Legend(orient="top", title=value_title, gradientLength=200, titleLimit=280)
    cells = (
        alt.Chart(frame)
        .mark_rect()
        .encode(
            x=alt.X(f"{x}:O", title=x_title, axis=alt.Axis(labelAngle=0, labelOverlap="greedy", ticks=False)),
            y=alt.Y(f"{y}:O", title=y_title, axis=alt.Axis(labelOverlap="greedy", ticks=False)),
            color=alt.Color(f"{value}:Q", scale=scale, legend=legend),
            tooltip=[alt.Tooltip(f"{x}:O"), alt.Tooltip(f"{y}:O"), alt.Tooltip(f"{value}:Q", format=".4g")],
        )
    )
    return _finish(
        [cells],
        title=title,
        description=description,
        height=max(200, min(520, 18 * frame[y].nunique())),
        columns=[(x, x_title), (y, y_title), (value, value_title)],
    )
