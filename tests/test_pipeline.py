"""The real jobs, shrunk: `smoke` from the command line, killed, run again, and read back by other people's readers."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlflow
import numpy as np
import pyarrow.dataset
import pyarrow.parquet
import pytest
from head import until
from machine import new_root

from tipl_ray.data.storage import Storage, join, read_file
from tipl_ray.data.trajectory_store import TrajectoryStore
from tipl_ray.places import CHECKOUT

SMOKE = ["--experiment", str(CHECKOUT / "jobs" / "experiments" / "smoke.toml")]


def command(job: str, storage: Path | str, *overrides: str) -> list[str]:
    return [sys.executable, str(CHECKOUT / "jobs" / f"{job}.py"), *SMOKE, "--storage", str(storage), *overrides]


def run(job: str, storage: Path | str, *overrides: str, head: str | None = None) -> str:
    """A job's output; on a cluster of its own, which takes seconds to start, unless one is given."""
    environment = {**os.environ, "RAY_ADDRESS": head} if head else None
    result = subprocess.run(
        command(job, storage, *overrides), capture_output=True, text=True, timeout=400, env=environment
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    storage = tmp_path_factory.mktemp("pipeline")
    return storage, run("pipeline", storage)


def test_the_pipeline_leaves_data_model_results_figures_and_report(finished: tuple[Path, str]) -> None:
    storage, said = finished
    data = pyarrow.dataset.dataset(storage / "trajectories", partitioning="hive")
    assert data.count_rows() == 4 * 41
    assert set(data.to_table(columns=["trial"])["trial"].to_pylist()) == {1, 2, 3, 4}
    (results,) = storage.glob("evaluations/*/results.parquet")
    table = pyarrow.parquet.read_table(results)
    assert {"copy-last", "linear", "ridge", "rank-1", "dmd", "tipl", "svd-floor"} < set(table["predictor"].to_pylist())
    assert set(table["trial"].to_pylist()) == {4}
    folder = results.parent
    assert (folder / "report.html").stat().st_size > 100_000
    assert (folder / "figures" / "figure_2.png").read_bytes().startswith(b"\x89PNG")
    *_, first, rival, returns, where, sure, link, _ = said.splitlines()
    assert first.startswith("Does TIPL beat copying the last snapshot? ")
    assert all("on 1 test trial." in line for line in (first, rival, returns))
    assert where.startswith("Where? ")
    assert sure.startswith("How sure is that? 1 test trial with 28 windows: too few for a confidence interval")
    assert link == f"report: {(folder / 'report.html').as_uri()}"
    assert (storage / "latest" / "report.html").samefile(folder / "report.html")
    assert not re.search(r"^ridge +", said, re.MULTILINE), "the table is in the report"
    assert "mlflow ui --backend-store-uri sqlite:///" in said


def test_copy_last_has_skill_zero_in_the_written_summary(finished: tuple[Path, str]) -> None:
    (path,) = finished[0].glob("evaluations/*/summary.csv")
    rows = path.read_text().replace('"', "").splitlines()
    header = rows[0].split(",")
    copied = [dict(zip(header, row.split(","), strict=True)) for row in rows[1:] if ",copy-last," in row]
    assert len(copied) == 5
    assert all(float(row["skill"]) == 0 for row in copied)


def test_run_again_every_stage_is_found_done(finished: tuple[Path, str]) -> None:
    storage, first = finished
    digests = re.findall(r"data set ([0-9a-f]{16})", first)
    begin = time.monotonic()
    again = run("pipeline", storage)
    assert "all 4 trials are already complete" in again
    assert "train: already trained" in again
    assert re.findall(r"data set ([0-9a-f]{16})", again) == digests
    assert time.monotonic() - begin < 60


def test_mlflow_has_one_parent_with_one_child_per_stage_however_often_it_ran(finished: tuple[Path, str]) -> None:
    client = mlflow.MlflowClient(f"sqlite:///{finished[0]}/mlflow.db")
    experiment = client.get_experiment_by_name("smoke")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert [run.info.run_name for run in parents] == ["smoke InvertedPendulum-v4"]
    children = {run.info.run_name: run for run in runs if run not in parents}
    assert set(children) == {"collect", "train paper", "evaluate paper"}
    assert {run.data.tags["mlflow.parentRunId"] for run in children.values()} == {parents[0].info.run_id}
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert [m.step for m in client.get_metric_history(children["train paper"].info.run_id, "validation_loss")] == [
        20,
        40,
    ]
    inputs = children["collect"].inputs
    assert inputs is not None
    assert inputs.dataset_inputs[0].dataset.digest == TrajectoryStore(str(finished[0])).digest()


def test_a_terminated_job_says_how_to_go_on_and_leaves_no_run_behind_that_seems_to_go_on(tmp_path: Path) -> None:
    """SIGTERM, as batch systems and `timeout` send it, is an end like Ctrl-C's."""
    job = subprocess.Popen(
        command("collect", tmp_path, "--collect.total-env-steps", "409600"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("commits/trial=*/commit-1.json")) and time.monotonic() < deadline:
        time.sleep(0.02)
    job.send_signal(signal.SIGTERM)
    _, said = job.communicate(timeout=120)
    assert job.returncode == 130
    assert said.endswith("interrupted: run the same command again to continue from the last commit\n")
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    assert {run.info.status for run in runs} == {"KILLED"}


def test_a_killed_collection_goes_on_to_the_same_data_whatever_the_number_of_actors(head: str, tmp_path: Path) -> None:
    """The driver is killed with SIGKILL once commits are there; one actor then finishes what two began."""
    long = ["--collect.total-env-steps", "40960"]
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    expected = re.findall(r"data set ([0-9a-f]{16})", run("collect", undisturbed, *long, head=head))
    held = tmp_path / "held"
    held.mkdir()
    script = (
        "import pathlib, runpy, sys; tests, held, *sys.argv = sys.argv[1:]; sys.path.append(tests)\n"
        "import publications; from tipl_ray.collect import crew\n"
        "crew.GroupCollector = publications.held_at('commit-3.json', pathlib.Path(held))\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    _, *job_and_arguments = command("collect", killed, *long)
    job = subprocess.Popen(
        [sys.executable, "-c", script, str(Path(__file__).parent), str(held), *job_and_arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    until(lambda: job.poll() is not None or list(held.iterdir()), 120)
    job.kill()
    assert job.wait() == -signal.SIGKILL
    assert list(killed.glob("commits/trial=*/commit-2.json"))
    assert not (killed / "commits" / "_SUCCESS").exists()
    said = run("collect", killed, *long, "--trials-per-actor", "4", head=head)
    assert re.findall(r"data set ([0-9a-f]{16})", said) == expected
    assert json.loads((killed / "commits" / "_SUCCESS").read_text())


def test_a_pipeline_killed_while_training_goes_on_to_the_same_model_and_results(
    finished: tuple[Path, str], head: str, tmp_path: Path
) -> None:
    undisturbed, killed = finished[0], tmp_path / "killed"
    job = subprocess.Popen(command("pipeline", killed), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while not list(killed.glob("training/*/checkpoint_*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(job.pid, signal.SIGKILL)
    job.wait()
    assert not list(killed.glob("models/*/model.json"))
    run("pipeline", killed, head=head)
    for pattern in ("models/*/model.safetensors", "models/*/model.json", "evaluations/*/summary.csv"):
        (expected,), (found,) = undisturbed.glob(pattern), killed.glob(pattern)
        assert found.read_bytes() == expected.read_bytes(), pattern


def test_the_pipeline_leaves_in_a_bucket_what_it_leaves_in_a_folder(
    finished: tuple[Path, str], server: str, tmp_path: Path
) -> None:
    storage, tracking = new_root(f"http://{server}"), ["--tracking.uri", f"sqlite:///{tmp_path}/mlflow.db"]
    run("pipeline", storage, *tracking)
    assert TrajectoryStore(storage).finished()
    assert TrajectoryStore(storage).digest() == TrajectoryStore(str(finished[0])).digest()
    for kind, name in (
        *(("models", "model.safetensors"), ("models", "model.json")),
        *(("evaluations", "summary.csv"), ("evaluations", "report.html")),
    ):
        (expected,), (folder,) = finished[0].glob(f"{kind}/*"), Storage(join(storage, kind)).folders()
        assert folder == expected.name
        found, expected_content = read_file(join(storage, kind, folder), name), (expected / name).read_bytes()
        if name == "report.html":  # which names the storage
            assert found.startswith(expected_content[:100])
        else:
            assert found == expected_content
    again = run("pipeline", storage, *tracking)
    assert "all 4 trials are already complete" in again
    assert "train: already trained" in again


@pytest.mark.slow
def test_no_job_is_told_again_what_an_earlier_one_was_told(tmp_path: Path) -> None:
    """Each job takes from the storage what an earlier one was told; elsewhere the demo's settings hold."""

    def told(job: str, *arguments: str) -> str:
        words = [
            sys.executable,
            str(CHECKOUT / "jobs" / f"{job}.py"),
            "--storage",
            str(tmp_path / "hopper"),
            *arguments,
        ]
        result = subprocess.run(words, capture_output=True, text=True, timeout=400, cwd=tmp_path)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    trials = ["--collect.task", "Hopper-v5", "--collect.num-trials", "6", "--collect.total-env-steps", "16384"]
    told("collect", *trials, "--collect.policy-hidden", "8", "8")
    taken = "task Hopper-v5, 6 trials (seeds 1 to 6), policy 8-8"
    ours = told("train", "--train.num-steps", "40", "--split.validation-trials", "1", "--split.test-trials", "1")
    assert ours.startswith(f"train: preset causal, {taken} from storage {tmp_path}")
    assert f"{taken}, split 1/1 from storage" in told("train", "--preset", "paper", "--train.num-steps", "20")
    judged = told("evaluate", "--evaluate.episodes", "1", "--evaluate.windows-per-trial", "2")
    for preset in ("causal", "paper"):
        assert f"evaluate: preset {preset}, {taken}, split 1/1 from storage" in judged
    assert judged.count("Does TIPL beat copying the last snapshot?") == 2
    assert "sweep: 2 runs in" in told("sweep", "--over", "model.context=5,10")
    assert "2 runs compared in" in told("compare", "--output", str(tmp_path / "comparison.html"))


def test_stages_run_alone_and_in_the_wrong_order_say_what_is_missing(tmp_path: Path) -> None:
    result = subprocess.run(command("train", tmp_path / "empty"), capture_output=True, text=True, timeout=200)
    assert result.returncode == 1
    assert "no trial has been collected there; run jobs/collect.py" in result.stderr
    assert "Traceback" not in result.stderr


def test_another_configuration_on_the_same_storage_is_refused_and_changes_nothing(finished: tuple[Path, str]) -> None:
    storage = finished[0]
    before = TrajectoryStore(str(storage)).digest()
    result = subprocess.run(
        command("collect", storage, "--ppo.gamma", "0.9"), capture_output=True, text=True, timeout=200
    )
    assert result.returncode == 1
    assert "config.ppo.gamma" in result.stderr
    assert "Traceback" not in result.stderr
    assert TrajectoryStore(str(storage)).digest() == before


def test_an_unknown_task_is_refused_before_anything_starts(tmp_path: Path) -> None:
    storage = tmp_path / "none"
    result = subprocess.run(
        command("collect", storage, "--collect.task", "FrozenLake-v1"), capture_output=True, text=True, timeout=200
    )
    assert result.returncode == 1
    assert "collect.task='FrozenLake-v1' is not one of" in result.stderr
    assert not storage.exists()


def test_a_submitted_job_without_storage_is_refused_before_its_data_can_be_lost() -> None:
    job = [sys.executable, str(CHECKOUT / "jobs" / "collect.py"), *SMOKE]
    environment = {**os.environ, "RAY_JOB_CONFIG_JSON_ENV_VAR": "{}"}
    result = subprocess.run(job, capture_output=True, text=True, timeout=200, env=environment)
    assert result.returncode == 1
    assert "set --storage to a folder" in result.stderr
    assert "Traceback" not in result.stderr


def test_weights_read_as_lists_of_floats_by_pandas(finished: tuple[Path, str]) -> None:
    import pandas

    frame = pandas.read_parquet(finished[0] / "trajectories")
    assert len(frame) == 164
    assert np.isfinite(np.stack(frame["weights"].to_list())).all()
    assert frame["weights"].map(len).unique().tolist() == [122]
