"""Collect: every trial of an experiment on Ray, streamed to the trajectory store, and sealed as a data set.

Everything that matters is in the store: a new driver finds the last commits there and continues.
"""

import dataclasses
from collections.abc import Callable

import ray

from tipl_ray.collect.crew import Crew, drive, require_seat, seat_resources
from tipl_ray.collect.group import name_trials, trial_header
from tipl_ray.collect.placement import GroupProgress, Placement, split_into_groups
from tipl_ray.config import Experiment
from tipl_ray.data.trajectory_store import TrajectoryStore
from tipl_ray.errors import UserError
from tipl_ray.ppo.algorithms import ALGORITHMS, NOTHING, Extension
from tipl_ray.ppo.engines import choose_engine
from tipl_ray.terminal import log_event


class CollectionError(UserError):
    """A collection produced no trial: explains why, and what to do."""


def pending_seeds(experiment: Experiment, store: TrajectoryStore, extension: Extension = NOTHING) -> list[int]:
    """Seeds of the trials that are not committed to their end and have not diverged, the least advanced first."""
    progress = store.progress_of(experiment.collect.seeds, extension.snapshots_per_trial(experiment))
    return [p.seed for p in sorted(progress, key=lambda p: p.num_snapshots) if not p.ended]


def collect(
    experiment: Experiment,
    on_progress: Callable[[list[GroupProgress]], None] = lambda progress: None,
    extension: Extension = NOTHING,
) -> TrajectoryStore:
    """Collect every trial of the experiment that is not complete, on a connected Ray cluster, and seal the data set.

    Raises StoreError where the storage holds other data, ValueError for a task, an algorithm, an engine or resources
    that cannot be had, CollectionError where every trial diverged.
    """
    store = TrajectoryStore(experiment.storage_path)
    engine = choose_engine(experiment.collect.engine, experiment.ppo)
    ALGORITHMS.check("collect.algorithm", experiment.collect.algorithm)
    store.check_header(trial_header(experiment, engine, extension))
    seeds = pending_seeds(experiment, store, extension)
    if seeds:
        require_seat(experiment, engine, "actor")
        _run(experiment, engine, extension, seeds, on_progress)
    if not store.finished():
        _refuse_all_diverged(experiment, store)
        log_event("seal", trials=name_trials(experiment.collect.seeds))
        # Each group's actor has read back what it finished: one driver would take longer for that than the collection.
        store.finish(experiment.collect.seeds, extension.snapshots_per_trial(experiment), verified=set(seeds))
    return store


def _refuse_all_diverged(experiment: Experiment, store: TrajectoryStore) -> None:
    """Raise CollectionError where there is no trial to learn from."""
    diverged = store.divergences(experiment.collect.seeds)
    if len(diverged) == experiment.collect.num_trials:
        last = max(diverged.values(), key=lambda one: one.iteration)
        raise CollectionError(
            f"{experiment.storage_path}: all {len(diverged)} trials diverged, the last one after iteration "
            f"{last.iteration} ({last.array} not finite), so there is nothing to learn from; lower "
            f"ppo.learning_rate={experiment.ppo.learning_rate:g} and collect into another storage"
        )


def _run(
    experiment: Experiment,
    engine: str,
    extension: Extension,
    seeds: list[int],
    on_progress: Callable[[list[GroupProgress]], None],
) -> None:
    """Run the trials on as many actors as the cluster has room for, while nodes and actors come and go."""
    trials_per_actor = experiment.where.trials_per_actor
    # What is free, not what there is: the cluster may be at other work too.
    free, needs = ray.available_resources(), seat_resources(experiment, engine)
    num_seats = min(int(free.get(name, 0) // amount) for name, amount in needs.items())
    groups = split_into_groups(seeds, trials_per_actor, max(1, num_seats))
    trial = GroupProgress(seeds=(0,), env_steps=0, total_env_steps=experiment.env_steps_per_trial)
    placement = Placement(
        [dataclasses.replace(trial, seeds=tuple(g), total_env_steps=len(g) * trial.total_env_steps) for g in groups],
        divisible=not trials_per_actor,
    )
    drive(placement, Crew(experiment, engine, extension), on_progress)
