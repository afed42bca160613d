"""What is printed, where it cannot be: closed, full and narrow streams, and control characters in a page."""

import json
import os
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
    assert f"paper_a A1  tiny  {shown} validated" in done.stdout.decode(encoding)
    (row,) = json.loads(shell(root, "rim claims --json", PYTHONIOENCODING=encoding).stdout.decode(encoding))
    assert row["outcome"] == "validated"


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
