"""One PPO trial as plainly as it can be written: gymnasium's wrappers and vector environment of one, eager torch.

The measure of the stacked engine, in tests for what it computes and in benchmarks for how fast; nothing of tipl_ray is
used. Hyperparameters are those of CleanRL's `ppo_continuous_action.py`. Noise and permutations may be handed in.
"""

import itertools

import gymnasium
import numpy as np
import torch
from torch import nn

NUM_STEPS, NUM_MINIBATCHES, NUM_EPOCHS = 2048, 32, 10
GAMMA, GAE_LAMBDA, CLIP, LEARNING_RATE = 0.99, 0.95, 0.2, 3e-4


def make_environment(task: str, in_float64: bool = False) -> gymnasium.Env:
    environment: gymnasium.Env = gymnasium.make(task)
    environment = gymnasium.wrappers.RecordEpisodeStatistics(environment)
    if isinstance(environment.action_space, gymnasium.spaces.Box):
        environment = gymnasium.wrappers.ClipAction(environment)
    if in_float64:
        space = gymnasium.spaces.Box(-np.inf, np.inf, environment.observation_space.shape, np.float64)
        environment = gymnasium.wrappers.TransformObservation(environment, np.float64, space)
    environment = gymnasium.wrappers.NormalizeObservation(environment)
    environment = gymnasium.wrappers.TransformObservation(environment, lambda o: np.clip(o, -10, 10), None)
    environment = gymnasium.wrappers.NormalizeReward(environment, gamma=GAMMA)
    return gymnasium.wrappers.TransformReward(environment, lambda r: np.clip(float(r), -10, 10))


def make_network(widths: list[int], head_gain: float, activation: type[nn.Module] = nn.Tanh) -> nn.Sequential:
    layers: list[nn.Module] = []
    for index, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
        last = index == len(widths) - 2
        linear = nn.Linear(inputs, outputs)
        nn.init.orthogonal_(linear.weight, head_gain if last else 2**0.5)
        nn.init.zeros_(linear.bias)
        layers += [linear] if last else [linear, activation()]
    return nn.Sequential(*layers)


