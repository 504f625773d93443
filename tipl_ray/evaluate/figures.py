"""Pictures of an experiment, drawn from plain tables: the paper's Figure 2, skill, paths, learning curves and more.

A table is a dict of equally long columns, as the evaluation's result table holds them; a summary is a list of dicts,
one per predictor, basis and step h. Every function returns a matplotlib Figure of its own; see `drawing`.

Shape suffixes: H steps ahead, N trials, G points of a common grid, T snapshots, R rows.
"""

import colorsys
import itertools
import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.colors import LinearSegmentedColormap, Normalize, to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator, StrMethodFormatter

from tipl_ray.drawing import (
    INK,
    SOFT,
    as_shipped,
    dress,
    explain,
    is_first_in_line,
    labelled,
    legend_below,
    log_scale,
    new_figure,
    tick_decades,
    wrapped,
)
from tipl_ray.evaluate.metrics import MIN_TRIALS, Resampling, Row, number, numbers

Table = Mapping[str, np.ndarray]
Curve = tuple[int, np.ndarray, np.ndarray]

NAMES = {
    "tipl": "TIPL",
    "copy-last": "copy the last snapshot",
    "ridge": "ridge by phase",
    "context-ridge": "ridge on the context only",
    "ridge-elsewhere": "ridge of the training tasks",
    "linear": "linear extrapolation",
    "damped": "damped velocity",
    "window-linear": "line through the context",
    "rank-1": "rank-1 extrapolation",
    "rank-1-from-last": "rank-1 from the last snapshot",
    "dmd": "dynamic modes",
    "mean-trajectory": "mean training trajectory",
    "svd-floor": "upper bound of the SVD basis",
    "window-floor": "upper bound of the window basis",
}

# Okabe and Ito's palette, and beyond it: distinguishable with any colour vision, and the same in every picture.
COLOURS = {
    "tipl": "#0072B2",
    "copy-last": "#6b6b6b",
    "ridge": "#E69F00",
    "context-ridge": "#8B2252",
    "ridge-elsewhere": "#B07A00",
    "linear": "#D55E00",
    "damped": "#CC79A7",
    "window-linear": "#8c6d31",
    "rank-1": "#5b3a8c",
    "rank-1-from-last": "#a78bd0",
    "dmd": "#56B4E9",
    "first-again": "#1b7837",
    "mean-trajectory": "#a0a000",
    "svd-floor": "#009E73",
    "window-floor": "#009E73",
}

PATH_COLOURS = LinearSegmentedColormap.from_list("returns", ["#f3d28b", "#e08a1e", "#b5260f", "#4a0a2b"])
"""Returns from low to high, in colours that TIPL's stands out from."""
PHASE_COLOURS = (
    *("#7f3b08", "#2d004b", "#35978f", "#b2182b", "#8e0152", "#4d4d4d", "#bf812d", "#01665e", "#9970ab", "#d6604d"),
)
"""Of what is no predictor, such as phases: none of the predictors' own."""
SCATTER_TITLES = {"tipl": "TIPL's policies", "copy-last": "Copies of the last snapshot"}
GROUP_TITLES = {
    "phase": "Skill by phase: the context's last snapshot within its PPO iteration",
    "third": "Skill by stage of training",
}
PANEL_TITLES = {
    ("phase", 0): "phase 0: iteration end",
    ("third", 0): "first third",
    ("third", 1): "second third",
    ("third", 2): "last third",
}
LINE_STYLES = ("-", "--", "-.", ":")
STEP_LABEL = "forward step h [snapshots]"
SKILL_LABEL = "skill (0: copying, 1: perfect)"
SKILL_FLOOR = -0.6
"""Skill below which only TIPL is followed; the others are described in words."""


@as_shipped()
def figure_2(table: Table, summary: Sequence[Row]) -> Figure:
    """The paper's Figure 2: WPE and REPW against forward step h, and true against predicted return.

    TIPL's scatter is next to copy-last's: snapshots a few epochs apart have nearly the same return, so points on the
    diagonal mean something only if they are closer to it than copying's.
    """
    figure, (errors, tipl, copied) = new_figure(3, width=12, height=4.8, width_ratios=(1.4, 1, 1))
    outside = _draw_errors(errors, summary)
    _draw_scatters({"tipl": tipl, "copy-last": copied}, table)
    legend_below(figure, labelled(errors), [*_without_band(summary, "repw_low"), *outside])
    return figure


