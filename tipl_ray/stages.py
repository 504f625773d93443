"""The jobs' stages in order: collect, train, evaluate; each is found done, resumed, or run from the start.

Here everything meets: a stage runs on the Ray cluster, shows its progress in the terminal, writes its work to the
storage and logs it to MLflow. What is computed, and how, is in the files below; those that take seconds to load are
imported where they are needed, so that what can be refused is refused at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tipl_ray.collect.placement import GroupProgress
from tipl_ray.config import Experiment, Ppo
from tipl_ray.data.locks import only_one
from tipl_ray.data.snapshots import PPO_COLUMNS, Header, last_known
from tipl_ray.data.storage import (
    Storage,
    StoreError,
    file_exists,
    join,
    last_name,
    link_to,
    make_latest,
    read_file,
    write_file,
)
from tipl_ray.data.trajectory_store import TrajectoryStore
from tipl_ray.digest import as_table, digest, flat, identity
from tipl_ray.jobs import check_job, connected, exit_status, open_tracker
from tipl_ray.predict.model_files import is_complete
from tipl_ray.predict.representation import representation_of
from tipl_ray.remembered import remember_collection, remember_training
from tipl_ray.terminal import ProgressView, duration, say, say_whole, waiting
from tipl_ray.tracking import PARENT_TAG, Run, Tracker, ui_command
from tipl_ray.train.data_sets import DataSet, data_sets, missing_model, model_folder, run_digest, training_digest

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from tipl_ray.evaluate.evaluation import Evaluation
    from tipl_ray.evaluate.report import Answer

REPORT_FILE = "report.html"
ROWS = 20
"""Maximum number of groups of trials in the progress table."""


class Context:
    """What every stage needs besides its own work, each from its first use until the job ends."""

    def __init__(self, experiment: Experiment, until_the_end: contextlib.ExitStack) -> None:
        self.experiment = experiment
        self._until_the_end = until_the_end
        self._claimed: set[str] = set()
        self._connected = False

    @functools.cached_property
    def tracker(self) -> Tracker:
        """The experiment's MLflow."""
        return open_tracker(self.experiment)

    @functools.cached_property
    def pipeline(self) -> Run:
        """The MLflow run that the stages' runs are nested under, whichever job runs them."""
        table, name = essence(self.experiment), f"{self.experiment.name} {self.experiment.collect.task}"
        opened = self.tracker.run(name, f"pipeline-{digest(table)}", tags=run_tags(self.experiment))
        run = self._until_the_end.enter_context(opened)
        run.log_parameters(table)
        return run

    def claim(self, name: str, what: str) -> None:
        """Be the one process that does `what` in the storage. Raises StoreError as `locks.only_one`."""
        if name not in self._claimed:
            self._until_the_end.enter_context(only_one(self.experiment.storage_path, name, what))
            self._claimed.add(name)

    def connect(self, modules: Sequence[str] = ()) -> None:
        """Connect to the Ray cluster, for work that is not found done; before the pipeline's run, so a signal ends
        both. MLflow and some modules are loaded meanwhile."""
        if not self._connected:
            self.tracker = self._until_the_end.enter_context(connected(self.experiment, modules))
            self._connected = True
        _ = self.pipeline

    def logged(self, key: str) -> bool:
        """Whether MLflow has all of a stage's run, under this pipeline's."""
        found = self.tracker.find(key)
        if found is None or found.status != "FINISHED":
            return False
        return self.tracker.client.get_run(found.run_id).data.tags.get(PARENT_TAG) == self.pipeline.run_id

    @contextlib.contextmanager
    def run(self, name: str, key: str) -> Iterator[Run]:
        """A stage's MLflow run."""
        with self.tracker.run(name, key, parent=self.pipeline, tags=run_tags(self.experiment)) as run:
            yield run


