"""Patched runs side by side: the prompt's beginning is run once, and every patched run is a row on top of it.

A patch at the prompt's end changes nothing before it. So the prompt is run once, clean, and its keys and values
are kept. Each patched run then needs only the tokens from the first patched position on (one, for a patch at the
last token): these tails lie side by side in one sequence, with their own positions, and a mask lets each see the
kept beginning and itself. The beginning is never copied. A run joins at the layer of its patch, since below it
nothing differs from the clean run, and all runs end at the layer that the metric reads.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from rim_core.errors import InputError
from rim_core.interventions.metrics import Bound
from rim_core.models.hooks import Frame, additive_mask, hook, pick, reading, removing, tensor_of
from rim_core.models.model import Model
from rim_core.models.padding import padded_left

Columns = slice | Tensor
# The arguments of a decoder layer that hold something for each token, and the axis of the tokens.
_PER_TOKEN = {"position_ids": -1, "cache_position": -1, "position_embeddings": -2, "attention_mask": -2}


@dataclass(frozen=True)
class Run:
    """One patched run: the `(layer, columns)` of the patched site that are written."""

    writes: tuple[tuple[int, Columns], ...]

    @property
    def start(self) -> int:
        """The lowest layer that is written."""
        return min(layer for layer, _ in self.writes)


@dataclass(frozen=True)
class Plan:
    """A call of `patch` or `attribution_patch`, checked.

    Attributes:
        components: what is patched. site: the site that it writes.
        metric: what each run is scored by, on this model.
        ids: tokens of the destinations. source_ids: of the sources; None where activations were given.
        activations: `[pair, layer, width]`, or None.
        positions: where values go in each destination. source_positions: where they come from.
        runs: in ascending order of their start. order: each one's place among those that the caller named.
        layers: of the layer axis. units: that were named, or None. n_columns: runs a layer.
        shared: tokens that all prompts begin with, which may be run once for all.
    """

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
    ids, metric = [plan.source_ids[row] for row in rows], plan.metric
    inputs = padded_left(model.layout.body, ids, plan.shared, model.tokenizer.pad_token_id, model.device)
    at = rectangle([plan.source_positions[row] for row in rows], model.device) + inputs["input_ids"].shape[1]
    each = torch.arange(len(rows), device=model.device)[:, None]
    with (
        reading(model.layout, [plan.site], lambda t: pick(t, each, at), wanted) as found,
        reading(model.layout, [metric.site], lambda t: t[:, -1].clone(), [metric.layer]) as final,
    ):
        model.layout.body(**inputs)
    values = {layer: found[plan.site, layer] for layer in wanted}
    return values, metric.score(final[metric.site, metric.layer])


@dataclass(frozen=True)
class Clean:
    """What a batch's clean run leaves for its patched runs (B prompts, T padded tokens, m tokens of tail).

    Attributes:
        cache: keys and values of all T tokens.
        calls: each layer's arguments, cut to the tail.
        inputs: each layer's input, `[B, m, d]`.
        score: the metric, `[B]`.
        positions: of all T tokens, `[B, T]`.
        tail: m.
    """

    cache: DynamicCache
    calls: Mapping[int, dict[str, Any]]
    inputs: Mapping[int, Tensor]
    score: Tensor
    positions: Tensor
    tail: int


@torch.no_grad()
def run_clean(
    model: Model, ids: Sequence[Sequence[int]], shared: int, tail: int, layers: Sequence[int], metric: Bound
) -> Clean:
    """Run a batch of prompts once, keeping what patched runs that pass through `layers` need.

    The first `shared` tokens, which all prompts begin with, are run once for all of them.
    """
    inputs = padded_left(model.layout.body, ids, shared, model.tokenizer.pad_token_id, model.device)
    width, cache = inputs["input_ids"].shape[1], inputs["past_key_values"]
    calls: dict[int, dict[str, Any]] = {}
    states: dict[int, Tensor] = {}

    def keep(layer: int) -> Any:
        def keeper(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            # The class's own forward: nnsight and accelerate put wrappers on the instance.
            signature = inspect.signature(type(module).forward)
            arguments = dict(signature.bind(module, *args, **kwargs).arguments)
            arguments.pop("self")
            arguments.update(arguments.pop("kwargs", {}))
            hidden = arguments.pop(next(iter(arguments)))
            states[layer] = hidden[:, width - tail :].clone()
            calls[layer] = {name: _cut(name, value, width, tail) for name, value in arguments.items()}

        return keeper

    with removing([]) as handles:
        for layer in layers:
            # Before any intervention's hook: the rows pass through those hooks themselves.
            handles.append(
                model.layout.layers[layer].register_forward_pre_hook(keep(layer), with_kwargs=True, prepend=True)
            )
        with reading(model.layout, [metric.site], lambda t: t[:, -1].clone(), [metric.layer]) as final:
            model.layout.body(**inputs)
    lengths = torch.tensor([len(row) for row in ids], device=model.device)[:, None]
    own = torch.arange(-width, 0, device=model.device).expand(len(ids), -1)
    positions = torch.cat([torch.arange(shared, device=model.device) - lengths, own], dim=1)
    score = metric.score(final[metric.site, metric.layer])
    return Clean(cache, calls, states, score, positions, tail)


def _cut(name: str, value: Any, width: int, tail: int) -> Any:
    """A layer's argument for the last `tail` of `width` tokens.

    Raises:
        InputError: a tensor whose meaning is not known, such as ALiBi's biases.
    """
    if isinstance(value, tuple):
        return tuple(_cut(name, part, width, tail) for part in value)
    if not isinstance(value, Tensor):
        return value
    if name not in _PER_TOKEN or value.shape[_PER_TOKEN[name]] != width:
        raise InputError(
            f"patching does not know the decoder layer's argument {name!r} of shape {list(value.shape)}: this family "
            "cannot be patched; steer and ablate work without it"
        )
    return value.narrow(_PER_TOKEN[name], width - tail, tail)


class _Beginning:
    """Stands in for the model's cache while rows run: the beginning's keys and values, then the rows' own."""

    def __init__(self, cache: DynamicCache, length: int) -> None:
        self._cache, self._length = cache, length

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        kept: Any = self._cache.layers[layer_idx]
        n = self._length
        return torch.cat([kept.keys[:, :, :n], keys], 2), torch.cat([kept.values[:, :, :n], values], 2)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._length


