"""The zoo's preset beside stable-baselines3's PPO with the same hyperparameters: the same losses and gradients."""

import dataclasses
import math
import shutil
from typing import Any

import numpy as np
import pytest
import torch
from stable_baselines3.common.logger import configure
from torch import nn
from zoo import their_model

from tipl_ray.experiments import load_experiment
from tipl_ray.places import CHECKOUT
from tipl_ray.ppo.compiled_learner import CompiledLearner
from tipl_ray.ppo.learner import Rollouts
from tipl_ray.ppo.networks import NetworkShape, unflatten
from tipl_ray.ppo.torch_learner import TorchLearner
from tipl_ray.ppo.trials import network_shape

PRESETS = sorted(path.stem for path in (CHECKOUT / "jobs" / "experiments").glob("tuned_*.toml"))


def their_layers(model: Any) -> dict[str, nn.Linear]:
    """By our names."""
    policy, extractor = model.policy, model.policy.mlp_extractor
    networks = {
        "actor": [*extractor.policy_net, policy.action_net],
        "critic": [*extractor.value_net, policy.value_net],
    }
    return {
        f"{name}.{index}": layer
        for name, parts in networks.items()
        for index, layer in enumerate(part for part in parts if isinstance(part, nn.Linear))
    }


def flattened(model: Any, shape: NetworkShape, of_gradients: bool = False) -> np.ndarray:
    """Their parameters, or gradients, in our order (N,)."""
    flat = np.zeros(shape.num_parameters, dtype=np.float32)
    named = unflatten(flat, shape.layout)
    tensors = {"log_std": model.policy.log_std}
    for name, layer in their_layers(model).items():
        tensors |= {f"{name}.weight": layer.weight, f"{name}.bias": layer.bias}
    for name, tensor in tensors.items():
        value = tensor.grad if of_gradients else tensor
        assert value is not None
        array = value.detach().numpy()
        named[name][:] = array.T if name.endswith("weight") else array
    return flat


def their_rollout(model: Any, shape: NetworkShape) -> Rollouts:
    """What they collected, in our arrays."""
    buffer, steps = model.rollout_buffer, model.n_steps
    rollouts = Rollouts.empty(1, steps, shape)
    rollouts.observations_KSO[0, :-1] = buffer.observations[:, 0]
    rollouts.observations_KSO[0, -1] = model._last_obs[0]
    rollouts.actions_KSA[0] = buffer.actions[:, 0]
    rollouts.rewards_KS[0] = buffer.rewards[:, 0]
    rollouts.ends_KS[0] = [*buffer.episode_starts[:, 0], model._last_episode_starts[0]]
    return rollouts


@pytest.mark.parametrize("name", PRESETS)
def test_the_first_losses_and_gradients_are_those_of_stable_baselines3(name: str) -> None:
    torch.set_num_threads(1)
    experiment = load_experiment(name).check("collect")
    ppo, shape = experiment.ppo, network_shape(experiment.collect)
    model = their_model(experiment, seed=1, n_epochs=1, batch_size=ppo.num_steps)
    _, callback = model._setup_learn(total_timesteps=ppo.num_steps)
    model.set_logger(configure(None, []))
    assert model.collect_rollouts(model.env, callback, model.rollout_buffer, ppo.num_steps)
    parameters, rollouts = flattened(model, shape)[None], their_rollout(model, shape)
    learner = TorchLearner(shape, ppo)
    learner.advantages(parameters, rollouts)
    buffer = model.rollout_buffer
    for ours, theirs in (
        (rollouts.values_KS, buffer.values),
        (rollouts.log_probabilities_KS, buffer.log_probs),
        (rollouts.advantages_KS, buffer.advantages),
        (rollouts.returns_KS, buffer.returns),
    ):
        np.testing.assert_allclose(ours[0], theirs[:, 0], rtol=1e-4, atol=1e-4)
    model.train()
    logged = model.logger.name_to_value
    samples = [torch.from_numpy(array) for array in rollouts.samples]
    (loss,) = learner.losses(torch.from_numpy(parameters), *samples).tolist()
    # Our loss leaves out what of a Gaussian's entropy has no gradient.
    constant = ppo.entropy_coefficient * shape.action_size * 0.5 * math.log(2 * math.pi * math.e)
    assert loss - constant == pytest.approx(logged["train/loss"], rel=1e-5, abs=1e-6)
    expected, everything = flattened(model, shape, of_gradients=True), np.arange(ppo.num_steps)
    learners = [CompiledLearner(shape, dataclasses.replace(ppo, num_minibatches=1))] if shutil.which("g++") else []
    gradients = [one.gradient(parameters[0], rollouts, 0, everything) for one in learners]
    gradients.append(learner.gradient(torch.from_numpy(parameters), *samples)[0].numpy())
    for gradient in gradients:
        clipped = gradient * min(1.0, ppo.max_gradient_norm / (float(np.linalg.norm(gradient)) + 1e-6))
        assert np.linalg.norm(clipped - expected) < 1e-5 * np.linalg.norm(expected)
