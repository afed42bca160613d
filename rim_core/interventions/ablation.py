"""Ablation: heads, neurons, a direction or attention between positions, taken out while the model runs."""

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from rim_core.checking import number, one_of, whole
from rim_core.errors import InputError
from rim_core.interventions.components import COMPONENTS, Unit, columns_of, units_of
from rim_core.models.batching import run_batches, token_budget
from rim_core.models.capture import Activations, capture
from rim_core.models.hooks import Frame, MaskEdit, at, by_layer, edit_at, editing, first, lowest, pick, reading
from rim_core.models.model import Model
from rim_core.models.padding import pad_left
from rim_core.texts import checked, encode

# Modes of ablation: whether each needs a reference, and whether it can take a direction out.
MODES = {"zero": (False, True), "mean": (True, True), "resample": (True, False), "scale": (False, False)}
_STREAM = ("resid_pre", "attn_out", "mlp_out")

Reference = Sequence[str] | Activations


@contextlib.contextmanager
def ablate(
    model: Model,
    heads: Sequence[Unit] | None = None,
    *,
    neurons: Sequence[Unit] | None = None,
    direction: Any = None,
    mode: str | None = None,
    reference: Reference | None = None,
    positions: str | int | Sequence[int] = "all",
    factor: float = 0.0,
    keep_norm: bool = False,
    seed: int = 0,
) -> Iterator[Model]:
    """Within the context the chosen components are ablated, in capture, generation and every measurement.

    Contexts nest: an inner one edits what the outer ones left, and takes its reference under them. The adapter
    must be active before: a reference is taken once, on entry.

    - "zero" removes: a head's `head_z` or a neuron is 0; a direction is projected out of `resid_pre`, `attn_out` and
      `mlp_out` of every layer (Arditi et al. 2024, section 2.4), and out of the last `resid_post`, which in families
      that normalise what attention and MLP write would otherwise regain it.
    - "mean" holds at the mean over the reference (paper C, section III.E): a head or neuron at its mean, a direction's
      coordinate at its mean at each of those sites.
    - "resample" holds a head or neuron at its value at the last token of one reference prompt drawn by `seed`. It
      is the same for all prompts, so that one alone and in a batch gets the same numbers; repeat with other seeds
      for the distribution.
    - "scale" multiplies a head or neuron by `factor`.

    Args:
        model: a loaded model.
        heads: `(layer, head)` pairs.
        neurons: `(layer, neuron)` pairs of the MLP.
        direction: `[d_model]`, or one a layer `[layer, d_model]`; its length is not used.
        mode: "zero", "mean", "resample" or "scale"; by default "mean" for heads and neurons, "zero" for a direction.
        reference: for "mean" and "resample". Texts, of which all tokens count for the mean; or `Activations` captured
            before, of which all prompts and positions count.
        positions: "all", "last" (the prompt's last token), "answer" (that and generated tokens), or positions from
            the prompt's end. A prompt too short for a position is left as it is. Generated tokens belong to "all".
        factor: for "scale".
        keep_norm: rescale the heads' joint output at each token to the length it had. Paper B's code does so, with
            one factor for the whole batch; by token, an answer does not depend on its neighbours.
        seed: for "resample".

    Raises:
        InputError: components that do not exist or are named twice, or arguments that do not go together.
        IdentityError: heads are not what this model's attention output is the sum of, or padding changes its numbers.

    Example:
        >>> import torch
        >>> with rim.ablate(model, heads=[(0, 1), (1, 0)], mode="zero"):
        ...     acts = rim.capture(model, texts, "head_z")
        >>> float(acts["head_z"][:, 0, 1].abs().max())
        0.0
        >>> with rim.ablate(model, direction=torch.ones(model.d_model)):
        ...     state = rim.capture(model, texts, "resid_post")["resid_post"][:, -1]
        >>> bool((state.mean(-1).abs() < 1e-4).all())
        True
    """
    heads = [] if heads is None else units_of(model, heads, "heads")
    neurons = [] if neurons is None else units_of(model, neurons, "neurons")
    mode = one_of(("mean" if direction is None else "zero") if mode is None else mode, MODES, "mode")
    _refuse(heads, neurons, direction, mode, reference, number(factor, "factor"), keep_norm)
    seed = whole(seed, "ablate: seed")
    if direction is not None:
        unit = torch.nn.functional.normalize(by_layer(model, direction), dim=-1)
        places = [(site, layer) for site in _STREAM for layer in range(model.n_layers)]
        places.append(("resid_post", model.n_layers - 1))
        held = _held(model, mode, reference, places, seed)
        edits = []
        for site, layer in places:
            target = float(held[site, layer] @ unit[layer].cpu()) if held else 0.0
            edits.append(edit_at(positions, site, layer, _set_coordinate(unit[layer], target)))
    else:
        columns: dict[tuple[str, int], list[int]] = {}
        for component, given in (("heads", heads), ("neurons", neurons)):
            for pair in given:
                part = columns_of(model, component, pair)
                columns.setdefault((COMPONENTS[component], pair[0]), []).extend(range(part.start, part.stop))
        if heads:
            model.require("ablate", "head_sum")
        if keep_norm and (mode == "zero" or (mode == "scale" and factor == 0)):
            for (site, layer), chosen in columns.items():
                if len(chosen) == model.layout.width(site):
                    raise InputError(
                        f"keep_norm: all heads of layer {layer} are removed, so nothing is left to rescale"
                    )
        held = _held(model, mode, reference, list(columns), seed)
        edits = []
        for (site, layer), chosen in columns.items():
            gain, offset = torch.ones(model.layout.width(site)), torch.zeros(model.layout.width(site))
            gain[chosen] = factor if mode == "scale" else 0.0
            if held:
                offset[chosen] = held[site, layer][chosen]
            change = _affine(gain.to(model.device), offset.to(model.device), keep_norm)
            edits.append(edit_at(positions, site, layer, change))
    with editing(model, edits):
        yield model


