"""What can be read and written in a decoder: the modules of each layer, found by their names.

Sites, each per layer (d = d_model):

- `resid_pre`: `[..., d]`, input of the decoder layer.
- `resid_post`: `[..., d]`, output of the decoder layer.
- `attn_out`: `[..., d]`, output of the attention module.
- `mlp_out`: `[..., d]`, output of the MLP module.
- `head_z`: `[..., head, head_dim]`, input of the attention's output projection.
- `mlp_neurons`: `[..., d_mlp]`, input of the MLP's down projection.

Where the MLP is a mixture of experts there is no one down projection, so `mlp_neurons` is refused. Gemma-2 and -3 and
OLMo-2 normalise what attention and MLP write before it is added, and Granite multiplies it: `attn_out` and `mlp_out`
are before that, and `Layout.added` is what reaches the stream, so that for every layer::

    resid_pre + added("attn_out", attn_out) + added("mlp_out", mlp_out) = resid_post
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from rim_core.checking import one_of
from rim_core.errors import InputError
from rim_core.models.hooks import reading as reading

SITES = ("resid_pre", "resid_post", "attn_out", "mlp_out", "head_z", "mlp_neurons")

_ATTENTION = ("self_attn", "attention", "attn", "self_attention")
_ATTENTION_OUT = ("o_proj", "dense", "c_proj", "out_proj")
_MLP = ("mlp", "feed_forward")
_MLP_OUT = ("down_proj", "dense_4h_to_h", "c_proj", "fc2", "fc_out", "w2")
# Norms of what the MLP, and of what attention alone, has written.
_MLP_NORM = ("post_feedforward_layernorm", "post_mlp_layernorm")
_ATTENTION_NORM = "post_self_attn_layernorm"
_FINAL_NORM = ("norm", "final_layer_norm", "final_layernorm", "ln_f")


@dataclass(frozen=True)
class Layout:
    """The modules that `rim_core` reads and writes, and the model's shapes.

    `attention_norm` and `mlp_norm` are the norms that each layer puts on what attention and MLP have written, None
    where it adds that as it is; `residual_multiplier` is what it multiplies it by.

    Example:
        >>> stream = rim.capture(model, texts, "resid_post")["resid_post"][:, -1]
        >>> logits = model.layout.readout(stream.to(model.device, model.dtype))
        >>> logits.shape == (len(texts), model.layout.d_vocab)
        True
    """

    layers: tuple[nn.Module, ...]
    attention: tuple[nn.Module, ...]
    attention_out: tuple[nn.Module, ...]
    mlp: tuple[nn.Module, ...]
    mlp_out: tuple[nn.Module | None, ...]  # None where the MLP is a mixture of experts
    attention_norm: tuple[nn.Module | None, ...]
    mlp_norm: tuple[nn.Module | None, ...]
    residual_multiplier: float
    final_norm: nn.Module
    lm_head: nn.Module
    body: nn.Module
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_model: int
    d_mlp: int  # 0 if any layer is a mixture of experts
    logit_scale: float
    soft_cap: float | None

    @property
    def d_vocab(self) -> int:
        """Logits that the language-model head gives: at least as many as the tokenizer has tokens."""
        head: Any = _with_widths(self.lm_head)
        return int(head.out_features)

    def readout(self, h: Tensor, tokens: Sequence[int] | None = None, capped: bool = True) -> Tensor:
        """Logits `[..., vocab]` as this family computes them from the last layer's `resid_post` `[..., d_model]`.

        `h` is in the model's dtype, on the final norm's device or the model's. With `tokens` only theirs,
        `[..., token]`, at their share of the cost. After final norm and head, Cohere and Granite scale the logits,
        and Gemma-2 squashes them to within `soft_cap` with a tanh, unless `capped` is False.
        """
        state = self.final_norm(h)
        if tokens is None:
            logits = self.lm_head(state)
        elif type(self.lm_head) is nn.Linear:
            bias = self.lm_head.bias
            rows, weight = list(tokens), self.lm_head.weight
            logits = functional.linear(state.to(weight.device), weight[rows], None if bias is None else bias[rows])
        else:
            logits = self.lm_head(state)[..., list(tokens)]
        return self._scaled(logits, capped)

    def logits(self, state: Tensor) -> Tensor:
        """Logits `[..., vocab]` from what the final norm gives, the body's last hidden state, `[..., d_model]`."""
        return self._scaled(self.lm_head(state))

    def _scaled(self, logits: Tensor, capped: bool = True) -> Tensor:
        logits = logits if self.logit_scale == 1 else logits * self.logit_scale
        return logits if self.soft_cap is None or not capped else self.soft_cap * torch.tanh(logits / self.soft_cap)

    def norm_after(self, site: str, layer: int) -> nn.Module | None:
        """The norm between `attn_out` or `mlp_out` and the residual stream, None where there is none."""
        return (self.attention_norm if site == "attn_out" else self.mlp_norm)[layer]

    def added(self, site: str, layer: int, output: Tensor) -> Tensor:
        """What the layer adds to the stream, given its `attn_out` or `mlp_out` `[..., d_model]`.

        `output` is in the model's dtype where there is a norm (see `norm_after`).
        """
        norm = self.norm_after(site, layer)
        written = output if norm is None else norm(output)
        return written if self.residual_multiplier == 1 else written * self.residual_multiplier

    def point(self, site: str, layer: int) -> tuple[nn.Module, bool]:
        """The module at which a site of a layer is found, and whether it is that module's input (or its output).

        Raises:
            InputError: an unknown site, or the neurons of a mixture of experts.
        """
        one_of(site, SITES, "site")
        if site == "mlp_neurons":
            return self.down_projection(layer), True
        modules = {
            "resid_pre": self.layers,
            "resid_post": self.layers,
            "attn_out": self.attention,
            "mlp_out": self.mlp,
            "head_z": self.attention_out,
        }
        return modules[site][layer], site in ("resid_pre", "head_z")

    def width(self, site: str) -> int:
        """Numbers of a site at one token, heads side by side; raises InputError for the neurons of experts."""
        if site == "mlp_neurons":
            self.down_projection(self.mlp_out.index(None) if None in self.mlp_out else 0)
            return self.d_mlp
        return self.n_heads * self.head_dim if one_of(site, SITES, "site") == "head_z" else self.d_model

    def down_projection(self, layer: int) -> nn.Module:
        """The module whose input are the layer's MLP neurons.

        Raises:
            InputError: the layer is a mixture of experts.
        """
        module = self.mlp_out[layer]
        if module is None:
            raise InputError(
                f"the MLP of layer {layer} is a mixture of experts ({type(self.mlp[layer]).__name__}), which has no "
                "single neuron basis: choose mlp_out, what the experts write together"
            )
        return module


