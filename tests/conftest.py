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
    """Address of a Ray cluster of one node with two CPUs, to which nobody is connected yet.

    Its workers find what a job's find. Tests' own clusters have the usual port of a node's agent, which they would
    wait for.
    """
    os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"
    node = {"num_cpus": 2, "num_gpus": 0, "include_dashboard": False, "object_store_memory": 200_000_000}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(CHECKOUT))
        cluster = Cluster(initialize_head=True, head_node_args={**node, "dashboard_agent_listen_port": 0})
    yield cluster.address
    cluster.shutdown()


@pytest.fixture(scope="module")
def cluster(head: str) -> Iterator[None]:
    """A connection of this module's own to that cluster, with workers of its own."""
    ray.init(head, log_to_driver=False)
    yield
    ray.shutdown()
