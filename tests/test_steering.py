"""Steering against plain hooks, and what makes its placebo one."""

import pytest
import torch
from families import load_tiny, reference
from plain import assert_close, generated, greedy, hooked, hooks, length, some, tensors
from tiny import TEXTS

import rim_core as rim
from rim_core.errors import InputError
from rim_core.interventions.controls import random_direction
from rim_core.interventions.steering import steer

SITES = ("resid_pre", "resid_post")
STEPS = 4


def added(shift, places=slice(None)):
    """A change that adds `shift` at these tokens."""

    def change(values):
        edited = values.clone()
        edited[:, places] += shift
        return edited

    return change


@pytest.mark.parametrize(
    ("family", "quantization"),
    [("llama", None), ("llama", "nf4"), ("gpt2", None), ("gemma2", None), ("qwen3_moe", None)],
)
@pytest.mark.parametrize(("site", "positions", "layers"), [("resid_post", "all", 1), ("resid_pre", "last", [0, 2])])
def test_steering_equals_plain_hooks(family, quantization, site, positions, layers):
    """In capture and at each step of generation, in a batch of unequal lengths."""
    model = load_tiny(family, quantization)
    direction = some(model.n_layers, model.d_model)
    with steer(model, direction, layers, coefficient=-1.5, positions=positions, site=site):
        every = rim.capture(model, TEXTS, SITES, positions="all")
        answers, logits = generated(model, TEXTS, STEPS)
    for row, text in enumerate(TEXTS):
        places = slice(None) if positions == "all" else [length(model, text) - 1]
        chosen = [layers] if isinstance(layers, int) else layers
        changes = [(site, layer, added(-1.5 * direction[layer], places)) for layer in chosen]
        with hooked(model, family, changes):
            wanted, _ = reference(model, family, text)
            answer, by_step = greedy(model, text, STEPS)
        for name in SITES:
            assert_close(every[name][row, -length(model, text) :].transpose(0, 1), wanted[name])
        assert answers[row] == answer
        assert_close(logits[row, : len(by_step)], by_step)


def test_one_direction_at_several_layers_and_positions():
    model, direction = load_tiny("llama"), some(32)
    with steer(model, direction, [0, 1], positions=[-1, -3]):
        every = rim.capture(model, TEXTS, "resid_post", positions="all")["resid_post"]
    for row, text in enumerate(TEXTS):
        places = [length(model, text) - 1, length(model, text) - 3]
        changes = [("resid_post", layer, added(direction, places)) for layer in (0, 1)]
        with hooked(model, "llama", changes):
            wanted, _ = reference(model, "llama", text)
        assert_close(every[row, -length(model, text) :].transpose(0, 1), wanted["resid_post"])


def test_a_normalised_direction_has_length_1():
    model, direction = load_tiny("llama"), 7 * some(32)
    plain = rim.capture(model, TEXTS, "resid_post")["resid_post"][:, 2]
    with steer(model, direction, 2, coefficient=3.0, normalise=True):
        moved = rim.capture(model, TEXTS, "resid_post")["resid_post"][:, 2] - plain
    assert_close(moved, (3 * direction / direction.norm()).expand(len(TEXTS), -1))


def test_contexts_nest_and_leave_nothing():
    model, direction = load_tiny("llama"), some(32)

    def once():
        with steer(model, direction, 0), steer(model, direction, 0, coefficient=-1.0):
            return rim.capture(model, TEXTS, "resid_post")["resid_post"]

    plain = rim.capture(model, TEXTS, "resid_post")["resid_post"]
    assert_close(once(), plain)
    before = hooks(model), tensors()
    for _ in range(4):
        once()
    assert hooks(model) == before[0]
    assert tensors() <= before[1] + 2
    with pytest.raises(RuntimeError, match="stop"), steer(model, direction, 0):
        raise RuntimeError("stop")
    assert hooks(model) == before[0]
    assert model.edits == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"site": "head_z"}, "unknown site of steer 'head_z': choose from resid_post, resid_pre"),
        ({"coefficient": float("nan")}, "finite"),
        ({"layers": []}, "layers: none given"),
        ({"layers": [1, 1]}, "each once"),
        ({"layers": 3}, "layers 0 to 2"),
        ({"layers": -1}, "layers 0 to 2"),
        ({"direction": some(31)}, r"shape \[31\]"),
        ({"direction": torch.zeros(32)}, "zero"),
        ({"positions": "first"}, "unknown positions 'first'"),
    ],
)
def test_bad_arguments_get_one_line(arguments, says):
    model = load_tiny("llama")
    with pytest.raises(InputError, match=says), steer(model, **{"direction": some(32), "layers": 0, **arguments}):
        pass
    assert hooks(model) == 0


def test_a_placebo_keeps_lengths_and_angles():
    real = some(5, 32) * torch.tensor([1.0, 10.0, 0.1, 3.0, 2.0])[:, None]
    real[4] = 2 * real[3]
    placebo = random_direction(real, seed=3)
    assert_close(placebo @ placebo.T, real @ real.T)
    assert_close(random_direction(real[1]).norm(), real[1].norm())
    assert random_direction(real[1]).shape == (32,)
    assert random_direction(32).shape == (32,)
    assert_close(random_direction(32).norm(), torch.tensor(1.0))
    assert torch.equal(random_direction(real, seed=3), placebo)
    assert not torch.allclose(random_direction(real, seed=4), placebo, atol=0.1)


def test_a_placebo_points_anywhere():
    """Uniform on the sphere: no mean, and the same spread along every axis, that of `like` included."""
    like = torch.eye(4)[0]
    drawn = torch.stack([random_direction(like, seed=seed) for seed in range(2000)])
    # Standard errors: 0.5 / sqrt(2000) = 0.011 of the mean; 0.25 is the mean square of each coordinate.
    assert drawn.mean(0).abs().max() < 0.05
    assert (drawn.T @ drawn / 2000 - torch.eye(4) / 4).abs().max() < 0.03


def test_no_placebo_for_numbers_that_are_none():
    for wrong in (torch.full((4,), torch.inf), some(2, 2, 2), torch.empty(0)):
        with pytest.raises(InputError, match="finite numbers"):
            random_direction(wrong)
