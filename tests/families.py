"""Tiny random models of thirteen families, and where each keeps its modules, written out by hand.

Any test may call `load_tiny(family, quantization)`: each model is written and loaded once a session, so a test must
leave it as it found it. `reference` reads every site with hooks of its own, by the paths in `MODULES`.
"""

import tempfile
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tiny import tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

import rim_core as rim
from rim_core.models.layout import SITES
from rim_core.models.model import Model

SIZES = {"num_hidden_layers": 3, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 400}
GQA = {"num_key_value_heads": 2, "intermediate_size": 64}
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
# Windows of 6 tokens and soft caps of a few units change the numbers of short prompts.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": GQA,
    "qwen2": {**GQA, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    # Here heads times head_dim is not the width of the stream.
    "qwen3": {**GQA, "head_dim": 16},
    "mistral": {**GQA, "sliding_window": 6},
    "gemma2": {
        **GQA,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": 6,
        "layer_types": MIXED,
        "final_logit_softcapping": 8.0,
        "attn_logit_softcapping": 2.0,
    },
    "gemma3_text": {**GQA, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 6, "layer_types": MIXED},
    "phi3": {**GQA, "sliding_window": 6},
    "gpt2": {},
    "gpt_neox": {"intermediate_size": 64},
    "olmo2": GQA,
    "falcon": {},
    "cohere2": {**GQA, "sliding_window": 6, "layer_types": MIXED, "logit_scale": 0.25},
    "qwen3_moe": {**GQA, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
}


class Modules(NamedTuple):
    """Paths in the Hugging Face model; all but `layers`, `final_norm` and `lm_head` are within one layer."""

    layers: str = "model.layers"
    attention: str = "self_attn"
    attention_out: str = "self_attn.o_proj"
    mlp: str = "mlp"
    mlp_out: str | None = "mlp.down_proj"
    final_norm: str = "model.norm"
    lm_head: str = "lm_head"


LLAMA_LIKE = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3", "olmo2", "cohere2")
MODULES = {
    **dict.fromkeys(LLAMA_LIKE, Modules()),
    "qwen3_moe": Modules(mlp_out=None),
    "gpt2": Modules("transformer.h", "attn", "attn.c_proj", "mlp", "mlp.c_proj", "transformer.ln_f"),
    "gpt_neox": Modules(
        "gpt_neox.layers", "attention", "attention.dense", "mlp", "mlp.dense_4h_to_h", "gpt_neox.final_layer_norm"
    ),
    "falcon": Modules(
        "transformer.h", "self_attention", "self_attention.dense", "mlp", "mlp.dense_4h_to_h", "transformer.ln_f"
    ),
}

# transformers packs only plain linear layers, and Falcon's are of a class of their own: NF4 leaves it as it is.
CASES = [
    (family, quantization)
    for family in FAMILIES
    for quantization in (None, "nf4")
    if (family, quantization) != ("falcon", "nf4")
]

_FOLDER = tempfile.TemporaryDirectory(prefix="rim-families-")


def write_family(folder: Path, family: str, seed: int = 0, **changes: Any) -> Path:
    """Write a tiny random model of a family, one of `FAMILIES` or any other with its own `changes` to the sizes."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **{**SIZES, **FAMILIES.get(family, {}), **changes})
    config.eos_token_id = config.pad_token_id = 2
    config.bos_token_id = 1
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        # Usual initial weights are so small, and biases and norms so plain, that errors would not show.
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.5 if "embed" in name or "wte" in name else 0.2)
            else:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@cache
def family_folder(family: str) -> Path:
    """The folder of a family's tiny model, written once a session."""
    return write_family(Path(_FOLDER.name) / family, family)


@cache
def load_tiny(family: str, quantization: str | None = None) -> Model:
    """A family's tiny model on the CPU, loaded once a session and shared by all tests."""
    return rim.load(str(family_folder(family)), quantization=quantization, device="cpu")


def sites_of(family: str) -> tuple[str, ...]:
    """The sites a family has: a mixture of experts has no MLP neurons."""
    return tuple(site for site in SITES if site != "mlp_neurons" or MODULES[family].mlp_out)


def reference(model: Model, family: str, text: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """One prompt alone, unpadded: its sites, each `[layer, position, width]`, and its logits `[position, vocab]`."""
    paths = MODULES[family]
    found: dict[str, list[torch.Tensor]] = {site: [] for site in sites_of(family)}
    handles = []

    def keep(site, pick):
        def hook(module, args, kwargs, output=None):
            value = pick(args, kwargs, output)
            found[site].append((value[0] if isinstance(value, tuple) else value).detach().clone())

        return hook

    def into(args, kwargs, output):
        return args[0] if args else kwargs["hidden_states"]

    def out_of(args, kwargs, output):
        return output

    for layer in model.hf.get_submodule(paths.layers):
        before = {"resid_pre": layer, "head_z": layer.get_submodule(paths.attention_out)}
        if paths.mlp_out:
            before["mlp_neurons"] = layer.get_submodule(paths.mlp_out)
        after = {
            "resid_post": layer,
            "attn_out": layer.get_submodule(paths.attention),
            "mlp_out": layer.get_submodule(paths.mlp),
        }
        for site, module in before.items():
            handles.append(module.register_forward_pre_hook(keep(site, into), with_kwargs=True))
        for site, module in after.items():
            handles.append(module.register_forward_hook(keep(site, out_of), with_kwargs=True))
    ids = model.tokenizer(text, return_tensors="pt").input_ids
    try:
        with torch.no_grad():
            logits = model.hf(ids).logits[0]
    finally:
        for handle in handles:
            handle.remove()
    return {site: torch.stack(values)[:, 0] for site, values in found.items()}, logits
