"""The data set of forks: every cell runs on Ray and is written atomically; all are read back as one table.

    <storage>/forks/<digest>/forks.parquet    one cell, with the columns of `forks.SCHEMA`, and its checksum

A cell that was killed is run again, with the same bytes as a result.
"""

import hashlib
import io
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray

from tipl_ray.collect.crew import seat_resources
from tipl_ray.config import Experiment
from tipl_ray.data.locks import only_one
from tipl_ray.data.storage import StoreError, file_exists, join, publish, read_published
from tipl_ray.digest import as_table, digest, identity
from tipl_ray.improve.forks import Cell, cells, run_cell
from tipl_ray.improve.work import Work, work_on
from tipl_ray.jobs import side_by_side
from tipl_ray.terminal import ProgressView, say

FORKS_FILE, FORKS_RECORD = "forks.parquet", "forks.sha256"
WAY_OUT = "delete it; the same command then runs the cell again"
SAME_DRAWS = ("stages", "pairs", "spread", "iterations")
"""Fields of `improve` that a cell's rows depend on, besides its task and regime."""


def cell_folder(cell: Cell, experiment: Experiment, source: Experiment, engine: str) -> str:
    """Folder of a cell, named by a digest of everything that its rows depend on."""
    improve = identity(experiment.improve)
    draws = {field: improve[field] for field in SAME_DRAWS}
    made_of = {**cell.made_of(experiment, source, engine), "seeds": list(experiment.collect.seeds)}
    return join(experiment.storage_path, "forks", digest(cell.name, list(cell.base()), made_of, draws))


def run_and_publish(cell: Cell, experiment: Experiment, source: Experiment, engine: str) -> None:
    """Run a cell and write it."""
    buffer = io.BytesIO()
    pq.write_table(run_cell(cell, experiment, source, engine), buffer, compression="zstd")
    publish(cell_folder(cell, experiment, source, engine), {FORKS_FILE: buffer.getvalue()}, FORKS_RECORD)


def read_cell(folder: str) -> bytes | None:
    """The content of a cell's file; None if it is missing or damaged."""
    if not file_exists(folder, FORKS_FILE):
        return None
    try:
        return read_published(folder, FORKS_FILE, FORKS_RECORD, WAY_OUT)
    except StoreError:
        say(f"fork: {join(folder, FORKS_FILE)} is damaged, so this cell counts as not run")
        return None


def read_forks(experiment: Experiment, source: Experiment, engine: str) -> pa.Table:
    """Every row of the data set, cell by cell. Raises StoreError if a cell is missing."""
    return pa.concat_tables([pq.read_table(io.BytesIO(content)) for content in _contents(experiment, source, engine)])


def forks_digest(experiment: Experiment, source: Experiment, engine: str) -> str:
    """Digest of the data set's bytes. Raises as `read_forks`."""
    return digest([hashlib.sha256(content).hexdigest() for content in _contents(experiment, source, engine)])


def _contents(experiment: Experiment, source: Experiment, engine: str) -> Sequence[bytes]:
    contents = []
    for cell in cells(experiment.improve):
        if (content := read_cell(folder := cell_folder(cell, experiment, source, engine))) is None:
            raise StoreError(f"{folder}: the forks of {cell.name} are missing; run jobs/fork.py with this experiment")
        contents.append(content)
    return contents


def run_forks(experiment: Experiment) -> None:
    """All of jobs/fork.py."""
    with work_on(experiment, "fork", "cell") as work:
        source, engine = work.source, work.engine
        key = f"forks-{digest([cell_folder(one, experiment, source, engine) for one in cells(experiment.improve)])}"
        claim = only_one(experiment.storage_path, key, "making these forks")
        with claim, work.tracker.run("forks", key) as run:
            run.log_parameters({"improve": as_table(experiment.improve), "ppo": as_table(experiment.ppo)})
            _run_cells(work)
            table = read_forks(experiment, source, engine)
            run.log_metrics({"branches": table.num_rows})
        say(f"fork: {table.num_rows:,} branches, digest {forks_digest(experiment, source, engine)}")


def _run_cells(work: Work) -> None:
    experiment, waiting = work.experiment, cells(work.experiment.improve)
    total, done = len(waiting), 0
    needs = seat_resources(experiment, work.engine)
    task: Any = ray.remote(num_cpus=needs["CPU"], num_gpus=needs.get("GPU", 0), max_retries=3)(run_and_publish)

    def send(cell: Cell) -> ray.ObjectRef | None:
        is_there = read_cell(cell_folder(cell, experiment, work.source, work.engine)) is not None
        return None if is_there else task.remote(cell, experiment, work.source, work.engine)

    with ProgressView() as view:

        def show(running: list[Cell]) -> None:
            now = "; ".join(cell.name for cell in running)
            view.show([], f"fork: {done} of {total} cells done; running {now or 'none'}")

        for _ in side_by_side(send, waiting, work.at_once, show):
            done += 1
