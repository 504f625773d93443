import dataclasses
import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import ray
import ray.train
import torch
from trajectories import write_trials

from tipl_ray import config
from tipl_ray.data.storage import StoreError
from tipl_ray.data.trajectory_store import TrajectoryStore
from tipl_ray.digest import as_table
from tipl_ray.paper.predictor import Tipl
from tipl_ray.paper.temporal_svd import fit_basis, fit_shared_basis
from tipl_ray.paper.tokens import Tokens, tokens_of
from tipl_ray.paper.transformer import CausalTransformer, Normaliser
from tipl_ray.per_weight.samples import WeightSample, sample_weights
from tipl_ray.predict.gram import GramBand, Question, banded_products, make_band, moved_squares
from tipl_ray.predict.models import load_about, load_model
from tipl_ray.predict.objective import draw_windows
from tipl_ray.predict.predictor import Trial
from tipl_ray.predict.representation import TrainingData, load_tipl, representation_of
from tipl_ray.train import data_sets, ray_train, training
from tipl_ray.window.transformer import WindowTransformer

PPO = {"ppo": {"num_epochs": 10}, "epochs_per_snapshot": 2}

Kind = Literal["trial", "shared", "window", "per-weight"]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def experiment(
    storage: Path | str = "/nowhere",
    kind: Kind = "trial",
    num_workers: int = 1,
    **train: int | float | str,
) -> config.Experiment:
    """Two trials to train, one to choose and one to report, of 41 snapshots each."""
    schedule = {"num_steps": 30, "steps_per_iteration": 10, "batch_size": 8, "warmup_steps": 5, "learning_rate": 1e-3}
    return config.Experiment(
        name="tiny",
        where=config.Where(storage=str(storage), num_workers=num_workers),
        collect=config.Collect(num_trials=4, first_seed=3, total_env_steps=8 * 2048),
        split=config.Split(validation_trials=1, test_trials=1),
        basis=config.Basis(kind=kind, rank=4),
        model=config.Model(context=6, embedding=16, layers=2, heads=2, dropout=0.1),
        train=config.Train(**(schedule | train)),  # type: ignore[arg-type]
        evaluate=config.Evaluate(horizon=2),
    ).check()


