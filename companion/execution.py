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
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nbformat
import papermill
import psutil
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from papermill.clientwrap import PapermillNotebookClient
from papermill.engines import Engine, papermill_engines
from papermill.exceptions import PapermillExecutionError
from papermill.execute import remove_error_markers

from companion import provenance
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
class Job:
    """One execution: what the engine needs to know, and the notebook as far as it came."""

    folder: Path
    environment: dict[str, str]
    on_cell: Callable[[int, int], None]
    notebook: Any = None
    cells_started: int = 0
    manager: Any = None
    watch: provenance.MemoryWatch | None = None
    usage: dict[str, Any] = field(default_factory=dict)
    exit_code: int | None = None

    def last_words(self) -> str:
        """Give the last line that the kernel's process itself wrote, such as an import error at its start."""
        try:
            lines = (self.folder / "kernel.log").read_text(encoding="utf-8", errors="replace").strip().splitlines()
        except OSError:
            return ""
        return lines[-1].strip() if lines else ""


def execute(
    project: Path,
    source: Path,
    parameters: Mapping[str, Any],
    on_cell: Callable[[int, int], None],
    timeout: float | None = None,
) -> Execution:
    """Execute a notebook, with the project's root as its working directory; what it printed is scrubbed.

    `on_cell(k, m)` is called as code cell k of m starts; `timeout` is in seconds a cell. An interrupt ends the
    kernel and goes on upwards.
    """
    _quiet()
    papermill_engines.register("rim", _Engine)
    # A start that fails under load succeeds on a second try; a cell that fails is never run twice.
    job, failure = _attempt(project, source, parameters, on_cell, timeout)
    if failure and job.cells_started == 0 and failure.cell is None:
        job, failure = _attempt(project, source, parameters, on_cell, timeout)
    clean = scrubber(project)
    notebook = clean(remove_error_markers(job.notebook))
    if failure:
        failure = Failure(**clean(vars(failure)))
    return Execution(nbformat.from_dict(notebook), failure, _usage(job))


def _usage(job: Job) -> dict[str, Any]:
    """What the kernel said of itself; its memory is at least what was seen of it and all that it started."""
    said = {"device": None, "peak_memory_bytes": None, "peak_gpu_memory_bytes": None, **job.usage}
    seen = job.watch.peak if job.watch else 0
    return {**said, "peak_memory_bytes": max(said["peak_memory_bytes"] or 0, seen) or None}


def _attempt(
    project: Path,
    source: Path,
    parameters: Mapping[str, Any],
    on_cell: Callable[[int, int], None],
    timeout: float | None,
) -> tuple[Job, Failure | None]:
    with _private_folder() as folder:
        environment = {
            **os.environ,
            **_KERNEL_SETTINGS,
            "RIM_PROJECT": str(project),
            "IPYTHONDIR": str(folder / "ipython"),  # a user's own start-up files must not change a result
        }
        job = Job(folder, environment, on_cell, notebook=nbformat.read(source, as_version=4))
        try:
            papermill.execute_notebook(
                job.notebook,
                None,
                parameters=dict(parameters),
                engine_name="rim",
                kernel_name="python3",
                language="python",
                progress_bar=False,
                cwd=project,
                job=job,
                execution_timeout=timeout,
            )
        except PapermillExecutionError as error:
            cell = int(error.exec_count) if error.exec_count is not None else None
            return job, Failure(error.ename, _with_advice(error), cell, list(error.traceback))
        except OSError:
            raise
        except Exception as error:  # whatever the kernel's transport raises fails this notebook, not the others
            return job, _kernel_failure(job, error)
        finally:
            _end_processes(job)
        return job, None


def _kernel_failure(job: Job, error: Exception) -> Failure:
    if job.cells_started == 0:
        told = job.last_words() or str(error)
        return Failure("KernelStartError", f"the kernel did not start: {told}", None)
    if type(error).__name__ == "DeadKernelError":
        return Failure("KernelDied", f"the kernel died in this cell{_death(job)}", job.cells_started)
    if type(error).__name__ == "CellTimeoutError":
        return Failure("CellTimeout", "this cell took longer than the time allowed", job.cells_started)
    return Failure(type(error).__name__, str(error).strip().split("\n")[0], job.cells_started)


def _with_advice(error: PapermillExecutionError) -> str:
    """What a cell's error says, with what to do where memory ran out."""
    if not _OUT_OF_MEMORY.search(f"{error.ename} {error.evalue}"):
        return str(error.evalue)
    first = str(error.evalue).strip().split("\n")[0].split(". ")[0]
    return f"{first or 'out of memory'}; {_LESS_MEMORY}"


def _death(job: Job) -> str:
    """Say why a kernel died, as far as its exit code tells, and what to do."""
    code = job.exit_code
    if code is None or code == -signal.SIGKILL:
        held = f" (it held {job.watch.peak / 1e9:.1f} GB)" if job.watch and job.watch.peak else ""
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


