"""Simulations against gymnasium's own classes, step for step and bit for bit, resets included."""

import gymnasium
import numpy as np
import pytest

from tipl_ray.tasks import TASKS, Simulations, find_task

NUM_STEPS = 1000


@pytest.mark.parametrize("task", sorted(TASKS))
def test_simulations_equal_gymnasium_bit_for_bit_resets_included(task: str) -> None:
    seeds = [3, 4, 5]
    simulations: Simulations = find_task(task)(len(seeds))
    generators = [np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed))) for seed in seeds]
    originals: list[gymnasium.Env] = [gymnasium.make(task) for _ in seeds]
    random = np.random.default_rng(0)
    for k, (original, seed) in enumerate(zip(originals, seeds, strict=True)):
        np.testing.assert_array_equal(simulations.reset(k, generators[k]), original.reset(seed=seed)[0])
    num_resets = 0
    for _ in range(NUM_STEPS):
        low, high = simulations.action_low, simulations.action_high
        actions = random.uniform(low, high, (len(seeds), len(low))).astype(np.float32)
        simulations.step(actions)
        for k, original in enumerate(originals):
            observation, reward, terminated, truncated, _ = original.step(actions[k])
            np.testing.assert_array_equal(simulations.observations_KO[k], observation)
            assert simulations.rewards_K[k] == reward
            assert simulations.terminated_K[k] == terminated
            if terminated or truncated:
                num_resets += 1
                np.testing.assert_array_equal(simulations.reset(k, generators[k]), original.reset()[0])
    assert num_resets >= len(seeds)


def test_an_unknown_task_is_refused_by_name() -> None:
    with pytest.raises(
        ValueError, match=r"collect.task='CartPole-v1' is not one of HalfCheetah-v4, InvertedPendulum-v4"
    ):
        find_task("CartPole-v1")