def trajectory(seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return (0.1 * generator.standard_normal((41, 13)).cumsum(axis=0) + generator.standard_normal(13)).astype(np.float32)


def tokens(*seeds: int) -> Tokens:
    trajectories = {seed: trajectory(seed) for seed in seeds}
    return Tokens.stack(
        [
            tokens_of(seed, w_TP, fit_basis(w_TP, 4), moved_squares(banded_products(w_TP, 10), 10))
            for seed, w_TP in trajectories.items()
        ]
    )


def bands(*seeds: int) -> list[GramBand]:
    question = Question.of(experiment())
    rates_T = np.full(41, 3e-4)
    return [
        make_band(trajectory(seed), question.width, snapshots_per_iteration=5, learning_rates_T=rates_T)
        for seed in seeds
    ]


def samples(*seeds: int) -> list[WeightSample]:
    layout = (("w", (13,), 0),)
    return [
        sample_weights(trajectory(seed), layout, band, seed) for seed, band in zip(seeds, bands(*seeds), strict=True)
    ]


def data(kind: str = "trial") -> TrainingData:
    if kind == "per-weight":
        return TrainingData(train=samples(3, 4), validation=samples(5))
    if kind == "window":
        return TrainingData(train=bands(3, 4), validation=bands(5))
    return TrainingData(train=tokens(3, 4), validation=tokens(5))


def of_kind(kind: Kind, **train: int | float | str) -> training.Training:
    return training.Training(experiment("/nowhere", kind, 1, **train), data(kind))


each_basis = pytest.mark.parametrize("kind", ["trial", "window", "per-weight"])


def write_store(root: Path, seeds: tuple[int, ...]) -> TrajectoryStore:
    return write_trials(root, {seed: trajectory(seed) for seed in seeds}, PPO)


def assert_equal_weights(one: torch.nn.Module, other: torch.nn.Module) -> None:
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


def without_time(history: list[training.Metrics]) -> list[training.Metrics]:
    return [{key: value for key, value in row.items() if "second" not in key} for row in history]


@each_basis
def test_training_in_bfloat16_learns_as_in_float32_and_is_validated_in_float32(kind):
    exact, halved = of_kind(kind), of_kind(kind, precision="bfloat16")
    assert [row["validation_loss"] for row in exact.iterations()] == pytest.approx(
        [row["validation_loss"] for row in halved.iterations()], rel=0.02
    )
    trained = [torch.cat([weight.flatten() for weight in run.model.parameters()]) for run in (exact, halved)]
    assert not torch.equal(*trained)
    assert {parameter.dtype for parameter in halved.model.parameters()} == {torch.float32}
    halved.model.load_state_dict(exact.model.state_dict())
    assert halved.objective.validate() == exact.objective.validate()


@each_basis
def test_training_lowers_the_loss_and_is_the_same_twice(kind: Kind):
    # Next tokens are easily foretold; of a random walk's next displacements there is only something to learn by heart.
    many = {"num_steps": 200, "learning_rate": 1e-2}
    schedule = {"num_steps": 100, "learning_rate": 1e-3} if kind == "trial" else many
    run, again = (of_kind(kind, steps_per_iteration=50, **schedule) for _ in range(2))
    untrained, _ = run.objective.validate()
    history = list(run.iterations())
    assert [row["step"] for row in history] == list(range(50, run.step + 1, 50))
    assert history[-1]["loss"] < (0.95 if kind == "trial" else 0.99) * history[0]["loss"]
    if kind == "trial":
        assert history[-1]["validation_loss"] < 0.8 * untrained
    assert without_time(list(again.iterations())) == without_time(history)
    assert_equal_weights(run.model, again.model)


@each_basis
def test_resumed_run_ends_with_the_same_weights_as_an_undisturbed_one(kind: Kind, tmp_path: Path):
    undisturbed = of_kind(kind, schedule="cosine")
    list(undisturbed.iterations())
    interrupted = of_kind(kind, schedule="cosine")
    next(interrupted.iterations())
    interrupted.save(str(tmp_path))
    torch.rand(7)
    resumed = of_kind(kind, schedule="cosine")
    resumed.restore(str(tmp_path))
    assert resumed.step == 10
    list(resumed.iterations())
    assert_equal_weights(resumed.model, undisturbed.model)
    assert_equal_weights(resumed.best, undisturbed.best)
    assert without_time(resumed.history) == without_time(undisturbed.history)


def test_an_iteration_ends_early_where_the_steps_end():
    run = training.Training(experiment(num_steps=14), data())
    assert [(row["iteration"], row["step"]) for row in run.iterations()] == [(1, 10), (2, 14)]


def test_the_best_model_is_that_of_the_lowest_validation_loss():
    run = training.Training(experiment(num_steps=60, learning_rate=0.03), data())
    kept = {
        row["validation_loss"]: {k: v.clone() for k, v in run.model.state_dict().items()} for row in run.iterations()
    }
    assert list(kept)[-1] > min(kept), "the learning rate is meant to overshoot"
    for name, tensor in run.best.state_dict().items():
        assert torch.equal(tensor, kept[min(kept)][name])


def test_learning_rate_warms_up_linearly_and_then_stays():
    run = training.Training(experiment(warmup_steps=20, steps_per_iteration=5), data())
    rates = [row["learning_rate"] for row in run.iterations()]
    np.testing.assert_allclose(rates, 1e-3 * np.array([5, 10, 15, 20, 20, 20]) / 20)


def test_learning_rate_falls_on_half_a_cosine_to_0():
    run = training.Training(experiment(schedule="cosine", warmup_steps=0, steps_per_iteration=15), data())
    rates = [row["learning_rate"] for row in run.iterations()]
    np.testing.assert_allclose(rates, 0.5e-3 * (1 + np.cos(np.pi * np.array([14, 29]) / 30)))


@each_basis
def test_mean_gradient_of_two_workers_is_that_of_one(kind: Kind):
    steady = dataclasses.replace(experiment(kind=kind), model=dataclasses.replace(experiment().model, dropout=0.0))
    alone = training.Training(steady, data(kind))
    pair = [training.Training(steady, data(kind), rank=rank, num_workers=2) for rank in range(2)]
    for run in (alone, *pair):
        windows_B = draw_windows(run.objective.chances, 4, 8, 0, run.rank, run.num_workers)
        run.objective.loss(run.model, windows_B).backward()
    for one, first, second in zip(*(run.model.parameters() for run in (alone, *pair)), strict=True):
        torch.testing.assert_close((first.grad + second.grad) / 2, one.grad, rtol=1e-5, atol=1e-7)


def test_a_model_that_diverges_says_so():
    run = training.Training(experiment(learning_rate=1e30, warmup_steps=0), data())
    with pytest.raises(training.TrainingError, match=r"lower train\.learning_rate=1e\+30"):
        list(run.iterations())


def test_the_models_folder_is_that_of_what_it_depends_on():
    base = data_sets.model_folder(experiment(), "data")
    assert data_sets.model_folder(experiment(num_workers=2), "data") == base
    assert data_sets.model_folder(experiment(seed=1), "data") != base
    assert data_sets.model_folder(experiment(), "other data") != base
    further = dataclasses.replace(experiment(), evaluate=config.Evaluate(horizon=2, extra_horizons=(5,)))
    assert data_sets.model_folder(further, "data") == base, "the paper's model predicts any number of steps"
    ours = experiment(kind="window")
    assert data_sets.model_folder(ours, "data") != data_sets.model_folder(
        dataclasses.replace(ours, evaluate=further.evaluate), "data"
    )


def test_what_the_paper_does_not_have_is_no_part_of_its_models_name():
    base = data_sets.run_digest(experiment(), "data")
    assert data_sets.run_digest(experiment(joined_windows=0.5), "data") == base
    ours = experiment(kind="window")
    assert data_sets.run_digest(ours, "data") != data_sets.run_digest(
        experiment(kind="window", joined_windows=0.5), "data"
    )
    runs = experiment(kind="window", num_seeds=3).training_runs
    assert [run.train.seed for run in runs] == [0, 1, 2]
    assert data_sets.run_digest(runs[0], "data") == data_sets.run_digest(ours, "data")


def elsewhere(storage: Path, *others: Path) -> config.Experiment:
    own = experiment(storage, "window")
    return dataclasses.replace(own, train=dataclasses.replace(own.train, data=tuple(map(str, others)))).check()


def test_other_data_sets_to_train_on_are_split_as_the_own_one_is(tmp_path: Path):
    other = write_store(tmp_path / "other", (1, 2, 3, 4, 5))
    with pytest.raises(StoreError, match=r"other: named in train\.data, but there is no complete data set"):
        data_sets.data_sets(elsewhere(tmp_path, tmp_path / "other"))
    other.finish((1, 2, 3, 4, 5), 41)
    (found,) = data_sets.data_sets(elsewhere(tmp_path, tmp_path / "other"))
    assert found.split.cut(found.seeds) == ((1, 2, 3), (4,), (5,))
    assert (found.task, found.digest) == ("Line-v0", other.digest())
    assert data_sets.training_digest(elsewhere(tmp_path, tmp_path / "other")) == other.digest()
    folded = dataclasses.replace(elsewhere(tmp_path, tmp_path / "other"), split=config.Split(folds=6))
    with pytest.raises(ValueError, match=r"other: split\.folds=6 exceeds its 5 trials"):
        data_sets.data_sets(folded)
    few = write_store(tmp_path / "few", (1, 2))
    few.finish((1, 2), 41)
    with pytest.raises(ValueError, match="leave none of its 2 trials to train on"):
        data_sets.data_sets(elsewhere(tmp_path, tmp_path / "few"))


def with_header(root: Path, header: dict) -> config.Experiment:
    write_trials(root, {seed: trajectory(seed) for seed in (1, 2, 3)}, header).finish((1, 2, 3), 41)
    return elsewhere(root.parent, root)


def test_snapshots_that_jumps_predicted_count_in_another_data_sets_iterations(tmp_path: Path):
    jumped = {"ppo": {"num_epochs": 4}, "epochs_per_snapshot": 2, "jump": {"horizon": 3}}
    assert len(data_sets.data_sets(with_header(tmp_path / "jumped", jumped))) == 1
    with pytest.raises(ValueError, match="8 snapshots per PPO iteration do not match the experiment's 5"):
        data_sets.data_sets(with_header(tmp_path / "more", {**PPO, "jump": {"horizon": 3}}))
    with pytest.raises(StoreError, match="its trials do not record ppo"):
        data_sets.data_sets(with_header(tmp_path / "foreign", {}))


def write_model(storage: Path, name: str, settings: config.Experiment, data_digest: str = "data") -> None:
    about = {"experiment": as_table(settings), "data_digest": data_digest}
    (storage / "models" / name).mkdir(parents=True)
    (storage / "models" / name / "model.json").write_text(json.dumps(about))


def test_a_missing_model_is_told_by_what_differs_in_those_that_are_there(tmp_path: Path):
    asked = experiment(tmp_path, num_steps=30)
    assert "nor any other" in str(data_sets.missing_model(asked, "data"))
    write_model(tmp_path, "far", experiment(tmp_path, "window", num_steps=99, seed=4, weight_decay=0.5, batch_size=2))
    write_model(tmp_path, "near", experiment(tmp_path, seed=7, num_workers=2))
    write_model(tmp_path, "other", experiment(tmp_path, seed=7), "other data")
    (tmp_path / "models" / "begun").mkdir()
    write_model(tmp_path, "foreign", asked)
    (tmp_path / "models" / "foreign" / "model.json").write_text("[]")
    said = str(data_sets.missing_model(asked, "data"))
    assert "Found near with train.seed=7, not 0; other with other data, train.seed=7, not 0; far with " in said
    assert "and 2 more different fields. Ask for one of these" in said
    assert "begun" not in said
    assert "\n" not in said
    steps = dataclasses.replace(experiment(tmp_path, "window"), evaluate=config.Evaluate(horizon=3))
    write_model(tmp_path, "wider", steps)
    assert "wider with evaluate.horizon=3, not 2;" in str(
        data_sets.missing_model(experiment(tmp_path, "window"), "data")
    )


def test_training_elsewhere_is_refused_where_tokens_fit_one_task_alone():
    with pytest.raises(ValueError, match=r"train\.data=\('storage/hopper',\) requires basis\.kind=window"):
        dataclasses.replace(experiment(), train=config.Train(data=("storage/hopper",))).check()


def assert_close_weights(one: torch.nn.Module, other: torch.nn.Module) -> None:
    for name, tensor in one.state_dict().items():
        torch.testing.assert_close(tensor, other.state_dict()[name], rtol=1e-3, atol=1e-5, msg=name)


class InterruptError(Exception):
    """Stands for Ctrl-C."""


def interrupt(metrics: training.Metrics) -> None:
    if metrics["step"] >= 40:
        raise InterruptError


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def keep_two(folder: Path) -> tuple[Path, Path]:
    """Checkpoints of steps 10 and 20, as two starts of a training leave them, and Ray Train's record of them."""
    run, kept = of_kind("trial"), (folder / "checkpoint_1", folder / "checkpoint_2")
    for path, _ in zip(kept, run.iterations(), strict=False):
        run.save(str(path))
    (folder / ray_train.RECORD_FILE).write_text("{}")
    return kept


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)


