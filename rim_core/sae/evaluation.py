"""How faithful a sparse autoencoder is: to the activations, and to the predictions of the model it is put into."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torch.nn.functional import cross_entropy

from rim_core import stats
from rim_core.errors import InputError
from rim_core.models.batching import batches, pad_left
from rim_core.models.hooks import Edit, editing
from rim_core.models.model import Model
from rim_core.sae.autoencoder import ROWS, SparseAutoencoder, checked_rows, splice
from rim_core.stats import Floats, Groups, Interval
from rim_core.tables import interval_frame
from rim_core.texts import encode


@dataclass(frozen=True, eq=False)
class SaeEvaluation:
    """How well a sparse autoencoder does on activations it was not trained on.

    Attributes:
        variance_explained: 1 - sum ||x - x'||^2 / sum ||x - mean||^2; 0 is what the mean alone explains.
        l0: latents active at once, on average.
        frequency: share of the activations on which each latent is active, `[d_sae]`.
        n: activations.
    """

    variance_explained: Interval
    l0: Interval
    frequency: Floats
    n: int

    @property
    def dead(self) -> int:
        """Latents that are active on none of the activations."""
        return int((self.frequency == 0).sum())

    def to_frame(self) -> pd.DataFrame:
        """Give a row a measure: measure, value, low, high, n; the share of dead latents has no interval."""
        dead = Interval(self.dead / len(self.frequency), np.nan, np.nan, self.n)
        return _frame(variance_explained=self.variance_explained, l0=self.l0, dead_share=dead)


@torch.no_grad()
def evaluate_sae(
    sae: SparseAutoencoder, activations: "Tensor | ArrayLike", groups: Groups = None, seed: int = 0
) -> SaeEvaluation:
    """Measure variance explained, L0 and dead latents on held-out activations.

    Args:
        sae: of any kind.
        activations: `[n, d]`, best not those it was trained on.
        groups: `[n]` of what varies together, such as the text each position is from; intervals are a bootstrap
            over them, or over activations.
        seed: of the bootstrap.

    Raises:
        InputError: activations that are not `[n, d]`, not finite, all equal, or of another width.
    """
    data = checked_rows(activations, "evaluate_sae")
    sae = sae.to(data.device)
    total = (data - data.mean(0)).double().square().sum(1)
    if not total.mean() > 1e-12 * data.mean(0).double().square().sum():
        raise InputError("evaluate_sae: all activations are equal, so there is no variance to explain")
    missed, active, fired = [], [], torch.zeros(sae.d_sae, device=data.device)
    for part in data.split(ROWS):
        latents = sae.encode(part)
        missed.append((part - sae.decode(latents)).double().square().sum(1))
        active.append((latents > 0).sum(1).double())
        fired += (latents > 0).sum(0)
    columns = torch.stack([torch.cat(missed), total, torch.cat(active)], dim=1).cpu().numpy()
    drawn = stats.resampled_means(columns, groups, n_resamples=1000, seed=seed)
    mean = columns.mean(0)
    n, method = len(data), f"bootstrap over {'activations' if groups is None else 'groups'}"
    return SaeEvaluation(
        _percentiles(1 - mean[0] / mean[1], 1 - drawn[:, 0] / drawn[:, 1], n, method),
        _percentiles(mean[2], drawn[:, 2], n, method),
        (fired / n).double().cpu().numpy(),
        n,
    )


def _percentiles(estimate: float, resampled: Floats, n: int, method: str) -> Interval:
    low, high = np.percentile(resampled, [2.5, 97.5])
    return Interval(float(estimate), float(low), float(high), n, method=method)


def _frame(**measures: Interval) -> pd.DataFrame:
    return interval_frame({(name,): found for name, found in measures.items()}, ["measure"], "value")


@dataclass(frozen=True, eq=False)
class CrossEntropyRecovered:
    """What the model keeps of its predictions when it runs on the reconstruction.

    Attributes:
        recovered: (zeroed - spliced) / (zeroed - clean); 1 is no loss, 0 is as bad as zeros in that place.
        clean, spliced, zeroed: cross-entropy of the next token in nats, as it is, on the reconstruction, on zeros.
        n_tokens: tokens predicted. Intervals are a bootstrap over texts; their n is the number of texts.
    """

    recovered: Interval
    clean: Interval
    spliced: Interval
    zeroed: Interval
    n_tokens: int

    def to_frame(self) -> pd.DataFrame:
        """Give a row a measure: measure, value, low, high, n (texts)."""
        return _frame(recovered=self.recovered, clean=self.clean, spliced=self.spliced, zeroed=self.zeroed)


@torch.no_grad()
def cross_entropy_recovered(
    model: Model, sae: SparseAutoencoder, texts: Sequence[str], layer: int, site: str = "resid_post", seed: int = 0
) -> CrossEntropyRecovered:
    """Measure how much of the model's cross-entropy survives the reconstruction at every position.

    Args:
        model: a loaded model; the adapter and edits now active apply.
        sae: trained on this site of this layer.
        texts: at least two, which the model predicts token by token.
        layer, site: where the reconstruction goes.
        seed: of the bootstrap over texts.

    Raises:
        InputError: fewer than two texts, a text of one token, another width, or a model that predicts these texts
            no worse on zeros, which leaves nothing to recover.
        IdentityError: padding changes this model's numbers.
    """
    model.require("cross_entropy_recovered", "padding")
    ids = encode(model, texts)
    if len(ids) < 2 or min(map(len, ids)) < 2:
        raise InputError(
            "cross_entropy_recovered: give at least two texts, each of two tokens or more: one predicts the next"
        )
    clean = _losses(model, ids)
    with splice(model, sae, layer, error_term=False, site=site):
        spliced = _losses(model, ids)
    with editing(model, [Edit(site, layer, lambda values, _: torch.zeros_like(values))]):
        zeroed = _losses(model, ids)
    counts = [len(row) - 1 for row in ids]
    columns = np.stack([clean, spliced, zeroed, counts], axis=1)
    found, drawn = _measures(columns.mean(0)), _measures(stats.resampled_means(columns, seed=seed))
    if not found["zeroed"] > found["clean"]:
        raise InputError(
            f"cross_entropy_recovered: {model.name} predicts these texts no worse with zeros at layer {layer} "
            f"({found['zeroed']:.2f} against {found['clean']:.2f} nats): give texts like those it was trained on"
        )
    method = "bootstrap over texts"
    intervals = {name: _percentiles(found[name], drawn[name], len(ids), method) for name in found}
    return CrossEntropyRecovered(**intervals, n_tokens=sum(counts))


def _measures(sums: Floats) -> dict[str, Any]:
    """The share recovered and the entropies, from losses clean, spliced and zeroed and tokens, `[..., 4]`."""
    clean, spliced, zeroed = (sums[..., column] / sums[..., 3] for column in range(3))
    recovered = (zeroed - spliced) / (zeroed - clean)
    return {"recovered": recovered, "clean": clean, "spliced": spliced, "zeroed": zeroed}


def _losses(model: Model, ids: list[list[int]]) -> Floats:
    """Sum over each text's tokens, from the second on, of minus their log-probability, `[text]`."""
    total = np.empty(len(ids))
    # Logits and their logarithms are two tensors of this many numbers: 2 x 128 MB.
    max_tokens = max(1, 2**25 // model.layout.d_vocab)
    for rows in batches([len(row) for row in ids], max_tokens):
        inputs = pad_left([ids[row] for row in rows], model.tokenizer.pad_token_id, model.device)
        logits = model.hf(**inputs, use_cache=False).logits[:, :-1].float()
        targets = inputs["input_ids"][:, 1:].masked_fill(inputs["attention_mask"][:, :-1] == 0, -100)
        losses = cross_entropy(logits.transpose(1, 2), targets, reduction="none")
        total[rows] = losses.double().sum(1).cpu().numpy()
    return total
