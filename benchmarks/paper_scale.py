"""Paper C's patching at the size of its model, with random weights: `python -m benchmarks.paper_scale`.

Time and memory do not depend on what the weights are, so nothing is downloaded: a model of Qwen2.5-32B's shape
with a rank-32 adapter is built in NF4 on the device, one matrix at a time. First the tools are checked on a small
model of the same family, against hooks written by hand. `--estimate` prints what arithmetic predicts, on any machine.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import rim_core as rim
from benchmarks import harness
from benchmarks.harness import relative, texts_of_length
from benchmarks.peers import HuggingFace
from rim_core.models.loading import keep_packed
from rim_core.suites import sizing
from rim_core.suites.sizing import PAIRS, TERAFLOPS, TOKENS
from rim_core.texts import encode

_COMMON = {"max_position_embeddings": 32768, "tie_word_embeddings": False}
SHAPES: dict[str, dict[str, Any]] = {
    "qwen2.5-32b": {
        "hidden_size": 5120,
        "num_hidden_layers": 64,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "intermediate_size": 27648,
        "vocab_size": 152064,
        **_COMMON,
    },
    "small": {
        "hidden_size": 1024,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "intermediate_size": 2816,
        "vocab_size": 4096,
        **_COMMON,
    },
    "tiny": {
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 128,
        "vocab_size": 1024,
        **_COMMON,
    },
}
ADAPTER_RANK = 32
REPEATS = 3

Quantity = dict[str, Any]


def _quantity(name: str, value: float, unit: str, note: str = "") -> Quantity:
    return {"quantity": name, "value": value, "unit": unit, "note": note}


def _linear_weights(shape: dict[str, Any]) -> int:
    """Weights in one layer's linear modules."""
    width = shape["hidden_size"]
    keys = width // shape["num_attention_heads"] * shape["num_key_value_heads"]
    return int(2 * width * width + 2 * width * keys + 3 * width * shape["intermediate_size"])


def _adapter_weights(shape: dict[str, Any]) -> int:
    """Weights of an adapter on all of one layer's linear modules."""
    width, inner = shape["hidden_size"], shape["intermediate_size"]
    keys = width // shape["num_attention_heads"] * shape["num_key_value_heads"]
    return int(ADAPTER_RANK * (4 * width + 2 * (width + keys) + 3 * (width + inner)))


def estimate(shape: str = "qwen2.5-32b", teraflops: float = TERAFLOPS, tokens: int = TOKENS) -> list[Quantity]:
    """Memory and time by arithmetic: tokens to be computed, times operations a token, over an assumed rate."""
    sizes = SHAPES[shape]
    n_layers, n_heads = sizes["num_hidden_layers"], sizes["num_attention_heads"]
    packed = n_layers * _linear_weights(sizes) * sizing.PACKED_BYTES["nf4"] / 1e9
    tables = 2 * sizes["vocab_size"] * sizes["hidden_size"] * 2 / 1e9
    adapter = n_layers * _adapter_weights(sizes) * 4 / 1e9
    # See `experiment_3` and `experiment_4` for what is run.
    weights = _linear_weights(sizes) + _adapter_weights(sizes)
    three, four = sizing.patching_hours(n_layers, n_heads, weights, tokens=tokens, teraflops=teraflops)
    rate = f"{teraflops:g} TFLOP/s assumed, {tokens} tokens a prompt, {PAIRS} pairs"
    return [
        _quantity("memory after loading", packed + tables + adapter, "GB",
                  f"NF4 {packed:.1f}, embeddings in bf16 {tables:.1f}, adapter in fp32 {adapter:.1f}"),
        _quantity("Experiment 4", 60 * four, "min", rate),
        _quantity("Experiment 3", 60 * three, "min", rate),
    ]  # fmt: skip


