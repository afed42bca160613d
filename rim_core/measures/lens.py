"""What each layer's residual stream says in the vocabulary: the logit lens.

No weight is read or folded: the model's own final norm and head are run, packed, adapted or edited as they are. The
last layer's lens is the model's own logits, which is checked, not assumed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from rim_core import checking
from rim_core.errors import InputError
from rim_core.models.capture import Activations, drawn, measure
from rim_core.models.model import Model
from rim_core.models.padding import Positions
from rim_core.models.tokens import Tokens, label, single_tokens
from rim_core.tables import by_axes

if TYPE_CHECKING:
    import altair as alt

MEASURES = {"logit": "logit", "log_probability": "log-probability (nats)", "rank": "rank (0 is the top token)"}
# Logits worked out at a time, in numbers.
_LOGITS = 2**24
# To sort the vocabulary once costs as much as to compare it with about this many tokens.
_FEW = 16


@dataclass(frozen=True, eq=False)
class LogitLens:
    """What each layer's residual stream would answer: its best tokens, and where the named ones stand.

    Attributes:
        tokens: the named tokens' labels; a leading space is shown as "␣".
        token_ids: their ids.
        layers: -1 is the embedding (the stream before layer 0), l the stream after layer l.
        positions: the positions read, counted from the end.
        logit: of the named tokens, float32 `[prompt, (position,) layer, token]`, NaN where "all" positions have
            padding.
        log_probability: in nats, of the same shape.
        rank: 0 is the top token, of the same shape.
        top_ids: the best tokens, best first, `[prompt, (position,) layer, top]`; NaN on padding.
        top_log_probability: theirs, in nats.
    """

    tokens: tuple[str, ...]
    token_ids: tuple[int, ...]
    layers: tuple[int, ...]
    positions: tuple[int, ...]
    logit: Tensor = field(repr=False)
    log_probability: Tensor = field(repr=False)
    rank: Tensor = field(repr=False)
    top_ids: Tensor = field(repr=False)
    top_log_probability: Tensor = field(repr=False)
    _labels: Mapping[int, str] = field(repr=False)

    @property
    def top(self) -> pd.DataFrame:
        """What each layer would answer: prompt, position, layer, rank (0 is the best), token, log_probability."""
        shape = (len(self.top_ids), len(self.positions), len(self.layers), self.top_ids.shape[-1])
        prompt, position, layer, rank = (part.ravel() for part in np.indices(shape))
        ids = self.top_ids.flatten().numpy()
        frame = pd.DataFrame(
            {
                "prompt": prompt,
                "position": np.array(self.positions)[position],
                "layer": np.array(self.layers)[layer],
                "rank": rank,
                "token": [self._labels.get(one, "") for one in ids],
                "log_probability": self.top_log_probability.flatten().numpy(),
            }
        )
        return frame[~np.isnan(ids)].reset_index(drop=True)

    def to_frame(self) -> pd.DataFrame:
        """Give a row for each position, layer, token and measure: estimate (mean over texts), low, high (95 % t
        interval, of ranks cut at 0), n.
        """
        axes = {"position": self.positions, "layer": self.layers, "token": self.tokens}
        frames = [by_axes(getattr(self, name), **axes).assign(measure=name) for name in MEASURES]
        frame = pd.concat(frames, ignore_index=True)
        frame.loc[frame["measure"] == "rank", "low"] = frame["low"].clip(lower=0)
        return frame

    def plot(self, measure: str = "log_probability", *, position: int | None = None) -> "alt.LayerChart":
        """Draw one measure over layers, a line a named token, at one position (by default the last one read).

        Raises:
            InputError: a measure or position that this result does not hold, or no named token.
        """
        from rim_core import charts

        checking.one_of(measure, MEASURES, "measure of LogitLens.plot")
        if not self.tokens:
            raise InputError("LogitLens.plot draws named tokens: call logit_lens with tokens, or look at .top")
        where = drawn(self.positions, position, "LogitLens.plot")
        frame = self.to_frame()
        frame = frame[(frame["measure"] == measure) & (frame["position"] == where)]
        return charts.by_layer(
            frame.rename(columns={"estimate": measure}),
            measure,
            series="token",
            title="After which layer would the model say which token?",
            y_title=f"{MEASURES[measure]}, mean of {len(self.logit)} texts",
        )


@torch.no_grad()
def logit_lens(
    model: Model,
    texts: Sequence[str],
    tokens: Tokens | None = None,
    *,
    top: int = 5,
    layers: Sequence[int] | None = None,
    positions: Positions = "last",
) -> LogitLens:
    """Read the residual stream after each layer as if it were the last one's, by the model's own final steps.

    Final norm, language-model head, logit scale and soft cap all apply, so the last layer gives the model's
    logits. Source: nostalgebraist (2020); paper C, figure 12.

    Args:
        model: a loaded model; the adapter and edits now active apply.
        texts: prompts as the model is to see them (see `format_chat`).
        tokens: those to follow: strings of one token each, with or without a leading space (as given first; the
            labels say which it was), or ids. None asks only what each layer would answer.
        top: the best tokens of each layer, so many, are in the result's `top`; 0 for none. Of a model at NDIF there
            are none.
        layers: any of -1 (the embedding) to the last; None is all of these.
        positions: as in `capture`.

    Raises:
        InputError: a string of several tokens, two names for one token, an unknown id, layer or position.
        IdentityError: the last layer's lens is not the model's logits, or padding changes its numbers.

    Example:
        >>> lens = rim.logit_lens(model, texts, "How", top=2)
        >>> lens.log_probability.shape == (len(texts), model.n_layers + 1, 1)
        True
        >>> list(lens.top)
        ['prompt', 'position', 'layer', 'rank', 'token', 'log_probability']
    """
    model.require("logit_lens", "lens", "padding")
    best = 0 if model.remote else checking.whole(top, "logit_lens: top", 0, model.layout.d_vocab)
    if tokens is None and not best:
        raise InputError("logit_lens: nothing to read; name tokens" + ("" if model.remote else ", or ask for a top"))
    labels, ids = ((), ()) if tokens is None else single_tokens(model, tokens)
    wanted = model.checked_layers(layers, lowest=-1)

    def read(acts: Activations) -> dict[str, Tensor]:
        stream = torch.cat([acts["resid_pre"][..., :1, :], acts["resid_post"]], dim=-2)
        return _read_out(model, stream[..., [layer + 1 for layer in wanted], :], ids, best)

    listed, found = measure(model, texts, ("resid_pre", "resid_post"), positions, read)
    seen = found["top_ids"].nan_to_num().unique().int().tolist()
    names = {token: label(model, token) for token in seen}
    return LogitLens(labels, ids, wanted, listed, **found, _labels=names)


def _read_out(model: Model, h: Tensor, ids: Sequence[int], top: int) -> dict[str, Tensor]:
    """The tokens `ids` by each measure, `[..., token]`, and the best `top`, from the stream `h` `[..., d_model]`."""
    columns, rows = list(ids), h.flatten(0, -2)
    if model.remote:
        found = model.remote.read_out(rows, torch.tensor(columns).expand(len(rows), -1))
        found |= dict.fromkeys(("top_ids", "top_log_probability"), rows.new_empty(len(rows), 0))
        return {name: found[name].unflatten(0, h.shape[:-1]) for name in (*MEASURES, "top_ids", "top_log_probability")}
    parts: list[dict[str, Tensor]] = []
    # A row of many named tokens takes several times its logits.
    for chunk in rows.split(max(1, _LOGITS // max(model.layout.d_vocab, 8 * len(columns)))):
        logits = model.layout.readout(chunk.to(model.device, model.dtype)).float()
        total = logits.logsumexp(dim=-1, keepdim=True)
        named, best = logits[:, columns], logits.topk(top)
        part = {"logit": named, "log_probability": named - total, "rank": _ranks(logits, named)}
        part |= {"top_ids": best.indices.float(), "top_log_probability": best.values - total}
        parts.append({name: values.cpu() for name, values in part.items()})
    return {name: torch.cat([part[name] for part in parts]).unflatten(0, h.shape[:-1]) for name in parts[0]}


def _ranks(logits: Tensor, named: Tensor) -> Tensor:
    """How many of a row's logits `[row, vocabulary]` are above each of its named ones `[row, token]`; float32."""
    if named.shape[1] > _FEW:
        ascending = logits.sort(dim=-1).values
        return (logits.shape[1] - torch.searchsorted(ascending, named.contiguous(), right=True)).float()
    above = [(logits > named[:, [token]]).sum(dim=-1) for token in range(named.shape[1])]
    return torch.stack(above, dim=-1).float() if above else torch.empty_like(named)
