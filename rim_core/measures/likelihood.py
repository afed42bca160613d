"""How likely a model finds given completions, how open it leaves them, and how far two models' predictions part.

Everything is over the completion's positions: those that predict its tokens, from the prompt's last token on. The
vocabulary is worked on a few positions at a time.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from rim_core import stats
from rim_core.errors import InputError
from rim_core.models import remote
from rim_core.models.batching import run_batches, token_budget
from rim_core.models.hooks import Frame, reading
from rim_core.models.model import Model
from rim_core.models.padding import pad_left
from rim_core.models.remembering import resuming
from rim_core.stats import Floats, Groups, Interval, Ints
from rim_core.texts import checked, encode, encode_more, require_room

# Logits worked on at a time: 64 MB in float32.
_PIECE = 2**24


@dataclass(frozen=True, eq=False)
class Likelihoods:
    """One model's view of completions, one entry an example.

    Attributes:
        log_probability: log joint probability of the completion given the prompt, in nats, `[example]`.
        tokens: completion tokens, `[example]`.
        entropy: mean entropy of the next-token distribution over the completion's positions, in nats, `[example]`.
    """

    log_probability: Floats
    tokens: Ints
    entropy: Floats

    @property
    def per_token(self) -> Floats:
        """Mean log probability of a completion's token, in nats, `[example]`: comparable across lengths."""
        return self.log_probability / self.tokens

    def means(self, *, groups: Groups = None, seed: int = 0) -> dict[str, Interval]:
        """Means over examples with bootstrap intervals: "log_probability", "per_token" and "entropy", in nats.

        Args:
            groups: `[example]` of what is resampled whole (category, prompt), or None.
            seed: of the bootstrap.

        Raises:
            InputError: fewer than two examples or groups.
        """
        names = ("log_probability", "per_token", "entropy")
        return {name: stats.bootstrap(getattr(self, name), groups=groups, seed=seed) for name in names}

    def to_frame(self) -> pd.DataFrame:
        """Give a row an example: example, log_probability, per_token, entropy (nats), tokens."""
        names = ("log_probability", "per_token", "entropy", "tokens")
        return pd.DataFrame({name: getattr(self, name) for name in names}).rename_axis("example").reset_index()


@dataclass(frozen=True, eq=False)
class Divergence:
    """How far another model's next-token predictions are from this one's, one entry an example.

    Attributes:
        kl: mean over the completion's positions of KL(this || other), in nats, `[example]`.
        tokens: completion tokens, `[example]`.
    """

    kl: Floats
    tokens: Ints

    def mean(self, *, groups: Groups = None, seed: int = 0) -> Interval:
        """Mean over examples, in nats a token, with its bootstrap interval; see `Likelihoods.means`."""
        return stats.bootstrap(self.kl, groups=groups, seed=seed)

    def to_frame(self) -> pd.DataFrame:
        """Give a row an example: example, kl (nats a token), tokens."""
        return pd.DataFrame({"kl": self.kl, "tokens": self.tokens}).rename_axis("example").reset_index()


