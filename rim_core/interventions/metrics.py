"""Metrics: what a patched or attributed run is scored by, one number a prompt.

Each names the site and the layer it reads, at the prompt's last token; a run that cannot reach that site is not
computed. A function of one's own gets the final residual states, or, as `LogitMetric(function)`, the logits.
"""

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import Tensor

from rim_core.checking import number, shown
from rim_core.errors import InputError
from rim_core.models.batching import told_of
from rim_core.models.first_tokens import log_odds, refusal_tokens
from rim_core.models.model import Model
from rim_core.models.tokens import Tokens, single_tokens, two_sides

# Rows whose logits are held at once.
_ROWS = 256


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
        layer: counted from 0; None is the last.
        origin: `[width]`, subtracted before projecting, or None.

    Example:
        >>> import torch
        >>> metric = rim.Projection(torch.ones(model.d_model))
        >>> rim.patch(model, texts[:2], texts[2:], "mlp", metric).clean.shape
        torch.Size([2])
    """

    direction: Any
    _: KW_ONLY
    site: str = "resid_post"
    layer: int | None = None
    origin: Any = None

    def bind(self, model: Model, text: str = "") -> Bound:
        """The metric on this model; raises InputError where site, layer or width do not fit."""
        vector = _vector(model, self.site, self.direction, "direction")
        if not vector.norm() > 0:
            raise InputError("the metric's direction has length zero: give a direction that points somewhere")
        unit = vector / vector.norm()
        shift = float(_vector(model, self.site, self.origin, "origin") @ unit) if self.origin is not None else 0.0
        return _linear(model, self.site, self.layer, unit, -shift, "projection on the direction")


@dataclass(frozen=True)
class ProbeScore:
    """A linear probe's log-odds, `values @ weights + bias` (see `probe_layers`).

    Attributes:
        weights: `[width of the site]`, heads flat.
        bias: a number.
        site: where the probe was trained.
        layer: where the probe was trained; None is the last.

    Example:
        >>> import torch
        >>> metric = rim.ProbeScore(torch.ones(model.d_model), 0.5, site="attn_out", layer=0)
        >>> rim.patch(model, texts[:2], texts[2:], "heads", metric, layers=[0]).metric
        "probe's log-odds"
    """

    weights: Any
    bias: float = 0.0
    _: KW_ONLY
    site: str = "resid_post"
    layer: int | None = None

    def bind(self, model: Model, text: str = "") -> Bound:
        """The metric on this model; raises InputError where site, layer or width do not fit."""
        weights = _vector(model, self.site, self.weights, "weights")
        return _linear(model, self.site, self.layer, weights, number(self.bias, "bias"), "probe's log-odds")


@dataclass(frozen=True)
class LogitDifference:
    """Logit of `toward` less logit of `against` for the next token; of several tokens the mean.

    Attributes:
        toward: token strings or ids, one or several, as in `logit_lens`.
        against: likewise.

    Example:
        >>> metric = rim.LogitDifference(toward=5, against=[6, 7])
        >>> rim.patch(model, texts[:2], texts[2:], "attention", metric).metric
        'logit difference'
    """

    toward: Tokens
    against: Tokens

    def bind(self, model: Model, text: str = "") -> Bound:
        """The metric on this model; raises InputError for a text of several tokens, or one token on both sides."""
        (_, toward), (_, against) = two_sides(model, self.toward, self.against)

        def score(state: Tensor) -> Tensor:
            logits = model.layout.readout(state.to(model.dtype), [*toward, *against]).float()
            return logits[..., : len(toward)].mean(-1) - logits[..., len(toward) :].mean(-1)

        return Bound("resid_post", model.n_layers - 1, score, "logit difference")


@dataclass(frozen=True)
class LogProbability:
    """The natural logarithm of the probability that the next token is one of `tokens`.

    Attributes:
        tokens: token strings or ids, one or several, as in `logit_lens`.
        layer: below the last it is what the logit lens reads there; None is the last.

    Example:
        >>> found = rim.patch(model, texts[:2], texts[2:], "mlp", rim.LogProbability(5))
        >>> bool((found.clean < 0).all())
        True
    """

    tokens: Tokens
    _: KW_ONLY
    layer: int | None = None

    def bind(self, model: Model, text: str = "") -> Bound:
        """The metric on this model; raises InputError for a text of several tokens, or a token named twice."""
        chosen = list(single_tokens(model, self.tokens)[1])

        def read(logits: Tensor) -> Tensor:
            return logits[:, chosen].logsumexp(-1) - logits.logsumexp(-1)

        return _of_logits(model, read, "log-probability", self.layer)


@dataclass(frozen=True)
class RefusalLogOdds:
    """How much likelier than not a refusal opens the answer, in nats: `refusal_log_odds` as a metric.

    Attributes:
        tokens: openings as strings, of which the first token counts after the first destination text, or token
            numbers; None is `openings.REFUSAL_OPENINGS`.

    Example:
        >>> import torch
        >>> metric = rim.RefusalLogOdds(tokens=[5, 6])
        >>> clean = rim.patch(model, texts[:2], texts[2:], "mlp", metric).clean
        >>> bool(torch.allclose(clean, rim.refusal_log_odds(model, texts[2:], tokens=[5, 6]), atol=1e-4))
        True
    """

    tokens: Sequence[str | int] | None = None

    def bind(self, model: Model, text: str = "") -> Bound:
        """The metric on this model for answers to texts like `text`; raises InputError as `refusal_log_odds`."""
        chosen = refusal_tokens(model, text, self.tokens)
        return _of_logits(model, lambda rows: log_odds(rows, chosen), "refusal log-odds")


@dataclass(frozen=True)
class LogitMetric:
    """A function of one's own of the next token's logits.

    Attributes:
        function: maps float32 logits `[row, vocabulary]` to `[row]`, each row by itself; differentiable if it is to
            serve `attribution_patch`.

    Example:
        >>> import torch
        >>> entropy = rim.LogitMetric(lambda logits: torch.distributions.Categorical(logits=logits).entropy())
        >>> rim.patch(model, texts[:2], texts[2:], "heads", entropy, layers=[1]).effects.shape[:2]
        torch.Size([2, 1])
    """

    function: Callable[[Tensor], Tensor]

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise InputError(f"LogitMetric: give a function of logits [rows, vocab], not {shown(self.function)}")

    def bind(self, model: Model, text: str = "") -> Bound:
        """The metric on this model; its calls raise InputError where the function fails or gives another shape."""
        return _of_logits(model, lambda rows: _scores(self.function, rows, "logits [rows, vocab]"), "metric")


Named = Projection | ProbeScore | LogitDifference | LogProbability | RefusalLogOdds | LogitMetric
Metric = Named | Callable[[Tensor], Tensor]


def bind(model: Model, metric: Metric, text: str) -> Bound:
    """Any metric on this model, for prompts like `text`; a plain function gets the final states `[..., d_model]`.

    Raises:
        InputError: it is no metric, or does not fit the model.
    """
    if isinstance(metric, Named):
        return metric.bind(model, text)
    name = getattr(metric, "__name__", "metric")
    if name == "refusal_log_odds":
        raise InputError("rim.refusal_log_odds measures texts, not states: give rim.RefusalLogOdds() as the metric")
    if isinstance(metric, type) and issubclass(metric, Named):
        raise InputError(f"rim.{name} is the metric's class: give rim.{name}(...), an instance")
    if callable(metric):
        own: Any = metric
        what, hint = "final states [..., d_model]", " (for a function of logits give rim.LogitMetric(fn))"
        return Bound("resid_post", model.n_layers - 1, lambda states: _scores(own, states, what, hint), "metric")
    raise InputError(
        f"{metric!r} is no metric: give Projection, LogitDifference, LogProbability, RefusalLogOdds, ProbeScore, "
        "LogitMetric or a function"
    )


def _scores(function: Callable[[Tensor], Tensor], rows: Tensor, what: str, hint: str = "") -> Tensor:
    """What a user's function makes of each row."""
    name = getattr(function, "__name__", type(function).__name__)
    given = f"{what}, here {list(rows.shape)}{hint}"
    with told_of(f"the metric {name} fails on {given}"):
        found = function(rows)
    if not isinstance(found, Tensor) or found.shape != rows.shape[:-1]:
        got = f"shape {list(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise InputError(
            f"the metric {name} maps {given}, to {got}: it must give a tensor with one number a row, "
            f"{list(rows.shape[:-1])}"
        )
    return found


