"""The sections of an experiment that are about jumps: variants of PPO, and the tuning of jumps for return."""

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
    naming,
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
    """A jump at the end of every PPO iteration, to weights that a predictor forecasts."""

    predictor: str
    """Name of a predictor that combines displacements; `tipl`, the Transformer trained in predictors_from; or a
    predictor that comes with the package, such as `return-rule-v1`."""
    horizon: Annotated[int, Field(ge=0, le=10_000)] = 0
    """Number of snapshots at the end of the iteration that the jump replaces; 0: as many as an iteration of
    predictors_from has beyond the update epochs that are run."""
    damping: Annotated[float, Field(gt=0, le=1e6)] = 1.0
    """Factor on the forecast displacement; above 1 goes further."""
    networks: Literal["policy", "both"] = "policy"
    """What jumps: only the policy, or also the critic, with a separate forecast."""
    moments: Literal["kept", "reset"] = "kept"
    """Whether Adam's moments and step count are kept or reset after a jump."""
    gate: bool = False
    """Undo a jump that lowers the surrogate objective on the stored rollout."""
    corrective_epochs: Annotated[int, Field(ge=0, le=10_000)] = 0
    """How many of the ppo.num_epochs update epochs to run after the jump instead of before it."""
    kl_limit: Annotated[float, Field(ge=0, le=1e6)] = 0.0
    """Shorten a jump whose approximate KL divergence from the rollout policy would exceed this. 0: the limit of a rule
    that has its own, else none."""
    numbers: tuple[float, ...] = ()
    """Predictor `return-rule`: the rule's seven parameters, see accelerate/return_rule.py."""


@pydantic.with_config(STRICT)
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class OuterStep:
    """An outer optimizer that takes the weight change of each PPO iteration as its gradient: SGD with Nesterov momentum
    (outer-PPO, arXiv 2411.00666)."""

    rate: Positive = 1.0
    """Outer learning rate; 1 without momentum is plain PPO."""
    momentum: Share = 0.0
    """Outer momentum."""
    networks: Literal["policy", "both"] = "both"
    """What the outer optimizer updates: only the policy, or also the critic."""


@pydantic.with_config(STRICT)
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Contender:
    """A variant of PPO's updates."""

    name: str
    """Name in tables and figures."""
    ppo: dict[str, bool | int | float | str] = dataclasses.field(default_factory=dict, hash=False)
    """Fields of [ppo] that this variant overrides."""
    jump: Jump | None = None
    """Settings of its jumps, if any."""
    outer: OuterStep | None = None
    """Settings of its outer optimizer, if any."""
    searched: str = "learning_rate"
    """Numeric field of [ppo] that is tuned for this variant."""
    values: tuple[float, ...] = ()
    """Values to choose from, in increasing order, as many as accelerate.learning_rates; empty:
    accelerate.learning_rates themselves."""
    per_task: bool = False
    """Tune separately for each task, on search seeds of that task; where other variants have one setting for all tasks,
    this one is an oracle."""

    def check(self) -> None:
        """Refuse invalid settings. Raises ValueError naming the variant; the caller adds the field that holds it."""
        try:
            check_text("name", self.name)
            if self.jump and self.outer:
                raise ValueError("it has both a jump and an outer step; choose one")
            if self.searched in self.ppo:
                raise ValueError(
                    f"ppo.{self.searched}={self.ppo[self.searched]!r} is set but also searched; remove one"
                )
            if list(self.values) != sorted(set(self.values)):
                raise ValueError(f"values={list(self.values)} must increase")
            if self.searched != "learning_rate" and not self.values:
                raise ValueError(f"searched={self.searched!r} needs values to choose from")
            if self.jump and len(self.jump.numbers) not in (0, 7 if self.jump.predictor == "return-rule" else 0):
                raise ValueError(
                    f"jump.numbers={list(self.jump.numbers)}: only return-rule takes numbers, and exactly 7"
                )
            if self.jump and self.jump.predictor not in (known := (*PREDICTORS.names(), "tipl", *published_rules())):
                raise no_such("jump.predictor", self.jump.predictor, known)
        except ValueError as error:
            raise ValueError(f"{self.name!r}: {error}") from error

    def ppo_at(self, ppo: Ppo, value: float) -> Ppo:
        """PPO's settings with this variant's overrides and one searched value. Raises ValueError naming the variant."""
        table = {**self.ppo, self.searched: value}
        try:
            made: Ppo = validated(Ppo, as_table(ppo) | table, "ppo.")
            made.check()
        except ValueError as error:
            raise ValueError(f"{self.name!r}: {error}") from error
        return made

    def epochs_before_jump(self, ppo: Ppo) -> int:
        """Update epochs that an iteration runs before its jump."""
        return int(self.ppo.get("num_epochs", ppo.num_epochs)) - (self.jump.corrective_epochs if self.jump else 0)

    def check_on(self, ppo: Ppo, values: Sequence[float], env_steps: int) -> None:
        """Refuse what cannot run for so many environment steps. Raises ValueError naming the variant."""
        for value in values:
            num_steps = self.ppo_at(ppo, value).num_steps
            if num_steps > env_steps:
                raise ValueError(
                    f"{self.name!r}: ppo.num_steps={num_steps} is more than the {env_steps} environment steps of a "
                    "trial, which have to hold one PPO iteration"
                )
        if self.epochs_before_jump(ppo) < 1:
            raise ValueError(
                f"{self.name!r}: jump.corrective_epochs leaves no epoch of ppo.num_epochs to run before the jump"
            )

    def horizon(self, ppo: Ppo, source: "Experiment") -> int:
        """Number of snapshots that its jump replaces; `source` is the experiment that predictors come from.

        Raises ValueError naming the variant if that is not a whole number of snapshots, at least one.
        """
        run, size = self.epochs_before_jump(ppo), source.collect.epochs_per_snapshot
        skipped = self.jump.horizon * size if self.jump and self.jump.horizon else source.ppo.num_epochs - run
        if skipped < size or skipped % size or run % size:
            raise ValueError(
                f"{self.name!r} runs {run} update epochs, and its jump replaces {skipped} "
                f"(iterations of {source.name} have {source.ppo.num_epochs}); both must be positive multiples of "
                f"{size}, the epochs between two snapshots there"
            )
        return skipped // size


