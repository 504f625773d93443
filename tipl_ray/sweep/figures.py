"""Pictures of a sweep: a heat map over two fields, parallel coordinates over all, and curves over training.

A cell is one run: its fields' values, `skill` and, where they are known, `ridge` and `floor`; `skill` may be another
metric, whose name is given.
"""

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.collections import PathCollection
from matplotlib.colors import FuncNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator, StrMethodFormatter

from tipl_ray.drawing import (
    INK,
    SOFT,
    as_shipped,
    dress,
    explain,
    labelled,
    legend_below,
    log_scale,
    new_figure,
    wrapped,
)
from tipl_ray.evaluate.figures import COLOURS
from tipl_ray.evaluate.metrics import Row


@as_shipped()
def heat_map(
    cells: Sequence[Row], across: str, up: str, names: Mapping[str, str], metric: str = "skill", less: bool = False
) -> Figure:
    """Skill over two fields of a sweep, with the ridge in a separate row; the best cell, with `less` the lowest, is
    framed.

    A cell is one run: its fields' values, `skill`, `ridge` and, where they are known, `still`, the skill of the last
    token repeated, and `floor`, the upper bound of the run's basis; what is the same along each row has a separate
    column. One scale of colours has them all: white is copying, blue is better, up to 1, and red is worse, by the
    decades of the error, down to the worst cell. Runs that no grid holds, as a random search makes them, are dots.
    """
    columns, lines = (sorted({cell[field] for cell in cells}, key=_sort_key) for field in (across, up))
    if len(columns) * len(lines) > 3 * len(cells):
        return _dots(cells, across, up, names, metric, less)
    groups = [[[c["skill"] for c in cells if (c[across], c[up]) == (x, y)] for x in columns] for y in lines]
    ridges = [[c["ridge"] for c in cells if c[across] == x] for x in columns]
    has_ridge = any(math.isfinite(value) for ridge in ridges for value in ridge)
    beside = {}
    for name, label in (("still", "last token\nrepeated"), ("floor", "upper bound\nof the basis")):
        known = [{round(cell.get(name, math.nan), 6) for cell in cells if cell[up] == line} for line in lines]
        if all(len(values) == 1 and np.isfinite([*values]).all() for values in known):
            beside[label] = [max(values) for values in known]
    groups = [*([ridges] * has_ridge), *groups]
    means, deviations = (np.array([[told(group) for group in row] for row in groups]) for told in (_mean, _deviation))
    for values in beside.values():
        means = np.column_stack([means, [*([math.nan] * has_ridge), *values]])
    figure, (axes,) = new_figure(1, width=3.0 + 1.7 * means.shape[1], height=2.2 + 0.75 * len(lines))
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
        line, column = np.unravel_index(np.nanargmin(runs) if less else np.nanargmax(runs), runs.shape)
        corner = (column - 0.46, line + has_ridge - 0.44)
        axes.add_patch(Rectangle(corner, 0.92, 0.88, fill=False, edgecolor=INK, linewidth=2.5, zorder=3))
    dress(axes, f"{metric} by {names[up]} and {names[across]}; best framed", names[across], names[up])
    axes.grid(visible=False)
    told = [*map(_value_text, columns), *beside]
    axes.set_xticks(range(means.shape[1]), [wrapped(figure, text, 1.6, 10.5) for text in told])
    told = [*(["ridge"] * has_ridge), *map(_value_text, lines)]
    axes.set_yticks(range(len(told)), [wrapped(figure, text, 1.6, 10.5) for text in told])
    if has_ridge:
        axes.axhline(0.5, color="white", linewidth=4)
    if beside:
        axes.axvline(len(columns) - 0.5, color="white", linewidth=4)
    _colour_bar(figure, axes, shown, metric)
    return figure


def _dots(cells: Sequence[Row], across: str, up: str, names: Mapping[str, str], metric: str, less: bool) -> Figure:
    """A dot for every run, in the colours of the heat map; the best is ringed."""
    figure, (axes,) = new_figure(1, width=8.5, height=4.8)
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
        best = int(np.nanargmin(values) if less else np.nanargmax(values))
        axes.plot(x[best], y[best], "o", ms=16, mfc="none", mec=INK, mew=2.5, zorder=3)
        axes.annotate(_skill_text(values[best]), (x[best], y[best]), (11, 9), textcoords="offset points", fontsize=11)
    dress(axes, f"{metric} by {names[up]} and {names[across]}; best circled", names[across], names[up])
    if not known.all():
        entries = [Line2D([], [], color=SOFT, marker="x", linestyle="", label="run that diverged")]
        legend_below(figure, entries)
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
    """The colour bar, from the worst value to the best possible one."""
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
    bar.set_label(wrapped(figure, told, 0.8 * figure.get_figheight(), 10), fontsize=10, color=INK)


@as_shipped()
def parallel_coordinates(
    cells: Sequence[Row], names: Mapping[str, str], metric: str = "skill", less: bool = False
) -> Figure:
    """Every run of a sweep as a line from the values of its fields to its skill; the better, with `less` the lower, the
    darker."""
    fields = [*names, "skill"]
    lost = sum(not math.isfinite(cell["skill"]) for cell in cells)
    known = (cell for cell in cells if math.isfinite(cell["skill"]))
    cells = sorted(known, key=lambda cell: cell["skill"], reverse=less)
    figure, (axes,) = new_figure(1, width=max(6.0, 2.2 * len(fields)), height=4.6)
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
        colour = COLOURS["tipl"] if best else COLOURS["copy-last"]
        axes.plot(
            range(len(fields)), line, color=colour, alpha=1 if best else 0.15 + 0.6 * share, lw=3 if best else 1.6
        )
    missing = f"; {lost} diverged and are not drawn" if lost else ""
    dress(axes, f"Fields and {metric} of every run; best in blue{missing}", "", "")
    axes.grid(visible=False)
    if not cells:
        explain(axes, "Every run diverged" if lost else "There are no runs")
    axes.set_xticks(range(len(fields)), [wrapped(figure, name, 2.0, 10.5) for name in (*names.values(), metric)])
    axes.set_yticks([])
    axes.set_xlim(-0.5, len(fields) - 0.4)
    axes.spines["left"].set_visible(False)
    return figure


@as_shipped()
def curves(
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

    figure, (axes,) = new_figure(1, width=8.5, height=4.2)
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
        label = "ridge with the best run's context"
        axes.axhline(float(drawn([ridge])[0]), color=COLOURS["ridge"], lw=2, ls="--", label=label)
    if far:
        log_scale(axes)
    if not np.isfinite(everything).any():
        explain(axes, "Every run diverged" if len(everything) else "There are no runs")
    up = f"1 - {metric}: squared error relative to copying" if far else metric
    dress(axes, f"{metric} of the best model so far, for every run", "optimisation steps", up)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    legend_below(figure, labelled(axes))
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
