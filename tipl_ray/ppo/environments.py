"""CleanRL's wrappers over many simulations of one task.

K environments, O observation values, A action values. In CleanRL's order: episode statistics, clip action, normalise
observation, clip to +-10, normalise reward, clip to +-10; an episode that ended is reset within the same step. Bit for
bit what gymnasium's wrappers do: in numpy, or the same arithmetic compiled. Knows nothing of policies or learning.
"""

import ctypes
from collections.abc import Mapping
from typing import Any

import numpy as np

from tipl_ray.ppo.compiler import shared_library
from tipl_ray.ppo.generators import generator_state, restored_generator
from tipl_ray.ppo.tasks import find_task

EPSILON = 1e-8
"""Gymnasium's epsilon under the square root of both normalisations."""
CLIP = 10.0
"""Limit of normalised observations and rewards."""


class RunningStatistics:
    """Mean and variance of K streams of values, updated one value at a time by gymnasium's formula, bit for bit."""

    def __init__(self, *shape: int):
        self.mean, self.variance = np.zeros(shape), np.ones(shape)
        self.count = np.full((shape[0],) + (1,) * (len(shape) - 1), 1e-4)
        self._delta, self._total = np.zeros(shape), np.zeros_like(self.count)

    def update(self, values: np.ndarray) -> None:
        """Take one value per stream."""
        delta, total = self._delta, self._total
        np.subtract(values, self.mean, out=delta)
        np.add(self.count, 1.0, out=total)
        self.mean += delta / total
        np.square(delta, out=delta)
        delta *= self.count
        delta /= total
        self.variance *= self.count
        self.variance += delta
        self.variance /= total
        self.count[:] = total

    def update_one(self, k: int, value: np.ndarray) -> None:
        """Take one value of stream k."""
        delta, total = value - self.mean[k], self.count[k] + 1.0
        self.mean[k] += delta / total
        self.variance[k] = (self.variance[k] * self.count[k] + np.square(delta) * self.count[k] / total) / total
        self.count[k] = total


