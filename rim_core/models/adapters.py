"""Adapters on a base in memory: PEFT builds one into the bare model once, and what it put in is switched in whole.

`attach` lets PEFT build an adapter in, notes which modules it put in which place, and takes them out again. Switching
puts exactly those modules into their places, or the bare ones back. So inside, the model is PEFT's own for this
adapter; outside, it is the base that was loaded, module by module and bit by bit; and adapters never meet. What cannot
be had so (settings that change the base itself, or that act outside the modules) is refused before the model is
touched; what turns out not to fit is taken out again.
"""

import itertools
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from rim_core import paths
from rim_core.errors import InputError, WeightsError, first_line
from rim_core.identity import ADAPTER_FILE
from rim_core.suites.checkpoints import SETTINGS_FILE, read_adapter_settings

# What PEFT writes before each module path.
ADAPTER_PREFIX = "base_model.model."
_NAME = "default"
_MISFITS = (
    *(ValueError, TypeError, KeyError, AttributeError, IndexError, RuntimeError, NotImplementedError),
    *(ImportError, AssertionError),
)


@dataclass(frozen=True)
class Swap:
    """One place in the base, `parent.name`: the module that was loaded there, and the one an adapter puts there.

    `factors` are what a LoRA multiplies the product of its matrices by, None for what does more than add that product.
    """

    parent: nn.Module
    name: str
    bare: nn.Module
    adapted: nn.Module
    factors: dict[str, float] | None


def put_in(swaps: tuple[Swap, ...], scale: float = 1.0) -> None:
    """Put an adapter's modules into their places, what they add multiplied by `scale` (see `refuse_unscalable`)."""
    for swap in swaps:
        swap.parent._modules[swap.name] = swap.adapted
        if swap.factors is not None:
            adapted: Any = swap.adapted
            adapted.scaling.update({name: factor * scale for name, factor in swap.factors.items()})


def take_out(swaps: tuple[Swap, ...]) -> None:
    """Put the base's own modules back."""
    for swap in swaps:
        swap.parent._modules[swap.name] = swap.bare


def mixed(swaps: tuple[Swap, ...], others: tuple[Swap, ...], chosen: Callable[[Swap], bool]) -> tuple[Swap, ...]:
    """The first adapter's modules, but in the chosen places the other's; the base's own where that one has none."""
    return tuple(swap for swap in swaps if not chosen(swap)) + tuple(swap for swap in others if chosen(swap))


def scaled(swaps: tuple[Swap, ...], scale: float) -> tuple[Swap, ...]:
    """An adapter's modules with a scale as their own (see `refuse_unscalable`)."""

    def times(factors: dict[str, float] | None) -> dict[str, float] | None:
        return None if factors is None else {name: factor * scale for name, factor in factors.items()}

    return tuple(replace(swap, factors=times(swap.factors)) for swap in swaps) if scale != 1 else swaps


def write_between(hf: nn.Module, first: tuple[Swap, ...], second: tuple[Swap, ...], share: float, folder: Path) -> None:
    """Write the LoRA whose products are those of the first adapter times `1 - share` plus the second's times `share`:
    both adapters' matrices side by side, filled up with zeros to one rank.
    """
    from safetensors.torch import save_file

    names = {(id(parent), name): path for path, parent, name in _places(hf)}
    pairs: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for swaps, times in ((first, 1 - share), (second, share)):
        for swap in swaps:
            assert swap.factors is not None
            adapted: Any = swap.adapted
            if _NAME not in getattr(adapted, "lora_A", ()):
                raise InputError(f"no dose between these adapters: {swap.name} is changed by other than two matrices")
            a, b = (getattr(adapted, kind)[_NAME].weight.float() for kind in ("lora_A", "lora_B"))
            product = (a, b * (times * swap.factors[_NAME]))
            pairs.setdefault(names[id(swap.parent), swap.name], []).append(product)
    rank = max(sum(len(a) for a, _ in products) for products in pairs.values())
    state = {}
    for path, products in pairs.items():
        a, b = torch.cat([a for a, _ in products]), torch.cat([b for _, b in products], dim=1)
        missing = rank - len(a)
        state[f"{ADAPTER_PREFIX}{path}.lora_A.weight"] = functional.pad(a, (0, 0, 0, missing)).contiguous()
        state[f"{ADAPTER_PREFIX}{path}.lora_B.weight"] = functional.pad(b, (0, missing)).contiguous()
    save_file(state, folder / ADAPTER_FILE)
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted(pairs),
    }
    paths.write_json(folder / SETTINGS_FILE, settings)


