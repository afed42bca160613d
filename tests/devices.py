"""Several devices on a machine that has one: tensors that know which device they are on, and refuse to mix.

`spread` leaves a model as `device_map="auto"` does on two GPUs: by accelerate's own hooks, with the later layers,
final norm and head on the second device. Inside `Devices()` an operation on tensors of two devices raises, as CUDA's
do. The CPU does the arithmetic, so numbers can be compared.
"""

from typing import Any

import torch
from accelerate import dispatch_model
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map_only

from rim_core.models.model import Model

# A device type that PyTorch knows, that needs no driver, and whose gradients run on the CPU's thread.
FIRST, SECOND = "lazy:0", "lazy:1"
# Their indices may be on the CPU, whatever they index.
_INDEXING = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")


class Placed(Tensor):
    """A tensor said to be on a device; `inner` holds its numbers."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor, device: torch.device) -> "Placed":
        shape = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        made = Tensor._make_wrapper_subclass(cls, inner.size(), device=device, **shape)
        made.inner = inner
        return made

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def __repr__(self, **_: Any) -> str:
        return f"Placed({tuple(self.shape)}, {self.device})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class Devices(TorchFunctionMode):
    """Within it tensors are made on the devices that are named.

    What PyTorch makes of Python numbers past all operations, it makes on the CPU here and then moves.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor):
            device = kwargs.pop("device", None)
            made = func(*args, **kwargs)
            return made if device is None else made.to(device)
        if func in (Tensor.__getitem__, Tensor.__setitem__) and isinstance(args[0], Placed):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            index = tuple(torch.tensor(part) if isinstance(part, list) else part for part in index)
            return func(args[0], index, *args[2:])
        if func is Tensor.tolist and isinstance(args[0], Placed):
            return args[0].inner.tolist()
        return func(*args, **kwargs)

    def __enter__(self) -> "Devices":
        self._operations = _Operations()
        self._operations.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._operations.__exit__(*error)


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    device = _device(func, args, kwargs)
    if kwargs.get("device") is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    inner = tree_map_only(Placed, lambda t: t.inner, (args, kwargs))
    with _disable_current_modes():
        out = func(*inner[0], **inner[1])
    if device.type == "cpu":
        return out
    out = tree_map_only(Tensor, lambda t: Placed(t, device), out)
    return return_and_correct_aliasing(func, args, kwargs, out)


def _device(func: Any, args: Any, kwargs: Any) -> torch.device:
    """Where the result is; raises RuntimeError where tensors are on several devices, as CUDA does."""
    tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
    name = func.name().split(".")[0]
    if kwargs.get("device") is not None:
        return torch.device(kwargs["device"])
    if name == "aten::copy_":
        return tensors[0].device
    # A number without axes may come from the CPU.
    found = {t.device for t in tensors if t.dim()} or {t.device for t in tensors}
    if name in _INDEXING and tensors[0].device.type != "cpu":
        found -= {torch.device("cpu")}
    if len(found) > 1:
        raise RuntimeError(f"{func}: tensors on different devices, {sorted(map(str, found))}")
    return next(iter(found), torch.device("cpu"))


def spread(model: Model, boundary: int = 1) -> Model:
    """Put the layers from `boundary` on and the final norm on the second device, and the head where it is not tied."""
    names = {module: name for name, module in model.hf.named_modules()}
    layout, embedding = model.layout, model.hf.get_input_embeddings()
    placed = {names[layer]: SECOND if i >= boundary else FIRST for i, layer in enumerate(layout.layers)}
    stack = names[layout.layers[0]].rsplit(".", 1)[0]
    for name, module in layout.body.named_children():
        if (path := f"{names[layout.body]}.{name}") != stack:
            placed[path] = SECOND if module is layout.final_norm else FIRST
    placed[names[layout.lm_head]] = FIRST if layout.lm_head.weight is embedding.weight else SECOND
    with Devices():
        # As transformers does; the cache stays where each layer put its part of it.
        dispatch_model(model.hf, placed, skip_keys=model.hf._skip_keys_device_placement)
    return model
