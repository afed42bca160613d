"""Directions of activations: differences of means, projections and cosines, on captured tensors."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd
import torch
from sklearn.covariance import ledoit_wolf_shrinkage
from torch import Tensor

from rim_core import stats
from rim_core.errors import InputError
from rim_core.measures._linear import checked, dot, normalised, principal
from rim_core.stats import Interval

if TYPE_CHECKING:
    import altair as alt


def difference_in_means(a: Tensor, b: Tensor, *, normalise: bool = False) -> Tensor:
    """Give the mean of `a` minus the mean of `b`, accumulated in float64 (Arditi et al. 2024, section 2.3).

    Args:
        a, b: activations `[prompt, ..., d]`, the same shape but for the number of prompts.
        normalise: scale each direction to length 1.

    Returns:
        float32 `[..., d]`, in the unit of the activations.

    Raises:
        InputError: shapes that differ, no prompts, values that are not finite, or a zero direction to normalise.

    Example:
        >>> import torch
        >>> rim.difference_in_means(torch.tensor([[1.0, 2.0], [3.0, 2.0]]), torch.tensor([[0.0, 2.0]]))
        tensor([2., 0.])
    """
    first, second = _two_sets("difference_in_means", a, b)
    direction = first.mean(0, dtype=torch.float64) - second.mean(0, dtype=torch.float64)
    return (normalised(direction, "difference_in_means") if normalise else direction).float()


def project(values: Tensor, direction: Tensor) -> Tensor:
    """Give the scalar projection of activations onto the unit vector along a direction.

    Args:
        values: `[..., d]`, or `[..., layer, d]` for a direction a layer.
        direction: `[d]`, or `[layer, d]`; its length is of no account.

    Returns:
        float32 `[...]` or `[..., layer]`, in the unit of the activations (not a cosine).

    Raises:
        InputError: shapes that do not fit, values that are not finite, or a direction of length 0.

    Example:
        >>> import torch
        >>> rim.project(torch.tensor([[3.0, 4.0], [0.0, 1.0]]), torch.tensor([10.0, 0.0]))
        tensor([3., 0.])
    """
    given, vectors = checked(values, "project: values"), checked(direction, "project: direction")
    _refuse_other_shapes("project", values=given, direction=vectors)
    return dot(given, normalised(vectors, "project: direction")).float()


def cosine(u: Tensor, v: Tensor) -> Tensor:
    """Give the cosine of directions, or of activations with directions, in the last dimension.

    Args:
        u: `[..., d]`.
        v: of the same shape, or one that `u` ends in, such as `[d]` or `[layer, d]`; or the other way round.

    Returns:
        float32 `[...]`, the longer shape without d: -1 to 1.

    Raises:
        InputError: shapes that do not fit, values that are not finite, or a vector of length 0.

    Example:
        >>> import torch
        >>> rim.cosine(torch.tensor([[2.0, 0.0], [1.0, 1.0]]), torch.tensor([1.0, 0.0]))
        tensor([1.0000, 0.7071])
    """
    first, second = checked(u, "cosine: u"), checked(v, "cosine: v")
    longer, shorter = ("u", "v") if first.ndim >= second.ndim else ("v", "u")
    given = {"u": first, "v": second}
    _refuse_other_shapes("cosine", **{longer: given[longer], shorter: given[shorter]})
    return (normalised(first, "cosine: u") * normalised(second, "cosine: v")).sum(-1).float()


@dataclass(frozen=True, eq=False)
class Separation:
    """How far two sets of activations lie apart along a direction, by layer.

    Attributes:
        d: Cohen's d of `a` against `b` with its interval, `[layer]` each; NaN where neither set has any spread.
        n_a, n_b: prompts of either set.
    """

    d: Interval
    n_a: int
    n_b: int

    @property
    def best(self) -> int:
        """The layer where the sets lie furthest apart, `|d|` largest: choose by it on one split, report on another."""
        return int(np.nanargmax(np.abs(self.d.estimate)))

    def __repr__(self) -> str:
        return f"d = {self.d[self.best]} at layer {self.best} of {len(self.d.estimate)}"

    def to_frame(self) -> pd.DataFrame:
        """Give a row a layer: layer, estimate (Cohen's d), low, high, n."""
        return self.d.to_frame(layer=range(len(self.d.estimate)))

    def plot(self, title: str = "In which layers does the direction tell the sets apart?") -> "alt.LayerChart":
        """Draw Cohen's d over layers."""
        from rim_core import charts

        y_title = f"Cohen's d of {self.n_a} against {self.n_b} prompts"
        return charts.by_layer(self.to_frame(), title=title, y_title=y_title, chance=0.0)


def separation(a: Tensor, b: Tensor, direction: Tensor) -> Separation:
    """Measure how far a direction sets two kinds of prompts apart: Cohen's d of their projections, by layer.

    On the prompts that made it a direction separates any two sets; give others.

    Args:
        a, b: activations of the two kinds, `[prompt, layer, d]`, or `[prompt, d]` for a single layer.
        direction: `[layer, d]`, or one `[d]` for all layers, as `difference_in_means` gives it: d is above 0 where
            `a` lies further along it.

    Raises:
        InputError: shapes that do not fit, fewer than two prompts of a kind, values that are not finite, or a
            direction of length 0, or no spread in any layer.

    Example:
        >>> import torch
        >>> made, tested = torch.randn(2, 2, 20, 3, 8)  # [split, kind, prompt, layer, d]
        >>> made[0, :, 1] += 2; tested[0, :, 1] += 2  # only layer 1 knows the kinds apart
        >>> found = rim.separation(*tested, rim.difference_in_means(*made))
        >>> found.best
        1
        >>> found.to_frame().columns.tolist()
        ['layer', 'estimate', 'low', 'high', 'n']
    """
    first, second = _two_sets("separation", a, b)
    vectors = checked(direction, "separation: direction")
    _refuse_other_shapes("separation", a=first, direction=vectors)
    if first.ndim > 3 or min(len(first), len(second)) < 2:
        raise InputError(
            f"separation: a is {list(first.shape)}, b {list(second.shape)}; give [prompt, layer, d] two prompts each"
        )
    unit = normalised(vectors, "separation: direction")
    scores = [dot(each, unit).reshape(len(each), -1).numpy() for each in (first, second)]
    found = [_cohens_d(*columns) for columns in zip(*(each.T for each in scores), strict=True)]
    estimate, low, high = np.array([(each.estimate, each.low, each.high) for each in found]).T
    if np.isnan(estimate).all():
        raise InputError("separation: neither set has any spread along the direction; give other prompts or positions")
    method = "Hedges-Olkin large-sample"
    return Separation(Interval(estimate, low, high, found[0].n, method=method), len(first), len(second))


def whitened_cosine(
    u: Tensor, v: Tensor, samples: Tensor, *, shrinkage: float | Literal["ledoit-wolf"] = "ledoit-wolf"
) -> Tensor:
    """Give the cosine of two directions in the metric of the inverse covariance of activations.

    `u' C^-1 v / sqrt(u' C^-1 u * v' C^-1 v)`: a few dimensions of large variance, which make unrelated directions
    look alike, count no more than the others (arXiv 2608.23497, the follow-up of paper A). The covariance
    (over n, about the mean) is shrunk, `C = (1 - s) S + s tr(S) / d I`, and inverted in the samples' span.

    Args:
        u, v: `[d]` or `[layer, d]`.
        samples: `[sample, d]` or `[sample, layer, d]`; take each class's mean away first if the classes' distance
            should not count as variance.
        shrinkage: s in 0 to 1, or "ledoit-wolf": estimated from the samples (Ledoit & Wolf 2004, by scikit-learn).

    Returns:
        float32 `[]` or `[layer]`, -1 to 1.

    Raises:
        InputError: shapes that do not fit, a zero direction, fewer than two samples, or s = 0 with a covariance
            that has no inverse.

    Example:
        Two directions that a dominant dimension makes look alike:

        >>> import torch
        >>> samples = torch.randn(500, 3) * torch.tensor([100.0, 1.0, 1.0])
        >>> u, v = torch.tensor([9.0, 1.0, 0.0]), torch.tensor([9.0, 0.0, 1.0])
        >>> bool(rim.cosine(u, v) > 0.98), bool(rim.whitened_cosine(u, v, samples) < 0.5)
        (True, True)
    """
    first = checked(u, "whitened_cosine: u")
    second = checked(v, "whitened_cosine: v", first.shape)
    data = checked(samples, "whitened_cosine: samples", ("sample", *first.shape))
    if first.ndim > 2 or len(data) < 2:
        raise InputError(f"whitened_cosine: samples are {list(data.shape)}; give two or more [d] or [layer, d]")
    if first.ndim == 2:
        parts = zip(first, second, data.unbind(1), strict=True)
        return torch.stack([whitened_cosine(*part, shrinkage=shrinkage) for part in parts])
    centred = data.double() - data.mean(0, dtype=torch.float64)
    basis, variances = principal([centred])
    variances = variances / len(data)
    share = ledoit_wolf_shrinkage(centred.numpy()) if shrinkage == "ledoit-wolf" else float(shrinkage)
    floor = share * float(variances.sum()) / data.shape[1]
    if not 0 <= share <= 1 or (floor <= 0 and len(variances) < data.shape[1]):
        raise InputError(
            f"whitened_cosine: the covariance of {len(data)} samples in {data.shape[1]} dimensions has no inverse at "
            f"shrinkage {share:g}; use 'ledoit-wolf' or a number above 0, at most 1"
        )
    inside = ((1 - share) * variances + floor).rsqrt()

    def whiten(direction: Tensor) -> Tensor:
        """Twice the direction's length: its part in the samples' span and the rest, both scaled."""
        coordinates = direction @ basis
        rest = direction - basis @ coordinates
        return torch.cat([coordinates * inside, rest * floor**-0.5 if floor > 0 else 0 * rest])

    return cosine(whiten(normalised(first, "whitened_cosine: u")), whiten(normalised(second, "whitened_cosine: v")))


def _cohens_d(a: np.ndarray, b: np.ndarray) -> Interval:
    try:
        return stats.cohens_d(a, b)
    except InputError:  # no spread in either, as at a template's last token in the embeddings
        return Interval(np.nan, np.nan, np.nan, len(a) + len(b))


def _two_sets(caller: str, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    first, second = checked(a, f"{caller}: a"), checked(b, f"{caller}: b")
    if first.ndim < 2 or first.shape[1:] != second.shape[1:]:
        raise InputError(
            f"{caller}: a is {list(first.shape)} and b {list(second.shape)}; give [prompt, ..., d], of which only the "
            "prompts may differ"
        )
    return first, second


def _refuse_other_shapes(caller: str, **given: Tensor) -> None:
    """Refuse where the first does not end in the second's shape."""
    (name, values), (other, vectors) = given.items()
    if vectors.ndim == 0 or values.shape[-vectors.ndim :] != vectors.shape:
        raise InputError(
            f"{caller}: {name} {list(values.shape)} do not end in the shape of {other} {list(vectors.shape)}; give [d] "
            "or [layer, d]"
        )
