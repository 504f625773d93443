"""Jumps for stable-baselines3's PPO: a callback for `learn`.

Needs stable-baselines3, an optional dependency: `pip install tipl_ray[stable-baselines3]`.
"""

import fnmatch
from typing import Any

import numpy as np
import torch

from tipl_ray.accelerate.jumps import ModuleJumps
from tipl_ray.predict.saved import load_predictor
from tipl_ray.record.stable_baselines import UpdateEpochs, acting_part, epochs_per_iteration

# isort: split
# After the one before, which says in one line where it is missing.
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback

EPOCHS_PER_SNAPSHOT = 2
"""Update epochs between two snapshots in the data of the package's predictors."""


class JumpPolicy(BaseCallback):
    """Jumps of a PPO model's policy at the end of each update: `model.learn(100_000, callback=JumpPolicy())`.

    Give the model fewer update epochs, such as `n_epochs=4`; the jump replaces the others. The critic, the optimizer
    and the environments are not changed. A jump beyond the predictor's limit on the approximate KL divergence on the
    rollout is shortened. After `learn`, `jumps.taken` and `jumps.refused` count the jumps. A training that continues
    from a saved model starts with an empty history.
    """

    def __init__(self, predictor: str = "first-again-v1", *, epochs_per_snapshot: int = EPOCHS_PER_SNAPSHOT):
        """`predictor` is the name of one that comes with the package, or a folder with another. Raises ValueError where
        there is none, and for epochs that are no whole number from 1 on."""
        super().__init__()
        if isinstance(epochs_per_snapshot, bool) or not isinstance(epochs_per_snapshot, int) or epochs_per_snapshot < 1:
            raise ValueError(f"epochs_per_snapshot={epochs_per_snapshot!r} is not a whole number from 1 on")
        load_predictor(predictor)
        self._predictor, self._every = predictor, epochs_per_snapshot
        self._counted: UpdateEpochs | None = None
        self.jumps: ModuleJumps | None = None

    def _on_training_start(self) -> None:
        """Start the history. Raises ValueError if the model is not PPO with a fixed number of update epochs, a
        multiple of `epochs_per_snapshot`."""
        recorded = epochs_per_iteration(self.model, self._every)
        policy, critic = acting_part(self.model)
        acting = [
            parameter
            for name, parameter in policy.named_parameters()
            if not any(fnmatch.fnmatch(name, pattern) for pattern in critic)
        ]
        self.jumps = ModuleJumps.from_pretrained(torch.nn.ParameterList(acting), self._predictor, recorded=recorded)
        self._counted = UpdateEpochs(self.model, self._every, self._after_epochs)

    def _on_rollout_end(self) -> None:
        assert self._counted, "training has started"
        self._counted.begin()

    def _on_step(self) -> bool:
        return True

    def _on_training_end(self) -> None:
        if self._counted:
            self._counted.stop()

    def _after_epochs(self, epoch: int) -> None:
        model: Any = self.model
        jumps = self.jumps
        assert jumps, "training has started"
        jumps.record()
        if epoch == model.n_epochs:
            rate = model.policy.optimizer.param_groups[0]["lr"]
            rate = rate / (model.lr_schedule(1.0) or rate or 1.0)  # a schedule that warms up begins at 0
            progress = min(1.0, model.num_timesteps / model._total_timesteps)
            jumps.jump(progress, learning_rate=rate, divergence=self._divergence)

    @torch.no_grad()
    def _divergence(self) -> float:
        """Approximate KL divergence of the current policy from the one that collected the rollout, on that rollout."""
        model: Any = self.model
        buffer, policy = model.rollout_buffer, model.policy
        actions = torch.as_tensor(buffer.actions, device=model.device)
        if isinstance(model.action_space, spaces.Discrete):
            actions = actions.long().flatten()
        seen = buffer.observations
        if isinstance(seen, dict):
            observations: Any = {name: torch.as_tensor(part, device=model.device) for name, part in seen.items()}
        else:
            observations = torch.as_tensor(seen, device=model.device)
        _, log_probabilities, _ = policy.evaluate_actions(observations, actions)
        ratios = log_probabilities.cpu().double().numpy() - buffer.log_probs.reshape(-1)
        return float(np.mean(np.expm1(ratios) - ratios))