class Environments:
    """K environments of one task under CleanRL's wrappers, stepped together; each has its own random stream."""

    def __init__(
        self,
        task: str,
        seeds: list[int] | tuple[int, ...],
        gamma: float,
        physics_threads: int = 1,
        options: Mapping[str, Any] | None = None,
    ):
        count = len(seeds)
        self.task, self.gamma = task, gamma
        self.simulations = find_task(task, options)(count, physics_threads)
        self.generators = [np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed))) for seed in seeds]
        self._allocate()
        for k in range(count):
            self.simulations.reset(k, self.generators[k])
            self._begin_episode(k)
        self._normalise_observations()

    def _allocate(self) -> None:
        count, size = self.simulations.observations_KO.shape
        self.observation_statistics = RunningStatistics(count, size)
        # Gymnasium's observation statistics begin as float32, so that its first variance * count is float32(1e-4).
        self.observation_statistics.variance *= np.float64(np.float32(1e-4)) / 1e-4
        self.reward_statistics = RunningStatistics(count)
        self.discounted_rewards_K = np.zeros(count)
        self.episode_steps_K = np.zeros(count, dtype=np.int64)
        self.episode_returns_K = np.zeros(count)
        self.observations_KO = np.zeros((count, size), dtype=np.float32)
        self.rewards_K = np.zeros(count, dtype=np.float32)
        self.ends_K = np.zeros(count, dtype=bool)
        self.finished: list[tuple[int, float]] = []
        """(k, undiscounted return) of the episodes that ended since the list was last cleared."""
        self.cut_off: list[tuple[int, np.ndarray]] = []
        """(k, last observation as the agent would have seen it) of the episodes that the last step cut off for time."""
        self._actions_KA = np.zeros((count, self.simulations.action_size), dtype=np.float32)
        self._scale_KO, self._normalised_KO = np.zeros((count, size)), np.zeros((count, size))

    def __len__(self) -> int:
        return len(self.generators)

    def step(self, actions_KA: np.ndarray) -> None:
        """Take one step everywhere; `observations_KO`, `rewards_K` and `ends_K` then hold what the agent sees.

        Where an episode ended, the observation is that of the episode that began within the same step.
        """
        simulations = self.simulations
        np.maximum(actions_KA, simulations.action_low, out=self._actions_KA)
        np.minimum(self._actions_KA, simulations.action_high, out=self._actions_KA)
        simulations.step(self._actions_KA)
        self.cut_off.clear()
        if self._account():
            if not simulations.terminated_K[self.ends_K].all():
                self._normalise_observations()
                cut_off = np.flatnonzero(self.ends_K & ~simulations.terminated_K)
                self.cut_off += [(int(k), self.observations_KO[k].copy()) for k in cut_off]
            for k in map(int, np.flatnonzero(self.ends_K)):
                self.finished.append((k, float(self.episode_returns_K[k])))
                self.simulations.reset(k, self.generators[k])
                self._begin_episode(k)
        self._normalise_observations()

    def _account(self) -> int:
        """What a step of the simulations means for statistics, rewards and episodes; how many episodes ended."""
        simulations = self.simulations
        self.episode_returns_K += simulations.rewards_K
        self.episode_steps_K += 1
        self.observation_statistics.update(simulations.observations_KO)
        self._normalise_rewards()
        np.greater_equal(self.episode_steps_K, simulations.max_episode_steps, out=self.ends_K)
        np.logical_or(self.ends_K, simulations.terminated_K, out=self.ends_K)
        return int(np.count_nonzero(self.ends_K))

    def _begin_episode(self, k: int) -> None:
        """Environment k's simulation has begun an episode."""
        self.observation_statistics.update_one(k, self.simulations.observations_KO[k])
        self.episode_steps_K[k], self.episode_returns_K[k] = 0, 0.0

    def _normalise_rewards(self) -> None:
        rewards_K = self.simulations.rewards_K
        self.discounted_rewards_K *= self.gamma
        self.discounted_rewards_K *= ~self.simulations.terminated_K
        self.discounted_rewards_K += rewards_K
        self.reward_statistics.update(self.discounted_rewards_K)
        normalised_K = rewards_K / np.sqrt(self.reward_statistics.variance + EPSILON)
        self.rewards_K[:] = np.minimum(np.maximum(normalised_K, -CLIP), CLIP)

    def _normalise_observations(self) -> None:
        statistics, scale, normalised = self.observation_statistics, self._scale_KO, self._normalised_KO
        np.add(statistics.variance, EPSILON, out=scale)
        np.sqrt(scale, out=scale)
        np.subtract(self.simulations.observations_KO, statistics.mean, out=normalised)
        np.divide(normalised, scale, out=normalised)
        self.observations_KO[:] = normalised
        np.maximum(self.observations_KO, -CLIP, out=self.observations_KO)
        np.minimum(self.observations_KO, CLIP, out=self.observations_KO)

    def state(self, k: int) -> dict[str, np.ndarray]:
        """Everything that environment k's next bit depends on, as arrays."""
        arrays = {name: np.array(array[k]) for name, array in self._per_environment().items()}
        return {**arrays, "environment.generator": generator_state(self.generators[k])}

    def set_state(self, k: int, state: dict[str, np.ndarray]) -> None:
        """Go on from a state."""
        arrays = self._per_environment()
        for name, array in arrays.items():
            array[k] = state[name]
        self.simulations.state_KS = arrays["environment.physics"]
        self.generators[k] = restored_generator(state["environment.generator"])
        self.simulations.draw_from(k, self.generators[k])

    def keep(self, kept: np.ndarray) -> None:
        """Go on with the kept environments alone, in their order."""
        before = self._per_environment()
        self.simulations = self.simulations.keep(kept)
        self.generators = [self.generators[k] for k in kept]
        self._allocate()
        for name, array in self._per_environment().items():
            array[:] = before[name][kept]

    def _per_environment(self) -> dict[str, np.ndarray]:
        return {
            "environment.physics": self.simulations.state_KS,
            "environment.observation_mean": self.observation_statistics.mean,
            "environment.observation_variance": self.observation_statistics.variance,
            "environment.observation_count": self.observation_statistics.count,
            "environment.reward_mean": self.reward_statistics.mean,
            "environment.reward_variance": self.reward_statistics.variance,
            "environment.reward_count": self.reward_statistics.count,
            "environment.discounted_reward": self.discounted_rewards_K,
            "environment.episode_steps": self.episode_steps_K,
            "environment.episode_return": self.episode_returns_K,
            "environment.raw_observation": self.simulations.observations_KO,
            "environment.observation": self.observations_KO,
        }


class _Wrappers(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("count", "size", "max_episode_steps")),
        *((name, ctypes.c_double) for name in ("gamma", "epsilon", "limit")),
        *((f"array_{index}", ctypes.c_void_p) for index in range(15)),
    )


class CompiledEnvironments(Environments):
    """The same with wrappers.cpp in place of numpy, to the bit: a few calls per step in place of forty."""

    def _allocate(self) -> None:
        super()._allocate()
        simulations, observed, rewarded = self.simulations, self.observation_statistics, self.reward_statistics
        self._arrays = (
            *(simulations.observations_KO, simulations.rewards_K, simulations.terminated_K),
            *(observed.mean, observed.variance, observed.count, rewarded.mean, rewarded.variance, rewarded.count),
            *(self.discounted_rewards_K, self.episode_returns_K, self.episode_steps_K),
            *(self.observations_KO, self.rewards_K, self.ends_K),
        )
        assert all(array.flags.c_contiguous for array in self._arrays)
        sizes = (*self.observations_KO.shape, simulations.max_episode_steps)
        addresses = (array.ctypes.data for array in self._arrays)
        self._wrappers = ctypes.byref(_Wrappers(*sizes, self.gamma, EPSILON, CLIP, *addresses))
        self._library = ctypes.CDLL(str(shared_library("wrappers.cpp", "-ffp-contract=off")))
        self._library.account.restype = ctypes.c_int64

    def _account(self) -> int:
        return int(self._library.account(self._wrappers))

    def _begin_episode(self, k: int) -> None:
        self._library.begin_episode(self._wrappers, ctypes.c_int64(k))

    def _normalise_observations(self) -> None:
        self._library.normalise_observations(self._wrappers)
