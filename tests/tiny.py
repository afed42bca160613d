"""Tiny random models of several families, written to disk with a tokenizer and a chat template."""

from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SIZES = {"num_hidden_layers": 3, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 400}
FAMILIES = {
    "llama": {"num_key_value_heads": 2, "intermediate_size": 64},
    # Here heads times head_dim is not the width of the stream.
    "qwen3": {"num_key_value_heads": 2, "intermediate_size": 64, "head_dim": 16},
    "mistral": {"num_key_value_heads": 2, "intermediate_size": 64, "sliding_window": 6},
    "gpt_neox": {"intermediate_size": 64},
    "gpt2": {},
    "gemma2": {"num_key_value_heads": 2, "intermediate_size": 64, "head_dim": 8},
}
TEXTS = (
    "How do I bake bread?",
    "Explain the tides to a child in two short sentences.",
    "Why is the sky blue?",
)


def tokenizer(
    template: bool = True, texts: Sequence[str] = TEXTS, size: int = 400
) -> PreTrainedTokenizerFast:
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
    folder: Path, family: str = "llama", template: bool = True, seed: int = 0, tied: bool | None = None
) -> Path:
    torch.manual_seed(seed)
    ties = {} if tied is None else {"tie_word_embeddings": tied}
    config = AutoConfig.for_model(family, **SIZES, **FAMILIES[family], **ties)
    config.eos_token_id = config.pad_token_id = 2
    config.bos_token_id = 1
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        # Random initial weights are so small that every output is nearly the same; larger ones make errors show.
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(6.0 if "embed" not in name and "wte" not in name else 20.0)
    model.save_pretrained(folder)
    tokenizer(template).save_pretrained(folder)
    return folder
