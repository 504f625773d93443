"""Fork: continue PPO trials from saved states with many different jumps but the same random numbers.

    python jobs/fork.py
    python jobs/fork.py --improve.tasks Hopper-v4 --improve.stages 3
    ray job submit --working-dir . -- python jobs/fork.py \\
        --storage s3://bucket/improve --tracking.uri http://mlflow:5000

A jump extrapolates the policy's weights at the end of a PPO iteration. The forks show which jumps lead to higher
returns; jobs/learn_jumps.py trains on them. Running the same command again continues where it stopped.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tipl_ray.command_line import parse_arguments
from tipl_ray.terminal import waiting


def main() -> None:
    """Read the experiment, then load what runs it: --help is instant."""
    experiment = parse_arguments(__doc__, jobs=["fork"], experiment="improve")
    with waiting("fork: starting"):
        from tipl_ray.improve.fork_data import run_forks

    run_forks(experiment)


if __name__ == "__main__":
    main()
