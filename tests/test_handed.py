"""What one notebook hands on to another: stored with its run, part of the other's run key, read in the right order."""

import json

import pytest
import tiny_project
from tiny_project import RECORD, write

import rim_core as rim
from companion import runner, staleness
from rim_core.errors import IdentityError, InputError

SUITE = "tiny.yml"
FIRST, SECOND = "one/01_first", "two/01_second"
CHOOSE = "import rim_core as rim\nrim.hand_on('heads', [(2, n), (2, 7)])"
READ = "import rim_core as rim\nheads = rim.handed_on('one/01_first', 'heads', suite=suite)\nprint(heads)"


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A tiny project as the working directory, one of whose notebooks reads what the other hands on."""
    monkeypatch.setenv("PYTHONPATH", str(tiny_project.REPOSITORY))
    made = tiny_project.make(tmp_path / "project")
    monkeypatch.chdir(made)
    write(made, SECOND, READ)
    write(made, FIRST, CHOOSE)
    return made


def run(*names, overrides=None, **options):
    done = runner.run(staleness.plan(names, SUITE, overrides), **options)
    return [(result.notebook, result.status) for result in done]


def said(root, variant="default"):
    path = root / "results" / "tiny" / SECOND / variant / "notebook.ipynb"
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return "".join(output["text"] for cell in cells for output in cell.get("outputs", []) if "text" in output)


def test_what_is_read_is_made_first_and_a_new_selection_makes_its_readers_stale(root):
    assert run("two") == [(FIRST, "ran"), (SECOND, "ran")]
    assert said(root) == "((2, 3), (2, 7))\n"
    handed = root / "results" / "tiny" / FIRST / "default" / "handed_on.json"
    assert json.loads(handed.read_text()) == {"heads": [[2, 3], [2, 7]]}
    assert rim.handed_on(FIRST, "heads", suite=SUITE) == ((2, 3), (2, 7))
    assert run() == [(FIRST, "up to date"), (SECOND, "up to date")]
    write(root, SECOND, READ, "print(len(heads))")
    assert run() == [(FIRST, "up to date"), (SECOND, "ran")]
    write(root, FIRST, CHOOSE.replace("7", "8"))
    assert [job.state for job in staleness.plan([], SUITE)] == ["stale", "stale"]
    assert run("two") == [(FIRST, "ran"), (SECOND, "ran")]
    assert said(root) == "((2, 3), (2, 8))\n2\n"
    assert run("two", force=True) == [(FIRST, "up to date"), (SECOND, "ran")]


def test_other_parameters_of_the_reader_leave_what_it_reads_as_it_is(root):
    (job,) = staleness.plan(["two"], SUITE, {"n": "5"})
    assert job.row()["needs"] == [FIRST]
    assert run("two", overrides={"n": "5"}) == [(FIRST, "ran"), (SECOND, "ran")]
    assert said(root, job.variant) == "((2, 3), (2, 7))\n"
    assert {place.parent.name for place in (root / "results").rglob("run.json")} == {"default", job.variant}
    # Both at other parameters: the reader reads the selection that was made at the notebook's own all the same.
    done = run(overrides={"n": "6"})
    assert done == [(FIRST, "ran"), (FIRST, "up to date"), (SECOND, "ran")]


def test_where_nothing_was_handed_on_the_reader_is_not_run(root):
    write(root, FIRST, CHOOSE, "1 / 0")
    done = runner.run(staleness.plan([], SUITE))
    assert [result.status for result in done] == ["failed", "failed"]
    assert done[1].reason == f"{FIRST}, which it reads from, failed"
    assert not (root / "results" / "tiny" / SECOND).exists()
    write(root, FIRST, CHOOSE, CHOOSE.replace("7", "8"))
    done = runner.run(staleness.plan([], SUITE))
    assert "'heads' is handed on twice with different values" in done[0].reason
    write(root, FIRST, "print('nothing')")
    done = runner.run(staleness.plan([], SUITE))
    assert f"InputError: {FIRST} hands on nothing named 'heads'; it hands on nothing" in done[1].reason


def test_what_could_not_be_measured_is_not_measured_by_its_readers_either(root):
    write(root, FIRST, "from rim_core.errors import IdentityError\nraise IdentityError('padding does not hold')")
    write(root, SECOND, READ, RECORD)
    claims = root / "book" / "claims" / "paper_a.yml"
    text = claims.read_text(encoding="utf-8")
    own = text.partition("claims:\n")[2].replace("A1", "A2").replace(FIRST, SECOND)
    claims.write_text(text + own, encoding="utf-8")
    assert run() == [(FIRST, "ran"), (SECOND, "ran")]
    (claim,) = json.loads((root / "results" / "tiny" / SECOND / "default" / "claims.json").read_text())
    assert (claim["claim_id"], claim["outcome"]) == ("A2", "not_applicable")
    with pytest.raises(IdentityError, match="could not be measured on this model, and hands on no 'heads'"):
        rim.handed_on(FIRST, "heads", suite=SUITE)


@pytest.mark.parametrize(
    ("first", "second", "told"),
    [
        (READ.replace(FIRST, SECOND), READ, f"{FIRST} reads from itself, by way of {SECOND}"),
        (READ, READ, f"{FIRST} reads from itself, by way of itself"),
        (
            CHOOSE,
            READ.replace("01_first", "01_frist"),
            f"{SECOND} reads what one/01_frist hands on, and there is no such",
        ),
    ],
)
def test_readers_in_a_circle_or_of_nothing_are_told_before_anything_runs(root, first, second, told):
    write(root, FIRST, first)
    write(root, SECOND, second)
    with pytest.raises(InputError, match=told):
        staleness.plan([], SUITE)


def test_without_a_run_the_reader_is_told_what_to_do(root):
    with pytest.raises(InputError, match=f"{FIRST} was not run on suite tiny: rim run {FIRST} --suite tiny.yml"):
        rim.handed_on(FIRST, "heads", suite=SUITE)


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [("", [1], "give a name"), ("x", {1, 2}, "not made of numbers"), ("x", [float("nan")], "not made of numbers")],
)
def test_what_cannot_be_stored_is_refused(name, value, told):
    with pytest.raises(InputError, match=told):
        rim.hand_on(name, value)
