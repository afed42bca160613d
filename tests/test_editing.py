"""Edits of activations and masks, against plain hooks on one prompt at a time without a cache."""

import pytest
import torch
from families import FAMILIES, load_tiny, reference, sites_of
from plain import assert_close, generated, greedy, hooked, hooks, length, some, tensors, write_lora
from tiny import TEXTS

import rim_core as rim
from rim_core.errors import InputError
from rim_core.models.hooks import Edit, MaskEdit, at, by_layer, edit_at, editing
from rim_core.models.layout import SITES

STEPS = 5
# Packed weights change nothing in how modules are hooked; three families show it.
CASES = [*((family, None) for family in FAMILIES), ("llama", "nf4"), ("qwen3", "nf4"), ("gpt2", "nf4")]


def width(model, site):
    return {"head_z": model.n_heads * model.head_dim, "mlp_neurons": model.d_mlp}.get(site, model.d_model)


def changes_at_every_site(model, family):
    """One change a site, on layers 1 and 2: (site, layer, function)."""
    made = []
    for number, site in enumerate(sites_of(family)):
        shift = some(width(model, site), seed=number)
        made.append((site, 1 + number % 2, lambda values, shift=shift: 0.8 * values + 0.3 * shift))
    return made


def only_last(change, model, text):
    """The change at the prompt's last token, in a pass that may hold an answer's tokens after it."""
    place = length(model, text) - 1

    def changed(values):
        edited = values.clone()
        edited[:, place] = change(values)[:, place]
        return edited

    return changed


@pytest.mark.parametrize(("family", "quantization"), CASES)
@pytest.mark.parametrize("positions", ["all", "last"])
def test_edits_equal_plain_hooks_in_capture_and_generation(family, quantization, positions):
    """In a batch of unequal lengths, at every site, and at each step of generation."""
    model = load_tiny(family, quantization)
    changes = changes_at_every_site(model, family)
    edits = [edit_at(positions, *change) for change in changes]
    _, untouched = generated(model, TEXTS, 1)
    with editing(model, edits):
        every = rim.capture(model, TEXTS, sites_of(family), positions="all")
        answers, logits = generated(model, TEXTS, STEPS)
    for row, text in enumerate(TEXTS):
        by_hand = changes
        if positions == "last":
            by_hand = [(site, layer, only_last(change, model, text)) for site, layer, change in changes]
        with hooked(model, family, by_hand):
            wanted, _ = reference(model, family, text)
            answer, by_step = greedy(model, text, STEPS)
        for site in sites_of(family):
            found = every[site][row, -length(model, text) :].flatten(2).transpose(0, 1)
            assert_close(found, wanted[site])
        assert answers[row] == answer
        assert_close(logits[row, : len(by_step)], by_step)
        assert (logits[row, 0] - untouched[row, 0]).abs().max() > 1e-2 * untouched[row].abs().max()


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_an_edit_is_told_which_token_each_slot_holds(family):
    model, told = load_tiny(family), []

    def listen(values, positions):
        told.append(positions.tolist())
        return values

    with editing(model, [Edit("resid_pre", 0, listen)]):
        rim.generate(model, TEXTS, max_new_tokens=3)
        model.hf(model.tokenizer(TEXTS[0], return_tensors="pt").input_ids)
    longest = max(length(model, text) for text in TEXTS)
    prompts = [list(range(-length(model, text), 0)) for text in sorted(TEXTS, key=lambda t: -length(model, t))]
    # Padding, wherever it is, is before every prompt.
    assert all(len(row) == longest for row in told[0])
    assert [[at for at in row if at >= -longest] for row in told[0]] == prompts
    # The third token of the answer is chosen by the pass of the second one.
    assert told[1:3] == [[[0]] * 3, [[1]] * 3]
    assert told[3:] == [[list(range(-length(model, TEXTS[0]), 0))]]


def test_contexts_nest_in_order_of_entry():
    model = load_tiny("llama")
    double = Edit("resid_post", 1, lambda values, _: 2 * values)
    shift = Edit("resid_post", 1, lambda values, _: values + 5)
    plain = rim.capture(model, TEXTS, "resid_post")["resid_post"][:, 1]
    with editing(model, Edit("resid_post", 1, lambda values: 2 * values)):  # of one argument
        assert torch.equal(rim.capture(model, TEXTS, "resid_post")["resid_post"][:, 1], 2 * plain)
    with editing(model, [double]), editing(model, [shift]):
        assert model.edits == [double, shift]
        assert_close(rim.capture(model, TEXTS, "resid_post")["resid_post"][:, 1], 2 * plain + 5)
    with editing(model, [shift, double]):
        assert_close(rim.capture(model, TEXTS, "resid_post")["resid_post"][:, 1], 2 * (plain + 5))
    assert model.edits == []


