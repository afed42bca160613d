"""Gradients of single examples with respect to one weight, and how alike they are (paper D, section 4.2).

A linear module's gradient is `dW = sum_t delta_t x_t^T`, with `x_t` its input at token t and `delta_t` the loss's
gradient at its output. Both are read where the module runs, so the weight may be packed in 4 bits and frozen, and
inner products of gradients follow without a single `[d_out, d_in]` matrix:
`<dW_i, dW_j> = sum_{s,t} (x_is . x_jt)(delta_is . delta_jt)`.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from rim_core import checking
from rim_core.errors import InputError
from rim_core.measures._gradient_cosines import GradientCosines, compare, labelled
from rim_core.measures.likelihood import completing
from rim_core.models.batching import run_batches, token_budget
from rim_core.models.hooks import pick, reading
from rim_core.models.layout import Layout, in_features
from rim_core.models.model import Model
from rim_core.stats import Floats
from rim_core.texts import encode, encode_more, require_room

# x `[token, d_in]` and delta `[token, d_out]` of the tokens that carry any gradient.
Factors = tuple[Tensor, Tensor]
Weight = Literal["attention_out", "mlp_out"]
LossOn = Literal["completion", "all"]

LARGEST_EXPLICIT = 1e9  # bytes
_LOGITS_HELD = 2**24
_ELEMENTS_HELD = 2**24


def gradient_cosines(
    model: Model,
    prompts: Sequence[str],
    completions: Sequence[str],
    labels: Sequence[object],
    *,
    pairs: Sequence[object] | None = None,
    layer: int | None = None,
    weight: Weight = "attention_out",
    loss_on: LossOn = "completion",
    seed: int = 0,
) -> GradientCosines:
    """Compare examples by the gradient of their loss with respect to one weight (paper D, section 4.2).

    The loss of an example is the mean negative log likelihood (nats) of its completion's tokens. The paper's code
    takes it over the prompt too (`loss_on="all"`, every token but the first), so that its gradients differ
    by prompt even where completions are equal. Published: the attention output of the last layer.

    The gradient is that of the module's effective weight: dequantised, and with an active LoRA adapter
    `W + scale * B A` and not A or B. Memory: `4 * (d_in + d_out)` bytes a token that carries gradient.

    Args:
        model: a loaded model; the adapter and edits now active apply.
        prompts: as the model is to see them (see `format_chat`), `[example]`.
        completions: what follows, tokenised apart as in training and generation, `[example]`.
        labels: the set each example is from, at least 3 examples a set, `[example]`.
        pairs: names of what belongs together (one completion under two prompts, say), `[example]`, or None. Pairs
            are resampled whole, labels are permuted within them, and their own cosines are kept apart: else
            equal completions would pass for likeness across labels.
        layer: counted from 0; None is the last.
        weight: the output projection of attention, or the down projection of the MLP.
        loss_on: the tokens that the loss counts.
        seed: of resamples and permutations.

    Raises:
        InputError: lists of different lengths, an empty text, a layer or weight that the model does not have, too
            few examples of a label, or a gradient that is zero or not finite.
        IdentityError: padding changes this model's numbers, or its logits are not those of its readout.

    Example:
        >>> prompts, answers = [texts[0], texts[1]] * 3, [" Air.", " Rain.", " A pan.", " Hi.", " No.", " Yes."]
        >>> found = rim.gradient_cosines(model, prompts, answers, ["facts"] * 3 + ["talk"] * 3)
        >>> found.to_frame()["comparison"].tolist()[:3]
        ['within', 'cross', 'within minus cross']
    """
    examples = labelled(labels, pairs, len(prompts), "gradient_cosines")
    layer = model.checked_layer(layer)
    factors = _factors(model, prompts, completions, layer, weight, loss_on, "gradient_cosines")
    about = f"{weight} of layer {layer}, loss on {loss_on}"
    return compare(_gram(factors), examples, seed, about)


def compare_gradients(
    gradients: Any, labels: Sequence[object], *, pairs: Sequence[object] | None = None, seed: int = 0
) -> GradientCosines:
    """Compare gradients that are there already, such as those of two models side by side.

    Args:
        gradients: `[example, ...]`, array or tensor, as `per_example_gradients` gives them.
        labels: as in `gradient_cosines`.
        pairs: as there.
        seed: as there.

    Raises:
        InputError: as in `gradient_cosines`.

    Example:
        >>> import numpy as np
        >>> vectors = 3 + np.random.default_rng(0).normal(size=(8, 5))
        >>> found = rim.gradients.compare_gradients(vectors, [0] * 4 + [1] * 4)
        >>> bool(found.raw.cross.estimate > 0 > found.centred.cross.estimate)  # centring alone does this
        True
    """
    flat = torch.as_tensor(gradients).detach().flatten(1)
    examples = labelled(labels, pairs, len(flat), "compare_gradients")
    gram = np.zeros((len(flat), len(flat)))
    for part in flat.split(max(1, _ELEMENTS_HELD // len(flat)), dim=1):
        block = part.double().cpu()
        gram += (block @ block.T).numpy()
    return compare(gram, examples, seed, "as given")


def per_example_gradients(
    model: Model,
    prompts: Sequence[str],
    completions: Sequence[str],
    *,
    layer: int | None = None,
    weight: Weight = "attention_out",
    loss_on: LossOn = "completion",
) -> Tensor:
    """Give each example's gradient, float32 `[example, d_out, d_in]` on the CPU (GPT-2 stores its weights transposed).

    Loss and arguments are those of `gradient_cosines`.

    Raises:
        InputError: as there, or a result above 1 GB.

    Example:
        >>> rim.per_example_gradients(model, texts[:2], [" Air.", " Rain."], layer=0).shape[:2] == (2, model.d_model)
        True
    """
    layer = model.checked_layer(layer)
    d_in = in_features(_module(model, layer, weight))
    size = 4 * len(prompts) * model.d_model * d_in
    if size > LARGEST_EXPLICIT:
        raise InputError(
            f"per_example_gradients: {len(prompts)} gradients of {model.d_model} x {d_in} take {size / 1e9:.1f} GB "
            f"(at most {LARGEST_EXPLICIT / 1e9:.0f}): use gradient_cosines, which never holds them, or fewer examples"
        )
    factors = _factors(model, prompts, completions, layer, weight, loss_on, "per_example_gradients")
    return torch.stack([delta.T @ x for x, delta in factors])


def _module(model: Model, layer: int, weight: str) -> nn.Module:
    checking.one_of(weight, ("attention_out", "mlp_out"), "weight")
    if weight == "mlp_out" and model.layout.mlp_out[layer] is None:
        raise InputError(
            f"the MLP of layer {layer} of {model.name} is a mixture of experts, without one down projection: "
            "choose weight='attention_out'"
        )
    return getattr(model.layout, weight)[layer]


def _factors(
    model: Model, prompts: Sequence[str], completions: Sequence[str], layer: int, weight: str, loss_on: str, tool: str
) -> list[Factors]:
    """The two factors of each example's gradient."""
    checking.one_of(loss_on, ("completion", "all"), "loss_on")
    module = _module(model, layer, weight)
    model.require(tool, "lens", "padding")
    checking.same_length(tool, prompts=prompts, completions=completions)
    heads, tails = encode(model, prompts), encode_more(model, completions)
    if empty := [number for number, tail in enumerate(tails) if not tail]:
        raise InputError(f"{tool}: completion {empty[0]} is empty: remove it")
    lengths = [len(head) + len(tail) for head, tail in zip(heads, tails, strict=True)]
    require_room(model, lengths, noun=f"{tool}: example")

    def run(rows: list[int]) -> list[Factors]:
        return _pass(model, module, [heads[row] for row in rows], [tails[row] for row in rows], loss_on)

    # Everything above the module is kept for the way back.
    budget = token_budget(model.layout, model.device) // (model.n_layers - layer)
    factors: dict[int, Factors] = {}
    for rows, found in run_batches(lengths, budget, run):
        factors.update(zip(rows, found, strict=True))
    for number in range(len(prompts)):
        if not all(torch.isfinite(factor).all() for factor in factors[number]):
            raise InputError(
                f"{tool}: the gradient of example {number} is not finite in {model.dtype}: load the model in float32"
            )
    return [factors[number] for number in range(len(prompts))]


