"""Accelerate: contenders with and without jumps, trained side by side on seeds that nothing was fitted on.

Each contender's learning rate is chosen by a grid on seeds of its own, the same for all of them; the best one then runs
on the seeds that are reported. A unit of work, one contender at one learning rate on one task, is one stack of trials
in one Ray task, committed to a data set of its own: whatever is killed goes on from its last commits.

    <storage>/predictors/<digest>/<name>/    what the jumps are made of, fitted on another experiment's trials
    <storage>/units/<digest>/unit.json       a unit's learning curves; beside it its trials while it runs
    <storage>/accelerations/<digest>/        table.csv, curves.csv, search.csv, tasks.csv,
                                             report.html, figures/
"""

import dataclasses
import json
import shutil
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import ray
from matplotlib.figure import Figure

from tipl_ray import pages
from tipl_ray.accelerate import contenders, figures
from tipl_ray.accelerate.contenders import (
    TIPL,
    Contender,
    Finished,
    Fitted,
    Row,
    Unit,
    comparable,
    filled,
    jump_question,
    unit_table,
)
from tipl_ray.accelerate.group_jumps import GroupJumps, Jumps
from tipl_ray.collect.collection import pending_seeds
from tipl_ray.collect.crew import require_seat, seat_resources
from tipl_ray.collect.group import GroupCollector
from tipl_ray.config import Experiment
from tipl_ray.data.locks import only_one
from tipl_ray.data.storage import (
    StoreError,
    file_exists,
    join,
    last_name,
    local_folder,
    publish,
    read_published,
    write_file,
)
from tipl_ray.data.trajectory_store import TrajectoryStore
from tipl_ray.digest import as_table, digest
from tipl_ray.drawing import png
from tipl_ray.errors import UserError
from tipl_ray.evaluate.metrics import Resampling, interquartile_mean
from tipl_ray.experiments import load_experiment
from tipl_ray.jobs import check_job, connected_to_ray, exit_status, open_tracker
from tipl_ray.pages import as_csv
from tipl_ray.ppo.algorithms import NOTHING
from tipl_ray.ppo.engines import ENGINES, choose_engine
from tipl_ray.predict.saved import load_predictor, predictor_digest
from tipl_ray.terminal import ProgressView, duration, say, say_rows
from tipl_ray.tracking import Run, Tracker, ui_command
from tipl_ray.train.data_sets import model_folder

UNIT_FILE, UNIT_RECORD = "unit.json", "unit.sha256"
Cell = tuple[str, int, Contender]
"""Task, environment steps and contender: what one row of the table stands for."""
SLICE_SECONDS = 5.0
"""Seconds of work between two looks at whether a unit has run."""


class AccelerationError(UserError):
    """A unit has nothing to compare: says why, and the way out."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What is to be run, and by which predictors."""

    experiment: Experiment
    source: Experiment
    predictors: dict[str, Fitted]
    """By name."""
    engine: str

    @property
    def digest(self) -> str:
        """What the results depend on, and nothing that says where anything lies."""
        one, engine = self.experiment, ENGINES[self.engine]
        run = contenders.collection_identity(one.collect) | {"engine": engine}
        answers = {name: one.digest for name, one in self.predictors.items()}
        return digest(one.accelerate, run, one.ppo, one.evaluate.confidence, answers)

    def of(self, unit: Unit) -> Experiment:
        """The experiment that a unit runs."""
        return unit.experiment(self.experiment, self.jumps(unit))

    def jumps(self, unit: Unit) -> Jumps | None:
        """The jumps of a unit; None where its contender has none."""
        return unit.jumps(self.source, self.predictors)


