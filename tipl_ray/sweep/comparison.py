"""Comparison of runs, read only from MLflow: a table, figures and one page, whatever made the runs.

Knows MLflow's client and figures; knows nothing of data sets, models or Ray.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tipl_ray import pages
from tipl_ray.digest import redacted
from tipl_ray.drawing import png
from tipl_ray.errors import as_started
from tipl_ray.evaluate.report import Answer, Verdict, counted, steps_text
from tipl_ray.sweep import figures
from tipl_ray.sweep.space import short_names
from tipl_ray.tracking import KEY_TAG, PARENT_TAG

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from mlflow import MlflowClient
    from mlflow.entities import Run

BEST_TAG, DIVERGED_TAG = "best", "diverged"
SEED = "train.seed"
"""The field whose values are repetitions, not choices to compare."""
CAPTIONS = {
    "heat_map": (
        "The metric over two fields",
        "Mean over the other fields, with the standard deviation where there are several runs. The bottom row is the "
        "ridge regression. The last columns, where known, belong to each row's basis: the skill of repeating the last "
        "token in it, and its upper bound, the skill of the true future projected onto it.",
    ),
    "parallel_coordinates": (
        "All fields at once",
        "Each line is a run, from the values of its fields to its metric.",
    ),
    "curves": ("During training", "The metric of the best model so far, by validation loss, at each step."),
}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One run of MLflow."""

    run_id: str
    name: str
    status: str
    parameters: Mapping[str, str]
    metrics: Mapping[str, float]
    """Last value of each."""
    tags: Mapping[str, str]


def read_children(client: MlflowClient, parent_run_id: str) -> list[Row]:
    """The runs nested under one, oldest first."""
    experiment_id = client.get_run(parent_run_id).info.experiment_id
    return search(client, [experiment_id], f"tags.`{PARENT_TAG}` = '{parent_run_id}'")


def choose(
    client: MlflowClient, run_ids: Sequence[str], parent: str | None, query: str | None, metric: str
) -> tuple[str, list[Row]]:
    """The runs that a person asks for, and what they are called together; see jobs/compare.py.

    Raises ValueError where there are none, or none that has the metric.
    """
    if run_ids:
        title, rows = "Chosen runs", [as_row(client.get_run(run_id)) for run_id in run_ids]
    elif query is not None:
        title, rows = _found(client, query, metric)
    else:
        title, rows = _children(client, parent)
    if not any(metric in row.metrics for row in rows):
        known = sorted({name for row in rows for name in row.metrics if not name.startswith("system/")})
        near = difflib.get_close_matches(metric, known, n=3, cutoff=0.0) or ["none"]
        raise ValueError(
            f"by={metric!r}: none of these {len(rows)} runs has this metric; similar ones are {', '.join(near)}"
        )
    return title, rows


def _found(client: MlflowClient, query: str, metric: str) -> tuple[str, list[Row]]:
    found = search(client, [experiment.experiment_id for experiment in client.search_experiments()], query)
    rows = [row for row in found if row.status == "FINISHED" and metric in row.metrics]
    if not rows:
        raise ValueError(
            f"query={query!r} finds {len(found)} runs, none of which has finished with a metric {metric!r}"
        )
    return f"Runs with {query}" if query else "Runs", rows


def _children(client: MlflowClient, parent: str | None) -> tuple[str, list[Row]]:
    """Those of the newest sweep where no parent is given."""
    if parent is None:
        experiment_ids = [experiment.experiment_id for experiment in client.search_experiments()]
        sweeps = search(client, experiment_ids, f"tags.`{KEY_TAG}` LIKE 'sweep-%'")
        newest = [row for row in sweeps if PARENT_TAG not in row.tags][-1:]
        if not newest:
            raise ValueError("there is no sweep; run jobs/sweep.py first, or use --runs, --parent or --query")
        parent = newest[0].run_id
    rows = read_children(client, parent)
    if not rows:
        raise ValueError(f"parent={parent}: no runs are nested under this run")
    return client.get_run(parent).info.run_name or parent, rows


def search(client: MlflowClient, experiment_ids: Sequence[str], query: str = "") -> list[Row]:
    """Every run that MLflow's own query finds, oldest first."""
    rows: list[Row] = []
    token = None
    while True:
        page = client.search_runs(list(experiment_ids), query, order_by=["attributes.start_time ASC"], page_token=token)
        rows += [as_row(run) for run in page]
        token = page.token
        if not token:
            return rows


