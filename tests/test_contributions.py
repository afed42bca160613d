"""Logit attribution and projections, against the models' arithmetic written out from explicit weights."""

import dataclasses

import numpy as np
import pytest
import scipy.stats
import torch
from families import MODULES, family_folder, load_tiny, reference, write_family
from plain import assert_close, hooks, write_lora
from test_lens import CENTRING, frozen_norm, token_id
from tiny import TEXTS
from torch import nn

import rim_core as rim
from rim_core.errors import IdentityError, InputError
from rim_core.models import capture
from rim_core.models.hooks import Edit, editing
from rim_core.models.layout import find_layout

TOWARD, AGAINST = ["How", 9], "Why"


def written_by_heads(model, layer, z):
    """What each head of one position writes, `[head, d_model]`: the projection run on every other head's zeros."""
    project = model.layout.attention_out[layer]
    alone = torch.zeros(model.n_heads, model.n_heads, model.head_dim)
    alone[range(model.n_heads), range(model.n_heads)] = z.reshape(model.n_heads, model.head_dim)
    with torch.no_grad():
        return project(alone.flatten(1)) - project(torch.zeros(1, z.numel()))


def projection_bias(model, layer):
    bias = getattr(model.layout.attention_out[layer], "bias", None)
    return torch.zeros(model.d_model) if bias is None else bias


# Llama's, absolute positions and biases, a scale on the logits, experts.
@pytest.mark.parametrize(
    ("family", "quantization"),
    [("llama", None), ("llama", "nf4"), ("gpt2", None), ("cohere2", None), ("qwen3_moe", None)],
)
def test_attribution_equals_each_term_written_out_and_sums_to_the_logit_difference(family, quantization):
    model = load_tiny(family, quantization)
    before = hooks(model)
    found = rim.direct_logit_attribution(model, TEXTS, TOWARD, AGAINST)
    assert hooks(model) == before
    head = model.hf.get_submodule(MODULES[family].lm_head)
    how, why = token_id(model, "How"), token_id(model, "Why")
    row_difference = (head.weight[how] + head.weight[9]) / 2 - head.weight[why]
    if family == "cohere2":
        row_difference = row_difference * model.hf.config.logit_scale
    for row, text in enumerate(TEXTS):
        sites, logits = reference(model, family, text)
        scale, gain, bias, _ = frozen_norm(model, family, sites["resid_post"][-1, -1])

        def share(term, scale=scale, gain=gain):
            taken = term - term.mean(-1, keepdim=True) if family in CENTRING else term
            return (taken * scale * gain) @ row_difference

        layers = range(model.n_layers)
        heads = [share(written_by_heads(model, layer, sites["head_z"][layer, -1])) for layer in layers]
        assert_close(found.heads[row], torch.stack(heads))
        assert_close(found.mlp[row], share(sites["mlp_out"][:, -1]))
        assert_close(found.embedding[row], share(sites["resid_pre"][0, -1]))
        biases = torch.stack([share(projection_bias(model, layer)) for layer in layers])
        assert torch.allclose(found.attention_bias[row], biases, atol=1e-5)
        assert found.constant == pytest.approx(float(bias @ row_difference), abs=1e-5)
        difference = (logits[-1, how] + logits[-1, 9]) / 2 - logits[-1, why]
        assert_close(found.logit_difference[row], difference)
        terms = (found.heads[row], found.mlp[row], found.embedding[row], found.attention_bias[row])
        assert_close(sum(term.sum() for term in terms) + found.constant, difference)
    assert (found.residual.abs() <= 1e-4 * found.logit_difference.abs()).all()


