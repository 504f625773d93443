"""One experiment, as a tree of frozen dataclasses: read from TOML, overridden on the command line, checked once.

Knows nothing of Ray, torch or MLflow, so that `--help` is instant. Everything that can be derived is a property.
The defaults are the paper's (Section 4.1) and, where the paper is silent, what docs/declared.md says.
"""

import dataclasses
import functools
import hashlib
import json
import os
import re
import sys
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import unquote

import pydantic
import tyro


class UserError(RuntimeError):
    """What a user can mend: a job prints it in one line, without a traceback."""


CHECKOUT = Path(__file__).resolve().parent.parent


@pydantic.with_config(extra="forbid")
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Ppo:
    """CleanRL's `ppo_continuous_action.py`, no hyperparameter changed."""

    num_steps: int = 2048
    """Environment steps that a trial takes per iteration."""
    num_minibatches: int = 32
    """Minibatches per update epoch; each has num_steps / num_minibatches samples."""
    num_epochs: int = 10
    """Update epochs per iteration."""
    learning_rate: float = 3e-4
    """Adam's learning rate at the first iteration; annealed linearly to 0 over the trial."""
    adam_epsilon: float = 1e-5
    """Adam's epsilon."""
    gamma: float = 0.99
    """Discount factor, of returns and of the reward normalisation."""
    gae_lambda: float = 0.95
    """Lambda of generalised advantage estimation."""
    clip_coefficient: float = 0.2
    """Clipping of the probability ratio and of the value's change."""
    entropy_coefficient: float = 0.0
    """Weight of the entropy bonus."""
    value_coefficient: float = 0.5
    """Weight of the value loss."""
    max_gradient_norm: float = 0.5
    """Limit of the gradient's norm, over actor, log-std and critic together."""

    @property
    def minibatch_size(self) -> int:
        return self.num_steps // self.num_minibatches

    def check(self) -> None:
        _at_least("ppo", self, num_steps=1, num_minibatches=1, num_epochs=1)
        _between("ppo", self, 0.0, 1.0, "gamma", "gae_lambda")
        _positive("ppo", self, "learning_rate", "adam_epsilon", "clip_coefficient", "max_gradient_norm")
        if self.num_steps % self.num_minibatches or self.minibatch_size < 2:
            raise ValueError(
                f"ppo.num_minibatches={self.num_minibatches} does not cut the {self.num_steps} steps of an iteration "
                "into equal minibatches of at least 2"
            )


@pydantic.with_config(extra="forbid")
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Collect:
    """The PPO trials whose policy weights become the data set."""

    task: str = "InvertedPendulum-v4"
    """Gymnasium id of the task."""
    num_trials: int = 50
    """Number of trials; their seeds count up from first_seed."""
    first_seed: int = 1
    """Seed of the first trial."""
    total_env_steps: int = 800_000
    """Environment steps per trial; whole iterations of ppo.num_steps are run."""
    policy_hidden: tuple[int, int] = (8, 8)
    """Widths of the policy's two hidden layers."""
    critic_hidden: tuple[int, int] = (64, 64)
    """Widths of the critic's two hidden layers (the paper gives the policy's alone; these are CleanRL's)."""
    epochs_per_snapshot: int = 2
    """PPO update epochs between two stored snapshots; must divide ppo.num_epochs."""
    iterations_per_commit: int = 20
    """PPO iterations between two commits of a trial: what a kill can cost at most."""
    trials_per_actor: int = 0
    """Trials that one Ray actor runs in lock step; 0 spreads them over the cluster's CPUs."""
    engine: Literal["auto", "compiled", "torch", "cuda"] = "auto"
    """What runs the networks: `compiled` (C++, needs g++), `torch`, `cuda` (torch on one GPU per actor), or `auto`:
    compiled where g++ is found, else torch."""
    physics_threads: int = 1
    """Threads that step an actor's simulations, each with a CPU of its own; changes no bit. More than 1 is for `cuda`,
    where an actor has many trials and few others beside it."""

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(range(self.first_seed, self.first_seed + self.num_trials))

    def check(self) -> None:
        _at_least(
            "collect",
            self,
            num_trials=1,
            first_seed=0,
            epochs_per_snapshot=1,
            iterations_per_commit=1,
            trials_per_actor=0,
            physics_threads=1,
        )
        for field in ("policy_hidden", "critic_hidden"):
            if len(getattr(self, field)) != 2 or min(getattr(self, field)) < 1:
                raise ValueError(f"collect.{field}={getattr(self, field)} is not two widths of at least 1")


