"""Pictures of series of checkpoints: how predictable they are, and the shape of their paths."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from tipl_ray.checkpoints.predictability import BOUND, SECOND_HALF, Findings, energies, random_walk, shared_windows
from tipl_ray.checkpoints.records import ImportedSeries
from tipl_ray.drawing import SOFT, as_shipped, dress, explain, labelled, legend_below, new_figure
from tipl_ray.evaluate.figures import COLOURS, NAMES, PHASE_COLOURS, SKILL_LABEL, line_look

LOWEST = -1.0
"""Skill below which no predictor is drawn."""
SERIES_COLOURS = PHASE_COLOURS


@as_shipped()
def skill(findings: Findings) -> Figure:
    """Skill against checkpoints ahead, of all predictors on the same windows."""
    figure, (axes,) = new_figure(1, width=8.5, height=4.4)
    windows, below = shared_windows(findings), []
    ends: dict[int, list[str]] = {}
    for name in dict.fromkeys(row["predictor"] for row in findings.means):
        if name == "copy-last":
            continue
        rows = [row for row in findings.means if (row["predictor"], row["windows"]) == (name, windows)]
        own = [row for row in rows if row["skill"] is not None]
        step_H, skill_H = ([row[key] for row in own] for key in ("step", "skill"))
        style, label = line_look(name), NAMES.get(name, name)
        axes.plot(step_H, skill_H, "--" if name == BOUND else "-", marker="o", label=label, **style)
        if any(row["skill_low"] is not None for row in own):
            band_2H = np.array([[row["skill_low"], row["skill_high"]] for row in own], dtype=np.float64).T
            axes.fill_between(step_H, *band_2H, color=style["color"], alpha=0.15, linewidth=0)
        if skill_H and min(skill_H) < LOWEST:
            below.append(f"{label} falls to {min(skill_H):,.1f}")
        if step_H:
            ends.setdefault(step_H[-1], []).append(label)
    axes.axhline(0, color=COLOURS["copy-last"], linewidth=2, zorder=1, label=NAMES["copy-last"])
    axes.set_ylim(max(LOWEST, min(axes.get_ylim()[0], -0.05)), 1.03)
    where = f", {windows} of the series" if windows == SECOND_HALF else ""
    dress(axes, f"Skill compared with copying the last checkpoint{where}", "checkpoints ahead h", SKILL_LABEL)
    axes.xaxis.set_major_locator(FixedLocator(sorted({row["step"] for row in findings.means})))
    axes.xaxis.set_minor_locator(NullLocator())
    notes = ["; ".join(below)] if below else []
    notes += [
        f"{', '.join(names)}: no further than h = {step}, as there is too little data beyond"
        for step, names in sorted(ends.items())[:-1]
    ]
    legend_below(figure, labelled(axes), notes)
    return figure


@as_shipped()
def phases(findings: Findings) -> Figure:
    """Skill at the nearest step against the place of the start in its iteration, of all predictors."""
    figure, (axes,) = new_figure(1, width=8.5, height=4.4)
    step, below = min(row["step"] for row in findings.phases), []
    for name in dict.fromkeys(row["predictor"] for row in findings.phases if row["predictor"] != "copy-last"):
        own = [row for row in findings.phases if (row["predictor"], row["step"]) == (name, step)]
        known = sorted((row["phase"], row["skill"]) for row in own if row["skill"] is not None)
        label = NAMES.get(name, name)
        axes.plot(*zip(*known, strict=True), marker="o", color=COLOURS.get(name, SOFT), linewidth=1.8, label=label)
        if known and (lowest := min(value for _, value in known)) < LOWEST:
            below.append(f"{label} falls to {lowest:,.1f}")
    axes.axhline(0, color=COLOURS["copy-last"], linewidth=2, zorder=1, label=NAMES["copy-last"])
    axes.set_ylim(max(LOWEST, min(axes.get_ylim()[0], -0.05)), 1.03)
    ahead = "one checkpoint ahead" if step == 1 else f"{step} checkpoints ahead"
    dress(axes, f"Skill by phase, {ahead}", "checkpoints into the iteration (0: it has just ended)", "skill")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    legend_below(figure, labelled(axes), ["; ".join(below)] if below else [])
    return figure


@as_shipped()
def path(series: Sequence[ImportedSeries]) -> Figure:
    """Energy of the path by SVD rank, and the cosines between the first series' displacements."""
    figure, (energy, cosines) = new_figure(2, width=11, height=4.6, width_ratios=(1.2, 1))
    longest = 1
    for index, one in enumerate(series[: len(SERIES_COLOURS)]):
        kept_R = energies(one.products.gram_SS)[:20]
        longest = max(longest, len(kept_R))
        colour = SERIES_COLOURS[index]
        energy.plot(np.arange(1, len(kept_R) + 1), kept_R, marker="o", markersize=4, color=colour, label=one.name)
    walk_R = random_walk(max(one.num_displacements for one in series))[:longest]
    energy.plot(np.arange(1, len(walk_R) + 1), walk_R, "--", color=SOFT, label="a random walk of as many steps")
    energy.set_ylim(top=1.01)
    energy.xaxis.set_major_locator(MaxNLocator(integer=True))
    dress(energy, "Energy of the path by SVD rank", "SVD rank", "share of the squared distances kept")
    gram_SS = series[0].products.gram_SS
    lengths_S = np.sqrt(np.diag(gram_SS))
    moved_S = lengths_S > 0
    if moved_S.any():
        cosines_SS = gram_SS[np.ix_(moved_S, moved_S)] / np.outer(lengths_S[moved_S], lengths_S[moved_S])
        image = cosines.imshow(cosines_SS, vmin=-1, vmax=1, cmap="RdBu_r")
        figure.colorbar(image, ax=cosines, shrink=0.8)
    else:
        explain(cosines, "Nothing moved")
    dress(cosines, f"Cosines between displacements: {series[0].name}", "displacement", "displacement")
    cosines.grid(visible=False)
    legend_below(figure, labelled(energy))
    return figure
