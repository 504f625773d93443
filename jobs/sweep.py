"""Sweep: train the experiment with many values of some fields, with Ray Tune, and compare the runs in MLflow.

    python jobs/sweep.py --experiment jobs/experiments/demo.toml
    python jobs/sweep.py --preset paper --over basis.rank=8,16,32 \\
        --over model.context=10,20,40
    python jobs/sweep.py --over "train.learning_rate=log(1e-4,1e-2)" \\
        --over model.layers=1,2,3 --sweep.search optuna
    ray job submit --working-dir . -- python jobs/sweep.py \\
        --experiment jobs/experiments/demo.toml \\
        --storage s3://bucket/demo --tracking.uri http://mlflow:5000

Each run trains TIPL on the trials that jobs/collect.py has put into the storage. Runs are compared by their skill on
the validation trials. Running the same command again continues where it stopped.

--over FIELD=VALUES   a field of basis, model or train and its values, or a range, log(LOW,HIGH) or uniform(LOW,HIGH),
                      with --sweep.search optuna; repeat it for each field; it replaces the experiment's sweep.over
"""

import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tipl_ray.command_line import parse_arguments, refused, take_option
from tipl_ray.sweep.space import make_space, parse_over
from tipl_ray.terminal import waiting


def main() -> None:
    """Read the experiment, then load what runs it: --help is instant."""
    arguments, given = sys.argv[1:], []
    with refused():
        while (value := take_option(arguments, "--over")) is not None:
            given.append(value)
        over = parse_over(given)
    experiment = parse_arguments(__doc__, arguments, jobs=["sweep"])
    with refused():
        if over:
            experiment = dataclasses.replace(experiment, sweep=dataclasses.replace(experiment.sweep, over=over))
        make_space(experiment)
    from tipl_ray.jobs import exit_status

    with exit_status():
        with waiting("sweep: starting"):
            from tipl_ray.sweep.tune import run_sweep

        run_sweep(experiment)


if __name__ == "__main__":
    main()
