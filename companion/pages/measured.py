"""What was measured apart from the experiments, as texts that the book's pages include: the default suite's roles,
speed and memory.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from markupsafe import Markup

from companion.pages.markup import Cell, Row, figure, html, note, plain, table
from rim_core import charts
from rim_core.verdicts.rules import number_text

MEASURED = Path("rim_core/organisms/smollm2/measured.json")
PERFORMANCE = Path("book/assets/performance.json")
PAPER_SCALE = Path("book/assets/paper-scale.json")


def organisms(project: Path) -> str:
    """The default suite's roles as measured, in a figure and a table."""
    path = project / MEASURED
    if not path.is_file():
        return note("The roles have not been measured yet: run `rim organisms check`.")
    rows = [{**row, "metric": row["metric"].replace("_", " ")} for row in json.loads(path.read_text("utf-8"))]
    met = {True: "✔ met", False: "✘ not met", None: "–"}
    lines: list[list[Cell | None]] = [
        [
            row["role"],
            row["metric"],
            number_text(row["estimate"], row["low"], row["high"]),
            str(row["n"]),
            str(row["target"]) if row["target"] is not None else "–",
            met[row["met"]],
        ]
        for row in rows
    ]
    head = ["Role", "Measure", "Measured (95 % interval)", "n", "Target", "Outcome"]
    frame = pd.DataFrame(rows)
    chart = charts.intervals(
        frame[frame["estimate"].between(0, 1)],
        "estimate",
        label="metric",
        series="role",
        title="What each role does on held-out prompts",
        x_title="share",
        description="Dots with 95 % intervals: for every behaviour measured, the share of held-out prompts "
        "on which each role of the default suite shows it. The table below holds the same numbers.",
    )
    shown = table(head, lines, "The roles of the default suite on held-out prompts", stubs=2)
    return f"{html(figure(chart))}\n{shown}"


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
