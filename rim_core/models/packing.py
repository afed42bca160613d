"""bitsandbytes as this project uses it: imported without its noise, its 4-bit weights left as they were packed."""

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

# Where, and how it begins, that bitsandbytes misses a kernel from the hub, which serves repacked weights alone.
_LOGGER, _NOISE = "bitsandbytes.backends.cpu.ops", "Failed to load CPU gemm_4bit_forward"


@contextlib.contextmanager
def quiet_import() -> Iterator[None]:
    """Within the context bitsandbytes is imported without its advice, on some processors, to install a kernel.

    The kernel is one for weights that were repacked (see `keep_packed`), and here none are. Whatever else
    bitsandbytes says is heard.
    """

    def wanted(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(_NOISE)

    logger = logging.getLogger(_LOGGER)
    logger.addFilter(wanted)
    try:
        yield
    finally:
        logger.removeFilter(wanted)


def import_bitsandbytes() -> Any:
    """The module bitsandbytes; called before transformers or PEFT import it in their own time."""
    with quiet_import():
        import bitsandbytes
    return bitsandbytes


def keep_packed(hf: Any) -> Any:
    """Let no 4-bit module of a model that was just loaded repack its weights; give the model.

    On a processor with AVX512-BF16 bitsandbytes repacks 4-bit weights in place at the first forward pass on the
    CPU. From then on that pass computes in bfloat16, and gradients and dequantised weights are silently wrong.
    Copies of a module and adapters around it keep what is set here; modules made later do not have it.
    """
    module: Any
    for module in hf.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return hf
