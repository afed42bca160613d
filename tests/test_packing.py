"""4-bit weights stay as they were packed, on any processor, and bitsandbytes comes without its noise.

Processors with AVX512-BF16 are pretended, so that both kinds are tested on either: bitsandbytes is told that it is
on one, and its pass over repacked weights, a machine instruction, is written out.
"""

import copy
import re
import subprocess
import sys
from pathlib import Path

import bitsandbytes as bnb
import pytest
import tiny_project
import torch
from bitsandbytes import functional
from bitsandbytes.nn import modules
from plain import plain_model, write_lora
from tiny import TEXTS
from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig

import rim_core as rim
from rim_core import organisms
from rim_core.behaviour.model_judges import ClassifierJudge
from rim_core.models.loading import keep_packed

REPOSITORY = Path(__file__).resolve().parents[1]
# Put before anything else in a process: bitsandbytes' native library says that the processor has the instruction.
PRETEND = """
import ctypes
found = ctypes.CDLL.__getattr__
ctypes.CDLL.__getattr__ = lambda lib, name: (lambda: 1) if name == "has_avx512bf16_cpu" else found(lib, name)
"""


def repacked_pass(x, weight, out=None, state=None):
    """`gemv_4bit` over repacked weights: bfloat16 throughout."""
    plain, state = functional._convert_weight_packed_for_cpu_inverse(weight, copy.copy(state))
    state.absmax = state.absmax.T.reshape(-1).float()  # the inverse leaves it transposed
    matrix = functional.dequantize_4bit(plain, state).to(torch.bfloat16)
    return (x.to(torch.bfloat16) @ matrix.T).to(x.dtype)


def detect(patch, there):
    """Let bitsandbytes find, or miss, AVX512-BF16; give the list that counts what it repacks."""
    repacked = []

    def repack(weight, state):
        repacked.append(state.shape)
        return functional._convert_weight_packed_for_cpu(weight, state)

    patch.setattr(modules, "has_avx512bf16", lambda: there)
    patch.setattr(modules, "_convert_weight_packed_for_cpu", repack)
    patch.setattr(functional, "gemv_4bit", repacked_pass)
    return repacked


def four_bit(hf):
    return [module for module in hf.modules() if isinstance(module, bnb.nn.Linear4bit)]


def linear(seed=0):
    torch.manual_seed(seed)
    layer = bnb.nn.Linear4bit(128, 64, compute_dtype=torch.float32, quant_type="nf4", compress_statistics=False)
    return layer.to("cpu").eval()


@torch.no_grad()
def test_what_is_pretended_repacks_and_changes_numbers(monkeypatch):
    x = torch.randn(3, 128)
    wanted = keep_packed(linear())(x)
    repacked = detect(monkeypatch, True)
    left, kept = linear(), keep_packed(linear())
    assert torch.equal(kept(x), wanted)
    assert not repacked
    error = (left(x) - wanted).abs().max() / wanted.abs().max()
    assert repacked == [torch.Size([64, 128])]
    assert 1e-4 < error < 2e-2
    assert left(x).dtype == wanted.dtype


@pytest.fixture(scope="module")
def adapter(tiny_folder, tmp_path_factory):
    """An adapter with weights that matter, on the tiny Llama."""
    return write_lora(tiny_folder(), ["q_proj", "down_proj"], tmp_path_factory.mktemp("adapter"))


@pytest.fixture(scope="module")
def classifier(tiny_folder, tmp_path_factory):
    """A sequence classifier that was saved in 4 bits."""
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    torch.manual_seed(2)
    hf = AutoModelForSequenceClassification.from_pretrained(
        tiny_folder(), quantization_config=config, device_map="cpu", num_labels=2
    )
    folder = tmp_path_factory.mktemp("classifier")
    hf.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tiny_folder() / name).read_bytes())
    return folder