@torch.no_grad()
def log_likelihood(
    model: Model, prompts: Sequence[str], completions: Sequence[str], *, max_tokens: int | None = None
) -> Likelihoods:
    """Measure how likely the model finds each completion after its prompt (paper D, section 4.1).

    `log P = sum_t log softmax(logits)_t` over the completion's tokens. The paper's code also averages the entropy
    over the prompt's positions, and its stored means of the base model may pool two models' examples; here the
    entropy is the completion's own, and each call measures one model.

    A prompt and its completion are tokenised together; where the result does not begin with the prompt's own tokens
    (a merge across the boundary), the completion is tokenised apart and put after them, as generation does.

    Args:
        model: a loaded model; the adapter and edits now active apply, with "last" the prompt's last token.
        prompts: texts in the chat template (see `format_chat`), `[example]`.
        completions: what follows each; an end-of-turn token counts if it is written out.
        max_tokens: padded tokens a forward pass; by default from the free memory. A pass that does not fit is halved.

    Raises:
        InputError: no examples, unequal numbers of prompts and completions, an empty one, or log probabilities
            that are not finite.
        IdentityError: padding changes this model's numbers, or its logits are not read out as assumed.

    Example:
        >>> found = rim.log_likelihood(model, texts, [" Why?"] * len(texts))
        >>> bool((found.log_probability < 0).all())
        True
        >>> list(found.to_frame())
        ['example', 'log_probability', 'per_token', 'entropy', 'tokens']
    """
    model.require("log_likelihood", "padding", "lens")
    examples = _examples(model, prompts, completions, "log_likelihood")

    def read(ids: list[list[int]], lengths: list[int]) -> list[Tensor]:
        if model.remote:
            states, targets = model.remote.states(ids, lengths)
            found = model.remote.read_out(states, targets[:, None])
            return [found["log_probability"][:, 0], found["entropy"]]
        states, targets = _states(model, ids, lengths)
        chosen, entropies = [], []
        step = _step(model)
        for piece, wanted in zip(states.split(step), targets.split(step), strict=True):
            log_p = _log_probabilities(model, piece)
            chosen.append(log_p.gather(1, wanted[:, None].to(log_p.device))[:, 0])
            entropies.append(-(log_p.exp() * log_p).sum(1))
        return [torch.cat(chosen), torch.cat(entropies)]

    budget = max_tokens or (remote.TOKENS if model.remote else token_budget(model.layout, model.device))
    (log_probability, entropy), tokens = _summed(model, examples, budget, read, "log_likelihood")
    return Likelihoods(log_probability, tokens, entropy / tokens)


@torch.no_grad()
def kl_divergence(
    model: Model,
    other: Model | str | None,
    prompts: Sequence[str],
    completions: Sequence[str],
    *,
    max_tokens: int | None = None,
) -> Divergence:
    """Measure KL(model || other) between two models' next-token distributions along given completions.

    `sum_v p(v) (log p(v) - log q(v))` at each position that predicts a completion token, p the model's and q the
    other's; averaged over an example's positions. Tokenisation is that of `log_likelihood`.

    Args:
        model: a loaded model; the adapter and edits now active apply.
        other: another model of the same vocabulary; or what `model.using` takes: a role, an adapter's folder, or
            None for the bare base, under the same edits.
        prompts: texts in the chat template, `[example]`.
        completions: what follows each, `[example]`.
        max_tokens: as in `log_likelihood`.

    Raises:
        InputError: as `log_likelihood`, an unknown role, or another vocabulary.
        IdentityError: as `log_likelihood`, for either model.

    Example:
        >>> rim.kl_divergence(model, model, texts, [" Why?"] * len(texts)).kl.tolist() == [0] * len(texts)
        True
    """
    model.require("kl_divergence", "padding", "lens")
    budget = max_tokens or token_budget(model.layout, model.device)
    with _as(model, other) as second:
        second.require("kl_divergence", "padding", "lens")
        if not _same_vocabulary(model, second):
            raise InputError(
                f"kl_divergence: {model.name} and {second.name} have different vocabularies; compare models that "
                "share one"
            )
        if max_tokens is None:
            budget = min(budget, token_budget(second.layout, second.device))
    examples = _examples(model, prompts, completions, "kl_divergence")

    def read(ids: list[list[int]], lengths: list[int]) -> list[Tensor]:
        states, _ = _states(model, ids, lengths)
        with _as(model, other) as second:
            other_states, _ = _states(second, ids, lengths)
        terms = []
        for piece, others in zip(states.split(_step(model)), other_states.split(_step(model)), strict=True):
            log_p = _log_probabilities(model, piece)
            # An adapter may be on the head too, so each reads out as itself.
            with _as(model, other) as second:
                log_q = _log_probabilities(second, others).to(log_p.device)
            terms.append((log_p.exp() * (log_p - log_q)).sum(1))
        return [torch.cat(terms)]

    (total,), tokens = _summed(model, examples, budget, read, "kl_divergence")
    return Divergence(total / tokens, tokens)


@contextlib.contextmanager
def _as(model: Model, other: Model | str | None) -> Iterator[Model]:
    """The other model: a model of its own, or the same one under another adapter."""
    if isinstance(other, Model):
        yield other
    else:
        with model.using(other):
            yield model


def _same_vocabulary(a: Model, b: Model) -> bool:
    return a.layout.d_vocab == b.layout.d_vocab and a.tokenizer.get_vocab() == b.tokenizer.get_vocab()


