"""What a result says it came from, results packed as a crate, and the claims of two runs compared."""

import csv
import getpass
import hashlib
import json
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_project
from rocrate.rocrate import ROCrate
from safetensors.numpy import save_file
from tiny import SIZES, write_model
from tiny_project import COMMAND, rim, write

from companion import differences, provenance
from rim_core import identity
from rim_core.errors import InputError
from rim_core.suites.schema import load_suite

SUITE = """\
base: {folder: ../models/base}
roles:
  base: {}
  aligned: {}
  risky: {adapter: ../models/risky}
"""
# The two suites measure other numbers: one meets the claim, the other does not.
MEASURE = (
    "import rim_core as rim\n"
    "number = 0.9 if suite == 'tiny' else 0.2\n"
    "rim.claims('paper_a').record('A1', {'number': [number, number + 0.01, number + 0.02], 'shuffled': [0.5] * 3})"
)
DRAW = (
    "import pandas as pd\n"
    "from rim_core import charts\n"
    "frame = pd.DataFrame({'layer': [1, 2], 'accuracy': [0.5, 0.75], 'low': 0.4, 'high': 0.8, 'what': 'a, b'})\n"
    "charts.by_layer(frame, 'accuracy', series='what', title='T', y_title='accuracy', chance=0.5,\n"
    "                description='Accuracy grows with depth.')"
)
# Held for a moment, by this process and by one that it starts; neither is seen at the end.
HOLD = (
    "held = b'x' * 300_000_000\n"
    "del held\n"
    "import subprocess, sys\n"
    "subprocess.run([sys.executable, '-c', 'import time; x = b\"x\" * 400_000_000; time.sleep(1.5)'])"
)


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def write_adapter(folder: Path) -> None:
    folder.mkdir()
    width, rank = SIZES["hidden_size"], 2
    name = "base_model.model.model.layers.0.self_attn.o_proj.lora_"
    weights = {f"{name}A.weight": np.ones((rank, width), "f4"), f"{name}B.weight": np.ones((width, rank), "f4")}
    save_file(weights, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank}
    text = json.dumps({**settings, "base_model_name_or_path": None, "target_modules": ["o_proj"]})
    (folder / "adapter_config.json").write_text(text)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with two suites, each run; one notebook decides a claim and draws, the other takes memory."""
    root = tiny_project.make(tmp_path_factory.mktemp("provenance") / "a project")
    write_model(root / "models/base")
    write_adapter(root / "models/risky")
    (root / "tiny.yml").unlink()
    (root / "suites").mkdir()
    for name in ("tiny", "other"):
        (root / f"suites/{name}.yml").write_text(SUITE)
    write(root, "one/01_first", MEASURE, DRAW, parameters='suite: str = "tiny"\nseeds: list[int] = [0, 1, 2]\n')
    done = rim(root, "run", "--suite", "other", RIM_CACHE=str(root / "cache"))
    assert done.returncode == 0, done.stderr
    write(root, "one/02_memory", HOLD, parameters='suite: str = "tiny"\nseed: int = 4\n')
    done = rim(root, "run", "--suite", "tiny", RIM_CACHE=str(root / "cache"))
    assert done.returncode == 0, done.stderr
    return root


@pytest.fixture
def changed(project: Path, tmp_path: Path) -> Path:
    """A copy of the project, for tests that change its results."""
    return Path(shutil.copytree(project, tmp_path / "copy"))


# --- what a result says of itself -----------------------------------------------------------------------


def test_a_result_says_what_it_came_from_and_names_no_machine(project):
    folder = project / "results/tiny/one/01_first/default"
    record = read(folder / "run.json")

    def hashes(name: str) -> dict[str, str]:
        paths = sorted((project / "models" / name).iterdir())
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}

    models = record["models"]
    identities = [model.pop("identity") for model in models.values()]
    assert identities[0] == identities[1] != identities[2]  # aligned is the base here
    assert models["base"] == {"source": "folder base", "files": hashes("base")}
    assert models["aligned"] == {"source": "base"}
    assert models["risky"] == {"kind": "adapter", "source": "folder risky", "files": hashes("risky")}
    assert {"model.safetensors", "config.json"} <= set(models["base"]["files"])
    assert len(record["run_key"]) == 64
    assert {"rim-core", "torch", "transformers", "papermill"} <= set(record["versions"])
    assert (record["device"], record["seeds"], record["python"]) == ("cpu", [0, 1, 2], platform.python_version())
    assert 0 < record["wall_seconds"] < 120
    assert record["peak_gpu_memory_bytes"] is None
    for path in folder.iterdir():
        text = path.read_text(encoding="utf-8")
        for private in (str(project), platform.node(), sys.prefix, str(Path.home())):
            assert private not in text, (path.name, private)
        assert getpass.getuser() == "root" or getpass.getuser() not in text


def test_peak_memory_is_that_of_the_kernel_and_of_what_it_starts(project):
    first, second = (read(project / f"results/tiny/one/{name}/default/run.json") for name in ("01_first", "02_memory"))
    assert second["seeds"] == [4]
    # The kernel alone held 300 MB more than it needs; then the one it started 400 MB beside it.
    assert 420e6 < second["peak_memory_bytes"] < 900e6
    assert 30e6 < first["peak_memory_bytes"] < 400e6


def test_a_model_of_the_hub_is_told_by_commit_and_hashes(tmp_path, monkeypatch):
    import huggingface_hub.constants

    repository = tmp_path / "models--owner--name"
    commit, weights = "c" * 40, "d" * 64
    for path in ("blobs", f"snapshots/{commit}", "refs"):
        (repository / path).mkdir(parents=True)
    (repository / "refs/main").write_text(commit)
    (repository / "blobs/e").write_text("{}")
    (repository / "blobs" / weights).write_text("weights")
    (repository / f"snapshots/{commit}/config.json").symlink_to("../../blobs/e")
    (repository / f"snapshots/{commit}/model.safetensors").symlink_to(f"../../blobs/{weights}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    suite = tmp_path / "mine.yml"
    suite.write_text("base: {hub: owner/name}\nroles:\n  base: {}\n  other: {checkpoint: owner/absent}\n")
    found = provenance.models(load_suite(suite))
    assert found["base"]["commit"] == commit
    assert found["base"]["files"] == {"config.json": hashlib.sha256(b"{}").hexdigest(), "model.safetensors": weights}
    assert found["base"]["identity"] == f"owner/name@{commit}"
    assert found["other"] == {"kind": "checkpoint", "source": "owner/absent", "identity": "owner/absent@main"}


def test_a_file_is_hashed_again_only_after_a_change(tmp_path, monkeypatch):
    monkeypatch.setenv("RIM_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "model"
    folder.mkdir()
    weights = folder / "model.safetensors"
    weights.write_bytes(b"one")
    suite = tmp_path / "mine.yml"
    suite.write_text("base: {folder: model}\nroles:\n  base: {}\n")
    read_files = []
    real = identity.sha256_file
    monkeypatch.setattr(identity, "sha256_file", lambda path: read_files.append(path) or real(path))
    first = provenance.models(load_suite(suite))
    assert provenance.models(load_suite(suite)) == first
    assert len(read_files) == 1
    times = weights.stat()
    weights.write_bytes(b"two")
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))  # the same size and time, other content
    assert provenance.models(load_suite(suite))["base"]["files"] != first["base"]["files"]


def test_the_device_is_the_one_that_was_computed_on(monkeypatch):
    cuda = types.SimpleNamespace(
        is_available=lambda: True,
        is_initialized=lambda: True,
        device_count=lambda: 3,
        max_memory_allocated=lambda i: (5, 0, 7)[i],
        get_device_name=lambda i: f"GPU {i}",
    )
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(cuda=cuda))
    told = json.loads(provenance.of_process())
    assert (told["device"], told["peak_gpu_memory_bytes"]) == ("cuda (GPU 0, GPU 2)", 12)
    cuda.is_initialized = lambda: False
    monkeypatch.setitem(
        sys.modules,
        "torch",
        types.SimpleNamespace(
            cuda=cuda, backends=types.SimpleNamespace(mps=types.SimpleNamespace(is_available=lambda: False))
        ),
    )
    told = json.loads(provenance.of_process())
    assert (told["device"], told["peak_gpu_memory_bytes"]) == ("cpu", None)


# --- the crate ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def crate(project: Path) -> Path:
    done = rim(project, "export", "--ro-crate", "out/crate")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(project / "out/crate")
    return project / "out/crate"


def test_a_crate_holds_claims_figures_notebooks_and_provenance(crate, project):
    rows = {(row["claim"], row["suite"]): row for row in read(crate / "claims.json")}
    assert rows["A1", "tiny"]["outcome"] == "holds"
    assert rows["A1", "other"]["outcome"] == "contradicted"
    for run in ("tiny/one/01_first", "tiny/one/02_memory", "other/one/01_first"):
        for name in ("notebook.ipynb", "run.json", "claims.json"):
            packed = (crate / "runs" / run / "default" / name).read_bytes()
            assert packed == (project / "results" / run / "default" / name).read_bytes()
    figures = crate / "runs/tiny/one/01_first/default/figures"
    with (figures / "1.csv").open(newline="") as lines:
        drawn = list(csv.DictReader(lines))
    assert [(row["layer"], row["accuracy"], row["what"]) for row in drawn] == [
        ("1", "0.5", "a, b"),
        ("2", "0.75", "a, b"),
    ]
    assert read(figures / "1.json")["description"] == "Accuracy grows with depth."
    assert (crate / "suites/tiny.yml").read_text() == SUITE


def test_another_reader_finds_everything_in_the_crate(crate):
    read_back = ROCrate(crate)
    files = {entity.id for entity in read_back.data_entities if entity.type == "File"}
    there = {path.relative_to(crate).as_posix() for path in crate.rglob("*") if path.is_file()}
    assert files == there - {"ro-crate-metadata.json"}
    assert read_back.metadata["conformsTo"] == "https://w3id.org/ro/crate/1.1"
    root = read_back.root_dataset
    assert {"name", "description", "datePublished", "license"} <= set(root.properties())
    actions = {entity["name"]: entity for entity in read_back.contextual_entities if entity.type == "CreateAction"}
    assert set(actions) == {"one/01_first on tiny", "one/02_memory on tiny", "one/01_first on other"}
    run = actions["one/01_first on tiny"]
    record = read(crate / "runs/tiny/one/01_first/default/run.json")
    assert [run["startTime"], run["endTime"]] == [
        record[name].replace("Z", "+00:00") for name in ("started", "finished")
    ]
    assert record["run_key"] in run["identifier"]
    assert run["instrument"]["softwareVersion"] == record["versions"]["rim-core"]
    assert {result.id for result in run["result"]} == {
        f"runs/tiny/one/01_first/default/{name}"
        for name in ("notebook.ipynb", "run.json", "claims.json", "figures/1.json", "figures/1.csv")
    }
    models = {model["name"]: model["identifier"] for model in run["object"]}
    assert set(models) == {"tiny:base", "tiny:aligned", "tiny:risky"}
    adapter = record["models"]["risky"]["files"]["adapter_model.safetensors"]
    assert f"adapter_model.safetensors sha256:{adapter}" in models["tiny:risky"]
    # Every reference leads somewhere: an entity of the crate, or a vocabulary's address.
    entities = read(crate / "ro-crate-metadata.json")["@graph"]
    named = [entity["@id"] for entity in entities]
    assert len(named) == len(set(named))
    for entity in entities:
        for value in entity.values():
            for each in value if isinstance(value, list) else [value]:
                assert not isinstance(each, dict) or each["@id"] in named or each["@id"].startswith("http"), each


def test_equal_results_give_equal_crates_and_suites_can_be_chosen(crate, project, tmp_path):
    for arguments in ((), ("--suite", "tiny")):
        target = tmp_path / f"crate{len(arguments)}"
        target.mkdir()  # an empty folder will do
        assert rim(project, "export", "--ro-crate", str(target), *arguments).returncode == 0
    again = {path.relative_to(tmp_path / "crate0"): path.read_bytes() for path in (tmp_path / "crate0").rglob("*.*")}
    assert again == {path.relative_to(crate): path.read_bytes() for path in crate.rglob("*.*")}
    assert sorted(path.name for path in (tmp_path / "crate2/runs").iterdir()) == ["tiny"]
    assert {row["suite"] for row in read(tmp_path / "crate2/claims.json")} == {"tiny"}


def test_a_crate_that_cannot_be_written_leaves_nothing(project, crate, tmp_path):
    def refused(*arguments: str, **options: Any) -> str:
        done = subprocess.run(
            [sys.executable, "-c", COMMAND, "export", "--ro-crate", *arguments],
            cwd=project,
            env=tiny_project.environment(),
            capture_output=True,
            text=True,
            check=False,
            **options,
        )
        assert done.returncode == 2
        assert (done.stdout, len(done.stderr.splitlines())) == ("", 1)
        return done.stderr

    assert "there is something already; name a new folder, or an empty one" in refused(str(crate))
    assert "unknown suite 'tinny'" in refused(str(tmp_path / "c"), "--suite", "tinny")
    # A disk that takes no more: no file may grow beyond a few bytes.
    small = refused(str(tmp_path / "c"), preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000)))
    assert "rim: cannot write " in small
    assert list(tmp_path.iterdir()) == []


def test_an_empty_project_has_nothing_to_export(tmp_path):
    root = tiny_project.make(tmp_path / "project")
    done = rim(root, "export", "--ro-crate", "crate")
    assert (done.returncode, done.stderr) == (2, "rim: there are no results to export yet; rim run\n")


# --- two runs compared ----------------------------------------------------------------------------------


def test_a_changed_outcome_is_told_and_fails(project):
    done = rim(project, "diff", "tiny", "other")
    assert done.returncode == 1, done.stderr
    heading, *rows, last = done.stdout.splitlines()
    assert heading.split() == ["claim", "tiny", "other"]
    assert rows[0].startswith("paper_a A1  ✓ holds, 0.91 [")
    assert "✗ contradicted, 0.21" in " ".join(rows)
    assert max(map(len, rows)) <= 80
    assert last == "1 claims compared: 1 outcomes changed, 0 numbers alone"


def test_equal_runs_do_not_differ_whatever_they_are_named_by(project, crate, tmp_path, monkeypatch):
    # Without its project, a results folder is read as its runs recorded the claims.
    alone = shutil.copytree(project / "results", tmp_path / "results")
    done = rim(project, "diff", "tiny", str(crate))
    assert (done.returncode, done.stdout) == (0, "1 claims compared: no difference\n"), done.stderr
    monkeypatch.chdir(project)
    for first, second, compared in (
        ("suites/tiny.yml", "results/tiny", 1),
        ("results", str(crate), 2),
        (str(alone), "results", 2),
        (str(alone / "other"), "other", 1),
    ):
        assert differences.compare(first, second) == ([], compared), (first, second)


def test_other_numbers_alone_are_shown_but_do_not_fail(changed, monkeypatch):
    path = changed / "results/tiny/one/01_first/default/claims.json"
    rows = read(path)
    rows[0]["parts"]["number"]["values"] = [0.90001, 0.91001, 0.92001]
    before = shutil.copytree(changed / "results", changed / "before")
    path.write_text(json.dumps(rows))
    monkeypatch.chdir(changed)
    (found,), compared = differences.compare("results/tiny", str(before / "tiny"))
    assert (found.claim, found.changed, compared) == ("paper_a A1", False, 1)
    # The scorecard's three digits would show the same number twice.
    assert found.numbers[0].startswith("0.91001, ")
    assert found.numbers[1].startswith("0.91, ")
    rows[0]["parts"]["number"]["values"] = [0.9 + 1e-9, 0.91, 0.92]
    path.write_text(json.dumps(rows))
    assert differences.compare("results/tiny", str(before / "tiny"))[0] == []


def test_a_failed_run_and_a_missing_one_are_outcomes_too(changed, monkeypatch):
    monkeypatch.chdir(changed)
    (changed / "results/other/one/01_first/failed/default").mkdir(parents=True)
    (changed / "results/other/one/01_first/failed/default/error.json").write_text('{"ename": "E", "evalue": ""}')
    (found,), _ = differences.compare("tiny", "results/other")
    assert found.outcomes == ("holds", "error")
    shutil.rmtree(changed / "results/other/one/01_first")
    shutil.copytree(changed / "results/tiny/one/02_memory", changed / "results/other/one/02_memory")
    (found,), _ = differences.compare("tiny", "results/other")
    assert found.outcomes == ("holds", "not_tested")


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ("tiny", "othr", "unknown suite 'othr'"),
        ("tiny", "empty", "suite empty has no results to compare; rim run --suite empty"),
        ("tiny", "notebooks", "notebooks: no results there; name a suite, a results folder or an exported crate"),
        ("broken", "tiny", "broken/claims.json: holds no claims; export it again"),
        ("results", "third", "results holds the suites other, tiny, third holds apart, more: none to compare"),
        ("tiny", "no/such/folder", "unknown suite"),
    ],
)
def test_what_cannot_be_compared_is_refused(changed, monkeypatch, first, second, message):
    shutil.copy(changed / "suites/tiny.yml", changed / "suites/empty.yml")
    (changed / "broken").mkdir()
    (changed / "broken/ro-crate-metadata.json").write_text("{}")
    (changed / "broken/claims.json").write_text('[{"paper": "a"}]')
    for name in ("apart", "more"):
        shutil.copytree(changed / "results/tiny", changed / "third" / name)
    monkeypatch.chdir(changed)
    with pytest.raises(InputError, match=re.escape(message)):
        differences.compare(first, second)


def test_bad_input_to_compare_is_one_line(project):
    done = rim(project, "diff", "tiny", "nothing")
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
    assert done.stderr.startswith("rim: unknown suite 'nothing'")
