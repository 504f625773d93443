"""Figures of PPO's variants: learning curves, areas under them, and areas by learning rate.

Shape suffixes: S trials of a variant, I PPO iterations.
"""

import math
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from tipl_ray.drawing import INK, SOFT, as_shipped, dress, explain, is_first_in_line, legend_below, new_figure, wrapped
from tipl_ray.evaluate.figures import colour_of
from tipl_ray.evaluate.metrics import MIN_TRIALS, Resampling, Row, interquartile_mean, numbers

EPOCH_COLOURS = matplotlib.colormaps["viridis"]
RULE_COLOURS = {"return-rule-v1": "#e08283", "return-rule-v2": "#c0392b", "return-tipl-v1": colour_of("tipl")}
"""Of published predictors that no result table has."""
MOST_CURVES = 9
"""Variants whose learning curves fit one figure."""
MOST_POINTS = 250
"""Points of a learning curve; more of them are noise."""
LABELS_APART = 0.026
"""Least distance of two labels one above the other, as a share of the whole range."""


@as_shipped()
def contenders(
    curves: Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray]], title: str, resampling: Resampling
) -> Figure:
    """Learning curves of variants, (env_steps_I, gradient_steps_I, returns_SI) each, over environment steps and over
    gradient steps: interquartile mean over trials, with its band.

    The first variant, which the others are compared with, is black; a name that ends in a predictor's has its colour.
    If there are many, only the first and those with the largest areas are drawn. Of a curve with many iterations, the
    points are means over neighbouring ones.
    """
    curves = {name: _thinned(*curve) for name, curve in curves.items()}
    figure, panels = new_figure(2, width=11.5, height=4.8, share=True)
    best = sorted(list(curves)[1:], key=lambda name: -float(curves[name][2].mean()))[: MOST_CURVES - 1]
    entries = []
    for index, (name, (env_steps_I, gradient_steps_I, returns_SI)) in enumerate(curves.items()):
        if index and name not in best:
            continue
        colour = _contender_colour(name, index == 0)
        for axes, steps_I in zip(panels, (env_steps_I, gradient_steps_I), strict=True):
            if len(returns_SI) >= MIN_TRIALS:
                axes.fill_between(steps_I, *resampling.band(returns_SI), color=colour, alpha=0.12, linewidth=0)
            axes.plot(steps_I, interquartile_mean(returns_SI.T), color=colour, linewidth=1.9)
        entries.append(Line2D([], [], color=colour, linewidth=2.2, label=_said(name)))
    for axes, across in zip(panels, ("environment steps", "gradient steps"), strict=True):
        up = "episodic return (interquartile mean)" if is_first_in_line(axes) else ""
        dress(axes, title if up else "The same over gradient steps", across, up)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    left_out = len(curves) - len(entries)
    legend_below(figure, entries, [f"{left_out} more with smaller areas not shown"] if left_out else [])
    return figure


