"""Tidy tables, and files that are there whole or not at all."""

import numpy as np
import pandas as pd
import pytest

import rim_core as rim
from rim_core import checking, paths, stats
from rim_core.errors import InputError
from rim_core.tables import by_axes, means


def test_means_are_those_of_each_group_with_student_s_interval():
    values = np.random.default_rng(0).normal(size=12)
    frame = pd.DataFrame({"role": list("aab") * 4, "layer": [1, 2, 2] * 4, "effect": values})
    table = means(frame, "effect", ["role", "layer"])
    assert list(table) == ["role", "layer", "estimate", "low", "high", "n"]
    assert table[["role", "layer"]].values.tolist() == [["a", 1], ["a", 2], ["b", 2]]
    wanted = stats.t_interval(values[2::3])
    assert tuple(table.iloc[2, 2:]) == (wanted.estimate, wanted.low, wanted.high, 4)
    assert means(frame, "effect")["estimate"].item() == pytest.approx(values.mean())


def test_means_leave_out_what_is_missing_and_give_no_interval_to_one_value():
    frame = pd.DataFrame({"layer": [0, 0, 1], "effect": [1.0, np.nan, np.nan]})
    table = means(frame, "effect", "layer")
    assert table["n"].tolist() == [1, 0]
    assert table["estimate"].tolist()[0] == 1
    assert table[["low", "high"]].isna().all().all()


def test_by_axes_means_over_the_first_axis():
    values = np.random.default_rng(1).normal(size=(5, 2, 3))
    values[0, 1, 2] = np.nan
    table = by_axes(values, layer=[7, 9], head=range(3)).set_index(["layer", "head"])
    assert table.loc[(9, 1), "estimate"] == pytest.approx(values[:, 1, 1].mean())
    assert table.loc[(9, 2), "n"] == 4
    wanted = stats.t_interval(values[:, 0, 2])
    assert tuple(table.loc[(7, 2), ["low", "high"]]) == pytest.approx((wanted.low, wanted.high))


def test_tidy_puts_results_into_one_table(tmp_path):
    rates = rim.compare_rates([True, True, False], [False, True, False])
    table = rim.tidy(
        {
            "rates": rates,
            "mean": stats.t_interval([1.0, 2.0]),
            "layers": stats.t_interval([[1.0, 2.0], [3.0, 5.0]]),
            "test": stats.ks([1, 2], [3, 4]),
            "own": pd.DataFrame({"layer": [3], "estimate": [0.5]}),
            "chance": 0.5,
        }
    )
    assert table["name"].unique().tolist() == ["rates", "mean", "layers", "test", "own", "chance"]
    assert table["estimate"].notna().all()
    assert (table["name"] == "layers").sum() == 2
    table.to_csv(tmp_path / "all.csv", index=False)
    assert len(pd.read_csv(tmp_path / "all.csv")) == len(table)


def test_a_folder_is_put_in_place_whole(tmp_path):
    folder = tmp_path / "new" / "adapter"
    with pytest.raises(InputError, match=r"cannot write .*adapter: No such file"), paths.put_whole(folder) as working:
        (working / "none" / "half").write_text("x")
    assert list(folder.parent.iterdir()) == []
    with paths.put_whole(folder) as working:
        paths.write_json(working / "a.json", {"ü": [1, None]})
    assert paths.read_json(folder / "a.json") == {"ü": [1, None]}
    assert [path.name for path in folder.parent.iterdir()] == ["adapter"]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda folder: means(pd.DataFrame({"a": [1.0]}), "b"), "no column b; the frame has a"),
        (lambda folder: means(pd.DataFrame({"a": [np.inf, 1.0]}), "a"), "NaN or infinite"),
        (lambda folder: rim.tidy({}), "no results given"),
        (lambda folder: rim.tidy([1.0]), "tidy: give results by name, as {'name': result}, not a list"),
        (lambda folder: rim.charts.by_layer({"layer": [0]}), "charts.by_layer: give a pandas DataFrame, .* not a dict"),
        (lambda folder: rim.tidy({"x": pd.DataFrame({"name": [1]})}), "x has a column 'name' of its own"),
        (lambda folder: rim.tidy({"x": "y"}), "tidy: x must be a finite number, not 'y'"),
        (lambda folder: paths.read_json(folder / "none.json"), "cannot read .*none.json: No such file"),
        (lambda folder: paths.read_json(folder / "bad.json"), "bad.json is not readable JSON"),
        (lambda folder: paths.write_json(folder / "bad.json" / "x.json", 1), "cannot write"),
        (lambda folder: checking.array([[1, 2], [3]], "f: x"), "f: x must be an array of real numbers"),
        (lambda folder: checking.array([[1], [2]], "f: x", shape=("n", 3)), r"shape \[2, 1\]; give numbers \[n, 3\]"),
        (lambda folder: checking.array([1], "f: x", ndim=(2, 3)), "in 2 or 3 axes"),
        (lambda folder: checking.array(np.ones((0, 2)), "f: x"), "none empty"),
        (lambda folder: checking.array([1, np.nan], "f: x"), "1 of 2 numbers are NaN"),
        (lambda folder: checking.array(["1"], "f: x"), "must be an array of real numbers"),
        (lambda folder: checking.same_length("f", a=[1], b="12", c=[]), "f: a has 1 items and b 2"),
    ],
)
def test_what_cannot_be_used_is_told_in_one_line(call, words, tmp_path):
    (tmp_path / "bad.json").write_text('{"a": ')
    with pytest.raises(InputError, match=words) as caught:
        call(tmp_path)
    assert "\n" not in str(caught.value)
