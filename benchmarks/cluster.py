"""How long collections take on a cluster, calculated from what is measured here, and where the first bottleneck is.

Measured here, with both cores at the same work, since cores share caches and memory: an actor's rate by the number of
trials that it stacks, and the time of a commit. Then the driver's time per message and per look at the whole while it
drives up to 10,000 groups, and the time per trial to find out what is committed, to verify it and to seal the data set,
by CPU time. Real collections on one and two actors check the calculation. Calculated: 50 trials on 1, 2, 64 and 512
cores, and 10,000 trials on 512. All of it wants a machine that does nothing else.

    python benchmarks/cluster.py [--parts driver "InvertedPendulum-v4 8-8" "HalfCheetah-v4 256-256" calculation]
"""

import contextlib
import dataclasses
import itertools
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import ray

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from command import keep, make_parser, results_folder  # noqa: E402
from machine import own_processes  # noqa: E402

from tipl_ray.collect import crew  # noqa: E402
from tipl_ray.collect.collection import collect, pending_seeds  # noqa: E402
from tipl_ray.collect.crew import MESSAGES_PER_SECOND, SLICE_SECONDS, Crew, drive  # noqa: E402
from tipl_ray.collect.group import GroupCollector, trial_header  # noqa: E402
from tipl_ray.collect.placement import GroupProgress, Placement  # noqa: E402
from tipl_ray.config import Collect, Experiment, Where  # noqa: E402
from tipl_ray.data.snapshots import Snapshot  # noqa: E402
from tipl_ray.data.trajectory_store import TrajectoryStore  # noqa: E402
from tipl_ray.data.trial_writer import TrialWriter  # noqa: E402
from tipl_ray.ppo.engines import choose_engine  # noqa: E402

SAMPLE_SECONDS = 0.1
"""Between two looks at how far a real collection is, and of each of its slices of work."""
START_SECONDS = 5.0
"""From asking for an actor on a running node to its first iteration."""
PUTS_PER_COMMIT = 3
"""Part, state, record; an object store's requests that it may limit."""
PENDULUM = Collect()
CHEETAH = Collect(task="HalfCheetah-v4", total_env_steps=2_000_000, policy_hidden=(256, 256))
SIZES: dict[str, tuple[Collect, tuple[int, ...]]] = {
    "InvertedPendulum-v4 8-8": (PENDULUM, (1, 2, 12, 24)),
    "HalfCheetah-v4 256-256": (CHEETAH, (1, 2, 5, 10)),
}
"""Task -> its trials, and the stacks of them that are measured; real actors run the last two, one and two of them."""


@dataclasses.dataclass(frozen=True, slots=True)
class Costs:
    """What one task's trials cost an actor."""

    rates: dict[int, float]
    """Trials of an actor -> env steps per second, commits left out."""
    commit_seconds: float
    """Of one trial's commit."""
    verify_seconds: float = 0.0
    """Of one trial's parts, read back at its end."""

    def rate(self, collect: Collect, size: int) -> float:
        """Env steps per second of an actor of so many trials, commits included."""
        known = sorted(self.rates)
        alone = float(np.interp(size, known, [self.rates[k] for k in known]))
        return 1 / (1 / alone + self.commit_seconds / (collect.iterations_per_commit * 2048))


def experiment_of(collect: Collect, storage: str, **fields: Any) -> Experiment:
    """Trials of a task in a storage."""
    return Experiment(name="cluster", where=Where(storage=storage), collect=dataclasses.replace(collect, **fields))


def measure_group(collect: Collect, size: int, folder: str) -> tuple[float, float]:
    """(env steps per second without commits, seconds of a trial's commit), means of two actors that work at once."""
    measure = ray.remote(num_cpus=1)(run_group)
    found = ray.get([measure.remote(collect, size, f"{folder}-{actor}") for actor in range(2)])
    rate, commit = (statistics.mean(values) for values in zip(*found, strict=True))
    return rate, commit


