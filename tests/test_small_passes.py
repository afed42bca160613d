"""Weights laid out for small passes, and attention from one query: the model's numbers, and nothing left behind."""

import psutil
import pytest
import torch
from families import FAMILIES, family_folder, load_tiny
from peft import LoraConfig, get_peft_model
from plain import assert_close, plain_model, some
from tiny import TEXTS

import rim_core as rim
from rim_core.models import small_passes as module
from rim_core.models.small_passes import laid_out, one_query


def step(model, rows):
    """Logits of a decoding step of padded rows on a cache, and how the model got there."""
    ids = torch.tensor([model.tokenizer(TEXTS[1]).input_ids[:9]] * rows)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with torch.no_grad():
        past = model.hf(ids[:, :-1], attention_mask=mask[:, :-1], use_cache=True).past_key_values
        return model.hf(ids[:, -1:], attention_mask=mask, past_key_values=past).logits


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(("family", "quantization"), [*((family, None) for family in FAMILIES), ("llama", "nf4")])
def test_a_step_has_the_model_s_numbers(family, quantization, rows, monkeypatch):
    """With and without padding; small as these modules are, they count here."""
    model = load_tiny(family, quantization)
    monkeypatch.setattr(module, "_SMALL", 0)
    wanted, attention = step(model, rows), model.hf.config._attn_implementation
    fused, queries = module.sdpa_attention_forward, []

    def noted(attending, query, *args, **options):
        queries.append(query.shape[2])
        return fused(attending, query, *args, **options)

    monkeypatch.setattr(module, "sdpa_attention_forward", noted)
    with laid_out(model.hf), one_query(model.hf):
        held = {type(one).__name__ for one in model.hf.modules() if "forward" in vars(one)}
        assert held == ({"Linear", "Linear4bit"} if quantization else {"Linear"})
        assert_close(step(model, rows), wanted, 1e-5)
    assert 1 not in queries
    assert bool(queries) == (attention == "sdpa" and family != "falcon")  # which attends by a way of its own
    assert not any("forward" in vars(one) for one in model.hf.modules())
    assert model.hf.config._attn_implementation == attention


@pytest.mark.parametrize("quantization", [None, "nf4"])
@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"lora_bias": True}])
def test_a_step_has_the_numbers_of_the_adapter_now_active(tmp_path, quantization, options, monkeypatch):
    """A plain LoRA's are laid out with the weights it is put on; others run as they are; doses count."""
    model = load_tiny("llama", quantization)
    monkeypatch.setattr(module, "_SMALL", 0)
    torch.manual_seed(1)
    config = LoraConfig(r=2, target_modules=["q_proj", "o_proj"], task_type="CAUSAL_LM", **options)
    peft = get_peft_model(plain_model(model.name), config)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    peft.save_pretrained(tmp_path)
    doses = (1.0,) if options else (1.0, 0.5)
    found = []
    for dose in doses:
        with model.using(tmp_path, scale=dose):
            wanted = step(model, 3)
            with laid_out(model.hf), one_query(model.hf):
                held = [one for one in model.hf.modules() if "forward" in vars(one) and hasattr(one, "lora_A")]
                assert bool(held) == ("use_dora" not in options and "lora_bias" not in options)
                assert_close(step(model, 3), wanted, 1e-5)
            found.append(wanted)
    bare = step(model, 3)
    assert all((one - bare).abs().max() > 1e-2 * bare.abs().max() for one in found)


def test_large_passes_are_the_model_s_own_bit_for_bit(monkeypatch):
    model = load_tiny("llama", "nf4")
    monkeypatch.setattr(module, "_SMALL", 0)
    monkeypatch.setattr(module, "_FEW", 4)
    ids = torch.tensor([model.tokenizer(TEXTS[1]).input_ids])
    with torch.no_grad():
        wanted = model.hf(ids).logits
        with laid_out(model.hf), one_query(model.hf):
            assert torch.equal(model.hf(ids).logits, wanted)


@pytest.mark.parametrize("why", ["memory", "wrapped"])
def test_where_weights_may_not_be_held_nothing_changes(why, monkeypatch):
    # A model of its own: others' tools leave a `forward` on the modules of the shared one.
    model = rim.load(str(family_folder("llama")), quantization=None, device="cpu")
    monkeypatch.setattr(module, "_SMALL", 0)
    down = model.layout.mlp_out[0]
    if why == "memory":
        full = psutil.virtual_memory()._replace(available=4)
        monkeypatch.setattr(psutil, "virtual_memory", lambda: full)
    else:
        monkeypatch.setattr(down, "forward", lambda x: type(down).forward(down, x))
    mine = vars(down).get("forward")
    with laid_out(model.hf), one_query(model.hf):
        held = [one for one in model.hf.modules() if "forward" in vars(one)]
        assert vars(down).get("forward") is mine
        assert (down in held) == (why == "wrapped")
        assert bool(held) == (why == "wrapped")
    assert vars(down).get("forward") is mine


def test_a_head_s_own_mask_and_a_scale_are_kept():
    """Against softmax written out: two key heads for four query heads, a mask by head, another scale."""
    query, key, value = some(2, 4, 1, 8), some(2, 2, 5, 8, seed=1), some(2, 2, 5, 8, seed=2)
    mask = torch.zeros(2, 4, 1, 5).index_put_((torch.tensor([0]), torch.tensor([1])), torch.tensor(-1e9), True)
    mask[0, 1, 0, 3] = 0
    mask[1, :, 0, 0] = -torch.inf
    wanted = torch.einsum(
        "bhk,bkhd->bhd",
        torch.softmax(
            torch.einsum("bhqd,bhkd->bhqk", query, key.repeat_interleave(2, 1))[:, :, 0] * 0.3 + mask[:, :, 0], -1
        ),
        value.repeat_interleave(2, 1).transpose(1, 2),
    )
    found, _ = module._attend(None, query, key, value, mask, scaling=0.3)
    assert_close(found[:, 0], wanted, 1e-5)
    allowed = mask > -1
    found, _ = module._attend(None, query, key, value, allowed[:, :1], scaling=0.3)
    wanted, _ = module._attend(
        None, query, key, value, torch.zeros(2, 1, 1, 5).masked_fill(~allowed[:, :1], -torch.inf), scaling=0.3
    )
    assert_close(found, wanted, 1e-6)
