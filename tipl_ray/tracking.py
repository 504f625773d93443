"""MLflow: one run per stage and data set, found again by a stable key, so that a restart continues the same run.

Knows MLflow 3.17 through MlflowClient alone (no active run, no global tracking URI) and imports it inside functions:
it takes seconds. Knows nothing of what is logged. A metric's timestamp is a function of its step and a step keeps the
first value it was given, so logging again after a restart changes nothing.

An sqlite file and its artifacts are in one folder, which may be moved or copied.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import getpass
import importlib.metadata
import io
import json
import logging
import math
import os
import re
import shlex
import socket
import sqlite3
import subprocess
import sys
import tempfile
import urllib.parse
import urllib.request
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from tipl_ray.data.storage import join, local_folder
from tipl_ray.digest import flat, redacted
from tipl_ray.errors import UserError, nearest
from tipl_ray.places import CHECKOUT

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from mlflow import MlflowClient
    from mlflow.entities import RunInfo

KEY_TAG = "tipl_ray.key"
PROCESS_TAG = "tipl_ray.process"
PARENT_TAG = "mlflow.parentRunId"
KIND_TAG, KIND = "mlflow.experimentKind", "custom_model_development"
"""Tag that makes MLflow's pages show an experiment as model training; without it they open on a view for LLMs."""
PAGE = "/#/experiments/{}/runs?workflowType=machine_learning"
"""An experiment's runs with their metrics, among MLflow's pages."""
MODEL_FOLDER, ARTIFACTS = "model", "mlflow-artifacts"
DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
SERVERS = ("http", "https")
WORDS = ("databricks", "databricks-uc")
"""Tracking URIs of MLflow's own that have no scheme."""
CLOUDS = ("databricks", "databricks-uc", "uc", "arn", "azureml")
"""Schemes of hosted stores; those of a plugin that is installed are known as well."""
DATABASE_FILE = re.compile(r"\.(db|db3|sqlite|sqlite3)$", re.IGNORECASE)
RETRIES = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"
CONNECT_SECONDS = 2.0
"""How long a server may take to accept a connection."""
LOCATIONS = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)
"""Columns of MLflow's database with the places of artifacts."""
DATABASE_ATTEMPTS = 4
"""Times that a database is tried, over a second, before it counts as unreachable."""
LOCK_SECONDS = 60.0
"""How long an sqlite file may be held by others."""
REFUSALS = ("RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS", "INVALID_PARAMETER_VALUE", "INVALID_STATE")
"""Error codes of a healthy MLflow that refuses a request."""
NO_ROOM_OR_ACCESS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EFBIG)

MAX_PARAMETER_LETTERS = 6000
MAX_DIGEST_LETTERS = 36
PARAMETERS_PER_BATCH = 100
METRICS_PER_BATCH = 1000


class TrackingError(UserError):
    """MLflow's store cannot be used; the message names its URI and what to do."""


def resolve_uri(uri: str | None, storage_path: str) -> str:
    """The tracking URI: the given one, else $MLFLOW_TRACKING_URI, else a sqlite file in the storage; "" is none.

    Raises TrackingError for what would not outlive the job: a file store, a relative sqlite path.
    """
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        folder = local_folder(storage_path)
        if folder is None:
            raise TrackingError(
                f"tracking.uri is not set and storage={redacted(storage_path)!r} is not a local folder, so it cannot "
                "hold an sqlite file: start an MLflow server and set --tracking.uri or MLFLOW_TRACKING_URI to it"
            )
        if "?" in str(folder):
            raise TrackingError(
                f"storage={str(folder)!r} contains a question mark, which ends the URI of an sqlite file: rename the "
                "folder, or set --tracking.uri or MLFLOW_TRACKING_URI"
            )
        return f"sqlite:///{folder / 'mlflow.db'}"
    check_uri(uri)
    return uri


