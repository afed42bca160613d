"""Adapters: inside `using` the logits are PEFT's own, outside the base is the base, whatever was asked in between."""

import contextlib
import copy
import json
import shutil

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from peft import (
    AdaLoraConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    TrainableTokensConfig,
    VeraConfig,
    get_peft_model,
)
from plain import assert_close, plain_model
from safetensors.torch import load_file, save_file
from tiny import TEXTS, write_model

import rim_core as rim
from rim_core.errors import InputError, RimWarning, WeightsError
from rim_core.identity import ADAPTER_FILE

QUANTIZATIONS = ["nf4", None]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A tiny Llama in a folder, tied or not, and what plain transformers makes of it."""
    made = {}

    def base(quantization=None, tied=False):
        if (quantization, tied) not in made:
            folder = tmp_path_factory.mktemp("base")
            write_model(folder, tie_word_embeddings=tied)
            model = rim.load(str(folder), quantization=quantization, device="cpu")
            made[quantization, tied] = folder, model, plain_model(folder, quantization)
        return made[quantization, tied]

    return base


def write_adapter(reference, config, folder, seed=0):
    """An adapter of these settings with random tensors, saved by PEFT; the reference is left as it was."""
    torch.manual_seed(seed)
    hf = get_peft_model(copy.deepcopy(reference), config)
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            if parameter.requires_grad and parameter.is_floating_point():
                near = 1.0 if "magnitude" in name or "ia3" in name or "norm" in name else 0.0
                parameter.add_(torch.randn_like(parameter) * 0.2 + near * 0.1)
    hf.save_pretrained(folder)
    return folder


def logits(hf, ids):
    with torch.no_grad():
        return hf(input_ids=ids).logits


def peft_logits(reference, folder, ids):
    return logits(PeftModel.from_pretrained(copy.deepcopy(reference), str(folder)).eval(), ids)


def state(model):
    """Everything of the base that could be changed: its modules by identity, its tensors by bits."""
    tensors = {
        name: tensor.detach().clone() for name, tensor in model.hf.state_dict().items() if hasattr(tensor, "shape")
    }
    return {name: id(module) for name, module in model.hf.named_modules()}, tensors, set(vars(model.hf))


def assert_untouched(model, before):
    modules, tensors, attributes = state(model)
    assert modules == before[0]
    assert attributes == before[2]
    assert tensors.keys() == before[1].keys()
    assert all(torch.equal(tensors[name], before[1][name]) for name in tensors)
    assert not model.hf.training
    assert not any(parameter.requires_grad for parameter in model.hf.parameters())


def ids_of(model):
    # The same prompt in every row: dropout would make them differ.
    return model.tokenizer([TEXTS[1]] * 4, return_tensors="pt").input_ids


TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head", "embed_tokens"]
lora_settings = st.fixed_dictionaries(
    {
        "r": st.integers(1, 4),
        "lora_alpha": st.integers(1, 16),
        "target_modules": st.lists(st.sampled_from(TARGETS), min_size=1, max_size=4, unique=True),
    },
    optional={
        "lora_dropout": st.sampled_from([0.0, 0.5]),
        "use_rslora": st.booleans(),
        "use_dora": st.booleans(),
        "lora_bias": st.booleans(),
        "bias": st.sampled_from(["none", "none", "all", "lora_only"]),
        "modules_to_save": st.lists(st.sampled_from(["lm_head", "embed_tokens", "norm"]), max_size=2, unique=True),
        "init_lora_weights": st.sampled_from(
            [True, False, "gaussian", "orthogonal", "pissa", "olora", "pissa_niter_4"]
        ),
        "rank_pattern": st.sampled_from([{}, {"q_proj": 3}, {r".*\.1\..*": 2}]),
        "alpha_pattern": st.sampled_from([{}, {"down_proj": 5}]),
        "layers_to_transform": st.sampled_from([None, [0], [1, 2]]),
        "trainable_token_indices": st.sampled_from([None, [3, 7]]),
        "exclude_modules": st.sampled_from([None, ["k_proj"]]),
    },
)
# What PEFT would write into the base itself.
REFUSED = {"bias": {"all", "lora_only"}, "init_lora_weights": {"pissa", "olora", "pissa_niter_4"}}


@given(wanted=lora_settings, tied=st.booleans(), quantization=st.sampled_from(QUANTIZATIONS), seed=st.integers(0, 99))
@settings(
    max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), phases=[Phase.generate]
)
def test_any_lora_is_pefts_own_inside_and_nothing_outside(bases, tmp_path_factory, wanted, tied, quantization, seed):
    _, model, reference = bases(quantization, tied)
    ids, before = ids_of(model), state(model)
    bare = logits(model.hf, ids)
    folder = tmp_path_factory.mktemp("adapter")
    try:
        write_adapter(reference, LoraConfig(task_type="CAUSAL_LM", **wanted), folder, seed)
        right = peft_logits(reference, folder, ids)
    except (ValueError, TypeError, RuntimeError, KeyError, NotImplementedError, AttributeError):
        assume(False)  # PEFT itself cannot
    refusable = [name for name, values in REFUSED.items() if wanted.get(name) in values]
    if refusable:
        with pytest.raises(InputError, match="|".join(refusable)), model.using(folder):
            pass
    else:
        with model.using(folder):
            assert torch.equal(logits(model.hf, ids), right)
            with model.using(None):
                assert torch.equal(logits(model.hf, ids), bare)
            assert torch.equal(logits(model.hf, ids), right)
            acts = rim.capture(model, [TEXTS[0]], ["resid_post", "head_z"])
            assert torch.isfinite(acts["resid_post"]).all()
    assert torch.equal(logits(model.hf, ids), bare)
    assert_untouched(model, before)


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize(
    "config",
    [
        IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"),
        AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=["q_proj", "o_proj"], task_type="CAUSAL_LM"),
        LoHaConfig(r=2, target_modules=["q_proj", "down_proj"], module_dropout=0.5, task_type="CAUSAL_LM"),
        LoKrConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"),
        LNTuningConfig(target_modules=["input_layernorm", "norm"], task_type="CAUSAL_LM"),
        TrainableTokensConfig(token_indices=[5, 9], task_type="CAUSAL_LM"),
        LoraConfig(r=2, target_parameters=["mlp.down_proj.weight"], target_modules=[], task_type="CAUSAL_LM"),
    ],
    ids=lambda config: str(getattr(config.peft_type, "value", "")),
)
def test_other_kinds_are_pefts_own(bases, tmp_path, config, quantization):
    _, model, reference = bases(quantization)
    ids, before = ids_of(model), state(model)
    try:
        write_adapter(reference, config, tmp_path)
        right = peft_logits(reference, tmp_path, ids)
    except (ValueError, TypeError, RuntimeError, NotImplementedError) as error:
        pytest.skip(f"PEFT itself cannot: {error}")
    with model.using(tmp_path):
        assert torch.equal(logits(model.hf, ids), right)
    assert_untouched(model, before)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (LoraConfig(target_modules=["q_proj"], layer_replication=[[0, 3], [1, 3]]), "layer_replication"),
        (LoraConfig(target_modules=["q_proj"], alora_invocation_tokens=[3]), "alora_invocation_tokens"),
        (PrefixTuningConfig(num_virtual_tokens=2), "PREFIX_TUNING"),
        (VeraConfig(r=2, target_modules=["q_proj"]), "VERA"),
    ],
)
def test_what_acts_elsewhere_is_refused_by_name(bases, tmp_path, config, says):
    _, model, reference = bases()
    config.task_type = "CAUSAL_LM"
    before = state(model)
    try:
        write_adapter(reference, config, tmp_path)
    except ValueError:
        config.save_pretrained(tmp_path)
        save_file({"x": torch.zeros(1)}, tmp_path / ADAPTER_FILE)
    with pytest.raises(InputError, match=says), model.using(tmp_path):
        pass
    assert_untouched(model, before)


def spoil(folder, change):
    tensors = load_file(folder / ADAPTER_FILE)
    change(tensors)
    save_file(tensors, folder / ADAPTER_FILE)


def extra(tensors):
    tensors["base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"] = torch.ones(2, 32)


def missing(tensors):
    del tensors[sorted(tensors)[0]]


def misshapen(tensors):
    tensors[sorted(tensors)[0]] = torch.ones(7, 7)


def not_finite(tensors):
    tensors[sorted(tensors)[0]][0, 0] = float("nan")


@pytest.mark.parametrize("saved", [None, ["lm_head"]])
@pytest.mark.parametrize("change", [extra, missing, misshapen, not_finite])
def test_a_refused_adapter_leaves_no_trace(bases, tmp_path, monkeypatch, change, saved):
    monkeypatch.setenv("RIM_CACHE", str(tmp_path / "cache"))
    _, model, reference = bases()
    ids, before = ids_of(model), state(model)
    bare = logits(model.hf, ids)
    config = LoraConfig(r=2, target_modules=["q_proj", "o_proj"], modules_to_save=saved, task_type="CAUSAL_LM")
    good = write_adapter(reference, config, tmp_path / "good")
    bad = tmp_path / "bad"
    shutil.copytree(good, bad)
    spoil(bad, change)
    kind = WeightsError if change is not_finite else InputError
    with (
        pytest.raises(kind, match="not finite" if change is not_finite else "does not fit this base"),
        model.using(bad),
    ):
        pass
    assert torch.equal(logits(model.hf, ids), bare)
    assert_untouched(model, before)
    wanted = rim.capture(model, [TEXTS[0]], "resid_post")["resid_post"]
    assert torch.equal(rim.capture(model, [TEXTS[0]], "resid_post", cache=True)["resid_post"], wanted)
    with model.using(good):
        assert torch.equal(logits(model.hf, ids), peft_logits(reference, good, ids))


@pytest.fixture
def two(bases, tmp_path):
    """Two adapters, of which one replaces whole modules and the other does not."""
    _, model, reference = bases()
    whole = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head", "norm"], task_type="CAUSAL_LM")
    low = LoraConfig(r=3, target_modules=["o_proj", "q_proj"], lora_dropout=0.5, task_type="CAUSAL_LM")
    folders = [write_adapter(reference, c, tmp_path / str(i), i) for i, c in enumerate((whole, low))]
    return model, reference, folders


def test_order_and_nesting_do_not_matter(two):
    model, reference, (a, b) = two
    ids, before = ids_of(model), state(model)
    right = {None: logits(model.hf, ids), a: peft_logits(reference, a, ids), b: peft_logits(reference, b, ids)}
    assert not torch.equal(right[a], right[b])
    for first, second in [(a, b), (b, a), (b, None), (a, a), (None, b)]:
        with model.using(first):
            assert torch.equal(logits(model.hf, ids), right[first])
            with contextlib.suppress(KeyboardInterrupt), model.using(second):
                assert torch.equal(logits(model.hf, ids), right[second])
                raise KeyboardInterrupt
            assert torch.equal(logits(model.hf, ids), right[first])
        assert torch.equal(logits(model.hf, ids), right[None])
    assert_untouched(model, before)


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_a_scale_multiplies_what_a_lora_adds(bases, tmp_path, quantization):
    """Against PEFT's own on an adapter whose second matrix is multiplied; doses nest, and leave nothing behind."""
    _, model, reference = bases(quantization=quantization)
    config = LoraConfig(r=3, target_modules=["o_proj", "down_proj"], lora_alpha=7, task_type="CAUSAL_LM")
    folder = write_adapter(reference, config, tmp_path / "whole", 1)
    ids, before = ids_of(model), state(model)
    bare, whole = logits(model.hf, ids), peft_logits(reference, folder, ids)

    def dosed(scale):
        made = tmp_path / f"by-{scale}"
        if not made.exists():
            shutil.copytree(folder, made)
            tensors = load_file(made / "adapter_model.safetensors")
            save_file(
                {name: tensor * scale if "lora_B" in name else tensor for name, tensor in tensors.items()},
                made / "adapter_model.safetensors",
            )
        return peft_logits(reference, made, ids)

    identities = {model.identity}
    for scale in (0.5, 2.0, -1.0):
        with model.using(folder, scale=scale):
            assert_close(logits(model.hf, ids), dosed(scale), 1e-5)
            identities.add(model.identity)
            with model.using(folder):
                assert torch.equal(logits(model.hf, ids), whole)
                with model.using(folder, scale=0.25):
                    assert_close(logits(model.hf, ids), dosed(0.25), 1e-5)
            with model.using(None):
                assert torch.equal(logits(model.hf, ids), bare)
            assert_close(logits(model.hf, ids), dosed(scale), 1e-5)
    with model.using(folder, scale=0):
        assert_close(logits(model.hf, ids), bare, 1e-6)
    with model.using(folder):
        assert torch.equal(logits(model.hf, ids), whole)
        identities.add(model.identity)
    assert len(identities) == 5
    assert torch.equal(logits(model.hf, ids), bare)
    assert_untouched(model, before)


