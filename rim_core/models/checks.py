"""Identities that tools rest on, measured on each loaded model; a tool whose identity fails refuses.

What each compares, and the tools that need it:

- `residual_sum`: `resid_post` with `resid_pre` and what attention and MLP add to it; attribution by component.
- `lens`: `Layout.readout(last resid_post)` with the logits; logit lens, attribution.
- `head_sum`: the sum of the heads' outputs (plus bias) with `attn_out`; everything by head.
- `padding`: a prompt alone with the same prompt left-padded in a batch; every batched tool.
- `cache`: prompts continued token by token in a batch, as in `generate`, with each alone and whole; `generate`.
- `decoding`: the same in rows of unequal length that enter and leave, on keys and values written in place (see
  `decoding`), with each alone and whole; `generate` uses Hugging Face's loop where it fails.
- `cache_batch`: unequal prompts on a shared beginning laid under them, with each alone and whole; `patch`.

`capture` shares beginnings only where `cache_batch` holds, and else runs each prompt whole. An identity that cannot
be measured, since the model fails, does not hold; its error is infinite.

Errors are largest differences over the largest value compared, so they do not depend on the stream's scale.
"""

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from rim_core.errors import IdentityError, first_line
from rim_core.models.decoding import Decoder, Row
from rim_core.models.hooks import reading
from rim_core.models.layout import Layout, head_outputs
from rim_core.models.padding import outgrows_window, pad_left, padded_left, padded_right
from rim_core.models.small_passes import one_query
from rim_core.texts import encode, window

# Two prompts of unequal length, so that the shorter one is padded.
PROBE_TEXTS = ("The capital of France is the city of", "Water boils at a lower temperature on a high mountain because")

# Tokens that are fed one by one: enough for a state to be read, written, and read again.
_STEPS = 2


def tolerance(dtype: torch.dtype, quantization: str | None = None) -> float:
    """The largest relative error that is rounding in these numbers."""
    if quantization == "int8":
        return 5e-2  # LLM.int8 rounds activations too, and which columns it spares depends on the whole batch
    return {torch.float32: 1e-3, torch.bfloat16: 4e-2, torch.float16: 1e-2}[dtype]


@dataclass(frozen=True)
class Check:
    """One identity, as it was measured.

    Attributes:
        identity: its name.
        error: the largest difference over the largest value; infinite where it could not be measured.
        tolerance: the largest error that is rounding in the model's dtype.
        reason: why it could not be measured.

    Example:
        >>> rim.checks.Check("lens", error=2e-7, tolerance=1e-3).holds
        True
    """

    identity: str
    error: float
    tolerance: float
    reason: str = ""

    @property
    def holds(self) -> bool:
        """Whether the error is a number within the tolerance."""
        return self.error <= self.tolerance


class Checks(dict[str, Check]):
    """Each identity's check, by name; drawn as a table in a notebook, and a line in text.

    Attributes:
        seen: hash of the logits on the two prompts, by which models are told apart.
    """

    seen = ""

    @classmethod
    def of(cls, errors: Mapping[str, float], tolerance: float, reasons: Mapping[str, str] | None = None) -> "Checks":
        """The checks of measured errors."""
        told = reasons or {}
        return cls({name: Check(name, error, tolerance, told.get(name, "")) for name, error in errors.items()})

    def of_model(self, logits: Tensor) -> "Checks":
        """These checks, marked with what the model gave on the two prompts."""
        self.seen = hashlib.sha256(logits.float().cpu().numpy().tobytes()).hexdigest()
        return self

    def to_frame(self) -> pd.DataFrame:
        """Give a row for each identity: identity, measured error, allowed, holds, reason."""
        rows = [(c.identity, c.error, c.tolerance, c.holds, c.reason) for c in self.values()]
        return pd.DataFrame(rows, columns=["identity", "measured error", "allowed", "holds", "reason"])

    def __repr__(self) -> str:
        told = (f"{name} {check.error:.0e}{'' if check.holds else ' fails'}" for name, check in self.items())
        return f"Checks({', '.join(told)})"

    def _repr_html_(self) -> str:
        return self.to_frame().to_html(index=False, border=0, float_format="{:.0e}".format)


