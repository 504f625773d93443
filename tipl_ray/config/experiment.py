"""One experiment, as a tree of frozen dataclasses: read from TOML, overridden on the command line, checked once.

Does not import Ray, torch or MLflow, so that `--help` is instant. Everything that can be derived is a property.
"""

import dataclasses
import functools
from collections.abc import Collection, Iterator, Sequence
from typing import Any, Literal, Self

import pydantic

from tipl_ray.config.fields import LARGEST, NO_IDENTITY, STRICT, check_limits, check_name, naming
from tipl_ray.config.jumps import Accelerate, Improve, RunTask
from tipl_ray.config.sections import Basis, Collect, Evaluate, Model, Ppo, Split, Sweep, Train, Where
from tipl_ray.digest import as_table, flat, redacted
from tipl_ray.errors import no_such
from tipl_ray.places import absolute_storage, check_text, default_storage
from tipl_ray.registry import PREDICTORS, REPRESENTATIONS

_LEARNING = (
    *("preset", "collect", "-collect.engine", "-collect.iterations_per_commit", "ppo"),
    *("split", "basis", "model", "train", "evaluate.horizon", "evaluate.extra_horizons"),
)
JOBS: dict[str, tuple[str, ...]] = {
    "collect": ("collect", "ppo", "where.trials_per_actor", "where.physics_threads"),
    "train": (*_LEARNING, "where.num_workers", "where.use_gpu"),
    "evaluate": (*_LEARNING, "evaluate"),
    "cross_validate": (
        *(*_LEARNING, "-split.validation_trials", "-split.test_trials", "-split.fold", "evaluate"),
        *("where.num_workers", "where.use_gpu"),
    ),
    "sweep": (
        *(*_LEARNING, "-train.num_seeds", "-train.data", "sweep"),
        *("where.trainer", "where.num_workers", "where.max_concurrent_trials"),
        *("where.cpus_per_trial", "where.gpus_per_trial"),
    ),
    "accelerate": (
        *("collect", "-collect.task", "ppo", "-ppo.learning_rate"),
        *("accelerate", "-accelerate.contenders", "evaluate.confidence", "where.physics_threads"),
        *("where.predictors_from", "where.predictors_storage", "where.units_at_once", "where.keep_weights"),
    ),
    "find_rule": (
        *("collect", "-collect.task", "-collect.iterations_per_commit", "-collect.algorithm", "ppo"),
        *("-collect.num_trials", "-collect.first_seed", "-ppo.learning_rate", "improve", "-improve.regimes"),
        *("-improve.stages", "-improve.pairs", "-improve.spread", "-improve.iterations", "-improve.models"),
        *("-improve.model_steps", "where.physics_threads", "where.units_at_once"),
        *("where.predictors_from", "where.predictors_storage"),
    ),
    "fork": (
        *("collect", "-collect.task", "-collect.iterations_per_commit", "-collect.algorithm", "ppo"),
        *("-ppo.learning_rate", "improve", "-improve.regimes", "-improve.generations", "-improve.population"),
        *("-improve.searches", "-improve.search_first_seed", "-improve.search_trials"),
        *("-improve.models", "-improve.model_steps", "where.physics_threads", "where.units_at_once"),
        *("where.predictors_from", "where.predictors_storage"),
    ),
    "learn_jumps": (
        *("collect", "-collect.task", "-collect.iterations_per_commit", "-collect.algorithm", "ppo"),
        *("-ppo.learning_rate", "split", "improve", "-improve.regimes", "-improve.generations", "-improve.population"),
        *("-improve.searches", "-improve.search_first_seed", "-improve.search_trials", "evaluate.bootstrap"),
        *("evaluate.confidence", "evaluate.seed", "where.units_at_once"),
        *("where.predictors_from", "where.predictors_storage"),
    ),
}
"""The sections and fields of an experiment that each job reads; a leading dash marks the exceptions."""

EVERY_JOB = ("name", "where.storage", "where.tracking")
"""What every job reads as well."""

IMPROVING = ("find_rule", "fork", "learn_jumps")
"""Jobs that tune jumps, in the regimes of [improve]."""

