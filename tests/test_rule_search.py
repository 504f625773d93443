"""The search for a rule: ranks within a generation, and the same rule after a kill."""

import contextlib
import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
from test_forks import SMALL, SOURCE

from tipl_ray import jobs
from tipl_ray.accelerate.return_rule import RuleNumbers
from tipl_ray.config import Experiment
from tipl_ray.improve.forks import cells
from tipl_ray.improve.rule_job import run_rule_searches
from tipl_ray.improve.rule_search import (
    BOUNDS,
    START,
    GenerationSearch,
    Rule,
    fitness,
    found_point,
    generation_cells,
    run_rule,
    score_curves,
)


def test_fitness_is_the_mean_rank_over_tasks_and_not_a_sum_of_returns() -> None:
    """By hand: the first is best on two tasks of three, by areas a thousand times smaller than the third task's."""
    outcomes = [
        {"A": [3.0, 1.0], "B": [0.3, 1.0], "C": [1000.0, 1.0]},
        {"A": [2.0, 1.0], "B": [0.2, 1.0], "C": [2000.0, 1.0]},
        {"A": [1.0, 1.0], "B": [0.1, 1.0], "C": [3000.0, 1.0]},
    ]
    assert fitness(outcomes) == pytest.approx([0.75 * 2 / 3 + 0.125, 0.75 * 0.5 + 0.125, 0.75 / 3 + 0.125])
    assert fitness([{"A": [1.0, 5.0]}, {"A": [1.0, 9.0]}]) == [0.375, 0.625]


def test_what_failed_or_diverged_is_the_worst_of_its_generation() -> None:
    assert fitness([None, {"A": [1.0, 1.0]}, {"A": [math.nan, math.nan]}]) == [0.25, 1.0, 0.25]
    assert fitness([None, None]) == [0.0, 0.0]


def test_generations_share_their_seeds_with_no_other_and_draw_regimes_for_their_tasks() -> None:
    improve = dataclasses.replace(SMALL.improve, generations=3, searches=2, search_trials=2)
    experiment = dataclasses.replace(SMALL, improve=improve)
    ran = [generation_cells(experiment, search, generation)[1] for search in range(2) for generation in range(3)]
    assert len({seed for seeds in ran for seed in seeds}) == 12
    assert ran[0] == [30_001, 30_002]
    many = dataclasses.replace(Experiment(name="any"), improve=dataclasses.replace(improve, generations=40))
    drawn = {cell.regime.name for generation in range(40) for cell in generation_cells(many, 0, generation)[0]}
    assert drawn == {regime.name for regime in many.improve.regimes}


def test_a_rule_has_its_own_learning_rate_between_the_ends_of_its_regime() -> None:
    cell = cells(Experiment(name="any").improve)[0]
    assert cell.regime.values == (4e-4, 1e-3)
    shares = {0.0: 4e-4, 0.5: math.sqrt(4e-4 * 1e-3), 1.0: 1e-3}
    for share, rate in shares.items():
        assert cell.between(share).value == pytest.approx(rate, rel=1e-12)
        own = cell.between(share).experiment(Experiment(name="any"), SOURCE)
        assert own.ppo.learning_rate == cell.between(share).value
    assert cells(SMALL.improve)[0].between(0.3).value == 1e-3


def test_cma_es_is_told_ranks_and_finds_the_top_of_a_hill() -> None:
    """The hill is one that no return is on: its top is known."""
    top = {**START, "first_begin": 2.5, "past_end": 0.5}
    search = GenerationSearch(population=12, generations=40, seed=1)
    asked: dict[str, dict] = {}
    for index in range(12 * 40):
        asked[str(index)] = point = search.suggest(str(index)) or {}
        assert point["generation"] == index // 12
        if index % 12 == 11:
            assert search.suggest("too early") is None
            for name in list(asked):
                point = asked.pop(name)
                away = sum(((point[one] - top[one]) / (BOUNDS[one][1] - BOUNDS[one][0])) ** 2 for one in BOUNDS)
                search.on_trial_complete(name, {"scores": json.dumps({"A": [-away, 0.0]})})
    assert search.suggest("after the end") == GenerationSearch.FINISHED
    found = found_point(search.history)
    for name in BOUNDS:
        assert found[name] == pytest.approx(top[name], abs=0.08 * (BOUNDS[name][1] - BOUNDS[name][0]))


def test_a_rule_of_nothing_is_ppo_without_jumps() -> None:
    (cell,) = cells(SMALL.improve)
    nothing = Rule(numbers=RuleNumbers(first_begin=0.0, first_end=0.0), kl_limit=1.0)
    still, none, far = (
        run_rule(rule, cell, [5, 6], SMALL, SOURCE, "torch")
        for rule in (nothing, None, Rule(numbers=RuleNumbers(), kl_limit=1.0))
    )
    np.testing.assert_array_equal(still, none)
    assert not np.array_equal(far, none)
    area, final = score_curves(none)
    assert (area, final) == (pytest.approx(none.mean()), pytest.approx(none[:, -1:].mean()))


@pytest.mark.usefixtures("cluster")
def test_the_job_finds_the_same_rule_after_a_kill_and_runs_no_candidate_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(jobs, "connected_to_ray", contextlib.nullcontext)
    improve = dataclasses.replace(SMALL.improve, generations=2, population=4, searches=1)
    collect = dataclasses.replace(SMALL.collect, total_env_steps=4 * 128)
    experiment = dataclasses.replace(SMALL, improve=improve, collect=collect).at(str(tmp_path / "whole"))
    run_rule_searches(experiment)
    said = capsys.readouterr().out
    (rule,) = tmp_path.glob("whole/rules/*/rule.json")
    candidates = sorted(path.parent.name for path in tmp_path.glob("whole/rules/*/candidate.json"))
    assert len(candidates) == 8
    assert not list(tmp_path.glob("whole/rules/tune/*")), "Ray Tune's own files are of no use afterwards"
    assert json.loads(rule.read_text())["rule"] in said
    before = rule.read_text()
    rule.unlink()
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("whole/rules/*/candidate.json")}
    next(iter(times)).unlink()
    run_rule_searches(experiment)
    assert rule.read_text() == before
    again = {path: path.stat().st_mtime_ns for path in tmp_path.glob("whole/rules/*/candidate.json")}
    assert sorted(path.parent.name for path in again) == candidates
    assert sum(again[path] == times[path] for path in times) == 7


@pytest.mark.usefixtures("cluster")
def test_a_search_whose_rules_fail_finds_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(jobs, "connected_to_ray", contextlib.nullcontext)
    improve = dataclasses.replace(SMALL.improve, tasks=("Pendulum-v99",), generations=1, population=4, searches=1)
    with pytest.raises(SystemExit) as ended:
        run_rule_searches(dataclasses.replace(SMALL, improve=improve).at(str(tmp_path)))
    assert ended.value.code == 1
    assert "Pendulum-v99" in capsys.readouterr().err
    assert not list(tmp_path.glob("rules/*/rule.json"))
