"""What the data set costs: bytes on disk, write and read rates of one core, a commit's time, peak memory.

Weights are a random walk of small steps, as an optimiser takes them. Beside the store stand a plain Parquet file as
pyarrow writes it when it is told nothing, and a floor: the raw bytes in a file, synced, and read back from memory. The
subjects alternate, so that a noisy machine is noisy for all; the table shows medians.

    python benchmarks/store.py [--rounds 5] [--folder FOLDER] [--parts store actor] [--actor-steps 500000]
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from command import keep, make_parser, results_folder, use_one_core  # noqa: E402
from machine import peak_bytes, resident_bytes  # noqa: E402

from tipl_ray.config import Collect  # noqa: E402
from tipl_ray.data.snapshots import Header, Snapshot  # noqa: E402
from tipl_ray.data.trajectory_store import TrajectoryStore  # noqa: E402
from tipl_ray.data.trial_writer import TrialWriter  # noqa: E402
from tipl_ray.terminal import say_rows  # noqa: E402

TASKS = (("InvertedPendulum-v4 8-8", 122, 4, 4000), ("HalfCheetah-v4 256-256", 71_948, 17, 200))
"""Task, policy weights P, observation entries O, snapshots measured."""
PER_COMMIT = 5 * Collect().iterations_per_commit
"""Snapshots of one commit, by the defaults."""
LONG, SHORT = 24, 4
"""Commits of the long and the short trial between which a writer's memory is compared."""


def snapshots(num_weights: int, num_observations: int, number: int) -> Iterator[Snapshot]:
    """A trial of random steps, float32 as the optimiser leaves them."""
    random = np.random.default_rng(0)
    weights = random.normal(0, 0.1, num_weights).astype(np.float32)
    for index in range(number):
        yield Snapshot(
            seed=1,
            snapshot=index,
            iteration=(index + 4) // 5,
            epoch=2 * (index % 5),
            env_step=2048 * index,
            learning_rate=3e-4,
            episodic_return=float(random.normal()),
            weights=weights,
            observation_mean=random.normal(size=num_observations),
            observation_variance=random.random(num_observations),
            observation_count=float(index),
        )
        weights = weights + random.normal(0, 1e-3, num_weights).astype(np.float32)


def resume_state(num_weights: int) -> dict[str, np.ndarray]:
    """Weights and Adam's two moments: most of what a trial needs to go on."""
    random = np.random.default_rng(1)
    return {name: random.normal(size=num_weights).astype(np.float32) for name in ("weights", "first", "second")}


def make_header(task: str, num_weights: int) -> Header:
    """Header of weights in one piece."""
    versions = {"mujoco": "4.0.0", "gymnasium": "1.4.0", "torch": "2.13.0", "numpy": np.__version__}
    return Header(task=task, layout=(("weights", (num_weights,), 0),), config={}, versions=versions)


def write_trial(root: Path, task: str, trial: list[Snapshot], state: dict[str, np.ndarray]) -> list[float]:
    """Seconds of each commit, with the appends before it."""
    writer, seconds = TrialWriter(TrajectoryStore(str(root)), 1, make_header(task, trial[0].weights.size)), []
    for first in range(0, len(trial), PER_COMMIT):
        begin = time.perf_counter()
        for snapshot in trial[first : first + PER_COMMIT]:
            writer.append(snapshot)
        writer.commit(state)
        seconds.append(time.perf_counter() - begin)
    return seconds


