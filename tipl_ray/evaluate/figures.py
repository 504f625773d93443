"""Pictures of an experiment, drawn from plain tables: the paper's Figure 2, skill, learning curves, reconstruction.

A table is a dict of equally long columns, as the evaluation's result table holds them; a summary is a list of dicts,
one per predictor, basis and step h. Every function returns a matplotlib Figure of its own: no pyplot, no global state,
and the same picture whatever the user's matplotlibrc says. What cannot be drawn is left out, with a word why.
Knows nothing of torch, Ray or files other than the one that `save` writes.

Shape suffixes: H steps ahead, N trials, G points of a common grid, T snapshots, B bootstrap resamples, R rows.
"""

import colorsys
import contextlib
import io
import itertools
import math
import re
import textwrap
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PathCollection
from matplotlib.colors import FuncNorm, Normalize, to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from matplotlib.ticker import (
    FixedLocator,
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    NullLocator,
    StrMethodFormatter,
)

from tipl_ray.evaluate.metrics import MIN_TRIALS, interquartile_mean

Table = Mapping[str, np.ndarray]
Row = Mapping[str, Any]
Curve = tuple[int, np.ndarray, np.ndarray]

DPI = 160
INK = "#222222"
SOFT = "#5c6670"
FAINT = "#d9d9d9"
LETTERS = 11
"""Size of a legend's letters [points]."""

NAMES = {
    "tipl": "TIPL",
    "copy-last": "copy last snapshot",
    "ridge": "ridge by phase",
    "context-ridge": "ridge on the context alone",
    "ridge-elsewhere": "ridge of the tasks trained on",
    "linear": "linear extrapolation",
    "damped": "damped velocity",
    "window-linear": "line through the context",
    "rank-1": "rank-1 extrapolation",
    "rank-1-from-last": "rank-1 from the last snapshot",
    "dmd": "dynamic modes",
    "mean-trajectory": "mean training trajectory",
    "svd-floor": "upper bound (SVD basis)",
    "window-floor": "upper bound (window basis)",
}
# Okabe and Ito's palette, and beyond it: told apart with any colour vision, and kept from picture to picture.
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
PHASE_COLOURS = ("#7f3b08", "#2d004b", "#1b7837", "#b2182b", *list(COLOURS.values())[2:])
SCATTER_TITLES = {"tipl": "TIPL's predicted policies", "copy-last": "The last snapshot, copied"}
LINE_STYLES = ("-", "--", "-.", ":")
SKILL_FLOOR = -0.6
"""Skill below which only TIPL is followed; the others are said in words."""


@contextlib.contextmanager
def _as_shipped() -> Iterator[None]:
    """Matplotlib's settings as it is shipped with, and no mathematics in names; the user's are there again after it.

    The backend stays what it is: these figures have a canvas of their own.
    """
    shipped: dict[Any, Any] = {name: value for name, value in matplotlib.rcParamsDefault.items() if name != "backend"}
    with matplotlib.rc_context(shipped | {"text.parse_math": False}):
        yield


class _Picture(Figure):
    """A figure that also looks the same where others draw or save it."""

    def draw(self, renderer: Any) -> None:
        with _as_shipped():
            super().draw(renderer)

    def savefig(self, *arguments: Any, **settings: Any) -> None:
        with _as_shipped():
            super().savefig(*arguments, **settings)


@_as_shipped()
def figure_2(table: Table, summary: Sequence[Row]) -> Figure:
    """The paper's Figure 2: WPE and REPW against forward step h, and true against predicted return.

    TIPL's scatter has copy-last's beside it: snapshots a few epochs apart return nearly the same, so a scatter on the
    diagonal says something only if it lies closer to it than copying does.
    """
    figure, (errors, tipl, copied) = _figure(3, width=12, height=4.8, width_ratios=(1.4, 1, 1))
    outside = _draw_errors(errors, summary)
    _draw_scatters({"tipl": tipl, "copy-last": copied}, table)
    _legend_below(figure, _entries(errors), [*_without_band(summary, "repw_low"), *outside])
    return figure


@_as_shipped()
def skill_by_step(summary: Sequence[Row]) -> Figure:
    """Skill against forward step h with its confidence band; 0 is copying the last snapshot, 1 is the truth."""
    figure, (axes,) = _figure(1, width=8.5, height=4.4)
    lines = {line: rows for line, rows in _lines(summary).items() if line[0] != "copy-last"}
    for line, rows in lines.items():
        step_H, skill_H, low_H, high_H = (_column(rows, key) for key in ("step", "skill", "skill_low", "skill_high"))
        look = _look(line[0]) | {"linestyle": _style(line, lines), "label": _label(rows, lines)}
        axes.fill_between(step_H, low_H, high_H, color=look["color"], alpha=0.18, linewidth=0)
        axes.plot(step_H, skill_H, marker="o", **look)
    _dress(axes, "Skill against copying the last snapshot, per forward step", "forward step h [snapshots]", "skill")
    _tick_steps(axes, (row["step"] for row in summary))
    drawn = {"tipl": ("skill", "skill_low")}  # of the others' bands, what is above the picture's edge
    named = [
        (line[0], _label(rows, lines), np.concatenate([_column(rows, key) for key in drawn.get(line[0], ("skill",))]))
        for line, rows in lines.items()
    ]
    outside = _frame_skill([axes], named)
    _legend_below(figure, _entries(axes), [*_without_band(summary, "skill_low"), *outside])
    return figure


