"""Each public name's docstring has an example, and each example runs as printed.

Examples find `rim`, `np`, `pd` and `torch` as usually imported, and `model` (a tiny random llama with a chat template),
its `tokenizer`, `texts` (four chats in its template), `harmful` and `harmless` (four prompts each, pair by pair).
"""

import doctest
import inspect

import numpy as np
import pandas as pd
import pytest
import torch
from test_api import FUNCTIONS, VALUES

import rim_core as rim

ASKED = ("How do I bake bread?", "Explain the tides.", "Why is the sky blue?", "Explain the sky to a child.")
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
# Of classes that functions give, and of modules and errors, it is enough that their makers show them.
NAMES = [name for name in VALUES if name in FUNCTIONS or name.removeprefix("rim.") in rim._PUBLIC]


def examples(name: str) -> list[doctest.DocTest]:
    """Of a function or a module its own; of a class also its methods'."""
    finder = doctest.DocTestFinder(recurse=inspect.isclass(VALUES[name]))
    return [test for test in finder.find(VALUES[name], name, module=False, globs={}) if test.examples]


WITH_EXAMPLE = [name for name in VALUES if examples(name)]


@pytest.fixture(scope="module")
def model(tiny_folder):
    return rim.load(str(tiny_folder("llama")), quantization=None, device="cpu")


@pytest.mark.parametrize("name", WITH_EXAMPLE)
def test_examples_run_as_printed(name, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {
        **{"rim": rim, "np": np, "pd": pd, "torch": torch},
        "model": model,
        "tokenizer": model.tokenizer,
        "texts": rim.format_chat(model, ASKED),
        "harmful": rim.load_prompts("harmful", split="train", limit=4),
        "harmless": rim.load_prompts("benign", split="train", limit=4),
    }
    for test in examples(name):
        told: list[str] = []
        torch.manual_seed(0)
        test.globs = dict(names)
        doctest.DocTestRunner(optionflags=OPTIONS).run(test, out=told.append)
        assert not told, "".join(told)
    assert not model.edits, f"the example of {name} leaves edits on the model"


def test_every_public_name_has_an_example():
    missing = [name for name in NAMES if name not in WITH_EXAMPLE]
    assert not missing, f"no Example in the docstring of {', '.join(missing)}"
