"""Chaos: collections that are killed with SIGKILL again and again, and what becomes of their data.

    python benchmarks/chaos.py [--kills 48] [--ray-kills 6] [--seed 0] [--storage folder s3]

Five kinds of kill. `publication point`: a process that collects two trials without Ray kills itself right before the
n-th of the calls by which files are published or deleted (locally fsync, replace, link, unlink; on S3 each request),
for n = 1, 2, 3, ... `moment`: the same process is killed from outside, at a random moment. `actor`, `driver`, `node`:
on a Ray cluster of two worker nodes, while a driver collects four trials, the process of an actor, the driver itself,
or a node's raylet is killed at a random moment. After each kill the same command is started again, as a user would.
Whenever a data set is complete, its digest has to be that of a run that nothing disturbed, and a new one is begun.

Repeated work is counted where it is done: every iteration that any process begins, less those that the data sets
needed. One commit interval of every trial is the most that a kill may cost.
"""

import contextlib
import dataclasses
import io
import itertools
import json
import logging
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

from command import keep, make_parser, results_folder  # noqa: E402
from machine import new_root, own_processes, s3_server  # noqa: E402

from tipl_ray.config import Experiment  # noqa: E402
from tipl_ray.data.storage import Storage, join  # noqa: E402
from tipl_ray.data.trajectory_store import TrajectoryStore  # noqa: E402
from tipl_ray.experiments import load_experiment  # noqa: E402
from tipl_ray.terminal import say_rows  # noqa: E402

SMOKE = ROOT / "jobs" / "experiments" / "smoke.toml"
BOOKS = "CHAOS_BOOKS"
"""Environment variable: the folder of the files `begun`, `swept` and `points`."""
PATIENCE_SECONDS = 300.0
"""Without a new commit for so long, a collection under Ray is stuck."""

PRELOADED = ["tipl_ray.collect.collection", "botocore.client"]

context = multiprocessing.get_context("forkserver")
"""Each process is forked from one that has imported everything, and dies alone."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Kill:
    """One SIGKILL."""

    kind: str
    point: str
    """The call that did not happen any more; empty where the moment was random."""
    seconds: float
    """From the start of what was killed, or from the kill before."""


@dataclasses.dataclass(kw_only=True, slots=True)
class Tally:
    """What kills of one sort did to the collections on one storage."""

    kills: list[Kill] = dataclasses.field(default_factory=list)
    data_sets: int = 0
    """Data sets completed; every one with the undisturbed digest, or this script ends."""
    orphans: int = 0
    """Files that no commit record named, found when the data sets were complete."""
    iterations_needed: int = 0
    iterations_begun: int = 0
    most_repeated: int = 0
    """Iterations that so many kills may cost: a commit interval of every trial each."""
    seconds: float = 0.0


def experiment_at(storage: str, *, num_trials: int, num_iterations: int) -> Experiment:
    """Short trials, with a commit every few iterations."""
    smoke = load_experiment(SMOKE)
    collect = dataclasses.replace(
        smoke.collect, num_trials=num_trials, total_env_steps=num_iterations * smoke.ppo.num_steps
    )
    return dataclasses.replace(smoke, collect=collect).at(storage)


def keep_books() -> None:
    """In a process that collects, Ray's workers among them: one byte per iteration begun, and per file swept."""
    from tipl_ray.ppo.trials import TrialGroup

    begun, swept = (os.open(Path(os.environ[BOOKS], name), os.O_WRONLY | os.O_APPEND) for name in ("begun", "swept"))
    collect_rollouts, sweep = TrialGroup._collect_rollouts, TrajectoryStore.sweep

    def counted(self: TrialGroup) -> Any:
        os.write(begun, bytes(len(self)))
        return collect_rollouts(self)

    def counted_sweep(self: TrajectoryStore, *arguments: Any) -> Any:
        garbage = sweep(self, *arguments)
        os.write(swept, bytes(len(garbage)))
        return garbage

    TrialGroup._collect_rollouts = counted  # type: ignore[method-assign]
    TrajectoryStore.sweep = counted_sweep  # type: ignore[assignment, method-assign]


