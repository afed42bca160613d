"""Logit lens, logit attribution and projections, against the models' arithmetic written out from explicit weights."""

import dataclasses
import warnings

import numpy as np
import pytest
import scipy.stats
import torch
from families import MODULES, family_folder, load_tiny, reference, write_family
from peft import LoraConfig, get_peft_model
from tiny import TEXTS
from torch import nn
from transformers import AutoModelForCausalLM

import rim_core as rim
from rim_core import lens
from rim_core.editing import Edit, editing
from rim_core.errors import IdentityError, InputError

ADDITIVE = ["llama", "qwen3", "mistral", "gpt2", "gpt_neox", "phi3", "cohere2", "qwen3_moe"]
CENTRING = ("gpt2", "gpt_neox", "cohere2")
TOKENS = ["How", "Why", 7]
TOWARD, AGAINST = ["How", 9], "Why"


def frozen_norm(model, family, h):
    """The final norm written out: its scale for each row of `h`, its gain, its bias, and `h` as it takes it."""
    norm, config = model.hf.get_submodule(MODULES[family].final_norm), model.hf.config
    eps = getattr(config, "rms_norm_eps", None) or getattr(config, "layer_norm_eps", None) or 1e-5
    gain = norm.weight + 1 if family.startswith("gemma") else norm.weight
    bias = norm.bias if getattr(norm, "bias", None) is not None else torch.zeros_like(gain)
    taken = h - h.mean(-1, keepdim=True) if family in CENTRING else h
    return ((taken**2).mean(-1, keepdim=True) + eps) ** -0.5, gain, bias, taken


def plain_logits(model, family, h):
    """Logits from the last residual state, written out from weights and configuration."""
    scale, gain, bias, taken = frozen_norm(model, family, h)
    logits = (taken * scale * gain + bias) @ model.hf.get_submodule(MODULES[family].lm_head).weight.T
    if family == "cohere2":
        logits = logits * model.hf.config.logit_scale
    cap = getattr(model.hf.config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


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


def token_id(model, word):
    return model.tokenizer.convert_tokens_to_ids(word)


def assert_close(found, wanted, tolerance=1e-4):
    scale = wanted.abs().max()
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() <= tolerance * scale, (found - wanted).abs().max() / scale


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.hf.modules())


@pytest.mark.parametrize("family", [*ADDITIVE, "gemma2"])
@pytest.mark.parametrize("quantization", ["nf4", None])
def test_the_lens_equals_the_readout_written_out_and_ends_in_the_models_logits(family, quantization):
    model = load_tiny(family, quantization)
    before = hooks(model)
    found = rim.lens.logit_lens(model, TEXTS, TOKENS)
    assert hooks(model) == before
    assert found.layers == (-1, 0, 1, 2)
    for row, text in enumerate(TEXTS):
        sites, logits = reference(model, family, text)
        stream = torch.stack([sites["resid_pre"][0, -1], *sites["resid_post"][:, -1]])
        wanted = plain_logits(model, family, stream)
        assert_close(wanted[-1], logits[-1])
        assert_close(found.logit[row], wanted[:, found.token_ids])
        assert_close(found.log_probability[row], wanted.log_softmax(-1)[:, found.token_ids])
        order = wanted.argsort(dim=-1, descending=True)
        places = [[order[layer].tolist().index(token) for token in found.token_ids] for layer in range(4)]
        assert found.rank[row].tolist() == places


@pytest.mark.parametrize("positions", [-2, [-1, -3], "all"])
def test_other_layers_and_positions(positions):
    model = load_tiny("llama")
    found = lens.logit_lens(model, TEXTS, TOKENS, layers=[2, 0], positions=positions)
    for row, text in enumerate(TEXTS):
        stream = reference(model, "llama", text)[0]["resid_post"][[2, 0]].transpose(0, 1)
        wanted = plain_logits(model, "llama", stream)[..., found.token_ids]
        if positions == "all":
            assert found.positions == tuple(range(-found.logit.shape[1], 0))
            assert_close(found.logit[row, -len(wanted) :], wanted)
            assert found.logit[row, : -len(wanted)].isnan().all()
            assert found.rank[row, : -len(wanted)].isnan().all()
        else:
            assert_close(found.logit[row], wanted[positions])
    frame = found.to_frame()
    assert sorted(set(frame["position"])) == sorted(found.positions)
    assert frame[frame["position"] == max(found.positions)]["n"].eq(len(TEXTS)).all()
    if positions == "all":
        assert frame[frame["position"] == min(found.positions)]["n"].eq(1).all()


