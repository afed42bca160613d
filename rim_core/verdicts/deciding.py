"""What became of a paper's claim: read from its YAML file, decided from values over seeds by pure functions.

An outcome rests on an interval, never on a point: a claim is validated when the whole interval lies inside
its rule, contradicted when the whole interval lies outside, and inconclusive in between or when a control
did not do what it must. A missing run is never a pass.
"""

import html
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rim_core import checking, paths
from rim_core.errors import InputError
from rim_core.suites.missing import how_to_build
from rim_core.suites.schema import Suite, load_suite
from rim_core.verdicts.claimfile import Claim, load_claims
from rim_core.verdicts.rules import Bounds, Finding, Values, combine, finite, judge, number_text

__all__ = [
    "MIME",
    "SYMBOLS",
    "Claim",
    "Claims",
    "Outcome",
    "claims",
    "decide",
    "findings",
    "load_claims",
    "missing_roles",
    "number_text",
    "read_record",
    "read_run",
    "scorecard",
]

MIME = "application/vnd.rim.claim+json"
SYMBOLS = {
    "validated": "✓",
    "partially_supported": "◐",
    "contradicted": "✗",
    "inconclusive": "?",
    "not_applicable": "–",
    "not_tested": "○",
    "error": "!",
}


@dataclass(frozen=True)
class Outcome:
    """The outcome of one claim: `value` in [`low`, `high`] is in the metric's unit, `values` are by seed.

    `reasons` are sentences, one for each part of the rule and for a control that failed.
    """

    claim_id: str
    outcome: str
    reasons: Sequence[str]
    value: float | None
    low: float | None
    high: float | None
    values: Any
    controls: Mapping[str, Any]
    interval: Any = None
    paper: str = ""
    statement: str = ""
    unit: str = ""
    published: str = ""
    organism: bool = True
    shown_in: int | None = field(default=None, compare=False, repr=False)

    @property
    def reason(self) -> str:
        """The reasons in one line."""
        return "; ".join(self.reasons)

    @property
    def label(self) -> str:
        """Symbol and word, so that the outcome is never told by colour or shape alone."""
        return f"{SYMBOLS[self.outcome]} {self.outcome.replace('_', ' ')}"

    def to_dict(self) -> dict[str, Any]:
        """Give plain JSON data: what `claims.json` stores and `decide` can be run on again."""
        data = asdict(self)
        del data["shown_in"]
        return {**data, "reason": self.reason}

    def __str__(self) -> str:
        return f"{self.claim_id}: {self.label}; {self.reason}"

    def _repr_html_(self) -> str:
        rows = [("Measured", f"{number_text(self.value, self.low, self.high)} {self.unit}".strip())]
        if self.published:
            rows.append(("Published", self.published))
        for name, control in self.controls.items():
            numbers = number_text(control["value"], control["low"], control["high"])
            as_it_must = {"validated": "as it must be"}.get(control["outcome"], "not as it must be")
            rows.append((f"Control: {name.replace('_', ' ')}", f"{numbers}, {as_it_must}"))
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
    controls: Mapping[str, Sequence[Any]] | None = None,
    interval: Bounds | Mapping[str, Bounds] | None = None,
) -> Outcome:
    """Decide a claim from its values over seeds; pure.

    `values`: a list over seeds, or for rules `order` and `all` a mapping name -> list over seeds. `controls`:
    name -> list over seeds, for each control the claim names. `interval`: (low, high) computed by a better
    method than the t interval over seeds, or name -> (low, high) for the parts of a rule `all`.

    Precedence: a value that is no number is an error; fewer seeds than the claim asks for is not a test; a
    control that did not do what it must leaves the claim inconclusive, whatever its own values say. Raises
    `InputError` where names are not those of the claim's YAML file.
    """
    controls = dict(controls or {})
    _check_names(claim, values, controls, interval)
    judged = {
        control["name"]: judge(control.get("rule"), controls[control["name"]], claim.min_seeds, control["name"])
        for control in claim.controls
    }
    parts = findings(claim, values, controls, interval)
    whole = combine(parts) if claim.rule["kind"] == "all" else next(iter(parts.values()))
    finding = _with_controls(claim, whole, judged)
    return Outcome(
        claim_id=claim.id,
        outcome=finding.outcome,
        reasons=finding.reasons,
        value=finding.value,
        low=finding.low,
        high=finding.high,
        values=_plain(values),
        controls={
            name: {
                "values": _plain(controls[name]),
                "value": found.value,
                "low": found.low,
                "high": found.high,
                "outcome": found.outcome,
            }
            for name, found in judged.items()
        },
        interval=_plain_interval(interval),
        paper=claim.paper,
        statement=claim.statement,
        unit=str(claim.metric["unit"]),
        published=claim.published_text,
        organism=claim.organism,
    )


