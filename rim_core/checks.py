"""Identities that tools rest on, measured on each loaded model; a tool whose identity fails refuses.

| identity | what is compared | tools that need it |
|---|---|---|
| `residual_sum` | `resid_post` with `resid_pre + attn_out + mlp_out` | attribution by component |
| `lens` | `layout.readout(last resid_post)` with the logits | logit lens, attribution |
| `head_sum` | sum of the heads' outputs (plus bias) with `attn_out` | everything by head |
| `padding` | a prompt alone with the same prompt left-padded in a batch | every batched tool |

Errors are largest differences over the largest value compared, so they do not depend on the stream's scale.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rim_core.errors import IdentityError
from rim_core.sites import Layout, head_outputs, reading
from rim_core.tracing import encode, pad_left

# Two prompts of unequal length, so that the shorter one is padded.
PROBE_TEXTS = (
    "The capital of France is the city of",
    "Water boils at a lower temperature on a high mountain because",
)

TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 4e-2, torch.float16: 1e-2}
# LLM.int8 rounds activations too, and which columns it spares depends on the whole batch.
INT8_TOLERANCE = 5e-2


@dataclass(frozen=True)
class Check:
    """One identity: its measured relative error, and whether that is within the tolerance of the dtype."""

    identity: str
    error: float
    tolerance: float

    @property
    def holds(self) -> bool:
        """Whether the error is a number within the tolerance."""
        return self.error <= self.tolerance


def relative(found: Tensor, wanted: Tensor) -> float:
    """The largest difference over the largest value."""
    found, wanted = found.float(), wanted.float().to(found.device)
    return float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30))


def residual_error(found: Mapping[tuple[str, int], Tensor], layer: int) -> float:
    """How far `resid_post` of a layer is from what came in and what attention and MLP wrote."""
    attention, mlp = found["attn_out", layer], found["mlp_out", layer]
    # At a boundary between devices a layer's input is still on the device before.
    return relative(
        found["resid_pre", layer].to(attention.device) + attention + mlp, found["resid_post", layer]
    )


@torch.no_grad()
def measure(
    hf: Any, tokenizer: Any, layout: Layout, dtype: torch.dtype, quantization: str | None = None
) -> dict[str, Check]:
    """Measure every identity on two short prompts; takes two forward passes."""
    device = hf.get_input_embeddings().weight.device
    ids = encode(tokenizer, PROBE_TEXTS)
    short, pad = min(ids, key=len), tokenizer.pad_token_id or 0
    sites = ("resid_pre", "resid_post", "attn_out", "mlp_out", "head_z")
    with reading(layout, sites, lambda tensor: tensor.detach().clone()) as found:
        logits = hf(**pad_left([short], pad, device), use_cache=False).logits
    padded = hf(**pad_left(ids, pad, device), use_cache=False).logits[ids.index(short), -len(short) :]

    n_layers = len(layout.layers)
    residual = max(residual_error(found, i) for i in range(n_layers))
    heads = 0.0
    for i in range(n_layers):
        z = found["head_z", i].unflatten(-1, (layout.n_heads, layout.head_dim))
        total = head_outputs(layout, i, z).sum(-2) + layout.attention_out[i](
            torch.zeros_like(found["head_z", i])
        )
        heads = max(heads, relative(total, found["attn_out", i]))
    lens = layout.readout(found["resid_post", n_layers - 1])
    errors = {
        "residual_sum": residual,
        "lens": relative(lens, logits),
        "head_sum": heads,
        "padding": relative(padded, logits[0]),
    }
    tolerance = INT8_TOLERANCE if quantization == "int8" else TOLERANCES[dtype]
    return {name: Check(name, error, tolerance) for name, error in errors.items()}


@torch.no_grad()
def probe(hf: Any, tokenizer: Any) -> Tensor:
    """Logits `[2, width, vocab]` on two short texts, by which models are told apart."""
    device = hf.get_input_embeddings().weight.device
    inputs = pad_left(encode(tokenizer, PROBE_TEXTS), tokenizer.pad_token_id or 0, device)
    return hf(**inputs, use_cache=False).logits


def require(checks: Mapping[str, Check], name: str, tool: str, identities: tuple[str, ...]) -> None:
    """Refuse to go on unless the identities hold.

    Raises:
        IdentityError: names the tool, the model, the identity, the measured error and what to do.
    """
    for identity in identities:
        check = checks[identity]
        if not check.holds:
            raise IdentityError(
                f"{tool} cannot be trusted on {name}: the identity {identity!r} is off by {check.error:.1e} "
                f"(at most {check.tolerance:.0e} is allowed); use a tool that does not need it, or a model of another "
                "family"
            )