@as_shipped()
def skill_by_step(summary: Sequence[Row]) -> Figure:
    """Skill against forward step h with its confidence band; 0 is copying the last snapshot, 1 is the truth."""
    figure, (axes,) = new_figure(1, width=8.5, height=4.4)
    lines = {line: rows for line, rows in _lines(summary).items() if line[0] != "copy-last"}
    for line, rows in lines.items():
        step_H, skill_H, low_H, high_H = (numbers(rows, key) for key in ("step", "skill", "skill_low", "skill_high"))
        look = line_look(line[0]) | {"linestyle": _style(line, lines), "label": _label(rows, lines)}
        axes.fill_between(step_H, low_H, high_H, color=look["color"], alpha=0.18, linewidth=0)
        axes.plot(step_H, skill_H, marker="o", **look)
    dress(axes, "Skill by forward step, compared with copying the last snapshot", STEP_LABEL, SKILL_LABEL)
    _tick_steps(axes, (row["step"] for row in summary))
    drawn = {"tipl": ("skill", "skill_low")}  # of the others' bands, what is above the picture's edge
    named = [
        (line[0], _label(rows, lines), np.concatenate([numbers(rows, key) for key in drawn.get(line[0], ("skill",))]))
        for line, rows in lines.items()
    ]
    outside = _frame_skill([axes], named)
    legend_below(figure, labelled(axes), [*_without_band(summary, "skill_low"), *outside])
    return figure


@as_shipped()
def skill_over_ridge(comparisons: Sequence[Row]) -> Figure:
    """TIPL's skill minus the ridge's on the same windows, overall and by phase, with the interval of the difference."""
    rows = [row for row in comparisons if row["against"] == "ridge" and row["group"] in ("all", "phase")]
    figure, (axes,) = new_figure(1, width=8.5, height=4.4)
    phases = sorted({int(row["value"]) for row in rows if row["group"] == "phase"})
    for value in (*phases, -1):
        own = sorted((row for row in rows if int(row["value"]) == value), key=lambda row: row["step"])
        step_H, gain_H, low_H, high_H = (
            numbers(own, key) for key in ("step", "skill_difference", "difference_low", "difference_high")
        )
        colour = COLOURS["tipl"] if value < 0 else PHASE_COLOURS[value % len(PHASE_COLOURS)]
        label = f"phase {value}" if value >= 0 else "all windows"
        axes.fill_between(step_H, low_H, high_H, color=colour, alpha=0.15, linewidth=0)
        axes.plot(step_H, gain_H, color=colour, marker="o", ms=4.5, lw=2.5 if value < 0 else 1.5, label=label)
    axes.axhline(0, color=COLOURS["copy-last"], linewidth=2, zorder=1, label="no better than the ridge")
    dress(axes, "What TIPL adds to the ridge by phase", STEP_LABEL, "TIPL's skill minus the ridge's")
    _tick_steps(axes, (row["step"] for row in rows))
    differences = numbers(rows, "skill_difference")
    if not np.isfinite(differences).any():
        explain(axes, "There are no windows on which both TIPL and the ridge were evaluated")
    finite = differences[np.isfinite(differences)]
    if np.abs(finite).max(initial=0) > 2:
        _frame(axes, float(finite.min(initial=0)), float(finite.max(initial=0)))
    legend_below(figure, labelled(axes))
    return figure