def run_group(collect: Collect, size: int, storage: str) -> tuple[float, float]:
    """What `measure_group` measures, of one actor."""
    # The larger weights are, the more of a commit's time is in proportion to its snapshots: there, fewer will do.
    iterations = collect.iterations_per_commit if collect == PENDULUM else collect.iterations_per_commit // 2
    experiment = experiment_of(collect, storage, num_trials=size, iterations_per_commit=iterations + 1)
    collector = GroupCollector(experiment, choose_engine("auto", experiment.ppo), experiment.collect.seeds)
    clock = [time.monotonic()]
    for _ in range(iterations):
        collector._run_iteration()
        clock.append(time.monotonic())
    group = collector._group
    assert group is not None
    for seed, writer in collector._writers.items():
        writer.commit(group.state(seed))
    commit = (time.monotonic() - clock[-1]) / size * collect.iterations_per_commit / iterations
    usual = statistics.median(end - begin for begin, end in itertools.pairwise(clock[1:]))
    return size * experiment.ppo.num_steps / usual, commit


def measure_collection(collect_config: Collect, size: int, actors: int, storage: str) -> tuple[float, float]:
    """Env steps per second of CPU time and by the clock, of a real collection once all its actors run."""
    experiment = experiment_of(collect_config, storage, num_trials=size * actors)
    experiment = dataclasses.replace(experiment, where=Where(storage=storage, trials_per_actor=size))
    first_seen: dict[int, tuple[float, float]] = {}

    def sample(groups: list[GroupProgress]) -> None:
        if all(group.env_steps for group in groups):
            cpu = sum(map(cpu_seconds, own_processes("ray::GroupCollector")))
            # An actor tells of its steps every few seconds: they stand for the moment at which they were told.
            first_seen.setdefault(sum(group.env_steps for group in groups), (cpu, time.monotonic()))

    begin = time.monotonic()
    with mock.patch.multiple(crew, LOOK_SECONDS=SAMPLE_SECONDS, SLICE_SECONDS=SAMPLE_SECONDS):
        collect(experiment, sample)
    samples = [(steps, *clocks) for steps, clocks in sorted(first_seen.items())]
    # Without the end, where one actor may be done before the other; a shrunk one may be over before the second look.
    first, *others = samples if len(samples) > 1 else [(0, 0.0, begin), *samples]
    last = [one for one in others if one[0] < 0.95 * samples[-1][0]][-1:] or others[-1:]
    steps, cpu, clock = (b - a for a, b in zip(first, last[0], strict=True))
    return steps / cpu, steps / clock


def cpu_seconds(process: int) -> float:
    """CPU time of a process so far."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class SimulatedCrew(Crew):
    """A crew whose actors are stand-ins: every message is a real Ray call, and none takes time to compute."""

    def __init__(self, experiment: Experiment, slices: int):
        """Groups end after so many slices of work, and commit after every second."""
        super().__init__(experiment, "torch")

        class Answers:
            """Stands for all the actors, here so that Ray sends it whole: answers with what it is handed."""

            def answer(self, value: Any) -> Any:
                return value

        self._pool: Any = ray.remote(num_cpus=0)(Answers).remote()
        self.slices = slices
        self.messages = self.commits = 0
        self.looks: list[float] = []

    def look(self, placement: Placement) -> None:
        """See to the whole, by the clock of this process' CPU time."""
        begin = time.process_time()
        super().look(placement)
        self.looks.append(time.process_time() - begin)

    def call(self, progress: GroupProgress) -> ray.ObjectRef:
        """One message: how far a group is, and whether it has committed all that it ran."""
        self.messages += 1
        self.commits += bool(progress.env_steps) and not progress.uncommitted_env_steps
        return self._pool.answer.remote(progress)

    def _open(self, seat: int) -> tuple[Any, ray.ObjectRef]:
        self.messages += 1
        return _StandIn(self), self._pool.answer.remote("node")

    def _end(self, seat: int) -> None:
        del self._actors[seat]
        self._calls.pop(self._last_calls.pop(seat), None)


class _StandIn:
    """Looks to the crew like an actor's handle; its group gets one slice further with every call."""

    def __init__(self, crew: SimulatedCrew):
        self._crew, self._done = crew, 0
        self._seeds: tuple[int, ...] = ()
        self.start, self.advance = self, self

    def remote(self, work: Sequence[int] | float, to_commit: bool = False) -> ray.ObjectRef:
        if isinstance(work, float):
            self._done = min(self._done + 1, self._crew.slices)
        else:
            self._seeds, self._done = tuple(work), 0
        at_commit = to_commit or self._done % 2 == 0 or self._done == self._crew.slices
        return self._crew.call(
            GroupProgress(
                seeds=self._seeds,
                env_steps=self._done * len(self._seeds),
                total_env_steps=self._crew.slices * len(self._seeds),
                uncommitted_env_steps=0 if at_commit else len(self._seeds),
            )
        )


