"""Memory and time that a model takes, by arithmetic on its count of weights."""

import shutil
from pathlib import Path

from rim_core.errors import InputError
from rim_core.yamlfile import Entry

QUANTIZATIONS = ("nf4", "int8", "none")
# bitsandbytes keeps a float32 scale for every 64 weights in 4 bits.
PACKED_BYTES = {"nf4": 0.5 + 4 / 64, "int8": 1.0}
# Room beside the weights: tools keep their working memory to about 1 GB, and an adapter takes the like.
_ROOM_SHARE, _ROOM_LIMIT = 0.25, 2e9
# Paper C's experiments 3 and 4: its pairs, a prompt's tokens, and what one 24 GB card is taken to sustain.
PAIRS, TOKENS, TERAFLOPS = 2500, 100, 40.0
# A notebook at its default size takes up to about this on 2 CPU cores, in a model with so many packed weights.
NOTEBOOK_SECONDS, NOTEBOOK_WEIGHTS = 90, 106e6


class Size(Entry):
    """Counts of a checkpoint.

    Attributes:
        linear: weights of its layers' linear maps, which quantisation packs.
        other: all other weights.
        layers: layers.
        heads: attention heads a layer.
    """

    linear: int = 0
    other: int = 0
    layers: int = 0
    heads: int = 0

    def gigabytes(self, quantization: str, gpu: bool) -> float:
        """Memory that the weights take, with room for activations beside them.

        What is not packed is in bfloat16 on a GPU and in float32 on the CPU (`rim.load`).
        """
        width = 2 if gpu else 4
        weights = self.linear * PACKED_BYTES.get(quantization, width) + self.other * width
        return (weights + min(_ROOM_SHARE * weights, _ROOM_LIMIT)) / 1e9

    @property
    def paper_hours(self) -> float:
        """Hours for paper C's experiments 3 and 4 at the paper's size."""
        return sum(patching_hours(self.layers, self.heads, self.linear / max(self.layers, 1)))

    def notebook_hours(self, notebooks: int) -> float:
        """Hours for so many notebooks at their default sizes on 2 CPU cores, in proportion to the weights."""
        return notebooks * NOTEBOOK_SECONDS * self.linear / NOTEBOOK_WEIGHTS / 3600


def patching_hours(
    layers: int, heads: int, weights: float, *, tokens: int = TOKENS, teraflops: float = TERAFLOPS
) -> tuple[float, float]:
    """Hours for patching every layer of `PAIRS` pairs, and every head of two layers (paper C, experiments 3 and 4).

    Tokens to be computed, by layer, times two operations for each of the `weights` of a layer, over an assumed rate.
    """
    layers = max(layers, 1)
    later = sum(layers - layer for layer in range(layers))
    three = 2 * tokens * layers + 4 * (tokens * layers + later)
    four = 2 * tokens * layers + 3 * heads
    hours = 2 * weights * PAIRS / teraflops / 1e12 / 3600
    return three * hours, four * hours


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
    if _may_have_gpu():
        import torch

        if torch.cuda.is_available():
            free = sum(torch.cuda.mem_get_info(i)[0] for i in range(torch.cuda.device_count()))
            return free / 1e9, True
    return free_memory(), False


def free_memory() -> float:
    """Gigabytes of this machine's own memory that are free."""
    import psutil

    return float(psutil.virtual_memory().available) / 1e9


def _may_have_gpu() -> bool:
    """Whether it is worth the seconds that torch takes to ask."""
    devices = any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/kfd").exists()
    return devices or any(shutil.which(tool) for tool in ("nvidia-smi", "rocm-smi"))
