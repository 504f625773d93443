"""Accelerate: PPO with fewer update epochs and a predictor that jumps to where the others would have led.

    python jobs/accelerate.py
    python jobs/accelerate.py --accelerate.tasks HalfCheetah-v4 --accelerate.contenders 10 4 4+ridge
    ray job submit --working-dir . -- python jobs/accelerate.py --storage /shared/tipl/accelerate

Predictors are fitted on the trials that jobs/collect.py left in another experiment's storage, and TIPL is the model
that jobs/train.py --preset causal left there. The same command again goes on where it stopped, or says that all is
done.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tipl_ray.config import CHECKOUT, parse_arguments


def main() -> None:
    """Read the experiment, then load what runs it: --help is instant."""
    arguments = sys.argv[1:]
    if not any(argument.split("=")[0] == "--experiment" for argument in arguments):
        arguments = ["--experiment", str(CHECKOUT / "jobs" / "experiments" / "accelerate.toml"), *arguments]
    experiment = parse_arguments(__doc__, arguments)
    from tipl_ray.acceleration import run_acceleration

    run_acceleration(experiment)


if __name__ == "__main__":
    main()
