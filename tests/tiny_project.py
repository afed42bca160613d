"""A throw-away project for the tests of running: tiny notebooks, a fake suite, a claim, and no model."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from rim_core.verdicts import deciding
from rim_core.verdicts.schema import load_claims

REPOSITORY = Path(__file__).resolve().parents[1]
CLAIMS = """\
paper: paper_a
letter: A
title: A paper
claims:
  - id: A1
    statement: The number is large.
    where: Figure 1
    published: {value: 0.9}
    notebook: one/01_first
    parts:
      - {name: number, version: both, unit: share, bounds: [0, 1], rule: {kind: range, low: 0.5}}
    checks:
      - {name: shuffled, rule: {kind: range, low: 0.4, high: 0.6}, why: a shuffled label teaches nothing}
    applies_to: {roles: [base]}
"""
SUITE = "base: {hub: nobody/nothing}\nroles:\n  base: {}\n"
PARAMETERS = """\
suite: str = "tiny"  # the suite
n: int = 3  # how many
rate: float = 0.5
layers: list[int] = [1, 2]
"""
RECORD = (
    "import rim_core as rim\n"
    "rim.claims('paper_a').record('A1', {'number': [0.9, 0.91, 0.92], 'shuffled': [0.5, 0.5, 0.5]})"
)
COMMAND = "from companion import cli; cli.main()"


def notebook(*cells: str, parameters: str = PARAMETERS) -> dict[str, Any]:
    def code(source: str, tags: list[str]) -> dict[str, Any]:
        return {
            "cell_type": "code",
            "execution_count": None,
            "id": f"c{abs(hash(source)) % 10**6}",
            "metadata": {"tags": tags},
            "outputs": [],
            "source": source,
        }

    title = {"cell_type": "markdown", "id": "title", "metadata": {}, "source": "# A tiny notebook"}
    body = [title, code(parameters, ["parameters"]), *(code(cell, []) for cell in cells)]
    return {"cells": body, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}


def write(root: Path, name: str, *cells: str, parameters: str = PARAMETERS) -> Path:
    path = root / "notebooks" / f"{name}.ipynb"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(notebook(*cells, parameters=parameters)), encoding="utf-8")
    return path


def make(root: Path) -> Path:
    (root / "book" / "claims").mkdir(parents=True)
    (root / "notebooks").mkdir()
    (root / "_config.yml").write_text("title: tiny\n", encoding="utf-8")
    (root / "constraints.txt").write_text("numpy==2.0\n", encoding="utf-8")
    (root / "tiny.yml").write_text(SUITE, encoding="utf-8")
    (root / "book" / "claims" / "paper_a.yml").write_text(CLAIMS, encoding="utf-8")
    return root


def put_run(root: Path, suite: str, **numbers: list[float]) -> None:
    """A record of the first notebook's run, its first claim decided by these values of each seed."""
    folder = root / "results" / suite / "one" / "01_first" / "default"
    folder.mkdir(parents=True, exist_ok=True)
    found = deciding.decide(load_claims("paper_a", root / "book" / "claims")[0], numbers)
    (folder / "run.json").write_text('{"run_key": "k"}', encoding="utf-8")
    (folder / "claims.json").write_text(json.dumps([found.to_dict()]), encoding="utf-8")


def environment(**extra: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "RIM_PROJECT": "", "PYTHONPATH": str(REPOSITORY), **extra}


def rim(root: Path, *arguments: str, **extra: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", COMMAND, *arguments],
        cwd=root,
        env=environment(**extra),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def start(root: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND, *arguments],
        cwd=root,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A CI job started in the background ignores SIGINT, and its children would inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def leftovers(root: Path) -> list[Path]:
    """What a run puts down for a while, and a failed run for good."""
    return list((root / "results").rglob(".*")) + list(root.glob("results/*/*/*/failed"))


def kernels(root: Path) -> list[psutil.Process]:
    found = psutil.process_iter(["cmdline", "cwd"])
    return [p for p in found if "ipykernel_launcher" in (p.info["cmdline"] or []) and p.info["cwd"] == str(root)]


def wait_for(condition: Callable[[], Any], seconds: float = 120) -> Any:
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)
    return found
