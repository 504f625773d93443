import numpy as np
import pytest

from tipl_ray import config
from tipl_ray.predict import gram
from tipl_ray.predict.gram import Question, banded_products, make_band, moved_squares, squared_errors

QUESTION = Question(context=6, steps=(1, 2, 5), snapshots_per_iteration=5)


def trajectory(num_snapshots: int = 40, num_weights: int = 23, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return generator.standard_normal((num_snapshots, num_weights)).cumsum(axis=0).astype(np.float32)


def whole_gram(weights_TP: np.ndarray) -> np.ndarray:
    displacements_SP = np.diff(weights_TP.astype(np.float64), axis=0)
    return displacements_SP @ displacements_SP.T


@pytest.mark.parametrize("num_snapshots", [13, 40, 200])
def test_the_band_is_that_of_the_whole_gram_matrix(num_snapshots):
    weights_TP = trajectory(num_snapshots)
    products_SW, expected_SS = banded_products(weights_TP, 11), whole_gram(weights_TP)
    assert products_SW.shape == (num_snapshots - 1, 11)
    for offset in range(11):
        diagonal = np.diagonal(expected_SS, offset)
        np.testing.assert_allclose(products_SW[: len(diagonal), offset], diagonal, atol=1e-9)
        assert not products_SW[len(diagonal) :, offset].any()


def test_blocks_change_nothing(monkeypatch):
    whole = banded_products(trajectory(), 11)
    monkeypatch.setattr(gram, "BLOCK_BYTES", 8 * 40 * 3)
    monkeypatch.setattr(gram, "ROWS_AT_ONCE", 7)
    np.testing.assert_allclose(banded_products(trajectory(), 11), whole, atol=1e-9)


def test_a_window_is_its_part_of_the_gram_matrix():
    weights_TP = trajectory()
    starts_B = np.array([6, 20, 34])
    windows_BNN = make_band(weights_TP, QUESTION.width).windows(starts_B, 6, 5)
    for start, window_NN in zip(starts_B, windows_BNN, strict=True):
        part = slice(start - 6, start + 5)
        np.testing.assert_allclose(window_NN, whole_gram(weights_TP)[part, part], atol=1e-9)


def test_squares_of_moves_from_the_band_are_those_of_the_weights():
    weights_TP = np.random.default_rng(1).standard_normal((12, 7)).cumsum(axis=0)
    found_TF = moved_squares(banded_products(weights_TP, 5), 5)
    later_TF = np.minimum(np.arange(12)[:, None] + np.arange(1, 6), 11)
    direct_TF = np.square(weights_TP[later_TF] - weights_TP[:, None]).sum(axis=2)
    np.testing.assert_allclose(found_TF, direct_TF, rtol=1e-9)


def test_squared_errors_from_the_band_are_those_of_the_weights():
    weights_TP, starts_B = trajectory(num_weights=300), np.arange(6, 35)
    coefficients_BHK = np.random.default_rng(1).normal(size=(len(starts_B), 3, 6))
    windows_BNN = make_band(weights_TP, QUESTION.width).windows(starts_B, 6, 5)
    exact = weights_TP.astype(np.float64)
    for window, start in enumerate(starts_B):
        displacements_KP = np.diff(exact[start - 6 : start + 1], axis=0)
        forecast_HP = exact[start] + coefficients_BHK[window] @ displacements_KP
        truth_HP = exact[start + np.asarray(QUESTION.steps)]
        np.testing.assert_allclose(
            squared_errors(windows_BNN[window : window + 1], coefficients_BHK[window : window + 1], QUESTION.steps)[0],
            np.square(forecast_HP - truth_HP).sum(axis=1),
            rtol=1e-9,
        )


def test_contexts_tell_phase_progress_and_learning_rate():
    band = make_band(
        trajectory(), QUESTION.width, snapshots_per_iteration=5, learning_rates_T=np.linspace(3e-4, 0.0, 40)
    )
    contexts = band.contexts(np.array([10, 13, 39]), 6)
    assert contexts.grams_BKK.shape == (3, 6, 6)
    assert contexts.phases_B.tolist() == [0, 3, 4]
    np.testing.assert_allclose(contexts.progress_B, np.array([10, 13, 39]) / 39)
    np.testing.assert_allclose(contexts.learning_rates_B, 1 - np.array([10, 13, 39]) / 39)


def test_a_context_holds_nothing_of_what_comes_after_its_start():
    weights_TP = trajectory()
    changed_TP = weights_TP.copy()
    changed_TP[21:] += 7.0
    before, after = (make_band(array_TP, 11).contexts(np.array([20]), 6) for array_TP in (weights_TP, changed_TP))
    np.testing.assert_array_equal(before.grams_BKK, after.grams_BKK)


def test_windows_beyond_the_trajectory_or_the_band_are_refused():
    band = make_band(trajectory(), QUESTION.width)
    with pytest.raises(ValueError, match="start=5 is not between 6 and 34"):
        band.windows(np.array([6, 5]), 6, 5)
    with pytest.raises(ValueError, match=r"windows of 6 \+ 6 displacements exceed the band's width 11"):
        band.windows(np.array([20]), 6, 6)


def test_weights_that_are_not_finite_are_refused():
    weights_TP = trajectory()
    weights_TP[9, 3] = np.nan
    with pytest.raises(ValueError, match="NaN or infinite"):
        make_band(weights_TP, 11)


def test_an_experiments_question_is_its_context_steps_and_phases():
    asked = Question.of(config.Experiment(name="a", evaluate=config.Evaluate(horizon=3, extra_horizons=(20, 50))))
    assert (asked.context, asked.steps, asked.snapshots_per_iteration) == (20, (1, 2, 3, 20, 50), 5)
    assert (asked.future, asked.width) == (50, 70)
