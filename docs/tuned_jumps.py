"""Fewer epochs and jumps under the tuned presets: one table over all of them, and a picture of each.

    tipl accelerate --experiment tuned_half_cheetah --storage storage/tuned/half_cheetah
    tipl accelerate --experiment tuned_walker2d --storage storage/tuned/walker2d
    python docs/tuned_jumps.py storage/tuned

Presets differ in their number of epochs, so variants are named in the table by their share of the preset's own.
Variants with runs that are missing are left out; the presets at their own learning rates are those of
benchmarks/tuned.py. Prints a table with final returns, and writes docs/results/tuned_jumps.csv, in the columns of
opponents.csv and with rows for all presets together, and docs/pictures/tuned_jumps*.png.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
sys.path[:0] = [str(ROOT), str(DOCS)]

from opponents import COLUMNS, tidied  # noqa: E402

from tipl_ray.accelerate import figures, scores  # noqa: E402
from tipl_ray.accelerate.acceleration import Plan, find_predictors, read_finished, source_experiment  # noqa: E402
from tipl_ray.accelerate.scores import Finished  # noqa: E402
from tipl_ray.drawing import png  # noqa: E402
from tipl_ray.evaluate.metrics import Resampling  # noqa: E402
from tipl_ray.experiments import load_experiment  # noqa: E402
from tipl_ray.pages import as_csv  # noqa: E402
from tipl_ray.ppo.engines import choose_engine  # noqa: E402
from tipl_ray.terminal import say, say_rows  # noqa: E402

PRESETS = ("half_cheetah", "walker2d", "hopper")
OWN_RUNS = ROOT / "benchmarks" / "results" / "tuned.json"
"""What benchmarks/tuned.py kept: the presets at their own learning rates, on the same seeds."""


def named(one: Finished, epochs: int) -> Finished:
    """The same results under a name that all presets share: epochs as a percentage of the preset's own."""
    contender = one.unit.contender
    # Two of Hopper's five epochs stand with the others' halves.
    share = {1.0: "100%", 0.5: "50%", 0.4: "50%", 0.2: "20%"}[one.epochs / epochs]
    name = contender.name.replace(str(one.epochs), share, 1)
    return dataclasses.replace(
        one, unit=dataclasses.replace(one.unit, contender=dataclasses.replace(contender, name=name))
    )


def finished(storage: Path) -> list[tuple[Finished, int]]:
    """The results of the presets, as far as their accelerations have run, with the preset's own number of epochs."""
    found: list[tuple[Finished, int]] = []
    for name in PRESETS:
        experiment = load_experiment(f"tuned_{name}").at(str(storage / name)).check("accelerate")
        source = source_experiment(experiment)
        plan = Plan(
            experiment=experiment,
            source=source,
            predictors=find_predictors(experiment, source, experiment.accelerate.running),
            engine=choose_engine(experiment.collect.engine, experiment.ppo),
        )
        results, epochs = read_finished(plan), experiment.ppo.num_epochs
        if not results or results[0].unit.contender.name != str(epochs):
            say(f"{name} is left out: its preset's own runs are not all in {experiment.storage_path}")
            continue
        found += [(one, epochs) for one in (results[0], as_published(name, results[0]), *results[1:])]
    return found


def as_published(name: str, searched: Finished) -> Finished:
    """The preset at its own learning rate, where `searched` has the one that the search chose."""
    kept: dict[str, Any] = json.loads(OWN_RUNS.read_text())
    own = [group for key, group in kept.items() if key.startswith(f"{name}/")]
    curves = [[np.nan if value is None else value for value in curve] for group in own for curve in group["curves"]]
    contender = dataclasses.replace(searched.unit.contender, name=f"{searched.unit.contender.name}, own rate")
    rate = load_experiment(f"tuned_{name}").ppo.learning_rate
    return dataclasses.replace(
        searched,
        unit=dataclasses.replace(searched.unit, contender=contender, value=rate),
        returns_SI=scores.filled(np.array(curves)),
        cpu_seconds=sum(group["seconds"] for group in own),
    )


def table(results: list[Finished], resampling: Resampling) -> list[dict[str, Any]]:
    """Rows by preset, then those over all presets."""
    rows = [{name: row[name] for name in COLUMNS} for row in scores.score(results, "none", resampling)]
    for row in scores.over_tasks(results, resampling):
        shares = {name: row[name] for name in ("share", "share_low", "share_high")}
        known = {"env_steps": rows[0]["env_steps"], "seeds": rows[0]["seeds"], "held_out": False}
        whole = {"task": "all tuned", "contender": row["contender"], **shares, **known}
        rows.append(dict.fromkeys(COLUMNS) | whole | {"gradient_steps": f"{row['share_of_gradient_steps']:.0%}"})
    return tidied(rows)


def main() -> None:
    """Write the table and the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("storage", type=Path, help="where each preset's storage is a folder")
    results = finished(parser.parse_args().storage)
    if not results:
        raise SystemExit("error: none of the presets' accelerations has run to its end")
    resampling = Resampling(confidence=0.95, bootstrap=10_000, seed=0)
    rows = table([named(*result) for result in results], resampling)
    (DOCS / "results" / "tuned_jumps.csv").write_bytes(as_csv(rows))
    say_rows(scores.table(scores.score([one for one, _ in results], "none", resampling)))
    drawn = {}
    for task in dict.fromkeys(one.unit.task for one, _ in results):
        own = [one for one, _ in results if one.unit.task == task]
        curves = {one.unit.contender.name: (one.env_steps_I, one.gradient_steps_I, one.returns_SI) for one in own}
        title = f"{task}, the zoo's preset, {len(own[0].returns_SI)} trials"
        drawn[f"tuned_jumps_{task.removesuffix('-v4')}"] = figures.contenders(curves, title, resampling)
    for name, figure in drawn.items():
        (DOCS / "pictures" / f"{name}.png").write_bytes(png(figure))


if __name__ == "__main__":
    main()
