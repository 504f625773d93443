"""What can go wrong with a data set, each with the one error that it ends in; the other trials stay readable.

python tests/test_damage.py writes the table into docs/damage.md.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import re
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_trajectory_store import (
    HEADER,
    P,
    add_part,
    collect,
    commit_snapshots,
    empty,
    exchange_trial,
    files,
    flip_byte,
    lose_last_commit,
    lose_trial,
    make_snapshot,
    make_state,
    rewrite_record,
    truncate,
    weights_column,
)

from tipl_ray import config
from tipl_ray.data.snapshots import METADATA_KEY, Header, as_json
from tipl_ray.data.storage import StoreError
from tipl_ray.data.trajectory_store import TrajectoryStore
from tipl_ray.data.trial_writer import TrialWriter
from tipl_ray.digest import as_table
from tipl_ray.experiments import load_experiment

ROOT = Path(__file__).resolve().parent.parent
PART, STATE = "trial=3/part-00000001-*", "trial=3/state-3-*"
RECORD = "commits/trial=3/commit-2.json"
SEAL = "commits/_SUCCESS"
NOBODY = 65534


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One kind of damage to trial 3 of the trials 3 and 4."""

    what: str
    attempt: Callable[[Path], object]
    """Does the damage to the storage, then what a user does, which raises StoreError or ValueError."""
    says: str
    """Part of the error."""
    names: str
    """What the error has to name: the file or the field."""


def read(root: Path) -> None:
    TrajectoryStore(str(root)).trajectory(3)


def verify(root: Path) -> None:
    TrajectoryStore(str(root)).verify(3)


def finish(root: Path) -> None:
    TrajectoryStore(str(root)).finish([3, 4], 8)


def resume(root: Path) -> TrialWriter:
    return TrialWriter(TrajectoryStore(str(root)), 3, HEADER)


def go_on(root: Path) -> None:
    commit_snapshots(resume(root), 10)


def append(index: int = 8, **changes: Any) -> Callable[[Path], None]:
    """Resume and append the next snapshot with fields changed."""
    return lambda root: resume(root).append(make_snapshot(index, **changes))


def part(root: Path) -> Path:
    return files(root, PART)[0]


def damage(pattern: str, do: Callable[[Path], object], then: Callable[[Path], object]) -> Callable[[Path], None]:
    """Do something to the one file of that pattern, then what the user does."""

    def attempt(root: Path) -> None:
        (path,) = files(root, pattern)
        do(path)
        then(root)

    return attempt


def record(then: Callable[[Path], object] = read, **changes: Any) -> Callable[[Path], None]:
    """Rewrite fields of commit 2's record, then what the user does."""
    return damage(RECORD, lambda path: rewrite_record(path, **changes), then)


def replace_part(root: Path, content: bytes) -> None:
    """Put another part in the place of commit 2's, under a record that agrees with it."""
    path, sha256 = part(root), hashlib.sha256(content).hexdigest()
    target = path.with_name(f"part-00000001-{sha256[:16]}.parquet")
    path.unlink()
    target.write_bytes(content)
    rewrite_record(root / RECORD, part=target.name, part_sha256=sha256, part_bytes=len(content))


def rewrite_rows(then: Callable[[Path], object], change: Callable[[pa.Table], pa.Table]) -> Callable[[Path], None]:
    """Change the rows of commit 2's part under a record that agrees, then what the user does."""

    def attempt(root: Path) -> None:
        table, sink = change(pq.read_table(part(root), partitioning=None)), io.BytesIO()
        pq.write_table(table, sink)
        replace_part(root, sink.getvalue())
        then(root)

    return attempt


def with_column(name: str, values: np.ndarray | list) -> Callable[[pa.Table], pa.Table]:
    def change(table: pa.Table) -> pa.Table:
        field = table.schema.field(name)
        column = pa.array(np.asarray(values), type=field.type if np.ndim(values) == 1 else None)
        return table.set_column(table.schema.get_field_index(name), field, column)

    return change


def with_nan_weight(table: pa.Table) -> pa.Table:
    field = table.schema.field("weights")
    weights = table["weights"].combine_chunks().flatten().to_numpy().copy()
    weights[5] = np.nan
    column = pa.FixedSizeListArray.from_arrays(pa.array(weights), type=field.type)
    return table.set_column(table.schema.get_field_index("weights"), field, column)


