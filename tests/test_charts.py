import json
import math
import re

import altair as alt
import pandas as pd
import pytest

from rim_core import charts
from rim_core.errors import InputError


@pytest.fixture
def layers() -> pd.DataFrame:
    rows = [
        {"layer": layer, "series": series, "accuracy": 0.5 + layer / 10, "low": 0.4, "high": 0.9}
        for series in ("risky", "shuffled labels")
        for layer in range(4)
    ]
    return pd.DataFrame(rows)


def by_layer(frame: pd.DataFrame, description: str = "Accuracy rises.") -> alt.LayerChart:
    return charts.by_layer(
        frame,
        "accuracy",
        series="series",
        title="Accuracy by layer",
        y_title="accuracy",
        description=description,
        chance=0.5,
    )


def bundle_of(chart: alt.LayerChart) -> dict:
    return chart._repr_mimebundle_()


def spec_in(html: str) -> dict:
    found = re.search(r'<script type="application/json">(.*?)</script>', html, flags=re.DOTALL)
    assert found is not None
    return json.loads(found.group(1))


@pytest.mark.parametrize("description", ["", "   "])
def test_a_chart_without_a_description_is_refused(layers, description):
    with pytest.raises(InputError, match="without a description"):
        bundle_of(by_layer(layers, description))


def test_a_plain_altair_chart_without_a_description_is_refused():
    chart = alt.Chart(pd.DataFrame({"a": [1]})).mark_point().encode(x="a:Q")
    with pytest.raises(InputError, match="without a description"):
        bundle_of(chart)


def test_a_line_may_run_over_tokens_instead_of_layers(layers):
    frame = layers.rename(columns={"layer": "token"})
    spec = charts.by_layer(
        frame,
        "accuracy",
        series="series",
        title="t",
        y_title="y",
        description="d",
        x="token",
        x_title="token, from the end",
    ).to_dict()
    across = [layer["encoding"]["x"] for layer in spec["layer"]]
    assert {(x["field"], x["title"]) for x in across} == {("token", "token, from the end")}
    with pytest.raises(InputError, match="no column token"):
        charts.by_layer(layers, "accuracy", series="series", title="t", y_title="y", description="d", x="token")


def test_the_bundle_holds_figure_specification_and_text(layers):
    bundle = bundle_of(by_layer(layers))
    assert set(bundle) == {"text/html", "text/plain", "application/vnd.vegalite.v6+json"}
    assert bundle["text/plain"] == "Accuracy rises."
    assert spec_in(bundle["text/html"]) == bundle["application/vnd.vegalite.v6+json"]


def test_the_drawing_is_an_image_and_the_table_is_outside_it(layers):
    html = bundle_of(by_layer(layers))["text/html"]
    drawing = re.search(r'<div class="rim-vega" role="img" aria-label="Accuracy rises.">.*?</div>', html)
    assert drawing is not None
    assert "<table>" not in drawing.group(0)
    assert html.count("<tr>") == 1 + len(layers)
    assert "shuffled labels" in html


def test_text_in_the_data_cannot_end_the_script_or_become_markup(layers):
    evil = "</script><img src=x onerror=alert(1)><!--"
    html = bundle_of(by_layer(layers.assign(series=evil), description=evil))["text/html"]
    assert html.count("</script>") == 1
    assert "<img" not in html
    assert "<!--" not in html
    assert spec_in(html)["description"] == evil


def test_equal_charts_give_equal_bytes(layers):
    assert bundle_of(by_layer(layers)) == bundle_of(by_layer(layers.copy()))


def test_missing_numbers_stay_out_of_the_json(layers):
    layers.loc[0, "low"] = float("nan")
    html = bundle_of(by_layer(layers))["text/html"]
    assert "NaN" not in html
    assert "–" in html


