"""`rim_core.stats` against closed forms, scipy, statsmodels, brute force and simulation."""

import hashlib
import json
from itertools import combinations, product

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
import statsmodels.api
import torch
from statsmodels.stats.contingency_tables import mcnemar as sm_mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import confint_proportions_2indep, proportion_confint
from statsmodels.stats.weightstats import DescrStatsW

from rim_core import stats
from rim_core.errors import InputError


@pytest.mark.parametrize(("successes", "n"), [(0, 20), (1, 7), (13, 20), (20, 20), (950, 1000)])
def test_proportion_is_clopper_pearson(successes, n):
    interval = stats.proportion(successes, n)
    low, high = proportion_confint(successes, n, alpha=0.05, method="beta")
    assert interval.estimate == successes / n
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=1e-9)
    assert (interval.n, interval.level, interval.method) == (n, 0.95, "Clopper-Pearson")


def test_proportion_with_no_success_has_the_closed_form():
    interval = stats.proportion(0, 30, level=0.9)
    assert interval.low == 0
    assert interval.high == pytest.approx(1 - 0.05 ** (1 / 30))


def test_t_interval_matches_statsmodels():
    values = [0.91, 0.94, 0.97, 0.90]
    interval = stats.t_interval(values)
    assert (interval.low, interval.high) == pytest.approx(DescrStatsW(values).tconfint_mean())
    assert interval.estimate == pytest.approx(np.mean(values))


def test_t_interval_of_equal_seeds_has_no_width():
    interval = stats.t_interval([0.25, 0.25, 0.25])
    assert interval.low == interval.estimate == interval.high == 0.25


def test_interval_reads_as_a_sentence_part():
    assert str(stats.Interval(0.5, 0.25, 0.75, 12)) == "0.5 (95% 0.25 to 0.75, n=12)"


def test_bootstrap_of_a_mean_covers_it():
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(150):
        interval = stats.bootstrap(rng.exponential(2.0, 40), n_resamples=300, seed=trial)
        covered += interval.low <= 2.0 <= interval.high
    assert 0.85 <= covered / 150 <= 0.99


def test_bootstrap_takes_any_statistic():
    values = np.arange(101.0)
    interval = stats.bootstrap(values, statistic=np.median, n_resamples=500)
    assert interval.estimate == 50
    assert 30 < interval.low < 50 < interval.high < 70


def clustered(rng, n_groups=30, size=10):
    """Values that differ between groups far more than within: 300 values, about 30 independent ones."""
    groups = np.repeat(np.arange(n_groups), size)
    return rng.normal(size=n_groups)[groups] + 0.1 * rng.normal(size=groups.size), groups


def test_cluster_bootstrap_covers_where_the_plain_one_does_not():
    rng = np.random.default_rng(1)
    covered = {"plain": 0, "cluster": 0}
    for trial in range(100):
        values, groups = clustered(rng)
        for name, given in (("plain", None), ("cluster", groups)):
            low, high = np.percentile(
                stats.resampled_means(values[:, None], given, n_resamples=300, seed=trial), [2.5, 97.5]
            )
            covered[name] += low <= 0 <= high
    assert covered["cluster"] >= 85
    assert covered["plain"] <= 65


def test_cluster_bootstraps_match_every_possible_resample():
    # Uneven groups whose size goes with their value: a mean of group means would be another number.
    groups = np.repeat([0, 1, 2], [1, 2, 6])
    values = np.array([0.0, 1, 2, 7, 8, 9, 9, 9, 9])
    members = [values[groups == group] for group in range(3)]
    possible = [np.concatenate(drawn).mean() for drawn in product(members, repeat=3)]
    fast = stats.resampled_means(values[:, None], groups, n_resamples=20_000)[:, 0]
    assert fast.mean() == pytest.approx(np.mean(possible), abs=0.05)
    assert fast.std() == pytest.approx(np.std(possible), rel=0.02)
    one = stats.bootstrap(values, groups=groups, level=0.8)
    assert [one.low, one.high] == pytest.approx(np.percentile(possible, [10, 90]).tolist())


def test_the_two_cluster_bootstraps_agree():
    values, groups = clustered(np.random.default_rng(2))
    uneven = np.arange(values.size) % 7 != 0
    values, groups = values[uneven], groups[uneven]
    one = stats.bootstrap(values, groups=groups, n_resamples=4000)
    many = stats.resampled_means(np.c_[values, 10 * values], groups, n_resamples=4000)
    low, high = np.percentile(many, [2.5, 97.5], axis=0)
    width = one.high - one.low
    assert low[0] == pytest.approx(one.low, abs=0.08 * width)
    assert high[0] == pytest.approx(one.high, abs=0.08 * width)
    assert low[1] == pytest.approx(10 * low[0])
    assert one.method == "cluster bootstrap over 30 groups"