def write_raw(path: Path, content: memoryview) -> None:
    """The floor of writing: bytes into a file, synced."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def write_plain(path: Path, weights_TP: np.ndarray) -> None:
    """A Parquet file as pyarrow writes it when told nothing, synced."""
    column = pa.FixedSizeListArray.from_arrays(pa.array(weights_TP.reshape(-1)), weights_TP.shape[1])
    pq.write_table(pa.table({"weights": column}), path)
    with path.open("rb") as file:
        os.fsync(file.fileno())


def read_plain(path: Path, num_weights: int) -> np.ndarray:
    """All weights of such a file; (T, P)."""
    column = pq.read_table(path, partitioning=None)["weights"].combine_chunks()
    return column.flatten().to_numpy().reshape(-1, num_weights)


def peak_memory(task: str, num_weights: int, num_observations: int, num_commits: int) -> float:
    """Peak resident bytes of a process that writes a trial of so many commits."""
    arguments = [task, num_weights, num_observations, num_commits]
    command = [sys.executable, __file__, "--write", json.dumps(arguments)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def write_and_tell_memory(task: str, num_weights: int, num_observations: int, num_commits: int) -> None:
    """What `peak_memory` runs."""
    with tempfile.TemporaryDirectory() as folder:
        writer = TrialWriter(TrajectoryStore(folder), 1, make_header(task, num_weights))
        for index, snapshot in enumerate(snapshots(num_weights, num_observations, num_commits * PER_COMMIT), 1):
            writer.append(snapshot)
            if index % PER_COMMIT == 0:
                writer.commit(resume_state(num_weights))
    print(peak_bytes())


def seconds_of(function: Callable[..., object], *arguments: object) -> float:
    """Seconds of one call."""
    begin = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - begin


def rates(folder: Path, task: str, num_weights: int, num_observations: int, number: int, rounds: int) -> Iterator[dict]:
    """Rows on size, rates and commits of one task."""
    trial = list(snapshots(num_weights, num_observations, number))
    weights_TP, state = np.stack([snapshot.weights for snapshot in trial]), resume_state(num_weights)
    piece = weights_TP[:PER_COMMIT]
    committed = memoryview(piece.tobytes() + b"".join(array.tobytes() for array in state.values()))
    subjects = ("store", "plain", "floor")
    commits, writes, reads = ({name: list[float]() for name in subjects} for _ in range(3))
    sizes = {"floor": float(weights_TP.nbytes)}

    for number_of_round in range(rounds + 1):
        with tempfile.TemporaryDirectory(dir=folder) as name:
            root, plain, raw = Path(name, "store"), Path(name, "plain.parquet"), Path(name, "raw")
            seconds = write_trial(root, task, trial, state)
            commits["store"].append(statistics.median(seconds))
            writes["store"].append(sum(seconds))
            commits["plain"].append(seconds_of(write_plain, plain, piece))
            commits["floor"].append(seconds_of(write_raw, raw, committed))
            writes["plain"].append(seconds_of(write_plain, plain, weights_TP))
            writes["floor"].append(seconds_of(write_raw, raw, weights_TP.data.cast("B")))
            reads["store"].append(seconds_of(TrajectoryStore(str(root)).trajectory, 1, ["weights"]))
            reads["plain"].append(seconds_of(read_plain, plain, num_weights))
            reads["floor"].append(seconds_of(np.fromfile, raw, np.float32))
            sizes["store"] = float(TrajectoryStore(str(root)).progress(1).num_bytes)
            sizes["plain"] = float(plain.stat().st_size)
        if number_of_round == 0:  # the first round warms up
            for times in (commits, writes, reads):
                for values in times.values():
                    values.clear()
    ratios = {name: size / sizes["floor"] for name, size in sizes.items()}
    yield from rows(task, "bytes on disk per raw byte", "1", ratios)
    for metric, times in (("write, one core", writes), ("read, one core", reads)):
        megabytes = {name: weights_TP.nbytes / 1e6 / statistics.median(values) for name, values in times.items()}
        yield from rows(task, metric, "MB/s", megabytes)
    milliseconds = {name: 1e3 * statistics.median(values) for name, values in commits.items()}
    yield from rows(task, f"one commit of {PER_COMMIT} snapshots", "ms", milliseconds)


def rows(task: str, metric: str, unit: str, values: dict[str, float]) -> Iterator[dict]:
    """One row per subject; ratios are values over the plain file's and over the floor's."""
    names = {"store": "store", "plain": "plain Parquet", "floor": "floor: raw bytes"}
    for name, value in sorted(values.items(), key=lambda item: list(names).index(item[0])):
        yield {
            "task": task,
            "subject": names[name],
            "metric": metric,
            "value": round(value, 3),
            "unit": unit,
            "ratio_to_plain": round(value / values["plain"], 3),
            "ratio_to_floor": round(value / values["floor"], 3),
        }


def memory(task: str, num_weights: int, num_observations: int, long: int) -> Iterator[dict]:
    """Rows on a writer's memory; the floor is a process that commits only a little, so a ratio of 1 is no growth."""
    short = min(SHORT, long - 1)
    floor = peak_memory(task, num_weights, num_observations, short)
    for num_commits in (short, long):
        value = floor if num_commits == short else peak_memory(task, num_weights, num_observations, num_commits)
        yield {
            "task": task,
            "subject": f"a process of {num_commits} commits ({num_commits * PER_COMMIT:,} snapshots)",
            "metric": "peak memory of a writer",
            "value": round(value / 1e6, 1),
            "unit": "MB",
            "ratio_to_plain": None,
            "ratio_to_floor": round(value / floor, 3),
        }


