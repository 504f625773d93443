"""What a sweep may vary: read, typed, and refused in words that name the field, the value and the limit."""

import dataclasses
import re
from typing import Any

import pytest

from tipl_ray.config import Experiment, Sweep
from tipl_ray.experiments import load_experiment
from tipl_ray.places import CHECKOUT
from tipl_ray.sweep.space import Range, corners, describe, make_space, parse_over, short_names, with_fields


def demo(over: dict[str, Any], preset: str = "paper", **sweep: Any) -> Experiment:
    experiment = load_experiment(CHECKOUT / "jobs" / "experiments" / "demo.toml", preset)
    return dataclasses.replace(experiment, sweep=Sweep(over=over, **sweep))


def test_values_from_the_command_line_get_their_fields_types() -> None:
    over = parse_over(["basis.rank=8, 16", "model.dropout=0,0.1", "model.residual=true,false", "train.schedule=cosine"])
    assert make_space(demo(over)) == {
        "basis.rank": (8, 16),
        "model.dropout": (0.0, 0.1),
        "model.residual": (True, False),
        "train.schedule": ("cosine",),
    }


def test_unquoted_names_in_a_file_are_the_same_fields() -> None:
    assert make_space(demo({"basis": {"rank": [8, 16]}})) == make_space(demo({"basis.rank": [8, 16]}))


def test_a_search_has_ranges_of_the_fields_type() -> None:
    over = {"train.learning_rate": "log(1e-4, 1e-2)", "model.layers": "uniform(1, 4)"}
    assert make_space(demo(over, search="optuna")) == {
        "train.learning_rate": Range(low=1e-4, high=1e-2, log=True, whole=False),
        "model.layers": Range(low=1, high=4, log=False, whole=True),
    }


def test_corners_are_every_combination_of_values_and_limits() -> None:
    space = make_space(demo({"basis.rank": [8, 16], "train.learning_rate": "log(1e-4,1e-2)"}, search="optuna"))
    assert [tuple(candidate.values()) for candidate in corners(space)] == [
        (8, 1e-4),
        (8, 1e-2),
        (16, 1e-4),
        (16, 1e-2),
    ]


@pytest.mark.parametrize(
    ("over", "words"),
    [
        ({}, "sweep.over is empty"),
        ({"basis.rnk": [8]}, "sweep.over.basis.rnk is not a field of basis, model, train; did you mean basis.rank"),
        ({"rank": [8]}, "did you mean basis.rank"),
        ({"collect.num_trials": [3]}, "sweep.over.collect.num_trials is not a field of basis, model, train"),
        ({"train.num_seeds": [1, 2]}, "a run has one seed"),
        ({"basis.rank": []}, "is empty"),
        ({"basis.rank": [8, 8]}, "contains a value twice"),
        ({"basis.rank": [8.5]}, "basis.rank=8.5 is not of the field's type, int"),
        ({"basis.rank": ["many"]}, "basis.rank='many' is not of the field's type, int"),
        ({"model.residual": [1]}, "model.residual=1 is not of the field's type, bool"),
        ({"basis.kind": ["fourier"]}, "basis.kind='fourier'"),
        ({"basis.rank": [8, 300]}, "basis.rank=300 exceeds the 251 snapshots of a trial"),
        (
            {"model.context": [10, 250]},
            "model.context=250 + the furthest forward step 10 = 260 displacements, more than",
        ),
        ({"model.heads": [1, 3]}, "model.heads=3 does not divide model.embedding=128"),
        ({"train.learning_rate": "log(1e-4,1e-2)"}, "is a range; a grid search needs a list of values"),
        ({"train.learning_rate": "log(0,1)"}, "the limits must increase and be above 0"),
        ({"train.learning_rate": "about 1e-3"}, "is not a range for a field of type float"),
        ({"train.schedule": "uniform(0,1)"}, "is not a range for a field of type str"),
        ({"model.phase": [True, False]}, "model.phase has no effect with basis.kind=['trial']"),
    ],
)
def test_what_cannot_vary_is_refused_with_its_field_and_limit(over: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        make_space(demo(over))


def test_a_rank_is_refused_on_a_basis_that_has_none() -> None:
    with pytest.raises(ValueError, match=re.escape("has no effect with basis.kind=['window']")):
        make_space(demo({"basis.rank": [8, 16]}, "causal"))
    assert make_space(demo({"basis.rank": [8, 16], "basis.kind": ["window", "trial"]}, "causal"))


@pytest.mark.parametrize(
    ("over", "words"),
    [
        (
            {"model.embedding": "uniform(64,128)", "model.heads": [4]},
            "model.heads=4 does not divide model.embedding=65",
        ),
        ({"model.embedding": [20], "model.heads": "uniform(1,5)"}, "model.heads=3 does not divide model.embedding=20"),
    ],
)
def test_a_range_whose_ends_are_possible_and_not_what_is_between_is_refused(over: dict[str, Any], words: str) -> None:
    words = f" is a range with impossible values in it: {words}; give a list of values"
    searched = demo(over)
    searched = dataclasses.replace(searched, sweep=dataclasses.replace(searched.sweep, search="optuna"))
    with pytest.raises(ValueError, match=re.escape(words)):
        make_space(searched)


@pytest.mark.parametrize("argument", ["basis.rank", "=8", "basis.rank="])
def test_an_argument_without_field_or_values_is_refused(argument: str) -> None:
    with pytest.raises(ValueError, match="use FIELD=VALUE"):
        parse_over([argument])


def test_a_child_differs_in_its_fields_alone() -> None:
    base = demo({"basis.rank": [8]})
    child = with_fields(base, {"basis.rank": 8})
    assert child.basis.rank == 8
    assert dataclasses.replace(child, basis=base.basis) == base


def test_names_are_as_short_as_they_can_be() -> None:
    assert short_names(["basis.rank", "model.layers"]) == {"basis.rank": "rank", "model.layers": "layers"}
    assert short_names(["a.seed", "b.seed"]) == {"a.seed": "a.seed", "b.seed": "b.seed"}
    assert describe({"basis.rank": 32, "model.context": 20}) == "rank=32 context=20"
