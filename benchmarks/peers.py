"""The peers that benchmarks/engine.py is held against, each as its authors mean it to be run, and a processor's peak.

A peer is a function that runs one PPO iteration, or None where it is not installed (benchmarks/peers.txt).
"""

import atexit
import ctypes
import functools
import importlib.util
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

from tipl_ray.config import Experiment
from tipl_ray.ppo.compiler import CONVENTIONS

ENVPOOL_ENVIRONMENTS = 8
"""EnvPool steps environments together; an iteration's steps are divided among so many."""
BLAS_FUNCTIONS = ("sgemm", "dgemm")
"""What rltools calls of BLAS."""


def rltools(experiment: Experiment) -> Callable[[], Any] | None:
    """rltools' PPO, compiled for the shapes, with OpenBLAS; None where it or OpenBLAS is not installed.

    It steps gymnasium's environment through Python, and normalises observations but not rewards.
    """
    if not (importlib.util.find_spec("rltools") and importlib.util.find_spec("scipy_openblas32")):
        return None
    collect, ppo = experiment.collect, experiment.ppo

    def make_environment() -> gymnasium.Env:
        return gymnasium.wrappers.RescaleAction(gymnasium.make(collect.task), np.float32(-1), np.float32(1))

    libraries = str(_openblas())
    # Its search for MKL refuses a process that has torch.
    os.environ |= {"RL_TOOLS_DISABLE_MKL": "1", "OPENBLAS_NUM_THREADS": "1"}
    os.environ |= {"LIBRARY_PATH": libraries, "LD_RUN_PATH": libraries}
    import rltools as theirs

    name = f"{collect.task.partition('-')[0]}_{'_'.join(map(str, collect.policy_hidden))}_{os.getpid()}"
    for kind in ("build", "template", "blas"):
        atexit.register(shutil.rmtree, f"{theirs.CACHE_PATH}/{kind}/rltools_ppo_{name}", ignore_errors=True)
    module = theirs.PPO(
        make_environment,
        interface_name=name,
        enable_evaluation=False,
        force_blas=True,
        TOTAL_STEP_LIMIT=1_000_000_000,
        N_ENVIRONMENTS=1,
        ON_POLICY_RUNNER_STEPS_PER_ENV=ppo.num_steps,
        BATCH_SIZE=ppo.minibatch_size,
        N_EPOCHS=ppo.num_epochs,
        GAMMA=ppo.gamma,
        LAMBDA=ppo.gae_lambda,
        EPSILON_CLIP=ppo.clip_coefficient,
        ACTION_ENTROPY_COEFFICIENT=ppo.entropy_coefficient,
        NORMALIZE_OBSERVATIONS=True,
        OPTIMIZER_ALPHA=ppo.learning_rate,
        ACTOR_HIDDEN_DIM=collect.policy_hidden[0],
        ACTOR_ACTIVATION_FUNCTION=ppo.activation.upper(),
        CRITIC_HIDDEN_DIM=collect.critic_hidden[0],
        CRITIC_ACTIVATION_FUNCTION=ppo.activation.upper(),
    )
    return module.State(1).step


@functools.cache
def _openblas() -> Path:
    """A folder with `libblas.so`, which is scipy's build of OpenBLAS under the names that everybody knows."""
    import scipy_openblas32

    folder, library = Path(tempfile.mkdtemp(prefix="blas-")), Path(scipy_openblas32.get_lib_dir())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    taken = "int o, int s, int t, int m, int n, int k, {0} a, {0} *A, int p, {0} *B, int q, {0} b, {0} *C, int r"
    given = "o, s, t, m, n, k, a, A, p, B, q, b, C, r"
    source = "".join(
        f"void scipy_cblas_{name}({taken.format(kind)});\n"
        f"void cblas_{name}({taken.format(kind)}) {{ scipy_cblas_{name}({given}); }}\n"
        for name, kind in zip(BLAS_FUNCTIONS, ("float", "double"), strict=True)
    )
    (folder / "blas.c").write_text(source)
    command = ["gcc", "-O2", "-shared", "-fPIC", "blas.c", "-o", "libblas.so", f"-L{library}", f"-Wl,-rpath,{library}"]
    subprocess.run([*command, f"-l{scipy_openblas32.get_library()}"], cwd=folder, check=True)
    return folder


def envpool(experiment: Experiment) -> Any | None:
    """EnvPool's environments of a task as a vector environment of stable-baselines3; None where it is not installed."""
    if not importlib.util.find_spec("envpool"):
        return None
    import envpool as theirs
    from stable_baselines3.common.vec_env import VecEnv

    class Pool(VecEnv):
        """As EnvPool's own example for stable-baselines3 does it; there is nothing in it of one environment alone."""

        def __init__(self) -> None:
            self._pool = theirs.make_gymnasium(experiment.collect.task, num_envs=ENVPOOL_ENVIRONMENTS, seed=1)
            self._everyone, self._actions = np.arange(ENVPOOL_ENVIRONMENTS), np.zeros(0)
            super().__init__(ENVPOOL_ENVIRONMENTS, self._pool.observation_space, self._pool.action_space)

        def reset(self) -> Any:
            return self._pool.reset()[0]

        def step_async(self, actions: np.ndarray) -> None:
            self._actions = actions

        def step_wait(self) -> Any:
            observations, rewards, terminated, truncated, _ = self._pool.step(self._actions)
            ended = terminated | truncated
            infos: list[dict[str, Any]] = [{} for _ in self._everyone]
            for index in np.flatnonzero(ended):
                infos[index] = {"terminal_observation": observations[index], "TimeLimit.truncated": truncated[index]}
            if ended.any():
                # EnvPool itself would do so at the next step, whose action is lost.
                observations[ended] = self._pool.reset(self._everyone[ended])[0]
            return observations, rewards, ended, infos

        def close(self) -> None:
            self._pool.close()

        def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
            return [None] * ENVPOOL_ENVIRONMENTS

        def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
            raise NotImplementedError

        def env_method(self, method_name: str, *arguments: Any, indices: Any = None, **named: Any) -> list[Any]:
            raise NotImplementedError

        def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
            return [False] * ENVPOOL_ENVIRONMENTS

    return Pool()


@functools.cache
def _peak_library() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder, "peak.so")
        source = Path(__file__).with_name("peak.cpp")
        subprocess.run(["g++", *CONVENTIONS, "-march=native", source, "-o", built], check=True)
        library = ctypes.CDLL(str(built))
    library.multiply_add.argtypes = [ctypes.c_long, ctypes.c_float, ctypes.c_float]
    library.multiply_add.restype = ctypes.c_float
    library.operations_of_a_round.restype = ctypes.c_long
    return library


def multiply_adds(rounds: int) -> int:
    """Run the processor's fused multiply-adds as fast as they can be; how many operations that were, two for each."""
    library = _peak_library()
    library.multiply_add(rounds, 0.999, 0.001)
    return rounds * library.operations_of_a_round()
