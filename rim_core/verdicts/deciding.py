"""What became of a paper's claim: decided from what a notebook measured, by the rules in its file, with pure functions.

Two questions are answered apart. *Reproduced*: does the paper's own method give the paper's result here? *Holds*: does
the sound version support the claim? Each rests on intervals, never on points: a part holds when its whole interval lies
inside its rule, is contradicted when the whole interval lies outside, and is undecided in between. A claim is as its
weakest part. Where a check of the instrument fails, nothing was measured, and both are undecided. A missing run is
never a pass.
"""

import html
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from types import SimpleNamespace
from typing import Any, Self

from rim_core import checking, paths
from rim_core.errors import InputError
from rim_core.verdicts.rules import (
    SYMBOLS,
    Finding,
    Value,
    conjunction,
    finite,
    is_interval,
    judge,
    number_text,
    outcome_text,
    reproduced_text,
)
from rim_core.verdicts.schema import Claim, Part, load_claims

__all__ = [
    "MIME",
    "SYMBOLS",
    "Claim",
    "Claims",
    "Outcome",
    "claims",
    "decide",
    "load_claims",
    "number_text",
    "outcome_text",
    "reproduced_text",
]

MIME = "application/vnd.rim.claim+json"


@dataclass(frozen=True, kw_only=True)
class Outcome(Finding):
    """What became of one claim, and what that rests on; a `Finding` of its sound version.

    Attributes:
        claim_id: the claim's, in its `paper`.
        reproduced: what became of the version as published, in the same words; None where the claim has none.
        parts: what its rule says of each number that it rests on, whatever the checks did.
        checks: what each check's own rule says of it.
        unit: of the number that is shown.
        published: what the paper reports.
        organism: whether what was measured is a model organism, not the paper's own model.
        notebook: that measures it. suite: on which. run_key: of the run; None where there is none.
    """

    claim_id: str
    paper: str
    statement: str
    unit: str = ""
    published: str
    organism: bool
    notebook: str
    reproduced: str | None = None
    parts: Mapping[str, Finding] = field(default_factory=dict)
    checks: Mapping[str, Finding] = field(default_factory=dict)
    suite: str = ""
    run_key: str | None = None
    shown_in: int | None = field(default=None, compare=False, repr=False)

    @classmethod
    def of(cls, claim: Claim, finding: Finding, **more: Any) -> Self:
        """A claim's outcome from what was found of it; `reproduced` is the same, unless it is given."""
        units = {number.name: number.unit for number in claim.numbers}
        given = {"reproduced": finding.outcome if claim.version("published") else None, **more}
        return cls(
            claim_id=claim.id,
            paper=claim.paper,
            statement=claim.statement,
            unit=units.get(finding.number, ""),
            published=claim.published_text,
            organism=claim.organism,
            notebook=claim.notebook,
            **{**vars(finding), **given},
        )

    @classmethod
    def from_json(cls, claim: Claim, recorded: Mapping[str, Any]) -> "Outcome":
        """Decide again, by the claim's rules as they are now, what `to_dict` gave.

        Raises:
            InputError: what was recorded is not what the rules ask for.
        """
        try:
            found = {**recorded["parts"], **recorded["checks"]}
            return decide(claim, {name: _recorded(number) for name, number in found.items()})
        except (KeyError, TypeError, AttributeError):
            raise InputError(f"claim {claim.paper}/{claim.id}: the run predates the claim's rules") from None

    def to_dict(self) -> dict[str, Any]:
        """Give plain JSON data: what `claims.json` stores and `from_json` reads."""
        data = asdict(self)
        del data["shown_in"]
        return {**data, "reason": self.reason}

    def __str__(self) -> str:
        return f"{self.claim_id}: {self.label}; {self.reason}"

    def _repr_html_(self) -> str:
        rows = [("The paper's method", reproduced_text(self.reproduced))] if self.reproduced else []
        rows.append(("Measured", f"{self.number.replace('_', ' ')} {self.numbers} {self.unit}".strip()))
        if self.published:
            rows.append(("Published", self.published))
        for name, check in self.checks.items():
            as_it_must = "as it must be" if check.outcome == "holds" else "not as it must be"
            rows.append((f"Check: {name.replace('_', ' ')}", f"{check.numbers}, {as_it_must}"))
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


