"""`rim_core.measures.probes` against plain scikit-learn, planted signals and the leaks it is there to prevent."""

from types import SimpleNamespace

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import rim_core.measures.probes as probes_module
from rim_core import stats
from rim_core.errors import InputError
from rim_core.measures.probes import adjacent_similarity, probe_layers


def noise(n=120, layers=3, d=200, seed=0):
    """Features of uneven scale and offset, so that forgetting to standardise shows."""
    rng = np.random.default_rng(seed)
    scale, offset = rng.uniform(0.1, 20, d), rng.normal(0, 5, d)
    return (offset + scale * rng.normal(size=(n, layers, d))).astype(np.float32)


def alternating(n):
    return np.arange(n) % 2


def plant(features, labels, layers, strength=2.0, width=10):
    """Shift the first `width` features of the given layers by the label, in units of their spread."""
    planted = features.copy()
    spread = features[..., :width].std(axis=0)
    for layer in layers:
        planted[:, layer, :width] += strength * (labels[:, None] - 0.5) * spread[layer]
    return planted


@pytest.mark.parametrize(("n", "d", "C"), [(120, 300, 1.0), (120, 300, 0.01), (120, 30, 1.0), (60, 61, 100.0)])
def test_equals_plain_scikit_learn_on_the_raw_features(n, d, C):
    labels = (np.arange(n) % 3 == 0).astype(int)
    features = plant(noise(n, 2, d), labels, layers=[1], strength=1.0)
    result = probe_layers(features, labels, C=C, seed=4)
    for layer in range(2):
        plain = make_pipeline(StandardScaler(), LogisticRegression(C=C, solver="lbfgs", tol=1e-9, max_iter=20_000))
        raw = features[:, layer].astype(np.float64)
        plain.fit(raw[result.train], labels[result.train])
        expected = plain.decision_function(raw[result.test])
        size = np.abs(expected).max()
        assert np.abs(result.decision_values[layer] - expected).max() < 1e-4 * size
        assert result.accuracy[layer] == plain.score(raw[result.test], labels[result.test])
        # The weights in the space of the raw features give the same decisions.
        unscaled = raw[result.test] @ result.weights[layer].astype(np.float64) + result.bias[layer]
        assert np.abs(unscaled - expected).max() < 2e-4 * size
    assert result.weights.dtype == np.float32
    assert result.converged.all()


def test_planted_signal_is_found_in_the_planted_layers_only():
    labels = alternating(200)
    result = probe_layers(plant(noise(200, 6), labels, layers=[2, 3]), labels)
    assert (result.accuracy[[2, 3]] > 0.85).all()
    assert (result.low[[2, 3]] > 0.5).all()
    assert (result.accuracy[[0, 1, 4, 5]] < 0.7).all()
    weight = np.abs(result.weights * noise(200, 6).std(axis=0))
    assert weight[2, :10].mean() > 3 * weight[2, 10:].mean()


def test_controls_are_at_chance_where_the_probe_is_not():
    labels = alternating(200)
    result = probe_layers(plant(noise(200, 8), labels, layers=range(8)), labels)
    assert result.accuracy.mean() > 0.85
    for name in ("shuffled", "random_features"):
        control = result.controls[name]
        assert 0.4 < control.accuracy.mean() < 0.6, name
        assert ((control.low < 0.5) & (control.high > 0.5)).mean() > 0.7, name
    assert sorted(result.controls["shuffled"].test_labels) == sorted(labels[result.test])


def test_random_features_control_differs_between_layers():
    labels = alternating(60)
    control = probe_layers(noise(60, 3, 80), labels, controls=("random_features",)).controls["random_features"]
    assert not np.allclose(control.decision_values[0], control.decision_values[1])


def confounded_topics(n_groups=60, size=6, layers=8, d=100):
    """Features that hold a topic and nothing else, where each topic has one label."""
    rng = np.random.default_rng(5)
    groups = np.repeat(np.arange(n_groups), size)
    labels = rng.permutation(np.arange(n_groups) % 2)[groups]
    topic = rng.normal(size=(n_groups, layers, d))
    return topic[groups] + 0.1 * rng.normal(size=(groups.size, layers, d)), labels, groups


def test_a_leaked_topic_looks_perfect_until_topics_are_held_out():
    features, labels, groups = confounded_topics()
    leaky = probe_layers(features, labels)
    sound = probe_layers(features, labels, groups)
    assert leaky.accuracy.min() > 0.95
    assert 0.38 < sound.accuracy.mean() < 0.62
    assert ((sound.low < 0.5) & (sound.high > 0.5)).mean() > 0.7
    # Six prompts of a topic are no six witnesses: by prompt the interval would be too narrow.
    by_prompt = [stats.proportion(round(a * sound.n_test), sound.n_test) for a in sound.accuracy]
    assert (sound.high - sound.low).mean() > 1.5 * np.mean([i.high - i.low for i in by_prompt])


