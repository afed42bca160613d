"""What a user may pass by mistake: each is one line that says what is wrong; and what NumPy gives is taken."""

import errno
import json
import resource

import numpy as np
import pytest
import torch
from tiny import TEXTS

import rim_core as rim
from rim_core import checking, identity
from rim_core.errors import InputError, WeightsError
from rim_core.models.hooks import Edit, editing
from rim_core.suites import checkpoints

HOW, WHY = TEXTS[0], TEXTS[2]
NAN = float("nan")


@pytest.fixture(scope="module")
def model(tiny_folder):
    return rim.load(str(tiny_folder()), quantization=None, device="cpu")


def norm(state):
    return state.float().norm(dim=-1)


def patch(model, components="heads", metric=norm, **options):
    return rim.patch(model, [HOW], [WHY], components, metric, progress=False, **options)


def used(context):
    with context:
        pass


REFUSALS = [
    # Fractions, truth values and texts are no whole numbers.
    (lambda m: used(rim.ablate(m, heads=[(0, 1.5)], mode="zero")), r"heads must be \(layer, head\) pairs of whole"),
    (lambda m: used(rim.ablate(m, heads=[(True, 1)], mode="zero")), "pairs of whole numbers"),
    (lambda m: used(rim.ablate(m, heads=["01"], mode="zero")), "pairs of whole numbers"),
    (lambda m: used(rim.ablate(m, heads=5, mode="zero")), "heads must be a list, not 5"),
    (lambda m: used(rim.ablate(m, neurons=[(0, 1.0)], mode="zero")), "neurons must be"),
    (lambda m: used(rim.ablate(m, heads=[(0, 1)], mode="scale", factor="x")), "factor must be a finite number"),
    (lambda m: used(rim.ablate(m, heads=[(0, 1)], mode="zero", positions=[])), "unknown positions"),
    (lambda m: used(rim.ablate(m, heads=[(0, 1)], mode="zero", positions=[-1.5])), "unknown positions"),
    (lambda m: used(rim.ablate(m, heads=[(0, 1)], mode="zero", positions=[True])), "unknown positions"),
    (lambda m: used(rim.knock_out(m, "last", [-2], layers=[0.5])), "layers: each must be a whole number, not 0.5"),
    (lambda m: used(rim.steer(m, torch.ones(32), layers=[])), "layers: none given"),
    (lambda m: used(rim.steer(m, torch.ones(32), layers=1.5)), "layers must be a list, not 1.5"),
    (lambda m: used(rim.steer(m, torch.ones(32), 1, coefficient=NAN)), "coefficient must be a finite number, not nan"),
    (lambda m: used(rim.steer(m, None, 1)), "direction must be an array of real numbers, not None"),
    (lambda m: used(rim.steer(m, "x", 1)), "direction must be an array of real numbers, not 'x'"),
    (lambda m: used(rim.steer(m, [[1.0], [1.0, 2.0]], 1)), "direction must be an array of real numbers"),
    (lambda m: used(rim.steer(m, {"a": 1}, 1)), "direction must be an array of real numbers"),
    (lambda m: rim.cosine("x", np.ones(3)), "cosine: u must be an array of real numbers, not 'x'"),
    (lambda m: rim.cosine(np.ones(3), None), "cosine: v must be an array of real numbers, not None"),
    (lambda m: rim.cosine(np.ones(3) * 1j, np.ones(3)), "cosine: u must be an array of real"),
    (lambda m: rim.difference_in_means(np.ones((2, 3), int), np.ones((2, 3))), "a is of torch.int64"),
    (lambda m: rim.random_direction(8, seed=-1), "seed must be a whole number of at least 0"),
    (lambda m: rim.random_direction(8, seed=1.5), "seed must be a whole number"),
    (lambda m: rim.random_heads(m, 2.5), "n must be a whole number"),
    (lambda m: rim.random_heads(m, 2, seed=1.5), "seed must be a whole number"),
    # Nothing, or twice the same.
    (lambda m: rim.capture(m, [HOW], []), "no site was named"),
    (lambda m: rim.capture(m, [HOW], ["resid_post", "resid_post"]), "site 'resid_post' stands twice"),
    (lambda m: rim.capture(m, [HOW], [3]), "unknown site 3: choose from"),
    (lambda m: rim.capture(m, [HOW], 3), "sites must be a list, not 3"),
    (lambda m: rim.capture(m, [HOW], "mlp_out", positions=[]), "positions: none given"),
    (lambda m: rim.capture(m, [HOW], "mlp_out", positions=-1.0), "positions must be a list, not -1.0"),
    (lambda m: rim.capture(m, [HOW], "mlp_out", positions=[-1, True]), "each must be a whole number, not True"),
    (lambda m: rim.capture(m, [HOW], "mlp_out", max_tokens=0), "max_tokens must be a whole number of at least 1"),
    (lambda m: rim.logit_lens(m, [HOW], ["a"], positions=[]), "positions: none given"),
    (lambda m: rim.logit_lens(m, [HOW], [3.5]), "no token 3.5"),
    (lambda m: rim.generate(m, [HOW], max_new_tokens=1.5), "max_new_tokens must be a whole number"),
    (lambda m: patch(m, units=[[]]), "a unit is empty"),
    (lambda m: patch(m, units=[]), "units is empty"),
    (lambda m: patch(m, units=[5]), "must be a list, not 5"),
    (lambda m: patch(m, units=[(0, 1.5)]), r"heads must be \(layer, head\) pairs of whole numbers"),
    (lambda m: patch(m, units=[(0,)]), r"heads must be \(layer, head\) pairs"),
    (lambda m: patch(m, positions=[]), "positions: none given"),
    (lambda m: patch(m, positions=[[]]), "positions, text 0: none given"),
    (lambda m: patch(m, positions=[-1.5]), "positions, text 0 must be a list|each must be a whole number"),
    (lambda m: patch(m, layers=[]), "layers: none given"),
    (lambda m: patch(m, layers=[0.5]), "layers: each must be a whole number"),
    (lambda m: patch(m, max_tokens=2.5), "max_tokens must be a whole number"),
    (lambda m: rim.attribution_patch(m, [HOW], [WHY], "mlp", norm, sample=1.5), "sample must be a whole number"),
    # A metric that gives something else than one number a state.
    (lambda m: patch(m, metric=lambda state: state), r"the metric <lambda> maps final states .*\[1, .*32\].* to shape"),
    (lambda m: patch(m, metric=lambda state: 1.0), "to float: it must give a tensor"),
    (lambda m: patch(m, metric=lambda state: state.sum()), "logits give rim.LogitMetric.* to shape"),
    # A function that fails, or that is meant for something else.
    (
        lambda m: patch(m, metric=lambda s: s[..., 99]),
        r"<lambda> fails on final states .*LogitMetric\(fn\)\): IndexErr",
    ),
    (
        lambda m: patch(m, metric=rim.LogitMetric(lambda x: x @ x)),
        r"fails on logits \[rows, vocab\], here .*RuntimeError",
    ),
    (lambda m: rim.LogitMetric("entropy"), "LogitMetric: give a function of logits .*, not 'entropy'"),
    (lambda m: patch(m, metric=rim.RefusalLogOdds), r"give rim.RefusalLogOdds\(...\), an instance"),
    (lambda m: rim.against_random(m, [(0, 1)], rim.RefusalLogOdds()), "measure must be a function of the model"),
    (lambda m: rim.against_random(m, [(0, 1)], lambda: 0.0), "measure must be a function of the model"),
    (lambda m: used(editing(m, norm)), r"editing: give Edit\(site, layer, function\), .* rim.edit\(model, function"),
    (lambda m: used(editing(m, 5)), "editing: edits must be a list, not 5"),
    (lambda m: used(editing(m, Edit("resid_post", 1, 2.0))), r"editing: give Edit\(site, layer, function\)"),
    (lambda m: used(rim.ablate(m, heads=(3, 1))), r"heads must be \(layer, head\) pairs .*, not \(3, 1\)"),
    (lambda m: rim.logit_lens(m, [HOW], layers="all"), "layers must be whole numbers, not 'all'; None is all layers"),
    (lambda m: m.checked_layer("last"), "layer must be a whole number, not 'last'"),
    # Numbers that are none must not pass into a result.
    (lambda m: patch(m, metric=lambda state: norm(state) * NAN), "the metric of the destination runs, pair 0: 1 of 1"),
]


