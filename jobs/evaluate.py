"""Evaluate: WPE, skill and REPW of the predicted weights on held-out trials; table, figures and report.

    python jobs/evaluate.py --experiment jobs/experiments/demo.toml
    python jobs/evaluate.py --storage storage/hopper
    ray job submit --working-dir . -- python jobs/evaluate.py \\
        --experiment jobs/experiments/demo.toml \\
        --storage s3://bucket/demo --tracking.uri http://mlflow:5000

Without --experiment, the storage says what was collected and trained; without --preset, every preset that was trained
there is judged. The same command again goes on where it stopped, or says that all is done.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tipl_ray.command_line import parse_trained

STAGES = ["evaluate"]


def main() -> None:
    """Read the experiments, then load what runs them: --help is instant."""
    experiments = parse_trained(__doc__, jobs=STAGES)
    from tipl_ray.stages import run_stages

    for experiment in experiments:
        run_stages(experiment, STAGES)


if __name__ == "__main__":
    main()