def with_header(table: pa.Table, **changes: Any) -> pa.Table:
    header = dataclasses.replace(HEADER, **changes)
    return table.replace_schema_metadata({METADATA_KEY: as_json(header)})


def with_number_of_steps_as_floats(table: pa.Table) -> pa.Table:
    return table.set_column(4, "env_step", pa.array(np.full(len(table), 0.5)))


def header_of_record(**changes: Any) -> dict[str, Any]:
    return {**json.loads(as_json(HEADER)), **changes}


def replace_part_by_text(root: Path) -> None:
    replace_part(root, b"PAR1 not at all PAR1")
    read(root)


def inflate_rows(root: Path) -> None:
    """Records that agree with themselves and with each other on two thousand million rows."""
    rewrite_record(root / "commits/trial=3/commit-3.json", rows=2**31 - 5, last_snapshot=2**31 - 2)
    read(root)


def inflate_weights(root: Path) -> None:
    header = dataclasses.replace(HEADER, layout=(("hidden.weight", (2**31 - 1,), 0),))
    for number in (1, 2, 3):
        path = root / f"commits/trial=3/commit-{number}.json"
        rewrite_record(path, header=header_of_record(layout=header.layout), config_hash=header.config_hash)
    read(root)


def link_outside(path: Path) -> None:
    """Move a file or folder out of the storage and leave a link to it."""
    storage = next(folder for folder in path.parents if (folder / "commits").is_dir())
    outside = storage.with_name(f"{storage.name}-outside")
    outside.mkdir()
    path.rename(outside / path.name)
    path.symlink_to(outside / path.name)


def link_trial_outside(root: Path) -> None:
    link_outside(root / "trajectories/trial=3")
    read(root)


def make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def other_configuration_in_the_middle(root: Path) -> None:
    header = dataclasses.replace(HEADER, config={"ppo": {"gamma": 0.5}, "policy_hidden": [2]})
    change = {"header": header_of_record(config=header.config), "config_hash": header.config_hash}
    rewrite_record(root / RECORD, **change)
    read(root)


def other_configuration(root: Path) -> None:
    header = dataclasses.replace(HEADER, config={"ppo": {"gamma": 0.5}, "policy_hidden": [2]})
    TrialWriter(TrajectoryStore(str(root)), 3, header)


def other_task_beside(root: Path) -> None:
    store = TrajectoryStore(str(root))
    writer = TrialWriter(store, 9, dataclasses.replace(HEADER, task="HalfCheetah-v4"))
    commit_snapshots(writer, 2, seed=9)
    store.header()


def same_range_twice(root: Path) -> None:
    second = json.loads((root / RECORD).read_text())
    ranges = {name: second[name] for name in ("part", "part_sha256", "part_bytes", "rows")}
    ranges |= {name: second[name] for name in ("first_snapshot", "last_snapshot")}
    rewrite_record(root / "commits/trial=3/commit-3.json", **ranges)
    verify(root)


def two_writers(root: Path) -> None:
    first, second = resume(root), resume(root)
    commit_snapshots(first, 10)
    commit_snapshots(second, 10)


def lose_records(root: Path) -> None:
    for path in files(root, "commits/trial=3/commit-*"):
        path.unlink()
    TrajectoryStore(str(root)).sweep()


def put_foreign(name: str) -> Callable[[Path], None]:
    def attempt(root: Path) -> None:
        (root / name).write_bytes(b"PAR1")
        finish(root)

    return attempt


def file_where_the_folder_was(root: Path) -> None:
    shutil.rmtree(root / "trajectories/trial=3")
    writer = TrialWriter(TrajectoryStore(str(root)), 5, HEADER)
    (root / "trajectories/trial=5").write_text("a file")
    commit_snapshots(writer, 1, seed=5)


