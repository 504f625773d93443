"""What the jobs that tune jumps have in common: setup, and the last lines of output."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import ray

from tipl_ray.accelerate.acceleration import source_experiment
from tipl_ray.collect.crew import require_seat
from tipl_ray.config import Experiment
from tipl_ray.jobs import check_job, connected, exit_status
from tipl_ray.ppo.engines import choose_engine
from tipl_ray.terminal import duration, say, say_whole
from tipl_ray.tracking import Tracker, ui_command


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """An experiment that is running on Ray."""

    experiment: Experiment
    source: Experiment
    """The experiment that defines the snapshots and the context of its jumps."""
    tracker: Tracker
    engine: str
    at_once: int
    """Ray tasks, of one CPU each, that run at the same time."""
    found: Any
    """What `work_on` was told to find."""


@contextlib.contextmanager
def work_on(
    experiment: Experiment,
    job: str,
    seat: str,
    find: Callable[[Experiment, str], Any] = lambda source, engine: None,
) -> Iterator[Work]:
    """Set up a job and finish it; `seat` names the unit of work that needs one CPU.

    `find` is called before Ray starts, with the source and the engine, and raises where something is missing. Exits
    with status 1 and one line on standard error for errors that the user can fix, 130 if interrupted.
    """
    with exit_status():
        check_job(experiment)
        source, begin = source_experiment(experiment), time.monotonic()
        engine = choose_engine(experiment.collect.engine, experiment.ppo)
        found = find(source, engine)
        with connected(experiment) as tracker:
            require_seat(experiment, engine, seat)
            at_once = experiment.where.units_at_once or max(1, int(ray.cluster_resources().get("CPU", 1)))
            yield Work(
                experiment=experiment, source=source, tracker=tracker, engine=engine, at_once=at_once, found=found
            )
        say(f"{job}: {duration(time.monotonic() - begin)}")
        say_whole(f"MLflow: {ui_command(tracker.uri, tracker.experiment_id)}")