@pydantic.with_config(extra="forbid")
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Jump:
    """Update epochs replaced by inference: ppo.num_epochs are run, and a predictor jumps to where more would lead."""

    predictor: str | None = None
    """Folder or URI of a saved predictor or a trained model on the basis `window`; none: no jumps."""
    horizon: int = 3
    """Snapshots that end an iteration and are predicted; ppo.num_epochs are those before them."""
    damping: float = 1.0
    """Share of the forecast that is taken; above 1 goes further."""
    networks: Literal["policy", "both"] = "policy"
    """What jumps: the policy alone, or the critic too, by a forecast of its own."""
    moments: Literal["kept", "reset"] = "kept"
    """Adam's moments and step count after a jump."""
    gate: bool = False
    """Keep a jump only if the surrogate objective on the stored rollout does not fall."""
    limit: float = 3.0
    """Refuse a jump that goes further per snapshot than this many times the context's longest displacement."""

    def check(self) -> None:
        _at_least("jump", self, horizon=1)
        _positive("jump", self, "damping", "limit")


@pydantic.with_config(extra="forbid")
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """Held-out trials, by trial and never by window: the last seeds report, those before choose, the rest train."""

    validation_trials: int = 5
    """Trials that choose: early stopping, hyperparameters."""
    test_trials: int = 5
    """Trials that report: every figure of the evaluation."""

    def cut(self, seeds: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Seeds to train, to choose and to report."""
        first, second = len(seeds) - self.validation_trials - self.test_trials, len(seeds) - self.test_trials
        return seeds[: max(first, 0)], seeds[max(first, 0) : second], seeds[second:]

    def check(self) -> None:
        _at_least("split", self, validation_trials=1, test_trials=1)


@pydantic.with_config(extra="forbid")
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Basis:
    """How snapshots become tokens and tokens become weights (Section 3.2)."""

    kind: Literal["trial", "raw", "shared", "window"] = "trial"
    """`trial`: Temporal SVD of the trial's own trajectory, the paper's, not causal; `raw`: the weights themselves;
    `shared`: one Temporal SVD of all training trials, causal; `window`: the displacements of the context, known by
    their inner products alone, causal."""
    rank: int = 32
    """SVD rank D of `trial` and `shared`."""
    centred: bool = False
    """Subtract the trajectory's mean before the SVD."""
    deltas: bool = False
    """Subtract the trajectory's first snapshot before the SVD."""

    def check(self) -> None:
        _at_least("basis", self, rank=1)
        if self.centred and self.deltas:
            raise ValueError("basis.centred=True and basis.deltas=True exclude each other: choose one origin")
        if self.deltas and self.kind == "shared":
            raise ValueError("basis.deltas=True is not for basis.kind=shared, whose origin is that of all trials")


@pydantic.with_config(extra="forbid")
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """The causal Transformer (Section 3.3), by default of Decision Transformer's size for gym."""

    context: int = 20
    """Context length K: the tokens that the model sees; snapshots, or with basis `window` displacements between."""
    embedding: int = 128
    """Width of a token inside the model."""
    layers: int = 3
    """Transformer blocks."""
    heads: int = 1
    """Attention heads per block; must divide embedding."""
    dropout: float = 0.1
    """Dropout of embeddings, attention and blocks."""
    phase: bool = True
    """Basis `window`: tell the model the phase, where in its PPO iteration each displacement was made."""
    clock: Literal["none", "progress", "learning_rate"] = "progress"
    """Basis `window`: what tells the model how far the trial has come: its share of snapshots, or PPO's annealing."""

    def check(self) -> None:
        _at_least("model", self, context=2, embedding=1, layers=1, heads=1)
        _between("model", self, 0.0, 0.95, "dropout")
        if self.embedding % self.heads:
            raise ValueError(f"model.heads={self.heads} does not divide model.embedding={self.embedding}")


@pydantic.with_config(extra="forbid")
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Train:
    """How the Transformer is trained; the defaults are the paper's 50 iterations of 10,000 batches."""

    num_steps: int = 500_000
    """Optimisation steps."""
    steps_per_iteration: int = 10_000
    """Steps between two validations, each with a checkpoint."""
    batch_size: int = 64
    """Windows per step, over all workers together."""
    learning_rate: float = 1e-4
    """AdamW's learning rate after the warm-up."""
    weight_decay: float = 1e-4
    """AdamW's weight decay."""
    warmup_steps: int = 10_000
    """Steps of linear warm-up."""
    schedule: Literal["constant", "cosine"] = "constant"
    """The learning rate after the warm-up: constant, or falling to 0 at the last step on half a cosine."""
    max_gradient_norm: float = 0.25
    """Limit of the gradient's norm."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the matrix products inside the Transformer's blocks while it trains; all else, and validation, is float32.
    `bfloat16` takes half the time where the processor or GPU has instructions for it, and is slow where not."""
    joined_windows: float = 0.0
    """Basis `window`: share of a batch's windows that are put beside others, so that each stands for a policy that is
    made of several."""
    seed: int = 0
    """Seed of initialisation, batches and dropout."""
    num_seeds: int = 1
    """Models that are trained, on seeds that count up from `seed`; the evaluation judges them all."""
    data: tuple[str, ...] = ()
    """Basis `window`: storages of the data sets to train on in place of this experiment's own; the split holds in
    each."""
    num_workers: int = 1
    """Ray Train workers."""
    use_gpu: bool = False
    """One GPU per worker."""

    def check(self) -> None:
        _at_least(
            "train",
            self,
            num_steps=1,
            steps_per_iteration=1,
            batch_size=1,
            warmup_steps=0,
            num_workers=1,
            seed=0,
            num_seeds=1,
        )
        _positive("train", self, "learning_rate", "max_gradient_norm")
        _between("train", self, 0.0, 1.0, "joined_windows")
        if self.batch_size % self.num_workers:
            raise ValueError(f"train.num_workers={self.num_workers} does not divide train.batch_size={self.batch_size}")


@pydantic.with_config(extra="forbid")
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Evaluate:
    """How predicted weights are judged: WPE, skill and REPW (Section 4)."""

    horizon: int = 10
    """Forward steps that are predicted, from 1 on."""
    extra_horizons: tuple[int, ...] = ()
    """Forward steps beyond them that are predicted too, rising."""
    windows_per_trial: int = 20
    """Windows per test trial whose policies are run for REPW, evenly spaced; WPE takes every window."""
    run_policies_of: tuple[str, ...] = ("copy-last", "linear", "ridge", "tipl", "svd-floor", "window-floor")
    """Predictors whose policies are run, by their names in the result table; WPE takes all predictors, and of
    none no policy is run."""
    episodes: int = 10
    """Evaluation episodes E per policy; the noise floor takes as many again on other seeds."""
    sampled_actions: bool = False
    """Sample actions from the policy instead of taking its mean."""
    bootstrap: int = 1000
    """Bootstrap resamples over trials behind each confidence interval."""
    confidence: float = 0.95
    """Level of the confidence intervals."""
    seed: int = 0
    """Seed of the evaluation episodes and of the bootstrap."""

    @property
    def steps(self) -> tuple[int, ...]:
        """Every forward step that is predicted."""
        return (*range(1, self.horizon + 1), *self.extra_horizons)

    def check(self) -> None:
        _at_least("evaluate", self, horizon=1, windows_per_trial=1, episodes=1, bootstrap=1, seed=0)
        _between("evaluate", self, 0.5, 0.999, "confidence")
        extra = (self.horizon, *self.extra_horizons)
        if list(extra) != sorted(set(extra)):
            raise ValueError(
                f"evaluate.extra_horizons={self.extra_horizons} do not rise from beyond evaluate.horizon={self.horizon}"
            )


@pydantic.with_config(extra="forbid")
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Accelerate:
    """PPO with and without jumps, side by side on the unseen seeds that `collect` names."""

    tasks: tuple[str, ...] = ("HalfCheetah-v4", "InvertedPendulum-v4", "Hopper-v4", "Walker2d-v4")
    """Gymnasium ids; TASK@STEPS for other environment steps than collect.total_env_steps."""
    contenders: tuple[str, ...] = (
        "10",
        "4",
        "4+ridge",
        "4+tipl",
        "4+damped",
        "4+linear",
        "4+first-again",
        "4+rank-1-from-last",
        "4+dmd",
    )
    """EPOCHS or EPOCHS+PREDICTOR, with :OPTION,... of gate, reset, both, xDAMPING; the first is what others are held
    against."""
    predictors_from: str = "jobs/experiments/inverted_pendulum.toml"
    """Experiment whose collected trials the predictors are fitted on, and whose trained model TIPL is."""
    predictors_storage: str | None = None
    """That experiment's storage; none is the one that it names."""
    learning_rates: tuple[float, ...] = (1.5e-4, 3e-4, 6e-4, 1.2e-3, 2.4e-3)
    """What each contender's learning rate is chosen from, by area under the curve, rising."""
    search_first_seed: int = 10_001
    """Seed of the first trial of the search; none of them is reported."""
    search_trials: int = 5
    """Trials per contender and learning rate in the search."""
    units_at_once: int = 0
    """Contenders that run at the same time, each on one CPU; 0 takes every CPU."""
    keep_weights: bool = False
    """Keep the trials' snapshots once their learning curves are written down."""
    bootstrap: int = 10_000
    """Bootstrap resamples over trials behind each confidence interval."""

    def check(self) -> None:
        _at_least("accelerate", self, search_trials=1, units_at_once=0, bootstrap=1)
        for field in ("tasks", "contenders", "learning_rates"):
            if not getattr(self, field):
                raise ValueError(f"accelerate.{field} is empty")
        if list(self.learning_rates) != sorted(set(self.learning_rates)) or self.learning_rates[0] <= 0:
            raise ValueError(f"accelerate.learning_rates={self.learning_rates} do not rise from above 0")


@pydantic.with_config(extra="forbid")
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Tracking:
    """Where MLflow keeps its records."""

    # Neither a traceback nor --help shows it: it may carry a password.
    uri: Annotated[str | None, tyro.conf.arg(help_behavior_hint="")] = dataclasses.field(default=None, repr=False)
    """MLflow tracking URI; none takes $MLFLOW_TRACKING_URI, else a sqlite file in the storage. A password in it is
    shown and kept nowhere."""
    experiment: str | None = None
    """MLflow experiment; none takes the experiment's name."""


@pydantic.with_config(extra="forbid")
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
    num_samples: int = 20
    """Children of an `optuna` search."""
    scheduler: Literal["none", "asha"] = "none"
    """`asha` ends a child early where others had more of the metric after as many steps."""
    metric: str = "skill"
    """What the best child has most of: `skill`, the validation skill in weights, mean over the forward steps, or
    `skill_h1`, `skill_h10`, ..., at one of them."""
    trainer: Literal["tune", "ray-train"] = "tune"
    """`tune` trains a child in Ray Tune's own process; `ray-train` has Ray Tune drive Ray Train's TorchTrainer, so that
    a child can have many workers, train.num_workers. Each takes half a minute longer to start."""
    max_concurrent_trials: int = 0
    """Most children that run at a time; 0 leaves it to the cluster's resources."""
    cpus_per_trial: int = 1
    """CPUs of each child, and its threads; with `ray-train`, of each of its workers."""
    gpus_per_trial: float = 0.0
    """GPUs of each child; a fraction shares one. Above 0 it trains there. With `ray-train`, of each of its workers."""
    seed: int = 0
    """Seed of the `optuna` search."""

    def check(self) -> None:
        _at_least("sweep", self, num_samples=1, max_concurrent_trials=0, cpus_per_trial=1, seed=0)
        _between("sweep", self, 0.0, float("inf"), "gpus_per_trial")


@pydantic.with_config(extra="forbid")
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Experiment:
    """One experiment: what is collected, how it is reduced, what learns from it and how that is judged."""

    name: str
    """Name of the experiment, and of its folder in the default storage."""
    storage: str | None = None
    """Folder or URI for everything that the stages leave; none is storage/<name> in the checkout, which git ignores."""
    preset: Literal["causal", "paper"] = "paper"
    """Set of defaults for basis, model and training: `paper` is the paper's Transformer on its Temporal SVD, `causal`
    our own on the basis `window`. The file's sections [causal.train], [paper.train] and so on hold for one of them."""
    collect: Collect = dataclasses.field(default_factory=Collect)
    ppo: Ppo = dataclasses.field(default_factory=Ppo)
    jump: Jump = dataclasses.field(default_factory=Jump)
    split: Split = dataclasses.field(default_factory=Split)
    basis: Basis = dataclasses.field(default_factory=Basis)
    model: Model = dataclasses.field(default_factory=Model)
    train: Train = dataclasses.field(default_factory=Train)
    evaluate: Evaluate = dataclasses.field(default_factory=Evaluate)
    accelerate: Accelerate = dataclasses.field(default_factory=Accelerate)
    sweep: Sweep = dataclasses.field(default_factory=Sweep)
    tracking: Tracking = dataclasses.field(default_factory=Tracking)

    @property
    def storage_path(self) -> str:
        """Absolute folder, or the URI as given: Ray changes the working directory of its workers."""
        if self.storage is None:
            return str(CHECKOUT / "storage" / self.name)
        return absolute_storage(self.storage)

    @property
    def num_iterations(self) -> int:
        """PPO iterations per trial."""
        return self.collect.total_env_steps // self.ppo.num_steps

    @property
    def env_steps_per_trial(self) -> int:
        """Environment steps of the whole iterations that a trial runs."""
        return self.num_iterations * self.ppo.num_steps

    @property
    def snapshots_run(self) -> int:
        """Snapshots per iteration that update epochs lead to."""
        return self.ppo.num_epochs // self.collect.epochs_per_snapshot

    @property
    def snapshots_per_iteration(self) -> int:
        """Snapshots per iteration, those that a jump predicts included."""
        return self.snapshots_run + (self.jump.horizon if self.jump.predictor else 0)

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

    def check(self) -> Self:
        """Refuse what cannot run. Raises ValueError naming the field, the value and the limit."""
        if not self.name or any(letter in self.name for letter in "/\\ "):
            raise ValueError(f"name={self.name!r} is not a folder's name")
        places = [("storage", self.storage), ("jump.predictor", self.jump.predictor)]
        places += [("accelerate.predictors_storage", self.accelerate.predictors_storage)]
        for named, place in places + [("train.data", storage) for storage in self.train.data]:
            if place and redacted(place) != place:
                raise ValueError(
                    f"{named}={redacted(place)!r} carries credentials, which every log would show, or an option that "
                    "is none of endpoint_override, scheme and region: give credentials by the environment or a profile"
                )
        for field in dataclasses.fields(self):
            if hasattr(part := getattr(self, field.name), "check"):
                part.check()
        if self.collect.total_env_steps < self.ppo.num_steps:
            raise ValueError(
                f"collect.total_env_steps={self.collect.total_env_steps} is less than one iteration of "
                f"ppo.num_steps={self.ppo.num_steps}"
            )
        if self.ppo.num_epochs % self.collect.epochs_per_snapshot:
            raise ValueError(
                f"collect.epochs_per_snapshot={self.collect.epochs_per_snapshot} does not divide "
                f"ppo.num_epochs={self.ppo.num_epochs}"
            )
        held_out = self.split.validation_trials + self.split.test_trials
        if held_out >= self.collect.num_trials:
            raise ValueError(
                f"split.validation_trials + split.test_trials = {held_out} leaves no trial to train on: "
                f"collect.num_trials={self.collect.num_trials}"
            )
        if self.basis.kind == "trial" and self.basis.rank > self.num_snapshots:
            raise ValueError(f"basis.rank={self.basis.rank} exceeds the {self.num_snapshots} snapshots of a trial")
        if self.train.data and self.basis.kind != "window":
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
        return self


PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "paper": {},
    "causal": {
        "basis": {"kind": "window"},
        "model": {"embedding": 64, "layers": 2, "heads": 4, "dropout": 0.0},
        "train": {
            "num_steps": 2_500,
            "steps_per_iteration": 250,
            "batch_size": 64,
            "learning_rate": 2e-3,
            "weight_decay": 0.05,
            "warmup_steps": 200,
            "schedule": "cosine",
            "max_gradient_norm": 1.0,
            "joined_windows": 0.3,
        },
    },
}
"""Fields that a preset sets; the paper's are the dataclasses' own defaults."""


