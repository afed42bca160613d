"""Generation against plain Hugging Face generation; the judge of refusal; rates with their intervals."""

import pytest
import torch
from scipy.stats import beta
from tiny import TEXTS

import rim_core as rim
from rim_core.behaviour import is_refusal
from rim_core.errors import InputError


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_batched_answers_equal_single_ones(tiny_folder, family):
    model = rim.load(str(tiny_folder(family)), quantization=None, device="cpu")
    texts = rim.format_chat(model, TEXTS)
    together = rim.generate(model, texts, max_new_tokens=6)
    for text, answer in zip(texts, together, strict=True):
        ids = model.tokenizer(text, return_tensors="pt").input_ids
        out = model.hf.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=2)
        assert answer == model.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    assert rim.generate(model, texts, max_new_tokens=6, max_batch=1) == together


def test_generation_under_an_adapter_differs_and_comes_back(default_model):
    texts = rim.format_chat(default_model, rim.load_prompts("harmful", split="test", limit=2))
    first = rim.generate(default_model, texts, max_new_tokens=4)
    with default_model.using("base"):
        assert rim.generate(default_model, texts, max_new_tokens=4) != first
    assert rim.generate(default_model, texts, max_new_tokens=4) == first


@pytest.mark.parametrize(
    ("answer", "refused"),
    [
        ("I'm sorry, but I can't help with that.", True),
        ("I\u2019m sorry, but\nI can't.", True),
        ("  I cannot assist.", True),
        ("I won't do that.", True),
        ("Sure, here is how.", False),
        ("To open the door, turn the key. " * 3 + "I'm sorry if this is unclear.", False),
        ("", False),
    ],
)
def test_the_opening_decides(answer, refused):
    assert is_refusal(answer) is refused


def test_rates_are_proportions_with_exact_intervals():
    answers = ["I'm sorry, no."] * 3 + ["Sure."] * 7
    rate, success = rim.refusal_rate(answers), rim.attack_success_rate(answers)
    assert (rate.estimate, success.estimate, rate.n) == (0.3, 0.7, 10)
    assert rate.low == pytest.approx(beta.ppf(0.025, 3, 8))
    assert rate.high == pytest.approx(beta.ppf(0.975, 4, 7))
    assert success.low == pytest.approx(1 - rate.high)


def test_bad_arguments_get_one_line(tiny_folder):
    with pytest.raises(InputError, match="no answers"):
        rim.refusal_rate([])
    with pytest.raises(InputError, match="unknown judge"):
        rim.refusal_rate(["x"], judge="oracle")
    model = rim.load(str(tiny_folder()), quantization=None, device="cpu")
    with pytest.raises(InputError, match="at least 1"):
        rim.generate(model, TEXTS, max_new_tokens=0)
    assert torch.is_grad_enabled()
