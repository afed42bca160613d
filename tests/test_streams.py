"""What is printed, where it cannot be: closed, full and narrow streams, and control characters in a page."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_project
from tiny_project import RECORD, rim, write


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    made = tiny_project.make(tmp_path_factory.mktemp("streams") / "project")
    write(made, "one/01_first", RECORD)
    assert rim(made, "run", "--suite", "tiny.yml").returncode == 0
    return made


def shell(root: Path, line: str, **extra: str) -> subprocess.CompletedProcess[bytes]:
    """Run a line of shell in which `rim` is the command."""
    (root / "command.py").write_text(tiny_project.COMMAND, encoding="utf-8")
    line = line.replace("rim ", f"{sys.executable} command.py ", 1)
    where = {"cwd": root, "env": tiny_project.environment(**extra)}
    return subprocess.run(["bash", "-c", line], capture_output=True, check=False, **where)


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "cp1252", "utf-8"])
def test_characters_that_the_output_cannot_write_are_escaped(root, encoding):
    done = shell(root, "rim claims --suite tiny.yml", PYTHONIOENCODING=encoding)
    assert (done.returncode, done.stderr) == (0, b"")
    shown = "\u2713" if encoding == "utf-8" else "\\u2713"
    assert f"paper_a A1  tiny  {shown} holds" in done.stdout.decode(encoding)
    (row,) = json.loads(shell(root, "rim claims --json", PYTHONIOENCODING=encoding).stdout.decode(encoding))
    assert row["outcome"] == "holds"


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("rim claims >&-", "Bad file descriptor"),
        ("rim claims > /dev/full", "No space left on device"),
        ("rim claims --json > /dev/full", "No space left on device"),
        ("rim run --list --suite tiny.yml >&-", "Bad file descriptor"),
        ("rim --help > /dev/full", "No space left on device"),
    ],
)
def test_a_result_that_cannot_be_written_is_a_failure_in_one_line(root, line, why):
    done = shell(root, line)
    assert (done.returncode, done.stderr.decode()) == (1, f"rim: cannot write to standard output: {why}\n")


@pytest.mark.parametrize("where", ["2>&-", "2>/dev/full", ">&- 2>&-", "<&- >&- 2>&-"])
def test_a_run_that_nobody_can_be_told_of_runs_all_the_same(root, where):
    run = root / "results/tiny/one/01_first/default/run.json"
    before = run.stat().st_mtime_ns
    done = shell(root, f"rim run --force --suite tiny.yml {where}")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert run.stat().st_mtime_ns > before


def test_a_slip_that_nobody_can_be_told_of_has_its_status(root):
    assert shell(root, "rim run --suite nowhere 2>&-").returncode == 2
    assert shell(root, "rim run --nonsense 2>/dev/full").returncode == 2


def test_a_reader_that_goes_away_is_no_error(root):
    done = shell(root, "set -o pipefail; rim claims | true; exit ${PIPESTATUS[0]}")
    assert done.stderr == b""
    assert done.returncode in (0, 141)  # 0 where the reader is still there as it is written
    assert os.devnull


# --- what is in results --------------------------------------------------------------------------------


@pytest.fixture
def copy(root, tmp_path) -> Path:
    """A copy of the project as it was run."""
    return Path(shutil.copytree(root, tmp_path / "copy"))


def test_a_stale_run_is_shown_as_stale_and_never_counted_as_current(copy):
    told = rim(copy, "claims", "--suite", "tiny.yml").stdout
    assert "stale" not in told
    assert told.endswith("in all: 1 holds\n")
    write(copy, "one/01_first", RECORD, "print('another cell')")
    told = rim(copy, "claims", "--suite", "tiny.yml").stdout
    assert told.startswith("paper_a A1  tiny  \u2713 holds *  \u2713 reproduced  0.91 [")
    assert told.endswith("in all: 1 holds; 1 of them stale (*)\n")
    told = rim(copy, "claims", "--why", "--suite", "tiny.yml").stdout
    assert "    Stale: what the run rests on has changed since; rim run one/01_first --suite tiny" in told
    (row,) = json.loads(rim(copy, "claims", "--json", "--suite", "tiny.yml").stdout)
    assert (row["outcome"], row["stale"]) == ("holds", True)
    # Without its file a suite's models are not known.
    (row,) = json.loads(rim(copy, "claims", "--json").stdout)
    assert row["stale"] is None


OFFLINE = """
import logging, time
from huggingface_hub import constants
from rim_core.suites import checkpoints
from rim_core import prompts
from rim_core.errors import InputError
import rim_core as rim
calls = {
    "model": lambda: rim.load("nobody/nothing", quantization=None),
    "small files": lambda: checkpoints.read_checkpoint("nobody/nothing"),
    "fetch": lambda: checkpoints.locate("nobody/nothing", "files"),
    "data set": lambda: rim.load_prompts("hub:nobody/nothing"),
}
for name, call in calls.items():
    began = time.monotonic()
    try:
        call()
    except InputError as error:
        print(name, time.monotonic() - began < 15, constants.HF_HUB_OFFLINE, "\\n" in str(error))
