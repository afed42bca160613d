"""Reading activations: batched, left-padded, bounded in memory, streamed to safetensors when asked."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rim_core import checking
from rim_core.errors import InputError, first_line
from rim_core.identity import digest, libraries, science
from rim_core.models.batching import encode, pad_left, run_batches, shared_beginning, token_budget
from rim_core.models.beginnings import padded_right
from rim_core.models.layout import SITES, reading
from rim_core.models.loading import Model
from rim_core.paths import cache_dir


@dataclass(frozen=True)
class Activations:
    """Captured activations, float32 on the CPU, indexed by site.

    `acts["resid_post"]` is `[prompt, layer, d_model]`, `acts["head_z"]` `[prompt, layer, head, head_dim]`,
    `acts["mlp_neurons"]` `[prompt, layer, d_mlp]`. With several positions there is a position axis after the
    prompt; with `positions="all"` it is left-padded, and `mask` `[prompt, position]` is False on the padding.
    A site streamed to disk is read from its shards when it is asked for.
    """

    sites: tuple[str, ...]
    tensors: dict[str, Tensor] = field(default_factory=dict, repr=False)
    mask: Tensor | None = field(default=None, repr=False)
    folder: Path | None = None

    def __getitem__(self, site: str) -> Tensor:
        if site not in self.sites:
            raise InputError(f"site {site!r} was not captured: this holds {', '.join(self.sites)}")
        if site in self.tensors or self.folder is None:
            return self.tensors[site]
        manifest = json.loads((self.folder / "manifest.json").read_text(encoding="utf-8"))
        result = torch.empty(manifest["shapes"][site])
        for shard in manifest["shards"]:
            with safe_open(self.folder / shard["file"], framework="pt") as stored:
                _place(result, shard["rows"], stored.get_tensor(site), manifest["ragged"])
        return result


def open_activations(folder: str | Path) -> Activations:
    """Activations that `capture(..., to=folder)` streamed; each site is read when it is indexed.

    Raises:
        InputError: the folder holds no finished capture.
    """
    folder = Path(folder)
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        raise InputError(f"{folder} holds no finished capture: run capture(..., to={str(folder)!r}) again") from None
    mask = None
    if manifest["ragged"]:
        with safe_open(folder / "mask.safetensors", framework="pt") as stored:
            mask = stored.get_tensor("mask").bool()
    return Activations(tuple(manifest["shapes"]), mask=mask, folder=folder)


def _place(result: Tensor, rows: Sequence[int], values: Tensor, ragged: bool) -> None:
    if ragged:
        result[rows, : result.shape[1] - values.shape[1]] = 0
        result[rows, result.shape[1] - values.shape[1] :] = values
    else:
        result[rows] = values


@torch.no_grad()
def capture(
    model: Model,
    texts: Sequence[str],
    sites: str | Sequence[str],
    positions: str | int | Sequence[int] = "last",
    to: str | Path | None = None,
    cache: bool = False,
    max_tokens: int | None = None,
) -> Activations:
    """Run the model on texts and keep activations of every layer.

    Args:
        model: a loaded model; the adapter and edits now active apply.
        texts: prompts as the model is to see them (see `format_chat`).
        sites: names from `sites.SITES`.
        positions: `"last"`; `"all"`; or one or several positions counted from the end (-1 is the last token),
            which every text must be long enough for.
        to: a new folder to stream safetensors shards to instead of keeping the tensors in memory.
        cache: keep the result in the cache folder under a hash of model, texts, sites and positions, and take
            it from there next time. Not under interventions: they are not part of the hash.
        max_tokens: padded tokens a forward pass; by default from the free memory. A pass that does not fit is
            halved.

    Raises:
        InputError: unknown site, position out of range, no texts, or a `to` that exists.
        IdentityError: padding changes this model's numbers.
    """
    wanted = (sites,) if isinstance(sites, str) else tuple(checking.listed(sites, "capture: sites"))
    for number, site in enumerate(wanted):
        checking.one_of(site, SITES, "site")
        if site in wanted[:number]:
            raise InputError(f"capture: site {site!r} stands twice; name each once")
    if not wanted:
        raise InputError(f"capture: no site was named; choose from {', '.join(SITES)}")
    if max_tokens is not None:
        max_tokens = checking.whole(max_tokens, "capture: max_tokens", 1)
    model.require("capture", "padding")
    ids = encode(model, texts)
    picked = _positions(positions, ids)
    if cache and model.edits:
        raise InputError("capture(cache=True) inside an intervention: the cache does not know it; use cache=False")
    if cache:
        folder = cache_dir() / "activations" / _key(model, ids, wanted, picked)
        if not (folder / "manifest.json").is_file():
            _stream(model, ids, wanted, picked, folder, max_tokens)
        stored = open_activations(folder)
        return Activations(wanted, {site: stored[site] for site in wanted}, stored.mask)
    if to is not None:
        folder = Path(to)
        if folder.exists():
            raise InputError(f"{folder} exists: give capture a new folder, or remove that one")
        _stream(model, ids, wanted, picked, folder, max_tokens)
        return open_activations(folder)
    tensors = {site: torch.empty(shape) for site, shape in _shapes(model, ids, wanted, picked).items()}
    for rows, found in _passes(model, ids, wanted, picked, max_tokens):
        for site, values in found.items():
            _place(tensors[site], rows, values, picked is None)
    return Activations(wanted, tensors, _mask(ids) if picked is None else None)


def _positions(positions: str | int | Sequence[int], ids: list[list[int]]) -> list[int] | int | None:
    """A single position, a list of them, or None for all; negative, from the end."""
    if isinstance(positions, str):
        if positions not in ("last", "all"):
            raise InputError(f"unknown positions {positions!r}: 'last', 'all', or whole numbers below 0")
        return -1 if positions == "last" else None
    chosen = checking.whole_numbers(positions, "positions")
    shortest = min(map(len, ids))
    for position in chosen:
        if not -shortest <= position < 0:
            raise InputError(f"position {position} is out of range: count from the end, -1 to -{shortest} here")
    return chosen[0] if checking.is_whole(positions) else chosen


def _key(model: Model, ids: list[list[int]], sites: tuple[str, ...], positions: Any) -> str:
    place = "NDIF" if model.remote else str(model.device)
    machine = [place, str(torch.backends.cpu.get_cpu_capability())]
    return digest([model.identity, science(), dict(libraries()), machine, ids, sites, positions])


def _mask(ids: list[list[int]]) -> Tensor:
    width = max(map(len, ids))
    return torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in ids])


def _shapes(
    model: Model, ids: list[list[int]], sites: tuple[str, ...], picked: list[int] | int | None
) -> dict[str, list[int]]:
    inner = {"head_z": [model.n_heads, model.head_dim], "mlp_neurons": [model.d_mlp]}
    middle = [] if isinstance(picked, int) else [max(map(len, ids)) if picked is None else len(picked)]
    return {site: [len(ids), *middle, model.n_layers, *inner.get(site, [model.d_model])] for site in sites}


def _passes(
    model: Model, ids: list[list[int]], sites: tuple[str, ...], picked: list[int] | int | None, max_tokens: int | None
) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """Yield (rows, {site: [prompt, (position,) layer, ...]}) a batch; the language-model head is not run.

    A beginning that all prompts share, such as the chat template's system message, is run once a batch and laid
    under every prompt as keys and values, where this model's cache can be (identity `cache_batch`). The rest is then
    padded on the right: no gap comes between, so sliding windows see the same distances as in a prompt alone.
    """
    if model.remote:
        for rows, found in model.remote.passes(ids, sites, picked):
            if "head_z" in sites:
                found["head_z"] = found["head_z"].unflatten(-1, (model.n_heads, model.head_dim))
            yield rows, found
        return
    shared = 0
    # An edit at given positions counts from each prompt's end, which the shared part does not have.
    whole = any(edit.positional for edit in model.edits) or not model.checks["cache_batch"].holds
    if picked is not None and not whole:
        shared = shared_beginning(ids, -picked if isinstance(picked, int) else -min(picked))
    pad = model.tokenizer.pad_token_id

    def run(rows: list[int]) -> dict[str, Tensor]:
        batch = [ids[row][shared:] for row in rows]
        ends: Tensor | None = None
        if shared:
            inputs, ends = padded_right(model.layout.body, ids[0][:shared], batch, pad, model.device)
        else:
            inputs = {**pad_left(batch, pad, model.device), "use_cache": False}
        with reading(model.layout, sites, lambda tensor: _pick(tensor, picked, ends)) as found:
            model.layout.body(**inputs)
        axis = 1 if isinstance(picked, int) else 2
        stacked = {}
        for site in sites:
            values = torch.stack([found.pop((site, layer)) for layer in range(model.n_layers)], dim=axis)
            if picked is None:
                padding = inputs["attention_mask"].cpu() == 0
                values.masked_fill_(padding.unflatten(-1, (-1, 1, 1)), 0.0)
            if site == "head_z":
                values = values.unflatten(-1, (model.n_heads, model.head_dim))
            stacked[site] = checking.finite(values, f"capture: {site}", axis, "layer")
        return stacked

    budget = max_tokens or token_budget(model.layout, model.device)
    yield from run_batches([len(row) - shared for row in ids], budget, run)


def _pick(tensor: Tensor, picked: list[int] | int | None, ends: Tensor | None) -> Tensor:
    """A copy of the asked-for positions of a module's tensor, float32 on the CPU.

    `ends` are the prompts' ends where they are padded on the right. Indexing with tensors or lists copies; a
    slice or a whole tensor may be changed in place by the model later, and is cloned.
    """
    if picked is None:
        chosen = tensor.clone()
    elif ends is None:
        chosen = tensor[:, picked].clone()
    elif isinstance(picked, int):
        chosen = tensor[torch.arange(len(tensor)), ends + picked]
    else:
        chosen = tensor[torch.arange(len(tensor))[:, None], ends[:, None] + torch.tensor(picked)]
    return chosen.to("cpu", torch.float32)


def _stream(
    model: Model,
    ids: list[list[int]],
    sites: tuple[str, ...],
    picked: list[int] | int | None,
    folder: Path,
    max_tokens: int | None,
) -> None:
    """One shard a batch into a temporary sibling, renamed when the last one is written."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        working = Path(tempfile.mkdtemp(prefix=f".{folder.name[:16]}.", dir=folder.parent))
    except OSError as error:
        raise InputError(f"cannot write activations to {folder}: {error.strerror}") from None
    try:
        shards = []
        for number, (rows, found) in enumerate(_passes(model, ids, sites, picked, max_tokens)):
            name = f"shard-{number:05d}.safetensors"
            save_file({site: values.contiguous() for site, values in found.items()}, working / name)
            shards.append({"file": name, "rows": rows})
        if picked is None:
            save_file({"mask": _mask(ids).to(torch.uint8)}, working / "mask.safetensors")
        shapes = _shapes(model, ids, sites, picked)
        manifest = {"shapes": shapes, "ragged": picked is None, "shards": shards, "model": model.identity}
        (working / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
        try:
            os.replace(working, folder)
        except OSError:
            # Another process finished the same capture first; its result is this one.
            if not (folder / "manifest.json").is_file():
                raise
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or first_line(error)
        raise InputError(
            f"cannot write activations to {folder}: {why}; free space there, or leave out `to` and cache=True"
        ) from None
    finally:
        shutil.rmtree(working, ignore_errors=True)