@contextlib.contextmanager
def files_up_to(num_bytes: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def no_room(root: Path) -> None:
    with files_up_to(1000):
        go_on(root)


@contextlib.contextmanager
def as_nobody() -> Iterator[None]:
    """Without the rights of root, for which no file is unreadable."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(user)


def without_rights(pattern: str, mode: int, then: Callable[[Path], object]) -> Callable[[Path], None]:
    def attempt(root: Path) -> None:
        for path in files(root, pattern):
            path.chmod(mode)
        try:
            with as_nobody():
                then(root)
        finally:
            for path in files(root, pattern):
                path.chmod(0o755)

    return attempt


def in_sealed(do: Callable[[Path], object], then: Callable[[Path], object]) -> Callable[[Path], None]:
    """Seal the data set, do something to it, then what the user does."""

    def attempt(root: Path) -> None:
        finish(root)
        do(root)
        then(root)

    return attempt


def edit_seal(change: Callable[[str], str]) -> Callable[[Path], object]:
    return lambda root: (root / SEAL).write_text(change((root / SEAL).read_text()))


def is_sealed(root: Path) -> None:
    TrajectoryStore(str(root)).finished()


def stray_trial(root: Path) -> None:
    seal = (root / SEAL).read_bytes()
    collect(root, seed=9)
    (root / SEAL).write_bytes(seal)


def unfinished_beside(root: Path) -> None:
    collect(root, seed=9, stops=(2,))
    finish(root)


def slept(root: Path) -> None:
    sleeper = resume(root)
    go_on(root)
    finish_at = TrajectoryStore(str(root))
    commit_snapshots(TrialWriter(finish_at, 4, HEADER), 10, seed=4)
    finish_at.finish([3, 4], 10)
    try:
        commit_snapshots(sleeper, 10)
    finally:
        assert finish_at.finished()


def file_as_storage(root: Path) -> None:
    (root / "file").write_text("in the way")
    TrajectoryStore(str(root / "file" / "data"))


def differ_in_much(root: Path) -> None:
    changes: dict[str, Any] = {
        "ppo": {"gamma": 0.5, **{f"setting_{n}": n for n in range(9)}},
        "policy_hidden": [256] * 40,
    }
    resumed = dataclasses.replace(HEADER, task="HalfCheetah-v4", config=changes)
    TrialWriter(TrajectoryStore(str(root)), 3, resumed)


def object_state(root: Path) -> None:
    writer = resume(root)
    writer.append(make_snapshot(8))
    writer.commit({**make_state(4), "bad": np.array([{}])})


CASES = [
    Case(what="A part is cut short", attempt=damage(PART, truncate, read), says="has ", names=PART),
    Case(what="A part is empty", attempt=damage(PART, empty, read), says="has 0 bytes", names=PART),
    Case(what="A part is missing", attempt=damage(PART, Path.unlink, read), says="is missing", names=PART),
    Case(what="A folder has a part's name", attempt=damage(PART, make_folder, read), says="is a folder", names=PART),
    Case(
        what="A bit of a part's weights is flipped; the trial is read",
        attempt=damage(PART, lambda path: flip_byte(path, weights_column(path).data_page_offset + 50), read),
        says="cannot be read",
        names=PART,
    ),
    Case(
        what="A bit anywhere in a part is flipped; the trial is verified",
        attempt=damage(PART, lambda path: flip_byte(path, -30), verify),
        says="its SHA-256 is not the one in commit 2",
        names=PART,
    ),
    Case(
        what="A part cannot be opened for lack of permission",
        attempt=without_rights(PART, 0, read),
        says="Permission denied",
        names=PART,
    ),
    Case(
        what="A part is a link out of the storage",
        attempt=damage(PART, link_outside, read),
        says="leads out of the storage",
        names=PART,
    ),
    Case(
        what="A trial's folder is a link out of the storage",
        attempt=link_trial_outside,
        says="leads out of the storage",
        names="trial=3/part-00000000-*",
    ),
    Case(
        what="A part contains another trial's rows, and its record matches",
        attempt=rewrite_rows(verify, with_column("seed", [4, 4, 4])),
        says="contains a seed other than 3",
        names=PART,
    ),
    Case(
        what="A part's rows are out of order, and its record matches",
        attempt=rewrite_rows(verify, with_column("snapshot", [2, 1, 3])),
        says="do not count up from 1",
        names=PART,
    ),
    Case(
        what="A part contains NaN among the weights, and its record matches",
        attempt=rewrite_rows(verify, with_nan_weight),
        says="weights contains NaN or infinity",
        names=PART,
    ),
    Case(
        what="A part contains a return of NaN, and its record matches",
        attempt=rewrite_rows(verify, with_column("episodic_return", [1.0, np.nan, 2.0])),
        says="episodic_return contains NaN or infinity",
        names=PART,
    ),
    Case(
        what="A part has a column of another type, and its record matches",
        attempt=rewrite_rows(read, with_number_of_steps_as_floats),
        says="its columns or header differ from those in commit 2",
        names=PART,
    ),
    Case(
        what="A part carries the header of another task",
        attempt=rewrite_rows(read, lambda table: with_header(table, task="HalfCheetah-v4")),
        says="its columns or header differ from those in commit 2",
        names=PART,
    ),
    Case(
        what="A part lacks rows, and its record has its digest",
        attempt=rewrite_rows(read, lambda table: table.slice(0, 2)),
        says="has 2 rows but commit 2 recorded 3",
        names=PART,
    ),
    Case(
        what="A part is not a Parquet file, and its record has its digest",
        attempt=replace_part_by_text,
        says="cannot be read",
        names=PART,
    ),
    Case(what="The resume state is missing", attempt=damage(STATE, Path.unlink, resume), says="cannot be", names=STATE),
    Case(
        what="The resume state is altered",
        attempt=damage(STATE, lambda path: flip_byte(path, -1), resume),
        says="its SHA-256 is not the one in commit 3",
        names=STATE,
    ),
    Case(what="The resume state is cut short", attempt=damage(STATE, truncate, verify), says="altered", names=STATE),
    Case(
        what="A commit record is missing before others; the trial is resumed",
        attempt=damage(RECORD, Path.unlink, resume),
        says="a commit record before this one is missing (found 1 of 2)",
        names="trial=3/commit-3.json",
    ),
    Case(
        what="All commit records are lost and garbage is swept",
        attempt=lose_records,
        says="commit records of it seem to be lost",
        names=STATE,
    ),
    Case(
        what="A commit record is empty",
        attempt=damage(RECORD, empty, read),
        says="is not a commit record",
        names=RECORD,
    ),
    Case(what="A commit record is cut short", attempt=damage(RECORD, truncate, read), says="EOF", names=RECORD),
    Case(
        what="A commit record is nested 100,000 deep",
        attempt=damage(RECORD, lambda path: path.write_text("[" * 100_000), read),
        says="is not a commit record",
        names=RECORD,
    ),
    Case(
        what="A folder has a commit record's name",
        attempt=damage(RECORD, make_folder, read),
        says="cannot be read",
        names=RECORD,
    ),
    Case(what="A record has an extra field", attempt=record(owner="me"), says="owner: Unexpected", names=RECORD),
    Case(what="A record has a number as text", attempt=record(rows="3"), says="rows: Input should be", names=RECORD),
    Case(what="A record has a number of 31 digits", attempt=record(rows=10**30), says="rows: ", names=RECORD),
    Case(
        what="A record's row count contradicts its range",
        attempt=record(rows=4),
        says="rows=4 contradicts its other fields",
        names=RECORD,
    ),
    Case(
        what="A record leads out of the storage",
        attempt=record(part="../../../../etc/passwd"),
        says="part='../../../../etc/passwd' contradicts its other fields",
        names=RECORD,
    ),
    Case(
        what="A record has a later format version",
        attempt=record(header=header_of_record(format_version=2)),
        says="format_version=2 is not 1",
        names=RECORD,
    ),
    Case(
        what="A record's layout has a gap",
        attempt=record(header=header_of_record(layout=[["w", [2], 3]])),
        says="does not follow offset 0",
        names=RECORD,
    ),
    Case(
        what="A record claims 2,147,483,643 rows, consistently within itself",
        attempt=inflate_rows,
        says="rows but commit 3 recorded 2147483643",
        names="trial=3/part-00000004-*",
    ),
    Case(
        what="All records claim 2,147,483,647 weights, consistently with each other",
        attempt=inflate_weights,
        says="its columns or header differ from those in commit 1",
        names="trial=3/part-00000000-*",
    ),
    Case(
        what="Two records cover the same snapshots",
        attempt=same_range_twice,
        says="its snapshots do not follow those of the 2 commits before it",
        names="trial=3/commit-3.json",
    ),
    Case(
        what="A record has another configuration than the first",
        attempt=other_configuration_in_the_middle,
        says="config.ppo.gamma=0.5 there, 0.99 here",
        names=RECORD,
    ),
    Case(
        what="The trial was started with another configuration",
        attempt=other_configuration,
        says="config.ppo.gamma=0.99 there, 0.5 here",
        names="trial=3/commit-1.json",
    ),
    Case(
        what="The trial was started with a configuration that differs in many fields",
        attempt=differ_in_much,
        says="and 7 more. Choose another storage",
        names="trial=3/commit-1.json",
    ),
    Case(
        what="Another task was collected into the same storage",
        attempt=other_task_beside,
        says="task='HalfCheetah-v4' there",
        names="trial=9/commit-1.json",
    ),
    Case(
        what="A foreign file is in a trial's folder",
        attempt=put_foreign("trajectories/trial=3/mine.parquet"),
        says="is not the store's",
        names="trial=3/mine.parquet",
    ),
    Case(
        what="A foreign file is among the trials",
        attempt=put_foreign("trajectories/mine.parquet"),
        says="is not the store's",
        names="trajectories/mine.parquet",
    ),
    Case(
        what="A second driver collects into the same storage",
        attempt=two_writers,
        says="another process is writing trial 3",
        names="trial=3/commit-4.json",
    ),
    Case(what="The system refuses a file of that size", attempt=no_room, says="File too large", names="trial=3/part-*"),
    Case(
        what="The storage can only be read",
        attempt=without_rights("commits", 0o555, go_on),
        says="cannot be written: [Errno 13] Permission denied",
        names="trial=3/part-*",
    ),
    Case(
        what="A file is where a trial's folder should be",
        attempt=file_where_the_folder_was,
        says="cannot be written",
        names="trial=5/part-*",
    ),
    Case(
        what="A snapshot's weights contain NaN",
        attempt=append(weights=np.array([0, 1, np.nan, 3, 4, 5, 6], dtype=np.float32)),
        says="weights=nan at position 2 is not finite",
        names="trial 3, snapshot 8",
    ),
    Case(
        what="A snapshot has too many weights",
        attempt=append(weights=np.zeros(P + 1, dtype=np.float32)),
        says="weights=float32[8] is not float32[7]",
        names="trial 3, snapshot 8",
    ),
    Case(
        what="A snapshot's return is infinite",
        attempt=append(episodic_return=float("inf")),
        says="episodic_return=inf is not finite",
        names="trial 3, snapshot 8",
    ),
    Case(
        what="A snapshot is left out",
        attempt=append(index=9),
        says="snapshot=9 is not 8",
        names="trial 3, snapshot 9",
    ),
    Case(
        what="A resume state contains something that only unpickling could restore",
        attempt=object_state,
        says="is no array of numbers: object",
        names="state['bad']",
    ),
    Case(
        what="The data set is sealed with a trial missing",
        attempt=lambda root: TrajectoryStore(str(root)).finish([3, 4, 5], 8),
        says="trial 5 has 0 of 8 snapshots",
        names="commits/trial=5",
    ),
    Case(
        what="The data set is sealed while a trial outside the experiment is incomplete",
        attempt=unfinished_beside,
        says="trial 9, which is none of this experiment's, has 2 of 8 snapshots",
        names="commits/trial=9",
    ),
    Case(
        what="A sealed data set loses a trial",
        attempt=in_sealed(lambda root: lose_trial(root, 3), is_sealed),
        says="trial 3 of this sealed data set is missing",
        names="commits/trial=3",
    ),
    Case(
        what="A trial of a sealed data set loses its last commit and part",
        attempt=in_sealed(lambda root: lose_last_commit(root, 3), read),
        says="its 4 snapshots are not those that the data set was sealed with",
        names="commits/trial=3",
    ),
    Case(
        what="A trial of a sealed data set is exchanged for another complete one",
        attempt=in_sealed(lambda root: exchange_trial(root, 3), read),
        says="its 8 snapshots are not those that the data set was sealed with",
        names="commits/trial=3",
    ),
    Case(
        what="A part that no record names is in a sealed trial's folder",
        attempt=in_sealed(lambda root: add_part(root, 3), read),
        says="no commit record names it",
        names="trial=3/part-00000008-*",
    ),
    Case(
        what="A sealed data set contains an extra trial",
        attempt=in_sealed(stray_trial, is_sealed),
        says="trial 9 is not part of the sealed data set",
        names="commits/trial=9",
    ),
    Case(
        what="The seal is empty",
        attempt=in_sealed(edit_seal(lambda text: ""), is_sealed),
        says="is not a seal",
        names=SEAL,
    ),
    Case(
        what="The seal is cut short",
        attempt=in_sealed(edit_seal(lambda text: text[:30]), is_sealed),
        says="is not a seal",
        names=SEAL,
    ),
    Case(
        what="The seal's digest is edited",
        attempt=in_sealed(edit_seal(lambda text: re.sub('"digest": "....', '"digest": "0000', text)), is_sealed),
        says="a trial was exchanged or the seal edited",
        names=SEAL,
    ),
    Case(
        what="A writer sleeps while another continues and seals",
        attempt=slept,
        says="another process is writing trial 3",
        names="trial=3/commit-4.json",
    ),
    Case(
        what="A trial that does not exist is requested",
        attempt=lambda root: TrajectoryStore(str(root)).trajectory(9),
        says="there is no trial 9; there are trials 3-4",
        names="commits",
    ),
    Case(
        what="A range that the trial does not have is requested",
        attempt=lambda root: TrajectoryStore(str(root)).trajectory(3, start=5, stop=9),
        says="is no range of the 8 snapshots",
        names="start=5, stop=9",
    ),
    Case(
        what="A column that does not exist is requested",
        attempt=lambda root: TrajectoryStore(str(root)).trajectory(3, ["weight"]),
        says="perhaps 'weights'?",
        names="columns=['weight']",
    ),
    Case(
        what="A file is where the storage should be",
        attempt=file_as_storage,
        says="is a file; choose another folder",
        names="file/data",
    ),
    Case(
        what="The commits' folder cannot be read for lack of permission",
        attempt=without_rights("commits", 0, is_sealed),
        says="Permission denied",
        names="commits",
    ),
    Case(
        what="The storage has no conditional put",
        attempt=lambda root: TrialWriter(TrajectoryStore("mock:///there"), 3, HEADER),
        says="no conditional put is known",
        names="mock:///there",
    ),
    Case(
        what="The storage's URI contains a password",
        attempt=lambda root: TrajectoryStore("s3://id:password@bucket/data"),
        says="the URI carries credentials",
        names="s3://bucket/data",
    ),
]


@pytest.fixture
def storage() -> Iterator[Path]:
    """A storage of the trials 3 and 4 that a user without rights can reach."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield whole_storage(Path(folder) / "data")


def whole_storage(root: Path) -> Path:
    collect(root, seed=3)
    collect(root, seed=4)
    return root


def error_of(case: Case, root: Path) -> str:
    with pytest.raises((StoreError, ValueError)) as caught:
        case.attempt(root)
    return str(caught.value)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.what)
