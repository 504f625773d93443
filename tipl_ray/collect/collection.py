"""Collect: PPO trials on Ray actors, one group of trials each, streamed to the trajectory store.

`GroupCollector` runs a group and commits its trials, and works without Ray; `collect` sends groups out to actors and
calls each of them again and again for a slice of work. The store holds all that counts: where an actor dies, another
finds the last commits there and goes on, and so does a new driver.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
import ray
from ray.util.metrics import Counter, Gauge

from tipl_ray.collect.placement import LOSSES, GroupProgress, Order, Placement, split_into_groups
from tipl_ray.config import Experiment
from tipl_ray.data.trajectory_store import Divergence, Header, TrajectoryStore, TrialWriter
from tipl_ray.digest import as_table
from tipl_ray.errors import UserError
from tipl_ray.ppo.learner import ENGINES, choose_engine
from tipl_ray.ppo.trials import TrialGroup, network_shape
from tipl_ray.predict.saved import predictor_digest
from tipl_ray.resources import require_resources
from tipl_ray.terminal import log_event

SLICE_SECONDS = 2.0
"""Seconds of work per call of an actor: what passes between two progress messages."""
MESSAGES_PER_SECOND = 200
"""Progress messages that the driver is sent at most, by longer calls where there are many actors."""
LOOK_SECONDS = 1.0
"""Seconds between two looks at the whole: nodes that are to go, seats to open and to close, what the caller is told."""


class CollectionError(UserError):
    """No trial came out of a collection: says why, and the way out."""


def trial_header(experiment: Experiment, engine: str) -> Header:
    """What the bits of this experiment's trials depend on. Raises ValueError for an unknown task."""
    collect = as_table(experiment.collect)
    told = ("policy_hidden", "critic_hidden", "epochs_per_snapshot", "iterations_per_commit", "total_env_steps")
    config = {**{key: collect[key] for key in told}, "ppo": as_table(experiment.ppo), "engine": ENGINES[engine]}
    if experiment.jump.predictor:
        # What the predictor answers counts, not where it lies.
        config["jump"] = as_table(experiment.jump) | {"predictor": predictor_digest(experiment.jump.predictor)}
    return Header(
        task=experiment.collect.task,
        layout=network_shape(experiment.collect).policy_layout,
        config=config,
        versions={name: version(name) for name in ("mujoco", "gymnasium", "torch", "numpy")},
    )


def seat_resources(experiment: Experiment, engine: str) -> dict[str, int]:
    """What one actor takes of Ray's resources."""
    return {"CPU": experiment.where.physics_threads} | ({"GPU": 1} if engine == "cuda" else {})


def require_seat(experiment: Experiment, engine: str, per: str) -> None:
    """Refuse what the cluster can never have. Raises ValueError."""
    fields = {
        "CPU": f"physics_threads={experiment.where.physics_threads}",
        "GPU": f"collect.engine={engine!r}",
    }
    require_resources(
        {name: (amount, fields[name]) for name, amount in seat_resources(experiment, engine).items()}, per
    )


