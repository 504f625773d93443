"""The job that searches rules for jumps, several times over, and says what each search has found."""

import json
import time
from typing import Any

import ray

from tipl_ray.accelerate.acceleration import source_experiment
from tipl_ray.collect.crew import require_seat
from tipl_ray.config import Experiment
from tipl_ray.data.locks import only_one
from tipl_ray.data.storage import file_exists, join, publish, read_published
from tipl_ray.digest import as_table, digest, identity
from tipl_ray.improve.forks import cells
from tipl_ray.improve.rule_search import RECORD, RULE_FILE, WAY_OUT, search_rule
from tipl_ray.jobs import check_job, connected_to_ray, exit_status, open_tracker
from tipl_ray.ppo.engines import choose_engine
from tipl_ray.terminal import duration, say
from tipl_ray.tracking import Tracker, ui_command


def run_rule_searches(experiment: Experiment) -> None:
    """The whole of jobs/find_rule.py.

    Exits with status 1 and one line on standard error for what the user can mend, 130 when interrupted.
    """
    with exit_status():
        check_job(experiment)
        source, tracker, begin = source_experiment(experiment), open_tracker(experiment), time.monotonic()
        with connected_to_ray():
            engine = choose_engine(experiment.collect.engine, experiment.ppo)
            require_seat(experiment, engine, "candidate")
            at_once = experiment.where.units_at_once or max(1, int(ray.cluster_resources().get("CPU", 1)))
            for search in range(experiment.improve.searches):
                folder = search_folder(search, experiment, source, engine)
                if not file_exists(folder, RULE_FILE):
                    with only_one(experiment.storage_path, f"rule-{search}", "searching this rule"):
                        found = search_rule(search, experiment, source, engine, at_once)
                        publish(folder, {RULE_FILE: json.dumps(found, indent=1).encode()}, RECORD)
                found = json.loads(read_published(folder, RULE_FILE, RECORD, WAY_OUT))
                _log(tracker, found, folder, experiment)
                say(f"search {search}: {found['rule']}")
        say(f"find_rule: {duration(time.monotonic() - begin)}")
        say(f"MLflow: {ui_command(tracker.uri, tracker.experiment_id)}")


def search_folder(search: int, experiment: Experiment, source: Experiment, engine: str) -> str:
    """Where a search's rule is kept, named after all that it depends on."""
    ran = [[cell.name, cell.made_of(experiment, source, engine)] for cell in cells(experiment.improve)]
    return join(experiment.storage_path, "rules", digest(search, identity(experiment.improve), ran))


def _log(tracker: Tracker, found: dict[str, Any], folder: str, experiment: Experiment) -> None:
    with tracker.run(f"rule search {found['search']}", f"rule-{folder.rpartition('/')[2]}") as run:
        run.log_parameters({"improve": as_table(experiment.improve)})
        run.log_metrics(dict(found["point"]))
        spread = [max(generation["fitness"]) - min(generation["fitness"]) for generation in found["generations"]]
        run.log_history("fitness_spread", list(range(1, len(spread) + 1)), spread)
