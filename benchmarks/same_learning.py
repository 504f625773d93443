"""Does the stacked engine learn as the plain trial does? Both on the same seeds, and a two-sample test of the outcome.

Per seed: the mean return of the episodes that ended in each iteration. Final return is the mean over the last tenth of
a trial, area under the curve the mean over all of it; a Mann-Whitney test compares the implementations on each. Seeds
that are done are kept in benchmarks/results/same_learning.json; the same command goes on with the others, then writes
docs/results/same_learning.csv and docs/pictures/same_learning.png. The plain trials take about an hour of one core.

    python benchmarks/same_learning.py [--tasks InvertedPendulum-v4 HalfCheetah-v4]
"""

import csv
import json
import sys
from pathlib import Path

import numpy as np
import scipy.stats
import torch
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from command import make_parser, results_folder  # noqa: E402
from plain_ppo import PlainTrial  # noqa: E402

from tipl_ray.config import Collect, Experiment  # noqa: E402
from tipl_ray.drawing import png  # noqa: E402
from tipl_ray.evaluate.metrics import Resampling  # noqa: E402
from tipl_ray.ppo.learner import choose_engine  # noqa: E402
from tipl_ray.ppo.trials import TrialGroup  # noqa: E402
from tipl_ray.terminal import say  # noqa: E402

Study = tuple[str, int, int, int]
"""Task, width, env steps, seeds."""
STUDIES: tuple[Study, ...] = (("InvertedPendulum-v4", 8, 100_000, 20), ("HalfCheetah-v4", 64, 300_000, 8))
NUM_STEPS = 2048
COLOURS = {"engine": "#0072B2", "plain": "#D55E00"}


def filled(returns: list[float | None]) -> list[float]:
    """Iterations in which no episode ended take the last known value."""
    values: list[float] = []
    for value in returns:
        values.append(value if value is not None else values[-1] if values else 0.0)
    return values


def engine_curves(task: str, width: int, env_steps: int, seeds: list[int]) -> dict[int, list[float]]:
    """Curves of a group of trials."""
    experiment = Experiment(
        name="same", collect=Collect(task=task, policy_hidden=(width, width), total_env_steps=env_steps)
    )
    group = TrialGroup(experiment, choose_engine("auto", experiment.ppo), seeds)
    found: dict[int, list[float | None]] = {seed: [] for seed in seeds}
    while not group.finished:
        for snapshot in group.run_iteration():
            if snapshot.epoch == experiment.collect.epochs_per_snapshot:
                found[snapshot.seed].append(snapshot.episodic_return)
    return {seed: filled(returns) for seed, returns in found.items()}


def plain_curve(task: str, width: int, env_steps: int, seed: int) -> list[float]:
    """Curve of one plain trial."""
    num_iterations = env_steps // NUM_STEPS
    trial = PlainTrial(task, (width, width), seed, num_iterations)
    returns: list[float | None] = []
    for _ in range(num_iterations):
        trial.episodic_returns.clear()
        trial.run_iteration()
        returns.append(float(np.mean(trial.episodic_returns)) if trial.episodic_returns else None)
    return filled(returns)


def run_missing(studies: list[Study], kept: Path) -> dict[str, list[float]]:
    """Every curve by `task/implementation/seed`; those that are missing are run and kept one by one."""
    curves: dict[str, list[float]] = json.loads(kept.read_text()) if kept.exists() else {}
    for task, width, env_steps, num_seeds in studies:
        seeds = list(range(1, num_seeds + 1))
        if f"{task}/engine/1" not in curves:
            for seed, curve in engine_curves(task, width, env_steps, seeds).items():
                curves[f"{task}/engine/{seed}"] = [round(value, 2) for value in curve]
        for seed in seeds:
            if f"{task}/plain/{seed}" not in curves:
                curve = plain_curve(task, width, env_steps, seed)
                curves[f"{task}/plain/{seed}"] = [round(value, 2) for value in curve]
                say(f"{task}: plain seed {seed} of {num_seeds} done, final {np.mean(curve[-len(curve) // 10 :]):.1f}")
                kept.write_text(json.dumps(curves) + "\n")
    return curves


def compare(curves: dict[str, list[float]], studies: list[Study]) -> list[dict]:
    """One row per task and metric."""
    rows = []
    for task, width, env_steps, num_seeds in studies:
        outcome = {}
        for name in ("engine", "plain"):
            stacked = np.array([curves[f"{task}/{name}/{seed}"] for seed in range(1, num_seeds + 1)])
            last = max(1, stacked.shape[1] // 10)
            outcome[name] = {"final return": stacked[:, -last:].mean(axis=1), "area under curve": stacked.mean(axis=1)}
        for metric in ("final return", "area under curve"):
            engine, plain = outcome["engine"][metric], outcome["plain"][metric]
            rows.append(
                {
                    "task": f"{task} {width}-{width}",
                    "env_steps": env_steps,
                    "seeds": num_seeds,
                    "metric": metric,
                    "engine_mean": round(float(engine.mean()), 1),
                    "engine_deviation": round(float(engine.std(ddof=1)), 1),
                    "plain_mean": round(float(plain.mean()), 1),
                    "plain_deviation": round(float(plain.std(ddof=1)), 1),
                    "p_value": round(float(scipy.stats.mannwhitneyu(engine, plain).pvalue), 3),
                }
            )
    return rows


def draw(curves: dict[str, list[float]], studies: list[Study]) -> Figure:
    """Mean curves with bootstrap bands over seeds."""
    figure = Figure(figsize=(5.5 * len(studies), 3.8), layout="constrained")
    resampling = Resampling(confidence=0.95, bootstrap=1000, seed=0)
    for axes, (task, width, _, num_seeds) in zip(np.ravel(figure.subplots(1, len(studies))), studies, strict=True):
        for name, colour in COLOURS.items():
            stacked = np.array([curves[f"{task}/{name}/{seed}"] for seed in range(1, num_seeds + 1)])
            low, high = resampling.band(stacked, statistic=lambda runs: runs.mean(axis=-1))
            steps = NUM_STEPS * np.arange(1, stacked.shape[1] + 1)
            axes.plot(steps, stacked.mean(axis=0), color=colour, label=f"{name}, {num_seeds} seeds")
            axes.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)
        axes.set_title(f"{task}, policy {width}-{width}")
        axes.set_xlabel("environment steps")
        axes.set_ylabel("episodic return")
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def main() -> None:
    """Run what is missing, then write table and picture."""
    parser = make_parser(__doc__)
    names = [study[0] for study in STUDIES]
    parser.add_argument("--tasks", nargs="+", choices=names, default=names, help="which of the studies")
    arguments = parser.parse_args()
    studies = [study for study in STUDIES if study[0] in arguments.tasks]
    tables = pictures = kept = results_folder(arguments.quick)
    if arguments.quick:
        studies = [(task, width, 2 * NUM_STEPS, 2) for task, width, _, _ in studies]
    else:
        tables, pictures = ROOT / "docs" / "results", ROOT / "docs" / "pictures"
    torch.set_num_threads(1)
    curves = run_missing(studies, kept / "same_learning.json")
    rows = compare(curves, studies)
    with (tables / "same_learning.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    (pictures / "same_learning.png").write_bytes(png(draw(curves, studies)))
    for row in rows:
        say(", ".join(f"{key} {value}" for key, value in row.items()))


if __name__ == "__main__":
    main()