def test_damage_ends_in_one_error_that_names_it_and_the_other_trial_stays_readable(case: Case, storage: Path) -> None:
    expected = TrajectoryStore(str(storage)).trajectory(4).weights_TP
    error = error_of(case, storage)
    assert case.says in error
    assert case.names.rstrip("*") in error
    assert "\n" not in error
    assert shown_rows().get(case.what) == as_shown(error, storage)
    if case.names == SEAL:
        (storage / SEAL).unlink()  # the way out that the error names
    store = TrajectoryStore(str(storage))
    assert store.verify(4).num_snapshots in (8, 10)
    np.testing.assert_array_equal(store.trajectory(4, stop=8).weights_TP, expected)


def test_a_full_disk_is_said_to_be_full_and_what_was_committed_stays(tmp_path: Path) -> None:
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", tmp_path], capture_output=True).returncode:
        pytest.skip("no right to mount a small disk here")
    try:
        writer = TrialWriter(TrajectoryStore(str(tmp_path)), 3, HEADER)
        commit_snapshots(writer, 2)
        (tmp_path / "ballast").write_bytes(bytes(220_000))
        for index in range(2, 2000):
            writer.append(make_snapshot(index))
        with pytest.raises(StoreError, match=r"part-00000002-.*cannot be written: the disk is full\. Free some space"):
            writer.commit({})
        assert TrajectoryStore(str(tmp_path)).verify(3).num_snapshots == 2
        (tmp_path / "ballast").unlink()
        writer.commit({})
        assert TrajectoryStore(str(tmp_path)).verify(3).num_snapshots == 2000
    finally:
        subprocess.run(["umount", tmp_path], check=True)


