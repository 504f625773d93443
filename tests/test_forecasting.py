import gc
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

from tipl_ray import config
from tipl_ray.forecasting import CopyLast, Linear, Predictor, SvdFloor, Tipl, TrialBasis
from tipl_ray.model import CausalTransformer, Normaliser
from tipl_ray.temporal_svd import fit_basis

STARTS = np.array([7, 12, 20])
SIZE = config.Model(context=6, embedding=16, layers=2, heads=2)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def trajectory(seed: int = 0, num_snapshots: int = 30, num_weights: int = 11) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return generator.standard_normal((num_snapshots, num_weights)).cumsum(axis=0).astype(np.float32)


def tipl(basis: config.Basis, token_size: int, num_snapshots: int = 30) -> Tipl:
    torch.manual_seed(0)
    normaliser = Normaliser.fit(fit_basis(trajectory(9), basis.kind, basis.rank).coordinates_TD[None])
    return Tipl(CausalTransformer(SIZE, token_size, num_snapshots), TrialBasis(basis), normaliser)


def predictors() -> list[Predictor]:
    return [
        CopyLast(),
        Linear(),
        SvdFloor(TrialBasis(config.Basis(rank=4))),
        tipl(config.Basis(rank=4), 4),
        tipl(config.Basis(kind="raw"), 11),
        tipl(config.Basis(kind="raw", deltas=True), 11),
    ]


def skill(predicted_BHP: np.ndarray, weights_TP: np.ndarray) -> float:
    future_BHP = weights_TP[STARTS[:, None] + np.arange(1, predicted_BHP.shape[1] + 1)].astype(np.float64)
    displacement = np.square(weights_TP[STARTS][:, None] - future_BHP).sum()
    return 1 - np.square(predicted_BHP - future_BHP).sum() / displacement


@pytest.mark.parametrize("predictor", predictors(), ids=lambda predictor: f"{predictor.name}-{predictor.basis}")
def test_forecasts_have_one_row_of_weights_per_start_and_step(predictor):
    forecast_BHP = predictor.forecast(trajectory(), STARTS, 4)
    assert forecast_BHP.shape == (3, 4, 11)
    assert forecast_BHP.dtype == np.float32
    assert np.isfinite(forecast_BHP).all()


@pytest.mark.parametrize("predictor", predictors(), ids=lambda predictor: f"{predictor.name}-{predictor.basis}")
def test_a_predictor_is_causal_exactly_if_it_says_so(predictor):
    weights_TP = trajectory()
    changed_TP = weights_TP.copy()
    changed_TP[STARTS[0] + 1 :] += 5.0
    before, after = (predictor.forecast(array_TP, STARTS[:1], 4) for array_TP in (weights_TP, changed_TP))
    assert np.array_equal(before, after) == predictor.causal


def test_a_causal_predictor_sees_its_context_alone():
    weights_TP = trajectory()
    poisoned_TP = weights_TP.copy()
    poisoned_TP[: STARTS[1] - 5] = 1e6
    for predictor in (CopyLast(), Linear(), tipl(config.Basis(kind="raw"), 11)):
        np.testing.assert_array_equal(
            predictor.forecast(poisoned_TP, STARTS[1:2], 4), predictor.forecast(weights_TP, STARTS[1:2], 4)
        )


def test_copying_the_last_snapshot_has_skill_exactly_0():
    weights_TP = trajectory()
    assert skill(CopyLast().forecast(weights_TP, STARTS, 5), weights_TP) == 0.0


def test_a_straight_line_is_predicted_exactly_by_linear():
    weights_TP = np.outer(np.arange(30), np.arange(11) - 4).astype(np.float32) + 3.0
    np.testing.assert_array_equal(
        Linear().forecast(weights_TP, STARTS, 5), weights_TP[STARTS[:, None] + np.arange(1, 6)]
    )


