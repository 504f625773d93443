import fcntl
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from machine import new_root

from tipl_ray.data import locks
from tipl_ray.data.locks import only_one
from tipl_ray.data.storage import Storage, StoreError
from tipl_ray.places import CHECKOUT

HOLD = """
import sys
sys.path.insert(0, sys.argv[1])
from tipl_ray.data.locks import only_one
with only_one(sys.argv[2], "train-1", "training this model"):
    print("held", flush=True)
    sys.stdin.read()
"""


def holder(storage: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(CHECKOUT), str(storage)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def refused(storage: Path | str, name: str = "train-1") -> str:
    with pytest.raises(StoreError) as error, only_one(str(storage), name, "training this model"):
        pass
    return str(error.value)


def test_a_second_process_is_told_who_is_at_it_and_may_do_other_things(tmp_path: Path):
    with holder(tmp_path) as process:
        said = refused(tmp_path)
        assert said.startswith(f"{tmp_path}: process {process.pid} on ")
        assert "is already training this model; wait for it to end" in said
        assert "\n" not in said
        with only_one(str(tmp_path), "train-2", "training this model"):
            pass
        with only_one(str(tmp_path / "elsewhere"), "train-1", "training this model"):
            pass
        assert process.stdin is not None
        process.stdin.close()
    assert list((tmp_path / "locks").iterdir()) == []


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_lock_ends_with_its_holder_however_that_ends(tmp_path: Path, how: signal.Signals):
    with holder(tmp_path) as process:
        process.send_signal(how)
    assert list((tmp_path / "locks").iterdir()), "it had no time to take it away"
    with only_one(str(tmp_path), "train-1", "training this model"):
        (path,) = (tmp_path / "locks").iterdir()
        assert json.loads(path.read_text())["process"] == os.getpid()
        assert "already" in refused(tmp_path)
    assert list((tmp_path / "locks").iterdir()) == []


def test_a_holder_that_has_not_said_who_it_is_holds_it_all_the_same(tmp_path: Path):
    (tmp_path / "locks").mkdir()
    for content in ("", "{", "[]", '{"host": "a"}'):
        path = tmp_path / "locks" / "train-1.lock"
        path.write_text(content)
        with path.open() as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            assert "another process is already training" in refused(tmp_path)


def test_a_storage_below_a_file_is_refused_in_one_line(tmp_path: Path):
    (tmp_path / "file").write_text("")
    for place in ("file", "file/d", "file/d/e"):
        said = refused(tmp_path / place)
        assert said.startswith(f"{tmp_path / place}: cannot be written: ")
        assert "use another --storage" in said


@pytest.mark.parametrize("number", [38, 95, 37])
def test_a_file_system_without_locks_is_used_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int):
    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with only_one(str(tmp_path), "train-1", "a"), only_one(str(tmp_path), "train-1", "b"):
        pass


@pytest.fixture
def bucket(server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A place in a bucket, with leases that last for a second."""
    monkeypatch.setattr(locks, "RENEW_SECONDS", 0.1)
    monkeypatch.setattr(locks, "LEASE_SECONDS", 1.0)
    return new_root(f"http://{server}")


def test_a_bucket_has_one_holder_at_a_time_and_is_left_as_it_was(bucket: str):
    with only_one(bucket, "train-1", "training this model"):
        said = refused(bucket)
        assert f"process {os.getpid()} on " in said
        assert "is already training this model; wait for it to end" in said
        with only_one(bucket, "train-2", "training this model"):
            pass
    assert Storage(bucket).sizes("locks/train-1") == {}
    with only_one(bucket, "train-1", "training this model"):
        pass


def test_a_lease_whose_holder_was_killed_is_taken_over_by_one(bucket: str):
    Storage(bucket).write("locks/train-1/7.json", b'{"host": "a", "process": 1, "since": "yesterday"}')
    with only_one(bucket, "train-1", "training this model"):
        assert set(Storage(bucket).sizes("locks/train-1")) == {"7.json", "8.json"}
        assert "already" in refused(bucket)
    assert Storage(bucket).sizes("locks/train-1") == {}
