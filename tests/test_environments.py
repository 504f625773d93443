"""Wrappers against gymnasium's own, step for step and bit for bit."""

import shutil

import numpy as np
import pytest
from plain_ppo import make_environment

from tipl_ray.ppo.environments import CompiledEnvironments, Environments, generator_state, restored_generator
from tipl_ray.ppo.simulations import BatchSimulations
from tipl_ray.ppo.tasks import TASKS

SOME_TASKS = [*sorted(TASKS.own), "Humanoid-v4", "Reacher-v4"]
KINDS = [Environments] + ([CompiledEnvironments] if shutil.which("g++") else [])

NUM_STEPS = 1000


@pytest.mark.parametrize("task", SOME_TASKS)
def test_wrappers_equal_gymnasiums_with_a_reset_within_the_step(task: str) -> None:
    seeds = [11, 12]
    ours = [kind(task, seeds, gamma=0.99) for kind in KINDS]
    originals = [make_environment(task) for _ in seeds]
    for k, seed in enumerate(seeds):
        observation = originals[k].reset(seed=seed)[0]
        for environments in ours:
            np.testing.assert_array_equal(environments.observations_KO[k], observation)
    random = np.random.default_rng(1)
    returns: list[tuple[int, float]] = []
    for _ in range(NUM_STEPS + 50):
        actions = random.normal(0, 1, (len(seeds), ours[0].simulations.action_size)).astype(np.float32)
        for environments in ours:
            environments.step(actions)
        for k, original in enumerate(originals):
            observation, reward, terminated, truncated, info = original.step(actions[k])
            if terminated or truncated:
                returns.append((k, info["episode"]["r"]))
                observation, _ = original.reset()
            for environments in ours:
                assert environments.ends_K[k] == (terminated or truncated)
                assert environments.rewards_K[k] == np.float32(reward)
                np.testing.assert_array_equal(environments.observations_KO[k], np.float32(observation))
    assert {k for k, _ in returns} == set(range(len(seeds))), "every one was reset"
    for environments in ours:
        assert [k for k, _ in environments.finished] == [k for k, _ in returns]
        np.testing.assert_allclose([r for _, r in environments.finished], [r for _, r in returns], rtol=1e-12)
        for k, original in enumerate(originals):
            statistics = original.get_wrapper_attr("obs_rms")
            np.testing.assert_array_equal(environments.observation_statistics.mean[k], statistics.mean)
            np.testing.assert_array_equal(environments.observation_statistics.variance[k], statistics.var)
            assert environments.observation_statistics.count[k, 0] == statistics.count
            assert environments.reward_statistics.variance[k] == original.get_wrapper_attr("return_rms").var


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("task", SOME_TASKS)
def test_environments_go_on_from_a_saved_state_bit_for_bit(task: str, kind: type[Environments]) -> None:
    random = np.random.default_rng(2)
    environments = kind(task, [1, 2, 3], gamma=0.99)
    actions = random.normal(0, 1, (400, 3, environments.simulations.action_size)).astype(np.float32)
    for step in range(200):
        environments.step(actions[step])
    resumed = kind(task, [7, 8], gamma=0.99)
    resumed.set_state(0, environments.state(2))
    resumed.set_state(1, environments.state(0))
    environments.keep(np.array([2, 0]))
    for step in range(200, 400):
        environments.step(actions[step][[2, 0]])
        resumed.step(actions[step][[2, 0]])
        np.testing.assert_array_equal(environments.observations_KO, resumed.observations_KO)
        np.testing.assert_array_equal(environments.rewards_K, resumed.rewards_K)
    for name, array in environments.state(0).items():
        np.testing.assert_array_equal(array, resumed.state(0)[name], err_msg=name)


def test_the_number_of_physics_threads_changes_no_bit() -> None:
    seeds, random = list(range(9)), np.random.default_rng(3)
    alone, threaded = (Environments("HalfCheetah-v4", seeds, 0.99, physics_threads=threads) for threads in (1, 3))
    threaded.keep(np.arange(9))
    assert isinstance(threaded.simulations, BatchSimulations)
    assert threaded.simulations.batch.nthread == 3
    for _ in range(100):
        actions = random.normal(0, 1, (9, 6)).astype(np.float32)
        for environments in (alone, threaded):
            environments.step(actions)
        np.testing.assert_array_equal(alone.observations_KO, threaded.observations_KO)


def test_a_generator_survives_as_six_words() -> None:
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence(5)))
    generator.integers(0, 10, 3, dtype=np.uint32)
    again = restored_generator(generator_state(generator))
    np.testing.assert_array_equal(generator.standard_normal(9), again.standard_normal(9))
    assert generator.integers(0, 2**32, dtype=np.uint32) == again.integers(0, 2**32, dtype=np.uint32)