def die_before(number: int, storage: str) -> None:
    """Kill this process right before the n-th call that publishes or deletes; write down which it was."""
    from publications import before_publications

    calls = itertools.count(1)

    def reach(call: str, path: str) -> None:
        if next(calls) == number:
            Path(os.environ[BOOKS], "points").write_text(f"{call} {kind_of(path)}")
            os.kill(os.getpid(), signal.SIGKILL)

    before_publications(storage, reach)


def kind_of(path: str) -> str:
    """What a file of the store is.

    >>> kind_of("/data/commits/trial=1/commit-12.json"), kind_of("/data/commits/.tmp-0123"), kind_of("trial=1")
    ('commit', 'temporary', 'folder')
    """
    name = path.rstrip("/").rpartition("/")[2]
    kinds = {".tmp-": "temporary", "part-": "part", "state-": "state", "commit-": "commit", "_SUCCESS": "_SUCCESS"}
    return next((kind for start, kind in kinds.items() if name.startswith(start)), "folder")


def collect_alone(experiment: Experiment, die_at: int) -> None:
    """Collect all trials as one group, without Ray, and seal the data set."""
    from tipl_ray.collect.group import GroupCollector
    from tipl_ray.ppo.engines import choose_engine

    keep_books()
    if die_at:
        die_before(die_at, experiment.storage_path)
    seeds, store = experiment.collect.seeds, TrajectoryStore(experiment.storage_path)
    GroupCollector(experiment, choose_engine("auto", experiment.ppo), seeds).advance(seconds=float("inf"))
    store.finish(seeds, experiment.num_snapshots)


def collect_on_ray(experiment: Experiment, address: str) -> None:
    """A driver: collect on the cluster at this address."""
    import ray

    from tipl_ray.collect.collection import collect

    keep_books()
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")])
    environment = {
        "env_vars": {"PYTHONPATH": paths, BOOKS: os.environ[BOOKS]},
        "worker_process_setup_hook": "chaos.keep_books",
    }
    ray.init(address=address, runtime_env=environment, log_to_driver=False, logging_level=logging.ERROR)
    collect(experiment)


def start(function: Callable[..., object], *arguments: Any) -> Any:
    """Run a function in a process forked from one that has imported all it needs, with this one's environment."""
    process = context.Process(target=with_environment, args=(dict(os.environ), function, *arguments))
    process.start()
    return process


def with_environment(environment: dict[str, str], function: Callable[..., object], *arguments: Any) -> None:
    """What `start` starts."""
    os.environ.clear()
    os.environ |= environment
    with contextlib.redirect_stdout(io.StringIO()):  # one line per commit
        function(*arguments)


