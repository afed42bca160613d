"""Execute notebooks once: run keys, folders put in place whole, provenance, and the claims they recorded.

A result is a folder `results/<suite>/<section>/<name>/<variant>/` that appears complete or not at all, and that
one run at a time works on. Its run key is a hash of everything the result depends on, so what is up to date is
never run again.
"""

import contextlib
import datetime
import errno
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from companion import folders, notebooks, provenance
from companion import scorecard as cards
from companion.progress import Progress
from companion.scorecard import missing_roles, read_record
from rim_core import identity, paths
from rim_core.errors import RimError, RunError
from rim_core.identity import digest
from rim_core.suites import preflight
from rim_core.suites.schema import load_suite, suite_hashes
from rim_core.verdicts.deciding import MIME
from rim_core.verdicts.rules import SYMBOLS
from rim_core.verdicts.schema import Claim, every_claim


@dataclass(frozen=True)
class Result:
    """What became of one notebook: `status` is "ran", "up to date", "not applicable" or "failed"."""

    notebook: str
    status: str
    reason: str = ""
    claims: tuple[Mapping[str, Any], ...] = field(default=())


class Interrupted(KeyboardInterrupt):
    """A run was interrupted; its message says how far it came."""


def run(
    names: Sequence[str],
    suite: str = paths.DEFAULT_SUITE,
    overrides: Mapping[str, Any] | None = None,
    *,
    force: bool = False,
    project: Path | None = None,
    timeout: float | None = None,
) -> list[Result]:
    """Execute the notebooks named (see `notebooks.resolve`; none means all) that are not up to date.

    `overrides` are parameter values; texts are converted to each parameter's type. All names and parameters
    are checked before anything runs (`InputError`). A notebook that fails does not stop the others, and one that
    another run is at comes last, when that is done with it. `timeout` is in seconds a cell; by default a cell may
    take as long as it needs. Progress goes to stderr.
    """
    project = project or paths.root()
    checked = check(names, suite, overrides, project)
    chosen = list(checked)
    folders.sweep(paths.results_dir(project))
    results: dict[str, Result] = {}
    for patient in (False, True):
        for number, name in enumerate(chosen, 1):
            if name in results:
                continue
            progress = Progress(f"[{number}/{len(chosen)}] {name}", sys.stderr)
            try:
                with progress, _disk_errors(project):
                    result = _run_one(project, name, suite, checked[name], force, timeout, progress, patient)
            except folders.BusyError as busy:
                progress.say(f"waits: {busy}")
                continue
            except KeyboardInterrupt:
                raise Interrupted(
                    f"interrupted in {name}; {len(results)} of {len(chosen)} notebooks are done; "
                    "the same command goes on with the rest"
                ) from None
            progress.say(_told(result))
            results[name] = result
    return [results[name] for name in chosen]


def check(
    names: Sequence[str],
    suite: str = paths.DEFAULT_SUITE,
    overrides: Mapping[str, Any] | None = None,
    project: Path | None = None,
) -> dict[str, dict[str, Any]]:
    """Give the notebooks that `run` would go through, each with its overrides converted; nothing is loaded.

    Raises `InputError` for a suite, a notebook, a parameter or a value that is not usable.
    """
    project = project or paths.root()
    paths.suite_file(suite)
    return {name: _overrides_of(project, name, overrides or {}) for name in notebooks.resolve(project, names)}


def plan(
    names: Sequence[str], suite: str = paths.DEFAULT_SUITE, overrides: Mapping[str, Any] | None = None
) -> list[dict[str, Any]]:
    """Say what `run` with the same arguments would do: a row for each notebook, in its order.

    Keys: notebook, suite, variant, overrides, run_key, and status, which is "to run", "up to date" or
    "not applicable". Raises `InputError` as `run` does.
    """
    project = paths.root()
    checked = check(names, suite, overrides, project)
    return [_planned(project, name, suite, found) for name, found in checked.items()]


