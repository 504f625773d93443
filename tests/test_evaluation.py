import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from trajectories import write_trials

from tipl_ray import config
from tipl_ray.data.snapshots import Snapshot
from tipl_ray.data.storage import StoreError, publish
from tipl_ray.data.trajectory_store import TrajectoryStore
from tipl_ray.data.trial_writer import TrialWriter
from tipl_ray.digest import as_table
from tipl_ray.evaluate import evaluation, metrics
from tipl_ray.predict.baselines import CopyLast
from tipl_ray.predict.gram import Contexts, Question
from tipl_ray.predict.predictor import Predictor, Starts, Trial, Weights
from tipl_ray.predict.saved import save_fitted
from tipl_ray.window.transformer import WindowTransformer


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def experiment(storage: Path) -> config.Experiment:
    """Two trials to train, one to choose and one to report, of 41 snapshots each."""
    return config.Experiment(
        name="tiny",
        where=config.Where(storage=str(storage)),
        collect=config.Collect(num_trials=4, total_env_steps=8 * 2048),
        split=config.Split(validation_trials=1, test_trials=1),
        basis=config.Basis(kind="window"),
        model=config.Model(context=6, embedding=16, layers=1),
        evaluate=config.Evaluate(horizon=2, extra_horizons=(5,), windows_per_trial=2, episodes=2),
    ).check()


def trajectory(seed: int, scale: float = 1.0) -> np.ndarray:
    steps_TP = np.random.default_rng(seed).standard_normal((41, 122))
    return (scale * 0.05 * steps_TP.cumsum(axis=0)).astype(np.float32)


def write_models(storage: Path) -> list[str]:
    torch.manual_seed(0)
    settings, folder = experiment(storage), f"{storage}/models/tiny"
    question = Question.of(settings)
    model = WindowTransformer(settings.model, question.steps, question.snapshots_per_iteration)
    model.save(folder, {"basis": as_table(settings.basis)})
    return [folder]


def take_unchecked(writer: TrialWriter, snapshot: Snapshot, field: str, *_: object) -> np.ndarray:
    """In place of the writer's check, which lets no NaN into a data set."""
    return getattr(snapshot, field).copy()


@pytest.fixture
def storage(tmp_path: Path) -> Path:
    write_trials(tmp_path, {seed: trajectory(seed) for seed in (1, 2, 3, 4)})
    return tmp_path


def test_nothing_of_a_test_trial_is_touched_while_fitting(
    storage: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
):
    """A test trial of NaN changes no bit of what is fitted, and a missing one is not missed."""
    fitted = evaluation.fit_predictors(experiment(storage), write_models(storage))
    poisoned, missing = (tmp_path_factory.mktemp(name) for name in ("poisoned", "missing"))
    trials = {seed: trajectory(seed) for seed in (1, 2, 3)}
    write_trials(missing, trials)
    monkeypatch.setattr(TrialWriter, "_checked_copy", take_unchecked)
    write_trials(poisoned, trials | {4: np.full((41, 122), np.nan, np.float32)})
    assert experiment(poisoned).test_seeds == (4,)
    assert np.isnan(TrajectoryStore(str(poisoned)).trajectory(4).weights_TP).all()
    for folder in (poisoned, missing):
        assert evaluation.fit_predictors(experiment(folder), write_models(folder)) == fitted


def test_training_trials_do_change_what_is_fitted(storage: Path, tmp_path_factory: pytest.TempPathFactory):
    """Without this, the test before could pass for the wrong reason."""
    other = tmp_path_factory.mktemp("other")
    write_trials(other, {seed: trajectory(seed, scale=1.0 + (seed == 1)) for seed in (1, 2, 3)})
    fitted, changed = (
        evaluation.fit_predictors(experiment(folder), write_models(folder)) for folder in (storage, other)
    )
    assert changed != fitted


def test_every_predictor_has_a_row_per_window_and_step_with_the_same_displacement(storage: Path):
    settings, model = experiment(storage), write_models(storage)
    table = evaluation.forecast_errors(settings, model, evaluation.fit_predictors(settings, model), 4)
    rows = list(metrics.by(table, "start", "step"))
    assert len(rows) == len(evaluation.window_starts(settings)) * 3
    for _, group in rows:
        assert group["predictor"].tolist() == [one.name for one in evaluation.make_predictors(settings, model)]
        assert len(set(group["displacement_squared"].tolist())) == 1
    assert set(table["step"].tolist()) == {1, 2, 5}
    assert (table["phase"] == table["start"] % 5).all()
    copied = metrics.summarise(
        {name: column[table["predictor"] == "copy-last"] for name, column in table.items()},
        metrics.Resampling(confidence=0.95, bootstrap=10, seed=0),
        trained_on="Line-v0",
    )
    assert [row["skill"] for row in copied] == [0.0, 0.0, 0.0]