@as_shipped()
def spread(summary: Sequence[Row]) -> Figure:
    """How much predicted policies differ from each other, in returns and in weights, compared with the true ones."""
    figure, (returns, distances) = new_figure(2, width=10, height=4.2)
    lines = _lines([row for row in summary if math.isfinite(number(row, "returns_spread"))])
    for line, rows in lines.items():
        look = line_look(line[0]) | {"linestyle": _style(line, lines), "label": _label(rows, lines)}
        step_H, spread_H = numbers(rows, "step"), numbers(rows, "returns_spread")
        returns.plot(step_H, spread_H, marker="o", **look)
        share_H = numbers(rows, "distance") / _positive(numbers(rows, "distance_true"))
        distances.plot(step_H, share_H, marker="o", **look)
    true_H = {row["step"]: number(row, "returns_spread_true") for rows in lines.values() for row in rows}
    returns.plot(
        sorted(true_H), [true_H[step] for step in sorted(true_H)], "--", color=INK, lw=1.5, label="true policies"
    )
    distances.axhline(1, color=INK, linestyle="--", linewidth=1.5)
    if not lines:
        explain(returns, "No policies were rolled out")
    if not any(np.isfinite(line.get_ydata()).any() for line in distances.lines[:-1]):
        explain(distances, "There are no two windows of one trial to compare")
    returns.set_ylim(bottom=0)
    distances.set_ylim(0, max(1.1, 1.04 * distances.get_ylim()[1]))
    dress(returns, "Spread of the policies' returns", STEP_LABEL, "standard deviation of returns")
    dress(distances, "Distance between policies", STEP_LABEL, "distance relative to true policies'")
    for axes in (returns, distances):
        _tick_steps(axes, (row["step"] for row in summary))
    legend_below(figure, labelled(returns))
    return figure


@as_shipped()
def skill_by_group(groups: Sequence[Row], column: str) -> Figure:
    """Skill against forward step h, one panel per phase or third, whichever `column` names.

    Rows are `metrics.group_skills`'. A window's phase is its context's last snapshot within the PPO iteration.
    """
    rows = [row for row in groups if row["group"] == column and row["predictor"] != "copy-last"]
    values = sorted({int(row["value"]) for row in rows})
    figure, panels = new_figure(
        len(values), width=max(8.5, 2.5 * min(5, len(values))), height=4.0, share=True, across=5
    )
    skills: list[tuple[str, str, np.ndarray]] = []
    for axes, value in zip(panels, values, strict=False):
        lines = _lines([row for row in rows if row["value"] == value])
        for line, own in lines.items():
            skill_H = numbers(own, "skill")
            skills.append((line[0], _label(own, lines), skill_H))
            look = line_look(line[0]) | {"linestyle": _style(line, lines), "label": _label(own, lines)}
            axes.plot(numbers(own, "step"), skill_H, marker="o", **look)
        title = PANEL_TITLES.get((column, value), f"{column} {value}")
        dress(axes, title, "forward step h", SKILL_LABEL if is_first_in_line(axes) else "")
        axes.title.set_fontsize(11)
        _tick_steps(axes, (row["step"] for row in rows), 5)
    title = wrapped(figure, GROUP_TITLES[column], 0.95 * figure.get_figwidth(), 13, "bold")
    figure.suptitle(title, fontsize=13, color=INK, fontweight="bold")
    outside = _frame_skill(panels, skills)
    legend_below(figure, labelled(panels[0]), outside)
    return figure


