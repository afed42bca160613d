"""Thirteen families: every site, identity and readout against hooks and weights found by hand-written paths."""

import pytest
import torch
from families import CASES, FAMILIES, MODULES, load_tiny, reference, sites_of, write_family
from plain import assert_close, hooks
from tiny import TEXTS

import rim_core as rim
from rim_core.errors import IdentityError, InputError
from rim_core.models.layout import find_layout, head_outputs

SHAPES = {  # query heads, key-value heads, head width, stream width, neurons
    "llama": (4, 2, 8, 32, 64),
    "qwen2": (4, 2, 8, 32, 64),
    "qwen3": (4, 2, 16, 32, 64),
    "mistral": (4, 2, 8, 32, 64),
    "gemma2": (4, 2, 16, 32, 64),
    "gemma3_text": (4, 2, 16, 32, 64),
    "phi3": (4, 2, 8, 32, 64),
    "gpt2": (4, 4, 8, 32, 128),
    "gpt_neox": (4, 4, 8, 32, 64),
    "olmo2": (4, 2, 8, 32, 64),
    "falcon": (4, 1, 8, 32, 128),  # as in Falcon-7B, one key-value head for all queries
    "cohere2": (4, 2, 8, 32, 64),
    "qwen3_moe": (4, 2, 16, 32, 0),
}
SANDWICH = ("gemma2", "gemma3_text", "olmo2")
MINIMAX = {
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 64,
    "num_local_experts": 4,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "block_size": 4,
}
SYSTEM = "You answer in a few plain words and stay on the topic."
every_case = pytest.mark.parametrize(("family", "quantization"), CASES)


@every_case
def test_the_layout_names_the_modules_and_shapes(family, quantization):
    model, paths = load_tiny(family, quantization), MODULES[family]
    layout = model.layout
    stack = model.hf.get_submodule(paths.layers)
    assert list(layout.layers) == list(stack)
    assert list(layout.attention) == [layer.get_submodule(paths.attention) for layer in stack]
    assert list(layout.attention_out) == [layer.get_submodule(paths.attention_out) for layer in stack]
    assert list(layout.mlp) == [layer.get_submodule(paths.mlp) for layer in stack]
    down = [layer.get_submodule(paths.mlp_out) if paths.mlp_out else None for layer in stack]
    assert list(layout.mlp_out) == down
    assert layout.final_norm is model.hf.get_submodule(paths.final_norm)
    assert layout.lm_head is model.hf.get_submodule(paths.lm_head)
    shapes = (model.n_heads, model.n_kv_heads, model.head_dim, model.d_model, model.d_mlp)
    assert shapes == SHAPES[family]
    packed = {type(module).__name__ == "Linear4bit" for module in layout.attention_out}
    assert packed == {quantization == "nf4"}
    for number, block in enumerate(stack):
        found = tuple(layout.norm_after(site, number) for site in ("attn_out", "mlp_out"))
        norms = ("post_attention_layernorm", "post_feedforward_layernorm")
        assert found == tuple(getattr(block, norm) if family in SANDWICH else None for norm in norms)


@every_case
def test_every_identity_holds(family, quantization):
    checks = load_tiny(family, quantization).checks
    assert set(checks) == {"residual_sum", "lens", "head_sum", "padding", "cache", "decoding", "cache_batch"}
    for check in checks.values():
        assert check.error < 1e-5, check


@every_case
def test_every_site_of_every_prompt_equals_plain_hooks(family, quantization):
    model, sites = load_tiny(family, quantization), sites_of(family)
    last = rim.capture(model, TEXTS, sites)
    every = rim.capture(model, TEXTS, sites, positions="all")
    for row, text in enumerate(TEXTS):
        wanted, _ = reference(model, family, text)
        length = wanted["resid_pre"].shape[1]
        assert every.mask[row].sum() == length
        for site in sites:
            assert_close(last[site][row].flatten(1), wanted[site][:, -1])
            assert_close(every[site][row, -length:].flatten(2).transpose(0, 1), wanted[site])
            assert not every[site][row, :-length].any()
    assert hooks(model) == 0


@every_case
def test_a_shared_beginning_changes_no_number(family, quantization):
    """Chat prompts start alike, and run on top of its keys and values; windows of 6 tokens see it in part."""
    model, sites = load_tiny(family, quantization), sites_of(family)
    texts = rim.format_chat(model, TEXTS, system=SYSTEM)
    found = rim.capture(model, texts, sites, positions=[-1, -4])
    for row, text in enumerate(texts):
        wanted, _ = reference(model, family, text)
        for site in sites:
            assert_close(found[site][row].flatten(2), wanted[site][:, [-1, -4]].transpose(0, 1))


@every_case
def test_readout_of_the_last_layer_is_the_model_s_logits(family, quantization):
    model = load_tiny(family, quantization)
    wanted, logits = reference(model, family, TEXTS[1])
    assert_close(model.layout.readout(wanted["resid_post"][-1]), logits)


@pytest.mark.parametrize(
    ("family", "changes", "scale", "cap"),
    [
        ("cohere2", {}, 0.25, None),
        ("gemma2", {}, 1.0, 8.0),
        ("granite", {"logits_scaling": 4.0}, 0.25, None),  # divides
    ],
)
def test_the_readout_s_scale_and_soft_cap_matter(tmp_path, family, changes, scale, cap):
    folder = write_family(tmp_path / family, family, **changes)
    model = rim.load(str(folder), quantization=None, device="cpu")
    assert (model.layout.logit_scale, model.layout.soft_cap) == (scale, cap)
    assert model.checks["lens"].error < 1e-5
    h = rim.capture(model, TEXTS, "resid_post")["resid_post"][:, -1]
    bare = model.hf.lm_head(model.hf.model.norm(h))
    assert (bare - model.layout.readout(h)).abs().max() > 0.1 * bare.abs().max()


