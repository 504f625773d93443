"""Does the stacked engine learn as others do? The same hyperparameters and seeds, and a two-sample test of the outcome.

CleanRL's defaults are held against the plain trial, presets of rl-baselines3-zoo against stable-baselines3, and the
engine's products in bfloat16 (ppo.precision, where the processor has them) against those in float32. Per seed: the mean
return of the episodes that ended in each iteration. Final return is the mean over the last tenth of a trial, area under
the curve the mean over all of it; a Mann-Whitney test compares the implementations on each. Seeds that are done are
kept in benchmarks/results/same_learning.json; the same command goes on with the others, then writes
docs/results/same_learning.csv and docs/pictures/same_learning.png. All of them take hours of one core.

    python benchmarks/same_learning.py [--studies InvertedPendulum-v4 HalfCheetah-v4 tuned_hopper bfloat16]
"""

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import scipy.stats
import torch
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from command import keep, make_parser, results_folder, write_table  # noqa: E402
from plain_ppo import PlainTrial  # noqa: E402

from tipl_ray.config import Collect, Experiment  # noqa: E402
from tipl_ray.drawing import png  # noqa: E402
from tipl_ray.evaluate.metrics import Resampling  # noqa: E402
from tipl_ray.experiments import load_experiment  # noqa: E402
from tipl_ray.ppo.compiled_learner import has_bfloat16  # noqa: E402
from tipl_ray.ppo.engines import choose_engine  # noqa: E402
from tipl_ray.ppo.trials import TrialGroup  # noqa: E402
from tipl_ray.terminal import say  # noqa: E402

COLOURS = {"engine": "#0072B2", "plain": "#D55E00", "stable-baselines3": "#D55E00", "bfloat16": "#D55E00"}
Curve = list[float | None]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Study:
    """What is learned, and by whom beside the engine."""

    experiment: Experiment
    seeds: tuple[int, ...]
    peer: str
    peer_curve: Callable[[Experiment, int], Curve]

    @property
    def title(self) -> str:
        """Task, preset or precision, and policy."""
        collect = self.experiment.collect
        return f"{self.experiment.name} {'-'.join(map(str, collect.policy_hidden))}"


def filled(returns: Curve) -> list[float]:
    """Iterations in which no episode ended take the last known value."""
    values: list[float] = []
    for value in returns:
        values.append(round(value, 2) if value is not None else values[-1] if values else 0.0)
    return values


def engine_curves(experiment: Experiment, seeds: tuple[int, ...]) -> dict[int, Curve]:
    """Curves of a group of trials."""
    group = TrialGroup(experiment, choose_engine("auto", experiment.ppo), list(seeds))
    found: dict[int, Curve] = {seed: [] for seed in seeds}
    while not group.finished:
        for snapshot in group.run_iteration():
            if snapshot.epoch == experiment.collect.epochs_per_snapshot:
                found[snapshot.seed].append(snapshot.episodic_return)
    return found


def plain_curve(experiment: Experiment, seed: int) -> Curve:
    """Curve of one plain trial."""
    collect, returns = experiment.collect, []
    trial = PlainTrial(collect.task, collect.policy_hidden, seed, experiment.num_iterations)
    for _ in range(experiment.num_iterations):
        trial.episodic_returns.clear()
        trial.run_iteration()
        returns.append(float(np.mean(trial.episodic_returns)) if trial.episodic_returns else None)
    return returns


def their_curve(experiment: Experiment, seed: int) -> Curve:
    """Curve of one trial of stable-baselines3."""
    from stable_baselines3.common.callbacks import BaseCallback
    from zoo import their_model

    curve: Curve = []

    class Returns(BaseCallback):
        def _on_rollout_start(self) -> None:
            self.ended: list[float] = []

        def _on_step(self) -> bool:
            self.ended += [info["episode"]["r"] for info in self.locals["infos"] if "episode" in info]
            return True

        def _on_rollout_end(self) -> None:
            curve.append(float(np.mean(self.ended)) if self.ended else None)

    their_model(experiment, seed).learn(experiment.env_steps_per_trial, callback=Returns())
    return curve


def bfloat16_curve(experiment: Experiment, seed: int) -> Curve:
    """Curve of one trial of the engine with its products in bfloat16."""
    halved = dataclasses.replace(experiment, ppo=dataclasses.replace(experiment.ppo, precision="bfloat16"))
    return engine_curves(halved, (seed,))[seed]


def _of_bfloat16(task: str, width: int, env_steps: int, seeds: int) -> Study:
    defaults = _of_defaults(task, width, env_steps, seeds)
    experiment = dataclasses.replace(defaults.experiment, name="bfloat16")
    return dataclasses.replace(defaults, experiment=experiment, peer="bfloat16", peer_curve=bfloat16_curve)


def _of_defaults(task: str, width: int, env_steps: int, seeds: int) -> Study:
    collect = Collect(task=task, policy_hidden=(width, width), total_env_steps=env_steps)
    experiment = Experiment(name=task, collect=collect)
    return Study(experiment=experiment, seeds=tuple(range(1, seeds + 1)), peer="plain", peer_curve=plain_curve)


def _of_preset(name: str, env_steps: int, seeds: int) -> Study:
    preset = load_experiment(ROOT / "jobs" / "experiments" / f"{name}.toml")
    experiment = dataclasses.replace(preset, collect=dataclasses.replace(preset.collect, total_env_steps=env_steps))
    numbers = tuple(range(1, seeds + 1))
    return Study(experiment=experiment, seeds=numbers, peer="stable-baselines3", peer_curve=their_curve)


