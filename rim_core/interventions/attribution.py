"""Attribution patching: every component's patching effect by one gradient (Nanda 2023; Syed et al. 2023).

The effect of putting a source activation into the clean run is approximated to first order, (source - clean)
times the metric's gradient at the clean run. It is an approximation, so its agreement with exact patching is
measured on a sample of the pairs, each time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.stats
import torch
from torch import Tensor, nn

from rim_core import stats
from rim_core.checking import is_whole, whole
from rim_core.errors import InputError
from rim_core.interventions.metrics import Metric
from rim_core.interventions.patching import Patched, check_scores, patch
from rim_core.interventions.plans import Plan, Positions, Unit, make_plan, read_source, rectangle
from rim_core.models.batching import pad_left, run_batches, token_budget
from rim_core.models.capture import Activations
from rim_core.models.hooks import Edit, editing, pick
from rim_core.models.model import Model


@dataclass(frozen=True, eq=False)
class Attributed(Patched):
    """Approximate effects, and how well they agree with exact patching on a sample.

    Attributes:
        sample: the pairs that were also patched exactly.
        correlation: Pearson's r of approximate and exact effects over the sample's pairs and components; NaN where
            either does not vary.
        largest_error: the largest difference between them, in the metric's units.
    """

    sample: tuple[int, ...] = ()
    correlation: float = float("nan")
    largest_error: float = float("nan")


def attribution_patch(
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
    sample: int = 8,
    seed: int = 0,
) -> Attributed:
    """The effects of `patch` to first order, all components by one backward pass a batch.

    The gradient starts at the token embeddings, so frozen and 4-bit models work.

    Args:
        model, source, destination, components, metric, layers, positions, source_positions, units, max_tokens: as
            for `patch`; a function as the metric must be differentiable.
        sample: pairs patched exactly too, drawn by `seed`, to report the correlation; at least 1.

    Raises:
        InputError, IdentityError: as `patch`; or a metric without a gradient.
    """
    sample = whole(sample, "sample", 1)
    plan = make_plan(model, source, destination, components, metric, layers, positions, source_positions, units)
    effects = torch.empty(len(destination), len(plan.runs))
    clean, original = torch.empty(len(destination)), torch.full((len(destination),), float("nan"))
    # A backward pass keeps every layer's activations: about as much again a layer as a forward pass holds in all.
    budget = max_tokens or max(64, token_budget(model.layout, model.device) // max(1, model.n_layers // 4))
    lengths = [max(len(a), len(b)) for a, b in zip(plan.ids, plan.source_ids or plan.ids, strict=True)]
    for rows, (approximate, was, source_score) in run_batches(
        lengths, budget, lambda rows: _attribute_batch(model, plan, rows)
    ):
        effects[rows], clean[rows] = approximate, was
        if source_score is not None:
            original[rows] = source_score
    check_scores(plan, clean, original, effects)
    effects = plan.shaped(effects)
    drawn = stats.derive_generator(seed, "attribution").permutation(len(destination))[:sample]
    chosen = sorted(int(pair) for pair in drawn)
    exact = patch(
        model,
        _subset(source, chosen),
        [destination[pair] for pair in chosen],
        components,
        metric,
        layers,
        _subset_positions(positions, chosen),
        None if source_positions is None else _subset_positions(source_positions, chosen),
        units,
        max_tokens,
        progress=False,
    ).effects
    return Attributed(
        components,
        plan.metric.title,
        effects,
        clean,
        original,
        plan.layers,
        plan.units,
        tuple(chosen),
        _correlation(effects[chosen], exact),
        float((effects[chosen] - exact).abs().max()),
    )


def _attribute_batch(model: Model, plan: Plan, rows: list[int]) -> tuple[Tensor, Tensor, Tensor | None]:
    """Approximate effects `[pair, run]`, clean scores and source scores, on the CPU."""
    with torch.no_grad():
        values, source_score = read_source(model, plan, rows)
    inputs = pad_left([plan.ids[row] for row in rows], model.tokenizer.pad_token_id, model.device)
    at = rectangle([plan.positions[row] for row in rows], model.device) + inputs["input_ids"].shape[1]
    each = torch.arange(len(rows), device=model.device)[:, None]
    metric, wanted = plan.metric, sorted(values)
    found: dict[int, Tensor] = {}
    scored: list[Tensor] = []

    def keep(layer: int) -> Edit:
        def apply(tensor: Tensor, positions: Tensor) -> Tensor:
            found[layer] = tensor
            return tensor.clone()  # what the model goes on with, and may change in place

        return Edit(plan.site, layer, apply)

    def score(tensor: Tensor, positions: Tensor) -> Tensor:
        scored.append(metric.score(tensor[:, -1]))
        return tensor

    edits = [*(keep(layer) for layer in wanted), Edit(metric.site, metric.layer, score)]
    handle = model.hf.get_input_embeddings().register_forward_hook(_leaf)
    try:
        with torch.enable_grad(), editing(model, edits):
            model.layout.body(**inputs, use_cache=False)
            if not scored[0].requires_grad:
                raise InputError("the metric has no gradient: attribution needs a differentiable one; use patch")
            tensors = [found[layer] for layer in wanted]
            gradients = torch.autograd.grad(scored[0].sum(), tensors, allow_unused=True)
    finally:
        handle.remove()
    # Positions repeated to fill the rectangle are counted once.
    first = _first_of_each(at)
    products = {}
    for layer, tensor, gradient in zip(wanted, tensors, gradients, strict=True):
        if gradient is None:  # the metric is read below this layer
            gradient = torch.zeros_like(tensor)
        change = values[layer].to(tensor.device).float() - pick(tensor.detach(), each, at).float()
        product = change * pick(gradient, each, at).float() * first[..., None].to(tensor.device)
        products[layer] = product.sum(1).to(model.device)
    effects = [
        torch.stack([products[layer][:, columns].sum(-1) for layer, columns in run.writes]).sum(0) for run in plan.runs
    ]
    approximate = torch.stack(effects, dim=1).cpu()
    return (approximate, scored[0].detach().float().cpu(), None if source_score is None else source_score.float().cpu())


def _leaf(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output.detach().requires_grad_(True)


def _first_of_each(at: Tensor) -> Tensor:
    """Which entries of each row appear there for the first time, `[pair, position]`."""
    same = at[:, :, None] == at[:, None, :]
    return ~same.tril(-1).any(-1)


def _subset(source: Sequence[str] | Activations, chosen: list[int]) -> Sequence[str] | Activations:
    if isinstance(source, Activations):
        return Activations(source.sites, {site: source[site][chosen] for site in source.sites})
    return [source[pair] for pair in chosen]


def _subset_positions(positions: Positions, chosen: list[int]) -> Positions:
    if isinstance(positions, str) or is_whole(positions):
        return positions
    rows: Any = positions
    return positions if is_whole(rows[0]) else [rows[pair] for pair in chosen]


def _correlation(a: Tensor, b: Tensor) -> float:
    x, y = a.flatten().numpy().astype(np.float64), b.flatten().numpy().astype(np.float64)
    if len(x) < 2 or not x.std() or not y.std():
        return float("nan")
    return float(scipy.stats.pearsonr(x, y).statistic)
