"""The tasks: many MuJoCo simulations of one of them, stepped together.

K simulations, O observation values, A action values, S values of a simulation's state. Each fast task's class is bit
for bit gymnasium's of the same id with its default arguments: observation, reward, termination and reset noise, over
arrays of simulations, with physics in `mujoco.batch.Batch`, whose number of threads changes no bit. Other MuJoCo tasks
run through gymnasium's own class, one environment per simulation. Wrappers, episode limits and random streams are the
callers' affair.
"""

import abc
import ctypes
import functools
import warnings
from pathlib import Path
from typing import ClassVar

import gymnasium
import mujoco
import mujoco.batch
import numpy as np
from gymnasium.envs.mujoco import MujocoEnv


class Simulations(abc.ABC):
    """`count` simulations of one task: raw observations, rewards and terminations, as gymnasium's class gives them."""

    fast: ClassVar[bool]
    """Whether they are stepped together; otherwise one by one, through gymnasium."""
    observation_size: ClassVar[int]
    max_episode_steps: ClassVar[int]
    action_size: int
    action_low: np.ndarray
    action_high: np.ndarray

    def __init__(self, count: int, num_threads: int = 1):
        self.num_threads = num_threads
        self.observations_KO = np.zeros((count, self.observation_size))
        self.rewards_K = np.zeros(count)
        self.terminated_K = np.zeros(count, dtype=bool)

    @abc.abstractmethod
    def step(self, actions_KA: np.ndarray) -> None:
        """Advance every simulation by one step; the three arrays above then hold what came of it."""

    @abc.abstractmethod
    def reset(self, k: int, generator: np.random.Generator) -> np.ndarray:
        """Begin a new episode in simulation k, drawing in gymnasium's order; its observation (O,)."""

    @abc.abstractmethod
    def keep(self, kept: np.ndarray) -> "Simulations":
        """A new set of simulations that goes on with the kept ones, in their order."""

    @property
    @abc.abstractmethod
    def state_KS(self) -> np.ndarray:
        """All that the next steps depend on, a row per simulation; to be written back by assigning the whole array."""

    @state_KS.setter
    @abc.abstractmethod
    def state_KS(self, state_KS: np.ndarray) -> None: ...


@functools.cache
def _model(file: str, num_userdata: int) -> mujoco.MjModel:
    spec = mujoco.MjSpec.from_file(str(Path(gymnasium.__file__).parent / "envs" / "mujoco" / "assets" / file))
    spec.nuserdata = num_userdata
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # of what gymnasium's files deprecate
        model = spec.compile()
    # Work that changes no bit: contacts of what cannot collide, and constraints sorted by island where one holds all.
    if not _can_collide(model):
        model.opt.disableflags |= mujoco.mjtDisableBit.mjDSBL_CONTACT
    if model.ntree == 1:
        model.opt.disableflags |= mujoco.mjtDisableBit.mjDSBL_ISLAND
    return model


class _Unclocked:
    """Within it MuJoCo's profiler does not read the clock, dozens of times a step: a third of the pendulum's time."""

    def __init__(self) -> None:
        for path in Path(mujoco.__file__).parent.glob("libmujoco*"):
            self._clock = ctypes.c_void_p.in_dll(ctypes.CDLL(str(path)), "mjcb_time")
            break
        else:
            self._clock = ctypes.c_void_p()  # not found: only slower

    def __enter__(self) -> None:
        self._kept, self._clock.value = self._clock.value, None

    def __exit__(self, *_: object) -> None:
        self._clock.value = self._kept


def _can_collide(model: mujoco.MjModel) -> bool:
    types, affinities = model.geom_contype, model.geom_conaffinity
    return bool(model.npair or model.nflex or np.any(types[:, None] & affinities))