def _of_logits(model: Model, read: Callable[[Tensor], Tensor], title: str, layer: int | None = None) -> Bound:
    """A metric of the next token's logits: `read` maps them `[row, vocabulary]` to `[row]`, some rows at a time."""
    model.require("patch", "lens")
    at = model.checked_layer(layer)

    def score(states: Tensor) -> Tensor:
        rows = states.to(model.dtype).flatten(0, -2)
        found = [read(model.layout.readout(part).float()) for part in rows.split(_ROWS)]
        return torch.cat(found).view(states.shape[:-1])

    return Bound("resid_post", at, score, title)


def _vector(model: Model, site: str, values: Any, what: str) -> Tensor:
    width = model.layout.width(site)
    vector = torch.as_tensor(values).detach().float().flatten().cpu()
    if len(vector) != width:
        raise InputError(f"the metric's {what} has {len(vector)} numbers, and its site has {width}")
    if not vector.isfinite().all():
        raise InputError(f"the metric's {what} has numbers that are not finite")
    return vector


def _linear(model: Model, site: str, layer: int | None, weights: Tensor, bias: float, title: str) -> Bound:
    at = model.checked_layer(layer)

    def score(values: Tensor) -> Tensor:
        return values.float() @ weights.to(values.device) + bias

    return Bound(site, at, score, title)
