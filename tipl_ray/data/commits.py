"""What makes parts count: a trial's commit records, the record that it diverged, the seal of a data set; their names.

A record that contradicts itself cannot be built, and one that was read can name no file outside its folder. Knows
nothing of how files are read or written.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Annotated

import numpy as np
import pydantic
import safetensors.numpy

from tipl_ray.data.snapshots import Header
from tipl_ray.data.storage import StoreError
from tipl_ray.digest import digest

TRAJECTORIES, COMMITS = "trajectories", "commits"
SEAL, DIVERGED = f"{COMMITS}/_SUCCESS", "diverged.json"
TRIAL_FOLDER = re.compile(r"trial=(0|[1-9][0-9]*)")
PART_NAME = re.compile(r"part-([0-9]{8,})-[0-9a-f]{16}\.parquet")
COMMIT_NAME = re.compile(r"commit-([1-9][0-9]*)\.json")
STATE_NAME = re.compile(r"state-([1-9][0-9]*)-[0-9a-f]{16}\.safetensors")

_Count = Annotated[int, pydantic.Field(ge=0, lt=2**31)]
_Bytes = Annotated[int, pydantic.Field(ge=0, lt=2**63)]
_Sha256 = Annotated[str, pydantic.Field(pattern="^[0-9a-f]{64}$")]


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
    """Name of the resume state's file, next to the record; deleted once the next commit is durable."""
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
            ("part", part_name(self.first_snapshot, self.part_sha256)),
            ("state", state_name(self.commit, self.state_sha256)),
            ("rows", self.last_snapshot - self.first_snapshot + 1),
            ("config_hash", self.header.config_hash),
        ):
            if getattr(self, field) != expected:
                raise ValueError(
                    f"{field}={getattr(self, field)!r} contradicts its other fields, which give {expected!r}"
                )
        if self.rows < 1 or self.commit < 1:
            raise ValueError(f"commit={self.commit} and rows={self.rows} are not both at least 1")


@pydantic.with_config(extra="forbid")
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Divergence:
    """Where a trial stopped being finite, and so ended: diverged.json, next to its commit records."""

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


Run = tuple[CommitRecord, ...]
"""A trial's unbroken run of commit records: 1, 2, ... n, whose snapshots follow each other from 0."""

COMMIT_RECORD = pydantic.TypeAdapter(CommitRecord)
DIVERGENCE_RECORD = pydantic.TypeAdapter(Divergence)
SEAL_RECORD = pydantic.TypeAdapter(Seal)


def runs_digest(runs: Mapping[int, Run]) -> str:
    """Identity of a data set: digest of its seeds, ascending, and their parts' SHA-256."""
    return digest([[seed, [record.part_sha256 for record in run]] for seed, run in runs.items()])


def trial_digest(num_snapshots: int, seed: int, run: Run) -> str:
    """Identity of one trial in a seal."""
    return digest(num_snapshots, seed, [record.part_sha256 for record in run])


def run_progress(seed: int, run: Run, num_snapshots: int | None) -> TrialProgress:
    """How far a trial is committed, of `num_snapshots` expected, not knowing whether it diverged."""
    committed = run[-1].last_snapshot + 1 if run else 0
    return TrialProgress(
        seed=seed,
        num_snapshots=committed,
        num_commits=len(run),
        num_bytes=sum(record.part_bytes for record in run),
        complete=committed == num_snapshots,
    )


def part_name(first_snapshot: int, sha256: str) -> str:
    """Name of a part, which describes its content."""
    return f"part-{first_snapshot:08d}-{sha256[:16]}.parquet"


def state_name(commit: int, sha256: str) -> str:
    """Name of a resume state, which describes its content."""
    return f"state-{commit}-{sha256[:16]}.safetensors"


def list_trials(seeds: Sequence[int]) -> str:
    """Trials as a person lists them.

    >>> list_trials([3]), list_trials([1, 2, 3, 7])
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


def complaints(error: pydantic.ValidationError, whole: str) -> str:
    """What pydantic has against a record, in one line."""
    return "; ".join(f"{'.'.join(map(str, item['loc'])) or whole}: {item['msg']}" for item in error.errors())


def encode_state(state: dict[str, np.ndarray]) -> bytes:
    """A resume state's file. Raises StoreError for what is not an array of numbers."""
    for name, array in state.items():
        if not isinstance(array, np.ndarray) or array.dtype.kind not in "biuf":
            raise StoreError(f"state[{name!r}] is no array of numbers: {getattr(array, 'dtype', type(array).__name__)}")
    # Not ascontiguousarray, which would give a scalar array a dimension.
    return safetensors.numpy.save({name: np.array(array, order="C") for name, array in state.items()})
