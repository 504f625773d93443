"""The S3 server that tests share."""

from collections.abc import Iterator

import pytest
from machine import s3_server


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    """host:port of an S3 server on this machine, with one bucket, and its credentials in the environment."""
    with s3_server() as address:
        yield address