def test_an_exception_inside_leaves_nothing():
    model = load_tiny("llama")
    before = hooks(model)
    edits = [Edit(site, 0, lambda values, _: values) for site in SITES]
    edits.append(MaskEdit(0, lambda mask, _: mask))
    with editing(model, edits):
        assert hooks(model) == before + len(edits) + 1
    with pytest.raises(RuntimeError, match="stop"), editing(model, edits), editing(model, edits[:2]):
        raise RuntimeError("stop")
    assert hooks(model) == before
    assert model.edits == []


def test_a_failed_entry_leaves_nothing():
    model = load_tiny("qwen3_moe")
    before = hooks(model)
    edits = [Edit(site, 0, lambda values, _: values) for site in ("resid_pre", "mlp_neurons")]
    with pytest.raises(InputError, match="mixture of experts"), editing(model, edits):
        pass
    assert hooks(model) == before
    assert model.edits == []


def test_in_and_out_leaves_no_tensor():
    model = load_tiny("llama")
    mask = MaskEdit(1, lambda mask, _: mask + 0)

    def once():
        with editing(model, [edit_at("all", "resid_post", 0, lambda values: values + 1), mask]):
            rim.capture(model, TEXTS, "resid_post")

    once()
    before = hooks(model), tensors()
    for _ in range(20):
        once()
    assert hooks(model) == before[0]
    assert tensors() <= before[1] + 2


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mask_left_as_it_is_changes_nothing(family):
    """With padding, alone where the model passes no mask, and over a window's edge in generation."""
    model = load_tiny(family)
    shapes = []

    def same(mask, frame):
        assert mask.shape[-2:] == (frame.queries.shape[1], frame.keys.shape[1])
        shapes.append(mask.shape)
        return mask.expand(-1, model.n_heads, -1, -1)

    edits = [MaskEdit(layer, same) for layer in range(model.n_layers)]
    ids = model.tokenizer(TEXTS[1], return_tensors="pt").input_ids
    with torch.no_grad():
        alone, answers = model.hf(ids).logits, rim.generate(model, TEXTS, max_new_tokens=STEPS)
        captured = rim.capture(model, TEXTS, "resid_post", positions="all")["resid_post"]
        with editing(model, edits):
            assert_close(model.hf(ids).logits, alone)
            assert rim.generate(model, TEXTS, max_new_tokens=STEPS) == answers
            assert rim.generate(model, TEXTS[1:2], max_new_tokens=STEPS) == answers[1:2]
            found = rim.capture(model, TEXTS, "resid_post", positions="all")["resid_post"]
    assert_close(found, captured)
    assert {1, ids.shape[1]} <= {shape[-2] for shape in shapes}  # decoding steps were among them


def test_the_tiny_llama_passes_no_mask_for_one_prompt():
    """Else the test above would not show that no mask is read as causal attention."""
    model, seen = load_tiny("llama"), []
    handle = model.layout.attention[0].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True
    )
    model.hf(model.tokenizer(TEXTS[0], return_tensors="pt").input_ids)
    handle.remove()
    assert seen == [None]


def test_positional_edits_hold_under_a_shared_beginning():
    """Chat prompts start alike, and capture would run that part once, where positions from the end mean nothing."""
    model = load_tiny("llama")
    texts = rim.format_chat(model, TEXTS, system="You answer in a few plain words and stay on the topic.")
    shift = some(model.d_model)
    for positions in ([-2, -9, -30], "all"):
        with editing(model, [edit_at(positions, "resid_post", 0, lambda values: values + shift)]):
            together = rim.capture(model, texts, "resid_post")["resid_post"]
            alone = [rim.capture(model, [text], "resid_post")["resid_post"] for text in texts]
        assert_close(together, torch.cat(alone))
        untouched = rim.capture(model, texts, "resid_post")["resid_post"]
        assert (together[:, 1:] - untouched[:, 1:]).abs().max() > 1e-2


def test_capture_under_an_edit_is_not_cached():
    model = load_tiny("llama")
    with (
        editing(model, [Edit("resid_pre", 0, lambda values, _: values)]),
        pytest.raises(InputError, match="cache=False"),
    ):
        rim.capture(model, TEXTS, "resid_post", cache=True)


