"""Which trials run on which actor, while actors come and go: pure bookkeeping, from events to orders.

A seat is a place for one actor on one CPU of the cluster. A group of trials moves from seat to seat at its commits, so
that nothing is lost, or from its last commit where the seat is lost. Which seats there are does not show in the data: a
trial's bytes do not depend on its group. Knows nothing of Ray.

Why not plain Ray tasks, one for each commit interval, with groups formed anew when one returns? A prototype made the
same bytes in the same CPU time, and lost and draining nodes did no harm. But it, too, had to form groups, count free
CPUs, ask an autoscaler for more and limit losses: about 290 lines in place of 390. A killed process was not replaced
sooner, and each task opens its trials again, a quarter of a second per trial on a store that answers in 30 ms.
"""

import dataclasses
import enum
import itertools
import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence, Set

import numpy as np

TRIALS_PER_SEAT = 2
"""Trials that are stacked at least where the seats are many: a core steps two in less than twice the time of one."""
SEATS_AHEAD = 64
"""Seats that are asked for at once beyond those that are there: what an autoscaler sees as wanted."""
WORTH_SECONDS = 30.0
"""A group that has less than this left is not divided: starting another actor would take as long."""
LOSSES = 20
"""Seats that a group may lose in a row without having got on."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class GroupProgress:
    """Progress of one group of trials: all that an actor reports to the driver."""

    seeds: tuple[int, ...]
    env_steps: int
    """Environment steps run, over all trials of the group, those of earlier runs included."""
    total_env_steps: int
    uncommitted_env_steps: int = 0
    """Those of `env_steps` that would be run again if the actor died now."""
    env_steps_per_second: float = 0.0
    """Over the last slice of work."""
    mean_return: float = math.nan
    """Mean over trials of the last mean episodic return; NaN before the first episode ended."""
    diverged: Mapping[int, int] = dataclasses.field(default_factory=dict)
    """The group's trials that diverged, and the iterations of each that were whole by then."""

    @property
    def finished(self) -> bool:
        """Whether every trial of the group has run and is committed."""
        return self.env_steps >= self.total_env_steps

    @property
    def seconds_left(self) -> float:
        """Estimated from the last slice."""
        left = self.total_env_steps - self.env_steps
        return left / self.env_steps_per_second if self.env_steps_per_second else math.inf if left else 0.0

    def part(self, seeds: Sequence[int]) -> "GroupProgress":
        """The share of some of the trials in what is committed, while they wait for a seat."""
        share = len(seeds) / len(self.seeds)
        return GroupProgress(
            seeds=tuple(seeds),
            env_steps=round((self.env_steps - self.uncommitted_env_steps) * share),
            total_env_steps=round(self.total_env_steps * share),
            mean_return=self.mean_return,
            diverged={seed: iteration for seed, iteration in self.diverged.items() if seed in seeds},
        )


class Order(enum.Enum):
    """What the actor of a seat is to do next."""

    START = "go on with the seat's group from its last commits"
    ADVANCE = "run for a slice of time"
    TO_COMMIT = "run up to the next commit"
    CLOSE = "end"


@dataclasses.dataclass(kw_only=True, slots=True)
class _Seat:
    node: str | None = None
    """None until the actor answers for the first time."""
    group: GroupProgress | None = None
    ran: bool = False
    """Whether the group has run an iteration here."""
    leaving: bool = False
    """Gives trials away at its next commit: half of them to an idle seat, or all where the node is draining."""
    draining: bool = False


def split_into_groups(seeds: Sequence[int], trials_per_actor: int, num_cpus: int) -> list[list[int]]:
    """Groups of trials, one per actor; 0 trials per actor keeps every CPU busy with at least 2 trials stacked.

    >>> split_into_groups(range(5), 0, 2), split_into_groups(range(5), 2, 8), split_into_groups(range(3), 0, 64)
    ([[0, 1, 2], [3, 4]], [[0, 1], [2, 3], [4]], [[0, 1, 2]])
    """
    most = len(seeds) // TRIALS_PER_SEAT
    num_groups = math.ceil(len(seeds) / trials_per_actor) if trials_per_actor else min(num_cpus, most)
    parts = np.array_split(np.asarray(seeds, dtype=int), max(num_groups, 1))
    return [[int(seed) for seed in part] for part in parts if len(part)]


