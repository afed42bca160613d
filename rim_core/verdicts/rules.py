"""The rules that decide a claim: pure functions from values over seeds to a finding and its reason."""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

Values = Sequence[Any] | Mapping[str, Sequence[Any]]
Bounds = tuple[float, float]


@dataclass(frozen=True)
class Finding:
    """What one rule says of one set of values: an outcome, why, and the interval it rests on.

    `reasons` are sentences; a page gives each a line.
    """

    outcome: str
    reasons: tuple[str, ...]
    value: float | None = None
    low: float | None = None
    high: float | None = None

    @property
    def reason(self) -> str:
        """The reasons in one line."""
        return "; ".join(self.reasons)


def number_text(value: float | None, low: float | None, high: float | None) -> str:
    """Write a value with its interval: `0.97 [0.95, 0.99]`; a dash where nothing was measured."""
    if value is None:
        return "–"
    if low is None or high is None:
        return f"{value:.3g}"
    return f"{value:.3g} [{low:.3g}, {high:.3g}]"


def t_interval_over_seeds(values: Sequence[float], bounds: Bounds | None = None) -> Bounds | None:
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
    states = [f.outcome for f in findings.values()]
    told = tuple(f"{f.reason} ({f.outcome.replace('_', ' ')})" for f in findings.values())
    for state in ("error", "not_tested"):
        if state in states:
            name, first = next((n, f) for n, f in findings.items() if f.outcome == state)
            return replace(shown, outcome=state, reasons=(f"{name}: {first.reason}",))
    if set(states) == {"validated"}:
        outcome = "validated"
    elif "validated" in states:
        outcome = "partially_supported"
    elif set(states) == {"contradicted"}:
        outcome = "contradicted"
    else:
        outcome = "inconclusive"
    return replace(shown, outcome=outcome, reasons=told)


def judge(
    rule: Mapping[str, Any] | None,
    values: Values,
    min_seeds: int,
    name: str,
    bounds: Bounds | None = None,
    interval: Bounds | None = None,
    controls: Mapping[str, Sequence[Any]] | None = None,
) -> Finding:
    """Judge values by one rule; with no rule (a control that is only compared with) they are summarised."""
    series = dict(values) if isinstance(values, Mapping) else {name: values}
    if rule and rule["kind"] == "share_of_layers":
        bounds = bounds or (0.0, 1.0)
    if rule and rule["kind"] == "order":
        series = {key: series[key] for key in rule["order"]}
    numbers = {key: [finite(v) for v in row] for key, row in series.items()}
    for key, row in numbers.items():
        if any(v is None for v in row):
            return Finding("error", (f"{key} has a value that is not a finite number",))
    clean: dict[str, list[float]] = {key: [v for v in row if v is not None] for key, row in numbers.items()}
    for key, seeds in clean.items():
        if bounds and any(not bounds[0] <= v <= bounds[1] for v in seeds):
            return Finding("error", (f"{key} has a value outside its range [{bounds[0]:g}, {bounds[1]:g}]",))
        if len(seeds) < min_seeds:
            value = math.fsum(seeds) / len(seeds) if seeds else None
            return Finding("not_tested", (f"{key} has {len(seeds)} seed(s) of the {min_seeds} needed",), value)
    if rule and rule["kind"] == "order":
        return _judge_order(rule, clean)
    mine = clean[name]
    if rule and rule["kind"] == "better_than_control":
        other = [finite(v) for v in (controls or {})[rule["control"]]]
        if any(v is None for v in other):
            return Finding("error", (f"control {rule['control']} has a value that is not a finite number",))
        gaps = [a - b for a, b in zip(mine, other, strict=True) if b is not None]
        what = f"{name} over {rule['control']}"
        return _compare(what, gaps, t_interval_over_seeds(gaps), *_margin(rule))
    found = (float(interval[0]), float(interval[1])) if interval else t_interval_over_seeds(mine, bounds)
    if rule is None:
        value = math.fsum(mine) / len(mine)
        return Finding("validated", ("for comparison",), value, *(found or (None, None)))
    return _compare(name, mine, found, *_inside(rule))


def allowed(rule: Mapping[str, Any]) -> tuple[float, float, str]:
    """Give what a rule (not `all`) asks of its value, or of its gap: the least, the most, and both in words."""
    of_a_gap = rule["kind"] in ("order", "better_than_control")
    low, high, strict = _margin(rule) if of_a_gap else _inside(rule)
    return low, high, _range_text(low, high, strict)


def _judge_order(rule: Mapping[str, Any], rows: Mapping[str, list[float]]) -> Finding:
    """Judge each neighbouring pair by its differences, seed by seed; the smallest gap is shown."""
    steps = []
    for below, above in zip(rule["order"], rule["order"][1:], strict=False):
        gaps = [b - a for a, b in zip(rows[below], rows[above], strict=True)]
        steps.append(_compare(f"{above} over {below}", gaps, t_interval_over_seeds(gaps), *_margin(rule)))
    for state in ("contradicted", "inconclusive"):
        if wrong := next((step for step in steps if step.outcome == state), None):
            return wrong
    return min(steps, key=lambda step: step.value or 0.0)


def _margin(rule: Mapping[str, Any]) -> tuple[float, float, bool]:
    """Give what a gap must reach: at least the margin, and more than nothing where the margin is zero."""
    margin = float(rule.get("margin", 0))
    return (margin, math.inf, margin == 0)


def _inside(rule: Mapping[str, Any]) -> tuple[float, float, bool]:
    """Give a rule as (low, high, whether the bounds themselves are outside)."""
    kind = rule["kind"]
    if kind == "sign":
        return (0.0, math.inf, True) if rule["sign"] == "positive" else (-math.inf, 0.0, True)
    if kind == "near":
        return (rule["target"] - rule["tolerance"], rule["target"] + rule["tolerance"], False)
    return (float(rule.get("low", -math.inf)), float(rule.get("high", math.inf)), False)


def _compare(name: str, row: Sequence[float], found: Bounds | None, low: float, high: float, strict: bool) -> Finding:
    value = math.fsum(row) / len(row)
    if found is None:
        return Finding("inconclusive", (f"{name} has one seed, so no interval",), value)
    at_least, at_most = found
    if strict:
        inside, outside = low < at_least and at_most < high, at_most <= low or at_least >= high
    else:
        inside, outside = low <= at_least and at_most <= high, at_most < low or at_least > high
    allowed = _range_text(low, high, strict)
    interval = f"{name.replace('_', ' ')} {number_text(value, at_least, at_most)}"
    if inside:
        return Finding("validated", (f"{interval} is {allowed}",), value, at_least, at_most)
    if outside:
        return Finding("contradicted", (f"{interval} is not {allowed}",), value, at_least, at_most)
    reason = f"the interval of {interval} straddles the rule: {allowed}"
    return Finding("inconclusive", (reason,), value, at_least, at_most)


def _range_text(low: float, high: float, strict: bool) -> str:
    if math.isinf(high):
        return f"above {low:g}" if strict else f"at least {low:g}"
    if math.isinf(low):
        return f"below {high:g}" if strict else f"at most {high:g}"
    return f"between {low:g} and {high:g}"


def finite(value: Any) -> float | None:
    """Give a value as a float, or None where it is no finite number."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None
