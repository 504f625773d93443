"""What a collection asks of an algorithm, and what its caller may add to it.

An algorithm runs a group of trials: `TrialGroup` in trials.py is PPO. Another is found by its name in `ALGORITHMS`, and
may come from outside this package. An `Extension` adds to an algorithm's iterations; by default there is none. Knows
neither simulations nor networks.

Shapes: K trials of a group, N parameters of a trial.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from tipl_ray.config import Experiment
from tipl_ray.data.trajectory_store import Snapshot
from tipl_ray.registry import Registry

if TYPE_CHECKING:
    from tipl_ray.ppo.trials import TrialGroup

ALGORITHMS = Registry("algorithm", "tipl_ray.algorithms", {"ppo": "tipl_ray.ppo.trials:TrialGroup"})
"""What `collect.algorithm` may name: classes that are an `Algorithm`."""

State = dict[str, np.ndarray]
"""Everything that the next bit of a trial depends on, as arrays by name."""


class Hooks:
    """What is done around the update epochs of one group of trials; these do nothing.

    What they keep of a trial must neither depend on the group's other trials nor be missing in its `state`.
    """

    def record(self, group: TrialGroup) -> None:
        """Update epochs have led the group's parameters to a snapshot."""

    def move(self, group: TrialGroup, learning_rates_K: np.ndarray) -> Iterator[None]:
        """Move the group's parameters on, in place, after an iteration's last update epoch.

        Yields wherever they are a snapshot's, `Extension.num_snapshots` times. The learning rates are the iteration's.
        """
        yield from ()

    def keep(self, kept: np.ndarray) -> None:
        """Go on with the kept trials alone, given by their indices."""

    def state(self, k: int) -> State:
        """What the next move of trial k depends on; its names are not those of the group's own state."""
        return {}

    def set_state(self, k: int, state: Mapping[str, np.ndarray]) -> None:
        """Go on from a state, in which the group's own arrays are too."""


class Extension:
    """What a caller adds to every iteration of an algorithm, and how the data says so; this one adds nothing.

    Can be pickled: Ray's workers are handed it.
    """

    @property
    def num_snapshots(self) -> int:
        """Snapshots that it adds to each iteration."""
        return 0

    @property
    def header(self) -> Mapping[str, Any]:
        """What it adds to the configuration in a trial's header: all that the trial's bits depend on."""
        return {}

    def hooks(self, group: TrialGroup) -> Hooks:
        """The hooks of a group that has its initial parameters."""
        return Hooks()

    def snapshots_per_iteration(self, experiment: Experiment) -> int:
        """Snapshots per iteration: those that update epochs lead to, then those that are added."""
        return experiment.snapshots_per_iteration + self.num_snapshots

    def snapshots_per_trial(self, experiment: Experiment) -> int:
        """Snapshots of a whole trial, the initial one included."""
        return 1 + experiment.num_iterations * self.snapshots_per_iteration(experiment)


NOTHING = Extension()


class Algorithm(Protocol):
    """A group of trials that run in lock step, each of which may be at its own iteration.

    A trial's snapshots must depend on its seed, its configuration and its state alone, and not on the group that it
    runs in: groups are divided, joined and begun again from states. Subclasses of `TrialGroup` that replace one of its
    steps have all of this from there.
    """

    seeds: list[int]
    """Seeds of the trials that are running; those that have ended may be left out."""
    iterations_K: np.ndarray
    """Iterations that each of them has run; int64."""
    diverged: dict[int, tuple[int, str]]
    """By seed, the trials that ended because something of them is not finite: whole iterations, and what it is."""
    hooks: Hooks
    """What the extension made for this group."""

    def __init__(
        self, experiment: Experiment, engine: str, seeds: list[int], states: list[State | None], extension: Extension
    ) -> None:
        """Begin each trial from its state, or from its seed where that is None. Raises ValueError for an unknown
        task, and for an extension that does not fit."""

    @property
    def finished(self) -> bool:
        """Whether every trial has run `experiment.num_iterations`, or has diverged."""

    def initial_snapshots(self) -> Iterator[Snapshot]:
        """Snapshot 0 of the trials that have not begun."""

    def run_iteration(self) -> Iterator[Snapshot]:
        """One iteration of every trial that has not ended, with `Extension.snapshots_per_iteration` finite snapshots
        of each; the first has the mean return of the episodes that ended meanwhile."""

    def state(self, seed: int) -> State:
        """Everything that the next bit of a trial depends on, between two iterations."""
