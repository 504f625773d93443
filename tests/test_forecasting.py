import dataclasses
import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tipl_ray import config
from tipl_ray.data.storage import StoreError
from tipl_ray.digest import as_table
from tipl_ray.evaluate.evaluation import make_predictors
from tipl_ray.paper.predictor import SvdFloor, Tipl, TrialBasis
from tipl_ray.paper.representation import TokenRepresentation
from tipl_ray.paper.temporal_svd import fit_shared_basis
from tipl_ray.paper.transformer import CausalTransformer, Normaliser
from tipl_ray.per_weight.transformer import PerWeightTransformer
from tipl_ray.places import PUBLISHED_FOLDER, published_predictors
from tipl_ray.predict import baselines
from tipl_ray.predict.baselines import (
    CopyLast,
    Damped,
    DynamicModes,
    FirstAgain,
    Linear,
    MeanTrajectory,
    RankOne,
    RankOneFromLast,
    Ridge,
    RidgeOnContext,
    WindowLinear,
    phase_moments,
)
from tipl_ray.predict.context_ridge import CONTEXT_PENALTIES
from tipl_ray.predict.gram import Contexts, Question, future_sums, make_band
from tipl_ray.predict.predictor import Combination, Predictor, Trial, Trials
from tipl_ray.predict.representation import load_tipl, representation_of
from tipl_ray.predict.saved import (
    combinations,
    find_predictor,
    load_fitted,
    load_predictor,
    predictor_digest,
    save_fitted,
    save_predictor,
)
from tipl_ray.registry import PREDICTORS
from tipl_ray.window.predictor import RidgeElsewhere, WindowFloor, WindowTipl
from tipl_ray.window.transformer import WindowTransformer

STEPS = (1, 2, 3, 5)
QUESTION = Question(context=6, steps=STEPS, snapshots_per_iteration=5)
STARTS = np.array([7, 12, 20])
SIZE = config.Model(context=6, embedding=16, layers=2, heads=2)
EXPERIMENT = config.Experiment(name="any", model=SIZE, evaluate=config.Evaluate(horizon=3, extra_horizons=(5,)))


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def trajectory(seed: int = 0, num_snapshots: int = 40, num_weights: int = 31) -> np.ndarray:
    """Displacements that remember the one before, more so at some phases than at others."""
    generator = np.random.default_rng(seed)
    steps_TP = generator.standard_normal((num_snapshots, num_weights))
    for snapshot in range(1, num_snapshots):
        steps_TP[snapshot] += (0.2 + 0.15 * (snapshot % 5)) * steps_TP[snapshot - 1]
    return steps_TP.cumsum(axis=0).astype(np.float32)


def trial(weights_TP: np.ndarray) -> Trial:
    return Trial(weights_TP=weights_TP, band=make_band(weights_TP, QUESTION.width, snapshots_per_iteration=5))


def trials(*seeds: int) -> Trials:
    weights = [trajectory(seed) for seed in seeds]
    return Trials(bands=[trial(weights_TP).band for weights_TP in weights], weights=lambda: weights)


def trial_basis_of(basis: config.Basis) -> TrialBasis:
    representation = representation_of(basis)
    assert isinstance(representation, TokenRepresentation)
    others = [trajectory(seed) for seed in (1, 2, 3)]
    return TrialBasis(representation, fit_shared_basis(others, basis.rank) if basis.kind == "shared" else None)


def tipl(basis: config.Basis, token_size: int, num_snapshots: int = 40, *, residual: bool = False) -> Tipl:
    torch.manual_seed(0)
    trial_basis = trial_basis_of(basis)
    normaliser = Normaliser.fit(trial_basis.of(trajectory(9)).coordinates_TD[None])
    model = CausalTransformer(dataclasses.replace(SIZE, residual=residual), token_size, num_snapshots)
    torch.nn.init.normal_(model.predict.weight, std=0.1)
    return Tipl(QUESTION, model, trial_basis, normaliser)


