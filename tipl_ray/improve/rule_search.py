"""Search for a rule's parameters that raise returns: CMA-ES on Ray Tune, generation by generation, over tasks and
regimes.

A candidate runs short but complete trials with its jumps. Its fitness is its mean rank in its generation, over tasks:
three quarters the rank of the area under the learning curve, one quarter that of the final return; returns of different
tasks are never added. All candidates of a generation share seeds and each task's regime, and every generation draws new
ones. The result of a search is the mean of the better half of its last generation, never the best candidate seen.

    <storage>/rules/<digest>/candidate.json    scores of one candidate
    <storage>/rules/<digest>/rule.json         result of one search
"""

import dataclasses
import json
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.distributions import FloatDistribution
from optuna.samplers import CmaEsSampler
from ray import tune
from ray.tune.experiment import Trial
from ray.tune.search.optuna import OptunaSearch
from scipy.stats import rankdata

from tipl_ray.accelerate.contenders import jump_question, jump_settings
from tipl_ray.accelerate.group_jumps import Jumps
from tipl_ray.accelerate.return_rule import ReturnRule, RuleNumbers
from tipl_ray.accelerate.scores import filled, final_iterations
from tipl_ray.collect.crew import seat_resources
from tipl_ray.config import Experiment
from tipl_ray.data.storage import Storage, file_exists, join, publish, read_published
from tipl_ray.digest import digest
from tipl_ray.improve.forks import Cell
from tipl_ray.ppo.algorithms import NOTHING
from tipl_ray.ppo.trials import TrialGroup

BOUNDS: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("first_begin", "first_end"), (-1.0, 3.0)),
    **dict.fromkeys(("last_begin", "last_end"), (-1.5, 1.5)),
    **dict.fromkeys(("past_begin", "past_end"), (-0.4, 0.8)),
    "decay": (0.0, 0.9),
    "log10_kl_limit": (-2.0, 0.0),
    "value": (0.0, 1.0),
}
"""Search ranges of a rule's parameters, of the limit on a jump's KL divergence, as a power of ten, and of the regime's
searched hyperparameter, usually the learning rate, which goes from the regime's lowest value at 0 to its highest at 1,
evenly in its logarithm. The search starts in the middle: the first displacement repeated, plus a fifth of the past
moves."""
START = {name: (low + high) / 2 for name, (low, high) in BOUNDS.items()}
FINAL_WEIGHT = 0.25
"""Weight of the final return's rank; the area's rank has the rest."""
CANDIDATE_FILE, RULE_FILE, RECORD = "candidate.json", "rule.json", "checksum.sha256"
WAY_OUT = "delete it; the same command then computes it again"