@as_shipped()
def paths(table: Table) -> Figure:
    """Trials in the plane of the first two singular directions of their snapshots, with TIPL's forecasts: above the
    whole path, below a close-up of an early forecast.

    Rows are `evaluation.path_table`'s. Snapshots are coloured by return, or by progress where there are no returns.
    """
    trials = list(dict.fromkeys(table["trial"].tolist()))
    figure, panels = new_figure(2 * len(trials), width=max(6.0, 4.2 * len(trials)), height=3.7, across=len(trials))
    own = table["start"] < 0
    has_returns = bool(np.isfinite(table["episodic_return"][own]).any())
    values = np.where(np.isfinite(table["episodic_return"]), table["episodic_return"], np.nan)
    values = values if has_returns else table["snapshot"].astype(np.float64)
    norm = Normalize(*(np.nanmin(values[own]), np.nanmax(values[own])))
    for place, trial in enumerate(trials):
        rows = {name: column[table["trial"] == trial] for name, column in table.items()}
        starts = sorted(set(rows["start"].tolist()) - {-1})
        early, horizon = starts[len(starts) // 4], int((rows["snapshot"] - rows["start"])[rows["start"] >= 0].max())
        close = np.arange(max(0, early - horizon), early + horizon + 1)
        shown = _draw_path(panels[place], rows, values[table["trial"] == trial], norm, starts)
        _draw_path(panels[len(trials) + place], rows, values[table["trial"] == trial], norm, [early], close)
        shares = [f"{float(rows[name][0]):.0%} of variance" for name in ("share_x", "share_y")]
        dress(panels[place], f"Trial {trial}", f"1st direction ({shares[0]})", f"2nd direction ({shares[1]})")
        for axes in (panels[place], panels[len(trials) + place]):
            axes.xaxis.set_major_locator(MaxNLocator(4))
        dress(panels[len(trials) + place], f"Close-up at snapshot {early:,}", "1st direction", "2nd direction")
    bar = figure.colorbar(shown, ax=panels, shrink=0.6)
    bar.set_label("episodic return" if has_returns else "snapshot", fontsize=11, color=INK)
    entries = [
        Line2D([], [], color=SOFT, marker="o", ms=5, lw=0.8, label="snapshots of the trial"),
        Line2D([], [], color=INK, marker="o", ms=7, mfc="none", lw=0, label="where a forecast starts"),
        Line2D([], [], color=COLOURS["tipl"], lw=3, label="TIPL's forecast"),
    ]
    legend_below(figure, entries)
    return figure


def _draw_path(
    axes: Axes,
    rows: Table,
    values: np.ndarray,
    norm: Normalize,
    starts: Sequence[int],
    snapshots: np.ndarray | None = None,
) -> PathCollection:
    """A trial's snapshots, all or some, with the forecasts from some starts; the last value where one is missing."""
    own = np.flatnonzero(rows["start"] < 0)
    own = own if snapshots is None else own[snapshots]
    x_T, y_T, value_T = rows["x"][own], rows["y"][own], values[rows["start"] < 0]
    known_T = np.flatnonzero(np.isfinite(value_T))
    last_T = known_T[np.maximum(np.searchsorted(known_T, np.arange(len(value_T)), side="right") - 1, 0)]
    value_T = value_T[last_T] if snapshots is None else value_T[last_T][snapshots]
    axes.plot(x_T, y_T, color=SOFT, linewidth=0.8, alpha=0.6, zorder=1)
    size = 10 if snapshots is None else 34
    shown = axes.scatter(x_T, y_T, c=value_T, cmap=PATH_COLOURS, norm=norm, s=size, zorder=2)
    for start in starts:
        at = rows["start"] == start
        begin = np.flatnonzero((rows["start"] < 0) & (rows["snapshot"] == start))
        x, y = (np.concatenate([rows[name][begin], rows[name][at]]) for name in ("x", "y"))
        dots = "" if snapshots is None else "o"
        axes.plot(x, y, color=COLOURS["tipl"], linewidth=2.6, marker=dots, ms=4.5, solid_capstyle="round", zorder=4)
        axes.plot(x[0], y[0], "o", mec=INK, mfc="none", ms=5 if snapshots is None else 9, mew=1.4, zorder=5)
    return shown


@as_shipped()
def learning_curves(curves: Sequence[Curve], resampling: Resampling) -> Figure:
    """Episodic return against environment steps: every trial, and their mean with its bootstrap band.

    A curve is (seed, env_steps_T, episodic_returns_T); NaN marks snapshots before which no episode ended. The mean is
    taken where every trial has data, each trial interpolated linearly.
    """
    known = [(steps_T[np.isfinite(returns_T)], returns_T[np.isfinite(returns_T)]) for _, steps_T, returns_T in curves]
    known = [(steps_T, returns_T) for steps_T, returns_T in known if len(steps_T)]
    figure, (axes,) = new_figure(1, width=8.5, height=4.2)
    for steps_T, returns_T in known:
        dots = "o" if len(steps_T) == 1 else ""
        axes.plot(steps_T, returns_T, color=SOFT, linewidth=0.8, alpha=0.35, marker=dots)
    shown = f"one trial ({len(known)} of {len(curves)}; no episode ended in the others)"
    shown = f"one trial ({len(known)} shown)" if len(known) == len(curves) else shown
    entries = [Line2D([], [], color=SOFT, linewidth=0.9, alpha=0.6, label=shown)] if known else []
    low = max((steps_T[0] for steps_T, _ in known), default=0)
    high = min((steps_T[-1] for steps_T, _ in known), default=0)
    if len(known) > 1 and low < high:
        grid_G = np.linspace(low, high, 200)
        returns_NG = np.stack([np.interp(grid_G, steps_T, returns_T) for steps_T, returns_T in known])
        label = "their mean"
        if len(known) >= MIN_TRIALS:
            band_2G = resampling.band(returns_NG, statistic=lambda runs: runs.mean(axis=-1))
            axes.fill_between(grid_G, *band_2G, color=INK, alpha=0.2, linewidth=0)
            label = f"mean and its {resampling.confidence:.0%} interval"
        axes.plot(grid_G, returns_NG.mean(0), color=INK, linewidth=2.6)
        entries += [Line2D([], [], color=INK, linewidth=2.6, label=label)]
    dress(axes, "Learning curves of the PPO trials", "environment steps", "episodic return")
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.set_xlim(0, max((steps_T[-1] for _, steps_T, _ in curves if len(steps_T)), default=0) or 1)
    if not known:
        explain(axes, f"No episode ended in any of the {len(curves)} trials, so there are no returns")
    legend_below(figure, entries)
    return figure


@as_shipped()
def reconstruction(rows: Sequence[Row]) -> Figure:
    """What the Temporal SVD loses at each rank D on held-out trials: energy outside the basis, and squared error.

    Rows have trial, rank, energy_outside (share of the squared norm) and mse (per weight). Zeros cannot be drawn on a
    logarithmic axis and are left out.
    """
    figure, panels = new_figure(2, width=10, height=4.0)
    ranks = sorted({int(row["rank"]) for row in rows})
    drawn = (
        ("energy_outside", "Energy outside the basis", "share of the squared norm"),
        ("mse", "Error of the restored weights", "mean squared error per weight"),
    )
    for axes, (key, title, unit) in zip(panels, drawn, strict=True):
        for trial in sorted({row["trial"] for row in rows}):
            own = sorted((row for row in rows if row["trial"] == trial), key=lambda row: row["rank"])
            axes.plot(numbers(own, "rank"), _positive(numbers(own, key)), color=COLOURS["svd-floor"], lw=0.9, alpha=0.5)
        mean = np.array([np.mean([row[key] for row in rows if row["rank"] == rank]) for rank in ranks])
        axes.plot(ranks, _positive(mean), color=INK, linewidth=2, marker="o", markersize=4.5)
        axes.set_xscale("log", base=2)
        if (mean > 0).any():
            log_scale(axes)
        else:
            explain(axes, "The basis keeps everything" if len(mean) else "No weights were restored")
        few = ranks if len(ranks) <= 10 else [2**power for power in range(max(ranks).bit_length())]
        axes.xaxis.set_major_locator(FixedLocator(few))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:.0f}"))
        dress(axes, title, "SVD rank D", unit)
    entries = [
        Line2D([], [], color=COLOURS["svd-floor"], linewidth=1.2, alpha=0.7, label="one test trial"),
        Line2D([], [], color=INK, linewidth=2, marker="o", markersize=4.5, label="mean of the test trials"),
    ]
    legend_below(figure, entries)
    return figure


