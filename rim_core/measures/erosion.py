"""Erosion: how far fine-tuning takes a model's activations back from instruct to base."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from rim_core import stats
from rim_core.errors import InputError
from rim_core.measures._linear import checked, dot, normalised, shape_of
from rim_core.stats import Floats, Groups, Ints

if TYPE_CHECKING:
    import altair as alt


@dataclass(frozen=True, eq=False)
class LayerEstimates:
    """A value a layer with the ends of its 95 % bootstrap interval, each `[layer]`."""

    value: Floats
    low: Floats
    high: Floats


@dataclass(frozen=True, eq=False)
class Erosion:
    """How far a fine-tuned model has gone back from instruct to base, along the direction between those two.

    Attributes:
        fraction: 0 is at instruct, 1 at base, on held-out prompts; the interval is unbounded where base and instruct
            do not differ reliably along the direction, and the value NaN where they are equal (below an adapter).
        same_data: the same with direction and projections from all prompts, as published; None where the direction
            was given.
        projections: mean projections on held-out prompts by model: "base", "other", "instruct".
        direction: unit vectors, float32 `[layer, d]`; zero where base and instruct are equal.
        fit, held_out: indices of the prompts on either side of the split.
    """

    fraction: LayerEstimates
    same_data: LayerEstimates | None
    projections: Mapping[str, LayerEstimates]
    direction: Tensor
    fit: Ints
    held_out: Ints

    def to_frame(self, measure: Literal["fraction", "projection"] = "fraction") -> pd.DataFrame:
        """Give a row a layer and series: layer, series, value, low, high.

        Series of the fraction are "held out" and "same data"; of the projection the models.
        """
        if measure not in ("fraction", "projection"):
            raise InputError(f"erosion_fraction: no measure {measure!r}; use 'fraction' or 'projection'")
        series: dict[str, LayerEstimates] = {"held out": self.fraction}
        if self.same_data is not None:
            series["same data"] = self.same_data
        chosen = series if measure == "fraction" else self.projections
        return pd.concat(
            [
                pd.DataFrame({"layer": np.arange(len(found.value)), "series": name, **vars(found)})
                for name, found in chosen.items()
            ],
            ignore_index=True,
        )

    def plot(
        self, measure: Literal["fraction", "projection"] = "fraction", title: str | None = None
    ) -> "alt.LayerChart":
        """Draw the fraction, or the three models' mean projections (paper D, figure 5), over layers."""
        from rim_core import charts

        of_fraction = measure == "fraction"
        return charts.by_layer(
            self.to_frame(measure),
            "value",
            series="series",
            title=title or "How far has fine-tuning gone back to base?",
            y_title="erosion: 0 instruct, 1 base" if of_fraction else "mean projection on instruct minus base",
            description=(
                f"{measure.capitalize()} over {len(self.direction)} layers on {len(self.held_out)} prompts; "
                f"fraction at the last layer {self.fraction.value[-1]:.2f}."
            ),
            chance=0.0 if of_fraction else None,
        )


def erosion_fraction(
    base: Tensor,
    instruct: Tensor,
    other: Tensor,
    direction: Tensor | None = None,
    holdout: float = 0.5,
    groups: Groups = None,
    seed: int = 0,
) -> Erosion:
    """Measure by layer how far a fine-tuned model has gone back from instruct to base (paper D, section 4.3).

    `e = (p_instruct - p_other) / (p_instruct - p_base)` of mean projections on `v = mean_instruct - mean_base`.
    The paper took v and the projections from the same prompts, which separates the two models whatever they are;
    here v is fitted on one part and everything else measured on the other, and both are given. Intervals are a
    bootstrap of held-out prompts or groups; they leave out the uncertainty of v itself.

    Args:
        base, instruct, other: `[prompt, layer, d]`, three models' activations for the same prompts.
        direction: `[layer, d]` to project on instead; nothing is then fitted, and all prompts are measured.
        holdout: share of prompts (with groups: of groups) to measure on.
        groups: `[prompt]` of what must not be split, or None.
        seed: of the split and the bootstrap.

    Raises:
        InputError: shapes that differ, values that are not finite, base and instruct equal in every layer, a given
            direction of length 0, or fewer than two prompts or groups on a side.
    """
    models = {
        name: checked(value, f"erosion_fraction: {name}", at_least=3)
        for name, value in (("base", base), ("other", other), ("instruct", instruct))
    }
    if len({value.shape for value in models.values()}) > 1 or base.ndim != 3:
        shapes = ", ".join(f"{name} {shape_of(value)}" for name, value in models.items())
        raise InputError(f"erosion_fraction: {shapes}; give the same [prompt, layer, d] for all three")
    n = len(models["base"])
    codes = stats.group_codes(groups, n)
    everything = np.arange(n)
    if direction is not None:
        if direction.shape != base.shape[1:]:
            raise InputError(
                f"erosion_fraction: direction {shape_of(direction)}, activations {shape_of(base)}; give [layer, d]"
            )
        fit, held_out = everything[:0], everything
        unit = normalised(checked(direction, "erosion_fraction: direction"), "erosion_fraction: direction")
        same_data = None
    else:
        fit, held_out = stats.split(n, holdout, codes, seed, salt="erosion_fraction")
        unit = _shift(models, fit)
        same_data = _erosion(models, _shift(models, everything), everything, codes, seed)[0]
    fraction, projections = _erosion(models, unit, held_out, codes, seed)
    return Erosion(fraction, same_data, projections, unit.float(), fit, held_out)


def _erosion(
    models: Mapping[str, Tensor], unit: Tensor, rows: Ints, codes: Ints, seed: int
) -> tuple[LayerEstimates, dict[str, LayerEstimates]]:
    projected = [dot(value[rows], unit).numpy() for value in models.values()]
    together = np.concatenate(projected, axis=1)
    drawn = stats.resampled_means(together, codes[rows], seed=seed)
    means, (low, high) = together.mean(0), np.percentile(drawn, [2.5, 97.5], axis=0)
    thirds = zip(*(np.split(values, 3) for values in (means, low, high)), strict=True)
    projections = {name: LayerEstimates(*third) for name, third in zip(models, thirds, strict=True)}

    base, other, instruct = np.split(means, 3)
    drawn_base, drawn_other, drawn_instruct = np.split(drawn, 3, axis=1)
    gap = drawn_instruct - drawn_base
    gap_low, gap_high = np.percentile(gap, [2.5, 97.5], axis=0)
    # A quotient whose denominator may be 0 has no bounded interval (Fieller 1954).
    reliable = (gap_low > 0) | (gap_high < 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        value = (instruct - other) / (instruct - base)
        ends = np.percentile((drawn_instruct - drawn_other) / gap, [2.5, 97.5], axis=0)
    fraction = LayerEstimates(value, np.where(reliable, ends[0], -np.inf), np.where(reliable, ends[1], np.inf))
    return fraction, projections


def _shift(models: Mapping[str, Tensor], rows: Ints) -> Tensor:
    """Unit vectors from base to instruct, float64 `[layer, d]`; zero where the two are equal, as below an adapter."""
    means = [models[name][rows].mean(0, dtype=torch.float64) for name in ("instruct", "base")]
    shift = means[0] - means[1]
    if not shift.any():
        raise InputError("erosion_fraction: base and instruct are equal in every layer; give two models that differ")
    lengths = shift.norm(dim=-1, keepdim=True)
    return torch.where(lengths > 0, shift / lengths, 0.0)
