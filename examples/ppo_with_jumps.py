"""PPO in one plain file, after CleanRL's `ppo_continuous_action.py`, with and without jumps: the lines marked J.

    python examples/ppo_with_jumps.py --epochs 10
    python examples/ppo_with_jumps.py --predictor first-again-v1
    python examples/ppo_with_jumps.py --predictor storage/demo

A predictor is one that comes with the package, by its name, or a model trained with `--preset causal`, by its storage.
With one, each iteration runs four update epochs, records the policy after the second and the fourth, and then jumps:
with `first-again-v1` by the first two epochs' displacement once more, with a trained model to where the tenth epoch
would have led. Each takes a minute or two on one core.
"""

import argparse
import time
import warnings
from functools import partial

import gymnasium
import numpy as np
import torch
from torch import nn

from tipl_ray.accelerate.jumps import ModuleJumps  # J
from tipl_ray.errors import UserError  # J

GAMMA, GAE_LAMBDA, CLIP, NUM_MINIBATCHES = 0.99, 0.95, 0.2, 32
EPOCHS_PER_RECORD = 2  # J
SECONDS_PER_LINE = 5.0


class Policy(nn.Module):
    """A Gaussian policy: what jumps."""

    def __init__(self, observation_size: int, action_size: int):
        super().__init__()
        self.mean = network(observation_size, action_size, 0.01)
        self.log_std = nn.Parameter(torch.zeros(action_size))

    def forward(self, observations: torch.Tensor) -> torch.distributions.Normal:
        """Distribution of actions."""
        return torch.distributions.Normal(self.mean(observations), self.log_std.exp())


def network(inputs: int, outputs: int, head_gain: float) -> nn.Sequential:
    """Two hidden layers of 64, orthogonal weights."""
    layers = [nn.Linear(inputs, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, outputs)]
    for layer, gain in zip(layers[::2], (2**0.5, 2**0.5, head_gain), strict=True):
        assert isinstance(layer, nn.Linear)
        nn.init.orthogonal_(layer.weight, gain)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


def divergence(  # J
    policy: Policy, observations: torch.Tensor, actions: torch.Tensor, log_probabilities: torch.Tensor
) -> float:
    """Approximate KL divergence of a policy from the one that collected a rollout."""
    with torch.no_grad():
        log_ratios = policy(observations).log_prob(actions).sum(1) - log_probabilities
    return float((log_ratios.expm1() - log_ratios).mean())


