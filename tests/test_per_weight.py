"""TIPL on the basis `per-weight`: samples of weights, the correction of each, and its forecasts."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tipl_ray import config
from tipl_ray.data.snapshots import Layout
from tipl_ray.digest import as_table
from tipl_ray.per_weight import samples as samples_module
from tipl_ray.per_weight.objective import PerWeightError
from tipl_ray.per_weight.predictor import PerWeightTipl
from tipl_ray.per_weight.representation import PerWeight
from tipl_ray.per_weight.samples import WeightSample, sample_weights, tensor_indices
from tipl_ray.predict.baselines import Ridge
from tipl_ray.predict.gram import Question, make_band
from tipl_ray.predict.objective import draw_windows
from tipl_ray.predict.predictor import Trial, Trials
from tipl_ray.predict.representation import load_tipl
from tipl_ray.window.predictor import WindowTipl

SIZE = config.Model(context=6, embedding=16, layers=2, heads=2, dropout=0.0)
QUESTION = Question(context=6, steps=(1, 2, 4), snapshots_per_iteration=5)
LAYOUT: Layout = (("one", (5, 4), 0), ("two", (20,), 20))
STARTS = np.arange(6, 77)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def trajectory(seed: int) -> np.ndarray:
    """Displacements that persist in the tensor `one` and turn round in `two`: 0.7 or -0.7 times the last, and noise."""
    generator = np.random.default_rng(seed)
    steps_TP = generator.standard_normal((81, 40))
    signs_P = np.where(tensor_indices(LAYOUT) == 0, 0.7, -0.7)
    for index in range(1, len(steps_TP)):
        steps_TP[index] += signs_P * steps_TP[index - 1]
    return (0.1 * steps_TP.cumsum(axis=0)).astype(np.float32)


def sample(seed: int) -> WeightSample:
    weights_TP = trajectory(seed)
    return sample_weights(weights_TP, LAYOUT, make_band(weights_TP, QUESTION.width, snapshots_per_iteration=5), seed)


def objective(num_trials: int = 2) -> PerWeightError:
    torch.manual_seed(0)
    return PerWeightError(SIZE, QUESTION, [sample(seed) for seed in range(num_trials)], [sample(99)])


def trial(seed: int) -> Trial:
    weights_TP = trajectory(seed)
    return Trial(weights_TP=weights_TP, band=make_band(weights_TP, QUESTION.width, snapshots_per_iteration=5))


def positions(seed: int, drawn: WeightSample) -> np.ndarray:
    """Which weights of a trial a sample has."""
    return np.flatnonzero((trajectory(seed)[:, None] == drawn.weights_TS[:, :, None]).all(axis=0).any(axis=0))


def test_before_training_it_forecasts_what_the_transformer_inside_does():
    model = objective().model.eval()
    alone = WindowTipl(QUESTION, model.trunk).forecast(trial(99), STARTS)
    np.testing.assert_allclose(PerWeightTipl(QUESTION, model).forecast(trial(99), STARTS), alone, atol=1e-5)


def test_errors_of_samples_of_all_weights_are_those_of_the_forecast_weights():
    made = objective()
    torch.nn.init.normal_(made.model.correct.weight, std=0.1)
    tipl = PerWeightTipl(QUESTION, made.model)
    truth_BHP = trajectory(99)[STARTS[:, None] + np.array(QUESTION.steps)].astype(np.float64)
    errors_BH = np.square(tipl.forecast(trial(99), STARTS) - truth_BHP).sum(axis=2)
    moved_H = np.square(trajectory(99)[STARTS][:, None] - truth_BHP).sum(axis=(0, 2))
    np.testing.assert_allclose(made.squared_errors(made.model, STARTS, QUESTION.steps)[0], errors_BH, rtol=1e-3)
    np.testing.assert_allclose(tipl.squared_errors(trial(99), STARTS), errors_BH, rtol=1e-6)
    loss, one_step_skill = made.validate()
    assert loss == pytest.approx((errors_BH.sum(axis=0) / moved_H).mean(), rel=1e-3)
    assert one_step_skill == pytest.approx(1 - errors_BH[:, 0].sum() / moved_H[0], rel=1e-3)


def test_a_sample_stands_for_all_weights(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(samples_module, "SAMPLE", 8)
    made, drawn = objective(), sample(99)
    chosen_S, others_S = (positions(seed, sample(seed)) for seed in (99, 98))
    assert len(chosen_S) == 8
    np.testing.assert_array_equal(trajectory(99)[:, chosen_S], drawn.weights_TS)
    np.testing.assert_array_equal(tensor_indices(LAYOUT)[chosen_S], drawn.tensors_S)
    forecast_BHP = PerWeightTipl(QUESTION, made.model).forecast(trial(99), STARTS)
    apart_BHP = forecast_BHP - trajectory(99)[STARTS[:, None] + np.array(QUESTION.steps)]
    expected_BH = np.square(apart_BHP[:, :, chosen_S], dtype=np.float64).sum(axis=2) * 40 / 8
    np.testing.assert_allclose(made.squared_errors(made.model, STARTS, QUESTION.steps)[0], expected_BH, rtol=1e-3)
    assert set(chosen_S) != set(others_S)


def test_it_learns_what_no_combination_of_displacements_can():
    """Coefficients that all weights share cannot both keep and turn round: of 0.7 only its square is left."""
    made = objective(num_trials=6)
    ridge = Ridge(QUESTION)
    bands = [sample(seed).band for seed in range(6)]
    ridge.fit(Trials(bands=bands, weights=tuple), Trials(bands=bands[:1], weights=tuple))
    optimizer = torch.optim.AdamW(made.model.parameters(), lr=3e-3)
    for step in range(200):
        optimizer.zero_grad()
        made.loss(made.model, draw_windows(made.chances, step, 32, seed=0)).backward()
        optimizer.step()
    _, skill = made.validate()
    copied = np.square(np.diff(trajectory(99), axis=0)[STARTS], dtype=np.float64).sum()
    ridge_skill = 1 - ridge.squared_errors(trial(99), STARTS)[:, 0].sum() / copied
    assert skill > 0.4 > 0.3 > ridge_skill


def test_trials_that_stand_still_leave_loss_and_forecast_finite():
    still = np.ones((81, 40), np.float32)
    band = make_band(still, QUESTION.width, snapshots_per_iteration=5)
    one = sample_weights(still, LAYOUT, band, 0)
    made = PerWeightError(SIZE, QUESTION, [one], [one])
    made.loss(made.model, draw_windows(made.chances, 0, 8, seed=0)).backward()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in made.model.parameters())
    forecast_BHP = PerWeightTipl(QUESTION, made.model).forecast(Trial(weights_TP=still, band=band), STARTS)
    np.testing.assert_array_equal(forecast_BHP, np.ones((len(STARTS), 3, 40), np.float32))


def test_saved_and_loaded_it_forecasts_the_same(tmp_path: Path):
    basis = config.Basis(kind="per-weight")
    made = objective()
    torch.nn.init.normal_(made.model.correct.weight, std=0.1)
    made.model.save(str(tmp_path), {"basis": as_table(basis)})
    loaded = load_tipl(str(tmp_path), QUESTION)
    assert isinstance(loaded, PerWeightTipl)
    expected_BHP = PerWeightTipl(QUESTION, made.model).forecast(trial(99), STARTS)
    np.testing.assert_array_equal(loaded.forecast(trial(99), STARTS), expected_BHP)
    assert PerWeight(basis).companions(loaded, elsewhere=False) == ([], None)


def test_another_policy_or_question_is_refused():
    tipl = PerWeightTipl(QUESTION, objective().model)
    other = Trial(weights_TP=np.ones((20, 7), np.float32), band=make_band(np.ones((20, 7)), QUESTION.width))
    with pytest.raises(ValueError, match=r"policies of 40 weights, not of 7"):
        tipl.forecast(other, np.array([8]))
    with pytest.raises(ValueError, match=r"answers for context 6, steps \(1, 2, 4\) and 5 phases"):
        PerWeightTipl(Question(context=6, steps=(1, 2), snapshots_per_iteration=5), tipl.model)
    with pytest.raises(ValueError, match=r"forecasts steps \(1, 2, 4\), not \(1,\)"):
        objective().squared_errors(tipl.model, STARTS, (1,))