def test_svd_floor_of_full_rank_is_the_truth():
    weights_TP = trajectory()
    floor_BHP = SvdFloor(TrialBasis(config.Basis(rank=11))).forecast(weights_TP, STARTS, 5)
    assert skill(floor_BHP, weights_TP) == pytest.approx(1.0, abs=1e-9)


def test_no_point_of_the_basis_is_nearer_to_the_truth_than_the_svd_floor():
    weights_TP = trajectory()
    trial_basis = TrialBasis(config.Basis(rank=3))
    floor = skill(SvdFloor(trial_basis).forecast(weights_TP, STARTS, 5), weights_TP)
    model = tipl(config.Basis(rank=3), 3)
    assert skill(model.forecast(weights_TP, STARTS, 5), weights_TP) < floor < 1.0
    fitted = trial_basis.of(weights_TP)
    moved = fitted.decode(fitted.coordinates_TD + 0.01)[STARTS[:, None] + np.arange(1, 6)]
    assert skill(moved, weights_TP) < floor


def test_tipl_decodes_what_the_model_predicts():
    weights_TP = trajectory()
    predictor = tipl(config.Basis(rank=4, centred=True), 4)
    token_D = torch.tensor([0.5, -1.0, 2.0, 0.0])
    with torch.no_grad():
        predictor.model.predict.weight.zero_()
        predictor.model.predict.bias.copy_(token_D)
    decoded_P = predictor.trial_basis.of(weights_TP).decode(predictor.normaliser.restore(token_D.numpy())[None])[0]
    for forecast_P in predictor.forecast(weights_TP, STARTS, 4).reshape(-1, 11):
        np.testing.assert_allclose(forecast_P, decoded_P, rtol=1e-6, atol=1e-6)


def test_the_basis_is_fitted_once_per_trajectory_and_does_not_keep_it_alive():
    trial_basis = TrialBasis(config.Basis(rank=3))
    weights_TP = trajectory()
    fitted = trial_basis.of(weights_TP)
    assert trial_basis.of(weights_TP) is fitted
    assert trial_basis.of(weights_TP.copy()) is not fitted
    reference = weakref.ref(weights_TP)
    trial_basis.of(weights_TP)
    del weights_TP, fitted
    gc.collect()
    assert reference() is None


def test_saved_tipl_forecasts_the_same_when_loaded(tmp_path: Path):
    weights_TP = trajectory()
    predictor = tipl(config.Basis(rank=4, deltas=True), 4)
    about = {"basis": config.as_table(predictor.trial_basis.config), "normaliser": predictor.normaliser.as_table()}
    predictor.model.save(str(tmp_path), about)
    np.testing.assert_array_equal(
        Tipl.load(str(tmp_path)).forecast(weights_TP, STARTS, 4), predictor.forecast(weights_TP, STARTS, 4)
    )


def test_trajectory_longer_than_those_of_training_is_still_forecast():
    assert np.isfinite(tipl(config.Basis(rank=4), 4, num_snapshots=10).forecast(trajectory(), STARTS, 4)).all()


def test_starts_without_enough_snapshots_are_refused():
    weights_TP = trajectory()
    with pytest.raises(ValueError, match="start=4 is not between 5 and 29"):
        tipl(config.Basis(rank=4), 4).forecast(weights_TP, np.array([7, 4]), 2)
    with pytest.raises(ValueError, match="start=28 is not between 0 and 27"):
        SvdFloor(TrialBasis(config.Basis(rank=4))).forecast(weights_TP, np.array([28]), 2)
    with pytest.raises(ValueError, match="tokens of 3 numbers do not fit a model of 4"):
        Tipl(
            tipl(config.Basis(rank=4), 4).model,
            TrialBasis(config.Basis(rank=3)),
            Normaliser(mean_D=np.zeros(3, np.float32), deviation_D=np.ones(3, np.float32)),
        ).forecast(weights_TP, STARTS, 2)
