"""Result folders that one run at a time writes, and that are there whole or not at all, whatever is killed.

A result `parent/NAME` is written to `parent/.tmp-...-NAME`, renamed to `parent/.new-NAME` when it is finished, and
then put in place, the result before it going by way of `parent/.old-NAME`. Whoever next holds `parent/.lock-NAME`
finishes or takes back what a killed run left between two of these steps.
"""

import contextlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from rim_core import locks, paths
from rim_core.errors import InputError
from rim_core.locks import BusyError

__all__ = ["BusyError", "failed", "locked", "put", "read_json", "read_record", "sweep", "temporary"]

_LEFT_BEHIND = (".lock-", ".tmp-", ".new-", ".old-")


def failed(folder: Path) -> Path:
    """Give the folder that a failed run of the result `folder` is kept in."""
    return folder.parent / "failed" / folder.name


@contextlib.contextmanager
def locked(folder: Path, on_wait: Callable[[str], None] | None = None) -> Iterator[Callable[[], None]]:
    """Hold a result's folder against every other run (see `locks.hold`), and mend what a killed one left of it.

    Yields a function to call before the result is put in place: it raises RunError where the folder was taken
    over meanwhile. Raises `BusyError` where another run holds the folder and there is no `on_wait`.
    """
    with locks.hold(folder.parent / f".lock-{folder.name}", on_wait) as check:
        _mend(folder)
        yield check


@contextlib.contextmanager
def temporary(folder: Path) -> Iterator[Path]:
    """Make a sibling of `folder` to write into; whatever happens, it is not left behind."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = _temporary_name(folder)
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def put(finished: Path, folder: Path) -> None:
    """Put a finished folder in the place of `folder` by renames; a run that is killed meanwhile loses neither."""
    # A power cut must not leave names without their contents.
    for path in [*finished.rglob("*"), finished]:
        _sync(path)
    folder.parent.mkdir(parents=True, exist_ok=True)
    new, _ = _steps(folder)
    finished.rename(new)
    _put_in_place(folder)


def sweep(results: Path) -> None:
    """Mend what killed runs left in `results/SUITE/SECTION/NOTEBOOK/`, except where another run is at work."""
    left = [path for pattern in ("*/*/*/.*-*", "*/*/*/failed/.*-*") for path in results.glob(pattern)]
    for path in left:
        prefix = next((each for each in _LEFT_BEHIND if path.name.startswith(each)), None)
        if prefix is None:
            continue
        name = path.name.removeprefix(prefix)
        name = name.split("-", 2)[-1] if prefix == ".tmp-" else name
        parent = path.parent.parent if path.parent.name == "failed" else path.parent
        # A folder that this user may not write is none of this run's business until it wants to write there.
        with contextlib.suppress(BusyError, OSError), locked(parent / name):
            pass


def _steps(folder: Path) -> tuple[Path, Path]:
    return folder.parent / f".new-{folder.name}", folder.parent / f".old-{folder.name}"


def _temporary_name(folder: Path) -> Path:
    return folder.parent / f".tmp-{locks.here()}-{os.getpid()}-{folder.name}"


def _put_in_place(folder: Path) -> None:
    new, old = _steps(folder)
    _discard_failure(folder)
    if old.exists():
        shutil.rmtree(old)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    _sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _discard_failure(folder: Path) -> None:
    """Remove the record of a failure that a result replaces, and the folder of failures where no other is left."""
    path, aside = failed(folder), _temporary_name(folder)
    with contextlib.suppress(FileNotFoundError):
        path.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)
    with contextlib.suppress(OSError):
        path.parent.rmdir()


def _mend(folder: Path) -> None:
    for place in (folder, failed(folder)):
        new, old = _steps(place)
        if new.exists():
            _put_in_place(place)
        elif old.exists() and place.exists():
            shutil.rmtree(old)
        elif old.exists():
            old.rename(place)
    for path in folder.parent.glob(".tmp-*"):
        if path.name.endswith(f"-{folder.name}"):
            shutil.rmtree(path, ignore_errors=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        # Some network file systems refuse to sync a folder; they write names through.
        if not path.is_dir():
            raise
    finally:
        os.close(handle)


# --- what a run recorded --------------------------------------------------------------------------------


def read_record(path: Path) -> dict[str, Any] | None:
    """Give the record of a run (`run.json`) or of a failure (`error.json`); None where there is none.

    A file that holds something else counts as no run, and one line on standard error says so.
    """
    if not path.is_file():
        return None
    data = read_json(path)
    if isinstance(data, dict) and isinstance(data.get("ename" if path.name == "error.json" else "run_key"), str):
        return data
    _tell_of(path)
    return None


@cache  # once is enough
def _tell_of(path: Path) -> None:
    where = "/".join(path.parts[-6:])
    print(f"rim: {where} is no record of a run, and counts as none; run that notebook again", file=sys.stderr)


def read_json(path: Path) -> Any:
    """Give what a JSON file holds; None where it cannot be read."""
    try:
        return paths.read_json(path)
    except InputError:
        return None
