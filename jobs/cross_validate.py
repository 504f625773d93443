"""Train and evaluate once per fold of the trials, so that every trial is a test trial once.

    python jobs/cross_validate.py --preset causal \\
        --experiment jobs/experiments/inverted_pendulum.toml
    python jobs/cross_validate.py --split.folds 5 --evaluate.run-policies-of
    ray job submit --working-dir . -- python jobs/cross_validate.py \\
        --storage s3://bucket/demo --tracking.uri http://mlflow:5000

jobs/evaluate.py reports the skill of TIPL and the baselines on the last few trials only; here the figures cover all
trials. Needs the trials that jobs/collect.py has put into the storage. Running the same command again continues where
it stopped.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tipl_ray.command_line import parse_arguments


def main() -> None:
    """Read the experiment, then load what runs it: --help is instant."""
    experiment = parse_arguments(__doc__, jobs=["cross_validate"])
    from tipl_ray.cross_validation import run_cross_validation

    run_cross_validation(experiment)


if __name__ == "__main__":
    main()
