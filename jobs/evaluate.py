"""Evaluate: compare predicted with true policy weights on the test trials; result table, figures and report.

    python jobs/evaluate.py --experiment jobs/experiments/demo.toml
    python jobs/evaluate.py --storage storage/hopper
    ray job submit --working-dir . -- python jobs/evaluate.py \\
        --experiment jobs/experiments/demo.toml \\
        --storage s3://bucket/demo --tracking.uri http://mlflow:5000

TIPL is compared with simple baselines by WPE, skill and REPW. Without --experiment, the storage's own is used; without
--preset, every preset that was trained there is evaluated. Running the same command again continues where it stopped.
<storage>/latest links to the newest report.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tipl_ray.command_line import parse_trained
from tipl_ray.terminal import waiting

STAGES = ["evaluate"]


def main() -> None:
    """Read the experiments, then load what runs them: --help is instant."""
    experiments = parse_trained(__doc__, jobs=STAGES)
    with waiting("evaluate: starting"):
        from tipl_ray.stages import run_stages

    for experiment in experiments:
        run_stages(experiment, STAGES)


if __name__ == "__main__":
    main()
