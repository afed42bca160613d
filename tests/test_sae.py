"""Sparse autoencoders: against planted dictionaries, NumPy, closed forms, and hooks written here."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from plain import hooks
from safetensors import SafetensorError
from safetensors.torch import save_file
from tiny import TEXTS

import rim_core as rim
from rim_core.errors import InputError
from rim_core.models.padding import pad_left
from rim_core.sae.autoencoder import SparseAutoencoder
from rim_core.texts import encode

D = 24
FAST = {"n_latents": 96, "steps": 500, "batch": 128, "lr": 8e-3, "progress": False}


def random_sae(d=32, m=80, seed=0, **options):
    draw = np.random.default_rng(seed).standard_normal
    tensors = (draw((d, m)) / 4, draw(m) / 4, draw((m, d)) / 4, draw(d))
    return SparseAutoencoder(*(torch.tensor(t, dtype=torch.float32) for t in tensors), **options)


def identity_sae(d, shrink=1.0, centre=0.0):
    """Reconstructs `centre + shrink * (x - centre)` exactly, with a latent for each sign of each coordinate."""
    eye = torch.eye(d)
    both = torch.cat([eye, -eye])
    return SparseAutoencoder(both.T, torch.zeros(2 * d), shrink * both, torch.zeros(d) + centre)


@pytest.fixture(scope="module")
def planted():
    """3,000 sums of 3 of 48 unit atoms, off centre and with noise: (activations, atoms, coefficients)."""
    rng = np.random.default_rng(0)
    atoms = rng.standard_normal((48, D))
    atoms /= np.linalg.norm(atoms, axis=1, keepdims=True)
    coefficients = np.zeros((3000, 48))
    for row in coefficients:
        row[rng.choice(48, 3, replace=False)] = rng.uniform(0.5, 1.5, 3)
    x = 7 * (coefficients @ atoms + 0.02 * rng.standard_normal((3000, D)) + 2 * rng.standard_normal(D))
    return torch.tensor(x).float(), torch.tensor(atoms).float(), coefficients


@pytest.fixture(scope="module")
def trained(planted):
    x = planted[0][:2500]
    return {"relu": rim.train_sae(x, l1=0.2, **FAST), "topk": rim.train_sae(x, kind="topk", k=3, **FAST)}


# Measured over seeds 0 to 2: 0.96 to 1.00; a random dictionary of 96 rows reaches 0.9 for no atom.
@pytest.mark.parametrize("kind", ["relu", "topk"])
def test_a_planted_dictionary_is_found(planted, trained, kind):
    x, atoms, _ = planted
    sae = trained[kind]
    assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(96), atol=1e-5)
    best = (sae.W_dec @ atoms.T).amax(0)
    assert (best > 0.9).float().mean() >= 0.9
    chance = (rim.random_features(sae, x).W_dec @ atoms.T).amax(0)
    assert (chance > 0.9).float().mean() < 0.1
    assert rim.evaluate_sae(sae, x[2500:]).variance_explained.low > 0.85


def test_top_k_has_exactly_k_active_latents(planted, trained):
    active = (trained["topk"].encode(planted[0]) > 0).sum(1)
    assert (active == 3).float().mean() > 0.99
    assert active.max() == 3


def test_latents_follow_their_atoms_in_the_activations_own_unit(planted, trained):
    """Scaling is folded in: an atom's latent is about 7 times its coefficient, and not a normalised number."""
    x, atoms, coefficients = planted
    sae = trained["topk"]
    latents = sae.encode(x)[:, (sae.W_dec @ atoms.T).argmax(0)].numpy()
    ratios = [np.median(latents[on, i] / (7 * coefficients[on, i])) for i, on in enumerate(coefficients.T > 0)]
    assert np.median(ratios) == pytest.approx(0.9, abs=0.1)  # 3 atoms overlap in 24 dimensions: some is lost


