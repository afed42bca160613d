"""Exact activation patching: components of a source run put into a destination run, one at a time.

Causal tracing as in Meng et al. (2022) and paper C (sections III.C and III.D): the effect of a component is the
metric of the patched run less that of the clean run. Forward and reverse patching differ in which prompts are the
source. What a call asks for is worked out in `plans`, and the runs laid side by side in `rows`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from torch import Tensor

from rim_core.checking import finite, whole
from rim_core.interventions._rows import run_clean, run_patched
from rim_core.interventions.metrics import Metric
from rim_core.interventions.plans import Plan, Positions, Unit, make_plan, members, read_source, rectangle
from rim_core.models.batching import run_batches, token_budget
from rim_core.models.capture import Activations
from rim_core.models.model import Model
from rim_core.tables import mean_frame

if TYPE_CHECKING:
    import altair as alt

# Rows in one sequence: beyond this, what each row does not see of the others costs more than it saves.
_MAX_ROWS = 1024


@dataclass(frozen=True, eq=False)
class Patched:
    """Effects of patching, patched minus clean, in the metric's units.

    Attributes:
        components: which were patched.
        metric: the metric's name.
        effects: `[pair, layer]`, `[pair, layer, head]` for heads, `[pair, unit]` where units were named.
        clean: the metric of each destination run, `[pair]`.
        source: of each source run, `[pair]`; NaN where the source was given as activations.
        layers: the layers of the layer axis, or of each unit.
        units: the named units, or None.
    """

    components: str
    metric: str
    effects: Tensor
    clean: Tensor
    source: Tensor
    layers: tuple[int, ...]
    units: tuple[Any, ...] | None = None

    @property
    def normalised(self) -> Tensor:
        """Effects on the scale where 0 is the clean run and 1 the source run; shape of `effects`."""
        gap = (self.source - self.clean).view(-1, *[1] * (self.effects.dim() - 1))
        return self.effects / gap

    def to_frame(self) -> pd.DataFrame:
        """A row a component: layer (head, unit), mean effect over pairs, its 95 % t interval, n."""
        axes: dict[str, Sequence[object]] = {"layer": self.layers}
        if self.units is not None:
            axes = {"unit": [" + ".join(f"{a}.{b}" for a, b in members(unit)) for unit in self.units]}
        elif self.effects.dim() > 2:
            axes["head"] = range(self.effects.shape[2])
        frame = mean_frame(self.effects, **axes).rename(columns={"mean": "effect"})
        if self.units is not None:
            frame.insert(0, "layer", self.layers)
        return frame

    def plot(self) -> "alt.LayerChart":
        """Mean effects: by layer with intervals, or layer by head, or a row for each named unit."""
        from rim_core import charts

        frame, value = self.to_frame(), f"change of the {self.metric}"
        strongest = frame.iloc[frame["effect"].abs().argmax()]
        place = " ".join(f"{name} {strongest[name]}" for name in ("layer", "head", "unit") if name in frame)
        about = f"Mean over {len(self.clean)} pairs. Largest: {place}, {strongest['effect']:+.3g}."
        title = f"Where does patching {self.components} change the {self.metric}?"
        if self.units is not None:
            return charts.intervals(
                frame, "effect", label="unit", title=title, x_title=value, description=about, reference=0.0
            )
        if "head" in frame:
            return charts.heatmap(
                frame,
                "effect",
                x="head",
                y="layer",
                title=title,
                x_title="head",
                y_title="layer",
                value_title=value,
                description=about,
                diverging=True,
            )
        frame["component"] = self.components
        return charts.by_layer(frame, "effect", series="component", title=title, y_title=value, description=about)


def patch(
    model: Model,
    source: Sequence[str] | Activations,
    destination: Sequence[str],
    components: str,
    metric: Metric,
    layers: Sequence[int] | None = None,
    positions: Positions = "last",
    source_positions: Positions | None = None,
    units: Sequence[Unit | Sequence[Unit]] | None = None,
    max_tokens: int | None = None,
    progress: bool | None = None,
) -> Patched:
    """Put each component of the source run into the destination run, and measure what changes.

    For reverse patching swap source and destination. Interventions now active hold in all runs; a patched value
    overrides them.

    Args:
        model: a loaded model.
        source: texts, one for each destination; or `Activations` captured at the last position, with the
            component's site (`attn_out`, `mlp_out`, `head_z`, `mlp_neurons` or `resid_post`).
        destination: texts `[pair]`.
        components: `"attention"` or `"mlp"` (the module's output), `"heads"` (each head's part of the output
            projection's input), `"neurons"` (inputs of the MLP's down projection), or `"resid"` (the layer's
            output).
        metric: `Projection`, `LogitDifference`, `ProbeScore`, or a function of the final residual state
            `[..., d_model] -> [...]`, read at the destination's last token.
        layers: which to patch; all by default.
        positions: in the destination, counted from the end: `"last"`, `"all"` (pairs of equal length), one or
            several whole numbers below 0, or a list of them for each pair (see `texts.find_span`).
        source_positions: where the values come from, in the same order; by default `positions`.
        units: heads or neurons as `(layer, index)`, each patched alone; a list of several is patched together.
            Neurons must be named (see `neurons_above`).
        max_tokens: padded tokens a pass; by default from the free memory. A pass that does not fit is halved.
        progress: show a bar; by default in a terminal only.

    Raises:
        InputError: arguments that do not fit each other or the model.
        IdentityError: padding changes this model's numbers, its heads do not add up, or its layers keep other state
            than keys and values, so that patched runs cannot stand side by side on one beginning.
    """
    plan = make_plan(model, source, destination, components, metric, layers, positions, source_positions, units)
    if max_tokens is not None:
        max_tokens = whole(max_tokens, "patch: max_tokens", 1)
    from tqdm import tqdm

    effects = torch.empty(len(destination), len(plan.runs))
    clean, original = torch.empty(len(destination)), torch.full((len(destination),), float("nan"))
    budget = max_tokens or token_budget(model.layout, model.device)
    lengths = [max(len(a), len(b)) for a, b in zip(plan.ids, plan.source_ids or plan.ids, strict=True)]

    def run(rows: list[int]) -> tuple[Tensor, Tensor, Tensor | None]:
        return _patch_batch(model, plan, rows, budget)

    # Source and destination both run, so each may take half of the tokens.
    with tqdm(
        total=len(destination),
        desc=f"patching {components}",
        unit="pair",
        disable=None if progress is None else not progress,
    ) as bar:
        for rows, (scores, was, source_score) in run_batches(lengths, max(1, budget // 2), run):
            effects[rows], clean[rows] = scores - was[:, None], was
            if source_score is not None:
                original[rows] = source_score
            bar.update(len(rows))
    check_scores(plan, clean, original, effects)
    return Patched(components, plan.metric.title, plan.shaped(effects), clean, original, plan.layers, plan.units)


def check_scores(plan: Plan, clean: Tensor, source: Tensor, effects: Tensor) -> None:
    """Raise InputError where a run's metric is NaN or infinite, naming the run's pair, or its layer."""
    name = plan.metric.title
    finite(clean, f"the {name} of the destination runs", 0, "pair")
    if plan.source_ids is not None:
        finite(source, f"the {name} of the source runs", 0, "pair")
    starts = [run.start for run in plan.runs]
    finite(effects, f"the {name} of the runs with patched {plan.components}", 1, "layer", starts)


@torch.no_grad()
def _patch_batch(model: Model, plan: Plan, rows: list[int], budget: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Scores `[pair, run]`, the clean scores `[pair]` and the source's, on the CPU."""
    values, source_score = read_source(model, plan, rows)
    positions = [plan.positions[row] for row in rows]
    tail = -min(map(min, positions))
    lowest = plan.runs[0].start + (plan.site == "resid_post")
    clean = run_clean(
        model, [plan.ids[row] for row in rows], plan.shared, tail, range(lowest, plan.metric.layer + 1), plan.metric
    )
    offsets = rectangle(positions, model.device) + tail
    at_once = max(1, min(budget // (len(rows) * tail), _MAX_ROWS // tail))
    scores = torch.cat(
        [
            run_patched(model, clean, plan.site, plan.runs[i : i + at_once], values, offsets, plan.metric).cpu()
            for i in range(0, len(plan.runs), at_once)
        ],
        dim=1,
    )
    return scores, clean.score.float().cpu(), None if source_score is None else source_score.float().cpu()