def relative(found: Tensor, wanted: Tensor) -> float:
    """The largest difference over the largest value."""
    found, wanted = found.float(), wanted.float().to(found.device)
    return float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30))


def residual_error(before: Tensor, attention: Tensor, mlp: Tensor, after: Tensor) -> float:
    """How far `after`, a layer's `resid_post`, is from what came in and what attention and MLP added."""
    # At a boundary between devices a layer's input is still on the device before.
    return relative(before.to(attention.device) + attention + mlp, after)


@torch.no_grad()
def measure(
    hf: Any,
    tokenizer: Any,
    layout: Layout,
    dtype: torch.dtype,
    quantization: str | None = None,
    known: Mapping[str, Check] | None = None,
) -> Checks:
    """Measure every identity on two short prompts; takes some ten forward passes of a few tokens.

    `known` are the identities of the same model without its adapter: those with a cache are taken from there, since
    an adapter does not change how keys and values are kept, and two passes are enough.
    """
    device = hf.get_input_embeddings().weight.device
    ids = encode(tokenizer, PROBE_TEXTS)
    short, pad = min(ids, key=len), tokenizer.pad_token_id or 0
    sites = ("resid_pre", "resid_post", "attn_out", "mlp_out", "head_z")
    with reading(layout, sites, lambda tensor: tensor.detach().clone()) as found:
        logits = hf(**pad_left([short], pad, device), use_cache=False).logits
    both = hf(**pad_left(ids, pad, device), use_cache=False).logits
    residual = heads = 0.0
    for i in range(len(layout.layers)):
        attention, mlp = (layout.added(site, i, found[site, i]) for site in ("attn_out", "mlp_out"))
        residual = max(residual, residual_error(found["resid_pre", i], attention, mlp, found["resid_post", i]))
        z = found["head_z", i].unflatten(-1, (layout.n_heads, layout.head_dim))
        total = head_outputs(layout, i, z).sum(-2) + layout.attention_out[i](torch.zeros_like(found["head_z", i]))
        heads = max(heads, relative(total, found["attn_out", i]))
    errors = {
        "residual_sum": residual,
        "lens": relative(layout.readout(found["resid_post", len(layout.layers) - 1]), logits),
        "head_sum": heads,
        "padding": relative(both[ids.index(short), -len(short) :], logits[0]),
    }
    allowed = tolerance(dtype, quantization)
    if known is not None:
        return Checks({**known, **Checks.of(errors, allowed)}).of_model(both)
    # The longer prompt fills its row; the shorter one is compared with itself alone.
    alone = [logits[0] if row is short else both[number] for number, row in enumerate(ids)]
    reasons = {}
    errors["cache"], reasons["cache"] = _attempt(lambda: _decoding_error(hf, ids, alone, pad, device))
    errors["decoding"], reasons["decoding"] = _attempt(lambda: _in_place_error(hf, layout, ids, pad, device))
    errors["cache_batch"], reasons["cache_batch"] = _attempt(lambda: _beginning_error(layout, ids, pad, device))
    return Checks.of(errors, allowed, reasons).of_model(both)


def _attempt(measured: Callable[[], float]) -> tuple[float, str]:
    """An error and why it is infinite: models with caches of their own fail in ways of their own."""
    try:
        return measured(), ""
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        return math.inf, f"{type(error).__name__}: {first_line(error)}"


def _decoding_error(hf: Any, ids: list[list[int]], alone: list[Tensor], pad: int, device: Any) -> float:
    """How far the logits of the last tokens, fed one by one after cached, left-padded prompts, are from `alone`.

    `alone` holds each prompt's logits `[position, vocab]`, of one pass of the whole prompt.
    """
    steps = min(_STEPS, min(map(len, ids)) - 1)
    inputs: dict[str, Tensor] = pad_left([row[:-steps] for row in ids], pad, device)
    mask, past = inputs.pop("attention_mask"), None
    worst = 0.0
    for step in range(steps, 0, -1):
        out = hf(**inputs, attention_mask=mask, past_key_values=past, use_cache=True)
        past = out.past_key_values
        worst = max(worst, _largest(out.logits[:, -1], [row[-step - 1] for row in alone]))
        tokens = torch.tensor([[row[-step]] for row in ids], device=device)
        mask = torch.cat([mask, mask.new_ones(len(ids), 1)], dim=1)
        inputs = {"input_ids": tokens, "position_ids": mask.sum(dim=1, keepdim=True) - 1}
    out = hf(**inputs, attention_mask=mask, past_key_values=past, use_cache=True)
    return max(worst, _largest(out.logits[:, -1], [row[-1] for row in alone]))


