"""Where heads look: attention probabilities, their mass over named spans, and their entropy.

Fast attention kernels never form the probabilities. While these tools run, the model attends by the plain
("eager") implementation, layer by layer, and each layer's pattern is cut down at once to what was asked for.

Some families let a head look at nothing: a learned sink (gpt-oss), or a softmax with one in its denominator, takes
part of the weight, and the tokens' probabilities sum to less than 1. That part is kept as `sink`; it is not to be
taken for the first token, on which heads of other families rest.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from torch import Tensor, nn

from rim_core import checking
from rim_core.errors import InputError
from rim_core.models.batching import run_batches, token_budget
from rim_core.models.model import Model
from rim_core.models.padding import Positions, pad_left, positions
from rim_core.tables import by_axes
from rim_core.texts import encode

if TYPE_CHECKING:
    import altair as alt

# Numbers in one layer's pattern of a batch; a few copies live at a time.
_PATTERN = 2**25
# Numbers in a result: about 2 GB.
_RESULT = 2**29


@dataclass(frozen=True, eq=False)
class AttentionPatterns:
    """Attention probabilities from chosen queries.

    Attributes:
        layers: the layers read.
        queries: the query positions, counted from each text's end.
        probabilities: float32 `[prompt, (query,) layer, head, key]`; the keys are the text's tokens aligned at
            the end (key -1 is the last token), 0 on padding and wherever a query cannot look.
        sink: what goes to no token, `[prompt, (query,) layer, head]`: 1 less the sum over keys; exactly 0 in models
            without a sink, and where a text lacks the query.
        mask: which keys are tokens of the text, `[prompt, key]`.
    """

    layers: tuple[int, ...]
    queries: tuple[int, ...]
    probabilities: Tensor = field(repr=False)
    sink: Tensor = field(repr=False)
    mask: Tensor = field(repr=False)

    @property
    def entropy(self) -> Tensor:
        """Entropy of each head's pattern in nats, `[prompt, (query,) layer, head]`: 0 is one token, or the sink."""
        return torch.special.entr(self.probabilities).sum(dim=-1) + torch.special.entr(self.sink)

    def to_frame(self) -> pd.DataFrame:
        """Give a row for each query, layer and head: estimate (mean entropy over texts, nats), low, high (95 % t
        interval), n, mean sink. With `queries="all"` only texts that have the query count.
        """
        entropy, sink = self.entropy, self.sink
        if len(self.queries) > 1:
            absent = torch.tensor(self.queries)[None, :] < -self.mask.sum(dim=1, keepdim=True)
            entropy, sink = (values.masked_fill(absent[:, :, None, None], torch.nan) for values in (entropy, sink))
        axes = {"query": self.queries, "layer": self.layers, "head": range(entropy.shape[-1])}
        return by_axes(entropy, **axes).assign(sink=by_axes(sink, **axes)["estimate"])

    def plot(self, *, prompt: int = 0, layer: int | None = None) -> "alt.LayerChart":
        """Draw where each head of one layer (by default the last one read) looks from the last query, in one text.

        A model's sink is drawn as one more column, 0.

        Raises:
            InputError: a layer or text that this result does not hold.
        """
        from rim_core import charts

        chosen = self.layers[-1] if layer is None else layer
        if chosen not in self.layers or not 0 <= prompt < len(self.mask):
            raise InputError(
                f"AttentionPatterns.plot: no layer {chosen} or text {prompt}; this holds layers "
                f"{', '.join(map(str, self.layers))} of {len(self.mask)} texts"
            )
        at = self.layers.index(chosen)
        # The last query where there are several.
        shares = self.probabilities[prompt, ..., at, :, :].reshape(-1, *self.probabilities.shape[-2:])[-1]
        sink = self.sink[prompt, ..., at, :].reshape(-1, len(shares))[-1]
        keys = int(self.mask[prompt].sum())
        drawn = torch.cat([shares[:, -keys:], sink[:, None]], dim=1) if sink.any() else shares[:, -keys:]
        axes = {"head": range(len(drawn)), "key": range(-keys, drawn.shape[1] - keys)}
        index = pd.MultiIndex.from_product(list(axes.values()), names=list(axes))
        frame = pd.DataFrame({"probability": drawn.flatten().double().numpy()}, index=index).reset_index()
        return charts.heatmap(
            frame,
            "probability",
            x="key",
            y="head",
            title=f"Where do the heads of layer {chosen} look from token {self.queries[-1]} of text {prompt}?",
            x_title="token attended to, from the end" + (" (0: the sink)" if sink.any() else ""),
            value_title="attention probability",
        )