@pytest.mark.parametrize("quantization", ["nf4"])
def test_an_adapter_s_share_is_counted(tmp_path, quantization):
    write_lora(family_folder("llama"), ["q_proj", "o_proj", "down_proj"], tmp_path)
    model = rim.load(str(family_folder("llama")), quantization=quantization, device="cpu")
    plain = rim.direct_logit_attribution(model, TEXTS, "How", "Why")
    with model.using(tmp_path):
        found = rim.direct_logit_attribution(model, TEXTS, "How", "Why")
        for row, text in enumerate(TEXTS):
            logits = model.hf(model.tokenizer(text, return_tensors="pt").input_ids).logits[0, -1]
            assert_close(found.logit_difference[row], logits[token_id(model, "How")] - logits[token_id(model, "Why")])
        terms = torch.cat([found.heads.flatten(1), found.mlp, found.embedding[:, None]], 1)
        assert_close(terms.sum(1), found.logit_difference)
        direction = torch.arange(1.0, 33.0)
        along = rim.head_contributions(model, TEXTS, direction).heads
        z = rim.capture(model, TEXTS, "head_z")["head_z"]
        for layer in range(model.n_layers):
            writes = torch.stack([written_by_heads(model, layer, z[row, layer]) for row in range(len(TEXTS))])
            assert_close(along[:, layer], writes @ direction / direction.norm())
    assert not torch.allclose(plain.heads, found.heads, rtol=0.1)


@pytest.mark.parametrize(("family", "quantization"), [("llama", "nf4"), ("qwen3_moe", None), ("gpt2", None)])
def test_contributions_equal_projections_of_what_is_written(family, quantization):
    model = load_tiny(family, quantization)
    generator = torch.Generator().manual_seed(1)
    directions = torch.randn(model.n_layers, model.d_model, generator=generator)
    unit = directions / directions.norm(dim=1, keepdim=True)
    every = rim.head_contributions(model, TEXTS, directions, positions="all")
    last = rim.head_contributions(model, TEXTS, 5 * directions.numpy())
    single = rim.head_contributions(model, TEXTS, directions[1], positions=[-2, -1])
    for row, text in enumerate(TEXTS):
        sites, _ = reference(model, family, text)
        length = sites["resid_pre"].shape[1]
        assert every.heads[row, :-length].isnan().all()
        for layer in range(model.n_layers):
            by_position = [written_by_heads(model, layer, z) @ unit[layer] for z in sites["head_z"][layer]]
            wanted = torch.stack(by_position)
            assert_close(every.heads[row, -length:, layer], wanted)
            assert_close(last.heads[row, layer], wanted[-1])
            assert_close(every.attention[row, -length:, layer], sites["attn_out"][layer] @ unit[layer])
            assert_close(every.mlp[row, -length:, layer], sites["mlp_out"][layer] @ unit[layer])
        assert_close(every.embedding[row, -length:], sites["resid_pre"][0] @ unit[0])
        assert_close(single.embedding[row], sites["resid_pre"][0, -2:] @ unit[1])
        assert_close(single.heads[row, :, 1], every.heads[row, -2:, 1])


def test_the_contribution_of_a_head_is_what_silencing_it_takes_away():
    """The last layer's head, ablated by a hook of this test: the stream moves by its contribution exactly."""
    model = load_tiny("llama")
    direction = torch.linspace(-1, 2, model.d_model)
    found = rim.head_contributions(model, TEXTS, direction).heads[0, 2, 1]
    before, _ = reference(model, "llama", TEXTS[0])

    def silence(module, args):
        z = args[0].clone()
        z[..., model.head_dim : 2 * model.head_dim] = 0
        return (z,)

    handle = model.layout.attention_out[2].register_forward_pre_hook(silence)
    after, _ = reference(model, "llama", TEXTS[0])
    handle.remove()
    moved = (before["attn_out"][2, -1] - after["attn_out"][2, -1]) @ direction / direction.norm()
    assert_close(found, moved)


def test_an_edited_head_is_attributed_as_edited():
    """Capture sees the edited head; the projection's transpose must not be edited with it."""
    model = load_tiny("gpt2")
    put = torch.linspace(-3, 3, model.head_dim)

    def replace(values, positions):
        rest = values[..., model.head_dim :]
        return torch.cat([put.expand(*values.shape[:-1], -1), rest], dim=-1)

    direction = torch.linspace(-1, 2, model.d_model)
    unit = direction / direction.norm()
    z = torch.zeros(model.n_heads * model.head_dim)
    z[: model.head_dim] = put
    wanted = written_by_heads(model, 1, z)[0] @ unit
    with editing(model, [Edit("head_z", 1, replace)]):
        along = rim.head_contributions(model, TEXTS, direction)
        found = rim.direct_logit_attribution(model, TEXTS, TOWARD, AGAINST)
        logits = model.hf(model.tokenizer(TEXTS[0], return_tensors="pt").input_ids).logits[0, -1]
    assert_close(along.heads[:, 1, 0], wanted.expand(len(TEXTS)))
    how, why = token_id(model, "How"), token_id(model, "Why")
    assert_close(found.logit_difference[0], (logits[how] + logits[9]) / 2 - logits[why])
    assert (found.residual.abs() <= 1e-4 * found.logit_difference.abs()).all()


