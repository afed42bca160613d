"""What became of a paper's claim: decided from values over seeds, by the rule in its file, with pure functions.

An outcome rests on an interval, never on a point: a claim is validated when the whole interval lies inside
its rule, contradicted when the whole interval lies outside, and inconclusive in between or when a control
did not do what it must. A missing run is never a pass.
"""

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Self

from rim_core import checking, paths
from rim_core.errors import InputError
from rim_core.verdicts.rules import SYMBOLS, Finding, Interval, Values, combine, finite, judge, number_text
from rim_core.verdicts.schema import All, BetterThanControl, Claim, Order, load_claims

__all__ = ["MIME", "SYMBOLS", "Claim", "Claims", "Outcome", "claims", "decide", "load_claims", "number_text"]

MIME = "application/vnd.rim.claim+json"


@dataclass(frozen=True, kw_only=True)
class Outcome(Finding):
    """What became of one claim, and what that rests on; a `Finding` of the whole claim.

    Attributes:
        claim_id: the claim's, in its `paper`.
        parts: what its rule says of each number that it rests on, whatever the controls did.
        controls: what each control's own rule says of it.
        interval: (low, high), or name -> (low, high), where the notebook gave one in place of the t interval.
        published: what the paper reports.
        organism: whether what was measured is a model organism, not the paper's own model.
        notebook: that measures it. suite: on which. run_key: of the run; None where there is none.
    """

    claim_id: str
    paper: str
    statement: str
    unit: str
    published: str
    organism: bool
    notebook: str
    parts: Mapping[str, Finding] = field(default_factory=dict)
    controls: Mapping[str, Finding] = field(default_factory=dict)
    interval: Any = None
    suite: str = ""
    run_key: str | None = None
    shown_in: int | None = field(default=None, compare=False, repr=False)

    @classmethod
    def of(cls, claim: Claim, finding: Finding, **more: Any) -> Self:
        """A claim's outcome from what was found of it."""
        return cls(
            claim_id=claim.id,
            paper=claim.paper,
            statement=claim.statement,
            unit=claim.metric.unit,
            published=claim.published_text,
            organism=claim.organism,
            notebook=claim.metric.notebook,
            **{**vars(finding), **more},
        )

    @classmethod
    def from_json(cls, claim: Claim, recorded: Mapping[str, Any]) -> "Outcome":
        """Decide again, by the claim's rule as it is now, what `to_dict` gave.

        Raises:
            InputError: what was recorded is not what the rule asks for.
        """
        try:
            controls = {name: control["values"] for name, control in recorded["controls"].items()}
            return decide(claim, recorded["values"], controls=controls, interval=recorded.get("interval"))
        except (KeyError, TypeError, AttributeError):
            raise InputError(f"claim {claim.paper}/{claim.id}: the run predates the claim's rule") from None

    def to_dict(self) -> dict[str, Any]:
        """Give plain JSON data: what `claims.json` stores and `from_json` reads."""
        data = asdict(self)
        del data["shown_in"]
        return {**data, "reason": self.reason}

    def __str__(self) -> str:
        return f"{self.claim_id}: {self.label}; {self.reason}"

    def _repr_html_(self) -> str:
        rows = [("Measured", f"{self.numbers} {self.unit}".strip())]
        if self.published:
            rows.append(("Published", self.published))
        for name, control in self.controls.items():
            as_it_must = "as it must be" if control.outcome == "validated" else "not as it must be"
            rows.append((f"Control: {name.replace('_', ' ')}", f"{control.numbers}, {as_it_must}"))
        if self.organism:
            rows.append(("Scope", "a small model organism; not the paper's own models"))
        table = "".join(f"<tr><th>{html.escape(a)}</th><td>{html.escape(b)}</td></tr>" for a, b in rows)
        told = "".join(f"<p>{html.escape(reason)}</p>" for reason in self.reasons)
        return (
            f'<div class="rim-claim rim-claim-{self.outcome}">'
            f"<p><strong>{html.escape(self.claim_id)}: {html.escape(self.label)}</strong></p>"
            f"<p>{html.escape(self.statement)}</p>{told}<table>{table}</table></div>"
        )

    def _ipython_display_(self) -> None:
        # `record` has already shown it, so a cell that ends in `record(...)` must not show it twice.
        if self.shown_in is None or self.shown_in != _cell_number():
            _publish(self)


