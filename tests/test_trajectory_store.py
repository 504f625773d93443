"""What the data set promises: committed rows come back bit for bit, and nothing else is ever seen."""

import dataclasses
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import polars
import pyarrow as pa
import pyarrow.dataset as pa_dataset
import pyarrow.parquet as pq
import pytest

from tipl_ray.data.snapshots import COLUMNS, PPO_COLUMNS, ROW_GROUP_BYTES, Header, Snapshot, as_json, part_schema
from tipl_ray.data.storage import StoreError
from tipl_ray.data.trajectory_store import TrajectoryStore
from tipl_ray.data.trial_files import TrialFiles
from tipl_ray.data.trial_writer import TrialWriter

P, O = 7, 3  # noqa: E741
HEADER = Header(
    task="InvertedPendulum-v4",
    layout=(("hidden.weight", (2, 3), 0), ("log_std", (1,), 6)),
    config={"ppo": {"gamma": 0.99}, "policy_hidden": [2]},
    versions={"mujoco": "4.0.0", "gymnasium": "1.4.0", "torch": "2.13.0", "numpy": "2.4.0"},
)


def make_snapshot(index: int, seed: int = 3, num_weights: int = P, **changes: Any) -> Snapshot:
    random = np.random.default_rng([seed, index])
    snapshot = Snapshot(
        seed=seed,
        snapshot=index,
        iteration=(index + 4) // 5,
        epoch=index * 2,
        env_step=2048 * ((index + 4) // 5),
        learning_rate=3e-4 / (1 + index),
        episodic_return=None if index % 3 == 0 else float(random.normal()),
        weights=random.normal(size=num_weights).astype(np.float32),
        observation_mean=random.normal(size=O),
        observation_variance=random.random(O),
        observation_count=2048.0 * index + 1e-4,
    )
    return dataclasses.replace(snapshot, **changes)


def make_state(commit: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(commit)
    return {
        "generator": random.integers(0, 2**64, size=4, dtype=np.uint64),
        "physics": random.normal(size=(2, 5)) * 1e-300,
        "adam.first": random.normal(size=(3, 4)).astype(np.float32).T,
        "count": np.array(commit, dtype=np.int64),
        "done": np.array([True, False]),
        "odd": np.array([np.nan, -0.0, np.inf]),
    }


def commit_snapshots(writer: TrialWriter, stop: int, seed: int = 3) -> None:
    """Append up to snapshot `stop` and commit."""
    for index in range(writer.next_snapshot, stop):
        writer.append(make_snapshot(index, seed))
    writer.commit(make_state(stop))


def collect(root: Path, seed: int = 3, stops: tuple[int, ...] = (1, 4, 8)) -> TrajectoryStore:
    store = TrajectoryStore(str(root))
    writer = TrialWriter(store, seed, HEADER)
    for stop in stops:
        commit_snapshots(writer, stop, seed)
    return store


def go_on_from(store: TrajectoryStore, committed: int) -> None:
    """Check that trial 3 stands at this snapshot, resume it to its 8th and seal."""
    assert store.verify(3).num_snapshots == committed
    writer = TrialWriter(store, 3, HEADER)
    assert writer.state is not None
    assert int(writer.state["count"]) == writer.next_snapshot == committed
    if committed < 8:
        commit_snapshots(writer, 8)
    store.finish([3], 8)


def files(root: Path, pattern: str) -> list[Path]:
    return sorted(root.rglob(pattern))


def rewrite_record(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_the_header_and_the_records_of_our_own_trials_are_the_bytes_that_they_always_were(tmp_path: Path) -> None:
    record = collect(tmp_path).trial(3).run()[-1]
    assert HEADER.config_hash == "00274d0add2441a7"
    assert b"columns" not in as_json(HEADER)
    assert hashlib.sha256(as_json(HEADER)).hexdigest()[:16] == "3181b29bc191e2a4"
    fixed = dataclasses.replace(record, part_sha256="0" * 64, part=f"part-00000004-{'0' * 16}.parquet", part_bytes=1)
    assert b"columns" not in as_json(fixed)
    schema = part_schema(HEADER, O)
    assert schema.names == ["seed", *PPO_COLUMNS]
    assert [name for name in schema.names if schema.field(name).nullable] == ["episodic_return"]


def test_columns_that_make_no_sense_together_are_no_header() -> None:
    for columns, words in (
        (
            ("snapshot", "weights", "step"),
            r"columns=\['snapshot', 'weights', 'step'\] must be some of snapshot, step, iter",
        ),
        (("weights",), r"must be some of snapshot"),
        (
            ("snapshot", "weights", "observation_mean"),
            r"contain only some of observation_mean, observation_variance, observ",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            dataclasses.replace(HEADER, columns=columns)


def test_committed_snapshots_come_back_bit_for_bit(tmp_path: Path) -> None:
    store = collect(tmp_path)
    read = store.trajectory(3)
    expected = [make_snapshot(index) for index in range(8)]
    for column in PPO_COLUMNS:
        field = COLUMNS[column]
        values = [getattr(snapshot, column) for snapshot in expected]
        array = np.array([np.nan if value is None else value for value in values])
        assert getattr(read, field).dtype == np.float32 if column == "weights" else True
        np.testing.assert_array_equal(getattr(read, field), array)
    assert read.weights_TP.shape == (8, P)
    assert np.isnan(read.episodic_returns_T[[0, 3, 6]]).all()
    assert np.isnan(read.episodic_returns_T).sum() == 3
    assert (store.seeds(), store.header()) == ((3,), HEADER)
    assert store.progress(3, 8).complete
    assert not store.progress(3, 9).complete
    assert store.verify(3, 8).num_commits == 3


def test_a_writer_keeps_its_own_copy_of_what_was_appended(tmp_path: Path) -> None:
    store = TrajectoryStore(str(tmp_path))
    writer = TrialWriter(store, 3, HEADER)
    reused = make_snapshot(0)
    writer.append(reused)
    reused.weights[:] = 0
    writer.commit(make_state(1))
    np.testing.assert_array_equal(store.trajectory(3).weights_TP[0], make_snapshot(0).weights)


def test_plain_parquet_readers_take_the_folder_as_it_lies(tmp_path: Path) -> None:
    collect(tmp_path, seed=3)
    collect(tmp_path, seed=11).finish([3, 11], 8)
    table = pa_dataset.dataset(tmp_path / "trajectories", partitioning="hive").to_table()
    assert sorted(set(zip(table["trial"].to_pylist(), table["seed"].to_pylist(), strict=True))) == [(3, 3), (11, 11)]
    frame = pd.read_parquet(tmp_path / "trajectories").sort_values(["trial", "snapshot"])
    assert len(frame) == table.num_rows == 16
    assert frame["episodic_return"].isna().sum() == 6
    for row in frame.itertuples():
        assert np.array_equal(row.weights, make_snapshot(row.snapshot, row.seed).weights)
    metadata = pq.read_schema(files(tmp_path, "*.parquet")[0]).metadata
    assert json.loads(metadata[b"tipl_ray"])["layout"][1] == ["log_std", [1], 6]


def test_duckdb_reads_the_folder_as_it_lies(tmp_path: Path) -> None:
    collect(tmp_path, seed=3)
    collect(tmp_path, seed=11).finish([3, 11], 8)
    garbage = tmp_path / "commits" / ".tmp-0123"
    garbage.write_bytes(b"half a part")
    rows = (
        duckdb.connect()
        .execute(
            f"select trial, seed, snapshot, weights, len(weights), typeof(weights), weights[1], observation_mean "
            f"from read_parquet('{tmp_path}/trajectories/*/*.parquet', hive_partitioning=true) order by trial, snapshot"
        )
        .fetchall()
    )
    assert [row[:3] for row in rows] == [(seed, seed, index) for seed in (3, 11) for index in range(8)]
    for _, seed, index, weights, length, kind, first, mean in rows:
        expected = make_snapshot(index, seed)
        assert (length, kind) == (P, "FLOAT[]")
        assert weights[0] == first
        assert np.array_equal(np.array(weights, np.float32), expected.weights)
        assert np.array_equal(mean, expected.observation_mean)
    ((mean_return,),) = (
        duckdb.connect()
        .execute(f"select avg(episodic_return) from read_parquet('{tmp_path}/trajectories/*/*.parquet') where seed = 3")
        .fetchall()
    )
    returns = [make_snapshot(index).episodic_return for index in range(8)]
    assert mean_return == pytest.approx(np.mean([value for value in returns if value is not None]))


def test_polars_reads_the_folder_as_it_lies(tmp_path: Path) -> None:
    collect(tmp_path, seed=3)
    collect(tmp_path, seed=11).finish([3, 11], 8)
    (tmp_path / "commits" / ".tmp-0123").write_bytes(b"half a part")
    frame = polars.scan_parquet(tmp_path / "trajectories", hive_partitioning=True).sort("trial", "snapshot").collect()
    assert frame.select("trial", "snapshot").rows() == [(seed, index) for seed in (3, 11) for index in range(8)]
    assert frame.schema["weights"] == polars.Array(polars.Float32, P)
    assert frame["episodic_return"].null_count() == 6
    expected = [make_snapshot(index, seed).weights for seed in (3, 11) for index in range(8)]
    np.testing.assert_array_equal(frame["weights"].to_numpy(), expected)


def test_a_file_uri_names_the_same_store(tmp_path: Path) -> None:
    collect(tmp_path)
    assert TrajectoryStore(tmp_path.as_uri()).digest() == TrajectoryStore(str(tmp_path)).digest()
    assert len(TrajectoryStore(f"{tmp_path.as_uri()}/").trajectory(3).snapshots_T) == 8


def test_the_same_rows_give_the_same_bytes_and_the_digest_knows_only_the_data(tmp_path: Path) -> None:
    for name, seeds in (("one", (3, 11)), ("two", (11, 3)), ("other", (3, 12))):
        for seed in seeds:
            collect(tmp_path / name, seed)
    one, two, other = (TrajectoryStore(str(tmp_path / name)) for name in ("one", "two", "other"))
    parts = [[path.read_bytes() for path in files(tmp_path / name, "*.parquet")] for name in ("one", "two")]
    assert parts[0] == parts[1]
    assert one.digest() == two.digest() != other.digest()
    assert one.digest([3]) == other.digest([3]) != one.digest([11])


def test_the_resume_state_comes_back_bit_for_bit(tmp_path: Path) -> None:
    store = TrajectoryStore(str(tmp_path))
    writer = TrialWriter(store, 3, HEADER)
    assert writer.state is None
    for stop in (1, 4):
        commit_snapshots(writer, stop)
    for state in (writer.state, TrialWriter(store, 3, HEADER).state):
        assert state is not None
        assert state.keys() == make_state(4).keys()
        for name, array in make_state(4).items():
            assert (state[name].dtype, state[name].shape) == (array.dtype, array.shape)
            assert state[name].tobytes() == array.tobytes()
    assert len(files(tmp_path, "state-*")) == 1


def test_a_state_that_would_need_unpickling_is_refused(tmp_path: Path) -> None:
    writer = TrialWriter(TrajectoryStore(str(tmp_path)), 3, HEADER)
    writer.append(make_snapshot(0))
    with pytest.raises(StoreError, match=r"'bad'.*object"):
        writer.commit({"bad": np.array([{}])})
    assert not files(tmp_path, "*.*")


def test_an_uncommitted_part_is_invisible_and_swept(tmp_path: Path) -> None:
    store = collect(tmp_path)
    digest = store.digest()
    commits, trial = tmp_path / "commits/trial=3", tmp_path / "trajectories/trial=3"
    foreign = tmp_path / "commits/trial=3/notes.txt"
    foreign.write_text("mine")
    garbage = [
        tmp_path / "commits/.tmp-0123",
        commits / f"state-4-{'0' * 16}.safetensors",
        trial / f"part-00000008-{'0' * 16}.parquet",
        trial / f"part-00000003-{'0' * 16}.parquet",
    ]
    for path in garbage:
        path.write_bytes(files(tmp_path, "part-00000004-*")[0].read_bytes())
    assert (store.seeds(), store.digest(), store.progress(3).num_snapshots) == ((3,), digest, 8)
    assert len(store.trajectory(3).snapshots_T) == 8
    assert store.sweep([4]) == (str(garbage.pop(0).relative_to(tmp_path)),)
    assert sorted(store.garbage()) == sorted(str(path.relative_to(tmp_path)) for path in garbage)
    assert sorted(store.sweep()) == sorted(str(path.relative_to(tmp_path)) for path in garbage)
    assert not any(path.exists() for path in garbage)
    assert foreign.exists()
    assert store.sweep() == ()
    assert store.verify(3, 8).num_snapshots == 8


@pytest.mark.parametrize("check", ["refuse_stray_records", "state"])
def test_a_trial_is_verified_while_it_is_written(tmp_path: Path, check: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = collect(tmp_path)
    writer, real = TrialWriter(store, 3, HEADER), getattr(TrialFiles, check)

    def commit_meanwhile(*arguments: Any) -> Any:
        if writer.next_snapshot < 12:
            commit_snapshots(writer, writer.next_snapshot + 2)
        return real(*arguments)

    monkeypatch.setattr(TrialFiles, check, commit_meanwhile)
    assert store.verify(3).num_snapshots == 12
    files(tmp_path, "state-5-*")[0].unlink()
    with pytest.raises(StoreError, match="state-5"):
        store.verify(3)


def test_a_broken_run_of_commits_shows_only_what_comes_before_the_break(tmp_path: Path) -> None:
    store = collect(tmp_path)
    (tmp_path / "commits/trial=3/commit-2.json").unlink()
    assert store.progress(3).num_commits == 1
    assert store.trajectory(3).snapshots_T.tolist() == [0]
    for refused in (lambda: TrialWriter(store, 3, HEADER), lambda: store.verify(3)):
        with pytest.raises(StoreError, match=r"commit-3\.json.*sweep"):
            refused()
    before = files(tmp_path, "*.*")
    with pytest.raises(StoreError, match=r"commit-3\.json: is beyond the 1 commits of trial 3.*lost"):
        store.sweep()
    assert files(tmp_path, "*.*") == before
    store.sweep(lost=True)
    assert [path.name for path in files(tmp_path, "commit-*")] == ["commit-1.json"]
    assert len(files(tmp_path, "*.parquet")) == 1


@pytest.mark.parametrize(("lost", "named"), [("commit-*", "part-00000000"), ("commit-[23]*", "part-00000004")])
def test_a_trial_whose_records_are_lost_is_swept_only_when_told(tmp_path: Path, lost: str, named: str) -> None:
    store = collect(tmp_path, seed=3)
    collect(tmp_path, seed=4)
    for path in files(tmp_path / "commits/trial=3", lost) + files(tmp_path / "commits/trial=3", "state-*"):
        path.unlink()
    with pytest.raises(StoreError, match=rf"trial=3/{named}.*: is beyond .* trial 3.*seem to be lost"):
        store.sweep()
    assert len(files(tmp_path, "trial=3/part-*")) == 3
    assert store.sweep([4]) == ()
    with pytest.raises(StoreError, match=r"trial=3.*(seem to be lost|has 1 of 8 snapshots)"):
        store.finish([4], 8)
    assert len(store.sweep(lost=True)) >= 2
    assert store.verify(4, 8).complete


def test_a_record_whose_range_does_not_follow_ends_the_run(tmp_path: Path) -> None:
    first, second = collect(tmp_path / "first", stops=(2, 5)), collect(tmp_path / "second", stops=(3, 5))
    for pattern in ("commit-2.json", "part-00000003-*"):
        source = files(tmp_path / "second", pattern)[0]
        (tmp_path / "first" / source.relative_to(tmp_path / "second")).write_bytes(source.read_bytes())
    assert (first.progress(3).num_snapshots, second.progress(3).num_snapshots) == (2, 5)


def test_another_configuration_is_refused_with_what_differs(tmp_path: Path) -> None:
    store = collect(tmp_path)
    other = dataclasses.replace(HEADER, config={"ppo": {"gamma": 0.5}, "policy_hidden": [2]})
    with pytest.raises(StoreError, match=r"commit-1\.json.*config\.ppo\.gamma=0\.99 there, 0\.5 here.*delete"):
        TrialWriter(store, 3, other)
    newer_torch = dataclasses.replace(HEADER, versions={**HEADER.versions, "torch": "9"})
    assert TrialWriter(store, 3, newer_torch).next_snapshot == 8
    writer = TrialWriter(store, 4, other)
    commit_snapshots(writer, 2, seed=4)
    with pytest.raises(StoreError, match=r"trial=4.*config\.ppo\.gamma"):
        store.header()
    with pytest.raises(StoreError, match=r"trial=4.*config\.ppo\.gamma"):
        store.verify_all([4], 2)


def test_a_second_writer_is_refused_and_harms_nothing(tmp_path: Path) -> None:
    store = collect(tmp_path)
    first, second = TrialWriter(store, 3, HEADER), TrialWriter(store, 3, HEADER)
    commit_snapshots(first, 10)
    with pytest.raises(StoreError, match=r"commit-4\.json: another process is writing trial 3"):
        commit_snapshots(second, 10)
    commit_snapshots(first, 12)
    assert store.verify(3, 12).num_commits == 5


def test_a_store_without_conditional_put_refuses_writers_with_the_reason() -> None:
    store = TrajectoryStore("mock:///somewhere")
    assert store.seeds() == ()
    with pytest.raises(StoreError, match=r"no conditional put .*'mock'.*second writer"):
        TrialWriter(store, 3, HEADER)


def test_a_uri_without_a_filesystem_is_refused() -> None:
    with pytest.raises(StoreError, match="floppy://disk: cannot be opened"):
        TrajectoryStore("floppy://disk")


def flip_byte(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 0x10
    path.write_bytes(content)


def weights_column(path: Path, group: int = 0) -> Any:
    row_group = pq.read_metadata(path).row_group(group)
    columns = [row_group.column(index) for index in range(row_group.num_columns)]
    return next(column for column in columns if column.path_in_schema.startswith("weights"))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def alter(path: Path) -> None:
    column = weights_column(path) if path.suffix == ".parquet" else None
    flip_byte(path, column.data_page_offset + column.total_compressed_size - 1 if column else -1)


@pytest.mark.parametrize("pattern", ["part-00000001-*", "state-3-*"])
@pytest.mark.parametrize("damage", [truncate, empty, alter, Path.unlink])
def test_a_damaged_file_is_named_with_the_way_out(tmp_path: Path, pattern: str, damage: Callable[[Path], None]) -> None:
    store = collect(tmp_path)
    collect(tmp_path, seed=4)
    (path,) = files(tmp_path, f"trial=3/{pattern}")
    damage(path)
    with pytest.raises(StoreError, match=rf"{path.name}: .*delete .*trajectories/trial=3 and .*collect again"):
        store.verify(3)
    if pattern.startswith("part"):
        with pytest.raises(StoreError, match=path.name):
            store.trajectory(3)
    else:
        assert len(store.trajectory(3).snapshots_T) == 8
        with pytest.raises(StoreError, match=path.name):
            TrialWriter(store, 3, HEADER)
    assert store.verify(4, 8).complete


def test_verify_finds_every_flipped_byte_and_a_read_ends_in_a_result_or_one_error(tmp_path: Path) -> None:
    store = collect(tmp_path, stops=(2,))
    (path,) = files(tmp_path, "*.parquet")
    content, refusals = path.read_bytes(), []
    for position in range(len(content)):
        path.write_bytes(content[:position] + bytes([content[position] ^ 0x80]) + content[position + 1 :])
        try:
            assert store.trajectory(3).weights_TP.shape == (2, P)
        except StoreError as error:
            refusals.append(str(error))
        if position % 16 == 0:
            with pytest.raises(StoreError, match=path.name):
                store.verify(3)
    assert len(refusals) > len(content) / 2
    assert all(path.name in refusal for refusal in refusals)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"part": "../../../etc/passwd"}, "part="),
        ({"part": "/etc/passwd"}, "part="),
        ({"part_sha256": "../" * 21 + "a"}, "part_sha256"),
        ({"state": "../trial=4/state-1-0000000000000000.safetensors"}, "state="),
        ({"commit": 2}, "commit"),
        ({"rows": 3}, "rows=3"),
        ({"rows": "1"}, "rows"),
        ({"last_snapshot": 10**30}, "last_snapshot"),
        ({"config_hash": "0" * 16}, "config_hash="),
        ({"header": {}}, "header.task"),
        ({"header": {**json.loads(as_json(HEADER)), "format_version": 2}}, "format_version=2"),
        ({"header": {**json.loads(as_json(HEADER)), "layout": [["w", [10**30], 0]]}}, "layout"),
        ({"header": {**json.loads(as_json(HEADER)), "config": {"gamma": float("nan")}}}, "not JSON"),
    ],
)
def test_a_record_that_is_altered_or_leads_out_of_its_folder_is_refused(
    tmp_path: Path, changes: dict[str, Any], complaint: str
) -> None:
    store = collect(tmp_path, stops=(1,))
    rewrite_record(tmp_path / "commits/trial=3/commit-1.json", **changes)
    for refused in (store.trajectory, store.verify, store.progress, lambda seed: TrialWriter(store, seed, HEADER)):
        with pytest.raises(StoreError, match=rf"commit-1\.json: .*{complaint}"):
            refused(3)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]", b"null", b"[" * 100_000])
def test_a_record_that_is_no_json_object_is_refused(tmp_path: Path, content: bytes) -> None:
    store = collect(tmp_path, stops=(1,))
    (tmp_path / "commits/trial=3/commit-1.json").write_bytes(content)
    with pytest.raises(StoreError, match=r"commit-1\.json: is not a commit record"):
        store.trajectory(3)


def test_a_part_of_other_columns_is_refused_even_under_a_right_digest(tmp_path: Path) -> None:
    store = collect(tmp_path, stops=(1,))
    (path,) = files(tmp_path, "*.parquet")
    table = pq.read_table(path, partitioning=None)
    pq.write_table(table.set_column(4, "env_step", pa.array([0.5])), path)
    rewrite_record(tmp_path / "commits/trial=3/commit-1.json", part_bytes=path.stat().st_size)
    with pytest.raises(StoreError, match=rf"{path.name}: its columns"):
        store.trajectory(3)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"weights": np.array([0, 1, np.nan, 3, 4, 5, 6], dtype=np.float32)}, "weights=nan at position 2"),
        ({"weights": np.zeros(P)}, r"weights=float64\[7\] is not float32\[7\]"),
        ({"weights": np.zeros(P + 1, dtype=np.float32)}, r"weights=float32\[8\] is not float32\[7\]"),
        ({"weights": np.zeros((1, P), dtype=np.float32)}, r"weights=float32\[1, 7\]"),
        ({"observation_mean": np.array([0, np.inf, 0])}, "observation_mean=inf at position 1"),
        ({"observation_variance": np.zeros(O + 1)}, "observation_variance="),
        ({"observation_count": float("nan")}, "observation_count=nan"),
        ({"learning_rate": float("inf")}, "learning_rate=inf"),
        ({"episodic_return": float("nan")}, "episodic_return=nan"),
        ({"env_step": -1}, "env_step=-1"),
        ({"seed": 4}, "seed=4 is not 3"),
        ({"snapshot": 3}, "snapshot=3 is not 1"),
        ({"snapshot": 0}, "snapshot=0 is not 1"),
    ],
)
def test_a_snapshot_that_does_not_fit_is_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], complaint: str
) -> None:
    store = collect(tmp_path, stops=(1,))
    writer = TrialWriter(store, 3, HEADER)
    with pytest.raises(StoreError, match=rf"trial 3, snapshot \d: {complaint}"):
        writer.append(make_snapshot(1, **changes))
    commit_snapshots(writer, 2)
    assert store.verify(3).num_snapshots == 2


