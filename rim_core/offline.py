"""Asking the Hugging Face hub, where there may be no network: its client tries six times, for half a minute."""

import contextlib
import sys
from collections.abc import Iterator

_PATIENCE = 5.0  # seconds for the hub's first answer


@contextlib.contextmanager
def hub_asked() -> Iterator[None]:
    """Within the context the hub is asked as usual where it answers at all; else only this machine's cache is.

    Then what is cached is found, and what is not fails at once. The libraries read their switch at each request.
    """
    from huggingface_hub import constants

    if constants.is_offline_mode() or _answers():
        yield
        return
    switches = [(constants, "HF_HUB_OFFLINE")]
    if data_sets := sys.modules.get("datasets"):
        switches.append((data_sets.config, "HF_HUB_OFFLINE"))
    before = [getattr(module, name) for module, name in switches]
    for module, name in switches:
        setattr(module, name, True)
    try:
        yield
    finally:
        for (module, name), value in zip(switches, before, strict=True):
            setattr(module, name, value)


def _answers() -> bool:
    """Whether the hub (or the proxy or mirror that is set) answers one request, whatever it says."""
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=_PATIENCE)
    except Exception:  # of the client's library, which huggingface_hub has changed before
        return False
    return True
