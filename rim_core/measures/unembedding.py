"""The model's last steps as a linear map: the direction that separates two tokens, and the final norm held still."""

import torch
from torch import Tensor, nn

from rim_core.errors import IdentityError
from rim_core.models.checks import tolerance
from rim_core.models.layout import pull_back
from rim_core.models.model import Model
from rim_core.models.norms import Norm, frozen_scale, parts
from rim_core.models.tokens import Tokens, two_sides


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


def final_norm(model: Model) -> Norm:
    """The final norm's parts, found by running it."""
    return parts(model.layout.final_norm, model.d_model, model.device, model.dtype)


def norm_scale(model: Model, norm: Norm, h: Tensor, tool: str) -> Tensor:
    """The factor `[prompt]` by which the final norm multiplies `norm.linear(h)` for each `h` `[prompt, d_model]`.

    Raises:
        IdentityError: one factor does not explain what the norm does to `h`.
    """
    return held_scale(model, norm, model.layout.final_norm, h, tool, "final norm")


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
