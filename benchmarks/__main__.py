"""Speed and memory side by side: `make bench`, or `python -m benchmarks [--quick] [--only NAME] [--out FILE]`.

Each benchmark does the same work by rim_core and by its peers, in turns, in this process; a ratio is of medians.
Compare ratios between machines, not seconds.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import rim_core as rim
from benchmarks import decoding, generation, harness, memory, paper_scale, patching, peers
from benchmarks.harness import Row

REPEATS = 5
REFERENCE = "smollm2:base"
RESULTS = Path("book/assets/performance.json")


def _fp32() -> rim.Model:
    return rim.load(REFERENCE, quantization=None, dtype="float32", device="cpu")


def heads(quick: bool, repeats: int) -> list[Row]:
    model = _fp32()
    sampled = {40: 3} if quick else patching.SAMPLED_HEADS
    return patching.every_head(model, peers.available(model), repeats, sampled)


def components(quick: bool, repeats: int) -> list[Row]:
    model = _fp32()
    n_pairs, layers = (3, [0, 29]) if quick else (100, None)
    # One peer, since a round of each takes minutes.
    return patching.every_component(model, peers.available(model)[:1], repeats, n_pairs, layers)


def generating(quick: bool, repeats: int) -> list[Row]:
    batch, new_tokens = (4, 4) if quick else (16, 48)
    return generation.ablated(_fp32(), repeats, batch, new_tokens)


def answers(quick: bool, repeats: int) -> list[Row]:
    model = rim.load("smollm2:aligned", device="cpu")
    if quick:
        return decoding.headline(model, repeats, 4, 3, 6) + decoding.arms(model, repeats, 3, 2, 3)
    return decoding.headline(model, repeats) + decoding.arms(model, repeats)


def cells(quick: bool, repeats: int) -> list[Row]:
    model = rim.load("smollm2:aligned", device="cpu")
    return decoding.table(model, (1, 2), (45,), (3,)) if quick else decoding.table(model)


def capture(quick: bool, repeats: int) -> list[Row]:
    models = (_fp32, lambda: rim.load(REFERENCE, device="cpu"))
    return [row for load in models for row in generation.capturing(load(), repeats, 8 if quick else 64)]


def growth(quick: bool, repeats: int) -> list[Row]:
    if quick:
        return patching.growth(_fp32(), repeats, (40,), (1, 2), (1, 30))
    return patching.growth(_fp32(), repeats)


def memory_use(quick: bool, repeats: int) -> list[Row]:
    return memory.rows(REFERENCE, min(repeats, 3), quick)


BENCHMARKS: dict[str, Callable[[bool, int], list[Row]]] = {
    "heads": heads,
    "components": components,
    "decoding": answers,
    "cells": cells,
    "generation": generating,
    "capture": capture,
    "growth": growth,
    "memory": memory_use,
}


def line(row: Row) -> str:
    """A row of the printed table."""
    goal = ""
    if row.target is not None:
        goal = f"  {'at least' if row.at_least else 'at most'} {row.target:g}: {'met' if row.met else 'MISSED'}"
    apart = "" if row.difference is None else f"  apart by {row.difference:.0e}"
    return (
        f"{row.benchmark:10} {row.case}\n    {row.ours:.3g} {row.unit}, {row.peer}: {row.theirs:.3g} {row.unit}, "
        f"ratio {row.ratio:.3g} [{row.low:.3g}, {row.high:.3g}]{goal}{apart}"
    )


def write(out: Path, rows: list[Row], only: str | None, repeats: int = REPEATS) -> None:
    """Write the results; with `only`, put them in place of that benchmark's in an earlier run's on this machine."""
    machine, versions = harness.machine(), harness.versions()
    results = [row.as_json() for row in rows]
    if only and out.is_file():
        earlier = json.loads(out.read_text(encoding="utf-8"))
        if (earlier["machine"], earlier["versions"]) != (machine, versions):
            sys.exit(f"benchmarks: {out} was measured on another machine or with other versions: run all of them")
        results = [row for row in earlier["rows"] if row["benchmark"] != only] + results
        results.sort(key=lambda row: list(BENCHMARKS).index(row["benchmark"]))
    content = {"machine": machine, "versions": versions, "repeats": repeats, "rows": results}
    content["estimate"] = paper_scale.estimate()
    out.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes and one repeat: does it work at all?")
    parser.add_argument("--only", choices=BENCHMARKS, help="one benchmark")
    parser.add_argument("--out", type=Path, help=f"results file (default: {RESULTS}; with --quick, none)")
    options = parser.parse_args()
    out = options.out or (None if options.quick else RESULTS)
    repeats = 1 if options.quick else REPEATS
    rows: list[Row] = []
    for name in [options.only] if options.only else BENCHMARKS:
        for row in BENCHMARKS[name](options.quick, repeats):
            rows.append(row)
            print(line(row), flush=True)
    if out:
        write(out, rows, options.only, repeats)


if __name__ == "__main__":
    main()
