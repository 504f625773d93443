"""Placement without Ray: a cluster of made-up actors that come, commit, die and drain, in made-up time."""

import itertools
import random
import time

import pytest

from tipl_ray.collect import placement
from tipl_ray.collect.placement import GroupProgress, Order, Placement, split_into_groups

ITERATIONS, PER_COMMIT, STEPS = 50, 20, 2048


class MadeUpCluster:
    """Runs a placement's orders: trials advance one iteration at a time, commits are kept, what is run is counted."""

    def __init__(self, num_trials: int, groups: list[list[int]], cpus: int, divisible: bool = True, rate: float = 1.0):
        self.total = ITERATIONS * STEPS
        waiting = [
            GroupProgress(seeds=tuple(seeds), env_steps=0, total_env_steps=len(seeds) * self.total) for seeds in groups
        ]
        self.placement = Placement(waiting, divisible=divisible)
        self.cpus, self.rate = cpus, rate
        self.committed = dict.fromkeys(range(1, num_trials + 1), 0)
        self.ran = dict.fromkeys(self.committed, 0)
        self.asked: list[int] = []
        self.live: dict[int, dict[int, int]] = {}
        """Seat -> iterations of the trials that its actor has in memory."""
        self.messages = 0

    def look(self) -> None:
        opened, closed = self.placement.balance()
        self.asked += opened
        for seat in closed:
            self.remove(seat)

    def remove(self, seat: int) -> None:
        if seat in self.asked:
            self.asked.remove(seat)
        else:
            del self.live[seat]

    def arrive(self) -> None:
        while self.asked and len(self.live) < self.cpus:
            seat = self.asked.pop(0)
            self.live[seat] = {}
            self.placement.arrived(seat, f"node-{seat % 3}")

    def obey(self, iterations: int = 3) -> None:
        for seat, order in list(self.placement.orders()):
            if order is Order.CLOSE:
                self.remove(seat)
                continue
            mine = self.live[seat]
            if order is Order.START:
                mine.clear()
                group = self.placement.group(seat)
                assert group
                mine |= {seed: self.committed[seed] for seed in group.seeds}
            elif order is Order.ADVANCE:
                for _ in range(iterations):
                    self.iterate(mine)
            else:
                while self.uncommitted(mine):
                    self.iterate(mine)
            self.messages += 1
            self.placement.told(seat, self.progress(mine))

    def iterate(self, mine: dict[int, int]) -> None:
        for seed in mine:
            if mine[seed] < ITERATIONS:
                mine[seed] += 1
                self.ran[seed] += 1
                if mine[seed] % PER_COMMIT == 0 or mine[seed] == ITERATIONS:
                    self.committed[seed] = mine[seed]

    def uncommitted(self, mine: dict[int, int]) -> int:
        return sum(k % PER_COMMIT for k in mine.values() if k < ITERATIONS)

    def progress(self, mine: dict[int, int]) -> GroupProgress:
        return GroupProgress(
            seeds=tuple(mine),
            env_steps=sum(mine.values()) * STEPS,
            total_env_steps=len(mine) * self.total,
            uncommitted_env_steps=self.uncommitted(mine) * STEPS,
            env_steps_per_second=self.rate,
        )

    def step(self) -> None:
        self.look()
        self.arrive()
        self.obey()

    def run(self, most: int = 1000) -> int:
        for step in range(most):
            if self.placement.finished:
                return step
            self.step()
        raise AssertionError(f"{self.committed} after {most} steps")

    def held(self) -> list[int]:
        return sorted(len(mine) for mine in self.live.values() if mine)


def test_each_seat_runs_one_group_to_its_end_and_nothing_twice() -> None:
    cluster = MadeUpCluster(8, [[1, 2, 3, 4], [5, 6, 7, 8]], cpus=2)
    cluster.run()
    assert set(cluster.committed.values()) == set(cluster.ran.values()) == {ITERATIONS}


def test_new_seats_take_their_share_at_the_next_commit_and_nothing_is_run_twice() -> None:
    cluster = MadeUpCluster(16, [list(range(1, 17))], cpus=1)
    for _ in range(4):
        cluster.step()
    assert cluster.held() == [16]
    cluster.cpus = 4
    for _ in range(8):
        cluster.step()
    assert cluster.held() == [4, 4, 4, 4]
    cluster.run()
    assert set(cluster.ran.values()) == {ITERATIONS}


def test_groups_of_a_fixed_size_are_never_divided_and_wait_for_a_seat() -> None:
    cluster = MadeUpCluster(10, split_into_groups(range(1, 11), 4, 1), cpus=2, divisible=False)
    seen = set()
    while not cluster.placement.finished:
        cluster.step()
        seen |= set(cluster.held())
    assert seen <= {3, 4}
    assert set(cluster.ran.values()) == {ITERATIONS}


