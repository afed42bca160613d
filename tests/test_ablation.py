"""Ablation and knock-out against plain hooks on one prompt at a time, closed forms, and every bad argument."""

import math
from collections import Counter

import pytest
import torch
from families import MODULES, family_folder, load_tiny, reference, sites_of
from plain import assert_close, generated, greedy, hooked, hooks, length, some, tensors
from tiny import TEXTS
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import rim_core as rim
from rim_core.errors import IdentityError, InputError
from rim_core.interventions.ablation import ablate, knock_out
from rim_core.interventions.controls import random_heads, random_sets
from rim_core.interventions.steering import steer

REFERENCE = ("A short answer is best.", "Tell me why the moon looks larger near the horizon than high up.", "Why?")
HEADS = [(0, 3), (1, 0), (1, 2)]
NEURONS = [(0, 5), (2, 63), (2, 0)]
STEPS = 4
FAMILIES = ("llama", "gpt2", "gemma2", "qwen3_moe")
CASES = [*((family, None) for family in FAMILIES), ("llama", "nf4")]
every_case = pytest.mark.parametrize(("family", "quantization"), CASES)


def places(model, heads, neurons):
    """Site, layer and slice of each component, as this test counts them."""
    wide = model.head_dim
    found = [("head_z", layer, slice(head * wide, (head + 1) * wide)) for layer, head in heads]
    return found + [("mlp_neurons", layer, slice(neuron, neuron + 1)) for layer, neuron in neurons]


def put(where, value, tokens=slice(None)):
    """A change that puts `value` (or a function of the old one) into a slice of the width at these tokens."""

    def change(values):
        edited = values.clone()
        old = edited[:, tokens, where]
        edited[:, tokens, where] = value(old) if callable(value) else value
        return edited

    return change


def tokens_of(model, family):
    """Every token of the reference: site -> `[layer, token, width]`, by hand, and each text's last token."""
    found = [reference(model, family, text)[0] for text in REFERENCE]
    every = {site: torch.cat([one[site] for one in found], dim=1) for site in sites_of(family)}
    last = {site: torch.stack([one[site][:, -1] for one in found]) for site in sites_of(family)}
    return every, last


def assert_equals_by_hand(model, family, every, changes):
    """Every site of every prompt, captured in a batch, equals that prompt alone under plain hooks."""
    for row, text in enumerate(TEXTS):
        with hooked(model, family, changes(text)):
            wanted, _ = reference(model, family, text)
        for site in sites_of(family):
            found = every[site][row, -length(model, text) :].flatten(2).transpose(0, 1)
            assert_close(found, wanted[site])


def components(family):
    return HEADS, NEURONS if MODULES[family].mlp_out else None


@every_case
@pytest.mark.parametrize("mode", ["zero", "mean", "resample", "scale"])
def test_ablating_components_equals_plain_hooks(family, quantization, mode):
    model = load_tiny(family, quantization)
    heads, neurons = components(family)
    chosen = places(model, heads, neurons or [])
    options = {"mean": {"reference": REFERENCE}, "resample": {"reference": REFERENCE}, "scale": {"factor": -2.0}}
    with ablate(model, heads, neurons=neurons, mode=mode, **options.get(mode, {})):
        every = rim.capture(model, TEXTS, sites_of(family), positions="all")
    tokens, last = tokens_of(model, family)
    if mode == "resample":
        # Which text was drawn is not for the test to know: one of them explains everything.
        site, layer, where = chosen[0]
        held = every[site][0, -1, layer].flatten()[where]
        drawn = min(range(len(REFERENCE)), key=lambda text: (last[site][text, layer, where] - held).norm())
    value = {
        "zero": lambda site, layer, where: 0.0,
        "mean": lambda site, layer, where: tokens[site][layer, :, where].mean(0),
        "resample": lambda site, layer, where: last[site][drawn, layer, where],
        "scale": lambda site, layer, where: lambda old: -2.0 * old,
    }[mode]
    changes = [(site, layer, put(where, value(site, layer, where))) for site, layer, where in chosen]
    assert_equals_by_hand(model, family, every, lambda text: changes)
    assert hooks(model) == 0


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("positions", ["all", "last"])
def test_ablation_holds_at_each_step_of_generation(family, positions):
    model = load_tiny(family)
    heads, neurons = components(family)
    with ablate(model, heads, neurons=neurons, reference=REFERENCE, positions=positions):
        answers, logits = generated(model, TEXTS, STEPS)
    tokens, _ = tokens_of(model, family)
    for row, text in enumerate(TEXTS):
        slots = slice(None) if positions == "all" else [length(model, text) - 1]
        changes = [
            (site, layer, put(where, tokens[site][layer, :, where].mean(0), slots))
            for site, layer, where in places(model, heads, neurons or [])
        ]
        with hooked(model, family, changes):
            answer, by_step = greedy(model, text, STEPS)
        assert answers[row] == answer
        assert_close(logits[row, : len(by_step)], by_step)


