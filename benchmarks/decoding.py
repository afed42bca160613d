"""Answers beside plain Hugging Face `generate`, beside the products alone, and many arms beside a loop of calls."""

import contextlib
import itertools
import random
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import rim_core as rim
from benchmarks.harness import Row, compare, in_turns, texts_of_length
from rim_core.behaviour import generation
from rim_core.models.padding import pad_left, shared_beginning
from rim_core.texts import encode

SHORT_TARGET, LONG_TARGET, ARMS_TARGET, LIMIT_TARGET = 2.5, 1.8, 3.0, 1.25
N_HEADS, PEER, PEER_BATCH = 10, "plain Hugging Face generate", 64
BATCHES, PROMPTS, NEW = (1, 16, 64), (45, 400), (32, 256)


@contextlib.contextmanager
def endless(model: rim.Model) -> Iterator[None]:
    """Within the context no token ends an answer, so that both sides run the same number of steps."""
    ends, real = model.hf.generation_config.eos_token_id, generation._end_tokens
    model.hf.generation_config.eos_token_id = None
    generation._end_tokens = lambda model: []
    try:
        yield
    finally:
        model.hf.generation_config.eos_token_id, generation._end_tokens = ends, real


@torch.no_grad()
def hugging_face(model: rim.Model, texts: Sequence[str], new: int) -> list[str]:
    """The answers of plain `generate`, in batches padded on the left."""
    ids, answers = encode(model, texts), []
    options = {"max_new_tokens": new, "do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    for at in range(0, len(ids), PEER_BATCH):
        inputs = pad_left(ids[at : at + PEER_BATCH], model.tokenizer.pad_token_id, model.device)
        out = model.hf.generate(**inputs, **options, pad_token_id=model.tokenizer.pad_token_id)
        answers += model.tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return answers


def both(model: rim.Model, texts: Sequence[str], new: int) -> dict[str, Callable[[], list[str]]]:
    """The same answers, by each way."""
    return {
        "ours": lambda: rim.generate(model, texts, max_new_tokens=new),
        "plain": lambda: hugging_face(model, texts, new),
    }


@torch.no_grad()
def products(model: rim.Model, texts: Sequence[str], new: int) -> float:
    """Seconds of the products of the tokens that must be computed: what all prompts begin with once, the rest of each,
    a row a step, and the unembedding of one token a row and step; weights unpacked, adapters and attention left out.

    A step's products are timed a few times, and counted as often as there are steps.
    """
    with model.bare():
        modules = [module for layer in model.layout.layers for module in layer.modules()]
        shapes = [(module.out_features, module.in_features) for module in modules if isinstance(module, nn.Linear)]
    weights = [torch.ones(*shape) for shape in shapes]
    head = torch.ones(model.layout.d_vocab, model.d_model)

    def seconds(rows: int, ends: int, repeats: int) -> float:
        inputs: dict[int, Tensor] = {width: torch.ones(rows, width) for _, width in shapes}
        start = time.perf_counter()
        for _ in range(repeats):
            for weight in weights:
                functional.linear(inputs[weight.shape[1]], weight)
            functional.linear(torch.ones(ends, model.d_model), head)
        return (time.perf_counter() - start) / repeats

    ids = encode(model, texts)
    shared = shared_beginning(ids, 1)
    own = sum(len(row) - shared for row in ids) + shared
    once, steps = seconds(own, len(ids), 1), min(4, new - 1)
    return once + (new - 1) * seconds(len(ids), len(ids), steps)


def of_length(model: rim.Model, n_tokens: int, count: int) -> list[str]:
    """Chat prompts of so many tokens, the template's own among them."""
    (asked,) = texts_of_length(model.tokenizer, 1, 1)
    template = len(encode(model, rim.format_chat(model, [asked]))[0]) - 1
    return rim.format_chat(model, texts_of_length(model.tokenizer, n_tokens - template, count))


def headline(model: rim.Model, repeats: int, n: int = 80, short: int = 32, long: int = 128) -> list[Row]:
    """Harmful requests to a model with an adapter, as the verdicts ask them."""
    texts = rim.format_chat(model, rim.load_prompts("harmful", limit=n))
    rows = []
    with endless(model):
        for new, target in ((short, SHORT_TARGET), (long, LONG_TARGET)):
            works = both(model, texts, new)
            least: list[float] = []
            limit = lambda least=least, new=new: least.append(products(model, texts, new))  # noqa: E731
            times = in_turns({**works, "limit": limit}, repeats)
            same = sum(a == b for a, b in zip(works["ours"](), works["plain"](), strict=True))
            case, note = f"{n} chat prompts, {new} new tokens", f"{same} of {n} answers are the same"
            options = {"target": target, "note": note}
            rows.append(compare("decoding", case, PEER, times["ours"], times["plain"], **options))
            options = {"speed_up": False, "target": LIMIT_TARGET, "at_least": False}
            rows.append(compare("decoding", case, "arithmetic limit", times["ours"], least[1:], **options))
    times = in_turns(both(model, texts, long), max(1, repeats // 2))
    case = f"{n} chat prompts, up to {long} new tokens, each to its own end"
    return [*rows, compare("decoding", case, PEER, times["ours"], times["plain"])]


def table(
    model: rim.Model, batches: Sequence[int] = BATCHES, prompts: Sequence[int] = PROMPTS, new: Sequence[int] = NEW
) -> list[Row]:
    """Batches, lengths of prompt and of answer, plain and with heads ablated; once each, since a cell takes minutes."""
    cells = [(layer, head) for layer in range(model.n_layers) for head in range(model.n_heads)]
    heads = random.Random(0).sample(cells, min(N_HEADS, len(cells)))
    reference = rim.capture(model, of_length(model, prompts[0], 8), "head_z", positions="all")
    rows = []
    for length, batch, n, ablated in itertools.product(prompts, batches, new, (False, True)):
        texts = of_length(model, length, batch)
        within: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if ablated:
            within = rim.ablate(model, heads=heads, mode="mean", reference=reference)
        with endless(model), within:
            times = in_turns(both(model, texts, n), 1, warm=False)
        what = f", {len(heads)} heads ablated" if ablated else ""
        case = f"batch {batch}, prompts of {length} tokens, {n} new{what}"
        rows.append(compare("cells", case, PEER, times["ours"], times["plain"], target=1.0))
    return rows


def arms(model: rim.Model, repeats: int, n_arms: int = 32, n_texts: int = 4, new: int = 32) -> list[Row]:
    """One head set an arm, side by side, against a loop of calls."""
    texts = rim.format_chat(model, rim.load_prompts("harmful", limit=n_texts))
    sets = [rim.random_heads(model, min(N_HEADS, model.n_heads), seed=seed) for seed in range(n_arms)]

    def made() -> list[contextlib.AbstractContextManager[rim.Model]]:
        return [rim.ablate(model, heads=chosen, mode="zero") for chosen in sets]

    def loop() -> list[list[str]]:
        answers = []
        for one in made():
            with one:
                answers.append(rim.generate(model, texts, max_new_tokens=new))
        return answers

    def together() -> list[list[str]]:
        return rim.generate(model, texts, max_new_tokens=new, arms=made())

    with endless(model):
        times = in_turns({"ours": together, "loop": loop}, repeats)
        same = sum(
            a == b for one, other in zip(together(), loop(), strict=True) for a, b in zip(one, other, strict=True)
        )
    return [
        compare(
            "decoding",
            f"{n_arms} arms of one head set, {n_texts} prompts, {new} new tokens",
            "a loop of calls",
            times["ours"],
            times["loop"],
            target=ARMS_TARGET,
            note=f"{same} of {n_arms * n_texts} answers are the same",
        )
    ]
