"""Whether a suite can work, before anything heavy is loaded: from small files, headers and hashes.

What is found wrong is raised, one line that names the suite, the role and the remedy.
"""

from collections.abc import Sequence

from rim_core.errors import InputError, RimError
from rim_core.suites import sizing
from rim_core.suites.adapterfiles import check_hash, made_for_another, read_adapter_header
from rim_core.suites.chattemplate import read_template
from rim_core.suites.checkpoints import Checkpoint, read_base, read_checkpoint
from rim_core.suites.schema import Role, Suite
from rim_core.suites.sizing import Size


def check_files(suite: Suite, online: bool = True, roles: Sequence[str] | None = None) -> Checkpoint | None:
    """Look at the files of a suite's base and roles; give what the base is, None where it is not here.

    Args:
        suite: as read from its file.
        online: fetch small files from the hub where they are not cached; otherwise look at what is here, and
            pass over what is not.
        roles: only these; by default all.

    Raises:
        InputError, WeightsError: the first thing that is wrong.
    """
    try:
        base = read_base(suite, online)
        if base is not None:
            _require_template(base, suite.template_of(None))
        for role in suite.roles.values():
            if roles is not None and role.name not in roles:
                continue
            if role.adapter and (online or suite.has(role.name)):
                check_adapter(suite, role, online)
            elif role.checkpoint:
                found = read_checkpoint(role.checkpoint, online=online)
                if found is not None:
                    _require_template(found, role.chat_template)
    except RimError as error:
        if str(suite.path) in str(error):
            raise
        raise type(error)(f"suite {suite.name}: {error}") from None
    return base


def _require_template(checkpoint: Checkpoint, given: str | None) -> None:
    if given is not None:
        read_template(given)
    elif not checkpoint.has_template:
        raise InputError(
            f"{checkpoint.ref} has no chat template: use a chat model, or give it one (chat_template: FILE in the "
            "suite, or rim suite new --chat-template FILE)"
        )


def check_adapter(suite: Suite, role: Role, online: bool) -> None:
    """Check a role's adapter against what is recorded of it; whether it fits is seen when it is attached.

    Raises:
        InputError: no adapter, one that names another base, or one that cannot be had exactly.
        WeightsError: damaged, or not the recorded one.
    """
    assert role.adapter is not None
    adapter = read_adapter_header(role.adapter, online)
    if adapter is None:
        return
    check_hash(role, adapter)
    if "hub" in suite.base and (other := made_for_another(adapter, suite.base["hub"])):
        raise InputError(
            f"role {role.name!r}: {role.adapter} was made for {other}, and the base is {suite.base['hub']}: "
            "choose the adapter of this base, or that base"
        )


def size_of(suite: Suite, base: Checkpoint | None) -> Size | None:
    """The base's size from its headers, or as the suite's file states it; None where neither tells."""
    if base is not None and base.shapes:
        return base.size
    return sizing.stated(suite.base["size"]) if suite.base.get("size") else None


def preflight(suite: Suite, quantization: str = "nf4") -> None:
    """What must hold before a run: `check_files` on what is here, and memory enough for the base.

    Raises:
        InputError, WeightsError: the first thing that is wrong.
    """
    base = check_files(suite, online=False)
    size = size_of(suite, base)
    if size is not None and quantization in sizing.QUANTIZATIONS:
        require_memory(suite, size, quantization)


def require_memory(suite: Suite, size: Size, quantization: str) -> None:
    """Refuse a suite whose base does not fit in the memory there is; raises InputError."""
    ref = next((suite.base[source] for source in ("hub", "folder", "gguf") if source in suite.base), "the base")
    try:
        sizing.require_memory(ref, size, quantization)
    except InputError as error:
        raise InputError(f"suite {suite.name}: {error}") from None
