"""MLflow: one run per stage and data set, found again by a stable key, so that a restart goes on in the same run.

Knows MLflow 3.17 through MlflowClient alone (no active run, no global tracking URI) and imports it inside functions:
it takes seconds. Knows nothing of what is logged. A metric's timestamp is a function of its step and a step keeps the
first value it was given, so logging again after a restart changes nothing.
"""

from __future__ import annotations

import contextlib
import getpass
import io
import json
import logging
import math
import os
import shlex
import socket
import subprocess
import sys
import urllib.parse
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tipl_ray import config
from tipl_ray.storage import join, local_folder

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from mlflow import MlflowClient
    from mlflow.entities import RunInfo

KEY_TAG = "tipl_ray.key"
PROCESS_TAG = "tipl_ray.process"
PARENT_TAG = "mlflow.parentRunId"
MODEL_FOLDER = "model"

MAX_PARAMETER_LETTERS = 6000
MAX_DIGEST_LETTERS = 36
PARAMETERS_PER_BATCH = 100
METRICS_PER_BATCH = 1000


class TrackingError(config.UserError):
    """MLflow's store cannot be used; the message names its URI and a way out."""


def resolve_uri(uri: str | None, storage_path: str) -> str:
    """The tracking URI: the given one, else $MLFLOW_TRACKING_URI, else a sqlite file in the storage.

    Raises TrackingError for what would not outlive the job: a file store, a relative sqlite path.
    """
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        folder = local_folder(storage_path)
        if folder is None:
            raise TrackingError(
                f"tracking.uri is not set and storage={storage_path!r} is no local folder, so no sqlite file can lie "
                "there: start an MLflow server and set --tracking.uri or MLFLOW_TRACKING_URI to it"
            )
        return f"sqlite:///{folder / 'mlflow.db'}"
    if urllib.parse.urlsplit(uri).scheme in ("", "file"):
        raise TrackingError(
            f"tracking.uri={uri!r} is a folder, which MLflow refuses since 3.17: give sqlite:////absolute/mlflow.db or "
            "the http:// address of a server"
        )
    if uri.startswith("sqlite:") and not uri.startswith("sqlite:////"):
        raise TrackingError(
            f"tracking.uri={uri!r} is relative to the working directory, which a Ray job throws away: give four "
            "slashes and an absolute path, sqlite:////absolute/mlflow.db"
        )
    return uri


def ui_command(uri: str) -> str:
    """The shell command that opens MLflow's pages on this store, for this machine only."""
    if uri.startswith(("http://", "https://")):
        return f"{shlex.quote(sys.executable)} -m webbrowser {shlex.quote(uri)}"
    return f"{shlex.quote(sys.executable)} -m mlflow ui --backend-store-uri {shlex.quote(uri)} --host 127.0.0.1"


def source_tags(folder: Path = config.CHECKOUT) -> dict[str, str]:
    """MLflow's tags for the user, the program and, where the folder is a git repository, the commit."""
    tags = {"mlflow.user": _user(), "mlflow.source.name": sys.argv[0], "mlflow.source.type": "LOCAL"}
    commit = _git(folder, "rev-parse", "HEAD")
    if commit:
        tags["mlflow.source.git.commit"] = commit
        tags["mlflow.source.git.dirty"] = str(bool(_git(folder, "status", "--porcelain"))).lower()
    return tags


