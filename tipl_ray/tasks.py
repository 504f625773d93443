"""The tasks: many MuJoCo simulations of one of them, stepped together.

K simulations, O observation values, A action values. Each class is bit for bit gymnasium's of the same id: observation,
reward, termination and reset noise, over arrays of simulations. Physics runs in `mujoco.batch.Batch`, one thread.
Wrappers, episode limits and random streams are the callers' affair.
"""

import warnings
from pathlib import Path
from typing import ClassVar

import gymnasium
import mujoco
import mujoco.batch
import numpy as np


class Simulations:
    """`count` simulations of one task: raw observations, rewards and terminations, as gymnasium's class gives them."""

    model_file: ClassVar[str]
    frame_skip: ClassVar[int]
    observation_size: ClassVar[int]
    max_episode_steps: ClassVar[int] = 1000

    def __init__(self, count: int):
        assets = Path(gymnasium.__file__).parent / "envs" / "mujoco" / "assets"
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # of what gymnasium's files deprecate
            self.model = mujoco.MjSpec.from_file(str(assets / self.model_file)).compile()
        self.batch = mujoco.batch.Batch(self.model, count, nthread=1, persistent=True)
        self.qpos, self.qvel, self.ctrl = (self.batch.bind(name) for name in ("qpos", "qvel", "ctrl"))
        self.action_size: int = self.model.nu
        self.action_low, self.action_high = np.ascontiguousarray(self.model.actuator_ctrlrange.T.astype(np.float32))
        self.seconds_per_step = self.model.opt.timestep * self.frame_skip
        self.observations_KO = np.zeros((count, self.observation_size))
        self.rewards_K = np.zeros(count)
        self.terminated_K = np.zeros(count, dtype=bool)

    def step(self, actions_KA: np.ndarray) -> None:
        """Advance every simulation by one step; the three arrays above then hold what came of it."""
        self.ctrl[:] = actions_KA
        self.before_physics()
        self.batch.step(nstep=self.frame_skip)
        self.observe(self.observations_KO)
        self.judge(actions_KA)

    def reset(self, k: int, generator: np.random.Generator) -> np.ndarray:
        """Begin a new episode in simulation k, drawing in gymnasium's order; its observation (O,)."""
        self.batch.reset([k], stage=int(mujoco.mjtStage.mjSTAGE_NONE))
        self.qpos[k], self.qvel[k] = self.draw_state(generator)
        self.batch.forward([k])
        self.observe(self.observations_KO)
        return self.observations_KO[k]

    def keep(self, kept: np.ndarray) -> "Simulations":
        """A new set of simulations that goes on with the kept ones, in their order."""
        fewer = type(self)(len(kept))
        fewer.batch.state[:] = self.batch.state[kept]
        fewer.observations_KO[:] = self.observations_KO[kept]
        return fewer

    def before_physics(self) -> None:
        """Remember of the state before a step what the reward needs."""

    def observe(self, out_KO: np.ndarray) -> None:
        """Write every simulation's observation."""
        raise NotImplementedError

    def judge(self, actions_KA: np.ndarray) -> None:
        """Write every simulation's reward and termination, from the state and observations after a step."""
        raise NotImplementedError

    def draw_state(self, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Positions (nq,) and velocities (nv,) at the beginning of an episode."""
        raise NotImplementedError


class InvertedPendulum(Simulations):
    """A pole on a cart: reward 1 per step while the pole stands."""

    model_file = "inverted_pendulum.xml"
    frame_skip = 2
    observation_size = 4

    def observe(self, out_KO: np.ndarray) -> None:
        """Positions and velocities of cart and pole."""
        out_KO[:, :2] = self.qpos
        out_KO[:, 2:] = self.qvel

    def judge(self, actions_KA: np.ndarray) -> None:
        """Terminated once the pole leans by more than 0.2 rad."""
        self.rewards_K[:] = 1.0
        np.greater(np.abs(self.observations_KO[:, 1]), 0.2, out=self.terminated_K)
        # A sum is finite if every term is, short of overflow: one pass instead of two.
        finite_K = np.isfinite(self.observations_KO.sum(axis=1))
        np.logical_or(self.terminated_K, ~finite_K, out=self.terminated_K)

    def draw_state(self, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Uniform noise of 0.01 around the upright state."""
        qpos = self.model.qpos0 + generator.uniform(size=self.model.nq, low=-0.01, high=0.01)
        return qpos, generator.uniform(size=self.model.nv, low=-0.01, high=0.01)


class HalfCheetah(Simulations):
    """A two-legged cheetah: reward is forward velocity less a tenth of the squared action."""

    model_file = "half_cheetah.xml"
    frame_skip = 5
    observation_size = 17

    def before_physics(self) -> None:
        """The forward position."""
        self.x_before_K = self.qpos[:, 0].copy()

    def observe(self, out_KO: np.ndarray) -> None:
        """Positions without the forward one, and velocities."""
        out_KO[:, :8] = self.qpos[:, 1:]
        out_KO[:, 8:] = self.qvel

    def judge(self, actions_KA: np.ndarray) -> None:
        """Never terminated. The cost is float32 arithmetic, as gymnasium's is for float32 actions."""
        velocity_K = (self.qpos[:, 0] - self.x_before_K) / self.seconds_per_step
        np.subtract(velocity_K, 0.1 * np.square(actions_KA).sum(axis=1), out=self.rewards_K)

    def draw_state(self, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Uniform noise of 0.1 on positions, normal noise of 0.1 on velocities."""
        qpos = self.model.qpos0 + generator.uniform(low=-0.1, high=0.1, size=self.model.nq)
        return qpos, 0.1 * generator.standard_normal(self.model.nv)


TASKS: dict[str, type[Simulations]] = {
    "InvertedPendulum-v4": InvertedPendulum,
    "HalfCheetah-v4": HalfCheetah,
}


def find_task(task: str) -> type[Simulations]:
    """The simulations of a task. Raises ValueError naming the task and those that there are."""
    if task not in TASKS:
        raise ValueError(f"collect.task={task!r} is not one of {', '.join(sorted(TASKS))}")
    return TASKS[task]