class GroupCollector:
    """One group of trials and their writers: goes on from the last commits, commits every few iterations."""

    def __init__(self, experiment: Experiment, engine: str, seeds: Sequence[int] = ()):
        self._experiment, self._engine = experiment, engine
        self._meters = _Meters(experiment.name)
        self.start(seeds)

    def start(self, seeds: Sequence[int]) -> GroupProgress:
        """Take over a group of trials where they were last committed, dropping what ran here before."""
        self._store = TrajectoryStore(self._experiment.storage_path)
        header = trial_header(self._experiment, self._engine)
        self._writers = {seed: TrialWriter(self._store, seed, header) for seed in seeds}
        self._divergences: dict[int, Divergence] = {}
        for seed, writer in self._writers.items():
            if writer.divergence:
                writer.record_divergence()
                self._divergences[seed] = writer.divergence
        self._iterations = {seed: one.iteration for seed, one in self._divergences.items()}
        self._returns: dict[int, float] = {}
        going_on = [seed for seed in seeds if seed not in self._divergences]
        states = [self._writers[seed].state for seed in going_on]
        self._group = TrialGroup(self._experiment, self._engine, going_on, states) if going_on else None
        if self._group:
            for snapshot in self._group.initial_snapshots():
                self._writers[snapshot.seed].append(snapshot)
            self._iterations |= {seed: int(k) for seed, k in zip(going_on, self._group.iterations_K, strict=True)}
        return self.advance(0.0)

    def advance(self, seconds: float, to_commit: bool = False) -> GroupProgress:
        """Run whole iterations for at least some seconds and, if asked, on to the next commit; at the end, verify all.

        Raises StoreError where a trial that was run to its end is not in the storage as it was committed.
        """
        begin, before = time.monotonic(), sum(self._iterations.values())
        num_steps = self._experiment.ppo.num_steps
        while self._group and not self._group.finished:
            if time.monotonic() - begin >= seconds and not (to_commit and self._uncommitted()):
                break
            self._run_iteration()
        if self._group and self._group.finished:
            for seed in self._writers:
                self._store.verify(seed, self._experiment.num_snapshots)
        done, returns = sum(self._iterations.values()), list(self._returns.values())
        rate = (done - before) * num_steps / max(time.monotonic() - begin, 1e-9)
        self._meters.ran((done - before) * num_steps, rate)
        # A trial that diverged has nothing left to run.
        spared = sum(self._experiment.num_iterations - one.iteration for one in self._divergences.values())
        return GroupProgress(
            seeds=tuple(self._writers),
            env_steps=(done + spared) * num_steps,
            total_env_steps=len(self._writers) * self._experiment.env_steps_per_trial,
            uncommitted_env_steps=self._uncommitted() * num_steps,
            env_steps_per_second=rate,
            mean_return=float(np.mean(returns)) if returns else math.nan,
            diverged={seed: one.iteration for seed, one in self._divergences.items()},
        )

    @property
    def jump_counts(self) -> list[int]:
        """Jumps taken, dropped by the gate, and refused, over the trials still running; empty without jumps."""
        jumps = self._group.jumps if self._group else None
        return jumps.counts_B3.sum(axis=0).tolist() if jumps else []

    def _run_iteration(self) -> None:
        group = self._group
        assert group is not None, "a group was started"
        for snapshot in group.run_iteration():
            self._writers[snapshot.seed].append(snapshot)
            self._iterations[snapshot.seed] = snapshot.iteration
            if snapshot.episodic_return is not None:
                self._returns[snapshot.seed] = snapshot.episodic_return
        for seed, (iteration, array) in group.diverged.items():
            if seed not in self._divergences:
                self._divergences[seed] = self._writers[seed].diverge(iteration, array)
                self._iterations[seed] = iteration
        begin = time.monotonic()
        due = [seed for seed in group.seeds if seed not in self._divergences and not self._since_commit(seed)]
        num_bytes = sum(self._writers[seed].commit(group.state(seed)).part_bytes for seed in due)
        if due:
            self._meters.committed(len(due), num_bytes)
            log_event(
                "commit",
                trials=name_trials(due),
                iteration=self._iterations[due[0]],
                bytes=num_bytes,
                seconds=round(time.monotonic() - begin, 3),
            )

    def _since_commit(self, seed: int) -> int:
        """Iterations of a trial that are not committed; where commits fall due is part of the data."""
        iteration = self._iterations[seed]
        at_end = iteration == self._experiment.num_iterations or seed in self._divergences
        return 0 if at_end else iteration % self._experiment.collect.iterations_per_commit

    def _uncommitted(self) -> int:
        return sum(map(self._since_commit, self._iterations))


class _Meters:
    """This process' share in Ray's metrics, which its dashboard and Prometheus read; nothing without Ray."""

    def __init__(self, experiment: str) -> None:
        self._tags = {"experiment": experiment}
        if ray.is_initialized():
            keys = tuple(self._tags)
            self._env_steps = Counter("tipl_env_steps", "Environment steps run", keys)
            self._commits = Counter("tipl_commits", "Commits of trials", keys)
            self._bytes = Counter("tipl_committed_bytes", "Bytes of the committed Parquet parts", keys)
            self._rate = Gauge("tipl_env_steps_per_second", "Of one actor, over its last slice of work", keys)

    def ran(self, env_steps: int, rate: float) -> None:
        if ray.is_initialized() and env_steps:
            self._env_steps.inc(env_steps, self._tags)
            self._rate.set(rate, self._tags)

    def committed(self, commits: int, num_bytes: int) -> None:
        if ray.is_initialized():
            self._commits.inc(commits, self._tags)
            self._bytes.inc(num_bytes, self._tags)


