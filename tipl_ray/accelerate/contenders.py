"""Variants of PPO (`contenders` in the configuration): fewer epochs, other settings, jumps or outer steps.

Knows which experiment a variant runs, and which predictor it jumps with; runs nothing and scores nothing.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tipl_ray.accelerate.group_jumps import Jumps
from tipl_ray.accelerate.jumps import JumpSettings
from tipl_ray.accelerate.outer_steps import OuterSteps
from tipl_ray.accelerate.return_rule import ReturnRule
from tipl_ray.collect.group import outside_sources
from tipl_ray.config import Collect, Contender, Experiment, Jump, RunTask
from tipl_ray.data.storage import join
from tipl_ray.data.trajectory_store import TrajectoryStore
from tipl_ray.digest import digest, identity
from tipl_ray.places import published_rules
from tipl_ray.ppo.algorithms import NOTHING, Extension
from tipl_ray.predict.bands import load_band
from tipl_ray.predict.gram import Question
from tipl_ray.predict.predictor import Combination, Predictor, Trials
from tipl_ray.predict.saved import combinations, load_predictor, save_predictor
from tipl_ray.registry import PREDICTORS

TIPL = "tipl"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Fitted:
    """A predictor that is ready to use."""

    predictor: Combination
    digest: str
    """Digest of everything that its answers depend on."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Unit:
    """A variant with one setting on the seeds of the search or of the results: what runs as one stack of trials."""

    task: str
    """Gymnasium id, followed by the policy's widths if they differ from the experiment's: `HalfCheetah-v4/256-256`."""
    env_steps: int
    contender: Contender
    value: float
    """Value of the searched field, usually the learning rate."""
    search: bool
    """Whether it runs the seeds of the search or those of the results."""

    @property
    def hyperparameters(self) -> str:
        """The searched field and its value, as in tables."""
        return f"{self.contender.searched}={self.value:g}"

    def extension(self, experiment: Experiment, source: Experiment, predictors: Mapping[str, Fitted]) -> Extension:
        """The extension of PPO that it runs with; predictors are by the names of their variants."""
        contender = self.contender
        if contender.outer:
            return OuterSteps(settings=contender.outer)
        if not contender.jump:
            return NOTHING
        fitted, settings = predictors[contender.name], jump_settings(contender, experiment, source)
        return Jumps(settings=settings, predictor=fitted.predictor, digest=fitted.digest)

    def experiment(self, experiment: Experiment, source: Experiment, extension: Extension) -> Experiment:
        """The experiment that it runs, in a storage below the given experiment's, named by a digest of its settings."""
        settings, contender = experiment.accelerate, self.contender
        ppo = contender.ppo_at(experiment.ppo, self.value)
        named = RunTask.read(self.task)
        collect = dataclasses.replace(
            experiment.collect,
            task=named.task,
            total_env_steps=self.env_steps,
            policy_hidden=named.policy_hidden or experiment.collect.policy_hidden,
        )
        if self.search:
            seeds = {"first_seed": settings.search_first_seed, "num_trials": settings.search_trials}
            collect = dataclasses.replace(collect, **seeds)  # type: ignore[arg-type]  # mypy: of all fields' types
        if contender.jump:
            size = source.collect.epochs_per_snapshot
            ppo = dataclasses.replace(ppo, num_epochs=contender.epochs_before_jump(experiment.ppo))
        else:
            # Nothing looks at its snapshots: any that whole epochs lie between will do.
            size = math.gcd(collect.epochs_per_snapshot, ppo.num_epochs)
        made = dataclasses.replace(experiment, collect=dataclasses.replace(collect, epochs_per_snapshot=size), ppo=ppo)
        name = digest(*unit_table(made, extension).values())
        return made.at(join(experiment.storage_path, "units", name))


def epochs_of(contender: Contender, experiment: Experiment) -> int:
    """Update epochs per iteration, those after a jump included."""
    return int(contender.ppo.get("num_epochs", experiment.ppo.num_epochs))


