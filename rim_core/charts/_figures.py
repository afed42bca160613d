"""The figures: each takes a table, and gives an Altair chart with titles, a description and its data."""

import math
import textwrap
from collections.abc import Sequence
from typing import Any

import altair as alt
import pandas as pd

from rim_core.charts._drawing import PALETTE
from rim_core.errors import InputError

# Dashes and shapes repeat what colour says.
_DASHES: tuple[list[int], ...] = ([1, 0], [6, 3], [2, 2], [8, 3, 2, 3], [4, 4], [1, 3], [10, 4])
_SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "stroke")
# Read equally well on white and on near-black.
_NEUTRAL = "#808080"
_PHONE_CHARACTERS = 36
_SERIES_TOLD = 6  # in a description that is made of the table


def _need(frame: pd.DataFrame, columns: Sequence[str | None], function: str) -> None:
    if not isinstance(frame, pd.DataFrame):
        raise InputError(
            f"charts.{function}: give a pandas DataFrame, such as result.to_frame(), not a {type(frame).__name__}"
        )
    missing = [name for name in columns if name is not None and name not in frame.columns]
    if missing:
        known = ", ".join(map(str, frame.columns))
        raise InputError(f"charts.{function}: no column {', '.join(missing)}; the frame has {known}")
    if frame.empty:
        raise InputError(f"charts.{function}: the frame has no rows; there is nothing to draw")


def _finish(layers: Sequence[alt.Chart], title: str, description: str, height: float) -> alt.LayerChart:
    return alt.LayerChart(layer=list(layers)).properties(
        title=alt.TitleParams(textwrap.wrap(title, _PHONE_CHARACTERS)), description=description, height=height
    )


def _words(column: str) -> str:
    return column.replace("_", " ")


def _sentence(title: str) -> str:
    return title if title.endswith(("?", "!", ".")) else f"{title}."


def _place(column: str, at: Any) -> str:
    """Where a value is: a label says so itself, a number needs its column's name."""
    if isinstance(at, str):
        return at
    return f"{_words(column)} {at:.3g}" if isinstance(at, float) else f"{_words(column)} {at}"


def _described(
    frame: pd.DataFrame, title: str, value: str, at: Sequence[str], series: str | None = None, measure: str = ""
) -> str:
    """What a figure shows, in words: the least and the largest value, and where they are, of each series."""
    told = []
    for name, rows in frame.groupby(series, sort=False) if series else [("", frame)]:
        rows = rows.dropna(subset=[value]).sort_values(value)
        ends = [rows[[*at, value]].iloc[[end]].to_dict("records")[0] for end in (0, -1) if len(rows)]
        places = [", ".join(_place(column, end[column]) for column in at) for end in ends]
        words = " to ".join(f"{end[value]:.3g} ({place})" for end, place in zip(ends, places, strict=True))
        told.append(f"{name}: {words or 'no values'}" if series else words or "no values")
    more = f"; and {len(told) - _SERIES_TOLD} more" if len(told) > _SERIES_TOLD else ""
    measure = measure or _words(value)
    return f"{_sentence(title)} {measure[0].upper()}{measure[1:]} from {'; '.join(told[:_SERIES_TOLD])}{more}."


def _legend(names: Sequence[str]) -> alt.Legend:
    """A legend above the plot: in one row where a phone has room for it, else a row for each series."""
    fits = sum(len(name) + 5 for name in names) <= _PHONE_CHARACTERS
    # An interval's band is pale; its legend must not be.
    return alt.Legend(orient="top", title=None, symbolOpacity=1, columns=len(names) if fits else 1)


