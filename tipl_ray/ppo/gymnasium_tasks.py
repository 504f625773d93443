"""Any other MuJoCo task of gymnasium, in gymnasium's own class: one environment per simulation, several times slower.

K simulations, O observation values, A action values, S values of a simulation's state.
"""

import warnings
from typing import ClassVar

import gymnasium
import mujoco
import mujoco.batch
import numpy as np
from gymnasium.envs.mujoco import MujocoEnv

from tipl_ray.ppo.simulations import Simulations, can_be_resumed


class GymnasiumSimulations(Simulations):
    """Simulations that gymnasium's own class steps, one environment each, for the MuJoCo tasks that are not fast."""

    fast = False
    task: ClassVar[str]

    def __init__(self, count: int, num_threads: int = 1):
        super().__init__(count, num_threads)
        self._environments = [_make(self.task) for _ in range(count)]

    def step(self, actions_KA: np.ndarray) -> None:
        """Advance every simulation by one step; the three arrays then hold what came of it."""
        for k, environment in enumerate(self._environments):
            observation_O, reward, terminated, truncated, _ = environment.step(actions_KA[k].copy())
            self.observations_KO[k], self.rewards_K[k] = observation_O, reward
            self.terminated_K[k] = terminated or truncated

    def reset(self, k: int, generator: np.random.Generator) -> np.ndarray:
        """Begin a new episode in simulation k, which draws from the generator; its observation (O,)."""
        self._environments[k].unwrapped.np_random = generator
        self.observations_KO[k], _ = self._environments[k].reset()
        return self.observations_KO[k]

    def keep(self, kept: np.ndarray) -> "GymnasiumSimulations":
        """A new set of simulations that goes on with the kept environments themselves, in their order."""
        fewer = type(self)(0)
        fewer._environments = [self._environments[k] for k in kept]
        fewer.observations_KO = self.observations_KO[kept]
        fewer.rewards_K, fewer.terminated_K = self.rewards_K[kept], self.terminated_K[kept]
        return fewer

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


INTEGRATION = int(mujoco.mjtState.mjSTATE_INTEGRATION)


def _make(task: str) -> gymnasium.Env:
    with warnings.catch_warnings(action="ignore"):  # of newer versions, and of what gymnasium's files deprecate
        return gymnasium.make(task, max_episode_steps=-1, disable_env_checker=True)


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


def through_gymnasium(task: str) -> type[GymnasiumSimulations]:
    """A task that runs through gymnasium. Raises ValueError with the reason why it cannot."""
    environment = _make(task)
    spec, observations, actions = environment.spec, environment.observation_space, environment.action_space
    assert spec is not None
    for name, space in (("observation", observations), ("action", actions)):
        if not isinstance(space, gymnasium.spaces.Box) or len(space.shape) != 1:
            raise ValueError(f"its {name} space is {space}")
    assert isinstance(observations, gymnasium.spaces.Box)
    assert isinstance(actions, gymnasium.spaces.Box)
    if not actions.is_bounded():
        raise ValueError(f"its action space {actions} has no bounds")
    if not isinstance(environment.unwrapped, MujocoEnv):
        raise ValueError("MuJoCo does not run it, so that its state could not be saved nor a trial be resumed")
    if spec.id != task.rpartition(":")[2]:
        raise ValueError(f"it names no version; the newest is {spec.id}")
    max_episode_steps = gymnasium.spec(spec.id).max_episode_steps
    if max_episode_steps is None:
        raise ValueError("its episodes have no limit of steps")
    attributes = {
        "task": task,
        "observation_size": observations.shape[0],
        "max_episode_steps": max_episode_steps,
        "action_size": actions.shape[0],
        "action_low": actions.low,
        "action_high": actions.high,
    }
    found: type[GymnasiumSimulations] = type(task, (GymnasiumSimulations,), attributes)
    if not can_be_resumed(found):
        raise ValueError("its next step depends on more than MuJoCo's data, so that a trial could not be resumed")
    return found