@pytest.mark.parametrize(("call", "words"), REFUSALS)
def test_a_mistake_is_one_line(model, call, words):
    with pytest.raises(InputError, match=words) as caught:
        call(model)
    assert "\n" not in str(caught.value)
    assert model.edits == []


def test_activations_that_are_no_numbers_are_refused_by_site_and_layer(model, tmp_path):
    broken = Edit("mlp_out", 1, lambda values, _: values * NAN)
    with editing(model, [broken]):
        with pytest.raises(InputError, match=r"capture: mlp_out, layer 1: \d+ of \d+ numbers are NaN"):
            rim.capture(model, [HOW, WHY], ["mlp_out"], positions="all")
        with pytest.raises(InputError, match="capture: resid_post, layer 1"):
            rim.capture(model, [HOW], "resid_post", to=tmp_path / "kept")
        with pytest.raises(InputError, match="the metric of the destination runs"):
            patch(model)
    assert list(tmp_path.iterdir()) == []


def test_what_numpy_gives_is_taken(model):
    plain = rim.capture(model, [HOW, WHY], "mlp_out", positions=[-1, -2])["mlp_out"]
    for positions in (np.array([-1, -2]), [np.int64(-1), np.int32(-2)], torch.tensor([-1, -2])):
        assert torch.equal(rim.capture(model, [HOW, WHY], "mlp_out", positions=positions)["mlp_out"], plain)
    one = rim.capture(model, [HOW], "mlp_out", positions=np.int64(-2))["mlp_out"]
    assert torch.equal(one, rim.capture(model, [HOW], "mlp_out", positions=-2)["mlp_out"])
    units = patch(model, units=np.array([[0, 1], [2, 3]]), positions=np.int64(-1))
    assert units.units == ((0, 1), (2, 3))
    assert torch.equal(units.effects, patch(model, units=[(0, 1), (2, 3)], positions=-1).effects)
    joint = patch(model, units=[[(np.int64(0), np.int64(1)), (2, 3)]], positions=[[np.int64(-1)]])
    assert joint.units == (((0, 1), (2, 3)),)
    assert patch(model, "mlp", layers=np.arange(2)).layers == (0, 1)
    with rim.ablate(model, heads=np.array([[0, 1]]), mode="zero", positions=np.array([-1])):
        ablated = rim.capture(model, [HOW], "head_z")["head_z"]
    assert not ablated[0, 0, 1].any()
    with rim.steer(model, torch.ones(32), layers=np.int64(1), positions=np.int64(-1)):
        pass
    assert rim.random_heads(model, np.int64(2), seed=np.int64(0)) == rim.random_heads(model, 2)


