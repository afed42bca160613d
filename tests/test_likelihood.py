"""`rim_core.measures.likelihood` against plain Hugging Face forwards, one example at a time."""

import math

import numpy as np
import pytest
import torch
from families import load_tiny
from plain import hooks

import rim_core as rim
from rim_core.errors import IdentityError, InputError
from rim_core.measures.likelihood import kl_divergence, log_likelihood
from rim_core.models.hooks import Edit, edit_at, editing

PROMPTS = ("How do I bake bread?", "Why?", "Explain the tides to a child in two short sentences. ")
COMPLETIONS = (" Mix flour, water and yeast; wait an hour.", " It is.", "The moon pulls the sea, and the sea moves.")
CASES = [("llama", None), ("llama", "nf4"), ("gpt2", None), ("gemma2", None), ("qwen3_moe", None)]


def tokens(model, prompt, completion):
    head = model.tokenizer(prompt).input_ids
    return head, model.tokenizer(prompt + completion).input_ids[len(head) :]


@torch.no_grad()
def distributions(model, prompt, completion):
    """Log probabilities `[completion token, vocabulary]` of one example alone, and the tokens."""
    head, tail = tokens(model, prompt, completion)
    logits = model.hf(torch.tensor([head + tail])).logits[0]
    return logits[len(head) - 1 : -1].double().log_softmax(-1), torch.tensor(tail)


@pytest.mark.parametrize(("family", "quantization"), CASES)
def test_likelihood_and_entropy_equal_a_plain_forward(family, quantization):
    model = load_tiny(family, quantization)
    before = hooks(model)
    found = log_likelihood(model, PROMPTS, COMPLETIONS)
    assert hooks(model) == before
    assert model.frame is None
    for row, example in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        log_p, tail = distributions(model, *example)
        assert found.tokens[row] == len(tail)
        assert found.log_probability[row] == pytest.approx(float(log_p.gather(1, tail[:, None]).sum()), rel=1e-4)
        entropy = -(log_p.exp() * log_p).sum(-1).mean()
        assert found.entropy[row] == pytest.approx(float(entropy), rel=1e-4)
    assert found.per_token == pytest.approx(found.log_probability / found.tokens)


@pytest.mark.parametrize("family", ["gpt2", "mistral"])  # absolute positions; a window of 6 tokens
def test_neither_batches_nor_pieces_change_a_number(family, monkeypatch):
    import rim_core.measures.likelihood as module

    model = load_tiny(family)
    together = log_likelihood(model, PROMPTS, COMPLETIONS)
    alone = log_likelihood(model, PROMPTS, COMPLETIONS, max_tokens=1)
    monkeypatch.setattr(module, "_PIECE", 1300)  # three positions
    pieces = log_likelihood(model, PROMPTS, COMPLETIONS)
    for other in (alone, pieces):
        assert other.log_probability == pytest.approx(together.log_probability, rel=1e-5)
        assert other.entropy == pytest.approx(together.entropy, rel=1e-5)


def test_probabilities_of_all_next_tokens_sum_to_one():
    """A completion of one token has its next-token probability, whose sum and entropy are known by definition."""
    model = load_tiny("llama")
    vocabulary = [model.tokenizer.decode([i]) for i in range(3, 400)]
    single = [text for text in vocabulary if len(tokens(model, PROMPTS[0], text)[1]) == 1]
    kept = {tokens(model, PROMPTS[0], text)[1][0]: text for text in single if text}
    found = log_likelihood(model, [PROMPTS[0]] * len(kept), list(kept.values()))
    log_p, _ = distributions(model, PROMPTS[0], " x")
    assert np.exp(found.log_probability).sum() == pytest.approx(float(log_p[0].exp()[list(kept)].sum()), rel=1e-4)
    assert np.ptp(found.entropy) < 1e-4
    assert 0 < found.entropy[0] < math.log(400)


def test_a_merge_across_the_boundary_leaves_the_prompt_as_it_is():
    """ "br" + "ead" is tokenised otherwise than "bread"; the prompt must stay what generation would have seen."""
    model = load_tiny("llama")
    prompt, completion = "How do I bake br", "ead?"
    head = model.tokenizer(prompt).input_ids
    assert model.tokenizer(prompt + completion).input_ids[: len(head)] != head
    tail = model.tokenizer(completion).input_ids
    with torch.no_grad():
        log_p = model.hf(torch.tensor([head + tail])).logits[0, len(head) - 1 : -1].double().log_softmax(-1)
    found = log_likelihood(model, [prompt], [completion])
    assert found.tokens[0] == len(tail)
    wanted = log_p.gather(1, torch.tensor(tail)[:, None]).sum()
    assert found.log_probability[0] == pytest.approx(float(wanted), rel=1e-4)


def test_kl_between_two_models_equals_a_plain_forward(tiny_folder):
    p, q = (rim.load(str(tiny_folder("llama", seed=seed)), quantization=None, device="cpu") for seed in (0, 1))
    found = kl_divergence(p, q, PROMPTS, COMPLETIONS)
    for row, example in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        log_p, log_q = distributions(p, *example)[0], distributions(q, *example)[0]
        wanted = torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1).mean()
        assert found.kl[row] == pytest.approx(float(wanted), rel=1e-4)
    assert (found.kl > 0).all()
    one = kl_divergence(p, q, PROMPTS, COMPLETIONS, max_tokens=1)
    assert one.kl == pytest.approx(found.kl, rel=1e-4)
    assert not np.allclose(kl_divergence(q, p, PROMPTS, COMPLETIONS).kl, found.kl, rtol=0.01)
    assert not kl_divergence(p, p, PROMPTS, COMPLETIONS).kl.any()