STUDIES = {
    study.experiment.name: study
    for study in (
        _of_defaults("InvertedPendulum-v4", 8, 100_000, 20),
        _of_defaults("HalfCheetah-v4", 64, 300_000, 8),
        _of_preset("tuned_half_cheetah", 300_000, 8),
        _of_preset("tuned_hopper", 300_000, 8),
        *([_of_bfloat16("HalfCheetah-v4", 256, 300_000, 16)] if has_bfloat16() else []),
    )
}


def _shortened(study: Study) -> Study:
    experiment = study.experiment
    collect = dataclasses.replace(experiment.collect, total_env_steps=2 * experiment.ppo.num_steps)
    return dataclasses.replace(study, experiment=dataclasses.replace(experiment, collect=collect), seeds=(1, 2))


def run_missing(studies: list[Study], kept: Path) -> dict[str, list[float]]:
    """Every curve by `study/implementation/seed`; those that are missing are run and kept one by one."""
    curves: dict[str, list[float]] = json.loads(kept.read_text()) if kept.exists() else {}
    for study in studies:
        name = study.experiment.name
        if any(f"{name}/engine/{seed}" not in curves for seed in study.seeds):
            for seed, curve in engine_curves(study.experiment, study.seeds).items():
                curves[f"{name}/engine/{seed}"] = filled(curve)
        for seed in study.seeds:
            if f"{name}/{study.peer}/{seed}" not in curves:
                curves[f"{name}/{study.peer}/{seed}"] = found = filled(study.peer_curve(study.experiment, seed))
                final = np.mean(found[-len(found) // 10 :])
                say(f"{name}: {study.peer} seed {seed} of {len(study.seeds)} done, final {final:.1f}")
                keep(kept, curves)
    return curves


def whole(curves: dict[str, list[float]], study: Study) -> bool:
    """Whether every curve of a study is there."""
    names = (f"{study.experiment.name}/{name}/{seed}" for name in ("engine", study.peer) for seed in study.seeds)
    return all(name in curves for name in names)


def stacked(curves: dict[str, list[float]], study: Study, name: str) -> np.ndarray:
    """Curves (seeds, iterations) of one implementation."""
    return np.array([curves[f"{study.experiment.name}/{name}/{seed}"] for seed in study.seeds])


def compare(curves: dict[str, list[float]], studies: list[Study]) -> list[dict[str, Any]]:
    """One row per study and metric."""
    rows = []
    for study in studies:
        outcome = {}
        for name in ("engine", study.peer):
            runs = stacked(curves, study, name)
            last = max(1, runs.shape[1] // 10)
            outcome[name] = {"final return": runs[:, -last:].mean(axis=1), "area under curve": runs.mean(axis=1)}
        for metric in ("final return", "area under curve"):
            engine, peer = outcome["engine"][metric], outcome[study.peer][metric]
            rows.append(
                {
                    "task": study.title,
                    "env_steps": study.experiment.collect.total_env_steps,
                    "seeds": len(study.seeds),
                    "metric": metric,
                    "engine_mean": round(float(engine.mean()), 1),
                    "engine_deviation": round(float(engine.std(ddof=1)), 1),
                    "peer": study.peer,
                    "peer_mean": round(float(peer.mean()), 1),
                    "peer_deviation": round(float(peer.std(ddof=1)), 1),
                    "p_value": round(float(scipy.stats.mannwhitneyu(engine, peer).pvalue), 3),
                }
            )
    return rows


def draw(curves: dict[str, list[float]], studies: list[Study]) -> Figure:
    """Mean curves with bootstrap bands over seeds."""
    figure = Figure(figsize=(5.5 * len(studies), 3.8), layout="constrained")
    resampling = Resampling(confidence=0.95, bootstrap=1000, seed=0)
    for axes, study in zip(np.ravel(figure.subplots(1, len(studies))), studies, strict=True):
        for name in ("engine", study.peer):
            runs, colour = stacked(curves, study, name), COLOURS[name]
            low, high = resampling.band(runs, statistic=lambda runs: runs.mean(axis=-1))
            steps = study.experiment.ppo.num_steps * np.arange(1, runs.shape[1] + 1)
            axes.plot(steps, runs.mean(axis=0), color=colour, label=f"{name}, {len(study.seeds)} seeds")
            axes.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)
        axes.set_title(study.title)
        axes.set_xlabel("environment steps")
        axes.set_ylabel("episodic return")
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def main() -> None:
    """Run what is missing, then write table and picture."""
    parser = make_parser(__doc__)
    parser.add_argument("--studies", nargs="+", choices=STUDIES, default=list(STUDIES), help="which to complete")
    arguments = parser.parse_args()
    studies = [STUDIES[name] for name in arguments.studies]
    tables = pictures = kept = results_folder(arguments.quick)
    if arguments.quick:
        studies = [_shortened(study) for study in studies]
    else:
        tables, pictures = ROOT / "docs" / "results", ROOT / "docs" / "pictures"
    torch.set_num_threads(1)
    curves = run_missing(studies, kept / "same_learning.json")
    # Table and picture have what earlier runs have completed too.
    studies += [
        study for study in STUDIES.values() if not arguments.quick and study not in studies and whole(curves, study)
    ]
    studies.sort(key=lambda study: list(STUDIES).index(study.experiment.name))
    rows = compare(curves, studies)
    write_table(tables / "same_learning.csv", rows)
    (pictures / "same_learning.png").write_bytes(png(draw(curves, studies)))
    for row in rows:
        say(", ".join(f"{key} {value}" for key, value in row.items()))


if __name__ == "__main__":
    main()