def test_models_of_several_seeds_have_rows_of_their_own_and_one_summary(storage: Path):
    settings, models = experiment(storage), write_models(storage) * 2
    fitted = evaluation.fit_predictors(settings, models)
    errors = evaluation.forecast_errors(settings, models, fitted, 4)
    starts_B = evaluation.run_starts(settings)
    returns = evaluation.forecast_returns(settings, models, fitted, 4, starts_B)
    # In parts, as a larger cluster runs them, they are the same to the bit.
    parts = [
        evaluation.forecast_returns(settings, models, fitted, 4, starts_B, slice(i, i + 1))
        for i in range(len(starts_B))
    ]
    for name, column in returns.items():
        together = np.concatenate([part[name] for part in parts])
        np.testing.assert_array_equal(np.sort(together), np.sort(column), name)
    table = evaluation._join(errors, returns)
    own = {name: column[table["predictor"] == "tipl"] for name, column in table.items()}
    assert set(own["predictor_seed"].tolist()) == {0, 1}
    first, second = (own["squared_error"][own["predictor_seed"] == seed] for seed in (0, 1))
    np.testing.assert_array_equal(first, second)
    rows = metrics.summarise(table, metrics.Resampling(confidence=0.95, bootstrap=10, seed=0), trained_on="Line-v0")
    assert {(row["predictor"], row["seeds"]) for row in rows} >= {("tipl", 2), ("ridge", 1)}
    assert len({row["windows"] for row in rows}) == 1


def test_a_path_has_every_snapshot_in_its_own_plane_and_forecasts_beyond_their_starts(storage: Path):
    settings, models = experiment(storage), write_models(storage)
    table = evaluation.path_table(settings, models, evaluation.fit_predictors(settings, models), 4)
    own = table["start"] < 0
    assert table["snapshot"][own].tolist() == list(range(41))
    weights_TP = trajectory(4).astype(np.float64)
    _, singular_values, right = np.linalg.svd(weights_TP - weights_TP.mean(axis=0), full_matrices=False)
    points_T2 = (weights_TP - weights_TP.mean(axis=0)) @ right[:2].T
    np.testing.assert_allclose(
        np.abs(np.stack([table["x"][own], table["y"][own]], axis=1)), np.abs(points_T2), atol=1e-4
    )
    shares = singular_values**2 / (singular_values**2).sum()
    assert (table["share_x"][0], table["share_y"][0]) == pytest.approx(tuple(shares[:2]))
    assert set((table["snapshot"] - table["start"])[~own].tolist()) == {1, 2}, "the horizon, not steps beyond it"
    assert set(table["start"][~own].tolist()) <= set(evaluation.window_starts(settings).tolist())


def test_distances_between_policies_are_those_of_their_weights():
    policies_BHP = np.random.default_rng(0).standard_normal((4, 2, 7)).astype(np.float32)
    apart = np.linalg.norm(policies_BHP[:, None] - policies_BHP[None], axis=3).sum(axis=1) / 3
    np.testing.assert_allclose(evaluation._distances(policies_BHP), apart, rtol=1e-5)


class Truth(Predictor):
    """Given the future, as no predictor is."""

    name, causal = "ridge", False

    def forecast(self, trial: Trial, starts_B: Starts) -> Weights:
        """The true weights."""
        return trial.weights_TP[np.asarray(starts_B)[:, None] + np.asarray(self.question.steps)]