def test_a_full_disk_leaves_one_line_and_nothing_half_written(model, tmp_path, monkeypatch):
    """Files may not grow beyond a few bytes, which is how a full disk shows itself to safetensors."""
    monkeypatch.setenv("RIM_CACHE", str(tmp_path))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (512, hard))
    try:
        with pytest.raises(InputError, match=r"cannot write .*activations.*File too large") as caught:
            rim.capture(model, [HOW, WHY], "resid_post", cache=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    kept = rim.capture(model, [HOW, WHY], "resid_post", cache=True)["resid_post"]
    assert torch.equal(kept, rim.capture(model, [HOW, WHY], "resid_post")["resid_post"])
    assert errno.EFBIG


CHECKS = [
    (lambda: checking.whole(2.0, "n"), "n must be a whole number, not 2.0"),
    (lambda: checking.whole("3", "n", 1, 9), "n must be a whole number from 1 to 9, not '3'"),
    (lambda: checking.whole(np.array([3]), "n"), "not array"),
    (lambda: checking.whole(torch.tensor(True), "n"), "n must be a whole number"),
    (lambda: checking.whole_numbers([1, 1], "n", distinct=True), "n: 1 stands twice"),
    (lambda: checking.whole_numbers("12", "n"), "n must be a list, not '12'"),
    (lambda: checking.seeds([0, 0, 0]), "seeds: 0 stands twice"),
    (lambda: checking.seeds([1, 1.5]), "each must be a whole number of at least 0, not 1.5"),
    (lambda: checking.seeds([]), "seeds: none given"),
    (lambda: checking.one_of([], ("a", "b"), "mode"), r"unknown mode \[\]: choose from a, b"),
    (lambda: checking.number(True, "x"), "x must be a finite number, not True"),
    (lambda: checking.number(np.complex128(1), "x"), "x must be a finite number"),
    (lambda: json.loads('{"a": {"b": 1, "b": 2}}', object_pairs_hook=checking.distinct_keys), "^'b'$"),
    (lambda: checking.number(1, "x", above=0, below=1), "above 0 and below 1, not 1"),
    (
        lambda: checking.finite(np.array([[1, NAN]]), "x", 1, "layer"),
        "x, layer 1: 1 of 2 .* a function or an edit, or a model in 16 bits",
    ),
    (lambda: checking.finite(torch.tensor([1.0, torch.inf]), "x"), "x: 1 of 2 numbers are NaN or infinite"),
]


@pytest.mark.parametrize(("call", "words"), CHECKS)
def test_the_checks_themselves(call, words):
    with pytest.raises((InputError, checking.TwiceError), match=words):
        call()


def test_json_nested_without_end_is_one_line(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}")
    with pytest.raises(InputError, match=r"config\.json is not readable JSON") as caught:
        checkpoints.read_json(path)
    assert "\n" not in str(caught.value)
    length = path.stat().st_size.to_bytes(8, "little")
    (tmp_path / "model.safetensors").write_bytes(length + path.read_bytes())
    with pytest.raises(WeightsError, match="is damaged or cut short"):
        checkpoints.read_shapes(tmp_path / "model.safetensors")
    for depth in (100_000, *range(960, 1000)):  # also what can just be read, and not be written again
        path.write_text("[" * depth + "]" * depth)
        assert len(identity.checkpoint_identity(tmp_path)) == 64


def test_checks_give_plain_numbers_back():
    assert [checking.whole(x, "n") for x in (3, np.int8(3), np.array(3), torch.tensor(3))] == [3] * 4
    assert checking.whole_numbers(range(2), "n") == checking.whole_numbers(np.arange(2), "n") == [0, 1]
    assert checking.number(np.float32(0.5), "x") == 0.5
    huge = np.full(4, 3e38, dtype=np.float32)  # finite, though their sum is not
    assert checking.finite(huge, "x") is huge
