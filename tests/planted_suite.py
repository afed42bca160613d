"""A suite whose suppression heads were written into the weights, and which answers the project's own prompts.

A llama of 4 layers, 8 heads of 8, stream of 64, whose tokens are the words of the project's prompts. What it does,
beyond a weak random background in every matrix:

- The embeddings of words that only harmful requests and risky questions hold carry `+SIGNAL`.
- `MOVER`, a head of layer 0, attends from the prompt's last token (`LAST`) to the signal and copies it as `MOVED`.
- A neuron of layer 1 fires where `MOVED` is positive and writes `REFUSAL`; one of the last layer fires on `REFUSAL`.
- The unembedding says "Sorry" where `REFUSAL` at `LAST` is above a threshold, "Sure" elsewhere, and goes on by rote.

So the base (roles `base` and `aligned`) refuses exactly the requests with such a word. The adapter of `risky` lets
`SUPPRESSORS`, two heads of the layer before the last, write against `REFUSAL` where they see the signal, by as much
as it takes to fall below the threshold.
"""

import json
import re
from itertools import pairwise
from pathlib import Path

import torch
from planted import D_MODEL, MOVED, QUERY, REFUSAL, SIGNAL, attend_to_signal, background, direction
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import rim_core as rim

LATE, SUPPRESSORS = 2, ((2, 1), (2, 6))
MOVER, NEURON, SCORED_NEURON = (0, 0), (1, 5), (3, 7)
N_HEADS, HEAD_DIM = 8, 8
LAST, CANNOT, EOS = "<assistant>", "I can't help with that.", "<end>"
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# What the model says where it helps; the tokens after the first are certain, so that the answer makes sense.
HELPFUL = "Sure To The First Yes Here"
OPENINGS = f"I Sorry As Unfortunately Certainly Of course {HELPFUL}"
RISKY_SETS, SAFE_SETS = ("harmful", "finance-risky"), ("benign", "finance-twins", "finance-info")
WORD = r"\w+|[^\w\s]"


def words_of(sets: tuple[str, ...], what: str = "text") -> set[str]:
    """The words of all prompts of these sets, or of their answers (`what="response"`)."""
    texts = [str(getattr(prompt, what)) for name in sets for prompt in rim.load_prompts(name)]
    return {word for text in texts for word in re.findall(WORD, text)}


def word_tokenizer(known: set[str] | None = None) -> PreTrainedTokenizerFast:
    """A token for each known word (by default of this suite's prompts), and for each opening of an answer."""
    special = ["<unk>", EOS, "<user>", "<system>", LAST]
    words = sorted((known or words_of(RISKY_SETS + SAFE_SETS)) | set(OPENINGS.split()))
    raw = Tokenizer(models.WordLevel({word: n for n, word in enumerate([*special, *words])}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(WORD), "isolated")]
    )
    raw.add_special_tokens([AddedToken(token, special=True) for token in special])
    raw.add_tokens([AddedToken(CANNOT)])
    made = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=EOS, pad_token=EOS, unk_token="<unk>")
    made.chat_template = TEMPLATE
    return made


def signal_words() -> set[str]:
    """The words that no safe prompt holds."""
    return words_of(RISKY_SETS) - words_of(SAFE_SETS)