def window_tipl() -> WindowTipl:
    torch.manual_seed(0)
    return WindowTipl(QUESTION, WindowTransformer(SIZE, STEPS, 5))


def predictors() -> list[Predictor]:
    made = [
        *(PREDICTORS.load(name)(QUESTION) for name in PREDICTORS.own),
        WindowFloor(QUESTION),
        SvdFloor(QUESTION, trial_basis_of(config.Basis(rank=4))),
        SvdFloor(QUESTION, trial_basis_of(config.Basis(rank=4)), changes=True),
        tipl(config.Basis(rank=4), 4),
        tipl(config.Basis(rank=4), 4, residual=True),
        tipl(config.Basis(kind="shared", rank=4), 4),
        window_tipl(),
    ]
    for predictor in made:
        predictor.fit(trials(1, 2, 3), trials(4))
    return made


MADE = predictors()
every_predictor = pytest.mark.parametrize("predictor", MADE, ids=lambda one: f"{one.name}-{one.basis}")


def truth(weights_TP: np.ndarray, starts_B: np.ndarray = STARTS) -> np.ndarray:
    return weights_TP[starts_B[:, None] + np.asarray(STEPS)].astype(np.float64)


def skill(predictor: Predictor, weights_TP: np.ndarray) -> float:
    error = predictor.squared_errors(trial(weights_TP), STARTS).sum()
    return 1 - error / np.square(truth(weights_TP) - weights_TP[STARTS][:, None]).sum()


@every_predictor
def test_forecasts_have_one_row_of_weights_per_start_and_step(predictor):
    forecast_BHP = predictor.forecast(trial(trajectory()), STARTS)
    assert forecast_BHP.shape == (3, 4, 31)
    assert forecast_BHP.dtype == np.float32
    assert np.isfinite(forecast_BHP).all()


@every_predictor
def test_squared_errors_are_those_of_the_forecast_weights(predictor, monkeypatch):
    """For predictors on Gram matrices the two ways have nothing but the trajectory in common."""
    weights_TP = trajectory(num_weights=31)
    monkeypatch.setattr("tipl_ray.predict.predictor.FORECAST_BYTES", 4 * 5 * 31 * 2)
    forecast_BHP = predictor.forecast(trial(weights_TP), STARTS).astype(np.float64)
    direct_BH = np.square(forecast_BHP - truth(weights_TP)).sum(axis=2)
    np.testing.assert_allclose(predictor.squared_errors(trial(weights_TP), STARTS), direct_BH, rtol=1e-6)


@every_predictor
def test_a_predictor_is_causal_exactly_if_it_says_so(predictor):
    weights_TP = trajectory()
    changed_TP = weights_TP.copy()
    changed_TP[STARTS[0] + 1 :] += np.random.default_rng(5).normal(size=31).astype(np.float32)
    before, after = (predictor.forecast(trial(array_TP), STARTS[:1]) for array_TP in (weights_TP, changed_TP))
    assert np.array_equal(before, after) == predictor.causal


@pytest.mark.parametrize("predictor", [one for one in MADE if one.causal], ids=lambda one: one.name)
def test_a_causal_predictor_sees_its_context_alone(predictor):
    weights_TP = trajectory()
    poisoned_TP = weights_TP.copy()
    poisoned_TP[: STARTS[1] - 6] = 1e3
    np.testing.assert_allclose(
        predictor.forecast(trial(poisoned_TP), STARTS[1:2]), predictor.forecast(trial(weights_TP), STARTS[1:2])
    )


def test_copying_the_last_snapshot_has_skill_exactly_0():
    weights_TP = trajectory()
    copied_BHP = CopyLast(QUESTION).forecast(trial(weights_TP), STARTS)
    np.testing.assert_array_equal(copied_BHP, np.repeat(weights_TP[STARTS][:, None], 4, axis=1))
    assert skill(CopyLast(QUESTION), weights_TP) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("kind", [Linear, WindowLinear, Damped, RankOne, RankOneFromLast, DynamicModes, Ridge])
