"""Pictures of an experiment, drawn from plain tables: the paper's Figure 2, skill, learning curves, reconstruction.

A table is a dict of equally long columns, as the evaluation's result table holds them; a summary is a list of dicts,
one per predictor, basis and step h. Every function returns a matplotlib Figure of its own: no pyplot, no global state.
Knows nothing of torch, Ray or files other than the one that `save` writes.

Shape suffixes: H steps ahead, N trials, G points of a common grid, T snapshots, B bootstrap resamples, R rows.
"""

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import (
    FixedLocator,
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    NullLocator,
    StrMethodFormatter,
)

from tipl_ray.metrics import interquartile_mean

Table = Mapping[str, np.ndarray]
Row = Mapping[str, Any]
Curve = tuple[int, np.ndarray, np.ndarray]

DPI = 160
INK = "#222222"
FAINT = "#d9d9d9"

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
    "svd-floor": "SVD floor (true future)",
    "window-floor": "window floor (true future)",
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
SCATTER_TITLES = {"tipl": "TIPL's predicted policies", "copy-last": "The last snapshot, copied"}
SPARE_COLOURS = ("#7f3b08", "#2d004b", "#1b7837", "#b2182b")
LINE_STYLES = ("-", "--", "-.", ":")
SKILL_FLOOR = -0.6


def figure_2(table: Table, summary: Sequence[Row]) -> Figure:
    """The paper's Figure 2: WPE and REPW against forward step h, and true against predicted return.

    TIPL's scatter has copy-last's beside it: snapshots a few epochs apart return nearly the same, so a scatter on the
    diagonal says something only if it lies closer to it than copying does.
    """
    figure, (errors, tipl, copied) = _figure(3, width=12, height=5.2, width_ratios=(1.4, 1, 1))
    outside = _draw_errors(errors, summary)
    _draw_scatters({"tipl": tipl, "copy-last": copied}, table)
    _legend_below(figure, errors, title=outside)
    return figure


def skill_by_step(summary: Sequence[Row]) -> Figure:
    """Skill against forward step h with its confidence band; 0 is copying the last snapshot, 1 is the truth."""
    figure, (axes,) = _figure(1, width=8.5, height=4.8)
    lines = {line: rows for line, rows in _lines(summary).items() if line[0] != "copy-last"}
    skills = {}
    for line, rows in lines.items():
        step_H, skill_H, low_H, high_H = (_column(rows, key) for key in ("step", "skill", "skill_low", "skill_high"))
        skills[_label(rows, lines)] = skill_H
        colour, style = _colour(line[0], [name for name, _ in lines]), _style(line, lines)
        axes.fill_between(step_H, low_H, high_H, color=colour, alpha=0.18, linewidth=0)
        axes.plot(step_H, skill_H, style, color=colour, marker="o", ms=5, lw=2, label=_label(rows, lines))
    _dress(axes, "Skill against copying the last snapshot, per forward step", "forward step h [snapshots]", "skill")
    _tick_steps(axes, (row["step"] for row in summary))
    _frame_skill(figure, [axes], skills)
    return figure


def skill_over_ridge(comparisons: Sequence[Row]) -> Figure:
    """TIPL's skill less the ridge's on the same windows, overall and by phase, with the interval of the difference."""
    rows = [row for row in comparisons if row["against"] == "ridge" and row["group"] in ("all", "phase")]
    figure, (axes,) = _figure(1, width=8.5, height=4.8)
    phases = sorted({int(row["value"]) for row in rows if row["group"] == "phase"})
    shades = (COLOURS["tipl"], *SPARE_COLOURS, *list(COLOURS.values())[2:])
    for index, value in enumerate((-1, *phases)):
        own = sorted((row for row in rows if int(row["value"]) == value), key=lambda row: row["step"])
        step_H, gain_H, low_H, high_H = (
            _column(own, key) for key in ("step", "skill_difference", "difference_low", "difference_high")
        )
        colour, label = shades[index % len(shades)], f"phase {value}" if value >= 0 else "all windows"
        axes.fill_between(step_H, low_H, high_H, color=colour, alpha=0.15, linewidth=0)
        axes.plot(step_H, gain_H, color=colour, marker="o", ms=4.5, lw=2.5 if value < 0 else 1.5, label=label)
    axes.axhline(0, color=COLOURS["copy-last"], linewidth=2, zorder=1, label=f"as good as {_name('ridge')}")
    _dress(axes, f"What TIPL adds to {_name('ridge')}", "forward step h [snapshots]", "difference of skill")
    _tick_steps(axes, (row["step"] for row in rows))
    _legend_below(figure, axes)
    return figure


