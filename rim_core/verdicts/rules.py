"""The rules that decide a claim: pure functions from values over seeds to a finding and its reasons."""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rim_core.verdicts.schema import BetterThanControl, Near, Order, Range, Rule, ShareOfLayers, Sign

Values = Sequence[Any] | Mapping[str, Sequence[Any]]
Interval = tuple[float, float]
SYMBOLS = {
    "validated": "✓",
    "partially_supported": "◐",
    "contradicted": "✗",
    "inconclusive": "?",
    "not_applicable": "–",
    "not_tested": "○",
    "error": "!",
}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What became of a number, or of a claim: an outcome, why, and the interval it rests on.

    Attributes:
        outcome: one of `SYMBOLS`.
        reasons: sentences; a page gives each a line.
        value: the mean over seeds, in the number's unit.
        low: with `high`, the 95 % interval.
        values: by seed, as plain JSON.
    """

    outcome: str
    reasons: Sequence[str]
    value: float | None = None
    low: float | None = None
    high: float | None = None
    values: Any = None

    @property
    def reason(self) -> str:
        """The reasons in one line."""
        return "; ".join(self.reasons)

    @property
    def label(self) -> str:
        """Symbol and word, so that the outcome is never told by colour or shape alone."""
        return f"{SYMBOLS[self.outcome]} {self.outcome.replace('_', ' ')}"

    @property
    def numbers(self) -> str:
        """The value with its interval, as text."""
        return number_text(self.value, self.low, self.high)


def number_text(value: float | None, low: float | None, high: float | None) -> str:
    """Write a value with its interval: `0.97 [0.95, 0.99]`; a dash where nothing was measured."""
    if value is None:
        return "–"
    if low is None or high is None:
        return f"{value:.3g}"
    return f"{value:.3g} [{low:.3g}, {high:.3g}]"


def t_interval_over_seeds(values: Sequence[float], bounds: Interval | None = None) -> Interval | None:
    """Give the two-sided 95 % t interval of the mean over seeds, cut to the metric's `bounds`.

    Equal values give a zero-width interval; a single value gives None, as its spread is unknown. Cutting to
    the bounds matters: without it accuracies of 0.98, 1.0 and 1.0 would reach beyond 1.
    """
    n = len(values)
    if n < 2:
        return None
    if min(values) == max(values):
        return (values[0], values[0])
    mean = math.fsum(values) / n
    spread = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1))
    half = _t_quantile(n - 1) * spread / math.sqrt(n)
    low, high = mean - half, mean + half
    if bounds:
        low, high = max(low, bounds[0]), min(high, bounds[1])
    return (low, high)


@functools.cache
def _t_quantile(degrees: int) -> float:
    from scipy.stats import t  # a second to import, which `rim claims` without runs need not pay

    return float(t.ppf(0.975, degrees))


def combine(findings: Mapping[str, Finding]) -> Finding:
    """Combine the parts of a rule `all`; the value shown is the first part's."""
    shown = next(iter(findings.values()))
    for state in ("error", "not_tested"):
        for name, found in findings.items():
            if found.outcome == state:
                return replace(shown, outcome=state, reasons=(f"{name}: {found.reason}",))
    first, *others = {found.outcome for found in findings.values()}
    mixed = "partially_supported" if "validated" in (first, *others) else "inconclusive"
    told = tuple(f"{found.reason} ({found.outcome.replace('_', ' ')})" for found in findings.values())
    return replace(shown, outcome=mixed if others else first, reasons=told)


