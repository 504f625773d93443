import numpy as np
import pytest

from tipl_ray.evaluate import metrics

pytestmark = pytest.mark.filterwarnings("error")

RESAMPLING = metrics.Resampling(confidence=0.95, bootstrap=200, seed=0)


def table_of(num_trials: int = 4, windows_per_trial: int = 30, num_steps: int = 3, seed: int = 0) -> metrics.Table:
    """Results of a predictor that is off by half the displacement; policies are run in every third window."""
    generator = np.random.default_rng(seed)
    trial, start, step = np.meshgrid(
        np.arange(num_trials) + 40, np.arange(windows_per_trial) + 19, np.arange(1, num_steps + 1), indexing="ij"
    )
    num_rows = trial.size
    displacement = generator.exponential(size=num_rows) * step.ravel()
    run = start.ravel() % 3 == 0
    returns = {
        name: np.where(run, generator.normal(500.0, 10.0, num_rows), np.nan)
        for name in ("return_true", "return_true_again", "return_predicted", "return_last")
    }
    return {
        "task": np.full(num_rows, "InvertedPendulum-v4", object),
        "trial": trial.ravel(),
        "start": start.ravel().astype(np.int32),
        "phase": (start.ravel() % 5).astype(np.int8),
        "third": (start.ravel() * 3 // (windows_per_trial + 19)).astype(np.int8),
        "predictor": np.full(num_rows, "tipl", object),
        "predictor_seed": np.zeros(num_rows, np.int16),
        "basis": np.full(num_rows, "trial", object),
        "causal": np.zeros(num_rows, bool),
        "step": step.ravel().astype(np.int16),
        "num_weights": np.full(num_rows, 122, np.int32),
        "squared_error": 0.25 * displacement,
        "displacement_squared": displacement,
        "distance_true": np.where(run, 2.0, np.nan),
        "distance_predicted": np.where(run, 1.0, np.nan),
        **returns,
    }


def summary(table: metrics.Table) -> list[dict]:
    return metrics.summarise(table, RESAMPLING, trained_on="InvertedPendulum-v4")


def test_copying_the_last_snapshot_has_skill_exactly_0_and_beats_last_half_the_time():
    table = table_of()
    table |= {"squared_error": table["displacement_squared"], "return_predicted": table["return_last"]}
    for row in summary(table):
        assert (row["skill"], row["skill_low"], row["skill_high"]) == (0.0, 0.0, 0.0)
        assert row["beats_last"] == 0.5


def test_predictor_that_is_given_the_truth_has_skill_1_and_repw_equal_to_the_noise_floor():
    table = table_of()
    table |= {
        "squared_error": np.zeros_like(table["squared_error"]),
        "return_predicted": table["return_true_again"],
    }
    for row in summary(table):
        assert (row["skill"], row["skill_low"], row["skill_high"], row["wpe"]) == (1.0, 1.0, 1.0, 0.0)
        assert row["repw"] == row["repw_noise_floor"] > 0.0


def test_half_the_displacement_is_a_skill_of_three_quarters():
    table = table_of()
    assert metrics.skill(table) == pytest.approx(0.75)
    assert metrics.wpe(table) == pytest.approx((0.25 * table["displacement_squared"] / 122).mean())


def test_repw_counts_only_the_windows_whose_policies_were_run():
    table = table_of()
    run = ~np.isnan(table["return_true"])
    assert 0 < run.sum() < len(run)
    difference = (table["return_predicted"] - table["return_true"])[run]
    assert metrics.repw(table) == pytest.approx(np.abs(difference).mean())
    assert metrics.repw_signed(table) == pytest.approx(difference.mean())


def test_figures_of_policies_never_run_are_nan_and_weights_are_still_judged():
    table = table_of()
    for name in ("return_true", "return_true_again", "return_predicted", "return_last"):
        table[name] = np.full_like(table[name], np.nan)
    for row in summary(table):
        assert np.isnan([row["repw"], row["repw_low"], row["repw_noise_floor"], row["beats_last"]]).all()
        assert row["skill"] == pytest.approx(0.75)


def test_skill_where_nothing_moved_is_nan():
    table = table_of()
    table |= {"squared_error": 0.0 * table["squared_error"], "displacement_squared": 0.0 * table["squared_error"]}
    assert np.isnan(metrics.skill(table))
    assert np.isnan(summary(table)[0]["skill_low"])


def test_ties_with_the_last_policy_count_half():
    table = {"return_predicted": np.array([3.0, 2.0, 1.0, 2.0, np.nan]), "return_last": np.array([2.0] * 4 + [np.nan])}
    assert metrics.beats_last(table) == (1 + 0.5 + 0 + 0.5) / 4


def test_interval_holds_the_figure_and_is_the_same_for_the_same_seed():
    table = table_of(num_trials=8)
    table["squared_error"] = table["squared_error"] * (1 + 0.2 * (table["trial"] % 3))
    row = summary(table)[0]
    assert row["skill_low"] < row["skill"] < row["skill_high"]
    assert row["repw_low"] < row["repw"] < row["repw_high"]
    assert 0 < abs(row["repw_signed"]) < row["repw"]
    assert summary(table) == summary(table)


def test_interval_resamples_trials_and_not_windows():
    num_windows = 1000
    trials = np.repeat([1, 2, 3, 4], num_windows)
    errors = np.repeat([0.0, 0.0, 1.0, 1.0], num_windows)
    resampling = metrics.Resampling(confidence=0.95, bootstrap=500, seed=0)
    assert resampling.interval(trials, errors, np.ones(4 * num_windows)) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("num_trials", "by_percentiles", "expanded"), [(5, 0.845, 0.925), (10, 0.9, 0.95), (50, 0.95, 0.955)]
)
def test_intervals_hold_the_mean_about_as_often_as_they_say_also_of_few_trials(num_trials, by_percentiles, expanded):
    """Of trials from a normal distribution; no bootstrap of five leaves the five, so of them it is 92 times in 100."""
    resampling = metrics.Resampling(confidence=0.95, bootstrap=2_000, seed=0)
    values_MN = np.random.default_rng(1).standard_normal((1_500, num_trials))
    resampled_MR = resampling.resample(values_MN, statistic=lambda runs: runs.mean(axis=-1))
    for runs, expected in ((None, by_percentiles), (num_trials, expanded)):
        low_M, high_M = np.array([resampling.ends(drawn_R, runs) for drawn_R in resampled_MR]).T
        assert ((low_M <= 0) & (high_M >= 0)).mean() == pytest.approx(expected, abs=0.015)
    of_first = resampling.interval(np.arange(num_trials), values_MN[0], np.ones(num_trials))
    assert of_first == pytest.approx(resampling.ends(resampled_MR[0], num_trials))


