"""The `rim` command: run notebooks, build the book, list claims, look after the organisms."""

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from companion import streams
from companion.commands import suite as suite_command
from companion.console import print_json, table
from rim_core import __version__, paths
from rim_core.errors import InputError, RimError, RunError

_EXAMPLES = """examples:
  rim doctor                                    what this machine has and can run
  rim run                                       run every notebook that is not up to date
  rim run self_aware/01_linear_probes           run one
  rim run self_aware/01_linear_probes -p n_prompts=50 -p 'seeds=[5, 6, 7]'
                                                with other parameters; lists are written as JSON
  rim run --suite my-model                      run everything on another model: see rim run --help
  rim book                                      run what is not up to date, then build the book
  rim claims                                    what became of each claim of the papers
  rim diff smollm2 my-model                     which claims came out otherwise
  rim export --ro-crate DIR                     claims, figures' data and provenance, to publish
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


class _Terminated(KeyboardInterrupt):
    """The process was asked to end (SIGTERM); it ends as cleanly as on Ctrl-C."""


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
        status: int = options.command(options)
        sys.stdout.flush()
        return status
    except SystemExit as ended:  # --help, --version, or a command line that cannot be read
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


# --- the parser -----------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rim",
        description="Re-run the experiments of four papers on why safety training fails; check their claims.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"rim {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_run(commands)
    _add_book(commands)
    _add_claims(commands)
    _add_diff(commands)
    _add_export(commands)
    suite_command.add(commands)
    _add_organisms(commands)
    doctor = commands.add_parser(
        "doctor",
        help="what this machine has and can run",
        description="Say what this machine has and can run, with a remedy for what is missing. "
        "Exits with 1 if the default suite cannot run.",
    )
    doctor.set_defaults(command=_doctor)
    return parser


def _add_suite(parser: argparse.ArgumentParser, default: str | None = paths.DEFAULT_SUITE) -> None:
    told = f" (default: {default})" if default else ""
    parser.add_argument(
        "--suite", default=default, metavar="S", help=f"a suite's name, or a path to its YAML file{told}"
    )


def _add_run(commands: Any) -> None:
    run = commands.add_parser(
        "run",
        help="execute notebooks that are not up to date",
        description="Execute notebooks that are not up to date. Results go to results/; one that fails does "
        "not stop the others. Interrupted, the same command goes on with what is left.",
        epilog=_RUN_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    run.add_argument("notebooks", nargs="*", metavar="NOTEBOOK", help="section, section/name or path (default: all)")
    _add_suite(run)
    run.add_argument(
        "-p",
        dest="parameters",
        action="append",
        default=[],
        metavar="key=value",
        help="set a parameter of every notebook named; a file is meant from where you stand",
    )
    run.add_argument("--force", action="store_true", help="run even what is up to date")
    run.add_argument("--list", action="store_true", help="list the notebooks, run nothing")
    run.add_argument("--plan", action="store_true", help="say as JSON what would run, run nothing")
    run.add_argument("--fetch", action="store_true", help="fetch the suite's weights, run nothing")
    run.add_argument(
        "--remote", action="store_true", help="run the models at NDIF, whose key is in NDIF_API_KEY (reading only)"
    )
    run.set_defaults(command=_run)


def _add_book(commands: Any) -> None:
    book = commands.add_parser(
        "book",
        help="run what is not up to date and build the book",
        description="Run what is not up to date, build the book, and print the path of its first page. "
        "A page whose run failed or is stale says so.",
        epilog="examples:\n"
        "  rim book                                      the default suite\n"
        "  rim book --suite smollm2 --suite my-model     two side by side, and a page that compares them\n"
        "  rim book --no-run --suite my-model            from the results there are\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    book.add_argument("--no-run", action="store_true", help="build from the results there are")
    book.add_argument(
        "--suite",
        action="append",
        dest="suites",
        metavar="S",
        help=f"a suite's name, or a path to its YAML file; give it again to show suites side by side "
        f"(default: {paths.DEFAULT_SUITE})",
    )
    book.set_defaults(command=_book)


def _add_claims(commands: Any) -> None:
    claims = commands.add_parser(
        "claims",
        help="what became of each claim of the papers",
        description="Print each claim's outcome for each suite with results. Only runs with the notebooks' "
        "own parameters count; a missing run is 'not tested', never a pass. One whose notebook, code, model or rules "
        "changed since is marked as stale.",
    )
    _add_suite(claims, default=None)
    claims.add_argument("--json", action="store_true", help="export as JSON")
    claims.set_defaults(command=_claims)


def _add_diff(commands: Any) -> None:
    diff = commands.add_parser(
        "diff",
        help="compare two runs' claims",
        description="Print the claims whose outcome or numbers differ between two runs. Exits with 1 if an outcome "
        "changed, 0 if none did, 2 for bad input.",
        epilog="examples:\n"
        "  rim diff smollm2 my-model                  two suites of this project\n"
        "  rim diff ../before/results results         two results folders, suite by suite\n"
        "  rim diff published-crate smollm2           what was published and what is here\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name in ("A", "B"):
        diff.add_argument(name, help="a suite, a results folder, or the folder of an exported crate")
    diff.set_defaults(command=_diff)


def _add_export(commands: Any) -> None:
    export = commands.add_parser(
        "export",
        help="pack results to publish them",
        description="Pack claims, the data of every figure, the executed notebooks and their provenance as an "
        "RO-Crate, and print its path.",
    )
    export.add_argument("--ro-crate", type=Path, required=True, metavar="DIR", help="the crate's folder: new, or empty")
    export.add_argument(
        "--suite",
        action="append",
        dest="suites",
        metavar="S",
        help="only this suite; may be given again (default: all with results)",
    )
    export.set_defaults(command=_export)


def _add_organisms(commands: Any) -> None:
    organisms = commands.add_parser(
        "organisms",
        help="list, check or train the small models that the experiments run on",
        description="List, check or train the model organisms of a suite.",
    )
    actions = organisms.add_subparsers(title="actions", metavar="ACTION", required=True)
    listing = actions.add_parser("list", help="the roles of a suite and what each was trained on")
    _add_suite(listing)
    listing.set_defaults(command=_organisms_list)
    check = actions.add_parser(
        "check",
        help="measure each role again and compare with the shipped table",
        description="Measure each role again. Exits with 1 if a number misses its target or differs from the "
        "shipped table.",
    )
    _add_suite(check)
    check.add_argument("--role", metavar="R", help="only this role")
    check.set_defaults(command=_organisms_check)
    train = actions.add_parser(
        "train",
        help="train a role's adapter by the project's recipe",
        description="Train a role's adapter on a suite's base by the project's recipe. It goes to a folder beside "
        "the suite's file, which gets the role; with --output it goes there, and no file is changed.",
    )
    train.add_argument("role", metavar="ROLE", help="such as aligned, risky or prudent")
    train.add_argument("--output", type=Path, metavar="DIR", help="a new or empty folder for the adapter")
    _add_suite(train)
    train.add_argument("--seed", type=int, metavar="N", help="another seed than the recipe's")
    train.set_defaults(command=_organisms_train)


# --- the commands ---------------------------------------------------------------------------------------


def _run(options: argparse.Namespace) -> int:
    overrides = _read_parameters(options.parameters)
    paths.suite_file(options.suite)
    if options.remote:
        os.environ["RIM_REMOTE"] = "1"  # for the notebooks' kernels, which inherit it
    if options.list:
        return _list(options)
    if options.fetch:
        from rim_core.suites.checkpoints import fetch
        from rim_core.suites.schema import load_suite

        fetch(load_suite(options.suite))
        return 0
    from companion import runner

    # Before weights are fetched or torch is loaded: a slip of the pen is told at once.
    runner.check(options.notebooks, options.suite, overrides)
    if options.plan:
        planned = runner.plan(options.notebooks, options.suite, overrides)
        print_json(planned)
        return 0
    if options.remote:
        from rim_core.models import remote

        remote.require_suite(options.suite)
    else:
        _fetch_weights(options.suite)
    results = runner.run(options.notebooks, options.suite, overrides, force=options.force)
    return _summarise(results)


def _fetch_weights(suite: str) -> None:
    """Fetch the suite's weights here, with a progress bar, and not unseen inside the first notebook."""
    from rim_core.suites.checkpoints import fetch_base
    from rim_core.suites.schema import load_suite

    fetch_base(load_suite(suite))


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


