"""Whether a suite can work, before anything heavy is loaded: from small files, headers and hashes.

What is found wrong is raised, one line that names the suite, the role and the remedy.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import yaml

from rim_core import paths
from rim_core.errors import InputError, RimError, WeightsError
from rim_core.identity import ADAPTER_FILE, file_hash
from rim_core.suites import sizing
from rim_core.suites.chattemplate import read_template
from rim_core.suites.checkpoints import Checkpoint, read_adapter_header, read_base, read_checkpoint, read_json
from rim_core.suites.schema import RECORD, Role, Suite
from rim_core.suites.sizing import Size

# What others append to a checkpoint's name when they mirror it.
_MIRRORED = ("-unsloth-bnb-4bit", "-bnb-4bit")


def check_files(suite: Suite, online: bool = True) -> Checkpoint | None:
    """Look at the files of a suite's base and roles; give what the base is, None where it is not here.

    Args:
        suite: as read from its file.
        online: fetch small files from the hub where they are not cached; otherwise look at what is here, and
            pass over what is not.

    Raises:
        InputError, WeightsError: the first thing that is wrong.
    """
    with _told_of(suite):
        base = read_base(suite, online)
        if base is not None:
            _require_template(base, suite.template_of(None))
        for role in suite.every_training:
            if role.adapter and (online or suite.has(role.name)):
                check_adapter(suite, role, online)
            elif role.checkpoint and (found := read_checkpoint(role.checkpoint, online=online)) is not None:
                _require_template(found, role.chat_template)
    return base


@contextmanager
def _told_of(suite: Suite) -> Iterator[None]:
    """An error that does not name the suite's file begins with the suite's name."""
    try:
        yield
    except RimError as error:
        if str(suite.path) in str(error):
            raise
        raise type(error)(f"suite {suite.name}: {error}") from None


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
    if (found := read_adapter_header(role.adapter, online)) is None:
        return
    folder, settings = found
    recorded, record = role.sha256, folder / RECORD
    if recorded is None and record.is_file():
        recorded = read_json(record).get("sha256")
    if recorded is not None and (now := file_hash(folder / ADAPTER_FILE)) != recorded:
        raise WeightsError(
            f"role {role.name!r}: {role.adapter} is not the recorded adapter (sha256 {now[:12]}..., recorded "
            f"{recorded[:12]}...): fetch or train it again, or correct the record"
        )
    # A path as the base's name says nothing: it is of the machine that the adapter was trained on.
    named = settings.get("base_model_name_or_path")
    if not isinstance(named, str) or named.count("/") != 1 or named.startswith((".", "/")):
        return
    if suite.base.hub and _bare_name(named) != _bare_name(suite.base.hub):
        raise InputError(
            f"role {role.name!r}: {role.adapter} was made for {named}, and the base is {suite.base.hub}: "
            "choose the adapter of this base, or that base"
        )


def _bare_name(repository: str) -> str:
    """A repository's name without what mirrors of it add."""
    name = repository.rsplit("/", 1)[-1].lower().removeprefix("meta-")
    for suffix in _MIRRORED:
        name = name.removesuffix(suffix)
    return name


def size_of(suite: Suite, base: Checkpoint | None) -> Size | None:
    """The base's size from its headers, or as the suite's file states it; None where neither tells."""
    return base.size if base is not None and base.shapes else suite.base.size


def preflight(suite: Suite, quantization: str = "nf4") -> None:
    """What must hold before a run: `check_files` on what is here, and memory enough for the base.

    Raises:
        InputError, WeightsError: the first thing that is wrong.
    """
    size = size_of(suite, check_files(suite, online=False))
    if size is not None and quantization in sizing.QUANTIZATIONS:
        require_memory(suite, size, quantization)


def require_memory(suite: Suite, size: Size, quantization: str) -> None:
    """Refuse a suite whose base does not fit in the memory there is; raises InputError."""
    with _told_of(suite):
        sizing.require_memory(suite.base.ref, size, quantization)


@cache
def recipes() -> Mapping[str, Any]:
    """Each role's recipe, by name, from `organisms/recipes.yml`."""
    text = (paths.PACKAGE / "organisms" / "recipes.yml").read_text(encoding="utf-8")
    return dict(yaml.safe_load(text))


def how_to_build(suite: Suite, role: str, ref: str | None = None) -> str:
    """Name the command that gives a suite a role that it lacks.

    Suites that ship with the package are not changed: one of the user's own, with the same base, gets the role.
    `ref` is what the suite was given as, where that is not its name.
    """
    trained, ref = recipes(), ref or suite.name
    if role not in trained:
        return f"no recipe builds it, name one: rim suite new NAME --base {ref} --role {role}=REF"
    if suite.name in paths.shipped_suites():
        return f"rim suite new NAME --base {suite.name}, then rim organisms train --suite NAME {role}"
    parent = trained[role]["parent"]
    first = f" (after {parent})" if parent and not suite.has(parent) else ""
    return f"rim organisms train --suite {ref} {role}{first}"
