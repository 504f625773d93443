"""One group of trials and their way to the data set: run, committed every few iterations, resumed from there.

Works without Ray; where Ray is running, reports the group's speed to it.
"""

import math
import time
from collections.abc import Sequence
from importlib.metadata import version

import numpy as np
import ray
from ray.util.metrics import Counter, Gauge

from tipl_ray.collect.placement import GroupProgress
from tipl_ray.config import Collect, Experiment
from tipl_ray.data.commits import Divergence
from tipl_ray.data.snapshots import Header
from tipl_ray.data.trajectory_store import TrajectoryStore
from tipl_ray.data.trial_writer import TrialWriter
from tipl_ray.digest import identity
from tipl_ray.ppo.algorithms import ALGORITHMS, NOTHING, Algorithm, Extension, Hooks
from tipl_ray.ppo.engines import ENGINES
from tipl_ray.ppo.tasks import task_source
from tipl_ray.ppo.trials import network_shape
from tipl_ray.terminal import log_event

RECORDED = (
    *("policy_hidden", "critic_hidden", "epochs_per_snapshot", "iterations_per_commit", "total_env_steps"),
    *("algorithm", "task_options"),
)
"""Fields of `collect` that a trial's bits depend on, besides the task and the seed."""


def outside_sources(collect: Collect) -> dict[str, dict[str, str]]:
    """Digests of the files that an algorithm and a task from outside are written in, as part of a configuration."""
    found = {
        "algorithm": ALGORITHMS.source_digest(collect.algorithm),
        "task": task_source(collect.task, collect.task_options),
    }
    found_in = {field: source for field, source in found.items() if source}
    return {"source": found_in} if found_in else {}


def trial_header(experiment: Experiment, engine: str, extension: Extension = NOTHING) -> Header:
    """What the bits of this experiment's trials depend on. Raises ValueError for an unknown task."""
    collect = identity(experiment.collect)
    return Header(
        task=experiment.collect.task,
        layout=network_shape(experiment.collect).policy_layout,
        config={
            **{field: collect[field] for field in RECORDED if field in collect},
            **outside_sources(experiment.collect),
            "ppo": identity(experiment.ppo),
            "engine": ENGINES[engine],
            **extension.header,
        },
        versions={name: version(name) for name in ("mujoco", "gymnasium", "torch", "numpy")},
    )