def as_row(run: Run) -> Row:
    """What a comparison needs of a run."""
    return Row(
        run_id=run.info.run_id,
        name=run.info.run_name or run.info.run_id,
        status=run.info.status,
        parameters=run.data.params,
        metrics=run.data.metrics,
        tags=run.data.tags,
    )


def varied(rows: Sequence[Row]) -> list[str]:
    """Parameters in which the runs differ and that choose something: a number or a word, not a folder."""
    names = sorted({name for row in rows for name in row.parameters})
    differing = [name for name in names if len({row.parameters.get(name) for row in rows}) > 1]
    return [name for name in differing if not any("/" in (row.parameters.get(name) or "") for row in rows)]


def by_metric(rows: Sequence[Row], metric: str, less: bool = False) -> list[Row]:
    """The best runs first, those with the most of a metric, or the least; those without it, or that diverged, last."""
    sign = -1 if less else 1

    def rank(row: Row) -> tuple[bool, float]:
        figure = sign * row.metrics.get(metric, -sign * math.inf)
        return not diverged(row), -math.inf if math.isnan(figure) else figure

    return sorted(rows, key=rank, reverse=True)


def diverged(row: Row) -> bool:
    """Whether a training diverged: whatever it had reached before, its model is the worst."""
    return row.tags.get(DIVERGED_TAG) == "true"


def best(rows: Sequence[Row], metric: str) -> Row | None:
    """The finished run with the most of a metric, if any has it."""
    known = [row for row in rows if row.status == "FINISHED" and metric in row.metrics]
    return max(known, key=lambda row: row.metrics[metric], default=None)


def table(rows: Sequence[Row], metric: str) -> list[dict[str, str]]:
    """Cells for the terminal and the page, in the rows' order: what differs, the metric, the ridge's, what it took."""
    fields = varied(rows)
    names = short_names(fields)
    others = {f"ridge_{metric}": "ridge", f"floor_{metric}": "upper bound"}
    others |= {"validation_loss": "loss", "training_seconds": "seconds"}
    shown = {name: told for name, told in others.items() if any(name in row.metrics for row in rows)}
    told = all("=" in row.name for row in rows)  # a child's name is made of its fields
    return [
        {
            **({} if told else {"run": row.name}),
            **{names[field]: row.parameters.get(field, "") for field in fields},
            metric: "" if diverged(row) else number(row.metrics.get(metric)),
            **{title: number(row.metrics.get(name)) for name, title in shown.items()},
            "status": _status(row),
        }
        for row in rows
    ]


def _status(row: Row) -> str:
    if diverged(row):
        return "diverged"
    return "best" if row.tags.get(BEST_TAG) == "true" else row.status.lower()


def findings(rows: Sequence[Row], metric: str, num_trials: int) -> list[Answer]:
    """The lines that a sweep ends with: its best run, whether that beats copying and the ridge, where, how sure."""
    first = best([row for row in rows if not diverged(row)], metric)
    if first is None:
        return [Answer(question="Which run is best?", verdict=None, text="None: every run diverged or failed.")]
    on = f"on {counted(num_trials, 'validation trial')}"
    steps = sorted(int(name.removeprefix("skill_h")) for name in first.metrics if name.startswith("skill_h"))
    skills = {step: first.metrics[f"skill_h{step}"] for step in steps}
    ridges = {step: first.metrics.get(f"ridge_skill_h{step}", math.nan) for step in steps}
    return [
        Answer(
            question="Which run is best?",
            verdict=None,
            text=f"{first.name}, with {metric} {number(first.metrics[metric])} {on}.",
        ),
        _beaten("Does it beat copying the last snapshot?", skills, None, on),
        _beaten("Does it beat the ridge regression?", skills, ridges, on),
        Answer(
            question="And in returns?",
            verdict=None,
            text=as_started("A sweep runs no policies; jobs/evaluate.py does, for a model of jobs/train.py."),
        ),
        Answer(
            question="How sure is that?",
            verdict=None,
            text=f"The best of {counted(len(rows), 'run')} was chosen {on}, so its skill is optimistic; test trials "
            "are untouched.",
        ),
    ]


