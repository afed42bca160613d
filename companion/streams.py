"""Standard output and error as a command needs them: closed, full, or unable to write a character.

What a command prints is its result, so that losing it is a failure, said in one line. What it says of its progress is
not: a run goes on when nobody can be told of it.
"""

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TextIO

from rim_core.errors import RunError


def table(rows: Sequence[Mapping[str, Any]], *, heading: bool = True) -> None:
    """Print rows as aligned columns, as wide as the terminal (80 where there is none), long texts on further lines.

    Args:
        rows: each a value for a column; the first row's keys are the columns.
        heading: print the columns' names above them.
    """
    if not rows:
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_header=heading, header_style="bold")
    columns = list(rows[0])
    for number, name in enumerate(columns):
        drawn.add_column(name, overflow="fold", no_wrap=number == 0)
    for row in rows:
        drawn.add_row(*(Text(str(row.get(name, ""))) for name in columns))
    console = Console(file=sys.stdout, highlight=False, soft_wrap=False)
    with console.capture() as printed:
        console.print(drawn)
    # Blanks that fill the last column would be lines of their own where the terminal is narrower.
    print("\n".join(line.rstrip() for line in printed.get().splitlines()))


def print_json(value: Any) -> None:
    """Print a value as JSON that stays JSON whatever characters the output can write."""
    unicode = (sys.stdout.encoding or "").lower().startswith("utf")
    print(json.dumps(value, indent=1, ensure_ascii=not unicode, allow_nan=False))


class ClosedError(Exception):
    """The reader of standard output went away (`rim claims | head`): there is nobody to tell anything to."""


class _Stream:
    """A stream that writes what it can encode, and says itself what became of a failure."""

    def __init__(self, stream: TextIO, result: bool) -> None:
        self._stream, self._result = stream, result
        if hasattr(stream, "reconfigure"):
            # As an escape, which keeps JSON what it is; the terminal's own encoding is left as it is.
            stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._told():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._told():
            self._stream.flush()

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:  # ValueError: closed by the program itself
            # What is left in the buffer must not fail once more when Python ends.
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
            if self._result and isinstance(error, BrokenPipeError):
                raise ClosedError from None
            if self._result:
                why = getattr(error, "strerror", None) or error
                raise RunError(f"cannot write to standard output: {why}") from None


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """Within the context standard output and error fail as they should, and are there even if they were closed."""
    _fill_closed()
    before = sys.stdout, sys.stderr
    sys.stdout = _Stream(sys.stdout, result=True)
    sys.stderr = _Stream(sys.stderr, result=False)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def _fill_closed() -> None:
    """Put something in the place of closed streams: else the next file opened gets their number, and their text.

    Standard output is one that cannot be written to, so that a result that goes nowhere is a failure.
    """
    for number, mode in ((0, os.O_RDONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, mode)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
    if sys.stdout is None:
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
