import dataclasses
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from tipl_ray import drawing
from tipl_ray.accelerate import figures as accelerate_figures
from tipl_ray.evaluate import figures, metrics
from tipl_ray.sweep import figures as sweep_figures

RESAMPLING = metrics.Resampling(confidence=0.95, bootstrap=100, seed=0)
STEPS = range(1, 5)
SKILLS = {"tipl": 0.3, "copy-last": 0.0, "linear": -1.5, "svd-floor": 0.9}


def result_table(capped=False):
    """20 windows of one trial, 4 of them run; squared errors that make SKILLS exact at every step."""
    rng = np.random.default_rng(0)
    rows = [(start, name, step) for start in range(20) for name in SKILLS for step in STEPS]
    starts, names, steps = (np.array(column) for column in zip(*rows, strict=True))
    true = np.where(starts % 5 == 0, 1000.0 if capped else 50.0 * starts + steps, np.nan)
    displacement = rng.uniform(0.5, 1.5, len(rows))
    return {
        "task": np.full(len(rows), "InvertedPendulum-v4"),
        "trial": np.zeros(len(rows), int),
        "basis": np.full(len(rows), "none"),
        "causal": np.full(len(rows), True),
        "start": starts,
        "phase": starts % 5,
        "third": starts // 7,
        "predictor": names,
        "step": steps,
        "squared_error": displacement * (1 - np.array([SKILLS[name] for name in names])),
        "displacement_squared": displacement,
        "return_true": true,
        "return_predicted": true - (0.0 if capped else 10.0),
    }


def summary(run=True, names=tuple(SKILLS)):
    return [
        {
            "predictor": name,
            "basis": "trial" if name in ("tipl", "svd-floor") else "none",
            "step": step,
            "skill": SKILLS[name],
            "skill_low": SKILLS[name] - 0.1,
            "skill_high": SKILLS[name] + 0.1,
            "wpe": (1 - SKILLS[name]) * 1e-3 * step,
            "repw": 10.0 * step if run else None,
            "repw_low": 8.0 * step if run else None,
            "repw_high": 12.0 * step if run else None,
            "repw_noise_floor": 5.0 if run and name == "tipl" else None,
            "returns_spread": 90.0 if run else None,
            "returns_spread_true": 100.0 if run else None,
            "distance": 1.5 if run else None,
            "distance_true": 2.0 if run else None,
        }
        for name in names
        for step in STEPS
    ]


