"""Steering: a direction added to the residual stream while the model runs.

Its placebo is `controls.random_direction`; to take a direction out, use `ablation.ablate(model, direction=...)`.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from rim_core.checking import number, one_of, whole_numbers
from rim_core.models.hooks import by_layer, edit_at, editing
from rim_core.models.model import Model

_SITES = ("resid_post", "resid_pre")


@contextlib.contextmanager
def steer(
    model: Model,
    direction: Any,
    layers: int | Sequence[int],
    *,
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
            tokens), or positions from its end.
        site: "resid_post" or "resid_pre".
        normalise: bring the direction to length 1 first.

    Raises:
        InputError: a direction of another shape or length 0, or a layer, site or position that does not exist.

    Example:
        >>> import torch
        >>> before = rim.capture(model, texts, "resid_post")["resid_post"][:, 0]
        >>> with rim.steer(model, torch.ones(model.d_model), 0, coefficient=2.0):
        ...     after = rim.capture(model, texts, "resid_post")["resid_post"][:, 0]
        >>> round(float((after - before).mean()), 3)
        2.0
    """
    one_of(site, _SITES, "site of steer")
    coefficient = number(coefficient, "coefficient")
    chosen = model.checked_layers(whole_numbers(layers, "layers", distinct=True))
    rows = by_layer(model, direction)
    if normalise:
        rows = torch.nn.functional.normalize(rows, dim=-1)
    edits = [edit_at(positions, site, layer, _add(coefficient * rows[layer])) for layer in chosen]
    with editing(model, edits):
        yield model


def _add(shift: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda values: values + shift.to(values)