@dataclass(frozen=True, eq=False)
class SpanAttention:
    """Share of each head's attention that goes to named spans of the text.

    Attributes:
        layers: the layers read.
        spans: the spans' names.
        query: the query position, from each text's end.
        mass: float32 `[prompt, layer, head, span]`, 0 to 1.
        sink: what goes to no token, `[prompt, layer, head]` (see `AttentionPatterns`); as `plot("sink")` it is drawn.
    """

    layers: tuple[int, ...]
    spans: tuple[str, ...]
    query: int
    mass: Tensor = field(repr=False)
    sink: Tensor = field(repr=False)

    def difference(self, span: str, minus: str) -> Tensor:
        """Attention to one span minus attention to another, `[prompt, layer, head]`.

        Paper A's refusal heads are ranked by attention to the empty think span minus that to the chain of
        thought.

        Raises:
            InputError: a span that was not read.
        """
        return self._mass(span) - self._mass(minus)

    def _mass(self, span: str) -> Tensor:
        if span == "sink" and span not in self.spans:
            return self.sink
        if span not in self.spans:
            raise InputError(f"SpanAttention: no span {span!r}; this holds {', '.join(self.spans)}")
        return self.mass[..., self.spans.index(span)]

    def to_frame(self) -> pd.DataFrame:
        """Give a row for each layer, head and span: estimate (mean over texts), 95 % t interval, n, the mean sink."""
        frame = by_axes(self.mass, layer=self.layers, head=range(self.mass.shape[2]), span=self.spans)
        return frame.assign(sink=self.sink.mean(dim=0).flatten().repeat_interleave(len(self.spans)).numpy())

    def plot(self, span: str, *, minus: str | None = None) -> "alt.LayerChart":
        """Draw the mean attention to a span, or its difference to another span's, layer by head.

        Raises:
            InputError: a span that was not read.
        """
        from rim_core import charts

        values = self._mass(span) if minus is None else self.difference(span, minus)
        what = f"“{span}”" if minus is None else f"“{span}” more than at “{minus}”"
        frame = by_axes(values, layer=self.layers, head=range(values.shape[2]))
        return charts.heatmap(
            frame.rename(columns={"estimate": "attention"}),
            "attention",
            title=f"Which heads look at {what}?",
            value_title=f"attention, mean of {len(values)} texts",
            diverging=minus is not None,
        )


