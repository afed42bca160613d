"""The commands `rim claims`, `rim diff` and `rim export`."""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from companion import differences, outcomes
from companion.streams import print_json, table
from rim_core import paths
from rim_core.verdicts.rules import SYMBOLS, number_text, outcome_text, reproduced_text


def claims(options: argparse.Namespace) -> int:
    """Print each claim's outcome for each suite with results."""
    if options.suite:
        paths.suite_file(options.suite)
    rows = outcomes.scorecard(paths.root(), [options.suite] if options.suite else None)
    if options.json:
        print_json(rows)
        return 0
    marks = (", stale", ", perhaps stale") if options.why else (" *", " *?")  # without reasons, a line a claim
    stale = {True: marks[0], False: "", None: marks[1]}
    shown = [
        {
            "claim": f"{row['paper']} {row['claim']}",
            "suite": row["suite"],
            "outcome": f"{outcome_text(row['outcome'])}{stale[row['stale']]}",
            "as published": reproduced_text(row["reproduced"]),
            "measured": number_text(row["value"], row["low"], row["high"]) if row["value"] is not None else "",
        }
        for row in rows
    ]
    if options.why:
        for line, row in zip(shown, rows, strict=True):
            print("  ".join(filter(None, line.values())))
            print(f"    {row['statement']}")
            print(f"    {row['reason']}; published: {row['published'] or 'no number'}")
            if told := outcomes.stale_text(row):
                print(f"    {told}")
    else:
        table(shown, heading=False)
    print(_count(rows))
    return 0


def _count(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return "no claims in book/claims"
    states, stale = [row["outcome"] for row in rows], [row["stale"] for row in rows]
    told = [", ".join(f"{states.count(s)} {s.replace('_', ' ')}" for s in SYMBOLS if s in states)]
    told += [f"{stale.count(True)} of them stale (*)"] if True in stale else []
    told += [f"of {stale.count(None)} not known whether stale (*?)"] if None in stale else []
    return f"in all: {'; '.join(told)}"


def diff(options: argparse.Namespace) -> int:
    """Print the claims that differ between two runs; gives 1 where an outcome changed."""
    found, compared = differences.compare(options.A, options.B)
    titles = (options.A, options.B) if options.A != options.B else ("A", "B")
    table([{"claim": each.claim, **dict(zip(titles, each.told, strict=True))} for each in found])
    print(differences.summary(found, compared))
    return int(any(each.changed for each in found))


def export(options: argparse.Namespace) -> int:
    """Pack results as a crate and print its path."""
    from companion import crate  # which loads papermill

    print(crate.export(paths.root(), options.ro_crate, options.suites))
    return 0
