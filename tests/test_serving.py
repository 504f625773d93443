"""A logged model, loaded as MLflow's users do."""

import dataclasses
from pathlib import Path
from typing import Any

import mlflow
import mlflow.pyfunc
import numpy as np
import pytest
import torch

from tipl_ray import config, tracking
from tipl_ray.digest import as_table
from tipl_ray.predict.gram import Question, make_band
from tipl_ray.predict.predictor import Trial
from tipl_ray.predict.saved import find_model
from tipl_ray.serving import Forecaster
from tipl_ray.window.predictor import WindowTipl
from tipl_ray.window.transformer import WindowTransformer

EXPERIMENT = config.Experiment(
    name="tiny",
    collect=config.Collect(num_trials=4, total_env_steps=8 * 2048),
    split=config.Split(validation_trials=1, test_trials=1),
    basis=config.Basis(kind="window"),
    model=config.Model(context=6, embedding=16, layers=1),
    evaluate=config.Evaluate(horizon=2),
)
QUESTION = Question.of(EXPERIMENT)
WEIGHTS_TP = np.random.default_rng(0).standard_normal((EXPERIMENT.num_snapshots, 13)).astype(np.float32).cumsum(axis=0)


def model(experiment: config.Experiment = EXPERIMENT) -> WindowTransformer:
    torch.manual_seed(0)
    built = WindowTransformer(experiment.model, QUESTION.steps, QUESTION.snapshots_per_iteration)
    torch.nn.init.normal_(built.predict.weight, std=0.1)
    return built


def log(storage: Path, experiment: config.Experiment) -> Any:
    about = {"experiment": as_table(experiment), "basis": as_table(experiment.basis)}
    model(experiment).save(str(storage / "saved"), about)
    tracker = tracking.Tracker.open(f"sqlite:///{storage}/mlflow.db", "tiny", str(storage))
    with tracker.run("train", "train") as run:
        run.log_model_folder(storage / "saved", loader="tipl_ray.serving")
    # `mlflow.set_tracking_uri` would set it for every test after this one.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", tracker.uri)
        return mlflow.pyfunc.load_model(f"runs:/{run.run_id}/model")


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return log(tmp_path_factory.mktemp("serving"), EXPERIMENT)


def test_a_logged_model_forecasts_as_the_one_that_was_saved(loaded: Any) -> None:
    band = make_band(WEIGHTS_TP, QUESTION.width, snapshots_per_iteration=QUESTION.snapshots_per_iteration)
    starts_B = np.array([10, 30])
    expected_BHP = WindowTipl(QUESTION, model()).forecast(Trial(weights_TP=WEIGHTS_TP, band=band), starts_B)
    found_BHP = loaded.predict({"weights": WEIGHTS_TP, "starts": starts_B})
    np.testing.assert_allclose(found_BHP, expected_BHP, rtol=1e-5, atol=1e-5)


def test_a_trial_that_goes_on_is_forecast_from_what_there_is_of_it(loaded: Any) -> None:
    whole_BHP = loaded.predict({"weights": WEIGHTS_TP, "starts": 15})
    np.testing.assert_allclose(loaded.predict({"weights": WEIGHTS_TP[:16]}), whole_BHP, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"weights": WEIGHTS_TP[0]}, r"weights has shape \(13,\)"),
        ({"weights": WEIGHTS_TP[:5]}, "6 snapshots are needed before it"),
        ({"weights": WEIGHTS_TP, "starts": 41}, "start=41 is not between"),
    ],
)
def test_what_cannot_be_forecast_is_refused(loaded: Any, asked: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        loaded.predict(asked)


def test_a_model_that_goes_by_the_learning_rate_asks_for_it(tmp_path: Path) -> None:
    clocked = dataclasses.replace(EXPERIMENT, model=dataclasses.replace(EXPERIMENT.model, clock="learning_rate"))
    loaded = log(tmp_path, clocked)
    with pytest.raises(ValueError, match="learning_rates is missing"):
        loaded.predict({"weights": WEIGHTS_TP})
    rates_T = np.linspace(3e-4, 1e-6, len(WEIGHTS_TP))
    with pytest.raises(ValueError, match=f"learning_rates has 3 entries for {len(WEIGHTS_TP)} snapshots"):
        loaded.predict({"weights": WEIGHTS_TP, "learning_rates": rates_T[:3]})
    assert loaded.predict({"weights": WEIGHTS_TP, "learning_rates": rates_T}).shape == (1, 2, 13)


@pytest.mark.parametrize("name", ["tipl-all-tasks-v1", "tipl-half-cheetah-v1", "tipl-inverted-pendulum-v1"])
def test_a_published_model_forecasts_in_three_lines(name: str) -> None:
    forecaster = Forecaster.from_pretrained(name)
    weights_BHP = forecaster.forecast(WEIGHTS_TP, [20, 30])
    assert weights_BHP.shape == (2, len(forecaster.steps), WEIGHTS_TP.shape[1])
    assert (forecaster.context, forecaster.steps[:2]) == (20, (1, 2))
    # Nothing after a start is used.
    np.testing.assert_allclose(forecaster.forecast(WEIGHTS_TP[:21]), weights_BHP[:1], rtol=1e-5, atol=1e-5)
    # A trial of 41 snapshots is further through at its 21st than one of thousands is.
    assert not np.allclose(forecaster.forecast(WEIGHTS_TP[:21], num_snapshots=41), weights_BHP[:1], rtol=1e-4)
    with pytest.raises(ValueError, match="num_snapshots=20 is less than the 21 snapshots given"):
        forecaster.forecast(WEIGHTS_TP[:21], num_snapshots=20)


def test_a_model_is_found_by_its_folder_or_its_storage_and_a_rule_is_none(tmp_path: Path) -> None:
    about = {"experiment": as_table(EXPERIMENT), "basis": as_table(EXPERIMENT.basis)}
    model().save(str(tmp_path / "models" / "one"), about)
    for place in (tmp_path, tmp_path / "models", tmp_path / "models" / "one"):
        assert find_model(str(place)) == str(tmp_path / "models" / "one")
    model().save(str(tmp_path / "models" / "two"), about)
    with pytest.raises(ValueError, match="contains 2 models; use the folder of one: "):
        Forecaster.from_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match="contains no trained model: it has a rule for jumps, see load_predictor"):
        Forecaster.from_pretrained("first-again-v1")
    with pytest.raises(ValueError, match=r"no such folder, and not a predictor published .*; did you mean tipl-half"):
        Forecaster.from_pretrained("tipl-half-cheeta-v1")
    with pytest.raises(ValueError, match=r"nothing contains no trained model$"):
        Forecaster.from_pretrained(str(tmp_path / "nothing"))