def spread(summary: Sequence[Row]) -> Figure:
    """How much predicted policies differ among each other: in returns, beside the true ones', and in weights.

    Raises ValueError where no policy was run.
    """
    figure, (returns, distances) = _figure(2, width=10, height=4.6)
    lines = _lines([row for row in summary if math.isfinite(_value(row, "returns_spread"))])
    if not lines:
        raise ValueError("no policy was run: there is no spread of returns to draw")
    for line, rows in lines.items():
        colour, style = _colour(line[0], [name for name, _ in lines]), _style(line, lines)
        step_H, spread_H, true_H = (_column(rows, key) for key in ("step", "returns_spread", "returns_spread_true"))
        returns.plot(step_H, spread_H, style, color=colour, marker="o", ms=4.5, lw=1.8, label=_label(rows, lines))
        share_H = _column(rows, "distance") / _column(rows, "distance_true")
        distances.plot(step_H, share_H, style, color=colour, marker="o", ms=4.5, lw=1.8)
    returns.plot(step_H, true_H, "--", color=INK, lw=1.5, label="true policies")
    distances.axhline(1, color=INK, linestyle="--", linewidth=1.5)
    returns.set_ylim(bottom=0)
    distances.set_ylim(0, max(1.1, distances.get_ylim()[1]))
    _dress(returns, "Spread of the policies' returns", "forward step h [snapshots]", "standard deviation")
    _dress(distances, "Distance between policies", "forward step h [snapshots]", "share of the true ones'")
    for axes in (returns, distances):
        _tick_steps(axes, (row["step"] for row in summary))
    _legend_below(figure, returns)
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


def learning_curves(curves: Sequence[Curve]) -> Figure:
    """Episodic return against environment steps: every trial, and their mean with a 95% bootstrap band.

    A curve is (seed, env_steps_T, episodic_returns_T); NaN marks snapshots before which no episode ended. The mean is
    taken where every trial has data, each trial interpolated linearly. Raises ValueError if no trial has two returns.
    """
    known = [(steps_T[~np.isnan(returns_T)], returns_T[~np.isnan(returns_T)]) for _, steps_T, returns_T in curves]
    known = [(steps_T, returns_T) for steps_T, returns_T in known if len(steps_T) > 1]
    if not known:
        raise ValueError(f"none of the {len(curves)} curves has two episodic returns to draw a line between")
    figure, (axes,) = _figure(1, width=8.5, height=4.6)
    for steps_T, returns_T in known:
        axes.plot(steps_T, returns_T, color=COLOURS["tipl"], linewidth=0.7, alpha=0.3)
    low, high = max(steps_T[0] for steps_T, _ in known), min(steps_T[-1] for steps_T, _ in known)
    grid_G = np.linspace(low, max(low, high), 200)
    returns_NG = np.stack([np.interp(grid_G, steps_T, returns_T) for steps_T, returns_T in known])
    low_G, high_G = _bootstrap_band(returns_NG)
    axes.fill_between(grid_G, low_G, high_G, color=COLOURS["linear"], alpha=0.3, linewidth=0)
    axes.plot(grid_G, returns_NG.mean(0), color=COLOURS["linear"], linewidth=2.2)
    _dress(axes, "Episodic return of every PPO trial as it learns", "environment steps", "episodic return")
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.set_xlim(0, max(steps_T[-1] for steps_T, _ in known))
    entries = [
        Line2D([], [], color=COLOURS["tipl"], linewidth=0.9, alpha=0.6, label=f"one trial ({len(known)} shown)"),
        Line2D([], [], color=COLOURS["linear"], linewidth=2.2, label="mean and its 95% interval"),
    ]
    _legend_below(figure, axes, entries)
    return figure


