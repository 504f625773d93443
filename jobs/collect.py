"""Collect: run seeded PPO trials in parallel on Ray actors and store their policy weights as Parquet.

    python jobs/collect.py --experiment jobs/experiments/demo.toml
    python jobs/collect.py --storage storage/hopper \\
        --collect.task Hopper-v5
    ray job submit --working-dir . -- python jobs/collect.py \\
        --experiment jobs/experiments/demo.toml \\
        --storage s3://bucket/demo --tracking.uri http://mlflow:5000

The output is the data set that TIPL is trained on: one trajectory of snapshots per trial. Running the same command
again continues where it stopped.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tipl_ray.command_line import parse_arguments
from tipl_ray.terminal import waiting

STAGES = ["collect"]


def main() -> None:
    """Read the experiment, then load what runs it: --help is instant."""
    experiment = parse_arguments(__doc__, jobs=STAGES)
    with waiting("collect: starting"):
        from tipl_ray.stages import run_stages

    run_stages(experiment, STAGES)


if __name__ == "__main__":
    main()