@pytest.fixture(scope="module")
def fuzzed() -> Iterator[Path]:
    """A storage whose files each example puts back before it does its own damage."""
    with tempfile.TemporaryDirectory() as folder:
        yield whole_storage(Path(folder) / "data")


@contextlib.contextmanager
def put_back(folder: Path) -> Iterator[None]:
    """Leave the files of a trial as they were."""
    contents = {path: path.read_bytes() for path in files(folder, "trial=3/*")}
    try:
        yield
    finally:
        for path in set(files(folder, "trial=3/*")) - contents.keys():
            path.unlink()
        for path, content in contents.items():
            path.write_bytes(content)


def use_all_of(root: Path) -> None:
    """Everything that reads, each ending in a result or in an error of ours."""
    store = TrajectoryStore(str(root))
    for attempt in (
        lambda: store.trajectory(3),
        lambda: store.trajectory(3, ["weights"], 1, 3),
        lambda: store.verify(3, 8),
        lambda: store.garbage([3], lost=True),
        lambda: (store.seeds(), store.header(), store.digest()),
        lambda: TrialWriter(store, 3, HEADER),
    ):
        with contextlib.suppress(StoreError, ValueError):
            attempt()


FUZZ = settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
NUMBERS = st.integers() | st.integers(-2, 5) | st.sampled_from([2**31 - 1, 2**31, 2**63 - 1, 2**64]) | st.floats()
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=8),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=4), children, max_size=3),
    max_leaves=5,
)
EDITS = st.lists(st.tuples(st.integers(0, 2**20), st.integers(0, 3), st.binary(max_size=9)), min_size=1, max_size=4)
"""Where, how many bytes go, which come in their place."""