def contenders(curves: Mapping[str, tuple[np.ndarray, np.ndarray]], title: str) -> Figure:
    """Learning curves of contenders, (env_steps_I, returns_SI) each: interquartile mean over trials, 95% bands.

    The first contender, which the others are held against, is black; where a name ends in a predictor's, its colour.
    """
    figure, (axes,) = _figure(1, width=9.5, height=5.2)
    spare, entries = iter(SPARE_COLOURS * 4), []
    for index, (name, (steps_I, returns_SI)) in enumerate(curves.items()):
        predictor = name.partition("+")[2].partition(":")[0]
        plain = INK if index == 0 else COLOURS["copy-last"]
        known = COLOURS.get(predictor, next(spare)) if ":" not in name else next(spare)
        colour = known if predictor else plain
        picked_RS = np.random.default_rng(0).integers(len(returns_SI), size=(1000, len(returns_SI)))
        middle_RI = np.stack([interquartile_mean(returns_SI[picked_S].T) for picked_S in picked_RS])
        low_I, high_I = np.quantile(middle_RI, [0.025, 0.975], axis=0)
        axes.fill_between(steps_I, low_I, high_I, color=colour, alpha=0.12, linewidth=0)
        axes.plot(steps_I, interquartile_mean(returns_SI.T), color=colour, linewidth=1.9)
        label = f"{name.partition('+')[0]} epochs" + (f", jumps by {name.partition('+')[2]}" if predictor else "")
        entries.append(Line2D([], [], color=colour, linewidth=2.2, label=label))
    _dress(axes, title, "environment steps", "episodic return, interquartile mean")
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    _legend_below(figure, axes, entries, columns=3)
    return figure


def contender_differences(rows: Sequence[Row]) -> Figure:
    """Area under the curve, less the first contender's and as a share of it, with its interval; a panel per task.

    Rows are `contenders.score`'s. Filled is what the interval tells apart from the first contender.
    """
    tasks = list(dict.fromkeys((row["task"], row["env_steps"]) for row in rows))
    names = list(dict.fromkeys(row["contender"] for row in rows))
    height = 1.6 + 0.34 * (len(names) - 1)
    figure, panels = _figure(len(tasks), width=2.6 + 2.9 * len(tasks), height=height, share=True)
    for axes, (task, env_steps) in zip(panels, tasks, strict=True):
        first, *others = [row for row in rows if (row["task"], row["env_steps"]) == (task, env_steps)]
        for row in others:
            middle, low, high = (100 * row[f"auc_less_first{end}"] / abs(first["auc"]) for end in ("", "_low", "_high"))
            colour = COLOURS.get(row["predictor"], COLOURS["copy-last"])
            face = colour if low > 0 or high < 0 else "white"
            place = names.index(row["contender"])
            axes.plot([low, high], [place, place], color=colour, linewidth=2.2, solid_capstyle="round")
            axes.plot(middle, place, "o", ms=7, mfc=face, mec=colour, mew=1.8)
        axes.axvline(0, color=INK, linewidth=1.4, zorder=1)
        _dress(axes, f"{task}\n{env_steps:,} steps", f"area less {first['contender']} epochs' [%]", "")
        axes.set_yticks(range(1, len(names)), names[1:])
        axes.set_ylim(len(names) - 0.4, 0.4)
    return figure


