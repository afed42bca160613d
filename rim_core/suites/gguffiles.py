"""A GGUF file as a model: what its header says, and the checkpoint that it is converted to, once."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rim_core.errors import InputError, WeightsError
from rim_core.identity import file_hash
from rim_core.paths import cache_dir
from rim_core.suites import sizing, weights


@dataclass(frozen=True)
class Header:
    """What a GGUF file's header says; `shapes` are its tensors', by their names in the file, `[out, in]`."""

    architecture: str
    layers: int
    heads: int
    shapes: dict[str, tuple[int, ...]]
    has_template: bool


def read_header(path: Path) -> Header:
    """Read a GGUF file's header; no weight is read, torch not loaded. Takes seconds with a large vocabulary.

    Raises:
        InputError: no such file, or one part of several.
        WeightsError: damaged, cut short, or no GGUF.
    """
    from gguf import GGUFReader

    if not path.is_file():
        raise InputError(f"no GGUF file at {path}: check the path")
    try:
        reader = GGUFReader(path)
        told = {name: reader.fields[name].contents() for name in reader.fields if _is_wanted(name)}
        end = max((tensor.data_offset + tensor.n_bytes for tensor in reader.tensors), default=0)
        if path.stat().st_size < end:
            raise ValueError
        shapes = {tensor.name: tuple(int(length) for length in reversed(tensor.shape)) for tensor in reader.tensors}
        architecture = str(told.get("general.architecture", ""))
        layers, heads = (
            _number(told.get(f"{architecture}.{key}", 0)) for key in ("block_count", "attention.head_count")
        )
        parts = _number(told.get("split.count", 1))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None
    except Exception:  # the reader fails in whatever way the damage leads to
        raise WeightsError(f"{path} is damaged or cut short, or no GGUF: fetch it again") from None
    if parts > 1:
        raise InputError(f"{path} is one part of {parts}: merge them into one file first")
    if not architecture or not shapes:
        raise InputError(f"{path} holds no model: its header names no architecture, or no weights")
    return Header(architecture, layers, heads, shapes, bool(told.get("tokenizer.chat_template")))


def _number(value: Any) -> int:
    """A count; where layers differ there is a list of them, and the largest counts."""
    return int(max(value)) if isinstance(value, list) else int(value)


def _is_wanted(name: str) -> bool:
    return not name.startswith("tokenizer.ggml.")


def converted_folder(path: Path) -> Path:
    """The folder that holds (or will hold) what a GGUF file is converted to: by content, wherever it lies."""
    return cache_dir() / "gguf" / f"{file_hash(path)[:16]}-v{weights.CONVERSION}"


def is_converted(path: Path) -> bool:
    """Whether a GGUF file's checkpoint is in the cache and complete."""
    return path.is_file() and weights.is_complete(converted_folder(path))


def convert(path: Path, progress: bool = True) -> Path:
    """The folder of a GGUF file's checkpoint in safetensors, converted if it is not in the cache.

    Raises:
        InputError: no such file, or too large for the memory there is.
        WeightsError: damaged, of an architecture that cannot be read, or the disk is full.
    """
    if is_converted(path):
        return converted_folder(path)
    header = read_header(path)
    _require_memory(path, header)
    folder = converted_folder(path)
    source = {"gguf_sha256": file_hash(path)}
    with weights.making(folder) as working:
        if working:
            weights.put_converted(path, folder, working, source, progress)
    return folder


def _require_memory(path: Path, header: Header) -> None:
    needed, there = 4 * sum(map(math.prod, header.shapes.values())) / 1e9, sizing.free_memory()
    if needed > there:
        raise InputError(
            f"{path} is too large to be converted here: in float32 its weights take {needed:.1f} GB, and there are "
            f"{there:.1f} GB of free memory; convert it on a larger machine, or use the model's safetensors"
        )
