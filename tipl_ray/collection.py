"""Collect: PPO trials on Ray actors, one group of trials each, streamed to the trajectory store.

`GroupCollector` runs a group and commits its trials, and works without Ray; `collect` sends groups out as actors and
calls each of them again and again for a slice of work. The store holds all that counts: an actor that dies is restarted
by Ray, finds the last commits there and goes on, and so does a new driver.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
import ray

from tipl_ray.config import Experiment, as_table
from tipl_ray.forecasting import predictor_digest
from tipl_ray.learner import ENGINES, choose_engine
from tipl_ray.ppo import TrialGroup, network_shape
from tipl_ray.trajectory_store import Header, TrajectoryStore, TrialWriter

SLICE_SECONDS = 2.0
"""Seconds of work per call of an actor: what passes between two progress messages."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class GroupProgress:
    """How far one group of trials is; all that an actor tells the driver."""

    seeds: tuple[int, ...]
    env_steps: int
    """Environment steps run, over all trials of the group, those of earlier runs included."""
    total_env_steps: int
    env_steps_per_second: float
    """Over the last slice of work."""
    mean_return: float
    """Mean over trials of the last mean episodic return; NaN before the first episode ended."""

    @property
    def finished(self) -> bool:
        """Whether every trial of the group has run and is committed."""
        return self.env_steps >= self.total_env_steps

    @property
    def seconds_left(self) -> float:
        """Estimated from the last slice."""
        left = self.total_env_steps - self.env_steps
        return left / self.env_steps_per_second if self.env_steps_per_second else math.inf if left else 0.0


def trial_header(experiment: Experiment, engine: str) -> Header:
    """What the bits of this experiment's trials depend on. Raises ValueError for an unknown task."""
    collect = as_table(experiment.collect)
    told = ("policy_hidden", "critic_hidden", "epochs_per_snapshot", "iterations_per_commit", "total_env_steps")
    config = {**{key: collect[key] for key in told}, "ppo": as_table(experiment.ppo), "engine": ENGINES[engine]}
    if experiment.jump.predictor:
        # What the predictor answers counts, not where it lies.
        config["jump"] = as_table(experiment.jump) | {"predictor": predictor_digest(experiment.jump.predictor)}
    return Header(
        task=experiment.collect.task,
        layout=network_shape(experiment.collect).policy_layout,
        config=config,
        versions={name: version(name) for name in ("mujoco", "gymnasium", "torch", "numpy")},
    )


class GroupCollector:
    """One group of trials and their writers: goes on from the last commits, commits every few iterations."""

    def __init__(self, experiment: Experiment, engine: str, seeds: Sequence[int]):
        store, header = TrajectoryStore(experiment.storage_path), trial_header(experiment, engine)
        self._writers = {seed: TrialWriter(store, seed, header) for seed in seeds}
        states = [writer.state for writer in self._writers.values()]
        self._group = TrialGroup(experiment, engine, list(seeds), states)
        for snapshot in self._group.initial_snapshots():
            self._writers[snapshot.seed].append(snapshot)
        self._experiment = experiment
        self._iterations = {seed: int(k) for seed, k in zip(seeds, self._group.iterations_K, strict=True)}
        self._returns: dict[int, float] = {}

    def advance(self, seconds: float) -> GroupProgress:
        """Run whole iterations for at least some seconds, committing as they fall due."""
        begin, before = time.monotonic(), sum(self._iterations.values())
        while not self._group.finished and time.monotonic() - begin < seconds:
            self._run_iteration()
        num_steps, done = self._experiment.ppo.num_steps, sum(self._iterations.values())
        returns = list(self._returns.values())
        return GroupProgress(
            seeds=tuple(self._writers),
            env_steps=done * num_steps,
            total_env_steps=len(self._writers) * self._experiment.env_steps_per_trial,
            env_steps_per_second=(done - before) * num_steps / max(time.monotonic() - begin, 1e-9),
            mean_return=float(np.mean(returns)) if returns else math.nan,
        )

    def _run_iteration(self) -> None:
        for snapshot in self._group.run_iteration():
            self._writers[snapshot.seed].append(snapshot)
            self._iterations[snapshot.seed] = snapshot.iteration
            if snapshot.episodic_return is not None:
                self._returns[snapshot.seed] = snapshot.episodic_return
        for seed in self._group.seeds:
            iteration = self._iterations[seed]
            due = iteration % self._experiment.collect.iterations_per_commit == 0
            if due or iteration == self._experiment.num_iterations:
                self._writers[seed].commit(self._group.state(seed))


