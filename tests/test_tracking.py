import os
import socket
import subprocess
import sys
import time

import mlflow.data
import numpy as np
import pytest
from matplotlib.figure import Figure

from tipl_ray import tracking


@pytest.fixture(scope="module")
def storage(tmp_path_factory):
    """One storage for the file, in a folder with a space: initialising its sqlite file costs seconds."""
    return tmp_path_factory.mktemp("a storage")


@pytest.fixture
def tracker(storage, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tracking.Tracker.open(None, "pendulum", str(storage))


def history(tracker, run, name):
    return [(point.step, point.value) for point in tracker.client.get_metric_history(run.run_id, name)]


def runs_with_key(tracker, key):
    return tracker.client.search_runs([tracker.experiment_id], f"tags.`{tracking.KEY_TAG}` = '{key}'")


def test_store_lies_in_the_storage(tracker, storage):
    assert tracker.uri == f"sqlite:///{storage}/mlflow.db"
    assert (storage / "mlflow.db").is_file()


def test_logging_twice_leaves_one_run_without_duplicate_points(tracker):
    for _ in range(2):
        with tracker.run("train", "train-1") as run:
            run.log_metrics({"skill": 0.4, "nothing": None}, step=3)
            run.log_history("loss", [0, 10, 20], [1.0, float("nan"), 0.25])
            run.log_history("loss", [0, 10, 20], [1.0, float("nan"), 0.25])
    assert len(runs_with_key(tracker, "train-1")) == 1
    assert history(tracker, run, "skill") == [(3, 0.4)]
    assert history(tracker, run, "loss") == [(0, 1.0), (20, 0.25)]
    assert "nothing" not in tracker.client.get_run(run.run_id).data.metrics


def test_a_restart_adds_only_the_steps_that_are_new(tracker):
    with tracker.run("train", "train-2") as run:
        run.log_history("loss", [0, 10], [1.0, 0.5])
    with tracker.run("train", "train-2") as again:
        again.log_history("loss", np.array([0, 10, 20]), np.array([1.0, 0.75, 0.25], dtype=np.float32))
    assert history(tracker, run, "loss") == [(0, 1.0), (10, 0.5), (20, 0.25)]


def test_a_long_history_is_kept_whole(tracker):
    with tracker.run("train", "train-3") as run:
        run.log_history("loss", range(2500), [1 / (1 + step) for step in range(2500)])
    points = history(tracker, run, "loss")
    assert [step for step, _ in points] == list(range(2500))


def test_history_of_unequal_lengths_is_refused(tracker):
    with tracker.run("train", "train-4") as run, pytest.raises(ValueError, match="'loss' has 2 steps and 1 values"):
        run.log_history("loss", [0, 1], [1.0])


def test_child_points_to_its_parent_and_carries_tags(tracker):
    with (
        tracker.run("pipeline", "pipeline-1") as parent,
        tracker.run("collect", "collect-1", parent=parent, tags={"task": "InvertedPendulum-v4"}) as child,
    ):
        pass
    tags = tracker.client.get_run(child.run_id).data.tags
    assert tracker.client.get_parent_run(child.run_id).info.run_id == parent.run_id
    assert tags["task"] == "InvertedPendulum-v4"


def test_run_ends_as_its_block_ended(tracker):
    endings = {"FAILED": RuntimeError, "KILLED": KeyboardInterrupt}
    for status, error in endings.items():
        with pytest.raises(error), tracker.run("stage", f"ends-{status}") as run:
            raise error
        assert tracker.client.get_run(run.run_id).info.status == status
    with tracker.run("stage", "ends-FAILED") as again:
        assert tracker.client.get_run(again.run_id).info.status == "RUNNING"
    assert tracker.client.get_run(again.run_id).info.status == "FINISHED"


KILLED_PROGRAM = """
import os, signal, sys
from tipl_ray import tracking
with tracking.Tracker.open(None, "pendulum", sys.argv[1]).run("collect", "killed") as run:
    run.log_metrics({"return": 17.0}, step=1)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_run_of_a_killed_process_is_reconciled_and_reopened(tracker, storage):
    program = subprocess.run([sys.executable, "-c", KILLED_PROGRAM, str(storage)], capture_output=True, text=True)
    assert program.returncode == -9, program.stderr
    assert program.stdout + program.stderr == ""
    (left,) = runs_with_key(tracker, "killed")
    assert left.info.status == "RUNNING"
    reopened = tracking.Tracker.open(None, "pendulum", str(storage))
    assert reopened.client.get_run(left.info.run_id).info.status == "KILLED"
    with reopened.run("collect", "killed") as run:
        run.log_metrics({"return": 17.0}, step=1)
    assert run.run_id == left.info.run_id
    assert history(reopened, run, "return") == [(1, 17.0)]
    assert reopened.client.get_run(run.run_id).info.status == "FINISHED"


def test_run_of_a_living_process_is_left_alone(tracker, storage):
    with tracker.run("collect", "alive") as run:
        tracking.Tracker.open(None, "pendulum", str(storage))
        assert tracker.client.get_run(run.run_id).info.status == "RUNNING"


def test_parameters_are_flat_cut_and_keep_their_first_value(tracker):
    many = {f"field{number}": number for number in range(250)}
    with tracker.run("train", "parameters") as run:
        run.log_parameters({"model": {"context": 20, "hidden": (8, 8)}, "seeds": "1," * 5000, "many": many})
        run.log_parameters({"model": {"context": 30}})
    logged = tracker.client.get_run(run.run_id).data
    assert logged.params["model.context"] == "20"
    assert logged.params["model.hidden"] == "(8, 8)"
    assert logged.params["many.field249"] == "249"
    assert len(logged.params["seeds"]) == 6000
    assert logged.tags["now.model.context"] == "30"


def test_pictures_files_and_models_are_kept_in_the_storage(tracker, storage, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "results.parquet").write_bytes(b"rows")
    figure = Figure()
    figure.savefig(tmp_path / "drawn.png")
    with tracker.run("evaluate", "artifacts") as run:
        run.log_figure(figure, "figure_2")
        run.log_figure(tmp_path / "drawn.png", "from_file.png")
        run.log_file(tmp_path / "results.parquet")
        run.log_model_folder(tmp_path / "model")
    kept = {path.name: path for path in (storage / "mlflow-artifacts" / run.run_id).rglob("*") if path.is_file()}
    assert set(kept) == {"figure_2.png", "from_file.png", "results.parquet", "model.safetensors"}
    assert kept["figure_2.png"].read_bytes().startswith(b"\x89PNG")
    assert kept["model.safetensors"].read_bytes() == b"weights"
    assert "model/model.safetensors" in [file.path for file in tracker.client.list_artifacts(run.run_id, "model")]


def test_data_set_is_recorded_once_with_its_whole_digest(tracker, tmp_path):
    digest = "0123456789abcdef" * 4
    for _ in range(2):
        with tracker.run("train", "data set") as run:
            run.log_dataset("trials", digest, str(tmp_path), schema={"seed": "long"}, profile={"trials": 16})
    (recorded,) = tracker.client.get_run(run.run_id).inputs.dataset_inputs
    assert recorded.dataset.digest == digest[:36]
    assert digest in recorded.dataset.profile
    assert mlflow.data.get_source(recorded.dataset).to_dict() == {"uri": str(tmp_path)}


def test_source_tags_name_the_commit_of_a_repository_and_nothing_elsewhere(tmp_path):
    assert "mlflow.source.git.commit" not in tracking.source_tags(tmp_path)
    author = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    subprocess.run(["git", "-C", tmp_path, *author, "commit", "-q", "--allow-empty", "-m", "first"], check=True)
    clean = tracking.source_tags(tmp_path)
    (tmp_path / "new").touch()
    assert len(clean["mlflow.source.git.commit"]) == 40
    assert clean["mlflow.source.git.dirty"] == "false"
    assert tracking.source_tags(tmp_path)["mlflow.source.git.dirty"] == "true"


def test_unreachable_server_is_one_clear_error_within_seconds(tmp_path):
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{reserved.getsockname()[1]}"
        before = dict(os.environ)
        start = time.perf_counter()
        with pytest.raises(tracking.TrackingError, match=uri):
            tracking.Tracker.open(uri, "pendulum", str(tmp_path))
    assert time.perf_counter() - start < 30
    assert {name for name in os.environ if name.startswith("MLFLOW_HTTP")} == {
        name for name in before if name.startswith("MLFLOW_HTTP")
    }


def test_file_that_is_no_database_is_one_clear_error(tmp_path):
    (tmp_path / "mlflow.db").write_bytes(b"not a database, by any means" * 100)
    with pytest.raises(tracking.TrackingError, match=r"mlflow\.db"):
        tracking.Tracker.open(None, "pendulum", str(tmp_path))


@pytest.mark.parametrize(
    ("uri", "complaint"),
    [
        ("/some/mlruns", "is a folder"),
        ("file:///some/mlruns", "is a folder"),
        ("sqlite:///mlflow.db", "is relative to the working directory"),
    ],
)
def test_uri_that_would_not_last_is_refused(uri, complaint):
    with pytest.raises(tracking.TrackingError, match=complaint):
        tracking.resolve_uri(uri, "/storage")


def test_remote_storage_without_a_uri_asks_for_a_server(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(tracking.TrackingError, match="start an MLflow server"):
        tracking.resolve_uri(None, "s3://bucket/demo")


def test_uri_is_the_argument_then_the_environment_then_the_storage(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    assert tracking.resolve_uri("http://other:5000", "/storage") == "http://other:5000"
    assert tracking.resolve_uri(None, "/storage") == "http://mlflow:5000"
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert tracking.resolve_uri(None, "/storage") == "sqlite:////storage/mlflow.db"


def test_ui_command_quotes_the_store_and_stays_on_this_machine():
    command = tracking.ui_command("sqlite:////a storage/mlflow.db")
    assert "'sqlite:////a storage/mlflow.db'" in command
    assert command.endswith("--host 127.0.0.1")
