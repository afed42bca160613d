"""The commands `rim run` and `rim book`."""

import argparse
import os
import sys
from collections.abc import Sequence

from companion import notebooks, runner, staleness
from companion.streams import print_json, table
from rim_core import paths
from rim_core.errors import InputError, RunError
from rim_core.suites import checkpoints
from rim_core.suites.schema import load_suite


def run(options: argparse.Namespace) -> int:
    """Run notebooks, or say what there is to run."""
    overrides = _read_parameters(options.parameters)
    if options.remote:
        os.environ["RIM_REMOTE"] = "1"  # for the notebooks' kernels, which inherit it
    if options.fetch:
        _fetch(options.suite, everything=True)
        return 0
    # Before weights are fetched or torch is loaded: a slip of the pen is told at once.
    jobs = staleness.plan(options.notebooks, options.suite, overrides)
    if options.list:
        return _list(jobs)
    if options.plan:
        print_json([job.row() for job in jobs])
        return 0
    if options.remote:
        from rim_core.models import remote

        remote.require_suite(options.suite)
    elif options.force or any(job.status == "to run" for job in jobs):
        _fetch(options.suite)
    _summarise(runner.run(jobs, force=options.force))
    return 0


def _fetch(suite: str, everything: bool = False) -> None:
    """Fetch the suite's weights here, with a progress bar, and not unseen inside the first notebook."""
    (checkpoints.fetch if everything else checkpoints.fetch_base)(load_suite(suite))


def _read_parameters(given: Sequence[str]) -> dict[str, str]:
    overrides: dict[str, str] = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise InputError(f"-p {text}: write it as key=value")
        if key in overrides:
            raise InputError(f"-p {key}: given twice")
        overrides[key] = value
    return overrides


def _list(jobs: Sequence[staleness.Job]) -> int:
    suite = jobs[0].suite.name
    table([{"notebook": job.notebook, suite: job.state, "title": notebooks.title(job.source)} for job in jobs])
    if len(jobs) == 1:
        known = notebooks.parameters(jobs[0].notebook, jobs[0].source).values()
        print()
        table([{"parameter": p.name, "type": p.type, "default": repr(p.default), "what it is": p.help} for p in known])
    return 0


def _summarise(results: Sequence[runner.Result]) -> None:
    """Say on stderr what became of the notebooks; raises RunError where one failed."""
    failed = [result for result in results if result.status == "failed"]
    if len(results) > 1:
        states = sorted(result.status for result in results)
        counted = ", ".join(f"{states.count(s)} {s}" for s in dict.fromkeys(states))
        print(f"{len(results)} notebooks: {counted}", file=sys.stderr)
        for result in failed:
            print(f"  failed: {result.notebook}: {result.reason}", file=sys.stderr)
    if failed:
        names = ", ".join(result.notebook for result in failed)
        raise RunError(f"{len(failed)} of {len(results)} notebooks failed: {names}")


def book(options: argparse.Namespace) -> int:
    """Run what is not up to date, build the book, and print the path of its first page."""
    from companion.pages import build, staging

    suites = staging.distinct(options.suites or [paths.DEFAULT_SUITE])
    root = paths.root()
    failures: list[str] = []
    for suite in [] if options.no_run else suites:
        jobs = staleness.plan([], suite)
        if any(job.status == "to run" for job in jobs):
            _fetch(suite)
        try:
            _summarise(runner.run(jobs))
        except RunError as error:
            # The book is built all the same: the page says that its run failed.
            failures.append(f"{suite}: {error}")
    staging.stage(root, suites)
    print(build.build(root), flush=True)
    if failures:
        raise RunError("; ".join(failures))
    return 0
