"""What a second actor adds, and what Ray takes: env steps per second of one and of two actors, on as many cores.

One actor runs 25 trials, two run 50, each for the same number of iterations through the same calls that a collection
makes. Ray's share is the time of an actor's life between its first call and its last that no call was running in it.

    python benchmarks/scaling.py [--iterations 8] [--rounds 3]
"""

import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import ray

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from command import make_parser, results_folder  # noqa: E402

from tipl_ray.collect.crew import SLICE_SECONDS  # noqa: E402
from tipl_ray.collect.group import GroupCollector  # noqa: E402
from tipl_ray.config import Collect, Experiment, Where  # noqa: E402
from tipl_ray.ppo.engines import choose_engine  # noqa: E402
from tipl_ray.terminal import say_rows  # noqa: E402

TRIALS = 25


class ClockedCollector(GroupCollector):
    """A group's collector that notes when it works."""

    def clocked(self, seconds: float) -> tuple[bool, float, float]:
        """Advance; (finished, begin, end) by this machine's clock."""
        begin = time.time()
        progress = self.advance(seconds)
        return progress.finished, begin, time.time()


def run(num_actors: int, iterations: int, storage: str) -> tuple[float, float]:
    """Env steps per second of all actors together, and the share of their time that no call was running."""
    experiment = Experiment(
        name="scaling",
        where=Where(storage=storage),
        collect=Collect(num_trials=num_actors * TRIALS, total_env_steps=iterations * 2048, policy_hidden=(8, 8)),
    )
    engine = choose_engine("auto", experiment.ppo)
    collector: Any = ray.remote(ClockedCollector).options(num_cpus=1)
    seeds = [list(range(1 + TRIALS * actor, 1 + TRIALS * (actor + 1))) for actor in range(num_actors)]
    actors = [collector.remote(experiment, engine, group) for group in seeds]
    ray.get([actor.clocked.remote(0.0) for actor in actors])
    spans: list[list[tuple[float, float]]] = [[] for _ in actors]
    running = {actor.clocked.remote(SLICE_SECONDS): index for index, actor in enumerate(actors)}
    while running:
        (reference,), _ = ray.wait(list(running), num_returns=1)
        index = running.pop(reference)
        finished, begin, end = ray.get(reference)
        spans[index].append((begin, end))
        if not finished:
            running[actors[index].clocked.remote(SLICE_SECONDS)] = index
    lives = [(span[0][0], span[-1][1]) for span in spans]
    busy = sum(end - begin for span in spans for begin, end in span)
    alive = sum(end - begin for begin, end in lives)
    wall = max(end for _, end in lives) - min(begin for begin, _ in lives)
    return num_actors * TRIALS * experiment.env_steps_per_trial / wall, 1 - busy / alive


def main() -> None:
    """Measure, print the table, write benchmarks/results/scaling.json."""
    parser = make_parser(__doc__)
    parser.add_argument("--iterations", type=int, default=8, help="PPO iterations per trial")
    parser.add_argument("--rounds", type=int, default=3, help="alternating rounds of one and two actors")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.iterations, arguments.rounds = 2, 1
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    measured: dict[int, list[tuple[float, float]]] = {1: [], 2: []}
    for _ in range(arguments.rounds):
        for num_actors in measured:
            with tempfile.TemporaryDirectory() as storage:
                measured[num_actors].append(run(num_actors, arguments.iterations, storage))
    ray.shutdown()
    rates = {actors: statistics.median(rate for rate, _ in found) for actors, found in measured.items()}
    rows = [
        {
            "task": "InvertedPendulum-v4 8-8",
            "subject": f"{actors} actor{'s' if actors > 1 else ''} of {TRIALS} trials",
            "metric": "env steps per second",
            "value": round(rates[actors], 1),
            "unit": "1/s",
            "ratio_to_one_actor": round(rates[actors] / rates[1], 3),
            "ray_share": round(statistics.median(share for _, share in measured[actors]), 4),
            "rounds": arguments.rounds,
        }
        for actors in rates
    ]
    (results_folder(arguments.quick) / "scaling.json").write_text(json.dumps(rows, indent=1) + "\n")
    shown = ("subject", "value", "ratio_to_one_actor", "ray_share")
    say_rows([{key: str(row[key]) for key in shown} for row in rows], title="Ray actors")


if __name__ == "__main__":
    main()