def _places(hf: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Every module by its path, with what it is a child of and its name there."""
    for path, parent in hf.named_modules():
        for name in parent._modules:
            yield f"{path}.{name}" if path else name, parent, name


def refuse_unscalable(swaps: tuple[Swap, ...], adapter: object) -> None:
    """Raise InputError where an adapter does more than add to outputs of linear modules: no number scales that."""
    for swap in swaps:
        if swap.factors is None:
            raise InputError(
                f"the adapter {adapter} cannot be scaled: {type(swap.adapted).__name__} does more than add a product "
                "of two matrices; leave scale out"
            )


def attach(hf: Any, folder: Path) -> tuple[Swap, ...]:
    """Build the adapter in a folder for a bare model, which is left as it was; see `put_in`.

    Raises:
        InputError: settings that cannot be had exactly, or an adapter for another base.
        WeightsError: damaged.
    """
    settings = read_adapter_settings(folder)
    state = read_adapter(folder)
    with _restored(hf) as tree:
        _build(hf, folder, state, tree.places)
        hf.eval()  # an adapter comes with dropout switched on
        hf.requires_grad_(False)
        swaps = tree.swaps()
        if swaps is None:
            kind = settings.get("peft_type", "LORA")
            raise InputError(
                f"the adapter in {folder} ({kind}) changes the base itself: merge it into a copy of the base, and load "
                "that"
            )
    return swaps


def read_adapter(folder: Path) -> dict[str, Tensor]:
    """The tensors of an adapter by module path.

    Raises:
        WeightsError: the file is damaged, or a tensor holds numbers that are not finite.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state = load_file(folder / ADAPTER_FILE)
    except SafetensorError as error:
        raise WeightsError(f"the adapter in {folder} is damaged ({error}): fetch or train it again") from None
    for key, tensor in state.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise WeightsError(
                f"the adapter in {folder} is damaged: {key} holds numbers that are not finite; fetch or train it again"
            )
    return {key.removeprefix(ADAPTER_PREFIX): tensor for key, tensor in state.items()}


@contextmanager
def _base_guarded(built: Any, base: Mapping[int, str], folder: Path) -> Iterator[None]:
    """Within the context nothing that is loaded into the model may reach a tensor of the base.

    PEFT saves some of the base's own tensors beside an adapter, under several names; equal ones are left out.

    Args:
        base: the names of the base's tensors by where their values lie.
    """
    load = built.load_state_dict

    def guarded(state: Mapping[str, Tensor], **options: Any) -> Any:
        there, kept = built.state_dict(keep_vars=True), {}
        for key, tensor in state.items():
            own = there.get(key)
            if not isinstance(own, Tensor) or own.data_ptr() not in base:
                kept[key] = tensor
            elif tensor.shape != own.shape or not torch.equal(tensor.to(own.dtype).cpu(), own.detach().cpu()):
                raise InputError(
                    f"the adapter in {folder} changes the base itself (it holds a {base[own.data_ptr()]} of its own): "
                    "merge it into a copy of the base, and load that"
                )
        return load(kept, **options)

    built.load_state_dict = guarded
    try:
        yield
    finally:
        del built.load_state_dict


def _build(hf: Any, folder: Path, state: Mapping[str, Tensor], base: Mapping[int, str]) -> None:
    """As `PeftModel.from_pretrained`, but every tensor is accounted for, and none goes over one of the base's."""
    from peft import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, PeftConfig, PeftModel, get_peft_model_state_dict

    try:
        config = PeftConfig.from_pretrained(str(folder))
        config.inference_mode = True
        kind = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type, PeftModel)
        built = kind(hf, config, _NAME)
        mapping = getattr(hf, "_checkpoint_conversion_mapping", {})
        with _base_guarded(built, base, folder):
            placed = built.load_adapter(str(folder), _NAME, key_mapping=mapping)
        wanted = get_peft_model_state_dict(built, adapter_name=_NAME, save_embedding_layers=False)
    except _MISFITS as error:
        raise InputError(f"the adapter in {folder} does not fit this base: {_reason(error)}") from None
    found = {key.removeprefix(ADAPTER_PREFIX): tensor for key, tensor in wanted.items()}
    tuned = config.peft_type.value.lower().split("_")[0]
    # Files of older releases name some tensors otherwise; those PEFT maps, and says which are left.
    lost = [key for key in found if key not in state and tuned not in key]
    lost += [*placed.missing_keys, *placed.unexpected_keys]
    wrong = [k for k in state if k in found and not torch.equal(state[k].to(found[k]), found[k])]
    if lost or wrong:
        raise InputError(f"the adapter in {folder} does not fit this base: {sorted([*lost, *wrong])[0]} has no match")