def learning_rates(rows: Sequence[Row]) -> Figure:
    """Mean area under the curve over the trials of a search, by learning rate; a panel per task, the chosen filled.

    Rows are `contenders.search_rows`'.
    """
    tasks = list(dict.fromkeys((row["task"], row["env_steps"]) for row in rows))
    figure, panels = _figure(len(tasks), width=2.2 + 3.1 * len(tasks), height=4.6)
    entries = {}
    for axes, (task, env_steps) in zip(panels, tasks, strict=True):
        own = [row for row in rows if (row["task"], row["env_steps"]) == (task, env_steps)]
        for index, name in enumerate(dict.fromkeys(row["contender"] for row in own)):
            line = [row for row in own if row["contender"] == name]
            colour = INK if index == 0 else COLOURS.get(line[0]["predictor"], COLOURS["copy-last"])
            axes.plot(_column(line, "learning_rate"), _column(line, "auc"), color=colour, lw=1.5, marker="o", ms=3)
            (best,) = (row for row in line if row["chosen"])
            axes.plot(best["learning_rate"], best["auc"], "o", ms=8, color=colour)
            entries[name] = Line2D([], [], color=colour, linewidth=2.2, label=name)
        axes.set_xscale("log")
        rates = sorted({row["learning_rate"] for row in own})
        axes.set_xticks(rates, [f"{1e4 * rate:.4g}" for rate in rates])
        axes.minorticks_off()
        _dress(axes, f"{task}\n{env_steps:,} steps", "learning rate [0.0001]", "")
    panels[0].set_ylabel(f"area under the curve, {rows[0]['seeds']} trials", fontsize=11.5, color=INK)
    _legend_below(figure, panels[0], list(entries.values()), columns=5)
    return figure


def reconstruction(rows: Sequence[Row]) -> Figure:
    """What the Temporal SVD loses at each rank D on held-out trials: energy outside the basis, and squared error.

    Rows have trial, rank, energy_outside (share of the squared norm) and mse (per weight). Zeros cannot be drawn on a
    logarithmic axis and are left out.
    """
    figure, panels = _figure(2, width=10, height=4.4)
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
            axes.set_yscale("log")
        axes.set_xticks(ranks if len(ranks) <= 10 else [2**power for power in range(max(ranks).bit_length())])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:.0f}"))
        _dress(axes, title, "SVD rank D", unit)
    entries = [
        Line2D([], [], color=COLOURS["svd-floor"], linewidth=1.2, alpha=0.7, label="one held-out trial"),
        Line2D([], [], color=INK, linewidth=2, marker="o", markersize=4.5, label="mean of held-out trials"),
    ]
    _legend_below(figure, panels[0], entries)
    return figure


def training_curves(history: Sequence[Row]) -> Figure:
    """Training and validation loss of the Transformer against optimisation steps.

    Rows have step and loss; validation_loss only where the model was validated.
    """
    figure, (axes,) = _figure(1, width=8.5, height=4.4)
    step_R, loss_R, validation_R = (_column(history, key) for key in ("step", "loss", "validation_loss"))
    seen = ~np.isnan(loss_R)
    axes.plot(step_R[seen], loss_R[seen], color=COLOURS["copy-last"], linewidth=1.3, label="training trials")
    held_out = ~np.isnan(validation_R)
    if held_out.any():
        axes.plot(
            step_R[held_out],
            validation_R[held_out],
            color=COLOURS["tipl"],
            linewidth=2,
            marker="o",
            markersize=4.5,
            label="held-out validation trials",
        )
    if np.nanmin(np.concatenate([loss_R, validation_R])) > 0:
        axes.set_yscale("log")
        low, high = np.log10(axes.get_ylim())
        _tick_decades(axes, low, high)
    _dress(axes, "The Transformer's loss as it trains", "optimisation steps", "loss")
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    _legend_below(figure, axes)
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


