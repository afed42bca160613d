"""Reading activations: batched, left-padded, bounded in memory, streamed to safetensors when asked."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from rim_core import checking
from rim_core.errors import InputError
from rim_core.identity import digest, libraries, science
from rim_core.models.batching import batches, run_batches, token_budget
from rim_core.models.hooks import reading
from rim_core.models.layout import SITES
from rim_core.models.model import Model
from rim_core.models.padding import Positions, pad_left, padded_right, shared_beginning
from rim_core.models.padding import positions as positions_of
from rim_core.models.remembering import resuming
from rim_core.paths import cache_dir, put_whole, read_json, write_json
from rim_core.texts import checked, encode

_MANIFEST, _MASK = "manifest.json", "mask.safetensors"
# Activations that `measure` holds at a time, in numbers.
_HELD = 2**27


@dataclass(frozen=True, eq=False)
class Activations:
    """Captured activations, float32 on the CPU, indexed by site.

    `acts["resid_post"]` is `[prompt, layer, d_model]`, `acts["head_z"]` `[prompt, layer, head, head_dim]`,
    `acts["mlp_neurons"]` `[prompt, layer, d_mlp]`. With several positions there is a position axis after the
    prompt; with `positions="all"` it is left-padded. A site streamed to disk is read from its shards when it is asked
    for.

    Attributes:
        sites: the sites that were captured.
        tensors: what is in memory, by site.
        mask: bool `[prompt, position]`, False on padding; None but for `positions="all"`.
        folder: where the rest is, None where all is in memory.

    Example:
        >>> acts = rim.capture(model, texts, ["resid_post", "head_z"])
        >>> acts
        Activations(resid_post [4, 3, 32], head_z [4, 3, 4, 8])
        >>> acts["resid_post"].shape
        torch.Size([4, 3, 32])
    """

    sites: tuple[str, ...]
    tensors: dict[str, Tensor] = field(default_factory=dict)
    mask: Tensor | None = None
    folder: Path | None = None

    def __getitem__(self, site: str) -> Tensor:
        if site not in self.sites:
            raise InputError(f"site {site!r} was not captured: this holds {', '.join(self.sites)}")
        if site in self.tensors or self.folder is None:
            return self.tensors[site]
        manifest = _read_manifest(self.folder)
        result = torch.empty(manifest["shapes"][site])
        for shard in manifest["shards"]:
            with safe_open(self.folder / shard["file"], framework="pt") as stored:
                _place(result, shard["rows"], stored.get_tensor(site), manifest["ragged"])
        return result

    def __repr__(self) -> str:
        shapes = {site: list(tensor.shape) for site, tensor in self.tensors.items()}
        shapes |= _read_manifest(self.folder)["shapes"] if self.folder else {}
        return f"Activations({', '.join(f'{site} {shapes[site]}' for site in self.sites)})"


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        return read_json(folder / _MANIFEST)
    except InputError:
        raise InputError(f"{folder} holds no finished capture: run capture(..., to={str(folder)!r}) again") from None


def open_activations(folder: str | Path) -> Activations:
    """Activations that `capture(..., to=folder)` streamed; each site is read when it is indexed.

    Args:
        folder: where they were streamed to.

    Raises:
        InputError: the folder holds no finished capture.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> with tempfile.TemporaryDirectory() as place:
        ...     _ = rim.capture(model, texts, "mlp_out", to=Path(place) / "acts")
        ...     rim.activations.open_activations(Path(place) / "acts")
        Activations(mlp_out [4, 3, 32])
    """
    folder = Path(folder)
    manifest = _read_manifest(folder)
    mask = None
    if manifest["ragged"]:
        with safe_open(folder / _MASK, framework="pt") as stored:
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
    *,
    positions: Positions = "last",
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

    Example:
        >>> rim.capture(model, texts, "resid_post")["resid_post"].shape
        torch.Size([4, 3, 32])
        >>> rim.capture(model, texts, "head_z", positions=[-2, -1])["head_z"].shape
        torch.Size([4, 2, 3, 4, 8])
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
    work = _Work(model, ids, wanted, _picked(positions, ids), max_tokens)
    if cache and model.edits:
        raise InputError("capture(cache=True) inside an intervention: the cache does not know it; use cache=False")
    if cache:
        folder = cache_dir() / "activations" / work.key()
        if not (folder / _MANIFEST).is_file():
            work.stream(folder)
        stored = open_activations(folder)
        return Activations(wanted, {site: stored[site] for site in wanted}, stored.mask)
    if to is not None:
        folder = Path(to)
        if folder.exists():
            raise InputError(f"{folder} exists: give capture a new folder, or remove that one")
        work.stream(folder)
        return open_activations(folder)
    tensors = {site: torch.empty(shape) for site, shape in work.shapes().items()}
    for rows, found in work.passes():
        for site, values in found.items():
            _place(tensors[site], rows, values, work.picked is None)
    return Activations(wanted, tensors, work.mask())


def _picked(positions: Positions, ids: Sequence[Sequence[int]]) -> list[int] | int | None:
    """A single position, a list of them, or None for all; negative, from the end."""
    if isinstance(positions, str) and positions == "all":
        return None
    single = isinstance(positions, str) or checking.is_whole(positions)
    rows = positions if single else checking.whole_numbers(positions, "positions")
    chosen = positions_of(rows, [len(row) for row in ids])[0]
    return chosen[0] if single else chosen


@dataclass(frozen=True)
class _Work:
    """One call of `capture`, checked; `picked` is as `_picked` gives it."""

    model: Model
    ids: list[list[int]]
    sites: tuple[str, ...]
    picked: list[int] | int | None
    max_tokens: int | None

    def key(self) -> str:
        """What the activations depend on, as a hash."""
        place = "NDIF" if self.model.remote else str(self.model.device)
        machine = [place, str(torch.backends.cpu.get_cpu_capability())]
        versions = [science(), dict(libraries())]
        return digest([self.model.identity, *versions, machine, self.ids, self.sites, self.picked])

    def mask(self) -> Tensor | None:
        if self.picked is not None:
            return None
        width = max(map(len, self.ids))
        return torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in self.ids])

    def shapes(self) -> dict[str, list[int]]:
        model, ids, picked = self.model, self.ids, self.picked
        inner = {"head_z": [model.n_heads, model.head_dim], "mlp_neurons": [model.d_mlp]}
        middle = [] if isinstance(picked, int) else [max(map(len, ids)) if picked is None else len(picked)]
        return {site: [len(ids), *middle, model.n_layers, *inner.get(site, [model.d_model])] for site in self.sites}

    @property
    def axis(self) -> int:
        """Where the layers are put."""
        return 1 if isinstance(self.picked, int) else 2

    def passes(self) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
        """Yield (rows, {site: [prompt, (position,) layer, ...]}) a batch; the language-model head is not run.

        A beginning that all prompts share, such as the chat template's system message, is run once a batch and laid
        under every prompt as keys and values, where this model's cache can be (identity `cache_batch`). The rest is
        then padded on the right: no gap comes between, so sliding windows see the same distances as in a prompt alone.
        """
        model, ids, picked = self.model, self.ids, self.picked
        if model.remote:
            yield from model.remote.passes(ids, self.sites, picked)
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
            known = (shared, *(tuple(ids[row]) for row in rows))
            # What is inside a layer that is left out cannot be read.
            outside = set(self.sites) <= {"resid_pre", "resid_post"}
            with (
                reading(model.layout, self.sites, lambda tensor: _pick(tensor, picked, ends)) as found,
                resuming(model, known) if outside else nullcontext(),
            ):
                model.layout.body(**inputs)
            stacked = {}
            for site in self.sites:
                values = torch.stack([found.pop((site, layer)) for layer in range(model.n_layers)], dim=self.axis)
                if picked is None:
                    padding = inputs["attention_mask"].cpu() == 0
                    values.masked_fill_(padding.unflatten(-1, (-1, 1, 1)), 0.0)
                if site == "head_z":
                    values = values.unflatten(-1, (model.n_heads, model.head_dim))
                stacked[site] = checking.finite(values, f"capture: {site}", self.axis, "layer")
            return stacked

        budget = self.max_tokens or token_budget(model.layout, model.device)
        yield from run_batches([len(row) - shared for row in ids], budget, run)

    def stream(self, folder: Path) -> None:
        """One shard a batch; the folder is there when the last one is written."""
        shards = []
        try:
            with put_whole(folder) as working:
                for number, (rows, found) in enumerate(self.passes()):
                    name = f"shard-{number:05d}.safetensors"
                    save_file({site: values.contiguous() for site, values in found.items()}, working / name)
                    shards.append({"file": name, "rows": rows})
                if (mask := self.mask()) is not None:
                    save_file({"mask": mask.to(torch.uint8)}, working / _MASK)
                ragged = self.picked is None
                manifest = {"shapes": self.shapes(), "ragged": ragged, "shards": shards, "model": self.model.identity}
                write_json(working / _MANIFEST, manifest)
        except InputError:
            # Another process finished the same capture first; its result is this one.
            if not (folder / _MANIFEST).is_file():
                raise


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


def measure(
    model: Model,
    texts: Sequence[str],
    sites: Sequence[str],
    positions: Positions,
    read: Callable[[Activations], dict[str, Tensor]],
) -> tuple[tuple[int, ...], dict[str, Tensor]]:
    """The positions read, counted from the end, and `read` of the texts' activations, put together by text.

    The tensors are `[prompt, (position,) ...]`, NaN where "all" positions have padding. Never all activations are held
    at once.

    Args:
        model: a loaded model.
        texts: as in `capture`.
        sites: as in `capture`.
        positions: as in `capture`.
        read: gives tensors `[prompt, (position,) ...]` by name.
    """
    texts = checked(texts)
    ids = encode(model, texts)
    picked = _picked(positions, ids)
    if picked is None:
        kept = [len(row) for row in ids]
        listed = tuple(range(-max(kept), 0))
    else:
        listed = (picked,) if isinstance(picked, int) else tuple(picked)
        kept = [len(listed)] * len(ids)
    a_token = len(sites) * model.n_layers * max(model.d_model, model.n_heads * model.head_dim)
    result: dict[str, Tensor] = {}
    for rows in batches(kept, max(1, _HELD // a_token)):
        acts = capture(model, [texts[row] for row in rows], sites, positions=positions)
        for name, values in read(acts).items():
            if acts.mask is not None:
                padded = values.new_full((len(rows), len(listed), *values.shape[2:]), torch.nan)
                padded[:, -values.shape[1] :][acts.mask] = values[acts.mask]
                values = padded
            whole = result.setdefault(name, values.new_empty(len(ids), *values.shape[1:]))
            whole[rows] = values
    return listed, result


def drawn(positions: Sequence[int], position: int | None, caller: str) -> int:
    """The position to draw, by default the last one read; raises InputError in the caller's name for any other."""
    chosen = positions[-1] if position is None else position
    if chosen not in positions:
        raise InputError(f"{caller}: position {chosen} was not read; this holds {', '.join(map(str, positions))}")
    return chosen