def _beaten(question: str, skills: Mapping[int, float], others: Mapping[int, float] | None, on: str) -> Answer:
    """At which forward steps the skill is above others, or above 0, and the figures at the first and the last."""
    limits = dict.fromkeys(skills, 0.0) if others is None else others
    known = [step for step in skills if math.isfinite(limits[step])]
    if not known:
        return Answer(question=question, verdict="unknown", text="The runs have no skill to compare with.")
    above = [step for step in known if skills[step] > limits[step]]

    def against(step: int) -> str:
        return "" if others is None else f" against {number(others[step])}"

    verdict: Verdict = "no" if not above else "yes" if above == known else "partly"
    ends = [f"{number(skills[step])}{against(step)} at h = {step}" for step in dict.fromkeys((known[0], known[-1]))]
    where = f"Better at {steps_text(above)}" if above else "Not better at any forward step"
    return Answer(question=question, verdict=verdict, text=f"{where}, {on}. Skill {' and '.join(ends)}.")


def everything(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """A line for each run, in their order: the fields that differ, and the last value of every metric but `system/`."""
    fields = varied(rows)
    metrics = sorted({name for row in rows for name in row.metrics if not name.startswith("system/")})
    return [
        {
            "run": row.name,
            **{field: row.parameters.get(field) for field in fields},
            **{name: row.metrics.get(name) for name in metrics},
        }
        for row in rows
    ]


def draw(client: MlflowClient, rows: Sequence[Row], metric: str, less: bool = False) -> dict[str, Figure]:
    """Heat map of two fields, parallel coordinates of all, and curves over training; what the runs have to show.

    The best run is the one with the most of the metric or, with `less`, the least.
    """
    known = [row for row in rows if metric in row.metrics and not diverged(row)]
    fields = [field for field in varied(known) if all(field in row.parameters for row in known)]
    cells = [
        {
            **{field: value(row.parameters[field]) for field in fields},
            "skill": row.metrics[metric],
            "ridge": row.metrics.get(f"ridge_{metric}", math.nan),
            "floor": row.metrics.get(f"floor_{metric}", math.nan),
            "still": row.metrics.get(f"still_{metric}", math.nan),
        }
        for row in known
    ]
    drawn: dict[str, Figure] = {}
    choices = [field for field in fields if field != SEED]
    numbers = [field for field in choices if all(isinstance(cell[field], float) for cell in cells)]
    if len(choices) >= 2 and len(cells) > 1:
        up, across = sorted(choices, key=lambda field: (field in numbers, field == "model.context"))[-2:]
        names = short_names([across, up])
        drawn["heat_map"] = figures.heat_map(cells, across, up, names, metric, less)
    if choices and len(cells) > 1:
        drawn["parallel_coordinates"] = figures.parallel_coordinates(cells, short_names(choices), metric, less)
    curves = {row.run_id: _history(client, row.run_id, metric) for row in known}
    curves = {run_id: curve for run_id, curve in curves.items() if len(curve[0]) > 1}
    if curves:
        first = by_metric([row for row in known if row.run_id in curves], metric, less)[0]
        ridge = first.metrics.get(f"ridge_{metric}", math.nan)
        drawn["curves"] = figures.curves(list(curves.values()), curves[first.run_id], first.name, ridge, metric)
    return drawn


def page(
    title: str,
    rows: Sequence[Row],
    metric: str,
    drawn: Mapping[str, Figure],
    source: str,
    answers: Sequence[Answer] = (),
) -> str:
    """One self-contained HTML page; `source` is MLflow's URI, of which no password is shown."""
    return pages.page(
        "comparison.html",
        title=title,
        rows=table(rows, metric),
        pictures=[(*CAPTIONS[name], pages.embedded(png(figure))) for name, figure in drawn.items()],
        metric=metric,
        source=redacted(source),
        answers=answers,
    )


def value(text: str) -> float | str:
    """A parameter as MLflow keeps it, as a number where it is one."""
    try:
        return float(text)
    except ValueError:
        return text


def number(figure: Any) -> str:
    """A figure in four digits; nothing for none."""
    if figure is None or not isinstance(figure, float | int):
        return ""
    return f"{figure:,.0f}" if abs(figure) >= 1000 and math.isfinite(figure) else f"{figure:.4g}"


def _history(client: MlflowClient, run_id: str, metric: str) -> tuple[list[int], list[float]]:
    points = sorted(client.get_metric_history(run_id, metric), key=lambda point: point.step)
    return [point.step for point in points], [point.value for point in points]
