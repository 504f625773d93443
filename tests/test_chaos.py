"""A few kills of each kind; benchmarks/chaos.py makes many."""

import doctest
import itertools
import random
import sys
from pathlib import Path

import pytest
from machine import new_root

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import chaos
from chaos import Place, kill_alone, kill_under_ray


@pytest.fixture(params=["folder", "bucket"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """Data sets of two trials with four commits each."""
    chaos.context.set_forkserver_preload(chaos.PRELOADED)
    server = request.getfixturevalue("server") if request.param == "bucket" else ""
    numbers = itertools.count()

    def new_storage() -> str:
        return new_root(f"http://{server}") if server else str(tmp_path / f"data set {next(numbers)}")

    return Place(new_storage, tmp_path, num_trials=2, num_iterations=12)


def test_examples_in_docstrings_hold() -> None:
    results = doctest.testmod(chaos)
    assert results.attempted > 0
    assert results.failed == 0


def test_a_collection_killed_at_publication_points_and_at_random_leaves_the_undisturbed_data(place: Place) -> None:
    kill_alone(place, 6, random.Random(0))
    tally = place.tally
    assert [kill.kind for kill in tally.kills].count("publication point") >= 4
    assert all(bool(kill.point) == (kill.kind == "publication point") for kill in tally.kills)
    assert tally.data_sets >= 1
    assert 0 <= tally.iterations_begun - tally.iterations_needed <= tally.most_repeated


@pytest.mark.slow
def test_actors_drivers_and_nodes_die_and_leave_the_undisturbed_data(tmp_path: Path) -> None:
    chaos.context.set_forkserver_preload(chaos.PRELOADED)
    numbers = itertools.count()
    place = Place(lambda: str(tmp_path / f"data set {next(numbers)}"), tmp_path, num_trials=4, num_iterations=240)
    kill_under_ray(place, 1, random.Random(0))
    assert [kill.kind for kill in place.tally.kills] == ["actor", "driver", "node"]
    assert place.tally.data_sets >= 1
