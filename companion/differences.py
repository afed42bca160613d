"""Two runs' claims beside each other: suites, results folders, or exported crates."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from companion.crate import CLAIMS, DESCRIPTOR
from companion.scorecard import scorecard
from rim_core import paths
from rim_core.errors import InputError
from rim_core.verdicts.rules import SYMBOLS, number_text

_NUMBERS = ("value", "low", "high")
_ALIKE = 1e-6  # numbers closer than this, relatively, are the same: they come from JSON and other processors


@dataclass(frozen=True)
class Difference:
    """A claim whose outcome or numbers differ between two runs, each told as the scorecard tells it."""

    claim: str
    outcomes: tuple[str, str]
    numbers: tuple[str, str]

    @property
    def changed(self) -> bool:
        """Whether the outcome is another, and not the numbers alone."""
        return self.outcomes[0] != self.outcomes[1]


def compare(first: str, second: str) -> tuple[list[Difference], int]:
    """Compare the claims of two runs; give those that differ, and how many were compared.

    Args:
        first, second: each a suite with results, by name or by its file's path; a results folder, or the folder of
            one suite in it; or a folder that `rim export --ro-crate` wrote. Where each side has one suite, the
            claims of one are compared with the other's; else suite by suite.

    Raises:
        InputError: one that is none of these or holds no results, or two that have no suite in common.
    """
    left, right = _read(first), _read(second)
    suites = [{row["suite"] for row in rows} for rows in (left, right)]
    if all(len(names) == 1 for names in suites):
        by = [{f"{row['paper']} {row['claim']}": row for row in rows} for rows in (left, right)]
    else:
        common = suites[0] & suites[1]
        if not common:
            has = [", ".join(sorted(names)) for names in suites]
            raise InputError(
                f"{first} holds the suites {has[0]}, {second} holds {has[1]}: none to compare; name one suite's "
                "folder on each side, such as results/smollm2"
            )
        by = [
            {f"{row['suite']} {row['paper']} {row['claim']}": row for row in rows if row["suite"] in common}
            for rows in (left, right)
        ]
    names = list(dict.fromkeys([*by[0], *by[1]]))
    pairs = {name: (by[0].get(name, {}), by[1].get(name, {})) for name in names}
    found = []
    for name, (a, b) in pairs.items():
        if _outcome(a) != _outcome(b) or not _alike(a, b):
            found.append(Difference(name, (_outcome(a), _outcome(b)), _numbers(a, b)))
    return found, len(names)


def _read(named: str) -> list[dict[str, Any]]:
    """Read the claims of a suite, a results folder or a crate, a row for each claim and suite."""
    path = Path(named).expanduser()
    if (path / DESCRIPTOR).is_file():
        return _read_crate(path)
    if path.is_dir() and not _is_run_suite(named):
        return _read_folder(path.resolve())
    suite = paths.suite_name(named)
    results = paths.results_dir(paths.root())
    if _has_runs(results / suite):
        return scorecard(results, [named if _is_suite(named) else suite])
    paths.suite_file(named)
    raise InputError(f"suite {suite} has no results to compare; rim run --suite {named}")


def _is_run_suite(named: str) -> bool:
    """Whether a word that a folder here has too names a suite of this project that was run."""
    try:
        return "/" not in named and _has_runs(paths.results_dir(paths.root()) / named)
    except InputError:
        return False


def _is_suite(named: str) -> bool:
    try:
        paths.suite_file(named)
    except InputError:
        return False
    return True


def _has_runs(folder: Path) -> bool:
    return any(folder.glob("*/*/default/run.json")) or any(folder.glob("*/*/failed/default/error.json"))


def _read_crate(path: Path) -> list[dict[str, Any]]:
    try:
        rows = json.loads((path / CLAIMS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        rows = None
    if not isinstance(rows, list) or not all(_is_row(row) for row in rows):
        raise InputError(f"{path}: its {CLAIMS} holds no claims; export it again with rim export --ro-crate")
    return _some(rows, path)


def _is_row(row: Any) -> bool:
    named = isinstance(row, dict) and {"paper", "claim", "suite", *_NUMBERS} <= set(row)
    return named and row.get("outcome") in SYMBOLS


def _read_folder(path: Path) -> list[dict[str, Any]]:
    """Read a results folder: by the rules of the project it lies in, or else as its runs recorded the claims."""
    results = path.parent if _has_runs(path) else path
    suites = [path] if _has_runs(path) else [each for each in sorted(path.glob("*")) if _has_runs(each)]
    if suites and (results.parent / "book" / "claims").is_dir():
        return scorecard(results, [suite.name for suite in suites])
    return _some([row for suite in suites for row in _recorded(suite)], path)


def _recorded(suite: Path) -> list[dict[str, Any]]:
    rows = []
    for path in sorted(suite.glob("*/*/default/claims.json")):
        try:
            recorded = json.loads(path.read_text(encoding="utf-8"))
            found = [{**row, "claim": row["claim_id"], "suite": suite.name} for row in recorded]
        except (OSError, ValueError, KeyError, TypeError):
            found = [{}]
        if not all(_is_row(row) for row in found):
            raise InputError(f"{path}: holds no claims; is it a folder that rim run wrote?")
        rows += found
    return rows


def _some(rows: list[dict[str, Any]], path: Path) -> list[dict[str, Any]]:
    if not rows:
        raise InputError(f"{path}: no results there; name a suite, a results folder or an exported crate")
    return rows


def _outcome(row: Mapping[str, Any]) -> str:
    return str(row.get("outcome", "not_tested"))


def _numbers(first: Mapping[str, Any], second: Mapping[str, Any]) -> tuple[str, str]:
    rows = [[row.get(name) for name in _NUMBERS] for row in (first, second)]
    told = number_text(*rows[0]), number_text(*rows[1])
    if told[0] != told[1] or _alike(first, second):
        return told
    # They differ in digits that the scorecard leaves out.
    exact = [", ".join("–" if n is None else f"{n:.9g}" for n in row) for row in rows]
    return exact[0], exact[1]


def _alike(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    return all(_same(first.get(name), second.get(name)) for name in _NUMBERS)


def _same(first: float | None, second: float | None) -> bool:
    if first is None or second is None:
        return first is second
    return math.isclose(first, second, rel_tol=_ALIKE, abs_tol=_ALIKE)


def summary(found: Sequence[Difference], compared: int) -> str:
    """Say in one line how much differs."""
    changed = sum(difference.changed for difference in found)
    if not found:
        return f"{compared} claims compared: no difference"
    return f"{compared} claims compared: {changed} outcomes changed, {len(found) - changed} numbers alone"
