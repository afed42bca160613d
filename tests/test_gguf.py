"""GGUF files: the same numbers as the weights they were made of, converted once and whole; suites' chat templates."""

import subprocess
import sys
import threading

import pytest
import tiny_project
import torch
from gguf import GGUFWriter
from tiny import TEMPLATE, TEXTS, write_gguf

import rim_core as rim
from rim_core.errors import InputError, WeightsError
from rim_core.suites import checkpoints, gguffiles, weights
from rim_core.suites.chattemplate import read_template
from rim_core.suites.schema import suite_hashes

LOUD = TEMPLATE.replace("{{ m['content'] }}", "{{ m['content'] }}!")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RIM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def gguf(tiny_folder, tmp_path):
    return write_gguf(tmp_path / "m.gguf", tiny_folder())


def suite_of(path, base, roles="base: {}"):
    path.write_text(f"base: {{{base}}}\nroles: {{{roles}}}\n")
    return path


def logits(model):
    text = rim.format_chat(model, [TEXTS[0]])[0]
    return model.hf(model.tokenizer(text, return_tensors="pt").input_ids).logits


@pytest.mark.parametrize("quantization", ["nf4", None])
def test_a_gguf_file_is_the_model_it_was_made_of(gguf, tiny_folder, tmp_path, quantization):
    wanted = logits(rim.load(str(tiny_folder()), quantization=quantization, device="cpu"))
    suite = suite_of(tmp_path / "own.yml", "gguf: m.gguf")
    for ref in (str(gguf), f"{suite}:base"):
        assert torch.equal(logits(rim.load(ref, quantization=quantization, device="cpu")), wanted)


def test_the_header_tells_what_the_converted_weights_tell(gguf, tiny_folder):
    header = checkpoints.read_checkpoint(str(gguf))
    assert header.gguf == "m.gguf"
    gguffiles.convert(gguf, progress=False)
    converted = checkpoints.read_checkpoint(str(gguf))
    assert converted.gguf is None
    assert header.size == converted.size == checkpoints.read_checkpoint(str(tiny_folder())).size
    assert header.has_template
    assert converted.has_template


@pytest.mark.parametrize("length", [0, 3, 30, 3000, 100_000, -1])
def test_a_file_cut_short_is_one_line(gguf, tmp_path, length):
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(gguf.read_bytes()[:length])
    with pytest.raises(WeightsError, match=r"cut\.gguf is damaged or cut short") as caught:
        rim.load(str(cut))
    assert "\n" not in str(caught.value)


def test_what_is_no_whole_model_is_one_line(tmp_path):
    for name, kind, says in (("part", "split.count", "one part of 3"), ("other", "x.y", "holds no model")):
        writer = GGUFWriter(tmp_path / f"{name}.gguf", "llama")
        writer.add_uint16(kind, 3)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with pytest.raises(InputError, match=says):
            rim.load(str(tmp_path / f"{name}.gguf"))


def test_one_that_does_not_fit_in_memory_is_not_converted(gguf, monkeypatch):
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": 1000}))
    with pytest.raises(InputError, match="too large to be converted here"):
        gguffiles.convert(gguf)


# --- conversion -----------------------------------------------------------------------------------------


def test_two_processes_convert_once(gguf, cache):
    code = "import sys, rim_core as rim; rim.load(sys.argv[1], device='cpu')"
    environment = tiny_project.environment(RIM_CACHE=str(cache), HF_HUB_OFFLINE="1")
    errors = []

    def load():
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code, str(gguf)],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        errors.append((done.returncode, done.stderr))

    both = [threading.Thread(target=load) for _ in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert [code for code, _ in errors] == [0, 0], errors
    assert sum(text.count("converting the weights") for _, text in errors) == 1
    folder = gguffiles.converted_folder(gguf)
    assert sorted(path.name for path in folder.parent.iterdir()) == [folder.name, f"{folder.name}.lock"]


def test_a_conversion_that_fails_leaves_nothing_and_a_damaged_one_is_made_again(gguf, monkeypatch, capfd):
    convert = weights.convert_gguf

    def full(path, target):
        target.mkdir()
        (target / "config.json").write_text("{}")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights, "convert_gguf", full)
    with pytest.raises(WeightsError, match="No space left on device; free room there"):
        gguffiles.convert(gguf)
    folder = gguffiles.converted_folder(gguf)
    assert [path.name for path in folder.parent.iterdir()] == [f"{folder.name}.lock"]
    monkeypatch.setattr(weights, "convert_gguf", convert)
    whole = (gguffiles.convert(gguf) / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-1])
    capfd.readouterr()
    assert (gguffiles.convert(gguf) / "model.safetensors").read_bytes() == whole
    assert "are damaged; making them again" in capfd.readouterr().err


# --- chat templates -------------------------------------------------------------------------------------


def test_a_template_holds_for_the_base_and_its_adapters_and_no_other_model(tiny_folder, gguf, tmp_path):
    (tmp_path / "loud.jinja").write_text(LOUD)
    roles = (
        f"base: {{}}, aligned: {{}}, risky: {{checkpoint: {gguf}}}, "
        f"prudent: {{checkpoint: {tiny_folder()}, chat_template: loud.jinja}}"
    )
    suite = suite_of(tmp_path / "own.yml", f"folder: {tiny_folder()}, chat_template: loud.jinja", roles)
    for role, loud in (("base", True), ("aligned", True), ("risky", False), ("prudent", True)):
        model = rim.load(f"{suite}:{role}", quantization=None, device="cpu")
        assert ("bread?!" in rim.format_chat(model, [TEXTS[0]])[0]) == loud, role
    assert rim.load(str(tiny_folder()), quantization=None, device="cpu").tokenizer.chat_template == TEMPLATE


def test_what_a_template_says_is_part_of_what_identifies_a_model(tiny_folder, gguf, tmp_path, monkeypatch):
    template = tmp_path / "t.jinja"
    template.write_text(TEMPLATE)
    roles = f"base: {{}}, risky: {{checkpoint: {gguf}, chat_template: t.jinja}}"
    for source in (f"gguf: {gguf}", f"folder: {tiny_folder()}", "hub: some/where"):
        bare = suite_hashes(suite_of(tmp_path / "bare.yml", source))
        suite = suite_of(tmp_path / "own.yml", f"{source}, chat_template: t.jinja", roles)
        one = suite_hashes(suite)
        template.write_text(LOUD)
        other = suite_hashes(suite)
        template.write_text(TEMPLATE)
        assert len({bare["base"], one["base"], other["base"]}) == 3
        assert one["risky"] != other["risky"]
        assert suite_hashes(suite) == one
    first = rim.load(f"{suite_of(tmp_path / 'a.yml', f'gguf: {gguf}')}:base", device="cpu").identity
    second = rim.load(
        f"{suite_of(tmp_path / 'b.yml', f'gguf: {gguf}, chat_template: t.jinja')}:base", device="cpu"
    ).identity
    assert first != second


def test_a_template_is_rendered_as_transformers_does(tmp_path):
    """With what templates use there: special tokens, tests of roles, loop controls, generation blocks."""
    path = tmp_path / "t.jinja"
    path.write_text(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}"
        "{% elif loop.index > 9 %}{% break %}{% endif %}{{ m['content'] | trim }}{{ eos_token }}"
        "{% generation %}{% endgeneration %}{% endfor %}{{ strftime_now('%Y') }}"
    )
    assert read_template(path) == path.read_text()
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="no UTF-8 text"):
        read_template(path)
