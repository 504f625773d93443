"""What a job prints."""

import doctest
import time

import pytest

from tipl_ray import terminal
from tipl_ray.terminal import ProgressView


def test_examples_in_docstrings_hold() -> None:
    assert doctest.testmod(terminal).failed == 0


def test_progress_does_not_flood_a_log(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    clock = iter(range(1000, 2000))
    monkeypatch.setattr(terminal, "say", said.append)
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)) / 2)
    with ProgressView() as view:
        for number in range(100):
            view.show([{"trials": "1-4"}], f"{number} done")
    assert 3 <= len(said) <= 12
    assert said[0] == "0 done"
