"""Data sets of given weights, where a test has no use for PPO's."""

from pathlib import Path
from typing import Any

import numpy as np

from tipl_ray.data.snapshots import Header, Snapshot
from tipl_ray.data.trajectory_store import TrajectoryStore
from tipl_ray.data.trial_writer import TrialWriter


def write_trials(
    root: Path | str, weights: dict[int, np.ndarray], header_config: dict[str, Any] | None = None
) -> TrajectoryStore:
    """A store of trials, one commit each, with these weights (T, P) by seed."""
    store = TrajectoryStore(str(root))
    for seed, weights_TP in weights.items():
        header = Header(
            task="Line-v0",
            layout=(("w", (weights_TP.shape[1],), 0),),
            config=header_config or {},
            versions={"mujoco": "4.0", "gymnasium": "1.4"},
        )
        writer = TrialWriter(store, seed, header)
        for index, weights_P in enumerate(weights_TP):
            writer.append(
                Snapshot(
                    seed=seed,
                    snapshot=index,
                    iteration=index,
                    epoch=0,
                    env_step=index,
                    learning_rate=3e-4,
                    episodic_return=None,
                    weights=weights_P,
                    observation_mean=np.zeros(4),
                    observation_variance=np.ones(4),
                    observation_count=1.0,
                )
            )
        writer.commit({})
    return store
