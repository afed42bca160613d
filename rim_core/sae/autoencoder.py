"""Sparse autoencoders, and how one is spliced into a model.

A sparse autoencoder writes an activation as a sum of few dictionary directions. `training` makes one, `files` keeps
it, `judging` judges it beside controls.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from rim_core import checking
from rim_core.errors import InputError
from rim_core.models.hooks import edit_at, editing
from rim_core.models.model import Model

KINDS = ("relu", "topk", "jumprelu")
# Rows encoded at a time: 2,048 rows of 10,000 latents are 80 MB.
ROWS = 2048


@dataclass(frozen=True, eq=False)
class SparseAutoencoder:
    """`x ~ b_dec + f W_dec`, with few latents `f = activation((x - b_dec) W_enc + b_enc)` above zero.

    Attributes:
        W_enc: `[d_in, d_sae]`.
        b_enc: `[d_sae]`.
        W_dec: `[d_sae, d_in]`, the dictionary; rows have norm 1 where `train_sae` made it.
        b_dec: `[d_in]`.
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
        checking.one_of(self.kind, KINDS, "kind of sparse autoencoder")
        if self.kind == "topk" and not (isinstance(self.k, int) and 1 <= self.k <= self.d_sae):
            raise InputError(f"a topk autoencoder needs k, from 1 to its {self.d_sae} latents: k is {self.k!r}")
        if self.kind == "jumprelu" and self.threshold is None:
            raise InputError("a jumprelu autoencoder needs a threshold for each latent: give it")

    d_in = property(lambda self: self.W_enc.shape[0], doc="Width of the activations.")
    d_sae = property(lambda self: self.W_enc.shape[1], doc="Number of latents.")

    def encode(self, x: Tensor) -> Tensor:
        """Latents `[..., d_sae]`, none below 0, of activations `[..., d_in]`; in float32."""
        if x.shape[-1] != self.d_in:
            raise InputError(f"activations of width {x.shape[-1]} do not fit a sparse autoencoder of width {self.d_in}")
        x = x.float()
        raw = (x - self.b_dec if self.apply_b_dec_to_input else x) @ self.W_enc + self.b_enc
        if self.kind == "topk":
            assert self.k is not None
            values, indices = raw.topk(self.k, dim=-1, sorted=False)
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


def checked_rows(activations: "Tensor | ArrayLike", caller: str, at_least: int = 2) -> Tensor:
    """Activations `[n, d]` in float32, without gradient, on the device they are on; InputError for anything else."""
    data = torch.as_tensor(activations).detach().float()
    if data.ndim != 2 or len(data) < at_least:
        raise InputError(
            f"{caller}: activations have shape {list(data.shape)}; give [n, d] with n of at least {at_least}, "
            "such as capture(...)['resid_post'][:, layer]"
        )
    if not data.isfinite().all():
        raise InputError(f"{caller}: activations hold NaN or infinity; find out why before going on")
    return data


@contextlib.contextmanager
def splice(
    model: Model,
    sae: SparseAutoencoder,
    layer: int,
    *,
    error_term: bool = True,
    site: str = "resid_post",
    latents: int | Sequence[int] = (),
    value: float | Sequence[float] = 0.0,
    positions: str | int | Sequence[int] = "all",
) -> Iterator[Model]:
    """Within the context the site's activation is the autoencoder's reconstruction, with chosen latents set.

    With the error term, what the reconstruction misses is added back (Marks et al. 2024, "Sparse Feature
    Circuits"): then only the chosen latents change anything, and without any nothing does.

    Args:
        model: a loaded model; holds for capture, generation and every measurement inside.
        sae: trained on this site of this layer.
        layer: where it goes.
        error_term: add back what the reconstruction misses.
        site: which activation of the layer. Heads are taken flat, `[n_heads * head_dim]`.
        latents: which to set to `value`.
        value: one number, or one a latent; 0 switches them off.
        positions: where it holds: "all" (generated tokens too), "last" (of the prompt), or positions from the
            prompt's end.

    Raises:
        InputError: another width, a latent, layer or site that does not exist, or values that do not fit.

    Example:
        >>> x = rim.capture(model, texts, "resid_post")["resid_post"][:, 1]
        >>> sae = rim.train_sae(x, steps=5, progress=False)
        >>> with rim.splice(model, sae, 1, latents=[3, 4], value=0):  # switched off
        ...     answers = rim.generate(model, texts, max_new_tokens=4)
    """
    width = {"head_z": model.n_heads * model.head_dim, "mlp_neurons": model.d_mlp}.get(site, model.d_model)
    if sae.d_in != width:
        raise InputError(
            f"splice: the autoencoder has width {sae.d_in}, {site} of {model.name} has {width}: take the "
            "one trained there"
        )
    chosen = [latents] if isinstance(latents, int) else list(latents)
    if wrong := [i for i in chosen if not 0 <= i < sae.d_sae]:
        raise InputError(f"splice: latent {wrong[0]} is out of range: there are 0 to {sae.d_sae - 1}")
    values = torch.as_tensor(value, dtype=torch.float32)
    if values.ndim > 1 or (values.ndim == 1 and len(values) != len(chosen)):
        raise InputError(f"splice: {values.numel()} values for {len(chosen)} latents; give one, or one a latent")
    index = torch.tensor(chosen, dtype=torch.long)
    # Where the layer is, which the first pass shows: another layer's device may be another.
    placed: dict[torch.device, tuple[SparseAutoencoder, Tensor, Tensor]] = {}

    def change(x: Tensor) -> Tensor:
        if x.device not in placed:
            placed[x.device] = sae.to(x.device), values.to(x.device), index.to(x.device)
        own, wanted, at = placed[x.device]
        found = own.encode(x)
        # Decoding is linear: setting latents moves the activation along their rows.
        moved = (wanted - found[..., at]) @ own.W_dec[at]
        return ((x if error_term else own.decode(found)) + moved).to(x.dtype)

    with editing(model, [edit_at(positions, site, layer, change)]):
        yield model
