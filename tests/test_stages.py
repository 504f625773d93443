"""What a job refuses, or finds done, before Ray and MLflow are started; in this process, on data sets of a moment."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import ray
from test_training import experiment, trajectory, write_model
from trajectories import write_trials

from tipl_ray import stages
from tipl_ray.config import Experiment, Where
from tipl_ray.data.locks import only_one
from tipl_ray.data.storage import StoreError
from tipl_ray.digest import as_table
from tipl_ray.places import CHECKOUT
from tipl_ray.train.data_sets import run_digest


def made_by_collect(settings: Experiment, **changes: object) -> dict:
    """The header's configuration as jobs/collect.py writes it."""
    table = as_table(settings)
    fields = ("policy_hidden", "critic_hidden", "epochs_per_snapshot", "iterations_per_commit", "total_env_steps")
    made = {field: table["collect"][field] for field in fields}
    return {**made, "ppo": table["ppo"], "engine": "compiled-1", **changes}


def collected(storage: Path, *seeds: int, header: dict | None = None) -> None:
    write_trials(storage, {seed: trajectory(seed) for seed in seeds}, header).finish(seeds, 41)


def refused(settings: Experiment, *names: str, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that the stages end in, before MLflow or Ray were touched."""
    with pytest.raises(SystemExit) as ended:
        stages.run_stages(settings, names)
    assert ended.value.code == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    assert not ray.is_initialized()
    assert not list(Path(settings.storage_path).glob("mlflow*"))
    return said.err


def with_trials(settings: Experiment, first_seed: int, num_trials: int) -> Experiment:
    collect = dataclasses.replace(settings.collect, first_seed=first_seed, num_trials=num_trials)
    return dataclasses.replace(settings, collect=collect)


@pytest.mark.parametrize(
    ("there", "says"),
    [
        ((), "4 of 4 trials are not complete; run jobs/collect.py"),
        ((3, 4), "2 of 4 trials are not complete; run jobs/collect.py"),
        (
            (41, 42, 43, 44),
            "4 of 4 trials are not complete: seeds 3-6 are asked for, and there are trials of seeds 41-44; ask for "
            "these with --collect.first-seed 41 --collect.num-trials 4, or run jobs/collect.py",
        ),
        (
            (1, 3, 9),
            "3 of 4 trials are not complete: seeds 3-6 are asked for, and there are trials of seeds 1,3,9; run",
        ),
    ],
)
@pytest.mark.parametrize("stage", ["train", "evaluate"])
def test_trials_that_are_missing_are_told_with_those_that_are_there(
    tmp_path: Path, there: tuple[int, ...], says: str, stage: str, capsys: pytest.CaptureFixture[str]
):
    if there:
        collected(tmp_path, *there)
    assert f"{tmp_path}: {says}" in refused(experiment(tmp_path), stage, capsys=capsys)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"policy_hidden": [64, 64]}, "collect.policy_hidden=[64, 64] there, [8, 8] here"),
        ({"total_env_steps": 99}, "collect.total_env_steps=99 there, 16384 here"),
        ({"ppo": {"num_epochs": 4}}, "ppo.num_epochs=4 there, 10 here"),
        ({"jump": {"predictor": "0123", "horizon": 3}}, "jump.horizon=3 there, None here"),
    ],
)
def test_trials_of_another_experiment_are_refused_by_the_fields_that_differ(
    tmp_path: Path, changes: dict, says: str, capsys: pytest.CaptureFixture[str]
):
    settings = experiment(tmp_path)
    collected(tmp_path, 3, 4, 5, 6, header=made_by_collect(settings, **changes))
    said = refused(settings, "train", capsys=capsys)
    assert "its trials are another experiment's: collect.task='Line-v0' there, 'InvertedPendulum-v4' here" in said
    assert says in said
    assert "engine" not in said


def test_what_is_of_no_account_to_a_reader_does_not_part_it_from_its_trials(tmp_path: Path):
    settings = experiment(tmp_path)
    settings = dataclasses.replace(settings, collect=dataclasses.replace(settings.collect, task="Line-v0"))
    collected(tmp_path, 3, 4, 5, 6, header=made_by_collect(settings, iterations_per_commit=1))
    assert len(stages.data_digest(settings)) == 16


def test_a_model_that_is_missing_is_refused_and_those_that_are_there_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    settings = experiment(tmp_path)
    collected(tmp_path, 3, 4, 5, 6)
    assert "no trained model of this experiment is there, nor any other; run jobs/train.py" in refused(
        settings, "evaluate", capsys=capsys
    )
    write_model(tmp_path, "0123", experiment(tmp_path, seed=5), stages.data_digest(settings))
    assert "There are 0123 with train.seed=5, not 0. Ask" in refused(settings, "evaluate", capsys=capsys)


@pytest.mark.parametrize("stage", ["collect", "pipeline"])
@pytest.mark.parametrize("place", ["file/d", "file/d/e"])
def test_a_storage_below_a_file_is_refused(tmp_path: Path, place: str, stage: str, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "file").write_text("")
    names = ["collect", "train", "evaluate"] if stage == "pipeline" else [stage]
    assert "file/d" in refused(experiment(tmp_path / place), *names, capsys=capsys)


def test_data_to_train_on_that_is_missing_is_refused_before_anything_is_collected(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    settings = experiment(tmp_path / "own", "window")
    settings = dataclasses.replace(settings, train=dataclasses.replace(settings.train, data=(str(tmp_path / "none"),)))
    said = refused(settings, "collect", "train", "evaluate", capsys=capsys)
    assert "none: train.data names it, and no complete data set is there" in said


def test_a_second_driver_of_a_stage_is_refused_and_another_stages_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    settings = experiment(tmp_path)
    with only_one(str(tmp_path), "collect", "collecting trials"):
        assert "is already collecting trials; wait" in refused(settings, "collect", capsys=capsys)
        assert "4 of 4 trials are not complete; run" in refused(settings, "train", capsys=capsys)
    collected(tmp_path, 3, 4, 5, 6)
    digest = stages.data_digest(settings)
    name = f"train-{run_digest(settings, digest)}"
    with only_one(str(tmp_path), name, "training this model"):
        assert "is already training this model; wait" in refused(settings, "train", capsys=capsys)


def test_importing_the_stages_loads_nothing_that_takes_seconds():
    heavy = ("torch", "mlflow", "matplotlib", "ray.train", "scipy")
    code = f"import sys, tipl_ray.stages; print([name for name in {heavy} if name in sys.modules])"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=CHECKOUT, timeout=100)
    assert said.stdout == "[]\n", said.stderr


def curve(*returns: float) -> tuple[int, np.ndarray, np.ndarray]:
    return 1, np.arange(1, len(returns) + 1) * 256, np.array(returns)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("curves", "expected"),
    [
        ([curve(np.nan, np.nan), curve(np.nan, np.nan)], [None, None]),
        ([curve(np.nan, 2.0), curve(np.nan, np.nan)], [None, 2.0]),
        ([curve(1.0, 2.0), curve(np.nan, 4.0)], [1.0, 3.0]),
    ],
)
def test_the_mean_learning_curve_is_of_the_trials_in_which_an_episode_had_ended(
    curves: list, expected: list[float | None]
):
    assert stages.mean_curve(curves) == ([256, 512], expected)


def test_a_figure_without_data_is_left_out_with_a_word_why(capsys: pytest.CaptureFixture[str]):
    def nothing_to_draw() -> None:
        raise ValueError("no curve has two returns")

    assert stages._those_with_data("collect", {"curves": nothing_to_draw}) == {}  # type: ignore[dict-item]
    assert capsys.readouterr().out == "collect: no picture 'curves': no curve has two returns\n"


def test_where_and_on_how_many_threads_it_runs_is_no_part_of_what_an_experiment_is():
    base = experiment("/here")
    elsewhere = dataclasses.replace(
        base,
        where=Where(storage="/there", physics_threads=4, trials_per_actor=2, num_workers=2),
    )
    assert stages.essence(elsewhere) == stages.essence(base)
    assert stages.essence(with_trials(base, 4, 4)) != stages.essence(base)
    assert json.dumps(stages.essence(base))


def test_a_data_set_that_lost_its_seal_is_to_be_sealed_again(tmp_path: Path):
    settings = experiment(tmp_path)
    collected(tmp_path, 3, 4, 5, 6)
    (tmp_path / "commits" / "_SUCCESS").unlink()
    with pytest.raises(StoreError, match=r"all 4 trials are there, but not sealed .* run jobs/collect\.py"):
        stages.data_digest(settings)
