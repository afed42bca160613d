"""One patched run by each peer, the way its documentation has users write it: a forward pass a component.

TransformerLens and nnsight get a copy of the model each, since they replace or wrap its modules.
`patched` replaces, at the last token, one head's `z` or one module's output, and gives the logits there.
"""

import copy
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

import rim_core as rim
from rim_core.models.hooks import reading
from rim_core.models.remote import nnsight_model

# Components and the sites whose values replace them.
SITES = {"heads": "head_z", "attention": "attn_out", "mlp": "mlp_out"}


class Peer(Protocol):
    """What the benchmarks need of a peer."""

    name: str

    def source(self, ids: Tensor, component: str) -> Tensor:
        """The component's values at the last token, `[prompt, layer, ...]`, heads as `[..., head, head_dim]`."""
        ...

    def patched(self, ids: Tensor, component: str, layer: int, head: int | None, value: Tensor) -> Tensor:
        """Logits `[prompt, vocabulary]` at the last token of `ids`, with `value` in the component's place."""
        ...


class HuggingFace:
    """A plain PyTorch hook and one forward pass a component, without the logits of other tokens: the least
    that a loop of forward passes can cost."""

    name = "one Hugging Face pass each"

    def __init__(self, model: rim.Model) -> None:
        self.model = model

    def source(self, ids: Tensor, component: str) -> Tensor:
        with reading(self.model.layout, [SITES[component]], lambda tensor: tensor[:, -1].clone()) as found:
            self.model.hf(ids, use_cache=False, logits_to_keep=1)
        values = torch.stack([found[SITES[component], i] for i in range(self.model.n_layers)], 1)
        return values.unflatten(-1, (self.model.n_heads, -1)) if component == "heads" else values

    def patched(self, ids: Tensor, component: str, layer: int, head: int | None, value: Tensor) -> Tensor:
        layout = self.model.layout
        if component == "heads":
            part = slice(head * layout.head_dim, (head + 1) * layout.head_dim)

            def on_input(module: Any, args: tuple[Any, ...]) -> Any:
                x = args[0].clone()
                x[:, -1, part] = value
                return (x, *args[1:])

            handle = layout.attention_out[layer].register_forward_pre_hook(on_input)
        else:

            def on_output(module: Any, args: tuple[Any, ...], output: Any) -> Any:
                tensor = (output[0] if isinstance(output, tuple) else output).clone()
                tensor[:, -1] = value
                return (tensor, *output[1:]) if isinstance(output, tuple) else tensor

            modules = layout.attention if component == "attention" else layout.mlp
            handle = modules[layer].register_forward_hook(on_output)
        try:
            return self.model.hf(ids, use_cache=False, logits_to_keep=1).logits[:, -1]
        finally:
            handle.remove()


class TransformerLens:
    """`run_with_hooks` on `hook_z`, `hook_attn_out` or `hook_mlp_out`, once a component."""

    def __init__(self, model: rim.Model) -> None:
        from importlib.metadata import version

        self.name = f"TransformerLens {version('transformer-lens')}"
        self.bridge = bridge(model)

    def source(self, ids: Tensor, component: str) -> Tensor:
        wanted = [hook_name(component, layer) for layer in range(self.bridge.cfg.n_layers)]
        _, cache = self.bridge.run_with_cache(ids, names_filter=wanted)
        return torch.stack([cache[name][:, -1] for name in wanted], 1)

    def patched(self, ids: Tensor, component: str, layer: int, head: int | None, value: Tensor) -> Tensor:
        def replace(tensor: Tensor, hook: Any) -> Tensor:
            if head is None:
                tensor[:, -1] = value
            else:
                tensor[:, -1, head] = value
            return tensor

        logits = self.bridge.run_with_hooks(ids, fwd_hooks=[(hook_name(component, layer), replace)])
        return logits[:, -1]


def hook_name(component: str, layer: int) -> str:
    """TransformerLens's name of a component's hook point."""
    names = {"heads": "attn.hook_z", "attention": "hook_attn_out", "mlp": "hook_mlp_out"}
    return f"blocks.{layer}.{names[component]}"


def bridge(model: rim.Model) -> Any:
    """TransformerLens's wrapper around a copy of the model."""
    from transformer_lens.model_bridge import TransformerBridge

    return TransformerBridge.boot_transformers(
        model.hf.config._name_or_path,
        hf_model=copy.deepcopy(model.hf),
        tokenizer=model.tokenizer,
        device=str(model.device),
        dtype=model.dtype,
    )


class Nnsight:
    """One nnsight trace a component."""

    def __init__(self, model: rim.Model) -> None:
        from importlib.metadata import version

        self.name = f"nnsight {version('nnsight')}"
        self.model = model
        self.nnsight = nnsight_model(copy.deepcopy(model.hf), model.tokenizer)
        self.paths = {id(module): name for name, module in model.hf.named_modules()}

    def _at(self, module: Any) -> Any:
        """nnsight's counterpart of a module of the model."""
        found = self.nnsight
        for part in self.paths[id(module)].split("."):
            found = found[int(part)] if part.isdigit() else getattr(found, part)
        return found

    def source(self, ids: Tensor, component: str) -> Tensor:
        return HuggingFace(self.model).source(ids, component)

    def patched(self, ids: Tensor, component: str, layer: int, head: int | None, value: Tensor) -> Tensor:
        layout, nns = self.model.layout, self.nnsight
        if component == "heads":
            projection = self._at(layout.attention_out[layer])
            part = slice(head * layout.head_dim, (head + 1) * layout.head_dim)
            with nns.trace(ids):
                projection.input[:, -1, part] = value
                logits = nns.output.logits[:, -1].save()
        elif component == "attention":
            attention = self._at(layout.attention[layer])
            with nns.trace(ids):
                attention.output[0][:, -1] = value
                logits = nns.output.logits[:, -1].save()
        else:
            mlp = self._at(layout.mlp[layer])
            with nns.trace(ids):
                mlp.output[:, -1] = value
                logits = nns.output.logits[:, -1].save()
        return logits


def available(model: rim.Model) -> list[Peer]:
    """The peers; raises ImportError where TransformerLens is not installed."""
    builders: list[Callable[[rim.Model], Peer]] = [TransformerLens, Nnsight, HuggingFace]
    return [build(model) for build in builders]
