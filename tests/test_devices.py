"""A model whose layers are on two devices gives every tool's numbers as on one; and where a model goes."""

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import infer_auto_device_map
from devices import Devices, spread
from families import family_folder, load_tiny

import rim_core as rim
from rim_core.errors import InputError
from rim_core.models import batching, checks, loading
from rim_core.models.hooks import Edit, editing
from rim_core.models.model import Model

SOURCE = ["How do I bake bread now?", "Explain the tides to a child.", "Why is the sky so blue?"]
TARGET = ["How do I bake bread why?", "Explain the tides to a bird.", "Why is the sky so green?"]
ANSWERS = [" Use flour", " The moon", " It scatters"]
# The head of its own; the head tied to the embedding, which is on the other device.
TWO = ("llama", "gpt2")


def direction(model: Model) -> torch.Tensor:
    return torch.linspace(-1, 1, model.d_model)


def sites(model: Model) -> Iterator[Any]:
    names = ("resid_pre", "resid_post", "head_z", "mlp_neurons")
    for positions in ("last", "all"):
        acts = rim.capture(model, SOURCE, names, positions=positions)
        yield from (acts[name] for name in names)


def patching(model: Model) -> Iterator[Any]:
    metrics = rim.Projection(direction(model)), rim.LogitDifference([5], [6])
    for components in ("attention", "mlp", "heads", "resid"):
        for metric in metrics:
            yield rim.patch(model, SOURCE, TARGET, components, metric).effects
    yield rim.patch(model, SOURCE, TARGET, "heads", metrics[0], positions=[-3, -1]).effects
    yield rim.patch(model, SOURCE, TARGET, "neurons", metrics[1], units=[(0, 1), [(0, 2), (2, 3), (2, 5)]]).effects
    yield rim.patch(model, rim.capture(model, SOURCE, "attn_out"), TARGET, "attention", metrics[0]).effects
    below = rim.Projection(direction(model), layer=1)
    yield rim.patch(model, rim.capture(model, SOURCE, "resid_post"), TARGET, "resid", below).effects


def attribution(model: Model) -> Iterator[Any]:
    for components in ("attention", "mlp", "heads", "resid"):
        found = rim.attribution_patch(model, SOURCE, TARGET, components, rim.LogitDifference([5], [6]), sample=1)
        yield found.effects


def ablating(model: Model) -> Iterator[Any]:
    for mode in ("zero", "mean", "resample"):
        reference = None if mode == "zero" else SOURCE
        with rim.ablate(model, heads=[(0, 1), (2, 1)], mode=mode, reference=reference):
            yield rim.capture(model, TARGET, "resid_post")["resid_post"]
    with rim.ablate(model, direction=direction(model), mode="mean", reference=SOURCE):
        yield rim.capture(model, TARGET, "resid_post")["resid_post"]


def steering(model: Model) -> Iterator[Any]:
    for site in ("resid_pre", "resid_post"):
        with rim.steer(model, direction(model), [0, 1, 2], coefficient=3.0, positions=[-2, -1], site=site):
            yield rim.capture(model, TARGET, "resid_post", positions=[-2, -1])["resid_post"]
            yield rim.patch(model, SOURCE, TARGET, "heads", rim.Projection(direction(model))).effects
            yield rim.log_likelihood(model, SOURCE, ANSWERS).log_probability


def knocking_out(model: Model) -> Iterator[Any]:
    with rim.knock_out(model, "answer", [-3, -2], heads=[(0, 1), (1, 2), (2, 0)]):
        yield rim.capture(model, TARGET, "resid_post")["resid_post"]
        yield rim.patch(model, SOURCE, TARGET, "heads", rim.Projection(direction(model))).effects
        yield rim.generate(model, SOURCE, max_new_tokens=4)


def generating(model: Model) -> Iterator[Any]:
    yield rim.generate(model, SOURCE, max_new_tokens=6)
    with rim.steer(model, direction(model), [0, 1, 2], coefficient=5.0), rim.ablate(model, heads=[(1, 0)], mode="zero"):
        yield rim.generate(model, SOURCE, max_new_tokens=6)


def reading_out(model: Model) -> Iterator[Any]:
    lens = rim.logit_lens(model, SOURCE, [5, 6])
    yield from (lens.logit, lens.log_probability, lens.rank)
    yield rim.unembedding_direction(model, [5], [6])
    yield rim.refusal_log_odds(model, SOURCE, [5, 6])
    for layer in range(model.n_layers) if model.layout.soft_cap is None else ():
        yield rim.direct_logit_attribution(model, SOURCE, [5], [6]).heads[:, layer]
    if model.checks["residual_sum"].holds:
        yield rim.head_contributions(model, SOURCE, direction(model)).heads


def losses(model: Model) -> Iterator[Any]:
    yield rim.log_likelihood(model, SOURCE, ANSWERS).log_probability
    with rim.steer(model, direction(model), [1], coefficient=2.0):
        yield rim.kl_divergence(model, None, SOURCE, ANSWERS).kl
    for layer in (0, 2):
        for weight in ("attention_out", "mlp_out"):
            yield rim.per_example_gradients(model, SOURCE, ANSWERS, layer=layer, weight=weight)