def main() -> None:
    """Train one policy and print its mean return now and then."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="InvertedPendulum-v4", help="gymnasium id (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=4, help="update epochs run per iteration (default: %(default)s)")
    parser.add_argument("--predictor", help="first-again-v1, or a storage with one model (default: no jumps)")
    parser.add_argument("--iterations", type=int, default=50, help="rollouts, each with updates (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=2048, help="environment steps a rollout (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=3e-4, help="Adam's first, annealed to 0 (default: 3e-4)")
    parser.add_argument("--goal", type=float, default=np.inf, help="stop at this mean return of the last 20 episodes")
    parser.add_argument("--seed", type=int, default=1, help="of networks, noise and task (default: %(default)s)")
    settings = parser.parse_args()
    for option, least in (("epochs", 1), ("iterations", 1), ("steps", 2 * NUM_MINIBATCHES)):
        if (given := getattr(settings, option)) < least:
            parser.error(f"--{option} {given} is below {least}")
    if settings.steps % NUM_MINIBATCHES:
        parser.error(f"--steps {settings.steps} is not a multiple of the {NUM_MINIBATCHES} minibatches")
    if settings.predictor and settings.epochs % EPOCHS_PER_RECORD:  # J
        why = "with a predictor, the policy is recorded after every second update epoch"  # J
        parser.error(f"--epochs {settings.epochs} is not a multiple of {EPOCHS_PER_RECORD}: {why}")  # J

    torch.set_num_threads(1)  # networks this small are four times slower on two
    torch.manual_seed(settings.seed)
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # v4, the paper's, has a successor
        try:
            environment: gymnasium.Env = gymnasium.make(settings.task)
        except gymnasium.error.Error as refusal:
            parser.error(f"--task {settings.task}: {refusal}")
    if not isinstance(environment.action_space, gymnasium.spaces.Box):
        parser.error(f"--task {settings.task}: its actions are not continuous, which this example needs")
    environment = gymnasium.wrappers.RecordEpisodeStatistics(environment)
    environment = gymnasium.wrappers.NormalizeObservation(gymnasium.wrappers.ClipAction(environment))
    environment = gymnasium.wrappers.NormalizeReward(environment, gamma=GAMMA)
    sizes = [int(np.prod(space.shape or ())) for space in (environment.observation_space, environment.action_space)]
    policy, critic = Policy(*sizes), network(sizes[0], 1, 1.0)
    parameters = [*policy.parameters(), *critic.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=settings.learning_rate, eps=1e-5)
    jumps = None  # J
    if settings.predictor:  # J
        try:  # J
            recorded = settings.epochs // EPOCHS_PER_RECORD  # J
            jumps = ModuleJumps.from_pretrained(policy, settings.predictor, recorded=recorded)  # J
        except (UserError, ValueError) as refusal:  # J
            parser.error(f"--predictor {settings.predictor} --epochs {settings.epochs}: {refusal}")  # J

    begin = said = time.monotonic()
    observation = environment.reset(seed=settings.seed)[0]
    steps, returns = settings.steps, [float("nan")]
    for iteration in range(settings.iterations):
        optimizer.param_groups[0]["lr"] = settings.learning_rate * (1 - iteration / settings.iterations)

        observations, actions = torch.zeros(steps + 1, sizes[0]), torch.zeros(steps, sizes[1])
        rewards, going_on = torch.zeros(steps), torch.zeros(steps)
        for step in range(steps):
            observations[step] = torch.as_tensor(observation, dtype=torch.float32).clamp(-10, 10)
            with torch.no_grad():
                actions[step] = policy(observations[step]).sample()
            observation, reward, terminated, truncated, info = environment.step(actions[step].numpy())
            rewards[step], going_on[step] = min(max(float(reward), -10.0), 10.0), float(not (terminated or truncated))
            if terminated or truncated:
                returns.append(float(info["episode"]["r"]))
                observation = environment.reset()[0]
        observations[steps] = torch.as_tensor(observation, dtype=torch.float32).clamp(-10, 10)

        with torch.no_grad():
            values = critic(observations)[:, 0]
            log_probabilities = policy(observations[:-1]).log_prob(actions).sum(1)
            advantages, advantage = torch.zeros(steps), torch.zeros(())
            for step in reversed(range(steps)):
                error = rewards[step] + GAMMA * going_on[step] * values[step + 1] - values[step]
                advantage = error + GAMMA * GAE_LAMBDA * going_on[step] * advantage
                advantages[step] = advantage
            targets = advantages + values[:-1]

        for epoch in range(settings.epochs):
            for part in torch.randperm(steps).chunk(NUM_MINIBATCHES):
                ratio = (policy(observations[part]).log_prob(actions[part]).sum(1) - log_probabilities[part]).exp()
                scaled = (advantages[part] - advantages[part].mean()) / (advantages[part].std() + 1e-8)
                surrogate = torch.min(scaled * ratio, scaled * ratio.clamp(1 - CLIP, 1 + CLIP)).mean()
                value_error = (critic(observations[part])[:, 0] - targets[part]).square().mean()
                optimizer.zero_grad()
                (0.25 * value_error - surrogate).backward()
                nn.utils.clip_grad_norm_(parameters, 0.5)
                optimizer.step()
            if jumps and (epoch + 1) % EPOCHS_PER_RECORD == 0:  # J
                jumps.record()  # J
        if jumps:  # J
            rollout = (observations[:-1], actions, log_probabilities)  # J
            jumps.jump(iteration / settings.iterations, divergence=partial(divergence, policy, *rollout))  # J

        now, done = time.monotonic(), iteration + 1
        mean_return = np.nanmean(returns[-20:]) if len(returns) > 1 else np.nan
        if done in (1, settings.iterations) or now - said > SECONDS_PER_LINE or mean_return >= settings.goal:
            said = now
            taken = f", {done * settings.epochs * NUM_MINIBATCHES:,} gradient steps"
            taken += f", {jumps.taken} jumps taken, {jumps.refused} refused" if jumps else ""
            left = (now - begin) / done * (settings.iterations - done)
            print(f"{done * steps:,} env steps: mean return {mean_return:.1f}{taken}, {left:.0f} s left", flush=True)
        if mean_return >= settings.goal:
            break


if __name__ == "__main__":
    main()
