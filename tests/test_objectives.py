import numpy as np
import pytest
import torch

from tipl_ray import config
from tipl_ray.paper.objective import NextToken
from tipl_ray.paper.temporal_svd import fit_basis
from tipl_ray.paper.tokens import Tokens, tokens_of
from tipl_ray.predict.baselines import Ridge
from tipl_ray.predict.gram import GramBand, Question, banded_products, make_band, moved_squares
from tipl_ray.predict.objective import draw_windows
from tipl_ray.predict.predictor import Trial, Trials
from tipl_ray.predict.representation import TrainingData, representation_of
from tipl_ray.window.objective import WindowError
from tipl_ray.window.predictor import WindowTipl
from tipl_ray.window.representation import Window

SIZE = config.Model(context=6, embedding=16, layers=2, heads=2, dropout=0.1)
QUESTION = Question(context=6, steps=(1, 2, 4), snapshots_per_iteration=5)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def trajectory(seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    steps_TP = generator.standard_normal((41, 13)) * np.exp(-np.arange(41) / 20)[:, None]
    return (0.1 * steps_TP.cumsum(axis=0) + generator.standard_normal(13)).astype(np.float32)


def tokens(*seeds: int) -> Tokens:
    trajectories = {seed: trajectory(seed) for seed in seeds}
    return Tokens.stack(
        [
            tokens_of(seed, w_TP, fit_basis(w_TP, 4), moved_squares(banded_products(w_TP, 4), 4))
            for seed, w_TP in trajectories.items()
        ]
    )


def bands(*seeds: int) -> list[GramBand]:
    return [make_band(trajectory(seed), QUESTION.width, snapshots_per_iteration=5) for seed in seeds]


def window_error() -> WindowError:
    torch.manual_seed(0)
    return WindowError(SIZE, QUESTION, bands(3, 4), bands(5), "cpu")


def test_next_tokens_validation_skill_is_that_of_the_decoded_weights():
    torch.manual_seed(0)
    objective = NextToken(SIZE, TrainingData(train=tokens(3, 4), validation=tokens(5)))
    _, skill = objective.validate()
    weights_TP, fitted = trajectory(5), fit_basis(trajectory(5), 4)
    normalised_TD = torch.from_numpy(objective.normaliser.normalise(fitted.coordinates_TD))
    windows_BK = np.arange(35)[:, None] + np.arange(6)
    with torch.no_grad():
        predicted_BD = objective.model(normalised_TD[windows_BK], torch.from_numpy(windows_BK))[:, -1]
    decoded_BP = fitted.decode(objective.normaliser.restore(predicted_BD.numpy()))
    error = np.square(decoded_BP - weights_TP[6:]).sum()
    assert skill == pytest.approx(1 - error / np.square(np.diff(weights_TP[5:], axis=0)).sum(), rel=1e-4)


def test_standing_still_is_the_last_token_decoded():
    objective = NextToken(SIZE, TrainingData(train=tokens(3, 4), validation=tokens(5)))
    starts_B, steps_H = np.array([6, 20, 30]), (1, 4)
    weights_TP, fitted = trajectory(5), fit_basis(trajectory(5), 4)
    decoded_B1P = fitted.decode(fitted.coordinates_TD[starts_B])[:, None]
    direct_BH = np.square(decoded_B1P - weights_TP[starts_B[:, None] + np.array(steps_H)]).sum(axis=-1)
    still_NBH = objective.standing_still(starts_B, steps_H)
    assert still_NBH is not None
    np.testing.assert_allclose(still_NBH[0], direct_BH, rtol=1e-4)
    assert window_error().standing_still(starts_B, steps_H) is None, "there it is copying"


def test_window_errors_loss_and_validation_are_those_of_the_forecast_weights():
    """Gathered on a device in units of its context, or asked as a predictor: the same squared errors."""
    objective = window_error()
    objective.model.predict.weight.data.normal_(std=0.1)
    objective.model.eval()
    tipl = WindowTipl(QUESTION, objective.model)
    starts_B = np.arange(6, 37)

    def sums(*seeds: int) -> tuple[np.ndarray, np.ndarray]:
        errors, moved = [], []
        for seed in seeds:
            weights_TP = trajectory(seed)
            trial = Trial(weights_TP=weights_TP, band=bands(seed)[0])
            truth_BHP = weights_TP[starts_B[:, None] + np.array(QUESTION.steps)].astype(np.float64)
            errors.append(np.square(tipl.forecast(trial, starts_B) - truth_BHP).sum(axis=(0, 2)))
            moved.append(np.square(weights_TP[starts_B][:, None] - truth_BHP).sum(axis=(0, 2)))
        return np.sum(errors, axis=0), np.sum(moved, axis=0)

    error_H, moved_H = sums(3, 4)
    every_window = np.arange(2 * 31)
    assert isinstance(objective.chances, np.ndarray)
    chances_N = np.diff(objective.chances, prepend=0.0)
    losses = [objective.loss(objective.model, every_window[window : window + 1]).item() for window in every_window]
    assert np.dot(chances_N, losses) == pytest.approx((error_H / moved_H).mean(), rel=1e-4)
    error_H, moved_H = sums(5)
    validation_loss, one_step_skill = objective.validate()
    assert validation_loss == pytest.approx((error_H / moved_H).mean(), rel=1e-4)
    assert one_step_skill == pytest.approx(1 - error_H[0] / moved_H[0], rel=1e-3)


def test_an_untrained_window_model_forecasts_about_what_the_ridge_does():
    objective, ridge = window_error(), Ridge(QUESTION)
    ridge.fit(Trials(bands=bands(3, 4), weights=tuple), Trials(bands=bands(5), weights=tuple))
    contexts = bands(5)[0].contexts(np.arange(6, 37), 6)
    answered_BHK = WindowTipl(QUESTION, objective.model).coefficients(contexts)
    np.testing.assert_allclose(answered_BHK, ridge.coefficients(contexts), atol=0.05)


def test_trajectories_that_stand_still_leave_the_loss_finite():
    still = [make_band(np.ones((41, 13), np.float32), QUESTION.width, snapshots_per_iteration=5)]
    objective = WindowError(SIZE, QUESTION, still, still, "cpu")
    objective.loss(objective.model, draw_windows(objective.chances, 0, 8, seed=0)).backward()
    gradients = [parameter.grad for parameter in objective.model.parameters()]
    assert all(gradient is not None and torch.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize(("kind", "objective"), [("trial", NextToken), ("window", WindowError)])
def test_the_basis_decides_what_is_trained(kind, objective):
    experiment = config.Experiment(
        name="a", model=SIZE, basis=config.Basis(kind=kind, rank=4), evaluate=config.Evaluate(horizon=4)
    )
    parts = [tokens(3), tokens(4)] if kind == "trial" else bands(3, 4)
    representation = representation_of(experiment.basis)
    data = TrainingData(train=representation.gather([parts]), validation=representation.gather([parts[:1]]))
    made = representation.objective(experiment, data)
    assert isinstance(made, objective)


def test_of_several_data_sets_each_counts_as_much_as_any_other():
    (small,) = bands(3)
    large = [make_band(1000 * trajectory(seed), QUESTION.width, snapshots_per_iteration=5) for seed in (4, 5)]
    window = Window(config.Basis(kind="window"))
    gathered, alone = window.gather([[small], large]), window.gather([large])
    moved = [band.products_SW[:, 0].sum() for band in gathered]
    assert (moved[0], moved[1] + moved[2]) == (pytest.approx(1.0), pytest.approx(1.0))
    np.testing.assert_array_equal(alone[0].products_SW, large[0].products_SW)


def test_windows_put_beside_others_are_trained_on_and_leave_validation_alone():
    torch.manual_seed(0)
    plain = WindowError(SIZE, QUESTION, bands(3, 4), bands(5), "cpu")
    torch.manual_seed(0)
    joined = WindowError(SIZE, QUESTION, bands(3, 4), bands(5), "cpu", joined=0.5)
    windows_B = draw_windows(plain.chances, 0, 32, seed=0)
    assert joined.loss(joined.model, windows_B).item() != plain.loss(plain.model, windows_B).item()
    assert joined.validate() == plain.validate()
