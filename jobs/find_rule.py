"""Find a rule: tune the few parameters of a jump rule for return, with CMA-ES on Ray Tune.

    python jobs/find_rule.py
    python jobs/find_rule.py --experiment return_rule
    python jobs/find_rule.py --improve.generations 3 --improve.searches 1 \\
        --collect.total-env-steps 50_000
    ray job submit --working-dir . -- python jobs/find_rule.py \\
        --storage s3://bucket/improve --tracking.uri http://mlflow:5000

A jump extrapolates the policy's weights at the end of a PPO iteration. A rule is searched together with the learning
rate that suits it. Prints the rule that each search finds, and their mean, as formulas. Running the same command again
continues where it stopped; once the searches are done, it prints the rules again.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tipl_ray.command_line import parse_arguments
from tipl_ray.terminal import waiting


def main() -> None:
    """Read the experiment, then load what runs it: --help is instant."""
    experiment = parse_arguments(__doc__, jobs=["find_rule"], experiment="improve")
    with waiting("find_rule: starting"):
        from tipl_ray.improve.rule_job import run_rule_searches

    run_rule_searches(experiment)


if __name__ == "__main__":
    main()
