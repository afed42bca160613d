"""The pages of experiments, what `rim run` executed, copied into `book/experiments/` with a run card each; and the
tables that other pages include.

A file is written only where its content changed, so that Sphinx builds again only what is new.
"""

import posixpath
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat

from companion import outcomes, staleness
from companion.folders import failed, read_record
from companion.pages import runcard, scorecard
from rim_core.errors import InputError
from rim_core.paths import DEFAULT_SUITE, suite_file, suite_name, suite_names

STAGED = Path("book/experiments")
TABLES = STAGED / "tables"
_KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
_LANGUAGE = {"name": "python", "pygments_lexer": "ipython3"}
# What ECMA-48 calls control sequences; then the control characters that no page may hold, and halves of characters.
_COLOURS = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\ud800-\udfff\ufffe\uffff]")
_LINK = re.compile(r"(?<=\]\()(?!\w+:|/|#)([^()\s#]+\.(?:md|ipynb))")


@dataclass(frozen=True)
class Page:
    """One staged page: the run that it shows, the suite as it was given, its document name, and how the run stands."""

    job: staleness.Job
    suite: str  # a name, or the path of a suite's file
    document: str
    status: str  # as `Job.state` says it

    @property
    def notebook(self) -> str:
        """The notebook's name."""
        return self.job.notebook

    @property
    def name(self) -> str:
        """The suite's name."""
        return self.job.suite.name


def distinct(suites: Sequence[str]) -> list[str]:
    """Give each of `suites` once, by its name where that is enough to find it, else by its path.

    Raises InputError where one is not there, or where two files have one name and so one folder of results.
    """
    found: dict[Path, str] = {}
    for suite in suites:
        name = suite_name(suite)
        found.setdefault(suite_file(suite).resolve(), name if name in suite_names() else suite)
    names = [path.stem for path in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"two suites are named {twice[0]}: their results would share a folder; rename a file")
    return list(found.values())


def stage(project: Path, suites: Sequence[str] = (DEFAULT_SUITE,)) -> list[Page]:
    """Write a page for every notebook of `project` into `book/experiments/`, the book's tables, and return the pages.

    The first of `suites` has a page for each notebook, a placeholder where it was not run; each further suite
    has one for every notebook it was run on, under `book/experiments/<suite>/`. Pages that earlier stagings
    left and that no longer belong are removed. Raises InputError where there are no suites or no notebooks.
    """
    if not suites:
        raise InputError(f"{project.name}: the book needs at least one suite")
    pages = []
    for position, suite in enumerate(suites):
        for job in staleness.plan([], suite, project=project):
            status = job.state
            if position and status in ("not run", "not applicable"):
                continue
            folder = STAGED / job.suite.name if position else STAGED
            pages.append(Page(job, suite, (folder / job.notebook).as_posix(), status))
    for page in pages:
        _write(project / f"{page.document}.ipynb", nbformat.writes(_page(project, page, pages)))
    kept = {project / f"{page.document}.ipynb" for page in pages}
    for path in (project / STAGED).rglob("*.ipynb"):
        if path not in kept:
            path.unlink()
    documents = {(page.notebook, page.name): page.document for page in pages}
    for name, text in scorecard.texts(project, _scorecard(project, suites), documents).items():
        _write(project / TABLES / f"{name}.md", text)
    return pages


def _scorecard(project: Path, suites: Sequence[str]) -> list[dict[str, Any]]:
    """The scorecard's rows with all that a page tells of why; of a suite's own file only the name, not the place."""
    rows = outcomes.scorecard(project, suites)
    files = {suite_name(suite): suite for suite in suites if suite != suite_name(suite)}
    for row in rows:
        told = [*row["reasons"], *filter(None, [outcomes.stale_text(row)])]
        file = files.get(row["suite"])
        row["reasons"] = [reason.replace(file, Path(file).name) for reason in told] if file else told
    return rows


def _page(project: Path, page: Page, pages: Sequence[Page]) -> nbformat.NotebookNode:
    folder = page.job.folder
    if page.status in ("up to date", "stale"):
        notebook = nbformat.read(folder / "notebook.ipynb", as_version=4)
        run, stale = read_record(folder / "run.json") or {}, page.status == "stale"
        card = runcard.card(page.notebook, page.suite, page.job.suite, run, stale)
        cells = list(_as_run(notebook.cells, page))
    else:
        notebook = nbformat.read(project / "notebooks" / f"{page.notebook}.ipynb", as_version=4)
        card = _placeholder(page)
        cells = notebook.cells[:1]
    for cell in cells:
        if cell.cell_type == "markdown":
            cell.source = _relink(cell.source, page, pages)
    cells.insert(1, nbformat.v4.new_markdown_cell(card + _elsewhere(page, pages)))
    notebook.cells = [_clean(cell, number) for number, cell in enumerate(_with_finding(cells))]
    notebook.nbformat_minor = 5
    notebook.metadata = nbformat.from_dict(
        {"kernelspec": _KERNEL, "language_info": _LANGUAGE, "rim": {"suite": page.name, "status": page.status}}
    )
    return notebook


