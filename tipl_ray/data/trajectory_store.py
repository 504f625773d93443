"""The data set: policy weight trajectories as Parquet parts, and the commit records that make them count (Section 3.1).

Knows how trials are laid out, published and verified under one storage root; knows nothing of PPO, torch or Ray.

    <storage>/trajectories/trial=<seed>/part-<first snapshot>-<digest>.parquet
    <storage>/commits/trial=<seed>/commit-<n>.json, state-<n>-<digest>.safetensors
    <storage>/commits/trial=<seed>/diverged.json
    <storage>/commits/_SUCCESS

A part counts once a commit record names it, and a commit record counts while records 1, 2, ... n have no gap and their
snapshots follow each other from 0. Everything else is garbage, which readers do not see and `sweep` deletes. A trial
that stopped being finite has a record of that, and ends with its last finite snapshot.

`_SUCCESS` is the seal: what the data set was when every trial was whole. While it is there, whoever reads holds the
trials to it, and nothing uncounted may be in the trials' folders, which other readers take as they are.

How files are put under the root, a folder or a bucket's prefix, `storage` knows.

Shapes: T snapshots, P policy weights, O observation entries.
"""

import contextlib
import dataclasses
import difflib
import functools
import hashlib
import itertools
import json
import math
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pydantic
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from tipl_ray.data.storage import TEMPORARY, Storage, StoreError
from tipl_ray.digest import as_table, digest, flat

FORMAT_VERSION = 1
METADATA_KEY = b"tipl_ray"
"""Key of the header's JSON in the metadata of a part's Parquet schema."""
ROW_GROUP_BYTES = 8 * 2**20
"""Raw weights per row group at most: what reading a single snapshot costs."""

_TRAJECTORIES, _COMMITS = "trajectories", "commits"
_SEAL, _DIVERGED = f"{_COMMITS}/_SUCCESS", "diverged.json"
_TRIAL_FOLDER = re.compile(r"trial=(0|[1-9][0-9]*)")
_PART_NAME = re.compile(r"part-([0-9]{8,})-[0-9a-f]{16}\.parquet")
_COMMIT_NAME = re.compile(r"commit-([1-9][0-9]*)\.json")
_STATE_NAME = re.compile(r"state-([1-9][0-9]*)-[0-9a-f]{16}\.safetensors")

_LOST = "restore what is missing, or delete what is left of it with `python jobs/data.py sweep STORAGE --lost --delete`"
_NOT_COMPARED = ("versions.torch", "versions.numpy")
_DIFFERENCES = 5
"""Fields that an error names at most."""

_Count = Annotated[int, pydantic.Field(ge=0, lt=2**31)]
_Bytes = Annotated[int, pydantic.Field(ge=0, lt=2**63)]
_Sha256 = Annotated[str, pydantic.Field(pattern="^[0-9a-f]{64}$")]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Snapshot:
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
    """Trajectory: snapshots of one trial in order; a column that was not asked for has length 0."""

    seed: int
    snapshots_T: NDArray[np.int32]
    iterations_T: NDArray[np.int32]
    epochs_T: NDArray[np.int32]
    env_steps_T: NDArray[np.int64]
    learning_rates_T: NDArray[np.float64]
    episodic_returns_T: NDArray[np.float64]
    """NaN where no episode ended since the last snapshot."""
    weights_TP: NDArray[np.float32]
    observation_means_TO: NDArray[np.float64]
    observation_variances_TO: NDArray[np.float64]
    observation_counts_T: NDArray[np.float64]


@pydantic.with_config(extra="forbid")
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Header:
    """What a trial's weights are and how they were made; every part and every commit record carries it."""

    format_version: int = FORMAT_VERSION
    """Version of this file format."""
    task: str
    """Gymnasium id of the task."""
    layout: tuple[tuple[str, tuple[int, ...], int], ...]
    """(name, shape, offset) of each parameter in the flat weights, without a gap."""
    config: dict[str, Any]
    """What the trial's bits depend on: policy shape, PPO configuration, engine; plain JSON types."""
    versions: dict[str, str]
    """Versions of mujoco, gymnasium, torch and numpy."""

    def __post_init__(self) -> None:
        if self.format_version != FORMAT_VERSION:
            raise ValueError(f"format_version={self.format_version} is not {FORMAT_VERSION}, the one known here")
        end = 0
        for name, shape, offset in self.layout:
            if offset != end or min(shape, default=1) < 1:
                raise ValueError(f"layout: {name!r} of shape {shape} at offset {offset} does not follow offset {end}")
            end += math.prod(shape)
        if not 0 < end < 2**31:
            raise ValueError(f"layout: {end} weights are not between 1 and 2**31 - 1")

    @property
    def num_weights(self) -> int:
        """Policy weights P."""
        _, shape, offset = self.layout[-1]
        return offset + math.prod(shape)

    @property
    def config_hash(self) -> str:
        """Digest of what the trial's bits depend on; the versions of torch and numpy are told, not compared."""
        simulators = {name: self.versions.get(name) for name in ("mujoco", "gymnasium")}
        return digest(self.task, self.layout, self.config, simulators)


@pydantic.with_config(extra="forbid")
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CommitRecord:
    """What makes a part count: commit-<n>.json. One that contradicts itself cannot be built (ValueError)."""

    commit: _Count
    """n, counted from 1."""
    part: str
    """Name of the part's file, in the trial's folder of the trajectories."""
    part_sha256: _Sha256
    part_bytes: _Bytes
    state: str
    """Name of the resume state's file, beside the record; deleted once the next commit is durable."""
    state_sha256: _Sha256
    rows: _Count
    first_snapshot: _Count
    last_snapshot: _Count
    num_observations: _Count
    """Observation entries O."""
    config_hash: str
    header: Header

    def __post_init__(self) -> None:
        # Whole names are rebuilt from checked numbers and digests, so none can lead out of its folder.
        for field, expected in (
            ("part", _part_name(self.first_snapshot, self.part_sha256)),
            ("state", _state_name(self.commit, self.state_sha256)),
            ("rows", self.last_snapshot - self.first_snapshot + 1),
            ("config_hash", self.header.config_hash),
        ):
            if getattr(self, field) != expected:
                raise ValueError(f"{field}={getattr(self, field)!r} is not {expected!r}, which its other fields say")
        if self.rows < 1 or self.commit < 1:
            raise ValueError(f"commit={self.commit} and rows={self.rows} are not both at least 1")


