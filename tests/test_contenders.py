"""Contenders and their scores: what a name means, and what hand-made curves must come to."""

import dataclasses

import numpy as np
import pytest

from tipl_ray.accelerate.contenders import (
    Contender,
    Finished,
    Fitted,
    Unit,
    best_learning_rate,
    comparable,
    filled,
    jump_question,
    over_tasks,
    score,
    sentences,
    table,
)
from tipl_ray.config import Collect, Experiment, Where
from tipl_ray.evaluate.metrics import Resampling, interquartile_mean
from tipl_ray.predict.baselines import Ridge

SOURCE = Experiment(name="source")
RESAMPLING = Resampling(confidence=0.95, bootstrap=500, seed=0)


def finished(name: str, returns_SI: np.ndarray, task: str = "Hopper-v4") -> Finished:
    contender = Contender.parse(name)
    iterations = returns_SI.shape[1]
    unit = Unit(task=task, env_steps=100 * iterations, contender=contender, learning_rate=1e-3, search=False)
    return Finished(
        unit=unit,
        returns_SI=returns_SI,
        env_steps_I=100 * np.arange(1, iterations + 1),
        gradient_steps_I=contender.num_epochs * 32 * np.arange(1, iterations + 1),
        cpu_seconds=10.0 * len(returns_SI),
        jump_counts=[iterations, 0, 0] if contender.predictor else [],
    )


def rising(height: float, spread: float = 0.0) -> np.ndarray:
    return np.linspace(0, height, 40) + spread * np.arange(-5, 5)[:, None]


def test_a_contenders_name_says_its_epochs_its_predictor_and_its_jumps() -> None:
    assert Contender.parse("10") == Contender(name="10", num_epochs=10)
    options = Contender.parse("4+tipl:gate,both,reset,x0.5")
    jump = options.jump_settings(SOURCE)
    assert (options.predictor, jump.horizon, jump.damping) == ("tipl", 3, 0.5)
    assert (jump.gate, jump.networks, jump.moments) == (True, "both", "reset")


@pytest.mark.parametrize("name", ["", "ten", "4+", "4+oracle", "4:gate", "4+ridge:often", "4+ridge:x", "-4"])
def test_a_name_that_means_nothing_is_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=r"accelerate\.contenders: "):
        Contender.parse(name)


@pytest.mark.parametrize("name", ["10+ridge", "3+ridge", "12+ridge"])
def test_epochs_that_leave_no_whole_snapshot_to_predict_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="to a predictor of snapshots that are 2 epochs apart"):
        Contender.parse(name).jump_settings(SOURCE)


def test_a_unit_runs_its_contender_on_its_seeds_in_a_storage_of_its_own() -> None:
    experiment = Experiment(name="e", where=Where(storage="/s"), collect=Collect(first_seed=101, num_trials=10))
    plain, jumping = (
        Unit(task="Hopper-v4", env_steps=4096, contender=Contender.parse(name), learning_rate=1e-3, search=search)
        for name, search in (("4", True), ("4+ridge", False))
    )
    ridge = Ridge(jump_question(SOURCE, 3))
    jumps = jumping.jumps(SOURCE, {"ridge": Fitted(predictor=ridge, digest="a")})
    assert jumps is not None
    assert plain.jumps(SOURCE, {}) is None
    first, second = plain.experiment(experiment, None), jumping.experiment(experiment, jumps)
    assert first.collect.seeds == (10_001, 10_002, 10_003, 10_004, 10_005)
    assert second.collect.seeds == tuple(range(101, 111))
    assert (first.ppo.num_epochs, first.ppo.learning_rate, first.collect.task) == (4, 1e-3, "Hopper-v4")
    assert second.snapshots_per_iteration == 2
    assert jumps.snapshots_per_iteration(second) == 5
    assert first.storage_path != second.storage_path
    moved = experiment.at("/t")
    for digest, same in (("a", True), ("b", False)):
        elsewhere = jumping.experiment(moved, dataclasses.replace(jumps, digest=digest))
        assert (elsewhere.storage_path.removeprefix("/t") == second.storage_path.removeprefix("/s")) == same


def test_units_are_named_as_they_always_were() -> None:
    experiment = Experiment(name="e", where=Where(storage="/s"), collect=Collect(first_seed=101, num_trials=10))
    names = []
    for name in ("4", "4+ridge:gate"):
        unit = Unit(task="Hopper-v4", env_steps=4096, contender=Contender.parse(name), learning_rate=1e-3, search=True)
        fitted = Fitted(predictor=Ridge(jump_question(SOURCE, 3)), digest="a")
        names.append(unit.experiment(experiment, unit.jumps(SOURCE, {"ridge": fitted})).storage_path)
    assert names == ["/s/units/029cd8e64253ee5f", "/s/units/0a732ad7ddb3333a"]