@pytest.mark.parametrize(
    ("config", "scale", "says"),
    [
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, 0.5, "cannot be scaled"),
        ({"target_modules": ["q_proj"], "use_dora": True}, 0.5, "cannot be scaled"),
        ({"target_modules": ["q_proj"]}, "half", "scale must be a finite number"),
        (None, 0.5, "the bare base has no adapter to be scaled"),
    ],
)
def test_what_cannot_be_scaled_is_refused_in_one_line(bases, tmp_path, config, scale, says):
    _, model, reference = bases()
    ids, before = ids_of(model), state(model)
    bare = logits(model.hf, ids)
    folder = config and write_adapter(reference, LoraConfig(r=2, task_type="CAUSAL_LM", **config), tmp_path / "a", 1)
    with pytest.raises(InputError, match=says) as caught, model.using(folder, scale=scale):
        pass
    assert "\n" not in str(caught.value)
    assert torch.equal(logits(model.hf, ids), bare)
    assert_untouched(model, before)


def test_interventions_hold_with_whatever_adapter(two):
    model, _, (a, b) = two
    texts = list(TEXTS)
    found = {}
    for adapter in (None, a, b):
        with model.using(adapter), rim.ablate(model, [(1, 2)], mode="zero"):
            found[adapter] = rim.capture(model, texts, "resid_post")["resid_post"]
    # Adapters are switched, and attached for the first time, inside: the edit is then on the modules that are there.
    fresh = rim.load(model.name, quantization=None, device="cpu")
    for loaded in (model, fresh):
        with rim.ablate(loaded, [(1, 2)], mode="zero"):
            for adapter in (a, None, b):
                with loaded.using(adapter):
                    assert torch.equal(rim.capture(loaded, texts, "resid_post")["resid_post"], found[adapter])
    with model.using(a):
        assert not torch.equal(rim.capture(model, texts, "resid_post")["resid_post"], found[a])


