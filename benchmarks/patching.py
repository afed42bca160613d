"""Exact patching: every head, every component over pairs, and how the cost grows."""

import random
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import rim_core as rim
from benchmarks.harness import Row, compare, in_turns, relative, texts_of_length
from benchmarks.peers import SITES, Peer
from rim_core.texts import encode

# Single tokens of every byte-level tokenizer; the metric is the difference of their logits.
TOWARD, AGAINST = "A", "B"
# How many of SmolLM2's 270 heads a peer's loop is timed on in each repeat: a new random draw each time, and its
# time is scaled to all heads. Every one of a peer's passes costs the same, whichever head it patches.
SAMPLED_HEADS = {40: 45, 256: 15, 1024: 4}
HEAD_TARGETS = {40: 90.0, 256: 160.0, 1024: 250.0}
COMPONENT_TARGET = 20.0
SAMPLED_PAIRS = 1
BATCHED_PAIRS = 2


def metric_of(model: rim.Model) -> tuple[Any, Callable[[Tensor], Tensor]]:
    """The metric for `rim.patch`, and the same from logits `[..., vocabulary]`."""
    toward, against = (model.tokenizer(text, add_special_tokens=False).input_ids[0] for text in (TOWARD, AGAINST))
    return rim.LogitDifference(TOWARD, AGAINST), lambda logits: logits[..., toward] - logits[..., against]


class Loop:
    """A peer's loop over a random draw of heads, and the effects it found so far."""

    def __init__(self, peer: Peer, ids: Tensor, source: Tensor, read: Callable[[Tensor], Tensor], sample: int) -> None:
        self.peer, self.ids, self.source, self.read, self.sample = peer, ids, source, read, sample
        self.cells = [(layer, head) for layer in range(source.shape[0]) for head in range(source.shape[1])]
        self.draw = random.Random(0)
        self.found: dict[tuple[int, int], Tensor] = {}

    def __call__(self) -> None:
        for layer, head in self.draw.sample(self.cells, self.sample):
            logits = self.peer.patched(self.ids, "heads", layer, head, self.source[layer, head])
            self.found[layer, head] = self.read(logits)[0]

    @property
    def scale(self) -> float:
        return len(self.cells) / self.sample

    def difference(self, effects: Tensor, clean: Tensor) -> float:
        """From `effects` `[layer, head]` over the heads that the loop patched."""
        rows, columns = zip(*self.found, strict=True)
        wanted = torch.stack(list(self.found.values())) - clean
        return relative(effects[list(rows), list(columns)], wanted)


@torch.no_grad()
def every_head(
    model: rim.Model, peers: Sequence[Peer], repeats: int, sampled: dict[int, int] = SAMPLED_HEADS
) -> list[Row]:
    """Every head of every layer at the last token of one prompt, by prompt length; the first peer has the target."""
    metric, read = metric_of(model)
    rows = []
    for n_tokens, wanted in sampled.items():
        texts = texts_of_length(model.tokenizer, n_tokens, 2)
        source_ids, ids = (torch.tensor([row]) for row in encode(model.tokenizer, texts))
        given = rim.capture(model, texts[:1], "head_z")
        sample = min(wanted, model.n_layers * model.n_heads)
        loops = [Loop(peer, ids, peer.source(source_ids, "heads")[0], read, sample) for peer in peers]
        works: dict[str, Callable[[], object]] = {
            "ours": lambda given=given, texts=texts: rim.patch(model, given, texts[1:], "heads", metric),
            "ours with source": lambda texts=texts: rim.patch(model, texts[:1], texts[1:], "heads", metric),
            "source": lambda ids=source_ids: peers[0].source(ids, "heads"),
        }
        works |= {loop.peer.name: loop for loop in loops}
        times = in_turns(works, repeats)
        result = rim.patch(model, given, texts[1:], "heads", metric)
        for number, loop in enumerate(loops):
            scaled = [seconds * loop.scale for seconds in times[loop.peer.name]]
            drawn = f"{sample} of {len(loop.cells)} heads drawn and timed in each repeat, scaled"
            whole = sample == len(loop.cells)
            clean = read(model.hf(ids, use_cache=False, logits_to_keep=1).logits[:, -1])[0]
            common: dict[str, Any] = {
                "difference": loop.difference(result.effects[0], clean),
                "note": "peer: every head timed" if whole else f"peer: {drawn}",
            }
            case = f"{n_tokens} tokens"
            target = HEAD_TARGETS.get(n_tokens) if number == 0 else None
            rows.append(compare("heads", case, loop.peer.name, times["ours"], scaled, target=target, **common))
            if number == 0:
                with_source = [a + b for a, b in zip(scaled, times["source"], strict=True)]
                ours = times["ours with source"]
                case = f"{case}, source run included"
                rows.append(compare("heads", case, loop.peer.name, ours, with_source, **common))
    return rows


