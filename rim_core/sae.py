"""Sparse autoencoders: trained on activations, read and written in SAELens' format, judged, and spliced in.

A sparse autoencoder writes an activation as a sum of few dictionary directions. Its latents only mean something
beside controls: `random_features` is a dictionary of random directions that fire as often, and
`latent_correlations` judges the best of thousands of latents against the best of thousands by chance.
"""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import scipy.stats
import torch
from numpy.typing import ArrayLike, NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from rim_core import stats
from rim_core.editing import Edit, at, editing
from rim_core.errors import InputError
from rim_core.loading import Model
from rim_core.tracing import batches, encode, pad_left

if TYPE_CHECKING:
    import altair as alt

Floats = NDArray[np.float64]

CONFIG_FILE, WEIGHTS_FILE = "cfg.json", "sae_weights.safetensors"
# SAELens' word for each kind of activation function.
_ARCHITECTURES = {"relu": "standard", "topk": "topk", "jumprelu": "jumprelu"}
# The version of the format that is written: SAELens takes a file without one for an older format.
_FORMAT = "6.0.0"
# Rows encoded at a time: 2,048 rows of 10,000 latents are 80 MB.
_ROWS = 2048


@dataclass(frozen=True, eq=False)
class SparseAutoencoder:
    """`x ~ b_dec + f W_dec`, with few latents `f = activation((x - b_dec) W_enc + b_enc)` above zero.

    Attributes:
        W_enc: `[d_in, d_sae]`. b_enc: `[d_sae]`.
        W_dec: `[d_sae, d_in]`, the dictionary; rows have norm 1 where `train_sae` made it. b_dec: `[d_in]`.
        kind: "relu" (Bricken et al. 2023), "topk" (Gao et al. 2024) or "jumprelu" (Rajamanoharan et al. 2024).
        k: latents that may be active at once, for "topk".
        threshold: `[d_sae]`, what a latent must exceed to be active, for "jumprelu".
        apply_b_dec_to_input: whether `b_dec` is subtracted before encoding.
        metadata: what is known of it: how it was trained, and `hook_name`, `model_name` and so on as in SAELens.
    """

    W_enc: Tensor = field(repr=False)
    b_enc: Tensor = field(repr=False)
    W_dec: Tensor = field(repr=False)
    b_dec: Tensor = field(repr=False)
    kind: str = "relu"
    k: int | None = None
    threshold: Tensor | None = field(default=None, repr=False)
    apply_b_dec_to_input: bool = True
    metadata: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        needs = {"relu": (), "topk": ("k",), "jumprelu": ("threshold",)}
        if self.kind not in needs:
            raise InputError(f"no kind of sparse autoencoder {self.kind!r}: use {', '.join(needs)}")
        if missing := [name for name in needs[self.kind] if getattr(self, name) is None]:
            raise InputError(f"a {self.kind} autoencoder needs {missing[0]}: give it")

    d_in = property(lambda self: self.W_enc.shape[0], doc="Width of the activations.")
    d_sae = property(lambda self: self.W_enc.shape[1], doc="Number of latents.")

    def encode(self, x: Tensor) -> Tensor:
        """Latents `[..., d_sae]`, none below 0, of activations `[..., d_in]`; in float32."""
        if x.shape[-1] != self.d_in:
            raise InputError(
                f"activations of width {x.shape[-1]} do not fit a sparse autoencoder of width {self.d_in}"
            )
        x = x.float()
        raw = (x - self.b_dec if self.apply_b_dec_to_input else x) @ self.W_enc + self.b_enc
        if self.kind == "topk":
            values, indices = raw.topk(self.k or 1, dim=-1, sorted=False)
            return torch.zeros_like(raw).scatter(-1, indices, values.relu())
        return raw.relu() if self.threshold is None else raw.relu() * (raw > self.threshold)

    def decode(self, latents: Tensor) -> Tensor:
        """Activations `[..., d_in]` from latents `[..., d_sae]`."""
        return latents @ self.W_dec + self.b_dec

    def forward(self, x: Tensor) -> Tensor:
        """The reconstruction of activations `[..., d_in]`, in float32."""
        return self.decode(self.encode(x))

    __call__ = forward

    def to(self, device: "torch.device | str") -> "SparseAutoencoder":
        """The same autoencoder with its tensors on another device."""
        moved: dict[str, Any] = {name: tensor.to(device) for name, tensor in self.tensors().items()}
        return replace(self, **moved)

    def tensors(self) -> dict[str, Tensor]:
        """The parameters by name, `threshold` only where there is one."""
        found = {"W_enc": self.W_enc, "b_enc": self.b_enc, "W_dec": self.W_dec, "b_dec": self.b_dec}
        return found if self.threshold is None else {**found, "threshold": self.threshold}


