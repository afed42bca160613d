"""The model's last steps as a linear map: the direction that separates two tokens, and the final norm held still."""

from dataclasses import dataclass

import torch
from torch import Tensor

from rim_core.checks import TOLERANCES
from rim_core.errors import IdentityError
from rim_core.loading import Model
from rim_core.sites import pull_back
from rim_core.vocabulary import Tokens, two_sides


@torch.no_grad()
def unembedding_direction(model: Model, toward: Tokens, against: Tokens) -> Tensor:
    """The direction before the final norm's output is unembedded that raises one token's logit over another's.

    Mean of the `toward` rows of the language-model head minus that of the `against` rows, times the logit
    scale: float32 `[d_model]` on the CPU.

    Args:
        model: a loaded model; the adapter now active applies.
        toward, against: token strings or ids, one or several, as in `logit_lens`.

    Raises:
        InputError: tokens as in `logit_lens`, or one token on both sides.
    """
    sides = [ids for _, ids in two_sides(model, toward, against)]
    # Zeros and ones are exact in every dtype; fractions would not be.
    chosen = torch.zeros(2, model.layout.d_vocab, device=model.device, dtype=model.dtype)
    for row, ids in enumerate(sides):
        chosen[row, list(ids)] = 1
    sums = pull_back(model.layout.lm_head, chosen).float().cpu()
    return model.layout.logit_scale * (sums[0] / len(sides[0]) - sums[1] / len(sides[1]))


@dataclass(frozen=True, eq=False)
class FinalNorm:
    """The final norm, LayerNorm or RMSNorm: `scale(h) * linear(h) + bias`, where only the scale depends on the text.

    Attributes:
        gain, bias: `[d_model]`, the gain up to a factor. centred: whether the mean is taken away first.
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


def final_norm(model: Model) -> FinalNorm:
    """Find the final norm's parts by running it.

    On zeros a norm of either kind gives its bias, and so does LayerNorm on equal values; on values of mean zero and
    equal size both give gain and bias.
    """
    ones = torch.ones(model.d_model, device=model.device, dtype=model.dtype)
    signs = ones.clone()
    signs[1::2] = -1
    bias, level, gain = (model.layout.final_norm(x[None]).float().cpu()[0] for x in (0 * ones, ones, signs))
    gain = gain - bias
    centred = bool((level - bias).abs().max() < 1e-2 * gain.abs().max())
    return FinalNorm(gain * signs.float().cpu(), bias, centred)


def norm_scale(model: Model, norm: FinalNorm, h: Tensor, tool: str) -> Tensor:
    """The factor `[prompt]` by which the final norm multiplies `norm.linear(h)` for each `h` `[prompt, d_model]`.

    Raises:
        IdentityError: one factor does not explain what the norm does to `h`.
    """
    normed = model.layout.final_norm(h.to(model.device, model.dtype)).float().cpu() - norm.bias
    linear = norm.linear(h)
    scale = (normed * linear).sum(dim=-1) / (linear**2).sum(dim=-1)
    error = float((scale[:, None] * linear - normed).abs().max() / normed.abs().max())
    if not error <= TOLERANCES[model.dtype]:
        raise IdentityError(
            f"{tool} cannot be trusted on {model.name}: its final norm ({type(model.layout.final_norm).__name__}) is "
            f"neither LayerNorm nor RMSNorm (off by {error:.1e}); use logit_lens, or patch"
        )
    return scale
