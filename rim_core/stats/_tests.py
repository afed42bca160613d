"""Tests of whether two samples differ."""

from dataclasses import dataclass
from math import comb
from typing import Literal

import numpy as np
import scipy.stats
from numpy.typing import ArrayLike

from rim_core import checking
from rim_core.errors import InputError
from rim_core.stats._resampling import derive_generator
from rim_core.stats._samples import Floats, paired_outcomes, require_pairs, sample, share


@dataclass(frozen=True)
class Comparison:
    """The result of testing whether two samples differ.

    Attributes:
        statistic: the test's statistic, signed as a minus b where it has a sign.
        p_value: two-sided, 0 to 1.
        n_a: size of the first sample.
        n_b: size of the second.
        method: which test, in words.

    Example:
        >>> print(rim.stats.Comparison(0.5, 0.031, 20, 20, "McNemar, exact"))
        0.5 (p=0.031, n=20 and 20; McNemar, exact)
    """

    statistic: float
    p_value: float
    n_a: int
    n_b: int
    method: str

    def __str__(self) -> str:
        return f"{self.statistic:.3g} (p={self.p_value:.2g}, n={self.n_a} and {self.n_b}; {self.method})"


def ks(a: ArrayLike, b: ArrayLike) -> Comparison:
    """Compare two samples' distributions by the two-sample Kolmogorov-Smirnov test.

    The statistic is the largest gap between the two cumulative distributions (0 to 1); the p-value is
    exact up to 10,000 values a sample and asymptotic above. It assumes independent observations.

    Args:
        a: `[n_a]` numbers.
        b: `[n_b]` numbers.

    Raises:
        InputError: an empty sample or values that are not finite.

    Example:
        >>> print(rim.stats.ks([1, 2, 3, 4], [5, 6, 7, 8]))
        1 (p=0.029, n=4 and 4; Kolmogorov-Smirnov)
    """
    first, second = sample(a, "ks: a"), sample(b, "ks: b")
    result = scipy.stats.ks_2samp(first, second)
    return Comparison(float(result.statistic), float(result.pvalue), first.size, second.size, "Kolmogorov-Smirnov")


def permutation_test(
    a: ArrayLike,
    b: ArrayLike,
    *,
    statistic: Literal["mean", "median"] = "mean",
    paired: bool = False,
    n: int = 10000,
    seed: int = 0,
) -> Comparison:
    """Test two-sidedly whether a and b differ in mean or median, by permutation.

    When all distinct permutations number at most `n` they are enumerated and the p-value is exact;
    otherwise it is `(hits + 1) / (n + 1)`, never 0 (Phipson & Smyth 2010). A hit is a permutation whose
    difference is at least as large in size as the observed one.

    Args:
        a: `[n_a]` numbers.
        b: `[n_b]` numbers; with `paired`, of the same items in the same order.
        statistic: what is compared; the result's statistic is that of a minus that of b.
        paired: exchange a and b within pairs, not across them.
        n: random permutations, and the most that are enumerated.
        seed: of the random permutations.

    Raises:
        InputError: samples of fewer than two values, not finite, or (paired) of different lengths.

    Example:
        >>> print(rim.stats.permutation_test([5, 6, 7], [1, 2, 3]))
        4 (p=0.1, n=3 and 3; permutation of the mean, all 20)
    """
    first, second = (sample(x, f"permutation_test: {name}", at_least=2) for name, x in (("a", a), ("b", b)))
    checking.one_of(statistic, ("mean", "median"), "permutation_test: statistic")
    if paired:
        require_pairs(first, second, "permutation_test")
    n = checking.whole(n, "permutation_test: n", 1)
    centre = np.mean if statistic == "mean" else np.median

    def size_of_difference(x: Floats, y: Floats, axis: int = -1) -> Floats:
        return np.abs(centre(x, axis=axis) - centre(y, axis=axis))

    distinct = 2**first.size if paired else comb(first.size + second.size, first.size)
    result = scipy.stats.permutation_test(
        (first, second),
        size_of_difference,
        permutation_type="samples" if paired else "independent",
        vectorized=True,
        n_resamples=n,
        batch=max(1, 2_000_000 // (first.size + second.size)),
        alternative="greater",
        rng=derive_generator(seed, "permutation_test"),
    )
    return Comparison(
        float(centre(first) - centre(second)),
        float(result.pvalue),
        first.size,
        second.size,
        f"{'paired ' if paired else ''}permutation of the {statistic}, "
        + (f"all {distinct}" if distinct <= n else f"{n} random"),
    )


def mcnemar(a: ArrayLike, b: ArrayLike) -> Comparison:
    """Test two-sidedly whether two yes-no outcomes of the same items differ in rate (McNemar 1947, exact).

    Only the items whose outcomes differ count: under no difference they go either way like a fair coin, so the
    p-value is binomial and holds for any n. The statistic is the rate of a minus that of b.

    Args:
        a: `[item]` of yes (True, 1) and no (False, 0).
        b: of the same items in the same order.

    Raises:
        InputError: samples that are empty, of different lengths, or hold anything else.

    Example:
        >>> print(rim.stats.mcnemar([True] * 6, [False] * 6))
        1 (p=0.031, n=6 and 6; McNemar, exact, 6 of 6 pairs differ)
    """
    first, second = paired_outcomes(a, b, "mcnemar")
    only_a, only_b = int((first > second).sum()), int((second > first).sum())
    differing = only_a + only_b
    p_value = float(scipy.stats.binomtest(only_a, differing).pvalue) if differing else 1.0
    method = f"McNemar, exact, {differing} of {first.size} pairs differ"
    return Comparison((only_a - only_b) / first.size, p_value, first.size, second.size, method)


def fisher(successes_a: int, n_a: int, successes_b: int, n_b: int) -> Comparison:
    """Test two-sidedly whether two independent shares differ (Fisher's exact test); for paired items use `mcnemar`.

    The statistic is the share of a minus that of b.

    Args:
        successes_a: a count.
        n_a: of how many.
        successes_b: the other sample's count.
        n_b: of how many.

    Raises:
        InputError: counts that are no proportion.

    Example:
        >>> print(rim.stats.fisher(9, 10, 2, 10))
        0.7 (p=0.0055, n=10 and 10; Fisher, exact)
    """
    hits_a, of_a = share(successes_a, n_a, "fisher: a")
    hits_b, of_b = share(successes_b, n_b, "fisher: b")
    table = [[hits_a, of_a - hits_a], [hits_b, of_b - hits_b]]
    p_value = float(scipy.stats.fisher_exact(table).pvalue)
    return Comparison(hits_a / of_a - hits_b / of_b, p_value, of_a, of_b, "Fisher, exact")


def benjamini_hochberg(p: ArrayLike) -> Floats:
    """Adjust p-values so that calling those below q significant keeps the false discovery rate at q.

    Source: Benjamini & Hochberg (1995).

    Args:
        p: `[test]`, each 0 to 1.

    Returns:
        Adjusted p-values `[test]`, in the order given.

    Raises:
        InputError: none given, or one outside 0 to 1.

    Example:
        >>> rim.stats.benjamini_hochberg([0.01, 0.02, 0.9])
        array([0.03, 0.03, 0.9 ])
    """
    values = sample(p, "benjamini_hochberg: p")
    if values.min() < 0 or values.max() > 1:
        raise InputError("benjamini_hochberg: a p-value lies outside 0 to 1; pass p-values, not statistics")
    return np.asarray(scipy.stats.false_discovery_control(values, method="bh"), dtype=np.float64)
