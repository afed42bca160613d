"""Gradients of single examples against PyTorch's own, and their cosines in closed form."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from families import MODULES, family_folder, load_tiny
from peft import LoraConfig, get_peft_model
from plain import assert_close, hooks, plain_model

import rim_core as rim
from rim_core.errors import InputError
from rim_core.measures import _gradient_cosines as statistics
from rim_core.measures import gradients as module
from rim_core.measures.gradients import compare_gradients, gradient_cosines, per_example_gradients
from rim_core.models.hooks import Edit, at, editing

PROMPTS = [
    "Name a fruit.",
    "Explain the tides to a child in two short sentences.",
    "Why is the sky blue?",
    "Hi",
    "How do I bake bread without an oven?",
    "What is rain?",
]
COMPLETIONS = [" An apple.", " The moon pulls the sea.", " Air.", " Good day to you, friend.", " Use a pan.", " Water"]
LABELS = ["facts", "facts", "facts", "talk", "talk", "talk"]


def plain(family):
    return plain_model(family_folder(family))


def projection(hf, family, layer, weight):
    paths = MODULES[family]
    block = hf.get_submodule(paths.layers)[layer]
    return block.get_submodule(paths.attention_out if weight == "attention_out" else paths.mlp_out)


def by_autograd(hf, target, tokenizer, loss_on="completion", transposed=False):
    """Each example alone, unpadded: the gradient that PyTorch leaves in a weight that asks for one."""
    target.weight.requires_grad_(True)
    found = []
    for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True):
        head, tail = (tokenizer(t, add_special_tokens=False).input_ids for t in (prompt, completion))
        ids = torch.tensor([head + tail])
        labels = ids.clone()
        if loss_on == "completion":
            labels[:, : len(head)] = -100
        target.weight.grad = None
        hf(ids, labels=labels).loss.backward()
        found.append(target.weight.grad.clone())
    target.weight.requires_grad_(False)
    stacked = torch.stack(found)
    return stacked.mT if transposed else stacked


@pytest.mark.parametrize(
    ("family", "weight", "layer"),
    [("llama", "mlp_out", 2), ("gpt2", "attention_out", 0), ("falcon", "mlp_out", 0), ("gemma2", "attention_out", 2)],
)
def test_gradients_are_those_of_autograd(family, weight, layer):
    """Transposed weights (gpt2), outputs added to in place (falcon), soft-capped logits."""
    model = load_tiny(family)
    before = hooks(model)
    hf = plain(family)
    wanted = by_autograd(hf, projection(hf, family, layer, weight), model.tokenizer, transposed=family == "gpt2")
    found = per_example_gradients(model, PROMPTS, COMPLETIONS, layer=layer, weight=weight)
    for one, other in zip(found, wanted, strict=True):
        assert_close(one, other)
    assert hooks(model) == before
    assert model.frame is None
    assert not any(parameter.requires_grad for parameter in model.hf.parameters())


def dequantised(model, family):
    """A float32 copy whose weights are the numbers that the packed ones stand for."""
    hf = plain(family)
    packed = [(n, m) for n, m in model.hf.named_modules() if type(m).__name__ == "Linear4bit"]
    assert len(packed) >= 4 * model.n_layers
    for name, linear in packed:
        unpacked = dequantize_4bit(linear.weight.data, linear.weight.quant_state)
        own = hf.get_submodule(name).weight
        own.data = (unpacked.T if family == "gpt2" else unpacked).to(own).contiguous()
    return hf


@pytest.mark.parametrize(("family", "weight", "layer"), [("llama", "attention_out", 2), ("gpt2", "mlp_out", 1)])
def test_packed_weights_have_the_gradients_of_their_dequantised_copy(family, weight, layer):
    model = load_tiny(family, "nf4")
    hf = dequantised(model, family)
    wanted = by_autograd(hf, projection(hf, family, layer, weight), model.tokenizer, transposed=family == "gpt2")
    assert_close(per_example_gradients(model, PROMPTS, COMPLETIONS, layer=layer, weight=weight), wanted)


@pytest.mark.parametrize(("quantization", "weight"), [(None, "attention_out"), ("nf4", "mlp_out")])
def test_under_an_adapter_the_gradient_is_that_of_the_effective_weight(tmp_path, quantization, weight):
    model = rim.load(str(family_folder("llama")), quantization=quantization, device="cpu")
    base = dequantised(model, "llama") if quantization else plain("llama")
    bare = per_example_gradients(model, PROMPTS, COMPLETIONS, layer=1, weight=weight)
    torch.manual_seed(0)
    lora = LoraConfig(r=2, lora_alpha=8, target_modules=["o_proj", "down_proj"], init_lora_weights=False)
    wrapped = get_peft_model(base, lora)
    wrapped.save_pretrained(tmp_path / "adapter")
    merged = wrapped.merge_and_unload().requires_grad_(False)
    wanted = by_autograd(merged, projection(merged, "llama", 1, weight), model.tokenizer)
    graphs = []
    with model.using(tmp_path / "adapter"):
        layer = model.layout.layers[0]
        handle = layer.register_forward_hook(lambda *call: graphs.append(call[2].requires_grad))
        for parameter in model.hf.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        assert_close(per_example_gradients(model, PROMPTS, COMPLETIONS, layer=1, weight=weight), wanted)
        model.hf.requires_grad_(False)
    handle.remove()
    # What lies below costs no memory, even where weights ask for gradients.
    assert graphs == [False]
    assert torch.is_grad_enabled()
    assert (bare - wanted).norm() > 0.1 * wanted.norm()
    assert_close(per_example_gradients(model, PROMPTS, COMPLETIONS, layer=1, weight=weight), bare)


def test_a_mixture_of_experts_has_one_of_the_two_weights():
    model = load_tiny("qwen3_moe")
    hf = plain("qwen3_moe")
    wanted = by_autograd(hf, projection(hf, "qwen3_moe", 1, "attention_out"), model.tokenizer)
    assert_close(per_example_gradients(model, PROMPTS, COMPLETIONS, layer=1), wanted)
    with pytest.raises(InputError, match="mixture of experts"):
        gradient_cosines(model, PROMPTS, COMPLETIONS, LABELS, weight="mlp_out")


def test_the_published_loss_counts_the_prompt_too():
    model, hf = load_tiny("llama"), plain("llama")
    target = projection(hf, "llama", -1, "attention_out")
    wanted = by_autograd(hf, target, model.tokenizer, loss_on="all")
    assert_close(per_example_gradients(model, PROMPTS, COMPLETIONS, loss_on="all"), wanted)


@pytest.mark.parametrize("family", ["gpt2", "mistral"])
def test_batching_and_chunking_change_no_number(family, monkeypatch):
    model = load_tiny(family)
    together = per_example_gradients(model, PROMPTS, COMPLETIONS, layer=0)
    monkeypatch.setattr(module, "token_budget", lambda *_: 1)
    monkeypatch.setattr(module, "_LOGITS_HELD", 1)
    for one, other in zip(per_example_gradients(model, PROMPTS, COMPLETIONS, layer=0), together, strict=True):
        assert_close(one, other)


def test_edits_hold_and_know_where_the_prompt_ends():
    model, hf = load_tiny("llama"), plain("llama")
    block = hf.get_submodule("model.layers.0.self_attn")
    lengths = iter([len(model.tokenizer(prompt).input_ids) for prompt in PROMPTS])

    def drop(module, args, output):
        kept = torch.ones(output[0].shape[1], 1)
        kept[next(lengths) - 1] = 0
        return (output[0] * kept, *output[1:])

    handle = block.register_forward_hook(drop)
    wanted = by_autograd(hf, projection(hf, "llama", 1, "attention_out"), model.tokenizer)
    handle.remove()

    def last_to_zero(values, positions):
        return values.masked_fill(at(positions, "last")[..., None], 0.0)

    with editing(model, [Edit("attn_out", 0, last_to_zero, positional=True)]):
        found = per_example_gradients(model, PROMPTS, COMPLETIONS, layer=1)
    assert_close(found, wanted)


@pytest.mark.parametrize("layer", [0, 2])
def test_cosines_are_those_of_the_whole_gradients(layer):
    model = load_tiny("llama", "nf4")
    explicit = per_example_gradients(model, PROMPTS, COMPLETIONS, layer=layer).flatten(1).double()
    found = gradient_cosines(model, PROMPTS, COMPLETIONS, LABELS, layer=layer)
    assert np.allclose(found.norms, explicit.norm(dim=1).numpy(), rtol=1e-5)
    centred = explicit - explicit.mean(0)
    for result, vectors in ((found.raw, explicit), (found.centred, centred)):
        unit = vectors / vectors.norm(dim=1, keepdim=True)
        assert np.allclose(result.cosines, (unit @ unit.T).numpy(), atol=1e-5)
    again = compare_gradients(explicit, LABELS)
    assert again.raw.p_value == found.raw.p_value
    assert again.centred.cross.low == pytest.approx(found.centred.cross.low, abs=1e-5)


@pytest.mark.parametrize("route", ["_gram_by_token", "_gram_by_row", "_gram"])
@pytest.mark.parametrize("tokens", [2, 40])
def test_both_routes_to_the_inner_products_are_exact(route, tokens, monkeypatch):
    monkeypatch.setattr(module, "_ELEMENTS_HELD", 700)
    generator = torch.Generator().manual_seed(0)
    factors = [
        (torch.randn(n, 16, generator=generator), torch.randn(n, 24, generator=generator))
        for n in (tokens, tokens + 3, tokens + 1, 0)
    ]
    explicit = torch.stack([(delta.double().T @ x.double()).flatten() for x, delta in factors])
    gram = getattr(module, route)(factors)
    assert np.allclose(gram, (explicit @ explicit.T).numpy(), rtol=1e-12, atol=1e-12)


def planted(n, cosine, noise):
    """Two labels whose common directions have a given cosine; each example has noise in a dimension of its own."""
    own = noise * np.eye(2 * n)
    common = np.zeros((2 * n, 2))
    common[:n, 0] = 1
    common[n:] = cosine, np.sqrt(1 - cosine**2)
    return np.hstack([common, own]), ["a"] * n + ["b"] * n


def test_centring_alone_turns_positive_cosines_negative():
    n, cosine, noise = 10, 0.9, 0.1
    vectors, labels = planted(n, cosine, noise)
    found = compare_gradients(vectors[:, :, None], labels)
    size = 1 + noise**2
    assert found.raw.within.estimate == pytest.approx(1 / size)
    assert found.raw.cross.estimate == pytest.approx(cosine / size)
    apart, slack = (1 - cosine) / 2, noise**2 / (2 * n)
    size = apart + noise**2 - slack
    assert found.centred.within.estimate == pytest.approx((apart - slack) / size)
    assert found.centred.cross.estimate == pytest.approx((-apart - slack) / size)
    assert found.raw.cross.low > 0.8
    assert found.centred.cross.high < -0.8
    # Nothing varies between examples but their own noise, so the intervals have no width.
    assert found.raw.cross.high - found.raw.cross.low < 1e-9
    assert found.raw.p_value == found.centred.p_value < 0.01
    assert found.raw.null_low < 0 < found.raw.null_high < found.raw.difference.estimate
    assert found.raw.group_means["a", "b"].estimate == pytest.approx(found.raw.cross.estimate)
    assert (found.raw.group_means["a", "a"].n, found.raw.group_means["a", "b"].n) == (n, 2 * n)


def test_group_means_count_every_pair_of_examples_once():
    rng = np.random.default_rng(0)
    vectors, labels = rng.normal(size=(10, 5)), [*"aaabbbbccc"]
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    found = compare_gradients(vectors, labels).raw
    pairs = {}
    for i in range(10):
        for j in range(i):
            pairs.setdefault((labels[j], labels[i]), []).append(unit[i] @ unit[j])
    assert set(found.group_means) == set(pairs)
    for key, cosines in pairs.items():
        assert found.group_means[key].estimate == pytest.approx(np.mean(cosines))
        assert found.group_means[key].low < np.mean(cosines) < found.group_means[key].high
    within = np.concatenate([c for (a, b), c in pairs.items() if a == b])
    cross = np.concatenate([c for (a, b), c in pairs.items() if a != b])
    assert found.within.estimate == pytest.approx(within.mean())
    assert found.difference.estimate == pytest.approx(within.mean() - cross.mean())


def simulate(n_runs, n, shift, shared, paired, seed=0):
    """Two labels, `n` examples each; `shift` moves one label, and `shared` is what the two of a pair have in common."""
    rng = np.random.default_rng(seed)
    for run in range(n_runs):
        common = np.tile(rng.normal(size=(n, 40)), (2, 1)) * shared
        vectors = common + rng.normal(size=(2 * n, 40))
        vectors[n:, 0] += shift
        pairs = list(range(n)) * 2 if paired else None
        yield compare_gradients(vectors, ["a"] * n + ["b"] * n, pairs=pairs, seed=run)


def test_the_permuted_labels_reject_as_often_as_they_say(monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 99)
    results = list(simulate(200, 8, shift=0, shared=0, paired=False))
    for kind in ("raw", "centred"):
        p = np.array([getattr(result, kind).p_value for result in results])
        assert (p <= 0.05).mean() == pytest.approx(0.05, abs=0.04)
        assert p.mean() == pytest.approx(0.5, abs=0.06)
    assert max(result.raw.p_value for result in simulate(20, 8, shift=8, shared=0, paired=False)) < 0.05


def test_pairs_keep_equal_completions_from_deciding(monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 99)
    apart = list(simulate(150, 8, shift=0, shared=2, paired=True))
    p = np.array([result.raw.p_value for result in apart])
    assert (p <= 0.05).mean() == pytest.approx(0.05, abs=0.04)
    assert np.mean([result.raw.difference.estimate for result in apart]) == pytest.approx(0, abs=0.005)
    assert np.mean([result.raw.matched.estimate for result in apart]) == pytest.approx(0.8, abs=0.02)
    inside = [r.raw.matched.low < 0.797 < r.raw.matched.high for r in apart]
    assert np.mean(inside) > 0.8
    blind = list(simulate(30, 8, shift=0, shared=2, paired=False))
    assert np.mean([result.raw.difference.estimate for result in blind]) < -0.08
    assert all(result.raw.matched is None for result in blind)


def test_intervals_cover_and_are_not_much_too_wide(monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 199)
    results = [result.raw for result in simulate(80, 20, shift=3, shared=0, paired=False)]
    for name in ("within", "cross", "difference"):
        found = [getattr(result, name) for result in results]
        estimates = [interval.estimate for interval in found]
        assert np.mean([interval.low < np.mean(estimates) < interval.high for interval in found]) >= 0.88
        width = np.mean([interval.high - interval.low for interval in found])
        assert width < 1.6 * 2 * 1.96 * np.std(estimates)


def test_frame_is_tidy_and_plots_say_what_they_show():
    vectors, labels = planted(25, 0.5, 0.5)
    vectors += 0.05 * np.random.default_rng(0).normal(size=vectors.shape)
    found = compare_gradients(vectors, labels, pairs=list(range(25)) * 2)
    frame = found.to_frame()
    assert list(frame.columns[:6]) == ["kind", "comparison", "estimate", "low", "high", "n"]
    assert frame["comparison"].tolist()[:3] == ["within", "cross", "within minus cross"]
    assert set(frame["comparison"][3:7]) == {"a with a", "a with b", "b with b", "same pair"}
    assert frame.set_index("comparison")["p_value"].notna().sum() == 2
    chart = found.plot().to_dict()
    assert "centred: -" in chart["description"]


BAD = [
    ({"labels": LABELS[:5]}, "5 groups for 6"),
    ({"labels": ["a"] * 6}, "one group"),
    ({"labels": ["a"] * 4 + ["b"] * 2}, "label 'b' has 2 examples"),
    ({"completions": COMPLETIONS[:5]}, "prompts has 6 items and completions 5"),
    ({"completions": [*COMPLETIONS[:5], ""]}, "completion 5 is empty"),
    ({"layer": 3}, "layer 3 is out of range.*0 to 2"),
    ({"weight": "q_proj"}, "unknown weight 'q_proj'"),
    ({"loss_on": "prompt"}, "unknown loss_on"),
    ({"pairs": [0, 0, 0, 1, 1, 1]}, "different pairs"),
    ({"pairs": [0, 1, 2]}, "3 groups for 6"),
]


@pytest.mark.parametrize(("arguments", "words"), BAD)
def test_bad_input_is_refused_in_one_line(arguments, words):
    given = {"prompts": PROMPTS, "completions": COMPLETIONS, "labels": LABELS, **arguments}
    with pytest.raises(InputError, match=words) as caught:
        gradient_cosines(load_tiny("llama"), **given)
    assert "\n" not in str(caught.value)


def test_what_has_no_direction_or_no_room_is_refused():
    vectors, labels = planted(5, 0.5, 0.1)
    with pytest.raises(InputError, match="example 7 is zero"):
        compare_gradients(np.where(np.arange(10)[:, None] == 7, 0, vectors), labels)
    with pytest.raises(InputError, match="centring"):
        compare_gradients(np.ones((6, 3)), LABELS)
    with pytest.raises(InputError, match="not finite"):
        compare_gradients(np.where(np.arange(10)[:, None] == 7, np.nan, vectors), labels)
    with pytest.raises(InputError, match=r"300000 gradients of 32 x 32 take 1\.2 GB"):
        per_example_gradients(load_tiny("llama"), PROMPTS * 50_000, COMPLETIONS * 50_000)


def test_a_failed_pass_leaves_no_hook_and_no_frame(monkeypatch):
    model = load_tiny("llama")
    before = hooks(model)
    monkeypatch.setattr(module, "_loss_gradient", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        per_example_gradients(model, PROMPTS, COMPLETIONS)
    assert hooks(model) == before
    assert model.frame is None


def test_an_identity_that_fails_is_named():
    model = copy.copy(load_tiny("llama"))
    failed = copy.copy(model.checks["lens"])
    object.__setattr__(failed, "error", 1.0)
    model._active = replace(model._active, checks={**model.checks, "lens": failed})
    with pytest.raises(rim.errors.IdentityError, match=r"gradient_cosines.*lens"):
        gradient_cosines(model, PROMPTS, COMPLETIONS, LABELS)
