"""Contenders and their scores: what a name means, and what hand-made curves must come to."""

import dataclasses

import numpy as np
import pytest

from tipl_ray.accelerate import figures
from tipl_ray.accelerate.acceleration import source_experiment
from tipl_ray.accelerate.contenders import Fitted, Unit, epochs_of, jump_question, jump_settings
from tipl_ray.accelerate.group_jumps import Jumps
from tipl_ray.accelerate.scores import (
    Finished,
    best_value,
    comparable,
    filled,
    over_tasks,
    score,
    search_rows,
    sentences,
    sentences_over_tasks,
    table,
)
from tipl_ray.config import Accelerate, Collect, Contender, Experiment, Jump, OuterStep, Ppo, RunTask, Where
from tipl_ray.evaluate.metrics import Resampling, interquartile_mean
from tipl_ray.ppo.algorithms import NOTHING
from tipl_ray.predict.baselines import Ridge

ANY = SOURCE = Experiment(name="source")
RESAMPLING = Resampling(confidence=0.95, bootstrap=500, seed=0)


def named(name: str) -> Contender:
    """`EPOCHS` or `EPOCHS+PREDICTOR`, as the contenders of the shipped experiments are called."""
    epochs, _, predictor = name.partition("+")
    jump = Jump(predictor=predictor) if predictor else None
    return Contender(name=name, ppo={"num_epochs": int(epochs)}, jump=jump)


def finished(name: str, returns_SI: np.ndarray, task: str = "Hopper-v4") -> Finished:
    contender, iterations = named(name), returns_SI.shape[1]
    epochs = epochs_of(contender, ANY)
    unit = Unit(task=task, env_steps=100 * iterations, contender=contender, value=1e-3, search=False)
    return Finished(
        unit=unit,
        returns_SI=returns_SI,
        env_steps_I=100 * np.arange(1, iterations + 1),
        gradient_steps_I=epochs * 32 * np.arange(1, iterations + 1),
        epochs=epochs,
        cpu_seconds=10.0 * len(returns_SI),
        jump_counts=[iterations, 0, 0] if contender.jump else [],
    )


def rising(height: float, spread: float = 0.0) -> np.ndarray:
    return np.linspace(0, height, 40) + spread * np.arange(-5, 5)[:, None]


def test_a_contender_jumps_over_what_is_left_of_the_sources_iteration() -> None:
    jump = Jump(predictor="tipl", damping=0.5, gate=True, networks="both", moments="reset")
    made = jump_settings(Contender(name="x", ppo={"num_epochs": 4}, jump=jump), ANY, SOURCE)
    assert (made.horizon, made.damping, made.corrective_epochs) == (3, 0.5, 0)
    assert (made.gate, made.networks, made.moments) == (True, "both", "reset")


def test_a_corrective_epoch_is_one_that_is_not_run_before_the_jump() -> None:
    contender = Contender(name="x", ppo={"num_epochs": 3}, jump=Jump(predictor="first-again", corrective_epochs=1))
    assert (contender.epochs_before_jump(ANY.ppo), epochs_of(contender, ANY)) == (2, 3)
    made = jump_settings(contender, ANY, SOURCE)
    assert (made.horizon, made.corrective_epochs) == (4, 1)


def test_a_rule_needs_no_iteration_of_the_sources_length() -> None:
    contender = Contender(name="x", ppo={"num_epochs": 20}, jump=Jump(predictor="first-again", horizon=1))
    question = jump_question(contender, ANY, SOURCE)
    assert (question.steps, question.snapshots_per_iteration) == ((1,), 11)
    learned = dataclasses.replace(contender, jump=Jump(predictor="ridge", horizon=1))
    with pytest.raises(ValueError, match="makes iterations of 22 epochs, but ridge is fitted on iterations of 10"):
        jump_question(learned, ANY, SOURCE)


