"""The rules that decide a claim: pure functions from a number to a finding and its reasons."""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Union

from rim_core.verdicts.schema import Check, Near, Part, Range, Rule, Sign

if TYPE_CHECKING:  # a second to import, which `rim claims` without runs need not pay
    from rim_core.stats import Interval

# A number as a notebook gives it: with its interval, or by seed.
Value = Union["Interval", Sequence[Any]]
SYMBOLS = {"holds": "✓", "contradicted": "✗", "undecided": "?", "not_applicable": "–", "not_tested": "○", "error": "!"}
# The same said of the paper's own version.
REPRODUCED = {"holds": "reproduced", "contradicted": "not reproduced"}
# Where a claim needs more prompts than this, no one will run them.
_MOST = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What became of a number, or of a claim: an outcome, why, and the interval it rests on.

    Attributes:
        outcome: one of `SYMBOLS`.
        reasons: sentences; a page gives each a line.
        number: the name of the number that is shown; of a claim, the part that it fails by, or else its first.
        value: of that number, in its unit.
        low: with `high`, the 95 % interval.
        n: observations behind the value; None where it is a mean over seeds.
        method: how the interval was made.
        values: by seed, as plain JSON; None where the notebook gave an interval.
    """

    outcome: str
    reasons: Sequence[str]
    number: str = ""
    value: float | None = None
    low: float | None = None
    high: float | None = None
    n: int | None = None
    method: str = ""
    values: list[float | None] | None = None

    @property
    def reason(self) -> str:
        """The reasons in one line."""
        return "; ".join(self.reasons)

    @property
    def label(self) -> str:
        """Symbol and word, so that the outcome is never told by colour or shape alone."""
        return outcome_text(self.outcome)

    @property
    def numbers(self) -> str:
        """The value with its interval, as text."""
        return number_text(self.value, self.low, self.high)


def outcome_text(outcome: str) -> str:
    """Symbol and word of an outcome: `✓ holds`."""
    return f"{SYMBOLS[outcome]} {outcome.replace('_', ' ')}"


def reproduced_text(outcome: str | None) -> str:
    """The same of the paper's own version: `✗ not reproduced`; a dash where no paper has one."""
    if outcome is None:
        return "–"
    return f"{SYMBOLS[outcome]} {REPRODUCED.get(outcome, outcome.replace('_', ' '))}"


def number_text(value: float | None, low: float | None, high: float | None) -> str:
    """Write a value with its interval: `0.97 [0.95, 0.99]`; a dash where nothing was measured."""
    if value is None:
        return "–"
    if low is None or high is None:
        return f"{value:.3g}"
    return f"{value:.3g} [{low:.3g}, {high:.3g}]"


def t_interval_over_seeds(
    values: Sequence[float], bounds: tuple[float, float] | None = None
) -> tuple[float, float] | None:
    """Give the two-sided 95 % t interval of the mean over seeds, cut to the number's `bounds`.

    None for a single value, and for equal ones: their spread is not known, and no interval has zero width. Cutting to
    the bounds matters: without it accuracies of 0.98, 1.0 and 1.0 would reach beyond 1.
    """
    n = len(values)
    if n < 2 or min(values) == max(values):
        return None
    mean = math.fsum(values) / n
    spread = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1))
    half = _t_quantile(n - 1) * spread / math.sqrt(n)
    low, high = mean - half, mean + half
    if bounds:
        low, high = max(low, bounds[0]), min(high, bounds[1])
    return (low, high)


@functools.cache
def _t_quantile(degrees: int) -> float:
    from scipy.stats import t

    return float(t.ppf(0.975, degrees))


def conjunction(findings: Mapping[str, Finding]) -> Finding:
    """What becomes of a version of a claim, whose every part must hold: it is as its weakest part."""
    for state in ("error", "not_tested", "contradicted", "undecided"):
        if weakest := next((found for found in findings.values() if found.outcome == state), None):
            break
    else:
        state, weakest = "holds", next(iter(findings.values()))
    if state in ("error", "not_tested"):
        return weakest
    told = tuple(f"{found.reason} ({found.outcome})" for found in findings.values())
    return replace(weakest, reasons=told if len(told) > 1 else weakest.reasons, values=None)


def is_interval(value: Any) -> bool:
    """Whether a value is a `rim.stats.Interval`, told without loading it."""
    return hasattr(value, "estimate")


