"""Reading and editing activations while a model runs, by hooks that are gone when their context is left.

`reading` is the one mechanism under capture and patching; `editing` the one under ablation, steering and splicing, and
`edit` its short form for a function of one's own. An edit holds for every forward pass inside its context, whoever
starts it: capture, patching, generation, or a plain call of the Hugging Face model. It is told which token each slot of
the pass holds, so that an edit of "the last prompt token" means the same in a padded batch, in a decoding step, and in
a patched run.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rim_core.checking import array, listed, shown, whole_numbers
from rim_core.errors import InputError
from rim_core.models.batching import told_of
from rim_core.models.padding import Positions

if TYPE_CHECKING:
    from rim_core.models.layout import Layout
    from rim_core.models.model import Model


def tensor_of(value: Any) -> Tensor:
    """The tensor in a module's output, which some families wrap in a tuple."""
    return value[0] if isinstance(value, tuple) else value


def pick(tensor: Tensor, *indices: Tensor) -> Tensor:
    """`tensor[indices]`, a copy, wherever the indices are: layers may be on several devices."""
    return tensor[tuple(index.to(tensor.device) for index in indices)]


def hook(point: tuple[nn.Module, bool], change: Callable[[Tensor], Tensor | None]) -> Any:
    """Register a hook at a point (see `Layout.point`); give the handle that removes it.

    Args:
        point: a module, and whether its input is meant or its output.
        change: what is called with the tensor there; it gives the new one, or None to leave it.
    """

    def on_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            new = change(args[0])
            return None if new is None else ((new, *args[1:]), kwargs)
        name = "hidden_states" if "hidden_states" in kwargs else next(iter(kwargs))
        new = change(kwargs[name])
        return None if new is None else (args, {**kwargs, name: new})

    def on_output(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        new = change(tensor_of(output))
        return (new, *output[1:]) if new is not None and isinstance(output, tuple) else new

    module, inside = point
    if inside:
        return module.register_forward_pre_hook(on_input, with_kwargs=True)
    return module.register_forward_hook(on_output)


@contextlib.contextmanager
def removing(handles: list[Any]) -> Iterator[list[Any]]:
    """Afterwards the hooks of these handles, and of those that were added to the list, are gone."""
    try:
        yield handles
    finally:
        while handles:
            handles.pop().remove()


@contextlib.contextmanager
def reading(
    layout: "Layout", sites: Sequence[str], keep: Callable[[Tensor], Tensor], layers: Sequence[int] | None = None
) -> Iterator[dict[tuple[str, int], Tensor]]:
    """Within the context each forward leaves `keep(tensor)` of every site and layer in the yielded dictionary.

    `keep` must copy (select and clone): some families add to a module's output in place afterwards. Heads come
    flat, `[..., n_heads * head_dim]`. The hooks are gone when the context is left, however it is left.

    Args:
        layout: of the model.
        sites: which to read.
        keep: what of a tensor is kept.
        layers: by default all.

    Example:
        >>> with rim.editing.reading(model.layout, ["resid_post"], lambda x: x[:, -1].clone(), [0, 1]) as found:
        ...     _ = model.hf(**model.tokenizer(texts[:1], return_tensors="pt"))
        >>> list(found[("resid_post", 1)].shape) == [1, model.d_model]
        True
    """
    found: dict[tuple[str, int], Tensor] = {}

    def keeping(site: str, layer: int) -> Callable[[Tensor], None]:
        def change(tensor: Tensor) -> None:
            found[site, layer] = keep(tensor)

        return change

    with removing([]) as handles:
        for site in sites:
            for layer in range(len(layout.layers)) if layers is None else layers:
                handles.append(hook(layout.point(site, layer), keeping(site, layer)))
        yield found


@dataclass(frozen=True)
class Frame:
    """Which token each slot of a forward pass holds, counted from the prompt's end.

    -1 is the prompt's last token, 0, 1, ... are generated tokens.

    Attributes:
        queries: `[batch, slot]`.
        keys: `[batch, key]`: what the slots can attend to, cached tokens first.

    Example:
        >>> import torch
        >>> rim.editing.Frame(torch.tensor([[0]]), torch.tensor([[-2, -1, 0]])).queries.tolist()
        [[0]]
    """

    queries: Tensor
    keys: Tensor

    def on(self, device: torch.device) -> "Frame":
        """The same frame on the device of the layer that it is to be compared with."""
        return Frame(self.queries.to(device), self.keys.to(device))


@dataclass(frozen=True)
class Edit:
    """One site of one layer, and what is put there.

    Attributes:
        site: a name from `sites.SITES`.
        layer: counted from 0.
        apply: `apply(values)` or `apply(values, positions)` gives the new values `[batch, slot, width]`; `positions`
            is `Frame.queries`. Heads come flat, `[..., n_heads * head_dim]`. It must not change its input in place.
        positional: whether `apply` looks at the positions.
        lowest: the position that every text must be long enough for, 0 for none.
        first: the lowest position that it changes; None where that may be any.

    Example:
        >>> halve = rim.editing.Edit("resid_post", 1, lambda values, positions: 0.5 * values)
        >>> with rim.editing.editing(model, halve):
        ...     acts = rim.capture(model, texts, "resid_post")
    """

    site: str
    layer: int
    apply: Callable[..., Tensor]
    positional: bool = False
    lowest: int = 0
    first: int | None = None


@dataclass(frozen=True)
class MaskEdit:
    """The attention mask of one layer, and what is put in its place.

    Attributes:
        layer: counted from 0.
        apply: `apply(mask, frame)` gives the new additive mask. The mask comes as `[batch, 1, slot, key]`, 0 where
            attention is allowed; the result may have a head axis.
        lowest, first: as in `Edit`.

    Example:
        >>> shut = rim.editing.MaskEdit(0, lambda mask, frame: mask + 0.0)
        >>> with rim.editing.editing(model, shut):
        ...     answers = rim.generate(model, texts, max_new_tokens=2)
    """

    layer: int
    apply: Callable[[Tensor, Frame], Tensor]
    lowest: int = 0
    first: int | None = None
    positional: bool = field(default=True, init=False)


def at(positions: Tensor, wanted: Positions) -> Tensor:
    """Which slots are meant, bool `[batch, slot]`: "all", "last" (of the prompt), "answer", or positions from its end.

    "answer" is where the answer's tokens are chosen: the prompt's last token and every generated one. Generated
    tokens belong to "all" and "answer" only.

    Args:
        positions: of each slot, counted from its prompt's end, -1 the last: `[batch, slot]`.
        wanted: which are meant.

    Raises:
        InputError: any other word, or a position that is not below 0.

    Example:
        >>> import torch
        >>> rim.editing.at(torch.tensor([[-2, -1, 0]]), "answer").tolist()
        [[False, True, True]]
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


def lowest(*wanted: Positions) -> int:
    """The lowest position that is named by its number, 0 where none is (see `at`)."""
    numbers = [n for one in wanted if not isinstance(one, str) for n in whole_numbers(one, "positions")]
    return min(numbers, default=0)


def first(wanted: Positions) -> int | None:
    """The lowest position that is meant, None where that is any (see `at`)."""
    return None if isinstance(wanted, str) and wanted == "all" else min(lowest(wanted), -1)


def edit_at(positions: Positions, site: str, layer: int, change: Callable[[Tensor], Tensor]) -> Edit:
    """An edit that puts `change(values)` at the chosen positions and leaves the others as they are.

    Args:
        positions: as in `at`.
        site: of the values.
        layer: of the values.
        change: gives new values of the same shape.

    Example:
        >>> with rim.editing.editing(model, rim.editing.edit_at(-1, "mlp_out", 2, lambda values: 0 * values)):
        ...     acts = rim.capture(model, texts, "mlp_out")
        >>> bool(acts["mlp_out"][:, 2].any())
        False
    """
    if isinstance(positions, str) and positions == "all":
        return Edit(site, layer, lambda values, _: change(values))
    at(torch.tensor([[-1]]), positions)  # what it cannot mean is refused here, not in the first pass

    def apply(values: Tensor, slots: Tensor) -> Tensor:
        return torch.where(at(slots, positions)[..., None], change(values), values)

    return Edit(site, layer, apply, positional=True, lowest=lowest(positions), first=first(positions))


def by_layer(model: "Model", direction: Any) -> Tensor:
    """A direction `[d_model]`, or one a layer `[layer, d_model]`, as float32 `[layer, d_model]` where the model is.

    Raises:
        InputError: another shape, numbers that are not finite, or a direction of length 0.
    """
    given = torch.as_tensor(array(direction, "direction", ndim=(1, 2), finite=False), dtype=torch.float32)
    whole = (model.n_layers, model.d_model)
    if given.shape not in (whole[1:], whole):
        raise InputError(
            f"direction has shape {list(given.shape)}: {model.name} takes [{whole[1]}], or one a layer {list(whole)}"
        )
    rows = given.to(model.device).expand(whole)
    if bad := [layer for layer, row in enumerate(rows) if not 0 < row.norm() < torch.inf]:
        raise InputError(f"the direction of layer {bad[0]} is zero or not finite: it points nowhere")
    return rows


def refuse_short(lowest: int, shortest: int) -> None:
    """Raise InputError where a text is too short for a position: an edit there would do nothing, unseen."""
    if lowest < -shortest:
        raise InputError(
            f"position {lowest} is out of range: the shortest text here has {shortest} tokens; count from its end, -1 "
            f"to -{shortest}"
        )


class _Tracker:
    """Works out the frame of each pass of the body from the cache's length: prompt first, then decoding steps.

    Where a tool says by `model.frame` which tokens its pass holds, that counts.
    """

    def __init__(self, model: "Model", lowest: int) -> None:
        self.model = model
        self.frame: Frame | None = None
        self.width: int | None = None
        self.lowest = lowest

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.model.frame:
            return
        given = kwargs.get("input_ids", args[0] if args else None)
        given = kwargs["inputs_embeds"] if given is None else given
        batch, slots = given.shape[:2]
        past = kwargs.get("past_key_values")
        cached = past.get_seq_length() if past is not None else 0
        if cached == 0 or self.width is None:
            self.width = cached + slots
            mask = kwargs.get("attention_mask")
            shortest = int(mask.sum(dim=1).min()) if isinstance(mask, Tensor) and mask.dim() == 2 else slots
            if cached == 0:
                refuse_short(self.lowest, shortest)
        keys = torch.arange(cached + slots, device=given.device) - self.width
        self.frame = Frame(keys[cached:].expand(batch, -1), keys.expand(batch, -1))


class _Hooks:
    """The hooks of some edits, which can be taken off the model's modules and put on those that it has by then."""

    def __init__(self, model: "Model", edits: Sequence[Edit | MaskEdit]) -> None:
        self.model, self.edits = model, edits
        self._tracker = _Tracker(model, min((edit.lowest for edit in edits), default=0))
        self._handles: list[Any] = []

    def _frame(self) -> Frame:
        found = self.model.frame or self._tracker.frame
        assert found is not None, "a layer ran outside the model's body"
        return found

    def put(self) -> None:
        layout, handles = self.model.layout, self._handles
        handles.append(layout.body.register_forward_pre_hook(self._tracker, with_kwargs=True))
        for edit in self.edits:
            if isinstance(edit, MaskEdit):
                masked = _mask_hook(edit, self._frame)
                handles.append(layout.attention[edit.layer].register_forward_pre_hook(masked, with_kwargs=True))
            else:
                edited = partial(self._edited, applying(edit))
                handles.append(hook(layout.point(edit.site, edit.layer), edited))

    def _edited(self, apply: Callable[[Tensor, Tensor], Tensor], values: Tensor) -> Tensor:
        return apply(values, self._frame().on(values.device).queries)

    def remove(self) -> None:
        while self._handles:
            self._handles.pop().remove()


def applying(edit: Edit) -> Callable[[Tensor, Tensor], Tensor]:
    """`apply(values, positions)` of an edit; it raises InputError where what it makes cannot take their place."""
    told, where = _takes_positions(edit.apply), f"the edit at {edit.site}, layer {edit.layer}"

    def apply(values: Tensor, slots: Tensor) -> Tensor:
        return _called((lambda x: edit.apply(x, slots)) if told else edit.apply, values, where)

    return apply


def _called(function: Callable[[Tensor], Any], x: Tensor, where: str) -> Tensor:
    """What a function makes of `x`; raises InputError where that cannot take its place."""
    x = x.clone() if x.is_inference() else x  # tensors of inference mode do not count their changes
    before = None if x.is_inference() else x._version
    new = function(x)
    if before is not None and x._version != before:
        raise InputError(f"{where} changes its input in place: begin with x = x.clone(), and return the new value")
    wanted = f"give a tensor {list(x.shape)} of {x.dtype}, as it was given"
    if new is None:
        raise InputError(f"{where} returns nothing: is a return missing? {wanted}")
    if not isinstance(new, Tensor):
        raise InputError(f"{where} returns a {type(new).__name__}: {wanted}")
    if new.shape != x.shape or new.dtype != x.dtype:
        raise InputError(f"{where} returns a tensor {list(new.shape)} of {new.dtype}: {wanted}")
    return new


@contextlib.contextmanager
def editing(model: "Model", edits: Edit | MaskEdit | Sequence[Edit | MaskEdit]) -> Iterator["Model"]:
    """Within the context the edits hold, with whatever adapter is active; contexts nest, the inner one's edits come
    after the outer one's.

    Args:
        model: a loaded model.
        edits: one edit or several, made in this order.

    Raises:
        InputError: what is no edit, an unknown site, or a layer that the model does not have; inside, an edit that
            gives no tensor of the shape and dtype that it was given, or changes that in place.

    Example:
        >>> shift = rim.editing.edit_at("last", "resid_pre", 0, lambda values: values + 1)
        >>> with rim.editing.editing(model, [shift]):
        ...     answers = rim.generate(model, texts, max_new_tokens=2)
    """
    single = isinstance(edits, Edit | MaskEdit) or callable(edits)
    made: list[Any] = [edits] if single else listed(edits, "editing: edits")
    if wrong := [one for one in made if not (isinstance(one, Edit | MaskEdit) and callable(one.apply))]:
        raise InputError(
            f"editing: give Edit(site, layer, function), one or several, not {shown(wrong[0])}; for a function alone "
            "there is rim.edit(model, function, layers=...)"
        )
    model.checked_layers([edit.layer for edit in made]) if made else None
    attention = model.hf.config.get_text_config()._attn_implementation
    if attention not in ("eager", "sdpa") and any(isinstance(edit, MaskEdit) for edit in made):
        raise InputError(f"attention {attention!r} takes no mask of one's own: load with 'sdpa' or 'eager'")
    hooks = _Hooks(model, made)
    try:
        hooks.put()
        model.hooks.append(hooks)
        model.edits.extend(made)
        try:
            yield model
        finally:
            del model.edits[len(model.edits) - len(made) :]
            model.hooks.remove(hooks)
    finally:
        hooks.remove()


@contextlib.contextmanager
def edit(
    model: "Model",
    fn: Callable[..., Tensor],
    *,
    layers: int | Sequence[int] | None,
    site: str = "resid_post",
    positions: Positions = "all",
) -> Iterator["Model"]:
    """Within the context `fn` is put on a site of some layers: a hook of your own, in every tool.

    It holds in `generate`, `capture`, `patch` and plain calls of `model.hf`, and nests with other interventions.
    Without `with` nothing happens: the call alone puts no hook.

    Args:
        model: a loaded model.
        fn: `fn(x)` or `fn(x, positions)` gives the new value of `x` `[batch, position, ...]`, in its shape and dtype:
            `[..., d_model]`, `[..., head, head_dim]` at `head_z`, `[..., d_mlp]` at `mlp_neurons`. `positions`
            `[batch, position]` counts from the prompt's end: -1 is its last token, 0 the first generated one, and
            padding lies before the prompt. It must treat each position alone, since a pass may hold a part of the
            prompt only, or many patched runs side by side: choose positions by `positions`, and not by `x[:, -1]`.
        layers: one or several, counted from 0; None is all.
        site: a name from `sites.SITES`.
        positions: where the new value is taken, and the old one stays elsewhere: `"all"`, `"last"`, `"answer"` (the
            last token and all that are generated), or one or several positions from the prompt's end.

    Raises:
        InputError: an unknown site, layer or position; inside, a function that fails, returns nothing or something of
            another shape or dtype, changes `x` in place, or makes numbers that are not finite.

    Example:
        >>> import torch
        >>> with rim.edit(model, torch.zeros_like, layers=0, site="head_z"):
        ...     z = rim.capture(model, texts, "head_z")["head_z"]
        >>> bool(z[:, 0].any()), bool(z[:, 1].any())
        (False, True)
        >>> with rim.edit(model, lambda x: 1.1 * x, layers=[0, 1], positions="answer"):
        ...     answers = rim.generate(model, texts, max_new_tokens=2)
    """
    if not callable(fn):
        raise InputError(f"rim.edit: fn must be a function of x, or of x and positions, not {shown(fn)}")
    at(torch.tensor([[-1]]), positions)
    made = [_by_function(model, fn, site, layer, positions) for layer in model.checked_layers(layers)]
    with editing(model, made):
        yield model


def _by_function(model: "Model", fn: Callable[..., Tensor], site: str, layer: int, positions: Positions) -> Edit:
    where, told = f"rim.edit: the function at {site}, layer {layer},", _takes_positions(fn)

    def apply(values: Tensor, slots: Tensor) -> Tensor:
        x = values.unflatten(-1, (model.n_heads, model.head_dim)) if site == "head_z" else values
        with told_of(f"{where} fails on x {list(x.shape)}"):
            new = _called(lambda x: fn(x, slots) if told else fn(x), x, where)
        new = torch.where(at(slots, positions).view(*slots.shape, *[1] * (x.dim() - 2)), new, x)
        if not bool(new.isfinite().all()) and bool(x.isfinite().all()):
            raise InputError(f"{where} makes numbers that are NaN or infinite of finite ones")
        return new.view_as(values)

    # Always positional: a function that looks at the last slot is then right in `capture` and `generate` at least.
    return Edit(site, layer, apply, positional=True, lowest=lowest(positions), first=first(positions))


def _takes_positions(fn: Callable[..., Tensor]) -> bool:
    """Whether a function wants the positions too: it has a second argument without a default, or one of that name."""
    try:
        given = list(inspect.signature(fn).parameters.values())
    except (TypeError, ValueError):  # torch's own functions
        return False
    by_place = [one for one in given if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)][1:2]
    return any(one.default is one.empty or one.name == "positions" for one in by_place)


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