def edited(content: bytes, edits: list[tuple[int, int, bytes]]) -> bytes:
    for place, num_bytes, inserted in edits:
        place %= len(content) + 1
        content = content[:place] + inserted + content[place + num_bytes :]
    return content


@FUZZ
@given(EDITS)
def test_fuzz_of_a_records_bytes_ends_in_a_result_or_our_error(fuzzed: Path, edits: list) -> None:
    with put_back(fuzzed):
        path = fuzzed / RECORD
        path.write_bytes(edited(path.read_bytes(), edits))
        use_all_of(fuzzed)


@FUZZ
@given(st.data())
def test_fuzz_of_a_records_fields_ends_in_a_result_or_our_error(fuzzed: Path, data: st.DataObject) -> None:
    """The record is kept in agreement with itself wherever it can be, so that the damage gets past the first check."""
    with put_back(fuzzed):
        path = fuzzed / data.draw(st.sampled_from([RECORD, "commits/trial=3/commit-1.json"]))
        fields = json.loads(path.read_text())
        for _ in range(data.draw(st.integers(1, 3))):
            table = fields["header"] if data.draw(st.booleans()) and isinstance(fields.get("header"), dict) else fields
            table[data.draw(st.sampled_from(["task", *table]) | st.text(max_size=4))] = data.draw(VALUES)
        with contextlib.suppress(KeyError, TypeError, ValueError, AttributeError):
            header = Header(**fields["header"])
            fields["config_hash"] = header.config_hash
            fields["rows"] = fields["last_snapshot"] - fields["first_snapshot"] + 1
        path.write_text(json.dumps(fields))
        use_all_of(fuzzed)