def path_table(returns=True):
    """Two trials of 30 snapshots on a parabola, each with three forecasts of 4 steps that go straight on."""
    rows = []
    for trial in (7, 8):
        rows += [(trial, -1, t, t, 0.1 * t * t, 10.0 * t if returns and t else np.nan) for t in range(30)]
        rows += [
            (trial, start, start + h, start + h, 0.1 * start * start, np.nan)
            for start in (6, 12, 18)
            for h in range(1, 5)
        ]
    names = ("trial", "start", "snapshot", "x", "y", "episodic_return")
    table = {name: np.array(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}
    return table | {name: np.full(len(rows), 0.5) for name in ("share_x", "share_y")}


@pytest.mark.parametrize(("returns", "label"), [(True, "episodic return"), (False, "snapshot")])
def test_paths_have_tipls_forecasts_on_top_and_colours_of_returns_or_of_progress(returns, label):
    figure = figures.paths(path_table(returns))
    panels = [axes for axes in figure.axes if axes.get_title()]
    assert [axes.get_title() for axes in panels] == ["Trial 7", "Trial 8", *["Close-up at snapshot 6"] * 2]
    assert panels[0].get_xlabel() == "1st direction (50% of variance)"
    for axes, forecasts, points in zip(panels, (3, 3, 1, 1), (30, 30, 9, 9), strict=True):
        lines = [line for line in axes.lines if line.get_color() == figures.COLOURS["tipl"]]
        assert [len(np.asarray(line.get_xdata())) for line in lines] == [5] * forecasts
        (cloud,) = axes.collections
        assert len(np.asarray(cloud.get_offsets())) == points
        assert np.isfinite(np.asarray(cloud.get_array())).all(), "the first snapshot has no return yet"
        assert min(line.get_zorder() for line in lines) > cloud.get_zorder()
    assert figure.axes[-1].get_ylabel() == label


def comparisons():
    return [
        {
            "against": "ridge",
            "group": "all" if phase < 0 else "phase",
            "value": phase,
            "step": step,
            "skill_difference": 0.01 * (phase + 2),
            "difference_low": 0.01 * phase,
            "difference_high": 0.01 * (phase + 4),
        }
        for phase in range(-1, 5)
        for step in STEPS
    ]


def skill_by(column, table):
    return figures.skill_by_group(metrics.group_skills(table, RESAMPLING), column)


def learning_curves(curves):
    return figures.learning_curves(curves, RESAMPLING)


def contenders(curves, title=""):
    return accelerate_figures.contenders(curves, title, RESAMPLING)


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def said(figure):
    """Everything that is written in a figure's panels, and above its legend."""
    title = figure.legends[0].get_title().get_text() if figure.legends else ""
    return " ".join([*(text.get_text() for axes in figure.axes for text in axes.texts), title]).replace("\n", " ")


def drawn(axes):
    """The lines that have points."""
    return [line for line in axes.lines if len(np.asarray(line.get_xdata())) > 2]


def points(line):
    return np.asarray(line.get_xdata(), dtype=float), np.asarray(line.get_ydata(), dtype=float)


def test_long_learning_curves_are_drawn_as_means_of_neighbours():
    steps, returns_SI = np.arange(1, 1001), np.random.default_rng(0).normal(size=(3, 1000))
    figure = contenders({"10": (steps, 320 * steps, returns_SI)})
    (line,) = drawn(figure.axes[0])
    across, up = points(line)
    np.testing.assert_array_equal(across, steps[3::4])
    assert up[0] == pytest.approx(metrics.interquartile_mean(returns_SI[:, :4].mean(axis=1)))


def all_figures():
    env_steps = np.arange(0, 1000, 100)
    curves = [(seed, env_steps, np.where(env_steps < 100 * seed, np.nan, env_steps + seed)) for seed in range(4)]
    history = [{"step": s, "loss": 1 / (1 + s), "validation_loss": 0.5 if s % 2 else None} for s in range(10)]
    ranks = [{"trial": t, "rank": r, "energy_outside": 0.1 / r, "mse": 1e-3 / r} for t in range(3) for r in (1, 2, 4)]
    return {
        "figure_2": figures.figure_2(result_table(), summary()),
        "skill_by_step": figures.skill_by_step(summary()),
        "skill_over_ridge": figures.skill_over_ridge(comparisons()),
        "skill_by_phase": skill_by("phase", result_table()),
        "skill_by_third": skill_by("third", result_table()),
        "learning_curves": learning_curves(curves),
        "reconstruction": figures.reconstruction(ranks),
        "training_curves": figures.training_curves(history),
    }


def test_every_figure_is_the_same_bytes_each_time():
    again = all_figures()
    for name, figure in all_figures().items():
        first = drawing.png(figure)
        assert first.startswith(b"\x89PNG")
        assert b"Software" not in first
        assert drawing.png(again[name]) == first


def test_every_axis_has_a_title_in_words_and_names_what_runs_along_it():
    for figure in all_figures().values():
        titles = [axes.get_title() for axes in figure.axes] + [figure.get_suptitle()]
        assert all(re.fullmatch(r"[\w' :,.\n]*", title) for title in titles)
        assert sum(bool(title) for title in titles) >= 1
        assert all(axes.get_xlabel() or axes.get_ylabel() for axes in figure.axes)


def test_figure_2_draws_both_errors_per_predictor_and_the_noise_floor():
    figure = figures.figure_2(result_table(), summary())
    errors, _, _, returns = figure.axes
    assert len(drawn(errors)) == len(SKILLS)
    assert errors.get_yscale() == "log"
    bands = len(returns.collections)
    assert bands == len(SKILLS)
    floor = [line for line in drawn(returns) if line.get_linestyle() == "--"]
    assert [points(line)[1].tolist() for line in floor] == [[5.0] * len(STEPS)]
    assert legend(figure)[0] == "TIPL"
    assert "REPW of true policies (noise floor)" in legend(figure)


def test_figure_2_scatters_every_policy_run_of_tipl_beside_copying():
    figure = figures.figure_2(result_table(), summary())
    _, tipl, copied, _ = figure.axes
    for axes in (tipl, copied):
        predicted, true = np.asarray(axes.collections[0].get_offsets()).T
        assert len(true) == 4 * len(STEPS)
        assert np.allclose(true - predicted, 10.0)
    assert tipl.get_xlim() == copied.get_xlim() == tipl.get_ylim() == copied.get_ylim()
    assert "mean absolute difference 10.0" in tipl.get_xlabel()


def test_points_at_the_same_place_are_counted_in_words():
    tipl = figures.figure_2(result_table(capped=True), summary()).axes[1]
    assert "100% of 16 points in the corner" in tipl.get_xlabel()


def test_figure_2_says_so_where_no_policies_were_run():
    table = {**result_table(), "return_true": np.full(20 * len(SKILLS) * len(STEPS), np.nan)}
    figure = figures.figure_2(table, summary(run=False))
    assert figure.axes[1].texts[0].get_text() == "no policies were rolled out"
    assert "no policies were rolled out" in said(figure)
    assert drawing.png(figure)


def test_figure_2_survives_weights_that_do_not_move():
    rows = [{**row, "wpe": 0.0, "skill": float("nan")} for row in summary()]
    assert drawing.png(figures.figure_2(result_table(), rows))
    assert drawing.png(figures.skill_by_step(rows))


def test_a_diverging_predictor_does_not_press_the_comparison_flat():
    rows = [{**row, "repw": 1e5} if row["predictor"] == "linear" else row for row in summary()]
    figure = figures.figure_2(result_table(), rows)
    returns = figure.axes[3]
    assert returns.get_ylim()[1] < 1000
    assert "linear extrapolation rises to 100,000" in figure.legends[0].get_title().get_text()


def test_skill_has_copying_as_its_zero_line_and_says_what_is_outside():
    figure = figures.skill_by_step(summary())
    (axes,) = figure.axes
    assert [points(line)[1].tolist() for line in axes.lines if line.get_label() == "copying the last snapshot"] == [
        [0, 0]
    ]
    assert len(drawn(axes)) == 3
    assert figure.legends[0].get_title().get_text() == "Outside the picture: linear extrapolation falls to -1.5"


def test_skill_by_phase_has_a_panel_per_phase_with_the_exact_skill():
    figure = skill_by("phase", result_table())
    assert len(figure.axes) == 5
    for axes in figure.axes:
        for line in drawn(axes):
            name = next(name for name, words in figures.NAMES.items() if words == line.get_label())
            assert np.allclose(line.get_ydata(), SKILLS[name])


def test_what_tipl_adds_has_a_line_for_all_windows_and_one_per_phase():
    figure = figures.skill_over_ridge(comparisons())
    lines = drawn(figure.axes[0])
    assert [line.get_label() for line in lines] == [*(f"phase {phase}" for phase in range(5)), "all windows"]
    assert np.allclose(points(lines[-1])[1], 0.01)
    assert "no better than the ridge" in legend(figure)


def test_predictors_whose_policies_were_not_run_stay_out_of_figure_2():
    idle = [{**row, "predictor": "dmd", "repw": None} for row in summary(names=("linear",))]
    figure = figures.figure_2(result_table(), [*summary(), *idle])
    assert "dynamic modes" not in legend(figure)
    assert "dynamic modes" in legend(figures.skill_by_step([*summary(), *idle]))


def test_skill_by_third_has_three_panels():
    figure = skill_by("third", result_table())
    assert [axes.get_title() for axes in figure.axes] == ["first third", "second third", "last third"]


def test_a_predictor_keeps_its_colour_from_picture_to_picture():
    def colours(figure):
        handles = figure.legends[0].legend_handles
        return {handle.get_label(): handle.get_color() for handle in handles}

    by_step, by_phase = (
        colours(figures.skill_by_step(summary())),
        colours(skill_by("phase", result_table())),
    )
    assert by_step["TIPL"] == by_phase["TIPL"] == figures.COLOURS["tipl"]
    assert by_step == by_phase
    assert len(set(by_step.values())) == len(by_step)


def test_two_bases_of_one_predictor_are_told_apart():
    rows = summary(names=("tipl",)) + [{**row, "basis": "shared"} for row in summary(names=("tipl",))]
    figure = figures.skill_by_step(rows)
    assert legend(figure)[:2] == ["TIPL, basis shared", "TIPL, basis trial"]
    assert len({line.get_linestyle() for line in drawn(figure.axes[0])}) == 2


def test_learning_curves_skip_nan_and_average_on_a_common_grid():
    env_steps = np.array([0, 100, 200, 300])
    curves = [
        (1, env_steps, np.array([np.nan, 100.0, 200.0, 300.0])),
        (2, env_steps, np.array([0.0, np.nan, 200.0, 300.0])),
        (3, env_steps, np.full(4, np.nan)),
    ]
    figure = learning_curves(curves)
    *trials, mean = figure.axes[0].lines
    assert len(trials) == 2
    env_steps_G, returns_G = points(mean)
    assert (env_steps_G[0], env_steps_G[-1]) == (100, 300)
    assert np.allclose(returns_G, env_steps_G)


def test_the_mean_returns_band_stays_within_the_trials():
    env_steps = np.arange(5)
    figure = learning_curves([(seed, env_steps, np.full(5, 900.0 + 50 * seed)) for seed in range(3)])
    heights = np.asarray(figure.axes[0].collections[0].get_paths()[0].vertices)[:, 1]
    assert heights.min() >= 900
    assert heights.max() <= 1000


def test_every_band_heeds_the_confidence_that_was_asked_for():
    steps, returns_NG = np.arange(20), np.random.default_rng(0).normal(size=(8, 20))
    trials = [(seed, steps, returns_G) for seed, returns_G in enumerate(returns_NG)]
    narrow, wide = (dataclasses.replace(RESAMPLING, confidence=level) for level in (0.5, 0.99))

    def height(figure):
        vertices = np.asarray(figure.axes[0].collections[0].get_paths()[0].vertices)
        return np.ptp(vertices[:, 1])

    for draw in (
        lambda how: figures.learning_curves(trials, how),
        lambda how: accelerate_figures.contenders({"10": (steps, 320 * steps, returns_NG)}, "", how),
    ):
        assert height(draw(narrow)) < height(draw(wide))
    assert "mean and its 50% interval" in legend(figures.learning_curves(trials, narrow))


def test_learning_curves_without_returns_say_that_no_episode_ended():
    for curves in ([(seed, np.arange(3), np.full(3, np.nan)) for seed in (1, 2)], []):
        figure = learning_curves(curves)
        assert f"No episode ended in any of the {len(curves)}" in said(figure)
        assert drawing.png(figure)


def test_one_trial_or_one_return_has_no_mean_and_no_interval():
    alone = learning_curves([(1, np.array([0, 100]), np.array([1.0, 2.0]))])
    assert legend(alone) == ["one trial (1 shown)"]
    steps = np.array([0, 100])
    once = learning_curves([(1, steps, np.array([np.nan, 2.0])), (2, steps, np.full(2, np.nan))])
    (line,) = once.axes[0].lines
    assert (points(line)[1].tolist(), line.get_marker()) == ([2.0], "o")
    assert legend(once) == ["one trial (1 of 2; no episode ended in the others)"]
    two = learning_curves([(seed, np.array([0, 100]), np.array([1.0, 2.0 + seed])) for seed in (1, 2)])
    assert legend(two)[1] == "their mean"
    assert not two.axes[0].collections


def test_reconstruction_has_a_line_per_trial_and_the_mean():
    figure = all_figures()["reconstruction"]
    for axes in figure.axes:
        assert len(axes.lines) == 4
        assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert np.allclose(figure.axes[0].lines[-1].get_ydata(), [0.1, 0.05, 0.025])


def test_reconstruction_leaves_out_exact_zeros():
    rows = [{"trial": 1, "rank": rank, "energy_outside": 0.0, "mse": 0.0} for rank in (1, 2)]
    assert drawing.png(figures.reconstruction(rows))


def test_validation_is_drawn_where_it_was_measured():
    training, validation = all_figures()["training_curves"].axes[0].lines
    assert len(training.get_xdata()) == 10
    assert points(validation)[0].tolist() == [1, 3, 5, 7, 9]


def test_training_without_validation_has_one_line():
    figure = figures.training_curves([{"step": step, "loss": 1.0} for step in range(3)])
    assert isinstance(figure, Figure)
    assert legend(figure) == ["training trials"]


def test_spread_shows_returns_beside_the_true_ones_and_distances_as_their_share():
    returns, distances = figures.spread(summary()).axes
    assert {tuple(line.get_ydata()) for line in drawn(returns)} == {(90.0,) * 4, (100.0,) * 4}
    assert all(tuple(line.get_ydata()) == (0.75,) * 4 for line in drawn(distances))
    assert "No policies were rolled out" in said(figures.spread(summary(run=False)))
    one_window = [{**row, "distance": None, "distance_true": 0.0} for row in summary()]
    assert "no two windows of one trial" in said(figures.spread(one_window))


def sweep_cells():
    """Two seeds of 2 ranks x 3 contexts; the best mean is at rank 16 and context 20."""
    return [
        {
            "basis.rank": rank,
            "model.context": context,
            "skill": {8.0: -20.0, 16.0: -10.0}[rank] + abs(context - 20) * -0.1 + seed,
            "ridge": 0.3 + context / 100,
        }
        for rank in (8.0, 16.0)
        for context in (10.0, 20.0, 40.0)
        for seed in (0, 1)
    ]


SWEEP_NAMES = {"model.context": "context", "basis.rank": "rank"}


def test_heat_map_has_the_means_and_a_row_of_the_ridges():
    (axes, bar) = sweep_figures.heat_map(sweep_cells(), "model.context", "basis.rank", SWEEP_NAMES).axes
    words = [text.get_text() for text in axes.texts]
    assert words[:3] == ["0.400", "0.500", "0.700"]
    assert words[7] == "-9.500\n± 0.707"
    assert [label.get_text() for label in axes.get_yticklabels()] == ["ridge", "8", "16"]
    (frame,) = axes.patches
    assert isinstance(frame, Rectangle)
    assert frame.get_xy() == pytest.approx((0.54, 1.56)), "the best cell is framed"
    less = sweep_figures.heat_map(sweep_cells(), "model.context", "basis.rank", SWEEP_NAMES, less=True).axes[0]
    (frame,) = less.patches
    assert isinstance(frame, Rectangle)
    lowest = min(sweep_cells(), key=lambda cell: cell["skill"] if cell["skill"] == cell["skill"] else 0.0)
    place = ([10.0, 20.0, 40.0].index(lowest["model.context"]), [8.0, 16.0].index(lowest["basis.rank"]) + 1)
    assert frame.get_xy() == pytest.approx((place[0] - 0.46, place[1] - 0.44)), "of a loss the lowest is the best"
    assert bar.get_ylabel() == "skill: 0 is copying, 1 is perfect"
    assert [label.get_text() for label in bar.get_yticklabels()] == ["-22", "-1", "0", "0.5", "1"]


def test_heat_map_has_a_column_of_what_each_rank_leaves_possible():
    cells = [cell | {"floor": {8.0: -5.25, 16.0: 0.5}[cell["basis.rank"]]} for cell in sweep_cells()]
    (axes, _) = sweep_figures.heat_map(cells, "model.context", "basis.rank", SWEEP_NAMES).axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["10", "20", "40", "upper bound\nof the basis"]
    words = [text.get_text() for text in axes.texts]
    assert (words[6], words[10]) == ("-5.250", "0.500")
    (frame,) = axes.patches
    assert isinstance(frame, Rectangle)
    assert frame.get_xy() == pytest.approx((0.54, 1.56)), "the best cell is a run's, not the bound's"
    cells = [cell | {"still": -cell["basis.rank"]} for cell in cells]
    (axes, _) = sweep_figures.heat_map(cells, "model.context", "basis.rank", SWEEP_NAMES).axes
    told = [label.get_text() for label in axes.get_xticklabels()]
    assert told == ["10", "20", "40", "last token\nrepeated", "upper bound\nof the basis"]
    assert {"-8.000", "-16"} <= {text.get_text() for text in axes.texts}


def colours(figure):
    """Colour of every cell of a heat map, by what is written on it."""
    axes = figure.axes[0]
    (image,) = axes.images
    cells = {tuple(map(int, text.get_position())): text.get_text() for text in axes.texts}
    shown = image.to_rgba(image.get_array())
    return {words: tuple(shown[line, column, :3]) for (column, line), words in cells.items()}


@pytest.mark.parametrize(("far", "near"), [(-629.0, -44.0), (-3511.0, -0.4), (-0.3, -0.02)])
def test_one_scale_of_colours_has_the_worst_cell_copying_the_ridge_and_the_upper_bound(far, near):
    skills = {(8, 10): near, (8, 20): far, (16, 10): 0.0, (16, 20): 0.21}
    cells = [
        {"basis.rank": float(rank), "model.context": float(context), "skill": skill, "ridge": 0.5, "floor": 0.99}
        for (rank, context), skill in skills.items()
    ]
    shown = colours(sweep_figures.heat_map(cells, "model.context", "basis.rank", SWEEP_NAMES))
    assert len(set(shown.values())) == len(shown) == 6
    red = {float(words.replace(",", "")): red - blue for words, (red, _, blue) in shown.items()}
    assert abs(red[0.0]) < 0.02, "copying is white"
    assert all((red[value] > 0) == (value < 0) for value in red if value)
    figure = sweep_figures.heat_map(cells, "model.context", "basis.rank", SWEEP_NAMES)
    norm = figure.axes[0].images[0].norm
    places = np.asarray(norm(np.array([far, near, 0.0, 0.21, 0.5, 0.99])))
    assert (np.diff(places) > 0).all()
    assert 0 <= places.min() < places.max() <= 1, "no colour is clipped"


def test_heat_map_says_which_runs_diverged():
    cells = [dict(cell, skill=-np.inf) if cell["basis.rank"] == 8 else cell for cell in sweep_cells()]
    (axes, _) = sweep_figures.heat_map(cells, "model.context", "basis.rank", SWEEP_NAMES).axes
    assert [text.get_text() for text in axes.texts].count("diverged") == 3
    lost = [dict(cell, skill=np.nan, ridge=np.nan) for cell in sweep_cells()]
    figure = sweep_figures.heat_map(lost, "model.context", "basis.rank", SWEEP_NAMES)
    assert [text.get_text() for text in figure.axes[0].texts] == ["diverged"] * 6
    assert drawing.png(figure)
    assert "Every run diverged" in said(sweep_figures.parallel_coordinates(lost, SWEEP_NAMES))
    assert "Every run diverged" in said(
        sweep_figures.curves([((1, 2), (np.nan, np.nan))], ((1, 2), (np.nan,) * 2), "a")
    )


def test_a_random_search_is_drawn_as_dots_not_as_a_wall_of_empty_cells():
    rates = np.geomspace(1e-5, 1e-2, 40)
    cells = [{"rate": float(rate), "rank": float(i), "skill": -i / 9, "ridge": 0.2} for i, rate in enumerate(rates)]
    figure = sweep_figures.heat_map(cells, "rate", "rank", {"rate": "rate", "rank": "rank"})
    assert not figure.axes[0].images
    assert len(np.asarray(figure.axes[0].collections[-1].get_offsets())) == 40
    assert figure.axes[0].get_xscale() == "log"
    assert figure.get_figwidth() < 10


def test_a_metric_that_is_no_skill_has_a_scale_of_its_own():
    cells = [dict(cell, skill=3.0 + cell["basis.rank"], ridge=np.nan) for cell in sweep_cells()]
    (axes, bar) = sweep_figures.heat_map(cells, "model.context", "basis.rank", SWEEP_NAMES, "validation_loss").axes
    assert bar.get_ylabel() == "validation_loss"
    assert [label.get_text() for label in axes.get_yticklabels()] == ["8", "16"]


def test_parallel_coordinates_have_a_line_for_each_run_and_the_best_on_top():
    (axes,) = sweep_figures.parallel_coordinates(sweep_cells(), SWEEP_NAMES).axes
    lines = [line for line in axes.lines if np.size(line.get_xdata()) == 3]
    assert len(lines) == 12
    assert lines[-1].get_color() == figures.COLOURS["tipl"]
    assert np.asarray(lines[-1].get_ydata())[-1] == 1
    assert [label.get_text() for label in axes.get_xticklabels()] == ["context", "rank", "skill"]


def test_sweep_curves_have_the_best_the_median_and_the_ridge():
    curves = [((10, 20, 30), (0.0, value, value)) for value in (0.1, 0.2, 0.4)]
    figure = sweep_figures.curves(curves, curves[2], "rank=8", 0.3)
    median, best = figure.axes[0].lines[3:5]
    assert np.asarray(median.get_ydata()).tolist() == [0.0, 0.2, 0.2]
    assert np.asarray(best.get_ydata()).tolist() == [0.0, 0.4, 0.4]
    assert legend(figure) == ["median", "best: rank=8", "ridge with the best run's context"]


def test_sweep_curves_far_below_zero_are_drawn_as_the_error_that_is_left():
    curves = [((10, 20), (-500.0, -100.0)), ((10, 20), (-300.0, -50.0))]
    (axes,) = sweep_figures.curves(curves, curves[1], "rank=8", 0.3).axes
    assert axes.get_yscale() == "log"
    assert np.asarray(axes.lines[3].get_ydata()).tolist() == [301.0, 51.0]


def test_contenders_differences_are_shares_of_the_firsts_area_and_filled_where_told_apart():
    def row(task, contender, low, high):
        middle = (low + high) / 2
        ends = {"auc_less_first": middle, "auc_less_first_low": low, "auc_less_first_high": high}
        name = contender.partition("+")[2] or "none"
        return {"task": task, "env_steps": 1000, "contender": contender, "predictor": name, "auc": -200.0, **ends}

    first, second = (
        [row(task, "10", 0, 0), row(task, "4+ridge", 10, 50), row(task, "4+tipl", -10, 30)] for task in ("A-v4", "B-v4")
    )
    figure = accelerate_figures.areas([*first, *second[:2]])
    (ridge, tipl), (alone,) = ([line for line in axes.lines if line.get_marker() == "o"] for axes in figure.axes)
    assert [np.asarray(line.get_xdata()).tolist() for line in (ridge, tipl, alone)] == [[15.0], [5.0], [15.0]]
    assert ridge.get_markerfacecolor() == figures.COLOURS["ridge"]
    assert tipl.get_markerfacecolor() == "white"
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["4+ridge", "4+tipl"]


def test_the_chosen_learning_rates_are_marked_in_every_task():
    rows = [
        {
            "task": task,
            "env_steps": 1000,
            "contender": name,
            "predictor": "none",
            "searched": "learning_rate",
            "value": rate,
            "seeds": 3,
            "auc": 1e4 * rate,
            "chosen": rate == 3e-4,
        }
        for task in ("A-v4", "B-v4")
        for name in ("10", "4")
        for rate in (1.5e-4, 3e-4)
    ]
    figure = accelerate_figures.learning_rates(rows)
    for axes in figure.axes:
        assert [np.asarray(line.get_xdata()).tolist() for line in axes.lines] == 2 * [[1.5e-4, 3e-4], [3e-4]]
        assert [label.get_text() for label in axes.get_xticklabels()] == ["1.5", "3"]
    assert legend(figure) == ["10", "4"]


def rename(rows, names):
    """As many predictors as there are names, with the rows of the summary's own."""
    own = list(SKILLS)
    return [
        {**row, "predictor": name, "skill": row["skill"] / (1 + index)}
        for index, name in enumerate(names)
        for row in rows
        if row["predictor"] == own[index % len(own)]
    ]


def outside(figure):
    """What is drawn, in whole or in part, beyond the figure's edge."""
    figure.draw_without_rendering()
    parts = {f"panel {axes.get_title()!r}": axes.get_tightbbox() for axes in figure.axes}
    parts |= {f"legend {index}": legend.get_window_extent() for index, legend in enumerate(figure.legends)}
    if figure._suptitle:
        parts["title"] = figure._suptitle.get_window_extent()
    left, bottom, right, top = figure.bbox.extents
    return {
        name: box.extents.round().tolist()
        for name, box in parts.items()
        if box.x0 < left - 1 or box.x1 > right + 1 or box.y0 < bottom - 1 or box.y1 > top + 1
    }


MANY = (*figures.NAMES, "first-again")
ODD_NAMES = ("tipl", "a_$x_2$", "$", "_hidden", "\\frac{1", "W" * 90, "a name of many words " * 8, "{", "%s #", "<b>")


@pytest.mark.parametrize("count", range(1, 13))
def test_legends_lie_within_the_figure_for_any_number_of_predictors(count):
    rows = rename(summary(), MANY[:count])
    table = result_table()
    table["predictor"] = np.array(MANY[:count])[np.arange(len(table["predictor"])) % count]
    for figure in (
        figures.skill_by_step(rows),
        figures.figure_2(table, rows),
        figures.spread(rows),
        skill_by("third", table),
    ):
        assert not outside(figure)
        assert all(axes.get_position().height * figure.get_figheight() > 1.5 for axes in figure.axes), "room is left"


@pytest.mark.parametrize("names", [ODD_NAMES, ODD_NAMES[1:3], ("x" * 300,)])
def test_names_of_any_length_and_letters_are_written_as_they_are(names):
    rows = rename(summary(), names)
    table = result_table()
    table["predictor"] = np.array(names)[np.arange(len(table["predictor"])) % len(names)]
    for figure in (
        figures.skill_by_step(rows),
        figures.figure_2(table, rows),
        skill_by("third", table),
    ):
        assert not outside(figure)
        written = ["".join(words.split()) for words in legend(figure)]
        assert all("".join(figures.NAMES.get(name, name).split()) in written for name in names)


def test_every_figure_and_its_legend_lie_within_its_edges():
    long = "a_field.with_a_long_name_" * 4
    cells = [{**cell, long: cell["basis.rank"]} for cell in sweep_cells()]
    names = {"model.context": "context", long: long}
    curve = ((10, 20), (0.1, 0.2))
    env_steps = np.arange(10)
    drawn = {
        **all_figures(),
        "heat": sweep_figures.heat_map(cells, "model.context", long, names, "validation_skill_h10"),
        "parallel": sweep_figures.parallel_coordinates(cells, names, "validation_skill_h10"),
        "curves": sweep_figures.curves([curve], curve, "learning_rate=0.001 " * 9, 0.1),
        "contenders": contenders(
            {name: (env_steps, env_steps, np.ones((3, 10))) for name in ("10", "4+tipl:gate,reset,both,x0.5")},
            "T" * 120,
        ),
    }
    assert {name: outside(figure) for name, figure in drawn.items() if outside(figure)} == {}


def test_tipl_is_drawn_above_all_others_and_copying_above_the_rest():
    names = ("ridge", "tipl", "window-floor", "copy-last", "linear", "custom")
    rows = rename(summary(), names)
    for axes in (figures.figure_2(result_table(), rows).axes[3], figures.spread(rows).axes[0]):
        heights = {line.get_color(): line.get_zorder() for line in drawn(axes) if line.get_linestyle() == "-"}
        order = sorted(heights, key=heights.__getitem__, reverse=True)
        assert order[:3] == [figures.COLOURS[name] for name in ("tipl", "ridge", "copy-last")]
        assert heights[order[0]] > heights[order[1]] > heights[order[2]]


def test_a_predictor_without_a_colour_of_its_own_has_the_same_one_in_any_company():
    def colour(names):
        lines = figures.skill_by_step(rename(summary(), names)).axes[0].lines
        return {line.get_label(): line.get_color() for line in lines}["custom"]

    assert colour(("custom",)) == colour(("tipl", "another", "custom")) == colour(("custom", "zebra"))
    curves = {name: (np.arange(3), np.arange(3), np.ones((3, 3))) for name in ("10", "4+x", "4+ridge:gate", "4+custom")}
    for chosen in (curves, {name: curves[name] for name in ("10", "4+custom")}):
        *_, custom = contenders(chosen).axes[0].lines
        assert custom.get_color() == colour(("custom",))


def test_tipl_far_below_copying_stays_in_the_picture():
    rows = [{**row, "skill": -465.0} if row["predictor"] == "tipl" else row for row in summary()]
    figure = figures.skill_by_step(rows)
    assert figure.axes[0].get_ylim()[0] < -465
    assert figure.axes[0].get_yscale() == "symlog"
    assert "-100" in [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert figures.skill_by_step(summary()).axes[0].get_yscale() == "linear"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), None])