@every_case
def test_heads_are_the_projection_s_column_blocks_and_sum_to_attn_out(family, quantization):
    model = load_tiny(family, quantization)
    wanted, _ = reference(model, family, TEXTS[1])
    paths = MODULES[family]
    for number, layer in enumerate(model.hf.get_submodule(paths.layers)):
        projection = layer.get_submodule(paths.attention_out)
        z = wanted["head_z"][number].unflatten(-1, (model.n_heads, model.head_dim))
        found = head_outputs(model.layout, number, z)
        bias = 0 if projection.bias is None else projection.bias
        assert_close(found.sum(-2) + bias, wanted["attn_out"][number])
        if quantization is None:
            weight = projection.weight if family == "gpt2" else projection.weight.T
            blocks = weight.unflatten(0, (model.n_heads, model.head_dim))
            assert_close(found, torch.einsum("phz,hzd->phd", z, blocks))


@pytest.mark.parametrize("quantization", [None, "nf4"])
@pytest.mark.parametrize("streamed", [False, True])
def test_experts_have_no_neurons(tmp_path, quantization, streamed):
    model = load_tiny("qwen3_moe", quantization)
    to = tmp_path / "acts" if streamed else None
    with pytest.raises(InputError, match=r"layer 0 is a mixture of experts.*choose mlp_out"):
        rim.capture(model, TEXTS, ["resid_post", "mlp_neurons"], to=to)
    assert hooks(model) == 0
    assert list(tmp_path.iterdir()) == []


def test_a_dense_layer_among_experts_keeps_its_down_projection(tmp_path):
    folder = write_family(tmp_path / "model", "qwen3_moe", mlp_only_layers=[0])
    model = rim.load(str(folder), quantization=None, device="cpu")
    assert model.d_mlp == 0
    assert model.layout.down_projection(0) is model.hf.model.layers[0].mlp.down_proj
    with pytest.raises(InputError, match="layer 1 is a mixture of experts"):
        rim.capture(model, TEXTS, "mlp_neurons")


def test_modules_that_add_the_residual_themselves_are_found_out(tmp_path):
    """BLOOM's attention and MLP return their output plus the stream, so neither sum can hold."""
    model = rim.load(str(write_family(tmp_path / "bloom", "bloom")), quantization=None, device="cpu")
    for identity in ("residual_sum", "head_sum"):
        with pytest.raises(IdentityError, match=rf"{identity}.*off by \d"):
            model.require("a tool", identity)
    assert model.checks["lens"].holds
    assert model.checks["padding"].holds


def test_a_residual_multiplier_is_counted(tmp_path):
    """Granite scales what attention and MLP write as it adds it."""
    folder = write_family(tmp_path / "granite", "granite", residual_multiplier=0.5)
    model = rim.load(str(folder), quantization=None, device="cpu")
    assert model.layout.residual_multiplier == 0.5
    assert model.checks["residual_sum"].error < 1e-5


def test_a_stream_that_is_scaled_itself_is_found_out(tmp_path):
    """MiniMax multiplies the stream as well as what is added to it."""
    model = rim.load(str(write_family(tmp_path / "minimax", "minimax", **MINIMAX)), quantization=None, device="cpu")
    assert not model.checks["residual_sum"].holds


@pytest.mark.parametrize(
    ("family", "changes", "says"),
    [
        ("mamba", {"state_size": 4}, "MambaForCausalLM has no attention"),
        ("bert", {"intermediate_size": 64, "is_decoder": True}, "only decoder-only models"),
        ("opt", {"ffn_dim": 64, "word_embed_proj_dim": 32}, "OPTForCausalLM has no MLP"),
        (
            "gemma4_text",
            {"head_dim": 8, "global_head_dim": 16, "hidden_size_per_layer_input": 0},
            r"attention heads of different widths.*\[32, 64\]",
        ),
    ],
)
def test_models_without_the_layout_are_refused_in_one_line(tmp_path, family, changes, says):
    folder = write_family(tmp_path / family, family, **changes)
    with pytest.raises(InputError, match=says) as caught:
        rim.load(str(folder), quantization=None, device="cpu")
    assert "\n" not in str(caught.value)


def test_a_model_without_a_head_is_refused():
    model = load_tiny("llama")
    with pytest.raises(InputError, match="has no"):
        find_layout(model.hf.model)


def test_all_families_are_covered():
    assert set(FAMILIES) == set(MODULES) == set(SHAPES)


def test_a_family_that_cannot_be_packed_is_refused_and_not_left_as_it_is():
    with pytest.raises(InputError, match=r"cannot be quantised.*quantization=None"):
        load_tiny("falcon", "nf4")


def test_int8_loads_and_its_captures_are_those_of_full_precision_up_to_its_rounding():
    exact, rounded = load_tiny("llama"), load_tiny("llama", "int8")
    texts = ["Why is the sky blue?", "How do I bake bread?"]
    a, b = (rim.capture(model, texts, "head_z")["head_z"] for model in (exact, rounded))
    assert not torch.equal(a, b)
    assert torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1] > 0.99
