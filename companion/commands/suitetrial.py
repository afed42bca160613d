"""A suite tried out: its architecture on the meta device, its tokenizer, and, where memory allows, its models."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rim_core.errors import InputError, RimError, first_line
from rim_core.models.checks import Check
from rim_core.models.layout import find_layout
from rim_core.models.loading import load
from rim_core.prompts import format_chat
from rim_core.suites.chattemplate import read_template
from rim_core.suites.checkpoints import Checkpoint
from rim_core.suites.schema import Suite
from rim_core.texts import encode_more


@dataclass(frozen=True)
class Shape:
    """What `rim_core` found in a checkpoint's architecture."""

    family: str
    layers: int
    heads: int
    head_dim: int
    width: int
    vocabulary: int
    tokens: int

    def __str__(self) -> str:
        return (
            f"{self.family}: {self.layers} layers, {self.heads} heads of {self.head_dim}, width {self.width}, "
            f"{self.tokens} tokens of a vocabulary of {self.vocabulary}"
        )


def try_architecture(checkpoint: Checkpoint, template: str | None = None) -> Shape:
    """Build a checkpoint's model without weights and use its tokenizer, with the template of a file if one is named.

    Raises:
        InputError: an architecture that `rim_core` or transformers does not know; a tokenizer that cannot be
            read, has no usable chat template, or has more tokens than the model.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    where = {"gguf_file": checkpoint.gguf} if checkpoint.gguf else {}
    try:
        config = AutoConfig.from_pretrained(str(checkpoint.folder), trust_remote_code=False, **where)
        with torch.device("meta"):
            hf: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # each family's code fails in its own way
        raise InputError(
            f"{checkpoint.ref} is no causal language model that transformers can build: {first_line(error)}"
        ) from None
    layout = find_layout(hf)
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(str(checkpoint.folder), trust_remote_code=False, **where)
    except Exception as error:  # each tokenizer class fails in its own way
        raise InputError(f"the tokenizer of {checkpoint.ref} cannot be read: {first_line(error)}") from None
    if template is not None:
        tokenizer.chat_template = read_template(template)
    if not encode_more(tokenizer, format_chat(tokenizer, ["Hello"]), "text")[0]:
        raise InputError(f"the tokenizer of {checkpoint.ref} makes no tokens of a chat: check its files")
    if len(tokenizer) > layout.d_vocab:
        raise InputError(
            f"the tokenizer of {checkpoint.ref} has {len(tokenizer)} tokens and the model {layout.d_vocab}: "
            "it belongs to another model"
        )
    return Shape(
        type(hf).__name__,
        len(layout.layers),
        layout.n_heads,
        layout.head_dim,
        layout.d_model,
        layout.d_vocab,
        len(tokenizer),
    )


def try_loading(suite: Suite, ref: str, quantization: str) -> Mapping[str, Check]:
    """Load a suite's base, put each adapter on it once, and give the measured identities of the base.

    Args:
        suite: as read.
        ref: the name or path that it can be loaded by.
        quantization: "nf4", "int8" or "none".

    Raises:
        InputError, WeightsError: what cannot be loaded, or an adapter that does not fit.
    """
    try:
        model = load(f"{ref}:{suite.bare_role}", quantization=None if quantization == "none" else quantization)
        for role in suite.roles.values():
            if role.adapter:
                with model.using(role.name):
                    pass
    except RimError as error:
        raise type(error)(str(error).replace(f"{ref}:", f"{suite.name}:")) from None
    return model.checks
