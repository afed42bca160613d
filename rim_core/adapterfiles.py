"""What an adapter is and whether it fits a base, from its settings and its weights' header alone."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rim_core import hub
from rim_core.checkpointfiles import Shapes, hub_error, read_json, read_shapes
from rim_core.errors import InputError, WeightsError
from rim_core.suitefile import ADAPTER_FILE, Role, is_local
from rim_core.weights import sha256_file

# What others append to a checkpoint's name when they mirror it.
_MIRRORED = ("-unsloth-bnb-4bit", "-bnb-4bit")


@dataclass(frozen=True)
class Adapter:
    """What an adapter's small files say: its settings and its tensors' shapes, by module path."""

    ref: str
    settings: Mapping[str, Any]
    shapes: Shapes
    folder: Path


def read_adapter_header(ref: str, online: bool = True) -> Adapter | None:
    """Look at an adapter in a folder or on the hub; None for the hub's, not cached here, with `online` False.

    Raises:
        InputError: nothing there, or no LoRA adapter in safetensors. WeightsError: damaged.
    """
    if is_local(ref):
        folder = Path(ref)
        if not folder.is_dir():
            raise InputError(f"no adapter at {ref}: check the path, or train it (rim organisms train)")
    elif ref.count("/") != 1:
        raise InputError(f"no adapter at {ref}: give a folder that is there, or a hub id owner/name")
    else:
        found = _hub_adapter(ref, online)
        if found is None or not (online or (found / ADAPTER_FILE).is_file()):
            return None
        folder = found
    if not (folder / "adapter_config.json").is_file():
        raise InputError(f"{ref} is no adapter: it has no adapter_config.json")
    settings = read_json(folder / "adapter_config.json")
    if settings.get("peft_type", "LORA") != "LORA":
        raise InputError(f"{ref} is an adapter of type {settings['peft_type']}: only LoRA is supported")
    if not (folder / ADAPTER_FILE).is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        problem = (
            "its weights are pickled (adapter_model.bin), which are not read" if pickled else "no weights"
        )
        raise InputError(f"{ref} has no {ADAPTER_FILE}: {problem}; convert or train it again")
    return Adapter(ref, settings, read_shapes(folder / ADAPTER_FILE), folder)


def _hub_adapter(repository: str, online: bool) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        patterns = ["adapter_config.json", ADAPTER_FILE]
        with hub.asked() if online else contextlib.nullcontext():
            return Path(snapshot_download(repository, allow_patterns=patterns, local_files_only=not online))
    except (OSError, HfHubHTTPError, LocalEntryNotFoundError, ValueError) as error:
        if not online:
            return None
        raise hub_error(repository, error) from None


def misfit(adapter: Adapter, base: Shapes) -> str:
    """Say what of an adapter has no place in a base with tensors of these shapes; nothing where all has.

    Only what is certain counts: checkpoints name some modules otherwise than the model does.
    """
    for name, shape in adapter.shapes.items():
        module, side = _module_of(name)
        if side is None:
            continue
        wanted = list(_shapes_of(module, base))
        if not wanted:
            leaf = module.rsplit(".", 1)[-1]
            if base and not any(key.endswith(f".{leaf}.weight") for key in base):
                return f"the base has no module {leaf}"
            if base and (number := _layer_of(module)) is not None and number >= _layers_in(base):
                return f"the base has no layer {number}"
            continue
        # `A` takes the module's input, `B` gives its output; GPT-2 keeps its weights transposed.
        length = shape[1] if side == "A" else shape[0]
        if len(shape) == 2 and not any(length in (found[-1], found[0]) for found in wanted):
            return f"{module} is {'x'.join(map(str, wanted[0]))} in the base, and the adapter is for {length}"
    return ""


def _module_of(name: str) -> tuple[str, str | None]:
    for side in ("A", "B"):
        marker = f".lora_{side}."
        if marker in name:
            return name.partition(marker)[0].removeprefix("base_model.model."), side
    return name, None


def _shapes_of(module: str, base: Shapes) -> Iterator[tuple[int, ...]]:
    wanted = f"{module}.weight"
    for name, shape in base.items():
        if name == wanted or name.endswith(f".{wanted}") or wanted.endswith(f".{name}"):
            yield shape


def _layer_of(name: str) -> int | None:
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def _layers_in(shapes: Shapes) -> int:
    return 1 + max((number for name in shapes if (number := _layer_of(name)) is not None), default=-1)


def check_hash(role: Role, adapter: Adapter) -> None:
    """Refuse an adapter that is not the recorded one.

    Raises:
        WeightsError: its SHA-256 differs from the suite's, or from the one recorded beside it.
    """
    recorded = role.sha256
    recipe = adapter.folder / "recipe.json"
    if recorded is None and recipe.is_file():
        recorded = read_json(recipe).get("sha256")
    if recorded is None:
        return
    found = sha256_file(adapter.folder / ADAPTER_FILE)
    if found != recorded:
        raise WeightsError(
            f"role {role.name!r}: {adapter.ref} is not the recorded adapter (sha256 {found[:12]}..., recorded "
            f"{recorded[:12]}...): fetch or train it again, or correct the record"
        )


def made_for_another(adapter: Adapter, hub: str) -> str:
    """The base that an adapter names, where it is another than this one of the hub; else nothing.

    Mirrors count as the same. A path says nothing: it is of the machine that the adapter was trained on.
    """
    named = adapter.settings.get("base_model_name_or_path")
    if not isinstance(named, str) or named.count("/") != 1 or named.startswith((".", "/")):
        return ""
    return "" if _bare_name(named) == _bare_name(hub) else named


def _bare_name(repository: str) -> str:
    name = repository.rsplit("/", 1)[-1].lower().removeprefix("meta-")
    for suffix in _MIRRORED:
        name = name.removesuffix(suffix)
    return name