@_as_shipped()
def skill_over_ridge(comparisons: Sequence[Row]) -> Figure:
    """TIPL's skill less the ridge's on the same windows, overall and by phase, with the interval of the difference."""
    rows = [row for row in comparisons if row["against"] == "ridge" and row["group"] in ("all", "phase")]
    figure, (axes,) = _figure(1, width=8.5, height=4.4)
    phases = sorted({int(row["value"]) for row in rows if row["group"] == "phase"})
    for value in (*phases, -1):
        own = sorted((row for row in rows if int(row["value"]) == value), key=lambda row: row["step"])
        step_H, gain_H, low_H, high_H = (
            _column(own, key) for key in ("step", "skill_difference", "difference_low", "difference_high")
        )
        colour = COLOURS["tipl"] if value < 0 else PHASE_COLOURS[value % len(PHASE_COLOURS)]
        label = f"phase {value}" if value >= 0 else "all windows"
        axes.fill_between(step_H, low_H, high_H, color=colour, alpha=0.15, linewidth=0)
        axes.plot(step_H, gain_H, color=colour, marker="o", ms=4.5, lw=2.5 if value < 0 else 1.5, label=label)
    axes.axhline(0, color=COLOURS["copy-last"], linewidth=2, zorder=1, label=f"as good as {_name('ridge')}")
    _dress(axes, f"What TIPL adds to {_name('ridge')}", "forward step h [snapshots]", "difference of skill")
    _tick_steps(axes, (row["step"] for row in rows))
    differences = _column(rows, "skill_difference")
    if not np.isfinite(differences).any():
        _say(axes, "The results hold no windows on which both TIPL and the ridge were asked")
    finite = differences[np.isfinite(differences)]
    if np.abs(finite).max(initial=0) > 2:
        _frame(axes, float(finite.min(initial=0)), float(finite.max(initial=0)))
    _legend_below(figure, _entries(axes))
    return figure


@_as_shipped()
def spread(summary: Sequence[Row]) -> Figure:
    """How much predicted policies differ among each other: in returns, beside the true ones', and in weights."""
    figure, (returns, distances) = _figure(2, width=10, height=4.2)
    lines = _lines([row for row in summary if math.isfinite(_value(row, "returns_spread"))])
    for line, rows in lines.items():
        look = _look(line[0]) | {"linestyle": _style(line, lines), "label": _label(rows, lines)}
        step_H, spread_H = _column(rows, "step"), _column(rows, "returns_spread")
        returns.plot(step_H, spread_H, marker="o", **look)
        share_H = _column(rows, "distance") / _positive(_column(rows, "distance_true"))
        distances.plot(step_H, share_H, marker="o", **look)
    true_H = {row["step"]: _value(row, "returns_spread_true") for rows in lines.values() for row in rows}
    returns.plot(
        sorted(true_H), [true_H[step] for step in sorted(true_H)], "--", color=INK, lw=1.5, label="true policies"
    )
    distances.axhline(1, color=INK, linestyle="--", linewidth=1.5)
    if not lines:
        _say(returns, "No policies were run")
    if not any(np.isfinite(line.get_ydata()).any() for line in distances.lines[:-1]):
        _say(distances, "There are no two windows of one trial to compare")
    returns.set_ylim(bottom=0)
    distances.set_ylim(0, max(1.1, 1.04 * distances.get_ylim()[1]))
    _dress(returns, "Spread of the policies' returns", "forward step h [snapshots]", "standard deviation")
    _dress(distances, "Distance between policies", "forward step h [snapshots]", "share of the true ones'")
    for axes in (returns, distances):
        _tick_steps(axes, (row["step"] for row in summary))
    _legend_below(figure, _entries(returns))
    return figure


def skill_by_phase(table: Table) -> Figure:
    """Skill against forward step h, one panel per phase: the context's last snapshot within its PPO iteration."""
    titles = {int(phase): f"phase {phase}" for phase in np.unique(table["phase"])} | {0: "phase 0: iteration closed"}
    return _skill_panels(
        table, "phase", titles, "Skill by phase: snapshots into its PPO iteration where the context ends"
    )


def skill_by_third(table: Table) -> Figure:
    """Skill against forward step h, one panel per third of training."""
    titles = {0: "first third", 1: "second third", 2: "last third"}
    return _skill_panels(table, "third", titles, "Skill by stage of the policy's training")


@_as_shipped()
def learning_curves(curves: Sequence[Curve]) -> Figure:
    """Episodic return against environment steps: every trial, and their mean with a 95% bootstrap band.

    A curve is (seed, env_steps_T, episodic_returns_T); NaN marks snapshots before which no episode ended. The mean is
    taken where every trial has data, each trial interpolated linearly.
    """
    known = [(steps_T[np.isfinite(returns_T)], returns_T[np.isfinite(returns_T)]) for _, steps_T, returns_T in curves]
    known = [(steps_T, returns_T) for steps_T, returns_T in known if len(steps_T)]
    figure, (axes,) = _figure(1, width=8.5, height=4.2)
    for steps_T, returns_T in known:
        dots = "o" if len(steps_T) == 1 else ""
        axes.plot(steps_T, returns_T, color=COLOURS["tipl"], linewidth=0.7, alpha=0.3, marker=dots)
    shown = f"one trial ({len(known)} of {len(curves)}, as in the others no episode ended)"
    shown = f"one trial ({len(known)} shown)" if len(known) == len(curves) else shown
    entries = [Line2D([], [], color=COLOURS["tipl"], linewidth=0.9, alpha=0.6, label=shown)] if known else []
    low = max((steps_T[0] for steps_T, _ in known), default=0)
    high = min((steps_T[-1] for steps_T, _ in known), default=0)
    if len(known) > 1 and low < high:
        grid_G = np.linspace(low, high, 200)
        returns_NG = np.stack([np.interp(grid_G, steps_T, returns_T) for steps_T, returns_T in known])
        label = "their mean"
        if len(known) >= MIN_TRIALS:
            low_G, high_G = _bootstrap_band(returns_NG)
            axes.fill_between(grid_G, low_G, high_G, color=COLOURS["linear"], alpha=0.3, linewidth=0)
            label = "mean and its 95% interval"
        axes.plot(grid_G, returns_NG.mean(0), color=COLOURS["linear"], linewidth=2.2)
        entries += [Line2D([], [], color=COLOURS["linear"], linewidth=2.2, label=label)]
    _dress(axes, "Episodic return of every PPO trial as it learns", "environment steps", "episodic return")
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.set_xlim(0, max((steps_T[-1] for _, steps_T, _ in curves if len(steps_T)), default=0) or 1)
    if not known:
        _say(axes, f"No episode ended in any of the {len(curves)} trials, so there are no returns to draw")
    _legend_below(figure, entries)
    return figure