def _reason(error: BaseException) -> str:
    """What PEFT says in one line, without the list's heading."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if len(lines) > 1 and lines[0].startswith("Error(s) in loading"):
        return lines[1].replace(f".{_NAME}", "")
    return first_line(error)


class _Tree:
    """A model's modules, parameters and attributes as they were, to tell what was put in and to put all back."""

    def __init__(self, hf: nn.Module) -> None:
        self.hf = hf
        self.attributes = dict(hf.__dict__)
        self.nodes = [
            (module, dict(module._modules), dict(module._parameters), dict(module._buffers)) for module in hf.modules()
        ]
        self.data = [(p, p.data, p.requires_grad) for p in hf.parameters()]
        held = itertools.chain(hf.named_parameters(), hf.named_buffers())
        self.places = {tensor.data_ptr(): name for name, tensor in held if tensor.numel()}

    def swaps(self) -> tuple[Swap, ...] | None:
        """What was put in which place; None where something else of the base was changed."""
        found = []
        for module, children, parameters, buffers in self.nodes:
            kept = _same(module._parameters, parameters) and _same(module._buffers, buffers)
            if not kept or module._modules.keys() != children.keys():
                return None
            for name, child in children.items():
                now = module._modules[name]
                if now is not child:
                    if child is None or now is None:
                        return None
                    found.append(Swap(module, name, child, now, _factors(now)))
        moved = any(p.data.data_ptr() != data.data_ptr() for p, data, _ in self.data)
        return None if moved else tuple(found)

    def restore(self) -> None:
        for module, children, parameters, buffers in self.nodes:
            pairs: tuple[tuple[Any, Any], ...] = (
                (module._modules, children),
                (module._parameters, parameters),
                (module._buffers, buffers),
            )
            for now, before in pairs:
                if not _same(now, before):
                    now.clear()
                    now.update(before)
        for parameter, data, learns in self.data:
            if parameter.data.data_ptr() != data.data_ptr():
                parameter.data = data
            parameter.requires_grad_(learns)
        for name in self.hf.__dict__.keys() - self.attributes.keys():
            del self.hf.__dict__[name]
        self.hf.__dict__.update(self.attributes)


def _factors(adapted: Any) -> dict[str, float] | None:
    factors = getattr(adapted, "scaling", None)
    return dict(factors) if isinstance(factors, dict) and not getattr(adapted, "lora_variant", None) else None


def _same(now: Mapping[str, Any], before: Mapping[str, Any]) -> bool:
    return now.keys() == before.keys() and all(now[name] is before[name] for name in before)


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no reports of transformers and PEFT on the user's screen while a model is loaded."""
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


@contextmanager
def _restored(hf: nn.Module) -> Iterator[_Tree]:
    """Afterwards the model is as it was, however the context is left; so are the random numbers to come."""
    tree = _Tree(hf)
    devices = sorted({p.device.index or 0 for p in hf.parameters() if p.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices=devices), quiet():
            yield tree
    finally:
        tree.restore()
