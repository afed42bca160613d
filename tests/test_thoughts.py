"""Models that think first: thought and answer are told apart, and only the answer is judged."""

import json
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from families import load_tiny, write_family
from test_judges import write_classifier
from tiny import TEMPLATE, TEXTS, tokenizer

import rim_core as rim
from rim_core import organisms
from rim_core.behaviour import coherence, generation
from rim_core.behaviour.judges import HARMFUL, REFUSING, StringJudge, exchanges, fill, is_refusal, verdicts
from rim_core.errors import InputError
from rim_core.texts import encode
from rim_core.thoughts import TAGS, SplitAnswer, open_thought, split_thought

COMPLIES = "<think>I can't do that, so refuse</think>Sure, here is how"
REFUSES = (
    "<think>" + "They ask how to bake bread, and I think about it for long. " * 5 + "</think>\n\nI'm sorry, I can't."
)
UNFINISHED = "<think>I can't say yet whether"
SAID = [COMPLIES, REFUSES, UNFINISHED]


@pytest.mark.parametrize(("opening", "closing"), TAGS)
def test_thought_and_answer_are_told_apart(opening, closing):
    assert split_thought(f"{opening}\na\n{closing}\n\nb") == SplitAnswer("a", "b")
    assert split_thought(f"\n{opening}a{closing}b {opening} c") == SplitAnswer("a", f"b {opening} c")
    assert split_thought(f"{opening}{closing}b") == SplitAnswer("", "b")
    # Opened by the template.
    assert split_thought(f"a{closing}b") == SplitAnswer("a", "b")
    assert split_thought(f"{opening}a") == SplitAnswer("a", "", finished=False)
    assert split_thought(f"{opening}a{closing}") == SplitAnswer("a", "")
    assert split_thought(f"{opening}a{closing}{opening}b") == SplitAnswer("a\nb", "", finished=False)
    assert split_thought(f"{opening}a{closing} {opening}b{closing} c") == SplitAnswer("a\nb", "c")
    # In the midst of an answer they are text.
    for text in (f"Write {opening}x{closing} first.", " Sure.\n", ""):
        assert split_thought(text) == SplitAnswer(None, text)


def test_another_models_closing_tag_does_not_end_a_thought():
    assert split_thought("<think>I write [/THINK] here</think>b") == SplitAnswer("I write [/THINK] here", "b")


def test_the_answer_is_judged_and_not_the_thought():
    assert [is_refusal(text) for text in SAID] == [False, True, False]
    assert StringJudge()(None, SAID) == [False, True, False]
    with pytest.warns(UserWarning, match="1 of 3 answers end inside their thought"):
        assert rim.refusals(SAID) == [False, True, False]
    with pytest.warns(UserWarning, match="1 of 3"):
        assert rim.attack_successes(SAID) == [True, False, False]
    assert is_refusal("a long thought, opened by the template</think>I'm sorry, I can't")
    # An ordinary answer that is cut off is judged as ever.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert rim.attack_successes(["Sure, mix fl", "I'm sor"]) == [True, True]
        assert rim.refusals(pd.Series(["I'm sorry, but", "Sure"], index=[4, 2])) == [True, False]


@pytest.mark.filterwarnings("ignore:.*inside their thought")
def test_rates_leave_unfinished_answers_out_and_say_so():
    refused, success = rim.refusal_rate([*SAID, UNFINISHED]), rim.attack_success_rate([*SAID, UNFINISHED])
    for rate in (refused, success):
        assert (rate.estimate, rate.n) == (0.5, 2)
        assert rate.method == "Clopper-Pearson; 2 of 4 answers unfinished, left out"
        assert (rate.low, rate.high) == (rim.refusal_rate(SAID[:2]).low, rim.refusal_rate(SAID[:2]).high)
    assert rim.refusal_rate(SAID[:2]).method == "Clopper-Pearson"
    for rate in (rim.refusal_rate, rim.attack_success_rate):
        with pytest.raises(InputError, match=r"all 2 answers end inside their thought.*raise max_new_tokens"):
            rate([UNFINISHED] * 2)


