"""Jumps as a callback of stable-baselines3's PPO: learning curves with and without, on the same seeds.

stable-baselines3's default hyperparameters with normalised observations and rewards, on a task and seeds that no rule
was searched on. Per seed: the mean return of the episodes that ended in each iteration, and the CPU time. Seeds that
are done are kept in benchmarks/results/stable_baselines_jumps.json; the same command goes on with the others, then
writes docs/results/stable_baselines_jumps.csv and docs/pictures/stable_baselines_jumps.png. All of it takes an hour
of one core.

    python benchmarks/stable_baselines_jumps.py [--task Walker2d-v4] [--env-steps 100000] [--predictor first-again-v1]
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import scipy.stats
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback, CallbackList
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from command import keep, make_parser, results_folder, write_table  # noqa: E402

from tipl_ray.accelerate.stable_baselines import JumpPolicy  # noqa: E402
from tipl_ray.drawing import as_shipped, dress, labelled, legend_below, new_figure, png  # noqa: E402
from tipl_ray.evaluate.metrics import Resampling, interquartile_mean  # noqa: E402
from tipl_ray.terminal import say, say_rows  # noqa: E402

VARIANTS = {"10 epochs": (10, False), "4 epochs": (4, False), "4 epochs and jumps": (4, True)}
"""Update epochs of an iteration, and whether it jumps."""
COLOURS = dict(zip(VARIANTS, ("#5c6670", "#3b6ea8", "#c8442b"), strict=True))
FIRST_SEED, SEEDS, ROLLOUT = 5_001, 10, 2_048


class Returns(BaseCallback):
    """Mean return of the episodes that ended in each iteration; before the first one has, 0."""

    def __init__(self) -> None:
        super().__init__()
        self.curve: list[float] = []

    def _on_rollout_start(self) -> None:
        self._ended: list[float] = []

    def _on_step(self) -> bool:
        self._ended += [info["episode"]["r"] for info in self.locals["infos"] if "episode" in info]
        return True

    def _on_rollout_end(self) -> None:
        last = self.curve[-1] if self.curve else 0.0
        self.curve.append(round(float(np.mean(self._ended)), 2) if self._ended else last)


def train(task: str, variant: str, seed: int, env_steps: int, predictor: str) -> dict[str, Any]:
    """One training: its learning curve, gradient steps and CPU seconds."""
    epochs, jumps = VARIANTS[variant]
    vector = VecNormalize(DummyVecEnv([lambda: Monitor(gymnasium.make(task))]))
    model = PPO("MlpPolicy", vector, n_epochs=epochs, seed=seed, device="cpu")
    returns, begin = Returns(), time.process_time()
    model.learn(env_steps, callback=CallbackList([returns, *([JumpPolicy(predictor)] if jumps else [])]))
    steps = len(returns.curve) * epochs * (ROLLOUT // model.batch_size)
    return {"curve": returns.curve, "gradient_steps": steps, "seconds": time.process_time() - begin}


def cell(task: str, env_steps: int, variant: str, predictor: str, seed: int) -> str:
    """What a training is kept under."""
    return "/".join([task, str(env_steps), variant, *([predictor] if VARIANTS[variant][1] else []), str(seed)])


def runs_of(kept: dict[str, Any], settings: argparse.Namespace, variant: str) -> list[dict[str, Any]]:
    """The trainings of a variant, seed by seed."""
    return [kept[cell(settings.task, settings.env_steps, variant, settings.predictor, seed)] for seed in settings.seeds]


def summary(kept: dict[str, Any], settings: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a variant: area under the curve and final return, each against ten epochs."""
    resampling = Resampling(confidence=0.95, bootstrap=10_000, seed=0)
    rows: list[dict[str, Any]] = []
    firsts: dict[str, np.ndarray] = {}
    for variant in VARIANTS:
        runs = runs_of(kept, settings, variant)
        curves_SI = np.array([run["curve"] for run in runs])
        last = max(1, curves_SI.shape[1] // 10)
        outcome = {"auc": curves_SI.mean(axis=1), "final_return": curves_SI[:, -last:].mean(axis=1)}
        row = {
            "task": settings.task,
            "variant": variant,
            "predictor": settings.predictor if VARIANTS[variant][1] else "",
        }
        row |= {"env_steps": settings.env_steps, "seeds": len(runs)}
        for name, values_S in outcome.items():
            first_S = firsts.setdefault(name, values_S)
            low, high = resampling.ends(resampling.resample(values_S))
            row |= {name: round(float(interquartile_mean(values_S)), 1)}
            row |= {f"{name}_low": round(low, 1), f"{name}_high": round(high, 1)}
            row |= {f"{name}_p_value": round(float(scipy.stats.mannwhitneyu(values_S, first_S).pvalue), 4)}
        row |= {"gradient_steps": runs[0]["gradient_steps"]}
        rows.append(row | {"cpu_seconds": round(float(np.mean([run["seconds"] for run in runs])), 1)})
    return rows


@as_shipped()
def draw(kept: dict[str, Any], settings: argparse.Namespace) -> Figure:
    """Interquartile means over seeds, over environment steps and over gradient steps."""
    figure, panels = new_figure(2, width=10.0, height=4.0, share=True)
    resampling = Resampling(confidence=0.95, bootstrap=1000, seed=0)
    for variant, colour in COLOURS.items():
        runs = runs_of(kept, settings, variant)
        curves_SI = np.array([run["curve"] for run in runs])
        shares_I = np.arange(1, curves_SI.shape[1] + 1) / curves_SI.shape[1]
        low_I, high_I = resampling.band(curves_SI)
        for axes, total in zip(panels, (ROLLOUT * curves_SI.shape[1], runs[0]["gradient_steps"]), strict=True):
            axes.plot(total * shares_I, interquartile_mean(curves_SI.T), color=colour, linewidth=2, label=variant)
            axes.fill_between(total * shares_I, low_I, high_I, color=colour, alpha=0.15, linewidth=0)
    for axes, across in zip(panels, ("environment steps", "gradient steps"), strict=True):
        dress(axes, f"{settings.task}, {len(settings.seeds)} seeds, stable-baselines3", across, "episodic return")
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.xaxis.set_major_formatter("{x:,.0f}")
    legend_below(figure, labelled(panels[0]))
    return figure


def main() -> None:
    """Run what is missing, then write table and picture."""
    parser = make_parser(__doc__)
    parser.add_argument("--task", default="Walker2d-v4", help="gymnasium id (default: %(default)s)")
    parser.add_argument("--env-steps", type=int, default=100_000, help="of each training (default: %(default)s)")
    parser.add_argument("--predictor", default="first-again-v1", help="name or folder (default: %(default)s)")
    settings = parser.parse_args()
    settings.seeds = list(range(FIRST_SEED, FIRST_SEED + SEEDS))
    tables = pictures = folder = results_folder(settings.quick)
    if settings.quick:
        settings.env_steps, settings.seeds = ROLLOUT, settings.seeds[:2]
    else:
        tables, pictures = ROOT / "docs" / "results", ROOT / "docs" / "pictures"
    torch.set_num_threads(1)
    path = folder / "stable_baselines_jumps.json"
    kept: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for seed in settings.seeds:
        for variant in VARIANTS:
            key = cell(settings.task, settings.env_steps, variant, settings.predictor, seed)
            if key not in kept:
                kept[key] = train(settings.task, variant, seed, settings.env_steps, settings.predictor)
                keep(path, kept)
                say(f"{settings.task}, seed {seed}, {variant}: {kept[key]['seconds']:.0f} s")
    rows = summary(kept, settings)
    write_table(tables / "stable_baselines_jumps.csv", rows)
    (pictures / "stable_baselines_jumps.png").write_bytes(png(draw(kept, settings)))
    say_rows([{key: str(value) for key, value in row.items()} for row in rows])


if __name__ == "__main__":
    main()
