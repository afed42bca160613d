"""Execute notebooks once, and put each result in place whole, with where it came from.

`run` executes the jobs that are not up to date (see `staleness`). A result is a folder
`results/<suite>/<section>/<name>/<variant>/` that appears complete or not at all, and that one run at a time works on.
"""

import contextlib
import datetime
import errno
import json
import math
import re
import sys
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from companion import folders, provenance
from companion.progress import Progress
from companion.staleness import Job, with_needed
from rim_core import paths
from rim_core.errors import IdentityError, OpeningError, RimError, RunError
from rim_core.handed import FILE
from rim_core.handed import MIME as HANDED
from rim_core.identity import digest
from rim_core.suites.preflight import preflight
from rim_core.suites.schema import suite_hashes
from rim_core.verdicts.deciding import MIME, Outcome
from rim_core.verdicts.rules import SYMBOLS, Finding
from rim_core.verdicts.schema import every_claim

# What a tool raises that this model cannot be measured with: no fault of the notebook's.
_UNFIT = (IdentityError.__name__, OpeningError.__name__)
_MODELS = re.compile(r"rim\.(load|roles)\(")


@dataclass(frozen=True)
class Result:
    """What became of one notebook: `status` is "ran", "up to date", "not applicable" or "failed"."""

    notebook: str
    status: str
    reason: str = ""
    claims: tuple[Mapping[str, Any], ...] = field(default=())


class Interrupted(KeyboardInterrupt):
    """A run was interrupted; its message says how far it came."""


def run(jobs: Sequence[Job], *, force: bool = False, timeout: float | None = None) -> list[Result]:
    """Execute the jobs that are not up to date, one after another; progress goes to stderr.

    A notebook that fails does not stop the others, and one that another run is at comes last, when that is done
    with it.

    Args:
        jobs: as `plan` makes them; those that they need come first, and are in what is given back.
        force: execute also what is up to date, or not applicable; of those that others need not.
        timeout: seconds a cell; by default a cell may take as long as it needs.
    """
    results: dict[Path, Result] = {}
    forced = {job.folder for job in jobs} if force else set()
    jobs = with_needed(jobs)
    for project in {job.project for job in jobs}:
        folders.sweep(paths.results_dir(project))
    with _nursery(jobs, forced) as nursery:
        _run_each(jobs, forced, timeout, nursery, results)
    return [results[job.folder] for job in jobs]


@contextlib.contextmanager
def _nursery(jobs: Sequence[Job], forced: Container[Path]) -> Iterator[Any]:
    """What kernels are forked from, where several of the notebooks to run load a model; else None."""
    heavy = [
        job
        for job in jobs
        if (job.folder in forced or job.status == "to run") and _MODELS.search(json.dumps(job.source))
    ]
    if len(heavy) < 2:
        yield None
        return
    from companion.execution import nursery

    started = nursery(heavy[0].project)
    try:
        yield started
    finally:
        if started:
            started.close()


def _run_each(
    jobs: Sequence[Job], forced: Container[Path], timeout: float | None, nursery: Any, results: dict[Path, Result]
) -> None:
    for patient in (False, True):
        for number, job in enumerate(jobs, 1):
            if job.folder in results:
                continue
            progress = Progress(f"[{number}/{len(jobs)}] {job.notebook}", sys.stderr)
            try:
                with progress, _disk_errors(job.project):
                    result = _without_needed(job, results) or _run(
                        job, job.folder in forced, timeout, nursery, progress, patient
                    )
            except folders.BusyError as busy:
                progress.say(f"waits: {busy}")
                continue
            except KeyboardInterrupt:
                raise Interrupted(
                    f"interrupted in {job.notebook}; {len(results)} of {len(jobs)} notebooks are done; "
                    "the same command goes on with the rest"
                ) from None
            progress.say(_told(result))
            results[job.folder] = result


def _without_needed(job: Job, results: Mapping[Path, Result]) -> Result | None:
    """The failure of a job of which one that it needs has failed in this run."""
    failed = [each.notebook for each in job.needs if each.folder in results and results[each.folder].status == "failed"]
    return Result(job.notebook, "failed", f"{failed[0]}, which it reads from, failed") if failed else None


def _run(job: Job, force: bool, timeout: float | None, nursery: Any, progress: Progress, patient: bool) -> Result:
    """Run one job unless it is up to date; where another run is at it wait, or raise if not `patient`."""
    if job.lacking and not force:
        lacks = f"suite {job.suite.name} has no role {', '.join(job.lacking)}"
        return Result(job.notebook, "not applicable", lacks)
    if not force and job.state == "up to date":
        return Result(job.notebook, "up to date")
    for needed in job.needs:
        if needed.state == "up to date" or needed.lacking:
            continue
        if not patient:
            raise folders.BusyError(f"{needed.notebook}, which it reads from, is not up to date")
        return Result(job.notebook, "failed", f"{needed.notebook}, which it reads from, is not up to date")
    with folders.locked(job.folder, (lambda who: progress.at(f"waits: {who}")) if patient else None) as check:
        if not force and job.state == "up to date":  # another run did it meanwhile
            return Result(job.notebook, "up to date")
        try:
            return _execute(job, timeout, nursery, progress, check)
        except RunError as error:
            return Result(job.notebook, "failed", str(error))


