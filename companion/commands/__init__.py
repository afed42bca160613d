"""The commands of `rim` that have actions of their own, and how a command is described.

`suite`: make, check, show and list suites. `organisms`: list, check and train the small models of a suite. The other
commands are in `companion.cli`.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rim_core import paths

Option = tuple[tuple[str, ...], dict[str, Any]]


@dataclass(frozen=True)
class Command:
    """A command: its line in the list of commands, its own help, what it calls, and its options or its actions."""

    name: str
    title: str
    about: str = ""
    call: Callable[[argparse.Namespace], int] | None = None
    options: Sequence[Option] = ()
    actions: Sequence["Command"] = ()
    epilog: str | None = None

    def add_to(self, commands: Any) -> None:
        """Add this command to a parser's list of commands."""
        parser = commands.add_parser(
            self.name,
            help=self.title,
            description=self.about or f"{self.title[:1].upper()}{self.title[1:]}.",
            epilog=self.epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter if self.epilog else argparse.HelpFormatter,
        )
        for names, settings in self.options:
            parser.add_argument(*names, **settings)
        if self.call:
            parser.set_defaults(command=self.call)
        if self.actions:
            further = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
            for action in self.actions:
                action.add_to(further)


def arg(*names: str, **settings: Any) -> Option:
    """An argument or option, as `ArgumentParser.add_argument` takes it."""
    return names, settings


def suite_option(
    more: str = f"default: {paths.DEFAULT_SUITE}", default: str | None = paths.DEFAULT_SUITE, **settings: Any
) -> Option:
    """The option `--suite`; `more` is what its help says beside what all say."""
    return arg("--suite", default=default, metavar="S", help=f"a suite's name, or its YAML file ({more})", **settings)