@_as_shipped()
def contenders(curves: Mapping[str, tuple[np.ndarray, np.ndarray]], title: str) -> Figure:
    """Learning curves of contenders, (env_steps_I, returns_SI) each: interquartile mean over trials, 95% bands.

    The first contender, which the others are held against, is black; where a name ends in a predictor's, its colour.
    """
    figure, (axes,) = _figure(1, width=9.5, height=4.8)
    entries = []
    for index, (name, (steps_I, returns_SI)) in enumerate(curves.items()):
        colour, jumps = _contender_colour(name, index == 0), name.partition("+")[2]
        if len(returns_SI) >= MIN_TRIALS:
            picked_RS = np.random.default_rng(0).integers(len(returns_SI), size=(1000, len(returns_SI)))
            middle_RI = np.stack([interquartile_mean(returns_SI[picked_S].T) for picked_S in picked_RS])
            low_I, high_I = np.quantile(middle_RI, [0.025, 0.975], axis=0)
            axes.fill_between(steps_I, low_I, high_I, color=colour, alpha=0.12, linewidth=0)
        axes.plot(steps_I, interquartile_mean(returns_SI.T), color=colour, linewidth=1.9)
        label = f"{name.partition('+')[0]} epochs" + (f", jumps by {jumps}" if jumps else "")
        entries.append(Line2D([], [], color=colour, linewidth=2.2, label=label))
    _dress(axes, f"PPO with and without jumps: {title}", "environment steps", "episodic return, interquartile mean")
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    _legend_below(figure, entries)
    return figure


@_as_shipped()
def contender_differences(rows: Sequence[Row]) -> Figure:
    """Area under the curve, less the first contender's and as a share of it, with its interval; a panel per task.

    Rows are `contenders.score`'s. Filled is what the interval tells apart from the first contender.
    """
    tasks = list(dict.fromkeys((row["task"], row["env_steps"]) for row in rows))
    names = list(dict.fromkeys(row["contender"] for row in rows))
    height = 1.6 + 0.34 * max(1, len(names) - 1)
    figure, panels = _figure(len(tasks), width=2.6 + 2.9 * min(3, len(tasks)), height=height, share=True, across=3)
    for axes, (task, env_steps) in zip(panels, tasks, strict=False):
        first, *others = [row for row in rows if (row["task"], row["env_steps"]) == (task, env_steps)]
        for row in others:
            place = names.index(row["contender"])
            size = abs(first["auc"]) or math.nan
            middle, low, high = (100 * row[f"auc_less_first{end}"] / size for end in ("", "_low", "_high"))
            if not math.isfinite(middle):
                axes.text(
                    0, place, "no area", ha="center", va="center", fontsize=10, color=SOFT, backgroundcolor="white"
                )
                continue
            colour = _contender_colour(row["contender"], first=False)
            face = colour if low > 0 or high < 0 else "white"
            axes.plot([low, high], [place, place], color=colour, linewidth=2.2, solid_capstyle="round")
            axes.plot(middle, place, "o", ms=7, mfc=face, mec=colour, mew=1.8)
        axes.axvline(0, color=INK, linewidth=1.4, zorder=1)
        _dress(axes, f"{task}\n{env_steps:,} steps", f"AUC relative to {first['contender']} epochs [%]", "")
        axes.set_yticks(range(1, len(names)), [_wrapped(figure, name, 2.2, 10.5) for name in names[1:]])
        axes.set_ylim(max(len(names), 2) - 0.4, 0.4)
    if len(names) < 2:
        _say(panels[0], "There is no second contender to compare")
    return figure


@_as_shipped()
def learning_rates(rows: Sequence[Row]) -> Figure:
    """Mean area under the curve over the trials of a search, by learning rate; a panel per task, the chosen filled.

    Rows are `contenders.search_rows`'.
    """
    tasks = list(dict.fromkeys((row["task"], row["env_steps"]) for row in rows))
    figure, panels = _figure(len(tasks), width=2.2 + 3.1 * min(3, len(tasks)), height=4.2, across=3)
    entries: dict[str, Line2D] = {}
    for axes, (task, env_steps) in zip(panels, tasks, strict=False):
        own = [row for row in rows if (row["task"], row["env_steps"]) == (task, env_steps)]
        for index, name in enumerate(dict.fromkeys(row["contender"] for row in own)):
            line = [row for row in own if row["contender"] == name]
            colour = _contender_colour(name, index == 0)
            axes.plot(_column(line, "learning_rate"), _column(line, "auc"), color=colour, lw=1.5, marker="o", ms=3)
            for best in (row for row in line if row["chosen"]):
                axes.plot(best["learning_rate"], best["auc"], "o", ms=8, color=colour)
            entries.setdefault(name, Line2D([], [], color=colour, linewidth=2.2, label=name))
        axes.set_xscale("log")
        rates = sorted({row["learning_rate"] for row in own})
        axes.set_xticks(rates, [f"{1e4 * rate:.4g}" for rate in rates])
        axes.minorticks_off()
        up = f"area under the curve, mean of {own[0]['seeds']} trials" if _is_first_in_line(axes) else ""
        _dress(axes, f"{task}\n{env_steps:,} steps", "learning rate [0.0001]", up)
    if not rows:
        _say(panels[0], "No learning rates were searched")
    _legend_below(figure, list(entries.values()))
    return figure