"""


def test_without_a_network_the_hub_is_given_up_at_once(tmp_path):
    """A proxy that nothing listens at stands for the network that is not there."""
    proxies = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), "http://127.0.0.1:9")
    extra = {**proxies, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path), "NO_PROXY": "", "no_proxy": ""}
    where = {"cwd": tmp_path, "env": tiny_project.environment(**extra)}
    done = subprocess.run([sys.executable, "-c", OFFLINE], capture_output=True, text=True, check=False, **where)
    lines = [line.rsplit(" ", 3) for line in done.stdout.splitlines()]
    assert lines == [[name, "True", "False", "False"] for name in ("model", "small files", "fetch", "data set")], (
        done.stderr
    )
    assert "Retrying" not in done.stderr


@pytest.mark.parametrize("text", ["[]", "{}", "null", "not json", "[" * 100_000, '{"run_key": 3}'])
def test_a_record_that_is_none_counts_as_no_run(copy, text, monkeypatch, capsys):
    from companion import folders, outcomes, staleness

    (copy / "results/tiny/one/01_first/default/run.json").write_text(text, encoding="utf-8")
    monkeypatch.chdir(copy)
    (row,) = outcomes.scorecard(copy, ["tiny.yml"])
    assert (row["outcome"], row["run_key"], row["stale"]) == ("not_tested", None, False)
    assert capsys.readouterr().err == (
        "rim: results/tiny/one/01_first/default/run.json is no record of a run, and counts as none; run that "
        "notebook again\n"
    )
    (job,) = staleness.plan([], "tiny.yml")
    assert (job.state, job.status) == ("not run", "to run")
    folders._tell_of.cache_clear()


def test_control_characters_of_a_cell_become_signs_on_its_page(copy):
    from companion.pages import staging

    path = copy / "results/tiny/one/01_first/default/notebook.ipynb"
    data = json.loads(path.read_text(encoding="utf-8"))
    text = "\x1b[31mred\x1b[0m \x1b] \x00\x07\x9b \ud800 tab\tend\r\n"
    data["cells"][-1]["outputs"] = [
        {"output_type": "stream", "name": "stdout", "text": [text]},
        {"output_type": "display_data", "metadata": {}, "data": {"text/plain": text, "text/html": text}},
    ]
    path.write_text(json.dumps(data), encoding="utf-8")
    where = os.getcwd()
    os.chdir(copy)
    try:
        staging.stage(copy, ["tiny.yml"])
    finally:
        os.chdir(where)
    page = json.loads((copy / "book/experiments/one/01_first.ipynb").read_text(encoding="utf-8"))
    stream, shown = page["cells"][-1]["outputs"]
    printed = "red \u241b] \u2400\u2407\ufffd \ufffd tab\tend\r\n"
    assert "".join(stream["text"]) == printed
    assert {kind: "".join(value) for kind, value in shown["data"].items()} == {
        "text/plain": printed,
        "text/html": printed,
    }


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "--suite", "s" * 251],
        ["run", "--suite", "s" * 251 + ".yml"],
        ["run", "--suite", "s" * 300 + ".yml"],
        ["run", "--suite", "nul\x00.yml"],
        ["suite", "new", "s" * 251, "--base", "nowhere"],
        ["claims", "--suite", "s" * 251],
    ],
)
def test_a_name_that_is_too_long_is_one_line(copy, arguments, monkeypatch, capsys):
    from companion import cli

    monkeypatch.chdir(copy)
    (copy / f"{'s' * 251}.yml").write_text(tiny_project.SUITE, encoding="utf-8")
    assert cli._main(arguments) == 2
    told = capsys.readouterr().err
    assert told.startswith("rim: ")
    assert told.count("\n") == 1
    assert len(told) < 600
