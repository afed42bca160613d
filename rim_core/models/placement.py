"""Where a model's weights go: one device, or the layers over several GPUs where one is too small."""

from typing import TYPE_CHECKING, Any

from rim_core.errors import InputError
from rim_core.suites.checkpoints import read_checkpoint

if TYPE_CHECKING:
    import torch

# Kept free on each GPU for what tools and adapters take beside the weights, in bytes; at most this share of it.
_ROOM, _ROOM_SHARE = 2e9, 0.2


def settings(
    ref: str,
    source: tuple[str, str | None],
    quantization: str | None,
    dtype: "torch.dtype",
    device: str,
    where: "torch.device",
    device_map: str | None,
) -> dict[str, Any]:
    """What `from_pretrained` is told of devices, before any weight is read.

    Args:
        ref: the model's name, for messages.
        source: its folder or repository, and its revision.
        device: as asked for; `"auto"` on CUDA may become several.
        where: the one device otherwise.
        device_map: `"auto"` for all CUDA devices there are; `None` for one, if one is enough.

    Raises:
        InputError: a `device_map` that is neither, or a model that all GPUs together do not hold.
    """
    import torch

    if device_map not in (None, "auto"):
        raise InputError(
            f"unknown device_map {device_map!r}: choose 'auto', or None for one device where that is enough"
        )
    if device_map and device != "auto":
        raise InputError(f"device_map='auto' and device={device!r} contradict each other: give one of them")
    one = {"device_map": {"": str(where)}}
    if device != "auto" or where.type != "cuda" or torch.cuda.device_count() < 2:
        return one
    free = [torch.cuda.mem_get_info(number)[0] for number in range(torch.cuda.device_count())]
    checkpoint = read_checkpoint(*source)
    assert checkpoint is not None, "None is for look-ups that stay offline"
    # The arithmetic for a GPU is in numbers of 2 bytes.
    needed = checkpoint.size.gigabytes(quantization or "none", gpu=dtype is not torch.float32) * 1e9
    if device_map is None and needed <= free[torch.cuda.current_device()]:
        return one
    if needed > sum(free):
        raise InputError(
            f"{ref} is too large: it needs {needed / 1e9:.0f} GB, and {len(free)} GPUs have {sum(free) / 1e9:.0f} GB "
            "free; pack it (quantization='nf4'), or use more or larger GPUs"
        )
    share = {number: int(there - min(_ROOM, _ROOM_SHARE * there)) for number, there in enumerate(free)}
    return {"device_map": "auto", "max_memory": share}


def require_all_on_gpus(hf: Any, ref: str) -> None:
    """Refuse a model that did not fit after all: tools read weights where they are, and none may be elsewhere.

    Raises:
        InputError: some modules were left on the CPU or on disk.
    """
    placed = getattr(hf, "hf_device_map", {})
    left = [name for name, device in placed.items() if device in ("cpu", "disk")]
    if len(set(placed.values())) > 1 and left:
        raise InputError(
            f"{ref} does not fit on the GPUs: there was no place for {left[0]}; pack it (quantization='nf4'), or use "
            "more or larger GPUs"
        )