def _affine(gain: Tensor, offset: Tensor, keep_norm: bool) -> Callable[[Tensor], Tensor]:
    def change(values: Tensor) -> Tensor:
        edited = values * gain.to(values) + offset.to(values)
        if not keep_norm:
            return edited
        before, after = (v.float().norm(dim=-1, keepdim=True) for v in (values, edited))
        return (edited * (before / after.clamp(min=1e-30))).to(values.dtype)

    return change


def _set_coordinate(unit: Tensor, target: float) -> Callable[[Tensor], Tensor]:
    def change(values: Tensor) -> Tensor:
        axis = unit.to(values.device)
        excess = values.float() @ axis - target
        return (values.float() - excess.unsqueeze(-1) * axis).to(values.dtype)

    return change


def _held(
    model: Model, mode: str, reference: Reference | None, places: list[tuple[str, int]], seed: int
) -> dict[tuple[str, int], Tensor]:
    """What sites are held at, `[width]`: the mean, or one prompt's last token; empty where no reference is."""
    if reference is None:
        return {}
    sites = tuple(dict.fromkeys(site for site, _ in places))
    if not isinstance(reference, Activations):
        ids, texts = encode(model, reference), checked(reference)
        if mode == "mean":
            return _text_means(model, ids, sites, sorted({layer for _, layer in places}))
        found = capture(model, [texts[random.Random(seed).randrange(len(ids))]], sites)
        by_site = {site: _flat(found, site)[0] for site in sites}
    else:
        by_site = {site: _from_activations(model, reference, site, mode, seed) for site in sites}
    return {(site, layer): by_site[site][layer] for site, layer in places}


def _flat(acts: Activations, site: str) -> Tensor:
    return acts[site].flatten(-2) if site == "head_z" else acts[site]


def _from_activations(model: Model, acts: Activations, site: str, mode: str, seed: int) -> Tensor:
    """`[layer, width]`: the mean, or the last token of one prompt."""
    values = _flat(acts, site)
    wanted = (model.n_layers, model.layout.width(site))
    if values.shape[-2:] != wanted:
        raise InputError(
            f"the reference's {site} is {list(values.shape[-2:])} a token, {model.name} has {list(wanted)}: "
            "capture it on this model"
        )
    if mode == "mean":
        tokens = values.flatten(0, -3) if acts.mask is None else values[acts.mask]
        return tokens.mean(0, dtype=torch.float64).float()
    if values.dim() == 4 and acts.mask is None:
        raise InputError("resample needs each prompt's last token: capture the reference at 'last' or 'all'")
    row = values[random.Random(seed).randrange(len(values))]
    return row if row.dim() == 2 else row[-1]


@torch.no_grad()
def _text_means(
    model: Model, ids: list[list[int]], sites: tuple[str, ...], layers: list[int]
) -> dict[tuple[str, int], Tensor]:
    model.require("ablate", "padding")
    lengths = [len(row) for row in ids]
    totals: dict[tuple[str, int], Tensor] = {}

    def run(rows: list[int]) -> dict[tuple[str, int], Tensor]:
        inputs = pad_left([ids[row] for row in rows], model.tokenizer.pad_token_id, model.device)
        real = inputs["attention_mask"].bool()

        def total(values: Tensor) -> Tensor:
            return pick(values, real).sum(0, dtype=torch.float64)

        with reading(model.layout, sites, total, layers=layers) as found:
            model.layout.body(**inputs, use_cache=False)
        return found

    for _, found in run_batches(lengths, token_budget(model.layout, model.device), run):
        for place, value in found.items():
            totals[place] = totals.get(place, 0.0) + value
    return {place: (value / sum(lengths)).float().cpu() for place, value in totals.items()}


