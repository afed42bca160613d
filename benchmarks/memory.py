"""Peak memory above the loaded model, at default settings: each case in a process of its own.

`python -m benchmarks.memory CASE` runs one case and prints its numbers as JSON.
"""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import psutil

import rim_core as rim
from benchmarks.harness import Row, texts_of_length
from benchmarks.patching import AGAINST, TOWARD

TARGET_GB = 1.0
SAMPLE_SECONDS = 0.002


def _heads(model: rim.Model, n_tokens: int) -> Callable[[], object]:
    source, destination = texts_of_length(model.tokenizer, n_tokens, 2)
    metric = rim.LogitDifference(TOWARD, AGAINST)
    return lambda: rim.patch(model, [source], [destination], "heads", metric)


def _pairs(model: rim.Model, component: str, n_pairs: int) -> Callable[[], object]:
    source, destination = (
        rim.format_chat(model, rim.load_prompts(name, limit=n_pairs)) for name in ("harmful", "benign")
    )
    metric = rim.LogitDifference(TOWARD, AGAINST)
    return lambda: rim.patch(model, source, destination, component, metric)


def _attribution(model: rim.Model, n_pairs: int) -> Callable[[], object]:
    source, destination = (
        rim.format_chat(model, rim.load_prompts(name, limit=n_pairs)) for name in ("harmful", "benign")
    )
    metric = rim.LogitDifference(TOWARD, AGAINST)
    return lambda: rim.attribution_patch(model, source, destination, "heads", metric)


def _capture(model: rim.Model, n_texts: int) -> Callable[[], object]:
    texts = rim.format_chat(model, rim.load_prompts("harmful", limit=n_texts))
    return lambda: rim.capture(model, texts, "mlp_neurons")


def _generate(model: rim.Model, n_texts: int) -> Callable[[], object]:
    texts = rim.format_chat(model, rim.load_prompts("everyday", limit=n_texts))

    def run() -> None:
        with rim.ablate(model, heads=[(0, 0)], mode="mean", reference=texts):
            rim.generate(model, texts, max_new_tokens=16)

    return run


CASES: dict[str, Callable[[rim.Model], Callable[[], object]]] = {
    "patch every head, 1 pair, 40 tokens": lambda model: _heads(model, 40),
    "patch every head, 1 pair, 1024 tokens": lambda model: _heads(model, 1024),
    "patch every head, 100 pairs": lambda model: _pairs(model, "heads", 100),
    "patch every MLP, 100 pairs": lambda model: _pairs(model, "mlp", 100),
    "attribution of every head, 100 pairs": lambda model: _attribution(model, 100),
    "capture MLP neurons, 200 prompts": lambda model: _capture(model, 200),
    "generate under ablation, 64 prompts": lambda model: _generate(model, 64),
}
QUICK = ("patch every head, 1 pair, 40 tokens",)


def peak_above_model(model: rim.Model, work: Callable[[], object]) -> float:
    """GB by which this process's resident memory rose, at most, while `work` ran, results included."""
    process, peak, done = psutil.Process(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, process.memory_info().rss)
            time.sleep(SAMPLE_SECONDS)

    # One short pass first: libraries take their workspace at the first one, whatever the tool.
    rim.capture(model, ["A short text."], "resid_post")
    before = process.memory_info().rss
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        work()
    finally:
        done.set()
        watcher.join()
    return (max(peak, process.memory_info().rss) - before) / 1e9


def measure(case: str, reference: str) -> dict[str, Any]:
    model = rim.load(reference, device="cpu")
    footprint = model.hf.get_memory_footprint() / 1e9
    return {"above": peak_above_model(model, CASES[case](model)), "model": footprint}


def rows(reference: str, repeats: int, quick: bool) -> list[Row]:
    """Every case, `repeats` processes each; the median of their peaks."""
    found = []
    for case in QUICK if quick else CASES:
        results = [_in_a_process(case, reference) for _ in range(repeats)]
        peaks = sorted(result["above"] for result in results)
        peak = peaks[len(peaks) // 2]
        note = f"the model itself is {results[0]['model']:.2f} GB in 4 bits"
        found.append(
            Row("memory", case, "target", peak, TARGET_GB, "GB", peak / TARGET_GB, peaks[0] / TARGET_GB,
                peaks[-1] / TARGET_GB, target=1.0, at_least=False, note=note)
        )  # fmt: skip
    return found


def _in_a_process(case: str, reference: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.memory", case, reference]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"memory case {case!r} failed: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


if __name__ == "__main__":
    sys.stdout.write(json.dumps(measure(sys.argv[1], sys.argv[2])) + "\n")