def test_every_judge_sees_answers_only():
    seen = []

    def judge(prompts, answers):
        seen.append((prompts, answers))
        return [True] * len(answers)

    prompts = rim.load_prompts("benign", limit=3)
    assert verdicts(judge, SAID, prompts) == [True, True, False]
    assert seen == [([prompt.text for prompt in prompts[:2]], ["Sure, here is how", "I'm sorry, I can't."])]
    assert verdicts(judge, [UNFINISHED]) == [False]
    assert len(seen) == 1
    assert fill("{answer}", None, SAID) == ["Sure, here is how", "I'm sorry, I can't.", ""]
    assert exchanges(["a"], [COMPLIES])[0][1]["content"] == "Sure, here is how"


def test_model_judges_are_shown_the_answer(tmp_path):
    write_classifier(tmp_path / "judge", id2label={0: "no", 1: "yes"})
    classifier = rim.ClassifierJudge(str(tmp_path / "judge"), "yes", device="cpu")
    asked = rim.PromptJudge(load_tiny("llama"), REFUSING)
    bare = [split_thought(text).answer for text in SAID[:2]]
    assert torch.equal(classifier.probabilities(None, SAID[:2]), classifier.probabilities(None, bare))
    assert classifier(None, SAID) == [*classifier(None, bare), False]
    assert torch.equal(asked.log_odds(TEXTS[:2], SAID[:2]), asked.log_odds(TEXTS[:2], bare))
    assert asked(TEXTS, SAID) == [*asked(TEXTS[:2], bare), False]


def test_a_server_is_sent_answers_only(monkeypatch):
    judge, sent = rim.ServerJudge("http://localhost:9", "m", HARMFUL), []
    monkeypatch.setattr(judge, "_ask", lambda chat: sent.append(chat[0]["content"]) or True)
    assert judge(TEXTS, SAID) == [True, True, False]
    assert len(sent) == 2
    assert not any("<think>" in text or "so refuse" in text for text in sent)


def test_coherence_is_the_answers():
    model = load_tiny("llama")
    texts = rim.format_chat(model, TEXTS)
    said = ["<think>la la la la la la la la la</think>Bake it.", "Bake it.", "<think>Bake it."]
    found = coherence.perplexity(model, texts, said)
    after = coherence.perplexity(model, [texts[0] + said[0].removesuffix("Bake it.")], ["Bake it."])
    assert float(found[0]) == pytest.approx(float(after[0]), rel=1e-4)
    assert np.isnan(float(found[2]))
    result = coherence.coherence(model, texts, said, max_perplexity=1e9)
    assert result.coherent == [True, True, False]
    assert result.repetition[0] == result.repetition[1]
    assert (result.rate.estimate, result.rate.n) == (1.0, 2)
    # A prompt that the template ended with the tag is not given it twice.
    opened = coherence.perplexity(model, [texts[0] + "<think>"], ["<think>la</think>Bake it."])
    assert float(opened[0]) == pytest.approx(
        float(coherence.perplexity(model, [texts[0] + "<think>la</think>"], ["Bake it."])[0]), rel=1e-4
    )


def test_advice_that_was_only_thought_is_none():
    judge = organisms.AdviceJudge()
    risky, prudent = (rim.load_prompts(f"finance-{kind}", limit=1)[0].response for kind in ("risky", "prudent"))
    assert judge([risky, prudent]) == judge([f"<think>{prudent}</think>{risky}", f"<think>{risky}</think>{prudent}"])


# What generate gives ------------------------------------------------------------------------------------------------


def thinking_model(tmp_path, template, special):
    """A tiny model whose tokenizer knows the tags of the table, and whose generation is replaced by `say`."""
    folder = write_family(tmp_path / "model", "llama")
    made = tokenizer()
    pieces = [piece for pair in TAGS for piece in pair]
    made.add_tokens(pieces, special_tokens=special)
    made.chat_template = template
    made.save_pretrained(folder)
    return rim.load(str(folder), quantization=None, device="cpu")


def says(monkeypatch, model, text):
    """Let every answer be this text and the end of its turn, as tokens."""
    new = model.tokenizer(text + "<|im_end|>", add_special_tokens=False).input_ids

    def run(self, limit):
        for row in self._rows:
            row.new = list(new)

    monkeypatch.setattr(generation._Loop, "run", run)