def test_a_straight_line_is_predicted_exactly(kind):
    weights_TP = (np.outer(np.arange(40), np.arange(31) - 4) + 3.0).astype(np.float32)
    predictor = kind(QUESTION)
    line = trial(weights_TP)
    fitting = Trials(bands=[line.band], weights=lambda: [weights_TP])
    predictor.fit(fitting, fitting)
    tolerance = 1e-2 if kind is Ridge else 1e-4  # a penalty is the price of a ridge
    np.testing.assert_allclose(predictor.forecast(line, STARTS), truth(weights_TP), rtol=tolerance, atol=tolerance)


def test_the_displacement_that_began_an_iteration_is_made_once_more_by_its_end():
    weights_TP = trajectory()
    # Start 12 is phase 2: the iteration began with the step from snapshot 10, and ends three steps on.
    forecast_HP = FirstAgain(QUESTION).forecast(trial(weights_TP), np.array([12]))[0]
    np.testing.assert_allclose(forecast_HP[2], weights_TP[12] + weights_TP[11] - weights_TP[10], rtol=1e-5, atol=1e-5)


def test_a_trajectory_that_stands_still_is_copied():
    still = trial(np.repeat(trajectory(0, 1), 40, axis=0))
    fitting = Trials(bands=[still.band], weights=lambda: [still.weights_TP])
    for predictor in predictors():
        if isinstance(predictor, Combination | WindowFloor):
            predictor.fit(fitting, fitting)
            np.testing.assert_array_equal(predictor.forecast(still, STARTS), truth(still.weights_TP))


def test_dynamic_modes_follow_a_spiral_and_do_not_explode():
    angle_T = 0.3 * np.arange(40)
    spiral_TP = (0.97 ** np.arange(40) * np.stack([np.cos(angle_T), np.sin(angle_T)])).T.astype(np.float32)
    modes = DynamicModes(QUESTION)
    modes.fitted = {"rank": np.array(2)}
    np.testing.assert_allclose(modes.forecast(trial(spiral_TP), STARTS), truth(spiral_TP), atol=1e-3)
    growing_TP = np.exp(np.arange(40))[:, None].astype(np.float32) * np.ones((1, 3), np.float32)
    last_B = growing_TP[STARTS, 0] - growing_TP[STARTS - 1, 0]
    ahead_BHP = modes.forecast(trial(growing_TP), STARTS) - growing_TP[STARTS][:, None]
    np.testing.assert_allclose(ahead_BHP[:, :, 0], np.outer(last_B, STEPS), rtol=0.02)


def test_ridge_is_the_least_squares_solution_phase_by_phase():
    moments = phase_moments(trials(1, 2, 3).bands, QUESTION)
    table_QHK = moments.ridge(0.0)
    phase = 3
    inputs, targets = [], []
    for seed in (1, 2, 3):
        weights_TP = trajectory(seed).astype(np.float64)
        for start in range(6, 35):
            if start % 5 == phase:
                inputs.append(np.diff(weights_TP[start - 6 : start + 1], axis=0).T)
                targets.append((weights_TP[start + np.asarray(STEPS)] - weights_TP[start]).T)
    expected_KH = np.linalg.lstsq(np.concatenate(inputs), np.concatenate(targets), rcond=None)[0]
    np.testing.assert_allclose(table_QHK[phase], expected_KH.T, rtol=1e-4, atol=1e-5)


def test_ridge_learns_what_depends_on_the_phase_and_beats_what_does_not():
    ridge, damped = Ridge(QUESTION), Damped(QUESTION)
    for predictor in (ridge, damped):
        predictor.fit(trials(*range(1, 9)), trials(10))
    assert skill(ridge, trajectory(11)) > skill(damped, trajectory(11)) > 0.1


