"""Edits of activations while a model runs: the one mechanism under ablation, steering and splicing.

An edit holds for every forward pass inside its context, whoever starts it: capture, patching, generation, or a
plain call of the Hugging Face model. It is told which token each slot of the pass holds, so that an edit of
"the last prompt token" means the same in a padded batch, in a decoding step, and in a patched run.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rim_core.checking import shown, whole_numbers
from rim_core.errors import InputError
from rim_core.models.layout import SITES, tensor_of
from rim_core.models.loading import Model


@dataclass(frozen=True)
class Frame:
    """Which token each slot of a forward pass holds, counted from the prompt's end.

    -1 is the prompt's last token, 0, 1, ... are generated tokens. `queries` is `[batch, slot]`, `keys`
    `[batch, key]`: what the slots can attend to, cached tokens first.
    """

    queries: Tensor
    keys: Tensor

    def on(self, device: torch.device) -> "Frame":
        """The same frame on the device of the layer that it is to be compared with."""
        return Frame(self.queries.to(device), self.keys.to(device))


@dataclass(frozen=True)
class Edit:
    """One site of one layer: `apply(values, positions)` gives the new values `[batch, slot, width]`.

    `positions` is `Frame.queries`. Heads come flat, `[..., n_heads * head_dim]`. `apply` must not change its
    input in place. `positional`: whether `apply` looks at the positions. `lowest`: the position that every text must be
    long enough for, 0 for none.
    """

    site: str
    layer: int
    apply: Callable[[Tensor, Tensor], Tensor]
    positional: bool = False
    lowest: int = 0


@dataclass(frozen=True)
class MaskEdit:
    """The attention mask of one layer: `apply(mask, frame)` gives the new additive mask.

    The mask comes as `[batch, 1, slot, key]`, 0 where attention is allowed; the result may have a head axis. `lowest`
    is as in `Edit`.
    """

    layer: int
    apply: Callable[[Tensor, Frame], Tensor]
    lowest: int = 0
    positional: bool = field(default=True, init=False)


def at(positions: Tensor, wanted: str | int | Sequence[int]) -> Tensor:
    """Which slots are meant, bool `[batch, slot]`: "all", "last" (of the prompt), "answer", or positions from its end.

    "answer" is where the answer's tokens are chosen: the prompt's last token and every generated one. Generated
    tokens belong to "all" and "answer" only.

    Raises:
        InputError: any other word, or a position that is not below 0.
    """
    if isinstance(wanted, str) and wanted == "all":
        return torch.ones_like(positions, dtype=torch.bool)
    if isinstance(wanted, str) and wanted == "answer":
        return positions >= -1
    try:
        chosen = [-1] if isinstance(wanted, str) and wanted == "last" else whole_numbers(wanted, "positions", high=-1)
    except InputError:
        raise InputError(
            f"unknown positions {shown(wanted)}: 'last', 'all', 'answer', or whole numbers below 0 (-1 is the last "
            "token)"
        ) from None
    return torch.isin(positions, torch.tensor(chosen, device=positions.device))


def lowest(*wanted: str | int | Sequence[int]) -> int:
    """The lowest position that is named by its number, 0 where none is (see `at`)."""
    numbers = [n for one in wanted if not isinstance(one, str) for n in whole_numbers(one, "positions")]
    return min(numbers, default=0)


def edit_at(positions: str | int | Sequence[int], site: str, layer: int, change: Callable[[Tensor], Tensor]) -> Edit:
    """An edit that puts `change(values)` at the chosen positions (see `at`) and leaves the others as they are."""
    if isinstance(positions, str) and positions == "all":
        return Edit(site, layer, lambda values, _: change(values))
    at(torch.tensor([[-1]]), positions)  # what it cannot mean is refused here, not in the first pass

    def apply(values: Tensor, slots: Tensor) -> Tensor:
        return torch.where(at(slots, positions)[..., None], change(values), values)

    return Edit(site, layer, apply, positional=True, lowest=lowest(positions))


def by_layer(model: Model, direction: Any) -> Tensor:
    """A direction `[d_model]`, or one a layer `[layer, d_model]`, as float32 `[layer, d_model]` where the model is.

    Raises:
        InputError: another shape, numbers that are not finite, or a direction of length 0.
    """
    try:
        given = torch.as_tensor(direction, dtype=torch.float32).to(model.device)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        raise InputError(f"direction must be a tensor of real numbers, not {shown(direction)}") from None
    whole = (model.n_layers, model.d_model)
    if given.shape not in (whole[1:], whole):
        raise InputError(
            f"direction has shape {list(given.shape)}: {model.name} takes [{whole[1]}], or one a layer {list(whole)}"
        )
    rows = given.expand(whole)
    if bad := [layer for layer, row in enumerate(rows) if not 0 < row.norm() < torch.inf]:
        raise InputError(f"the direction of layer {bad[0]} is zero or not finite: it points nowhere")
    return rows


class _Tracker:
    """Works out the frame of each pass of the body from the cache's length: prompt first, then decoding steps.

    A prompt that is too short for a position in `lowest` is refused: an edit there would do nothing, unseen.
    """

    def __init__(self, lowest: int) -> None:
        self.frame: Frame | None = None
        self.width: int | None = None
        self.lowest = lowest

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = kwargs.get("input_ids", args[0] if args else None)
        given = kwargs["inputs_embeds"] if given is None else given
        batch, slots = given.shape[:2]
        past = kwargs.get("past_key_values")
        cached = past.get_seq_length() if past is not None else 0
        if cached == 0 or self.width is None:
            self.width = cached + slots
            self._refuse_short(slots if cached == 0 else None, kwargs.get("attention_mask"))
        keys = torch.arange(cached + slots, device=given.device) - self.width
        self.frame = Frame(keys[cached:].expand(batch, -1), keys.expand(batch, -1))

    def _refuse_short(self, slots: int | None, mask: Any) -> None:
        if slots is None or not self.lowest:
            return
        known = isinstance(mask, Tensor) and mask.dim() == 2
        shortest = int(mask.sum(dim=1).min()) if known else slots
        if self.lowest < -shortest:
            raise InputError(
                f"position {self.lowest} is out of range: the shortest text here has {shortest} tokens; count from its "
                f"end, -1 to -{shortest}"
            )


class _Hooks:
    """The hooks of some edits, which can be taken off the model's modules and put on those that it has by then."""

    def __init__(self, model: Model, edits: Sequence[Edit | MaskEdit]) -> None:
        self.model, self.edits = model, edits
        self._tracker = _Tracker(min((edit.lowest for edit in edits), default=0))
        self._handles: list[Any] = []

    def _frame(self) -> Frame:
        found = self.model.frame or self._tracker.frame
        assert found is not None, "a layer ran outside the model's body"
        return found

    def put(self) -> None:
        layout = self.model.layout
        inputs = {"resid_pre": layout.layers, "head_z": layout.attention_out}
        outputs = {"resid_post": layout.layers, "attn_out": layout.attention, "mlp_out": layout.mlp}
        handles = self._handles
        handles.append(layout.body.register_forward_pre_hook(self._tracker, with_kwargs=True))
        for edit in self.edits:
            if isinstance(edit, MaskEdit):
                hook = _mask_hook(edit, self._frame)
                handles.append(layout.attention[edit.layer].register_forward_pre_hook(hook, with_kwargs=True))
            elif edit.site == "mlp_neurons" or edit.site in inputs:
                neurons = edit.site == "mlp_neurons"
                module = layout.down_projection(edit.layer) if neurons else inputs[edit.site][edit.layer]
                hook = _input_hook(edit, self._frame)
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            else:
                module = outputs[edit.site][edit.layer]
                handles.append(module.register_forward_hook(_output_hook(edit, self._frame)))

    def remove(self) -> None:
        while self._handles:
            self._handles.pop().remove()


