"""How predictable trainings of stable-baselines3 are: PPO, A2C, SAC and TD3 on two tasks each, through the callback.

Every trial learns in legs, in storage/predictability, and goes on after a kill where its last leg ended; what a cell's
trials are like is kept in benchmarks/results/predictability.json, cell by cell. The simple predictors are fitted on the
cell's first trials and asked about the others. Writes docs/results/predictability.csv and a picture of it.

    python benchmarks/predictability.py [--algorithms PPO A2C SAC TD3] [--tasks Pendulum-v1 Hopper-v5] [--trials 6]
"""

import json
import math
import multiprocessing
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from command import keep, make_parser, results_folder  # noqa: E402
from matplotlib.lines import Line2D  # noqa: E402

from tipl_ray.data.trajectory_store import TrajectoryStore  # noqa: E402
from tipl_ray.drawing import as_shipped, dress, legend_below, new_figure, png  # noqa: E402
from tipl_ray.evaluate.metrics import Resampling, Table, by, skill  # noqa: E402
from tipl_ray.pages import as_csv  # noqa: E402
from tipl_ray.predict.bands import load_band, snapshots_per_iteration  # noqa: E402
from tipl_ray.predict.gram import GramBand, Question  # noqa: E402
from tipl_ray.predict.predictor import Combination, Trials, every_window  # noqa: E402
from tipl_ray.registry import PREDICTORS  # noqa: E402
from tipl_ray.terminal import say, say_rows  # noqa: E402

TASKS = ("Pendulum-v1", "Hopper-v5")
NAMES = ("copy-last", "linear", "damped", "rank-1-from-last", "dmd", "ridge")
CONTEXT, STEPS = 20, (1, 5, 10)
FITTED, CHOSEN_BY = 2, 1
"""Trials that predictors are fitted on, and that their settings are chosen by; the others are reported."""
NETWORK = [64, 64]
TOTAL_STEPS = {"PPO": 51_200, "A2C": 51_200, "SAC": 6_000, "TD3": 6_000}
"""Environment steps of a trial."""
QUICK_STEPS = {"PPO": 4_096, "A2C": 1_000, "SAC": 500, "TD3": 500}
SNAPSHOTS: dict[str, dict[str, Any]] = {
    "PPO": {"epochs_per_snapshot": 2},
    "A2C": {"steps_per_snapshot": 200},
    "SAC": {"steps_per_snapshot": 40},
    "TD3": {"steps_per_snapshot": 40},
}
"""When each algorithm gives a snapshot, see `RecordPolicy`."""
COLOURS = {"PPO": "#0072b2", "A2C": "#56b4e9", "SAC": "#d55e00", "TD3": "#e69f00"}


def make_model(algorithm: str, task: str, seed: int) -> Any:
    """A model with stable-baselines3's defaults, but for the networks' width and PPO's shorter rollouts."""
    import gymnasium
    import stable_baselines3
    from stable_baselines3.common.monitor import Monitor
    from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

    settings: dict[str, Any] = {"policy_kwargs": {"net_arch": list(NETWORK)}, "seed": seed, "device": "cpu"}
    if algorithm == "PPO":
        settings |= {"n_steps": 512, "batch_size": 64}
    vector: Any = DummyVecEnv([lambda: Monitor(gymnasium.make(task))])
    if algorithm in ("PPO", "A2C"):
        vector = VecNormalize(vector)
    return getattr(stable_baselines3, algorithm)("MlpPolicy", vector, **settings)