def find_layout(hf: Any) -> Layout:
    """Find the decoder's modules by the names that Hugging Face families use.

    Raises:
        InputError: a module is missing, as in encoder and state-space models.
    """
    config = hf.config.get_text_config()
    body = hf.base_model
    body = getattr(body, "decoder", body)
    n_layers = config.num_hidden_layers
    layers = next((m for m in body.children() if isinstance(m, nn.ModuleList) and len(m) == n_layers), None)
    if layers is None:
        raise InputError(f"{_family(hf)} has no stack of {n_layers} decoder layers: only decoder-only models work")
    without = [
        number
        for number, layer in enumerate(layers)
        if not any(isinstance(getattr(layer, name, None), nn.Module) for name in _ATTENTION)
    ]
    if 0 < len(without) < n_layers:
        raise InputError(
            f"{_family(hf)} mixes attention with layers of another kind (layer {without[0]} has no attention, and "
            "keeps a state that is not keys and values): only models with attention in every layer work"
        )
    attention = tuple(_child(hf, layer, _ATTENTION, "attention") for layer in layers)
    mlp = tuple(_child(hf, layer, _MLP, "MLP") for layer in layers)
    attention_out = tuple(_child(hf, module, _ATTENTION_OUT, "attention output projection") for module in attention)
    mlp_out = tuple(_down_projection(hf, module) for module in mlp)
    after = [_norms_after(layer) for layer in layers]
    head = hf.get_output_embeddings()
    if head is None:
        raise InputError(f"{_family(hf)} has no language-model head: load a causal language model")
    n_heads = config.num_attention_heads
    # The truth is the projection's width: several families decouple head_dim from d_model / n_heads.
    width = _one_width(hf, attention_out, "attention heads")
    return Layout(
        layers=tuple(layers),
        attention=attention,
        attention_out=attention_out,
        mlp=mlp,
        mlp_out=mlp_out,
        attention_norm=tuple(norm for norm, _ in after),
        mlp_norm=tuple(norm for _, norm in after),
        residual_multiplier=getattr(config, "residual_multiplier", None) or 1.0,
        final_norm=_child(hf, body, _FINAL_NORM, "final norm"),
        lm_head=head,
        body=hf.base_model,
        n_heads=n_heads,
        # Falcon's configuration does not say how many it uses, its modules do.
        n_kv_heads=getattr(attention[0], "num_kv_heads", None)
        or getattr(config, "num_key_value_heads", None)
        or n_heads,
        head_dim=width // n_heads,
        d_model=config.hidden_size,
        d_mlp=0 if None in mlp_out else _one_width(hf, mlp_out, "MLP neurons"),
        # Cohere multiplies by what the model holds; Granite divides by what the configuration says.
        logit_scale=getattr(hf, "logit_scale", 1.0) / getattr(config, "logits_scaling", 1.0),
        soft_cap=getattr(config, "final_logit_softcapping", None),
    )


