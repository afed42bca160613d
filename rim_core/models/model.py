"""A model in memory: one (quantised) base, its adapters swapped in place, and what was measured of it."""

import contextlib
import os
import tempfile
import warnings
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from rim_core.checking import listed, number, whole, whole_numbers
from rim_core.errors import InputError, RimWarning
from rim_core.identity import adapter_identity, digest
from rim_core.models import checks
from rim_core.models import remote as far
from rim_core.models.adapters import Swap, attach, mixed, put_in, refuse_unscalable, scaled, take_out, write_between
from rim_core.models.checks import Checks
from rim_core.models.layout import find_layout
from rim_core.models.remembering import Memory
from rim_core.paths import did_you_mean
from rim_core.suites.checkpoints import adapter_folder
from rim_core.suites.schema import Suite


@dataclass(frozen=True)
class _Adapted:
    """The base with one adapter, or bare: what it computes, the modules to put in, and what was measured of it."""

    identity: str
    layout: Any
    swaps: tuple[Swap, ...] = ()
    checks: Checks = field(default_factory=Checks)
    scale: float = 1.0
    grafted: bool = False


class Model:
    """A checked causal language model: one (quantised) base in memory, adapters swapped in place.

    Attributes:
        hf: the Hugging Face model.
        name: what it was loaded as.
        tokenizer: its tokenizer, padding on the left.
        suite: the suite it came from, or None.
        role: the role now active, or None.
        quantization, dtype, device: as loaded.
        layout: the modules and shapes, with the adapter now active.
        checks: each identity's measured error, by name, with the adapter now active.
        edits: the interventions now active (see `editing`).
        frame: the tokens of the pass now running, where it is not a plain one.
        remote: where the model runs at NDIF, the way to it; `hf` and `device` are then refused.

    Example:
        >>> model.n_layers, model.n_heads, model.d_model
        (3, 4, 32)
        >>> model.checks["lens"].holds
        True
        >>> with model.using(None):
        ...     acts = rim.capture(model, texts, "resid_post")
    """

    def __init__(
        self,
        hf: Any,
        tokenizer: Any,
        name: str,
        base_identity: str,
        quantization: str | None,
        dtype: torch.dtype,
        suite: Suite | None = None,
        remote: far.Remote | None = None,
        own_role: str | None = None,
    ) -> None:
        self.remote = remote
        self._hf, self.tokenizer, self.name, self.suite = hf, tokenizer, name, suite
        self.quantization, self.dtype = quantization, dtype
        # A role that is a checkpoint of its own: these weights are that role's, and no other's.
        self.role, self._own_role = own_role, own_role
        self._base_identity = base_identity
        self._bare = _Adapted("none", remote.layout if remote else find_layout(hf))
        self._adapted: dict[str, _Adapted] = {}
        self._active = self._bare
        self._views: dict[str, Any] = {}
        self.memory: Memory | None = None
        self.edits: list[Any] = []
        self.hooks: list[Any] = []
        # `using` and `bare` now entered: until they are left, these weights are not free for another role.
        self.entered = 0
        self.frame: Any = None

    n_layers = property(lambda self: len(self.layout.layers), doc="Decoder layers.")
    n_heads = property(lambda self: self.layout.n_heads, doc="Query heads a layer.")
    n_kv_heads = property(lambda self: self.layout.n_kv_heads, doc="Key-value heads a layer.")
    head_dim = property(lambda self: self.layout.head_dim, doc="Width of one head.")
    d_model = property(lambda self: self.layout.d_model, doc="Width of the residual stream.")
    d_mlp = property(lambda self: self.layout.d_mlp, doc="MLP neurons a layer.")

    @property
    def hf(self) -> Any:
        """The Hugging Face model; raises InputError where its weights are not here."""
        if self.remote:
            raise far.refusal("this tool")
        self._refuse_let_go()
        return self._hf

    def _refuse_let_go(self) -> None:
        if self._hf is None and not self.remote:
            raise InputError(
                f"{self.name} was let go when rim.roles went on to the next role: use each model inside the loop"
            )

    @property
    def layout(self) -> Any:
        """The modules that are read and written, and the shapes (see `models.layout.Layout`)."""
        self._refuse_let_go()
        return self._active.layout

    @property
    def checks(self) -> Checks:
        """Each identity's measured error, by name, with the adapter now active."""
        return self._active.checks

    @property
    def device(self) -> torch.device:
        """Where the first layer's inputs go."""
        return self.hf.get_input_embeddings().weight.device

    @property
    def own_checkpoint(self) -> str | None:
        """The checkpoint that these weights are, if they are a role's own and not the suite's base."""
        return self.suite.role(self._own_role).checkpoint if self.suite and self._own_role else None

    @property
    def spread(self) -> bool:
        """Whether the layers lie on several devices."""
        return len({parameter.device for layer in self.layout.layers for parameter in layer.parameters()}) > 1

    @property
    def identity(self) -> str:
        """Hash of base, active adapter, quantisation and dtype, by content: equal for equal functions."""
        return digest([self._base_identity, self._active.identity, str(self.quantization), str(self.dtype)])

    def checked_layers(self, layers: int | Sequence[int] | None, *, lowest: int = 0) -> tuple[int, ...]:
        """The layers asked for, each `lowest` to the last; None is all of these.

        Raises:
            InputError: no layer, or one that there is not.
        """
        if layers is None:
            return tuple(range(lowest, self.n_layers))
        if isinstance(layers, str):
            raise InputError(f"layers must be whole numbers, not {layers!r}; None is all layers")
        chosen = tuple(whole_numbers(layers, "layers"))
        if wrong := [layer for layer in chosen if not lowest <= layer < self.n_layers]:
            raise InputError(
                f"layer {wrong[0]} is out of range: {self.name} has layers {lowest} to {self.n_layers - 1}"
            )
        return chosen

    def checked_layer(self, layer: int | None) -> int:
        """The one layer asked for; None is the last. Raises InputError where there is none such."""
        return self.checked_layers(self.n_layers - 1 if layer is None else whole(layer, "layer"))[0]

    def require(self, tool: str, *identities: str) -> None:
        """Raise IdentityError unless these identities held when the model was loaded, InputError if it is far away."""
        if self.remote and tool not in far.TOOLS:
            raise far.refusal(tool)
        self._refuse_let_go()
        checks.require(self.checks, self.name, tool, identities)

    @property
    def nnsight(self) -> Any:
        """The model with the adapter now active under nnsight, for traces written by hand:
        `with model.nnsight.trace(texts): ...`. Ask for it again after a switch.
        """
        if self.remote:
            return self.remote.wrapped
        key = self._active.identity
        if key not in self._views:
            self._views[key] = far.nnsight_model(self.hf, self.tokenizer)
        return self._views[key]

    @contextlib.contextmanager
    def using(
        self,
        role_or_adapter: str | os.PathLike[str] | None,
        *,
        scale: float = 1.0,
        origin: str | os.PathLike[str] | None = None,
    ) -> Iterator["Model"]:
        """Within the context the same base runs with another adapter; None is the bare base. Nests.

        Inside, the model is PEFT's own for that adapter; outside, it is what it was, bit for bit. Interventions now
        active hold inside too.

        Args:
            role_or_adapter: a role of the suite, a folder with an adapter, or None.
            scale: by which what a LoRA adds is multiplied: 0 is the base's numbers, 1 the adapter's, 2 twice its dose.
            origin: from where the dose counts, a role or a folder as well; None is the bare base. With another adapter,
                each module adds `1 - scale` of what the origin's adds and `scale` of the adapter's: 0 is the origin, 1
                the adapter, 2 as far again.

        Raises:
            InputError: unknown role, one whose weights are not these (a checkpoint of its own: see `roles`), or an
                adapter that is none, does not fit, cannot be had exactly, or cannot be scaled.
        """
        scale = number(scale, "using: scale")
        with self._back_afterwards():
            if origin is None or scale == 1:
                self._switch(role_or_adapter, scale)
            else:
                self._activate(*self._between(origin, role_or_adapter, scale))
            yield self

    @contextlib.contextmanager
    def graft(
        self,
        role_or_adapter: str | os.PathLike[str] | None,
        *,
        layers: int | Sequence[int] | None = None,
        modules: Sequence[str] | None = None,
    ) -> Iterator["Model"]:
        """Within the context some modules run with another adapter, the others with the one now active. Nests.

        Where two adapters of one base part, this is the exact causal map of it: what the model does with one layer or
        module of the other fine-tuning in place, and nothing else changed. The identities (see `checks`) are those
        measured of the adapter now active.

        Args:
            role_or_adapter: whose modules to put in: a role of the suite, a folder with an adapter, or None for the
                bare base's.
            layers: in which layers; None is all.
            modules: by their names, as `"q_proj"`, or `"attention"` and `"mlp"` for all that is in them; None is all
                that either adapter changes.

        Raises:
            InputError: see `using`; also a layer that there is not, or a module that neither adapter changes.

        Example:
            >>> with model.graft(None, layers=[1]):
            ...     acts = rim.capture(model, texts, "resid_post")
        """
        wanted, within = self._found(role_or_adapter)[0], self.checked_layers(layers)
        active = scaled(self._active.swaps, self._active.scale)
        chosen = self._chosen(
            [*active, *wanted.swaps],
            None if layers is None else within,
            None if modules is None else listed(modules, "graft: modules"),
        )
        swaps = mixed(active, wanted.swaps, lambda swap: (id(swap.parent), swap.name) in chosen)
        places = [sorted(within), sorted(modules) if modules is not None else None]
        identity = digest([self._active.identity, wanted.identity, places])
        with self._back_afterwards():
            whole = _Adapted(identity, self._layout_with(swaps), swaps, self.checks, grafted=True)
            self._activate(whole, self.role)
            yield self

    @property
    def grafted(self) -> bool:
        """Whether a graft is active."""
        return self._active.grafted

    @contextlib.contextmanager
    def remembering(self) -> Iterator["Model"]:
        """Within the context `refusal_log_odds`, `log_likelihood` and `capture` of the residual stream, of texts that
        were seen before, begin at the first layer that is not what it was then: the same numbers, sooner, where roles
        or grafts differ in upper layers. `rim.roles(model)` hands it on. It takes memory, at most 2 GB, for what each
        layer makes of each text.

        Example:
            >>> with model.remembering():
            ...     first, again = (rim.refusal_log_odds(model, texts, [5, 17]) for _ in range(2))
            >>> bool((first == again).all())
            True
        """
        before, memory = self.memory, Memory()
        self.memory = memory
        try:
            yield self
        finally:
            memory.close()  # roles that were gone to inside hold it too
            self.memory = before

    def below(self) -> list[Hashable]:
        """Of each depth, 0 to the number of layers, what adapters have put into the layers below it: equal where these
        compute the same.
        """
        places = {id(module): n for n, layer in enumerate(self.layout.layers) for module in layer.modules()}
        found: list[set[Hashable]] = [set() for _ in range(self.n_layers + 1)]
        for swap in self._active.swaps:
            scaling = tuple(sorted((swap.factors or {}).items()))
            # What is put into no layer, such as into the embedding, lies below all.
            for depth in range(places.get(id(swap.parent), -1) + 1, self.n_layers + 1):
                found[depth].add((id(swap.adapted), scaling, self._active.scale))
        return [frozenset(each) for each in found]

    def _chosen(
        self, swaps: Sequence[Swap], layers: Sequence[int] | None, modules: Sequence[str] | None
    ) -> set[tuple[int, str]]:
        """The places of adapters that layers and modules name, by the identity of what they are in and their name."""

        def inside(*roots: torch.nn.Module) -> set[int]:
            return {id(module) for root in roots for module in root.modules()}

        if modules is not None and not modules:
            raise InputError("graft: modules names none; leave it out for all that either adapter changes")
        whole = {"attention": inside(*self.layout.attention), "mlp": inside(*self.layout.mlp)}
        found: dict[str, set[tuple[int, str]]] = {name: set() for name in modules or ("all",)}
        for swap in swaps:
            place = (id(swap.parent), swap.name)
            for name in found:
                if name in ("all", swap.name) or place[0] in whole.get(name, ()):
                    found[name].add(place)
        if wrong := [name for name, places in found.items() if not places and name != "all"]:
            there = sorted({swap.name for swap in swaps})
            known = ", ".join(["attention", "mlp", *there]) if there else "none"
            raise InputError(
                f"graft: neither adapter changes a module {wrong[0]!r}{did_you_mean(str(wrong[0]), there)}; "
                f"they change {known}"
            )
        everywhere = {place for places in found.values() for place in places}
        if layers is None:
            return everywhere
        within = inside(*(self.layout.layers[layer] for layer in layers))
        return {place for place in everywhere if place[0] in within}

    def _layout_with(self, swaps: tuple[Swap, ...]) -> Any:
        """The modules and shapes with an adapter in; the active one stays."""
        with self._taken_out():
            put_in(swaps)
            try:
                return find_layout(self.hf)
            finally:
                take_out(swaps)

    @contextlib.contextmanager
    def bare(self) -> Iterator["Model"]:
        """Within the context no adapter is active: the weights in memory as they were loaded, the suite's base or, of a
        role that is a checkpoint of its own, that checkpoint. See `using`.
        """
        with self._back_afterwards():
            self._activate(self._bare, self._own_role)
            yield self

    @contextlib.contextmanager
    def _back_afterwards(self) -> Iterator[None]:
        self._refuse_let_go()
        before = (self._active, self.role)
        self.entered += 1
        try:
            yield
        finally:
            self.entered -= 1
            self._activate(*before)

    def _switch(self, role_or_adapter: str | os.PathLike[str] | None, scale: float = 1.0) -> None:
        self._activate(*self._found(role_or_adapter, scale))

    def _found(self, role_or_adapter: str | os.PathLike[str] | None, scale: float = 1.0) -> tuple[_Adapted, str | None]:
        """What the base is with an adapter at a scale, and the role's name; the active one stays."""
        name = None if role_or_adapter is None else str(role_or_adapter)
        if name is not None and self.suite and self.suite.names(name):
            role = self.suite.role(name)
            if role.checkpoint != self.own_checkpoint:
                raise self._others_weights(name)
            return (self._with(role.adapter, scale) if role.adapter else self._unscaled(name, scale)), name
        if name is None:
            if self._own_role:
                raise self._others_weights("the bare base")
            return self._unscaled("the bare base", scale), None
        if self.suite and not Path(name).exists() and name.count("/") != 1:
            self.suite.role(name)
        return self._with(name, scale), name

    def _between(
        self, origin: str | os.PathLike[str], role_or_adapter: str | os.PathLike[str] | None, scale: float
    ) -> tuple[_Adapted, str | None]:
        """The base with a dose of what is between two adapters, and the role's name; the active one stays."""
        (start, start_name), (end, name) = self._found(origin), self._found(role_or_adapter)
        if start is self._bare:
            return self._found(role_or_adapter, scale)
        if end is self._bare:
            return self._found(origin, 1 - scale)[0], name
        for found, of in ((start, start_name), (end, name)):
            refuse_unscalable(found.swaps, of)
        identity = f"{start.identity} to {end.identity} x {scale!r}"
        if identity not in self._adapted:
            with tempfile.TemporaryDirectory() as folder, self._taken_out():
                write_between(self.hf, start.swaps, end.swaps, scale, Path(folder))
                self._adapted[identity] = self._attached(Path(folder), identity)
        return self._adapted[identity], name

    @contextlib.contextmanager
    def _taken_out(self) -> Iterator[None]:
        """Within the context the base is bare and without hooks, afterwards as before."""
        with self._without_hooks():
            take_out(self._active.swaps)
            try:
                yield
            finally:
                put_in(self._active.swaps, self._active.scale)

    def _unscaled(self, name: str, scale: float) -> _Adapted:
        if scale != 1:
            raise InputError(f"using: {name} has no adapter to be scaled; leave scale out")
        return self._bare

    def _others_weights(self, wanted: str) -> InputError:
        held = f"the checkpoint of role {self._own_role!r}" if self._own_role else "the suite's base"
        return InputError(
            f"this model holds {held}, and {wanted} has other weights: go through them with "
            f"rim.roles('{self.suite.name if self.suite else self.name}', ...), one in memory at a time"
        )

    def _activate(self, wanted: _Adapted, role: str | None) -> None:
        if wanted is not self._active:
            with self._without_hooks():
                take_out(self._active.swaps)
                put_in(wanted.swaps, wanted.scale)
                self._active = wanted
        self.role = role

    @contextlib.contextmanager
    def _without_hooks(self) -> Iterator[None]:
        """Take interventions off the modules, and put them on those that are there afterwards, in their order."""
        for hooks in reversed(self.hooks):
            hooks.remove()
        try:
            yield
        finally:
            for hooks in self.hooks:
                hooks.put()

    def _with(self, source: str, scale: float = 1.0) -> _Adapted:
        """The base with an adapter at a scale, attached once for each content; the active one stays."""
        if self.remote:
            raise far.refusal(f"adapter {source}")
        folder = adapter_folder(source)
        assert folder is not None
        identity = adapter_identity(folder)
        if identity not in self._adapted:
            with self._taken_out():
                self._adapted[identity] = self._attached(folder, identity)
        whole = self._adapted[identity]
        if scale == 1:
            return whole
        refuse_unscalable(whole.swaps, folder)
        return replace(whole, identity=f"{identity} x {scale!r}", scale=scale)

    def _attached(self, folder: Path, identity: str) -> _Adapted:
        swaps = attach(self.hf, folder)
        put_in(swaps)
        try:
            found_layout = find_layout(self.hf)
            measured = checks.measure(
                self.hf, self.tokenizer, found_layout, self.dtype, self.quantization, self._bare.checks or None
            )
            if measured.seen == self._bare.checks.seen:
                warnings.warn(
                    f"the adapter in {folder} changes nothing on two short texts: is it trained?",
                    RimWarning,
                    stacklevel=6,
                )
        finally:
            take_out(swaps)
        return _Adapted(identity, found_layout, swaps, measured)

    def measure_identities(self) -> None:
        """Measure every identity (see `checks`) of the model as it is now."""
        found = checks.measure(self.hf, self.tokenizer, self.layout, self.dtype, self.quantization)
        self.checks.update(found)
        self.checks.seen = found.seen

    def _let_go(self) -> None:
        """Let the weights go, whoever still holds this model."""
        self._hf, self._adapted, self._views = None, {}, {}
        self._active = self._bare = _Adapted("none", None)

    def __repr__(self) -> str:
        number = self.quantization or str(self.dtype).removeprefix("torch.")
        return (
            f"Model({self.name}, {number}, {self.n_layers} layers, "
            f"{self.n_heads} heads of {self.head_dim}, d_model {self.d_model}, d_mlp {self.d_mlp}, "
            f"{'at NDIF' if self.remote else self.device})"
        )