# --- training -------------------------------------------------------------------------------------------------


def train_sae(
    activations: "Tensor | ArrayLike",
    n_latents: int | None = None,
    expansion: float = 4,
    kind: str = "relu",
    l1: float = 0.05,
    k: int = 32,
    steps: int = 500,
    batch: int = 256,
    lr: float = 2e-3,
    normalize: bool = True,
    resample: int = 3,
    seed: int = 0,
    metadata: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> SparseAutoencoder:
    """Train a sparse autoencoder on activations, on the device they are on; the result is on the CPU.

    "relu" minimises `||x - x'||^2 + l1 * sum(f)` with dictionary rows of norm 1 (Bricken et al. 2023, "Towards
    Monosemanticity", appendix; l1 rises over the first 5 % of the steps and the learning rate falls over the last
    20 %, as in Anthropic's update of April 2024). "topk" keeps the k largest latents of each activation and has
    no penalty (Gao et al. 2024, section 2.3). In both, latents that died are resampled: each takes the direction
    of what is missing from an activation drawn in proportion to its squared loss (Bricken et al.'s remedy, which
    takes the activation itself; for topk Gao et al. use an auxiliary loss that needs longer training).

    Args:
        activations: `[n, d]`. A first token with a norm far above the rest is better left out.
        n_latents: latents; None takes `expansion` times d.
        expansion: paper C's "expansion factor k = 23" read as a multiple of d; 4 is this project's default.
        kind: "relu" or "topk".
        l1: weight of the sparsity penalty, in the unit set by `normalize`. Paper C states 0.05 and no unit.
        k: latents active at once, for "topk".
        steps, batch: optimiser steps and activations a step. lr: Adam's step size.
        normalize: train on activations whose mean distance from their mean is 1, so that `l1` and `lr` mean the
            same at every layer. This is SAELens' `expected_average_only_in` but for a factor sqrt(d) and the
            centre. The scale is folded into the weights, so that the result takes activations as they are; it
            is kept in `metadata["activation_scale"]`.
        resample: how many times dead latents are looked for and resampled, evenly over the first three quarters.
        seed: of the starting directions, the order of the activations and the resampling.
        metadata: kept with the result, such as `{"hook_name": "blocks.20.hook_resid_post"}`.
        progress: show a progress bar.

    Raises:
        InputError: activations that are not `[n, d]`, not finite or all equal, or settings out of range.
    """
    data = _matrix(activations, "train_sae")
    m = round(expansion * data.shape[1]) if n_latents is None else n_latents
    if kind not in ("relu", "topk"):
        raise InputError(f"train_sae: no kind {kind!r}; use 'relu' or 'topk'")
    if not (m >= 1 and steps >= 1 and batch >= 1 and lr > 0 and l1 >= 0 and resample >= 0):
        raise InputError(
            f"train_sae: n_latents={m}, steps={steps}, batch={batch}, lr={lr}, l1={l1}, resample={resample}; "
            "need n_latents, steps and batch of at least 1, lr above 0, l1 and resample of at least 0"
        )
    if kind == "topk" and not 1 <= k <= m:
        raise InputError(f"train_sae: k={k} of {m} latents; choose k from 1 to {m}")
    centre = data.mean(0)
    spread = float((data - centre).norm(dim=1).mean())
    if spread <= 1e-6 * float(centre.norm()):
        raise InputError(f"train_sae: all {len(data)} activations are equal; there is nothing to learn")
    scale = spread if normalize else 1.0
    directions = stats.derive_generator(seed, "sae", "directions").standard_normal((m, data.shape[1]))
    W_dec = functional.normalize(torch.from_numpy(directions).float()).to(data.device)
    b_enc = torch.zeros(m, device=data.device)
    sparsity: dict[str, Any] = {"l1": l1} if kind == "relu" else {"k": k}
    sae = SparseAutoencoder(W_dec.T.clone(), b_enc, W_dec, centre / scale, kind, sparsity.get("k"))
    rng = stats.derive_generator(seed, "sae", "order")
    _fit(sae, data / scale, sparsity.get("l1", 0.0), steps, batch, lr, resample, rng, progress)
    settings = {"steps": steps, "batch": batch, "lr": lr, "resample": resample, "seed": seed, "n": len(data)}
    # Both kinds are homogeneous: scaling input, biases and latents alike leaves W_enc and W_dec as they are.
    return SparseAutoencoder(
        W_enc=sae.W_enc.detach().cpu(),
        b_enc=sae.b_enc.detach().cpu() * scale,
        W_dec=sae.W_dec.detach().cpu(),
        b_dec=sae.b_dec.detach().cpu() * scale,
        kind=kind,
        k=sae.k,
        metadata={**(metadata or {}), "activation_scale": scale, "training": {**sparsity, **settings}},
    )


def _matrix(activations: "Tensor | ArrayLike", caller: str, rows: int = 2) -> Tensor:
    data = torch.as_tensor(activations).detach().float()
    if data.ndim != 2 or len(data) < rows:
        raise InputError(
            f"{caller}: activations have shape {list(data.shape)}; give [n, d] with n of at least {rows}, "
            "such as capture(...)['resid_post'][:, layer]"
        )
    if not data.isfinite().all():
        raise InputError(f"{caller}: activations hold NaN or infinity; find out why before going on")
    return data


def _fit(
    sae: SparseAutoencoder,
    data: Tensor,
    l1: float,
    steps: int,
    batch: int,
    lr: float,
    resample: int,
    rng: np.random.Generator,
    progress: bool,
) -> None:
    """Train the autoencoder's tensors in place."""
    from tqdm import tqdm

    weights = [tensor.requires_grad_(True) for tensor in sae.tensors().values()]
    optimizer = torch.optim.Adam(weights, lr=lr)
    checks = {round(0.75 * steps * (i + 1) / resample) for i in range(resample)}
    order = np.empty(0, dtype=np.int64)
    fired = torch.zeros(sae.d_sae, dtype=torch.bool, device=data.device)
    bar = tqdm(range(1, steps + 1), desc=f"training {sae.d_sae} latents", unit="step", disable=not progress)
    for step in bar:
        while len(order) < batch:
            order = np.concatenate([order, rng.permutation(len(data))])
        x, order = data[torch.from_numpy(order[:batch]).to(data.device)], order[batch:]
        optimizer.param_groups[0]["lr"] = lr * min(1.0, (steps - step + 1) / (0.2 * steps))
        latents = sae.encode(x)
        penalty = l1 * min(1.0, step / (0.05 * steps)) * latents.sum(1).mean()
        loss = (sae.decode(latents) - x).square().sum(1).mean() + penalty
        optimizer.zero_grad()
        loss.backward()
        with torch.no_grad():
            # The part of a row's gradient along the row would be undone by the norm of 1 anyway.
            gradient = sae.W_dec.grad
            assert gradient is not None
            gradient -= (gradient * sae.W_dec).sum(1, keepdim=True) * sae.W_dec
            optimizer.step()
            sae.W_dec.copy_(functional.normalize(sae.W_dec))
            fired |= (latents > 0).any(0)
            if step in checks:
                _resample(sae, data, ~fired, optimizer, rng)
                fired.zero_()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}")


