"""Accelerate: compare variants of PPO that run fewer update epochs, with or without jumps in their place.

    python jobs/accelerate.py
    python jobs/accelerate.py --accelerate.tasks HalfCheetah-v4 \\
        --accelerate.only 4 4+ridge
    ray job submit --working-dir . -- python jobs/accelerate.py \\
        --storage s3://bucket/accelerate --tracking.uri http://mlflow:5000 \\
        --predictors-storage s3://bucket/inverted_pendulum

Variants are compared by the area under their learning curves. A jump replaces an iteration's last update epochs by the
weights that a predictor forecasts from the earlier snapshots. Predictors are fitted on the trials in another
experiment's storage; for TIPL, that is the model trained there by jobs/train.py --preset causal. Running the same
command again continues where it stopped.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tipl_ray.command_line import parse_arguments
from tipl_ray.terminal import waiting


def main() -> None:
    """Read the experiment, then load what runs it: --help is instant."""
    experiment = parse_arguments(__doc__, jobs=["accelerate"], experiment="accelerate")
    with waiting("accelerate: starting"):
        from tipl_ray.accelerate.acceleration import run_acceleration

    run_acceleration(experiment)


if __name__ == "__main__":
    main()