@pydantic.with_config(extra="forbid")
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Divergence:
    """Where a trial stopped being finite, and so ended: diverged.json, beside its commit records."""

    seed: _Count
    snapshot: _Count
    """The last one that is finite; it and all before it are committed."""
    iteration: _Count
    """PPO iterations that were whole by then."""
    array: str
    """What was no longer finite after it: a field of a snapshot, or `critic`."""
    config_hash: str

    def __str__(self) -> str:
        return f"trial {self.seed} diverged after iteration {self.iteration}"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TrialProgress:
    """How far a trial is committed."""

    seed: int
    num_snapshots: int
    """Committed snapshots T."""
    num_commits: int
    num_bytes: int
    """Size of the committed parts on disk."""
    complete: bool
    """All the expected snapshots are committed; False where no number was expected."""
    divergence: Divergence | None = None
    """Why no more of them will be."""

    @property
    def ended(self) -> bool:
        """Whether the trial has nothing left to run."""
        return self.complete or self.divergence is not None


@pydantic.with_config(extra="forbid")
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Seal:
    """What a data set was when every trial was whole: _SUCCESS. One that contradicts itself cannot be built."""

    seeds: tuple[_Bytes, ...]
    """Seeds of all its trials, ascending."""
    num_snapshots: _Count
    """Snapshots of a complete trial."""
    digest: str
    """See `TrajectoryStore.digest`."""
    trials: dict[int, str] | None = None
    """Seed -> digest of that trial and of num_snapshots. Seals of earlier versions have None: there the number of
    snapshots is all that a single trial can be held to."""
    diverged: tuple[_Count, ...] = ()
    """Seeds of the trials that ended early, because they diverged."""

    def __post_init__(self) -> None:
        if self.seeds != tuple(sorted(set(self.seeds))) or (self.trials and sorted(self.trials) != list(self.seeds)):
            raise ValueError(f"seeds={list(self.seeds)} are not the seeds of its trials, ascending")


_Runs = dict[int, tuple[CommitRecord, ...]]
_RECORD, _DIVERGENCE = pydantic.TypeAdapter(CommitRecord), pydantic.TypeAdapter(Divergence)
_SEAL_RECORD = pydantic.TypeAdapter(Seal)

_SCALARS = {
    "seed": pa.int64(),
    "snapshot": pa.int32(),
    "iteration": pa.int32(),
    "epoch": pa.int32(),
    "env_step": pa.int64(),
    "learning_rate": pa.float64(),
    "episodic_return": pa.float64(),
    "observation_count": pa.float64(),
}
COLUMNS = {
    "snapshot": "snapshots_T",
    "iteration": "iterations_T",
    "epoch": "epochs_T",
    "env_step": "env_steps_T",
    "learning_rate": "learning_rates_T",
    "episodic_return": "episodic_returns_T",
    "weights": "weights_TP",
    "observation_mean": "observation_means_TO",
    "observation_variance": "observation_variances_TO",
    "observation_count": "observation_counts_T",
}
"""Parquet column -> field of a Trajectory."""


