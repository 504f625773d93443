"""What every job has in common: checks before work, a Ray cluster, MLflow, and errors in one line.

Knows nothing of what a job does.
"""

import contextlib
import errno
import functools
import importlib
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import pyarrow as pa
import ray
import ray._private.parameter
import ray.exceptions

from tipl_ray.config import Experiment
from tipl_ray.data.storage import Storage, local_folder
from tipl_ray.errors import UserError, print_error
from tipl_ray.places import CHECKOUT, check_places, forget_empty_variables, in_checkout
from tipl_ray.ppo.algorithms import ALGORITHMS
from tipl_ray.ppo.tasks import find_task
from tipl_ray.terminal import is_terminal
from tipl_ray.tracking import Tracker, prepare, resolve_uri

Item = TypeVar("Item")

SUBMITTED = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Environment variable that Ray sets only for the entry point of a submitted job."""
ANSWER_SECONDS = 10.0
"""How long to wait for a cluster at $RAY_ADDRESS; Ray itself waits two minutes and then ends the process."""
WAYS_OUT = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free some space there; the same command continues where it stopped"),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), "use a place that is writable"),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "raise the limit on open files, ulimit -n"),
    **dict.fromkeys((errno.ENOTDIR, errno.EEXIST), "use another place, or move what is in the way"),
    errno.ENAMETOOLONG: "use a shorter name",
}
"""What a user can do about an OSError."""
LOST = (
    ray.exceptions.RayActorError,
    ray.exceptions.WorkerCrashedError,
    ray.exceptions.NodeDiedError,
    ray.exceptions.LocalRayletDiedError,
    ray.exceptions.OwnerDiedError,
    ray.exceptions.ObjectLostError,
    ray.exceptions.OutOfMemoryError,
    ray.exceptions.OutOfDiskError,
    ray.exceptions.ObjectStoreFullError,
    ray.exceptions.RuntimeEnvSetupError,
    ray.exceptions.TaskUnschedulableError,
    ray.exceptions.ActorUnschedulableError,
    ray.exceptions.AuthenticationError,
    ray.exceptions.RpcError,
)
"""Ray's errors for lost processes, nodes and space."""


class ClusterError(UserError):
    """Ray cannot be started here, or no cluster answers at $RAY_ADDRESS."""


def check_job(experiment: Experiment) -> None:
    """Raise ValueError for an unknown task or algorithm, and for a storage that would be lost with a submitted job.

    Raises UserError for a storage that cannot be written, StoreError for one that nothing answers to.
    """
    find_task(experiment.collect.task, experiment.collect.task_options)
    ALGORITHMS.check("collect.algorithm", experiment.collect.algorithm)
    check_places(experiment.storage_path)
    Storage(experiment.storage_path)
    folder = local_folder(experiment.storage_path)
    if SUBMITTED in os.environ and folder and any(folder.is_relative_to(one) for one in _thrown_away()):
        problem = "is not set" if experiment.where.storage is None else f"is inside it, {experiment.where.storage!r}"
        raise ValueError(
            f"a submitted job's copy of the checkout is deleted when the job ends, and storage {problem}: set "
            "--storage to a folder that all nodes share, or to a bucket"
        )


def _thrown_away() -> list[Path]:
    """Folders that go with a submitted job: the checkout, and Ray's copy of what was submitted, which it runs in."""
    here = Path.cwd()
    return [CHECKOUT, here] if "runtime_resources" in here.parts else [CHECKOUT]


def open_tracker(experiment: Experiment) -> Tracker:
    """The experiment's MLflow. Raises TrackingError where it cannot be used."""
    settings = experiment.where.tracking
    return Tracker.open(settings.uri, settings.experiment or experiment.name, experiment.storage_path)


