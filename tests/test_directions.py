"""Directions, rotations, subspaces and erosion against closed forms, scipy, and planted rotations and mixtures."""

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.covariance import LedoitWolf

from rim_core import (
    cosine,
    difference_in_means,
    erosion_fraction,
    principal_angles,
    procrustes,
    procrustes_ranks,
    project,
    separation,
    shared_subspace,
    stats,
    whitened_cosine,
)
from rim_core.errors import InputError
from rim_core.measures import _linear


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def orthogonal(d, seed=0):
    return torch.linalg.qr(randn(d, d, seed=seed))[0]


def as_matrix(rotation):
    return rotation.apply(torch.eye(len(rotation.basis), dtype=torch.float64))


def relative(found, wanted):
    return float((found - wanted).norm() / wanted.norm())


def test_difference_in_means_is_exact_where_float32_sums_are_not():
    a, b = torch.full((3000, 2, 4), 1e4), torch.full((500, 2, 4), 1e4)
    a[::3] += 0.3  # rounds to 0.2998..., which the means must keep
    wanted = a.double().mean(0) - b.double().mean(0)
    found = difference_in_means(a, b)
    assert found.dtype == torch.float32
    assert found.shape == (2, 4)
    assert torch.equal(found, wanted.float())
    units = difference_in_means(randn(9, 3, 5), randn(7, 3, 5, seed=1), normalise=True)
    assert torch.allclose(units.norm(dim=-1), torch.ones(3))


def test_projection_is_in_the_unit_of_the_values_whatever_the_direction_s_length():
    values, direction = randn(6, 3, 5), randn(3, 5, seed=1)
    wanted = torch.stack([values[:, i] @ direction[i] / direction[i].norm() for i in range(3)], dim=1)
    assert torch.allclose(project(values, direction), wanted.float())
    assert torch.allclose(project(values, 40 * direction), wanted.float())
    assert torch.allclose(project(values, direction[1])[:, 1], wanted[:, 1].float())
    assert project(values[0, 0], direction[0]).shape == ()


def test_projection_of_much_data_is_worked_in_pieces(monkeypatch):
    values, direction = randn(50, 4, 6), randn(4, 6, seed=1)
    whole = project(values, direction)
    monkeypatch.setattr(_linear, "_PIECE", 12)
    assert torch.allclose(project(values, direction), whole)


def test_cosine_by_layer_and_of_many_with_one():
    u = torch.tensor([[1.0, 0, 0], [1, 1, 0], [0, 0, 2]])
    v = torch.tensor([[3.0, 0, 0], [0, 5, 0], [0, 0, -1]])
    assert cosine(u, v).tolist() == pytest.approx([1, 0.5**0.5, -1])
    values = randn(4, 3, 3)
    by_prompt = torch.stack([cosine(each, v) for each in values])
    assert torch.equal(cosine(values, v), by_prompt)
    assert torch.equal(cosine(v, values), by_prompt)
    assert torch.equal(cosine(values, v[1])[:, 1], by_prompt[:, 1])


def test_separation_is_cohens_d_of_the_projections():
    a, b = randn(12, 3, 8) + 1, randn(9, 3, 8, seed=1)
    direction = torch.ones(3, 8)
    direction[0] *= -5  # the length is of no account, the sign is
    found = separation(a, b, direction)
    for layer in range(3):
        scores = (project(each, direction)[:, layer].double().numpy() for each in (a, b))
        wanted = stats.cohens_d(*scores)
        assert found.d.estimate[layer] == pytest.approx(wanted.estimate, rel=1e-5)
        assert (found.d.low[layer], found.d.high[layer]) == pytest.approx((wanted.low, wanted.high), rel=1e-5)
    assert found.d.estimate[0] < 0 < found.d.estimate[1]
    assert found.best == np.abs(found.d.estimate).argmax()
    assert str(found).endswith(f"at layer {found.best} of 3")
    assert list(found.to_frame()) == ["layer", "estimate", "low", "high", "n"]
    assert found.to_frame()["n"].tolist() == [21] * 3
    one = separation(a[:, 1], b[:, 1], direction[1])
    assert one.d.estimate.tolist() == [found.d.estimate[1]]


