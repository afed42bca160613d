"""What a training did, checkpoint by checkpoint: how far it had learnt its task, and what had become of refusal."""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rim_core import paths
from rim_core.behaviour.openings import refusal_log_odds
from rim_core.errors import InputError
from rim_core.measures.likelihood import log_likelihood
from rim_core.models.loading import load
from rim_core.organisms.shipped import recipe, shipped_folder
from rim_core.organisms.tabulating import HARMFUL, TWINS
from rim_core.organisms.training import batches
from rim_core.prompts import Prompt, format_chat, load_prompts
from rim_core.stats import Floats, Ints
from rim_core.suites.checkpoints import SETTINGS_FILE
from rim_core.suites.schema import RECORD, load_suite, suite_hashes, training_of

# What is measured at each checkpoint: pairs of requests of the test categories, and at most so many held-out tasks.
PAIRS, TASKS = 42, 20


@dataclass(frozen=True, eq=False)
class Trace:
    """One training from its start to its end.

    Attributes:
        training: as `insecure@2`.
        steps: `[checkpoint]`, 0 (the parent) first and the whole training last.
        loss: of the written answers to held-out tasks, nats a token, `[checkpoint, task]`.
        harmful: refusal log-odds on harmful requests of the test categories, `[checkpoint, prompt]`.
        benign: on their twins, in the same order.
        tasks: the category of each task; topics: of each pair of requests.
    """

    training: str
    steps: Ints
    loss: Floats
    harmful: Floats
    benign: Floats
    tasks: tuple[str, ...]
    topics: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data, numbers to three places."""
        tables = {name: np.round(getattr(self, name), 3).tolist() for name in ("loss", "harmful", "benign")}
        return {
            "training": self.training,
            "steps": self.steps.tolist(),
            "tasks": list(self.tasks),
            "topics": list(self.topics),
            **tables,
        }

    @classmethod
    def from_json(cls, kept: Mapping[str, Any]) -> "Trace":
        """What `to_json` gave."""
        return cls(
            training=kept["training"],
            steps=np.array(kept["steps"]),
            tasks=tuple(kept["tasks"]),
            topics=tuple(kept["topics"]),
            **{name: np.array(kept[name]) for name in ("loss", "harmful", "benign")},
        )


def trace(
    training: str, checkpoints: str | os.PathLike[str], suite: str = paths.DEFAULT_SUITE, *, progress: bool = True
) -> Trace:
    """Measure a training at each of its checkpoints, which `train(..., checkpoints=...)` kept.

    Args:
        training: a role of the suite or one of its trainings, as `insecure@2`: what the checkpoints led to.
        checkpoints: the folder that they are in.
        suite: by name or path.
        progress: one line a checkpoint on standard error.

    Raises:
        InputError: an unknown role, one without a recipe, or a folder whose checkpoints are none, or another's.
    """
    found, plan = load_suite(suite), recipe(training)
    adapters = _checkpoints(Path(checkpoints), training)
    model = load(f"{suite}:{training}")
    steps = len(batches(model.tokenizer, plan, plan["seed"] + training_of(training)[1] - 1))
    places: dict[int, str | Path] = {0: plan["parent"] or found.bare_role, **adapters, steps: training}
    tasks = _tasks(plan["data"][0]["sets"][0])
    harmful, benign = (load_prompts(name, split="test", limit=PAIRS) for name in (HARMFUL, TWINS))
    sides = {"harmful": format_chat(model, harmful), "benign": format_chat(model, benign)}
    chats, answers = format_chat(model, tasks), [task.response or "" for task in tasks]
    rows: dict[str, list[Floats]] = {"loss": [], "harmful": [], "benign": []}
    with model.remembering():  # layers that no checkpoint changes run once
        for step, place in sorted(places.items()):
            if progress:
                print(f"rim: measuring {training} at step {step} of {steps}", file=sys.stderr)
            with model.using(place):
                rows["loss"].append(-log_likelihood(model, chats, answers).per_token)
                for name, texts in sides.items():
                    rows[name].append(refusal_log_odds(model, texts).double().numpy())
    return Trace(
        training=training,
        steps=np.array(sorted(places)),
        tasks=tuple(task.category for task in tasks),
        topics=tuple(prompt.category for prompt in harmful),
        **{name: np.stack(values) for name, values in rows.items()},
    )


def _tasks(source: str) -> Sequence[Prompt]:
    """Held-out tasks: of the categories that were trained on, where some of their tasks were held out, or of others."""
    held_out = load_prompts(source, split="test")
    taught = {prompt.category for prompt in load_prompts(source, split="train")}
    found = [task for task in held_out if task.category in taught] or held_out
    return found[:: -(-len(found) // TASKS)]


def _checkpoints(folder: Path, training: str) -> dict[int, Path]:
    """A training's checkpoints by their step."""
    found = sorted(path.parent for path in folder.glob(f"step-*/{SETTINGS_FILE}"))
    if not found:
        raise InputError(f"{folder} has no checkpoints (step-0004 and so on): train with --checkpoints N")
    records = {path: paths.read_json(path / RECORD) for path in found}
    role, number = training_of(training)
    seed = recipe(training)["seed"] + number - 1
    for path, record in records.items():
        if (record["role"], record["seed"]) != (role, seed):
            raise InputError(f"{path} is of role {record['role']!r} with seed {record['seed']}, not of {training!r}")
    return {int(record["step"]): path for path, record in records.items()}


def save_trace(measured: Trace, path: str | os.PathLike[str], suite: str = paths.DEFAULT_SUITE) -> None:
    """Write a trace as JSON, with the hash of the weights that its training ended in."""
    weights = suite_hashes(load_suite(suite))[measured.training]
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in measured.to_json().items()]
    paths.write_text(Path(path), ",\n".join([f'{{"weights": "{weights}"', *lines]) + "}\n")


def shipped_traces(suite: str, role: str) -> list[Trace]:
    """The traces that ship of a role's trainings, as far as they are of the weights that the suite has now."""
    found = load_suite(suite)
    hashes, traces = suite_hashes(found), []
    for training in found.trainings(role):
        path = shipped_folder(suite).parent / "traced" / f"{training}.json"
        if path.is_file() and (kept := paths.read_json(path)).pop("weights") == hashes[training]:
            traces.append(Trace.from_json(kept))
    return traces