@contextlib.contextmanager
def connected(experiment: Experiment, modules: Sequence[str] = ()) -> Iterator[Tracker]:
    """A Ray cluster until the block ends, and the experiment's MLflow; it and some modules are loaded as Ray starts.

    Raises ClusterError or TrackingError where one of them cannot be used, for a tracking URI that cannot be at once.
    """
    with contextlib.ExitStack() as until_the_end:
        with _prepared(resolve_uri(experiment.where.tracking.uri, experiment.storage_path), modules):
            until_the_end.enter_context(connected_to_ray())
        yield open_tracker(experiment)


@contextlib.contextmanager
def _prepared(uri: str, modules: Sequence[str]) -> Iterator[None]:
    """Do in a thread what `open_tracker` spends seconds on, while the block does something else; then import modules.

    What is wrong, `open_tracker` finds.
    """

    def prepare_all() -> None:
        prepare(uri)
        for module in modules:
            importlib.import_module(module)

    preparing = threading.Thread(target=prepare_all)
    preparing.start()
    try:
        yield
    finally:
        preparing.join()


@contextlib.contextmanager
def exit_status() -> Iterator[None]:
    """How a job exits: status 1 and one line on standard error for what the user can fix, 130 if interrupted."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal that is not UTF-8's shows a path all the same
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
    except KeyboardInterrupt:
        print("interrupted: run the same command again to continue from the last commit", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError as error:  # `| head` has seen enough; Python would try to write the rest when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from error
    except Exception as error:
        line = in_one_line(error)
        if line is None:
            raise
        print_error(line)
        raise SystemExit(1) from error


def in_one_line(error: BaseException) -> str | None:
    """An error that the user can fix, in one line with what to do; None for a bug of ours, which needs its
    traceback."""
    error = _cause(error)
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if isinstance(error, UserError | ValueError):
        return str(error)
    if isinstance(error, OSError):
        place = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else first
        return f"{place}; {WAYS_OUT[error.errno]}" if error.errno in WAYS_OUT else place
    if isinstance(error, LOST) and not getattr(error, "actor_init_failed", False):
        return f"Ray: {first} The same command continues from the last commit"
    if isinstance(error, MemoryError) or _is(error, "torch", "OutOfMemoryError"):
        return f"out of memory: {first}; run less at a time, or use a machine with more memory"
    if isinstance(error, pa.ArrowException) and not isinstance(error, TypeError | KeyError):
        return first
    if _is(error, "sqlalchemy.exc", "SQLAlchemyError") or _is(error, "mlflow.exceptions", "MlflowException"):
        return f"MLflow: {first}; once that is fixed, the same command continues"
    return None


def _cause(error: BaseException) -> BaseException:
    """What a worker raised, out of all that Ray wraps it in on its way here."""
    wrapped: BaseException | None = error
    while wrapped is not None:
        error = wrapped
        failures = getattr(error, "worker_failures", None) or {}  # Ray Train's
        inner = [getattr(error, name, None) for name in ("cause", "controller_failure", "_base_exc")]
        wrapped = next((one for one in (*inner, *failures.values()) if isinstance(one, BaseException)), None)
    return error


def _is(error: BaseException, module: str, name: str) -> bool:
    """Whether it is an error of a library that may not have been loaded."""
    kind = getattr(sys.modules.get(module), name, None)
    return kind is not None and isinstance(error, kind)


@contextlib.contextmanager
def connected_to_ray() -> Iterator[None]:
    """The cluster of $RAY_ADDRESS, as in a submitted job; else a local one that ends with the job.

    Raises ClusterError where there is none.
    """
    forget_empty_variables()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    address = os.environ.get("RAY_ADDRESS", "local")
    with _interruptible(signal.SIGHUP):
        try:
            _start(address)
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            if address == "local":
                raise ClusterError(
                    f"Ray cannot be started on this machine: {reason}; it needs space in a folder with a short name, "
                    "RAY_TMPDIR (default: TMPDIR or /tmp), space in /dev/shm, and free ports"
                ) from error
            raise ClusterError(
                f"no Ray cluster answers at RAY_ADDRESS={address}: {reason}; start it, set another address, or unset "
                "RAY_ADDRESS to start one on this machine"
            ) from error
        # Only now: Ray has a handler of its own for SIGTERM, which `ray job stop` and batch systems send.
        with _interruptible(signal.SIGTERM):
            try:
                yield
            finally:
                ray.shutdown()


def _start(address: str) -> None:
    if address != "local":
        _check_that_it_answers(address)
        ray.init()
        return
    # A local cluster is this process' own. A token, which Ray would write into the home, belongs to real ones.
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    # Nobody takes this machine away with notice, so a training needs no process that waits for one.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    # What an experiment names as `module:Name` may lie where the job was started.
    checkout = str(CHECKOUT) if in_checkout() else None  # what is installed, workers find by themselves
    paths = os.pathsep.join(filter(None, [checkout, os.environ.get("PYTHONPATH"), str(Path.cwd())]))
    # What matters of the workers' output comes as exceptions; the rest is Ray Train missing the dashboard.
    # By default Ray would join whatever cluster last ran on this machine, or wait for one that died.
    with _inherited_by_workers(paths), _with_less_to_start():
        ray.init(address="local", include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)


@contextlib.contextmanager
def _inherited_by_workers(paths: str) -> Iterator[None]:
    """PYTHONPATH for the processes that are started here: workers with a runtime environment take two seconds more."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = paths
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