class BatchSimulations(Simulations):
    """Simulations that MuJoCo steps together; a task's class writes gymnasium's formulas over arrays."""

    fast = True
    max_episode_steps = 1000
    model_file: ClassVar[str]
    frame_skip: ClassVar[int]
    reset_noise: ClassVar[float]
    """Scale of the noise on positions, which is uniform, and on velocities."""
    normal_velocities: ClassVar[bool] = False
    """Whether the noise on velocities is normal instead of uniform."""
    pays_on_termination: ClassVar[bool] = True
    """Whether the step that ends an episode earns the reward for being healthy too: so in v4, no longer in v5."""
    num_userdata: ClassVar[int] = 0
    """Values beside physics that the next step depends on; MuJoCo carries them in its state without touching them."""

    def __init__(self, count: int, num_threads: int = 1):
        super().__init__(count, num_threads)
        self.model = _model(self.model_file, self.num_userdata)
        self.batch = mujoco.batch.Batch(self.model, count, nthread=num_threads, persistent=True)
        self.qpos, self.qvel, self.ctrl = (self.batch.bind(name) for name in ("qpos", "qvel", "ctrl"))
        self.action_size = self.model.nu
        self.action_low, self.action_high = np.ascontiguousarray(self.model.actuator_ctrlrange.T.astype(np.float32))
        self.seconds_per_step = self.model.opt.timestep * self.frame_skip
        self._observed_KO = np.zeros_like(self.observations_KO)
        self._unclocked = _Unclocked()
        self._qpos0 = np.array(self.model.qpos0)
        self._blank_state_S = self.batch.state[0].copy()

    def step(self, actions_KA: np.ndarray) -> None:
        """Advance every simulation by one step; the three arrays then hold what came of it."""
        self.ctrl[:] = actions_KA
        self.before_physics()
        with self._unclocked:
            self.batch.step(nstep=self.frame_skip)
        self.after_physics()
        self.observe(self.observations_KO)
        self.judge(actions_KA)

    def reset(self, k: int, generator: np.random.Generator) -> np.ndarray:
        """Begin a new episode in simulation k, drawing in gymnasium's order; its observation (O,)."""
        self.batch.state[k] = self._blank_state_S
        self.qpos[k], self.qvel[k] = self.draw_state(generator)
        with self._unclocked:
            self.batch.forward([k])
        # Derived fields of simulations that were not stepped since their state was set are void: only row k counts.
        self.observe(self._observed_KO)
        self.observations_KO[k] = self._observed_KO[k]
        return self.observations_KO[k]

    def draw_state(self, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Positions (nq,) and velocities (nv,) at the beginning of an episode."""
        noise, num_positions, num_velocities = self.reset_noise, len(self._qpos0), self.qvel.shape[1]
        if self.normal_velocities:
            qpos = self._qpos0 + generator.uniform(-noise, noise, num_positions)
            return qpos, noise * generator.standard_normal(num_velocities)
        drawn = generator.uniform(-noise, noise, num_positions + num_velocities)
        return self._qpos0 + drawn[:num_positions], drawn[num_positions:]

    def keep(self, kept: np.ndarray) -> "BatchSimulations":
        """A new set of simulations that goes on with the kept ones, in their order."""
        fewer = type(self)(len(kept), self.num_threads)
        fewer.state_KS = self.state_KS[kept]
        fewer.observations_KO[:] = self.observations_KO[kept]
        return fewer

    @property
    def state_KS(self) -> np.ndarray:
        """MuJoCo's integration state with the warm start, and userdata: live."""
        return self.batch.state

    @state_KS.setter
    def state_KS(self, state_KS: np.ndarray) -> None:
        self.batch.state[:] = state_KS

    def healthy_K(self) -> np.ndarray | bool:
        """Who earns the reward for being healthy in this step, once terminations are known."""
        return True if self.pays_on_termination else ~self.terminated_K

    def before_physics(self) -> None:
        """Remember of the state before a step what the reward needs."""

    def after_physics(self) -> None:
        """Take what observation and reward need and MuJoCo does not hold for them."""

    @abc.abstractmethod
    def observe(self, out_KO: np.ndarray) -> None:
        """Write every simulation's observation."""

    @abc.abstractmethod
    def judge(self, actions_KA: np.ndarray) -> None:
        """Write every simulation's reward and termination, from the state and observations after a step."""


class InvertedPendulum(BatchSimulations):
    """A pole on a cart: reward 1 per step while the pole stands."""

    model_file = "inverted_pendulum.xml"
    frame_skip = 2
    observation_size = 4
    reset_noise = 0.01

    def observe(self, out_KO: np.ndarray) -> None:
        """Positions and velocities of cart and pole."""
        out_KO[:, :2] = self.qpos
        out_KO[:, 2:] = self.qvel

    def judge(self, actions_KA: np.ndarray) -> None:
        """Terminated once the pole leans by more than 0.2 rad."""
        np.greater(np.abs(self.observations_KO[:, 1]), 0.2, out=self.terminated_K)
        # A sum is finite if every term is, short of overflow: one pass instead of two.
        finite_K = np.isfinite(np.add.reduce(self.observations_KO, axis=1))
        np.logical_or(self.terminated_K, ~finite_K, out=self.terminated_K)
        self.rewards_K[:] = self.healthy_K()


class InvertedPendulumV5(InvertedPendulum):
    """The same, unpaid where the pole falls."""

    pays_on_termination = False


class InvertedDoublePendulum(BatchSimulations):
    """Two poles on a cart: reward 10 per step, less the tip's distance from its place and the poles' velocities."""

    model_file = "inverted_double_pendulum.xml"
    frame_skip = 5
    observation_size = 11
    reset_noise = 0.1
    normal_velocities = True

    def __init__(self, count: int, num_threads: int = 1):
        super().__init__(count, num_threads)
        self.tip_K3 = self.batch.bind("site_xpos")[:, 0]
        self.constraint_forces_KV = self.batch.bind("qfrc_constraint")[:, : self.observation_size - 8]

    def observe(self, out_KO: np.ndarray) -> None:
        """The cart's position, sines and cosines of the angles, velocities and constraint forces to +-10."""
        out_KO[:, :1] = self.qpos[:, :1]
        np.sin(self.qpos[:, 1:], out=out_KO[:, 1:3])
        np.cos(self.qpos[:, 1:], out=out_KO[:, 3:5])
        out_KO[:, 5:8] = self.qvel
        out_KO[:, 8:] = self.constraint_forces_KV
        _limit(out_KO[:, 5:], 10.0)

    def judge(self, actions_KA: np.ndarray) -> None:
        """Terminated once the tip is no higher than 1."""
        x_K, height_K = self.tip_K3[:, 0], self.tip_K3[:, 2]
        np.less_equal(height_K, 1.0, out=self.terminated_K)
        np.subtract(10.0 * self.healthy_K(), 0.01 * _squares(x_K) + _squares(height_K - 2.0), out=self.rewards_K)
        self.rewards_K -= 0.001 * _squares(self.qvel[:, 1]) + 0.005 * _squares(self.qvel[:, 2])


class InvertedDoublePendulumV5(InvertedDoublePendulum):
    """The same, seeing the cart's constraint force alone, and unpaid where the poles fall."""

    observation_size = 9
    pays_on_termination = False


class Runner(BatchSimulations):
    """What runs: reward is forward velocity, plus 1 where a runner can fall and has not, less costs."""

    num_unseen: ClassVar[int] = 1
    """Leading positions that are not observed: where in the plane the runner is."""
    control_cost: ClassVar[float]
    """Price of the squared action."""

    def __init__(self, count: int, num_threads: int = 1):
        super().__init__(count, num_threads)
        self.x_K, self.x_before_K = self.qpos[:, 0], np.zeros(count)
        self.seen_qpos = self.qpos[:, self.num_unseen :]

    def before_physics(self) -> None:
        """The forward position."""
        self.x_before_K[:] = self.x_K

    def observe(self, out_KO: np.ndarray) -> None:
        """Positions without the unseen ones, and velocities."""
        num_positions = self.seen_qpos.shape[1]
        out_KO[:, :num_positions] = self.seen_qpos
        out_KO[:, num_positions : num_positions + self.qvel.shape[1]] = self.qvel

    def judge(self, actions_KA: np.ndarray) -> None:
        """Terminated where the runner has fallen."""
        np.subtract(self.x_K, self.x_before_K, out=self.rewards_K)
        self.rewards_K /= self.seconds_per_step
        self.look_for_falls()
        self.rewards_K -= self.costs_K(actions_KA)

    def look_for_falls(self) -> None:
        """Write terminations and add the reward for being healthy, where a runner can fall."""

    def costs_K(self, actions_KA: np.ndarray) -> np.ndarray:
        """In float32 arithmetic, as gymnasium's is for float32 actions."""
        return self.control_cost * np.add.reduce(np.square(actions_KA), axis=1)


class HalfCheetah(Runner):
    """A two-legged cheetah; it never ends."""

    model_file = "half_cheetah.xml"
    frame_skip = 5
    observation_size = 17
    reset_noise = 0.1
    normal_velocities = True
    control_cost = 0.1


class Swimmer(Runner):
    """Three links in a viscous plane; it never ends."""

    model_file = "swimmer.xml"
    frame_skip = 4
    observation_size = 8
    reset_noise = 0.1
    control_cost = 1e-4
    num_unseen = 2


class Hopper(Runner):
    """One leg: healthy while it is high, upright and slow enough."""

    model_file = "hopper.xml"
    frame_skip = 4
    observation_size = 11
    reset_noise = 5e-3
    control_cost = 1e-3
    heights: ClassVar[tuple[float, float]] = (0.7, np.inf)
    max_lean: ClassVar[float] = 0.2
    max_state: ClassVar[float] = 100.0
    """Limit of angles and velocities."""

    def observe(self, out_KO: np.ndarray) -> None:
        """Positions without the forward one, and velocities to +-10."""
        super().observe(out_KO)
        _limit(out_KO[:, self.seen_qpos.shape[1] :], 10.0)

    def look_for_falls(self) -> None:
        """Height, lean and state within their limits; a NaN is outside of all."""
        low, high = self.heights
        upright_K = (low < self.qpos[:, 1]) & (self.qpos[:, 1] < high) & (np.abs(self.qpos[:, 2]) < self.max_lean)
        if self.max_state < np.inf:
            upright_K &= (np.abs(self.qpos[:, 2:]) < self.max_state).all(axis=1)
            upright_K &= (np.abs(self.qvel) < self.max_state).all(axis=1)
        np.logical_not(upright_K, out=self.terminated_K)
        self.rewards_K += self.healthy_K()


class HopperV5(Hopper):
    """The same, unpaid where it falls."""

    pays_on_termination = False


class Walker2d(Hopper):
    """Two legs: healthy while it is high and upright."""

    model_file = "walker2d.xml"
    observation_size = 17
    heights = (0.8, 2.0)
    max_lean = 1.0
    max_state = np.inf


class Walker2dV5(Walker2d):
    """The same with equal friction under both feet, unpaid where it falls."""

    model_file = "walker2d_v5.xml"
    pays_on_termination = False


class Ant(Runner):
    """Four legs: healthy while its torso is neither on the ground nor in the air."""

    model_file = "ant.xml"
    frame_skip = 5
    observation_size = 27
    reset_noise = 0.1
    normal_velocities = True
    control_cost = 0.5
    num_unseen = 2
    # Gymnasium takes the torso's derived position, which is a substep behind and cannot be had from the state again.
    num_userdata = 1

    def __init__(self, count: int, num_threads: int = 1):
        super().__init__(count, num_threads)
        self.x_K, self.derived_x_K = self.batch.bind("userdata")[:, 0], self.batch.bind("xpos")[:, 1, 0]

    def after_physics(self) -> None:
        """The forward position."""
        self.x_K[:] = self.derived_x_K

    def reset(self, k: int, generator: np.random.Generator) -> np.ndarray:
        """Begin a new episode in simulation k; its observation (O,)."""
        observation_O = super().reset(k, generator)
        self.x_K[k] = self.derived_x_K[k]
        return observation_O

    def look_for_falls(self) -> None:
        """The torso's height within its limits, and all of the state finite."""
        height_K = self.qpos[:, 2]
        upright_K = (height_K >= 0.2) & (height_K <= 1.0)
        upright_K &= np.isfinite(self.qpos).all(axis=1)
        upright_K &= np.isfinite(self.qvel).all(axis=1)
        np.logical_not(upright_K, out=self.terminated_K)
        self.rewards_K += self.healthy_K()


class AntV5(Ant):
    """The same, seeing and paying for contact forces to +-1, and unpaid where it falls."""

    observation_size = 27 + 13 * 6
    pays_on_termination = False

    def __init__(self, count: int, num_threads: int = 1):
        super().__init__(count, num_threads)
        self.num_contacts_K = self.batch.bind("ncon")
        self.contact_forces_KF = np.zeros((count, self.model.nbody * 6))
        self._data = mujoco.MjData(self.model)

    def after_physics(self) -> None:
        """The forward position, and the contact forces on every body.

        The batch derives no force without a sensor, and a sensor sees RK4's first stage, gymnasium its last.
        """
        super().after_physics()
        self.contact_forces_KF[:] = 0.0
        for k in np.flatnonzero(self.num_contacts_K):
            self.batch.get_data(k, self._data)
            mujoco.mj_rnePostConstraint(self.model, self._data)
            self.contact_forces_KF[k] = self._data.cfrc_ext.ravel()
        _limit(self.contact_forces_KF, 1.0)

    def reset(self, k: int, generator: np.random.Generator) -> np.ndarray:
        """Begin a new episode in simulation k, without forces before its first step; its observation (O,)."""
        self.contact_forces_KF[k] = 0.0
        return super().reset(k, generator)

    def observe(self, out_KO: np.ndarray) -> None:
        """Positions in space but not in the plane, velocities, and contact forces on all bodies but the world."""
        super().observe(out_KO)
        out_KO[:, 27:] = self.contact_forces_KF[:, 6:]

    def costs_K(self, actions_KA: np.ndarray) -> np.ndarray:
        """Of the action and of the contacts."""
        return super().costs_K(actions_KA) + 5e-4 * np.add.reduce(np.square(self.contact_forces_KF), axis=1)


def _limit(values: np.ndarray, limit: float) -> None:
    np.maximum(values, -limit, out=values)
    np.minimum(values, limit, out=values)


def _squares(values_K: np.ndarray) -> np.ndarray:
    # As C's pow gives it, like gymnasium's scalars; now and then x * x, numpy's square of an array, rounds otherwise.
    return np.array([value**2 for value in values_K.tolist()])


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


def _through_gymnasium(task: str) -> type[GymnasiumSimulations]:
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
    if not _can_be_resumed(found):
        raise ValueError("its next step depends on more than MuJoCo's data, so that a trial could not be resumed")
    return found


def _can_be_resumed(kind: type[Simulations]) -> bool:
    """Whether a simulation goes on from the state of another as that one does: found by trying."""
    simulations, generator = kind(2), np.random.default_rng(0)
    shape = (8, 1, simulations.action_size)
    actions = generator.uniform(simulations.action_low, simulations.action_high, shape).astype(np.float32)
    for k in range(2):
        simulations.reset(k, np.random.default_rng(k))
    for step, action_1A in enumerate(actions):
        if step == len(actions) // 2:
            simulations.state_KS = simulations.state_KS[[0, 0]]
        simulations.step(np.repeat(action_1A, 2, axis=0))
    outcome = np.column_stack([simulations.observations_KO, simulations.rewards_K, simulations.terminated_K])
    return np.array_equal(outcome[0], outcome[1], equal_nan=True)


TASKS: dict[str, type[BatchSimulations]] = {
    "InvertedPendulum-v4": InvertedPendulum,
    "InvertedPendulum-v5": InvertedPendulumV5,
    "InvertedDoublePendulum-v4": InvertedDoublePendulum,
    "InvertedDoublePendulum-v5": InvertedDoublePendulumV5,
    "HalfCheetah-v4": HalfCheetah,
    "HalfCheetah-v5": HalfCheetah,
    "Hopper-v4": Hopper,
    "Hopper-v5": HopperV5,
    "Walker2d-v4": Walker2d,
    "Walker2d-v5": Walker2dV5,
    "Swimmer-v4": Swimmer,
    "Swimmer-v5": Swimmer,
    "Ant-v4": Ant,
    "Ant-v5": AntV5,
}
"""The fast tasks."""


@functools.cache
def find_task(task: str) -> type[Simulations]:
    """The simulations of a task, fast or through gymnasium. Raises ValueError naming the task and what there is."""
    if task in TASKS:
        return TASKS[task]
    try:
        return _through_gymnasium(task)
    except (gymnasium.error.Error, ImportError, TypeError, ValueError) as error:
        raise ValueError(
            f"collect.task={task!r} is not one of {', '.join(sorted(TASKS))}, nor another MuJoCo task of gymnasium "
            f"with Box spaces, which would run too, but slower: {error}"
        ) from error
