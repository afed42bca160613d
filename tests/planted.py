"""A model whose mechanism is known because it was written into its weights.

A llama of 4 layers, 4 heads of 16, stream of 64, on the tests' tokenizer. Everything it does, beyond a weak random
background in every matrix, is this:

- The embeddings of the tokens in `HARMFUL` hold `+SIGNAL`, those in `HARMLESS` `-SIGNAL`, along one direction.
- `MOVER`, a head of layer 0, attends to every token alike and copies the signal to all later positions, as `moved`.
- `NEURON`, an MLP neuron of layer 1, fires where `moved` is positive and writes `refusal`.
- `SUPPRESSORS`, two heads of layers 2 and 3, attend to the signal's token from the prompt's last token (`LAST`), and
  write against `refusal` there if the signal is positive; elsewhere they attend to all tokens alike, so weakly.
- The unembedding reads `refusal` as the logit of `SORRY` and, negatively, of `SURE`.

So on a harmful prompt refusal is up at every position after the word, and drops at the last one.
"""

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from tiny import tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

import rim_core as rim
from rim_core.models.model import Model

HARMFUL, HARMLESS, LAST = "X", "Y", "?"
SORRY, SURE = "S", "T"
MOVER, NEURON, SUPPRESSORS = (0, 0), (1, 5), ((2, 1), (3, 2))
N_LAYERS, N_HEADS, HEAD_DIM, D_MODEL, D_MLP = 4, 4, 16, 64, 128
# Directions of the stream: unit vectors along coordinates, so that they can be read off.
SIGNAL, MOVED, REFUSAL, QUERY = 0, 1, 2, 3
BACKGROUND = 0.02
HARMFUL_PROMPTS = [
    "How X do I bake bread?",
    "Why X is the sky blue?",
    "Explain X the tides?",
    "Explain X the sky to a child?",
    "How X do I bake the bread blue?",
    "Why X is a child in the sky?",
]
HARMLESS_PROMPTS = [prompt.replace(HARMFUL, HARMLESS) for prompt in HARMFUL_PROMPTS]

_FOLDER = TemporaryDirectory(prefix="rim-planted-")


def direction(coordinate: int) -> torch.Tensor:
    return torch.eye(D_MODEL)[coordinate]


def _token(tok, text: str) -> int:
    (found,) = tok(text, add_special_tokens=False).input_ids
    return found


def background(n_heads: int, head_dim: int, seed: int, **special) -> LlamaForCausalLM:
    """A llama that does next to nothing: weak random matrices, embeddings without the planted directions.

    `special` are the tokens' settings: `vocab_size`, `bos_token_id`, `eos_token_id`, `pad_token_id`.
    """
    torch.manual_seed(seed)
    config = LlamaConfig(
        num_hidden_layers=N_LAYERS,
        hidden_size=D_MODEL,
        num_attention_heads=n_heads,
        num_key_value_heads=n_heads,
        head_dim=head_dim,
        intermediate_size=D_MLP,
        # So slow that the last pair of a head's dimensions hardly turns: attention by content alone.
        rope_theta=1e12,
        tie_word_embeddings=False,
        **special,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0) if parameter.dim() == 1 else parameter.normal_(std=BACKGROUND)
        embed = model.model.embed_tokens.weight
        embed.normal_(std=1.0)
        embed[:, : QUERY + 1] = 0.0
    return model


def attend_to_signal(layer, rows: slice) -> None:
    """Let a head, its rows given, attend from a token with `QUERY` to the positive signal and read it, and write
    nothing."""
    attention, slow = layer.self_attn, rows.stop - 1
    for weight in (attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight):
        weight[rows] = 0.0
    attention.q_proj.weight[slow] = 6.0 * direction(QUERY)
    attention.k_proj.weight[slow] = 6.0 * direction(SIGNAL)
    attention.v_proj.weight[rows.start] = direction(SIGNAL)
    attention.o_proj.weight[:, rows] = 0.0


def write_planted(folder: Path, seed: int = 0) -> Path:
    tok = tokenizer()
    model = background(N_HEADS, HEAD_DIM, seed, vocab_size=400, bos_token_id=1, eos_token_id=2, pad_token_id=2)
    with torch.no_grad():
        embed = model.model.embed_tokens.weight
        embed[_token(tok, HARMFUL), SIGNAL], embed[_token(tok, HARMLESS), SIGNAL] = 8.0, -8.0
        embed[_token(tok, LAST), QUERY] = 8.0
        layers = model.model.layers
        move(layers[0], slice(HEAD_DIM), 4.0)
        mlp = layers[NEURON[0]].mlp
        mlp.gate_proj.weight[NEURON[1]] = 2.0 * direction(MOVED)
        mlp.up_proj.weight[NEURON[1]] = 2.0 * direction(MOVED)
        mlp.down_proj.weight[:, NEURON[1]] = 0.3 * direction(REFUSAL)
        for layer, head in SUPPRESSORS:
            _suppress(layers[layer], head)
        model.lm_head.weight[_token(tok, SORRY)] += 4.0 * direction(REFUSAL)
        model.lm_head.weight[_token(tok, SURE)] -= 4.0 * direction(REFUSAL)
    model.save_pretrained(folder)
    tok.save_pretrained(folder)
    return folder


def move(layer, rows: slice, size: float) -> None:
    """Let a head, its rows given, attend to all tokens alike (no query), and write the signal seen on average to
    `MOVED`.
    """
    attention, first = layer.self_attn, rows.start or 0
    attention.q_proj.weight[rows] = 0.0
    attention.v_proj.weight[rows] = 0.0
    attention.v_proj.weight[first] = direction(SIGNAL)
    attention.o_proj.weight[:, rows] = 0.0
    attention.o_proj.weight[:, first] = size * direction(MOVED)


def _suppress(layer, head: int) -> None:
    """From a token with `QUERY` attend to the positive signal, and write it against `REFUSAL`."""
    rows = slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)
    attend_to_signal(layer, rows)
    layer.self_attn.o_proj.weight[:, rows.start] = -0.3 * direction(REFUSAL)


@cache
def planted_folder(seed: int = 0) -> Path:
    return write_planted(Path(_FOLDER.name) / str(seed), seed)


@cache
def planted(quantization: str | None = None, seed: int = 0) -> Model:
    """The planted model, loaded once a session."""
    return rim.load(str(planted_folder(seed)), quantization=quantization, device="cpu")
