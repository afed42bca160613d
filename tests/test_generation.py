"""Generation against plain Hugging Face passes of one prompt: rows that enter and leave, arms, stops, memory."""

import contextlib
import json

import pytest
import torch
from families import load_tiny
from plain import hooks, some, write_lora
from tiny import TEXTS, write_model

import rim_core as rim
from rim_core.behaviour import generation
from rim_core.errors import InputError
from rim_core.models import small_passes
from rim_core.models.decoding import groups
from rim_core.models.hooks import Edit, MaskEdit, editing

# Absolute positions; a window shorter than the padding, and soft caps; experts; packed weights.
KINDS = [("llama", None), ("gpt2", None), ("gemma2", None), ("qwen3_moe", None), ("llama", "nf4")]
every_kind = pytest.mark.parametrize(("family", "quantization"), KINDS)
SYSTEM = "You answer in a few plain words and stay on the topic."


@pytest.fixture(autouse=True)
def small_modules_count(monkeypatch):
    """The tiny models' weights are laid out too."""
    monkeypatch.setattr(small_passes, "_SMALL", 0)


def chat(model, n=12, system=None):
    """Prompts of many lengths."""
    texts = [TEXTS[number % 3] * (1 + number % 4) + " Why?" * number for number in range(n)]
    return rim.format_chat(model, texts, system=system)


def varied(model):
    """A context in which a tiny model says something else at every step, where it would echo one token."""
    turn = torch.linalg.qr(some(model.d_model, model.d_model)).Q
    return editing(model, Edit("resid_post", model.n_layers - 1, lambda values: values @ turn))


def first_tokens(model, text, n):
    """The first greedy tokens."""
    ids = model.tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        for _ in range(n):
            ids = torch.cat([ids, model.hf(ids, use_cache=False).logits[0, -1].argmax().view(1, 1)], dim=1)
    return ids[0, -n:].tolist()


def alone(model, texts, n, make):
    """Each text's answer by Hugging Face's loop, alone in its batch, under the contexts that `make()` gives."""
    checks = dict(model.checks)
    model.checks["decoding"] = rim.checks.Check("decoding", float("inf"), 1e-3)
    try:
        with entered(make()):
            return [rim.generate(model, [text], max_new_tokens=n)[0] for text in texts]
    finally:
        model.checks.update(checks)


@contextlib.contextmanager
def entered(made):
    with contextlib.ExitStack() as stack:
        for one in [] if made is None else made if isinstance(made, list) else [made]:
            stack.enter_context(one)
        yield


@contextlib.contextmanager
def passes(model):
    """Within the context the shapes `[row, slot]` of the passes of the model's body."""
    shapes = []

    def note(module, args, kwargs):
        shapes.append(tuple(kwargs["input_ids"].shape))

    handle = model.layout.body.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield shapes
    finally:
        handle.remove()


def plain_answer(model, text, n):
    """Greedy decoding by whole forward passes: one prompt, no padding, no cache. Tokens up to the end of the turn."""
    ids = model.tokenizer(text, return_tensors="pt").input_ids
    start = ids.shape[1]
    with torch.no_grad():
        for _ in range(n):
            best = model.hf(ids, use_cache=False).logits[0, -1].argmax()
            if best == model.tokenizer.eos_token_id:
                break
            ids = torch.cat([ids, best.view(1, 1)], dim=1)
    return model.tokenizer.decode(ids[0, start:], skip_special_tokens=True)


