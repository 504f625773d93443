"""One experiment, as a tree of frozen dataclasses: read from TOML, overridden on the command line, checked once.

Knows nothing of Ray, torch or MLflow, so that `--help` is instant. Everything that can be derived is a property.
The defaults are the paper's (Section 4.1) and, where the paper is silent, what docs/declared.md says.
"""

import dataclasses
import functools
import json
import unicodedata
from collections.abc import Collection, Iterator, Sequence
from typing import Annotated, Any, Literal, Self

import pydantic
import tyro
from pydantic import Field

from tipl_ray.digest import as_table, flat, published, redacted
from tipl_ray.errors import nearest, no_such
from tipl_ray.places import absolute_storage, check_text, default_storage
from tipl_ray.registry import PREDICTORS, REPRESENTATIONS

LARGEST = 2**31 - 1
"""Most that a whole number may be: what the data set's columns and every library's seeds hold."""

MAX_NAME_BYTES = 100


LATER = {"later": True}
"""Metadata of fields that came later: they count in names and digests where they differ from their default."""

NO_IDENTITY = {"identity": False}
"""Metadata of fields that no result depends on; see `digest.identity`."""

STRICT = pydantic.ConfigDict(extra="forbid", allow_inf_nan=False)

Natural = Annotated[int, Field(ge=0, le=LARGEST)]
Count = Annotated[int, Field(ge=1, le=LARGEST)]
Step = Annotated[int, Field(ge=1, le=10_000)]
Width = Annotated[int, Field(ge=1, le=16_384)]
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(ge=1e-37, le=1e37)]
"""What float32 holds, above 0."""

_LEARNING = (
    *("preset", "collect", "-collect.engine", "-collect.iterations_per_commit", "ppo"),
    *("split", "basis", "model", "train", "evaluate.horizon", "evaluate.extra_horizons"),
)
JOBS: dict[str, tuple[str, ...]] = {
    "collect": ("collect", "ppo", "where.trials_per_actor", "where.physics_threads"),
    "train": (*_LEARNING, "where.num_workers", "where.use_gpu"),
    "evaluate": (*_LEARNING, "evaluate"),
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
        *("-improve.stages", "-improve.pairs", "-improve.spread", "-improve.iterations", "where.physics_threads"),
        "where.units_at_once",
    ),
    "fork": (
        *("collect", "-collect.task", "-collect.iterations_per_commit", "-collect.algorithm", "ppo"),
        *("-ppo.learning_rate", "improve", "-improve.regimes", "-improve.generations", "-improve.population"),
        *("-improve.searches", "-improve.search_first_seed", "-improve.search_trials"),
        *("where.physics_threads", "where.units_at_once"),
    ),
}
"""What each job reads of an experiment: sections and fields, and with a dash what of them it does not."""

EVERY_JOB = ("name", "where.storage", "where.tracking")
"""What each of them reads too."""

LEARNING = ("train", "evaluate", "sweep")
"""Jobs that cut the trials in three and look at them through the model's context."""


@pydantic.with_config(STRICT)
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Ppo:
    """PPO; the defaults are CleanRL's `ppo_continuous_action.py`, no hyperparameter changed."""

    num_steps: Annotated[int, Field(ge=1, le=10_000_000)] = 2048
    """Environment steps that a trial takes per iteration."""
    num_minibatches: Annotated[int, Field(ge=1, le=10_000_000)] = 32
    """Minibatches per update epoch; each has num_steps / num_minibatches samples."""
    num_epochs: Annotated[int, Field(ge=1, le=10_000)] = 10
    """Update epochs per iteration."""
    learning_rate: Positive = 3e-4
    """Adam's learning rate at the first iteration."""
    schedule: Literal["linear", "constant"] = dataclasses.field(default="linear", metadata=LATER)
    """The learning rate over the trial: annealed linearly to 0, or constant."""
    policy_rate_ratio: Positive = dataclasses.field(default=1.0, metadata=LATER)
    """The policy's learning rate as a multiple of the critic's, which is learning_rate."""
    desired_kl: Annotated[float, Field(ge=0, le=1e6)] = dataclasses.field(default=0.0, metadata=LATER)
    """Adapt the learning rate after each update epoch to keep the policy's approximate KL divergence from the one that
    collected near this, as rl_games does: divided by 1.5 above twice of it, multiplied by 1.5 below half of it, within
    1e-6 and 1e-2. 0 leaves the learning rate alone; needs schedule constant."""
    target_kl: Annotated[float, Field(ge=0, le=1e6)] = dataclasses.field(default=0.0, metadata=LATER)
    """End an iteration's update epochs after one whose last minibatch has an approximate KL divergence above this, as
    CleanRL does; the snapshots still to come repeat the last. 0 runs them all."""
    adam_epsilon: Positive = 1e-5
    """Adam's epsilon."""
    gamma: Share = 0.99
    """Discount factor, of returns and of the reward normalisation."""
    gae_lambda: Share = 0.95
    """Lambda of generalised advantage estimation."""
    clip_coefficient: Positive = 0.2
    """Clipping of the probability ratio and of the value's change."""
    clip_values: bool = dataclasses.field(default=True, metadata=LATER)
    """Clip the value's change in the value loss."""
    drift: Literal["clip", "dpo"] = dataclasses.field(default="clip", metadata=LATER)
    """What keeps the policy near the one that collected: PPO's clipping, or the drift of Discovered Policy Optimisation
    (arXiv 2210.05639), which has no clip_coefficient."""
    bootstrap_truncated: bool = dataclasses.field(default=False, metadata=LATER)
    """Add gamma times the critic's value of where an episode was cut off by its time limit to its last reward, as
    stable-baselines3 does; CleanRL takes such an end for any other."""
    recompute_advantages: bool = dataclasses.field(default=False, metadata=LATER)
    """Compute values, advantages and returns anew before each update epoch, by the critic as it is then."""
    replicas: Annotated[int, Field(ge=1, le=64)] = dataclasses.field(default=1, metadata=LATER)
    """Copies of networks and optimizer that each train on the rollout, with minibatches shuffled in their own order;
    the iteration ends with their mean (CAPO, arXiv 2603.12596, in parameter space)."""
    entropy_coefficient: Annotated[float, Field(ge=0, le=1e6)] = 0.0
    """Weight of the entropy bonus."""
    value_coefficient: Annotated[float, Field(ge=0, le=1e6)] = 0.5
    """Weight of the value loss."""
    max_gradient_norm: Positive = 0.5
    """Limit of the gradient's norm, over actor, log-std and critic together."""
    activation: Literal["tanh", "relu"] = dataclasses.field(default="tanh", metadata=LATER)
    """Of the hidden layers of policy and critic."""
    initialisation: Literal["orthogonal", "uniform"] = dataclasses.field(default="orthogonal", metadata=LATER)
    """Of the networks: CleanRL's orthogonal weights, or torch's default, uniform within 1 / sqrt(inputs)."""
    initial_log_std: Annotated[float, Field(ge=-20, le=10)] = dataclasses.field(default=0.0, metadata=LATER)
    """Logarithm of the standard deviation of a fresh policy's actions."""

    @property
    def minibatch_size(self) -> int:
        return self.num_steps // self.num_minibatches

    def check(self) -> None:
        if self.desired_kl and self.schedule != "constant":
            raise ValueError(
                f"ppo.desired_kl={self.desired_kl} adapts the learning rate, and ppo.schedule={self.schedule!r} sets "
                "it: give ppo.schedule=constant"
            )
        if self.replicas > 1 and (self.desired_kl or self.target_kl):
            raise ValueError(
                f"ppo.replicas={self.replicas} are averaged after the same number of steps at the same learning rate, "
                "which ppo.desired_kl and ppo.target_kl would give each of its own"
            )
        if self.num_steps % self.num_minibatches or self.minibatch_size < 2:
            raise ValueError(
                f"ppo.num_minibatches={self.num_minibatches} does not cut the {self.num_steps} steps of an iteration "
                "into equal minibatches of at least 2"
            )


