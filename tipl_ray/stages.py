"""The jobs' stages in order: collect, train, evaluate; each found done, gone on with, or run from the start.

Here everything meets: a stage runs on the Ray cluster, tells the terminal how far it is, leaves its work in the storage
and logs it to MLflow. What is computed, and how, is in the files below.
"""

import contextlib
import dataclasses
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from tipl_ray import figures, report
from tipl_ray.collection import collect, name_trials, pending_seeds, trial_header
from tipl_ray.config import Experiment, as_table, digest
from tipl_ray.evaluation import Evaluation, evaluate
from tipl_ray.jobs import check_job, connected_to_ray, exit_status, open_tracker
from tipl_ray.learner import choose_engine, why_not_compiled
from tipl_ray.placement import GroupProgress
from tipl_ray.storage import Storage, StoreError, file_exists, join, last_name, read_file, write_file
from tipl_ray.tasks import find_task
from tipl_ray.terminal import ProgressView, duration, say
from tipl_ray.tracking import Run, Tracker, ui_command
from tipl_ray.training import (
    DataSet,
    data_sets,
    load_history,
    model_folder,
    require_workers,
    run_digest,
    train,
    training_digest,
)
from tipl_ray.trajectory_store import TrajectoryStore

ROWS = 20
"""Groups of trials in the table of progress at most."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Context:
    """What every stage needs beside its own work."""

    experiment: Experiment
    tracker: Tracker
    pipeline: Run
    """The MLflow run that the stages' runs are nested under."""


def run_collect(context: Context) -> None:
    """Collect every trial, with the progress of each actor, and log the trials' learning curves."""
    experiment, settings = context.experiment, context.experiment.collect
    store = TrajectoryStore(experiment.storage_path)
    engine = choose_engine(settings.engine, experiment.ppo)
    header = trial_header(experiment, engine)
    width = "-".join(map(str, settings.policy_hidden))
    say(
        f"collect: {settings.num_trials} trials of {settings.task}, {experiment.env_steps_per_trial:,} env steps each, "
        f"policy {width} (P = {header.num_weights:,}), {experiment.num_snapshots:,} snapshots a trial"
    )
    if engine == "torch" and settings.engine == "auto":
        say(f"collect: {why_not_compiled(experiment.ppo)}: networks run in torch, several times slower")
    if not find_task(settings.task).fast:
        say(f"collect: {settings.task} runs through gymnasium, one environment after the other, several times slower")
    found = settings.num_trials - len(pending_seeds(experiment, store))
    if found == settings.num_trials and store.finished():
        say(f"collect: found all {found} trials complete")
    elif 0 < found < settings.num_trials:
        say(f"collect: found {found} trials complete, going on with the others")
    begin = time.monotonic()
    with ProgressView() as view:
        collect(experiment, lambda groups: _show_collection(view, groups, time.monotonic() - begin))
    say_left_out("collect", experiment.storage_path, settings.seeds)
    curves = learning_curves(experiment)
    final = float(np.mean([returns[-1] for _, _, returns in curves]))
    say(
        f"collect: data set {store.digest(settings.seeds)} in {join(experiment.storage_path, 'trajectories')}, "
        f"mean episodic return at the end {final:.1f} over {len(curves)} trials, {duration(time.monotonic() - begin)}"
    )
    key = f"collect-{header.config_hash}-{digest(settings.seeds)}"
    with context.tracker.run("collect", key, parent=context.pipeline, tags=run_tags(experiment)) as run:
        run.log_parameters({"collect": as_table(settings), "ppo": as_table(experiment.ppo), "engine": engine})
        steps = curves[0][1]
        mean_T = np.nanmean(np.stack([returns for _, _, returns in curves]), axis=0)
        run.log_history("episodic_return_mean", [int(step) for step in steps], [float(value) for value in mean_T])
        run.log_metrics({"final_episodic_return_mean": final, "num_weights": header.num_weights})
        log_data(experiment, run)
        run.log_figure(figures.learning_curves(curves), "learning_curves")


