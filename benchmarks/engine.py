"""How fast one actor's engine is on one core, beside a plain trial and stable-baselines3, and above which floors.

Every subject runs one PPO iteration per round and the rounds alternate, so that a noisy machine is noisy for all; the
table shows medians of CPU time, which on a machine of one's own is wall time. Floors: MuJoCo's steps alone, and the
update's matrix products at the best rate that torch's own product of a minibatch reaches here.

    python benchmarks/engine.py [--rounds 5]
"""

import copy
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import mujoco
import mujoco.batch
import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from command import make_parser, results_folder, use_one_core  # noqa: E402
from plain_ppo import PlainTrial  # noqa: E402

from tipl_ray.config import Collect, Experiment  # noqa: E402
from tipl_ray.experiments import load_experiment  # noqa: E402
from tipl_ray.ppo.engines import choose_engine  # noqa: E402
from tipl_ray.ppo.simulations import BatchSimulations  # noqa: E402
from tipl_ray.ppo.tasks import find_task  # noqa: E402
from tipl_ray.ppo.trials import TrialGroup  # noqa: E402
from tipl_ray.terminal import say_rows  # noqa: E402

NUM_STEPS = 2048
TASKS = (("InvertedPendulum-v4", 8, 25), ("HalfCheetah-v4", 256, 10))
"""Task, width of the policy's hidden layers, trials of one actor."""
PRESETS = (("tuned_half_cheetah", 10),)
"""Experiment of rl-baselines3-zoo's hyperparameters, trials of one actor."""


def of_defaults(task: str, width: int) -> Experiment:
    """CleanRL's hyperparameters."""
    return Experiment(name="bench", collect=Collect(task=task, policy_hidden=(width, width)))


def engine(experiment: Experiment, trials: int) -> Callable[[], float]:
    """Seconds per environment step of one iteration of a group of trials."""
    group = TrialGroup(experiment, choose_engine("auto", experiment.ppo), list(range(1, trials + 1)))

    def run() -> float:
        begin = time.process_time()
        for _ in group.run_iteration():
            pass
        return (time.process_time() - begin) / (trials * experiment.ppo.num_steps)

    return run


def plain(task: str, width: int) -> Callable[[], float]:
    """Seconds per environment step of one iteration of the plain trial."""
    trial = PlainTrial(task, (width, width), seed=1, num_iterations=400)

    def run() -> float:
        begin = time.process_time()
        trial.run_iteration()
        return (time.process_time() - begin) / NUM_STEPS

    return run


def stable_baselines(experiment: Experiment) -> Callable[[], float] | None:
    """Seconds per environment step of one iteration of stable-baselines3's PPO; None where it is not installed."""
    try:
        from zoo import their_model
    except ImportError:
        return None
    ppo = experiment.ppo
    model = their_model(experiment, seed=1, clip_range_vf=ppo.clip_coefficient if ppo.clip_values else None)

    def run() -> float:
        begin = time.process_time()
        model.learn(ppo.num_steps, reset_num_timesteps=False)
        return (time.process_time() - begin) / ppo.num_steps

    return run


def physics(task: str, trials: int) -> Callable[[], float]:
    """Seconds per environment step of MuJoCo alone, under random actions and with resets outside the clock."""
    simulations = find_task(task)(trials)
    assert isinstance(simulations, BatchSimulations)
    model = copy.copy(simulations.model)
    disabled = mujoco.mjtDisableBit
    # The floor is gymnasium's model as it is, the profiler's clock included.
    model.opt.disableflags &= ~(disabled.mjDSBL_CONTACT.value | disabled.mjDSBL_ISLAND.value)
    simulations.batch = mujoco.batch.Batch(model, trials, nthread=1, persistent=True)
    simulations.qpos, simulations.qvel, simulations.ctrl = map(simulations.batch.bind, ("qpos", "qvel", "ctrl"))
    generator = np.random.default_rng(0)
    for k in range(trials):
        simulations.reset(k, generator)
    shape = (NUM_STEPS, trials, simulations.action_size)
    actions = generator.normal(0, 0.5, shape).clip(simulations.action_low, simulations.action_high)

    def run() -> float:
        total = 0.0
        for step in range(NUM_STEPS):
            simulations.ctrl[:] = actions[step]
            begin = time.process_time()
            simulations.batch.step(nstep=simulations.frame_skip)
            total += time.process_time() - begin
            simulations.observe(simulations.observations_KO)
            simulations.before_physics()
            simulations.judge(actions[step])
            for k in np.flatnonzero(simulations.terminated_K):
                simulations.reset(int(k), generator)
        return total / (trials * NUM_STEPS)

    return run


