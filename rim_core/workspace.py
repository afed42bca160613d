"""Where things are: the project's folder, its results, the cache, and the suites' files."""

import difflib
import os
from collections.abc import Iterable
from pathlib import Path

from rim_core.errors import InputError

DEFAULT_SUITE = "smollm2"
PACKAGE = Path(__file__).resolve().parent
SUITES = PACKAGE / "suites"


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
    """Name the suites that ship with the package."""
    return sorted(path.stem for path in SUITES.glob("*.yml"))


def suite_file(suite: str) -> Path:
    """Find a suite's YAML file by name or by path; raises `InputError` naming the suites there are."""
    if suite.endswith((".yml", ".yaml")):
        path = Path(suite).expanduser().resolve()
        if not path.is_file():
            raise InputError(f"suite {suite}: there is no such file")
        if path.stem in suite_names() and path.parent != SUITES:
            raise InputError(f"suite {suite}: {path.stem} is the name of a suite that ships; rename the file")
        return path
    if suite not in suite_names():
        known = ", ".join(suite_names())
        raise InputError(f"unknown suite {suite!r}{did_you_mean(suite, suite_names())}; suites: {known}")
    return SUITES / f"{suite}.yml"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Give `" (did you mean 'x'?)"` for the closest of `known`, or nothing where none is close."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""
