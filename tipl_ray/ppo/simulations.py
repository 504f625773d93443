"""Many simulations of one task, stepped together: what every task offers, and those that MuJoCo steps in C.

K simulations, O observation values, A action values, S values of a simulation's state. Physics runs in
`mujoco.batch.Batch`, whose number of threads changes no bit. Wrappers, episode limits and random streams are the
callers' affair; which tasks there are, `tasks` knows.
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


class Simulations(abc.ABC):
    """`count` simulations of one task: raw observations, rewards and terminations, as gymnasium's class gives them."""

    fast: ClassVar[bool]
    """Whether they are stepped together; otherwise one by one, through gymnasium."""
    discrete: ClassVar[bool] = False
    """Whether an action is one of A choices, which its largest value says, and not A numbers."""
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

    def draw_from(self, k: int, generator: np.random.Generator) -> None:
        """Go on in the middle of simulation k's episode with another generator; of no account where steps draw none."""
        return

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
    """Among gymnasium's own, or an absolute path."""
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


def can_be_resumed(kind: type[Simulations]) -> bool:
    """Whether a simulation goes on from the state of another as that one does: found by trying."""
    simulations, generator = kind(2), np.random.default_rng(0)
    shape = (min(8, kind.max_episode_steps), 1, simulations.action_size)
    actions = generator.uniform(simulations.action_low, simulations.action_high, shape).astype(np.float32)
    for k in range(2):
        simulations.reset(k, np.random.default_rng(k))
    for step, action_1A in enumerate(actions):
        if step == len(actions) // 2:
            simulations.state_KS = simulations.state_KS[[0, 0]]
        simulations.step(np.repeat(action_1A, 2, axis=0))
    outcome = np.column_stack([simulations.observations_KO, simulations.rewards_K, simulations.terminated_K])
    return np.array_equal(outcome[0], outcome[1], equal_nan=True)
