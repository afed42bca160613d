"""Tiny random models of several families, written to disk with a tokenizer and a chat template; one as a GGUF file."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFWriter, TokenType
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SIZES = {"num_hidden_layers": 3, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 400}
GQA = {"num_key_value_heads": 2, "intermediate_size": 64}
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
# Windows of 6 tokens and soft caps of a few units change the numbers of short prompts.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": GQA,
    "qwen2": {**GQA, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    # Here heads times head_dim is not the width of the stream.
    "qwen3": {**GQA, "head_dim": 16},
    "mistral": {**GQA, "sliding_window": 6},
    "gemma2": {
        **GQA,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": 6,
        "layer_types": MIXED,
        "final_logit_softcapping": 8.0,
        "attn_logit_softcapping": 2.0,
    },
    "gemma3_text": {**GQA, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 6, "layer_types": MIXED},
    "phi3": {**GQA, "sliding_window": 6},
    "gpt2": {},
    "gpt_neox": {"intermediate_size": 64},
    "olmo2": GQA,
    "falcon": {},
    "cohere2": {**GQA, "sliding_window": 6, "layer_types": MIXED, "logit_scale": 0.25},
    "qwen3_moe": {**GQA, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
}
TEXTS = ("How do I bake bread?", "Explain the tides to a child in two short sentences.", "Why is the sky blue?")


def tokenizer(template: bool = True, texts: Sequence[str] = TEXTS, size: int = 400) -> PreTrainedTokenizerFast:
    """A byte-level BPE learnt from `texts`."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    raw.train_from_iterator(texts, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|im_end|>", pad_token="<|im_end|>")
    if template:
        made.chat_template = TEMPLATE
    return made


def write_model(
    folder: Path, family: str = "llama", *, template: bool = True, seed: int = 0, drawn: bool = False, **changes: Any
) -> Path:
    """Write a tiny random model of a family, one of `FAMILIES` or any other with its own `changes` to the sizes.

    Usual initial weights are so small that every output is nearly the same. They are made larger, so that errors show;
    or `drawn` anew, and then biases and norms, which are plain, differ too.
    """
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **{**SIZES, **FAMILIES.get(family, {}), **changes})
    config.eos_token_id = config.pad_token_id = 2
    config.bos_token_id = 1
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            embeds = "embed" in name or "wte" in name
            if parameter.dim() > 1:
                parameter.normal_(std=0.5 if embeds else 0.2) if drawn else parameter.mul_(20.0 if embeds else 6.0)
            elif drawn:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokenizer(template).save_pretrained(folder)
    return folder


def write_gguf(path: Path, folder: Path, template: str | None = TEMPLATE) -> Path:
    """A tiny Llama's folder as a GGUF file of float32, written as llama.cpp's converter does."""
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    bpe = json.loads((folder / "tokenizer.json").read_text())
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads["q_proj"])
    writer.add_head_count_kv(heads["k_proj"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(config["hidden_size"] // heads["q_proj"])
    writer.add_vocab_size(config["vocab_size"])
    words = dict.fromkeys(bpe["model"]["vocab"]) | dict.fromkeys(t["content"] for t in bpe["added_tokens"])
    special = {t["content"] for t in bpe["added_tokens"]}
    tokens = sorted(words, key=lambda word: bpe["model"]["vocab"][word])
    tokens += [f"[PAD{number}]" for number in range(len(tokens), config["vocab_size"])]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    kinds = {True: TokenType.CONTROL, False: TokenType.NORMAL}
    writer.add_token_types([kinds[token in special] for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in bpe["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    if template is not None:
        writer.add_chat_template(template)
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
    }
    for name, tensor in tensors.items():
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        for theirs, count in heads.items():
            if f"attn_{theirs[0]}." in name:  # rotary pairs lie side by side there
                tensor = tensor.reshape(count, 2, -1, tensor.shape[-1]).transpose(1, 2).reshape(tensor.shape)
        writer.add_tensor(name.replace("model.layers.", "blk."), tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