@torch.no_grad()
def attention_patterns(
    model: Model, texts: Sequence[str], *, layers: Sequence[int] | None = None, queries: Positions = "last"
) -> AttentionPatterns:
    """Attention probabilities by head from chosen query positions.

    Args:
        model: a loaded model; the adapter and edits now active apply.
        texts: prompts as the model is to see them (see `format_chat`).
        layers: those to read; None is all.
        queries: "last", "all", or one or several positions from the end, as in `capture`.

    Raises:
        InputError: a layer or query that there is not, a result beyond 2 GB, or a model that does not give its
            attention probabilities.
        IdentityError: padding changes this model's numbers.

    Example:
        >>> seen = rim.attention_patterns(model, texts, layers=[1])
        >>> seen.probabilities.shape[:3] == (len(texts), 1, model.n_heads)
        True
        >>> bool(((seen.probabilities.sum(-1) - 1).abs() < 1e-5).all())
        True
    """
    model.require("attention_patterns", "padding")
    ids = encode(model, texts)
    lengths = [len(row) for row in ids]
    width, chosen = max(lengths), _queries(queries, lengths)
    read = model.checked_layers(layers)
    shape = (len(ids), len(chosen), len(read), model.n_heads, width)
    if torch.Size(shape).numel() > _RESULT:
        raise InputError(
            f"attention_patterns: {' x '.join(map(str, shape))} probabilities take more than 2 GB; name fewer "
            "layers, queries or texts, or use attention_to_spans"
        )
    result, sink = torch.zeros(shape), torch.zeros(shape[:-1])

    def keep(pattern: Tensor, rows: list[int]) -> Tensor:
        # With "all" queries a batch of short texts lacks the furthest ones, and its padded slots are no queries.
        reached = [query for query in chosen if query >= -pattern.shape[-1]]
        absent = torch.tensor([[query < -lengths[row] for query in reached] for row in rows])
        chosen_rows = torch.cat([pattern[:, :, reached], _sink(pattern[:, :, reached])[..., None]], dim=-1)
        return chosen_rows.transpose(1, 2).cpu().float().masked_fill(absent[:, :, None, None], 0)

    for rows, found in _by_batch(model, ids, read, keep):
        reached = slice(-found.shape[1], None)
        result[rows, reached, :, :, width + 1 - found.shape[-1] :] = found[..., :-1]
        sink[rows, reached] = found[..., -1]
    mask = torch.arange(-width, 0)[None, :] >= -torch.tensor(lengths)[:, None]
    single = checking.is_whole(queries) or (isinstance(queries, str) and queries == "last")
    if single:
        result, sink = result[:, 0], sink[:, 0]
    return AttentionPatterns(read, tuple(chosen), result, sink, mask)


@torch.no_grad()
def attention_to_spans(
    model: Model,
    texts: Sequence[str],
    spans: Mapping[str, Sequence[Sequence[int]]],
    *,
    layers: Sequence[int] | None = None,
    query: str | int = "last",
) -> SpanAttention:
    """Share of each head's attention, from one query position, that goes to each named span of the text.

    Source: paper A, section on refusal attention heads (figure 4): attention from the last token of the prompt
    to the chain of thought, to the template, and to the empty think tags.

    Args:
        model: a loaded model; the adapter and edits now active apply.
        texts: prompts as the model is to see them.
        spans: for each name the token positions in each text, counted from the end, as `find_span` gives
            them; an empty list where a text lacks the span, which then gets 0. Spans may overlap.
        layers: those to read; None is all.
        query: "last" or a position from the end.

    Raises:
        InputError: no spans, not one list a text, a position outside its text or after the query; layers and
            query as in `attention_patterns`.
        IdentityError: padding changes this model's numbers.

    Example:
        >>> seen = rim.attention_to_spans(model, texts, {"end": [[-2, -1]] * len(texts)})
        >>> seen.mass.shape == (len(texts), model.n_layers, model.n_heads, 1)
        True
        >>> list(seen.to_frame())
        ['layer', 'head', 'span', 'estimate', 'low', 'high', 'n', 'sink']
    """
    model.require("attention_to_spans", "padding")
    ids = encode(model, texts)
    lengths = [len(row) for row in ids]
    if not checking.is_whole(query) and not (isinstance(query, str) and query == "last"):
        raise InputError(f"attention_to_spans: query {query!r} must be 'last' or one position below 0")
    (position,) = _queries(query, lengths)
    _check_spans(spans, lengths, position)
    read = model.checked_layers(layers)

    def keep(pattern: Tensor, rows: list[int]) -> Tensor:
        member = torch.zeros(len(rows), len(spans), pattern.shape[-1])
        for number, by_text in enumerate(spans.values()):
            for slot, row in enumerate(rows):
                member[slot, number, list(by_text[row])] = 1
        at = pattern[:, :, position]
        mass = torch.einsum("bhk,bsk->bhs", at.float(), member.to(pattern.device))
        return torch.cat([mass, _sink(at)[..., None]], dim=-1).cpu()

    result = torch.zeros(len(ids), len(read), model.n_heads, len(spans) + 1)
    for rows, found in _by_batch(model, ids, read, keep):
        result[rows] = found
    return SpanAttention(read, tuple(spans), position, result[..., :-1], result[..., -1])