def test_a_commit_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no snapshot"):
        TrialWriter(TrajectoryStore(str(tmp_path)), 3, HEADER).commit({})


class KilledError(BaseException):
    """Stands for the process's end."""


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(("call", "nth"), [("replace", 1), ("replace", 2), ("link", 1)])
def test_a_crash_at_any_publication_point_costs_at_most_the_open_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, nth: int, when: str
) -> None:
    undisturbed = collect(tmp_path / "undisturbed").digest()
    store = collect(tmp_path / "crashed", stops=(1, 4))
    real, calls = getattr(os, call), []

    def crash(*arguments: Any, **keywords: Any) -> None:
        calls.append(arguments)
        if len(calls) == nth and when == "before":
            raise KilledError
        real(*arguments, **keywords)
        if len(calls) == nth and when == "after":
            raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(os, call, crash)
        with pytest.raises(KilledError):
            commit_snapshots(TrialWriter(store, 3, HEADER), 8)
    committed = 8 if (call, when) == ("link", "after") else 4
    go_on_from(store, committed)
    assert store.digest() == undisturbed
    assert len(files(tmp_path / "crashed", "state-*")) == 1


def test_a_killed_process_leaves_no_half_written_file_under_a_final_name(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys, pathlib; sys.path.insert(0, sys.argv[1]); import test_trajectory_store as t\n"
        "store = t.collect(pathlib.Path(sys.argv[2]), stops=(1, 4))\n"
        "os.link = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)\n"
        "t.commit_snapshots(t.TrialWriter(store, 3, t.HEADER), 8)\n"
    )
    command = [sys.executable, "-c", script, str(Path(__file__).parent), str(tmp_path)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    store = TrajectoryStore(str(tmp_path))
    assert store.verify(3).num_snapshots == 4
    assert len(files(tmp_path, ".tmp-*")) == 1
    commit_snapshots(TrialWriter(store, 3, HEADER), 8)
    assert len(store.sweep()) == 1
    assert store.digest() == collect(tmp_path / "undisturbed").digest()


def test_a_refused_write_is_one_error_and_the_writer_can_try_again(tmp_path: Path) -> None:
    store = collect(tmp_path, stops=(1,))
    writer = TrialWriter(store, 3, HEADER)
    writer.append(make_snapshot(1))
    (tmp_path / "trajectories").rename(tmp_path / "aside")
    (tmp_path / "trajectories").write_text("a file where the folder was")
    with pytest.raises(StoreError, match=r"part-00000001-.*cannot be written.*run again"):
        writer.commit(make_state(2))
    (tmp_path / "trajectories").unlink()
    (tmp_path / "aside").rename(tmp_path / "trajectories")
    writer.commit(make_state(2))
    assert store.verify(3, 2).complete


def test_a_range_returns_that_range_in_the_columns_asked_for(tmp_path: Path) -> None:
    store = collect(tmp_path)
    whole = store.trajectory(3)
    for start in range(9):
        for stop in range(start, 9):
            read = store.trajectory(3, columns=["weights"], start=start, stop=stop)
            assert read.snapshots_T.tolist() == list(range(start, stop))
            np.testing.assert_array_equal(read.weights_TP, whole.weights_TP[start:stop])
            assert len(read.env_steps_T) == len(read.observation_means_TO) == 0
    for start, stop in ((-1, 2), (3, 2), (0, 9)):
        with pytest.raises(ValueError, match=f"start={start}, stop={stop}.*8 snapshots of trial 3"):
            store.trajectory(3, start=start, stop=stop)
    with pytest.raises(ValueError, match=r"columns=\['weight'\]"):
        store.trajectory(3, columns=["weight"])
    with pytest.raises(StoreError, match=r"trial 5.*collect"):
        store.trajectory(5)


def test_a_range_touches_only_its_row_groups(tmp_path: Path) -> None:
    num_weights = 200_000
    wide = dataclasses.replace(HEADER, layout=(("weight", (num_weights,), 0),))
    store = TrajectoryStore(str(tmp_path))
    writer = TrialWriter(store, 3, wide)
    for index in range(25):
        writer.append(make_snapshot(index, num_weights=num_weights))
    writer.commit({})
    (path,) = files(tmp_path, "*.parquet")
    metadata = pq.read_metadata(path)
    rows = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    assert rows == [10, 10, 5]
    assert rows[0] * num_weights * 4 <= ROW_GROUP_BYTES
    middle = weights_column(path, group=1)
    assert middle.encodings[-1] == "BYTE_STREAM_SPLIT"
    flip_byte(path, middle.data_page_offset + middle.total_compressed_size // 2)
    for start, stop in ((0, 10), (20, 25), (4, 7)):
        assert store.trajectory(3, start=start, stop=stop).weights_TP.shape == (stop - start, num_weights)
    np.testing.assert_array_equal(
        store.trajectory(3, start=20).weights_TP[-1], make_snapshot(24, num_weights=num_weights).weights
    )
    for start, stop in ((9, 11), (15, 16), (0, 25)):
        with pytest.raises(StoreError, match=path.name):
            store.trajectory(3, start=start, stop=stop)


def test_weights_are_read_when_they_are_asked_for(tmp_path: Path) -> None:
    store = collect(tmp_path)
    expected, stored = store.trajectory(3).weights_TP, store.weights(3)
    assert stored.shape == (8, P)
    for part in (slice(None), slice(3), slice(2, 6), slice(5, 99), slice(4, 4)):
        np.testing.assert_array_equal(stored[part], expected[part])
    for columns in (slice(None), slice(2, 5), slice(6, 9)):
        np.testing.assert_array_equal(stored[:, columns], expected[:, columns])
    files(tmp_path, "part-00000004*")[0].unlink()
    np.testing.assert_array_equal(stored[:4], expected[:4])
    with pytest.raises(StoreError, match="part-00000004"):
        stored[3:5]
    with pytest.raises(StoreError, match=r"trial 5.*collect"):
        store.weights(5)


def test_success_is_written_only_when_every_trial_is_whole(tmp_path: Path) -> None:
    store = collect(tmp_path, seed=3)
    writer = TrialWriter(store, 4, HEADER)
    commit_snapshots(writer, 5, seed=4)
    with pytest.raises(StoreError, match="trial 4 has 5 of 8 snapshots"):
        store.finish([3, 4], 8)
    with pytest.raises(StoreError, match=r"trial 4, which is none of this experiment's, has 5 of 8 .*another storage"):
        store.finish([3], 8)
    assert not store.finished()
    commit_snapshots(writer, 8, seed=4)
    with pytest.raises(StoreError, match="trial 5 has 0 of 8 snapshots"):
        store.finish([3, 5], 8)
    store.finish([4, 3], 8)
    assert store.finished()
    mark = json.loads((tmp_path / "commits/_SUCCESS").read_text())
    assert mark.pop("trials").keys() == {"3", "4"}
    assert mark == {"seeds": [3, 4], "num_snapshots": 8, "digest": store.digest(), "diverged": []}
    commit_snapshots(TrialWriter(store, 5, HEADER), 1, seed=5)
    assert not store.finished()


def test_a_seal_takes_in_whole_trials_that_were_there_before(tmp_path: Path) -> None:
    for seed in (3, 4):
        collect(tmp_path, seed=seed)
    store = collect(tmp_path, seed=5)
    store.finish([5], 8)
    assert store.seeds() == (3, 4, 5)
    assert store.finished()


def sealed(root: Path, seeds: tuple[int, ...] = (3, 4, 5)) -> TrajectoryStore:
    for seed in seeds:
        collect(root, seed=seed)
    store = TrajectoryStore(str(root))
    store.finish(seeds, 8)
    return store


def with_seal_of_before(root: Path) -> None:
    """Leave the seal as earlier versions wrote it."""
    path = root / "commits/_SUCCESS"
    seal = json.loads(path.read_text())
    del seal["trials"]
    path.write_text(json.dumps(seal, indent=2))


def readers(store: TrajectoryStore, seed: int) -> dict[str, Callable[[], object]]:
    """Whatever reads one trial of a data set."""
    return {
        "trajectory": lambda: store.trajectory(seed),
        "weights": lambda: store.weights(seed),
        "verify": lambda: store.verify(seed),
        "digest": lambda: store.digest([seed]),
    }


def readers_of_all(store: TrajectoryStore) -> dict[str, Callable[[], object]]:
    return {"finished": store.finished, "digest of all": store.digest, "verify_folder": store.verify_folder}


def lose_trial(root: Path, seed: int = 4) -> None:
    for parent in ("trajectories", "commits"):
        shutil.rmtree(root / parent / f"trial={seed}")


def lose_files_of_trial(root: Path) -> None:
    for path in files(root, "trial=4/*"):
        path.unlink()


def lose_parts_of_trial(root: Path) -> None:
    shutil.rmtree(root / "trajectories/trial=4")


def lose_records_of_trial(root: Path) -> None:
    shutil.rmtree(root / "commits/trial=4")


def lose_last_commit(root: Path, seed: int = 4) -> None:
    for pattern in (f"commits/trial={seed}/commit-3.json", f"trajectories/trial={seed}/part-00000004*"):
        files(root, pattern)[0].unlink()


def exchange_trial(root: Path, seed: int = 4) -> None:
    """Put in its place a trial that is whole in itself, of as many snapshots."""
    lose_trial(root, seed)
    writer = TrialWriter(TrajectoryStore(str(root)), seed, HEADER)
    for index in range(8):
        writer.append(make_snapshot(index, seed, weights=np.zeros(P, np.float32)))
    seal = (root / "commits/_SUCCESS").read_bytes()
    writer.commit({})
    (root / "commits/_SUCCESS").write_bytes(seal)


def add_part(root: Path, seed: int = 4) -> None:
    content = files(root, f"trial={seed}/part-00000004*")[0].read_bytes()
    (root / f"trajectories/trial={seed}/part-00000008-{'0' * 16}.parquet").write_bytes(content)


def add_hidden_part(root: Path) -> None:
    (root / "trajectories/trial=4/._part.parquet").write_bytes(b"PAR1")


@pytest.mark.parametrize("seal_of_before", [False, True])
@pytest.mark.parametrize(
    "change",
    [
        lose_trial,
        lose_files_of_trial,
        lose_parts_of_trial,
        lose_records_of_trial,
        lose_last_commit,
        exchange_trial,
        add_part,
        add_hidden_part,
    ],
)
def test_readers_hold_each_trial_to_its_seal_and_leave_the_others_alone(
    tmp_path: Path, change: Callable[[Path], None], seal_of_before: bool
) -> None:
    store = sealed(tmp_path)
    digests = {seed: store.digest([seed]) for seed in (3, 5)}
    if seal_of_before:
        with_seal_of_before(tmp_path)
        assert store.finished()
    change(tmp_path)
    # A seal of before knows no trial's digest, so that the exchange is seen only in the digest of all.
    one = {} if seal_of_before and change is exchange_trial else readers(store, 4)
    names = r"_SUCCESS: .*digest=" if not one else r"trial[ =]4"
    for reader in {**one, **readers_of_all(store)}.values():
        with pytest.raises(StoreError, match=names) as caught:
            reader()
        assert "\n" not in str(caught.value)
    for seed, digest in digests.items():
        assert store.digest([seed]) == digest
        assert store.trajectory(seed).weights_TP.shape == (8, P)


@pytest.mark.parametrize("change", [lose_trial, lose_files_of_trial, lose_parts_of_trial, lose_records_of_trial])
def test_a_lost_trial_is_named_by_whoever_asks_which_there_are_and_can_be_collected_again(
    tmp_path: Path, change: Callable[[Path], None]
) -> None:
    store = sealed(tmp_path)
    digest = store.digest()
    change(tmp_path)
    for reader in (store.seeds, store.header):
        with pytest.raises(StoreError, match=r"trial[ =]4.*missing"):
            reader()
    store.check_header(HEADER)
    shutil.rmtree(tmp_path / "commits/trial=4", ignore_errors=True)
    collect(tmp_path, seed=4)
    assert not store.finished()
    store.finish([3, 4, 5], 8)
    assert store.digest() == digest


@pytest.mark.parametrize("parents", [("trajectories", "commits"), ("trajectories",), ("commits",)])
def test_a_stray_trial_in_a_sealed_data_set_is_named(tmp_path: Path, parents: tuple[str, ...]) -> None:
    store = sealed(tmp_path / "data")
    collect(tmp_path / "other", seed=9)
    for parent in parents:
        shutil.copytree(tmp_path / "other" / parent / "trial=9", tmp_path / "data" / parent / "trial=9")
    asked: list[Callable[[], object]] = [store.seeds, store.header, *readers_of_all(store).values()]
    for reader in asked:
        with pytest.raises(StoreError, match=r"trial 9 is not part of the sealed data set.*Move .*_SUCCESS.*collect"):
            reader()
    assert len(store.trajectory(3).snapshots_T) == 8
    (tmp_path / "data/commits/_SUCCESS").unlink()
    if len(parents) == 2:
        store.finish([3, 4, 5], 8)
        assert store.seeds() == (3, 4, 5, 9)


@pytest.mark.parametrize("name", ["mine.parquet", "_mine.parquet", "trial=03/a.parquet", "_old/trial=3/a.parquet"])
def test_nothing_foreign_is_among_the_trials_of_a_sealed_data_set(tmp_path: Path, name: str) -> None:
    store = sealed(tmp_path)
    path = tmp_path / "trajectories" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"PAR1")
    for reader in (store.seeds, *readers_of_all(store).values()):
        with pytest.raises(StoreError, match=rf"{name.split('/')[0]}: is not the store's.*move it"):
            reader()


def test_what_other_readers_skip_may_be_among_the_trials(tmp_path: Path) -> None:
    store = sealed(tmp_path)
    for name in (".DS_Store", "_notes", "trial=3/.nfs0123"):
        (tmp_path / "trajectories" / name).write_bytes(b"")
    (tmp_path / "trajectories/trial=9").mkdir()
    assert store.finished()
    assert store.seeds() == (3, 4, 5)


@pytest.mark.parametrize("seal_of_before", [False, True])
@pytest.mark.parametrize(
    "edit",
    [
        lambda seal: b"",
        lambda seal: seal[:40],
        lambda seal: b"[]",
        lambda seal: b"\xff\xfe",
        lambda seal: b"[" * 100_000,
        lambda seal: seal.replace(b'"num_snapshots": 8', b'"num_snapshots": 9'),
        lambda seal: seal.replace(b'"num_snapshots": 8', b'"num_snapshots": "8"'),
        lambda seal: re.sub(rb"    4,", rb"", seal, count=1),
        lambda seal: re.sub(rb"    3,", rb"    3,\n    3,", seal, count=1),
        lambda seal: re.sub(rb'"digest": "....', rb'"digest": "0000', seal),
        lambda seal: seal.replace(b'"digest"', b'"hash"'),
    ],
)
def test_a_damaged_seal_is_one_line_with_the_way_out(
    tmp_path: Path, edit: Callable[[bytes], bytes], seal_of_before: bool
) -> None:
    store, path = sealed(tmp_path), tmp_path / "commits/_SUCCESS"
    if seal_of_before:
        with_seal_of_before(tmp_path)
    digest = store.digest()
    assert edit(path.read_bytes()) != path.read_bytes()
    path.write_bytes(edit(path.read_bytes()))
    for reader in (store.finished, store.digest):
        with pytest.raises(StoreError) as caught:
            reader()
        assert re.search("(Restore|Move) .*, or delete .* and collect again", str(caught.value))
        assert "\n" not in str(caught.value)
    path.unlink()
    store.finish([3, 4, 5], 8)
    assert store.digest() == digest


def test_a_trial_that_is_not_there_is_refused_with_those_that_are(tmp_path: Path) -> None:
    store = sealed(tmp_path)
    for unsealed in (False, True):
        if unsealed:
            (tmp_path / "commits/_SUCCESS").unlink()
        for reader in (*readers(store, 9).values(), lambda: store.header([9])):
            with pytest.raises(StoreError, match="there is no trial 9; there are trials 3-5"):
                reader()
    with pytest.raises(StoreError, match="there is no trial 9; no trial is committed there"):
        TrajectoryStore(str(tmp_path / "empty")).trajectory(9)


def test_reading_while_an_extension_takes_the_seal_away_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = sealed(tmp_path)
    real = store.committed

    def extend_meanwhile() -> tuple[int, ...]:
        monkeypatch.undo()
        collect(tmp_path, seed=9)
        return real()

    monkeypatch.setattr(store, "committed", extend_meanwhile)
    assert store.seeds() == (3, 4, 5, 9)


def write_for(store: TrajectoryStore, path_part: str, then: Callable[[], None]) -> None:
    """Let something happen once, right before the store's next write whose path has this in it."""
    publisher = store.files._publisher
    real = {name: getattr(publisher, name) for name in ("write", "put_if_absent", "delete")}

    def sleeping(name: str) -> Callable[..., Any]:
        def call(path: str, *data: Any) -> Any:
            if path_part in path:
                for each, function in real.items():
                    setattr(publisher, each, function)
                then()
            return real[name](path, *data)

        return call

    for name in real:
        setattr(publisher, name, sleeping(name))


@pytest.mark.parametrize("asleep_before", ["nothing", "part-", "state-", "commit-"])
@pytest.mark.parametrize("same", [True, False])
def test_a_writer_that_slept_while_another_sealed_leaves_the_seal_and_nothing_else(
    tmp_path: Path, asleep_before: str, same: bool
) -> None:
    collect(tmp_path, stops=(1, 4))
    sleeper_store, store = (TrajectoryStore(str(tmp_path)) for _ in range(2))
    sleeper, other = TrialWriter(sleeper_store, 3, HEADER), TrialWriter(store, 3, HEADER)

    def go_on_and_seal() -> None:
        commit_snapshots(other, 6)
        commit_snapshots(other, 8)
        store.finish([3], 8)

    for index in range(4, 6):
        sleeper.append(make_snapshot(index, episodic_return=make_snapshot(index).episodic_return if same else 0.5))
    if asleep_before == "nothing":
        go_on_and_seal()
    else:
        write_for(sleeper_store, asleep_before, go_on_and_seal)
    with pytest.raises(StoreError, match=r"commit-3\.json: another process is writing trial 3"):
        sleeper.commit(make_state(6 if same else 5))
    assert store.finished()
    assert store.verify(3, 8).complete
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    undisturbed = tmp_path / "undisturbed"
    collect(undisturbed, stops=(1, 4, 6, 8)).finish([3], 8)
    assert left == {str(path.relative_to(undisturbed)) for path in undisturbed.rglob("*") if path.is_file()}


def test_a_writer_that_extends_a_sealed_data_set_unseals_it_before_its_part_is_there(tmp_path: Path) -> None:
    store, seals = sealed(tmp_path), []
    write_for(store, "trial=9/part-", lambda: seals.append((tmp_path / "commits/_SUCCESS").exists()))
    commit_snapshots(TrialWriter(store, 9, HEADER), 2, seed=9)
    assert seals == [False]
    assert not store.finished()


def test_a_foreign_file_among_the_parts_is_named(tmp_path: Path) -> None:
    store = collect(tmp_path)
    for name in ("trajectories/trial=3/mine.parquet", "trajectories/mine.parquet"):
        foreign = tmp_path / name
        foreign.write_bytes(b"PAR1")
        assert len(store.trajectory(3).snapshots_T) == 8
        with pytest.raises(StoreError, match=rf"{name}: is not the store's.*move it"):
            store.finish([3], 8)
        foreign.unlink()
    store.finish([3], 8)


def test_a_layout_with_a_gap_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'log_std'.*offset 7 does not follow offset 6"):
        dataclasses.replace(HEADER, layout=(("hidden.weight", (2, 3), 0), ("log_std", (1,), 7)))


ODD_PARENTS = [
    "plain",
    "seed=99/learning_rate=0.1",
    "trial=7/snapshot=1",
    "weights=/a b",
    "50%/a%20b",
    "run[1]",
    "x*y",
    "what?",
    "{a,b}",
    "it's",
    'say "hi"',
]


@pytest.mark.parametrize("parent", ODD_PARENTS)
def test_the_recipes_of_the_docs_give_the_right_rows_wherever_the_storage_is(tmp_path: Path, parent: str) -> None:
    storage = tmp_path / parent / "data"
    sealed(storage, (1, 3))
    for neighbour in ("run1", "xAy", "whatX", "a"):  # what the parents' names match as patterns
        collect(tmp_path / neighbour / "data", seed=5)
    text = (Path(__file__).resolve().parent.parent / "docs" / "data.md").read_text()
    first, second, _ = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    scope: dict[str, Any] = {}
    exec(first.replace('"storage/demo"', repr(str(storage))), scope)
    rows = {
        "DuckDB": scope["by_duckdb"].to_dict("records"),
        "Polars": scope["by_polars"].to_dicts(),
        "pandas": scope["by_pandas"].to_dict("records"),
        "pyarrow": scope["by_pyarrow"].to_pylist(),
    }
    for reader, found in rows.items():
        assert len(found) == 16, reader
        for row in found:
            expected = make_snapshot(row["snapshot"], row["seed"])
            assert row["seed"] in (1, 3)
            assert row["learning_rate"] == expected.learning_rate, reader
            assert np.array_equal(np.array(row["weights"], np.float32), expected.weights), reader
    exec(second.replace("start=100, stop=200", "start=2, stop=5"), scope)
    assert scope["trial"].weights_TP.shape == (3, P)


def test_the_rows_are_right_by_hive_too_where_no_parent_bears_a_columns_name(tmp_path: Path) -> None:
    sealed(tmp_path / "year=2026" / "data", (1, 3))
    query = "select distinct trial, seed from read_parquet(?, hive_partitioning=true) order by seed"
    pattern = f"{tmp_path}/year=2026/data/trajectories/*/*.parquet"
    assert duckdb.execute(query, [pattern]).fetchall() == [(1, 1), (3, 3)]


def test_polars_and_pyarrow_read_hive_columns_below_the_folder_they_are_given_alone(tmp_path: Path) -> None:
    folder = tmp_path / "seed=99" / "learning_rate=0.1" / "data"
    sealed(folder, (1, 3))
    frame = polars.scan_parquet(folder / "trajectories", hive_partitioning=True).collect()
    table = pa_dataset.dataset(folder / "trajectories", partitioning="hive").to_table()
    for seeds, rates in (
        (frame["seed"], frame["learning_rate"]),
        (table["seed"].to_pylist(), table["learning_rate"].to_pylist()),
    ):
        assert set(seeds) == {1, 3}
        assert set(rates) == {make_snapshot(index).learning_rate for index in range(8)}