def _with_controls(claim: Claim, finding: Finding, judged: Mapping[str, Finding]) -> Finding:
    """Let the controls overrule a finding: an error or too few seeds first, then a control that fails."""
    for state in ("error", "not_tested"):
        if first := next((f for f in (finding, *judged.values()) if f.outcome == state), None):
            return replace(finding, outcome=state, reasons=first.reasons)
    for control in claim.controls:
        found = judged[control["name"]]
        if found.outcome != "validated":
            name = control["name"].replace("_", " ")
            reasons = [f"control {name} is not as it must be: {found.reason} ({control['why']})"]
            if finding.value is not None:
                own, *further = finding.reasons
                reasons += [f"measured: {own}", *further]
            return replace(finding, outcome="inconclusive", reasons=tuple(reasons))
    return finding


def findings(
    claim: Claim, values: Values, controls: Mapping[str, Sequence[Any]], interval: Bounds | Mapping[str, Bounds] | None
) -> dict[str, Finding]:
    """Judge each number that a claim rests on, by its name, whatever the controls did; pure.

    Takes what `decide` takes, which must have accepted it. A claim has one number, or one a part of a rule `all`.
    """
    rule, seeds = claim.rule, claim.min_seeds
    if rule["kind"] != "all":
        name, bounds = str(claim.metric["name"]), _pair(claim.metric.get("bounds"))
        pair = None if isinstance(interval, Mapping) else interval
        return {name: judge(rule, values, seeds, name, bounds, pair, controls)}
    intervals = interval if isinstance(interval, Mapping) else {}
    assert isinstance(values, Mapping)  # checked by _check_names
    found = {}
    for part in rule["parts"]:
        name = part["metric"]
        part_values: Values = values if part["rule"]["kind"] == "order" else values[name]
        bounds = _pair(part.get("bounds", claim.metric.get("bounds")))
        found[name] = judge(part["rule"], part_values, seeds, name, bounds, intervals.get(name), controls)
    return found


def _pair(bounds: Any) -> Bounds | None:
    return (float(bounds[0]), float(bounds[1])) if bounds is not None else None


def _plain(values: Values) -> Any:
    """Give values as JSON data: NumPy scalars and tensors become floats, what is no number becomes null."""
    if isinstance(values, Mapping):
        return {str(name): _plain(row) for name, row in values.items()}
    return [finite(value) for value in values]


def _plain_interval(interval: Any) -> Any:
    if interval is None:
        return None
    if isinstance(interval, Mapping):
        return {str(name): _plain_interval(pair) for name, pair in interval.items()}
    return [float(interval[0]), float(interval[1])]


def _check_names(claim: Claim, values: Values, controls: Mapping[str, Any], interval: Any) -> None:
    """Check that what was passed is what the claim's YAML file asks for, seed by seed."""
    at = f"claim {claim.paper}/{claim.id}"
    expected: set[str] = set()
    if claim.rule["kind"] == "order":
        expected = set(claim.rule["order"])
    elif claim.rule["kind"] == "all":
        for part in claim.rule["parts"]:
            expected |= set(part["rule"]["order"]) if part["rule"]["kind"] == "order" else {part["metric"]}
    if expected:
        if not isinstance(values, Mapping) or set(values) != expected:
            given = f"got {', '.join(map(str, values))}" if isinstance(values, Mapping) else "got a list"
            raise InputError(f"{at}: values must be a mapping with {', '.join(sorted(expected))}; {given}")
    elif isinstance(values, Mapping):
        raise InputError(f"{at}: values must be a list over seeds; got a mapping")
    wanted = {control["name"] for control in claim.controls}
    if set(controls) != wanted:
        missing, extra = sorted(wanted - set(controls)), sorted(set(controls) - wanted)
        told = [f"missing {', '.join(missing)}"] if missing else []
        told += [f"not in the file: {', '.join(extra)}"] if extra else []
        raise InputError(f"{at}: controls: {'; '.join(told)}")
    rows = dict(values) if isinstance(values, Mapping) else {str(claim.metric["name"]): values}
    for name, row in [*rows.items(), *controls.items()]:
        if isinstance(row, (str, bytes, Mapping)) or not hasattr(row, "__len__"):
            raise InputError(f"{at}: {name}: a list over seeds is needed; got {type(row).__name__}")
    _check_pairing(at, claim, rows, controls)
    if interval is not None:
        _check_interval(at, claim, rows, interval)