def _sink(pattern: Tensor) -> Tensor:
    """What goes to no key, float32 `[...]`, of probabilities `[..., key]`; what rounding alone may miss is none."""
    missed = 1 - pattern.sum(dim=-1, dtype=torch.float32)
    rounding = max(2 * torch.finfo(pattern.dtype).eps, 1e-5)
    return missed.masked_fill(missed <= rounding, 0)


def _queries(queries: Positions, lengths: Sequence[int]) -> list[int]:
    # With "all", those of the longest text.
    return max(positions(queries, lengths, "queries"), key=len)


def _check_spans(spans: Mapping[str, Sequence[Sequence[int]]], lengths: Sequence[int], query: int) -> None:
    form = "give {name: a list of positions for each text}, such as {'request': rim.find_span(model, texts, prompts)}"
    if not isinstance(spans, Mapping) or not spans:
        raise InputError(f"attention_to_spans: {'no spans' if not spans else checking.shown(spans)}; {form}")
    for name, by_text in spans.items():
        try:
            lists = [checking.listed(keys, "") for keys in checking.listed(by_text, "")]
        except InputError:
            lists = [[None]]
        if not all(checking.is_whole(key) for keys in lists for key in keys):
            raise InputError(f"attention_to_spans: span {name!r} is {checking.shown(by_text)}; {form}")
        if len(by_text) != len(lengths):
            raise InputError(
                f"attention_to_spans: span {name!r} has {len(by_text)} lists of positions for {len(lengths)} texts; "
                "give one a text"
            )
        for number, (keys, length) in enumerate(zip(by_text, lengths, strict=True)):
            if outside := [position for position in keys if not -length <= position <= query]:
                raise InputError(
                    f"attention_to_spans: span {name!r} holds position {outside[0]} in text {number}; the query at "
                    f"{query} sees -{length} to {query}"
                )


@contextlib.contextmanager
def _eager(model: Model) -> Iterator[None]:
    """Within the context the model attends by plain matrix products, which leave the probabilities.

    Raises:
        InputError: the model cannot switch.
    """
    config = model.hf.config
    before = config._attn_implementation
    try:
        model.hf.set_attn_implementation("eager")
        if config._attn_implementation != "eager":
            raise _no_probabilities(model)
        yield
    finally:
        model.hf.set_attn_implementation(before)


def _no_probabilities(model: Model) -> InputError:
    return InputError(
        f"{type(model.hf).__name__} does not give its attention probabilities: read attention on a model of another "
        "family"
    )


def _by_batch(
    model: Model, ids: list[list[int]], layers: Sequence[int], keep: Callable[[Tensor, list[int]], Tensor]
) -> Iterator[tuple[list[int], Tensor]]:
    """Yield (rows, `keep(pattern, rows)` stacked over layers before the head axis) a batch.

    A pattern is `[row, head, query, key]`, padded on the left.
    """
    lengths = [len(row) for row in ids]

    def run(rows: list[int]) -> Tensor:
        found: dict[int, Tensor] = {}

        def hook(layer: int) -> Callable[[nn.Module, Any, Any], None]:
            def read(module: nn.Module, args: Any, output: Any) -> None:
                pattern = output[1] if isinstance(output, tuple) and len(output) > 1 else None
                # Linear attention gives a state of another meaning in this place.
                if pattern is None or pattern.shape[-2:] != (max(lengths[row] for row in rows),) * 2:
                    raise _no_probabilities(model)
                found[layer] = keep(pattern, rows)

            return read

        attention = model.layout.attention
        handles = [attention[layer].register_forward_hook(hook(layer)) for layer in layers]
        try:
            inputs = pad_left([ids[row] for row in rows], model.tokenizer.pad_token_id, model.device)
            model.layout.body(**inputs, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        return torch.stack([found[layer] for layer in layers], dim=-3)

    budget = min(token_budget(model.layout, model.device), _PATTERN // (model.n_heads * max(lengths)))
    with _eager(model):
        yield from run_batches(lengths, budget, run)
