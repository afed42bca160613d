"""Nothing is lost: runs killed at any moment, dead kernels, memory that runs out, and two runs at once."""

import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_project
from tiny_project import RECORD, kernels, leftovers, rim, start, wait_for, write

from companion import folders, runner, staleness
from rim_core import locks

SUITES = ("tiny.yml", "other.yml")
# Where a kill is most likely to hurt, whatever the seed: nothing there yet, and the last moments.
MOMENTS = sorted(random.Random(5).uniform(0.0, 1.0) for _ in range(10))


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def results(root: Path) -> dict[str, Any]:
    """What is in the results folder, without what differs from run to run."""
    found: dict[str, Any] = {}
    for path in sorted((root / "results").rglob("*")):
        if not path.is_file():
            continue
        content = read(path)
        if path.name == "run.json":
            for varying in ("started", "finished", "wall_seconds", "peak_memory_bytes"):
                del content[varying]
        if path.name == "notebook.ipynb":
            content = [(cell["source"], cell.get("outputs")) for cell in content["cells"]]
        found[path.relative_to(root).as_posix()] = content
    return found


# --- kill -9 --------------------------------------------------------------------------------------------


def run_grid(root: Path) -> None:
    """Run every notebook on every suite, in a process group of its own."""
    os.setsid()
    os.chdir(root)
    os.environ.update(tiny_project.environment())
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    for suite in SUITES:
        done = runner.run(staleness.plan([], suite))
        assert {result.status for result in done} <= {"ran", "up to date"}, done


def grid(root: Path) -> Path:
    tiny_project.make(root)
    shutil.copy(root / "tiny.yml", root / "other.yml")
    write(root, "one/01_first", RECORD, "print(suite)")
    write(root, "one/02_second", "print([layer * n for layer in layers])")
    write(root, "two/01_third", "print(rate)")
    return root


def test_runs_killed_at_random_moments_end_in_the_same_results(tmp_path):
    # A server that has imported what a run needs makes many runs cheap; each is a process of its own.
    start_method = multiprocessing.get_context("forkserver")
    start_method.set_forkserver_preload(["companion.execution", "companion.runner"])
    undisturbed, disturbed = grid(tmp_path / "undisturbed"), grid(tmp_path / "disturbed")

    def begin(root: Path) -> Any:
        process = start_method.Process(target=run_grid, args=(root,))
        process.start()
        return process

    first = start_method.Process(target=os.getpid)  # pays for the imports
    first.start()
    first.join()
    began = time.monotonic()
    whole = begin(undisturbed)
    whole.join()
    assert whole.exitcode == 0
    # Time for a notebook or two: so that some are finished between the kills, and most kills fall inside one.
    window = (time.monotonic() - began) / 4

    order = list(MOMENTS)
    random.Random(6).shuffle(order)
    killed = 0
    for moment in order:
        process = begin(disturbed)
        process.join(moment * window)
        killed += process.is_alive()
        with_group = [process.pid, *(kernel.pid for kernel in kernels(disturbed))]
        for number in with_group:
            try:
                os.killpg(number, signal.SIGKILL)
            except ProcessLookupError:
                continue
        process.join()
        for path in disturbed.glob("results/*/*/*/default"):
            assert sorted(each.name for each in path.iterdir()) == ["claims.json", "notebook.ipynb", "run.json"]
            assert read(path / "run.json")["status"] == "ok"
    assert killed >= 5, "hardly a kill fell inside a run"
    last = begin(disturbed)
    last.join()
    assert last.exitcode == 0
    assert results(disturbed) == results(undisturbed)
    assert len(results(disturbed)) == 3 * len(SUITES) * 3
    assert leftovers(disturbed) == []
    wait_for(lambda: not kernels(disturbed))


class Killed(BaseException):
    """Stands for SIGKILL."""


