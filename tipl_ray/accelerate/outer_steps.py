"""Outer steps of PPO's trials: the weight change of an iteration is the gradient of an outer optimizer (outer-PPO,
arXiv 2411.00666), here SGD with Nesterov momentum.

Shapes: K trials of a group, N parameters of a trial, M of them that the outer optimizer moves, a trial's first ones.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from tipl_ray.config import OuterStep
from tipl_ray.digest import as_table
from tipl_ray.ppo.algorithms import Extension, Hooks, State
from tipl_ray.ppo.trials import TrialGroup


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class OuterSteps(Extension):
    """An outer step at the end of every iteration."""

    settings: OuterStep

    @property
    def num_snapshots(self) -> int:
        """One: the weights after the outer step."""
        return 1

    @property
    def header(self) -> Mapping[str, Any]:
        """The settings."""
        return {"outer": as_table(self.settings)}

    def hooks(self, group: TrialGroup) -> Hooks:
        """The outer optimizers of a group."""
        return GroupOuterSteps(group, self.settings)


class GroupOuterSteps(Hooks):
    """The outer optimizers of K stacked trials: the weights after the last outer step, and the velocities."""

    def __init__(self, group: TrialGroup, settings: OuterStep):
        self.settings = settings
        size = group.shape.num_policy_weights if settings.networks == "policy" else group.shape.num_parameters
        self._start_KM = group.parameters_KN[:, :size].copy()
        self._velocity_KM = np.zeros_like(self._start_KM)

    def move(self, group: TrialGroup, learning_rates_K: np.ndarray) -> Iterator[None]:
        """Step along the weight change of the iteration, as `torch.optim.SGD` with `nesterov` and `maximize` does."""
        rate, momentum = np.float32(self.settings.rate), np.float32(self.settings.momentum)
        parameters_KM = group.parameters_KN[:, : self._start_KM.shape[1]]
        moved_KM = parameters_KM - self._start_KM
        self._velocity_KM = momentum * self._velocity_KM + moved_KM
        self._start_KM += rate * (moved_KM + momentum * self._velocity_KM)
        parameters_KM[:] = self._start_KM
        yield

    def keep(self, kept: np.ndarray) -> None:
        """Keep only these trials, in order."""
        self._start_KM, self._velocity_KM = self._start_KM[kept], self._velocity_KM[kept]

    def state(self, k: int) -> State:
        """Start and velocity of trial k."""
        return {"outer.start": self._start_KM[k].copy(), "outer.velocity": self._velocity_KM[k].copy()}

    def set_state(self, k: int, state: Mapping[str, np.ndarray]) -> None:
        """Restore a state."""
        self._start_KM[k], self._velocity_KM[k] = state["outer.start"], state["outer.velocity"]
