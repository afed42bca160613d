"""A role's adapter built: from its recipe to a folder, and into the suite's file."""

import json
import os
import platform
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rim_core import locks
from rim_core.errors import InputError
from rim_core.identity import ADAPTER_FILE
from rim_core.models.adapters import ADAPTER_PREFIX, read_adapter
from rim_core.models.loading import load
from rim_core.models.model import Model
from rim_core.organisms.fitting import dequantise, fit_recipe, peft_config, recipe
from rim_core.organisms.resuming import Kept
from rim_core.paths import SUITES
from rim_core.suites import preflight
from rim_core.suites.schema import Suite, load_suite, suite_hashes
from rim_core.suites.suiteedit import add_role
from rim_core.suites.weights import sha256_file


def train(
    role: str,
    suite: str = "smollm2",
    output: str | os.PathLike[str] | None = None,
    seed: int | None = None,
    progress: bool = True,
) -> Path:
    """Train one role's adapter on the suite's base by its recipe and write it to a new folder.

    The base is the one that the book uses, 4-bit NF4; on the CPU it is dequantised once (the same function,
    faster to train). A role whose recipe has a parent starts from the suite's role of that name. The recipe's
    layers are those of the same relative depth in this model (see `fitting`). A training that was stopped, in
    whatever way, goes on from at most a minute before, and ends in the same bits.

    Args:
        role: a role with a recipe.
        suite: the base to train on.
        output: a folder that does not exist or is empty. None is `<suite>/<role>/` beside the suite's file,
            which then gets the role.
        seed: None is the recipe's own.
        progress: one line of progress on standard error.

    Raises:
        InputError: unknown role, an output that is in use, a parent that is missing, a suite that cannot work.
        RimError: what was trained cannot be kept, as on a full disk.
    """
    plan = recipe(role)
    found = load_suite(suite)
    target = Path(output) if output is not None else _own_folder(found, role)
    if output is None and _is_finished(target, role):
        _enter(found, role, target)
        return target
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{target} is in use: give --output a new or empty folder")
    _require_writable(target)
    parent = plan["parent"]
    start = _parent_folder(found, role, parent, suite) if parent else None
    preflight.preflight(found)
    record = {
        "role": role,
        "suite": found.name,
        "seed": plan["seed"] if seed is None else seed,
        "recipe": plan,
        "base": suite_hashes(suite)["base"],
        "parent": sha256_file(start / ADAPTER_FILE) if start else None,
    }
    try:
        with locks.hold(_beside(target, "lock")) as check:
            if output is None and _is_finished(target, role):
                return target
            kept = Kept(_beside(target, "state"), json.dumps([record, _torch_version()]))
            fitted, state = _trained(found, suite, record, start, kept, progress)
            check()
            _write_adapter(target, state, peft_config(fitted), {**record, "recipe": fitted})
            kept.discard()
            if output is None:
                _enter(found, role, target)
    except locks.BusyError as busy:
        raise InputError(f"{target}: {busy}") from None
    return target


def _beside(target: Path, what: str) -> Path:
    return target.parent / f".rim-train-{what}-{target.name}"


def _own_folder(suite: Suite, role: str) -> Path:
    """Where a role that is trained for a suite goes; refuses suites and roles that are not to be changed."""
    if suite.path.parent == SUITES:
        raise InputError(
            f"suite {suite.name!r} ships with the package and is not changed: give --output DIR, or make your own "
            f"(rim suite new NAME --base {suite.name})"
        )
    there = suite.roles.get(role)
    folder = suite.path.resolve().with_suffix("") / role
    if there is not None and (there.bare or there.checkpoint or Path(there.adapter or "") != folder):
        is_now = there.adapter or there.checkpoint or "the base itself"
        raise InputError(
            f"suite {suite.name!r} has a role {role!r} ({is_now}): remove it from {suite.path}, or give --output DIR"
        )
    if there is not None and suite.has(role):
        raise InputError(f"{folder} is trained already: remove the folder to train it again, or give --output DIR")
    return folder


def _require_writable(target: Path) -> None:
    """Say before hours of training what would fail after them."""
    there = next(folder for folder in (target, *target.absolute().parents) if folder.is_dir())
    if not os.access(there, os.W_OK):
        raise InputError(f"cannot write the adapter to {target}: {there} may not be written to")


def _is_finished(folder: Path, role: str) -> bool:
    """Whether a training that ended before its role was entered into the suite left its adapter there."""
    try:
        record = json.loads((folder / "recipe.json").read_text(encoding="utf-8"))
        return bool(record["role"] == role and record["sha256"] == sha256_file(folder / ADAPTER_FILE))
    except (OSError, ValueError, KeyError):
        return False


def _enter(suite: Suite, role: str, folder: Path) -> None:
    relative = folder.relative_to(suite.path.resolve().parent).as_posix()
    about = f"trained here by the project's recipe for {role}"
    add_role(
        suite.path, role, {"adapter": f"./{relative}", "sha256": sha256_file(folder / ADAPTER_FILE), "about": about}
    )


