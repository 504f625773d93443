"""Snapshots, trajectories and the header they share, and how a Parquet part holds them (Section 3.1).

Knows the columns of a part and its bytes; knows nothing of commits, of trials' folders or of where files are kept.

Shapes: T snapshots, P policy weights, O observation entries.
"""

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pydantic
from numpy.typing import NDArray

from tipl_ray.digest import as_table, digest, flat, identity

FORMAT_VERSION = 1
METADATA_KEY = b"tipl_ray"
"""Key of the header's JSON in the metadata of a part's Parquet schema."""
ROW_GROUP_BYTES = 8 * 2**20
"""Raw weights per row group at most: what reading a single snapshot costs."""

_NOT_COMPARED = ("versions.torch", "versions.numpy")
_MOST_DIFFERENCES = 5
"""Fields that an error names at most."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PartialSnapshot:
    """Flat weights at some point of any training, with what else is known; None is unknown, or not known yet.

    The header lists a trial's columns: each of its snapshots has a value for them, except for those
    in NULLABLE, which may be None at times.
    """

    seed: int
    """Number of the trial."""
    snapshot: int
    """Index within the trial."""
    weights: NDArray[np.float32]
    """(P,) in the order of the header's layout."""
    step: int | None = None
    """Steps done so far, as the training counts them."""
    iteration: int | None = None
    """Iterations begun, where the training has any."""
    epoch: int | None = None
    """Epochs done, of that iteration where there is one."""
    env_step: int | None = None
    """Environment steps taken so far."""
    learning_rate: float | None = None
    """The optimiser's learning rate."""
    episodic_return: float | None = None
    """Mean return of the latest episodes, as the training defines it."""
    loss: float | None = None
    """Loss, as the training defines it."""
    observation_mean: NDArray[np.float64] | None = None
    """(O,)"""
    observation_variance: NDArray[np.float64] | None = None
    """(O,)"""
    observation_count: float | None = None
    """Observations behind the mean and the variance."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Snapshot(PartialSnapshot):
    """Snapshot: the policy's flat weights after some update epochs, with the observation statistics of that moment."""

    seed: int
    """Seed of the trial."""
    snapshot: int
    """Index within the trial; 0 is the initial policy."""
    iteration: int
    """PPO iterations begun; 0 for the initial policy."""
    epoch: int
    """Update epochs done in that iteration."""
    env_step: int
    """Environment steps taken so far."""
    learning_rate: float
    """Adam's learning rate of that iteration."""
    episodic_return: float | None
    """Mean return of the episodes that ended since the last snapshot; None where none did."""
    weights: NDArray[np.float32]
    """(P,) in the order of the header's layout."""
    observation_mean: NDArray[np.float64]
    """(O,)"""
    observation_variance: NDArray[np.float64]
    """(O,)"""
    observation_count: float
    """Observations behind the mean and the variance."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Trajectory:
    """Trajectory: snapshots of one trial in order; a column that was not requested, or does not exist, has length 0."""

    seed: int
    snapshots_T: NDArray[np.int32]
    steps_T: NDArray[np.int64]
    iterations_T: NDArray[np.int32]
    epochs_T: NDArray[np.int32]
    env_steps_T: NDArray[np.int64]
    learning_rates_T: NDArray[np.float64]
    episodic_returns_T: NDArray[np.float64]
    """NaN where no episode ended since the last snapshot."""
    losses_T: NDArray[np.float64]
    """NaN where none was given."""
    weights_TP: NDArray[np.float32]
    observation_means_TO: NDArray[np.float64]
    observation_variances_TO: NDArray[np.float64]
    observation_counts_T: NDArray[np.float64]


_SCALARS = {
    "seed": pa.int64(),
    "snapshot": pa.int32(),
    "step": pa.int64(),
    "iteration": pa.int32(),
    "epoch": pa.int32(),
    "env_step": pa.int64(),
    "learning_rate": pa.float64(),
    "episodic_return": pa.float64(),
    "loss": pa.float64(),
    "observation_count": pa.float64(),
}
COLUMNS = {
    "snapshot": "snapshots_T",
    "step": "steps_T",
    "iteration": "iterations_T",
    "epoch": "epochs_T",
    "env_step": "env_steps_T",
    "learning_rate": "learning_rates_T",
    "episodic_return": "episodic_returns_T",
    "loss": "losses_T",
    "weights": "weights_TP",
    "observation_mean": "observation_means_TO",
    "observation_variance": "observation_variances_TO",
    "observation_count": "observation_counts_T",
}
"""Parquet column, in the order of a part -> field of a Trajectory."""
NULLABLE = ("episodic_return", "loss")
"""Columns that may be null in some snapshots."""
STATISTICS = ("observation_mean", "observation_variance", "observation_count")
"""Columns of the observation statistics: all of them, or none."""
ALWAYS = ("snapshot", "weights")
"""Columns of every trial, besides its seed."""
PPO_COLUMNS = tuple(name for name in COLUMNS if name not in ("step", "loss"))
"""Columns of the trials that are collected here."""

Layout = tuple[tuple[str, tuple[int, ...], int], ...]
"""(name, shape, offset) of each tensor in a flat vector of weights, in order."""


@pydantic.with_config(extra="forbid")
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Header:
    """What a trial's weights are and how they were made; every part and every commit record carries it."""

    format_version: int = FORMAT_VERSION
    """Version of this file format."""
    task: str
    """Gymnasium id of the task."""
    layout: Layout
    """Of the flat weights, without a gap."""
    config: dict[str, Any]
    """What the trial's bits depend on: policy shape, PPO configuration, engine; plain JSON types."""
    versions: dict[str, str]
    """Versions of mujoco, gymnasium, torch and numpy."""
    columns: tuple[str, ...] = dataclasses.field(default=PPO_COLUMNS, metadata={"later": True})
    """What its snapshots have, in the order of COLUMNS: what was not known of a training is no column of its trials."""

    def __post_init__(self) -> None:
        if self.format_version != FORMAT_VERSION:
            raise ValueError(f"format_version={self.format_version} is not {FORMAT_VERSION}, the only one supported")
        end = 0
        for name, shape, offset in self.layout:
            if offset != end or min(shape, default=1) < 1:
                raise ValueError(f"layout: {name!r} of shape {shape} at offset {offset} does not follow offset {end}")
            end += math.prod(shape)
        if not 0 < end < 2**31:
            raise ValueError(f"layout: {end} weights are outside 1 to 2**31 - 1")
        if self.columns != tuple(name for name in COLUMNS if name in (*self.columns, *ALWAYS)):
            raise ValueError(f"columns={list(self.columns)} must be some of {', '.join(COLUMNS)}, in that order")
        if set(STATISTICS) & {*self.columns} not in (set(), {*STATISTICS}):
            raise ValueError(
                f"columns={list(self.columns)} contain only some of {', '.join(STATISTICS)}, not all three"
            )

    @property
    def num_weights(self) -> int:
        """Policy weights P."""
        _, shape, offset = self.layout[-1]
        return offset + math.prod(shape)

    @property
    def config_hash(self) -> str:
        """Digest of what the trial's bits depend on; the versions of torch and numpy are recorded, not compared."""
        simulators = {name: self.versions.get(name) for name in ("mujoco", "gymnasium")}
        columns = [] if self.columns == PPO_COLUMNS else [self.columns]
        return digest(self.task, self.layout, self.config, simulators, *columns)