def test_epochs_that_snapshots_do_not_divide_are_refused() -> None:
    unit = Unit(task="Hopper-v4", env_steps=4096, contender=Contender.parse("5"), learning_rate=1e-3, search=False)
    with pytest.raises(ValueError, match=r"does not divide the epochs of accelerate\.contenders '5'"):
        unit.experiment(Experiment(name="e"), None)


def test_the_interquartile_mean_leaves_out_a_quarter_rounded_down_at_each_end() -> None:
    """rliable's: scipy.stats.trim_mean with 0.25."""
    assert interquartile_mean(np.array([100.0, 1, 2, 3, 4, 5, 6, 7, 8, -50])) == np.mean([2, 3, 4, 5, 6, 7])
    assert interquartile_mean(np.array([9.0, 1, 5])) == 5.0


def test_resamples_stay_within_their_task() -> None:
    statistics_R = RESAMPLING.resample(np.zeros(4), np.ones(4), statistic=lambda runs: runs.sum(axis=-1))
    assert (statistics_R == 4.0).all()


def test_gaps_in_a_curve_take_the_last_known_return_and_before_the_first_the_first() -> None:
    nan = np.nan
    np.testing.assert_array_equal(filled(np.array([[nan, 3.0, nan, 5.0, nan]])), [[3, 3, 3, 5, 5]])
    with pytest.raises(ValueError, match="learning curve is empty"):
        filled(np.array([[nan, nan]]))


def test_the_table_says_areas_steps_and_what_is_told_apart() -> None:
    rows = score(
        [finished("10", rising(100, 1)), finished("4", rising(60, 1)), finished("4+ridge", rising(200, 1))],
        "InvertedPendulum-v4",
        RESAMPLING,
    )
    first, plain, jumping = rows
    assert first["auc"] == pytest.approx(49.5)  # trials 2 to 7 of ten, half a unit below the middle
    assert first["auc_low"] < first["auc"] < first["auc_high"]
    assert first["final_return"] == pytest.approx(np.linspace(0, 100, 40)[-4:].mean() - 0.5)
    assert (first["gradient_steps"], plain["gradient_steps"]) == (12_800, 5_120)
    assert jumping["auc_less_first_low"] > 0 > plain["auc_less_first_high"]
    assert plain["env_steps_to_90"] is None
    assert jumping["env_steps_to_90"] < first["env_steps_to_90"]
    assert (jumping["predictor"], jumping["predictor_trained_on"]) == ("ridge", "InvertedPendulum-v4")
    assert (plain["predictor"], plain["predictor_trained_on"]) == ("none", "none")
    assert jumping["seconds_to_90"] == pytest.approx(10 * jumping["env_steps_to_90"] / 4000)
    assert [cells["env steps to 90%"] == "not reached" for cells in table(rows)] == [False, True, False]


def test_sentences_say_where_it_does_not_help() -> None:
    rows = score(
        [
            finished("10", rising(100, 1)),
            finished("4", rising(60, 1)),
            finished("4+ridge", rising(101, 4)),
            finished("4+tipl", rising(50, 1)),
        ],
        "InvertedPendulum-v4",
        RESAMPLING,
    )
    said = "\n".join(sentences(rows, 0.95))
    assert (
        "4+ridge with 40% of the gradient steps of 10 has an area under the curve of 48 against 50, no significant"
        in said
    )
    assert "TIPL is worse than the ridge, by 24" in said
    assert "4+tipl does not help: without jumps 4 has 30, with them 24" in said
    assert "4+ridge does not help" not in said


def test_a_trial_that_falls_below_half_of_its_best_has_collapsed() -> None:
    returns_SI = rising(100)
    returns_SI[3, 20:] = 10.0
    assert finished("10", returns_SI).num_collapsed == 1


@pytest.mark.parametrize(
    ("returns_I", "collapsed"),
    [
        (np.linspace(-500, -100, 40), 0),  # rises to its best, below 0
        (np.full(40, -1000.0), 0),
        (np.linspace(-500, 2, 40) - 3 * (np.arange(40) > 35), 0),  # ends a hair below 0, far above where it began
        (np.concatenate([np.linspace(-500, -100, 30), np.full(10, -480.0)]), 1),
        (np.concatenate([np.linspace(0, 100, 30), np.full(10, 45.0)]), 1),
    ],
)
def test_a_collapse_is_a_fall_and_not_a_negative_return(returns_I: np.ndarray, collapsed: int) -> None:
    assert finished("10", returns_I[None]).num_collapsed == collapsed


