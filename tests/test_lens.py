"""The logit lens, against the models' readout written out from explicit weights."""

import warnings

import pytest
import torch
from families import MODULES, load_tiny, reference
from plain import assert_close, hooks
from tiny import TEXTS

import rim_core as rim
from rim_core.errors import InputError
from rim_core.measures import lens
from rim_core.models import capture
from rim_core.models.hooks import Edit, editing
from rim_core.models.tokens import single_tokens

CENTRING = ("gpt2", "gpt_neox", "cohere2")
TOKENS = ["How", "Why", 7]


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


def token_id(model, word):
    return model.tokenizer.convert_tokens_to_ids(word)


CASES = [("llama", None), ("llama", "nf4"), ("gpt2", None), ("gemma2", None), ("qwen3_moe", None)]


@pytest.mark.parametrize(("family", "quantization"), CASES)
def test_the_lens_equals_the_readout_written_out_and_ends_in_the_models_logits(family, quantization):
    model = load_tiny(family, quantization)
    before = hooks(model)
    found = rim.logit_lens(model, TEXTS, TOKENS)
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
        best = found.top.query("prompt == @row")
        assert best["layer"].tolist() == [layer for layer in found.layers for _ in range(5)]
        assert best["rank"].tolist() == [*range(5)] * 4
        labels = [single_tokens(model, int(token))[0][0] for token in order[:, :5].flatten()]
        assert best["token"].tolist() == labels
        wanted = wanted.log_softmax(-1).gather(1, order[:, :5])
        assert_close(torch.tensor(best["log_probability"].to_numpy()), wanted.flatten())


@pytest.mark.parametrize("positions", [-2, [-1, -3], "all"])
def test_other_layers_and_positions(positions):
    model = load_tiny("llama")
    found = rim.logit_lens(model, TEXTS, TOKENS, layers=[2, 0], positions=positions)
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
        lengths = [len(model.tokenizer(text).input_ids) for text in TEXTS]
        assert found.top.groupby("prompt").size().tolist() == [length * 2 * 5 for length in lengths]
        assert found.top.query("prompt == 0")["position"].min() == -lengths[0]


def test_small_chunks_and_groups_change_no_number(monkeypatch):
    model = load_tiny("mistral")
    whole = rim.logit_lens(model, TEXTS, TOKENS, positions="all")
    monkeypatch.setattr(capture, "_HELD", 1)
    monkeypatch.setattr(lens, "_LOGITS", 1)
    alone = rim.logit_lens(model, TEXTS, TOKENS, positions="all")
    assert_close(alone.logit.nan_to_num(), whole.logit.nan_to_num())
    assert torch.equal(alone.logit.isnan(), whole.logit.isnan())


def test_without_tokens_the_best_of_each_layer_are_read():
    model = load_tiny("llama")
    found = rim.logit_lens(model, TEXTS, top=2, layers=[2])
    assert found.tokens == ()
    assert found.top.equals(rim.logit_lens(model, TEXTS, "How", top=2, layers=[2]).top)
    for row, text in enumerate(TEXTS):
        top = reference(model, "llama", text)[1][-1].topk(2)
        assert found.top_ids[row, 0].tolist() == top.indices.tolist()
    assert found.to_frame().empty
    assert rim.logit_lens(model, TEXTS, "How", top=0).top.empty
    with pytest.raises(InputError, match="draws named tokens"):
        found.plot()


def test_ranks_of_many_tokens_come_from_one_sort():
    """The whole vocabulary, with ties: a padded vocabulary has equal logits."""
    logits = torch.randn(5, 400, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    many, few = lens._ranks(logits, logits[:, 3:90]), lens._ranks(logits, logits[:, 3:9])
    assert torch.equal(many, (logits[:, None, :] > logits[:, 3:90, None]).sum(-1).float())
    assert torch.equal(many[:, :6], few)


def test_the_lens_sees_edits():
    model = load_tiny("llama")
    with editing(model, [Edit("resid_post", 2, lambda values, _: values * 0 + 1)]):
        found = rim.logit_lens(model, TEXTS, TOKENS, layers=[2])
    wanted = plain_logits(model, "llama", torch.ones(model.d_model))[list(found.token_ids)]
    assert_close(found.logit[:, 0], wanted.expand(len(TEXTS), -1))


def test_frames_hold_means_and_t_intervals():
    model = load_tiny("llama")
    found = rim.logit_lens(model, TEXTS, TOKENS)
    frame = found.to_frame().set_index(["measure", "layer", "token"])
    row = frame.loc[("log_probability", 1, "Why")]
    wanted = rim.stats.t_interval(found.log_probability[:, 2, 1].double().numpy())
    assert [row["estimate"], row["low"], row["high"]] == pytest.approx([wanted.estimate, wanted.low, wanted.high])
    assert len(frame) == 3 * 4 * 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        alone = rim.logit_lens(model, TEXTS[:1], TOKENS).to_frame()
    assert alone["low"].isna().all()
    assert alone["estimate"].notna().all()


def test_pictures_say_what_they_show():
    model = load_tiny("llama")
    reading = rim.logit_lens(model, TEXTS, TOKENS, positions=[-2, -1])
    for chart in (reading.plot(), reading.plot("rank", position=-2)):
        spec = chart.to_dict()
        assert spec["title"]["text"]
        assert len(spec["description"]) > 40
        assert "?." not in spec["description"]
    ranks = reading.to_frame().query("measure == 'rank'")
    assert ranks["low"].min() == 0 < ranks["high"].max()
    with pytest.raises(InputError, match=r"unknown measure .* 'odds': choose from logit"):
        reading.plot("odds")
    with pytest.raises(InputError, match="position -3 was not read"):
        reading.plot(position=-3)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"tokens": "baker"}, "'baker' is no single token.*b"),
        ({"tokens": ""}, "'' is no single token"),
        ({"tokens": ["sky", "How", " sky"]}, "'sky' and ' sky' are one token"),
        ({"tokens": []}, "no tokens"),
        ({"tokens": None, "top": 0}, "nothing to read; name tokens, or ask for a top"),
        ({"top": 401}, "top must be a whole number from 0 to 400"),
        ({"tokens": [400]}, "no token 400: ids go from 0 to 399"),
        ({"layers": [3]}, "layer 3 is out of range"),
        ({"layers": [-2]}, "layer -2 is out of range: .* has layers -1 to 2"),
        ({"layers": []}, "layers: none given"),
        ({"positions": "first"}, "unknown positions"),
        ({"positions": -400}, "out of range"),
        ({"texts": []}, "no texts"),
    ],
)
def test_bad_arguments_of_the_lens_get_one_line(arguments, says):
    with pytest.raises(InputError, match=says) as error:
        rim.logit_lens(load_tiny("llama"), **{"texts": TEXTS, "tokens": "How", **arguments})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("token", "label"), [("How", "How"), (" How", "How"), ("sky", "␣sky"), (" sky", "␣sky"), (399, "<399>")]
)
def test_a_token_may_need_or_lack_its_leading_space(token, label):
    assert single_tokens(load_tiny("llama"), token)[0] == (label,)