def test_a_captured_reference_means_its_prompts_and_positions():
    model = load_tiny("llama")
    tokens, last = tokens_of(model, "llama")
    mine = slice(2 * model.head_dim, 3 * model.head_dim)

    def held(mode, seed=0, **options):
        acts = rim.capture(model, REFERENCE, ("resid_pre", "head_z"), **options)
        with ablate(model, heads=[(1, 2)], mode=mode, reference=acts, seed=seed):
            found = rim.capture(model, TEXTS, "head_z", positions="all")
        values = found["head_z"][:, :, 1, 2][found.mask]
        assert torch.equal(values, values[:1].expand_as(values))
        return values[0]

    assert_close(held("mean", positions="all"), tokens["head_z"][1, :, mine].mean(0))
    assert_close(held("mean"), last["head_z"][:, 1, mine].mean(0))
    two = torch.stack([reference(model, "llama", t)[0]["head_z"][1, [-1, -2], mine] for t in REFERENCE])
    assert_close(held("mean", positions=[-1, -2]), two.mean((0, 1)))
    for positions in ("last", "all"):
        drawn = {tuple(held("resample", seed, positions=positions).tolist()) for seed in range(12)}
        wanted = last["head_z"][:, 1, mine]
        assert len(drawn) == len(REFERENCE)
        for value in drawn:
            assert (wanted - torch.tensor(value)).abs().amax(1).min() < 1e-5
    with pytest.raises(InputError, match="at 'last' or 'all'"):
        held("resample", positions=[-1, -2])


def test_resampled_texts_are_each_drawn_by_some_seed():
    model = load_tiny("llama")
    seen = set()
    for seed in range(12):
        with ablate(model, heads=HEADS, mode="resample", reference=REFERENCE, seed=seed):
            seen.add(tuple(rim.capture(model, TEXTS[:1], "head_z")["head_z"][0, 1, 0].tolist()))
        with ablate(model, heads=HEADS, mode="resample", reference=REFERENCE, seed=seed):
            again = rim.capture(model, TEXTS[:1], "head_z")["head_z"][0, 1, 0]
        assert tuple(again.tolist()) in seen
    assert len(seen) == len(REFERENCE)


@every_case
def test_keep_norm_keeps_each_token_s_norm(family, quantization):
    model = load_tiny(family, quantization)
    with ablate(model, heads=HEADS, mode="scale", factor=0.0, keep_norm=True):
        every = rim.capture(model, TEXTS, sites_of(family), positions="all")
    plain = rim.capture(model, TEXTS, "head_z", positions="all")["head_z"]
    norms, clean = every["head_z"][:, :, 0].flatten(2).norm(dim=-1), plain[:, :, 0].flatten(2).norm(dim=-1)
    assert_close(norms, clean)  # layer 0 sees the same input with and without
    assert not every["head_z"][:, :, 0, 3].any()

    def rescaled(layer):
        def change(z):
            cut = z.clone()
            for _, head in (pair for pair in HEADS if pair[0] == layer):
                cut[..., head * model.head_dim : (head + 1) * model.head_dim] = 0
            return cut * z.norm(dim=-1, keepdim=True) / cut.norm(dim=-1, keepdim=True)

        return change

    changes = [("head_z", layer, rescaled(layer)) for layer in (0, 1)]
    assert_equals_by_hand(model, family, every, lambda text: changes)


