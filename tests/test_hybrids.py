"""Models whose layers keep other state than keys and values: refused in one line, or right, tool by tool.

What is right is what plain forward passes of one prompt alone, without a cache, give.
"""

import pytest
import torch
from families import load_tiny, write_family
from plain import assert_close, greedy
from tiny import TEXTS

import rim_core as rim
from rim_core.errors import IdentityError, InputError
from rim_core.models.hooks import tensor_of

GQA = {"num_key_value_heads": 2, "intermediate_size": 64}
MIXED = ["linear_attention", "full_attention", "linear_attention"]
MAMBA = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_n_groups": 1,
    "mamba_d_state": 8,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_chunk_size": 8,
}
DELTA = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4,
}
REFUSED = {
    "qwen3_5_text": {**GQA, **DELTA, "head_dim": 16, "layer_types": MIXED},
    "olmo_hybrid": {**GQA, **DELTA, "layer_types": MIXED},
    "bamba": {**GQA, **MAMBA, "attn_layer_indices": [1]},
    "granitemoehybrid": {
        **GQA,
        **MAMBA,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "layer_types": ["mamba", "attention", "mamba"],
        "shared_intermediate_size": 16,
    },
    "lfm2": {**GQA, "layer_types": ["conv", "full_attention", "conv"], "conv_L_cache": 3},
    "jamba": {
        **GQA,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "num_experts": 2,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    },
}
LOADED = {
    # Attention and a state-space layer side by side in every layer.
    "falcon_h1": {**GQA, **MAMBA, "head_dim": 16, "mamba_d_ssm": 64},
    # Its linear attention is called attention, and forgets the padding once there is a cache.
    "minimax": {**GQA, "head_dim": 16, "num_local_experts": 4, "layer_types": MIXED, "block_size": 4},
}
SYSTEM = "You answer in a few plain words and stay on the topic."


@pytest.mark.parametrize("family", REFUSED)
def test_layers_of_two_kinds_are_refused_at_load_in_one_line(tmp_path, family):
    folder = write_family(tmp_path, family, **REFUSED[family])
    with pytest.raises(InputError, match=r"mixes attention with layers of another kind|no attention that") as caught:
        rim.load(str(folder), quantization=None, device="cpu")
    assert "\n" not in str(caught.value)


def alone(model, text):
    """Each layer's output `[layer, position, d_model]` and the logits of one prompt without a cache."""
    found = []
    handles = [
        layer.register_forward_hook(lambda module, args, output: found.append(tensor_of(output)[0].clone()))
        for layer in model.layout.layers
    ]
    try:
        with torch.no_grad():
            logits = model.hf(model.tokenizer(text, return_tensors="pt").input_ids, use_cache=False).logits[0]
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack(found), logits


@pytest.mark.parametrize("family", LOADED)
def test_what_loads_is_right_or_refused(tmp_path, family):
    model = rim.load(str(write_family(tmp_path, family, **LOADED[family])), quantization=None, device="cpu")
    texts = rim.format_chat(model, TEXTS, system=SYSTEM)
    found = rim.capture(model, texts, "resid_post", positions=[-1, -4])["resid_post"]
    for row, text in enumerate(texts):
        assert_close(found[row].transpose(0, 1), alone(model, text)[0][:, [-1, -4]])
    with pytest.raises(IdentityError, match="cache_batch") as caught:
        rim.patch(model, texts, texts[::-1], "mlp", rim.LogitDifference(50, 60))
    assert "\n" not in str(caught.value)
    if model.checks["cache"].holds:
        assert rim.generate(model, texts, max_new_tokens=8) == [greedy(model, text, 8)[0] for text in texts]
    else:
        with pytest.raises(IdentityError, match=r"generate cannot be trusted on .*'cache' is off by"):
            rim.generate(model, texts)
    assert model.checks["cache"].holds == (family == "falcon_h1")


@pytest.mark.parametrize("family", ["mistral", "gemma3_text", "cohere2"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_answers_with_sliding_windows_equal_passes_without_a_cache(family, cache, monkeypatch):
    """Answers run well past windows of 6 tokens; a checkpoint may ask for a static cache in its settings."""
    model = load_tiny(family)
    monkeypatch.setattr(model.hf.generation_config, "cache_implementation", cache)
    texts = rim.format_chat(model, TEXTS, system=SYSTEM)
    assert rim.generate(model, texts, max_new_tokens=8) == [greedy(model, text, 8)[0] for text in texts]
    with rim.ablate(model, heads=[(1, 0)], mode="zero"):
        wanted = [greedy(model, text, 8)[0] for text in texts]
        assert rim.generate(model, texts, max_new_tokens=8) == wanted


def test_a_cache_that_may_not_be_laid_is_not(monkeypatch):
    """Capture without a shared beginning gives the same numbers; patch says what failed."""
    model = load_tiny("llama")
    texts = rim.format_chat(model, TEXTS, system=SYSTEM)
    shared = rim.capture(model, texts, "head_z")["head_z"]
    failed = rim.checks.Check("cache_batch", float("inf"), 1e-3, "ValueError: no such state")
    monkeypatch.setitem(model.checks, "cache_batch", failed)
    monkeypatch.setattr("rim_core.models.capture.padded_right", None)
    assert_close(rim.capture(model, texts, "head_z")["head_z"], shared)
    with pytest.raises(IdentityError, match=r"cannot be measured, the model fails \(ValueError: no such state\)"):
        rim.patch(model, texts, texts, "mlp", rim.LogitDifference(50, 60))
