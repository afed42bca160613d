"""Speed, side by side in one run: `make bench`. Prints a table; ratios are what to compare between machines."""

import resource
import statistics
import time
from collections.abc import Callable

import torch

import rim_core as rim
from rim_core.tracing import encode, pad_left

REPEATS = 5


def interleaved(*works: Callable[[], object]) -> list[float]:
    """Median seconds of each piece of work; taken in turns, so that a slow spell of the machine hits all."""
    times: list[list[float]] = [[] for _ in works]
    for repeat in range(REPEATS + 1):
        for work, taken in zip(works, times, strict=True):
            start = time.perf_counter()
            work()
            if repeat:  # the first round warms caches
                taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in times]


@torch.no_grad()
def main() -> None:
    start = time.perf_counter()
    model = rim.load("smollm2:aligned", device="cpu")
    loading = time.perf_counter() - start
    print(
        f"load smollm2:aligned, NF4      {loading:6.1f} s, {model.hf.get_memory_footprint() / 1e6:.0f} MB of model"
    )
    texts = rim.format_chat(model, rim.load_prompts("harmful", limit=64))
    inputs = pad_left(encode(model.tokenizer, texts), model.tokenizer.pad_token_id)
    for quantization in ("nf4", None):
        model = rim.load("smollm2:aligned", quantization=quantization, device="cpu")

        def plain(hf: torch.nn.Module = model.hf) -> object:
            return hf(**inputs, use_cache=False, logits_to_keep=1)

        def captured(model: rim.Model = model) -> object:
            return rim.capture(model, texts, "mlp_neurons", max_tokens=inputs["input_ids"].numel())

        forward, capture = interleaved(plain, captured)
        print(
            f"{quantization or 'fp32':5} plain forward {forward:6.2f} s   with all neurons captured {capture:6.2f} s   "
            f"ratio {capture / forward:.3f}"
        )
    print(f"peak memory of this process {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB")


if __name__ == "__main__":
    main()