Outcome = dict[str, list[float]]
"""Mean area under the curve and final return by task."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """A rule for jumps, with a limit on their KL divergence."""

    numbers: RuleNumbers
    kl_limit: float

    @classmethod
    def of(cls, candidate: Mapping[str, float]) -> "Rule":
        """The rule of a candidate point."""
        numbers = RuleNumbers(**{name: float(candidate[name]) for name in RuleNumbers._fields})
        return cls(numbers=numbers, kl_limit=float(10 ** candidate["log10_kl_limit"]))

    def closed_form(self) -> str:
        """The rule as a formula of the progress p."""
        return f"{self.numbers.closed_form()}, no further than a KL divergence of {self.kl_limit:.3g}"


def generation_cells(experiment: Experiment, search: int, generation: int) -> tuple[list[Cell], list[int]]:
    """What every rule of a generation runs: each task in a regime drawn at random, and the seeds of the trials."""
    improve = experiment.improve
    random = np.random.default_rng(np.random.SeedSequence([search, generation]))
    drawn = [improve.regimes[int(random.integers(len(improve.regimes)))] for _ in improve.tasks]
    cells = [
        Cell(task=task, regime=regime, value=regime.values[0])
        for task, regime in zip(improve.tasks, drawn, strict=True)
    ]
    ran = (search * improve.generations + generation) * improve.search_trials
    first = improve.search_first_seed + ran
    return cells, list(range(first, first + improve.search_trials))


def run_rule(
    rule: Rule | None, cell: Cell, seeds: Sequence[int], experiment: Experiment, source: Experiment, engine: str
) -> NDArray[np.float64]:
    """Learning curves (S, I) of trials that jump by a rule, or without jumps if it is None; NaN after a divergence."""
    own, extension = cell.experiment(experiment, source), NOTHING
    if rule:
        settings = dataclasses.replace(jump_settings(cell.regime, experiment, source), kl_limit=rule.kl_limit)
        predictor = ReturnRule.of(jump_question(cell.regime, experiment, source), rule.numbers)
        extension = Jumps(settings=settings, predictor=predictor, digest="")
    group = TrialGroup(own, engine, list(seeds), extension=extension)
    returns = {seed: np.full(own.num_iterations, np.nan) for seed in seeds}
    while not group.finished:
        for snapshot in group.run_iteration():
            if snapshot.episodic_return is not None:
                returns[snapshot.seed][snapshot.iteration - 1] = snapshot.episodic_return
    curves = []
    for seed in seeds:
        curve_I = returns[seed]
        whole = group.diverged[seed][0] if seed in group.diverged else len(curve_I)
        known_I = filled(curve_I[None, :whole])[0] if np.isfinite(curve_I[:whole]).any() else curve_I[:whole]
        curves.append(np.concatenate([known_I, np.full(len(curve_I) - whole, np.nan)]))
    return np.stack(curves)


def score_curves(curves_SI: NDArray[np.float64]) -> list[float]:
    """Mean area under the curves and mean final return; NaN where a trial diverged."""
    return [float(curves_SI.mean()), float(curves_SI[:, -final_iterations(curves_SI.shape[1]) :].mean())]


def run_candidate(
    candidate: dict[str, Any], *, search: int, experiment: Experiment, source: Experiment, engine: str
) -> None:
    """What Ray Tune runs for each candidate: its trials, unless their scores are stored."""
    generation = int(candidate["generation"])
    point = {name: candidate[name] for name in BOUNDS}
    cells, seeds = generation_cells(experiment, search, generation)
    cells = [cell.between(point["value"]) for cell in cells]
    ran = [cell.made_of(experiment, source, engine) for cell in cells]
    folder = join(experiment.storage_path, "rules", digest(point, ran, seeds))
    if not file_exists(folder, CANDIDATE_FILE):
        found: Outcome = {
            cell.task: score_curves(run_rule(Rule.of(point), cell, seeds, experiment, source, engine)) for cell in cells
        }
        publish(folder, {CANDIDATE_FILE: json.dumps({"point": point, "scores": found}).encode()}, RECORD)
    told = json.loads(read_published(folder, CANDIDATE_FILE, RECORD, WAY_OUT))
    # Ray Tune wants the metric from each; what it is shows when the generation has ended.
    tune.report({"scores": json.dumps(told["scores"]), "fitness": 0.0})


def fitness(outcomes: Sequence[Outcome | None]) -> list[float]:
    """Mean rank of each candidate in its generation, from 0 (worst) to 1 (best); failed or diverged ones rank last.

    Averaged over tasks, and over area and final return with their weights.
    """
    tasks = next((list(one) for one in outcomes if one), [])
    totals = np.zeros(len(outcomes))
    for task in tasks:
        for part, weight in ((0, 1 - FINAL_WEIGHT), (1, FINAL_WEIGHT)):
            values = np.array([np.nan if one is None else one[task][part] for one in outcomes])
            ranks = rankdata(np.where(np.isnan(values), -np.inf, values)) - 1
            totals += weight * ranks / max(1, len(outcomes) - 1)
    return [float(total) for total in totals / max(1, len(tasks))]


class GenerationSearch(OptunaSearch):
    """CMA-ES that receives a complete generation at once: each candidate's rank, in the order that they were drawn."""

    def __init__(self, population: int, generations: int, seed: int):
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        super().__init__(
            space={name: FloatDistribution(*ends) for name, ends in BOUNDS.items()},
            metric="fitness",
            mode="max",
            sampler=CmaEsSampler(n_startup_trials=0, popsize=population, seed=seed),
            # Optuna draws at random until it knows of one point; what this one is worth counts nothing.
            points_to_evaluate=[dict(START)],
            evaluated_rewards=[0.5],
        )
        self._population, self._generations = population, generations
        self._waiting: dict[str, Outcome | None] = {}
        self._drawn: list[str] = []
        self.history: list[list[tuple[dict[str, float], float]]] = []
        """Points and fitness of every candidate, generation by generation."""

    def suggest(self, trial_id: str) -> Any:
        """The next point, with the index of its generation; None until the current generation is complete."""
        generation = len(self.history)
        if generation == self._generations:
            return OptunaSearch.FINISHED
        if len(self._drawn) == self._population:
            return None
        self._drawn.append(trial_id)
        return {**(super().suggest(trial_id) or {}), "generation": generation}

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        """Store a candidate's scores; when a generation is complete, pass on all of its ranks."""
        self._waiting[trial_id] = json.loads(result["scores"]) if result and "scores" in result else None
        if len(self._waiting) < self._population:
            return
        outcomes = [self._waiting[one] for one in self._drawn]
        told = fitness(outcomes)
        self.history.append(
            [(dict(self._ot_trials[one].params), value) for one, value in zip(self._drawn, told, strict=True)]
        )
        for one, value in zip(self._drawn, told, strict=True):
            super().on_trial_complete(one, {"fitness": value})
        self._waiting, self._drawn = {}, []


