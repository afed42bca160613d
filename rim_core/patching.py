"""Exact activation patching: components of a source run put into a destination run, one at a time.

Causal tracing as in Meng et al. (2022) and paper C (sections III.C and III.D): the effect of a component is the
metric of the patched run less that of the clean run. Forward and reverse patching differ in which prompts are the
source. How the runs are laid out side by side is in `rows`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from rim_core import stats
from rim_core.activations import Activations
from rim_core.errors import InputError
from rim_core.loading import Model
from rim_core.metrics import Bound, Metric, bind
from rim_core.rows import Run, run_clean, run_patched
from rim_core.sites import reading
from rim_core.tracing import encode, pad_left, run_batches, token_budget

if TYPE_CHECKING:
    import altair as alt

# What each component's name means: the site that is written.
COMPONENTS = {
    "attention": "attn_out",
    "mlp": "mlp_out",
    "heads": "head_z",
    "neurons": "mlp_neurons",
    "resid": "resid_post",
}
Unit = tuple[int, int]
Positions = str | int | Sequence[int] | Sequence[Sequence[int]]
# Rows in one sequence: beyond this, what each row does not see of the others costs more than it saves.
_MAX_ROWS = 1024


@dataclass(frozen=True, eq=False)
class Patched:
    """Effects of patching, patched minus clean, in the metric's units.

    Attributes:
        components: which were patched. metric: the metric's name.
        effects: `[pair, layer]`, `[pair, layer, head]` for heads, `[pair, unit]` where units were named.
        clean: the metric of each destination run, `[pair]`. source: of each source run, `[pair]`; NaN where the
            source was given as activations.
        layers: the layers of the layer axis, or of each unit. units: the named units, or None.
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
        values = self.effects.numpy().astype(np.float64)
        names = list(np.ndindex(values.shape[1:]))
        rows = []
        for index in names:
            row: dict[str, Any] = {"layer": self.layers[index[0]]}
            if self.units is not None:
                unit = self.units[index[0]]
                joint = not isinstance(unit[0], int)
                row |= {"unit": " + ".join(f"{a}.{b}" for a, b in (unit if joint else [unit]))}
            elif len(index) > 1:
                row |= {"head": index[1]}
            found = values[(slice(None), *index)]
            row |= {"effect": float(found.mean()), "low": np.nan, "high": np.nan, "n": len(found)}
            if len(found) > 1:
                interval = stats.t_interval(found)
                row |= {"low": interval.low, "high": interval.high}
            rows.append(row)
        return pd.DataFrame(rows)

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
        return charts.by_layer(
            frame, "effect", series="component", title=title, y_title=value, description=about
        )


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
            several whole numbers below 0, or a list of them for each pair (see `tracing.find_span`).
        source_positions: where the values come from, in the same order; by default `positions`.
        units: heads or neurons as `(layer, index)`, each patched alone; a list of several is patched together.
            Neurons must be named (see `neurons_above`).
        max_tokens: padded tokens a pass; by default from the free memory. A pass that does not fit is halved.
        progress: show a bar; by default in a terminal only.

    Raises:
        InputError: arguments that do not fit each other or the model.
        IdentityError: padding changes this model's numbers, or its heads do not add up.
    """
    plan = make_plan(
        model, source, destination, components, metric, layers, positions, source_positions, units
    )
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
    return Patched(
        components, plan.metric.title, plan.shaped(effects), clean, original, plan.layers, plan.units
    )


@dataclass(frozen=True)
class Plan:
    """A call of `patch` or `attribution_patch`, checked: ids, the runs in ascending order, and their axes."""

    components: str
    site: str
    metric: Bound
    ids: list[list[int]]
    source_ids: list[list[int]] | None
    activations: Tensor | None
    positions: list[list[int]]
    source_positions: list[list[int]]
    runs: list[Run]
    order: list[int]
    layers: tuple[int, ...]
    units: tuple[Any, ...] | None
    n_columns: int

    def shaped(self, effects: Tensor) -> Tensor:
        """Effects `[pair, run]` in the caller's order and axes."""
        back = torch.empty_like(effects)
        back[:, self.order] = effects
        return back.unflatten(1, (len(self.layers), -1)) if self.n_columns > 1 else back


