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

from tipl_ray.drawing import SOFT, as_shipped, dress, labelled, legend_below, new_figure, png
from tipl_ray.evaluate.figures import COLOURS

DOCS = Path(__file__).resolve().parent
STEPS = range(1, 11)
LABELS = {
    "tipl": "TIPL (our preset)",
    "ridge": "ridge regression, fitted on the task itself",
    "damped": "damped linear extrapolation",
    "window-floor": "upper bound of this basis",
}


def main() -> None:
    """Draw and write the picture."""
    with as_shipped():
        figure, (seen, unseen) = new_figure(2, width=11, height=4.0, share=True)
        bounds = draw(seen, DOCS / "results" / "inverted_pendulum_cross_validated.csv")
        draw(unseen, DOCS / "results" / "zero_shot.csv", bound=True)
        dress(seen, "InvertedPendulum: 50 test trials", "snapshots ahead", "skill\n(1 perfect, 0 copying)")
        dress(unseen, "HalfCheetah: never seen in training", "snapshots ahead", "")
        said = f"upper bound off the scale: {bounds[0]:.2f} to {bounds[-1]:.2f}"
        seen.text(0.97, 0.95, said, transform=seen.transAxes, ha="right", va="top", fontsize=11, color=SOFT)
        seen.set_ylim(-0.03, 0.5)
        for axes in (seen, unseen):
            axes.set_xticks(STEPS)
        legend_below(figure, labelled(unseen)[::-1])
        (DOCS / "pictures" / "opening.png").write_bytes(png(figure))


def draw(axes: Axes, table: Path, *, bound: bool = False) -> list[float]:
    """One line a predictor with its 95% interval; returns the upper bound's skill at each step."""
    with table.open(newline="") as file:
        rows = {(row["predictor"], int(row["step"])): row for row in csv.DictReader(file)}
    axes.axhline(0, color=COLOURS["copy-last"], linewidth=2, zorder=1, label="copying the last snapshot")
    for name, label in reversed(LABELS.items()):
        if name == "window-floor" and not bound:
            continue
        skill_H, low_H, high_H = (
            [float(rows[name, step][column]) for step in STEPS] for column in ("skill", "skill_low", "skill_high")
        )
        width, style = 3.2 if name == "tipl" else 2, "--" if name == "window-floor" else "-"
        axes.fill_between(list(STEPS), low_H, high_H, color=COLOURS[name], alpha=0.18, linewidth=0)
        axes.plot(STEPS, skill_H, color=COLOURS[name], marker="o", label=label, linewidth=width, linestyle=style)
    return [float(rows["window-floor", step]["skill"]) for step in STEPS]


if __name__ == "__main__":
    main()
