"""What heads and modules add to the residual stream, where a family puts a norm between them and it.

Llama adds what attention and MLP give as it is. Gemma-2 and -3, OLMo-2 and GLM-4 add a norm of it, and Granite a
multiple. A norm is linear once its scale is held at the value that it has for the whole output, so that each head's
part of the output has its share of what is added: `multiplier * scale * norm.linear(part)`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rim_core.errors import IdentityError
from rim_core.models.checks import tolerance
from rim_core.models.layout import head_outputs
from rim_core.models.model import Model
from rim_core.models.norms import Norm, frozen_scale, parts


@dataclass(frozen=True, eq=False)
class Way:
    """The way of one layer's `attn_out` or `mlp_out` into the stream.

    Attributes:
        norm: the parts of the norm between, None where there is none.
        multiplier: what comes after it.
    """

    norm: Norm | None
    multiplier: float

    @property
    def plain(self) -> bool:
        """Whether the output is added as it is."""
        return self.norm is None and self.multiplier == 1

    def back(self, w: Tensor) -> Tensor:
        """What direction `w` `[..., d_model]` of the stream is in the output, but for the norm's scale."""
        if self.norm is not None:
            w = self.norm.transposed(w)
        return w if self.multiplier == 1 else w * self.multiplier

    def bias(self, w: Tensor) -> Tensor | float:
        """The norm's own part along `w` `[..., d_model]`, the same for all texts, `[...]`."""
        return 0.0 if self.norm is None else self.multiplier * (w @ self.norm.bias)


def way(model: Model, site: str, layer: int) -> Way:
    """The way of `attn_out` or `mlp_out` of a layer into the stream; its norm's parts are found by running it."""
    module = model.layout.norm_after(site, layer)
    norm = None if module is None else parts(module, model.d_model, model.device, model.dtype)
    return Way(norm, model.layout.residual_multiplier)


def held(model: Model, passage: Way, site: str, layer: int, output: Tensor, tool: str) -> Tensor:
    """The scale `[...]` at which the norm on the way is held, for captured outputs `[..., d_model]`; 1 without one.

    Raises:
        IdentityError: it is neither LayerNorm nor RMSNorm.
    """
    module = model.layout.norm_after(site, layer)
    if passage.norm is None or module is None:
        return torch.ones(output.shape[:-1])
    writer = {"attn_out": "attention's", "mlp_out": "MLP's"}[site]
    return held_scale(model, passage.norm, module, output, tool, f"norm after the {writer} output in layer {layer}")


def held_scale(model: Model, norm: Norm, module: nn.Module, h: Tensor, tool: str, what: str) -> Tensor:
    """The factor `[...]` by which a norm of the model multiplies `norm.linear(h)` for each `h` `[..., d_model]`.

    Raises:
        IdentityError: one factor does not explain what the norm, called `what`, does to `h`.
    """
    scale, error = frozen_scale(norm, h, module(h.to(model.device, model.dtype)).float().cpu())
    if not error <= tolerance(model.dtype):
        raise IdentityError(
            f"{tool} cannot be trusted on {model.name}: its {what} ({type(module).__name__}) is "
            f"neither LayerNorm nor RMSNorm (off by {error:.1e}); use logit_lens, or patch"
        )
    return scale


def added(model: Model, site: str, layer: int, output: Tensor) -> Tensor:
    """What the layer adds to the stream, given captured `attn_out` or `mlp_out` `[..., d_model]`; float32, CPU."""
    layout = model.layout
    if layout.norm_after(site, layer) is None and layout.residual_multiplier == 1:
        return output
    return layout.added(site, layer, output.to(model.device, model.dtype)).float().cpu()


@torch.no_grad()
def head_writes(model: Model, layer: int, z: Tensor, attn_out: Tensor) -> Tensor:
    """What each head adds to the residual stream, float32 `[..., head, d_model]` on the CPU.

    Through the norm that some families put on the attention's output, at the scale that it has for the whole
    output, and without any bias. Where there is no norm these are `sites.head_outputs`.

    Args:
        model: a loaded model; the adapter now active applies.
        layer: from 0.
        z: the layer's `head_z` as captured, `[..., head, head_dim]`.
        attn_out: its output there, `[..., d_model]`.

    Raises:
        IdentityError: the attention's output is not the sum of its heads', or its norm is of another kind.

    Example:
        >>> acts = rim.capture(model, texts, ["head_z", "attn_out"])
        >>> written = rim.writes.head_writes(model, 1, acts["head_z"][:, 1], acts["attn_out"][:, 1])
        >>> written.shape == (len(texts), model.n_heads, model.d_model)
        True
    """
    tool = "head_writes"
    model.require(tool, "residual_sum", "head_sum")
    written = head_outputs(model.layout, layer, z.to(model.device, model.dtype)).float().cpu()
    passage = way(model, "attn_out", layer)
    if passage.plain:
        return written
    if passage.norm is not None:
        scale = held(model, passage, "attn_out", layer, attn_out, tool)
        written = passage.norm.linear(written) * scale[..., None, None]
    return written * passage.multiplier
