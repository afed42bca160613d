"""From executed notebooks to the built book: stage the pages, then run Jupyter Book over them.

Staging copies what `rim run` executed into `book/experiments/`, with a run card under the title. It writes a
file only where its content changed, so that Sphinx builds again only what is new.
"""

import json
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import nbformat
import yaml

from rim_core import runner
from rim_core.errors import InputError, RimError
from rim_core.workspace import DEFAULT_SUITE, suite_file, suite_name

STAGED = Path("book/experiments")
_KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
_LANGUAGE = {"name": "python", "pygments_lexer": "ipython3"}
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_PROGRESS = ("reading sources", "writing output", "copying assets", "build succeeded", "build finished")


@dataclass(frozen=True)
class Page:
    """One staged page: the notebook and the suite it shows, its document name, and how its run stands."""

    notebook: str
    suite: str  # a name, or the path of a suite's file
    document: str
    status: str  # "ok", "stale", "failed" or "not run"


def stage(project: Path, suites: Sequence[str] = (DEFAULT_SUITE,)) -> list[Page]:
    """Write a page for every notebook of `project` into `book/experiments/` and return the pages.

    The first of `suites` has a page for each notebook, a placeholder where it was not run; each further suite
    has one for every notebook it was run on, under `book/experiments/<suite>/`. Pages that earlier stagings
    left and that no longer belong are removed. Raises InputError where there are no suites or no notebooks.
    """
    sources = sorted((project / "notebooks").glob("*/*.ipynb"))
    if not suites or not sources:
        raise InputError(f"{project.name}: the book needs at least one suite and one notebook in notebooks/")
    pages = []
    for position, suite in enumerate(suites):
        for source in sources:
            notebook = f"{source.parent.name}/{source.stem}"
            status = _status(project, notebook, suite)
            if position and status == "not run":
                continue
            folder = STAGED / suite_name(suite) if position else STAGED
            page = Page(notebook, suite, (folder / notebook).as_posix(), status)
            _write(project / f"{page.document}.ipynb", _page(project, source, page))
            pages.append(page)
    kept = {project / f"{page.document}.ipynb" for page in pages}
    for path in (project / STAGED).rglob("*.ipynb"):
        if path not in kept:
            path.unlink()
    return pages


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
        [sys.executable, "-c", program, *options],
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


def _status(project: Path, notebook: str, suite: str) -> str:
    if (_failed_folder(project, notebook, suite) / "error.json").is_file():
        return "failed"
    run = _run_folder(project, notebook, suite) / "run.json"
    if not run.is_file():
        return "not run"
    record = _read_json(run)
    current, _ = runner.run_key(project, notebook, suite, record["overrides"])
    return "ok" if record["run_key"] == current else "stale"


def _run_folder(project: Path, notebook: str, suite: str) -> Path:
    return runner.run_folder(project, notebook, suite, {})


def _failed_folder(project: Path, notebook: str, suite: str) -> Path:
    folder = _run_folder(project, notebook, suite)
    return folder.parent / "failed" / folder.name


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _page(project: Path, source: Path, page: Page) -> nbformat.NotebookNode:
    folder = _run_folder(project, page.notebook, page.suite)
    if page.status in ("ok", "stale"):
        notebook = nbformat.read(folder / "notebook.ipynb", as_version=4)
        card = _card(page, _read_json(folder / "run.json"))
        cells = [
            cell for cell in notebook.cells if "injected-parameters" not in cell.metadata.get("tags", [])
        ]
    else:
        notebook = nbformat.read(source, as_version=4)
        card = _placeholder(project, page)
        cells = notebook.cells[:1]
    cells.insert(1, nbformat.v4.new_markdown_cell(card))
    notebook.cells = [_clean(cell, number) for number, cell in enumerate(cells)]
    notebook.nbformat_minor = 5
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": _KERNEL,
            "language_info": _LANGUAGE,
            "rim": {"suite": suite_name(page.suite), "status": page.status},
        }
    )
    return notebook