@pytest.mark.parametrize("name", ["10+ridge", "3+ridge", "12+ridge"])
def test_epochs_that_leave_no_whole_snapshot_to_predict_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="both must be positive multiples of 2, the epochs between two snapshots"):
        jump_settings(named(name), ANY, SOURCE)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"name": ""}, "name='' is empty"),
        ({"name": "a\nb"}, "cannot be part of a name"),
        ({"jump": Jump(predictor="rigde")}, r"did you mean ridge\?"),
        ({"jump": Jump(predictor="dmd"), "outer": OuterStep()}, "both a jump and an outer step"),
        ({"ppo": {"learning_rate": 1e-3}}, r"ppo.learning_rate=0.001 is set but also searched"),
        ({"ppo": {"num_epoch": 3}}, r"ppo.num_epoch=3: unknown key; did you mean ppo.num_epochs"),
        ({"ppo": {"num_epochs": 0}}, r"ppo.num_epochs=0 is below 1"),
        ({"ppo": {"num_epochs": 2.5}}, r"ppo.num_epochs=2.5"),
        ({"ppo": {"replicas": 2, "target_kl": 0.1}}, "ppo.replicas=2 must all take the same steps"),
        ({"searched": "desired_kl"}, "searched='desired_kl' needs values"),
        ({"searched": "desired_kl", "values": (0.01, 0.02)}, "2 values to search, but accelerate.learning_rates has 5"),
        ({"values": (3.0, 2.0, 1.0, 4.0, 5.0)}, "must increase"),
        ({"jump": Jump(predictor="first-again", corrective_epochs=10)}, "leaves no epoch of ppo.num_epochs"),
        (
            {"ppo": {"num_steps": 4_000_000}},
            "ppo.num_steps=4000000 is more than the [0-9]+ environment steps of a trial",
        ),
    ],
)
def test_a_contender_that_means_nothing_is_refused_by_name(fields: dict, words: str) -> None:
    contender = Contender(**{"name": "mine", **fields})
    accelerate = Accelerate(contenders=(Contender(name="10"), contender))
    with pytest.raises(ValueError, match=words) as refusal:
        Experiment(name="any", accelerate=accelerate).check("accelerate")
    assert str(refusal.value).startswith(f"accelerate.contenders: {contender.name!r}: ")


def test_some_of_the_contenders_run_and_the_first_always() -> None:
    names = [one.name for one in Accelerate(only=("4+ridge",)).running]
    assert names == ["10", "4+ridge"]
    with pytest.raises(ValueError, match=r"accelerate\.only='4\+rigde'"):
        Accelerate(only=("4+rigde",)).check()
    # What does not run need not have as many values to search.
    other = Contender(name="other", values=(1e-3, 2e-3))
    Accelerate(
        contenders=(Contender(name="10"), Contender(name="4"), other), only=("4",), learning_rates=(1e-3,)
    ).check()
    with pytest.raises(ValueError, match="every variant needs the same budget"):
        Accelerate(contenders=(Contender(name="10"), other), learning_rates=(1e-3,)).check()


def test_a_unit_runs_its_contender_on_its_seeds_in_a_storage_of_its_own() -> None:
    experiment = Experiment(name="e", where=Where(storage="/s"), collect=Collect(first_seed=101, num_trials=10))
    plain, jumping = (
        Unit(task="Hopper-v4", env_steps=4096, contender=named(name), value=1e-3, search=search)
        for name, search in (("4", True), ("4+ridge", False))
    )
    ridge = Ridge(jump_question(named("4+ridge"), ANY, SOURCE))
    jumps = jumping.extension(experiment, SOURCE, {"4+ridge": Fitted(predictor=ridge, digest="a")})
    assert isinstance(jumps, Jumps)
    assert plain.extension(experiment, SOURCE, {}) is NOTHING
    first, second = plain.experiment(experiment, SOURCE, NOTHING), jumping.experiment(experiment, SOURCE, jumps)
    assert first.collect.seeds == (10_001, 10_002, 10_003, 10_004, 10_005)
    assert second.collect.seeds == tuple(range(101, 111))
    assert (first.ppo.num_epochs, first.ppo.learning_rate, first.collect.task) == (4, 1e-3, "Hopper-v4")
    assert second.snapshots_per_iteration == 2
    assert jumps.snapshots_per_iteration(second) == 5
    assert first.storage_path != second.storage_path
    moved = experiment.at("/t")
    for digest, same in (("a", True), ("b", False)):
        elsewhere = jumping.experiment(moved, SOURCE, dataclasses.replace(jumps, digest=digest))
        assert (elsewhere.storage_path.removeprefix("/t") == second.storage_path.removeprefix("/s")) == same


def test_units_are_named_as_they_always_were() -> None:
    experiment = Experiment(name="e", where=Where(storage="/s"), collect=Collect(first_seed=101, num_trials=10))
    gated = Contender(name="4+ridge", ppo={"num_epochs": 4}, jump=Jump(predictor="ridge", gate=True))
    names = []
    for contender in (named("4"), gated):
        unit = Unit(task="Hopper-v4", env_steps=4096, contender=contender, value=1e-3, search=True)
        fitted = Fitted(predictor=Ridge(jump_question(named("4+ridge"), ANY, SOURCE)), digest="a")
        extension = unit.extension(experiment, SOURCE, {"4+ridge": fitted})
        names.append(unit.experiment(experiment, SOURCE, extension).storage_path)
    assert names == ["/s/units/029cd8e64253ee5f", "/s/units/0a732ad7ddb3333a"]


