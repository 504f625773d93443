"""Train: reduce the collected trials by the Temporal SVD and train the causal Transformer with Ray Train.

    python jobs/train.py --experiment jobs/experiments/demo.toml
    python jobs/train.py --storage storage/hopper
    ray job submit --working-dir . -- python jobs/train.py \\
        --experiment jobs/experiments/demo.toml \\
        --storage s3://bucket/demo --tracking.uri http://mlflow:5000

Without --experiment, what was collected in the storage is what is trained on: task, seeds, policy and split need not be
said again. The same command again goes on where it stopped, or says that all is done.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tipl_ray.command_line import parse_arguments

STAGES = ["train"]


def main() -> None:
    """Read the experiment, then load what runs it: --help is instant."""
    experiment = parse_arguments(__doc__, jobs=STAGES)
    from tipl_ray.stages import run_stages

    run_stages(experiment, STAGES)


if __name__ == "__main__":
    main()
