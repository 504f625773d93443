"""A unit of jobs/accelerate.py: one stack of trials, continued from its last commits, and its learning curves.

    <folder>/unit.json       learning curves, gradient steps and CPU time; while the unit runs, its trials are there too

Shapes: K trials of a group, S trials of a unit, I PPO iterations.
"""

import json
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from tipl_ray.accelerate.contenders import Unit, unit_table
from tipl_ray.accelerate.group_jumps import GroupJumps
from tipl_ray.accelerate.scores import Finished, filled
from tipl_ray.collect.group import GroupCollector
from tipl_ray.config import Experiment
from tipl_ray.data.storage import StoreError, file_exists, join, publish, read_published
from tipl_ray.data.trajectory_store import TrajectoryStore
from tipl_ray.errors import UserError
from tipl_ray.ppo.algorithms import NOTHING, Extension, Hooks, State
from tipl_ray.ppo.engines import ENGINES
from tipl_ray.ppo.trials import TrialGroup
from tipl_ray.terminal import say

UNIT_FILE, UNIT_RECORD = "unit.json", "unit.sha256"
UNNAMED_ENGINE = "compiled-1"
"""The engine of units that earlier versions wrote, without its name."""
SLICE_SECONDS = 5.0
"""Seconds of work between two checks of whether a unit is finished."""


class AccelerationError(UserError):
    """A unit has no result to compare; the message has the reason and the fix."""


class Counted(Extension):
    """An extension with a count of its trials' gradient steps per iteration; it changes nothing else."""

    def __init__(self, inner: Extension):
        self.inner = inner

    @property
    def num_snapshots(self) -> int:
        """The inner extension's."""
        return self.inner.num_snapshots

    @property
    def header(self) -> Mapping[str, Any]:
        """The inner extension's: counting is no part of the data."""
        return self.inner.header

    def hooks(self, group: TrialGroup) -> Hooks:
        """The inner extension's, counted."""
        return CountedHooks(group, self.inner.hooks(group))


class CountedHooks(Hooks):
    """The hooks of K stacked trials, with the number of gradient steps at the end of each iteration."""

    def __init__(self, group: TrialGroup, inner: Hooks):
        self.inner, self._group = inner, group
        self.gradient_steps_KI = np.zeros((len(group), group.num_iterations), dtype=np.int64)

    def record(self, group: TrialGroup) -> None:
        """The inner hooks'."""
        self.inner.record(group)

    def move(self, group: TrialGroup, learning_rates_K: np.ndarray) -> Iterator[None]:
        """The inner hooks', then count."""
        yield from self.inner.move(group, learning_rates_K)
        for k, iterations in enumerate(group.iterations_K):
            self.gradient_steps_KI[k, iterations - 1] = group.gradient_steps_K[k]

    def keep(self, kept: np.ndarray) -> None:
        """Keep only these trials, in order."""
        self.inner.keep(kept)
        self.gradient_steps_KI = self.gradient_steps_KI[kept]

    def state(self, k: int) -> State:
        """The inner hooks', with the counts."""
        return {**self.inner.state(k), "unit.gradient_steps": self.gradient_steps_KI[k].copy()}

    def set_state(self, k: int, state: Mapping[str, np.ndarray]) -> None:
        """Restore a state, including the counts."""
        self.inner.set_state(k, state)
        self.gradient_steps_KI[k] = state["unit.gradient_steps"]
        self._group.gradient_steps_K[k] = self.gradient_steps_KI[k].max(initial=0)


def has_run(folder: str, engine: str) -> bool:
    """Whether a unit's learning curves, by this engine, are stored and intact; a damaged unit is run again."""
    if not file_exists(folder, UNIT_FILE):
        return False
    try:
        table = json.loads(_read_unit(folder))
    except (StoreError, ValueError):
        say(f"accelerate: {join(folder, UNIT_FILE)} is damaged; running this variant again")
        return False
    return bool(table.get("engine", UNNAMED_ENGINE) == ENGINES[engine])


def _read_unit(folder: str) -> bytes:
    return read_published(folder, UNIT_FILE, UNIT_RECORD, "delete it; the same command then runs this variant again")