def empty_out(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


DAMAGE: dict[str, Callable[[Path], object]] = {
    "state cut short": lambda folder: truncate(folder / "training.safetensors"),
    "state empty": lambda folder: (folder / "training.safetensors").write_bytes(b""),
    "state missing": lambda folder: (folder / "training.safetensors").unlink(),
    "progress cut short": lambda folder: truncate(folder / "training.json"),
    "bit of the best model": lambda folder: flip_a_bit(folder / "model" / "model.safetensors"),
    "best model missing": lambda folder: (folder / "model" / "model.json").unlink(),
    "record cut short": lambda folder: truncate(folder / training.CHECKPOINT_RECORD),
    "nothing in it": empty_out,
}


def test_training_goes_on_from_a_checkpoint_of_before_there_were_records(tmp_path: Path):
    for kept in keep_two(tmp_path):
        (kept / training.CHECKPOINT_RECORD).unlink()
        (kept / "model" / "model.sha256").unlink()
    assert ray_train._resumed(str(tmp_path), lambda line: None)[1] == 20


@pytest.mark.parametrize("what", DAMAGE)
def test_training_goes_on_from_the_newest_checkpoint_that_is_whole(tmp_path: Path, what: str):
    earlier, newest = keep_two(tmp_path)
    DAMAGE[what](newest)
    lines: list[str] = []
    checkpoint, step = ray_train._resumed(str(tmp_path), lines.append)
    assert checkpoint is not None
    assert (checkpoint.path, step) == (str(earlier), 10)
    assert lines == [f"checkpoint_2 in {tmp_path}: incomplete; continuing from step 10"]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint_1"], "and nothing that is not whole stays"


def test_checkpoints_that_are_gone_or_all_damaged_begin_the_training_anew(tmp_path: Path):
    lines: list[str] = []
    assert ray_train._resumed(str(tmp_path / "never"), lines.append) == (None, 0)
    assert not lines
    for folder in keep_two(tmp_path):
        truncate(folder / "training.json")
    assert ray_train._resumed(str(tmp_path), lines.append) == (None, 0)
    assert lines[0].endswith("incomplete; there is no other, so training starts over")
    assert list(tmp_path.iterdir()) == []


def test_whole_checkpoints_are_told_apart_by_their_steps(tmp_path: Path):
    _, newest = keep_two(tmp_path)
    lines: list[str] = []
    checkpoint, step = ray_train._resumed(str(tmp_path), lines.append)
    assert checkpoint is not None
    assert (checkpoint.path, step, lines) == (str(newest), 20, ["continuing from step 20"])


class GroupError(ray.train.TrainingFailedError):
    """As Ray Train raises it where workers failed."""

    def __init__(self, *failures: Exception):
        self.worker_failures = dict(enumerate(failures))


@pytest.mark.parametrize(
    ("failure", "kind", "says"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), StoreError, r"^/kept: checkpoints .* the disk is full\."),
        (
            OSError(errno.EROFS, "Read-only file system"),
            StoreError,
            "Read-only file system. Free some space or fix permissions",
        ),
        (GroupError(OSError(errno.EDQUOT, "Disk quota exceeded")), StoreError, "the disk is full"),
        (GroupError(RuntimeError(), StoreError("part: is missing")), StoreError, "^part: is missing$"),
        (GroupError(training.TrainingError("step 7: diverged")), training.TrainingError, "^step 7: diverged$"),
        (GroupError(RuntimeError("ours")), GroupError, "^ours$"),
        (ConnectionResetError("a peer"), ConnectionResetError, "a peer"),
    ],
)
def test_what_a_user_can_mend_is_told_without_ray_trains_words(failure: Exception, kind: type[Exception], says: str):
    with pytest.raises(kind, match=says), ray_train._explained("/kept"):
        raise failure