def _list(options: argparse.Namespace) -> int:
    from companion import notebooks, runner

    root = paths.root()
    chosen = notebooks.resolve(root, options.notebooks)
    rows = []
    for name in chosen:
        title = notebooks.title(notebooks.read_source(root, name))
        rows.append({"notebook": name, options.suite: runner.last_run(root, name, options.suite), "title": title})
    table(rows)
    if len(chosen) == 1:
        known = notebooks.parameters(chosen[0], notebooks.read_source(root, chosen[0])).values()
        print()
        table([{"parameter": p.name, "type": p.type, "default": repr(p.default), "": p.help} for p in known])
    return 0


def _summarise(results: Sequence[Any]) -> int:
    failed = [result.notebook for result in results if result.status == "failed"]
    if len(results) > 1:
        states = [result.status for result in results]
        counted = ", ".join(f"{states.count(s)} {s}" for s in dict.fromkeys(sorted(states)))
        print(f"{len(results)} notebooks: {counted}", file=sys.stderr)
        for result in results:
            if result.status == "failed":
                print(f"  failed: {result.notebook}: {result.reason}", file=sys.stderr)
    if failed:
        raise RunError(f"{len(failed)} of {len(results)} notebooks failed: {', '.join(failed)}")
    return 0


def _book(options: argparse.Namespace) -> int:
    from companion.pages import build, staging

    suites = staging.distinct(options.suites or [paths.DEFAULT_SUITE])
    root = paths.root()
    failures: list[str] = []
    if not options.no_run:
        from companion import runner

        for suite in suites:
            _fetch_weights(suite)
            try:
                _summarise(runner.run([], suite))
            except RunError as error:
                # The book is built all the same: the page says that its run failed.
                failures.append(f"{suite}: {error}")
    staging.stage(root, suites)
    index = build.build(root)
    print(index, flush=True)
    if failures:
        raise RunError("; ".join(failures))
    return 0


