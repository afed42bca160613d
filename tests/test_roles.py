"""Roles: each is its own weights, one set in memory at a time, and no path measures one under another's name."""

import gc
import shutil
import weakref

import pytest
import torch
from peft import LoraConfig
from plain import plain_model
from test_adapters import write_adapter
from tiny import TEXTS, write_model

import rim_core as rim
from rim_core.errors import InputError

TEXT = [TEXTS[0]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Three checkpoints, and an adapter on the first."""
    place = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("base", "aligned", "risky")):
        write_model(place / name, seed=seed)
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    write_adapter(plain_model(place / "base"), config, place / "tuned")
    return place


@pytest.fixture
def suite(folders):
    path = folders / "whole.yml"
    path.write_text(
        "base: {folder: ./base}\n"
        "roles: {base: {}, aligned: {checkpoint: ./aligned}, risky: {checkpoint: ./risky}, tuned: {adapter: ./tuned}}\n"
    )
    return str(path)


def logits_of(folders, role):
    from peft import PeftModel

    hf = plain_model(folders / ("base" if role == "tuned" else role))
    if role == "tuned":
        hf = PeftModel.from_pretrained(hf, str(folders / "tuned")).eval()
    ids = (
        rim.load(str(folders / "base"), quantization=None, device="cpu").tokenizer(TEXT, return_tensors="pt").input_ids
    )
    with torch.no_grad():
        return ids, hf(input_ids=ids).logits


@pytest.mark.parametrize("order", [("base", "aligned", "risky", "tuned"), ("tuned", "risky", "base", "tuned", "base")])
def test_each_role_is_its_own_weights(suite, folders, order):
    seen, identities = [], {}
    for model in rim.roles(suite, *order, quantization=None, device="cpu"):
        ids, wanted = logits_of(folders, model.role)
        with torch.no_grad():
            assert torch.equal(model.hf(input_ids=ids).logits, wanted)
        assert model.name == f"whole:{model.role}"
        assert identities.setdefault(model.role, model.identity) == model.identity
        seen.append(model.role)
    assert tuple(seen) == order
    assert len(set(identities.values())) == len(identities)
    with torch.no_grad():  # the last one stays
        assert torch.equal(model.hf(input_ids=ids).logits, wanted)


def test_without_names_it_is_every_role(suite):
    assert [m.role for m in rim.roles(suite, quantization=None, device="cpu")] == ["base", "aligned", "risky", "tuned"]


def test_one_set_of_weights_is_in_memory(suite):
    held, alive = [], []
    for model in rim.roles(suite, "base", "risky", "aligned", quantization=None, device="cpu"):
        held.append(model)  # even where somebody holds on to what was let go
        alive.append(weakref.ref(model.hf))
        gc.collect()
        assert [ref() is not None for ref in alive] == [False] * (len(alive) - 1) + [True]
    with pytest.raises(InputError, match="let go"):
        rim.capture(held[0], TEXT, "resid_post")


def test_a_model_goes_on_from_its_own_weights(suite):
    first = rim.load(f"{suite}:base", quantization=None, device="cpu")
    hf = first.hf
    models = list(rim.roles(first, "tuned", "base"))
    assert models[-1].hf is hf
    for old in (first, models[0]):
        with pytest.raises(InputError, match="let go"):
            rim.generate(old, TEXT)
    with pytest.raises(InputError, match=r"inside an intervention"), rim.ablate(models[-1], [(0, 0)], mode="zero"):
        next(rim.roles(models[-1], "tuned"))


def test_using_refuses_what_would_leave_other_weights(suite):
    risky = rim.load(f"{suite}:risky", quantization=None, device="cpu")
    before = risky.identity
    for other in ("aligned", "base", "tuned", None):
        with pytest.raises(InputError, match=r"has other weights.*rim\.roles"), risky.using(other):
            pass
        assert (risky.role, risky.identity) == ("risky", before)
    with risky.using("risky"):
        assert risky.identity == before
    base = rim.load(f"{suite}:base", quantization=None, device="cpu")
    with pytest.raises(InputError, match=r"'risky'? has other weights|risky has other weights"), base.using("risky"):
        pass
    with base.using("tuned"):
        assert base.role == "tuned"


def test_a_cache_never_mixes_roles(suite, folders, tmp_path, monkeypatch):
    monkeypatch.setenv("RIM_CACHE", str(tmp_path))
    for model in rim.roles(suite, "risky", "base", "tuned", "aligned", quantization=None, device="cpu"):
        cached = rim.capture(model, TEXT, "resid_post", cache=True)["resid_post"]
        assert torch.equal(cached, rim.capture(model, TEXT, "resid_post")["resid_post"])


def test_unknown_roles_are_refused_before_anything_is_loaded(suite, monkeypatch):
    monkeypatch.setattr("rim_core.models.loading.load", lambda *a, **k: pytest.fail("loaded"))
    with pytest.raises(InputError, match=r"no role 'riskyy'.*risky"):
        rim.roles(suite, "base", "riskyy")


def test_a_model_from_no_suite_has_no_roles(folders):
    model = rim.load(str(folders / "base"), quantization=None, device="cpu")
    with pytest.raises(InputError, match="from no suite"):
        rim.roles(model, "base")


def test_identity_is_by_content(folders, tmp_path):
    copy = tmp_path / "elsewhere"
    shutil.copytree(folders / "base", copy)
    (copy / "README.md").write_text("a model card")
    one, other = (rim.load(str(folder), quantization=None, device="cpu") for folder in (folders / "base", copy))
    assert one.identity == other.identity
    assert rim.load(str(folders / "risky"), quantization=None, device="cpu").identity != one.identity


def test_a_model_that_was_let_go_touches_nothing(folders):
    path = folders / "shared.yml"
    path.write_text("base: {folder: ./base}\nroles: {base: {}, tuned: {adapter: ./tuned}, same: {}}\n")
    old, tuned, last = rim.roles(str(path), "base", "tuned", "same", quantization=None, device="cpu")
    ids, wanted = logits_of(folders, "base")
    for gone in (old, tuned):
        for switch in (lambda gone=gone: gone.using("tuned"), gone.bare):
            with pytest.raises(InputError, match="let go"), switch():
                pass
    with torch.no_grad():
        assert torch.equal(last.hf(input_ids=ids).logits, wanted)


def test_roles_do_not_go_on_inside_using(folders):
    path = folders / "shared.yml"
    path.write_text("base: {folder: ./base}\nroles: {base: {}, tuned: {adapter: ./tuned}}\n")
    model = rim.load(f"{path}:base", quantization=None, device="cpu")
    ids, wanted = logits_of(folders, "base")
    with model.using("tuned"), pytest.raises(InputError, match="inside `using`"):
        next(rim.roles(model, "base", "tuned"))
    one, other = rim.roles(model, "tuned", "base"), rim.roles(model, "base")
    next(one)
    with pytest.raises(InputError, match="let go"):
        next(other)
    last = next(one)
    with torch.no_grad():
        assert torch.equal(last.hf(input_ids=ids).logits, wanted)
    with pytest.raises(InputError, match="an argument of its own"):
        rim.roles(str(path), ["base", "tuned"])
