"""Linear probes by layer, with a leak-free split, intervals, and controls that give accuracy a meaning.

The published probe is paper C, section III.A: a 70:30 split, scikit-learn's StandardScaler, L2-regularised
logistic regression, shuffled labels as a control and the cosine of adjacent layers' weights. Here the split
comes before any statistic and can be by group, and every number has an interval and a null.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import scipy.special
import scipy.stats
from numpy.typing import ArrayLike, NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupShuffleSplit, train_test_split
from sklearn.preprocessing import StandardScaler

from rim_core import stats
from rim_core.errors import InputError
from rim_core.stats import Floats, Groups, Ints

if TYPE_CHECKING:
    import altair as alt

CONTROLS = ("shuffled", "random_features")
SOLVER_TOLERANCE = 1e-8
# A fit counts as converged when no component of the mean loss's gradient exceeds this.
GRADIENT_LIMIT = 1e-6
SPLITS_TRIED = 64


@dataclass(frozen=True, eq=False)
class LayerProbes:
    """One probe a layer, all trained and tested on the same prompts.

    Attributes:
        accuracy: share of test prompts classified correctly, `[layer]`.
        low, high: ends of the accuracy's 95 % interval, `[layer]`.
        weights: in the space of the features as given (scaling undone), float32 `[layer, d]`.
        bias: `[layer]`; `features @ weights + bias > 0` predicts label 1.
        decision_values: that sum for the test prompts, in log-odds, `[layer, test]`.
        converged: whether the optimiser reached its tolerance, `[layer]`; a False accuracy is that of
            an unfinished fit.
        test_labels: the labels the probes were scored against, `[test]`.
    """

    accuracy: Floats
    low: Floats
    high: Floats
    weights: NDArray[np.float32]
    bias: Floats
    decision_values: Floats
    converged: NDArray[np.bool_]
    test_labels: Ints


@dataclass(frozen=True, eq=False)
class ProbeResult(LayerProbes):
    """The probes of all layers with their controls and their split.

    Attributes:
        controls: the same measurements for each control, by name.
        train, test: indices of the prompts on either side of the split.
        test_groups: the groups of the test prompts, numbered in order of appearance, `[test]`; or None.
        majority: test accuracy of always answering the label more frequent in training: what a probe has
            to beat.
        interval_method: how the intervals were made, in words.
    """

    controls: Mapping[str, LayerProbes]
    train: Ints
    test: Ints
    test_groups: Ints | None
    majority: float
    interval_method: str

    @property
    def n_train(self) -> int:
        """Prompts trained on."""
        return len(self.train)

    @property
    def n_test(self) -> int:
        """Prompts tested on."""
        return len(self.test)

    def to_frame(self) -> pd.DataFrame:
        """Give a row for each layer and series: layer, series, accuracy, low, high, converged."""
        series: dict[str, LayerProbes] = {"probe": self, **self.controls}
        return pd.concat(
            [
                pd.DataFrame(
                    {
                        "layer": np.arange(len(probes.accuracy)),
                        "series": name,
                        "accuracy": probes.accuracy,
                        "low": probes.low,
                        "high": probes.high,
                        "converged": probes.converged,
                    }
                )
                for name, probes in series.items()
            ],
            ignore_index=True,
        )

    def plot(self, title: str = "Probe accuracy by layer") -> "alt.LayerChart":
        """Draw accuracy over layers with the controls; the reference line is the majority baseline."""
        from rim_core import charts

        best = int(self.accuracy.argmax())
        controls = "; ".join(f"{name} {c.accuracy.mean():.2f}" for name, c in self.controls.items())
        return charts.by_layer(
            self.to_frame(),
            "accuracy",
            series="series",
            title=title,
            y_title=f"accuracy on {self.n_test} held-out prompts",
            description=(
                f"Probe accuracy over {len(self.accuracy)} layers, mean {self.accuracy.mean():.2f}, best "
                f"{self.accuracy[best]:.2f} at layer {best}; majority baseline {self.majority:.2f}"
                + (f"; mean of controls: {controls}." if controls else ".")
            ),
            chance=self.majority,
        )


@dataclass(frozen=True, eq=False)
class Similarity:
    """How alike the probes of layers l and l + 1 are.

    Attributes:
        value: -1 to 1, `[layer - 1]`; NaN where a probe has no direction at all.
        low, high: ends of its 95 % interval, `[layer - 1]`; NaN where a single cosine has none.
    """

    value: Floats
    low: Floats
    high: Floats


@dataclass(frozen=True, eq=False)
class AdjacentSimilarity:
    """Similarity of adjacent layers' probes, by measure and series.

    Attributes:
        measures: measure -> series -> `Similarity`. Measures are those of `adjacent_similarity`; series are
            "probe", and its nulls "shuffled" and "random_directions".
    """

    measures: Mapping[str, Mapping[str, Similarity]]

    def to_frame(self) -> pd.DataFrame:
        """Give a row a pair of layers: layer (the lower one), measure, series, similarity, low, high."""
        return pd.concat(
            [
                pd.DataFrame(
                    {
                        "layer": np.arange(len(similarity.value)),
                        "measure": measure,
                        "series": series,
                        "similarity": similarity.value,
                        "low": similarity.low,
                        "high": similarity.high,
                    }
                )
                for measure, by_series in self.measures.items()
                for series, similarity in by_series.items()
            ],
            ignore_index=True,
        )

    def plot(self, measure: str = "decision_correlation", title: str | None = None) -> "alt.LayerChart":
        """Draw one measure over layers beside its nulls.

        Raises:
            InputError: a measure this result does not hold.
        """
        from rim_core import charts

        if measure not in self.measures:
            raise InputError(f"adjacent_similarity: no measure {measure!r}; use one of {sorted(self.measures)}")
        words = measure.replace("_", " ")
        means = "; ".join(
            f"{series} {np.nanmean(similarity.value):.2f}" for series, similarity in self.measures[measure].items()
        )
        frame = self.to_frame()
        return charts.by_layer(
            frame[frame["measure"] == measure],
            "similarity",
            series="series",
            title=title or f"Adjacent layers: {words}",
            y_title=words,
            description=f"Similarity of each layer's probe to the next layer's ({words}); means: {means}.",
            chance=0.0,
        )


def probe_layers(
    features: "ArrayLike | Any",
    labels: "ArrayLike | Any",
    groups: Groups = None,
    controls: Sequence[str] = CONTROLS,
    seed: int = 0,
    test_size: float = 0.3,
    C: float = 1.0,
    max_iter: int = 1000,
) -> ProbeResult:
    """Train a linear probe a layer and score it on held-out prompts, beside probes that should fail.

    The split is made first, from labels and groups alone; the scaler sees training prompts only. Without
    groups it is random and stratified, as published (paper C, section III.A). With groups no group is on
    both sides, so that recognising a topic cannot pass for recognising the label.

    The controls: "shuffled" permutes the labels within each side of the split (the published control; the
    control task of Hewitt & Liang 2019), one permutation for all layers; "random_features" keeps the labels
    and replaces the features by Gaussian noise of the same shape (scale is moot after standardising).

    Intervals are Clopper-Pearson over test prompts. With groups they are a bootstrap over test groups, and
    at each end no tighter than Clopper-Pearson: a bootstrap of a perfect score has no width.

    Args:
        features: `[prompt, layer, d]`, array or tensor, finite.
        labels: `[prompt]` of 0 and 1.
        groups: `[prompt]` of what must not be split (category, pair), or None.
        controls: any of "shuffled" and "random_features".
        seed: of the split, the permutation, the noise and the bootstrap.
        test_size: share of prompts (with groups: of groups) held out. Published: 0.3.
        C: inverse strength of the L2 penalty, scikit-learn's default; not stated by the paper.
        max_iter: the optimiser's limit; fits that reach it are False in `converged`.

    Raises:
        InputError: wrong shapes, features not finite, labels other than 0 and 1 or of one kind only, or too
            few prompts or groups to have both labels on both sides.
    """
    data, y, codes = _checked(features, labels, groups)
    unknown = sorted(set(controls) - set(CONTROLS))
    if unknown:
        raise InputError(f"probe_layers: no control {unknown[0]!r}; use any of {', '.join(CONTROLS)}")
    if not (0 < test_size < 1 and C > 0 and max_iter >= 1):
        raise InputError(
            f"probe_layers: test_size={test_size}, C={C}, max_iter={max_iter}; "
            "need 0 < test_size < 1, C > 0, max_iter >= 1"
        )
    train, test = _split(y, codes, test_size, stats.derive_generator(seed, "probes", "split"))
    shuffler = stats.derive_generator(seed, "probes", "shuffled")
    targets = {"probe": (y[train], y[test]), "random_features": (y[train], y[test])}
    targets["shuffled"] = (shuffler.permutation(y[train]), shuffler.permutation(y[test]))

    fits: dict[str, list[_Fit]] = {name: [] for name in ("probe", *controls)}
    for layer in range(data.shape[1]):
        span = _TrainingSpan(data[train, layer], data[test, layer])
        for name in fits:
            if name == "random_features":
                rng = stats.derive_generator(seed, "probes", "random_features", layer)
                noise = rng.standard_normal((len(y), data.shape[2]), dtype=np.float32)
                noise_span = _TrainingSpan(noise[train], noise[test])
                fits[name].append(noise_span.fit(targets[name][0], C, max_iter))
            else:
                fits[name].append(span.fit(targets[name][0], C, max_iter))

    test_codes = None if codes is None else codes[test]
    measured = {name: _measure(found, targets[name][1], test_codes, seed) for name, found in fits.items()}
    majority = int(y[train].mean() > 0.5)
    return ProbeResult(
        **vars(measured.pop("probe")),
        controls=measured,
        train=train,
        test=test,
        test_groups=test_codes,
        majority=float((y[test] == majority).mean()),
        interval_method=(
            "Clopper-Pearson"
            if test_codes is None
            else f"bootstrap over {len(np.unique(test_codes))} groups, at least Clopper-Pearson"
        ),
    )


def adjacent_similarity(
    result: ProbeResult,
    shared: "ArrayLike | Any | None" = None,
    shared_shuffled: "ArrayLike | Any | None" = None,
    seed: int = 0,
) -> AdjacentSimilarity:
    """Compare each layer's probe with the next layer's, as published and in ways that can tell.

    - "own_basis_cosine", as published (paper C, section III.A, "persistence control"): cosine of the weight
      vectors. Each layer's MLP neurons are a basis of their own, so this is near 0 whatever the layers
      represent; the random-direction null shows it.
    - "decision_correlation": Pearson correlation of the two probes' decision values over held-out prompts,
      which needs no common basis. Two good probes of one label correlate for that reason alone, so
    - "decision_correlation_within_label" first takes each label's mean away: what is left is whether the
      two probes also agree on which prompts of a label are the clearer ones.
    - "shared_space_cosine", with `shared`: cosine of directions in one space, such as each probe's neurons
      written into the residual stream by `down_proj`.

    Nulls: "shuffled" is the same measure on the shuffled-label probes (for `shared`, on `shared_shuffled`
    if given); "random_directions" is 0 with the exact 95 % range of the cosine of two random directions.
    Intervals of correlations are a bootstrap over held-out prompts, or over groups where the result has them.

    Args:
        result: of `probe_layers`, with its "shuffled" control and at least two layers.
        shared: directions `[layer, d_model]` in one space, or None.
        shared_shuffled: the same for the shuffled-label probes, or None.
        seed: of the bootstrap.

    Raises:
        InputError: no shuffled control, fewer than two layers, or directions of another shape or not finite.
    """
    if "shuffled" not in result.controls:
        raise InputError('adjacent_similarity: the result has no null; pass controls=("shuffled",) to probe_layers')
    if len(result.accuracy) < 2:
        raise InputError("adjacent_similarity: one layer has no neighbour; probe at least two layers")
    if shared is None and shared_shuffled is not None:
        raise InputError("adjacent_similarity: shared_shuffled is the null of shared; pass shared as well")
    series: dict[str, LayerProbes] = {"probe": result, "shuffled": result.controls["shuffled"]}
    measures = {
        "own_basis_cosine": {
            **{name: _cosines(probes.weights) for name, probes in series.items()},
            "random_directions": _random_cosines(*result.weights.shape),
        },
        "decision_correlation": {
            name: _correlations(probes.decision_values, result.test_groups, seed) for name, probes in series.items()
        },
        "decision_correlation_within_label": {
            name: _correlations(_within_label(probes), result.test_groups, seed) for name, probes in series.items()
        },
    }
    if shared is not None:
        directions = {"probe": shared, "shuffled": shared_shuffled}
        checked = {
            name: _checked_directions(given, len(result.accuracy))
            for name, given in directions.items()
            if given is not None
        }
        measures["shared_space_cosine"] = {
            **{name: _cosines(given) for name, given in checked.items()},
            "random_directions": _random_cosines(*checked["probe"].shape),
        }
    return AdjacentSimilarity(measures)


@dataclass(frozen=True)
class _Fit:
    weights: Floats
    bias: float
    decision_values: Floats
    converged: bool


class _TrainingSpan:
    """One layer's standardised features, fitted in the span of the training prompts.

    The L2-optimal weights lie in that span and the penalty does not change under rotation, so with fewer
    prompts than features the problem is solved exactly in as many dimensions as there are prompts
    (Hastie & Tibshirani 2004), at a small part of the cost. Labels change nothing here, so that probe and
    shuffled control share the work.
    """

    def __init__(self, train: NDArray, test: NDArray) -> None:
        self.scaler = StandardScaler().fit(train.astype(np.float64))
        self.train: Floats = self.scaler.transform(train.astype(np.float64))
        self.test: Floats = self.scaler.transform(test.astype(np.float64))
        n, d = train.shape
        self.rotation: Floats | None = None
        self.coordinates = self.train
        if n < d and self.train.any():
            values, vectors = np.linalg.eigh(self.train @ self.train.T)
            kept = values > values[-1] * n * np.finfo(np.float64).eps
            lengths = np.sqrt(values[kept])
            self.coordinates = vectors[:, kept] * lengths
            self.rotation = vectors[:, kept] / lengths

    def fit(self, labels: Ints, C: float, max_iter: int) -> _Fit:
        model = LogisticRegression(C=C, solver="newton-cg", tol=SOLVER_TOLERANCE, max_iter=max_iter)
        with warnings.catch_warnings():
            # What these would say is measured below, and kept in the result instead of scrolling away.
            warnings.simplefilter("ignore", ConvergenceWarning)
            warnings.filterwarnings("ignore", message="Line Search failed")
            model.fit(self.coordinates, labels)
        inner: Floats = model.coef_[0]
        intercept = float(model.intercept_[0])
        residual = scipy.special.expit(self.coordinates @ inner + intercept) - labels
        gradient = self.coordinates.T @ residual / len(labels) + inner / (C * len(labels))
        steepest = max(np.abs(gradient).max(), abs(residual.mean()))

        scaled = inner if self.rotation is None else self.train.T @ (self.rotation @ inner)
        weights = scaled / self.scaler.scale_
        return _Fit(
            weights=weights,
            bias=intercept - float(weights @ self.scaler.mean_),
            decision_values=self.test @ scaled + intercept,
            converged=bool(steepest <= GRADIENT_LIMIT),
        )


def _measure(fits: Sequence[_Fit], labels: Ints, groups: Ints | None, seed: int) -> LayerProbes:
    decisions = np.stack([fit.decision_values for fit in fits])
    correct = (decisions > 0) == (labels == 1)
    exact = [stats.proportion(int(hits), len(labels)) for hits in correct.sum(axis=1)]
    low, high = np.array([i.low for i in exact]), np.array([i.high for i in exact])
    if groups is not None:
        ends = np.percentile(stats.resampled_means(correct.T, groups, seed=seed), [2.5, 97.5], axis=0)
        low, high = np.minimum(low, ends[0]), np.maximum(high, ends[1])
    return LayerProbes(
        accuracy=correct.mean(axis=1),
        low=low,
        high=high,
        weights=np.stack([fit.weights for fit in fits]).astype(np.float32),
        bias=np.array([fit.bias for fit in fits]),
        decision_values=decisions,
        converged=np.array([fit.converged for fit in fits]),
        test_labels=labels,
    )


def _split(y: Ints, groups: Ints | None, test_size: float, rng: np.random.Generator) -> tuple[Ints, Ints]:
    state = int(rng.integers(2**32))
    if groups is None:
        try:
            train, test = train_test_split(np.arange(len(y)), test_size=test_size, stratify=y, random_state=state)
        except ValueError as error:
            raise InputError(
                f"probe_layers: {len(y)} prompts cannot be split at test_size={test_size} with both labels "
                "on both sides; give more prompts"
            ) from error
        return np.sort(train), np.sort(test)

    splitter = GroupShuffleSplit(SPLITS_TRIED, test_size=test_size, random_state=state)
    try:
        tried = list(splitter.split(y, groups=groups))
    except ValueError:
        tried = []
    usable = [
        (train, test)
        for train, test in tried
        if len(np.unique(y[train])) == 2
        and len(np.unique(y[test])) == 2
        and min(len(np.unique(groups[train])), len(np.unique(groups[test]))) >= 2
    ]
    if not usable:
        raise InputError(
            f"probe_layers: {groups.max() + 1} groups cannot be split at test_size={test_size} with two "
            "groups and both labels on each side; give more groups or groups=None"
        )

    def imbalance(split: tuple[Ints, Ints]) -> float:
        _, test = split
        return abs(len(test) / len(y) - test_size) + abs(y[test].mean() - y.mean())

    # Rounding lets the first split win that is about as balanced as any: seeds then give different splits.
    return min(usable, key=lambda split: round(imbalance(split), 1))


def _checked(features: Any, labels: Any, groups: Groups) -> tuple[NDArray, Ints, Ints | None]:
    data = _as_array(features)
    if data.ndim != 3 or 0 in data.shape or data.dtype.kind not in "fiu":
        raise InputError(
            f"probe_layers: features are {data.dtype} {data.shape}; give numbers [prompt, layer, d] "
            "(flatten heads into d)"
        )
    for layer in range(data.shape[1]):
        if not np.isfinite(data[:, layer]).all():
            prompts = np.flatnonzero(~np.isfinite(data[:, layer]).all(axis=1))
            raise InputError(
                f"probe_layers: features hold NaN or infinity at layer {layer}, first for prompt "
                f"{prompts[0]} ({len(prompts)} prompts); capture them in float32 or drop those prompts"
            )
    given = _as_array(labels)
    if given.shape != data.shape[:1]:
        raise InputError(
            f"probe_layers: labels have shape {given.shape} for {len(data)} prompts; give one label a prompt"
        )
    values = {str(value) for value in np.unique(given)}
    if not np.isin(given, [0, 1]).all():
        raise InputError(f"probe_layers: labels hold {sorted(values)[:4]}; use 0 and 1")
    y = given.astype(np.int64)
    if len(values) < 2:
        raise InputError(f"probe_layers: every label is {y[0]}; a probe needs prompts of both kinds")
    return data, y, None if groups is None else stats.group_codes(groups, len(y))


def _as_array(values: Any) -> NDArray:
    """Give a numpy array; a float tensor comes back as float32, since numpy has no bfloat16."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        return np.asarray(values.float() if values.is_floating_point() else values)
    try:
        return np.asarray(values)
    except ValueError as error:
        raise InputError("probe_layers: ragged lists are no array; give equal lengths throughout") from error