def make_plan(
    model: Model,
    source: Sequence[str] | Activations,
    destination: Sequence[str],
    components: str,
    metric: Metric,
    layers: Sequence[int] | None,
    positions: Positions,
    source_positions: Positions | None,
    units: Sequence[Unit | Sequence[Unit]] | None,
) -> Plan:
    """Check the arguments of `patch`; raises InputError or IdentityError as it does."""
    if components not in COMPONENTS:
        raise InputError(f"unknown components {components!r}: choose from {', '.join(COMPONENTS)}")
    model.require("patch", "padding", *(["head_sum"] if components == "heads" else []))
    ids = encode(model.tokenizer, destination)
    site = COMPONENTS[components]
    where = _per_pair(positions, ids, "positions")
    source_ids, stored = None, None
    if isinstance(source, Activations):
        stored = source[site].flatten(-2) if site == "head_z" else source[site]
        if stored.dim() != 3 or len(stored) != len(ids):
            raise InputError(
                f"source activations must hold one position of {len(ids)} prompts, one a destination; they have shape "
                f"{list(stored.shape)}: capture them with positions='last'"
            )
        from_where = [[-1]] * len(ids)
    else:
        source_ids = encode(model.tokenizer, source)
        if len(source_ids) != len(ids):
            raise InputError(f"{len(source_ids)} source texts for {len(ids)} destinations: give one for each")
        from_where = _per_pair(
            positions if source_positions is None else source_positions, source_ids, "source_positions"
        )
    for pair, (a, b) in enumerate(zip(where, from_where, strict=True)):
        if len(a) != len(b):
            hint = (
                "'all' needs pairs of equal length in tokens; patch the last token, or name positions"
                if positions == "all"
                else "name as many positions in the source as in the destination"
            )
            raise InputError(
                f"pair {pair}: {len(b)} source positions for {len(a)} destination positions: {hint}"
            )
    chosen, runs, named = _runs(model, components, layers, units)
    order = sorted(range(len(runs)), key=lambda i: runs[i].start)
    return Plan(
        components,
        site,
        bind(model, metric),
        ids,
        source_ids,
        stored,
        where,
        from_where,
        [runs[i] for i in order],
        order,
        chosen,
        named,
        model.n_heads if components == "heads" and named is None else 1,
    )


def _per_pair(positions: Positions, ids: list[list[int]], what: str) -> list[list[int]]:
    """Positions of each text as lists of whole numbers below 0."""
    if isinstance(positions, str):
        if positions not in ("last", "all"):
            raise InputError(f"unknown {what} {positions!r}: 'last', 'all', or whole numbers below 0")
        return [[-1] if positions == "last" else list(range(-len(row), 0)) for row in ids]
    if isinstance(positions, int):
        found = [[positions]] * len(ids)
    elif positions and not isinstance(positions[0], int):
        found = [list(row) for row in positions]  # type: ignore[arg-type]
    else:
        found = [list(positions)] * len(ids)  # type: ignore[arg-type]
    if len(found) != len(ids):
        raise InputError(f"{what}: {len(found)} lists for {len(ids)} texts; give one for each")
    for text, (row, tokens) in enumerate(zip(found, ids, strict=True)):
        bad = [p for p in row if not isinstance(p, int) or not -len(tokens) <= p < 0]
        if bad or not row:
            what_is = f"position {bad[0]} is" if bad else "no positions are"
            raise InputError(
                f"{what}, text {text}: {what_is} in its {len(tokens)} tokens; count from the end, -1 is the last"
            )
    return found


def _runs(
    model: Model,
    components: str,
    layers: Sequence[int] | None,
    units: Sequence[Unit | Sequence[Unit]] | None,
) -> tuple[tuple[int, ...], list[Run], tuple[Any, ...] | None]:
    chosen = tuple(range(model.n_layers)) if layers is None else tuple(layers)
    if wrong := [layer for layer in chosen if not 0 <= layer < model.n_layers]:
        raise InputError(
            f"layer {wrong[0]} is out of range: {model.name} has layers 0 to {model.n_layers - 1}"
        )
    if not chosen or len(set(chosen)) < len(chosen):
        raise InputError("layers must name at least one layer, each once")
    single = components not in ("heads", "neurons")
    if units is None:
        if components == "neurons":
            raise InputError(
                f"{model.d_mlp} neurons a layer are too many to patch blindly: name them with units=[(layer, neuron), "
                "...] (rim.neurons_above picks those above a threshold)"
            )
        if single:
            return chosen, [Run(((layer, slice(None)),)) for layer in chosen], None
        heads = [(layer, head) for layer in chosen for head in range(model.n_heads)]
        return chosen, [Run((_columns(model, components, unit),)) for unit in heads], None
    if single or layers is not None:
        raise InputError(
            "units name heads or neurons and their layers: use them with those components, without layers"
        )
    if not units:
        raise InputError("units is empty: name at least one")
    named = tuple(tuple(u) if isinstance(u[0], int) else tuple(map(tuple, u)) for u in units)  # type: ignore[arg-type]
    runs = []
    for unit in named:
        members: Any = (unit,) if isinstance(unit[0], int) else unit
        runs.append(Run(tuple(_joined([_columns(model, components, member) for member in members]))))
    return tuple(run.start for run in runs), runs, named