def run_unit(experiment: Experiment, engine: str, extension: Extension = NOTHING) -> None:
    """Run every trial of a unit, from its last commits, and write its learning curves, unless they are stored."""
    folder = experiment.storage_path
    if has_run(folder, engine):
        return
    # Of this thread alone: a Ray worker has others, which wait for messages.
    counted = Counted(extension)
    collector, begin = GroupCollector(experiment, engine, extension=counted), time.thread_time()
    progress = before = collector.start(experiment.collect.seeds)
    while not progress.finished:
        progress = collector.advance(SLICE_SECONDS)
    # What was run before a kill took its time elsewhere: the share run here stands for all of it.
    share_here = (progress.env_steps - before.env_steps) / progress.total_env_steps
    seconds = (time.thread_time() - begin) / share_here if share_here else None
    store, iterations = TrajectoryStore(folder), experiment.num_iterations
    diverged = store.divergences(experiment.collect.seeds)
    first = slice(
        1, None, extension.snapshots_per_iteration(experiment)
    )  # an iteration's episodes stand at its first snapshot
    returns = []
    for seed in experiment.collect.seeds:
        whole = diverged[seed].iteration if seed in diverged else iterations
        known_I = store.trajectory(seed, columns=["episodic_return"]).episodic_returns_T[first][:whole]
        returns.append([None if np.isnan(value) else float(value) for value in known_I])
    table: dict[str, Any] = {
        "engine": ENGINES[engine],
        "returns": returns,
        "diverged": sorted(diverged),
        "env_steps": (experiment.ppo.num_steps * np.arange(1, iterations + 1)).tolist(),
        "cpu_seconds": seconds,
        **_counts(collector),
        "experiment": unit_table(experiment, extension),
    }
    publish(folder, {UNIT_FILE: json.dumps(table).encode()}, UNIT_RECORD)


def _counts(collector: GroupCollector) -> dict[str, Any]:
    """Counts of jumps taken, undone by the gate and refused, and gradient steps up to the end of each iteration (trial,
    iteration), over trials that did not diverge; empty lists if there are none."""
    hooks = collector.hooks
    if not isinstance(hooks, CountedHooks):
        return {"jump_counts": [], "gradient_steps": []}
    jumps = hooks.inner
    return {
        "jump_counts": jumps.counts_K3.sum(axis=0).tolist() if isinstance(jumps, GroupJumps) else [],
        "gradient_steps": hooks.gradient_steps_KI.tolist(),
    }


def load_unit(unit: Unit, experiment: Experiment, epochs: int) -> Finished:
    """The results of a finished unit.

    Raises AccelerationError if no episode of a trial ended.
    """
    table = json.loads(_read_unit(experiment.storage_path))
    env_steps_I, diverged = np.array(table["env_steps"]), table.get("diverged", [])
    returns_SI = np.full((len(table["returns"]), len(env_steps_I)), np.nan)
    for seed, returns_I, known in zip(experiment.collect.seeds, returns_SI, table["returns"], strict=True):
        curve_1I = np.array([known], dtype=np.float64)
        if not np.isnan(curve_1I).all():
            returns_I[: len(known)] = filled(curve_1I)[0]
        elif seed not in diverged:
            raise AccelerationError(
                f"{unit.task}, variant {unit.contender.name!r}: no episode of trial {seed} ended within "
                f"{env_steps_I[-1]:,} env steps, so there is no return to compare; give the task more steps, such as "
                f"{unit.task}@{10 * env_steps_I[-1]}"
            )
    # Earlier versions did not count: then every trial ran all of its steps.
    planned_I = epochs * experiment.ppo.num_minibatches * experiment.ppo.replicas * np.arange(1, len(env_steps_I) + 1)
    # A trial that diverged has none of its own after that.
    counted_KI = np.maximum.accumulate(np.array(table.get("gradient_steps") or [planned_I]), axis=1)
    return Finished(
        unit=unit,
        returns_SI=returns_SI,
        env_steps_I=env_steps_I,
        gradient_steps_I=counted_KI.mean(axis=0).round().astype(np.int64),
        epochs=epochs,
        cpu_seconds=float("nan") if table["cpu_seconds"] is None else table["cpu_seconds"],
        jump_counts=table["jump_counts"],
        num_diverged=len(diverged),
    )
