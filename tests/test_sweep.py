"""The sweep on tiny trials: one MLflow run for each child, one registered model, and the same after any kill."""

import contextlib
import csv
import dataclasses
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import matplotlib.pyplot as plt
import mlflow
import numpy as np
import pytest
from trajectories import write_trials

from tipl_ray import stages
from tipl_ray.config import Experiment, Sweep, Train, Where
from tipl_ray.data.trajectory_store import TrajectoryStore
from tipl_ray.experiments import load_experiment
from tipl_ray.paper.transformer import CausalTransformer
from tipl_ray.places import CHECKOUT
from tipl_ray.predict.model_files import is_complete
from tipl_ray.predict.models import load_model
from tipl_ray.sweep import comparison
from tipl_ray.sweep import space as search_space
from tipl_ray.sweep import tune as sweep
from tipl_ray.tracking import KEY_TAG, PARENT_TAG
from tipl_ray.train.data_sets import model_folder
from tipl_ray.window.transformer import WindowTransformer

OVER = {"basis.rank": [3, 6], "model.context": [4, 8]}
CHILDREN = {"rank=3 context=4", "rank=3 context=8", "rank=6 context=4", "rank=6 context=8"}
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
JOB = [sys.executable, str(CHECKOUT / "jobs" / "sweep.py"), "--experiment", "jobs/experiments/smoke.toml"]


def collect(storage: Path) -> None:
    """Four trials of 41 snapshots that drift and tremble."""
    trials = {}
    for seed in range(1, 5):
        generator = np.random.default_rng(seed)
        steps_TP = 0.3 * generator.standard_normal(13) + 0.1 * generator.standard_normal((41, 13))
        trials[seed] = steps_TP.cumsum(axis=0).astype(np.float32)
    write_trials(storage, trials).finish(range(1, 5), 41)


def experiment(
    storage: Path, over: dict | None = None, where: Where | None = None, **settings: str | int
) -> Experiment:
    base = load_experiment(CHECKOUT / "jobs" / "experiments" / "smoke.toml")
    where, over = dataclasses.replace(where or Where(), storage=str(storage)), over or OVER
    return dataclasses.replace(base, where=where, sweep=Sweep(over=over, **settings))  # type: ignore[arg-type]


def client_of(storage: Path) -> mlflow.MlflowClient:
    return mlflow.MlflowClient(f"sqlite:///{storage}/mlflow.db")


def sweep_of(storage: Path) -> tuple[mlflow.MlflowClient, comparison.Row, list[comparison.Row]]:
    """The one sweep of a storage, and its children."""
    client = client_of(storage)
    rows = comparison.search(client, [one.experiment_id for one in client.search_experiments()])
    (parent,) = (row for row in rows if PARENT_TAG not in row.tags)
    return client, parent, comparison.read_children(client, parent.run_id)


def points(client: mlflow.MlflowClient, row: comparison.Row, name: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in client.get_metric_history(row.run_id, name)]


def wait_for_checkpoints(storage: Path, number: int, job: subprocess.Popen) -> None:
    """Until a driver's children have written so many, or, for none, until Ray Tune begins."""
    begin, seen = time.time(), set[Path]()
    while job.poll() is None and time.time() < begin + 300:
        for path in storage.glob("sweeps/*/*/checkpoint_*" if number else "sweeps/*/*"):
            with contextlib.suppress(FileNotFoundError):  # Ray Tune keeps two of each child
                seen |= {path} if path.stat().st_mtime > begin else set()
        if len(seen) >= max(1, number):
            return
        time.sleep(0.02)


@pytest.fixture(scope="module", autouse=True)
def surroundings() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "1")  # these sweeps end before ten seconds are over
        patch.chdir(CHECKOUT)
        yield


