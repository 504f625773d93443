"""PPO's networks in torch: autograd over stacked networks, on the CPU or on a GPU.

K trials, S steps of a rollout, O observation values, A action values, N parameters of a trial, M minibatches.
"""

import functools
import math
from collections.abc import Callable, Iterable

import numpy as np
import torch

from tipl_ray.config import Ppo
from tipl_ray.ppo.learner import Rollouts, adapt
from tipl_ray.ppo.networks import NetworkShape


class TorchLearner:
    """Autograd over stacked networks; one batched matrix product per layer for all trials.

    On a GPU the action and the minibatch's step are CUDA graphs over tensors that stay in their place; the same code
    runs on the CPU, eagerly, over the numpy arrays' own memory. Raises ValueError for a GPU that torch does not see.
    """

    def __init__(self, shape: NetworkShape, ppo: Ppo, device: str = "cpu"):
        self.shape, self.ppo, self.device = shape, ppo, torch.device(device)
        self._places: dict[tuple, torch.Tensor] = {}
        self._graphs: dict[tuple, Callable[[], None]] = {}
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError("collect.engine='cuda' needs a GPU where the trials run, but torch finds none")

    def actor(
        self,
        parameters_KN: np.ndarray,
        owners_B: np.ndarray | None,
        observations_BO: np.ndarray,
        noise_BA: np.ndarray | None,
        actions_BA: np.ndarray,
    ) -> Callable[[], None]:
        """See Learner."""
        given = {"parameters": parameters_KN, "owners": owners_B, "observations": observations_BO, "noise": noise_BA}
        host = {name: torch.from_numpy(array) for name, array in given.items() if array is not None}
        device = {name: self._place(f"actor's {name}", tensor) for name, tensor in host.items()}
        actions = torch.from_numpy(actions_BA)
        acted = self._place("actions", actions)
        act = self._recorded(self._act, acted, *(device.get(name) for name in given))
        _fill(device.values(), host.values())
        del device["parameters"], host["parameters"]

        def call() -> None:
            _fill(device.values(), host.values())
            act()
            _fill([actions], [acted])

        return call

    def _act(
        self,
        actions: torch.Tensor,
        parameters: torch.Tensor,
        owners: torch.Tensor | None,
        observations: torch.Tensor,
        noise: torch.Tensor | None,
    ) -> None:
        with torch.no_grad():
            rows = parameters if owners is None else parameters[owners]
            mean = _stacked(self._mean, rows, observations.unsqueeze(1)).squeeze(1)
            if self.shape.discrete:
                scores = mean if noise is None else mean + noise
                actions.zero_().scatter_(1, scores.argmax(1, keepdim=True), 1.0)
            else:
                actions.copy_(mean if noise is None else mean + self._named(rows)["log_std"].exp() * noise)

    def advantages(self, parameters_KN: np.ndarray, rollouts: Rollouts) -> None:
        """See Learner."""
        arrays = (parameters_KN, rollouts.observations_KSO, rollouts.actions_KSA)
        parameters, observations, actions = (torch.from_numpy(array).to(self.device) for array in arrays)
        with torch.no_grad():
            values = _stacked(self._values, parameters, observations).cpu().numpy()
            probabilities = _stacked(self._log_probabilities, parameters, observations[:, :-1], actions)
        rollouts.values_KS[:] = values[:, :-1]
        rollouts.log_probabilities_KS[:] = probabilities.cpu().numpy()
        gamma, decay = np.float32(self.ppo.gamma), np.float32(self.ppo.gamma) * np.float32(self.ppo.gae_lambda)
        advantages_K = np.zeros(len(parameters_KN), dtype=np.float32)
        for step in reversed(range(rollouts.rewards_KS.shape[1])):
            going_on_K = 1 - rollouts.ends_KS[:, step + 1]
            delta_K = rollouts.rewards_KS[:, step] + gamma * values[:, step + 1] * going_on_K - values[:, step]
            advantages_K = delta_K + decay * going_on_K * advantages_K
            rollouts.advantages_KS[:, step] = advantages_K
        rollouts.returns_KS[:] = rollouts.advantages_KS + rollouts.values_KS

    def gradient(self, parameters: torch.Tensor, *minibatch: torch.Tensor) -> torch.Tensor:
        """Gradients (K, N) of PPO's loss on one minibatch per trial, unclipped; for the arguments see `losses`."""
        parameters = parameters.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(self.losses(parameters, *minibatch).sum(), parameters)
        return gradient

    def losses(
        self,
        parameters: torch.Tensor,
        observations: torch.Tensor,
        actions: torch.Tensor,
        log_probabilities: torch.Tensor,
        values: torch.Tensor,
        advantages: torch.Tensor,
        returns: torch.Tensor,
    ) -> torch.Tensor:
        """PPO's loss of each trial (K,) on a minibatch (K, B, ...): surrogate, value loss, entropy."""
        clip = self.ppo.clip_coefficient
        advantages = (advantages - advantages.mean(1, keepdim=True)) / (advantages.std(1, keepdim=True) + 1e-8)
        log_ratio = self._log_probabilities(parameters, observations, actions) - log_probabilities
        ratio = log_ratio.exp()
        if self.ppo.drift == "dpo":
            policy_loss = (_dpo_drift(log_ratio, advantages) - advantages * ratio).mean(1)
        else:
            policy_loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)).mean(1)
        predicted = self._values(parameters, observations)
        squares = (predicted - returns) ** 2
        if self.ppo.clip_values:
            clipped = values + (predicted - values).clamp(-clip, clip)
            squares = torch.maximum(squares, (clipped - returns) ** 2)
        value_loss = 0.5 * squares.mean(1)
        entropy = self._entropies(parameters, observations)
        return policy_loss + self.ppo.value_coefficient * value_loss - self.ppo.entropy_coefficient * entropy

    def _entropies(self, parameters: torch.Tensor, observations: torch.Tensor) -> torch.Tensor:
        """Of each policy (K,), the mean over observations; of normal actions up to a constant without gradient."""
        if not self.shape.discrete:
            return self._named(parameters)["log_std"].sum(1)
        logits = self._mean(parameters, observations).log_softmax(2)
        return -(logits.exp() * logits).sum(2).mean(1)

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
        """See Learner."""
        trials, size = len(parameters_KN), self.ppo.minibatch_size
        moved = (parameters_KN, first_moments_KN, second_moments_KN)
        host = [torch.from_numpy(array) for array in (*moved, *rollouts.samples)]
        device = [self._place(f"update {index}", tensor) for index, tensor in enumerate(host)]
        num_epochs, per_epoch = permutations_KES.shape[1], permutations_KES.shape[2] // size
        permutations_KEMB = torch.from_numpy(permutations_KES).reshape(trials, num_epochs, per_epoch, size)
        first = (permutations_KEMB[:, 0, 0].clone(), *torch.zeros(2, trials), torch.zeros(trials, dtype=torch.bool))
        current = [self._place(f"minibatch {index}", tensor) for index, tensor in enumerate(first)]
        divergences_K = self._place("divergences", torch.zeros(trials))
        step = self._recorded(self._step, divergences_K, *device, *current)
        _fill(device, host)
        for epoch in range(num_epochs):
            moving_K = going_on_K > 0
            steps_KM = adam_steps_K[:, None] + np.arange(1, per_epoch + 1)
            rates_KM = torch.from_numpy(learning_rates_K[:, None] / (1 - 0.9**steps_KM)).float()
            corrections_KM = torch.from_numpy(1 / np.sqrt(1 - 0.999**steps_KM)).float()
            every = [tensor.to(self.device) for tensor in (permutations_KEMB[:, epoch], rates_KM, corrections_KM)]
            current[3].copy_(torch.from_numpy(moving_K))
            total_K = torch.zeros_like(divergences_K)
            for minibatch in range(per_epoch):
                for tensor, values in zip(current, every, strict=False):
                    tensor.copy_(values[:, minibatch])
                step()
                total_K += divergences_K
            adam_steps_K += per_epoch * moving_K
            if self.ppo.desired_kl or self.ppo.target_kl:
                mean_K, last_K = (tensor.cpu().numpy() for tensor in (total_K / per_epoch, divergences_K))
                adapt(self.ppo, learning_rates_K, going_on_K, mean_K, last_K)
        _fill(host[:3], device[:3])

    def _step(
        self,
        divergences_K: torch.Tensor,
        parameters: torch.Tensor,
        first: torch.Tensor,
        second: torch.Tensor,
        *samples_and_current: torch.Tensor,
    ) -> None:
        """One minibatch of every trial that goes on: clipped gradient and Adam, in place."""
        *samples, indices_KB, rates_K, corrections_K, moving_K = samples_and_current
        rows_K1 = torch.arange(len(parameters), device=self.device).unsqueeze(1)
        minibatch = [values[rows_K1, indices_KB] for values in samples]
        if self.ppo.desired_kl or self.ppo.target_kl:
            divergences_K.copy_(_stacked(self._divergences, parameters, *minibatch[:3]))
        gradient = _stacked(self.gradient, parameters, *minibatch)
        norm = gradient.norm(dim=1, keepdim=True)
        gradient = gradient * (self.ppo.max_gradient_norm / (norm + 1e-6)).clamp(max=1.0)
        before = [tensor.clone() for tensor in (parameters, first, second)] if self.ppo.target_kl else []
        first.lerp_(gradient, 0.1)
        second.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
        denominator = second.sqrt() * corrections_K.unsqueeze(1) + self.ppo.adam_epsilon
        steps = rates_K.unsqueeze(1) * first / denominator
        steps[:, : self.shape.num_policy_weights] *= self.ppo.policy_rate_ratio
        parameters -= steps
        for tensor, as_before in zip((parameters, first, second), before, strict=False):
            tensor.copy_(torch.where(moving_K.unsqueeze(1), tensor, as_before))

    @torch.no_grad()
    def _divergences(
        self, parameters: torch.Tensor, observations: torch.Tensor, actions: torch.Tensor, before: torch.Tensor
    ) -> torch.Tensor:
        """Approximate KL divergence (K,) from the policies that collected: mean of (ratio - 1) - log ratio."""
        log_ratio = self._log_probabilities(parameters, observations, actions) - before
        return (log_ratio.exp() - 1 - log_ratio).mean(1)

    def _place(self, name: str, host: torch.Tensor) -> torch.Tensor:
        """Where a tensor lies on the device, the same place for a name and shape: on the CPU the tensor itself."""
        if self.device.type == "cpu":
            return host
        key = (name, host.shape)
        if key not in self._places:
            self._places[key] = torch.zeros_like(host, device=self.device)
        return self._places[key]

    def _recorded(self, function: Callable[..., None], *tensors: torch.Tensor | None) -> Callable[[], None]:
        """A call of the function on these very tensors; on a GPU recorded once, which spoils what is in them."""
        if self.device.type == "cpu":
            return functools.partial(function, *tensors)
        key = tuple(tensor if tensor is None else tensor.data_ptr() for tensor in tensors)
        if key not in self._graphs:
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):  # a few runs before the capture, as torch asks for
                for _ in range(3):
                    function(*tensors)
            torch.cuda.current_stream().wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                function(*tensors)
            self._graphs[key] = graph.replay
        return self._graphs[key]

    def _named(self, parameters: torch.Tensor) -> dict[str, torch.Tensor]:
        return {
            name: parameters[:, offset : offset + math.prod(shape)].unflatten(1, shape)
            for name, shape, offset in self.shape.layout
            if offset < parameters.shape[1]
        }

    def _network(self, name: str, parameters: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        named = self._named(parameters)
        for index in range(3):
            x = torch.baddbmm(named[f"{name}.{index}.bias"].unsqueeze(1), x, named[f"{name}.{index}.weight"])
            x = x if index == 2 else x.tanh() if self.ppo.activation == "tanh" else x.relu()
        return x

    def _mean(self, parameters: torch.Tensor, observations: torch.Tensor) -> torch.Tensor:
        return self._network("actor", parameters, observations)

    def _values(self, parameters: torch.Tensor, observations: torch.Tensor) -> torch.Tensor:
        return self._network("critic", parameters, observations).squeeze(2)

    def _log_probabilities(
        self, parameters: torch.Tensor, observations: torch.Tensor, actions: torch.Tensor
    ) -> torch.Tensor:
        if self.shape.discrete:
            return (actions * self._mean(parameters, observations).log_softmax(2)).sum(2)
        log_std = self._named(parameters)["log_std"].unsqueeze(1)
        errors = (actions - self._mean(parameters, observations)) / log_std.exp()
        return (-0.5 * errors**2 - log_std - 0.5 * math.log(2 * math.pi)).sum(2)


def _stacked(function: Callable[..., torch.Tensor], parameters: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
    """The function over stacked trials; a lone trial is doubled, for a stack of one takes other matrix products."""
    if len(parameters) > 1:
        return function(parameters, *others)
    return function(parameters.repeat(2, 1), *(torch.cat([other, other]) for other in others))[:1]


def _dpo_drift(log_ratio: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
    """Drift of Discovered Policy Optimisation (arXiv 2210.05639, Section 5), with its alpha 2 and beta 0.6."""
    gains, losses = (log_ratio.exp() - 1) * advantages, log_ratio * advantages
    return torch.where(
        advantages >= 0, (gains - 2 * (gains / 2).tanh()).relu(), (losses - 0.6 * (losses / 0.6).tanh()).relu()
    )


def _fill(targets: Iterable[torch.Tensor], sources: Iterable[torch.Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        if target.data_ptr() != source.data_ptr():
            target.copy_(source)