def check_collect(context: Context) -> bool:
    """Whether the data set is found whole. Raises StoreError or ValueError for what cannot be collected."""
    from tipl_ray.collect.collection import pending_seeds
    from tipl_ray.collect.group import trial_header
    from tipl_ray.ppo.engines import choose_engine

    experiment = context.experiment
    store = TrajectoryStore(experiment.storage_path)
    engine = choose_engine(experiment.collect.engine, experiment.ppo)
    store.check_header(trial_header(experiment, engine))
    pending = pending_seeds(experiment, store)
    if not pending and store.finished():
        return True
    context.claim("collect", "collecting trials")
    if pending and engine == "compiled":
        threading.Thread(target=_compile_learner, args=(experiment,)).start()
    return False


def _compile_learner(experiment: Experiment) -> None:
    """Compile what actors on this machine would wait for, while MLflow and Ray are started."""
    from tipl_ray.ppo.compiled_learner import CompiledLearner
    from tipl_ray.ppo.compiler import CompilerError
    from tipl_ray.ppo.trials import network_shape

    with contextlib.suppress(CompilerError, OSError):  # who cannot do without raises them
        CompiledLearner(network_shape(experiment.collect), experiment.ppo)


def check_train(context: Context) -> bool:
    """Whether every model is found trained. Raises StoreError or ValueError for data that cannot be trained on."""
    experiment = context.experiment
    if not experiment.train.data:
        data_digest(experiment)
    data, done = training_digest(experiment), True
    for one in experiment.training_runs:
        if not is_complete(model_folder(one, data)):
            context.claim(f"train-{run_digest(one, data)}", "training this model")
            done = False
    return done


def check_evaluate(context: Context) -> bool:
    """Whether the evaluation is found done. Raises StoreError where the trials or a model are missing."""
    experiment = context.experiment
    data_digest(experiment)
    models = trained_models(experiment)
    from tipl_ray.evaluate.evaluation import evaluation_folder, is_evaluated

    folder = evaluation_folder(experiment, models)
    if is_evaluated(folder):
        return True
    context.claim(f"evaluate-{last_name(folder)}", "making this evaluation")
    return False


def run_collect(context: Context) -> None:
    """Collect every trial, with the progress of each actor, and log the trials' learning curves."""
    from tipl_ray.collect.collection import collect, pending_seeds
    from tipl_ray.collect.group import trial_header
    from tipl_ray.ppo.compiled_learner import why_not_compiled
    from tipl_ray.ppo.engines import choose_engine
    from tipl_ray.ppo.tasks import find_task

    experiment, settings = context.experiment, context.experiment.collect
    store = TrajectoryStore(experiment.storage_path)
    engine = choose_engine(settings.engine, experiment.ppo)
    header = trial_header(experiment, engine)
    width = "-".join(map(str, settings.policy_hidden))
    say(
        f"collect: {settings.num_trials} trials of {settings.task}, {experiment.env_steps_per_trial:,} env steps each, "
        f"policy {width} ({header.num_weights:,} weights), {experiment.num_snapshots:,} snapshots per trial"
    )
    if engine == "torch" and settings.engine == "auto":
        say(f"collect: {why_not_compiled(experiment.ppo)}: networks run in torch, which is several times slower")
    if not find_task(settings.task, settings.task_options).fast:
        say(
            f"collect: {settings.task} runs in gymnasium's own class, one environment after the other, which is "
            "several times slower"
        )
    found = settings.num_trials - len(pending_seeds(experiment, store))
    done = found == settings.num_trials and store.finished()
    if done:
        say(f"collect: all {found} trials are already complete")
        if len(there := store.seeds()) > found:
            say(f"collect: the storage holds {len(there)} trials; later jobs will use these {found}")
    elif 0 < found < settings.num_trials:
        say(f"collect: {found} trials are already complete, continuing with the others")
    begin = time.monotonic()
    remember_collection(experiment)
    if not done:
        context.claim("collect", "collecting trials")
        with ProgressView() as view:
            view.show([], "collect: starting Ray")
            context.connect()
            collect(experiment, lambda groups: _show_collection(view, groups, time.monotonic() - begin))
    say_left_out("collect", experiment.storage_path, settings.seeds)
    curves = learning_curves(experiment)
    last = [returns_T[-1] for _, _, returns_T in curves if np.isfinite(returns_T[-1])]
    final = float(np.mean(last)) if last else None
    ended = "no episode ended" if final is None else f"mean final return {final:.1f} over {len(last)} trials"
    say(
        f"collect: data set {store.digest(settings.seeds)} in {join(experiment.storage_path, 'trajectories')}, "
        f"{ended}, {duration(time.monotonic() - begin)}"
    )
    if final is not None and len(last) < len(curves):
        say(
            f"collect: no episode ended in {len(curves) - len(last)} trials, so they have no return and no learning "
            "curve"
        )
    key = f"collect-{header.config_hash}-{digest(settings.seeds)}"
    if context.logged(key):
        return
    from tipl_ray.evaluate import figures
    from tipl_ray.evaluate.metrics import Resampling

    context.claim("collect", "collecting trials")
    with waiting("collect: logging the learning curves to MLflow"), context.run("collect", key) as run:
        run.log_parameters({"collect": as_table(settings), "ppo": as_table(experiment.ppo), "engine": engine})
        steps, mean_T = mean_curve(curves)
        run.log_history("episodic_return_mean", steps, mean_T)
        run.log_metrics({"final_episodic_return_mean": final, "num_weights": header.num_weights})
        log_data(experiment, run)
        drawing = {"learning_curves": lambda: figures.learning_curves(curves, Resampling.of(experiment.evaluate))}
        for name, figure in _those_with_data("collect", drawing).items():
            run.log_figure(figure, name)


