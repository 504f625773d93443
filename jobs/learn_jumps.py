"""Learn jumps: train TIPL on forks to predict which change to a rule's jumps leads to higher returns.

    python jobs/learn_jumps.py
    python jobs/learn_jumps.py --improve.models 1 --improve.model-steps 200
    ray job submit --working-dir . -- python jobs/learn_jumps.py \\
        --storage s3://bucket/improve --tracking.uri http://mlflow:5000

A jump extrapolates the policy's weights at the end of a PPO iteration. Trains models with different inputs on the forks
that jobs/fork.py has stored, and prints how well each ranks the branches at the forks of test trials. Running the same
command again continues where it stopped.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tipl_ray.command_line import parse_arguments
from tipl_ray.terminal import waiting


def main() -> None:
    """Read the experiment, then load what runs it: --help is instant."""
    experiment = parse_arguments(__doc__, jobs=["learn_jumps"], experiment="improve")
    with waiting("learn_jumps: starting"):
        from tipl_ray.improve.gain_job import run_learning

    run_learning(experiment)


if __name__ == "__main__":
    main()