def last_known(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Along the last axis each value, or the last one before it that is not NaN, as of returns where no episode ended;
    NaN before the first."""
    places = np.where(np.isnan(values), 0, np.arange(values.shape[-1]))
    return np.take_along_axis(values, np.maximum.accumulate(places, axis=-1), axis=-1)


def differences(header: Header, other: Header) -> str:
    """What counts and differs between a header and another, by dotted field, the first few of them."""
    left, right = (
        {name: value for name, value in flat(as_table(one)) if name not in _NOT_COMPARED} for one in (header, other)
    )
    names = [name for name in sorted({*left, *right}, key=_rank) if left.get(name) != right.get(name)]
    shown = [
        f"{name}={_short(left.get(name))} there, {_short(right.get(name))} here" for name in names[:_MOST_DIFFERENCES]
    ]
    return "; ".join(shown + ([f"and {len(names) - len(shown)} more"] if len(names) > len(shown) else []))


def _rank(field: str) -> tuple[bool, bool, str]:
    """The task before what follows from it."""
    return field != "task", field == "layout", field


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def as_json(record: Any) -> bytes:
    """A header or a record as it is written: the same bytes for the same values, and as before there was a field that
    has its default."""
    return json.dumps(identity(record), sort_keys=True).encode()


def part_schema(header: Header, num_observations: int) -> pa.Schema:
    """The columns of a part, with the header in their metadata."""

    # Columns that cannot hold nulls read and write about three times as fast.
    def vector(name: str, scalar: pa.DataType, size: int) -> pa.Field:
        return pa.field(name, pa.list_(pa.field("element", scalar, nullable=False), size), nullable=False)

    sizes = {"weights": header.num_weights, **dict.fromkeys(STATISTICS[:2], num_observations)}
    fields = [
        vector(name, pa.float32() if name == "weights" else pa.float64(), sizes[name])
        if name in sizes
        else pa.field(name, _SCALARS[name], nullable=name in NULLABLE)
        for name in ("seed", *header.columns)
    ]
    return pa.schema(fields, metadata={METADATA_KEY: as_json(header)})


def observation_size(snapshot: PartialSnapshot) -> int:
    """Observation entries O; 0 where the observation statistics are not known."""
    return 0 if snapshot.observation_mean is None else snapshot.observation_mean.size


def encode_part(header: Header, snapshots: Sequence[PartialSnapshot]) -> memoryview:
    """The Parquet file of these snapshots: the same bytes for the same snapshots and header."""
    schema = part_schema(header, observation_size(snapshots[0]))
    columns = []
    for field in schema:
        values = [getattr(snapshot, field.name) for snapshot in snapshots]
        if field.name in _SCALARS:
            columns.append(pa.array(values, type=field.type))
        else:
            columns.append(pa.FixedSizeListArray.from_arrays(pa.array(np.concatenate(values)), type=field.type))
    sink = pa.BufferOutputStream()
    pq.write_table(
        pa.Table.from_arrays(columns, schema=schema),
        sink,
        row_group_size=max(1, ROW_GROUP_BYTES // (4 * header.num_weights)),
        **write_options(schema),
    )
    return memoryview(sink.getvalue())


def write_options(schema: pa.Schema) -> dict[str, Any]:
    """How pyarrow writes snapshots: encoding, compression, statistics and checksums, chosen by measurement."""
    return {
        "data_page_size": 2 * ROW_GROUP_BYTES,
        "compression": "zstd",
        "compression_level": 1,
        "use_dictionary": False,
        "column_encoding": {"weights.list.element": "BYTE_STREAM_SPLIT"},
        "write_statistics": [name for name in schema.names if name in _SCALARS],
        "write_page_checksum": True,
    }


def empty_array(column: pa.DataType, num_rows: int) -> np.ndarray:
    """Room for a column's rows: (num_rows,) or (num_rows, size)."""
    if pa.types.is_fixed_size_list(column):
        return np.empty((num_rows, column.list_size), column.value_type.to_pandas_dtype())
    return np.empty(num_rows, column.to_pandas_dtype())


def empty_column(name: str) -> np.ndarray:
    """What a trajectory has in place of a column that is not there: (0,) or (0, 0)."""
    if name in _SCALARS:
        return np.empty(0, _SCALARS[name].to_pandas_dtype())
    return np.empty((0, 0), np.float32 if name == "weights" else np.float64)


def to_numpy(column: pa.ChunkedArray) -> np.ndarray:
    """(rows,) or (rows, size); nulls become NaN."""
    array = column.combine_chunks()
    if pa.types.is_fixed_size_list(array.type):
        return array.flatten().to_numpy().reshape(len(array), array.type.list_size)
    return array.to_numpy(zero_copy_only=False)
