"""Attention patterns, against Hugging Face's own eager attention, closed forms and knocked-out keys."""

import json

import pytest
import torch
from families import family_folder, load_tiny, write_family
from plain import hooks, plain_model
from tiny import TEXTS

import rim_core as rim
from rim_core.errors import InputError
from rim_core.measures import attention
from rim_core.models.hooks import MaskEdit, editing
from rim_core.models.tokens import find_span

FAMILIES = ["llama", "gpt2", "gemma2", "qwen3_moe"]


def plain(hf, tokenizer, text):
    """All patterns of one prompt alone, unpadded, `[layer, head, query, key]`."""
    with torch.no_grad():
        out = hf(tokenizer(text, return_tensors="pt").input_ids, output_attentions=True)
    return torch.cat(out.attentions)


@pytest.mark.parametrize("family", FAMILIES)
def test_patterns_equal_hugging_face_s_eager_attention(family):
    model = load_tiny(family)
    eager = plain_model(family_folder(family), attn_implementation="eager")
    every = attention.attention_patterns(model, TEXTS, queries="all")
    last = attention.attention_patterns(model, TEXTS, layers=[2, 0])
    two = attention.attention_patterns(model, TEXTS, queries=[-1, -4]).probabilities
    assert every.probabilities.shape == (3, len(every.queries), 3, model.n_heads, every.mask.shape[1])
    for row, text in enumerate(TEXTS):
        wanted = plain(eager, model.tokenizer, text).permute(2, 0, 1, 3)
        length = len(wanted)
        assert every.mask[row].sum() == length
        found = every.probabilities[row]
        assert torch.allclose(found[-length:, ..., -length:], wanted, atol=1e-5)
        assert not found[:-length].any()
        assert not found[..., :-length].any()
        assert torch.allclose(found[-length:].sum(-1), torch.ones(length, 3, model.n_heads), atol=1e-5)
        assert torch.allclose(last.probabilities[row, ..., -length:], wanted[-1, [2, 0]], atol=1e-5)
        assert torch.allclose(two[row, ..., -length:], wanted[[-1, -4]], atol=1e-5)


def test_patterns_of_a_quantised_model():
    # A model of its own: asking Hugging Face for patterns leaves its hooks behind.
    model = rim.load(str(family_folder("llama")), device="cpu")
    found = attention.attention_patterns(model, TEXTS).probabilities
    before = model.hf.config._attn_implementation
    model.hf.set_attn_implementation("eager")
    wanted = [plain(model.hf, model.tokenizer, text)[:, :, -1] for text in TEXTS]
    model.hf.set_attn_implementation(before)
    for row, pattern in enumerate(wanted):
        assert torch.allclose(found[row, ..., -pattern.shape[-1] :], pattern, atol=1e-5)


