"""Accelerate: variants of PPO with and without jumps, compared on seeds that nothing was fitted or tuned on.

Each variant's learning rate, or another field in its place, is chosen by a grid search on separate seeds, the same for
all variants; the best value then runs on the seeds of the results. A unit of work (one variant with one setting on one
task) is one stack of trials in one Ray task, with its own data set: a killed unit continues from its last commits.

    <storage>/predictors/<digest>/<name>/    predictors of the jumps, fitted on another experiment's trials
    <storage>/units/<digest>/                a unit, see units.py
    <storage>/accelerations/<digest>/        table.csv, curves.csv, search.csv, tasks.csv,
                                             report.html, figures/
"""

import contextlib
import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import ray
from matplotlib.figure import Figure

from tipl_ray import pages
from tipl_ray.accelerate import contenders, figures, scores
from tipl_ray.accelerate.contenders import TIPL, Fitted, Unit, unit_table
from tipl_ray.accelerate.scores import Finished, Row, best_value, comparable, predictor_of
from tipl_ray.accelerate.units import AccelerationError, has_run, load_unit, run_unit
from tipl_ray.collect.collection import pending_seeds
from tipl_ray.collect.crew import require_seat, seat_resources
from tipl_ray.config import Contender, Experiment, RunTask, naming
from tipl_ray.data.locks import only_one
from tipl_ray.data.storage import Storage, StoreError, file_exists, join, last_name, write_file
from tipl_ray.data.trajectory_store import TrajectoryStore
from tipl_ray.digest import as_table, digest
from tipl_ray.drawing import png
from tipl_ray.evaluate.metrics import Resampling, interquartile_mean
from tipl_ray.experiments import load_experiment
from tipl_ray.jobs import check_job, connected, exit_status, result_of, side_by_side
from tipl_ray.pages import as_csv
from tipl_ray.ppo.algorithms import Extension
from tipl_ray.ppo.engines import ENGINES, choose_engine
from tipl_ray.predict.gram import Question
from tipl_ray.predict.model_files import is_complete
from tipl_ray.predict.saved import ABOUT_PREDICTOR_FILE as PREDICTOR_FILE
from tipl_ray.predict.saved import load_predictor, predictor_digest
from tipl_ray.terminal import ProgressView, duration, say, say_rows, say_whole
from tipl_ray.tracking import Run, Tracker, ui_command
from tipl_ray.train.data_sets import model_folder, training_digest

Cell = tuple[str, int, Contender]
"""Task, environment steps and variant: one row of the table."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What to run, and with which predictors."""

    experiment: Experiment
    source: Experiment
    predictors: dict[str, Fitted]
    """By the names of their variants."""
    engine: str

    @property
    def digest(self) -> str:
        """Digest of everything that the results depend on; locations are left out."""
        one, engine = self.experiment, ENGINES[self.engine]
        run = contenders.collection_identity(one.collect) | {"engine": engine}
        answers = {name: one.digest for name, one in self.predictors.items()}
        return digest(one.accelerate, run, one.ppo, one.evaluate.confidence, answers)

    @property
    def searched_on(self) -> tuple[str, ...]:
        """Tasks on which one setting is chosen for all tasks; empty if it is chosen per task."""
        return tuple(_task(self.experiment, name)[0] for name in self.experiment.accelerate.search_tasks)

    def of(self, unit: Unit) -> Experiment:
        """The experiment that a unit runs."""
        return unit.experiment(self.experiment, self.source, self.extension(unit))

    def extension(self, unit: Unit) -> Extension:
        """The extension of PPO that a unit runs with."""
        return unit.extension(self.experiment, self.source, self.predictors)

    def load(self, unit: Unit) -> Finished:
        """The results of a finished unit. Raises AccelerationError if no episode of a trial ended."""
        return load_unit(unit, self.of(unit), contenders.epochs_of(unit.contender, self.experiment))


def run_acceleration(experiment: Experiment) -> None:
    """Search, train and compare every variant on every task: all of jobs/accelerate.py.

    Exits with status 1 and one line on standard error for errors that the user can fix, 130 if interrupted.
    """
    with exit_status():
        check_job(experiment)
        named = experiment.accelerate.running
        source = source_experiment(experiment)
        for contender in named:
            if contender.jump:
                with naming("accelerate.contenders"):
                    contenders.jump_settings(contender, experiment, source)
        with connected(experiment) as tracker:
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
            say_whole(f"MLflow: {ui_command(tracker.uri, tracker.experiment_id)}")


