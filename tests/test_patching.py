"""Exact patching against one plain Hugging Face forward a patched run, with hooks written here."""

import pytest
import torch
from families import FAMILIES, MODULES, family_folder, load_tiny, reference
from plain import hooks, tensors

import rim_core as rim
from rim_core.errors import InputError
from rim_core.interventions import components, metrics, patching
from rim_core.models.hooks import Edit, editing

SOURCE = ["How do I bake bread?", "Explain the tides to a child in two short sentences.", "Why is the sky blue?"]
CLEAN = ["Why is the sea so salty here?", "How do I bake bread in a tin?", "Explain the tides to a child."]
SITES = {
    "attention": ("attn_out", "attention"),
    "mlp": ("mlp_out", "mlp"),
    "resid": ("resid_post", None),
    "heads": ("head_z", "attention_out"),
    "neurons": ("mlp_neurons", "mlp_out"),
}


def direction(model, width=None):
    return torch.randn(width or model.d_model, generator=torch.Generator().manual_seed(3))


def plain_patch(model, family, destination, component, layer, values, columns, positions):
    """Logits and final states of one prompt, alone, with `values[columns]` written at `positions` by a plain hook."""
    _, attribute = SITES[component]
    block = model.hf.get_submodule(MODULES[family].layers)[layer]
    module = block if attribute is None else block.get_submodule(getattr(MODULES[family], attribute))

    def put(tensor):
        changed = tensor.clone()
        for position in positions:
            changed[0, position, columns] = values[position, columns]
        return changed

    def before(module, args):
        return (put(args[0]), *args[1:])

    def after(module, args, output):
        return (put(output[0]), *output[1:]) if isinstance(output, tuple) else put(output)

    into = component in ("heads", "neurons")
    handle = module.register_forward_pre_hook(before) if into else module.register_forward_hook(after)
    try:
        return reference(model, family, destination)
    finally:
        handle.remove()


def expected(model, family, source, destination, component, layer, columns, positions, w):
    found, _ = reference(model, family, source)
    values = found[SITES[component][0]][layer]
    patched, _ = plain_patch(model, family, destination, component, layer, values, columns, positions)
    clean, _ = reference(model, family, destination)
    final = [states["resid_post"][-1, -1].float() @ w / w.norm() for states in (patched, clean)]
    return float(final[0] - final[1])


def assert_effects(found, wanted, clean):
    """Relative to the metric: an effect is the difference of two such numbers."""
    scale = max(float(torch.as_tensor(clean).abs().max()), float(torch.as_tensor(wanted).abs().max()))
    assert (found - torch.as_tensor(wanted)).abs().max() <= 1e-4 * scale


def components_of(family):
    return [c for c in SITES if c != "neurons" or MODULES[family].mlp_out]


@pytest.mark.parametrize(
    ("family", "quantization"),
    [("llama", None), ("llama", "nf4"), ("gpt2", None), ("gemma2", None), ("qwen3_moe", None)],
)
def test_every_component_at_the_last_token_equals_one_forward_a_run(family, quantization):
    model, w = load_tiny(family, quantization), None
    w = direction(model)
    for component in components_of(family):
        units = [(0, 5), (2, 31), (1, 0)] if component == "neurons" else None
        found = rim.patch(model, SOURCE, CLEAN, component, rim.Projection(w), units=units)
        # The whole batch was one pass; here each prompt is alone and each patch a forward of its own.
        for pair in (0, 1):
            for index in torch.cartesian_prod(*map(torch.arange, found.effects.shape[1:])).tolist():
                index = index if isinstance(index, list) else [index]
                if component == "neurons":
                    layer, column = units[index[0]]
                    columns = slice(column, column + 1)
                elif component == "heads":
                    layer, columns = (index[0], slice(index[1] * model.head_dim, (index[1] + 1) * model.head_dim))
                else:
                    layer, columns = index[0], slice(None)
                wanted = expected(model, family, SOURCE[pair], CLEAN[pair], component, layer, columns, [-1], w)
                assert_effects(found.effects[(pair, *index)], wanted, found.clean)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("component", ["heads", "resid"])
