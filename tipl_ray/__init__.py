"""TIPL as a distributed job system: policy weights over PPO training, as trajectories to model (arXiv 2503.04074)."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tipl_ray.accelerate.jumps import ModuleJumps as ModuleJumps
    from tipl_ray.config import Experiment as Experiment
    from tipl_ray.data.trajectory_store import TrajectoryStore as TrajectoryStore
    from tipl_ray.experiments import load_experiment as load_experiment
    from tipl_ray.predict.saved import load_predictor as load_predictor

__version__ = "0.1.0"

EXPORTS = {
    "Experiment": "tipl_ray.config",
    "ModuleJumps": "tipl_ray.accelerate.jumps",
    "TrajectoryStore": "tipl_ray.data.trajectory_store",
    "load_experiment": "tipl_ray.experiments",
    "load_predictor": "tipl_ray.predict.saved",
}
"""What one's own code needs, each loaded from its module when it is first asked for."""


def __getattr__(name: str) -> Any:
    if name not in EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *EXPORTS])
