"""Models tested on a task that they never saw, as one table and one picture of this folder.

    python docs/all_tasks.py storage/all

Reads the newest evaluation of every storage in the folder, as `latest` names it. Prints skills, and how far the
Transformer is ahead of others on the same windows; writes docs/results/all_tasks.csv and docs/pictures/all_tasks.png,
and with --seen, for models that were trained on the task too, docs/results/all_tasks_seen.csv alone.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import pyarrow.csv
from matplotlib.axes import Axes

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS.parent))

from tipl_ray.drawing import (  # noqa: E402
    as_shipped,
    dress,
    is_first_in_line,
    labelled,
    legend_below,
    new_figure,
    png,
)
from tipl_ray.evaluate.figures import COLOURS  # noqa: E402
from tipl_ray.pages import as_csv  # noqa: E402
from tipl_ray.terminal import say_rows  # noqa: E402

DRAWN = {
    "tipl": "TIPL, trained on the other seven tasks",
    "ridge": "ridge regression, fitted on the task itself",
    "ridge-elsewhere": "ridge regression, fitted on the other seven",
    "context-ridge": "ridge regression, fitted on the context alone",
}
BOUND = "window-floor"
SHOWN_STEPS = (1, 2, 5, 10)


def read(folder: Path, table: str) -> list[dict[str, Any]]:
    """Rows of every task's newest evaluation, task by task."""
    tables = sorted(folder.glob(f"*/latest/{table}.csv"))
    if not tables:
        raise SystemExit(f"error: no storage in {folder} has an evaluation; run the commands of docs/results.md first")
    return [row for table in tables for row in pyarrow.csv.read_csv(table).to_pylist()]


def draw_task(axes: Axes, task: str, rows: list[dict[str, Any]]) -> None:
    """One line a predictor with its 95% interval."""
    for predictor, label in DRAWN.items():
        own = sorted((row for row in rows if row["predictor"] == predictor), key=lambda row: row["step"])
        steps, colour = [row["step"] for row in own], COLOURS[predictor]
        axes.plot(
            steps,
            [row["skill"] for row in own],
            color=colour,
            linewidth=2.6 if predictor == "tipl" else 1.6,
            label=label,
        )
        axes.fill_between(
            steps, [row["skill_low"] for row in own], [row["skill_high"] for row in own], color=colour, alpha=0.15, lw=0
        )
    axes.axhline(0, color="#999999", linewidth=0.8, zorder=1)
    axes.set_xticks(range(1, 11))
    dress(
        axes,
        task.removesuffix("-v4").removesuffix("-v1"),
        "snapshots ahead",
        "skill (1 perfect, 0 copying)" if is_first_in_line(axes) else "",
    )


def main() -> None:
    """Write table and picture, and print the table of docs/results.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where every task has its storage")
    parser.add_argument("--seen", action="store_true", help="the models were trained on the tested task too")
    arguments = parser.parse_args()
    rows = read(arguments.folder, "summary")
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    (DOCS / "results" / f"all_tasks{'_seen' if arguments.seen else ''}.csv").write_bytes(as_csv(rows))
    if not arguments.seen:
        with as_shipped():
            figure, panels = new_figure(len(tasks), width=13.5, height=3.1, across=4)
            for axes, task in zip(panels, tasks, strict=True):
                draw_task(axes, task, [row for row in rows if row["task"] == task])
            legend_below(figure, labelled(panels[0]))
            (DOCS / "pictures" / "all_tasks.png").write_bytes(png(figure))
    table = {(row["task"], row["predictor"], row["step"]): row for row in rows}

    def cell(task: str, predictor: str, step: int) -> str:
        row = table[task, predictor, step]
        return f"{row['skill']:.3f} [{row['skill_low']:.3f}, {row['skill_high']:.3f}]"

    say_rows(
        {"task": task, "predictor": predictor, **{f"h = {step}": cell(task, predictor, step) for step in SHOWN_STEPS}}
        for task in tasks
        for predictor in (*DRAWN, BOUND)
    )
    apart = {
        (row["task"], row["against"], row["step"]): row
        for row in read(arguments.folder, "comparisons")
        if (row["predictor"], row["group"]) == ("tipl", "all")
    }

    def ahead(task: str, other: str, step: int) -> str:
        row = apart[task, other, step]
        return f"{row['skill_difference']:+.3f} [{row['difference_low']:+.3f}, {row['difference_high']:+.3f}]"

    say_rows(
        {"task": task, "tipl against": other, **{f"h = {step}": ahead(task, other, step) for step in SHOWN_STEPS}}
        for task in tasks
        for other in list(DRAWN)[1:]
    )


if __name__ == "__main__":
    main()