@pytest.mark.parametrize("family", FAMILIES)
def test_scaling_by_one_changes_nothing_and_by_zero_removes(family):
    model = load_tiny(family)
    heads, neurons = components(family)
    plain = rim.capture(model, TEXTS, "resid_post")["resid_post"]
    with ablate(model, heads, neurons=neurons, mode="scale", factor=1.0):
        assert torch.equal(rim.capture(model, TEXTS, "resid_post")["resid_post"], plain)
    with ablate(model, heads, mode="scale", factor=1.0, keep_norm=True):
        assert_close(rim.capture(model, TEXTS, "resid_post")["resid_post"], plain)
    with ablate(model, heads, neurons=neurons, mode="scale"):
        scaled = rim.capture(model, TEXTS, "resid_post")["resid_post"]
    with ablate(model, heads, neurons=neurons, mode="zero"):
        assert torch.equal(rim.capture(model, TEXTS, "resid_post")["resid_post"], scaled)
    assert (scaled - plain).abs().max() > 1e-3 * plain.abs().max()


def projected(unit, target=0.0, tokens=slice(None)):
    def change(values):
        edited = values.clone()
        coordinate = edited[:, tokens] @ unit
        edited[:, tokens] += (target - coordinate)[..., None] * unit
        return edited

    return change


@every_case
@pytest.mark.parametrize("mode", ["zero", "mean"])
def test_ablating_a_direction_equals_plain_hooks(family, quantization, mode):
    model = load_tiny(family, quantization)
    direction = some(model.d_model)
    unit = direction / direction.norm()
    options = {"reference": REFERENCE} if mode == "mean" else {}
    with ablate(model, direction=direction, mode=mode, **options):
        every = rim.capture(model, TEXTS, sites_of(family), positions="all")
        answers, logits = generated(model, TEXTS, STEPS)
    tokens, _ = tokens_of(model, family)
    means = {site: tokens[site].mean(1) @ unit for site in ("resid_pre", "attn_out", "mlp_out", "resid_post")}
    changes = [
        (site, layer, projected(unit, means[site][layer] if mode == "mean" else 0.0))
        for site, layers in (("resid_pre", 3), ("attn_out", 3), ("mlp_out", 3), ("resid_post", 1))
        for layer in range(3)[-layers:]
    ]
    assert_equals_by_hand(model, family, every, lambda text: changes)
    for row, text in enumerate(TEXTS):
        with hooked(model, family, changes):
            answer, by_step = greedy(model, text, STEPS)
        assert answers[row] == answer
        assert_close(logits[row, : len(by_step)], by_step)
    left = (every["resid_post"][:, :, -1] @ unit)[every.mask]
    wanted = means["resid_post"][-1].expand_as(left) if mode == "mean" else torch.zeros_like(left)
    assert (left - wanted).abs().max() < 1e-4 * every["resid_post"][:, :, -1].abs().max()


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_where_terms_are_plain_the_three_published_sites_suffice(family):
    """Arditi et al. edit block inputs and both outputs; the last `resid_post` is then free of the direction already."""
    model, direction = load_tiny(family), some(32)
    unit = direction / direction.norm()
    with ablate(model, direction=direction, mode="zero"):
        every = rim.capture(model, TEXTS, sites_of(family), positions="all")
    three = ("resid_pre", "attn_out", "mlp_out")
    changes = [(site, layer, projected(unit)) for site in three for layer in range(3)]
    assert_equals_by_hand(model, family, every, lambda text: changes)


def test_a_direction_is_removed_by_default():
    model, direction = load_tiny("llama"), some(32)
    with ablate(model, direction=direction):
        found = rim.capture(model, TEXTS, "resid_post")["resid_post"]
    with ablate(model, direction=direction, mode="zero"):
        assert torch.equal(rim.capture(model, TEXTS, "resid_post")["resid_post"], found)