def decide(
    claim: Claim,
    values: Values,
    *,
    controls: Mapping[str, Sequence[Any]] | None = None,
    interval: Interval | Mapping[str, Interval] | None = None,
) -> Outcome:
    """Decide a claim from its values over seeds; pure.

    Precedence: a value that is no number is an error; fewer seeds than the claim asks for is not a test; a
    control that did not do what it must leaves the claim inconclusive, whatever its own values say.

    Args:
        claim: as its file states it.
        values: over seeds, in the metric's unit; for rules `order` and `all` a mapping from each name to its values.
        controls: each control that the claim names, with its values over seeds.
        interval: (low, high) computed by a better method than the t interval over seeds, or for the parts of a rule
            `all` a mapping from names to such pairs.

    Raises:
        InputError: names are not those of the claim's file, rows that are compared seed by seed have other numbers of
            seeds, or an interval that does not hold its value.

    Example:
        >>> claim = rim.outcomes.Claim(
        ...     id="X1", statement="Accuracy is high.", where="Figure 1", published={"value": 0.9},
        ...     metric={"name": "accuracy", "unit": "share", "notebook": "x/01_y", "bounds": [0, 1]},
        ...     rule={"kind": "range", "low": 0.8},
        ... )
        >>> print(rim.outcomes.decide(claim, [0.9, 0.91, 0.92]))
        X1: ✓ validated; accuracy 0.91 [0.885, 0.935] is at least 0.8
    """
    controls = dict(controls or {})
    _check(claim, values, controls, interval)
    judged = {
        control.name: replace(
            judge(control.name, control.rule, controls[control.name], claim.min_seeds),
            values=_plain(controls[control.name]),
        )
        for control in claim.controls
    }
    intervals = interval if isinstance(interval, Mapping) else {claim.metric.name: interval}
    parts = {}
    for part in claim.parts:
        own = values[part.metric] if isinstance(values, Mapping) and not isinstance(part.rule, Order) else values
        found = judge(
            part.metric,
            part.rule,
            own,
            claim.min_seeds,
            bounds=part.bounds,
            interval=intervals.get(part.metric),
            controls=controls,
        )
        parts[part.metric] = replace(found, values=_plain(own))
    whole = combine(parts) if isinstance(claim.rule, All) else next(iter(parts.values()))
    finding = replace(_with_controls(claim, whole, judged), values=_plain(values))
    return Outcome.of(claim, finding, parts=parts, controls=judged, interval=_plain_interval(interval))


def _with_controls(claim: Claim, finding: Finding, judged: Mapping[str, Finding]) -> Finding:
    """Let the controls overrule a finding: an error or too few seeds first, then a control that fails."""
    for state in ("error", "not_tested"):
        if first := next((f for f in (finding, *judged.values()) if f.outcome == state), None):
            return replace(finding, outcome=state, reasons=first.reasons)
    for control in claim.controls:
        found = judged[control.name]
        if found.outcome != "validated":
            reasons = [f"control {control.title} is not as it must be: {found.reason} ({control.why})"]
            if finding.value is not None:
                own, *further = finding.reasons
                reasons += [f"measured: {own}", *further]
            return replace(finding, outcome="inconclusive", reasons=tuple(reasons))
    return finding


def _plain(values: Values) -> Any:
    """Give values as JSON data: NumPy scalars and tensors become floats, what is no number becomes null."""
    if isinstance(values, Mapping):
        return {str(name): _plain(row) for name, row in values.items()}
    return [finite(value) for value in values]


def _plain_interval(interval: Any) -> Any:
    if isinstance(interval, Mapping):
        return {str(name): _plain_interval(pair) for name, pair in interval.items()}
    return None if interval is None else [float(interval[0]), float(interval[1])]


def _check(claim: Claim, values: Values, controls: Mapping[str, Any], interval: Any) -> None:
    """Check that what was passed is what the claim's file asks for, seed by seed."""
    at = f"claim {claim.paper}/{claim.id}"
    if isinstance(claim.rule, (Order, All)):
        expected: set[str] = set()
        for part in claim.parts:
            expected |= set(part.rule.order) if isinstance(part.rule, Order) else {part.metric}
        if not isinstance(values, Mapping) or set(values) != expected:
            given = f"got {', '.join(map(str, values))}" if isinstance(values, Mapping) else "got a list"
            raise InputError(f"{at}: values must be a mapping with {', '.join(sorted(expected))}; {given}")
    elif isinstance(values, Mapping):
        raise InputError(f"{at}: values must be a list over seeds; got a mapping")
    wanted = {control.name for control in claim.controls}
    if set(controls) != wanted:
        missing, extra = sorted(wanted - set(controls)), sorted(set(controls) - wanted)
        told = [f"missing {', '.join(missing)}"] if missing else []
        told += [f"not in the file: {', '.join(extra)}"] if extra else []
        raise InputError(f"{at}: controls: {'; '.join(told)}")
    rows = dict(values) if isinstance(values, Mapping) else {claim.metric.name: values}
    for name, row in [*rows.items(), *controls.items()]:
        if isinstance(row, (str, bytes, Mapping)) or not hasattr(row, "__len__"):
            raise InputError(f"{at}: {name}: a list over seeds is needed; got {type(row).__name__}")
    for part in claim.parts:
        compared = {}
        if isinstance(part.rule, Order):
            compared = {name: len(rows[name]) for name in part.rule.order}
        elif isinstance(part.rule, BetterThanControl):
            compared = {part.metric: len(rows[part.metric]), part.rule.control: len(controls[part.rule.control])}
        if len(set(compared.values())) > 1:
            told = [f"{name} {n}" for name, n in compared.items()]
            raise InputError(f"{at}: rows compared seed by seed need the same seeds; got {', '.join(told)}")
    if interval is not None:
        _check_interval(at, claim, rows, interval)