def pending_seeds(experiment: Experiment, store: TrajectoryStore) -> list[int]:
    """Seeds of the trials that are not committed to their end and have not diverged, the least advanced first."""
    progress = store.progress_of(experiment.collect.seeds, experiment.num_snapshots)
    return [p.seed for p in sorted(progress, key=lambda p: p.num_snapshots) if not p.ended]


def collect(
    experiment: Experiment, on_progress: Callable[[list[GroupProgress]], None] = lambda progress: None
) -> TrajectoryStore:
    """Collect every trial of the experiment that is not complete, on a connected Ray cluster, and seal the data set.

    Raises StoreError where the storage holds other data, ValueError for a task, an engine or resources that cannot be
    had, CollectionError where every trial diverged.
    """
    store = TrajectoryStore(experiment.storage_path)
    engine = choose_engine(experiment.collect.engine, experiment.ppo)
    header = trial_header(experiment, engine)
    store.check_header(header)
    seeds = pending_seeds(experiment, store)
    if seeds:
        require_seat(experiment, engine, "actor")
        _run(experiment, engine, seeds, on_progress)
    if not store.finished():
        _refuse_all_diverged(experiment, store)
        log_event("seal", trials=name_trials(experiment.collect.seeds))
        # Each group's actor has read back what it finished: one driver would take longer for that than the collection.
        store.finish(experiment.collect.seeds, experiment.num_snapshots, verified=set(seeds))
    return store


def _refuse_all_diverged(experiment: Experiment, store: TrajectoryStore) -> None:
    """Raise CollectionError where there is no trial to learn from."""
    diverged = store.divergences(experiment.collect.seeds)
    if len(diverged) == experiment.collect.num_trials:
        last = max(diverged.values(), key=lambda one: one.iteration)
        raise CollectionError(
            f"{experiment.storage_path}: all {len(diverged)} trials diverged, the last one after iteration "
            f"{last.iteration} ({last.array} not finite), so there is nothing to learn from; lower "
            f"ppo.learning_rate={experiment.ppo.learning_rate:g} and collect into another storage"
        )


