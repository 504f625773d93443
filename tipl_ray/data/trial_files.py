"""One trial's files: its commit records, parts and resume state, read and held to one another.

Knows one trial; knows nothing of the others, nor of the seal of a data set.
"""

import contextlib
import dataclasses
import hashlib
import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pydantic
import safetensors.numpy

from tipl_ray.data.commits import (
    COMMIT_NAME,
    COMMIT_RECORD,
    COMMITS,
    DIVERGED,
    DIVERGENCE_RECORD,
    PART_NAME,
    STATE_NAME,
    TRAJECTORIES,
    CommitRecord,
    Divergence,
    Run,
    TrialProgress,
    complaints,
    run_progress,
)
from tipl_ray.data.snapshots import Header, differences, part_schema, to_numpy
from tipl_ray.data.storage import Storage, StoreError

Entries = dict[str, int | None]
"""What is in a folder: name -> size of a file, None for a folder."""

_LOST = "restore what is missing, or delete what is left of it with `python jobs/data.py sweep STORAGE --lost --delete`"


class TrialFiles:
    """The files of one trial in a storage."""

    def __init__(self, files: Storage, seed: int) -> None:
        self.seed, self._files = seed, files
        self.divergence_path = f"{self.folder(COMMITS)}/{DIVERGED}"

    def folder(self, parent: str) -> str:
        """The trial's folder among the trajectories or the commits."""
        return f"{parent}/trial={self.seed}"

    @property
    def folders(self) -> str:
        """Both folders as a user finds them, for errors."""
        return " and ".join(self._files.show(self.folder(parent)) for parent in (TRAJECTORIES, COMMITS))

    def commit_path(self, number: int) -> str:
        """Where commit n's record is."""
        return f"{self.folder(COMMITS)}/commit-{number}.json"

    def part_path(self, record: CommitRecord) -> str:
        """Where a commit's part is."""
        return f"{self.folder(TRAJECTORIES)}/{record.part}"

    def state_path(self, record: CommitRecord) -> str:
        """Where a commit's resume state is."""
        return f"{self.folder(COMMITS)}/{record.state}"

    def run(self) -> Run:
        """The trial's unbroken run of commit records."""
        names = self._files.entries(self.folder(COMMITS))
        numbers = itertools.takewhile(lambda number: f"commit-{number}.json" in names, itertools.count(1))
        contents = self._files.each(self.read, [self.commit_path(number) for number in numbers])
        run: list[CommitRecord] = []
        for content in contents:
            record = self.parse_record(len(run) + 1, content)
            if record.first_snapshot != (run[-1].last_snapshot + 1 if run else 0):
                break
            if run and record.config_hash != run[0].config_hash:
                complaint = f"is not of commit 1's configuration: {differences(record.header, run[0].header)}"
                raise self.damaged(self.commit_path(record.commit), complaint)
            if run and record.num_observations != run[0].num_observations:
                complaint = f"num_observations={record.num_observations} is not commit 1's {run[0].num_observations}"
                raise self.damaged(self.commit_path(record.commit), complaint)
            run.append(record)
        return tuple(run)

    def present_run(self) -> tuple[Run, Entries]:
        """The unbroken run, its parts known to be there in full size, and what is in their folder.

        Raises StoreError for a damaged record and for a part that is missing or cut short.
        """
        run = self.run()
        entries = self._files.entries(self.folder(TRAJECTORIES))
        for record in run:
            if (size := entries.get(record.part)) != record.part_bytes:
                absent = "is a folder" if record.part in entries else "is missing"
                found = absent if size is None else f"has {size} bytes"
                complaint = f"{found} but commit {record.commit} recorded {record.part_bytes} bytes"
                raise self.damaged(self.part_path(record), complaint)
        return run, entries

    def progress(self, run: Run, num_snapshots: int | None) -> TrialProgress:
        """How far the trial is committed, of `num_snapshots` expected."""
        progress = run_progress(self.seed, run, num_snapshots)
        # Asked of those alone that are not complete: asking may be a round trip.
        return progress if progress.complete else dataclasses.replace(progress, divergence=self.divergence(run))

    def divergence(self, run: Run | None = None) -> Divergence | None:
        """The record that the trial diverged, held to its commits, which are read where they are not given.

        Raises StoreError for a damaged one.
        """
        path = self.divergence_path
        if DIVERGED not in self._files.entries(self.folder(COMMITS)):
            return None
        try:
            found = DIVERGENCE_RECORD.validate_json(self.read(path), strict=True)
        except pydantic.ValidationError as error:
            raise self.damaged(path, f"is not a record of a divergence: {error.errors()[0]['msg']}") from error
        run = self.run() if run is None else run
        committed = (self.seed, run[-1].last_snapshot, run[-1].config_hash) if run else None
        if (found.seed, found.snapshot, found.config_hash) != committed:
            ended = f"trial {found.seed} ended at snapshot {found.snapshot}"
            raise self.damaged(path, f"records that {ended}, which contradicts its commits")
        return found

    def parse_record(self, number: int, content: bytes) -> CommitRecord:
        """Commit n's record from its file's content. Raises StoreError where it is none."""
        path = self.commit_path(number)
        try:
            record = COMMIT_RECORD.validate_json(content, strict=True)
        except pydantic.ValidationError as error:
            raise self.damaged(path, f"is not a commit record: {complaints(error, 'record')}") from error
        if record.commit != number:
            raise self.damaged(path, f"contains commit={record.commit}")
        return record

    def footer(self, record: CommitRecord) -> pq.FileMetaData:
        """The Parquet footer of a part, checked for the columns, the header and the rows of its record."""
        path = self.part_path(record)
        with self.explained(path), self._files.open(path) as source:
            file = pq.ParquetFile(source)
            if not file.schema_arrow.equals(part_schema(record.header, record.num_observations), check_metadata=True):
                raise self.damaged(path, f"its columns or header differ from those in commit {record.commit}")
            num_rows = sum(file.metadata.row_group(group).num_rows for group in range(file.num_row_groups))
            if num_rows != record.rows:
                raise self.damaged(path, f"has {num_rows} rows but commit {record.commit} recorded {record.rows}")
            return file.metadata

    def row_groups(
        self, record: CommitRecord, footer: pq.FileMetaData, names: Sequence[str], start: int, stop: int
    ) -> Iterator[tuple[int, pa.Table]]:
        """What a part holds of snapshots [start, stop): (index of the first, rows) of one row group at a time."""
        path, first = self.part_path(record), record.first_snapshot
        with self.explained(path), self._files.open(path) as source:
            file = pq.ParquetFile(source, metadata=footer, page_checksum_verification=True)
            for group in range(footer.num_row_groups):
                num_rows = footer.row_group(group).num_rows
                low, high = max(first, start), min(first + num_rows, stop)
                if low < high:
                    rows = file.read_row_group(group, columns=list(names))
                    if len(rows) != num_rows:
                        raise self.damaged(path, f"row group {group} has {len(rows)} of its {num_rows} rows")
                    yield low, rows.slice(low - first, high - low)
                first += num_rows

    def verify_part(self, record: CommitRecord) -> None:
        """Compare a part's digest, columns and numbers with its record; reads it whole. Raises StoreError."""
        path = self.part_path(record)
        if hashlib.sha256(self.read(path)).hexdigest() != record.part_sha256:
            raise self.damaged(path, f"is altered: its SHA-256 is not the one in commit {record.commit}")
        footer = self.footer(record)
        for first, rows in self.row_groups(
            record, footer, ("seed", *record.header.columns), record.first_snapshot, 2**31
        ):
            if not np.array_equal(to_numpy(rows.column("snapshot")), np.arange(first, first + len(rows))):
                raise self.damaged(path, f"its snapshots do not count up from {first}")
            if not (to_numpy(rows.column("seed")) == self.seed).all():
                raise self.damaged(path, f"contains a seed other than {self.seed}")
            for name, column in zip(rows.column_names, rows.columns, strict=True):
                values = column.combine_chunks()
                numbers = values.flatten() if pa.types.is_fixed_size_list(values.type) else values
                if pc.all(pc.is_finite(numbers)).as_py() is False:
                    raise self.damaged(path, f"{name} contains NaN or infinity")

    def state(self, record: CommitRecord) -> dict[str, np.ndarray]:
        """The resume state of a commit. Raises StoreError where it is missing or altered."""
        path = self.state_path(record)
        content = self.read(path)
        if hashlib.sha256(content).hexdigest() != record.state_sha256:
            raise self.damaged(path, f"is altered: its SHA-256 is not the one in commit {record.commit}")
        with self.explained(path):
            return safetensors.numpy.load(content)

    def refuse_other(self, begun: Header, header: Header) -> None:
        """Raise StoreError with the differences if the trial was started with another header."""
        if begun.config_hash != header.config_hash:
            raise StoreError(
                f"{self._files.show(self.commit_path(1))}: trial {self.seed} was started with another configuration: "
                f"{differences(begun, header)}. Choose another storage, or run the experiment that started it; if "
                f"the trial is not needed, delete {self.folders}"
            )

    def refuse_stray_records(self, run: Run) -> None:
        """Raise StoreError for a commit record beyond the run."""
        matches = map(COMMIT_NAME.fullmatch, self._files.entries(self.folder(COMMITS)))
        if stray := [number for match in matches if match and (number := int(match[1])) > len(run)]:
            number = min(stray)
            complaint = f"a commit record before this one is missing (found {len(run)} of {number - 1})"
            if number == len(run) + 1:
                complaint = f"its snapshots do not follow those of the {len(run)} commits before it"
            raise StoreError(f"{self._files.show(self.commit_path(number))}: {complaint}; {_LOST}")

    def refuse_lost(self, run: Run) -> None:
        """Raise StoreError for more beyond the run than a crash leaves: the next commit's part and state."""
        next_snapshot = run[-1].last_snapshot + 1 if run else -1
        for path in sorted(self.own_files()):
            name = path.rpartition("/")[2]
            commit, state, part = (kind.fullmatch(name) for kind in (COMMIT_NAME, STATE_NAME, PART_NAME))
            if (
                (commit and int(commit[1]) > len(run))
                or (state and int(state[1]) > len(run) + 1)
                or (part and int(part[1]) > next_snapshot)
            ):
                raise StoreError(
                    f"{self._files.show(path)}: is beyond the {len(run)} commits of trial {self.seed}, so commit "
                    f"records of it seem to be lost; {_LOST}"
                )

    def garbage(self, run: Run, lost: bool) -> list[str]:
        """What the run does not name: paths of the store's own kind.

        Raises StoreError, unless `lost`, where commit records seem to be lost.
        """
        if not lost:
            self.refuse_lost(run)
        kept = {self.commit_path(record.commit) for record in run}
        kept |= {self.part_path(record) for record in run} | {self.state_path(record) for record in run[-1:]}
        return sorted(set(self.own_files()) - kept)

    def own_files(self) -> list[str]:
        """Paths of the trial's files that bear names of the store's own kind."""
        kinds = (COMMITS, COMMIT_NAME), (COMMITS, STATE_NAME), (TRAJECTORIES, PART_NAME)
        return [
            f"{self.folder(parent)}/{name}"
            for parent, kind in kinds
            for name in filter(kind.fullmatch, self._files.sizes(self.folder(parent)))
        ]

    def read(self, path: str) -> bytes:
        """A file of the trial, whole. Raises StoreError."""
        with self.explained(path):
            return self._files.read(path)

    @contextlib.contextmanager
    def explained(self, path: str) -> Iterator[None]:
        """Turn whatever reading a missing or damaged file of a trial raises into one StoreError."""
        try:
            yield
        except (OSError, pa.ArrowException, safetensors.SafetensorError, UnicodeDecodeError) as error:
            complaint = f"cannot be read: {' '.join(str(error).split())}"
            if isinstance(error, PermissionError) or "AWS Error" in complaint:
                # What cannot be reached need not be damaged.
                way_out = "give access to it, or check the connection, and run again"
                raise StoreError(f"{self._files.show(path)}: {complaint}; {way_out}") from error
            raise self.damaged(path, complaint) from error

    def damaged(self, path: str, complaint: str, way_out: str = "Restore the file") -> StoreError:
        """The error for a file of the trial that is not what it should be."""
        return StoreError(
            f"{self._files.show(path)}: {complaint}. {way_out}, or delete {self.folders} and collect again; other "
            "trials stay as they are"
        )