def run_acceleration(experiment: Experiment) -> None:
    """Search, train and compare every contender on every task; the whole of a job.

    Exits with status 1 and one line on standard error for what the user can mend, 130 when interrupted.
    """
    with exit_status():
        check_job(experiment)
        named = [Contender.parse(name) for name in experiment.accelerate.contenders]
        source = source_experiment(experiment)
        tracker = open_tracker(experiment)
        with connected_to_ray():
            engine = choose_engine(experiment.collect.engine, experiment.ppo)
            require_seat(experiment, engine, "unit")
            plan = Plan(
                experiment=experiment,
                source=source,
                predictors=find_predictors(experiment, source, named),
                engine=engine,
            )
            begin, key = time.monotonic(), plan.digest
            claim = only_one(experiment.storage_path, f"accelerate-{key}", "running this acceleration")
            with claim, tracker.run("accelerate", f"accelerate-{key}", tags={"experiment": experiment.name}) as run:
                run.log_parameters({"accelerate": as_table(experiment.accelerate), "ppo": as_table(experiment.ppo)})
                finished, searched = _run_units(plan, named, tracker, run)
                _report(plan, finished, searched, join(experiment.storage_path, "accelerations", key), run)
            say(f"accelerate: {duration(time.monotonic() - begin)}")
            say(f"MLflow: {ui_command(tracker.uri, tracker.experiment_id)}")


def source_experiment(experiment: Experiment) -> Experiment:
    """The experiment that predictors come from. Raises FileNotFoundError or ValueError where there is none such."""
    where = experiment.where
    source = load_experiment(where.predictors_from, preset="causal")
    return source.at(where.predictors_storage or source.where.storage).check("train")


def find_predictors(experiment: Experiment, source: Experiment, named: Sequence[Contender]) -> dict[str, Fitted]:
    """Every predictor that a contender needs, by name, fitted now where it was not before.

    Rules, which learn nothing, need no trials. Raises StoreError where others need the source's trials or its trained
    model, and these are missing.
    """
    wanted: dict[str, int] = {}
    for one in named:
        if one.predictor:
            # The furthest that any contender jumps with it: nearer steps are answered too.
            wanted[one.predictor] = max(one.jump_settings(source).horizon, wanted.get(one.predictor, 0))
    learned = {one.predictor: one.name for one in named if one.learned}
    data = _source_digest(source, next(iter(learned.values()))) if learned else None
    folders: dict[str, str] = {}
    for horizon in sorted(set(wanted.values())):
        names = [name for name, own in wanted.items() if own == horizon and name != TIPL]
        fitted, question = [name for name in names if name in learned], jump_question(source, horizon)
        rules = join(experiment.storage_path, "predictors", digest(question))
        folders |= {name: join(rules, name) for name in names}
        if fitted:
            fits = join(
                experiment.storage_path, "predictors", digest(data, source.split, source.model.context, horizon)
            )
            folders |= {name: join(fits, name) for name in fitted}
        missing = [name for name in names if not file_exists(folders[name], "predictor.json")]
        contenders.save_rules(question, [name for name in missing if name not in learned], rules)
        if missing := [name for name in missing if name in learned]:
            say(f"accelerate: fitting {', '.join(missing)} on the trials of {source.name}")
            _result(ray.remote(contenders.fit_and_save).remote(source, horizon, missing, fits))
    if TIPL in wanted:
        folders[TIPL] = model_folder(source, str(data))
        if not file_exists(folders[TIPL], "model.json"):
            raise StoreError(
                f"{folders[TIPL]}: no trained model of {source.name} is there; run jobs/train.py --preset causal with "
                "that experiment first"
            )
    return {
        name: Fitted(predictor=load_predictor(folder), digest=predictor_digest(folder))
        for name, folder in folders.items()
    }


def _source_digest(source: Experiment, contender: str) -> str:
    """Digest of the trials that predictors are fitted on. Raises StoreError where they are not all there."""
    store = TrajectoryStore(source.storage_path)
    missing = pending_seeds(source, store)
    if missing or not store.finished():
        raise StoreError(
            f"{source.storage_path}: contender {contender!r} learns from the {source.collect.num_trials} trials of "
            f"{source.name}, the experiment of predictors_from, and {len(missing)} of them are not complete "
            "there; collect that experiment first, or leave out the contenders that learn"
        )
    return store.digest(source.collect.seeds)


def _result(reference: ray.ObjectRef) -> Any:
    """What a task returned. Raises what it raised, AccelerationError where its process was killed again and again."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    except ray.exceptions.WorkerCrashedError as error:
        raise AccelerationError(
            "a unit's process was killed four times, as happens where memory runs out; give units_at_once a "
            "lower value, and the same command goes on from the last commits"
        ) from error


def has_run(folder: str) -> bool:
    """Whether a unit's learning curves are there, as they were written; damaged ones are made again."""
    if not file_exists(folder, UNIT_FILE):
        return False
    try:
        json.loads(_read_unit(folder))
    except (StoreError, ValueError):
        say(f"accelerate: {join(folder, UNIT_FILE)} is damaged, and the unit is run again")
        return False
    return True