def run_train(context: Context) -> None:
    """Train the Transformer, once for each seed, and log every iteration and the model."""
    experiment = context.experiment
    sets = data_sets(experiment)
    if not experiment.train.data:
        data_digest(experiment)  # refuses what is not complete
    for one in sets:
        say_left_out("train", one.storage, one.seeds)
    cut = [one.parts for one in sets]
    say(
        f"train: {sum(len(seeds) for seeds, _, _ in cut)} trials to train, {sum(len(seeds) for _, seeds, _ in cut)} to "
        f"choose, of {', '.join(one.task for one in sets)}, preset {experiment.preset}, basis {_basis(experiment)}, "
        f"context {experiment.model.context}, {experiment.train.num_steps:,} steps of {experiment.train.batch_size} "
        "windows"
    )
    for run_of_seed in experiment.training_runs:
        _train_one(context, run_of_seed)


def _train_one(context: Context, experiment: Experiment) -> None:
    begin = time.monotonic()
    data = training_digest(experiment)
    key = f"train-{run_digest(experiment, data)}"
    with context.tracker.run("train", key, parent=context.pipeline, tags=run_tags(context.experiment)) as run:
        run.log_parameters({name: as_table(getattr(experiment, name)) for name in ("basis", "split", "model", "train")})
        for one in data_sets(experiment):
            run.log_dataset(f"{one.task} trajectories", one.digest, f"{one.storage}/trajectories", profile={})

        def log(metrics: dict[str, float]) -> None:
            told = ("loss", "validation_loss", "validation_skill", "learning_rate", "steps_per_second")
            run.log_metrics({name: metrics[name] for name in told}, step=int(metrics["step"]))

        folder = train(experiment, data, on_metrics=log, say=lambda line: say(f"train: {line}"))
        history = load_history(folder)
        for metrics in history:
            log(metrics)
        run.log_figure(figures.training_curves(history), "training_curves")
        with tempfile.TemporaryDirectory() as copy:
            for name in Storage(folder).sizes():
                Path(copy, name).write_bytes(read_file(folder, name))
            run.log_model_folder(copy)
    say(f"train: model in {folder}, {duration(time.monotonic() - begin)}")


def run_evaluate(context: Context) -> None:
    """Judge the trained models on the test trials: result table, figures, report."""
    experiment = context.experiment
    data_digest(experiment)  # refuses what is not complete
    trained_on = training_digest(experiment)
    models = [model_folder(one, trained_on) for one in experiment.training_runs]
    for model in models:
        if not file_exists(model, "model.json"):
            raise StoreError(f"{model}: no trained model of this experiment is there; run jobs/train.py first")
    settings = experiment.evaluate
    say_left_out("evaluate", experiment.storage_path, experiment.test_seeds)
    data = DataSet(storage=experiment.storage_path, seeds=experiment.collect.seeds, split=experiment.split)
    num_test_trials = len(data.parts[2])
    say(
        f"evaluate: {num_test_trials} test trials, h = 1..{settings.horizon}, policies run at "
        f"{settings.windows_per_trial} windows a trial on {settings.episodes} episodes each"
    )
    begin = time.monotonic()
    with ProgressView() as view:
        evaluation = evaluate(
            experiment, models, lambda done, total: view.show([], f"evaluate: {done} of {total} tasks done")
        )
    key = f"evaluate-{last_name(evaluation.folder)}"
    with context.tracker.run("evaluate", key, parent=context.pipeline, tags=run_tags(experiment)) as run:
        run.log_parameters({"evaluate": as_table(settings), "model": ", ".join(models)})
        log_data(experiment, run)
        for row in evaluation.summary:
            values = {f"{name}/{row['predictor']}": row[name] for name in ("skill", "wpe", "repw")}
            run.log_metrics(values, step=row["step"])
        with tempfile.TemporaryDirectory() as folder:
            pictures = _draw(context, evaluation, load_history(models[0]), Path(folder))
            for name, picture in pictures.items():
                run.log_figure(picture, name)
                write_file(join(evaluation.folder, "figures"), picture.name, picture.read_bytes())
            page = _write_report(Path(folder) / "report.html", context, evaluation, models, pictures)
            run.log_file(page)
            write_file(evaluation.folder, page.name, page.read_bytes())
    for line in report.format_table(evaluation.summary).splitlines():
        say(line)
    found = report.answers(
        evaluation.summary, settings.confidence, comparisons=evaluation.comparisons, groups=evaluation.groups
    )
    for answer in found:
        say(f"{answer.question} {answer.text}")
    say(f"evaluate: results and figures in {evaluation.folder}, {duration(time.monotonic() - begin)}")
    say(f"evaluate: report {join(evaluation.folder, 'report.html')}")


