"""Does a longer or an older context allow better forecasts? The upper bound of the skill, by the displacements known.

The bound is the skill of the true future, projected onto the known displacements: no combination of them is better.
Known are the last 5, 10, 20, 40 and 80 displacements, or older ones alone, the 21st to 40th and 41st to 80th last. As
many random directions in P weights would have a bound of their number / P, the last column.

    python benchmarks/context_bound.py storage/inverted_pendulum storage/half_cheetah [--trials 5]

Takes the last trials of each storage, and every 7th window. Writes docs/results/context_bound.csv.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from command import make_parser, publish_table, use_one_core  # noqa: E402

from tipl_ray.data.rows import Rows  # noqa: E402
from tipl_ray.data.trajectory_store import TrajectoryStore  # noqa: E402
from tipl_ray.evaluate.metrics import Resampling  # noqa: E402
from tipl_ray.predict.gram import future_sums, make_band, squared_errors  # noqa: E402
from tipl_ray.terminal import say, say_rows  # noqa: E402

STEPS, LONGEST, STRIDE = (1, 5, 10), 80, 7
KNOWN: dict[str, slice] = {
    **{f"last {count}": slice(LONGEST - count, LONGEST) for count in (5, 10, 20, 40, 80)},
    "21st to 40th last": slice(LONGEST - 40, LONGEST - 20),
    "41st to 80th last": slice(LONGEST - 80, LONGEST - 40),
}
"""Sets of known displacements, as parts of a context of LONGEST."""
SMALLEST_EIGENVALUE = 1e-10
"""As a share of the largest: directions below it are rounding."""


def bounds(grams_BNN: NDArray[np.float64], known: slice) -> NDArray[np.float64]:
    """Squared errors (B, H) of the true future's projection onto some of the context's displacements."""
    towards_BHK = future_sums(STEPS) @ grams_BNN[:, LONGEST:, known]
    inverse_BKK = np.linalg.pinv(grams_BNN[:, known, known], rcond=SMALLEST_EIGENVALUE, hermitian=True)
    coefficients_BHK = np.zeros((len(grams_BNN), len(STEPS), LONGEST))
    coefficients_BHK[:, :, known] = towards_BHK @ inverse_BKK
    return squared_errors(grams_BNN, coefficients_BHK, STEPS)


def trial_sums(weights_TP: Rows) -> dict[str, NDArray[np.float64]]:
    """Squared errors of one trial, summed over windows, by what is known; (H,)."""
    band = make_band(weights_TP, LONGEST + max(STEPS))
    starts_B = np.arange(LONGEST, band.num_snapshots - max(STEPS), STRIDE)
    grams_BNN = band.windows(starts_B, LONGEST, max(STEPS))
    still_BHK = np.zeros((len(starts_B), len(STEPS), LONGEST))
    sums = {"nothing": squared_errors(grams_BNN, still_BHK, STEPS).sum(axis=0)}
    return sums | {name: bounds(grams_BNN, known).sum(axis=0) for name, known in KNOWN.items()}


def study(name: str, trajectories: Mapping[int, Rows]) -> list[dict[str, Any]]:
    """One row per set of known displacements and forward step."""
    sums = [trial_sums(weights_TP) for weights_TP in trajectories.values()]
    num_weights = next(iter(trajectories.values())).shape[1]
    resampling, rows = Resampling(confidence=0.95, bootstrap=10_000, seed=0), []
    for known, part in KNOWN.items():
        for column, step in enumerate(STEPS):
            error_N, moved_N = (np.array([one[key][column] for one in sums]) for key in (known, "nothing"))
            low, high = resampling.interval(np.arange(len(sums)), error_N, moved_N)
            rows.append(
                {
                    "task": name,
                    "known": known,
                    "step": step,
                    "bound": round(1 - error_N.sum() / moved_N.sum(), 4),
                    "bound_low": round(1 - high, 4),
                    "bound_high": round(1 - low, 4),
                    "trials": len(sums),
                    "of_random_directions": round((part.stop - part.start) / num_weights, 5),
                }
            )
    say(f"{name}: {len(sums)} trials of {num_weights:,} weights")
    return rows


def main() -> None:
    """Read the trials, and write the table."""
    parser = make_parser(__doc__)
    parser.add_argument("storages", nargs="*", metavar="STORAGE", help="folders or URIs of collected trials")
    parser.add_argument("--trials", type=int, default=5, help="last trials of each that are read (default: 5)")
    arguments = parser.parse_args()
    use_one_core(arguments.quick)
    rows = []
    if arguments.quick:
        walks = {seed: np.random.default_rng(seed).normal(size=(200, 60)).cumsum(axis=0) for seed in range(3)}
        rows = study("random walk", walks)
    elif not arguments.storages:
        parser.error("name at least one storage")
    for place in arguments.storages:
        store = TrajectoryStore(place)
        seeds = store.seeds()[-arguments.trials :]
        rows += study(store.header(seeds).task, {seed: store.weights(seed) for seed in seeds})
    publish_table("context_bound", rows, arguments.quick)
    say_rows([{key: str(value) for key, value in row.items()} for row in rows])


if __name__ == "__main__":
    main()
