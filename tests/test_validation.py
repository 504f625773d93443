"""Skills that can be compared: exact without the weights, on windows that every context has."""

import numpy as np
import pytest
import torch

from tipl_ray import config
from tipl_ray.paper.objective import NextToken
from tipl_ray.paper.predictor import SvdFloor, Tipl, TrialBasis
from tipl_ray.paper.representation import TrialTokens
from tipl_ray.paper.temporal_svd import fit_basis
from tipl_ray.paper.tokens import Tokens, tokens_of
from tipl_ray.predict.baselines import CopyLast, Ridge
from tipl_ray.predict.gram import Question, make_band, moved_squares
from tipl_ray.predict.predictor import Predictor, Trial, Trials
from tipl_ray.predict.representation import TrainingData
from tipl_ray.sweep.judge import Judge
from tipl_ray.window.objective import WindowError
from tipl_ray.window.predictor import WindowFloor, WindowTipl

STEPS = (1, 2, 5)
NUM_SNAPSHOTS = 41


def trajectory(seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    drift_P = 0.3 * generator.standard_normal(13)
    steps_TP = drift_P + 0.1 * generator.standard_normal((NUM_SNAPSHOTS, 13))
    return (steps_TP.cumsum(axis=0) + generator.standard_normal(13)).astype(np.float32)


def trial(seed: int) -> Trial:
    weights_TP = trajectory(seed)
    return Trial(weights_TP=weights_TP, band=make_band(weights_TP, 17, snapshots_per_iteration=5))


TRIALS = [trial(1), trial(2)]
JUDGE = Judge(bands=[one.band for one in TRIALS], steps=STEPS, longest=12)


def question(context: int) -> Question:
    return Question(context=context, steps=STEPS, snapshots_per_iteration=5)


def skill_from_weights(predictor: Predictor, context: int) -> np.ndarray:
    """The same, by way of the weights themselves."""
    error, moved = np.zeros(len(STEPS)), np.zeros(len(STEPS))
    for one in TRIALS:
        error += predictor.squared_errors(one, JUDGE.starts_B).sum(axis=0)
        moved += CopyLast(question(context)).squared_errors(one, JUDGE.starts_B).sum(axis=0)
    return 1 - error / moved


class DecodedAlone(Predictor):
    """Another predictor's forecasts, judged as weights and by nothing else."""

    def __init__(self, other: Predictor):
        super().__init__(other.question)
        self.other = other

    def forecast(self, trial: Trial, starts_B: np.ndarray) -> np.ndarray:
        return self.other.forecast(trial, starts_B)


def window_error(context: int) -> WindowError:
    torch.manual_seed(0)
    bands = [trial(seed).band for seed in (3, 4)]
    return WindowError(
        config.Model(context=context, embedding=16, layers=1), question(context), bands, JUDGE.bands, "cpu"
    )


def moved(one: Trial) -> np.ndarray:
    return moved_squares(one.band.products_SW, max(STEPS))


def test_starts_are_the_same_for_every_context_and_leave_room_for_the_longest() -> None:
    assert JUDGE.starts_B[0] == 12
    assert JUDGE.starts_B[-1] == NUM_SNAPSHOTS - 1 - 5


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("rank", [3, 8])
def test_the_papers_model_is_judged_as_its_decoded_weights_are(rank: int, residual: bool) -> None:
    torch.manual_seed(0)
    at_most = [tokens_of(i, one.weights_TP, fit_basis(one.weights_TP, 8), moved(one)) for i, one in enumerate(TRIALS)]
    tokens = Tokens.stack(at_most).truncated(rank)
    objective = NextToken(
        config.Model(context=6, embedding=16, layers=1, residual=residual),
        TrainingData(train=tokens, validation=tokens),
    )
    torch.nn.init.normal_(objective.model.predict.weight, std=0.1)
    tipl = Tipl(question(6), objective.model, TrialBasis(TrialTokens(config.Basis(rank=rank))), objective.normaliser)
    found_H = JUDGE.skills(objective.squared_errors(objective.model, JUDGE.starts_B, STEPS))
    np.testing.assert_allclose(1 - found_H, 1 - skill_from_weights(DecodedAlone(tipl), 6), rtol=1e-3)


def test_truncated_tokens_are_those_of_the_lower_rank() -> None:
    weights_TP = TRIALS[0].weights_TP
    lower, higher = (tokens_of(1, weights_TP, fit_basis(weights_TP, rank), moved(TRIALS[0])) for rank in (3, 8))
    for name in ("coordinates_NTD", "singular_values_ND", "outside_NT", "moved_NTF"):
        np.testing.assert_allclose(getattr(higher.truncated(3), name), getattr(lower, name), rtol=1e-3, atol=1e-4)


def test_the_window_model_and_the_ridge_are_judged_as_their_weights_are() -> None:
    objective = window_error(4)
    model = objective.model
    torch.nn.init.normal_(model.predict.weight, std=0.1)
    found_H = JUDGE.skills(objective.squared_errors(model, JUDGE.starts_B, STEPS))
    np.testing.assert_allclose(found_H, skill_from_weights(WindowTipl(question(4), model), 4), rtol=1e-5)
    ridge, training = Ridge(question(4)), [trial(3).band, trial(4).band]
    ridge.fit(Trials(bands=training, weights=tuple), Trials(bands=JUDGE.bands, weights=tuple))
    np.testing.assert_allclose(JUDGE.ridge(training, 4), skill_from_weights(ridge, 4), rtol=1e-9)
    assert JUDGE.ridge(training, 4)[0] > 0.5, "a drift is what a ridge can learn"


def test_no_model_has_more_skill_than_the_true_future_on_its_basis() -> None:
    whole = [tokens_of(i, one.weights_TP, fit_basis(one.weights_TP, 13), moved(one)) for i, one in enumerate(TRIALS)]
    tokens = Tokens.stack(whole)
    floor = SvdFloor(question(6), TrialBasis(TrialTokens(config.Basis(rank=3))))
    np.testing.assert_allclose(
        1 - bound_H(tokens.truncated(3)), 1 - skill_from_weights(DecodedAlone(floor), 6), rtol=1e-3
    )
    np.testing.assert_allclose(bound_H(tokens), 1, atol=1e-6)
    short_H, long_H = (JUDGE.skills(window_error(k).upper_bound(JUDGE.starts_B, STEPS)) for k in (6, 12))
    np.testing.assert_allclose(short_H, skill_from_weights(WindowFloor(question(6)), 6), rtol=1e-9)
    assert (long_H > short_H).all(), "more displacements span more"


def bound_H(tokens: Tokens) -> np.ndarray:
    objective = NextToken(
        config.Model(context=6, embedding=16, layers=1), TrainingData(train=tokens, validation=tokens)
    )
    return JUDGE.skills(objective.upper_bound(JUDGE.starts_B, STEPS))
