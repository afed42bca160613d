"""Two runs' claims beside each other: suites, results folders, or exported crates."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from companion.outcomes import rows
from rim_core import paths
from rim_core.errors import InputError
from rim_core.verdicts.rules import SYMBOLS, number_text, outcome_text, reproduced_text

_NUMBERS = ("value", "low", "high")
_ALIKE = 1e-6  # numbers closer than this, relatively, are the same: they come from JSON and other processors
Row = Mapping[str, Any]
Rows = Sequence[Row]


@dataclass(frozen=True)
class Difference:
    """A claim whose outcome or numbers differ between two runs, each told as the scorecard tells it."""

    claim: str
    outcomes: tuple[str, str]
    reproduced: tuple[str | None, str | None]
    numbers: tuple[str, str]

    @property
    def changed(self) -> bool:
        """Whether an outcome is another, and not the numbers alone."""
        return self.outcomes[0] != self.outcomes[1] or self.reproduced[0] != self.reproduced[1]

    @property
    def told(self) -> tuple[str, str]:
        """Symbol, outcome and numbers of each, and of the paper's own version where that differs."""
        alike = self.reproduced[0] == self.reproduced[1]
        first, second = (
            f"{outcome_text(outcome)}, {number}{'' if alike else f'; {reproduced_text(own)}'}"
            for outcome, own, number in zip(self.outcomes, self.reproduced, self.numbers, strict=True)
        )
        return first, second


def compare(first: str, second: str) -> tuple[list[Difference], int]:
    """Compare the claims of two runs; give those that differ, and how many were compared.

    Args:
        first: a suite with results, by name or by its file's path; a results folder, or the folder of one suite in
            it; or a folder that `rim export --ro-crate` wrote.
        second: another. Where each side has one suite, the claims of one are compared with the other's; else suite
            by suite.

    Raises:
        InputError: one that is none of these or holds no results, or two that have no suite in common.
    """
    sides = _read(first), _read(second)
    suites = [{row["suite"] for row in side} for side in sides]
    one_each = all(len(names) == 1 for names in suites)
    common = suites[0] & suites[1]
    if not one_each and not common:
        has = [", ".join(sorted(names)) for names in suites]
        raise InputError(
            f"{first} holds the suites {has[0]}, {second} holds {has[1]}: none to compare; name one suite's "
            "folder on each side, such as results/smollm2"
        )
    by = [
        {
            f"{'' if one_each else row['suite'] + ' '}{row['paper']} {row['claim']}": row
            for row in side
            if one_each or row["suite"] in common
        }
        for side in sides
    ]
    names = list(dict.fromkeys([*by[0], *by[1]]))
    found = []
    for name in names:
        pair = by[0].get(name, {}), by[1].get(name, {})
        outcomes = pair[0].get("outcome", "not_tested"), pair[1].get("outcome", "not_tested")
        reproduced = pair[0].get("reproduced"), pair[1].get("reproduced")
        difference = Difference(name, outcomes, reproduced, _numbers(*pair))
        if difference.changed or not _alike(*pair):
            found.append(difference)
    return found, len(names)


def _read(named: str) -> Rows:
    """Read the claims of a suite, a results folder or a crate, a row for each claim and suite."""
    path = Path(named).expanduser()
    if (path / "ro-crate-metadata.json").is_file():
        return _some(_recorded(path / "claims.json", "export it again with rim export --ro-crate"), path)
    results = _project_results()
    is_suite = results is not None and "/" not in named and _has_runs(results / named)
    if path.is_dir() and not is_suite:
        return _read_folder(path.resolve())
    suite, results = paths.suite_name(named), paths.results_dir(paths.root())
    if not _has_runs(results / suite):
        paths.suite_file(named)
        raise InputError(f"suite {suite} has no results to compare; rim run --suite {named}")
    try:
        paths.suite_file(named)
    except InputError:  # results outlive a suite's file
        named = suite
    return rows(results, [named])


def _project_results() -> Path | None:
    try:
        return paths.results_dir(paths.root())
    except InputError:
        return None


def _has_runs(folder: Path) -> bool:
    return any(folder.glob("*/*/default/run.json")) or any(folder.glob("*/*/failed/default/error.json"))


def _read_folder(path: Path) -> Rows:
    """Read a results folder: by the rules of the project it lies in, or else as its runs recorded the claims."""
    results = path.parent if _has_runs(path) else path
    suites = [path] if _has_runs(path) else [each for each in sorted(path.glob("*")) if _has_runs(each)]
    if suites and (results.parent / "book" / "claims").is_dir():
        return rows(results, [suite.name for suite in suites])
    found = []
    for suite in suites:
        for file in sorted(suite.glob("*/*/default/claims.json")):
            recorded = _recorded(file, "is it a folder that rim run wrote?")
            found += [{**row, "suite": suite.name} for row in recorded]
    return _some(found, path)


def _recorded(path: Path, remedy: str) -> Rows:
    """The claims that a crate or a run recorded."""
    try:
        recorded = json.loads(path.read_text(encoding="utf-8"))
        found = [{"claim": row.get("claim_id"), **row} for row in recorded]
        if all({"paper", "claim", *_NUMBERS} <= set(row) and row["outcome"] in SYMBOLS for row in found):
            return found
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    raise InputError(f"{path}: holds no claims; {remedy}")


def _some(found: Rows, path: Path) -> Rows:
    if not found:
        raise InputError(f"{path}: no results there; name a suite, a results folder or an exported crate")
    return found


def _numbers(first: Row, second: Row) -> tuple[str, str]:
    pair = [[row.get(name) for name in _NUMBERS] for row in (first, second)]
    told = number_text(*pair[0]), number_text(*pair[1])
    if told[0] != told[1] or _alike(first, second):
        return told
    # They differ in digits that the scorecard leaves out.
    exact = [", ".join("–" if n is None else f"{n:.9g}" for n in row) for row in pair]
    return exact[0], exact[1]


def _alike(first: Row, second: Row) -> bool:
    pairs = [(first.get(name), second.get(name)) for name in _NUMBERS]
    return all(
        a is b if a is None or b is None else math.isclose(a, b, rel_tol=_ALIKE, abs_tol=_ALIKE) for a, b in pairs
    )


def summary(found: Sequence[Difference], compared: int) -> str:
    """Say in one line how much differs."""
    changed = sum(difference.changed for difference in found)
    if not found:
        return f"{compared} claims compared: no difference"
    return f"{compared} claims compared: {changed} outcomes changed, {len(found) - changed} numbers alone"
