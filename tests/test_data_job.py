"""The user's command on a data set: what it prints is what lies there, and its exit status says whether it is sound."""

import importlib
import json
import os
import subprocess
import sys
import urllib.parse
from pathlib import Path
from types import ModuleType

import duckdb
import numpy as np
import pytest
import safetensors
import safetensors.numpy
import torch
from runs import model_states, write_torch
from test_damage import files_up_to
from test_trajectory_store import HEADER, collect, files, lose_trial, sealed, truncate

from tipl_ray.config import Collect, Experiment, Split, Where
from tipl_ray.data.snapshots import COLUMNS, PPO_COLUMNS
from tipl_ray.remembered import remember_collection

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "jobs"))

from data import main

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
    for told in (HEADER.task, "log_std", "[2, 3] at 0", "2.13.0", store.digest(), "2, of no set length", "mean"):
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
    assert "3 trials verified: 24 snapshots" in run("verify", tmp_path)
    damaged = [files(tmp_path, "trial=3/part-00000001*")[0], files(tmp_path, "trial=5/state-*")[0]]
    for path in damaged:
        content = path.read_bytes()
        path.write_bytes(content[:40] + bytes([content[40] ^ 1]) + content[41:])
    said = run("verify", tmp_path, status=1)
    assert "1 trials verified" in said
    assert [f"error: {path}: " in said for path in damaged] == [True, True]
    assert "1 trials verified" in run("verify", tmp_path, "--seeds", 4)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_an_exported_trial_is_the_trial_and_loads_without_unpickling(tmp_path: Path, suffix: str) -> None:
    expected = collect(tmp_path / "data").trajectory(3)
    whole, part = tmp_path / f"whole{suffix}", tmp_path / f"part{suffix}"
    run("export", tmp_path / "data", whole)
    run("export", tmp_path / "data", part, "--seeds", 3, "--columns", "weights", "--start", 2, "--stop", 6)
    if suffix == ".npz":
        arrays = dict(np.load(whole, allow_pickle=False))
        header, some = arrays.pop("header").item(), dict(np.load(part, allow_pickle=False))
        del some["header"]
    else:
        arrays, some = safetensors.numpy.load_file(whole), safetensors.numpy.load_file(part)
        with safetensors.safe_open(whole, "np") as file:
            header = file.metadata()["header"]
    assert json.loads(header)["task"] == HEADER.task
    assert {*arrays} == {*PPO_COLUMNS}
    for name in PPO_COLUMNS:
        field = COLUMNS[name]
        np.testing.assert_array_equal(arrays[name], getattr(expected, field))
    assert some.keys() == {"snapshot", "weights"}
    np.testing.assert_array_equal(some["weights"], expected.weights_TP[2:6])
    assert "exists; choose another name" in run("export", tmp_path / "data", whole, status=1)
    assert [path.name for path in files(tmp_path, f"*{suffix}") if path.parent == tmp_path] == [part.name, whole.name]


@pytest.fixture
def datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Hugging Face's library, which has to do without a network and keeps what it reads below the test's folder."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    return importlib.import_module("datasets")


def test_an_exported_data_set_is_loaded_by_hugging_faces_library_and_by_duckdb(
    tmp_path: Path, datasets: ModuleType
) -> None:
    for seed in range(3, 8):
        store = collect(tmp_path / "data", seed=seed)
    experiment = Experiment(
        name="five",
        collect=Collect(first_seed=3, num_trials=5),
        split=Split(validation_trials=1, test_trials=1),
        where=Where(storage=str(tmp_path / "data")),
    )
    remember_collection(experiment)
    folder = tmp_path / "exported"
    assert f"{folder}: 3 train, 1 validation, 1 test; " in run("export", tmp_path / "data", folder)
    loaded = datasets.load_dataset(str(folder), cache_dir=str(tmp_path / "cache")).with_format("arrow")
    tables = {split: rows[:] for split, rows in loaded.items()}
    assert {split: sorted({*rows["seed"].to_pylist()}) for split, rows in tables.items()} == {
        "train": [3, 4, 5],
        "validation": [6],
        "test": [7],
    }
    for rows in tables.values():
        seeds_N = rows["seed"].to_numpy()
        for seed in {*seeds_N.tolist()}:
            expected = store.trajectory(seed)
            for name in PPO_COLUMNS:
                found = np.array(rows[name].to_pylist(), float)[seeds_N == seed]
                np.testing.assert_array_equal(found, getattr(expected, COLUMNS[name]))
    query = "select count(*), sum(snapshot) from read_parquet(?)"
    assert duckdb.execute(query, [[str(path) for path in folder.rglob("*.parquet")]]).fetchone() == (40, 5 * 28)
    assert store.digest() in (folder / "README.md").read_text()