def build(shape: str, device: torch.device, dtype: torch.dtype, seed: int = 0) -> rim.Model:
    """A model with random weights, its linear modules in NF4, built on the device one matrix at a time."""
    import bitsandbytes
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, Qwen2Config
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

    config = Qwen2Config(**SHAPES[shape])
    with torch.device("meta"):
        hf = AutoModelForCausalLM.from_config(config, dtype=dtype)
    draw = torch.Generator(device).manual_seed(seed)

    def normal(size: Sequence[int], scale: float) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device).normal_(0, scale, generator=draw)

    for parent, name, linear in list(_linears(hf.model.layers)):
        packed = bitsandbytes.nn.Linear4bit(
            linear.in_features, linear.out_features, linear.bias is not None, dtype, False, "nf4", device="meta"
        )
        weight = normal(linear.weight.shape, linear.in_features**-0.5)
        packed.weight = bitsandbytes.nn.Params4bit(
            weight, requires_grad=False, compress_statistics=False, quant_type="nf4", module=packed
        ).to(device)
        if linear.bias is not None:
            packed.bias = nn.Parameter(normal(linear.bias.shape, 0.02), requires_grad=False)
        setattr(parent, name, packed)
    hf.model.rotary_emb = Qwen2RotaryEmbedding(config).to(device)
    for module in hf.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                filled = (
                    normal(parameter.shape, 1.0) if parameter.dim() > 1 else torch.ones_like(parameter, device=device)
                )
                setattr(module, name, nn.Parameter(filled, requires_grad=False))
    keep_packed(hf).is_loaded_in_4bit = True
    adapter = LoraConfig(
        r=ADAPTER_RANK, lora_alpha=2 * ADAPTER_RANK, use_rslora=True, target_modules="all-linear",
        init_lora_weights=True, inference_mode=True,
    )  # fmt: skip
    hf.add_adapter(adapter)
    for name, parameter in hf.named_parameters():
        if "lora_B" in name:  # zero at first, so that the adapter would do nothing
            parameter.data.normal_(0, 1e-3)
    hf.eval().requires_grad_(False)
    model = rim.Model(hf, _tokenizer(), f"random {shape}", f"random-{shape}-{seed}", "nf4", dtype)
    model.measure_identities()
    return model