def test_a_predictor_that_is_given_the_truth_has_skill_1_and_the_true_policies_returns(
    storage: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(
        evaluation, "make_predictors", lambda one, folders: [kind(Question.of(one)) for kind in (CopyLast, Truth)]
    )
    settings, starts_B = experiment(storage), evaluation.run_starts(experiment(storage))
    errors = evaluation.forecast_errors(settings, ["none"], save_fitted([]), 4)
    returns = evaluation.forecast_returns(settings, ["none"], save_fitted([]), 4, starts_B)
    table = evaluation._join(errors, returns)
    truth = {name: column[table["predictor"] == "ridge"] for name, column in table.items()}
    assert metrics.skill(truth) == 1.0
    run = ~np.isnan(truth["return_true"])
    assert run.sum() == 2 * 3
    np.testing.assert_array_equal(truth["return_predicted"][run], truth["return_true"][run])
    # On other episodes, the truth's REPW is the noise floor.
    again = {**truth, "return_predicted": truth["return_true_again"]}
    assert metrics.repw(again) == metrics.noise_floor(truth) > 0
    copied = {name: column[table["predictor"] == "copy-last"] for name, column in table.items()}
    assert metrics.skill(copied) == 0.0
    np.testing.assert_array_equal(copied["return_predicted"][run], copied["return_last"][run])


RESAMPLING = metrics.Resampling(confidence=0.95, bootstrap=10, seed=0)


def whole_table(settings: config.Experiment, models: list[str]) -> metrics.Table:
    fitted = evaluation.fit_predictors(settings, models)
    errors = evaluation.forecast_errors(settings, models, fitted, 4)
    return evaluation._join(
        errors, evaluation.forecast_returns(settings, models, fitted, 4, evaluation.run_starts(settings))
    )


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("still", [(1, 2, 3, 4), (4,), (1, 2, 3)])
def test_trials_that_stand_still_have_no_skill_and_break_nothing(still: tuple[int, ...], tmp_path: Path):
    trials = {seed: trajectory(seed, scale=0.0 if seed in still else 1.0) + np.float32(0.1) for seed in (1, 2, 3, 4)}
    write_trials(tmp_path, trials)
    settings = experiment(tmp_path)
    table = whole_table(settings, write_models(tmp_path))
    rows = metrics.summarise(table, RESAMPLING, trained_on="Line-v0")
    copied = [row for row in rows if row["predictor"] == "copy-last"]
    if 4 in still:
        assert all(np.isnan(row["skill"]) for row in rows)
        assert [row["wpe"] for row in copied] == [row["repw"] for row in copied] == [0.0, 0.0, 0.0]
    else:
        assert [row["skill"] for row in copied] == [0.0, 0.0, 0.0]
    assert all(np.isfinite(list(row.values())[2:]).all() for row in evaluation.reconstruction_rows(settings, 4))


def test_a_predictor_that_is_not_finite_anywhere_has_no_figure_instead_of_a_good_one(
    storage: Path, monkeypatch: pytest.MonkeyPatch
):
    """MuJoCo would start a policy of NaN again and again, and return something."""

    class Failing(CopyLast):
        name = "tipl"

        def coefficients(self, contexts: Contexts) -> np.ndarray:
            found = super().coefficients(contexts).copy()
            found[contexts.progress_B > 0.5, 1] = np.nan
            return found

    monkeypatch.setattr(
        evaluation, "make_predictors", lambda one, folders: [kind(Question.of(one)) for kind in (CopyLast, Failing)]
    )
    monkeypatch.chdir(storage)
    rows = metrics.summarise(whole_table(experiment(storage), ["none"]), RESAMPLING, trained_on="Line-v0")
    figures = {
        row["step"]: [row[name] for name in ("skill", "repw", "beats_last")]
        for row in rows
        if row["predictor"] == "tipl"
    }
    assert np.isnan(figures[2]).all()
    assert np.isfinite(figures[1] + figures[5]).all()
    assert not (storage / "MUJOCO_LOG.TXT").exists()


def test_the_callers_threads_are_as_many_as_before(storage: Path):
    torch.set_num_threads(2)
    evaluation.fit_predictors(experiment(storage), write_models(storage))
    assert torch.get_num_threads() == 2


def one_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def unrecorded(path: Path) -> None:
    """As an earlier version left it."""
    (path.parent / "results.sha256").unlink()


def unrecorded_and_empty(path: Path) -> None:
    unrecorded(path)
    path.write_bytes(b"")


@pytest.mark.parametrize("name", ["results.parquet", "reconstruction.json"])
@pytest.mark.parametrize(
    ("damage", "believed"),
    [
        (one_bit, False),
        (Path.unlink, False),
        (lambda path: path.write_bytes(b""), False),
        (unrecorded, True),
        (unrecorded_and_empty, False),
    ],
)
def test_an_evaluation_that_is_there_is_believed_if_it_is_the_one_that_was_made(
    name: str, damage: Callable[[Path], None], believed: bool, tmp_path: Path
):
    folder = str(tmp_path / "evaluation")
    assert not evaluation.is_evaluated(folder)
    files = {"results.parquet": evaluation._as_parquet({"step": np.arange(3)}), "reconstruction.json": b"[]"}
    publish(folder, files, evaluation.RECORD_FILE)
    assert evaluation.is_evaluated(folder)
    damage(tmp_path / "evaluation" / name)
    assert evaluation.is_evaluated(folder) == believed


def test_a_damaged_evaluation_is_computed_again_to_the_same_bytes_and_a_damaged_model_refused(
    cluster: None, storage: Path, capsys: pytest.CaptureFixture[str]
):
    settings, models = experiment(storage), write_models(storage)
    settings = dataclasses.replace(settings, evaluate=dataclasses.replace(settings.evaluate, run_policies_of=()))
    folder = Path(evaluation.evaluate(settings, models).folder)
    made = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert "damaged" not in capsys.readouterr().out
    one_bit(folder / "results.parquet")
    (folder / "summary.csv").unlink()
    evaluation.evaluate(settings, models)
    assert f"evaluate: the results in {folder} are damaged and are computed again" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == made
    one_bit(Path(models[0]) / "model.safetensors")
    with pytest.raises(StoreError, match=r"model\.safetensors: is damaged"):
        evaluation.evaluate(settings, models)
