"""CartPole-v1, a task of two choices, learned by our PPO with CleanRL's hyperparameters: ten seeds beside 475.

The experiment is jobs/experiments/cart_pole.toml. Of each seed: the mean return of its last policy over 100 episodes,
by its likeliest actions and by sampled ones, the mean return while it trained over its last tenth, and the environment
steps after which it first had 475 over ten iterations with an episode's end. Gymnasium takes 475 for solved; 500 is the
most there is.

CleanRL's own ppo.py, which is not a package, runs on the same seeds if a command for it is given; it needs a virtual
environment with gymnasium 0.29. Of these trials only what the script prints is known: its returns while it trains.

    python benchmarks/cart_pole.py
    python benchmarks/cart_pole.py --cleanrl "cleanrl/.venv/bin/python cleanrl/cleanrl/ppo.py"
"""

import csv
import dataclasses
import os
import re
import resource
import shlex
import subprocess
import sys
import tempfile
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
from tipl_ray.terminal import say, say_rows  # noqa: E402

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
    return [
        {
            "implementation": "tipl_ray",
            "seed": seed,
            "env_steps": last[seed].env_step,
            "return_likeliest": round(float(returns[0][index]), 1),
            "return_sampled": round(float(returns[1][index]), 1),
            **of_curve(curves[seed]),
            "cpu_seconds": round(seconds, 1),
        }
        for index, seed in enumerate(seeds)
    ]


def of_curve(curve: list[tuple[int, float]]) -> dict[str, Any]:
    """What the table says of (environment steps, mean return of the episodes that ended) by iteration."""
    steps, returns = map(np.array, zip(*curve, strict=True))
    solved = np.flatnonzero(np.convolve(returns, np.ones(WINDOW) / WINDOW, "valid") >= SOLVED)
    return {
        "training_return_last_tenth": round(float(returns[-len(returns) // 10 :].mean()), 1),
        "env_steps_to_475": int(steps[solved[0] + WINDOW - 1]) if len(solved) else None,
    }


def run_cleanrl(command: str, experiment: Experiment, seed: int) -> dict[str, Any]:
    """One row from CleanRL's script, whose iterations have as many steps as ours."""
    total, per_iteration = experiment.env_steps_per_trial, experiment.ppo.num_steps
    words = [str(Path(word).absolute()) if Path(word).exists() else word for word in shlex.split(command)]
    told = ["--seed", str(seed), "--total-timesteps", str(total), "--no-cuda"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with tempfile.TemporaryDirectory() as folder:  # it writes its event files into the working directory
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        ran = subprocess.run(
            [*words, *told], cwd=folder, env=environment, check=True, stdout=subprocess.PIPE, text=True
        )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    ended: dict[int, list[float]] = {}
    for step, value in re.findall(r"global_step=(\d+), episodic_return=\[?([-\d.]+)", ran.stdout):
        ended.setdefault(-(-int(step) // per_iteration) * per_iteration, []).append(float(value))
    return {
        "implementation": "CleanRL",
        "seed": seed,
        "env_steps": total,
        "return_likeliest": None,
        "return_sampled": None,
        **of_curve([(step, float(np.mean(values))) for step, values in sorted(ended.items())]),
        "cpu_seconds": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1),
    }


def main() -> None:
    """Run it, print the table and write it."""
    parser = make_parser(__doc__)
    parser.add_argument("--cleanrl", metavar="COMMAND", help="runs CleanRL's ppo.py")
    arguments = parser.parse_args()
    os.nice(10)
    experiment = load_experiment(ROOT / "jobs" / "experiments" / "cart_pole.toml").check("collect")
    if arguments.quick:
        few = dataclasses.replace(experiment.collect, num_trials=2, total_env_steps=10 * experiment.ppo.num_steps)
        experiment = dataclasses.replace(experiment, collect=few)
    rows = run(experiment)
    table = (results_folder(True) if arguments.quick else ROOT / "docs" / "results") / "cart_pole.csv"
    if table.exists():  # seeds that CleanRL has run stay
        rows += [row for row in csv.DictReader(table.open()) if row.get("implementation") == "CleanRL"]
    done = {int(row["seed"]) for row in rows if row["implementation"] == "CleanRL"}
    for seed in experiment.collect.seeds if arguments.cleanrl else ():
        if seed not in done:
            rows.append(run_cleanrl(arguments.cleanrl, experiment, seed))
            write_table(table, rows)
            say(f"CleanRL, seed {seed}: {rows[-1]['training_return_last_tenth']} at the end")
    write_table(table, rows)
    say_rows([{key: str(value) for key, value in row.items()} for row in rows])


if __name__ == "__main__":
    main()