@pytest.fixture(scope="module")
def adapted(tiny_folder, tmp_path_factory):
    """A model of its own and an adapter that matters."""
    folder = write_lora(tiny_folder(), ["o_proj", "down_proj"], tmp_path_factory.mktemp("adapter"))
    return rim.load(str(tiny_folder()), quantization=None, device="cpu"), folder


def test_an_adapter_is_switched_inside(adapted):
    model, adapter = adapted
    edit = edit_at("all", "head_z", 1, lambda values: 0.5 * values)
    before = rim.capture(model, TEXTS, "head_z")["head_z"]
    with model.using(adapter):
        plain = rim.capture(model, TEXTS, "head_z")["head_z"]
        with editing(model, [edit]):
            inside = rim.capture(model, TEXTS, "head_z")["head_z"]
    with editing(model, [edit]), model.using(adapter):
        assert_close(rim.capture(model, TEXTS, "head_z")["head_z"], inside)
    assert_close(inside[:, 1], 0.5 * plain[:, 1])
    assert (plain - before).abs().max() > 1e-2
    assert torch.equal(rim.capture(model, TEXTS, "head_z")["head_z"], before)


def test_positions():
    slots = torch.tensor([[-3, -2, -1, 0, 1]])
    assert at(slots, "all").tolist() == [[True] * 5]
    assert at(slots, "last").tolist() == at(slots, -1).tolist() == [[False, False, True, False, False]]
    assert at(slots, "answer").tolist() == (slots >= -1).tolist()
    assert at(slots, [-1, -3]).tolist() == [[True, False, True, False, False]]
    for wrong in ("first", 0, [1], [], [-1, "last"], 1.5, None):
        with pytest.raises(InputError, match="unknown positions"):
            at(slots, wrong)
        with pytest.raises(InputError, match="unknown positions"):
            edit_at(wrong, "resid_pre", 0, lambda values: values)


def test_a_direction_is_one_or_one_a_layer():
    model = load_tiny("llama")
    one, many = some(model.d_model), some(model.n_layers, model.d_model)
    assert torch.equal(by_layer(model, one), one.expand(model.n_layers, -1))
    assert torch.equal(by_layer(model, many.double().numpy()), many)
    for wrong, says in (
        (some(5), "shape"),
        (some(2, model.d_model), "shape"),
        (torch.zeros(model.d_model), "layer 0"),
        (many * torch.tensor([[1.0], [torch.nan], [1.0]]), "layer 1"),
    ):
        with pytest.raises(InputError, match=says):
            by_layer(model, wrong)


def one(layers=1, site="resid_post", **options):
    return lambda fn: rim.edit(load_tiny("llama"), fn, layers=layers, site=site, **options)


def low(fn, site="resid_post", layer=1):
    return editing(load_tiny("llama"), Edit(site, layer, fn))


def in_place(x):
    x[:, -1] = 0
    return x


SAME = lambda x, _=None: x  # noqa: E731
CANNOT_BE_MADE = [
    (lambda: one(site="resid_mid")(SAME), "unknown site 'resid_mid': choose from resid_pre"),
    (lambda: one(layers=3)(SAME), "layer 3 is out of range: .* has layers 0 to 2"),
    (lambda: one(layers=-1)(SAME), "layer -1 is out of range"),
    (lambda: one(layers=[])(SAME), "layers: none given"),
    (lambda: one(positions="first")(SAME), "unknown positions 'first'"),
    (lambda: one()("halve"), "fn must be a function of x"),
    (lambda: low(SAME, "resid_mid"), "unknown site 'resid_mid'"),
    (lambda: low(SAME, layer=3), "layers 0 to 2"),
    (lambda: editing(load_tiny("llama"), [MaskEdit(-1, SAME)]), "layers 0 to 2"),
]