def after_the_module(family, block, name, x):
    """What the norm after a module makes of parts `x` `[..., d_model]` at the scale of their whole `x.sum(-2)`."""
    norm = getattr(block, name)
    whole = x.sum(-2, keepdim=True)
    eps = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
    gain = norm.weight + 1 if family.startswith("gemma") else norm.weight
    return x * gain / (whole.pow(2).mean(-1, keepdim=True) + eps).sqrt()


@pytest.mark.parametrize(("family", "quantization"), [("gemma2", None), ("olmo2", None)])
def test_norms_after_attention_and_mlp_are_carried_through(family, quantization):
    """Each term written out in plain torch; Gemma-2's cap is undone, the sum is of the logits below it."""
    model = load_tiny(family, quantization)
    found = rim.direct_logit_attribution(model, TEXTS, TOWARD, AGAINST)
    generator = torch.Generator().manual_seed(1)
    directions = torch.randn(model.n_layers, model.d_model, generator=generator)
    unit = directions / directions.norm(dim=1, keepdim=True)
    every = rim.head_contributions(model, TEXTS, directions, positions="all")
    last = rim.capture(model, TEXTS, ("head_z", "attn_out"))
    head = model.hf.get_submodule(MODULES[family].lm_head)
    how, why = token_id(model, "How"), token_id(model, "Why")
    row_difference = (head.weight[how] + head.weight[9]) / 2 - head.weight[why]
    cap = getattr(model.hf.config, "final_logit_softcapping", None)
    for row, text in enumerate(TEXTS):
        sites, logits = reference(model, family, text)
        length = sites["resid_pre"].shape[1]
        logits = logits[-1].double()
        logits = logits if cap is None else cap * torch.atanh(logits / cap)
        difference = ((logits[how] + logits[9]) / 2 - logits[why]).float()
        assert_close(found.logit_difference[row], difference, 1e-3 if cap else 1e-4)
        scale, gain, _, _ = frozen_norm(model, family, sites["resid_post"][-1, -1])
        for layer, block in enumerate(model.hf.get_submodule(MODULES[family].layers)):
            heads = [written_by_heads(model, layer, z) for z in sites["head_z"][layer]]
            parts = after_the_module(family, block, "post_attention_layernorm", torch.stack(heads))
            mlp = after_the_module(family, block, "post_feedforward_layernorm", sites["mlp_out"][layer][:, None])[:, 0]
            stream = sites["resid_pre"][layer] + parts.sum(1) + mlp
            assert_close(stream, sites["resid_post"][layer])
            assert_close(found.heads[row, layer], (parts[-1] * scale * gain) @ row_difference)
            assert_close(found.mlp[row, layer], (mlp[-1] * scale * gain) @ row_difference)
            assert_close(every.heads[row, -length:, layer], parts @ unit[layer])
            assert_close(every.attention[row, -length:, layer], parts.sum(1) @ unit[layer])
            assert_close(every.mlp[row, -length:, layer], mlp @ unit[layer])
            z, out = last["head_z"][row, layer], last["attn_out"][row, layer]
            assert_close(rim.writes.head_writes(model, layer, z, out), parts[-1])
        terms = (found.heads[row], found.mlp[row], found.embedding[row], found.attention_bias[row])
        assert_close(sum(term.sum() for term in terms) + found.constant, difference, 1e-3 if cap else 1e-4)
    assert (found.residual.abs() <= 1e-4 * found.logit_difference.abs()).all()