STAGES: dict[str, Callable[[Context], None]] = {"collect": run_collect, "train": run_train, "evaluate": run_evaluate}


def run_stages(experiment: Experiment, names: Sequence[str]) -> None:
    """Run stages in order on the Ray cluster at hand, or on this machine; the whole of a job.

    Exits with status 1 and one line on standard error for what the user can mend, 130 when interrupted.
    """
    with exit_status():
        check_job(experiment)
        tracker = open_tracker(experiment)
        with connected_to_ray(), _pipeline(experiment, tracker) as context:
            if {"collect", "train"} <= set(names) and pending_seeds(
                experiment, TrajectoryStore(experiment.storage_path)
            ):
                require_workers(experiment)  # now, and not when all is collected
            for name in names:
                STAGES[name](context)
        say(f"MLflow: {ui_command(tracker.uri)}")


@contextlib.contextmanager
def _pipeline(experiment: Experiment, tracker: Tracker) -> Iterator[Context]:
    """The parent run of all stages of an experiment, whichever job runs them."""
    with tracker.run(experiment.name, f"pipeline-{digest(essence(experiment))}") as run:
        run.log_parameters(essence(experiment))
        yield Context(experiment=experiment, tracker=tracker, pipeline=run)


def data_digest(experiment: Experiment) -> str:
    """Digest of the experiment's complete data set. Raises StoreError where it is not complete, or is another's."""
    store = TrajectoryStore(experiment.storage_path)
    missing = pending_seeds(experiment, store)
    if missing or not store.finished():
        raise StoreError(
            f"{experiment.storage_path}: {len(missing)} of {experiment.collect.num_trials} trials are not complete; "
            "run jobs/collect.py with the same experiment first"
        )
    return store.digest(experiment.collect.seeds)


def say_left_out(stage: str, storage: str, seeds: Sequence[int]) -> None:
    """A line for each of some trials that diverged."""
    for divergence in TrajectoryStore(storage).divergences(seeds).values():
        say(f"{stage}: {divergence}: left out")


def learning_curves(experiment: Experiment) -> list[tuple[int, np.ndarray, np.ndarray]]:
    """Per trial: seed, env steps, mean return of the episodes that ended in each iteration; the last known, if none.

    Trials that diverged are left out.
    """
    store, curves = TrajectoryStore(experiment.storage_path), []
    first = slice(1, None, experiment.snapshots_per_iteration)  # an iteration's episodes stand at its first snapshot
    for seed in store.sound(experiment.collect.seeds):
        trial = store.trajectory(seed, columns=["env_step", "episodic_return"])
        returns_T = trial.episodic_returns_T[first].copy()
        for index in range(1, len(returns_T)):
            if np.isnan(returns_T[index]):
                returns_T[index] = returns_T[index - 1]
        curves.append((seed, trial.env_steps_T[first], returns_T))
    return curves


def essence(experiment: Experiment) -> dict:
    """What tells one experiment from another: not where it is kept, tracked or run."""
    table = as_table(experiment)
    del table["storage"], table["tracking"], table["accelerate"], table["sweep"]
    del table["train"]["num_workers"], table["train"]["use_gpu"]
    del table["collect"]["trials_per_actor"]
    return table


def run_tags(experiment: Experiment) -> dict[str, str]:
    """What MLflow's users filter by."""
    return {"task": experiment.collect.task, "basis": experiment.basis.kind, "experiment": experiment.name}


