"""The returns of many policies at once, on the same episodes, with observation statistics frozen.

N policies, E episodes each, B simulations at a time, P policy weights, O observation values. Every policy meets the
same E random streams. A simulation whose episode ended takes the next one in the queue; when the queue is empty it
leaves the stack. What a policy returns does not depend on what runs beside it.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from tipl_ray.ppo.environments import CLIP, EPSILON
from tipl_ray.ppo.generators import action_noise
from tipl_ray.ppo.learner import Learner
from tipl_ray.ppo.simulations import Simulations
from tipl_ray.ppo.tasks import find_task

SIMULATIONS = 64
"""Simulations in lock step: enough to make the interpreter's share small, few enough to stay in cache."""


def policy_returns(
    task: str,
    learner: Learner,
    weights_NP: np.ndarray,
    observation_means_NO: np.ndarray,
    observation_variances_NO: np.ndarray,
    episode_seeds: list[int],
    *,
    sampled_actions: bool = False,
    task_options: Mapping[str, Any] | None = None,
) -> np.ndarray:
    """Undiscounted returns (N, E) float64 of each policy on each episode: mean or likeliest action, or sampled."""
    weights_NP = np.ascontiguousarray(weights_NP, dtype=np.float32)
    scales_NO = np.sqrt(observation_variances_NO + EPSILON)
    returns_NE = np.zeros((len(weights_NP), len(episode_seeds)))
    queue = [(policy, episode) for policy in range(len(weights_NP)) for episode in range(len(episode_seeds))]
    queue.reverse()
    simulations = find_task(task, task_options)(min(SIMULATIONS, len(queue)))
    stack = _Stack.of(simulations)

    def begin(b: int) -> None:
        policy, episode = stack.owners_B[b], stack.episodes_B[b] = queue.pop()
        stack.steps_B[b], stack.returns_B[b] = 0, 0.0
        stack.means_BO[b], stack.scales_BO[b] = observation_means_NO[policy], scales_NO[policy]
        stack.generators_B[b] = np.random.Generator(np.random.PCG64(np.random.SeedSequence(episode_seeds[episode])))
        simulations.reset(b, stack.generators_B[b])

    for b in range(len(stack.owners_B)):
        begin(b)
    while len(stack.owners_B):
        noise_BA = stack.noise_BA if sampled_actions else None
        act = learner.actor(weights_NP, stack.owners_B, stack.observations_BO, noise_BA, stack.actions_BA)
        ended_B = np.zeros(len(stack.owners_B), dtype=bool)
        while not ended_B.any():  # the same simulations until one leaves the stack
            stack.observe(simulations)
            if sampled_actions:
                stack.draw_noise(simulations.discrete)
            act()
            simulations.step(np.clip(stack.actions_BA, simulations.action_low, simulations.action_high))
            stack.returns_B += simulations.rewards_K
            stack.steps_B += 1
            np.greater_equal(stack.steps_B, simulations.max_episode_steps, out=ended_B)
            ended_B |= simulations.terminated_K
            for b in map(int, np.flatnonzero(ended_B)):
                returns_NE[stack.owners_B[b], stack.episodes_B[b]] = stack.returns_B[b]
                if queue:
                    begin(b)
                    ended_B[b] = False
        kept = np.flatnonzero(~ended_B)
        stack = stack.keep(kept)
        if len(kept):
            simulations = simulations.keep(kept)
    return returns_NE


@dataclasses.dataclass(slots=True)
class _Stack:
    """The episodes that run, a row each."""

    owners_B: np.ndarray
    episodes_B: np.ndarray
    steps_B: np.ndarray
    returns_B: np.ndarray
    means_BO: np.ndarray
    scales_BO: np.ndarray
    generators_B: np.ndarray
    normalised_BO: np.ndarray
    observations_BO: np.ndarray
    noise_BA: np.ndarray
    actions_BA: np.ndarray

    @classmethod
    def of(cls, simulations: Simulations) -> "_Stack":
        """As many rows as there are simulations."""
        count, size = simulations.observations_KO.shape
        actions = (count, simulations.action_size)
        return cls(
            owners_B=np.zeros(count, dtype=np.int32),
            episodes_B=np.zeros(count, dtype=int),
            steps_B=np.zeros(count, dtype=int),
            returns_B=np.zeros(count),
            means_BO=np.zeros((count, size)),
            scales_BO=np.zeros((count, size)),
            generators_B=np.empty(count, dtype=object),
            normalised_BO=np.zeros((count, size)),
            observations_BO=np.zeros((count, size), dtype=np.float32),
            noise_BA=np.zeros(actions, dtype=np.float32),
            actions_BA=np.zeros(actions, dtype=np.float32),
        )

    def keep(self, kept: np.ndarray) -> "_Stack":
        """The kept rows alone, in their order."""
        return _Stack(*(getattr(self, field.name)[kept] for field in dataclasses.fields(self)))

    def observe(self, simulations: Simulations) -> None:
        """What each row's policy sees of its simulation."""
        np.subtract(simulations.observations_KO, self.means_BO, out=self.normalised_BO)
        np.divide(self.normalised_BO, self.scales_BO, out=self.normalised_BO)
        self.observations_BO[:] = self.normalised_BO
        np.maximum(self.observations_BO, -CLIP, out=self.observations_BO)
        np.minimum(self.observations_BO, CLIP, out=self.observations_BO)

    def draw_noise(self, discrete: bool) -> None:
        """Noise of the next actions, each row's from its own generator."""
        for noise_A, generator in zip(self.noise_BA, self.generators_B, strict=True):
            noise_A[:] = action_noise(generator, noise_A.shape, discrete)
