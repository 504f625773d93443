"""The one writer of a trial (Section 3.1): buffers snapshots, publishes them commit by commit, resumes after the last.

Above the trajectory store, which knows nothing of writers.
"""

import dataclasses
import hashlib
from typing import Any

import numpy as np

from tipl_ray.data.commits import (
    DIVERGED,
    DIVERGENCE_RECORD,
    SEAL,
    CommitRecord,
    Divergence,
    encode_state,
    part_name,
    state_name,
)
from tipl_ray.data.snapshots import (
    NULLABLE,
    STATISTICS,
    Header,
    PartialSnapshot,
    as_json,
    encode_part,
    observation_size,
)
from tipl_ray.data.storage import StoreError
from tipl_ray.data.trajectory_store import TrajectoryStore


class TrialWriter:
    """The only writer of a trial: resumes after the last commit, buffers snapshots, publishes them commit by commit."""

    def __init__(self, store: TrajectoryStore, seed: int, header: Header) -> None:
        """Find the trial's unbroken run of commits; nothing is written.

        Raises StoreError where the store cannot tell two writers apart, the trial was started with another
        configuration, its parts or last state are damaged, or a commit record is beyond the run.
        """
        self._store, self._files, self._trial = store, store.files, store.trial(seed)
        self._seed, self._header = seed, header
        self._files.check_put_if_absent()
        run, _ = self._trial.present_run()
        if run:
            self._trial.refuse_other(run[0].header, header)
        self._trial.refuse_stray_records(run)
        self._last = run[-1] if run else None
        self._state = self._trial.state(run[-1]) if run else None
        self._buffer: list[PartialSnapshot] = []
        self.divergence = self._trial.divergence(run)
        """Why nothing more is to be appended, if the trial has diverged."""
        if self.divergence is None and self._state and DIVERGED in self._state:
            # Killed between its last commit and the record of why there are no more.
            self.divergence = DIVERGENCE_RECORD.validate_json(self._state[DIVERGED].tobytes())

    @property
    def state(self) -> dict[str, np.ndarray] | None:
        """Resume state of the last commit, bit for bit as it was given; None before the first."""
        return self._state

    @property
    def next_snapshot(self) -> int:
        """Index that the next appended snapshot must have."""
        return (self._last.last_snapshot + 1 if self._last else 0) + len(self._buffer)

    def append(self, snapshot: PartialSnapshot) -> None:
        """Buffer a copy of the next snapshot. Raises StoreError naming seed, snapshot and field that do not fit."""
        for field, expected in (("seed", self._seed), ("snapshot", self.next_snapshot)):
            if getattr(snapshot, field) != expected:
                raise self._misfit(snapshot, field, f"{getattr(snapshot, field)} is not {expected}")
        self._check_columns(snapshot)
        for field, limit in (("step", 2**63), ("iteration", 2**31), ("epoch", 2**31), ("env_step", 2**63)):
            if (number := getattr(snapshot, field)) is not None and not 0 <= number < limit:
                raise self._misfit(snapshot, field, f"{number} is not between 0 and {limit - 1}")
        for field in ("learning_rate", "observation_count", "episodic_return", "loss"):
            if (value := getattr(snapshot, field)) is not None and not np.isfinite(value):
                raise self._misfit(snapshot, field, f"{value} is not finite")
        size = self._num_observations or observation_size(snapshot)
        vectors = [field for field in STATISTICS[:2] if field in self._header.columns]
        statistics: dict[str, Any] = {field: self._checked_copy(snapshot, field, size, np.float64) for field in vectors}
        weights = self._checked_copy(snapshot, "weights", self._header.num_weights, np.float32)
        copy = dataclasses.replace(snapshot, weights=weights, **statistics)
        self._buffer.append(copy)

    def discard(self) -> None:
        """Forget the buffered snapshots, as a kill would: the next one follows the last commit."""
        self._buffer = []

    def commit(self, state: dict[str, np.ndarray]) -> CommitRecord:
        """Publish the buffered snapshots and the state to resume from: part, then state, then the record that counts.

        When it returns that record, they survive a power cut. Raises StoreError where nothing is buffered, another
        writer holds the trial or the storage refuses a write; readers then still see the commit before.
        """
        if not self._buffer:
            raise StoreError(f"trial {self._seed}: no snapshot was appended since the last commit")
        part, state_file = encode_part(self._header, self._buffer), encode_state(state)
        record, before = self._record(part, state_file), self._last
        self._unseal(record)
        self._files.write(self._trial.part_path(record), part)
        self._files.write(self._trial.state_path(record), state_file)
        if not self._files.put_if_absent(self._trial.commit_path(record.commit), as_json(record)):
            self._withdraw(record)
            raise self._beaten(record)
        self._last, self._buffer = record, []
        self._state = {name: array.copy() for name, array in state.items()}
        if before:
            self._files.delete(self._trial.state_path(before))
        return record

    def _unseal(self, record: CommitRecord) -> None:
        """Take the seal away before anything is there that it does not name; raise StoreError where the commit is.

        Whoever seals a data set has all its commits before. So a writer that finds a seal and not the commit that it is
        about to make is the one that continues, and one that slept meanwhile leaves the other's seal alone.
        """
        if self._store.has_seal():
            if self._files.exists(self._trial.commit_path(record.commit)):
                raise self._beaten(record)
            self._files.delete(SEAL)

    def _withdraw(self, record: CommitRecord) -> None:
        """Delete what was written for a commit that another writer made, unless its record names the same files."""
        path = self._trial.commit_path(record.commit)
        winner = self._trial.parse_record(record.commit, self._trial.read(path))
        if winner.part != record.part:
            self._files.delete(self._trial.part_path(record))
        if winner.state != record.state or self._files.exists(self._trial.commit_path(record.commit + 1)):
            self._files.delete(self._trial.state_path(record))

    def _beaten(self, record: CommitRecord) -> StoreError:
        return StoreError(
            f"{self._files.show(self._trial.commit_path(record.commit))}: another process is writing trial "
            f"{self._seed} and has made commit {record.commit}; stop one of the two runs on this storage"
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
            self.commit({DIVERGED: np.frombuffer(as_json(self.divergence), dtype=np.uint8)})
        self.record_divergence()
        return self.divergence

    def record_divergence(self) -> None:
        """Publish the record of the divergence, where it is not there yet."""
        assert self.divergence is not None, "the trial has diverged"
        self._files.put_if_absent(self._trial.divergence_path, as_json(self.divergence))

    def _record(self, part: memoryview, state_file: bytes) -> CommitRecord:
        commit = self._last.commit + 1 if self._last else 1
        first, last = int(self._buffer[0].snapshot), int(self._buffer[-1].snapshot)
        part_sha256, state_sha256 = hashlib.sha256(part).hexdigest(), hashlib.sha256(state_file).hexdigest()
        return CommitRecord(
            commit=commit,
            part=part_name(first, part_sha256),
            part_sha256=part_sha256,
            part_bytes=part.nbytes,
            state=state_name(commit, state_sha256),
            state_sha256=state_sha256,
            rows=len(self._buffer),
            first_snapshot=first,
            last_snapshot=last,
            num_observations=observation_size(self._buffer[0]),
            config_hash=self._header.config_hash,
            header=self._header,
        )

    @property
    def _num_observations(self) -> int | None:
        if self._buffer:
            return observation_size(self._buffer[0])
        return self._last.num_observations if self._last else None

    def _check_columns(self, snapshot: PartialSnapshot) -> None:
        """Raise StoreError unless the snapshot has what the trial's columns are, and nothing else."""
        for field in dataclasses.fields(snapshot):
            value, is_column = getattr(snapshot, field.name), field.name in ("seed", *self._header.columns)
            if value is None and is_column and field.name not in NULLABLE:
                raise self._misfit(
                    snapshot, field.name, "None, and the trial has that column: give it with each snapshot"
                )
            if value is not None and not is_column:
                complaint = f"{value}, and the trial has no such column; what its first snapshot has, all have"
                raise self._misfit(snapshot, field.name, complaint)

    def _checked_copy(self, snapshot: PartialSnapshot, field: str, size: int, dtype: type[np.floating]) -> np.ndarray:
        array = getattr(snapshot, field)
        if array.dtype != dtype or array.shape != (size,):
            raise self._misfit(snapshot, field, f"{array.dtype}{list(array.shape)} is not {np.dtype(dtype)}[{size}]")
        if not (finite := np.isfinite(array)).all():
            position = int(np.argmin(finite))
            raise self._misfit(snapshot, field, f"{array[position]} at position {position} is not finite")
        return array.copy()

    def _misfit(self, snapshot: PartialSnapshot, field: str, complaint: str) -> StoreError:
        return StoreError(
            f"trial {self._seed}, snapshot {snapshot.snapshot}: {field}={complaint}; what was committed before stays"
        )