LEARNING = ("train", "evaluate", "cross_validate", "sweep")
"""Jobs that split the trials in three and cut them into windows of the model's context."""


@pydantic.with_config(STRICT)
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Experiment:
    """One experiment: what to collect, how to reduce it, which model to train and how to evaluate it."""

    name: str = dataclasses.field(metadata=NO_IDENTITY)
    """Name of the experiment and of its folder in the default storage."""
    where: Where = dataclasses.field(default_factory=Where, metadata=NO_IDENTITY)
    preset: Literal["causal", "paper", "paper-residual", "per-weight"] = "paper"
    """Set of defaults for basis, model and training: `paper` is the paper's Transformer on its Temporal SVD;
    `paper-residual` is the same Transformer on the same tokens, predicting how each changes, which is added to the last
    snapshot; `causal` is ours, on the basis `window`; `per-weight` is ours with a correction for each weight. Sections
    [causal.train], [paper.train] and so on in the file apply to one of them."""
    collect: Collect = dataclasses.field(default_factory=Collect)
    ppo: Ppo = dataclasses.field(default_factory=Ppo)
    split: Split = dataclasses.field(default_factory=Split)
    basis: Basis = dataclasses.field(default_factory=Basis)
    model: Model = dataclasses.field(default_factory=Model)
    train: Train = dataclasses.field(default_factory=Train)
    evaluate: Evaluate = dataclasses.field(default_factory=Evaluate)
    accelerate: Accelerate = dataclasses.field(default_factory=Accelerate)
    improve: Improve = dataclasses.field(default_factory=Improve)
    sweep: Sweep = dataclasses.field(default_factory=Sweep)

    @property
    def storage_path(self) -> str:
        """Absolute folder, or the URI as given; absolute because Ray changes the working directory of its workers."""
        storage = self.where.storage
        return default_storage(self.name) if storage is None else absolute_storage(storage)

    def at(self, storage: str | None) -> Self:
        """This experiment, kept in a storage."""
        return dataclasses.replace(self, where=dataclasses.replace(self.where, storage=storage))

    @property
    def num_iterations(self) -> int:
        """PPO iterations per trial."""
        return self.collect.total_env_steps // self.ppo.num_steps

    @property
    def env_steps_per_trial(self) -> int:
        """Environment steps per trial, in whole iterations."""
        return self.num_iterations * self.ppo.num_steps

    @property
    def snapshots_per_iteration(self) -> int:
        """Snapshots per iteration, each taken after epochs_per_snapshot update epochs."""
        return self.ppo.num_epochs // self.collect.epochs_per_snapshot

    @property
    def num_snapshots(self) -> int:
        """Snapshots per trial T, including the initial one."""
        return 1 + self.num_iterations * self.snapshots_per_iteration

    @property
    def train_seeds(self) -> tuple[int, ...]:
        return self.split.cut(self.collect.seeds)[0]

    @property
    def validation_seeds(self) -> tuple[int, ...]:
        return self.split.cut(self.collect.seeds)[1]

    @property
    def test_seeds(self) -> tuple[int, ...]:
        return self.split.cut(self.collect.seeds)[2]

    @property
    def training_runs(self) -> "tuple[Experiment, ...]":
        """This experiment once for each of its `train.num_seeds` seeds."""
        seeds = range(self.train.seed, self.train.seed + self.train.num_seeds)
        return tuple(
            dataclasses.replace(self, train=dataclasses.replace(self.train, seed=seed, num_seeds=1)) for seed in seeds
        )

    def check(self, *jobs: str) -> Self:
        """Refuse what these jobs of `JOBS` cannot run; without jobs, what any of them cannot.

        Raises ValueError naming the field, the value and the limit.
        """
        self.check_fields()
        wanted = jobs or tuple(JOBS)
        self._check_trials(wanted)
        if set(wanted) & set(LEARNING):
            self._check_learning()
        if {"evaluate", "cross_validate"} & set(wanted) and self.evaluate.run_policies_of:
            self._check_policies_run()
        if "sweep" in wanted:
            metrics = ["skill", *(f"skill_h{step}" for step in self.evaluate.steps)]
            if self.sweep.metric not in metrics:
                raise no_such("sweep.metric", self.sweep.metric, metrics)
        if "accelerate" in wanted:
            self._check_acceleration()
        # Only where they are asked for: an experiment of few steps or trials has nothing to fork or learn from.
        if set(IMPROVING) & set(jobs):
            self._check_regimes()
        if "fork" in jobs:
            self._check_forks()
        if "learn_jumps" in jobs:
            self._check_split()
        return self

    def check_fields(self) -> Self:
        """Refuse values that no job can use. Raises ValueError naming the field, the value and the limit."""
        parts = list(_parts(self))
        for prefix, part in parts:
            _check_texts(prefix, part)
        check_name("name", self.name, self.name)
        check_limits(self)
        places = [("storage", self.where.storage), ("predictors_storage", self.where.predictors_storage)]
        for named, place in places + [("train.data", storage) for storage in self.train.data]:
            if place:
                check_place(named, place)
        for _, part in parts[1:]:
            if hasattr(part, "check"):
                part.check()
        return self

    def _check_trials(self, jobs: Collection[str]) -> None:
        steps = {f"collect.total_env_steps={self.collect.total_env_steps}": self.collect.total_env_steps}
        if "accelerate" in jobs:
            for field in ("tasks", "search_tasks"):
                given = {task: RunTask.read(task).env_steps for task in getattr(self.accelerate, field)}
                steps |= {f"accelerate.{field}={task}": count for task, count in given.items() if count}
        for where, count in steps.items():
            if count < self.ppo.num_steps:
                raise ValueError(f"{where} is less than one PPO iteration, ppo.num_steps={self.ppo.num_steps}")
        if set(jobs) - {"accelerate"} and self.ppo.num_epochs % self.collect.epochs_per_snapshot:
            raise ValueError(
                f"collect.epochs_per_snapshot={self.collect.epochs_per_snapshot} does not divide "
                f"ppo.num_epochs={self.ppo.num_epochs}"
            )
        if self.num_snapshots > LARGEST:
            raise ValueError(
                f"collect.total_env_steps={self.collect.total_env_steps} gives {self.num_snapshots} snapshots per "
                f"trial, more than {LARGEST}"
            )

    def _check_learning(self) -> None:
        if self.train.batch_size % self.where.num_workers:
            raise ValueError(
                f"num_workers={self.where.num_workers} does not divide train.batch_size={self.train.batch_size}"
            )
        self._check_split()
        self._check_windows()

    def _check_split(self) -> None:
        held_out = self.split.validation_trials + self.split.test_trials
        if self.split.folds > self.collect.num_trials:
            raise ValueError(
                f"split.folds={self.split.folds} exceeds the number of trials: "
                f"collect.num_trials={self.collect.num_trials}"
            )
        if not self.split.folds and held_out >= self.collect.num_trials:
            raise ValueError(
                f"split.validation_trials + split.test_trials = {held_out} leaves no trial to train on: "
                f"collect.num_trials={self.collect.num_trials}"
            )

    def _check_windows(self) -> None:
        representation = REPRESENTATIONS.load(self.basis.kind)(self.basis)
        representation.check(self)
        if self.train.data and not representation.across_tasks:
            raise ValueError(
                f"train.data={self.train.data} requires basis.kind=window: tokens of {self.basis.kind!r} are for one "
                "task"
            )
        furthest = max(self.evaluate.horizon, *self.evaluate.extra_horizons, 0)
        needed = self.model.context + furthest
        if needed >= self.num_snapshots:
            raise ValueError(
                f"model.context={self.model.context} + the furthest forward step {furthest} = {needed} displacements, "
                f"more than the {self.num_snapshots - 1} of a trial"
            )

    def _check_policies_run(self) -> None:
        known = known_predictors(self.evaluate.predictors)
        for name in self.evaluate.run_policies_of:
            if name not in known:
                raise no_such("evaluate.run_policies_of", name, known)
        brought = {name: REPRESENTATIONS.load(name).own_predictors for name in REPRESENTATIONS.own}
        missing = {name for names in brought.values() for name in names}
        missing -= set(REPRESENTATIONS.load(self.basis.kind).own_predictors)
        if not self.train.data:
            missing.add("ridge-elsewhere")
        if missing.issuperset(self.evaluate.run_policies_of):
            raise ValueError(
                f"evaluate.run_policies_of={self.evaluate.run_policies_of}: none of these is a predictor of "
                f"basis.kind={self.basis.kind!r}{'' if self.train.data else ' without train.data'}"
            )

    def _check_acceleration(self) -> None:
        settings, reported = self.accelerate, self.collect.seeds
        searched = range(settings.search_first_seed, settings.search_first_seed + settings.search_trials)
        if reported[0] <= searched[-1] and searched[0] <= reported[-1]:
            raise ValueError(
                f"accelerate.search_first_seed={searched[0]} and accelerate.search_trials={len(searched)} overlap "
                f"the seeds {reported[0]} to {reported[-1]}, which are reserved for the results"
            )
        tasks = [*settings.tasks, *settings.search_tasks]
        shortest = min(RunTask.read(task).env_steps or self.collect.total_env_steps for task in tasks)
        for contender in settings.running:
            with naming("accelerate.contenders"):
                contender.check_on(self.ppo, settings.values_of(contender), shortest)

    def _check_regimes(self) -> None:
        for regime in self.improve.regimes:
            with naming("improve.regimes"):
                regime.check_on(self.ppo, regime.values, self.collect.total_env_steps)

    def _check_forks(self) -> None:
        for regime in self.improve.regimes:
            for value in regime.values:
                ppo = regime.ppo_at(self.ppo, value)
                iterations = self.collect.total_env_steps // ppo.num_steps
                if iterations - self.improve.iterations < self.improve.stages:
                    raise ValueError(
                        f"improve.stages={self.improve.stages} forks do not fit before the last "
                        f"improve.iterations={self.improve.iterations} iterations: a trial of improve.regimes "
                        f"{regime.name!r} with collect.total_env_steps={self.collect.total_env_steps} has only "
                        f"{iterations}"
                    )