def until_killed(real: Callable[..., Any], left: Iterator[int]) -> Callable[..., Any]:
    """A system call after `left` of which the process is killed: no later one has an effect either."""

    def call(*given: Any, **kw: Any) -> Any:
        if next(left) <= 0:
            raise Killed
        return real(*given, **kw)

    return call


@pytest.mark.parametrize("failing", [False, True])
def test_a_result_survives_a_kill_between_any_two_steps_of_putting_it_in_place(tmp_path, monkeypatch, failing):
    """Every system call that renames or removes is where a kill may come; the next holder mends what it left."""
    outcomes = set()
    for step in range(100):
        folder = tmp_path / f"{step}" / "default"
        target = folders.failed(folder) if failing else folder
        for place, text in ((folder, "old"), (folders.failed(folder), "old failure")):
            place.mkdir(parents=True)
            (place / "run.json").write_text(text)
        new = folder.parent / ".tmp-0-1-default"
        new.mkdir()
        (new / "run.json").write_text("new")
        left = itertools.count(step, -1)
        with monkeypatch.context() as patched:
            for name in ("rename", "unlink", "rmdir"):
                patched.setattr(os, name, until_killed(getattr(os, name), left))
            try:
                folders.put(new, target)
                finished = True
            except Killed:
                finished = False
        with folders.locked(folder):
            pass
        text = (target / "run.json").read_text()
        outcomes.add(text)
        assert text in ("old", "old failure", "new")
        assert not finished or text == "new"
        if failing or text == "old":
            assert (folder / "run.json").read_text() == "old"
        if not failing:
            # A result and the record of an older failure: the run would be repeated, and its page would be wrong.
            assert folders.failed(folder).exists() == (text == "old")
        assert list(folder.parent.rglob(".*")) == []
        if finished:
            break
    assert step > 4
    assert outcomes == {"old failure" if failing else "old", "new"}


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a kernel looks itself, between two steps of Python")
def test_the_kernel_of_a_run_that_is_killed_ends_with_it(tmp_path):
    """Also a kernel that never looks whether its runner lives, as within one long call of compiled code."""
    root = tiny_project.make(tmp_path / "project")
    stubborn = "import os, time\nos._exit = lambda code: time.sleep(600)\nopen('reached', 'w').close()\ntime.sleep(600)"
    write(root, "one/01_first", stubborn)
    process = start(root, "run", "--suite", SUITES[0])
    wait_for((root / "reached").exists)
    assert kernels(root)
    process.kill()
    process.communicate()
    wait_for(lambda: not kernels(root), 10)


# --- dead kernels and memory ----------------------------------------------------------------------------


def test_failures_are_told_with_what_to_do_and_do_not_stop_the_others(tmp_path):
    root = tiny_project.make(tmp_path / "project")
    write(root, "one/01_killed", "import os; os.kill(os.getpid(), 9)")
    write(root, "one/02_crashed", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    write(root, "one/03_full", "raise MemoryError('Unable to allocate 1 TiB')")
    write(root, "one/04_fine", "print(1)")
    done = rim(root, "run", "--suite", SUITES[0])
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    lines = done.stderr.splitlines()
    advice = "set smaller sizes with -p, quantize the model, or use a machine with more memory"
    told = {line.split()[1]: line for line in lines if "  failed: " in line}
    assert "KernelDied: the kernel died in this cell; most often the machine ran out of memory" in told["one/01_killed"]
    assert advice in told["one/01_killed"]
    assert "KernelDied: the kernel died in this cell of SIGSEGV" in told["one/02_crashed"]
    assert f"MemoryError: Unable to allocate 1 TiB; {advice}" in told["one/03_full"]
    # The summary says it again, and is the last of it.
    assert lines[-5] == "4 notebooks: 3 failed, 1 ran"
    assert [line.split(":")[1].strip() for line in lines[-4:-1]] == ["one/01_killed", "one/02_crashed", "one/03_full"]
    assert lines[-1] == "rim: 3 of 4 notebooks failed: one/01_killed, one/02_crashed, one/03_full"
    assert (root / "results/tiny/one/04_fine/default/run.json").is_file()
    again = rim(root, "run", "one/04_fine", "--suite", SUITES[0])
    assert "up to date" in again.stderr


# --- two runs at once -----------------------------------------------------------------------------------


def test_two_runs_at_once_share_the_notebooks_and_run_none_twice(tmp_path):
    root = tiny_project.make(tmp_path / "project")
    for name in ("one/01_first", "one/02_second"):
        count = f"open('ran', 'a').write('{name}\\n')"
        write(root, name, count, "import time; time.sleep(2)")
    processes = [start(root, "run", "--suite", SUITES[0]) for _ in range(2)]
    told = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], told
    assert sorted((root / "ran").read_text().split()) == ["one/01_first", "one/02_second"]
    assert leftovers(root) == []
    waits = [line for text in told for line in text.splitlines() if "waits: " in line]
    assert waits
    assert all("waits: another rim run (process " in line and line.endswith(" is at it") for line in waits)


