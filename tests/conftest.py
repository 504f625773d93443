"""An S3 server on this machine, for all tests that need one."""

import contextlib
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from typing import Any

import botocore.session
import pytest

BUCKET = "trajectories-of-tests"


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    """host:port of an S3 server on this machine, with one bucket, and its credentials in the environment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_PROFILE", "AWS_REGION", "AWS_DEFAULT_REGION"):
            patch.delenv(name, raising=False)
        for name, value in (
            ("ACCESS_KEY_ID", "id"),
            ("SECRET_ACCESS_KEY", "secret"),
            ("EC2_METADATA_DISABLED", "true"),
        ):
            patch.setenv(f"AWS_{name}", value)
        try:
            deadline = time.monotonic() + 30
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


def make_client(endpoint: str) -> Any:
    return botocore.session.get_session().create_client("s3", endpoint_url=endpoint, region_name="us-east-1")


def new_root(endpoint: str) -> str:
    """Nobody's place in the bucket."""
    return f"s3://{BUCKET}/{uuid.uuid4().hex}?endpoint_override={endpoint}"
