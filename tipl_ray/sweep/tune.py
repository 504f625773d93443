"""Sweep: many trainings of one experiment that differ in some fields, on Ray Tune, compared in MLflow.

A run of the sweep (a `child` of its MLflow run) trains as jobs/train.py does, in one process, on trials that were
reduced once for all of them, and is judged by its skill on windows that all runs share. Ray Tune schedules the runs,
stops them early and keeps their checkpoints; only the driver writes to MLflow, from the history in each checkpoint, so
that whatever is killed, the same command continues and no point is logged twice or left out.

    <storage>/sweeps/<sweep digest>/    Ray Tune's state of the sweep, the last checkpoints of each run, report.html
    <storage>/models/<run digest>/      models of the runs that trained to their end, as of jobs/train.py
"""

import contextlib
import dataclasses
import logging
import os
import resource
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import ray
import ray.train
import torch
from matplotlib.figure import Figure
from ray import tune
from ray.tune.experiment import Trial
from ray.tune.integration.ray_train import CHECKPOINT_PATH_KEY, TuneReportCallback
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.optuna import OptunaSearch

from tipl_ray import config
from tipl_ray.data.locks import only_one
from tipl_ray.data.storage import Storage, file_exists, join, write_file
from tipl_ray.data.trajectory_store import TrajectoryStore
from tipl_ray.digest import as_table, digest, identity
from tipl_ray.evaluate.report import counted
from tipl_ray.experiments import from_table
from tipl_ray.jobs import check_job, connected_to_ray, open_tracker
from tipl_ray.predict.bands import load_band
from tipl_ray.predict.gram import GramBand
from tipl_ray.predict.model_files import is_complete
from tipl_ray.predict.representation import TrainingData, representation_of
from tipl_ray.resources import require_resources
from tipl_ray.stages import REPORT_FILE, data_digest, essence, log_data, run_tags, say_end
from tipl_ray.sweep import comparison
from tipl_ray.sweep.judge import Judge
from tipl_ray.sweep.space import Candidate, Range, Space, corners, describe, make_space, short_names, with_fields
from tipl_ray.terminal import ProgressView, duration, say, say_rows, say_whole, waiting
from tipl_ray.tracking import KEY_TAG, Run, Tracker, ui_command
from tipl_ray.train.data_sets import model_folder, run_digest
from tipl_ray.train.ray_train import make_trainer, publish_model, worker_training
from tipl_ray.train.reading import load_trials, read_trials
from tipl_ray.train.training import Training, TrainingError

CURVES = ("loss", "validation_loss", "validation_skill", "learning_rate", "steps_per_second")
"""What MLflow logs of every iteration, besides the skills."""
REDUCTION_FACTOR = 3
"""One in so many runs continues at each rung of ASHA."""
CHILD_SECTIONS = ("basis", "split", "model", "train")
WORSE = {"worse_than_copying": "true"}
"""Tag of the best run, and of its registered model, if it is worse than copying the last snapshot."""
ROWS = 10
"""Runs in the table at the end of a sweep; the report has all."""
MAX_TAG_LETTERS = 500
MAX_FAILURES = 3
"""Times that a run whose process or node was lost is started again."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A sweep that has passed every check."""

    experiment: config.Experiment
    space: Space
    children: tuple[config.Experiment, ...]
    """One for every combination of values and of ranges' limits."""
    data: str
    """Digest of the data set."""

    @property
    def digest(self) -> str:
        """What the sweep's results depend on, without where it runs."""
        told = identity(self.experiment.sweep) | {"over": {field: repr(entry) for field, entry in self.space.items()}}
        told |= representation_of(self.experiment.basis).forecasts(self.experiment.model)
        return digest(run_digest(self.experiment, self.data), self.experiment.evaluate.steps, told)

    @property
    def num_children(self) -> int:
        """Number of runs in the finished sweep."""
        return len(self.children) if self.experiment.sweep.search == "grid" else self.experiment.sweep.num_samples

    @property
    def longest(self) -> int:
        """The longest context of any run."""
        return max(child.model.context for child in self.children)

    @property
    def name(self) -> str:
        """As MLflow shows it."""
        return f"{self.experiment.name}: sweep over {' x '.join(short_names(list(self.space)).values())}"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Reduced:
    """The trials on one kind of basis, at the highest rank and the longest context of any run."""

    data: TrainingData
    train_bands: Sequence[GramBand]
    """Gram bands of the same trials, on which every run is judged."""
    validation_bands: Sequence[GramBand]

    def of(self, experiment: config.Experiment) -> TrainingData:
        """What one run trains on."""
        return representation_of(experiment.basis).narrowed(self.data)