def _encode(
    frame: pd.DataFrame, series: str | None, names: Sequence[str] | None = None
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Encodings that tell series apart: by colour, and by the dashes and the shapes that repeat it."""
    if series is None:
        return {"color": alt.value(PALETTE[0])}, {}, {}
    every = names or [str(name) for name in frame[series].unique()]
    legend = None if names else _legend(every)

    def scale(values: Sequence[Any]) -> alt.Scale:
        return alt.Scale(domain=list(every), range=[values[i % len(values)] for i in range(len(every))])

    return (
        {"color": alt.Color(f"{series}:N", scale=scale(PALETTE), legend=legend)},
        {"strokeDash": alt.StrokeDash(f"{series}:N", scale=scale(_DASHES), legend=legend)},
        {"shape": alt.Shape(f"{series}:N", scale=scale(_SHAPES), legend=legend)},
    )


def _tips(*columns: tuple[str | None, str, str]) -> list[alt.Tooltip]:
    """What a reader sees of a mark, and of a row in the figure's table: columns, each with its title and format."""
    return [
        alt.Tooltip(f"{name}:Q", title=title, format=form) if form else alt.Tooltip(f"{name}:N", title=title)
        for name, title, form in columns
        if name is not None
    ]


def _reference(at: float, channel: str, label: str) -> list[alt.Chart]:
    """A dashed line at `at` along `channel` ("x" or "y"), named at its end."""
    base = alt.Chart(pd.DataFrame({"reference": [label]})).encode(**{channel: alt.datum(at)})
    rule = base.mark_rule(color=_NEUTRAL, strokeDash=[4, 3], strokeWidth=1.5, aria=False)
    if channel == "x":
        return [rule]
    name = base.mark_text(align="left", dx=4, fontSize=11, color=_NEUTRAL, aria=False)
    return [rule, name.encode(x=alt.value("width"), text="reference:N")]


def by_layer(
    frame: pd.DataFrame,
    value: str = "estimate",
    *,
    series: str | None = None,
    x: str = "layer",
    low: str = "low",
    high: str = "high",
    chance: float | None = None,
    y_domain: tuple[float, float] | None = None,
    title: str | None = None,
    x_title: str | None = None,
    y_title: str | None = None,
    description: str | None = None,
) -> alt.LayerChart:
    """Draw a column over layers, or over tokens or ranks: a line for each series, its interval as a band.

    Args:
        frame: a row a point.
        value: the column to draw.
        series: the column whose values are lines; None for one line.
        x: the column of whole numbers to draw over.
        low: the column with the intervals' lower ends; without such a column, and none named, there is no band.
        high: the column with their upper ends.
        chance: where to draw a line of reference, in the units of `value`.
        y_domain: the ends of the vertical axis.
        title: the figure's.
        x_title: the horizontal axis'.
        y_title: the vertical axis', with the unit.
        description: for those who do not see the figure.

    Raises:
        InputError: a column is missing, or the frame has no rows.

    Example:
        >>> frame = pd.DataFrame({"layer": [0, 1], "estimate": [0.5, 0.9]})
        >>> rim.charts.by_layer(frame, y_title="accuracy").to_dict()["description"]
        'Accuracy by layer. Accuracy from 0.5 (layer 0) to 0.9 (layer 1).'
    """
    banded = {low, high} <= set(getattr(frame, "columns", ())) or (low, high) != ("low", "high")
    _need(frame, [x, series, value, *((low, high) if banded else ())], "by_layer")
    x_title, y_title = x_title or _words(x), y_title or _words(value)
    title = title or f"{y_title} by {x_title}".capitalize()
    colour, dashes, shapes = _encode(frame, series)
    y_scale = alt.Scale(domain=list(y_domain)) if y_domain else alt.Scale(zero=False)
    axis = alt.Axis(format="d", tickMinStep=1, grid=False)
    across = alt.X(f"{x}:Q", title=x_title, axis=axis, scale=alt.Scale(nice=False))
    base = alt.Chart(frame).encode(x=across, **colour)
    y = alt.Y(f"{value}:Q", title=y_title, scale=y_scale)
    tips = [(x, x_title, ""), (series, series or "", ""), (value, y_title, ".4g")]
    tips += [(low, "low", ".4g"), (high, "high", ".4g")] if banded else []
    layers: list[alt.Chart] = []
    if banded:
        edge = alt.Y(f"{low}:Q", title=y_title, scale=y_scale)
        layers.append(base.mark_area(opacity=0.2).encode(y=edge, y2=f"{high}:Q"))
    layers.append(base.mark_line(strokeWidth=2).encode(y=y, **dashes))
    layers.append(base.mark_point(filled=True, size=36, opacity=1).encode(y=y, **shapes, tooltip=_tips(*tips)))
    if chance is not None:
        layers += _reference(chance, "y", "chance")
    if description is None:
        description = _described(frame, title, value, [x], series, y_title)
    return _finish(layers, title, description, 300)


def intervals(
    frame: pd.DataFrame,
    value: str = "estimate",
    *,
    label: str,
    series: str | None = None,
    low: str = "low",
    high: str = "high",
    reference: float | None = None,
    allowed: tuple[float, float] | None = None,
    names: Sequence[str] | None = None,
    title: str | None = None,
    x_title: str | None = None,
    description: str | None = None,
) -> alt.LayerChart:
    """Draw a row for each label: a dot and its interval, side by side for each series.

    Args:
        frame: a row a dot; the figure's rows keep its order.
        value: the column to draw.
        label: the column that names the figure's rows.
        series: the column whose values stand side by side in a row.
        low: the column with the intervals' lower ends.
        high: the column with their upper ends.
        reference: where to draw a vertical line, in the units of `value`.
        allowed: the range that a rule allows, shaded, its finite ends dashed; -inf or inf where it is open.
        names: in place of series, all labels of a page, each of which keeps its colour and shape from figure to figure.
        title: the figure's.
        x_title: the axis', with the unit.
        description: for those who do not see the figure.

    Raises:
        InputError: a column is missing, or the frame has no rows.

    Example:
        >>> frame = pd.DataFrame({"role": ["base"], "estimate": [0.1], "low": [0.0], "high": [0.3]})
        >>> rim.charts.intervals(frame, label="role", x_title="share refused").to_dict()["title"]["text"]
        ['Share refused by role']
    """
    _need(frame, [label, value, low, high, series], "intervals")
    x_title = x_title or _words(value)
    title = title or f"{x_title} by {_words(label)}".capitalize()
    wrapped = frame.assign(**{label: ["\n".join(textwrap.wrap(str(text), 20)) for text in frame[label]]})
    rows = list(dict.fromkeys(wrapped[label]))
    every = ["\n".join(textwrap.wrap(name, 20)) for name in names] if names else None
    colour, _, shapes = _encode(wrapped, label if names else series, every)
    axis = alt.Axis(labelExpr="split(datum.label, '\\n')", title=None, ticks=False, domain=False, labelPadding=8)
    base = alt.Chart(wrapped).encode(y=alt.Y(f"{label}:N", sort=rows, axis=axis), **colour)
    side_by_side = [str(name) for name in frame[series].unique()] if series else []
    if series:
        base = base.encode(yOffset=alt.YOffset(f"{series}:N", sort=side_by_side))
    across: dict[str, Any] = {"title": x_title, "scale": alt.Scale(zero=False)}
    shade: list[alt.Chart] = []
    if allowed is not None:
        across, shade = _shaded(frame[[value, low, high]].to_numpy(float), allowed, x_title)
    tips = [(label, _words(label), ""), (series, series or "", ""), (value, x_title, ".4g")]
    tips += [(low, "low", ".4g"), (high, "high", ".4g")]
    bars = base.mark_rule(strokeWidth=2.5).encode(x=alt.X(f"{low}:Q", **across), x2=f"{high}:Q")
    dots = base.mark_point(filled=True, size=80, opacity=1)
    dots = dots.encode(x=alt.X(f"{value}:Q", **across), **shapes, tooltip=_tips(*tips))
    lines = max(text.count("\n") + 1 for text in rows)
    height = len(rows) * max(22 * max(len(side_by_side), 1), 16 * lines + 10) + 20
    if description is None:
        description = _described(frame, title, value, [label], series, x_title)
    line = [] if reference is None else _reference(reference, "x", "reference")
    return _finish([*shade, *line, bars, dots], title, description, height)


def _shaded(numbers: Any, allowed: tuple[float, float], x_title: str) -> tuple[dict[str, Any], list[alt.Chart]]:
    """How an axis must be for a range that is allowed to be seen on it, and that range as a shade with its ends."""
    finite = [float(end) for end in allowed if math.isfinite(end)]
    ends = [*numbers[~pd.isna(numbers)].tolist(), *finite]
    # An end of the shade that lies at infinity is the edge of the figure.
    margin = 0.08 * (max(ends) - min(ends)) or 0.08 * abs(max(ends)) or 0.1
    domain = [min(ends) - margin, max(ends) + margin]
    axis = alt.Axis(title=textwrap.wrap(x_title, _PHONE_CHARACTERS), tickCount=4, grid=False)
    across: dict[str, Any] = {"scale": alt.Scale(domain=domain, nice=False, zero=False), "axis": axis}
    if not finite:
        return across, []
    within = pd.DataFrame({"from": [max(allowed[0], domain[0])], "to": [min(allowed[1], domain[1])]})
    shade = alt.Chart(within).mark_rect(color=_NEUTRAL, opacity=0.18, aria=False)
    shade = shade.encode(x=alt.X("from:Q", **across), x2="to:Q")
    return across, [shade, *(line for end in finite for line in _reference(end, "x", "rule"))]


def distribution(
    frame: pd.DataFrame,
    value: str,
    *,
    series: str | None = None,
    bins: int = 20,
    reference: float | None = None,
    title: str | None = None,
    x_title: str | None = None,
    description: str | None = None,
) -> alt.LayerChart:
    """Draw how a column is spread: a histogram for each series, all in the same bins.

    Bars are shares of the series' own rows, so that series of unequal size compare.

    Args:
        frame: a row a value.
        value: the column of numbers.
        series: the column that tells series apart; None for one.
        bins: how many, from the least value to the largest.
        reference: where to draw a vertical line, in the units of `value`.
        title: the figure's.
        x_title: the axis', with the unit.
        description: for those who do not see the figure.

    Raises:
        InputError: a column is missing, the frame has no rows, or a number is not finite.

    Example:
        >>> frame = pd.DataFrame({"projection": [0.0, 1.0, 3.0]})
        >>> rim.charts.distribution(frame, "projection").to_dict()["description"]
        'How projection is spread. 3 values, mean 1.33, from 0 to 3.'
    """
    _need(frame, [series, value], "distribution")
    numbers = frame[value].astype(float)
    if broken := int((~numbers.abs().lt(math.inf)).sum()):
        raise InputError(f"charts.distribution: {broken} values of {value} are NaN or infinite; leave them out")
    x_title = x_title or _words(value)
    title = title or f"How {x_title} is spread"
    start = float(numbers.min())
    width = (float(numbers.max()) - start) / bins or 1.0
    places = ((numbers - start) / width).astype(int).clip(upper=bins - 1)
    of = frame[series].astype(str) if series else pd.Series("", frame.index)
    rows, told = [], []
    for name in of.unique():
        own = numbers[of == name]
        shares = places[of == name].value_counts(normalize=True)
        # An empty bin on either side brings the outline back to zero.
        for place in range(-1, bins + 1):
            left = start + place * width
            share = float(shares.get(place, 0.0))
            rows.append({series or "series": name, "from": left, "to": left + width, "share": share})
        words = f"{len(own)} values, mean {own.mean():.3g}, from {own.min():.3g} to {own.max():.3g}"
        told.append(f"{name}: {words}" if series else words)
    colour, dashes, _ = _encode(frame, series)
    base = alt.Chart(pd.DataFrame(rows)).encode(
        x=alt.X("from:Q", title=x_title, scale=alt.Scale(zero=False), axis=alt.Axis(grid=False)),
        y=alt.Y("share:Q", title="share"),
        **colour,
    )
    tips = _tips((series, series or "", ""), ("from", f"{x_title}, from", ".4g"), ("to", "to", ".4g"))
    tips += _tips(("share", "share", ".1%"))
    bars = base.mark_rect(opacity=0.3).encode(x2="to:Q", y2=alt.datum(0), tooltip=tips)
    outline = base.mark_line(interpolate="step-after", strokeWidth=2).encode(**dashes)
    line = [] if reference is None else _reference(reference, "x", "reference")
    if description is None:
        description = f"{_sentence(title)} {'; '.join(told)}."
    return _finish([*line, bars, outline], title, description, 260)


def scatter(
    frame: pd.DataFrame,
    x: str,
    y: str,
    *,
    series: str | None = None,
    title: str | None = None,
    x_title: str | None = None,
    y_title: str | None = None,
    description: str | None = None,
) -> alt.LayerChart:
    """Draw a point for each row, coloured and shaped by series; axes fit the points and need not hold zero.

    Args:
        frame: a row a point.
        x: the column across.
        y: the column upwards.
        series: the column that tells series apart; None for one.
        title: the figure's.
        x_title: the horizontal axis'.
        y_title: the vertical axis'.
        description: for those who do not see the figure.

    Raises:
        InputError: a column is missing, or the frame has no rows.

    Example:
        >>> frame = pd.DataFrame({"before": [0.1, 0.4], "after": [0.2, 0.9]})
        >>> rim.charts.scatter(frame, "before", "after").to_dict()["title"]["text"]
        ['After against before']
    """
    _need(frame, [x, y, series], "scatter")
    x_title, y_title = x_title or _words(x), y_title or _words(y)
    title = title or f"{y_title} against {x_title}".capitalize()
    colour, _, shapes = _encode(frame, series)
    fitted: dict[str, Any] = {"scale": alt.Scale(zero=False), "axis": alt.Axis(grid=False)}
    points = alt.Chart(frame).mark_point(filled=True, size=42, opacity=0.7)
    points = points.encode(
        x=alt.X(f"{x}:Q", title=x_title, **fitted),
        y=alt.Y(f"{y}:Q", title=y_title, **fitted),
        **colour,
        **shapes,
        tooltip=_tips((series, series or "", ""), (x, x_title, ".4g"), (y, y_title, ".4g")),
    )
    if description is None:
        description = _described(frame, title, y, [x], series, y_title)
    return _finish([points], title, description, 300)


def heatmap(
    frame: pd.DataFrame,
    value: str = "estimate",
    *,
    x: str = "head",
    y: str = "layer",
    diverging: bool = False,
    title: str | None = None,
    x_title: str | None = None,
    y_title: str | None = None,
    value_title: str | None = None,
    description: str | None = None,
) -> alt.LayerChart:
    """Draw a column as coloured cells over two others.

    Args:
        frame: a row a cell.
        value: the column to draw.
        x: the column across.
        y: the column downwards.
        diverging: centre the colours on zero, for signed effects.
        title: the figure's.
        x_title: the horizontal axis'.
        y_title: the vertical axis'.
        value_title: the colours', with the unit.
        description: for those who do not see the figure.

    Raises:
        InputError: a column is missing, or the frame has no rows.

    Example:
        >>> frame = pd.DataFrame({"layer": [0, 0], "head": [0, 1], "effect": [0.1, -0.2]})
        >>> rim.charts.heatmap(frame, "effect", diverging=True).to_dict()["description"]
        'Effect by layer and head. Effect from -0.2 (layer 0, head 1) to 0.1 (layer 0, head 0).'
    """
    _need(frame, [x, y, value], "heatmap")
    x_title, y_title, value_title = x_title or _words(x), y_title or _words(y), value_title or _words(value)
    title = title or f"{value_title} by {y_title} and {x_title}".capitalize()
    scale = alt.Scale(scheme="viridis")
    if diverging:
        bound = max(abs(float(number)) for number in frame[value] if not math.isnan(number)) or 1.0
        scale = alt.Scale(scheme="blueorange", domain=[-bound, bound])
    legend = alt.Legend(orient="top", title=value_title, gradientLength=200, titleLimit=280)
    cells = alt.Chart(frame).mark_rect()
    cells = cells.encode(
        x=alt.X(f"{x}:O", title=x_title, axis=alt.Axis(labelAngle=0, labelOverlap="greedy", ticks=False)),
        y=alt.Y(f"{y}:O", title=y_title, axis=alt.Axis(labelOverlap="greedy", ticks=False)),
        color=alt.Color(f"{value}:Q", scale=scale, legend=legend),
        tooltip=_tips((x, x_title, ""), (y, y_title, ""), (value, value_title, ".4g")),
    )
    if description is None:
        description = _described(frame, title, value, [y, x], measure=value_title)
    return _finish([cells], title, description, max(200, min(520, 18 * frame[y].nunique())))
