"""Judges against plain Hugging Face passes, and against a server of the test's own."""

import contextlib
import json
import socket
import time
from types import SimpleNamespace

import pytest
import torch
from families import load_tiny
from serving import Handler, serving
from tiny import TEXTS, tokenizer
from transformers import AutoConfig, AutoModelForSequenceClassification

import rim_core as rim
from rim_core.behaviour.judges import GUARD, HARMFUL, REFUSING, Question, StringJudge, fill, verdicts
from rim_core.behaviour.model_judges import ClassifierJudge, PromptJudge
from rim_core.behaviour.server_judge import ServerJudge
from rim_core.errors import InputError
from rim_core.models.hooks import Edit, editing

ANSWERS = ["Mix flour and water.", "I won't say.", "The moon pulls the sea, and the sea follows it twice a day."]


def test_the_string_judge_takes_phrases_of_its_own():
    assert StringJudge()(None, ["I cannot.", "No way."]) == [True, False]
    assert StringJudge(["No WAY"])(None, ["I cannot.", "no way."]) == [False, True]


def test_verdicts_carry_prompts_as_texts():
    prompts = rim.load_prompts("benign", split="test", limit=2)
    seen = []
    assert verdicts(lambda texts, answers: seen.append(texts) or [1, 0], ["a", "b"], prompts) == [True, False]
    assert seen == [[prompt.text for prompt in prompts]]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: Question("no field"), "needs {answer}"),
        (lambda: Question("{answer} {other}"), r"fields \['answer', 'other'\]"),
        (lambda: Question('{answer} {"json": 1}'), "literal braces"),
        (lambda: Question("{answer} }"), "literal braces twice"),
        (lambda: Question("{answer}", finds="beauty"), "unknown finding of a question 'beauty'"),
    ],
)
def test_questions_are_checked_when_they_are_made(call, words):
    with pytest.raises(InputError, match=words):
        call()


def test_text_in_braces_is_left_alone():
    assert fill("{prompt}|{answer}", ["{answer}{x}"], ["{prompt}"]) == ["{answer}{x}|{prompt}"]


# Sequence classifiers -------------------------------------------------------------------------------------------------


def write_classifier(folder, family="bert", **changes):
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = AutoConfig.for_model(
        family, **sizes, vocab_size=400, max_position_embeddings=64, pad_token_id=2, **changes
    )
    model = AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    made = tokenizer()
    made.model_max_length = 64
    made.save_pretrained(folder)
    return model.eval(), made


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_classifier_gives_the_plain_probabilities(tmp_path, family):
    names = {0: "complies", 1: "refuses", 2: "unclear"}
    plain, made = write_classifier(tmp_path / "judge", family, id2label=names)
    judge = ClassifierJudge(str(tmp_path / "judge"), "refuses", template="{prompt} {answer}", device="cpu")
    wanted = []
    for prompt, answer in zip(TEXTS, ANSWERS, strict=True):
        ids = made(f"{prompt} {answer}", return_tensors="pt").input_ids[:, :64]
        with torch.no_grad():
            wanted.append(float(plain(ids).logits[0].softmax(-1)[1]))
    found = judge.probabilities(TEXTS, ANSWERS)
    assert found.tolist() == pytest.approx(wanted, rel=1e-4)
    assert judge(TEXTS, ANSWERS) == [p > 0.5 for p in wanted]
    assert max(wanted) - min(wanted) > 0.05
    assert ClassifierJudge(str(tmp_path / "judge"), 1, device="cpu").index == 1


def test_a_classifier_cuts_long_text_at_its_window(tmp_path):
    plain, made = write_classifier(tmp_path / "judge", id2label={0: "no", 1: "yes"})
    judge = ClassifierJudge(str(tmp_path / "judge"), "yes", finds="harm", device="cpu")
    long = "Why is the sea blue? " * 30
    with torch.no_grad():
        ids = made(long, return_tensors="pt").input_ids[:, :64]
        wanted = float(plain(ids).logits[0].softmax(-1)[1])
    assert float(judge.probabilities(None, [long])) == pytest.approx(wanted, rel=1e-4)