def _read_unit(folder: str) -> bytes:
    return read_published(folder, UNIT_FILE, UNIT_RECORD, "delete it, and the same command runs the unit again")


def run_unit(experiment: Experiment, engine: str, jumps: Jumps | None = None) -> None:
    """Run every trial of a unit, from its last commits, and write its learning curves; nothing if they are there."""
    folder = experiment.storage_path
    if has_run(folder):
        return
    # Of this thread alone: a Ray worker has others, which wait for messages.
    extension = jumps or NOTHING
    collector, begin = GroupCollector(experiment, engine, extension=extension), time.thread_time()
    progress = before = collector.start(experiment.collect.seeds)
    while not progress.finished:
        progress = collector.advance(SLICE_SECONDS)
    # What was run before a kill took its time elsewhere: the share run here stands for all of it.
    share_here = (progress.env_steps - before.env_steps) / progress.total_env_steps
    seconds = (time.thread_time() - begin) / share_here if share_here else None
    store, iterations = TrajectoryStore(folder), experiment.num_iterations
    diverged = store.divergences(experiment.collect.seeds)
    first = slice(
        1, None, extension.snapshots_per_iteration(experiment)
    )  # an iteration's episodes stand at its first snapshot
    returns = []
    for seed in experiment.collect.seeds:
        whole = diverged[seed].iteration if seed in diverged else iterations
        known_I = store.trajectory(seed, columns=["episodic_return"]).episodic_returns_T[first][:whole]
        returns.append([None if np.isnan(value) else float(value) for value in known_I])
    table: dict[str, Any] = {
        "returns": returns,
        "diverged": sorted(diverged),
        "env_steps": (experiment.ppo.num_steps * np.arange(1, iterations + 1)).tolist(),
        "cpu_seconds": seconds,
        "jump_counts": _jump_counts(collector),
        "experiment": unit_table(experiment, jumps),
    }
    publish(folder, {UNIT_FILE: json.dumps(table).encode()}, UNIT_RECORD)


def _jump_counts(collector: GroupCollector) -> list[int]:
    """Jumps taken, dropped by the gate, and refused, over the trials that have not diverged; empty without jumps."""
    hooks = collector.hooks
    return hooks.counts_K3.sum(axis=0).tolist() if isinstance(hooks, GroupJumps) else []


def load_unit(plan: Plan, unit: Unit) -> Finished:
    """A unit that has run. Raises AccelerationError where no episode of a trial ended."""
    experiment = plan.of(unit)
    table = json.loads(_read_unit(experiment.storage_path))
    env_steps_I, diverged = np.array(table["env_steps"]), table.get("diverged", [])
    returns_SI = np.full((len(table["returns"]), len(env_steps_I)), np.nan)
    for seed, returns_I, known in zip(experiment.collect.seeds, returns_SI, table["returns"], strict=True):
        curve_1I = np.array([known], dtype=np.float64)
        if not np.isnan(curve_1I).all():
            returns_I[: len(known)] = filled(curve_1I)[0]
        elif seed not in diverged:
            raise AccelerationError(
                f"{unit.task}, contender {unit.contender.name!r}: no episode of trial {seed} ended within "
                f"{env_steps_I[-1]:,} env steps, so there is no return to compare; give the task more steps, as in "
                f"{unit.task}@{10 * env_steps_I[-1]}"
            )
    per_iteration = experiment.ppo.num_epochs * experiment.ppo.num_minibatches
    return Finished(
        unit=unit,
        returns_SI=returns_SI,
        env_steps_I=env_steps_I,
        gradient_steps_I=per_iteration * np.arange(1, len(env_steps_I) + 1),
        cpu_seconds=float("nan") if table["cpu_seconds"] is None else table["cpu_seconds"],
        jump_counts=table["jump_counts"],
        num_diverged=len(diverged),
    )