def source_experiment(experiment: Experiment) -> Experiment:
    """The experiment that predictors come from. Raises FileNotFoundError or ValueError if there is none or it is
    invalid."""
    where = experiment.where
    source = load_experiment(where.predictors_from, preset="causal")
    return source.at(where.predictors_storage or source.where.storage).check("train")


def find_predictors(experiment: Experiment, source: Experiment, named: Sequence[Contender]) -> dict[str, Fitted]:
    """Every variant's predictor, by the variant's name; those that are not stored yet are fitted.

    Rules need no trials. Raises StoreError if the source's trials or its trained model are needed but missing.
    """
    folders: dict[str, str] = {}
    jumping = [one for one in named if one.jump]
    learning = [one for one in jumping if contenders.is_learned(one)]
    data = _source_digest(source, learning[0].name) if learning else None
    for one in jumping:
        if one not in learning:
            question = contenders.jump_question(one, experiment, source)
            assert one.jump, "it jumps"
            own: list[Any] = [list(one.jump.numbers)] if one.jump.numbers else []
            own += [predictor_digest(one.jump.predictor)] if contenders.published(one.jump) else []
            rule = digest(question, *own)
            folders[one.name] = join(experiment.storage_path, "predictors", rule, predictor_of(one))
            if not file_exists(folders[one.name], PREDICTOR_FILE):
                contenders.save_rule(question, one.jump, folders[one.name])
    missing: dict[str, tuple[Question, list[str]]] = {}
    for one in learning:
        if predictor_of(one) == TIPL:
            folders[one.name] = model_folder(source, training_digest(source))
            if not is_complete(folders[one.name]):
                raise StoreError(
                    f"{folders[one.name]}: there is no trained model of {source.name}; run jobs/train.py --preset "
                    "causal with that experiment first"
                )
            continue
        # The furthest that any variant jumps with it: nearer steps are answered too.
        asked = [
            contenders.jump_question(other, experiment, source)
            for other in learning
            if predictor_of(other) == predictor_of(one)
        ]
        question = max(asked, key=lambda question: question.future)
        made_of = digest(data, source.split, source.model.context, question.future)
        fits = join(experiment.storage_path, "predictors", made_of)
        folders[one.name] = join(fits, predictor_of(one))
        if not file_exists(folders[one.name], PREDICTOR_FILE):
            missing.setdefault(fits, (question, []))[1].append(predictor_of(one))
    for fits, (question, names) in missing.items():
        say(f"accelerate: fitting {', '.join(dict.fromkeys(names))} on the trials of {source.name}")
        result_of(ray.remote(contenders.fit_and_save).remote(source, question, list(dict.fromkeys(names)), fits))
    return {
        name: Fitted(predictor=load_predictor(folder), digest=predictor_digest(folder))
        for name, folder in folders.items()
    }


def _source_digest(source: Experiment, contender: str) -> str:
    """Digest of the trials that predictors are fitted on. Raises StoreError if they are incomplete."""
    store = TrajectoryStore(source.storage_path)
    missing = pending_seeds(source, store)
    if missing or not store.finished():
        raise StoreError(
            f"{source.storage_path}: variant {contender!r} needs a predictor fitted on the "
            f"{source.collect.num_trials} trials of {source.name} (see predictors_from), but {len(missing)} of them "
            "are incomplete; collect that experiment first, or leave out the variants whose predictors are fitted"
        )
    return store.digest(source.collect.seeds)


def _run_units(
    plan: Plan, named: Sequence[Contender], tracker: Tracker, parent: Run
) -> tuple[list[Finished], list[Finished]]:
    """Every variant on the seeds of the results with its best setting, and all search units.

    Task by task, in the variants' order.
    """
    settings = plan.experiment.accelerate
    tasks = [_task(plan.experiment, name) for name in settings.tasks]
    cells = [(*task, contender) for task in tasks for contender in named]
    # One search for all tasks of a variant, or one for each.
    searches = {cell: _search(plan.experiment, cell) for cell in cells}
    finals: dict[Cell, Unit] = {}
    every = list(dict.fromkeys(unit for contender in named for task in tasks for unit in searches[*task, contender]))
    waiting, total = list(every), len(every) + len(cells)
    ran: set[Unit] = set()
    limit = plan.experiment.where.units_at_once or max(1, int(ray.cluster_resources().get("CPU", 1)))

    def decide() -> None:
        """What is reported of every cell whose search has run."""
        for cell, units in searches.items():
            if cell not in finals and ran.issuperset(units):
                finals[cell] = _chosen_of(plan, cell, units)
                waiting.insert(0, finals[cell])

    def settle(unit: Unit) -> None:
        """Log a unit that has run; the last one of a search decides what is reported."""
        ran.add(unit)
        _log_unit(plan, plan.load(unit), tracker, parent)
        decide()

    needs = seat_resources(plan.experiment, plan.engine)
    task: Any = ray.remote(num_cpus=needs["CPU"], num_gpus=needs.get("GPU", 0), max_retries=3)(run_unit)

    def send(unit: Unit) -> ray.ObjectRef | None:
        made = plan.of(unit)
        return None if has_run(made.storage_path, plan.engine) else task.remote(made, plan.engine, plan.extension(unit))

    decide()
    with ProgressView() as view:

        def show(running: list[Unit]) -> None:
            now = ", ".join(f"{unit.contender.name} at {unit.value:g}" for unit in running)
            view.show([], f"accelerate: {len(ran)} of {total} runs done; running {now or 'none'}")

        for unit in side_by_side(send, waiting, limit, show):
            settle(unit)
    return [plan.load(finals[cell]) for cell in cells], [plan.load(unit) for unit in every]