@pytest.mark.parametrize(("make", "says"), CANNOT_BE_MADE)
def test_an_edit_that_cannot_be_made_gets_one_line(make, says):
    with pytest.raises(InputError, match=says), make():
        pass


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda: one()(lambda x: None), "at resid_post, layer 1, returns nothing: is a return missing"),
        (lambda: one()(in_place), "at resid_post, layer 1, changes its input in place"),
        (lambda: one(site="head_z")(lambda x: x.flatten(-2)), r"at head_z, layer 1, returns .*\[3, \d+, 4, 8\]"),
        (lambda: one()(lambda x: x.double()), "torch.float64: give a tensor .* of torch.float32"),
        (lambda: one()(lambda x: 3), "returns a int"),
        (lambda: one()(lambda x: x / 0), "at resid_post, layer 1, makes numbers that are NaN or infinite"),
        (
            lambda: one()(lambda x: x + torch.ones(7)),
            r"at resid_post, layer 1, fails on x \[3, \d+, 32\]: RuntimeError",
        ),
        (lambda: one(positions=-99)(SAME), "position -99 is out of range"),
        (lambda: low(lambda x, _: None), "the edit at resid_post, layer 1 returns nothing"),
        (lambda: low(lambda x, _: in_place(x)), "changes its input in place"),
        (lambda: low(lambda x, _: x[..., 1:]), "returns a tensor"),
    ],
)
def test_a_function_that_gives_no_new_value_is_told_with_site_and_layer(edit, says):
    model = load_tiny("llama")
    before = hooks(model)
    for run in (lambda: rim.capture(model, TEXTS, "resid_post"), lambda: rim.generate(model, TEXTS, max_new_tokens=2)):
        with pytest.raises(InputError, match=says) as told, edit():
            run()
        assert "\n" not in str(told.value)
    assert hooks(model) == before


def test_memory_that_runs_out_in_a_function_halves_the_batch():
    model, sizes = load_tiny("llama"), []

    def greedy_function(x):
        sizes.append(len(x))
        if len(x) > 1:
            raise torch.OutOfMemoryError("no room")
        return 2 * x

    with rim.edit(model, greedy_function, layers=0):
        found = rim.capture(model, TEXTS, "resid_post")["resid_post"]
    with rim.edit(model, lambda x: 2 * x, layers=0):
        assert_close(found, rim.capture(model, TEXTS, "resid_post")["resid_post"])
    assert (sizes[0], sizes.count(1)) == (3, 3)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "qwen3_moe"])
def test_a_function_of_one_s_own_holds_in_every_tool(family):
    """With heads in an axis of their own, told its positions, in capture, generation, patching and inside others."""
    model = load_tiny(family)
    texts = rim.format_chat(model, TEXTS, system="You answer in a few plain words and stay on the topic.")
    shift = some(model.n_heads, model.head_dim)

    def by_hand(z):
        return (z.unflatten(-1, (model.n_heads, model.head_dim)) + shift).flatten(-2)

    metric = rim.Projection(some(model.d_model))
    for positions in ("all", "last", "answer", [-2, -1]):
        with editing(model, edit_at(positions, "head_z", 1, by_hand)):
            wanted = (
                rim.capture(model, texts, "resid_post")["resid_post"],
                rim.generate(model, texts, max_new_tokens=STEPS),
            )
            patched = rim.patch(model, texts, texts[::-1], "mlp", metric).effects
        with rim.edit(model, lambda z: z + shift, layers=1, site="head_z", positions=positions):
            assert_close(rim.capture(model, texts, "resid_post")["resid_post"], wanted[0])
            assert rim.generate(model, texts, max_new_tokens=STEPS) == wanted[1]
            assert_close(rim.patch(model, texts, texts[::-1], "mlp", metric).effects, patched)
    told = []

    def last_only(x, positions):
        told.append(positions)
        return torch.where((positions == -1)[..., None], 2 * x, x)

    with rim.edit(model, last_only, layers=[0, 2]), rim.edit(model, lambda x, by=2.0: x / by, layers=2, positions=-1):
        nested = rim.capture(model, texts, "resid_post")["resid_post"]
    with rim.edit(model, lambda x: 2 * x, layers=0, positions="last"):
        assert_close(nested, rim.capture(model, texts, "resid_post")["resid_post"])
    assert all((row[..., -1] == -1).all() for row in told)
    assert model.edits == []


def test_masks_need_an_attention_that_takes_them(monkeypatch):
    model = load_tiny("llama")
    monkeypatch.setattr(model.hf.config, "_attn_implementation_internal", "flash_attention_2")
    with pytest.raises(InputError, match="flash_attention_2"), editing(model, [MaskEdit(0, lambda m, _: m)]):
        pass


@pytest.mark.parametrize(
    "edit",
    [
        lambda model: rim.steer(model, torch.ones(model.d_model), [0], positions=-99),
        lambda model: rim.ablate(model, [(0, 0)], mode="zero", positions=[-1, -99]),
        lambda model: rim.knock_out(model, -1, -99),
    ],
)
def test_a_position_that_a_text_does_not_have_is_refused(adapted, edit):
    model, _ = adapted
    with edit(model), pytest.raises(InputError, match=r"position -99 is out of range: the shortest text"):
        rim.capture(model, TEXTS, "resid_post")