def run_sweep(experiment: config.Experiment) -> None:
    """The whole of jobs/sweep.py. Raises what `jobs.exit_status` prints for the user."""
    with waiting("sweep: checking the experiment and opening MLflow"):
        check_job(experiment)
        plan = make_plan(experiment)
        tracker = open_tracker(experiment)
    key = f"sweep-{plan.digest}"
    found = tracker.find(key)
    if found and found.status == "FINISHED":
        say(f"sweep: already finished, {plan.num_children} runs")
        children = comparison.read_children(tracker.client, found.run_id)
        _show(plan, children)
        _say_findings(plan, tracker, children)
    else:
        with only_one(experiment.storage_path, key, "running this sweep"), contextlib.ExitStack() as until_the_end:
            with waiting("sweep: starting Ray"):
                until_the_end.enter_context(connected_to_ray())
            _require_children(experiment)
            with tracker.run(plan.name, key, tags=run_tags(experiment)) as parent:
                _sweep(plan, tracker, parent)
    say_whole(f"MLflow: {ui_command(tracker.uri, tracker.experiment_id)}")


def make_plan(experiment: config.Experiment) -> Plan:
    """Check everything that can be known before a run starts.

    Raises ValueError for fields, values and candidates that cannot be, StoreError for a storage without the whole data.
    """
    space = make_space(experiment)
    metrics = ["skill", *(f"skill_h{step}" for step in experiment.evaluate.steps)]
    if experiment.sweep.metric not in metrics:
        raise ValueError(f"sweep.metric={experiment.sweep.metric!r} is not one of {', '.join(metrics)}")
    children = tuple(with_fields(experiment, candidate) for candidate in corners(space))
    if experiment.where.num_workers > 1 and experiment.where.trainer != "ray-train":
        raise ValueError(
            f"num_workers={experiment.where.num_workers} requires trainer='ray-train': with "
            f"{experiment.where.trainer!r} a run trains in one process"
        )
    if experiment.sweep.scheduler == "asha" and all(
        child.train.steps_per_iteration >= child.train.num_steps for child in children
    ):
        raise ValueError(
            f"sweep.scheduler='asha' compares runs every train.steps_per_iteration="
            f"{experiment.train.steps_per_iteration} steps, but they end after train.num_steps="
            f"{experiment.train.num_steps}: lower train.steps_per_iteration, or leave the scheduler out"
        )
    if experiment.train.data:
        raise ValueError(f"train.data={experiment.train.data}: a sweep trains on the data set of its own storage")
    plan = Plan(experiment=experiment, space=space, children=children, data=data_digest(experiment))
    num_weights = TrajectoryStore(experiment.storage_path).header(experiment.collect.seeds[:1]).num_weights
    for child in plan.children:
        representation_of(child.basis).check_policy(num_weights)
    if plan.longest + max(experiment.evaluate.steps) >= experiment.num_snapshots:
        raise ValueError(
            f"model.context={plan.longest} + forward step {max(experiment.evaluate.steps)} leave no window in the "
            f"{experiment.num_snapshots} snapshots of a trial"
        )
    return plan


