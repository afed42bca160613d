"""Layers that have seen an input before and are as they were then need not see it again.

Where models differ from some layer on, as roles with adapters in the upper layers do, or a graft and what it is put
into (see `Model.graft`), everything below that layer computes the same. `Model.remembering` keeps what each layer made
of a batch, and a later pass over the same batch begins at the first layer that is another. What comes out is the same,
bit for bit: the same modules run on the same tensors.
"""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from rim_core.models.model import Model

# Bytes; beyond this all is forgotten.
_LIMIT = 2_000_000_000
# Of as many adapters at most a layer's output of one batch is kept: where more than that differ, the next will too.
_VARIANTS = 4


class Memory:
    """What layers made of batches: by batch, then by depth and what lay below it then."""

    def __init__(self) -> None:
        self.kept: dict[Hashable, dict[tuple[int, Hashable], Any]] = {}
        self.size = 0
        self.closed = False

    def add(self, batch: Hashable, place: tuple[int, Hashable], output: Any) -> None:
        """Keep a layer's output, a tensor or what the family's layers give instead."""
        if sum(depth == place[0] for depth, _ in self.kept.get(batch, ())) >= _VARIANTS:
            return
        self.size += sum(t.numel() * t.element_size() for t in _tensors(output))
        if self.size > _LIMIT:
            self.kept, self.size = {}, 0
        else:
            self.kept.setdefault(batch, {})[place] = output

    def close(self) -> None:
        """Forget all and keep nothing more, in whichever models hold it."""
        self.kept, self.size, self.closed = {}, 0, True


def _tensors(output: Any) -> list[Tensor]:
    return [each for each in (output if isinstance(output, tuple) else (output,)) if isinstance(each, Tensor)]


@contextmanager
def resuming(model: "Model", batch: Hashable) -> Iterator[None]:
    """Within the context one pass of the body over a batch begins at the first layer that is not as it was.

    Without `Model.remembering`, inside an intervention and where gradients are taken, it begins at the first. The keys
    and values of layers that were left out are not in the pass's cache, which is good for nothing but the pass.

    Args:
        model: a loaded model.
        batch: all that decides what the pass is given.
    """
    memory = model.memory
    if memory is None or memory.closed or model.edits or torch.is_grad_enabled():
        yield
        return
    layers, below = model.layout.layers, model.below()
    known = memory.kept.get(batch, {})
    start = max((depth for depth in range(len(layers) + 1) if (depth, below[depth]) in known), default=0)
    replaced: list[tuple[Any, Any]] = []

    def put(layer: Any, forward: Callable[..., Any]) -> None:
        replaced.append((layer, vars(layer).get("forward")))
        layer.forward = forward

    for number, layer in enumerate(layers):
        place = (number + 1, below[number + 1])
        if number < start:
            put(layer, _giving(known[place]))
        elif not model.grafted:
            put(layer, _noting(layer.forward, memory, batch, place))
    try:
        yield
    finally:
        for layer, own in replaced:
            if own is None:
                del layer.forward
            else:
                layer.forward = own


def _giving(output: Any) -> Callable[..., Any]:
    return lambda *_, **__: output


def _noting(
    forward: Callable[..., Any], memory: Memory, batch: Hashable, place: tuple[int, Hashable]
) -> Callable[..., Any]:
    def noted(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        memory.add(batch, place, output)
        return output

    return noted
