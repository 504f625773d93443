"""What tests share: an S3 server, and a Ray cluster that each module joins."""

import os
from collections.abc import Iterator

import pytest
import ray
from machine import s3_server
from ray.cluster_utils import Cluster

from tipl_ray.places import CHECKOUT


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    """host:port of an S3 server on this machine, with one bucket, and its credentials in the environment."""
    with s3_server() as address:
        yield address


@pytest.fixture(scope="session")
def head() -> Iterator[str]:
    """Address of a Ray cluster of one node with two CPUs, to which nobody is connected yet."""
    os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    node = {"num_cpus": 2, "num_gpus": 0, "include_dashboard": False, "object_store_memory": 200_000_000}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    yield cluster.address
    cluster.shutdown()


@pytest.fixture(scope="module")
def cluster(head: str) -> Iterator[None]:
    """A connection of this module's own to that cluster, with workers of its own that find what a job's find."""
    ray.init(head, log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": str(CHECKOUT)}})
    yield
    ray.shutdown()
