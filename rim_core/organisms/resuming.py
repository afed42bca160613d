"""What a training that was stopped goes on from, kept in one file beside its adapter-to-be."""

import contextlib
import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from rim_core.errors import RimError, first_line

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

    def __init__(self, path: Path, what: str, *, every: float = _EVERY) -> None:
        self.path, self.step = path, 0
        self._what, self._every = what, every

    def begin(
        self,
        plan: str,
        weights: Sequence[torch.Tensor],
        optimizer: torch.optim.Optimizer,
        schedule: torch.optim.lr_scheduler.LRScheduler,
    ) -> int:
        """Put the kept state into a training; give its step, 0 where there is none.

        `plan` is all that `what` does not name, such as the batches.
        """
        self._what = hashlib.sha256(f"{self._what}\n{plan}".encode()).hexdigest()
        self._weights, self._optimizer, self._schedule = weights, optimizer, schedule
        self._last = time.monotonic()
        try:
            with safe_open(self.path, framework="pt") as file:
                header = file.metadata() or {}
                if header.get("what") != self._what:
                    return 0
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError):  # not there, cut short, or not such a file
            return 0
        state: dict[int, dict[str, torch.Tensor]] = {}
        for name, tensor in tensors.items():
            kind, number = name.split(".")
            if kind == "weight":
                weights[int(number)].data.copy_(tensor)
            else:
                state.setdefault(int(number), {})[kind] = tensor
        optimizer.load_state_dict({"state": state, "param_groups": json.loads(header["groups"])})
        schedule.load_state_dict(json.loads(header["schedule"]))
        self.step = int(header["step"])
        return self.step

    def keep(self, step: int) -> None:
        """Write the state after `step`, if the last was written long enough ago; raises RimError if it cannot."""
        if time.monotonic() - self._last < self._every:
            return
        state = self._optimizer.state_dict()
        tensors = {f"weight.{number}": weight.detach() for number, weight in enumerate(self._weights)}
        tensors |= {f"{kind}.{number}": found for number, own in state["state"].items() for kind, found in own.items()}
        header = {
            "what": self._what,
            "step": str(step),
            "groups": json.dumps(state["param_groups"]),
            "schedule": json.dumps(self._schedule.state_dict()),
        }
        beside = self.path.with_name(f"{self.path.name}.tmp")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            save_file(tensors, beside, header)
            beside.replace(self.path)
        except (OSError, SafetensorError) as error:
            with contextlib.suppress(OSError):
                beside.unlink(missing_ok=True)
            problem = getattr(error, "strerror", None) or first_line(error)
            raise RimError(
                f"cannot keep the training's state in {self.path.parent}: {problem}; mend that and give the same "
                f"command again, which goes on {self.place}"
            ) from None
        self.step, self._last = step, time.monotonic()

    @property
    def place(self) -> str:
        """Where a training that stops now goes on."""
        return f"from step {self.step}" if self.step else "from the beginning"

    def discard(self) -> None:
        """Remove the file of a training that is finished."""
        self.path.unlink(missing_ok=True)