def _execute(job: Job, timeout: float | None, nursery: Any, progress: Progress, check: Callable[[], None]) -> Result:
    """Execute one notebook, and put its result, or the record of its failure, in place."""
    # papermill takes a second, which a run that is up to date need not
    from companion.execution import Failure, execute

    remote = "remote" in job.overrides
    passed = {name: value for name, value in job.overrides.items() if name != "remote"}
    if "suite" in job.parameters:
        passed["suite"] = job.ref
    if not remote:
        preflight(job.suite, str(job.parameters.get("quantization", "nf4")))
    started, clock = _now(), time.monotonic()
    with folders.temporary(job.folder) as temporary:
        done = execute(job.project, job.source, passed, progress.cell, timeout, nursery)
        failure = done.failure
        job = replace(job, parts=_with_fetched(job.parts, job.models, suite_hashes(job.suite.path)))
        done.notebook.metadata.get("papermill", {}).pop("input_path", None)
        record = {
            "notebook": job.notebook,
            "suite": job.suite.name,
            "parameters": job.parameters,
            "overrides": job.overrides,
            "seed": job.parameters.get("seed"),
            "seeds": provenance.seeds(job.parameters),
            "run_key": job.key,
            "key_parts": job.parts,
            "models": provenance.models(job.suite),
            "started": started,
            "finished": _now(),
            "wall_seconds": round(time.monotonic() - clock, 2),
            **done.usage,
            **({"device": "NDIF"} if remote else {}),
            **provenance.environment(job.project),
        }
        harvested, twice = _harvest(done.notebook, job)
        handed, again = _handed_on(done.notebook)
        if failure is not None and failure.ename in _UNFIT:
            harvested += _not_applicable(job, harvested, failure.evalue)
            _cut(done.notebook, failure.evalue)
            failure = None
        if failure is None and twice:
            failure = Failure("ClaimError", f"claim {twice} is recorded twice with different outcomes", None)
        if failure is None and again:
            failure = Failure("HandedOnError", f"{again!r} is handed on twice with different values", None)
        _write(temporary / "notebook.ipynb", done.notebook)
        if failure:
            _write(temporary / "error.json", {**record, **vars(failure), "status": "failed"})
        else:
            _write(temporary / "claims.json", harvested)
            if handed:
                _write(temporary / FILE, handed)
            _write(temporary / "run.json", {**record, "status": "ok"})
        check()
        folders.put(temporary, folders.failed(job.folder) if failure else job.folder)
    if failure:
        where = f"cell {failure.cell}: " if failure.cell else ""
        page = (folders.failed(job.folder) / "notebook.ipynb").relative_to(job.project)
        return Result(job.notebook, "failed", f"{where}{failure.ename}: {' '.join(failure.evalue.split())}; see {page}")
    return Result(job.notebook, "ran", claims=tuple(harvested))


def _with_fetched(parts: Mapping[str, str], before: Mapping[str, str], after: Mapping[str, str]) -> Mapping[str, str]:
    """A key's parts with the commits of the repositories that the run itself fetched, unknown before it."""
    fetched = {
        name: after[name]
        for name, was in before.items()
        if was != after[name] and "@" in was and was.partition("@")[0] == after[name].partition("@")[0]
    }
    return {**parts, "models": digest({**before, **fetched})} if fetched else parts


def _harvest(executed: Any, job: Job) -> tuple[list[dict[str, Any]], str | None]:
    """Collect the claims that a notebook recorded, and the first that it recorded in two different ways."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for recorded in _shown(executed, MIME):
        row = {**recorded, "suite": job.suite.name, "run_key": job.key}
        name = (str(row.get("paper")), str(row.get("claim_id")))
        if found.setdefault(name, row) != row:
            return list(found.values()), name[1]
    return list(found.values()), None


def _handed_on(executed: Any) -> tuple[dict[str, Any], str | None]:
    """Collect what a notebook handed on, by name, and the first name that it used for two values."""
    found: dict[str, Any] = {}
    for told in _shown(executed, HANDED):
        if found.setdefault(str(told["name"]), told["value"]) != told["value"]:
            return found, str(told["name"])
    return found, None


def _shown(executed: Any, mime: str) -> Iterator[dict[str, Any]]:
    """What an executed notebook's cells have shown as data of one kind, in order."""
    for cell in executed.cells:
        for output in cell.get("outputs", []):
            if isinstance(told := output.get("data", {}).get(mime), dict):
                yield told


def _not_applicable(job: Job, decided: Sequence[Mapping[str, Any]], why: str) -> list[dict[str, Any]]:
    """The notebook's claims that are not decided, as ones that do not apply to this model."""
    known = {(row.get("paper"), row.get("claim_id")) for row in decided}
    claims = [c for c in every_claim(job.project / "book" / "claims") if c.notebook == job.notebook]
    finding = Finding(outcome="not_applicable", reasons=(f"this model cannot be measured so: {why}",))
    return [
        Outcome.of(claim, finding, suite=job.suite.name, run_key=job.key).to_dict()
        for claim in claims
        if (claim.paper, claim.id) not in known
    ]


def _cut(notebook: Any, why: str) -> None:
    """Let an executed notebook end with the cell that this model cannot be measured by, and say so."""
    from nbformat.v4 import new_markdown_cell

    errors = [[o for o in cell.get("outputs", []) if o.get("output_type") == "error"] for cell in notebook.cells]
    place = next(place for place, found in enumerate(errors) if found)
    cell = notebook.cells[place]
    cell["outputs"] = [output for output in cell["outputs"] if output not in errors[place]]
    told = f"**This model cannot be measured so.** {why} What follows was not run."
    notebook.cells[place + 1 :] = [new_markdown_cell(f"```{{note}}\n{told}\n```")]


def _told(result: Result) -> str:
    if result.status != "ran":
        return f"{result.status}: {result.reason}" if result.reason else result.status
    states = [claim["outcome"] for claim in result.claims]
    counted = [f"{states.count(s)} {s.replace('_', ' ')}" for s in SYMBOLS if s in states]
    return f"done; claims: {', '.join(counted)}" if counted else "done"


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