def _run_units(
    plan: Plan, named: Sequence[Contender], tracker: Tracker, parent: Run
) -> tuple[list[Finished], list[Finished]]:
    """Every contender on the reported seeds at its best learning rate, and all that the search for it ran.

    Task by task, in the contenders' order.
    """
    settings = plan.experiment.accelerate
    cells = [(*_task(plan.experiment, name), contender) for name in settings.tasks for contender in named]
    searches = {cell: [_unit(cell, rate, search=True) for rate in settings.learning_rates] for cell in cells}
    finals: dict[Cell, Unit] = {}
    waiting = [unit for units in searches.values() for unit in units]
    total = len(waiting) + len(cells)
    running: dict[ray.ObjectRef, Unit] = {}
    ran: set[Unit] = set()
    limit = plan.experiment.where.units_at_once or max(1, int(ray.cluster_resources().get("CPU", 1)))

    def settle(unit: Unit) -> None:
        """Log a unit that has run; the last one of a search decides what is reported."""
        ran.add(unit)
        _log_unit(plan, load_unit(plan, unit), tracker, parent)
        cell = (unit.task, unit.env_steps, unit.contender)
        if unit.search and ran.issuperset(searches[cell]):
            rate = contenders.best_learning_rate([load_unit(plan, one) for one in searches[cell]])
            finals[cell] = _unit(cell, rate, search=False)
            waiting.insert(0, finals[cell])

    needs = seat_resources(plan.experiment, plan.engine)
    send: Any = ray.remote(num_cpus=needs["CPU"], num_gpus=needs.get("GPU", 0), max_retries=3)(run_unit)
    with ProgressView() as view:
        while waiting or running:
            while waiting and len(running) < limit:
                unit = waiting.pop(0)
                if has_run(plan.of(unit).storage_path):
                    settle(unit)
                else:
                    running[send.remote(plan.of(unit), plan.engine, plan.jumps(unit))] = unit
            ready, _ = ray.wait(list(running), num_returns=1, timeout=1.0) if running else ([], [])
            for reference in ready:
                _result(reference)
                settle(running.pop(reference))
            now = ", ".join(f"{unit.contender.name} at {unit.learning_rate:g}" for unit in running.values())
            view.show([], f"accelerate: {len(ran)} of {total} units done; running {now or 'none'}")
    finished = [load_unit(plan, finals[cell]) for cell in cells]
    return finished, [load_unit(plan, unit) for cell in cells for unit in searches[cell]]


def _unit(cell: Cell, learning_rate: float, *, search: bool) -> Unit:
    task, env_steps, contender = cell
    return Unit(task=task, env_steps=env_steps, contender=contender, learning_rate=learning_rate, search=search)


def _task(experiment: Experiment, name: str) -> tuple[str, int]:
    """Task and environment steps of `TASK` or `TASK@STEPS`."""
    task, _, steps = name.partition("@")
    return task, int(steps) if steps else experiment.collect.total_env_steps


def _log_unit(plan: Plan, one: Finished, tracker: Tracker, parent: Run) -> None:
    """A child run per unit, and its snapshots' end."""
    experiment, unit = plan.of(one.unit), one.unit
    name = f"{unit.task} {unit.contender.name} {unit.learning_rate:g}{' search' if unit.search else ''}"
    tags = {"task": unit.task, "contender": unit.contender.name, "search": str(unit.search)}
    with tracker.run(name, f"unit-{last_name(experiment.storage_path)}", parent=parent, tags=tags) as run:
        run.log_parameters(unit_table(experiment, plan.jumps(unit)))
        run.log_metrics({"cpu_seconds": one.cpu_seconds, "diverged": one.num_diverged})
        (whole,) = comparable([one])
        if np.isfinite(whole.returns_SI).all():
            middle_I = interquartile_mean(whole.returns_SI.T)
            run.log_history("return_iqm", one.env_steps_I.tolist(), middle_I.tolist())
            run.log_metrics({"auc": float(whole.areas_S.mean()), "final_return": float(whole.finals_S.mean())})
            run.log_metrics({"collapsed": whole.num_collapsed})
    folder = local_folder(experiment.storage_path)
    if folder and not plan.experiment.where.keep_weights:
        for name in ("trajectories", "commits"):
            shutil.rmtree(folder / name, ignore_errors=True)


