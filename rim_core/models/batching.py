"""Running a model on texts: left-padded batches with explicit positions, and nnsight's tracer for free-form work.

This is the only module that imports nnsight. The measured paths of `rim_core` use plain PyTorch hooks (see
`sites.reading`), which cost next to nothing; `trace` gives the same sites by nnsight's paths for exploration.
"""

import contextlib
import gc
import io
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import psutil
import torch
from torch import Tensor

from rim_core.errors import InputError, RimError
from rim_core.models.layout import Layout
from rim_core.texts import encode as encode
from rim_core.texts import find_span as find_span

T = TypeVar("T")


def pad_left(ids: Sequence[Sequence[int]], pad: int, device: Any = "cpu") -> dict[str, Tensor]:
    """Model inputs `input_ids`, `attention_mask`, `position_ids`, each `[prompt, width]`, padded on the left.

    Positions count from each prompt's own first token, so that a model with absolute positions gives one prompt
    the same numbers alone and in a batch.
    """
    width = max(map(len, ids))
    tokens = torch.full((len(ids), width), pad, dtype=torch.long)
    mask = torch.zeros(len(ids), width, dtype=torch.long)
    for row, sequence in enumerate(ids):
        tokens[row, width - len(sequence) :] = torch.tensor(sequence)
        mask[row, width - len(sequence) :] = 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    inputs = {"input_ids": tokens, "attention_mask": mask, "position_ids": positions}
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def pad_right(ids: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Token ids `[prompt, width]` padded on the right, and the mask of real tokens, both on the CPU."""
    width = max(map(len, ids))
    tokens = torch.full((len(ids), width), pad, dtype=torch.long)
    for row, sequence in enumerate(ids):
        tokens[row, : len(sequence)] = torch.tensor(sequence)
    lengths = torch.tensor([len(sequence) for sequence in ids])
    return tokens, torch.arange(width) < lengths[:, None]


# Shorter beginnings are not worth a pass of their own.
_WORTH_SHARING = 8


def shared_beginning(ids: Sequence[Sequence[int]], keep: int) -> int:
    """Tokens that all prompts start with, short of the last `keep` of each; 0 where sharing them does not pay."""
    if len(ids) < 2:
        return 0
    first, limit = ids[0], max(0, min(map(len, ids)) - keep)
    length = next((i for i in range(limit) if any(row[i] != first[i] for row in ids)), limit)
    return length if length >= _WORTH_SHARING else 0


def batches(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Indices of texts in batches of at most `max_tokens` padded tokens (at least one text), neighbours in length."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i], reverse=True):
        width = lengths[batch[0]] if batch else lengths[index]
        if batch and width * (len(batch) + 1) > max_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def run_batches(
    lengths: Sequence[int], max_tokens: int, run: Callable[[list[int]], T]
) -> Iterator[tuple[list[int], T]]:
    """Yield `(rows, run(rows))` a batch; where memory runs out, this batch and those that wait are halved.

    Raises:
        InputError: one text alone does not fit in memory.
    """
    waiting = list(batches(lengths, max_tokens))[::-1]
    while waiting:
        rows = waiting.pop()
        try:
            result = run(rows)
        except (RuntimeError, MemoryError) as error:
            if not _out_of_memory(error):
                raise
            if len(rows) == 1:
                raise InputError(
                    f"a text of {lengths[rows[0]]} tokens does not fit in memory: shorten it, or free memory"
                ) from None
        else:
            yield rows, result
            continue
        # Outside the handler, so that the failed pass's tensors are gone.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        waiting = [half for group in [*waiting, rows] for half in _halves(group)]


def _halves(rows: list[int]) -> list[list[int]]:
    middle = len(rows) // 2
    return [half for half in (rows[middle:], rows[:middle]) if half]


def _out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "not enough memory" in str(error)


def free_on_gpus(layout: Layout) -> int:
    """Bytes free on the fullest of the CUDA devices that hold the layers."""
    devices = {parameter.device for layer in layout.layers for parameter in itertools.islice(layer.parameters(), 1)}
    return min(torch.cuda.mem_get_info(device)[0] for device in devices if device.type == "cuda")


def token_budget(layout: Layout, device: torch.device) -> int:
    """Padded tokens that one pass may hold: working memory of at most 1 GB, and at most half of what is free."""
    if device.type == "cuda":
        free, ceiling = free_on_gpus(layout), 32768
    else:
        free, ceiling = psutil.virtual_memory().available, 4096
    width = layout.n_heads * layout.head_dim
    values = 8 * layout.d_model + 4 * (layout.d_mlp or 4 * layout.d_model) + 4 * width
    cached = 2 * len(layout.layers) * layout.n_kv_heads * layout.head_dim
    return max(256, min(ceiling, int(min(1e9, free / 2) / (4 * (values + cached)))))


def nnsight_model(hf: Any, tokenizer: Any) -> Any:
    """The model wrapped by nnsight; its trace gives the Hugging Face forward bit for bit."""
    from nnsight import TransformersModel

    return TransformersModel(hf, tokenizer=tokenizer)


def remote_model(repository: str, revision: str | None, tokenizer: Any) -> Any:
    """A model hosted at NDIF under nnsight: its modules without weights, by which traces name what they read.

    Raises:
        InputError: its configuration cannot be read, or is of no causal language model.
    """
    from nnsight import TransformersModel

    try:
        return TransformersModel(repository, revision=revision, task="text-generation", tokenizer=tokenizer)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"cannot read the configuration of {repository}: {_one_line(error)}") from None


def require_key() -> None:
    """Refuse to go to NDIF without a key; the key is read where the user put it, and kept nowhere else.

    Raises:
        InputError: there is none.
    """
    from nnsight import CONFIG

    # Read from the environment by nnsight only when it is imported.
    CONFIG.API.APIKEY = os.environ.get("NDIF_API_KEY") or CONFIG.API.APIKEY
    CONFIG.APP.REMOTE_LOGGING = False
    if not CONFIG.API.APIKEY:
        raise InputError("NDIF wants a key: set NDIF_API_KEY, or give yours once to `nnsight login`")


def require_hosted(repository: str, revision: str | None) -> None:
    """Refuse a model that is not running at NDIF.

    Raises:
        InputError: no key, or the model is not there now.
        RimError: the service cannot be reached.
    """
    require_key()
    from nnsight import CONFIG, ndif

    with contextlib.redirect_stderr(io.StringIO()):  # nnsight prints what is told below
        deployed = ndif.status(raw=True).get("deployments")
    if deployed is None:
        raise RimError(f"NDIF cannot be reached at {CONFIG.API.HOST}: check the network, or try again later")
    running = [one for one in deployed.values() if one.get("application_state") == "RUNNING"]
    wanted = (repository.lower(), revision or "main")
    if not any((one["repo_id"].lower(), one.get("revision") or "main") == wanted for one in running):
        names = ", ".join(sorted({one["repo_id"] for one in running})) or "none"
        raise InputError(
            f"{repository} is not running at NDIF now; these are: {names}; choose one, or load the model without remote"
        )


@contextlib.contextmanager
def remote_errors(name: str) -> Iterator[None]:
    """Whatever goes wrong in a trace at NDIF, as one line without the key."""
    from nnsight import CONFIG

    try:
        yield
    except Exception as error:
        told = _one_line(error).replace(CONFIG.API.APIKEY or "\0", "***")
        raise RimError(f"NDIF did not do the work on {name}: {told}; try again, or see its status page") from None


def _one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # A traceback from there ends with what happened.
    return lines[-1][:300] if lines else type(error).__name__