@pytest.mark.parametrize(
    ("family", "changes"),
    [("glm4", {"num_key_value_heads": 2, "head_dim": 8}), ("granite", {"residual_multiplier": 0.3})],
)
def test_other_ways_into_the_stream_add_up_too(tmp_path, family, changes):
    folder = write_family(tmp_path, family, intermediate_size=64, **changes)
    model = rim.load(str(folder), quantization=None, device="cpu")
    found = rim.direct_logit_attribution(model, TEXTS, TOWARD, AGAINST)
    for row, text in enumerate(TEXTS):
        logits = model.hf(model.tokenizer(text, return_tensors="pt").input_ids).logits[0, -1]
        wanted = (logits[token_id(model, "How")] + logits[9]) / 2 - logits[token_id(model, "Why")]
        assert_close(found.logit_difference[row], wanted)
    assert (found.residual.abs() <= 1e-4 * found.logit_difference.abs()).all()
    acts = rim.capture(model, TEXTS, ("resid_pre", "resid_post"))
    w = torch.arange(1.0, 33.0)
    along = rim.head_contributions(model, TEXTS, w)
    moved = (acts["resid_post"] - acts["resid_pre"]) @ w / w.norm()
    assert_close(along.attention + along.mlp, moved)
    assert_close(along.heads.sum(-1), along.attention)  # no bias here


class Lopsided(nn.Module):
    """A LayerNorm with a bias, as no family of ours has after its attention."""

    def __init__(self, width):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.inner = nn.LayerNorm(width)
        self.inner.weight.data = torch.randn(width, generator=generator)
        self.inner.bias.data = torch.randn(width, generator=generator)

    def forward(self, h):
        return self.inner(h)


def test_a_layer_norm_after_attention_takes_its_mean_and_adds_its_bias(tmp_path):
    folder = write_family(tmp_path, "gemma3_text")
    model = rim.load(str(folder), quantization=None, device="cpu")
    norm = Lopsided(model.d_model).requires_grad_(False)
    model.hf.model.layers[1].post_attention_layernorm = norm
    model._active = dataclasses.replace(model._active, layout=find_layout(model.hf))
    found = rim.direct_logit_attribution(model, TEXTS, TOWARD, AGAINST)
    assert (found.residual.abs() <= 1e-4 * found.logit_difference.abs()).all()
    assert found.attention_bias[:, 1].abs().min() > 1e-3
    assert not found.attention_bias[:, 0].any()


def test_a_squashing_norm_after_attention_is_refused(monkeypatch):
    class Squashed(nn.Module):
        def forward(self, h):
            return torch.tanh(h)

    model = load_tiny("olmo2")
    norms = (Squashed(), *model.layout.attention_norm[1:])
    laid = dataclasses.replace(model.layout, attention_norm=norms)
    monkeypatch.setattr(model, "_active", dataclasses.replace(model._active, layout=laid))
    for call in (
        lambda: rim.direct_logit_attribution(model, TEXTS, "How", "Why"),
        lambda: rim.head_contributions(model, TEXTS, torch.ones(32)),
    ):
        with pytest.raises(IdentityError, match=r"norm after the attention's output in layer 0 \(Squashed\)"):
            call()


def test_heads_that_write_nothing_have_no_share():
    """All heads of a layer silenced: the norm after them has no scale, and nothing to scale."""
    model = load_tiny("gemma3_text")
    with rim.ablate(model, heads=[(1, head) for head in range(4)], mode="zero"):
        found = rim.direct_logit_attribution(model, TEXTS, TOWARD, AGAINST)
    assert not found.heads[:, 1].any()
    assert (found.residual.abs() <= 1e-4 * found.logit_difference.abs()).all()


def test_attribution_refuses_where_terms_do_not_add_up(tmp_path):
    model = rim.load(str(write_family(tmp_path, "bloom")), quantization=None, device="cpu")
    with pytest.raises(IdentityError, match="residual_sum"):
        rim.direct_logit_attribution(model, TEXTS, "How", "Why")
    with pytest.raises(IdentityError, match="residual_sum"):
        rim.head_contributions(model, TEXTS, torch.ones(32))


def test_attribution_refuses_an_edited_stream():
    model = load_tiny("llama")
    edit = Edit("resid_post", 1, lambda values, _: values + 1)
    with editing(model, [edit]), pytest.raises(IdentityError, match="miss the logit difference"):
        rim.direct_logit_attribution(model, TEXTS, "How", "Why")


