"""Learn jumps: TIPL trained on forks to say which change of a rule's jump is followed by higher returns.

    python jobs/learn_jumps.py
    python jobs/learn_jumps.py --improve.models 1 --improve.model-steps 200
    ray job submit --working-dir . -- python jobs/learn_jumps.py \\
        --storage s3://bucket/improve --tracking.uri http://mlflow:5000

Reads the forks that jobs/fork.py left in the storage, trains models that see more or less of them, and prints how well
each ranks the branches of trials that none was trained on. The same command again goes on where it stopped.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tipl_ray.command_line import parse_arguments


def main() -> None:
    """Read the experiment, then load what runs it: --help is instant."""
    experiment = parse_arguments(__doc__, jobs=["learn_jumps"], experiment="improve")
    from tipl_ray.improve.gain_job import run_learning

    run_learning(experiment)


if __name__ == "__main__":
    main()
