"""TIPL as a distributed job system: policy weights over PPO training, as trajectories to model (arXiv 2503.04074)."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tipl_ray.data.trajectory_store import TrajectoryStore as TrajectoryStore
    from tipl_ray.record.export import load_module as load_module
    from tipl_ray.record.export import policy_module as policy_module
    from tipl_ray.record.export import save_safetensors as save_safetensors
    from tipl_ray.record.recorder import Recorder as Recorder

__version__ = "0.1.0"

_WHERE = {
    "Recorder": "record.recorder",
    "TrajectoryStore": "data.trajectory_store",
    "load_module": "record.export",
    "policy_module": "record.export",
    "save_safetensors": "record.export",
}
"""Where the names are that users need: imported when they are asked for, as torch takes seconds."""


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_WHERE})