@pytest.mark.parametrize("seed", range(5))
def test_no_group_and_no_prompt_is_on_both_sides(seed):
    rng = np.random.default_rng(seed)
    groups = np.array([f"topic {i}" for i in rng.integers(0, 12, 150)])
    labels = rng.integers(0, 2, 150)
    result = probe_layers(noise(150, 1, 20), labels, groups, controls=(), seed=seed)
    assert not set(groups[result.train]) & set(groups[result.test])
    assert sorted([*result.train, *result.test]) == list(range(150))
    assert set(labels[result.train]) == set(labels[result.test]) == {0, 1}
    assert 0.15 < result.n_test / 150 < 0.45
    assert len(set(result.test_groups)) == len(set(groups[result.test]))


@pytest.mark.parametrize("groups", [None, np.arange(150) // 10])
def test_seed_decides_the_split_and_everything_else(groups):
    labels = alternating(150)
    features = noise(150, 2, 50)
    first, again, other = (probe_layers(features, labels, groups, seed=seed) for seed in (1, 1, 2))
    assert first.to_frame().equals(again.to_frame())
    assert set(first.test) != set(other.test)


def test_plain_split_is_70_30_and_stratified():
    labels = (np.arange(200) < 50).astype(int)
    result = probe_layers(noise(200, 1, 20), labels, controls=())
    assert (result.n_train, result.n_test) == (140, 60)
    assert labels[result.test].sum() == 15
    assert result.test_groups is None


def test_nothing_is_learned_from_test_prompts():
    labels = alternating(100)
    features = noise(100, 2, 150)
    result = probe_layers(features, labels)
    spoiled = features.copy()
    spoiled[result.test] = 1e6
    again = probe_layers(spoiled, labels)
    assert np.array_equal(result.test, again.test)
    assert np.array_equal(result.weights, again.weights)
    assert np.array_equal(result.bias, again.bias)


def test_imbalanced_labels_state_the_majority_baseline():
    labels = (np.arange(200) < 40).astype(int)
    result = probe_layers(noise(200, 4, 100), labels)
    assert result.majority == pytest.approx(0.8)
    # Without the baseline, 70 % correct on noise would pass for signal.
    assert 0.5 < result.accuracy.mean() < result.majority + 0.05
    assert probe_layers(noise(200, 1, 100), 1 - labels).majority == pytest.approx(0.8)


def test_constant_features_do_not_break_and_get_no_weight():
    labels = alternating(100)
    features = plant(noise(100, 3), labels, layers=[0, 1])
    features[:, 1, 50:60] = 7.25
    features[:, 2] = 3.1
    result = probe_layers(features, labels)
    assert result.accuracy[1] > 0.8
    assert (result.weights[1, 50:60] == 0).all()
    assert result.accuracy[2] == 0.5
    assert (result.weights[2] == 0).all()
    assert np.isfinite(result.to_frame()[["accuracy", "low", "high"]]).all(axis=None)
    similarity = adjacent_similarity(result)
    assert np.isnan(similarity.measures["own_basis_cosine"]["probe"].value[1])
    assert np.isnan(similarity.measures["decision_correlation"]["probe"].value[1])


def test_intervals_without_groups_are_clopper_pearson():
    labels = alternating(100)
    result = probe_layers(plant(noise(100, 2), labels, layers=[1]), labels, controls=())
    for layer in range(2):
        exact = stats.proportion(round(result.accuracy[layer] * 30), 30)
        assert (result.low[layer], result.high[layer]) == (exact.low, exact.high)
    assert result.interval_method == "Clopper-Pearson"


def test_a_perfect_score_by_group_still_has_an_interval():
    labels = alternating(120)
    features = plant(noise(120, 1), labels, layers=[0], strength=30)
    result = probe_layers(features, labels, groups=np.arange(120) // 10)
    assert result.accuracy[0] == result.high[0] == 1
    assert result.low[0] == stats.proportion(result.n_test, result.n_test).low


def test_unfinished_fits_are_recorded():
    labels = alternating(100)
    features = plant(noise(100, 2), labels, layers=[0])
    result = probe_layers(features, labels, max_iter=1)
    assert not result.converged.any()
    assert not result.controls["shuffled"].converged.any()
    assert not result.to_frame()["converged"].any()


def test_frame_is_tidy():
    frame = probe_layers(noise(60, 3, 20), alternating(60)).to_frame()
    assert list(frame) == ["layer", "series", "accuracy", "low", "high", "converged"]
    assert frame.groupby("series")["layer"].apply(list).to_dict() == {
        "probe": [0, 1, 2],
        "shuffled": [0, 1, 2],
        "random_features": [0, 1, 2],
    }
    assert ((frame["low"] <= frame["accuracy"]) & (frame["accuracy"] <= frame["high"])).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_tensors_are_taken_as_they_come(dtype):
    torch = pytest.importorskip("torch")
    features = torch.tensor(noise(60, 2, 30)).to(getattr(torch, dtype)).requires_grad_()
    labels = torch.tensor(alternating(60))
    result = probe_layers(features, labels, groups=torch.arange(60) // 5)
    plain = probe_layers(features.detach().float().numpy(), alternating(60), groups=np.arange(60) // 5)
    assert np.array_equal(result.accuracy, plain.accuracy)
    assert np.array_equal(result.weights, plain.weights)


def with_value(value):
    features = noise(40, 3, 10)
    features[7, 2, 4] = value
    return features


BAD_CALLS = [
    (lambda: probe_layers(with_value(np.nan), alternating(40)), "layer 2, first for prompt 7"),
    (lambda: probe_layers(with_value(np.inf), alternating(40)), "layer 2, first for prompt 7"),
    (lambda: probe_layers(noise(40)[:, 0], alternating(40)), r"\(40, 200\)"),
    (lambda: probe_layers(noise(40)[..., None], alternating(40)), r"\(40, 3, 200, 1\)"),
    (lambda: probe_layers(noise(40)[:, :0], alternating(40)), r"\(40, 0, 200\)"),
    (lambda: probe_layers([[["a"]]] * 4, [0, 1, 0, 1]), "give numbers"),
    (lambda: probe_layers([[[1.0]], [[1.0, 2.0]]], [0, 1]), "ragged"),
    (lambda: probe_layers(noise(40), alternating(39)), r"labels have shape \(39,\) for 40 prompts"),
    (lambda: probe_layers(noise(40), np.ones(40)), "every label is 1"),
    (lambda: probe_layers(noise(40), alternating(40) + 1), "use 0 and 1"),
    (lambda: probe_layers(noise(40), ["yes", "no"] * 20), "use 0 and 1"),
    (lambda: probe_layers(noise(40), np.arange(40) == 0), "give more prompts"),
    (lambda: probe_layers(noise(40), alternating(40), groups=np.zeros(40)), "one group"),
    (lambda: probe_layers(noise(40), alternating(40), groups=np.arange(40) // 20), "2 groups cannot be split"),
    (lambda: probe_layers(noise(40), alternating(40), groups=alternating(40)), "2 groups cannot be split"),
    (lambda: probe_layers(noise(40), alternating(40), groups=np.arange(39)), "39 groups for 40"),
    (lambda: probe_layers(noise(40), alternating(40), groups=[None] * 40), "no group"),
    (lambda: probe_layers(noise(40), alternating(40), controls=("shuffle",)), "no control 'shuffle'"),
    (lambda: probe_layers(noise(40), alternating(40), test_size=1.5), "test_size=1.5"),
    (lambda: probe_layers(noise(40), alternating(40), C=0), "C=0"),
]


@pytest.mark.parametrize(("call", "words"), BAD_CALLS)
def test_bad_input_is_refused_in_one_line(call, words):
    with pytest.raises(InputError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)


def carried(copied, n=300, layers=4, d=60, seed=6):
    """Layers that hold the label and a trait of the prompt: one trait carried along, or each its own.

    Each layer writes them in a random basis of its own, as MLP neurons do.
    """
    rng = np.random.default_rng(seed)
    labels = alternating(n)
    trait = rng.normal(size=(n, 1)) * np.ones(layers) if copied else rng.normal(size=(n, layers))
    signal = 2.0 * labels[:, None] + trait
    basis = rng.normal(size=(layers, d))
    return signal[..., None] * basis + 0.3 * rng.normal(size=(n, layers, d)), labels


def test_published_cosine_cannot_tell_copied_from_recomputed_but_decisions_can():
    measured = {}
    for copied in (True, False):
        measured[copied] = adjacent_similarity(probe_layers(*carried(copied))).measures
    for copied in (True, False):
        cosine = np.abs(measured[copied]["own_basis_cosine"]["probe"].value).mean()
        assert cosine < measured[copied]["own_basis_cosine"]["random_directions"].high[0]
        # The label alone makes the probes agree, whatever else the layers hold.
        assert measured[copied]["decision_correlation"]["probe"].value.min() > 0.3
    within = "decision_correlation_within_label"
    assert measured[True][within]["probe"].value.min() > 0.7
    assert np.abs(measured[False][within]["probe"].value).max() < 0.3


def test_one_basis_shows_in_the_cosine():
    rng = np.random.default_rng(7)
    labels = alternating(200)
    direction = rng.normal(size=40)
    features = rng.normal(size=(200, 3, 40)) + 2 * (labels[:, None] - 0.5)[..., None] * direction
    cosine = adjacent_similarity(probe_layers(features, labels)).measures["own_basis_cosine"]
    assert cosine["probe"].value.min() > 0.8
    assert cosine["probe"].value.min() > cosine["random_directions"].high[0]


def test_decision_correlation_matches_numpy_and_its_interval_covers():
    result = probe_layers(*carried(True))
    measured = adjacent_similarity(result).measures["decision_correlation"]["probe"]
    for layer in range(3):
        expected = np.corrcoef(result.decision_values[layer], result.decision_values[layer + 1])[0, 1]
        assert measured.value[layer] == pytest.approx(expected)
        z, error = np.arctanh(expected), 1 / np.sqrt(result.n_test - 3)
        assert measured.low[layer] == pytest.approx(np.tanh(z - 1.96 * error), abs=0.06)
        assert measured.high[layer] == pytest.approx(np.tanh(z + 1.96 * error), abs=0.06)


def test_correlations_resample_groups_where_there_are_groups():
    features, labels, groups = confounded_topics(layers=3)
    grouped = probe_layers(features, labels, groups)
    width = {}
    for name, result in {
        "groups": grouped,
        "prompts": probes_module.ProbeResult(**{**vars(grouped), "test_groups": None}),
    }.items():
        similarity = adjacent_similarity(result).measures["decision_correlation"]["probe"]
        width[name] = (similarity.high - similarity.low).mean()
    assert width["groups"] > 1.5 * width["prompts"]


def test_random_direction_null_holds_95_percent():
    null = adjacent_similarity(probe_layers(noise(60, 2, 24), alternating(60))).measures["own_basis_cosine"]
    rng = np.random.default_rng(8)
    a, b = rng.normal(size=(2, 4000, 24))
    cosines = (a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    band = null["random_directions"]
    inside = (band.low[0] < cosines) & (cosines < band.high[0])
    assert inside.mean() == pytest.approx(0.95, abs=0.015)


def test_shared_directions_are_compared_in_their_own_space():
    result = probe_layers(noise(60, 3, 20), alternating(60))
    shared = np.array([[1.0, 0.0], [1.0, 1.0], [-1.0, 1.0]])
    similarity = adjacent_similarity(result, shared=shared, shared_shuffled=shared[::-1])
    by_series = similarity.measures["shared_space_cosine"]
    assert by_series["probe"].value == pytest.approx([np.sqrt(0.5), 0.0])
    assert by_series["shuffled"].value == pytest.approx([0.0, np.sqrt(0.5)])
    frame = similarity.to_frame()
    assert list(frame) == ["layer", "measure", "series", "similarity", "low", "high"]
    assert set(frame["layer"]) == {0, 1}
    assert set(frame.query("measure == 'shared_space_cosine'")["series"]) == {"probe", "shuffled", "random_directions"}


def test_similarity_refuses_what_it_cannot_compare():
    result = probe_layers(noise(60, 2, 20), alternating(60))
    bare = probe_layers(noise(60, 2, 20), alternating(60), controls=())
    single = probe_layers(noise(60, 1, 20), alternating(60))
    for call, words in [
        (lambda: adjacent_similarity(bare), "no null"),
        (lambda: adjacent_similarity(single), "no neighbour"),
        (lambda: adjacent_similarity(result, shared=np.ones((3, 4))), "2 layers"),
        (lambda: adjacent_similarity(result, shared=np.full((2, 4), np.nan)), "finite"),
        (lambda: adjacent_similarity(result, shared_shuffled=np.ones((2, 4))), "pass shared as well"),
        (lambda: adjacent_similarity(result).plot("cosine"), "no measure 'cosine'"),
    ]:
        with pytest.raises(InputError, match=words):
            call()


def test_plots_hand_tidy_frames_to_charts(monkeypatch):
    drawn = []
    charts = SimpleNamespace(by_layer=lambda frame, value, **options: drawn.append((frame, value, options)))
    monkeypatch.setitem(__import__("sys").modules, "rim_core.charts", charts)
    monkeypatch.setattr("rim_core.charts", charts, raising=False)
    labels = (np.arange(100) < 30).astype(int)
    result = probe_layers(noise(100, 3, 20), labels)
    result.plot(title="Mine")
    adjacent_similarity(result).plot("own_basis_cosine")
    (frame, value, options), (pairs, pair_value, pair_options) = drawn
    assert frame.equals(result.to_frame())
    assert (value, options["series"], options["title"]) == ("accuracy", "series", "Mine")
    assert options["chance"] == result.majority
    assert "over 3 layers" in options["description"]
    assert set(pairs["measure"]) == {"own_basis_cosine"}
    assert (pair_value, pair_options["chance"]) == ("similarity", 0.0)
