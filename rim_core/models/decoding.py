"""Decoding side by side: each row has a length of its own, and its keys and values are written in place.

What all prompts begin with is run once and laid under them. Prompts enter in groups of nearly one length, padded on the
right, so that a row's tokens lie side by side in the cache whatever its neighbours are; a row that has ended leaves,
and rows behind it take its place. All rows end at one column, so a step is what the Hugging Face model does with
prompts padded on the left, but without its copy of the cache at every token. `checks` measures on each model that this
gives each prompt's own numbers (identity `decoding`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from rim_core.models.hooks import Frame
from rim_core.models.layout import Layout
from rim_core.models.padding import pad_right

# Told before each pass: which tokens it holds, and the arm of each of its rows.
Told = Callable[[Frame, list[int]], None]
# Where a beginning that many prompts share begins, and where padding is: before any position that can be named.
_FAR = -(10**6)
# Columns beyond the longest row, so that rows are seldom moved; padded tokens of a group that one more pass would cost.
_ROOM, _PADDED = 64, 32


@dataclass(eq=False)
class Row:
    """One prompt that is being answered.

    Attributes:
        ids: the prompt's tokens.
        arm: which edits hold for it, for `Told`.
        new: the tokens said so far.
        ended: whether no more are to come.
    """

    ids: list[int]
    arm: int = 0
    new: list[int] = field(default_factory=list)
    ended: bool = False

    @property
    def tokens(self) -> list[int]:
        """Prompt and answer so far."""
        return self.ids + self.new


class _InPlace(DynamicLayer):
    """One layer's keys and values of all rows; a pass writes into the next columns.

    Attributes:
        held: the two, `[row, head, column, width]`; empty before the first rows have come.
    """

    def __init__(self, decoder: "Decoder") -> None:
        super().__init__()
        self.decoder, self.held = decoder, list[Tensor]()

    def make(self, *like: Tensor) -> None:
        rows, columns = self.decoder.capacity, self.decoder.columns
        # Zeros, not whatever memory holds: a weight of 0 on a number that is not finite is none.
        self.held = [one.new_zeros(rows, one.shape[1], columns, one.shape[3]) for one in like]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        n, end = len(key_states), self.decoder.end + key_states.shape[2]
        for held, new in zip(self.held, (key_states, value_states), strict=True):
            held[:n, :, self.decoder.end : end] = new
        keys, values = (held[:n, :, self.decoder.begin : end] for held in self.held)
        return keys, values

    def get_seq_length(self) -> int:
        return self.decoder.end - self.decoder.begin


class Decoder:
    """Rows that are decoded side by side; each pass gives the logits of what comes next.

    Args:
        layout: of the model.
        pad: the padding token.
        device: of the model's inputs.
        capacity: rows at once.
        longest: tokens of the longest row, with its answer.
        beginning: tokens that all prompts start with, run once.
        arms: how many arms have a beginning of their own; 1 where the edits leave it alone.
        budget: padded tokens of one pass over beginnings.
        told: called before each pass.

    Attributes:
        rows: those now running, in the order of the logits.
    """

    def __init__(
        self,
        layout: Layout,
        pad: int,
        device: Any,
        *,
        capacity: int,
        longest: int,
        beginning: Sequence[int] = (),
        arms: int = 1,
        budget: int = 2**15,
        told: Told | None = None,
    ) -> None:
        self._layout, self._pad, self._device, self._told = layout, pad, device, told
        self.capacity, self.longest, self.columns = capacity, longest, longest + _ROOM
        self.rows: list[Row] = []
        # Row r's tokens lie in the columns from starts[r] to end; begin is the lowest of these.
        self._starts: list[int] = []
        self.begin = self.end = 0
        self._layers = [_InPlace(self) for _ in layout.layers]
        self._cache = Cache(layers=list(self._layers))
        self._beginning, self._own = list(beginning), arms > 1
        # Keys and values of each layer, [arm, head, token, width].
        self._laid: list[Any] = []
        if self._beginning:
            step = max(1, budget // len(self._beginning))
            parts = [self._run_beginning(range(arms)[at : at + step]) for at in range(0, arms, step)]
            self._laid = [tuple(map(torch.cat, zip(*layer, strict=True))) for layer in zip(*parts, strict=True)]

    @torch.no_grad()
    def _run_beginning(self, arms: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        ids = torch.tensor([self._beginning] * len(arms), device=self._device)
        if self._told:
            slots = torch.arange(_FAR, _FAR + ids.shape[1], device=self._device).expand(len(arms), -1)
            self._told(Frame(slots, slots), list(arms))
        cache = Cache(layer_class_to_replicate=DynamicLayer)
        self._layout.body(input_ids=ids, past_key_values=cache, use_cache=True)
        return _held(cache)

    @torch.no_grad()
    def enter(self, rows: Sequence[Row]) -> Tensor:
        """Take in prompts, nearly of one length, as many as there is place for.

        Returns:
            The logits `[row, vocab]` after each one's last token.
        """
        shared, ends = len(self._beginning), [len(row.tokens) for row in rows]
        tails, real = pad_right([row.tokens[shared:] for row in rows], self._pad)
        width = tails.shape[1]
        slots = torch.arange(shared, shared + width, device=self._device).expand(len(rows), -1)
        mask = torch.cat([torch.ones(len(rows), shared, dtype=torch.bool), real], dim=1).long()
        if self._told:
            keys = torch.arange(shared + width) - torch.tensor([len(row.ids) for row in rows])[:, None]
            keys = keys.masked_fill(mask == 0, _FAR).to(self._device)
            self._told(Frame(keys[:, shared:], keys), [row.arm for row in rows])
        cache = self._laid_under([row.arm for row in rows])
        states = self._layout.body(
            input_ids=tails.to(self._device),
            attention_mask=mask.to(self._device),
            position_ids=slots,
            past_key_values=cache,
            use_cache=True,
        )[0]
        self._keep(cache, ends)
        self.rows.extend(rows)
        last = real.sum(dim=1).to(states.device) - 1
        return self._layout.logits(states[torch.arange(len(rows), device=states.device), last])

    def _laid_under(self, arms: list[int]) -> Cache:
        """A cache that holds each row's beginning."""
        cache = Cache(layer_class_to_replicate=DynamicLayer)
        for layer, pair in enumerate(self._laid):
            chosen = arms if self._own else [0] * len(arms)
            keys, values = (held[chosen] for held in pair)
            cache.update(keys, values, layer)
        return cache

    def _keep(self, cache: Cache, ends: list[int]) -> None:
        """Put the first `ends` columns of a cache's rows behind the rows that run, so that all end at one column."""
        n, longest = len(self.rows), max(ends)
        if longest > self.end:
            self._shift(longest - self.end)
        self._starts += [self.end - end for end in ends]
        self.begin = min(self._starts)
        for layer, new in zip(self._layers, _held(cache), strict=True):
            if not layer.held:
                layer.make(*new)
            for end in set(ends):
                same = [row for row, other in enumerate(ends) if other == end]
                for held, values in zip(layer.held, new, strict=True):
                    held[[n + row for row in same], :, self.end - end : self.end] = values[same, :, :end]

    def _shift(self, by: int) -> None:
        """Move the rows by so many columns."""
        n, here, there = len(self.rows), slice(self.begin, self.end), slice(self.begin + by, self.end + by)
        for layer in self._layers if n else ():
            for held in layer.held:
                held[:n, :, there] = held[:n, :, here].clone()
        self.begin, self.end = self.begin + by, self.end + by
        self._starts = [start + by for start in self._starts]

    @torch.no_grad()
    def step(self) -> Tensor:
        """Feed each row's last said token; gives the logits `[row, vocab]` of what comes next."""
        if self.end == self.columns:
            self._shift(-self.begin)
        columns = torch.arange(self.begin, self.end + 1, device=self._device)
        starts = torch.tensor(self._starts, device=self._device)[:, None]
        if self._told:
            prompts = torch.tensor([len(row.ids) for row in self.rows], device=self._device)[:, None]
            keys = columns - starts - prompts
            self._told(Frame(keys[:, -1:], keys), [row.arm for row in self.rows])
        states = self._layout.body(
            input_ids=torch.tensor([row.new[-1:] for row in self.rows], device=self._device),
            attention_mask=(columns >= starts).long(),
            position_ids=self.end - starts,
            past_key_values=self._cache,
            use_cache=True,
        )[0]
        self.end += 1
        return self._layout.logits(states[:, -1])

    def leave(self, gone: Sequence[int]) -> None:
        """Rows that have ended leave, and others take their places."""
        out, left = set(gone), len(self.rows) - len(gone)
        places = [row for row in sorted(out) if row < left]
        movers = [row for row in range(left, len(self.rows)) if row not in out]
        for layer in self._layers if movers else ():
            for held in layer.held:
                held[places, :, self.begin : self.end] = held[movers, :, self.begin : self.end]
        for place, mover in zip(places, movers, strict=True):
            self.rows[place], self._starts[place] = self.rows[mover], self._starts[mover]
        del self.rows[left:], self._starts[left:]
        if self.rows:
            self.begin = min(self._starts)
        else:
            self.begin = self.end = 0


def _held(cache: Cache) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of each layer."""
    layers: list[Any] = cache.layers
    return [(layer.keys, layer.values) for layer in layers]


def groups(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices of prompts that enter together, longest first: few padded tokens, and at most `budget` in all."""
    made: list[list[int]] = []
    for number in sorted(range(len(lengths)), key=lambda n: lengths[n], reverse=True):
        if made:
            width, n = lengths[made[-1][0]], len(made[-1]) + 1
            padded = width * n - sum(lengths[one] for one in made[-1]) - lengths[number]
            if padded <= max(_PADDED, width * n // 16) and width * n <= budget:
                made[-1].append(number)
                continue
        made.append([number])
    return made