def _report(plan: Plan, finished: Sequence[Finished], searched: Sequence[Finished], folder: str, run: Run) -> None:
    experiment, finished = plan.experiment, comparable(finished)
    if unknown := [one.unit.task for one in finished if np.isnan(one.returns_SI).any()]:
        raise AccelerationError(
            f"{unknown[0]}: every trial of every contender diverged before an episode ended, so there is nothing to "
            f"compare; lower accelerate.learning_rates={experiment.accelerate.learning_rates}"
        )
    resampling = Resampling(
        confidence=experiment.evaluate.confidence, bootstrap=experiment.accelerate.bootstrap, seed=0
    )
    rows = contenders.score(finished, plan.source.collect.task, resampling)
    rates = contenders.search_rows(searched)
    together = contenders.over_tasks(finished, resampling)
    tables = {"table": rows, "search": rates, "tasks": together, "curves": _curve_rows(finished)}
    for name, table in tables.items():
        write_file(folder, f"{name}.csv", as_csv(table))
    lines = contenders.sentences(rows, resampling.confidence)
    lines += contenders.sentences_over_tasks(together, len({(row["task"], row["env_steps"]) for row in rows}))
    shown = []
    for name, (heading, sentence, figure) in _draw(finished, rows, rates, resampling).items():
        picture = png(figure)
        run.log_figure(picture, name)
        write_file(join(folder, "figures"), f"{name}.png", picture)
        shown.append((heading, sentence, pages.embedded(picture)))
    page = pages.page(
        "acceleration.html",
        title="Update epochs replaced by inference",
        facts=_facts(plan, rows),
        sentences=lines,
        pictures=shown,
        rows=contenders.table(rows),
        confidence=f"{resampling.confidence:.0%}",
        files={name: join(folder, f"{name}.csv") for name in tables},
    ).encode()
    run.log_file(page, "report.html")
    write_file(folder, "report.html", page)
    say_rows(contenders.table(rows))
    for line in lines:
        say(line)
    say(f"accelerate: table, curves and report in {folder}")


def _facts(plan: Plan, rows: Sequence[Row]) -> dict[str, Any]:
    """The few figures of the report's head."""
    return {
        "tasks": len({row["task"] for row in rows}),
        "contenders": len({row["contender"] for row in rows}),
        "trials of each": plan.experiment.collect.num_trials,
        "predictors from": plan.source.collect.task,
    }


def _draw(
    finished: Sequence[Finished], rows: Sequence[Row], rates: Sequence[Row], resampling: Resampling
) -> dict[str, tuple[str, str, Figure]]:
    """Heading, sentence and figure of every picture, by its file's name."""
    drawn = {
        "acceleration_areas": (
            "Areas under the curve",
            "Filled where the interval of the difference does not include 0.",
            figures.areas(rows),
        ),
        "acceleration_learning_rates": (
            "Areas by learning rate, in the search",
            "The chosen rates are the large points.",
            figures.learning_rates(rates),
        ),
    }
    for task, env_steps in dict.fromkeys((one.unit.task, one.unit.env_steps) for one in finished):
        own = [one for one in finished if (one.unit.task, one.unit.env_steps) == (task, env_steps)]
        curves = {one.unit.contender.name: (one.env_steps_I, one.returns_SI) for one in own}
        title = f"{task}, {len(own[0].returns_SI)} trials"
        drawn[f"acceleration_{task.removesuffix('-v4')}_{env_steps}"] = (
            title,
            f"Interquartile mean over trials; bands are {resampling.confidence:.0%} intervals.",
            figures.contenders(curves, title, resampling),
        )
    return drawn


def _curve_rows(finished: Sequence[Finished]) -> list[dict[str, Any]]:
    """One row per task, contender and iteration: the interquartile mean over trials, and its quartiles."""
    rows = []
    for one in finished:
        low_I, high_I = np.quantile(one.returns_SI, (0.25, 0.75), axis=0)
        for index, middle in enumerate(interquartile_mean(one.returns_SI.T)):
            rows.append(
                {
                    "task": one.unit.task,
                    "contender": one.unit.contender.name,
                    "env_step": int(one.env_steps_I[index]),
                    "return_iqm": round(float(middle), 2),
                    "return_quartile_1": round(float(low_I[index]), 2),
                    "return_quartile_3": round(float(high_I[index]), 2),
                }
            )
    return rows