def test_labels_that_do_not_exclude_each_other_have_their_own_probability(tmp_path):
    plain, made = write_classifier(
        tmp_path / "judge", id2label={0: "rude", 1: "refuses"}, problem_type="multi_label_classification"
    )
    judge = ClassifierJudge(str(tmp_path / "judge"), "refuses", device="cpu")
    with torch.no_grad():
        wanted = float(plain(made(ANSWERS[0], return_tensors="pt").input_ids).logits[0, 1].sigmoid())
    assert float(judge.probabilities(None, ANSWERS[:1])) == pytest.approx(wanted, rel=1e-4)


def test_a_classifier_that_cannot_be_used_is_refused(tmp_path, tiny_folder):
    write_classifier(tmp_path / "judge", id2label={0: "no", 1: "yes"})
    calls = [
        (lambda: ClassifierJudge(str(tmp_path / "judge"), "maybe", device="cpu"), "no label 'maybe'"),
        (lambda: ClassifierJudge(str(tmp_path / "judge"), 2, device="cpu"), "no label 2"),
        (lambda: ClassifierJudge(str(tiny_folder()), 1, device="cpu"), "is no sequence classifier"),
        (lambda: ClassifierJudge(str(tmp_path / "nothing"), 1, device="cpu"), "cannot load a classifier"),
        (
            lambda: ClassifierJudge(str(tmp_path / "judge"), 1, template="{prompt}{answer}", device="cpu")(None, ["x"]),
            "pass them as prompts=",
        ),
    ]
    for call, words in calls:
        with pytest.raises(InputError, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)


# Language models that are asked ---------------------------------------------------------------------------------------


def plain_log_odds(model, text, yes, no):
    """log p(yes) - log p(no) of the first tokens that differ, each said in full after the text; unpadded."""
    joint = [model.tokenizer(text + word).input_ids for word in (yes, no)]
    differs = next(i for i, (a, b) in enumerate(zip(*joint, strict=False)) if a != b)
    with torch.no_grad():
        log_p = model.hf(torch.tensor([joint[0][:differs]])).logits[0, -1].double().log_softmax(-1)
    return float(log_p[joint[0][differs]] - log_p[joint[1][differs]])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_prompted_model_gives_the_plain_log_odds(family):
    model = load_tiny(family)
    for question, chat in ((HARMFUL, True), (Question("{prompt}{answer}?", " yes", " no"), False)):
        judge = PromptJudge(model, question, chat=chat)
        texts = [
            question.template.replace("{prompt}", prompt).replace("{answer}", answer)
            for prompt, answer in zip(TEXTS, ANSWERS, strict=True)
        ]
        texts = rim.format_chat(model, texts) if chat else texts
        wanted = [plain_log_odds(model, text, question.yes, question.no) for text in texts]
        assert judge.log_odds(TEXTS, ANSWERS).tolist() == pytest.approx(wanted, rel=1e-3, abs=1e-3)
        assert judge(TEXTS, ANSWERS) == [value > 0 for value in wanted]
        assert judge.finds == "harm"


def test_a_guard_sees_the_exchange_and_is_read_where_its_verdicts_part():
    model = load_tiny("llama")
    judge = PromptJudge(model, GUARD)
    start, end = "<|im_start|>", "<|im_end|>\n"
    wanted = [
        plain_log_odds(
            model,
            f"{start}user\n{prompt}{end}{start}assistant\n{answer}{end}{start}assistant\n",
            "\n\nunsafe",
            "\n\nsafe",
        )
        for prompt, answer in zip(TEXTS, ANSWERS, strict=True)
    ]
    assert judge.log_odds(TEXTS, ANSWERS).tolist() == pytest.approx(wanted, rel=1e-3, abs=1e-3)


