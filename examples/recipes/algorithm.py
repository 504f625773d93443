"""An algorithm of one's own: REINFORCE in place of PPO's update, on the same simulations and networks.

    python jobs/collect.py --collect.algorithm examples.recipes.algorithm:Reinforce --storage storage/reinforce \\
        --ppo.num-epochs 1 --collect.epochs-per-snapshot 1 --ppo.learning-rate 0.1

`TrialGroup` has the rest of what `tipl_ray.ppo.algorithms.Algorithm` asks: rollouts, seeds, states to resume from, what
is done with a trial that diverges. Of another algorithm's class nothing more is asked than that.

Shapes: K trials, S steps of a rollout, P weights of a policy.
"""

from typing import Any

import numpy as np
import torch

from tipl_ray.ppo.trials import TrialGroup


class Reinforce(TrialGroup):
    """Williams' REINFORCE (1992): one step up the gradient for each rollout, the mean return as its baseline."""

    def __init__(self, *arguments: Any, **named: Any):
        super().__init__(*arguments, **named)
        if self.ppo.num_epochs != 1:
            raise ValueError(f"ppo.num_epochs={self.ppo.num_epochs}: REINFORCE learns once from each rollout, give 1")

    def update(self, learning_rates_K: np.ndarray, epochs: int) -> None:
        """See `TrialGroup.update`."""
        rollouts, size = self.rollouts, self.shape.num_policy_weights
        returns_KS = rollouts.rewards_KS.copy()
        for step in reversed(range(self.ppo.num_steps - 1)):
            goes_on_K = 1 - rollouts.ends_KS[:, step + 1]
            returns_KS[:, step] += self.ppo.gamma * goes_on_K * returns_KS[:, step + 1]
        # One trial at a time, so that none depends on those beside it.
        for k, learning_rate in enumerate(learning_rates_K):
            weights_P = torch.tensor(self.parameters_KN[k, :size], requires_grad=True)
            weights = {
                name: weights_P[offset : offset + int(np.prod(shape))].reshape(shape)
                for name, shape, offset in self.shape.policy_layout
            }
            hidden = torch.from_numpy(rollouts.observations_KSO[k, :-1])
            for layer in ("actor.0", "actor.1"):
                hidden = torch.tanh(hidden @ weights[f"{layer}.weight"] + weights[f"{layer}.bias"])
            mean_SA = hidden @ weights["actor.2.weight"] + weights["actor.2.bias"]
            policy = torch.distributions.Normal(mean_SA, weights["log_std"].exp())
            log_probabilities_S = policy.log_prob(torch.from_numpy(rollouts.actions_KSA[k])).sum(dim=1)
            returns_S = torch.from_numpy(returns_KS[k])
            advantages_S = (returns_S - returns_S.mean()) / (returns_S.std() + 1e-8)
            (gradient_P,) = torch.autograd.grad((advantages_S * log_probabilities_S).mean(), weights_P)
            self.parameters_KN[k, :size] += learning_rate * gradient_P.numpy()
