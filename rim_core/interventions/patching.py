"""Exact activation patching: components of a source run put into a destination run, one at a time.

Causal tracing as in Meng et al. (2022) and paper C (sections III.C and III.D): the effect of a component is the
metric of the patched run less that of the clean run. Forward and reverse patching differ in which prompts are the
source. A call is checked and worked out as a `Plan` here; how its runs lie side by side is in `_rows`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from torch import Tensor

from rim_core.checking import finite, is_whole, listed, whole, whole_numbers
from rim_core.errors import InputError
from rim_core.interventions._rows import Plan, Run, read_source, rectangle, run_clean, run_patched
from rim_core.interventions.components import COMPONENTS, Unit, columns_of, component_of, units_of
from rim_core.interventions.metrics import Metric, bind
from rim_core.models.batching import run_batches, token_budget
from rim_core.models.capture import Activations
from rim_core.models.model import Model
from rim_core.models.padding import outgrows_window, shared_beginning
from rim_core.models.padding import positions as positions_in
from rim_core.tables import by_axes
from rim_core.texts import checked, encode

if TYPE_CHECKING:
    import altair as alt

Positions = str | int | Sequence[int] | Sequence[Sequence[int]]
# Of some pairs: effects `[pair, run]`, the clean metric `[pair]` and the source's, None where it was not run.
Scored = tuple[Tensor, Tensor, Tensor | None]
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

    Example:
        >>> found = rim.patch(model, texts[:2], texts[2:], "mlp", rim.LogitDifference(5, 6))
        >>> found.effects.shape == found.normalised.shape == (2, model.n_layers)
        True
        >>> list(found.to_frame())
        ['layer', 'estimate', 'low', 'high', 'n']
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
        """A row a component: layer (head, unit), the mean effect over pairs as estimate, low, high (95 % t), n."""
        axes: dict[str, Sequence[object]] = {"layer": self.layers}
        if self.units is not None:
            axes = {"unit": [named(unit) for unit in self.units]}
        elif self.effects.dim() > 2:
            axes["head"] = range(self.effects.shape[2])
        frame = by_axes(self.effects, **axes)
        if self.units is not None:
            frame.insert(0, "layer", self.layers)
        return frame

    def plot(self) -> "alt.LayerChart":
        """Mean effects: by layer with intervals, or layer by head, or a row for each named unit."""
        from rim_core import charts

        frame, value = self.to_frame(), f"change of the {self.metric}"
        strongest = frame.iloc[frame["estimate"].abs().argmax()]
        place = " ".join(f"{name} {strongest[name]}" for name in ("layer", "head", "unit") if name in frame)
        about = f"Mean over {len(self.clean)} pairs. Largest: {place}, {strongest['estimate']:+.3g}."
        title = f"Where does patching {self.components} change the {self.metric}?"
        labels: dict[str, Any] = {"title": title, "description": about}
        if self.units is not None:
            return charts.intervals(frame, label="unit", x_title=value, reference=0.0, **labels)
        if "head" in frame:
            return charts.heatmap(frame, value_title=value, diverging=True, **labels)
        return charts.by_layer(frame, y_title=value, **labels)


def patch(
    model: Model,
    source: Sequence[str] | Activations,
    destination: Sequence[str],
    components: str,
    metric: Metric,
    *,
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
            component's site.
        destination: texts `[pair]`.
        components: `"attention"` or `"mlp"` (the module's output), `"heads"` (each head's part of the output
            projection's input), `"neurons"` (inputs of the MLP's down projection), or `"resid"` (the layer's
            output); or the site of one of these: `"attn_out"`, `"mlp_out"`, `"head_z"`, `"mlp_neurons"`,
            `"resid_post"`.
        metric: `Projection`, `LogitDifference`, `LogProbability`, `RefusalLogOdds`, `ProbeScore`, `LogitMetric`, or a
            function of the final residual states `[..., d_model] -> [...]`; read at the destination's last token.
        layers: which to patch; all by default.
        positions: in the destination, counted from the end: `"last"`, `"all"` (pairs of equal length), one or
            several whole numbers below 0, or a list of them for each pair (see `find_span`).
        source_positions: where the values come from, in the same order; by default `positions`.
        units: heads or neurons as `(layer, index)`, each patched alone; a list of several is patched together.
            Neurons must be named (see `neurons_above`).
        max_tokens: padded tokens a pass; by default from the free memory. A pass that does not fit is halved.
        progress: show a bar; by default in a terminal only.

    Raises:
        InputError: arguments that do not fit each other or the model.
        IdentityError: padding changes this model's numbers, its heads do not add up, or its layers keep other state
            than keys and values, so that patched runs cannot stand side by side on one beginning.

    Example:
        >>> found = rim.patch(model, texts[:2], texts[2:], "heads", rim.LogitDifference(5, 6))
        >>> found.effects.shape == (2, model.n_layers, model.n_heads)
        True
        >>> list(found.to_frame())
        ['layer', 'head', 'estimate', 'low', 'high', 'n']
    """
    plan = make_plan(
        model, source, destination, components, metric, layers, positions, source_positions, units, max_tokens
    )
    effects, clean, original = run_exact(model, plan, max_tokens, progress)
    return Patched(plan.components, plan.metric.title, effects, clean, original, plan.layers, plan.units)


