"""Sweep: train the experiment many times over values of some fields, with Ray Tune, and compare them in MLflow.

    python jobs/sweep.py --experiment jobs/experiments/demo.toml
    python jobs/sweep.py --preset paper --over basis.rank=8,16,32 --over model.context=10,20,40
    python jobs/sweep.py --over "train.learning_rate=log(1e-4,1e-2)" --over model.layers=1,2,3 --sweep.search optuna
    ray job submit --working-dir . -- python jobs/sweep.py --experiment jobs/experiments/demo.toml

--over FIELD=VALUES   a field of basis, model or train and its values, or log(LOW,HIGH) or uniform(LOW,HIGH) with
                      --sweep.search optuna; once per field; given, it replaces the experiment's sweep.over

The trials are those that jobs/collect.py left in the storage. The same command again goes on where it stopped, or says
that all is done.
"""

import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tipl_ray.config import parse_arguments, take_option
from tipl_ray.search_space import parse_over


def main() -> None:
    """Read the experiment, then load what runs it: --help is instant."""
    arguments, over = sys.argv[1:], []
    while (value := take_option(arguments, "--over")) is not None:
        over.append(value)
    experiment = parse_arguments(__doc__, arguments)
    from tipl_ray.jobs import exit_status

    with exit_status():
        if over:
            sweep = dataclasses.replace(experiment.sweep, over=parse_over(over))
            experiment = dataclasses.replace(experiment, sweep=sweep)
        from tipl_ray.sweep import run_sweep

        run_sweep(experiment)


if __name__ == "__main__":
    main()
