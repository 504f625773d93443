"""Forks: one state of a trial, continued with many different jumps and the same random numbers.

A trial's state is complete to the bit, so branches differ only by their jumps. A cell is one task with one regime of
hyperparameters: a stack of trials that run to their last fork, and at each fork a stack of branches, which continue the
trials for some iterations. The branch without a change does what the trial itself does.

Shapes: S trials, B branches of each, I iterations of a branch, K displacements of context.
"""

import dataclasses
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tipl_ray.accelerate.contenders import jump_question, jump_settings, published
from tipl_ray.accelerate.group_jumps import GroupJumps, Jumps
from tipl_ray.accelerate.jumps import Forecaster, JumpSettings
from tipl_ray.accelerate.return_rule import ReturnRule, RuleNumbers
from tipl_ray.collect.group import trial_header
from tipl_ray.config import Contender, Experiment, Improve
from tipl_ray.digest import identity
from tipl_ray.ppo.algorithms import Extension, Hooks, State
from tipl_ray.ppo.trials import TrialGroup, network_shape
from tipl_ray.predict.gram import Question

BEFORE = 5
"""Number of a trial's returns before the fork that are stored."""
SCHEMA = pa.schema(
    [
        *(pa.field(name, pa.string(), nullable=False) for name in ("task", "regime")),
        pa.field("value", pa.float64(), nullable=False),
        *(pa.field(name, pa.int32(), nullable=False) for name in ("seed", "iteration", "branch")),
        *(pa.field(name, pa.int32(), nullable=False) for name in ("epochs", "recorded", "per_iteration")),
        *(pa.field(name, pa.float64(), nullable=False) for name in ("first", "last", "past", "decay")),
        *(pa.field(name, pa.float64(), nullable=False) for name in ("progress", "learning_rate", "log_std")),
        *(pa.field(name, pa.float64(), nullable=False) for name in ("divergence", "surrogate")),
        pa.field("gram", pa.list_(pa.float64()), nullable=False),
        pa.field("returns_before", pa.list_(pa.float64()), nullable=False),
        pa.field("returns", pa.list_(pa.float64()), nullable=False),
    ]
)
"""One row per branch. `epochs` are the update epochs before a jump, `recorded` the displacements that they make,
`per_iteration` those of an iteration including the jump's. `first`, `last` and `past` are the rule's weights at the
branch's first jump; progress, learning rate (as a fraction of the first), mean log-std, the Gram matrix of the context
(row by row), the approximate KL divergence from the rollout policy and the surrogate objective are those just before
that jump. Returns are of the episodes that ended in each iteration, NaN if none did, and
minus infinity once a branch has diverged."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One task with one regime and one value of the regime's searched field."""

    task: str
    regime: Contender
    value: float

    @property
    def name(self) -> str:
        """Name in progress lines."""
        return f"{self.task}, {self.regime.name}, {self.regime.searched} {self.value:g}"

    def between(self, share: float) -> "Cell":
        """The same cell at another value: the regime's lowest at 0, its highest at 1, evenly in its logarithm."""
        low, high = min(self.regime.values), max(self.regime.values)
        return dataclasses.replace(self, value=float(low * (high / low) ** share))

    def experiment(self, experiment: Experiment, source: Experiment) -> Experiment:
        """The experiment that its trials run, without corrective epochs, with the source's snapshots."""
        ppo = self.regime.ppo_at(experiment.ppo, self.value)
        ppo = dataclasses.replace(ppo, num_epochs=self.regime.epochs_before_jump(experiment.ppo))
        size = source.collect.epochs_per_snapshot
        collect = dataclasses.replace(experiment.collect, task=self.task, epochs_per_snapshot=size)
        return dataclasses.replace(experiment, collect=collect, ppo=ppo)

    def made_of(self, experiment: Experiment, source: Experiment, engine: str) -> dict[str, Any]:
        """Everything that its trials depend on except their seeds and their rules' parameters, for digests."""
        header = trial_header(self.experiment(experiment, source), engine)
        return {
            "jump": identity(jump_settings(self.regime, experiment, source)),
            "question": dataclasses.asdict(jump_question(self.regime, experiment, source)),
            "task": header.task,
            # Nothing of a cell is committed before its end.
            **{name: value for name, value in header.config.items() if name != "iterations_per_commit"},
        }

    def base(self) -> RuleNumbers:
        """The rule that its forks vary."""
        assert self.regime.jump, "it jumps"
        return rule.numbers if (rule := published(self.regime.jump)) else RuleNumbers(*self.regime.jump.numbers)


