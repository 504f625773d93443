"""Accelerate: PPO with fewer update epochs and a predictor that jumps to where the others would have led.

    python jobs/accelerate.py
    python jobs/accelerate.py --accelerate.tasks HalfCheetah-v4 \\
        --accelerate.contenders 10 4 4+ridge
    ray job submit --working-dir . -- python jobs/accelerate.py \\
        --storage s3://bucket/accelerate --tracking.uri http://mlflow:5000 \\
        --predictors-storage s3://bucket/inverted_pendulum

Predictors are fitted on the trials that jobs/collect.py left in another experiment's storage, and TIPL is the model
that jobs/train.py --preset causal left there. The same command again goes on where it stopped, or says that all is
done.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tipl_ray.command_line import parse_arguments


def main() -> None:
    """Read the experiment, then load what runs it: --help is instant."""
    experiment = parse_arguments(__doc__, jobs=["accelerate"], experiment="accelerate")
    from tipl_ray.accelerate.acceleration import run_acceleration

    run_acceleration(experiment)


if __name__ == "__main__":
    main()
