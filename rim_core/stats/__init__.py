"""Intervals, effect sizes and tests: each number a claim rests on, with its n and how it was made.

Read `Interval` first: what nearly every function gives.

- `proportion`, `t_interval`, `paired_difference`, `cohens_d`: intervals from formulas.
- `clustered_mean`, `clustered_proportion`, `crossed_mean`: of prompts that come in topics, and of trainings too;
  `auc_parts`, `ratio_parts`: an area under the ROC curve, or a share of means, as such a mean; `jackknife`: of any
  statistic of such prompts.
- `bootstrap`, `of_means`, `resampled_means`, `percentiles`: intervals by resampling prompts, or groups of them.
- `ks`, `permutation_test`, `mcnemar`, `fisher`, `benjamini_hochberg`: tests, as a `Comparison`.
- `split`, `group_codes`, `derive_generator`: seeded divisions and draws that never divide a group.

Every function refuses empty or non-finite input with an `InputError` instead of returning NaN.
"""

from typing import Any

from rim_core.paths import did_you_mean
from rim_core.stats._clustered import (
    auc_parts,
    clustered_mean,
    clustered_proportion,
    crossed_mean,
    jackknife,
    ratio_parts,
)
from rim_core.stats._formulas import Interval, cohens_d, paired_difference, proportion, t_interval
from rim_core.stats._resampling import (
    Groups,
    bootstrap,
    derive_generator,
    group_codes,
    of_means,
    percentiles,
    resampled_means,
    split,
)
from rim_core.stats._samples import Floats, Ints, yes_or_no
from rim_core.stats._tests import Comparison, benjamini_hochberg, fisher, ks, mcnemar, permutation_test

__all__ = [
    "Comparison",
    "Floats",
    "Groups",
    "Interval",
    "Ints",
    "auc_parts",
    "benjamini_hochberg",
    "bootstrap",
    "clustered_mean",
    "clustered_proportion",
    "cohens_d",
    "crossed_mean",
    "derive_generator",
    "fisher",
    "group_codes",
    "jackknife",
    "ks",
    "mcnemar",
    "of_means",
    "paired_difference",
    "percentiles",
    "permutation_test",
    "proportion",
    "ratio_parts",
    "resampled_means",
    "split",
    "t_interval",
    "yes_or_no",
]


def __getattr__(name: str) -> Any:
    raise AttributeError(f"rim.stats has no {name!r}{did_you_mean(name, __all__)}")