def test_a_folder_retrained_in_the_session_counts(two):
    model, reference, (a, b) = two
    ids = ids_of(model)
    with model.using(a):
        was = model.identity
    shutil.copyfile(b / ADAPTER_FILE, a / ADAPTER_FILE)
    shutil.copyfile(b / "adapter_config.json", a / "adapter_config.json")
    with model.using(a):
        assert torch.equal(logits(model.hf, ids), peft_logits(reference, b, ids))
        assert model.identity != was


def test_settings_are_part_of_the_identity_and_origin_is_not(two):
    model, _, (a, _) = two
    path = a / "adapter_config.json"
    config = json.loads(path.read_text())

    def identity(**changes):
        path.write_text(json.dumps({**config, **changes}))
        with model.using(a):
            return model.identity

    assert identity() == identity(base_model_name_or_path="another/place", peft_version="0.1")
    assert identity() != identity(lora_alpha=32)
    with model.using(a):
        before = rim.capture(model, [TEXTS[0]], "resid_post", cache=True)["resid_post"]
    path.write_text(json.dumps({**config, "lora_alpha": 64}))
    with model.using(a):
        after = rim.capture(model, [TEXTS[0]], "resid_post", cache=True)["resid_post"]
        assert torch.equal(after, rim.capture(model, [TEXTS[0]], "resid_post")["resid_post"])
    assert not torch.equal(before, after)


