"""Plain transformers: models loaded as references, and interventions written once more, as hooks, one prompt alone."""

import contextlib
import gc

import torch
from families import MODULES
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import rim_core as rim
from rim_core.models.loading import keep_packed
from rim_core.models.padding import pad_left
from rim_core.texts import encode

OUTPUTS = {"resid_post": "", "attn_out": "attention", "mlp_out": "mlp"}


def plain_model(folder, quantization=None, dtype=torch.float32, **options):
    """A causal language model as plain transformers loads it, on the CPU: the one way to a reference.

    Its 4-bit weights stay as they were packed. Otherwise bitsandbytes would repack them at the first forward pass
    on a processor with AVX512-BF16, and a test would fail there and nowhere else.
    """
    config = None
    if quantization == "nf4":
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    hf = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, device_map="cpu", quantization_config=config, **options
    )
    return keep_packed(hf.eval())


def write_lora(base, modules, folder):
    """A LoRA adapter of rank 2 on these modules of a model in a folder, with weights that matter; gives its folder."""
    torch.manual_seed(1)
    peft = get_peft_model(plain_model(base), LoraConfig(r=2, target_modules=modules, task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    peft.save_pretrained(folder)
    return folder


@contextlib.contextmanager
def hooked(model, family, changes):
    """Within the context the changes `(site, layer, function of [1, token, width])` are made, in this order."""
    paths, handles = MODULES[family], []

    def module(layer, name):
        found = model.hf.get_submodule(paths.layers)[layer]
        return found.get_submodule(getattr(paths, name)) if name else found

    def at_input(change):
        def hook(module, args, kwargs):
            if args:
                return (change(args[0]), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}

        return hook

    def at_output(change):
        return lambda module, args, out: (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)

    inputs = {"resid_pre": "", "head_z": "attention_out", "mlp_neurons": "mlp_out"}
    for site, layer, change in changes:
        if site in inputs:
            place = module(layer, inputs[site])
            handles.append(place.register_forward_pre_hook(at_input(change), with_kwargs=True))
        else:
            handles.append(module(layer, OUTPUTS[site]).register_forward_hook(at_output(change)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def greedy(model, text, steps):
    """A greedy answer, each token by a pass of the whole sequence so far, and the logits `[step, vocab]` behind it."""
    ids = model.tokenizer(text, return_tensors="pt").input_ids
    start, logits = ids.shape[1], []
    for _ in range(steps):
        logits.append(model.hf(ids, use_cache=False).logits[0, -1])
        ids = torch.cat([ids, logits[-1].argmax().view(1, 1)], dim=1)
        if ids[0, -1] == model.tokenizer.eos_token_id:
            break
    return model.tokenizer.decode(ids[0, start:], skip_special_tokens=True), torch.stack(logits)


@torch.no_grad()
def generated(model, texts, steps):
    """With a cache, in one batch: the answers of `rim.generate`, and the logits `[text, step, vocab]` behind them."""
    inputs = pad_left(encode(model.tokenizer, texts), model.tokenizer.pad_token_id)
    out = model.hf.generate(
        **inputs,
        max_new_tokens=steps,
        do_sample=False,
        pad_token_id=model.tokenizer.pad_token_id,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return rim.generate(model, texts, max_new_tokens=steps), torch.stack(out.logits, dim=1)


def length(model, text):
    return len(model.tokenizer(text).input_ids)


def some(*shape, seed=0):
    """Fixed numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_close(found, wanted, tolerance=1e-4):
    """Largest difference over the largest value."""
    assert found.shape == wanted.shape
    error, scale = (found - wanted).abs().max(), wanted.abs().max()
    assert error <= tolerance * scale, error / scale


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.hf.modules())


def tensors():
    gc.collect()
    return sum(issubclass(type(item), torch.Tensor) for item in gc.get_objects())