def test_a_contender_is_what_its_section_says_and_nothing_else_of_ppo_changes() -> None:
    contender = Contender(name="x", ppo={"schedule": "constant"}, searched="desired_kl", values=(0.01, 0.02))
    unit = Unit(task="Hopper-v4", env_steps=4096, contender=contender, value=0.02, search=False)
    made = unit.experiment(dataclasses.replace(ANY, ppo=Ppo(learning_rate=1e-3)), SOURCE, NOTHING)
    assert made.ppo == Ppo(learning_rate=1e-3, schedule="constant", desired_kl=0.02)
    assert unit.hyperparameters == "desired_kl=0.02"
    odd = dataclasses.replace(unit, contender=Contender(name="3", ppo={"num_epochs": 3}))
    assert odd.experiment(ANY, SOURCE, NOTHING).collect.epochs_per_snapshot == 1


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
    assert "4+ridge, with 40% of the gradient steps of 10, has an area under the curve of 48 vs. 50: no sig" in said
    assert "TIPL is worse than ridge by 24" in said
    assert "4+tipl does not help: its area is 24 vs. 30 for 4 without jumps" in said
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
    assert ": higher (difference +10, " in sentences(rows, 0.95)[0]
    # Within a tenth of a final return below 0 is below it, too.
    assert rows[1]["env_steps_to_90"] is not None


@pytest.mark.parametrize(("trials", "verdict"), [(1, "too few"), (2, "too few"), (3, "too few"), (4, "higher")])
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
    assert any("TIPL is worse than ridge by" in line for line in lines) == (verdict == "higher")
    assert any("4+ridge does not help" in line for line in lines) == (verdict == "higher")


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


def searched(rate: float, returns_SI: np.ndarray, task: str = "Hopper-v4") -> Finished:
    one = finished("10", returns_SI, task)
    return dataclasses.replace(one, unit=dataclasses.replace(one.unit, value=rate, search=True))


def test_a_learning_rate_at_which_trials_diverge_is_chosen_last() -> None:
    nothing = np.full((3, 40), np.nan)
    assert best_value([searched(1e-3, rising(5) - 100), searched(10.0, nothing)]) == 1e-3
    assert best_value([searched(1e-3, nothing), searched(10.0, nothing)]) == 1e-3


def test_one_setting_for_all_tasks_is_the_one_with_the_best_mean_rank() -> None:
    """Whatever a task's returns are: the large ones of one task do not decide for the others."""
    areas = {"A-v4": (10_000.0, 2.0, 1.0), "B-v4": (1.0, 3.0, 2.0), "C-v4": (1.0, 3.0, 2.0)}
    cells = [
        searched(rate, np.full((3, 40), area), task)
        for task, row in areas.items()
        for rate, area in zip((1e-4, 2e-4, 3e-4), row, strict=True)
    ]
    assert best_value(cells) == 2e-4
    assert best_value(cells[:3]) == 1e-4
    # Equal ranks: what is nearer to the best on each task.
    even = [searched(r, np.full((3, 40), a), t) for t, r, a in [("A", 1.0, 9.0), ("A", 2.0, 10.0), ("A", 3.0, 0.0)]]
    even += [searched(r, np.full((3, 40), a), t) for t, r, a in [("B", 1.0, 10.0), ("B", 2.0, 1.0), ("B", 3.0, 0.0)]]
    assert best_value(even) == 1.0


def test_tasks_count_alike_whatever_their_returns() -> None:
    units = [
        finished(name, height * rising(share), task)
        for task, height in (("Hopper-v4", 10.0), ("Walker2d-v4", 1000.0))
        for name, share in (("10", 1.0), ("4+ridge", 1.5))
    ]
    first, second = over_tasks(units, RESAMPLING)
    assert (first["share"], second["share"]) == (pytest.approx(1.0), pytest.approx(1.5))
    assert (first["better"], second["better"]) == (0.5, 1.0)
    assert second["share_of_gradient_steps"] == 0.4


def test_tasks_that_no_setting_was_chosen_on_are_told_apart() -> None:
    units = [
        finished(name, 100 * rising(share if task == "Walker2d-v4" else 1.0, 0.01), task)
        for task in ("Hopper-v4", "Walker2d-v4")
        for name, share in (("10", 1.0), ("4", 2.0))
    ]
    rows = over_tasks(units, RESAMPLING, ["Hopper-v4"])
    assert [(row["scope"], row["contender"], row["tasks"]) for row in rows] == [
        ("all tasks", "10", 2),
        ("all tasks", "4", 2),
        ("held-out tasks", "10", 1),
        ("held-out tasks", "4", 1),
    ]
    assert rows[3]["share"] == pytest.approx(2.0, rel=0.05)
    held = score(units, "InvertedPendulum-v4", RESAMPLING, ["Hopper-v4"])
    assert [row["held_out"] for row in held] == [False, False, True, True]
    # What has a setting for each task was tuned on the held-out ones too.
    oracle = dataclasses.replace(units[0].unit.contender, name="oracle", per_task=True)
    oracles = [dataclasses.replace(one, unit=dataclasses.replace(one.unit, contender=oracle)) for one in units[::2]]
    assert not any(row["held_out"] for row in score(oracles, "InvertedPendulum-v4", RESAMPLING, ["Hopper-v4"]))
    scopes = [row["scope"] for row in over_tasks([*units, *oracles], RESAMPLING, ["Hopper-v4"])]
    assert (scopes.count("all tasks"), scopes.count("held-out tasks")) == (3, 2)


