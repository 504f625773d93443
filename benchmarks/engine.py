"""How fast the engine is on each core, beside a plain trial and other libraries, and above which floors.

Every subject runs one PPO iteration per round and the rounds alternate, so that a noisy machine is noisy for all; the
table shows medians of CPU time, which on a machine of one's own is wall time, and of wall time. On several cores each
subject runs once on each of them at the same time. Floors: MuJoCo's steps alone, and the update's multiply-adds at the
rate that the processor reaches where it does nothing else (peak.cpp).

    python benchmarks/engine.py [--rounds 5] [--cores 2]
"""

import copy
import dataclasses
import json
import multiprocessing
import os
import queue
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mujoco
import mujoco.batch
import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import peers  # noqa: E402
from command import make_parser, results_folder  # noqa: E402
from plain_ppo import PlainTrial  # noqa: E402

from tipl_ray.config import Collect, Experiment  # noqa: E402
from tipl_ray.experiments import load_experiment  # noqa: E402
from tipl_ray.ppo.compiled_learner import has_bfloat16  # noqa: E402
from tipl_ray.ppo.engines import choose_engine  # noqa: E402
from tipl_ray.ppo.simulations import BatchSimulations  # noqa: E402
from tipl_ray.ppo.tasks import find_task  # noqa: E402
from tipl_ray.ppo.trials import TrialGroup  # noqa: E402
from tipl_ray.terminal import say_rows  # noqa: E402

NUM_STEPS = 2048
TASKS = (("InvertedPendulum-v4", 8, 25), ("HalfCheetah-v4", 64, 10), ("HalfCheetah-v4", 256, 10))
"""Task, width of the policy's hidden layers, trials of one actor."""
PRESETS = (("tuned_half_cheetah", 10),)
"""Experiment of rl-baselines3-zoo's hyperparameters, trials of one actor."""
HALVED = "engine, bfloat16"
DIFFERENCES = {
    "engine": "",
    HALVED: "multiplies in bfloat16 (ppo.precision), adds in float32",
    "plain": "CleanRL's ppo_continuous_action.py written down as one plain trial, without its logging",
    "stable-baselines3": "normalises by VecNormalize; no clipping of the value loss with the zoo's hyperparameters",
    "stable-baselines3 on EnvPool": f"{peers.ENVPOOL_ENVIRONMENTS} environments at once, a share of the steps in each",
    "rltools": "normalises observations but not rewards; no clipping of gradients or of the value loss",
    "floor: physics": "MuJoCo's steps alone",
    "floor: matrix products": "the update's multiply-adds alone, at the processor's peak",
}
"""What each subject computes otherwise than the engine."""
PEAK_ROUNDS = 2_000_000
"""Rounds of multiply-adds that the peak is measured by, some tens of milliseconds."""
THEIR_SETTINGS = (
    *("n_steps", "batch_size", "n_epochs", "learning_rate", "gamma", "gae_lambda", "clip_range", "clip_range_vf"),
    *("ent_coef", "vf_coef", "max_grad_norm", "policy_kwargs"),
)
PRODUCTS, PHYSICS = "floor: matrix products", "floor: physics"

Seconds = tuple[float, float]
"""CPU and wall, of one environment step."""
Run = Callable[[], Seconds]


def of_defaults(task: str, width: int) -> Experiment:
    """CleanRL's hyperparameters."""
    return Experiment(name="bench", collect=Collect(task=task, policy_hidden=(width, width)))


def clocked(work: Callable[[], Any], steps: int) -> Run:
    """Seconds per environment step of some work that takes so many."""

    def run() -> Seconds:
        cpu, wall = time.process_time(), time.perf_counter()
        work()
        return (time.process_time() - cpu) / steps, (time.perf_counter() - wall) / steps

    return run


def engine(experiment: Experiment, trials: int) -> Run:
    """One iteration of a group of trials."""
    group = TrialGroup(experiment, choose_engine("auto", experiment.ppo), list(range(1, trials + 1)))
    return clocked(lambda: list(group.run_iteration()), trials * experiment.ppo.num_steps)


def halved(experiment: Experiment, trials: int) -> Run | None:
    """The same with matrix products in bfloat16; None where the processor has none."""
    if not has_bfloat16():
        return None
    return engine(
        dataclasses.replace(experiment, ppo=dataclasses.replace(experiment.ppo, precision="bfloat16")), trials
    )