def _check_pairing(at: str, claim: Claim, rows: Mapping[str, Any], controls: Mapping[str, Any]) -> None:
    """Check that rows compared seed by seed have the same number of seeds."""
    parts = claim.rule.get("parts") or [{"metric": str(claim.metric["name"]), "rule": claim.rule}]
    for part in parts:
        rule = part["rule"]
        if rule["kind"] == "order":
            compared = {name: rows[name] for name in rule["order"]}
        elif rule["kind"] == "better_than_control":
            compared = {part["metric"]: rows[part["metric"]], rule["control"]: controls[rule["control"]]}
        else:
            continue
        lengths = {name: len(row) for name, row in compared.items()}
        if len(set(lengths.values())) > 1:
            told = ", ".join(f"{name} {n}" for name, n in lengths.items())
            raise InputError(f"{at}: rows compared seed by seed need the same seeds; got {told}")


def _check_interval(at: str, claim: Claim, rows: Mapping[str, Any], interval: Any) -> None:
    kind = claim.rule["kind"]
    parts = {"": kind}
    if kind == "all":
        parts = {part["metric"]: part["rule"]["kind"] for part in claim.rule["parts"]}
    pairs = interval if isinstance(interval, Mapping) else {"": interval}
    for name, pair in pairs.items():
        if name not in parts:
            raise InputError(f"{at}: interval: give (low, high) for {', '.join(parts) or 'the one value'}")
        if parts[name] in ("order", "better_than_control"):
            raise InputError(f"{at}: interval: rule {parts[name]} makes its own, of differences by seed")
        ends = checking.listed(pair, f"{at}: interval")
        low, high = (finite(v) for v in ends) if len(ends) == 2 else (None, None)
        if low is None or high is None or low > high:
            raise InputError(f"{at}: interval: {checking.shown(tuple(ends))} is not (low, high)")
        given = [finite(value) for value in rows[name or str(claim.metric["name"])]]
        numbers = [value for value in given if value is not None]
        if not numbers or len(numbers) < len(given):
            continue  # no numbers to compare with: `judge` says so
        mean, slack = math.fsum(numbers) / len(numbers), 1e-9 * max(1.0, abs(low), abs(high))
        if not low - slack <= mean <= high + slack:
            raise InputError(
                f"{at}: interval: {name or claim.metric['name']} has the value {mean:.4g}, outside its interval "
                f"({low:.4g}, {high:.4g}); give the interval of this value"
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
            known = ", ".join(self.claims)
            hint = paths.did_you_mean(claim_id, self.claims)
            raise InputError(f"{self.paper}.yml has no claim {claim_id!r}{hint}; claims: {known}")
        return self.claims[claim_id]

    def record(
        self,
        claim_id: str,
        values: Values,
        controls: Mapping[str, Sequence[Any]] | None = None,
        interval: Bounds | Mapping[str, Bounds] | None = None,
    ) -> Outcome:
        """Decide a claim (see `decide`), show the outcome in the notebook, and return it.

        What is shown carries the outcome as data too, which `rim run` collects into `claims.json`.
        """
        outcome = decide(self[claim_id], values, controls, interval)
        cell = _cell_number()
        if cell is not None:
            _publish(outcome)
        return replace(outcome, shown_in=cell)


def claims(paper: str) -> Claims:
    """Load a paper's claims: `rim.claims("self_aware")`.

    Args:
        paper: the stem of its file in `book/claims/`.
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


def scorecard(results_dir: Path, suites: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Give a row per claim and suite from `results/`, decided by the rules as they stand now.

    Keys: paper, claim, statement, suite, outcome, reason, reasons (its sentences), value, low, high, published,
    notebook, run_key.
    `suites` by name or path; by default those with results, or the default suite. Only runs with the
    notebooks' own settings count: a run with other parameters shows its verdict on its own page.
    """
    folder = results_dir.parent / "book" / "claims"
    every = [claim for path in sorted(folder.glob("*.yml")) for claim in load_claims(path.stem, folder)]
    if suites is None:
        found = [p.name for p in results_dir.iterdir() if p.is_dir()] if results_dir.is_dir() else []
        suites = sorted(name for name in found if not name.startswith(".")) or [paths.DEFAULT_SUITE]
    return [_row(claim, suite, results_dir) for claim in every for suite in suites]


def missing_roles(claim: Claim, suite: str) -> list[str]:
    """Name the roles that a claim needs and a suite lacks, or lacks the files of.

    None are missing where the suite's file is not to be found (results of a suite that was given by path).
    """
    found = _read_suite(suite)
    return [role for role in claim.roles if found and not found.has(role)]


def _read_suite(suite: str) -> Suite | None:
    try:
        return load_suite(suite)
    except InputError:
        return None


def _row(claim: Claim, suite: str, results_dir: Path) -> dict[str, Any]:
    stem = paths.suite_name(suite)
    notebook = str(claim.metric["notebook"])
    run_key, recorded, failed = read_run(results_dir / stem / notebook, claim)
    finding = Finding("not_tested", (f"no run yet; rim run {notebook} --suite {suite}",))
    if missing := missing_roles(claim, suite):
        build = how_to_build(load_suite(suite), missing[0], suite)
        reasons = f"suite {stem} has no role {', '.join(missing)}", f"build it: {build}"
        finding = Finding("not_applicable", reasons)
    elif failed:
        finding = Finding("error", (f"the run failed: {failed}",))
    elif recorded is not None:
        try:
            controls = {name: control["values"] for name, control in recorded["controls"].items()}
            outcome = decide(claim, recorded["values"], controls, recorded.get("interval"))
        except (InputError, KeyError, TypeError, AttributeError):
            reason = f"the run predates the claim's rule; rim run {notebook} --suite {suite}"
            finding = Finding("not_tested", (reason,))
        else:
            numbers = outcome.value, outcome.low, outcome.high
            finding = Finding(outcome.outcome, tuple(outcome.reasons), *numbers)
    elif run_key:
        finding = Finding("not_tested", ("the run recorded nothing for this claim",))
    return {
        "paper": claim.paper,
        "claim": claim.id,
        "statement": claim.statement,
        "suite": stem,
        "outcome": finding.outcome,
        "reason": finding.reason,
        "reasons": list(finding.reasons),
        "value": finding.value,
        "low": finding.low,
        "high": finding.high,
        "published": claim.published_text,
        "notebook": notebook,
        "run_key": run_key,
    }


def read_run(folder: Path, claim: Claim) -> tuple[str | None, dict[str, Any] | None, str]:
    """Give a notebook's default run: its key, what it recorded for the claim, and its error if it failed."""
    if error := read_record(folder / "failed" / "default" / "error.json"):
        return error.get("run_key"), None, f"{error.get('ename', 'error')}: {error.get('evalue', '')}"[:200]
    run = read_record(folder / "default" / "run.json")
    rows = _read_json(folder / "default" / "claims.json")
    if not run or not isinstance(rows, list):
        return None, None, ""
    found = [row for row in rows if isinstance(row, dict)]
    mine = (row for row in found if row.get("paper") == claim.paper and row.get("claim_id") == claim.id)
    return run.get("run_key"), next(mine, None), ""


def read_record(path: Path) -> dict[str, Any] | None:
    """Give the record of a run (`run.json`) or of a failure (`error.json`); None where there is none.

    A file that holds something else counts as no run, and one line on standard error says so.
    """
    if not path.is_file():
        return None
    data = _read_json(path)
    if isinstance(data, dict) and isinstance(data.get("ename" if path.name == "error.json" else "run_key"), str):
        return data
    if path not in _TOLD:
        _TOLD.add(path)
        where = "/".join(path.parts[-6:])
        print(f"rim: {where} is no record of a run, and counts as none; run that notebook again", file=sys.stderr)
    return None


_TOLD: set[Path] = set()


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