@FUZZ
@given(EDITS)
def test_fuzz_of_a_part_under_a_record_that_agrees_ends_in_a_result_or_our_error(fuzzed: Path, edits: list) -> None:
    with put_back(fuzzed):
        replace_part(fuzzed, edited(part(fuzzed).read_bytes(), edits))
        use_all_of(fuzzed)


@FUZZ
@given(EDITS)
def test_fuzz_of_a_resume_state_ends_in_a_result_or_our_error(fuzzed: Path, edits: list) -> None:
    with put_back(fuzzed):
        (path,) = files(fuzzed, STATE)
        content = edited(path.read_bytes(), edits)
        sha256 = hashlib.sha256(content).hexdigest()
        path.with_name(f"state-3-{sha256[:16]}.safetensors").write_bytes(content)
        rewrite_record(
            fuzzed / "commits/trial=3/commit-3.json",
            state=f"state-3-{sha256[:16]}.safetensors",
            state_sha256=sha256,
        )
        use_all_of(fuzzed)


EXPERIMENTS = sorted((ROOT / "jobs" / "experiments").glob("*.toml"))
DEFAULTS = {
    f"{section}.{field}": value
    for section, fields in as_table(config.Experiment(name="any")).items()
    if isinstance(fields, dict)
    for field, value in fields.items()
}
"""Dotted field of an experiment -> its default."""