def test_values_that_cannot_be_drawn_leave_the_rest_of_the_picture(value):
    spoilt = {"skill": value, "wpe": value, "repw": value, "repw_high": value, "returns_spread": value}
    for names in (("linear",), tuple(SKILLS)):
        rows = [{**row, **(spoilt if row["predictor"] in names else {})} for row in summary()]
        for figure in (figures.figure_2(result_table(), rows), figures.skill_by_step(rows), figures.spread(rows)):
            assert not outside(figure)


def test_empty_tables_are_drawn_with_a_word_why():
    nothing = {name: column[:0] for name, column in result_table().items()}
    drawn = {
        "no policies were rolled out": figures.figure_2(nothing, []),
        "There is no skill: no weights moved": figures.skill_by_step([]),
        "both TIPL and the ridge": figures.skill_over_ridge([]),
        "No policies were rolled out": figures.spread([]),
        "There is no second variant": accelerate_figures.areas([]),
        "No learning rates were searched": accelerate_figures.learning_rates([]),
        "No weights were restored": figures.reconstruction([]),
        "No loss was recorded": figures.training_curves([]),
        "There are no runs": sweep_figures.parallel_coordinates([], SWEEP_NAMES),
    }
    for words, figure in drawn.items():
        assert words in said(figure)
        assert drawing.png(figure)
    assert drawing.png(skill_by("phase", nothing))