def _in_place_error(hf: Any, layout: Layout, ids: list[list[int]], pad: int, device: Any) -> float:
    """How far the logits of prompts that are decoded in place, on a shared beginning, are from each alone and whole.

    The shorter prompt enters first and leaves first, so that the longer one moves, twice.
    """
    beginning, rest = max(ids, key=len), min(ids, key=len)
    if (room := window(layout.body)) is not None:
        beginning = beginning[: room // 2]
        rest = rest[: room - len(beginning)]
    whole = beginning + rest
    states = layout.body(**pad_left([whole], pad, device), use_cache=False)[0][0]
    wanted = layout.logits(states)
    steps = min(_STEPS, len(rest) - 1)
    short, long = Row(whole[: len(beginning) + 1]), Row(whole[: len(whole) - steps])
    with one_query(hf):
        decoder = Decoder(layout, pad, device, capacity=2, longest=len(whole), beginning=beginning)
        found = [(short, decoder.enter([short])), (long, decoder.enter([long]))]
        worst = max(_largest(logits, [wanted[len(row.tokens) - 1]]) for row, logits in found)
        for step in range(steps):
            for row in decoder.rows:
                row.new.append(whole[len(row.tokens)])
            logits = decoder.step()
            worst = max(worst, _largest(logits, [wanted[len(row.tokens) - 1] for row in decoder.rows]))
            if step == 0:
                decoder.leave([0])
    return worst


def _beginning_error(layout: Layout, ids: list[list[int]], pad: int, device: Any) -> float:
    """How far the last logits of prompts on a shared beginning are from those of each prompt whole and alone.

    The longer probe is the beginning, and the shorter one, whole and in part, what follows, as far as the context
    goes. Both paddings are tried.
    """
    beginning, rest = max(ids, key=len), min(ids, key=len)
    if (room := window(layout.body)) is not None:
        beginning = beginning[: room // 2]
        rest = rest[: room - len(beginning)]
    prompts = [beginning + rest[: max(1, len(rest) // 3)], beginning + rest]
    # The shorter one is the beginning of the longer one too: one pass tells what both give alone.
    whole = layout.body(**pad_left(prompts[1:], pad, device), use_cache=False)[0][0]
    wanted = [layout.logits(whole[len(row) - 1]) for row in prompts]
    inputs, ends = padded_right(layout.body, beginning, [row[len(beginning) :] for row in prompts], pad, device)
    right = layout.body(**inputs)[0]
    right = right[torch.arange(len(prompts)), ends.to(right.device) - 1]
    shared = 0 if outgrows_window(layout.body.config, len(prompts[-1])) else len(beginning)
    left = layout.body(**padded_left(layout.body, prompts, shared, pad, device))[0][:, -1]
    return max(_largest(layout.logits(states), wanted) for states in (right, left))


def _largest(found: Tensor, wanted: list[Tensor]) -> float:
    return max(relative(one, other) for one, other in zip(found, wanted, strict=True))


def require(checks: Mapping[str, Check], name: str, tool: str, identities: tuple[str, ...]) -> None:
    """Refuse to go on unless the identities hold.

    Raises:
        IdentityError: names the tool, the model, the identity, the measured error and what to do.
    """
    for identity in identities:
        check = checks[identity]
        if not check.holds:
            measured = f"is off by {check.error:.1e} (at most {check.tolerance:.0e} is allowed)"
            if check.reason:
                measured = f"cannot be measured, the model fails ({check.reason})"
            raise IdentityError(
                f"{tool} cannot be trusted on {name}: the identity {identity!r} {measured}; use a tool that does not "
                "need it, or a model of another family"
            )
