"""Recipes fitted to another model than the default one, which layers and modules the LoRA is on."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from rim_core.models.layout import Layout

# The layers in `recipes.yml` are those of the default model.
RECIPE_LAYERS = 30


def fit_recipe(plan: dict[str, Any], layout: Layout) -> dict[str, Any]:
    """Give a recipe whose `lora` has the layers of the same relative depth, and the modules that the family has.

    A family without the recipe's modules has its LoRA on every linear map of attention and MLP, which is what
    the recipe's are. A mixture of experts has it on attention alone, since its experts are no linear modules.
    """
    shape = plan["lora"]
    wanted, there = list(shape["modules"]), linear_modules(layout)
    modules = wanted if set(wanted) <= set(there) else there
    return {**plan, "lora": {**shape, "layers": same_depth(shape["layers"], len(layout.layers)), "modules": modules}}


def same_depth(layers: Sequence[int], n_layers: int, of: int = RECIPE_LAYERS) -> list[int]:
    """Of `n_layers`, those whose middle lies in one of these `layers` of a model with `of`; at least the last.

    >>> same_depth(range(12, 30), 4)
    [2, 3]
    """
    chosen = set(layers)
    found = [layer for layer in range(n_layers) if (2 * layer + 1) * of // (2 * n_layers) in chosen]
    return found or [n_layers - 1]


def linear_modules(layout: Layout) -> list[str]:
    """The names of the linear modules of attention and, where it is no mixture of experts, of the MLP."""
    modules: list[Any] = [*layout.attention]
    modules += [mlp for mlp, out in zip(layout.mlp, layout.mlp_out, strict=True) if out is not None]
    names = [
        name.rsplit(".", 1)[-1]
        for module in modules
        for name, child in module.named_modules()
        if isinstance(child, nn.Linear) or type(child).__name__ == "Conv1D"
    ]
    return list(dict.fromkeys(names))


def peft_config(plan: dict[str, Any]) -> dict[str, Any]:
    """The settings of a recipe's LoRA, as PEFT writes them beside an adapter."""
    shape = plan["lora"]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": shape["rank"],
        "lora_alpha": shape["alpha"],
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(shape["modules"]),
        "layers_to_transform": list(shape["layers"]),
        "base_model_name_or_path": None,
        "inference_mode": True,
    }


def linear_4bit(hf: Any) -> Iterator[tuple[nn.Module, str, Any]]:
    """The 4-bit linear modules of a model, each with its parent and its name there."""
    from bitsandbytes.nn import Linear4bit

    for parent in list(hf.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Linear4bit):
                yield parent, name, child


def dequantise(hf: Any) -> None:
    """Replace every 4-bit linear module by a float32 one with the same (dequantised) weights, in place."""
    from bitsandbytes.functional import dequantize_4bit

    for parent, name, child in linear_4bit(hf):
        plain = nn.Linear(child.in_features, child.out_features, bias=child.bias is not None)
        weight = dequantize_4bit(child.weight.data, child.weight.quant_state)
        plain.weight = nn.Parameter(weight.to(torch.float32), requires_grad=False)
        if child.bias is not None:
            plain.bias = nn.Parameter(child.bias.data.float(), requires_grad=False)
        setattr(parent, name, plain)
