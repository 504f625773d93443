"""What tests and benchmarks start and find on this machine: an S3 server, processes of their own, memory."""

import contextlib
import os
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import botocore.session

ROOT = Path(__file__).resolve().parent.parent
BUCKET = "trajectories-of-tests"
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_EC2_METADATA_DISABLED": "true"}
OTHERS = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_PROFILE", "AWS_REGION", "AWS_DEFAULT_REGION")


@contextlib.contextmanager
def s3_server() -> Iterator[str]:
    """host:port of moto's S3 server on the loopback address, with one bucket; its credentials in the environment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    before = {name: os.environ.get(name) for name in (*CREDENTIALS, *OTHERS)}
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _set_environment(dict.fromkeys(OTHERS) | CREDENTIALS)
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
                break
            assert time.monotonic() < deadline
            time.sleep(0.05)
        make_client(f"http://127.0.0.1:{port}").create_bucket(Bucket=BUCKET)
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()
        _set_environment(before)


def make_client(endpoint: str) -> Any:
    """botocore's client of an endpoint."""
    return botocore.session.get_session().create_client("s3", endpoint_url=endpoint, region_name="us-east-1")


def new_root(endpoint: str) -> str:
    """Nobody's place in the bucket."""
    return f"s3://{BUCKET}/{uuid.uuid4().hex}?endpoint_override={endpoint}"


def own_processes(title: str) -> list[int]:
    """Descendants of this process whose command line begins with a title."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it may end while we look
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
    own = {os.getpid()}
    while new := {process for process, parent in parents.items() if parent in own} - own:
        own |= new
    found = []
    for process in own:
        with contextlib.suppress(OSError):
            if Path(f"/proc/{process}/cmdline").read_bytes().startswith(title.encode()):
                found.append(process)
    return found


def peak_bytes() -> int:
    """Most that this process had resident so far."""
    return _memory("VmHWM")  # not getrusage, whose peak is inherited from the process that started this one


def resident_bytes() -> int:
    """What this process has resident."""
    return _memory("VmRSS")


def _memory(field: str) -> int:
    return 1024 * int(Path("/proc/self/status").read_text().partition(f"{field}:")[2].split()[0])


def _set_environment(values: dict[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def modules_after(code: str) -> set[str]:
    """The modules that a new process has loaded when it has run some code."""
    command = [sys.executable, "-c", f"import sys; {code}; print(*sys.modules)"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True, cwd=ROOT)
    return set(ran.stdout.split())
