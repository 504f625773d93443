"""PPO's networks of K stacked trials: act, advantages, update; compiled C++ or torch, behind one interface.

K trials, S steps of a rollout, O observation values, A action values, N parameters of a trial. Both learners compute
the same thing from the same numpy arrays and change them in place; their bits differ, so a data set is made by one of
them. `CompiledLearner` builds learner.cpp with g++ for the shapes at hand, once, into the user's cache; `TorchLearner`
is autograd over stacked networks, on the CPU or on a GPU. Neither knows of environments, random numbers or snapshots.
"""

import ctypes
import dataclasses
import functools
import math
import shutil
from collections.abc import Callable, Iterable
from typing import Any, Literal, Protocol

import numpy as np
import torch

from tipl_ray.config import Ppo
from tipl_ray.ppo.compiler import CompilerError, shared_library
from tipl_ray.ppo.networks import NetworkShape

ENGINES = {"compiled": "compiled-1", "torch": "torch-1", "cuda": "cuda-1"}
"""Name and version of each learner; a change of its bits counts the version up, for it is part of the data's hash."""
LANES = 16
"""The compiled learner's vector width, whose multiples its minibatches must be."""


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
        or without owners policy b.

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
        rollouts: Rollouts,
        permutations_KES: np.ndarray,
    ) -> None:
        """E update epochs of every trial, in place; epoch e of trial k draws its minibatches by permutation (k, e)."""


def choose_engine(engine: str, ppo: Ppo) -> Literal["compiled", "torch", "cuda"]:
    """The learner that a configuration means. Raises ValueError where `compiled` cannot be had."""
    reason = None if engine in ("cuda", "torch") else why_not_compiled(ppo)
    if engine == "compiled" and reason:
        raise ValueError(f"collect.engine='compiled' cannot be had: {reason}; 'torch' runs without")
    if engine == "cuda":
        return "cuda"
    if engine == "torch" or reason:
        return "torch"
    return "compiled"


def why_not_compiled(ppo: Ppo) -> str | None:
    """Why the compiled learner cannot be had here; None where it can."""
    if shutil.which("g++") is None:
        return "there is no g++ on the PATH"
    if ppo.minibatch_size % LANES:
        return f"the minibatch size {ppo.minibatch_size} is not a multiple of {LANES}"
    try:
        # What the environments build too, in a second: it tells whether the compiler works.
        shared_library("wrappers.cpp", "-ffp-contract=off")
    except CompilerError as error:
        return f"{str(error).partition('): ')[0]})"
    except OSError as error:
        return f"g++ cannot be run: {error.strerror}"
    return None


def make_learner(engine: str, shape: NetworkShape, ppo: Ppo) -> Learner:
    """The learner named `compiled`, `torch` or `cuda`, for these shapes."""
    if engine == "compiled":
        return CompiledLearner(shape, ppo)
    return TorchLearner(shape, ppo, "cuda" if engine == "cuda" else "cpu")