def _run(
    experiment: Experiment, engine: str, seeds: list[int], on_progress: Callable[[list[GroupProgress]], None]
) -> None:
    """Run the trials on as many actors as the cluster has room for, while nodes and actors come and go."""
    trials_per_actor = experiment.where.trials_per_actor
    # What is free, not what there is: the cluster may be at other work too.
    free, needs = ray.available_resources(), seat_resources(experiment, engine)
    num_seats = min(int(free.get(name, 0) // amount) for name, amount in needs.items())
    groups = split_into_groups(seeds, trials_per_actor, max(1, num_seats))
    trial = GroupProgress(seeds=(0,), env_steps=0, total_env_steps=experiment.env_steps_per_trial)
    placement = Placement(
        [dataclasses.replace(trial, seeds=tuple(g), total_env_steps=len(g) * trial.total_env_steps) for g in groups],
        divisible=not trials_per_actor,
    )
    drive(placement, Crew(experiment, engine), on_progress)


def drive(placement: Placement, crew: "Crew", on_progress: Callable[[list[GroupProgress]], None]) -> None:
    """Bring a placement's trials to their end, and what its actors say to the placement."""
    try:
        while not placement.finished:
            if crew.looked_seconds_ago() >= LOOK_SECONDS:
                crew.look(placement)
                on_progress(placement.groups())
            for seat, order in placement.orders():
                crew.send(placement, seat, order)
            crew.listen(placement)
        on_progress(placement.groups())
    finally:
        crew.dismiss()


class Crew:
    """The actors on a placement's seats, each with at most one call under way."""

    def __init__(self, experiment: Experiment, engine: str) -> None:
        self._name = experiment.name
        self._arguments = (experiment, engine)
        # Not restarted by Ray: its group goes on wherever there is room, which need not be there.
        needs = seat_resources(experiment, engine)
        self._collector: Any = ray.remote(
            num_cpus=needs["CPU"], num_gpus=needs.get("GPU", 0), scheduling_strategy="SPREAD"
        )(GroupCollector)
        self._actors: dict[int, Any] = {}
        self._calls: dict[ray.ObjectRef, int] = {}
        """Calls under way -> their seats."""
        self._last_calls: dict[int, ray.ObjectRef] = {}
        self._looked = -math.inf

    def looked_seconds_ago(self) -> float:
        """How old the last look is; infinite before the first."""
        return time.monotonic() - self._looked

    def look(self, placement: Placement) -> None:
        """See which nodes are to go, and open and close seats as the placement wants them."""
        self._looked = time.monotonic()
        for seat in placement.drain(set(ray._private.state.state.get_draining_nodes())):
            log_event("draining", actor=seat)
        opened, closed = placement.balance()
        for seat in opened:
            self._actors[seat], call = self._open(seat)
            self._await(seat, call)
        for seat in closed:
            self._end(seat)

    def send(self, placement: Placement, seat: int, order: Order) -> None:
        """Pass an order on to the actor of a seat."""
        actor = self._actors[seat]
        if order is Order.CLOSE:
            self._end(seat)
            return
        if order is Order.START:
            group = placement.group(seat)
            assert group, "who is to start has a group"
            log_event("start", actor=seat, trials=name_trials(group.seeds))
            call = actor.start.remote(group.seeds)
        elif order is Order.TO_COMMIT:
            call = actor.advance.remote(0.0, to_commit=True)
        else:
            call = actor.advance.remote(max(SLICE_SECONDS, placement.num_seats() / MESSAGES_PER_SECOND))
        self._await(seat, call)

    def listen(self, placement: Placement) -> None:
        """Wait for an actor's answer, for a while, and pass on all the answers that are there."""
        ready, _ = ray.wait(list(self._calls), num_returns=1, timeout=LOOK_SECONDS)
        if len(self._calls) > 1:
            ready, _ = ray.wait(list(self._calls), num_returns=len(self._calls), timeout=0)
        for call in ready:
            seat = self._calls.pop(call)
            try:
                answer = ray.get(call)
            except ray.exceptions.RayActorError as error:
                self._end(seat)
                group, losses = placement.group(seat), placement.lost(seat)
                work = {"trials": name_trials(group.seeds), "again": group.uncommitted_env_steps} if group else {}
                log_event("lost", actor=seat, losses=losses, **work, cause=str(error).splitlines()[0])
                if losses >= LOSSES or error.actor_init_failed:
                    raise
            except ray.exceptions.RayTaskError as error:
                raise error.cause from None
            else:
                if isinstance(answer, GroupProgress):
                    group = placement.group(seat)
                    for trial, iteration in answer.diverged.items():
                        if group and trial not in group.diverged:
                            log_event("diverged", trial=trial, iteration=iteration)
                    placement.told(seat, answer)
                    if answer.finished:
                        log_event("finished", actor=seat, trials=name_trials(answer.seeds))
                else:
                    placement.arrived(seat, answer)
                    log_event("actor", actor=seat, node=answer)

    def dismiss(self) -> None:
        """End all actors."""
        for seat in list(self._actors):
            self._end(seat)

    def _open(self, seat: int) -> tuple[Any, ray.ObjectRef]:
        """An actor, and the call that it answers as soon as it runs; until then an autoscaler sees it wanted."""
        actor = self._collector.options(name=f"collect {self._name} {seat}").remote(*self._arguments)
        return actor, actor.__ray_call__.remote(_node)

    def _end(self, seat: int) -> None:
        ray.kill(self._actors.pop(seat))
        self._calls.pop(self._last_calls.pop(seat), None)

    def _await(self, seat: int, call: ray.ObjectRef) -> None:
        self._calls[call], self._last_calls[seat] = seat, call


def _node(collector: GroupCollector) -> str:
    return ray.get_runtime_context().get_node_id()


def name_trials(seeds: Sequence[int]) -> str:
    """Trials in a few letters.

    >>> name_trials([3, 1, 2]), name_trials([7]), name_trials([1, 2, 5])
    ('1-3', '7', '1,2,5')
    """
    first, last = min(seeds), max(seeds)
    if len(seeds) == 1:
        return str(first)
    return f"{first}-{last}" if last - first + 1 == len(seeds) else ",".join(map(str, sorted(seeds)))
