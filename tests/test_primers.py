"""The primers' code runs as printed, and each primer has its picture."""

import re

import pytest
from conftest import REPOSITORY

import rim_core as rim

PRIMERS = sorted((REPOSITORY / "book" / "primers").glob("*.md"))
BLOCKS = [
    pytest.param(block, id=f"{path.stem}-{number}")
    for path in PRIMERS
    for number, block in enumerate(re.findall(r"^```python\n(.*?)^```", path.read_text(encoding="utf-8"), re.M | re.S))
]


@pytest.mark.parametrize("block", BLOCKS)
def test_code_runs_as_printed(block, default_model, monkeypatch, tmp_path):
    def load(ref, **options):
        assert (ref, options) == ("smollm2:aligned", {}), "primers share one model, so that the tests load it once"
        return default_model

    monkeypatch.setattr(rim, "load", load)
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "<primer>", "exec"), {})
    assert not default_model.edits
    assert default_model.role == "aligned"


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
