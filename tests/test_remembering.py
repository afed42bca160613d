"""Layers that are left out because they have seen the input: the same bits, fewer layers run."""

import json

import pytest
import torch
from families import CASES, load_tiny
from peft import LoraConfig
from plain import plain_model
from test_adapters import write_adapter
from tiny import TEXTS, write_model

import rim_core as rim

TOKENS = [5, 17]


class Counted:
    """How often each layer runs what is in it: its MLP, since the layer itself may give what it gave before."""

    def __init__(self, model):
        self.layers = [0] * model.n_layers
        self.hooks = [module.register_forward_hook(self._count(at)) for at, module in enumerate(model.layout.mlp)]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for hook in self.hooks:
            hook.remove()

    def _count(self, at):
        def count(*_):
            self.layers[at] += 1

        return count

    def since(self):
        found, self.layers = self.layers, [0] * len(self.layers)
        return found


@pytest.mark.parametrize(("family", "quantization"), CASES)
def test_a_batch_seen_again_gives_the_same_bits(family, quantization):
    model = load_tiny(family, quantization)
    texts = rim.format_chat(model, TEXTS)
    plain = rim.refusal_log_odds(model, texts, TOKENS)
    with Counted(model) as counted, model.remembering():
        first = rim.refusal_log_odds(model, texts, TOKENS)
        whole = counted.since()
        again = rim.refusal_log_odds(model, texts, TOKENS)
        less = counted.since()
        fewer = rim.refusal_log_odds(model, texts[:3], TOKENS)
        with rim.ablate(model, heads=[(0, 0)], mode="zero"):
            ablated = rim.refusal_log_odds(model, texts, TOKENS)
    with rim.ablate(model, heads=[(0, 0)], mode="zero"):
        assert torch.equal(rim.refusal_log_odds(model, texts, TOKENS), ablated)
    assert not torch.equal(ablated, plain)
    assert torch.equal(first, plain)
    assert torch.equal(again, plain)
    assert torch.equal(fewer, rim.refusal_log_odds(model, texts[:3], TOKENS))
    # A beginning that is shared is run once before each pass, the rest of it once alone.
    assert less == [before - 1 for before in whole]
    assert all("forward" not in vars(layer) for layer in model.layout.layers)
    assert torch.equal(rim.refusal_log_odds(model, texts, TOKENS), plain)


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """A tiny model and two adapters, which touch layers 1 and 2, and 2 alone."""
    folder = tmp_path_factory.mktemp("base")
    write_model(folder)
    reference = plain_model(folder, None)

    def adapter(seed, layers):
        config = LoraConfig(
            r=2, lora_alpha=4, target_modules=["q_proj", "down_proj"], layers_to_transform=layers, task_type="CAUSAL_LM"
        )
        return write_adapter(reference, config, tmp_path_factory.mktemp("adapter"), seed)

    model = rim.load(str(folder), quantization=None, device="cpu")
    return model, adapter(0, [1, 2]), adapter(1, [2])


def test_roles_and_grafts_begin_where_they_differ(adapted):
    model, lower, upper = adapted
    texts = rim.format_chat(model, TEXTS)

    def settings():
        """Every setting, as a context, with the layers that must run after those before it."""
        yield "bare", [], [1, 1, 1]
        yield "lower", [model.using(lower)], [0, 1, 1]
        yield "upper", [model.using(upper)], [0, 0, 1]
        yield "upper again", [model.using(upper)], [0, 0, 0]
        yield "dose", [model.using(lower, scale=0.5)], [0, 1, 1]
        yield "graft of layer 2", [model.using(lower), lambda: model.graft(upper, layers=[2])], [0, 0, 1]
        # The other adapter has nothing in layer 1: this is the bare base, up to layer 2.
        yield "graft of layer 1", [model.using(lower), lambda: model.graft(upper, layers=[1])], [0, 0, 1]
        yield "lower again", [model.using(lower)], [0, 0, 0]

    def measured(contexts):
        if not contexts:
            return rim.refusal_log_odds(model, texts, TOKENS)
        context, *rest = contexts
        with context if hasattr(context, "__enter__") else context():
            return measured(rest)

    plain = {name: measured(contexts) for name, contexts, _ in settings()}
    assert len({json.dumps(values.tolist()) for values in plain.values()}) == 6
    with Counted(model) as counted, model.remembering():
        for name, contexts, layers in settings():
            assert torch.equal(measured(contexts), plain[name]), name
            assert counted.since() == layers, name
    assert model.memory is None


def test_capture_and_likelihoods_begin_where_roles_differ(adapted):
    model, lower, upper = adapted
    texts, answers = rim.format_chat(model, TEXTS), [" Why? Because."] * len(TEXTS)

    def everything():
        acts = rim.capture(model, texts, ["resid_pre", "resid_post"], positions=[-1])
        inside = rim.capture(model, texts, "mlp_out", positions=[-1])["mlp_out"]
        likelihoods = rim.log_likelihood(model, texts, answers)
        found = [acts["resid_pre"], acts["resid_post"], inside, torch.tensor(likelihoods.log_probability)]
        return [*found, torch.tensor(likelihoods.entropy)]

    plain = {}
    for place in (None, lower, upper):
        with model.using(place):
            plain[place] = everything()
    with Counted(model) as counted, model.remembering():
        for place, run in ((None, 3), (lower, 2), (upper, 1), (None, 0)):
            counted.since()
            with model.using(place):
                found = everything()
            assert all(torch.equal(a, b) for a, b in zip(found, plain[place], strict=True))
            # What is inside a layer cannot be read where the layer is left out, so that its pass runs whole.
            assert counted.since() == [1] * (3 - run) + [3] * run


def test_roles_hand_on_what_was_seen_and_forget_it_afterwards(tiny_folder, tmp_path, adapted):
    _, lower, upper = adapted
    suite = tmp_path / "own.yml"
    roles = f"{{base: {{}}, lower: {{adapter: {lower}}}, upper: {{adapter: {upper}}}}}"
    suite.write_text(f"base: {{folder: {tiny_folder()}}}\nroles: {roles}\n")
    first = rim.load(f"{suite}:base", quantization=None, device="cpu")
    texts, seen = rim.format_chat(first, TEXTS), {}
    with first.remembering():
        for model in rim.roles(first, "base", "lower", "upper"):
            with Counted(model) as counted:
                seen[model.role] = rim.log_likelihood(model, texts, [" Why?"] * len(texts)).entropy
                runs = counted.since()
            assert [bool(each) for each in runs] == [model.role == "base", model.role != "upper", True]
    assert model.memory.closed
    assert not model.memory.kept
    for again in rim.roles(model, "base", "lower", "upper"):
        found = rim.log_likelihood(again, texts, [" Why?"] * len(texts)).entropy
        assert found.tolist() == seen[again.role].tolist()


def test_what_does_not_fit_is_forgotten_and_not_kept(adapted, monkeypatch):
    model, lower, _ = adapted
    texts = rim.format_chat(model, TEXTS)
    plain = rim.refusal_log_odds(model, texts, TOKENS)
    monkeypatch.setattr("rim_core.models.remembering._LIMIT", 10_000)
    with model.remembering():
        for _ in range(3):
            assert torch.equal(rim.refusal_log_odds(model, texts, TOKENS), plain)
            assert model.memory.size <= 10_000
        with model.using(lower):
            assert not torch.equal(rim.refusal_log_odds(model, texts, TOKENS), plain)
