"""Passes of few tokens on the CPU, as decoding makes them by the hundred: the same numbers up to rounding, sooner.

Left to itself each such pass unpacks 4-bit weights anew, and each product lays its weights out anew in the order in
which the processor reads them: for a few dozen tokens that costs as much as the product. Here oneDNN lays them out once
for a call, together with what a LoRA adds. Attention from one query to many keys is two batched products; PyTorch's
fused kernel, made for many queries, takes longer. Large passes run as they always do.
"""

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

# Tokens of a pass up to which laid-out weights are faster, and for how many the layout is chosen.
_FEW, _TYPICAL = 256, 64
# Weights of a module below which it is not worth it, such as an adapter's.
_SMALL = 2**16
_ATTENTION = "one_query"


@contextlib.contextmanager
def laid_out(hf: Any) -> Iterator[None]:
    """Within the context float32 and 4-bit linear modules on the CPU hold their weights laid out for small passes.

    Only where these take at most a quarter of the free memory. Elsewhere, and in modules whose forward someone has
    wrapped, nothing changes. Laying them out costs about as much as three passes.

    Args:
        hf: the Hugging Face model, with the adapter that is to be run.
    """
    modules: list[Any] = []
    if torch.backends.mkldnn.is_available():
        adapted = [module for module in hf.modules() if _lora(module) and _may_be_held(module.base_layer)]
        inside = {id(module.base_layer) for module in adapted}
        modules = adapted + [module for module in hf.modules() if id(module) not in inside and _may_be_held(module)]
    size = sum(4 * module.in_features * module.out_features for module in modules)
    if size > psutil.virtual_memory().available / 4:
        modules = []
    try:
        for module in modules:
            weight = torch.ops.mkldnn._reorder_linear_weight(_weight(module), _TYPICAL)
            module.forward = partial(_product, module, weight)
        yield
    finally:
        for module in modules:
            module.__dict__.pop("forward", None)


@contextlib.contextmanager
def one_query(hf: Any) -> Iterator[None]:
    """Within the context a model on the CPU that attends by "sdpa" does so by plain products where there is one query.

    Args:
        hf: the Hugging Face model.
    """
    attention = hf.config._attn_implementation
    try:
        if attention == "sdpa" and hf.get_input_embeddings().weight.device.type == "cpu":
            hf.set_attn_implementation(_ATTENTION)
        yield
    finally:
        if hf.config._attn_implementation != attention:
            hf.set_attn_implementation(attention)


def _may_be_held(module: Any) -> bool:
    if "forward" in module.__dict__ or getattr(module, "in_features", 0) * getattr(module, "out_features", 0) < _SMALL:
        return False
    if type(module) is nn.Linear:
        return module.weight.device.type == "cpu" and module.weight.dtype == torch.float32
    state = getattr(getattr(module, "weight", None), "quant_state", None)
    return (
        hasattr(module, "support_avx512bf16_for_cpu")
        and state is not None
        and module.weight.device.type == "cpu"
        and not getattr(state, "packing_format_for_cpu", False)
        and module.compute_dtype == state.dtype == torch.float32
    )


def _lora(module: Any) -> str | None:
    """The name of the LoRA, where a module adds the product of two matrices to a linear one, and nothing else."""
    if not hasattr(module, "lora_A") or not hasattr(module, "get_delta_weight") or "forward" in module.__dict__:
        return None
    active = [name for name in module.active_adapters if name in module.lora_A]
    if len(active) != 1 or module.training or module.merged or module.disable_adapters or module.lora_variant:
        return None
    into, out = module.lora_A[active[0]], module.lora_B[active[0]]
    return active[0] if type(into) is nn.Linear and out.bias is None and out.weight.dtype == torch.float32 else None


def _weight(module: Any) -> Tensor:
    if name := _lora(module):
        return _weight(module.base_layer) + module.get_delta_weight(name).detach()
    if type(module) is nn.Linear:
        return module.weight.detach()
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(module.weight.data, module.weight.quant_state)


def _product(module: Any, weight: Tensor, x: Tensor) -> Tensor:
    if x.numel() > _FEW * x.shape[-1]:
        return type(module).forward(module, x)
    return torch.ops.mkldnn._linear_pointwise(x.float(), weight, module.bias, "none", [], "").to(x.dtype)


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """As transformers' "sdpa": from `query` `[batch, head, slot, width]` to all keys, `[batch, slot, head, width]`."""
    # What else "sdpa" looks at.
    other = any(options.get(name) is not None for name in ("position_bias", "softcap", "cache"))
    if query.shape[2] > 1 or other or options.get("dropout"):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    n, heads, _, width = query.shape
    by_key_head = query.reshape(n * key.shape[1], -1, width) * (options.get("scaling") or width**-0.5)
    scores = torch.bmm(by_key_head, key.flatten(0, 1).transpose(1, 2)).view(n, heads, 1, -1)
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, -torch.inf)
    elif attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(dim=-1).view(n * key.shape[1], -1, key.shape[2])
    return torch.bmm(weights, value.flatten(0, 1)).view(n, 1, heads, -1), None


AttentionInterface.register(_ATTENTION, _attend)
AttentionMaskInterface.register(_ATTENTION, sdpa_mask)