def test_an_export_goes_on_where_it_was_killed_and_refuses_another(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for seed in (3, 4):
        collect(tmp_path / "data", seed=seed)
    export = ["export", str(tmp_path / "data"), str(tmp_path / "exported")]
    assert main(export) == 0
    before = {path: path.read_bytes() for path in files(tmp_path / "exported", "*") if path.is_file()}
    assert {path.name for path in before} == {"README.md", "header.json", "trial-3.parquet", "trial-4.parquet"}
    kept = tmp_path / "exported/data/train/trial-3.parquet"
    for path in {*before} - {kept, tmp_path / "exported/header.json"}:
        path.unlink()
    touched = kept.stat().st_mtime_ns
    assert main(export) == 0
    assert {path: path.read_bytes() for path in before} == before
    assert kept.stat().st_mtime_ns == touched
    capfd.readouterr()
    assert "holds the export of other trials or columns" in one_line(capfd, *export, "--seeds", 3)


def one_line(capfd: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What the command, run in this process, is refused with."""
    assert main(list(map(str, arguments))) == 1
    out, err = capfd.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    return line


def test_checkpoints_are_imported_once_and_asked_and_each_folder_that_cannot_be_is_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("first", "second"):
        write_torch(tmp_path / name, model_states(12, seed=len(name)))
    (tmp_path / "empty").mkdir()
    storage = str(tmp_path / "storage")
    folders = [str(tmp_path / name) for name in ("first", "empty", "second")]
    for outcome in ("imported", "imported before"):
        assert main(["import", *folders, "--storage", storage, "--exclude", "norm"]) == 1
        out, err = capfd.readouterr()
        assert out.count("12 checkpoints, 0 to 110, of 2,928 weights in 4 tensors, 141 KB: " + outcome + " as ") == 2
        assert (
            err == f"error: {tmp_path / 'empty'}: holds no checkpoints: files that end in .safetensors, .pt, .pth, "
            ".bin, .ckpt, .zip, or folders with one\n"
        )
        assert "left out by --include and --exclude: model.model.layers.0.norm.weight, " in out
        assert "left out part of the optimiser's or training state: optimizer_state_dict/state/0/exp_avg, " in out
    assert main(["ask", storage, "--steps", "1", "3"]) == 0
    out, _ = capfd.readouterr()
    assert out.startswith("Can the next checkpoint be forecast? ")
    address = out.splitlines()[-1].removeprefix("report: ")
    assert address.startswith(f"file://{tmp_path}/storage/predictability/")
    assert "python jobs/data.py ask" in Path(urllib.parse.urlsplit(address).path).read_text()
    assert "no series is called third" in one_line(capfd, "ask", storage, "--series", "third")
    assert "is no regular expression" in one_line(capfd, "import", folders[0], "--storage", storage, "--include", "(")
    assert "steps=(3, 1) are not rising" in one_line(capfd, "ask", storage, "--steps", 3, 1)


def test_a_refused_import_leaves_the_storage_as_it_was(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    states = model_states(3)
    states[1]["model.embed_tokens.weight"][0, 0] = float("nan")
    write_torch(tmp_path / "run", states)
    collect(tmp_path / "kept")
    for storage in (tmp_path / "new" / "storage", tmp_path / "kept"):
        before = sorted(tmp_path.rglob("*"))
        assert "NaN or infinite" in one_line(capfd, "import", tmp_path / "run", "--storage", storage)
        assert sorted(tmp_path.rglob("*")) == before


def test_series_of_different_networks_are_averaged_only_where_they_are_named(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    storage = str(tmp_path / "storage")
    for name, width in (("narrow", 3), ("wide", 4), ("wide-too", 4)):
        states = [{"a.w": torch.randn(width), "b.w": torch.randn(2)} for _ in range(12)]
        write_torch(tmp_path / name, states)
        assert main(["import", str(tmp_path / name), "--storage", storage, "--exclude", "optimizer"]) == 0
    capfd.readouterr()
    line = one_line(capfd, "ask", storage)
    assert "contains series of 2 different networks, which are not averaged: narrow (5 weights in 2 layers); " in line
    assert "wide, wide-too (6 weights in 2 layers); name those to compare, as in --series narrow" in line
    assert main(["ask", storage, "--series", "narrow", "wide", "--steps", "1"]) == 0
    assert main(["ask", storage, "--leave-out", "*a*", "--steps", "1"]) == 0


def test_ahead_without_a_predictor_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    line = one_line(capfd, "watch", tmp_path, 1, "--ahead", 5)
    assert line == "error: --ahead 5 is for what a predictor forecasts; choose one with --predictor"


def test_what_export_cannot_do_is_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    collect(tmp_path)
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "folder.npz").mkdir()
    for arguments, complaint in (
        ((tmp_path / "x.pickle",), "must end in .safetensors or .npz, or be a folder"),
        ((tmp_path / "x.npz", "--stop", 9), "stop=9 is no range of the 8 snapshots of trial 3"),
        ((tmp_path / "x.npz", "--columns", "wieghts"), "columns=['wieghts']: perhaps 'weights'?"),
        ((tmp_path / "x.npz", "--seeds", 9), "there is no trial 9; there is trial 3"),
        (
            (tmp_path / "x.npz", "--seeds", 3, 9),
            "a .npz file holds one trial, and there are 2; choose one with --seeds, or name",
        ),
        ((tmp_path / "none" / "x.npz",), f"no such folder, {tmp_path / 'none'}; create it first"),
        ((tmp_path / "file" / "x.npz",), f"no such folder, {tmp_path / 'file'}"),
        ((tmp_path / "folder.npz",), "exists; choose another name"),
        ((Path("/proc/x.npz"),), "cannot be written"),
        ((Path("/proc/x.safetensors"),), "cannot be written"),
        ((Path("/proc/x"),), "cannot be written"),
        ((tmp_path / "x", "--stop", 9), "--start and --stop are for the arrays of one trial"),
        ((tmp_path / "x", "--columns", "wieghts"), "columns=['wieghts']: perhaps 'weights'?"),
        ((tmp_path / "commits",), "commits is not empty; choose another folder"),
    ):
        assert complaint in one_line(capfd, "export", tmp_path, *arguments)
    assert not files(tmp_path, "x.*")
    assert not files(tmp_path, ".tmp-*")


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_an_export_that_finds_no_room_leaves_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], suffix: str
) -> None:
    collect(tmp_path / "data")
    with files_up_to(600):
        said = one_line(capfd, "export", tmp_path / "data", tmp_path / f"x{suffix}")
    assert "File too large" in said
    assert "Free some space" in said
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_a_sealed_data_set_that_lost_a_trial_is_refused_by_name(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    sealed(tmp_path)
    lose_trial(tmp_path)
    lost = f"error: {tmp_path}/commits/trial=4: trial 4 of this sealed data set is missing. Restore "
    commands = (
        *(("verify",), ("verify", "--seeds", "4"), ("list",), ("describe",)),
        ("export", f"{tmp_path}/x.npz", "--seeds", "4"),
        ("export", f"{tmp_path}/x"),
    )
    for command in commands:
        assert main([command[0], str(tmp_path), *command[1:]]) == 1
        out, err = capfd.readouterr()
        assert err.startswith(lost)
        assert len(err.splitlines()) == 1
        if command == ("verify",):
            assert "2 trials verified" in out
        if command == ("list",):
            assert [line for line in out.splitlines() if " 3 " in line and " 8 " in line]
    assert main(["verify", str(tmp_path), "--seeds", "3", "5"]) == 0


@pytest.mark.parametrize("damage", [b"", b"{", None])
def test_every_command_says_when_the_seal_is_damaged_or_a_stray_trial_is_there(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], damage: bytes | None
) -> None:
    sealed(tmp_path / "data")
    if damage is None:
        collect(tmp_path / "other", seed=9)
        for parent in ("trajectories", "commits"):
            (tmp_path / "other" / parent / "trial=9").rename(tmp_path / "data" / parent / "trial=9")
    else:
        (tmp_path / "data/commits/_SUCCESS").write_bytes(damage)
    for command in ("verify", "list", "describe"):
        assert main([command, str(tmp_path / "data")]) == 1
        (line,) = capfd.readouterr().err.splitlines()
        assert ("trial 9" in line) if damage is None else ("_SUCCESS: is not a seal" in line)
        assert "collect again" in line


def test_a_trial_that_never_was_is_refused_with_those_that_are(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    sealed(tmp_path)
    for command in ("verify", "sweep"):
        said = one_line(capfd, command, tmp_path, "--seeds", 9)
        assert "no trial 9; there are trials 3-5" in said


@pytest.mark.parametrize("command", ["describe", "list", "verify", "sweep", "export"])
def test_a_storage_that_cannot_be_is_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str], command: str) -> None:
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "empty").mkdir()
    for storage, complaint in (
        (tmp_path / "file", "is a file; choose another folder"),
        (tmp_path / "file" / "deep", "is a file; choose another folder"),
        (tmp_path / "none", ""),
        (tmp_path / "empty", ""),
        ("", "name is empty"),
        ("floppy://disk", "Unrecognized filesystem type"),
        ("s3://", "names no bucket"),
        ("s3://me:secret@bucket/x", "carries credentials"),
    ):
        more = (tmp_path / "x.npz",) if command == "export" else ()
        said = one_line(capfd, command, storage, *more)
        assert complaint in said
        assert "secret" not in said


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
    assert "2 garbage files; pass --delete to delete them" in said
    assert "of trial 4, so commit records of it seem to be lost" in said
    assert garbage.exists()
    assert left.exists()
    run("sweep", tmp_path, "--delete", status=1)
    assert not garbage.exists()
    assert not left.exists()
    assert len(files(tmp_path, "trial=4/part-*")) == 3
    assert "4 garbage files deleted" in run("sweep", tmp_path, "--seeds", 4, "--lost", "--delete")
    assert not files(tmp_path, "trial=4/*")
    assert store.verify(3, 8).complete


def test_every_command_explains_itself() -> None:
    for command in ("describe", "list", "verify", "export", "sweep"):
        assert "folder or URI of the data set" in run(command, "--help")
