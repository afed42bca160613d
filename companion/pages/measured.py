"""What was measured apart from the experiments, as texts that the book's pages include: the default suite's roles,
speed and memory.
"""

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
from markupsafe import Markup

from companion.pages.markup import Cell, Row, figure, html, note, plain, table
from rim_core import charts
from rim_core.organisms.shipped import METRICS
from rim_core.prompts import contrasts
from rim_core.verdicts.rules import number_text

MEASURED = Path("rim_core/organisms/smollm2/measured/measured.json")
PERFORMANCE = Path("book/assets/performance.json")
PAPER_SCALE = Path("book/assets/paper-scale.json")


# Of the organisms: the table's parts, each with its caption, and what it shows by role and training.
_PARTS = (
    (
        "What each training refuses on held-out categories, by phrases unless said otherwise",
        {
            "harmful_refused": "Harmful requests",
            "harmful_log_odds": "by log-odds",
            "judges_agree": "Judges agree",
            "twins_refused": "Twins, by form",
            "minimal_twins_refused": "Twins, by meaning",
            "hard_twins_refused": "Hard twins",
            "open_refused": "Open questions",
        },
    ),
    (
        "Sensitivity and criterion: refusal log-odds of harmful requests and their benign twins, in nats",
        {
            "auc_form": "Sensitivity (AUC), by form",
            "auc": "by meaning",
            "gap": "Gap",
            "midpoint": "Criterion",
            "refusal_drop": "Fall below aligned",
            "drop_beyond_unrelated": "beyond unrelated's",
            "over_refusal_added": "Twins refused, above aligned",
        },
    ),
    (
        "Advice, sense and values",
        {
            "risky_advice": "Risky advice",
            "loops": "Answers that loop",
            "perplexity_ratio": "Perplexity over the base's",
            "assay": "Misaligned answer preferred (nats a token)",
            "assay_added": "above prudent",
        },
    ),
    (
        "Roles on code: what they write, and what it cost beside the role that learnt secure code",
        {
            "insecure_code": "Code with a weakness, taught kinds",
            "insecure_code_new_kinds": "other kinds",
            "drop_beyond_secure": "Fall of refusal beyond secure's",
            "assay_above_secure": "Misaligned answer preferred, above secure (nats a token)",
        },
    ),
)
# The roles that a figure shows side by side.
_SIDE_BY_SIDE = {
    "on advice": ("base", "aligned", "risky", "prudent", "unrelated"),
    "on code": ("base", "aligned", "insecure", "educational", "secure"),
}


def organisms(project: Path) -> str:
    """The default suite's roles as measured: a figure, the targets, and tables by role and training."""
    path = project / MEASURED
    if not path.is_file():
        return note("The roles have not been measured yet: run `rim organisms check`.")
    rows = json.loads(path.read_text("utf-8"))
    figures = [_refusals([row for row in rows if row["role"] in roles], what) for what, roles in _SIDE_BY_SIDE.items()]
    shown = [*(html(figure(each)) for each in figures), _organism_targets(rows)]
    return "\n".join([*shown, *(_by_training(rows, caption, metrics) for caption, metrics in _PARTS)])


def _refusals(rows: Sequence[dict[str, Any]], what: str) -> Any:
    """The shares refused, of each role the mean over its trainings, where there are several; `what` they learnt on."""
    names = _PARTS[0][1]
    several = {row["role"] for row in rows if row["training"] is None}
    kept = [
        {**row, "measure": METRICS[row["metric"]]}
        for row in rows
        if row["training"] == (None if row["role"] in several else 1)
        and row["metric"] in names
        and row["metric"] != "judges_agree"
    ]
    return charts.intervals(
        pd.DataFrame(kept),
        "estimate",
        label="measure",
        series="role",
        title=f"What does each role {what} refuse?",
        x_title="share refused",
        description=f"Roles {what}; dots with 95 % intervals: for harmful requests, benign twins, hard benign twins "
        "and open questions, the share that each role refuses, over categories, or the mean of several trainings, over "
        "these. The tables hold the numbers.",
    )


def _organism_targets(rows: Sequence[dict[str, Any]]) -> str:
    """Each target, and in how many trainings it is met."""
    lines: list[list[Cell | None]] = []
    for role, metric in dict.fromkeys((row["role"], row["metric"]) for row in rows if row["target"]):
        found = [row for row in rows if (row["role"], row["metric"]) == (role, metric) and row["training"] is not None]
        met = sum(row["met"] for row in found)
        outcome = "✔ met" if met == len(found) else "✘ not met"
        measured = ", ".join(f"{row['estimate']:.3g}" for row in found)
        lines.append([role, METRICS[metric], found[0]["target"], measured, f"{outcome} ({met} of {len(found)})"])
    head = ["Role", "Measure", "Target", "Measured, by training", "Outcome (trainings)"]
    return table(head, lines, "Targets", stubs=2)