def _cosines(directions: NDArray) -> Similarity:
    given = directions.astype(np.float64)
    norms = np.linalg.norm(given, axis=1)
    dots = (given[:-1] * given[1:]).sum(axis=1)
    sizes = norms[:-1] * norms[1:]
    value = np.divide(dots, sizes, out=np.full(len(dots), np.nan), where=sizes > 0)
    return Similarity(value, np.full_like(value, np.nan), np.full_like(value, np.nan))


def _random_cosines(n_layers: int, d: int) -> Similarity:
    """Give the null of independent uniform directions: (1 + cosine) / 2 is Beta((d - 1) / 2, (d - 1) / 2)."""
    end = 1.0 if d == 1 else float(2 * scipy.stats.beta.ppf(0.975, (d - 1) / 2, (d - 1) / 2) - 1)
    pairs = n_layers - 1
    return Similarity(np.zeros(pairs), np.full(pairs, -end), np.full(pairs, end))


def _correlations(decisions: Floats, groups: Ints | None, seed: int) -> Similarity:
    spread = decisions.std(axis=1, keepdims=True)
    # Standardising first keeps the sums of squares below from cancelling.
    z = (decisions - decisions.mean(axis=1, keepdims=True)) / np.where(spread > 0, spread, np.nan)
    a, b = z[:-1], z[1:]
    value = (a * b).mean(axis=1)
    moments = np.concatenate([a, b, a * a, b * b, a * b])
    drawn = stats.resampled_means(np.nan_to_num(moments).T, groups, n_resamples=1000, seed=seed)
    mean_a, mean_b, aa, bb, ab = np.split(drawn, 5, axis=1)
    variances = (aa - mean_a**2) * (bb - mean_b**2)
    resampled = np.divide(ab - mean_a * mean_b, np.sqrt(np.abs(variances)), out=np.zeros_like(ab), where=variances > 0)
    low, high = np.percentile(resampled, [2.5, 97.5], axis=0)
    undefined = np.isnan(value)
    return Similarity(value, np.where(undefined, np.nan, low), np.where(undefined, np.nan, high))


def _within_label(probes: LayerProbes) -> Floats:
    centred = probes.decision_values.copy()
    for label in (0, 1):
        members = probes.test_labels == label
        centred[:, members] -= centred[:, members].mean(axis=1, keepdims=True)
    return centred


def _checked_directions(given: Any, n_layers: int) -> Floats:
    directions = _as_array(given)
    if directions.ndim != 2 or len(directions) != n_layers or not np.isfinite(directions).all():
        raise InputError(
            f"adjacent_similarity: directions {directions.shape} must be finite and [layer, d_model] with "
            f"{n_layers} layers; pass one direction a probed layer"
        )
    return directions.astype(np.float64)