class Tracker:
    """One MLflow experiment. Open it first in the driver: a fresh sqlite file must be initialised by one process."""

    def __init__(self, client: MlflowClient, uri: str, experiment_id: str) -> None:
        self.client = client
        self.uri = uri
        self.experiment_id = experiment_id

    @classmethod
    def open(cls, uri: str | None, experiment_name: str, storage_path: str) -> Tracker:
        """Find or create the experiment, and mark as KILLED what dead processes of this machine left RUNNING.

        Raises TrackingError, within seconds and naming the URI, where the store cannot be used.
        """
        uri = resolve_uri(uri, storage_path)
        if uri.startswith("sqlite:"):
            Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
        with _usable(uri) as client:
            tracker = cls(client, uri, _experiment_id(client, uri, experiment_name, storage_path))
            tracker._end_dead_runs()
            return tracker

    @contextlib.contextmanager
    def run(
        self, name: str, key: str, *, parent: Run | None = None, tags: Mapping[str, str] | None = None
    ) -> Iterator[Run]:
        """The run with this key, reopened if there is one, else created; nested under `parent`.

        It ends FINISHED, KILLED on KeyboardInterrupt, FAILED on any other exception.
        """
        run = self.start(name, key, parent=parent, tags=tags)
        try:
            yield run
        except KeyboardInterrupt:
            self.end(run, "KILLED")
            raise
        except BaseException:
            self.end(run, "FAILED")
            raise
        self.end(run, "FINISHED")

    def start(self, name: str, key: str, *, parent: Run | None = None, tags: Mapping[str, str] | None = None) -> Run:
        """As `run`, for runs that do not end where a block does: the caller ends each by `end`."""
        if "'" in key:
            raise ValueError(f"key={key!r} holds a quote, which MLflow's search cannot look up")
        own = {KEY_TAG: key, PROCESS_TAG: f"{socket.gethostname()}:{os.getpid()}"}
        tags = {**source_tags(), **(tags or {}), **own}
        if parent is not None:
            tags[PARENT_TAG] = parent.run_id
        info = self.find(key)
        if info is None:
            created = self.client.create_run(self.experiment_id, tags=tags, run_name=name)
            return Run(self.client, created.info.run_id, created.info.start_time)
        self.client.update_run(info.run_id, status="RUNNING", name=name)
        run = Run(self.client, info.run_id, info.start_time)
        run.set_tags(tags)
        return run

    def find(self, key: str) -> RunInfo | None:
        """What MLflow knows of the run with this key, the first if there were several; None if there is none."""
        found = self.client.search_runs(
            [self.experiment_id], f"tags.`{KEY_TAG}` = '{key}'", order_by=["attributes.start_time ASC"], max_results=1
        )
        return found[0].info if found else None

    def resume(self, run_id: str) -> Run:
        """A run that has ended, to add to; it stays ended."""
        return Run(self.client, run_id, self.client.get_run(run_id).info.start_time)

    def end(self, run: Run, status: Literal["FINISHED", "FAILED", "KILLED"]) -> None:
        """End a run that `start` gave."""
        self.client.set_terminated(run.run_id, status)

    def register(self, name: str, run_id: str, description: str) -> str:
        """Make the model that a run has logged the newest version of a registered model; its version.

        A run's model is registered once, however often this is called.
        """
        import mlflow

        for version in self.client.search_model_versions(f"run_id = '{run_id}'"):
            if version.name == name:
                return str(version.version)
        with contextlib.suppress(mlflow.MlflowException):  # another sweep has made it
            self.client.create_registered_model(name)
        source = f"{self.client.get_run(run_id).info.artifact_uri}/{MODEL_FOLDER}"
        return str(self.client.create_model_version(name, source, run_id, description=description).version)

    def _end_dead_runs(self) -> None:
        for run in self.client.search_runs([self.experiment_id], "attributes.status = 'RUNNING'"):
            host, _, process = run.data.tags.get(PROCESS_TAG, "").rpartition(":")
            if host == socket.gethostname() and not _alive(int(process)):
                self.client.set_terminated(run.info.run_id, "KILLED")


