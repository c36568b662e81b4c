"""Names written beside points and lines, out of each other's way."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from matplotlib.axes import Axes
from matplotlib.transforms import Bbox

from espnet_kv.report.looks import PAPER

LINE = 11.0  # height of a line of text in points
SIZE = 8.5
Box = tuple[float, float, float, float]
"""Left, bottom, right and top in pixels."""
# where a name may stand beside its point, in points, the best first
SPOTS = [*((dx, dy) for dy in (0, 9, -9, 18, -18) for dx in (9, -9)), (0, 12), (0, -12)]


def room_for(names: Sequence[str], narrow: bool) -> float:
    """The share of an axis that `names` take beside the ends of its lines."""
    longest = max(map(len, names), default=0)
    return min((30 + 0.55 * SIZE * longest) / (270 if narrow else 240), 0.6)


def label_ends(axis: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Write (x, y, text, colour) to the right of where lines end, spread where they are near.

    The figure must be laid out (`looks.lay_out`), with the limits of `axis` final.
    """
    if not ends:
        return
    unit = axis.get_figure(root=True).dpi / 72  # type: ignore[union-attr]
    ends = sorted(ends, key=lambda end: axis.transData.transform(end[:2])[1])
    own = np.array([axis.transData.transform(end[:2])[1] for end in ends]) / unit
    heights = own.copy()
    for _ in range(200):  # neighbours push each other apart until none is too near
        lacking = np.maximum(LINE - np.diff(heights), 0.0)
        if lacking.max(initial=0.0) < 0.05:
            break
        heights[:-1] -= lacking / 2
        heights[1:] += lacking / 2
    low, high = (edge / unit for edge in axis.get_window_extent().intervaly)
    heights += max(low + LINE / 2 - heights[0], 0.0)
    heights -= max(heights[-1] - (high + LINE / 2), 0.0)
    for (x, y, text, colour), shift in zip(ends, heights - own, strict=True):
        axis.annotate(
            text,
            (x, y),
            xytext=(18, shift),
            textcoords="offset points",
            va="center",
            fontsize=SIZE,
            arrowprops={"arrowstyle": "-", "color": colour, "lw": 1, "shrinkA": 2, "shrinkB": 3},
            annotation_clip=False,
        ).set_in_layout(False)


def label_points(
    axis: Axes,
    points: Sequence[tuple[float, float, str]],
    steps: Sequence[tuple[float, float]] = (),
) -> None:
    """Write the text of (x, y, text) beside each point, where it covers least.

    The figure must be laid out (`looks.lay_out`), with the limits of `axis` final.

    Args:
        steps: corners of a line of steps that had better not be covered either.
    """
    unit = axis.get_figure(root=True).dpi / 72  # type: ignore[union-attr]
    places = [tuple(axis.transData.transform(point[:2])) for point in points]
    taken: list[Box] = [(x - 5 * unit, y - 5 * unit, x + 5 * unit, y + 5 * unit) for x, y in places]
    corners = [axis.transData.transform(corner) for corner in steps]
    for (left, top), (right, bottom) in pairwise(corners):  # across, then down
        taken.append((left, top - 2 * unit, right, top + 2 * unit))
        taken.append((right - 2 * unit, bottom, right + 2 * unit, top))
    frame = _corners(axis.get_window_extent())
    for (x, y, text), place in zip(points, places, strict=True):
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
        extent = note.get_window_extent()
        boxes = [_box(place, spot, unit, extent.width, extent.height) for spot in SPOTS]
        costs = [
            sum(_overlap(box, other) for other in taken)
            + 3 * (extent.width * extent.height - _overlap(box, frame))
            + order
            for order, box in enumerate(boxes)
        ]
        best = int(np.argmin(costs))
        taken.append(boxes[best])
        dx, dy = SPOTS[best]
        note.set_position((dx, dy))
        note.set_horizontalalignment("center" if dx == 0 else "left" if dx > 0 else "right")


def _box(
    place: tuple[float, ...], spot: tuple[int, int], unit: float, width: float, height: float
) -> Box:
    x, y = place[0] + spot[0] * unit, place[1] + spot[1] * unit
    left = x - width * (0.5 if spot[0] == 0 else spot[0] < 0)
    return left, y - height / 2, left + width, y + height / 2


def _corners(extent: Bbox) -> Box:
    return extent.x0, extent.y0, extent.x1, extent.y1


def _overlap(a: Box, b: Box) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    return max(width, 0.0) * max(height, 0.0)
