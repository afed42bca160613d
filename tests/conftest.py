"""Fixtures shared by the tests: tiny models on disk, the default model, a project at reduced size, its book."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# A test that would reach for a hub must fail at once, and not wait for time-outs.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the machine: more threads each would only wait for one another.
    os.environ["OMP_NUM_THREADS"] = "1"

REPOSITORY = Path(__file__).resolve().parents[1]
# The same notebooks, smaller: default parameters replaced in a copy of the project.
REDUCED = {
    "self_aware/01_linear_probes": {"n_prompts": "24", "seeds": "[0, 1, 2]"},
    "self_aware/02_latent_introspection": {
        "n_prompts": "24",
        "seeds": "[0, 1, 2]",
        "n_random": "40",
        "n_shuffles": "40",
    },
    "self_aware/03_causal_tracing": {
        "n_prompts": "24",
        "n_pairs": "2",
        "seeds": "[0, 1, 2]",
        "n_sets": "200",
    },
    "self_aware/04_heads_and_neurons": {
        "n_prompts": "24",
        "n_pairs": "4",
        "seeds": "[0, 1, 2]",
        "n_map": "2",
        "n_signs": "20",
    },
    "self_aware/05_suppression_heads": {
        "n_select": "3",
        "n_test": "4",
        "max_new_tokens": "6",
        "n_random_sets": "20",
        "n_probe": "2",
        "n_generated_sets": "1",
        "n_token_pairs": "4",
    },
    "self_aware/06_sparse_autoencoder": {
        "n_pairs": "40",
        "n_train": "12",
        "n_tokens": "8",
        "expansion": "1",
        "steps": "40",
        "n_dictionaries": "2",
        "n_patched": "6",
        "n_ablated": "10",
        "n_ablated_anywhere": "4",
        "n_sets_anywhere": "1",
        "n_texts": "4",
        "n_traced": "4",
        "n_before": "3",
        "n_generated": "2",
    },
}


def pytest_collection_modifyitems(items):
    """Side by side, tests of one file stay together, and those of the book, which is built once, come first."""
    for item in items:
        book = "reduced_project" in item.fixturenames
        item.add_marker(pytest.mark.xdist_group("book" if book else item.path.stem))
    items.sort(key=lambda item: "reduced_project" not in item.fixturenames)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """Write a tiny model of a family once: `tiny_folder("qwen3")`."""
    from tiny import write_model

    made = {}

    def folder(family="llama", **options):
        key = (family, *sorted(options.items()))
        if key not in made:
            made[key] = write_model(tmp_path_factory.mktemp(family), family, **options)
        return made[key]

    return folder


@pytest.fixture(scope="session")
def default_model():
    """The book's own model: NF4, role aligned, float32 compute on the CPU."""
    import rim_core as rim

    return rim.load("smollm2:aligned", device="cpu")


def _reduced_copy(target: Path) -> Path:
    target.mkdir(parents=True, exist_ok=True)
    for name in ("book", "notebooks", "_config.yml", "_toc.yml", "constraints.txt"):
        source = REPOSITORY / name
        if source.is_dir():
            shutil.copytree(
                source, target / name, ignore=shutil.ignore_patterns("experiments", ".ipynb_checkpoints")
            )
        else:
            shutil.copy(source, target / name)
    for notebook, values in REDUCED.items():
        path = target / "notebooks" / f"{notebook}.ipynb"
        content = json.loads(path.read_text(encoding="utf-8"))
        cell = next(c for c in content["cells"] if "parameters" in c["metadata"].get("tags", []))
        lines = "".join(cell["source"]).splitlines()
        for name, value in values.items():
            index = next(i for i, line in enumerate(lines) if line.startswith(f"{name}:"))
            lines[index] = f"{lines[index].split('=')[0]}= {value}"
        cell["source"] = "\n".join(lines)
        path.write_text(json.dumps(content), encoding="utf-8")
    return target


@pytest.fixture(scope="session")
def project_copy():
    """Copy the project, its notebooks' defaults reduced, into a folder: `project_copy(folder)`."""
    return _reduced_copy


@pytest.fixture(scope="session")
def reduced_project(tmp_path_factory) -> Path:
    """A copy of the project whose notebooks have small defaults, run and built by the `rim` command."""
    project = _reduced_copy(tmp_path_factory.mktemp("project"))
    done = subprocess.run(
        [sys.executable, "-m", "rim_core.cli", "book"],
        cwd=project,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    (project / "index-path.txt").write_text(done.stdout.strip().splitlines()[-1], encoding="utf-8")
    return project


@pytest.fixture(scope="session")
def built_book(reduced_project) -> Path:
    """The path of the built book's index."""
    return Path((reduced_project / "index-path.txt").read_text(encoding="utf-8"))