class RunTask(NamedTuple):
    """A task as accelerate.tasks names it: `Hopper-v4`, `Hopper-v4@150000`, `HalfCheetah-v4/256-256@300000`."""

    task: str
    """Gymnasium id."""
    policy_hidden: tuple[int, int] | None
    """Widths of the policy's hidden layers; None: the experiment's."""
    env_steps: int | None
    """Environment steps; None: the experiment's."""

    @classmethod
    def read(cls, text: str, field: str = "task") -> Self:
        """Parse a task. Raises ValueError naming the field if the text has another form."""
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
    """Comparison of PPO variants with and without jumps, on the trials of [collect], which nothing is tuned on."""

    tasks: tuple[str, ...] = ("HalfCheetah-v4", "InvertedPendulum-v4", "Hopper-v4", "Walker2d-v4")
    """Gymnasium ids; TASK@STEPS sets environment steps other than collect.total_env_steps, TASK/WIDTH-WIDTH a policy
    other than collect.policy_hidden."""
    contenders: Annotated[tuple[Contender, ...], tyro.conf.Suppress] = (
        Contender(name="10"),
        Contender(name="4", ppo={"num_epochs": 4}),
        *_with_jumps(4, ("ridge", "tipl", "damped", "linear", "first-again", "rank-1-from-last", "dmd")),
    )
    """The variants: a section [[accelerate.contenders]] of the experiment's file for each. The others are compared with
    the first."""
    only: tuple[str, ...] = dataclasses.field(default=(), metadata=LATER)
    """Names of the variants to run in addition to the first; empty: all."""
    learning_rates: tuple[Positive, ...] = (1.5e-4, 3e-4, 6e-4, 1.2e-3, 2.4e-3)
    """Learning rates to choose from for each variant, by area under the learning curve, in increasing order; a single
    one is used without a search."""
    search_tasks: tuple[str, ...] = dataclasses.field(default=(), metadata=LATER)
    """Tasks (TASK or TASK@STEPS) on which one learning rate per variant is chosen for all tasks, by mean rank. Empty:
    the learning rate is chosen separately for each task."""
    search_first_seed: Natural = 10_001
    """Seed of the first search trial; search trials are not part of the results."""
    search_trials: Annotated[int, Field(ge=1, le=100_000)] = 5
    """Search trials per variant and learning rate."""
    bootstrap: Annotated[int, Field(ge=1, le=1_000_000)] = 10_000
    """Bootstrap resamples (over trials) per confidence interval."""

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
            with naming("accelerate.contenders"):
                contender.check()
        for contender in self.running:
            if len(contender.values) not in (0, len(self.learning_rates)):
                raise ValueError(
                    f"accelerate.contenders: {contender.name!r}: {len(contender.values)} values to search, but "
                    f"accelerate.learning_rates has {len(self.learning_rates)}; every variant needs the same budget"
                )
        if list(self.learning_rates) != sorted(set(self.learning_rates)):
            raise ValueError(f"accelerate.learning_rates={self.learning_rates} must increase")

    @property
    def running(self) -> tuple[Contender, ...]:
        """The variants to run; the first is the one that the others are compared with."""
        first, *others = self.contenders
        return (first, *(one for one in others if not self.only or one.name in self.only))

    def values_of(self, contender: Contender) -> tuple[float, ...]:
        """Values that a variant's searched field is chosen from."""
        return contender.values or self.learning_rates


