"""Generation under ablation, and capture, against the plain model doing the same passes."""

import contextlib
import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch

import rim_core as rim
from benchmarks.decoding import PEER, both, endless
from benchmarks.harness import Row, compare, in_turns, relative
from rim_core.models.batching import batches
from rim_core.models.padding import pad_left
from rim_core.texts import encode

GENERATION_TARGET = 0.9
CAPTURE_TARGET = 1.05
N_HEADS = 10
CAPTURE_TOKENS = 4096


@torch.no_grad()
def ablated(model: rim.Model, repeats: int, batch: int = 16, new_tokens: int = 48) -> list[Row]:
    """Greedy generation with ten heads at their mean against plain `hf.generate`: the share of its speed kept."""
    texts = rim.format_chat(model, rim.load_prompts("everyday", limit=batch))
    cells = [(layer, head) for layer in range(model.n_layers) for head in range(model.n_heads)]
    heads = random.Random(0).sample(cells, min(N_HEADS, len(cells)))
    inputs = pad_left(encode(model.tokenizer, texts), model.tokenizer.pad_token_id, model.device)

    def ablation() -> AbstractContextManager[Any]:
        return rim.ablate(model, heads=heads, mode="mean", reference=texts)

    with endless(model):
        times = in_turns(both(model, texts, new_tokens), repeats, within={"ours": ablation})
    with ablation():
        found = model.hf(**inputs, use_cache=False, logits_to_keep=1).logits
    with _means_by_hand(model, texts, heads):
        wanted = model.hf(**inputs, use_cache=False, logits_to_keep=1).logits
    return [
        compare(
            "generation",
            f"{len(heads)} heads at their mean, batch of {batch}, {new_tokens} new tokens",
            PEER,
            times["ours"],
            times["plain"],
            target=GENERATION_TARGET,
            difference=relative(found, wanted),
            note="the means are measured before the clock starts; difference: next-token logits against hooks by hand",
        )
    ]


@contextlib.contextmanager
def _means_by_hand(model: rim.Model, texts: list[str], heads: list[tuple[int, int]]) -> Iterator[None]:
    """Plain hooks that put each head at its mean over all tokens of the texts."""
    acts = rim.capture(model, texts, "head_z", positions="all")
    assert acts.mask is not None
    means = acts["head_z"][acts.mask].mean(0)

    def replace(layer: int) -> Callable[..., Any]:
        def hook(module: Any, args: tuple[Any, ...]) -> Any:
            z = args[0].clone().unflatten(-1, (model.n_heads, model.head_dim))
            for chosen, head in heads:
                if chosen == layer:
                    z[..., head, :] = means[layer, head].to(z)
            return (z.flatten(-2), *args[1:])

        return hook

    layers = {layer for layer, _ in heads}
    handles = [model.layout.attention_out[i].register_forward_pre_hook(replace(i)) for i in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def capturing(model: rim.Model, repeats: int, n_texts: int = 64) -> list[Row]:
    """All MLP neurons at the last token against the same batches through the model's body alone."""
    chat = rim.format_chat(model, rim.load_prompts("harmful", limit=n_texts))
    plain_texts = [" ".join(p.text for p in rim.load_prompts("everyday", limit=4, seed=i)) for i in range(n_texts)]
    rows = []
    for case, texts in (("chat prompts, one beginning", chat), ("prompts without a common beginning", plain_texts)):

        def forward(texts: list[str] = texts) -> None:
            ids = encode(model.tokenizer, texts)
            for group in batches([len(row) for row in ids], CAPTURE_TOKENS):
                inputs = pad_left([ids[row] for row in group], model.tokenizer.pad_token_id, model.device)
                model.layout.body(**inputs, use_cache=False)

        def ours(texts: list[str] = texts) -> None:
            rim.capture(model, texts, "mlp_neurons", max_tokens=CAPTURE_TOKENS)

        works: dict[str, Callable[[], object]] = {"ours": ours, "plain": forward}
        times = in_turns(works, repeats)
        rows.append(
            compare(
                "capture",
                f"{model.quantization or 'fp32'}, {case}",
                "plain forward pass",
                times["ours"],
                times["plain"],
                speed_up=False,
                target=CAPTURE_TARGET,
                at_least=False,
                difference=_last_neurons(model, texts[:4]),
                note=f"{n_texts} prompts",
            )
        )
    return rows


def _last_neurons(model: rim.Model, texts: list[str]) -> float:
    """Against one plain pass a text with a hook of its own."""
    captured = rim.capture(model, texts, "mlp_neurons")["mlp_neurons"]
    found: list[torch.Tensor] = []
    handles = [
        module.register_forward_pre_hook(lambda module, args: found.append(args[0][0, -1].float().cpu()))
        for module in model.layout.mlp_out
    ]
    try:
        for row in encode(model.tokenizer, texts):
            model.layout.body(torch.tensor([row], device=model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return relative(captured, torch.stack(found).view_as(captured))
