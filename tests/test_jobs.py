"""What every job shares: one line for what a user can mend, a traceback for a bug, and the signals that end it."""

import errno
import os
import pty
import select
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pyarrow as pa
import pytest
import ray
import sqlalchemy.exc
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from tipl_ray.errors import UserError
from tipl_ray.jobs import ClusterError, _interruptible, connected_to_ray, exit_status, in_one_line
from tipl_ray.places import CHECKOUT


def from_a_worker(error: Exception) -> Exception:
    """As Ray brings an error of a task."""
    return ray.exceptions.RayTaskError("collect", "Traceback ...", error).as_instanceof_cause()


def from_a_training(error: Exception) -> Exception:
    """As Ray Train brings an error of its loop."""
    return WorkerGroupError("Traceback ...", {0: UserExceptionWithTraceback(error, "Traceback ...")})


WRAPPED = [
    lambda error: error,
    from_a_worker,
    from_a_training,
    ControllerError,
    lambda e: from_a_worker(from_a_training(e)),
]


@pytest.mark.parametrize("wrap", WRAPPED)
@pytest.mark.parametrize(
    ("error", "words"),
    [
        (UserError("storage d: is in the way"), "storage d: is in the way"),
        (ValueError("basis.rank=99 exceeds 8"), "basis.rank=99 exceeds 8"),
        (
            OSError(errno.ENOSPC, "No space left on device", "d/x"),
            "d/x: No space left on device; free some space there",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "d"), "d: Permission denied; use a place"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "d/x"), "d/x: No such file or directory"),
        (OSError("When reading 'b/x' in bucket 'b': AWS Error NETWORK_CONNECTION"), "AWS Error NETWORK_CONNECTION"),
        (pa.ArrowNotImplementedError("no such codec"), "no such codec"),
        (
            sqlalchemy.exc.OperationalError("INSERT", {}, Exception("database or disk is full")),
            "MLflow: (builtins.Exception) database or disk is full",
        ),
        (MemoryError("Unable to allocate 72. GiB"), "out of memory: Unable to allocate 72. GiB"),
        (ray.exceptions.OutOfMemoryError("Task was killed.\nMemory: ..."), "Ray: Task was killed. The same command"),
    ],
)
def test_what_a_user_can_mend_is_one_line_whatever_it_came_through(wrap, error: Exception, words: str) -> None:
    line = in_one_line(wrap(error))
    assert line is not None
    assert words in line
    assert len(line.splitlines()) == 1


@pytest.mark.parametrize("wrap", WRAPPED)
@pytest.mark.parametrize("bug", [TypeError("x"), AssertionError("x"), KeyError("x"), RuntimeError("x"), IndexError(3)])
def test_a_bug_keeps_its_traceback(wrap, bug: Exception) -> None:
    error = wrap(bug)
    assert in_one_line(error) is None
    with pytest.raises(type(error)), exit_status():
        raise error


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    code = "from tipl_ray.jobs import exit_status\nwith exit_status():\n  for _ in range(99999): print('x' * 99)"
    command = f'{sys.executable} -c "$CODE" | head -1'
    environment = {**os.environ, "CODE": code, "PYTHONPATH": str(CHECKOUT)}
    done = subprocess.run(command, shell=True, capture_output=True, text=True, env=environment, timeout=120)
    assert done.stderr == ""
    assert done.stdout == f"{'x' * 99}\n"


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "[::1]:1"])
def test_an_address_where_nobody_answers_is_named_within_seconds(monkeypatch, address: str) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ClusterError, match="unset RAY_ADDRESS") as caught, connected_to_ray():
        pass
    assert address in str(caught.value)


def test_a_folder_that_ray_cannot_use_is_named(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for folder in (tmp_path / ("long" * 30), Path("/proc/none")):
        monkeypatch.setenv("RAY_TMPDIR", str(folder))
        with pytest.raises(ClusterError, match="RAY_TMPDIR") as caught, connected_to_ray():
            pass
        assert str(folder)[:90] in str(caught.value)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_a_signal_ends_a_job_as_ctrl_c_does_unless_it_is_ignored(number: signal.Signals) -> None:
    before = signal.signal(number, signal.SIG_DFL)
    with pytest.raises(SystemExit) as caught, exit_status(), _interruptible(number):
        os.kill(os.getpid(), number)
    assert caught.value.code == 130
    assert signal.getsignal(number) == signal.SIG_DFL
    signal.signal(number, signal.SIG_IGN)
    try:
        with _interruptible(number):
            os.kill(os.getpid(), number)
    finally:
        signal.signal(number, before)


WORK = """
import sys, time
from pathlib import Path
from tipl_ray.jobs import connected_to_ray, exit_status
from tipl_ray.terminal import ProgressView
with exit_status(), connected_to_ray(), ProgressView() as view:
    Path("begun").touch()
    try:
        while True:
            view.show([], "at work")
            time.sleep(0.1)
    except KeyboardInterrupt:
        Path("told").touch()
        raise
"""


def test_a_closed_terminal_ends_a_job_and_leaves_no_process(tmp_path: Path) -> None:
    process, terminal = pty.fork()
    if not process:
        os.chdir(tmp_path)
        os.environ.update({"PYTHONPATH": str(CHECKOUT), "TERM": "xterm"})
        os.environ.pop("RAY_ADDRESS", None)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whoever runs the tests may have it ignored, as nohup does
        os.execv(sys.executable, [sys.executable, "-c", WORK])
    try:
        said = b""
        while not (tmp_path / "begun").exists():
            said += os.read(terminal, 65536) if select.select([terminal], [], [], 0.1)[0] else b""
        started = psutil.Process(process).children(recursive=True)
    finally:
        os.close(terminal)
        _, status = os.waitpid(process, 0)
    assert os.waitstatus_to_exitcode(status) == 130, said
    assert (tmp_path / "told").exists()
    assert len(started) >= 2
    assert psutil.wait_procs(started, timeout=60)[1] == []
