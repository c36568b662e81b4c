"""What the figures share: colours, units, panels, axes, and names beside points and lines."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator
from matplotlib.transforms import Bbox

# within a page these four become those of the page, light or dark (see `page.inline_svg`)
INK, MUTED, GRID, PAPER = "#22262c", "#69707a", "#d9dce1", "#fefefe"
CONV, INPUT = "#9aa1ab", "#c3c8cf"
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "axes.axisbelow": True,
    "figure.facecolor": PAPER,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "text.parse_math": False,  # a dollar sign in a name is just that
}
WIDE, NARROW = 8.4, 4.3  # width of a figure in inches
LINE, SIZE = 11.0, 8.5  # height of a line and of its letters in points
# offsets of a name from its point in points, in order of preference
SPOTS = [*((dx, dy) for dy in (0, 9, -9, 18, -18) for dx in (9, -9)), (0, 12), (0, -12)]


@contextmanager
def style() -> Iterator[None]:
    """matplotlib's settings while figures are drawn and saved."""
    with matplotlib.rc_context(STYLE):
        yield


def panels(
    count: int, narrow: bool, height: float, columns: int = 2, **shared: Any
) -> tuple[Figure, list[Axes]]:
    """A figure of `count` panels, side by side or, when narrow, below each other.

    Args:
        height: of a panel in inches.
        columns: panels beside each other at most.
        shared: sharex, sharey of `Figure.subplots`.
    """
    columns = 1 if narrow else min(columns, count)
    rows = -(-count // columns)
    size = (NARROW if narrow else WIDE, rows * height)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **shared).flatten()
    for axis in axes[count:]:
        axis.set_visible(False)
    return figure, list(axes[:count])


def lay_out(figure: Figure) -> None:
    """Compute the final place of all panels: names are put beside points in pixels after that."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")


def size(value: float) -> str:
    """Bytes as text: 81.9 kB."""
    return _with_unit(value, (("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("B", 1.0)))


def duration(value: float) -> str:
    """Seconds as text: 30.0 s, 10.0 min."""
    return _with_unit(value, (("min", 60.0), ("s", 1.0)))


def milliseconds(value: float) -> str:
    """ms as text: 6.20 ms, 1.50 s."""
    return _with_unit(value, (("s", 1e3), ("ms", 1.0)))


def _with_unit(value: float, units: Sequence[tuple[str, float]]) -> str:
    """Three digits of `value` and the largest unit that is not above it."""
    unit, factor = next((u for u in units if abs(value) >= u[1]), units[-1])
    amount = value / factor
    decimals = 0 if abs(amount) >= 100 or unit == "B" else 1 if abs(amount) >= 10 else 2
    return f"{amount:.{decimals}f} {unit}"


def on_ticks(text: Callable[[float], str]) -> FuncFormatter:
    """A formatter of ticks: `text` without trailing zeros."""
    zeros = re.compile(r"\.0+(?= )|(?<=\.\d)0(?= )")
    return FuncFormatter(lambda value, _: zeros.sub("", text(value)))


def log_axis(
    axis: Any, text: Callable[[float], str], values: Sequence[float], narrow: bool
) -> None:
    """Make `axis` (axes.xaxis or yaxis) of `values` logarithmic.

    Ticks are at powers of ten, and where there is room at 2 and 5 times them.
    """
    (axis.axes.set_xscale if axis.axis_name == "x" else axis.axes.set_yscale)("log")
    fine = max(values) / min(values) < (60 if narrow else 600)
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if fine else (1,)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(on_ticks(text))


def length_axis(axis: Axes, seconds: Sequence[float], room: float) -> None:
    """A logarithmic x of audio lengths: ticks where something was measured.

    Args:
        room: the share of the axis that stays free on the right.
    """
    axis.set_xscale("log")
    ticks = sorted(set(seconds))
    axis.xaxis.set_major_locator(FixedLocator(ticks))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(on_ticks(duration))
    span = max(ticks[-1] / ticks[0], 2.0)
    axis.set_xlim(ticks[0] / span**0.03, ticks[-1] * span ** (room / (1 - room)))


def room_for(names: Sequence[str], narrow: bool) -> float:
    """The share of an axis that `names` take beside the ends of its lines."""
    longest = max(map(len, names), default=0)
    return min((30 + 0.55 * SIZE * longest) / (270 if narrow else 240), 0.6)


def label_ends(axis: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Write (x, y, text, colour) to the right of line ends, one line of text apart at least.

    The figure must be laid out (`lay_out`), with the limits of `axis` final.
    """
    unit = axis.get_figure(root=True).dpi / 72  # type: ignore[union-attr]
    ends = sorted(ends, key=lambda end: axis.transData.transform(end[:2])[1])
    own = np.array([axis.transData.transform(end[:2])[1] for end in ends]) / unit
    heights = own.copy()
    for _ in range(200):  # neighbours that are too near push each other apart
        lacking = np.maximum(LINE - np.diff(heights), 0.0)
        heights[:-1] -= lacking / 2
        heights[1:] += lacking / 2
    low, high = (edge / unit for edge in axis.get_window_extent().intervaly)
    heights += max(low + LINE / 2 - heights.min(initial=low + LINE), 0.0)
    heights -= max(heights.max(initial=low) - (high + LINE / 2), 0.0)
    line = {"arrowstyle": "-", "lw": 1, "shrinkA": 2, "shrinkB": 3, "relpos": (0, 0.5)}
    for (x, y, text, colour), shift in zip(ends, heights - own, strict=True):
        axis.annotate(
            text,
            (x, y),
            xytext=(18, shift),
            textcoords="offset points",
            va="center",
            fontsize=SIZE,
            arrowprops=line | {"color": colour},
            annotation_clip=False,
        ).set_in_layout(False)


def label_points(axis: Axes, points: Sequence[tuple[float, float, str]]) -> None:
    """Write the text of (x, y, text) beside each point, where it covers least.

    The figure must be laid out (`lay_out`), with the limits of `axis` final.
    """
    unit = axis.get_figure(root=True).dpi / 72  # type: ignore[union-attr]
    places = [axis.transData.transform(point[:2]) for point in points]
    taken = [Bbox.from_extents(*(p - 5 * unit), *(p + 5 * unit)) for p in places]
    frame = axis.get_window_extent()
    for x, y, text in points:
        note = axis.annotate(
            text,
            (x, y),
            xytext=(0, 0),
            textcoords="offset points",
            va="center",
            fontsize=SIZE,
            bbox={"boxstyle": "square,pad=0.1", "facecolor": PAPER, "edgecolor": "none"},
            zorder=2.5,  # over lines, below points
        )
        note.set_in_layout(False)
        costs = []
        for spot in SPOTS:
            own = _move(note, spot)
            outside = own.width * own.height - _common(own, frame)
            costs.append(sum(_common(own, other) for other in taken) + 3 * outside)
        taken.append(_move(note, SPOTS[costs.index(min(costs))]))


def _move(note: Any, spot: tuple[int, int]) -> Bbox:
    """Put an annotation at an offset; the box that it takes there, in pixels."""
    note.set_position(spot)
    note.set_horizontalalignment("center" if spot[0] == 0 else "left" if spot[0] > 0 else "right")
    return note.get_window_extent()


def _common(a: Bbox, b: Bbox) -> float:
    """The area that two boxes have in common."""
    common = Bbox.intersection(a, b)
    return common.width * common.height if common else 0.0