def cells(improve: Improve) -> list[Cell]:
    """Every task with every regime."""
    return [
        Cell(task=task, regime=regime, value=value)
        for task in improve.tasks
        for regime in improve.regimes
        for value in regime.values
    ]


class Branches(Extension):
    """Jumps with one rule per trial of a group; the group's seeds are the branches' labels."""

    def __init__(self, question: Question, settings: JumpSettings, rules: Mapping[int, RuleNumbers]):
        self.question, self.settings, self.rules = question, settings, dict(rules)

    @property
    def num_snapshots(self) -> int:
        """Number of snapshots that a jump replaces."""
        return self.settings.horizon

    def hooks(self, group: TrialGroup) -> Hooks:
        """The jumps of a group of branches."""
        return BranchJumps(group, self)


class BranchJumps(GroupJumps):
    """The jumps of branches, each with its own rule; the inputs at the first jump are stored."""

    def __init__(self, group: TrialGroup, branches: Branches):
        rules = [ReturnRule.of(branches.question, branches.rules[label]) for label in group.seeds]
        super().__init__(group, rules[0], branches.settings)
        self._rules = rules
        self.known: dict[int, dict[str, Any]] = {}
        """By label: the columns of `SCHEMA` that describe the fork and the branch's rule."""

    def forecaster_of(self, k: int) -> Forecaster:
        """See `GroupJumps`."""
        return self._rules[k]

    def keep(self, kept: np.ndarray) -> None:
        """Keep only these branches, in order."""
        super().keep(kept)
        self._rules = [self._rules[k] for k in kept]

    def move(self, group: TrialGroup, learning_rates_K: np.ndarray) -> Iterator[None]:
        """Store the inputs at the first jump, then jump."""
        if not self.known:
            divergences_K = group.divergences(group.parameters_KN)
            surrogates_K = group.surrogates(group.parameters_KN)
            progress_K = self.progress(group)
            for k, label in enumerate(group.seeds):
                first, last, past = self._rules[k].weights(progress_K[k : k + 1])[0].tolist()
                self.known[label] = {
                    **{"first": first, "last": last, "past": past, "decay": self._rules[k].numbers.decay},
                    "progress": float(progress_K[k]),
                    "learning_rate": float(learning_rates_K[k] / group.ppo.learning_rate),
                    "log_std": _log_std(group, k),
                    "divergence": float(divergences_K[k]),
                    "surrogate": float(surrogates_K[k]),
                    "gram": self._histories[k][0].gram().ravel().tolist(),
                }
        yield from super().move(group, learning_rates_K)


def _log_std(group: TrialGroup, k: int) -> float:
    (offset,) = (offset for name, _, offset in group.shape.policy_layout if name == "log_std")
    return float(group.parameters_KN[k, offset : offset + group.shape.action_size].mean())


def fork_iterations(num_iterations: int, improve: Improve) -> list[int]:
    """Iterations after which trials are forked, evenly spaced, with room for the branches after the last."""
    last = max(1, num_iterations - improve.iterations)
    return sorted({int(one) for one in np.linspace(1, last, improve.stages).round()})


