"""The scorecard: every claim on every suite, from what the runs recorded, decided by the rules as they stand now."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from companion import staleness
from companion.folders import read_json, read_record
from rim_core import paths
from rim_core.errors import InputError, RimError
from rim_core.suites.preflight import how_to_build
from rim_core.suites.schema import Suite, load_suite
from rim_core.verdicts.deciding import Outcome
from rim_core.verdicts.rules import Finding
from rim_core.verdicts.schema import Claim, every_claim


def scorecard(project: Path, suites: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Give the rows of `rows`, each with `stale`: whether what its run rests on has changed since.

    A stale outcome is of another notebook, code, model, rule or version than those there are now. None where that
    cannot be told, as the suite's file is not to be found; False where there is no run.
    """
    found = rows(paths.results_dir(project), suites)
    given = {paths.suite_name(suite): suite for suite in suites or ()}
    keys: dict[str, dict[str, str]] = {}
    for row in found:
        suite, notebook = row["suite"], row["notebook"]
        if suite not in keys and row["run_key"]:
            ran = {other["notebook"] for other in found if other["suite"] == suite and other["run_key"]}
            try:
                jobs = staleness.plan(sorted(ran), given.get(suite, suite), project=project)
                keys[suite] = {job.notebook: job.key for job in jobs}
            except RimError:
                keys[suite] = {}
        key = keys[suite].get(notebook) if row["run_key"] else None
        row["stale"] = None if key is None and row["run_key"] else row["run_key"] != key
    return found


def stale_text(row: Mapping[str, Any]) -> str:
    """Say of a row of `scorecard` in a sentence that its run is stale, or may be; nothing where it is current."""
    if row["stale"] is None:
        return "Stale or not is not known: the suite's file is not to be found."
    again = f"rim run {row['notebook']} --suite {row['suite']}"
    return f"Stale: what the run rests on has changed since; {again}" if row["stale"] else ""


def rows(results_dir: Path, suites: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Give the outcome of each claim on each suite as JSON data.

    Keys: paper, claim, statement, suite, outcome (does it hold?), reproduced (by the paper's own method?), reason,
    reasons (its sentences), number (which one is shown), value, low, high, published, notebook, run_key.
    """
    fields = ("statement", "suite", "outcome", "reproduced", "reason", "reasons", "number", "value", "low", "high")
    found = []
    for each in outcomes(results_dir, suites):
        told = {name: getattr(each, name) for name in (*fields, "published", "notebook", "run_key")}
        found.append({"paper": each.paper, "claim": each.claim_id, **told, "reasons": list(each.reasons)})
    return found


def outcomes(results_dir: Path, suites: Sequence[str] | None = None) -> list[Outcome]:
    """Give the outcome of each claim on each suite, with what it rests on.

    Only runs with the notebooks' own settings count: a run with other parameters shows its verdict on its own page.

    Args:
        results_dir: the project's folder of results.
        suites: by name or path; by default those with results, or the default suite.
    """
    if suites is None:
        found = [p.name for p in results_dir.iterdir() if p.is_dir()] if results_dir.is_dir() else []
        suites = sorted(name for name in found if not name.startswith(".")) or [paths.DEFAULT_SUITE]
    claims = every_claim(results_dir.parent / "book" / "claims")
    read = {suite: _read_suite(suite) for suite in suites}
    return [_outcome(claim, suite, read[suite], results_dir) for claim in claims for suite in suites]


def _outcome(claim: Claim, suite: str, read: Suite | None, results_dir: Path) -> Outcome:
    stem, notebook = paths.suite_name(suite), claim.notebook
    run_key, recorded, failed = read_run(results_dir / stem / notebook, claim)

    def undecided(outcome: str, *reasons: str) -> Outcome:
        return Outcome.of(claim, Finding(outcome=outcome, reasons=reasons), suite=stem, run_key=run_key)

    if read and (missing := [role for role in claim.roles if not read.has(role)]):
        build = how_to_build(read, missing[0], suite)
        return undecided("not_applicable", f"suite {stem} has no role {', '.join(missing)}", f"build it: {build}")
    if failed:
        return undecided("error", f"the run failed: {failed}")
    if recorded is None:
        told = (
            "the run recorded nothing for this claim" if run_key else f"no run yet; rim run {notebook} --suite {suite}"
        )
        return undecided("not_tested", told)
    if recorded.get("outcome") == "not_applicable":  # on this model, as its run found
        return undecided("not_applicable", *recorded.get("reasons", []))
    try:
        found = Outcome.from_json(claim, recorded)
    except InputError:
        return undecided("not_tested", f"the run predates the claim's rules; rim run {notebook} --suite {suite}")
    return replace(found, suite=stem, run_key=run_key)


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
    recorded = read_json(folder / "default" / "claims.json")
    if not run or not isinstance(recorded, list):
        return None, None, ""
    found = [row for row in recorded if isinstance(row, dict)]
    mine = (row for row in found if row.get("paper") == claim.paper and row.get("claim_id") == claim.id)
    return run.get("run_key"), next(mine, None), ""
