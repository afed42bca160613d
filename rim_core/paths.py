"""Where things are: the project's folder, its results, the cache, and the suites' files."""

import contextlib
import difflib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rim_core.errors import InputError, first_line

DEFAULT_SUITE = "smollm2"
PACKAGE = Path(__file__).resolve().parent
SUITES = PACKAGE / "suites"
# A suite's name is a file's and a folder's name too, and begins longer names beside them.
SUITE_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,99}")
LONGEST_NAME = 100


def root() -> Path:
    """Give the project's folder: the nearest one upwards with `_config.yml` and `notebooks/`.

    Outside any such folder the environment variable RIM_PROJECT decides, then the checkout that an editable
    install of `rim_core` lies in. Raises `InputError` where none of them is a project.
    """
    here = Path.cwd()
    for folder in (here, *here.parents):
        if _is_project(folder):
            return folder
    if named := os.environ.get("RIM_PROJECT"):
        folder = Path(named).expanduser().resolve()
        if not _is_project(folder):
            raise InputError(f"RIM_PROJECT: {named} has no _config.yml and notebooks/")
        return folder
    if _is_project(PACKAGE.parent):
        return PACKAGE.parent
    raise InputError(f"no project in {here} or above it; change into its folder, or set RIM_PROJECT")


def _is_project(folder: Path) -> bool:
    return (folder / "_config.yml").is_file() and (folder / "notebooks").is_dir()


def results_dir(project: Path) -> Path:
    """Give the folder of executed notebooks; it need not exist yet."""
    return project / "results"


def cache_dir() -> Path:
    """Give the folder of converted weights and stored activations: RIM_CACHE, or `~/.cache/rim`."""
    named = os.environ.get("RIM_CACHE")
    return Path(named).expanduser().resolve() if named else Path.home() / ".cache" / "rim"


def suite_name(suite: str) -> str:
    """Give a suite's name from its name or its file's path; dots in a name are part of it (`qwen2.5-7b`)."""
    return Path(suite).name.removesuffix(".yml").removesuffix(".yaml")


def suite_names() -> list[str]:
    """Name the suites that ship with the package, then the project's own."""
    return [*shipped_suites(), *project_suites()]


def shipped_suites() -> list[str]:
    """Name the suites that ship with the package."""
    return sorted(path.stem for path in SUITES.glob("*.yml"))


def project_suites() -> list[str]:
    """Name the suites in the project's `suites/`; none outside a project."""
    try:
        folder = suites_dir(root())
    except InputError:
        return []
    found = sorted(path.stem for path in folder.glob("*.yml") if SUITE_NAME.fullmatch(path.stem))
    return [name for name in found if name not in shipped_suites()]


def suites_dir(project: Path) -> Path:
    """Give the folder of the project's own suites; it need not exist yet."""
    return project / "suites"


def suite_file(suite: str) -> Path:
    """Find a suite's YAML file by name or by path; raises `InputError` naming the suites there are."""
    if suite.endswith((".yml", ".yaml")):
        path: Path | None
        try:
            path = Path(suite).expanduser().resolve()
        except (OSError, ValueError, RuntimeError):  # a null byte, a loop of links, the home of nobody
            path = None
        if path is None or not os.path.isfile(path):  # which also takes names too long for a file
            raise InputError(f"suite {shortened(suite)}: there is no such file")
        if len(path.stem) > LONGEST_NAME:
            raise InputError(
                f"suite {shortened(suite)}: its name has {len(path.stem)} letters, at most {LONGEST_NAME} fit into the "
                "names of its results; rename the file"
            )
        if path.stem in suite_names() and path != suite_file(path.stem).resolve():
            raise InputError(f"suite {suite}: {path.stem} is the name of another suite; rename the file")
        return path
    if suite in shipped_suites():
        return SUITES / f"{suite}.yml"
    if suite in project_suites():
        return suites_dir(root()) / f"{suite}.yml"
    known = suite_names()
    raise InputError(f"unknown suite {shortened(suite)!r}{did_you_mean(suite, known)}; suites: {', '.join(known)}")


def shortened(text: str) -> str:
    """Give a name as a message shows it: cut where it is long."""
    return text if len(text) <= 100 else f"{text[:97]}..."


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Give `" (did you mean 'x'?)"` for the closest of `known`, or nothing where none is close."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def remote_asked() -> bool:
    """Whether models run at NDIF where a call of `load` does not say: under `rim run --remote`."""
    return os.environ.get("RIM_REMOTE") == "1"


def write_text(path: Path, text: str) -> None:
    """Put a text file in place whole: a temporary sibling, renamed.

    Raises:
        InputError: the folder cannot be written to.
    """
    beside = _beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from None
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Put a value in place as a JSON file, whole; raises `InputError` where it cannot be written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_json(Path(folder) / "sizes.json", {"layers": 30})
        ...     read_json(Path(folder) / "sizes.json")
        {'layers': 30}
    """
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file; raises `InputError` where there is none, or where it is not readable as such."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise InputError(f"{path} is not readable JSON: fetch or write it again") from None


@contextlib.contextmanager
def put_whole(folder: Path) -> Iterator[Path]:
    """Within the context a temporary sibling is written to, which is `folder` afterwards; nothing where it fails.

    Raises:
        InputError: it cannot be written, or `folder` is there and not empty.
    """
    from safetensors import SafetensorError

    working = _beside(folder)
    try:
        working.mkdir(parents=True)
        yield working
        os.replace(working, folder)
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot write {folder}: {getattr(error, 'strerror', None) or first_line(error)}") from None
    finally:
        shutil.rmtree(working, ignore_errors=True)


def _beside(path: Path) -> Path:
    """A sibling's name that no other process and no other call uses."""
    return path.with_name(f".{path.name[:40]}.{os.getpid()}-{os.urandom(4).hex()}.tmp")