def run_plan(
    plan: Plan, budget: int, batch: Callable[[list[int]], Scored], progress: bool | None = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Run all pairs, by `batch(rows)` on at most `budget` tokens at once, on the CPU.

    Returns:
        Effects in the caller's axes, the metric of the destination runs `[pair]`, and of the source runs `[pair]`, NaN
        where there was none.

    Raises:
        InputError: a metric that is NaN or infinite, naming the run's pair, or its layer.
    """
    from tqdm import tqdm

    n, name = len(plan.ids), plan.metric.title
    effects, clean, source = torch.empty(n, len(plan.runs)), torch.empty(n), torch.full((n,), float("nan"))
    lengths = [max(len(a), len(b)) for a, b in zip(plan.ids, plan.source_ids or plan.ids, strict=True)]
    hidden = None if progress is None else not progress
    with tqdm(total=n, desc=f"patching {plan.components}", unit="pair", disable=hidden) as bar:
        for rows, (found, was, given) in run_batches(lengths, budget, batch):
            effects[rows], clean[rows] = found, was
            if given is not None:
                source[rows] = given
            bar.update(len(rows))
    finite(clean, f"the {name} of the destination runs", 0, "pair")
    if plan.source_ids is not None:
        finite(source, f"the {name} of the source runs", 0, "pair")
    starts = [run.start for run in plan.runs]
    finite(effects, f"the {name} of the runs with patched {plan.components}", 1, "layer", starts)
    return plan.shaped(effects), clean, source


def run_exact(
    model: Model, plan: Plan, max_tokens: int | None, progress: bool | None = False
) -> tuple[Tensor, Tensor, Tensor]:
    """`run_plan` by exact patching."""
    budget = max_tokens or token_budget(model.layout, model.device)
    # Source and destination both run, so each may take half of the tokens.
    return run_plan(plan, max(1, budget // 2), lambda rows: _patch_batch(model, plan, rows, budget), progress)


@torch.no_grad()
def _patch_batch(model: Model, plan: Plan, rows: list[int], budget: int) -> Scored:
    values, source = read_source(model, plan, rows)
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
    was = clean.score.float().cpu()
    return scores - was[:, None], was, None if source is None else source.float().cpu()


# The arguments ----------------------------------------------------------------------------------------------------


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
    max_tokens: int | None,
) -> Plan:
    """Check the arguments of `patch`; raises InputError or IdentityError as it does."""
    component = component_of(components)
    site = COMPONENTS[component]
    model.require("patch", "padding", "cache_batch", *(["head_sum"] if component == "heads" else []))
    if max_tokens is not None:
        whole(max_tokens, "patch: max_tokens", 1)
    ids = encode(model, destination)
    where = positions_in(positions, [len(row) for row in ids])
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
        source_ids = encode(model, source)
        if len(source_ids) != len(ids):
            raise InputError(f"{len(source_ids)} source texts for {len(ids)} destinations: give one for each")
        wanted = positions if source_positions is None else source_positions
        from_where = positions_in(wanted, [len(row) for row in source_ids], "source_positions")
    for pair, (a, b) in enumerate(zip(where, from_where, strict=True)):
        if len(a) != len(b):
            raise InputError(
                f"pair {pair}: {len(b)} source positions for {len(a)} destination positions: name as many in both "
                "('all' needs pairs of equal length in tokens)"
            )
    chosen, runs, given = _runs(model, component, layers, units)
    order = sorted(range(len(runs)), key=lambda i: runs[i].start)
    return Plan(
        components=component,
        site=site,
        metric=bind(model, metric, checked(destination)[0]),
        ids=ids,
        source_ids=source_ids,
        activations=stored,
        positions=where,
        source_positions=from_where,
        runs=[runs[i] for i in order],
        order=order,
        layers=chosen,
        units=given,
        n_columns=model.n_heads if component == "heads" and given is None else 1,
        shared=_shared(model, [*ids, *(source_ids or [])], [*where, *from_where]),
    )


def only(model: Model, plan: Plan, pairs: Sequence[int]) -> Plan:
    """The same plan for some of its pairs."""
    ids, where, from_where = (
        [rows[pair] for pair in pairs] for rows in (plan.ids, plan.positions, plan.source_positions)
    )
    source_ids = None if plan.source_ids is None else [plan.source_ids[pair] for pair in pairs]
    return replace(
        plan,
        ids=ids,
        positions=where,
        source_ids=source_ids,
        source_positions=from_where,
        activations=None if plan.activations is None else plan.activations[list(pairs)],
        shared=_shared(model, [*ids, *(source_ids or [])], [*where, *from_where]),
    )


def _shared(model: Model, ids: list[list[int]], positions: list[list[int]]) -> int:
    """Tokens that every prompt begins with, and that may be run once for all."""
    longest = max(map(len, ids))
    # An edit at given positions counts from each prompt's end.
    if any(edit.positional for edit in model.edits) or outgrows_window(model.hf.config, longest):
        return 0
    return shared_beginning(ids, -min(map(min, positions)))


def _runs(
    model: Model, component: str, layers: Sequence[int] | None, units: Sequence[Unit | Sequence[Unit]] | None
) -> tuple[tuple[int, ...], list[Run], tuple[Any, ...] | None]:
    """The layers of the runs, the runs, and the units if they were named."""
    chosen = model.checked_layers(None if layers is None else whole_numbers(layers, "layers", distinct=True))
    if units is not None:
        if component not in ("heads", "neurons") or layers is not None:
            raise InputError(
                "units name heads or neurons and their layers: use them with those components, without layers"
            )
        given = tuple(_unit(model, unit, component) for unit in listed(units, "units"))
        if not given:
            raise InputError("units is empty: name at least one")
        runs = [_run(model, component, members(unit)) for unit in given]
        return tuple(run.start for run in runs), runs, given
    if component == "neurons":
        raise InputError(
            f"{model.d_mlp} neurons a layer are too many to patch blindly: name them with units=[(layer, neuron), "
            "...] (rim.neurons_above picks those above a threshold)"
        )
    if component == "heads":
        every = [(layer, head) for layer in chosen for head in range(model.n_heads)]
        return chosen, [_run(model, component, [head]) for head in every], None
    return chosen, [Run(((layer, slice(None)),)) for layer in chosen], None


def _unit(model: Model, given: Any, component: str) -> Any:
    """One head or neuron as `(layer, index)`, or several of them."""
    parts = listed(given, f"units: each unit, (layer, {component[:-1]}) or a list of these,")
    if not parts:
        raise InputError(f"units: a unit is empty; name (layer, {component[:-1]}), or a list of these")
    if is_whole(parts[0]):
        return units_of(model, [parts], component)[0]
    return tuple(units_of(model, parts, component))


def members(unit: Any) -> Sequence[Unit]:
    """The heads or neurons that are patched together."""
    return (unit,) if isinstance(unit[0], int) else unit


def named(unit: Any) -> str:
    """A unit as tables show it: layer.index, joined where several are meant."""
    return " + ".join(f"{layer}.{index}" for layer, index in members(unit))


def _run(model: Model, component: str, units: Sequence[Unit]) -> Run:
    """One write a layer."""
    parts: dict[int, list[slice]] = {}
    for unit in units:
        parts.setdefault(unit[0], []).append(columns_of(model, component, unit))
    return Run(
        tuple(
            (layer, found[0] if len(found) == 1 else torch.tensor([i for s in found for i in range(s.start, s.stop)]))
            for layer, found in sorted(parts.items())
        )
    )
