"""What can be read and written in a decoder: the modules of each layer, found by shape, and hooks on them.

Sites, each per layer (d = d_model):

| site | tensor | read at |
|---|---|---|
| `resid_pre` | [..., d] | input of the decoder layer |
| `resid_post` | [..., d] | output of the decoder layer |
| `attn_out` | [..., d] | output of the attention module |
| `mlp_out` | [..., d] | output of the MLP module |
| `head_z` | [..., head, head_dim] | input of the attention's output projection |
| `mlp_neurons` | [..., d_mlp] | input of the MLP's down projection |
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rim_core.errors import InputError

SITES = ("resid_pre", "resid_post", "attn_out", "mlp_out", "head_z", "mlp_neurons")

_ATTENTION = ("self_attn", "attention", "attn", "self_attention")
_ATTENTION_OUT = ("o_proj", "dense", "c_proj", "out_proj")
_MLP = ("mlp", "feed_forward")
_MLP_OUT = ("down_proj", "dense_4h_to_h", "c_proj", "fc2", "fc_out", "w2")
_FINAL_NORM = ("norm", "final_layer_norm", "final_layernorm", "ln_f")


@dataclass(frozen=True)
class Layout:
    """The modules that `rim_core` reads and writes, and the model's shapes."""

    layers: tuple[nn.Module, ...]
    attention: tuple[nn.Module, ...]
    attention_out: tuple[nn.Module, ...]
    mlp: tuple[nn.Module, ...]
    mlp_out: tuple[nn.Module, ...]
    final_norm: nn.Module
    lm_head: nn.Module
    body: nn.Module
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_model: int
    d_mlp: int


def find_layout(hf: Any) -> Layout:
    """Find the decoder's modules by the names that Hugging Face families use.

    Raises:
        InputError: a module is missing, as in encoder, state-space or mixture-of-experts models.
    """
    config = hf.config.get_text_config()
    body = hf.base_model
    body = getattr(body, "decoder", body)
    n_layers = config.num_hidden_layers
    layers = next(
        (m for m in body.children() if isinstance(m, nn.ModuleList) and len(m) == n_layers),
        None,
    )
    if layers is None:
        raise InputError(
            f"{_family(hf)} has no stack of {n_layers} decoder layers: only decoder-only models work"
        )
    attention = tuple(_child(hf, layer, _ATTENTION, "attention") for layer in layers)
    mlp = tuple(_child(hf, layer, _MLP, "MLP") for layer in layers)
    attention_out = tuple(
        _child(hf, module, _ATTENTION_OUT, "attention output projection") for module in attention
    )
    mlp_out = tuple(_child(hf, module, _MLP_OUT, "MLP down projection") for module in mlp)
    head = hf.get_output_embeddings()
    if head is None:
        raise InputError(f"{_family(hf)} has no language-model head: load a causal language model")
    n_heads = config.num_attention_heads
    # The truth is the projection's width: several families decouple head_dim from d_model / n_heads.
    width = in_features(attention_out[0])
    return Layout(
        layers=tuple(layers),
        attention=attention,
        attention_out=attention_out,
        mlp=mlp,
        mlp_out=mlp_out,
        final_norm=_child(hf, body, _FINAL_NORM, "final norm"),
        lm_head=head,
        body=hf.base_model,
        n_heads=n_heads,
        n_kv_heads=getattr(config, "num_key_value_heads", None) or n_heads,
        head_dim=width // n_heads,
        d_model=config.hidden_size,
        d_mlp=in_features(mlp_out[0]),
    )


def in_features(module: Any) -> int:
    """Input width of a linear module; packed 4-bit weights do not show it in their shape, and GPT-2's is transposed."""
    if hasattr(module, "in_features"):
        return int(module.in_features)
    return int(module.weight.shape[0])


def _family(hf: nn.Module) -> str:
    return type(hf).__name__


def _child(hf: nn.Module, parent: Any, names: Sequence[str], what: str) -> nn.Module:
    for name in names:
        module = getattr(parent, name, None)
        if isinstance(module, nn.Module):
            return module
    raise InputError(
        f"{_family(hf)} has no {what} that rim_core knows in {type(parent).__name__} (looked for {', '.join(names)})"
    )


def tensor_of(value: Any) -> Tensor:
    """The tensor in a module's output, which some families wrap in a tuple."""
    return value[0] if isinstance(value, tuple) else value


def _layer_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]


@contextlib.contextmanager
def reading(
    layout: Layout,
    sites: Sequence[str],
    keep: Callable[[Tensor], Tensor],
    layers: Sequence[int] | None = None,
) -> Iterator[dict[tuple[str, int], Tensor]]:
    """Within the context each forward leaves `keep(tensor)` of every site and layer in the yielded dictionary.

    `keep` must copy (select and clone): some families add to a module's output in place afterwards. Heads come
    flat, `[..., n_heads * head_dim]`. The hooks are gone when the context is left, however it is left.
    """
    found: dict[tuple[str, int], Tensor] = {}
    handles = []

    def on_input(site: str, layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found[site, layer] = keep(_layer_input(args, kwargs))

        return hook

    def on_output(site: str, layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            found[site, layer] = keep(tensor_of(output))

        return hook

    inputs = {"resid_pre": layout.layers, "head_z": layout.attention_out, "mlp_neurons": layout.mlp_out}
    outputs = {"resid_post": layout.layers, "attn_out": layout.attention, "mlp_out": layout.mlp}
    try:
        for site in sites:
            for layer in range(len(layout.layers)) if layers is None else layers:
                if site in inputs:
                    module = inputs[site][layer]
                    handles.append(module.register_forward_pre_hook(on_input(site, layer), with_kwargs=True))
                else:
                    handles.append(outputs[site][layer].register_forward_hook(on_output(site, layer)))
        yield found
    finally:
        for handle in handles:
            handle.remove()


def head_outputs(layout: Layout, layer: int, z: Tensor) -> Tensor:
    """What each head writes into the residual stream, `[..., head, d_model]`, from `z` `[..., head, head_dim]`.

    The projection is run once a head on an input that is zero elsewhere, so it works on packed 4-bit weights
    and on LoRA-wrapped modules; a bias is not part of any head's share.
    """
    module = layout.attention_out[layer]
    heads = torch.eye(layout.n_heads, device=z.device, dtype=z.dtype)
    spread = z.unsqueeze(-3) * heads.unsqueeze(-1)
    return module(spread.flatten(-2)) - module(torch.zeros_like(spread[..., :1, :, :]).flatten(-2))