def test_positions_before_the_last(family, component):
    """In every family, since patched runs call its layers with arguments of their own."""
    model = load_tiny(family)
    w, positions = direction(model), [-4, -2]
    found = rim.patch(model, SOURCE, CLEAN, component, rim.Projection(w), positions=positions, layers=[2, 0])
    assert found.layers == (2, 0)
    for column, layer in enumerate(found.layers):
        part = slice(model.head_dim, 2 * model.head_dim) if component == "heads" else slice(None)
        wanted = expected(model, family, SOURCE[2], CLEAN[2], component, layer, part, positions, w)
        effect = found.effects[2, column]
        assert_effects(effect[1] if component == "heads" else effect, wanted, found.clean)


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_all_positions_of_pairs_of_equal_length(family):
    model = load_tiny(family)
    w = direction(model)
    clean = ["Why is the sky blue?"]
    a = model.tokenizer(clean[0]).input_ids
    # The same tokens in another order are as many again.
    source = [model.tokenizer.decode([*a[3:], *a[:3]])]
    assert len(model.tokenizer(source[0]).input_ids) == len(a), "the test needs a pair of equal length"
    found = rim.patch(model, source, clean, "mlp", rim.Projection(w), positions="all")
    for layer in range(3):
        every = range(-len(a), 0)
        wanted = expected(model, family, source[0], clean[0], "mlp", layer, slice(None), every, w)
        assert_effects(found.effects[0, layer], wanted, found.clean)


def test_spans_of_each_pair_and_other_positions_in_the_source():
    model = load_tiny("llama")
    w = direction(model)
    where = rim.find_span(model, CLEAN[2:], "the")
    start = where[0][0]
    found = rim.patch(
        model, SOURCE[:1], CLEAN[2:], "attention", rim.Projection(w), positions=where, source_positions=[where[0]]
    )
    states, _ = reference(model, "llama", SOURCE[0])
    for layer in range(3):
        values = states["attn_out"][layer]
        patched, _ = plain_patch(model, "llama", CLEAN[2], "attention", layer, values, slice(None), where[0])
        assert start < -1
        wanted = patched["resid_post"][-1, -1] @ w / w.norm() - found.clean[0]
        assert_effects(found.effects[0, layer], wanted, found.clean)
    moved = rim.patch(model, SOURCE[:1], CLEAN[:1], "resid", rim.Projection(w), positions=-1, source_positions=-3)
    values = states["resid_post"][1].roll(2, 0)
    patched, _ = plain_patch(model, "llama", CLEAN[0], "resid", 1, values, slice(None), [-1])
    assert_effects(moved.effects[0, 1], patched["resid_post"][-1, -1] @ w / w.norm() - moved.clean[0], moved.clean)


@pytest.mark.parametrize(("family", "quantization"), [("llama", "nf4"), ("gpt2", None), ("qwen3_moe", None)])
def test_a_prompt_patched_into_itself_changes_nothing(family, quantization):
    model = load_tiny(family, quantization)
    for component in ("attention", "mlp", "heads", "resid"):
        found = rim.patch(model, CLEAN, CLEAN, component, rim.Projection(direction(model)))
        assert found.effects.abs().max() <= 1e-5 * found.clean.abs().max()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_whole_residual_stream_gives_the_sources_output(family):
    model = load_tiny(family)
    found = rim.patch(model, SOURCE, CLEAN, "resid", rim.Projection(direction(model)), layers=[2])
    assert_effects(found.effects[:, 0], found.source - found.clean, found.clean)
    assert torch.allclose(found.normalised, torch.ones_like(found.normalised), atol=1e-3)


