import contextlib
import dataclasses
import json
import os
import random
import resource
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time

import mlflow.data
import numpy as np
import pytest
from matplotlib.figure import Figure

from tipl_ray import config, tipl, tracking
from tipl_ray.data.storage import Storage, StoreError
from tipl_ray.digest import as_table, redacted
from tipl_ray.experiments import load_experiment
from tipl_ray.places import CHECKOUT
from tipl_ray.sweep import comparison


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
    with tracker.run("evaluate", "artifacts") as run:
        run.log_figure(Figure(), "figure_2")
        run.log_figure(b"drawn", "as_bytes")
        run.log_file(b"rows", "results.parquet")
        run.log_model_folder(tmp_path / "model")
    kept = {path.name: path for path in (storage / "mlflow-artifacts" / run.run_id).rglob("*") if path.is_file()}
    assert set(kept) == {"figure_2.png", "as_bytes.png", "results.parquet", "model.safetensors"}
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
        for arguments in (
            (tracking.Tracker.open, uri, "pendulum", str(tmp_path)),
            (tracking.open_to_read, uri, "/none"),
        ):
            with pytest.raises(tracking.TrackingError) as refused:
                arguments[0](*arguments[1:])
            assert str(refused.value) == (
                f"MLflow cannot be used at tracking.uri='{uri}': connection refused. Start that server, or set "
                "--tracking.uri or MLFLOW_TRACKING_URI to another"
            )
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
        ("/some/mlflow.db", r"is a path, not a URI: write sqlite:////some/mlflow\.db$"),
        ("file:///some/runs.SQLite", r"is a path, not a URI: write sqlite:////some/runs\.SQLite$"),
        ("sqlite:///mlflow.db", "is relative to the working directory"),
        (
            "htp://mlflow:5000",
            r"^tracking\.uri='htp://mlflow:5000': MLflow knows no scheme 'htp'; did you mean http\?; ",
        ),
        ("s3://bucket/runs", "its schemes are http, https, sqlite, postgresql, mysql, mssql, databricks"),
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


def test_an_experiment_opens_on_the_page_of_its_runs(tracker):
    command = tracking.ui_command(tracker.uri, tracker.experiment_id)
    assert command.endswith(f"/#/experiments/{tracker.experiment_id}/runs?workflowType=machine_learning")
    assert tracker.client.get_experiment(tracker.experiment_id).tags["mlflow.experimentKind"] == KIND
    server = tracking.ui_command("http://mlflow:5000", "7")
    assert server.endswith("-m webbrowser http://mlflow:5000'/#/experiments/7/runs?workflowType=machine_learning'")


KIND = "custom_model_development"


def test_an_experiment_without_a_kind_is_given_one_and_another_is_left_to_its_owner(tracker, storage):
    for name, tags, kind in (("before", {}, KIND), ("theirs", {"mlflow.experimentKind": "regression"}, "regression")):
        number = tracker.client.create_experiment(name, (storage / "mlflow-artifacts").as_uri(), tags)
        assert tracking.Tracker.open(None, name, str(storage)).experiment_id == number
        assert tracker.client.get_experiment(number).tags["mlflow.experimentKind"] == kind


SECRETS = (
    "postgresql://me:S3CRET@host/runs",
    "postgresql+psycopg2://me:S3CRET%40x@host:5432/runs?sslmode=require",
    "postgresql://me:p@S3CRET@host/runs",
    "postgresql://me:p/S3CRET@host/runs",
    "postgresql://me:p?S3CRET@host/runs?sslmode=require",
    "postgresql:///runs?user=me&password=S3CRET&host=host",
    "mysql+pymysql://me:S3CRET@host/runs?ssl_key=S3CRET",
    "mssql+pyodbc:///?odbc_connect=PWD%3DS3CRET",
    "https://S3CRET@host:5000",
    "https://me:S3CRET@host:5000/mlflow",
    "http:/me:S3CRET@host",
    "me:S3CRET@host/runs",
    "http://host/?S3CRET",
    "s3://id:S3CRET@bucket/folder",
    "s3://bucket/folder?access_key=id&secret_key=S3CRET",
    "s3://bucket/folder?region=eu&session_token=S3CRET",
    "s3://bucket/folder?endpoint_override=http://id:S3CRET@host:9000",
    "s3://bucket/folder?endpoint_override=http%3A%2F%2Fid%3AS3CRET%40host",
)


