"""Collection on several nodes: one is killed in the middle, one is drained, others come, and the data is the same."""

import os
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path

import pytest
import ray
from head import until
from publications import held_at
from ray.cluster_utils import Cluster
from test_collection import smoke

from tipl_ray.collect import crew
from tipl_ray.collect.collection import collect
from tipl_ray.collect.group import GroupCollector
from tipl_ray.config import Experiment, Where
from tipl_ray.data.trajectory_store import TrajectoryStore
from tipl_ray.ppo.engines import choose_engine


@pytest.fixture(scope="module")
def nodes() -> Iterator[Cluster]:
    """A head that runs no work, and three nodes of one CPU each: not the shared cluster, for nodes of it are killed."""
    os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    head = {"num_cpus": 0, "include_dashboard": False, "dashboard_agent_listen_port": 0}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    for _ in range(3):
        cluster.add_node(num_cpus=1, object_store_memory=100_000_000)
    ray.init(cluster.address, log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


class Events:
    """The log lines of a collection that runs in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str]):
        self._capsys, self._text = capsys, ""

    def of(self, event: str, **fields: str) -> list[str]:
        """The lines so far of one kind, with these fields."""
        self._text += self._capsys.readouterr().out
        lines = re.findall(rf"^time=\S+ event={event} .*$", self._text, re.MULTILINE)
        return [line for line in lines if all(f" {name}={value} " in f"{line} " for name, value in fields.items())]

    def values(self, event: str, field: str) -> list[str]:
        return [re.findall(rf" {field}=(\S+)", line)[0] for line in self.of(event)]


def at(line: str) -> float:
    return datetime.fromisoformat(line.split()[0].partition("=")[2]).timestamp()


def undisturbed_digest(experiment: Experiment) -> str:
    """Digest of the same trials run here, in one group, without Ray."""
    collector = GroupCollector(experiment, choose_engine("auto", experiment.ppo), experiment.collect.seeds)
    assert collector.advance(seconds=600).finished
    return TrajectoryStore(experiment.storage_path).digest()


def drain(node: str) -> None:
    """What Ray does on SIGTERM, and `ray drain-node` on a spot notice."""
    from ray.core.generated import autoscaler_pb2

    client = ray._raylet.GcsClient(address=ray.get_runtime_context().gcs_address)  # type: ignore[attr-defined]
    reason = autoscaler_pb2.DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION  # type: ignore[attr-defined]
    accepted, refusal = client.drain_node(node, reason, "a test", int((time.time() + 60) * 1000))
    assert accepted, refusal


@pytest.mark.parametrize("drained", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_nodes_that_are_killed_and_drained_and_that_come_change_nothing_in_the_data(
    drained: bool,
    nodes: Cluster,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(crew, "SLICE_SECONDS", 0.2)
    env_steps = 80 * 256
    fields = {"num_trials": 3, "total_env_steps": env_steps, "iterations_per_commit": 20}
    disturbed, plain = (smoke(tmp_path / name, Where(trials_per_actor=1), **fields) for name in ("disturbed", "plain"))
    expected = undisturbed_digest(plain)
    held = tmp_path / "held"
    held.mkdir()
    monkeypatch.setattr(crew, "GroupCollector", held_at("commit-2.json", held))
    events, first = Events(capsys), list(nodes.worker_nodes)
    capsys.readouterr()
    # Ray starts a node only from the main thread, so the collection runs in another.
    with ThreadPoolExecutor(1) as pool:
        collecting = pool.submit(collect, disturbed)

        def wait(condition: Callable[[], bool]) -> None:
            until(lambda: collecting.done() or condition(), 200)

        try:
            wait(lambda: {path.name for path in held.iterdir()} == {node.node_id for node in first})
            killed = time.time()
            nodes.remove_node(first[0], allow_graceful=False)
            nodes.add_node(num_cpus=1, object_store_memory=100_000_000)
            wait(lambda: len(events.of("start")) == 4)
            if drained:
                drain(first[1].node_id)
                wait(lambda: len(events.of("draining")) == 1)
        finally:
            (held / "go").touch()
        store = collecting.result(timeout=300)
    assert store.digest() == expected
    placed = events.values("actor", "node")
    assert set(placed[:3]) == {node.node_id for node in first}
    assert len(set(placed)) == 4
    (lost,) = events.of("lost", losses="1")
    trials, again = (re.findall(rf" {field}=(\S+)", lost)[0] for field in ("trials", "again"))
    # What the killed node had not committed: at most 20 iterations of 256 steps.
    assert int(again) <= 20 * 256
    (back,) = [line for line in events.of("start", trials=trials) if at(line) > at(lost)]
    assert len(events.of("draining")) == drained
    with capsys.disabled():
        print(
            f"\na node was killed: {at(lost) - killed:.1f} s until the driver knew, {at(back) - killed:.1f} s until "
            f"its trials went on elsewhere, {again} of {3 * env_steps} env steps run again"
        )