def test_units_together_are_one_run():
    model, w = load_tiny("llama"), direction(load_tiny("llama"))
    both = [[(0, 1), (2, 3)], (1, 2)]
    found = rim.patch(model, SOURCE, CLEAN, "heads", rim.Projection(w), units=both)
    states, _ = reference(model, "llama", SOURCE[0])
    d = model.head_dim

    def put(layer, head):
        def hook(module, args):
            z = args[0].clone()
            z[0, -1, head * d : (head + 1) * d] = states["head_z"][layer, -1, head * d : (head + 1) * d]
            return (z,)

        return hook

    layers = model.hf.model.layers
    handles = [layers[a].self_attn.o_proj.register_forward_pre_hook(put(a, h)) for a, h in both[0]]
    patched, _ = reference(model, "llama", CLEAN[0])
    for handle in handles:
        handle.remove()
    assert_effects(found.effects[0, 0], patched["resid_post"][-1, -1] @ w / w.norm() - found.clean[0], found.clean)
    alone = rim.patch(model, SOURCE, CLEAN, "heads", rim.Projection(w))
    assert torch.allclose(found.effects[:, 1], alone.effects[:, 1, 2], atol=1e-5)
    neurons = rim.patch(
        model, SOURCE, CLEAN, "neurons", rim.Projection(w), units=[[(1, n) for n in range(model.d_mlp)]]
    )
    mlp = rim.patch(model, SOURCE, CLEAN, "mlp", rim.Projection(w), layers=[1])
    assert torch.allclose(neurons.effects, mlp.effects, atol=1e-4 * float(found.clean.abs().max()))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_metrics_equal_the_models_own_numbers(family):
    model = load_tiny(family)
    toward, against = 17, 305
    found = rim.patch(model, SOURCE, CLEAN, "mlp", rim.LogitDifference(toward, [against, 44]))
    for pair in range(3):
        states, logits = reference(model, family, CLEAN[pair])
        wanted = logits[-1, toward] - logits[-1, [against, 44]].mean()
        assert torch.allclose(found.clean[pair], wanted, atol=1e-4)
    values, _ = reference(model, family, SOURCE[1])
    _, logits = plain_patch(model, family, CLEAN[1], "mlp", 1, values["mlp_out"][1], slice(None), [-1])
    wanted = logits[-1, toward] - logits[-1, [against, 44]].mean() - found.clean[1]
    assert torch.allclose(found.effects[1, 1], wanted, atol=1e-4)
    w = direction(model, model.d_mlp)
    probe = rim.patch(model, SOURCE, CLEAN, "heads", rim.ProbeScore(w, 0.5, site="mlp_neurons", layer=1))
    states, _ = reference(model, family, CLEAN[0])
    assert torch.allclose(probe.clean[0], states["mlp_neurons"][1, -1] @ w + 0.5, atol=1e-3)
    assert not probe.effects[:, 2].any()
    assert probe.effects[:, 0].abs().min() > 0
    own = rim.patch(model, SOURCE, CLEAN, "mlp", lambda state: state.norm(dim=-1))
    assert torch.allclose(own.clean[0], states["resid_post"][-1, -1].norm(), rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_metrics_of_logits_equal_those_of_the_models_own(family, monkeypatch):
    model = load_tiny(family)
    plain, lens = [], []
    for text in CLEAN:
        states, logits = reference(model, family, text)
        plain.append(logits[-1])
        lens.append(model.layout.readout(states["resid_post"][1, -1]))
    plain, lens = torch.stack(plain), torch.stack(lens)
    values, _ = reference(model, family, SOURCE[1])
    _, patched = plain_patch(model, family, CLEAN[1], "mlp", 1, values["mlp_out"][1], slice(None), [-1])
    for metric, read in (
        (rim.LogProbability([17, 305]), lambda rows: rows.softmax(-1)[:, [17, 305]].sum(-1).log()),
        (rim.LogitMetric(lambda rows: rows.amax(-1)), lambda rows: rows.amax(-1)),
        (rim.RefusalLogOdds([17, 44]), lambda rows: torch.special.logit(rows.softmax(-1)[:, [17, 44]].sum(-1))),
    ):
        found = rim.patch(model, SOURCE, CLEAN, "mlp", metric)
        assert torch.allclose(found.clean, read(plain), atol=1e-3)
        assert torch.allclose(found.effects[1, 1] + found.clean[1], read(patched[-1:])[0], atol=1e-3)
        with monkeypatch.context() as few:
            few.setattr(metrics, "_ROWS", 2)
            assert torch.allclose(rim.patch(model, SOURCE, CLEAN, "mlp", metric).effects, found.effects, atol=1e-4)
    odds = rim.patch(model, SOURCE, CLEAN, "mlp", rim.RefusalLogOdds([17, 44])).clean
    assert torch.allclose(odds, rim.refusal_log_odds(model, CLEAN, tokens=[17, 44]), atol=1e-4)
    below = rim.patch(model, SOURCE, CLEAN, "mlp", rim.LogProbability(17, layer=1))
    assert torch.allclose(below.clean, lens.log_softmax(-1)[:, 17], atol=1e-3)
    assert not below.effects[:, 2].any()


def test_metrics_of_logits_take_float32_values_into_a_bfloat16_model():
    model = rim.load(str(family_folder("llama")), quantization=None, dtype="bfloat16", device="cpu")
    acts = rim.capture(model, SOURCE, "resid_post")
    assert acts["resid_post"].dtype == torch.float32
    for metric in (rim.LogitDifference(17, 305), rim.LogProbability(17), rim.RefusalLogOdds([17])):
        found = rim.patch(model, acts, CLEAN, "resid", metric, layers=[2])
        wanted = rim.patch(model, CLEAN, SOURCE, "mlp", metric, layers=[0]).clean
        assert torch.allclose(found.effects[:, 0] + found.clean, wanted, atol=0.05)


def test_components_may_be_called_by_their_sites():
    model, w = load_tiny("llama"), rim.Projection(direction(load_tiny("llama")))
    for component, site in components.COMPONENTS.items():
        units = {"units": [(0, 1)]} if component == "neurons" else {}
        one, other = (rim.patch(model, SOURCE, CLEAN, name, w, **units) for name in (component, site))
        assert torch.equal(one.effects, other.effects)
        assert other.components == component


def test_interventions_hold_in_every_run_once():
    model, w = load_tiny("llama"), direction(load_tiny("llama"))
    push = direction(model) * 2

    def add(values, positions):
        return values + push * (positions == -1)[..., None]

    edits = [Edit("resid_pre", 1, add, True), Edit("attn_out", 2, lambda v, p: v * 0.5)]
    with editing(model, edits):
        found = rim.patch(model, SOURCE, CLEAN, "heads", rim.Projection(w))
        one = rim.patch(model, SOURCE[1:2], CLEAN[1:2], "heads", rim.Projection(w), max_tokens=1)
    assert_effects(one.effects[0], found.effects[1], found.clean)

    def before(module, args, kwargs):
        hidden = (args[0] if args else kwargs["hidden_states"]).clone()
        hidden[:, -1] += push
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    layers = model.hf.model.layers
    handles = [
        layers[1].register_forward_pre_hook(before, with_kwargs=True),
        layers[2].self_attn.register_forward_hook(lambda m, a, out: (out[0] * 0.5, *out[1:])),
    ]
    try:
        for layer in range(3):
            part = slice(0, model.head_dim)
            wanted = expected(model, "llama", SOURCE[0], CLEAN[0], "heads", layer, part, [-1], w)
            assert_effects(found.effects[0, layer, 0], wanted, found.clean)
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "falcon", "gemma2", "qwen3_moe"])
def test_a_shared_beginning_changes_no_number(family, monkeypatch):
    """All prompts start alike; where a window is smaller than a prompt, nothing is shared."""
    model, w = load_tiny(family), rim.Projection(direction(load_tiny(family)))
    start = "You answer in a few plain words and stay on the topic. "
    source, clean = [start + text for text in SOURCE], [start + text for text in CLEAN]
    for positions in ("last", [-3, -1]):
        shared = rim.patch(model, source, clean, "heads", w, positions=positions)
        with monkeypatch.context() as patched:
            patched.setattr(patching, "shared_beginning", lambda ids, keep: 0)
            apart = rim.patch(model, source, clean, "heads", w, positions=positions)
        assert_effects(shared.effects, apart.effects, apart.clean)
        assert torch.allclose(shared.clean, apart.clean, rtol=1e-4, atol=1e-4)
        assert torch.allclose(shared.source, apart.source, rtol=1e-4, atol=1e-4)
    sharing = patching.make_plan(model, source, clean, "heads", w, None, "last", None, None, None).shared
    assert bool(sharing) == (family not in ("mistral", "gemma2"))