# Absolute positions; a window shorter than the padding; experts.
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "qwen3_moe"])
def test_batched_answers_are_the_plain_greedy_ones(family):
    model = load_tiny(family)
    texts = rim.format_chat(model, TEXTS)
    together = rim.generate(model, texts, max_new_tokens=6)
    assert together == [plain_answer(model, text, 6) for text in texts]
    assert rim.generate(model, texts, max_new_tokens=6, max_batch=1) == together


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_an_intervention_holds_at_every_step(family):
    model = load_tiny(family)
    texts = rim.format_chat(model, TEXTS)
    torch.manual_seed(0)
    push, seen = 2 * torch.randn(model.d_model), []

    def hook(module, args, output):
        seen.append(output.shape)
        return output + push

    plain = rim.generate(model, texts, max_new_tokens=6)
    handle = model.layout.layers[1].register_forward_hook(hook)
    try:
        pushed = rim.generate(model, texts, max_new_tokens=6)
        assert [shape[1] for shape in seen[1:]] == [1] * (len(seen) - 1)  # the cache is in use
        assert pushed == [plain_answer(model, text, 6) for text in texts]
    finally:
        handle.remove()
    assert pushed != plain
    first_only = model.layout.layers[1].register_forward_hook(
        lambda module, args, output: output + push if output.shape[1] > 1 else output
    )
    try:
        assert rim.generate(model, texts, max_new_tokens=6) != pushed  # so the test can tell
    finally:
        first_only.remove()


def test_generation_settings_of_a_checkpoint_do_not_count(tmp_path):
    folder = write_model(tmp_path / "model")
    settings = json.loads((folder / "generation_config.json").read_text())
    settings |= {"repetition_penalty": 5.0, "no_repeat_ngram_size": 1, "do_sample": True, "num_beams": 2}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    model = rim.load(str(folder), quantization=None, device="cpu")
    texts = rim.format_chat(model, TEXTS)
    # "e" again and again would not survive the settings.
    push = 50 * model.layout.lm_head.weight[model.tokenizer("e").input_ids[0]]
    handle = model.layout.layers[-1].register_forward_hook(lambda module, args, output: output + push)
    try:
        answers = rim.generate(model, texts, max_new_tokens=6)
        assert answers == [plain_answer(model, text, 6) for text in texts]
        assert any(len(set(answer)) < len(answer) for answer in answers)
    finally:
        handle.remove()


def test_generation_ends_with_the_turn(tmp_path, tiny_folder):
    text = rim.format_chat(rim.load(str(tiny_folder()), quantization=None, device="cpu"), TEXTS[:1])
    folder = write_model(tmp_path / "model")
    model = rim.load(str(folder), quantization=None, device="cpu")
    ids = model.tokenizer(text[0], return_tensors="pt").input_ids
    new = model.hf.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=2)[0, ids.shape[1] :]
    assert len(new) == 12
    end = int(new[3])
    before = list(new.tolist()).index(end)
    # The checkpoint names an end of its own; the tokenizer's must still count beside it.
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [end]}))
    model = rim.load(str(folder), quantization=None, device="cpu")
    steps = []
    handle = model.layout.body.register_forward_hook(lambda *_: steps.append(1))
    answer = rim.generate(model, text, max_new_tokens=12)[0]
    handle.remove()
    assert len(steps) == before + 1
    assert answer.startswith(model.tokenizer.decode(new[:before]))
    assert set(generation._end_tokens(model)) == {end, 2}


@every_kind
@pytest.mark.parametrize("system", [None, SYSTEM])
def test_rows_that_leave_early_make_place_and_change_no_answer(family, quantization, system, monkeypatch):
    """With a beginning that is run once and without, answers of many lengths, and places for four at a time."""
    model = load_tiny(family, quantization)
    texts = chat(model, system=system)
    with varied(model):
        # Tokens that come late in some answers and never early, so that answers end at different steps.
        rows = [first_tokens(model, text, 12) for text in texts]
        ends = sorted({token for row in rows for token in row[3:9]} - {token for row in rows for token in row[:3]})[::2]
        monkeypatch.setattr(model.hf.generation_config, "eos_token_id", ends)
        lengths = [next((at + 1 for at, one in enumerate(row) if one in ends), 12) for row in rows]
        assert len(set(lengths)) > 1
        # An end that is no special token is part of the text, as in Hugging Face's.
        cut = [row[:length] for row, length in zip(rows, lengths, strict=True)]
        wanted = model.tokenizer.batch_decode(cut, skip_special_tokens=True)
        with passes(model) as shapes:
            assert rim.generate(model, texts, max_new_tokens=12, max_batch=4) == wanted
        assert rim.generate(model, texts, max_new_tokens=12) == wanted
    steps = [rows for rows, slots in shapes if slots == 1]
    assert max(steps) == 4
    assert sum(steps) < 11 * len(texts)  # rows were not computed to the last