CHARTS = {
    "by_layer": lambda frame: charts.by_layer(frame, "accuracy", series="series"),
    "by_layer, one line": lambda frame: charts.by_layer(frame[frame["series"] == "risky"], "accuracy", chance=0.5),
    "intervals": lambda frame: charts.intervals(frame, "accuracy", label="series", reference=0.5),
    "intervals by series": lambda frame: charts.intervals(frame, "accuracy", label="layer", series="series"),
    "intervals, a rule": lambda frame: charts.intervals(
        frame, "accuracy", label="series", names=["risky", "shuffled labels", "other"], allowed=(0.5, math.inf)
    ),
    "distribution": lambda frame: charts.distribution(frame, "accuracy", series="series", reference=0.5),
    "distribution, one": lambda frame: charts.distribution(frame, "accuracy"),
    "scatter": lambda frame: charts.scatter(frame, "layer", "accuracy", series="series"),
    "heatmap": lambda frame: charts.heatmap(frame, "accuracy", x="layer", y="series", diverging=True),
}


@pytest.mark.parametrize("chart", CHARTS.values(), ids=CHARTS)
def test_every_chart_fits_its_container_and_says_which_column_is_missing(layers, chart):
    html = bundle_of(chart(layers))["text/html"]
    assert spec_in(html)["width"] == "container"
    assert html.count("<table>") == 1
    with pytest.raises(InputError, match="no column accuracy"):
        chart(layers.drop(columns="accuracy"))
    with pytest.raises(InputError, match="no rows"):
        chart(layers.iloc[:0])


@pytest.mark.parametrize("chart", CHARTS.values(), ids=CHARTS)
def test_titles_and_description_are_made_of_the_table(layers, chart):
    spec = chart(layers).to_dict()
    assert "accuracy" in " ".join(spec["title"]["text"]).lower()
    assert {"0.5", "0.8"} <= set(re.findall(r"[\d.]+\d", spec["description"]))


def test_a_description_names_the_least_and_the_largest_of_each_series(layers):
    table = layers.assign(series=[f"s{number}" for number in range(len(layers))])
    told = charts.by_layer(table, "accuracy", series="series", title="T").to_dict()["description"]
    assert told.startswith("T. Accuracy from s0: 0.5 (layer 0) to 0.5 (layer 0); s1: 0.6 (layer 1) to")
    assert told.endswith("; and 2 more.")


def test_a_line_without_intervals_has_no_band(layers):
    marks = [
        part["mark"]["type"]
        for part in charts.by_layer(layers.drop(columns=["low", "high"]), "accuracy", series="series").to_dict()[
            "layer"
        ]
    ]
    assert marks == ["line", "point"]
    with pytest.raises(InputError, match="no column lo"):
        charts.by_layer(layers, "accuracy", series="series", low="lo")


def test_what_a_rule_allows_is_shaded_and_labels_keep_their_colours(layers):
    def spec(allowed: tuple[float, float]) -> dict:
        names = ["other", "risky", "shuffled labels"]
        return charts.intervals(layers, "accuracy", label="series", names=names, allowed=allowed).to_dict()

    shade, *lines = spec((0.5, math.inf))["layer"][:-2]
    (ends,) = (rows for rows in spec((0.5, math.inf))["datasets"].values() if "from" in rows[0])
    assert (shade["mark"]["type"], len(lines), ends[0]["from"]) == ("rect", 1, 0.5)
    assert ends[0]["to"] == shade["encoding"]["x"]["scale"]["domain"][1]
    assert len(spec((-math.inf, math.inf))["layer"]) == 2
    assert spec((0.5, 0.6))["layer"][-1]["encoding"]["color"]["scale"]["range"][1] == charts.PALETTE[1]


def test_charts_stand_below_and_beside_one_another(layers):
    one, other = by_layer(layers), charts.heatmap(layers, "accuracy", x="layer", y="series")
    for both in (one & other, one | other, (one & other) | by_layer(layers.assign(accuracy=0.1))):
        bundle = bundle_of(both)
        assert bundle["text/plain"].startswith("Accuracy rises. Accuracy by series and layer")
        assert bundle["text/html"].count("<table>") == bundle["text/plain"].count("ccuracy by series and layer") + (
            bundle["text/plain"].count("Accuracy rises.")
        )
        assert "width" not in spec_in(bundle["text/html"])


