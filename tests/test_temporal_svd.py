import numpy as np
import pytest

from tipl_ray.paper import temporal_svd
from tipl_ray.paper.temporal_svd import FittedBasis, fit_basis, fit_shared_basis, reconstruction_error


def trajectory(num_snapshots: int, num_weights: int, seed: int = 0) -> np.ndarray:
    """A random walk from a random start: smooth over training, as weights are."""
    generator = np.random.default_rng(seed)
    steps_TP = 0.1 * generator.standard_normal((num_snapshots, num_weights))
    return (generator.standard_normal(num_weights) + steps_TP.cumsum(axis=0)).astype(np.float32)


wide_and_tall = pytest.mark.parametrize(("num_snapshots", "num_weights"), [(30, 122), (60, 25)])


@wide_and_tall
@pytest.mark.parametrize("origin", [{}, {"centred": True}])
def test_full_rank_svd_restores_every_weight(num_snapshots, num_weights, origin):
    weights_TP = trajectory(num_snapshots, num_weights)
    basis = fit_basis(weights_TP, min(weights_TP.shape), **origin)
    np.testing.assert_allclose(basis.decode(basis.coordinates_TD), weights_TP, atol=2e-6)


@wide_and_tall
def test_singular_values_and_tokens_equal_numpys(num_snapshots, num_weights):
    weights_TP = trajectory(num_snapshots, num_weights)
    left_TD, values_D, right_DP = np.linalg.svd(weights_TP.astype(np.float64), full_matrices=False)
    basis = fit_basis(weights_TP, 8)
    np.testing.assert_allclose(basis.singular_values_D, values_D[:8], rtol=1e-9)
    signs_D = np.sign(right_DP[np.arange(8), np.abs(right_DP[:8]).argmax(axis=1)])
    np.testing.assert_allclose(basis.coordinates_TD, left_TD[:, :8] * signs_D, atol=1e-6)
    np.testing.assert_allclose(basis.basis_PD.T, right_DP[:8] * signs_D[:, None], atol=1e-6)


def spectrum(name: str, size: int) -> np.ndarray:
    order = np.arange(1, size + 1.0)
    return {
        "like a trajectory's": order**-1.3,
        "steep": 0.8**order,
        "in pairs": np.ceil(order / 2) ** -1.3,
        "of rank 9": np.where(order <= 9, 1 / order, 0.0),
        "flat": np.ones(size),
        "nearly flat": np.linspace(1.0, 0.9999, size),
        "one far above the others": np.where(order == 1, 5e3, 1 / order),
        "of rank 2": np.where(order <= 2, 1 / order, 0.0),
    }[name]


@pytest.mark.parametrize("shape", [(260, 400), (400, 260)])
@pytest.mark.parametrize(
    ("name", "by_subspace"),
    [
        ("like a trajectory's", True),
        ("steep", True),
        ("in pairs", True),
        ("of rank 9", True),
        ("flat", None),  # any subspace is the leading one
        ("nearly flat", False),
        ("one far above the others", False),
        ("of rank 2", False),
    ],
)
def test_a_subspace_is_trusted_only_where_singular_values_equal_numpys(shape, name, by_subspace):
    generator = np.random.default_rng(0)
    left_TN, right_PN = (np.linalg.qr(generator.standard_normal((size, 260)))[0] for size in shape)
    weights_TP = ((left_TN * spectrum(name, 260)) @ right_PN.T).astype(np.float32)
    values_D = np.linalg.svd(weights_TP.astype(np.float64), compute_uv=False)[:5]
    values_D[values_D < 1e-6 * values_D[0]] = 0.0  # float32's rounding of weights of lower rank
    trusted = temporal_svd._decompose_by_subspace(weights_TP, np.zeros(shape[1], np.float32), 5, 13) is not None
    basis = fit_basis(weights_TP, 5)
    assert by_subspace in (trusted, None)
    np.testing.assert_allclose(basis.singular_values_D, values_D, rtol=1e-7)
    taken_D = basis.singular_values_D > 0
    for vectors in (basis.coordinates_TD, basis.basis_PD):
        np.testing.assert_allclose(vectors.T @ vectors, np.diag(taken_D), atol=2e-6)


def test_the_same_trajectory_gives_the_same_basis():
    weights_TP = trajectory(260, 400)  # large enough for a subspace
    one, other = fit_basis(weights_TP, 5), fit_basis(weights_TP.copy(), 5)
    assert one.coordinates_TD.tobytes() == other.coordinates_TD.tobytes()
    assert one.basis_PD.tobytes() == other.basis_PD.tobytes()


@pytest.mark.parametrize("shape", [(20, 95), (95, 20), (260, 400)])
@pytest.mark.parametrize("origin", [{}, {"centred": True}])
def test_blocks_change_nothing(shape, origin, monkeypatch):
    weights_TP = trajectory(*shape)
    whole = fit_basis(weights_TP, 5, **origin)
    monkeypatch.setattr(temporal_svd, "BLOCK_BYTES", 8 * max(shape) * 7)
    monkeypatch.setattr(temporal_svd, "HELD_BYTES", 8 * max(shape) * 30)
    monkeypatch.setattr(temporal_svd, "WEIGHTS_SUMMED", 64)
    blocks = fit_basis(weights_TP, 5, **origin)
    np.testing.assert_allclose(blocks.basis_PD, whole.basis_PD, atol=1e-6)
    np.testing.assert_allclose(blocks.coordinates_TD, whole.coordinates_TD, atol=1e-6)


