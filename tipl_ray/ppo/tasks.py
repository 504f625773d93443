"""The tasks by name: those that MuJoCo steps together, those from outside this package, and gymnasium's."""

import functools
import json
from collections.abc import Mapping
from typing import Any

import gymnasium

from tipl_ray.ppo.gymnasium_tasks import GymnasiumSimulations, through_gymnasium
from tipl_ray.ppo.simulations import Simulations, can_be_resumed
from tipl_ray.registry import Registry, file_digest, look_here

TASKS = Registry(
    "collect.task",
    "tipl_ray.tasks",
    {
        "InvertedPendulum-v4": "tipl_ray.ppo.mujoco_tasks:InvertedPendulum",
        "InvertedPendulum-v5": "tipl_ray.ppo.mujoco_tasks:InvertedPendulumV5",
        "InvertedDoublePendulum-v4": "tipl_ray.ppo.mujoco_tasks:InvertedDoublePendulum",
        "InvertedDoublePendulum-v5": "tipl_ray.ppo.mujoco_tasks:InvertedDoublePendulumV5",
        "HalfCheetah-v4": "tipl_ray.ppo.mujoco_tasks:HalfCheetah",
        "HalfCheetah-v5": "tipl_ray.ppo.mujoco_tasks:HalfCheetah",
        "Hopper-v4": "tipl_ray.ppo.mujoco_tasks:Hopper",
        "Hopper-v5": "tipl_ray.ppo.mujoco_tasks:HopperV5",
        "Walker2d-v4": "tipl_ray.ppo.mujoco_tasks:Walker2d",
        "Walker2d-v5": "tipl_ray.ppo.mujoco_tasks:Walker2dV5",
        "Swimmer-v4": "tipl_ray.ppo.mujoco_tasks:Swimmer",
        "Swimmer-v5": "tipl_ray.ppo.mujoco_tasks:Swimmer",
        "Ant-v4": "tipl_ray.ppo.mujoco_tasks:Ant",
        "Ant-v5": "tipl_ray.ppo.mujoco_tasks:AntV5",
    },
)
"""The fast tasks: each a class of `Simulations`."""


def find_task(task: str, options: Mapping[str, Any] | None = None) -> type[Simulations]:
    """The simulations of a task: one of `TASKS`, a class `module:Name`, or a gymnasium id, also as `module:Name-v0`.

    With options (keyword arguments of gymnasium's environment) it always runs in gymnasium's class. Raises ValueError
    naming the task and the available ones.
    """
    return _found(task, json.dumps(dict(options or {}), sort_keys=True))


def task_source(task: str, options: Mapping[str, Any] | None = None) -> str | None:
    """Digest of the file that a task from outside is written in; None for this package's and gymnasium's, whose
    versions are recorded, and where there is no file. Raises as `find_task` does."""
    kind = find_task(task, options)
    written = kind.environment if issubclass(kind, GymnasiumSimulations) else kind
    if written.__module__.partition(".")[0] in ("tipl_ray", "gymnasium"):
        return None
    try:
        return file_digest(written)
    except (TypeError, OSError):
        return None


@functools.cache
def _found(task: str, written_options: str) -> type[Simulations]:
    options = json.loads(written_options)
    # An id of gymnasium's ends in its version, which no name of a class can.
    outside = ":" in task and task.rpartition(":")[2].isidentifier()
    if outside or (task in TASKS.names() and not (options and task in TASKS.own)):
        if options:
            raise ValueError(
                f"collect.task_options={options}: {task!r} is not a gymnasium task, and only those take options"
            )
        return _checked(task, TASKS.load(task))
    try:
        look_here()
        return through_gymnasium(task, options)
    except (gymnasium.error.Error, ImportError, TypeError, ValueError) as error:
        given = f" with collect.task_options={options}" if options else ""
        raise ValueError(
            f"collect.task={task!r}{given} is not one of {', '.join(sorted(TASKS.names()))}, nor a class module:Name, "
            "nor another gymnasium task that can run, which needs a Box observation space and a Box or Discrete action "
            f"space: {error}"
        ) from error


def _checked(task: str, kind: object) -> type[Simulations]:
    """The class, if trials can run it and be resumed. Raises ValueError."""
    if not (isinstance(kind, type) and issubclass(kind, Simulations)):
        raise ValueError(f"collect.task={task!r}: {kind!r} is not a subclass of tipl_ray.ppo.simulations.Simulations")
    if task not in TASKS.own and not can_be_resumed(kind):
        raise ValueError(
            f"collect.task={task!r}: its next step depends on more than state_KS, so a trial could not be resumed"
        )
    return kind
