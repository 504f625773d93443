"""What all pictures share: style, panels, titles and legend, and saving as PNG.

Figures do not use pyplot or global state, and look the same whatever the user's matplotlibrc. What cannot be drawn is
left out, with the reason. Knows nothing of what is drawn.
"""

import contextlib
import io
import re
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

DPI = 160
INK = "#222222"
SOFT = "#5c6670"
FAINT = "#d9d9d9"
RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
LETTERS = 11
"""Size of a legend's letters [points]."""


@contextlib.contextmanager
def as_shipped() -> Iterator[None]:
    """Matplotlib's settings as it is shipped with, and no mathematics in names; the user's are there again after it.

    The backend stays what it is: these figures have a canvas of their own.
    """
    shipped: dict[Any, Any] = {name: value for name, value in matplotlib.rcParamsDefault.items() if name != "backend"}
    with matplotlib.rc_context(shipped | {"text.parse_math": False}):
        yield


class _Picture(Figure):
    """A figure that also looks the same where others draw or save it."""

    def draw(self, renderer: Any) -> None:
        with as_shipped():
            super().draw(renderer)

    def savefig(self, *arguments: Any, **settings: Any) -> None:
        with as_shipped():
            super().savefig(*arguments, **settings)


def new_figure(
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


def is_first_in_line(axes: Axes) -> bool:
    """Whether a panel is the leftmost of its line, the one that names what runs upwards."""
    place = axes.get_subplotspec()
    return place is None or place.is_first_col()


def dress(axes: Axes, title: str, across: str, up: str) -> None:
    """Title, what runs along each axis, ticks and grid, in the style that all pictures have."""
    figure, room = axes.get_figure(root=True), axes.get_position()
    assert figure is not None
    width, height = 1.15 * room.width * figure.get_figwidth(), 1.1 * room.height * figure.get_figheight()
    axes.set_title(wrapped(figure, title, width, 12.5, "bold"), fontsize=12.5, color=INK, fontweight="bold")
    axes.set_xlabel(wrapped(figure, across, width, 11.5), fontsize=11.5, color=INK)
    axes.set_ylabel(wrapped(figure, up, height, 11.5), fontsize=11.5, color=INK)
    axes.tick_params(which="both", labelsize=10.5, colors=INK, length=3)
    axes.grid(visible=True, color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color("#999999")


def explain(axes: Axes, words: str) -> None:
    """In the middle of an empty picture, why it is empty."""
    axes.text(
        *(0.5, 0.5, textwrap.fill(words, 32)),
        transform=axes.transAxes,
        ha="center",
        va="center",
        fontsize=11.5,
        color=SOFT,
    )


def log_scale(axes: Axes) -> None:
    """A logarithmic axis over what is drawn, its ticks as `tick_decades` labels them."""
    axes.set_yscale("log")
    low, high = np.log10(axes.get_ylim())
    tick_decades(axes, low, high)


def tick_decades(axes: Axes, low: float, high: float) -> None:
    """Label a logarithmic axis between two powers of ten: by decades, and between them where there are few.

    In plain numbers, or all in powers of ten where one of them would be too long."""
    between = (1.0,) if high - low > 2.5 else (1.0, 2.0, 5.0)
    ticks = [tick for tick in LogLocator(subs=between).tick_values(10**low, 10**high) if low <= np.log10(tick) <= high]
    if len(ticks) < 2:
        ticks = [tick for tick in MaxNLocator(5).tick_values(10**low, 10**high) if 10**low <= tick <= 10**high]
    axes.yaxis.set_major_locator(FixedLocator(ticks))
    is_plain = all("e" not in f"{tick:g}" for tick in ticks)
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}") if is_plain else FuncFormatter(_power_of_ten))
    axes.yaxis.set_minor_locator(NullLocator())


def _power_of_ten(value: float, place: int | None = None) -> str:
    """A tick where some would be too long as plain numbers.

    >>> _power_of_ten(1e-5), _power_of_ten(0.02)
    ('10⁻⁵', '2·10⁻²')
    """
    factor, exponent = f"{value:.2e}".split("e")
    power = f"10{str(int(exponent)).translate(RAISED)}"
    return power if float(factor) == 1 else f"{float(factor):g}·{power}"


def wrapped(figure: Figure, text: str, inches: float, size: float, weight: str = "normal") -> str:
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


def labelled(axes: Axes) -> list[Line2D]:
    """The lines that were given a label, whatever it begins with: matplotlib leaves out those with an underscore."""
    return [line for line in axes.lines if not re.fullmatch(r"_child\d+", str(line.get_label()))]


def legend_below(figure: Figure, entries: Sequence[Line2D], notes: Sequence[str] = ()) -> None:
    """In as few lines as fit the figure's width, long names broken; the figure grows by its height."""
    if not entries:
        return
    room = 0.97 * figure.get_figwidth()
    labels = [wrapped(figure, str(entry.get_label()), min(room - 0.8, 5.0), LETTERS) for entry in entries]
    told = wrapped(figure, "\n".join(notes), room - 0.4, LETTERS) if notes else None
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


def png(figure: Figure) -> bytes:
    """The figure as PNG, the same bytes for the same figure: fixed resolution, no date, no version."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()