def read_finished(plan: Plan) -> list[Finished]:
    """What an acceleration has found so far: its variants with their chosen settings, task by task.

    Runs nothing; leaves out variants whose runs are not all there.
    """
    settings, found = plan.experiment.accelerate, []
    for name in settings.tasks:
        for contender in settings.running:
            cell = (*_task(plan.experiment, name), contender)
            with contextlib.suppress(StoreError):
                found.append(plan.load(_chosen_of(plan, cell, _search(plan.experiment, cell))))
    return comparable(found)


def _chosen_of(plan: Plan, cell: Cell, searched: Sequence[Unit]) -> Unit:
    """What is reported of a cell whose search has run: the best value, or the only one."""
    if searched:
        return _unit(cell, best_value([plan.load(unit) for unit in searched]), search=False)
    return _unit(cell, plan.experiment.accelerate.values_of(cell[2])[0], search=False)


def _search(experiment: Experiment, cell: Cell) -> list[Unit]:
    """The search units of a cell: every value on every task of its search; none if there is only one value."""
    settings, (name, env_steps, contender) = experiment.accelerate, cell
    values = settings.values_of(contender)
    if len(values) == 1:
        return []
    tasks = [_task(experiment, one) for one in settings.search_tasks]
    if contender.per_task or not tasks:
        # As many steps as the other tasks are searched with, so that cells are shared.
        tasks = [next((task for task in tasks if task[0] == name), (name, tasks[0][1] if tasks else env_steps))]
    return [_unit((*task, contender), value, search=True) for task in tasks for value in values]


def _unit(cell: Cell, value: float, *, search: bool) -> Unit:
    task, env_steps, contender = cell
    return Unit(task=task, env_steps=env_steps, contender=contender, value=value, search=search)


def _task(experiment: Experiment, name: str) -> tuple[str, int]:
    """A task's name in tables, and its environment steps."""
    return name.partition("@")[0], RunTask.read(name).env_steps or experiment.collect.total_env_steps


def _log_unit(plan: Plan, one: Finished, tracker: Tracker, parent: Run) -> None:
    """Log a unit as a nested MLflow run, and delete its snapshots unless they are kept."""
    experiment, unit = plan.of(one.unit), one.unit
    name = f"{unit.task} {unit.contender.name} {unit.value:g}{' search' if unit.search else ''}"
    tags = {"task": unit.task, "contender": unit.contender.name, "search": str(unit.search)}
    with tracker.run(name, f"unit-{last_name(experiment.storage_path)}", parent=parent, tags=tags) as run:
        run.log_parameters(unit_table(experiment, plan.extension(unit)))
        run.log_metrics({"cpu_seconds": one.cpu_seconds, "diverged": one.num_diverged})
        (whole,) = comparable([one])
        if np.isfinite(whole.returns_SI).all():
            middle_I = interquartile_mean(whole.returns_SI.T)
            run.log_history("return_iqm", one.env_steps_I.tolist(), middle_I.tolist())
            run.log_metrics({"auc": float(whole.areas_S.mean()), "final_return": float(whole.finals_S.mean())})
            run.log_metrics({"collapsed": whole.num_collapsed})
    if not plan.experiment.where.keep_weights:
        storage = Storage(experiment.storage_path)
        for name in ("trajectories", "commits"):
            with contextlib.suppress(StoreError):  # what cannot be deleted is only in the way
                storage.delete_folder(name)


