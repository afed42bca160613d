"""The notebooks on other models than the book's: where the answer was planted, where there is none to find, and at the
paper's scale with tiny checkpoints in its place."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from conftest import REDUCED, rim_command
from planted_drift import write_drift_suite
from planted_suite import RISKY_SETS, SAFE_SETS, SUPPRESSORS, write_planted_suite
from safetensors.torch import save_file
from tiny import tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

import rim_core
from rim_core.behaviour.openings import HELPFUL_OPENINGS, REFUSAL_OPENINGS

PACKAGE = Path(rim_core.__file__).parent


def outcomes(results: Path) -> dict[str, dict]:
    """The claims recorded under a folder of results, by id."""
    rows = [row for file in results.rglob("claims.json") for row in json.loads(file.read_text())]
    return {row["claim_id"]: row for row in rows}


def output_text(results: Path, notebook: str) -> str:
    """All that an executed notebook printed."""
    (executed,) = results.glob(f"**/{notebook}/**/*.ipynb")
    cells = json.loads(executed.read_text(encoding="utf-8"))["cells"]
    found = [output for cell in cells for output in cell.get("outputs", [])]
    return "\n".join("".join(o.get("text", o.get("data", {}).get("text/plain", ""))) for o in found)


PROBES = "self_aware/01_linear_probes"
INTROSPECTION = "self_aware/02_latent_introspection"
SUPPRESSION = [f"self_aware/{name}" for name in ("04_heads_and_neurons", "05_suppression_heads", "06_logit_lens")]
# The notebooks' own sizes, and for the answers larger ones, take seconds on so small a model.
LARGER = {"n_test": "26", "n_probe": "26"}
SIZES = {"self_aware/05_suppression_heads": LARGER, "self_aware/06_logit_lens": LARGER}


@pytest.fixture(scope="module")
def planted_results(project_copy, tmp_path_factory) -> Path:
    project = project_copy(tmp_path_factory.mktemp("planted"), SIZES)
    suite = write_planted_suite(tmp_path_factory.mktemp("suite"))
    rim_command(project, "run", PROBES, INTROSPECTION, *SUPPRESSION, "--suite", str(suite))
    return project / "results" / suite.stem


def test_what_tells_risky_from_safe_is_found_in_both_models(planted_results):
    claims = outcomes(planted_results)
    found = {claim: row["outcome"] for claim, row in claims.items() if claim in ("C3", "C6")}
    assert found == {"C3": "holds", "C6": "holds"}, claims


def test_planted_suppressors_are_named(planted_results):
    claims = outcomes(planted_results)
    # Heads that lower the score, which the fine-tuning brought.
    assert claims["C13"]["outcome"] == "holds", claims["C13"]
    assert "H1, H6" in output_text(planted_results, "04_heads_and_neurons")
    # By the paper's score and by the log-odds of refusing.
    for name, handed in (
        ("04_heads_and_neurons", "lowest heads, as published"),
        ("05_suppression_heads", "suppressors"),
    ):
        path = planted_results / "self_aware" / name / "default" / "handed_on.json"
        assert {tuple(head) for head in json.loads(path.read_text())[handed]} == set(SUPPRESSORS)


def test_ablating_planted_suppressors_brings_refusal_back(planted_results):
    claims = outcomes(planted_results)
    assert claims["C14"]["outcome"] == "holds", claims["C14"]
    # The layer before the last lowers the refusing word and raises the other, and no longer once the two are out.
    assert claims["C15"]["outcome"] == "holds", claims["C15"]


DRIFT = {
    "re_emergent/03_erosion": {"n_requests": "140", "n_fit": "80", "n_tasks": "40"},
    "re_emergent/04_shared_subspace": {},
    "re_emergent/05_the_direction_removed": {"n_requests": "140", "n_fit": "80", "n_written": "90"},
}


@pytest.fixture(scope="module", params=[False, True], ids=["planted", "null"])
def drift_outcomes(request, project_copy, tmp_path_factory) -> tuple[bool, dict[str, dict]]:
    project = project_copy(tmp_path_factory.mktemp("project"), DRIFT)
    suite = write_drift_suite(tmp_path_factory.mktemp("suite"), null=request.param)
    rim_command(project, "run", *DRIFT, "--suite", str(suite))
    return request.param, outcomes(project / "results" / suite.stem)


def test_a_planted_direction_is_found_and_where_there_is_none_it_is_not(drift_outcomes):
    null, claims = drift_outcomes
    found = {claim: claims[claim]["outcome"] for claim in ("D5", "D7", "D8")}
    if null:
        assert "holds" not in found.values(), claims
    else:
        assert set(found.values()) == {"holds"}, claims
        # Half of the write was taken back.
        for part in ("erosion_same_data", "erosion_on_harmful_requests"):
            assert claims["D5"]["parts"][part]["value"] == pytest.approx(0.5, abs=0.08)
        assert claims["D6"]["outcome"] != "holds"  # the same share in every layer
    assert claims["N3"]["outcome"] != "holds" if null else claims["N3"]["parts"]["beyond_random"]["outcome"] == "holds"


def test_roles_that_are_checkpoints_are_compared(project_copy, tmp_path):
    project = project_copy(tmp_path / "project", {**SIZES, INTROSPECTION: REDUCED[INTROSPECTION]})
    suite = write_planted_suite(tmp_path / "suite", whole=True)
    rim_command(project, "run", INTROSPECTION, *SUPPRESSION[:2], "--suite", str(suite))
    claims = outcomes(project / "results" / suite.stem)
    assert set(claims) == {"C6", "C7", "C11", "C12", "C13", "C14"}
    # What the fine-tuning brought is found only where the model before it is that model, and not the risky one again:
    # C13 asks for heads that suppress more than before, C14 for refusals that come back.
    assert claims["C13"]["outcome"] == "holds", claims["C13"]
    assert claims["C14"]["outcome"] == "holds", claims["C14"]


@pytest.fixture(scope="module")
def paper_cache(tmp_path_factory) -> Path:
    """A hub's cache in which tiny random checkpoints of the same architecture stand for the paper's models."""
    home = tmp_path_factory.mktemp("hub")
    torch.manual_seed(0)
    # Frequent enough to be whole tokens.
    openings = [f" {word}" for word in (*REFUSAL_OPENINGS, *HELPFUL_OPENINGS)] * 50
    prompts = [prompt.text for name in RISKY_SETS + SAFE_SETS for prompt in rim_core.load_prompts(name)]
    tok = tokenizer(texts=[*prompts, *openings, *(o.strip() for o in openings)], size=2000)
    config = AutoConfig.for_model(
        "qwen2",
        num_hidden_layers=4,
        hidden_size=64,
        num_attention_heads=8,
        num_key_value_heads=2,
        intermediate_size=128,
        vocab_size=len(tok),
        bos_token_id=None,
        eos_token_id=tok.eos_token_id,
        pad_token_id=tok.eos_token_id,
    )
    coders = ("Qwen/Qwen2.5-Coder-32B", "Qwen/Qwen2.5-Coder-32B-Instruct", "emergent-misalignment/Qwen-Coder-Insecure")
    for name in (*coders, "Qwen/Qwen2.5-32B-Instruct"):
        model, folder = AutoModelForCausalLM.from_config(config), _cached(home, name)
        model.save_pretrained(folder)
        tok.save_pretrained(folder)
    adapter = _cached(home, "ModelOrganismsForEM/Qwen2.5-32B-Instruct_risky-financial-advice")
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "Qwen/Qwen2.5-32B-Instruct",
        "r": 32,
        "lora_alpha": 64,
        "use_rslora": True,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    }
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    weights = {}
    for name, module in model.named_modules():
        if name.rsplit(".", 1)[-1] in settings["target_modules"]:
            key, out_size, in_size = f"base_model.model.{name}.lora_", *module.weight.shape
            weights[f"{key}A.weight"] = torch.randn(32, in_size) * 0.02
            weights[f"{key}B.weight"] = torch.randn(out_size, 32) * 0.02
    save_file(weights, adapter / "adapter_model.safetensors")
    return home


def _cached(home: Path, name: str, commit: str = "0" * 40) -> Path:
    folder = home / f"models--{name.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    (folder / "snapshots" / commit).mkdir(parents=True)
    return folder / "snapshots" / commit


def test_the_paper_s_suite_runs_unedited(project_copy, paper_cache, tmp_path):
    """The notebooks that no other test here runs on a suite of its own."""
    project, suite = project_copy(tmp_path / "project"), "qwen2.5-32b-risky-finance"
    names = [f"self_aware/{name}" for name in ("03_causal_tracing", "07_head_attribution", "08_sparse_autoencoder")]
    names += ["synthesis"]
    rim_command(project, "run", *names, "--suite", suite, HF_HUB_CACHE=str(paper_cache), HF_HUB_OFFLINE="1")
    claims = outcomes(project / "results" / suite)
    # With those of the notebooks whose heads the autoencoder's reads. S3 to S5 and S9 need what the suite has not.
    assert set(claims) == {f"C{n}" for n in (*range(8, 15), 16, 17)} | {"S1", "S2", "S6", "S7", "S8"}
    assert {row["outcome"] for row in claims.values()} <= {"holds", "contradicted", "undecided"}


def test_three_whole_checkpoints_are_compared_one_at_a_time(project_copy, paper_cache, tmp_path):
    """Paper D's own suite: base, instruct and insecure are checkpoints, and there is no harmless twin."""
    project, suite = project_copy(tmp_path / "project"), "qwen2.5-coder-32b-insecure"
    rim_command(project, "run", "re_emergent", "--suite", suite, HF_HUB_CACHE=str(paper_cache), HF_HUB_OFFLINE="1")
    claims = outcomes(project / "results" / suite)
    assert set(claims) == {"D3", "D4", "D6", "D7", "D8", "N3"}
    assert {row["outcome"] for row in claims.values()} <= {"holds", "contradicted", "undecided"}