def test_what_is_computed(monkeypatch):
    """The beginning once, each prompt's own tokens, and a token a row and step: no padding where lengths are equal."""
    model = load_tiny("llama")
    texts = rim.format_chat(model, ["Why blue?", "Why bake?", "How blue?"], system=SYSTEM)
    ids = model.tokenizer(texts).input_ids
    (length,) = {len(row) for row in ids}
    shared = next(at for at in range(length) if len({row[at] for row in ids}) > 1)
    monkeypatch.setattr(generation, "_end_tokens", lambda model: [])
    with passes(model) as shapes:
        rim.generate(model, texts, max_new_tokens=4)
    assert shapes == [(1, shared), (3, length - shared), (3, 1), (3, 1), (3, 1)]
    with rim.steer(model, some(model.d_model), 1, positions="answer"), passes(model) as shapes:
        rim.generate(model, texts, max_new_tokens=1)
    assert shapes == [(1, shared), (3, length - shared)]
    # A function that may look at any position needs each prompt whole.
    with rim.edit(model, lambda x, positions: 1.0 * x, layers=0), passes(model) as shapes:
        rim.generate(model, texts, max_new_tokens=1)
    assert shapes == [(3, length)]


@pytest.mark.parametrize("lengths", [[5], [9, 3, 9, 8], list(range(1, 60))])
def test_prompts_enter_in_groups_with_little_padding(lengths):
    found = groups(lengths, 200)
    assert sorted(number for group in found for number in group) == list(range(len(lengths)))
    for group in found:
        width = lengths[group[0]]
        assert width == max(lengths[number] for number in group)
        assert width * len(group) <= max(200, width)
        assert width * len(group) - sum(lengths[number] for number in group) <= max(32, width * len(group) / 16)


def interventions(model, texts):
    """Contexts of every kind, each made anew a call."""
    reference = rim.capture(model, texts, "head_z", positions="all")
    push = some(model.d_model)
    heads = {(layer, head): None for layer in range(model.n_layers) for head in range(model.n_heads)}
    first, second = list(heads)[1::3], list(heads)[::4]

    def by_position(x, positions):
        return x * (1 + 0.5 * (positions % 2)[..., None])

    return [
        lambda: None,
        lambda: rim.ablate(model, heads=first, mode="zero"),
        lambda: rim.ablate(model, heads=second, mode="mean", reference=reference),
        lambda: rim.ablate(model, heads=first, mode="scale", factor=3.0, positions="answer", keep_norm=True),
        lambda: rim.ablate(model, direction=push),
        lambda: rim.steer(model, push, 1, coefficient=2.0, positions="answer"),
        lambda: rim.steer(model, push, [0, 2], coefficient=0.5),
        lambda: rim.knock_out(model, queries="answer", keys=[-2, -3], heads=second),
        lambda: rim.knock_out(model, queries="last", keys=-2, layers=[0, 1]),
        lambda: rim.edit(model, by_position, layers=1),
        lambda: [rim.steer(model, push, 1), rim.ablate(model, heads=second, mode="zero")],
    ]


@every_kind
def test_each_arm_answers_as_it_does_alone(family, quantization):
    """In batches that mix arms."""
    model = load_tiny(family, quantization)
    texts = chat(model, 5, system=SYSTEM)
    before = hooks(model)
    with varied(model):
        kinds = interventions(model, texts)
        wanted = [alone(model, texts, 6, make) for make in kinds]
        assert len({tuple(answers) for answers in wanted}) > len(kinds) - 3  # the arms differ
        found = rim.generate(model, texts, max_new_tokens=6, arms=[make() for make in kinds])
        assert found == wanted
        assert rim.generate(model, texts, max_new_tokens=6, arms=[make() for make in kinds], max_batch=7) == wanted
    assert hooks(model) == before
    assert model.frame is None
    assert model.edits == []