def judge(
    name: str,
    rule: Rule | None,
    values: Values,
    min_seeds: int,
    *,
    bounds: Interval | None = None,
    interval: Interval | None = None,
    controls: Mapping[str, Sequence[Any]] | None = None,
) -> Finding:
    """Judge values by one rule; with no rule (a control that is only compared with) they are summarised.

    Args:
        name: of the number.
        rule: any but `all`.
        values: over seeds; for a rule `order` a mapping from each name to its values.
        min_seeds: fewer are no test.
        bounds: what the number can be at all; a value outside is an error.
        interval: (low, high) of the value, in place of the t interval over seeds.
        controls: of a rule that compares with one.
    """
    series = dict(values) if isinstance(values, Mapping) else {name: values}
    if isinstance(rule, ShareOfLayers):
        bounds = bounds or (0.0, 1.0)
    if isinstance(rule, Order):
        series = {key: series[key] for key in rule.order}
    clean: dict[str, list[float]] = {}
    for key, row in series.items():
        clean[key] = [number for number in map(finite, row) if number is not None]
        if len(clean[key]) < len(row):
            return Finding(outcome="error", reasons=(f"{key} has a value that is not a finite number",))
    for key, seeds in clean.items():
        if bounds and any(not bounds[0] <= v <= bounds[1] for v in seeds):
            told = f"{key} has a value outside its range [{bounds[0]:g}, {bounds[1]:g}]"
            return Finding(outcome="error", reasons=(told,))
        if len(seeds) < min_seeds:
            told = f"{key} has {len(seeds)} seed(s) of the {min_seeds} needed"
            return Finding(outcome="not_tested", reasons=(told,), value=_mean(seeds) if seeds else None)
    if isinstance(rule, Order):
        return _judge_order(rule, clean)
    mine = clean[name]
    if isinstance(rule, BetterThanControl):
        other = [finite(value) for value in (controls or {})[rule.control]]
        gaps = [a - b for a, b in zip(mine, other, strict=True) if b is not None]
        if len(gaps) < len(other):
            told = f"control {rule.control} has a value that is not a finite number"
            return Finding(outcome="error", reasons=(told,))
        return _compare(f"{name} over {rule.control}", rule, gaps, t_interval_over_seeds(gaps))
    found = (float(interval[0]), float(interval[1])) if interval else t_interval_over_seeds(mine, bounds)
    if rule is None:
        low, high = found or (None, None)
        return Finding(outcome="validated", reasons=("for comparison",), value=_mean(mine), low=low, high=high)
    return _compare(name, rule, mine, found)


def _mean(row: Sequence[float]) -> float:
    return math.fsum(row) / len(row)


def _judge_order(rule: Order, rows: Mapping[str, list[float]]) -> Finding:
    """Judge each neighbouring pair by its differences, seed by seed; the smallest gap is shown."""
    steps = []
    for below, above in zip(rule.order, rule.order[1:], strict=False):
        gaps = [b - a for a, b in zip(rows[below], rows[above], strict=True)]
        steps.append(_compare(f"{above} over {below}", rule, gaps, t_interval_over_seeds(gaps)))
    for state in ("contradicted", "inconclusive"):
        if wrong := next((step for step in steps if step.outcome == state), None):
            return wrong
    return min(steps, key=lambda step: step.value or 0.0)


def allowed(rule: Rule) -> tuple[float, float, str]:
    """Give what a rule (not `all`) asks of its value, or of its gap: the least, the most, and both in words."""
    low, high, strict = _inside(rule)
    if math.isinf(high):
        return low, high, f"above {low:g}" if strict else f"at least {low:g}"
    if math.isinf(low):
        return low, high, f"below {high:g}" if strict else f"at most {high:g}"
    return low, high, f"between {low:g} and {high:g}"


def _inside(rule: Rule) -> tuple[float, float, bool]:
    """Give a rule as (low, high, whether these ends themselves are outside)."""
    match rule:
        case Sign():
            return (0.0, math.inf, True) if rule.sign == "positive" else (-math.inf, 0.0, True)
        case Near():
            return rule.target - rule.tolerance, rule.target + rule.tolerance, False
        case Range():
            return rule.low, rule.high, False
        case ShareOfLayers():
            return rule.low, math.inf, False
        case Order() | BetterThanControl():  # a gap must be more than nothing where the margin is zero
            return rule.margin, math.inf, rule.margin == 0
    raise TypeError(f"{rule.kind} has no interval of its own")


def _compare(name: str, rule: Rule, row: Sequence[float], found: Interval | None) -> Finding:
    value = _mean(row)
    if found is None:
        return Finding(outcome="inconclusive", reasons=(f"{name} has one seed, so no interval",), value=value)
    least, most = found
    low, high, strict = _inside(rule)
    if strict:
        inside, outside = low < least and most < high, most <= low or least >= high
    else:
        inside, outside = low <= least and most <= high, most < low or least > high
    asked = allowed(rule)[2]
    told = f"{name.replace('_', ' ')} {number_text(value, least, most)}"
    if inside:
        outcome, reason = "validated", f"{told} is {asked}"
    elif outside:
        outcome, reason = "contradicted", f"{told} is not {asked}"
    else:
        outcome, reason = "inconclusive", f"the interval of {told} straddles the rule: {asked}"
    return Finding(outcome=outcome, reasons=(reason,), value=value, low=least, high=most)


def finite(value: Any) -> float | None:
    """Give a value as a float, or None where it is no finite number."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None
