"""Any other task of gymnasium, in gymnasium's own class: one environment per simulation, several times slower.

What an environment's next step depends on is MuJoCo's data where MuJoCo runs it. Of another it is how it came to be:
the generator at the beginning of its episode and every action since, which are taken again.

K simulations, O observation values, A action values, S values of a simulation's state.
"""

import contextlib
import math
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Self

import gymnasium
import mujoco
import mujoco.batch
import numpy as np
from gymnasium.envs.mujoco import MujocoEnv
from gymnasium.spaces import Box, Discrete

from tipl_ray.ppo.generators import WORDS, generator_state, restored_generator
from tipl_ray.ppo.simulations import Simulations, can_be_resumed


class GymnasiumSimulations(Simulations):
    """Simulations that gymnasium's own class steps, one environment each."""

    fast = False
    task: ClassVar[str]
    options: ClassVar[Mapping[str, Any]]
    environment: ClassVar[type[gymnasium.Env[Any, Any]]]
    """Without its wrappers."""
    action_space: ClassVar[Box | Discrete]

    def __init__(self, count: int, num_threads: int = 1):
        super().__init__(count, num_threads)
        self._environments = [_make(self.task, self.options) for _ in range(count)]

    def step(self, actions_KA: np.ndarray) -> None:
        """Advance every simulation by one step; the three arrays then hold what came of it."""
        for k in range(len(self._environments)):
            self._step(k, actions_KA[k])

    def _step(self, k: int, action_A: np.ndarray) -> None:
        space = self.action_space
        action: Any = (
            int(space.start + action_A.argmax())
            if isinstance(space, Discrete)
            else action_A.astype(space.dtype).reshape(space.shape)
        )
        observation, reward, terminated, truncated, _ = self._environments[k].step(action)
        self.observations_KO[k], self.rewards_K[k] = np.ravel(observation), reward
        self.terminated_K[k] = terminated or truncated

    def reset(self, k: int, generator: np.random.Generator) -> np.ndarray:
        """Begin a new episode in simulation k, which draws from the generator; its observation (O,)."""
        self.draw_from(k, generator)
        self.observations_KO[k] = np.ravel(self._environments[k].reset()[0])
        return self.observations_KO[k]

    def draw_from(self, k: int, generator: np.random.Generator) -> None:
        """Go on in the middle of simulation k's episode with another generator."""
        self._environments[k].unwrapped.np_random = generator

    def keep(self, kept: np.ndarray) -> Self:
        """A new set of simulations that goes on with the kept environments themselves, in their order."""
        fewer = type(self)(0)
        fewer._environments = [self._environments[k] for k in kept]
        fewer.observations_KO = self.observations_KO[kept]
        fewer.rewards_K, fewer.terminated_K = self.rewards_K[kept], self.terminated_K[kept]
        return fewer


class MujocoSimulations(GymnasiumSimulations):
    """MuJoCo's tasks that are not fast."""

    @property
    def state_KS(self) -> np.ndarray:
        """MuJoCo's integration state with the warm start, and all that it derived: a copy.

        Rewards of many tasks begin with derived positions, which are a substep behind the state.
        """
        return np.stack([_read_data(_mujoco(environment)) for environment in self._environments])

    @state_KS.setter
    def state_KS(self, state_KS: np.ndarray) -> None:
        for environment, state_S in zip(self._environments, state_KS, strict=True):
            _write_data(_mujoco(environment), state_S)


class ReplayedSimulations(GymnasiumSimulations):
    """Tasks of which nothing is known but how their episodes went."""

    def __init__(self, count: int, num_threads: int = 1):
        super().__init__(count, num_threads)
        self._beginnings_KW = np.zeros((count, WORDS), dtype=np.uint64)
        """The generators before the episodes' resets."""
        self._steps_K = np.zeros(count, dtype=np.uint32)
        self._actions_KTA = np.zeros((count, self.max_episode_steps, self.action_size), dtype=np.float32)

    def step(self, actions_KA: np.ndarray) -> None:
        """Advance every simulation by one step; the three arrays then hold what came of it."""
        super().step(actions_KA)
        self._actions_KTA[np.arange(len(actions_KA)), self._steps_K] = actions_KA
        self._steps_K += 1

    def reset(self, k: int, generator: np.random.Generator) -> np.ndarray:
        """Begin a new episode in simulation k, which draws from the generator; its observation (O,)."""
        self._beginnings_KW[k], self._steps_K[k], self._actions_KTA[k] = generator_state(generator), 0, 0.0
        return super().reset(k, generator)

    def keep(self, kept: np.ndarray) -> Self:
        """A new set of simulations that goes on with the kept environments themselves, in their order."""
        fewer = super().keep(kept)
        fewer._beginnings_KW, fewer._steps_K = self._beginnings_KW[kept], self._steps_K[kept]
        fewer._actions_KTA = self._actions_KTA[kept]
        return fewer

    @property
    def state_KS(self) -> np.ndarray:
        """The generator's words, the steps of the episode and its actions, as uint32: a copy."""
        actions_KTA = self._actions_KTA.reshape(len(self._steps_K), -1)
        return np.hstack([self._beginnings_KW.view(np.uint32), self._steps_K[:, None], actions_KTA.view(np.uint32)])

    @state_KS.setter
    def state_KS(self, state_KS: np.ndarray) -> None:
        before_KS = self.state_KS
        for k in map(int, np.flatnonzero((state_KS != before_KS).any(axis=1))):
            state_S = np.ascontiguousarray(state_KS[k], dtype=np.uint32)
            words_S, steps, actions_S = state_S[: 2 * WORDS], int(state_S[2 * WORDS]), state_S[2 * WORDS + 1 :]
            self.reset(k, restored_generator(words_S.view(np.uint64)))
            self._actions_KTA[k] = actions_S.view(np.float32).reshape(self._actions_KTA[k].shape)
            self._steps_K[k] = steps
            for action_A in self._actions_KTA[k, :steps]:
                self._step(k, action_A)