def _columns(model: Model, components: str, unit: Unit) -> tuple[int, slice]:
    """Layer and columns of a head or neuron; raises InputError where there is none."""
    if components == "neurons":
        model.layout.down_projection(0)
    count, width = (model.n_heads, model.head_dim) if components == "heads" else (model.d_mlp, 1)
    if len(unit) != 2 or not (0 <= unit[0] < model.n_layers and 0 <= unit[1] < count):
        raise InputError(
            f"unit {unit!r} is not (layer, {components[:-1]}): layers 0 to {model.n_layers - 1}, "
            f"{components} 0 to {count - 1}"
        )
    return unit[0], slice(unit[1] * width, (unit[1] + 1) * width)


def _joined(writes: list[tuple[int, slice]]) -> Iterator[tuple[int, slice | Tensor]]:
    """One write a layer."""
    for layer in sorted({layer for layer, _ in writes}):
        parts = [columns for at, columns in writes if at == layer]
        if len(parts) == 1:
            yield layer, parts[0]
        else:
            yield layer, torch.tensor([i for part in parts for i in range(part.start, part.stop)])


def rectangle(positions: list[list[int]], device: Any) -> Tensor:
    """`[pair, position]`; short rows repeat their first position, whose value is then written twice."""
    width = max(map(len, positions))
    return torch.tensor([row + row[:1] * (width - len(row)) for row in positions], device=device)


def read_source(model: Model, plan: Plan, rows: list[int]) -> tuple[dict[int, Tensor], Tensor | None]:
    """What is to be written, by layer `[pair, position, width]`, and the metric of the source runs `[pair]`."""
    wanted = sorted({layer for run in plan.runs for layer, _ in run.writes})
    if plan.activations is not None:
        stored = plan.activations[rows].to(model.device)
        return {layer: stored[:, layer, None] for layer in wanted}, None
    assert plan.source_ids is not None
    inputs = pad_left([plan.source_ids[row] for row in rows], model.tokenizer.pad_token_id, model.device)
    at = rectangle([plan.source_positions[row] for row in rows], model.device)
    at = at + inputs["input_ids"].shape[1]
    each = torch.arange(len(rows), device=model.device)[:, None]
    metric = plan.metric
    with (
        reading(model.layout, [plan.site], lambda t: t[each, at], wanted) as found,
        reading(model.layout, [metric.site], lambda t: t[:, -1].clone(), [metric.layer]) as final,
    ):
        model.layout.body(**inputs, use_cache=False)
    values = {layer: found[plan.site, layer] for layer in wanted}
    return values, metric.score(final[metric.site, metric.layer])


@torch.no_grad()
def _patch_batch(
    model: Model, plan: Plan, rows: list[int], budget: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Scores `[pair, run]`, the clean scores `[pair]` and the source's, on the CPU."""
    values, source_score = read_source(model, plan, rows)
    positions = [plan.positions[row] for row in rows]
    tail = -min(map(min, positions))
    lowest = plan.runs[0].start + (plan.site == "resid_post")
    clean = run_clean(
        model, [plan.ids[row] for row in rows], tail, range(lowest, plan.metric.layer + 1), plan.metric
    )
    offsets = rectangle(positions, model.device) + tail
    at_once = max(1, min(budget // (len(rows) * tail), _MAX_ROWS // tail))
    scores = torch.cat(
        [
            run_patched(
                model, clean, plan.site, plan.runs[i : i + at_once], values, offsets, plan.metric
            ).cpu()
            for i in range(0, len(plan.runs), at_once)
        ],
        dim=1,
    )
    return scores, clean.score.float().cpu(), None if source_score is None else source_score.float().cpu()


def neurons_above(source: Tensor, destination: Tensor, factor: float = 1.0) -> list[Unit]:
    """Neurons whose mean difference between source and destination is above `factor` times its layer's mean.

    Paper C, section III.D: neurons with an above-mean activation difference.

    Args:
        source, destination: `mlp_neurons` as captured, `[prompt, layer, d_mlp]`.
        factor: of the layer's mean absolute difference.
    """
    if source.dim() != 3 or source.shape[1:] != destination.shape[1:]:
        raise InputError(
            f"neurons_above needs two [prompt, layer, d_mlp], not {list(source.shape)} and {list(destination.shape)}"
        )
    gap = (source.double().mean(0) - destination.double().mean(0)).abs()
    above = gap > factor * gap.mean(dim=-1, keepdim=True)
    return [(int(layer), int(neuron)) for layer, neuron in above.nonzero()]
