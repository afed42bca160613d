"""Steering: a direction added to the residual stream while the model runs, and its placebo.

To take a direction out, use `ablation.ablate(model, direction=...)`.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from rim_core.checking import is_whole, number, whole, whole_numbers
from rim_core.errors import InputError
from rim_core.models.hooks import by_layer, edit_at, editing
from rim_core.models.model import Model

_SITES = ("resid_post", "resid_pre")


@contextlib.contextmanager
def steer(
    model: Model,
    direction: Any,
    layers: int | Sequence[int],
    coefficient: float = 1.0,
    positions: str | int | Sequence[int] = "all",
    site: str = "resid_post",
    normalise: bool = False,
) -> Iterator[Model]:
    """Within the context `coefficient * direction` is added to the residual stream (Arditi et al. 2024, section 2.4).

    Args:
        model: a loaded model.
        direction: `[d_model]`, or one a layer `[layer, d_model]`, of which `layers` takes its own.
        layers: where to add it, one layer or several.
        coefficient: in units of the direction's length, or of the stream itself with `normalise`.
        positions: "all" (generated tokens too), "last" (the prompt's last token), "answer" (that and generated
            tokens), or positions from its end. A
            prompt too short for a position is left as it is.
        site: "resid_post" or "resid_pre".
        normalise: bring the direction to length 1 first.

    Raises:
        InputError: a direction of another shape or length 0, or a layer, site or position that does not exist.
    """
    if site not in _SITES:
        raise InputError(f"steer works on {' or '.join(_SITES)}, not {site!r}")
    coefficient = number(coefficient, "coefficient")
    chosen = whole_numbers(layers, "layers")
    if len(set(chosen)) < len(chosen):
        raise InputError(f"layers {chosen} must name at least one layer, each once")
    rows = by_layer(model, direction)
    if out := [layer for layer in chosen if not 0 <= layer < model.n_layers]:
        raise InputError(f"layer {out[0]} is out of range: {model.name} has layers 0 to {model.n_layers - 1}")
    if normalise:
        rows = torch.nn.functional.normalize(rows, dim=-1)
    edits = [edit_at(positions, site, layer, _add(coefficient * rows[layer])) for layer in chosen]
    with editing(model, edits):
        yield model


def _add(shift: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda values: values + shift.to(values)


def random_direction(like: Any, seed: int = 0) -> Tensor:
    """A placebo for `like`: the same, turned at random, float32 on the CPU.

    Of one direction `[d_model]` this is a random direction of the same length. Directions of several layers
    `[layer, d_model]` are turned together, so that their lengths and the angles between them stay: drawn one by one
    they would not add up over layers as the real ones do.

    Args:
        like: the direction or directions. A width gives one direction of length 1.
        seed: of the draw.

    Raises:
        InputError: another shape, or numbers that are not finite.
    """
    seed = whole(seed, "random_direction: seed", 0)
    given = torch.eye(1, whole(like, "width", 1))[0] if is_whole(like) else torch.as_tensor(like).cpu()
    rows = torch.atleast_2d(given.double())
    if rows.dim() != 2 or not rows.numel() or not rows.isfinite().all():
        raise InputError(f"direction has shape {list(given.shape)}: give finite numbers [d_model] or [layer, d_model]")
    # Rows = lengths along their own orthonormal axes; the axes are exchanged for random ones.
    left, lengths, _ = torch.linalg.svd(rows, full_matrices=False)
    noise = torch.randn(rows.shape[1], len(lengths), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    axes, upper = torch.linalg.qr(noise)
    # With signs fixed the axes are uniform; without, they depend on how QR was computed.
    axes = axes * upper.diagonal().sign()
    return ((left * lengths) @ axes.T).float().reshape(given.shape)
