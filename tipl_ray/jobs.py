"""What every job has in common: checks before work, a Ray cluster, MLflow, and a way out in one line.

Knows nothing of what a job does.
"""

import contextlib
import logging
import os
import signal
import sys
from collections.abc import Iterator

import ray

from tipl_ray.config import CHECKOUT, Experiment, UserError
from tipl_ray.storage import local_folder
from tipl_ray.tasks import find_task
from tipl_ray.tracking import Tracker

SUBMITTED = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Environment variable that Ray gives to the entry point of a submitted job alone."""


def check_job(experiment: Experiment) -> None:
    """Raise ValueError for a task that is not known and for a storage that would be lost with a submitted job."""
    find_task(experiment.collect.task)
    folder = local_folder(experiment.storage_path)
    if SUBMITTED in os.environ and folder and folder.is_relative_to(CHECKOUT):
        problem = "is not set" if experiment.storage is None else f"lies in it, {experiment.storage!r}"
        raise ValueError(
            f"the checkout that a submitted job runs in is thrown away with the job, and storage {problem}: give "
            "--storage, a folder that all nodes see, or a bucket"
        )


def open_tracker(experiment: Experiment) -> Tracker:
    """The experiment's MLflow. Raises TrackingError where it cannot be used."""
    settings = experiment.tracking
    return Tracker.open(settings.uri, settings.experiment or experiment.name, experiment.storage_path)


@contextlib.contextmanager
def exit_status() -> Iterator[None]:
    """A job's way out: status 1 and one line on standard error for what the user can mend, 130 when interrupted."""
    try:
        yield
    except KeyboardInterrupt:
        print("interrupted: run the same command again to go on from what is committed", file=sys.stderr)
        raise SystemExit(130) from None
    except (UserError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from error


@contextlib.contextmanager
def connected_to_ray() -> Iterator[None]:
    """The cluster of $RAY_ADDRESS, as in a submitted job; else a local one that ends with the job."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if "RAY_ADDRESS" in os.environ:
        ray.init()
    else:
        # A local cluster is this process' own. A token, which Ray would write into the home, belongs to real ones.
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
        paths = os.pathsep.join(filter(None, [str(CHECKOUT), os.environ.get("PYTHONPATH")]))
        # What matters of the workers' output comes as exceptions; the rest is Ray Train missing the dashboard.
        # By default Ray would join whatever cluster last ran on this machine, or wait for one that died.
        ray.init(
            address="local",
            include_dashboard=False,
            logging_level=logging.ERROR,
            log_to_driver=False,
            runtime_env={"env_vars": {"PYTHONPATH": paths}},
        )
    # SIGTERM, which `ray job stop` and batch systems send, ends the job as Ctrl-C does: actors gone, MLflow told.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        ray.shutdown()
        signal.signal(signal.SIGTERM, before)