def _report(plan: Plan, finished: Sequence[Finished], searched: Sequence[Finished], folder: str, run: Run) -> None:
    experiment, finished = plan.experiment, comparable(finished)
    if unknown := [one.unit.task for one in finished if np.isnan(one.returns_SI).any()]:
        raise AccelerationError(
            f"{unknown[0]}: every trial of every variant diverged before an episode ended, so there is nothing to "
            f"compare; lower accelerate.learning_rates={experiment.accelerate.learning_rates}"
        )
    resampling = Resampling(
        confidence=experiment.evaluate.confidence, bootstrap=experiment.accelerate.bootstrap, seed=0
    )
    rows = scores.score(finished, plan.source.collect.task, resampling, plan.searched_on)
    rates = scores.search_rows(searched, _chosen(plan, finished))
    together = scores.over_tasks(finished, resampling, plan.searched_on)
    tables = {"table": rows, "search": rates, "tasks": together, "curves": _curve_rows(finished)}
    for name, table in tables.items():
        write_file(folder, f"{name}.csv", as_csv(table))
    lines = scores.sentences(rows, resampling.confidence)
    lines += scores.sentences_over_tasks(together, len({(row["task"], row["env_steps"]) for row in rows}))
    shown = []
    for name, (heading, sentence, figure) in _draw(finished, rows, rates, together, resampling).items():
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
        rows=scores.table(rows),
        confidence=f"{resampling.confidence:.0%}",
        files={name: join(folder, f"{name}.csv") for name in tables},
    ).encode()
    run.log_file(page, "report.html")
    write_file(folder, "report.html", page)
    say_rows(scores.table(rows))
    for line in lines:
        say(line)
    say(f"accelerate: table, curves and report in {folder}")


def _chosen(plan: Plan, finished: Sequence[Finished]) -> set[Unit]:
    """The search units whose setting was chosen."""
    cells = [(one.unit, (one.unit.task, one.unit.env_steps, one.unit.contender)) for one in finished]
    return {unit for one, cell in cells for unit in _search(plan.experiment, cell) if unit.value == one.value}


def _facts(plan: Plan, rows: Sequence[Row]) -> dict[str, Any]:
    """The figures at the top of the report."""
    return {
        "tasks": len({row["task"] for row in rows}),
        "variants": len({row["contender"] for row in rows}),
        "trials per variant": plan.experiment.collect.num_trials,
        "predictors fitted on": plan.source.collect.task,
    }


def _draw(
    finished: Sequence[Finished],
    rows: Sequence[Row],
    rates: Sequence[Row],
    together: Sequence[Row],
    resampling: Resampling,
) -> dict[str, tuple[str, str, Figure]]:
    """Heading, sentence and figure of every picture, by its file's name."""
    drawn = {
        "acceleration_areas": (
            "Area under the learning curve",
            "Filled markers: the interval of the difference excludes 0.",
            figures.areas(rows),
        ),
        "acceleration_shares": (
            "Area under the learning curve against gradient steps, over tasks",
            "Filled markers: the interval of the ratio excludes 1.",
            figures.shares(together),
        ),
        "acceleration_learning_rates": (
            "Area under the learning curve by learning rate, in the search",
            "Large points: the chosen learning rates.",
            figures.learning_rates(rates),
        ),
    }
    for task, env_steps in dict.fromkeys((one.unit.task, one.unit.env_steps) for one in finished):
        own = [one for one in finished if (one.unit.task, one.unit.env_steps) == (task, env_steps)]
        curves = {one.unit.contender.name: (one.env_steps_I, one.gradient_steps_I, one.returns_SI) for one in own}
        title = f"{task}, {len(own[0].returns_SI)} trials"
        # A namespace or a policy's widths, which are no folders.
        named = task.replace("-v4", "").replace("/", "_")
        drawn[f"acceleration_{named}_{env_steps}"] = (
            title,
            f"Interquartile mean over trials; bands are {resampling.confidence:.0%} intervals.",
            figures.contenders(curves, title, resampling),
        )
    return drawn


def _curve_rows(finished: Sequence[Finished]) -> list[dict[str, Any]]:
    """One row per task, variant and iteration: the interquartile mean over trials, and its quartiles."""
    rows = []
    for one in finished:
        low_I, high_I = np.quantile(one.returns_SI, (0.25, 0.75), axis=0)
        for index, middle in enumerate(interquartile_mean(one.returns_SI.T)):
            rows.append(
                {
                    "task": one.unit.task,
                    "contender": one.unit.contender.name,
                    "env_steps": int(one.env_steps_I[-1]),
                    "env_step": int(one.env_steps_I[index]),
                    "return_iqm": round(float(middle), 2),
                    "return_quartile_1": round(float(low_I[index]), 2),
                    "return_quartile_3": round(float(high_I[index]), 2),
                }
            )
    return rows
