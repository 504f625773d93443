"""The job that trains TIPL for return on forks: models with different inputs, and how well each ranks gains.

<storage>/jumps/<digest>/<input>-<seed>/           a trained model
<storage>/jumps/<digest>/gains.csv                 correlations of predicted and true gains on held-out forks
<storage>/jumps/<digest>/return-tipl/              the predictor: the forks' base rule plus a model's changes
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray

from tipl_ray.accelerate.contenders import jump_question, jump_settings
from tipl_ray.accelerate.return_rule import ReturnRule
from tipl_ray.config import Experiment, Model
from tipl_ray.data.locks import only_one
from tipl_ray.data.storage import StoreError, join, write_file
from tipl_ray.digest import as_table, digest, identity
from tipl_ray.drawing import png
from tipl_ray.evaluate.metrics import Resampling
from tipl_ray.improve.figures import draw_correlations
from tipl_ray.improve.fork_data import forks_digest, read_forks
from tipl_ray.improve.forks import cells
from tipl_ray.improve.gain_model import GainTransformer, Sight
from tipl_ray.improve.gain_training import (
    Forks,
    constant_gains,
    correlation,
    gain_loss,
    make_forks,
    predicted_gains,
    train_gain_model,
)
from tipl_ray.improve.return_tipl import ReturnTipl
from tipl_ray.improve.work import Work, work_on
from tipl_ray.jobs import side_by_side
from tipl_ray.pages import as_csv
from tipl_ray.predict.model_files import is_complete
from tipl_ray.predict.saved import save_predictor
from tipl_ray.terminal import ProgressView, say

SIGHTS = {
    "trajectory": Sight(),
    "trajectory, KL and returns": Sight(extras=True),
    "progress alone": Sight(trajectory=False),
}
"""Model inputs, by their names in the table: the first is the one used for jumps, the others are ablations."""
CONSTANT = "nothing (one parabola)"
STAGES = {"all": (0.0, 1.0), "first third": (0.0, 1 / 3), "second third": (1 / 3, 2 / 3), "last third": (2 / 3, 1.0)}
"""Stages of training, by the fraction of training before a fork."""
EMBEDDING, LAYERS, HEADS, DROPOUT = 64, 2, 2, 0.1

Branches = NDArray[np.int64]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """A model to train."""

    sees: str
    seed: int

    @property
    def folder(self) -> str:
        """Name of its folder."""
        return f"{self.sees.replace(',', '').replace(' ', '-')}-{self.seed}"


def run_learning(experiment: Experiment) -> None:
    """All of jobs/learn_jumps.py."""
    with work_on(experiment, "learn_jumps", "model", find=partial(forks_digest, experiment)) as work:
        data, size = work.found, model_size(work.source)
        parts = experiment.split.cut(experiment.collect.seeds)
        key = digest(data, identity(size), parts, experiment.improve.models, experiment.improve.model_steps)
        folder = join(experiment.storage_path, "jumps", key)
        forks = make_forks(
            read_forks(experiment, work.source, work.engine),
            experiment.improve.spread,
            work.source.model.context,
            training=parts[0],
        )
        training, validation, held_out = (forks.branches_of(seeds) for seeds in parts)
        for name, branches in (("training", training), ("validation", validation), ("test", held_out)):
            if not len(branches):
                raise StoreError(f"{experiment.storage_path}: the {name} trials have no fork with returns")
        tasks = [Task(sees=sees, seed=seed) for sees in SIGHTS for seed in range(experiment.improve.models)]
        claim = only_one(experiment.storage_path, f"jumps-{key}", "training these models")
        with claim, work.tracker.run("jumps", f"jumps-{key}") as run:
            run.log_parameters({"improve": as_table(experiment.improve), "forks": data})
            _train(work, tasks, folder, forks, training, validation)
            models = {task: GainTransformer.load(join(folder, task.folder)) for task in tasks}
            resampling = Resampling.of(experiment.evaluate)
            rows = gain_rows(models, forks, training, held_out, resampling)
            picture = png(draw_correlations(rows))
            run.log_figure(picture, "gains")
            run.log_metrics({f"spearman_{task.folder}": _overall(rows, task.sees, task.seed) for task in tasks})
            write_file(folder, "gains.csv", as_csv(rows))
            write_file(folder, "gains.png", picture)
        for sees in (*SIGHTS, CONSTANT):
            mine = [row for row in rows if row["sees"] == sees and row["stage"] == "all"]
            value, low, high = (float(np.mean([row[name] for row in mine])) for name in ("spearman", "low", "high"))
            say(f"input: {sees}: Spearman {value:.3f} [{low:.3f}, {high:.3f}] on {mine[0]['forks']} forks")
        first = next(iter(SIGHTS))
        chosen = min(
            (task for task in tasks if task.sees == first), key=lambda task: gain_loss(models[task], forks, validation)
        )
        _save(work, models[chosen], join(folder, "return-tipl"), {"forks": data, "seed": chosen.seed})
        say(f"learn_jumps: table and predictor in {folder}")


def model_size(source: Experiment) -> Model:
    """Size of the models: small, as there are few forks."""
    return Model(context=source.model.context, embedding=EMBEDDING, layers=LAYERS, heads=HEADS, dropout=DROPOUT)


def train_and_save(
    task: Task, folder: str, forks: Forks, training: Branches, validation: Branches, size: Model, num_steps: int
) -> None:
    """Train one model and save it."""
    model = train_gain_model(
        forks, training, validation, size=size, sight=SIGHTS[task.sees], num_steps=num_steps, seed=task.seed
    )
    model.save(join(folder, task.folder))


def _train(
    work: Work, tasks: Sequence[Task], folder: str, forks: Forks, training: Branches, validation: Branches
) -> None:
    size, num_steps, done = model_size(work.source), work.experiment.improve.model_steps, 0
    shared, remote = ray.put(forks), ray.remote(num_cpus=1, max_retries=3)(train_and_save)

    def send(task: Task) -> ray.ObjectRef | None:
        if is_complete(join(folder, task.folder)):
            return None
        return remote.remote(task, folder, shared, training, validation, size, num_steps)

    with ProgressView() as view:

        def show(running: list[Task]) -> None:
            now = "; ".join(f"{task.sees}, seed {task.seed}" for task in running)
            view.show([], f"learn_jumps: {done} of {len(tasks)} models trained; training {now or 'none'}")

        for _ in side_by_side(send, list(tasks), work.at_once, show):
            done += 1


def gain_rows(
    models: dict[Task, GainTransformer],
    forks: Forks,
    training: Branches,
    held_out: Branches,
    resampling: Resampling,
) -> list[dict[str, Any]]:
    """Correlations of predicted and true gains of test branches, by model and stage of training."""
    told = {(task.sees, task.seed): predicted_gains(model, forks, held_out) for task, model in models.items()}
    told[CONSTANT, 0] = constant_gains(forks, training, held_out)
    progress_N = forks.stages_F[forks.fork_N.numpy()[held_out]]
    rows = []
    for (sees, seed), predicted_N in told.items():
        for stage, (begin, end) in STAGES.items():
            mine = np.flatnonzero((begin <= progress_N) & (progress_N <= end))
            if not len(mine):
                continue
            found = correlation(predicted_N[mine], forks, held_out[mine], resampling)
            rows.append({"sees": sees, "seed": seed, "stage": stage, **found, "forks": int(found["forks"])})
    return rows


def _overall(rows: Sequence[dict[str, Any]], sees: str, seed: int) -> float:
    return next(row["spearman"] for row in rows if (row["sees"], row["seed"], row["stage"]) == (sees, seed, "all"))


def _save(work: Work, model: GainTransformer, folder: str, card: dict[str, Any]) -> None:
    """Save the forks' base rule with the model's changes as a predictor, unless there are several base rules."""
    improve = work.experiment.improve
    bases = {cell.base() for cell in cells(improve)}
    if len(bases) > 1:
        say(f"learn_jumps: no predictor saved, since the forks have {len(bases)} base rules and it needs a single one")
        return
    regime = improve.regimes[0]
    limit = jump_settings(regime, work.experiment, work.source).kl_limit
    rule = ReturnRule.of(jump_question(regime, work.experiment, work.source), bases.pop(), limit)
    about = {"rule": rule.numbers.closed_form(), "tuned_on": list(improve.tasks), **card}
    save_predictor(ReturnTipl.made_of(rule, model, improve.spread), folder, about)