def _as_run(cells: Sequence[nbformat.NotebookNode], page: Page) -> Iterator[nbformat.NotebookNode]:
    """Leave out what papermill injected, but for the name of a suite other than the one that the notebook names."""
    for cell in cells:
        if "injected-parameters" not in cell.metadata.get("tags", []):
            yield cell
        elif page.name != DEFAULT_SUITE:
            yield nbformat.v4.new_code_cell(f'suite = "{Path(page.suite).name}"  # as this page was run')


def _with_finding(cells: list[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """What the cell tagged `finding` made of the run stands under the title; the cell itself is folded where it is."""
    for cell in cells:
        tags = cell.metadata.get("tags", [])
        if "finding" in tags:
            told = [
                output.data["text/markdown"] for output in cell.outputs if "text/markdown" in output.get("data", {})
            ]
            cell.outputs, cell.metadata["tags"] = [], ["hide-cell"]
            text = "\n".join(["```{admonition} What we found", *told, "```"])
            cells.insert(1, nbformat.v4.new_markdown_cell(text))
            break
    return cells


def _elsewhere(page: Page, pages: Sequence[Page]) -> str:
    """Links to the same experiment as run with the book's other suites."""
    others = [other for other in pages if other.notebook == page.notebook and other != page]
    links = [f"[{other.name}]({_relative(f'{other.document}.ipynb', page)})" for other in others]
    return f"\n\nThe same experiment with {', '.join(links)}." if links else ""


def _relink(text: str, page: Page, pages: Sequence[Page]) -> str:
    """Links as they are meant, from `book/experiments/<section>/`, for the folder the page is staged into.

    A link to another experiment leads to its page of the same suite, where there is one.
    """
    own = {other.notebook: other.document for other in pages if other.suite == page.suite}

    def lead(match: re.Match[str]) -> str:
        section = STAGED / page.notebook.split("/")[0]
        target = posixpath.normpath((section / match[0]).as_posix())
        notebook = posixpath.splitext(posixpath.relpath(target, STAGED.as_posix()))[0]
        return _relative(f"{own[notebook]}.ipynb" if notebook in own else target, page)

    return _LINK.sub(lead, text)


def _relative(target: str, page: Page) -> str:
    return posixpath.relpath(target, posixpath.dirname(page.document))


def _clean(cell: nbformat.NotebookNode, number: int) -> nbformat.NotebookNode:
    """Drop what changes between equal runs: times, counts, identifiers, and what was said on stderr."""
    tags = cell.metadata.get("tags", [])
    cell.metadata = nbformat.from_dict({"tags": tags} if tags else {})
    cell.id = f"cell-{number}"
    cell.source = _printable(cell.source)
    if cell.cell_type == "code":
        cell.execution_count = None
        cell.outputs = [_printable(output) for output in cell.outputs if output.get("name") != "stderr"]
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = None
    return cell


def _printable(value: Any) -> Any:
    """Make what a cell printed fit for a page: terminal colours go, other control characters become signs."""
    if isinstance(value, str):
        return _CONTROL.sub(_sign, _COLOURS.sub("", value))
    if isinstance(value, dict):
        return nbformat.from_dict({key: _printable(item) for key, item in value.items()})
    return [_printable(item) for item in value] if isinstance(value, list) else value


def _sign(match: re.Match[str]) -> str:
    code = ord(match[0])
    return chr(0x2400 + code) if code < 0x20 else "\u2421" if code == 0x7F else "\ufffd"


def _placeholder(page: Page) -> str:
    if page.status == "not applicable":
        return runcard.not_applicable(page.suite, page.job.lacking)
    if page.status == "not run":
        return runcard.without_result(page.notebook, page.suite, "This experiment has not been run.")
    error = read_record(failed(page.job.folder) / "error.json") or {}
    return runcard.without_result(page.notebook, page.suite, f"The last run failed: {error.get('ename', 'error')}.")


def _write(path: Path, content: str) -> None:
    text = content + "\n"
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
