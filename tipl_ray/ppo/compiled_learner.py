"""PPO's networks in C++: learner.cpp, built with g++ for the shapes at hand, once, into the user's cache.

K trials, S steps of a rollout, O observation values, A action values, N parameters of a trial.
"""

import ctypes
import dataclasses
import functools
import os
import shutil
import subprocess
from collections.abc import Callable
from typing import Any

import numpy as np

from tipl_ray.config import Ppo
from tipl_ray.ppo.compiler import CompilerError, shared_library
from tipl_ray.ppo.learner import Rollouts
from tipl_ray.ppo.networks import NetworkShape

LANES = 16
"""The compiled learner's vector width; minibatch sizes must be multiples of it."""


@functools.cache
def has_bfloat16() -> bool:
    """Whether this processor, for which g++ compiles, multiplies in bfloat16."""
    asked = ["g++", "-march=native", "-dM", "-E", "-x", "c++", os.devnull]
    return b"__AVX512BF16__" in subprocess.run(asked, capture_output=True, check=False).stdout


def why_not_compiled(ppo: Ppo) -> str | None:
    """Why the compiled learner is not available here; None if it is."""
    if shutil.which("g++") is None:
        return "g++ is not on the PATH"
    if ppo.minibatch_size % LANES:
        return f"the minibatch size {ppo.minibatch_size} is not a multiple of {LANES}"
    if ppo.precision == "bfloat16" and not has_bfloat16():
        return "this processor has no AVX512_BF16, which ppo.precision='bfloat16' needs"
    try:
        # What the environments build too, in a second: it tells whether the compiler works.
        shared_library("wrappers.cpp", "-ffp-contract=off")
    except CompilerError as error:
        return f"{str(error).partition('): ')[0]})"
    except OSError as error:
        return f"g++ cannot be run: {error.strerror}"
    return None


class CompiledLearner:
    """learner.cpp, compiled for the given shapes and called through ctypes, which releases the GIL.

    `precision` float64 is for tests: parameters, moments and gradients are then float64, rollouts stay float32.
    Raises CompilerError with the compiler's message if it fails.
    """

    def __init__(self, shape: NetworkShape, ppo: Ppo, precision: type = np.float32, march: str = "native"):
        self.shape, self.precision = shape, precision
        self._library = _library(shape, ppo, precision, march)
        real = ctypes.c_float if precision is np.float32 else ctypes.c_double

        class Hyperparameters(ctypes.Structure):
            _fields_ = [(f"field_{index}", real) for index in range(10)]

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
            ppo.policy_rate_ratio,
            ppo.desired_kl,
            ppo.target_kl,
        )
        address: Any = ctypes.c_void_p
        count: Any = ctypes.c_int64
        self._library.act.argtypes = [count, address, count, *[address] * 4]
        self._library.advantages.argtypes = [count, count, address, RolloutPointers, Hyperparameters]
        self._library.gradient.argtypes = [
            count,
            count,
            address,
            RolloutPointers,
            address,
            Hyperparameters,
            address,
            address,
        ]
        self._library.update.argtypes = [*[count] * 3, *[address] * 6, RolloutPointers, address, Hyperparameters]
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
        indices_B = np.ascontiguousarray(indices_B, dtype=np.int32)  # held here: a bare address keeps no array alive
        self._library.gradient(
            trial,
            rollouts.rewards_KS.shape[1],
            self._address(parameters_N),
            self._addresses(rollouts),
            indices_B.ctypes.data,
            self._hyperparameters,
            gradient_N.ctypes.data,
            None,
        )
        return gradient_N

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
        trials, epochs, steps = permutations_KES.shape
        assert permutations_KES.dtype == np.int32
        assert permutations_KES.flags.c_contiguous
        assert adam_steps_K.dtype == going_on_K.dtype == np.int64
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
            going_on_K.ctypes.data,
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


def _library(shape: NetworkShape, ppo: Ppo, precision: type, march: str) -> ctypes.CDLL:
    macros = {
        "OBSERVATION": shape.observation_size,
        "ACTION": shape.action_size,
        "POLICY_1": shape.policy_hidden[0],
        "POLICY_2": shape.policy_hidden[1],
        "CRITIC_1": shape.critic_hidden[0],
        "CRITIC_2": shape.critic_hidden[1],
        "BATCH": ppo.minibatch_size,
        "REAL": "float" if precision is np.float32 else "double",
        "RELU": int(ppo.activation == "relu"),
        "CLIP_VALUES": int(ppo.clip_values),
        "DPO": int(ppo.drift == "dpo"),
        "DISCRETE": int(shape.discrete),
        "BFLOAT16": int(ppo.precision == "bfloat16" and precision is np.float32),
    }
    options = [f"-D{name}={value}" for name, value in macros.items()]
    return ctypes.CDLL(str(shared_library("learner.cpp", *options, march=march)))