def test_small_chunks_and_groups_change_no_number(monkeypatch):
    model = load_tiny("mistral")
    whole = lens.logit_lens(model, TEXTS, TOKENS, positions="all")
    parts = lens.direct_logit_attribution(model, TEXTS, TOWARD, AGAINST)
    monkeypatch.setattr(lens, "_HELD", 1)
    monkeypatch.setattr(lens, "_LOGITS", 1)
    alone = lens.logit_lens(model, TEXTS, TOKENS, positions="all")
    assert_close(alone.logit.nan_to_num(), whole.logit.nan_to_num())
    assert torch.equal(alone.logit.isnan(), whole.logit.isnan())
    assert_close(lens.direct_logit_attribution(model, TEXTS, TOWARD, AGAINST).heads, parts.heads)


@pytest.mark.parametrize("family", ADDITIVE)
@pytest.mark.parametrize("quantization", ["nf4", None])
def test_attribution_equals_each_term_written_out_and_sums_to_the_logit_difference(family, quantization):
    model = load_tiny(family, quantization)
    before = hooks(model)
    found = lens.direct_logit_attribution(model, TEXTS, TOWARD, AGAINST)
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


@pytest.mark.parametrize("quantization", ["nf4", None])
def test_an_adapter_s_share_is_counted(tmp_path, quantization):
    base = AutoModelForCausalLM.from_pretrained(family_folder("llama"))
    wrapped = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "o_proj", "down_proj"]))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    wrapped.save_pretrained(tmp_path)
    model = rim.load(str(family_folder("llama")), quantization=quantization, device="cpu")
    plain = lens.direct_logit_attribution(model, TEXTS, "How", "Why")
    with model.using(tmp_path):
        found = lens.direct_logit_attribution(model, TEXTS, "How", "Why")
        for row, text in enumerate(TEXTS):
            logits = model.hf(model.tokenizer(text, return_tensors="pt").input_ids).logits[0, -1]
            assert_close(
                found.logit_difference[row], logits[token_id(model, "How")] - logits[token_id(model, "Why")]
            )
        terms = torch.cat([found.heads.flatten(1), found.mlp, found.embedding[:, None]], 1)
        assert_close(terms.sum(1), found.logit_difference)
        direction = torch.arange(1.0, 33.0)
        along = lens.head_contributions(model, TEXTS, direction).heads
        z = rim.capture(model, TEXTS, "head_z")["head_z"]
        for layer in range(model.n_layers):
            writes = torch.stack([written_by_heads(model, layer, z[row, layer]) for row in range(len(TEXTS))])
            assert_close(along[:, layer], writes @ direction / direction.norm())
    assert not torch.allclose(plain.heads, found.heads, rtol=0.1)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("quantization", ["nf4", None])
def test_contributions_equal_projections_of_what_is_written(family, quantization):
    model = load_tiny(family, quantization)
    generator = torch.Generator().manual_seed(1)
    directions = torch.randn(model.n_layers, model.d_model, generator=generator)
    unit = directions / directions.norm(dim=1, keepdim=True)
    every = lens.head_contributions(model, TEXTS, directions, positions="all")
    last = lens.head_contributions(model, TEXTS, 5 * directions.numpy())
    single = lens.head_contributions(model, TEXTS, directions[1], positions=[-2, -1])
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
    found = lens.head_contributions(model, TEXTS, direction).heads[0, 2, 1]
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
        along = lens.head_contributions(model, TEXTS, direction)
        found = lens.direct_logit_attribution(model, TEXTS, TOWARD, AGAINST)
        logits = model.hf(model.tokenizer(TEXTS[0], return_tensors="pt").input_ids).logits[0, -1]
    assert_close(along.heads[:, 1, 0], wanted.expand(len(TEXTS)))
    how, why = token_id(model, "How"), token_id(model, "Why")
    assert_close(found.logit_difference[0], (logits[how] + logits[9]) / 2 - logits[why])
    assert (found.residual.abs() <= 1e-4 * found.logit_difference.abs()).all()


