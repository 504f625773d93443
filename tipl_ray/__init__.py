"""TIPL as a distributed job system: policy weights over PPO training, as trajectories to model (arXiv 2503.04074)."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tipl_ray.accelerate.jumps import ModuleJumps as ModuleJumps
    from tipl_ray.config.experiment import Experiment as Experiment
    from tipl_ray.data.trajectory_store import TrajectoryStore as TrajectoryStore
    from tipl_ray.experiments import load_experiment as load_experiment
    from tipl_ray.predict.saved import load_predictor as load_predictor
    from tipl_ray.record.export import load_module as load_module
    from tipl_ray.record.export import policy_module as policy_module
    from tipl_ray.record.export import save_safetensors as save_safetensors
    from tipl_ray.record.recorder import Recorder as Recorder
    from tipl_ray.serving import Forecaster as Forecaster

__version__ = "0.1.0"

EXPORTS = {
    "Experiment": "tipl_ray.config.experiment",
    "Forecaster": "tipl_ray.serving",
    "ModuleJumps": "tipl_ray.accelerate.jumps",
    "Recorder": "tipl_ray.record.recorder",
    "TrajectoryStore": "tipl_ray.data.trajectory_store",
    "load_experiment": "tipl_ray.experiments",
    "load_module": "tipl_ray.record.export",
    "load_predictor": "tipl_ray.predict.saved",
    "policy_module": "tipl_ray.record.export",
    "save_safetensors": "tipl_ray.record.export",
}
"""The public API, each name loaded from its module when it is first used."""


def __getattr__(name: str) -> Any:
    if name not in EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *EXPORTS])