def check_uri(uri: str) -> None:
    """Raises TrackingError for a tracking URI that MLflow does not understand, or that would not outlive the job."""
    scheme, shown = _scheme(uri), redacted(uri)
    if scheme in ("", "file") and uri not in WORDS:
        if DATABASE_FILE.search(uri):
            path = Path(uri.partition("://")[2] if scheme else uri).absolute()
            raise TrackingError(f"tracking.uri={shown!r} is a path, not a URI: write sqlite:///{path}")
        raise TrackingError(
            f"tracking.uri={shown!r} is a folder, which MLflow no longer supports since 3.17: use "
            "sqlite:////absolute/mlflow.db or the http:// address of a server"
        )
    if scheme.startswith("sqlite") and not re.match(r"[\w+]+:////", uri):
        raise TrackingError(
            f"tracking.uri={shown!r} is relative to the working directory, which a Ray job deletes: use "
            "four slashes and an absolute path, sqlite:////absolute/mlflow.db"
        )
    known = (*SERVERS, *DATABASES, *CLOUDS)
    if uri not in WORDS and scheme.partition("+")[0] not in known and scheme not in _plugins():
        raise TrackingError(
            f"tracking.uri={shown!r}: MLflow knows no scheme {scheme!r}{nearest(scheme, known)}; its schemes are "
            f"{', '.join(known)}"
        )


def _plugins() -> set[str]:
    """Schemes that MLflow's plugins, where some are installed, add to its own."""
    return {one.name for one in importlib.metadata.entry_points(group="mlflow.tracking_store")}


def ui_command(uri: str, experiment_id: str | None = None) -> str:
    """The shell command that opens MLflow's pages on this store, for this machine only; no password is in it.

    With an experiment it names the page of its runs.
    """
    shown = shlex.quote(redacted(uri))
    if shown != shlex.quote(uri) and uri == os.environ.get("MLFLOW_TRACKING_URI"):
        shown = '"$MLFLOW_TRACKING_URI"'
    page = PAGE.format(experiment_id) if experiment_id else ""
    if _scheme(uri) in SERVERS:
        return f"{shlex.quote(sys.executable)} -m webbrowser {shown}{shlex.quote(page) if page else ''}"
    if not _scheme(uri).startswith(DATABASES):
        return f"the pages of {shown}"
    command = f"{shlex.quote(sys.executable)} -m mlflow ui --backend-store-uri {shown} --host 127.0.0.1"
    return f"{command}  # then http://127.0.0.1:5000{page}" if page else command


def source_tags(folder: Path = CHECKOUT) -> dict[str, str]:
    """MLflow's tags for the user, the program and, where the folder is a git repository, the commit."""
    tags = {"mlflow.user": _user(), "mlflow.source.name": sys.argv[0], "mlflow.source.type": "LOCAL"}
    commit = _git(folder, "rev-parse", "HEAD")
    if commit:
        tags["mlflow.source.git.commit"] = commit
        tags["mlflow.source.git.dirty"] = str(bool(_git(folder, "status", "--porcelain"))).lower()
    return tags


def prepare(uri: str) -> None:
    """Import MLflow, and give an sqlite file of this URI its tables: what `Tracker.open` spends its seconds on.

    Raises nothing: what is wrong with the store, opening it finds.
    """
    with contextlib.suppress(Exception):
        _quiet_mlflow()
        import mlflow.store.db.utils  # noqa: F401

        if file := _sqlite_file(uri):
            _make_database(file)


