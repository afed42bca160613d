"""A lock that one run holds against every other, on one machine and on several that share a folder.

The system's lock on the file ends with its holder, however that dies, so on one machine none is ever stale. File
systems that machines share may have no such lock, or one for each machine: there the file's text says who holds
it, and the time it was last touched whether that run still lives.
"""

import contextlib
import hashlib
import json
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from rim_core.errors import RunError

_BEAT = 15.0  # seconds between two signs of life of a lock's holder
_LAPSE = 120.0  # seconds without one after which a holder on another machine counts as dead
_POLL = 0.5
# When a lock of another machine was seen to be touched, by its text: the time on it, and this process's own clock.
_seen: dict[bytes, tuple[int, float]] = {}


class BusyError(Exception):
    """Another run holds the lock; the message says which."""


@contextlib.contextmanager
def hold(path: Path, on_wait: Callable[[str], None] | None = None) -> Iterator[Callable[[], None]]:
    """Hold the lock `path`, which is a file that is there only meanwhile.

    Where another run holds it, `on_wait` is called once with who that is, and it is waited for. Yields a function
    that raises RunError where the lock was taken over meanwhile, as from a process that stood still.

    Raises:
        BusyError: another run holds it and there is no `on_wait`.
    """
    mine = json.dumps({"machine": here(), "process": os.getpid(), "started": _started(os.getpid())}).encode()
    handle = _acquire(path, mine, on_wait)
    stop = threading.Event()
    beat = threading.Thread(target=_keep_alive, args=(handle, stop), daemon=True)
    beat.start()
    try:
        yield lambda: _check(path, mine)
    finally:
        stop.set()
        beat.join()
        with contextlib.suppress(OSError):
            if path.read_bytes() == mine:
                path.unlink()
        os.close(handle)


def here() -> str:
    """Name this machine without telling its name; in a container, where processes are numbered anew, that."""
    name = platform.node()
    with contextlib.suppress(OSError):
        name += os.readlink("/proc/self/ns/pid")
    return hashlib.sha256(name.encode()).hexdigest()[:8]


def _acquire(path: Path, mine: bytes, on_wait: Callable[[str], None] | None) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    told = False
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if _is_free(handle, path):
                _sign(handle, path, mine)
                return handle
            holder = os.pread(handle, 1000, 0)
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)
        if on_wait is None:
            raise BusyError(_who(holder))
        if not told:
            on_wait(_who(holder))
            told = True
        time.sleep(_POLL)


def _sign(handle: int, path: Path, mine: bytes) -> None:
    try:
        os.ftruncate(handle, 0)
        os.pwrite(handle, mine, 0)
    except OSError:  # such as a full disk
        path.unlink()
        raise


def _is_free(handle: int, path: Path) -> bool:
    """Whether this process now has the system's lock on what is at `path`, and no living run its text."""
    import fcntl

    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        system_has_locks = True
    except BlockingIOError:
        return False
    except OSError:
        system_has_locks = False
    opened = os.fstat(handle)
    try:
        there = os.stat(path)
    except FileNotFoundError:
        return False
    if (opened.st_ino, opened.st_dev) != (there.st_ino, there.st_dev):
        return False  # its holder removed it after it was opened here
    text = os.pread(handle, 1000, 0)
    holder = _parse(text)
    if not holder:
        return True
    if holder["machine"] != here():
        return not _beats(text, opened.st_mtime_ns)
    return system_has_locks or _started(holder["process"]) != holder["started"]


def _beats(text: bytes, touched: int) -> bool:
    """Whether a holder on another machine gave a sign of life lately, by this machine's clock alone."""
    before = _seen.get(text)
    if before is None or before[0] != touched:
        _seen[text] = (touched, time.monotonic())
        return True
    return time.monotonic() - before[1] < _LAPSE


def _keep_alive(handle: int, stop: threading.Event) -> None:
    while not stop.wait(_BEAT):
        with contextlib.suppress(OSError):
            os.utime(handle)


def _check(path: Path, mine: bytes) -> None:
    with contextlib.suppress(OSError):
        if path.read_bytes() == mine:
            return
    raise RunError("another rim run took this notebook over while this one stood still; nothing of this one was kept")


def _parse(text: bytes) -> dict[str, Any]:
    try:
        holder = json.loads(text)
        return {name: holder[name] for name in ("machine", "process", "started")}
    except (ValueError, KeyError, TypeError):
        return {}


def _who(text: bytes) -> str:
    holder = _parse(text)
    if not holder:
        return "another rim run is at it"
    if holder["machine"] == here():
        return f"another rim run (process {holder['process']}) is at it"
    return f"a rim run on another machine is at it (counted as dead after {_LAPSE:.0f} s without a sign of life)"


def _started(process: int) -> float | None:
    """When a process began, so that a number that was given out again is not taken for the same one."""
    try:
        return round(psutil.Process(process).create_time(), 1)
    except psutil.Error:
        return None
