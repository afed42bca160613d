"""A lock that one run holds against every other, on one machine and on several that share a folder.

`filelock.SoftFileLease` does the work: the file says which process of which machine holds it, which touches it every
few seconds. On one machine a lock ends with its holder, however that dies; a holder on another machine counts as dead
once it has given no sign of life for `_LAPSE` seconds of the waiting run's own clock.
"""

import contextlib
import hashlib
import os
import platform
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import SoftFileLease, Timeout

from rim_core.errors import RunError

_LAPSE = 120.0  # seconds
_POLL = 0.5


class BusyError(Exception):
    """Another run holds the lock; the message says which."""


@contextlib.contextmanager
def hold(path: Path, on_wait: Callable[[str], None] | None = None) -> Iterator[Callable[[], None]]:
    """Hold the lock `path`, which is a file that is there only meanwhile.

    Where another run holds it, `on_wait` is called once with who that is, and it is waited for. Yields a function
    that raises RunError where the lock was taken over meanwhile, as from a process that stood still.

    Raises:
        BusyError: another run holds it and there is no `on_wait`.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder, hold(Path(folder) / "lock") as check:
        ...     check()
        ...     os.listdir(folder)
        ['lock']
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lease = SoftFileLease(path, lease_duration=_LAPSE)
    try:
        lease.acquire(timeout=0)
    except Timeout:
        if on_wait is None:
            raise BusyError(_who(lease)) from None
        on_wait(_who(lease))
        lease.acquire(poll_interval=_POLL)
    mine = path.read_bytes()
    try:
        yield lambda: _check(path, mine)
    finally:
        lease.release()


def here() -> str:
    """Name this machine without telling its name; in a container, where processes are numbered anew, that."""
    name = platform.node()
    with contextlib.suppress(OSError):
        name += os.readlink("/proc/self/ns/pid")
    return hashlib.sha256(name.encode()).hexdigest()[:8]


def _check(path: Path, mine: bytes) -> None:
    with contextlib.suppress(OSError):
        if path.read_bytes() == mine:
            return
    raise RunError("another rim run took this notebook over while this one stood still; nothing of this one was kept")


def _who(lease: SoftFileLease) -> str:
    owner = lease.owner
    if owner is None:
        return "another rim run is at it"
    if owner.hostname.partition("?")[0] == socket.gethostname():
        return f"another rim run (process {owner.pid}) is at it"
    return f"a rim run on another machine is at it (counted as dead after {_LAPSE:.0f} s without a sign of life)"