def train(storage: str, algorithm: str, task: str, trial: int, quick: bool) -> float:
    """One trial to its end; the seconds that it took."""
    import torch

    from tipl_ray.record.stable_baselines import RecordPolicy, learn_in_legs

    torch.set_num_threads(1)
    begin, steps = time.monotonic(), (QUICK_STEPS if quick else TOTAL_STEPS)[algorithm]
    schedule = SNAPSHOTS[algorithm]
    if quick and "steps_per_snapshot" in schedule:
        schedule = {"steps_per_snapshot": schedule["steps_per_snapshot"] // 8}
    learn_in_legs(
        lambda: make_model(algorithm, task, trial),
        Path(storage) / "checkpoints" / str(trial),
        total_timesteps=steps,
        leg_timesteps=math.ceil(steps / 4),
        seed=trial,
        callback=RecordPolicy(storage, trial=trial, **schedule),
    )
    return time.monotonic() - begin


def errors(predictor: Combination, band: GramBand, trial: int, question: Question) -> Table:
    """Squared errors and displacements of every window of a trial, a row for each forward step."""
    ((_, starts_B),) = every_window([band], question)
    errors_BH = predictor.band_errors(band, starts_B)
    still = PREDICTORS.load("copy-last")(question)
    rows, steps = len(starts_B), len(question.steps)
    return {
        "trial": np.full(rows * steps, trial),
        "phase": np.repeat(starts_B % question.snapshots_per_iteration, steps),
        "step": np.tile(question.steps, rows),
        "squared_error": errors_BH.ravel(),
        "displacement_squared": still.band_errors(band, starts_B).ravel(),
    }


def skills(storage: str, algorithm: str, task: str, trials: list[int]) -> list[dict[str, Any]]:
    """One row per phase, forward step and predictor of a cell; phase `all` is over all of them."""
    phases = snapshots_per_iteration(TrajectoryStore(storage).header())
    question = Question(context=CONTEXT, steps=STEPS, snapshots_per_iteration=phases)
    bands = {trial: load_band(storage, trial, question) for trial in trials}
    parts = [list(bands.values())[part] for part in (slice(FITTED), slice(FITTED, FITTED + CHOSEN_BY))]
    training, validation = (Trials(bands=part, weights=list) for part in parts)
    resampling, rows = Resampling(confidence=0.95, bootstrap=10_000, seed=0), []
    for name in NAMES:
        predictor = PREDICTORS.load(name)(question)
        predictor.fit(training, validation)
        tables = [errors(predictor, bands[trial], trial, question) for trial in trials[FITTED + CHOSEN_BY :]]
        table = {column: np.concatenate([one[column] for one in tables]) for column in tables[0]}
        groups = [("all", step, part) for (step,), part in by(table, "step")]
        if phases > 1:
            groups += [(str(phase), step, part) for (phase, step), part in by(table, "phase", "step")]
        for phase, step, part in groups:
            low, high = resampling.interval(part["trial"], part["squared_error"], part["displacement_squared"])
            rows.append(
                {
                    "task": task,
                    "algorithm": algorithm,
                    "phase": phase,
                    "step": step,
                    "predictor": name,
                    "skill": round(skill(part), 4),
                    "low": round(1 - high, 4),
                    "high": round(1 - low, 4),
                    "trials": len(tables),
                    "snapshots": min(band.num_snapshots for band in bands.values()),
                }
            )
    return rows


def run_cells(arguments: Any, kept: Path, data: Path) -> dict[str, list[dict[str, Any]]]:
    """Every cell's rows by `task/algorithm`; those that are missing are trained, and kept one by one."""
    cells: dict[str, list[dict[str, Any]]] = json.loads(kept.read_text()) if kept.exists() else {}
    trials = list(range(1, arguments.trials + 1))
    with multiprocessing.get_context("spawn").Pool(
        arguments.processes, os.nice, (0 if arguments.quick else 19,)
    ) as pool:
        for task in arguments.tasks:
            for algorithm in arguments.algorithms:
                if (cell := f"{task}/{algorithm}/{arguments.trials}") in cells:
                    continue
                storage = str(data / f"{algorithm}-{task}")
                # The first trial alone: all of a storage share its header.
                seconds = pool.starmap(train, [(storage, algorithm, task, trials[0], arguments.quick)])
                seconds += pool.starmap(train, [(storage, algorithm, task, one, arguments.quick) for one in trials[1:]])
                cells[cell] = skills(storage, algorithm, task, trials)
                keep(kept, cells)
                say(f"{cell}: {len(trials)} trials in {sum(seconds):,.0f} s")
    return cells


def draw(rows: list[dict[str, Any]]) -> bytes:
    """Skill of each predictor, a panel for each task and forward step, a colour for each algorithm."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    with as_shipped():
        figure, panels = new_figure(len(tasks) * len(STEPS), width=15, height=4.2, across=len(STEPS))
        shown = NAMES[1:]
        for panel, (task, step) in zip(panels, [(task, step) for task in tasks for step in STEPS], strict=True):
            for place, algorithm in enumerate(COLOURS):
                own = {
                    row["predictor"]: row
                    for row in rows
                    if (row["task"], row["step"], row["algorithm"], row["phase"]) == (task, step, algorithm, "all")
                }
                for x, name in enumerate(shown):
                    if name in own:
                        low, high = (own[name][end] for end in ("low", "high"))
                        at = x + 0.16 * (place - 1.5)
                        panel.plot([at, at], np.clip([low, high], -1, 1), color=COLOURS[algorithm], linewidth=2)
                        panel.plot([at], np.clip([own[name]["skill"]], -1, 1), "o", color=COLOURS[algorithm])
            panel.axhline(0, color="#999999", linewidth=1)
            panel.set_ylim(-1.05, 1.05)
            panel.set_xticks(range(len(shown)), shown, rotation=20)
            dress(panel, f"{task}, {step} snapshot{'s' if step > 1 else ''} ahead", "", "skill (below -1 at -1)")
        entries = [Line2D([], [], color=colour, marker="o", label=name) for name, colour in COLOURS.items()]
        legend_below(
            figure, entries, ["skill: 1 is perfect, 0 is copying the last snapshot; bars: 95% over test trials"]
        )
        return png(figure)


def main() -> None:
    """Train what is missing, then write the table and the picture."""
    parser = make_parser(__doc__)
    parser.add_argument("--algorithms", nargs="+", choices=SNAPSHOTS, default=list(SNAPSHOTS), help="which of them")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), help="gymnasium ids (default: %(default)s)")
    parser.add_argument("--trials", type=int, default=6, help="of each cell, six or more (default: 6)")
    parser.add_argument("--processes", type=int, default=1, help="trials at once (default: 1)")
    arguments = parser.parse_args()
    if arguments.trials < FITTED + CHOSEN_BY + 3:
        parser.error(f"--trials {arguments.trials}: {FITTED + CHOSEN_BY} are to fit, and an interval takes three more")
    folder, data = results_folder(arguments.quick), ROOT / "storage" / "predictability"
    if arguments.quick:
        data = folder / "data"
        arguments.tasks = arguments.tasks[:1]
    cells = run_cells(arguments, folder / "predictability.json", data)
    rows = [row for name, cell in cells.items() if name.endswith(f"/{arguments.trials}") for row in cell]
    table, picture = folder / "predictability.csv", folder / "predictability.png"
    table.write_bytes(as_csv(rows))
    picture.write_bytes(draw(rows))
    if not arguments.quick:
        shutil.move(table, ROOT / "docs" / "results" / table.name)
        shutil.move(picture, ROOT / "docs" / "pictures" / picture.name)
    say_rows([{key: str(value) for key, value in row.items()} for row in rows if row["phase"] == "all"])


if __name__ == "__main__":
    main()
