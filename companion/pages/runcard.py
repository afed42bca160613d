"""The run card under an experiment's title: what its result came from, or why there is none."""

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from rim_core.paths import suite_name
from rim_core.suites.schema import Suite

_WEIGHTS = (".safetensors", ".gguf")


def card(notebook: str, given: str, suite: Suite, run: dict[str, Any], stale: bool) -> str:
    """Give the run card of a result, as one HTML block so that it shows alike in the book and in Jupyter.

    `given` is what the suite was asked for as: its name, or its file's path.
    """
    parameters = run["parameters"]
    seeds = parameters.get("seeds", run["seed"])
    rows = {
        "Suite": f"<code>{escape(suite.name)}</code>",
        "Base model": escape(suite.title),
        "Roles": escape(", ".join(suite.roles)),
        "Quantization": escape(str(parameters.get("quantization", "–"))),
        "Seeds": escape(", ".join(map(str, seeds)) if isinstance(seeds, list) else str(seeds)),
        "Device": escape(str(run["device"])),
        "Wall time": f"{run['wall_seconds']:.0f} s",
        "Peak memory": _peak(run),
        "Finished": escape(str(run["finished"])[:10]),
        "Run key": f"<code>{escape(run['run_key'][:12])}</code>",
    }
    items = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in rows.items())
    settings = ", ".join(f"{name} = {json.dumps(value)}" for name, value in sorted(parameters.items()))
    versions = ", ".join(f"{name} {version}" for name, version in sorted(run["versions"].items()))
    banner = ""
    if stale:
        banner = (
            '<p class="rim-banner"><strong>Stale.</strong> The notebook, the code, the model or the pinned '
            f"versions changed after this run. Run it again: <code>{_command(notebook, given)}</code></p>"
        )
    return (
        f'<aside class="rim-run-card" id="run-card" aria-label="Run card">{banner}<dl>{items}</dl>'
        f"<details><summary>Parameters, versions and models</summary><p>{escape(settings)}</p>"
        f"<p>Python {escape(run['python'])}, {escape(versions)}</p>{_models(run)}</details></aside>"
    )


def _peak(run: dict[str, Any]) -> str:
    """The most memory that the run held, and on a GPU; a dash in records from before it was measured."""
    held = {"": run.get("peak_memory_bytes"), " on the GPU": run.get("peak_gpu_memory_bytes")}
    return ", ".join(f"{size / 1e9:.1f} GB{where}" for where, size in held.items() if size) or "–"


def _models(run: dict[str, Any]) -> str:
    """What each role was: its source, and the commit on the hub or the beginnings of its weights' hashes."""
    told = []
    for role, model in run.get("models", {}).items():
        hashes = [sha for name, sha in model.get("files", {}).items() if name.endswith(_WEIGHTS)]
        marks = ", ".join(mark[:12] for mark in ([model["commit"]] if "commit" in model else hashes))
        told.append(f"{role}: {model['source']}{f' ({marks})' if marks else ''}")
    return f"<p>{escape('; '.join(told))}</p>" if told else ""


def without_result(notebook: str, suite: str, why: str) -> str:
    """Give the card of an experiment that was not run, or whose run failed, with the command that runs it."""
    with_suite = f"Run it with the suite <code>{escape(suite_name(suite))}</code>"
    remedy = f"{with_suite}: <code>{_command(notebook, suite)}</code>, then build the book again."
    return _banner(f"{escape(why)} {remedy}")


def not_applicable(suite: str, roles: Sequence[str]) -> str:
    """Give the card of an experiment that a suite cannot serve for want of roles."""
    name = f"<code>{escape(suite_name(suite))}</code>"
    return _banner(f"The suite {name} has no role {escape(', '.join(roles))}, which this experiment needs.")


def _banner(what: str) -> str:
    return (
        '<aside class="rim-run-card" id="run-card" aria-label="Run card"><p class="rim-banner">'
        f"<strong>No result.</strong> {what}</p></aside>"
    )


def _command(notebook: str, suite: str) -> str:
    # Of a suite's own file only the name: pages tell nothing of the machine.
    return escape(f"rim run {notebook} --suite {Path(suite).name}")