@as_shipped()
def training_curves(history: Sequence[Row]) -> Figure:
    """Training and validation loss of the Transformer against optimisation steps.

    Rows have step and loss; validation_loss only where the model was validated.
    """
    figure, (axes,) = new_figure(1, width=8.5, height=4.0)
    step_R, loss_R, validation_R = (numbers(history, key) for key in ("step", "loss", "validation_loss"))
    drawn: tuple[tuple[np.ndarray, str, dict[str, Any]], ...] = (
        (loss_R, COLOURS["copy-last"], {"linewidth": 1.3, "label": "training trials"}),
        (validation_R, COLOURS["tipl"], {"linewidth": 2, "marker": "o", "label": "validation trials"}),
    )
    for values_R, colour, look in drawn:
        seen = np.isfinite(values_R)
        if seen.any():
            dots = {"marker": "o"} if seen.sum() == 1 else {}
            axes.plot(step_R[seen], values_R[seen], color=colour, markersize=4.5, **(look | dots))
    finite = np.concatenate([loss_R, validation_R])
    finite = finite[np.isfinite(finite)]
    if len(finite) and finite.min() > 0:
        log_scale(axes)
    if not len(finite):
        explain(axes, "No loss was recorded")
    dress(axes, "Loss of the Transformer during training", "optimisation steps", "loss")
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    legend_below(figure, labelled(axes))
    return figure


