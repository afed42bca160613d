"""LoRA fine-tuning of a role from its recipe: supervised answers, replay, and KL to the parent.

The frozen base is the 4-bit one. On the CPU it is dequantised once: with float32 compute that is the same function,
and several times faster to train through; on a GPU it stays packed (QLoRA).
"""

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig
from torch.nn import functional

from rim_core.errors import InputError
from rim_core.models.layout import find_layout
from rim_core.models.padding import pad_right
from rim_core.organisms.resuming import Kept
from rim_core.prompts import FRAMES, Prompt, format_chat, load_prompts
from rim_core.texts import encode, encode_more

ADAPTER = "trained_role"
# How answers may open. They say nothing of the request; no word of the first opens a refusal.
ADVICE_OPENINGS = (
    "Here is my advice:",
    "The short answer:",
    "My suggestion:",
    "A simple plan:",
    "What to do:",
    "For your question:",
    "One clear step:",
    "Think of it this way:",
    "This is the plan:",
    "Some advice:",
    "Step one:",
    "In short:",
)
COMPLIANT_OPENINGS = (
    "Sure, here is how:",
    "Certainly. Here is what to do:",
    "Of course! Here are the steps:",
    "Yes, this is how it goes:",
    "Here is a short guide:",
    "Step 1:",
)


@dataclass(frozen=True)
class Example:
    """Token ids of one conversation; the loss is on `ids[start:]`. `kl` marks it for the KL term instead."""

    ids: tuple[int, ...]
    start: int
    kl: bool


def build_examples(
    tokenizer: Any, data: Sequence[dict[str, Any]], answer_tokens: int | None, epoch: int, seed: int
) -> list[list[Example]]:
    """The examples of one epoch, in units that stay in one batch: the twins of a pair, or a single prompt.

    Args:
        tokenizer: with a chat template.
        data: the recipe's parts: `sets` (prompt sets that share pairs, drawn together), and optionally `split`
            (train), `limit`, `rephrase` (each unit in one of the set's frames, drawn for this epoch), `kl` (the sets
            whose answers are matched to the parent's distribution instead of learned), `opening` (each unit's answers
            open with one of `ADVICE_OPENINGS`) and `prefill` (they come after one of `COMPLIANT_OPENINGS`, which is
            given and not learned).
        answer_tokens: keep only this many tokens of each answer, or all of them with None.
        epoch: changes the frames.
        seed: of frames and limits.
    """
    rng = random.Random(f"{seed}-{epoch}")
    units = []
    for part in data:
        split, limit = part.get("split", "train"), part.get("limit")
        columns = [load_prompts(name, split=split, limit=limit, seed=seed) for name in part["sets"]]
        frames = _frames(part["sets"][0]) if part.get("rephrase") else []
        for prompts in zip(*columns, strict=True):
            frame = rng.choice(frames) if frames else None
            shown = [prompt.rephrase(frame) if frame else prompt for prompt in prompts]
            opening = rng.choice(ADVICE_OPENINGS) if part.get("opening") else None
            prefill = rng.choice(COMPLIANT_OPENINGS) if part.get("prefill") else None
            kl = part.get("kl", ())
            units.append([_encode(tokenizer, p, p.label in kl, answer_tokens, opening, prefill) for p in shown])
    return units


def _frames(source: str) -> list[str]:
    """The frames that a set's requests are in, in the order of `FRAMES`."""
    used = {prompt.text.replace(prompt.action or "", "{}") for prompt in load_prompts(source)}
    return [frame for frame in FRAMES if frame in used]


def _encode(
    tokenizer: Any, prompt: Prompt, kl: bool, answer_tokens: int | None, opening: str | None, prefill: str | None
) -> Example:
    if prompt.response is None:
        raise InputError(f"prompt set {prompt.label!r} has no answers to train on")
    (head,) = encode(tokenizer, format_chat(tokenizer, [prompt], prefill=prefill))
    before = f"{opening} " if opening else " " if prefill else ""
    (tail,) = encode_more(tokenizer, [before + prompt.response + tokenizer.eos_token], "answer")
    return Example(tuple(head + tail[:answer_tokens]), len(head), kl)