def known_predictors(outside: Sequence[str] = ()) -> tuple[str, ...]:
    """Predictor names in a result table: this package's, those that come with representations, and the user's own."""
    brought = [name for kind in REPRESENTATIONS.own for name in REPRESENTATIONS.load(kind).own_predictors]
    return tuple(dict.fromkeys([*PREDICTORS.own, *brought, *(PREDICTORS.load(name).name for name in outside)]))


@functools.cache
def every_field() -> tuple[str, ...]:
    """All fields of an experiment by their dotted names, in order."""
    return tuple(name for name, _ in flat(as_table(Experiment(name="any"))))


def fields_read(jobs: Collection[str]) -> tuple[str, ...]:
    """Fields of an experiment that at least one of these jobs reads, by their dotted names, in order."""

    def holds(parts: Sequence[str], field: str) -> bool:
        return any(field == part or field.startswith(f"{part}.") for part in parts)

    left_out = {job: [part.removeprefix("-") for part in JOBS[job] if part.startswith("-")] for job in jobs}
    return tuple(
        field
        for field in every_field()
        if any(holds((*EVERY_JOB, *JOBS[job]), field) and not holds(left_out[job], field) for job in jobs)
    )


def check_place(field: str, place: str) -> None:
    """Raise ValueError for a folder or URI that carries credentials or unknown options."""
    if redacted(place) != place:
        raise ValueError(
            f"{field}={redacted(place)!r} contains credentials, which every log would show, or an option other than "
            "endpoint_override, scheme and region; pass credentials by the environment or a profile"
        )


def _parts(part: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """A configuration and every section in it, each with the prefix of its fields' names in errors."""
    yield prefix, part
    for field in dataclasses.fields(part):
        if dataclasses.is_dataclass(section := getattr(part, field.name)):
            yield from _parts(section, f"{prefix}{field.name}.".removeprefix("where."))


def _check_texts(prefix: str, part: Any) -> None:
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        for one in value if isinstance(value, tuple) else (value,):
            if isinstance(one, str):
                check_text(f"{prefix}{field.name}", one)
