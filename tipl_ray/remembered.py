"""What a storage remembers of its experiment, so that later jobs need not be given the same options again.

    <storage>/experiment.json             the experiment that trials were last collected for
    <storage>/experiment-<preset>.json    the experiment that a model was last trained for, on this preset

A storage of an earlier version, which has neither, knows by its trials what was collected.
"""

import dataclasses
import json
from typing import Any

from tipl_ray.config import Experiment
from tipl_ray.data.storage import Storage, StoreError, read_file, write_file
from tipl_ray.data.trajectory_store import TrajectoryStore
from tipl_ray.digest import as_table
from tipl_ray.experiments import PRESETS, from_table
from tipl_ray.places import absolute_storage

COLLECTED = ("name", "collect", "ppo")
"""What is the same for every model of a data set."""
SHARED = ("split", "evaluate")
"""What is the same for every preset, until changed by an option."""
BY_PRESET = ("basis", "model", "train", "sweep")
FORGOTTEN = ("where", "accelerate", "improve")
"""What is of another place, or of other trials."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Remembered:
    """What is remembered in one storage."""

    collected: dict[str, Any]
    """Sections of `COLLECTED` by name, as far as they are known."""
    collected_for: Experiment | None
    trained_for: dict[str, Experiment]
    """By preset."""

    @property
    def preset(self) -> str | None:
        """The preset that is meant where none is named; None where none was."""
        return self.collected_for.preset if self.collected_for else next(iter(self.trained_for), None)

    def sections(self, preset: str) -> dict[str, Any]:
        """Sections of an experiment on this preset, by name: as last used with it, else with another."""
        known = [one for one in (self.collected_for, *self.trained_for.values()) if one]
        found = dict(self.collected)
        for one in sorted(known, key=lambda one: one.preset == preset):
            names = (*SHARED, *BY_PRESET) if one.preset == preset else SHARED
            found |= {name: getattr(one, name) for name in names}
        return found


def remember_collection(experiment: Experiment) -> None:
    """Write down what trials are collected for, before the first of them. Raises StoreError."""
    _remember(experiment, "experiment.json")


def remember_training(experiment: Experiment) -> None:
    """Write down what a model was trained for. Raises StoreError."""
    _remember(experiment, _trained_file(experiment.preset))


def remembered_collection(storage: str) -> Experiment | None:
    """The experiment that trials were last collected for there, if any. Raises StoreError for a damaged file."""
    return _recall(storage, "experiment.json")


def remembered(storage: str) -> Remembered | None:
    """What a storage remembers; None where nothing was collected or trained. Raises StoreError for a damaged file."""
    collected_for = remembered_collection(storage)
    recalled = {preset: _recall(storage, _trained_file(preset)) for preset in PRESETS}
    trained_for = {preset: one for preset, one in recalled.items() if one}
    collected = {} if collected_for else _of_trials(storage)
    if not collected and (one := collected_for or next(iter(trained_for.values()), None)):
        collected = {name: getattr(one, name) for name in COLLECTED}
    known = Remembered(collected=collected, collected_for=collected_for, trained_for=trained_for)
    return known if collected else None


def _trained_file(preset: str) -> str:
    return f"experiment-{preset}.json"


def _remember(experiment: Experiment, name: str) -> None:
    # Relative to the folder of this job, which the next one need not stand in.
    data = tuple(map(absolute_storage, experiment.train.data))
    table = as_table(dataclasses.replace(experiment, train=dataclasses.replace(experiment.train, data=data)))
    content = json.dumps({part: table[part] for part in table if part not in FORGOTTEN}, indent=1).encode()
    try:
        if read_file(experiment.storage_path, name) == content:
            return
    except FileNotFoundError:
        pass
    write_file(experiment.storage_path, name, content)


def _recall(storage: str, name: str) -> Experiment | None:
    try:
        return from_table(json.loads(read_file(storage, name)))
    except FileNotFoundError:
        return None
    except (ValueError, AttributeError) as error:
        raise StoreError(
            f"{Storage(storage).show(name)}: cannot be parsed: {error}; restore it from a copy, or delete it and pass "
            "--experiment"
        ) from error


def _of_trials(storage: str) -> dict[str, Any]:
    """Task, policy and PPO of the trials of jobs/collect.py that are there, and their seeds once they are sealed."""
    store = TrajectoryStore(storage)
    seeds = store.committed()
    made = dict(store.header(seeds[:1]).config) if seeds else {}
    if "policy_hidden" not in made or "jump" in made:
        return {}  # of another making, or by a predictor of which the digest alone is known
    collect = {name: made[name] for name in made if name not in ("ppo", "engine", "source")}
    collect |= {"task": store.header(seeds[:1]).task}
    if store.seal() and seeds[-1] - seeds[0] + 1 == len(seeds):
        collect |= {"first_seed": seeds[0], "num_trials": len(seeds)}
    experiment = from_table({"name": "trials", "collect": collect, "ppo": made.get("ppo", {})})
    return {"collect": experiment.collect, "ppo": experiment.ppo}
