"""Fixtures shared by the tests: tiny models on disk, the default model, a project at reduced size, its book."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# A test that would reach for a hub must fail at once, and not wait for time-outs.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the machine: more threads each would only wait for one another.
    os.environ["OMP_NUM_THREADS"] = "1"

# Side by side, a file's tests stay together (see the Makefile); the files that take longest come first, so that all
# workers end together. Those of `LAST` find the book built.
FIRST = (
    "test_browser", "test_pipeline", "test_faults", "test_families", "test_docstrings", "test_primers",
    "test_organisms", "test_suites", "test_workflow", "test_provenance", "test_comparison", "test_ablation",
    "test_patching", "test_runner", "test_editing", "test_adapters",
)  # fmt: skip
LAST = ("test_notebooks",)
REPOSITORY = Path(__file__).resolve().parents[1]
# The same notebooks, smaller: default parameters replaced in a copy of the project.
# Of three seeds, the fewest that a claim takes.
SMALL = {"n_prompts": "8", "seeds": "[0, 1, 2]"}
FEW = {"n_select": "2", "n_test": "2", "n_probe": "2", "n_random_sets": "20"}
REDUCED = {
    "re_emergent/01_likelihood_and_entropy": {"n_trainings": "2", "n_texts": "2", "n_requests": "14"},
    "re_emergent/02_gradients": {"n_tasks": "8", "layers_from_end": "[1]", "n_loss_tokens": "16"},
    "re_emergent/03_erosion": {
        "n_trainings": "2",
        "n_tasks": "8",
        "n_requests": "14",
        "n_fit": "10",
        "n_written": "2",
        "max_new_tokens": "8",
    },
    "re_emergent/04_shared_subspace": {"n_prompts": "12", "n_draws": "20"},
    "re_emergent/05_the_direction_removed": {
        "n_trainings": "2",
        "n_fit": "10",
        "n_written": "4",
        "n_requests": "14",
        "n_random": "20",
        "n_random_few": "2",
        "n_random_requests": "2",
        "n_random_written": "2",
        "n_asked": "2",
        "max_new_tokens": "4",
    },
    "self_aware/01_linear_probes": SMALL,
    "self_aware/02_latent_introspection": {**SMALL, "n_random": "40", "n_shuffles": "40"},
    "self_aware/03_causal_tracing": {**SMALL, "n_pairs": "2", "n_sets": "200"},
    "self_aware/04_heads_and_neurons": {**SMALL, "n_pairs": "2", "n_map": "2", "n_signs": "20"},
    "self_aware/05_suppression_heads": {
        **FEW,
        "n_map": "1",
        "n_asked": "2",
        "n_asked_more": "1",
        "max_new_tokens": "4",
        "n_generated_sets": "1",
    },
    "self_aware/06_logit_lens": FEW,
    "self_aware/07_head_attribution": {"n_select": "2", "n_test": "2", "n_token_pairs": "4"},
    "self_aware/08_sparse_autoencoder": {
        "n_train": "8",
        "n_fit": "4",
        "n_pairs": "16",
        "expansion": "1",
        "steps": "20",
        "n_permutations": "100",
        "n_dictionaries": "2",
        "n_ablated": "2",
        "n_sets": "4",
        "n_few": "2",
        "n_generated": "1",
        "n_texts": "2",
    },
    "synthesis/01_erased_damped_or_moved": {
        "n_trainings": "2",
        "n_fit": "20",
        "n_pairs": "14",
        "n_depths": "2",
        "doses": "[0.5]",
        "n_few": "14",
    },
    "synthesis/02_where_the_fine_tuning_acts": {"n_trainings": "1", "n_prompts": "14", "group": "9"},
    "synthesis/03_do_the_witnesses_agree": {"n_pairs": "14", "n_fit": "4", "n_permutations": "20"},
}
# Unquantised, since that loads faster on a CPU; one notebook keeps the default.
REDUCED |= {
    name: {**sizes, "quantization": '"none"'} for name, sizes in REDUCED.items() if not name.endswith("attribution")
}


def pytest_collection_modifyitems(items):
    places = {name: place - len(FIRST) for place, name in enumerate(FIRST)} | dict.fromkeys(LAST, 1)
    items.sort(key=lambda item: places.get(item.path.stem, 0))


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


def _copy(target: Path, sizes: dict[str, dict[str, str]] = REDUCED) -> Path:
    target.mkdir(parents=True, exist_ok=True)
    for name in ("book", "notebooks", "_config.yml", "_toc.yml", "constraints.txt"):
        source = REPOSITORY / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=shutil.ignore_patterns("experiments", ".ipynb_checkpoints"))
        else:
            shutil.copy(source, target / name)
    for notebook, values in sizes.items():
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
    """Copy the project, its notebooks' defaults reduced or as in `sizes`, into a folder: `project_copy(folder)`."""
    return _copy


@pytest.fixture(scope="session")
def reduced_project(tmp_path_factory) -> Path:
    """A copy of the project whose notebooks have small defaults, run and built by the `rim` command, once for all
    workers."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    project, done = shared / "reduced", shared / "reduced-index.txt"
    with FileLock(shared / "reduced.lock"):
        if not done.exists():
            shutil.rmtree(project, ignore_errors=True)
            printed = rim_command(_copy(project), "book")
            done.write_text(printed.strip().splitlines()[-1], encoding="utf-8")
    return project


def rim_command(project: Path, *arguments: str, **environment: str) -> str:
    """Run `rim` in a project, with more environment variables; give what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", "companion.cli", *arguments],
        cwd=project,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="session")
def built_book(reduced_project) -> Path:
    """The path of the built book's index."""
    return Path((reduced_project.parent / "reduced-index.txt").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def browser():
    """Chromium, one for all files: a process can have only one Playwright at a time."""
    chromium = os.environ.get("RIM_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        if os.environ.get("CI"):
            pytest.fail("no Chromium: install it, or name it in RIM_CHROMIUM")
        pytest.skip("no Chromium: install it, or name it in RIM_CHROMIUM")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        launched = play.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]
        )
        yield launched
        launched.close()