def _draw_errors(errors: Axes, summary: Sequence[Row]) -> str | None:
    """WPE in the upper half, on the left axis; REPW in the lower half, on the right axis, with its noise floor.

    Returns in words what falls out of the picture, if anything does.
    """
    returns = errors.twinx()
    run = {row["predictor"] for row in summary if math.isfinite(_value(row, "repw"))}
    lines = _lines([row for row in summary if not run or row["predictor"] in run])
    lower_half = Rectangle((0, 0), 1, 0.5, transform=returns.transAxes)
    for line, rows in lines.items():
        colour, style = _colour(line[0], [name for name, _ in lines]), _style(line, lines)
        step_H, wpe_H, repw_H, low_H, high_H = (
            _column(rows, key) for key in ("step", "wpe", "repw", "repw_low", "repw_high")
        )
        errors.plot([], [], style, color=colour, lw=2.5, label=_label(rows, lines))
        errors.plot(step_H, _positive(wpe_H), ":", color=colour, lw=1.6, marker="o", ms=4.5, mfc="white")
        band = returns.fill_between(step_H, low_H, high_H, color=colour, alpha=0.15, linewidth=0)
        (curve,) = returns.plot(step_H, repw_H, style, color=colour, lw=2, marker="s", ms=4.5)
        for drawn in (band, curve):
            drawn.set_clip_path(lower_half)
    floor_H = _noise_floor(summary)
    errors.plot([], [], "--", color=INK, lw=1.3, label="noise floor of REPW")
    returns.plot(list(floor_H), list(floor_H.values()), "--", color=INK, linewidth=1.3)
    unit = "forward step h [snapshots]"
    _dress(errors, "Error of predicted weights and their returns", unit, "WPE (squared error)")
    _dress(returns, "", "", "REPW (return)")
    returns.grid(visible=False)
    returns.spines["right"].set_visible(True)
    _tick_steps(errors, (row["step"] for row in summary))
    top = _repw_top(lines)
    _halve(errors, returns, top)
    highest = {_label(rows, lines): np.nanmax(_column(rows, "repw"), initial=0) for rows in lines.values()}
    outside = [f"REPW of {label} rises to {_short(value)}" for label, value in highest.items() if value > top]
    return f"Outside the picture: {', '.join(outside)}" if outside else None


def _repw_top(lines: Mapping[tuple[str, str], Sequence[Row]]) -> float:
    """Where REPW's axis ends: a predictor that diverges must not press the comparison with copying flat."""
    known = {
        line: np.concatenate([_column(rows, key) for key in ("repw", "repw_high")]) for line, rows in lines.items()
    }
    everything = max((float(np.nanmax(repw, initial=0)) for repw in known.values()), default=0.0)
    compared = [repw for (name, _), repw in known.items() if name in SCATTER_TITLES]
    return min(everything, 2 * max((float(np.nanmax(repw, initial=0)) for repw in compared), default=np.inf)) or 1.0


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


def _tick_decades(axes: Axes, low: float, high: float) -> None:
    """Label a logarithmic axis between two powers of ten: by decades, and between them where there are few."""
    between = (1.0,) if high - low > 2.5 else (1.0, 2.0, 5.0)
    ticks = LogLocator(subs=between).tick_values(10**low, 10**high)
    axes.yaxis.set_major_locator(FixedLocator([tick for tick in ticks if low <= np.log10(tick) <= high]))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def _draw_scatters(panels: Mapping[str, Axes], table: Table) -> None:
    run = ~np.isnan(table["return_true"]) & ~np.isnan(table["return_predicted"])
    drawn = run & np.isin(table["predictor"], list(panels))
    both = np.concatenate([table["return_true"][drawn], table["return_predicted"][drawn]])
    low, high = (float(both.min()), float(both.max())) if len(both) else (0.0, 1.0)
    margin = 0.05 * (high - low) or 1.0
    for name, axes in panels.items():
        chosen = run & (table["predictor"] == name)
        true_R, predicted_R = table["return_true"][chosen], table["return_predicted"][chosen]
        axes.axline((low, low), (high + margin, high + margin), color=INK, linewidth=1, linestyle="--", zorder=1)
        axes.scatter(predicted_R, true_R, s=26, color=COLOURS[name], alpha=0.22, linewidths=0, zorder=2)
        axes.set(xlim=(low - margin, high + margin), ylim=(low - margin, high + margin), aspect="equal")
        distance = np.abs(true_R - predicted_R).mean() if len(true_R) else math.nan
        _dress(axes, SCATTER_TITLES[name], "return of predicted policy", "")
        notes = [f"mean difference {_short(distance)}" if len(true_R) else "no policies were run"]
        at_top = np.minimum(true_R, predicted_R) >= high - 0.001 * (high - low)
        if len(true_R) and at_top.mean() > 0.05:
            notes += [f"{at_top.mean():.0%} of {len(true_R):,} points lie", "in the upper right corner"]
        axes.text(0.97, 0.04, "\n".join(notes), transform=axes.transAxes, ha="right", fontsize=10.5, color=INK)
    panels["tipl"].set_ylabel("return of true policy")
    panels["copy-last"].tick_params(labelleft=False)


