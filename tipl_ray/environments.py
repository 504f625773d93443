"""Many MuJoCo simulations of one task, stepped together, and CleanRL's wrappers over them.

K simulations, O observation values, A action values. `Simulations` is the raw task, bit for bit gymnasium's class of
the same id. `Environments` adds, in CleanRL's order: episode statistics, clip action, normalise observation, clip to
+-10, normalise reward, clip to +-10; and resets an episode that ended within the same step. Physics runs in
`mujoco.batch.Batch`, one thread. Knows nothing of policies or learning.
"""

import warnings
from pathlib import Path
from typing import ClassVar

import gymnasium
import mujoco
import mujoco.batch
import numpy as np

EPSILON = 1e-8
"""Gymnasium's epsilon under the square root of both normalisations."""
CLIP = 10.0
"""Limit of normalised observations and rewards."""


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


class RunningStatistics:
    """Mean and variance of K streams of values, updated one value at a time by gymnasium's formula, bit for bit."""

    def __init__(self, *shape: int):
        self.mean, self.variance = np.zeros(shape), np.ones(shape)
        self.count = np.full((shape[0],) + (1,) * (len(shape) - 1), 1e-4)
        self._delta, self._total = np.zeros(shape), np.zeros_like(self.count)

    def update(self, values: np.ndarray) -> None:
        """Take one value per stream."""
        delta, total = self._delta, self._total
        np.subtract(values, self.mean, out=delta)
        np.add(self.count, 1.0, out=total)
        self.mean += delta / total
        np.square(delta, out=delta)
        delta *= self.count
        delta /= total
        self.variance *= self.count
        self.variance += delta
        self.variance /= total
        self.count[:] = total

    def update_one(self, k: int, value: np.ndarray) -> None:
        """Take one value of stream k."""
        delta, total = value - self.mean[k], self.count[k] + 1.0
        self.mean[k] += delta / total
        self.variance[k] = (self.variance[k] * self.count[k] + np.square(delta) * self.count[k] / total) / total
        self.count[k] = total