def jump_settings(contender: Contender, experiment: Experiment, source: Experiment) -> JumpSettings:
    """A variant's jump settings. Raises ValueError if the predictor or the number of epochs does not fit."""
    jump, horizon = contender.jump, contender.horizon(experiment.ppo, source)
    assert jump, "it jumps"
    if jump.predictor not in (known := (*combinations(), TIPL, *published_rules())):
        raise ValueError(
            f"{contender.name!r}: jump.predictor={jump.predictor!r} does not combine displacements, which jumps need; "
            f"use one of {', '.join(known)}"
        )
    epochs = contender.epochs_before_jump(experiment.ppo) + horizon * source.collect.epochs_per_snapshot
    if is_learned(contender) and epochs != source.ppo.num_epochs:
        raise ValueError(
            f"{contender.name!r}: jump.horizon={jump.horizon} makes iterations of {epochs} "
            f"epochs, but {jump.predictor} is fitted on iterations of {source.ppo.num_epochs}"
        )
    return JumpSettings(
        horizon=horizon,
        damping=jump.damping,
        networks=jump.networks,
        moments=jump.moments,
        gate=jump.gate,
        corrective_epochs=jump.corrective_epochs,
        kl_limit=jump.kl_limit or (rule.kl_limit if (rule := published(jump)) else 0.0),
    )


def jump_question(contender: Contender, experiment: Experiment, source: Experiment) -> Question:
    """What a variant's predictor is asked: its context, forward steps and snapshots per iteration."""
    settings = jump_settings(contender, experiment, source)
    run = contender.epochs_before_jump(experiment.ppo)
    return Question(
        context=source.model.context,
        steps=tuple(range(1, settings.horizon + 1)),
        snapshots_per_iteration=run // source.collect.epochs_per_snapshot + settings.horizon,
    )


def published(jump: Jump) -> ReturnRule | None:
    """A jump's predictor if it is one that comes with this package, else None."""
    return _published(jump.predictor) if jump.predictor in published_rules() else None


@functools.cache
def _published(name: str) -> ReturnRule:
    rule = load_predictor(name)
    assert isinstance(rule, ReturnRule), "what is published can be asked about any number of epochs"
    return rule


def is_learned(contender: Contender) -> bool:
    """Whether its predictor is fitted on the trials of another experiment, unlike rules and published predictors."""
    if not contender.jump or contender.jump.predictor == TIPL:
        return contender.jump is not None
    if published(contender.jump):
        return False
    return PREDICTORS.load(contender.jump.predictor).fit is not Predictor.fit


def collection_identity(collect: Collect) -> dict[str, Any]:
    """What curves depend on, and the fields that earlier versions included in digests of units and accelerations.

    The engine that runs is known beside it: `auto` and `compiled` make the same curves.
    """
    before = {"trials_per_actor": 0, "physics_threads": 1}
    return {**identity(collect), "engine": "auto", **before, **outside_sources(collect)}


def unit_table(experiment: Experiment, extension: Extension) -> dict[str, dict[str, Any]]:
    """Everything that a unit's learning curves depend on, with its predictor's digest, or None without jumps."""
    still = {"jump": identity(JumpSettings()) | {"predictor": None}}
    ran = {"collect": collection_identity(experiment.collect), "ppo": identity(experiment.ppo)}
    return {**ran, **still, **extension.header}


def save_rule(question: Question, jump: Jump, folder: str) -> None:
    """Write a predictor that needs no fitting, for `saved.load_predictor`."""
    predictor = rule.asked(question) if (rule := published(jump)) else PREDICTORS.load(jump.predictor)(question)
    if jump.numbers:
        predictor.fitted = {"numbers": np.array(jump.numbers)}
    save_predictor(predictor, folder, {})


def fit_and_save(source: Experiment, question: Question, names: Sequence[str], folder: str) -> None:
    """Fit predictors on the training trials of another experiment, and choose their settings on its validation trials.

    Its test trials are not read, and diverged trials are left out. Writes one folder each, for `saved.load_predictor`.
    """
    store = TrajectoryStore(source.storage_path)
    training, validation = (
        Trials(bands=[load_band(source.storage_path, seed, question) for seed in seeds], weights=lambda: [])
        for seeds in map(store.sound, (source.train_seeds, source.validation_seeds))
    )
    about = {"trained_on": source.collect.task, "data": store.digest(source.train_seeds)}
    for name in names:
        predictor = PREDICTORS.load(name)(question)
        predictor.fit(training, validation)
        save_predictor(predictor, join(folder, name), about)