def test_a_direction_a_layer_at_one_position():
    model = load_tiny("llama")
    rows = some(3, 32)
    units = rows / rows.norm(dim=-1, keepdim=True)
    with ablate(model, direction=rows, mode="zero", positions="last"):
        every = rim.capture(model, TEXTS, sites_of("llama"), positions="all")

    def changes(text):
        token = [length(model, text) - 1]
        sites = ("resid_pre", "attn_out", "mlp_out")
        return [(site, layer, projected(units[layer], 0.0, token)) for site in sites for layer in range(3)]

    assert_equals_by_hand(model, "llama", every, changes)


def test_a_reference_is_taken_under_the_outer_contexts_and_before_one_s_own():
    model, direction = load_tiny("llama"), some(32)
    shift = ("resid_post", 0, lambda values: values + direction)
    with hooked(model, "llama", [shift]):
        tokens, _ = tokens_of(model, "llama")
    with steer(model, direction, 0), ablate(model, heads=[(1, 1)], neurons=[(2, 7)], reference=REFERENCE):
        inside = rim.capture(model, TEXTS, ("head_z", "mlp_neurons"))
    assert_close(inside["head_z"][0, 1, 1], tokens["head_z"][1, :, 8:16].mean(0))
    # Had the head's own ablation been active, the later neuron's mean would be another.
    assert_close(inside["mlp_neurons"][:, 2, 7], tokens["mlp_neurons"][2, :, 7].mean().expand(3))
    alone, _ = tokens_of(model, "llama")
    assert (alone["head_z"][1, :, 8:16].mean(0) - inside["head_z"][0, 1, 1]).abs().max() > 1e-2


def test_ablation_leaves_nothing():
    model = load_tiny("llama")

    def once():
        with ablate(model, HEADS, neurons=NEURONS, reference=REFERENCE), knock_out(model, "last", [-2, -3]):
            rim.capture(model, TEXTS, "resid_post")

    once()
    before = hooks(model), tensors()
    for _ in range(4):
        once()
    assert hooks(model) == before[0] == 0
    assert tensors() <= before[1] + 2
    with pytest.raises(RuntimeError, match="stop"), ablate(model, HEADS, mode="zero"):
        raise RuntimeError("stop")
    assert hooks(model) == 0
    assert model.edits == []


def test_heads_are_refused_where_their_sum_is_not_the_output(monkeypatch):
    model = load_tiny("llama")
    from rim_core.models.checks import Check

    monkeypatch.setitem(model.checks, "head_sum", Check("head_sum", 0.5, 1e-3))
    with pytest.raises(IdentityError, match="head_sum"), ablate(model, heads=HEADS, mode="zero"):
        pass
    with ablate(model, neurons=NEURONS, mode="zero"):
        pass


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({}, "nothing to ablate"),
        ({"heads": [], "neurons": []}, "nothing to ablate"),
        ({"heads": [(0, 4)]}, "head 4 of layer 0 is out of range.*4 heads"),
        ({"heads": [(3, 0)]}, "layers 0 to 2"),
        ({"heads": [(-1, 0)]}, "out of range"),
        ({"neurons": [(0, 64)]}, "neuron 64 of layer 0 is out of range"),
        ({"heads": [(0, 1), (1, 1), (0, 1)]}, r"head \(0, 1\) is named twice"),
        ({"heads": [3]}, "pairs"),
        ({"heads": [(0, 1)], "mode": "median"}, "unknown mode 'median'"),
        ({"heads": [(0, 1)], "mode": "mean"}, "'mean' needs reference"),
        ({"heads": [(0, 1)], "mode": "resample"}, "'resample' needs reference"),
        ({"heads": [(0, 1)], "reference": REFERENCE}, "takes no reference"),
        ({"heads": [(0, 1)], "mode": "mean", "reference": "one text"}, "list"),
        ({"heads": [(0, 1)], "mode": "resample", "reference": []}, "no texts"),
        ({"heads": [(0, 1)], "factor": 2.0}, "factor is for mode 'scale'"),
        ({"heads": [(0, 1)], "mode": "scale", "factor": float("inf")}, "finite"),
        ({"heads": [(0, 1)], "positions": "end"}, "unknown positions 'end'"),
        ({"direction": some(32), "heads": [(0, 1)]}, "components or a direction"),
        ({"direction": some(32), "mode": "scale"}, "cannot be ablated by 'scale'"),
        ({"direction": some(32), "keep_norm": True}, "keep_norm is for heads"),
        ({"direction": some(31)}, r"shape \[31\]"),
        ({"neurons": [(0, 1)], "heads": [(0, 1)], "keep_norm": True}, "keep_norm is for heads"),
        ({"heads": [(1, h) for h in range(4)], "keep_norm": True}, "all heads of layer 1"),
    ],
)
def test_bad_arguments_get_one_line(arguments, says):
    model = load_tiny("llama")
    with pytest.raises(InputError, match=says), ablate(model, **{"mode": "zero", **arguments}):
        pass
    assert hooks(model) == 0


