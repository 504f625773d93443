"""Train: turn the collected trials into tokens and train the causal Transformer with Ray Train.

    python jobs/train.py --experiment jobs/experiments/demo.toml
    python jobs/train.py --storage storage/hopper
    ray job submit --working-dir . -- python jobs/train.py \\
        --experiment jobs/experiments/demo.toml \\
        --storage s3://bucket/demo --tracking.uri http://mlflow:5000

The model is TIPL, and its progress is reported as skill on the validation trials. Without --experiment it trains on
what was collected in the storage. Running the same command again continues where it stopped.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tipl_ray.command_line import parse_arguments
from tipl_ray.terminal import waiting

STAGES = ["train"]


def main() -> None:
    """Read the experiment, then load what runs it: --help is instant."""
    experiment = parse_arguments(__doc__, jobs=STAGES)
    with waiting("train: starting"):
        from tipl_ray.stages import run_stages

    run_stages(experiment, STAGES)


if __name__ == "__main__":
    main()