def measure_driver(num_groups: int, slices: int) -> tuple[SimulatedCrew, float, float]:
    """(the crew, CPU seconds of the driver per message and per look), over the whole life of the groups."""
    groups = [
        GroupProgress(seeds=(2 * n, 2 * n + 1), env_steps=0, total_env_steps=2 * slices) for n in range(num_groups)
    ]
    crew = SimulatedCrew(experiment_of(PENDULUM, "/nowhere"), slices)
    placement = Placement(groups, divisible=False, seats_ahead=num_groups)
    begin = time.process_time()
    drive(placement, crew, lambda groups: None)
    busy = time.process_time() - begin - sum(crew.looks)
    return crew, busy / crew.messages, statistics.median(crew.looks)


def measure_store(collect: Collect, storage: str, num_trials: int, num_commits: int) -> tuple[float, float, float]:
    """CPU seconds for each trial on a local disk: to find out what is committed, to verify it, to seal all."""
    experiment = experiment_of(collect, storage, num_trials=num_trials)
    store, header = TrajectoryStore(storage), trial_header(experiment, "torch")
    weights = np.random.default_rng(0).standard_normal(header.num_weights, dtype=np.float32)
    template = Snapshot(
        seed=0,
        snapshot=0,
        iteration=0,
        epoch=0,
        env_step=0,
        learning_rate=1e-3,
        episodic_return=None,
        weights=weights,
        observation_mean=np.zeros(4),
        observation_variance=np.ones(4),
        observation_count=1.0,
    )
    per_commit = collect.iterations_per_commit * experiment.ppo.num_epochs // collect.epochs_per_snapshot
    for seed in experiment.collect.seeds:
        writer = TrialWriter(store, seed, header)
        for number in range(num_commits * per_commit):
            moved = weights + np.float32(1e-3 * number)
            writer.append(dataclasses.replace(template, seed=seed, snapshot=number, weights=moved))
            if (number + 1) % per_commit == 0:
                writer.commit({"x": np.zeros(1)})
    seeds, clock = experiment.collect.seeds, [time.process_time()]
    assert len(pending_seeds(experiment, store)) == num_trials
    clock.append(time.process_time())
    for seed in seeds:
        store.verify(seed, num_commits * per_commit)
    clock.append(time.process_time())
    store.finish(seeds, num_commits * per_commit, verified=set(seeds))
    clock.append(time.process_time())
    found, verified, sealed = ((b - a) / num_trials for a, b in itertools.pairwise(clock))
    return found, verified, sealed


