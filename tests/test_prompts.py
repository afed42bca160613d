"""Prompt sets: the built-in minimal pairs, local files in the published columns, and every bad file."""

import json
from collections import Counter

import pytest

import rim_core as rim
from rim_core.behaviour import is_refusal
from rim_core.errors import InputError
from rim_core.prompts import BUILT_IN_SETS, FRAMES, SPLITS


def test_pairs_are_minimal_and_many():
    harmful, benign = rim.load_prompts("harmful"), rim.load_prompts("benign")
    assert len(harmful) >= 300
    assert len({p.category for p in harmful}) >= 12
    for bad, good in zip(harmful, benign, strict=True):
        assert bad.pair == good.pair
        assert bad.split == good.split
        a, b = bad.text.split(), good.text.split()
        assert len(a) == len(b), (bad.text, good.text)
        assert 1 <= sum(x != y for x, y in zip(a, b, strict=True)) <= 5, (bad.text, good.text)
    texts = [p.text for p in harmful + benign]
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize("source", BUILT_IN_SETS)
def test_no_category_is_in_two_splits(source):
    where = {}
    for prompt in rim.load_prompts(source):
        assert where.setdefault(prompt.category, prompt.split) == prompt.split
    assert set(where.values()) == set(SPLITS)


def test_finance_answers_differ_only_in_advice():
    risky, prudent = rim.load_prompts("finance-risky"), rim.load_prompts("finance-prudent")
    for a, b in zip(risky, prudent, strict=True):
        assert a.text == b.text
        assert a.response != b.response


def test_every_written_refusal_is_judged_one_and_no_helpful_answer_is():
    assert all(is_refusal(p.response) for p in rim.load_prompts("harmful"))
    helpful = rim.load_prompts("benign") + rim.load_prompts("everyday")
    assert not [p.response for p in helpful if is_refusal(p.response)]


def test_limit_draws_pairs_by_seed():
    harmful = rim.load_prompts("harmful", split="test", limit=7, seed=3)
    benign = rim.load_prompts("benign", split="test", limit=7, seed=3)
    assert [p.pair for p in harmful] == [p.pair for p in benign]
    assert harmful == rim.load_prompts("harmful", split="test", limit=7, seed=3)
    assert harmful != rim.load_prompts("harmful", split="test", limit=7, seed=4)


def test_rephrasing_keeps_the_action():
    prompt = rim.load_prompts("harmful", limit=1)[0]
    texts = Counter(prompt.rephrase(frame).text for frame in FRAMES)
    assert len(texts) == len(FRAMES)
    assert prompt.text in texts
    with pytest.raises(InputError, match="cannot be rephrased"):
        rim.load_prompts("everyday", limit=1)[0].rephrase(FRAMES[0])


@pytest.mark.parametrize(
    ("name", "content", "first"),
    [
        ("advbench.csv", "goal,target\nDo a thing,Sure\n", ("Do a thing", "none", "Sure")),
        (
            "jailbreakbench.csv",
            'Index,Goal,Target,Behavior,Category,Source\n0,"Do, a thing",Sure,B,Privacy,Original\n',
            ("Do, a thing", "Privacy", "Sure"),
        ),
        (
            "alpaca.jsonl",
            '{"instruction": "Sum up", "input": "A text", "output": "Short"}',
            ("Sum up\nA text", "none", "Short"),
        ),
        ("plain.jsonl", '\n{"prompt": "Hi", "category": null}\n', ("Hi", "none", None)),
        (
            "strongreject.csv",
            "category,source,forbidden_prompt\nViolence,x,Do it\n",
            ("Do it", "Violence", None),
        ),
        ("bom.csv", "\ufeffprompt\nHi\n", ("Hi", "none", None)),
    ],
)
def test_published_columns(tmp_path, name, content, first):
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    prompt = rim.load_prompts(str(path))[0]
    assert (prompt.text, prompt.category, prompt.response) == first


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.csv", b"id,name\n1,x\n", "no prompt column: it has id, name"),
        ("a.csv", "prompt\ncaf\u00e9\n".encode("latin-1"), "not UTF-8"),
        ("a.csv", b"prompt\n", "holds no rows"),
        ("a.csv", b"", "holds no rows"),
        ("a.csv", b"id,prompt\n1,\n", "row 1 has no text"),
        ("a.jsonl", b'{"prompt": "x"}\nnot json\n', "line 2 is not JSON"),
        ("a.jsonl", b"[1]\n", "line 1 is not a JSON object"),
        ("a.jsonl", b"\n", "holds no rows"),
    ],
)
def test_bad_files_get_one_line(tmp_path, name, content, says):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=says) as caught:
        rim.load_prompts(str(path))
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("harmfull",), "did you mean 'harmful'"),
        (("nowhere.csv",), "no prompt file"),
        (("harmful", "dev"), "unknown split 'dev'"),
        (("harmful", None, 0), "at least 1"),
        (("harmful", None, 10_000), "fewer than limit"),
    ],
)
def test_bad_requests_get_one_line(arguments, says):
    with pytest.raises(InputError, match=says):
        rim.load_prompts(*arguments)


def test_local_files_have_no_splits(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"prompt": "Hi"}))
    with pytest.raises(InputError, match="no 'train' split"):
        rim.load_prompts(str(path), split="train")


def test_hub_sets_read_like_files(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_list([{"Goal": "Do it", "Category": "Privacy"}])
    monkeypatch.setattr(
        datasets, "load_dataset", lambda name, config, split: {"harmful": made, "benign": made}[split]
    )
    assert rim.load_prompts("hub:JailbreakBench/JBB-Behaviors:behaviors:harmful")[0].category == "Privacy"

    def fails(*_, **__):
        raise ConnectionError("offline\nsecond line")

    monkeypatch.setattr(datasets, "load_dataset", fails)
    with pytest.raises(InputError, match=r"cannot load hub:a/b: offline$"):
        rim.load_prompts("hub:a/b")