def judge(number: Part | Check, value: Any, min_seeds: int) -> Finding:
    """Judge a number by its own rule.

    Where it comes by seed, its interval is that of Student's t over them. Equal values of every seed have none: a part
    is then undecided, while a check, which may be of an identity, is judged by the value.
    """
    return _of_interval(number, value) if is_interval(value) else _over_seeds(number, [*map(finite, value)], min_seeds)


def _of_interval(number: Part | Check, value: "Interval") -> Finding:
    estimate, low, high = finite(value.estimate), finite(value.low), finite(value.high)
    if estimate is None or low is None or high is None:
        return _error(number, "has a value or an end of its interval that is not a finite number")
    if wrong := _outside(number, [estimate]):
        return wrong
    found = Finding(outcome="", reasons=(), value=estimate, low=low, high=high, n=int(value.n), method=value.method)
    return _compare(number, found)


def _over_seeds(number: Part | Check, row: list[float | None], min_seeds: int) -> Finding:
    clean = [v for v in row if v is not None]
    if len(clean) < len(row):
        return replace(_error(number, "has a value that is not a finite number"), values=row)
    if wrong := _outside(number, clean):
        return replace(wrong, values=row)
    mean = math.fsum(clean) / len(clean) if clean else None
    if mean is None or len(clean) < min_seeds:
        told = f"{number.name} has {len(clean)} seed(s) of the {min_seeds} needed"
        return Finding(outcome="not_tested", reasons=(told,), number=number.name, value=mean, values=row)
    ends = t_interval_over_seeds(clean, number.bounds)
    method = f"t interval over {len(clean)} seeds"
    if ends is None and isinstance(number, Check):
        ends, method = (mean, mean), f"equal in {len(clean)} seeds"
    low, high = ends or (None, None)
    return _compare(number, Finding(outcome="", reasons=(), value=mean, low=low, high=high, method=method, values=row))


def _error(number: Part | Check, told: str) -> Finding:
    return Finding(outcome="error", reasons=(f"{number.name} {told}",), number=number.name)


def _outside(number: Part | Check, values: Sequence[float]) -> Finding | None:
    bounds = number.bounds
    if bounds and any(not bounds[0] <= v <= bounds[1] for v in values):
        return _error(number, f"has a value outside its range [{bounds[0]:g}, {bounds[1]:g}]")
    return None


def allowed(rule: Rule) -> tuple[float, float, str]:
    """Give what a rule asks of its value: the least, the most, and both in words."""
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


def _compare(number: Part | Check, found: Finding) -> Finding:
    """Compare an interval with the rule: inside it, outside it, or neither."""
    name = number.title
    found = replace(found, number=number.name)
    if found.value is None or found.low is None or found.high is None:
        told = f"{name} {found.numbers} is of one seed, or the same for every seed, so it has no interval"
        return replace(found, outcome="undecided", reasons=(told,))
    low, high, strict = _inside(number.rule)
    if strict:
        inside, outside = low < found.low and found.high < high, found.high <= low or found.low >= high
    else:
        inside, outside = low <= found.low and found.high <= high, found.high < low or found.low > high
    told, asked = f"{name} {found.numbers}", allowed(number.rule)[2]
    if inside:
        return replace(found, outcome="holds", reasons=(f"{told} is {asked}",))
    if outside:
        return replace(found, outcome="contradicted", reasons=(f"{told} is not {asked}",))
    reason = f"the interval of {told} straddles the rule: {asked}{_would_decide(found, low, high)}"
    return replace(found, outcome="undecided", reasons=(reason,))


def _would_decide(found: Finding, low: float, high: float) -> str:
    """How many observations would decide a number whose interval straddles an end of its rule, if its value stays."""
    if found.n is None or found.value is None or found.low is None or found.high is None:
        return ""
    needed = 1.0
    for end in (low, high):
        if found.low <= end <= found.high:
            reach = found.value - found.low if end < found.value else found.high - found.value
            away = abs(found.value - end)
            needed = max(needed, (reach / away) ** 2 if away else math.inf)
    if not needed * found.n <= _MOST:
        return f"; no number of observations would decide it at this value (n = {found.n})"
    return f"; about {math.ceil(needed * found.n)} observations would decide it at this value (n = {found.n})"


def finite(value: Any) -> float | None:
    """Give a value as a float, or None where it is no finite number."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None
