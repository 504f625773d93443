"""stable-baselines3's PPO as rl-baselines3-zoo makes it, from an experiment of the same hyperparameters."""

from typing import Any

import gymnasium
from stable_baselines3 import PPO
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from torch import nn

from tipl_ray.config import Experiment


def their_model(experiment: Experiment, seed: int, **settings: Any) -> Any:
    """Their model, with some settings in place of the experiment's."""
    collect, ppo = experiment.collect, experiment.ppo
    vector = DummyVecEnv([lambda: Monitor(gymnasium.make(collect.task))])
    made = {
        "n_steps": ppo.num_steps,
        "batch_size": ppo.minibatch_size,
        "n_epochs": ppo.num_epochs,
        "learning_rate": ppo.learning_rate,
        "gamma": ppo.gamma,
        "gae_lambda": ppo.gae_lambda,
        "clip_range": ppo.clip_coefficient,
        "ent_coef": ppo.entropy_coefficient,
        "vf_coef": ppo.value_coefficient / 2,
        "max_grad_norm": ppo.max_gradient_norm,
        "policy_kwargs": {
            "log_std_init": ppo.initial_log_std,
            "ortho_init": ppo.initialisation == "orthogonal",
            "activation_fn": {"relu": nn.ReLU, "tanh": nn.Tanh}[ppo.activation],
            "net_arch": {"pi": list(collect.policy_hidden), "vf": list(collect.critic_hidden)},
        },
    }
    return PPO("MlpPolicy", VecNormalize(vector, gamma=ppo.gamma), seed=seed, device="cpu", **{**made, **settings})
