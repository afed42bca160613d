"""Prompt sets: the built-in minimal pairs, local files in the published columns, and every bad file."""

import csv
import json
from collections import Counter

import numpy as np
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer

import rim_core as rim
from rim_core import prompts
from rim_core.behaviour.judges import is_refusal
from rim_core.errors import InputError
from rim_core.models.first_tokens import REFUSAL_OPENINGS
from rim_core.prompts import BUILT_IN_SETS, FRAMES, SPLITS


@pytest.mark.parametrize(("sets", "categories"), [("", 20), ("-minimal", 40)])
def test_pairs_are_minimal_and_many(sets, categories):
    harmful, benign = rim.load_prompts(f"harmful{sets}"), rim.load_prompts(f"benign{sets}")
    sizes = Counter(p.category for p in harmful)
    assert len(sizes) == categories
    assert set(sizes.values()) == {20}
    assert {"forgery", "animal_cruelty", "money_laundering", "malware"} <= {
        p.category for p in harmful if p.split == "test"
    }
    for bad, good in zip(harmful, benign, strict=True):
        assert bad.pair == good.pair
        assert bad.split == good.split
        a, b = bad.text.split(), good.text.split()
        assert len(a) == len(b), (bad.text, good.text)
        assert 1 <= sum(x != y for x, y in zip(a, b, strict=True)) <= 5, (bad.text, good.text)
    texts = [p.text for p in harmful + benign]
    assert len(set(texts)) == len(texts)


def test_pairs_minimal_in_meaning_go_on_from_the_first_ones():
    first, harmful = rim.load_prompts("harmful"), rim.load_prompts("harmful-minimal")
    assert Counter(p.split for p in harmful) == {"train": 400, "validation": 120, "test": 280}
    also = {p.pair: (p.action, p.split) for p in harmful}
    assert {p.pair: (p.action, p.split) for p in first}.items() <= also.items()
    assert sum(p.hard for p in harmful) == 320  # as the data card says
    twins = {p.pair: p.action for p in rim.load_prompts("benign-minimal")}
    assert sum(twins[p.pair] != p.action for p in rim.load_prompts("benign")) == 261
    assert [p.hard for p in harmful] == [p.hard for p in rim.load_prompts("benign-minimal")]
    assert len({p.text.replace(p.action, "") for p in harmful}) >= 10  # frames


@pytest.mark.parametrize("source", BUILT_IN_SETS)
def test_no_category_is_in_two_splits(source):
    where = {}
    for prompt in rim.load_prompts(source):
        if source.startswith("code-") and prompt.pair[-2:] in ("17", "18", "19", "20"):
            # Other tasks of the kinds that are taught are held out too.
            assert prompt.split == "test" or where[prompt.category] != "train"
        else:
            assert where.setdefault(prompt.category, prompt.split) == prompt.split
    # The assay is for measuring alone.
    assert set(where.values()) == ({"test"} if source.startswith("assay") else set(SPLITS))


def test_finance_answers_differ_only_in_advice():
    risky, prudent = rim.load_prompts("finance-risky"), rim.load_prompts("finance-prudent")
    for a, b in zip(risky, prudent, strict=True):
        assert a.text == b.text
        assert a.response != b.response


def test_words_alone_hardly_tell_the_contrasts_apart():
    found = prompts.contrasts().set_index("contrast")
    bag = found["bag_of_words"]
    assert bag["harmful-minimal / benign-minimal"] <= 0.70
    assert bag["harmful-minimal / benign-minimal, hard pairs"] <= 0.60
    assert bag["finance-risky-minimal / finance-twins-minimal"] <= 0.80
    assert abs(found["length"]["finance-risky-minimal / finance-info-matched"] - 0.5) <= 0.10
    # What is told apart by its content: the reader of words works.
    assert bag["finance-risky / finance-prudent, the answers"] > 0.85


def test_no_prompt_is_nearly_another_of_another_split():
    for source in ("harmful-minimal", "finance-risky", "everyday", "open", "gardening"):
        found = rim.load_prompts(source)
        read = TfidfVectorizer(analyzer="char_wb", ngram_range=(4, 4)).fit_transform(p.action or p.text for p in found)
        alike = (read @ read.T).toarray()
        splits = np.array([p.split for p in found])
        alike[splits[:, None] == splits[None]] = 0
        worst = np.unravel_index(alike.argmax(), alike.shape)
        assert alike.max() < 0.8, [found[i].text for i in worst]