@pytest.mark.parametrize("uri", SECRETS)
def test_no_secret_of_a_uri_is_shown(uri, monkeypatch):
    assert "S3CRET" not in redacted(uri)
    assert redacted(redacted(uri)) == redacted(uri)
    for environment in ("", uri):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", environment)
        assert "S3CRET" not in tracking.ui_command(uri) + tracking.ui_command(uri, "1")
    if uri.startswith("s3:"):
        return
    quoted = f"could not reach {uri}/api, {uri.partition('://')[2]}: 'S3CRET@host' is no host, nor is it S3CRET"
    assert "S3CRET" not in tracking._without_secrets(quoted, uri)


@pytest.mark.parametrize(
    "uri",
    [
        "databricks",
        "databricks://profile",
        "http://mlflow:5000",
        "http://[::1]:5000/mlflow",
        "postgresql://me@host:5432/runs?sslmode=require",
        "sqlite:////data/a:b@c/mlflow.db",
        "s3://bucket/run@2?endpoint_override=http://127.0.0.1:9000&region=eu-west-1",
        "/data/me:and@you",
        "relative/a:b",
        "file:///data/me:and@you",
    ],
)
def test_a_uri_without_a_secret_is_shown_as_it_is(uri):
    assert redacted(uri) == uri


@pytest.mark.parametrize("uri", SECRETS)
def test_a_published_configuration_has_no_secret(uri):
    smoke = load_experiment(CHECKOUT / "jobs" / "experiments" / "smoke.toml")
    experiment = dataclasses.replace(smoke, where=config.Where(tracking=config.Tracking(uri=uri)))
    assert "S3CRET" not in repr(experiment)
    if "://" not in uri:
        return  # is refused as a folder before anything is published
    assert "S3CRET" not in json.dumps(as_table(experiment))
    row = comparison.Row(run_id="r", name="rank=1", status="FINISHED", parameters={}, metrics={"skill": 0.1}, tags={})
    assert "S3CRET" not in comparison.page("t", [row], "skill", {}, uri)


@pytest.mark.parametrize("uri", [uri for uri in SECRETS if uri.startswith("s3:")])
def test_a_storage_that_carries_credentials_is_refused_without_quoting_them(uri):
    smoke = load_experiment(CHECKOUT / "jobs" / "experiments" / "smoke.toml")
    for changed in (
        smoke.at(uri),
        dataclasses.replace(smoke, where=config.Where(predictors_storage=uri)),
        dataclasses.replace(smoke, train=config.Train(data=("/data", uri)), basis=config.Basis(kind="window")),
    ):
        with pytest.raises(ValueError, match="contains credentials") as refused:
            changed.check()
        assert "S3CRET" not in str(refused.value)
    with pytest.raises(StoreError) as not_opened:
        Storage(uri)
    with pytest.raises(tracking.TrackingError) as no_place:
        tracking.resolve_uri("", uri)
    assert "S3CRET" not in f"{not_opened.value} {no_place.value}"