SINK = {
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 64,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": 6,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}


def test_a_learned_sink_s_share_is_shown(tmp_path):
    """gpt-oss: one learned score a head joins the softmax and is dropped; written out here for the first layer."""
    model = rim.load(str(write_family(tmp_path, "gpt_oss", **SINK)), quantization=None, device="cpu")
    every = attention.attention_patterns(model, TEXTS, queries="all")
    last = attention.attention_patterns(model, TEXTS)
    spans = {"all": [list(range(-n, 0)) for n in every.mask.sum(1).tolist()], "end": [[-1]] * 3}
    found = attention.attention_to_spans(model, TEXTS, spans)
    layer = model.hf.model.layers[0]
    for row, text in enumerate(TEXTS):
        ids = model.tokenizer(text, return_tensors="pt").input_ids
        with torch.no_grad():
            h = layer.input_layernorm(model.hf.get_input_embeddings()(ids))
            q, k = (
                project(h)[0].unflatten(-1, (-1, model.head_dim)).transpose(0, 1)
                for project in (layer.self_attn.q_proj, layer.self_attn.k_proj)
            )
            cos, sin = model.hf.model.rotary_emb(h, torch.arange(ids.shape[1])[None])
            half = model.head_dim // 2

            def turned(x, cos=cos, sin=sin, half=half):
                a, b = x[..., :half], x[..., half:]
                return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

            scores = turned(q) @ turned(k).repeat_interleave(2, 0).mT / model.head_dim**0.5
            place = torch.arange(ids.shape[1])
            far = place[:, None] - place
            scores = scores.masked_fill((far < 0) | (far >= 6), -torch.inf)
            joined = torch.cat([scores, layer.self_attn.sinks[:, None, None].expand(-1, len(place), 1)], -1)
            wanted = joined.softmax(-1)
        n = len(place)
        assert torch.allclose(every.probabilities[row, -n:, 0, :, -n:], wanted[..., :-1].transpose(0, 1), atol=1e-5)
        assert torch.allclose(every.sink[row, -n:, 0], wanted[..., -1].T, atol=1e-5)
        assert not every.sink[row, :-n].any()
    assert (every.sink[:, -1] > 1e-4).all()
    assert every.sink[:, -1].max() > 0.1
    assert torch.equal(last.sink, every.sink[:, -1])
    assert torch.allclose(last.entropy, every.entropy[:, -1])
    whole = torch.cat([last.probabilities, last.sink[..., None]], -1)
    assert torch.allclose(whole.sum(-1), torch.ones(3, 3, 4), atol=1e-5)
    assert torch.allclose(last.entropy, torch.special.entr(whole).sum(-1))
    assert torch.equal(found.sink, last.sink)
    assert torch.allclose(found.mass[..., 0] + found.sink, torch.ones(3, 3, 4), atol=1e-5)
    assert torch.equal(found.difference("sink", minus="end"), found.sink - found.mass[..., 1])
    row = found.to_frame().set_index(["layer", "head", "span"]).loc[(1, 2, "end")]
    assert row["sink"] == pytest.approx(float(found.sink[:, 1, 2].mean()))
    row = last.to_frame().set_index(["query", "layer", "head"]).loc[(-1, 1, 2)]
    assert row["sink"] == pytest.approx(float(last.sink[:, 1, 2].mean()))
    spec = last.plot().to_dict()
    assert "(0: the sink)" in json.dumps(spec)
    assert "Which heads look at “sink”?" in found.plot("sink").to_dict()["description"]


def test_a_softmax_with_one_in_its_denominator_leaves_a_sink(monkeypatch):
    model = load_tiny("llama")
    plain_pattern = attention.attention_patterns(model, TEXTS)
    assert not plain_pattern.sink.any()  # a model without one
    softmax = torch.nn.functional.softmax

    def off_by_one(scores, dim=-1, **settings):
        padded = torch.cat([scores, torch.zeros_like(scores[..., :1])], dim=-1)
        return softmax(padded, dim=dim, **settings)[..., :-1]

    monkeypatch.setattr(torch.nn.functional, "softmax", off_by_one)
    found = attention.attention_patterns(model, TEXTS, layers=[0])
    assert (found.sink > 0).all()
    before, after = plain_pattern.probabilities[:, 0], found.probabilities[:, 0]
    assert torch.allclose(after, before * (1 - found.sink[:, 0, :, None]), atol=1e-5)


def test_a_state_in_the_pattern_s_place_is_refused(tmp_path):
    """MiniMax's linear attention returns its state where others return probabilities."""
    changes = {**SINK, "layer_types": ["linear_attention", "full_attention", "linear_attention"], "block_size": 4}
    model = rim.load(str(write_family(tmp_path, "minimax", **changes)), quantization=None, device="cpu")
    with pytest.raises(InputError, match="does not give its attention probabilities"):
        attention.attention_patterns(model, TEXTS)


def test_the_model_is_left_as_it_was():
    model = load_tiny("mistral")
    ids = model.tokenizer(TEXTS[1], return_tensors="pt").input_ids
    before = model.hf.config._attn_implementation, hooks(model), model.hf(ids).logits
    assert before[0] == "sdpa"
    attention.attention_patterns(model, TEXTS)
    handle = model.layout.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        attention.attention_to_spans(model, TEXTS, {"end": [[-1]] * 3})
    handle.remove()
    assert (model.hf.config._attn_implementation, hooks(model)) == before[:2]
    assert torch.equal(model.hf(ids).logits, before[2])


def test_a_model_that_cannot_show_its_attention_is_refused():
    model = load_tiny("falcon")
    with pytest.raises(InputError, match="does not give its attention probabilities"):
        attention.attention_patterns(model, TEXTS)
    assert model.hf.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
def test_spans_take_their_share_of_the_pattern(family):
    model = load_tiny(family)
    patterns = attention.attention_patterns(model, TEXTS, queries=-2)
    lengths = patterns.mask.sum(dim=1).tolist()
    spans = {
        "first": [[-length] for length in lengths],
        "start": [list(range(-length, -4)) for length in lengths],
        "rest": [[-4, -3, -2]] * 3,
        "none": [[], [-3], []],
    }
    found = attention.attention_to_spans(model, TEXTS, spans, query=-2)
    assert found.mass.shape == (3, model.n_layers, model.n_heads, 4)
    for row in range(3):
        for number, positions in enumerate(spans.values()):
            wanted = patterns.probabilities[row][..., positions[row]].sum(-1)
            assert torch.allclose(found.mass[row, ..., number], wanted, atol=1e-6)
    start, rest, none = (found.mass[..., number] for number in (1, 2, 3))
    assert torch.allclose(start + rest, torch.ones_like(start), atol=1e-5)
    assert not none[[0, 2]].any()
    assert torch.equal(found.difference("start", minus="rest"), start - rest)


def test_a_span_found_by_its_words_is_the_one_attended_to():
    """A head made to look at one word only: its key is the only one not knocked out."""
    model = load_tiny("llama")
    texts = [f"{text} The sky there. Why?" for text in TEXTS]
    spans = {"sky": find_span(model.tokenizer, texts, " sky"), "end": [[-1]] * 3}
    seen = torch.tensor(spans["sky"])
    assert seen.shape == (3, 1)

    def only_sky(mask, frame):
        blocked = frame.keys[:, None, None, :] != seen[:1, None, None, :]
        return mask.masked_fill(blocked, torch.finfo(mask.dtype).min)

    plain_mass = attention.attention_to_spans(model, texts, spans).mass
    with editing(model, [MaskEdit(1, only_sky)]):
        found = attention.attention_to_spans(model, texts, spans).mass
    assert torch.equal(found[:, 0], plain_mass[:, 0])
    assert torch.allclose(found[:, 1, :, 0], torch.ones(3, model.n_heads))
    assert not found[:, 1, :, 1].any()


def test_batches_of_any_size_give_the_same_numbers(monkeypatch):
    model = load_tiny("gpt2")
    spans = {"last two": [[-1, -2]] * 3}
    together = attention.attention_patterns(model, TEXTS, queries="all").probabilities
    mass = attention.attention_to_spans(model, TEXTS, spans).mass
    monkeypatch.setattr(attention, "_PATTERN", 1)
    alone = attention.attention_patterns(model, TEXTS, queries="all").probabilities
    assert torch.allclose(alone, together, atol=1e-5)
    assert torch.allclose(attention.attention_to_spans(model, TEXTS, spans).mass, mass, atol=1e-5)


def test_entropy_of_even_attention_is_the_logarithm_of_the_tokens_seen(tmp_path):
    model = rim.load(str(write_family(tmp_path, "llama")), quantization=None, device="cpu")
    for module in model.layout.attention:
        module.q_proj.weight.zero_()  # no query prefers any key
    found = attention.attention_patterns(model, TEXTS, queries="all")
    lengths = found.mask.sum(dim=1)
    for row, length in enumerate(lengths.tolist()):
        wanted = torch.arange(1.0, length + 1).log()[:, None, None].expand(-1, 3, model.n_heads)
        assert torch.allclose(found.entropy[row, -length:], wanted, atol=1e-5)
    frame = found.to_frame().set_index(["query", "layer", "head"])
    assert frame.loc[(-1, 0, 0), "estimate"] == pytest.approx(float(lengths.double().log().mean()), abs=1e-5)
    furthest = frame.loc[(-int(lengths.max()), 0, 0)]
    assert (furthest["n"], furthest["estimate"]) == (1, pytest.approx(0, abs=1e-5))


def test_frames_and_pictures():
    model = load_tiny("llama")
    patterns = attention.attention_patterns(model, TEXTS)
    spans = attention.attention_to_spans(model, TEXTS, {"start": [[-4, -3]] * 3, "end": [[-2, -1]] * 3})
    row = spans.to_frame().set_index(["layer", "head", "span"]).loc[(1, 2, "end")]
    wanted = rim.stats.t_interval(spans.mass[:, 1, 2, 1].double().numpy())
    assert [row["estimate"], row["low"], row["high"]] == pytest.approx([wanted.estimate, wanted.low, wanted.high])
    charts = [patterns.plot(), patterns.plot(prompt=1, layer=0), spans.plot("end"), spans.plot("end", minus="start")]
    for chart in charts:
        assert len(chart.to_dict()["description"]) > 40
    layer, head = divmod(int(spans.mass[..., 1].mean(0).argmax()), model.n_heads)
    assert f"(layer {layer}, head {head})." in charts[2].to_dict()["description"]
    with pytest.raises(InputError, match="no layer 7"):
        patterns.plot(layer=7)
    with pytest.raises(InputError, match="no span 'middle'; this holds start, end"):
        spans.plot("middle")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"layers": [3]}, "layer 3 is out of range"),
        ({"layers": []}, "layers: none given"),
        ({"queries": "first"}, "unknown queries 'first'"),
        ({"queries": 0}, "queries: position 0 is out of range"),
        ({"queries": [-1, -400]}, "queries: position -400 is out of range"),
        ({"queries": []}, "queries: none given"),
        ({"texts": []}, "no texts"),
    ],
)
def test_bad_arguments_of_patterns_get_one_line(arguments, says):
    with pytest.raises(InputError, match=says):
        attention.attention_patterns(load_tiny("llama"), **{"texts": TEXTS, **arguments})


