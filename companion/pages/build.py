"""From staged pages to the built book: its table of contents, and Jupyter Book run over it."""

import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from companion.pages.staging import STAGED
from rim_core.errors import RimError

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_PROGRESS = ("reading sources", "writing output", "copying assets", "build succeeded", "build finished")


def build(project: Path) -> Path:
    """Build the book of `project` from its staged pages and return the path of the HTML's `index.html`.

    Pages of further suites are added to the table of contents. Any warning of Sphinx is an error. Raises
    RimError with the first of them; the whole log stays in `_build/book.log`.
    """
    contents = _contents(project)
    _check_contents(project, contents)
    log = project / "_build" / "book.log"
    log.parent.mkdir(exist_ok=True)
    program = "from jupyter_book.cli.main import main; main()"
    options = ["build", ".", "--toc", contents.relative_to(project).as_posix(), "-n", "-W", "--keep-going"]
    process = subprocess.Popen(
        # -P: a folder of the project's must not be taken for a package.
        [sys.executable, "-P", "-c", program, *options],
        cwd=project,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
    )
    assert process.stdout is not None
    lines = list(_follow(process.stdout))
    log.write_text("".join(lines), encoding="utf-8")
    index = project / "_build" / "html" / "index.html"
    if process.wait() != 0 or not index.is_file():
        raise RimError(_failure(lines, project))
    return index


def _contents(project: Path) -> Path:
    """The table of contents: the project's own, or a copy with the pages of further suites added."""
    own = project / "_toc.yml"
    further = sorted((project / STAGED).glob("*/*/*.ipynb"))
    if not further:
        return own
    contents = yaml.safe_load(own.read_text(encoding="utf-8"))
    for entry in list(_entries(contents)):
        for path in further:
            suite, section, _ = path.relative_to(project / STAGED).parts
            if entry.get("file") == (STAGED / section / path.stem).as_posix():
                document = path.relative_to(project).with_suffix("").as_posix()
                entry.setdefault("sections", []).append({"file": document, "title": f"with {suite}"})
    path = project / "_build" / "toc.yml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump(contents, sort_keys=False), encoding="utf-8")
    return path


def _entries(contents: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield contents
    for group in ("parts", "chapters", "sections"):
        for entry in contents.get(group, []):
            yield from _entries(entry)


def _check_contents(project: Path, contents: Path) -> None:
    entries = _entries(yaml.safe_load(contents.read_text(encoding="utf-8")))
    files = {entry["file"] for entry in entries if "file" in entry}
    staged = {path.relative_to(project).with_suffix("").as_posix() for path in (project / STAGED).rglob("*.ipynb")}
    experiments = {file for file in files if file.startswith(STAGED.as_posix())}
    if missing := sorted(experiments - staged):
        raise RimError(f"_toc.yml: no page for {', '.join(missing)}; is there such a notebook in notebooks/?")
    if extra := sorted(staged - experiments):
        raise RimError(f"_toc.yml: {', '.join(extra)} is not in the table of contents; add it under its paper")


def _follow(stream: Iterator[str]) -> Iterator[str]:
    """Pass the builder's lines on, telling each new stage once."""
    stage_shown = ""
    for coloured in stream:
        line = _COLOUR.sub("", coloured)
        for name in _PROGRESS:
            if line.startswith(name) and name != stage_shown:
                print(f"book: {name}", file=sys.stderr)
                stage_shown = name
        yield line


def _failure(lines: Sequence[str], project: Path) -> str:
    marks = ("WARNING", "ERROR", "Exception", "error:")
    told = [line.strip().replace(f"{project}/", "") for line in lines]
    # "Extension error:" stands on a line of its own, above what it is.
    after = [*told[1:], ""]
    found = [
        f"{line} {more}" if line.endswith(":") else line
        for line, more in zip(told, after, strict=True)
        if any(mark in line for mark in marks)
    ]
    what = " | ".join(found[:3]) or (lines[-1].strip() if lines else "the builder said nothing")
    return f"book: the build failed: {what}; the whole log is in _build/book.log"
