import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import tiny_project
from tiny_project import RECORD, kernels, leftovers, wait_for, write

from companion import execution, forking, notebooks, outcomes, runner, staleness
from rim_core import identity, paths
from rim_core.errors import InputError, RimError

SUITE = "tiny.yml"
SHOW = "print(os.getcwd(), sys.prefix, os.environ['MY_TOKEN']); warnings.warn('told with its path')"


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny project as the working directory."""
    monkeypatch.setenv("PYTHONPATH", str(tiny_project.REPOSITORY))
    made = tiny_project.make(tmp_path / "a project")
    monkeypatch.chdir(made)
    return made


def result_of(root: Path, name: str = "one/01_first", variant: str = "default") -> Path:
    return root / "results" / "tiny" / name / variant


def run(names: Any = (), overrides: Any = None, **options: Any) -> list[runner.Result]:
    return runner.run(staleness.plan(names, SUITE, overrides), **options)


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def output_texts(root: Path, name: str) -> list[str]:
    cells = read(result_of(root, name) / "notebook.ipynb")["cells"]
    return [output["text"] for cell in cells for output in cell.get("outputs", []) if "text" in output]


# --- results --------------------------------------------------------------------------------------------


def test_a_run_leaves_notebook_record_and_claims_and_is_not_repeated(root, capfd, monkeypatch):
    write(root, "one/01_first", RECORD, "import os, sys, warnings", SHOW)
    monkeypatch.setenv("MY_TOKEN", "not-to-be-seen")
    (done,) = run()
    assert (done.status, [c["outcome"] for c in done.claims]) == ("ran", ["holds"])
    folder = result_of(root)
    assert sorted(p.name for p in folder.iterdir()) == ["claims.json", "notebook.ipynb", "run.json"]
    record, (claim,) = read(folder / "run.json"), read(folder / "claims.json")
    assert record["parameters"] == {"suite": "tiny", "n": 3, "rate": 0.5, "layers": [1, 2]}
    assert (record["status"], record["device"], record["overrides"]) == ("ok", "cpu", {})
    assert (claim["claim_id"], claim["suite"], claim["run_key"]) == ("A1", "tiny", record["run_key"])
    (job,) = staleness.plan([], SUITE)
    assert (job.key, job.parts) == (record["run_key"], record["key_parts"])
    assert (job.state, job.folder) == ("up to date", folder)
    for path in folder.iterdir():
        text = path.read_text(encoding="utf-8")
        assert str(root) not in text
        assert sys.prefix not in text
        assert "ipykernel_" not in text
        assert "not-to-be-seen" not in text
    assert leftovers(root) == []
    said = capfd.readouterr()
    assert "claims: 1 holds" in said.err
    assert said.out == ""
    assert not [line for line in said.err.splitlines() if not line.startswith("[1/1] one/01_first")]

    assert run()[0].status == "up to date"
    assert run(force=True)[0].status == "ran"


def test_overrides_have_a_folder_of_their_own_and_reach_the_notebook(root):
    write(root, "one/01_first", "print(n, rate, layers, suite)")
    run(["one"], {"n": "3", "rate": "2", "layers": "[4, 5]"})
    overrides = {"rate": 2.0, "layers": [4, 5]}  # n is the notebook's own value, so no override
    (job,) = staleness.plan([], SUITE, overrides)
    folder = result_of(root, variant=job.variant)
    assert folder.name.startswith("p-")
    assert read(folder / "run.json")["overrides"] == overrides
    outputs = [out for cell in read(folder / "notebook.ipynb")["cells"] for out in cell.get("outputs", [])]
    assert outputs[0]["text"] == "3 2.0 [4, 5] tiny.yml\n"
    assert not result_of(root).exists()


def test_a_notebook_that_fails_is_kept_apart_and_does_not_stop_the_others(root, capfd):
    write(root, "one/01_first", "1 / 0")
    write(root, "one/02_second", "print('fine')")
    assert [r.status for r in run()] == ["failed", "ran"]
    failed = result_of(root, variant="failed") / "default"
    assert sorted(p.name for p in failed.iterdir()) == ["error.json", "notebook.ipynb"]
    error = read(failed / "error.json")
    assert (error["ename"], error["cell"]) == ("ZeroDivisionError", 3)
    assert not result_of(root).exists()
    assert "cell 3: ZeroDivisionError: division by zero; see results/tiny" in capfd.readouterr().err
    write(root, "one/01_first", "print('mended')")
    assert [r.status for r in run()] == ["ran", "up to date"]
    assert not failed.exists()


def test_a_kernel_that_dies_fails_its_notebook_in_plain_words(root):
    write(root, "one/01_first", "import os; os.kill(os.getpid(), 9)")
    (result,) = run()
    assert result.status == "failed"
    assert "the kernel died in this cell; most often the machine ran out of memory" in result.reason
    assert read(result_of(root, variant="failed") / "default" / "notebook.ipynb")["cells"]


def test_a_kernel_that_does_not_start_says_its_last_words(root, monkeypatch):
    write(root, "one/01_first", "print(1)")
    monkeypatch.setitem(execution._KERNEL_SETTINGS, "PYTHONPATH", str(root / "broken"))
    (root / "broken").mkdir()
    (root / "broken" / "ipykernel_launcher.py").write_text("raise ImportError('no such library')")
    (result,) = run()
    assert result.reason.startswith("KernelStartError: the kernel did not start: ImportError: no such library; see ")


# --- forked kernels -------------------------------------------------------------------------------------

needs_fork = pytest.mark.skipif(not forking.possible(), reason="kernels are forked on Linux without a GPU")
LOADS = "# as a notebook does that says rim.load("


def forked(root: Path) -> list[psutil.Process]:
    """The process that kernels are forked from, and the kernels."""
    found = psutil.process_iter(["cmdline", "cwd"])
    return [p for p in found if "companion.forking" in (p.info["cmdline"] or []) and p.info["cwd"] == str(root)]


@needs_fork
def test_notebooks_on_models_are_forked_from_one_process_and_share_nothing_else(root, monkeypatch):
    monkeypatch.setattr(forking, "LIBRARIES", ("colorsys", "no_such_library"))
    asking = "import os, sys; print(os.getppid(), os.getcwd(), 'colorsys' in sys.modules, hasattr(sys, 'left'))"
    write(root, "one/01_first", LOADS, RECORD, asking, "sys.left = 1; print(os.environ['PYTHONHASHSEED'])")
    write(root, "one/02_dies", LOADS, "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    write(root, "one/03_fails", LOADS, "1 / 0")
    write(root, "one/04_last", LOADS, asking)
    write(root, "two/01_no_model", "print('fine')")
    done = run()
    assert [result.status for result in done] == ["ran", "failed", "failed", "ran", "ran"]
    assert [claim["outcome"] for claim in done[0].claims] == ["holds"]
    assert "the kernel died in this cell of SIGSEGV" in done[1].reason
    assert "cell 4: ZeroDivisionError" in done[2].reason
    said = [output_texts(root, name) for name in ("one/01_first", "one/04_last")]
    assert said[0][-2:] == [said[1][0], "0\n"]
    assert said[1][0].split()[1:] == [".", "True", "False"]
    assert read(result_of(root) / "run.json")["peak_memory_bytes"] > 1e6
    assert forked(root) == []


@needs_fork
def test_what_is_loaded_beforehand_does_not_look_for_a_notebook():
    """pandas shows tables otherwise in a terminal."""
    loaded = f"import sys, {', '.join(forking.LIBRARIES)}; sys.exit('pandas' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", loaded], check=False).returncode == 0


@needs_fork
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_no_forked_kernel_outlives_its_run(root, number, status, monkeypatch):
    write(root, "one/01_first", LOADS)
    write(root, "one/02_second", LOADS, "open('reached', 'w').close()\nimport time\ntime.sleep(600)")
    command = f"from companion import forking; forking.LIBRARIES = (); {tiny_project.COMMAND}"
    monkeypatch.setattr(tiny_project, "COMMAND", command)
    process = tiny_project.start(root, "run", "--suite", SUITE)
    wait_for((root / "reached").exists)
    assert len(forked(root)) == 2
    process.send_signal(number)
    _, told = process.communicate(timeout=120)
    assert process.returncode == status, told
    wait_for(lambda: not forked(root), 10)
    assert result_of(root).exists()


def test_what_a_model_cannot_be_measured_by_makes_no_error_of_the_other_claims(root):
    claims = root / "book" / "claims" / "paper_a.yml"
    second = tiny_project.CLAIMS[tiny_project.CLAIMS.index("  - id: A1") :].replace("A1", "A2")
    claims.write_text(tiny_project.CLAIMS + second, encoding="utf-8")
    refuses = "from rim_core.errors import IdentityError\nraise IdentityError('patch: the cache changes the numbers')"
    write(root, "one/01_first", RECORD, refuses, "never = 1")
    (result,) = run()
    assert result.status == "ran"
    first, other = outcomes.rows(root / "results", ["tiny.yml"])
    assert (first["claim"], first["outcome"]) == ("A1", "holds")
    assert (other["claim"], other["outcome"], other["reproduced"]) == ("A2", "not_applicable", "not_applicable")
    assert other["reason"] == "this model cannot be measured so: patch: the cache changes the numbers"
    page = read(result_of(root) / "notebook.ipynb")
    assert "patch: the cache changes the numbers" in "".join(page["cells"][-1]["source"])
    assert not [out for cell in page["cells"] for out in cell.get("outputs", []) if out["output_type"] == "error"]
    assert "never" not in json.dumps(page)
    assert [each.status for each in run()] == ["up to date"]


def test_a_claim_recorded_in_two_ways_fails(root):
    write(root, "one/01_first", RECORD, RECORD.replace("0.9,", "0.8,"))
    (result,) = run()
    assert "claim A1 is recorded twice with different outcomes" in result.reason


def test_a_notebook_whose_claims_all_lack_a_role_is_not_run(root):
    write(root, "one/01_first", "1 / 0")
    claims = tiny_project.CLAIMS.replace("[base]", "[risky]")
    (root / "book" / "claims" / "paper_a.yml").write_text(claims, encoding="utf-8")
    (result,) = run()
    assert (result.status, result.reason) == ("not applicable", "suite tiny has no role risky")


# --- run keys -------------------------------------------------------------------------------------------


def test_the_run_key_follows_what_a_result_depends_on_and_nothing_else(root, tmp_path, monkeypatch):
    package = tmp_path / "package"
    (package / "__pycache__").mkdir(parents=True)
    (package / "probes.py").write_text("a", encoding="utf-8")
    monkeypatch.setattr(paths, "PACKAGE", package)
    path = write(root, "one/01_first", "print(1)")
    seen = []

    def changed(part: str | None) -> None:
        (job,) = staleness.plan(["one/01_first"], SUITE, overrides)
        key, parts = job.key, job.parts
        if seen:
            before, parts_before = seen[-1]
            assert {p for p in parts if parts[p] != parts_before[p]} == ({part} if part else set())
            assert (key != before) == (part is not None)
        seen.append((key, parts))

    overrides: dict[str, Any] = {}
    changed(None)
    data = read(path)
    data["cells"][2] |= {"outputs": [{"name": "stdout", "output_type": "stream", "text": "1"}], "id": "other"}
    path.write_text(json.dumps(data, indent=2), encoding="utf-8")
    changed(None)
    (package / "__pycache__" / "probes.pyc").write_text("b", encoding="utf-8")
    changed(None)
    claims = root / "book" / "claims" / "paper_a.yml"
    claims.write_text(tiny_project.CLAIMS.replace("is large", "is not small"), encoding="utf-8")
    changed(None)
    claims.write_text(tiny_project.CLAIMS.replace("low: 0.5}", "low: 0.7}"), encoding="utf-8")
    changed("claims")
    data["cells"][2]["source"] = "print(2)"
    path.write_text(json.dumps(data), encoding="utf-8")
    changed("notebook")
    overrides = {"n": 4}
    changed("parameters")
    (package / "probes.py").write_text("c", encoding="utf-8")
    changed("rim_core")
    for unused in (
        "suites/other.yml",
        "prompts/data/README.md",
        "organisms/training.py",
    ):  # not what a notebook measures with
        (package / unused).parent.mkdir(parents=True, exist_ok=True)
        (package / unused).write_text("d", encoding="utf-8")
    changed(None)
    libraries = dict(identity.libraries())
    monkeypatch.setattr(identity, "libraries", lambda: {**libraries, "peft": "0.0"})
    changed("libraries")
    (root / "tiny.yml").write_text("# a comment\n" + tiny_project.SUITE, encoding="utf-8")
    changed(None)
    (root / "tiny.yml").write_text(tiny_project.SUITE + "  risky: {}\n", encoding="utf-8")
    changed("models")
    monkeypatch.setattr(staleness, "suite_hashes", lambda suite: {"base": "1"})
    changed("models")


# --- what a user types ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"nn": "1"}, "one/01_first: unknown parameter 'nn' .did you mean 'n'.*; parameters: n, rate, layers"),
        ({"n": "1.5"}, "parameter n: '1.5' is not of type int"),
        ({"n": True}, "parameter n: True is not of type int"),
        ({"rate": "nan"}, "parameter rate: 'nan' holds NaN or infinity"),
        ({"layers": "4,5"}, "parameter layers: '4,5' is not of type list.int.; write it as JSON"),
        ({"layers": '["a"]'}, "parameter layers"),
        ({"suite": "x"}, "parameter suite: set it with --suite"),
    ],
)
def test_parameters_are_checked_before_anything_runs(root, given, message):
    write(root, "one/01_first", "print(1)")
    with pytest.raises(InputError, match=message):
        run([], given)
    assert not (root / "results").exists()


def test_notebooks_are_named_by_section_name_or_path(root):
    for name in ("one/01_first", "one/02_second", "two/01_third"):
        write(root, name, "print(1)")
    every = ["one/01_first", "one/02_second", "two/01_third"]
    assert notebooks.resolve(root, []) == every
    assert notebooks.resolve(root, ["two", "one/01_first"]) == [every[0], every[2]]
    assert notebooks.resolve(root, ["notebooks/one/02_second.ipynb"]) == [every[1]]
    assert notebooks.resolve(root, [str(root / "notebooks/two/")]) == [every[2]]
    with pytest.raises(InputError, match=r"unknown notebook 'one/01_frist' .did you mean 'one/01_first'"):
        notebooks.resolve(root, ["one/01_frist"])


def test_the_parameters_cell_must_hold_literals(root):
    write(root, "one/01_first", parameters="n = 3 * open")
    with pytest.raises(InputError, match="parameter n: its default is not a literal"):
        run()


# --- interrupts and full disks --------------------------------------------------------------------------


def interrupted_in_second(root: Path) -> subprocess.Popen[str]:
    """Start a run of two notebooks and come back when the second is inside its slow cell."""
    write(root, "one/01_first", "print('fine')")
    write(root, "one/02_second", "open('reached', 'w').close()", "import time", "time.sleep(0 if n == 4 else 60)")
    process = tiny_project.start(root, "run", "--suite", SUITE)
    wait_for((root / "reached").exists)
    time.sleep(0.3)
    return process


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_leaves_no_kernel_and_nothing_half_written(root, number, status):
    process = interrupted_in_second(root)
    assert kernels(root)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == status
    assert err.splitlines()[-1] == (
        "rim: interrupted in one/02_second; 1 of 2 notebooks are done; the same command goes on with the rest"
    )
    assert "Traceback" not in err
    assert out == ""
    assert kernels(root) == []
    assert leftovers(root) == []
    assert result_of(root).exists()
    assert not result_of(root, "one/02_second").exists()


def test_after_kill_9_the_next_run_goes_on_and_sweeps(root):
    process = interrupted_in_second(root)
    process.kill()
    process.communicate()
    assert leftovers(root)
    wait_for(lambda: not kernels(root))  # a kernel notices that its parent is gone
    write(root, "one/02_second", "print('short now')")
    assert [r.status for r in run()] == ["up to date", "ran"]
    assert leftovers(root) == []


def test_a_full_disk_is_one_line_and_nothing_half_written(root, monkeypatch):
    write(root, "one/01_first", "print(1)")
    run()
    before = {path.name: path.read_bytes() for path in result_of(root).iterdir()}
    written = []

    def full(self: Path, text: str, **kw: Any) -> int:
        written.append(self.name)
        if len(written) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))
        return len(text)

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(RimError, match="the disk is full: nothing was written") as e:
        run(force=True)
    assert e.value.exit_code == 2
    assert len(written) == 2
    assert leftovers(root) == []
    assert {path.name: path.read_bytes() for path in result_of(root).iterdir()} == before


def test_a_really_full_disk(root):
    folder = root / "results"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(folder)]
    if os.name != "posix" or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("may not mount a small file system here")
    write(root, "one/01_first", "print('x' * 200_000)")
    try:
        with pytest.raises(RimError, match="the disk is full"):
            run()
        assert leftovers(root) == []
        assert not result_of(root).exists()
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_scrubbing_a_long_line_takes_no_time(root):
    clean = execution.scrubber(root)
    began = time.process_time()
    assert clean("x" * 1_000_000) == "x" * 1_000_000
    assert time.process_time() - began < 2
    assert clean(f"{root}/a {root}-other /x/ipykernel_12/34.py:1") == f"./a {root}-other <cell>:1"


def test_a_repository_fetched_by_the_run_itself_is_in_its_key():
    before = {"base": "owner/name@main", "risky": "a" * 64}
    after = {"base": f"owner/name@{'c' * 40}", "risky": "b" * 64}
    parts = runner._with_fetched({"models": "m", "notebook": "n"}, before, after)
    # The commit that came is known now; an adapter that was changed meanwhile is not what was run.
    assert parts == {"models": identity.digest({**after, "risky": before["risky"]}), "notebook": "n"}
    assert runner._with_fetched({"models": "m"}, before, before) == {"models": "m"}