class Place:
    """Data sets on one storage, one after the other, and the books that are kept of them."""

    def __init__(self, new_storage: Callable[[], str], books: Path, *, num_trials: int, num_iterations: int) -> None:
        self._new_storage, self._books = new_storage, books
        self._shape = {"num_trials": num_trials, "num_iterations": num_iterations}
        os.environ[BOOKS] = str(books)
        self._clear_books()
        with tempfile.TemporaryDirectory() as folder:
            self.experiment = experiment_at(folder, **self._shape)
            start(os.getpid).join()  # the process that the others are forked from
            begin = time.monotonic()
            run_alone(self.experiment)
            self.undisturbed_seconds = time.monotonic() - begin
            self._digest = self._sealed_digest()
        self._clear_books()
        self.tally = Tally()
        self.experiment = experiment_at(new_storage(), **self._shape)

    def killed(self, kind: str, seconds: float) -> None:
        """Book a kill."""
        points = self._books / "points"
        self.tally.kills.append(Kill(kind=kind, point=points.read_text(), seconds=round(seconds, 3)))
        points.write_text("")

    def completed(self) -> None:
        """The data set is sealed: compare it, and begin another."""
        if (digest := self._sealed_digest()) != self._digest:
            raise SystemExit(f"{self.experiment.storage_path}: digest {digest} is not the undisturbed {self._digest}")
        tally = self.tally
        tally.data_sets += 1
        tally.iterations_needed += self._shape["num_trials"] * self._shape["num_iterations"]
        tally.iterations_begun = (self._books / "begun").stat().st_size
        tally.orphans = (self._books / "swept").stat().st_size
        interval = self._shape["num_trials"] * self.experiment.collect.iterations_per_commit
        tally.most_repeated = len(tally.kills) * interval
        if tally.iterations_begun - tally.iterations_needed > tally.most_repeated:
            raise SystemExit(
                f"{self.experiment.storage_path}: {tally.iterations_begun} iterations were begun for the "
                f"{tally.iterations_needed} needed; {len(tally.kills)} kills may cost {interval} each"
            )
        self.experiment = experiment_at(self._new_storage(), **self._shape)

    def num_commits(self) -> int:
        """Commits that are there, by their names."""
        storage = Storage(self.experiment.storage_path)
        folders = [f"commits/trial={seed}" for seed in self.experiment.collect.seeds]
        return sum(name.startswith("commit-") for folder in folders for name in storage.entries(folder))

    def _sealed_digest(self) -> str:
        store = TrajectoryStore(self.experiment.storage_path)
        if not store.finished():
            raise SystemExit(f"{self.experiment.storage_path}: is not sealed")
        store.verify_all(self.experiment.collect.seeds, self.experiment.num_snapshots)
        return store.digest()

    def _clear_books(self) -> None:
        for name in ("begun", "swept", "points"):
            (self._books / name).write_bytes(b"")


def run_alone(experiment: Experiment, die_at: int = 0, kill_after: float | None = None) -> bool:
    """Collect without Ray, killed at a point or after so many seconds; whether it was killed."""
    process = start(collect_alone, experiment, die_at)
    process.join(kill_after)
    process.kill()
    process.join()
    if process.exitcode not in (0, -signal.SIGKILL):
        raise SystemExit(f"{experiment.storage_path}: the collection ended with status {process.exitcode}")
    return process.exitcode != 0


def kill_alone(place: Place, num_kills: int, random: random.Random) -> None:
    """Two kills in three at the publication points in turn, one at a random moment."""
    begin, number = time.monotonic(), 0
    while len(place.tally.kills) < num_kills:
        at_point, started = len(place.tally.kills) % 3 < 2, time.monotonic()
        number += at_point
        moment = None if at_point else random.uniform(0, 0.5) * place.undisturbed_seconds
        if run_alone(place.experiment, number if at_point else 0, moment):
            place.killed("publication point" if at_point else "moment", time.monotonic() - started)
        else:
            place.completed()
    run_alone(place.experiment)
    place.completed()
    place.tally.seconds = time.monotonic() - begin


def kill_under_ray(place: Place, num_kills: int, random: random.Random) -> None:
    """Actors, drivers and nodes in turn, so many of each, each some time after a new commit."""
    kinds, begin = ["actor", "driver", "node"] * num_kills, time.monotonic()
    with ray_cluster() as cluster:
        nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
        driver = start(collect_on_ray, place.experiment, cluster.address)
        while driver.is_alive() or kinds:
            since = time.monotonic()
            wait_for_commit(place, driver)
            driver.join(random.uniform(0, 0.5))
            if not driver.is_alive():
                if driver.exitcode:
                    raise SystemExit(f"{place.experiment.storage_path}: the driver ended with {driver.exitcode}")
                place.completed()
                if kinds:
                    driver = start(collect_on_ray, place.experiment, cluster.address)
            elif kinds and kinds[0] == "actor":
                if actors := own_processes("ray::GroupCollector"):
                    os.kill(random.choice(actors), signal.SIGKILL)
                    place.killed(kinds.pop(0), time.monotonic() - since)
            elif kinds and kinds[0] == "driver":
                driver.kill()
                driver.join()
                place.killed(kinds.pop(0), time.monotonic() - since)
                driver = start(collect_on_ray, place.experiment, cluster.address)
            elif kinds:
                cluster.remove_node(nodes.pop(0), allow_graceful=False)
                place.killed(kinds.pop(0), time.monotonic() - since)
                nodes.append(cluster.add_node(num_cpus=1))
    place.tally.seconds = time.monotonic() - begin