def _sweep(plan: Plan, tracker: Tracker, parent: Run) -> None:
    experiment, settings = plan.experiment, plan.experiment.sweep
    varied = ", ".join(f"{field} {_told(entry)}" for field, entry in plan.space.items())
    say(
        f"sweep: {plan.num_children} runs by {settings.search} over {varied}; {experiment.train.num_steps:,} steps "
        f"each, compared on {counted(len(experiment.validation_seeds), 'validation trial')} from snapshot "
        f"{plan.longest} on"
    )
    parent.log_parameters({**essence(experiment), "sweep": {**as_table(settings), "over": varied}})
    log_data(experiment, parent)
    begin = time.monotonic()
    data = {_origin(child): child for child in plan.children}
    with waiting("sweep: reducing the trials"):
        reduced = {origin: _reduce(plan, child) for origin, child in data.items()}
    say(f"sweep: trials reduced, once for all runs, in {duration(time.monotonic() - begin)}")
    with ProgressView() as view, parent.system_metrics(tracker.uri):
        log = SweepLog(plan, tracker, parent, view)
        trials = _tune(plan, reduced, log)
    for trial in trials:
        log.end(trial, trials, log.status(trial))
    if (
        any(log.status(trial) not in (Trial.TERMINATED, Trial.ERROR) for trial in trials)
        or len(trials) < plan.num_children
    ):
        raise KeyboardInterrupt  # Tune has caught it, and ended as if all were well
    _forget_others(tracker, parent, {child_key(plan, trial, trials) for trial in trials})
    children = comparison.read_children(tracker.client, parent.run_id)
    drawn = comparison.draw(tracker.client, children, settings.metric)
    for name, figure in drawn.items():
        parent.log_figure(figure, name)
    _show(plan, children)
    lost = [trial for trial in trials if trial.status == Trial.ERROR]
    if lost:
        raise TrainingError(
            f"{len(lost)} of {len(trials)} runs failed, {describe(lost[0].config)} with: {lost[0].get_error()}; the "
            "same command tries them again"
        )
    best = comparison.best(children, settings.metric)
    if best is None:
        raise TrainingError(f"all {len(trials)} runs diverged; lower train.learning_rate")
    _crown(plan, tracker, parent, best, trials)
    say(f"sweep: {len(children)} runs in {duration(time.monotonic() - begin)}")
    _say_findings(plan, tracker, comparison.read_children(tracker.client, parent.run_id), drawn)


def _require_children(experiment: config.Experiment) -> None:
    """Refuse runs that the cluster has no room for. Raises ValueError."""
    where = experiment.where
    needs = {
        "CPU": (float(where.cpus_per_trial), f"cpus_per_trial={where.cpus_per_trial}"),
        "GPU": (where.gpus_per_trial, f"gpus_per_trial={where.gpus_per_trial:g}"),
    }
    per = "worker of a run" if where.trainer == "ray-train" else "run"
    require_resources(needs, per, where.num_workers, f"num_workers={where.num_workers}")


def _forget_others(tracker: Tracker, parent: Run, keys: set[str]) -> None:
    """Delete MLflow runs that a driver started before it was killed, and that Tune has no record of."""
    for child in comparison.read_children(tracker.client, parent.run_id):
        if child.tags[KEY_TAG] not in keys:
            tracker.client.delete_run(child.run_id)


def _reduce(plan: Plan, child: config.Experiment) -> Reduced:
    """The trials on the run's kind of basis, for every rank and context of the sweep."""
    rank = max(other.basis.rank for other in plan.children)
    widest = with_fields(child, {"basis.rank": rank, "model.context": plan.longest})
    (train_bands,), (validation_bands,) = read_trials(widest, load_band)
    return Reduced(data=load_trials(widest), train_bands=train_bands, validation_bands=validation_bands)


def _origin(experiment: config.Experiment) -> str:
    """What a reduction depends on, besides the rank."""
    return experiment.basis.kind


