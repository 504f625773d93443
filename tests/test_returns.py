"""Returns of many policies at once against episodes in gymnasium, one by one."""

from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch

from tipl_ray.config import Collect, Ppo
from tipl_ray.ppo.engines import choose_engine, make_learner
from tipl_ray.ppo.learner import Learner
from tipl_ray.ppo.networks import NetworkShape, unflatten
from tipl_ray.ppo.returns import SIMULATIONS, policy_returns
from tipl_ray.ppo.trials import network_shape


def some_policies(task: str, count: int) -> tuple[NetworkShape, np.ndarray, np.ndarray, np.ndarray]:
    shape = network_shape(Collect(task=task, policy_hidden=(8, 8)))
    random = np.random.default_rng(0)
    weights = np.stack([shape.initial_parameters(random)[: shape.num_policy_weights] for _ in range(count)])
    weights += random.normal(0, 0.3, weights.shape).astype(np.float32)
    size = (count, shape.observation_size)
    return shape, weights, random.normal(0, 0.01, size), random.uniform(0.5, 2, size)


def gymnasium_return(task: str, act: Callable, mean: np.ndarray, variance: np.ndarray, seed: int) -> float:
    environment: Any = gymnasium.make(task)
    observation, _ = environment.reset(seed=seed)
    total, over = 0.0, False
    while not over:
        normalised = np.clip(np.float32((observation - mean) / np.sqrt(variance + 1e-8)), -10, 10)
        space, action = environment.action_space, act(normalised)
        discrete = isinstance(space, gymnasium.spaces.Discrete)
        action = int(action.argmax()) if discrete else np.clip(action, space.low, space.high)
        observation, reward, terminated, truncated, _ = environment.step(action)
        total, over = total + float(reward), terminated or truncated
    return total


def act_in_torch(shape: NetworkShape, weights: np.ndarray) -> Callable:
    named = {name: torch.from_numpy(array) for name, array in unflatten(weights, shape.policy_layout).items()}

    def act(observation: np.ndarray) -> np.ndarray:
        x = torch.from_numpy(observation)
        for layer in range(3):
            x = x @ named[f"actor.{layer}.weight"] + named[f"actor.{layer}.bias"]
            x = x if layer == 2 else x.tanh()
        return x.numpy()

    return act


def act_by_the_learner(learner: Learner, weights: np.ndarray, action_size: int) -> Callable:
    def act(observation: np.ndarray) -> np.ndarray:
        actions = np.zeros((1, action_size), dtype=np.float32)
        learner.actor(weights[None], np.zeros(1, dtype=np.int32), observation[None], None, actions)()
        return actions[0]

    return act


@pytest.mark.parametrize("task", ["InvertedPendulum-v4", "HalfCheetah-v4", "CartPole-v1", "Pendulum-v1"])
def test_returns_equal_episodes_in_gymnasium(task: str) -> None:
    """Also with a policy in torch, where the action's last bit is not in the return."""
    shape, weights, means, variances = some_policies(task, 3)
    learner = make_learner(choose_engine("auto", Ppo()), shape, Ppo())
    returns = policy_returns(task, learner, weights, means, variances, [100, 101])
    for n in range(3):
        acts = [act_by_the_learner(learner, weights[n], shape.action_size)]
        if task in ("InvertedPendulum-v4", "CartPole-v1"):
            acts.append(act_in_torch(shape, weights[n]))
        for act in acts:
            episodes = [gymnasium_return(task, act, means[n], variances[n], seed) for seed in (100, 101)]
            np.testing.assert_allclose(returns[n], episodes, rtol=1e-12)


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("engine", ["auto", "torch"])
@pytest.mark.parametrize("task", ["InvertedPendulum-v4", "CartPole-v1"])
def test_a_policys_returns_do_not_depend_on_the_company(task: str, engine: str, sampled: bool) -> None:
    shape, weights, means, variances = some_policies(task, 40)
    learner = make_learner(choose_engine(engine, Ppo()), shape, Ppo())
    seeds = [1, 2, 3]
    assert len(weights) * len(seeds) > SIMULATIONS
    together = policy_returns(task, learner, weights, means, variances, seeds, sampled_actions=sampled)
    for policy in (0, 17, 39):
        rows = slice(policy, policy + 1)
        alone = policy_returns(
            task,
            learner,
            weights[rows],
            means[rows],
            variances[rows],
            seeds,
            sampled_actions=sampled,
        )
        np.testing.assert_array_equal(together[rows], alone)
