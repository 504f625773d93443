"""The job that searches for a jump rule several times, prints what each search finds, and saves the mean.

<storage>/rules/<digest>/predictor.safetensors    the mean of the searches, for `load_predictor`, with its card
"""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from tipl_ray.accelerate.contenders import jump_question
from tipl_ray.accelerate.return_rule import ReturnRule
from tipl_ray.config import Experiment, Improve
from tipl_ray.data.locks import only_one
from tipl_ray.data.storage import file_exists, join, last_name, publish, read_published
from tipl_ray.digest import as_table, digest, identity
from tipl_ray.improve.forks import Cell, cells
from tipl_ray.improve.rule_search import BOUNDS, RECORD, RULE_FILE, WAY_OUT, Rule, search_rule
from tipl_ray.improve.work import Work, work_on
from tipl_ray.predict.saved import save_predictor
from tipl_ray.terminal import say

SEARCHED_WITH = ("tasks", "generations", "population", "search_first_seed", "search_trials")
"""Fields of `improve` that a search depends on, besides its regimes."""


def run_rule_searches(experiment: Experiment) -> None:
    """All of jobs/find_rule.py."""
    with work_on(experiment, "find_rule", "candidate") as work:
        searches = []
        for search in range(experiment.improve.searches):
            folder = search_folder(search, work)
            if not file_exists(folder, RULE_FILE):
                with only_one(experiment.storage_path, f"rule-{search}", "searching this rule"):
                    found = search_rule(search, experiment, work.source, work.engine, work.at_once)
                    publish(folder, {RULE_FILE: json.dumps(found, indent=1).encode()}, RECORD)
            searches.append(json.loads(read_published(folder, RULE_FILE, RECORD, WAY_OUT)))
            _log(work, searches[-1], folder)
            say(f"search {search}: {searches[-1]['rule']}")
        folder, rule = save_mean(searches, work)
        say(f"mean of {len(searches)} searches: {rule.closed_form()}")
        say(f"find_rule: rule saved in {folder}")


def search_folder(search: int, work: Work) -> str:
    """Folder of a search's result, named by a digest of everything that it depends on."""
    experiment = work.experiment
    ran = [[cell.name, cell.made_of(experiment, work.source, work.engine)] for cell in cells(experiment.improve)]
    improve = identity(experiment.improve)
    settings = {field: improve[field] for field in SEARCHED_WITH}
    return join(work.experiment.storage_path, "rules", digest(search, settings, BOUNDS, ran))


def save_mean(searches: Sequence[dict[str, Any]], work: Work) -> tuple[str, Rule]:
    """Save the mean of the searches' points as a predictor; returns its folder and the rule."""
    improve = work.experiment.improve
    point = {name: float(np.mean([found["point"][name] for found in searches])) for name in BOUNDS}
    rule, folder = Rule.of(point), join(work.experiment.storage_path, "rules", digest(point))
    predictor = ReturnRule.of(
        jump_question(improve.regimes[0], work.experiment, work.source), rule.numbers, rule.kl_limit
    )
    card = {
        "rule": rule.closed_form(),
        "at": values_at(point["value"], improve),
        "tuned_on": list(improve.tasks),
        "env_steps": work.experiment.collect.total_env_steps,
        "policy_hidden": list(work.experiment.collect.policy_hidden),
        "searches": [found["rule"] for found in searches],
    }
    save_predictor(predictor, folder, card)
    return folder, rule


def values_at(share: float, improve: Improve) -> dict[str, str]:
    """The searched hyperparameter of each regime, as found."""
    firsts = [Cell(task="", regime=regime, value=regime.values[0]).between(share) for regime in improve.regimes]
    return {cell.regime.name: f"{cell.regime.searched} {cell.value:.3g}" for cell in firsts}


def _log(work: Work, found: dict[str, Any], folder: str) -> None:
    with work.tracker.run(f"rule search {found['search']}", f"rule-{last_name(folder)}") as run:
        run.log_parameters({"improve": as_table(work.experiment.improve)})
        run.log_metrics(dict(found["point"]))
        spread = [max(generation["fitness"]) - min(generation["fitness"]) for generation in found["generations"]]
        run.log_history("fitness_spread", list(range(1, len(spread) + 1)), spread)
