"""Lines that say how far a long command is: rewritten in place on a terminal, sparse in a log."""

import threading
import time
from typing import Self, TextIO

_LOG_EVERY = 15.0  # seconds between two lines about the same notebook where lines cannot be rewritten


class Progress:
    """One line for one piece of work, with the cell it is at and the time so far; a context manager."""

    def __init__(self, label: str, stream: TextIO) -> None:
        self.label, self.stream = label, stream
        self._rewrites = stream.isatty()
        self._started = self._logged = time.monotonic()
        self._at = "starting"
        self._stop = threading.Event()
        # A cell may take minutes: the clock must be seen to move meanwhile.
        self._ticker = threading.Thread(target=self._tick, daemon=True)

    def __enter__(self) -> Self:
        if self._rewrites:
            self._show()
        self._ticker.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._ticker.join()
        if self._rewrites:
            self._print("\r\x1b[K", end="")

    def cell(self, number: int, of: int) -> None:
        """Say that code cell `number` of `of` starts."""
        self._at = f"cell {number}/{of}"
        if self._rewrites or number == 1:
            self._show()

    def at(self, text: str) -> None:
        """Say what it is at, other than a cell."""
        self._at = text
        if self._rewrites:
            self._show()

    def say(self, text: str) -> None:
        """Say what became of it."""
        self._print(f"{self.label}  {self._elapsed()}  {text}")

    def _tick(self) -> None:
        while not self._stop.wait(1.0):
            now = time.monotonic()
            if self._rewrites or now - self._logged >= _LOG_EVERY:
                self._logged = now
                self._show()

    def _show(self) -> None:
        line = f"{self.label}  {self._elapsed()}  {self._at}"
        if self._rewrites:
            self._print(f"\r\x1b[K{line}", end="")
        else:
            self._print(line)

    def _elapsed(self) -> str:
        seconds = int(time.monotonic() - self._started)
        return f"{seconds // 60}:{seconds % 60:02d}"

    def _print(self, text: str, end: str = "\n") -> None:
        print(text, end=end, file=self.stream, flush=True)