def test_ridge_takes_the_penalty_that_validation_trials_prefer():
    """One short trial to fit on leaves noise in the coefficients: a penalty helps on others."""
    ridge, judge = Ridge(QUESTION), phase_moments(trials(5, 6, 7).bands, QUESTION)
    ridge.fit(trials(1), trials(5, 6, 7))
    moments = phase_moments(trials(1).bands, QUESTION)
    skills = [judge.mean_skill(moments.ridge(penalty)) for penalty in baselines.RIDGE_PENALTIES]
    assert baselines.RIDGE_PENALTIES[int(np.argmax(skills))] == float(ridge.fitted["penalty"])
    assert judge.mean_skill(ridge.table_QHK()) == max(skills) > skills[0]


def test_moments_judge_as_the_predictor_itself_is_judged():
    ridge, bands = Ridge(QUESTION), trials(6, 7).bands
    ridge.fit(trials(1, 2), trials(3))
    starts_B = np.arange(6, 35)
    error_H = sum(ridge.band_errors(band, starts_B).sum(axis=0) for band in bands)
    moved_H = sum(CopyLast(QUESTION).band_errors(band, starts_B).sum(axis=0) for band in bands)
    expected = float(np.mean(1 - error_H / moved_H))
    assert phase_moments(bands, QUESTION).mean_skill(ridge.table_QHK()) == pytest.approx(expected)


def test_ridge_on_the_context_needs_no_other_trial_where_iterations_resemble_each_other():
    """Displacements that are related within an iteration alone, and in every one alike: its coefficients are best."""
    question = Question(context=12, steps=(1, 3), snapshots_per_iteration=5)
    factor_QQ: NDArray[np.float64] = np.random.default_rng(0).standard_normal((5, 5))
    gram_NN = np.kron(np.eye(4), factor_QQ @ factor_QQ.T).astype(np.float64)
    for phase in range(5):
        # Displacement 0 of the first iteration leads to phase 1.
        first = (phase - 12) % 5
        window_NN = gram_NN[first : first + 15, first : first + 15]
        towards_HK = future_sums(question.steps) @ window_NN[12:, :12]
        best_HK = np.linalg.solve(window_NN[:12, :12], towards_HK.T).T
        own = RidgeOnContext(question)
        own.fitted = {"penalty": np.array(1e-9)}
        one_1 = np.array([1.0])
        contexts = Contexts(window_NN[None, :12, :12], np.array([phase]), one_1, one_1)
        np.testing.assert_allclose(own.coefficients(contexts)[0], best_HK, atol=1e-4)


def test_ridge_on_the_context_takes_the_penalty_that_validation_trials_prefer():
    own = RidgeOnContext(QUESTION)
    own.fit(trials(1), trials(5, 6, 7))
    skills = {}
    for penalty in CONTEXT_PENALTIES:
        other = RidgeOnContext(QUESTION)
        other.fitted = {"penalty": np.array(penalty)}
        starts_B = np.arange(6, 35)
        error_H = sum(other.band_errors(band, starts_B).sum(axis=0) for band in trials(5, 6, 7).bands)
        moved_H = sum(CopyLast(QUESTION).band_errors(band, starts_B).sum(axis=0) for band in trials(5, 6, 7).bands)
        skills[penalty] = np.mean(1 - error_H / moved_H)
    assert float(own.fitted["penalty"]) == max(skills, key=lambda penalty: skills[penalty])


def test_a_model_from_elsewhere_brings_its_ridge_along(tmp_path: Path):
    save_tipl(tmp_path, config.Basis(kind="window"))
    other = dataclasses.replace(EXPERIMENT, train=config.Train(data=("/other",)))
    here, there = (make_predictors(one, [str(tmp_path)]) for one in (EXPERIMENT, other))
    assert {one.name for one in there} - {one.name for one in here} == {"ridge-elsewhere"}
    (carried,) = (one for one in there if isinstance(one, RidgeElsewhere))
    np.testing.assert_array_equal(carried.table_QHK(), carried.model.ridge_QHK.double().numpy())