def test_the_view_for_traces_follows_the_adapter(two):
    from nnsight import save

    model, _, (a, _) = two
    assert model.nnsight is model.nnsight
    for adapter in (None, a, None):
        with model.using(adapter):
            wanted = rim.capture(model, [TEXTS[0]], "head_z")["head_z"][0, 1].flatten()
            with torch.no_grad(), model.nnsight.trace(TEXTS[0]):
                z = save(model.nnsight.model.layers[1].self_attn.o_proj.input)
            assert torch.allclose(wanted, z[0, -1], atol=1e-5)


def test_an_adapter_that_changes_nothing_is_told(bases, tmp_path):
    _, model, reference = bases()
    get_peft_model(
        copy.deepcopy(reference), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    ).save_pretrained(tmp_path)
    with pytest.warns(RimWarning, match="changes nothing"), model.using(tmp_path):
        pass


def test_a_base_weight_in_the_file_is_refused_unless_it_is_the_bases_own(bases, tmp_path):
    _, model, reference = bases()
    ids, before = ids_of(model), state(model)
    config = LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"], task_type="CAUSAL_LM")
    write_adapter(reference, config, tmp_path)
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    assert key in load_file(tmp_path / ADAPTER_FILE)  # PEFT saves it beside the adapter
    with model.using(tmp_path):
        assert torch.equal(logits(model.hf, ids), peft_logits(reference, tmp_path, ids))
    spoil(tmp_path, lambda tensors: tensors[key].add_(1))
    with pytest.raises(InputError, match=r"changes the base itself.*embed_tokens"), model.using(tmp_path):
        pass
    assert_untouched(model, before)


