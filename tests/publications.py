"""Collectors that are killed, or wait to be, where a file is about to be published."""

import itertools
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import botocore.client
import ray

from tipl_ray.collect.group import GroupCollector
from tipl_ray.config import Experiment

FILE_CALLS = ("fsync", "replace", "link", "unlink")


def before_publications(storage: str, reach: Callable[[str, str], None]) -> None:
    """Have `reach(call, path)` called in this process before each call by which a file is published or deleted.

    In a folder these are `FILE_CALLS` on files of the storage, in a bucket all requests.
    """

    def watched(name: str) -> Callable[..., Any]:
        real = getattr(os, name)

        def call(*arguments: Any, **keywords: Any) -> Any:
            target = Path(f"/proc/self/fd/{arguments[0]}").readlink() if name == "fsync" else arguments[-1]
            if Path(target).is_relative_to(storage):
                reach(name, str(target))
            return real(*arguments, **keywords)

        return call

    for name in FILE_CALLS:
        setattr(os, name, watched(name))
    real_request = botocore.client.BaseClient._make_api_call

    def request(self: Any, operation: str, values: dict[str, Any]) -> Any:
        reach(operation, values.get("Key", ""))
        return real_request(self, operation, values)

    botocore.client.BaseClient._make_api_call = request


def dying_before(calls: tuple[int, ...], folder: Path) -> type[GroupCollector]:
    """Collectors of which one is killed before its n-th call that publishes or deletes, for each of these n."""
    tests = str(Path(__file__).parent)

    class Dying(GroupCollector):
        def __init__(self, experiment: Experiment, engine: str, *more: Any) -> None:
            sys.path.append(tests)
            from publications import before_publications

            numbers = itertools.count(1)

            def reach(call: str, path: str) -> None:
                if (number := next(numbers)) in calls and not (folder / str(number)).exists():
                    (folder / str(number)).write_text(f"{call} {path}")
                    os.kill(os.getpid(), signal.SIGKILL)

            before_publications(experiment.storage_path, reach)
            super().__init__(experiment, engine, *more)

    return Dying


def held_at(name: str, folder: Path) -> type[GroupCollector]:
    """Collectors that wait right before a file of this name appears, until there is a file `go` in the folder.

    Each leaves a file there that has its node's name.
    """
    tests = str(Path(__file__).parent)

    class Held(GroupCollector):
        def __init__(self, experiment: Experiment, engine: str, *more: Any) -> None:
            sys.path.append(tests)
            from publications import before_publications

            def reach(call: str, path: str) -> None:
                if call == "link" and path.endswith(f"/{name}"):
                    (folder / ray.get_runtime_context().get_node_id()).touch()
                    while not (folder / "go").exists():
                        time.sleep(0.05)

            before_publications(experiment.storage_path, reach)
            super().__init__(experiment, engine, *more)

    return Held