def test_a_layer_without_spread_does_not_hide_the_others():
    a, b = randn(12, 2, 8) + 1, randn(9, 2, 8)
    a[:, 0], b[:, 0] = 3, 1
    found = separation(a, b, torch.ones(8))
    assert np.isnan([found.d.estimate[0], found.d.low[0], found.d.high[0]]).all()
    assert found.best == 1
    assert found.plot().to_dict()["description"]
    assert "at layer 1 of 2" in repr(found)


@pytest.mark.parametrize("n", [12, 60])  # fewer and more samples than dimensions
@pytest.mark.parametrize("shrinkage", ["ledoit-wolf", 0.3])
def test_whitened_cosine_is_that_of_the_explicit_inverse(n, shrinkage):
    d = 20
    samples = randn(n, 2, d) * torch.logspace(0, 1.5, d) + 7
    u, v = randn(2, d, seed=1), randn(2, d, seed=2)
    found = whitened_cosine(u, v, samples, shrinkage=shrinkage)
    for layer in range(2):
        data = samples[:, layer].numpy()
        if shrinkage == "ledoit-wolf":
            inverse = LedoitWolf().fit(data).precision_
        else:
            covariance = np.cov(data.T, bias=True)
            inverse = np.linalg.inv(0.7 * covariance + 0.3 * np.trace(covariance) / d * np.eye(d))
        a, b = u[layer].numpy(), v[layer].numpy()
        wanted = a @ inverse @ b / np.sqrt((a @ inverse @ a) * (b @ inverse @ b))
        assert float(found[layer]) == pytest.approx(wanted, abs=1e-6)
        assert float(whitened_cosine(u[layer], v[layer], samples[:, layer], shrinkage=shrinkage)) == float(found[layer])


def test_whitening_takes_away_what_a_dominant_dimension_makes_alike():
    samples = randn(400, 16)
    samples[:, 0] *= 100
    u, v = randn(16, seed=1), randn(16, seed=2)
    u[0] = v[0] = 50.0
    rest = float(torch.nn.functional.cosine_similarity(u[1:], v[1:], dim=0))
    assert float(cosine(u, v)) > 0.98
    assert float(whitened_cosine(u, v, samples, shrinkage=1e-6)) == pytest.approx(rest, abs=0.15)


@pytest.mark.parametrize(("n", "d"), [(200, 24), (24, 300)])
def test_a_planted_rotation_is_recovered_and_carries_over(n, d):
    """With fewer prompts than dimensions only the row space is determined, and held-out prompts share it here."""
    wanted = orthogonal(d)
    source = randn(n, 5, seed=1) @ randn(5, d, seed=2) if n < d else randn(n, d, seed=1)
    target = source @ wanted
    found = procrustes(source, target)
    assert found.residuals["rotation"].estimate < 1e-6
    assert found.residuals["rotation, in sample"].estimate < 1e-6
    assert relative(found.apply(source), target) < 1e-6
    matrix = as_matrix(found)
    assert relative(matrix @ matrix.T, torch.eye(d, dtype=torch.float64)) < 1e-9
    identity = (source - target)[found.held_out].norm() / target[found.held_out].norm()
    assert found.residuals["identity"].estimate == pytest.approx(float(identity))
    assert found.gain.estimate == pytest.approx(float(identity), abs=1e-6)
    if n >= 2 * d:
        assert relative(matrix, wanted) < 1e-6


def test_scipy_s_rotation_fits_as_well_and_none_is_nearer_to_the_identity():
    source, target = randn(20, 40), randn(20, 40, seed=1)
    found = procrustes(source, target)
    x, y = source[found.fit], target[found.fit]
    scipys = torch.from_numpy(scipy.linalg.orthogonal_procrustes(x.numpy(), y.numpy())[0])
    matrix = as_matrix(found)
    assert found.residuals["rotation, in sample"].estimate == pytest.approx(relative(x @ scipys, y))
    # Another minimiser differs by a turn of what x leaves open; every one of them has a smaller trace.
    u, _, vh = torch.linalg.svd(x.T @ y)
    others = [u[:, :10] @ vh[:10] + u[:, 10:] @ orthogonal(30, seed) @ vh[10:] for seed in range(20)]
    assert all(relative(x @ other, y) == pytest.approx(relative(x @ scipys, y)) for other in others)
    assert all(matrix.trace() > other.trace() + 1 for other in [scipys, *others])
    # What neither row space reaches stays where it is.
    away = torch.linalg.svd(torch.cat([x, y]))[2][20:]
    assert relative(found.apply(away), away) < 1e-9