@pytest.mark.parametrize("num_trials", [1, 2])
def test_too_few_trials_have_no_interval_however_many_windows(num_trials):
    row = summary(table_of(num_trials=num_trials, windows_per_trial=300))[0]
    assert np.isnan([row["skill_low"], row["skill_high"], row["repw_low"], row["repw_high"]]).all()
    assert row["skill"] == pytest.approx(0.75)
    pairs = metrics.compare(two_predictors(num_trials), "tipl", RESAMPLING)
    assert all(np.isnan(pair["difference_low"]) and pair["trials"] == num_trials for pair in pairs)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_forecast_that_diverged_leaves_no_interval_and_no_warning(value):
    table = two_predictors()
    spoilt = (table["predictor"] == "tipl") & (table["trial"] == 41) & (table["step"] == 1)
    table["squared_error"] = np.where(spoilt, value, table["squared_error"])
    table["return_predicted"] = np.where(spoilt, value, table["return_predicted"])
    first, second = (row for row in summary(table) if row["predictor"] == "tipl" and row["step"] < 3)
    assert not np.isfinite(first["skill"])
    assert np.isnan([first["skill_low"], first["skill_high"]]).all()
    assert second["skill"] == pytest.approx(0.75)
    assert np.isfinite(second["skill_low"])
    assert not any(np.isfinite(row["difference_low"]) for row in metrics.compare(table, "tipl", RESAMPLING)[:1])


def test_seeds_of_which_one_diverged_have_no_deviation():
    good, lost = table_of(), table_of()
    lost |= {"predictor_seed": np.ones_like(lost["predictor_seed"]), "squared_error": np.inf * lost["squared_error"]}
    both = {name: np.concatenate([good[name], lost[name]]) for name in good}
    assert all(np.isnan(row["skill_over_seeds"]) for row in summary(both))


def test_an_interquartile_mean_never_drops_a_nan_without_a_word():
    assert metrics.interquartile_mean(np.array([1.0, 2.0, 3.0, 10.0])) == 2.5
    assert np.isnan(metrics.interquartile_mean(np.array([1.0, 2.0, 3.0, np.nan])))
    assert np.isnan(metrics.interquartile_mean(np.empty((3, 0)))).all()
    assert metrics.interquartile_mean(np.array([-np.inf, 2.0, 3.0, 10.0])) == 2.5, "the worst quarter is left out"


def test_summary_has_one_row_per_predictor_basis_and_step_in_order():
    ours, theirs = table_of(), table_of(seed=1)
    theirs["predictor"] = np.full_like(theirs["predictor"], "linear")
    rows = summary({name: np.concatenate([ours[name], theirs[name]]) for name in ours})
    assert [(row["predictor"], row["step"]) for row in rows] == [
        (predictor, step) for predictor in ("linear", "tipl") for step in (1, 2, 3)
    ]
    assert {(row["windows"], row["trials"]) for row in rows} == {(120, 4)}
    columns = "task trained_on predictor basis causal step skill skill_low skill_high wpe repw repw_low repw_high"
    more = (
        "repw_signed repw_noise_floor beats_last returns_spread returns_spread_true distance distance_true seeds "
        "skill_over_seeds windows trials"
    )
    assert " ".join(rows[0]) == f"{columns} {more}"


