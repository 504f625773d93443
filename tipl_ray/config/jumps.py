"""The sections of an experiment that are about jumps: contenders, and the tuning of jumps for return."""

import dataclasses
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple, Self

import pydantic
import tyro
from pydantic import Field

from tipl_ray.config.fields import (
    LARGEST,
    LATER,
    STRICT,
    Natural,
    Positive,
    Share,
    check_last_seed,
    check_once,
    validated,
)
from tipl_ray.config.sections import Ppo
from tipl_ray.digest import as_table
from tipl_ray.errors import no_such
from tipl_ray.places import check_text, published_rules
from tipl_ray.registry import PREDICTORS

if TYPE_CHECKING:
    from tipl_ray.config.experiment import Experiment


@pydantic.with_config(STRICT)
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Jump:
    """A jump at the end of every PPO iteration, by a predictor of snapshots."""

    predictor: str
    """Name of a predictor that combines displacements; `tipl`, the Transformer that predictors_from has trained; or one
    that the package brings along, such as `return-rule-v1`."""
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
            if self.jump and self.jump.predictor not in (known := (*PREDICTORS.names(), "tipl", *published_rules())):
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


class RunTask(NamedTuple):
    """A task as accelerate.tasks names it: `Hopper-v4`, `Hopper-v4@150000`, `HalfCheetah-v4/256-256@300000`."""

    task: str
    """Gymnasium id."""
    policy_hidden: tuple[int, int] | None
    """Widths of the policy's hidden layers, where they are not the experiment's."""
    env_steps: int | None
    """Environment steps, where they are not the experiment's."""

    @classmethod
    def read(cls, text: str, field: str = "task") -> Self:
        """Raises ValueError naming the field for a text that means something else."""
        found = re.fullmatch(r"([^@]+?)(?:/(\d{1,9})-(\d{1,9}))?(?:@(\d{1,10}))?", text)
        widths = found and found[2] and (int(found[2]), int(found[3]))
        steps = found and found[4] and int(found[4])
        if not found or (widths and not 1 <= min(widths) <= max(widths) <= 16_384):
            raise ValueError(f"{field}: {text!r} is not TASK, TASK@STEPS or TASK/WIDTH-WIDTH, with widths up to 16384")
        if found[4] and not 1 <= int(found[4]) <= LARGEST:
            raise ValueError(f"{field}: {text!r} is not TASK@STEPS with environment steps from 1 to {LARGEST}")
        return cls(found[1], widths or None, steps or None)


def _with_jumps(epochs: int, predictors: Sequence[str]) -> tuple[Contender, ...]:
    ppo: dict[str, bool | int | float | str] = {"num_epochs": epochs}
    return tuple(Contender(name=f"{epochs}+{name}", ppo=ppo, jump=Jump(predictor=name)) for name in predictors)


@pydantic.with_config(STRICT)
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Accelerate:
    """PPO with and without jumps, side by side on the unseen seeds that `collect` names."""

    tasks: tuple[str, ...] = ("HalfCheetah-v4", "InvertedPendulum-v4", "Hopper-v4", "Walker2d-v4")
    """Gymnasium ids; TASK@STEPS for other environment steps than collect.total_env_steps, and TASK/WIDTH-WIDTH for
    another policy than collect.policy_hidden."""
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
        check_last_seed("accelerate", "search_first_seed", self.search_first_seed, self.search_trials)
        for field in ("tasks", "contenders", "learning_rates"):
            if not getattr(self, field):
                raise ValueError(f"accelerate.{field} is empty")
        names = [contender.name for contender in self.contenders]
        check_once("accelerate", "contenders", names)
        for field in ("tasks", "search_tasks", "only"):
            check_once("accelerate", field, getattr(self, field))
        for name in self.only:
            if name not in names:
                raise no_such("accelerate.only", name, names)
        for field in ("tasks", "search_tasks"):
            for task in getattr(self, field):
                RunTask.read(task, f"accelerate.{field}")
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
    models: Annotated[int, Field(ge=1, le=1_000)] = 5
    """Models that learn from the forks what changes are worth, on seeds of their own."""
    model_steps: Annotated[int, Field(ge=1, le=10_000_000)] = 2_000
    """Optimisation steps of each."""
    search_trials: Annotated[int, Field(ge=1, le=100_000)] = 1
    """Trials of each rule on each task, in a regime that is drawn for each generation and task."""

    def check(self) -> None:
        for field in ("tasks", "regimes"):
            if not getattr(self, field):
                raise ValueError(f"improve.{field} is empty")
        check_once("improve", "tasks", self.tasks)
        check_once("improve", "regimes", [regime.name for regime in self.regimes])
        for regime in self.regimes:
            regime.check()
            jump = regime.jump
            if not (jump and (jump.numbers or jump.predictor in published_rules())):
                raise ValueError(
                    f"improve.regimes: {regime.name!r} has no jump by a return-rule's numbers or by a published one"
                )
            if not regime.values:
                raise ValueError(f"improve.regimes: {regime.name!r} has no values of {regime.searched}")
