"""The user's command on a data set: what it prints is what lies there, and its exit status says whether it is sound."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from test_trajectory_store import HEADER, collect, files, truncate

from tipl_ray.trajectory_store import COLUMNS

ROOT = Path(__file__).resolve().parent.parent


def run(*arguments: object, status: int = 0) -> str:
    """Output of the command, errors included, which ends with this status and without a traceback."""
    command = [sys.executable, str(ROOT / "jobs" / "data.py"), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, env={"COLUMNS": "200", "PATH": ""})
    said = result.stdout + result.stderr
    assert "Traceback" not in said
    assert result.returncode == status, said
    return said


def test_describe_tells_task_layout_versions_sizes_and_returns(tmp_path: Path) -> None:
    store = collect(tmp_path, seed=3)
    collect(tmp_path, seed=4, stops=(2,))
    said = run("describe", tmp_path)
    for told in (HEADER.task, "log_std", "[2, 3] at 0", "2.13.0", store.digest(), "10, ? in a complete trial", "mean"):
        assert told in said
    on_disk = sum(path.stat().st_size for path in files(tmp_path, "*.parquet"))
    assert f"{on_disk / 1000:.3g} KB, {on_disk / (10 * 7 * 4):.3f} of the 280 B" in said


def test_list_shows_each_trial_and_still_does_beside_a_damaged_one(tmp_path: Path) -> None:
    collect(tmp_path, seed=3)
    collect(tmp_path, seed=4, stops=(2,))
    (damaged,) = files(tmp_path, "trial=4/part-*")
    truncate(damaged)
    said = run("list", tmp_path, status=1)
    assert [line for line in said.splitlines() if " 3 " in line and " 8 " in line]
    assert f"error: {damaged}: has " in said


def test_verify_ends_with_status_1_and_names_each_damaged_file(tmp_path: Path) -> None:
    for seed in (3, 4, 5):
        collect(tmp_path, seed=seed)
    assert "3 trials are sound: 24 snapshots" in run("verify", tmp_path)
    damaged = [files(tmp_path, "trial=3/part-00000001*")[0], files(tmp_path, "trial=5/state-*")[0]]
    for path in damaged:
        content = path.read_bytes()
        path.write_bytes(content[:40] + bytes([content[40] ^ 1]) + content[41:])
    said = run("verify", tmp_path, status=1)
    assert "1 trials are sound" in said
    assert [f"error: {path}: " in said for path in damaged] == [True, True]
    assert "1 trials are sound" in run("verify", tmp_path, "--seeds", 4)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_an_exported_trial_is_the_trial_and_loads_without_unpickling(tmp_path: Path, suffix: str) -> None:
    expected = collect(tmp_path / "data").trajectory(3)
    whole, part = tmp_path / f"whole{suffix}", tmp_path / f"part{suffix}"
    run("export", tmp_path / "data", 3, whole)
    run("export", tmp_path / "data", 3, part, "--columns", "weights", "--start", 2, "--stop", 6)
    if suffix == ".npz":
        arrays = dict(np.load(whole, allow_pickle=False))
        header, some = arrays.pop("header").item(), dict(np.load(part, allow_pickle=False))
        del some["header"]
    else:
        arrays, some = safetensors.numpy.load_file(whole), safetensors.numpy.load_file(part)
        with safetensors.safe_open(whole, "np") as file:
            header = file.metadata()["header"]
    assert json.loads(header)["task"] == HEADER.task
    assert arrays.keys() == COLUMNS.keys()
    for name, field in COLUMNS.items():
        np.testing.assert_array_equal(arrays[name], getattr(expected, field))
    assert some.keys() == {"snapshot", "weights"}
    np.testing.assert_array_equal(some["weights"], expected.weights_TP[2:6])
    assert "exists; choose another name" in run("export", tmp_path / "data", 3, whole, status=1)
    assert [path.name for path in files(tmp_path, f"*{suffix}") if path.parent == tmp_path] == [part.name, whole.name]


def test_what_export_cannot_do_is_one_line(tmp_path: Path) -> None:
    collect(tmp_path)
    for arguments, complaint in (
        ((3, tmp_path / "x.pickle"), "ends neither in .safetensors nor in .npz"),
        ((3, tmp_path / "x.npz", "--stop", 9), "stop=9 is no range of the 8 snapshots of trial 3"),
        ((3, tmp_path / "x.npz", "--columns", "weight"), "columns=['weight']"),
        ((9, tmp_path / "x.npz"), "trial=9"),
    ):
        said = run("export", tmp_path, *arguments, status=1)
        assert complaint in said
        assert len(said.splitlines()) == 1


def test_sweep_lists_first_and_deletes_when_told_but_never_a_trial_that_lost_its_records(tmp_path: Path) -> None:
    store = collect(tmp_path, seed=3)
    collect(tmp_path, seed=4)
    garbage = tmp_path / f"trajectories/trial=3/part-00000008-{'0' * 16}.parquet"
    garbage.write_bytes(b"")
    left = tmp_path / "models" / "0123" / ".tmp-4567"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half a model")
    os.utime(left, times=(0, 0))
    for record in files(tmp_path, "trial=4/commit-*"):
        record.unlink()
    said = run("sweep", tmp_path, status=1)
    assert garbage.name in said
    assert str(left.relative_to(tmp_path)) in said
    assert "2 files of garbage; --delete deletes them" in said
    assert "of trial 4, so commit records of it seem to be lost" in said
    assert garbage.exists()
    assert left.exists()
    run("sweep", tmp_path, "--delete", status=1)
    assert not garbage.exists()
    assert not left.exists()
    assert len(files(tmp_path, "trial=4/part-*")) == 3
    assert "4 files of garbage deleted" in run("sweep", tmp_path, "--seeds", 4, "--lost", "--delete")
    assert not files(tmp_path, "trial=4/*")
    assert store.verify(3, 8).complete


def test_every_command_explains_itself() -> None:
    for command in ("describe", "list", "verify", "export", "sweep"):
        assert "folder or URI of the data set" in run(command, "--help")
