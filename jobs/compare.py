"""Compare runs in MLflow: a table in the terminal, and table and figures in one HTML file.

    python jobs/compare.py --storage storage/demo
    python jobs/compare.py --storage storage/demo --best 5 --by skill_h10
    python jobs/compare.py --uri http://mlflow:5000 --runs 3f2a... 77b1...

Needs only MLflow, whatever made the runs. Compares those of --runs, else the runs nested under --parent, else the
finished ones that --query finds and that have the metric, else those of the newest sweep. A higher metric is better,
or, with --less, a lower one. The metric `skill` is the share of the squared error of copying the last snapshot of the
weights that a model removes: 1 is perfect, 0 is no better than copying.
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tipl_ray.command_line import read_options
from tipl_ray.errors import print_error
from tipl_ray.places import absolute_storage, default_storage
from tipl_ray.terminal import say, say_rows, waiting

if TYPE_CHECKING:
    from mlflow import MlflowClient


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """What to compare, and where to write it."""

    storage: str = default_storage("demo")
    """Storage of an experiment; its sqlite file is read if no server is given."""
    uri: str | None = None
    """MLflow tracking URI; by default $MLFLOW_TRACKING_URI if set, else the storage's sqlite file."""
    runs: tuple[str, ...] = ()
    """Ids of the runs to compare."""
    parent: str | None = None
    """Id of a run, such as a sweep, whose nested runs to compare."""
    query: str | None = None
    """MLflow filter over the runs of all experiments, such as "tags.task = 'InvertedPendulum-v4'"."""
    by: str = "skill"
    """Metric to sort by and to plot."""
    less: bool = False
    """Lower is better, as for a loss."""
    best: int = 0
    """Keep only this many of the best runs; 0 keeps all."""
    output: Path = Path("comparison.html")
    """HTML file for the table and the figures; overwritten if it exists."""
    csv: Path | None = None
    """CSV file for the fields that differ and every metric of the runs, in full precision."""

    def check(self) -> None:
        """Raises ValueError for options that could not be carried out."""
        if self.best < 0:
            raise ValueError(f"--best {self.best} is below 0; use 0 to keep all")
        for option, file in (("--output", self.output), ("--csv", self.csv)):
            if file is not None and (file.is_dir() or not file.absolute().parent.is_dir()):
                problem = "is a folder" if file.is_dir() else f"cannot be created: {file.parent} is not a folder"
                raise ValueError(f"{option} {file} {problem}; name a file in an existing folder")


def check_run_ids(client: "MlflowClient", option: str, run_ids: Sequence[str]) -> None:
    """Raises TrackingError, with the option, for an id that MLflow has no run of."""
    from tipl_ray.tracking import RefusedError

    for run_id in run_ids:
        try:
            client.get_run(run_id)
        except RefusedError as error:
            raise RefusedError(
                f"{option} {run_id}: {error}; ids are in the addresses of runs' pages in MLflow, after /runs/"
            ) from None


def main() -> None:
    """Read the runs, compare them, write the page."""
    chosen = read_options(Comparison, __doc__)
    try:
        chosen.check()
    except ValueError as error:
        print_error(error)
        raise SystemExit(2) from error
    with waiting("compare: starting"):
        from tipl_ray.jobs import exit_status
        from tipl_ray.pages import as_csv
        from tipl_ray.sweep import comparison
        from tipl_ray.tracking import open_to_read

    with exit_status():
        with waiting("compare: reading the runs"):
            client, uri = open_to_read(chosen.uri, absolute_storage(chosen.storage))
            for option, run_ids in (("--runs", chosen.runs), ("--parent", (chosen.parent,) if chosen.parent else ())):
                check_run_ids(client, option, run_ids)
            title, rows = comparison.choose(client, chosen.runs, chosen.parent, chosen.query, chosen.by)
        rows = comparison.by_metric(rows, chosen.by, chosen.less)[: chosen.best or None]
        say_rows(comparison.table(rows, chosen.by), title=f"{title}, by {chosen.by}")
        with waiting("compare: drawing"):
            drawn = comparison.draw(client, rows, chosen.by, chosen.less)
        chosen.output.write_text(comparison.page(title, rows, chosen.by, drawn, uri), encoding="utf-8")
        if chosen.csv is not None:
            chosen.csv.write_bytes(as_csv(comparison.everything(rows)))
        say(f"{len(rows)} runs compared in {chosen.output.absolute()}")


if __name__ == "__main__":
    main()
