"""The scorecard: every claim on every suite, from what the runs recorded, decided by the rules as they stand now."""

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rim_core import paths
from rim_core.errors import InputError
from rim_core.suites.preflight import how_to_build
from rim_core.suites.schema import Suite, load_suite
from rim_core.verdicts.deciding import Outcome
from rim_core.verdicts.rules import Finding
from rim_core.verdicts.schema import Claim, every_claim


def scorecard(results_dir: Path, suites: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Give a row per claim and suite from `results/`.

    Keys: paper, claim, statement, suite, outcome, reason, reasons (its sentences), value, low, high, published,
    notebook, run_key. Only runs with the notebooks' own settings count: a run with other parameters shows its
    verdict on its own page.

    Args:
        results_dir: the project's folder of results.
        suites: by name or path; by default those with results, or the default suite.
    """
    return [_row(outcome) for outcome in outcomes(results_dir, suites)]


def _row(outcome: Outcome) -> dict[str, Any]:
    fields = ("statement", "suite", "outcome", "reason", "reasons", "value", "low", "high", "published", "notebook")
    told = {name: getattr(outcome, name) for name in fields}
    return {"paper": outcome.paper, "claim": outcome.claim_id, **told, "run_key": outcome.run_key} | {
        "reasons": list(outcome.reasons)
    }


def outcomes(results_dir: Path, suites: Sequence[str] | None = None) -> list[Outcome]:
    """Give the outcome of each claim on each suite, as `scorecard` does, with what it rests on."""
    if suites is None:
        found = [p.name for p in results_dir.iterdir() if p.is_dir()] if results_dir.is_dir() else []
        suites = sorted(name for name in found if not name.startswith(".")) or [paths.DEFAULT_SUITE]
    claims = every_claim(results_dir.parent / "book" / "claims")
    read = {suite: _read_suite(suite) for suite in suites}
    return [_outcome(claim, suite, read[suite], results_dir) for claim in claims for suite in suites]


def _outcome(claim: Claim, suite: str, read: Suite | None, results_dir: Path) -> Outcome:
    stem, notebook = paths.suite_name(suite), claim.metric.notebook
    run_key, recorded, failed = read_run(results_dir / stem / notebook, claim)

    def undecided(outcome: str, *reasons: str) -> Outcome:
        return Outcome.of(claim, Finding(outcome=outcome, reasons=reasons), suite=stem, run_key=run_key)

    if read and (missing := lacking(claim, read)):
        build = how_to_build(read, missing[0], suite)
        return undecided("not_applicable", f"suite {stem} has no role {', '.join(missing)}", f"build it: {build}")
    if failed:
        return undecided("error", f"the run failed: {failed}")
    if recorded is None:
        told = (
            "the run recorded nothing for this claim" if run_key else f"no run yet; rim run {notebook} --suite {suite}"
        )
        return undecided("not_tested", told)
    try:
        found = Outcome.from_json(claim, recorded)
    except InputError:
        return undecided("not_tested", f"the run predates the claim's rule; rim run {notebook} --suite {suite}")
    return replace(found, suite=stem, run_key=run_key)


def missing_roles(claim: Claim, suite: str) -> list[str]:
    """Name the roles that a claim needs and a suite lacks, or lacks the files of.

    None are missing where the suite's file is not to be found (results of a suite that was given by path).
    """
    read = _read_suite(suite)
    return lacking(claim, read) if read else []


def lacking(claim: Claim, suite: Suite) -> list[str]:
    """Name the roles that a claim needs and a suite lacks, or lacks the files of."""
    return [role for role in claim.roles if not suite.has(role)]


def _read_suite(suite: str) -> Suite | None:
    try:
        return load_suite(suite)
    except InputError:
        return None


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