class GroupCollector:
    """One group of trials and their writers: resumes from the last commits, commits every few iterations."""

    def __init__(self, experiment: Experiment, engine: str, seeds: Sequence[int] = (), extension: Extension = NOTHING):
        self._experiment, self._engine, self._extension = experiment, engine, extension
        self._meters = _Meters(experiment.name)
        self.start(seeds)

    def start(self, seeds: Sequence[int]) -> GroupProgress:
        """Take over a group of trials where they were last committed, dropping what ran here before."""
        self._store = TrajectoryStore(self._experiment.storage_path)
        header = trial_header(self._experiment, self._engine, self._extension)
        self._writers = {seed: TrialWriter(self._store, seed, header) for seed in seeds}
        self._divergences: dict[int, Divergence] = {}
        for seed, writer in self._writers.items():
            if writer.divergence:
                writer.record_divergence()
                self._divergences[seed] = writer.divergence
        self._iterations = {seed: one.iteration for seed, one in self._divergences.items()}
        self._returns: dict[int, float] = {}
        going_on = [seed for seed in seeds if seed not in self._divergences]
        states = [self._writers[seed].state for seed in going_on]
        self._group: Algorithm | None = None
        if going_on:
            algorithm: type[Algorithm] = ALGORITHMS.load(self._experiment.collect.algorithm)
            self._group = algorithm(self._experiment, self._engine, going_on, states, self._extension)
            for snapshot in self._group.initial_snapshots():
                self._writers[snapshot.seed].append(snapshot)
            self._iterations |= {seed: int(k) for seed, k in zip(going_on, self._group.iterations_K, strict=True)}
        return self.advance(0.0)

    def advance(self, seconds: float, to_commit: bool = False) -> GroupProgress:
        """Run whole iterations for at least some seconds and, if asked, on to the next commit; at the end, verify all.

        Raises StoreError where a trial that was run to its end is not in the storage as it was committed.
        """
        begin, before = time.monotonic(), sum(self._iterations.values())
        num_steps = self._experiment.ppo.num_steps
        while self._group and not self._group.finished:
            if time.monotonic() - begin >= seconds and not (to_commit and self._uncommitted()):
                break
            self._run_iteration()
        if self._group and self._group.finished:
            num_snapshots = self._extension.snapshots_per_trial(self._experiment)
            for seed in self._writers:
                self._store.verify(seed, num_snapshots)
        done, returns = sum(self._iterations.values()), list(self._returns.values())
        rate = (done - before) * num_steps / max(time.monotonic() - begin, 1e-9)
        self._meters.ran((done - before) * num_steps, rate)
        # A trial that diverged has nothing left to run.
        spared = sum(self._experiment.num_iterations - one.iteration for one in self._divergences.values())
        return GroupProgress(
            seeds=tuple(self._writers),
            env_steps=(done + spared) * num_steps,
            total_env_steps=len(self._writers) * self._experiment.env_steps_per_trial,
            uncommitted_env_steps=self._uncommitted() * num_steps,
            env_steps_per_second=rate,
            mean_return=float(np.mean(returns)) if returns else math.nan,
            diverged={seed: one.iteration for seed, one in self._divergences.items()},
        )

    @property
    def hooks(self) -> Hooks | None:
        """What the extension made for the group; None where all of its trials had diverged before."""
        return self._group.hooks if self._group else None

    def _run_iteration(self) -> None:
        group = self._group
        assert group is not None, "a group was started"
        for snapshot in group.run_iteration():
            self._writers[snapshot.seed].append(snapshot)
            self._iterations[snapshot.seed] = snapshot.iteration
            if snapshot.episodic_return is not None:
                self._returns[snapshot.seed] = snapshot.episodic_return
        for seed, (iteration, array) in group.diverged.items():
            if seed not in self._divergences:
                self._divergences[seed] = self._writers[seed].diverge(iteration, array)
                self._iterations[seed] = iteration
        begin = time.monotonic()
        due = [seed for seed in group.seeds if seed not in self._divergences and not self._since_commit(seed)]
        num_bytes = sum(self._writers[seed].commit(group.state(seed)).part_bytes for seed in due)
        if due:
            self._meters.committed(len(due), num_bytes)
            log_event(
                "commit",
                trials=name_trials(due),
                iteration=self._iterations[due[0]],
                bytes=num_bytes,
                seconds=round(time.monotonic() - begin, 3),
            )

    def _since_commit(self, seed: int) -> int:
        """Iterations of a trial that are not committed; where commits fall due is part of the data."""
        iteration = self._iterations[seed]
        at_end = iteration == self._experiment.num_iterations or seed in self._divergences
        return 0 if at_end else iteration % self._experiment.collect.iterations_per_commit

    def _uncommitted(self) -> int:
        return sum(map(self._since_commit, self._iterations))


class _Meters:
    """This process' share in Ray's metrics, which its dashboard and Prometheus read; nothing without Ray."""

    def __init__(self, experiment: str) -> None:
        self._tags = {"experiment": experiment}
        if ray.is_initialized():
            keys = tuple(self._tags)
            self._env_steps = Counter("tipl_env_steps", "Environment steps run", keys)
            self._commits = Counter("tipl_commits", "Commits of trials", keys)
            self._bytes = Counter("tipl_committed_bytes", "Bytes of the committed Parquet parts", keys)
            self._rate = Gauge("tipl_env_steps_per_second", "Of one actor, over its last slice of work", keys)

    def ran(self, env_steps: int, rate: float) -> None:
        if ray.is_initialized() and env_steps:
            self._env_steps.inc(env_steps, self._tags)
            self._rate.set(rate, self._tags)

    def committed(self, commits: int, num_bytes: int) -> None:
        if ray.is_initialized():
            self._commits.inc(commits, self._tags)
            self._bytes.inc(num_bytes, self._tags)


def name_trials(seeds: Sequence[int]) -> str:
    """Trials in a few letters.

    >>> name_trials([3, 1, 2]), name_trials([7]), name_trials([1, 2, 5])
    ('1-3', '7', '1,2,5')
    """
    first, last = min(seeds), max(seeds)
    if len(seeds) == 1:
        return str(first)
    return f"{first}-{last}" if last - first + 1 == len(seeds) else ",".join(map(str, sorted(seeds)))