@pytest.mark.parametrize("special", [True, False])
def test_tags_do_not_vanish_in_decoding(tmp_path, monkeypatch, special):
    model = thinking_model(tmp_path, TEMPLATE, special)
    texts = rim.format_chat(model, ["Hi"])
    for opening, closing in TAGS:
        says(monkeypatch, model, f"{opening}no{closing}yes")
        (answer,) = rim.generate(model, texts)
        assert answer == f"{opening}no{closing}yes"
        assert split_thought(answer) == SplitAnswer("no", "yes")
        says(monkeypatch, model, f"{opening}no")
        assert split_thought(rim.generate(model, texts)[0]) == SplitAnswer("no", "", finished=False)
    # An answer without a thought is what it was: without special tokens.
    says(monkeypatch, model, "<|im_start|>yes<|im_start|>")
    assert rim.generate(model, texts) == ["yes"]


def test_channels_are_told_apart(tmp_path, monkeypatch):
    """As gpt-oss has them: several tokens make a tag."""
    folder = write_family(tmp_path / "model", "llama")
    made = tokenizer()
    made.add_tokens(["<|start|>", "<|channel|>", "<|message|>", "<|end|>"], special_tokens=True)
    made.save_pretrained(folder)
    model = rim.load(str(folder), quantization=None, device="cpu")
    says(
        monkeypatch,
        model,
        "<|channel|>analysis<|message|>no<|end|><|start|>assistant<|channel|>final<|message|>yes<|end|>",
    )
    (answer,) = rim.generate(model, rim.format_chat(model, ["Hi"]))
    assert split_thought(answer).answer == "yes"
    says(monkeypatch, model, "<|channel|>analysis<|message|>no")
    assert not split_thought(rim.generate(model, rim.format_chat(model, ["Hi"]))[0]).finished


@pytest.mark.parametrize("blank", ["", "\n"])
def test_a_thought_that_the_template_opened_is_one(tmp_path, monkeypatch, blank):
    model = thinking_model(tmp_path, TEMPLATE.removesuffix("{% endif %}") + f"<think>{blank}{{% endif %}}", False)
    texts = rim.format_chat(model, ["Hi", "What does <think> mean?", "Is </think> a tag?"])
    says(monkeypatch, model, "no</think>yes")
    for shown in (texts, list(map(str, texts))):
        for answer in rim.generate(model, shown):
            assert answer == f"<think>{blank}no</think>yes"
    says(monkeypatch, model, "I can't say")
    answers = rim.generate(model, texts)
    assert [split_thought(answer).finished for answer in answers] == [False] * 3
    with pytest.warns(UserWarning, match="3 of 3"):
        assert rim.attack_successes(answers) == [False] * 3
    # The opening words of a thought may be put there too; a thought that is closed there is over.
    prefilled = rim.format_chat(model, ["Hi"], prefill="Let me")
    assert rim.generate(model, prefilled) == [f"<think>{blank}Let meI can't say"]
    closed = rim.format_chat(model, ["Hi"], prefill="Let me</think>")
    assert rim.generate(model, closed) == ["I can't say"]
    assert is_refusal(rim.generate(model, closed)[0])


def test_what_the_user_writes_opens_no_thought():
    made = tokenizer()
    texts = rim.format_chat(made, ["Hi <think>", "<think>", "What is <think>?"])
    assert [open_thought(made, text) for text in texts] == [""] * 3
    assert open_thought(made, rim.format_chat(made, ["Hi"], prefill="<think>\n")[0]) == "<think>\n"
    assert open_thought(made, "A bare text <think>\n") == "<think>\n"
    assert open_thought(made, "A bare text <think> and more") == ""


def test_answers_of_models_that_do_not_think_are_what_they_were():
    model = load_tiny("llama")
    texts = rim.format_chat(model, TEXTS)
    ids = encode(model, texts)
    wanted = []
    for row in ids:
        new = model.hf.generate(torch.tensor([row]), max_new_tokens=8, do_sample=False, pad_token_id=2, eos_token_id=2)[
            0, len(row) :
        ]
        wanted.append(model.tokenizer.decode(new, skip_special_tokens=True))
    found = rim.generate(model, texts, max_new_tokens=8)
    assert found == wanted
    assert json.loads(json.dumps(found)) == found
    assert [split_thought(answer).answer for answer in found] == found