def _check_interval(at: str, claim: Claim, rows: Mapping[str, Any], interval: Any) -> None:
    rules = {part.metric: part.rule for part in claim.parts}
    pairs = interval if isinstance(interval, Mapping) else {claim.metric.name: interval}
    if not set(pairs) <= set(rules):
        told = ", ".join(rules) if isinstance(claim.rule, All) else "the one value"
        raise InputError(f"{at}: interval: give (low, high) for {told}")
    for name, pair in pairs.items():
        if isinstance(rules[name], (Order, BetterThanControl)):
            raise InputError(f"{at}: interval: rule {rules[name].kind} makes its own, of differences by seed")
        ends = checking.listed(pair, f"{at}: interval")
        low, high = (finite(v) for v in ends) if len(ends) == 2 else (None, None)
        if low is None or high is None or low > high:
            raise InputError(f"{at}: interval: {checking.shown(tuple(ends))} is not (low, high)")
        given = [finite(value) for value in rows[name]]
        numbers = [value for value in given if value is not None]
        if not numbers or len(numbers) < len(given):
            continue  # no numbers to compare with: `judge` says so
        mean, slack = math.fsum(numbers) / len(numbers), 1e-9 * max(1.0, abs(low), abs(high))
        if not low - slack <= mean <= high + slack:
            raise InputError(
                f"{at}: interval: {name} has the value {mean:.4g}, outside its interval ({low:.4g}, {high:.4g}); "
                "give the interval of this value"
            )


# --- recording, in a notebook -------------------------------------------------------------------------


class Claims:
    """The claims of one paper; `record` decides one of them from what a notebook measured."""

    def __init__(self, paper: str, claims: Sequence[Claim]) -> None:
        self.paper = paper
        self.claims = {claim.id: claim for claim in claims}

    def __repr__(self) -> str:
        return f"Claims({self.paper!r}: {', '.join(self.claims)})"

    def __getitem__(self, claim_id: str) -> Claim:
        if claim_id not in self.claims:
            hint = paths.did_you_mean(claim_id, self.claims)
            raise InputError(f"{self.paper}.yml has no claim {claim_id!r}{hint}; claims: {', '.join(self.claims)}")
        return self.claims[claim_id]

    def record(
        self,
        claim_id: str,
        values: Values,
        *,
        controls: Mapping[str, Sequence[Any]] | None = None,
        interval: Interval | Mapping[str, Interval] | None = None,
    ) -> Outcome:
        """Decide a claim, show the outcome in the notebook, and return it.

        What is shown carries the outcome as data too, which `rim run` collects into `claims.json`.

        Args:
            claim_id: as in the paper's file.
            values: over seeds, or a mapping from names to values over seeds (see `outcomes.decide`).
            controls: each control that the claim names, with its values over seeds.
            interval: (low, high) computed by a better method than the t interval over seeds.

        Raises:
            InputError: see `outcomes.decide`.
        """
        outcome = decide(self[claim_id], values, controls=controls, interval=interval)
        cell = _cell_number()
        if cell is not None:
            _publish(outcome)
        return replace(outcome, shown_in=cell)


def claims(paper: str) -> Claims:
    """Load a paper's claims, which its rules decide.

    Args:
        paper: the stem of its file in `book/claims/`.

    Raises:
        InputError: no such paper, or a file that is none.

    Example:
        >>> claims = rim.claims("self_aware")
        >>> claims["C2"].rule.kind
        'all'
        >>> values = {"published": [0.5, 0.49, 0.51], "sound": [0.52, 0.5, 0.51]}
        >>> claims.record("C2", values, controls={"true_label_accuracy": [0.97, 0.98, 0.97]}).outcome
        'validated'
    """
    return Claims(paper, load_claims(paper))


def _cell_number() -> int | None:
    """Give the running cell's number, or None outside a notebook."""
    try:
        from IPython import get_ipython  # type: ignore[attr-defined,unused-ignore]
    except ImportError:
        return None
    shell = get_ipython()  # type: ignore[no-untyped-call,unused-ignore]
    return None if shell is None else int(shell.execution_count)


def _publish(outcome: Outcome) -> None:
    from IPython.display import publish_display_data

    data = {MIME: outcome.to_dict(), "text/html": outcome._repr_html_(), "text/plain": str(outcome)}
    publish_display_data(data)  # type: ignore[no-untyped-call,unused-ignore]
