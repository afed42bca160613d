import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_project
from tiny_project import RECORD, rim, write

NO_TORCH = """
import atexit, os, sys
from companion import cli
atexit.register(lambda: "torch" in sys.modules and os._exit(99))
cli.main()
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    made = tiny_project.make(tmp_path / "project")
    write(made, "one/01_first", RECORD)
    return made


def without_torch(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", NO_TORCH, *arguments]
    where = {"cwd": root, "env": tiny_project.environment()}
    return subprocess.run(command, capture_output=True, text=True, check=False, **where)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["run", "--help"],
        ["run", "--list", "--suite", "tiny.yml"],
        ["claims"],
        ["organisms", "list"],
        ["suite", "list"],
        ["suite", "show", "smollm2"],
    ],
)
def test_what_only_tells_needs_no_torch_and_fits_a_screen(root, arguments):
    done = without_torch(root, *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout
    lines = done.stdout.splitlines()
    assert arguments != ["--help"] or len(lines) <= 24
    tables = arguments[-1] in ("--help", "list", "claims")
    assert not tables or max(map(len, lines)) <= 80


def test_run_list_and_claims(root):
    write(root, "one/02_bad", "1 / 0")
    done = rim(root, "run", "--suite", "tiny.yml")
    assert (done.returncode, done.stdout) == (1, "")
    counted, why, last = done.stderr.splitlines()[-3:]
    assert counted == "2 notebooks: 1 failed, 1 ran"
    assert why.startswith("  failed: one/02_bad: cell 3: ZeroDivisionError: division by zero; see results/")
    assert last == "rim: 1 of 2 notebooks failed: one/02_bad"
    assert "Traceback" not in done.stderr
    listed = rim(root, "run", "--list", "--suite", "tiny.yml").stdout
    assert re.search(r"one/01_first +up to date +A tiny notebook", listed)
    assert re.search(r"one/02_bad +failed", listed)
    assert "list[int]" in rim(root, "run", "--list", "--suite", "tiny.yml", "one/01_first").stdout
    told = rim(root, "claims", "--suite", "tiny.yml").stdout
    assert re.fullmatch(r"paper_a A1  tiny  ✓ holds  ✓ reproduced  0.91 \[[\d., ]+\]\nin all: 1 holds\n", told)
    told = rim(root, "claims", "--suite", "tiny.yml", "--why").stdout
    assert "    The number is large.\n    number 0.91" in told
    assert "; published: 0.9" in told
    (row,) = json.loads(rim(root, "claims", "--json").stdout)
    assert (row["claim"], row["suite"], row["outcome"]) == ("A1", "tiny", "holds")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--suite", "smolm2"], "rim: unknown suite 'smolm2' (did you mean 'smollm2'?); suites: "),
        (["run", "--suite", "none.yml"], "rim: suite none.yml: there is no such file"),
        (["run", "one/01_frst", "--suite", "tiny.yml"], "rim: unknown notebook 'one/01_frst' (did you mean"),
        (["run", "--suite", "tiny.yml", "-p", "n"], "rim: -p n: write it as key=value"),
        (["run", "--suite", "tiny.yml", "-p", "n=x"], "rim: notebook one/01_first: parameter n: 'x' is not"),
        (["run", "--nonsense"], "rim: unrecognized arguments: --nonsense; rim --help"),
        (["rum"], "rim: argument COMMAND: invalid choice: 'rum'"),
        (["claims", "--suite", "x"], "rim: unknown suite 'x'"),
        (["organisms", "list", "--suite", "x"], "rim: unknown suite 'x'"),
    ],
)
def test_a_mistake_is_one_line_and_exit_2(root, arguments, message):
    done = rim(root, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(message)
    assert done.stderr.count("\n") == 1


def test_outside_a_project_one_line_says_so(tmp_path):
    done = rim(tmp_path, "run", "--list", RIM_PROJECT=str(tmp_path))
    assert done.returncode == 2
    assert done.stderr.startswith("rim: RIM_PROJECT: ")


def test_what_runs_no_notebook_needs_no_torch(root):
    def told(*arguments):
        done = without_torch(root, *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    assert '"to run"' in told("run", "--plan", "--suite", "tiny.yml")
    rim(root, "run", "--suite", "tiny.yml")
    assert "up to date" in told("run", "--suite", "tiny.yml")
    assert "up to date" in told("run", "--plan", "--suite", "tiny.yml")
    assert "holds" in told("claims")


def test_a_reader_that_goes_away_is_no_error(root):
    command = [sys.executable, "-c", tiny_project.COMMAND, "claims"]
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as out:
        where = {"cwd": root, "env": tiny_project.environment(), "stdout": out}
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False, **where)
    assert done.stderr == ""
