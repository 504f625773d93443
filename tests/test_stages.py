"""What a job refuses, or finds done, before Ray and MLflow are started; in this process, on data sets of a moment."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import ray
from machine import new_root
from test_training import experiment, trajectory, write_model
from trajectories import write_trials

from tipl_ray import stages
from tipl_ray.collect.group import GroupCollector
from tipl_ray.command_line import parse_arguments, parse_trained
from tipl_ray.config import Collect, Evaluate, Experiment, Tracking, Train, Where
from tipl_ray.data.locks import only_one
from tipl_ray.data.storage import StoreError
from tipl_ray.data.trajectory_store import TrajectoryStore
from tipl_ray.digest import as_table, digest
from tipl_ray.evaluate.evaluation import evaluation_folder
from tipl_ray.experiments import load_experiment
from tipl_ray.places import CHECKOUT
from tipl_ray.remembered import remember_collection, remember_training, remembered
from tipl_ray.sweep.space import make_space
from tipl_ray.sweep.tune import Plan
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
        ((), "no trial has been collected there; run jobs/collect.py"),
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
    assert (
        "its trials were collected with other settings: collect.task='Line-v0' there, 'InvertedPendulum-v4' here"
        in said
    )
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
    assert "there is no trained model of this experiment, nor any other; run jobs/train.py" in refused(
        settings, "evaluate", capsys=capsys
    )
    write_model(tmp_path, "0123", experiment(tmp_path, seed=5), stages.data_digest(settings))
    assert "Found 0123 with train.seed=5, not 0. Ask" in refused(settings, "evaluate", capsys=capsys)


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
    assert "none: named in train.data, but there is no complete data set" in said


def test_a_second_driver_of_a_stage_is_refused_and_another_stages_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    settings = experiment(tmp_path)
    with only_one(str(tmp_path), "collect", "collecting trials"):
        assert "is already collecting trials; wait" in refused(settings, "collect", capsys=capsys)
        assert "no trial has been collected there; run" in refused(settings, "train", capsys=capsys)
    collected(tmp_path, 3, 4, 5, 6)
    name = f"train-{run_digest(settings, stages.data_digest(settings))}"
    with only_one(str(tmp_path), name, "training this model"):
        assert "is already training this model; wait" in refused(settings, "train", capsys=capsys)


def test_importing_the_stages_loads_nothing_that_takes_seconds():
    heavy = ("torch", "mlflow", "matplotlib", "ray.train", "scipy")
    code = f"import sys, tipl_ray.stages; print([name for name in {heavy} if name in sys.modules])"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=CHECKOUT, timeout=100)
    assert said.stdout == "[]\n", said.stderr


def test_the_learner_is_compiled_while_a_collection_is_checked_and_no_training_is_checked_by_torch(tmp_path: Path):
    collected(tmp_path / "data", 3, 4, 5, 6)
    code = f"""
import contextlib, dataclasses, sys, threading
from pathlib import Path
from tipl_ray import stages
from tipl_ray.experiments import load_experiment
smoke = load_experiment(Path("jobs/experiments/smoke.toml"))
with contextlib.ExitStack() as until_the_end:
    context = stages.Context(smoke.at({str(tmp_path / "own")!r}), until_the_end)
    assert not stages.check_collect(context)
    [thread.join() for thread in threading.enumerate() if thread is not threading.main_thread() and not thread.daemon]
    there = dataclasses.replace(smoke, collect=dataclasses.replace(smoke.collect, first_seed=3))
    context = stages.Context(there.at({str(tmp_path / "data")!r}), until_the_end)
    assert not stages.check_train(context)