@wide_and_tall
def test_largest_entry_of_each_right_singular_vector_is_positive(num_snapshots, num_weights):
    basis = fit_basis(trajectory(num_snapshots, num_weights, seed=3), 12, centred=True)
    assert (basis.basis_PD.max(axis=0) == np.abs(basis.basis_PD).max(axis=0)).all()


def test_mirrored_trajectory_has_mirrored_tokens_and_the_same_basis():
    weights_TP = trajectory(30, 40)
    basis, mirrored = fit_basis(weights_TP, 5), fit_basis(-weights_TP, 5)
    np.testing.assert_allclose(mirrored.basis_PD, basis.basis_PD, atol=1e-6)
    np.testing.assert_allclose(mirrored.coordinates_TD, -basis.coordinates_TD, atol=1e-6)


@pytest.mark.parametrize("num_snapshots", [40, 400])
def test_encoding_the_trajectory_gives_its_own_tokens(num_snapshots):
    weights_TP = trajectory(num_snapshots, 402)
    basis = fit_basis(weights_TP, 10, centred=True)
    np.testing.assert_allclose(basis.encode(weights_TP), basis.coordinates_TD, atol=1e-5)


@wide_and_tall
def test_directions_never_taken_have_zero_columns_and_no_nan(num_snapshots, num_weights):
    weights_TP = np.outer(np.arange(1, num_snapshots + 1), np.arange(num_weights) - 9).astype(np.float32)
    basis = fit_basis(weights_TP, 4)
    assert (basis.singular_values_D > 0).tolist() == [True, False, False, False]
    assert not basis.basis_PD[:, 1:].any()
    assert not basis.coordinates_TD[:, 1:].any()
    np.testing.assert_allclose(basis.decode(basis.encode(weights_TP)), weights_TP, rtol=1e-6, atol=1e-5)


def test_trajectory_that_stands_still_is_restored_from_its_origin():
    weights_TP = np.repeat(trajectory(1, 12), 9, axis=0)
    basis = fit_basis(weights_TP, 3, centred=True)
    assert not basis.singular_values_D.any()
    np.testing.assert_array_equal(basis.decode(basis.coordinates_TD), weights_TP)
    zeros_TP = np.zeros_like(weights_TP)
    np.testing.assert_array_equal(reconstruction_error(zeros_TP, [1, 3])["energy_outside"], [0.0, 0.0])


@wide_and_tall
def test_reconstruction_error_is_the_error_of_decoded_tokens(num_snapshots, num_weights):
    weights_TP = trajectory(num_snapshots, num_weights)
    ranks = [1, 4, 16]
    errors = reconstruction_error(weights_TP, ranks)
    for rank, mean_squared_error, outside in zip(
        ranks, errors["mean_squared_error"], errors["energy_outside"], strict=True
    ):
        basis = fit_basis(weights_TP, rank)
        difference_TP = basis.decode(basis.coordinates_TD).astype(np.float64) - weights_TP
        assert mean_squared_error == pytest.approx((difference_TP**2).mean(), rel=1e-4)
        energy = (weights_TP.astype(np.float64) ** 2).sum()
        assert outside == pytest.approx((difference_TP**2).sum() / energy, rel=1e-4)


def test_rank_beyond_the_trajectory_is_refused_with_both_numbers():
    with pytest.raises(ValueError, match=r"basis\.rank=31 is not between 1 and 30"):
        fit_basis(trajectory(30, 122), 31)
    with pytest.raises(ValueError, match=r"basis\.rank=30 is not between 1 and 25"):
        reconstruction_error(trajectory(60, 25), [4, 30])


def test_weights_that_are_not_finite_are_refused():
    weights_TP = trajectory(260, 400)
    weights_TP[4, 7] = np.nan
    with pytest.raises(ValueError, match="NaN or infinite"):
        fit_basis(weights_TP, 2)


def test_a_shared_basis_is_the_svd_of_all_trajectories_together():
    parts = [trajectory(30, 12, seed) for seed in (1, 2)]
    shared = fit_shared_basis(parts, 5)
    _, expected_N, right_NP = np.linalg.svd(np.concatenate(parts).astype(np.float64), full_matrices=False)
    np.testing.assert_allclose(shared.singular_values_D, expected_N[:5], rtol=1e-6)
    np.testing.assert_allclose(np.abs(shared.basis_PD.T @ right_NP[:5].T), np.eye(5), atol=1e-4)
    other_TP = trajectory(20, 12, 3)
    np.testing.assert_allclose(
        shared.on(other_TP).decode(shared.on(other_TP).coordinates_TD),
        other_TP @ shared.basis_PD @ shared.basis_PD.T,
        atol=1e-3,
    )


def test_a_shared_basis_survives_being_written_down_and_cut_to_a_lower_rank():
    parts, other_TP = [trajectory(30, 12, seed) for seed in (1, 2)], trajectory(20, 12, 3)
    kept, cut = FittedBasis.from_bytes(fit_shared_basis(parts, 5).to_bytes()), fit_shared_basis(parts, 5).truncated(3)
    np.testing.assert_array_equal(
        kept.on(other_TP).coordinates_TD, fit_shared_basis(parts, 5).on(other_TP).coordinates_TD
    )
    np.testing.assert_allclose(
        cut.on(other_TP).coordinates_TD, fit_shared_basis(parts, 3).on(other_TP).coordinates_TD, atol=1e-5
    )
