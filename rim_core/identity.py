"""What numbers depend on: weights, adapters and their settings, templates, libraries, and this package's own science.

One notion for all who ask: a run's key, the stored activations, and the provenance. Everything is taken by content,
never by name, size or time; what cannot change a number (a model card, a comment in a suite's file, the code of the
command line) is left out. Nothing here loads torch.

The processor is not part of it: results may be made on one machine and read on another. They say which it was.
"""

import contextlib
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from rim_core import paths
from rim_core.errors import InputError

ADAPTER_FILE = "adapter_model.safetensors"
# The libraries by which numbers are computed: another version may give others.
LIBRARIES = (
    *("accelerate", "bitsandbytes", "nnsight", "numpy", "pandas", "peft", "scikit-learn", "scipy"),
    *("tokenizers", "torch", "transformers"),
)
# Files of a checkpoint that decide what it computes and what its tokenizer and template make of a text.
_DECISIVE = re.compile(
    r".*\.safetensors|.*\.jinja|.*\.model|.*\.safetensors\.index\.json|(adapter_|generation_|quantize_)?config\.json"
    r"|.*token.*\.json|chat_template\.json|vocab\.(json|txt)|merges\.txt|.*\.tiktoken"
)
# Settings that say where a model came from, and change nothing.
_ORIGIN = {
    *("_name_or_path", "transformers_version", "base_model_name_or_path", "revision", "inference_mode"),
    *("peft_version", "auto_mapping", "task_type"),
}


def digest(value: Any) -> str:
    """SHA-256 of a JSON-like value, hex; the order of keys does not matter."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def file_hash(path: Path) -> str:
    """SHA-256 of a file's content, hex; a file is read once on this machine for each change of it."""
    blob = path.resolve()
    if path.is_symlink() and blob.parent.name == "blobs" and len(blob.name) == 64:
        return blob.name  # the hub's cache names large files by their SHA-256 already
    stat = path.stat()
    state = [stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
    key = f"{blob} {' '.join(map(str, state))}"
    memory = paths.cache_dir() / "hashes.json"
    known: dict[str, str] = {}
    with contextlib.suppress(InputError, AttributeError):
        known = dict(paths.read_json(memory).items())
    if key in known:
        return known[key]
    found = sha256_file(path)
    with contextlib.suppress(InputError):  # a convenience only
        paths.write_json(memory, {**known, key: found})
    return found


def sha256_file(path: Path) -> str:
    """SHA-256 of a file, hex; read anew each time (see `file_hash`)."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def checkpoint_identity(folder: Path) -> str:
    """What a checkpoint computes, by content: weights, configuration, tokenizer and template; not its model card."""
    return digest({path.name: _content(path) for path in decisive_files(folder)})


def decisive_files(folder: Path) -> list[Path]:
    """The files of a checkpoint or an adapter that decide what it computes."""
    return [
        path
        for path in [*sorted(folder.iterdir()), *sorted(folder.glob("additional_chat_templates/*"))]
        if _DECISIVE.fullmatch(path.name) and path.is_file()
    ]


def adapter_identity(folder: Path) -> str:
    """What an adapter computes, by content: its tensors, and its settings less those that say where it is from."""
    files = (ADAPTER_FILE, "adapter_config.json")
    return digest({name: _content(folder / name) for name in files if (folder / name).is_file()})


def _content(path: Path) -> Any:
    if path.suffix != ".json" or "config" not in path.name:
        return file_hash(path)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        json.dumps([[[[[[data]]]]]])  # what is nested too deeply to be written within others, as digests are made
    except (OSError, ValueError, RecursionError):
        return file_hash(path)
    return {key: data[key] for key in data if key not in _ORIGIN} if isinstance(data, dict) else data


def hub_identity(repository: str, revision: str | None) -> str:
    """A repository of the hub: its commit as this machine's cache holds it, or else its revision's name."""
    folder = cached_snapshot(repository, revision)
    return f"{repository}@{folder.name if folder else revision or 'main'}"


def cached_snapshot(repository: str, revision: str | None = None) -> Path | None:
    """The folder of this machine's hub cache that holds a repository's commit, or None."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    for name in ("config.json", "adapter_config.json"):
        with contextlib.suppress(HFValidationError):
            found = try_to_load_from_cache(repository, name, revision=revision)
            if isinstance(found, str):
                return Path(found).parent
    return None


@cache
def libraries() -> Mapping[str, str]:
    """The installed version of each of `LIBRARIES`."""
    found = {}
    for name in LIBRARIES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def science() -> str:
    """Hash of all of `rim_core` that a notebook measures with, prompt sets included: neither suites nor trainings."""
    package = paths.PACKAGE
    return digest({path.relative_to(package).as_posix(): sha256_file(path) for path in _science(package)})


def _science(package: Path) -> Iterable[Path]:
    for path in sorted([*package.rglob("*.py"), *package.glob("prompts/data/*")]):
        if path.relative_to(package).parts[0] != "organisms" and path.suffix != ".md":
            yield path