def test_the_group_of_a_lost_seat_goes_on_elsewhere_from_its_last_commit() -> None:
    cluster = MadeUpCluster(8, [[1, 2, 3, 4], [5, 6, 7, 8]], cpus=2)
    for _ in range(9):
        cluster.step()
    seat = next(seat for seat, mine in cluster.live.items() if 5 in mine)
    lost = cluster.uncommitted(cluster.live[seat])
    assert lost
    assert cluster.committed[5] == 20
    cluster.remove(seat)
    assert cluster.placement.lost(seat) == 1
    cluster.run()
    assert set(cluster.committed.values()) == {ITERATIONS}
    assert sum(cluster.ran.values()) == 8 * ITERATIONS + lost


def test_a_draining_node_gives_its_groups_away_at_a_commit_and_loses_nothing() -> None:
    cluster = MadeUpCluster(8, [[1, 2, 3, 4], [5, 6, 7, 8]], cpus=2)
    for _ in range(9):
        cluster.step()
    (first, second) = cluster.live
    assert cluster.placement.drain({f"node-{second % 3}"}) == [second]
    assert cluster.placement.drain({f"node-{second % 3}"}) == []
    for _ in range(4):
        cluster.step()
    assert second not in cluster.live
    assert first in cluster.live
    assert cluster.held() == [4, 4]
    cluster.run()
    assert set(cluster.ran.values()) == {ITERATIONS}


def test_losses_are_counted_while_a_group_does_not_get_on() -> None:
    cluster = MadeUpCluster(2, [[1, 2]], cpus=1)
    for expected in (1, 2, 3):
        cluster.look()
        cluster.arrive()
        for seat, order in cluster.placement.orders():
            assert order is Order.START
            cluster.remove(seat)
            assert cluster.placement.lost(seat) == expected
    for _ in range(3):
        cluster.step()
    (seat,) = cluster.live
    assert cluster.placement.lost(seat) == 1
    cluster.remove(seat)
    cluster.run()


def test_what_is_soon_done_is_not_divided_and_idle_seats_are_given_back() -> None:
    cluster = MadeUpCluster(8, [[1, 2, 3, 4, 5, 6], [7, 8]], cpus=4, rate=1e9)
    cluster.step()
    for _ in range(3):
        cluster.step()
    assert len(cluster.live) == 2
    assert cluster.asked == []


def test_seats_are_asked_for_as_many_as_there_are_pairs_of_trials_a_bounded_number_at_once() -> None:
    few, many = (Placement([GroupProgress(seeds=tuple(range(n)), env_steps=0, total_env_steps=1)], divisible=True)
                 for n in (11, 1000))  # fmt: skip
    assert [len(one.balance()[0]) for one in (few, many)] == [5, placement.SEATS_AHEAD]
    assert many.balance() == ([], [])


@pytest.mark.parametrize("seed", range(20))
def test_every_trial_ends_once_whatever_comes_and_goes(seed: int) -> None:
    dice = random.Random(seed)
    num_trials = dice.randint(1, 40)
    trials_per_actor = dice.choice([0, 0, 3])
    groups = split_into_groups(range(1, num_trials + 1), trials_per_actor, dice.randint(1, 6))
    cluster = MadeUpCluster(num_trials, groups, cpus=3, divisible=not trials_per_actor)
    repeated = 0
    for step in itertools.count():
        assert step < 2000
        if cluster.placement.finished:
            break
        cluster.cpus = dice.randint(1, 8)
        for seat in [seat for seat in cluster.live if dice.random() < 0.02]:
            repeated += cluster.uncommitted(cluster.live[seat])
            cluster.remove(seat)
            cluster.placement.lost(seat)
        if dice.random() < 0.05:
            cluster.placement.drain({f"node-{dice.randint(0, 2)}"})
        cluster.step()
    assert set(cluster.committed.values()) == {ITERATIONS}
    assert sum(cluster.ran.values()) == num_trials * ITERATIONS + repeated
    assert sum(len(group.seeds) for group in cluster.placement.groups()) == num_trials


def test_ten_thousand_groups_are_driven_with_microseconds_a_message() -> None:
    groups = [[2 * n + 1, 2 * n + 2] for n in range(10_000)]
    cluster = MadeUpCluster(20_000, groups, cpus=10_000)
    spent = looks = 0.0
    while not cluster.placement.finished:
        begin = time.perf_counter()
        cluster.look()
        looks = max(looks, time.perf_counter() - begin)
        cluster.arrive()
        before = time.perf_counter()
        cluster.obey()
        spent += time.perf_counter() - before
    assert set(cluster.ran.values()) == {ITERATIONS}
    # 150 thousand messages; a placement that looked at every seat for each of them would take hours.
    assert spent / cluster.messages < 1e-3
    assert looks < 2.0
