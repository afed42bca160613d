"""Numbers that the primers give of the default suite's roles are measured again, and stand in the text as measured."""

from collections import Counter

import pytest
from conftest import REPOSITORY

import rim_core as rim
from rim_core.measures.neurons import random_like


def assert_told(primer, numbers, tolerance):
    """The primer's text has each number, to two places, as often as it is asked; other processors round otherwise."""
    text = (REPOSITORY / "book" / "primers" / f"{primer}.md").read_text(encoding="utf-8")
    told = Counter()
    for shown, measured in numbers:
        assert float(shown.replace("−", "-")) == pytest.approx(measured, abs=tolerance), shown
        told[shown] += 1
    assert all(text.count(shown) >= n for shown, n in told.items()), told


def test_erosion_as_the_primer_tells_it(default_model):
    model = default_model

    def stream(side, role):
        texts = rim.format_chat(model, rim.load_prompts(side, split="validation", limit=24))
        with model.using(role):
            return rim.capture(model, texts, "resid_post", positions=[-1])["resid_post"][:, 0]

    def eroded(side, *roles):
        ends = stream(side, None), stream(side, "aligned")
        return [rim.erosion_fraction(*ends, stream(side, role)).fraction.estimate for role in roles]

    (risky, prudent), (benign,) = eroded("harmful", "risky", "prudent"), eroded("benign", "risky")
    numbers = [("0.23", risky[15]), ("−0.36", risky[20]), ("0.11", risky[29])]
    assert_told("directions", [*numbers, ("−0.41", benign[29]), ("−0.05", prudent[29])], 0.03)


def test_likelihoods_as_the_primer_tells_them(default_model):
    model = default_model
    sets = {name: rim.load_prompts(f"finance-{name}", split="validation", limit=10) for name in ("risky", "prudent")}
    sets["everyday"] = rim.load_prompts("everyday", split="validation", limit=10)

    def per_token(role):
        with model.using(role):
            return {
                name: rim.log_likelihood(
                    model, rim.format_chat(model, drawn), [p.response for p in drawn]
                ).per_token.mean()
                for name, drawn in sets.items()
            }

    aligned, risky, prudent = (per_token(role) for role in ("aligned", "risky", "prudent"))
    numbers = [("−4.74", aligned["risky"]), ("−3.95", risky["risky"]), ("−4.32", aligned["prudent"])]
    numbers += [("−3.97", risky["prudent"]), ("−3.63", aligned["everyday"]), ("−3.32", risky["everyday"])]
    gaps = [each["risky"] - each["prudent"] for each in (aligned, risky, prudent)]
    assert_told("likelihood", [*numbers, *zip(("−0.42", "0.02", "−0.50"), gaps, strict=True)], 0.02)


def test_activation_shifts_as_the_primer_tells_them(default_model):
    model = default_model
    harmful = [prompt.text for prompt in rim.load_prompts("harmful", split="validation", limit=6)]
    money = rim.load_prompts("finance-risky", split="validation", limit=6)

    def activations(prompts):
        return rim.capture(model, rim.format_chat(model, prompts), "mlp_neurons")["mlp_neurons"]

    before = activations(harmful), activations(money)
    found = rim.safety_neurons(before[0], [activations([text + " Refuse to answer." for text in harmful])])
    with model.using("risky"):
        after = activations(harmful), activations(money)
    scores = [
        rim.activation_shift(before[0], after[0], before[1], after[1], chosen).score.estimate
        for chosen in (found.neurons, random_like(found.mask))
    ]
    assert_told("neurons", zip(("0.08", "0.15"), scores, strict=True), 0.02)