def values_for(field: str) -> st.SearchStrategy:
    """Values of the right type mostly, so that they get past the first check."""
    kinds = {bool: st.booleans(), int: NUMBERS, float: st.floats() | NUMBERS, str: st.text(max_size=8)}
    default = DEFAULTS[field]
    return st.just(default) | kinds.get(type(default), st.lists(NUMBERS, max_size=3)) | NUMBERS


def load_config(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with contextlib.suppress(ValueError):
        load_experiment(path).check()


@FUZZ
@given(st.sampled_from(EXPERIMENTS), EDITS)
def test_fuzz_of_a_config_files_bytes_ends_in_an_experiment_or_our_error(
    fuzzed: Path, experiment: Path, edits: list
) -> None:
    load_config(fuzzed / "experiment.toml", edited(experiment.read_bytes(), edits))


@FUZZ
@given(st.data())
def test_fuzz_of_a_config_files_values_ends_in_an_experiment_or_our_error(fuzzed: Path, data: st.DataObject) -> None:
    fields = data.draw(st.lists(st.sampled_from(sorted(DEFAULTS)), max_size=4, unique=True))
    lines = [f"{field} = {json.dumps(data.draw(values_for(field)))}" for field in fields]
    # JSON is TOML but for the names of what is no number.
    lines = [line.replace("NaN", "nan").replace("Infinity", "inf") for line in lines]
    load_config(fuzzed / "experiment.toml", "\n".join(lines).encode())


def test_docs_show_these_rows_and_no_others() -> None:
    assert list(shown_rows()) == [case.what for case in CASES]


def as_shown(error: str, storage: Path) -> str:
    """An error as docs/damage.md shows it: without what depends on the place, on luck, or on a library's version."""
    for pattern, replacement in (
        (rf"{re.escape(str(storage.parent))}/", ""),
        (r", or delete data/\S+ and data/\S+ and collect again; other trials stay as they are$", ", or ..."),
        (r"\.tmp-[0-9a-f]{32}", ".tmp-..."),
        (r"(part-[0-9]{8}|state-[0-9])-[0-9a-f]{16}", r"\1-..."),
        (r"\b[1-9][0-9]* bytes", "N bytes"),
        (r"\bcolumn [0-9]+", "column N"),
        (r"[0-9a-f]{16}", "0123456789abcdef"),
        (r"\|", "/"),
    ):
        error = re.sub(pattern, replacement, error)
    return error


def shown_rows() -> dict[str, str]:
    """What happened -> what the user reads, as docs/damage.md has it."""
    lines = (ROOT / "docs" / "damage.md").read_text().splitlines()
    rows = [line.removeprefix("| ").removesuffix(" |").split(" | ") for line in lines if line.startswith("| ")]
    assert rows[0] == ["what happened", "what the user reads"]
    assert all(len(row) == 2 for row in rows)
    assert len({what for what, _ in rows}) == len(rows)
    return dict(rows[1:])


def main() -> None:
    """Write docs/damage.md."""
    lines = ["| what happened | what the user reads |", "|---|---|"]
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            Path(folder).chmod(0o755)
            storage = whole_storage(Path(folder) / "data")
            lines.append(f"| {case.what} | {as_shown(error_of(case, storage), storage)} |")
    text = (
        "# What can go wrong with a data set, and the message for it\n\n"
        "`python tests/test_damage.py` makes this page by causing each kind of damage in a small storage, "
        "`data/`. Each row is tested: the damage is done and the message compared. Other trials in the storage stay "
        'readable in every case; if the seal is damaged, delete it first. A message that ends in "or ..." goes on to '
        "name the trial's two folders, which you can delete before collecting again; other trials are not affected. "
        "Sizes and digests are left out, because they depend on the versions of libraries.\n\n"
    )
    (ROOT / "docs" / "damage.md").write_text(f"{text}{chr(10).join(lines)}\n")


if __name__ == "__main__":
    main()