class PlainTrial:
    """A trial that runs iteration by iteration."""

    def __init__(
        self,
        task: str,
        policy_hidden: tuple[int, int],
        seed: int,
        num_iterations: int,
        *,
        activation: type[nn.Module] = nn.Tanh,
        clip_values: bool = True,
        target_kl: float | None = None,
        bootstrap_truncated: bool = False,
    ):
        torch.manual_seed(seed)
        self.clip_values, self.target_kl = clip_values, target_kl
        self.bootstrap_truncated = bootstrap_truncated
        self.environment = gymnasium.vector.SyncVectorEnv(
            [lambda: make_environment(task)], autoreset_mode=gymnasium.vector.AutoresetMode.SAME_STEP
        )
        spaces = (self.environment.single_observation_space, self.environment.single_action_space)
        observation_size, action_size = (int(np.prod(space.shape or ())) for space in spaces)
        self.actor = make_network([observation_size, *policy_hidden, action_size], 0.01, activation)
        self.log_std = nn.Parameter(torch.zeros(1, action_size))
        self.critic = make_network([observation_size, 64, 64, 1], 1.0, activation)
        self.parameters = [*self.actor.parameters(), self.log_std, *self.critic.parameters()]
        self.optimizer = torch.optim.Adam(self.parameters, lr=LEARNING_RATE, eps=1e-5)
        self.observation = torch.tensor(self.environment.reset(seed=seed)[0], dtype=torch.float32)
        self.num_iterations, self.iteration = num_iterations, 0
        self.episodic_returns: list[float] = []
        self.random = np.random.default_rng(seed)

    def run_iteration(
        self,
        noise: np.ndarray | None = None,
        permutations: np.ndarray | None = None,
        actions: np.ndarray | None = None,
    ) -> None:
        """One rollout and its update epochs; noise (S, A) and permutations (epochs, S) are drawn where not given.

        Given actions (S, A) are taken in place of the policy's own.
        """
        self.optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 - self.iteration / self.num_iterations)
        self.collect(noise, actions)
        self.estimate_advantages()
        self.epochs_run = 0
        for epoch in range(NUM_EPOCHS):
            self.epochs_run += 1
            permutation = self.random.permutation(NUM_STEPS) if permutations is None else permutations[epoch]
            for indices in np.split(permutation, NUM_MINIBATCHES):
                self.optimizer.zero_grad()
                self.loss(torch.from_numpy(indices)).backward()
                nn.utils.clip_grad_norm_(self.parameters, 0.5)
                self.optimizer.step()
            if self.target_kl is not None and self.approximate_kl > self.target_kl:
                break
        self.iteration += 1

    def collect(self, noise: np.ndarray | None, actions: np.ndarray | None) -> None:
        size = self.log_std.shape[1]
        self.observations = torch.zeros(NUM_STEPS, self.observation.shape[1])
        self.actions, self.rewards = torch.zeros(NUM_STEPS, size), torch.zeros(NUM_STEPS)
        self.log_probabilities, self.values = torch.zeros(NUM_STEPS), torch.zeros(NUM_STEPS)
        self.ends = torch.zeros(NUM_STEPS)
        for step in range(NUM_STEPS):
            self.observations[step] = self.observation[0]
            with torch.no_grad():
                mean = self.actor(self.observation)
                distribution = torch.distributions.Normal(mean, self.log_std.expand_as(mean).exp())
                if actions is not None:
                    action = torch.from_numpy(actions[step : step + 1])
                elif noise is None:
                    action = distribution.sample()
                else:
                    action = mean + distribution.scale * torch.from_numpy(noise[step : step + 1])
                self.values[step] = self.critic(self.observation).flatten()
                self.log_probabilities[step] = distribution.log_prob(action).sum(1)
            self.actions[step] = action[0]
            observation, reward, terminated, truncated, info = self.environment.step(action.numpy())
            self.rewards[step] = torch.tensor(reward).view(-1)
            if self.bootstrap_truncated and truncated[0] and not terminated[0]:
                last = torch.tensor(np.array(info["final_obs"][0]), dtype=torch.float32)
                self.rewards[step] += GAMMA * self.critic(last).detach()[0]
            self.ends[step] = torch.tensor(np.logical_or(terminated, truncated)).float()
            if "final_info" in info:
                self.episodic_returns.append(float(info["final_info"]["episode"]["r"][0]))
            self.observation = torch.tensor(observation, dtype=torch.float32)

    def estimate_advantages(self) -> None:
        with torch.no_grad():
            next_value = self.critic(self.observation)[0, 0]
            self.advantages, advantage = torch.zeros(NUM_STEPS), torch.zeros(())
            for step in reversed(range(NUM_STEPS)):
                going_on = 1 - self.ends[step]
                delta = self.rewards[step] + GAMMA * next_value * going_on - self.values[step]
                advantage = delta + GAMMA * GAE_LAMBDA * going_on * advantage
                self.advantages[step] = advantage
                next_value = self.values[step]
            self.returns = self.advantages + self.values

    def loss(self, indices: torch.Tensor) -> torch.Tensor:
        observations = self.observations[indices]
        distribution = torch.distributions.Normal(self.actor(observations), self.log_std.exp())
        log_ratio = distribution.log_prob(self.actions[indices]).sum(1) - self.log_probabilities[indices]
        ratio = log_ratio.exp()
        self.approximate_kl = ((ratio - 1) - log_ratio).mean().item()
        advantages = self.advantages[indices]
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
        policy_loss = torch.max(-advantages * ratio, -advantages * ratio.clamp(1 - CLIP, 1 + CLIP)).mean()
        values, before, returns = self.critic(observations)[:, 0], self.values[indices], self.returns[indices]
        value_losses = (values - returns) ** 2
        if self.clip_values:
            clipped = before + (values - before).clamp(-CLIP, CLIP)
            value_losses = torch.max(value_losses, (clipped - returns) ** 2)
        value_loss = 0.5 * value_losses.mean()
        return policy_loss + 0.5 * value_loss
