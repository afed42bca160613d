"""Directions of activations: differences of means, projections and cosines, on captured tensors."""

from typing import Literal

import torch
from sklearn.covariance import ledoit_wolf_shrinkage
from torch import Tensor

from rim_core.errors import InputError
from rim_core.measures._linear import as_tensor, checked, dot, normalised, principal, shape_of


def difference_in_means(a: Tensor, b: Tensor, normalise: bool = False) -> Tensor:
    """Give the mean of `a` minus the mean of `b`, accumulated in float64 (Arditi et al. 2024, section 2.3).

    Args:
        a, b: activations `[prompt, ..., d]`, the same shape but for the number of prompts.
        normalise: scale each direction to length 1.

    Returns:
        float32 `[..., d]`, in the unit of the activations.

    Raises:
        InputError: shapes that differ, no prompts, values that are not finite, or a zero direction to normalise.
    """
    first = checked(a, "difference_in_means: a", at_least=2)
    second = checked(b, "difference_in_means: b", at_least=2)
    if first.shape[1:] != second.shape[1:]:
        raise InputError(
            f"difference_in_means: a is {shape_of(first)} and b {shape_of(second)}; only the prompts may differ"
        )
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
    """
    given, unit = (
        checked(values, "project: values"),
        normalised(as_tensor(direction, "project: direction").detach().cpu(), "project: direction"),
    )
    if unit.ndim not in (1, 2) or given.shape[given.ndim - unit.ndim :] != unit.shape:
        raise InputError(
            f"project: values {shape_of(given)} do not end in the direction's shape {shape_of(unit)}; give [d] or "
            "[layer, d]"
        )
    return dot(given, unit).float()


def cosine(u: Tensor, v: Tensor) -> Tensor:
    """Give the cosine of directions `u` and `v`, `[..., d]` each: float32 `[...]`, such as one a layer.

    Raises:
        InputError: shapes that differ, values that are not finite, or a direction of length 0.
    """
    first, second = checked(u, "cosine: u"), checked(v, "cosine: v")
    if first.shape != second.shape:
        raise InputError(f"cosine: u is {shape_of(first)} and v {shape_of(second)}; give the same shape")
    return (normalised(first, "cosine: u") * normalised(second, "cosine: v")).sum(-1).float()


def whitened_cosine(
    u: Tensor, v: Tensor, samples: Tensor, shrinkage: float | Literal["ledoit-wolf"] = "ledoit-wolf"
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
    """
    first, second = checked(u, "whitened_cosine: u"), checked(v, "whitened_cosine: v")
    data = checked(samples, "whitened_cosine: samples", at_least=2)
    if first.ndim > 2 or not first.shape == second.shape == data.shape[1:] or len(data) < 2:
        raise InputError(
            f"whitened_cosine: u {shape_of(first)}, v {shape_of(second)}, samples {shape_of(data)}; give [d], [d] and "
            "at least two [sample, d], or all with layers before d"
        )
    if first.ndim == 2:
        parts = zip(first, second, data.unbind(1), strict=True)
        return torch.stack([whitened_cosine(*part, shrinkage) for part in parts])
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
