"""What an experiment names and may come from outside this package: predictors, representations, algorithms.

A name is one of this package's own, one that an installed package declares as an entry point, or `module:Name`, which
is imported where it is used: from the working directory too, as a cluster's workers have it. What is named is loaded
when it is asked for, so that the names are known without torch.
"""

import importlib
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

    def check(self, field: str, name: str) -> None:
        """Raise ValueError naming the field where there is no such thing; a `module:Name` is looked up and imported."""
        if ":" in name:
            self._import(field, name)
        elif name not in self.names():
            known = self.names()
            raise ValueError(
                f"{field}={name!r} is not one of {', '.join(known)}, nor module:Name of one's own{nearest(name, known)}"
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
                f"{field}={place!r}: there is no module {module!r} beside the job, in {here} or installed"
            ) from error
        except AttributeError as error:
            raise ValueError(f"{field}={place!r}: {module} has no {name!r}") from error


def look_here() -> str:
    """Have modules of the working directory found too; which it is.

    A job started as `python jobs/train.py` has the jobs' folder in its path, and not the one where it stands.
    """
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)
    return here
