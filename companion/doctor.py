"""What this machine has and what it can run, in plain words, with a remedy for each thing that is missing."""

import argparse
import importlib
import os
import shutil
import sys
from collections.abc import Callable
from importlib import metadata
from typing import NamedTuple

import rim_core.models  # noqa: F401  which keeps bitsandbytes from giving advice on kernels
from companion.streams import table
from rim_core import paths
from rim_core.suites import sizing
from rim_core.suites.schema import load_suite
from rim_core.suites.weights import is_cached

_DISK = 1.5  # GB: the wheel, the converted checkpoint, and room for activations
_MEMORY = 2.0  # GB: one notebook on the default suite
_LIBRARIES = ("torch", "transformers", "bitsandbytes", "nnsight", "peft", "papermill", "ipykernel")
_CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


class Look(NamedTuple):
    """One thing to look at: what is there (an error says why it is not), and what to do where it is missing.

    Without what is `needed` the default suite cannot run.
    """

    name: str
    found: Callable[[], str]
    remedy: str
    needed: bool = True


class _MissingError(Exception):
    """Something is not as it must be; the message says what there is."""


def report(_: argparse.Namespace) -> int:
    """Print what was found and what can be run; give 0 if the default suite can run, else 1."""
    rows, missing = [], []
    for look in _looks():
        try:
            mark, found = "ok", look.found()
        except Exception as error:  # a broken binary raises anything, and this is what the doctor is for
            told = (str(error).strip().splitlines() or [""])[0]
            found = told if isinstance(error, _MissingError) else f"{type(error).__name__}: {told}".rstrip(": ")
            mark, found = "MISSING" if look.needed else "no", f"{found}\n-> {look.remedy}"
            missing += [look.name] if look.needed else []
        rows.append({"": mark, "what": look.name, "found": found})
    table(rows, heading=False)
    suite = f"the default suite ({paths.DEFAULT_SUITE})"
    print(
        f"\nThis machine cannot run {suite} yet: {', '.join(missing)}" if missing else f"\nIt can run {suite}: rim run"
    )
    print(_larger_models())
    return int(bool(missing))


def _looks() -> list[Look]:
    install = "make env (or: pip install -c constraints.txt -e .)"
    return [
        Look("project", _project, "change into the companion's folder, with all of its notebooks"),
        Look("Python", _python, "install Python 3.11 or newer"),
        *(Look(name, lambda name=name: _library(name), install) for name in _LIBRARIES),  # type: ignore[misc]
        Look("weights", _weights, "the first run fetches and converts them, once (93 MB)", False),
        Look("organisms", _organisms, "rim organisms train ROLE --output FOLDER", False),
        Look("disk", _disk, f"free {_DISK} GB there, or set RIM_CACHE to a folder with room"),
        Look("memory", _memory, f"close other programs: about {_MEMORY:.0f} GB are needed"),
        Look("CPU cores", lambda: str(_cores()), ""),
        Look("GPU", _gpu, "only larger suites need one, and a torch built for it", False),
        Look("jupyter-book", _book, "only rim book needs it: pip install -c constraints.txt -e '.[book]'", False),
        Look("Chromium", _browser, "only the browser tests need it: your system's package manager has it", False),
    ]


def _project() -> str:
    root = paths.root()
    count = len(list((root / "notebooks").glob("*/*.ipynb")))
    return _only_if(count > 0, f"{root} ({count} notebooks)")


def _python() -> str:
    return _only_if(sys.version_info >= (3, 11), ".".join(map(str, sys.version_info[:3])))


def _library(name: str) -> str:
    importlib.import_module(name)
    return metadata.version(name)


def _weights() -> str:
    wheel = load_suite(paths.DEFAULT_SUITE).base.wheel
    cached = wheel is not None and is_cached(wheel)
    return _only_if(cached, f"{'in' if cached else 'not in'} {paths.cache_dir()}")


def _organisms() -> str:
    suite = load_suite(paths.DEFAULT_SUITE)
    absent = [name for name in suite.roles if not suite.has(name)]
    return _only_if(not absent, f"no adapter for {', '.join(absent)}" if absent else ", ".join(suite.roles))


def _disk() -> str:
    there = next(folder for folder in (paths.cache_dir(), *paths.cache_dir().parents) if folder.is_dir())
    free, writable = shutil.disk_usage(there).free / 1e9, os.access(there, os.W_OK)
    told = f"{free:.1f} GB free at {there}{'' if writable else ', which you may not write to'}"
    return _only_if(free >= _DISK and writable, told)


def _memory() -> str:
    free = sizing.free_memory()
    return _only_if(free >= _MEMORY, f"{free:.1f} GB available")


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _gpu() -> str:
    import torch

    if not torch.cuda.is_available():
        raise _MissingError("none that torch can use; the CPU is used")
    memory = torch.cuda.get_device_properties(0).total_memory / 1e9
    return f"{torch.cuda.get_device_name(0)}, {memory:.0f} GB, CUDA {torch.version.cuda}"


def _book() -> str:
    version = metadata.version("jupyter-book")
    return _only_if(version.startswith("1."), version)


def _browser() -> str:
    found = next((path for name in _CHROMIUM if (path := shutil.which(name))), None)
    return _only_if(found is not None, found or "not found")


def _only_if(fine: bool, told: str) -> str:
    if not fine:
        raise _MissingError(told)
    return told


def _larger_models() -> str:
    """Say how large a model the GPU holds: 0.6 bytes a parameter at 4 bits, and a fifth kept free."""
    try:
        memory, gpu = sizing.memory_there()
    except Exception:  # a torch that cannot be imported
        memory, gpu = 0.0, False
    if not gpu:
        return "Larger suites want a GPU; on the CPU, models of up to about 1B parameters are bearable."
    return f"Its GPUs hold models of up to about {memory * 0.8 / 0.6:.0f}B parameters in 4 bits (nf4)."
