"""What each layer's residual stream says in the vocabulary: the logit lens.

No weight is read or folded: the model's own final norm and head are run, packed, adapted or edited as they are. The
last layer's lens is the model's own logits, which is checked, not assumed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pandas as pd
import torch
from torch import Tensor

from rim_core.errors import InputError
from rim_core.models.batching import Positions
from rim_core.models.capture import Activations, drawn, measure
from rim_core.models.model import Model
from rim_core.models.tokens import Tokens, single_tokens
from rim_core.tables import mean_frame

if TYPE_CHECKING:
    import altair as alt

MEASURES = {"logit": "logit", "log_probability": "log-probability (nats)", "rank": "rank (0 is the top token)"}
# Logits worked out at a time, in numbers.
_LOGITS = 2**24


@dataclass(frozen=True, eq=False)
class LogitLens:
    """What each layer's residual stream would answer, for the named tokens.

    Attributes:
        tokens: the tokens' labels; a leading space is shown as "␣".
        token_ids: their ids.
        layers: -1 is the embedding (the stream before layer 0), l the stream after layer l.
        positions: the positions read, counted from the end.
        logit, log_probability (nats), rank (0 is the top token): each float32
            `[prompt, (position,) layer, token]`, NaN where "all" positions have padding.
    """

    tokens: tuple[str, ...]
    token_ids: tuple[int, ...]
    layers: tuple[int, ...]
    positions: tuple[int, ...]
    logit: Tensor
    log_probability: Tensor
    rank: Tensor

    def to_frame(self) -> pd.DataFrame:
        """Give a row for each position, layer, token and measure: mean over texts, 95 % t interval, n."""
        return pd.concat(
            [
                mean_frame(getattr(self, name), position=self.positions, layer=self.layers, token=self.tokens).assign(
                    measure=name
                )
                for name in MEASURES
            ],
            ignore_index=True,
        )

    def plot(self, measure: str = "log_probability", position: int | None = None) -> "alt.LayerChart":
        """Draw one measure over layers, a line a token, at one position (by default the last one read).

        Raises:
            InputError: a measure or position that this result does not hold.
        """
        from rim_core import charts

        if measure not in MEASURES:
            raise InputError(f"LogitLens.plot: no measure {measure!r}; use one of {', '.join(MEASURES)}")
        where = drawn(self.positions, position, "LogitLens.plot")
        frame = self.to_frame().query("measure == @measure and position == @where")
        last = frame[frame["layer"] == max(self.layers)]
        ends = "; ".join(f"{token} {mean:.3g}" for token, mean in zip(last["token"], last["mean"], strict=True))
        return charts.by_layer(
            frame,
            "mean",
            series="token",
            title="After which layer would the model say which token?",
            y_title=f"{MEASURES[measure]}, mean of {len(self.logit)} texts",
            description=(
                f"Logit lens at position {where}: {MEASURES[measure]} by layer, -1 being the embedding; "
                f"after layer {max(self.layers)}: {ends}."
            ),
        )


@torch.no_grad()
def logit_lens(
    model: Model,
    texts: Sequence[str],
    tokens: Tokens,
    layers: Sequence[int] | None = None,
    positions: Positions = "last",
) -> LogitLens:
    """Read the residual stream after each layer as if it were the last one's, by the model's own final steps.

    Final norm, language-model head, logit scale and soft cap all apply, so the last layer gives the model's
    logits. Source: nostalgebraist (2020); paper C, figure 12.

    Args:
        model: a loaded model; the adapter and edits now active apply.
        texts: prompts as the model is to see them (see `format_chat`).
        tokens: strings of one token each, with or without a leading space (as given first; the labels say
            which it was), or ids.
        layers: any of -1 (the embedding) to the last; None is all of these.
        positions: as in `capture`.

    Raises:
        InputError: a string of several tokens, two names for one token, an unknown id, layer or position.
        IdentityError: the last layer's lens is not the model's logits, or padding changes its numbers.
    """
    model.require("logit_lens", "lens", "padding")
    labels, ids = single_tokens(model, tokens)
    wanted = model.checked_layers(layers, lowest=-1)

    def read(acts: Activations) -> dict[str, Tensor]:
        stream = torch.cat([acts["resid_pre"][..., :1, :], acts["resid_post"]], dim=-2)
        return _read_out(model, stream[..., [layer + 1 for layer in wanted], :], ids)

    listed, found = measure(model, texts, ("resid_pre", "resid_post"), positions, read)
    return LogitLens(labels, ids, wanted, listed, **found)


def _read_out(model: Model, h: Tensor, ids: Sequence[int]) -> dict[str, Tensor]:
    """Each measure of the tokens `ids`, `[..., token]`, from the stream `h` `[..., d_model]`, a chunk at a time."""
    columns = list(ids)
    if model.remote:
        rows = h.flatten(0, -2)
        found = model.remote.read_out(rows, torch.tensor(columns).expand(len(rows), -1))
        return {name: found[name].unflatten(0, h.shape[:-1]) for name in MEASURES}
    parts: dict[str, list[Tensor]] = {name: [] for name in MEASURES}
    for chunk in h.flatten(0, -2).split(max(1, _LOGITS // model.layout.d_vocab)):
        logits = model.layout.readout(chunk.to(model.device, model.dtype)).float()
        named = logits[:, columns]
        parts["logit"].append(named)
        parts["log_probability"].append(named - logits.logsumexp(dim=-1, keepdim=True))
        above = [(logits > named[:, [k]]).sum(dim=-1) for k in range(len(columns))]
        parts["rank"].append(torch.stack(above, dim=-1).float())
    return {name: torch.cat(values).cpu().unflatten(0, h.shape[:-1]) for name, values in parts.items()}