def test_attribution_refuses_a_norm_of_another_kind(monkeypatch):
    class Squashed(nn.Module):
        def forward(self, h):
            return torch.tanh(h)

    model = load_tiny("llama")
    laid = dataclasses.replace(model.layout, final_norm=Squashed())
    monkeypatch.setattr(model, "_active", dataclasses.replace(model._active, layout=laid))
    with pytest.raises(IdentityError, match=r"Squashed\) is neither LayerNorm nor RMSNorm"):
        rim.direct_logit_attribution(model, TEXTS, "How", "Why")


def test_a_head_with_a_bias_counts_it_in_the_constant(tmp_path):
    """Phi's language-model head has a bias, GPT-2's has none; here one is given a model that lacks it."""
    model = rim.load(str(write_family(tmp_path, "gpt2")), quantization=None, device="cpu")
    plain = rim.direct_logit_attribution(model, TEXTS, "How", ["Why", 9])
    bias = torch.randn(model.layout.lm_head.out_features)
    model.layout.lm_head.bias = nn.Parameter(bias)
    found = rim.direct_logit_attribution(model, TEXTS, "How", ["Why", 9])
    shift = bias[token_id(model, "How")] - (bias[token_id(model, "Why")] + bias[9]) / 2
    assert found.constant - plain.constant == pytest.approx(float(shift), abs=1e-5)
    assert_close(found.logit_difference, plain.logit_difference + shift)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_keeps_the_sum_within_its_rounding(dtype):
    model = rim.load(str(family_folder("llama")), quantization=None, dtype=dtype, device="cpu")
    exact = rim.direct_logit_attribution(load_tiny("llama"), TEXTS, TOWARD, AGAINST)
    found = rim.direct_logit_attribution(model, TEXTS, TOWARD, AGAINST)
    assert found.heads.dtype == torch.float32
    assert_close(found.heads, exact.heads, 0.05)
    assert_close(found.logit_difference, exact.logit_difference, 0.05)


def test_z_scores_are_taken_within_each_layer_over_mean_contributions():
    found = rim.direct_logit_attribution(load_tiny("llama"), TEXTS, TOWARD, AGAINST)
    means = found.heads.double().mean(0).numpy()
    wanted = scipy.stats.zscore(means, axis=1, ddof=1)
    assert np.allclose(found.z_scores, wanted, atol=1e-5)
    frame = found.to_frame()
    heads = frame[frame["component"] == "head"]
    assert np.allclose(heads["z"], wanted.flatten(), atol=1e-5)
    assert np.abs(wanted).max() <= (4 - 1) / 4**0.5
    assert frame["estimate"].sum() + found.residual.mean() == pytest.approx(
        float(found.logit_difference.mean()), abs=1e-5
    )


def test_bad_directions_and_sides_get_one_line():
    model = load_tiny("llama")
    with pytest.raises(InputError, match="How is on both sides"):
        rim.direct_logit_attribution(model, TEXTS, ["How", "Why"], " How")
    for direction in (torch.ones(31), torch.zeros(32), torch.full((32,), torch.nan), torch.ones(2, 32)):
        with pytest.raises(InputError, match="direction"):
            rim.head_contributions(model, TEXTS, direction)


def test_small_groups_change_no_number(monkeypatch):
    model = load_tiny("mistral")
    whole = rim.direct_logit_attribution(model, TEXTS, TOWARD, AGAINST)
    monkeypatch.setattr(capture, "_HELD", 1)
    assert_close(rim.direct_logit_attribution(model, TEXTS, TOWARD, AGAINST).heads, whole.heads)


def test_pictures_say_what_they_show():
    model = load_tiny("llama")
    parts = rim.direct_logit_attribution(model, TEXTS, TOWARD, AGAINST)
    along = rim.head_contributions(model, TEXTS, torch.ones(32))
    for chart in (parts.plot(), parts.plot_layers(), along.plot()):
        spec = chart.to_dict()
        assert spec["title"]["text"]
        assert len(spec["description"]) > 40
    layer, head = divmod(int(parts.heads.mean(0).argmax()), model.n_heads)
    assert f"(layer {layer}, head {head})." in parts.plot().to_dict()["description"]
