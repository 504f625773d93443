"""How far one predictor is ahead of another, trial by trial: the differences that docs/results.md states.

Both files are trials.csv of jobs/cross_validate.py on the same trials; the same file twice compares two of its
predictors. The difference is one of skill over all trials, its interval resamples trials, and `ahead` counts them.

    python docs/paired.py storage/inverted_pendulum/cross_validations/5f6186fee5b39d08/trials.csv \\
        storage/inverted_pendulum/cross_validations/32327c155fafeff3/trials.csv
    python docs/paired.py TRIALS_CSV TRIALS_CSV --predictors tipl ridge
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.csv

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tipl_ray.evaluate.metrics import Resampling  # noqa: E402
from tipl_ray.terminal import say_rows  # noqa: E402

Trials = dict[tuple[int, int], dict[str, Any]]
"""Rows of one predictor by forward step and trial."""


def read(path: Path, predictor: str) -> Trials:
    """One predictor's rows. Raises SystemExit if there are none."""
    rows = [row for row in pyarrow.csv.read_csv(path).to_pylist() if row["predictor"] == predictor]
    if not rows:
        raise SystemExit(f"error: {path} has no predictor {predictor!r}")
    return {(row["step"], row["trial"]): row for row in rows}


def differences(first: Trials, second: Trials) -> list[dict[str, str]]:
    """One row per forward step that both have. Raises SystemExit if their trials or windows differ."""
    rows, resampling = [], Resampling(confidence=0.95, bootstrap=10_000, seed=0)
    for step in sorted({step for step, _ in first} & {step for step, _ in second}):
        trials = [trial for other, trial in first if other == step]
        mine, others = ([table.get((step, trial), {}) for trial in trials] for table in (first, second))
        if [row.get("windows") for row in mine] != [row.get("windows") for row in others]:
            raise SystemExit(f"error: h = {step}: the two are not of the same windows of the same trials")
        sums_3N = np.array(
            [
                [row["squared_error"] for row in mine],
                [row["squared_error"] for row in others],
                [row["displacement_squared"] for row in mine],
            ]
        )
        left_R, right_R, moved_R = resampling.resample(sums_3N, statistic=lambda runs: runs.sum(axis=-1))
        low, high = resampling.ends((right_R - left_R) / moved_R, len(trials))
        left, right, moved = sums_3N.sum(axis=1)
        rows.append(
            {
                "h": str(step),
                "difference in skill": f"{(right - left) / moved:.3f}",
                "95% interval": f"[{low:.3f}, {high:.3f}]",
                "ahead": f"{int((sums_3N[0] < sums_3N[1]).sum())} of {len(trials)} trials",
            }
        )
    return rows


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs=2, metavar="TRIALS_CSV")
    parser.add_argument("--predictors", nargs=2, default=["tipl", "tipl"], help="one for each file (default: tipl)")
    arguments = parser.parse_args()
    say_rows(differences(*(read(*pair) for pair in zip(arguments.files, arguments.predictors, strict=True))))


if __name__ == "__main__":
    main()