def test_groups_by_phase_share_out_every_row():
    table = table_of()
    groups = {value: rows for (value,), rows in metrics.by(table, "phase")}
    assert list(groups) == [0, 1, 2, 3, 4]
    assert sum(len(rows["trial"]) for rows in groups.values()) == len(table["trial"])
    for phase, rows in groups.items():
        assert (rows["phase"] == phase).all()


def two_predictors(num_trials: int = 6) -> metrics.Table:
    """TIPL of skill 0.75 and a ridge of skill 0.5, on windows that move by very different amounts."""
    ours = table_of(num_trials)
    theirs = {**ours, "predictor": np.full_like(ours["predictor"], "ridge")}
    theirs["squared_error"] = 0.5 * ours["displacement_squared"]
    mixed = np.random.default_rng(0).permutation(2 * len(ours["trial"]))
    return {name: np.concatenate([ours[name], theirs[name]])[mixed] for name in ours}


def test_comparison_is_the_difference_of_skills_and_far_surer_than_either():
    table = two_predictors()
    table["squared_error"] = table["squared_error"] * (1 + 0.3 * (table["trial"] % 3))
    rows = metrics.compare(table, "tipl", RESAMPLING)
    single = {(row["predictor"], row["step"]): row for row in summary(table)}
    assert [(row["against"], row["step"]) for row in rows if row["group"] == "all"] == [
        ("ridge", 1),
        ("ridge", 2),
        ("ridge", 3),
    ]
    for row in rows[:3]:
        ours, theirs = single["tipl", row["step"]], single["ridge", row["step"]]
        assert row["skill_difference"] == pytest.approx(ours["skill"] - theirs["skill"])
        width = row["difference_high"] - row["difference_low"]
        assert 0 < width < ours["skill_high"] - ours["skill_low"] + theirs["skill_high"] - theirs["skill_low"]


def test_comparison_against_itself_in_other_words_is_exactly_0():
    table = two_predictors()
    table["squared_error"] = table["displacement_squared"].copy()
    for row in metrics.compare(table, "tipl", RESAMPLING):
        assert (row["skill_difference"], row["difference_low"], row["difference_high"]) == (0.0, 0.0, 0.0)


def test_comparisons_by_phase_and_third_add_up_to_the_whole():
    table = two_predictors()
    rows = metrics.compare(table, "tipl", RESAMPLING)
    assert {(row["group"], row["value"]) for row in rows} == {
        ("all", -1),
        *(("phase", phase) for phase in range(5)),
        *(("third", int(third)) for third in np.unique(table["third"])),
    }
    assert all(row["skill_difference"] == pytest.approx(0.25) for row in rows)


def test_skill_by_group_says_what_share_of_all_movement_a_group_has():
    table = two_predictors()
    rows = metrics.group_skills(table, RESAMPLING)
    assert {row["group"] for row in rows} == {"phase", "third"}
    phases = [row for row in rows if row["group"] == "phase"]
    assert len(phases) == 2 * 3 * 5
    ours = [row for row in phases if row["predictor"] == "tipl"]
    assert all(row["skill"] == pytest.approx(0.75) for row in ours)
    total = table["displacement_squared"][table["predictor"] == "tipl"].sum()
    assert sum(row["displacement_squared"] for row in ours) == pytest.approx(total)


def test_empty_table_has_an_empty_summary():
    assert summary({name: values[:0] for name, values in table_of().items()}) == []


def test_a_predictor_of_several_seeds_is_judged_by_their_mean():
    good, bad = table_of(), table_of()
    bad |= {
        "predictor_seed": np.ones_like(bad["predictor_seed"]),
        "squared_error": 0.75 * bad["displacement_squared"],
    }
    both = {name: np.concatenate([good[name], bad[name]]) for name in good}
    for row, alone in zip(summary(both), summary(good), strict=True):
        assert row["skill"] == pytest.approx(0.5)
        assert (row["seeds"], row["windows"], row["trials"]) == (2, alone["windows"], alone["trials"])
        assert row["skill_over_seeds"] == pytest.approx(np.std([0.25, 0.75], ddof=1))
        assert np.isnan(alone["skill_over_seeds"])
    copied = {**table_of(), "predictor": np.full(len(good["step"]), "copy-last", object)}
    copied |= {"squared_error": copied["displacement_squared"]}
    rows = metrics.compare({name: np.concatenate([both[name], copied[name]]) for name in good}, "tipl", RESAMPLING)
    assert [row["skill_difference"] for row in rows if row["group"] == "all"] == pytest.approx([0.5] * 3)


def test_policies_that_are_all_the_same_have_no_spread():
    collapsed = table_of()
    collapsed |= {"return_predicted": np.where(np.isnan(collapsed["return_true"]), np.nan, 400.0)}
    for row in summary(collapsed):
        assert row["returns_spread"] == 0.0 < row["returns_spread_true"]
        assert (row["distance"], row["distance_true"]) == (1.0, 2.0)