def test_references_and_neurons_of_another_shape_are_refused():
    llama, qwen3, moe = (load_tiny(family) for family in ("llama", "qwen3", "qwen3_moe"))
    acts = rim.capture(qwen3, REFERENCE, "head_z")
    with pytest.raises(InputError, match=r"\[3, 64\].*\[3, 32\]"), ablate(llama, HEADS, reference=acts):
        pass
    with pytest.raises(InputError, match="holds head_z"), ablate(qwen3, neurons=NEURONS, reference=acts):
        pass
    with pytest.raises(InputError, match="mixture of experts"), ablate(moe, neurons=NEURONS, mode="zero"):
        pass


# Attention knock-out ---------------------------------------------------------------------------------

SLIDING = {"gemma2": (0, 2)}  # family -> layers with the window of 6 tokens, written out by hand
LOOKS = [  # queries and keys; heads; layers
    ("last", [-2, -4], None, None),
    ([-1, -2], -3, [(0, 1), (2, 0), (2, 3)], None),
    ("all", -4, None, [1]),
]


def allowed(model, family, layer, tokens, prompt, queries, keys, chosen):
    """Who may see whom, `[1, head, query, key]`, for a whole sequence of `tokens`, of which `prompt` are the prompt."""
    place = torch.arange(tokens)
    seen = place[:, None] >= place[None, :]
    if layer in SLIDING.get(family, ()):
        seen &= place[:, None] - place[None, :] < 6
    seen = seen.repeat(model.n_heads, 1, 1)

    def where(wanted):
        if wanted == "all":
            return list(range(tokens))
        counted = [-1] if wanted == "last" else [wanted] if isinstance(wanted, int) else wanted
        return [prompt + position for position in counted]

    for head in range(model.n_heads):
        if (layer, head) in chosen:
            for query in where(queries):
                seen[head, query, where(keys)] = False
    return seen[None]


def blinded(model, family, text, queries, keys, heads, layers):
    """Plain hooks that give each attention module a mask written from scratch."""
    every = [(layer, head) for layer in layers or range(3) for head in range(model.n_heads)]
    handles, prompt = [], length(model, text)

    def masked(layer):
        def hook(module, args, kwargs):
            tokens = (args[0] if args else kwargs["hidden_states"]).shape[1]
            seen = allowed(model, family, layer, tokens, prompt, queries, keys, heads or every)
            mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
            return args, {**kwargs, "attention_mask": mask}

        return hook

    for layer, block in enumerate(model.hf.get_submodule(MODULES[family].layers)):
        attention = block.get_submodule(MODULES[family].attention)
        handles.append(attention.register_forward_pre_hook(masked(layer), with_kwargs=True))
    return handles


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("queries", "keys", "heads", "layers"), LOOKS)
def test_knock_out_equals_masks_written_from_scratch(family, queries, keys, heads, layers):
    """In capture of a padded batch and at each step of generation, with and without sliding windows."""
    model = load_tiny(family)
    _, plain = generated(model, TEXTS, 1)
    with knock_out(model, queries, keys, heads=heads, layers=layers):
        every = rim.capture(model, TEXTS, sites_of(family), positions="all")
        answers, logits = generated(model, TEXTS, STEPS)
    for row, text in enumerate(TEXTS):
        handles = blinded(model, family, text, queries, keys, heads, layers)
        wanted, _ = reference(model, family, text)
        answer, by_step = greedy(model, text, STEPS)
        for handle in handles:
            handle.remove()
        for site in sites_of(family):
            found = every[site][row, -length(model, text) :].flatten(2).transpose(0, 1)
            assert_close(found, wanted[site])
        assert answers[row] == answer
        assert_close(logits[row, : len(by_step)], by_step)
    assert (logits[:, 0] - plain[:, 0]).abs().max() > 1e-3 * plain.abs().max()
    assert hooks(model) == 0


