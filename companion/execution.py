"""One notebook, executed by papermill in a kernel of its own, in memory; what comes back is scrubbed.

The kernel is always this Python, reached over sockets in a private folder with a short, unique path: ports
race when several runs share a machine, and a default socket path is shared by every run.
"""

import ast
import contextlib
import json
import logging
import os
import re
import signal
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nbformat
import papermill
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from papermill.clientwrap import PapermillNotebookClient
from papermill.engines import Engine, papermill_engines
from papermill.exceptions import PapermillExecutionError
from papermill.execute import remove_error_markers

from companion import forking, provenance
from rim_core import paths

_SOCKET_PATH_LIMIT = 90  # the system's limit is about 104 bytes, and a channel number is appended
_KERNEL_SETTINGS = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "PYTHONHASHSEED": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
}
_SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSWORD|API_?KEY|ACCESS_?KEY", re.IGNORECASE)
_SECRET_TEXT = re.compile(r"\bhf_[A-Za-z0-9]{20,}")
# Only from the start of a word: from every character, a long word without blanks would take minutes.
_OUT_OF_MEMORY = re.compile(r"OutOfMemoryError|MemoryError|out of memory|can't allocate memory")
_LESS_MEMORY = "set smaller sizes with -p, quantize the model, or use a machine with more memory"
# What the kernel is asked once the cells are done.
_ASKED = "__import__('companion.provenance', fromlist=['of_process']).of_process()"
_CELL_FILE = re.compile(r"(?<![^\s\"'<>(])[^\s\"'<>(]*ipykernel_\d+[/\\]\d+\.py")


@dataclass
class Failure:
    """Why a notebook failed: the error of its cell, or of the kernel where no cell is to blame."""

    ename: str
    evalue: str
    cell: int | None
    traceback: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Execution:
    """An executed notebook, why it failed or None, and what the kernel took: device and peak memory."""

    notebook: Any
    failure: Failure | None
    usage: dict[str, Any]


@dataclass
class _Kernel:
    """One kernel's start and work: what the engine needs to know, and the notebook as far as it came."""

    folder: Path
    environment: dict[str, str]
    on_cell: Callable[[int, int], None]
    notebook: Any
    nursery: forking.Nursery | None = None
    cells_started: int = 0
    manager: Any = None
    watch: provenance.MemoryWatch | None = None
    said: dict[str, Any] = field(default_factory=dict)
    exit_code: int | None = None

    @property
    def usage(self) -> dict[str, Any]:
        """What the kernel said of itself; its memory is at least what was seen of it and all that it started."""
        said = {"device": None, "peak_memory_bytes": None, "peak_gpu_memory_bytes": None, **self.said}
        seen = self.watch.peak if self.watch else 0
        return {**said, "peak_memory_bytes": max(said["peak_memory_bytes"] or 0, seen) or None}

    def end(self) -> None:
        """Make sure that nothing of the kernel is left, not even what it started itself."""
        if self.watch:
            self.watch.stop()
        process = getattr(getattr(self.manager, "provisioner", None), "pid", None)
        if process is not None and hasattr(os, "killpg"):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process, signal.SIGKILL)  # the kernel leads a process group of its own


def execute(
    project: Path,
    notebook: Mapping[str, Any],
    parameters: Mapping[str, Any],
    on_cell: Callable[[int, int], None],
    timeout: float | None = None,
    nursery: forking.Nursery | None = None,
) -> Execution:
    """Execute a notebook, with the project's root as its working directory; what it printed is scrubbed.

    `on_cell(k, m)` is called as code cell k of m starts; `timeout` is in seconds a cell; the kernel is a new process,
    or is forked from the `nursery`. An interrupt ends the kernel and goes on upwards.
    """
    _quiet()
    papermill_engines.register("rim", _Engine)
    with tempfile.TemporaryDirectory(prefix="rim-", dir=_short_parent()) as name:
        folder = Path(name)
        # A user's own start-up files must not change a result.
        environment = {**_environment(project), "IPYTHONDIR": str(folder / "ipython")}
        kernel = _Kernel(folder, environment, on_cell, nbformat.reads(json.dumps(notebook), as_version=4), nursery)
        failure = _attempt(kernel, project, parameters, timeout)
    clean = scrubber(project)
    executed = nbformat.from_dict(clean(remove_error_markers(kernel.notebook)))
    return Execution(executed, Failure(**clean(vars(failure))) if failure else None, kernel.usage)