class Tracker:
    """One MLflow experiment. Open it first in the driver: a fresh sqlite file must be initialised by one process."""

    def __init__(self, client: MlflowClient, uri: str, experiment_id: str) -> None:
        self.client = client
        self.uri = uri
        self.experiment_id = experiment_id

    @classmethod
    def open(cls, uri: str | None, experiment_name: str, storage_path: str) -> Tracker:
        """Find or create the experiment, and mark as KILLED the runs that dead processes of this machine left RUNNING.

        Raises TrackingError, within seconds and naming the URI, where the store cannot be used.
        """
        uri = resolve_uri(uri, storage_path)
        if file := _sqlite_file(uri):
            with _as_tracking_error(uri):
                _make_database(file)
                _follow_artifacts(file, local_folder(storage_path))
        _check_that_it_answers(uri)
        with _impatient():
            client = _client(uri)
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
        except BaseException as error:
            with contextlib.suppress(TrackingError):  # what ended the block is what the user has to hear of
                self.end(run, "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
            raise
        self.end(run, "FINISHED")

    def start(self, name: str, key: str, *, parent: Run | None = None, tags: Mapping[str, str] | None = None) -> Run:
        """As `run`, for runs that do not end where a block does: the caller ends each by `end`."""
        if "'" in key:
            raise ValueError(f"key={key!r} contains a quote, which MLflow's search cannot handle")
        own = {KEY_TAG: key, PROCESS_TAG: " ".join([_namespace(), str(os.getpid()), _started(os.getpid()) or ""])}
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

    def register(self, name: str, run_id: str, description: str, tags: Mapping[str, str] | None = None) -> str:
        """Make the model that a run has logged the newest version of a registered model; its version.

        A run's model is registered once, however often this is called. The tags are the version's.
        """
        for version in self.client.search_model_versions(f"run_id = '{run_id}'"):
            if version.name == name:
                return str(version.version)
        with contextlib.suppress(AlreadyThereError):  # another sweep has made it
            self.client.create_registered_model(name)
        source = f"{self.client.get_run(run_id).info.artifact_uri}/{MODEL_FOLDER}"
        created = self.client.create_model_version(name, source, run_id, dict(tags or {}), description=description)
        return str(created.version)

    def _end_dead_runs(self) -> None:
        for run in self.client.search_runs([self.experiment_id], "attributes.status = 'RUNNING'"):
            namespace, _, process = run.data.tags.get(PROCESS_TAG, "").partition(" ")
            number, _, started = process.partition(" ")
            # Of a process elsewhere, be it in another container of this very host, nothing can be known from here.
            if namespace == _namespace() and number.isdecimal() and _started(int(number)) not in (started, ""):
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
        told = {name: str(value)[:MAX_PARAMETER_LETTERS] for name, value in flat(parameters)}
        fresh = [Param(name, value) for name, value in told.items() if name not in known]
        changed = [RunTag(f"now.{name}", value) for name, value in told.items() if known.get(name, value) != value]
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

    def log_figure(self, picture: Figure | bytes, name: str) -> None:
        """Keep a picture, a matplotlib Figure or a PNG, as `figures/<name>.png`."""
        from tipl_ray.drawing import png

        self.log_file(picture if isinstance(picture, bytes) else png(picture), f"figures/{name}.png")

    def log_file(self, content: bytes, name: str) -> None:
        """Keep a file among the run's artifacts."""
        self.client.log_stream(self.run_id, io.BytesIO(content), name)

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
        to 36 letters; the whole one is in the profile.
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
    if file := _sqlite_file(uri):
        if not file.is_file():
            raise TrackingError(f"{file}: no such file; set --storage or --uri to an MLflow that has runs")
        with _as_tracking_error(uri):
            if not _holds_anything(file):
                raise TrackingError(f"{file}: it contains no runs; set --storage or --uri to an MLflow that has some")
    _check_that_it_answers(uri)
    with _impatient():
        client = _client(uri)
        client.search_experiments(max_results=1)
    return client, uri


class RefusedError(TrackingError):
    """A healthy MLflow refuses a request."""


class AlreadyThereError(RefusedError):
    """MLflow has one of that name already."""


class _Client:
    """MLflow's client, of which whatever goes wrong in any call is one TrackingError."""

    def __init__(self, client: MlflowClient, uri: str) -> None:
        self._client, self._uri = client, uri

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._client, name)
        if not callable(method):
            return method

        @functools.wraps(method)
        def call(*arguments: Any, **named: Any) -> Any:
            with _as_tracking_error(self._uri):
                return method(*arguments, **named)

        return call


def _client(uri: str) -> MlflowClient:
    if redacted(uri) != uri:
        # Where a run ends on a server, MLflow prints its address, whole.
        os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
    with _as_tracking_error(uri):
        client = _quiet_mlflow().MlflowClient(uri)
    from mlflow.tracking._tracking_service.utils import _artifact_repos_cache

    # By the ids of runs, it remembers where artifacts go; a storage and its copy have the same runs.
    _artifact_repos_cache.clear()
    return cast("MlflowClient", _Client(client, uri))


