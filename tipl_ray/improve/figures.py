"""Figure: how well models predict the gains of changed jumps."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from tipl_ray.drawing import INK, SOFT, as_shipped, dress, labelled, legend_below, new_figure

COLOURS = ("#c8442b", "#e3a13b", "#3b6ea8", SOFT)


@as_shipped()
def draw_correlations(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Spearman correlation of predicted and true gains by stage of training and model input."""
    figure, (axes,) = new_figure(1, width=8.0, height=4.2)
    stages, shown = (list(dict.fromkeys(row[name] for row in rows)) for name in ("stage", "sees"))
    for index, (sees, colour) in enumerate(zip(shown, COLOURS, strict=False)):
        places = np.arange(len(stages)) + 0.16 * (index - (len(shown) - 1) / 2)
        parts = [[row for row in rows if (row["sees"], row["stage"]) == (sees, stage)] for stage in stages]
        middle, low, high = (
            np.array([np.mean([row[name] for row in part]) if part else np.nan for part in parts])
            for name in ("spearman", "low", "high")
        )
        axes.vlines(places, low, high, color=colour, linewidth=2.0)
        axes.plot(places, middle, "o", color=colour, markersize=6, label=sees)
    axes.axhline(0.0, color=INK, linewidth=0.8)
    axes.set_xticks(range(len(stages)), stages)
    dress(
        axes,
        "Predicted vs. true gains of changed jumps, on forks of test trials",
        "stage of training",
        "Spearman correlation",
    )
    legend_below(figure, labelled(axes), ["Model input:"])
    return figure