def actor_memory(env_steps: int) -> Iterator[dict]:
    """Rows on an actor's memory at its first, middle and last commit; the floor is the first."""
    command = [sys.executable, __file__, "--collect", str(env_steps)]
    told = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    for metric, commits in told.items():
        for number in (1, len(commits) // 2, len(commits)):
            snapshots, value = commits[number - 1]
            yield {
                "task": "HalfCheetah-v4 256-256",
                "subject": f"an actor of 2 trials of {env_steps:,} steps at commit {number} ({snapshots:,} snapshots)",
                "metric": f"{metric} memory of an actor",
                "value": round(value / 1e6, 1),
                "unit": "MB",
                "ratio_to_plain": None,
                "ratio_to_floor": round(value / commits[0][1], 3),
            }


def collect_and_tell_memory(env_steps: int) -> None:
    """What `actor_memory` runs: two trials to their end, and (snapshots of each, bytes) at every commit."""
    from tipl_ray.collect.group import GroupCollector
    from tipl_ray.experiments import load_experiment
    from tipl_ray.ppo.engines import choose_engine

    experiment = load_experiment(ROOT / "jobs" / "experiments" / "half_cheetah.toml")
    told: dict[str, list[tuple[int, int]]] = {"resident": [], "peak": []}
    with tempfile.TemporaryDirectory() as folder:
        collect = dataclasses.replace(experiment.collect, total_env_steps=env_steps)
        experiment = dataclasses.replace(experiment, collect=collect).at(folder)
        collector = GroupCollector(experiment, choose_engine("auto", experiment.ppo), [1, 2])
        snapshots = 0
        while snapshots < experiment.num_snapshots:
            collector.advance(0.001, to_commit=True)
            snapshots = TrajectoryStore(folder).progress(2).num_snapshots
            told["resident"].append((snapshots, resident_bytes()))
            told["peak"].append((snapshots, peak_bytes()))
    print(json.dumps(told))


def main() -> None:
    """Measure, print the table, write benchmarks/results/store.json."""
    parser = make_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="alternating rounds after the one that warms up")
    parser.add_argument(
        "--folder", type=Path, default=ROOT / "benchmarks", help="where to write, on the disk to measure"
    )
    parser.add_argument("--parts", nargs="+", default=["store", "actor"], help="what to measure: `store`, `actor`")
    parser.add_argument("--actor-steps", type=int, default=500_000, help="environment steps of an actor's trials")
    parser.add_argument("--write", help=argparse.SUPPRESS)
    parser.add_argument("--collect", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    use_one_core(arguments.quick)
    pa.set_cpu_count(1)
    if arguments.write:
        write_and_tell_memory(*json.loads(arguments.write))
        return
    if arguments.collect:
        collect_and_tell_memory(arguments.collect)
        return
    if arguments.quick:
        arguments.rounds, arguments.actor_steps = 1, 8192
    target = results_folder(arguments.quick) / "store.json"
    measured = json.loads(target.read_text()) if target.exists() else []
    of_actor = [row for row in measured if "actor" in row["metric"]]
    of_store = [row for row in measured if row not in of_actor]
    if "store" in arguments.parts:
        of_store = []
        for task, num_weights, num_observations, number in TASKS:
            number = PER_COMMIT if arguments.quick else number
            of_store += rates(arguments.folder, task, num_weights, num_observations, number, arguments.rounds)
            of_store += memory(task, num_weights, num_observations, 2 if arguments.quick else LONG)
    if "actor" in arguments.parts:
        of_actor = list(actor_memory(arguments.actor_steps))
    measured = of_store + of_actor
    keep(target, measured)
    shown = [{key: "" if value is None else str(value) for key, value in row.items()} for row in measured]
    title = f"One core, medians of {arguments.rounds} alternating rounds; raw = float32 weights"
    say_rows(shown, title=title)


if __name__ == "__main__":
    main()