def numbers(folder, adapter, classifier):
    """What a model gives by every way to its packed weights: forward, backward, adapters, copies, dequantised."""
    model = rim.load(str(folder), device="cpu")
    ids = model.tokenizer(TEXTS[0], return_tensors="pt").input_ids
    found = {}
    with torch.no_grad():
        found["forward"] = model.hf(ids).logits
        found["copy"] = copy.deepcopy(model.hf)(ids).logits
        with model.using(adapter):
            found["adapter"] = model.hf(ids).logits
            found["copy with adapter"] = copy.deepcopy(model.hf)(ids).logits
            found["sites"] = rim.capture(model, TEXTS, ["head_z", "resid_post"])["head_z"]
            merged = copy.deepcopy(model.hf)
            for module in merged.modules():
                if hasattr(module, "base_layer"):
                    module.merge()
            found["merged"] = merged(ids).logits
        with model.nnsight.trace(TEXTS[0]):
            found["trace"] = model.nnsight.lm_head.output.save()
    found["attribution"] = rim.direct_logit_attribution(model, TEXTS, "How", "Why").heads
    embedded = model.hf.get_input_embeddings()(ids).detach().requires_grad_(True)
    model.hf(inputs_embeds=embedded).logits[0, -1, 5].backward()
    found["gradient"] = embedded.grad
    found["generated"] = model.tokenizer(
        rim.generate(model, TEXTS[:1], max_new_tokens=6), return_tensors="pt"
    ).input_ids
    assert not any(module.support_avx512bf16_for_cpu for module in four_bit(model.hf))
    dequantised = copy.deepcopy(model.hf)
    organisms.dequantise(dequantised)
    found["dequantised"] = dequantised(ids).logits.detach()
    judge = ClassifierJudge(str(classifier), 1, device="cpu")
    assert four_bit(judge.hf)
    found["judge"] = judge.probabilities(None, list(TEXTS))
    return found


def test_a_model_gives_the_same_numbers_on_either_processor(tiny_folder, adapter, classifier, monkeypatch):
    repacked = detect(monkeypatch, False)
    without = numbers(tiny_folder(), adapter, classifier)
    detect(monkeypatch, True)
    assert linear().support_avx512bf16_for_cpu
    assert not repacked
    repacked = detect(monkeypatch, True)
    with_it = numbers(tiny_folder(), adapter, classifier)
    assert not repacked
    for name, wanted in without.items():
        assert torch.equal(with_it[name], wanted), name
    assert torch.equal(without["forward"], without["copy"])
    assert torch.equal(without["adapter"], without["copy with adapter"])
    assert not torch.allclose(without["adapter"], without["forward"])


def test_a_reference_is_loaded_so_too(tiny_folder, monkeypatch):
    repacked = detect(monkeypatch, True)
    hf = plain_model(tiny_folder(), "nf4")
    assert four_bit(hf)
    hf(torch.arange(5, 25)[None])
    assert not repacked


@pytest.mark.parametrize("folder", ["rim_core", "companion", "tests", "benchmarks", "notebooks", "book"])
def test_nothing_loads_packed_weights_by_another_way(folder):
    ways = re.compile(r"BitsAndBytesConfig\(|CausalLM\.from_pretrained\(")
    known = {f"rim_core/{name}.py" for name in ("models/loading", "suites/weights")}
    known |= {"tests/plain.py", "tests/test_packing.py"}
    found = {
        path.relative_to(REPOSITORY).as_posix()
        for kind in ("*.py", "*.ipynb", "*.md")
        for path in (REPOSITORY / folder).rglob(kind)
        if ways.search(path.read_text(encoding="utf-8"))
    }
    assert found <= known, found - known


# --- noise ----------------------------------------------------------------------------------------------


def run(code, *arguments):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PRETEND + code, *map(str, arguments)],
        env=tiny_project.environment(HF_HUB_OFFLINE="1"),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stderr


QUIET = """
import logging, sys
import rim_core as rim
model = rim.load(sys.argv[1], quantization=None, device="cpu")
with model.using(sys.argv[2]):
    pass
assert "bitsandbytes" in sys.modules
logging.getLogger("bitsandbytes.backends.cpu.ops").warning("something else")
"""


def test_advice_to_install_a_kernel_is_not_heard_and_all_else_is(tiny_folder, adapter):
    assert "Failed to load CPU gemm_4bit_forward" in run("import bitsandbytes")
    assert run(QUIET, tiny_folder(), adapter).splitlines() == ["something else"]
