"""The command `rim organisms`: list, check or train the small models that the experiments run on."""

import argparse
from pathlib import Path

from companion.commands import Command, arg, suite_option
from companion.streams import table
from rim_core import paths
from rim_core.errors import RunError
from rim_core.identity import ADAPTER_FILE
from rim_core.suites.preflight import recipes
from rim_core.suites.schema import load_suite


def _list(options: argparse.Namespace) -> int:
    suite, rows = load_suite(options.suite), []
    for role in suite.roles.values():
        file = Path(role.adapter) / ADAPTER_FILE if role.adapter else None
        size = f"{file.stat().st_size / 1e6:.2f} MB" if file and file.is_file() else ""
        recipe = recipes().get(role.name, {})
        rows.append(
            {
                "role": role.name,
                "adapter": size if suite.has(role.name) else "not there",
                "trained from": recipe.get("parent") or "base",
                "seed": recipe.get("seed", ""),
                "about": role.about,
            }
        )
    table(rows)
    return 0


def _check(options: argparse.Namespace) -> int:
    paths.suite_file(options.suite)
    from rim_core import organisms

    rows = organisms.check(options.suite, role=options.role, progress=True)
    table(
        [
            {
                "role": row["role"],
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


def _train(options: argparse.Namespace) -> int:
    paths.suite_file(options.suite)
    from rim_core import organisms

    print(organisms.train(options.role, options.suite, options.output, seed=options.seed, progress=True))
    return 0


COMMAND = Command(
    "organisms",
    "list, check or train the small models of the experiments",
    "List, check or train the model organisms of a suite.",
    actions=(
        Command("list", "the roles of a suite and what each was trained on", "", _list, (suite_option(),)),
        Command(
            "check",
            "measure each role again and compare with the shipped table",
            "Measure each role again. Exits with 1 if a number differs from the shipped table.",
            _check,
            (suite_option(), arg("--role", metavar="R", help="only this role")),
        ),
        Command(
            "train",
            "train a role's adapter by the project's recipe",
            "Train a role's adapter on a suite's base by the project's recipe. It goes to a folder beside the suite's "
            "file, which gets the role; with --output it goes there, and no file is changed.",
            _train,
            (
                arg("role", metavar="ROLE", help="such as aligned, risky or prudent"),
                arg("--output", type=Path, metavar="DIR", help="a new or empty folder for the adapter"),
                suite_option(),
                arg("--seed", type=int, metavar="N", help="another seed than the recipe's"),
            ),
        ),
    ),
)