@pydantic.with_config(STRICT)
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Collect:
    """The PPO trials whose policy weights become the data set."""

    task: str = "InvertedPendulum-v4"
    """Gymnasium id of the task, or module:ID where a module registers it; or a class of one's own as module:Name."""
    task_options: dict[str, bool | int | float | str] = dataclasses.field(
        default_factory=dict, hash=False, metadata=LATER
    )
    """Keyword arguments of gymnasium's environment; where there are any it runs in gymnasium's own class. In the
    experiment's file alone."""
    num_trials: Annotated[int, Field(ge=1, le=100_000)] = 50
    """Number of trials; their seeds count up from first_seed."""
    first_seed: Natural = 1
    """Seed of the first trial."""
    total_env_steps: Count = 800_000
    """Environment steps per trial; whole iterations of ppo.num_steps are run."""
    policy_hidden: tuple[Width, Width] = (8, 8)
    """Widths of the policy's two hidden layers."""
    critic_hidden: tuple[Width, Width] = (64, 64)
    """Widths of the critic's two hidden layers (the paper gives the policy's alone; these are CleanRL's)."""
    epochs_per_snapshot: Count = 2
    """PPO update epochs between two stored snapshots; must divide ppo.num_epochs."""
    iterations_per_commit: Count = 20
    """PPO iterations between two commits of a trial: what a kill can cost at most."""
    algorithm: str = dataclasses.field(default="ppo", metadata=LATER)
    """What trains the policies: `ppo`, an entry point of the group `tipl_ray.algorithms`, or a class of one's own as
    module:Name."""
    engine: Literal["auto", "compiled", "torch", "cuda"] = "auto"
    """What runs the networks: `compiled` (C++, needs g++), `torch`, `cuda` (torch on one GPU per actor), or `auto`:
    compiled where g++ is found, else torch."""

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(range(self.first_seed, self.first_seed + self.num_trials))

    def check(self) -> None:
        _check_last_seed("collect", "first_seed", self.first_seed, self.num_trials)