def _recorded(number: Mapping[str, Any]) -> Any:
    """A number as `to_dict` gave it: values over seeds, or what an `Interval` has, which is not loaded for it."""
    if number["values"] is not None:
        return number["values"]
    ends = {name: number[name] for name in ("low", "high", "n", "method")}
    return SimpleNamespace(estimate=number["value"], **ends)


def decide(claim: Claim, numbers: Mapping[str, Value]) -> Outcome:
    """Decide a claim from its numbers; pure.

    Precedence: a value that is no number is an error; fewer seeds than the claim asks for is not a test; a check of the
    instrument that did not do what it must leaves the claim undecided, whatever its own values say.

    Args:
        claim: as its file states it.
        numbers: each of its parts and checks by name, in its unit: a `rim.stats.Interval`, or values over seeds.

    Raises:
        InputError: names are not those of the claim's file, what is neither, or an interval that has no width or does
            not hold its value.

    Example:
        >>> claim = rim.outcomes.Claim(
        ...     id="X1", statement="Accuracy is high.", where="Figure 1", published={"value": 0.9},
        ...     notebook="x/01_y",
        ...     parts=[{"name": "accuracy", "version": "sound", "rule": {"kind": "range", "low": 0.8}}],
        ... )
        >>> print(rim.outcomes.decide(claim, {"accuracy": rim.stats.proportion(95, 100)}))
        X1: ✓ holds; accuracy 0.95 [0.887, 0.984] is at least 0.8
    """
    _check(claim, numbers)
    parts = {part.name: judge(part, numbers[part.name], claim.min_seeds) for part in claim.parts}
    checks = {check.name: judge(check, numbers[check.name], claim.min_seeds) for check in claim.checks}

    def version(of: Sequence[Part]) -> Finding:
        return _with_checks(claim, conjunction({part.name: parts[part.name] for part in of}), checks)

    published, sound = claim.version("published"), claim.version("sound")
    untested = Finding(outcome="not_tested", reasons=("the claim has no sound version",))
    return Outcome.of(
        claim,
        version(sound) if sound else untested,
        reproduced=version(published).outcome if published else None,
        parts=parts,
        checks=checks,
    )


def _with_checks(claim: Claim, finding: Finding, judged: Mapping[str, Finding]) -> Finding:
    """Let the checks overrule a finding: an error or too few seeds first, then a check that fails."""
    for state in ("error", "not_tested"):
        if first := next((f for f in (finding, *judged.values()) if f.outcome == state), None):
            return replace(finding, outcome=state, reasons=first.reasons)
    for check in claim.checks:
        found = judged[check.name]
        if found.outcome != "holds":
            told = f"check {check.title} is not as it must be: {found.reason} ({check.why})"
            own, *further = finding.reasons
            return replace(finding, outcome="undecided", reasons=(told, f"measured: {own}", *further))
    return finding


def _check(claim: Claim, numbers: Mapping[str, Any]) -> None:
    """Check that what was passed is what the claim's file asks for."""
    at = f"claim {claim.paper}/{claim.id}"
    wanted = [number.name for number in claim.numbers]
    if not isinstance(numbers, Mapping):
        raise InputError(f"{at}: a mapping with {', '.join(wanted)} is needed; got {type(numbers).__name__}")
    if set(numbers) != set(wanted):
        missing = [name for name in wanted if name not in numbers]
        extra = sorted(str(name) for name in numbers if name not in wanted)
        told = [f"missing {', '.join(missing)}"] if missing else []
        told += [f"not in the file: {', '.join(extra)}"] if extra else []
        raise InputError(f"{at}: {'; '.join(told)}")
    for name, value in numbers.items():
        if is_interval(value):
            _check_interval(f"{at}: {name}", value)
        elif isinstance(value, (str, bytes, Mapping)) or not hasattr(value, "__len__"):
            raise InputError(f"{at}: {name}: an interval or a list over seeds is needed; got {type(value).__name__}")


def _check_interval(at: str, value: Any) -> None:
    value, low, high = (finite(v) for v in (value.estimate, value.low, value.high))
    if value is None or low is None or high is None:
        return  # `judge` says so
    if low == high:
        raise InputError(f"{at}: an interval of no width, {checking.shown((low, high))}: nothing is known that surely")
    slack = 1e-9 * max(1.0, abs(low), abs(high))
    if not low - slack <= value <= high + slack:
        raise InputError(
            f"{at}: the value {value:.4g} is outside its interval ({low:.4g}, {high:.4g}); give the interval of this "
            "value"
        )