@contextlib.contextmanager
def editing(model: Model, edits: Sequence[Edit | MaskEdit]) -> Iterator[Model]:
    """Within the context the edits hold, with whatever adapter is active; contexts nest, the inner one's edits come
    after the outer one's.

    Raises:
        InputError: an unknown site, or a layer that the model does not have.
    """
    for edit in edits:
        if isinstance(edit, Edit) and edit.site not in SITES:
            raise InputError(f"unknown site {edit.site!r}: choose from {', '.join(SITES)}")
        if not 0 <= edit.layer < model.n_layers:
            raise InputError(f"layer {edit.layer} is out of range: {model.name} has layers 0 to {model.n_layers - 1}")
        attention = model.hf.config.get_text_config()._attn_implementation
        if isinstance(edit, MaskEdit) and attention not in ("eager", "sdpa"):
            raise InputError(f"attention {attention!r} takes no mask of one's own: load with 'sdpa' or 'eager'")
    hooks = _Hooks(model, edits)
    try:
        hooks.put()
        model.hooks.append(hooks)
        model.edits.extend(edits)
        try:
            yield model
        finally:
            del model.edits[len(model.edits) - len(edits) :]
            model.hooks.remove(hooks)
    finally:
        hooks.remove()


def _edited(edit: Edit, values: Tensor, frame: Frame) -> Tensor:
    return edit.apply(values, frame.on(values.device).queries)


def _input_hook(edit: Edit, frame: Callable[[], Frame]) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (_edited(edit, args[0], frame()), *args[1:]), kwargs
        name = "hidden_states" if "hidden_states" in kwargs else next(iter(kwargs))
        return args, {**kwargs, name: _edited(edit, kwargs[name], frame())}

    return hook


def _output_hook(edit: Edit, frame: Callable[[], Frame]) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        edited = _edited(edit, tensor_of(output), frame())
        return (edited, *output[1:]) if isinstance(output, tuple) else edited

    return hook


def _mask_hook(edit: MaskEdit, frame: Callable[[], Frame]) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        if "attention_mask" not in kwargs:
            raise InputError(f"{type(module).__name__} takes no attention mask by name: it cannot be edited")
        mask, seen = kwargs["attention_mask"], frame().on(hidden.device)
        if mask is not None:
            # A layer with a sliding window caches its last keys only.
            seen = Frame(seen.queries, seen.keys[:, -mask.shape[-1] :])
        mask = additive_mask(mask, seen, hidden.dtype)
        return args, {**kwargs, "attention_mask": edit.apply(mask, seen)}

    return hook


def additive_mask(mask: Tensor | None, frame: Frame, dtype: torch.dtype) -> Tensor:
    """A layer's mask as numbers to add to the scores, `[batch, 1, slot, key]`; no mask means causal attention."""
    if mask is None:
        mask = (frame.keys[:, None, :] <= frame.queries[:, :, None])[:, None]
    if mask.dtype == torch.bool:
        # Not minus infinity: a padded slot sees nothing, and its softmax must stay a number.
        lowest = torch.finfo(dtype).min
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, lowest)
    return mask