@_as_shipped()
def reconstruction(rows: Sequence[Row]) -> Figure:
    """What the Temporal SVD loses at each rank D on held-out trials: energy outside the basis, and squared error.

    Rows have trial, rank, energy_outside (share of the squared norm) and mse (per weight). Zeros cannot be drawn on a
    logarithmic axis and are left out.
    """
    figure, panels = _figure(2, width=10, height=4.0)
    ranks = sorted({int(row["rank"]) for row in rows})
    drawn = (
        ("energy_outside", "Energy outside the basis", "share of squared norm"),
        ("mse", "Squared error of restored weights", "mean squared error per weight"),
    )
    for axes, (key, title, unit) in zip(panels, drawn, strict=True):
        for trial in sorted({row["trial"] for row in rows}):
            own = sorted((row for row in rows if row["trial"] == trial), key=lambda row: row["rank"])
            axes.plot(_column(own, "rank"), _positive(_column(own, key)), color=COLOURS["svd-floor"], lw=0.9, alpha=0.5)
        mean = np.array([np.mean([row[key] for row in rows if row["rank"] == rank]) for rank in ranks])
        axes.plot(ranks, _positive(mean), color=INK, linewidth=2, marker="o", markersize=4.5)
        axes.set_xscale("log", base=2)
        if (mean > 0).any():
            _log_scale(axes)
        else:
            _say(axes, "The basis keeps everything" if len(mean) else "No weights were restored")
        few = ranks if len(ranks) <= 10 else [2**power for power in range(max(ranks).bit_length())]
        axes.xaxis.set_major_locator(FixedLocator(few))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:.0f}"))
        _dress(axes, title, "SVD rank D", unit)
    entries = [
        Line2D([], [], color=COLOURS["svd-floor"], linewidth=1.2, alpha=0.7, label="one held-out trial"),
        Line2D([], [], color=INK, linewidth=2, marker="o", markersize=4.5, label="mean of held-out trials"),
    ]
    _legend_below(figure, entries)
    return figure


@_as_shipped()
def training_curves(history: Sequence[Row]) -> Figure:
    """Training and validation loss of the Transformer against optimisation steps.

    Rows have step and loss; validation_loss only where the model was validated.
    """
    figure, (axes,) = _figure(1, width=8.5, height=4.0)
    step_R, loss_R, validation_R = (_column(history, key) for key in ("step", "loss", "validation_loss"))
    drawn: tuple[tuple[np.ndarray, str, dict[str, Any]], ...] = (
        (loss_R, COLOURS["copy-last"], {"linewidth": 1.3, "label": "training trials"}),
        (validation_R, COLOURS["tipl"], {"linewidth": 2, "marker": "o", "label": "held-out validation trials"}),
    )
    for values_R, colour, look in drawn:
        seen = np.isfinite(values_R)
        if seen.any():
            dots = {"marker": "o"} if seen.sum() == 1 else {}
            axes.plot(step_R[seen], values_R[seen], color=colour, markersize=4.5, **(look | dots))
    finite = np.concatenate([loss_R, validation_R])
    finite = finite[np.isfinite(finite)]
    if len(finite) and finite.min() > 0:
        _log_scale(axes)
    if not len(finite):
        _say(axes, "No loss was recorded")
    _dress(axes, "The Transformer's loss as it trains", "optimisation steps", "loss")
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    _legend_below(figure, _entries(axes))
    return figure