@contextlib.contextmanager
def _with_less_to_start() -> Iterator[None]:
    """Ray without two processes, and its agent on a free port.

    Nobody wants what the one that reads logs would tell the driver, and the one that starts nodes has none to start.
    For the agent's usual port Ray waits four seconds where another cluster on this machine has it.
    """
    parameters = ray._private.parameter.RayParams
    less = {"include_log_monitor": False, "no_monitor": True, "dashboard_agent_listen_port": 0}
    ours = functools.partial(parameters, **less)  # type: ignore[arg-type]
    ray._private.parameter.RayParams = ours  # type: ignore[misc,assignment]
    try:
        yield
    finally:
        ray._private.parameter.RayParams = parameters  # type: ignore[misc]


def _check_that_it_answers(address: str) -> None:
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():  # all else Ray knows better
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_SECONDS).close()


@contextlib.contextmanager
def _interruptible(number: signal.Signals) -> Iterator[None]:
    """A signal ends the job as Ctrl-C does, actors gone and MLflow told, unless it is ignored, as below nohup."""
    if signal.getsignal(number) == signal.SIG_IGN:
        yield
        return
    terminals = [stream.fileno() for stream in (sys.stdout, sys.stderr) if is_terminal(stream)]

    def interrupt(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            # It comes twice, from the kernel and from the shell; and what is still said has no terminal to go to.
            signal.signal(number, signal.SIG_IGN)
            for terminal in terminals:
                os.dup2(os.open(os.devnull, os.O_WRONLY), terminal)
        raise KeyboardInterrupt

    before = signal.signal(number, interrupt)
    try:
        yield
    finally:
        signal.signal(number, before)


def side_by_side(
    send: Callable[[Item], ray.ObjectRef | None], waiting: list[Item], limit: int, show: Callable[[list[Item]], None]
) -> Iterator[Item]:
    """Send items to Ray, so many at once, and yield each when its task has ended; one that needs none at once.

    The list may grow meanwhile. Every second or so `show` is called with the running items. Raises what a task raised.
    """
    running: dict[ray.ObjectRef, Item] = {}
    while waiting or running:
        while waiting and len(running) < limit:
            item = waiting.pop(0)
            reference = send(item)
            if reference is None:
                yield item
            else:
                running[reference] = item
        ready, _ = ray.wait(list(running), num_returns=1, timeout=1.0) if running else ([], [])
        for reference in ready:
            result_of(reference)
            yield running.pop(reference)
        show(list(running.values()))


def result_of(reference: ray.ObjectRef) -> Any:
    """The result of a task. Raises what it raised, or UserError if its process was killed again and again."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    except ray.exceptions.WorkerCrashedError as error:
        raise UserError(
            "a task's process was killed four times, which usually means that memory ran out; lower "
            "units_at_once, and the same command continues from the last commits"
        ) from error