def test_models_of_several_seeds_are_all_asked(tmp_path: Path):
    save_tipl(tmp_path, config.Basis(kind="window"))
    made = make_predictors(EXPERIMENT, [str(tmp_path)] * 3)
    assert [one.seed for one in made if one.name == "tipl"] == [0, 1, 2]


def test_mean_trajectory_predicts_what_all_trials_have_in_common():
    drift_TP = np.square(np.arange(40))[:, None].astype(np.float32) * np.ones((1, 31), np.float32)
    weights = [drift_TP + trajectory(seed)[:1] for seed in (1, 2)]
    mean = MeanTrajectory(QUESTION)
    mean.fit(Trials(bands=[], weights=lambda: weights), Trials(bands=[], weights=list))
    other_TP = drift_TP + trajectory(3)[:1]
    np.testing.assert_allclose(mean.forecast(trial(other_TP), STARTS), truth(other_TP), rtol=1e-4)


def test_a_mean_trajectory_too_large_to_keep_is_kept_at_fewer_snapshots(monkeypatch):
    monkeypatch.setattr(baselines, "MEAN_BYTES", 4 * 31 * 14)
    line_TP = np.arange(40)[:, None].astype(np.float32) * np.ones((1, 31), np.float32)
    mean = MeanTrajectory(QUESTION)
    mean.fit(Trials(bands=[], weights=lambda: [line_TP]), Trials(bands=[], weights=list))
    assert mean.fitted["mean_MP"].shape == (14, 31)
    np.testing.assert_allclose(mean.forecast(trial(line_TP), STARTS), truth(line_TP), rtol=1e-5)


def test_no_combination_of_the_context_is_nearer_to_the_truth_than_the_window_floor():
    weights_TP = trajectory()
    floor = WindowFloor(QUESTION).squared_errors(trial(weights_TP), STARTS)
    answering = [one for one in predictors() if isinstance(one, Combination)]
    assert {one.name for one in answering} == {*combinations(), "tipl"}
    for predictor in answering:
        assert (predictor.squared_errors(trial(weights_TP), STARTS) >= floor - 1e-9).all()


def test_svd_floor_of_full_rank_is_the_truth():
    floor = SvdFloor(QUESTION, trial_basis_of(config.Basis(rank=31)))
    assert skill(floor, trajectory()) == pytest.approx(1.0, abs=1e-9)


def test_no_point_of_the_basis_is_nearer_to_the_truth_than_the_svd_floor():
    weights_TP = trajectory()
    trial_basis = trial_basis_of(config.Basis(rank=3))
    floor = skill(SvdFloor(QUESTION, trial_basis), weights_TP)
    assert skill(tipl(config.Basis(rank=3), 3), weights_TP) < floor < 1.0
    fitted = trial_basis.of(weights_TP)
    moved = fitted.decode(fitted.coordinates_TD + 0.01)[STARTS[:, None] + np.asarray(STEPS)]
    moved_error = np.square(moved - truth(weights_TP)).sum()
    assert moved_error > SvdFloor(QUESTION, trial_basis).squared_errors(trial(weights_TP), STARTS).sum()


def test_tipl_decodes_what_the_model_predicts_at_the_steps_asked_for():
    weights_TP = trajectory()
    predictor = tipl(config.Basis(rank=4), 4)
    fitted = predictor.trial_basis.of(weights_TP)
    tokens_BKD = predictor.normaliser.normalise(fitted.coordinates_TD[STARTS[:, None] + np.arange(-5, 1)])
    rolled_BFD = predictor.model.forecast(
        torch.from_numpy(tokens_BKD), torch.from_numpy(STARTS[:, None] + np.arange(-5, 1)), 5
    )
    forecast_BHP = predictor.forecast(trial(weights_TP), STARTS)
    for column, step in enumerate(STEPS):
        decoded_BP = fitted.decode(predictor.normaliser.restore(rolled_BFD[:, step - 1].numpy()))
        np.testing.assert_allclose(forecast_BHP[:, column], decoded_BP, rtol=1e-5, atol=1e-5)


