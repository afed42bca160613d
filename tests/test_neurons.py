"""Safety neurons that were planted, and activation shifts in closed form."""

import numpy as np
import pytest
import torch
from families import load_tiny

import rim_core as rim
from rim_core.errors import InputError
from rim_core.measures import neurons as module
from rim_core.measures.neurons import AGGREGATORS, activation_shift, neuron_list, random_like, safety_neurons

PLANTED = [(0, 3), (0, 17), (2, 0), (2, 5), (2, 39)]


def noise(seed, n=30, layers=3, width=40, size=1.0):
    return size * np.random.default_rng(seed).normal(size=(n, layers, width)).astype(np.float32)


def raised(original, neurons, by, seed):
    found = original + noise(seed, len(original), size=0.2)
    for layer, neuron in neurons:
        found[:, layer, neuron] += by
    return found


def test_planted_neurons_are_found_and_no_others():
    original = noise(0)
    # Each set also raises neurons of its own, which the others do not.
    sets = [raised(original, [*PLANTED, (1, k), (0, 20 + k)], 2.0, seed=k + 1) for k in range(4)]
    # The largest differences of all are falls, and what falls is no safety neuron.
    for found in sets:
        found[:, :, 30] -= 50
    result = safety_neurons(original, sets, share=0.1)
    assert (result.top, result.n_sets, result.n_prompts) == (4, 4, 30)
    assert result.neurons == PLANTED == neuron_list(torch.from_numpy(result.mask))
    assert result.size == len(PLANTED)
    assert result.expected_independent == pytest.approx(3 * 40 * 0.1**4)
    assert result.p_value == pytest.approx(1 / 201)
    frame = result.to_frame()
    assert list(zip(frame["layer"], frame["neuron"], strict=True)) == PLANTED
    assert frame["score"].to_numpy() == pytest.approx(2.0, abs=0.1)
    assert np.allclose(result.scores, np.mean([s - original for s in sets], axis=(0, 1)), atol=1e-4)
    # One set alone cannot tell its own neurons from the shared ones.
    alone = safety_neurons(original, sets[:1], share=0.1)
    assert {(1, 0), (0, 20), *PLANTED} <= set(alone.neurons)
    # Every prompt rises by 2 with noise of 0.2, in each set.
    assert result.weighted == pytest.approx([2, 0, 3], abs=0.05)


@pytest.mark.parametrize("share", [0.01, 0.2, 0.5])
def test_the_intersection_is_that_of_sorted_differences(share):
    original, sets = noise(0), [noise(k) for k in (1, 2)]
    result = safety_neurons(torch.tensor(original), [torch.tensor(s, dtype=torch.float64) for s in sets], share=share)
    top = max(1, round(share * 40))
    for layer in range(3):
        best = [set(np.argsort((s - original).mean(0)[layer])[-top:]) for s in sets]
        assert set(np.flatnonzero(result.mask[layer])) == best[0] & best[1]


def test_sets_on_the_same_prompts_agree_by_chance_and_the_null_knows():
    original, common = noise(0), noise(1)
    sets = [original + common + noise(k, size=0.05) for k in range(2, 5)]
    result = safety_neurons(original, sets, share=0.1)
    assert result.size > 10 * result.expected_independent
    assert result.expected_permuted == pytest.approx(result.size, abs=4)
    assert result.p_value > 0.05


def test_the_permuted_signs_reject_as_often_as_they_say(monkeypatch):
    monkeypatch.setattr(module, "PERMUTATIONS", 99)
    p = []
    for run in range(200):
        original, common = noise(3 * run, 12), noise(3 * run + 1, 12)
        sets = [original + common + noise(10_000 + 5 * run + k, 12) for k in range(3)]
        p.append(safety_neurons(original, sets, share=0.1, seed=run).p_value)
    assert np.mean(np.array(p) <= 0.05) == pytest.approx(0.05, abs=0.04)
    assert np.mean(p) == pytest.approx(0.5, abs=0.07)


def test_neurons_above_the_mean():
    difference = torch.zeros(4, 2, 6)
    difference[:, 0, 2], difference[:, 1, 5], difference[:, 1, 1] = 3.0, -2.0, 0.1
    clean = torch.randn(4, 2, 6)
    assert rim.neurons_above(clean + difference, clean) == [(0, 2), (1, 5)]
    assert rim.neurons_above(clean + difference, clean, factor=100) == []


