"""Metrics: what a patched or attributed run is scored by, one number a prompt.

Each names the site and the layer it reads, at the prompt's last token; a run that cannot reach that site is not
computed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rim_core.errors import InputError
from rim_core.models.layout import SITES
from rim_core.models.model import Model
from rim_core.models.tokens import Tokens, two_sides


@dataclass(frozen=True)
class Bound:
    """A metric on one model: `score(values)` maps `[..., width]` at the site of the layer to `[...]`."""

    site: str
    layer: int
    score: Callable[[Tensor], Tensor]
    title: str


@dataclass(frozen=True)
class Projection:
    """The scalar projection of a site on a direction, in the units of the activations.

    Paper C (sections III.B and III.C) scores by the last layer's `mlp_neurons` on its refusal vector; the default
    is the final residual stream.

    Attributes:
        direction: `[width of the site]`, heads flat; scaled to unit length.
        site: from `sites.SITES`.
        layer: negative counts from the last.
        origin: `[width]`, subtracted before projecting, or None.
    """

    direction: Tensor
    site: str = "resid_post"
    layer: int = -1
    origin: Tensor | None = None

    def bind(self, model: Model) -> Bound:
        """The metric on this model; raises InputError where site, layer or width do not fit."""
        width = _width(model, self.site)
        vector = _vector(self.direction, width, "direction")
        if not vector.norm() > 0:
            raise InputError("the metric's direction has length zero: give a direction that points somewhere")
        unit = vector / vector.norm()
        shift = float(_vector(self.origin, width, "origin") @ unit) if self.origin is not None else 0.0
        return _linear(model, self.site, self.layer, unit, -shift, "projection on the direction")


@dataclass(frozen=True)
class ProbeScore:
    """A linear probe's log-odds, `values @ weights + bias` (see `probe_layers`).

    Attributes:
        weights: `[width of the site]`, heads flat.
        bias: a number.
        site, layer: where the probe was trained.
    """

    weights: Any
    bias: float = 0.0
    site: str = "resid_post"
    layer: int = -1

    def bind(self, model: Model) -> Bound:
        """The metric on this model; raises InputError where site, layer or width do not fit."""
        weights = _vector(self.weights, _width(model, self.site), "weights")
        return _linear(model, self.site, self.layer, weights, float(self.bias), "probe's log-odds")


@dataclass(frozen=True)
class LogitDifference:
    """Logit of `toward` less logit of `against` for the next token; of several tokens the mean.

    Attributes:
        toward, against: token strings or ids, one or several, as in `logit_lens`.
    """

    toward: Tokens
    against: Tokens

    def bind(self, model: Model) -> Bound:
        """The metric on this model; raises InputError for a text of several tokens, or one token on both sides."""
        (_, toward), (_, against) = two_sides(model, self.toward, self.against)

        def score(state: Tensor) -> Tensor:
            logits = model.layout.readout(state, [*toward, *against])
            return logits[..., : len(toward)].mean(-1) - logits[..., len(toward) :].mean(-1)

        return Bound("resid_post", model.n_layers - 1, score, "logit difference")


Metric = Projection | ProbeScore | LogitDifference | Callable[[Tensor], Tensor]


def bind(model: Model, metric: Metric) -> Bound:
    """Any metric on this model; a plain function gets the final residual state `[..., d_model]`.

    Raises:
        InputError: it is no metric, or does not fit the model.
    """
    if isinstance(metric, Projection | ProbeScore | LogitDifference):
        return metric.bind(model)
    if callable(metric):

        def score(state: Tensor) -> Tensor:
            found = metric(state)
            if not isinstance(found, Tensor) or found.shape != state.shape[:-1]:
                got = f"shape {list(found.shape)}" if isinstance(found, Tensor) else f"{type(found).__name__}"
                raise InputError(
                    f"the metric maps states {list(state.shape)} to {got}: it must give a tensor with one number a "
                    f"state, {list(state.shape[:-1])}"
                )
            return found

        return Bound("resid_post", model.n_layers - 1, score, "metric")
    raise InputError(f"{metric!r} is no metric: give Projection, LogitDifference, ProbeScore or a function")


def _width(model: Model, site: str) -> int:
    if site not in SITES:
        raise InputError(f"unknown site {site!r}: choose from {', '.join(SITES)}")
    special = {"head_z": model.n_heads * model.head_dim, "mlp_neurons": model.d_mlp}
    return int(special.get(site, model.d_model))


def _vector(values: Any, width: int, what: str) -> Tensor:
    vector = torch.as_tensor(values).detach().float().flatten().cpu()
    if len(vector) != width:
        raise InputError(f"the metric's {what} has {len(vector)} numbers, and its site has {width}")
    if not vector.isfinite().all():
        raise InputError(f"the metric's {what} has numbers that are not finite")
    return vector


def _linear(model: Model, site: str, layer: int, weights: Tensor, bias: float, title: str) -> Bound:
    (layer,) = model.checked_layers([layer], lowest=-model.n_layers)

    def score(values: Tensor) -> Tensor:
        return values.float() @ weights.to(values.device) + bias

    return Bound(site, layer % model.n_layers, score, title)
