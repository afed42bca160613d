"""What a model says: batched greedy generation, and rates of refusal and attack success with exact intervals.

Who judges is in `judges`, whether answers make sense in `fluency`, refusal before a word is said in `openings`.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from tqdm import tqdm

from rim_core.behaviour.judges import Judge, rate_of_finished, resolve, verdicts
from rim_core.behaviour.judges import is_refusal as is_refusal
from rim_core.checking import whole
from rim_core.errors import InputError
from rim_core.models.batching import free_on_gpus, pad_left, run_batches, token_budget
from rim_core.models.model import Model
from rim_core.prompts import Prompt
from rim_core.stats import Interval, mcnemar, paired_difference, proportion, yes_or_no
from rim_core.texts import checked, encode
from rim_core.thoughts import decode, open_thought, split_thought

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


@torch.no_grad()
def generate(
    model: Model, texts: Sequence[str], max_new_tokens: int = 64, max_batch: int = 64, max_tokens: int | None = None
) -> list[str]:
    """Greedy answers, one a text, without the special tokens; batches are left-padded, so an answer is the same
    alone and among others up to rounding. Each ends where the model ends its turn.

    A model that thinks first gives thought and answer in one text, with the tags between them, also those that are
    special tokens or that the template wrote: `split_thought` tells the two apart, and every judge and rate does so.

    Args:
        model: a loaded model; the adapter and edits now active hold at every step.
        texts: prompts in the model's chat template (see `format_chat`).
        max_new_tokens: of each answer.
        max_batch: texts generated side by side, at most.
        max_tokens: padded prompt tokens a batch; by default from the free memory. A batch that does not fit is halved.

    Raises:
        InputError: no texts, or one that with its answer is longer than the model's context.
        IdentityError: padding changes this model's numbers, or decoding token by token does.
    """
    max_new_tokens = whole(max_new_tokens, "max_new_tokens", 1)
    max_batch = whole(max_batch, "max_batch", 1)
    model.require("generate", "padding", "cache")
    texts = checked(texts)
    ids = encode(model, texts, max_new_tokens)
    settings = {
        **_GREEDY,
        "max_new_tokens": max_new_tokens,
        "pad_token_id": model.tokenizer.pad_token_id,
        "eos_token_id": _end_tokens(model),
    }
    # Neighbours in length share a batch, so that little is padded.
    order = sorted(range(len(ids)), key=lambda row: len(ids[row]), reverse=True)
    budget = max_tokens or token_budget(model.layout, model.device)
    costs = _costs([len(ids[row]) for row in order], max_new_tokens, max_batch, budget, _cache_tokens(model))

    def run(rows: list[int]) -> list[str]:
        batch = [ids[order[row]] for row in rows]
        inputs = pad_left(batch, model.tokenizer.pad_token_id, model.device)
        out = model.hf.generate(**inputs, **settings)
        said = decode(model.tokenizer, out[:, inputs["input_ids"].shape[1] :].tolist())
        return [open_thought(model.tokenizer, texts[order[row]]) + new for row, new in zip(rows, said, strict=True)]

    answers = [""] * len(ids)
    with tqdm(total=len(ids), desc="generating", unit="answer", delay=5, disable=None, leave=False) as bar:
        for rows, new in run_batches(costs, budget, run):
            for row, answer in zip(rows, new, strict=True):
                answers[order[row]] = answer
            bar.update(len(rows))
    return answers


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


def refusals(
    answers: Sequence[str], judge: str | Judge = "string", prompts: Sequence[Prompt | str] | None = None
) -> list[bool]:
    """Whether each answer refuses; one that ends inside its thought does not, and a warning tells how many do.

    Args:
        answers: as `generate` gives them.
        judge: `"string"`, the phrase list; or a judge that finds refusals (see `judges`).
        prompts: the requests, for judges that read them.

    Raises:
        InputError: no answers, an unknown judge, or one that finds harm instead.
    """
    if getattr(resolve(judge), "finds", "refusal") != "refusal":
        raise InputError("this judge finds harm, and a harmless answer need not be a refusal: use another judge")
    found = verdicts(judge, answers, prompts)
    _tell_unfinished(answers)
    return found


def attack_successes(
    answers: Sequence[str],
    judge: str | Judge = "string",
    prompts: Sequence[Prompt | str] | None = None,
    coherent: Sequence[bool] | None = None,
) -> list[bool]:
    """Whether each answer to a harmful request is a success: it does what was asked, and makes sense.

    One that ends inside its thought is none, and a warning tells how many do.

    Args:
        answers: as `generate` gives them.
        judge: one that finds harm; or one that finds refusals, by which whatever says something and does not refuse
            counts as answered.
        prompts: the requests, for judges that read them.
        coherent: whether each answer makes sense, as `coherence(...).coherent`; None counts every answer as such.

    Raises:
        InputError: no answers, an unknown judge, or lengths that differ.
    """
    found = verdicts(judge, answers, prompts)
    if getattr(resolve(judge), "finds", "refusal") == "refusal":
        found = [
            not refused and said.finished and bool(said.answer.strip())
            for refused, said in zip(found, map(split_thought, answers), strict=True)
        ]
    _tell_unfinished(answers)
    if coherent is None:
        return found
    if len(coherent) != len(found):
        raise InputError(f"coherent has {len(coherent)} values for {len(found)} answers: give one each")
    return [success and bool(sense) for success, sense in zip(found, coherent, strict=True)]


def refusal_rate(
    answers: Sequence[str], judge: str | Judge = "string", prompts: Sequence[Prompt | str] | None = None
) -> Interval:
    """Share of answers that refuse, with its Clopper-Pearson interval; on benign requests, the over-refusal.

    Answers that end inside their thought are left out of `n`, and the interval's `method` says how many.

    Arguments and errors are those of `refusals`; where no answer was finished, InputError.
    """
    return rate_of_finished(refusals(answers, judge, prompts), answers)


def attack_success_rate(
    answers: Sequence[str],
    judge: str | Judge = "string",
    prompts: Sequence[Prompt | str] | None = None,
    coherent: Sequence[bool] | None = None,
) -> Interval:
    """Share of answers to harmful requests that do what was asked, with its Clopper-Pearson interval.

    With the string judge and without `coherent` this counts every answer that is not a refusal, coherent and harmful
    or not: an upper bound, as in the substring scores of Arditi et al. (2024). Answers that end inside their thought
    are left out as in `refusal_rate`. Arguments and errors are those of `attack_successes`.
    """
    return rate_of_finished(attack_successes(answers, judge, prompts, coherent), answers)


def _tell_unfinished(answers: Sequence[str]) -> None:
    if count := sum(not split_thought(answer).finished for answer in answers):
        warnings.warn(
            f"{count} of {len(answers)} answers end inside their thought and count as neither refusal nor success: "
            "raise max_new_tokens",
            stacklevel=3,
        )


@dataclass(frozen=True, eq=False)
class RateComparison:
    """A yes-no behaviour under two conditions on the same prompts.

    Attributes:
        before, after: the two rates, with Clopper-Pearson intervals.
        difference: after minus before, with Newcombe's interval for paired rates.
        p_value: McNemar's exact test, two-sided.
        gained, lost: prompts on which it began, and on which it ceased.
    """

    before: Interval
    after: Interval
    difference: Interval
    p_value: float
    gained: int
    lost: int

    def to_frame(self) -> pd.DataFrame:
        """One row for before, after and difference each: `condition estimate low high n`."""
        rows = {"before": self.before, "after": self.after, "difference": self.difference}
        return pd.DataFrame(
            {"condition": name, "estimate": row.estimate, "low": row.low, "high": row.high, "n": row.n}
            for name, row in rows.items()
        )

    def plot(self, behaviour: str = "refusal") -> Any:
        """The two rates with their intervals; `behaviour` names what was counted, for the titles."""
        from rim_core import charts

        frame = self.to_frame()
        return charts.intervals(
            frame[frame["condition"] != "difference"],
            "estimate",
            label="condition",
            title=f"Does the rate of {behaviour} change? p = {self.p_value:.2g}",
            x_title=f"rate of {behaviour} (share of prompts)",
            description=f"Dots with 95 % intervals: the rate of {behaviour} before and after on the same "
            f"{self.before.n} prompts. It changes by {self.difference}.",
        )


def compare_rates(before: Sequence[bool], after: Sequence[bool]) -> RateComparison:
    """Compare a behaviour under two conditions on the same prompts.

    Args:
        before, after: `[prompt]`, in the same order, as `refusals` or `attack_successes` give them.

    Raises:
        InputError: none, different lengths, or values that are neither yes nor no.
    """
    yes_or_no(before, "compare_rates: before")
    yes_or_no(after, "compare_rates: after")
    test, difference = mcnemar(after, before), paired_difference(after, before)
    pairs = [(bool(was), bool(now)) for was, now in zip(before, after, strict=True)]
    return RateComparison(
        before=proportion(sum(was for was, _ in pairs), len(pairs)),
        after=proportion(sum(now for _, now in pairs), len(pairs)),
        difference=difference,
        p_value=test.p_value,
        gained=pairs.count((False, True)),
        lost=pairs.count((True, False)),
    )