def test_a_result_too_large_is_refused_before_it_is_made(monkeypatch):
    monkeypatch.setattr(attention, "_RESULT", 100)
    with pytest.raises(InputError, match="more than 2 GB"):
        attention.attention_patterns(load_tiny("llama"), TEXTS)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"spans": {}}, "no spans"),
        ({"spans": [[-1]] * 3}, r"\[\[-1\], \[-1\], \[-1\]\]; give {name: a list of positions for each text}"),
        ({"spans": {"a": TEXTS}}, "span 'a' is .*; give {name: a list of positions"),
        ({"spans": {"a": [-5, -6, -7]}}, r"span 'a' is \[-5, -6, -7\]; give {name: a list of positions"),
        ({"spans": {"a": [["-1"], [], []]}}, "span 'a' is .*; give {name: a list of positions"),
        ({"spans": {"a": 3}}, "span 'a' is 3; give {name: a list of positions"),
        ({"spans": {"a": [[-1]]}}, "'a' has 1 lists of positions for 3 texts"),
        ({"spans": {"a": [[-1], [0], [-1]]}}, "'a' holds position 0 in text 1"),
        ({"spans": {"a": [[-1], [-1], [-99]]}}, "'a' holds position -99 in text 2"),
        ({"query": -2}, "'a' holds position -1 in text 0; the query at -2"),
        ({"query": "all"}, "query 'all' must be 'last' or one position"),
        ({"query": -99}, "position -99 is out of range"),
    ],
)
def test_bad_arguments_of_spans_get_one_line(arguments, says):
    with pytest.raises(InputError, match=says):
        attention.attention_to_spans(load_tiny("llama"), **{"texts": TEXTS, "spans": {"a": [[-1]] * 3}, **arguments})