def _quiet_mlflow() -> Any:
    """MLflow, imported so that it prints nothing and sends nothing."""
    # Read at import: without it, MLflow sends usage data out of a cluster that may have no way out.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    import mlflow

    logging.getLogger("mlflow").setLevel(logging.WARNING)
    # It logs, with a traceback and the URI, what it raises, which is told once and without its secrets here.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    return mlflow


@contextlib.contextmanager
def _as_tracking_error(uri: str) -> Iterator[None]:
    mlflow = _quiet_mlflow()
    import sqlalchemy.exc

    try:
        yield
    except (mlflow.MlflowException, sqlalchemy.exc.SQLAlchemyError, sqlite3.Error, ImportError, OSError) as error:
        reason = _without_secrets((str(error).splitlines() or [type(error).__name__])[0], uri)
        shown, code = redacted(uri), getattr(error, "error_code", None)
        if code in REFUSALS:
            kind = AlreadyThereError if code == "RESOURCE_ALREADY_EXISTS" else RefusedError
            trouble: TrackingError = kind(f"MLflow at {shown} refuses: {reason}")
        else:
            here = _sqlite_file(uri) or getattr(error, "errno", None) in NO_ROOM_OR_ACCESS
            way_out = "Free some space there or fix permissions, and run again" if here else "Start that server"
            trouble = _unusable(uri, reason, way_out)
        raise trouble from (error if shown == uri else None)


def _check_that_it_answers(uri: str) -> None:
    """Raises TrackingError where no server accepts a connection; behind a proxy, or where the user has set how often
    MLflow tries, MLflow finds out."""
    if _scheme(uri) not in SERVERS or RETRIES in os.environ:
        return
    try:
        address = urllib.parse.urlsplit(uri)
        host, port = address.hostname, address.port or (443 if address.scheme == "https" else 80)
    except ValueError:  # which MLflow words better
        return
    if not host or (address.scheme in urllib.request.getproxies() and not urllib.request.proxy_bypass(host)):
        return
    try:
        socket.create_connection((host, port), CONNECT_SECONDS).close()
    except (OSError, UnicodeError) as error:
        reason = _without_secrets(getattr(error, "strerror", None) or str(error), uri)
        raise _unusable(uri, f"{reason[:1].lower()}{reason[1:]}", "Start that server") from None


def _unusable(uri: str, reason: str, way_out: str) -> TrackingError:
    return TrackingError(
        f"MLflow cannot be used at tracking.uri={redacted(uri)!r}: {reason}. {way_out}, or set --tracking.uri or "
        "MLFLOW_TRACKING_URI to another"
    )


def _without_secrets(text: str, uri: str) -> str:
    """A text that may quote the URI, its password, or the part of it that was taken for something else."""
    shown = redacted(uri)
    text = re.sub(r"[\w+.-]+:/\S+", lambda found: redacted(found[0]), text.replace(uri, shown))
    hidden = re.fullmatch("(.*)".join(map(re.escape, shown.split("***"))), uri, re.DOTALL)
    for secret in hidden.groups() if hidden else ():
        known = (secret, urllib.parse.unquote(secret))
        parts = [part for whole in known for part in re.split(r"[@/?#:&=;]", whole) if len(part) > 2]
        for part in (*known, *parts):
            if part:
                text = re.sub(rf"(?<!\w){re.escape(part)}(?!\w)", "***", text)
    return text


def _scheme(uri: str) -> str:
    found = re.match(r"([A-Za-z][\w+.-]*):", uri)
    return found[1].lower() if found else ""


def _sqlite_file(uri: str) -> Path | None:
    """The file of an sqlite URI; None for any other."""
    if _scheme(uri).partition("+")[0] != "sqlite":
        return None
    return Path(uri.partition(":///")[2].partition("?")[0])


def _connected(file: Path) -> contextlib.closing[sqlite3.Connection]:
    return contextlib.closing(sqlite3.connect(file, timeout=LOCK_SECONDS, isolation_level=None))


