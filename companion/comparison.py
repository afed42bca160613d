"""The measurements that suites share: each number that a decided claim rests on, by suite, beside its rule."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import altair as alt
import pandas as pd

from companion.outcomes import read_run
from rim_core import charts
from rim_core.verdicts.deciding import Outcome
from rim_core.verdicts.rules import Finding, allowed, number_text
from rim_core.verdicts.schema import BetterThanControl, Claim, Order, Rule, every_claim

# Outcomes that rest on an interval: without one there is nothing to compare.
DECIDED = ("validated", "partially_supported", "contradicted", "inconclusive")


@dataclass(frozen=True)
class Number:
    """One number of a claim on one suite.

    Attributes:
        name: of the claim's metric, of a part of its rule, or of a control, as its file has it.
        title: what a reader calls it.
        value: the mean over seeds, with its 95 % interval `low` to `high`; of an order or a comparison with a
            control, the gap.
        least: with `most`, what the number's own rule allows; infinite where the rule sets no such end.
        asked: the same in words, such as "at least 0.9"; empty for a control that is only compared with.
    """

    paper: str
    claim: str
    name: str
    title: str
    suite: str
    unit: str
    value: float
    low: float | None
    high: float | None
    least: float
    most: float
    asked: str

    @property
    def text(self) -> str:
        """The value with its interval."""
        return number_text(self.value, self.low, self.high)


def numbers(results_dir: Path, rows: Iterable[Mapping[str, Any]]) -> list[Number]:
    """Give every number of the claims that `rows` of the scorecard decided, controls last, in their order."""
    folder = results_dir.parent / "book" / "claims"
    known = {(claim.paper, claim.id): claim for claim in every_claim(folder)}
    found: list[Number] = []
    for row in rows:
        if row["outcome"] in DECIDED:
            claim = known[row["paper"], row["claim"]]
            found += _numbers_of(claim, row["suite"], results_dir / row["suite"] / row["notebook"])
    return found


def _numbers_of(claim: Claim, suite: str, folder: Path) -> list[Number]:
    _, recorded, _ = read_run(folder, claim)
    assert recorded is not None  # the scorecard decided it
    outcome = Outcome.from_json(claim, recorded)
    parts = [(part.metric, _titled(claim, part.metric, part.rule), part.rule) for part in claim.parts]
    made = [_number(claim, suite, name, title, rule, outcome.parts[name]) for name, title, rule in parts]
    for control in claim.controls:
        found = outcome.controls[control.name]
        made.append(_number(claim, suite, control.name, f"control {control.name}", control.rule, found))
    return made


def _titled(claim: Claim, name: str, rule: Rule) -> str:
    # The project's parts are often the paper's and the sound version of the metric.
    title = f"{claim.metric.name}, {name}" if name in ("published", "sound") else name
    if isinstance(rule, Order):
        return f"{title}, the gap that decides"
    return f"{title} over {rule.control}" if isinstance(rule, BetterThanControl) else title


def _number(claim: Claim, suite: str, name: str, title: str, rule: Rule | None, finding: Finding) -> Number:
    assert finding.value is not None  # a decided claim has all its numbers
    least, most, asked = allowed(rule) if rule else (-math.inf, math.inf, "")
    return Number(
        paper=claim.paper,
        claim=claim.id,
        name=name,
        title=title.replace("_", " "),
        suite=suite,
        unit=claim.unit_of(name),
        value=finding.value,
        low=finding.low,
        high=finding.high,
        least=least,
        most=most,
        asked=asked,
    )


def shared(found: Sequence[Number]) -> list[list[Number]]:
    """Give the numbers that at least two suites have, one list a number, in their order."""
    groups: dict[tuple[str, str, str], list[Number]] = {}
    for number in found:
        groups.setdefault((number.paper, number.claim, number.title), []).append(number)
    return [group for group in groups.values() if len(group) > 1]


def figure(group: Sequence[Number], suites: Sequence[str]) -> alt.LayerChart:
    """Draw one number on each suite that has it, and what its rule allows; `suites` are all of the book's."""
    one = group[0]
    frame = pd.DataFrame([{"suite": n.suite, "measured": n.value, "low": n.low, "high": n.high} for n in group])
    question = f"is it {one.asked}?" if one.asked else "is it the same?"
    told = "; ".join(f"{n.suite} {n.text}" for n in group)
    rule = f" The shaded range is what the rule allows: {one.asked}." if one.asked else ""
    return charts.intervals(
        frame,
        "measured",
        label="suite",
        names=suites,
        title=f"{one.claim}, {one.title}: {question}",
        x_title=one.unit or one.name.replace("_", " "),
        description=f"Dots with 95 % intervals, a row for each suite: {one.title} of claim {one.claim}"
        f"{f', {one.unit}' if one.unit else ''}. {told}.{rule}",
        allowed=(one.least, one.most),
    )