def attention(model: Model) -> Iterator[Any]:
    yield rim.attention_patterns(model, SOURCE).probabilities


def splicing(model: Model) -> Iterator[Any]:
    data = torch.randn(64, model.d_model, generator=torch.Generator().manual_seed(0))
    sae = rim.train_sae(data, n_latents=48, steps=3, progress=False)
    for layer in (0, 2):
        with rim.splice(model, sae, layer, error_term=False, latents=[1, 2], value=0.5):
            yield rim.capture(model, SOURCE, "resid_post")["resid_post"]


TOOLS: list[Callable[[Model], Any]] = [
    sites,
    patching,
    attribution,
    ablating,
    steering,
    knocking_out,
    generating,
    reading_out,
    losses,
    attention,
    splicing,
]


@pytest.fixture(scope="module", params=TWO)
def pair(request: pytest.FixtureRequest) -> tuple[Model, Model]:
    """The same model on one device and on two."""
    again = rim.load(str(family_folder(request.param)), quantization=None, device="cpu")
    return load_tiny(request.param), spread(again)


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.__name__)
def test_a_tool_gives_the_same_on_two_devices_as_on_one(
    pair: tuple[Model, Model], tool: Callable[[Model], Any]
) -> None:
    one, two = pair
    wanted = list(tool(one))
    with Devices():
        found = list(tool(two))
    assert len(found) == len(wanted) > 0
    for a, b in zip(found, wanted, strict=True):
        if isinstance(a, list):
            assert a == b
        else:
            np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-4, atol=1e-5)


def test_identities_are_measured_across_devices(pair: tuple[Model, Model]) -> None:
    one, two = pair
    with Devices():
        found = checks.measure(two.hf, two.tokenizer, two.layout, torch.float32)
    assert {name: check.holds for name, check in found.items()} == {n: c.holds for n, c in one.checks.items()}


def test_the_two_devices_are_not_let_mix(pair: tuple[Model, Model]) -> None:
    _, two = pair
    where = torch.zeros(two.d_model)
    careless = Edit("resid_post", 2, lambda values, _: values + where.to(two.device))
    with Devices():
        assert len({parameter.device for parameter in two.hf.parameters()}) == 2
        with pytest.raises(RuntimeError, match="different devices"), editing(two, [careless]):
            rim.capture(two, SOURCE, "resid_post")


# --- where a model goes -----------------------------------------------------------------------------------


def gpus(monkeypatch: pytest.MonkeyPatch, *free: float) -> None:
    index = lambda device: device if isinstance(device, int) else device.index  # noqa: E731
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(free))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(free[index(device)]), 0))


def placed(device: str = "auto", device_map: str | None = None) -> dict[str, Any]:
    return loading._places(device, torch.device("cuda" if device == "auto" else device), device_map)


def test_several_gpus_are_filled_one_after_another(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, 8e9, 8e9)
    room = {0: int(6.4e9), 1: int(6.4e9)}
    assert placed() == {"device_map": "sequential", "max_memory": room}
    assert placed(device_map="auto") == {"device_map": "auto", "max_memory": room}
    assert placed(device="cuda:1") == {"device_map": {"": "cuda:1"}}
    gpus(monkeypatch, 8e9)
    assert placed() == {"device_map": {"": "cuda"}}  # what does not fit on the only one fails there, as ever


@pytest.mark.parametrize("share", [3.0, 0.7, 0.4])
def test_a_model_goes_to_several_gpus_only_where_it_must(share: float) -> None:
    """As accelerate places it: on one GPU where that is enough, on two where it is not, with a rest where both are."""
    hf = load_tiny("llama").hf
    size = sum(parameter.nbytes for parameter in hf.parameters())
    memory = dict.fromkeys((0, 1), int(share * size))
    found = infer_auto_device_map(hf, memory, no_split_module_classes=["LlamaDecoderLayer"])
    assert set(found.values()) == {3.0: {0}, 0.7: {0, 1}}.get(share, {1, "disk"})


@pytest.mark.parametrize(
    ("call", "told"),
    [
        ({"device_map": "balanced"}, "unknown device_map 'balanced'"),
        ({"device_map": "auto", "device": "cuda:1"}, "contradict each other"),
    ],
)
def test_what_cannot_be_placed_is_told_before_loading(call: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError, match=told):
        placed(**call)


@pytest.mark.parametrize("rest", ["cpu", "disk"])
def test_a_model_left_partly_elsewhere_is_refused(rest: str) -> None:
    loaded = SimpleNamespace(hf_device_map={"model.layers.0": 0, "model.layers.1": rest})
    with pytest.raises(InputError, match=r"no place for model\.layers\.1.*nf4"):
        loading._require_all_on_gpus(loaded, "it")
    loading._require_all_on_gpus(SimpleNamespace(hf_device_map={"": "cpu"}), "it")


def test_working_memory_is_that_of_the_fullest_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    class Layer:
        def __init__(self, number: int) -> None:
            self.number = number

        def parameters(self) -> Iterator[Any]:
            yield type("P", (), {"device": torch.device("cuda", self.number)})

    gpus(monkeypatch, 8e9, 3e9, 1e9)
    layout = type("L", (), {"layers": (Layer(0), Layer(1))})
    assert batching.free_on_gpus(layout) == 3e9  # the third holds no layer