def _tune(plan: Plan, reduced: Mapping[str, Reduced], log: tune.Callback) -> list[Trial]:
    """Ray Tune over the plan's candidates, from wherever an earlier driver has left it; what became of each."""
    settings, where = plan.experiment.sweep, plan.experiment.where
    # Tune would write three more files for each child, and tell on standard output what the progress view tells.
    os.environ |= {"TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "RAY_AIR_NEW_OUTPUT": "0"}
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    trainable = tune.with_parameters(
        run_child, table=as_table(plan.experiment), reduced=dict(reduced), longest=plan.longest
    )
    searcher = OptunaSearch(metric=settings.metric, mode="max", seed=settings.seed)
    filesystem, path = Storage(join(plan.experiment.storage_path, "sweeps")).filesystem
    driving = where.trainer == "ray-train"
    analysis = tune.run(
        trainable,
        name=plan.digest,
        storage_path=path,
        storage_filesystem=filesystem,
        config={field: _domain(entry, settings.search) for field, entry in plan.space.items()},
        num_samples=1 if settings.search == "grid" else settings.num_samples,
        search_alg=searcher if settings.search == "optuna" else None,
        scheduler=_asha(plan) if settings.scheduler == "asha" else None,
        # Ray Train asks for its workers' resources itself; Ray Tune wants something, if only a byte.
        resources_per_trial={"memory": 1} if driving else {"cpu": where.cpus_per_trial, "gpu": where.gpus_per_trial},
        max_concurrent_trials=where.max_concurrent_trials or (_fitting(plan.experiment) if driving else None),
        checkpoint_config=tune.CheckpointConfig(num_to_keep=2),
        # A process takes longer to import torch than a short child to train.
        reuse_actors=True,
        max_failures=MAX_FAILURES,
        raise_on_failed_trial=False,
        # A sweep that was killed goes on; children that had failed for good are tried once more.
        resume="AUTO+ERRORED",
        callbacks=[log],
        verbose=0,
    )
    return list(analysis.trials)


def _asha(plan: Plan) -> ASHAScheduler:
    """Stops a run early if others had a higher metric after as many steps."""
    longest = max(child.train.num_steps for child in plan.children)
    return ASHAScheduler(
        time_attr="step",
        metric=plan.experiment.sweep.metric,
        mode="max",
        max_t=longest,
        grace_period=min(longest, *(child.train.steps_per_iteration for child in plan.children)),
        reduction_factor=REDUCTION_FACTOR,
    )


def _fitting(experiment: config.Experiment) -> int:
    """Runs whose Ray Train workers the cluster has room for, as it is."""
    where, room = experiment.where, ray.cluster_resources()
    asked = {"CPU": where.cpus_per_trial, "GPU": where.gpus_per_trial}
    workers = [room.get(name, 0) / amount for name, amount in asked.items() if amount]
    return max(1, int(min(workers)) // where.num_workers)


def run_child(candidate: Candidate, *, table: dict[str, Any], reduced: Mapping[str, Reduced], longest: int) -> None:
    """What each run of the sweep executes in Ray Tune: its training, or Ray Train's TorchTrainer with its training."""
    experiment = with_fields(from_table(table), candidate)
    own, where = reduced[_origin(experiment)], experiment.where
    if where.trainer == "ray-train":
        context = tune.get_context()
        name = f"sweep-{context.get_experiment_name()}-{context.get_trial_id()}"
        told = {"experiment": as_table(experiment), "reduced": ray.put(own), "longest": longest}
        cpus, gpus = where.cpus_per_trial, where.gpus_per_trial
        make_trainer(run_worker, told, experiment, name, cpus, gpus, [TuneReportCallback()]).fit()
        return
    training = Training(experiment, own.of(experiment), device="cuda" if where.gpus_per_trial else "cpu")
    _train(training, own, longest, tune.get_checkpoint(), tune.report, tune.Checkpoint.from_directory)


def run_worker(settings: dict[str, Any]) -> None:
    """What each Ray Train worker of a run executes; TuneReportCallback passes the first one's reports to Ray Tune."""
    experiment, own = from_table(settings["experiment"]), ray.get(settings["reduced"])
    training = worker_training(experiment, own.of(experiment))
    as_checkpoint = ray.train.Checkpoint.from_directory
    _train(training, own, settings["longest"], ray.train.get_checkpoint(), ray.train.report, as_checkpoint)


def _train(
    training: Training,
    own: Reduced,
    longest: int,
    checkpoint: ray.train.Checkpoint | None,
    report: Callable[..., None],
    as_checkpoint: Callable[[str], ray.train.Checkpoint],
) -> None:
    """`Training`, judged and checkpointed after every iteration, through Ray Tune's functions or Ray Train's."""
    experiment = training.experiment
    torch.set_num_threads(experiment.where.cpus_per_trial)
    judge = Judge(bands=own.validation_bands, steps=experiment.evaluate.steps, longest=longest)
    levels = {} if training.rank else _levels(judge, own.train_bands, training)
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            training.restore(folder)
    # A driver that was killed may not have heard of the end.
    ended = training.step == experiment.train.num_steps
    try:
        for metrics in training.history[-1:] if ended else training.iterations():
            if training.rank:
                report(metrics)
                continue
            metrics |= _judged(judge, training)
            with tempfile.TemporaryDirectory() as folder:
                training.save(folder)
                report(
                    {**metrics, "history": training.history, "levels": levels, "peak_memory_mb": _peak_memory_mb()},
                    checkpoint=as_checkpoint(folder),
                )
    except TrainingError as error:
        # Tried again, it would diverge again: this is a result, and the worst there is.
        worst = dict.fromkeys(_named(np.zeros(len(judge.steps)), judge.steps, "skill"), -np.inf)
        report({**worst, "step": training.step, "history": training.history, "levels": levels, "error": str(error)})


def _levels(judge: Judge, bands: Sequence[GramBand], training: Training) -> dict[str, float]:
    """What a run's skill is compared with: the ridge's, the upper bound of any model on its representation, and, if
    that is not 0, a model that predicts no change."""
    asked = (judge.starts_B, judge.steps)
    ridge_H = judge.ridge(bands, training.experiment.model.context)
    bound_H = judge.skills(training.objective.upper_bound(*asked))
    levels = _named(ridge_H, judge.steps, "ridge_skill") | _named(bound_H, judge.steps, "floor_skill")
    still_NBH = training.objective.standing_still(*asked)
    return levels if still_NBH is None else levels | _named(judge.skills(still_NBH), judge.steps, "still_skill")


def _judged(judge: Judge, training: Training) -> dict[str, float]:
    """Skills of the model that would be kept if training ended now: the best so far by validation loss."""
    names = _named(np.zeros(len(judge.steps)), judge.steps, "skill")
    kept = min(training.history, key=lambda row: row["validation_loss"])
    if all(name in kept for name in names):
        return {name: kept[name] for name in names}
    errors_NBH = training.objective.squared_errors(training.best, judge.starts_B, judge.steps)
    return _named(judge.skills(errors_NBH), judge.steps, "skill")


def _named(skill_H: np.ndarray, steps: Sequence[int], name: str) -> dict[str, float]:
    """Skills under the names that MLflow and Tune know them by: their mean over forward steps, and each one."""
    skill_H = np.where(np.isnan(skill_H), -np.inf, skill_H)  # of errors beyond all numbers: Tune cannot order NaN
    return {name: float(skill_H.mean())} | {f"{name}_h{h}": float(s) for h, s in zip(steps, skill_H, strict=True)}


def _peak_memory_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _domain(entry: tuple[Any, ...] | Range, search: str) -> Any:
    """A field's values in Ray Tune's words."""
    if not isinstance(entry, Range):
        return tune.grid_search(list(entry)) if search == "grid" else tune.choice(list(entry))
    if entry.whole:
        draw = tune.lograndint if entry.log else tune.randint
        return draw(int(entry.low), int(entry.high) + 1)
    return (tune.loguniform if entry.log else tune.uniform)(entry.low, entry.high)


class SweepLog(tune.Callback):
    """Logs the runs to MLflow and to the terminal; lives in the driver, the only writer of MLflow's runs."""

    def __init__(self, plan: Plan, tracker: Tracker, parent: Run, view: ProgressView):
        self.plan, self.tracker, self.parent, self.view = plan, tracker, parent, view
        self._runs: dict[str, Run] = {}
        self._running: set[str] = set()
        self._begin, self._shown, self._steps_before = time.monotonic(), 0.0, -1

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Open the MLflow run."""
        self._running.add(trial.trial_id)
        self._run(trial, trials)

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        """Log the iterations that are new."""
        self._log(self._run(trial, trials), result)

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """End the MLflow run."""
        self._running.discard(trial.trial_id)
        self.end(trial, trials, Trial.TERMINATED)  # Tune sets the status later

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """End the MLflow run."""
        self._running.discard(trial.trial_id)
        self.end(trial, trials, Trial.ERROR)

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        """Bring the view up to date, twice a second at most."""
        if time.monotonic() - self._shown > 0.5:
            self._shown = time.monotonic()
            self._show(trials)

    def status(self, trial: Trial) -> str:
        """Tune's status, except for runs that were running when it was interrupted: Tune calls these ended."""
        return Trial.RUNNING if trial.trial_id in self._running else trial.status

    def end(self, trial: Trial, trials: list[Trial], status: str) -> None:
        """Log all that is known of a run and end it with Tune's status; calling it again changes nothing."""
        found = self.tracker.find(child_key(self.plan, trial, trials))
        if found is None or found.status == "FINISHED":
            return
        run, result = self._run(trial, trials), trial.last_result or {}
        self._log(run, result)
        history, child = result.get("history", []), with_fields(self.plan.experiment, trial.config)
        run.log_metrics({**result.get("levels", {}), "peak_memory_mb": result.get("peak_memory_mb")})
        run.log_metrics({"training_seconds": sum(_seconds(history)) or None})
        whole = status == Trial.TERMINATED and "error" not in result
        if whole and history and history[-1]["step"] == child.train.num_steps:
            self._publish(child, trial, run)
        elif whole and history:
            run.set_tags(
                {"ended_early": f"{self.plan.experiment.sweep.scheduler}, after {history[-1]['step']:,} steps"}
            )
        if "error" in result:
            run.set_tags({comparison.DIVERGED_TAG: "true"})
        if "error" in result or status == Trial.ERROR:
            run.set_tags({"error": str(result.get("error") or trial.get_error())[:MAX_TAG_LETTERS]})
        if whole:
            self.tracker.end(run, "FINISHED")
        else:
            self.tracker.end(run, "FAILED" if status in (Trial.TERMINATED, Trial.ERROR) else "KILLED")

    def _publish(self, child: config.Experiment, trial: Trial, run: Run) -> None:
        folder = model_folder(child, self.plan.data)
        if not is_complete(folder):
            with last_checkpoint(self.plan, trial).as_directory() as checkpoint:
                publish_model(checkpoint, folder, child, self.plan.data)
        run.set_tags({"model_folder": folder})  # as a parameter it would be one of MLflow's parallel coordinates

    def _run(self, trial: Trial, trials: list[Trial]) -> Run:
        if trial.trial_id not in self._runs:
            self._runs[trial.trial_id] = run = self.tracker.start(
                describe(trial.config), child_key(self.plan, trial, trials), parent=self.parent, tags=self._tags(trial)
            )
            child = with_fields(self.plan.experiment, trial.config)
            run.log_parameters({name: as_table(getattr(child, name)) for name in CHILD_SECTIONS})
            log_data(child, run)
        return self._runs[trial.trial_id]

    def _tags(self, trial: Trial) -> dict[str, str]:
        child = with_fields(self.plan.experiment, trial.config)
        return {**run_tags(child), "data": self.plan.data, "sweep": self.plan.digest, "tune.trial_id": trial.trial_id}

    def _log(self, run: Run, result: Mapping[str, Any]) -> None:
        history = result.get("history", [])
        names = [name for name in (history[-1] if history else ()) if name in CURVES or name.startswith("skill")]
        steps = [int(row["step"]) for row in history]
        for name in names:
            run.log_history(name, steps, [row[name] for row in history])

    def _show(self, trials: list[Trial]) -> None:
        metric, results = self.plan.experiment.sweep.metric, [trial.last_result or {} for trial in trials]
        rows = [
            {
                "run": describe(trial.config),
                "status": "diverged" if "error" in result else trial.status.lower(),
                "step": f"{result.get('step', 0):,}",
                metric: "" if "error" in result else comparison.number(result.get(metric)),
                "ridge": comparison.number(result.get("levels", {}).get(f"ridge_{metric}")),
            }
            for trial, result in zip(trials, results, strict=True)
        ]
        done = sum(trial.is_finished() for trial in trials)
        known = [
            (result[metric], row["run"])
            for result, row in zip(results, rows, strict=True)
            if metric in result and "error" not in result
        ]
        best = max(known, default=None)
        told = f", best {best[1]} with {metric} {comparison.number(best[0])}" if best else ""
        self.view.show(
            rows,
            f"sweep: {done} of {self.plan.num_children} runs done{told}, "
            f"{duration(time.monotonic() - self._begin)} elapsed, {self._left(results)} left",
        )

    def _left(self, results: list[dict[str, Any]]) -> str:
        """From the steps that this driver has seen, if no run ends early."""
        steps = sum(result.get("step", 0) for result in results)
        if self._steps_before < 0:
            self._steps_before = steps
        seen, total = steps - self._steps_before, self.plan.num_children * self.plan.experiment.train.num_steps
        return duration((time.monotonic() - self._begin) * (total - steps) / seen) if seen else "?"


def last_checkpoint(plan: Plan, trial: Trial) -> tune.Checkpoint:
    """The checkpoint of a run's last report: Ray Tune's own, or the one that Ray Train has reported to it."""
    path = (trial.last_result or {}).get(CHECKPOINT_PATH_KEY)
    if path is not None:
        # It is absolute, and the storage may have been moved since.
        filesystem, folder = Storage(join(plan.experiment.storage_path, "training")).filesystem
        return tune.Checkpoint("/".join([folder, *path.rstrip("/").split("/")[-2:]]), filesystem=filesystem)
    assert trial.checkpoint is not None, "every iteration reports a checkpoint"
    return trial.checkpoint


def child_key(plan: Plan, trial: Trial, trials: Sequence[Trial]) -> str:
    """Stable key of an MLflow run: its candidate, and a number where a search drew it more than once."""
    same = [other.trial_id for other in trials if other.config == trial.config]
    return f"sweep-{plan.digest}-{digest(trial.config)}-{same.index(trial.trial_id)}"


def _crown(plan: Plan, tracker: Tracker, parent: Run, best: comparison.Row, trials: Sequence[Trial]) -> None:
    """Mark the best run and register its model."""
    (trial,) = (trial for trial in trials if trial.trial_id == best.tags["tune.trial_id"])
    run, metric = tracker.resume(best.run_id), plan.experiment.sweep.metric
    with last_checkpoint(plan, trial).as_directory() as checkpoint:
        run.log_model_folder(join(checkpoint, "model"), loader="tipl_ray.serving")
    run.set_tags({comparison.BEST_TAG: "true"})
    told = f"{best.name}: {metric} {best.metrics[metric]:.4f}, ridge {best.metrics[f'ridge_{metric}']:.4f}"
    worse = best.metrics[metric] < 0
    if worse:
        told += ", worse than copying the last snapshot"
        run.set_tags(WORSE)
    name = f"tipl-{plan.experiment.name}"
    version = tracker.register(name, best.run_id, f"Best of {plan.name}. {told}", WORSE if worse else None)
    parent.log_metrics({name: best.metrics[name] for name in (metric, f"ridge_{metric}")})
    parent.set_tags(
        {"best_child": best.name, "best_run_id": best.run_id, "registered_model": f"models:/{name}/{version}"}
    )
    say(f"sweep: best is {told}; registered as models:/{name}/{version}")


def _show(plan: Plan, children: Sequence[comparison.Row]) -> None:
    metric = plan.experiment.sweep.metric
    rows = comparison.table(comparison.by_metric(children, metric), metric)
    shown = f"the best {ROWS} of {len(rows)} runs by" if len(rows) > ROWS else "by"
    say_rows(rows[:ROWS], title=f"{plan.name}, {shown} {metric}")


def _say_findings(
    plan: Plan,
    tracker: Tracker,
    children: Sequence[comparison.Row],
    drawn: Mapping[str, Figure] | None = None,
) -> None:
    """The end of a sweep, and its report; one that is there stays, unless its pictures have just been drawn."""
    experiment, metric = plan.experiment, plan.experiment.sweep.metric
    folder = join(experiment.storage_path, "sweeps", plan.digest)
    rows = comparison.by_metric(children, metric)
    answers = comparison.findings(rows, metric, len(experiment.validation_seeds))
    if drawn is not None or not file_exists(folder, REPORT_FILE):
        drawn = comparison.draw(tracker.client, rows, metric) if drawn is None else drawn
        page = comparison.page(plan.name, rows, metric, drawn, tracker.uri, answers)
        write_file(folder, REPORT_FILE, page.encode())
    say_end(experiment.storage_path, folder, answers)


def _seconds(history: Sequence[Mapping[str, float]]) -> Iterator[float]:
    """Of each iteration, from its steps and its rate: they outlive the process that took them."""
    before = 0.0
    for row in history:
        yield (row["step"] - before) / row["steps_per_second"]
        before = row["step"]


def _told(entry: tuple[Any, ...] | Range) -> str:
    if isinstance(entry, Range):
        return f"from {entry.low:g} to {entry.high:g}{' in the logarithm' if entry.log else ''}"
    return ", ".join(map(str, entry))