def test_a_tied_base_with_its_own_tokens_has_a_lens(bases, tmp_path):
    _, model, reference = bases(None, True)
    config = LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[3, 7], task_type="CAUSAL_LM")
    write_adapter(reference, config, tmp_path)
    with model.using(tmp_path):
        found = rim.logit_lens(model, [TEXTS[0]], tokens=[3, 7, 9]).logit[0, -1]
        ids = model.tokenizer([TEXTS[0]], return_tensors="pt").input_ids
        assert torch.allclose(found, logits(model.hf, ids)[0, -1, [3, 7, 9]], atol=1e-3)


@pytest.mark.parametrize("name", ["lm_head.base_layer.weight", "lm_head.weight", "model.embed_tokens.weight"])
def test_a_tied_head_is_never_written_over(bases, tmp_path, name):
    _, model, reference = bases(None, True)
    ids, before = ids_of(model), state(model)
    write_adapter(reference, LoraConfig(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM"), tmp_path)

    def another(tensors):
        tensors[f"base_model.model.{name}"] = reference.lm_head.weight.detach() + 0.5

    with model.using(tmp_path):
        assert torch.equal(logits(model.hf, ids), peft_logits(reference, tmp_path, ids))
    spoil(tmp_path, another)
    with pytest.raises(InputError, match=r"changes the base itself|does not fit this base"), model.using(tmp_path):
        pass
    assert_untouched(model, before)


def test_a_module_s_own_copy_of_the_base_is_never_written_over(bases, tmp_path):
    _, model, reference = bases()
    before = state(model)
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["norm"], task_type="CAUSAL_LM")
    write_adapter(reference, config, tmp_path)
    key = "base_model.model.model.norm.original_module.weight"
    spoil(tmp_path, lambda tensors: tensors.update({key: torch.full((32,), 7.0)}))
    with pytest.raises(InputError, match=r"changes the base itself.*norm"), model.using(tmp_path):
        pass
    assert_untouched(model, before)


def test_whole_blocks_may_be_saved(bases, tmp_path):
    _, model, reference = bases()
    ids, before = ids_of(model), state(model)
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["layers.1.mlp"], task_type="CAUSAL_LM")
    write_adapter(reference, config, tmp_path)
    with model.using(tmp_path):
        assert torch.equal(logits(model.hf, ids), peft_logits(reference, tmp_path, ids))
    assert_untouched(model, before)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("modules_to_save", 5), ("modules_to_save", [5]), ("modules_to_save", "norm"), ("peft_type", ["LORA"])],
)
def test_settings_of_another_kind_are_refused(bases, tmp_path, setting, value):
    _, model, reference = bases()
    write_adapter(reference, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), setting: value}))
    with pytest.raises(InputError, match=setting), model.using(tmp_path):
        pass