print("torch" in sys.modules)
"""
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": str(CHECKOUT)}
    said = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=CHECKOUT, timeout=100, env=environment
    )
    assert said.stdout == "False\n", said.stderr
    assert len(list((tmp_path / "tipl_ray").glob("learner-*.so"))) == (shutil.which("g++") is not None)


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
    assert capsys.readouterr().out == "collect: no figure 'curves': no curve has two returns\n"


@pytest.mark.parametrize(
    ("name", "preset", "run", "pipeline", "sweep"),
    [
        ("demo", "causal", "b017fde2af96e712", "4f47cc5bef1072ae", "f8a64685f806c707"),
        ("demo", "paper", "6f6c4171974e2dec", "aed39aa5fb2a0e70", "81f690d838ba9ac3"),
    ],
)
def test_what_an_earlier_version_left_is_found_by_the_same_digests(
    name: str, preset: str, run: str, pipeline: str, sweep: str
):
    settings = load_experiment(name, preset)
    assert run_digest(settings, "4ce21bf34b0f5321") == run
    assert digest(stages.essence(settings)) == pipeline
    assert Plan(experiment=settings, space=make_space(settings), children=(), data="d").digest == sweep
    assert evaluation_folder(settings, ["models/b017fde2af96e712"]).endswith("/805c7c9efacf88d9")


def test_where_and_on_how_many_threads_it_runs_is_no_part_of_what_an_experiment_is():
    base = experiment("/here")
    elsewhere = dataclasses.replace(
        base,
        where=Where(storage="/there", physics_threads=4, trials_per_actor=2, num_workers=2),
    )
    assert stages.essence(elsewhere) == stages.essence(base)
    assert stages.essence(with_trials(base, 4, 4)) != stages.essence(base)
    assert json.dumps(stages.essence(base))


def told(storage: Path | str, *arguments: str, job: str = "train") -> Experiment:
    """What a job makes of a storage, without an experiment."""
    return parse_arguments("A job.", ["--storage", str(storage), *arguments], jobs=[job])


def hopper(storage: Path | str, **train: int) -> Experiment:
    """An experiment that is the demo in nothing that a job takes from a storage."""
    return dataclasses.replace(
        experiment(storage, "window", num_steps=50, **train),
        name="hopper",
        preset="causal",
        collect=Collect(task="Hopper-v5", num_trials=6, first_seed=3, total_env_steps=8 * 2048, policy_hidden=(16, 4)),
        evaluate=Evaluate(horizon=3),
    ).check("train")


def test_a_job_takes_from_a_storage_what_was_collected_there_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    settings = hopper(tmp_path)
    remember_collection(settings)
    trials = "task Hopper-v5, 6 trials (seeds 3 to 8), policy 16-4"
    for job in ("train", "sweep", "evaluate"):
        taken = told(tmp_path, job=job)
        assert dataclasses.replace(taken, accelerate=settings.accelerate) == settings
        said = f"{job}: preset causal, {trials}, split 1/1 from storage {tmp_path}\n"
        assert capsys.readouterr().out == said
    assert told(tmp_path, job="collect").collect == settings.collect
    assert capsys.readouterr().out == f"collect: {trials} from storage {tmp_path}\n"


def test_options_go_before_what_a_storage_remembers_and_that_before_the_demo(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    settings = hopper(tmp_path)
    remember_collection(settings)
    taken = told(tmp_path, "--collect.num-trials", "4", "--train.seed", "7", "--split.test-trials", "2")
    assert taken.collect == dataclasses.replace(settings.collect, num_trials=4)
    assert taken.train == dataclasses.replace(settings.train, seed=7)
    assert capsys.readouterr().out == f"train: preset causal, task Hopper-v5, policy 16-4 from storage {tmp_path}\n"
    demo = load_experiment("demo")
    assert told(tmp_path, "--experiment", "demo") == demo.at(str(tmp_path))
    assert told(tmp_path / "empty") == demo.at(str(tmp_path / "empty"))
    assert capsys.readouterr().out == ""


def test_what_was_trained_is_remembered_by_preset(tmp_path: Path):
    remember_collection(hopper(tmp_path))
    remember_training(told(tmp_path, "--train.num-steps", "70", "--split.test-trials", "2", "--evaluate.horizon", "2"))
    # Another preset has the same split and forward steps; of its own what is its own.
    paper = told(tmp_path, "--preset", "paper", "--train.num-steps", "30", "--model.context", "7")
    assert (paper.split.test_trials, paper.evaluate.horizon, paper.basis.kind) == (2, 2, "trial")
    remember_training(paper)
    assert told(tmp_path).train.num_steps == 70
    models = parse_trained("A job.", ["--storage", str(tmp_path)], jobs=["evaluate"])
    assert {one.preset: (one.train.num_steps, one.model.context) for one in models} == {
        "causal": (70, 6),
        "paper": (30, 7),
    }
    assert {one.split.test_trials for one in models} == {2}
    (one,) = parse_trained("A job.", ["--storage", str(tmp_path), "--preset", "paper"], jobs=["evaluate"])
    assert one == told(tmp_path, "--preset", "paper", job="evaluate")
    # Trials that are added later are what the next job is about.
    remember_collection(told(tmp_path, "--collect.num-trials", "9", job="collect"))
    assert (told(tmp_path).collect.num_trials, told(tmp_path).train.num_steps) == (9, 70)


def test_what_is_remembered_says_nothing_of_where_it_was_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    settings = hopper(tmp_path)
    where = Where(storage=str(tmp_path), num_workers=2, tracking=Tracking(uri="http://ada:secret@host"))
    remember_training(dataclasses.replace(settings, where=where, train=Train(data=(str(tmp_path), "elsewhere"))))
    content = (tmp_path / "experiment-causal.json").read_text()
    assert not {"where", "accelerate"} & set(json.loads(content))
    assert "secret" not in content
    monkeypatch.chdir(tmp_path)
    assert all(Path(place).is_absolute() for place in json.loads(content)["train"]["data"])


def test_a_storage_of_an_earlier_version_is_known_by_its_trials(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    settings = hopper(tmp_path)
    header = made_by_collect(settings, ppo={**as_table(settings.ppo), "gamma": 0.9})
    write_trials(tmp_path, {seed: trajectory(seed) for seed in range(3, 9)}, header)
    known = remembered(str(tmp_path))
    assert known
    assert (known.collected["collect"].policy_hidden, known.collected["ppo"].gamma) == ((16, 4), 0.9)
    assert known.collected["collect"].num_trials == Collect().num_trials  # how many are to come is not known
    TrajectoryStore(str(tmp_path)).finish(range(3, 9), 41)
    known = remembered(str(tmp_path))
    assert known
    collect = dataclasses.replace(settings.collect, task="Line-v0")
    assert known.collected == {"collect": collect, "ppo": dataclasses.replace(settings.ppo, gamma=0.9)}
    assert known.preset is None


def test_trials_of_another_making_tell_nothing_until_something_was_trained_on_them(tmp_path: Path):
    assert remembered(str(tmp_path)) is None
    collected(tmp_path, 3, 4)
    assert remembered(str(tmp_path)) is None
    remember_training(hopper(tmp_path))
    assert told(tmp_path).collect == hopper(tmp_path).collect


def test_a_bucket_remembers_as_a_folder_does(server: str):
    storage = new_root(f"http://{server}")
    assert remembered(storage) is None
    settings = hopper(storage)
    remember_collection(settings)
    assert told(storage).collect == settings.collect


def test_a_data_set_that_lost_its_seal_is_to_be_sealed_again(tmp_path: Path):
    settings = experiment(tmp_path)
    collected(tmp_path, 3, 4, 5, 6)
    (tmp_path / "commits" / "_SUCCESS").unlink()
    with pytest.raises(StoreError, match=r"all 4 trials are there, but not sealed .* run jobs/collect\.py"):
        stages.data_digest(settings)


def test_trials_that_were_collected_before_a_field_came_are_those_of_its_default(tmp_path: Path) -> None:
    smoke = load_experiment("smoke").at(str(tmp_path))
    GroupCollector(smoke, "torch", [1, 2]).advance(seconds=600.0)
    header = TrajectoryStore(str(tmp_path)).header([1])
    assert "activation" not in header.config["ppo"], "what has its default does not count"
    stages._refuse_other_experiment(smoke, header)
    relu = dataclasses.replace(smoke, ppo=dataclasses.replace(smoke.ppo, activation="relu"))
    with pytest.raises(StoreError, match=r"ppo\.activation='tanh' there, 'relu' here"):
        stages._refuse_other_experiment(relu, header)
