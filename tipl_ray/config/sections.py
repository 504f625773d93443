"""The sections of an experiment that the paper's pipeline reads, and the section for where it runs.

Defaults are the paper's (Section 4.1); where the paper is silent, docs/declared.md gives and explains our choice.
"""

import dataclasses
from typing import Annotated, Any, ClassVar, Literal

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
    """PPO hyperparameters; the defaults are those of CleanRL's `ppo_continuous_action.py`, unchanged."""

    num_steps: Annotated[int, Field(ge=1, le=10_000_000)] = 2048
    """Environment steps per PPO iteration (rollout length)."""
    num_minibatches: Annotated[int, Field(ge=1, le=10_000_000)] = 32
    """Minibatches per update epoch, each of num_steps / num_minibatches samples."""
    num_epochs: Annotated[int, Field(ge=1, le=10_000)] = 10
    """Update epochs per PPO iteration."""
    learning_rate: Positive = 3e-4
    """Adam's learning rate at the first iteration."""
    schedule: Literal["linear", "constant"] = dataclasses.field(default="linear", metadata=LATER)
    """Learning-rate schedule: annealed linearly to 0 over the trial, or constant."""
    policy_rate_ratio: Positive = dataclasses.field(default=1.0, metadata=LATER)
    """The policy's learning rate as a multiple of the critic's, which is learning_rate."""
    desired_kl: Annotated[float, Field(ge=0, le=1e6)] = dataclasses.field(default=0.0, metadata=LATER)
    """Target KL divergence for an adaptive learning rate, as in rl_games: after each update epoch the rate is divided
    by 1.5 if the approximate KL from the rollout policy is above twice this value, and multiplied by 1.5 if it is below
    half, within 1e-6 and 1e-2. 0 turns this off; requires schedule=constant."""
    target_kl: Annotated[float, Field(ge=0, le=1e6)] = dataclasses.field(default=0.0, metadata=LATER)
    """Stop an iteration's update epochs early once the last minibatch's approximate KL divergence exceeds this, as in
    CleanRL; the iteration's remaining snapshots repeat the last one. 0 turns this off."""
    adam_epsilon: Positive = 1e-5
    """Adam's epsilon."""
    gamma: Share = 0.99
    """Discount factor, for returns and for reward normalisation."""
    gae_lambda: Share = 0.95
    """Lambda of generalised advantage estimation."""
    clip_coefficient: Positive = 0.2
    """Clipping range of the probability ratio and, with clip_values, of the change in value."""
    clip_values: bool = dataclasses.field(default=True, metadata=LATER)
    """Clip the change in value in the value loss."""
    drift: Literal["clip", "dpo"] = dataclasses.field(default="clip", metadata=LATER)
    """What keeps the new policy close to the rollout policy: `clip`, PPO's clipping, or `dpo`, the drift function of
    Discovered Policy Optimisation (arXiv 2210.05639), which ignores clip_coefficient."""
    bootstrap_truncated: bool = dataclasses.field(default=False, metadata=LATER)
    """Bootstrap from the critic where a time limit truncates an episode, as stable-baselines3 does; CleanRL treats
    truncation as termination."""
    recompute_advantages: bool = dataclasses.field(default=False, metadata=LATER)
    """Recompute values, advantages and returns with the current critic before each update epoch."""
    replicas: Annotated[int, Field(ge=1, le=64)] = dataclasses.field(default=1, metadata=LATER)
    """Copies of the networks and the optimizer that train on the same rollout with differently shuffled minibatches and
    are averaged at the end of the iteration (CAPO, arXiv 2603.12596, in parameter space)."""
    entropy_coefficient: Annotated[float, Field(ge=0, le=1e6)] = 0.0
    """Weight of the entropy bonus."""
    value_coefficient: Annotated[float, Field(ge=0, le=1e6)] = 0.5
    """Weight of the value loss."""
    max_gradient_norm: Positive = 0.5
    """Gradient-norm clipping, over actor, log-std and critic together."""
    activation: Literal["tanh", "relu"] = dataclasses.field(default="tanh", metadata=LATER)
    """Activation function of the hidden layers of policy and critic."""
    initialisation: Literal["orthogonal", "uniform"] = dataclasses.field(default="orthogonal", metadata=LATER)
    """Initialisation of the networks: `orthogonal`, as in CleanRL, or `uniform`, torch's default: within
    1 / sqrt(inputs)."""
    precision: Literal["float32", "bfloat16"] = dataclasses.field(default="float32", metadata=LATER)
    """Precision of the factors in the update epochs' matrix products; sums, weights and Adam stay float32. `bfloat16`
    needs the compiled engine and a processor with AVX512_BF16; its bits are those of one family of processors."""
    initial_log_std: Annotated[float, Field(ge=-20, le=10)] = dataclasses.field(default=0.0, metadata=LATER)
    """Initial log standard deviation of the policy's actions."""

    @property
    def minibatch_size(self) -> int:
        return self.num_steps // self.num_minibatches

    def check(self) -> None:
        if self.desired_kl and self.schedule != "constant":
            raise ValueError(
                f"ppo.desired_kl={self.desired_kl} adapts the learning rate, which conflicts with ppo.schedule="
                f"{self.schedule!r}; use ppo.schedule=constant"
            )
        if self.replicas > 1 and (self.desired_kl or self.target_kl):
            raise ValueError(
                f"ppo.replicas={self.replicas} must all take the same steps at the same learning rate; ppo.desired_kl "
                "and ppo.target_kl would give each its own, so leave them at 0"
            )
        if self.num_steps % self.num_minibatches or self.minibatch_size < 2:
            raise ValueError(
                f"ppo.num_minibatches={self.num_minibatches} does not divide the {self.num_steps} steps of an "
                "iteration into equal minibatches of at least 2"
            )


