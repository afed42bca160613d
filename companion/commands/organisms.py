"""The command `rim organisms`: list, check, train or trace the small models that the experiments run on."""

import argparse
from pathlib import Path

from companion.streams import table
from rim_core import paths
from rim_core.errors import RunError
from rim_core.identity import ADAPTER_FILE
from rim_core.suites.preflight import recipes
from rim_core.suites.schema import load_suite


def listing(options: argparse.Namespace) -> int:
    """Print the roles of a suite and what each was trained on."""
    suite, rows = load_suite(options.suite), []
    for role in suite.roles.values():
        file = Path(role.adapter) / ADAPTER_FILE if role.adapter else None
        size = f"{file.stat().st_size / 1e6:.2f} MB" if file and file.is_file() else ""
        recipe = recipes().get(role.name, {})
        rows.append(
            {
                "role": role.name,
                "trainings": len(suite.trainings(role.name)) if role.adapter else "",
                "adapter": size if suite.has(role.name) else "not there",
                "trained from": recipe.get("parent") or "base",
                "seed": recipe.get("seed", ""),
                "about": role.about,
            }
        )
    table(rows)
    return 0


def check(options: argparse.Namespace) -> int:
    """Measure each role again; fails where a number differs from the shipped table."""
    paths.suite_file(options.suite)
    from rim_core import organisms

    rows = organisms.check(options.suite, role=options.role, save=options.save, progress=True)
    table(
        [
            {
                "role": row["role"],
                "training": "mean" if row["training"] is None else row["training"],
                "metric": row["metric"],
                "measured": f"{row['estimate']:.3f} [{row['low']:.3f}, {row['high']:.3f}]",
                "n": row["n"],
                "target": row["target"],
                "met": {None: "", True: "yes", False: "NO"}[row["met"]],
                "shipped": "–" if row["shipped"] is None else f"{row['shipped']:.3f}",
            }
            for row in rows
        ]
    )
    # Other processors round otherwise, and a near tie can then turn a greedy answer.
    far = [row for row in rows if row["shipped"] is not None and abs(row["estimate"] - row["shipped"]) > 0.05]
    if far:
        raise RunError(f"differs from the shipped table: {', '.join(row['role'] + ' ' + row['metric'] for row in far)}")
    return 0


def train(options: argparse.Namespace) -> int:
    """Train a role's adapter and print its folder."""
    paths.suite_file(options.suite)
    from rim_core import organisms

    folder = organisms.train(
        options.role,
        options.suite,
        output=options.output,
        seed=options.seed,
        checkpoints=options.checkpoints,
        progress=True,
    )
    print(folder)
    return 0


def trace(options: argparse.Namespace) -> int:
    """Measure a training at its checkpoints, write that to a file, and print its path."""
    paths.suite_file(options.suite)
    from rim_core import organisms

    measured = organisms.trace(options.role, options.checkpoints, options.suite, progress=True)
    organisms.save_trace(measured, options.output, options.suite)
    print(options.output)
    return 0