def _thinned(
    env_steps_I: np.ndarray, gradient_steps_I: np.ndarray, returns_SI: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A curve of at most MOST_POINTS points: returns are means over blocks of iterations, steps those at their ends."""
    size = -(-len(env_steps_I) // MOST_POINTS)
    ends = np.arange(size, len(env_steps_I) + 1, size)
    means_SI = np.stack([returns_SI[:, end - size : end].mean(axis=1) for end in ends], axis=1)
    return env_steps_I[ends - 1], gradient_steps_I[ends - 1], means_SI


@as_shipped()
def shares(rows: Sequence[Row]) -> Figure:
    """Area under the curve relative to the first variant's, over all tasks, against relative gradient steps; a panel
    per scope. Rows are those of `scores.over_tasks`."""
    scopes = list(dict.fromkeys(row["scope"] for row in rows))
    figure, panels = new_figure(len(scopes), width=6.2 * max(1, len(scopes)), height=5.4, share=True)
    ends = [row[end] for row in rows for end in ("share", "share_low", "share_high") if np.isfinite(row[end])]
    apart_by = LABELS_APART * (max(ends, default=1.0) - min(ends, default=1.0))
    for axes, scope in zip(panels, scopes, strict=False):
        first, *others = [row for row in rows if row["scope"] == scope]
        labels: dict[float, float] = {}
        for row in sorted(others, key=lambda row: row["share"]):
            colour, across = _contender_colour(row["contender"], first=False), row["share_of_gradient_steps"]
            apart = row["share_low"] > 1 or row["share_high"] < 1
            axes.plot([across] * 2, [row["share_low"], row["share_high"]], color=colour, linewidth=1.2, alpha=0.6)
            axes.plot(across, row["share"], "o", ms=6, mfc=colour if apart else "white", mec=colour, mew=1.5)
            # A label above the one below it, where two variants with as many gradient steps are close.
            labels[across] = max(row["share"], labels.get(across, -math.inf) + apart_by)
            place, offset = (across, labels[across]), (6, 0)
            axes.annotate(row["contender"], place, offset, textcoords="offset points", fontsize=8.5, va="center")
        axes.plot(1, 1, "s", ms=8, color=INK)
        axes.axhline(1, color=INK, linewidth=1.0, zorder=1)
        axes.set_xscale("log")
        ticks = [0.1, 0.2, 0.4, 1, 2]
        axes.set_xticks(ticks, [f"{tick:.0%}" for tick in ticks])
        axes.minorticks_off()
        axes.set_xlim(0.08, 3.2)
        name = _said(first["contender"])
        across, up = f"gradient steps relative to {name}", f"AUC relative to {name}"
        dress(axes, f"{scope} ({first['tasks']})", across, up if is_first_in_line(axes) else "")
    if not scopes:
        explain(panels[0], "No task has a first variant with an area clearly above 0")
    return figure


@as_shipped()
def areas(rows: Sequence[Row]) -> Figure:
    """Area under the curve relative to the first variant's, with its interval; a panel per task.

    Rows are those of `scores.score`. Markers are filled where the interval excludes the first variant.
    """
    tasks = list(dict.fromkeys((row["task"], row["env_steps"]) for row in rows))
    names = list(dict.fromkeys(row["contender"] for row in rows))
    height = 1.6 + 0.34 * max(1, len(names) - 1)
    figure, panels = new_figure(len(tasks), width=2.6 + 2.9 * min(3, len(tasks)), height=height, share=True, across=3)
    for axes, (task, env_steps) in zip(panels, tasks, strict=False):
        first, *others = [row for row in rows if (row["task"], row["env_steps"]) == (task, env_steps)]
        for row in others:
            place = names.index(row["contender"])
            size = abs(first["auc"]) or math.nan
            middle, low, high = (100 * row[f"auc_less_first{end}"] / size for end in ("", "_low", "_high"))
            if not math.isfinite(middle):
                axes.text(
                    0, place, "undefined", ha="center", va="center", fontsize=10, color=SOFT, backgroundcolor="white"
                )
                continue
            colour = _contender_colour(row["contender"], first=False)
            face = colour if low > 0 or high < 0 else "white"
            axes.plot([low, high], [place, place], color=colour, linewidth=2.2, solid_capstyle="round")
            axes.plot(middle, place, "o", ms=7, mfc=face, mec=colour, mew=1.8)
        axes.axvline(0, color=INK, linewidth=1.4, zorder=1)
        dress(axes, f"{task}\n{env_steps:,} steps", f"AUC relative to {_said(first['contender'])} [%]", "")
        axes.set_yticks(range(1, len(names)), [wrapped(figure, name, 2.2, 10.5) for name in names[1:]])
        axes.set_ylim(max(len(names), 2) - 0.4, 0.4)
    if len(names) < 2:
        explain(panels[0], "There is no second variant to compare")
    return figure


@as_shipped()
def learning_rates(rows: Sequence[Row]) -> Figure:
    """Mean area under the curve of search trials by learning rate; a panel per task, with the chosen rate as a large
    point.

    Rows are those of `scores.search_rows`; variants with another searched field are left out.
    """
    rows = [row for row in rows if row["searched"] == "learning_rate"]
    tasks = list(dict.fromkeys((row["task"], row["env_steps"]) for row in rows))
    figure, panels = new_figure(len(tasks), width=2.2 + 3.1 * min(3, len(tasks)), height=4.2, across=3)
    entries: dict[str, Line2D] = {}
    for axes, (task, env_steps) in zip(panels, tasks, strict=False):
        own = [row for row in rows if (row["task"], row["env_steps"]) == (task, env_steps)]
        for index, name in enumerate(dict.fromkeys(row["contender"] for row in own)):
            line = [row for row in own if row["contender"] == name]
            colour = _contender_colour(name, index == 0)
            axes.plot(numbers(line, "value"), numbers(line, "auc"), color=colour, lw=1.5, marker="o", ms=3)
            for best in (row for row in line if row["chosen"]):
                axes.plot(best["value"], best["auc"], "o", ms=8, color=colour)
            entries.setdefault(name, Line2D([], [], color=colour, linewidth=2.2, label=name))
        axes.set_xscale("log")
        rates = sorted({row["value"] for row in own})
        axes.set_xticks(rates, [f"{1e4 * rate:.4g}" for rate in rates])
        axes.minorticks_off()
        up = f"area under the curve, mean of {own[0]['seeds']} trials" if is_first_in_line(axes) else ""
        dress(axes, f"{task}\n{env_steps:,} steps", "learning rate [0.0001]", up)
    if not rows:
        explain(panels[0], "No learning rates were searched")
    legend_below(figure, list(entries.values()))
    return figure


def _said(name: str) -> str:
    """A variant's name as shown in legends."""
    epochs, _, jumps = name.partition("+")
    if not epochs.isdecimal():
        return name
    return f"{epochs} epoch{'s' * (epochs != '1')}" + (f", jumps by {jumps}" if jumps else "")


def _contender_colour(name: str, first: bool) -> str:
    """The first variant is black, other numbers of epochs go from purple (1) to yellow (20 and more); jumps have their
    predictor's colour."""
    jumps = name.partition("+")[2]
    if first:
        return INK
    if name.isdecimal():
        return to_hex(EPOCH_COLOURS(0.95 * min(1.0, math.log(max(1, int(name))) / math.log(20))))
    return RULE_COLOURS.get(jumps) or colour_of(jumps or name)