class CompiledLearner:
    """learner.cpp, compiled for the shapes at hand and called through ctypes, which lets other threads run meanwhile.

    `precision` float64 is for tests: parameters, moments and gradients are then float64, rollouts stay float32.
    Raises CompilerError with the compiler's words if it fails.
    """

    def __init__(self, shape: NetworkShape, ppo: Ppo, precision: type = np.float32, march: str = "native"):
        self.shape, self.precision = shape, precision
        self._library = _library(shape, ppo.minibatch_size, precision, march)
        real = ctypes.c_float if precision is np.float32 else ctypes.c_double

        class Hyperparameters(ctypes.Structure):
            _fields_ = [(f"field_{index}", real) for index in range(7)]

        class RolloutPointers(ctypes.Structure):
            _fields_ = [(field.name, ctypes.c_void_p) for field in dataclasses.fields(Rollouts)]

        self._pointers = RolloutPointers
        self._hyperparameters = Hyperparameters(
            ppo.clip_coefficient,
            ppo.entropy_coefficient,
            ppo.value_coefficient,
            ppo.max_gradient_norm,
            ppo.adam_epsilon,
            ppo.gamma,
            ppo.gae_lambda,
        )
        address: Any = ctypes.c_void_p
        count: Any = ctypes.c_int64
        self._library.act.argtypes = [count, address, count, *[address] * 4]
        self._library.advantages.argtypes = [count, count, address, RolloutPointers, Hyperparameters]
        self._library.gradient.argtypes = [count, count, address, RolloutPointers, address, Hyperparameters, address]
        self._library.update.argtypes = [*[count] * 3, *[address] * 5, RolloutPointers, address, Hyperparameters]
        self._library.num_parameters.restype = count
        assert self._library.num_parameters() == shape.num_parameters

    def actor(
        self,
        parameters_KN: np.ndarray,
        owners_B: np.ndarray | None,
        observations_BO: np.ndarray,
        noise_BA: np.ndarray | None,
        actions_BA: np.ndarray,
    ) -> Callable[[], None]:
        """See Learner."""
        arrays = (owners_B, observations_BO, noise_BA, actions_BA)
        assert all(array is None or array.flags.c_contiguous for array in (parameters_KN, *arrays))
        # Such a pointer keeps its array alive.
        pointers = [None if array is None else array.ctypes.data_as(ctypes.c_void_p) for array in arrays]
        parameters = parameters_KN.ctypes.data_as(ctypes.c_void_p)
        return functools.partial(self._library.act, len(actions_BA), parameters, parameters_KN.shape[1], *pointers)

    def advantages(self, parameters_KN: np.ndarray, rollouts: Rollouts) -> None:
        """See Learner."""
        trials, steps = rollouts.rewards_KS.shape
        self._library.advantages(
            trials, steps, self._address(parameters_KN), self._addresses(rollouts), self._hyperparameters
        )

    def gradient(self, parameters_N: np.ndarray, rollouts: Rollouts, trial: int, indices_B: np.ndarray) -> np.ndarray:
        """Gradient (N,) of PPO's loss on one minibatch of a trial, unclipped."""
        gradient_N: np.ndarray = np.zeros(self.shape.num_parameters, dtype=self.precision)
        self._library.gradient(
            trial,
            rollouts.rewards_KS.shape[1],
            self._address(parameters_N),
            self._addresses(rollouts),
            np.ascontiguousarray(indices_B, dtype=np.int32).ctypes.data,
            self._hyperparameters,
            gradient_N.ctypes.data,
        )
        return gradient_N

    def update(
        self,
        parameters_KN: np.ndarray,
        first_moments_KN: np.ndarray,
        second_moments_KN: np.ndarray,
        adam_steps_K: np.ndarray,
        learning_rates_K: np.ndarray,
        rollouts: Rollouts,
        permutations_KES: np.ndarray,
    ) -> None:
        """See Learner."""
        trials, epochs, steps = permutations_KES.shape
        assert permutations_KES.dtype == np.int32
        assert permutations_KES.flags.c_contiguous
        assert adam_steps_K.dtype == np.int64
        assert learning_rates_K.dtype == np.float64
        self._library.update(
            trials,
            steps,
            epochs,
            self._address(parameters_KN),
            self._address(first_moments_KN),
            self._address(second_moments_KN),
            adam_steps_K.ctypes.data,
            learning_rates_K.ctypes.data,
            self._addresses(rollouts),
            permutations_KES.ctypes.data,
            self._hyperparameters,
        )

    def _address(self, array: np.ndarray) -> int:
        assert array.dtype == self.precision
        assert array.flags.c_contiguous
        assert array.shape[-1] == self.shape.num_parameters
        return array.ctypes.data

    def _addresses(self, rollouts: Rollouts) -> ctypes.Structure:
        arrays = [getattr(rollouts, field.name) for field in dataclasses.fields(Rollouts)]
        assert all(array.dtype == np.float32 and array.flags.c_contiguous for array in arrays)
        return self._pointers(*(array.ctypes.data for array in arrays))