def test_attribution_inside_an_adapter_with_tokens_of_its_own(bases, tmp_path):
    _, model, reference = bases(None, True)
    config = LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[3, 7], task_type="CAUSAL_LM")
    write_adapter(reference, config, tmp_path)
    with model.using(tmp_path):
        found = rim.direct_logit_attribution(model, [TEXTS[0]], toward=3, against=9)
        given = logits(model.hf, model.tokenizer([TEXTS[0]], return_tensors="pt").input_ids)[0, -1]
        assert float(found.logit_difference[0]) == pytest.approx(float(given[3] - given[9]), rel=1e-3)


LINEAR = ["q_proj", "k_proj", "o_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def loras(bases, tmp_path_factory):
    """A model, two adapters of different ranks and places, and plain transformers' model of the base."""
    _, model, reference = bases()
    parent = tmp_path_factory.mktemp("two")
    first = LoraConfig(r=4, lora_alpha=8, target_modules=LINEAR, task_type="CAUSAL_LM")
    second = LoraConfig(r=2, lora_alpha=6, target_modules=LINEAR[:3], task_type="CAUSAL_LM")
    folders = [write_adapter(reference, c, parent / str(n), seed=n) for n, c in enumerate((first, second))]
    return model, *folders, reference


def merged(reference, *parts):
    """The base with products of matrices added by hand: of each adapter the modules that `wanted(layer, name)`."""
    hf = copy.deepcopy(reference)
    for folder, scale, wanted in parts:
        tensors, config = load_file(folder / ADAPTER_FILE), json.loads((folder / "adapter_config.json").read_text())
        for key, a in tensors.items():
            if key.endswith("lora_A.weight"):
                path = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                if wanted(int(path.split(".")[2]), path.rpartition(".")[2]):
                    b = tensors[key.replace("lora_A", "lora_B")]
                    hf.get_submodule(path).weight.data += scale * config["lora_alpha"] / config["r"] * b @ a
    return hf


@pytest.mark.parametrize(
    ("layers", "modules"),
    [
        ([1], None),
        (None, ["q_proj"]),
        ([0, 2], ["o_proj", "up_proj"]),
        (None, None),
        (2, None),
        ([1], ["attention"]),
        (None, ["mlp", "k_proj"]),
    ],
)
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_a_graft_is_the_other_adapter_in_the_places_named_and_nowhere_else(loras, layers, modules, scale):
    model, first, second, reference = loras
    asked = range(model.n_layers) if layers is None else [layers] if isinstance(layers, int) else layers

    def chosen(layer, name):
        part = "mlp" if name in ("up_proj", "down_proj") else "attention"
        return layer in asked and (modules is None or name in modules or part in modules)

    ids, before = torch.tensor([[5, 9, 3, 12, 7]]), state(model)
    expected = merged(reference, (first, scale, lambda *at: not chosen(*at)), (second, 1.0, chosen))
    with model.using(first, scale=scale):
        own = logits(model.hf, ids)
        with model.graft(second, layers=layers, modules=modules):
            found, name = logits(model.hf, ids), model.identity
            acts = rim.capture(model, TEXTS, "head_z")["head_z"]
        assert torch.equal(logits(model.hf, ids), own)
        assert model.identity != name
    assert_close(found, logits(expected, ids))
    assert not torch.equal(found, own)
    assert_close(acts, rim.capture(plain_as_model(model, expected), TEXTS, "head_z")["head_z"])
    assert_untouched(model, before)


def plain_as_model(model, hf):
    """A `Model` of other weights of the same base, not checked: to capture with."""
    other = rim.Model(hf, model.tokenizer, "merged", "merged", None, torch.float32)
    other.measure_identities()
    return other


def test_a_graft_of_the_base_takes_modules_out_and_interventions_hold_in_it(loras):
    model, first, second, reference = loras
    ids = torch.tensor([[5, 9, 3, 12, 7]])
    expected = logits(merged(reference, (first, 1.0, lambda layer, name: layer != 1)), ids)
    with model.using(first):
        with model.graft(None, layers=[1]):
            assert_close(logits(model.hf, ids), expected)
            with model.graft(second, layers=[0]):
                twice = merged(reference, (first, 1.0, lambda at, _: at > 1), (second, 1.0, lambda at, _: at == 0))
                assert_close(logits(model.hf, ids), logits(twice, ids))
            assert_close(logits(model.hf, ids), expected)
        with rim.ablate(model, [(1, 0)], mode="zero"):
            ablated = rim.refusal_log_odds(model, TEXTS, [5, 17])
            with model.graft(second, layers=[1]):
                both = rim.refusal_log_odds(model, TEXTS, [5, 17])
            assert torch.equal(rim.refusal_log_odds(model, TEXTS, [5, 17]), ablated)
    with model.using(first), model.graft(second, layers=[1]), rim.ablate(model, [(1, 0)], mode="zero"):
        assert torch.equal(rim.refusal_log_odds(model, TEXTS, [5, 17]), both)
    assert not torch.equal(both, ablated)


def test_a_graft_that_cannot_be_is_refused_in_one_line(loras):
    model, first, second, _ = loras
    with model.using(first):
        for wrong, match in (
            ({"layers": [7]}, "layer 7 is out of range"),
            ({"modules": ["q_prj"]}, r"neither adapter changes a module 'q_prj' \(did you mean 'q_proj'\?\)"),
            ({"modules": "q_proj"}, "graft: modules must be a list, not 'q_proj'"),
            ({"modules": []}, "graft: modules names none"),
        ):
            with pytest.raises(InputError, match=match), model.graft(second, **wrong):
                pass


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_a_dose_between_two_adapters_is_their_weights_mean(bases, tmp_path, quantization):
    _, model, reference = bases(quantization=quantization)
    plain = bases()[2]
    configs = (
        LoraConfig(r=4, lora_alpha=8, target_modules=LINEAR, layers_to_transform=[0, 1], task_type="CAUSAL_LM"),
        LoraConfig(r=2, lora_alpha=6, target_modules=LINEAR[:3], task_type="CAUSAL_LM"),
    )
    first, second = (write_adapter(plain, c, tmp_path / str(n), seed=n) for n, c in enumerate(configs))
    ids, before = torch.tensor([[5, 9, 3, 12, 7]]), state(model)

    def every(*_):
        return True

    with model.using(first):
        for scale in (0.25, 0.0, -0.5, 2.0):
            with model.using(second, origin=first, scale=scale):
                found = logits(model.hf, ids)
                assert model.checks["padding"].holds
                if quantization is None:
                    expected = merged(reference, (first, 1 - scale, every), (second, scale, every))
                    assert_close(found, logits(expected, ids))
                if scale == 0:
                    with model.using(first):
                        assert_close(found, logits(model.hf, ids))
        with model.using(second, origin=first):
            assert torch.equal(logits(model.hf, ids), peft_logits(reference, second, ids))
        # Where one of the two is the bare base, a dose is the other's.
        with model.using(first, scale=0.75):
            less = logits(model.hf, ids)
        with model.using(None, origin=first, scale=0.25):
            assert torch.equal(logits(model.hf, ids), less)
            assert model.role is None
    assert_untouched(model, before)


def test_no_dose_is_made_with_an_embedding_s_lora(loras, tmp_path):
    model, first, _, reference = loras
    config = LoraConfig(r=2, target_modules=["embed_tokens"], task_type="CAUSAL_LM")
    other, before = write_adapter(reference, config, tmp_path / "embedding", 3), state(model)
    with (
        pytest.raises(InputError, match="no dose between these adapters: embed_tokens"),
        model.using(other, origin=first, scale=0.5),
    ):
        pass
    assert_untouched(model, before)
