"""Tiny random models of thirteen families, and where each keeps its modules, written out by hand.

Any test may call `load_tiny(family, quantization)`: each model is written and loaded once a session, so a test must
leave it as it found it. `reference` reads every site with hooks of its own, by the paths in `MODULES`.
"""

import tempfile
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tiny import FAMILIES, write_model

import rim_core as rim
from rim_core.models.layout import SITES
from rim_core.models.model import Model


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
    """Write a tiny random model of a family, no weight of which is plain."""
    return write_model(folder, family, seed=seed, drawn=True, **changes)


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