def _library(shape: NetworkShape, minibatch_size: int, precision: type, march: str) -> ctypes.CDLL:
    macros = {
        "OBSERVATION": shape.observation_size,
        "ACTION": shape.action_size,
        "POLICY_1": shape.policy_hidden[0],
        "POLICY_2": shape.policy_hidden[1],
        "CRITIC_1": shape.critic_hidden[0],
        "CRITIC_2": shape.critic_hidden[1],
        "BATCH": minibatch_size,
        "REAL": "float" if precision is np.float32 else "double",
    }
    options = [f"-D{name}={value}" for name, value in macros.items()]
    return ctypes.CDLL(str(shared_library("learner.cpp", *options, march=march)))


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
            raise ValueError("collect.engine='cuda' needs a GPU where the trials run, and torch sees none")

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
        """PPO's loss of each trial (K,) on a minibatch (K, B, ...): clipped surrogate, clipped value loss, entropy."""
        clip = self.ppo.clip_coefficient
        advantages = (advantages - advantages.mean(1, keepdim=True)) / (advantages.std(1, keepdim=True) + 1e-8)
        ratio = (self._log_probabilities(parameters, observations, actions) - log_probabilities).exp()
        policy_loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)).mean(1)
        predicted = self._values(parameters, observations)
        clipped = values + (predicted - values).clamp(-clip, clip)
        value_loss = 0.5 * torch.maximum((predicted - returns) ** 2, (clipped - returns) ** 2).mean(1)
        entropy = self._named(parameters)["log_std"].sum(1)  # up to a constant, which has no gradient
        return policy_loss + self.ppo.value_coefficient * value_loss - self.ppo.entropy_coefficient * entropy

    def update(
        self,
        parameters_KN: np.ndarray,
        first_moments_KN: np.ndarray,
        second_moments_KN: np.ndarray,
        adam_steps_K: np.ndarray,
        learning_rates_K: np.ndarray,
        rollouts: Rollouts,
        permutations_KES: np.ndarray,
    ) -> None:
        """See Learner."""
        trials, size = len(parameters_KN), self.ppo.minibatch_size
        samples = (
            rollouts.observations_KSO,
            rollouts.actions_KSA,
            rollouts.log_probabilities_KS,
            rollouts.values_KS,
            rollouts.advantages_KS,
            rollouts.returns_KS,
        )
        host = [torch.from_numpy(array) for array in (parameters_KN, first_moments_KN, second_moments_KN, *samples)]
        device = [self._place(f"update {index}", tensor) for index, tensor in enumerate(host)]
        num_minibatches = permutations_KES[0].size // size
        permutations_KMB = torch.from_numpy(permutations_KES).reshape(trials, num_minibatches, size)
        steps_KM = adam_steps_K[:, None] + np.arange(1, num_minibatches + 1)
        rates_KM = torch.from_numpy(learning_rates_K[:, None] / (1 - 0.9**steps_KM)).float()
        corrections_KM = torch.from_numpy(1 / np.sqrt(1 - 0.999**steps_KM)).float()
        every = [tensor.to(self.device) for tensor in (permutations_KMB, rates_KM, corrections_KM)]
        current = [self._place(f"minibatch {index}", tensor[:, 0].clone()) for index, tensor in enumerate(every)]
        step = self._recorded(self._step, *device, *current)
        _fill(device, host)
        for minibatch in range(num_minibatches):
            for tensor, values in zip(current, every, strict=True):
                tensor.copy_(values[:, minibatch])
            step()
        _fill(host[:3], device[:3])
        adam_steps_K += num_minibatches

    def _step(
        self,
        parameters: torch.Tensor,
        first: torch.Tensor,
        second: torch.Tensor,
        *samples_and_current: torch.Tensor,
    ) -> None:
        """One minibatch of every trial: clipped gradient and Adam, in place."""
        *samples, indices_KB, rates_K, corrections_K = samples_and_current
        rows_K1 = torch.arange(len(parameters), device=self.device).unsqueeze(1)
        minibatch = [values[rows_K1, indices_KB] for values in samples]
        gradient = _stacked(self.gradient, parameters, *minibatch)
        norm = gradient.norm(dim=1, keepdim=True)
        gradient = gradient * (self.ppo.max_gradient_norm / (norm + 1e-6)).clamp(max=1.0)
        first.lerp_(gradient, 0.1)
        second.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
        denominator = second.sqrt() * corrections_K.unsqueeze(1) + self.ppo.adam_epsilon
        parameters -= rates_K.unsqueeze(1) * first / denominator

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
            x = x if index == 2 else x.tanh()
        return x

    def _mean(self, parameters: torch.Tensor, observations: torch.Tensor) -> torch.Tensor:
        return self._network("actor", parameters, observations)

    def _values(self, parameters: torch.Tensor, observations: torch.Tensor) -> torch.Tensor:
        return self._network("critic", parameters, observations).squeeze(2)

    def _log_probabilities(
        self, parameters: torch.Tensor, observations: torch.Tensor, actions: torch.Tensor
    ) -> torch.Tensor:
        log_std = self._named(parameters)["log_std"].unsqueeze(1)
        errors = (actions - self._mean(parameters, observations)) / log_std.exp()
        return (-0.5 * errors**2 - log_std - 0.5 * math.log(2 * math.pi)).sum(2)


def _stacked(function: Callable[..., torch.Tensor], parameters: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
    """The function over stacked trials; a lone trial is doubled, for a stack of one takes other matrix products."""
    if len(parameters) > 1:
        return function(parameters, *others)
    return function(parameters.repeat(2, 1), *(torch.cat([other, other]) for other in others))[:1]


def _fill(targets: Iterable[torch.Tensor], sources: Iterable[torch.Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        if target.data_ptr() != source.data_ptr():
            target.copy_(source)