def test_a_model_that_diverges_on_ray_train_is_one_error_and_is_not_tried_again(cluster: None, tmp_path: Path):
    settings = experiment(tmp_path, learning_rate=1e30, warmup_steps=0)
    digest = write_store(tmp_path, settings.train_seeds + settings.validation_seeds).digest()
    with pytest.raises(training.TrainingError, match=r"step \d+: .*lower train\.learning_rate=1e\+30"):
        ray_train.train(settings, digest, say=lambda line: None)


def test_ray_train_resumes_an_interrupted_run_and_finds_the_finished_one(cluster: None, tmp_path: Path):
    settings = experiment(tmp_path / "first", num_steps=160)
    # The test trial is not in the store: a run that touched it would fail.
    digest = write_store(tmp_path / "first", settings.train_seeds + settings.validation_seeds).digest()
    phases: list[str] = []
    with pytest.raises(InterruptError):
        ray_train.train(settings, digest, on_metrics=interrupt, on_phase=phases.append)
    assert "reading and reducing trials, " in phases[0]
    assert "starting 1 Ray Train worker" in phases
    # It goes on wherever it is moved to, from the newest checkpoint that is whole, whatever Ray Train's record says.
    moved = settings.at(str(tmp_path / "moved"))
    (tmp_path / "first").rename(tmp_path / "moved")
    *_, earlier, newest = sorted(tmp_path.glob("moved/training/*/checkpoint_2*"))
    step = json.loads((earlier / "training.json").read_text())["step"]
    truncate(newest / "training.safetensors")
    (record,) = tmp_path.glob(f"moved/training/*/{ray_train.RECORD_FILE}")
    truncate(record)
    rows: list[training.Metrics] = []
    lines: list[str] = []
    settings = moved
    folder = ray_train.train(settings, digest, on_metrics=rows.append, say=lines.append)
    assert newest.name in lines[0]
    assert lines[0].endswith(f"incomplete; continuing from step {step}")
    assert rows[0]["step"] == step + 10
    assert rows[-1]["step"] == 160
    assert not (tmp_path / "first").exists()

    undisturbed = training.Training(settings, data())
    list(undisturbed.iterations())
    assert_close_weights(CausalTransformer.load(folder), undisturbed.best)
    history = training.load_history(folder)
    assert [row["step"] for row in history] == list(range(10, 161, 10))
    assert history[-len(rows) :] == rows
    about = load_about(folder)
    assert about["data_digest"] == digest
    best = min(history, key=lambda row: row["validation_loss"])
    assert about["metrics"] == {name: value for name, value in best.items() if name not in training.TIMINGS}
    assert "where" not in about["experiment"]
    assert "data" not in about["experiment"]["train"]
    np.testing.assert_array_equal(
        Normaliser.from_table(about["normaliser"]).mean_D, Normaliser.fit(tokens(3, 4).coordinates_NTD).mean_D
    )
    trial = Trial(weights_TP=trajectory(6), band=make_band(trajectory(6), 8))
    assert np.isfinite(load_tipl(folder, Question.of(settings)).forecast(trial, np.array([10, 38]))).all()

    lines.clear()
    assert ray_train.train(settings, digest, on_metrics=interrupt, say=lines.append) == folder
    assert lines == [f"already trained, model in {folder}"]