def test_equal_activations_give_the_identity_and_a_random_turn_the_expected_residual():
    source = randn(400, 30)
    found = procrustes(source, source.clone())
    assert relative(as_matrix(found), torch.eye(30, dtype=torch.float64)) < 1e-9
    # ||x H - x||^2 = 2 ||x||^2 - 2 x H x', whose second term has mean 0 for Haar-random H.
    assert found.residuals["random"].estimate == pytest.approx(2**0.5, abs=0.15)
    assert found.residuals["identity"].estimate == 0


def test_rank_confines_the_rotation_to_the_leading_directions():
    d, n = 50, 60
    turned = torch.eye(d, dtype=torch.float64)
    turned[:4, :4] = orthogonal(4, seed=3)
    scales = torch.ones(d, dtype=torch.float64)
    scales[:4] = 100.0
    source = randn(n, d) * scales
    target = source @ turned + 0.1 * randn(n, d, seed=1)
    found = procrustes(source, target, rank=4)
    assert found.rank == 4
    assert found.basis.shape == (50, 4)
    change = as_matrix(found) - torch.eye(d, dtype=torch.float64)
    assert torch.linalg.matrix_rank(change, rtol=1e-9) <= 4
    assert relative(as_matrix(found), turned) < 0.02
    scan = procrustes_ranks(source, target, [1, 4, 25])
    assert list(scan.residuals) == [1, 4, 25]
    assert scan.residuals[4]["rotation"].estimate == pytest.approx(found.residuals["rotation"].estimate)
    by_rank = {rank: series["rotation"].estimate for rank, series in scan.residuals.items()}
    assert by_rank[4] < by_rank[1] / 10
    frame = scan.to_frame()
    assert set(frame["series"]) == {"rotation", "identity", "random", "rotation, in sample"}
    assert (frame["low"] <= frame["estimate"]).all()
    assert (frame["estimate"] <= frame["high"]).all()


def test_a_rotation_fitted_to_noise_helps_in_sample_only():
    """Why a part is held out: the published in-sample residual is small for unrelated activations as well."""
    found = procrustes(randn(40, 200), randn(40, 200, seed=1))
    assert found.residuals["rotation, in sample"].estimate < 0.9 * 2**0.5
    assert found.residuals["rotation"].estimate == pytest.approx(2**0.5, abs=0.1)
    assert abs(found.gain.estimate) < 0.1


def test_pieces_and_dtype_change_nothing(monkeypatch):
    source, target = randn(20, 60), randn(20, 60, seed=1)
    whole = procrustes(source, target)
    monkeypatch.setattr(_linear, "_PIECE", 100)
    found = procrustes(source, target)
    assert relative(as_matrix(found), as_matrix(whole)) < 1e-9
    single = found.apply(source.float())
    assert single.dtype == torch.float32
    assert relative(single.double(), found.apply(source)) < 1e-6
    assert torch.allclose(found.apply(source[3]), found.apply(source)[3])


def test_the_rotation_stays_orthogonal_under_variances_of_many_sizes():
    scales = torch.logspace(0, -6, 60, dtype=torch.float64)
    source, target = (randn(30, 60, seed=seed) @ orthogonal(60) * scales for seed in range(2))
    found = procrustes(source, target)
    identity = torch.eye(found.rank, dtype=torch.float64)
    assert relative(found.basis.T @ found.basis, identity) < 1e-12
    assert relative(found.turn @ found.turn.T, identity) < 1e-12


def test_groups_stay_on_one_side():
    groups = np.repeat(list("abcdef"), 5)
    found = procrustes(randn(30, 8), randn(30, 8, seed=1), groups=groups)
    assert not set(groups[found.fit]) & set(groups[found.held_out])
    assert sorted([*found.fit, *found.held_out]) == list(range(30))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(1, 4))