@contextlib.contextmanager
def _private_folder() -> Iterator[Path]:
    """Make a folder that only this user can enter, with a path short enough for sockets where one exists."""
    places_to_try = [tempfile.gettempdir(), "/tmp"]
    short = [p for p in places_to_try if len(p) < _SOCKET_PATH_LIMIT - 20 and os.access(p, os.W_OK)]
    parent = Path((short or places_to_try)[0])
    for left in parent.glob("rim-*-*"):  # by a run that was killed
        number = left.name.split("-")[1]
        # Several runs may sweep at once, so that a folder may go at any time.
        with contextlib.suppress(FileNotFoundError):
            if number.isdigit() and not psutil.pid_exists(int(number)) and left.stat().st_uid == os.getuid():
                _end_orphan(left)
                shutil.rmtree(left, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=f"rim-{os.getpid()}-", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class _KernelManager(AsyncKernelManager):  # type: ignore[misc,unused-ignore]
    """Start this very Python as the kernel, quietly, with the job's environment and sockets."""

    job: Job

    @property
    def kernel_spec(self) -> KernelSpec:
        argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        return KernelSpec(argv=argv, display_name="Python 3", language="python")

    async def _async_start_kernel(self, **kw: Any) -> None:
        with (self.job.folder / "kernel.log").open("wb") as log:
            await super()._async_start_kernel(env=self.job.environment, stdout=log, stderr=log, **kw)
        process = getattr(self.provisioner, "pid", None)
        if process is None:
            return
        begun = psutil.Process(process).create_time()
        (self.job.folder / "kernel.process").write_text(f"{process} {begun}", encoding="utf-8")
        self.job.watch = provenance.MemoryWatch(process)

    start_kernel = _async_start_kernel


class _Client(PapermillNotebookClient):  # type: ignore[misc,unused-ignore]
    """Papermill's client with the job's own kernel manager."""

    job: Job

    def create_kernel_manager(self) -> Any:
        manager = _KernelManager(kernel_name=self.kernel_name, config=self.config)
        manager.job = self.job
        manager.connection_file = str(self.job.folder / "kernel.json")
        if sys.platform != "win32" and len(str(self.job.folder)) < _SOCKET_PATH_LIMIT - 10:
            manager.transport = "ipc"
            manager.ip = str(self.job.folder / "k")
        self.km = self.job.manager = manager
        return manager

    def papermill_execute_cells(self) -> None:
        try:
            super().papermill_execute_cells()
            self._ask_kernel()
        except BaseException:
            process = getattr(self.job.manager.provisioner, "process", None)
            self.job.exit_code = process.poll() if process else None
            self.shutdown_kernel = "immediate"  # a busy kernel does not answer a polite request
            raise

    def _ask_kernel(self) -> None:
        # A notebook that broke its kernel's answers has its results all the same.
        with contextlib.suppress(KeyError, ValueError, SyntaxError, TypeError):
            asked = self.kc.execute("", silent=True, store_history=False, user_expressions={"it": _ASKED})
            answer = self.wait_for_reply(asked)["content"]["user_expressions"]["it"]
            self.job.usage = json.loads(ast.literal_eval(answer["data"]["text/plain"]))


class _Engine(Engine):  # type: ignore[misc,unused-ignore]
    """A papermill engine that tells the job which cell starts and keeps the notebook within reach."""

    @classmethod
    def execute_managed_notebook(
        cls, nb_man: Any, kernel_name: str, *, job: Job, execution_timeout: float | None = None, **_: Any
    ) -> None:
        job.notebook = nb_man.nb
        code_cells = [i for i, cell in enumerate(nb_man.nb.cells) if cell.cell_type == "code"]
        start = nb_man.cell_start

        def cell_start(cell: Any, cell_index: int, **kw: Any) -> None:
            start(cell, cell_index, **kw)
            if cell_index in code_cells:
                job.cells_started = code_cells.index(cell_index) + 1
                job.on_cell(job.cells_started, len(code_cells))

        nb_man.cell_start = cell_start
        client = _Client(nb_man, timeout=execution_timeout, startup_timeout=60, kernel_name=kernel_name)
        client.job = job
        client.execute()


def _end_processes(job: Job) -> None:
    """Make sure that nothing of a kernel is left, not even what it started itself."""
    if job.watch:
        job.watch.stop()
    process = getattr(getattr(job.manager, "provisioner", None), "pid", None)
    if process is None or not hasattr(os, "killpg"):
        return
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process, signal.SIGKILL)  # the kernel leads a process group of its own


def _end_orphan(folder: Path) -> None:
    """End the kernel of a run that was killed, should it still be there: it may hold much memory."""
    with contextlib.suppress(OSError, ValueError, psutil.Error):
        number, begun = (folder / "kernel.process").read_text(encoding="utf-8").split()
        if psutil.Process(int(number)).create_time() == float(begun):
            os.killpg(int(number), signal.SIGKILL)


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