def _draw_errors(errors: Axes, summary: Sequence[Row]) -> list[str]:
    """WPE in the upper half, on the left axis; REPW in the lower half, on the right axis, with its noise floor.

    Returns in words what is outside the picture, if anything is.
    """
    returns = errors.twinx()
    run = {row["predictor"] for row in summary if math.isfinite(number(row, "repw"))}
    lines = _lines([row for row in summary if not run or row["predictor"] in run])
    lower_half = Rectangle((0, 0), 1, 0.5, transform=returns.transAxes)
    for line, rows in lines.items():
        look, style = line_look(line[0]), _style(line, lines)
        step_H, wpe_H, repw_H, low_H, high_H = (
            numbers(rows, key) for key in ("step", "wpe", "repw", "repw_low", "repw_high")
        )
        errors.plot([], [], style, lw=2.5, label=_label(rows, lines), color=look["color"])
        errors.plot(step_H, _positive(wpe_H), ":", marker="o", mfc="white", **look | {"lw": 0.7 * look["lw"]})
        band = returns.fill_between(step_H, low_H, high_H, color=look["color"], alpha=0.15, linewidth=0)
        (curve,) = returns.plot(step_H, repw_H, style, marker="s", **look)
        for drawn in (band, curve):
            drawn.set_clip_path(lower_half)
    floor_H = _noise_floor(summary)
    if floor_H:
        errors.plot([], [], "--", color=INK, lw=1.3, label="REPW of true policies (noise floor)")
    (floor,) = returns.plot(list(floor_H), list(floor_H.values()), "--", color=INK, linewidth=1.3)
    floor.set_clip_path(lower_half)
    dress(errors, "Errors of predicted weights and returns", STEP_LABEL, "WPE: error per weight")
    dress(returns, "", "", "REPW: return error")
    returns.grid(visible=False)
    returns.spines["right"].set_visible(True)
    _tick_steps(errors, (row["step"] for row in summary))
    top = _repw_top(lines)
    _halve(errors, returns, top)
    if not run:
        returns.set_yticks([])
        returns.text(
            0.5, 0.25, "no policies were rolled out", transform=returns.transAxes, ha="center", va="center", color=SOFT
        )
    highest = {_label(rows, lines): _most(numbers(rows, "repw")) for rows in lines.values()}
    outside = [f"REPW of {label} rises to {_short(value)}" for label, value in highest.items() if value > top]
    return [f"Outside the picture: {', '.join(outside)}"] if outside else []


def _without_band(summary: Sequence[Row], key: str) -> list[str]:
    """Why lines have no band, where trials are too few for one."""
    trials = max((int(row.get("trials", MIN_TRIALS)) for row in summary), default=MIN_TRIALS)
    if trials >= MIN_TRIALS or np.isfinite(numbers(summary, key)).any():
        return []
    return [f"{trials} test trial{'s' * (trials > 1)}: too few for confidence intervals"]


def _repw_top(lines: Mapping[tuple[str, str], Sequence[Row]]) -> float:
    """Where REPW's axis ends: a predictor that diverges must not press the comparison with copying flat."""
    known = {
        line: _most(np.concatenate([numbers(rows, key) for key in ("repw", "repw_high")]))
        for line, rows in lines.items()
    }
    compared = [highest for (name, _), highest in known.items() if name in SCATTER_TITLES]
    return 1.04 * min(max(known.values(), default=0.0), 2 * max(compared, default=math.inf)) or 1.0


def _most(values: np.ndarray) -> float:
    """The largest that can be drawn; 0 where none can."""
    return float(values[np.isfinite(values)].max(initial=0.0))


