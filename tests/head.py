"""A real Ray head process with token authentication, for tests that submit jobs to it."""

import contextlib
import dataclasses
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ray.job_submission import JobSubmissionClient


def until(condition: Callable[[], Any], seconds: float) -> None:
    """Wait for something to come true. Raises TimeoutError."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"it did not come to that within {seconds} s")
        time.sleep(0.2)


def free_port() -> int:
    """A port of the loopback address that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def answers(url: str, token: str | None = None) -> bool:
    """Whether a GET is answered with success."""
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"} if token else {})
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


@contextlib.contextmanager
def short_folder() -> Iterator[Path]:
    """A temporary folder whose name leaves room for a socket's path, which may have 107 letters."""
    folder = Path(tempfile.mkdtemp(prefix="tipl-", dir="/tmp"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def running(command: list[str], log: Path, **options: Any) -> Iterator[subprocess.Popen]:
    """A process of ours, ended with SIGTERM, or SIGKILL a minute later."""
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, **options)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=60)
        process.kill()
        process.wait()


@dataclasses.dataclass(frozen=True, slots=True)
class Head:
    """A Ray head of our own, and what it takes to speak with it."""

    process: subprocess.Popen
    dashboard: str
    metrics: str
    token: str
    environment: dict[str, str]
    """For programs that are to speak with it."""


@contextlib.contextmanager
def ray_head(folder: Path, settings: dict[str, str] | None = None) -> Iterator[Head]:
    """`ray start --head --block` with token authentication, on ports and in a folder of its own, ready for jobs."""
    token = secrets.token_hex(32)
    (folder / "token").write_text(token)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_"))},
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
        "RAY_TMPDIR": str(folder),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        **(settings or {}),
    }
    dashboard, metrics = free_port(), free_port()
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=2"]
    command += ["--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"]
    command += [f"--port={free_port()}", f"--ray-client-server-port={free_port()}", f"--metrics-export-port={metrics}"]
    command += [f"--dashboard-agent-listen-port={free_port()}", f"--dashboard-agent-grpc-port={free_port()}"]
    command += ["--min-worker-port=0", "--max-worker-port=0", f"--temp-dir={folder / 'ray'}"]
    command += ["--object-store-memory=200000000"]
    with running(command, folder / "ray.log", env=environment, cwd=folder) as process:
        address = f"http://127.0.0.1:{dashboard}"
        until(lambda: process.poll() is not None or answers(f"{address}/api/version", token), 300)
        if process.poll() is not None:
            raise RuntimeError((folder / "ray.log").read_text())
        client = JobSubmissionClient(address, headers={"Authorization": f"Bearer {token}"})
        until(lambda: _accepts_jobs(client), 300)
        yield Head(
            process, address, f"http://127.0.0.1:{metrics}/metrics", token, {**environment, "RAY_ADDRESS": address}
        )


def _accepts_jobs(client: Any) -> bool:
    """The dashboard answers before there is an agent that could start a job."""
    try:
        client.submit_job(entrypoint="true")
    except RuntimeError as error:
        if "No available agent" not in str(error):
            raise
        return False
    return True