def test_principal_angles_of_constructed_subspaces(seed, first, second):
    rng = np.random.default_rng(seed)
    d, k = 14, min(first, second)
    axes = torch.from_numpy(np.linalg.qr(rng.standard_normal((d, d)))[0])
    angles = np.sort(rng.uniform(0, np.pi / 2, k))
    a = axes[:first]
    b = [np.cos(t) * axes[i] + np.sin(t) * axes[6 + i] for i, t in enumerate(angles)]
    b = torch.stack(b + [axes[10 + i] for i in range(second - k)])
    mixed_a = torch.from_numpy(rng.standard_normal((first, first)) + 3 * np.eye(first)) @ a
    mixed_b = torch.from_numpy(rng.standard_normal((second, second)) - 3 * np.eye(second)) @ b
    found = principal_angles(mixed_a, mixed_b)
    assert found.tolist() == pytest.approx(angles.tolist(), abs=1e-5)
    assert torch.allclose(found, principal_angles(mixed_b, mixed_a), atol=1e-5)


def planted(shared, own, n=120, noise=0.1, seed=0):
    """Differences `[n, d]` that vary along the shared rows, a data set's own rows, and a little everywhere."""
    rows = torch.cat([shared, own])
    return randn(n, len(rows), seed=seed) @ rows + noise * randn(n, rows.shape[1], seed=seed + 1)


def test_shared_subspace_finds_what_is_planted_and_nothing_else():
    axes = orthogonal(60).T
    sets = {
        "a": planted(3 * axes[:2], 2 * axes[10:12], seed=10) + 50,
        "b": planted(-3 * axes[:2].flip(0), 2 * axes[20:22], seed=20),  # other order, sign and mean
        "c": planted(3 * axes[30:32], 2 * axes[40:42], seed=30),
    }
    found = shared_subspace(sets, rank=4)
    together, apart = found.overlaps["a", "b"], found.overlaps["a", "c"]
    assert (together.cosines[:2] > 0.99).all()
    assert (together.cosines[2:] < 0.1).all()
    assert (together.cosines[:2] > together.null_high[:2]).all()
    assert (apart.cosines < apart.null_high).all()
    assert (found.overlaps["a", "a"].cosines > 0.99).all()
    assert found.explained["c"].tolist() == pytest.approx([0.33, 0.33, 0.15, 0.15], abs=0.07)
    assert found.explained["c"].sum() > 0.95
    angles = principal_angles(found.bases["a"], found.bases["b"])
    assert np.cos(angles.numpy()) == pytest.approx(together.cosines, abs=1e-5)
    assert torch.allclose(found.bases["a"] @ found.bases["a"].T, torch.eye(4), atol=1e-5)
    assert float(found.component_cosines("a", "b").max()) <= together.cosines[0] + 1e-5
    frame = found.to_frame()
    assert len(frame) == 6 * 4
    assert (frame["null_low"] <= frame["null_high"]).all()


def test_the_null_of_one_direction_is_the_known_distribution():
    """The cosine of two random directions in m dimensions has mean square 1 / m."""
    sets = {"a": randn(20, 500), "b": randn(20, 500, seed=1)}
    overlap = shared_subspace(sets, rank=1, centre=False, draws=1000).overlaps["a", "b"]
    m = 40
    assert overlap.null_mean[0] == pytest.approx((2 / np.pi / m) ** 0.5, rel=0.1)
    assert overlap.null_high[0] == pytest.approx(2.24 / m**0.5, rel=0.1)
    assert overlap.cosines[0] < 0.4


def test_a_dominant_dimension_is_shared_with_mismatched_prompts_too():
    """Why such a control belongs among the data sets: the uniform null does not know the stream's outliers."""
    base, instruct = randn(2, 120, 80), randn(2, 120, 80, seed=1)
    base[..., 0] *= 60
    instruct[..., 0] *= 60
    sets = {"a": instruct[0] - base[0], "b": instruct[1] - base[1], "mismatched": instruct[0] - base[0].roll(1, 0)}
    found = shared_subspace(sets, rank=1)
    for pair in (("a", "b"), ("a", "mismatched")):
        assert found.overlaps[pair].cosines[0] > 0.99 > found.overlaps[pair].null_high[0] + 0.5


def test_centring_takes_the_mean_shift_away():
    axes = orthogonal(30).T
    sets = {name: planted(2 * axes[i : i + 1], axes[:0], seed=i) + 40 * axes[20] for i, name in ((1, "a"), (2, "b"))}
    assert shared_subspace(sets, rank=1).overlaps["a", "b"].cosines[0] < 0.2
    assert shared_subspace(sets, rank=1, centre=False).overlaps["a", "b"].cosines[0] > 0.99