def _skill_panels(table: Table, column: str, titles: Mapping[int, str], title: str) -> Figure:
    values = [int(value) for value in np.unique(table[column])]
    names = [name for name in _order(np.unique(table["predictor"]).tolist()) if name != "copy-last"]
    figure, panels = _figure(len(values), width=max(8.5, 2.5 * len(values)), height=4.4, share=True)
    skills: dict[str, np.ndarray] = {_name(name): np.empty(0) for name in names}
    for axes, value in zip(panels, values, strict=True):
        for name in names:
            step_H, skill_H = _skill(table, (table[column] == value) & (table["predictor"] == name))
            skills[_name(name)] = np.append(skills[_name(name)], skill_H)
            axes.plot(step_H, skill_H, color=_colour(name, names), marker="o", ms=4, lw=1.8, label=_name(name))
        _dress(axes, titles[value], "forward step h", "skill" if axes is panels[0] else "")
        axes.title.set_fontsize(11)
        _tick_steps(axes, table["step"].tolist(), 5)
    figure.suptitle(title, fontsize=13, color=INK, fontweight="bold")
    _frame_skill(figure, panels, skills)
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


def _colour(name: str, names: Sequence[str]) -> str:
    if name in COLOURS:
        return COLOURS[name]
    others = [other for other in _order(names) if other not in COLOURS]
    return SPARE_COLOURS[others.index(name) % len(SPARE_COLOURS)]


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
    num_panels: int, *, width: float, height: float, width_ratios: Sequence[float] | None = None, share: bool = False
) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, num_panels, sharey=share, squeeze=False, width_ratios=width_ratios)
    return figure, list(panels[0])


def _dress(axes: Axes, title: str, across: str, up: str) -> None:
    axes.set_title(title, fontsize=12.5, color=INK, fontweight="bold")
    axes.set_xlabel(across, fontsize=11.5, color=INK)
    axes.set_ylabel(up, fontsize=11.5, color=INK)
    axes.tick_params(which="both", labelsize=10.5, colors=INK, length=3)
    axes.grid(visible=True, color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color("#999999")


def _tick_steps(axes: Axes, steps: Iterable[int], num_ticks: int = 10) -> None:
    """Whole forward steps only, also where there is but one."""
    seen = set(steps)
    axes.set_xlim(min(seen) - 0.5, max(seen) + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=num_ticks))


def _frame_skill(figure: Figure, panels: Sequence[Axes], skills: Mapping[str, np.ndarray]) -> None:
    """Draw copy-last's zero line, keep the axis where skill is of interest, and say in words what falls out of it."""
    for axes in panels:
        axes.axhline(0, color=COLOURS["copy-last"], linewidth=2, zorder=1, label="copying the last snapshot")
    lowest = {name: float(np.nanmin(skill)) for name, skill in skills.items() if np.isfinite(skill).any()}
    highest = max((float(np.nanmax(skill)) for skill in skills.values() if np.isfinite(skill).any()), default=0.0)
    bottom = max(min(lowest.values(), default=0.0), SKILL_FLOOR)
    panels[0].set_ylim(bottom - 0.08, max(highest, 0.1) + 0.08)
    outside = [f"{name} falls to {_short(low)}" for name, low in lowest.items() if low < SKILL_FLOOR]
    _legend_below(figure, panels[0], title=f"Outside the picture: {', '.join(outside)}" if outside else None)


def _legend_below(
    figure: Figure, axes: Axes, entries: Sequence[Line2D] | None = None, title: str | None = None, columns: int = 5
) -> None:
    handles = list(entries) if entries is not None else axes.get_legend_handles_labels()[0]
    columns = min(len(handles), columns)
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=11, title=title)


