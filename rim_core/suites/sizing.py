"""Memory and time that a model takes, by arithmetic on its count of weights."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rim_core.errors import InputError

QUANTIZATIONS = ("nf4", "int8", "none")
# bitsandbytes keeps a float32 scale for every 64 weights in 4 bits.
_PACKED_BYTES = {"nf4": 0.5 + 4 / 64, "int8": 1.0}
# Room beside the weights: tools keep their working memory to about 1 GB, and an adapter takes the like.
_ROOM_SHARE, _ROOM_LIMIT = 0.25, 2e9
# Paper C's experiments 3 and 4: its pairs, a prompt's tokens, and what one 24 GB card is taken to sustain.
PAIRS, TOKENS, TERAFLOPS = 2500, 100, 40.0
# A notebook at its default size takes up to about this on 2 CPU cores, in a model with so many packed weights.
NOTEBOOK_SECONDS, NOTEBOOK_WEIGHTS = 90, 106e6


@dataclass(frozen=True)
class Size:
    """Weights of a checkpoint: of its layers' linear maps, which quantisation packs, and all others."""

    linear: int
    other: int
    layers: int
    heads: int

    def gigabytes(self, quantization: str, gpu: bool) -> float:
        """Memory that the weights take, with room for activations beside them.

        What is not packed is in bfloat16 on a GPU and in float32 on the CPU (`rim.load`).
        """
        width = 2 if gpu else 4
        packed = self.linear * _PACKED_BYTES.get(quantization, width)
        weights = packed + self.other * width
        return (weights + min(_ROOM_SHARE * weights, _ROOM_LIMIT)) / 1e9

    @property
    def paper_hours(self) -> float:
        """Hours for paper C's patching of every layer (experiment 3) and of every head of two (experiment 4).

        Tokens to be computed, by layer, times two operations a weight, over an assumed rate: the arithmetic of
        `benchmarks/paper_scale.py`.
        """
        n_layers = max(self.layers, 1)
        later = sum(n_layers - layer for layer in range(n_layers))
        three = 2 * TOKENS * n_layers + 4 * (TOKENS * n_layers + later)
        four = 2 * TOKENS * n_layers + 3 * self.heads
        return (three + four) * 2 * self.linear / n_layers * PAIRS / TERAFLOPS / 1e12 / 3600

    def notebook_hours(self, notebooks: int) -> float:
        """Hours for so many notebooks at their default sizes on 2 CPU cores, in proportion to the weights."""
        return notebooks * NOTEBOOK_SECONDS * self.linear / NOTEBOOK_WEIGHTS / 3600


def stated(size: Mapping[str, Any]) -> Size:
    """A size that a suite's file states, for a checkpoint that is not here yet."""
    return Size(*(int(float(size.get(key, 0))) for key in ("linear", "other", "layers", "heads")))


def require_memory(ref: str, size: Size, quantization: str) -> None:
    """Refuse a model that does not fit in the memory there is.

    Raises:
        InputError: says what is needed and there, and which quantisation would fit.
    """
    there, gpu = memory_there()
    needed = {name: size.gigabytes(name, gpu) for name in QUANTIZATIONS}
    if needed[quantization] <= there:
        return
    fitting = [f"{name} ({needed[name]:.1f} GB)" for name in QUANTIZATIONS if needed[name] <= there]
    remedy = f"it would fit in {' or '.join(fitting)}" if fitting else "it fits in no quantisation: a larger machine"
    kind = "GPU memory" if gpu else "memory"
    raise InputError(
        f"{ref} is too large: with quantization {quantization} it needs {needed[quantization]:.1f} GB, and there are "
        f"{there:.1f} GB of free {kind}; {remedy}"
    )


def memory_there() -> tuple[float, bool]:
    """Gigabytes that a model may take here, and whether they are a GPU's (all of them together)."""
    import psutil

    if _may_have_gpu():
        import torch

        if torch.cuda.is_available():
            free = sum(torch.cuda.mem_get_info(i)[0] for i in range(torch.cuda.device_count()))
            return free / 1e9, True
    return psutil.virtual_memory().available / 1e9, False


def _may_have_gpu() -> bool:
    """Whether it is worth the seconds that torch takes to ask."""
    devices = any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/kfd").exists()
    return devices or any(shutil.which(tool) for tool in ("nvidia-smi", "rocm-smi"))
