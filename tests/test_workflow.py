"""The Snakemake workflow: grids of runs, which must be the runs that `rim run` makes."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import one_node_slurm
import pytest
import tiny_project
from tiny_project import RECORD, rim, write

WORKFLOW = tiny_project.REPOSITORY / "companion" / "workflow"
# The environment beside the one that runs the tests, as `make workflow` builds it, or the path's.
SNAKEMAKE = shutil.which("snakemake", path=f"{sys.prefix}/workflow/bin") or shutil.which("snakemake")
needs_snakemake = pytest.mark.skipif(not SNAKEMAKE, reason="Snakemake is not installed: make workflow")
# The tiny project's command, which writes down each call, and weights that need no fetching.
COMMAND = f"""\
import sys
from rim_core.suites import checkpoints
checkpoints.fetch = checkpoints.fetch_base = lambda suite: None
with open("calls.txt", "a") as calls:
    calls.write(" ".join(sys.argv[1:]) + "\\n")
{tiny_project.COMMAND}
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A project with spaces in its path, two suites and two notebooks."""
    made = tiny_project.make(tmp_path / "a project")
    (made / "other.yml").write_text(tiny_project.SUITE, encoding="utf-8")
    (made / "rim").write_text(f"#!{sys.executable}\n{COMMAND}", encoding="utf-8")
    (made / "rim").chmod(0o755)
    write(made, "one/01_first", RECORD)
    write(made, "two/01_second", "print(n)")
    return made


def snakemake(root: Path, suites: str, *more: str, profile: str = "local") -> subprocess.CompletedProcess[str]:
    assert SNAKEMAKE
    command = [SNAKEMAKE, "--snakefile", str(WORKFLOW / "Snakefile")]
    command += ["--profile", str(WORKFLOW / "profiles" / profile), *more]
    config = [] if "--config" in more else ["--config"]
    config += [f"suites={suites}", f"rim={root / 'rim'}"]
    return subprocess.run(
        [*command, *config],
        cwd=root,
        env=tiny_project.environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def ran(root: Path) -> list[str]:
    """What was fetched and run since the last look, in order."""
    calls = (root / "calls.txt").read_text().splitlines() if (root / "calls.txt").exists() else []
    (root / "calls.txt").unlink(missing_ok=True)
    return [call.removeprefix("run ") for call in calls if "--plan" not in call]


def records(root: Path) -> dict[str, tuple[str, list[str]]]:
    """Each result's run key and its claims' outcomes, by its folder."""
    found = {}
    for path in (root / "results").rglob("run.json"):
        claims = json.loads((path.parent / "claims.json").read_text())
        key = json.loads(path.read_text())["run_key"]
        found[str(path.parent.relative_to(root))] = (key, [claim["outcome"] for claim in claims])
    return found


@needs_snakemake
def test_a_grid_gives_what_rim_run_gives_and_a_failure_stops_nothing(root, tmp_path):
    plain = shutil.copytree(root, tmp_path / "plain")
    write(root, "one/00_bad", "1 / 0")
    done = snakemake(root, "tiny.yml", "--cores", "2")
    assert done.returncode == 1
    assert "cell 3: ZeroDivisionError" in done.stderr
    assert (root / "results/tiny/one/00_bad/failed/default/notebook.ipynb").is_file()
    assert rim(plain, "run", "--suite", "tiny.yml").returncode == 0
    assert records(root) == records(plain)
    assert sorted(records(root)) == ["results/tiny/one/01_first/default", "results/tiny/two/01_second/default"]
    assert records(root)["results/tiny/one/01_first/default"][1] == ["holds"]
    write(root, "one/00_bad", "print('mended')")
    ran(root)
    assert snakemake(root, "tiny.yml").returncode == 0
    assert ran(root) == ["--fetch --suite tiny.yml", "one/00_bad --suite tiny.yml"]
    assert not (root / "results/tiny/one/00_bad/failed").joinpath("default").exists()


@needs_snakemake
def test_what_another_notebook_reads_is_run_first(root):
    choose = "import time, rim_core as rim\ntime.sleep(1)\nrim.hand_on('heads', [1])"
    write(root, "two/01_second", choose)
    write(root, "one/01_first", RECORD, "rim.handed_on('two/01_second', 'heads', suite=suite)")
    assert snakemake(root, "tiny.yml", "--cores", "2").returncode == 0
    assert ran(root) == [f"{name} --suite tiny.yml" for name in ("--fetch", "two/01_second", "one/01_first")]


@needs_snakemake
def test_only_what_is_stale_is_run(root):
    assert rim(root, "run", "two", "--suite", "tiny.yml").returncode == 0  # what `rim run` did counts
    assert snakemake(root, "tiny.yml").returncode == 0
    assert ran(root) == ["--fetch --suite tiny.yml", "one/01_first --suite tiny.yml"]
    again = snakemake(root, "tiny.yml")
    assert (again.returncode, ran(root)) == (0, [])
    assert "tiny: 2 of 2 runs are up to date" in again.stderr
    assert snakemake(root, "[tiny.yml, other.yml]", "--config", "notebooks=one").returncode == 0
    assert ran(root) == ["--fetch --suite other.yml", "one/01_first --suite other.yml"]
    rules = root / "book" / "claims" / "paper_a.yml"
    rules.write_text(rules.read_text().replace("low: 0.5}", "low: 0.95}"), encoding="utf-8")
    assert snakemake(root, "tiny.yml").returncode == 0
    assert ran(root) == ["--fetch --suite tiny.yml", "one/01_first --suite tiny.yml"]
    (key, outcomes) = records(root)["results/tiny/one/01_first/default"]
    assert outcomes == ["contradicted"]
    assert key != records(root)["results/other/one/01_first/default"][0]


@needs_snakemake
def test_sets_of_parameters_and_suites_one_after_another(root):
    done = snakemake(
        root,
        "[other.yml, tiny.yml]",
        "-n",
        "--config",
        'parameters=[{}, {n: 3}, {n: 5, layers: "[3, 4]"}]',  # n is 3 of itself
    )
    assert done.returncode == 0, done.stderr
    assert "notebook        8" in done.stdout + done.stderr
    settings = 'parameters={rate: 0.25, layers: "[3, 4]"}'
    done = snakemake(root, "[other.yml, tiny.yml]", "--cores", "1", "--config", "notebooks=two", settings)
    assert done.returncode == 0, done.stderr
    (_, *calls) = ran(root)
    values = "-p rate=0.25 -p layers=[3, 4]"
    assert [call for call in calls if "--fetch" not in call] == [
        f"two/01_second --suite other.yml {values}",
        f"two/01_second --suite tiny.yml {values}",
    ]
    (record,) = (root / "results" / "tiny").rglob("run.json")
    assert json.loads(record.read_text())["overrides"] == {"rate": 0.25, "layers": [3, 4]}


@needs_snakemake
@pytest.mark.parametrize(
    ("suites", "config", "told"),
    [
        ("nobodys", [], "unknown suite 'nobodys'"),
        ("tiny.yml", ["parameters={layers: [1, 2]}"], "write its value as text, in quotes"),
        ("tiny.yml", ["suite=tiny.yml"], "unknown setting 'suite'"),
    ],
)
def test_a_wrong_setting_is_told_before_anything_runs(root, suites, config, told):
    done = snakemake(root, suites, "--config", *config)
    assert done.returncode == 1
    assert told in done.stderr
    assert "Traceback" not in done.stderr
    assert (ran(root), (root / "results").exists()) == ([], False)


@needs_snakemake
@pytest.mark.skipif(bool(one_node_slurm.why_not()), reason=one_node_slurm.why_not() or "there is a SLURM")
def test_the_slurm_profile_on_a_cluster_of_one_node(root, tmp_path):
    write(root, "one/00_bad", "1 / 0")
    write(root, "two/01_second", "import os; print('job', os.environ['SLURM_JOB_ID'])")
    (tmp_path / "slurm").mkdir()
    quick = ["--slurm-init-seconds-before-status-checks", "5", "--seconds-between-status-checks", "2"]
    quick += ["--default-resources", "mem_mb=500", "runtime=5"]
    with one_node_slurm.running(tmp_path / "slurm"):
        done = snakemake(root, "tiny.yml", *quick, profile="slurm")
        again = snakemake(root, "tiny.yml", "-n", *quick, profile="slurm")
    assert done.returncode == 1
    assert "cell 3: ZeroDivisionError" in done.stderr
    assert sorted(records(root)) == ["results/tiny/one/01_first/default", "results/tiny/two/01_second/default"]
    printed = (root / "results/tiny/two/01_second/default/notebook.ipynb").read_text(encoding="utf-8")
    assert re.search(r"job \d+\\n", printed)
    assert "tiny: 2 of 3 runs are up to date" in again.stderr
    assert rim(root, "run", "--plan", "--suite", "tiny.yml").stdout.count('"up to date"') == 2


# --- what the workflow asks of `rim` --------------------------------------------------------------------


def test_the_plan_says_what_a_run_would_do_and_does_nothing(root):
    planned = rim(root, "run", "--plan", "--suite", "tiny.yml", "-p", "n=5")
    rows = json.loads(planned.stdout)
    assert [(row["notebook"], row["status"]) for row in rows] == [
        ("one/01_first", "to run"),
        ("two/01_second", "to run"),
    ]
    assert not (root / "results").exists()
    assert rim(root, "run", "two", "--suite", "tiny.yml", "-p", "n=5").returncode == 0
    (row,) = json.loads(rim(root, "run", "two", "--plan", "--suite", "tiny.yml", "-p", "n=5").stdout)
    assert (row["status"], row["overrides"]) == ("up to date", {"n": 5})
    record = root / "results" / "tiny" / "two/01_second" / row["variant"] / "run.json"
    assert json.loads(record.read_text())["run_key"] == row["run_key"]
    (root / "tiny.yml").write_text("base: {hub: nobody/nothing}\nroles:\n  another: {}\n", encoding="utf-8")
    rows = json.loads(rim(root, "run", "--plan", "--suite", "tiny.yml").stdout)
    assert [row["status"] for row in rows] == ["not applicable", "to run"]


def test_fetching_finds_hub_repositories_in_the_cache_or_says_what_is_missing(root, tmp_path):
    def fetch() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "companion.cli", "run", "--fetch", "--suite", "tiny.yml"],
            cwd=root,
            env=tiny_project.environment(HF_HUB_CACHE=str(tmp_path / "hub"), HF_HUB_OFFLINE="1"),
            capture_output=True,
            text=True,
            check=False,
        )

    missing = fetch()
    assert (missing.returncode, missing.stdout) == (2, "")
    assert missing.stderr.startswith("rim: nobody/nothing is not in the cache here and the hub cannot be reached")
    assert len(missing.stderr.splitlines()) == 1
    snapshot = tmp_path / "hub" / "models--nobody--nothing" / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0123abcd")
    assert fetch().returncode == 0
    assert not (root / "results").exists()
