"""Execute notebooks once: run keys, folders put in place whole, provenance, and the claims they recorded.

A result is a folder `results/<suite>/<section>/<name>/<variant>/` that appears complete or not at all. Its
run key is a hash of everything the result depends on, so what is up to date is never run again.
"""

import contextlib
import datetime
import errno
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from rim_core import __version__, notebooks, outcomes
from rim_core import workspace as places
from rim_core.errors import RimError
from rim_core.progress import Progress

_VERSIONS = (
    "torch",
    "transformers",
    "bitsandbytes",
    "peft",
    "accelerate",
    "nnsight",
    "numpy",
    "scipy",
    "scikit-learn",
    "pandas",
    "altair",
    "papermill",
)
_TEMPORARY = ".tmp-"


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
    suite: str = places.DEFAULT_SUITE,
    overrides: Mapping[str, Any] | None = None,
    *,
    force: bool = False,
    project: Path | None = None,
    timeout: float | None = None,
) -> list[Result]:
    """Execute the notebooks named (see `notebooks.resolve`; none means all) that are not up to date.

    `overrides` are parameter values; texts are converted to each parameter's type. All names and parameters
    are checked before anything runs (`InputError`). A notebook that fails does not stop the others. `timeout`
    is in seconds a cell; by default a cell may take as long as it needs. Progress goes to stderr.
    """
    project = project or places.root()
    places.suite_file(suite)
    chosen = notebooks.resolve(project, names)
    checked = {name: _overrides_of(project, name, overrides or {}) for name in chosen}
    _sweep(places.results_dir(project))
    results: list[Result] = []
    for number, name in enumerate(chosen, 1):
        progress = Progress(f"[{number}/{len(chosen)}] {name}", sys.stderr)
        try:
            with progress, _disk_errors(project):
                result = _run_one(project, name, suite, checked[name], force, timeout, progress)
        except KeyboardInterrupt:
            raise Interrupted(
                f"interrupted in {name}; {len(results)} of {len(chosen)} notebooks are done; "
                "the same command goes on with the rest"
            ) from None
        progress.say(_told(result))
        results.append(result)
    return results


def variant(overrides: Mapping[str, Any]) -> str:
    """Name the folder of a run: "default", or "p-" and 8 hex digits of the sorted overrides."""
    return f"p-{_sha(_json(overrides))[:8]}" if overrides else "default"


def run_folder(project: Path, notebook: str, suite: str, overrides: Mapping[str, Any]) -> Path:
    """Give the folder that a run's result is put into."""
    return places.results_dir(project) / places.suite_name(suite) / notebook / variant(overrides)


def run_key(
    project: Path, notebook: str, suite: str, overrides: Mapping[str, Any]
) -> tuple[str, dict[str, str]]:
    """Give a run's key and its parts, each a SHA-256 in hex: what the result depends on, and nothing else.

    Outputs, cell identifiers and the wording of claims are left out; the rules that decide claims are in.
    """
    from rim_core.loading import suite_hashes  # loads torch, which --list and --help must not wait for

    source = notebooks.read_source(project, notebook)
    known = notebooks.parameters(notebook, source)
    constraints = project / "constraints.txt"
    parts = {
        "notebook": _sha(_json([_normalised(cell) for cell in source["cells"]])),
        "parameters": _sha(_json(_resolved(known, places.suite_name(suite), overrides))),
        "rim_core": _tree_hash(places.PACKAGE),
        "models": _sha(_json([_sha(places.suite_file(suite).read_bytes()), suite_hashes(suite)])),
        "constraints": _sha(constraints.read_bytes() if constraints.is_file() else b""),
        "claims": _sha(_json([[claim.id, claim.decides] for claim in _claims_of(project, notebook)])),
    }
    return _sha(_json(parts)), parts