def test_two_trials_have_no_interval_and_the_picture_says_so():
    rows = [{**row, "trials": 2} | dict.fromkeys(("skill_low", "repw_low"), np.nan) for row in summary()]
    for figure in (figures.skill_by_step(rows), figures.figure_2(result_table(), rows)):
        assert "2 test trials: too few for confidence intervals" in said(figure)
    assert "too few" not in said(figures.skill_by_step([{**row, "trials": 5} for row in summary()]))


ODD_SETTINGS = (
    {"text.usetex": True, "font.family": "serif", "savefig.dpi": 30, "figure.dpi": 300, "savefig.bbox": "tight"},
    {"axes.titlesize": 40, "axes.grid": True, "lines.linewidth": 9, "xtick.labelsize": 30, "legend.fontsize": 30},
    {"figure.constrained_layout.use": True, "axes.spines.top": False, "axes.facecolor": "k", "text.color": "w"},
    {"figure.autolayout": True, "axes.unicode_minus": False, "font.size": 25, "savefig.transparent": True},
    {"axes.formatter.use_mathtext": True, "image.cmap": "gray", "image.origin": "lower", "path.sketch": (1, 100, 2)},
)


def some_figures():
    cells = sweep_figures.heat_map(sweep_cells(), "model.context", "basis.rank", SWEEP_NAMES)
    drawn = (figures.figure_2(result_table(), summary()), figures.skill_by_step(summary()), cells)
    return [drawing.png(figure) for figure in (*drawn, learning_curves([]))]


