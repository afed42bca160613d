"""The `rim` command: run notebooks, build the book, list claims, look after suites and organisms.

Argparse and not typer: `rim --help` takes a third of the time, a mistake is one line, and the commands that the book
shows can be parsed without being run, as its tests do.
"""

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from companion import streams
from companion.commands import Command, arg, organisms, suite_option
from companion.commands import suite as suites
from companion.streams import print_json, table
from rim_core import __version__, paths
from rim_core.errors import InputError, RimError, RunError

_EXAMPLES = """examples:
  rim run                                run what is not up to date
  rim run self_aware/01_linear_probes -p n_prompts=50 -p 'seeds=[5, 6, 7]'
  rim run --suite my-model               on your own model: rim suite --help
  rim book                               run, then build the book
"""
# The book's page "Run it on your model" tells more of the first five.
_RUN_EXAMPLES = """on your own model, from a folder or the hub:
  rim suite new my-model --base ./my-checkpoint --role aligned=base
  rim organisms train --suite my-model risky
  rim run --suite my-model
  rim claims --suite my-model
  rim book --suite smollm2 --suite my-model

examples:
  rim run self_aware/01_linear_probes -p n_prompts=50
  rim run self_aware -p 'seeds=[5, 6, 7]'       lists are written as JSON
  rim run self_aware/01_linear_probes --list    its parameters
"""
_BOOK_EXAMPLES = """examples:
  rim book                                      the default suite
  rim book --suite smollm2 --suite my-model     two side by side, and a page that compares them
  rim book --no-run --suite my-model            from the results there are
"""
_DIFF_EXAMPLES = """examples:
  rim diff smollm2 my-model                  two suites of this project
  rim diff ../before/results results         two results folders, suite by suite
  rim diff published-crate smollm2           what was published and what is here
"""


class _Terminated(KeyboardInterrupt):
    """The process was asked to end (SIGTERM); it ends as cleanly as on Ctrl-C."""


class _Parser(argparse.ArgumentParser):
    """A parser whose refusals are one line, as all others are."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; {self.prog} --help")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its status: 0, 1 what ran failed, 2 bad input, 130 interrupted."""
    sys.exit(_main(arguments))


def _main(arguments: Sequence[str] | None) -> int:
    try:
        with streams.guarded(), _ends_cleanly_on_sigterm():
            return _command(arguments)
    except streams.ClosedError:
        return 141  # as of a program that a closed pipe ended (128 + SIGPIPE)


def _command(arguments: Sequence[str] | None) -> int:
    try:
        options = _parser().parse_args(arguments)
        status: int = options.command(options) or 0
        sys.stdout.flush()
        return status
    except SystemExit as ended:  # --help, --version
        sys.stdout.flush()
        return int(ended.code or 0)
    except RimError as error:
        return _fail(f"rim: {error}", error.exit_code)
    except KeyboardInterrupt as interrupt:
        terminated = isinstance(interrupt.__context__, _Terminated) or isinstance(interrupt, _Terminated)
        return _fail(f"rim: {str(interrupt) or 'interrupted'}", 143 if terminated else 130)


def _fail(message: str, status: int) -> int:
    print(message, file=sys.stderr, flush=True)
    return status


@contextlib.contextmanager
def _ends_cleanly_on_sigterm() -> Iterator[None]:
    def end(*_: Any) -> None:
        raise _Terminated

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="rim",
        description="Re-run experiments on why safety training fails; check the papers' claims.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"rim {__version__}")
    actions = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in (*_COMMANDS, suites.COMMAND, organisms.COMMAND, _DOCTOR):
        command.add_to(actions)
    return parser


# --- run ------------------------------------------------------------------------------------------------


def _run(options: argparse.Namespace) -> int:
    from companion import runner

    overrides = _read_parameters(options.parameters)
    if options.remote:
        os.environ["RIM_REMOTE"] = "1"  # for the notebooks' kernels, which inherit it
    if options.fetch:
        _fetch(options.suite, everything=True)
        return 0
    # Before weights are fetched or torch is loaded: a slip of the pen is told at once.
    jobs = runner.plan(options.notebooks, options.suite, overrides)
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
    from rim_core.suites import checkpoints
    from rim_core.suites.schema import load_suite

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


def _list(jobs: Sequence[Any]) -> int:
    from companion import notebooks

    suite = jobs[0].suite.name
    table([{"notebook": job.notebook, suite: job.state, "title": notebooks.title(job.source)} for job in jobs])
    if len(jobs) == 1:
        known = notebooks.parameters(jobs[0].notebook, jobs[0].source).values()
        print()
        table([{"parameter": p.name, "type": p.type, "default": repr(p.default), "what it is": p.help} for p in known])
    return 0


def _summarise(results: Sequence[Any]) -> None:
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


# --- book, claims, diff, export -------------------------------------------------------------------------


def _book(options: argparse.Namespace) -> int:
    from companion import runner
    from companion.pages import build, staging

    suites = staging.distinct(options.suites or [paths.DEFAULT_SUITE])
    root = paths.root()
    failures: list[str] = []
    for suite in [] if options.no_run else suites:
        jobs = runner.plan([], suite)
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