def test_cluster_bootstrap_accepts_any_hashable_group():
    values = np.arange(8.0)
    by_number = stats.bootstrap(values, groups=[0, 0, 1, 1, 2, 2, 3, 3], n_resamples=100)
    for groups in (list("aabbccdd"), [("x", i // 2) for i in range(8)], np.arange(8) // 2):
        assert stats.bootstrap(values, groups=groups, n_resamples=100) == by_number


def test_tensor_groups_are_compared_by_value():
    torch = pytest.importorskip("torch")
    codes = stats.group_codes(torch.arange(600) // 5, 600)
    assert codes.tolist() == (np.arange(600) // 5).tolist()


def test_cohens_d_by_hand():
    # Means 6 and 3, variances 4 and 1 with n = 3 and 3: pooled variance 2.5.
    interval = stats.cohens_d([4, 6, 8], [2, 3, 4])
    d = 3 / np.sqrt(2.5)
    error = np.sqrt(6 / 9 + d**2 / 12)
    assert interval.estimate == pytest.approx(d)
    assert interval.low == pytest.approx(d - 1.959964 * error, abs=1e-5)
    assert interval.high == pytest.approx(d + 1.959964 * error, abs=1e-5)


def test_cohens_d_weights_the_variances_by_size():
    rng = np.random.default_rng(3)
    a, b = rng.normal(0, 3, 10), rng.normal(0, 1, 200)
    t = scipy.stats.ttest_ind(a, b).statistic
    assert stats.cohens_d(a, b).estimate == pytest.approx(t * np.sqrt(1 / 10 + 1 / 200))


def test_cohens_d_covers_the_true_effect():
    rng = np.random.default_rng(4)
    covered = sum(
        interval.low <= 0.8 <= interval.high
        for interval in (stats.cohens_d(rng.normal(0.8, 1, 25), rng.normal(0, 1, 25)) for _ in range(300))
    )
    assert 0.91 <= covered / 300 <= 0.99


def test_ks_matches_scipy_and_the_definition():
    rng = np.random.default_rng(5)
    a, b = rng.normal(size=40), rng.normal(1, 1, size=30)
    result = stats.ks(a, b)
    grid = np.sort(np.r_[a, b])
    gap = np.abs((a[:, None] <= grid).mean(axis=0) - (b[:, None] <= grid).mean(axis=0)).max()
    assert result.statistic == pytest.approx(gap)
    assert result.p_value == pytest.approx(scipy.stats.ks_2samp(a, b, method="exact").pvalue)
    assert (result.n_a, result.n_b) == (40, 30)


@pytest.mark.parametrize("statistic", ["mean", "median"])
def test_unpaired_permutations_are_enumerated(statistic):
    centre = {"mean": np.mean, "median": np.median}[statistic]
    a, b = [1.0, 2.5, 4.0], [3.0, 5.0, 6.5, 8.0]
    pool = np.array(a + b)
    observed = centre(a) - centre(b)
    hits = [
        abs(centre(pool[list(chosen)]) - centre(np.delete(pool, chosen))) >= abs(observed) - 1e-12
        for chosen in combinations(range(7), 3)
    ]
    result = stats.permutation_test(a, b, statistic=statistic)
    assert result.p_value == pytest.approx(np.mean(hits))
    assert result.statistic == pytest.approx(observed)
    assert result.method.endswith("all 35")


def test_paired_permutations_are_enumerated():
    a, b = np.array([5.0, 6.0, 7.5, 9.0, 4.0]), np.array([4.0, 6.5, 5.0, 7.0, 3.5])
    hits = [
        abs(np.mean(np.array(signs) * (a - b))) >= abs(np.mean(a - b)) - 1e-12 for signs in product([1, -1], repeat=5)
    ]
    result = stats.permutation_test(a, b, paired=True)
    assert result.p_value == pytest.approx(np.mean(hits))
    assert result.method == "paired permutation of the mean, all 32"


def test_random_permutations_never_give_zero():
    rng = np.random.default_rng(6)
    result = stats.permutation_test(rng.normal(9, 1, 40), rng.normal(0, 1, 40), n=99)
    assert result.p_value == pytest.approx(1 / 100)
    assert result.method.endswith("99 random")


def test_random_permutations_agree_with_student_and_are_reproducible():
    rng = np.random.default_rng(7)
    a, b = rng.normal(0.4, 1, 50), rng.normal(0, 1, 50)
    result = stats.permutation_test(a, b, n=4000, seed=1)
    assert result.p_value == pytest.approx(scipy.stats.ttest_ind(a, b).pvalue, abs=0.03)
    assert stats.permutation_test(a, b, n=4000, seed=1) == result
    assert stats.permutation_test(a, b, n=4000, seed=2) != result


def test_pairing_uses_the_pairs():
    rng = np.random.default_rng(8)
    shared = rng.normal(0, 10, 12)
    a, b = shared + 1 + 0.1 * rng.normal(size=12), shared
    assert stats.permutation_test(a, b, paired=True).p_value < 0.001
    assert stats.permutation_test(a, b).p_value > 0.5


def outcomes(both, only_a, only_b, neither):
    """Two paired yes-no samples with these counts."""
    a = [1] * both + [1] * only_a + [0] * only_b + [0] * neither
    b = [1] * both + [0] * only_a + [1] * only_b + [0] * neither
    return np.array(a, dtype=bool), np.array(b, dtype=bool)


@pytest.mark.parametrize("counts", [(1, 1, 7, 12), (0, 0, 6, 4), (30, 12, 9, 4), (3, 5, 0, 2)])
def test_mcnemar_is_the_exact_test_and_the_sign_flips(counts):
    a, b = outcomes(*counts)
    result = stats.mcnemar(a, b)
    both, only_a, only_b, neither = counts
    assert result.p_value == pytest.approx(sm_mcnemar([[both, only_a], [only_b, neither]], exact=True).pvalue)
    if only_a + only_b <= 10:  # every way the differing pairs could have fallen, each equally likely
        flips = np.array(list(product([1, -1], repeat=only_a + only_b))).sum(axis=1)
        assert result.p_value == pytest.approx(np.mean(np.abs(flips) >= abs(only_a - only_b)))
    assert result.statistic == pytest.approx(a.mean() - b.mean())
    assert result.n_a == result.n_b == sum(counts)


def test_mcnemar_of_equal_outcomes_says_nothing():
    assert stats.mcnemar([True, False, True], [True, False, True]).p_value == 1


@pytest.mark.parametrize("counts", [(1, 1, 7, 12), (10, 5, 9, 6)])
def test_paired_difference_of_uncorrelated_outcomes_is_the_unpaired_one(counts):
    a, b = outcomes(*counts)
    interval = stats.paired_difference(a, b, level=0.9)
    wanted = confint_proportions_2indep(a.sum(), a.size, b.sum(), b.size, method="newcomb", alpha=0.1)
    assert (interval.low, interval.high) == pytest.approx(wanted, abs=1e-6)
    assert interval.estimate == pytest.approx(a.mean() - b.mean())


def test_pairing_narrows_the_interval_of_a_difference():
    a, b = outcomes(40, 6, 1, 40)
    paired = stats.paired_difference(a, b)
    low, high = confint_proportions_2indep(a.sum(), a.size, b.sum(), b.size, method="newcomb")
    assert paired.high - paired.low < 0.5 * (high - low)


@pytest.mark.parametrize("shares", [(0.3, 0.3, 0.1, 0.3), (0.05, 0.7, 0.05, 0.2), (0.6, 0.02, 0.02, 0.36)])
def test_paired_difference_covers_the_truth_exactly_enumerated(shares):
    n = 14
    truth, covered = shares[1] - shares[2], 0.0
    for both, only_a, only_b in product(range(n + 1), repeat=3):
        if (neither := n - both - only_a - only_b) < 0:
            continue
        counts = (both, only_a, only_b, neither)
        interval = stats.paired_difference(*outcomes(*counts))
        assert -1 <= interval.low <= interval.estimate <= interval.high <= 1
        if interval.low <= truth <= interval.high:
            covered += scipy.stats.multinomial.pmf(counts, n, shares)
    assert 0.93 <= covered < 1


def test_paired_difference_turns_with_its_arguments():
    a, b = outcomes(5, 9, 2, 4)
    one, other = stats.paired_difference(a, b), stats.paired_difference(b, a)
    assert (one.low, one.high) == pytest.approx((-other.high, -other.low))
    assert stats.paired_difference([1, 1, 1], [1, 1, 1]).low < 0


def test_fisher_sums_the_hypergeometric():
    result = stats.fisher(9, 12, 3, 15)
    chances = scipy.stats.hypergeom(27, 12, 12).pmf(np.arange(13))
    assert result.p_value == pytest.approx(chances[chances <= chances[9] * (1 + 1e-9)].sum())
    assert result.statistic == pytest.approx(9 / 12 - 3 / 15)
    assert (result.n_a, result.n_b) == (12, 15)


def test_benjamini_hochberg_matches_statsmodels():
    p = [0.001, 0.2, 0.03, 0.04, 0.9, 0.012]
    assert stats.benjamini_hochberg(p) == pytest.approx(multipletests(p, method="fdr_bh")[1])


def test_derived_generators_depend_on_seed_and_label_only():
    draw = stats.derive_generator(0, "split", 3).integers(2**62)
    assert draw == stats.derive_generator(0, "split", 3).integers(2**62)
    others = [(1, "split", 3), (0, "split", 4), (0, "other", 3), (0, "split3"), (0, "split")]
    assert draw not in [stats.derive_generator(*labels).integers(2**62) for labels in others]
    # Pinned: published numbers depend on this stream staying the same.
    assert stats.derive_generator(0, "pinned").integers(10**6) == 788605


def test_effects_and_means_of_many_columns_are_those_of_each():
    rng = np.random.default_rng(9)
    a, b = rng.normal(1, 1, (12, 3)), rng.normal(0, 1, (10, 3))
    for many, one in (
        (stats.cohens_d(a, b, level=0.9), lambda i: stats.cohens_d(a[:, i], b[:, i], level=0.9)),
        (stats.t_interval(a), lambda i: stats.t_interval(a[:, i])),
    ):
        for i in range(3):
            wanted = one(i)
            got = (many[i].estimate, many[i].low, many[i].high)
            assert got == pytest.approx((wanted.estimate, wanted.low, wanted.high))
            assert (many[i].n, many[i].level, many[i].method) == (wanted.n, wanted.level, wanted.method)
    frame = many.to_frame(layer=[4, 5, 6])
    assert frame["layer"].tolist() == [4, 5, 6]
    assert list(frame) == ["layer", "estimate", "low", "high", "n"]
    assert str(many).count("\n") == 2
    assert list(stats.t_interval(a[:, 0]).to_frame()) == ["estimate", "low", "high", "n"]


@pytest.mark.parametrize("groups", [None, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]])
def test_a_function_of_means_is_resampled_as_its_means_are(groups):
    columns = np.random.default_rng(10).random((10, 3))

    def share(mean):
        return 1 - mean[:, 0] / mean[:, 1]

    drawn = stats.resampled_means(columns, groups, n_resamples=300, seed=4)
    found = stats.of_means(columns, share, groups, n_resamples=300, seed=4)
    assert (found.low, found.high) == tuple(np.percentile(1 - drawn[:, 0] / drawn[:, 1], [2.5, 97.5]))
    assert found.estimate == 1 - columns[:, 0].mean() / columns[:, 1].mean()
    assert found.method == f"percentile bootstrap over {'rows' if groups is None else '5 groups'}"
    both = stats.of_means(columns, lambda mean: np.column_stack([share(mean), mean]), groups, n_resamples=300, seed=4)
    assert both[0] == found
    assert np.array_equal(both.high[1:], np.percentile(drawn, 97.5, axis=0))
    assert np.array_equal(stats.of_means(columns, groups=groups, n_resamples=300, seed=4).low, both.low[1:])


def test_undefined_resamples_are_left_out():
    found = stats.percentiles([[1.0, 2.0], [np.nan, 3.0], [4.0, 5.0], [4.0, 7.0]], n=3)
    assert found[0].low == found[0].high == 4
    assert np.isnan(stats.percentiles([1.0, np.nan, np.nan], n=2).low)


BAD_CALLS = [
    (lambda: stats.cohens_d([[1, 2], [3, 4]], [[1], [2]]), "differ in columns"),
    (lambda: stats.cohens_d([[1, 2], [3, 2]], [[1, 2], [2, 2]]), "spread in column 1"),
    (lambda: stats.of_means([1.0, 2.0]), r"of_means: columns have shape \(2,\); give numbers \[n, column\]"),
    (lambda: stats.t_interval([1.0, 2.0])[0], "single interval"),
    (lambda: stats.t_interval([[1.0], [2.0]]).to_frame(layer=[0, 1]), "axes layer do not fit"),
    (lambda: stats.proportion(0, 0), "0 successes of 0"),
    (lambda: stats.proportion(5, 4), "5 successes of 4"),
    (lambda: stats.proportion(1.5, 4), "whole numbers"),
    (lambda: stats.t_interval([0.9]), "1 of the 2 needed"),
    (lambda: stats.t_interval([0.9, np.nan]), "1 that are NaN or infinite"),
    (lambda: stats.t_interval([0.9, 0.8], level=95), "below 1, not 95"),
    (lambda: stats.bootstrap([]), "0 of the 2 needed"),
    (lambda: stats.bootstrap([1, np.inf]), "NaN or infinite"),
    (lambda: stats.bootstrap([[1, 2], [3, 4]]), r"shape \(2, 2\)"),
    (lambda: stats.bootstrap(["a", "b"]), "must be real numbers"),
    (lambda: stats.bootstrap([1, 2], groups=["x"]), "1 groups for 2 values"),
    (lambda: stats.bootstrap([1, 2], groups=["x", "x"]), "one group"),
    (lambda: stats.bootstrap([1, 2, 3], groups=["x", None, "y"]), "1 values have no group"),
    (lambda: stats.resampled_means([1.0, 2.0]), r"\[n, column\]"),
    (lambda: stats.cohens_d([1, 1], [1, 1]), "spread"),
    (lambda: stats.cohens_d([0.1] * 7, [0.3] * 7), "spread"),
    (lambda: stats.cohens_d([1], [1, 2]), "1 of the 2 needed"),
    (lambda: stats.ks([], [1]), "a hold 0"),
    (lambda: stats.ks([1], [np.nan]), "b hold 1 that are NaN"),
    (lambda: stats.permutation_test([1, 2], [1, 2, 3], paired=True), "cannot be paired"),
    (lambda: stats.permutation_test([1, 2], [3, 4], statistic="mode"), "unknown permutation_test: statistic 'mode'"),
    (lambda: stats.permutation_test([1, 2], [3, 4], n=0), "n must be a whole number of at least 1, not 0"),
    (lambda: stats.permutation_test([1], [3]), "a hold 1 of the 2 needed"),
    (lambda: stats.permutation_test([1], [2, 3]), "a hold 1 of the 2 needed"),
    (lambda: stats.permutation_test([1, 2], [3], paired=False), "b hold 1 of the 2 needed"),
    (lambda: stats.proportion(np.nan, 10), "nan successes of 10"),
    (lambda: stats.proportion(3, np.inf), "3 successes of inf"),
    (lambda: stats.proportion("x", 10), "'x' successes of 10"),
    (lambda: stats.fisher(np.nan, 2, 1, 2), "nan successes of 2"),
    (lambda: stats.bootstrap([1, 2], n_resamples=0), "n_resamples must be a whole number of at least 2, not 0"),
    (lambda: stats.bootstrap([1, 2], n_resamples=9.5), "n_resamples must be a whole number"),
    (lambda: stats.bootstrap([1, 2], seed=1.5), "seed must be a whole number of at least 0, not 1.5"),
    (lambda: stats.bootstrap([1, 2], seed=True), "seed must be a whole number of at least 0, not True"),
    (lambda: stats.bootstrap([1, 2], level="x"), "level .such as 0.95. must be"),
    (lambda: stats.bootstrap([1, 2], lambda x: np.nan), "statistic of the sample is nan"),
    (lambda: stats.bootstrap([1, 2], lambda x: x), "statistic of the sample is array"),
    (lambda: stats.bootstrap([0, 1, 1], lambda x: x.mean() / x.std() if x.std() else np.nan), "a resample of it"),
    (lambda: stats.resampled_means([[1.0], [2.0]], n_resamples=0), "n_resamples must be"),
    (lambda: stats.resampled_means([[1.0]]), "1 of the 2 needed"),
    (lambda: stats.split(10, 0.01), "10 prompts or groups leave 0 to hold out"),
    (lambda: stats.split(10, 2), "holdout must be a finite number above 0 and below 1, not 2"),
    (lambda: stats.split(10, 0.5, ["a"] * 10), "one group"),
    (lambda: stats.mcnemar([1, 0], [1]), "cannot be paired"),
    (lambda: stats.mcnemar([1, 0.5], [1, 0]), "neither yes nor no"),
    (lambda: stats.paired_difference([], []), "0 of the 1 needed"),
    (lambda: stats.fisher(3, 2, 1, 2), "3 successes of 2"),
    (lambda: stats.benjamini_hochberg([0.5, 1.2]), "outside 0 to 1"),
    (lambda: stats.benjamini_hochberg([]), "0 of the 1 needed"),
    # What would overflow.
    (lambda: stats.permutation_test([1e308, 1e308, -1e308], [1, 2, 3]), r"a hold numbers beyond 1e\+150"),
    (lambda: stats.t_interval([1e308, -1e308]), "squares overflow; give them in a larger unit"),
    (lambda: stats.cohens_d([1e200, 2e200], [1, 2]), "cohens_d: a hold numbers beyond"),
    (lambda: stats.resampled_means([[1e308], [1e308]]), "values hold numbers beyond"),
    (lambda: stats.t_interval([10**400, 1]), "must be real numbers, not .1000"),
    (lambda: stats.bootstrap([1, 2], lambda x: 10**400), "statistic of the sample is 1000"),
    # What NumPy would make numbers of without a word.
    (lambda: stats.t_interval(["1", "2"]), "must be real numbers"),
    (lambda: stats.t_interval(np.array(["1", 2], dtype=object)), "must be real numbers"),
    (lambda: stats.ks([1 + 2j], [1]), "a must be real numbers"),
    (lambda: stats.ks(torch.tensor([1 + 2j]), [1]), "a must be real numbers"),
    (lambda: stats.ks(np.array([1 + 2j, 3], dtype=object), [1]), "a must be real numbers"),
    (lambda: stats.t_interval(x for x in [1.0, 2.0]), "must be real numbers"),
    (lambda: stats.bootstrap([1, 2], lambda x: np.complex128(1j)), "statistic of the sample is"),
    (lambda: stats.bootstrap([1, 2], lambda x: "1"), "statistic of the sample is '1'"),
    (lambda: stats.resampled_means([[1j], [2j]]), "values must be real numbers"),
    (lambda: stats.resampled_means([x] for x in "12"), "values must be real numbers"),
    (lambda: stats.resampled_means([["1"], ["2"]]), "values must be real numbers"),
    (lambda: stats.bootstrap([1, 2], seed=-1), "seed must be a whole number of at least 0, not -1"),
    (lambda: stats.bootstrap([1, 2], n_resamples=1), "n_resamples must be a whole number of at least 2"),
    (lambda: stats.proportion("1", 2), "'1' successes of 2"),
    (lambda: stats.proportion(True, 2), "True successes of 2"),
    (lambda: stats.proportion(np.True_, 2), "successes of 2"),
    (lambda: stats.proportion(np.complex128(1), 2), "successes of 2"),
    (lambda: stats.proportion(1, 10**30), "n >= 1 and at most a billion"),
    (lambda: stats.proportion(1, 10**400), "n >= 1 and at most a billion"),
    (
        lambda: stats.proportion(1, 2, level="0.9"),
        "level .such as 0.95. must be a finite number above 0 and below 1, not '0.9'",
    ),
    (lambda: stats.paired_difference([1, 0], [1, 0], level=np.array([0.9])), "level .such as 0.95. must be"),
    (lambda: stats.fisher("1", 2, 1, 2), "fisher: a: '1' successes of 2"),
    (lambda: stats.fisher(1, 2, True, 2), "fisher: b: True successes of 2"),
    (lambda: stats.bootstrap([1, 2, 3], groups=[[1], [2], [3]]), "groups: one is no name or number"),
    (lambda: stats.bootstrap([1, 2], groups=5), "groups must be a list, not 5"),
    (lambda: stats.bootstrap([1, 2], groups="ab"), "groups must be a list, not 'ab'"),
]


@pytest.mark.parametrize(("call", "words"), BAD_CALLS)
def test_bad_input_is_refused_in_one_line(call, words):
    with pytest.raises(InputError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_a_bootstrap_without_spread_has_no_width_and_no_nan():
    found = stats.bootstrap([2.0, 2.0, 2.0])
    assert (found.estimate, found.low, found.high) == (2.0, 2.0, 2.0)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float32, torch.int64, torch.bool])
def test_tensors_are_samples(kind):
    values = torch.tensor([1, 0, 1, 1]).to(kind)
    plain = stats.t_interval([1, 0, 1, 1])
    assert stats.t_interval(values) == stats.t_interval(list(values)) == plain
    columns = stats.resampled_means(values[:, None], n_resamples=3)
    assert np.array_equal(columns, stats.resampled_means(np.array([[1], [0], [1], [1]]), n_resamples=3))
    if values.is_floating_point():
        assert stats.t_interval(values.requires_grad_()) == plain


def test_numpy_counts_and_seeds_are_numbers():
    assert stats.fisher(5.0, 10, np.int64(2), 10) == stats.fisher(5, 10, 2, 10)
    assert stats.proportion(np.int64(3), np.int32(4)).estimate == 0.75
    assert stats.bootstrap([1.0, 2.0, 4.0], seed=np.int64(3)) == stats.bootstrap([1.0, 2.0, 4.0], seed=3)


def test_divisions_are_what_they_were_when_results_were_first_published():
    """A hash over draws made before the salt had a name of its own: wording must never move a division."""
    labels, found = [f"t{i % 7}" for i in range(40)], {}
    for salt in ("halves", "procrustes", "shared_subspace: a"):
        for seed in range(3):
            found[f"{salt}{seed}"] = [x.tolist() for x in stats.split(40, 0.5, labels, seed=seed, salt=salt)]
            found[f"n{salt}{seed}"] = [x.tolist() for x in stats.split(40, 0.3, seed=seed, salt=salt)]
    digest = hashlib.sha256(json.dumps(found).encode()).hexdigest()
    assert digest == "680fc4382c8999256a579cef1ebcee696f8974c371494ce46e9cc4d3c74b158b"
    assert [list(x) for x in stats.split(40, 0.5, labels)] == found["halves0"]


def test_a_clustered_share_covers_where_independent_outcomes_would_not():
    rng, covered, alone = np.random.default_rng(0), [], []
    groups = np.repeat(np.arange(14), 20)
    for _ in range(300):
        # Beta-binomial outcomes of mean 0.7, correlated 0.25 within a cluster.
        outcomes = rng.random(280) < np.repeat(rng.beta(0.7 * 3, 0.3 * 3, 14), 20)
        found = stats.clustered_proportion(outcomes, groups)
        exact = stats.proportion(int(outcomes.sum()), 280)
        assert found.estimate == exact.estimate
        covered.append(found.low <= 0.7 <= found.high)
        alone.append(exact.low <= 0.7 <= exact.high)
    assert np.mean(covered) > 0.91
    assert np.mean(alone) < 0.75


@pytest.mark.parametrize("within", [0.0, 0.3])
def test_a_clustered_mean_covers_as_it_says(within):
    """14 clusters of 20, as the test categories are; values of a cluster correlated by `within`, or not at all."""
    rng, covered, alone, widths = np.random.default_rng(1), [], [], []
    groups = np.repeat(np.arange(14), 20)
    for _ in range(1000):
        values = 0.3 + np.sqrt(within) * rng.normal(size=14)[groups] + np.sqrt(1 - within) * rng.normal(size=280)
        found = stats.clustered_mean(values, groups)
        covered.append(found.low <= 0.3 <= found.high)
        plain = stats.t_interval(values)
        alone.append(plain.low <= 0.3 <= plain.high)
        widths.append((found.high - found.low) / (plain.high - plain.low))
    assert 0.92 <= np.mean(covered) <= 0.985
    assert np.mean(alone) < 0.6 if within else np.mean(widths) < 1.4
    # A column is as if it were alone.
    both = stats.clustered_mean(np.stack([values, 2 * values], 1), groups)
    assert (both[0].low, both[0].high) == pytest.approx((found.low, found.high))
    assert both[1].high == pytest.approx(2 * found.high)


def test_a_clustered_mean_is_that_of_statsmodels():
    rng = np.random.default_rng(2)
    groups = rng.integers(0, 9, 60)
    values = rng.normal(size=60) + rng.normal(size=9)[groups]
    fit = statsmodels.api.OLS(values, np.ones(60)).fit(
        cov_type="cluster", cov_kwds={"groups": groups, "use_correction": False}, use_t=True
    )
    found = stats.clustered_mean(values, groups)
    error = fit.bse[0] * np.sqrt(9 / 8)
    assert found.estimate == pytest.approx(fit.params[0])
    assert (found.high - found.low) / 2 == pytest.approx(scipy.stats.t.ppf(0.975, 8) * error)


def test_a_clustered_mean_of_equal_values_is_not_certain():
    with pytest.raises(InputError, match="all values are equal"):
        stats.clustered_mean([0.0] * 40, None)
    found = stats.clustered_mean([0.0] * 40, None, bounds=(-1, 1))
    assert found.high == -found.low == pytest.approx(stats.proportion(0, 40).high)
    assert stats.clustered_mean([1.0] * 40, None, bounds=(0, 1)).low == pytest.approx(stats.proportion(40, 40).low)
    with pytest.raises(InputError, match="outside the bounds"):
        stats.clustered_mean([0.5, 1.5], None, bounds=(0, 1))


@pytest.mark.parametrize(("trainings", "between"), [(3, 0.5), (5, 0.5), (5, 0.0)])
def test_a_mean_over_trainings_and_prompts_covers_as_it_says(trainings, between):
    """14 topics of 8 prompts, measured in each training; an interval over one of the two alone covers far less."""
    rng, covered, of_prompts, of_trainings = np.random.default_rng(3), [], [], []
    groups = np.repeat(np.arange(14), 8)
    for _ in range(1000):
        prompts = 0.5 * rng.normal(size=14)[groups] + rng.normal(size=112)
        values = 0.3 + prompts + between * rng.normal(size=(trainings, 1)) + 0.7 * rng.normal(size=(trainings, 112))
        for found, each in (
            (stats.crossed_mean(values, groups), covered),
            (stats.clustered_mean(values.mean(0), groups), of_prompts),
            (stats.t_interval(values.mean(1)), of_trainings),
        ):
            each.append(found.low <= 0.3 <= found.high)
    assert 0.92 <= np.mean(covered) <= 0.99
    assert min(np.mean(of_prompts), np.mean(of_trainings)) < 0.9


def test_a_mean_over_trainings_is_that_over_prompts_where_trainings_do_not_differ():
    rng = np.random.default_rng(4)
    values, groups = rng.normal(size=60), np.repeat(np.arange(10), 6)
    found, one = stats.crossed_mean(np.stack([values, values]), groups), stats.clustered_mean(values, groups)
    assert (found.low, found.high) == pytest.approx((one.low, one.high))
    columns = stats.crossed_mean(np.stack([values, values + 1])[..., None] * [1.0, 2.0], groups)
    assert columns[1].high == pytest.approx(2 * columns[0].high)
    with pytest.raises(InputError, match="all values are equal"):
        stats.crossed_mean([[1, 1], [1, 1]])
    single = stats.crossed_mean(values[None], groups)
    assert (single.estimate, single.low, single.high) == (one.estimate, one.low, one.high)


def test_the_jackknife_of_a_mean_is_the_interval_over_equal_clusters():
    rng = np.random.default_rng(6)
    values, groups = rng.normal(size=60), np.repeat(np.arange(12), 5)
    found = stats.jackknife(lambda rows: float(values[rows].mean()), groups)
    clusters = stats.t_interval(values.reshape(12, 5).mean(1))
    assert (found.estimate, found.low, found.high) == pytest.approx((clusters.estimate, clusters.low, clusters.high))
    assert found.n == 60
    bounded = stats.jackknife(lambda rows: float(values[rows].mean()), groups, bounds=(found.estimate, 1))
    assert bounded.low == found.estimate
    with pytest.raises(InputError, match="at least two groups"):
        stats.jackknife(lambda rows: 0.0, ["a", "a"])
    with pytest.raises(InputError, match="the statistic"):
        stats.jackknife(lambda rows: float("nan"), ["a", "b"])


def test_the_jackknife_covers_a_correlation_as_it_says():
    rng, covered = np.random.default_rng(7), []
    groups = np.repeat(np.arange(14), 3)
    for _ in range(600):
        common = rng.normal(size=42)
        a, b = common + rng.normal(size=42), common + rng.normal(size=42)
        found = stats.jackknife(lambda rows, a=a, b=b: float(np.corrcoef(a[rows], b[rows])[0, 1]), groups)
        covered.append(found.low <= 0.5 <= found.high)
    assert 0.92 <= np.mean(covered) <= 0.98


def test_a_share_of_means_covers_as_it_says():
    """14 topics of 3 prompts in three trainings, which differ in how much is lost."""
    rng, covered = np.random.default_rng(8), []
    groups = np.repeat(np.arange(14), 3)
    for _ in range(1000):
        whole = 2 + 0.5 * rng.normal(size=14)[groups] + 0.5 * rng.normal(size=42)
        parts = [(0.4 + 0.1 * rng.normal()) * whole + 0.5 * rng.normal(size=42) for _ in range(3)]
        found = stats.crossed_mean(np.stack([stats.ratio_parts(part, whole) for part in parts]), groups)
        covered.append(found.low <= 0.4 <= found.high)
    assert 0.92 <= np.mean(covered) <= 0.99
    assert stats.ratio_parts([1.0, 3.0], [2.0, 6.0]).mean() == pytest.approx(0.5)
    columns = stats.ratio_parts([[1.0, 2.0], [3.0, 2.0]], [[2.0, 4.0], [6.0, 4.0]])
    assert columns.mean(0) == pytest.approx([0.5, 0.5])
    with pytest.raises(InputError, match="denominator's mean is 0"):
        stats.ratio_parts([1, 2], [1, -1])


def test_the_parts_of_an_area_have_it_as_their_mean_and_the_spread_of_delong():
    rng = np.random.default_rng(5)
    positive, negative = rng.normal(0.7, 1, 40).round(1), rng.normal(0, 1, 40).round(1)
    parts = stats.auc_parts(positive, negative)
    area = sklearn.metrics.roc_auc_score([1] * 40 + [0] * 40, [*positive, *negative])
    assert parts.mean() == pytest.approx(area)
    assert np.allclose(
        stats.auc_parts(np.stack([positive, -positive], 1), np.stack([negative, -negative], 1))[:, 0], parts
    )

    def areas(correlation):
        """Areas, and what the parts say of their spread, where twins have something in common."""
        for _ in range(400):
            common = rng.normal(size=40) * np.sqrt(correlation)
            a, b = (common + np.sqrt(1 - correlation) * rng.normal(size=40) for _ in range(2))
            found = stats.auc_parts(a + 0.7, b)
            yield found.mean(), found.var(ddof=1) / 40

    for correlation in (0.0, 0.8):
        means, variances = np.array(list(areas(correlation))).T
        assert np.sqrt(variances.mean()) == pytest.approx(means.std(), rel=0.12)


def test_a_clustered_share_has_width_at_its_ends_and_for_shares_that_do_not_vary():
    groups = list("abcdefgh") * 5
    none, every = (stats.clustered_proportion([value] * 40, groups) for value in (False, True))
    assert (none.low, every.high) == (0, 1)
    assert none.high > stats.proportion(0, 40).high
    assert every.low == pytest.approx(1 - none.high)
    # Every cluster alike: no more than the outcomes' own number, less what few clusters cost.
    even = stats.clustered_proportion(([True] * 8 + [False] * 8) * 2, list("abcdefgh") * 4)
    assert even.low < stats.proportion(16, 32).low
    with pytest.raises(InputError, match="neither yes nor no"):
        stats.clustered_proportion([0.5, 1], ["a", "b"])
    with pytest.raises(InputError, match="at least two groups"):
        stats.clustered_proportion([1, 0], ["a", "a"])
