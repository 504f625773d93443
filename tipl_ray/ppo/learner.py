"""What a learner does with the networks of many stacked trials: act, advantages, update.

K trials, S steps of a rollout, O observation values, A action values, N parameters of a trial. All learners compute the
same thing from the same numpy arrays and change them in place; their bits differ, so a data set is made by one of them.
They know nothing of environments, random numbers or snapshots.
"""

import dataclasses
from collections.abc import Callable
from typing import Protocol

import numpy as np

from tipl_ray.config import Ppo
from tipl_ray.ppo.networks import NetworkShape


@dataclasses.dataclass(frozen=True, slots=True)
class Rollouts:
    """What K trials saw and did in one iteration, float32."""

    observations_KSO: np.ndarray
    """(K, S + 1, O): the last is the one after the last step."""
    actions_KSA: np.ndarray
    rewards_KS: np.ndarray
    ends_KS: np.ndarray
    """(K, S + 1): 1 where the observation of that step begins an episode."""
    log_probabilities_KS: np.ndarray
    values_KS: np.ndarray
    advantages_KS: np.ndarray
    returns_KS: np.ndarray

    @property
    def samples(self) -> tuple[np.ndarray, ...]:
        """What a minibatch takes of them, by sample: observations, actions, log-probabilities, values, advantages and
        returns."""
        own = (self.observations_KSO[:, :-1], self.actions_KSA, self.log_probabilities_KS)
        return (*own, self.values_KS, self.advantages_KS, self.returns_KS)

    @classmethod
    def empty(cls, trials: int, steps: int, shape: NetworkShape) -> "Rollouts":
        """Room for K trials of S steps."""
        sizes: list[tuple[int, ...]] = [(steps + 1, shape.observation_size), (steps, shape.action_size), (steps,)]
        sizes += [(steps + 1,)] + [(steps,)] * 4
        return cls(*(np.zeros((trials, *size), dtype=np.float32) for size in sizes))


class Learner(Protocol):
    """The networks of K stacked trials; `parameters_KN` is one row per trial."""

    def actor(
        self,
        parameters_KN: np.ndarray,
        owners_B: np.ndarray | None,
        observations_BO: np.ndarray,
        noise_BA: np.ndarray | None,
        actions_BA: np.ndarray,
    ) -> Callable[[], None]:
        """A call that writes mean + std * noise (no noise: the mean) of row b's observation under policy owners_B[b],
        or without owners policy b. A discrete action is 1 where logit + noise is largest, and 0 elsewhere.

        It takes the parameters as they are now, and reads and writes the other arrays each time. Rows of parameters may
        end after the policy's P weights.
        """

    def advantages(self, parameters_KN: np.ndarray, rollouts: Rollouts) -> None:
        """Write log-probabilities, values, generalised advantages and returns of the rollouts."""

    def update(
        self,
        parameters_KN: np.ndarray,
        first_moments_KN: np.ndarray,
        second_moments_KN: np.ndarray,
        adam_steps_K: np.ndarray,
        learning_rates_K: np.ndarray,
        going_on_K: np.ndarray,
        rollouts: Rollouts,
        permutations_KES: np.ndarray,
    ) -> None:
        """E update epochs of every trial, in place; epoch e of trial k draws its minibatches by permutation (k, e).

        A trial whose `going_on_K`, int64, is 0 is left alone; it is set to 0 where `ppo.target_kl` ends the epochs.
        With `ppo.desired_kl` the learning rates, float64, are adapted.
        """


FASTER, LEAST_RATE, MOST_RATE = 1.5, 1e-6, 1e-2
"""Of rl_games' adaptive scheduler (rl_games/common/schedulers.py, AdaptiveScheduler)."""


def adapt(
    ppo: Ppo, learning_rates_K: np.ndarray, going_on_K: np.ndarray, means_K: np.ndarray, lasts_K: np.ndarray
) -> None:
    """After an epoch, in place: what its minibatches' mean and last approximate KL divergences make of each trial."""
    going_on = going_on_K > 0
    if ppo.desired_kl:
        slower, faster = going_on & (means_K > 2 * ppo.desired_kl), going_on & (means_K < 0.5 * ppo.desired_kl)
        learning_rates_K[slower] = np.maximum(learning_rates_K[slower] / FASTER, LEAST_RATE)
        learning_rates_K[faster] = np.minimum(learning_rates_K[faster] * FASTER, MOST_RATE)
    if ppo.target_kl:
        going_on_K[going_on & (lasts_K > ppo.target_kl)] = 0