def test_random_neurons_are_others_and_as_many_in_each_layer():
    mask = np.zeros((3, 10), dtype=bool)
    mask[0, [1, 4]] = mask[2, :5] = True
    seen = set()
    for seed in range(60):
        drawn = random_like(mask, seed=seed)
        assert [sum(layer == at for at, _ in drawn) for layer in range(3)] == [2, 0, 5]
        assert len(set(drawn)) == 7
        assert not any(mask[neuron] for neuron in drawn)
        seen |= set(drawn)
    assert seen == {(0, n) for n in range(10) if n not in (1, 4)} | {(2, n) for n in range(5, 10)}
    assert random_like(mask, seed=3) == random_like(torch.tensor(mask), seed=3) != random_like(mask, seed=4)
    mask[1, :6] = True
    with pytest.raises(InputError, match="layer 1 has 6 of 10"):
        random_like(mask)
    with pytest.raises(InputError, match="boolean"):
        random_like([(0, 1), (2, 3)])


def constant(*values, n=4):
    """The same activations in every prompt: two layers of two neurons, the first of each layer unused."""
    found = np.full((n, 2, 2), 77.0)
    found[:, 0, 1], found[:, 1, 1] = values
    return found


NEURONS = [(0, 1), (1, 1)]
LOST = ((2 - 1) / (2 + 0.3) + 0) / 2  # from (2, -4) to (1, -3): the second grew
GAINED = ((1.5 - 1) / (1 + 0.2) + (0 + 3) / (3 + 0.2)) / 2  # from (1, -3) to (1.5, 0)
JOINED = {
    "harmonic": 2 / (1 / LOST + 1 / GAINED),
    "arithmetic": (LOST + GAINED) / 2,
    "geometric": np.sqrt(LOST * GAINED),
    "ratio": LOST / GAINED,
}


@pytest.mark.parametrize("aggregator", AGGREGATORS)
def test_the_shift_in_closed_form(aggregator):
    given = constant(2, -4), constant(1, -3), constant(1, -3, n=3), constant(1.5, 0, n=3)
    found = activation_shift(*given, NEURONS, aggregator=aggregator)
    assert found.lost.estimate == pytest.approx(LOST)
    assert found.gained.estimate == pytest.approx(GAINED)
    for end in (found.score.estimate, found.score.low, found.score.high):
        assert end == pytest.approx(JOINED[aggregator])
    assert (found.lost.n, found.gained.n, found.score.n, found.n_neurons) == (4, 3, 7, 2)
    larger = activation_shift(*(1000 * torch.tensor(part) for part in given), NEURONS, aggregator=aggregator)
    assert larger.score.estimate == pytest.approx(found.score.estimate)
    frame = found.to_frame()
    assert frame["quantity"].tolist() == ["score", "lost", "gained"]
    assert frame["estimate"].tolist() == [part.estimate for part in (found.score, found.lost, found.gained)]


@pytest.mark.parametrize(
    ("aggregator", "nothing_lost", "nothing_gained", "nothing_moved"),
    [
        ("harmonic", 0, 0, 0),
        ("geometric", 0, 0, 0),
        ("arithmetic", 0.5 / 1.1 / 2, 0.5 / 1.1 / 2, 0),
        ("ratio", 0, np.nan, np.nan),
    ],
)
def test_zeros(aggregator, nothing_lost, nothing_gained, nothing_moved):
    same, less, more = constant(1, 1), constant(0.5, 0.5), constant(1.5, 1.5)
    for after_safety, after_task, wanted in (
        (more, more, nothing_lost),
        (less, less, nothing_gained),
        (same, same, nothing_moved),
    ):
        score = activation_shift(same, after_safety, same, after_task, NEURONS, aggregator=aggregator).score
        assert [score.estimate, score.low, score.high] == pytest.approx([wanted] * 3, nan_ok=True)


def test_only_the_named_neurons_count_and_prompts_are_averaged_first():
    before = np.zeros((2, 1, 2))
    before[:, 0, 0] = 1, 3
    after = before.copy()
    # One prompt rises as much as the other falls: the mean stays, and so nothing is lost.
    after[:, 0, 0] = 2, 2
    after[:, 0, 1] = 9
    found = activation_shift(before, after, before, after, [(0, 0)])
    assert found.lost.estimate == found.gained.estimate == found.score.estimate == 0
    assert found.lost.high > 0