@pytest.fixture(scope="module")
def finished(head: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    storage = tmp_path_factory.mktemp("sweep")
    collect(storage)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", head)
        sweep.run_sweep(experiment(storage))
    return storage


def test_every_child_has_one_run_under_one_parent_with_every_step_once(finished: Path) -> None:
    client, parent, children = sweep_of(finished)
    assert {child.name for child in children} == CHILDREN
    assert {row.status for row in (parent, *children)} == {"FINISHED"}
    for child in children:
        assert [step for step, _ in points(client, child, "skill")] == [20, 40]
        assert [step for step, _ in points(client, child, "loss")] == [20, 40]
        steps = [child.metrics[f"skill_h{step}"] for step in range(1, 6)]
        assert child.metrics["skill"] == pytest.approx(np.mean(steps))
        assert {"task", "basis", "data", "mlflow.source.git.commit"} <= set(child.tags)
        assert not any("folder" in name for name in child.parameters), "MLflow's compare view shows what varies, first"
    assert len({child.metrics["ridge_skill"] for child in children}) == 2, "one ridge for each context"
    assert len({child.metrics["floor_skill"] for child in children}) == 2, "one floor for each rank"
    assert all(child.metrics["skill"] < child.metrics["floor_skill"] for child in children)
    assert all(child.metrics["still_skill"] < child.metrics["floor_skill"] for child in children)
    infos = sorted((client.get_run(child.run_id).info for child in children), key=lambda info: info.start_time)
    assert infos[0].end_time < infos[-1].start_time, "a run ends when its child does, not with the sweep"
    assert any(name.startswith("system/") for name in parent.metrics)


def test_the_best_child_is_marked_and_its_registered_model_predicts(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, parent, children = sweep_of(finished)
    (marked,) = (child for child in children if child.tags.get("best") == "true")
    assert marked.metrics["skill"] == max(child.metrics["skill"] for child in children)
    assert parent.tags["best_run_id"] == marked.run_id
    (version,) = client.search_model_versions("name = 'tipl-smoke'")
    assert version.run_id == marked.run_id
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{finished}/mlflow.db")
    loaded = mlflow.pyfunc.load_model(parent.tags["registered_model"])
    weights_TP = TrajectoryStore(str(finished)).trajectory(4, columns=("weights",)).weights_TP
    assert loaded.predict({"weights": weights_TP}).shape == (1, 5, 13)
    forecast_BHP = loaded.predict({"weights": weights_TP, "starts": [20, 30]})
    assert forecast_BHP.shape == (2, 5, 13)
    assert np.isfinite(forecast_BHP).all()


def test_the_parent_has_the_figures(finished: Path) -> None:
    client, parent, _ = sweep_of(finished)
    names = [file.path for file in client.list_artifacts(parent.run_id, "figures")]
    assert names == [f"figures/{name}.png" for name in ("curves", "heat_map", "parallel_coordinates")]


def test_children_are_left_where_jobs_train_and_evaluate_look_for_them(finished: Path) -> None:
    base = experiment(finished)
    data = stages.data_digest(base)
    for candidate in search_space.corners(search_space.make_space(base)):
        child = search_space.with_fields(base, candidate)
        folder = model_folder(child, data)
        assert is_complete(folder)
        model = load_model(folder)
        assert isinstance(model, CausalTransformer | WindowTransformer)
        assert model.size.context == child.model.context


def test_a_finished_sweep_is_found_and_nothing_is_done(finished: Path, capsys: pytest.CaptureFixture) -> None:
    before = sweep_of(finished)[1:]
    sweep.run_sweep(experiment(finished, where=Where(max_concurrent_trials=1)))
    said = capsys.readouterr().out
    assert "already finished, 4 runs" in said
    assert re.search(r"^Does it beat the ridge regression\? .*, on 1 validation trial\. Skill ", said, re.MULTILINE)
    (report,) = finished.glob("sweeps/*/report.html")
    assert f"report: {report.as_uri()}" in said
    assert (finished / "latest" / "report.html").samefile(report)
    assert sweep_of(finished)[1:] == before


def test_compare_reads_a_sweep_from_mlflow_alone(finished: Path, tmp_path: Path) -> None:
    job = [sys.executable, "jobs/compare.py", "--storage", str(finished), "--best", "3", "--by", "skill_h1"]
    output, table = tmp_path / "comparison.html", tmp_path / "comparison.csv"
    told = ["--output", str(output), "--csv", str(table)]
    said = subprocess.run([*job, *told], capture_output=True, text=True, timeout=300)
    assert said.returncode == 0, said.stderr
    assert "3 runs compared" in said.stdout
    page = output.read_text()
    rows = re.findall(r"<tr[^>]*><td>(\d)</td><td>(\d)</td><td>(-?[\d.,]+)</td>", page)
    assert len(rows) == 3
    skills = [float(skill.replace(",", "")) for *_, skill in rows]
    assert skills == sorted(skills, reverse=True)
    assert page.count("data:image/png;base64,") == 3
    read = list(csv.DictReader(table.open()))
    assert [float(row["skill_h1"]) for row in read] == pytest.approx(skills, rel=1e-3)
    assert [(row["basis.rank"], row["model.context"]) for row in read] == [(rank, context) for rank, context, _ in rows]


def test_the_page_on_sweeps_loads_the_registered_model_as_it_says(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")  # MLflow sets it
    (snippet,) = re.findall(r"```python\n(.*?)```", (CHECKOUT / "docs" / "sweeps.md").read_text(), re.DOTALL)
    ours = {"storage/demo": str(finished), "tipl-demo": "tipl-smoke", "[100, 200]": "[20, 30]"}
    for theirs, own in ours.items():
        assert theirs in snippet
        snippet = snippet.replace(theirs, own)
    names: dict = {}
    # What the page sets would be every later test's in this process.
    monkeypatch.setattr(mlflow.tracking._tracking_service.utils, "_tracking_uri", None)
    exec(snippet, names)
    assert names["forecast_BHP"].shape == (2, 5, 13)


def test_a_best_child_that_is_worse_than_copying_says_so_wherever_it_is_named(finished: Path) -> None:
    client, parent, children = sweep_of(finished)
    (version,) = client.search_model_versions("name = 'tipl-smoke'")
    (best,) = (child for child in children if child.run_id == version.run_id)
    worse = parent.metrics["skill"] < 0
    assert ("worse than copying the last snapshot" in str(version.description)) == worse
    assert (version.tags.get("worse_than_copying") == "true") == worse
    assert (best.tags.get("worse_than_copying") == "true") == worse


def test_a_copy_of_a_finished_sweep_is_found_finished_and_shows_its_own_pictures(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    shutil.copytree(finished, tmp_path / "copy")
    sweep.run_sweep(experiment(tmp_path / "copy"))
    assert "already finished, 4 runs" in capsys.readouterr().out
    _, parent, children = sweep_of(tmp_path / "copy")
    artifacts = client_of(tmp_path / "copy").get_run(parent.run_id).info.artifact_uri
    assert artifacts.startswith((tmp_path / "copy" / "mlflow-artifacts").as_uri())
    assert all(is_complete(child.tags["model_folder"]) for child in children)
    assert all(child.tags["model_folder"].startswith(str(tmp_path)) for child in children)
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before


def test_a_scheduler_that_could_end_nothing_is_refused_and_without_one_few_steps_are_enough(finished: Path) -> None:
    for num_steps, per_iteration in ((20, 20), (200, 10_000), (1, 2)):
        few = dataclasses.replace(
            experiment(finished, scheduler="asha"),
            train=Train(num_steps=num_steps, steps_per_iteration=per_iteration, warmup_steps=0),
        )
        words = f"train.steps_per_iteration={per_iteration} steps, but they end after train.num_steps="
        with pytest.raises(ValueError, match=re.escape(words)):
            sweep.make_plan(few)
        none = dataclasses.replace(few, sweep=dataclasses.replace(few.sweep, scheduler="none"))
        assert sweep.make_plan(none).num_children == 4
    some = dataclasses.replace(few, train=Train(num_steps=25, steps_per_iteration=20, warmup_steps=0))
    assert sweep._asha(sweep.make_plan(some)) is not None


def test_a_child_that_diverged_is_the_worst_whatever_it_had_reached() -> None:
    def child(name: str, skill: float | None, diverged: bool = False) -> comparison.Row:
        return comparison.Row(
            run_id=name,
            name=name,
            status="FAILED" if diverged else "FINISHED",
            parameters={"train.learning_rate": name},
            metrics={} if skill is None else {"skill": skill},
            tags={comparison.DIVERGED_TAG: "true"} if diverged else {},
        )

    rows = [child("10", 0.9, diverged=True), child("1", -300.0), child("2", None), child("3", 0.5), child("4", np.nan)]
    for less in (False, True):
        names = [row.name for row in comparison.by_metric(rows, "skill", less)]
        assert names[-1] == "10"
        assert names[:2] == (["1", "3"] if less else ["3", "1"])
    assert comparison.best(rows, "skill") == rows[3]
    cells = {cell["run"]: (cell["skill"], cell["status"]) for cell in comparison.table(rows, "skill")}
    assert cells["10"] == ("", "diverged")
    assert cells["3"] == ("0.5", "finished")


def test_what_compare_could_not_write_or_keep_is_refused_at_once(tmp_path: Path) -> None:
    job = [sys.executable, "jobs/compare.py", "--storage", str(tmp_path)]
    for options, words in {
        ("--best", "-1"): "error: --best -1 is below 0",
        ("--output", str(tmp_path / "none" / "a.html")): f"cannot be created: {tmp_path / 'none'} is not a folder",
        ("--csv", str(tmp_path)): "is a folder; name a file",
    }.items():
        said = subprocess.run([*job, *options], capture_output=True, text=True, timeout=300)
        assert said.returncode == 2
        assert words in said.stderr
        assert said.stderr.count("\n") == 1


@pytest.mark.slow
def test_a_training_that_diverges_ends_nothing_but_itself(tmp_path: Path) -> None:
    collect(tmp_path)
    command = [*JOB, "--storage", str(tmp_path), "--over=train.learning_rate=1e-3,1e30", "--over=model.context=4"]
    command += ["--sweep.search", "optuna", "--sweep.num-samples", "3", "--sweep.scheduler", "asha"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Traceback" not in result.stdout + result.stderr
    _, parent, children = sweep_of(tmp_path)
    status = {child.parameters["train.learning_rate"]: child.tags.get("diverged") for child in children}
    assert status == {"0.001": None, "1e+30": "true"}
    assert "diverged" in result.stdout
    assert parent.status == "FINISHED"


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("trainer", ["tune", "ray-train"])
def test_a_sweep_that_is_killed_and_moved_goes_on_at_its_new_place(trainer: str, tmp_path: Path) -> None:
    old, new = tmp_path / "old" / "d", tmp_path / "new" / "d"
    old.mkdir(parents=True)
    collect(old)
    told = ["--over=basis.rank=3", "--train.num-steps=400", "--trainer", trainer]
    job = subprocess.Popen([*JOB, "--storage", str(old), *told], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    if trainer == "tune":
        wait_for_checkpoints(old, 3, job)
    else:
        deadline = time.monotonic() + 400
        while len(list(old.glob("training/*/checkpoint_*"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.1)
    job.send_signal(signal.SIGKILL)
    job.wait()
    time.sleep(5)  # Ray's own processes end after their driver
    new.parent.mkdir()
    old.rename(new)
    old.parent.rmdir()
    result = subprocess.run([*JOB, "--storage", str(new), *told], capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    assert not old.parent.exists(), [str(path) for path in old.rglob("*")]
    client, parent, (child,) = sweep_of(new)
    assert (parent.status, child.status) == ("FINISHED", "FINISHED")
    assert [step for step, _ in points(client, child, "skill")] == list(range(20, 401, 20))
    assert child.tags["model_folder"].startswith(str(new))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"metric": "skil"}, "sweep.metric='skil' is not one of skill, skill_h1"),
        ({"over": {"basis.rank": [14]}}, "basis.rank=14 exceeds the 13 weights of a policy"),
        ({"over": {"model.context": [36]}}, "model.context=36 + "),
    ],
)
def test_what_cannot_be_is_refused_before_ray_starts(finished: Path, change: dict, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        sweep.make_plan(experiment(finished, **change))


def test_a_storage_without_data_and_a_server_that_is_not_there_are_refused_before_ray_starts(
    finished: Path, tmp_path: Path
) -> None:
    fields = ["--over", "basis.rank=3"]
    for option, words in {
        f"--storage={tmp_path / 'empty'}": "no trial has been collected there; run jobs/collect.py",
        "--tracking.uri=http://127.0.0.1:9": "MLflow cannot be used at tracking.uri='http://127.0.0.1:9'",
    }.items():
        storage = [] if "storage" in option else [f"--storage={finished}"]
        result = subprocess.run([*JOB, *fields, option, *storage], capture_output=True, text=True, timeout=300)
        assert result.returncode == 1
        assert words in result.stderr
        assert "Traceback" not in result.stderr
    assert len(list(finished.glob("sweeps/*"))) == 1


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, BROWSERS)), reason=f"none of {', '.join(BROWSERS)} is on the path")
def test_mlflows_own_pages_show_the_runs_three_of_them_side_by_side_and_the_heat_map(
    finished: Path, tmp_path: Path
) -> None:
    """The script waits for each page to name the sweep's children and their skill, or fails."""
    job = [sys.executable, "docs/screenshots.py", "--storage", str(finished), "--output", str(tmp_path)]
    said = subprocess.run(job, capture_output=True, text=True, timeout=900)
    assert said.returncode == 0, said.stderr
    taken = {path.name: plt.imread(path) for path in tmp_path.iterdir()}
    assert sorted(taken) == ["mlflow_compare.png", "mlflow_heat_map.png", "mlflow_runs.png"]
    assert all(picture.shape[1] == 1500 and picture.std() > 0.05 for picture in taken.values()), "no page is empty"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_sweep_killed_at_three_random_moments_ends_as_an_undisturbed_one(tmp_path: Path) -> None:
    """The driver is killed with SIGKILL some checkpoints and a part of a second after it started; seeded."""
    told = [f"--over={field}={a},{b}" for field, (a, b) in OVER.items()]
    told += ["--train.num-steps=100", "--train.steps-per-iteration=10"]
    undisturbed_storage, storage = tmp_path / "undisturbed", tmp_path / "killed"
    for folder in (undisturbed_storage, storage):
        collect(folder)
    moments = random.Random(6)
    for _ in range(3):
        job = subprocess.Popen(
            [*JOB, "--storage", str(storage), *told], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        wait_for_checkpoints(storage, moments.randint(0, 6), job)
        time.sleep(moments.uniform(0, 0.5))
        assert job.poll() is None, "the sweep ended before it could be killed"
        os.kill(job.pid, signal.SIGKILL)
        job.wait()
    for folder in (undisturbed_storage, storage):
        result = subprocess.run([*JOB, "--storage", str(folder), *told], capture_output=True, text=True, timeout=500)
        assert result.returncode == 0, result.stdout + result.stderr
    client, _, undisturbed = sweep_of(undisturbed_storage)
    killed_client, parent, killed = sweep_of(storage)
    assert {row.status for row in (parent, *killed)} == {"FINISHED"}
    assert len({child.tags[KEY_TAG] for child in killed}) == len(killed) == 4
    by_name = {child.name: child for child in killed}
    for child in undisturbed:
        for name in ("skill", "skill_h1", "skill_h5", "loss", "validation_loss", "ridge_skill", "learning_rate"):
            assert points(killed_client, by_name[child.name], name) == points(client, child, name), (child.name, name)
    assert len(killed_client.search_model_versions("name = 'tipl-smoke'")) == 1


@pytest.mark.slow
def test_a_sweep_that_is_interrupted_in_its_last_child_has_not_ended(tmp_path: Path) -> None:
    collect(tmp_path)
    command = [*JOB, "--storage", str(tmp_path), "--over=basis.rank=3", "--train.num-steps=400"]
    job = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for_checkpoints(tmp_path, 1, job)
    job.send_signal(signal.SIGINT)
    assert job.wait(timeout=300) == 130
    _, parent, (child,) = sweep_of(tmp_path)
    assert (parent.status, child.status) == ("KILLED", "KILLED")
    assert "best" not in child.tags
    result = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stdout + result.stderr
    client, parent, (child,) = sweep_of(tmp_path)
    assert (parent.status, child.status) == ("FINISHED", "FINISHED")
    assert [step for step, _ in points(client, child, "skill")] == list(range(20, 401, 20))


@pytest.mark.slow
def test_ray_tune_driving_ray_train_gives_the_same_children(finished: Path, tmp_path: Path) -> None:
    collect(tmp_path)
    sweep.run_sweep(experiment(tmp_path, {"basis.rank": [3], "model.context": [4, 8]}, trainer="ray-train"))
    client, parent, children = sweep_of(tmp_path)
    plain_client, _, plain_children = sweep_of(finished)
    assert {row.status for row in (parent, *children)} == {"FINISHED"}
    assert {child.name for child in children} == {"rank=3 context=4", "rank=3 context=8"}
    plain = {child.name: child for child in plain_children}
    for child in children:
        for name in ("skill", "skill_h5", "loss", "validation_loss", "ridge_skill", "floor_skill"):
            found, expected = points(client, child, name), points(plain_client, plain[child.name], name)
            # The plain sweep reduced its trials at a higher rank: float32 tokens differ in their last bits.
            assert np.array(found) == pytest.approx(np.array(expected), rel=1e-6), (child.name, name)
        assert is_complete(child.tags["model_folder"])
    assert len(client.search_model_versions("name = 'tipl-smoke'")) == 1


@pytest.mark.slow
def test_a_child_has_as_many_ray_train_workers_as_it_is_given(tmp_path: Path) -> None:
    collect(tmp_path)
    sweep.run_sweep(experiment(tmp_path, {"basis.rank": [3]}, Where(trainer="ray-train", num_workers=2)))
    client, _, (child,) = sweep_of(tmp_path)
    assert [step for step, _ in points(client, child, "skill")] == [20, 40]
    assert is_complete(child.tags["model_folder"])


@pytest.mark.slow
def test_optuna_with_asha_searches_other_fields_from_the_command_line_alone(tmp_path: Path) -> None:
    collect(tmp_path)
    command = [*JOB, "--storage", str(tmp_path), "--over", "train.learning_rate=log(1e-4,1e-1)"]
    command += ["--over", "model.layers=1,2", "--sweep.search", "optuna", "--sweep.num-samples", "6"]
    command += ["--sweep.scheduler", "asha", "--train.steps-per-iteration", "5"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stdout + result.stderr
    client, parent, children = sweep_of(tmp_path)
    assert len(children) == 6
    assert {child.status for child in children} == {"FINISHED"}
    assert len({child.parameters["train.learning_rate"] for child in children}) == 6
    early = [child for child in children if "ended_early" in child.tags]
    for child in children:
        steps = [step for step, _ in points(client, child, "skill")]
        assert steps == list(range(5, steps[-1] + 1, 5))
        assert (steps[-1] < 40) == (child in early)
    assert float(parent.metrics["skill"]) == max(child.metrics["skill"] for child in children)
