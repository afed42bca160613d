"""What the benchmarks share: taking turns, rows of results, prompts of a given length, the machine."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

import rim_core as rim

PACKAGES = ("torch", "transformers", "bitsandbytes", "rim-core", "nnsight", "transformer-lens")


@dataclass(frozen=True)
class Row:
    """One comparison.

    `ours` and `theirs` are medians over the repeats, in `unit`; `ratio` is stated the way `target` is, `low` and
    `high` are the smallest and largest ratio within one repeat. `difference` is the largest difference between
    the two results over the largest value compared; None where there is nothing to compare.
    """

    benchmark: str
    case: str
    peer: str
    ours: float
    theirs: float
    unit: str
    ratio: float
    low: float
    high: float
    target: float | None = None
    at_least: bool = True
    difference: float | None = None
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the ratio reaches the target; None where there is none."""
        if self.target is None:
            return None
        return self.ratio >= self.target if self.at_least else self.ratio <= self.target

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "met": self.met}


def compare(
    benchmark: str,
    case: str,
    peer: str,
    ours: Sequence[float],
    theirs: Sequence[float],
    *,
    speed_up: bool = True,
    unit: str = "s",
    **rest: Any,
) -> Row:
    """A row from measurements taken in turns; the ratio is theirs over ours (`speed_up`), or ours over theirs."""
    mine, other = statistics.median(ours), statistics.median(theirs)
    pairs = list(zip(ours, theirs, strict=True))
    ratios = [b / a if speed_up else a / b for a, b in pairs]
    ratio = other / mine if speed_up else mine / other
    return Row(benchmark, case, peer, mine, other, unit, ratio, min(ratios), max(ratios), **rest)


def in_turns(
    works: Mapping[str, Callable[[], object]],
    repeats: int,
    within: Mapping[str, Callable[[], AbstractContextManager[Any]]] | None = None,
    *,
    warm: bool = True,
) -> dict[str, list[float]]:
    """Seconds of each piece of work in each repeat, taken in turns, so that a slow spell of the machine hits all.

    A first round, which warms caches, is not counted, or with `warm=False` not run. `within` names contexts to enter
    before the clock starts.
    """
    times: dict[str, list[float]] = {name: [] for name in works}
    for repeat in range(0 if warm else 1, repeats + 1):
        for name, work in works.items():
            with (within or {}).get(name, nullcontext)():
                synchronize()
                start = time.perf_counter()
                work()
                synchronize()
                seconds = time.perf_counter() - start
            if repeat:
                times[name].append(seconds)
    return times


def synchronize() -> None:
    """Wait for the GPU, where there is one: its work is only queued when a call returns."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def relative(found: Tensor, wanted: Tensor) -> float:
    """Largest difference over the largest wanted value."""
    found, wanted = found.double(), wanted.double()
    return float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30))


def texts_of_length(tokenizer: Any, n_tokens: int, count: int) -> list[str]:
    """Plain texts of exactly `n_tokens` tokens each, every one beginning differently."""
    sentences = [prompt.text for prompt in rim.load_prompts("everyday")]
    found: list[str] = []
    start = 0
    while len(found) < count:
        if start > 50 * count + 50:
            raise RuntimeError(f"cannot cut texts to {n_tokens} tokens with this tokenizer")
        body = " ".join(sentences[(start + i) % len(sentences)] for i in range(n_tokens))
        text = tokenizer.decode(tokenizer(body, add_special_tokens=False).input_ids[:n_tokens])
        if len(tokenizer(text).input_ids) == n_tokens:
            found.append(text)
        start += 1
    return found


def machine() -> dict[str, Any]:
    """What the numbers depend on; nothing that names the machine."""
    cpu = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line.split(":", 1)[1] for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].strip() if names else cpu
    found: dict[str, Any] = {
        "cpu": cpu or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9),
        "python": platform.python_version(),
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
