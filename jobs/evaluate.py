"""Evaluate: compare predicted with true policy weights on the test trials; result table, figures and report.

    python jobs/evaluate.py --experiment jobs/experiments/demo.toml
    python jobs/evaluate.py --storage storage/hopper
    ray job submit --working-dir . -- python jobs/evaluate.py \\
        --experiment jobs/experiments/demo.toml \\
        --storage s3://bucket/demo --tracking.uri http://mlflow:5000

TIPL (Transformer as Implicit Policy Learner, arXiv 2503.04074) predicts the next snapshots of a policy's weights during
PPO training from the last ones. It is compared with simple baselines by
  WPE    weight prediction error: the mean squared error per weight
  skill  the share of the squared error of copying the last snapshot that is removed: 1 is perfect, 0 is copying
  REPW   return error of the predicted weights: mean absolute difference between the returns of the predicted policy and
         of the true one

Without --experiment, the storage's own is used; without --preset, every preset that was trained there is evaluated.
Running the same command again continues where it stopped. <storage>/latest links to the newest report.
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
