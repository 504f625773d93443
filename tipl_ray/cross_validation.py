"""Cross-validation over trials: every trial is a test trial once, of a model that was trained without it.

    <storage>/cross_validations/<digest>/    summary.csv, comparisons.csv, groups.csv, trials.csv, skill.png

Five test trials say little about another five. Here the figures rest on all trials of the data set, and their intervals
resample these. They are intervals for the mean over trials; the mean of another collection of as many trials lies in an
interval that is wider by the square root of 2. `benchmarks/coverage.py` counts how often both hold.
"""

import contextlib
import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from tipl_ray.config import Experiment
from tipl_ray.data.storage import join, last_name, write_file
from tipl_ray.digest import digest
from tipl_ray.drawing import png
from tipl_ray.evaluate import figures, metrics, report
from tipl_ray.evaluate.evaluation import Evaluation, evaluate
from tipl_ray.evaluate.metrics import Table
from tipl_ray.jobs import check_job, exit_status
from tipl_ray.pages import as_csv
from tipl_ray.predict.models import load_about
from tipl_ray.stages import STAGES, Context, train_missing, trained_models
from tipl_ray.terminal import ProgressView, duration, say, say_whole
from tipl_ray.tracking import ui_command

FOLDS = 10
"""Number of folds where none is given."""
ORDER = ("all", "phase", "third")
"""Groups of windows, in the order of the tables."""


def folds_of(experiment: Experiment) -> list[Experiment]:
    """The experiment once for each fold. Raises ValueError for more folds than trials."""
    folds = experiment.split.folds or min(FOLDS, experiment.collect.num_trials)
    return [
        dataclasses.replace(experiment, split=dataclasses.replace(experiment.split, folds=folds, fold=fold)).check(
            "cross_validate"
        )
        for fold in range(folds)
    ]


def run_cross_validation(experiment: Experiment) -> None:
    """Train and evaluate on every fold, then summarise all of their test trials; the whole of a job.

    Exits with status 1 and one line on standard error for what the user can mend, 130 when interrupted.
    """
    with exit_status():
        check_job(experiment)
        begin, found, trained_on = time.monotonic(), [], experiment.collect.task
        parts = folds_of(experiment)
        for fold in parts:
            say(f"cross_validate: fold {fold.split.fold + 1} of {len(parts)}")
            with contextlib.ExitStack() as until_the_end:
                context = Context(fold, until_the_end)
                STAGES["train"].check(context)
                train_missing(context)  # of a fold the storage remembers nothing: its split is this job's own
                context.connect()
                found.append(_evaluate(fold, trained_models(fold)))
                trained_on = load_about(trained_models(fold)[0]).get("trained_on", trained_on)
        with contextlib.ExitStack() as until_the_end:
            context = Context(experiment, until_the_end)
            key = f"cross-validation-{digest([last_name(one.folder) for one in found])}"
            folder = join(experiment.storage_path, "cross_validations", key.rpartition("-")[2])
            tables = summarise(experiment, [one.results for one in found], trained_on)
            with context.run(f"cross-validate {experiment.preset}", key) as run:
                for row in tables["summary"]:
                    run.log_metrics({f"skill/{row['predictor']}": row["skill"]}, step=row["step"])
                for name, rows in tables.items():
                    write_file(folder, f"{name}.csv", as_csv(rows))
                picture = png(figures.skill_by_step(tables["summary"]))
                run.log_figure(picture, "skill")
                write_file(folder, "skill.png", picture)
            tracker = context.tracker
        answers = report.headline(
            tables["summary"], experiment.evaluate.confidence, tables["comparisons"], tables["groups"]
        )
        for answer in answers:
            say(answer.line)
        say(f"cross_validate: tables in {folder}, {duration(time.monotonic() - begin)}")
        say_whole(f"MLflow: {ui_command(tracker.uri, tracker.experiment_id)}")


def _evaluate(experiment: Experiment, models: Sequence[str]) -> Evaluation:
    with ProgressView() as view:
        return evaluate(
            experiment, models, lambda done, total: view.show([], f"evaluate: {done} of {total} tasks done")
        )


def summarise(experiment: Experiment, results: Sequence[Table], trained_on: str) -> dict[str, list[dict[str, Any]]]:
    """The result tables of all folds as one: summary, comparisons with TIPL, skill by phase and third, and by trial."""
    resampling = metrics.Resampling.of(experiment.evaluate)
    summary, groups, trials, comparisons = [], [], [], []
    ours = _of_predictor(results, "tipl")
    # One predictor at a time: all folds at once are gigabytes.
    for name in sorted({name for one in results for name in dict.fromkeys(one["predictor"])}):
        table = _of_predictor(results, name)
        summary += metrics.summarise(table, resampling, trained_on=trained_on)
        groups += metrics.group_skills(table, resampling)
        trials += metrics.trial_skills(table)
        if name != "tipl":
            both = {column: np.concatenate([ours[column], table[column]]) for column in ours}
            comparisons += metrics.compare(both, "tipl", resampling)
    comparisons.sort(
        key=lambda row: (ORDER.index(row["group"]), row["task"], row["step"], row["value"], row["against"])
    )
    groups.sort(key=lambda row: ORDER.index(row["group"]))
    return {"summary": summary, "comparisons": comparisons, "groups": groups, "trials": trials}


def _of_predictor(results: Sequence[Table], name: str) -> Table:
    return {column: np.concatenate([one[column][one["predictor"] == name] for one in results]) for column in results[0]}