def _pass(
    model: Model, module: nn.Module, heads: list[list[int]], tails: list[list[int]], loss_on: str
) -> list[Factors]:
    layout, last = model.layout, model.n_layers - 1
    ids = [head + tail for head, tail in zip(heads, tails, strict=True)]
    with (
        completing(model, ids, [len(tail) for tail in tails]) as (inputs, positions),
        _leaf_at(module) as held,
        reading(layout, ("resid_post",), lambda tensor: tensor.clone(), layers=[last]) as found,
    ):
        real = inputs["attention_mask"].bool()
        # The text's first token is predicted from nothing.
        scored = real[:, :-1] & real[:, 1:]
        if loss_on == "completion":
            scored &= positions[:, 1:] >= 0
        layout.body(**inputs, use_cache=False)
        states = pick(found["resid_post", last][:, :-1], scored)
        gradient = _loss_gradient(layout, states.detach(), inputs["input_ids"][:, 1:][scored])
        (delta,) = torch.autograd.grad(states, held["leaf"], gradient)
    carrying = real.to(delta.device) & delta.any(-1)
    # The loss was summed over tokens: small numbers survive half precision better undivided.
    counts = scored.sum(1)
    return [
        (
            pick(held["x"][row], carrying[row]).to("cpu", torch.float32),
            (delta[row][carrying[row]].float() / counts[row].to(delta.device)).cpu(),
        )
        for row in range(len(ids))
    ]


