"""The benchmarks' own arithmetic, and that each runs and agrees with loops by hand, at tiny size."""

import json
import math
import time

import pytest
import torch

import rim_core as rim
from benchmarks import __main__ as command
from benchmarks import decoding, generation, harness, memory, paper_scale, patching, peers


@pytest.fixture(scope="module")
def tiny(tiny_folder):
    return rim.load(str(tiny_folder("llama")), quantization=None, device="cpu")


def test_a_row_is_of_medians_and_its_range_of_single_repeats():
    row = harness.compare("b", "case", "peer", [1.0, 2.0, 4.0], [10.0, 30.0, 20.0], target=10.5)
    assert (row.ratio, row.low, row.high, row.met) == (10.0, 5.0, 15.0, False)
    slower = harness.compare("b", "c", "p", [2.1], [2.0], speed_up=False, target=1.05, at_least=False)
    assert slower.ratio == pytest.approx(1.05)
    assert harness.compare("b", "c", "p", [2.2], [2.0], speed_up=False, target=1.05, at_least=False).met is False
    assert harness.compare("b", "c", "p", [1.0], [1.0]).met is None


def test_works_take_turns_and_the_first_round_is_not_counted():
    done = []
    times = harness.in_turns({"a": lambda: done.append("a"), "b": lambda: done.append("b")}, repeats=2)
    assert done == ["a", "b"] * 3
    assert [len(seconds) for seconds in times.values()] == [2, 2]


@pytest.mark.parametrize("n_tokens", [7, 40])
def test_texts_have_the_length_asked_for(tiny, n_tokens):
    texts = harness.texts_of_length(tiny.tokenizer, n_tokens, 3)
    assert len(set(texts)) == 3
    assert {len(tiny.tokenizer(text).input_ids) for text in texts} == {n_tokens}


def test_the_machine_is_described_without_its_name():
    text = json.dumps([harness.machine(), harness.versions()])
    assert not {"hostname", "node", "user"} & set(harness.machine())
    assert "/" not in text.replace("\\/", "")


def test_patching_agrees_with_the_peers_loops(tiny):
    some = [peers.HuggingFace(tiny), peers.Nnsight(tiny)]
    rows = patching.every_head(tiny, some, 1, {9: 12})
    assert [row.peer for row in rows] == [some[0].name, some[0].name, some[1].name]
    rows += patching.every_component(tiny, some, 1, n_pairs=3)
    assert all(row.difference < 1e-4 for row in rows)
    assert all(math.isfinite(row.ratio) and row.ratio > 0 for row in rows)


def test_generation_and_capture_agree_with_hooks_by_hand(tiny):
    rows = generation.ablated(tiny, 1, batch=3, new_tokens=2) + generation.capturing(tiny, 1, 5)
    assert all(row.difference < 1e-4 for row in rows)


def test_answers_beside_hugging_face_and_arms_beside_a_loop_are_the_same(tiny):
    rows = decoding.headline(tiny, 1, 5, 2, 4) + decoding.arms(tiny, 1, 3, 2, 3)
    assert [row.peer for row in rows] == [decoding.PEER, "arithmetic limit"] * 2 + [decoding.PEER, "a loop of calls"]
    assert [row.note for row in rows if row.note] == ["5 of 5 answers are the same"] * 2 + [
        "6 of 6 answers are the same"
    ]
    cells = decoding.table(tiny, (1, 2), (40,), (2,))
    assert len(cells) == 4
    assert all(math.isfinite(row.ratio) and row.ratio > 0 for row in rows + cells)
    # Joined to the template, a text's first or last word may be read as one token more or less.
    assert all(abs(len(row) - 40) <= 1 for row in tiny.tokenizer(decoding.of_length(tiny, 40, 3)).input_ids)


def test_the_arithmetic_limit_counts_tokens_above_the_patch(tiny):
    # Three layers of four heads: five tokens everywhere, and layer 1's heads through layers 1 and 2.
    assert patching.layer_tokens(tiny, 5, [1]) == 5 * 3 + 4 * 2
    rows = patching.growth(tiny, 1, tokens=(8,), pairs=(1, 2), layers=(1, 3))
    assert [row.case for row in rows] == ["tokens: 8", "pairs: 1", "pairs: 2", "heads: 4", "heads: 12"]


def test_peak_memory_sees_what_is_allocated_and_freed(tiny):
    def work():
        held = torch.ones(50_000_000)  # 200 MB, gone when it returns
        time.sleep(0.25)  # memory is read every few milliseconds, and a busy machine may miss some of these
        assert held[-1] == 1

    assert 0.15 < memory.peak_above_model(tiny, work) < 0.4


def test_results_of_one_benchmark_replace_its_earlier_ones(tmp_path):
    out = tmp_path / "performance.json"

    def rows(benchmark, seconds):
        return [harness.compare(benchmark, "case", "peer", [seconds], [1.0])]

    command.write(out, rows("heads", 1.0) + rows("capture", 1.0), None)
    command.write(out, rows("heads", 2.0), "heads")
    found = {row["benchmark"]: row["ours"] for row in json.loads(out.read_text())["rows"]}
    assert found == {"heads": 2.0, "capture": 1.0}


def test_the_estimate_is_the_shapes_arithmetic():
    memory_used, four, three = paper_scale.estimate("qwen2.5-32b", teraflops=40, tokens=100)
    # 64 layers of 488 million linear weights, two tables of 152064 x 5120 in bf16, the adapter in fp32.
    assert memory_used["value"] == pytest.approx(17.55 + 3.11 + 1.07, rel=0.01)
    assert three["value"] > four["value"] > 0
    doubled = paper_scale.estimate("qwen2.5-32b", teraflops=80, tokens=100)[1]
    assert doubled["value"] == pytest.approx(four["value"] / 2)


def test_paper_scale_runs_on_the_cpu_at_tiny_size():
    found = paper_scale.measure("tiny", "tiny", torch.device("cpu"), pairs=(2, 1), tokens=12)
    exact = {q["quantity"]: q["value"] for q in found if q["quantity"].startswith("patching")}
    assert len(exact) == 6
    assert all(error < (1e-4 if "float32" in name else 0.1) for name, error in exact.items())
    assert {"memory after loading", "Experiment 4", "Experiment 3"} <= {q["quantity"] for q in found}