def test_ray_train_trains_on_gram_bands_without_the_test_trial(cluster: None, tmp_path: Path):
    settings = experiment(tmp_path, "window")
    digest = write_store(tmp_path, settings.train_seeds + settings.validation_seeds).digest()
    folder = ray_train.train(settings, digest, say=lambda line: None)
    alone = training.Training(settings, data("window"))
    list(alone.iterations())
    assert isinstance(load_model(folder), WindowTransformer)
    assert_close_weights(load_model(folder), alone.best)


def test_a_shared_basis_knows_the_training_trials_alone_and_goes_with_the_model(cluster: None, tmp_path: Path):
    settings = experiment(tmp_path, "shared")
    digest = write_store(tmp_path, settings.train_seeds + settings.validation_seeds).digest()
    folder = ray_train.train(settings, digest, say=lambda line: None)
    tipl = load_tipl(folder, Question.of(settings))
    assert (tipl.basis, tipl.causal) == ("shared", True)
    assert isinstance(tipl, Tipl)
    expected = fit_shared_basis([trajectory(3), trajectory(4)], 4)
    np.testing.assert_array_equal(tipl.trial_basis.of(trajectory(6)).basis_PD, expected.basis_PD)
    trial = Trial(weights_TP=trajectory(6), band=make_band(trajectory(6), 8))
    before = tipl.forecast(trial, np.array([10]))
    trial.weights_TP[11:] = np.nan
    np.testing.assert_array_equal(tipl.forecast(trial, np.array([10])), before)


