"""What a model says: greedy answers, side by side. Whether one refuses is in `rates`, and who judges in `judges`."""

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any, overload

import torch
from torch import Tensor
from tqdm import tqdm

from rim_core.checking import listed, shown, whole
from rim_core.errors import InputError
from rim_core.models.arms import Arm, edits_of, merged
from rim_core.models.batching import free_memory, free_on_gpus, no_room, out_of_memory, run_batches, token_budget
from rim_core.models.decoding import Decoder, Row, groups
from rim_core.models.hooks import Edit, Frame, MaskEdit, editing, refuse_short
from rim_core.models.model import Model
from rim_core.models.padding import pad_left, shared_beginning
from rim_core.models.small_passes import laid_out, one_query
from rim_core.texts import checked, encode
from rim_core.thoughts import decode, open_thought

# Greedy, whatever a checkpoint's generation settings are: several penalise words that were said, and with them the
# padding, so that an answer would depend on the other prompts of its batch.
_GREEDY: dict[str, Any] = {
    "do_sample": False,
    "num_beams": 1,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "temperature": None,
    "top_p": None,
    "top_k": None,
}
_MANY_PASSES = 6
# Settings of a checkpoint that change which token is greedy: then Hugging Face's own loop answers.
_CHOOSING = (
    *("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "sequence_bias", "forced_bos_token_id"),
    *("forced_eos_token_id", "min_length", "min_new_tokens", "exponential_decay_length_penalty", "guidance_scale"),
)


@overload
def generate(
    model: Model,
    texts: Sequence[str],
    *,
    max_new_tokens: int = 64,
    stop: str | Sequence[str] = (),
    arms: None = None,
    max_batch: int = 128,
    max_tokens: int | None = None,
) -> list[str]: ...


@overload
def generate(
    model: Model,
    texts: Sequence[str],
    *,
    max_new_tokens: int = 64,
    stop: str | Sequence[str] = (),
    arms: Sequence[Arm],
    max_batch: int = 128,
    max_tokens: int | None = None,
) -> list[list[str]]: ...


@torch.no_grad()
def generate(
    model: Model,
    texts: Sequence[str],
    *,
    max_new_tokens: int = 64,
    stop: str | Sequence[str] = (),
    arms: Sequence[Arm] | None = None,
    max_batch: int = 128,
    max_tokens: int | None = None,
) -> list[str] | list[list[str]]:
    """Greedy answers, one a text, without the special tokens: the same alone and among others up to rounding. Each
    ends where the model ends its turn, after a stop string, or after `max_new_tokens`.

    A model that thinks first gives thought and answer in one text, with the tags between them, also those that are
    special tokens or that the template wrote: `split_thought` tells the two apart, and every judge and rate does so.

    What all prompts begin with is run once, finished answers make place for waiting prompts, and keys and values are
    written in place (identity `decoding` of `model.checks`); where a model's cache does not allow it, Hugging Face's
    own loop answers, with the same results.

    Args:
        model: a loaded model; the adapter and edits now active hold at every step.
        texts: prompts in the model's chat template (see `format_chat`).
        max_new_tokens: of each answer.
        stop: strings, each of which ends an answer; it is kept as the answer's end.
        arms: several interventions, such as `[None, rim.ablate(...), rim.steer(...)]`, run side by side: each is a
            context that was not entered, a list of them (the first the outermost), or None. They come after the edits
            now active. A reference given as texts is run once an arm: for many arms give `Activations`.
        max_batch: answers generated side by side, at most.
        max_tokens: padded prompt tokens a pass; by default from the free memory. What does not fit is halved.

    Returns:
        The answers; with `arms` one list of answers an arm.

    Raises:
        InputError: no texts, or one that with its answer is longer than the model's context; an arm that is no
            intervention, switches the adapter, or was used before.
        IdentityError: padding changes this model's numbers, or decoding token by token does.

    Example:
        >>> answers = rim.generate(model, texts, max_new_tokens=4)
        >>> len(answers) == len(texts)
        True
        >>> heads = [[(0, 0)], [(0, 1), (1, 2)]]
        >>> arms = [None, *(rim.ablate(model, heads=chosen, mode="zero") for chosen in heads)]
        >>> plain, first, second = rim.generate(model, texts, max_new_tokens=4, arms=arms)
        >>> plain == answers
        True
    """
    max_new_tokens = whole(max_new_tokens, "max_new_tokens", 1)
    max_batch = whole(max_batch, "max_batch", 1)
    stops = [stop] if isinstance(stop, str) else listed(stop, "generate: stop")
    if wrong := [one for one in stops if not isinstance(one, str) or not one]:
        raise InputError(f"generate: stop holds {shown(wrong[0])}: give strings of at least one letter")
    model.require("generate", "padding", "cache")
    texts = checked(texts)
    ids = encode(model, texts, max_new_tokens)
    given = [None] if arms is None else listed(arms, "generate: arms")
    if not given:
        raise InputError("generate: arms is empty; leave it out for the edits now active alone")
    edits = [edits_of(model, arm, number) for number, arm in enumerate(given)]
    budget = token_budget(model.layout, model.device) if max_tokens is None else whole(max_tokens, "max_tokens", 1)
    rows = [Row(row, arm) for arm in range(len(edits)) for row in ids]
    with tqdm(
        total=len(rows) * max_new_tokens, desc="generating", unit="token", delay=5, disable=None, leave=False
    ) as bar:
        if model.checks["decoding"].holds and model.checks["lens"].holds and not _chooses(model):
            _Loop(model, rows, edits, max_new_tokens, stops, budget, bar).run(max_batch)
        else:
            _by_hugging_face(model, rows, edits, max_new_tokens, stops, max_batch, budget, bar)
    said = [_cut(answer, stops) for answer in decode(model.tokenizer, [row.new for row in rows])]
    opened = [open_thought(model.tokenizer, text) for text in texts]
    answers = [
        [begin + new for begin, new in zip(opened, said[at : at + len(ids)], strict=True)]
        for at in range(0, len(rows), len(ids))
    ]
    return answers[0] if arms is None else answers


def _cut(answer: str, stops: Sequence[str]) -> str:
    """The answer up to the stop string that comes first, and with it."""
    ends = [at + len(one) for one in stops if (at := answer.find(one)) >= 0]
    return answer[: min(ends)] if ends else answer


def _chooses(model: Model) -> bool:
    """Whether a checkpoint's settings change which token is greedy."""
    settings = model.hf.generation_config
    return any(getattr(settings, name, None) for name in _CHOOSING)


class _Loop:
    """One call of `generate`: rows enter, say a token a step, and leave."""

    def __init__(
        self,
        model: Model,
        rows: list[Row],
        edits: list[list[Edit | MaskEdit]],
        most: int,
        stops: Sequence[str],
        budget: int,
        bar: Any,
    ) -> None:
        self._model, self._rows, self._edits, self._stops, self._bar = model, rows, edits, stops, bar
        self._most, self._budget, self._ends = most, budget, set(_end_tokens(model))
        self._waiting: list[Row] = []
        own = [edit for arm in edits for edit in arm]
        every = [*model.edits, *own]
        refuse_short(min((edit.lowest for edit in every), default=0), min(len(row.ids) for row in rows))
        # An edit that may look at any position counts from each prompt's end, which a shared beginning does not have.
        self._shared = 0
        if not any(edit.positional and edit.first is None for edit in every):
            keep = max([1, *(-edit.first for edit in every if edit.first is not None)])
            self._shared = shared_beginning([row.ids for row in rows], keep)
        self._beginnings = len(edits) if any(edit.first is None for edit in own) else 1
        self._by_arm: Mapping[int, Tensor] = {}
        self._told = self._tell if every else None

    def _tell(self, frame: Frame, arms: list[int]) -> None:
        self._model.frame = frame
        which = torch.tensor(arms)
        self._by_arm = {arm: (which == arm).nonzero().flatten() for arm in set(arms)}

    def run(self, limit: int) -> None:
        """Answer all rows, at most `limit` side by side."""
        made = merged(self._edits, lambda: self._by_arm) if len(self._edits) > 1 else self._edits[0]
        try:
            with editing(self._model, made), one_query(self._model.hf), self._weights(limit):
                while self._wait():
                    limit = self._answer(limit)
        finally:
            self._model.frame = None

    def _weights(self, limit: int) -> contextlib.AbstractContextManager[None]:
        """Weights laid out, where there are passes enough to pay for it."""
        passes = self._most * -(-len(self._rows) // limit)
        return laid_out(self._model.hf) if passes >= _MANY_PASSES else contextlib.nullcontext()

    def _wait(self) -> bool:
        """Whether rows wait; the longest come first, so that later ones are no longer than those that are there."""
        unanswered = [row for row in self._rows if not row.ended]
        self._waiting = sorted(unanswered, key=lambda row: len(row.tokens), reverse=True)
        return bool(unanswered)

    def _answer(self, limit: int) -> int:
        """Answer what waits, as far as memory goes; gives how many may be side by side from now on."""
        longest = len(self._waiting[0].tokens) + self._most
        capacity = min(limit, len(self._waiting), max(1, _cache_tokens(self._model) // longest))
        decoder: Decoder | None = None
        try:
            decoder = Decoder(
                self._model.layout,
                self._model.tokenizer.pad_token_id,
                self._model.device,
                capacity=capacity,
                longest=longest,
                beginning=self._rows[0].ids[: self._shared],
                arms=self._beginnings,
                budget=self._budget,
                told=self._told,
            )
            while True:
                free = capacity - len(decoder.rows)
                # Several enter at once: a pass for one prompt costs nearly as much as for ten.
                worth = bool(self._waiting) and (free >= max(1, capacity // 4) or not decoder.rows)
                # Where much shorter prompts leave room for more rows than now, those that run end first.
                if worth and (capacity == limit or 2 * (len(self._waiting[0].tokens) + self._most) > longest):
                    self._enter(decoder, free)
                elif decoder.rows:
                    self._said(decoder.rows, decoder.step())
                else:
                    return limit
                decoder.leave([number for number, row in enumerate(decoder.rows) if row.ended])
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            if capacity == 1:
                raise no_room(longest - self._most) from None
        # Outside the handler, so that the failed pass's tensors are gone.
        decoder = None
        free_memory()
        return capacity // 2

    def _enter(self, decoder: Decoder, free: int) -> None:
        entering, self._waiting = self._waiting[:free], self._waiting[free:]
        for group in groups([len(row.tokens) - self._shared for row in entering], self._budget):
            chosen = [entering[number] for number in group]
            self._said(chosen, decoder.enter(chosen))

    def _said(self, rows: Sequence[Row], logits: Tensor) -> None:
        """Note the tokens that rows say next, and which rows have ended."""
        for row, token in zip(rows, logits.float().argmax(dim=-1).tolist(), strict=True):
            row.new.append(token)
            row.ended = token in self._ends or len(row.new) == self._most
        if self._stops:
            said = decode(self._model.tokenizer, [row.new for row in rows])
            for row, text in zip(rows, said, strict=True):
                row.ended = row.ended or any(one in text for one in self._stops)
        self._bar.update(sum(1 + (self._most - len(row.new) if row.ended else 0) for row in rows))


def _by_hugging_face(
    model: Model,
    rows: list[Row],
    edits: list[list[Edit | MaskEdit]],
    most: int,
    stops: list[str],
    max_batch: int,
    budget: int,
    bar: Any,
) -> None:
    """Fill in the rows' answers by Hugging Face's own loop, arm after arm."""
    settings = {
        **_GREEDY,
        "max_new_tokens": most,
        "pad_token_id": model.tokenizer.pad_token_id,
        "eos_token_id": _end_tokens(model),
        **({"stop_strings": stops, "tokenizer": model.tokenizer} if stops else {}),
    }

    def run(chosen: list[Row]) -> None:
        inputs = pad_left([row.ids for row in chosen], model.tokenizer.pad_token_id, model.device)
        out = model.hf.generate(**inputs, **settings)
        for row, new in zip(chosen, out[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
            row.new = new
        bar.update(len(chosen) * most)

    for arm, made in enumerate(edits):
        # Neighbours in length share a batch, so that little is padded.
        own = sorted((row for row in rows if row.arm == arm), key=lambda row: len(row.ids), reverse=True)
        costs = _costs([len(row.ids) for row in own], most, max_batch, budget, _cache_tokens(model))
        with editing(model, made):
            for _ in run_batches(costs, budget, lambda batch, own=own: run([own[n] for n in batch])):  # type: ignore[misc]
                pass


def _end_tokens(model: Model) -> list[int]:
    """The tokens that end a turn: those the checkpoint names, and the tokenizer's own."""
    named = model.hf.generation_config.eos_token_id
    ends = {*(named if isinstance(named, list) else [named]), model.tokenizer.eos_token_id}
    return sorted(end for end in ends if end is not None)


def _cache_tokens(model: Model) -> int:
    """Tokens whose keys and values may be held at once: 1 GB of them, on CUDA half of what is free."""
    size = 2 * model.n_layers * model.n_kv_heads * model.head_dim * model.dtype.itemsize
    space = free_on_gpus(model.layout) / 2 if model.device.type == "cuda" else 1e9
    return max(1, int(space / size))


def _costs(lengths: Sequence[int], new: int, max_batch: int, budget: int, cached: int) -> list[int]:
    """Each text's share of the budget, so that its batch keeps to `max_batch` texts and to `cached` tokens too."""
    return [
        max(length, -(-budget // max_batch), min(budget, -(-(length + new) * budget // cached))) for length in lengths
    ]
