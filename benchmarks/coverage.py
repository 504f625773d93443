"""How often do the intervals hold? Two collections of the same kind, cross-validated, tell.

Each trial of both collections was a test trial once (jobs/cross_validate.py writes trials.csv). From the first, a few
trials are drawn many times, as if only these had been evaluated; their interval should hold the mean of the whole
second collection as often as it says, and so with the roles exchanged. An interval that is wider by the square root of
2 should hold the mean of as few trials of the other collection. Bootstrap percentiles are compared with the expanded
percentiles that all tables use.

    python jobs/collect.py --experiment inverted_pendulum --preset causal --storage storage/first
    python jobs/collect.py --experiment inverted_pendulum --preset causal --storage storage/second \\
        --collect.first-seed 1001
    python jobs/cross_validate.py --storage storage/first --train.num-seeds 1
    python jobs/cross_validate.py --storage storage/second --train.num-seeds 1
    python benchmarks/coverage.py storage/first/cross_validations/*/trials.csv \\
        storage/second/cross_validations/*/trials.csv

Writes docs/results/coverage.csv: the shares of intervals, by either method, that hold the other collection's mean
(mean_percentiles, mean_expanded) and, wider, the mean of as few trials of it (again_percentiles, again_expanded).
"""

import csv
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from command import make_parser, publish_table  # noqa: E402

from tipl_ray.evaluate.metrics import Resampling  # noqa: E402
from tipl_ray.terminal import say_rows  # noqa: E402

PREDICTORS, STEPS = ("tipl", "ridge"), (1, 5, 10)
SIZES = (3, 5, 10, 20, 50)
"""Trials in a draw."""

Array = NDArray[np.float64]


def read_sums(path: Path, predictor: str, step: int) -> Array:
    """Squared errors and squared displacements of each trial; (2, N)."""
    with path.open(newline="") as file:
        own = [row for row in csv.DictReader(file) if row["predictor"] == predictor and int(row["step"]) == step]
    return np.array([[float(row[name]) for row in own] for name in ("squared_error", "displacement_squared")])


def made_up(seed: int) -> Array:
    """Sums of a collection that is not there, for a quick run."""
    random = np.random.default_rng(seed)
    return np.stack([random.gamma(30.0, size=50), np.full(50, 60.0)])


def skill(sums_2N: Array) -> float:
    """1 - squared error / squared displacement over all trials."""
    return float(1 - sums_2N[0].sum() / sums_2N[1].sum())


def count(first_2N: Array, second_2N: Array, size: int, draws: int) -> dict[str, float]:
    """Shares of draws from the first whose intervals hold what the second has."""
    random, resampling = np.random.default_rng(0), Resampling(confidence=0.95, bootstrap=1_000, seed=0)
    held: dict[str, list[bool]] = {}
    for _ in range(draws):
        own_2S, other_2S = (sums[:, random.integers(sums.shape[1], size=size)] for sums in (first_2N, second_2N))
        errors_R, moved_R = resampling.resample(own_2S, statistic=lambda runs: runs.sum(axis=-1))
        middle = skill(own_2S)
        for name, runs in (("percentiles", None), ("expanded", size)):
            low, high = resampling.ends(1 - errors_R / moved_R, runs)
            held.setdefault(f"mean_{name}", []).append(low <= skill(second_2N) <= high)
            wider = middle + np.sqrt(2) * (np.array([low, high]) - middle)
            held.setdefault(f"again_{name}", []).append(bool(wider[0] <= skill(other_2S) <= wider[1]))
    return {name: float(np.mean(values)) for name, values in held.items()}


def rows_of(paths: Sequence[Path], draws: int) -> list[dict[str, Any]]:
    """One row per predictor, forward step and number of trials; both directions averaged."""
    rows = []
    for predictor in PREDICTORS:
        for step in STEPS:
            pair = [read_sums(path, predictor, step) for path in paths] if paths else [made_up(1), made_up(2)]
            for size in SIZES:
                both = [count(first, second, size, draws) for first, second in (pair, pair[::-1])]
                rows.append(
                    {
                        "predictor": predictor,
                        "step": step,
                        "skill_first": round(skill(pair[0]), 4),
                        "skill_second": round(skill(pair[1]), 4),
                        "trials": size,
                        **{name: round(float(np.mean([one[name] for one in both])), 3) for name in both[0]},
                    }
                )
    return rows


def main() -> None:
    """Count, and write the table."""
    parser = make_parser(__doc__)
    parser.add_argument(
        "tables", nargs="*", type=Path, metavar="TRIALS_CSV", help="trials.csv of two cross-validations"
    )
    parser.add_argument("--draws", type=int, default=2_000, help="draws for each row and direction (default: 2000)")
    arguments = parser.parse_args()
    if len(arguments.tables) != (0 if arguments.quick else 2):
        parser.error("two tables are needed, trials.csv of one cross-validation each")
    rows = rows_of(arguments.tables, 20 if arguments.quick else arguments.draws)
    publish_table("coverage", rows, arguments.quick)
    say_rows([{key: str(value) for key, value in row.items()} for row in rows])


if __name__ == "__main__":
    main()