def branch_rules(base: RuleNumbers, improve: Improve, *key: int) -> list[RuleNumbers]:
    """The unchanged rule, then pairs of rules with opposite random changes of their weights; the key seeds them."""
    random = np.random.default_rng(np.random.SeedSequence(key))
    changes_P3 = random.standard_normal((improve.pairs, 3)) * np.array(improve.spread)
    rules = [base]
    for change_3 in changes_P3:
        for sign in (1.0, -1.0):
            first, last, past = (sign * change_3).tolist()
            shift = (first, first, last, last, past, past, 0.0)
            rules.append(RuleNumbers(*(own + by for own, by in zip(base, shift, strict=True))))
    return rules


def run_cell(cell: Cell, experiment: Experiment, source: Experiment, engine: str) -> pa.Table:
    """Run a cell's trials to their last fork, and the branches of every fork; returns a table of `SCHEMA`.

    Trials and branches that diverge end there, and a branch's returns are minus infinity from then on.
    """
    improve, own = experiment.improve, cell.experiment(experiment, source)
    if network_shape(own.collect).discrete:
        raise ValueError(f"improve.tasks={cell.task!r}: its actions are choices, and forks are of continuous actions")
    settings = jump_settings(cell.regime, experiment, source)
    question = jump_question(cell.regime, experiment, source)
    rule = ReturnRule.of(question, cell.base())
    trials = TrialGroup(
        own, engine, list(own.collect.seeds), extension=Jumps(settings=settings, predictor=rule, digest="")
    )
    returns: dict[int, list[float]] = {seed: [] for seed in trials.seeds}
    places, rows = fork_iterations(own.num_iterations, improve), []
    mark = zlib.crc32(cell.name.encode())
    while not trials.finished and places:
        for snapshot in trials.run_iteration():
            if snapshot.episodic_return is not None:
                returns[snapshot.seed].append(snapshot.episodic_return)
        iteration = int(trials.iterations_K.max(initial=0))
        if iteration == places[0]:
            places.pop(0)
            for row in _run_branches(trials, own, engine, settings, question, cell, mark):
                known = returns[row["seed"]][-BEFORE:]
                rows.append({**row, "returns_before": [float("nan")] * (BEFORE - len(known)) + known})
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def _run_branches(
    trials: TrialGroup,
    experiment: Experiment,
    engine: str,
    settings: JumpSettings,
    question: Question,
    cell: Cell,
    mark: int,
) -> list[dict[str, Any]]:
    """Run the branches of every trial from its current state; returns their rows."""
    improve = experiment.improve
    sound = [seed for seed in trials.seeds if seed not in trials.diverged]
    if not sound:
        return []
    iteration = int(trials.iterations_K[trials.seeds.index(sound[0])])
    rules: dict[int, RuleNumbers] = {}
    owners: dict[int, tuple[int, int]] = {}
    for seed in sound:
        for branch, rule in enumerate(branch_rules(cell.base(), improve, mark, seed, iteration)):
            label = len(rules)
            rules[label], owners[label] = rule, (seed, branch)
    states: list[State | None] = [trials.state(owners[label][0]) for label in rules]
    group = TrialGroup(experiment, engine, list(rules), states, Branches(question, settings, rules))
    followed: dict[int, NDArray[np.float64]] = {label: np.full(improve.iterations, np.nan) for label in rules}
    for step in range(improve.iterations):
        if group.finished:
            break
        for snapshot in group.run_iteration():
            if snapshot.episodic_return is not None:
                followed[snapshot.seed][step] = snapshot.episodic_return
    for label, (whole, _) in group.diverged.items():
        followed[label][whole - iteration :] = -np.inf
    hooks = group.hooks
    assert isinstance(hooks, BranchJumps), "branches jump"
    return [
        {
            **{"task": cell.task, "regime": cell.regime.name, "value": cell.value},
            **{"seed": seed, "iteration": iteration, "branch": branch, "epochs": experiment.ppo.num_epochs},
            **{"recorded": group.snapshots_run, "per_iteration": group.snapshots_per_iteration},
            **hooks.known[label],
            "returns": followed[label].tolist(),
        }
        for label, (seed, branch) in owners.items()
        if label in hooks.known
    ]