def _holds_anything(file: Path) -> bool:
    """Whether an sqlite file has rows in any table, the numbers of schemas aside; MLflow's has, once it is whole."""
    with _connected(file) as database:
        return bool(_filled_tables(database))


def _tables(database: sqlite3.Connection, kind: str = "table") -> list[str]:
    found = database.execute("SELECT name FROM sqlite_master WHERE type = ? AND name NOT LIKE 'sqlite_%'", (kind,))
    return [name for (name,) in found]


def _filled_tables(database: sqlite3.Connection) -> list[str]:
    # Of those that MLflow's migrations leave rows in before it is whole: its version, and the name of the workspace.
    tables = [name for name in _tables(database) if name not in ("alembic_version", "workspaces")]
    return [name for name in tables if database.execute(f'SELECT 1 FROM "{name}" LIMIT 1').fetchone()]


def _make_database(file: Path) -> None:
    """Give an sqlite file MLflow's tables, all at once, where there is none, or one that was left half made.

    MLflow makes them aside, for it takes seconds and many steps, and they are copied in one transaction: whoever is
    killed, or has no room, leaves nothing, and of two at once the second finds the first's.
    """
    if file.is_file() and _holds_anything(file):
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    statements = _fresh_database((file.parent / ARTIFACTS).as_uri())
    with _connected(file) as database, _transaction(database):
        if _filled_tables(database):
            return
        for kind in ("view", "table"):
            for name in _tables(database, kind):
                database.execute(f'DROP {kind} "{name}"')
        for statement in statements:
            database.execute(statement)