def plain(experiment: Experiment) -> Run:
    """One iteration of the plain trial."""
    collect = experiment.collect
    return clocked(PlainTrial(collect.task, collect.policy_hidden, seed=1, num_iterations=400).run_iteration, NUM_STEPS)


def stable_baselines(experiment: Experiment, pool: bool = False) -> Run | None:
    """One iteration of stable-baselines3's PPO, on EnvPool's environments or its own; None without what it takes."""
    try:
        from stable_baselines3.common.vec_env import VecNormalize
        from zoo import their_model
    except ImportError:
        return None
    ppo = experiment.ppo
    settings: dict[str, Any] = {"clip_range_vf": ppo.clip_coefficient if ppo.clip_values else None}
    if pool:
        settings["n_steps"] = ppo.num_steps // peers.ENVPOOL_ENVIRONMENTS
    model = their_model(experiment, seed=1, **settings)
    if pool:
        environments = peers.envpool(experiment)
        if environments is None:
            return None
        model = type(model)(
            "MlpPolicy",
            VecNormalize(environments, gamma=ppo.gamma),
            **{name: getattr(model, name) for name in THEIR_SETTINGS},
            seed=1,
            device="cpu",
        )
    return clocked(lambda: model.learn(ppo.num_steps, reset_num_timesteps=False), ppo.num_steps)


def rltools(experiment: Experiment) -> Run | None:
    """One iteration of rltools' PPO; None where it is not installed."""
    step = peers.rltools(experiment)
    return None if step is None else clocked(step, experiment.ppo.num_steps)


def physics(task: str, trials: int) -> Run:
    """MuJoCo alone, under random actions and with resets outside the clock."""
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

    def run() -> Seconds:
        cpu = wall = 0.0
        for step in range(NUM_STEPS):
            simulations.ctrl[:] = actions[step]
            begin, wall_begin = time.process_time(), time.perf_counter()
            simulations.batch.step(nstep=simulations.frame_skip)
            cpu, wall = cpu + time.process_time() - begin, wall + time.perf_counter() - wall_begin
            simulations.observe(simulations.observations_KO)
            simulations.before_physics()
            simulations.judge(actions[step])
            for k in np.flatnonzero(simulations.terminated_K):
                simulations.reset(int(k), generator)
        return cpu / (trials * NUM_STEPS), wall / (trials * NUM_STEPS)

    return run


def matrix_products(task: str, width: int) -> Run:
    """The update's multiply-adds at the processor's peak."""
    simulations = find_task(task)(1)
    inputs, outputs = simulations.observation_size, simulations.action_size
    per_sample = inputs * width + width * width + width * outputs + inputs * 64 + 64 * 64 + 64
    # Ten epochs of forward, gradient of weights and gradient of inputs (of all layers but the first).
    operations = 10 * 2 * (3 * per_sample - inputs * (width + 64))

    def run() -> Seconds:
        begin, wall = time.process_time(), time.perf_counter()
        done = peers.multiply_adds(PEAK_ROUNDS)
        share = operations / done
        return (time.process_time() - begin) * share, (time.perf_counter() - wall) * share

    return run


def subjects_of() -> dict[str, dict[str, Run | None]]:
    """Every subject of every task, ready to run in this process."""
    tasks: dict[str, dict[str, Run | None]] = {}
    for task, width, trials in TASKS:
        experiment = of_defaults(task, width)
        tasks[f"{task} {width}-{width}"] = {
            "engine": engine(experiment, trials),
            HALVED: halved(experiment, trials),
            "plain": plain(experiment),
            "stable-baselines3": stable_baselines(experiment),
            "stable-baselines3 on EnvPool": stable_baselines(experiment, pool=True),
            "rltools": rltools(experiment),
            PHYSICS: physics(task, trials),
            PRODUCTS: matrix_products(task, width),
        }
    for name, trials in PRESETS:
        experiment = load_experiment(ROOT / "jobs" / "experiments" / f"{name}.toml")
        tasks[name] = {"engine": engine(experiment, trials), "stable-baselines3": stable_baselines(experiment)}
    return tasks


