"""What an experiment refers to by name and may come from outside this package: predictors, representations, algorithms.

A name is one of this package's own, one that an installed package declares as an entry point, or `module:Name`, which
is imported where it is used: from the working directory too, as a cluster's workers have it. What is named is loaded
when it is used, so that the names are known without torch.
"""

import hashlib
import importlib
import inspect
import sys
from collections.abc import Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from tipl_ray.errors import nearest


class Registry:
    """The known things of one kind, by name.

    >>> numbers = Registry("number", "tipl_ray.numbers", {"pi": "math:pi"})
    >>> numbers.load("pi") == numbers.load("math:pi")
    True
    """

    def __init__(self, what: str, group: str, own: Mapping[str, str]) -> None:
        """`what` is said in errors, `group` is the entry points' group, `own` are names -> `module:Name`."""
        self.what, self.group, self.own = what, group, dict(own)

    def names(self) -> tuple[str, ...]:
        """Every name that needs no module: this package's, then those of entry points."""
        found = (entry.name for entry in entry_points(group=self.group))
        return tuple(dict.fromkeys([*self.own, *found]))

    def name_of(self, thing: Any) -> str:
        """The name under which a class is found again."""
        place = f"{thing.__module__}:{thing.__qualname__}"
        return next((name for name, own in self.own.items() if own == place), place)

    def source_digest(self, name: str) -> str | None:
        """Digest of the file that a thing from outside is written in, which its answers depend on; None for our own."""
        if name in self.own:
            return None
        return file_digest(self.load(name))

    def check(self, field: str, name: str) -> None:
        """Raise ValueError naming the field where there is no such thing; a `module:Name` is looked up and imported."""
        if ":" in name:
            self._import(field, name)
        elif name not in self.names():
            known = self.names()
            raise ValueError(
                f"{field}={name!r} is not one of {', '.join(known)}, nor module:Name of your own{nearest(name, known)}"
            )

    def load(self, name: str) -> Any:
        """What has this name. Raises ValueError where there is none."""
        self.check(self.what, name)
        place = self.own.get(name, name)
        if ":" in place:
            return self._import(self.what, place)
        return next(entry for entry in entry_points(group=self.group) if entry.name == name).load()

    def _import(self, field: str, place: str) -> Any:
        module, _, name = place.partition(":")
        here = look_here()
        try:
            return getattr(importlib.import_module(module), name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module}.".startswith(f"{error.name}."):
                raise  # of something that the module imports
            raise ValueError(
                f"{field}={place!r}: no module {module!r} in the job's folder, in {here} or installed"
            ) from error
        except AttributeError as error:
            raise ValueError(f"{field}={place!r}: {module} has no {name!r}") from error


def file_digest(thing: Any) -> str:
    """Digest of the file that a class is written in. Raises TypeError or OSError where there is none, as of a built-in
    one."""
    return hashlib.sha256(Path(inspect.getfile(thing)).read_bytes()).hexdigest()[:16]


def look_here() -> str:
    """Have modules of the working directory found too; which it is.

    A job started as `python jobs/train.py` has the jobs' folder in its path, but not the working directory.
    """
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)
    return here


PREDICTORS = Registry(
    "predictor",
    "tipl_ray.predictors",
    {
        "copy-last": "tipl_ray.predict.baselines:CopyLast",
        "linear": "tipl_ray.predict.baselines:Linear",
        "damped": "tipl_ray.predict.baselines:Damped",
        "window-linear": "tipl_ray.predict.baselines:WindowLinear",
        "ridge": "tipl_ray.predict.baselines:Ridge",
        "context-ridge": "tipl_ray.predict.baselines:RidgeOnContext",
        "rank-1": "tipl_ray.predict.baselines:RankOne",
        "rank-1-from-last": "tipl_ray.predict.baselines:RankOneFromLast",
        "dmd": "tipl_ray.predict.baselines:DynamicModes",
        "mean-trajectory": "tipl_ray.predict.baselines:MeanTrajectory",
        "first-again": "tipl_ray.predict.baselines:FirstAgain",
        "return-rule": "tipl_ray.accelerate.return_rule:ReturnRule",
        "return-tipl": "tipl_ray.improve.return_tipl:ReturnTipl",
    },
)
"""The predictors that TIPL is compared with, in the order of the result table: a `predict.predictor.Predictor` each."""

REPRESENTATIONS = Registry(
    "basis.kind",
    "tipl_ray.representations",
    {
        "trial": "tipl_ray.paper.representation:TrialTokens",
        "shared": "tipl_ray.paper.representation:SharedTokens",
        "window": "tipl_ray.window.representation:Window",
        "per-weight": "tipl_ray.per_weight.representation:PerWeight",
    },
)
"""What an experiment's basis may be: a `predict.representation.Representation` each."""