def run_train(context: Context) -> None:
    """Train the models that are missing, and write down what they were trained for."""
    train_missing(context)
    remember_training(context.experiment)


def train_missing(context: Context) -> None:
    """Train the Transformer, once for each seed, and log every iteration and the model."""
    experiment = context.experiment
    sets = data_sets(experiment)
    if not experiment.train.data:
        data_digest(experiment)  # refuses what is not complete
    for one in sets:
        say_left_out("train", one.storage, one.seeds)
    cut = [one.parts for one in sets]
    say(
        f"train: {sum(len(seeds) for seeds, _, _ in cut)} training and {sum(len(seeds) for _, seeds, _ in cut)} "
        f"validation trials of {', '.join(one.task for one in sets)}, preset {experiment.preset}, basis "
        f"{representation_of(experiment.basis)}, context {experiment.model.context}, {experiment.train.num_steps:,} "
        f"steps of {experiment.train.batch_size} windows"
    )
    for run_of_seed in experiment.training_runs:
        _train_one(context, run_of_seed)


def _train_one(context: Context, experiment: Experiment) -> None:
    begin = time.monotonic()
    data = training_digest(experiment)
    folder, key = model_folder(experiment, data), f"train-{run_digest(experiment, data)}"
    if is_complete(folder) and context.logged(key):
        say(f"train: already trained, model in {folder}")
        return
    context.claim(key, "training this model")
    seed = f" seed {experiment.train.seed}" if len(context.experiment.training_runs) > 1 else ""
    with ProgressView() as view:

        def show(phase: str) -> None:
            view.show([], f"train: {phase}, {duration(time.monotonic() - begin)} elapsed")

        if not is_complete(folder):
            show("starting Ray")
            # Ray's start is a wait for other processes, and torch takes a second or two.
            threading.Thread(target=importlib.import_module, args=("torch",)).start()
            context.connect()
        with context.run(f"train {experiment.preset}{seed}", key) as run:
            _train_and_log(experiment, run, data, show, view.wait)
    say(f"train: model in {folder}, {duration(time.monotonic() - begin)}")