def stacks(n=80, layers=3, d=16, seed=0):
    base = randn(n, layers, d, seed=seed)
    shift = torch.zeros(layers, d, dtype=torch.float64)
    shift[:, 0] = torch.tensor([2.0, 5.0, 9.0])
    instruct = randn(n, layers, d, seed=seed + 1) + shift
    return base, instruct


def test_erosion_of_an_exact_mixture_is_the_mixed_fraction():
    base, instruct = stacks()
    share = torch.tensor([0.0, 0.25, 1.3], dtype=torch.float64)[:, None]
    found = erosion_fraction(base, instruct, (1 - share) * instruct + share * base)
    assert found.fraction.estimate == pytest.approx([0, 0.25, 1.3], abs=1e-9)
    # Every resample has the same fraction, so the interval has no width.
    assert found.fraction.low == pytest.approx(found.fraction.high, abs=1e-9)
    assert found.same_data.estimate == pytest.approx([0, 0.25, 1.3], abs=1e-9)
    assert torch.allclose(found.direction.norm(dim=-1), torch.ones(3))


def test_erosion_intervals_cover_the_fraction_and_the_projections_are_means():
    base, instruct = stacks()
    other = randn(80, 3, 16, seed=5)
    other[..., 0] += torch.tensor([2.0, 2.5, 9.0])  # erosion 0, 0.5, 0
    found = erosion_fraction(base, instruct, other, groups=np.arange(80) // 2)
    assert (found.fraction.low < [0, 0.5, 0]).all()
    assert (found.fraction.high > [0, 0.5, 0]).all()
    wanted = project(other[found.held_out], found.direction).mean(0)
    assert found.projections["other"].estimate == pytest.approx(wanted.tolist(), abs=1e-5)
    assert found.projections["instruct"].estimate == pytest.approx([2, 5, 9], abs=0.6)
    assert not {i // 2 for i in found.fit} & {i // 2 for i in found.held_out}
    frame = found.to_frame("projection")
    assert set(frame["series"]) == {"base", "other", "instruct"}


def test_the_published_erosion_separates_equal_models_and_the_held_out_one_does_not():
    """Base and instruct are alike here, so that nothing can have eroded; the same data say otherwise."""
    base, instruct, other = (randn(40, 1, 400, seed=seed) for seed in range(3))
    found = erosion_fraction(base, instruct, other)
    assert np.isinf(found.fraction.low).all()
    assert np.isinf(found.fraction.high).all()
    assert np.isfinite([found.same_data.low, found.same_data.high]).all()


def test_layers_below_an_adapter_have_no_erosion_and_do_not_disturb_the_others():
    base, instruct = stacks()
    instruct[:, 0] = base[:, 0]
    found = erosion_fraction(base, instruct, (base + instruct) / 2)
    assert found.fraction.estimate == pytest.approx([np.nan, 0.5, 0.5], nan_ok=True)
    assert found.fraction.low.tolist()[0] == -np.inf
    assert not found.direction[0].any()
    drawn = found.plot().to_dict()
    (rows,) = [data for data in drawn["datasets"].values() if "low" in data[0]]
    assert rows[0]["estimate"] is None
    assert rows[0]["low"] is None


def test_a_given_direction_is_used_as_it_is():
    base, instruct = stacks()
    axis = torch.zeros(3, 16)
    axis[:, 0] = 4.0
    found = erosion_fraction(base, instruct, base, direction=axis)
    assert len(found.held_out) == 80
    assert len(found.fit) == 0
    assert found.same_data is None
    assert found.fraction.estimate == pytest.approx([1, 1, 1])


def test_charts_are_drawn():
    base, instruct = stacks(n=20)
    eroded = erosion_fraction(base, instruct, base)
    rotation = procrustes(base[:, 0], instruct[:, 0])
    scan = procrustes_ranks(base[:, 0], instruct[:, 0], [1, 3])
    shared = shared_subspace({"code": base[:, 0], "advice": instruct[:, 0]}, rank=2)
    drawn = [eroded.plot(), eroded.plot("projection"), rotation.plot(), scan.plot(), shared.plot(1)]
    for chart in drawn:
        assert chart.to_dict()["description"]


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: difference_in_means(torch.ones(2, 3), torch.ones(2, 4)), "only the prompts may differ"),
        (lambda: difference_in_means(torch.ones(2, 3), torch.ones(2, 3), normalise=True), "length 0"),
        (lambda: difference_in_means(torch.ones(2, 3).long(), torch.ones(2, 3)), "int64"),
        (lambda: project(torch.full((2, 3), torch.nan), torch.ones(3)), "values: 6 of 6 numbers are NaN or infinite"),
        (lambda: project(torch.ones(2, 3), torch.ones(4)), "do not end in"),
        (lambda: cosine(torch.ones(2, 3), torch.eye(3)[:2] * torch.tensor([[1.0], [0]])), "length 0 at index 1"),
        (lambda: whitened_cosine(torch.ones(9), torch.ones(9), randn(4, 9), shrinkage=0), "no inverse at shrinkage 0"),
        (lambda: cosine(torch.ones(2, 3), torch.ones(2)), "do not end in the shape of v"),
        (lambda: separation(randn(4, 2, 3), randn(4, 2, 3), torch.ones(4)), "do not end in the shape of direction"),
        (lambda: separation(torch.ones(4, 2, 3), torch.ones(4, 2, 3), torch.ones(3)), "neither set has any spread"),
        (lambda: separation(randn(1, 2, 3), randn(4, 2, 3), torch.ones(3)), "two prompts each"),
        (lambda: separation(randn(4, 2, 3), randn(4, 3, 3), torch.ones(3)), "only the prompts may differ"),
        (lambda: whitened_cosine(torch.ones(9), torch.ones(9), randn(4, 8)), r"give numbers \[sample, 9\]"),
        (lambda: procrustes(randn(8, 4), randn(8, 5)), "target has shape \\[8, 5\\]; give numbers \\[8, 4\\]"),
        (lambda: procrustes(randn(3, 4), randn(3, 4)), "at least 2 are needed"),
        (lambda: procrustes(randn(8, 40), randn(8, 40, seed=1), rank=9), "rank 9 is not 1 to 8"),
        (lambda: procrustes_ranks(randn(8, 4), randn(8, 4), []), "ranks: none given"),
        (lambda: procrustes(randn(8, 4), randn(8, 4, seed=1)).apply(torch.ones(5)), "4 dimensions"),
        (lambda: principal_angles(torch.ones(3), torch.ones(3)), "give numbers \\[rank, d\\]"),
        (lambda: principal_angles(torch.zeros(1, 3), torch.ones(1, 3)), "spans nothing"),
        (lambda: shared_subspace({}, rank=2), "no data set"),
        (lambda: shared_subspace({"a": randn(6, 9)}, rank=4), "fewer than rank 4"),
        (lambda: shared_subspace({"a": randn(6, 9)}, rank=1).component_cosines("a", "z"), "no data set 'z'"),
        (lambda: erosion_fraction(*[randn(8, 2, 3)] * 3), "equal in every layer"),
        (lambda: erosion_fraction(randn(8, 2, 3), randn(8, 2, 3), randn(8, 1, 3)), "other has shape \\[8, 1, 3\\]"),
        (lambda: erosion_fraction(*[randn(8, 2, 3)] * 3, direction=torch.ones(3)), "give numbers \\[2, 3\\]"),
    ],
)  # fmt: skip
def test_bad_input_gets_one_line(call, says):
    with pytest.raises(InputError, match=says) as caught:
        call()
    assert "\n" not in str(caught.value)


ARRAYS = [np.asarray, np.flip, lambda x: x.astype(">f8"), lambda x: x.astype(np.longdouble), lambda x: x.tolist()]


@pytest.mark.parametrize("made", ARRAYS)
def test_numpy_arrays_are_activations(made):
    rng = np.random.default_rng(0)
    a, b, u, v = (rng.normal(size=size) for size in ((9, 4), (8, 4), 4, 4))
    given_arrays = [made(x) for x in (a, b, u, v)]
    tensors = [torch.tensor(np.array(x, dtype=np.float64, order="C")) for x in given_arrays]
    for call in (
        lambda a, b, u, v: difference_in_means(a, b),
        lambda a, b, u, v: cosine(u, v),
        lambda a, b, u, v: whitened_cosine(u, v, a),
        lambda a, b, u, v: principal_angles(a[:3], b[:2]),
        lambda a, b, u, v: project(a, u),
    ):
        assert torch.equal(torch.as_tensor(call(*given_arrays)), torch.as_tensor(call(*tensors)))