def sweep_heat_map(
    cells: Sequence[Row], across: str, up: str, names: Mapping[str, str], metric: str = "skill"
) -> Figure:
    """Skill over two fields of a sweep, and the ridge's in a row of its own; the best cell is framed.

    A cell is one run: its fields' values, `skill`, `ridge` and, where it is known, `floor`, the skill of the true
    future on the run's basis; where that is the same all along each line it has a column of its own. The colour is the
    squared error that is left, as a share of copying's, so that skills far below 0 can be told apart.
    """
    columns, lines = (sorted({cell[field] for cell in cells}, key=_sort_key) for field in (across, up))
    floors = [{round(cell.get("floor", math.nan), 6) for cell in cells if cell[up] == line} for line in lines]
    has_floor = all(len(floor) == 1 and np.isfinite([*floor]).all() for floor in floors)
    groups = [[[c["ridge"] for c in cells if c[across] == column] for column in columns]]
    for line in lines:
        groups.append([[c["skill"] for c in cells if (c[across], c[up]) == (column, line)] for column in columns])
    means, deviations = (np.array([[told(group) for group in row] for row in groups]) for told in (_mean, _deviation))
    if has_floor:
        means = np.column_stack([means, [math.nan, *(max(floor) for floor in floors)]])
    left = np.where(np.isfinite(means), np.maximum(1 - means, 1e-6), np.nan)
    runs = left[1:, : len(columns)]
    figure, (axes,) = _figure(1, width=2.6 + 1.7 * means.shape[1], height=2.2 + 0.75 * len(lines))
    low, high, ridge = float(np.nanmin(runs)), float(np.nanmax(runs)), float(np.nanmin(left[0], initial=np.inf))
    near = low / 4 < ridge < 4 * high
    low, high = (min(low, ridge), max(high, ridge)) if near else (low, high)
    norm = LogNorm(low * 0.97, high * 1.03, clip=True)
    shown = axes.imshow(left, norm=norm, cmap="viridis_r", aspect="auto", origin="lower")
    for line, column in np.argwhere(np.isfinite(left)):
        dark = norm(left[line, column]) > 0.45
        varies = line and column < len(columns) and deviations[line, column] > 0
        words = _skill_text(means[line, column], deviations[line, column] if varies else None)
        axes.text(column, line, words, ha="center", va="center", fontsize=11, color="white" if dark else INK)
    if np.isfinite(runs).any():
        best = np.unravel_index(np.nanargmin(runs), runs.shape)
        axes.add_patch(
            Rectangle(
                (best[1] - 0.5, best[0] + 0.5), 1, 1, fill=False, edgecolor=COLOURS["linear"], linewidth=3, zorder=3
            )
        )
    _dress(axes, f"{metric} over {names[up]} and {names[across]}", names[across], names[up])
    axes.grid(visible=False)
    axes.axhline(0.5, color="white", linewidth=4)
    axes.set_xticks(range(means.shape[1]), [*map(_value_text, columns), *(["true future\non the basis"] * has_floor)])
    if has_floor:
        axes.axvline(len(columns) - 0.5, color="white", linewidth=4)
    axes.set_yticks(range(len(lines) + 1), ["ridge", *(_value_text(value) for value in lines)])
    told = "squared error left, copying = 1"
    if not near and math.isfinite(ridge):
        told += f"\nthe ridge leaves {ridge:.3g}"
    _colour_bar(figure, shown, told, _round_values(low, high), ridge if near else None)
    return figure


def _mean(skills: Sequence[float]) -> float:
    """Of the runs that did not diverge; NaN where none is left."""
    known = [skill for skill in skills if math.isfinite(skill)]
    return float(np.mean(known)) if known else math.nan


def _deviation(skills: Sequence[float]) -> float:
    """Standard deviation of the runs that did not diverge; 0 of one."""
    known = [skill for skill in skills if math.isfinite(skill)]
    return float(np.std(known, ddof=1)) if len(known) > 1 else 0.0