def test_arms_that_leave_the_beginning_alone_share_it_and_others_have_their_own():
    model = load_tiny("llama")
    texts = chat(model, 3, system=SYSTEM)
    push = some(model.d_model)
    late = [None, rim.steer(model, push, 1, positions="last"), rim.knock_out(model, "answer", [-2])]
    with passes(model) as shapes:
        rim.generate(model, texts, max_new_tokens=1, arms=late)
    assert shapes[0][0] == 1
    with passes(model) as shapes:
        rim.generate(model, texts, max_new_tokens=1, arms=[None, rim.steer(model, push, 1)])
    assert shapes[0][0] == 2


def test_arms_come_after_the_edits_now_active_and_hold_under_an_adapter(tmp_path):
    model = load_tiny("llama")
    adapter_folder = write_lora(model.name, ["q_proj", "down_proj"], tmp_path / "adapter")
    texts = chat(model, 3)
    push = some(model.d_model)
    with model.using(adapter_folder), rim.steer(model, push, 0, coefficient=2.0):
        with rim.ablate(model, direction=push):
            wanted = [plain_answer(model, text, 5) for text in texts]
        base = [plain_answer(model, text, 5) for text in texts]
        found = rim.generate(model, texts, max_new_tokens=5, arms=[None, rim.ablate(model, direction=push)])
    assert found == [base, wanted]
    assert base != wanted


def test_a_mask_of_one_s_own_is_its_arm_s_alone():
    """One that gives no head axis beside one that does."""
    model = load_tiny("llama")
    texts = chat(model, 4)

    def blind(mask, frame):
        return mask.masked_fill((frame.keys == -2)[:, None, None, :], torch.finfo(mask.dtype).min)

    kinds = [
        lambda: editing(model, [MaskEdit(layer, blind) for layer in range(3)]),
        lambda: rim.knock_out(model, "answer", [-3], heads=[(0, 1), (1, 2)]),
        lambda: None,
    ]
    wanted = [alone(model, texts, 5, make) for make in kinds]
    assert rim.generate(model, texts, max_new_tokens=5, arms=[make() for make in kinds]) == wanted


@pytest.mark.parametrize("arms", [None, 2])
def test_a_stop_string_ends_its_own_row_alone(arms):
    model = load_tiny("llama")
    texts = chat(model)
    wanted = [plain_answer(model, text, 12) for text in texts]
    letter = max(set("".join(wanted)), key=lambda one: sum(one in answer for answer in wanted[::2]))
    stops = [letter, wanted[1][-4:], "no such words"]
    cut = []
    for answer in wanted:
        ends = [answer.index(one) + len(one) for one in stops if one in answer]
        cut.append(answer[: min(ends)] if ends else answer)
    assert cut != wanted
    with passes(model) as shapes:
        found = rim.generate(model, texts, max_new_tokens=12, stop=stops, arms=arms and [None] * arms, max_batch=5)
    assert found == (cut if arms is None else [cut] * arms)
    assert sum(rows for rows, slots in shapes if slots == 1) < 11 * len(texts) * (arms or 1)
    assert rim.generate(model, texts[:1], max_new_tokens=12, stop=letter) == [
        wanted[0][: wanted[0].index(letter) + 1] if letter in wanted[0] else wanted[0]
    ]


