"""A task from outside the package: a pole on a cart, paid for standing in the middle of its rail.

    python jobs/collect.py --experiment jobs/experiments/smoke.toml --storage storage/centred \
        --collect.task examples.recipes.task:CentredPendulum

`module:Name` is imported where trials run: from the working directory or whatever is installed there. A package that
declares `CentredPendulum = "its.module:CentredPendulum"` as an entry point of the group `tipl_ray.tasks` gives the task
a name of its own. A MuJoCo task that gymnasium knows needs no such class: `--collect.task module:Name-v0`, with the
module that registers it, runs too, several times slower.
"""

import numpy as np

from tipl_ray.ppo.simulations import BatchSimulations


class CentredPendulum(BatchSimulations):
    """K carts, stepped together in C; O = 4 observation values, A = 1 action value."""

    model_file = "inverted_pendulum.xml"  # one of gymnasium's, or an absolute path
    frame_skip = 2
    observation_size = 4
    max_episode_steps = 1000
    reset_noise = 0.01

    def observe(self, out_KO: np.ndarray) -> None:
        """Positions and velocities of cart and pole."""
        out_KO[:, :2] = self.qpos
        out_KO[:, 2:] = self.qvel

    def judge(self, actions_KA: np.ndarray) -> None:
        """Reward 1 in the middle, 0 at the rail's ends, less the action's cost; over once the pole leans by 0.2 rad."""
        position_K, lean_K = self.qpos.T
        self.terminated_K[:] = np.abs(lean_K) > 0.2
        self.rewards_K[:] = 1.0 - np.square(position_K) - 1e-3 * np.square(actions_KA[:, 0])