def _train_and_log(
    experiment: Experiment, run: Run, data: str, show: Callable[[str], None], wait: Callable[[str], None]
) -> None:
    from tipl_ray.evaluate import figures
    from tipl_ray.train.ray_train import train
    from tipl_ray.train.training import load_history

    run.log_parameters({name: as_table(getattr(experiment, name)) for name in ("basis", "split", "model", "train")})
    for one in data_sets(experiment):
        run.log_dataset(f"{one.task} trajectories", one.digest, join(one.storage, "trajectories"), profile={})

    def log(metrics: dict[str, float]) -> None:
        told = ("loss", "validation_loss", "validation_skill", "learning_rate", "steps_per_second")
        run.log_metrics({name: metrics[name] for name in told}, step=int(metrics["step"]))

    def show_and_log(metrics: dict[str, float]) -> None:
        wait(f"train: step {int(metrics['step']):,} of {experiment.train.num_steps:,} done")
        log(metrics)

    folder = train(experiment, data, on_metrics=show_and_log, on_phase=show, say=lambda line: say(f"train: {line}"))
    wait("train: logging the model to MLflow")
    history = load_history(folder)
    for metrics in history:
        log(metrics)
    run.log_figure(figures.training_curves(history), "training_curves")
    with tempfile.TemporaryDirectory() as copy:
        for name in Storage(folder).sizes():
            Path(copy, name).write_bytes(read_file(folder, name))
        run.log_model_folder(copy)


def trained_models(experiment: Experiment) -> list[str]:
    """Folders of the trained models, one for each seed. Raises StoreError where one is missing."""
    data, folders = training_digest(experiment), []
    for one in experiment.training_runs:
        folders.append(model_folder(one, data))
        if not is_complete(folders[-1]):
            raise missing_model(one, data)
    return folders


def run_evaluate(context: Context) -> None:
    """Evaluate the trained models on the test trials: result table, figures, report."""
    from tipl_ray.evaluate import report
    from tipl_ray.evaluate.evaluation import evaluate, evaluation_folder, is_evaluated

    experiment = context.experiment
    data_digest(experiment)  # refuses what is not complete
    models = trained_models(experiment)
    settings = experiment.evaluate
    say_left_out("evaluate", experiment.storage_path, experiment.test_seeds)
    data = DataSet(storage=experiment.storage_path, seeds=experiment.collect.seeds, split=experiment.split)
    num_test_trials = len(data.parts[2])
    say(
        f"evaluate: {num_test_trials} test trial{'s' * (num_test_trials != 1)}, forward steps h = 1 to "
        f"{settings.horizon}, {settings.episodes} episodes per policy at {settings.windows_per_trial} windows per trial"
    )
    begin = time.monotonic()
    folder = evaluation_folder(experiment, models)
    key, found = f"evaluate-{last_name(folder)}", is_evaluated(folder)
    with ProgressView() as view:
        if found:
            say(f"evaluate: already evaluated, result table in {folder}")
        else:
            context.claim(key, "making this evaluation")
            view.show([], "evaluate: starting Ray")
            context.connect()
            view.show([], "evaluate: fitting the predictors on the training trials")
        evaluation = evaluate(
            experiment, models, lambda done, total: view.show([], f"evaluate: {done} of {total} tasks done")
        )
        view.wait("evaluate: drawing the figures and logging them to MLflow")
        _publish(context, evaluation, models, found)
    say(f"evaluate: results and figures in {evaluation.folder}, {duration(time.monotonic() - begin)}")
    answers = report.headline(
        evaluation.summary, settings.confidence, comparisons=evaluation.comparisons, groups=evaluation.groups
    )
    say_end(experiment.storage_path, evaluation.folder, answers)