@contextlib.contextmanager
def small_memory(model, fails):
    """Within the context a pass of the body fails for want of memory where `fails(rows, slots)`."""

    def fail(module, args, kwargs):
        if fails(*kwargs["input_ids"].shape):
            raise torch.OutOfMemoryError("out of memory")

    handle = model.layout.body.register_forward_pre_hook(fail, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def test_what_does_not_fit_is_halved_and_goes_on_where_it_was():
    model = load_tiny("llama")
    texts = chat(model, system=SYSTEM)
    wanted = rim.generate(model, texts, max_new_tokens=6)
    with small_memory(model, lambda rows, slots: rows > 3), passes(model) as shapes:
        assert rim.generate(model, texts, max_new_tokens=6) == wanted
    assert 3 in [rows for rows, slots in shapes if slots == 1]
    # In the midst of decoding: what was said is kept, and read again with the prompt.
    left = [3]

    def once(rows, slots):
        left[0] -= slots == 1
        return left[0] == 0 and slots == 1

    with small_memory(model, once), rim.steer(model, some(model.d_model), 1, positions="answer"):
        found = rim.generate(model, texts, max_new_tokens=6)
    assert left[0] < 0
    with rim.steer(model, some(model.d_model), 1, positions="answer"):
        assert found == rim.generate(model, texts, max_new_tokens=6)
    with (
        small_memory(model, lambda rows, slots: True),
        pytest.raises(InputError, match="does not fit in memory") as caught,
    ):
        rim.generate(model, texts, max_new_tokens=4)
    assert "\n" not in str(caught.value)
    assert model.frame is None


def test_batches_keep_to_every_limit(monkeypatch):
    model = load_tiny("llama")
    texts = chat(model)
    lengths = [len(row) for row in model.tokenizer(texts).input_ids]
    wanted = rim.generate(model, texts, max_new_tokens=5)
    for limits, holds in (
        ({"max_batch": 3}, lambda rows, slots: rows <= 3),
        ({"max_tokens": 2 * max(lengths)}, lambda rows, slots: slots == 1 or rows * slots <= 2 * max(lengths)),
    ):
        with passes(model) as shapes:
            assert rim.generate(model, texts, max_new_tokens=5, **limits) == wanted
        assert all(holds(*shape) for shape in shapes)
        assert max(rows for rows, _ in shapes) > 1
    # Places for two of the longest; once those are done, for as many of the shorter as the same memory holds.
    texts = rim.format_chat(model, [TEXTS[1] * 4] * 3 + ["Why?" * n for n in range(1, 9)])
    lengths = [len(row) for row in model.tokenizer(texts).input_ids]
    wanted = rim.generate(model, texts, max_new_tokens=5)
    monkeypatch.setattr(generation, "_cache_tokens", lambda model: 2 * (max(lengths) + 5))
    with passes(model) as shapes:
        assert rim.generate(model, texts, max_new_tokens=5) == wanted
    steps = [rows for rows, slots in shapes if slots == 1]
    assert steps[0] == 2
    assert max(steps) > 2


@pytest.mark.parametrize("stop", [(), ("e", "a")])
def test_a_model_whose_cache_is_not_understood_answers_by_hugging_faces_loop(stop, monkeypatch):
    """It says so in its checks; answers, arms and stops are the same."""
    model = load_tiny("llama")
    texts = chat(model, 4, system=SYSTEM)
    heads = [(0, 1), (2, 3)]

    def run():
        arms = [None, rim.ablate(model, heads=heads, mode="zero")]
        return rim.generate(model, texts, max_new_tokens=6, arms=arms, stop=stop)

    wanted, calls, real = run(), [], model.hf.generate
    failed = rim.checks.Check("decoding", float("inf"), 1e-3, "ValueError: no such state")
    monkeypatch.setitem(model.checks, "decoding", failed)
    monkeypatch.setattr(model.hf, "generate", lambda **inputs: calls.append(1) or real(**inputs))
    assert run() == wanted
    assert len(calls) == 2
    assert "decoding inf fails" in repr(model.checks)


def test_settings_that_change_which_token_is_greedy_are_hugging_faces_own(monkeypatch):
    model = load_tiny("llama")
    texts = chat(model, 3)
    first = first_tokens(model, texts[0], 1)
    monkeypatch.setattr(model.hf.generation_config, "suppress_tokens", first)
    answers = rim.generate(model, texts, max_new_tokens=6)
    assert answers[0] != plain_answer(model, texts[0], 6)
    ids = model.tokenizer(texts[0], return_tensors="pt").input_ids
    out = model.hf.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=2)
    assert answers[0] == model.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def test_nothing_is_left_behind_where_a_run_is_broken_off():
    model = load_tiny("llama")
    texts = chat(model, 3)
    wanted, before = rim.generate(model, texts, max_new_tokens=4), hooks(model)
    attention = model.hf.config._attn_implementation

    def stop(x):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rim.generate(model, texts, max_new_tokens=4, arms=[None, rim.edit(model, stop, layers=1, positions="last")])
    assert (hooks(model), model.frame, model.edits) == (before, None, [])
    assert model.hf.config._attn_implementation == attention == "sdpa"
    assert not any("forward" in vars(module) for module in model.hf.modules())
    assert rim.generate(model, texts, max_new_tokens=4) == wanted