@pytest.mark.parametrize("height", [-100.0, 0.0])
def test_shares_are_of_areas_that_are_clearly_above_nothing(height: float) -> None:
    """A better one would be "0.842 of the first" where both are negative."""
    units = [
        finished(name, rising(height if task == "Swimmer-v4" else 100.0, 1.0) + better, task)
        for task in ("Swimmer-v4", "Hopper-v4")
        for name, better in (("10", 0.0), ("4", 10.0))
    ]
    first, second = over_tasks(units, RESAMPLING)
    assert (first["tasks"], second["tasks"]) == (1, 1)
    assert second["share"] == pytest.approx(59.5 / 49.5)
    assert over_tasks(units[:2], RESAMPLING) == []
    rows = score(units[:2], "InvertedPendulum-v4", RESAMPLING)
    assert ", more (difference +10, " in sentences(rows, 0.95)[0]
    # Within a tenth of a final return below 0 is below it, too.
    assert rows[1]["env_steps_to_90"] is not None


@pytest.mark.parametrize(("trials", "verdict"), [(1, "too few"), (2, "too few"), (3, "too few"), (4, "more")])
def test_a_verdict_says_what_it_rests_on_and_few_trials_have_none(trials: int, verdict: str) -> None:
    units = [
        finished("10", rising(100, 1)[:trials]),
        finished("4", rising(60)[:trials] + 900),
    ]
    units += [finished("4+ridge", rising(50, 1)[:trials]), finished("4+tipl", rising(30, 1)[:trials])]
    rows = score(units, "InvertedPendulum-v4", RESAMPLING)
    lines = sentences(rows, 0.95)
    assert f" {verdict}" in lines[0]
    assert all(f"over {trials} trials)" in line for line in lines)
    assert "nan" not in "\n".join([*lines, *(cell for cells in table(rows) for cell in cells.values())])
    assert any("TIPL is worse than the ridge, by" in line for line in lines) == (verdict == "more")
    assert any("4+ridge does not help" in line for line in lines) == (verdict == "more")


def test_from_where_it_diverged_a_trial_counts_as_the_lowest_return_on_its_task() -> None:
    broken_SI = rising(100, 1.0)
    broken_SI[2, 5:], broken_SI[3] = np.nan, np.nan
    lowest = finished("4", rising(10) - 50)
    first, second, other = comparable(
        [
            dataclasses.replace(finished("10", broken_SI), num_diverged=2),
            lowest,
            finished("10", rising(1) - 900, task="Walker2d-v4"),
        ]
    )
    np.testing.assert_array_equal(first.returns_SI[2, 5:], -50.0)
    np.testing.assert_array_equal(first.returns_SI[3], -50.0)
    np.testing.assert_array_equal(first.returns_SI[2, :5], broken_SI[2, :5])
    np.testing.assert_array_equal(second.returns_SI, lowest.returns_SI)
    assert other.returns_SI.min() == -900
    rows = score([first, second], "InvertedPendulum-v4", RESAMPLING)
    assert rows[0]["diverged"] == 2
    assert "2 of 10 trials of 10 diverged" in "\n".join(sentences(rows, 0.95))


def test_a_learning_rate_at_which_trials_diverge_is_chosen_last() -> None:
    def at(rate: float, returns_SI: np.ndarray) -> Finished:
        one = finished("10", returns_SI)
        return dataclasses.replace(one, unit=dataclasses.replace(one.unit, learning_rate=rate, search=True))

    nothing = np.full((3, 40), np.nan)
    assert best_learning_rate([at(1e-3, rising(5) - 100), at(10.0, nothing)]) == 1e-3
    assert best_learning_rate([at(1e-3, nothing), at(10.0, nothing)]) == 1e-3


def test_tasks_count_alike_whatever_their_returns() -> None:
    units = [
        finished(name, height * rising(share), task)
        for task, height in (("Hopper-v4", 10.0), ("Walker2d-v4", 1000.0))
        for name, share in (("10", 1.0), ("4+ridge", 1.5))
    ]
    first, second = over_tasks(units, RESAMPLING)
    assert (first["share"], second["share"]) == (pytest.approx(1.0), pytest.approx(1.5))