def _parent_folder(found: Suite, role: str, parent: str, suite: str) -> Path | None:
    """The adapter that a role starts from; None where that is the bare base."""
    there = found.roles.get(parent)
    if there is None or not found.has(parent):
        raise InputError(
            f"role {role!r} starts from {parent!r}, which is missing: rim organisms train {parent} --suite {suite}"
        )
    if there.checkpoint:
        raise InputError(
            f"role {role!r} starts from {parent!r}, which is a checkpoint of its own in suite {found.name!r}: make a "
            f"suite with it as the base (rim suite new NAME --base {there.checkpoint} --role {parent}=base)"
        )
    if there.adapter is None:
        return None
    if not Path(there.adapter).is_dir():
        raise InputError(f"role {role!r} starts from {parent!r}, which is on the hub: fetch {there.adapter} first")
    return Path(there.adapter)


def _trained(
    found: Suite, suite: str, record: dict[str, Any], start: Path | None, kept: Kept, progress: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The recipe as fitted to the base, and the trained tensors; what was kept of an earlier training is used."""
    import torch

    from rim_core.organisms.training import train_adapter

    model = load(f"{suite}:{found.bare_role}", quantization="nf4")
    role, fitted = record["role"], fit_recipe(record["recipe"], model.layout)
    state = None
    if start is not None:
        _require_same_shape(role, start, fitted)
        state = {name: tensor.float() for name, tensor in read_adapter(start).items()}
    if model.device.type == "cpu" and _has_room_dequantised(model):
        dequantise(model.hf)
    report = _reporter(role) if progress else None
    if progress:
        print(f"rim: training {role}: batches, and what the parent says of them", file=sys.stderr)
    try:
        trained = train_adapter(model.hf, model.tokenizer, fitted, record["seed"], state, report, kept)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"training {role!r} was interrupted; the same command goes on {kept.place}") from None
    if not all(bool(torch.isfinite(tensor).all()) for tensor in trained.values()):
        raise InputError(f"training {role!r} diverged (a weight is not finite): lower the recipe's learning_rate")
    return fitted, trained


def _has_room_dequantised(model: Model) -> bool:
    """Whether the layers' weights in float32 take at most half of the memory that is free."""
    import psutil

    layout = model.layout
    heads = layout.n_heads * layout.head_dim
    weights = len(layout.layers) * layout.d_model * (4 * heads + 3 * (layout.d_mlp or 4 * layout.d_model))
    return 4 * weights < psutil.virtual_memory().available / 2


def _require_same_shape(role: str, start: Path, fitted: dict[str, Any]) -> None:
    """A role goes on from its parent's tensors, so its LoRA must be of the same shape."""
    settings = json.loads((start / "adapter_config.json").read_text(encoding="utf-8"))
    wanted = peft_config(fitted)
    for key in ("r", "lora_alpha", "target_modules", "layers_to_transform"):
        there = settings.get(key)
        if (sorted(there) if isinstance(there, list) else there) != wanted[key]:
            raise InputError(
                f"role {role!r} starts from {start}, whose {key} is {there}, and the recipe's is {wanted[key]}: train "
                "that role by its recipe first"
            )


def _write_adapter(target: Path, state: dict[str, Any], settings: dict[str, Any], record: dict[str, Any]) -> None:
    """Put an adapter with its settings and its record in place, whole."""
    from safetensors.torch import save_file

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        working = _beside(target, "files")
        shutil.rmtree(working, ignore_errors=True)  # a killed training's
        working.mkdir()
    except OSError as error:
        raise InputError(f"cannot write the adapter to {target}: {error.strerror}") from None
    try:
        named = {f"{ADAPTER_PREFIX}{name}": tensor for name, tensor in state.items()}
        save_file(named, working / ADAPTER_FILE, metadata={"format": "pt"})
        _write_json(working / "adapter_config.json", settings)
        _write_json(
            working / "recipe.json",
            {
                **record,
                "sha256": sha256_file(working / ADAPTER_FILE),
                "torch": _torch_version(),
                "machine": platform.machine(),
            },
        )
        if target.exists():
            target.rmdir()
        working.rename(target)
    except OSError as error:
        raise InputError(f"cannot write the adapter to {target}: {error.strerror}") from None
    finally:
        shutil.rmtree(working, ignore_errors=True)


def _torch_version() -> str:
    import torch

    return torch.__version__.split("+")[0]


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def _reporter(role: str) -> Callable[[int, int, float, float], None]:
    first = 0

    def report(step: int, steps: int, loss: float, seconds: float) -> None:
        nonlocal first
        first = first or step
        if step % 5 == 0 or step == steps:
            left = seconds / (step - first + 1) * (steps - step)
            line = f"rim: training {role}: step {step}/{steps}, loss {loss:.2f}, {seconds:.0f} s, {left:.0f} s left"
            print(
                f"\r{line:<78}" if sys.stderr.isatty() else line,
                end="" if sys.stderr.isatty() else "\n",
                file=sys.stderr,
            )
            if step == steps and sys.stderr.isatty():
                print(file=sys.stderr)

    return report
