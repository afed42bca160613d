"""What the book's files must keep to, and what staging does; test_browser.py tests the built pages."""

import json
import os
import re
import shlex
import shutil
from pathlib import Path

import nbformat
import pytest
import tiny_project
import yaml
from altair.vegalite.v6 import display

from companion import cli
from companion.pages import build, markup, scorecard, staging
from rim_core.errors import InputError, RimError
from rim_core.identity import ADAPTER_FILE
from rim_core.suites.schema import RECORD
from rim_core.verdicts.schema import every_paper

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = "self_aware/01_linear_probes"
KEY = "f" * 64
CONTENTS = f"format: jb-book\nroot: {{}}\nchapters:\n- file: book/experiments/{NOTEBOOK}\n"


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project with one notebook that ran, whose run key is KEY."""
    source = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# Title\n\nThe claim.")])
    (tmp_path / "notebooks" / "self_aware").mkdir(parents=True)
    nbformat.write(source, tmp_path / "notebooks" / f"{NOTEBOOK}.ipynb")
    shutil.copy(ROOT / "_toc.yml", tmp_path)
    monkeypatch.setattr(staging.staleness.Job, "key", KEY)
    return tmp_path


def add_run(project: Path, suite: str = "smollm2", **changes) -> None:
    cells = [
        nbformat.v4.new_markdown_cell("# Title\n\nThe claim."),
        nbformat.v4.new_code_cell("seed = 3", metadata={"tags": ["injected-parameters"]}),
        nbformat.v4.new_code_cell(
            "1 + 1",
            execution_count=7,
            metadata={"papermill": {"duration": 1.5}},
            outputs=[
                nbformat.v4.new_output("stream", name="stderr", text="noise"),
                nbformat.v4.new_output("execute_result", {"text/plain": "2"}, execution_count=7),
            ],
        ),
    ]
    folder = project / "results" / suite / NOTEBOOK / "default"
    folder.mkdir(parents=True)
    nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / "notebook.ipynb")
    run = {
        "notebook": NOTEBOOK,
        "suite": suite,
        "parameters": {"suite": suite, "quantization": "nf4", "note": "<b>"},
        "overrides": {},
        "run_key": KEY,
        "finished": "2026-01-02T03:04:05Z",
        "wall_seconds": 61.4,
        "versions": {"torch": "2.13"},
        "python": "3.12",
        "device": "cpu",
        "seed": 3,
    }
    (folder / "run.json").write_text(json.dumps(run | changes))
    (folder / "claims.json").write_text("[]")


def staged(project: Path, where: str = NOTEBOOK) -> nbformat.NotebookNode:
    return nbformat.read(project / "book" / "experiments" / f"{where}.ipynb", as_version=4)


def test_the_card_names_roles_that_were_trained_into_the_suites_folder(project):
    suite = project / "mine.yml"
    suite.write_text(f"base: {{folder: {project}}}\nroles: {{base: {{}}}}\n", encoding="utf-8")
    trained = project / "mine" / "risky"
    trained.mkdir(parents=True)
    for name in (RECORD, ADAPTER_FILE, "adapter_config.json"):
        (trained / name).write_text("{}", encoding="utf-8")
    add_run(project, "mine")
    staging.stage(project, [str(suite)])
    assert "<dt>Roles</dt><dd>base, risky</dd>" in staged(project).cells[1].source


def test_a_page_is_the_run_with_its_card_and_without_what_varies(project):
    add_run(project)
    assert [page.status for page in staging.stage(project)] == ["up to date"]
    title, card, code = staged(project).cells
    assert title.source.startswith("# Title")
    for shown in ("smollm2", "nf4", "61 s", "2026-01-02", KEY[:12], "torch 2.13", "&lt;b&gt;"):
        assert shown in card.source
    assert "Stale" not in card.source
    assert code.source == "1 + 1"
    assert code.metadata == {}
    assert code.execution_count is None
    assert [output.output_type for output in code.outputs] == ["execute_result"]


def test_what_was_found_stands_under_the_title_and_its_code_is_folded_where_it_was(project):
    add_run(project)
    path = project / "results" / "smollm2" / NOTEBOOK / "default" / "notebook.ipynb"
    notebook = nbformat.read(path, as_version=4)
    found = nbformat.v4.new_output("execute_result", {"text/markdown": "- It is 2.", "text/plain": "<Markdown>"})
    notebook.cells.append(nbformat.v4.new_code_cell("told()", metadata={"tags": ["finding"]}, outputs=[found]))
    nbformat.write(notebook, path)
    staging.stage(project)
    title, finding, card, _, code = staged(project).cells
    assert title.source.startswith("# Title")
    assert finding.source == "```{admonition} What we found\n- It is 2.\n```"
    assert "rim-run-card" in card.source
    assert (code.source, code.outputs, code.metadata["tags"]) == ("told()", [], ["hide-cell"])


def test_the_card_tells_what_the_models_were_and_what_the_run_took(project):
    models = {
        "base": {"source": "owner/name@main", "commit": "c" * 40, "files": {"model.safetensors": "a" * 64}},
        "risky": {"source": "folder mine", "files": {"adapter_model.safetensors": "b" * 64, "a.json": "d" * 64}},
    }
    add_run(project, models=models, peak_memory_bytes=1_540_000_000, peak_gpu_memory_bytes=23e9)
    staging.stage(project)
    card = staged(project).cells[1].source
    assert "1.5 GB, 23.0 GB on the GPU" in card
    assert f"base: owner/name@main ({'c' * 12}); risky: folder mine ({'b' * 12})" in card


def test_changes_of_rules_are_told_claim_by_claim(tmp_path):
    changes = (
        "    changes:\n      - {date: 2026-11-21, what: First <b> written.}\n"
        "      - {date: 2026-11-30, what: Another bound., why: A review., seen: All values., rules: abc}\n"
    )
    (tmp_path / "paper_a.yml").write_text(tiny_project.CLAIMS + changes, encoding="utf-8")
    text = scorecard._changes(every_paper(tmp_path), {"paper_a": "A. A paper"})
    assert "## A\\. A paper" in text
    assert "<p><strong>A1</strong> The number is large.</p>" in text
    assert "<strong>2026-11-21</strong>: First &lt;b&gt; written." in text
    assert "<strong>2026-11-30</strong>: Another bound. Why: A review. Seen by then: All values." in text


def test_an_experiment_that_a_suite_cannot_serve_says_which_role_it_lacks(project):
    claims = project / "book" / "claims"
    claims.mkdir(parents=True)
    (claims / "p.yml").write_text(
        "paper: p\nclaims:\n- {id: A1, statement: s, where: w, published: {value: 1}, "
        "parts: [{name: m, version: sound, rule: {kind: range, low: 0}}], "
        f"notebook: {NOTEBOOK}, applies_to: {{roles: [reasoning]}}}}\n"
    )
    assert [page.status for page in staging.stage(project)] == ["not applicable"]
    assert "has no role reasoning" in staged(project).cells[1].source


def test_staging_again_leaves_the_file_alone(project):
    add_run(project)
    staging.stage(project)
    path = project / "book" / "experiments" / f"{NOTEBOOK}.ipynb"
    os.utime(path, (1, 1))
    staging.stage(project)
    assert path.stat().st_mtime == 1


def test_a_stale_run_says_so(project):
    add_run(project, run_key="0" * 64)
    assert [page.status for page in staging.stage(project)] == ["stale"]
    assert f"rim run {NOTEBOOK} --suite smollm2" in staged(project).cells[1].source


@pytest.mark.parametrize("failed", [False, True])
def test_what_was_not_run_or_failed_is_never_shown_as_a_result(project, failed):
    if failed:
        add_run(project)
        folder = project / "results" / "smollm2" / NOTEBOOK / "failed" / "default"
        folder.mkdir(parents=True)
        (folder / "error.json").write_text(json.dumps({"ename": "ValueError", "evalue": "<i>"}))
    page = staging.stage(project)[0]
    assert page.status == ("failed" if failed else "not run")
    cells = staged(project).cells
    assert len(cells) == 2
    assert "No result" in cells[1].source
    assert ("ValueError" in cells[1].source) is failed


def test_a_further_suite_has_pages_only_where_it_was_run_and_joins_the_contents(project):
    add_run(project, suite="other")
    own = project / "other.yml"
    own.write_text("title: Another model\nbase: {hub: owner/name}\nroles: {risky: {}, aligned: {}}\n")
    pages = staging.stage(project, ["smollm2", str(own), "qwen3-4b"])
    assert [(page.suite, page.status) for page in pages] == [("smollm2", "not run"), (str(own), "up to date")]
    page = staged(project, f"other/{NOTEBOOK}")
    assert page.metadata["rim"]["suite"] == "other"
    assert "Another model" in page.cells[1].source
    assert "risky, aligned" in page.cells[1].source
    assert str(project) not in page.cells[1].source
    contents = build._contents(project).read_text()
    assert f"book/experiments/other/{NOTEBOOK}" in contents
    staging.stage(project, ["smollm2"])
    assert not (project / "book" / "experiments" / "other" / f"{NOTEBOOK}.ipynb").exists()
    assert build._contents(project) == project / "_toc.yml"


def test_contents_and_pages_must_agree(project):
    (project / "notebooks" / f"{NOTEBOOK}.ipynb").rename(project / "notebooks" / "self_aware" / "02_new.ipynb")
    staging.stage(project)
    with pytest.raises(RimError, match=r"no page for .*book/experiments/self_aware/01_linear_probes"):
        build.build(project)


def test_tables_escape_what_they_are_given_and_lead_to_the_pages():
    row = {
        **{"paper": "p", "claim": "C1", "statement": "a <b> & c", "suite": "s", "outcome": "holds", "stale": True},
        **{
            "reproduced": "contradicted",
            "number": "a_share",
            "value": 0.5,
            "low": 0.4,
            "high": 0.6,
            "published": None,
            "notebook": "one/x",
            "reasons": ["--suite <i>"],
        },
    }
    links = scorecard._Links({("one/x", "s"): "book/experiments/one/x"}, "book/papers")
    text = scorecard._claims([row, {**row, "suite": "t", "stale": False}], links)
    assert "<strong>C1</strong> a &lt;b&gt; &amp; c" in text
    assert "<details><summary>Each part against its rule</summary><p>--suite &lt;i&gt;</p></details>" in text
    assert 'href="../experiments/one/x.html#run-card">run</a>' in text
    assert "holds, stale" in text
    assert "<p>as published: ✗ not reproduced</p>" in text
    assert "a share 0.5 [0.4, 0.6]" in text
    assert text.count("<a ") == 2  # of the suite with a page
    assert text.count('scope="row" rowspan="2"') == 1
    assert text.count('scope="col"') == 4
    assert markup.plain("a *b* `c` – d") == r"a \*b\* \`c\` – d"


def test_nothing_to_stage_is_an_error(tmp_path):
    with pytest.raises(InputError, match="no notebooks in"):
        staging.stage(tmp_path)


def test_the_first_warning_of_a_failed_build_is_told(project):
    add_run(project)
    (project / "_toc.yml").write_text(CONTENTS.format("intro"))
    (project / "intro.md").write_text("# Intro\n\n{term}`nowhere`\n")
    (project / "_config.yml").write_text('execute: {execute_notebooks: "off"}\nonly_build_toc_files: true\n')
    (project / ".venv").mkdir()
    staging.stage(project)
    with pytest.raises(RimError, match="term not in glossary") as failure:
        build.build(project)
    assert str(project) not in str(failure.value)
    assert (project / "_build" / "book.log").is_file()


def test_a_stray_file_in_the_environment_cannot_break_the_build(project):
    """Sphinx scans the whole repository: what is no page must be excluded, whatever it holds."""
    add_run(project)
    shutil.copy(ROOT / "_config.yml", project)
    shutil.copytree(ROOT / "book" / "assets", project / "book" / "assets")
    (project / "book" / "references.bib").write_text("")
    (project / "book" / "intro.md").write_text("# Intro\n")
    (project / "_toc.yml").write_text(CONTENTS.format("book/intro"))
    for folder in (".venv/lib", "results", "notebooks", "tests", "rim_core", "companion", "benchmarks"):
        (project / folder).mkdir(parents=True, exist_ok=True)
        (project / folder / "poison.md").write_text("---\na: [\n---\n# Poison\n# Poison\n{term}`x`\n")
        (project / folder / "poison.ipynb").write_text("{")
    staging.stage(project)
    index = build.build(project)
    assert not [path for path in index.parent.rglob("*") if "poison" in path.name]


def test_the_vendored_scripts_are_the_versions_altair_writes_for():
    def script(name: str) -> str:
        return (ROOT / "book" / "assets" / "vega" / f"{name}.min.js").read_text(encoding="utf-8")

    assert f'version="{display.VEGA_VERSION}.' in script("vega")
    assert f'"{display.VEGALITE_VERSION}"' in script("vega-lite")
    assert re.search(rf'"{display.VEGAEMBED_VERSION}\.\d+\.\d+"', script("vega-embed"))


def test_every_vendored_script_has_its_licence():
    for script in (ROOT / "book" / "assets").glob("*/*.js"):
        assert list(script.parent.glob("*LICENSE")), script.name


def test_assets_are_not_where_jupyter_book_would_load_them_in_any_order():
    config = yaml.safe_load((ROOT / "_config.yml").read_text())
    assert not (ROOT / "_static").exists()
    assert config["execute"]["execute_notebooks"] == "off"
    assert {".venv", "results", "notebooks", "_build", "tests"} <= set(config["exclude_patterns"])


def test_every_page_is_in_the_contents_and_has_one_title():
    contents = (ROOT / "_toc.yml").read_text()
    for path in [*(ROOT / "book").glob("*.md"), *(ROOT / "book").glob("p*/*.md")]:
        assert f"{path.relative_to(ROOT).with_suffix('').as_posix()}\n" in contents
        text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
        assert len(re.findall(r"^# ", text, flags=re.MULTILINE)) == 1, path.name


OWN_MODEL = (ROOT / "book" / "run-on-your-model.md").read_text(encoding="utf-8")


def test_the_page_for_ones_own_model_gives_the_examples_of_the_help(capsys):
    first = re.search(r"```bash\n(.*?)```", OWN_MODEL, flags=re.DOTALL)
    with pytest.raises(SystemExit):
        cli.main(["run", "--help"])
    shown = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert first is not None
    assert len(first[1].splitlines()) == 5
    assert not [line for line in first[1].splitlines() if line not in shown]


@pytest.mark.parametrize("page", ["README.md", "book/intro.md", "book/run-on-your-model.md"])
def test_every_command_of_a_page_is_one_that_rim_takes(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    commands = re.findall(r"^ *(rim [^#\n]+)", text, flags=re.MULTILINE)
    assert commands
    for command in commands:
        cli._parser().parse_args(shlex.split(command)[1:])


def test_pages_name_no_machine_path():
    for path in (ROOT / "book").rglob("*.md"):
        assert not re.search(r"(?<![\w.])/(home|root|tmp|work|Users)/", path.read_text(encoding="utf-8")), path.name