def _refuse(
    heads: list[Any],
    neurons: list[Any],
    direction: Any,
    mode: str,
    reference: Reference | None,
    factor: float,
    keep_norm: bool,
) -> None:
    """Raise InputError where arguments of `ablate` do not go together."""
    needs, for_direction = MODES[mode]
    components, along = bool(heads or neurons), direction is not None
    for wrong, message in (
        (not components and not along, "nothing to ablate: give heads, neurons or a direction"),
        (components and along, "ablate takes components or a direction: nest two contexts for both"),
        (along and not for_direction, f"a direction cannot be ablated by {mode!r}: use mode='zero' or 'mean'"),
        (keep_norm and (neurons or along), "keep_norm is for heads: ablate the rest in a context of its own"),
        (
            needs and reference is None,
            f"mode {mode!r} needs reference: texts or captured Activations (or use mode='zero')",
        ),
        (
            not needs and reference is not None,
            f"mode {mode!r} takes no reference: leave it out, or use mode='mean' or 'resample'",
        ),
        (mode != "scale" and factor != 0, f"factor is for mode 'scale', not {mode!r}: leave it out"),
    ):
        if wrong:
            raise InputError(message)


@contextlib.contextmanager
def knock_out(
    model: Model,
    queries: str | int | Sequence[int],
    keys: str | int | Sequence[int],
    *,
    heads: Sequence[Unit] | None = None,
    layers: Sequence[int] | None = None,
) -> Iterator[Model]:
    """Within the context `queries` cannot attend to `keys` (attention knock-out, Geva et al. 2023, section 4).

    The attention weights are 0 and the others of that query grow so that they still sum to 1.

    Args:
        model: a loaded model with "sdpa" or "eager" attention.
        queries: who looks: "last" (the prompt's last token), "answer" (that and generated tokens), "all", or
            positions from the prompt's end. They hold for every prompt of a batch: for spans that differ (see
            `find_span`) run the prompts one at a time.
        keys: who is not seen, likewise.
        heads: `(layer, head)` pairs; by default every head of `layers`.
        layers: by default all.

    Raises:
        InputError: positions, heads or layers that do not exist, or a query that is left with nothing to attend to.

    Example:
        >>> with rim.knock_out(model, queries="last", keys=[-2, -3], layers=[0]):
        ...     blind = rim.capture(model, texts, "attn_out")["attn_out"]
        >>> bool((blind == rim.capture(model, texts, "attn_out")["attn_out"]).all())
        False
    """
    if heads is not None and layers is not None:
        raise InputError("knock_out takes heads or layers, not both: heads name their layers")
    if heads is not None and not heads:
        raise InputError("nothing to knock out: give heads, or leave them out for all")
    every = [(layer, head) for layer in model.checked_layers(layers) for head in range(model.n_heads)]
    blind: dict[int, Tensor] = {}
    for layer, head in every if heads is None else units_of(model, heads, "heads"):
        blind.setdefault(layer, torch.zeros(model.n_heads, dtype=torch.bool))[head] = True
    for wanted in (queries, keys):
        at(torch.tensor([[-1]]), wanted)  # what it cannot mean is refused here, not in the first pass
    # A query can lose only keys before it.
    changed = max((n for n in (first(queries), first(keys)) if n is not None), default=None)
    edits = [
        MaskEdit(layer, _blind(queries, keys, chosen.to(model.device)), lowest(queries, keys), changed)
        for layer, chosen in blind.items()
    ]
    with editing(model, edits):
        yield model


def _blind(
    queries: str | int | Sequence[int], keys: str | int | Sequence[int], heads: Tensor
) -> Callable[[Tensor, Frame], Tensor]:
    def apply(mask: Tensor, frame: Frame) -> Tensor:
        lowest = torch.finfo(mask.dtype).min
        pairs = at(frame.queries, queries)[:, :, None] & at(frame.keys, keys)[:, None, :]
        edited = mask.masked_fill(pairs[:, None] & heads[:, None, None].to(mask.device), lowest)
        # A softmax over nothing but the lowest number would attend to everything. A padded slot saw nothing before.
        if ((edited == lowest).all(-1) & ~(mask == lowest).all(-1)).any():
            raise InputError(
                f"knock_out of keys {keys!r} leaves a query of {queries!r} nothing to attend to: name fewer keys"
            )
        return edited

    return apply