def test_the_same_window_model_answers_for_policies_of_any_size_and_scale():
    predictor = window_tipl()
    small, large = trial(trajectory()), trial(1000.0 * trajectory())
    np.testing.assert_allclose(
        predictor.coefficients(small.band.contexts(STARTS, 6)),
        predictor.coefficients(large.band.contexts(STARTS, 6)),
        atol=1e-5,
    )
    rotation_PP = np.linalg.qr(np.random.default_rng(0).normal(size=(50, 31)))[0].T
    wider = trial((trajectory() @ rotation_PP).astype(np.float32))
    np.testing.assert_allclose(
        predictor.squared_errors(wider, STARTS), predictor.squared_errors(small, STARTS), rtol=1e-3
    )


def test_the_basis_is_fitted_once_per_trajectory_and_does_not_keep_it_alive():
    trial_basis = trial_basis_of(config.Basis(rank=3))
    weights_TP = trajectory()
    fitted = trial_basis.of(weights_TP)
    assert trial_basis.of(weights_TP) is fitted
    assert trial_basis.of(weights_TP.copy()) is not fitted
    reference = weakref.ref(weights_TP)
    trial_basis.of(weights_TP)
    del weights_TP, fitted
    gc.collect()
    assert reference() is None


def save_tipl(folder: Path, basis: config.Basis) -> Tipl | WindowTipl:
    about = {"basis": as_table(basis)}
    if basis.kind == "window":
        ours = window_tipl()
        ours.model.save(str(folder), about)
        return ours
    predictor = tipl(basis, 4)
    predictor.model.save(str(folder), about | {"normaliser": predictor.normaliser.as_table()})
    return predictor


@pytest.mark.parametrize("basis", [config.Basis(rank=4), config.Basis(kind="window")])
def test_saved_tipl_forecasts_the_same_when_loaded(tmp_path: Path, basis: config.Basis):
    saved = save_tipl(tmp_path, basis)
    loaded = load_tipl(str(tmp_path), QUESTION)
    assert type(loaded) is type(saved)
    np.testing.assert_array_equal(
        loaded.forecast(trial(trajectory()), STARTS), saved.forecast(trial(trajectory()), STARTS)
    )


def test_everything_that_was_fitted_forecasts_the_same_when_loaded(tmp_path: Path):
    save_tipl(tmp_path, config.Basis(kind="window"))
    fitted, loaded = (make_predictors(EXPERIMENT, [str(tmp_path)]) for _ in range(2))
    for predictor in fitted:
        predictor.fit(trials(1, 2, 3), trials(4))
    load_fitted(loaded, save_fitted(fitted))
    for one, other in zip(fitted, loaded, strict=True):
        np.testing.assert_array_equal(
            other.forecast(trial(trajectory()), STARTS), one.forecast(trial(trajectory()), STARTS)
        )


def test_the_floor_is_that_of_tipls_basis(tmp_path: Path):
    for basis, floor in ((config.Basis(rank=4), "svd-floor"), (config.Basis(kind="window"), "window-floor")):
        save_tipl(tmp_path / basis.kind, basis)
        names = [predictor.name for predictor in make_predictors(EXPERIMENT, [str(tmp_path / basis.kind)])]
        assert names[-2:] == ["tipl", floor]
        assert names[:-2] == [name for name in PREDICTORS.own if PREDICTORS.load(name).in_tables]