@pydantic.with_config(STRICT)
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Collect:
    """The PPO trials (seeded training runs) whose policy weights become the data set."""

    task: str = "InvertedPendulum-v4"
    """Gymnasium id of the task, as `module:ID` if importing a module registers it; or your own class as
    `module:Name`."""
    task_options: dict[str, bool | int | float | str] = dataclasses.field(
        default_factory=dict, hash=False, metadata=LATER
    )
    """Keyword arguments for gymnasium's environment; with any, the task runs in gymnasium's own class, which is slower.
    Can be set only in the experiment's file."""
    num_trials: Annotated[int, Field(ge=1, le=100_000)] = 50
    """Number of trials, with seeds first_seed, first_seed + 1, and so on."""
    first_seed: Natural = 1
    """Seed of the first trial."""
    total_env_steps: Count = 800_000
    """Environment steps per trial, rounded down to whole iterations of ppo.num_steps."""
    policy_hidden: tuple[Width, Width] = (8, 8)
    """Widths of the policy's two hidden layers."""
    critic_hidden: tuple[Width, Width] = (64, 64)
    """Widths of the critic's two hidden layers (the paper gives only the policy's; these are CleanRL's)."""
    epochs_per_snapshot: Count = 2
    """PPO update epochs between two stored snapshots of the policy's weights; must divide ppo.num_epochs."""
    iterations_per_commit: Count = 20
    """PPO iterations between two commits of a trial: the most work that a crash can lose."""
    algorithm: str = dataclasses.field(default="ppo", metadata=LATER)
    """Algorithm that trains the policies: `ppo`, an entry point of the group `tipl_ray.algorithms`, or your own class
    as `module:Name`."""
    engine: Literal["auto", "compiled", "torch", "cuda"] = "auto"
    """Implementation of the networks: `compiled` (C++, needs g++), `torch`, `cuda` (torch on one GPU per actor), or
    `auto`: compiled if g++ is installed, else torch."""

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(range(self.first_seed, self.first_seed + self.num_trials))

    def check(self) -> None:
        check_last_seed("collect", "first_seed", self.first_seed, self.num_trials)


