"""The Temporal SVD of one trajectory beside numpy's SVD: time, accuracy, and the memory of a whole trial's reduction.

Time and accuracy: the leading singular values and both sides' singular vectors of every n-th snapshot and weight of a
trial, by `fit_basis` and by `numpy.linalg.svd`, in alternating rounds on one core; medians of the seconds that the
processor spent. Singular values are compared with numpy's in float64. Memory: a process that reduces the whole trial to
tokens as training does, read from the store.

    python benchmarks/reduction.py --storage storage/half_cheetah --trial 1 [--every 4] [--rounds 3]
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

for threads in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
    os.environ[threads] = "1"  # read when numpy is imported

import numpy as np  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from command import make_parser, results_folder  # noqa: E402
from machine import peak_bytes  # noqa: E402

from tipl_ray.data.trajectory_store import TrajectoryStore  # noqa: E402
from tipl_ray.paper.temporal_svd import fit_basis  # noqa: E402
from tipl_ray.terminal import say_rows  # noqa: E402

RANK = 64


def seconds_of(function: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of one call, of this thread alone, and what it gave: other work on the machine is not counted."""
    begin = time.thread_time()
    result = function()
    return time.thread_time() - begin, result


def reduce_and_tell(storage: str, seed: int) -> None:
    """What the process runs whose memory is told: tokens of a whole trial."""
    from tipl_ray.config import Basis
    from tipl_ray.paper.representation import TrialTokens
    from tipl_ray.predict.gram import Question

    question = Question(context=20, steps=(1,), snapshots_per_iteration=5)
    before = peak_bytes()
    begin = time.process_time()
    tokens = TrialTokens(Basis(rank=RANK)).read(storage, seed, question)
    told = {"seconds": time.process_time() - begin, "before": before, "peak": peak_bytes()}
    print(json.dumps({**told, "snapshots": tokens.coordinates_NTD.shape[1]}))


def collect_a_trial(seed: int) -> str:
    """A trial of a quick run, as long as its rank needs; the storage."""
    from tipl_ray.collect.group import GroupCollector
    from tipl_ray.experiments import load_experiment
    from tipl_ray.ppo.engines import choose_engine

    experiment = load_experiment(ROOT / "jobs" / "experiments" / "half_cheetah.toml")
    collect = dataclasses.replace(
        experiment.collect, num_trials=1, first_seed=seed, total_env_steps=64 * 2048, policy_hidden=(64, 64)
    )
    experiment = dataclasses.replace(experiment, collect=collect).at(str(results_folder(quick=True) / "trial"))
    collector = GroupCollector(experiment, choose_engine("auto", experiment.ppo), [seed])
    while not collector.advance(0.001, to_commit=True).finished:
        pass
    return experiment.storage_path


def main() -> None:
    """Measure, print the table, write benchmarks/results/reduction.json."""
    parser = make_parser(__doc__)
    parser.add_argument("--storage", help="data set of a wide task, such as storage/half_cheetah; --quick makes one")
    parser.add_argument("--trial", type=int, default=1, help="seed of the trial")
    parser.add_argument("--every", type=int, default=4, help="n: every n-th snapshot and weight is decomposed")
    parser.add_argument("--rounds", type=int, default=3, help="alternating rounds")
    parser.add_argument("--tell", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.tell:
        reduce_and_tell(arguments.storage, arguments.trial)
        return
    if arguments.quick:
        arguments.storage, arguments.rounds = collect_a_trial(arguments.trial), 1
    if arguments.storage is None:
        parser.error("--storage is missing: the data set whose trial is reduced")
    command = [sys.executable, __file__, "--storage", arguments.storage, "--trial", str(arguments.trial), "--tell"]
    whole = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    stored = TrajectoryStore(arguments.storage).weights(arguments.trial)
    weights_TP = np.concatenate(
        [stored[start : start + 1][:, :: arguments.every] for start in range(0, stored.shape[0], arguments.every)]
    )
    times: dict[str, list[float]] = {"fit_basis": [], "numpy": []}
    for _ in range(arguments.rounds):
        seconds, fitted = seconds_of(lambda: fit_basis(weights_TP, RANK))
        times["fit_basis"].append(seconds)
        times["numpy"].append(seconds_of(lambda: np.linalg.svd(weights_TP, full_matrices=False))[0])
    exact_D = np.linalg.svd(weights_TP.astype(np.float64), compute_uv=False)[:RANK]
    apart = float(np.max(np.abs(fitted.singular_values_D - exact_D) / exact_D))
    medians = {name: statistics.median(values) for name, values in times.items()}
    rows = {
        "decomposed": f"{weights_TP.shape[0]} x {weights_TP.shape[1]} float32",
        "fit_basis, rank 64, seconds": round(medians["fit_basis"], 2),
        "numpy.linalg.svd, seconds": round(medians["numpy"], 2),
        "times faster": round(medians["numpy"] / medians["fit_basis"], 1),
        "largest relative error of the leading 64 singular values": float(f"{apart:.2g}"),
        "sigma_64 / sigma_1": float(f"{exact_D[-1] / exact_D[0]:.2g}"),
        "whole trial": "{} x {} float32, {:.2f} GB".format(*stored.shape, 4 * np.prod(stored.shape) / 1e9),
        "whole trial to tokens, seconds of CPU": round(whole["seconds"], 1),
        "peak memory of that process, MB": round(whole["peak"] / 1e6),
        "of it before the reduction, MB": round(whole["before"] / 1e6),
    }
    (results_folder(arguments.quick) / "reduction.json").write_text(json.dumps(rows, indent=1) + "\n")
    title = f"One core, medians of {arguments.rounds} alternating rounds"
    say_rows([{"": name, "found": str(value)} for name, value in rows.items()], title=title)


if __name__ == "__main__":
    main()