@contextlib.contextmanager
def _leaf_at(module: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Within the context a forward leaves the module's input `x`, and `leaf`, a zero added to its output.

    The gradient at the leaf is that at the output. Autograd is switched on from here up: a frozen model has no other
    leaf, and what lies below must leave no graph, even under an adapter whose weights ask for gradients.
    """
    held: dict[str, Tensor] = {}

    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        torch.set_grad_enabled(True)
        held["x"], held["leaf"] = args[0].detach().clone(), torch.zeros_like(output, requires_grad=True)
        return output + held["leaf"]

    handle = module.register_forward_hook(hook)
    try:
        with torch.no_grad():
            yield held
    finally:
        handle.remove()


def _loss_gradient(layout: Layout, states: Tensor, targets: Tensor) -> Tensor:
    """Gradient of the summed negative log likelihood of `targets` `[n]` at the last `resid_post`, `[n, d_model]`."""
    parts = []
    chunk = max(1, _LOGITS_HELD // layout.d_vocab)
    for part, wanted in zip(states.split(chunk), targets.split(chunk), strict=True):
        leaf = part.detach().requires_grad_()
        logits = layout.readout(leaf).float()
        loss = nn.functional.cross_entropy(logits, wanted.to(logits.device), reduction="sum")
        parts.append(torch.autograd.grad(loss, leaf)[0])
    return torch.cat(parts)


def _gram(factors: Sequence[Factors]) -> Floats:
    """Inner products of all gradients, `[example, example]`, by the cheaper of two exact routes."""
    tokens, examples = sum(len(x) for x, _ in factors), len(factors)
    d_in, d_out = (factor.shape[1] for factor in factors[0])
    if tokens**2 * (d_in + d_out) <= (tokens + examples**2) * d_in * d_out:
        return _gram_by_token(factors)
    return _gram_by_row(factors)


def _gram_by_token(factors: Sequence[Factors]) -> Floats:
    x, delta = (torch.cat(part).double() for part in zip(*factors, strict=True))
    owner = torch.repeat_interleave(torch.tensor([len(part) for part, _ in factors]))
    rows = []
    for own_x, own_delta in factors:
        products = ((own_x.double() @ x.T) * (own_delta.double() @ delta.T)).sum(0)
        rows.append(torch.zeros(len(factors), dtype=torch.float64).index_add(0, owner, products))
    return torch.stack(rows).numpy()


def _gram_by_row(factors: Sequence[Factors]) -> Floats:
    """A few rows of every gradient at a time."""
    d_in, d_out = (factor.shape[1] for factor in factors[0])
    gram = torch.zeros(len(factors), len(factors), dtype=torch.float64)
    height = max(1, _ELEMENTS_HELD // (len(factors) * d_in))
    for start in range(0, d_out, height):
        rows = torch.stack(
            [(delta[:, start : start + height].double().T @ x.double()).flatten() for x, delta in factors]
        )
        gram += rows @ rows.T
    return gram.numpy()
