"""Probes against plain scikit-learn, planted signals and the leaks they are there to prevent."""

import numpy as np
import pytest
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler

from rim_core import stats
from rim_core.errors import InputError
from rim_core.measures.probes import probe_layers


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
    sound = probe_layers(features, labels, groups=groups)
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
    result = probe_layers(noise(150, 1, 20), labels, groups=groups, controls=(), seed=seed)
    assert not set(groups[result.train]) & set(groups[result.test])
    assert sorted([*result.train, *result.test]) == list(range(150))
    assert set(labels[result.train]) == set(labels[result.test]) == {0, 1}
    assert 0.15 < result.n_test / 150 < 0.45
    assert len(set(result.test_groups)) == len(set(groups[result.test]))


@pytest.mark.parametrize("groups", [None, np.arange(150) // 10])
def test_seed_decides_the_split_and_everything_else(groups):
    labels = alternating(150)
    features = noise(150, 2, 50)
    first, again, other = (probe_layers(features, labels, groups=groups, seed=seed) for seed in (1, 1, 2))
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
    assert np.isfinite(result.to_frame()[["estimate", "low", "high"]]).all(axis=None)


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
    result = probe_layers(noise(60, 3, 20), alternating(60))
    frame = result.to_frame()
    differences = result.to_frame("difference")
    assert list(differences) == ["layer", "series", "estimate", "low", "high", "n"]
    assert differences["series"].tolist() == ["shuffled"] * 3 + ["random_features"] * 3
    assert list(frame) == ["layer", "series", "estimate", "low", "high", "n", "converged"]
    assert frame.groupby("series")["layer"].apply(list).to_dict() == {
        "probe": [0, 1, 2],
        "shuffled": [0, 1, 2],
        "random_features": [0, 1, 2],
    }
    assert ((frame["low"] <= frame["estimate"]) & (frame["estimate"] <= frame["high"])).all()


def asked(n):
    """Texts in which the label is a word, beside one that says nothing and one that no other prompt has."""
    labels = np.where(np.arange(n) % 2, "risky", "safe")
    return labels, [f"Should I {'bet' if label == 'risky' else 'save'} it? x{k:03}" for k, label in enumerate(labels)]


def test_labels_may_be_any_two_kinds():
    labels, _ = asked(60)
    features = noise(60, 2, 20)
    named = probe_layers(features, labels, positive="risky")
    assert named.to_frame().equals(probe_layers(features, (labels == "risky").astype(int)).to_frame())
    assert named.test_labels.tolist() == (labels[named.test] == "risky").tolist()


def test_what_the_words_give_away_is_measured_on_the_same_split():
    labels, texts = asked(120)
    result = probe_layers(noise(120), labels, positive="risky", texts=texts, groups=np.arange(120) // 6)
    assert list(result.controls) == ["shuffled", "random_features", "bag_of_words"]
    words = result.controls["bag_of_words"]
    assert words.accuracy.tolist() == [1, 1, 1]
    # The same classifier by scikit-learn; words of test prompts alone have no weight.
    counted = make_pipeline(
        CountVectorizer(token_pattern=r"(?u)\b\w+\b"),
        FunctionTransformer(lambda counts: counts.toarray()),
        StandardScaler(),
        LogisticRegression(tol=1e-9),
    )
    counted.fit([texts[row] for row in result.train], labels[result.train] == "risky")
    assert words.weights.shape[1] == len(counted[0].vocabulary_) == 5 + result.n_train
    expected = counted.decision_function([texts[row] for row in result.test])
    assert words.decision_values[0] == pytest.approx(expected, abs=1e-3)
    # Here the words say more than the features, in every layer.
    assert (result.differences["bag_of_words"].high < 0).all()
    lengths = probe_layers(noise(120), labels, positive="risky", texts=texts, controls=["length"]).controls["length"]
    assert lengths.accuracy[0] == 1  # "save" is a letter longer than "bet"
    assert lengths.weights.shape == (3, 2)


def test_differences_are_paired_and_by_group_no_tighter_than_the_exact_interval():
    labels = alternating(120)
    features = plant(noise(120, 2), labels, layers=[1], strength=0.7)
    plain = probe_layers(features, labels)
    grouped = probe_layers(features, labels, groups=np.arange(120) // 10)
    for result in (plain, grouped):
        for name, control in result.controls.items():
            found = result.differences[name]
            for layer in range(2):
                exact = stats.paired_difference(result.correct[layer], control.correct[layer])
                assert found.estimate[layer] == pytest.approx(exact.estimate)
                assert found.estimate[layer] == pytest.approx(result.accuracy[layer] - control.accuracy[layer])
                assert found.low[layer] <= exact.low < exact.high <= found.high[layer]
                if result is plain:
                    assert (found.low[layer], found.high[layer]) == (exact.low, exact.high)


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
    (lambda: probe_layers(with_value(np.nan), alternating(40)), "layer 2: 1 of 1200 numbers"),
    (lambda: probe_layers(with_value(np.inf), alternating(40)), "layer 2: 1 of 1200 numbers"),
    (lambda: probe_layers(noise(40)[:, 0], alternating(40)), r"\[40, 200\]; give numbers \[prompt, layer, d"),
    (lambda: probe_layers(noise(40)[..., None], alternating(40)), r"\[40, 3, 200, 1\]"),
    (lambda: probe_layers(noise(40)[:, :0], alternating(40)), r"\[40, 0, 200\]"),
    (lambda: probe_layers([[["a"]]] * 4, [0, 1, 0, 1]), "array of real numbers"),
    (lambda: probe_layers([[[1.0]], [[1.0, 2.0]]], [0, 1]), "array of real numbers"),
    (lambda: probe_layers(noise(40), alternating(39)), r"labels have shape \(39,\) for 40 prompts"),
    (lambda: probe_layers(noise(40), np.ones(40)), r"labels hold \[1.0\]; give 0 and 1"),
    (lambda: probe_layers(noise(40), alternating(40) + 1), "give 0 and 1"),
    (lambda: probe_layers(noise(40), ["yes", "no"] * 20), "which one counts as 1 as positive="),
    (lambda: probe_layers(noise(40), ["yes", "no"] * 20, positive="maybe"), r"'maybe' is no label; .* \['no', 'yes'\]"),
    (lambda: probe_layers(noise(40), ["a", "b", "c", "d"] * 10, positive="a"), "two others"),
    (lambda: probe_layers(noise(40), np.arange(40) == 0), "give more prompts"),
    (lambda: probe_layers(noise(40), alternating(40), groups=np.zeros(40)), "one group"),
    (lambda: probe_layers(noise(40), alternating(40), groups=np.arange(40) // 20), "2 groups cannot be split"),
    (lambda: probe_layers(noise(40), alternating(40), groups=alternating(40)), "2 groups cannot be split"),
    (lambda: probe_layers(noise(40), alternating(40), groups=np.arange(39)), "39 groups for 40"),
    (lambda: probe_layers(noise(40), alternating(40), groups=[None] * 40), "no group"),
    (lambda: probe_layers(noise(40), alternating(40), controls=("shuffle",)), "control 'shuffle': choose from"),
    (lambda: probe_layers(noise(40), alternating(40), controls=["length"]), "'length' reads the prompts; pass"),
    (lambda: probe_layers(noise(40), alternating(40), texts=["a"]), "texts must be 40 texts"),
    (lambda: probe_layers(noise(40), alternating(40), texts=["?"] * 40), "no word to count"),
    (lambda: probe_layers(noise(40), alternating(40), test_size=1.5), "test_size must be .* below 1, not 1.5"),
    (lambda: probe_layers(noise(40), alternating(40), C=0), "C must be .* above 0"),
    (lambda: probe_layers(noise(40), alternating(40), max_iter=0), "max_iter must be"),
    (lambda: probe_layers(noise(40), alternating(40)).to_frame("gap"), "unknown measure 'gap'"),
    (
        lambda: probe_layers(noise(40), alternating(40), controls="shuffled").differences["bow"],
        "unknown control of this result 'bow': choose from shuffled$",
    ),
]


@pytest.mark.parametrize(("call", "words"), BAD_CALLS)
def test_bad_input_is_refused_in_one_line(call, words):
    with pytest.raises(InputError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_the_plot_shows_the_controls_and_what_has_to_be_beaten():
    labels = (np.arange(100) < 30).astype(int)
    result = probe_layers(noise(100, 3, 20), labels)
    drawn = result.plot(title="Mine").to_dict()
    assert drawn["title"]["text"] == ["Mine"]
    assert "random_features" in drawn["description"]
    assert any(layer["encoding"].get("y", {}).get("datum") == result.majority for layer in drawn["layer"])