def _one_width(hf: nn.Module, modules: Sequence[Any], what: str) -> int:
    widths = {in_features(module) for module in modules}
    if len(widths) > 1:
        raise InputError(
            f"{_family(hf)} has {what} of different widths in different layers ({sorted(widths)}): "
            "only models whose layers are alike work"
        )
    return widths.pop()


def in_features(module: Any) -> int:
    """Input width of a linear module; packed 4-bit weights do not show it in their shape, and GPT-2's is transposed."""
    module = _with_widths(module)
    if hasattr(module, "in_features"):
        return int(module.in_features)
    return int(module.weight.shape[0])


def _with_widths(module: Any) -> Any:
    """The module, or the one inside PEFT's wrapper of some tokens' rows, which does not say its widths."""
    while not hasattr(module, "out_features") and hasattr(module, "original_module"):
        module = module.original_module
    return module


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


def _down_projection(hf: nn.Module, mlp: nn.Module) -> nn.Module | None:
    return None if hasattr(mlp, "experts") else _child(hf, mlp, _MLP_OUT, "MLP down projection")


def _norms_after(layer: nn.Module) -> tuple[nn.Module | None, nn.Module | None]:
    """The norms that a layer puts on what attention and MLP have written.

    In most families `post_attention_layernorm` comes before the MLP, on the stream. In those that also have a norm
    after the MLP it is attention's (Gemma, OLMo-2), unless that has one of its own (GLM-4).
    """
    mlp = next((getattr(layer, name) for name in _MLP_NORM if hasattr(layer, name)), None)
    if mlp is None or hasattr(layer, _ATTENTION_NORM):
        return getattr(layer, _ATTENTION_NORM, None), mlp
    return getattr(layer, "post_attention_layernorm", None), mlp


def head_outputs(layout: Layout, layer: int, z: Tensor) -> Tensor:
    """Each head's part of `attn_out`, `[..., head, d_model]`, from `z` `[..., head, head_dim]`.

    Families that normalise `attn_out` do so before it reaches the stream: see `writes.head_writes`.

    The projection is run once a head on an input that is zero elsewhere, so it works on packed 4-bit weights
    and on LoRA-wrapped modules; a bias is not part of any head's share.

    Args:
        layout: of the model.
        layer: its number.
        z: the site `head_z` of that layer.

    Example:
        >>> z = rim.capture(model, texts, "head_z")["head_z"][:, 1]
        >>> rim.sites.head_outputs(model.layout, 1, z).shape
        torch.Size([4, 4, 32])
    """
    module = layout.attention_out[layer]
    heads = torch.eye(layout.n_heads, device=z.device, dtype=z.dtype)
    # Flat rows: 8-bit modules take no more axes.
    spread = (z.unsqueeze(-3) * heads.unsqueeze(-1)).flatten(-2)
    rows = spread.reshape(-1, spread.shape[-1])
    # Not through the module's hooks: an active edit has had its turn when z was read.
    written = (module.forward(rows) - module.forward(torch.zeros_like(rows[:1]))).to(z.device)
    return written.reshape(*spread.shape[:-1], -1)


def pull_back(module: nn.Module, w: Tensor) -> Tensor:
    """`W^T w` for a linear module: what direction `w` `[..., out]` of its output is in its input, `[..., in]`.

    Got by differentiation, so it holds for packed 4-bit weights and for LoRA-wrapped modules.

    Args:
        module: linear, packed or not.
        w: the direction.

    Example:
        >>> import torch
        >>> rim.sites.pull_back(model.layout.mlp_out[0], torch.ones(model.d_model)).shape
        torch.Size([64])
    """
    with torch.enable_grad():
        probe = torch.zeros(*w.shape[:-1], in_features(module), device=w.device, dtype=w.dtype)
        probe.requires_grad_(True)
        # Not through the module's hooks: an active edit of its input is not part of the weights.
        output = module.forward(probe)
        (found,) = torch.autograd.grad(output, probe, w.to(output))
    return found