def _colour_bar(figure: Figure, shown: AxesImage, told: str, values: Sequence[float], ridge: float | None) -> None:
    """What the colours stand for, with a line where the ridge is."""
    bar = figure.colorbar(shown, ax=shown.axes)
    bar.ax.yaxis.set_major_locator(FixedLocator(values))
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{share:,.10g}"))
    bar.ax.yaxis.set_minor_locator(NullLocator())
    if ridge is not None:
        bar.ax.axhline(ridge, color=COLOURS["linear"], linewidth=2.5)
        told += "\nline: the ridge at its best"
    bar.set_label(told, fontsize=10, color=INK)


def _round_values(low: float, high: float) -> list[float]:
    """Four values from low to high, or as many as differ, with no more digits than it takes to tell them apart."""
    values = np.geomspace(low, high, 4)
    rounded = [sorted({float(f"{value:.{digits}g}") for value in values}) for digits in (2, 3)]
    return next((found for found in rounded if len(found) == len(values)), rounded[-1])


def parallel_coordinates(cells: Sequence[Row], names: Mapping[str, str], metric: str = "skill") -> Figure:
    """Every run of a sweep as a line from the values of its fields to its skill; the better, the darker."""
    fields = [*names, "skill"]
    cells = sorted((cell for cell in cells if math.isfinite(cell["skill"])), key=lambda cell: cell["skill"])
    figure, (axes,) = _figure(1, width=max(6.0, 2.2 * len(fields)), height=4.6)
    heights = []
    for place, field in enumerate(fields):
        values = [cell[field] for cell in cells]
        heights.append(_heights(values, error=field == "skill"))
        axes.axvline(place, color="#999999", linewidth=1, zorder=1)
        told = dict(zip(heights[-1].round(6).tolist(), values, strict=True))
        few = len(told) <= 8 and field != "skill"
        apart = [height for height in sorted(told) if few or height in (min(told), max(told))]
        for height in apart:
            text = _skill_text(told[height]) if field == "skill" else _value_text(told[height])
            side = "left" if field == "skill" else "right"
            axes.text(place + (0.04 if field == "skill" else -0.04), height, text, ha=side, va="center", fontsize=10)
    for index, line in enumerate(np.array(heights).T):
        share = index / max(1, len(cells) - 1)
        best = index == len(cells) - 1
        colour = COLOURS["linear"] if best else COLOURS["tipl"]
        axes.plot(
            range(len(fields)), line, color=colour, alpha=1 if best else 0.15 + 0.6 * share, lw=3 if best else 1.6
        )
    _dress(axes, f"Every run: fields and {metric}; the best in red", "", "")
    axes.grid(visible=False)
    axes.set_xticks(range(len(fields)), [*names.values(), metric])
    axes.set_yticks([])
    axes.set_xlim(-0.5, len(fields) - 0.4)
    axes.spines["left"].set_visible(False)
    return figure


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
    everything = np.concatenate([np.asarray(skills, np.float64) for _, skills in curves])
    far = everything[np.isfinite(everything)].min(initial=0.0) < -1

    def drawn(skills: Iterable[float]) -> np.ndarray:
        return 1 - np.asarray(skills, np.float64) if far else np.asarray(skills, np.float64)

    figure, (axes,) = _figure(1, width=8.5, height=4.6)
    for steps, skills in curves:
        axes.plot(steps, drawn(skills), color=COLOURS["copy-last"], linewidth=0.9, alpha=0.45)
    grid = sorted({step for steps, _ in curves for step in steps})
    at_step = [[s[list(t).index(step)] for t, s in curves if step in t] for step in grid]
    axes.plot(grid, drawn([float(np.median(skills)) for skills in at_step]), color=INK, linewidth=2, label="median")
    axes.plot(best[0], drawn(best[1]), color=COLOURS["tipl"], lw=2.5, marker="o", ms=4.5, label=f"best: {name}")
    if math.isfinite(ridge):
        axes.axhline(float(drawn([ridge])[0]), color=COLOURS["ridge"], lw=2, ls="--", label="ridge, the best's context")
    if far:
        axes.set_yscale("log")
    up = f"1 - {metric}: squared error left" if far else metric
    _dress(axes, "Every run as it trained", "optimisation steps", up)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    _legend_below(figure, axes)
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
    return f"{skill:,.{digits}f}" + (f"\n± {deviation:,.{digits}f}" if deviation is not None else "")
