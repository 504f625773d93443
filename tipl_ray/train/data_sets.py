"""Data sets to train on, their digests, and the folders of trained models, which are named after them.

Knows nothing of torch or Ray, so that a job can refuse what is not there at once.
"""

import dataclasses
import json
from typing import Any

from tipl_ray import config
from tipl_ray.data.snapshots import Header
from tipl_ray.data.storage import Storage, StoreError, join, read_file
from tipl_ray.data.trajectory_store import TrajectoryStore
from tipl_ray.digest import digest, flat, identity
from tipl_ray.experiments import from_table
from tipl_ray.places import absolute_storage
from tipl_ray.predict.bands import snapshots_per_iteration
from tipl_ray.predict.model_files import ABOUT_FILE
from tipl_ray.predict.representation import representation_of
from tipl_ray.registry import REPRESENTATIONS

MODELS_NAMED = 3
"""Trained models that an error names at most."""
FIELDS_NAMED = 4
"""Fields that it names of each at most."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DataSet:
    """One data set that a model is trained on."""

    storage: str
    seeds: tuple[int, ...]
    split: config.Split

    @property
    def digest(self) -> str:
        """See `TrajectoryStore.digest`."""
        return TrajectoryStore(self.storage).digest(self.seeds)

    @property
    def parts(self) -> tuple[tuple[int, ...], ...]:
        """Seeds of the training, validation and test trials, without the trials that diverged.

        A trial's part of the split does not depend on what became of others. Raises StoreError where all training or
        all validation trials diverged.
        """
        store, parts = TrajectoryStore(self.storage), []
        for use, seeds in zip(("training", "validation", "test"), self.split.cut(self.seeds), strict=True):
            parts.append(store.sound(seeds))
            if seeds and not parts[-1]:
                raise StoreError(
                    f"{self.storage}: all {len(seeds)} {use} trials diverged; collect with a lower "
                    "ppo.learning_rate, or put more trials into that part of the split"
                )
        return tuple(parts)

    @property
    def task(self) -> str:
        """Gymnasium id of its task."""
        return TrajectoryStore(self.storage).header(self.seeds[:1]).task


def data_sets(experiment: config.Experiment) -> tuple[DataSet, ...]:
    """What the experiment's model is trained on: its own data set, or those that `train.data` names.

    Raises StoreError for one of these that is not complete, ValueError for one that does not fit the experiment.
    """
    if not experiment.train.data:
        return (DataSet(storage=experiment.storage_path, seeds=experiment.collect.seeds, split=experiment.split),)
    found = []
    for storage in map(absolute_storage, experiment.train.data):
        store = TrajectoryStore(storage)
        if not store.finished():
            raise StoreError(f"{storage}: named in train.data, but there is no complete data set; collect it first")
        phases = _snapshots_per_iteration(storage, store.header())
        if phases != experiment.snapshots_per_iteration:
            raise ValueError(
                f"{storage}: {phases} snapshots per PPO iteration do not match the experiment's "
                f"{experiment.snapshots_per_iteration}"
            )
        if experiment.split.folds > len(store.seeds()):
            raise ValueError(
                f"{storage}: split.folds={experiment.split.folds} exceeds its {len(store.seeds())} trials, which "
                "leaves some folds empty"
            )
        found.append(DataSet(storage=storage, seeds=store.seeds(), split=experiment.split))
        if not experiment.split.cut(store.seeds())[0]:
            raise ValueError(
                f"{storage}: split.validation_trials={experiment.split.validation_trials} and split.test_trials="
                f"{experiment.split.test_trials} leave none of its {len(store.seeds())} trials to train on"
            )
    return tuple(found)


def _snapshots_per_iteration(storage: str, header: Header) -> int:
    """Snapshots per PPO iteration of a data set, those that jumps predicted included."""
    try:
        return snapshots_per_iteration(header)
    except KeyError as error:
        raise StoreError(
            f"{storage}: named in train.data, but its trials do not record {error.args[0]}, without which "
            "snapshots have no phase; use a data set of jobs/collect.py"
        ) from error


def training_digest(experiment: config.Experiment) -> str:
    """Digest of the data that the experiment's model is trained on. Raises as `data_sets` does."""
    digests = [one.digest for one in data_sets(experiment)]
    return digests[0] if len(digests) == 1 else digest(*digests)


def run_digest(experiment: config.Experiment, data_digest: str) -> str:
    """What a trained model depends on, without where it is trained."""
    made_of = _made_of(experiment)
    steps = representation_of(experiment.basis).learned_steps(experiment.evaluate)
    source = REPRESENTATIONS.source_digest(experiment.basis.kind)
    return digest(data_digest, *made_of.values(), steps, *([source] if source else []))


def _made_of(experiment: config.Experiment) -> dict[str, dict[str, Any]]:
    """The sections that a trained model depends on, without what changes nothing in it."""
    made_of = {section: identity(getattr(experiment, section)) for section in ("basis", "split", "model", "train")}
    # A model has one seed, and the data sets, wherever they are, are known by their digest.
    for field in ("num_seeds", "data", *representation_of(experiment.basis).not_learned_from):
        made_of["train"].pop(field, None)
    return made_of


def model_folder(experiment: config.Experiment, data_digest: str) -> str:
    """Where `training.train` leaves the model of this experiment and data."""
    return join(experiment.storage_path, "models", run_digest(experiment, data_digest))


def missing_model(experiment: config.Experiment, data_digest: str) -> StoreError:
    """The error for a missing model: which models there are, and how they differ."""
    models = join(experiment.storage_path, "models")
    differences = [
        (_differences(experiment, data_digest, join(models, name)), name) for name in Storage(models).folders()
    ]
    found = sorted(((fields, name) for fields, name in differences if fields), key=lambda item: (len(item[0]), item))
    start = f"{model_folder(experiment, data_digest)}: there is no trained model of this experiment"
    if not found:
        return StoreError(f"{start}, nor any other; run jobs/train.py first")
    named = "; ".join(f"{name} with {_few(fields)}" for fields, name in found[:MODELS_NAMED])
    rest = f" and {len(found) - MODELS_NAMED} more" if len(found) > MODELS_NAMED else ""
    return StoreError(
        f"{start}. Found {named}{rest}. Ask for one of these, or run jobs/train.py with this experiment first"
    )


def _few(fields: list[str]) -> str:
    more = len(fields) - FIELDS_NAMED
    return ", ".join(fields[:FIELDS_NAMED]) + (f" and {more} more different fields" if more > 0 else "")


def _differences(experiment: config.Experiment, data_digest: str, folder: str) -> list[str]:
    """The fields in which a folder's model differs from the requested one; empty where that is unknown."""
    try:
        about = json.loads(read_file(folder, ABOUT_FILE))
        made_by = from_table(about["experiment"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return []  # a training that has not ended, or a model of another making
    presets = [f"preset={made_by.preset!r}, not {experiment.preset!r}"] if made_by.preset != experiment.preset else []
    there, here = ({**_made_of(one), "evaluate": identity(one.evaluate)} for one in (made_by, experiment))
    steps = representation_of(experiment.basis).learned_steps(experiment.evaluate)
    for table in (there, here):
        asked = ("horizon", "extra_horizons") if steps else ()
        table["evaluate"] = {field: table["evaluate"].get(field) for field in asked}
    before, now = dict(flat(there)), dict(flat(here))
    fields = [name for name in now | before if before.get(name) != now.get(name)]
    other_data = ["other data"] if about.get("data_digest", data_digest) != data_digest else []
    return [*other_data, *presets, *(f"{name}={before.get(name)!r}, not {now.get(name)!r}" for name in fields)]
