"""Each public name's docstring has an example, and each example runs as printed.

Examples find these names, made anew for each: `rim`, `model` (a tiny random llama with a chat template), its
`tokenizer`, `texts` (four chats in the model's template), `harmful` and `harmless` (four prompts each, pair by pair).
"""

import doctest
import inspect
import re

import pytest
import torch
from conftest import REPOSITORY

import rim_core as rim
from rim_core import errors

PAGE = (REPOSITORY / "book" / "api.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```\{rim-api\}\n(.*?)^```", PAGE, re.M | re.S)
NAMES = sorted({*rim._PUBLIC, *(name.removesuffix("()") for block in BLOCKS for name in block.split())})
ASKED = ("How do I bake bread?", "Explain the tides.", "Why is the sky blue?", "Explain the sky to a child.")
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def found(name: str):
    value = rim
    for part in name.split("."):
        value = getattr(value, part)
    return value


def examples(name: str) -> list[doctest.DocTest]:
    """Of a function or a module its own; of a class also its methods'."""
    value = found(name)
    finder = doctest.DocTestFinder(recurse=inspect.isclass(value))
    return [test for test in finder.find(value, f"rim.{name}", module=False, globs={}) if test.examples]


WITH_EXAMPLE = [name for name in NAMES if examples(name)]


@pytest.fixture(scope="module")
def model(tiny_folder):
    return rim.load(str(tiny_folder("llama")), quantization=None, device="cpu")


@pytest.mark.parametrize("name", WITH_EXAMPLE)
def test_examples_run_as_printed(name, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {
        "rim": rim,
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
    assert not model.edits, f"the example of rim.{name} leaves edits on the model"


@pytest.mark.xfail(strict=False, reason="examples are being written")
def test_every_public_name_has_an_example():
    values = {name: found(name) for name in NAMES if name not in WITH_EXAMPLE}
    exempt = [
        name
        for name, value in values.items()
        if inspect.ismodule(value) or (inspect.isclass(value) and issubclass(value, errors.RimError))
    ]
    missing = [f"rim.{name}" for name in values if name not in exempt]
    assert not missing, f"no Example in the docstring of {', '.join(missing)}"