def test_the_probability_of_improvement_is_that_of_pairs_of_trials() -> None:
    """Three of four pairs, by hand: 2 > 1, 4 > 1, 4 > 3, and 2 < 3."""
    units = [
        finished(name, np.stack([np.full(40, area) for area in areas]))
        for name, areas in (("10", (1.0, 3.0)), ("4", (2.0, 4.0)))
    ]
    assert over_tasks(units, RESAMPLING)[1]["better"] == 0.75


def test_a_share_is_as_unsure_as_what_it_is_a_share_of() -> None:
    sure, unsure = rising(100), rising(100, 8)
    narrow, wide = (
        over_tasks([finished("10", first), finished("4", np.tile(sure, (10, 1)))], RESAMPLING)[1]
        for first in (np.tile(sure, (10, 1)), unsure)
    )
    assert narrow["share_high"] - narrow["share_low"] == pytest.approx(0)
    assert wide["share_high"] - wide["share_low"] > 0.05


@pytest.mark.parametrize(
    ("text", "task", "policy_hidden", "env_steps"),
    [
        ("Hopper-v4", "Hopper-v4", None, None),
        ("Hopper-v4@150000", "Hopper-v4", None, 150_000),
        ("HalfCheetah-v4/256-256", "HalfCheetah-v4", (256, 256), None),
        ("ALE/Pong-v5/16-32@1000", "ALE/Pong-v5", (16, 32), 1000),
        ("mine:Task-v0", "mine:Task-v0", None, None),
    ],
)
def test_a_task_is_named_with_its_widths_and_steps(
    text: str, task: str, policy_hidden: tuple[int, int] | None, env_steps: int | None
) -> None:
    assert RunTask.read(text) == (task, policy_hidden, env_steps)


@pytest.mark.parametrize(
    "text", ["", "@100", "Hopper-v4@", "Hopper-v4@0", "Hopper-v4@9999999999", "A/0-8", "A/8-99999"]
)
def test_a_task_that_means_nothing_is_refused_by_field(text: str) -> None:
    with pytest.raises(ValueError, match=r"accelerate\.tasks: '.*' is not TASK"):
        Accelerate(tasks=(text,)).check()


def test_a_task_of_another_width_has_units_of_its_own() -> None:
    contender = Contender(name="10")
    any_one = Experiment(name="any")
    source = source_experiment(any_one)
    ran = [
        Unit(task=task, env_steps=10_240, contender=contender, value=1e-3, search=False).experiment(
            Experiment(name="any"), source, NOTHING
        )
        for task in ("HalfCheetah-v4", "HalfCheetah-v4/16-32")
    ]
    assert [one.collect.policy_hidden for one in ran] == [(8, 8), (16, 32)]
    assert {one.collect.task for one in ran} == {"HalfCheetah-v4"}
    assert ran[0].storage_path != ran[1].storage_path


@pytest.mark.parametrize("trials", [1, 2])
def test_of_fewer_than_three_trials_there_are_no_intervals(trials: int) -> None:
    units = [finished("10", rising(100.0, 1.0)[:trials]), finished("4", rising(110.0, 1.0)[:trials])]
    rows = score(units, "any", RESAMPLING)
    together = over_tasks(units, RESAMPLING)
    assert rows[1]["share"] == together[1]["share"] == pytest.approx(1.1, abs=0.02)
    for row in (*rows, *together):
        ends = [value for name, value in row.items() if name.endswith(("_low", "_high")) and value is not None]
        assert len(ends) >= 4
        assert np.isnan(ends).all()
    assert "nan" not in " ".join(sentences_over_tasks(together, 1)) + str(table(rows))
    figures.shares(together)
    figures.areas(rows)


def test_a_search_marks_the_chosen_setting_of_each_length() -> None:
    contender = named("10")
    units = [
        Unit(task="Hopper-v4", env_steps=env_steps, contender=contender, value=value, search=True)
        for env_steps in (4000, 8000)
        for value in (1e-3, 2e-3)
    ]
    searched = [dataclasses.replace(finished("10", rising(10.0)), unit=unit) for unit in units]
    rows = search_rows(searched, {units[0], units[3]})
    assert [row["chosen"] for row in rows] == [True, False, False, True]