def test_single_weights_have_no_upper_bound(tmp_path: Path):
    basis, layout = config.Basis(kind="per-weight"), (("w", (trajectory().shape[1],), 0),)
    PerWeightTransformer(window_tipl().model, layout).save(str(tmp_path), {"basis": as_table(basis)})
    predictors = make_predictors(EXPERIMENT, [str(tmp_path)])
    assert [predictor.name for predictor in predictors][-1] == "tipl"
    assert np.isfinite(predictors[-1].forecast(trial(trajectory()), STARTS)).all()


def test_trajectory_longer_than_those_of_training_is_still_forecast():
    short = tipl(config.Basis(rank=4), 4, num_snapshots=10)
    assert np.isfinite(short.forecast(trial(trajectory()), STARTS)).all()
    mean = MeanTrajectory(QUESTION)
    mean.fit(Trials(bands=[], weights=lambda: [trajectory(1, 15)]), Trials(bands=[], weights=list))
    np.testing.assert_array_equal(mean.forecast(trial(trajectory()), STARTS)[2], trajectory()[[20] * 4])


def test_starts_without_enough_snapshots_are_refused():
    one = trial(trajectory())
    for predictor in predictors():
        with pytest.raises(ValueError, match="start=4 is not between 6 and 3"):
            predictor.forecast(one, np.array([7, 4]))
        with pytest.raises(ValueError, match="start=35 is not between 6 and 34"):
            predictor.squared_errors(one, np.array([35]))


def test_a_model_that_was_trained_for_another_question_is_refused():
    with pytest.raises(ValueError, match=r"the model answers for context 6, steps \(1, 2, 3, 5\) and 5 phases"):
        WindowTipl(Question(context=6, steps=(1, 2), snapshots_per_iteration=5), window_tipl().model)
    with pytest.raises(ValueError, match="tokens of 3 numbers do not fit a model of 4"):
        Tipl(
            QUESTION,
            tipl(config.Basis(rank=4), 4).model,
            trial_basis_of(config.Basis(rank=3)),
            Normaliser(mean_D=np.zeros(3, np.float32), deviation_D=np.ones(3, np.float32)),
        ).forecast(trial(trajectory()), STARTS)


def saved_ridge(folder: Path) -> Path:
    """A fitted ridge regression as `save_predictor` leaves it."""
    ridge = Ridge(QUESTION)
    ridge.fitted = {"coefficients_QHK": np.full((5, len(QUESTION.steps), QUESTION.context), 0.1)}
    save_predictor(ridge, str(folder), {"trained_on": "Line-v0"})
    return folder


def one_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["predictor.safetensors", "predictor.json"])
@pytest.mark.parametrize("damage", [one_bit, lambda path: path.write_bytes(b"")])
def test_a_predictor_that_is_not_the_one_saved_is_refused_in_one_line(
    name: str, damage: Callable[[Path], None], tmp_path: Path
) -> None:
    saved_ridge(tmp_path)
    damage(tmp_path / name)
    with pytest.raises(
        StoreError, match=f"{name}: is damaged: its SHA-256 is not the one in predictor.sha256; restore"
    ):
        load_predictor(str(tmp_path))


def test_a_predictor_of_an_earlier_version_has_no_record_and_is_loaded_if_it_is_one(tmp_path: Path) -> None:
    saved_ridge(tmp_path)
    (tmp_path / "predictor.sha256").unlink()
    assert load_predictor(str(tmp_path)).name == "ridge"
    (tmp_path / "predictor.safetensors").unlink()
    with pytest.raises(StoreError, match=r"predictor\.safetensors: is missing"):
        load_predictor(str(tmp_path))
    (tmp_path / "predictor.json").write_text('{"name": "rigde"}')
    with pytest.raises(StoreError, match=r"predictor\.json: is not understood"):
        load_predictor(str(tmp_path))