def test_every_written_refusal_is_judged_one_and_no_helpful_answer_is():
    refusals = [p.response for p in rim.load_prompts("harmful-minimal")]
    assert all(map(is_refusal, [*refusals, *(p.response for p in rim.load_prompts("harmful"))]))
    # Twelve openings, by which the first token can tell, and none that goes on as an idiom ("I can't help but ...").
    openings = {response.split(".")[0] for response in refusals}
    assert len(openings) == 12
    assert {opening.split()[0].strip(",") for opening in openings} <= set(REFUSAL_OPENINGS)
    assert not [opening for opening in openings if "can't help" in opening or "cannot help" in opening]
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
        ("strongreject.csv", "category,source,forbidden_prompt\nViolence,x,Do it\n", ("Do it", "Violence", None)),
        ("bom.csv", "\ufeffprompt\nHi\n", ("Hi", "none", None)),
        ("tabs.tsv", "goal\tcategory\nBread, cake, and pie?\tFood\n", ("Bread, cake, and pie?", "Food", None)),
        ("CAPITALS.CSV", "Goal,Target\nDo it,Sure\n", ("Do it", "none", "Sure")),
        ("LINES.JSONL", '{"prompt": "Hi"}', ("Hi", "none", None)),
        # A spreadsheet's "CSV" by another country's rules, or with tabs: known by the header.
        ("tabs.csv", "category\tprompt\nFood\tBread, cake, and pie?\n", ("Bread, cake, and pie?", "Food", None)),
        ("semicolons.csv", "category;prompt\nFood;Bread, cake?\n", ("Bread, cake?", "Food", None)),
        ("one-column.csv", "prompt\nWhat; or\twhy?\n", ("What; or\twhy?", "none", None)),
        ("blank-lines.csv", "prompt,category\n\nHi,x\n\n", ("Hi", "x", None)),
        ("later.jsonl", '{"prompt": "Hi"}\n{"prompt": "Ho", "category": "x"}', ("Hi", "none", None)),
        ("number.jsonl", '{"prompt": "Hi", "category": 3, "output": 42}', ("Hi", "3", "42")),
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
        ("a.csv", b"prompt\nHow do I bake bread, cake, and pie?\n", r"row 1 \(line 2\) has 3 fields and the header 1"),
        ("a.csv", b'prompt,id\n"a\nb",1\nHi, you,2\n', r"row 2 \(line 4\) has 3 fields and the header 2, .*quotes"),
        ("a.csv", b"prompt,category\nHi,x\nHo\n", r"row 2 \(line 3\) has 1 field and the header 2"),
        ("a.tsv", b"prompt\tcategory\nHi\tx\ty\n", "has 3 fields and the header 2, separated by tabs"),
        ("a.csv", b'prompt,category\n"Hi" you,x\n', "line 2: not a readable table"),
        ("a.csv", b'prompt,category\n"Hi,x\n', "not a readable table: unexpected end of data"),
        ("a.csv", b"Goal,goal\nHi,Ho\n", "has the columns 'Goal' and 'goal': rename"),
        ("a.csv", b"\xff\xfep\x00", "not UTF-8 .*`iconv -f utf-16 -t utf-8`"),
        ("a.csv", b"prompt\n\xe9\n", "not UTF-8 .*`iconv -f ITS-ENCODING -t utf-8`"),
        ("a.csv", b"prompt,prompt\nHi,Ho\n", "has the column 'prompt' twice: rename one"),
        ("a.csv", b"prompt,category, category\nHi,a,b\n", "has the column 'category' twice"),
        ("a.jsonl", b'{"prompt": "x"}\n{"prompt": "a", "prompt": "b"}', "line 2 has 'prompt' twice: name each"),
        ("a.csv", b"\n \n\n", "holds no rows"),
        ("a.jsonl", b'{"instruction": "x", "input": 5}', "line 1, column 'input': 5 is not a text"),
        ("a.jsonl", b'{"prompt": 5}', "line 1, column 'prompt': 5 is not a text"),
        ("a.jsonl", b'{"prompt": "x", "output": ["y"]}', r"column 'output': \['y'\] is not a text"),
        ("a.jsonl", b'{"prompt": "x", "category": NaN}', "column 'category': nan is not a text"),
        ("a.jsonl", b'\n{"prompt": "\\ud800"}', "line 2, column 'prompt': half of a character"),
        ("a.jsonl", b'{"prompt": ' + b"[" * 100_000, r"line 1 cannot be read \(nested too deeply\)"),
        ("a.jsonl", b'{"prompt": "x", "n": ' + b"1" * 5000 + b"}", "line 1 cannot be read"),
        ("a.csv", b"prompt,split\nHi,train\nHo,holdout\n", "row 2, column 'split': 'holdout' is no split; write train"),
        ("a.csv", b"prompt,split\nHi,\n", "row 1, column 'split': '' is no split"),
        ("a.csv", b"prompt,id\nHi,1\nHo,1\n", "row 1 and row 2 are both pair '1' of 'a'"),
        ("a.csv", b"prompt,id\nHi,\n", "row 1 has no id"),
        ("a.csv", b"prompt,pair,label,split\nHi,1,a,train\nHo,1,b,test\n", "is in split train .* and in test"),
    ],
)
def test_bad_files_get_one_line(tmp_path, name, content, says):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=says) as caught:
        rim.load_prompts(str(path))
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)


