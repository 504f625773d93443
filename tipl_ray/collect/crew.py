"""The actors that run a collection's groups of trials, each called again and again for a slice of work.

Everything that matters is in the store: if an actor dies, another finds the last commits there and continues.
"""

import math
import time
from collections.abc import Callable
from typing import Any

import ray

from tipl_ray.collect.group import GroupCollector, name_trials
from tipl_ray.collect.placement import LOSSES, GroupProgress, Order, Placement
from tipl_ray.config import Experiment
from tipl_ray.ppo.algorithms import NOTHING, Extension
from tipl_ray.resources import require_resources
from tipl_ray.terminal import log_event

SLICE_SECONDS = 2.0
"""Seconds of work per call of an actor: what passes between two progress messages."""
MESSAGES_PER_SECOND = 200
"""Progress messages that the driver is sent at most, by longer calls where there are many actors."""
LOOK_SECONDS = 1.0
"""Seconds between two looks at the whole: nodes that are to go, seats to open and to close, what the caller is told."""


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


def drive(placement: Placement, crew: "Crew", on_progress: Callable[[list[GroupProgress]], None]) -> None:
    """Run a placement's trials to their end, and pass its actors' reports to the placement."""
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

    def __init__(self, experiment: Experiment, engine: str, extension: Extension = NOTHING) -> None:
        self._name = experiment.name
        self._arguments = (experiment, engine, (), extension)
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