def matrix_products(task: str, width: int) -> Callable[[], float]:
    """Seconds per environment step of the update's multiply-adds at the rate of the best product of a minibatch."""
    simulations = find_task(task)(1)
    inputs, outputs = simulations.observation_size, simulations.action_size
    per_sample = inputs * width + width * width + width * outputs + inputs * 64 + 64 * 64 + 64
    # Ten epochs of forward, gradient of weights and gradient of inputs (of all layers but the first).
    flops = 10 * 2 * (3 * per_sample - inputs * (width + 64))
    operands = [(torch.randn(64, size), torch.randn(size, size)) for size in (64, 128, 256)]

    def run() -> float:
        rates = []
        for left, right in operands:
            out = torch.empty(64, right.shape[1])
            begin = time.process_time()
            for _ in range(300):
                torch.mm(left, right, out=out)
            rates.append(300 * 2 * left.numel() * right.shape[1] / (time.process_time() - begin))
        return flops / max(rates)

    return run


def medians_of(subjects: dict[str, Callable[[], float] | None], rounds: int) -> dict[str, tuple[float, float]]:
    """Median seconds of each subject over alternating rounds, and their spread as a share of it."""
    present = {name: run for name, run in subjects.items() if run is not None}
    seconds: dict[str, list[float]] = {name: [] for name in present}
    for number in range(rounds + 1):
        for name, run in present.items():
            taken = run()
            if number:  # the first round warms up
                seconds[name].append(taken)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {name: (median, (max(seconds[name]) - min(seconds[name])) / median) for name, median in medians.items()}


def measure(rounds: int) -> list[dict]:
    """All subjects on all tasks; one row each. Ratios are to the plain trial, where there is one, else to the last."""
    rows = []
    tasks: list[tuple[str, int, dict[str, Callable[[], float] | None]]] = []
    for task, width, trials in TASKS:
        experiment = of_defaults(task, width)
        subjects = {
            "engine": engine(experiment, trials),
            "plain": plain(task, width),
            "stable-baselines3": stable_baselines(experiment),
            "floor: physics": physics(task, trials),
            "floor: matrix products": matrix_products(task, width),
        }
        tasks.append((f"{task} {width}-{width}", trials, subjects))
    for name, trials in PRESETS:
        experiment = load_experiment(ROOT / "jobs" / "experiments" / f"{name}.toml")
        tasks.append(
            (name, trials, {"engine": engine(experiment, trials), "stable-baselines3": stable_baselines(experiment)})
        )
    for label, trials, subjects in tasks:
        found = medians_of(subjects, rounds)
        beside = "plain" if "plain" in found else list(found)[-1]
        floors = [found[name][0] for name in ("floor: physics", "floor: matrix products") if name in found]
        for name, (median, spread) in found.items():
            rows.append(
                {
                    "task": label,
                    "subject": name,
                    "metric": "env steps per second, one core",
                    "value": round(1 / median, 1),
                    "unit": "1/s",
                    "beside": beside,
                    "ratio": round(found[beside][0] / median, 2),
                    "ratio_to_floor": round(median / sum(floors), 3) if floors else None,
                    "ratio_to_physics": round(median / floors[0], 3) if floors else None,
                    "microseconds": round(median * 1e6, 2),
                    "spread": round(spread, 3),
                    "trials": trials if name == "engine" else 1,
                    "rounds": rounds,
                }
            )
    return rows


def main() -> None:
    """Measure, print the table, write benchmarks/results/engine.json."""
    parser = make_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="alternating rounds after the one that warms up")
    arguments = parser.parse_args()
    rounds = 1 if arguments.quick else arguments.rounds
    use_one_core()
    rows = measure(rounds)
    (results_folder(arguments.quick) / "engine.json").write_text(json.dumps(rows, indent=1) + "\n")
    shown = (
        "task",
        "subject",
        "value",
        "microseconds",
        "beside",
        "ratio",
        "ratio_to_physics",
        "ratio_to_floor",
        "spread",
    )
    title = f"One core, medians of {rounds} alternating rounds; value in env steps/s, floor = physics + matrix products"
    say_rows([{key: str(row[key]) for key in shown} for row in rows], title=title)


if __name__ == "__main__":
    main()
