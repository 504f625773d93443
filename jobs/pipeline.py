"""The whole pipeline: collect, train and evaluate, in order, as one MLflow run with a nested run per stage.

    python jobs/pipeline.py --experiment jobs/experiments/demo.toml
    ray job submit --working-dir . -- python jobs/pipeline.py \\
        --experiment jobs/experiments/demo.toml \\
        --storage s3://bucket/demo --tracking.uri http://mlflow:5000

TIPL is trained on the policies' weights during PPO training, and compared with simple baselines by WPE, skill and REPW.
Running the same command again continues where it stopped. <storage>/latest links to the newest report.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tipl_ray.command_line import parse_arguments
from tipl_ray.terminal import waiting

STAGES = ["collect", "train", "evaluate"]


def main() -> None:
    """Read the experiment, then load what runs it: --help is instant."""
    experiment = parse_arguments(__doc__, jobs=STAGES)
    with waiting("pipeline: starting"):
        from tipl_ray.stages import run_stages

    run_stages(experiment, STAGES)


if __name__ == "__main__":
    main()