class TrajectoryStore:
    """The data set under one storage root, a folder or a URI: what is committed, and nothing else."""

    def __init__(self, root: str) -> None:
        """Open without touching anything. Raises StoreError where no filesystem answers to the URI."""
        self.root = root
        # Not yet published files lie among the commits, where no Parquet reader looks.
        self._files = Storage(root, temporaries=_COMMITS)

    def seal(self) -> Seal | None:
        """What the data set was sealed as; None where it is not sealed. Raises StoreError for a damaged seal."""
        content = self._seal_content()
        try:
            return None if content is None else _SEAL_RECORD.validate_json(content, strict=True)
        except pydantic.ValidationError as error:
            raise self._broken_seal(f"is no seal: {_complaints(error, 'seal')}") from error

    def seeds(self) -> tuple[int, ...]:
        """Seeds of the trials, ascending. Raises StoreError where they are not those that a seal names."""
        seal, seeds = self.seal(), self.committed()
        if seal:
            self._hold_seeds(seal, seeds)
        return seeds

    def committed(self) -> tuple[int, ...]:
        """Seeds of the trials with at least one commit, ascending, whatever a seal says: where a collection goes on."""
        seeds = self._trial_seeds(_COMMITS)
        listings = self._files.each(self._files.entries, [_folder(_COMMITS, seed) for seed in seeds])
        return tuple(seed for seed, names in zip(seeds, listings, strict=True) if "commit-1.json" in names)

    def absent(self, seed: int) -> StoreError:
        """The error for a trial without any commit, which says which there are."""
        if (seal := self.seal()) and seed in seal.seeds:
            return self._lost([seed])
        seeds = self.committed()
        there = (
            f"there {'is' if len(seeds) == 1 else 'are'} {_trials(seeds)}" if seeds else "no trial is committed there"
        )
        return StoreError(f"{self._files.show(_COMMITS)}: there is no trial {seed}; {there}; collect it first")

    def progress(self, seed: int, num_snapshots: int | None = None) -> TrialProgress:
        """How much of a trial is committed, of `num_snapshots` expected, whatever a seal says.

        Raises StoreError for a damaged commit record and for a part that is missing or cut short.
        """
        return self._progress(seed, self._present_run(seed), num_snapshots)

    def progress_of(self, seeds: Sequence[int], num_snapshots: int | None = None) -> list[TrialProgress]:
        """`progress` of several trials, of many at once where asking is a round trip."""
        return list(self._files.each(functools.partial(self.progress, num_snapshots=num_snapshots), seeds))

    def divergences(self, seeds: Sequence[int] | None = None) -> dict[int, Divergence]:
        """Those of all trials, or of some, that diverged, by seed. Raises StoreError for a damaged record."""
        seeds = self.seeds() if seeds is None else seeds
        found = self._files.each(lambda seed: self._divergence(seed, None), seeds)
        return {one.seed: one for one in found if one}

    def sound(self, seeds: Sequence[int]) -> tuple[int, ...]:
        """Those of some trials that did not diverge, in their order. Raises as `divergences` does."""
        diverged = self.divergences(seeds)
        return tuple(seed for seed in seeds if seed not in diverged)

    def folders(self) -> tuple[int, ...]:
        """Seeds of the trials that have a folder, committed or not, ascending."""
        return tuple(sorted({*self._trial_seeds(_COMMITS), *self._trial_seeds(_TRAJECTORIES)}))

    def header(self, seeds: Sequence[int] | None = None) -> Header:
        """The header that all trials share, or some of them.

        Raises StoreError where there is none, where two differ, and as `seeds` does.
        """
        headers = self._headers(self.seeds() if seeds is None else seeds)
        if not headers:
            raise StoreError(f"{self._files.show(_COMMITS)}: no trial is committed there; collect first")
        first = min(headers)
        for seed, header in headers.items():
            if header.config_hash != headers[first].config_hash:
                complaint = f"is not of trial {first}'s configuration: {_differences(header, headers[first])}"
                raise self._damaged(_commit_path(seed, 1), complaint, "Move the trial to a storage of its own")
        return headers[first]

    def check_header(self, header: Header) -> None:
        """Raise StoreError, saying what differs, where a trial there was begun with another configuration."""
        for seed, begun in self._headers(self.committed()).items():
            self._refuse_other(seed, begun, header)

    def trajectory(
        self, seed: int, columns: Sequence[str] | None = None, start: int = 0, stop: int | None = None
    ) -> Trajectory:
        """Snapshots [start, stop) of a trial, all columns or the named ones (`snapshot` always).

        Reads the row groups that hold the range and no others, one at a time, comparing each page's checksum; only
        `verify` finds all damage. Raises ValueError for a column or a range that the trial does not have, StoreError
        for what is missing or seen to be damaged, and for a trial that is not as the data set was sealed.
        """
        run = self._held_run(seed)
        num_snapshots = run[-1].last_snapshot + 1
        stop = num_snapshots if stop is None else stop
        if not 0 <= start <= stop <= num_snapshots:
            raise ValueError(f"start={start}, stop={stop} is no range of the {num_snapshots} snapshots of trial {seed}")
        names = tuple(COLUMNS) if columns is None else tuple(dict.fromkeys(("snapshot", *columns)))
        if unknown := [name for name in names if name not in COLUMNS]:
            nearest = difflib.get_close_matches(unknown[0], COLUMNS, n=1, cutoff=0.0)[0]
            raise ValueError(f"columns={unknown}: perhaps {nearest!r}? There are {', '.join(COLUMNS)}")
        needed = [record for record in run if record.first_snapshot < stop and start <= record.last_snapshot]
        # Footers first: a record's word alone is no reason to ask for memory.
        footers = list(self._files.each(functools.partial(self._footer, seed), needed))
        schema = _schema(run[0].header, run[0].num_observations)
        arrays = {name: _empty_array(schema.field(name).type, stop - start if name in names else 0) for name in COLUMNS}
        for record, footer in zip(needed, footers, strict=True):
            for first, rows in self._row_groups(seed, record, footer, names, start, stop):
                for name in names:
                    arrays[name][first - start : first - start + len(rows)] = _to_numpy(rows.column(name))
        return Trajectory(seed=seed, **{field: arrays[name] for name, field in COLUMNS.items()})

    def weights(self, seed: int) -> "StoredWeights":
        """The weights of a trial, read when they are asked for, and no more of them than asked.

        Raises StoreError as `trajectory` does.
        """
        return StoredWeights(self, seed, self._held_run(seed))

    def verify(self, seed: int, num_snapshots: int | None = None) -> TrialProgress:
        """Compare every digest, range, schema and number of a trial with its commit records; reads everything.

        A trial that is being written may be verified; what is committed meanwhile is too.
        Raises StoreError naming the first file that is not what its record says, or that should not be there, or
        the trial that is not as the data set was sealed, or that does not have `num_snapshots`, where given, and has
        not diverged, or any.
        """
        run = self._verified_run(seed)
        if not run and num_snapshots is None:
            raise self.absent(seed)
        progress = self._progress(seed, run, num_snapshots)
        if num_snapshots is not None and not progress.ended:
            raise StoreError(
                f"{self._files.show(_folder(_COMMITS, seed))}: trial {seed} has {progress.num_snapshots} of "
                f"{num_snapshots} snapshots; collect again to go on with it"
            )
        return progress

    def verify_all(self, expected_seeds: Sequence[int], num_snapshots: int) -> tuple[TrialProgress, ...]:
        """Verify that every expected trial is whole and that all share one header. Raises as `verify` does."""
        progress = tuple(self.verify(seed, num_snapshots) for seed in expected_seeds)
        self.verify_folder()
        return progress

    def verify_folder(self) -> None:
        """Verify that nothing foreign is among the trials, that all share one header, and that a seal holds.

        Raises StoreError.
        """
        self._refuse_foreign(_TRAJECTORIES, self._files.entries(_TRAJECTORIES), _TRIAL_FOLDER)
        self.header()
        self.finished()

    def garbage(self, seeds: Sequence[int] | None = None, lost: bool = False) -> tuple[str, ...]:
        """What no unbroken run of commit records names, of all trials or of some: names of the store's own kind.

        Raises StoreError for a commit record that cannot be read and, unless `lost`, for a trial whose commit records
        seem to be lost, as parts lie there that only they can have named.
        """
        return self._garbage(self._runs(self.folders() if seeds is None else seeds), lost)

    def sweep(self, seeds: Sequence[int] | None = None, lost: bool = False) -> tuple[str, ...]:
        """Delete the garbage; returns its names. Only while no writer is open.

        Raises StoreError as `garbage` does, before anything is deleted.
        """
        return self._delete(self.garbage(seeds, lost))

    def digest(self, seeds: Sequence[int] | None = None) -> str:
        """Identity of the data set: digest of the seeds and their parts' SHA-256, in whatever order it was written.

        Raises StoreError for a trial that is not there, and where a seal does not hold for what is asked about.
        """
        seal = self.seal()
        if seal and (seeds is None or set(seeds) == set(seal.seeds)):
            return _digest(self._hold_all(seal))
        runs = self._runs(self.committed() if seeds is None else seeds, seal)
        for seed, run in runs.items():
            if not run:
                raise self.absent(seed)
        return _digest(runs)

    def finish(self, seeds: Sequence[int], num_snapshots: int, verified: Collection[int] = ()) -> None:
        """Seal the data set: verify every trial but those that the caller says were, sweep, write `_SUCCESS`.

        Trials that are there beside the expected ones are sealed with them, as other readers of the folder take them
        too. Raises StoreError as `verify` does, and for one of these that is not complete.
        """
        for seed in sorted(set(self.committed()) - set(seeds)):
            if not (progress := self.progress(seed, num_snapshots)).ended:
                raise StoreError(
                    f"{self._files.show(_folder(_COMMITS, seed))}: trial {seed}, which is none of this experiment's, "
                    f"has {progress.num_snapshots} of {num_snapshots} snapshots, and readers of the folder would take "
                    "it for data. Collect it to its end with an experiment that has it, choose another storage, or "
                    f"delete {self._folders_of(seed)}"
                )
        seeds = sorted({*seeds, *self.committed()})
        self.verify_all([seed for seed in seeds if seed not in verified], num_snapshots)
        # Each record is read once: where that is a round trip, it is what sealing takes.
        runs = self._runs({*seeds, *self.folders()})
        self._delete(self._garbage(runs, lost=False))
        runs = {seed: runs[seed] for seed in seeds}
        short = [seed for seed, run in runs.items() if run[-1].last_snapshot + 1 < num_snapshots]
        seal = Seal(
            seeds=tuple(seeds),
            num_snapshots=num_snapshots,
            digest=_digest(runs),
            diverged=tuple(sorted(self.divergences(short))),
            trials={seed: _trial_digest(num_snapshots, seed, run) for seed, run in runs.items()},
        )
        self._files.write(_SEAL, json.dumps(as_table(seal), indent=2).encode())

    def finished(self) -> bool:
        """Whether the data set is sealed. Raises StoreError where it is, and is not what it was when it was sealed."""
        seal = self.seal()
        if seal:
            self._hold_all(seal)
        return seal is not None

    def _seal_content(self) -> bytes | None:
        try:
            return self._files.read(_SEAL)
        except FileNotFoundError:
            return None
        except (OSError, pa.ArrowException) as error:
            cause = " ".join(str(error).split())
            raise StoreError(f"{self._files.show(_SEAL)}: cannot be read: {cause}; check the storage") from error

    def _hold_all(self, seal: Seal) -> _Runs:
        """The runs of a sealed data set, held to the seal."""
        self._hold_seeds(seal, self.committed())
        runs = self._runs(seal.seeds, seal)
        if (digest := _digest(runs)) != seal.digest:
            complaint = (
                f"says digest={seal.digest}, and the data's is {digest}: a trial was exchanged or the seal edited"
            )
            self._break(seal, self._broken_seal(complaint))
        return runs

    def _hold_seeds(self, seal: Seal, committed: Sequence[int]) -> None:
        """Raise StoreError unless the trials are those that the seal names and nothing else is among them."""
        entries = self._files.entries(_TRAJECTORIES)
        folders = self._trial_seeds(_TRAJECTORIES, entries)
        if lost := [seed for seed in seal.seeds if seed not in committed or seed not in folders]:
            self._break(seal, self._lost(lost))
        # A folder without files is what sweeping leaves.
        uncounted = [
            seed
            for seed in sorted({*committed, *folders} - set(seal.seeds))
            if seed in committed or self._files.entries(_folder(_TRAJECTORIES, seed))
        ]
        if uncounted:
            self._break(seal, self._uncounted(uncounted))
        try:
            self._refuse_foreign(_TRAJECTORIES, entries, _TRIAL_FOLDER)
        except StoreError as error:
            self._break(seal, error)

    def _hold(self, seal: Seal, seed: int, run: Sequence[CommitRecord], entries: dict[str, int | None]) -> None:
        """Raise StoreError unless a trial is the one that the seal names and its folder has nothing else."""
        try:
            if seed not in seal.seeds:
                raise self._uncounted([seed]) if run else self.absent(seed)
            if not run:
                raise self._lost([seed])
            if seal.trials is not None:
                kept = seal.trials[seed] == _trial_digest(seal.num_snapshots, seed, run)
            else:
                kept = _progress(seed, run, seal.num_snapshots).complete
            kept &= seed not in seal.diverged or self._divergence(seed, run) is not None
            if not kept:
                self._refuse_stray_records(seed, run)
                complaint = f"its {run[-1].last_snapshot + 1} snapshots are not those that the data set was sealed with"
                raise self._damaged(_folder(_COMMITS, seed), complaint, "Restore the trial")
            counted = {record.part for record in run}
            strays = {name: size for name, size in entries.items() if name not in counted}
            self._refuse_foreign(_folder(_TRAJECTORIES, seed), strays, _PART_NAME)
            for name in filter(_PART_NAME.fullmatch, strays):
                path = self._files.show(f"{_folder(_TRAJECTORIES, seed)}/{name}")
                raise StoreError(
                    f"{path}: no commit record names it, and other readers of this sealed data set take it for data; "
                    "delete it with `python jobs/data.py sweep STORAGE --delete`"
                )
        except StoreError as error:
            self._break(seal, error)

    def _break(self, seal: Seal, error: StoreError) -> None:
        """Raise the error, unless the seal is another by now: then it is a writer's work that was seen half done."""
        if self.seal() == seal:
            raise error

    def _broken_seal(self, complaint: str) -> StoreError:
        return StoreError(
            f"{self._files.show(_SEAL)}: {complaint}. Restore what was there, or delete this file and collect again, "
            "which verifies every trial and seals the data set anew"
        )

    def _lost(self, seeds: Sequence[int]) -> StoreError:
        return StoreError(
            f"{self._files.show(_folder(_COMMITS, seeds[0]))}: {_trials(seeds)} of this sealed data set "
            f"{'is' if len(seeds) == 1 else 'are'} missing. Restore {self._folders_of(*seeds)}, or collect again; "
            "other trials stay as they are"
        )

    def _uncounted(self, seeds: Sequence[int]) -> StoreError:
        return StoreError(
            f"{self._files.show(_folder(_COMMITS, seeds[0]))}: {_trials(seeds)} "
            f"{'is' if len(seeds) == 1 else 'are'} not of the data set that was sealed here, and other readers take it "
            f"for data. Move {self._folders_of(*seeds)} away, or delete {self._files.show(_SEAL)} and collect again, "
            "which verifies every trial and seals the data set anew"
        )

    def _folders_of(self, *seeds: int) -> str:
        folders = [
            self._files.show(_folder(parent, seed)) for seed in seeds[:1] for parent in (_TRAJECTORIES, _COMMITS)
        ]
        return " and ".join(folders) + (" and those of the others" if len(seeds) > 1 else "")

    def _garbage(self, runs: _Runs, lost: bool) -> tuple[str, ...]:
        garbage = [f"{_COMMITS}/{name}" for name in self._files.sizes(_COMMITS) if name.startswith(TEMPORARY)]
        for found in self._files.each(lambda item: self._garbage_of(*item, lost), list(runs.items())):
            garbage += found
        return tuple(garbage)

    def _delete(self, paths: tuple[str, ...]) -> tuple[str, ...]:
        for path in paths:
            self._files.delete(path)
        return paths

    def _runs(self, seeds: Iterable[int], seal: Seal | None = None) -> _Runs:
        """Each trial's run of commit records, by seed, ascending, held to a seal."""
        seeds = sorted(set(seeds))
        run = functools.partial(self._present_run, seal=seal) if seal else self._run
        return dict(zip(seeds, self._files.each(run, seeds), strict=True))

    def _headers(self, seeds: Sequence[int]) -> dict[int, Header]:
        """The headers that trials were begun with."""
        return dict(zip(seeds, self._files.each(self._header, seeds), strict=True))

    def _header(self, seed: int) -> Header:
        path = _commit_path(seed, 1)
        with self._explained(path):
            try:
                content = self._files.read(path)
            except FileNotFoundError:
                raise self.absent(seed) from None
        return self._record(seed, 1, content).header

    def _refuse_other(self, seed: int, begun: Header, header: Header) -> None:
        if begun.config_hash != header.config_hash:
            raise StoreError(
                f"{self._files.show(_commit_path(seed, 1))}: trial {seed} was begun with another configuration: "
                f"{_differences(begun, header)}. Choose another storage, or run the experiment that began it; if "
                f"nobody needs the trial, delete {self._folders_of(seed)}"
            )

    def _garbage_of(self, seed: int, run: Sequence[CommitRecord], lost: bool) -> list[str]:
        if not lost:
            self._refuse_lost(seed, run)
        kept = {_commit_path(seed, record.commit) for record in run}
        kept |= {_part_path(seed, record) for record in run} | {_state_path(seed, record) for record in run[-1:]}
        return sorted(set(self._own_files(seed)) - kept)

    def _trial_seeds(self, parent: str, entries: dict[str, int | None] | None = None) -> list[int]:
        entries = self._files.entries(parent) if entries is None else entries
        matches = (_TRIAL_FOLDER.fullmatch(name) for name, size in entries.items() if size is None)
        return sorted(int(match[1]) for match in matches if match)

    def _own_files(self, seed: int) -> list[str]:
        """Paths of the files of a trial that bear names of the store's own kind."""
        kinds = (_COMMITS, _COMMIT_NAME), (_COMMITS, _STATE_NAME), (_TRAJECTORIES, _PART_NAME)
        return [
            f"{_folder(parent, seed)}/{name}"
            for parent, kind in kinds
            for name in filter(kind.fullmatch, self._files.sizes(_folder(parent, seed)))
        ]

    def _record(self, seed: int, number: int, content: bytes) -> CommitRecord:
        path = _commit_path(seed, number)
        try:
            record = _RECORD.validate_json(content, strict=True)
        except pydantic.ValidationError as error:
            raise self._damaged(path, f"is no commit record: {_complaints(error, 'record')}") from error
        if record.commit != number:
            raise self._damaged(path, f"says commit={record.commit}")
        return record

    def _run(self, seed: int) -> tuple[CommitRecord, ...]:
        """The trial's unbroken run of commit records."""
        names = self._files.entries(_folder(_COMMITS, seed))
        numbers = itertools.takewhile(lambda number: f"commit-{number}.json" in names, itertools.count(1))
        contents = self._files.each(self._read, [_commit_path(seed, number) for number in numbers])
        run: list[CommitRecord] = []
        for content in contents:
            record = self._record(seed, len(run) + 1, content)
            if record.first_snapshot != (run[-1].last_snapshot + 1 if run else 0):
                break
            if run and record.config_hash != run[0].config_hash:
                complaint = f"is not of commit 1's configuration: {_differences(record.header, run[0].header)}"
                raise self._damaged(_commit_path(seed, record.commit), complaint)
            if run and record.num_observations != run[0].num_observations:
                complaint = f"num_observations={record.num_observations} is not commit 1's {run[0].num_observations}"
                raise self._damaged(_commit_path(seed, record.commit), complaint)
            run.append(record)
        return tuple(run)

    def _progress(self, seed: int, run: Sequence[CommitRecord], num_snapshots: int | None) -> TrialProgress:
        progress = _progress(seed, run, num_snapshots)
        # Asked of those alone that are not complete: asking may be a round trip.
        return progress if progress.complete else dataclasses.replace(progress, divergence=self._divergence(seed, run))

    def _divergence(self, seed: int, run: Sequence[CommitRecord] | None) -> Divergence | None:
        """The record that a trial diverged, held to its commits, which are read where they are not given."""
        path = _divergence_path(seed)
        if _DIVERGED not in self._files.entries(_folder(_COMMITS, seed)):
            return None
        try:
            found = _DIVERGENCE.validate_json(self._read(path), strict=True)
        except pydantic.ValidationError as error:
            raise self._damaged(path, f"is no record of a divergence: {error.errors()[0]['msg']}") from error
        run = self._run(seed) if run is None else run
        committed = (seed, run[-1].last_snapshot, run[-1].config_hash) if run else None
        if (found.seed, found.snapshot, found.config_hash) != committed:
            raise self._damaged(path, f"says that trial {found.seed} ended with snapshot {found.snapshot}, not so here")
        return found

    def _held_run(self, seed: int) -> tuple[CommitRecord, ...]:
        """The unbroken run, at least one commit, its parts known to be there, held to the seal where there is one."""
        run = self._present_run(seed, self.seal())
        if not run:
            raise self.absent(seed)
        return run

    def _present_run(self, seed: int, seal: Seal | None = None) -> tuple[CommitRecord, ...]:
        """The unbroken run, its parts known to be there in full size, held to a seal."""
        run = self._run(seed)
        entries = self._files.entries(_folder(_TRAJECTORIES, seed))
        for record in run:
            if (size := entries.get(record.part)) != record.part_bytes:
                found = (
                    f"has {size} bytes"
                    if size is not None
                    else "is a folder"
                    if record.part in entries
                    else "is missing"
                )
                complaint = f"{found} where commit {record.commit} says {record.part_bytes} bytes"
                raise self._damaged(_part_path(seed, record), complaint)
        if seal:
            self._hold(seal, seed, run, entries)
        return run

    def _verified_run(self, seed: int) -> tuple[CommitRecord, ...]:
        verified = 0
        while True:
            run = self._present_run(seed, self.seal())
            try:
                for record in run[verified:]:
                    self._verify_part(seed, record)
                verified = len(run)
                self._refuse_stray_records(seed, run)
                if run:
                    self._state(seed, run[-1])
                folder = _folder(_TRAJECTORIES, seed)
                self._refuse_foreign(folder, self._files.entries(folder), _PART_NAME)
                return run
            except StoreError:
                # A writer that goes on adds a record and takes the state before it away.
                if len(self._run(seed)) == len(run):
                    raise

    def _footer(self, seed: int, record: CommitRecord) -> pq.FileMetaData:
        """The Parquet footer of a part, found to hold the columns, the header and the rows that its record says."""
        path = _part_path(seed, record)
        with self._explained(path), self._files.open(path) as source:
            file = pq.ParquetFile(source)
            if not file.schema_arrow.equals(_schema(record.header, record.num_observations), check_metadata=True):
                raise self._damaged(path, f"its columns or header are not those that commit {record.commit} says")
            num_rows = sum(file.metadata.row_group(group).num_rows for group in range(file.num_row_groups))
            if num_rows != record.rows:
                raise self._damaged(path, f"has {num_rows} rows where commit {record.commit} says {record.rows}")
            return file.metadata

    def _row_groups(
        self, seed: int, record: CommitRecord, footer: pq.FileMetaData, names: Sequence[str], start: int, stop: int
    ) -> Iterator[tuple[int, pa.Table]]:
        """What a part holds of snapshots [start, stop): (index of the first, rows) of one row group at a time."""
        path, first = _part_path(seed, record), record.first_snapshot
        with self._explained(path), self._files.open(path) as source:
            file = pq.ParquetFile(source, metadata=footer, page_checksum_verification=True)
            for group in range(footer.num_row_groups):
                num_rows = footer.row_group(group).num_rows
                low, high = max(first, start), min(first + num_rows, stop)
                if low < high:
                    rows = file.read_row_group(group, columns=list(names))
                    if len(rows) != num_rows:
                        raise self._damaged(path, f"row group {group} has {len(rows)} of its {num_rows} rows")
                    yield low, rows.slice(low - first, high - low)
                first += num_rows

    def _verify_part(self, seed: int, record: CommitRecord) -> None:
        path = _part_path(seed, record)
        if hashlib.sha256(self._read(path)).hexdigest() != record.part_sha256:
            raise self._damaged(path, f"is altered: its SHA-256 is not the one in commit {record.commit}")
        footer = self._footer(seed, record)
        for first, rows in self._row_groups(seed, record, footer, ("seed", *COLUMNS), record.first_snapshot, 2**31):
            if not np.array_equal(_to_numpy(rows.column("snapshot")), np.arange(first, first + len(rows))):
                raise self._damaged(path, f"its snapshots do not count up from {first}")
            if not (_to_numpy(rows.column("seed")) == seed).all():
                raise self._damaged(path, f"holds another seed than {seed}")
            for name, column in zip(rows.column_names, rows.columns, strict=True):
                values = column.combine_chunks()
                numbers = values.flatten() if pa.types.is_fixed_size_list(values.type) else values
                if pc.all(pc.is_finite(numbers)).as_py() is False:
                    raise self._damaged(path, f"{name} holds NaN or infinity")

    def _state(self, seed: int, record: CommitRecord) -> dict[str, np.ndarray]:
        path = _state_path(seed, record)
        content = self._read(path)
        if hashlib.sha256(content).hexdigest() != record.state_sha256:
            raise self._damaged(path, f"is altered: its SHA-256 is not the one in commit {record.commit}")
        with self._explained(path):
            return safetensors.numpy.load(content)

    def _refuse_stray_records(self, seed: int, run: Sequence[CommitRecord]) -> None:
        matches = map(_COMMIT_NAME.fullmatch, self._files.entries(_folder(_COMMITS, seed)))
        if stray := [number for match in matches if match and (number := int(match[1])) > len(run)]:
            number = min(stray)
            complaint = f"a commit record before this one is missing (found {len(run)} of {number - 1})"
            if number == len(run) + 1:
                complaint = f"its snapshots do not follow those of the {len(run)} commits before it"
            raise StoreError(f"{self._files.show(_commit_path(seed, number))}: {complaint}; {_LOST}")

    def _refuse_lost(self, seed: int, run: Sequence[CommitRecord]) -> None:
        """A crash leaves at most the next commit's part and state; what lies beyond was committed once."""
        next_snapshot = run[-1].last_snapshot + 1 if run else -1
        for path in sorted(self._own_files(seed)):
            name = path.rpartition("/")[2]
            commit, state, part = (kind.fullmatch(name) for kind in (_COMMIT_NAME, _STATE_NAME, _PART_NAME))
            if (
                (commit and int(commit[1]) > len(run))
                or (state and int(state[1]) > len(run) + 1)
                or (part and int(part[1]) > next_snapshot)
            ):
                raise StoreError(
                    f"{self._files.show(path)}: is beyond the {len(run)} commits of trial {seed}, so commit records of "
                    f"it seem to be lost; {_LOST}"
                )

    def _refuse_foreign(self, folder: str, entries: dict[str, int | None], pattern: re.Pattern[str]) -> None:
        for name, size in entries.items():
            # Hidden files are left alone, but for those that DuckDB and Polars read all the same.
            hidden = name.startswith((".", "_")) and size is not None and not name.lower().endswith(".parquet")
            if not pattern.fullmatch(name) and not hidden:
                path = self._files.show(f"{folder}/{name}")
                raise StoreError(f"{path}: is not the store's, and readers of the folder may take it for data; move it")

    def _read(self, path: str) -> bytes:
        with self._explained(path):
            return self._files.read(path)

    @contextlib.contextmanager
    def _explained(self, path: str) -> Iterator[None]:
        """Turn whatever reading a missing or damaged file of a trial raises into one StoreError."""
        try:
            yield
        except (OSError, pa.ArrowException, safetensors.SafetensorError, UnicodeDecodeError) as error:
            complaint = f"cannot be read: {' '.join(str(error).split())}"
            if isinstance(error, PermissionError) or "AWS Error" in complaint:
                # What cannot be reached need not be damaged.
                way_out = "give access to it, or check the connection, and run again"
                raise StoreError(f"{self._files.show(path)}: {complaint}; {way_out}") from error
            raise self._damaged(path, complaint) from error

    def _damaged(self, path: str, complaint: str, way_out: str = "Restore the file") -> StoreError:
        """The error for a file of a trial that is not what it should be."""
        match = _TRIAL_FOLDER.fullmatch(path.split("/")[1])
        assert match, "it is a trial's"
        return StoreError(
            f"{self._files.show(path)}: {complaint}. {way_out}, or delete {self._folders_of(int(match[1]))} and "
            "collect again; other trials stay as they are"
        )