@pytest.mark.parametrize("password", ["S3CRET", "p%40S3CRET", "p@S3CRET", "p/S3CRET"])
@pytest.mark.parametrize("kind", ["http", "postgresql"])
def test_an_error_of_a_server_or_a_database_does_not_quote_the_password(kind, password, tmp_path):
    if kind == "postgresql":
        pytest.importorskip("psycopg2")
    start = time.perf_counter()
    with pytest.raises(tracking.TrackingError, match=r"MLflow cannot be used at tracking.uri=.*\*\*\*") as told:
        tracking.Tracker.open(f"{kind}://someone:{password}@127.0.0.1:1/runs", "pendulum", str(tmp_path))
    assert time.perf_counter() - start < 30
    assert "S3CRET" not in str(told.value)
    assert told.value.__cause__ is None, "a traceback would quote it"
    assert not any(tmp_path.iterdir())


def test_a_server_that_is_reached_by_a_password_keeps_and_prints_none(tmp_path, monkeypatch, capfd):
    monkeypatch.delenv("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", raising=False)
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        port = reserved.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{tmp_path}/server.db", "--artifacts-destination", f"{tmp_path}/kept"]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        deadline = time.monotonic() + 180
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            time.sleep(0.2)
        tracker = tracking.Tracker.open(f"http://someone:S3CRET@127.0.0.1:{port}", "pendulum", str(tmp_path / "d"))
        smoke = load_experiment(CHECKOUT / "jobs" / "experiments" / "smoke.toml")
        where = config.Where(tracking=config.Tracking(uri=tracker.uri))
        with tracker.run("train", "a key") as run:
            run.log_parameters(as_table(dataclasses.replace(smoke, where=where)))
            run.log_figure(Figure(), "curve")
            run.log_dataset("trials", "0123", str(tmp_path))
        with pytest.raises(tracking.TrackingError, match="refuses") as refused:
            tracker.client.get_run("none")
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait()
    assert "S3CRET" not in str(refused.value) + "".join(capfd.readouterr())
    kept = files_of(tmp_path)
    assert any(path.name == "curve.png" for path in kept)
    assert not [path for path, content in kept.items() if b"S3CRET" in content]


def files_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def log_all(storage, size=1.0):
    """A run with a picture and a registered model; the same run whenever it is called."""
    tracker = tracking.Tracker.open(None, "moved", str(storage))
    with tracker.run("train", "a key") as run:
        run.log_figure(Figure(figsize=(size, size)), "curve")
        run.log_model_folder(storage / "weights")
        run.log_dataset("trials", "0123", f"{storage}/trajectories")
        run.set_tags({"model_folder": f"{storage}/models/0123"})
    return tracker, run, tracker.register("tipl-moved", run.run_id, "")