@pydantic.with_config(STRICT)
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """Split into training, validation and test trials, by whole trials: the last seeds are the test trials, those
    before them the validation trials."""

    validation_trials: Count = 5
    """Validation trials, used for early stopping and to choose hyperparameters."""
    test_trials: Count = 5
    """Test trials, which every number of the evaluation is computed on."""

    folds: Annotated[int, Field(ge=0, le=100_000)] = dataclasses.field(default=0, metadata=LATER)
    """Cross-validation: number of equal parts that the trials are cut into, in place of the two counts. One part has
    the test trials, the next one the validation trials. 0 does not cut them; jobs/cross_validate.py tests on each part
    in turn."""
    fold: Natural = dataclasses.field(default=0, metadata=LATER)
    """Which of the folds has the test trials, counted from 0."""

    def check(self) -> None:
        if self.folds in (1, 2):
            raise ValueError(f"split.folds={self.folds} leaves no trial to train on: give 3 or more, or 0")
        if self.fold >= max(1, self.folds):
            raise ValueError(f"split.fold={self.fold} is not below split.folds={self.folds}")

    def cut(self, seeds: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Seeds of the training, validation and test trials."""
        if self.folds:
            parts = [seeds[fold :: self.folds] for fold in range(self.folds)]
            validation, test = parts[(self.fold + 1) % self.folds], parts[self.fold]
            return tuple(seed for seed in seeds if seed not in {*validation, *test}), validation, test
        first, second = len(seeds) - self.validation_trials - self.test_trials, len(seeds) - self.test_trials
        return seeds[: max(first, 0)], seeds[max(first, 0) : second], seeds[second:]


@pydantic.with_config(STRICT)
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Basis:
    """How snapshots of the weights become tokens, and tokens become weights again (Section 3.2)."""

    REMOVED: ClassVar[dict[str, bool]] = {"centred": False, "deltas": False}
    """Fields of earlier versions, at the only values that are left. They stay part of the digests, so that models that
    were trained before are found."""

    kind: str = "trial"
    """`trial`: Temporal SVD of the trial's whole trajectory, as in the paper; not causal, since it includes the future.
    `shared`: one Temporal SVD of all training trials; causal. `window`: inner products of the displacements in the
    context; causal and independent of the network's size. `per-weight`: the same, and each weight's own displacements,
    value and tensor; causal, for policies of one layout. Or `module:Name`, your own representation
    (docs/extending.md)."""
    rank: Count = 32
    """SVD rank D, for `trial` and `shared`."""

    def check(self) -> None:
        REPRESENTATIONS.check("basis.kind", self.kind)

    @classmethod
    def upgraded(cls, table: dict[str, Any]) -> dict[str, Any]:
        """A table that any version wrote, without the fields that were removed. Raises ValueError where one of them had
        another value than its default."""
        for field, default in cls.REMOVED.items():
            if table.get(field, default) != default:
                raise ValueError(f"basis.{field}: this version only reads models with basis.{field}={default}")
        return {field: value for field, value in table.items() if field not in cls.REMOVED}


@pydantic.with_config(STRICT)
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """The causal Transformer (Section 3.3); by default as large as Decision Transformer's for gym."""

    context: Annotated[int, Field(ge=2, le=LARGEST)] = 20
    """Context length K: number of tokens that the model sees. A token is a snapshot or, with basis `window`, the
    displacement between two."""
    embedding: Annotated[int, Field(ge=1, le=65_536)] = 128
    """Embedding dimension of a token."""
    layers: Annotated[int, Field(ge=1, le=1_000)] = 3
    """Number of Transformer blocks."""
    heads: Annotated[int, Field(ge=1, le=65_536)] = 1
    """Attention heads per block; must divide embedding."""
    dropout: Annotated[float, Field(ge=0, le=0.95)] = 0.1
    """Dropout probability in embeddings, attention and blocks."""
    phase: bool = True
    """Basis `window`: give the model the phase of each displacement, that is its position within its PPO iteration."""
    clock: Literal["none", "progress", "learning_rate"] = "progress"
    """Basis `window`: the model's input for training progress: none, the share of the trial's snapshots seen so far, or
    PPO's annealed learning rate."""

    residual: bool = dataclasses.field(default=False, metadata=LATER)
    """Bases of tokens: predict how a token changes, in units of what one snapshot changes it by, and show the model
    each token's own change; the forecast is the last snapshot plus the decoded change. Without it the model predicts
    whole tokens, as the paper's does, and decodes them."""

    def check(self) -> None:
        if self.embedding % self.heads:
            raise ValueError(f"model.heads={self.heads} does not divide model.embedding={self.embedding}")


@pydantic.with_config(STRICT)
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Train:
    """Training of the Transformer; the defaults are the paper's 50 iterations of 10,000 batches."""

    num_steps: Count = 500_000
    """Optimisation steps."""
    steps_per_iteration: Count = 10_000
    """Optimisation steps between two validations, each with a checkpoint."""
    batch_size: Annotated[int, Field(ge=1, le=1_000_000)] = 64
    """Windows per step, summed over all workers."""
    learning_rate: Positive = 1e-4
    """AdamW learning rate after warm-up."""
    weight_decay: Annotated[float, Field(ge=0, le=1e6)] = 1e-4
    """AdamW weight decay."""
    warmup_steps: Natural = 10_000
    """Steps of linear warm-up."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Learning-rate schedule after warm-up: constant, or cosine decay to 0 at the last step."""
    max_gradient_norm: Positive = 0.25
    """Gradient-norm clipping."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Precision of the matrix products in the Transformer's blocks during training; everything else, and validation, is
    float32. `bfloat16` halves the time on hardware that supports it and is slow elsewhere."""
    joined_windows: Share = 0.0
    """Basis `window`: share of the windows in a batch that are joined with others, as augmentation: together they
    represent one larger policy."""
    seed: Natural = 0
    """Random seed of initialisation, batches and dropout."""
    num_seeds: Annotated[int, Field(ge=1, le=10_000)] = 1
    """Number of models to train, with seeds `seed`, `seed` + 1, and so on; all are evaluated."""
    data: tuple[str, ...] = ()
    """Basis `window`: storages whose data sets to train on instead of this experiment's own; each is split in the same
    way."""

    def check(self) -> None:
        check_last_seed("train", "seed", self.seed, self.num_seeds)
        check_once("train", "data", [absolute_storage(storage) for storage in self.data])


@pydantic.with_config(STRICT)
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Evaluate:
    """How predicted weights are evaluated: weight prediction error (WPE), skill, and return error of the predicted
    weights (REPW); Section 4."""

    horizon: Step = 10
    """Number of forward steps h to predict: 1 to this."""
    extra_horizons: tuple[Step, ...] = ()
    """Further forward steps to predict, beyond horizon and in increasing order."""
    windows_per_trial: Count = 20
    """Windows per test trial, evenly spaced, whose policies are rolled out for REPW; WPE uses every window."""
    run_policies_of: tuple[str, ...] = ("copy-last", "linear", "ridge", "tipl", "svd-floor", "window-floor")
    """Predictors to roll out for REPW, by their names in the result table (empty: none). WPE always covers all of
    them."""
    predictors: tuple[str, ...] = dataclasses.field(default=(), metadata=LATER)
    """Your own predictors to include in the comparison, as `module:Name` (docs/extending.md)."""
    episodes: Annotated[int, Field(ge=1, le=1_000_000)] = 10
    """Evaluation episodes per policy; the noise floor of REPW takes as many again on other seeds."""
    sampled_actions: bool = False
    """Sample actions from the policy instead of taking the mean action."""
    bootstrap: Annotated[int, Field(ge=1, le=1_000_000)] = 1000
    """Bootstrap resamples (over trials) per confidence interval."""
    confidence: Annotated[float, Field(ge=0.5, le=0.999)] = 0.95
    """Confidence level of the intervals."""
    seed: Natural = 0
    """Random seed of the evaluation episodes and of the bootstrap."""

    @property
    def steps(self) -> tuple[int, ...]:
        """Every forward step to predict."""
        return (*range(1, self.horizon + 1), *self.extra_horizons)

    def check(self) -> None:
        for name in self.predictors:
            if name == "tipl":
                raise ValueError("evaluate.predictors: TIPL is always among the predictors; leave 'tipl' out")
            PREDICTORS.check("evaluate.predictors", name)
        check_once("evaluate", "predictors", self.predictors)
        check_once("evaluate", "run_policies_of", self.run_policies_of)
        extra = (self.horizon, *self.extra_horizons)
        if list(extra) != sorted(set(extra)):
            raise ValueError(
                f"evaluate.extra_horizons={self.extra_horizons} must increase and start above "
                f"evaluate.horizon={self.horizon}"
            )


@pydantic.with_config(STRICT)
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Tracking:
    """Where MLflow stores its runs."""

    # Neither a traceback nor --help shows it: it may carry a password.
    uri: Annotated[str | None, tyro.conf.arg(help_behavior_hint="")] = dataclasses.field(default=None, repr=False)
    """MLflow tracking URI; by default $MLFLOW_TRACKING_URI if set, else a sqlite file in the storage. A password in it
    is never shown or stored."""
    experiment: str | None = None
    """Name of the MLflow experiment; by default the experiment's name."""

    def check(self) -> None:
        if self.experiment is not None:
            # Databricks' experiments are paths, /Users/me/mine.
            for part in self.experiment.removeprefix("/").split("/"):
                check_name("tracking.experiment", self.experiment, part, " ")


@pydantic.with_config(STRICT)
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Where:
    """Where a job runs, which resources it may use and where its output goes. No result depends on any of it, with two
    exceptions: a training's dropout depends on its number of workers, and the last bits of a model on the paper's
    tokens on its threads (cpus_per_trial in a sweep, else the CPUs of the machine)."""

    storage: str | None = None
    """Folder or URI for all output; by default storage/<name> in the checkout (ignored by git) or, if the package is
    installed, in the working directory. `latest` in it links to the newest report."""
    tracking: Tracking = dataclasses.field(default_factory=Tracking)
    trials_per_actor: Natural = 0
    """Trials that one Ray actor runs in lockstep; 0 spreads them over the cluster's CPUs."""
    physics_threads: Count = 1
    """Threads, each with its own CPU, that step an actor's simulations; results are bit-identical for any number. More
    than 1 helps with `--collect.engine cuda`, where one actor runs many trials."""
    num_workers: Annotated[int, Field(ge=1, le=10_000)] = 1
    """Number of Ray Train workers."""
    use_gpu: bool = False
    """Give each worker one GPU."""
    trainer: Literal["tune", "ray-train"] = "tune"
    """`tune` trains each run of a sweep in one Ray Tune process; `ray-train` uses Ray Train's TorchTrainer, so that a
    run can have num_workers workers, but takes half a minute longer to start."""
    max_concurrent_trials: Natural = 0
    """Maximum number of concurrent runs of a sweep; 0: as many as the cluster has room for."""
    cpus_per_trial: Annotated[int, Field(ge=1, le=10_000)] = 1
    """CPUs (and threads) per run of a sweep; with `ray-train`, per worker."""
    gpus_per_trial: Annotated[float, Field(ge=0, le=10_000)] = 0.0
    """GPUs per run of a sweep, above 0 to train on the GPU; a fraction shares one. With `ray-train`, per worker."""
    predictors_from: str = "jobs/experiments/inverted_pendulum.toml"
    """Experiment that the predictors come from: fitted on its collected trials, with its trained model as TIPL."""
    predictors_storage: str | None = None
    """Storage of that experiment; by default the one that it names."""
    units_at_once: Natural = 0
    """Variants to run at the same time, each on one CPU; 0: one per CPU."""
    keep_weights: bool = False
    """Keep the trials' snapshots after their learning curves have been stored."""

    def check(self) -> None:
        if self.gpus_per_trial > 1 and not self.gpus_per_trial.is_integer():
            raise ValueError(f"gpus_per_trial={self.gpus_per_trial} must be a fraction of one GPU or a whole number")


@pydantic.with_config(STRICT)
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Sweep:
    """What jobs/sweep.py varies, and how it searches; everything else is shared by all runs of the sweep."""

    over: Annotated[dict[str, Any], tyro.conf.Suppress] = dataclasses.field(default_factory=dict)
    """Fields of basis, model and train, each with a list of values, as in `"basis.rank" = [8, 16, 32]`, or a range to
    search, as in `"train.learning_rate" = "log(1e-4, 1e-2)"` or `"model.dropout" = "uniform(0, 0.3)"`. On the command
    line of jobs/sweep.py: --over FIELD=VALUES."""
    search: Literal["grid", "optuna"] = "grid"
    """`grid`: every combination of the values; `optuna`: num_samples combinations, sampled where earlier runs did
    well."""
    num_samples: Annotated[int, Field(ge=1, le=1_000_000)] = 20
    """Number of runs of an `optuna` search."""
    scheduler: Literal["none", "asha"] = "none"
    """`asha` stops a run early if others had a higher metric after the same number of steps."""
    metric: str = "skill"
    """Metric to maximise: `skill`, the validation skill averaged over the forward steps, or `skill_h1`, `skill_h10`,
    ..., at one of them."""
    seed: Natural = 0
    """Random seed of the `optuna` search."""