def last_run(project: Path, notebook: str, suite: str) -> str:
    """Say when a notebook's default run finished, that it failed, or that there is none; stale or not."""
    folder = run_folder(project, notebook, suite, {})
    if (folder.parent / "failed" / "default").is_dir():
        return "failed"
    try:
        finished = json.loads((folder / "run.json").read_text(encoding="utf-8"))["finished"]
    except (OSError, ValueError, KeyError):
        return "not run"
    return f"run {str(finished)[:10]}"


# --- one notebook ---------------------------------------------------------------------------------------


def _run_one(
    project: Path,
    name: str,
    suite: str,
    overrides: dict[str, Any],
    force: bool,
    timeout: float | None,
    progress: Progress,
) -> Result:
    folder = run_folder(project, name, suite, overrides)
    claims = _claims_of(project, name)
    lacking = [outcomes.missing_roles(claim, suite) for claim in claims]
    if lacking and all(lacking) and not force:
        return Result(
            name, "not applicable", f"suite {places.suite_name(suite)} has no role {', '.join(lacking[0])}"
        )
    key, parts = run_key(project, name, suite, overrides)
    if not force and _is_up_to_date(folder, key):
        return Result(name, "up to date")
    from rim_core.execution import (
        execute,
    )  # papermill takes a second, which a run that is up to date need not

    known = notebooks.parameters(name, notebooks.read_source(project, name))
    passed = {**overrides, **({"suite": _suite_for_kernel(project, suite)} if "suite" in known else {})}
    started, clock = _now(), time.monotonic()
    with _temporary(folder) as temporary:
        executed, failure = execute(project, notebooks.path_of(project, name), passed, progress.cell, timeout)
        executed.metadata.get("papermill", {}).pop("input_path", None)
        record = {
            "notebook": name,
            "suite": places.suite_name(suite),
            "parameters": _resolved(known, places.suite_name(suite), overrides),
            "overrides": overrides,
            "run_key": key,
            "key_parts": parts,
            "started": started,
            "finished": _now(),
            "wall_seconds": round(time.monotonic() - clock, 2),
        }
        harvested, twice = _harvest(executed, key, places.suite_name(suite))
        if failure is None and twice:
            from rim_core.execution import Failure

            failure = Failure("ClaimError", f"claim {twice} is recorded twice with different outcomes", None)
        _write(temporary / "notebook.ipynb", executed)
        if failure:
            _write(temporary / "error.json", {**record, **vars(failure), "status": "failed"})
            _put(temporary, _failed(folder))
            where = f"cell {failure.cell}: " if failure.cell else ""
            page = (_failed(folder) / "notebook.ipynb").relative_to(project)
            return Result(name, "failed", f"{where}{failure.ename}: {failure.evalue}; see {page}")
        _write(temporary / "claims.json", harvested)
        _write(
            temporary / "run.json",
            {**record, **_provenance(project), "seed": passed.get("seed", _seed(known))},
        )
        _put(temporary, folder)
    shutil.rmtree(_failed(folder), ignore_errors=True)
    return Result(name, "ran", claims=tuple(harvested))


