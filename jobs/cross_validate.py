"""Train and evaluate once per fold of the trials, so that every trial is a test trial once.

    python jobs/cross_validate.py --experiment jobs/experiments/inverted_pendulum.toml --preset causal
    python jobs/cross_validate.py --split.folds 5 --evaluate.run-policies-of
    ray job submit --working-dir . -- python jobs/cross_validate.py \\
        --storage s3://bucket/demo --tracking.uri http://mlflow:5000

TIPL (Transformer as Implicit Policy Learner) predicts the weights of a policy during training. Its skill is the share
of the squared error of copying the last snapshot that it removes: 1 is perfect, 0 is copying. With the last few trials
as test trials, as jobs/evaluate.py has it, the figures are those of these trials; here they rest on all of them.

Needs the trials that jobs/collect.py has put into the storage. Running the same command again continues where it
stopped.
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