@pydantic.with_config(STRICT)
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """Held-out trials, by trial and never by window: the last seeds report, those before choose, the rest train."""

    validation_trials: Count = 5
    """Trials that choose: early stopping, hyperparameters."""
    test_trials: Count = 5
    """Trials that report: every figure of the evaluation."""

    def cut(self, seeds: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Seeds to train, to choose and to report."""
        first, second = len(seeds) - self.validation_trials - self.test_trials, len(seeds) - self.test_trials
        return seeds[: max(first, 0)], seeds[max(first, 0) : second], seeds[second:]


@pydantic.with_config(STRICT)
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Basis:
    """How snapshots become tokens and tokens become weights (Section 3.2)."""

    kind: str = "trial"
    """`trial`: Temporal SVD of the trial's own trajectory, the paper's, not causal; `raw`: the weights themselves;
    `shared`: one Temporal SVD of all training trials, causal; `window`: the displacements of the context, known by
    their inner products alone, causal; or `module:Name`, a representation of one's own (docs/extending.md)."""
    rank: Count = 32
    """SVD rank D of `trial` and `shared`."""
    centred: bool = False
    """Subtract the trajectory's mean before the SVD."""
    deltas: bool = False
    """Subtract the trajectory's first snapshot before the SVD."""

    def check(self) -> None:
        REPRESENTATIONS.check("basis.kind", self.kind)
        if self.centred and self.deltas:
            raise ValueError("basis.centred=True and basis.deltas=True exclude each other: choose one origin")


@pydantic.with_config(STRICT)
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """The causal Transformer (Section 3.3), by default of Decision Transformer's size for gym."""

    context: Annotated[int, Field(ge=2, le=LARGEST)] = 20
    """Context length K: the tokens that the model sees; snapshots, or with basis `window` displacements between."""
    embedding: Annotated[int, Field(ge=1, le=65_536)] = 128
    """Width of a token inside the model."""
    layers: Annotated[int, Field(ge=1, le=1_000)] = 3
    """Transformer blocks."""
    heads: Annotated[int, Field(ge=1, le=65_536)] = 1
    """Attention heads per block; must divide embedding."""
    dropout: Annotated[float, Field(ge=0, le=0.95)] = 0.1
    """Dropout of embeddings, attention and blocks."""
    phase: bool = True
    """Basis `window`: tell the model the phase, where in its PPO iteration each displacement was made."""
    clock: Literal["none", "progress", "learning_rate"] = "progress"
    """Basis `window`: what tells the model how far the trial has come: its share of snapshots, or PPO's annealing."""

    def check(self) -> None:
        if self.embedding % self.heads:
            raise ValueError(f"model.heads={self.heads} does not divide model.embedding={self.embedding}")


@pydantic.with_config(STRICT)
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Train:
    """How the Transformer is trained; the defaults are the paper's 50 iterations of 10,000 batches."""

    num_steps: Count = 500_000
    """Optimisation steps."""
    steps_per_iteration: Count = 10_000
    """Steps between two validations, each with a checkpoint."""
    batch_size: Annotated[int, Field(ge=1, le=1_000_000)] = 64
    """Windows per step, over all workers together."""
    learning_rate: Positive = 1e-4
    """AdamW's learning rate after the warm-up."""
    weight_decay: Annotated[float, Field(ge=0, le=1e6)] = 1e-4
    """AdamW's weight decay."""
    warmup_steps: Natural = 10_000
    """Steps of linear warm-up."""
    schedule: Literal["constant", "cosine"] = "constant"
    """The learning rate after the warm-up: constant, or falling to 0 at the last step on half a cosine."""
    max_gradient_norm: Positive = 0.25
    """Limit of the gradient's norm."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the matrix products inside the Transformer's blocks while it trains; all else, and validation, is float32.
    `bfloat16` takes half the time where the processor or GPU has instructions for it, and is slow where not."""
    joined_windows: Share = 0.0
    """Basis `window`: share of a batch's windows that are put beside others, so that each stands for a policy that is
    made of several."""
    seed: Natural = 0
    """Seed of initialisation, batches and dropout."""
    num_seeds: Annotated[int, Field(ge=1, le=10_000)] = 1
    """Models that are trained, on seeds that count up from `seed`; the evaluation judges them all."""
    data: tuple[str, ...] = ()
    """Basis `window`: storages of the data sets to train on in place of this experiment's own; the split holds in
    each."""

    def check(self) -> None:
        _check_last_seed("train", "seed", self.seed, self.num_seeds)
        _check_once("train", "data", [absolute_storage(storage) for storage in self.data])


@pydantic.with_config(STRICT)
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Evaluate:
    """How predicted weights are judged: WPE, skill and REPW (Section 4)."""

    horizon: Step = 10
    """Forward steps that are predicted, from 1 on."""
    extra_horizons: tuple[Step, ...] = ()
    """Forward steps beyond them that are predicted too, rising."""
    windows_per_trial: Count = 20
    """Windows per test trial whose policies are run for REPW, evenly spaced; WPE takes every window."""
    run_policies_of: tuple[str, ...] = ("copy-last", "linear", "ridge", "tipl", "svd-floor", "window-floor")
    """Predictors whose policies are run, by their names in the result table; WPE takes all predictors, and of
    none no policy is run."""
    predictors: tuple[str, ...] = dataclasses.field(default=(), metadata=LATER)
    """Predictors of one's own that are compared too, as `module:Name` (docs/extending.md)."""
    episodes: Annotated[int, Field(ge=1, le=1_000_000)] = 10
    """Evaluation episodes E per policy; the noise floor takes as many again on other seeds."""
    sampled_actions: bool = False
    """Sample actions from the policy instead of taking its mean."""
    bootstrap: Annotated[int, Field(ge=1, le=1_000_000)] = 1000
    """Bootstrap resamples over trials behind each confidence interval."""
    confidence: Annotated[float, Field(ge=0.5, le=0.999)] = 0.95
    """Level of the confidence intervals."""
    seed: Natural = 0
    """Seed of the evaluation episodes and of the bootstrap."""

    @property
    def steps(self) -> tuple[int, ...]:
        """Every forward step that is predicted."""
        return (*range(1, self.horizon + 1), *self.extra_horizons)

    def check(self) -> None:
        for name in self.predictors:
            PREDICTORS.check("evaluate.predictors", name)
        _check_once("evaluate", "predictors", self.predictors)
        _check_once("evaluate", "run_policies_of", self.run_policies_of)
        extra = (self.horizon, *self.extra_horizons)
        if list(extra) != sorted(set(extra)):
            raise ValueError(
                f"evaluate.extra_horizons={self.extra_horizons} do not rise from beyond evaluate.horizon={self.horizon}"
            )


@pydantic.with_config(STRICT)
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Jump:
    """A jump at the end of every PPO iteration, by a predictor of snapshots."""

    predictor: str
    """Name of a predictor that combines displacements, or `tipl`, the Transformer that predictors_from has trained."""
    horizon: Annotated[int, Field(ge=0, le=10_000)] = 0
    """Snapshots that the jump stands for and that end the iteration; 0 for those that an iteration of predictors_from
    has beyond the epochs run before it."""
    damping: Annotated[float, Field(gt=0, le=1e6)] = 1.0
    """Share of the forecast that is taken; above 1 goes further."""
    networks: Literal["policy", "both"] = "policy"
    """What jumps: the policy alone, or the critic too, by a forecast of its own."""
    moments: Literal["kept", "reset"] = "kept"
    """Adam's moments and step count after a jump."""
    gate: bool = False
    """Keep a jump only if the surrogate objective on the stored rollout does not fall."""
    corrective_epochs: Annotated[int, Field(ge=0, le=10_000)] = 0
    """Update epochs of ppo.num_epochs that are run after the jump, and not before it."""
    kl_limit: Annotated[float, Field(ge=0, le=1e6)] = 0.0
    """Shorten a jump that would lead to a larger approximate KL divergence from the policy that collected; 0 does not.
    """
    numbers: tuple[float, ...] = ()
    """Of the predictor `return-rule`: what its jumps count, as accelerate/return_rule.py says."""


@pydantic.with_config(STRICT)
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class OuterStep:
    """What a PPO iteration moved as the gradient of an outer optimizer: SGD with Nesterov's momentum (outer-PPO, arXiv
    2411.00666)."""

    rate: Positive = 1.0
    """The outer learning rate; 1 without momentum is PPO."""
    momentum: Share = 0.0
    """Share of the outer velocity that is left after an iteration."""
    networks: Literal["policy", "both"] = "both"
    """What it moves: the policy alone, or the critic too."""


@pydantic.with_config(STRICT)
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Contender:
    """A way to run PPO's updates."""

    name: str
    """What tables and pictures call it."""
    ppo: dict[str, bool | int | float | str] = dataclasses.field(default_factory=dict, hash=False)
    """Fields of [ppo] that it has otherwise."""
    jump: Jump | None = None
    """How it jumps, if it does."""
    outer: OuterStep | None = None
    """Its outer step, if it has one."""
    searched: str = "learning_rate"
    """Number of [ppo] that is chosen for it by the search."""
    values: tuple[float, ...] = ()
    """What that is chosen from, rising; accelerate.learning_rates where nothing is said, and as many as those."""
    per_task: bool = False
    """Choose for each task by itself, on search seeds of that task: an oracle where others have one setting for all."""

    def check(self) -> None:
        """Refuse what means nothing. Raises ValueError naming the contender."""
        try:
            check_text("name", self.name)
            if self.jump and self.outer:
                raise ValueError("a jump and an outer step are both given")
            if self.searched in self.ppo:
                raise ValueError(f"ppo.{self.searched}={self.ppo[self.searched]!r} is what is searched")
            if list(self.values) != sorted(set(self.values)):
                raise ValueError(f"values={list(self.values)} do not rise")
            if self.searched != "learning_rate" and not self.values:
                raise ValueError(f"ppo.{self.searched} is searched, and values are not given")
            if self.jump and len(self.jump.numbers) not in (0, 7 if self.jump.predictor == "return-rule" else 0):
                raise ValueError(f"jump.numbers={list(self.jump.numbers)} are not the 7 of a return-rule")
            if self.jump and self.jump.predictor not in (known := (*PREDICTORS.names(), "tipl")):
                raise no_such("jump.predictor", self.jump.predictor, known)
        except ValueError as error:
            raise ValueError(f"accelerate.contenders: {self.name!r}: {error}") from error

    def ppo_at(self, ppo: Ppo, value: float) -> Ppo:
        """Its own PPO, made of another, at a value of what is searched. Raises ValueError naming the contender."""
        table = {**self.ppo, self.searched: value}
        try:
            made: Ppo = validated(Ppo, as_table(ppo) | table, "ppo.")
            made.check()
        except ValueError as error:
            raise ValueError(f"accelerate.contenders: {self.name!r}: {error}") from error
        return made

    def epochs_before_jump(self, ppo: Ppo) -> int:
        """Update epochs that an iteration runs before its jump."""
        return int(self.ppo.get("num_epochs", ppo.num_epochs)) - (self.jump.corrective_epochs if self.jump else 0)

    def horizon(self, ppo: Ppo, source: "Experiment") -> int:
        """Snapshots that its jump stands for, `source` being the experiment that predictors come from.

        Raises ValueError naming the contender where no whole snapshots are left to predict.
        """
        run, size = self.epochs_before_jump(ppo), source.collect.epochs_per_snapshot
        skipped = self.jump.horizon * size if self.jump and self.jump.horizon else source.ppo.num_epochs - run
        if skipped < size or skipped % size or run % size:
            raise ValueError(
                f"accelerate.contenders: {self.name!r} runs {run} epochs before its jump and leaves {skipped} of "
                f"{source.ppo.num_epochs} to a predictor of snapshots that are {size} epochs apart"
            )
        return skipped // size


def _with_jumps(epochs: int, predictors: Sequence[str]) -> tuple[Contender, ...]:
    ppo: dict[str, bool | int | float | str] = {"num_epochs": epochs}
    return tuple(Contender(name=f"{epochs}+{name}", ppo=ppo, jump=Jump(predictor=name)) for name in predictors)


@pydantic.with_config(STRICT)
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Accelerate:
    """PPO with and without jumps, side by side on the unseen seeds that `collect` names."""

    tasks: tuple[str, ...] = ("HalfCheetah-v4", "InvertedPendulum-v4", "Hopper-v4", "Walker2d-v4")
    """Gymnasium ids; TASK@STEPS for other environment steps than collect.total_env_steps."""
    contenders: Annotated[tuple[Contender, ...], tyro.conf.Suppress] = (
        Contender(name="10"),
        Contender(name="4", ppo={"num_epochs": 4}),
        *_with_jumps(4, ("ridge", "tipl", "damped", "linear", "first-again", "rank-1-from-last", "dmd")),
    )
    """A section [[accelerate.contenders]] of the experiment's file for each; the first is what others are held
    against."""
    only: tuple[str, ...] = dataclasses.field(default=(), metadata=LATER)
    """Names of the contenders that run, beside the first; all of them where none is given."""
    learning_rates: tuple[Positive, ...] = (1.5e-4, 3e-4, 6e-4, 1.2e-3, 2.4e-3)
    """What each contender's learning rate is chosen from, by area under the curve, rising; a single one is taken as it
    is."""
    search_tasks: tuple[str, ...] = dataclasses.field(default=(), metadata=LATER)
    """Tasks, as TASK or TASK@STEPS, on which one learning rate is chosen for all tasks: the one with the best mean rank
    over them. Where none is given each task has its own."""
    search_first_seed: Natural = 10_001
    """Seed of the first trial of the search; none of them is reported."""
    search_trials: Annotated[int, Field(ge=1, le=100_000)] = 5
    """Trials per contender and learning rate in the search."""
    bootstrap: Annotated[int, Field(ge=1, le=1_000_000)] = 10_000
    """Bootstrap resamples over trials behind each confidence interval."""

    def check(self) -> None:
        _check_last_seed("accelerate", "search_first_seed", self.search_first_seed, self.search_trials)
        for field in ("tasks", "contenders", "learning_rates"):
            if not getattr(self, field):
                raise ValueError(f"accelerate.{field} is empty")
        names = [contender.name for contender in self.contenders]
        _check_once("accelerate", "contenders", names)
        for field in ("tasks", "search_tasks", "only"):
            _check_once("accelerate", field, getattr(self, field))
        for name in self.only:
            if name not in names:
                raise no_such("accelerate.only", name, names)
        for field in ("tasks", "search_tasks"):
            for task in getattr(self, field):
                name, at, steps = task.partition("@")
                if not name or (at and not (steps.isdecimal() and 1 <= int(steps) <= LARGEST)):
                    raise ValueError(
                        f"accelerate.{field}: {task!r} is not TASK or TASK@STEPS, with environment steps from 1 to "
                        f"{LARGEST}"
                    )
        for contender in self.contenders:
            contender.check()
            if len(contender.values) not in (0, len(self.learning_rates)):
                raise ValueError(
                    f"accelerate.contenders: {contender.name!r}: it is chosen from {len(contender.values)} values, and "
                    f"others from {len(self.learning_rates)}: all have the same budget"
                )
        if list(self.learning_rates) != sorted(set(self.learning_rates)):
            raise ValueError(f"accelerate.learning_rates={self.learning_rates} do not rise from above 0")

    @property
    def running(self) -> tuple[Contender, ...]:
        """The contenders that run, the one that others are held against first."""
        first, *others = self.contenders
        return (first, *(one for one in others if not self.only or one.name in self.only))

    def values_of(self, contender: Contender) -> tuple[float, ...]:
        """What a contender's searched number is chosen from."""
        return contender.values or self.learning_rates


_SMALL_ZOO = {
    **{"num_steps": 512, "num_minibatches": 8, "gamma": 0.98, "gae_lambda": 0.92, "clip_coefficient": 0.1},
    **{"clip_values": False, "initial_log_std": -2.0, "bootstrap_truncated": True},
}
"""PPO near what rl-baselines3-zoo tunes for HalfCheetah, on small networks."""


@pydantic.with_config(STRICT)
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Improve:
    """Jumps that are tuned for the returns that follow: the forks of trials that say what does, and a rule's search."""

    tasks: tuple[str, ...] = ("HalfCheetah-v4", "Hopper-v4", "InvertedDoublePendulum-v4", "Swimmer-v4")
    """Gymnasium ids of the tasks that it may see; none of them is reported."""
    regimes: Annotated[tuple[Contender, ...], tyro.conf.Suppress] = (
        Contender(
            name="defaults, 4 epochs",
            ppo={"num_epochs": 4},
            jump=Jump(predictor="return-rule", horizon=1, numbers=(1, 1, 0, 0, 0.25, 0.25, 0.5)),
            values=(4e-4, 1e-3),
        ),
        Contender(
            name="defaults, 2 epochs",
            ppo={"num_epochs": 2},
            jump=Jump(predictor="return-rule", horizon=1, numbers=(1, 1, 0, 0, 0.25, 0.25, 0.5)),
            values=(4e-4, 1e-3),
        ),
        Contender(
            name="near the zoo's, 10 epochs",
            ppo={**_SMALL_ZOO, "num_epochs": 10},
            jump=Jump(predictor="return-rule", horizon=1, numbers=(0.5, 0, 0, 0, 0.25, 0, 0.5)),
            values=(1e-4, 3e-4),
        ),
    )
    """A section [[improve.regimes]] of the experiment's file for each: hyperparameters, with the jumps around which
    forks are made, and where the search begins. Each of its values is a regime of its own."""
    stages: Annotated[int, Field(ge=1, le=10_000)] = 6
    """Iterations of each trial, evenly spread, at which it is forked."""
    pairs: Annotated[int, Field(ge=1, le=10_000)] = 4
    """Pairs of branches at each, with opposite changes of the jump, beside the one that changes nothing."""
    spread: tuple[Positive, Positive, Positive] = (0.5, 0.5, 0.25)
    """Standard deviations of the changes: of what the first and the last displacement and the past moves count."""
    iterations: Annotated[int, Field(ge=1, le=100_000)] = 10
    """PPO iterations that a branch is followed for."""
    generations: Annotated[int, Field(ge=1, le=100_000)] = 15
    """Generations of a search for a rule by CMA-ES."""
    population: Annotated[int, Field(ge=4, le=1_000)] = 8
    """Rules of a generation."""
    searches: Annotated[int, Field(ge=1, le=1_000)] = 5
    """Searches, each on seeds of its own: what one finds may be luck."""
    search_first_seed: Natural = 30_001
    """Seed of the first trial of the searches; the rules of a generation share theirs, and no two generations do."""
    search_trials: Annotated[int, Field(ge=1, le=100_000)] = 1
    """Trials of each rule on each task, in a regime that is drawn for each generation and task."""

    def check(self) -> None:
        for field in ("tasks", "regimes"):
            if not getattr(self, field):
                raise ValueError(f"improve.{field} is empty")
        _check_once("improve", "tasks", self.tasks)
        _check_once("improve", "regimes", [regime.name for regime in self.regimes])
        for regime in self.regimes:
            regime.check()
            if not (regime.jump and regime.jump.predictor == "return-rule" and regime.jump.numbers):
                raise ValueError(f"improve.regimes: {regime.name!r} has no jump by the numbers of a return-rule")
            if not regime.values:
                raise ValueError(f"improve.regimes: {regime.name!r} has no values of {regime.searched}")


@pydantic.with_config(STRICT)
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Tracking:
    """Where MLflow keeps its records."""

    # Neither a traceback nor --help shows it: it may carry a password.
    uri: Annotated[str | None, tyro.conf.arg(help_behavior_hint="")] = dataclasses.field(default=None, repr=False)
    """MLflow tracking URI; none takes $MLFLOW_TRACKING_URI, else a sqlite file in the storage. A password in it is
    shown and kept nowhere."""
    experiment: str | None = None
    """MLflow experiment; none takes the experiment's name."""

    def check(self) -> None:
        if self.experiment is not None:
            # Databricks' experiments are paths, /Users/me/mine.
            for part in self.experiment.removeprefix("/").split("/"):
                _check_name("tracking.experiment", self.experiment, part, " ")


@pydantic.with_config(STRICT)
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Where:
    """Where a job runs, what it may take there and where its work is kept: no result depends on any of it."""

    storage: str | None = None
    """Folder or URI for everything that the stages leave; none is storage/<name> in the checkout, which git ignores,
    or, where this package is installed, in the working directory."""
    tracking: Tracking = dataclasses.field(default_factory=Tracking)
    trials_per_actor: Natural = 0
    """Trials that one Ray actor runs in lock step; 0 spreads them over the cluster's CPUs."""
    physics_threads: Count = 1
    """Threads that step an actor's simulations, each with a CPU of its own; changes no bit. More than 1 is for
    `--collect.engine cuda`, where an actor has many trials and few others beside it."""
    num_workers: Annotated[int, Field(ge=1, le=10_000)] = 1
    """Ray Train workers."""
    use_gpu: bool = False
    """One GPU per worker."""
    trainer: Literal["tune", "ray-train"] = "tune"
    """`tune` trains each run of a sweep in Ray Tune's own process; `ray-train` has Ray Tune drive Ray Train's
    TorchTrainer, so that a run can have num_workers workers. Each takes half a minute longer to start."""
    max_concurrent_trials: Natural = 0
    """Most runs of a sweep at a time; 0 leaves it to the cluster's resources."""
    cpus_per_trial: Annotated[int, Field(ge=1, le=10_000)] = 1
    """CPUs of each run of a sweep, and its threads; with `ray-train`, of each of its workers."""
    gpus_per_trial: Annotated[float, Field(ge=0, le=10_000)] = 0.0
    """GPUs of each run of a sweep; a fraction shares one. Above 0 it trains there. With `ray-train`, of each of its
    workers."""
    predictors_from: str = "jobs/experiments/inverted_pendulum.toml"
    """Experiment whose collected trials the predictors are fitted on, and whose trained model TIPL is."""
    predictors_storage: str | None = None
    """That experiment's storage; none is the one that it names."""
    units_at_once: Natural = 0
    """Contenders that run at the same time, each on one CPU; 0 takes every CPU."""
    keep_weights: bool = False
    """Keep the trials' snapshots once their learning curves are written down."""

    def check(self) -> None:
        if self.gpus_per_trial > 1 and not self.gpus_per_trial.is_integer():
            raise ValueError(f"gpus_per_trial={self.gpus_per_trial} is neither a part of one GPU nor whole GPUs")


@pydantic.with_config(STRICT)
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Sweep:
    """What jobs/sweep.py varies and how it searches; what every child of the sweep shares is the experiment itself."""

    over: Annotated[dict[str, Any], tyro.conf.Suppress] = dataclasses.field(default_factory=dict)
    """Fields of basis, model and train by name, each with its values, as in `"basis.rank" = [8, 16, 32]`, or a range
    for a search, as in `"train.learning_rate" = "log(1e-4, 1e-2)"` or `"model.dropout" = "uniform(0, 0.3)"`. On the
    command line of jobs/sweep.py: --over FIELD=VALUES."""
    search: Literal["grid", "optuna"] = "grid"
    """`grid`: every combination of the values once; `optuna`: num_samples of them, each drawn where those before it did
    well."""
    num_samples: Annotated[int, Field(ge=1, le=1_000_000)] = 20
    """Children of an `optuna` search."""
    scheduler: Literal["none", "asha"] = "none"
    """`asha` ends a child early where others had more of the metric after as many steps."""
    metric: str = "skill"
    """What the best child has most of: `skill`, the validation skill in weights, mean over the forward steps, or
    `skill_h1`, `skill_h10`, ..., at one of them."""
    seed: Natural = 0
    """Seed of the `optuna` search."""


@pydantic.with_config(STRICT)
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Experiment:
    """One experiment: what is collected, how it is reduced, what learns from it and how that is judged."""

    name: str = dataclasses.field(metadata=NO_IDENTITY)
    """Name of the experiment, and of its folder in the default storage."""
    where: Where = dataclasses.field(default_factory=Where, metadata=NO_IDENTITY)
    preset: Literal["causal", "paper"] = "paper"
    """Set of defaults for basis, model and training: `paper` is the paper's Transformer on its Temporal SVD, `causal`
    our own on the basis `window`. The file's sections [causal.train], [paper.train] and so on hold for one of them."""
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
        """Absolute folder, or the URI as given: Ray changes the working directory of its workers."""
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
        """Environment steps of the whole iterations that a trial runs."""
        return self.num_iterations * self.ppo.num_steps

    @property
    def snapshots_per_iteration(self) -> int:
        """Snapshots per iteration, each of which update epochs lead to."""
        return self.ppo.num_epochs // self.collect.epochs_per_snapshot

    @property
    def num_snapshots(self) -> int:
        """Snapshots per trial T, the initial one included."""
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
        """Refuse what these jobs of `JOBS` cannot run; of none, what any of them cannot.

        Raises ValueError naming the field, the value and the limit.
        """
        self.check_fields()
        wanted = jobs or tuple(JOBS)
        self._check_trials(wanted)
        if set(wanted) & set(LEARNING):
            self._check_learning()
        if "evaluate" in wanted and self.evaluate.run_policies_of:
            self._check_policies_run()
        if "sweep" in wanted:
            metrics = ["skill", *(f"skill_h{step}" for step in self.evaluate.steps)]
            if self.sweep.metric not in metrics:
                raise no_such("sweep.metric", self.sweep.metric, metrics)
        if "accelerate" in wanted:
            self._check_acceleration()
        # Of its own accord: an experiment of few steps has nothing to fork.
        if "fork" in jobs:
            self._check_forks()
        return self

    def check_fields(self) -> Self:
        """Refuse values that no job can use. Raises ValueError naming the field, the value and the limit."""
        parts = list(_parts(self))
        for prefix, part in parts:
            _check_texts(prefix, part)
        _check_name("name", self.name, self.name)
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
                given = [task.partition("@") for task in getattr(self.accelerate, field)]
                steps |= {f"accelerate.{field}={task}@{count}": int(count) for task, _, count in given if count}
        for where, count in steps.items():
            if count < self.ppo.num_steps:
                raise ValueError(f"{where} is less than one iteration of ppo.num_steps={self.ppo.num_steps}")
        if set(jobs) - {"accelerate"} and self.ppo.num_epochs % self.collect.epochs_per_snapshot:
            raise ValueError(
                f"collect.epochs_per_snapshot={self.collect.epochs_per_snapshot} does not divide "
                f"ppo.num_epochs={self.ppo.num_epochs}"
            )
        if self.num_snapshots > LARGEST:
            raise ValueError(
                f"collect.total_env_steps={self.collect.total_env_steps} gives {self.num_snapshots} snapshots a trial, "
                f"more than {LARGEST}"
            )

    def _check_learning(self) -> None:
        if self.train.batch_size % self.where.num_workers:
            raise ValueError(
                f"num_workers={self.where.num_workers} does not divide train.batch_size={self.train.batch_size}"
            )
        held_out = self.split.validation_trials + self.split.test_trials
        if held_out >= self.collect.num_trials:
            raise ValueError(
                f"split.validation_trials + split.test_trials = {held_out} leaves no trial to train on: "
                f"collect.num_trials={self.collect.num_trials}"
            )
        representation = REPRESENTATIONS.load(self.basis.kind)(self.basis)
        representation.check(self)
        if self.train.data and not representation.across_tasks:
            raise ValueError(
                f"train.data={self.train.data} needs basis.kind=window: tokens of {self.basis.kind!r} fit one task"
            )
        furthest = max(self.evaluate.horizon, *self.evaluate.extra_horizons, 0)
        needed = self.model.context + furthest
        if needed >= self.num_snapshots:
            raise ValueError(
                f"model.context={self.model.context} + forward step {furthest} of evaluate = {needed} displacements "
                f"exceed the {self.num_snapshots - 1} of a trial"
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
                f"evaluate.run_policies_of={self.evaluate.run_policies_of} are no predictors of "
                f"basis.kind={self.basis.kind!r}{'' if self.train.data else ' without train.data'}"
            )

    def _check_acceleration(self) -> None:
        settings, reported = self.accelerate, self.collect.seeds
        searched = range(settings.search_first_seed, settings.search_first_seed + settings.search_trials)
        if reported[0] <= searched[-1] and searched[0] <= reported[-1]:
            raise ValueError(
                f"accelerate.search_first_seed={searched[0]} and accelerate.search_trials={len(searched)} take some of "
                f"the seeds {reported[0]} to {reported[-1]}, which are reported"
            )
        for contender in settings.running:
            for value in settings.values_of(contender):
                contender.ppo_at(self.ppo, value)
            if contender.epochs_before_jump(self.ppo) < 1:
                raise ValueError(
                    f"accelerate.contenders: {contender.name!r}: jump.corrective_epochs leaves none of ppo.num_epochs "
                    "to run before the jump"
                )

    def _check_forks(self) -> None:
        for regime in self.improve.regimes:
            for value in regime.values:
                ppo = regime.ppo_at(self.ppo, value)
                iterations = self.collect.total_env_steps // ppo.num_steps
                if iterations <= self.improve.stages:
                    raise ValueError(
                        f"improve.stages={self.improve.stages} leaves no iteration between the forks of a trial of "
                        f"{iterations}, as collect.total_env_steps={self.collect.total_env_steps} gives "
                        f"improve.regimes {regime.name!r}"
                    )


MOVED = (
    *("storage", "tracking", "collect.trials_per_actor", "collect.physics_threads", "train.num_workers"),
    *("train.use_gpu", "sweep.trainer", "sweep.max_concurrent_trials", "sweep.cpus_per_trial", "sweep.gpus_per_trial"),
    *("accelerate.predictors_from", "accelerate.predictors_storage", "accelerate.units_at_once"),
    "accelerate.keep_weights",
)
"""Where earlier versions had what is in the section `where` under the same last name."""


def known_predictors(outside: Sequence[str] = ()) -> tuple[str, ...]:
    """Names that a result table may have: this package's, those that representations bring, and those from outside."""
    brought = [name for kind in REPRESENTATIONS.own for name in REPRESENTATIONS.load(kind).own_predictors]
    return tuple(dict.fromkeys([*PREDICTORS.own, *brought, *(PREDICTORS.load(name).name for name in outside)]))


def check_limits(part: Any, prefix: str = "") -> None:
    """Refuse values beyond the limits of their fields. Raises ValueError naming field, value and limit of each."""
    validated(type(part), dataclasses.asdict(part), prefix)


_adapter = functools.cache(pydantic.TypeAdapter)


def validated(kind: Any, table: dict[str, Any], prefix: str = "") -> Any:
    """The configuration of a table. Raises ValueError for unknown keys, wrong types and values beyond limits."""
    try:
        # By way of JSON, in which a list may be a tuple, and true no number.
        return _adapter(kind).validate_json(json.dumps(table, default=str), strict=True)
    except pydantic.ValidationError as error:
        raise ValueError("; ".join(f"{prefix}{_complaint(item)}" for item in error.errors())) from error


def _complaint(item: Any) -> str:
    """One of pydantic's errors, in our words where it is a limit's or a key's."""
    field, context = ".".join(map(str, item["loc"])).removeprefix("where."), item.get("ctx", {})
    said = f"{field}={published(item['input'])!r}"
    if item["type"] == "greater_than_equal":
        return f"{said} is below {context['ge']}"
    if item["type"] == "less_than_equal":
        return f"{said} is above {context['le']}"
    if item["type"] == "finite_number":
        return f"{said} is not a finite number"
    if item["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        if field in MOVED:
            return f"{said}: {field.rpartition('.')[2]} is in the section [where] now"
        return f"{said}: unknown key{nearest(field, _fields())}"
    return f"{said}: {item['msg']}"


@functools.cache
def _fields() -> tuple[str, ...]:
    """Every section, and every field by its dotted name."""
    sections = [field.name for field in dataclasses.fields(Experiment)]
    return tuple(dict.fromkeys([*sections, *every_field()]))


@functools.cache
def every_field() -> tuple[str, ...]:
    """Fields of an experiment by their dotted names, in its order."""
    return tuple(name for name, _ in flat(as_table(Experiment(name="any"))))


def fields_read(jobs: Collection[str]) -> tuple[str, ...]:
    """Fields of an experiment that some of these jobs read, by their dotted names, in its order."""

    def holds(parts: Sequence[str], field: str) -> bool:
        return any(field == part or field.startswith(f"{part}.") for part in parts)

    left_out = {job: [part.removeprefix("-") for part in JOBS[job] if part.startswith("-")] for job in jobs}
    return tuple(
        field
        for field in every_field()
        if any(holds((*EVERY_JOB, *JOBS[job]), field) and not holds(left_out[job], field) for job in jobs)
    )


def check_place(field: str, place: str) -> None:
    """Raise ValueError for a folder or URI that says more than where something is."""
    if redacted(place) != place:
        raise ValueError(
            f"{field}={redacted(place)!r} carries credentials, which every log would show, or an option that is none "
            "of endpoint_override, scheme and region: give credentials by the environment or a profile"
        )


def _parts(part: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """A configuration and every section in it, each with what stands before its fields' names in errors."""
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


def _check_name(field: str, whole: str, name: str, also: str = "") -> None:
    """A name for a folder, a shell's word, an MLflow experiment, a registered model and a web page, all at once."""
    allowed = f"-_.+=@,{also}"
    for letter in name:
        # Letters, the marks on them, digits: all else means something to someone.
        if unicodedata.category(letter)[0] not in "LMN" and letter not in allowed:
            raise ValueError(
                f"{field}={whole!r} holds {letter!r}: give letters, digits and {' '.join(allowed).strip()}"
            )
    if not name or (name[0] != "_" and unicodedata.category(name[0])[0] not in "LN"):
        raise ValueError(f"{field}={whole!r} does not begin with a letter, a digit or _")
    if name[-1] in ". ":
        raise ValueError(f"{field}={whole!r} ends in {name[-1]!r}, which some would leave out")
    if len(whole.encode()) > MAX_NAME_BYTES:
        raise ValueError(f"{field}={whole[:20]!r}... has {len(whole.encode())} bytes, more than {MAX_NAME_BYTES}")


def _check_last_seed(section: str, field: str, first: int, count: int) -> None:
    if first + count - 1 > LARGEST:
        raise ValueError(f"{section}.{field}={first}: the last of {count} seeds is beyond {LARGEST}")


def _check_once(section: str, field: str, values: Sequence[Any]) -> None:
    for value in values:
        if values.count(value) > 1:
            raise ValueError(f"{section}.{field} holds {value!r} twice")