def test_a_lock_of_this_machine_ends_with_its_holder(tmp_path):
    folder = tmp_path / "notebook" / "default"
    holding = (
        "import time; from pathlib import Path; from companion import folders\n"
        f"with folders.locked(Path({str(folder)!r})): print(1, flush=True); time.sleep(60)"
    )
    command, environment = [sys.executable, "-c", holding], tiny_project.environment()
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True)
    assert holder.stdout is not None
    holder.stdout.readline()
    with (
        pytest.raises(folders.BusyError, match=rf"another rim run \(process {holder.pid}\) is at it"),
        folders.locked(folder),
    ):
        pass
    waited: list[str] = []
    # A killed process that nobody has waited for still counts as alive.
    threading.Timer(1.0, lambda: (holder.kill(), holder.communicate())).start()
    began = time.monotonic()
    with folders.locked(folder, waited.append):
        assert len(waited) == 1
    assert time.monotonic() - began < locks._LAPSE / 2
    assert list(folder.parent.iterdir()) == []


def test_a_lock_of_another_machine_is_taken_over_only_once_it_gives_no_sign_of_life(tmp_path, monkeypatch):
    """What another machine wrote, on a file system that does not share the system's locks."""
    folder = tmp_path / "notebook" / "default"
    folder.parent.mkdir()
    lock = folder.parent / ".lock-default"
    lock.write_text("filelock/2\npid=1\nhost=another\nmode=lease\ntoken=0123456789abcdef\nduration=1.5\nstart=1\n")
    monkeypatch.setattr(locks, "_LAPSE", 1.5)
    monkeypatch.setattr(locks, "_POLL", 0.1)
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(0.2):
            os.utime(lock)

    alive = threading.Thread(target=beat)
    alive.start()
    began = time.monotonic()
    threading.Timer(2.5, stop.set).start()
    waited: list[str] = []
    with folders.locked(folder, waited.append):
        assert time.monotonic() - began > 3.5
    assert waited[0].startswith("a rim run on another machine is at it")
    alive.join()
    assert list(folder.parent.iterdir()) == []


def test_a_run_whose_lock_was_taken_over_keeps_nothing(tmp_path, monkeypatch):
    """As where a machine slept: its result must not be mixed with the other's."""
    root = tiny_project.make(tmp_path / "project")
    monkeypatch.chdir(root)
    lock = root / "results/tiny/one/01_first/.lock-default"
    taking = f"from pathlib import Path; new = Path('new'); new.write_text('other'); new.replace({str(lock)!r})"
    write(root, "one/01_first", taking)
    (done,) = runner.run(staleness.plan([], SUITES[0]))
    assert (done.status, "took this notebook over" in done.reason) == ("failed", True)
    assert [path.name for path in lock.parent.iterdir()] == [".lock-default"]