def _publish(context: Context, evaluation: Evaluation, models: list[str], found: bool) -> None:
    """Log an evaluation with its figures and report, and put both into its folder, unless that was done before."""
    experiment, key = context.experiment, f"evaluate-{last_name(evaluation.folder)}"
    if not (found and file_exists(evaluation.folder, REPORT_FILE) and context.logged(key)):
        context.claim(key, "making this evaluation")
        with context.run(f"evaluate {experiment.preset}", key) as run:
            run.log_parameters({"evaluate": as_table(experiment.evaluate), "model": ", ".join(models)})
            log_data(experiment, run)
            for row in evaluation.summary:
                values = {f"{name}/{row['predictor']}": row[name] for name in ("skill", "wpe", "repw")}
                run.log_metrics(values, step=row["step"])
            pictures = _draw(context, evaluation, models[0])
            for name, picture in pictures.items():
                run.log_figure(picture, name)
                write_file(join(evaluation.folder, "figures"), f"{name}.png", picture)
            page = _report(context, evaluation, models, pictures).encode()
            run.log_file(page, REPORT_FILE)
            write_file(evaluation.folder, REPORT_FILE, page)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """One stage of the pipeline."""

    check: Callable[[Context], bool]
    """Whether its work is found done; refuses, in a second or two, what could not be done."""
    run: Callable[[Context], None]
    modules: tuple[str, ...] = ()
    """What its own process needs first, and takes a second or more to load."""


SLOW = ("torch", "tipl_ray.evaluate.figures")
STAGES = {
    "collect": Stage(check=check_collect, run=run_collect),
    "train": Stage(check=check_train, run=run_train, modules=SLOW),
    "evaluate": Stage(check=check_evaluate, run=run_evaluate, modules=SLOW),
}


def run_stages(experiment: Experiment, names: Sequence[str]) -> None:
    """Run stages in order on the Ray cluster at hand, or on this machine; the whole of a job.

    What can be refused is refused before MLflow is opened, and Ray is started for work that is not found done, both at
    once. Exits with status 1 and one line on standard error for what the user can fix, 130 if interrupted.
    """
    with exit_status(), contextlib.ExitStack() as until_the_end:
        context = Context(experiment, until_the_end)
        with ProgressView() as view:
            view.wait("checking the experiment and its storage")
            check_job(experiment)
            if experiment.train.data:
                data_sets(experiment)  # refuses those that are missing before anything else is collected
            first = next((name for name in names if not STAGES[name].check(context)), None)
            view.wait("opening MLflow and starting Ray" if first else "opening MLflow")
            if first:
                context.connect(STAGES[first].modules)
            tracker = context.tracker  # one that cannot be used is refused before hours of work
            if first == "collect" and "train" in names:
                from tipl_ray.train.workers import require_workers

                require_workers(experiment)  # now, and not when all is collected
        for name in names:
            STAGES[name].run(context)
        say_whole(f"MLflow: {ui_command(tracker.uri, tracker.experiment_id)}")


def say_end(storage: str, folder: str, answers: Sequence[Answer]) -> None:
    """The end of a run: its findings in a few lines, and the link to its report, to which `latest` now leads too."""
    for answer in answers:
        say(answer.line)
    make_latest(storage, folder)
    say_whole(f"report: {link_to(folder, REPORT_FILE)}")


def data_digest(experiment: Experiment) -> str:
    """Digest of the experiment's complete data set. Raises StoreError where it is not complete, or is another's."""
    store = TrajectoryStore(experiment.storage_path)
    there = store.seeds()
    if there:
        _refuse_other_experiment(experiment, store.header(there[:1]))
    if not set(there).issuperset(experiment.collect.seeds):
        raise _incomplete(experiment, sorted(set(experiment.collect.seeds) - set(there)), there)
    from tipl_ray.collect.collection import pending_seeds

    missing = pending_seeds(experiment, store)
    if missing or not store.finished():
        raise _incomplete(experiment, missing, there)
    return store.digest(experiment.collect.seeds)


