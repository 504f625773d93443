"""Accelerate: PPO with fewer update epochs, in place of which a predictor jumps to where they would have led.

    python jobs/accelerate.py
    python jobs/accelerate.py --accelerate.tasks HalfCheetah-v4 \\
        --accelerate.contenders 10 4 4+ridge
    ray job submit --working-dir . -- python jobs/accelerate.py \\
        --storage s3://bucket/accelerate --tracking.uri http://mlflow:5000 \\
        --predictors-storage s3://bucket/inverted_pendulum

Compares variants of PPO by the area under their learning curves. A jump replaces an iteration's last update epochs by
the weights that a predictor forecasts from the earlier snapshots of the policy's weights. Predictors are fitted on the
trials in another experiment's storage; TIPL (Transformer as Implicit Policy Learner, arXiv 2503.04074) is the model
that jobs/train.py --preset causal has trained there. Running the same command again continues where it stopped. """

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
