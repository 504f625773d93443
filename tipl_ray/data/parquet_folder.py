"""The data set as a folder of plain Parquet files with a card, as Hugging Face's `datasets` loads it.

    <folder>/README.md                          the card: what the data are, and which file belongs to which split
    <folder>/data/<split>/trial-<seed>.parquet  a trial, one row per snapshot
    <folder>/header.json                        what was exported: digest, columns, layout, configuration, versions

header.json is written first, each trial when it is complete, the card last: an export that was killed goes on with the
trials that are missing, and refuses a folder of anything else.
"""

import json
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tipl_ray.data.snapshots import COLUMNS, NULLABLE, Header, part_schema, write_options
from tipl_ray.data.storage import TEMPORARY, write_file
from tipl_ray.data.trajectory_store import TrajectoryStore
from tipl_ray.digest import as_table

CARD, DESCRIPTION = "README.md", "header.json"
CHUNK_BYTES = 64 * 2**20
"""Raw weights that are held in memory at a time."""
MEANINGS = {
    "seed": "seed of the trial",
    "snapshot": "index within the trial; 0 is the initial network",
    "step": "training steps so far",
    "iteration": "PPO iterations begun; 0 for the initial policy",
    "epoch": "update epochs done in that iteration",
    "env_step": "environment steps so far",
    "learning_rate": "the optimizer's learning rate",
    "episodic_return": "mean return of the episodes that ended since the last snapshot; null where none did",
    "loss": "training loss; null where none was given",
    "weights": "flat weights, in the order of the layout below",
    "observation_mean": "running mean that observations are normalized with",
    "observation_variance": "running variance that observations are normalized with",
    "observation_count": "observations behind mean and variance",
}


def export_folder(
    store: TrajectoryStore, splits: Mapping[str, Sequence[int]], folder: Path, columns: Sequence[str] = ()
) -> Iterator[tuple[int, Path]]:
    """Write the trials of each split into a folder, all columns or those named (`snapshot` and `weights` always).

    Yields each trial's seed and file once it is complete. Memory is bounded, whatever a trial's length. Raises
    ValueError for a column that the trials do not have and for a folder that holds another export, StoreError for what
    is missing or damaged in the store.
    """
    seeds = [seed for split in splits.values() for seed in split]
    header, digest = store.header(seeds), store.digest(seeds)
    store.trajectory(seeds[0], columns or None, 0, 0)  # refuses a column that is not there
    names = tuple(name for name in header.columns if not columns or name in (*columns, "snapshot", "weights"))
    files = {seed: f"data/{split}/trial-{seed}.parquet" for split, members in splits.items() for seed in members}
    made_of = {"digest": digest, "columns": names, "files": files, "header": as_table(header)}
    description = json.dumps(made_of, indent=1, sort_keys=True)
    try:
        if (folder / DESCRIPTION).read_text() != description:
            raise ValueError(f"output={folder} holds the export of other trials or columns; choose another folder")
    except FileNotFoundError:
        if folder.exists() and any(folder.iterdir()):
            raise ValueError(f"output={folder} is not empty; choose another folder") from None
    folder.mkdir(exist_ok=True)
    write_file(str(folder), DESCRIPTION, description.encode())
    rows = {}
    for seed, name in files.items():
        path = folder / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            _export_trial(store, seed, names, header, path)
        rows[seed] = pq.read_metadata(path).num_rows
        yield seed, path
    write_file(str(folder), CARD, _card(header, digest, splits, names, rows).encode())


def _export_trial(store: TrajectoryStore, seed: int, names: Sequence[str], header: Header, path: Path) -> None:
    partial = path.with_name(f"{TEMPORARY}{uuid.uuid4().hex}")
    length = store.weights(seed).shape[0]
    chunk = max(1, CHUNK_BYTES // (4 * header.num_weights))
    first = store.trajectory(seed, names, 0, 1)
    schema = part_schema(header, first.observation_means_TO.shape[1])
    schema = pa.schema([schema.field(name) for name in ("seed", *names)], metadata=schema.metadata)
    try:
        with pq.ParquetWriter(partial, schema, **write_options(schema)) as writer:
            for start in range(0, length, chunk):
                some = store.trajectory(seed, names, start, min(start + chunk, length))
                arrays = [_column(getattr(some, COLUMNS[name]), schema.field(name)) for name in names]
                seeds = pa.array(np.full(len(some.snapshots_T), seed, np.int64))
                writer.write_table(pa.Table.from_arrays([seeds, *arrays], schema=schema))
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)


def _column(values: np.ndarray, field: pa.Field) -> pa.Array:
    if values.ndim == 2:
        return pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), type=field.type)
    return pa.array(values, field.type, from_pandas=field.name in NULLABLE)  # NaN is null there


def _card(
    header: Header,
    digest: str,
    splits: Mapping[str, Sequence[int]],
    names: Sequence[str],
    rows: Mapping[int, int],
) -> str:
    """The folder's README.md: metadata that `datasets` reads, then what a reader has to know."""
    data_files = [line for split in splits for line in (f"  - split: {split}", f"    path: data/{split}/*.parquet")]
    metadata = ["configs:", "- config_name: default", "  data_files:", *data_files]
    metadata += ["tags:", "- reinforcement-learning", "- weight-space-learning"]
    split_rows = [
        f"| {split} | {len(seeds)} | {sum(rows[seed] for seed in seeds):,} | {', '.join(map(str, seeds))} |"
        for split, seeds in splits.items()
    ]
    layout = [f"| `{name}` | {list(shape)} | {offset:,} |" for name, shape, offset in header.layout]
    columns = [f"| `{name}` | {MEANINGS[name]} |" for name in ("seed", *names)]
    settings = json.dumps({"config": header.config, "versions": header.versions}, indent=1, sort_keys=True)
    return "\n".join(
        [
            *("---", *metadata, "---", ""),
            f"# Weight trajectories: {header.task}",
            "",
            f"Each trial is one training run; each row is one snapshot of its {header.num_weights:,} weights during "
            "training. A trial's rows are in order.",
            "",
            *("| split | trials | snapshots | seeds |", "|---|---:|---:|---|", *split_rows, ""),
            *("```python", "from datasets import load_dataset", ""),
            'trials = load_dataset("path/to/this/folder").with_format("numpy")',
            f'print(trials["{next(iter(splits))}"][0]["weights"].shape)  # ({header.num_weights},)',
            *("```", "", "## Columns", "", "| column | what it is |", "|---|---|", *columns, ""),
            *("## Layout of the weights", "", "| parameter | shape | offset |", "|---|---|---:|", *layout, ""),
            *("## How the trials were made", ""),
            f"The digest of the trials is `{digest}`: whoever makes them again with tipl_ray under the settings below, "
            "on a processor of the same family, gets the same bytes and this digest "
            "(`tipl data describe STORAGE` prints it).",
            *("", "```json", settings, "```", ""),
        ]
    )