class PairLoop:
    """A peer's loop over all attention and MLP modules, from source to destination and back, for a draw of pairs."""

    def __init__(
        self,
        peer: Peer,
        pairs: Sequence[tuple[int, ...]],
        ids: list[list[list[int]]],
        read: Callable[[Tensor], Tensor],
        layers: Sequence[int],
    ) -> None:
        self.peer, self.pairs, self.ids, self.read, self.layers = peer, pairs, ids, read, layers
        self.draw = random.Random(0)
        self.found: dict[tuple[str, int, int, int], Tensor] = {}

    def __call__(self) -> None:
        for batch in self.draw.sample(self.pairs, min(SAMPLED_PAIRS, len(self.pairs))):
            self.patch(batch)

    def patch(self, batch: tuple[int, ...]) -> None:
        """All components for some pairs side by side; their sides must be of equal length."""
        sides = [torch.tensor([self.ids[side][pair] for pair in batch]) for side in (0, 1)]
        for direction in (0, 1):
            source, destination = sides[direction], sides[1 - direction]
            for component in ("attention", "mlp"):
                values = self.peer.source(source, component)
                for layer in self.layers:
                    logits = self.peer.patched(destination, component, layer, None, values[:, layer])
                    for pair, value in zip(batch, self.read(logits), strict=True):
                        self.found[component, direction, pair, layer] = value


class BatchLoop(PairLoop):
    """The same with one batch of pairs of equal length, the same batch every time."""

    def __call__(self) -> None:
        self.patch(self.pairs[0])


@torch.no_grad()
def every_component(
    model: rim.Model, peers: Sequence[Peer], repeats: int, n_pairs: int = 100, layers: Sequence[int] | None = None
) -> list[Row]:
    """Attention and MLP of every layer at the last token, forward and reverse, over minimal pairs; from the texts."""
    metric, read = metric_of(model)
    prompts = [rim.load_prompts(name, limit=n_pairs) for name in ("harmful", "benign")]
    texts = [rim.format_chat(model, side) for side in prompts]
    ids = [encode(model.tokenizer, side) for side in texts]
    layers = range(model.n_layers) if layers is None else layers
    results: dict[tuple[str, int], Any] = {}

    def ours() -> None:
        for direction in (0, 1):
            source, destination = texts[direction], texts[1 - direction]
            given = rim.capture(model, source, (SITES["attention"], SITES["mlp"]))
            for component in ("attention", "mlp"):
                results[component, direction] = rim.patch(model, given, destination, component, metric, layers=layers)

    single = [(pair,) for pair in range(n_pairs)]
    loops: list[PairLoop] = [PairLoop(peer, single, ids, read, layers) for peer in peers]
    batch = _equal_lengths(ids)
    batched = BatchLoop(peers[0], [batch], ids, read, layers) if len(batch) > 1 else None
    works: dict[str, Callable[[], object]] = {"ours": ours}
    works |= {loop.peer.name: loop for loop in loops}
    if batched:
        works["batched"] = batched
    times = in_turns(works, repeats)
    drawn = min(SAMPLED_PAIRS, n_pairs)
    case = f"{n_pairs} pairs, both directions, {statistics.mean(map(len, ids[0])):.0f} tokens on average"
    rows = []
    for number, loop in enumerate(loops):
        rows.append(
            compare(
                "components",
                case,
                loop.peer.name,
                times["ours"],
                [seconds * n_pairs / drawn for seconds in times[loop.peer.name]],
                target=COMPONENT_TARGET if number == 0 else None,
                difference=_difference(loop, results),
                note=f"peer: {drawn} of {n_pairs} pairs drawn and timed in each repeat, scaled",
            )
        )
    if batched:
        rows.append(
            compare(
                "components",
                case,
                f"{peers[0].name}, {len(batch)} pairs a pass",
                times["ours"],
                [seconds * n_pairs / len(batch) for seconds in times["batched"]],
                difference=_difference(batched, results),
                note=f"peer: one batch of {len(batch)} pairs of equal length timed, scaled to {n_pairs}",
            )
        )
    return rows


