"""The README's opening picture, drawn from the committed result tables alone.

    python docs/opening.py

Skill of each predictor per forward step, on InvertedPendulum, cross-validated, and on HalfCheetah, a task that the
Transformer never saw in training. Writes docs/pictures/opening.png; nothing is run.
"""

import csv
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from tipl_ray.drawing import SOFT, as_shipped, dress, labelled, legend_below, new_figure, png
from tipl_ray.evaluate.figures import COLOURS

DOCS = Path(__file__).resolve().parent
STEPS = range(1, 11)
CORRECTED = ("TIPL, each weight corrected (preset per-weight)", "#003f66")
LABELS = {
    "tipl": "TIPL (preset causal)",
    "ridge": "ridge regression, fitted on the task itself",
    "damped": "damped linear extrapolation",
    "window-floor": "upper bound of causal's basis",
}


def main() -> None:
    """Draw and write the picture."""
    with as_shipped():
        figure, (seen, unseen) = new_figure(2, width=11, height=4.0, share=True)
        bounds = draw(seen, DOCS / "results" / "inverted_pendulum_cross_validated.csv")
        draw(unseen, DOCS / "results" / "zero_shot.csv", bound=True)
        table = read(DOCS / "results" / "inverted_pendulum_per_weight_cross_validated.csv")
        (corrected,) = line(seen, table, "tipl", CORRECTED[1], width=3.2)
        dress(seen, "InvertedPendulum: 50 test trials", "snapshots ahead", "skill\n(1 perfect, 0 copying)")
        dress(unseen, "HalfCheetah: never seen in training", "snapshots ahead", "")
        said = f"upper bound off the scale: {bounds[0]:.2f} to {bounds[-1]:.2f}"
        seen.text(0.97, 0.95, said, transform=seen.transAxes, ha="right", va="top", fontsize=11, color=SOFT)
        seen.set_ylim(-0.03, 0.5)
        for axes in (seen, unseen):
            axes.set_xticks(STEPS)
        corrected.set_label(CORRECTED[0])
        legend_below(figure, [corrected, *labelled(unseen)[::-1]])
        (DOCS / "pictures" / "opening.png").write_bytes(png(figure))


def read(table: Path) -> dict[tuple[str, int], dict[str, str]]:
    """Rows of a result table, by predictor and step."""
    with table.open(newline="") as file:
        return {(row["predictor"], int(row["step"])): row for row in csv.DictReader(file)}


def draw(axes: Axes, table: Path, *, bound: bool = False) -> list[float]:
    """One line a predictor with its 95% interval; returns the upper bound's skill at each step."""
    rows = read(table)
    axes.axhline(0, color=COLOURS["copy-last"], linewidth=2, zorder=1, label="copying the last snapshot")
    for name, label in reversed(LABELS.items()):
        if name == "window-floor" and not bound:
            continue
        width, style = 3.2 if name == "tipl" else 2, "--" if name == "window-floor" else "-"
        (drawn,) = line(axes, rows, name, COLOURS[name], width=width, style=style)
        drawn.set_label(label)
    return [float(rows["window-floor", step]["skill"]) for step in STEPS]


def line(
    axes: Axes, rows: dict[tuple[str, int], dict[str, str]], name: str, colour: str, *, width: float, style: str = "-"
) -> list[Line2D]:
    """A predictor's skill per step, with its interval."""
    skill_H, low_H, high_H = (
        [float(rows[name, step][column]) for step in STEPS] for column in ("skill", "skill_low", "skill_high")
    )
    axes.fill_between(list(STEPS), low_H, high_H, color=colour, alpha=0.18, linewidth=0)
    return axes.plot(STEPS, skill_H, color=colour, marker="o", linewidth=width, linestyle=style)


if __name__ == "__main__":
    main()