class StoredWeights:
    """Weights of one trial, (T, P), that stay in the store: [start:stop] and [:, start:stop] read what they give."""

    def __init__(self, store: TrajectoryStore, seed: int, run: Sequence[CommitRecord]) -> None:
        self._store, self._seed, self._run = store, seed, run
        self.shape = (run[-1].last_snapshot + 1, run[0].header.num_weights)

    def __getitem__(self, part: slice | tuple[slice, slice]) -> NDArray[np.float32]:
        """Some snapshots, all or some of their weights. Raises StoreError for what is seen to be damaged."""
        rows, columns = part if isinstance(part, tuple) else (part, slice(None))
        (start, stop, _), (left, right, _) = rows.indices(self.shape[0]), columns.indices(self.shape[1])
        given = np.empty((max(0, stop - start), max(0, right - left)), np.float32)
        for record in self._run:
            if record.first_snapshot < stop and start <= record.last_snapshot:
                footer = self._store._footer(self._seed, record)
                for first, read in self._store._row_groups(self._seed, record, footer, ("weights",), start, stop):
                    weights_BP = _to_numpy(read.column("weights"))
                    given[first - start : first - start + len(read)] = weights_BP[:, left:right]
        return given


class TrialWriter:
    """The one writer of a trial: goes on after the last commit, buffers snapshots, publishes them commit by commit."""

    def __init__(self, store: TrajectoryStore, seed: int, header: Header) -> None:
        """Find the trial's unbroken run of commits; nothing is written.

        Raises StoreError where the store cannot tell two writers apart, the trial was begun with another
        configuration, its parts or last state are damaged, or a commit record lies beyond the run.
        """
        self._store, self._files, self._seed, self._header = store, store._files, seed, header
        self._files.check_put_if_absent()
        run = store._present_run(seed)
        if run:
            store._refuse_other(seed, run[0].header, header)
        store._refuse_stray_records(seed, run)
        self._last = run[-1] if run else None
        self._state = store._state(seed, run[-1]) if run else None
        self._buffer: list[Snapshot] = []
        self.divergence = store._divergence(seed, run)
        """Why nothing more is to be appended, if the trial has diverged."""
        if self.divergence is None and self._state and _DIVERGED in self._state:
            # Killed between its last commit and the record of why there are no more.
            self.divergence = _DIVERGENCE.validate_json(self._state[_DIVERGED].tobytes())

    @property
    def state(self) -> dict[str, np.ndarray] | None:
        """Resume state of the last commit, bit for bit as it was given; None before the first."""
        return self._state

    @property
    def next_snapshot(self) -> int:
        """Index that the next appended snapshot must have."""
        return (self._last.last_snapshot + 1 if self._last else 0) + len(self._buffer)

    def append(self, snapshot: Snapshot) -> None:
        """Buffer a copy of the next snapshot. Raises StoreError naming seed, snapshot and field that do not fit."""
        for field, expected in (("seed", self._seed), ("snapshot", self.next_snapshot)):
            if getattr(snapshot, field) != expected:
                raise self._misfit(snapshot, field, f"{getattr(snapshot, field)} is not {expected}")
        for field, limit in (("iteration", 2**31), ("epoch", 2**31), ("env_step", 2**63)):
            if not 0 <= getattr(snapshot, field) < limit:
                raise self._misfit(snapshot, field, f"{getattr(snapshot, field)} is not between 0 and {limit - 1}")
        for field in ("learning_rate", "observation_count", "episodic_return"):
            value = getattr(snapshot, field)
            if not np.isfinite(0.0 if value is None and field == "episodic_return" else value):
                raise self._misfit(snapshot, field, f"{value} is not finite")
        size = self._num_observations or snapshot.observation_mean.size
        copy = dataclasses.replace(
            snapshot,
            weights=self._checked_copy(snapshot, "weights", self._header.num_weights, np.float32),
            observation_mean=self._checked_copy(snapshot, "observation_mean", size, np.float64),
            observation_variance=self._checked_copy(snapshot, "observation_variance", size, np.float64),
        )
        self._buffer.append(copy)

    def commit(self, state: dict[str, np.ndarray]) -> CommitRecord:
        """Publish the buffered snapshots and the state to resume from: part, then state, then the record that counts.

        When it returns that record, they survive a power cut. Raises StoreError where nothing is buffered, another
        writer holds the trial or the storage refuses a write; readers then still see the commit before.
        """
        if not self._buffer:
            raise StoreError(f"trial {self._seed}: no snapshot was appended since the last commit")
        part, state_file = _encode_part(self._header, self._buffer), _encode_state(state)
        record, before = self._record(part, state_file), self._last
        self._unseal(record)
        self._files.write(_part_path(self._seed, record), part)
        self._files.write(_state_path(self._seed, record), state_file)
        if not self._files.put_if_absent(_commit_path(self._seed, record.commit), _json(record)):
            self._withdraw(record)
            raise self._beaten(record)
        self._last, self._buffer = record, []
        self._state = {name: array.copy() for name, array in state.items()}
        if before:
            self._files.delete(_state_path(self._seed, before))
        return record

    def _unseal(self, record: CommitRecord) -> None:
        """Take the seal away before anything is there that it does not name; raise StoreError where the commit is.

        Whoever seals a data set has all its commits before. So a writer that finds a seal and not the commit that it is
        about to make is the one who goes on, and one that slept while another went on leaves the other's seal alone.
        """
        if self._store._seal_content() is not None:
            if self._files.exists(_commit_path(self._seed, record.commit)):
                raise self._beaten(record)
            self._files.delete(_SEAL)

    def _withdraw(self, record: CommitRecord) -> None:
        """Delete what was written for a commit that another writer made, unless its record names the same files."""
        path = _commit_path(self._seed, record.commit)
        winner = self._store._record(self._seed, record.commit, self._store._read(path))
        if winner.part != record.part:
            self._files.delete(_part_path(self._seed, record))
        if winner.state != record.state or self._files.exists(_commit_path(self._seed, record.commit + 1)):
            self._files.delete(_state_path(self._seed, record))

    def _beaten(self, record: CommitRecord) -> StoreError:
        return StoreError(
            f"{self._files.show(_commit_path(self._seed, record.commit))}: another writer holds trial {self._seed} and "
            f"made commit {record.commit}; end one of the two runs on this storage"
        )

    def diverge(self, iteration: int, array: str) -> Divergence:
        """End the trial: publish the buffered snapshots, then that `array` is not finite after `iteration` iterations.

        Raises StoreError as `commit` does.
        """
        self.divergence = Divergence(
            seed=self._seed,
            snapshot=self.next_snapshot - 1,
            iteration=iteration,
            array=array,
            config_hash=self._header.config_hash,
        )
        if self._buffer:
            # There is nothing to resume; the state says what is still to be recorded.
            self.commit({_DIVERGED: np.frombuffer(_json(self.divergence), dtype=np.uint8)})
        self.record_divergence()
        return self.divergence

    def record_divergence(self) -> None:
        """Publish the record of the divergence, where it is not there yet."""
        assert self.divergence is not None, "the trial has diverged"
        self._files.put_if_absent(_divergence_path(self._seed), _json(self.divergence))

    def _record(self, part: memoryview, state_file: bytes) -> CommitRecord:
        commit = self._last.commit + 1 if self._last else 1
        first, last = int(self._buffer[0].snapshot), int(self._buffer[-1].snapshot)
        part_sha256, state_sha256 = hashlib.sha256(part).hexdigest(), hashlib.sha256(state_file).hexdigest()
        return CommitRecord(
            commit=commit,
            part=_part_name(first, part_sha256),
            part_sha256=part_sha256,
            part_bytes=part.nbytes,
            state=_state_name(commit, state_sha256),
            state_sha256=state_sha256,
            rows=len(self._buffer),
            first_snapshot=first,
            last_snapshot=last,
            num_observations=self._buffer[0].observation_mean.size,
            config_hash=self._header.config_hash,
            header=self._header,
        )

    @property
    def _num_observations(self) -> int | None:
        if self._buffer:
            return self._buffer[0].observation_mean.size
        return self._last.num_observations if self._last else None

    def _checked_copy(self, snapshot: Snapshot, field: str, size: int, dtype: type[np.floating]) -> np.ndarray:
        array = getattr(snapshot, field)
        if array.dtype != dtype or array.shape != (size,):
            raise self._misfit(snapshot, field, f"{array.dtype}{list(array.shape)} is not {np.dtype(dtype)}[{size}]")
        if not (finite := np.isfinite(array)).all():
            position = int(np.argmin(finite))
            raise self._misfit(snapshot, field, f"{array[position]} at position {position} is not finite")
        return array.copy()

    def _misfit(self, snapshot: Snapshot, field: str, complaint: str) -> StoreError:
        return StoreError(
            f"trial {self._seed}, snapshot {snapshot.snapshot}: {field}={complaint}; what was committed before stays"
        )