@pytest.fixture
def adapter(tmp_path):
    """A random LoRA adapter on a tiny llama, on projections and on the head; the model it is for."""
    from peft import LoraConfig, get_peft_model
    from tiny import write_model

    folder = write_model(tmp_path / "base")
    model = rim.load(str(folder), quantization=None, device="cpu")
    wrapped = get_peft_model(
        rim.load(str(folder), quantization=None, device="cpu").hf,
        LoraConfig(r=2, target_modules=["o_proj", "down_proj", "lm_head"], init_lora_weights=False),
    )
    wrapped.save_pretrained(tmp_path / "adapter")
    return model, str(tmp_path / "adapter")


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`", "ignore:`is_gradient_checkpointing`")
def test_kl_between_roles_of_one_base_leaves_the_active_one(adapter):
    model, folder = adapter
    examples = list(zip(PROMPTS, COMPLETIONS, strict=True))
    log_base = [distributions(model, *example)[0] for example in examples]
    found = kl_divergence(model, folder, PROMPTS, COMPLETIONS)
    assert model.role is None
    with model.using(folder):
        log_adapted = [distributions(model, *example)[0] for example in examples]
        back = kl_divergence(model, None, PROMPTS, COMPLETIONS)
        assert model.role == folder
        assert not kl_divergence(model, folder, PROMPTS, COMPLETIONS).kl.any()
    for row, (p, q) in enumerate(zip(log_base, log_adapted, strict=True)):
        assert found.kl[row] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
        assert back.kl[row] == pytest.approx(float((q.exp() * (q - p)).sum(-1).mean()), rel=1e-4)


def final_input(model, ids):
    """What the final norm is given, `[1, position, d]`."""
    seen = []
    handle = model.hf.model.norm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model.hf(torch.tensor([ids]))
    handle.remove()
    return seen[0]


def test_edits_hold_and_last_is_the_prompt_s_last_token():
    model = load_tiny("llama")
    shift = 3 * torch.randn(model.d_model, generator=torch.Generator().manual_seed(0))
    plain = log_likelihood(model, PROMPTS, COMPLETIONS)
    with editing(model, [Edit("resid_post", model.n_layers - 1, lambda values, _: values + shift)]):
        everywhere = log_likelihood(model, PROMPTS, COMPLETIONS)
    # On the last layer an edit of the prompt's last token changes the first completion token's prediction only.
    with editing(model, [edit_at("last", "resid_post", model.n_layers - 1, lambda values: values + shift)]):
        last = log_likelihood(model, PROMPTS, COMPLETIONS)
    assert not np.allclose(everywhere.log_probability, plain.log_probability, rtol=1e-3)
    for row, example in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        head, tail = tokens(model, *example)
        with torch.no_grad():
            state = final_input(model, head)[0, -1] + shift
            edited = model.hf.lm_head(model.hf.model.norm(state)).log_softmax(-1)[tail[0]]
        log_p, _ = distributions(model, *example)
        wanted = plain.log_probability[row] - float(log_p[0, tail[0]]) + float(edited)
        assert last.log_probability[row] == pytest.approx(wanted, rel=1e-4)


def test_means_and_frames():
    model = load_tiny("llama")
    found = log_likelihood(model, PROMPTS, COMPLETIONS)
    means = found.means()
    assert means["log_probability"].estimate == pytest.approx(found.log_probability.mean())
    assert means["entropy"].low <= means["entropy"].estimate <= means["entropy"].high
    assert found.means(groups=["a", "a", "b"])["per_token"].method == "cluster bootstrap over 2 groups"
    assert list(found.to_frame()) == ["example", "log_probability", "per_token", "entropy", "tokens"]
    divergence = kl_divergence(model, model, PROMPTS, COMPLETIONS)
    assert divergence.mean().estimate == 0
    assert divergence.to_frame()["tokens"].tolist() == found.tokens.tolist()


@pytest.mark.parametrize(
    ("prompts", "completions", "says"),
    [
        ([], [], "no texts"),
        (["a", "b"], ["c"], "one for each of the 2 prompts"),
        (["a"], "b", "list of completions"),
        (["a", "b"], ["c", ""], "completion 1 is empty"),
    ],
)
def test_bad_examples_get_one_line(prompts, completions, says):
    model = load_tiny("llama")
    for measure in (lambda: log_likelihood(model, prompts, completions),
                    lambda: kl_divergence(model, None, prompts, completions)):  # fmt: skip
        with pytest.raises(InputError, match=says):
            measure()


def test_another_vocabulary_is_refused(tmp_path):
    from families import write_family

    other = rim.load(str(write_family(tmp_path, "llama", vocab_size=410)), quantization=None, device="cpu")
    with pytest.raises(InputError, match="different vocabularies"):
        kl_divergence(load_tiny("llama"), other, PROMPTS, COMPLETIONS)


def test_a_model_whose_readout_is_unknown_is_refused(tiny_folder):
    from rim_core.models.checks import Check

    model = rim.load(str(tiny_folder()), quantization=None, device="cpu")
    model.checks["lens"] = Check("lens", 0.5, 1e-3)
    with pytest.raises(IdentityError, match=r"log_likelihood cannot be trusted.*'lens'"):
        log_likelihood(model, PROMPTS, COMPLETIONS)