# --- recording, in a notebook -------------------------------------------------------------------------


class Claims:
    """The claims of one paper; `record` decides one of them from what a notebook measured."""

    def __init__(self, paper: str, claims: Sequence[Claim]) -> None:
        self.paper = paper
        self.claims = {claim.id: claim for claim in claims}
        self.recorded: dict[str, Outcome] = {}

    def __repr__(self) -> str:
        return f"Claims({self.paper!r}: {', '.join(self.claims)})"

    def __getitem__(self, claim_id: str) -> Claim:
        if claim_id not in self.claims:
            hint = paths.did_you_mean(claim_id, self.claims)
            raise InputError(f"{self.paper}.yml has no claim {claim_id!r}{hint}; claims: {', '.join(self.claims)}")
        return self.claims[claim_id]

    def record(self, claim_id: str, numbers: Mapping[str, Value]) -> Outcome:
        """Decide a claim, show the outcome in the notebook, and return it.

        What is shown carries the outcome as data too, which `rim run` collects into `claims.json`.

        Args:
            claim_id: as in the paper's file.
            numbers: its parts and checks by name (see `outcomes.decide`).

        Raises:
            InputError: see `outcomes.decide`.
        """
        outcome = self.recorded[claim_id] = decide(self[claim_id], numbers)
        cell = _cell_number()
        if cell is not None:
            _publish(outcome)
        return replace(outcome, shown_in=cell)

    def finding(self, *lines: str) -> "Told":
        """What was found, in plain lines, for the top of the page: a list that shows itself in a notebook.

        The book puts what a cell tagged `finding` shows under the page's title.

        Args:
            lines: sentences, in which `{C1.sound}` stands for the number by that name of a claim that was recorded,
                with its interval, and `{C1}` for its outcome in words. Of a claim that was not recorded each is "not
                measured".

        Raises:
            InputError: no such claim, or no such number of it.

        Example:
            >>> claims = rim.claims("self_aware")
            >>> outcome = claims.record("C2", {"published": [0.5, 0.49, 0.51], "sound": [0.52, 0.5, 0.51],
            ...     "true_label_accuracy": rim.stats.proportion(58, 60)})
            >>> print(claims.finding("With shuffled labels it is right on {C2.sound}: {C2}."))
            - With shuffled labels it is right on 0.51 [0.485, 0.535]: holds.
        """
        return Told("\n".join(f"- {line.format_map(_Sayable(self))}" for line in lines))


class Told(str):
    """Lines of Markdown, which a notebook shows as such."""

    def _repr_markdown_(self) -> str:
        return str(self)


class _Sayable(dict[str, Any]):
    """Claims by their names, as a sentence's template asks for them."""

    def __init__(self, claims: Claims) -> None:
        super().__init__()
        self.claims = claims

    def __missing__(self, claim_id: str) -> "_Numbers":
        return _Numbers(self.claims[claim_id], self.claims.recorded.get(claim_id))


class _Numbers:
    """A claim's outcome as text, and its numbers as attributes."""

    def __init__(self, claim: Claim, outcome: Outcome | None) -> None:
        self._claim, self._outcome = claim, outcome

    def __str__(self) -> str:
        return "not measured" if self._outcome is None else outcome_text(self._outcome.outcome).partition(" ")[2]

    def __getattr__(self, name: str) -> str:
        names = [number.name for number in self._claim.numbers]
        if name not in names:
            raise InputError(f"finding: claim {self._claim.id} has no number {name!r}{paths.did_you_mean(name, names)}")
        if self._outcome is None:
            return "not measured"
        return {**self._outcome.parts, **self._outcome.checks}[name].numbers


def claims(paper: str) -> Claims:
    """Load a paper's claims, which its rules decide.

    Args:
        paper: the stem of its file in `book/claims/`.

    Raises:
        InputError: no such paper, or a file that is none.

    Example:
        >>> claims = rim.claims("self_aware")
        >>> [part.name for part in claims["C2"].version("sound")]
        ['sound']
        >>> numbers = {"published": [0.5, 0.49, 0.51], "sound": [0.52, 0.5, 0.51]}
        >>> numbers["true_label_accuracy"] = rim.stats.proportion(58, 60)
        >>> claims.record("C2", numbers).outcome
        'holds'
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
