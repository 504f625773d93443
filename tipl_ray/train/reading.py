"""Training and validation trials, read and reduced in parallel, one Ray task per trial."""

from collections.abc import Callable
from typing import Any

import ray

from tipl_ray import config
from tipl_ray.data.trajectory_store import TrajectoryStore
from tipl_ray.predict.gram import Question
from tipl_ray.predict.representation import TrainingData, representation_of
from tipl_ray.train.data_sets import data_sets

POLL_SECONDS = 0.5


def load_trials(experiment: config.Experiment, on_phase: Callable[[str], None] = lambda phase: None) -> TrainingData:
    """All trials but the test trials, as the experiment's representation reads them, in parallel.

    `on_phase` is called about twice a second with what is being done.
    """
    representation = representation_of(experiment.basis)
    shared = ray.remote(num_cpus=1)(_fit_shared).remote(experiment) if representation.shares else None
    train, validation = read_trials(experiment, representation.read, shared, on_phase)
    return TrainingData(
        train=representation.gather(train),
        validation=representation.gather(validation),
        shared=ray.get(shared) if shared else None,
    )


def read_trials(
    experiment: config.Experiment,
    read: Callable[..., Any],
    shared: ray.ObjectRef | None = None,
    on_phase: Callable[[str], None] = lambda phase: None,
) -> tuple[list[list[Any]], list[list[Any]]]:
    """Training and validation trials of each data set, read in parallel, one Ray task per trial.

    `read` is called as `Representation.read` is.
    """
    asked, task = (Question.of(experiment), *([shared] if shared else [])), ray.remote(num_cpus=1)(_call)
    sets = data_sets(experiment)
    parts = [one.parts for one in sets]
    halves = [
        [[(one.storage, seed) for seed in part[half]] for one, part in zip(sets, parts, strict=True)] for half in (0, 1)
    ]
    sent = [[[task.remote(read, *trial, *asked) for trial in trials] for trials in half] for half in halves]
    waiting = [reference for half in sent for trials in half for reference in trials]
    total = len(waiting)
    try:
        while waiting:
            ready, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=POLL_SECONDS)
            ray.get(ready)
            on_phase(f"reading and reducing trials, {total - len(waiting)} of {total} done")
        train, validation = ([ray.get(trials) for trials in half] for half in sent)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    return train, validation


def _call(read: Callable[..., Any], *arguments: Any) -> Any:
    return read(*arguments)  # which may be a method, and no Ray task is


def _fit_shared(experiment: config.Experiment) -> Any:
    seeds = TrajectoryStore(experiment.storage_path).sound(experiment.train_seeds)
    return representation_of(experiment.basis).fit(experiment.storage_path, seeds)