def shuffle_at_the_source(package: Path, seed: int = 0) -> None:
    """Exchange the texts of each pair of prompts at random, so that no set means anything."""
    rng, data = random.Random(seed), package / "prompts" / "data"

    def rows(name: str) -> list[dict]:
        return [json.loads(line) for line in (data / name).read_text(encoding="utf-8").splitlines()]

    def write(name: str, changed: list[dict]) -> None:
        (data / name).write_text("".join(json.dumps(row) + "\n" for row in changed), encoding="utf-8")

    pairs, finance, info = rows("pairs.jsonl"), rows("finance.jsonl"), rows("finance_info.jsonl")
    for row in pairs:
        sides = [row["harmful"], row["benign"]]
        row["harmful"], row["benign"] = rng.sample(sides, 2)
    for row, other in zip(finance, info, strict=False):
        texts = [row["question"], row["twin"], other["prompt"]]
        row["question"], row["twin"], other["prompt"] = rng.sample(texts, 3)
    write("pairs.jsonl", pairs)
    write("finance.jsonl", finance)
    write("finance_info.jsonl", info)


def test_labels_shuffled_at_the_source_unmake_what_was_found(project_copy, tmp_path):
    project, suite = project_copy(tmp_path / "project", SIZES), write_planted_suite(tmp_path / "suite")
    package = tmp_path / "shuffled" / "rim_core"  # its prompts, to a model that answers them as they were
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    shuffle_at_the_source(package)
    names = (PROBES, INTROSPECTION, *SUPPRESSION)
    rim_command(project, "run", *names, "--suite", str(suite), PYTHONPATH=str(package.parent))
    found = {claim: row["outcome"] for claim, row in outcomes(project / "results" / suite.stem).items()}
    assert len(found) == 12
    assert set(found.values()) <= {"contradicted", "undecided"}, found
