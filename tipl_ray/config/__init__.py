"""One experiment: its sections, what their fields may hold, and what each job reads of them."""

from tipl_ray.config.experiment import (
    IMPROVING,
    JOBS,
    Experiment,
    check_place,
    every_field,
    fields_read,
    known_predictors,
)
from tipl_ray.config.fields import MOVED, naming, validated
from tipl_ray.config.jumps import Accelerate, Contender, Improve, Jump, OuterStep, RunTask
from tipl_ray.config.sections import Basis, Collect, Evaluate, Model, Ppo, Split, Sweep, Tracking, Train, Where

__all__ = [
    "IMPROVING",
    "JOBS",
    "MOVED",
    "Accelerate",
    "Basis",
    "Collect",
    "Contender",
    "Evaluate",
    "Experiment",
    "Improve",
    "Jump",
    "Model",
    "OuterStep",
    "Ppo",
    "RunTask",
    "Split",
    "Sweep",
    "Tracking",
    "Train",
    "Where",
    "check_place",
    "every_field",
    "fields_read",
    "known_predictors",
    "naming",
    "validated",
]
