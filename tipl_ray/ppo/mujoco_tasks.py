"""Seven MuJoCo tasks, v4 and v5, each bit for bit gymnasium's class of the same id with its default arguments.

Observation, reward, termination and reset noise are gymnasium's formulas over arrays of simulations.

K simulations, O observation values, A action values, V velocities, F numbers of contact forces.
"""

from typing import ClassVar

import mujoco
import numpy as np

from tipl_ray.ppo.simulations import BatchSimulations


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
