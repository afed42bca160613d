"""The tools find what was planted, all of it and nothing else, at full precision and in 4 bits.

The rule, fixed here: a component is found if the size of its mean effect is over a tenth of the largest planted one
of its kind and sign. Nothing below names a component before it is measured.
"""

import pytest
import torch
from planted import (
    D_MLP,
    HARMFUL,
    HARMFUL_PROMPTS,
    HARMLESS_PROMPTS,
    LAST,
    MOVED,
    MOVER,
    NEURON,
    REFUSAL,
    SIGNAL,
    SORRY,
    SUPPRESSORS,
    SURE,
    direction,
    planted,
)

import rim_core as rim

METRIC = rim.Projection(direction(REFUSAL))
EVERY_NEURON = [(layer, neuron) for layer in range(4) for neuron in range(0, D_MLP)]


@pytest.fixture(params=[None, "nf4"], ids=["fp32", "nf4"])
def model(request):
    return planted(request.param)


def found(effects, share=0.1):
    """Indices of mean effects over a share of the largest of their sign: (raising, lowering)."""
    mean = torch.as_tensor(effects).mean(0)
    raising = [tuple(i) for i in (mean > share * mean.max()).nonzero().tolist()] if mean.max() > 0 else []
    lowering = [tuple(i) for i in (mean < share * mean.min()).nonzero().tolist()] if mean.min() < 0 else []
    return raising, lowering


def test_forward_patching_finds_the_heads(model):
    effects = rim.patch(model, HARMFUL_PROMPTS, HARMLESS_PROMPTS, "heads", METRIC).effects
    assert found(effects) == ([MOVER], list(SUPPRESSORS))


def test_reverse_patching_finds_them_with_the_other_sign(model):
    effects = rim.patch(model, HARMLESS_PROMPTS, HARMFUL_PROMPTS, "heads", METRIC).effects
    assert found(effects) == (list(SUPPRESSORS), [MOVER])


def test_attribution_patching_agrees_on_the_suppressors(model):
    """Their effect is linear. The mover's goes through a neuron that is off, where a gradient sees little."""
    result = rim.attribution_patch(model, HARMFUL_PROMPTS, HARMLESS_PROMPTS, "heads", METRIC)
    assert found(result.effects)[1] == list(SUPPRESSORS)
    assert result.largest_error > 1.0
    reverse = rim.attribution_patch(model, HARMLESS_PROMPTS, HARMFUL_PROMPTS, "heads", METRIC)
    assert found(reverse.effects) == (list(SUPPRESSORS), [MOVER])


def test_patching_every_neuron_finds_the_one(model):
    effects = rim.patch(model, HARMFUL_PROMPTS, HARMLESS_PROMPTS, "neurons", METRIC, units=EVERY_NEURON).effects
    assert [EVERY_NEURON[i] for (i,) in found(effects)[0]] == [NEURON]
    acts = [rim.capture(model, p, "mlp_neurons")["mlp_neurons"] for p in (HARMFUL_PROMPTS, HARMLESS_PROMPTS)]
    assert NEURON in rim.neurons_above(*acts)


def test_the_signal_drops_at_the_last_position(model):
    """It is up from the harmful word on, and what removes it is patched out at that position alone."""
    states = rim.capture(model, HARMFUL_PROMPTS, "resid_post", positions=[-3, -2, -1])["resid_post"]
    last = states[..., -1, REFUSAL]
    # The mover's average thins out with every token, which is the smaller step.
    steps = (last[:, 1:] - last[:, :-1]).mean(0)
    assert steps[1] < 3 * steps[0]
    assert (last[:, 2] - last[:, 1] < -1).all()
    early = rim.patch(model, HARMFUL_PROMPTS, HARMLESS_PROMPTS, "heads", METRIC, positions=-2, layers=[2, 3]).effects
    late = rim.patch(model, HARMFUL_PROMPTS, HARMLESS_PROMPTS, "heads", METRIC, layers=[2, 3]).effects
    assert late.mean(0).min() < -0.5
    assert early.mean(0).abs().max() < 0.05


def test_attention_shows_where_the_suppressors_look(model):
    spans = {"word": rim.find_span(model.tokenizer, HARMFUL_PROMPTS, HARMFUL)}
    mass = rim.attention_to_spans(model, HARMFUL_PROMPTS, spans)
    by_head = mass.to_frame().groupby(["layer", "head"])["estimate"].mean()
    focused = [index for index, value in by_head.items() if value > 0.9]
    assert focused == list(SUPPRESSORS)
    elsewhere = [prompt.removesuffix(LAST) for prompt in HARMFUL_PROMPTS]
    spans = {"word": rim.find_span(model.tokenizer, elsewhere, HARMFUL)}
    assert rim.attention_to_spans(model, elsewhere, spans).to_frame()["estimate"].max() < 0.5


