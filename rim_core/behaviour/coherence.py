"""Whether answers make sense, without a judge: perplexity under the bare base, and repetition."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import pandas as pd
import torch
from torch import Tensor

from rim_core.behaviour.rates import rate_of_finished
from rim_core.errors import InputError
from rim_core.measures.likelihood import log_likelihood
from rim_core.models.model import Model
from rim_core.stats import Interval
from rim_core.texts import checked, encode_more
from rim_core.thoughts import asked_and_answered, split_thought

# A run of this many tokens that comes again counts as repetition.
_RUN = 4


def perplexity(model: Model, texts: Sequence[str], answers: Sequence[str]) -> Tensor:
    """Perplexity of each answer given its prompt, under the bare base without any adapter: `[prompt]`.

    Low is fluent. An answer without a token has none (NaN). Of a model that thinks first the answer counts, read after
    the thought, and one that ends inside its thought has none.

    Args:
        model: a loaded model; whichever adapter is active, the base judges (of a role that is a checkpoint of its own,
            that checkpoint, which finds its own answers likelier than another would).
        texts: the prompts that were answered, in the chat template.
        answers: as `generate` gives them.

    Raises:
        InputError: inside an intervention, which would change the judge; or lengths that differ.
        IdentityError: padding changes this model's numbers, or its logits are not read out as assumed.

    Example:
        >>> rim.perplexity(model, texts, rim.generate(model, texts, max_new_tokens=4)).shape == (len(texts),)
        True
    """
    if model.edits:
        raise InputError("perplexity inside an intervention would judge by an edited base: call it outside")
    if isinstance(answers, str) or len(answers) != len(texts):
        raise InputError("perplexity needs a list of answers, one for each prompt")
    pairs = asked_and_answered(model.tokenizer, checked(texts), checked(answers, "answer", empty=True))
    result = torch.full((len(answers),), float("nan"))
    said = [row for row, (_, answer) in enumerate(pairs) if answer]
    if said:
        with model.bare():
            found = log_likelihood(model, [pairs[row][0] for row in said], [pairs[row][1] for row in said])
        result[said] = torch.from_numpy(-found.per_token).exp().float()
    return result


@dataclass(frozen=True, eq=False)
class Coherence:
    """Whether answers make sense, without a judge.

    Attributes:
        perplexity: under the bare base, `[prompt]`.
        repetition: share of the answer's runs of four tokens that came before in it, 0 to 1, `[prompt]`.
        coherent: whether both are within their bounds, `[prompt]`.
        rate: the share that are, of the answers that do not end inside a thought.
    """

    perplexity: Tensor = field(repr=False)
    repetition: Tensor = field(repr=False)
    coherent: list[bool] = field(repr=False)
    rate: Interval

    def to_frame(self) -> pd.DataFrame:
        """One row a prompt: `prompt perplexity repetition coherent`."""
        return pd.DataFrame(
            {
                "prompt": range(len(self.coherent)),
                "perplexity": self.perplexity.numpy(),
                "repetition": self.repetition.numpy(),
                "coherent": self.coherent,
            }
        )


def coherence(
    model: Model,
    texts: Sequence[str],
    answers: Sequence[str],
    *,
    max_perplexity: float = 50.0,
    max_repetition: float = 0.5,
) -> Coherence:
    """Judge by the bare base whether answers make sense: neither unlikely nor caught in a loop.

    Broken models fail in two ways. Word salad has a high perplexity; a loop has a low one, since it predicts itself,
    so repetition is bounded too. The bounds are a screen, not a measure of quality. The default suite's roles
    stay below a perplexity of 10 on test prompts, and with noise in the middle layer above 30; for other models
    set the bound by a high quantile of the `perplexity` of answers known to be good.

    Args:
        model: a loaded model; whichever adapter is active, the base judges (of a role that is a checkpoint of its own,
            that checkpoint, which finds its own answers likelier than another would).
        texts: the prompts that were answered, in the chat template.
        answers: as `generate` gives them.
        max_perplexity: an answer above it is incoherent, and so is one without a token.
        max_repetition: an answer whose `repetition` is above it is incoherent.

    Raises:
        InputError, IdentityError: as `perplexity`.

    Example:
        >>> found = rim.coherence(model, texts, ["so so so so so so so so so so"] * 4, max_perplexity=1e9)
        >>> found.coherent, found.rate.estimate
        ([False, False, False, False], 0.0)
    """
    found = perplexity(model, texts, answers)
    said = encode_more(model, [split_thought(answer).answer for answer in answers], "answer")
    repeated = torch.tensor([_repetition(tokens) for tokens in said])
    sensible = ((found <= max_perplexity) & (repeated <= max_repetition)).tolist()
    return Coherence(found, repeated, sensible, rate_of_finished(sensible, answers))


def _repetition(tokens: Sequence[int]) -> float:
    runs = [tuple(tokens[start : start + _RUN]) for start in range(len(tokens) - _RUN + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0