def _claims(options: argparse.Namespace) -> int:
    from companion import runner
    from rim_core.verdicts.rules import SYMBOLS

    if options.suite:
        paths.suite_file(options.suite)
    rows = runner.scorecard(paths.root(), [options.suite] if options.suite else None)
    if options.json:
        print_json(rows)
        return 0
    for row in rows:
        shown = SYMBOLS[row["outcome"]] + " " + row["outcome"].replace("_", " ")
        shown += {True: ", stale", False: "", None: ", perhaps stale"}[row["stale"]]
        print(f"{row['paper']} {row['claim']}  {row['suite']}  {shown}")
        print(f"    {row['statement']}")
        print(f"    {row['reason']}; published: {row['published'] or 'no number'}")
        if stale := runner.stale_text(row):
            print(f"    {stale}")
    print(_count(rows))
    return 0


def _diff(options: argparse.Namespace) -> int:
    from companion import differences
    from rim_core.verdicts.rules import SYMBOLS

    found, compared = differences.compare(options.A, options.B)
    titles = (options.A, options.B) if options.A != options.B else ("A", "B")
    rows = []
    for each in found:
        row = {"claim": each.claim}
        for title, outcome, number in zip(titles, each.outcomes, each.numbers, strict=True):
            row[title] = f"{SYMBOLS[outcome]} {outcome.replace('_', ' ')}, {number}"
        rows.append(row)
    table(rows)
    print(differences.summary(found, compared))
    return int(any(each.changed for each in found))


def _export(options: argparse.Namespace) -> int:
    from companion import crate

    print(crate.export(paths.root(), options.ro_crate, options.suites))
    return 0


def _count(rows: Sequence[Mapping[str, Any]]) -> str:
    from rim_core.verdicts.rules import SYMBOLS

    states = [row["outcome"] for row in rows]
    counted = ", ".join(f"{states.count(s)} {s.replace('_', ' ')}" for s in SYMBOLS if s in states)
    stale = [row["stale"] for row in rows]
    told = [f"{stale.count(True)} of them stale"] if True in stale else []
    told += [f"of {stale.count(None)} not known whether stale"] if None in stale else []
    return f"in all: {'; '.join([counted, *told])}" if rows else "no claims in book/claims"


def _organisms_list(options: argparse.Namespace) -> int:
    paths.suite_file(options.suite)
    from rim_core import organisms

    table(organisms.listing(options.suite))
    return 0


def _organisms_check(options: argparse.Namespace) -> int:
    paths.suite_file(options.suite)
    from rim_core import organisms

    rows = organisms.check(options.suite, role=options.role, progress=True)
    shown = [
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
    table(shown)
    differ = [f"{row['role']} {row['metric']}" for row in rows if _differs(row["estimate"], row["shipped"])]
    if differ:
        raise RunError(f"differs from the shipped table: {', '.join(differ)}")
    return 0


def _differs(measured: float, shipped: float | None) -> bool:
    # Other processors round otherwise, and a near tie can then turn a greedy answer.
    return shipped is not None and abs(measured - shipped) > 0.05


def _organisms_train(options: argparse.Namespace) -> int:
    paths.suite_file(options.suite)
    from rim_core import organisms

    print(organisms.train(options.role, options.suite, output=options.output, seed=options.seed, progress=True))
    return 0


def _doctor(_: argparse.Namespace) -> int:
    from companion import doctor

    return doctor.report()


if __name__ == "__main__":
    main()