def _halve(errors: Axes, returns: Axes, top: float) -> None:
    """Give the logarithmic left axis the upper half and the right one, up to `top`, the lower: no lines cross."""
    errors.set_yscale("log")
    drawn = errors.get_ylim()
    low, high = np.log10(drawn) if drawn[0] > 0 else (-1.0, 0.0)  # no WPE above zero leaves the axis linear
    errors.set_ylim(10 ** (low - 1.04 * (high - low)), 10**high)
    tick_decades(errors, low, high)
    returns.set_ylim(0, 2 * top)
    returns.yaxis.set_major_locator(FixedLocator([t for t in MaxNLocator(5).tick_values(0, top) if t <= top]))
    returns.axhline(top, color="#999999", linewidth=0.8)
    errors.yaxis.label.set_y(0.75)
    returns.yaxis.label.set_y(0.25)


def _draw_scatters(panels: Mapping[str, Axes], table: Table) -> None:
    run = np.isfinite(table["return_true"]) & np.isfinite(table["return_predicted"])
    drawn = run & np.isin(table["predictor"], list(panels))
    both = np.concatenate([table["return_true"][drawn], table["return_predicted"][drawn]])
    low, high = (float(both.min()), float(both.max())) if len(both) else (0.0, 1.0)
    margin = 0.05 * (high - low) or 1.0
    for name, axes in panels.items():
        chosen = run & (table["predictor"] == name)
        true_R, predicted_R = table["return_true"][chosen], table["return_predicted"][chosen]
        if len(both):
            axes.axline((low, low), (high + margin, high + margin), color=INK, linewidth=1, linestyle="--", zorder=1)
        axes.scatter(predicted_R, true_R, s=26, color=COLOURS[name], alpha=0.22, linewidths=0, zorder=2)
        axes.set(xlim=(low - margin, high + margin), ylim=(low - margin, high + margin), aspect="equal")
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_locator(MaxNLocator(5))
        notes = []
        if len(true_R):
            notes += [f"mean absolute difference {_short(np.abs(true_R - predicted_R).mean())}"]
            at_top = np.minimum(true_R, predicted_R) >= high - 0.001 * (high - low)
            if at_top.mean() > 0.05:
                notes += [f"{at_top.mean():.0%} of {len(true_R):,} points in the corner"]
        else:
            explain(axes, "no policies were rolled out")
        if not len(both):
            axes.set(xticks=[], yticks=[])
        dress(axes, SCATTER_TITLES[name], "\n".join(["return of the predicted policy", *notes]), "")
    panels["tipl"].set_ylabel("return of the true policy", fontsize=11.5, color=INK)
    panels["copy-last"].tick_params(labelleft=False)