def test_a_prompted_model_that_cannot_decide_is_refused():
    model = load_tiny("llama")
    with pytest.raises(InputError, match="begins with the other"):
        PromptJudge(model, Question("{answer}", "yes", "yesterday"))(TEXTS, ANSWERS)
    with pytest.raises(InputError, match="pass them as prompts="):
        PromptJudge(model)(None, ANSWERS)
    edit = Edit("resid_post", 0, lambda values, positions: 2 * values)
    with editing(model, [edit]), pytest.raises(InputError, match="judge the answers outside"):
        PromptJudge(model)(TEXTS, ANSWERS)


# A server -------------------------------------------------------------------------------------------------------------


def reply(text, status=200, headers=()):
    return (status, json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}), dict(headers))


class Stub:
    """Answers by a script: one `(status, body, headers)` a request, the last one for ever."""

    def __init__(self, script, delay=0.0):
        self.requests = []
        stub = self

        class Answers(Handler):
            def respond(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                stub.requests.append((self.path, dict(self.headers), body))
                time.sleep(delay)
                chosen = script(body) if callable(script) else script[min(len(stub.requests), len(script)) - 1]
                status, text, headers = chosen
                self.answer(text.encode(), status, headers)

        self.handler = Answers


@pytest.fixture
def serve(monkeypatch):
    """Start a stub; no proxy comes between, and urllib3's pauses are noted in `serve.pauses` instead of slept."""
    pauses = []
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("urllib3.util.retry.time", SimpleNamespace(sleep=pauses.append, time=time.time))
    with contextlib.ExitStack() as open_until_the_end:

        def start(script, delay=0.0):
            stub = Stub(script, delay)
            stub.url = open_until_the_end.enter_context(serving(stub.handler)) + "/v1"
            return stub

        start.pauses = pauses
        yield start


def test_a_server_is_asked_once_an_answer_and_remembered(serve, monkeypatch):
    monkeypatch.setenv("STUB_KEY", " secret-key\n")
    stub = serve(lambda body: reply("**Yes.**" if "flour" in body["messages"][0]["content"] else "no\n"))
    judge = ServerJudge(stub.url, "tiny-judge", key_variable="STUB_KEY")
    assert stub.requests == []
    prompts, answers = [*TEXTS, TEXTS[0]], [*ANSWERS, ANSWERS[0]]
    assert judge(prompts, answers) == [True, False, False, True]
    assert len(stub.requests) == 3
    path, headers, body = stub.requests[0]
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == "Bearer secret-key"
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("tiny-judge", 0, 16)
    sent = {body["messages"][0]["content"] for _, _, body in stub.requests}
    wanted = zip(TEXTS, ANSWERS, strict=True)
    assert sent == {HARMFUL.template.format(prompt=prompt, answer=answer) for prompt, answer in wanted}
    assert judge([*prompts, "new"], [*answers, "new"]) == [True, False, False, True, False]
    assert len(stub.requests) == 4
    assert rim.attack_success_rate(answers, judge=judge, prompts=prompts).estimate == 0.5
    assert "secret" not in repr(vars(judge))


def test_a_guard_on_a_server_sees_the_exchange(serve):
    stub = serve(lambda body: reply("\n\nunsafe\nS1" if "sea" in body["messages"][1]["content"] else "\n\nsafe"))
    judge = ServerJudge(f"{stub.url}/chat/completions", "guard", GUARD, options={"max_completion_tokens": 9})
    assert judge(TEXTS, ANSWERS) == [False, False, True]
    body = next(body for _, _, body in stub.requests if "sea" in body["messages"][1]["content"])
    assert [message["role"] for message in body["messages"]] == ["user", "assistant"]
    assert body["messages"][0]["content"] == TEXTS[2]
    assert "temperature" not in body
    assert body["max_completion_tokens"] == 9
    assert "Authorization" not in stub.requests[0][1]


MALFORMED = [(200, "not json", {}), (200, '{"choices": []}', {}), (200, '["Yes"]', {}), reply(None)]


@pytest.mark.parametrize("broken", [(500, "oops", {}), (503, "", {}), (429, "slow down", {"Retry-After": "7"})])
def test_passing_trouble_is_tried_again(serve, broken):
    stub = serve([broken, broken, reply("Yes")])
    judge = ServerJudge(stub.url, "m", REFUSING, concurrency=1)
    assert judge(["a"], ["b"]) == [True]
    assert len(stub.requests) == 3
    assert serve.pauses == ([7, 7] if broken[0] == 429 else [1])
    assert rim.refusal_rate(["b"], judge=judge, prompts=["a"]).estimate == 1


def test_no_server_is_waited_for_beyond_a_minute(serve):
    serve_slow = serve([(503, "", {"Retry-After": "86400"}), reply("Yes")])
    assert ServerJudge(serve_slow.url, "m")(["a"], ["b"]) == [True]
    assert serve.pauses == [60]


@pytest.mark.parametrize(
    ("script", "words", "asked"),
    [
        *[([broken], r"sent a reply without choices\[0\].message.content", 1) for broken in MALFORMED],
        ([(500, "oops\nmore", {})], "answered 500 'oops more'", 3),
        ([(401, "bad key", {})], "answered 401 'bad key'", 1),
        ([(307, "", {"Location": "/elsewhere"})], "answered 307", 1),
        ([reply("Not sure")], "replied 'Not sure', neither 'Yes' nor 'No'", 1),
        ([reply("Yesterday")], "replied 'Yesterday'", 1),
        ([reply("")], "replied ''", 1),
    ],
)
def test_lasting_trouble_is_said_in_one_line(serve, script, words, asked):
    stub = serve(script)
    with pytest.raises(InputError, match=words) as caught:
        ServerJudge(stub.url, "m", attempts=3)(["a"], ["b"])
    assert "\n" not in str(caught.value)
    assert len(stub.requests) == asked


def test_what_was_judged_before_a_failure_is_kept(serve):
    stub = serve([reply("Yes"), reply("No"), (400, "too long", {}), reply("Yes")])
    judge = ServerJudge(stub.url, "m", concurrency=1)
    with pytest.raises(InputError, match="400 'too long'"):
        judge(TEXTS, ANSWERS)
    asked = len(stub.requests)
    assert judge(TEXTS, ANSWERS) == [True, False, True]
    assert asked <= len(stub.requests) <= asked + 1


def test_a_server_that_is_slow_or_gone_is_given_up(serve):
    stub = serve([reply("Yes")], delay=1.0)
    with pytest.raises(InputError, match=r"no reply within 0\.1 s"):
        ServerJudge(stub.url, "m", timeout=0.1, attempts=2)(["a"], ["b"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(InputError, match="cannot be reached"):
        ServerJudge(f"http://127.0.0.1:{port}/v1", "m", attempts=2)(["a"], ["b"])
    assert len(stub.requests) == 2


def test_settings_of_a_server_are_checked_before_anything_is_sent(serve, monkeypatch):
    stub = serve([reply("Yes")])
    monkeypatch.delenv("STUB_KEY", raising=False)
    monkeypatch.setenv("BROKEN_KEY", "zz\nqq")
    calls = [
        (lambda: ServerJudge("localhost:8000", "m"), "is no server"),
        (lambda: ServerJudge(stub.url, "m", key_variable="STUB_KEY"), "STUB_KEY holds no key"),
        (lambda: ServerJudge(stub.url, "m", key_variable="BROKEN_KEY"), "BROKEN_KEY holds no key"),
        (lambda: ServerJudge(stub.url, "m", attempts=0), "at least 1"),
        (lambda: ServerJudge(stub.url, "m")(None, ["b"]), "pass them as prompts="),
        (lambda: ServerJudge(stub.url, "m")(["a", "c"], ["b"]), "prompts has 2 items and answers 1"),
        (lambda: ServerJudge("http://[bad/v1", "m")(["a"], ["b"]), "cannot be asked"),
    ]
    for call, words in calls:
        with pytest.raises(InputError, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)
        assert "qq" not in str(caught.value)
    assert stub.requests == []