@pytest.fixture(scope="module")
def as_shipped():
    return some_figures()


@pytest.mark.parametrize("settings", ODD_SETTINGS)
def test_figures_are_the_same_whatever_the_matplotlibrc_says_and_leave_it_as_it_is(settings, as_shipped):
    with matplotlib.rc_context(settings):
        before = dict(matplotlib.rcParams.copy())
        assert some_figures() == as_shipped
        others = io.BytesIO()
        figures.skill_by_step(summary()).savefig(
            others, dpi=drawing.DPI, facecolor="white", metadata={"Software": None}
        )
        assert others.getvalue() == as_shipped[1], "also where another saves it"
        assert dict(matplotlib.rcParams.copy()) == before
        with pytest.raises(KeyError):
            figures.skill_by_step([{"predictor": "tipl"}])
        assert dict(matplotlib.rcParams.copy()) == before, "also where drawing fails"


def test_importing_and_drawing_start_no_pyplot_and_choose_no_backend(tmp_path):
    (tmp_path / "matplotlibrc").write_text("backend: svg\ntext.usetex: True\nfont.family: no such font\n")
    code = (
        "import sys, matplotlib; before = dict(matplotlib.rcParams.copy()); from tipl_ray import drawing; "
        "from tipl_ray.evaluate import figures; "
        "figure = figures.training_curves([{'step': 1, 'loss': 2.0}, {'step': 2, 'loss': 1.0}]); drawing.png(figure); "
        "assert dict(matplotlib.rcParams.copy()) == before; assert matplotlib.get_backend() == 'svg'; "
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    root = Path(drawing.__file__).parent.parent
    environment = os.environ | {"MATPLOTLIBRC": str(tmp_path), "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_colours_made_of_names_are_far_from_the_known_ones():
    known = [np.array(to_rgb(colour)) for colour in figures.COLOURS.values()]
    for name in ("tipl:gate", "tipl:x0.5", "ridge:both", "custom", "", "ж"):
        curves = {one: (np.arange(3), np.arange(3), np.ones((3, 3))) for one in ("10", f"4+{name or 'x'}")}
        made = np.array(to_rgb(contenders(curves).axes[0].lines[-1].get_color()))
        assert min(np.linalg.norm(made - other) for other in known) > 0.25


def test_a_narrow_logarithmic_axis_has_more_than_one_number():
    figure = figures.training_curves([{"step": step, "loss": 1 - 0.005 * step} for step in range(10)])
    figure.draw_without_rendering()
    assert len([label for label in figure.axes[0].get_yticklabels() if label.get_text()]) > 2


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [
        (-5, -2, ["10⁻⁵", "10⁻⁴", "10⁻³", "10⁻²"]),
        (-5, -4, ["10⁻⁵", "2·10⁻⁵", "5·10⁻⁵", "10⁻⁴"]),
        (-3, 0, ["0.001", "0.01", "0.1", "1"]),
    ],
)
def test_a_logarithmic_axis_has_plain_numbers_or_powers_of_ten_and_never_both(low, high, labels):
    _, (axes,) = drawing.new_figure(1, width=4, height=3)
    axes.set_yscale("log")
    axes.set_ylim(10.0**low, 10.0**high)
    drawing.tick_decades(axes, low, high)
    assert [label.get_text() for label in axes.get_yticklabels()] == labels
