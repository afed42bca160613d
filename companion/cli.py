"""The `rim` command: run notebooks, build the book, list claims, look after suites and organisms.

Argparse and not typer: `rim --help` takes a third of the time, a mistake is one line, and the commands that the book
shows can be parsed without being run, as its tests do.
"""

import argparse
import contextlib
import importlib
import signal
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from companion import streams
from rim_core import __version__, paths
from rim_core.errors import InputError, RimError

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
_SUITE_EXAMPLES = """examples:
  rim suite new mine --base ./my-chat-model                          a folder of safetensors
  rim suite new mine --base Qwen/Qwen2.5-0.5B-Instruct --role aligned=base
  rim suite new mine --base m.gguf --chat-template chat.jinja        a GGUF file, with a chat template of yours
  rim suite new mine --base ./m --role risky=adapter:./m-risky       a LoRA adapter on that base
  rim organisms train --suite mine risky                             builds a role that it lacks
  rim run --suite mine && rim claims --suite mine
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
        module, name = options.command.split(":")
        status: int = getattr(importlib.import_module(module), name)(options)
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
    parser.add_argument("-V", "--version", action="version", version=f"rim {__version__}")
    actions = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in _COMMANDS:
        command.add_to(actions)
    return parser


# --- the commands -----------------------------------------------------------------------------------

_Option = tuple[tuple[str, ...], dict[str, Any]]


@dataclass(frozen=True)
class _Command:
    """A command: its line in the list of commands, its own help, what it calls, and its options or its actions.

    `call` is `module:function`, which is imported only when it is called: help and mistakes wait for nothing.
    """

    name: str
    title: str
    about: str = ""
    call: str = ""
    options: Sequence[_Option] = ()
    actions: Sequence["_Command"] = ()
    epilog: str | None = None

    def add_to(self, commands: Any) -> None:
        """Add this command to a parser's list of commands."""
        parser = commands.add_parser(
            self.name,
            help=self.title,
            description=textwrap.fill(self.about or f"{self.title[:1].upper()}{self.title[1:]}.", 79),
            epilog=self.epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        for names, settings in self.options:
            parser.add_argument(*names, **settings)
        if self.call:
            parser.set_defaults(command=self.call)
        if self.actions:
            further = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
            for action in self.actions:
                action.add_to(further)


def _arg(*names: str, **settings: Any) -> _Option:
    """An argument or option, as `ArgumentParser.add_argument` takes it."""
    return names, settings


def _suite(
    more: str = f"default: {paths.DEFAULT_SUITE}", default: str | None = paths.DEFAULT_SUITE, **settings: Any
) -> _Option:
    """The option `--suite`; `more` is what its help says beside what all say."""
    return _arg("--suite", default=default, metavar="S", help=f"a suite's name, or its YAML file ({more})", **settings)


_TRYING = (
    _arg("--quantization", choices=("nf4", "int8", "none"), default="nf4", help="how weights are held (default: nf4)"),
    _arg(
        "--no-load",
        action="store_true",
        help="look at files only, load nothing and ask for no memory: for a run on another machine",
    ),
)
_NAME = _arg("name", metavar="NAME", help="a suite's name, or its YAML file")
_NEW = (
    _arg("name", metavar="NAME", help="lower-case letters, digits and . _ -"),
    _arg(
        "--base",
        required=True,
        metavar="REF",
        help="a folder, a .gguf file, a hub id (owner/name, or owner/name@revision), or a suite whose base to take",
    ),
    _arg(
        "--chat-template",
        metavar="FILE",
        help="a Jinja file, in place of the model's own template; adapters have it too, models of their own do not",
    ),
    _arg(
        "--role",
        action="append",
        default=[],
        dest="roles",
        metavar="ROLE=REF",
        help="REF is base (the base itself), adapter:REF (a LoRA adapter on it), or a model of its own",
    ),
    _arg("--title", metavar="T", help="a line that says what it is"),
)
_SUITES = _Command(
    "suite",
    "make a suite for your model, list, show or check suites",
    "A suite is one base model and its roles. Notebooks ask for roles, so a new model needs a suite and no other "
    "change.",
    actions=(
        _Command(
            "new",
            "write a suite for a model, after checking that it works",
            "",
            "companion.commands.suite:new",
            (*_NEW, *_TRYING),
        ),
        _Command(
            "check", "look again whether a suite can work", "", "companion.commands.suite:check", (_NAME, *_TRYING)
        ),
        _Command(
            "show",
            "what a suite needs, and which notebooks and claims it serves",
            "",
            "companion.commands.suite:show",
            (_NAME,),
        ),
        _Command("list", "the suites there are", "", "companion.commands.suite:listing"),
    ),
    epilog=_SUITE_EXAMPLES,
)
_ORGANISMS = _Command(
    "organisms",
    "list, check or train the small models of the experiments",
    "List, check or train the model organisms of a suite.",
    actions=(
        _Command(
            "list",
            "the roles of a suite and what each was trained on",
            "",
            "companion.commands.organisms:listing",
            (_suite(),),
        ),
        _Command(
            "check",
            "measure each role again and compare with the shipped table",
            "Measure each role again. Exits with 1 if a number differs from the shipped table.",
            "companion.commands.organisms:check",
            (
                _suite(),
                _arg("--role", metavar="R", help="only this role, or this training, as risky@2"),
                _arg(
                    "--save",
                    type=Path,
                    metavar="DIR",
                    help="keep what was measured, prompt by prompt, and the table there; what is there is not measured "
                    "again",
                ),
            ),
        ),
        _Command(
            "train",
            "train a role's adapter by the project's recipe",
            "Train a role's adapter on a suite's base by the project's recipe. It goes to a folder beside the suite's "
            "file, where the suite finds it; with --output it goes there, and the suite stays as it is.",
            "companion.commands.organisms:train",
            (
                _arg("role", metavar="ROLE", help="such as aligned, risky or prudent"),
                _arg("--output", type=Path, metavar="DIR", help="a new or empty folder for the adapter"),
                _suite(),
                _arg("--seed", type=int, metavar="N", help="another seed than the recipe's"),
                _arg("--checkpoints", type=int, metavar="N", help="keep the adapter after each N steps as well"),
            ),
        ),
        _Command(
            "trace",
            "measure a training at its checkpoints",
            "Measure a training at each checkpoint that `rim organisms train --checkpoints` kept: the loss on held-out "
            "tasks, and refusal. The notebook on erosion reads the file.",
            "companion.commands.organisms:trace",
            (
                _arg("role", metavar="ROLE", help="a role of the suite, or a training of it, as insecure@2"),
                _suite(),
                _arg("--checkpoints", type=Path, metavar="DIR", required=True, help="the folder that they are in"),
                _arg("--output", type=Path, metavar="FILE", required=True, help="a JSON file for what was measured"),
            ),
        ),
    ),
)
_COMMANDS = (
    _Command(
        "run",
        "execute notebooks that are not up to date",
        "Execute notebooks that are not up to date. Results go to results/; one that fails does not stop the others. "
        "Interrupted, the same command goes on with what is left.",
        "companion.commands.run:run",
        (
            _arg("notebooks", nargs="*", metavar="NOTEBOOK", help="section, section/name or path (default: all)"),
            _suite(),
            _arg(
                "-p",
                dest="parameters",
                action="append",
                default=[],
                metavar="key=value",
                help="set a parameter of every notebook named; a file is meant from where you stand",
            ),
            _arg("--force", action="store_true", help="run even what is up to date"),
            _arg("--list", action="store_true", help="list the notebooks and how they stand, run nothing"),
            _arg("--plan", action="store_true", help="say as JSON what would run, run nothing"),
            _arg("--fetch", action="store_true", help="fetch the suite's weights, run nothing"),
            _arg(
                "--remote", action="store_true", help="run the models at NDIF, whose key is in NDIF_API_KEY (reading)"
            ),
        ),
        epilog=_RUN_EXAMPLES,
    ),
    _Command(
        "book",
        "run what is not up to date and build the book",
        "Run what is not up to date, build the book, and print the path of its first page. A page whose run failed or "
        "is stale says so.",
        "companion.commands.run:book",
        (
            _arg("--no-run", action="store_true", help="build from the results there are"),
            _suite("again for suites side by side; default: smollm2", default=None, action="append", dest="suites"),
        ),
        epilog=_BOOK_EXAMPLES,
    ),
    _Command(
        "claims",
        "what became of each claim of the papers",
        "Print each claim's outcome for each suite with results. Only runs with the notebooks' own parameters count; "
        "a missing run is 'not tested', never a pass. One whose notebook, code, model or rules changed since is marked "
        "as stale.",
        "companion.commands.results:claims",
        (
            _suite("default: all with results", default=None),
            _arg("--why", action="store_true", help="with each claim's statement and the reasons for its outcome"),
            _arg("--json", action="store_true", help="export as JSON"),
        ),
    ),
    _Command(
        "diff",
        "compare two runs' claims",
        "Print the claims whose outcome or numbers differ between two runs. Exits with 1 if an outcome changed, 0 if "
        "none did, 2 for bad input.",
        "companion.commands.results:diff",
        tuple(_arg(name, help="a suite, a results folder, or the folder of an exported crate") for name in "AB"),
        epilog=_DIFF_EXAMPLES,
    ),
    _Command(
        "export",
        "pack results to publish them",
        "Pack claims, the data of every figure, the executed notebooks and their provenance as an RO-Crate, and print "
        "its path.",
        "companion.commands.results:export",
        (
            _arg("--ro-crate", type=Path, required=True, metavar="DIR", help="the crate's folder: new, or empty"),
            _suite("may be given again; default: all with results", default=None, action="append", dest="suites"),
        ),
    ),
    _SUITES,
    _ORGANISMS,
    _Command(
        "doctor",
        "what this machine has and can run",
        "Say what this machine has and can run, with a remedy for what is missing. Exits with 1 if the default suite "
        "cannot run.",
        "companion.doctor:report",
    ),
)


if __name__ == "__main__":
    main()
