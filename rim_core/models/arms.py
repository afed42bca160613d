"""Several interventions side by side: one pass in which each row has the edits of its own arm."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

from torch import Tensor

from rim_core.checking import listed, shown
from rim_core.errors import InputError
from rim_core.models.hooks import Edit, Frame, MaskEdit, applying
from rim_core.models.model import Model

Arm = AbstractContextManager[Any] | Sequence[AbstractContextManager[Any]] | None


def edits_of(model: Model, arm: Arm, number: int) -> list[Edit | MaskEdit]:
    """The edits that the contexts of an arm would make, taken without leaving them on the model.

    Raises:
        InputError: what is no context, one that was entered before, or that makes no edit.
    """
    contexts: list[Any] = [] if arm is None else [arm] if hasattr(arm, "__enter__") else listed(arm, f"arm {number}")
    before, identity = len(model.edits), model.identity
    with ExitStack() as entered:
        for context in contexts:
            made = len(model.edits)
            if not hasattr(context, "__enter__"):
                raise InputError(f"arm {number} is {shown(context)}: give an intervention such as rim.ablate(...)")
            try:
                entered.enter_context(context)
            except AttributeError as error:
                # What contextlib says of a context that was entered before.
                if "'args'" not in str(error):
                    raise
                raise InputError(f"arm {number} was used before: make its intervention anew for each call") from None
            if model.identity != identity:
                raise InputError(
                    f"arm {number} switches the adapter: arms are interventions on one; loop over adapters"
                )
            if len(model.edits) == made:
                raise InputError(f"arm {number} makes no edit of rim's: give interventions such as rim.ablate(...)")
        return list(model.edits[before:])


def merged(arms: Sequence[Sequence[Edit | MaskEdit]], rows: Callable[[], Mapping[int, Tensor]]) -> list[Any]:
    """Edits that do to each arm's rows what its own edits would do alone, in their order.

    Args:
        arms: the edits of each.
        rows: gives the rows of the pass now running, by arm; an arm that has none may be missing.
    """
    places: dict[tuple[str, int], list[tuple[int, Any]]] = {}
    for arm, edits in enumerate(arms):
        for edit in edits:
            site = edit.site if isinstance(edit, Edit) else ""
            places.setdefault((site, edit.layer), []).append((arm, edit))
    made: list[Any] = []
    for (site, layer), parts in places.items():
        if site:
            change = _values([(arm, applying(edit)) for arm, edit in parts], rows)
            made.append(Edit(site, layer, change, positional=True))
        else:
            made.append(MaskEdit(layer, _mask(parts, rows)))
    return made


def _values(
    parts: Sequence[tuple[int, Callable[[Tensor, Tensor], Tensor]]], rows: Callable[[], Mapping[int, Tensor]]
) -> Callable[[Tensor, Tensor], Tensor]:
    def apply(values: Tensor, positions: Tensor) -> Tensor:
        new, by_arm = values.clone(), rows()
        for arm, change in parts:
            if arm in by_arm:
                own = by_arm[arm].to(values.device)
                new[own] = change(new[own], positions[own])
        return new

    return apply


def _mask(
    parts: Sequence[tuple[int, MaskEdit]], rows: Callable[[], Mapping[int, Tensor]]
) -> Callable[[Tensor, Frame], Tensor]:
    def apply(mask: Tensor, frame: Frame) -> Tensor:
        by_arm = rows()
        new = mask.expand(len(frame.queries), *mask.shape[1:]).clone()
        for arm, edit in parts:
            if arm in by_arm:
                own = by_arm[arm].to(mask.device)
                edited = edit.apply(new[own], Frame(frame.queries[own], frame.keys[own]))
                if edited.shape[1] > new.shape[1]:  # by head
                    new = new.expand(-1, edited.shape[1], -1, -1).clone()
                new[own] = edited
        return new

    return apply