def wait_for_commit(place: Place, driver: Any) -> None:
    """Until there is a new commit, or the driver has ended."""
    commits, since = place.num_commits(), time.monotonic()
    while driver.is_alive() and place.num_commits() == commits:
        if time.monotonic() - since > PATIENCE_SECONDS:
            raise SystemExit(f"{place.experiment.storage_path}: no new commit in {PATIENCE_SECONDS} s")
        time.sleep(0.1)


@contextlib.contextmanager
def ray_cluster() -> Iterator[Any]:
    """A head without CPUs, for nodes to join."""
    os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        yield cluster
    finally:
        cluster.shutdown()


def row(where: str, collection: str, tally: Tally) -> dict[str, Any]:
    """What is written of one sort of kills on one storage."""
    return {
        "storage": where,
        "collection": collection,
        "kills": dict(Counter(kill.kind for kill in tally.kills)),
        "points": dict(Counter(kill.point for kill in tally.kills if kill.point)),
        "data_sets_equal_to_the_undisturbed": tally.data_sets,
        "orphan_files": tally.orphans,
        "iterations_needed": tally.iterations_needed,
        "iterations_repeated": tally.iterations_begun - tally.iterations_needed,
        "iterations_that_may_be_repeated": tally.most_repeated,
        "seconds": round(tally.seconds, 1),
    }


def main() -> None:
    """Kill, compare, print the table, write benchmarks/results/chaos.json."""
    parser = make_parser(__doc__)
    parser.add_argument("--kills", type=int, default=48, help="kills of a collection without Ray, on each storage")
    parser.add_argument("--ray-kills", type=int, default=6, help="kills of actors, of drivers and of nodes; 0: no Ray")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random moments")
    parser.add_argument(
        "--storage",
        nargs="+",
        default=["folder", "s3"],
        help="where to collect: `folder`, a temporary one; `s3`, a bucket of moto's server, started on the loopback "
        "address; or a folder or an s3:// URI of yours, in which new data sets are left behind",
    )
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.kills, arguments.ray_kills, arguments.storage = 4, 0, ["folder"]
    results = results_folder(arguments.quick) / "chaos.json"
    context.set_forkserver_preload(PRELOADED)
    for where in arguments.storage:
        with contextlib.ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            server = stack.enter_context(s3_server()) if where == "s3" else ""

            def new_storage(where: str = where, folder: Path = folder, server: str = server) -> str:
                if server:
                    return new_root(f"http://{server}")
                name = uuid.uuid4().hex
                return str(folder / name) if where == "folder" else join(where, name)

            if arguments.kills:
                place = Place(new_storage, folder, num_trials=2, num_iterations=60)
                kill_alone(place, arguments.kills, random.Random(arguments.seed))
                put_in(row(where, "one process", place.tally), results)
            if arguments.ray_kills:
                place = Place(new_storage, folder, num_trials=4, num_iterations=240)
                kill_under_ray(place, arguments.ray_kills, random.Random(arguments.seed))
                put_in(row(where, "Ray, two nodes", place.tally), results)


def put_in(new: dict[str, Any], results: Path) -> None:
    """Print a row and put it into the results, in the place of an older one of the same sort."""
    say_rows([{"": key, "found": str(value)} for key, value in new.items()])
    rows = json.loads(results.read_text()) if results.exists() else []
    same = [(old["storage"], old["collection"]) == (new["storage"], new["collection"]) for old in rows]
    rows = [old for old, replaced in zip(rows, same, strict=True) if not replaced]
    keep(results, [*rows, new])


if __name__ == "__main__":
    main()
