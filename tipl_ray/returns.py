"""The returns of many policies at once, on the same episodes, with observation statistics frozen.

N policies, E episodes each, B simulations at a time, P policy weights, O observation values. Every policy meets the
same E random streams. A simulation whose episode ended takes the next one in the queue; when the queue is empty it
leaves the stack. What a policy returns does not depend on what runs beside it.
"""

import numpy as np

from tipl_ray.environments import CLIP, EPSILON
from tipl_ray.learner import Learner
from tipl_ray.tasks import find_task

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
) -> np.ndarray:
    """Undiscounted returns (N, E) float64 of each policy on each episode: mean action, or sampled."""
    weights_NP = np.ascontiguousarray(weights_NP, dtype=np.float32)
    scales_NO = np.sqrt(observation_variances_NO + EPSILON)
    returns_NE = np.zeros((len(weights_NP), len(episode_seeds)))
    queue = [(policy, episode) for policy in range(len(weights_NP)) for episode in range(len(episode_seeds))]
    queue.reverse()
    count = min(SIMULATIONS, len(queue))
    simulations = find_task(task)(count)
    owners_B, episodes_B, steps_B = (
        np.zeros(count, dtype=np.int32),
        np.zeros(count, dtype=int),
        np.zeros(count, dtype=int),
    )
    generators = [np.random.default_rng()] * count
    actions_BA = np.zeros((count, simulations.action_size), dtype=np.float32)

    def begin(b: int) -> None:
        owners_B[b], episodes_B[b] = queue.pop()
        steps_B[b] = 0
        generators[b] = np.random.Generator(np.random.PCG64(np.random.SeedSequence(episode_seeds[episodes_B[b]])))
        simulations.reset(b, generators[b])

    for b in range(count):
        begin(b)
    while count:
        observations = (simulations.observations_KO - observation_means_NO[owners_B]) / scales_NO[owners_B]
        observations_BO = np.clip(observations.astype(np.float32), -CLIP, CLIP)
        noise_BA = None
        if sampled_actions:
            noise_BA = np.stack([g.standard_normal(actions_BA.shape[1], dtype=np.float32) for g in generators])
        learner.act(weights_NP, owners_B, observations_BO, noise_BA, actions_BA)
        simulations.step(np.clip(actions_BA, simulations.action_low, simulations.action_high))
        np.add.at(returns_NE, (owners_B, episodes_B), simulations.rewards_K)
        steps_B += 1
        ended_B = simulations.terminated_K | (steps_B >= simulations.max_episode_steps)
        if not ended_B.any():
            continue
        for b in np.flatnonzero(ended_B)[: len(queue)]:
            begin(b)
            ended_B[b] = False
        if ended_B.any():
            kept = np.flatnonzero(~ended_B)
            count = len(kept)
            if count:
                simulations = simulations.keep(kept)
            owners_B, episodes_B, steps_B = owners_B[kept], episodes_B[kept], steps_B[kept]
            generators, actions_BA = [generators[b] for b in kept], np.ascontiguousarray(actions_BA[kept])
    return returns_NE