def absolute_storage(storage: str) -> str:
    """A folder as an absolute path, a URI as given."""
    return storage if "://" in storage else str(Path(storage).expanduser().absolute())


def load_experiment(path: str | Path, preset: str | None = None) -> Experiment:
    """Read an experiment's TOML file, unchecked; a preset given here takes the place of the file's.

    What is later overrides what is before: the dataclasses' defaults, the preset, the file's sections, its sections for
    this preset. Raises FileNotFoundError, or ValueError naming the key for what is not TOML, an unknown key or a wrong
    type.
    """
    path = Path(path)
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in (CHECKOUT / "jobs" / "experiments").glob("*.toml")))
        raise FileNotFoundError(f"--experiment {path}: no such file; in jobs/experiments there are: {known}")
    try:
        table = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not TOML: {error}") from error
    table["preset"] = preset = preset or table.get("preset", "paper")
    if preset not in PRESETS:
        raise ValueError(f"{path}: preset={preset!r} is not one of {sorted(PRESETS)}")
    own = {name: table.pop(name, {}) for name in PRESETS}[preset]
    for section in PRESETS[preset] | own:
        table[section] = {**PRESETS[preset].get(section, {}), **table.get(section, {}), **own.get(section, {})}
    return _build({"name": path.stem, **table}, str(path))