def _resample(
    sae: SparseAutoencoder,
    data: Tensor,
    dead: Tensor,
    optimizer: torch.optim.Optimizer,
    rng: np.random.Generator,
) -> None:
    """Point dead latents at activations that are badly reconstructed; forget the optimiser's state for them."""
    count = int(dead.sum())
    if not count:
        return
    rows = torch.from_numpy(rng.choice(len(data), min(len(data), 4 * _ROWS), replace=False)).to(data.device)
    sample = data[rows]
    missed = sample - torch.cat([sae(part) for part in sample.split(_ROWS)])
    loss = missed.square().sum(1).double().cpu().numpy()
    if loss.sum() == 0:
        return
    drawn = torch.from_numpy(rng.choice(len(rows), count, p=loss**2 / (loss**2).sum())).to(data.device)
    new = functional.normalize(missed[drawn])
    sae.W_dec[dead] = new
    alive = sae.W_enc[:, ~dead].norm(dim=0).mean() if not dead.all() else 1.0
    # Bricken et al.'s 0.2 keeps a new latent quiet; among the k largest a quiet one would never be heard.
    sae.W_enc[:, dead] = (0.2 if sae.kind == "relu" else 1.0) * alive * new.T
    sae.b_enc[dead] = 0.0
    for weight, index in ((sae.W_dec, (dead,)), (sae.W_enc, (slice(None), dead)), (sae.b_enc, (dead,))):
        for moment in ("exp_avg", "exp_avg_sq"):
            optimizer.state[weight][moment][index] = 0.0