def pending_seeds(experiment: Experiment, store: TrajectoryStore) -> list[int]:
    """Seeds of the trials that are not committed to their end, the least advanced first."""
    progress = [store.progress(seed, experiment.num_snapshots) for seed in experiment.collect.seeds]
    return [p.seed for p in sorted(progress, key=lambda p: p.num_snapshots) if not p.complete]


def split_into_groups(seeds: Sequence[int], trials_per_actor: int, num_cpus: int) -> list[list[int]]:
    """Groups of trials, one per actor; 0 trials per actor keeps every CPU busy with at least 2 trials stacked.

    >>> split_into_groups(range(5), 0, 2), split_into_groups(range(5), 2, 8), split_into_groups(range(3), 0, 64)
    ([[0, 1, 2], [3, 4]], [[0, 1], [2, 3], [4]], [[0, 1, 2]])
    """
    num_groups = math.ceil(len(seeds) / trials_per_actor) if trials_per_actor else min(num_cpus, len(seeds) // 2)
    parts = np.array_split(np.asarray(seeds, dtype=int), max(num_groups, 1))
    return [[int(seed) for seed in part] for part in parts if len(part)]


def collect(
    experiment: Experiment, on_progress: Callable[[list[GroupProgress]], None] = lambda progress: None
) -> TrajectoryStore:
    """Collect every trial of the experiment that is not complete, on a connected Ray cluster, and seal the data set.

    Raises StoreError where the storage holds other data, ValueError for a task or an engine that cannot be had.
    """
    store = TrajectoryStore(experiment.storage_path)
    engine = choose_engine(experiment.collect.engine, experiment.ppo)
    header = trial_header(experiment, engine)
    if store.seeds() and store.header().config_hash != header.config_hash:
        TrialWriter(store, store.seeds()[0], header)  # refuses, and says what differs
    seeds = pending_seeds(experiment, store)
    if seeds:
        num_cpus = int(ray.cluster_resources().get("CPU", 1))
        groups = split_into_groups(seeds, experiment.collect.trials_per_actor, num_cpus)
        _run_groups(experiment, engine, groups, on_progress)
    if not store.finished():
        store.finish(experiment.collect.seeds, experiment.num_snapshots)
    return store


def _run_groups(
    experiment: Experiment, engine: str, groups: list[list[int]], on_progress: Callable[[list[GroupProgress]], None]
) -> None:
    collector: Any = ray.remote(GroupCollector).options(num_cpus=1, max_restarts=-1, max_task_retries=-1)
    actors = [collector.remote(experiment, engine, seeds) for seeds in groups]
    latest = [
        GroupProgress(
            seeds=tuple(seeds),
            env_steps=0,
            total_env_steps=len(seeds) * experiment.env_steps_per_trial,
            env_steps_per_second=0.0,
            mean_return=math.nan,
        )
        for seeds in groups
    ]
    running = {actor.advance.remote(0.0): index for index, actor in enumerate(actors)}
    while running:
        ready, _ = ray.wait(list(running), num_returns=1, timeout=1.0)
        for reference in ready:
            index = running.pop(reference)
            latest[index] = ray.get(reference)
            if latest[index].finished:
                ray.kill(actors[index])
            else:
                running[actors[index].advance.remote(SLICE_SECONDS)] = index
        on_progress(latest)