def _fresh_database(artifacts: str) -> list[str]:
    """The SQL of an MLflow database with nothing in it but the experiment that MLflow always has."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    with tempfile.TemporaryDirectory(prefix="tipl-mlflow-") as folder:
        file = Path(folder, "mlflow.db")
        store = SqlAlchemyStore(f"sqlite:///{file}", artifacts)
        store.engine.dispose()
        with _connected(file) as database:
            return list(database.iterdump())[1:-1]  # without its BEGIN and COMMIT


@contextlib.contextmanager
def _transaction(database: sqlite3.Connection) -> Iterator[None]:
    database.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        with contextlib.suppress(sqlite3.Error):  # sqlite may have done so itself
            database.execute("ROLLBACK")
        raise
    database.execute("COMMIT")


def _follow_artifacts(file: Path, storage: Path | None) -> None:
    """Where an sqlite file was moved or copied with its artifacts, update the recorded places.

    Only what was next to the file, or in the storage, is changed; artifacts kept elsewhere stay there.
    """
    places = [folder / ARTIFACTS for folder in dict.fromkeys((file.parent, storage or file.parent))]
    with _connected(file) as database:
        if not _moves(database, file, places):
            return
        with _transaction(database):
            for old, new in _moves(database, file, places).items():
                for table, column in LOCATIONS:
                    _rebase(database, table, column, old, new)
                old_folder, new_folder = (str(_folder_of(uri).parent) for uri in (old, new))
                _rebase(database, "tags", "value", old_folder, new_folder, "key = 'model_folder'")
                quoted = [json.dumps({"uri": folder}).removesuffix('"}') for folder in (old_folder, new_folder)]
                _rebase(database, "datasets", "dataset_source", *quoted)


def _moves(database: sqlite3.Connection, file: Path, places: Sequence[Path]) -> dict[str, str]:
    """Old and new URI of each folder of artifacts that has come along."""
    moves, known = {}, False
    found = database.execute("SELECT experiment_id, ifnull(artifact_location, '') FROM experiments ORDER BY 1")
    for number, location in found.fetchall():
        # MLflow's first experiment records where the file was made, or moved to.
        recorded = location.removesuffix("/0") if number == 0 else None
        if not str(recorded or location).endswith(f"/{ARTIFACTS}") or not location.startswith("file:"):
            continue
        old, known = _folder_of(recorded or location), known or recorded is not None
        if any(_same(old, place) for place in places):
            continue
        if recorded:
            moves[recorded] = places[0].as_uri()
            continue
        if location in moves:
            continue
        runs = database.execute("SELECT run_uuid FROM runs WHERE experiment_id = ?", (number,)).fetchall()
        along = [place for place in places if any(place.joinpath(run).is_dir() for (run,) in runs)]
        if not along and not known and len(places) == 1 and not old.parent.exists():
            along = [*places]
        if along:
            moves[location] = along[0].as_uri()
    return moves


def _rebase(database: sqlite3.Connection, table: str, column: str, old: str, new: str, where: str = "1") -> None:
    if table in _tables(database):
        database.execute(
            f"UPDATE {table} SET {column} = ? || substr({column}, ?) "
            f"WHERE {where} AND ({column} = ? OR substr({column}, 1, ?) = ?)",
            (new, len(old) + 1, old, len(old) + 1, f"{old}/"),
        )


def _folder_of(uri: str) -> Path:
    return Path(urllib.parse.unquote(urllib.parse.urlsplit(uri).path))


def _same(one: Path, other: Path) -> bool:
    try:
        return one == other or one.samefile(other)
    except OSError:
        return False


def _experiment_id(client: MlflowClient, uri: str, name: str, storage_path: str) -> str:
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        try:
            return client.create_experiment(name, _artifact_location(uri, storage_path), {KIND_TAG: KIND})
        except AlreadyThereError:  # another job was first
            experiment = client.get_experiment_by_name(name)
            assert experiment is not None, "MLflow has just named it"
    if experiment.lifecycle_stage != "active":
        raise TrackingError(
            f"tracking.experiment={name!r} was deleted in MLflow at {redacted(uri)!r}: restore it there, or use "
            "another name"
        )
    location = experiment.artifact_location or ""
    if location.startswith("file:") and location != _artifact_location(uri, storage_path):
        folder = _folder_of(location)
        if _scheme(uri).startswith(DATABASES) and not folder.parent.exists():
            raise TrackingError(
                f"tracking.experiment={name!r} of MLflow at {redacted(uri)!r} keeps its artifacts in {folder}, and "
                f"{folder.parent} no longer exists: restore it, or use another --tracking.experiment"
            )
    if KIND_TAG not in experiment.tags:
        client.set_experiment_tag(experiment.experiment_id, KIND_TAG, KIND)
    return experiment.experiment_id


def _artifact_location(uri: str, storage_path: str) -> str | None:
    """Where a bare database has its artifacts: it would put them into the working directory. A server knows itself."""
    if not _scheme(uri).startswith(DATABASES):
        return None
    file = _sqlite_file(uri)
    folder = file.parent if file else local_folder(storage_path)
    if folder is None:
        return join(storage_path, ARTIFACTS).partition("?")[0]
    return (folder / ARTIFACTS).as_uri()


@contextlib.contextmanager
def _impatient() -> Iterator[None]:
    """MLflow's patience with a server cut from minutes to seconds, where the user has not set it."""
    import mlflow.store.db.utils as databases

    limits = {RETRIES: "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
    ours = {name: value for name, value in limits.items() if name not in os.environ}
    os.environ.update(ours)
    attempts, databases.MAX_RETRY_COUNT = databases.MAX_RETRY_COUNT, DATABASE_ATTEMPTS
    try:
        yield
    finally:
        databases.MAX_RETRY_COUNT = attempts
        for name in ours:
            del os.environ[name]


@functools.cache
def _namespace() -> str:
    """Within which a process is known by its number: a container, since the machine was started. No two have one."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{Path('/proc/self/ns/pid').readlink()}"
    except OSError:  # no Linux
        return re.sub(r"\s", "-", socket.gethostname())


def _started(process: int) -> str | None:
    """When a process was started, as its number may be reused; None where it is dead, "" where that is unknown."""
    with contextlib.suppress(OSError, IndexError, ValueError):
        # The 22nd word; the second, the program's name, may hold spaces and brackets.
        state, *words = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        return None if state in "ZX" else words[18]
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return None
    except (OSError, OverflowError):
        pass
    return ""


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