Rounds = dict[tuple[str, str], list[Seconds]]
"""By task and subject: each round's."""


def on_core(core: int, rounds: int, together: Any, answers: Any) -> None:
    """Run all subjects in alternating rounds, each at the same time as on the other cores."""
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    found: Rounds = {}
    tasks = subjects_of()
    for task, subjects in tasks.items():
        for number in range(rounds + 1):
            for name, run in subjects.items():
                if run is not None:
                    together.wait()
                    seconds = run()
                    if number:  # the first round warms up
                        found.setdefault((task, name), []).append(seconds)
    answers.put(found)


def measure(cores: int, rounds: int) -> list[Rounds]:
    """What each core's process found."""
    context = multiprocessing.get_context("spawn")
    together, answers = context.Barrier(cores), context.Queue()
    chosen = sorted(os.sched_getaffinity(0))[-cores:]
    processes = [context.Process(target=on_core, args=(core, rounds, together, answers)) for core in chosen]
    for process in processes:
        process.start()
    found: list[Rounds] = []
    while len(found) < cores:
        try:
            found.append(answers.get(timeout=1))
        except queue.Empty:
            if any(process.exitcode for process in processes):
                together.abort()
                raise SystemExit("a process of the benchmark failed; it has said why") from None
    for process in processes:
        process.join()
    return found


def table(found: list[Rounds], rounds: int) -> list[dict[str, Any]]:
    """One row for each subject of each task; ratios are to the plain trial, where there is one, else to the last."""
    cores, rows = len(found), []
    trials = {f"{task} {width}-{width}": number for task, width, number in TASKS} | dict(PRESETS)
    median = {
        key: [statistics.fmean(statistics.median(one[kind] for one in each[key]) for each in found) for kind in (0, 1)]
        for key in found[0]
    }
    for task, name in median:
        subjects = [subject for label, subject in median if label == task]
        cpu, wall = median[task, name]
        beside = "plain" if "plain" in subjects else subjects[-1]
        floors = [median[task, floor][0] for floor in (PHYSICS, PRODUCTS) if floor in subjects]
        others = [median[task, one][0] for one in subjects if not one.startswith(("engine", "floor"))]
        values = [seconds for each in found for seconds, _ in each[task, name]]
        rows.append(
            {
                "task": task,
                "subject": name,
                "metric": f"env steps per second, {cores} core{'s' if cores > 1 else ''}",
                "value": round(cores / cpu, 1),
                "unit": "1/s",
                "wall": round(cores / wall, 1),
                "beside": beside,
                "ratio": round(median[task, beside][0] / cpu, 2),
                "ratio_to_fastest_peer": round(min(others) / cpu, 2) if others else None,
                "ratio_to_floor": round(cpu / sum(floors), 3) if floors and name != HALVED else None,
                "ratio_to_physics": round(cpu / floors[0], 3) if floors else None,
                "microseconds": round(cpu * 1e6, 2),
                "spread": round((max(values) - min(values)) / cpu, 3),
                "trials": trials[task] if name.startswith("engine") else 1,
                "cores": cores,
                "rounds": rounds,
                "differs": DIFFERENCES[name],
            }
        )
    return rows


def main() -> None:
    """Measure, print the table, write benchmarks/results/engine.json."""
    parser = make_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="alternating rounds after the one that warms up")
    parser.add_argument("--cores", type=int, nargs="+", default=[1, 2], help="how many at the same time")
    arguments = parser.parse_args()
    rounds = 1 if arguments.quick else arguments.rounds
    numbers = [min(arguments.cores)] if arguments.quick else arguments.cores
    rows = [row for cores in numbers for row in table(measure(cores, rounds), rounds)]
    (results_folder(arguments.quick) / "engine.json").write_text(json.dumps(rows, indent=1) + "\n")
    shown = (
        *("task", "subject", "cores", "value", "wall", "microseconds", "ratio", "ratio_to_fastest_peer"),
        *("ratio_to_physics", "ratio_to_floor", "spread"),
    )
    title = f"Medians of {rounds} alternating rounds; value in env steps/s, floor = physics + matrix products"
    say_rows([{key: str(row[key]) for key in shown} for row in rows], title=title)


if __name__ == "__main__":
    main()