def test_a_shared_basis_that_is_not_the_one_saved_is_refused(tmp_path: Path) -> None:
    basis = fit_shared_basis(
        [np.random.default_rng(seed).standard_normal((9, 7)).astype(np.float32) for seed in (1, 2)], 3
    )
    normaliser = Normaliser(mean_D=np.zeros(3, np.float32), deviation_D=np.ones(3, np.float32))
    about = {"basis": {"kind": "shared", "rank": 3}, "normaliser": normaliser.as_table()}
    model = CausalTransformer(config.Model(context=4, embedding=8, layers=1), 3, 9)
    model.save(str(tmp_path), about, {"basis.safetensors": basis.to_bytes()})
    assert load_tipl(str(tmp_path), QUESTION).basis == "shared"
    one_bit(tmp_path / "basis.safetensors")
    with pytest.raises(StoreError, match=r"basis\.safetensors: is damaged"):
        load_tipl(str(tmp_path), QUESTION)


def trained(storage: Path, name: str, **fields: Any) -> str:
    """The folder of a model as training leaves it, of an experiment with some fields changed."""
    settings = config.Experiment(name="line", basis=config.Basis(kind=fields.pop("kind", "window")), **fields)
    about = {
        "experiment": as_table(settings),
        "basis": as_table(settings.basis),
        "metrics": {"validation_skill": 0.25},
    }
    size = config.Model(context=4, embedding=8, layers=1)
    WindowTransformer(size, (1, 2, 3), 5).save(str(storage / "models" / name), about)
    return str(storage / "models" / name)


def test_a_storages_one_model_that_can_jump_is_found_and_several_are_listed_by_what_differs(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"contains neither a saved predictor nor a trained model that forecasts displacements$"
    ):
        load_predictor(str(tmp_path))
    trained(tmp_path, "0", kind="trial")
    (tmp_path / "models" / "half_made").mkdir()
    with pytest.raises(ValueError, match=r"of its 1 models none answers with displacements \(train with"):
        load_predictor(str(tmp_path))
    first = trained(tmp_path, "1")
    for place in (str(tmp_path), str(tmp_path / "models"), first):
        assert find_predictor(place) == first
        assert load_predictor(place).name == "tipl"
    assert predictor_digest(str(tmp_path)) == predictor_digest(first)
    second = trained(tmp_path, "2", train=config.Train(seed=7), preset="causal")
    with pytest.raises(ValueError, match="contains 2 models; use the folder of one") as refused:
        load_predictor(str(tmp_path))
    assert f"{first} (preset=paper, train.seed=0, one-step skill 0.250 in validation)" in str(refused.value)
    assert f"{second} (preset=causal, train.seed=7, one-step skill 0.250 in validation)" in str(refused.value)
    assert find_predictor(second) == second


@pytest.mark.parametrize("name", published_predictors())
def test_a_published_predictor_is_small_has_a_card_and_is_loaded_by_its_name(name: str) -> None:
    folder = PUBLISHED_FOLDER / name
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 2**20
    card = (folder / "card.md").read_text()
    assert card.startswith(f"# {name}\n")
    # Where it was made is nobody's business.
    assert not any('"where"' in file.read_text() for file in folder.glob("*.json"))
    # What it learned from, and that it is read as it was published.
    assert predictor_digest(name) in card
    predictor = load_predictor(name)
    context = predictor.question.context
    contexts = Contexts(
        grams_BKK=np.eye(context)[None],
        phases_B=np.array([predictor.question.snapshots_per_iteration - 1]),
        progress_B=np.array([0.3]),
        learning_rates_B=np.array([0.7]),
    )
    assert np.isfinite(predictor.coefficients(contexts)).all()


def test_a_name_that_is_no_published_predictor_is_answered_with_those_that_there_are() -> None:
    with pytest.raises(ValueError, match="not a predictor published with this package") as refused:
        load_predictor("return-rul-v1")
    assert str(refused.value).endswith("did you mean return-rule-v1?")
    assert all(name in str(refused.value) for name in published_predictors())