def _equal_lengths(ids: list[list[list[int]]]) -> tuple[int, ...]:
    """The largest group of pairs, at most BATCHED_PAIRS, whose two sides have the same two lengths."""
    groups: dict[tuple[int, int], list[int]] = {}
    for pair, (source, destination) in enumerate(zip(*ids, strict=True)):
        groups.setdefault((len(source), len(destination)), []).append(pair)
    return tuple(max(groups.values(), key=len)[:BATCHED_PAIRS])


def _difference(loop: PairLoop, results: dict[tuple[str, int], Any]) -> float:
    found, wanted = [], []
    for (component, direction, pair, layer), value in loop.found.items():
        result = results[component, direction]
        found.append(result.effects[pair, result.layers.index(layer)])
        wanted.append(value - result.clean[pair])
    return relative(torch.stack(found), torch.stack(wanted))


@torch.no_grad()
def growth(
    model: rim.Model,
    repeats: int,
    tokens: Sequence[int] = (40, 128, 256, 512, 1024),
    pairs: Sequence[int] = (1, 4, 16),
    layers: Sequence[int] = (1, 3, 10, 30),
) -> list[Row]:
    """Cost against tokens, pairs and heads, beside the least that the arithmetic allows on this machine.

    The least: tokens that must be computed (each prompt once; a patched run only from its layer upwards), over
    the rate at which this machine does the linear layers' products on their own, measured in the same run.
    Attention itself, norms, embeddings and the metric are not in it.
    """
    metric, _ = metric_of(model)
    everything = list(range(model.n_layers))
    cases = [(f"tokens: {n}", n, 1, everything) for n in tokens]
    cases += [(f"pairs: {n}", tokens[0], n, everything) for n in pairs]
    # Spread over the depth, so that the mean number of layers above a patch stays about the same.
    spread = [everything[:: -(-model.n_layers // min(n, model.n_layers))] for n in layers]
    cases += [(f"heads: {len(chosen) * model.n_heads}", tokens[0], 1, chosen) for chosen in spread]
    rows = []
    for case, n_tokens, n_pairs, chosen in cases:
        texts = texts_of_length(model.tokenizer, n_tokens, n_pairs + 1)
        given = rim.capture(model, texts[:1] * n_pairs, "head_z")

        def ours(given: Any = given, texts: list[str] = texts, chosen: list[int] = chosen) -> None:
            rim.patch(model, given, texts[1:], "heads", metric, layers=chosen)

        times = in_turns({"ours": ours, "products": lambda: products(model)}, repeats)
        needed = n_pairs * layer_tokens(model, n_tokens, chosen)
        least = [needed / (model.n_layers * PRODUCT_ROWS) * seconds for seconds in times["products"]]
        note = f"{n_tokens} tokens, {n_pairs} pairs, {len(chosen) * model.n_heads} heads"
        rows.append(compare("growth", case, "arithmetic limit", times["ours"], least, speed_up=False, note=note))
    return rows


PRODUCT_ROWS = 512


def products(model: rim.Model) -> None:
    """The products of every layer's linear modules with PRODUCT_ROWS tokens, and nothing else."""
    inputs: dict[int, Tensor] = {}
    for layer in model.layout.layers:
        for module in layer.modules():
            if isinstance(module, nn.Linear):
                width = module.in_features
                if width not in inputs:
                    inputs[width] = torch.ones(PRODUCT_ROWS, width, dtype=model.dtype, device=model.device)
                module(inputs[width])


def layer_tokens(model: rim.Model, n_tokens: int, layers: Sequence[int]) -> int:
    """Tokens times layers that patching every head of `layers` at one prompt's last token must compute."""
    return n_tokens * model.n_layers + sum(model.n_heads * (model.n_layers - layer) for layer in layers)