def test_one_seed_gives_one_autoencoder_and_the_unit_of_the_activations_does_not_matter(planted):
    x = planted[0][:500]
    options = {"n_latents": 30, "steps": 40, "batch": 64, "progress": False}
    one, again, other = (rim.train_sae(x, seed=seed, **options) for seed in (3, 3, 4))
    for name, tensor in one.tensors().items():
        assert torch.equal(tensor, again.tensors()[name])
        assert not torch.equal(tensor, other.tensors()[name])
    scaled = rim.train_sae(4 * x, seed=3, **options)
    assert torch.equal(scaled.W_enc, one.W_enc)
    assert torch.equal(scaled.b_enc, 4 * one.b_enc)
    assert torch.equal(scaled(4 * x), 4 * one(x))


def test_training_leaves_the_global_generator_and_the_activations_alone(planted):
    x = planted[0][:200].clone()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    rim.train_sae(x, n_latents=8, steps=5, progress=False)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(x, planted[0][:200])


def test_resampling_revives_dead_latents():
    """40 tight clusters and one latent each: whatever starts far from all clusters never wins without it."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((40, D))
    x = torch.tensor(centres[rng.integers(40, size=1000)] + 0.01 * rng.standard_normal((1000, D))).float()
    options = {"n_latents": 40, "kind": "topk", "k": 1, "steps": 100, "batch": 128, "progress": False}
    without, with_it = (rim.evaluate_sae(rim.train_sae(x, resample=r, **options), x) for r in (0, 3))
    assert with_it.dead < without.dead
    assert with_it.variance_explained.low > without.variance_explained.high


# --- judging --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shrink", [0.0, 0.5, 1.0])
def test_variance_explained_and_l0_in_closed_form(shrink):
    x = torch.randn(300, 6, generator=torch.Generator().manual_seed(0)) * 3 + 5
    result = rim.evaluate_sae(identity_sae(6, shrink, x.mean(0)), x)
    assert result.variance_explained.estimate == pytest.approx(1 - (1 - shrink) ** 2, abs=1e-5)
    assert result.l0.estimate == 6
    assert result.dead == 0
    assert result.n == 300
    frame = result.to_frame().set_index("measure")
    assert frame.loc["dead_share", "estimate"] == 0


def test_a_wrong_mean_explains_less_than_nothing():
    x = torch.randn(200, 6, generator=torch.Generator().manual_seed(0))
    assert rim.evaluate_sae(identity_sae(6, 0.0, 2.0), x).variance_explained.high < 0


def test_dead_latents_and_frequencies_are_counted():
    sae = random_sae(8, 20)
    sae.b_enc[:5] = -1e4
    x = torch.randn(5000, 8, generator=torch.Generator().manual_seed(0))  # more rows than are encoded at once
    result = rim.evaluate_sae(sae, x)
    latents = ((x - sae.b_dec) @ sae.W_enc + sae.b_enc).relu()
    assert result.dead == int((latents == 0).all(0).sum()) >= 5
    assert np.allclose(result.frequency, (latents > 0).float().mean(0), atol=1e-3)
    assert result.l0.low < (latents > 0).sum(1).float().mean() < result.l0.high


def test_grouped_activations_have_wider_intervals():
    x = torch.randn(30, 8, generator=torch.Generator().manual_seed(0)).repeat_interleave(20, 0)
    free = rim.evaluate_sae(random_sae(8, 20), x).l0
    grouped = rim.evaluate_sae(random_sae(8, 20), x, groups=np.repeat(np.arange(30), 20)).l0
    assert grouped.high - grouped.low > 3 * (free.high - free.low)


@pytest.fixture(scope="module")
def learnt(tiny_folder):
    """A tiny model that has learnt its texts by heart, so that zeros in its stream cost something."""
    model = rim.load(str(tiny_folder("llama", seed=5)), quantization=None, device="cpu")
    optimizer = torch.optim.Adam(model.hf.requires_grad_(True).parameters(), lr=3e-3)
    inputs = pad_left(encode(model.tokenizer, TEXTS), model.tokenizer.pad_token_id)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    for _ in range(60):
        optimizer.zero_grad()
        model.hf(**inputs, labels=labels).loss.backward()
        optimizer.step()
    model.hf.requires_grad_(False)
    return model


def test_cross_entropy_recovered_has_its_end_points(learnt):
    whole = rim.cross_entropy_recovered(learnt, identity_sae(32), TEXTS, layer=1)
    assert whole.recovered.estimate == pytest.approx(1, abs=1e-5)
    nothing = rim.cross_entropy_recovered(learnt, identity_sae(32, 0.0), TEXTS, layer=1)
    assert nothing.recovered.estimate == pytest.approx(0, abs=1e-6)
    half = rim.cross_entropy_recovered(learnt, random_sae(32), TEXTS, layer=1)
    assert half.recovered.low <= half.recovered.estimate <= half.recovered.high
    losses, zeroed = [], []
    for text in TEXTS:
        ids = learnt.tokenizer(text, return_tensors="pt").input_ids
        with torch.no_grad():
            losses += [learnt.hf(ids, labels=ids).loss.item()] * (ids.shape[1] - 1)
            hook = learnt.hf.model.layers[1].register_forward_hook(lambda m, a, out: torch.zeros_like(out))
            zeroed += [learnt.hf(ids, labels=ids).loss.item()] * (ids.shape[1] - 1)
            hook.remove()
    assert whole.n_tokens == len(losses)
    assert whole.clean.estimate == pytest.approx(np.mean(losses), rel=1e-4)
    assert whole.zeroed.estimate == pytest.approx(np.mean(zeroed), rel=1e-4)


def test_nothing_to_recover_is_said(tiny_folder):
    model = rim.load(str(tiny_folder()), quantization=None, device="cpu")  # knows no text: zeros do no harm
    with pytest.raises(InputError, match="no worse with zeros"):
        rim.cross_entropy_recovered(model, identity_sae(32), TEXTS, layer=2)


def test_correlations_equal_numpy_and_find_the_planted_latent():
    sae, rng = random_sae(8, 60), np.random.default_rng(1)
    x = torch.tensor(rng.standard_normal((80, 8))).float()
    latents = sae.encode(x).numpy()
    target = latents[:, 17] + 0.1 * rng.standard_normal(80)
    found = rim.latent_correlations(sae, x, target, n_permutations=200)
    assert found.latent[0] == 17
    assert found.p_max[0] == pytest.approx(1 / 201)
    for latent, r in zip(found.latent, found.correlation, strict=True):
        assert r == pytest.approx(np.corrcoef(latents[:, latent], target)[0, 1], abs=1e-5)
    assert (np.diff(np.abs(found.correlation)) <= 0).all()
    assert (np.diff(found.p_max) >= 0).all()
    assert (found.q_value >= found.p_value).all()
    assert found.to_frame().shape == (len(found.latent), 9)
    text = found.plot(top=4).to_dict()["description"]
    assert "4 strongest" in text


def test_latents_that_never_vary_are_not_tested():
    sae = random_sae(8, 20)
    sae.b_enc[:5] = -1e4
    x = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    found = rim.latent_correlations(sae, x, np.arange(50) % 2, n_permutations=20)
    assert found.latent.min() >= 5
    assert np.isfinite(found.correlation).all()


@pytest.mark.parametrize("labels", ["normal", "binary"])
def test_the_best_of_many_latents_is_judged_against_the_best_by_chance(labels):
    """On noise the best of 200 latents passes at 5 % about 1 time in 20, where its own p-value nearly always does."""
    sae, rng = random_sae(8, 200), np.random.default_rng(2)
    x = torch.tensor(rng.standard_normal((60, 8))).float()
    by_chance, alone = 0, 0
    for repeat in range(200):
        target = rng.standard_normal(60) if labels == "normal" else rng.permutation(np.arange(60) % 2)
        found = rim.latent_correlations(sae, x, target, n_permutations=99, seed=repeat)
        by_chance += found.p_max[0] <= 0.05
        alone += found.p_value[0] <= 0.05
    assert 2 <= by_chance <= 20  # binomial(200, 0.05): outside with probability below 0.002
    assert alone > 100


def test_what_differs_between_groups_does_not_pass_for_the_target():
    sae, rng = identity_sae(4), np.random.default_rng(0)
    topic = np.repeat([0, 1], 40)
    x = rng.standard_normal((80, 4))
    x[:, 0] += 4 * topic
    target = topic + (rng.random(80) < 0.5)
    free = rim.latent_correlations(sae, torch.tensor(x), target, n_permutations=300)
    within = rim.latent_correlations(sae, torch.tensor(x), target, groups=topic, n_permutations=300)
    assert free.p_max[0] < 0.01
    assert within.p_max[0] > 0.05
    constant = rim.latent_correlations(sae, torch.tensor(x), topic, groups=topic, n_permutations=20)
    assert (constant.p_max[0], constant.null_max.min()) == (1, pytest.approx(abs(constant.correlation[0])))


def test_random_features_fire_as_often_as_the_latents_they_replace(planted, trained):
    x = planted[0][:3000]
    for sae in trained.values():
        control = rim.random_features(sae, x, seed=1)
        wanted, found = (rim.evaluate_sae(s, x).frequency for s in (sae, control))
        assert np.abs(wanted - found).max() <= 1 / 3000 + 1e-9
        assert torch.allclose(control.W_dec.norm(dim=1), torch.ones(96), atol=1e-5)
    assert torch.equal(control.W_dec, rim.random_features(sae, x, seed=1).W_dec)
    assert not torch.equal(control.W_dec, rim.random_features(sae, x, seed=2).W_dec)


# --- splicing -------------------------------------------------------------------------------------------------


def logits(model, text):
    with torch.no_grad():
        return model.hf(model.tokenizer(text, return_tensors="pt").input_ids).logits[0]


def close(found, wanted):
    return (found - wanted).abs().max() <= 1e-4 * wanted.abs().max()


LAYERS = {"llama": "model.layers", "gpt_neox": "gpt_neox.layers", "gpt2": "transformer.h"}


@pytest.mark.parametrize("family", LAYERS)
@pytest.mark.parametrize("error_term", [True, False])
def test_splicing_equals_a_hook_written_by_hand(tiny_folder, family, error_term):
    model = rim.load(str(tiny_folder(family)), quantization=None, device="cpu")
    sae, before = random_sae(model.d_model), hooks(model)

    def by_hand(module, args, output):
        x = output[0] if isinstance(output, tuple) else output
        latents = ((x - sae.b_dec) @ sae.W_enc + sae.b_enc).relu()
        error = x - (latents @ sae.W_dec + sae.b_dec)
        latents[..., 3], latents[..., 9] = 2.0, 0.0
        new = latents @ sae.W_dec + sae.b_dec + (error if error_term else 0)
        return (new, *output[1:]) if isinstance(output, tuple) else new

    for text in TEXTS:
        handle = model.hf.get_submodule(LAYERS[family])[1].register_forward_hook(by_hand)
        wanted = logits(model, text)
        handle.remove()
        with rim.splice(model, sae, layer=1, error_term=error_term, latents=[3, 9], value=[2.0, 0.0]):
            assert close(logits(model, text), wanted)
        assert not close(logits(model, text), wanted)
    assert hooks(model) == before
    assert model.edits == []


def test_with_the_error_term_and_no_latents_nothing_changes(tiny_folder):
    model = rim.load(str(tiny_folder()), device="cpu")  # 4-bit
    clean = logits(model, TEXTS[0])
    with rim.splice(model, random_sae(model.d_model), layer=1):
        assert close(logits(model, TEXTS[0]), clean)
    with rim.splice(model, identity_sae(model.d_model), layer=1, error_term=False):
        assert close(logits(model, TEXTS[0]), clean)
    with rim.splice(model, random_sae(model.d_model), layer=1, error_term=False):
        assert not close(logits(model, TEXTS[0]), clean)


def test_a_batch_equals_single_prompts_and_heads_are_taken_flat(tiny_folder):
    model = rim.load(str(tiny_folder("qwen3")), quantization=None, device="cpu")
    sae = random_sae(model.n_heads * model.head_dim)
    with rim.splice(model, sae, layer=0, site="head_z", error_term=False):
        together = rim.capture(model, TEXTS, ["head_z", "resid_post"])
        for row, text in enumerate(TEXTS):
            alone = rim.capture(model, [text], "resid_post")["resid_post"][0]
            assert close(together["resid_post"][row], alone)
    clean = rim.capture(model, TEXTS, "resid_post")["resid_post"]
    assert not close(together["resid_post"], clean)


def test_positions_limit_the_splice(tiny_folder):
    model = rim.load(str(tiny_folder()), quantization=None, device="cpu")
    sae, clean = random_sae(model.d_model), rim.capture(model, TEXTS, "resid_post", positions="all")
    with rim.splice(model, sae, layer=1, error_term=False, positions="last"):
        assert model.edits[-1].positional
        found = rim.capture(model, TEXTS, "resid_post", positions="all")
    stream, spliced = clean["resid_post"][:, :, 1], found["resid_post"][:, :, 1]
    assert close(spliced[:, :-1], stream[:, :-1])
    assert close(spliced[:, -1], sae(stream[:, -1]))


# --- files ----------------------------------------------------------------------------------------------------


def write_by_hand(folder, architecture, **config):
    """A folder as SAELens 6 writes it: the keys of its own `cfg.json`."""
    draw = np.random.default_rng(0).standard_normal
    weights = {"W_enc": draw((6, 15)), "b_enc": draw(15), "W_dec": draw((15, 6)), "b_dec": draw(6)}
    if architecture == "jumprelu":
        weights["threshold"] = np.abs(draw(15))
    cfg = {
        "d_in": 6,
        "d_sae": 15,
        "dtype": "float32",
        "device": "cuda",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"sae_lens_version": "6.54.12", "hook_name": "blocks.5.hook_resid_post"},
        "architecture": architecture,
        **config,
    }
    folder.mkdir()
    (folder / "cfg.json").write_text(json.dumps(cfg))
    save_file({k: torch.tensor(v, dtype=torch.float32) for k, v in weights.items()}, folder / "sae_weights.safetensors")
    return weights


@pytest.mark.parametrize(
    ("architecture", "config"),
    [
        ("standard", {}),
        ("standard", {"apply_b_dec_to_input": False}),
        ("topk", {"k": 4, "rescale_acts_by_decoder_norm": False}),
        ("topk", {"k": 4, "rescale_acts_by_decoder_norm": True}),
        ("jumprelu", {}),
    ],
)
def test_a_file_written_by_saelens_is_read_as_its_formulas_say(tmp_path, architecture, config):
    w = write_by_hand(tmp_path / "sae", architecture, **config)
    sae = rim.load_sae(tmp_path / "sae")
    x = np.random.default_rng(9).standard_normal((50, 6))
    raw = (x - w["b_dec"] * config.get("apply_b_dec_to_input", True)) @ w["W_enc"] + w["b_enc"]
    norms = np.linalg.norm(w["W_dec"], axis=1) if config.get("rescale_acts_by_decoder_norm") else np.ones(15)
    latents = np.maximum(raw * norms, 0)
    if architecture == "topk":
        latents[raw * norms < np.sort(raw * norms, axis=1)[:, [-4]]] = 0
    if architecture == "jumprelu":
        latents[raw <= w["threshold"]] = 0
    given = torch.tensor(x)
    assert np.allclose(sae.encode(given), latents, atol=1e-4)
    assert np.allclose(sae(given), (latents / norms) @ w["W_dec"] + w["b_dec"], atol=1e-4)
    assert sae.metadata["hook_name"] == "blocks.5.hook_resid_post"


@pytest.mark.parametrize("kind", ["relu", "topk", "jumprelu"])
def test_a_file_comes_back_bit_for_bit(tmp_path, kind):
    own = {"relu": {}, "topk": {"k": 5}, "jumprelu": {"threshold": torch.rand(80)}}[kind]
    sae = random_sae(kind=kind, metadata={"hook_name": "blocks.1.hook_resid_pre"}, **own)
    rim.save_sae(sae, tmp_path / "sae")
    back = rim.load_sae(tmp_path / "sae")
    assert (back.kind, back.k, back.metadata["hook_name"]) == (kind, sae.k, "blocks.1.hook_resid_pre")
    for name, tensor in sae.tensors().items():
        assert torch.equal(back.tensors()[name], tensor)
    assert [path.name for path in tmp_path.iterdir()] == ["sae"]
    rim.save_sae(back, tmp_path / "again")
    for name in ("cfg.json", "sae_weights.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "sae" / name).read_bytes()
    with pytest.raises(InputError, match="exists"):
        rim.save_sae(sae, tmp_path / "sae")


def test_what_was_trained_survives_a_file(tmp_path, planted, trained):
    rim.save_sae(trained["topk"], tmp_path / "sae")
    back = rim.load_sae(tmp_path / "sae")
    assert torch.equal(back(planted[0]), trained["topk"](planted[0]))
    assert back.metadata["training"]["k"] == 3


@pytest.mark.parametrize("error", [SafetensorError("no room"), OSError(28, "no room")])
def test_a_failed_save_leaves_nothing(tmp_path, monkeypatch, error):
    def full(*_):
        raise error

    monkeypatch.setattr("rim_core.sae.files.save_file", full)
    with pytest.raises(InputError, match=r"cannot write .*sae: no room"):
        rim.save_sae(random_sae(), tmp_path / "sae")
    with pytest.raises(InputError, match="JSON"):
        rim.save_sae(random_sae(metadata={"made": object()}), tmp_path / "sae")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("architecture", "config", "says"),
    [
        ("gated", {}, "architecture 'gated' is not supported.*standard, topk, jumprelu"),
        ("standard", {"normalize_activations": "expected_average_only_in"}, "fold_activation_norm_scaling_factor"),
        ("standard", {"normalize_activations": "layer_norm"}, "normalize_activations 'layer_norm'"),
        ("standard", {"reshape_activations": "hook_z"}, "reshape_activations 'hook_z'"),
        ("standard", {"metadata": {"hook_name": "x"}}, "not SAELens 6's format"),
        ("standard", {"metadata": {"sae_lens_version": "5.3.0"}}, "not SAELens 6's format"),
        ("standard", {"metadata": {"sae_lens_version": "dev"}}, "not SAELens 6's format"),
        ("standard", {"d_sae": 16}, r"W_enc should be \[6, 16\], and there is \[6, 15\]"),
        ("topk", {}, "k is None"),
        ("topk", {"k": 99}, "k is 99"),
    ],
)
def test_what_cannot_be_read_truly_is_refused(tmp_path, architecture, config, says):
    write_by_hand(tmp_path / "sae", architecture, **config)
    with pytest.raises(InputError, match=says):
        rim.load_sae(tmp_path / "sae")


def test_missing_and_damaged_files_are_named(tmp_path):
    with pytest.raises(InputError, match=r"needs cfg\.json and sae_weights"):
        rim.load_sae(tmp_path)
    write_by_hand(tmp_path / "sae", "jumprelu")
    weights = tmp_path / "sae" / "sae_weights.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-50])
    with pytest.raises(InputError, match="damaged"):
        rim.load_sae(tmp_path / "sae")
    weights.write_bytes(whole)
    (tmp_path / "sae" / "cfg.json").write_text("{")
    with pytest.raises(InputError, match="damaged"):
        rim.load_sae(tmp_path / "sae")
    write_by_hand(tmp_path / "other", "standard")
    (tmp_path / "other" / "cfg.json").write_text(
        (tmp_path / "other" / "cfg.json").read_text().replace("standard", "jumprelu")
    )
    with pytest.raises(InputError, match=r"threshold should be .*nothing"):
        rim.load_sae(tmp_path / "other")


# --- errors ---------------------------------------------------------------------------------------------------

NOISE = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"activations": NOISE[0]}, r"shape \[8\]; give \[n, d\]"),
        ({"activations": NOISE / 0}, "NaN or infinity"),
        ({"activations": torch.ones(9, 4)}, "are equal"),
        ({"kind": "gated"}, "choose from relu, topk"),
        ({"kind": "topk", "k": 33}, "from 1 to its 32 latents: k is 33"),
        ({"n_latents": 0}, "n_latents must be a whole number of at least 1, not 0"),
        ({"steps": 0}, "steps must be"),
        ({"lr": 0.0}, "lr must be a finite number above 0, not 0.0"),
    ],
)
def test_bad_training_arguments_get_one_line(arguments, says):
    with pytest.raises(InputError, match=says):
        rim.train_sae(**{"activations": NOISE, "progress": False, **arguments})


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"target": np.ones(40)}, "not all equal"),
        ({"target": np.ones(39)}, r"40 finite numbers.*\[39\]"),
        ({"target": np.full(40, np.nan)}, "finite"),
        ({"groups": np.zeros(40)}, "at least two groups"),
        ({"n_permutations": 0}, "at least 1"),
        ({"activations": NOISE[:, :4]}, "width 4 do not fit"),
        ({"sae": replace(random_sae(8, 20), b_enc=torch.full((20,), -1e4))}, "no latent varies"),
    ],
)
def test_bad_correlation_arguments_get_one_line(arguments, says):
    given = {"sae": random_sae(8, 20), "activations": NOISE, "target": np.arange(40) % 2}
    with pytest.raises(InputError, match=says):
        rim.latent_correlations(**{**given, **arguments})


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"kind": "gated"}, "choose from relu, topk, jumprelu"),
        ({"kind": "topk"}, "needs k"),
        ({"kind": "jumprelu"}, "threshold"),
    ],
)
def test_an_autoencoder_that_lacks_its_setting_is_refused(options, says):
    with pytest.raises(InputError, match=says):
        random_sae(**options)


def test_constant_activations_have_no_variance_to_explain():
    with pytest.raises(InputError, match="no variance"):
        rim.evaluate_sae(random_sae(8, 20), torch.ones(10, 8))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"sae": random_sae(8)}, "width 8, resid_post of .* has 32"),
        ({"layer": 9}, "layer 9 is out of range"),
        ({"site": "resid_mid"}, "unknown site"),
        ({"latents": 80}, "latent 80 is out of range"),
        ({"latents": [1, 2], "value": [1.0]}, "1 values for 2 latents"),
        ({"positions": "first"}, "unknown positions"),
    ],
)
def test_bad_splices_get_one_line_and_leave_no_hook(tiny_folder, arguments, says):
    model = rim.load(str(tiny_folder()), quantization=None, device="cpu")
    before = hooks(model)
    context = rim.splice(model, **{"sae": random_sae(), "layer": 1, **arguments})
    with pytest.raises(InputError, match=says), context:
        pass
    assert hooks(model) == before


def test_one_text_has_no_interval(learnt):
    with pytest.raises(InputError, match="at least two texts"):
        rim.cross_entropy_recovered(learnt, identity_sae(32), TEXTS[:1], layer=1)