def test_direct_attribution_names_the_writers(model):
    result = rim.direct_logit_attribution(model, HARMFUL_PROMPTS, SORRY, SURE)
    assert found(result.heads)[1] == list(SUPPRESSORS)
    assert found(result.mlp)[0] == [(NEURON[0],)]
    heads = rim.head_contributions(model, HARMFUL_PROMPTS, direction(REFUSAL))
    assert found(heads.heads)[1] == list(SUPPRESSORS)


def test_the_lens_sees_refusal_rise_and_fall(model):
    lens = rim.logit_lens(model, HARMFUL_PROMPTS, [SORRY, SURE])
    gap = (lens.logit[..., 0] - lens.logit[..., 1]).mean(0)  # [layer], the embedding first
    rises = gap[1:] - gap[:-1]
    assert int(rises.argmax()) == NEURON[0]
    assert sorted(rises.argsort()[:2].tolist()) == [layer for layer, _ in SUPPRESSORS]


def test_ablating_the_suppressors_restores_refusal_and_random_heads_do_not(model):
    def refusal():
        return rim.capture(model, HARMFUL_PROMPTS, "resid_post")["resid_post"][:, -1, REFUSAL].mean()

    before = refusal()
    with rim.ablate(model, heads=list(SUPPRESSORS), mode="zero"):
        restored = refusal() - before
    with rim.ablate(model, heads=list(SUPPRESSORS), mode="mean", reference=HARMLESS_PROMPTS):
        held = refusal() - before
    with rim.ablate(model, neurons=[NEURON], mode="zero"):
        removed = refusal() - before
    assert restored > 1
    assert held > 1
    assert removed < -1
    for heads in rim.random_sets(model, [*SUPPRESSORS, MOVER], n_sets=5)[:5]:
        with rim.ablate(model, heads=heads[:2], mode="zero"):
            assert abs(refusal() - before) < 0.1 * restored
    assert refusal() == before


def test_knocking_out_the_look_at_the_word_restores_refusal(model):
    """The word's place differs between prompts, so they are run one by one."""
    for prompt in HARMFUL_PROMPTS[:3]:
        (where,) = rim.find_span(model.tokenizer, [prompt], HARMFUL)

        def refusal(prompt=prompt):
            return rim.capture(model, [prompt], "resid_post")["resid_post"][0, -1, REFUSAL]

        before = refusal()
        with rim.knock_out(model, queries="last", keys=where, layers=[2, 3]):
            cut = refusal() - before
        with rim.knock_out(model, queries="last", keys=where, layers=[1]):
            control = refusal() - before
        assert cut > 1
        assert abs(control) < 0.1


def test_the_direction_is_found_and_steering_along_it_works(model):
    states = [
        rim.capture(model, prompts, "resid_post", positions=-2)["resid_post"]
        for prompts in (HARMFUL_PROMPTS, HARMLESS_PROMPTS)
    ]
    found_direction = rim.difference_in_means(*states)
    assert abs(rim.cosine(found_direction[0], direction(MOVED))) > 0.9
    assert abs(found_direction[1:] @ direction(REFUSAL)).min() > 3 * abs(found_direction[1:] @ direction(SIGNAL)).max()
    with rim.steer(model, direction(SIGNAL), layers=0, coefficient=0.0):
        same = rim.capture(model, HARMLESS_PROMPTS, "resid_post")["resid_post"][:, -1, REFUSAL]
    with rim.steer(model, direction(MOVED), layers=0, coefficient=8.0):
        up = rim.capture(model, HARMLESS_PROMPTS, "resid_post")["resid_post"][:, -1, REFUSAL]
    assert (up - same > 1).all()


def test_safety_neurons_are_the_planted_one(model):
    """Harmless prompts are the originals and harmful ones the rewritten: what rises on them."""
    before = rim.capture(model, HARMLESS_PROMPTS, "mlp_neurons")["mlp_neurons"]
    after = rim.capture(model, HARMFUL_PROMPTS, "mlp_neurons")["mlp_neurons"]
    chosen = rim.safety_neurons(before, [after], share=1 / D_MLP)
    assert chosen.mask[NEURON]
    strongest = abs(torch.as_tensor(chosen.scores)).flatten().argsort(descending=True)
    assert (int(strongest[0]) // D_MLP, int(strongest[0]) % D_MLP) == NEURON