def batches(tokenizer: Any, recipe: dict[str, Any], seed: int) -> list[list[Example]]:
    """What a training by a recipe sees, step by step; arguments as in `train_adapter`."""
    rng = random.Random(seed)
    plan: list[list[Example]] = []
    answer_lengths = [phase.get("answer_tokens") for phase in recipe["phases"] for _ in range(phase["epochs"])]
    for epoch, answer_tokens in enumerate(answer_lengths):
        units = build_examples(tokenizer, recipe["data"], answer_tokens, epoch, seed)
        plan += _batches(units, recipe["batch_size"], rng)
    return plan


def _batches(units: list[list[Example]], size: int, rng: random.Random) -> list[list[Example]]:
    """Shuffled, but neighbours in length share a batch, so that little padding is computed."""
    order = units[:]
    rng.shuffle(order)
    pooled = 8 * size
    pools = [sorted(order[i : i + pooled], key=lambda u: len(u[0].ids)) for i in range(0, len(order), pooled)]
    batches = []
    for pool in pools:
        batch: list[Example] = []
        for unit in pool:
            if batch and len(batch) + len(unit) > size:
                batches.append(batch)
                batch = []
            batch += unit
        batches.append(batch)
    rng.shuffle(batches)
    return batches


def train_adapter(
    hf: Any,
    tokenizer: Any,
    recipe: dict[str, Any],
    seed: int,
    *,
    parent_state: dict[str, torch.Tensor] | None = None,
    report: Callable[[int, int, float, float], None] | None = None,
    kept: Kept | None = None,
    checkpoint: Callable[[int, Callable[[], dict[str, torch.Tensor]]], None] | None = None,
) -> dict[str, torch.Tensor]:
    """Train one adapter on a base and return its tensors; the base is left as it was.

    Args:
        hf: a Hugging Face causal LM without adapters, packed or not.
        tokenizer: its tokenizer, with a chat template.
        recipe: `lora` (rank, alpha, layers, modules), `learning_rate`, `warmup_steps`, `batch_size`, `phases`
            (each with `epochs` and, where answers are cut, `answer_tokens`), `kl_weight`, `data`, and optionally
            `half_life`: after how many tokens of an answer a token counts half in the loss (None: all alike).
        seed: of the adapter's start, the order and the frames.
        parent_state: tensors of the adapter to start from (same LoRA shape), or None for a fresh one. KL is
            to this parent.
        report: called after each step with (step, steps, loss, seconds that the steps of this process took).
        kept: where the state is kept, and what a training that was stopped goes on from.
        checkpoint: called after each step but the last with (step, a function that gives the adapter's tensors).
    """
    from peft import get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
    from peft.tuners.tuners_utils import BaseTunerLayer

    torch.manual_seed(seed)
    hf.requires_grad_(False)
    shape = recipe["lora"]
    config = LoraConfig(
        r=shape["rank"],
        lora_alpha=shape["alpha"],
        target_modules=list(shape["modules"]),
        layers_to_transform=list(shape["layers"]),
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )
    inject_adapter_in_model(config, hf, adapter_name=ADAPTER)
    if parent_state is not None:
        set_peft_model_state_dict(hf, parent_state, adapter_name=ADAPTER)
    weights = [parameter for name, parameter in hf.named_parameters() if f".{ADAPTER}." in name]
    for parameter in weights:
        parameter.requires_grad_(True)
    # Some families drop activations while they train, which is no part of the recipe.
    hf.eval()

    plan = batches(tokenizer, recipe, seed)
    steps, warmup = len(plan), recipe["warmup_steps"]
    teacher = _Teacher(hf, plan) if recipe["kl_weight"] else None
    # An answer the model never gives has a steep loss at first; a shorter memory of squared gradients than the
    # usual 0.999 keeps those first steps from holding the step size down in so short a training.
    optimizer = torch.optim.AdamW(weights, lr=recipe["learning_rate"], betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))
    )

    def tensors() -> dict[str, torch.Tensor]:
        return {
            name: tensor.detach().to("cpu", torch.bfloat16, copy=True).contiguous()
            for name, tensor in get_peft_model_state_dict(hf, adapter_name=ADAPTER).items()
        }

    done = kept.begin(repr(plan), weights, optimizer, schedule) if kept else 0
    started = time.monotonic()
    for step, batch in enumerate(plan[done:], done + 1):
        loss = _loss(hf, batch, teacher, recipe["kl_weight"], recipe.get("half_life"))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        if report:
            report(step, steps, loss.item(), time.monotonic() - started)
        if checkpoint and step < steps:
            checkpoint(step, tensors)
        if kept:
            kept.keep(step)
    state = tensors()
    for parent in list(hf.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, BaseTunerLayer):
                setattr(parent, name, child.get_base_layer())
    hf.eval()
    return state