class Placement:
    """Who runs what. Seats are numbers; the caller opens and closes actors for them and passes on their reports."""

    def __init__(self, groups: Sequence[GroupProgress], *, divisible: bool, seats_ahead: int = SEATS_AHEAD) -> None:
        """`divisible` groups are divided when there are more seats than groups."""
        self._waiting = deque(groups)
        self._done: list[GroupProgress] = []
        self._divisible, self._seats_ahead = divisible, seats_ahead
        self._seats: dict[int, _Seat] = {}
        self._free: set[int] = set()
        """Seats whose actor has answered and has no call under way."""
        self._numbers = itertools.count(1)
        self._losses: dict[int, tuple[int, int]] = {}
        """First trial of a group -> losses in a row, and environment steps committed at the last."""
        self._trials_left = sum(len(group.seeds) for group in groups)

    @property
    def finished(self) -> bool:
        """Whether every trial has run to its end."""
        return self._trials_left == 0

    def groups(self) -> list[GroupProgress]:
        """The groups that are done, that run and that wait for a seat."""
        running = [seat.group for seat in self._seats.values() if seat.group]
        return [*self._done, *running, *self._waiting]

    def group(self, seat: int) -> GroupProgress | None:
        """The group of a seat, as it was when its actor last answered."""
        return self._seats[seat].group

    def num_seats(self) -> int:
        """Seats, whether their actors have answered yet or not."""
        return len(self._seats)

    def arrived(self, seat: int, node: str) -> None:
        """The seat's actor runs, on this node."""
        self._seats[seat].node = node
        self._free.add(seat)

    def told(self, seat: int, progress: GroupProgress) -> None:
        """The seat's actor has done as ordered, and this is how far its group is."""
        state = self._seats[seat]
        assert state.group is not None
        state.ran |= progress.env_steps > state.group.env_steps
        state.group = progress
        if progress.finished:
            self._done.append(progress)
            self._trials_left -= len(progress.seeds)
            state.group = None
        self._free.add(seat)

    def lost(self, seat: int) -> int:
        """The seat's actor died; its group waits for another. Returns how often in a row it did not get on."""
        state = self._seats.pop(seat)
        self._free.discard(seat)
        if state.group is None:
            return 0
        group, first = state.group.part(state.group.seeds), state.group.seeds[0]
        losses, committed = self._losses.get(first, (0, -1))
        got_on = state.ran or group.env_steps > committed
        self._losses[first] = (1 if got_on else losses + 1, group.env_steps)
        self._waiting.appendleft(group)
        return self._losses[first][0]

    def drain(self, nodes: Set[str]) -> list[int]:
        """These nodes are to go: seats there give their groups away at the next commit. Returns seats newly told."""
        seats = [n for n, seat in self._seats.items() if seat.node in nodes and not seat.draining]
        for seat in seats:
            self._seats[seat].draining = True
        return seats

    def balance(self) -> tuple[list[int], list[int]]:
        """Seats to open and seats to close, so that there is one for each group that could run by itself.

        Marks the groups that give trials to the seats that are idle. Looks at every seat: to be called now and then.
        """
        seats = {n: seat for n, seat in self._seats.items() if not seat.draining}
        useful = sum(self._pieces(group) for group in self._waiting)
        useful += sum(self._pieces(seat.group) for seat in self._seats.values() if seat.group)
        asked = [n for n, seat in seats.items() if seat.node is None]
        opened = [next(self._numbers) for _ in range(min(useful - len(seats), self._seats_ahead - len(asked)))]
        self._seats |= {n: _Seat() for n in opened}
        idle = [n for n in self._free if n in seats and seats[n].group is None]
        closed = [*reversed(asked), *idle][: max(0, len(seats) - useful)]
        for n in closed:
            self._close(n)
        lacking = len(set(idle) - set(closed)) - len(self._waiting)
        givers = (seat for seat in seats.values() if seat.group and not seat.leaving)
        for seat in sorted(givers, key=lambda seat: -self._pieces(seat.group)) if lacking > 0 else ():
            if lacking <= 0 or self._pieces(seat.group) == 1:
                break
            seat.leaving = True
            lacking -= self._pieces(seat.group) - 1
        return opened, closed

    def orders(self) -> Iterator[tuple[int, Order]]:
        """What the seats that have answered are to do now; those that have nothing to do stay without an order."""
        free = sorted(self._free, key=lambda n: self._seats[n].group is None)
        num_idle = sum(self._seats[n].group is None and not self._seats[n].draining for n in free)
        for n in free:
            seat = self._seats[n]
            if seat.group is None and self._waiting and not seat.draining:
                seat.group, seat.ran, seat.leaving = self._waiting.popleft(), False, False
                order = Order.START
            elif seat.group is None:
                if not seat.draining:
                    continue
                order = Order.CLOSE
            elif not (seat.leaving or seat.draining):
                order = Order.ADVANCE
            elif seat.group.uncommitted_env_steps:
                order = Order.TO_COMMIT
            elif seat.draining:
                self._waiting.appendleft(seat.group.part(seat.group.seeds))
                seat.group, order = None, Order.CLOSE
            else:
                order = Order.START if self._divide(seat, num_idle - len(self._waiting)) else Order.ADVANCE
            if order is Order.CLOSE:
                self._close(n)
            self._free.discard(n)
            yield n, order

    def _close(self, n: int) -> None:
        del self._seats[n]
        self._free.discard(n)

    def _pieces(self, group: GroupProgress | None) -> int:
        """Seats that a group could use."""
        assert group is not None
        short = group.seconds_left < WORTH_SECONDS
        return 1 if short or not self._divisible else max(1, len(group.seeds) // TRIALS_PER_SEAT)

    def _divide(self, seat: _Seat, num_idle: int) -> bool:
        """Leave to idle seats their share of the group; False where none is idle any more."""
        group, seat.leaving = seat.group, False
        assert group is not None
        num_parts = min(1 + max(0, num_idle), self._pieces(group))
        if num_parts == 1:
            return False
        own, *others = (group.part(part.tolist()) for part in np.array_split(np.asarray(group.seeds), num_parts))
        seat.group = own
        self._waiting.extend(others)
        return True
