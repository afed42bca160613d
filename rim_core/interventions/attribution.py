"""Attribution patching: every component's patching effect by one gradient (Nanda 2023; Syed et al. 2023).

The effect of putting a source activation into the clean run is approximated to first order, (source - clean)
times the metric's gradient at the clean run. It is an approximation, so its agreement with exact patching is
measured on a sample of the pairs, each time.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.stats
import torch
from torch import Tensor

from rim_core import stats
from rim_core.checking import whole
from rim_core.errors import InputError
from rim_core.interventions._rows import Plan, read_source, rectangle
from rim_core.interventions.components import Unit
from rim_core.interventions.metrics import Metric
from rim_core.interventions.patching import Patched, Positions, Scored, make_plan, only, run_exact, run_plan
from rim_core.models.batching import token_budget
from rim_core.models.capture import Activations
from rim_core.models.hooks import Edit, editing, hook, pick, removing
from rim_core.models.model import Model
from rim_core.models.padding import pad_left

# Below this correlation with exact effects a warning is given.
_POOR = 0.8


@dataclass(frozen=True, eq=False)
class Attributed(Patched):
    """Approximate effects, and how well they agree with exact patching on a sample.

    Attributes:
        sample: the pairs that were also patched exactly.
        correlation: Pearson's r of approximate and exact effects over the sample's pairs and components; NaN where
            either does not vary.
        largest_error: the largest difference between them, in the metric's units.

    Example:
        >>> import torch
        >>> metric = rim.Projection(torch.ones(model.d_model), layer=0)
        >>> found = rim.attribution_patch(model, texts[:2], texts[2:], "mlp", metric, layers=[0], sample=1)
        >>> len(found.sample), found.largest_error < 1e-3
        (1, True)
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
    *,
    layers: Sequence[int] | None = None,
    positions: Positions = "last",
    source_positions: Positions | None = None,
    units: Sequence[Unit | Sequence[Unit]] | None = None,
    max_tokens: int | None = None,
    sample: int = 8,
    seed: int = 0,
) -> Attributed:
    """The effects of `patch` to first order, all components by one backward pass a batch.

    The gradient starts at the token embeddings, so frozen and 4-bit models work. A warning is given where the effects
    agree poorly with exact patching on the sample (a correlation below 0.8).

    Args:
        model: as for `patch`, like all arguments down to `max_tokens`.
        source: where values come from.
        destination: where they go.
        components: what is patched.
        metric: what runs are scored by; a function must be differentiable.
        layers: which to patch.
        positions: in the destination.
        source_positions: in the source.
        units: heads or neurons.
        max_tokens: padded tokens a pass.
        sample: pairs patched exactly too, to report the correlation; at least 1.
        seed: of the draw of the sample.

    Raises:
        InputError: as `patch`; or a metric without a gradient.
        IdentityError: as `patch`.

    Example:
        >>> import torch
        >>> metric = rim.Projection(torch.ones(model.d_model), layer=0)
        >>> found = rim.attribution_patch(model, texts[:2], texts[2:], "mlp", metric, layers=[0])
        >>> round(found.correlation, 3)  # linear in the MLP's output, so the first order is all there is
        1.0
    """
    sample = whole(sample, "sample", 1)
    plan = make_plan(
        model, source, destination, components, metric, layers, positions, source_positions, units, max_tokens
    )
    # A backward pass keeps every layer's activations: about as much again a layer as a forward pass holds in all.
    budget = max_tokens or max(64, token_budget(model.layout, model.device) // max(1, model.n_layers // 4))
    effects, clean, original = run_plan(plan, budget, lambda rows: _attribute_batch(model, plan, rows))
    drawn = stats.derive_generator(seed, "attribution").permutation(len(plan.ids))[:sample]
    chosen = sorted(int(pair) for pair in drawn)
    exact = run_exact(model, only(model, plan, chosen), max_tokens)[0]
    correlation = _correlation(effects[chosen], exact)
    if correlation < _POOR:
        warnings.warn(
            f"attribution_patch: on {len(chosen)} pairs patched exactly too, effects correlate only {correlation:.2f} "
            "with the exact ones: patch exactly what matters (rim.patch)",
            stacklevel=2,
        )
    return Attributed(
        plan.components,
        plan.metric.title,
        effects,
        clean,
        original,
        plan.layers,
        plan.units,
        tuple(chosen),
        correlation,
        float((effects[chosen] - exact).abs().max()),
    )


def _attribute_batch(model: Model, plan: Plan, rows: list[int]) -> Scored:
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
    leaf = hook((model.hf.get_input_embeddings(), False), lambda embedded: embedded.detach().requires_grad_(True))
    with removing([leaf]), torch.enable_grad(), editing(model, edits):
        model.layout.body(**inputs, use_cache=False)
        if not scored[0].requires_grad:
            raise InputError("the metric has no gradient: attribution needs a differentiable one; use patch")
        tensors = [found[layer] for layer in wanted]
        gradients = torch.autograd.grad(scored[0].sum(), tensors, allow_unused=True)
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
    return approximate, scored[0].detach().float().cpu(), None if source_score is None else source_score.float().cpu()


def _first_of_each(at: Tensor) -> Tensor:
    """Which entries of each row appear there for the first time, `[pair, position]`."""
    same = at[:, :, None] == at[:, None, :]
    return ~same.tril(-1).any(-1)


def _correlation(a: Tensor, b: Tensor) -> float:
    x, y = a.flatten().numpy().astype(np.float64), b.flatten().numpy().astype(np.float64)
    if len(x) < 2 or not x.std() or not y.std():
        return float("nan")
    return float(scipy.stats.pearsonr(x, y).statistic)