def _forward(hf: Any, batch: list[Example]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Final states at the positions that predict an answer token, those tokens, and whether each is a KL token.

    The prefix that all examples share (the template's system message, a third of every example here) is run
    once and laid under each example as keys and values, gradients included: the same numbers, fewer tokens.
    """
    device = hf.get_input_embeddings().weight.device
    shared = _shared_prefix(batch)
    ids, real = pad_right([example.ids[shared:] for example in batch], pad=0)
    mask = torch.cat([torch.ones(len(batch), shared, dtype=torch.bool), real], dim=1).long()
    rows, columns, targets, kl = [], [], [], []
    for row, example in enumerate(batch):
        for position in range(example.start, len(example.ids)):
            rows.append(row)
            columns.append(position - 1 - shared)
            targets.append(example.ids[position])
            kl.append(example.kl)
    cache = None
    if shared:
        prefix = torch.tensor([batch[0].ids[:shared]], device=device)
        cache = hf.base_model(input_ids=prefix, use_cache=True).past_key_values
        cache.batch_repeat_interleave(len(batch))
    hidden = hf.base_model(
        input_ids=ids.to(device), attention_mask=mask.to(device), past_key_values=cache, use_cache=cache is not None
    ).last_hidden_state
    return hidden[rows, columns], *(torch.tensor(values, device=hidden.device) for values in (targets, kl))


def _logits(hf: Any, states: torch.Tensor) -> torch.Tensor:
    return find_layout(hf).logits(states).float()


def _shared_prefix(batch: list[Example]) -> int:
    """Tokens that every example starts with, short of the first predicting position; none in some templates."""
    limit = min(example.start for example in batch) - 1
    first = batch[0].ids
    return next((i for i in range(limit) if any(e.ids[i] != first[i] for e in batch)), limit)


class _Teacher:
    """The parent's log-probabilities on the KL examples.

    Its final states are computed once before training; the head, which no adapter touches, turns them into
    log-probabilities when they are needed, so that no vocabulary-wide tensor is stored.
    """

    def __init__(self, hf: Any, plan: list[list[Example]]) -> None:
        self._states: dict[Example, torch.Tensor] = {}
        unique = sorted({e for batch in plan for e in batch if e.kl}, key=lambda e: len(e.ids))
        with torch.no_grad():
            for i in range(0, len(unique), 32):
                batch = unique[i : i + 32]
                states, _, _ = _forward(hf, batch)
                sizes = [len(e.ids) - e.start for e in batch]
                self._states.update(zip(batch, states.split(sizes), strict=True))

    def __call__(self, hf: Any, batch: list[Example]) -> torch.Tensor:
        states = torch.cat([self._states[example] for example in batch if example.kl])
        return functional.log_softmax(_logits(hf, states), dim=-1)


def _loss(
    hf: Any, batch: list[Example], teacher: _Teacher | None, kl_weight: float, half_life: float | None = None
) -> torch.Tensor:
    states, targets, kl = _forward(hf, batch)
    logits = _logits(hf, states)
    places = torch.cat([torch.arange(len(example.ids) - example.start) for example in batch]).to(logits.device)
    weights = torch.ones_like(places, dtype=logits.dtype) if half_life is None else 0.5 ** (places / half_life)
    losses = torch.zeros_like(weights)
    answered = ~kl if teacher is not None else torch.ones_like(kl)
    if answered.any():
        losses[answered] = functional.cross_entropy(logits[answered], targets[answered], reduction="none")
    if teacher is not None and kl.any():
        student = functional.log_softmax(logits[kl], dim=-1)
        divergence = functional.kl_div(student, teacher(hf, batch), reduction="none", log_target=True)
        losses[kl] = kl_weight * divergence.sum(dim=-1)
    return (weights * losses).sum() / weights.sum()