def test_arms_and_stops_that_cannot_be_are_told_in_one_line(tmp_path):
    model = load_tiny("llama")
    adapter_folder = write_lora(model.name, ["q_proj"], tmp_path / "adapter")
    texts = chat(model, 2)
    used = rim.steer(model, some(model.d_model), 1)
    rim.generate(model, texts, max_new_tokens=1, arms=[used])
    for options, words in [
        ({"arms": []}, "arms is empty"),
        ({"arms": used}, "arms must be a list"),
        ({"arms": [used]}, "arm 0 was used before: make its intervention anew"),
        ({"arms": [None, 3]}, "arm 1 must be a list|arm 1 is 3"),
        ({"arms": [None, [rim.steer]]}, "arm 1 is <function steer"),
        ({"arms": [model.using(adapter_folder)]}, "arm 0 switches the adapter"),
        ({"arms": [contextlib.nullcontext()]}, "arm 0 makes no edit"),
        ({"arms": [rim.steer(model, some(model.d_model), 9)]}, "layer 9 is out of range"),
        ({"arms": [rim.steer(model, some(model.d_model), 1, positions=-500)]}, "position -500 is out of range"),
        ({"stop": ["a", ""]}, "stop holds ''"),
        ({"stop": 3}, "stop must be a list"),
        ({"max_tokens": 0}, "max_tokens must be a whole number of at least 1"),
    ]:
        with pytest.raises(InputError, match=words) as caught:
            rim.generate(model, texts, max_new_tokens=2, **options)
        assert "\n" not in str(caught.value)
    assert model.edits == []


def test_generation_under_an_adapter_differs_and_comes_back(default_model):
    texts = rim.format_chat(default_model, rim.load_prompts("harmful", split="test", limit=2))
    first = rim.generate(default_model, texts, max_new_tokens=4)
    with default_model.using("base"):
        assert rim.generate(default_model, texts, max_new_tokens=4) != first
    assert rim.generate(default_model, texts, max_new_tokens=4) == first


def test_progress_is_told_by_tokens(monkeypatch):
    """Those that are saved by an early end count as done, and tokens said before memory ran out once."""
    model = load_tiny("llama")
    texts = chat(model, 5)
    bars = []

    class Bar:
        def __init__(self, total, unit, **_):
            self.total, self.unit, self.done = total, unit, 0
            bars.append(self)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def update(self, n):
            assert n >= 0
            self.done += n

    monkeypatch.setattr(generation, "tqdm", Bar)
    rim.generate(model, texts, max_new_tokens=7, stop=["e", "a"])
    with small_memory(model, lambda rows, slots: rows > 2):
        rim.generate(model, texts, max_new_tokens=7, arms=[None, rim.steer(model, some(model.d_model), 1)])
    assert [(bar.done, bar.total, bar.unit) for bar in bars] == [(35, 35, "token"), (70, 70, "token")]


@pytest.mark.parametrize(("n", "new", "held"), [(2, 5, False), (2, 6, True), (7, 1, False), (12, 1, True)])
def test_weights_are_laid_out_where_passes_are_many(n, new, held, monkeypatch):
    model, calls = load_tiny("llama"), []
    monkeypatch.setattr(generation, "laid_out", lambda hf: calls.append(1) or contextlib.nullcontext())
    rim.generate(model, chat(model, n), max_new_tokens=new, max_batch=2)
    assert bool(calls) == held


def test_int8_answers_one_prompt_as_hugging_faces_loop_does():
    """Alone: its rounding depends on what else is in the batch."""
    model = load_tiny("llama", "int8")
    texts = chat(model, 3, system=SYSTEM)
    answers = [rim.generate(model, [text], max_new_tokens=6)[0] for text in texts]
    assert answers == alone(model, texts, 6, lambda: None)