def test_a_model_that_nnsight_has_wrapped_can_be_patched():
    model = rim.load(str(family_folder("llama")), quantization=None, device="cpu")
    w = rim.Projection(direction(model))
    before = rim.patch(model, SOURCE, CLEAN, "mlp", w)
    with torch.no_grad(), model.nnsight.trace(CLEAN[0]):
        pass
    assert torch.allclose(rim.patch(model, SOURCE, CLEAN, "mlp", w).effects, before.effects, atol=1e-4)


def test_source_activations_stand_in_for_texts():
    model, w = load_tiny("qwen3"), rim.Projection(direction(load_tiny("qwen3")))
    texts = rim.patch(model, SOURCE, CLEAN, "heads", w)
    stored = rim.patch(model, rim.capture(model, SOURCE, "head_z"), CLEAN, "heads", w)
    assert torch.allclose(texts.effects, stored.effects, atol=1e-5)
    assert stored.source.isnan().all()


def test_a_pass_that_does_not_fit_is_halved(monkeypatch):
    model, w = load_tiny("llama"), rim.Projection(direction(load_tiny("llama")))
    wanted = rim.patch(model, SOURCE, CLEAN, "mlp", w)
    real, sizes = patching.run_clean, []

    def full(model, ids, *rest):
        sizes.append(len(ids))
        if len(ids) > 1:
            raise torch.OutOfMemoryError("full")
        return real(model, ids, *rest)

    monkeypatch.setattr(patching, "run_clean", full)
    found = rim.patch(model, SOURCE, CLEAN, "mlp", w)
    assert torch.allclose(found.effects, wanted.effects, atol=1e-4)
    assert sizes[0] == 3
    assert sizes.count(1) == 3
    monkeypatch.setattr(patching, "run_clean", lambda *args: (_ for _ in ()).throw(torch.OutOfMemoryError("full")))
    with pytest.raises(InputError, match="does not fit in memory"):
        rim.patch(model, SOURCE, CLEAN, "mlp", w)
    monkeypatch.setattr(patching, "run_clean", lambda *args: (_ for _ in ()).throw(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        rim.patch(model, SOURCE, CLEAN, "mlp", w)


def test_no_hook_and_no_tensor_is_left():
    model, w = load_tiny("llama"), rim.Projection(direction(load_tiny("llama")))

    def call():
        rim.patch(model, SOURCE, CLEAN, "heads", w, positions=[-2, -1])
        return tensors()

    call()
    before, held = hooks(model), call()
    for _ in range(4):
        last = call()
    assert last <= held
    assert hooks(model) == before == 0
    assert model.frame is None


def test_frame_and_plots():
    model, w = load_tiny("llama"), rim.Projection(direction(load_tiny("llama")))
    heads = rim.patch(model, SOURCE, CLEAN, "heads", w)
    frame = heads.to_frame()
    assert len(frame) == 12
    row = frame[(frame["layer"] == 1) & (frame["head"] == 3)].iloc[0]
    values = heads.effects[:, 1, 3]
    assert row["estimate"] == pytest.approx(float(values.mean()), abs=1e-6)
    half = 4.302653 * float(values.std()) / 3**0.5
    assert row["high"] - row["estimate"] == pytest.approx(half, rel=1e-4)
    assert "3 pairs" in heads.plot().to_dict()["description"]
    assert rim.patch(model, SOURCE, CLEAN, "mlp", w).plot().to_dict()["description"]
    units = rim.patch(model, SOURCE, CLEAN, "heads", w, units=[(0, 1), [(1, 1), (2, 0)]])
    assert list(units.to_frame()["unit"]) == ["0.1", "1.1 + 2.0"]
    assert units.plot().to_dict()["description"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"components": "head"}, "unknown components 'head'"),
        ({"source": SOURCE[:2]}, "2 source texts for 3 destinations"),
        ({"positions": "first"}, "unknown positions 'first'"),
        ({"positions": -400}, "position -400 is out of range: text 0"),
        ({"positions": 0}, "position 0"),
        ({"positions": "all"}, "pairs of equal length"),
        ({"positions": [[-1], [-1]]}, "2 lists for 3 texts"),
        ({"positions": -1, "source_positions": [-1, -2]}, "2 source positions for 1"),
        ({"layers": [3]}, "layer 3 is out of range"),
        ({"layers": [1, 1]}, "each once"),
        ({"layers": []}, "layers: none given"),
        ({"components": "neurons"}, "neurons_above"),
        ({"units": [(0, 4)]}, "head 4 of layer 0 is out of range: .* of 4 heads"),
        ({"units": [(0, 1)], "layers": [0]}, "without layers"),
        ({"units": []}, "units is empty"),
        ({"components": "mlp", "units": [(0, 1)]}, "heads or neurons"),
        ({"metric": rim.Projection(torch.ones(7))}, "7 numbers, and its site has 32"),
        ({"metric": rim.Projection(torch.zeros(32))}, "length zero"),
        ({"metric": rim.Projection(torch.ones(32), layer=5)}, "layer 5 is out of range"),
        ({"metric": rim.Projection(torch.ones(32), site="mlp")}, "unknown site 'mlp'"),
        ({"metric": rim.LogitDifference("bread and butter", 3)}, "is no single token"),
        ({"metric": rim.LogitDifference(3, 4000)}, "no token 4000: ids go from 0 to 399"),
        ({"metric": rim.LogitDifference(3, [])}, "no tokens"),
        ({"metric": rim.LogitDifference("How", ["Why", " How"])}, "How is on both sides"),
        ({"metric": 3.0}, "is no metric"),
        ({"metric": rim.refusal_log_odds}, r"give rim.RefusalLogOdds\(\)"),
        (
            {"metric": rim.LogitMetric(lambda logits: logits.sum())},
            r"the metric <lambda> maps logits .* \[3, 400\], to shape \[\]",
        ),
        ({"metric": rim.LogitMetric(lambda logits: 1.0)}, "to float: it must give a tensor with one number a row"),
        ({"metric": rim.LogProbability([])}, "no tokens"),
        ({"metric": rim.RefusalLogOdds([])}, "at least one"),
    ],
)
def test_bad_input_gets_one_line(changes, message):
    model = load_tiny("llama")
    arguments = {
        "source": SOURCE,
        "destination": CLEAN,
        "components": "heads",
        "metric": rim.Projection(torch.ones(32)),
    }
    with pytest.raises(InputError, match=message) as caught:
        rim.patch(model, **{**arguments, **changes})
    assert "\n" not in str(caught.value)


def test_source_activations_must_fit():
    model = load_tiny("llama")
    every = rim.capture(model, SOURCE, "attn_out", positions=[-2, -1])
    with pytest.raises(InputError, match="positions='last'"):
        rim.patch(model, every, CLEAN, "attention", rim.Projection(torch.ones(32)))
    with pytest.raises(InputError, match="was not captured"):
        rim.patch(model, every, CLEAN, "mlp", rim.Projection(torch.ones(32)))


def test_experts_have_no_neurons():
    model = load_tiny("qwen3_moe")
    with pytest.raises(InputError, match="no single neuron basis"):
        rim.patch(model, SOURCE, CLEAN, "neurons", rim.Projection(torch.ones(32)), units=[(0, 1)])
