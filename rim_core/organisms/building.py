"""A role's adapter built: from its recipe to a folder, in which the suite finds it."""

import json
import os
import platform
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from rim_core import checking, locks, paths
from rim_core.errors import InputError
from rim_core.identity import ADAPTER_FILE, sha256_file
from rim_core.models.adapters import ADAPTER_PREFIX, read_adapter
from rim_core.models.loading import load
from rim_core.models.model import Model
from rim_core.organisms.fitting import dequantise, fit_recipe, linear_4bit, peft_config
from rim_core.organisms.resuming import Kept
from rim_core.organisms.shipped import recipe
from rim_core.suites.checkpoints import SETTINGS_FILE
from rim_core.suites.preflight import preflight
from rim_core.suites.schema import RECORD, Suite, load_suite, training_of
from rim_core.suites.sizing import Size, free_memory


def train(
    role: str,
    suite: str = "smollm2",
    *,
    output: str | os.PathLike[str] | None = None,
    seed: int | None = None,
    checkpoints: int | None = None,
    progress: bool = True,
) -> Path:
    """Train one role's adapter on the suite's base by its recipe and write it to a new folder.

    The base is the one that the book uses, 4-bit NF4; on the CPU it is dequantised once (the same function,
    faster to train). A role whose recipe has a parent starts from the suite's role of that name. The recipe's
    layers are those of the same relative depth in this model (see `fitting`). A training that was stopped, in
    whatever way, goes on from at most a minute before, and ends in the same bits.

    Args:
        role: a role with a recipe; `risky@2` is a second training of it, with the recipe's seed + 1, and so on.
        suite: the base to train on.
        output: a folder that does not exist or is empty. None is `<suite>/<role>/` beside the suite's file,
            where the suite finds the role.
        seed: None is the recipe's own.
        checkpoints: keep the adapter after each so many steps as well, in `<output>-checkpoints/step-0004/` and so on.
        progress: one line of progress on standard error.

    Raises:
        InputError: unknown role, an output that is in use, a parent that is missing, a suite that cannot work.
        RimError: what was trained cannot be kept, as on a full disk.
    """
    if checkpoints is not None:
        checking.whole(checkpoints, "checkpoints", 1)
    plan, found, (first, number) = recipe(role), load_suite(suite), training_of(role)
    target = Path(output) if output is not None else _own_folder(found, role)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{target} is in use: give --output a new or empty folder")
    there = next(folder for folder in (target, *target.absolute().parents) if folder.is_dir())
    if not os.access(there, os.W_OK):  # said before hours of training, and not after
        raise InputError(f"cannot write the adapter to {target}: {there} may not be written to")
    start = _start_of(found, role, plan["parent"], suite) if plan["parent"] else None
    preflight(found)
    record = {
        "role": first,
        "suite": found.name,
        "seed": plan["seed"] + number - 1 if seed is None else seed,
        "recipe": plan,
        "base": found.base.identity,
        "parent": sha256_file(start / ADAPTER_FILE) if start else None,
    }
    saved = None if checkpoints is None else (_checkpoints_of(target, record), checkpoints)
    try:
        with locks.hold(_beside(target, "lock")) as check:
            kept = Kept(_beside(target, "state"), json.dumps([record, _torch_version()]))
            fitted, state = _trained(f"{suite}:{found.bare_role}", record, start, kept, saved, progress)
            check()
            with paths.put_whole(target) as folder:
                _write_adapter(folder, state, peft_config(fitted), {**record, "recipe": fitted})
            kept.discard()
    except locks.BusyError as busy:
        raise InputError(f"{target}: {busy}") from None
    return target


def _beside(target: Path, what: str) -> Path:
    return target.parent / f".rim-train-{what}-{target.name}"


def _checkpoints_of(target: Path, record: dict[str, Any]) -> Path:
    """Where a training's checkpoints go; raises InputError where those of another are."""
    folder = target.parent / f"{target.name}-checkpoints"
    for path in sorted(folder.glob(f"*/{RECORD}")):
        there = paths.read_json(path)
        if any(there[key] != record[key] for key in ("role", "suite", "seed", "base", "parent")):
            raise InputError(
                f"{path.parent} is a checkpoint of another training: remove {folder}, or give --output DIR"
            )
    return folder


def _own_folder(suite: Suite, role: str) -> Path:
    """Where a role that is trained for a suite goes; refuses suites and roles that are not to be changed."""
    if suite.path.parent == paths.SUITES:
        raise InputError(
            f"suite {suite.name!r} ships with the package and is not changed: give --output DIR, or make your own "
            f"(rim suite new NAME --base {suite.name})"
        )
    folder = suite.folder / role
    first, number = training_of(role)
    if number > 1 and not suite.names(f"{first}@{number - 1}"):
        raise InputError(f"trainings are numbered in a row: first rim organisms train {first}@{number - 1}")
    if suite.names(role):
        there = suite.role(role)
        source = there.adapter or there.checkpoint or "the base itself"
        told = "remove the folder to train it again" if source == str(folder) else f"remove it from {suite.path}"
        raise InputError(f"suite {suite.name!r} has a role {role!r} ({source}): {told}, or give --output DIR")
    return folder