def png(figure: Figure) -> bytes:
    """The figure as PNG, the same bytes for the same figure: fixed resolution, no date, no version."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def save(figure: Figure, path: str | Path) -> Path:
    """Write the figure as PNG and return where."""
    path = Path(path)
    path.write_bytes(png(figure))
    return path


def _draw_errors(errors: Axes, summary: Sequence[Row]) -> list[str]:
    """WPE in the upper half, on the left axis; REPW in the lower half, on the right axis, with its noise floor.

    Returns in words what falls out of the picture, if anything does.
    """
    returns = errors.twinx()
    run = {row["predictor"] for row in summary if math.isfinite(_value(row, "repw"))}
    lines = _lines([row for row in summary if not run or row["predictor"] in run])
    lower_half = Rectangle((0, 0), 1, 0.5, transform=returns.transAxes)
    for line, rows in lines.items():
        look, style = _look(line[0]), _style(line, lines)
        step_H, wpe_H, repw_H, low_H, high_H = (
            _column(rows, key) for key in ("step", "wpe", "repw", "repw_low", "repw_high")
        )
        errors.plot([], [], style, lw=2.5, label=_label(rows, lines), color=look["color"])
        errors.plot(step_H, _positive(wpe_H), ":", marker="o", mfc="white", **look)
        band = returns.fill_between(step_H, low_H, high_H, color=look["color"], alpha=0.15, linewidth=0)
        (curve,) = returns.plot(step_H, repw_H, style, marker="s", **look)
        for drawn in (band, curve):
            drawn.set_clip_path(lower_half)
    floor_H = _noise_floor(summary)
    if floor_H:
        errors.plot([], [], "--", color=INK, lw=1.3, label="noise floor of REPW")
    returns.plot(list(floor_H), list(floor_H.values()), "--", color=INK, linewidth=1.3)
    unit = "forward step h [snapshots]"
    _dress(errors, "Error of weights and of returns", unit, "WPE (squared error)")
    _dress(returns, "", "", "REPW (return)")
    returns.grid(visible=False)
    returns.spines["right"].set_visible(True)
    _tick_steps(errors, (row["step"] for row in summary))
    top = _repw_top(lines)
    _halve(errors, returns, top)
    if not run:
        returns.set_yticks([])
        returns.text(
            0.5, 0.25, "no policies were run", transform=returns.transAxes, ha="center", va="center", color=SOFT
        )
    highest = {_label(rows, lines): _most(_column(rows, "repw")) for rows in lines.values()}
    outside = [f"REPW of {label} rises to {_short(value)}" for label, value in highest.items() if value > top]
    return [f"Outside the picture: {', '.join(outside)}"] if outside else []


def _without_band(summary: Sequence[Row], key: str) -> list[str]:
    """Why lines have no band, where trials are too few for one."""
    trials = max((int(row.get("trials", MIN_TRIALS)) for row in summary), default=MIN_TRIALS)
    if trials >= MIN_TRIALS or np.isfinite(_column(summary, key)).any():
        return []
    return [f"{trials} test trial{'s' * (trials > 1)}: too few for intervals"]


def _repw_top(lines: Mapping[tuple[str, str], Sequence[Row]]) -> float:
    """Where REPW's axis ends: a predictor that diverges must not press the comparison with copying flat."""
    known = {
        line: _most(np.concatenate([_column(rows, key) for key in ("repw", "repw_high")]))
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
    _tick_decades(errors, low, high)
    returns.set_ylim(0, 2 * top)
    returns.yaxis.set_major_locator(FixedLocator([t for t in MaxNLocator(5).tick_values(0, top) if t <= top]))
    returns.axhline(top, color="#999999", linewidth=0.8)
    errors.yaxis.label.set_y(0.75)
    returns.yaxis.label.set_y(0.25)


def _log_scale(axes: Axes) -> None:
    """A logarithmic axis over what is drawn, its ticks plain numbers."""
    axes.set_yscale("log")
    low, high = np.log10(axes.get_ylim())
    _tick_decades(axes, low, high)


def _tick_decades(axes: Axes, low: float, high: float) -> None:
    """Label a logarithmic axis between two powers of ten: by decades, and between them where there are few."""
    between = (1.0,) if high - low > 2.5 else (1.0, 2.0, 5.0)
    ticks = [tick for tick in LogLocator(subs=between).tick_values(10**low, 10**high) if low <= np.log10(tick) <= high]
    if len(ticks) < 2:
        ticks = [tick for tick in MaxNLocator(5).tick_values(10**low, 10**high) if 10**low <= tick <= 10**high]
    axes.yaxis.set_major_locator(FixedLocator(ticks))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axes.yaxis.set_minor_locator(NullLocator())


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
            notes += [f"mean difference {_short(np.abs(true_R - predicted_R).mean())}"]
            at_top = np.minimum(true_R, predicted_R) >= high - 0.001 * (high - low)
            if at_top.mean() > 0.05:
                notes += [f"{at_top.mean():.0%} of {len(true_R):,} points in the corner"]
        else:
            _say(axes, "no policies were run")
        if not len(both):
            axes.set(xticks=[], yticks=[])
        _dress(axes, SCATTER_TITLES[name], "\n".join(["return of predicted policy", *notes]), "")
    panels["tipl"].set_ylabel("return of true policy", fontsize=11.5, color=INK)
    panels["copy-last"].tick_params(labelleft=False)


@_as_shipped()
def _skill_panels(table: Table, column: str, titles: Mapping[int, str], title: str) -> Figure:
    values = [int(value) for value in np.unique(table[column])]
    names = [name for name in _order(np.unique(table["predictor"]).tolist()) if name != "copy-last"]
    figure, panels = _figure(len(values), width=max(8.5, 2.5 * min(5, len(values))), height=4.0, share=True, across=5)
    skills: list[tuple[str, str, np.ndarray]] = []
    for axes, value in zip(panels, values, strict=False):
        for name in names:
            step_H, skill_H = _skill(table, (table[column] == value) & (table["predictor"] == name))
            skills.append((name, _name(name), skill_H))
            axes.plot(step_H, skill_H, marker="o", label=_name(name), **_look(name))
        _dress(axes, titles[value], "forward step h", "skill" if _is_first_in_line(axes) else "")
        axes.title.set_fontsize(11)
        _tick_steps(axes, table["step"].tolist(), 5)
    figure.suptitle(
        _wrapped(figure, title, 0.95 * figure.get_figwidth(), 13, "bold"), fontsize=13, color=INK, fontweight="bold"
    )
    outside = _frame_skill(panels, skills)
    _legend_below(figure, _entries(panels[0]), outside)
    return figure


def _skill(table: Table, chosen_R: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    step_H, step_R = np.unique(table["step"][chosen_R], return_inverse=True)
    error_H = np.bincount(step_R, table["squared_error"][chosen_R], minlength=len(step_H))
    displacement_H = np.bincount(step_R, table["displacement_squared"][chosen_R], minlength=len(step_H))
    return step_H, 1 - error_H / np.where(displacement_H > 0, displacement_H, np.nan)


def _bootstrap_band(values_NG: np.ndarray, num_resamples: int = 1000) -> tuple[np.ndarray, np.ndarray]:
    count = len(values_NG)
    draws_BN = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), size=num_resamples)
    low_G, high_G = np.quantile(draws_BN @ values_NG / count, [0.025, 0.975], axis=0)
    return low_G, high_G


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


def _colour(name: str) -> str:
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


def _look(name: str) -> dict[str, Any]:
    """A predictor's line: TIPL lies on top, thinner, so that what is under it shows; copying on top of the rest."""
    size = {"lw": 1.7, "ms": 4} if name == "tipl" else {"lw": 2.5, "ms": 5.5}
    return {"color": _colour(name), "zorder": {"tipl": 4.0, "copy-last": 3.5}.get(name, 3.0), **size}


def _contender_colour(name: str, first: bool) -> str:
    """The first contender is black, others without jumps grey; with jumps they have their predictor's colour."""
    jumps = name.partition("+")[2]
    return INK if first else _colour(jumps) if jumps else COLOURS["copy-last"]


def _noise_floor(summary: Sequence[Row]) -> dict[int, float]:
    """REPW's noise floor per step; the same for every predictor, since it compares true policies with themselves."""
    floor = [(int(row["step"]), _value(row, "repw_noise_floor")) for row in summary]
    return {step: value for step, value in sorted(floor) if math.isfinite(value)}


def _column(rows: Sequence[Row], key: str) -> np.ndarray:
    return np.array([_value(row, key) for row in rows], dtype=np.float64)


def _value(row: Row, key: str) -> float:
    value = row.get(key)
    return math.nan if value is None or value == "" else float(value)


def _positive(values: np.ndarray) -> np.ndarray:
    return np.where(values > 0, values, np.nan)


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}"