def _clean(cell: nbformat.NotebookNode, number: int) -> nbformat.NotebookNode:
    """Drop what changes between equal runs: times, counts, identifiers, and what was said on stderr."""
    tags = cell.metadata.get("tags", [])
    cell.metadata = nbformat.from_dict({"tags": tags} if tags else {})
    cell.id = f"cell-{number}"
    if cell.cell_type == "code":
        cell.execution_count = None
        cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = None
    return cell


def _card(page: Page, run: dict[str, Any]) -> str:
    """The run card, as one HTML block so that it shows alike in the book and in Jupyter."""
    parameters = run["parameters"]
    suite = yaml.safe_load(suite_file(page.suite).read_text(encoding="utf-8"))
    seeds = parameters.get("seeds", run["seed"])
    rows = {
        "Suite": f"<code>{escape(suite_name(page.suite))}</code>",
        "Base model": escape(str(suite.get("title", page.suite))),
        "Roles": escape(", ".join(suite["roles"])),
        "Quantization": escape(str(parameters.get("quantization", "–"))),
        "Seeds": escape(", ".join(map(str, seeds)) if isinstance(seeds, list) else str(seeds)),
        "Device": escape(str(run["device"])),
        "Wall time": f"{run['wall_seconds']:.0f} s",
        "Finished": escape(str(run["finished"])[:10]),
        "Run key": f"<code>{escape(run['run_key'][:12])}</code>",
    }
    items = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in rows.items())
    settings = ", ".join(f"{name} = {json.dumps(value)}" for name, value in sorted(parameters.items()))
    versions = ", ".join(f"{name} {version}" for name, version in sorted(run["versions"].items()))
    stale = ""
    if page.status == "stale":
        stale = (
            '<p class="rim-banner"><strong>Stale.</strong> The notebook, the code, the model or the pinned '
            f"versions changed after this run. Run it again: <code>{_command(page)}</code></p>"
        )
    return (
        f'<aside class="rim-run-card" id="run-card" aria-label="Run card">{stale}<dl>{items}</dl>'
        f"<details><summary>Parameters and versions</summary><p>{escape(settings)}</p>"
        f"<p>Python {escape(run['python'])}, {escape(versions)}</p></details></aside>"
    )


def _placeholder(project: Path, page: Page) -> str:
    if page.status == "failed":
        error = _read_json(_failed_folder(project, page.notebook, page.suite) / "error.json")
        what = f"The last run failed: {escape(str(error.get('ename', 'error')))}."
    else:
        what = "This experiment has not been run."
    return (
        '<aside class="rim-run-card" id="run-card" aria-label="Run card"><p class="rim-banner">'
        f"<strong>No result.</strong> {what} Run it with the suite <code>{escape(suite_name(page.suite))}</code>: "
        f"<code>{_command(page)}</code>, then <code>rim book</code>.</p></aside>"
    )


def _command(page: Page) -> str:
    # Of a suite's own file only the name: pages tell nothing of the machine.
    return escape(f"rim run {page.notebook} --suite {Path(page.suite).name}")


def _write(path: Path, notebook: nbformat.NotebookNode) -> None:
    text = nbformat.writes(notebook) + "\n"
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


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
    staged = {
        path.relative_to(project).with_suffix("").as_posix() for path in (project / STAGED).rglob("*.ipynb")
    }
    experiments = {file for file in files if file.startswith(STAGED.as_posix())}
    if missing := sorted(experiments - staged):
        raise RimError(f"_toc.yml: no page for {', '.join(missing)}; is there such a notebook in notebooks/?")
    if extra := sorted(staged - experiments):
        raise RimError(
            f"_toc.yml: {', '.join(extra)} is not in the table of contents; add it under its paper"
        )


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
    found = [line.strip().replace(f"{project}/", "") for line in lines if any(mark in line for mark in marks)]
    what = " | ".join(found[:3]) or (lines[-1].strip() if lines else "the builder said nothing")
    return f"book: the build failed: {what}; the whole log is in _build/book.log"