def _incomplete(experiment: Experiment, missing: Sequence[int], there: Sequence[int]) -> StoreError:
    """The error for missing trials: which were asked for, which there are, and how to ask for those."""
    asked = experiment.collect
    if not missing:
        return StoreError(
            f"{experiment.storage_path}: all {asked.num_trials} trials are there, but not sealed as a complete data "
            "set; run jobs/collect.py with the same experiment once more, which verifies and seals them"
        )
    if not there:
        return StoreError(
            f"{experiment.storage_path}: no trial has been collected there; run jobs/collect.py with this storage and "
            "experiment first, or name another with --storage"
        )
    start = f"{experiment.storage_path}: {len(missing)} of {asked.num_trials} trials are not complete"
    others = sorted(set(there) - set(asked.seeds))
    if not others:
        return StoreError(f"{start}; run jobs/collect.py with the same experiment first")
    from tipl_ray.collect.group import name_trials

    in_a_row = there[-1] - there[0] + 1 == len(there)
    ask = f"ask for these with --collect.first-seed {there[0]} --collect.num-trials {len(there)}, or "
    return StoreError(
        f"{start}: seeds {name_trials(asked.seeds)} are asked for, and there are trials of seeds {name_trials(there)}; "
        f"{ask if in_a_row else ''}run jobs/collect.py with the same experiment first"
    )


def _refuse_other_experiment(experiment: Experiment, header: Header) -> None:
    """Raises StoreError where the trials were collected with other settings than the experiment's, naming them."""
    made = {"algorithm": "ppo", **header.config}
    if header.columns != PPO_COLUMNS:
        raise StoreError(
            f"{experiment.storage_path}: its trials were recorded by another program (task={header.task!r}), and "
            "this job needs trials of jobs/collect.py. docs/recording.md shows how to analyse recorded ones; or use "
            "another --storage"
        )
    if "policy_hidden" not in made:
        return  # not from jobs/collect.py: nothing is recorded that could differ
    here = as_table(experiment)
    ppo, jump = made.pop("ppo", {}), dict(made.pop("jump", {}))
    jump.pop("predictor", None)  # a digest, which means nothing to a reader
    for field in ("engine", "iterations_per_commit", "source"):  # of no account to who reads the trials
        made.pop(field, None)
    # What is not recorded came later, or was at its default.
    there = {"collect": {"task": header.task, **made}, "ppo": as_table(Ppo()) | ppo if ppo else ppo, "jump": jump}
    asked = {"collect": {field: here["collect"].get(field) for field in there["collect"]}, "ppo": here["ppo"]}
    before, now = dict(flat(there)), dict(flat(asked))
    fields = [name for name in now | before if before.get(name) != now.get(name)]
    if fields:
        told = ", ".join(f"{name}={before.get(name)!r} there, {now.get(name)!r} here" for name in fields)
        raise StoreError(
            f"{experiment.storage_path}: its trials were collected with other settings: {told}. Use the experiment "
            "that they were collected with, or another --storage"
        )


def say_left_out(stage: str, storage: str, seeds: Sequence[int]) -> None:
    """Print a line for each of these trials that diverged."""
    for divergence in TrajectoryStore(storage).divergences(seeds).values():
        say(f"{stage}: {divergence}; it is left out")


def learning_curves(experiment: Experiment) -> list[tuple[int, np.ndarray, np.ndarray]]:
    """Per trial: seed, env steps, mean return of the episodes that ended in each iteration; the last known, if none.

    Trials that diverged are left out.
    """
    store, curves = TrajectoryStore(experiment.storage_path), []
    first = slice(1, None, experiment.snapshots_per_iteration)  # an iteration's episodes stand at its first snapshot
    for seed in store.sound(experiment.collect.seeds):
        trial = store.trajectory(seed, columns=["env_step", "episodic_return"])
        curves.append((seed, trial.env_steps_T[first], last_known(trial.episodic_returns_T[first])))
    return curves


def mean_curve(curves: Sequence[tuple[int, np.ndarray, np.ndarray]]) -> tuple[list[int], list[float | None]]:
    """Env steps, and the mean return over the trials in which an episode had ended by then; None where in none had."""
    returns_NT = np.stack([returns_T for _, _, returns_T in curves])
    known_T = np.isfinite(returns_NT).sum(axis=0)
    sums_T = np.nansum(returns_NT, axis=0)
    means = [float(total / known) if known else None for total, known in zip(sums_T, known_T, strict=True)]
    return [int(step) for step in curves[0][1]], means