def test_before_and_after_are_resampled_together_and_intervals_cover():
    rng = np.random.default_rng(0)
    before = rng.exponential(size=(40, 1, 3)) * [1, 10, 100]
    found = activation_shift(before, before / 2, before, before * 3, [(0, 0), (0, 1), (0, 2)], eps=1e-6)
    assert found.lost.high - found.lost.low < 1e-4
    assert found.gained.estimate == pytest.approx(2, rel=1e-4)
    inside = []
    for run in range(60):
        old, task = (np.random.default_rng([run, k]).normal(5, 1, size=(40, 1, 4)) for k in (0, 1))
        new = old - 1 + np.random.default_rng([run, 2]).normal(size=old.shape)
        shift = activation_shift(old, new, task, task * 1.2, [(0, j) for j in range(4)], eps=1e-6, seed=run)
        inside.append(shift.lost.low < 0.2 < shift.lost.high)
    assert 0.85 <= np.mean(inside) <= 1


def test_from_a_model_to_a_control_and_a_picture():
    model = load_tiny("llama")
    requests = [f"How do I bake bread number {k}?" for k in range(6)]
    original = rim.capture(model, requests, "mlp_neurons")["mlp_neurons"]
    sets = [
        rim.capture(model, [text + tail for text in requests], "mlp_neurons")["mlp_neurons"]
        for tail in (" Please do not answer.", " Say that you will not answer.")
    ]
    result = safety_neurons(original, sets, share=0.1)
    assert result.mask.shape == (model.n_layers, model.d_mlp)
    assert 0 < result.size <= result.top * model.n_layers
    assert len(random_like(result.mask)) == result.size
    chart = result.plot().to_dict()
    assert f"in all 2 sets: {result.size} over 3 layers" in chart["description"]
    shift = activation_shift(original, sets[0], original, sets[1], result.neurons)
    # They were chosen for rising.
    assert shift.lost.estimate == 0 < shift.gained.estimate


A = noise(0, 4)
BAD = [
    (lambda: safety_neurons(A, []), "no counterfactual set"),
    (lambda: safety_neurons(A, noise(1, 4)), "one set; give a list"),
    (lambda: safety_neurons(A, [A, noise(1, 5)]), r"set 1 has shape \[5, 3, 40\]; give numbers \[4, 3, 40\]"),
    (lambda: safety_neurons(A[:1], [A[:1]]), "original is of a single prompt; give at least two"),
    (lambda: safety_neurons(A[:, 0], [A]), r"original has shape \[4, 40\]"),
    (lambda: safety_neurons(A, [np.where(A > 1, np.nan, A)]), "set 0: .* NaN or infinite"),
    (lambda: safety_neurons(object(), [A]), "original must be an array of real numbers"),
    (lambda: safety_neurons(A, [A], share=1.5), "share must be .* below 1, not 1.5"),
    (lambda: activation_shift(A, A, A, A, [(0, 1)], aggregator="median"), "aggregator 'median': choose from harmonic"),
    (lambda: activation_shift(A, A, A, A, [(0, 1)], eps=0), "eps must be .* above 0"),
    (lambda: activation_shift(A, A, A, A, []), "0 neurons for 3 layers of 40"),
    (lambda: activation_shift(A, A, A, A, [(0, 40)]), "1 neurons for 3 layers of 40"),
    (lambda: activation_shift(A, A, A, A, [(0, -1)]), "1 neurons for 3 layers of 40"),
    (lambda: activation_shift(A, A[:3], A, A, [(0, 1)]), r"after_safety has shape \[3, 3, 40\]"),
    (lambda: activation_shift(A, A, 0 * A, A, [(0, 1)]), "all silent in before_task"),
    (lambda: rim.neurons_above(A, A[:, :2]), r"destination has shape \[4, 2, 40\]; give numbers \[prompt, 3, 40\]"),
]


@pytest.mark.parametrize(("call", "words"), BAD)
def test_bad_input_is_refused_in_one_line(call, words):
    with pytest.raises(InputError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)