def test_knock_out_equals_attention_written_out():
    """Queries, keys, values, rotation and softmax of the tiny Llama, in the test."""
    model = load_tiny("llama")
    heads = [(layer, head) for layer in range(3) for head in (1, 2)]
    with knock_out(model, [-1, -3], [-2, -5], heads=heads):
        acts = rim.capture(model, TEXTS[1:2], ("resid_pre", "head_z"), positions="all")
    tokens = acts["resid_pre"].shape[1]
    for layer, block in enumerate(model.hf.model.layers):
        h = block.input_layernorm(acts["resid_pre"][:, :, layer])
        q, k, v = (getattr(block.self_attn, f"{name}_proj")(h).view(1, tokens, -1, 8).transpose(1, 2) for name in "qkv")
        q, k = apply_rotary_pos_emb(q, k, *model.hf.model.rotary_emb(h, torch.arange(tokens)[None]))
        k, v = k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)
        scores = q @ k.transpose(-1, -2) / math.sqrt(8)
        hidden = torch.ones(tokens, tokens).triu(1).bool().repeat(4, 1, 1)
        for head in (1, 2):
            for query in (-1, -3):
                hidden[head, query, [-2, -5]] = True
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        z = (weights @ v).transpose(1, 2)
        assert_close(acts["head_z"][:, :, layer], z)


def test_weights_knocked_out_are_zero_and_the_others_sum_to_one():
    model = rim.load(str(family_folder("llama")), quantization=None, device="cpu")
    model.hf.set_attn_implementation("eager")
    ids = model.tokenizer(TEXTS[1], return_tensors="pt").input_ids
    with torch.no_grad():
        plain = model.hf(ids, output_attentions=True).attentions
        with knock_out(model, "last", [-2, -3], heads=[(1, 0), (1, 3)]):
            found = model.hf(ids, output_attentions=True).attentions
    assert torch.equal(found[0], plain[0])
    for head in (0, 3):
        row = found[1][0, head, -1]
        assert torch.equal(row[[-2, -3]], torch.zeros(2))
        assert_close(row.sum(), torch.tensor(1.0))
        kept = plain[1][0, head, -1].clone()
        kept[[-2, -3]] = 0
        assert_close(row, kept / kept.sum())
        assert torch.equal(found[1][0, head, :-1], plain[1][0, head, :-1])
    assert torch.equal(found[1][0, [1, 2]], plain[1][0, [1, 2]])
    assert plain[1][0, :, -1, [-2, -3]].min() > 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"queries": "last", "keys": "all"}, "nothing to attend to"),
        ({"queries": "last", "keys": 0}, "unknown positions 0"),
        ({"queries": "end", "keys": -1}, "unknown positions 'end'"),
        ({"queries": "last", "keys": -2, "heads": []}, "nothing to knock out"),
        ({"queries": "last", "keys": -2, "heads": [(0, 9)]}, "out of range"),
        ({"queries": "last", "keys": -2, "layers": [3]}, "0 to 2"),
        ({"queries": "last", "keys": -2, "layers": []}, "layers: none given"),
        ({"queries": "last", "keys": -2, "heads": [(0, 1)], "layers": [0]}, "not both"),
    ],
)
def test_knock_out_refuses_what_it_cannot_do(arguments, says):
    model = load_tiny("llama")
    with pytest.raises(InputError, match=says), knock_out(model, **arguments):
        rim.capture(model, TEXTS[:1], "resid_post")
    assert hooks(model) == 0


def test_the_first_token_cannot_lose_itself():
    model = load_tiny("llama")
    first = -min(length(model, text) for text in TEXTS)
    with pytest.raises(InputError, match="nothing to attend to"), knock_out(model, "all", first):
        rim.capture(model, TEXTS, "resid_post")
    longest = max(TEXTS, key=lambda text: length(model, text))
    with knock_out(model, "all", first):  # in a longer prompt the same position has others before it
        rim.capture(model, [longest], "resid_post")


