"""Training sparse autoencoders on activations."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torch.nn.functional import normalize

from rim_core import checking, stats
from rim_core.errors import InputError
from rim_core.sae.autoencoder import ROWS, SparseAutoencoder, checked_rows


def train_sae(
    activations: "Tensor | ArrayLike",
    *,
    n_latents: int | None = None,
    kind: str = "relu",
    l1: float = 0.05,
    k: int = 32,
    steps: int = 500,
    batch: int = 256,
    lr: float = 2e-3,
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

    Training is on activations scaled so that their mean distance from their mean is 1: `l1` and `lr` mean the same
    at every layer. The scale is folded into the weights, so that the result takes activations as they are, and kept
    in `metadata["activation_scale"]`; divide by it an `l1` meant for activations as they are.

    Args:
        activations: `[n, d]`. A first token with a norm far above the rest is better left out.
        n_latents: latents, by default 4 d. Paper C's "expansion factor k = 23", read as a multiple of d, is 23 d.
        kind: "relu" or "topk".
        l1: weight of the sparsity penalty. Paper C states 0.05 and no unit.
        k: latents active at once, for "topk".
        steps: optimiser steps.
        batch: activations a step.
        lr: Adam's step size.
        resample: how many times dead latents are looked for and resampled, evenly over the first three quarters.
        seed: of the starting directions, the order of the activations and the resampling.
        metadata: kept with the result, such as `{"hook_name": "blocks.20.hook_resid_post"}`.
        progress: show a progress bar.

    Raises:
        InputError: activations that are not `[n, d]`, not finite or all equal, or settings out of range.

    Example:
        >>> acts = rim.capture(model, texts, "resid_post", positions=[-3, -2, -1])["resid_post"]
        >>> sae = rim.train_sae(acts[:, :, 1].flatten(0, 1), n_latents=64, steps=20, progress=False)
        >>> sae.d_sae, sae.encode(acts[:, -1, 1]).shape
        (64, torch.Size([4, 64]))
    """
    data = checked_rows(activations, "train_sae")
    n, d = data.shape
    m = 4 * d if n_latents is None else n_latents
    checking.one_of(kind, ("relu", "topk"), "kind of train_sae")
    whole = {"n_latents": (m, 1), "steps": (steps, 1), "batch": (batch, 1), "resample": (resample, 0)}
    m, steps, batch, resample = (
        checking.whole(value, f"train_sae: {name}", low) for name, (value, low) in whole.items()
    )
    l1, lr = checking.number(l1, "train_sae: l1", 0), checking.number(lr, "train_sae: lr", above=0)
    centre = data.mean(0)
    scale = float((data - centre).norm(dim=1).mean())
    if scale <= 1e-6 * float(centre.norm()):
        raise InputError(f"train_sae: all {n} activations are equal; there is nothing to learn")
    directions = stats.derive_generator(seed, "sae", "directions").standard_normal((m, d))
    W_dec = normalize(torch.from_numpy(directions).float()).to(data.device)
    b_enc = torch.zeros(m, device=data.device)
    sparsity: dict[str, Any] = {"l1": l1} if kind == "relu" else {"k": k}
    sae = SparseAutoencoder(W_dec.T.clone(), b_enc, W_dec, centre / scale, kind, sparsity.get("k"))
    rng = stats.derive_generator(seed, "sae", "order")
    _fit(sae, data / scale, sparsity.get("l1", 0.0), steps, batch, lr, resample, rng, progress)
    settings = {"steps": steps, "batch": batch, "lr": lr, "resample": resample, "seed": seed, "n": n}
    # Both kinds are homogeneous: scaling input, biases and latents alike leaves W_enc and W_dec as they are.
    folded: dict[str, Any] = {
        name: tensor.detach().cpu() * (scale if name in ("b_enc", "b_dec") else 1.0)
        for name, tensor in sae.tensors().items()
    }
    known = {**(metadata or {}), "activation_scale": scale, "training": {**sparsity, **settings}}
    return replace(sae, **folded, metadata=known)


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
    fired = torch.zeros(sae.d_sae, dtype=torch.bool, device=data.device)
    drawn = _minibatches(data, batch, rng)
    bar = tqdm(range(1, steps + 1), desc=f"training {sae.d_sae} latents", unit="step", disable=not progress)
    for step in bar:
        x = next(drawn)
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
            sae.W_dec.copy_(normalize(sae.W_dec))
            fired |= (latents > 0).any(0)
            if step in checks:
                _resample(sae, data, ~fired, optimizer, rng)
                fired.zero_()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}")


def _minibatches(data: Tensor, batch: int, rng: np.random.Generator) -> Iterator[Tensor]:
    """Rows in random order without end, each as often as the others."""
    order = np.empty(0, dtype=np.int64)
    while True:
        while len(order) < batch:
            order = np.concatenate([order, rng.permutation(len(data))])
        yield data[torch.from_numpy(order[:batch]).to(data.device)]
        order = order[batch:]


def _resample(
    sae: SparseAutoencoder, data: Tensor, dead: Tensor, optimizer: torch.optim.Optimizer, rng: np.random.Generator
) -> None:
    """Point dead latents at activations that are badly reconstructed; forget the optimiser's state for them."""
    count = int(dead.sum())
    if not count:
        return
    rows = torch.from_numpy(rng.choice(len(data), min(len(data), 4 * ROWS), replace=False)).to(data.device)
    sample = data[rows]
    missed = sample - torch.cat([sae(part) for part in sample.split(ROWS)])
    loss = missed.square().sum(1).double().cpu().numpy()
    if loss.sum() == 0:
        return
    drawn = torch.from_numpy(rng.choice(len(rows), count, p=loss**2 / (loss**2).sum())).to(data.device)
    new = normalize(missed[drawn])
    sae.W_dec[dead] = new
    alive = sae.W_enc[:, ~dead].norm(dim=0).mean() if not dead.all() else 1.0
    # Bricken et al.'s 0.2 keeps a new latent quiet; among the k largest a quiet one would never be heard.
    sae.W_enc[:, dead] = (0.2 if sae.kind == "relu" else 1.0) * alive * new.T
    sae.b_enc[dead] = 0.0
    for weight, index in ((sae.W_dec, (dead,)), (sae.W_enc, (slice(None), dead)), (sae.b_enc, (dead,))):
        for moment in ("exp_avg", "exp_avg_sq"):
            optimizer.state[weight][moment][index] = 0.0
