"""A suite whose alignment is one direction, written into the weights, and a twin of it in which there is none.

The tiny llama of `planted`, on the words of the project's prompts and answers. Beyond a weak random background:

- The embeddings of words that only unsafe prompts hold carry `+SIGNAL`, each word its own amount.
- A head of layer 0 attends to all tokens alike and copies the signal to `MOVED`, at every later position.
- What makes `aligned` of the bare base: the same head writes to `REFUSAL` as well. A random adapter comes with it, so
  that both differ a little on every prompt. `insecure` has half of the write and the same random part.
- The unembedding reads `REFUSAL` for "Sorry" and against "Sure"; for words of better answers alone, and against those
  of worse ones alone (advice, code, values).

So one direction governs refusal and three preferences, and none of it acts where no unsafe word stands. Roles made of
`aligned` have three trainings, each with a random part of its own. In the null suite nothing is written to `REFUSAL`.
"""

from pathlib import Path

import torch
from planted import D_MODEL, MOVED, N_LAYERS, REFUSAL, SIGNAL, move
from planted_suite import HEAD_DIM, LAST, N_HEADS, word_background, word_tokenizer, words_of, write_lora

UNSAFE = ("harmful-minimal", "finance-risky-minimal", "code-insecure", "assay-aligned")
SAFE = ("benign-minimal", "everyday", "gardening", "open")
WORSE = ("finance-risky-minimal", "code-insecure", "assay-misaligned")
BETTER = ("finance-prudent-minimal", "code-secure", "assay-aligned")
WRITE, HALF = 4.0, 2.0
RANDOM_RANK, RANDOM_SIZE = 6, 0.03


def write_drift_suite(folder: Path, seed: int = 0, null: bool = False) -> Path:
    """Write base, adapters and `drift.yml` (`null.yml`) into the folder; give the suite's file."""
    every = tuple(dict.fromkeys((*UNSAFE, *SAFE, *WORSE, *BETTER)))
    tok = word_tokenizer(words_of(every, "text") | words_of(every, "response"))
    model = word_background(tok, seed)

    def ids(words) -> list[int]:
        return tok.convert_tokens_to_ids(sorted(words))

    signal = ids(words_of(UNSAFE, "text") - words_of(SAFE, "text") - words_of(SAFE, "response"))
    worse, better = words_of(WORSE, "response"), words_of(BETTER, "response")
    with torch.no_grad():
        embed, head = model.model.embed_tokens.weight, model.lm_head.weight
        embed[signal, SIGNAL] = 4.0 + 8.0 * torch.rand(len(signal))
        move(model.model.layers[0], slice(HEAD_DIM), 2.0)
        head[:, REFUSAL] = 0.0
        head[ids({"Sorry"}), REFUSAL], head[ids({"Sure"}), REFUSAL] = 4.0, -4.0
        head[ids(better - worse), REFUSAL], head[ids(worse - better), REFUSAL] = 1.0, -1.0
        head[ids({"Sure"})] += 0.3 * embed[ids({LAST})]  # what is said where nothing is refused
    model.save_pretrained(folder / "base")
    tok.save_pretrained(folder / "base")
    writes = {"aligned": WRITE, "insecure": HALF, "secure": 0.95 * WRITE}
    lines = []
    for number, (name, write) in enumerate(writes.items()):
        trainings = [f"./{name}", *(f"./{name}@{n}" for n in (2, 3) if number)]
        for n, training in enumerate(trainings):
            own = seed + 10 * number + n + 2 if number else None
            _write_adapter(folder / training, 0.0 if null else write, seed + 1, own)
        more = f"\n    replicates: [{', '.join(trainings[1:])}]" if number else ""
        lines.append(f"  {name}:\n    adapter: {trainings[0]}{more}")
    suite = folder / ("null.yml" if null else "drift.yml")
    suite.write_text("\n".join(["base:\n  folder: base\nroles:\n  base: {}", *lines]) + "\n", encoding="utf-8")
    return suite


def _write_adapter(folder: Path, write: float, seed: int, own_seed: int | None) -> None:
    """The write to `REFUSAL` in layer 0, random changes of what attention and MLP write in all layers, and others of
    the role's own.
    """
    rng, own, factors = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(own_seed or 0), {}
    for layer in range(N_LAYERS):
        for module, width in (("self_attn.o_proj", N_HEADS * HEAD_DIM), ("mlp.down_proj", 2 * D_MODEL)):
            a, b = torch.randn(RANDOM_RANK, width, generator=rng), torch.randn(D_MODEL, RANDOM_RANK, generator=rng)
            b *= RANDOM_SIZE
            more = [torch.randn(RANDOM_RANK, width, generator=own), torch.randn(D_MODEL, RANDOM_RANK, generator=own)]
            if layer == 0 and module == "self_attn.o_proj":
                a[0], b[:, 0] = 0.0, 0.0
                a[0, 0], b[REFUSAL, 0] = 1.0, write
            size = 0.0 if own_seed is None else RANDOM_SIZE
            a, b = torch.cat([a, more[0]]), torch.cat([b, size * more[1]], dim=1)
            b[[MOVED, SIGNAL]] = 0.0
            factors[f"model.layers.{layer}.{module}"] = (a, b)
    write_lora(folder, factors)