INTEGRATION = int(mujoco.mjtState.mjSTATE_INTEGRATION)


def _make(task: str, options: Mapping[str, Any]) -> gymnasium.Env:
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning), _without_deprecations():
        warnings.filterwarnings("ignore", ".*Using the latest versioned environment")  # such an id is refused below
        return gymnasium.make(task, max_episode_steps=-1, disable_env_checker=True, **options)


@contextlib.contextmanager
def _without_deprecations() -> Iterator[None]:
    """Suppress MuJoCo's deprecation warnings about gymnasium's files, which users cannot fix."""
    before = mujoco.get_mju_user_warning()
    mujoco.set_mju_user_warning(lambda text: None if "deprecated" in text else warnings.warn(text, stacklevel=2))
    try:
        yield
    finally:
        mujoco.set_mju_user_warning(before)


def _mujoco(environment: gymnasium.Env) -> MujocoEnv:
    assert isinstance(environment.unwrapped, MujocoEnv)
    return environment.unwrapped


def _derived(data: mujoco.MjData) -> list[np.ndarray]:
    fields = (getattr(data, name) for name in sorted(mujoco.batch.DATA_FIELDS))
    return [field for field in fields if isinstance(field, np.ndarray) and field.dtype == np.float64]


def _read_data(environment: MujocoEnv) -> np.ndarray:
    state = np.zeros(mujoco.mj_stateSize(environment.model, INTEGRATION))
    mujoco.mj_getState(environment.model, environment.data, state, INTEGRATION)
    return np.concatenate([state, *(field.ravel() for field in _derived(environment.data))])


def _write_data(environment: MujocoEnv, state_S: np.ndarray) -> None:
    position = mujoco.mj_stateSize(environment.model, INTEGRATION)
    mujoco.mj_setState(environment.model, environment.data, state_S[:position], INTEGRATION)
    for field in _derived(environment.data):
        field[...] = state_S[position : position + field.size].reshape(field.shape)
        position += field.size


def through_gymnasium(task: str, options: Mapping[str, Any]) -> type[GymnasiumSimulations]:
    """The simulations of a task in gymnasium's class. Raises ValueError with the reason if it cannot run."""
    environment = _make(task, options)
    spec, observations, actions = environment.spec, environment.observation_space, environment.action_space
    assert spec is not None
    if not isinstance(observations, Box):
        raise ValueError(f"its observation space {observations} is not a Box")
    if not isinstance(actions, Box | Discrete):
        raise ValueError(f"its action space {actions} is neither a Box nor Discrete")
    if isinstance(actions, Box) and not actions.is_bounded():
        raise ValueError(f"its action space {actions} has no bounds")
    if spec.id != task.rpartition(":")[2]:
        raise ValueError(f"its id has no version; the newest is {spec.id}")
    max_episode_steps = gymnasium.spec(spec.id).max_episode_steps
    if max_episode_steps is None:
        raise ValueError("its episodes have no step limit")
    if isinstance(actions, Box):
        low, high = np.ravel(actions.low), np.ravel(actions.high)
    else:
        low, high = np.zeros(actions.n, dtype=np.float32), np.ones(actions.n, dtype=np.float32)
    attributes = {
        "task": task,
        "options": options,
        "environment": type(environment.unwrapped),
        "observation_size": math.prod(observations.shape),
        "max_episode_steps": max_episode_steps,
        "discrete": isinstance(actions, Discrete),
        "action_space": actions,
        "action_size": low.size,
        "action_low": low,
        "action_high": high,
    }
    kind = MujocoSimulations if isinstance(environment.unwrapped, MujocoEnv) else ReplayedSimulations
    found: type[GymnasiumSimulations] = type(task, (kind,), attributes)
    if not can_be_resumed(found):
        known = "MuJoCo's data" if kind is MujocoSimulations else "its initial random generator and its actions"
        raise ValueError(f"its next step depends on more than {known}, so a trial could not be resumed")
    return found