class Environments:
    """K environments of one task under CleanRL's wrappers, stepped together; each has its own random stream."""

    def __init__(self, task: str, seeds: list[int] | tuple[int, ...], gamma: float):
        count = len(seeds)
        self.task, self.gamma = task, gamma
        self.simulations = find_task(task)(count)
        self.generators = [np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed))) for seed in seeds]
        self._allocate()
        for k in range(count):
            self._begin_episode(k)

    def _allocate(self) -> None:
        count, size = self.simulations.observations_KO.shape
        self.observation_statistics = RunningStatistics(count, size)
        # Gymnasium's observation statistics begin as float32, so that its first variance * count is float32(1e-4).
        self.observation_statistics.variance *= np.float64(np.float32(1e-4)) / 1e-4
        self.reward_statistics = RunningStatistics(count)
        self.discounted_rewards_K = np.zeros(count)
        self.episode_steps_K = np.zeros(count, dtype=np.int64)
        self.episode_returns_K = np.zeros(count)
        self.observations_KO = np.zeros((count, size), dtype=np.float32)
        self.rewards_K = np.zeros(count, dtype=np.float32)
        self.ends_K = np.zeros(count, dtype=bool)
        self.finished: list[tuple[int, float]] = []
        """(k, undiscounted return) of the episodes that ended since the list was last cleared."""
        self._actions_KA = np.zeros((count, self.simulations.action_size), dtype=np.float32)
        self._scale_KO, self._normalised_KO = np.zeros((count, size)), np.zeros((count, size))

    def __len__(self) -> int:
        return len(self.generators)

    def step(self, actions_KA: np.ndarray) -> None:
        """Take one step everywhere; `observations_KO`, `rewards_K` and `ends_K` then hold what the agent sees.

        Where an episode ended, the observation is that of the episode that began within the same step.
        """
        simulations = self.simulations
        np.maximum(actions_KA, simulations.action_low, out=self._actions_KA)
        np.minimum(self._actions_KA, simulations.action_high, out=self._actions_KA)
        simulations.step(self._actions_KA)
        self.episode_returns_K += simulations.rewards_K
        self.episode_steps_K += 1
        self.observation_statistics.update(simulations.observations_KO)
        self._normalise_rewards()
        np.greater_equal(self.episode_steps_K, simulations.max_episode_steps, out=self.ends_K)
        np.logical_or(self.ends_K, simulations.terminated_K, out=self.ends_K)
        if self.ends_K.any():
            for k in map(int, np.flatnonzero(self.ends_K)):
                self.finished.append((k, float(self.episode_returns_K[k])))
                self._begin_episode(k)
        self._normalise_observations()

    def _begin_episode(self, k: int) -> None:
        observation = self.simulations.reset(k, self.generators[k])
        self.observation_statistics.update_one(k, observation)
        self.episode_steps_K[k], self.episode_returns_K[k] = 0, 0.0
        self._normalise_observations()

    def _normalise_rewards(self) -> None:
        rewards_K = self.simulations.rewards_K
        self.discounted_rewards_K *= self.gamma
        self.discounted_rewards_K *= ~self.simulations.terminated_K
        self.discounted_rewards_K += rewards_K
        self.reward_statistics.update(self.discounted_rewards_K)
        normalised_K = rewards_K / np.sqrt(self.reward_statistics.variance + EPSILON)
        self.rewards_K[:] = np.minimum(np.maximum(normalised_K, -CLIP), CLIP)

    def _normalise_observations(self) -> None:
        statistics, scale, normalised = self.observation_statistics, self._scale_KO, self._normalised_KO
        np.add(statistics.variance, EPSILON, out=scale)
        np.sqrt(scale, out=scale)
        np.subtract(self.simulations.observations_KO, statistics.mean, out=normalised)
        np.divide(normalised, scale, out=normalised)
        self.observations_KO[:] = normalised
        np.maximum(self.observations_KO, -CLIP, out=self.observations_KO)
        np.minimum(self.observations_KO, CLIP, out=self.observations_KO)

    def state(self, k: int) -> dict[str, np.ndarray]:
        """Everything that environment k's next bit depends on, as arrays."""
        arrays = {name: np.array(array[k]) for name, array in self._per_environment().items()}
        return {**arrays, "environment.generator": generator_state(self.generators[k])}

    def set_state(self, k: int, state: dict[str, np.ndarray]) -> None:
        """Go on from a state."""
        for name, array in self._per_environment().items():
            array[k] = state[name]
        self.generators[k] = restored_generator(state["environment.generator"])

    def keep(self, kept: np.ndarray) -> None:
        """Go on with the kept environments alone, in their order."""
        before = self._per_environment()
        self.simulations = self.simulations.keep(kept)
        self.generators = [self.generators[k] for k in kept]
        self._allocate()
        for name, array in self._per_environment().items():
            array[:] = before[name][kept]

    def _per_environment(self) -> dict[str, np.ndarray]:
        return {
            "environment.physics": self.simulations.batch.state,
            "environment.observation_mean": self.observation_statistics.mean,
            "environment.observation_variance": self.observation_statistics.variance,
            "environment.observation_count": self.observation_statistics.count,
            "environment.reward_mean": self.reward_statistics.mean,
            "environment.reward_variance": self.reward_statistics.variance,
            "environment.reward_count": self.reward_statistics.count,
            "environment.discounted_reward": self.discounted_rewards_K,
            "environment.episode_steps": self.episode_steps_K,
            "environment.episode_return": self.episode_returns_K,
            "environment.raw_observation": self.simulations.observations_KO,
            "environment.observation": self.observations_KO,
        }


def generator_state(generator: np.random.Generator) -> np.ndarray:
    """A PCG64 generator's whole state as (6,) uint64."""
    state = generator.bit_generator.state
    word = 2**64
    inner, increment = state["state"]["state"], state["state"]["inc"]
    words = [inner // word, inner % word, increment // word, increment % word, state["has_uint32"], state["uinteger"]]
    return np.array(words, dtype=np.uint64)


def restored_generator(words: np.ndarray) -> np.random.Generator:
    """The generator whose state `generator_state` wrote down."""
    high, low, increment_high, increment_low, has_uint32, uinteger = (int(item) for item in words)
    bits = np.random.PCG64()
    bits.state = {
        "bit_generator": "PCG64",
        "state": {"state": high * 2**64 + low, "inc": increment_high * 2**64 + increment_low},
        "has_uint32": has_uint32,
        "uinteger": uinteger,
    }
    return np.random.Generator(bits)
