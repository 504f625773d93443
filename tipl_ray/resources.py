"""What work needs of a Ray cluster compared with what there is: refused, or waited for with a message, never silently.

Knows nothing of the work. Ray is initialised by the caller.
"""

import json
import math
import os
import re
import threading
import time
from collections.abc import Mapping

import ray
from ray._private import ray_constants
from ray.autoscaler.v2.sdk import get_cluster_status
from ray.experimental.internal_kv import _internal_kv_get

from tipl_ray.terminal import duration, say

GRACE_SECONDS = 10.0
"""For nodes that are just joining a cluster that is not this process' own."""
WORD_SECONDS = 60.0
"""Between two lines on what is waited for."""
POLL_SECONDS = 1.0
WAY_OUT = "ask for less, or run on a larger cluster"

Needs = Mapping[str, tuple[float, str]]
"""Ray's name of a resource -> how much of it, and the field and value that ask for it."""


def require_resources(needs: Needs, per: str, count: int = 1, counted: str = "") -> None:
    """Refuse work whose resources cannot come: `count` shares of these, each on one node, held at the same time.

    `per` is what takes a share, such as `actor`; `counted` is the field that asks for so many. Where an autoscaler may
    add nodes, returns, and a thread prints once a minute what is waited for. Raises ValueError.
    """
    needs = {name: need for name, need in needs.items() if need[0] > 0}
    deadline = time.monotonic() + (GRACE_SECONDS if "RAY_ADDRESS" in os.environ else 0.0)
    while (shortage := _shortage(needs, per, count, counted)) and not can_grow():
        if time.monotonic() >= deadline:
            raise ValueError(shortage)
        time.sleep(POLL_SECONDS)
    if shortage:
        threading.Thread(target=_wait, args=(needs, per, count, counted), daemon=True).start()


def can_grow() -> bool:
    """Whether an autoscaler may add nodes to the cluster.

    Where there is none, Ray's autoscaler only reports, and names the type of each node after the node itself.
    """
    if content := _internal_kv_get(ray_constants.DEBUG_AUTOSCALING_STATUS):
        report = json.loads(content).get("autoscaler_report") or {}
        kinds = [*(report.get("active_nodes") or ()), *(report.get("idle_nodes") or ())]
    else:  # the second version of the autoscaler, which leaves that to the nodes' own names
        status = get_cluster_status(ray.get_runtime_context().gcs_address)
        kinds = [node.ray_node_type_name for node in (*status.active_nodes, *status.idle_nodes)]
    return any(not re.fullmatch("node_[0-9a-f]+", kind) for kind in kinds)


def _wait(needs: Needs, per: str, count: int, counted: str) -> None:
    """Print once a minute what is waited for."""
    begin = spoken = time.monotonic()
    while ray.is_initialized() and (shortage := _shortage(needs, per, count, counted)):
        now = time.monotonic()
        if now - spoken >= WORD_SECONDS:
            spoken = now
            say(f"waiting for the cluster to grow, {duration(now - begin)} elapsed: {shortage}")
        time.sleep(POLL_SECONDS)


def _shortage(needs: Needs, per: str, count: int, counted: str) -> str | None:
    """What the cluster has too little of, even when it is idle; None where it has enough."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for name, (amount, field) in needs.items():
        most = max((node.get(name, 0.0) for node in nodes), default=0.0)
        if most < amount:
            has = "one" if amount == 1 and not most else f"as many: {_number(most)} at most"
            return f"{field} needs {_amount(amount, name)} per {per}, but no node of the cluster has {has}; {WAY_OUT}"
    room = sum(min(math.floor(node.get(name, 0.0) / need[0] + 1e-9) for name, need in needs.items()) for node in nodes)
    if room >= count:
        return None
    share = " and ".join(_amount(amount, name) for name, (amount, _) in needs.items())
    total = " and ".join(_amount(sum(node.get(name, 0.0) for node in nodes), name) for name in needs)
    return (
        f"{counted} needs {share} for each {per} at the same time, but the cluster, with {total} on {len(nodes)} "
        f"node{'s' if len(nodes) > 1 else ''}, has room for {room}; {WAY_OUT}"
    )


def _amount(amount: float, name: str) -> str:
    if amount == 1:
        return f"a {name}"
    return f"{_number(amount)} {name}{'s' if amount > 1 or not amount else ''}"


def _number(amount: float) -> str:
    return f"{amount:g}"
