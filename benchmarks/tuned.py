"""PPO as rl-baselines3-zoo tunes it, in our engine, beside the returns that the zoo publishes.

Every experiment jobs/experiments/tuned_*.toml is run on ten seeds, in groups of five that go to as many processes as
there are cores. Kept are each trial's learning curve, the mean return of its last policy without noise over ten
episodes, which is what the zoo publishes, and the CPU time. A group that is done is kept in
benchmarks/results/tuned.json; the same command goes on with the others, then writes docs/results/tuned.csv.

    python benchmarks/tuned.py [--tasks half_cheetah hopper walker2d] [--processes 2]
"""

import dataclasses
import json
import multiprocessing
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from command import keep, make_parser, results_folder, write_table  # noqa: E402

from tipl_ray.config import Experiment  # noqa: E402
from tipl_ray.evaluate.metrics import Resampling, interquartile_mean  # noqa: E402
from tipl_ray.experiments import load_experiment  # noqa: E402
from tipl_ray.ppo.engines import choose_engine  # noqa: E402
from tipl_ray.ppo.returns import policy_returns  # noqa: E402
from tipl_ray.ppo.trials import TrialGroup  # noqa: E402
from tipl_ray.terminal import say, say_rows  # noqa: E402

PUBLISHED: dict[str, float] = {"half_cheetah": 5819, "hopper": 2410, "walker2d": 3479}
"""Mean return of the zoo's own policies, one run each, of version 3 of the tasks (its benchmark.md)."""
GROUP, EPISODES = 5, 10
Cell = tuple[str, int]
"""Name of the preset and first seed of a group."""


def preset(name: str, quick: bool) -> Experiment:
    """The experiment of a preset; a few iterations of it where nothing is to be learned."""
    path = ROOT / "jobs" / "experiments" / f"tuned_{name}.toml"
    experiment = load_experiment(path).check("collect")
    steps = 4 * experiment.ppo.num_steps if quick else experiment.collect.total_env_steps
    return dataclasses.replace(experiment, collect=dataclasses.replace(experiment.collect, total_env_steps=steps))


def run_group(name: str, first_seed: int, quick: bool) -> dict[str, Any]:
    """Learning curves, last policies' returns and CPU seconds of some trials."""
    os.nice(10)
    experiment, seeds = preset(name, quick), list(range(first_seed, first_seed + GROUP))
    group = TrialGroup(experiment, choose_engine("auto", experiment.ppo), seeds)
    curves: dict[int, list[float | None]] = {seed: [] for seed in seeds}
    begin = time.process_time()
    last = {}
    while not group.finished:
        for snapshot in group.run_iteration():
            value = snapshot.episodic_return
            curves[snapshot.seed].append(None if value is None else round(value, 1))
            last[snapshot.seed] = snapshot
    seconds = time.process_time() - begin
    returns = policy_returns(
        experiment.collect.task,
        group.learner,
        np.stack([last[seed].weights for seed in seeds]),
        np.stack([last[seed].observation_mean for seed in seeds]),
        np.stack([last[seed].observation_variance for seed in seeds]),
        list(range(EPISODES)),
    )
    found = [round(float(value), 1) for value in returns.mean(axis=1)]
    told = {"curves": [curves[seed] for seed in seeds], "returns": found, "seconds": round(seconds, 1)}
    return {**told, "env_steps": last[seeds[0]].env_step, "diverged": sorted(group.diverged)}


def run_missing(names: list[str], seeds: int, kept: Path, processes: int, quick: bool) -> dict[str, dict[str, Any]]:
    """Every group by `name/first seed`; those that are missing are run and kept one by one."""
    groups: dict[str, dict[str, Any]] = json.loads(kept.read_text()) if kept.exists() else {}
    cells = [(name, first) for name in names for first in range(1, seeds + 1, GROUP)]
    missing = [cell for cell in cells if "/".join(map(str, cell)) not in groups]
    with multiprocessing.get_context("spawn").Pool(processes, maxtasksperchild=1) as pool:
        waiting = {cell: pool.apply_async(run_group, (*cell, quick)) for cell in missing}
        while waiting:
            for cell in [cell for cell, result in waiting.items() if result.ready()]:
                groups["/".join(map(str, cell))] = found = waiting.pop(cell).get()
                keep(kept, groups)
                say(f"{cell[0]}: seeds {cell[1]} to {cell[1] + GROUP - 1} done in {found['seconds']:,.0f} s")
            time.sleep(0.5)
    return groups


def table(names: list[str], groups: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per preset."""
    resampling, rows = Resampling(confidence=0.95, bootstrap=10_000, seed=0), []
    for name in names:
        own = [group for key, group in groups.items() if key.startswith(f"{name}/")]
        returns = np.array([value for group in own for value in group["returns"]])
        tails = [curve[-len(curve) // 10 :] for group in own for curve in group["curves"]]
        training = [float(np.mean([value for value in tail if value is not None])) for tail in tails if any(tail)]
        low, high = resampling.ends(resampling.resample(returns))
        steps = sum(group["env_steps"] * len(group["returns"]) for group in own)
        rows.append(
            {
                "preset": name,
                "env_steps": own[0]["env_steps"],
                "seeds": len(returns),
                "return_iqm": round(float(interquartile_mean(returns)), 1),
                "return_low": round(low, 1),
                "return_high": round(high, 1),
                "return_mean": round(float(returns.mean()), 1),
                "return_deviation": round(float(returns.std(ddof=1)), 1),
                "training_return": round(float(np.mean(training)), 1) if training else None,
                "zoo_published": PUBLISHED.get(name),
                "env_steps_per_cpu_second": round(steps / sum(group["seconds"] for group in own)),
            }
        )
    return rows


def main() -> None:
    """Run what is missing, then write the table."""
    parser = make_parser(__doc__)
    known = [path.stem.removeprefix("tuned_") for path in sorted((ROOT / "jobs" / "experiments").glob("tuned_*.toml"))]
    parser.add_argument("--tasks", nargs="+", choices=known, default=known, help="which of the presets")
    parser.add_argument("--seeds", type=int, default=10, help="trials of each, a multiple of five (default: 10)")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="groups at once (default: all cores)")
    arguments = parser.parse_args()
    folder = results_folder(arguments.quick)
    names, seeds = (arguments.tasks, arguments.seeds) if not arguments.quick else (known[:1], GROUP)
    groups = run_missing(names, seeds, folder / "tuned.json", arguments.processes, arguments.quick)
    rows = table(names, groups)
    write_table((folder if arguments.quick else ROOT / "docs" / "results") / "tuned.csv", rows)
    say_rows([{key: str(value) for key, value in row.items()} for row in rows])


if __name__ == "__main__":
    main()