def _figure(
    num_panels: int,
    *,
    width: float,
    height: float,
    width_ratios: Sequence[float] | None = None,
    share: bool = False,
    across: int | None = None,
) -> tuple[Figure, list[Axes]]:
    """Panels side by side, at most `across` of them in one line, each line `height` inches high."""
    num_panels = max(1, num_panels)
    across = min(num_panels, across or num_panels)
    lines = -(-num_panels // across)
    figure = _Picture(figsize=(width, lines * height), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(lines, across, sharey=share, squeeze=False, width_ratios=width_ratios).ravel()
    for spare in panels[num_panels:]:
        spare.remove()
    return figure, list(panels[:num_panels])


def _is_first_in_line(axes: Axes) -> bool:
    place = axes.get_subplotspec()
    return place is None or place.is_first_col()


def _dress(axes: Axes, title: str, across: str, up: str) -> None:
    figure, room = axes.get_figure(root=True), axes.get_position()
    assert figure is not None
    width, height = 1.15 * room.width * figure.get_figwidth(), 1.1 * room.height * figure.get_figheight()
    axes.set_title(_wrapped(figure, title, width, 12.5, "bold"), fontsize=12.5, color=INK, fontweight="bold")
    axes.set_xlabel(_wrapped(figure, across, width, 11.5), fontsize=11.5, color=INK)
    axes.set_ylabel(_wrapped(figure, up, height, 11.5), fontsize=11.5, color=INK)
    axes.tick_params(which="both", labelsize=10.5, colors=INK, length=3)
    axes.grid(visible=True, color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color("#999999")


def _say(axes: Axes, words: str) -> None:
    """In the middle of an empty picture, why it is empty."""
    axes.text(
        *(0.5, 0.5, textwrap.fill(words, 32)),
        transform=axes.transAxes,
        ha="center",
        va="center",
        fontsize=11.5,
        color=SOFT,
    )


def _wrapped(figure: Figure, text: str, inches: float, size: float, weight: str = "normal") -> str:
    """The text, over as many lines as keep it within so many inches; a word that is longer is broken."""
    probe = Text(0, 0, text, fontsize=size, fontweight=weight)
    probe.set_figure(figure)
    longest = min(max(map(len, text.split("\n"))), int(inches * 72 / (0.25 * size)))
    for letters in range(longest, 0, -1):
        if probe.get_window_extent().width <= inches * figure.dpi:
            break
        lines = [part for line in text.split("\n") for part in textwrap.wrap(line, letters) or [""]]
        probe.set_text("\n".join(lines))
    return probe.get_text()


def _tick_steps(axes: Axes, steps: Iterable[int], num_ticks: int = 10) -> None:
    """Whole forward steps only, also where there is but one, or none."""
    seen = set(steps) or {1}
    margin = max(0.5, 0.02 * (max(seen) - min(seen)))
    axes.set_xlim(min(seen) - margin, max(seen) + margin)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=num_ticks))


def _frame_skill(panels: Sequence[Axes], skills: Sequence[tuple[str, str, np.ndarray]]) -> list[str]:
    """Draw copy-last's zero line, keep the axis where skill is of interest, and say in words what falls out of it.

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
        _say(panels[0], "There is no skill to draw: nothing moved, or every forecast diverged")
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


def _entries(axes: Axes) -> list[Line2D]:
    """The lines that were given a label, whatever it begins with: matplotlib leaves out those with an underscore."""
    return [line for line in axes.lines if not re.fullmatch(r"_child\d+", str(line.get_label()))]


def _legend_below(figure: Figure, entries: Sequence[Line2D], notes: Sequence[str] = ()) -> None:
    """In as few lines as fit the figure's width, long names broken; the figure grows by its height."""
    if not entries:
        return
    room = 0.97 * figure.get_figwidth()
    labels = [_wrapped(figure, str(entry.get_label()), min(room - 0.8, 5.0), LETTERS) for entry in entries]
    told = _wrapped(figure, "\n".join(notes), room - 0.4, LETTERS) if notes else None
    look: dict[str, Any] = {"loc": "outside lower center", "frameon": False, "fontsize": LETTERS, "title": told}
    look |= {"title_fontsize": LETTERS, "columnspacing": 1.4, "handlelength": 1.8}
    for lines in range(-(-len(entries) // 5), len(entries) + 1):
        columns = -(-len(entries) // lines)
        legend = figure.legend(handles=list(entries), labels=labels, ncols=columns, **look)
        size = legend.get_window_extent()
        if size.width <= room * figure.dpi or columns == 1:
            break
        legend.remove()
    figure.set_figheight(figure.get_figheight() + size.height / figure.dpi)


@_as_shipped()
def sweep_heat_map(
    cells: Sequence[Row], across: str, up: str, names: Mapping[str, str], metric: str = "skill"
) -> Figure:
    """Skill over two fields of a sweep, and the ridge's in a row of its own; the best cell is framed.

    A cell is one run: its fields' values, `skill`, `ridge` and, where it is known, `floor`, the skill of the true
    future on the run's basis; where that is the same all along each line it has a column of its own. One scale of
    colours has them all: white is copying, blue is better, up to 1, and red is worse, by the decades of the error, down
    to the worst cell. Runs that no grid holds, as a random search makes them, are dots.
    """
    columns, lines = (sorted({cell[field] for cell in cells}, key=_sort_key) for field in (across, up))
    if len(columns) * len(lines) > 3 * len(cells):
        return _sweep_dots(cells, across, up, names, metric)
    groups = [[[c["skill"] for c in cells if (c[across], c[up]) == (x, y)] for x in columns] for y in lines]
    ridges = [[c["ridge"] for c in cells if c[across] == x] for x in columns]
    floors = [{round(cell.get("floor", math.nan), 6) for cell in cells if cell[up] == line} for line in lines]
    has_ridge = any(math.isfinite(value) for ridge in ridges for value in ridge)
    has_floor = all(len(floor) == 1 and np.isfinite([*floor]).all() for floor in floors)
    groups = [*([ridges] * has_ridge), *groups]
    means, deviations = (np.array([[told(group) for group in row] for row in groups]) for told in (_mean, _deviation))
    if has_floor:
        means = np.column_stack([means, [*([math.nan] * has_ridge), *(max(floor) for floor in floors)]])
    figure, (axes,) = _figure(1, width=3.0 + 1.7 * means.shape[1], height=2.2 + 0.75 * len(lines))
    norm, colours = _colours(means, metric)
    shown = axes.imshow(means, norm=norm, cmap=colours, aspect="auto", origin="lower")
    for line, column in np.ndindex(means.shape):
        mean, is_run = float(means[line, column]), line >= has_ridge and column < len(columns)
        if math.isfinite(mean):
            varies = is_run and deviations[line, column] > 0
            words = _skill_text(mean, float(deviations[line, column]) if varies else None)
        else:
            words = "diverged" if is_run and groups[line][column] else ""
        if words:
            axes.text(column, line, words, ha="center", va="center", fontsize=11, color=_readable(shown, mean))
    runs = means[has_ridge:, : len(columns)]
    if np.isfinite(runs).any():
        line, column = np.unravel_index(np.nanargmax(runs), runs.shape)
        corner = (column - 0.46, line + has_ridge - 0.44)
        axes.add_patch(Rectangle(corner, 0.92, 0.88, fill=False, edgecolor=INK, linewidth=2.5, zorder=3))
    _dress(axes, f"{metric} over {names[up]} and {names[across]}; the best framed", names[across], names[up])
    axes.grid(visible=False)
    told = [*map(_value_text, columns), *(["true future\non the basis"] * has_floor)]
    axes.set_xticks(range(means.shape[1]), [_wrapped(figure, text, 1.6, 10.5) for text in told])
    told = [*(["ridge"] * has_ridge), *map(_value_text, lines)]
    axes.set_yticks(range(len(told)), [_wrapped(figure, text, 1.6, 10.5) for text in told])
    if has_ridge:
        axes.axhline(0.5, color="white", linewidth=4)
    if has_floor:
        axes.axvline(len(columns) - 0.5, color="white", linewidth=4)
    _colour_bar(figure, axes, shown, metric)
    return figure


def _sweep_dots(cells: Sequence[Row], across: str, up: str, names: Mapping[str, str], metric: str) -> Figure:
    """A dot for every run, in the colours of the heat map; the best is ringed."""
    figure, (axes,) = _figure(1, width=8.5, height=4.8)
    values = np.array([cell["skill"] if math.isfinite(cell["skill"]) else math.nan for cell in cells])
    norm, colours = _colours(values, metric)
    places = [_places(axes, way, [cell[field] for cell in cells]) for way, field in (("x", across), ("y", up))]
    known = np.isfinite(values)
    x, y = (np.asarray(place) for place in places)
    axes.scatter(x[~known], y[~known], marker="x", s=60, color=SOFT, label="diverged")
    shown = axes.scatter(
        *(x[known], y[known]), c=values[known], norm=norm, cmap=colours, s=110, edgecolors="#999999", zorder=2
    )
    if known.any():
        best = int(np.nanargmax(values))
        axes.plot(x[best], y[best], "o", ms=16, mfc="none", mec=INK, mew=2.5, zorder=3)
        axes.annotate(_skill_text(values[best]), (x[best], y[best]), (11, 9), textcoords="offset points", fontsize=11)
    _dress(axes, f"{metric} over {names[up]} and {names[across]}; the best ringed", names[across], names[up])
    if not known.all():
        entries = [Line2D([], [], color=SOFT, marker="x", linestyle="", label="run that diverged")]
        _legend_below(figure, entries)
    _colour_bar(figure, axes, shown, metric)
    return figure


def _places(axes: Axes, way: str, values: Sequence[Any]) -> Sequence[float]:
    """Where values are on the axis x or y: numbers by size, over decades by their logarithm; words by their order."""
    axis: Axis = getattr(axes, f"{way}axis")
    if not all(isinstance(value, int | float) for value in values):
        words = sorted(set(values), key=_sort_key)
        axis.set_ticks(range(len(words)), [_value_text(word) for word in words])
        return [words.index(value) for value in values]
    if min(values) > 0 and max(values) > 20 * min(values):
        axes.set(**{f"{way}scale": "log"})
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.set_minor_formatter(NullFormatter())
    return values


def _colours(values: np.ndarray, metric: str) -> tuple[Normalize, str]:
    """The scale of colours that has every value: of skills from the worst over copying, at the middle, to 1."""
    finite = values[np.isfinite(values)]
    if not _is_skill(metric) or finite.max(initial=0) > 1:
        return Normalize(*((finite.min(), finite.max()) if len(finite) else (0, 1))), "viridis"
    worst = min(-1.0, float(finite.min(initial=0)))

    def forward(skill: Any) -> np.ndarray:
        skill = np.asarray(skill, np.float64)
        return np.where(skill >= 0, skill, -np.log1p(np.maximum(-skill, 0)) / math.log1p(-worst))

    def inverse(share: Any) -> np.ndarray:
        share = np.asarray(share, np.float64)
        return np.where(share >= 0, share, -np.expm1(np.maximum(-share, 0) * math.log1p(-worst)))

    return FuncNorm((forward, inverse), worst, 1.0), "RdBu"


def _readable(shown: AxesImage, value: float) -> str:
    """Black or white, whichever can be read on the colour of a value."""
    red, green, blue, _ = shown.to_rgba(np.ma.masked_invalid([value]))[0]
    return INK if 0.3 * red + 0.59 * green + 0.11 * blue > 0.5 or not math.isfinite(value) else "white"


def _is_skill(metric: str) -> bool:
    return "skill" in metric


def _mean(skills: Sequence[float]) -> float:
    """Of the runs that did not diverge; NaN where none is left."""
    known = [skill for skill in skills if math.isfinite(skill)]
    return float(np.mean(known)) if known else math.nan


def _deviation(skills: Sequence[float]) -> float:
    """Standard deviation of the runs that did not diverge; 0 of one."""
    known = [skill for skill in skills if math.isfinite(skill)]
    return float(np.std(known, ddof=1)) if len(known) > 1 else 0.0


def _colour_bar(figure: Figure, axes: Axes, shown: AxesImage | PathCollection, metric: str) -> None:
    """What the colours stand for, from the worst value to the best that there can be."""
    bar = figure.colorbar(shown, ax=axes)
    bar.ax.tick_params(labelsize=10)
    told = metric
    if isinstance(shown.norm, FuncNorm):
        worst = float(shown.norm.vmin or 0)
        powers = [-(10.0**power) for power in range(math.floor(math.log10(-worst)) + 1)]
        near = [power for power in powers if power > worst / 3]
        bar.ax.yaxis.set_major_locator(FixedLocator([worst, *sorted(near)[-4:], 0, 0.5, 1]))
        bar.ax.yaxis.set_major_formatter(
            FuncFormatter(lambda skill, _: f"{skill:,.0f}" if skill <= -10 else f"{skill:.3g}")
        )
        bar.ax.yaxis.set_minor_locator(NullLocator())
        told = f"{metric}: 0 is copying, 1 is perfect"
    bar.set_label(_wrapped(figure, told, 0.8 * figure.get_figheight(), 10), fontsize=10, color=INK)


@_as_shipped()
def parallel_coordinates(cells: Sequence[Row], names: Mapping[str, str], metric: str = "skill") -> Figure:
    """Every run of a sweep as a line from the values of its fields to its skill; the better, the darker."""
    fields = [*names, "skill"]
    lost = sum(not math.isfinite(cell["skill"]) for cell in cells)
    cells = sorted((cell for cell in cells if math.isfinite(cell["skill"])), key=lambda cell: cell["skill"])
    figure, (axes,) = _figure(1, width=max(6.0, 2.2 * len(fields)), height=4.6)
    heights = []
    for place, field in enumerate(fields if cells else ()):
        values = [cell[field] for cell in cells]
        heights.append(_heights(values, error=field == "skill" and _is_skill(metric)))
        axes.axvline(place, color="#999999", linewidth=1, zorder=1)
        told = dict(zip(heights[-1].round(6).tolist(), values, strict=True))
        few = len(told) <= 8 and field != "skill"
        apart = [height for height in sorted(told) if few or height in (min(told), max(told))]
        for height in apart:
            text = _skill_text(told[height]) if field == "skill" else textwrap.fill(_value_text(told[height]), 18)
            side = "left" if field == "skill" else "right"
            at = place + (0.04 if field == "skill" else -0.04)
            behind = {"facecolor": "white", "alpha": 0.75, "linewidth": 0, "pad": 1}
            axes.text(at, height, text, ha=side, va="center", fontsize=10, bbox=behind, zorder=4)
    for index, line in enumerate(np.array(heights).T):
        share = index / max(1, len(cells) - 1)
        best = index == len(cells) - 1
        colour = COLOURS["linear"] if best else COLOURS["tipl"]
        axes.plot(
            range(len(fields)), line, color=colour, alpha=1 if best else 0.15 + 0.6 * share, lw=3 if best else 1.6
        )
    missing = f"; {lost} that diverged not drawn" if lost else ""
    _dress(axes, f"Every run: fields and {metric}; the best in red{missing}", "", "")
    axes.grid(visible=False)
    if not cells:
        _say(axes, "Every run diverged" if lost else "There are no runs")
    axes.set_xticks(range(len(fields)), [_wrapped(figure, name, 2.0, 10.5) for name in (*names.values(), metric)])
    axes.set_yticks([])
    axes.set_xlim(-0.5, len(fields) - 0.4)
    axes.spines["left"].set_visible(False)
    return figure


@_as_shipped()
def sweep_curves(
    curves: Sequence[tuple[Sequence[float], Sequence[float]]],
    best: tuple[Sequence[float], Sequence[float]],
    name: str,
    ridge: float = math.nan,
    metric: str = "skill",
) -> Figure:
    """Skill of every run of a sweep as it trained, with the best, the median and the ridge's level.

    A curve is (steps, skills). Where skills fall below -1 the error that is left is drawn instead, on a logarithmic
    axis.
    """
    everything = np.concatenate([np.empty(0), *(np.asarray(skills, np.float64) for _, skills in curves)])
    far = _is_skill(metric) and everything[np.isfinite(everything)].min(initial=0.0) < -1

    def drawn(skills: Iterable[float]) -> np.ndarray:
        return 1 - np.asarray(skills, np.float64) if far else np.asarray(skills, np.float64)

    figure, (axes,) = _figure(1, width=8.5, height=4.2)
    for steps, skills in curves:
        dots = "o" if len(steps) == 1 else ""
        axes.plot(steps, drawn(skills), color=COLOURS["copy-last"], linewidth=0.9, alpha=0.45, marker=dots)
    grid = sorted({step for steps, _ in curves for step in steps})
    at_step = [[s[list(t).index(step)] for t, s in curves if step in t] for step in grid]
    middle = [
        float(np.median([skill for skill in skills if not math.isnan(skill)] or [math.nan])) for skills in at_step
    ]
    axes.plot(grid, drawn(middle), color=INK, linewidth=2, label="median")
    axes.plot(best[0], drawn(best[1]), color=COLOURS["tipl"], lw=2.5, marker="o", ms=4.5, label=f"best: {name}")
    if math.isfinite(ridge):
        label = "ridge at the best run's context"
        axes.axhline(float(drawn([ridge])[0]), color=COLOURS["ridge"], lw=2, ls="--", label=label)
    if far:
        _log_scale(axes)
    if not np.isfinite(everything).any():
        _say(axes, "Every run diverged" if len(everything) else "There are no runs")
    up = f"1 - {metric}: squared error left" if far else metric
    _dress(axes, f"Every run as it trained: {metric} of the model kept so far", "optimisation steps", up)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    _legend_below(figure, _entries(axes))
    return figure


def _heights(values: Sequence[Any], error: bool = False) -> np.ndarray:
    """Places on an axis from 0 to 1: words by their order, numbers by size, over decades by their logarithm."""
    if not all(isinstance(value, int | float) for value in values):
        words = sorted(set(values), key=_sort_key)
        return np.array([words.index(value) / max(1, len(words) - 1) for value in values])
    numbers = np.asarray(values, np.float64)
    numbers = -np.log(np.maximum(1 - numbers, 1e-6)) if error else numbers
    if not error and numbers.min() > 0 and numbers.max() / numbers.min() > 20:
        numbers = np.log(numbers)
    span = numbers.max() - numbers.min()
    return (numbers - numbers.min()) / span if span else np.full(len(numbers), 0.5)


def _sort_key(value: Any) -> tuple[bool, Any]:
    return (isinstance(value, str), value)


def _value_text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _skill_text(skill: float, deviation: float | None = None) -> str:
    digits = 3 if abs(skill) < 10 else 0
    if 0 < abs(skill) < 0.0005:
        return f"{skill:.1e}" + (f"\n± {deviation:.1e}" if deviation is not None else "")
    return f"{skill:,.{digits}f}" + (f"\n± {deviation:,.{digits}f}" if deviation is not None else "")