def parse_arguments(description: str, arguments: list[str] | None = None) -> Experiment:
    """The experiment of a command line: `--experiment FILE` and `--preset NAME` first, then any field of it by name.

    Exits with status 2 and one line on standard error where the file or a field is refused.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    path = take_option(arguments, "--experiment") or str(CHECKOUT / "jobs" / "experiments" / "demo.toml")
    try:
        # The preset decides what the other fields' defaults are, wherever it stands among them.
        loaded = load_experiment(path, take_option(arguments, "--preset"))
    except (FileNotFoundError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    usage = f"{description}\n\n--experiment FILE   TOML file with the experiment, read first; now {path}"
    experiment = tyro.cli(Experiment, default=loaded, args=arguments, description=usage)
    try:
        return dataclasses.replace(experiment, storage=_with_variables(experiment.storage)).check()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error


def _with_variables(storage: str | None) -> str | None:
    """With $NAME as the environment has it: `ray job submit` quotes its command, so that no shell has seen to that."""
    expanded = os.path.expandvars(storage) if storage else storage
    if expanded and (unknown := re.search(r"\$\{?(\w+)", expanded)):
        raise ValueError(f"storage={storage!r}: the environment of the job has no {unknown[1]}")
    return expanded


def take_option(arguments: list[str], option: str) -> str | None:
    """Remove an option from a command line and return its value."""
    for position, argument in enumerate(arguments):
        if argument == option and position + 1 < len(arguments):
            value = arguments[position + 1]
            del arguments[position : position + 2]
            return value
        if argument.startswith(f"{option}="):
            del arguments[position]
            return argument.removeprefix(f"{option}=")
    return None


def as_table(config: Any) -> dict[str, Any]:
    """A configuration as plain JSON types, fit to be published: its URIs are `redacted`."""
    return _published(json.loads(json.dumps(dataclasses.asdict(config))))


SHOWN_OPTIONS = (
    "endpoint_override",
    "scheme",
    "region",
    "host",
    "port",
    "user",
    "dbname",
    "sslmode",
    "charset",
    "driver",
)
"""Options of a URI that hold no secret; the values of others are not shown."""


def redacted(uri: str) -> str:
    """The URI as it may be shown, logged and written: *** for its password or token and for options not known harmless.

    >>> redacted("postgresql://me:secret@host/runs?sslmode=require&sslpassword=secret")
    'postgresql://me:***@host/runs?sslmode=require&sslpassword=***'
    >>> redacted("https://token@host:5000"), redacted("sqlite:////data/a:b@c.db"), redacted("s3://bucket/run@2")
    ('https://***@host:5000', 'sqlite:////data/a:b@c.db', 's3://bucket/run@2')
    """
    scheme, place = re.fullmatch(r"([A-Za-z][\w+.-]*:/+)?(.*)", uri, re.DOTALL).groups("")  # type: ignore[union-attr]
    user, at = "", ""
    if 0 < scheme.count("/") < 3 or (not scheme and not place.startswith("/")):
        before_options = place.partition("?")[0]
        # A password may hold any sign, the question mark too: what follows a colon is one unless it is a port.
        odd = "@" in place and re.match(r"[^/:@]*:(?!\d+(/|$))", before_options)
        user, at, place = place.rpartition("@") if odd or "@" in before_options else ("", "", place)
    if ":" in user:
        user = f"{user.partition(':')[0]}:***"
    elif scheme.lower().startswith("http") and at:
        user = "***"
    if scheme:
        place, mark, options = place.partition("?")
        place += mark + re.sub(r"([^&;=]+)(=?)([^&;]*)", _shown_option, options)
    return f"{scheme}{user}{at}{place}"


def _shown_option(option: re.Match[str]) -> str:
    name, equals, value = option.groups()
    if not equals or name not in SHOWN_OPTIONS:
        return f"{name}=***" if equals else "***"
    return f"{name}={value if redacted(unquote(value)) == unquote(value) else redacted(unquote(value))}"


def _published(part: Any) -> Any:
    if isinstance(part, dict):
        return {name: _published(value) for name, value in part.items()}
    if isinstance(part, list):
        return [_published(value) for value in part]
    return redacted(part) if isinstance(part, str) and ":/" in part else part


def flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """A table's values by their dotted names.

    >>> dict(flat({"basis": {"kind": "trial", "rank": 64}, "name": "demo"}))
    {'basis.kind': 'trial', 'basis.rank': 64, 'name': 'demo'}
    """
    for name, value in table.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def from_table(table: dict[str, Any]) -> Experiment:
    """The experiment that `as_table` wrote down."""
    return _build(table, "table").check()


def digest(*parts: Any) -> str:
    """First 16 hexadecimal digits of the SHA-256 of the parts' canonical JSON."""
    plain = [as_table(part) if dataclasses.is_dataclass(part) else part for part in parts]
    canonical = json.dumps(plain, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


@functools.cache
def _adapter() -> pydantic.TypeAdapter[Experiment]:
    return pydantic.TypeAdapter(Experiment)


def _build(table: dict[str, Any], where: str) -> Experiment:
    try:
        return _adapter().validate_python(table)
    except pydantic.ValidationError as error:
        complaints = []
        for item in error.errors():
            field = ".".join(map(str, item["loc"]))
            message = (
                "unknown key" if item["type"] in ("unexpected_keyword_argument", "extra_forbidden") else item["msg"]
            )
            complaints.append(f"{field}={_published(item['input'])!r}: {message}")
        raise ValueError(f"{where}: " + "; ".join(complaints)) from error


def _at_least(section: str, config: Any, **limits: int) -> None:
    for field, limit in limits.items():
        if getattr(config, field) < limit:
            raise ValueError(f"{section}.{field}={getattr(config, field)} is below {limit}")


def _between(section: str, config: Any, low: float, high: float, *fields: str) -> None:
    for field in fields:
        if not low <= getattr(config, field) <= high:
            raise ValueError(f"{section}.{field}={getattr(config, field)} is outside [{low}, {high}]")


def _positive(section: str, config: Any, *fields: str) -> None:
    for field in fields:
        if not 0 < getattr(config, field) < float("inf"):
            raise ValueError(f"{section}.{field}={getattr(config, field)} is not a positive number")