def _planned(project: Path, name: str, suite: str, overrides: Mapping[str, Any]) -> dict[str, Any]:
    key, _ = run_key(project, name, suite, overrides)
    status = "to run"
    if lacking_roles(project, name, suite):
        status = "not applicable"
    elif _is_up_to_date(run_folder(project, name, suite, overrides), key):
        status = "up to date"
    return {
        "notebook": name,
        "suite": paths.suite_name(suite),
        "variant": variant(overrides),
        "overrides": dict(overrides),
        "run_key": key,
        "status": status,
    }


def variant(overrides: Mapping[str, Any]) -> str:
    """Name the folder of a run: "default", or "p-" and 8 hex digits of the sorted overrides."""
    return f"p-{digest(overrides)[:8]}" if overrides else "default"


def run_folder(project: Path, notebook: str, suite: str, overrides: Mapping[str, Any]) -> Path:
    """Give the folder that a run's result is put into."""
    return paths.results_dir(project) / paths.suite_name(suite) / notebook / variant(overrides)


def run_key(project: Path, notebook: str, suite: str, overrides: Mapping[str, Any]) -> tuple[str, dict[str, str]]:
    """Give a run's key and its parts, each a SHA-256 in hex: what the result depends on, and nothing else.

    That is (see `identity`) the notebook's source and parameters, files that a parameter names by their content, the
    part of the package that measures, the libraries that compute, and the models. Outputs, cell identifiers and the
    wording of claims are left out; the rules that decide claims are in.
    """
    source = notebooks.read_source(project, notebook)
    known = notebooks.parameters(notebook, source)
    parts = {
        "notebook": digest([_normalised(cell) for cell in source["cells"]]),
        "parameters": digest(_by_content(project, _resolved(known, paths.suite_name(suite), overrides))),
        "rim_core": identity.science(),
        "libraries": digest(dict(identity.libraries())),
        "models": digest(suite_hashes(suite)),
        "claims": digest([[claim.id, claim.decides] for claim in _claims_of(project, notebook)]),
    }
    return digest(parts), parts