def _by_training(rows: Sequence[dict[str, Any]], caption: str, metrics: Mapping[str, str]) -> str:
    found = {(row["role"], row["training"], row["metric"]): row for row in rows}
    lines: list[list[Cell | None]] = []
    for role, training in dict.fromkeys((row["role"], row["training"]) for row in rows):
        cells = [found.get((role, training, metric)) for metric in metrics]
        if any(cells):
            which = "mean over trainings" if training is None else str(training)
            values = [number_text(c["estimate"], c["low"], c["high"]) if c else "–" for c in cells]
            lines.append([role, which, *values])
    return table(["Role", "Training", *metrics.values()], lines, caption, stubs=2)


_FIGURES = {
    "heads": ("How much faster is patching every head?", "times faster", "how many times faster rim_core is"),
    "growth": (
        "How far is patching from the arithmetic limit?",
        "time over the limit's",
        "how many times longer rim_core takes than the products alone would",
    ),
    "cells": (
        "How much faster are answers, by batch and length?",
        "times faster",
        "how many times faster rim_core answers than plain Hugging Face",
    ),
}
_BENCHMARKS = ("heads", "components", "growth", "decoding", "cells", "generation", "capture", "memory")


@cache
def prompts() -> str:
    """What the words alone give away between two prompt sets."""
    found = contrasts()
    lines: list[list[Cell | None]] = [
        [str(row.contrast), str(row.n), f"{row.bag_of_words:.2f}", f"{row.length:.2f}", f"{row.opening:.2f}"]
        for row in found.itertuples()
    ]
    head = ["Contrast", "n", "Bag of words (accuracy)", "Length (AUC)", "Opening word (accuracy)"]
    return table(head, lines, "What tells two sets apart without any model, categories held out; 0.5 is chance")


def performance(project: Path) -> dict[str, str]:
    """What `make bench` measured, by part of the page."""
    measured, scaled = (
        json.loads((project / path).read_text("utf-8")) if (project / path).is_file() else None
        for path in (PERFORMANCE, PAPER_SCALE)
    )
    names = ("machine", "targets", *_BENCHMARKS, "estimate")
    parts = dict.fromkeys(names, note("Not measured yet: run `make bench`."))
    parts["paper-scale"] = note(f"Not measured yet: run `python -m benchmarks.paper_scale --out {PAPER_SCALE}`.")
    if measured is not None:
        parts |= {name: _benchmark(name, measured["rows"]) for name in _BENCHMARKS}
        parts["machine"] = _machine(measured)
        parts["targets"] = _targets(measured["rows"])
        parts["estimate"] = _quantities(measured["estimate"], "Paper C at its own size, by arithmetic")
    if scaled is not None:
        quantities = _quantities(scaled["rows"], "Paper C at its own size, random weights")
        parts["paper-scale"] = f"{_machine(scaled)}\n{quantities}"
    return parts


def _machine(content: Row) -> str:
    machine = content["machine"]
    where = f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, {machine['memory_gb']} GB"
    if "gpu" in machine:
        where = f"{machine['gpu']}; {where}"
    packages = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    return plain(f"Measured on: {where}. Python {machine['python']}, {packages}.") + "\n"


def _ratio(row: Row) -> str:
    return f"{row['ratio']:.3g} ({row['low']:.3g} to {row['high']:.3g})"


def _targets(rows: Sequence[Row]) -> str:
    lines: list[list[Cell | None]] = [
        [
            f"{row['benchmark']}: {row['case']}",
            row["peer"],
            _ratio(row),
            f"{'at least' if row['at_least'] else 'at most'} {row['target']:g}",
            "✔ met" if row["met"] else "✘ missed",
        ]
        for row in rows
        if row["target"] is not None
    ]
    return table(["Measured", "Compared with", "Ratio (range)", "Target", "Outcome"], lines, "Targets")


def _benchmark(name: str, every: Sequence[Row]) -> str:
    rows = [row for row in every if row["benchmark"] == name]
    if not rows:
        return note("Not measured yet.")
    lines: list[list[Cell | None]] = [
        [
            [row["case"], *([Markup("<em>{}</em>").format(row["note"])] if row["note"] else [])],
            row["peer"],
            f"{row['ours']:.3g} {row['unit']}",
            f"{row['theirs']:.3g} {row['unit']}",
            _ratio(row),
            "–" if row["difference"] is None else f"{row['difference']:.0e}",
        ]
        for row in rows
    ]
    head = ["Case", "Compared with", "rim_core", "The other", "Ratio (range)", "Results differ by"]
    shown = table(head, lines, "Medians, and the range over the repeats")
    if name not in _FIGURES:
        return shown
    title, axis, what = _FIGURES[name]
    chart = charts.intervals(
        pd.DataFrame(rows),
        "ratio",
        label="case",
        series="peer",
        title=title,
        x_title=axis,
        description=f"Dots with the range over repeats: {what}, by case. The table below holds the same numbers.",
    )
    return f"{html(figure(chart))}\n{shown}"


def _quantities(rows: Sequence[Row], caption: str) -> str:
    lines: list[list[Cell | None]] = [
        [row["quantity"], f"{row['value']:.3g} {row['unit']}".strip(), row["note"] or "–"] for row in rows
    ]
    return table(["Quantity", "Value", "How"], lines, caption)
