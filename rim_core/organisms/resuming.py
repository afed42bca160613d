"""What a training that was stopped goes on from, kept in one file beside its adapter-to-be."""

import contextlib
import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save

from rim_core.errors import RimError

_EVERY = 60.0  # seconds of training that a kill may cost


class Kept:
    """The state of one training: its step, the adapter's weights and the optimiser's, exactly as they were.

    A training that goes on from it ends in the same bits as one that was never stopped. The file is safetensors,
    with whatever is no tensor as JSON in its header.

    Args:
        path: of the file, which is there only while a training is unfinished.
        what: all that the training depends on; a state of another is passed over.
        every: seconds between two states.
    """

    def __init__(self, path: Path, what: str, every: float = _EVERY) -> None:
        self.path, self.step = path, 0
        self._what, self._every, self._last = what, every, time.monotonic()
        self._parts: dict[str, Any] = {}

    def begin(self, plan: str, parts: dict[str, Any]) -> int:
        """Put the kept state into `parts`, objects with `load_state_dict`; give its step, 0 where there is none.

        `plan` is all that `what` does not name, such as the batches.
        """
        self._what = hashlib.sha256(f"{self._what}\n{plan}".encode()).hexdigest()
        self._parts, self._last = parts, time.monotonic()
        try:
            with safe_open(self.path, framework="pt") as file:
                header = file.metadata() or {}
                if header.get("what") != self._what:
                    return 0
            tensors = load(self.path.read_bytes())
        except (OSError, SafetensorError):  # not there, cut short, or not such a file
            return 0
        states = _joined(json.loads(header["states"]), tensors)
        for name, part in parts.items():
            part.load_state_dict(states[name])
        self.step = int(header["step"])
        return self.step

    def keep(self, step: int) -> None:
        """Write the state after `step`, if the last was written long enough ago; raises RimError if it cannot."""
        if time.monotonic() - self._last < self._every:
            return
        tensors: dict[str, torch.Tensor] = {}
        states = _parted({name: part.state_dict() for name, part in self._parts.items()}, tensors)
        header = {"what": self._what, "step": str(step), "states": json.dumps(states)}
        content = save(tensors, header)
        beside = self.path.with_name(f"{self.path.name}.tmp")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with beside.open("wb") as file:
                file.write(content)
                os.fsync(file.fileno())
            beside.replace(self.path)
        except OSError as error:
            with contextlib.suppress(OSError):
                beside.unlink(missing_ok=True)
            raise RimError(
                f"cannot keep the training's state in {self.path.parent}: {error.strerror}; mend that and give the "
                f"same command again, which goes on {self.place}"
            ) from None
        self.step, self._last = step, time.monotonic()

    @property
    def place(self) -> str:
        """Where a training that stops now goes on."""
        return f"from step {self.step}" if self.step else "from the beginning"

    def discard(self) -> None:
        """Remove the file of a training that is finished."""
        self.path.unlink(missing_ok=True)


# A state as JSON: each value in a list behind its kind, since JSON knows no whole numbers as keys, tuples or tensors.


def _parted(value: Any, tensors: dict[str, torch.Tensor]) -> list[Any]:
    """A state without its tensors, which go into `tensors` under their numbers."""
    if isinstance(value, torch.Tensor):
        tensors[str(len(tensors))] = value.detach().cpu().contiguous().clone()
        return ["tensor", str(len(tensors) - 1)]
    if isinstance(value, dict):
        return ["dict", [[key, _parted(item, tensors)] for key, item in value.items()]]
    if isinstance(value, (list, tuple)):
        return [type(value).__name__, [_parted(item, tensors) for item in value]]
    return ["value", value]


def _joined(parted: list[Any], tensors: dict[str, torch.Tensor]) -> Any:
    kind, value = parted
    if kind == "tensor":
        return tensors[value]
    if kind == "dict":
        return {key: _joined(item, tensors) for key, item in value}
    if kind in ("list", "tuple"):
        items = [_joined(item, tensors) for item in value]
        return tuple(items) if kind == "tuple" else items
    return value