def _digest(runs: _Runs) -> str:
    return digest([[seed, [record.part_sha256 for record in run]] for seed, run in runs.items()])


def _trial_digest(num_snapshots: int, seed: int, run: Sequence[CommitRecord]) -> str:
    return digest(num_snapshots, seed, [record.part_sha256 for record in run])


def _progress(seed: int, run: Sequence[CommitRecord], num_snapshots: int | None) -> TrialProgress:
    committed = run[-1].last_snapshot + 1 if run else 0
    return TrialProgress(
        seed=seed,
        num_snapshots=committed,
        num_commits=len(run),
        num_bytes=sum(record.part_bytes for record in run),
        complete=committed == num_snapshots,
    )


def _folder(parent: str, seed: int) -> str:
    return f"{parent}/trial={seed}"


def _commit_path(seed: int, number: int) -> str:
    return f"{_folder(_COMMITS, seed)}/commit-{number}.json"


def _divergence_path(seed: int) -> str:
    return f"{_folder(_COMMITS, seed)}/{_DIVERGED}"


def _part_path(seed: int, record: CommitRecord) -> str:
    return f"{_folder(_TRAJECTORIES, seed)}/{record.part}"


def _state_path(seed: int, record: CommitRecord) -> str:
    return f"{_folder(_COMMITS, seed)}/{record.state}"