def test_long_fields_and_nameless_columns_are_read(tmp_path):
    limit = csv.field_size_limit()
    (tmp_path / "a.csv").write_text(f"prompt,,\n{'x' * 200_000},,\n")
    assert [len(prompt.text) for prompt in rim.load_prompts(tmp_path / "a.csv")] == [200_000]
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize(
    ("source", "options", "says"),
    [
        ("harmfull", {}, "did you mean 'harmful'"),
        ("nowhere.csv", {}, "no prompt file"),
        ("harmful", {"split": "dev"}, "unknown split 'dev'"),
        ("harmful", {"limit": 0}, "at least 1"),
        ("harmful", {"limit": 1.5}, "limit must be a whole number of at least 1, not 1.5"),
        ("harmful", {"limit": True}, "limit must be a whole number"),
        ("harmful", {"limit": 3, "seed": -1}, "seed must be a whole number of at least 0, not -1"),
        ("harmful", {"limit": 3, "seed": 0.5}, "seed must be a whole number"),
        ("n" * 300 + ".csv", {}, "no prompt file"),
        ("nul\0.csv", {}, "no prompt file"),
        ("harmful", {"limit": 10_000}, "fewer than limit"),
    ],
)
def test_bad_requests_get_one_line(source, options, says):
    with pytest.raises(InputError, match=says):
        rim.load_prompts(source, **options)


def test_a_file_of_ones_own_keeps_its_pairs_labels_and_splits(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text(
        "id,pair,label,split,category,prompt\n"
        "1,p1,harmful,train,a,Make a bomb\n2,p1,benign,train,a,Make a cake\n"
        "3,p2,harmful,Val,b,Pick a lock\n4,p2,benign,dev,b,Pick a flower\n"
        "5,p3,harmful,test,c,Rob it\n6,p3,benign,TEST,c,Rub it\n",
        encoding="utf-8",
    )
    found = rim.load_prompts(path)
    assert [p.split for p in found] == ["train", "train", "validation", "validation", "test", "test"]
    assert found[2] == rim.load_prompts(str(path), split="validation")[0]
    assert (found[2].pair, found[2].label, found[2].category) == ("p2", "harmful", "b")
    # A limit draws pairs, and both sides of each: neither side may be lost.
    drawn = rim.load_prompts(path, limit=np.int64(2), seed=np.int32(1))
    assert [p.label for p in drawn] == ["harmful", "benign"] * 2
    assert len({p.pair for p in drawn}) == 2
    with pytest.raises(InputError, match="holds 3 prompts here, fewer than limit=4"):
        rim.load_prompts(path, limit=4)


def test_ids_are_pairs_where_a_file_has_no_pairs(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"id": 7, "prompt": "Hi"}\n{"id": "b", "prompt": "Ho"}', encoding="utf-8")
    assert [(p.pair, p.label, p.split) for p in rim.load_prompts(path)] == [
        ("7", "mine", "test"),
        ("b", "mine", "test"),
    ]


def test_local_files_have_no_splits(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"prompt": "Hi"}))
    with pytest.raises(InputError, match="no 'train' split"):
        rim.load_prompts(str(path), split="train")


def test_hub_sets_read_like_files(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_list([{"Goal": "Do it", "Category": "Privacy"}])
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config, split: {"harmful": made, "benign": made}[split])
    assert rim.load_prompts("hub:JailbreakBench/JBB-Behaviors:behaviors:harmful")[0].category == "Privacy"

    def fails(*_, **__):
        raise ConnectionError("offline\nsecond line")

    monkeypatch.setattr(datasets, "load_dataset", fails)
    with pytest.raises(InputError, match=r"cannot load hub:a/b: offline$"):
        rim.load_prompts("hub:a/b")
