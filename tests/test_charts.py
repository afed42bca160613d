import json
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


@pytest.mark.parametrize(
    "chart",
    [
        pytest.param(by_layer, id="by_layer"),
        pytest.param(
            lambda frame: charts.intervals(
                frame, "accuracy", label="series", title="t", x_title="x", description="d", reference=0.5
            ),
            id="intervals",
        ),
        pytest.param(
            lambda frame: charts.intervals(
                frame, "accuracy", label="layer", title="t", x_title="x", description="d", series="series"
            ),
            id="intervals by series",
        ),
        pytest.param(
            lambda frame: charts.distribution(
                frame, "accuracy", series="series", title="t", x_title="x", description="d", reference=0.5
            ),
            id="distribution",
        ),
        pytest.param(
            lambda frame: charts.scatter(
                frame, "layer", "accuracy", series="series", title="t", x_title="x", y_title="y", description="d"
            ),
            id="scatter",
        ),
        pytest.param(
            lambda frame: charts.heatmap(
                frame,
                "accuracy",
                x="layer",
                y="series",
                title="t",
                x_title="layer",
                y_title="s",
                value_title="v",
                description="d",
                diverging=True,
            ),
            id="heatmap",
        ),
    ],
)
def test_every_chart_fits_its_container_and_says_which_column_is_missing(layers, chart):
    assert spec_in(bundle_of(chart(layers))["text/html"])["width"] == "container"
    with pytest.raises(InputError, match="no column accuracy"):
        chart(layers.drop(columns="accuracy"))
    with pytest.raises(InputError, match="no rows"):
        chart(layers.iloc[:0])


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