def test_the_lens_sees_edits():
    model = load_tiny("llama")
    with editing(model, [Edit("resid_post", 2, lambda values, _: values * 0 + 1)]):
        found = lens.logit_lens(model, TEXTS, TOKENS, layers=[2])
    wanted = plain_logits(model, "llama", torch.ones(model.d_model))[list(found.token_ids)]
    assert_close(found.logit[:, 0], wanted.expand(len(TEXTS), -1))


@pytest.mark.parametrize(("family", "says"), [("gemma2", "soft-capped at 8"), ("olmo2", "residual_sum")])
def test_attribution_refuses_where_terms_do_not_add_up(family, says):
    with pytest.raises(IdentityError, match=says):
        lens.direct_logit_attribution(load_tiny(family), TEXTS, "How", "Why")


def test_projections_refuse_where_a_norm_comes_between_heads_and_stream():
    with pytest.raises(IdentityError, match="residual_sum"):
        lens.head_contributions(load_tiny("gemma3_text"), TEXTS, torch.ones(32))


def test_attribution_refuses_an_edited_stream():
    model = load_tiny("llama")
    edit = Edit("resid_post", 1, lambda values, _: values + 1)
    with editing(model, [edit]), pytest.raises(IdentityError, match="miss the logit difference"):
        lens.direct_logit_attribution(model, TEXTS, "How", "Why")


def test_attribution_refuses_a_norm_of_another_kind(monkeypatch):
    class Squashed(nn.Module):
        def forward(self, h):
            return torch.tanh(h)

    model = load_tiny("llama")
    monkeypatch.setattr(model, "layout", dataclasses.replace(model.layout, final_norm=Squashed()))
    with pytest.raises(IdentityError, match=r"Squashed\) is neither LayerNorm nor RMSNorm"):
        lens.direct_logit_attribution(model, TEXTS, "How", "Why")


def test_a_head_with_a_bias_counts_it_in_the_constant(tmp_path):
    """Phi's language-model head has a bias, GPT-2's has none; here one is given a model that lacks it."""
    model = rim.load(str(write_family(tmp_path, "gpt2")), quantization=None, device="cpu")
    plain = lens.direct_logit_attribution(model, TEXTS, "How", ["Why", 9])
    bias = torch.randn(model.layout.lm_head.out_features)
    model.layout.lm_head.bias = nn.Parameter(bias)
    found = lens.direct_logit_attribution(model, TEXTS, "How", ["Why", 9])
    shift = bias[token_id(model, "How")] - (bias[token_id(model, "Why")] + bias[9]) / 2
    assert found.constant - plain.constant == pytest.approx(float(shift), abs=1e-5)
    assert_close(found.logit_difference, plain.logit_difference + shift)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_keeps_the_sum_within_its_rounding(dtype):
    model = rim.load(str(family_folder("llama")), quantization=None, dtype=dtype, device="cpu")
    exact = lens.direct_logit_attribution(load_tiny("llama"), TEXTS, TOWARD, AGAINST)
    found = lens.direct_logit_attribution(model, TEXTS, TOWARD, AGAINST)
    assert found.heads.dtype == torch.float32
    assert_close(found.heads, exact.heads, 0.05)
    assert_close(found.logit_difference, exact.logit_difference, 0.05)


