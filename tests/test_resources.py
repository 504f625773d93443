"""Resources that can never come: refused in one line by a real local cluster, waited for with a word where it grows."""

import json
import time

import pytest
import ray

from tipl_ray import resources
from tipl_ray.resources import can_grow, require_resources

CPU, GPU = {"CPU": (1.0, "a.cpus=1")}, {"CPU": (1.0, "a.cpus=1"), "GPU": (1.0, "a.use_gpu=True")}


@pytest.mark.usefixtures("cluster")
def test_a_cluster_of_this_machine_alone_cannot_grow() -> None:
    assert not can_grow()


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize(
    ("needs", "count", "complaint"),
    [
        ({"CPU": (64.0, "a.threads=64")}, 1, "a.threads=64 needs 64 CPUs per actor, but no node of the cluster has as"),
        (GPU, 1, "a.use_gpu=True needs a GPU per actor, but no node of the cluster has one; ask for less, or run"),
        ({"GPU": (0.5, "a.gpus=0.5")}, 1, "a.gpus=0.5 needs 0.5 GPU per actor, but no node of the cluster has as many"),
        (
            CPU,
            3,
            "a.workers=3 needs a CPU for each actor at the same time, but the cluster, with 2 CPUs on 1 node, has",
        ),
        ({"CPU": (2.0, "a.cpus=2")}, 3, "a.workers=3 needs 2 CPUs for each actor at the same time"),
    ],
)
def test_what_can_never_come_is_refused_at_once_with_what_asks_for_it(
    needs: resources.Needs, count: int, complaint: str
) -> None:
    begin = time.monotonic()
    with pytest.raises(ValueError, match="needs") as refusal:
        require_resources(needs, "actor", count, f"a.workers={count}")
    assert complaint in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert time.monotonic() - begin < 5


@pytest.mark.usefixtures("cluster")
def test_what_the_cluster_has_is_let_through_even_while_others_hold_it() -> None:
    held = ray.util.placement_group([{"CPU": 2}])
    ray.get(held.ready())
    require_resources({"CPU": (1.0, "a.cpus=1"), "GPU": (0.0, "a.gpus=0")}, "actor", 2, "a.workers=2")
    ray.util.remove_placement_group(held)


@pytest.mark.usefixtures("cluster")
def test_where_the_cluster_can_grow_a_line_now_and_then_says_what_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(resources, "can_grow", lambda: True)
    monkeypatch.setattr(resources, "WORD_SECONDS", 0.2)
    monkeypatch.setattr(resources, "POLL_SECONDS", 0.1)
    require_resources({"CPU": (64.0, "a.threads=64")}, "actor")
    time.sleep(1.0)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) >= 2
    assert "waiting for the cluster to grow, 0 s elapsed: a.threads=64 needs 64 CPUs per actor" in lines[0]


def test_a_cluster_whose_nodes_have_types_can_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Ray's own autoscaler reports them, of the first version."""
    for kinds, grows in (
        ({"ray.head.default": 1}, True),
        ({"headgroup": 1, "small": 0}, True),
        ({"node_0af3": 1}, False),
    ):
        content = json.dumps({"autoscaler_report": {"active_nodes": kinds, "idle_nodes": None}})
        monkeypatch.setattr(resources, "_internal_kv_get", lambda key, content=content: content.encode())
        assert can_grow() == grows