# --- judging --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class SaeEvaluation:
    """How well a sparse autoencoder does on activations it was not trained on.

    Attributes:
        variance_explained: 1 - sum ||x - x'||^2 / sum ||x - mean||^2; 0 is what the mean alone explains.
        l0: latents active at once, on average.
        frequency: share of the activations on which each latent is active, `[d_sae]`.
        n: activations.
    """

    variance_explained: stats.Interval
    l0: stats.Interval
    frequency: Floats
    n: int

    @property
    def dead(self) -> int:
        """Latents that are active on none of the activations."""
        return int((self.frequency == 0).sum())

    def to_frame(self) -> pd.DataFrame:
        """Give a row a measure: measure, value, low, high, n; the share of dead latents has no interval."""
        dead = stats.Interval(self.dead / len(self.frequency), np.nan, np.nan, self.n)
        return _frame({"variance_explained": self.variance_explained, "l0": self.l0, "dead_share": dead})


@torch.no_grad()
def evaluate_sae(
    sae: SparseAutoencoder,
    activations: "Tensor | ArrayLike",
    groups: Sequence[object] | NDArray | None = None,
    seed: int = 0,
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
    data = _matrix(activations, "evaluate_sae")
    sae = sae.to(data.device)
    total = (data - data.mean(0)).double().square().sum(1)
    if not total.mean() > 1e-12 * data.mean(0).double().square().sum():
        raise InputError("evaluate_sae: all activations are equal, so there is no variance to explain")
    missed, active, fired = [], [], torch.zeros(sae.d_sae, device=data.device)
    for part in data.split(_ROWS):
        latents = sae.encode(part)
        missed.append((part - sae.decode(latents)).double().square().sum(1))
        active.append((latents > 0).sum(1).double())
        fired += (latents > 0).sum(0)
    columns = torch.stack([torch.cat(missed), total, torch.cat(active)], dim=1).cpu().numpy()
    drawn = stats.resampled_means(columns, groups, n_resamples=1000, seed=seed)
    mean = columns.mean(0)
    method = "bootstrap over activations" if groups is None else "cluster bootstrap over groups"
    n = len(data)
    return SaeEvaluation(
        _percentiles(1 - mean[0] / mean[1], 1 - drawn[:, 0] / drawn[:, 1], n, method),
        _percentiles(mean[2], drawn[:, 2], n, method),
        (fired / n).double().cpu().numpy(),
        n,
    )


def _percentiles(estimate: float, resampled: Floats, n: int, method: str) -> stats.Interval:
    low, high = np.percentile(resampled, [2.5, 97.5])
    return stats.Interval(float(estimate), float(low), float(high), n, method=method)


def _frame(measures: Mapping[str, stats.Interval]) -> pd.DataFrame:
    rows = [(name, i.estimate, i.low, i.high, i.n) for name, i in measures.items()]
    return pd.DataFrame(rows, columns=["measure", "value", "low", "high", "n"])


@dataclass(frozen=True, eq=False)
class CrossEntropyRecovered:
    """What the model keeps of its predictions when it runs on the reconstruction.

    Attributes:
        recovered: (zeroed - spliced) / (zeroed - clean); 1 is no loss, 0 is as bad as zeros in that place.
        clean, spliced, zeroed: cross-entropy of the next token in nats, as it is, on the reconstruction, on zeros.
        n_tokens: tokens predicted. Intervals are a bootstrap over texts; their n is the number of texts.
    """

    recovered: stats.Interval
    clean: stats.Interval
    spliced: stats.Interval
    zeroed: stats.Interval
    n_tokens: int

    def to_frame(self) -> pd.DataFrame:
        """Give a row a measure: measure, value, low, high, n (texts)."""
        return _frame({name: getattr(self, name) for name in ("recovered", "clean", "spliced", "zeroed")})


@torch.no_grad()
def cross_entropy_recovered(
    model: Model,
    sae: SparseAutoencoder,
    texts: Sequence[str],
    layer: int,
    site: str = "resid_post",
    seed: int = 0,
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
    ids = encode(model.tokenizer, texts)
    if len(ids) < 2 or min(map(len, ids)) < 2:
        raise InputError(
            "cross_entropy_recovered: give at least two texts, each of two tokens or more: one predicts the next"
        )
    zero = Edit(site, layer, lambda values, positions: torch.zeros_like(values))
    clean = _losses(model, ids)
    with splice(model, sae, layer, error_term=False, site=site):
        spliced = _losses(model, ids)
    with editing(model, [zero]):
        zeroed = _losses(model, ids)
    counts = np.array([len(row) - 1.0 for row in ids])
    columns = np.stack([clean, spliced, zeroed, counts], axis=1)
    mean, drawn = columns.mean(0), stats.resampled_means(columns, seed=seed)
    entropy, resampled = mean[:3] / mean[3], drawn[:, :3] / drawn[:, 3:]
    if not entropy[2] > entropy[0]:
        raise InputError(
            f"cross_entropy_recovered: {model.name} predicts these texts no worse with zeros at layer {layer} "
            f"({entropy[2]:.2f} against {entropy[0]:.2f} nats): give texts like those it was trained on"
        )
    method, n = "bootstrap over texts", len(ids)
    return CrossEntropyRecovered(
        _percentiles(_recovered(entropy), _recovered(resampled.T), n, method),
        _percentiles(entropy[0], resampled[:, 0], n, method),
        _percentiles(entropy[1], resampled[:, 1], n, method),
        _percentiles(entropy[2], resampled[:, 2], n, method),
        int(counts.sum()),
    )


def _recovered(entropy: Floats) -> Any:
    clean, spliced, zeroed = entropy
    return (zeroed - spliced) / (zeroed - clean)


def _losses(model: Model, ids: list[list[int]]) -> Floats:
    """Sum over each text's tokens, from the second on, of minus their log-probability, `[text]`."""
    total = np.empty(len(ids))
    # Logits and their logarithms are two tensors of this many numbers: 2 x 128 MB.
    max_tokens = max(1, 2**25 // model.hf.config.get_text_config().vocab_size)
    for rows in batches([len(row) for row in ids], max_tokens):
        inputs = pad_left([ids[row] for row in rows], model.tokenizer.pad_token_id, model.device)
        logits = model.hf(**inputs, use_cache=False).logits[:, :-1].float()
        targets = inputs["input_ids"][:, 1:].masked_fill(inputs["attention_mask"][:, :-1] == 0, -100)
        losses = functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
        total[rows] = losses.double().sum(1).cpu().numpy()
    return total


@dataclass(frozen=True, eq=False)
class LatentCorrelations:
    """Correlation of each latent with a target, and how large the largest gets by chance.

    Latents that never vary are left out. All arrays but `null_max` are `[tested]`, the largest correlation in size
    first.

    Attributes:
        latent: number of the latent in the autoencoder.
        correlation: Pearson's r with the target. low, high: its 95 % interval by Fisher's z. Of a latent picked
            because its r is large, r and interval are too large: measure it again on other activations.
        p_value: of r alone, by Student's t; exact for a normal target, close for balanced labels.
        q_value: `p_value` after Benjamini-Hochberg over the latents tested.
        p_max: share of permutations of the target whose largest |r| over all latents reaches this one's: the
            chance that the best of so many gets there, whatever the distributions (Westfall & Young 1993).
        frequency: share of the activations on which the latent is active.
        null_max: the largest |r| of each permutation, `[permutation]`.
        n: activations.
    """

    latent: NDArray[np.int64]
    correlation: Floats
    low: Floats
    high: Floats
    p_value: Floats
    q_value: Floats
    p_max: Floats
    frequency: Floats
    null_max: Floats
    n: int

    def to_frame(self) -> pd.DataFrame:
        """Give a row a latent: latent, correlation, low, high, p_value, q_value, p_max, frequency."""
        names = ("latent", "correlation", "low", "high", "p_value", "q_value", "p_max", "frequency")
        return pd.DataFrame({name: getattr(self, name) for name in names})

    def plot(self, top: int = 10, title: str | None = None) -> "alt.LayerChart":
        """Draw the strongest latents in size; the reference line is what chance's best reaches in 1 of 20 cases."""
        from rim_core import charts

        frame = self.to_frame().head(top)
        sign = np.sign(frame["correlation"])
        ends = pd.DataFrame({"low": frame["low"] * sign, "high": frame["high"] * sign})
        frame = frame.assign(
            size=frame["correlation"].abs(), low=ends.min(axis=1), high=ends.max(axis=1)
        ).assign(
            latent=[f"{'+' if s > 0 else '-'} latent {i}" for s, i in zip(sign, frame["latent"], strict=True)]
        )
        limit = float(np.percentile(self.null_max, 95))
        return charts.intervals(
            frame,
            "size",
            label="latent",
            title=title or "Do the best latents beat the best of chance?",
            x_title=f"correlation with the target, size (n = {self.n})",
            description=(
                f"Size of the correlation of the {len(frame)} strongest of {len(self.latent)} latents, with sign "
                f"and 95 % interval; strongest {self.correlation[0]:.2f}. The largest of a permuted target "
                f"reaches {limit:.2f} in 1 of 20 permutations (the line)."
            ),
            reference=limit,
        )


@torch.no_grad()
def latent_correlations(
    sae: SparseAutoencoder,
    activations: "Tensor | ArrayLike",
    target: "Tensor | ArrayLike",
    groups: Sequence[object] | NDArray | None = None,
    n_permutations: int = 1000,
    seed: int = 0,
) -> LatentCorrelations:
    """Correlate every latent with a label or a projection, and judge the best against the best by chance.

    Paper C (figures 14 and 15) singles out one latent of thousands; here the target is permuted to see how large
    the largest correlation gets when there is none. Run it on `random_features` as well: a real direction in the
    activations shows through random features too.

    Args:
        sae: of any kind.
        activations: `[n, d]`, one a prompt: rows must be exchangeable.
        target: `[n]`, 0 and 1 or any numbers.
        groups: `[n]`; the target is then permuted within groups (categories, pairs), so that what differs
            between groups cannot pass for the target.
        n_permutations: of the target.
        seed: of the permutations.

    Raises:
        InputError: wrong shapes, numbers that are not finite, a target without spread, or no latent that varies.
    """
    data = _matrix(activations, "latent_correlations", rows=4)
    if hasattr(target, "detach"):
        target = target.detach().cpu()
    wanted = np.asarray(target, dtype=np.float64)
    n = len(data)
    if wanted.shape != (n,) or not np.isfinite(wanted).all() or wanted.min() == wanted.max():
        raise InputError(
            f"latent_correlations: the target must hold {n} finite numbers that are not all equal, one an "
            f"activation; it has shape {list(wanted.shape)}"
        )
    if n_permutations < 1:
        raise InputError(f"latent_correlations: n_permutations is {n_permutations}; ask for at least one")
    sae = sae.to(data.device)
    latents = torch.cat([sae.encode(part) for part in data.split(_ROWS)])
    tested = (latents.amin(0) < latents.amax(0)).nonzero()[:, 0]
    if not len(tested):
        raise InputError(
            "latent_correlations: no latent varies on these activations; train it on more like them"
        )
    latents = latents[:, tested]
    frequency = (latents > 0).double().mean(0).cpu().numpy()
    units = functional.normalize(latents - latents.mean(0), dim=0)
    codes = None if groups is None else stats.group_codes(groups, n, "latent_correlations")
    rng = stats.derive_generator(seed, "sae", "permutations")
    orders = [np.arange(n), *(_shuffled(codes, n, rng) for _ in range(n_permutations))]
    direction = wanted - wanted.mean()
    direction /= np.linalg.norm(direction)
    found = []
    for start in range(0, len(orders), 128):
        targets = torch.from_numpy(direction[np.stack(orders[start : start + 128])]).float().to(data.device)
        correlations = targets @ units
        if start == 0:
            r = correlations[0].double().clamp(-1, 1).cpu().numpy()
        found.append(correlations.abs().amax(1).double().cpu().numpy())
    null_max = np.concatenate(found)[1:]
    with np.errstate(divide="ignore"):
        t = r * np.sqrt((n - 2) / (1 - r**2))
        ends = np.tanh(
            np.arctanh(r)[:, None] + np.array([-1, 1]) * scipy.stats.norm.ppf(0.975) / np.sqrt(n - 3)
        )
    p = 2 * scipy.stats.t.sf(np.abs(t), n - 2)
    # Float32 rounding must not turn a tie, common with labels, into a win over chance.
    hits = n_permutations - np.searchsorted(np.sort(null_max), np.abs(r) - 1e-5)
    ranked = np.argsort(-np.abs(r), kind="stable")
    return LatentCorrelations(
        latent=tested.cpu().numpy()[ranked],
        correlation=r[ranked],
        low=ends[ranked, 0],
        high=ends[ranked, 1],
        p_value=p[ranked],
        q_value=stats.benjamini_hochberg(p)[ranked],
        p_max=((hits + 1) / (n_permutations + 1))[ranked],
        frequency=frequency[ranked],
        null_max=null_max,
        n=n,
    )


def _shuffled(codes: NDArray[np.int64] | None, n: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """A random order of n rows; with group codes, one that keeps every row in its group."""
    if codes is None:
        return rng.permutation(n)
    order = np.empty(n, dtype=np.int64)
    order[np.argsort(codes, kind="stable")] = np.lexsort((rng.random(n), codes))
    return order


@torch.no_grad()
def random_features(
    sae: SparseAutoencoder, activations: "Tensor | ArrayLike", seed: int = 0
) -> SparseAutoencoder:
    """The control paper C lacks: random directions, each active on as many activations as the latent it replaces.

    Args:
        sae: whose width, number of latents and frequencies are matched.
        activations: `[n, d]` on which they are matched.
        seed: of the directions.

    Returns:
        A "relu" autoencoder with unit decoder rows, the same directions as encoder, and biases set by the
        frequencies; `b_dec` is the activations' mean.
    """
    data = _matrix(activations, "random_features")
    sae = sae.to(data.device)
    counts = torch.zeros(sae.d_sae, dtype=torch.long, device=data.device)
    for part in data.split(_ROWS):
        counts += (sae.encode(part) > 0).sum(0)
    drawn = stats.derive_generator(seed, "sae", "random_features").standard_normal(
        (sae.d_sae, sae.d_in), dtype=np.float32
    )
    W_dec = functional.normalize(torch.from_numpy(drawn)).to(data.device)
    centred = data - data.mean(0)
    biases = []
    for directions, count in zip(W_dec.split(256), counts.split(256), strict=True):
        raw = (centred @ directions.T).sort(dim=0, descending=True).values
        # One more at each end, so that there is a middle for latents that are active never or always.
        raw = torch.cat([raw[:1] + 1e-3 * raw[:1].abs(), raw, raw[-1:] - 1e-3 * raw[-1:].abs()])
        biases.append(-(raw.gather(0, count[None]) + raw.gather(0, count[None] + 1))[0] / 2)
    metadata = {"random_features": {"seed": seed, "n": len(data)}}
    made = SparseAutoencoder(W_dec.T.contiguous(), torch.cat(biases), W_dec, data.mean(0), metadata=metadata)
    return made.to("cpu")


# --- splicing into a model ------------------------------------------------------------------------------------


@contextlib.contextmanager
def splice(
    model: Model,
    sae: SparseAutoencoder,
    layer: int,
    error_term: bool = True,
    site: str = "resid_post",
    latents: int | Sequence[int] | None = None,
    value: "float | Sequence[float]" = 0.0,
    positions: str | int | Sequence[int] = "all",
) -> Iterator[Model]:
    """Within the context the site's activation is the autoencoder's reconstruction, with chosen latents set.

    With the error term, what the reconstruction misses is added back (Marks et al. 2024, "Sparse Feature
    Circuits"): then only the chosen latents change anything, and without any nothing does.

    Args:
        model: a loaded model; holds for capture, generation and every measurement inside.
        sae: trained on this site of this layer.
        layer, site: where it goes. Heads are taken flat, `[n_heads * head_dim]`.
        error_term: add back what the reconstruction misses.
        latents: which to set to `value`, or None.
        value: one number, or one a latent; 0 switches them off.
        positions: where it holds: "all" (generated tokens too), "last" (of the prompt), or positions from the
            prompt's end.

    Raises:
        InputError: another width, a latent, layer or site that does not exist, or values that do not fit.
    """
    width = {"head_z": model.n_heads * model.head_dim, "mlp_neurons": model.d_mlp}.get(site, model.d_model)
    if sae.d_in != width:
        raise InputError(
            f"splice: the autoencoder has width {sae.d_in}, {site} of {model.name} has {width}: take the "
            "one trained there"
        )
    chosen = [] if latents is None else [latents] if isinstance(latents, int) else list(latents)
    if wrong := [i for i in chosen if not 0 <= i < sae.d_sae]:
        raise InputError(f"splice: latent {wrong[0]} is out of range: there are 0 to {sae.d_sae - 1}")
    values = torch.as_tensor(value, dtype=torch.float32)
    if values.ndim > 1 or (values.ndim == 1 and len(values) != len(chosen)):
        raise InputError(
            f"splice: {values.numel()} values for {len(chosen)} latents; give one, or one a latent"
        )
    sae, values = sae.to(model.device), values.to(model.device)
    index = torch.tensor(chosen, dtype=torch.long, device=model.device)

    def apply(x: Tensor, slots: Tensor) -> Tensor:
        found = sae.encode(x)
        # Decoding is linear: setting latents moves the activation along their rows.
        moved = (values - found[..., index]) @ sae.W_dec[index]
        new = ((x if error_term else sae.decode(found)) + moved).to(x.dtype)
        return torch.where(at(slots, positions)[..., None], new, x)

    at(torch.empty(0), positions)  # says now, not in the first pass, that positions are wrong
    with editing(model, [Edit(site, layer, apply, positional=positions != "all")]):
        yield model


# --- files ----------------------------------------------------------------------------------------------------


def save_sae(sae: SparseAutoencoder, folder: str | Path) -> Path:
    """Write a sparse autoencoder as SAELens 6 does: `cfg.json` and `sae_weights.safetensors`; all or nothing.

    Raises:
        InputError: the folder exists or cannot be written, or the metadata cannot be written as JSON.
    """
    folder = Path(folder)
    if folder.exists():
        raise InputError(f"{folder} exists: give save_sae a new folder, or remove that one")
    config = {
        "architecture": _ARCHITECTURES[sae.kind],
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": sae.apply_b_dec_to_input,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"sae_lens_version": _FORMAT, "sae_lens_training_version": None, **sae.metadata},
    }
    if sae.kind == "topk":
        config |= {"k": sae.k, "rescale_acts_by_decoder_norm": False}
    try:
        text = json.dumps(config, indent=2)
    except (TypeError, ValueError) as error:
        raise InputError(f"save_sae: the metadata cannot be written as JSON: {error}") from None
    working = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        working = Path(tempfile.mkdtemp(prefix=f".{folder.name[:16]}.", dir=folder.parent))
        save_file(
            {name: t.detach().float().cpu().contiguous() for name, t in sae.tensors().items()},
            working / WEIGHTS_FILE,
        )
        (working / CONFIG_FILE).write_text(text, encoding="utf-8")
        os.replace(working, folder)
    except OSError as error:
        raise InputError(f"cannot write {folder}: {error.strerror or error}") from None
    finally:
        if working is not None:
            shutil.rmtree(working, ignore_errors=True)
    return folder


def load_sae(folder: str | Path) -> SparseAutoencoder:
    """Read a sparse autoencoder that `save_sae` or SAELens 6 wrote; in float32 on the CPU.

    Architectures "standard", "topk" and "jumprelu" are read. A topk file whose latents are scaled by the decoder's
    norms is read with the norms folded in, which is the same function.

    Raises:
        InputError: files missing or damaged, an older format, or a setting that changes the function and is not
            supported; it names the setting.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        tensors = load_file(folder / WEIGHTS_FILE)
    except OSError:
        raise InputError(
            f"{folder} holds no sparse autoencoder: it needs {CONFIG_FILE} and {WEIGHTS_FILE}"
        ) from None
    except (ValueError, SafetensorError) as error:
        raise InputError(f"{folder} is damaged: {str(error).splitlines()[0]}") from None
    kind = _kind(folder, config)
    names = ["W_enc", "b_enc", "W_dec", "b_dec", *(["threshold"] if kind == "jumprelu" else [])]
    d_in, d_sae = config.get("d_in"), config.get("d_sae")
    shapes = [[d_in, d_sae], [d_sae], [d_sae, d_in], [d_in], [d_sae]]
    for name, shape in zip(names, shapes, strict=False):
        found = list(tensors[name].shape) if name in tensors else "nothing"
        if found != shape:
            raise InputError(f"{folder / WEIGHTS_FILE}: {name} should be {shape}, and there is {found}")
        if not tensors[name].isfinite().all():
            raise InputError(f"{folder / WEIGHTS_FILE}: {name} holds NaN or infinity: the file is damaged")
    W_enc, b_enc, W_dec, b_dec = (tensors[name].float() for name in names[:4])
    if kind == "topk" and config.get("rescale_acts_by_decoder_norm", False):
        norms = W_dec.norm(dim=1).clamp(min=1e-8)
        W_enc, b_enc, W_dec = W_enc * norms, b_enc * norms, W_dec / norms[:, None]
    threshold = tensors["threshold"].float() if kind == "jumprelu" else None
    return SparseAutoencoder(
        W_enc,
        b_enc,
        W_dec,
        b_dec,
        kind,
        config["k"] if kind == "topk" else None,
        threshold,
        bool(config.get("apply_b_dec_to_input", True)),
        config["metadata"],
    )


def _kind(folder: Path, config: Any) -> str:
    """The kind that a configuration describes, once everything that would change the function is ruled out."""
    where = folder / CONFIG_FILE
    metadata = config.get("metadata") if isinstance(config, dict) else None
    version = metadata.get("sae_lens_version") if isinstance(metadata, dict) else None
    if version is None or int(str(version).split(".")[0]) < 6:
        raise InputError(f"{where} is not SAELens 6's format: load it with SAELens 6 and save it again")
    kinds = {architecture: kind for kind, architecture in _ARCHITECTURES.items()}
    kind = kinds.get(config.get("architecture"))
    if kind is None:
        raise InputError(
            f"{where}: architecture {config.get('architecture')!r} is not supported; these are: {', '.join(kinds)}"
        )
    normalisation = config.get("normalize_activations", "none")
    if normalisation == "expected_average_only_in":
        raise InputError(
            f"{where}: activations were scaled by a factor that the file does not hold; fold it in with SAELens' "
            "fold_activation_norm_scaling_factor and save again"
        )
    for key, found in (
        ("normalize_activations", normalisation),
        ("reshape_activations", config.get("reshape_activations", "none")),
    ):
        if found != "none":
            raise InputError(f"{where}: {key} {found!r} is not supported, only 'none'")
    if kind == "topk" and not (
        isinstance(config.get("k"), int) and 1 <= config["k"] <= config.get("d_sae", 0)
    ):
        raise InputError(f"{where}: k is {config.get('k')!r}; a topk autoencoder needs 1 to d_sae")
    return kind
