"""The sections of an experiment that the paper's pipeline reads, and where it runs.

The defaults are the paper's (Section 4.1) and, where the paper is silent, what docs/declared.md says.
"""

import dataclasses
from typing import Annotated, Any, Literal

import pydantic
import tyro
from pydantic import Field

from tipl_ray.config.fields import (
    LARGEST,
    LATER,
    STRICT,
    Count,
    Natural,
    Positive,
    Share,
    Step,
    Width,
    check_last_seed,
    check_name,
    check_once,
)
from tipl_ray.places import absolute_storage
from tipl_ray.registry import PREDICTORS, REPRESENTATIONS


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
        check_last_seed("collect", "first_seed", self.first_seed, self.num_trials)


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
        check_last_seed("train", "seed", self.seed, self.num_seeds)
        check_once("train", "data", [absolute_storage(storage) for storage in self.data])


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
        check_once("evaluate", "predictors", self.predictors)
        check_once("evaluate", "run_policies_of", self.run_policies_of)
        extra = (self.horizon, *self.extra_horizons)
        if list(extra) != sorted(set(extra)):
            raise ValueError(
                f"evaluate.extra_horizons={self.extra_horizons} do not rise from beyond evaluate.horizon={self.horizon}"
            )


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
                check_name("tracking.experiment", self.experiment, part, " ")


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