def _claims(options: argparse.Namespace) -> int:
    from companion import scorecard
    from rim_core.verdicts.rules import SYMBOLS, number_text

    if options.suite:
        paths.suite_file(options.suite)
    rows = scorecard.scorecard(paths.root(), [options.suite] if options.suite else None)
    if options.json:
        print_json(rows)
        return 0
    stale = {True: ", stale", False: "", None: ", perhaps stale"}
    shown = [
        {
            "claim": f"{row['paper']} {row['claim']}",
            "suite": row["suite"],
            "outcome": f"{SYMBOLS[row['outcome']]} {row['outcome'].replace('_', ' ')}{stale[row['stale']]}",
            "measured": number_text(row["value"], row["low"], row["high"]) if row["value"] is not None else "",
        }
        for row in rows
    ]
    if options.why:
        for line, row in zip(shown, rows, strict=True):
            print("  ".join(filter(None, line.values())))
            print(f"    {row['statement']}")
            print(f"    {row['reason']}; published: {row['published'] or 'no number'}")
            if told := scorecard.stale_text(row):
                print(f"    {told}")
    else:
        table(shown, heading=False)
    print(_count(rows))
    return 0


def _count(rows: Sequence[Mapping[str, Any]]) -> str:
    from rim_core.verdicts.rules import SYMBOLS

    if not rows:
        return "no claims in book/claims"
    states, stale = [row["outcome"] for row in rows], [row["stale"] for row in rows]
    told = [", ".join(f"{states.count(s)} {s.replace('_', ' ')}" for s in SYMBOLS if s in states)]
    told += [f"{stale.count(True)} of them stale"] if True in stale else []
    told += [f"of {stale.count(None)} not known whether stale"] if None in stale else []
    return f"in all: {'; '.join(told)}"


def _diff(options: argparse.Namespace) -> int:
    from companion import differences

    found, compared = differences.compare(options.A, options.B)
    titles = (options.A, options.B) if options.A != options.B else ("A", "B")
    table([{"claim": each.claim, **dict(zip(titles, each.told, strict=True))} for each in found])
    print(differences.summary(found, compared))
    return int(any(each.changed for each in found))


def _export(options: argparse.Namespace) -> int:
    from companion import crate

    print(crate.export(paths.root(), options.ro_crate, options.suites))
    return 0


def _doctor(_: argparse.Namespace) -> int:
    from companion import doctor

    return doctor.report()


_COMMANDS = (
    Command(
        "run",
        "execute notebooks that are not up to date",
        "Execute notebooks that are not up to date. Results go to results/; one that fails does not stop the others. "
        "Interrupted, the same command goes on with what is left.",
        _run,
        (
            arg("notebooks", nargs="*", metavar="NOTEBOOK", help="section, section/name or path (default: all)"),
            suite_option(),
            arg(
                "-p",
                dest="parameters",
                action="append",
                default=[],
                metavar="key=value",
                help="set a parameter of every notebook named; a file is meant from where you stand",
            ),
            arg("--force", action="store_true", help="run even what is up to date"),
            arg("--list", action="store_true", help="list the notebooks and how they stand, run nothing"),
            arg("--plan", action="store_true", help="say as JSON what would run, run nothing"),
            arg("--fetch", action="store_true", help="fetch the suite's weights, run nothing"),
            arg("--remote", action="store_true", help="run the models at NDIF, whose key is in NDIF_API_KEY (reading)"),
        ),
        epilog=_RUN_EXAMPLES,
    ),
    Command(
        "book",
        "run what is not up to date and build the book",
        "Run what is not up to date, build the book, and print the path of its first page. A page whose run failed or "
        "is stale says so.",
        _book,
        (
            arg("--no-run", action="store_true", help="build from the results there are"),
            suite_option(
                "again for suites side by side; default: smollm2", default=None, action="append", dest="suites"
            ),
        ),
        epilog=_BOOK_EXAMPLES,
    ),
    Command(
        "claims",
        "what became of each claim of the papers",
        "Print each claim's outcome for each suite with results. Only runs with the notebooks' own parameters count; "
        "a missing run is 'not tested', never a pass. One whose notebook, code, model or rules changed since is marked "
        "as stale.",
        _claims,
        (
            suite_option("default: all with results", default=None),
            arg("--why", action="store_true", help="with each claim's statement and the reasons for its outcome"),
            arg("--json", action="store_true", help="export as JSON"),
        ),
    ),
    Command(
        "diff",
        "compare two runs' claims",
        "Print the claims whose outcome or numbers differ between two runs. Exits with 1 if an outcome changed, 0 if "
        "none did, 2 for bad input.",
        _diff,
        tuple(arg(name, help="a suite, a results folder, or the folder of an exported crate") for name in "AB"),
        epilog=_DIFF_EXAMPLES,
    ),
    Command(
        "export",
        "pack results to publish them",
        "Pack claims, the data of every figure, the executed notebooks and their provenance as an RO-Crate, and print "
        "its path.",
        _export,
        (
            arg("--ro-crate", type=Path, required=True, metavar="DIR", help="the crate's folder: new, or empty"),
            suite_option("may be given again; default: all with results", default=None, action="append", dest="suites"),
        ),
    ),
)
_DOCTOR = Command(
    "doctor",
    "what this machine has and can run",
    "Say what this machine has and can run, with a remedy for what is missing. Exits with 1 if the default suite "
    "cannot run.",
    _doctor,
)


if __name__ == "__main__":
    main()