_SMALL_ZOO = {
    **{"num_steps": 512, "num_minibatches": 8, "gamma": 0.98, "gae_lambda": 0.92, "clip_coefficient": 0.1},
    **{"clip_values": False, "initial_log_std": -2.0, "bootstrap_truncated": True},
}
"""PPO close to rl-baselines3-zoo's tuned settings for HalfCheetah, on small networks."""


@pydantic.with_config(STRICT)
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Improve:
    """Tuning of jumps for return: forks of trials, which show what raises it, and a search for a rule."""

    tasks: tuple[str, ...] = ("HalfCheetah-v4", "Hopper-v4", "InvertedDoublePendulum-v4", "Swimmer-v4")
    """Gymnasium ids of the tasks to tune on; results are reported on other tasks."""
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
    """A section [[improve.regimes]] of the experiment's file for each: PPO hyperparameters, and the base rule whose
    jumps the forks vary. Forks are made at each of its values; a search for a rule chooses a value between the lowest
    and the highest, in each regime in the same place."""
    stages: Annotated[int, Field(ge=1, le=10_000)] = 6
    """Number of iterations, evenly spaced, at which each trial is forked."""
    pairs: Annotated[int, Field(ge=1, le=10_000)] = 4
    """Pairs of branches per fork, with opposite changes to the jump; one more branch leaves the jump unchanged."""
    spread: tuple[Positive, Positive, Positive] = (0.5, 0.5, 0.25)
    """Standard deviations of the changes to the rule's weights for the first displacement, the last displacement and
    past moves."""
    iterations: Annotated[int, Field(ge=1, le=100_000)] = 10
    """PPO iterations to run each branch for."""
    generations: Annotated[int, Field(ge=1, le=100_000)] = 15
    """CMA-ES generations per search."""
    population: Annotated[int, Field(ge=4, le=1_000)] = 8
    """Rules per generation."""
    searches: Annotated[int, Field(ge=1, le=1_000)] = 5
    """Number of searches, each on different seeds, since the result of one may be luck."""
    search_first_seed: Natural = 30_001
    """Seed of the first search trial. All rules of a generation run on the same seeds; every generation has new
    ones."""
    models: Annotated[int, Field(ge=1, le=1_000)] = 5
    """Number of models to train on the forks, with different seeds, per choice of inputs."""
    model_steps: Annotated[int, Field(ge=1, le=10_000_000)] = 2_000
    """Optimisation steps per model."""
    search_trials: Annotated[int, Field(ge=1, le=100_000)] = 1
    """Trials per rule and task, in a regime that is drawn at random for each generation and task."""

    def check(self) -> None:
        for field in ("tasks", "regimes"):
            if not getattr(self, field):
                raise ValueError(f"improve.{field} is empty")
        check_once("improve", "tasks", self.tasks)
        check_once("improve", "regimes", [regime.name for regime in self.regimes])
        for regime in self.regimes:
            with naming("improve.regimes"):
                regime.check()
            jump = regime.jump
            if not (jump and (jump.numbers or jump.predictor in published_rules(["return-rule"]))):
                raise ValueError(
                    f"improve.regimes: {regime.name!r} needs a jump by return-rule with numbers, or by a published rule"
                )
            if not regime.values:
                raise ValueError(f"improve.regimes: {regime.name!r} needs values for {regime.searched}")
            if min(regime.values) <= 0:
                raise ValueError(f"improve.regimes: {regime.name!r}: values={list(regime.values)} must be above 0")