class Run:
    """One MLflow run that is open for logging; made by `Tracker.run`."""

    def __init__(self, client: MlflowClient, run_id: str, start_time_ms: int) -> None:
        self.client = client
        self.run_id = run_id
        self._start_time_ms = start_time_ms
        self._metrics_before = frozenset(client.get_run(run_id).data.metrics)
        self._steps_logged: dict[str, set[int]] = {}

    def log_parameters(self, parameters: Mapping[str, Any]) -> None:
        """Log a nested table as dotted parameters, long values cut.

        MLflow's parameters are final: one that differs from what a run before it logged becomes the tag `now.<name>`.
        """
        from mlflow.entities import Param, RunTag

        known = self.client.get_run(self.run_id).data.params
        flat = {name: str(value)[:MAX_PARAMETER_LETTERS] for name, value in config.flat(parameters)}
        fresh = [Param(name, value) for name, value in flat.items() if name not in known]
        changed = [RunTag(f"now.{name}", value) for name, value in flat.items() if known.get(name, value) != value]
        for start in range(0, len(fresh), PARAMETERS_PER_BATCH):
            self.client.log_batch(self.run_id, params=fresh[start : start + PARAMETERS_PER_BATCH])
        for start in range(0, len(changed), PARAMETERS_PER_BATCH):
            self.client.log_batch(self.run_id, tags=changed[start : start + PARAMETERS_PER_BATCH])

    def log_metrics(self, metrics: Mapping[str, float | None], step: int = 0) -> None:
        """Log one value per metric; None and NaN are left out, and so is a step that was logged before."""
        self._log_points((name, step, value) for name, value in metrics.items())

    def log_history(self, name: str, steps: Sequence[int], values: Sequence[float | None]) -> None:
        """Log a whole curve; None and NaN are gaps in it, and a step that was logged before stays as it is.

        Raises ValueError if there are not as many values as steps.
        """
        if len(steps) != len(values):
            raise ValueError(f"history {name!r} has {len(steps)} steps and {len(values)} values")
        self._log_points((name, step, value) for step, value in zip(steps, values, strict=True))

    def log_figure(self, figure: Figure | str | Path, name: str) -> None:
        """Keep a picture, a matplotlib Figure or a PNG file, as `figures/<name>.png`."""
        if isinstance(figure, str | Path):
            content = Path(figure).read_bytes()
        else:
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png", metadata={"Software": None})
            content = buffer.getvalue()
        self.client.log_stream(self.run_id, io.BytesIO(content), f"figures/{name.removesuffix('.png')}.png")

    def log_file(self, path: str | Path, folder: str | None = None) -> None:
        """Keep a copy of a file among the run's artifacts."""
        self.client.log_artifact(self.run_id, str(path), folder)

    def log_dataset(
        self,
        name: str,
        digest: str,
        source: str,
        *,
        schema: Mapping[str, str] | None = None,
        profile: Mapping[str, Any] | None = None,
        context: str = "training",
    ) -> None:
        """Record which data set the run used; the data itself is not copied.

        `source` is its folder or URI, `schema` its columns' types, `profile` any figures about it. MLflow cuts a digest
        to 36 letters; the whole one stands in the profile.
        """
        from mlflow.entities import Dataset, DatasetInput, InputTag

        columns = [{"type": kind, "name": column, "required": True} for column, kind in (schema or {}).items()]
        dataset = Dataset(
            name=name,
            digest=digest[:MAX_DIGEST_LETTERS],
            source_type=urllib.parse.urlsplit(source).scheme or "local",
            source=json.dumps({"uri": source}),
            schema=json.dumps({"mlflow_colspec": columns}) if columns else None,
            profile=json.dumps({**(profile or {}), "digest": digest}),
        )
        self.client.log_inputs(self.run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", context)])])

    def log_model_folder(self, path: str | Path, loader: str | None = None) -> None:
        """Keep a copy of a model's folder (safetensors plus JSON) as `model/`.

        With the name of a module that has `_load_pyfunc(path)`, `mlflow.pyfunc.load_model` loads it too: MLflow then
        imports that module, and nothing is unpickled.
        """
        self.client.log_artifacts(self.run_id, str(path), MODEL_FOLDER)
        if loader is not None:
            import mlflow.pyfunc

            described = mlflow.models.Model(artifact_path=MODEL_FOLDER, run_id=self.run_id)
            mlflow.pyfunc.add_to_model(described, loader_module=loader)
            self.client.log_text(self.run_id, described.to_yaml(), f"{MODEL_FOLDER}/MLmodel")

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags, in place of those of the same names."""
        for name, value in tags.items():
            self.client.set_tag(self.run_id, name, value)

    @contextlib.contextmanager
    def system_metrics(self, uri: str) -> Iterator[None]:
        """Log this machine's processors, memory, disk and network as `system/...`, every ten seconds."""
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        monitor = SystemMetricsMonitor(self.run_id, resume_logging=True, tracking_uri=uri)
        monitor.start()
        try:
            yield
        finally:
            monitor.finish()

    def _log_points(self, points: Iterable[tuple[str, int, float | None]]) -> None:
        from mlflow.entities import Metric

        fresh = []
        for name, step, value in points:
            logged = self._logged(name)
            if value is None or math.isnan(value) or step in logged:
                continue
            logged.add(int(step))
            fresh.append(Metric(name, float(value), self._start_time_ms + int(step), int(step)))
        for start in range(0, len(fresh), METRICS_PER_BATCH):
            self.client.log_batch(self.run_id, metrics=fresh[start : start + METRICS_PER_BATCH])

    def _logged(self, name: str) -> set[int]:
        if name not in self._steps_logged:
            before = self.client.get_metric_history(self.run_id, name) if name in self._metrics_before else []
            self._steps_logged[name] = {point.step for point in before}
        return self._steps_logged[name]


def open_to_read(uri: str | None, storage_path: str) -> tuple[MlflowClient, str]:
    """A client of an MLflow that is there, and its URI; nothing is created. Raises TrackingError as `Tracker.open`."""
    uri = resolve_uri(uri, storage_path)
    file = Path(uri.removeprefix("sqlite:///"))
    if uri.startswith("sqlite:") and not file.is_file():
        raise TrackingError(f"{file}: no such file; give --storage or --uri of an MLflow that has runs")
    with _usable(uri) as client:
        client.search_experiments(max_results=1)
        return client, uri


@contextlib.contextmanager
def _usable(uri: str) -> Iterator[MlflowClient]:
    """A client, and what goes wrong with it within seconds as one TrackingError."""
    # Read at import: without it, MLflow sends usage data out of a cluster that may have no way out.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    import mlflow
    import sqlalchemy.exc

    logging.getLogger("mlflow").setLevel(logging.WARNING)
    try:
        with _impatient():
            yield mlflow.MlflowClient(uri)
    except (mlflow.MlflowException, sqlalchemy.exc.SQLAlchemyError, ImportError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise TrackingError(
            f"MLflow cannot be used at tracking.uri={uri!r}: {reason}. Start that server, or set --tracking.uri or "
            "MLFLOW_TRACKING_URI to another"
        ) from error


def _experiment_id(client: MlflowClient, uri: str, name: str, storage_path: str) -> str:
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        # A server keeps artifacts where it was told to; a bare database would put them into the working directory.
        location = None if uri.startswith(("http://", "https://")) else _artifact_location(uri, storage_path)
        return client.create_experiment(name, artifact_location=location)
    if experiment.lifecycle_stage != "active":
        raise TrackingError(
            f"tracking.experiment={name!r} was deleted in MLflow at {uri!r}: restore it there, or give another name"
        )
    return experiment.experiment_id


def _artifact_location(uri: str, storage_path: str) -> str:
    folder = local_folder(storage_path)
    if folder is None and uri.startswith("sqlite:"):
        folder = Path(uri.removeprefix("sqlite:///")).parent
    if folder is None:
        return join(storage_path, "mlflow-artifacts").partition("?")[0]
    return (folder / "mlflow-artifacts").as_uri()


@contextlib.contextmanager
def _impatient() -> Iterator[None]:
    """MLflow's patience with a server cut from minutes to seconds, where the user has not set it."""
    limits = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
    ours = {name: value for name, value in limits.items() if name not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            del os.environ[name]


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())  # a container's user that has no name


def _git(folder: Path, *arguments: str) -> str:
    try:
        answer = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return answer.stdout.strip() if answer.returncode == 0 else ""