def _lines(summary: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    """The summary's rows by predictor and basis, sorted by step."""
    keys = {(str(row["predictor"]), str(row.get("basis", "none"))) for row in summary}
    ordered = sorted(keys, key=lambda key: (_order([name for name, _ in keys]).index(key[0]), key[1]))
    own = {key: [row for row in summary if (row["predictor"], str(row.get("basis", "none"))) == key] for key in ordered}
    return {key: sorted(rows, key=lambda row: row["step"]) for key, rows in own.items()}


def _label(rows: Sequence[Row], lines: Mapping[tuple[str, str], Any]) -> str:
    name = str(rows[0]["predictor"])
    bases = [basis for other, basis in lines if other == name]
    return f"{_name(name)}, basis {rows[0]['basis']}" if len(bases) > 1 else _name(name)


def _style(line: tuple[str, str], lines: Mapping[tuple[str, str], Any]) -> str:
    """One colour per predictor, one stroke per basis."""
    bases = [basis for name, basis in lines if name == line[0]]
    return LINE_STYLES[bases.index(line[1]) % len(LINE_STYLES)]


def _name(predictor: str) -> str:
    return NAMES.get(predictor, predictor)


def _order(names: Sequence[str]) -> list[str]:
    """The paper's predictor first, then the ones that this file has a word for, then the others by name."""
    known = [name for name in NAMES if name in names]
    return known + sorted(set(names) - set(known))


def colour_of(name: str) -> str:
    """A predictor's colour, which depends on its name alone."""
    if name in COLOURS:
        return COLOURS[name]
    taken = [to_rgb(colour) for colour in COLOURS.values()]
    for attempt in itertools.count():
        code = zlib.crc32(f"{name} {attempt}".encode())
        made = colorsys.hls_to_rgb(code % 360 / 360, 0.3 + 0.05 * (code // 360 % 6), 0.6)
        if attempt == 100 or min(math.dist(made, other) for other in taken) > 0.25:
            break
    return to_hex(made)


def line_look(name: str) -> dict[str, Any]:
    """A predictor's line: TIPL on top and thickest, the ridge right under it with markers that stick out."""
    widths = {"tipl": (3.2, 5.0, 4.0), "ridge": (2.4, 7.5, 3.8), "copy-last": (2.0, 5.0, 3.5)}
    width, marker, order = widths.get(name, (1.6, 4.0, 3.0))
    return {"color": colour_of(name), "lw": width, "ms": marker, "zorder": order}


def _noise_floor(summary: Sequence[Row]) -> dict[int, float]:
    """REPW's noise floor per step; the same for every predictor, since it compares true policies with themselves."""
    floor = [(int(row["step"]), number(row, "repw_noise_floor")) for row in summary]
    return {step: value for step, value in sorted(floor) if math.isfinite(value)}


def _positive(values: np.ndarray) -> np.ndarray:
    return np.where(values > 0, values, np.nan)


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}"


def _tick_steps(axes: Axes, steps: Iterable[int], num_ticks: int = 10) -> None:
    """Whole forward steps only, also where there is but one, or none."""
    seen = set(steps) or {1}
    margin = max(0.5, 0.02 * (max(seen) - min(seen)))
    axes.set_xlim(min(seen) - margin, max(seen) + margin)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=num_ticks))


def _frame_skill(panels: Sequence[Axes], skills: Sequence[tuple[str, str, np.ndarray]]) -> list[str]:
    """Draw copy-last's zero line, keep the axis where skill is of interest, and name in words what is outside of it.

    Skills come with their predictor's name and its label. TIPL itself never falls out, however far below copying it is.
    """
    for axes in panels:
        axes.axhline(0, color=COLOURS["copy-last"], linewidth=2, zorder=1, label="copying the last snapshot")
    lowest: dict[str, float] = {}
    for _, label, skill in skills:
        known = skill[~np.isnan(skill)]
        lowest[label] = min(lowest.get(label, math.inf), float(known.min(initial=math.inf)))
    finite = np.concatenate([np.empty(0), *(skill[np.isfinite(skill)] for _, _, skill in skills)])
    own = [float(skill[np.isfinite(skill)].min(initial=0)) for name, _, skill in skills if name == "tipl"]
    bottom = min([SKILL_FLOOR, *own])
    if not len(finite):
        explain(panels[0], "There is no skill: no weights moved, or every forecast diverged")
    _frame(panels[0], max(bottom, float(finite.min(initial=0.0))), max(float(finite.max(initial=0.0)), 0.1))
    outside = [f"{label} {_fallen(low)}" for label, low in lowest.items() if low < bottom]
    return [f"Outside the picture: {', '.join(outside)}"] if outside else []


def _fallen(skill: float) -> str:
    return f"falls to {_short(skill)}" if math.isfinite(skill) else "diverges"


def _frame(axes: Axes, low: float, high: float) -> None:
    """An axis of skill from low to high: where they are far from 0, logarithmic beyond -1 and 1."""
    far = max(-low, high)
    if far > 2:
        decades = math.log10(far)
        axes.set_yscale("symlog", linthresh=1, linscale=max(1, decades))
        powers = [10.0**power for power in range(0, math.ceil(decades) + 1, 1 + math.floor(decades / 5))]
        ticks = [*(-power for power in powers), -0.5, 0, 0.5, *powers]
        axes.yaxis.set_major_locator(
            FixedLocator([tick for tick in ticks if 1.5 * min(low, -1) <= tick <= max(1, high)])
        )
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda tick, _: f"{tick:,g}"))
        axes.set_ylim(1.3 * low if low < -1 else low - 0.1, 1.6 * high if high > 0.85 else high + 0.1)
    else:
        axes.set_ylim(low - 0.08, high + 0.08)