def _part_name(first_snapshot: int, sha256: str) -> str:
    return f"part-{first_snapshot:08d}-{sha256[:16]}.parquet"


def _state_name(commit: int, sha256: str) -> str:
    return f"state-{commit}-{sha256[:16]}.safetensors"


def _json(table: Header | CommitRecord | Divergence) -> bytes:
    return json.dumps(as_table(table), sort_keys=True).encode()


def _differences(header: Header, other: Header) -> str:
    """What counts and differs between a header and another, by dotted field, the first few of them."""
    left, right = (
        {name: value for name, value in flat(as_table(one)) if name not in _NOT_COMPARED} for one in (header, other)
    )
    names = [name for name in sorted({*left, *right}, key=_rank) if left.get(name) != right.get(name)]
    shown = [f"{name}={_short(left.get(name))} there, {_short(right.get(name))} here" for name in names[:_DIFFERENCES]]
    return "; ".join(shown + ([f"and {len(names) - len(shown)} more"] if len(names) > len(shown) else []))


def _rank(field: str) -> tuple[bool, bool, str]:
    """The task before what follows from it."""
    return field != "task", field == "layout", field


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _trials(seeds: Sequence[int]) -> str:
    """Trials as a person lists them.

    >>> _trials([3]), _trials([1, 2, 3, 7])
    ('trial 3', 'trials 1-3, 7')
    """
    ranges: list[list[int]] = []
    for seed in sorted(seeds):
        if ranges and seed == ranges[-1][-1] + 1:
            ranges[-1] = [ranges[-1][0], seed]
        else:
            ranges.append([seed])
    words = ["-".join(map(str, one)) for one in ranges]
    return f"trial{'s' if len(seeds) > 1 else ''} {', '.join(words)}"