class _Rows:
    """The rows of one pass: how many there are at each layer, what is written in them, and what they see."""

    def __init__(
        self, model: Model, clean: Clean, runs: Sequence[Run], source: Mapping[int, Tensor], offsets: Tensor
    ) -> None:
        self._model, self._clean = model, clean
        self._source, self._offsets = source, offsets
        self._batch = torch.arange(len(offsets), device=offsets.device)[:, None]
        self._writes: dict[int, list[tuple[int, Columns]]] = {}
        for row, run in enumerate(runs):
            for layer, columns in run.writes:
                self._writes.setdefault(layer, []).append((row, columns))
        self._prefix = clean.positions.shape[1] - clean.tail
        self._cache = _Beginning(clean.cache, self._prefix)
        self._masks: dict[Any, Tensor] = {}
        self._most = len(runs)

    def written(self, layer: int, values: Tensor) -> Tensor:
        """The rows' values `[B, n * m, width]` with this layer's source values put in."""
        runs = values.unflatten(1, (-1, self._clean.tail)).clone()
        batch, offsets = self._batch.to(runs.device), self._offsets.to(runs.device)
        for row, columns in self._writes.get(layer, ()):
            new = self._source[layer][..., columns].to(runs)
            if isinstance(columns, slice):
                runs[:, row, :, columns][batch, offsets] = new
            else:
                runs[batch[..., None], row, offsets[..., None], columns] = new
        return runs.flatten(1, 2)

    def run_layer(self, layer: int, hidden: Tensor) -> Tensor:
        """The rows one layer on."""
        clean, n = self._clean, hidden.shape[1] // self._clean.tail
        own = clean.positions[:, self._prefix :].repeat(1, n)
        frame = Frame(own, torch.cat([clean.positions[:, : self._prefix], own], dim=1))
        self._model.frame = frame
        arguments = {}
        for name, value in clean.calls[layer].items():
            if name == "attention_mask":
                value = self._mask(value, n, hidden.dtype)
            elif value is clean.cache:
                value = self._cache
            elif name in _PER_TOKEN:
                value = _repeat(value, n, _PER_TOKEN[name])
            arguments[name] = value
        return tensor_of(self._model.layout.layers[layer](hidden, **arguments))

    def _mask(self, given: Tensor | None, n: int, dtype: torch.dtype) -> Tensor:
        """Each row sees the beginning as the prompt's own tail does, and of the rows only itself."""
        m, prefix, most = self._clean.tail, self._prefix, self._most
        key = None if given is None else (given.data_ptr(), given.shape)
        if key not in self._masks:
            tail = Frame(self._clean.positions[:, prefix:], self._clean.positions)
            mask = additive_mask(given, tail, dtype)
            beginning = mask[..., :prefix].repeat(1, 1, most, 1)
            among = mask.new_full((*mask.shape[:2], most, m, most, m), torch.finfo(dtype).min)
            each = torch.arange(most, device=mask.device)
            among[:, :, each, :, each] = mask[..., prefix:]
            self._masks[key] = torch.cat([beginning, among.flatten(4, 5).flatten(2, 3)], dim=-1)
        return self._masks[key][:, :, : n * m, : prefix + n * m]