# Controls --------------------------------------------------------------------------------------------


def test_random_heads_are_different_heads_of_the_chosen_layers():
    model = load_tiny("llama")
    drawn = random_heads(model, 5, exclude=HEADS, seed=4)
    assert drawn == sorted(set(drawn)) == random_heads(model, 5, exclude=HEADS, seed=4)
    assert not set(drawn) & set(HEADS)
    assert all(0 <= layer < 3 and 0 <= head < 4 for layer, head in drawn)
    assert {layer for layer, _ in random_heads(model, 6, layers=[0, 2], seed=1)} == {0, 2}
    assert random_heads(model, 9, exclude=HEADS) == [
        (layer, head) for layer in range(3) for head in range(4) if (layer, head) not in HEADS
    ]
    often = Counter(head for seed in range(600) for head in random_heads(model, 2, seed=seed))
    assert len(often) == 12
    assert max(often.values()) < 2 * min(often.values())  # 100 each, standard deviation 9
    for n in (0, 10):
        with pytest.raises(InputError, match="9 to draw from"):
            random_heads(model, n, exclude=HEADS)
    with pytest.raises(InputError, match="out of range"):
        random_heads(model, 1, layers=[5])


def test_random_sets_are_different_and_as_deep_when_asked():
    model = load_tiny("llama")
    free = random_sets(model, HEADS, n_sets=40, seed=2)
    assert len({tuple(drawn) for drawn in free}) == 40
    assert all(len(set(drawn)) == 3 and not set(drawn) & set(HEADS) for drawn in free)
    assert len({tuple(sorted(layer for layer, _ in drawn)) for drawn in free}) > 1
    assert random_sets(model, HEADS, n_sets=40, seed=2) == free
    # Layer 0 has three other heads, layer 1 one pair of others.
    deep = random_sets(model, HEADS, n_sets=3, per_layer=True)
    assert sorted(deep) == [[(0, head), (1, 1), (1, 3)] for head in range(3)]
    with pytest.raises(InputError, match="there are 3"):
        random_sets(model, HEADS, n_sets=4, per_layer=True)
    with pytest.raises(InputError, match="no heads"):
        random_sets(model, [])


@pytest.mark.parametrize("mode", ["zero", "mean"])
def test_against_random_sets(mode):
    """The measures are those under each ablation by itself, and p counts the sets that move it as far."""
    model, reference = load_tiny("llama"), REFERENCE if mode == "mean" else None

    def measure(model):
        return rim.capture(model, TEXTS, "resid_post")["resid_post"].norm()

    found = rim.against_random(model, HEADS, measure, n_sets=3, seed=1, mode=mode, reference=reference)
    assert found.heads == HEADS
    assert found.sets == random_sets(model, HEADS, n_sets=3, per_layer=True, seed=1)
    assert found.intact == float(measure(model))
    for heads, value in zip([HEADS, *found.sets], [found.chosen, *found.null], strict=True):
        with ablate(model, heads, mode=mode, reference=reference):
            assert value == float(measure(model))
    further = sum(abs(value - found.intact) >= abs(found.chosen - found.intact) for value in found.null)
    assert found.p_value == (1 + further) / 4
    frame = found.to_frame()
    assert list(frame["kind"]) == ["intact", "chosen", "random", "random", "random"]
    assert frame["heads"][1] == "0.3 + 1.0 + 1.2"
    assert frame["estimate"][1] == found.chosen
    assert "3 random sets" in found.plot().to_dict()["description"]
    assert not model.edits


def test_a_measure_against_random_sets_is_one_number():
    model = load_tiny("llama")
    for wrong in (lambda model: torch.ones(2), lambda model: None, lambda model: float("nan")):
        with pytest.raises(InputError, match="measure's value must be a finite number"):
            rim.against_random(model, HEADS, wrong, n_sets=1)
    with pytest.raises(InputError, match="there are 3"):
        rim.against_random(model, HEADS, lambda model: 0.0, n_sets=4)
