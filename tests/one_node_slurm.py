"""A SLURM of one node on loopback, from Debian's packages, in a temporary folder; for one test's sake."""

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

SETTINGS = Path("/etc/slurm/slurm.conf")  # jobs lose SLURM_CONF on their way, so it must be where SLURM looks
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "sinfo")


def why_not() -> str:
    """Say why none can be started here, or nothing."""
    if missing := [name for name in PROGRAMS if not _program(name)]:
        return f"no {', '.join(missing)} here (Debian: apt-get install slurm-wlm munge)"
    if os.geteuid() != 0:
        return "SLURM's daemons are started by root only"
    if SETTINGS.exists() and not os.environ.get("RIM_TEST_SLURM"):
        return f"{SETTINGS} exists; RIM_TEST_SLURM=1 replaces it during the test"
    return ""


@contextlib.contextmanager
def running(folder: Path) -> Iterator[None]:
    """Run munged, slurmctld and slurmd until the context ends, with the settings put back as they were."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(_settings(_write_settings(folder)))
        key = folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        files = {"socket": "munge.socket", "key-file": "munge.key", "pid-file": "munge.pid"}
        files |= {"log-file": "munge.log", "seed-file": "munge.seed"}
        options = [f"--{option}={folder / name}" for option, name in files.items()]
        for command in (
            ["munged", "--foreground", "--force", *options],
            ["slurmctld", "-D"],
            ["slurmd", "-D", "-N", "localhost"],
        ):
            stack.enter_context(_daemon(folder, command))
        _wait_for_node(folder)
        yield


def _program(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")


def _write_settings(folder: Path) -> str:
    for name in ("state", "spool"):
        (folder / name).mkdir()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20 // 2
    return f"""\
ClusterName=local
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={_free_port()}
SlurmdPort={_free_port()}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ReturnToService=2
MpiDefault=none
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
NodeName=localhost NodeAddr=127.0.0.1 CPUs={os.cpu_count()} RealMemory={memory} State=UNKNOWN
PartitionName=main Nodes=localhost Default=YES MaxTime=INFINITE State=UP
"""


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextlib.contextmanager
def _settings(text: str) -> Iterator[None]:
    before = SETTINGS.read_bytes() if SETTINGS.exists() else None
    SETTINGS.parent.mkdir(parents=True, exist_ok=True)
    try:
        SETTINGS.write_text(text, encoding="utf-8")
        yield
    finally:
        if before is None:
            SETTINGS.unlink()
        else:
            SETTINGS.write_bytes(before)


@contextlib.contextmanager
def _daemon(folder: Path, command: list[str]) -> Iterator[None]:
    program = _program(command[0])
    assert program
    with (folder / f"{command[0]}.out").open("wb") as out:
        process = subprocess.Popen([program, *command[1:]], stdout=out, stderr=out, stdin=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()


def _wait_for_node(folder: Path) -> None:
    state = ""
    for _ in range(60):
        asked = subprocess.run(["sinfo", "-h", "-o", "%T"], capture_output=True, text=True, check=False)
        state = asked.stdout.strip()
        if state == "idle":
            return
        time.sleep(0.5)
    told = "\n".join(path.read_text(errors="replace")[-500:] for path in folder.glob("*.out"))
    raise RuntimeError(f"the SLURM node is {state or 'not there'} after 30 s\n{told}")