def _repeat(value: Any, n: int, axis: int) -> Any:
    if isinstance(value, tuple):
        return tuple(_repeat(part, n, axis) for part in value)
    return value if value is None else torch.cat([value] * n, dim=axis)


@torch.no_grad()
def run_patched(
    model: Model,
    clean: Clean,
    site: str,
    runs: Sequence[Run],
    source: Mapping[int, Tensor],
    offsets: Tensor,
    metric: Bound,
) -> Tensor:
    """The metric of every patched run, float32 `[B, run]`, in one pass.

    Args:
        site: what is patched: `head_z`, `mlp_neurons`, `attn_out`, `mlp_out` or `resid_post`.
        runs: in ascending order of their start.
        source: by layer, the values to write, `[B, position, width of the site]`.
        offsets: where they go, `[B, position]`: indices into the tail.
    """
    scores = clean.score.float()[:, None].repeat(1, len(runs))
    after = site == "resid_post"
    joins = [run.start + after for run in runs]
    reach = sum(join <= metric.layer for join in joins)
    if after and metric.site == "resid_post" and (at := [r.start for r in runs]).count(metric.layer):
        # The patch replaces the very tensor that the metric reads.
        last = (offsets == clean.tail - 1).int()
        written = pick(source[metric.layer], torch.arange(len(last)), last.argmax(1))
        score = metric.score(written).to(clean.score.device)
        replaced = torch.where(last.any(1).to(score.device), score, clean.score)
        scores[:, at.index(metric.layer)] = replaced.float()
    if not reach:
        return scores
    rows = _Rows(model, clean, runs[:reach], source, offsets)
    hidden: Tensor | None = None
    keep = lambda t: t.unflatten(1, (-1, clean.tail))[:, :, -1].clone()  # noqa: E731
    with removing([]) as handles:
        if not after:
            for layer in {layer for run in runs[:reach] for layer, _ in run.writes}:
                handles.append(hook(model.layout.point(site, layer), partial(rows.written, layer)))
        try:
            with reading(model.layout, [metric.site], keep, [metric.layer]) as final:
                for layer in range(joins[0], metric.layer + 1):
                    joining = joins[:reach].count(layer)
                    if joining:
                        new = clean.inputs[layer].repeat(1, joining, 1)
                        hidden = new if hidden is None else torch.cat([hidden, new], dim=1)
                    assert hidden is not None
                    if after:
                        hidden = rows.written(layer - 1, hidden)
                    hidden = rows.run_layer(layer, hidden)
        finally:
            model.frame = None
    values = final[metric.site, metric.layer]
    scores[:, :reach] = metric.score(values).float()
    return scores