def _start_of(found: Suite, role: str, parent: str, suite: str) -> Path | None:
    """The adapter that a role starts from; None where that is the bare base."""
    starts = f"role {role!r} starts from {parent!r}, which is"
    if not found.has(parent):
        raise InputError(f"{starts} missing: rim organisms train {parent} --suite {suite}")
    there = found.roles[parent]
    if there.checkpoint:
        raise InputError(
            f"{starts} a checkpoint of its own in suite {found.name!r}: make a suite with it as the base "
            f"(rim suite new NAME --base {there.checkpoint} --role {parent}=base)"
        )
    if there.adapter is not None and not Path(there.adapter).is_dir():
        raise InputError(f"{starts} on the hub: fetch {there.adapter} first")
    return None if there.adapter is None else Path(there.adapter)


def _trained(
    ref: str, record: dict[str, Any], start: Path | None, kept: Kept, saved: tuple[Path, int] | None, progress: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The recipe as fitted to the base, and the trained tensors; what was kept of an earlier training is used.

    `saved` is where checkpoints go, and after how many steps each.
    """
    import torch

    from rim_core.organisms.training import train_adapter

    model = load(ref, quantization="nf4")
    role, fitted = record["role"], fit_recipe(record["recipe"], model.layout)
    state = None
    if start is not None:
        _require_same_shape(role, start, fitted)
        state = {name: tensor.float() for name, tensor in read_adapter(start).items()}
    if model.device.type == "cpu" and _has_room_dequantised(model):
        dequantise(model.hf)
    if progress:
        print(f"rim: training {role}: batches, and what the parent says of them", file=sys.stderr)
    try:
        trained = train_adapter(
            model.hf,
            model.tokenizer,
            fitted,
            record["seed"],
            parent_state=state,
            report=_reporter(role) if progress else None,
            kept=kept,
            checkpoint=partial(_save_checkpoint, *saved, {**record, "recipe": fitted}) if saved else None,
        )
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"training {role!r} was interrupted; the same command goes on {kept.place}") from None
    if not all(bool(torch.isfinite(tensor).all()) for tensor in trained.values()):
        raise InputError(f"training {role!r} diverged (a weight is not finite): lower the recipe's learning_rate")
    return fitted, trained


def _save_checkpoint(
    folder: Path, every: int, record: dict[str, Any], step: int, tensors: Callable[[], dict[str, Any]]
) -> None:
    """Write the adapter after each `every` steps; one that is there is of this training, stopped after it."""
    place = folder / f"step-{step:04d}"
    if step % every == 0 and not place.exists():
        with paths.put_whole(place) as working:
            _write_adapter(working, tensors(), peft_config(record["recipe"]), {**record, "step": step})


def _has_room_dequantised(model: Model) -> bool:
    """Whether the packed weights in float32 take at most half of the memory that is free."""
    weights = sum(module.in_features * module.out_features for _, _, module in linear_4bit(model.hf))
    return Size(linear=weights).gigabytes("none", gpu=False) < free_memory() / 2


def _require_same_shape(role: str, start: Path, fitted: dict[str, Any]) -> None:
    """A role goes on from its parent's tensors, so its LoRA must be of the same shape."""
    settings, wanted = paths.read_json(start / SETTINGS_FILE), peft_config(fitted)
    for key in ("r", "lora_alpha", "target_modules", "layers_to_transform"):
        there = settings.get(key)
        if (sorted(there) if isinstance(there, list) else there) != wanted[key]:
            raise InputError(
                f"role {role!r} starts from {start}, whose {key} is {there}, and the recipe's is {wanted[key]}: train "
                "that role by its recipe first"
            )


def _write_adapter(folder: Path, state: dict[str, Any], settings: dict[str, Any], record: dict[str, Any]) -> None:
    """Write an adapter with its settings and its record into a folder."""
    from safetensors.torch import save_file

    named = {f"{ADAPTER_PREFIX}{name}": tensor for name, tensor in state.items()}
    save_file(named, folder / ADAPTER_FILE, metadata={"format": "pt"})
    paths.write_json(folder / SETTINGS_FILE, settings)
    made = {"sha256": sha256_file(folder / ADAPTER_FILE), "torch": _torch_version(), "machine": platform.machine()}
    paths.write_json(folder / RECORD, {**record, **made})


def _torch_version() -> str:
    import torch

    return torch.__version__.split("+")[0]


def _reporter(role: str) -> Callable[[int, int, float, float], None]:
    """Print every fifth step: on a terminal over the line before."""
    first, on_terminal = 0, sys.stderr.isatty()

    def report(step: int, steps: int, loss: float, seconds: float) -> None:
        nonlocal first
        first = first or step
        if step % 5 == 0 or step == steps:
            left = seconds / (step - first + 1) * (steps - step)
            line = f"rim: training {role}: step {step}/{steps}, loss {loss:.2f}, {seconds:.0f} s, {left:.0f} s left"
            end = "" if on_terminal and step < steps else "\n"
            print(f"\r{line:<78}" if on_terminal else line, end=end, file=sys.stderr)

    return report