def _examples(
    model: Model, prompts: Sequence[str], completions: Sequence[str], tool: str
) -> tuple[list[list[int]], list[int]]:
    """Token ids of each prompt with its completion, and how many of them are the completion's."""
    prompts = checked(prompts)
    heads = encode(model, prompts)
    if isinstance(completions, str) or len(completions) != len(heads):
        raise InputError(f"{tool}: give a list of completions, one for each of the {len(heads)} prompts")
    completions = checked(completions, "completion", empty=True)
    tails = encode_more(model, completions)
    whole = encode(model, [prompt + tail for prompt, tail in zip(prompts, completions, strict=True)])
    ids = []
    for head, joint, tail in zip(heads, whole, tails, strict=True):
        begins = joint[: len(head)] == head
        ids.append(joint if begins else head + tail)
    require_room(model, [len(row) for row in ids], noun=f"{tool}: example")
    lengths = [len(row) - len(head) for row, head in zip(ids, heads, strict=True)]
    if 0 in lengths:
        raise InputError(f"{tool}: completion {lengths.index(0)} is empty: remove it")
    return ids, lengths


@contextlib.contextmanager
def completing(model: Model, ids: list[list[int]], lengths: list[int]) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Give padded inputs, and each slot's position `[row, slot]` counted from its completion's first token.

    Within the context edits count so too: those of the prompt's last token (-1) find it.

    Args:
        ids: prompt and completion together.
        lengths: how many of them are the completion's.
    """
    inputs = pad_left(ids, model.tokenizer.pad_token_id, model.device)
    width = inputs["input_ids"].shape[1]
    starts = width - torch.tensor(lengths, device=model.device)
    positions = torch.arange(width, device=model.device) - starts[:, None]
    before, model.frame = model.frame, Frame(positions, positions)
    try:
        yield inputs, positions
    finally:
        model.frame = before


def _states(model: Model, ids: list[list[int]], lengths: list[int]) -> tuple[Tensor, Tensor]:
    """The last layer's output where completion tokens are predicted, `[position, d]`, and those tokens."""
    layout, last = model.layout, model.n_layers - 1
    with completing(model, ids, lengths) as (inputs, positions):
        predicted = positions[:, 1:] >= 0

        def keep(tensor: Tensor) -> Tensor:
            return tensor[:, :-1][predicted.to(tensor.device)]

        batch = ("likelihood", *map(tuple, ids), *lengths)
        with reading(layout, ("resid_post",), keep, layers=[last]) as found, resuming(model, batch):
            layout.body(**inputs, use_cache=False)
    states = found["resid_post", last]
    return states, inputs["input_ids"][:, 1:][predicted].to(states.device)


def _log_probabilities(model: Model, states: Tensor) -> Tensor:
    return model.layout.readout(states).float().log_softmax(-1)


def _step(model: Model) -> int:
    """Positions worked on at a time."""
    return max(1, _PIECE // model.layout.d_vocab)


def _summed(
    model: Model,
    examples: tuple[list[list[int]], list[int]],
    budget: int,
    read: Callable[[list[list[int]], list[int]], list[Tensor]],
    tool: str,
) -> tuple[list[Floats], Ints]:
    """Each term that `read` gives `[position]` of a batch's ids and lengths, summed by example, float64 `[example]`;
    and the completions' lengths.
    """
    ids, lengths = examples

    def run(rows: list[int]) -> list[list[float]]:
        counts = [lengths[row] for row in rows]
        terms = read([ids[row] for row in rows], counts)
        return [[float(part.sum()) for part in term.double().cpu().split(counts)] for term in terms]

    found: dict[int, Floats] = {}
    for rows, sums in run_batches([len(row) for row in ids], budget, run):
        for number, values in enumerate(sums):
            found.setdefault(number, np.empty(len(ids)))[rows] = values
    broken = np.flatnonzero(~np.isfinite(sum(found.values())))
    if len(broken):
        raise InputError(
            f"{tool}: example {broken[0]} gives a number that is not finite in {model.dtype}; load in float32 or "
            "bfloat16"
        )
    return list(found.values()), np.array(lengths)
