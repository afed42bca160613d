"""Attribution patching, against finite differences and exact patching."""

import pytest
import torch
from families import load_tiny
from test_patching import CLEAN, SOURCE, direction

import rim_core as rim
from rim_core.errors import InputError
from rim_core.interventions.components import COMPONENTS


def small_step(model, texts, component, share):
    """Activations a small share of the way from the clean prompts' to the sources'."""
    site = COMPONENTS[component]
    ours, theirs = rim.capture(model, CLEAN, site), rim.capture(model, texts, site)
    return rim.Activations((site,), {site: ours[site] + share * (theirs[site] - ours[site])})


@pytest.mark.parametrize(
    ("family", "quantization"), [("llama", "nf4"), ("gpt2", None), ("gemma2", None), ("qwen3_moe", None)]
)
@pytest.mark.parametrize("component", ["heads", "mlp", "attention", "resid"])
def test_it_is_the_limit_of_small_exact_patches(family, quantization, component):
    """Exact patches of a thousandth of the way, times a thousand, are the gradient's own prediction."""
    model = load_tiny(family, quantization)
    metric = rim.Projection(direction(model))
    found = rim.attribution_patch(model, SOURCE, CLEAN, component, metric)
    share = 1e-3
    exact = rim.patch(model, small_step(model, SOURCE, component, share), CLEAN, component, metric).effects / share
    # Float32 rounding of the metric, divided by the share, is the error of this reference.
    noise = 3e-6 * float(found.clean.abs().max()) / share
    assert (found.effects - exact).abs().max() <= 0.03 * exact.abs().max() + noise


def test_where_the_metric_is_linear_in_the_component_it_is_exact():
    model = load_tiny("llama", "nf4")
    metric = rim.Projection(direction(model), layer=1)
    found = rim.attribution_patch(model, SOURCE, CLEAN, "mlp", metric, layers=[1, 2])
    exact = rim.patch(model, SOURCE, CLEAN, "mlp", metric, layers=[1, 2])
    assert torch.allclose(found.effects, exact.effects, atol=1e-4 * float(exact.clean.abs().max()))
    assert not found.effects[:, 1].any()
    assert found.correlation == pytest.approx(1.0, abs=1e-6)
    assert found.largest_error <= 1e-4 * float(exact.clean.abs().max())
    assert torch.allclose(found.clean, exact.clean, atol=1e-5)
    assert torch.allclose(found.source, exact.source, atol=1e-5)


def test_the_correlation_is_that_of_the_sampled_pairs():
    model, metric = load_tiny("llama"), rim.Projection(direction(load_tiny("llama")))
    found = rim.attribution_patch(model, SOURCE, CLEAN, "heads", metric, sample=2, seed=5)
    assert len(found.sample) == 2
    chosen = list(found.sample)
    exact = rim.patch(model, SOURCE, CLEAN, "heads", metric).effects[chosen].flatten()
    wanted = torch.corrcoef(torch.stack([found.effects[chosen].flatten(), exact]))[0, 1]
    assert found.correlation == pytest.approx(float(wanted), abs=1e-5)
    assert found.correlation < 1.0


def test_poor_agreement_is_told():
    model = load_tiny("llama")
    with pytest.warns(UserWarning, match=r"correlate only -?0\.\d+ with the exact ones"):
        rim.attribution_patch(model, SOURCE, CLEAN, "heads", lambda states: states.float().mul(9).sin().sum(-1))


def test_units_and_positions_are_those_of_patch():
    model, metric = load_tiny("qwen3"), rim.Projection(direction(load_tiny("qwen3")))
    units = [(0, 3), [(1, 1), (2, 0)]]
    found = rim.attribution_patch(model, SOURCE, CLEAN, "heads", metric, units=units, positions=[-3, -1])
    alone = rim.attribution_patch(model, SOURCE, CLEAN, "heads", metric, positions=[-3, -1])
    wanted = torch.stack([alone.effects[:, 0, 3], alone.effects[:, 1, 1] + alone.effects[:, 2, 0]], 1)
    assert torch.allclose(found.effects, wanted, atol=1e-5)
    spans = [[-3, -1], [-1], [-2, -1]]
    ragged = rim.attribution_patch(model, SOURCE, CLEAN, "mlp", metric, positions=spans)
    one = rim.attribution_patch(model, SOURCE[1:2], CLEAN[1:2], "mlp", metric, positions=-1)
    assert torch.allclose(ragged.effects[1], one.effects[0], atol=1e-4)


def test_bad_input_gets_one_line():
    model, metric = load_tiny("llama"), rim.Projection(torch.ones(32))
    with pytest.raises(InputError, match="sample must be"):
        rim.attribution_patch(model, SOURCE, CLEAN, "heads", metric, sample=0)
    with pytest.raises(InputError, match="no gradient"):
        rim.attribution_patch(model, SOURCE, CLEAN, "heads", lambda state: state.detach().sum(-1))
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.hf.modules())
    assert hooks == 0