def calculate(collect: Collect, num_trials: int, cores: int, costs: Costs) -> tuple[float, int, int]:
    """(seconds, actors, trials of the largest) of a collection on a cluster with cores as fast as these."""
    actors = min(cores, num_trials // 2)
    size = math.ceil(num_trials / actors)
    env_steps = experiment_of(collect, "/nowhere").env_steps_per_trial
    return START_SECONDS + size * (env_steps / costs.rate(collect, size) + costs.verify_seconds), actors, size


class Results:
    """A file of values by subject and metric, kept, so that parts can be measured again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        rows = json.loads(self.path.read_text()) if self.path.exists() else []
        self.rows = {(row["subject"], row["metric"]): row for row in rows}

    def note(self, subject: str, metric: str, value: float, unit: str) -> None:
        """Say a value and keep it."""
        row = {"subject": subject, "metric": metric, "value": float(f"{value:.4g}"), "unit": unit}
        self.rows[subject, metric] = row
        keep(self.path, list(self.rows.values()))
        print(*row.values(), flush=True)

    def __getitem__(self, subject_and_metric: tuple[str, str]) -> float:
        return self.rows[subject_and_metric]["value"]


def measure_task(
    results: Results, task: str, config: Collect, sizes: Sequence[int], iterations: int, folder: str
) -> None:
    """What an actor's work and the store's cost, and real collections to check the calculation with."""
    numbers = itertools.count()
    measured = [measure_group(config, size, f"{folder}/{next(numbers)}") for size in sizes]
    costs = Costs(
        {size: rate for size, (rate, _) in zip(sizes, measured, strict=True)},
        statistics.median(commit for _, commit in measured),
    )
    for size, rate in costs.rates.items():
        results.note(f"{task}, an actor of {size}", "without commits", rate, "env steps/s")
    results.note(task, "a trial's commit", 1e3 * costs.commit_seconds, "ms")
    short = dataclasses.replace(config, total_env_steps=iterations * 2048)
    for actors, size in ((1, sizes[-1]), (2, sizes[-2])):
        cpu, clock = measure_collection(short, size, actors, f"{folder}/{next(numbers)}")
        subject, calculated = f"{task}, a collection on {actors}", costs.rate(config, size)
        results.note(subject, "rate", clock, "env steps/s")
        results.note(subject, "calculated over measured", calculated * actors / clock, "")
        results.note(subject, "cores busy", clock / cpu, "")
    commits = math.ceil(experiment_of(config, "/nowhere").num_iterations / config.iterations_per_commit)
    trials, few = (10, commits) if config == PENDULUM else (1, 4)
    seconds = measure_store(config, f"{folder}/{next(numbers)}", trials, few)
    for metric, value in zip(("to find", "to verify", "to seal"), seconds, strict=True):
        results.note(task, f"a trial {metric}", 1e3 * value * commits / few, "ms")


def calculate_task(results: Results, task: str, config: Collect, sizes: Sequence[int]) -> None:
    """Collections on clusters whose cores are as fast as this machine's when all of them work."""
    rates = {size: results[f"{task}, an actor of {size}", "without commits"] for size in sizes}
    costs = Costs(rates, results[task, "a trial's commit"] / 1e3, results[task, "a trial to verify"] / 1e3)
    message = results["driver of 10,000 groups", "a message"] / 1e6
    look = results["driver of 10,000 groups", "a look at the whole"] / 1e3
    at_ends = (results[task, "a trial to find"] + results[task, "a trial to seal"]) / 1e3
    for trials, cores in ((50, 1), (50, 2), (50, 64), (50, 512), (10_000, 512)):
        seconds, actors, size = calculate(config, trials, cores, costs)
        subject = f"{task}, {trials:,} trials on {cores} cores"
        results.note(subject, "actors", actors, "")
        results.note(subject, "time", seconds / 60, "min")
        results.note(subject, "core-hours", seconds * actors / 3600, "h")
        messages = min(actors / SLICE_SECONDS, MESSAGES_PER_SECOND)
        results.note(subject, "driver's share for messages and looks", messages * message + look, "")
        all_commits = actors * costs.rate(config, size) / (config.iterations_per_commit * 2048)
        results.note(subject, "puts into the storage", PUTS_PER_COMMIT * all_commits, "1/s")
        results.note(subject, "driver's start and end", trials * at_ends / 60, "min")


def main() -> None:
    """Measure, check, calculate; everything goes to benchmarks/results/cluster.json at once."""
    parser = make_parser(__doc__)
    parser.add_argument("--parts", nargs="+", default=["driver", *SIZES, "calculation"], help="what to do (again)")
    parser.add_argument("--iterations", type=int, default=40, help="of the pendulum's real collections; half else")
    arguments = parser.parse_args()
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    results, sizes = Results(results_folder(arguments.quick) / "cluster.json"), SIZES
    if arguments.quick:
        sizes, arguments.iterations = {"InvertedPendulum-v4 8-8": (PENDULUM, (1, 2))}, 8
    if arguments.parts != ["calculation"]:
        ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    if "driver" in arguments.parts:
        for num_groups in (100, 10_000):
            with contextlib.redirect_stdout(None):  # a line for each event of each group
                _, message, look = measure_driver(10 if arguments.quick else num_groups, slices=2)
            results.note(f"driver of {num_groups:,} groups", "a message", 1e6 * message, "µs")
            results.note(f"driver of {num_groups:,} groups", "a look at the whole", 1e3 * look, "ms")
    for task, (config, stacks) in sizes.items():
        if task in arguments.parts:
            with tempfile.TemporaryDirectory() as folder:
                iterations = arguments.iterations if config == PENDULUM else arguments.iterations // 2
                measure_task(results, task, config, stacks, iterations, folder)
        if "calculation" in arguments.parts:
            calculate_task(results, task, config, stacks)
    ray.shutdown()


if __name__ == "__main__":
    main()