def nursery(project: Path) -> forking.Nursery | None:
    """Start a process that kernels of this project can be forked from, where that is possible."""
    return forking.Nursery(project, _environment(project)) if forking.possible() else None


def _environment(project: Path) -> dict[str, str]:
    return {**os.environ, **_KERNEL_SETTINGS, "RIM_PROJECT": str(project)}


def _attempt(kernel: _Kernel, project: Path, parameters: Mapping[str, Any], timeout: float | None) -> Failure | None:
    try:
        papermill.execute_notebook(
            kernel.notebook,
            None,
            parameters=dict(parameters),
            engine_name="rim",
            kernel_name="python3",
            language="python",
            progress_bar=False,
            cwd=project,
            kernel=kernel,
            execution_timeout=timeout,
        )
    except PapermillExecutionError as error:
        cell = int(error.exec_count) if error.exec_count is not None else None
        return Failure(error.ename, _with_advice(error), cell, list(error.traceback))
    except OSError:
        raise
    except Exception as error:  # whatever the kernel's transport raises fails this notebook, not the others
        return _kernel_failure(kernel, error)
    finally:
        kernel.end()
    return None


def _kernel_failure(kernel: _Kernel, error: Exception) -> Failure:
    if kernel.cells_started == 0:
        # What the process itself wrote last, such as an import error at its start.
        with contextlib.suppress(OSError, IndexError):
            log = (kernel.folder / "kernel.log").read_text(encoding="utf-8", errors="replace")
            return Failure("KernelStartError", f"the kernel did not start: {log.strip().splitlines()[-1]}", None)
        return Failure("KernelStartError", f"the kernel did not start: {error}", None)
    told = {
        "DeadKernelError": ("KernelDied", f"the kernel died in this cell{_death(kernel)}"),
        "CellTimeoutError": ("CellTimeout", "this cell took longer than the time allowed"),
    }
    name = type(error).__name__
    return Failure(*told.get(name, (name, str(error).strip().split("\n")[0])), kernel.cells_started)


def _with_advice(error: PapermillExecutionError) -> str:
    """What a cell's error says, with what to do where memory ran out."""
    if not _OUT_OF_MEMORY.search(f"{error.ename} {error.evalue}"):
        return str(error.evalue)
    first = str(error.evalue).strip().split("\n")[0].split(". ")[0]
    return f"{first or 'out of memory'}; {_LESS_MEMORY}"


def _death(kernel: _Kernel) -> str:
    """Say why a kernel died, as far as its exit code tells, and what to do."""
    code = kernel.exit_code
    if code is None or code == -signal.SIGKILL:
        held = f" (it held {kernel.watch.peak / 1e9:.1f} GB)" if kernel.watch and kernel.watch.peak else ""
        return f"; most often the machine ran out of memory{held}: {_LESS_MEMORY}"
    if code >= 0:
        return f": it ended itself with exit code {code}"
    with contextlib.suppress(ValueError):
        return f" of {signal.Signals(-code).name}: a fault in compiled code"
    return f" of signal {-code}"


def _quiet() -> None:
    """Keep papermill's log off the terminal: the runner tells its own story."""
    log = logging.getLogger("papermill")
    log.setLevel(logging.CRITICAL)
    log.propagate = False
    log.addHandler(logging.NullHandler())
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)


def _short_parent() -> str | None:
    """Where a folder's path is short enough for sockets; None for the system's own place."""
    return None if len(tempfile.gettempdir()) < _SOCKET_PATH_LIMIT - 20 or not os.access("/tmp", os.W_OK) else "/tmp"


class _KernelManager(AsyncKernelManager):  # type: ignore[misc,unused-ignore]
    """Start this very Python as the kernel, quietly, with an environment and sockets of its own."""

    kernel: _Kernel

    @property
    def kernel_spec(self) -> KernelSpec:
        argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        return KernelSpec(argv=argv, display_name="Python 3", language="python")

    async def _async_start_kernel(self, **kw: Any) -> None:
        with (self.kernel.folder / "kernel.log").open("wb") as log:
            quiet = {
                "env": self.kernel.environment,
                "stdout": log,
                "stderr": log,
                "preexec_fn": forking.end_with_parent,
            }
            await super()._async_start_kernel(**quiet, **kw)
        if process := getattr(self.provisioner, "pid", None):
            self.kernel.watch = provenance.MemoryWatch(process)

    start_kernel = _async_start_kernel

    async def _async_launch_kernel(self, kernel_cmd: list[str], **kw: Any) -> None:
        if self.kernel.nursery is None:
            await super()._async_launch_kernel(kernel_cmd, **kw)
            return
        command = kernel_cmd[kernel_cmd.index("-m") + 1 :]
        forked = self.kernel.nursery.fork(command, self.kernel.environment, self.kernel.folder / "kernel.log")
        started: Any = self.provisioner
        started.process, started.pid, started.pgid = forked, forked.pid, forked.pid
        self._reconcile_connection_info(started.connection_info)


