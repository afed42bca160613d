"""Linear probes by layer, with a leak-free split, intervals, and controls that give accuracy a meaning.

The published probe is paper C, section III.A: a 70:30 split, scikit-learn's StandardScaler, L2-regularised
logistic regression, and shuffled labels as a control. Here the split comes before any statistic and can be by
group, every number has an interval, and what the words alone give away is measured on the same split.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import scipy.special
from numpy.typing import ArrayLike, NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupShuffleSplit, train_test_split
from sklearn.preprocessing import StandardScaler

from rim_core import checking, stats
from rim_core.errors import InputError
from rim_core.stats import Floats, Groups, Interval, Ints
from rim_core.tables import by_layer

if TYPE_CHECKING:
    import altair as alt

CONTROLS = ("shuffled", "random_features", "bag_of_words", "length")
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

    @property
    def correct(self) -> NDArray[np.bool_]:
        """Whether each test prompt is classified correctly, `[layer, test]`."""
        return (self.decision_values > 0) == (self.test_labels == 1)


@dataclass(frozen=True, eq=False)
class ProbeResult(LayerProbes):
    """The probes of all layers with their controls and their split.

    Attributes:
        controls: the same measurements for each control, by name. Those of the texts are one probe, repeated
            for each layer.
        differences: the probe's accuracy minus each control's, paired by test prompt, by name: `[layer]` each.
        train, test: indices of the prompts on either side of the split.
        test_groups: the groups of the test prompts, numbered in order of appearance, `[test]`; or None.
        majority: test accuracy of always answering the label more frequent in training: what a probe has
            to beat.
        interval_method: how the intervals were made, in words.
    """

    controls: Mapping[str, LayerProbes]
    differences: Mapping[str, Interval]
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

    def to_frame(self, measure: Literal["accuracy", "difference"] = "accuracy") -> pd.DataFrame:
        """Give a row for each layer and series: layer, series, estimate, low, high, n, and for accuracy converged.

        Series of the accuracy are "probe" and the controls; of the difference the controls it is taken from.
        """
        if checking.one_of(measure, ("accuracy", "difference"), "measure") == "difference":
            return by_layer(self.differences)
        series: dict[str, LayerProbes] = {"probe": self, **self.controls}
        frame = by_layer({name: Interval(p.accuracy, p.low, p.high, self.n_test) for name, p in series.items()})
        return frame.assign(converged=np.concatenate([probes.converged for probes in series.values()]))

    def plot(self, title: str = "Probe accuracy by layer") -> "alt.LayerChart":
        """Draw accuracy over layers with the controls; the reference line is the majority baseline."""
        from rim_core import charts

        accuracy = f"accuracy on {self.n_test} held-out prompts"
        return charts.by_layer(self.to_frame(), series="series", title=title, y_title=accuracy, chance=self.majority)


def probe_layers(
    features: ArrayLike | Any,
    labels: ArrayLike | Any,
    *,
    groups: Groups = None,
    texts: Sequence[str] | None = None,
    controls: str | Sequence[str] | None = None,
    positive: Any = None,
    seed: int = 0,
    test_size: float = 0.3,
    C: float = 1.0,
    max_iter: int = 1000,
) -> ProbeResult:
    """Train a linear probe a layer and score it on held-out prompts, beside probes that should fail.

    The split is made first, from labels and groups alone; the scaler sees training prompts only. Without
    groups it is random and stratified, as published (paper C, section III.A). With groups no group is on
    both sides, so that recognising a topic cannot pass for recognising the label.

    Controls without information: "shuffled" permutes the labels within each side of the split (the published
    control; the control task of Hewitt & Liang 2019), one permutation for all layers; "random_features" keeps the
    labels and replaces the features by Gaussian noise of the same shape (scale is moot after standardising).
    Controls without a model, which show what the texts alone give away: "bag_of_words" is the same probe on the
    counts of the words of the training prompts, "length" on the numbers of words and of characters.

    Intervals are Clopper-Pearson over test prompts, and Newcombe's paired ones for the differences. With groups
    they are a bootstrap over test groups, and at each end no tighter than these: a bootstrap of a perfect score
    has no width.

    Args:
        features: `[prompt, layer, d]`, array or tensor, finite.
        labels: `[prompt]` of 0 and 1, or of any two values of which `positive` is named.
        groups: `[prompt]` of what must not be split (category, pair), or None.
        texts: `[prompt]`, what the controls of the texts read.
        controls: one or several of "shuffled", "random_features", "bag_of_words" and "length". By default the first
            two, and "bag_of_words" where texts are given.
        positive: the label that counts as 1; the other one counts as 0.
        seed: of the split, the permutation, the noise and the bootstrap.
        test_size: share of prompts (with groups: of groups) held out. Published: 0.3.
        C: inverse strength of the L2 penalty, scikit-learn's default; not stated by the paper.
        max_iter: the optimiser's limit; fits that reach it are False in `converged`.

    Raises:
        InputError: wrong shapes, features not finite, labels of other than two kinds, an unknown control or one of
            the texts without texts, or too few prompts or groups to have both labels on both sides.

    Example:
        Two layers, of which the second holds the label:

        >>> import numpy as np
        >>> labels = np.tile(["risky", "safe"], 40)
        >>> features = np.random.default_rng(0).normal(size=(80, 2, 8))
        >>> features[:, 1, 0] += 5 * (labels == "risky")
        >>> found = rim.probe_layers(features, labels, positive="risky", groups=np.arange(80) // 4)
        >>> bool(found.accuracy[1] > 0.9), bool(found.low[0] < 0.5)
        (True, True)
        >>> bool(found.differences["shuffled"].low[1] > 0)
        True
    """
    data, y, codes = _checked(features, labels, positive, groups)
    if controls is None:
        controls = ("shuffled", "random_features", *([] if texts is None else ["bag_of_words"]))
    controls = [controls] if isinstance(controls, str) else checking.listed(controls, "probe_layers: controls")
    for name in controls:
        checking.one_of(name, CONTROLS, "probe_layers: control")
    checking.number(test_size, "probe_layers: test_size", above=0, below=1)
    checking.number(C, "probe_layers: C", above=0)
    checking.whole(max_iter, "probe_layers: max_iter", 1)
    train, test = _split(y, codes, test_size, stats.derive_generator(seed, "probes", "split"))
    shuffler = stats.derive_generator(seed, "probes", "shuffled")
    shuffled = shuffler.permutation(y[train]), shuffler.permutation(y[test])
    n_layers = data.shape[1]

    fits: dict[str, list[_Fit]] = {name: [] for name in ("probe", *controls)}
    for name in {"bag_of_words", "length"}.intersection(fits):
        counted = _counted(texts, train, name, len(y))
        fits[name] = [_TrainingSpan(counted[train], counted[test]).fit(y[train], C, max_iter)] * n_layers
    for layer in range(n_layers):
        span = _TrainingSpan(data[train, layer], data[test, layer])
        fits["probe"].append(span.fit(y[train], C, max_iter))
        if "shuffled" in fits:
            fits["shuffled"].append(span.fit(shuffled[0], C, max_iter))
        if "random_features" in fits:
            rng = stats.derive_generator(seed, "probes", "random_features", layer)
            noise = rng.standard_normal((len(y), data.shape[2]), dtype=np.float32)
            fits["random_features"].append(_TrainingSpan(noise[train], noise[test]).fit(y[train], C, max_iter))

    test_codes = None if codes is None else codes[test]
    measured = {
        name: _measure(found, shuffled[1] if name == "shuffled" else y[test], test_codes, seed)
        for name, found in fits.items()
    }
    probe = measured.pop("probe")
    majority = int(y[train].mean() > 0.5)
    grouped = "" if test_codes is None else f"bootstrap over {len(np.unique(test_codes))} groups, at least "
    return ProbeResult(
        **vars(probe),
        controls=_ByControl(measured),
        differences=_ByControl(
            {name: _difference(probe, control, test_codes, seed) for name, control in measured.items()}
        ),
        train=train,
        test=test,
        test_groups=test_codes,
        majority=float((y[test] == majority).mean()),
        interval_method=f"{grouped}Clopper-Pearson",
    )


class _ByControl(dict[str, Any]):
    """What was measured by control; raises InputError for one that was not asked for."""

    def __missing__(self, name: str) -> Any:
        return checking.one_of(name, self, "control of this result")


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
    found = _means(correct, [stats.proportion(int(hits), len(labels)) for hits in correct.sum(axis=1)], groups, seed)
    return LayerProbes(
        accuracy=found.estimate,
        low=found.low,
        high=found.high,
        weights=np.stack([fit.weights for fit in fits]).astype(np.float32),
        bias=np.array([fit.bias for fit in fits]),
        decision_values=decisions,
        converged=np.array([fit.converged for fit in fits]),
        test_labels=labels,
    )


def _difference(probe: LayerProbes, control: LayerProbes, groups: Ints | None, seed: int) -> Interval:
    right, its = probe.correct, control.correct
    exact = [stats.paired_difference(*pair) for pair in zip(right, its, strict=True)]
    return _means(right.astype(np.float64) - its, exact, groups, seed)


def _means(values: NDArray, exact: Sequence[Interval], groups: Ints | None, seed: int) -> Interval:
    """Means of `[layer, test]` over test prompts with their exact intervals, by group no tighter than a bootstrap's."""
    low, high = np.array([each.low for each in exact]), np.array([each.high for each in exact])
    if groups is not None:
        found = stats.of_means(values.T, groups=groups, seed=seed)
        low, high = np.minimum(low, found.low), np.maximum(high, found.high)
    return Interval(values.mean(axis=1), low, high, values.shape[1], method=exact[0].method)


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


def _checked(features: Any, labels: Any, positive: Any, groups: Groups) -> tuple[NDArray, Ints, Ints | None]:
    """Features as NumPy's, labels as 0 and 1, and groups as numbers."""
    given = checking.array(
        features, "probe_layers: features", shape=("prompt", "layer", "d (flatten heads into it)"), finite=False
    )
    if hasattr(given, "cpu"):
        # NumPy has no bfloat16.
        given = given.cpu().float() if given.is_floating_point() else given.cpu()
    data = checking.finite(np.asarray(given), "probe_layers: features", axis=1)
    given = np.asarray(labels.detach().cpu() if hasattr(labels, "detach") else labels)
    if given.shape != data.shape[:1]:
        raise InputError(f"probe_layers: labels have shape {given.shape} for {len(data)} prompts; give one a prompt")
    kinds = sorted(set(given.tolist()), key=str)
    if positive is None and kinds == [0, 1]:
        positive = 1
    if len(kinds) == 2 and positive is not None and positive not in kinds:
        raise InputError(f"probe_layers: positive={positive!r} is no label; the labels are {checking.shown(kinds)}")
    if len(kinds) != 2 or positive is None:
        raise InputError(
            f"probe_layers: labels hold {checking.shown(kinds)}; give 0 and 1, or two others and which one counts as "
            "1 as positive="
        )
    y = (given == positive).astype(np.int64)
    return data, y, None if groups is None else stats.group_codes(groups, len(y))


def _counted(texts: Sequence[str] | None, train: Ints, name: str, n: int) -> NDArray:
    """What a control of the texts reads, `[prompt, feature]`: counts of the training prompts' words, or lengths."""
    if texts is None:
        raise InputError(f"probe_layers: the control {name!r} reads the prompts; pass them as texts=")
    given = checking.listed(texts, "probe_layers: texts")
    if len(given) != n or not all(isinstance(text, str) for text in given):
        raise InputError(f"probe_layers: texts must be {n} texts, one a prompt, not {checking.shown(texts)}")
    if name == "length":
        return np.array([[len(text.split()), len(text)] for text in given])
    try:
        words = CountVectorizer(token_pattern=r"(?u)\b\w+\b").fit([given[row] for row in train])
    except ValueError:
        raise InputError("probe_layers: the training prompts' texts hold no word to count") from None
    return words.transform(given).toarray()
