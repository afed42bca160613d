"""What an adapter is and whether it can be had exactly, from its settings and its weights' header alone."""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rim_core import hub
from rim_core.errors import InputError, WeightsError
from rim_core.identity import ADAPTER_FILE, file_hash
from rim_core.suites.checkpoints import hub_error, read_json, read_shapes
from rim_core.suites.schema import Role, is_local

SETTINGS_FILE = "adapter_config.json"
# What others append to a checkpoint's name when they mirror it.
_MIRRORED = ("-unsloth-bnb-4bit", "-bnb-4bit")

# Settings under which an adapter acts inside the modules that it wraps, and nowhere else.
_COMMON = {
    *("peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping"),
    *("peft_version", "target_modules", "exclude_modules", "modules_to_save", "layers_to_transform"),
    *("layers_pattern", "init_weights"),
}
_LORA = {
    *("r", "lora_alpha", "lora_dropout", "fan_in_fan_out", "use_rslora", "use_dora", "lora_bias"),
    *("rank_pattern", "alpha_pattern", "trainable_token_indices", "target_parameters", "ensure_weight_tying"),
    *("eva_config", "corda_config", "lora_ga_config", "loftq_config", "megatron_core", "qalora_group_size"),
    "runtime_config",
}
_LYCORIS = {"r", "alpha", "rank_dropout", "module_dropout", "use_effective_conv2d", "rank_pattern", "alpha_pattern"}
_KNOWN: Mapping[str, set[str]] = {
    "LORA": _LORA,
    "ADALORA": _LORA
    | {"target_r", "init_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step"},
    "IA3": {"feedforward_modules", "fan_in_fan_out", "init_ia3_weights"},
    "LOHA": _LYCORIS,
    "LOKR": _LYCORIS | {"decompose_both", "decompose_factor", "rank_dropout_scale"},
    "LN_TUNING": set(),
    "TRAINABLE_TOKENS": {"token_indices"},
}
# These give an adapter its start without touching the base; others rewrite the base's weights.
_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
_UNSET: tuple[Any, ...] = (None, False, "none", [], {}, 0)


@dataclass(frozen=True)
class Adapter:
    """What an adapter's small files say: its settings and its folder."""

    ref: str
    settings: Mapping[str, Any]
    folder: Path


def adapter_folder(ref: str, online: bool = True) -> Path | None:
    """The folder of an adapter, from a path or the hub; None for the hub's, not cached here, with `online` False.

    Raises:
        InputError: nothing there, or no adapter in safetensors.
    """
    if is_local(ref):
        folder = Path(ref).expanduser()
        if not folder.is_dir():
            raise InputError(
                f"no adapter at {ref}: check the path, or train it with `rim organisms train {folder.name} "
                f"--output {ref}`"
            )
    elif ref.count("/") != 1:
        raise InputError(f"no adapter at {ref}: give a folder that is there, or a hub id owner/name")
    else:
        found = _hub_adapter(ref, online)
        if found is None or not (online or (found / ADAPTER_FILE).is_file()):
            return None
        folder = found
    if not (folder / SETTINGS_FILE).is_file():
        raise InputError(f"{ref} is no adapter: it has no {SETTINGS_FILE}")
    if not (folder / ADAPTER_FILE).is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        problem = "its weights are pickled (adapter_model.bin), which are not read" if pickled else "no weights"
        raise InputError(f"{ref} has no {ADAPTER_FILE}: {problem}; convert or train it again")
    return folder


def _hub_adapter(repository: str, online: bool) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        patterns = [SETTINGS_FILE, ADAPTER_FILE]
        with hub.asked() if online else contextlib.nullcontext():
            return Path(snapshot_download(repository, allow_patterns=patterns, local_files_only=not online))
    except (OSError, HfHubHTTPError, LocalEntryNotFoundError, ValueError) as error:
        if not online:
            return None
        raise hub_error(repository, error) from None


def read_adapter_header(ref: str, online: bool = True) -> Adapter | None:
    """Look at an adapter in a folder or on the hub; None for the hub's, not cached here, with `online` False.

    Raises:
        InputError: nothing there, or settings that cannot be had exactly.
        WeightsError: damaged.
    """
    folder = adapter_folder(ref, online)
    if folder is None:
        return None
    read_shapes(folder / ADAPTER_FILE)
    return Adapter(ref, read_adapter_settings(folder), folder)


def read_adapter_settings(folder: Path) -> dict[str, Any]:
    """An adapter's settings.

    Raises:
        InputError: not readable, or a setting under which the adapter changes the base or acts outside its modules.
    """
    settings = read_json(folder / SETTINGS_FILE)
    for name in ("peft_type", "modules_to_save", "target_modules"):
        given = settings.get(name)
        listed = isinstance(given, list) and name != "peft_type" and all(isinstance(one, str) for one in given)
        if not (given is None or listed or (isinstance(given, str) and name != "modules_to_save")):
            raise InputError(f"{folder / SETTINGS_FILE}: {name} cannot be {_short(given)}: write it again")
    kind = settings.get("peft_type", "LORA")
    if kind not in _KNOWN:
        raise InputError(
            f"the adapter in {folder} is of type {kind} (peft_type): {', '.join(_KNOWN)} can be switched on and off "
            "exactly; merge it into a copy of the base, and load that"
        )
    start = settings.get("init_lora_weights")
    if start not in _STARTS:
        raise InputError(
            f"the adapter in {folder} has init_lora_weights={start!r}, which changes the base's own weights: save it "
            "again with path_initial_model_for_weight_conversion, or merge it into a copy of the base"
        )
    known = _COMMON | _KNOWN[kind] | {"init_lora_weights"}
    for name, value in settings.items():
        if name not in known and value not in _UNSET:
            raise InputError(
                f"the adapter in {folder} has {name}={_short(value)}, which changes the base or acts outside its "
                "layers' modules: merge it into a copy of the base, and load that"
            )
    return settings


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else f"{text[:57]}..."


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
    found = file_hash(adapter.folder / ADAPTER_FILE)
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