def test_z_scores_are_taken_within_each_layer_over_mean_contributions():
    found = lens.direct_logit_attribution(load_tiny("llama"), TEXTS, TOWARD, AGAINST)
    means = found.heads.double().mean(0).numpy()
    wanted = scipy.stats.zscore(means, axis=1, ddof=1)
    assert np.allclose(found.z_scores, wanted, atol=1e-5)
    frame = found.to_frame()
    heads = frame[frame["component"] == "head"]
    assert np.allclose(heads["z"], wanted.flatten(), atol=1e-5)
    assert np.abs(wanted).max() <= (4 - 1) / 4**0.5
    assert frame["mean"].sum() + found.residual.mean() == pytest.approx(
        float(found.logit_difference.mean()), abs=1e-5
    )


def test_frames_hold_means_and_t_intervals():
    model = load_tiny("llama")
    found = lens.logit_lens(model, TEXTS, TOKENS)
    frame = found.to_frame().set_index(["measure", "layer", "token"])
    row = frame.loc[("log_probability", 1, "Why")]
    wanted = rim.stats.t_interval(found.log_probability[:, 2, 1].double().numpy())
    assert [row["mean"], row["low"], row["high"]] == pytest.approx([wanted.estimate, wanted.low, wanted.high])
    assert len(frame) == 3 * 4 * 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        alone = lens.logit_lens(model, TEXTS[:1], TOKENS).to_frame()
    assert alone["low"].isna().all()
    assert alone["mean"].notna().all()


def test_pictures_say_what_they_show():
    model = load_tiny("llama")
    reading = lens.logit_lens(model, TEXTS, TOKENS, positions=[-2, -1])
    parts = lens.direct_logit_attribution(model, TEXTS, TOWARD, AGAINST)
    along = lens.head_contributions(model, TEXTS, torch.ones(32))
    charts = [
        reading.plot(),
        reading.plot("rank", position=-2),
        parts.plot(),
        parts.plot_layers(),
        along.plot(),
    ]
    for chart in charts:
        spec = chart.to_dict()
        assert spec["title"]["text"]
        assert len(spec["description"]) > 40
    top = parts.heads.mean(0)
    layer, head = divmod(int(top.argmax()), model.n_heads)
    assert f"(layer {layer}, head {head})." in charts[2].to_dict()["description"]
    with pytest.raises(InputError, match="no measure 'odds'"):
        reading.plot("odds")
    with pytest.raises(InputError, match="position -3 was not read"):
        reading.plot(position=-3)


@pytest.mark.parametrize(
    ("token", "label"), [("How", "How"), (" How", "How"), ("sky", "␣sky"), (" sky", "␣sky"), (399, "<399>")]
)
def test_a_token_may_need_or_lack_its_leading_space(token, label):
    assert lens.single_tokens(load_tiny("llama"), token)[0] == (label,)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"tokens": "baker"}, "'baker' is no single token.*b"),
        ({"tokens": ""}, "'' is no single token"),
        ({"tokens": ["sky", "How", " sky"]}, "'sky' and ' sky' are one token"),
        ({"tokens": []}, "no tokens"),
        ({"tokens": [400]}, "no token 400: ids go from 0 to 399"),
        ({"layers": [3]}, "no layer 3"),
        ({"layers": []}, "no layer"),
        ({"positions": "first"}, "unknown positions"),
        ({"positions": -400}, "out of range"),
        ({"texts": []}, "no texts"),
    ],
)
def test_bad_arguments_of_the_lens_get_one_line(arguments, says):
    with pytest.raises(InputError, match=says) as error:
        lens.logit_lens(load_tiny("llama"), **{"texts": TEXTS, "tokens": "How", **arguments})
    assert "\n" not in str(error.value)


def test_bad_directions_and_sides_get_one_line():
    model = load_tiny("llama")
    with pytest.raises(InputError, match="How is on both sides"):
        lens.direct_logit_attribution(model, TEXTS, ["How", "Why"], " How")
    for direction in (torch.ones(31), torch.zeros(32), torch.full((32,), torch.nan), torch.ones(2, 32)):
        with pytest.raises(InputError, match="direction"):
            lens.head_contributions(model, TEXTS, direction)