def _by_content(project: Path, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters with the content of each file that one names in place of its path."""
    files = notebooks.files_of(parameters, project)

    def content(place: str, text: str) -> str:
        return identity.file_hash(files[place]) if place in files else text

    return {name: notebooks.with_texts(name, value, content) for name, value in parameters.items()}


def _with_fetched(
    key: tuple[str, dict[str, str]], before: Mapping[str, str], after: Mapping[str, str]
) -> tuple[str, dict[str, str]]:
    """A run's key with the commits of the repositories that the run itself fetched, unknown before it."""
    fetched = {
        name: after[name]
        for name, was in before.items()
        if was != after[name] and "@" in was and was.partition("@")[0] == after[name].partition("@")[0]
    }
    if not fetched:
        return key
    parts = {**key[1], "models": digest({**before, **fetched})}
    return digest(parts), parts


def lacking_roles(project: Path, notebook: str, suite: str) -> list[str]:
    """Name the roles that a suite lacks where no claim of a notebook can be decided without them; else none."""
    lacking = [missing_roles(claim, suite) for claim in _claims_of(project, notebook)]
    return lacking[0] if lacking and all(lacking) else []


def last_run(project: Path, notebook: str, suite: str) -> str:
    """Say when a notebook's default run finished, that it failed, or that there is none; stale or not."""
    folder = run_folder(project, notebook, suite, {})
    if (folder.parent / "failed" / "default").is_dir():
        return "failed"
    record = read_record(folder / "run.json")
    return f"run {str(record.get('finished', '?'))[:10]}" if record else "not run"


def scorecard(project: Path, suites: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Give the rows of `scorecard.scorecard`, each with `stale`: whether what its run rests on has changed since.

    A stale outcome is of another notebook, code, model, rule or version than those there are now. None where that
    cannot be told, as the suite's file is not to be found; False where there is no run.
    """
    keys: dict[tuple[str, str], str | None] = {}
    rows = cards.scorecard(paths.results_dir(project), suites)
    named = {paths.suite_name(suite): suite for suite in suites or ()}
    for row in rows:
        at = row["notebook"], named.get(row["suite"], row["suite"])
        if row["run_key"] is None:
            row["stale"] = False
            continue
        if at not in keys:
            try:
                keys[at] = run_key(project, *at, {})[0]
            except RimError:
                keys[at] = None
        row["stale"] = None if keys[at] is None else row["run_key"] != keys[at]
    return rows


def stale_text(row: Mapping[str, Any]) -> str:
    """Say of a row of `scorecard` in a sentence that its run is stale, or may be; nothing where it is current."""
    if row["stale"] is None:
        return "Stale or not is not known: the suite's file is not to be found."
    again = f"rim run {row['notebook']} --suite {row['suite']}"
    return f"Stale: what the run rests on has changed since; {again}" if row["stale"] else ""


# --- one notebook ---------------------------------------------------------------------------------------


def _run_one(
    project: Path,
    name: str,
    suite: str,
    overrides: dict[str, Any],
    force: bool,
    timeout: float | None,
    progress: Progress,
    patient: bool,
) -> Result:
    """Run one notebook unless it is up to date; where another run is at it wait, or raise if not `patient`."""
    if (lacking := lacking_roles(project, name, suite)) and not force:
        lacks = f"suite {paths.suite_name(suite)} has no role {', '.join(lacking)}"
        return Result(name, "not applicable", lacks)
    folder = run_folder(project, name, suite, overrides)
    key, parts = run_key(project, name, suite, overrides)
    if not force and _is_up_to_date(folder, key):
        return Result(name, "up to date")
    with folders.locked(folder, (lambda who: progress.at(f"waits: {who}")) if patient else None) as check:
        if not force and _is_up_to_date(folder, key):
            return Result(name, "up to date")
        try:
            return _execute(project, name, suite, overrides, (key, parts), timeout, progress, check)
        except RunError as error:
            return Result(name, "failed", str(error))


def _execute(
    project: Path,
    name: str,
    suite: str,
    overrides: dict[str, Any],
    key: tuple[str, dict[str, str]],
    timeout: float | None,
    progress: Progress,
    check: Callable[[], None],
) -> Result:
    """Execute one notebook, and put its result, or the record of its failure, in place."""
    # papermill takes a second, which a run that is up to date need not
    from companion.execution import Failure, execute

    folder = run_folder(project, name, suite, overrides)
    known = notebooks.parameters(name, notebooks.read_source(project, name))
    remote = "remote" in overrides
    passed = {key: value for key, value in overrides.items() if key in known}
    if "suite" in known:
        passed["suite"] = _suite_for_kernel(project, suite)
    parameters = _resolved(known, paths.suite_name(suite), overrides)
    if not remote:
        preflight.preflight(load_suite(suite), str(parameters.get("quantization", "nf4")))
    started, clock, there = _now(), time.monotonic(), suite_hashes(suite)
    with folders.temporary(folder) as temporary:
        done = execute(project, notebooks.path_of(project, name), passed, progress.cell, timeout)
        failure = done.failure
        key = _with_fetched(key, there, suite_hashes(suite))
        done.notebook.metadata.get("papermill", {}).pop("input_path", None)
        record = {
            "notebook": name,
            "suite": paths.suite_name(suite),
            "parameters": parameters,
            "overrides": overrides,
            "seed": parameters.get("seed"),
            "seeds": provenance.seeds(parameters),
            "run_key": key[0],
            "key_parts": key[1],
            "models": provenance.models(suite),
            "started": started,
            "finished": _now(),
            "wall_seconds": round(time.monotonic() - clock, 2),
            **done.usage,
            **({"device": "NDIF"} if remote else {}),
            **provenance.environment(project),
        }
        harvested, twice = _harvest(done.notebook, key[0], paths.suite_name(suite))
        if failure is None and twice:
            failure = Failure("ClaimError", f"claim {twice} is recorded twice with different outcomes", None)
        _write(temporary / "notebook.ipynb", done.notebook)
        if failure:
            _write(temporary / "error.json", {**record, **vars(failure), "status": "failed"})
            check()
            folders.put(temporary, folders.failed(folder))
            where = f"cell {failure.cell}: " if failure.cell else ""
            page = (folders.failed(folder) / "notebook.ipynb").relative_to(project)
            what = " ".join(failure.evalue.split())
            return Result(name, "failed", f"{where}{failure.ename}: {what}; see {page}")
        _write(temporary / "claims.json", harvested)
        _write(temporary / "run.json", {**record, "status": "ok"})
        check()
        folders.put(temporary, folder)
    return Result(name, "ran", claims=tuple(harvested))


def _overrides_of(project: Path, name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    known = notebooks.parameters(name, notebooks.read_source(project, name))
    if not paths.remote_asked():
        return notebooks.check_overrides(name, known, given, project)
    # Nothing is packed there. The mark keeps results and run keys apart from those of this machine.
    unpacked = {"quantization": "none"} if "quantization" in known else {}
    return {**notebooks.check_overrides(name, known, {**unpacked, **given}, project), "remote": "NDIF"}


def _claims_of(project: Path, notebook: str) -> list[Claim]:
    folder = project / "book" / "claims"
    return [claim for claim in every_claim(folder) if claim.metric.notebook == notebook]


def _resolved(known: Mapping[str, notebooks.Parameter], suite: str, overrides: Mapping[str, Any]) -> dict[str, Any]:
    values = {name: parameter.default for name, parameter in known.items()}
    return {**values, **overrides, **({"suite": suite} if "suite" in known else {})}


def _suite_for_kernel(project: Path, suite: str) -> str:
    """Give a suite as the kernel, whose working directory is the project's root, can find it."""
    if suite in paths.suite_names():
        return suite
    path = paths.suite_file(suite)
    return path.relative_to(project).as_posix() if path.is_relative_to(project) else str(path)


def _is_up_to_date(folder: Path, key: str) -> bool:
    record = read_record(folder / "run.json")
    if record is None:
        return False
    complete = all((folder / name).is_file() for name in ("notebook.ipynb", "claims.json"))
    failed_since = folders.failed(folder).is_dir()
    return complete and not failed_since and record.get("run_key") == key


def _harvest(executed: Any, key: str, suite: str) -> tuple[list[dict[str, Any]], str | None]:
    """Collect the claims that a notebook recorded, and the first that it recorded in two different ways."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for cell in executed.cells:
        for output in cell.get("outputs", []):
            recorded = output.get("data", {}).get(MIME)
            if not isinstance(recorded, dict):
                continue
            row = {**recorded, "suite": suite, "run_key": key}
            name = (str(row.get("paper")), str(row.get("claim_id")))
            if found.setdefault(name, row) != row:
                return list(found.values()), name[1]
    return list(found.values()), None


def _told(result: Result) -> str:
    if result.status != "ran":
        return f"{result.status}: {result.reason}" if result.reason else result.status
    states = [claim["outcome"] for claim in result.claims]
    counted = [f"{states.count(s)} {s.replace('_', ' ')}" for s in SYMBOLS if s in states]
    return f"done; claims: {', '.join(counted)}" if counted else "done"


def _normalised(cell: Mapping[str, Any]) -> list[Any]:
    tags = sorted(cell.get("metadata", {}).get("tags", []))
    return [cell.get("cell_type"), notebooks.source_of(cell), tags]


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


# --- files ----------------------------------------------------------------------------------------------


def _write(path: Path, value: Any) -> None:
    text = json.dumps(_json_value(value), indent=1, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def _json_value(value: Any) -> Any:
    """A value as every reader of JSON takes it: what a cell showed that is no finite number becomes null."""
    if isinstance(value, Mapping):
        return {key: _json_value(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_value(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextlib.contextmanager
def _disk_errors(project: Path) -> Iterator[None]:
    """Turn what the disk refuses into one line that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise RimError(
                f"the disk is full: nothing was written to {project.name}/results for this notebook; "
                "free some space and give the same command again"
            ) from None
        where = error.filename or f"{project.name}/results"
        raise RimError(f"cannot write {where}: {error.strerror or error}; check its permissions") from None