def test_a_model_is_trained_on_several_other_data_sets_and_never_on_its_own(cluster: None, tmp_path: Path):
    for name, seeds in (("one", (3, 4, 5, 6)), ("two", (7, 8, 9, 10))):
        write_store(tmp_path / name, seeds).finish(seeds, 41)
    settings = elsewhere(tmp_path / "own", tmp_path / "one", tmp_path / "two")
    folder = ray_train.train(settings, data_sets.training_digest(settings), say=lambda line: None)
    assert load_about(folder)["trained_on"] == "Line-v0"
    gather = representation_of(settings.basis).gather
    halves = [gather([bands(3, 4), bands(7, 8)]), gather([bands(5), bands(9)])]
    alone = training.Training(settings, TrainingData(train=halves[0], validation=halves[1]))
    list(alone.iterations())
    assert_close_weights(load_model(folder), alone.best)


def test_data_that_cannot_be_reduced_is_refused_with_the_trial(cluster: None, tmp_path: Path):
    settings = dataclasses.replace(experiment(tmp_path), basis=config.Basis(rank=14))
    digest = write_store(tmp_path, settings.train_seeds + settings.validation_seeds).digest()
    with pytest.raises(ValueError, match=r"trial [34]: basis\.rank=14 is not between 1 and 13"):
        ray_train.train(settings, digest)


@pytest.mark.slow
def test_a_run_that_ended_before_its_model_was_put_in_place_is_completed(cluster: None, tmp_path: Path):
    settings = experiment(tmp_path)
    digest = write_store(tmp_path, settings.train_seeds + settings.validation_seeds).digest()
    folder = ray_train.train(settings, digest)
    about = load_about(folder)
    (Path(folder) / "model.json").unlink()
    rows: list[training.Metrics] = []
    assert ray_train.train(settings, digest, on_metrics=rows.append) == folder
    assert load_about(folder) == about
    assert not rows, "there was no step left to train"


@pytest.mark.slow
@each_basis
def test_two_ray_workers_train_the_same_model_as_one(cluster: None, kind: Kind, tmp_path: Path):
    steady = config.Model(context=6, embedding=16, layers=2, heads=2, dropout=0.0)
    settings = dataclasses.replace(experiment(tmp_path, kind, num_workers=2), model=steady)
    digest = write_store(tmp_path, settings.train_seeds + settings.validation_seeds).digest()
    folder = ray_train.train(settings, digest)
    alone = training.Training(settings, data(kind))
    list(alone.iterations())
    assert_close_weights(load_model(folder), alone.best)
    np.testing.assert_allclose(
        [row["loss"] for row in training.load_history(folder)], [row["loss"] for row in alone.history], rtol=1e-4
    )
