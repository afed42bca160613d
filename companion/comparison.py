"""The measurements that suites share: each number that a decided claim rests on, by suite, beside its rule."""

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
from rim_core.verdicts.schema import Check, Claim, Part, every_claim

# Outcomes that rest on an interval: without one there is nothing to compare.
DECIDED = ("holds", "contradicted", "undecided")


@dataclass(frozen=True)
class Number:
    """One number of a claim on one suite.

    Attributes:
        name: of a part or a check, as the claim's file has it.
        title: what a reader calls it.
        value: with its 95 % interval `low` to `high`.
        least: with `most`, what the number's own rule allows; infinite where the rule sets no such end.
        asked: the same in words, such as "at least 0.9".
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
    """Give every number of the claims that `rows` of the scorecard decided, checks last, in their order."""
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
    made = [_number(claim, suite, part, part.title, outcome.parts[part.name]) for part in claim.parts]
    return made + [
        _number(claim, suite, check, f"check: {check.title}", outcome.checks[check.name]) for check in claim.checks
    ]


def _number(claim: Claim, suite: str, number: Part | Check, title: str, finding: Finding) -> Number:
    assert finding.value is not None  # a decided claim has all its numbers
    least, most, asked = allowed(number.rule)
    return Number(
        paper=claim.paper,
        claim=claim.id,
        name=number.name,
        title=title,
        suite=suite,
        unit=number.unit,
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
    told = "; ".join(f"{n.suite} {n.text}" for n in group)
    return charts.intervals(
        frame,
        "measured",
        label="suite",
        names=suites,
        title=f"{one.claim}, {one.title}: is it {one.asked}?",
        x_title=one.unit or one.name.replace("_", " "),
        description=f"Dots with 95 % intervals, a row for each suite: {one.title} of claim {one.claim}"
        f"{f', {one.unit}' if one.unit else ''}. {told}. The shaded range is what the rule allows: {one.asked}.",
        allowed=(one.least, one.most),
    )