JUMP_OF_BEFORE = {
    **{"predictor": None, "horizon": 3, "damping": 1.0, "networks": "policy", "moments": "kept", "gate": False},
    "limit": 3.0,
}
"""A section that experiments once had: runs that were logged then are still found."""


def essence(experiment: Experiment) -> dict:
    """What distinguishes pipelines: the name, and the part of the identity that some stage reads."""
    elsewhere = ("accelerate", "improve", "sweep")
    table = {section: part for section, part in identity(experiment).items() if section not in elsewhere}
    return {"name": experiment.name, "jump": JUMP_OF_BEFORE, **table}


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
    from tipl_ray.collect.group import name_trials

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
    actors = f"{len(running)} actor{'s' * (len(running) != 1)}"
    finished = sum(len(group.seeds) for group in groups if group.finished)
    diverged = sum(len(group.diverged) for group in groups)
    view.show(
        rows,
        f"collect: {finished} of {sum(len(group.seeds) for group in groups)} trials done"
        f"{f', {diverged} diverged' if diverged else ''}, {done:,} of {total:,} env steps"
        f"{f', {rate:,.0f} env steps/s on {actors}' if running else ''}, {duration(seconds)} elapsed"
        f"{f', {left} left' if left != '?' else ''}",
    )


def _left(seconds: float) -> str:
    return duration(seconds) if np.isfinite(seconds) else "?"


def _draw(context: Context, evaluation: Evaluation, model: str) -> dict[str, bytes]:
    """The pictures that the report shows, as PNG."""
    from tipl_ray.drawing import png
    from tipl_ray.evaluate import figures
    from tipl_ray.evaluate.metrics import Resampling
    from tipl_ray.train.training import load_history

    results, summary = evaluation.results, evaluation.summary
    resampling = Resampling.of(context.experiment.evaluate)
    drawing: dict[str, Callable[[], Figure]] = {
        "figure_2": lambda: figures.figure_2(results, summary),
        "skill_by_step": lambda: figures.skill_by_step(summary),
        "skill_over_ridge": lambda: figures.skill_over_ridge(evaluation.comparisons),
        **({} if evaluation.paths is None else {"paths": functools.partial(figures.paths, evaluation.paths)}),
        "skill_by_phase": lambda: figures.skill_by_group(evaluation.groups, "phase"),
        "skill_by_third": lambda: figures.skill_by_group(evaluation.groups, "third"),
        "spread": lambda: figures.spread(summary),
        "reconstruction": lambda: figures.reconstruction(evaluation.reconstruction),
        "training_curves": lambda: figures.training_curves(load_history(model)),
        "learning_curves": lambda: figures.learning_curves(learning_curves(context.experiment), resampling),
    }
    if not context.experiment.evaluate.run_policies_of:
        del drawing["spread"]
    drawn = _those_with_data("evaluate", drawing)
    return {name: png(figure) for name, figure in drawn.items()}


def _those_with_data(stage: str, drawing: Mapping[str, Callable[[], Figure]]) -> dict[str, Figure]:
    """The figures that there is data for; prints why each of the others is left out."""
    drawn = {}
    for name, draw in drawing.items():
        try:
            drawn[name] = draw()
        except ValueError as error:
            say(f"{stage}: no figure {name!r}: {error}")
    return drawn


def _report(context: Context, evaluation: Evaluation, models: list[str], pictures: dict[str, bytes]) -> str:
    from tipl_ray.evaluate import report

    experiment = context.experiment
    return report.page(
        title=f"TIPL on {experiment.collect.task}: {experiment.name}",
        summary=evaluation.summary,
        pictures=pictures,
        facts={
            "trials": experiment.collect.num_trials,
            "snapshots per trial": f"{experiment.num_snapshots:,}",
            "policy weights": f"{int(evaluation.results['num_weights'][0]):,}",
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