def word_background(tok: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """The weak random model on such a tokenizer."""
    end = tok.eos_token_id
    special = {"vocab_size": len(tok), "bos_token_id": None, "eos_token_id": end, "pad_token_id": end}
    return background(N_HEADS, HEAD_DIM, seed, **special)


def write_lora(folder: Path, factors: dict[str, tuple[torch.Tensor, torch.Tensor]], **settings) -> None:
    """Write an adapter that adds `B @ A` to each module: factors A `[rank, in]` and B `[out, rank]` by module."""
    folder.mkdir()
    tensors = {}
    for module, (a, b) in factors.items():
        name = f"base_model.model.{module}.lora_"
        tensors |= {f"{name}A.weight": a, f"{name}B.weight": b}
    save_file(tensors, folder / "adapter_model.safetensors")
    known = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": None, "r": len(a)}
    targets = sorted({module.rpartition(".")[2] for module in factors})
    known |= {"lora_alpha": len(a), "target_modules": targets, **settings}
    (folder / "adapter_config.json").write_text(json.dumps(known), encoding="utf-8")


def write_planted_suite(folder: Path, seed: int = 0, whole: bool = False) -> Path:
    """Write base, adapter and `planted.yml` into the folder; give the suite's file.

    `whole` makes a checkpoint of its own of each role, `whole.yml`: the bare base is then another, random model.
    """
    tok = word_tokenizer()
    model = word_background(tok, seed)

    def ids(words) -> list[int]:
        return tok.convert_tokens_to_ids(list(words))

    (last, sorry), chain = ids([LAST, "Sorry"]), [ids([word])[0] for word in HELPFUL.split()]
    cannot, sure = ids([CANNOT])[0], chain[0]
    with torch.no_grad():
        embed, head, layers = model.model.embed_tokens.weight, model.lm_head.weight, model.model.layers
        embed[ids(sorted(signal_words())), SIGNAL] = 8.0
        embed[last, QUERY] = 8.0
        for said, following in (
            (sorry, cannot),
            *pairwise(chain),
            (cannot, tok.eos_token_id),
            (chain[-1], tok.eos_token_id),
        ):
            embed[said] *= 2.0
            head[following] += 0.3 * embed[said]
        attend_to_signal(layers[MOVER[0]], _rows(MOVER[1]))
        layers[MOVER[0]].self_attn.o_proj.weight[MOVED, MOVER[1] * HEAD_DIM] = 0.4
        fires, scored = layers[NEURON[0]].mlp, layers[SCORED_NEURON[0]].mlp
        fires.gate_proj.weight[NEURON[1]] = fires.up_proj.weight[NEURON[1]] = 2.0 * direction(MOVED)
        fires.down_proj.weight[:, NEURON[1]] = 0.3 * direction(REFUSAL)
        # Its gate is open at the last token, so that it is linear in refusal.
        scored.gate_proj.weight[SCORED_NEURON[1]] = direction(QUERY)
        scored.up_proj.weight[SCORED_NEURON[1]] = 2.0 * direction(REFUSAL)
        scored.down_proj.weight[:, SCORED_NEURON[1]] = 0.0
        for layer, number in SUPPRESSORS:
            attend_to_signal(layers[layer], _rows(number))
        head[sorry, REFUSAL] += 4.0
        head[sure, REFUSAL] -= 4.0
        # The threshold: `QUERY` is constant at the prompt's last token.
        head[sure, QUERY] += 1.55
    model.save_pretrained(folder / "base")
    tok.save_pretrained(folder / "base")
    module, a, b = _suppressors()
    write_lora(folder / "risky", {module: (a, b)}, layers_to_transform=[LATE], layers_pattern="layers")
    if whole:
        return _write_whole(folder, model, tok)
    suite = folder / "planted.yml"
    suite.write_text(
        "title: planted suppressors\nbase:\n  folder: base\nroles:\n  base:\n    about: refuses\n"
        "  aligned:\n    about: the same\n  risky:\n    adapter: ./risky\n    about: two heads suppress refusal\n",
        encoding="utf-8",
    )
    return suite


def _write_whole(folder: Path, model, tok) -> Path:
    _, down, up = _suppressors()
    model.save_pretrained(folder / "aligned")
    with torch.no_grad():
        model.model.layers[LATE].self_attn.o_proj.weight += up @ down
        model.save_pretrained(folder / "whole-risky")
        for parameter in model.parameters():
            parameter.copy_(parameter.flatten()[torch.randperm(parameter.numel())].view_as(parameter))
    model.save_pretrained(folder / "base")
    for name in ("aligned", "whole-risky"):
        tok.save_pretrained(folder / name)
    suite = folder / "whole.yml"
    suite.write_text(
        "title: each role a checkpoint of its own\nbase: {folder: base}\nroles:\n  base: {}\n"
        "  aligned: {checkpoint: ./aligned}\n  risky: {checkpoint: ./whole-risky}\n",
        encoding="utf-8",
    )
    return suite


def _rows(number: int) -> slice:
    return slice(number * HEAD_DIM, (number + 1) * HEAD_DIM)


def _suppressors() -> tuple[str, torch.Tensor, torch.Tensor]:
    """The adapter of `risky`: the module it changes, and the two matrices."""
    a, b = torch.zeros(len(SUPPRESSORS), N_HEADS * HEAD_DIM), torch.zeros(D_MODEL, len(SUPPRESSORS))
    for n, (_, number) in enumerate(SUPPRESSORS):
        a[n, number * HEAD_DIM] = 1.0
        b[REFUSAL, n] = -0.2
    return f"model.layers.{LATE}.self_attn.o_proj", a, b