def _linears(root: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    for parent in root.modules():
        for name, child in parent.named_children():
            if isinstance(child, nn.Linear):
                yield parent, name, child


def _tokenizer() -> Any:
    """A byte-level tokenizer of the everyday prompts, so that no file is needed."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=["<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator([prompt.text for prompt in rim.load_prompts("everyday")], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", padding_side="left")


@torch.no_grad()
def exactness(shape: str, device: torch.device, dtype: torch.dtype) -> list[Quantity]:
    """Patched effects of heads, attention and MLPs against one pass each with hooks by hand, in NF4."""
    model = build(shape, device, dtype)
    texts = [texts_of_length(model.tokenizer, n, 2)[1] for n in (19, 30, 23, 27)]
    pairs = list(zip(texts[:2], texts[2:], strict=True))
    found = []
    for component in ("heads", "attention", "mlp"):
        result = rim.patch(model, texts[:2], texts[2:], component, _metric(model)).effects
        wanted = torch.stack([_effects_by_hand(model, component, *pair) for pair in pairs]).view_as(result)
        name = f"patching {component}, NF4, {str(dtype).removeprefix('torch.')} compute"
        correlation = torch.corrcoef(torch.stack([result.flatten(), wanted.flatten()]))[0, 1]
        note = f"largest difference over largest effect; correlation {correlation:.6f}"
        found.append(_quantity(name, relative(result, wanted), "", note))
    return found


def _effects_by_hand(model: rim.Model, component: str, source: str, destination: str) -> Tensor:
    """Effects of one pair, flat, in the order of layers (and heads)."""
    direction = torch.nn.functional.normalize(_metric(model).direction, dim=0)
    scores: list[float] = []

    def score(module: Any, args: tuple[Any, ...], output: Any) -> None:
        state = output[0] if isinstance(output, tuple) else output
        scores.append(float(state[0, -1].float().cpu() @ direction))

    peer = HuggingFace(model)
    ids, source_ids = (
        torch.tensor([row], device=model.device) for row in encode(model.tokenizer, [destination, source])
    )
    values = peer.source(source_ids, component)[0]
    handle = model.layout.layers[-1].register_forward_hook(score)
    try:
        model.hf(ids, use_cache=False, logits_to_keep=1)
        for layer in range(model.n_layers):
            if component == "heads":
                for head in range(model.n_heads):
                    peer.patched(ids, component, layer, head, values[layer, head])
            else:
                peer.patched(ids, component, layer, None, values[layer])
    finally:
        handle.remove()
    return torch.tensor(scores[1:]) - scores[0]


def experiment_4(model: rim.Model, sources: list[str], destinations: list[str]) -> None:
    """Every head of the last two layers (paper C, section III.D), source activations included."""
    layers = list(range(model.n_layers))[-2:]
    rim.patch(model, sources, destinations, "heads", _metric(model), layers=layers)


def experiment_3(model: rim.Model, sources: list[str], destinations: list[str]) -> None:
    """Attention and MLP of every layer, forward and reverse (paper C, section III.C), source activations included."""
    sides = [sources, destinations]
    given = [rim.capture(model, side, ("attn_out", "mlp_out")) for side in sides]
    for direction in (0, 1):
        for component in ("attention", "mlp"):
            rim.patch(model, given[direction], sides[1 - direction], component, _metric(model))


def _metric(model: rim.Model) -> Any:
    return rim.Projection(torch.linspace(-1, 1, model.d_model))


@torch.no_grad()
def timed(model: rim.Model, run: Callable[..., None], name: str, n_pairs: int, tokens: int) -> Quantity:
    """Median minutes of an experiment on a sample of pairs, scaled to the paper's number."""
    texts = texts_of_length(model.tokenizer, tokens, 2 * n_pairs)
    seconds = []
    for repeat in range(REPEATS + 1):
        harness.synchronize()
        start = time.perf_counter()
        run(model, texts[:n_pairs], texts[n_pairs:])
        harness.synchronize()
        if repeat:
            seconds.append(time.perf_counter() - start)
    minutes = statistics.median(seconds) * PAIRS / n_pairs / 60
    note = f"{n_pairs} pairs of {tokens} tokens timed, median of {REPEATS}, scaled to {PAIRS} pairs"
    return _quantity(name, minutes, "min", note)


def measure(shape: str, checked: str, device: torch.device, pairs: tuple[int, int], tokens: int) -> list[Quantity]:
    """Everything: exactness on the shape `checked`, then memory and time on `shape`."""
    found = [q for dtype in (torch.float32, torch.bfloat16) for q in exactness(checked, device, dtype)]
    start = time.perf_counter()
    model = build(shape, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    found.append(_quantity("building the model", time.perf_counter() - start, "s"))
    on_gpu = device.type == "cuda"
    held = torch.cuda.memory_allocated() if on_gpu else model.hf.get_memory_footprint()
    found.append(_quantity("memory after loading", held / 1e9, "GB"))
    for number, run, n_pairs in ((4, experiment_4, pairs[0]), (3, experiment_3, pairs[1])):
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        found.append(timed(model, run, f"Experiment {number}", n_pairs, tokens))
        if on_gpu:
            peak = torch.cuda.max_memory_allocated() / 1e9
            found.append(_quantity(f"peak memory, Experiment {number}", peak, "GB"))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.paper_scale", description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="qwen2.5-32b")
    parser.add_argument("--estimate", action="store_true", help="arithmetic only, no GPU")
    parser.add_argument("--rate", type=float, default=TERAFLOPS, help="TFLOP/s that --estimate assumes")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="tokens a prompt")
    parser.add_argument("--pairs", type=int, nargs=2, default=(100, 50), help="pairs timed, Experiments 4 and 3")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    options = parser.parse_args()
    if options.estimate:
        found = estimate(options.shape, options.rate, options.tokens)
    else:
        if options.shape == "qwen2.5-32b" and not torch.cuda.is_available():
            sys.exit("paper_scale: this needs a CUDA GPU; use --estimate, or --shape tiny to try the code")
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        checked = "tiny" if options.shape == "tiny" else "small"
        found = measure(options.shape, checked, device, tuple(options.pairs), options.tokens)
    for q in found:
        print(f"{q['quantity']:48} {q['value']:10.3g} {q['unit']:4} {q['note']}")
    if options.out:
        content = {"machine": harness.machine(), "versions": harness.versions(), "rows": found}
        options.out.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
