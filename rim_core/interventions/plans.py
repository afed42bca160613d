"""What a call of `patch` or `attribution_patch` asks for, checked: which values go where, in which runs."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rim_core.checking import is_whole, listed, shown, whole_numbers
from rim_core.errors import InputError
from rim_core.interventions._rows import Run
from rim_core.interventions.metrics import Bound, Metric, bind
from rim_core.models.batching import outgrows_window, padded_left, shared_beginning
from rim_core.models.capture import Activations
from rim_core.models.hooks import pick, reading
from rim_core.models.model import Model
from rim_core.texts import encode

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
    shared: int

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
    model.require("patch", "padding", "cache_batch", *(["head_sum"] if components == "heads" else []))
    ids = encode(model, destination)
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
        source_ids = encode(model, source)
        if len(source_ids) != len(ids):
            raise InputError(f"{len(source_ids)} source texts for {len(ids)} destinations: give one for each")
        from_where = _per_pair(
            positions if source_positions is None else source_positions, source_ids, "source_positions"
        )
    for pair, (a, b) in enumerate(zip(where, from_where, strict=True)):
        if len(a) != len(b):
            hint = (
                "'all' needs pairs of equal length in tokens; patch the last token, or name positions"
                if isinstance(positions, str) and positions == "all"
                else "name as many positions in the source as in the destination"
            )
            raise InputError(f"pair {pair}: {len(b)} source positions for {len(a)} destination positions: {hint}")
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
        _shared(model, [*ids, *(source_ids or [])], [*where, *from_where]),
    )


def _shared(model: Model, ids: list[list[int]], positions: list[list[int]]) -> int:
    """Tokens that every prompt begins with, and that may be run once for all."""
    longest = max(map(len, ids))
    # An edit at given positions counts from each prompt's end.
    if any(edit.positional for edit in model.edits) or outgrows_window(model.hf.config, longest):
        return 0
    return shared_beginning(ids, -min(map(min, positions)))


def _per_pair(positions: Positions, ids: list[list[int]], what: str) -> list[list[int]]:
    """Positions of each text as lists of whole numbers below 0."""
    if isinstance(positions, str):
        if positions not in ("last", "all"):
            raise InputError(f"unknown {what} {positions!r}: 'last', 'all', or whole numbers below 0")
        return [[-1] if positions == "last" else list(range(-len(row), 0)) for row in ids]
    rows = [positions] if is_whole(positions) else listed(positions, what)
    if not rows or is_whole(rows[0]):
        found = [whole_numbers(rows, what)] * len(ids)
    elif len(rows) == len(ids):
        found = [whole_numbers(row, f"{what}, text {text}") for text, row in enumerate(rows)]
    else:
        raise InputError(f"{what}: {len(rows)} lists for {len(ids)} texts; give one for each")
    for text, (row, tokens) in enumerate(zip(found, ids, strict=True)):
        bad = [p for p in row if not -len(tokens) <= p < 0]
        if bad:
            raise InputError(
                f"{what}, text {text}: position {bad[0]} is in its {len(tokens)} tokens; count from the end, -1 is "
                "the last"
            )
    return found


def _runs(
    model: Model, components: str, layers: Sequence[int] | None, units: Sequence[Unit | Sequence[Unit]] | None
) -> tuple[tuple[int, ...], list[Run], tuple[Any, ...] | None]:
    chosen = model.checked_layers(layers)
    if len(set(chosen)) < len(chosen):
        raise InputError(f"layers are {list(chosen)}: name each once")
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
        raise InputError("units name heads or neurons and their layers: use them with those components, without layers")
    given = listed(units, "units")
    if not given:
        raise InputError("units is empty: name at least one")
    named = tuple(_unit(unit, components[:-1]) for unit in given)
    runs = []
    for unit in named:
        runs.append(Run(tuple(_joined([_columns(model, components, member) for member in members(unit)]))))
    return tuple(run.start for run in runs), runs, named


def _unit(given: Any, what: str) -> Any:
    """One head or neuron as `(layer, index)`, or several of them."""
    parts = listed(given, f"units: each unit, (layer, {what}) or a list of these,")
    if not parts:
        raise InputError(f"units: a unit is empty; name (layer, {what}), or a list of these")
    if is_whole(parts[0]):
        return tuple(whole_numbers(parts, f"unit {shown(given)}"))
    return tuple(_unit(part, what) for part in parts)


def members(unit: Any) -> Sequence[Unit]:
    """The heads or neurons that are patched together."""
    return (unit,) if isinstance(unit[0], int) else unit


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
    ids = [plan.source_ids[row] for row in rows]
    inputs = padded_left(model.layout.body, ids, plan.shared, model.tokenizer.pad_token_id, model.device)
    at = rectangle([plan.source_positions[row] for row in rows], model.device)
    at = at + inputs["input_ids"].shape[1]
    each = torch.arange(len(rows), device=model.device)[:, None]
    metric = plan.metric
    with (
        reading(model.layout, [plan.site], lambda t: pick(t, each, at), layers=wanted) as found,
        reading(model.layout, [metric.site], lambda t: t[:, -1].clone(), layers=[metric.layer]) as final,
    ):
        model.layout.body(**inputs)
    values = {layer: found[plan.site, layer] for layer in wanted}
    return values, metric.score(final[metric.site, metric.layer])