class _Client(PapermillNotebookClient):  # type: ignore[misc,unused-ignore]
    """Papermill's client with a kernel manager of this module's."""

    kernel: _Kernel

    def create_kernel_manager(self) -> Any:
        manager = _KernelManager(kernel_name=self.kernel_name, config=self.config)
        folder = self.kernel.folder
        manager.kernel = self.kernel
        manager.connection_file = str(folder / "kernel.json")
        if sys.platform != "win32" and len(str(folder)) < _SOCKET_PATH_LIMIT - 10:
            manager.transport = "ipc"
            manager.ip = str(folder / "k")
        self.km = self.kernel.manager = manager
        return manager

    def papermill_execute_cells(self) -> None:
        try:
            super().papermill_execute_cells()
            self._ask_kernel()
        except BaseException:
            process = getattr(self.kernel.manager.provisioner, "process", None)
            self.kernel.exit_code = process.poll() if process else None
            self.shutdown_kernel = "immediate"  # a busy kernel does not answer a polite request
            raise

    def _ask_kernel(self) -> None:
        # A notebook that broke its kernel's answers has its results all the same.
        with contextlib.suppress(KeyError, ValueError, SyntaxError, TypeError):
            asked = self.kc.execute("", silent=True, store_history=False, user_expressions={"it": _ASKED})
            answer = self.wait_for_reply(asked)["content"]["user_expressions"]["it"]
            self.kernel.said = json.loads(ast.literal_eval(answer["data"]["text/plain"]))


class _Engine(Engine):  # type: ignore[misc,unused-ignore]
    """A papermill engine that tells which cell starts and keeps the notebook within reach."""

    @classmethod
    def execute_managed_notebook(
        cls, nb_man: Any, kernel_name: str, *, kernel: _Kernel, execution_timeout: float | None = None, **_: Any
    ) -> None:
        kernel.notebook = nb_man.nb
        code_cells = [i for i, cell in enumerate(nb_man.nb.cells) if cell.cell_type == "code"]
        start = nb_man.cell_start

        def cell_start(cell: Any, cell_index: int, **kw: Any) -> None:
            start(cell, cell_index, **kw)
            if cell_index in code_cells:
                kernel.cells_started = code_cells.index(cell_index) + 1
                kernel.on_cell(kernel.cells_started, len(code_cells))

        nb_man.cell_start = cell_start
        client = _Client(nb_man, timeout=execution_timeout, startup_timeout=60, kernel_name=kernel_name)
        client.kernel = kernel
        client.execute()


def scrubber(project: Path) -> Callable[[Any], Any]:
    """Give a function that takes a user's paths and secrets out of every text of a JSON-like value."""
    cache = os.environ.get("HF_HOME")
    folders = {
        str(project): ".",
        str(paths.cache_dir()): "<cache>",
        sys.prefix: "<python>",
        str(Path.home()): "~",
        **({cache: "<models>"} if cache else {}),
    }
    # Longest first, so that a folder inside the home directory is named for what it is; never "/" itself.
    ordered = sorted((item for item in folders.items() if len(Path(item[0]).parts) > 1), key=lambda i: -len(i[0]))
    patterns = [(re.compile(re.escape(folder) + r"(?![\w.-])"), short) for folder, short in ordered]
    secrets = [v for k, v in os.environ.items() if _SECRET_NAME.search(k) and len(v) >= 8]

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: item if str(key).startswith("image/") else clean(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [clean(item) for item in value]
        if not isinstance(value, str):
            return value
        for secret in secrets:
            value = value.replace(secret, "[secret]")
        value = _CELL_FILE.sub("<cell>", _SECRET_TEXT.sub("[secret]", value))
        for pattern, short in patterns:
            value = pattern.sub(short, value)
        return value

    return clean
