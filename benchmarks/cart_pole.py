"""CartPole-v1, a task of two choices, learned by our PPO with CleanRL's hyperparameters: ten seeds beside 475.

The experiment is jobs/experiments/cart_pole.toml. Of each seed: the mean return of its last policy over 100 episodes,
by its likeliest actions and by sampled ones, the mean return while it trained over its last tenth, and the environment
steps after which it first had 475 over ten iterations with an episode's end. Gymnasium takes 475 for solved; 500 is the
most there is.

    python benchmarks/cart_pole.py
"""

import dataclasses
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from command import make_parser, results_folder, write_table  # noqa: E402

from tipl_ray.config import Experiment  # noqa: E402
from tipl_ray.experiments import load_experiment  # noqa: E402
from tipl_ray.ppo.engines import choose_engine  # noqa: E402
from tipl_ray.ppo.returns import policy_returns  # noqa: E402
from tipl_ray.ppo.trials import TrialGroup  # noqa: E402
from tipl_ray.terminal import say_rows  # noqa: E402

SOLVED, EPISODES, WINDOW = 475.0, 100, 10


def run(experiment: Experiment) -> list[dict[str, Any]]:
    """One row per seed."""
    seeds = list(experiment.collect.seeds)
    group = TrialGroup(experiment, choose_engine("auto", experiment.ppo), seeds)
    curves: dict[int, list[tuple[int, float]]] = {seed: [] for seed in seeds}
    last, begin = {}, time.process_time()
    while not group.finished:
        for snapshot in group.run_iteration():
            last[snapshot.seed] = snapshot
            if snapshot.episodic_return is not None:
                curves[snapshot.seed].append((snapshot.env_step, snapshot.episodic_return))
    seconds = (time.process_time() - begin) / len(seeds)
    weights, means, variances = (
        np.stack([getattr(last[seed], name) for seed in seeds])
        for name in ("weights", "observation_mean", "observation_variance")
    )
    returns = [
        policy_returns(
            experiment.collect.task,
            group.learner,
            weights,
            means,
            variances,
            list(range(10_000, 10_000 + EPISODES)),
            sampled_actions=sampled,
        ).mean(axis=1)
        for sampled in (False, True)
    ]
    rows = []
    for index, seed in enumerate(seeds):
        steps, curve = map(np.array, zip(*curves[seed], strict=True))
        smooth = np.convolve(curve, np.ones(WINDOW) / WINDOW, "valid")
        solved = np.flatnonzero(smooth >= SOLVED)
        rows.append(
            {
                "seed": seed,
                "env_steps": last[seed].env_step,
                "return_likeliest": round(float(returns[0][index]), 1),
                "return_sampled": round(float(returns[1][index]), 1),
                "training_return_last_tenth": round(float(curve[-len(curve) // 10 :].mean()), 1),
                "env_steps_to_475": int(steps[solved[0] + WINDOW - 1]) if len(solved) else None,
                "cpu_seconds": round(seconds, 1),
            }
        )
    return rows


def main() -> None:
    """Run it, print the table and write it."""
    arguments = make_parser(__doc__).parse_args()
    os.nice(10)
    experiment = load_experiment(ROOT / "jobs" / "experiments" / "cart_pole.toml").check("collect")
    if arguments.quick:
        few = dataclasses.replace(experiment.collect, num_trials=2, total_env_steps=10 * experiment.ppo.num_steps)
        experiment = dataclasses.replace(experiment, collect=few)
    rows = run(experiment)
    folder = results_folder(True) if arguments.quick else ROOT / "docs" / "results"
    write_table(folder / "cart_pole.csv", rows)
    say_rows([{key: str(value) for key, value in row.items()} for row in rows])


if __name__ == "__main__":
    main()
