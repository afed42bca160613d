"""Norms as linear maps: what LayerNorm or RMSNorm does once its scale is held at the value it has for an input.

No weight is read: families differ in how they store the gain (Gemma's is one more than its weight), and in all of
them it is what the module does to a vector of equal sizes.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Norm:
    """LayerNorm or RMSNorm: `scale(h) * linear(h) + bias`, where only the scale depends on the text.

    Attributes:
        gain, bias: `[d_model]`, the gain up to a factor.
        centred: whether the mean is taken away first.
    """

    gain: Tensor
    bias: Tensor
    centred: bool

    def linear(self, h: Tensor) -> Tensor:
        """`h` `[..., d_model]` without its mean where the norm takes it away, times the gain."""
        return self.gain * self._centre(h)

    def transposed(self, w: Tensor) -> Tensor:
        """What direction `w` `[..., d_model]` after the norm is before it: `w . linear(h) = transposed(w) . h`."""
        return self._centre(self.gain * w)

    def _centre(self, values: Tensor) -> Tensor:
        return values - values.mean(dim=-1, keepdim=True) if self.centred else values


def parts(module: nn.Module, width: int, device: Any, dtype: torch.dtype) -> Norm:
    """Find a norm's parts by running it, float32 on the CPU.

    On zeros a norm of either kind gives its bias, and so does LayerNorm on equal values; on values of mean zero and
    equal size both give gain and bias.
    """
    ones = torch.ones(width, device=device, dtype=dtype)
    signs = ones.clone()
    signs[1::2] = -1
    bias, level, gain = (module(x[None]).float().cpu()[0] for x in (0 * ones, ones, signs))
    gain = gain - bias
    centred = bool((level - bias).abs().max() < 1e-2 * gain.abs().max())
    return Norm(gain * signs.float().cpu(), bias, centred)


def frozen_scale(norm: Norm, h: Tensor, normed: Tensor) -> tuple[Tensor, float]:
    """The factor `[...]` by which the norm multiplies `norm.linear(h)`, and how far one factor explains `normed`.

    Args:
        norm: the parts of the module.
        h: what it was given, `[..., d_model]`.
        normed: what it gave, float32 on the CPU as `h`. Of an `h` of zeros the factor is 0.

    The error is the largest difference of `scale * linear(h) + bias` from `normed` over the largest value.
    """
    normed = normed - norm.bias
    linear = norm.linear(h)
    size = (linear**2).sum(dim=-1)
    scale = (normed * linear).sum(dim=-1) / size
    scale = torch.where(size > 0, scale, 0.0)
    largest = normed.abs().max().clamp(min=1e-30)
    return scale, float((scale[..., None] * linear - normed).abs().max() / largest)
