"""Claims decided by their rules: properties, each rule, files of claims, and the scorecard."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_project
import yaml
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ttest_1samp
from tiny_project import put_run

from companion import outcomes
from rim_core.errors import InputError
from rim_core.verdicts import deciding
from rim_core.verdicts.rules import t_interval_over_seeds
from rim_core.verdicts.schema import Claim, load_claims

finite = st.floats(-100, 100, allow_nan=False)
rows = st.lists(finite, min_size=3, max_size=8)
shares = st.lists(st.floats(0, 1), min_size=3, max_size=8)
CONTROL = {"name": "shuffled", "rule": {"kind": "range", "low": 0.4, "high": 0.6}, "why": "nothing to learn"}


def claim(rule: dict[str, Any], **more: Any) -> Claim:
    metric = {"name": "number", "unit": "share", "notebook": "one/01_first", **more.pop("metric", {})}
    fields = {"paper": "paper_a", "id": "A1", "statement": "S", "where": "F", "published": {"value": None}}
    return Claim(**{**fields, "metric": metric, "rule": rule, **more})


def outcome(rule: dict[str, Any], values: Any, measured: Any = None, interval: Any = None, **more: Any) -> str:
    return deciding.decide(claim(rule, **more), values, controls=measured, interval=interval).outcome


# --- properties -----------------------------------------------------------------------------------------


@given(rows, finite, st.floats(0, 50), st.floats(0, 50))
def test_loosening_a_bound_never_makes_validated_contradicted(values, low, width, slack):
    order = {"contradicted": 0, "inconclusive": 1, "validated": 2}
    tight = outcome({"kind": "range", "low": low, "high": low + width}, values)
    loose = outcome({"kind": "range", "low": low - slack, "high": low + width + slack}, values)
    assert order[loose] >= order[tight]


@given(rows, finite, st.floats(0, 10), st.floats(0, 10))
def test_loosening_a_tolerance_or_a_margin_never_hurts(values, target, tolerance, slack):
    order = {"contradicted": 0, "inconclusive": 1, "validated": 2}
    near = [outcome({"kind": "near", "target": target, "tolerance": t}, values) for t in (tolerance, tolerance + slack)]
    assert order[near[1]] >= order[near[0]]
    controls = {"base": [0.0] * len(values)}
    compared = ({"name": "base", "why": "compared with"},)
    margins = [
        outcome({"kind": "better_than_control", "control": "base", "margin": m}, values, controls, controls=compared)
        for m in (tolerance + slack, tolerance)
    ]
    assert order[margins[1]] >= order[margins[0]]


@given(rows, st.lists(st.floats(0.61, 1), min_size=3, max_size=8))
def test_a_control_that_fails_never_validates(values, shuffled):
    found = deciding.decide(
        claim({"kind": "range", "low": -1e9}, controls=(CONTROL,)), values, controls={"shuffled": shuffled}
    )
    assert found.outcome == "inconclusive"
    assert "shuffled" in found.reason
    assert "nothing to learn" in found.reason


@given(rows, st.sampled_from([math.nan, math.inf, -math.inf, None, "x"]), st.integers(0, 2))
def test_a_value_that_is_no_number_is_an_error(values, bad, place):
    values[place] = bad
    assert outcome({"kind": "range", "low": -1e9}, values) == "error"
    controls = {"shuffled": values}
    assert outcome({"kind": "range", "low": 0}, [1, 1, 1], controls, controls=(CONTROL,)) == "error"


@given(st.lists(finite, max_size=2))
def test_too_few_seeds_are_not_a_test(values):
    assert outcome({"kind": "range", "low": -1e9}, values) == "not_tested"
    controls = {"shuffled": [0.5, 0.5]}
    assert outcome({"kind": "range", "low": 0}, [1, 1, 1], controls, controls=(CONTROL,)) == "not_tested"


@given(rows.filter(lambda v: max(v) - min(v) > 1e-6))
def test_an_interval_that_straddles_is_inconclusive(values):
    mean = math.fsum(values) / len(values)
    for rule in ({"low": mean}, {"high": mean}):
        assert outcome({"kind": "range", **rule}, values) == "inconclusive"


@given(rows.filter(lambda v: max(v) - min(v) > 1e-6))
def test_the_interval_is_the_t_interval(values):
    expected = ttest_1samp(values, 0).confidence_interval(0.95)
    assert t_interval_over_seeds(values) == pytest.approx((expected.low, expected.high), rel=1e-9, abs=1e-9)


@given(shares)
def test_an_interval_stays_in_the_metric_s_bounds(values):
    low, high = t_interval_over_seeds(values, (0, 1))
    assert 0 <= low <= high <= 1


@given(rows, finite)
def test_the_outcome_survives_the_way_through_json(values, low):
    made = claim({"kind": "range", "low": low})
    found = deciding.decide(made, values)
    assert deciding.Outcome.from_json(made, json.loads(json.dumps(found.to_dict()))) == found


# --- rules ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "values", "expected"),
    [
        ({"kind": "range", "low": 0.95}, [0.97, 0.98, 0.98], "validated"),
        ({"kind": "range", "low": 0.995}, [0.97, 0.98, 0.98], "contradicted"),
        ({"kind": "range", "low": 1.0}, [1.0, 1.0, 1.0], "validated"),
        ({"kind": "range", "high": 0.5}, [1.0, 1.0, 1.0], "contradicted"),
        ({"kind": "sign", "sign": "positive"}, [0.1, 0.11, 0.12], "validated"),
        ({"kind": "sign", "sign": "positive"}, [0.0, 0.0, 0.0], "contradicted"),
        ({"kind": "sign", "sign": "negative"}, [0.1, -0.1, 0.1], "inconclusive"),
        ({"kind": "near", "target": 1, "tolerance": 0.1}, [1.0, 1.01, 0.99], "validated"),
        ({"kind": "share_of_layers", "low": 0.9}, [0.97, 1.0, 1.0], "validated"),
        ({"kind": "share_of_layers", "low": 0.9}, [0.97, 1.0, 1.2], "error"),
        ({"kind": "order", "order": ["a", "b"]}, {"b": [2, 3, 4], "a": [1, 2, 3]}, "validated"),
        ({"kind": "order", "order": ["b", "a"]}, {"b": [2, 3, 4], "a": [1, 2, 3]}, "contradicted"),
        ({"kind": "order", "order": ["a", "b"], "margin": 2}, {"b": [2, 3, 4], "a": [1, 2, 3]}, "contradicted"),
        ({"kind": "order", "order": ["a", "b"]}, {"b": [2, 3, 4], "a": [2, 3, 4]}, "contradicted"),
        ({"kind": "order", "order": ["a", "b"]}, {"b": [2, 3, 4], "a": [1, 4, 3]}, "inconclusive"),
    ],
)
def test_each_rule(rule, values, expected):
    assert outcome(rule, values) == expected


def test_seeds_are_paired_when_compared_with_a_control():
    rule = {"kind": "better_than_control", "control": "random", "margin": 0.05}
    compared = ({"name": "random", "why": "compared with"},)
    values, random = [0.5, 0.7, 0.9], [0.4, 0.6, 0.8]  # the spread over seeds is shared, the gap is steady
    assert outcome(rule, values, {"random": random}, controls=compared) == "validated"
    assert outcome(rule, values, {"random": random[::-1]}, controls=compared) == "inconclusive"
    with pytest.raises(InputError, match="number 3, random 2"):
        outcome(rule, values, {"random": random[:2]}, controls=compared)


def test_parts_that_differ_support_a_claim_in_part():
    parts = [{"metric": name, "rule": {"kind": "range", "low": 0.5}} for name in ("a", "b")]
    rule = {"kind": "all", "parts": parts}
    yes, no, maybe = [0.9, 0.9, 0.9], [0.1, 0.1, 0.1], [0.4, 0.5, 0.6]
    assert outcome(rule, {"a": yes, "b": yes}) == "validated"
    assert outcome(rule, {"a": yes, "b": no}) == "partially_supported"
    assert outcome(rule, {"a": no, "b": no}) == "contradicted"
    assert outcome(rule, {"a": no, "b": maybe}) == "inconclusive"
    assert outcome(rule, {"a": yes, "b": [0.9]}) == "not_tested"
    assert outcome(rule, {"a": yes, "b": [0.9, 0.9, None]}) == "error"


def test_a_reason_is_told_in_whole_sentences():
    why = {**CONTROL, "why": "nothing to learn; a probe that does has another source"}
    parts = [{"metric": name, "rule": {"kind": "range", "low": 0.5}} for name in ("one", "two")]
    rule = {"kind": "all", "parts": parts}
    values = {"one": [0.9, 0.9, 0.9], "two": [0.1, 0.1, 0.1]}
    found = deciding.decide(claim(rule, controls=(why,)), values, controls={"shuffled": [0.9, 0.9, 0.9]})
    control, first, second = found.reasons
    assert control.endswith("(nothing to learn; a probe that does has another source)")
    assert first == "measured: one 0.9 [0.9, 0.9] is at least 0.5 (validated)"
    assert second == "two 0.1 [0.1, 0.1] is not at least 0.5 (contradicted)"
    assert found.reason == "; ".join(found.reasons)
    assert found._repr_html_().count("<p>") == 2 + len(found.reasons)


def test_one_seed_has_no_interval_unless_one_is_given():
    rule = {"kind": "range", "low": 0.5}
    assert outcome(rule, [0.9], min_seeds=1) == "inconclusive"
    assert outcome(rule, [0.9], min_seeds=1, interval=(0.8, 0.95)) == "validated"
    assert outcome(rule, [0.9], min_seeds=1, interval=(0.4, 0.95)) == "inconclusive"
    with pytest.raises(InputError, match="not \\(low, high\\)"):
        outcome(rule, [0.9], min_seeds=1, interval=(0.9, 0.1))
    with pytest.raises(InputError, match=r"number has the value 0.1, outside its interval \(0.8, 0.9\)"):
        outcome(rule, [0.1], min_seeds=1, interval=(0.8, 0.9))
    with pytest.raises(InputError, match=r"is not \(low, high\)"):
        outcome(rule, [0.9], min_seeds=1, interval=(0.9,))
    # At an end, as a score of 1 in its interval up to 1, it is inside.
    assert outcome(rule, [1.0] * 3, interval=(0.97, 1.0)) == "validated"


def test_bounds_keep_a_near_perfect_score_from_straddling():
    rule, values = {"kind": "range", "low": 0.9, "high": 1.0}, [0.98, 1.0, 1.0]
    assert outcome(rule, values) == "inconclusive"
    assert outcome(rule, values, metric={"bounds": [0, 1]}) == "validated"


def test_numpy_values_are_taken_and_become_plain():
    found = deciding.decide(claim({"kind": "range", "low": 0.5}), np.array([0.9, 0.8, 0.9], dtype=np.float32))
    assert found.outcome == "validated"
    json.dumps(found.to_dict())


def test_names_must_be_the_file_s():
    with pytest.raises(InputError, match="missing shuffled; not in the file: shufled"):
        outcome({"kind": "range", "low": 0}, [1, 1, 1], {"shufled": [0.5] * 3}, controls=(CONTROL,))
    with pytest.raises(InputError, match="list over seeds is needed; got float"):
        outcome({"kind": "range", "low": 0}, 0.9)
    with pytest.raises(InputError, match="mapping with a, b"):
        outcome({"kind": "order", "order": ["a", "b"]}, {"a": [1, 2, 3]})


def test_symbol_and_word_and_no_markup_from_text():
    html = deciding.decide(claim({"kind": "range", "low": 0}, statement="<b>x</b>"), [1, 1, 1])._repr_html_()
    assert "✓ validated" in html
    assert "<b>" not in html
    assert "model organism" in html


# --- files ----------------------------------------------------------------------------------------------


def write_claims(folder: Path, change: Any) -> Path:
    data = yaml.safe_load(tiny_project.CLAIMS)
    change(data)
    (folder / "paper_a.yml").write_text(yaml.safe_dump(data), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("rule", "kind"), "rnage", r"paper_a.yml:\d+: claims\[A1\].rule.kind: 'rnage' is not a rule"),
        (("rule", "lo"), 1, "rule.lo: not a key here .did you mean 'low'?"),
        (("rule", "low"), "x", "rule.low: 'x' is not a number"),
        (("rule", "high"), 0.1, "rule: low is above high"),
        (("metric", "notebook"), "first", "metric.notebook: 'first' is not of the form section/name"),
        (("metric", "bounds"), [1, 0], "metric.bounds: two numbers"),
        (("min_seeds",), 0, "min_seeds: should be greater than or equal to 1, not 0"),
        (("controls", 0, "why"), None, "why: text is needed"),
        (
            ("controls", 0, "rule"),
            {"kind": "all", "parts": []},
            r"controls\[shuffled\].rule.kind: 'all' is not a rule; kinds: range, sign",
        ),
        (("statement",), "", "statement: text is needed"),
        (("sttement",), "x", "sttement: not a key here .did you mean 'statement'?"),
        (("rule",), {"kind": "better_than_control", "control": "x", "margin": 0}, "rule.control: 'x' is not among"),
        (("published",), 3, "published: a mapping of keys"),
    ],
)
def test_each_mistake_is_one_line_naming_file_claim_and_key(tmp_path, path, value, message):
    def change(data: Any) -> None:
        target = data["claims"][0]
        for key in path[:-1]:
            target = target[key]
        target[path[-1]] = value

    folder = write_claims(tmp_path, change)
    with pytest.raises(InputError, match=message) as caught:
        load_claims("paper_a", folder)
    assert "\n" not in str(caught.value)


def test_a_missing_key_a_double_id_and_broken_yaml(tmp_path):
    with pytest.raises(InputError, match=r"claims\[A1\].where: missing"):
        load_claims("paper_a", write_claims(tmp_path, lambda d: d["claims"][0].pop("where")))
    with pytest.raises(InputError, match=r"claim A1: id: used twice"):
        load_claims("paper_a", write_claims(tmp_path, lambda d: d["claims"].append(d["claims"][0])))
    (tmp_path / "paper_a.yml").write_text("claims: [", encoding="utf-8")
    with pytest.raises(InputError, match=r"paper_a\.yml:1: not readable YAML"):
        load_claims("paper_a", tmp_path)
    with pytest.raises(InputError, match="did you mean 'paper_a'"):
        load_claims("paper_b", tmp_path)


# --- the scorecard --------------------------------------------------------------------------------------


def test_the_scorecard_never_takes_a_missing_run_for_a_pass(tmp_path):
    root = tiny_project.make(tmp_path)
    (row,) = outcomes.rows(root / "results", [str(root / "tiny.yml")])
    keys = "paper claim statement suite outcome reason reasons value low high published notebook run_key"
    assert " ".join(row) == keys
    assert (row["outcome"], row["run_key"], row["suite"]) == ("not_tested", None, "tiny")
    put_run(root, "tiny", [0.9, 0.9, 0.9], shuffled=[0.5, 0.5, 0.5])
    (row,) = outcomes.rows(root / "results")
    assert (row["outcome"], row["value"], row["run_key"]) == ("validated", pytest.approx(0.9), "k")
    failed = root / "results" / "tiny" / "one" / "01_first" / "failed" / "default"
    failed.mkdir(parents=True)
    (failed / "error.json").write_text('{"ename": "ValueError", "evalue": "no"}', encoding="utf-8")
    (row,) = outcomes.rows(root / "results")
    assert (row["outcome"], row["reason"]) == ("error", "the run failed: ValueError: no")


def test_changing_a_bound_or_a_role_changes_the_outcome(tmp_path):
    root = tiny_project.make(tmp_path)
    put_run(root, "tiny", [0.9, 0.9, 0.9], shuffled=[0.5, 0.5, 0.5])
    file = root / "book" / "claims" / "paper_a.yml"
    suite = [str(root / "tiny.yml")]
    file.write_text(tiny_project.CLAIMS.replace("low: 0.5}", "low: 0.95}"), encoding="utf-8")
    assert outcomes.rows(root / "results", suite)[0]["outcome"] == "contradicted"
    file.write_text(tiny_project.CLAIMS.replace("name: shuffled", "name: random"), encoding="utf-8")
    assert outcomes.rows(root / "results", suite)[0]["outcome"] == "not_tested"
    file.write_text(tiny_project.CLAIMS.replace("[base]", "[risky]"), encoding="utf-8")
    (row,) = outcomes.rows(root / "results", suite)
    assert row["outcome"] == "not_applicable"
    assert f"rim organisms train --suite {suite[0]} risky" in row["reason"]