def _complaints(error: pydantic.ValidationError, whole: str) -> str:
    return "; ".join(f"{'.'.join(map(str, item['loc'])) or whole}: {item['msg']}" for item in error.errors())


def _schema(header: Header, num_observations: int) -> pa.Schema:
    # Columns that cannot hold nulls read and write about three times as fast.
    def vector(name: str, scalar: pa.DataType, size: int) -> pa.Field:
        return pa.field(name, pa.list_(pa.field("element", scalar, nullable=False), size), nullable=False)

    scalars = [pa.field(name, scalar, nullable=name == "episodic_return") for name, scalar in _SCALARS.items()]
    vectors = [
        vector("weights", pa.float32(), header.num_weights),
        vector("observation_mean", pa.float64(), num_observations),
        vector("observation_variance", pa.float64(), num_observations),
    ]
    return pa.schema([*scalars[:-1], *vectors, scalars[-1]], metadata={METADATA_KEY: _json(header)})


def _encode_part(header: Header, snapshots: Sequence[Snapshot]) -> memoryview:
    """The Parquet file of these snapshots: the same bytes for the same snapshots and header."""
    schema = _schema(header, snapshots[0].observation_mean.size)
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
        data_page_size=2 * ROW_GROUP_BYTES,
        compression="zstd",
        compression_level=1,
        use_dictionary=False,
        column_encoding={"weights.list.element": "BYTE_STREAM_SPLIT"},
        write_statistics=list(_SCALARS),
        write_page_checksum=True,
    )
    return memoryview(sink.getvalue())


def _encode_state(state: dict[str, np.ndarray]) -> bytes:
    for name, array in state.items():
        if not isinstance(array, np.ndarray) or array.dtype.kind not in "biuf":
            raise StoreError(f"state[{name!r}] is no array of numbers: {getattr(array, 'dtype', type(array).__name__)}")
    # Not ascontiguousarray, which would give a scalar array a dimension.
    return safetensors.numpy.save({name: np.array(array, order="C") for name, array in state.items()})


def _empty_array(column: pa.DataType, num_rows: int) -> np.ndarray:
    if pa.types.is_fixed_size_list(column):
        return np.empty((num_rows, column.list_size), column.value_type.to_pandas_dtype())
    return np.empty(num_rows, column.to_pandas_dtype())


def _to_numpy(column: pa.ChunkedArray) -> np.ndarray:
    """(rows,) or (rows, size); nulls become NaN."""
    array = column.combine_chunks()
    if pa.types.is_fixed_size_list(array.type):
        return array.flatten().to_numpy().reshape(len(array), array.type.list_size)
    return array.to_numpy(zero_copy_only=False)