def _overrides_of(project: Path, name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    known = notebooks.parameters(name, notebooks.read_source(project, name))
    return notebooks.check_overrides(name, known, given)


def _claims_of(project: Path, notebook: str) -> list[outcomes.Claim]:
    folder = project / "book" / "claims"
    every = [
        claim for path in sorted(folder.glob("*.yml")) for claim in outcomes.load_claims(path.stem, folder)
    ]
    return [claim for claim in every if claim.metric["notebook"] == notebook]


def _resolved(
    known: Mapping[str, notebooks.Parameter], suite: str, overrides: Mapping[str, Any]
) -> dict[str, Any]:
    values = {name: parameter.default for name, parameter in known.items()}
    return {**values, **overrides, **({"suite": suite} if "suite" in known else {})}


def _seed(known: Mapping[str, notebooks.Parameter]) -> Any:
    return known["seed"].default if "seed" in known else None


def _suite_for_kernel(project: Path, suite: str) -> str:
    """Give a suite as the kernel, whose working directory is the project's root, can find it."""
    if suite in places.suite_names():
        return suite
    path = places.suite_file(suite)
    return path.relative_to(project).as_posix() if path.is_relative_to(project) else str(path)


def _is_up_to_date(folder: Path, key: str) -> bool:
    try:
        record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    complete = all((folder / name).is_file() for name in ("notebook.ipynb", "claims.json"))
    failed_since = _failed(folder).is_dir()
    return complete and not failed_since and record.get("run_key") == key


def _failed(folder: Path) -> Path:
    return folder.parent / "failed" / folder.name


def _harvest(executed: Any, key: str, suite: str) -> tuple[list[dict[str, Any]], str | None]:
    """Collect the claims that a notebook recorded, and the first that it recorded in two different ways."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for cell in executed.cells:
        for output in cell.get("outputs", []):
            recorded = output.get("data", {}).get(outcomes.MIME)
            if not isinstance(recorded, dict):
                continue
            row = {**recorded, "suite": suite, "run_key": key}
            name = (str(row.get("paper")), str(row.get("claim_id")))
            if found.setdefault(name, row) != row:
                return list(found.values()), name[1]
    return list(found.values()), None


def _provenance(project: Path) -> dict[str, Any]:
    versions = {"rim-core": __version__}
    for name in _VERSIONS:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {
        "versions": versions,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "device": _device(),
        "git_commit": _git_commit(project),
        "status": "ok",
    }


def _device() -> str:
    try:
        import torch
    except ImportError:
        return "cpu"
    if torch.cuda.is_available():
        return f"cuda ({torch.cuda.get_device_name()})"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _git_commit(project: Path) -> str | None:
    try:
        command = ["git", "-C", str(project), "rev-parse", "--verify", "HEAD"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def _told(result: Result) -> str:
    if result.status != "ran":
        return f"{result.status}: {result.reason}" if result.reason else result.status
    states = [claim["outcome"] for claim in result.claims]
    counted = [f"{states.count(s)} {s.replace('_', ' ')}" for s in outcomes.SYMBOLS if s in states]
    return f"done; claims: {', '.join(counted)}" if counted else "done"


# --- hashing --------------------------------------------------------------------------------------------


def _normalised(cell: Mapping[str, Any]) -> list[Any]:
    tags = sorted(cell.get("metadata", {}).get("tags", []))
    return [cell.get("cell_type"), notebooks.source_of(cell), tags]


def _tree_hash(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        hidden = any(part.startswith(".") or part == "__pycache__" for part in relative.parts)
        if path.is_file() and not hidden:
            digest.update(f"{relative.as_posix()}\0{_sha(path.read_bytes())}\n".encode())
    return digest.hexdigest()


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode()


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


# --- folders that are there whole or not at all ---------------------------------------------------------


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _here() -> str:
    """Name this machine without telling its name: a process number means something on one machine only."""
    return _sha(platform.node().encode())[:8]


@contextlib.contextmanager
def _temporary(folder: Path) -> Iterator[Path]:
    """Make a sibling of `folder` to write into; whatever happens, it is not left behind."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.parent / f"{_TEMPORARY}{_here()}-{os.getpid()}-{folder.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _put(temporary: Path, folder: Path) -> None:
    """Put a finished folder in its place by a rename; the one it replaces is moved aside first."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    old = temporary.with_name(f"{temporary.name}-old")
    if folder.exists():
        folder.rename(old)
    temporary.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _sweep(results: Path) -> None:
    """Remove what runs on this machine that are no longer alive left behind."""
    for path in results.glob(f"*/*/*/{_TEMPORARY}{_here()}-*"):
        process = path.name.removeprefix(f"{_TEMPORARY}{_here()}-").split("-")[0]
        if process.isdigit() and (int(process) == os.getpid() or not psutil.pid_exists(int(process))):
            shutil.rmtree(path, ignore_errors=True)


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