def found_point(history: Sequence[Sequence[tuple[dict[str, float], float]]]) -> dict[str, float]:
    """The mean of the better half of the last generation."""
    ranked = sorted(history[-1], key=lambda one: -one[1])
    better = [point for point, _ in ranked[: max(1, len(ranked) // 2)]]
    return {name: float(np.mean([point[name] for point in better])) for name in BOUNDS}


def search_rule(search: int, experiment: Experiment, source: Experiment, engine: str, at_once: int) -> dict[str, Any]:
    """One search from its beginning; candidates with stored scores are not run again."""
    os.environ |= {"TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "RAY_AIR_NEW_OUTPUT": "0"}
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    improve = experiment.improve
    searcher = GenerationSearch(improve.population, improve.generations, seed=search)
    # Its state is kept nowhere: it is drawn again, from what the candidates came to.
    drawn = Storage(join(experiment.storage_path, "rules", "tune"))
    filesystem, path = drawn.filesystem
    needs = seat_resources(experiment, engine)
    ran = tune.run(
        tune.with_parameters(run_candidate, search=search, experiment=experiment, source=source, engine=engine),
        name=f"search-{search}-{os.getpid()}",
        storage_path=path,
        storage_filesystem=filesystem,
        search_alg=searcher,
        num_samples=improve.population * improve.generations,
        resources_per_trial={name.lower(): amount for name, amount in needs.items()},
        max_concurrent_trials=at_once,
        reuse_actors=True,
        max_failures=3,
        raise_on_failed_trial=False,
        verbose=0,
    )
    for trial in ran.trials:
        if trial.status == Trial.ERROR:  # its rank says nothing of the rule, so nor does what was found
            raise trial.get_pickled_error() or trial.get_error() or RuntimeError(f"{trial} failed")
    for name in drawn.folders():
        if name.startswith(f"search-{search}-"):
            drawn.delete_folder(name)
    point = found_point(searcher.history)
    return {
        "search": search,
        "point": point,
        "rule": Rule.of(point).closed_form(),
        "generations": [
            {"fitness": [value for _, value in generation], "points": [one for one, _ in generation]}
            for generation in searcher.history
        ],
    }