def log_data(experiment: Experiment, run: Run) -> None:
    """Record the data set that a run used."""
    run.log_dataset(
        f"{experiment.name} trajectories",
        data_digest(experiment),
        join(experiment.storage_path, "trajectories"),
        profile={"trials": experiment.collect.num_trials, "snapshots_per_trial": experiment.num_snapshots},
    )


def _show_collection(view: ProgressView, groups: list[GroupProgress], seconds: float) -> None:
    shown = sorted(groups, key=lambda group: group.finished)[:ROWS]
    rows = [
        {
            "trials": name_trials(group.seeds),
            "env steps": f"{group.env_steps:,} of {group.total_env_steps:,}",
            "env steps/s": f"{group.env_steps_per_second:,.0f}",
            "mean return": f"{group.mean_return:.1f}" if np.isfinite(group.mean_return) else "-",
            "left": "done" if group.finished else _left(group.seconds_left),
        }
        for group in shown
    ]
    done, total = sum(group.env_steps for group in groups), sum(group.total_env_steps for group in groups)
    running = [group for group in groups if group.env_steps_per_second and not group.finished]
    rate = sum(group.env_steps_per_second for group in running)
    left = _left((total - done) / rate if rate else np.inf if done < total else 0.0)
    finished = sum(len(group.seeds) for group in groups if group.finished)
    diverged = sum(len(group.diverged) for group in groups)
    view.show(
        rows,
        f"collect: {finished} of {sum(len(group.seeds) for group in groups)} trials done"
        f"{f', {diverged} diverged' if diverged else ''}, {done:,} of {total:,} env steps, {rate:,.0f} env steps/s "
        f"on {len(running)} actors, {duration(seconds)} so far, {left} left",
    )


def _basis(experiment: Experiment) -> str:
    basis = experiment.basis
    return f"{basis.kind} of rank {basis.rank}" if basis.kind in ("trial", "shared") else basis.kind


def _left(seconds: float) -> str:
    return duration(seconds) if np.isfinite(seconds) else "?"


def _draw(context: Context, evaluation: Evaluation, history: list[dict], folder: Path) -> dict[str, Path]:
    drawn = {
        "figure_2": figures.figure_2(evaluation.results, evaluation.summary),
        "skill_by_step": figures.skill_by_step(evaluation.summary),
        "skill_over_ridge": figures.skill_over_ridge(evaluation.comparisons),
        "skill_by_phase": figures.skill_by_phase(evaluation.results),
        "skill_by_third": figures.skill_by_third(evaluation.results),
        **({"spread": figures.spread(evaluation.summary)} if context.experiment.evaluate.run_policies_of else {}),
        "reconstruction": figures.reconstruction(evaluation.reconstruction),
        "training_curves": figures.training_curves(history),
        "learning_curves": figures.learning_curves(learning_curves(context.experiment)),
    }
    return {name: figures.save(figure, folder / f"{name}.png") for name, figure in drawn.items()}


def _write_report(
    path: Path, context: Context, evaluation: Evaluation, models: list[str], pictures: dict[str, Path]
) -> Path:
    experiment = context.experiment
    return report.write_report(
        path,
        title=f"TIPL on {experiment.collect.task}: {experiment.name}",
        summary=evaluation.summary,
        figures=pictures,
        facts={
            "trials": experiment.collect.num_trials,
            "snapshots a trial": f"{experiment.num_snapshots:,}",
            "weights P": f"{int(evaluation.results['num_weights'][0]):,}",
            "training steps": f"{experiment.train.num_steps:,}",
            "test trials": len(np.unique(evaluation.results["trial"])),
        },
        configuration=as_table(experiment),
        commands={
            "the whole pipeline": f"python jobs/pipeline.py --experiment jobs/experiments/{experiment.name}.toml"
        },
        files={
            "data set": join(experiment.storage_path, "trajectories"),
            "models": ", ".join(models),
            "result table": join(evaluation.folder, "results.parquet"),
            "summary": join(evaluation.folder, "summary.csv"),
        },
        confidence=experiment.evaluate.confidence,
        comparisons=evaluation.comparisons,
        groups=evaluation.groups,
    )