@pytest.mark.parametrize("way", ["moved", "copied"])
@pytest.mark.parametrize("place", ["elsewhere/a new place", "100% größer/#1"])
def test_a_storage_that_is_moved_or_copied_is_gone_on_with_where_it_is(way, place, storage, tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    old, new = tmp_path / "old" / "d", tmp_path / place
    (storage / "weights").mkdir(exist_ok=True)
    (storage / "weights" / "model.json").write_text("{}")
    shutil.copytree(storage, old)  # already this is a copy
    first, run, version = log_all(old)
    elsewhere = first.client.create_experiment("elsewhere", "s3://bucket/mlflow-artifacts")
    beside = first.client.create_experiment("beside", f"file://{tmp_path}/old/d2/mlflow-artifacts")
    before = files_of(old)
    new.parent.mkdir(parents=True)
    shutil.copytree(old, new)
    if way == "moved":
        shutil.rmtree(old.parent)
    again, run_again, version_again = log_all(new, size=2.0)
    assert (run_again.run_id, version_again) == (run.run_id, version)
    assert files_of(old.parent) == (before if way == "copied" else {})
    client = again.client
    pictures = [file.path for file in client.list_artifacts(run.run_id, "figures")]
    assert pictures == ["figures/curve.png"]
    assert len(list(new.rglob("curve.png"))) == 1
    (registered,) = client.search_model_versions("name = 'tipl-moved'")
    (data,) = client.get_run(run.run_id).inputs.dataset_inputs
    artifacts = client.get_run(run.run_id).info.artifact_uri
    assert artifacts.startswith(f"{(new / 'mlflow-artifacts').as_uri()}/{run.run_id}")
    assert registered.source == f"{artifacts}/model"
    assert json.loads(data.dataset.source) == {"uri": f"{new}/trajectories"}
    assert client.get_run(run.run_id).data.tags["model_folder"] == f"{new}/models/0123"
    assert client.get_experiment(elsewhere).artifact_location == "s3://bucket/mlflow-artifacts"
    assert client.get_experiment(beside).artifact_location == f"file://{tmp_path}/old/d2/mlflow-artifacts"
    with contextlib.closing(sqlite3.connect(new / "mlflow.db")) as database:
        dump = "\n".join(database.iterdump())
    assert f"{old}/" not in dump, "nothing names the old place"


def test_a_storage_of_before_the_place_was_recorded_is_followed_by_its_runs(storage, tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (storage / "weights").mkdir(exist_ok=True)
    (storage / "weights" / "model.json").write_text("{}")
    old, new = tmp_path / "old", tmp_path / "new"
    shutil.copytree(storage, old)
    log_all(old)
    with contextlib.closing(sqlite3.connect(old / "mlflow.db")) as database, database:
        database.execute("UPDATE experiments SET artifact_location = '/cwd/mlruns/0' WHERE experiment_id = 0")
    before = files_of(old)
    shutil.copytree(old, new)
    tracker, run, _ = log_all(new, size=2.0)
    assert files_of(old) == before
    assert tracker.client.get_run(run.run_id).info.artifact_uri.startswith((new / "mlflow-artifacts").as_uri())


def test_artifacts_of_an_sqlite_file_of_its_own_are_beside_it(storage, tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copytree(storage, tmp_path / "records")
    uri = f"sqlite:///{tmp_path}/records/mlflow.db"
    for name in ("one", "two"):
        tracker = tracking.Tracker.open(uri, "shared", str(tmp_path / name))
        location = tracker.client.get_experiment(tracker.experiment_id).artifact_location
        assert location == (tmp_path / "records" / "mlflow-artifacts").as_uri()
        assert not (tmp_path / name).exists()


OPENING_PROGRAM = """
import sys
from tipl_ray import tracking
print("ready", flush=True)
sys.stdin.readline()
with tracking.Tracker.open(None, "pendulum", sys.argv[1]).run("collect", sys.argv[2]) as run:
    run.log_metrics({"return": 17.0}, step=1)
print(run.run_id)
"""


def opening(storage, key):
    return subprocess.Popen(
        [sys.executable, "-c", OPENING_PROGRAM, str(storage), key],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(process):
    out, errors = process.communicate("\n", timeout=300)
    assert process.returncode == 0, errors
    assert errors == ""
    return out.split()[-1]


def test_two_jobs_that_come_first_at_once_share_one_database_that_is_whole(tmp_path):
    jobs = [opening(tmp_path, key) for key in ("one", "two")]
    for job in jobs:
        assert job.stdout.readline() == "ready\n"
    for job in jobs:
        job.stdin.write("\n")
        job.stdin.flush()
    runs = {finished(job) for job in jobs}
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("pendulum")
    assert experiment is not None
    assert {run.info.run_id for run in client.search_runs([experiment.experiment_id])} == runs
    assert len(runs) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mlflow.db"]


def test_a_job_that_is_killed_while_it_makes_the_database_can_be_run_again(tmp_path):
    moments = random.Random(3)
    for _ in range(2):
        job = opening(tmp_path, "key")
        assert job.stdout.readline() == "ready\n"
        job.stdin.write("\n")
        job.stdin.flush()
        time.sleep(moments.uniform(0.5, 8))
        job.send_signal(signal.SIGKILL)
        job.communicate()
    finished(opening(tmp_path, "key"))
    with contextlib.closing(sqlite3.connect(tmp_path / "mlflow.db")) as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def whole_schema(storage):
    with contextlib.closing(sqlite3.connect(storage / "mlflow.db")) as database:
        return dict(database.execute("SELECT name, sql FROM sqlite_master WHERE sql NOT NULL").fetchall())


@pytest.mark.parametrize("share", [0.0, 0.1, 0.9, 1.0])
def test_a_half_made_database_is_made_anew(share, storage, tracker, tmp_path):
    """As MLflow leaves it where it is killed, or has no room: some of its tables, and no experiment."""
    statements = whole_schema(storage)
    with contextlib.closing(sqlite3.connect(tmp_path / "mlflow.db")) as database, database:
        for statement in list(statements.values())[: int(share * len(statements))]:
            database.execute(statement)
    if share == 0.0:
        (tmp_path / "mlflow.db").touch()
    with pytest.raises(tracking.TrackingError, match=r"mlflow\.db: it contains no runs"):
        tracking.open_to_read(None, str(tmp_path))
    made = tracking.Tracker.open(None, "pendulum", str(tmp_path))
    with made.run("collect", "key"):
        pass
    assert set(whole_schema(tmp_path)) == set(statements)


@contextlib.contextmanager
def files_no_larger_than(size):
    """As on a disk that is nearly full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_without_room_a_job_ends_in_one_line_and_with_room_it_goes_on(tmp_path, monkeypatch, capfd):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with (
        files_no_larger_than(100_000),
        pytest.raises(tracking.TrackingError, match="Free some space there or fix permissions"),
    ):
        tracking.Tracker.open(None, "pendulum", str(tmp_path))
    tracker = tracking.Tracker.open(None, "pendulum", str(tmp_path))
    run = tracker.start("train", "no room")
    size = (tmp_path / "mlflow.db").stat().st_size
    with (
        files_no_larger_than(size),
        pytest.raises(tracking.TrackingError, match="Free some space there or fix permissions"),
    ):
        run.log_history("loss", range(20_000), [1.0] * 20_000)
    again = tracker.start("train", "no room")
    again.log_history("loss", range(3_000), [1.0] * 3_000)
    assert [step for step, _ in history(tracker, again, "loss")] == list(range(3_000))
    assert "Traceback" not in "".join(capfd.readouterr())


def test_a_database_with_anything_in_it_is_left_as_it_is(tmp_path):
    with contextlib.closing(sqlite3.connect(tmp_path / "mlflow.db")) as database, database:
        database.execute("CREATE TABLE notes (line)")
        database.execute("INSERT INTO notes VALUES ('mine')")
    tracking._make_database(tmp_path / "mlflow.db")
    with contextlib.closing(sqlite3.connect(tmp_path / "mlflow.db")) as database:
        assert database.execute("SELECT * FROM notes").fetchall() == [("mine",)]


def test_only_a_process_that_can_be_seen_from_here_is_taken_for_dead(tracker, storage):
    own, number = tracking._namespace(), os.getpid()
    started = tracking._started(number)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    processes = {
        "alive": f"{own} {number} {started}",
        "dead": f"{own} {dead.pid} 17",
        "its number has another": f"{own} {number} 17",
        "another container of this host": f"{own}0 {dead.pid} 17",
        "of an earlier version": f"{socket.gethostname()}:{dead.pid}",
        "nonsense": "  ",
        "no number": f"{own} ten 17",
    }
    runs = {what: tracker.start("collect", what, tags={}) for what in processes}
    for what, process in processes.items():
        runs[what].set_tags({tracking.PROCESS_TAG: process})
    tracking.Tracker.open(None, "pendulum", str(storage))
    status = {what: tracker.client.get_run(run.run_id).info.status for what, run in runs.items()}
    assert [what for what in status if status[what] == "KILLED"] == ["dead", "its number has another"]
    for run in runs.values():
        tracker.end(run, "FINISHED")


@pytest.mark.parametrize(
    "uri",
    [
        "databricks",
        "databricks-uc",
        "databricks://profile",
        "uc:http://127.0.0.1:1",
        "arn:aws:sagemaker:eu-west-1:1:mlflow-app/a",
        "postgresql+psycopg2://me@host/runs",
        "sqlite+pysqlite:////data/mlflow.db",
        "https://mlflow",
    ],
)
def test_every_scheme_of_mlflows_own_passes(uri):
    assert tracking.resolve_uri(uri, "/storage") == uri


def test_an_empty_uri_is_none(monkeypatch):
    for given in ("", None):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
        assert tracking.resolve_uri(given, "/storage") == "sqlite:////storage/mlflow.db"


def test_whatever_goes_wrong_in_a_call_is_one_line_with_a_way_out(storage, tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copytree(storage, tmp_path / "d")
    tracker = tracking.Tracker.open(None, "pendulum", str(tmp_path / "d"))
    with pytest.raises(tracking.TrackingError, match=r"^MLflow at sqlite:.* refuses: .*nonsense") as told:
        comparison.choose(tracker.client, ["nonsense"], None, None, "skill")
    assert "\n" not in str(told.value)
    with pytest.raises(tracking.TrackingError, match=r"^MLflow at sqlite:.* refuses: "):
        comparison.choose(tracker.client, [], None, "no query =", "skill")
    with tracker.run("train", "a metric") as measured:
        measured.log_metrics({"skill": 0.5, "skill_h1": 0.7})
    with pytest.raises(
        ValueError, match=r"^by='skil_h1': none of these 1 runs has this metric; similar ones are skill_h1, "
    ):
        comparison.choose(tracker.client, [measured.run_id], None, None, "skil_h1")
    run = tracker.start("train", "no room")
    shutil.rmtree(tmp_path / "d" / "mlflow-artifacts", ignore_errors=True)
    (tmp_path / "d" / "mlflow-artifacts").touch()
    with pytest.raises(tracking.TrackingError, match=r"Free some space there or fix permissions, and run again"):
        run.log_figure(Figure(), "curve")
    with pytest.raises(ZeroDivisionError), tracker.run("train", "lost"):  # noqa: PT012
        (tmp_path / "d" / "mlflow.db").write_bytes(b"not a database, by any means" * 100_000)
        _ = 1 / 0
    with pytest.raises(tracking.TrackingError, match=r"MLflow cannot be used at tracking\.uri='sqlite:"):
        run.log_metrics({"loss": 1.0})


@pytest.mark.parametrize("name", ["größe 100%", "日本", "a'b", "_x_%s"])
def test_names_of_any_letters_are_found_again_and_registered(name, storage, tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "model.json").write_text("{}")
    tracker = tracking.Tracker.open(None, name, str(storage))
    with tracker.run(f"train {name}", f"train {name}".replace("'", "")) as run:
        run.log_model_folder(tmp_path)
    assert tracking.Tracker.open(None, name, str(storage)).experiment_id == tracker.experiment_id
    found = tracker.find(f"train {name}".replace("'", ""))
    assert found is not None
    assert found.run_id == run.run_id
    assert tracker.register(f"tipl-{name}", run.run_id, name) == "1"
    assert tracker.register(f"tipl-{name}", run.run_id, name) == "1"


@pytest.mark.parametrize("option", ["--runs", "--parent"])
def test_compare_names_the_option_whose_run_there_is_not_and_where_ids_are(
    option, tracker, storage, monkeypatch, capsys
):
    monkeypatch.setattr(sys, "argv", ["tipl compare", "--storage", str(storage), option, "nope"])
    with pytest.raises(SystemExit) as ended:
        tipl.load("compare").main()
    assert ended.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {option} nope: MLflow at sqlite:")
    assert line.endswith("ids are in the addresses of runs' pages in MLflow, after /runs/")
