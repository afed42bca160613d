"""Kernels forked from one process that has loaded the libraries of models, which each would take seconds to load.

The process itself runs this module's `main`: it imports what it is told to, and forks a kernel for each line it reads.
Linux only, and only where there is no GPU: what the libraries ask of its driver as they load does not survive a fork.
"""

import contextlib
import ctypes
import importlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

# What a notebook on a model loads in any case, but for the project's own packages, which take no time, and for pandas
# and what loads it: as it loads, it looks whether it is in a notebook.
LIBRARIES = (
    *("ipykernel.kernelapp", "torch", "scipy.stats", "bitsandbytes", "peft"),
    *("transformers.modeling_utils", "transformers.integrations.hub_kernels", "transformers.generation"),
)


def possible() -> bool:
    """Whether kernels can be forked here."""
    devices = Path("/dev")
    return sys.platform == "linux" and not [*devices.glob("nvidia*"), *devices.glob("kfd"), *devices.glob("dxg")]


def end_with_parent() -> None:
    """Ask Linux to end this process with its parent; elsewhere ipykernel looks itself, between two steps of Python."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


class Nursery:
    """The process with the libraries loaded; it ends with this one, and its kernels with it."""

    def __init__(self, project: Path, environment: Mapping[str, str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", __name__, *LIBRARIES],
            cwd=project,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            start_new_session=True,  # an interrupt at the terminal is not for it
            preexec_fn=end_with_parent,
        )

    def fork(self, command: Sequence[str], environment: Mapping[str, str], log: Path) -> "Forked":
        """Start a kernel, one at a time: `python -m` and the command; what it prints goes to the log."""
        assert self.process.stdin is not None
        request = {"command": list(command), "environment": dict(environment), "log": str(log)}
        self.process.stdin.write(json.dumps(request).encode() + b"\n")
        return Forked(self.process)

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.communicate()


class Forked:
    """A forked kernel, with what jupyter_client asks of a `subprocess.Popen`."""

    stdin = stdout = stderr = None

    def __init__(self, nursery: "subprocess.Popen[bytes]") -> None:
        assert nursery.stdout is not None
        self._told = nursery.stdout
        self.returncode: int | None = None
        self.pid = int(self._told.readline() or 0)
        if not self.pid:
            raise RuntimeError("the process that kernels are forked from has ended")

    def poll(self) -> int | None:
        """Give the exit code, negative for a signal, or None while it runs."""
        if self.returncode is None and select.select([self._told], [], [], 0)[0]:
            self.wait()
        return self.returncode

    def wait(self) -> int:
        """Wait for the end and give the exit code."""
        if self.returncode is None:
            self.returncode = int(self._told.readline() or -signal.SIGKILL)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal to the kernel, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill the kernel."""
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        """Ask the kernel to end."""
        self.send_signal(signal.SIGTERM)


def main(libraries: Sequence[str]) -> None:
    """Load the libraries; then for each line of JSON fork a kernel, print its number and, once it ended, its code."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for name in libraries:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    for line in sys.stdin:
        request = json.loads(line)
        if not (number := os.fork()):
            answers.close()
            _become_kernel(**request)
            return
        with contextlib.suppress(OSError):
            os.setpgid(number, number)
        print(number, file=answers, flush=True)
        _, status = os.waitpid(number, 0)
        print(os.waitstatus_to_exitcode(status), file=answers, flush=True)


def _become_kernel(command: Sequence[str], environment: Mapping[str, str], log: str) -> None:
    with contextlib.suppress(OSError):
        os.setpgid(0, 0)  # as the nursery does too, whoever comes first
    end_with_parent()
    os.environ.clear()
    os.environ.update(environment, JPY_PARENT_PID=str(os.getppid()))
    for number, file in ((0, os.open(os.devnull, os.O_RDONLY)), (1, os.open(log, os.O_WRONLY | os.O_CREAT))):
        os.dup2(file, number)
    os.dup2(1, 2)
    sys.argv = list(command)
    runpy.run_module(command[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1:])