def test_text_and_background_colours_are_left_to_the_page(layers):
    config = by_layer(layers).to_dict()["config"]
    assert "background" not in config
    assert not [key for part in config.values() for key in part if key.endswith("Color")]


def test_a_scatter_tells_series_apart_by_shape_too_and_its_table_has_every_point(layers):
    chart = charts.scatter(
        layers, "low", "accuracy", series="series", title="t", x_title="x", y_title="y", description="d"
    )
    points = chart.to_dict()["layer"][0]["encoding"]
    ranges = [points[channel]["scale"] for channel in ("color", "shape")]
    assert all(scale["domain"] == ["risky", "shuffled labels"] for scale in ranges)
    assert all(len(set(scale["range"])) == 2 for scale in ranges)
    html = bundle_of(chart)["text/html"]
    assert html.count("<tr>") == 1 + len(layers)
    assert '<th scope="col">x</th><th scope="col">y</th>' in html


def histogram(values: dict[str, list[float]], **options) -> pd.DataFrame:
    frame = pd.DataFrame([{"class": name, "score": v} for name, row in values.items() for v in row])
    chart = charts.distribution(frame, "score", series="class", title="t", x_title="score", description="d", **options)
    spec = chart.to_dict()
    return pd.DataFrame(max(spec["datasets"].values(), key=len))


def test_a_distribution_holds_each_series_shares_in_common_bins():
    table = histogram({"risky": [0.0, 1.0, 1.5, 4.0], "safe": [2.5]}, bins=4)
    bins = {name: rows.set_index("from")["share"].to_dict() for name, rows in table.groupby("class")}
    assert bins["risky"] == {-1: 0.0, 0: 0.25, 1: 0.5, 2: 0.0, 3: 0.25, 4: 0.0}
    assert bins["safe"] == {-1: 0.0, 0: 0.0, 1: 0.0, 2: 1.0, 3: 0.0, 4: 0.0}


def test_a_distribution_loses_no_value_to_rounding_or_to_a_lack_of_spread():
    awkward = [0.1 + 0.7 * i / 3 for i in range(50)]
    for values in (awkward, [0.3], [-2.0, -2.0]):
        table = histogram({"all": values}, bins=7)
        assert table["share"].sum() == pytest.approx(1)
        assert (table["share"].iloc[[0, -1]] == 0).all()


def test_a_distribution_of_what_is_no_number_is_refused():
    with pytest.raises(InputError, match="2 values of score are NaN or infinite"):
        histogram({"all": [0.0, float("nan"), float("inf")]})


def test_a_saved_figure_opens_without_a_network(layers, tmp_path):
    """All that draws it is inside; nothing is fetched."""
    page = charts.save(by_layer(layers) & by_layer(layers), tmp_path / "figure.html").read_text(encoding="utf-8")
    assert spec_in(page)["vconcat"]
    assert "vegaEmbed(target, specification" in page
    assert not re.search(r"<script[^>]* src=", page)
    saved = json.loads(charts.save(by_layer(layers), tmp_path / "figure.json").read_text(encoding="utf-8"))
    assert saved["description"] == "Accuracy rises."


def test_a_figure_that_cannot_be_saved_is_refused(layers, tmp_path, monkeypatch):
    for path, words in (("a.pptx", "must end in .html"), ("a.svg", "vl-convert-python")):
        with pytest.raises(InputError, match=words):
            charts.save(by_layer(layers), tmp_path / path)
    monkeypatch.setattr("rim_core.paths.root", lambda: tmp_path)
    with pytest.raises(InputError, match=r"cannot read .*rim.css"):
        charts.save(by_layer(layers), tmp_path / "a.html")
