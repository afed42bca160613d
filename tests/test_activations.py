"""Capture, against hooks written here and against Hugging Face's own hidden states."""

import pytest
import torch
from families import load_tiny, reference
from plain import assert_close, hooks, tensors
from tiny import TEXTS

import rim_core as rim
from rim_core.errors import InputError
from rim_core.models.capture import open_activations
from rim_core.models.layout import SITES
from rim_core.suites.weights import cache_dir


def test_a_shared_beginning_changes_no_number():
    """With a window of 6 tokens the beginning is partly out of sight."""
    model = load_tiny("mistral", "nf4")
    texts = rim.format_chat(model, TEXTS, system="You answer in a few plain words and stay on the topic.")
    last = rim.capture(model, texts, SITES)
    for row, text in enumerate(texts):
        wanted, _ = reference(model, "mistral", text)
        for site in SITES:
            assert_close(last[site][row].flatten(1), wanted[site][:, -1])


def test_named_positions_count_from_each_prompt_s_end(tiny_folder):
    model = rim.load(str(tiny_folder()), quantization=None, device="cpu")
    every = rim.capture(model, TEXTS, "resid_post", positions="all")["resid_post"]
    two = rim.capture(model, TEXTS, "resid_post", positions=[-1, -3])["resid_post"]
    one = rim.capture(model, TEXTS, "resid_post", positions=-2)["resid_post"]
    assert two.shape == (3, 2, model.n_layers, model.d_model)
    assert torch.allclose(two[:, 0], every[:, -1], atol=1e-4)
    assert torch.allclose(two[:, 1], every[:, -3], atol=1e-4)
    assert torch.allclose(one, every[:, -2], atol=1e-4)


def test_batch_size_does_not_change_the_numbers(tiny_folder):
    model = rim.load(str(tiny_folder("gpt2")), quantization=None, device="cpu")  # absolute positions
    together = rim.capture(model, TEXTS, "head_z")["head_z"]
    alone = rim.capture(model, TEXTS, "head_z", max_tokens=1)["head_z"]
    assert_close(together, alone)


@pytest.mark.parametrize("positions", ["last", "all"])
def test_streamed_shards_equal_memory(tiny_folder, tmp_path, positions):
    model = rim.load(str(tiny_folder()), quantization=None, device="cpu")
    sites = ["head_z", "resid_post"]
    kept = rim.capture(model, TEXTS, sites, positions=positions, max_tokens=1)
    streamed = rim.capture(model, TEXTS, sites, positions=positions, to=tmp_path / "acts", max_tokens=1)
    again = open_activations(tmp_path / "acts")
    assert len(list((tmp_path / "acts").glob("shard-*.safetensors"))) == len(TEXTS)
    for site in sites:
        assert torch.equal(streamed[site], kept[site])
        assert torch.equal(again[site], kept[site])
    if positions == "all":
        assert torch.equal(again.mask, kept.mask)


def test_an_interrupted_stream_leaves_nothing(tiny_folder, tmp_path, monkeypatch):
    import rim_core.models.capture as module

    model = rim.load(str(tiny_folder()), quantization=None, device="cpu")
    real, calls = module.save_file, []

    def second_fails(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return real(*args, **kwargs)

    monkeypatch.setattr(module, "save_file", second_fails)
    with pytest.raises(InputError, match="No space left"):
        rim.capture(model, TEXTS, "head_z", to=tmp_path / "acts", max_tokens=1)
    assert list(tmp_path.iterdir()) == []


def test_the_cache_is_used_and_knows_the_model(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("RIM_CACHE", str(tmp_path))
    model = rim.load(str(tiny_folder()), quantization=None, device="cpu")
    first = rim.capture(model, TEXTS, "mlp_neurons", cache=True)["mlp_neurons"]
    assert torch.equal(first, rim.capture(model, TEXTS, "mlp_neurons")["mlp_neurons"])
    folders = list((cache_dir() / "activations").iterdir())
    assert len(folders) == 1
    calls = []
    handle = model.hf.register_forward_hook(lambda *_: calls.append(1))
    body = model.layout.body.register_forward_hook(lambda *_: calls.append(1))
    assert torch.equal(rim.capture(model, TEXTS, "mlp_neurons", cache=True)["mlp_neurons"], first)
    assert not calls
    handle.remove()
    body.remove()
    other = rim.load(str(tiny_folder("llama", seed=1)), quantization=None, device="cpu")
    assert not torch.equal(rim.capture(other, TEXTS, "mlp_neurons", cache=True)["mlp_neurons"], first)


def test_no_hook_and_no_tensor_leaks(tiny_folder):
    model = rim.load(str(tiny_folder()), quantization=None, device="cpu")

    rim.capture(model, TEXTS, SITES)
    before = hooks(model), tensors()
    for _ in range(20):
        rim.capture(model, TEXTS, SITES)
    assert hooks(model) == before[0]
    assert tensors() <= before[1] + 2


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"sites": "resid_mid"}, "unknown site 'resid_mid'.*resid_pre"),
        ({"positions": "first"}, "unknown positions"),
        ({"positions": 0}, "out of range"),
        ({"positions": -500}, "out of range"),
        ({"texts": []}, "no texts"),
        ({"texts": "one string"}, "list"),
        ({"texts": ["fine", ""]}, "text 1 is empty"),
    ],
)
def test_bad_arguments_get_one_line(tiny_folder, arguments, says):
    model = rim.load(str(tiny_folder()), quantization=None, device="cpu")
    with pytest.raises(InputError, match=says):
        rim.capture(model, **{"texts": TEXTS, "sites": "head_z", **arguments})


def test_a_site_not_captured_is_named(tiny_folder):
    model = rim.load(str(tiny_folder()), quantization=None, device="cpu")
    with pytest.raises(InputError, match="holds head_z"):
        rim.capture(model, TEXTS, "head_z")["resid_post"]


def test_spans_are_of_one_fragment_or_of_one_for_each_text():
    model = load_tiny("llama")
    same = rim.find_span(model, TEXTS, "e")
    assert rim.find_span(model.tokenizer, TEXTS, ["e"] * 3) == same
    prompts = [rim.Prompt(text[-5:], "any", number, "test", 0) for number, text in enumerate(TEXTS)]
    spans = rim.find_span(model, TEXTS, prompts)
    assert [span[-1] for span in spans] == [-1, -1, -1]
    assert rim.find_span(model, TEXTS[:1], prompts[0]) == spans[:1]
    for wrong, says in (
        (["e", "e"], "2 fragments for 3 texts"),
        (["e", "e", "x" * 9], "text 2 does not contain 'xxxxxxxxx'"),
        (["e", "e", 3], "text 2 does not contain 3"),
        ("", "text 0 does not contain ''"),
        (7, "fragment must be a list"),
    ):
        with pytest.raises(InputError, match=says):
            rim.find_span(model, TEXTS, wrong)
