"""The figure of WER over cache, with intervals and the Pareto front."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, ScalarFormatter

from espnet_kv.report import style
from espnet_kv.report.comparison import ORIGINS, Entry, by_encoder
from espnet_kv.report.style import GRID, INK, MUTED, PAPER, size

FILLS: Mapping[str, Any] = {"trained": "full", "converted": "none", "fine-tuned": "bottom"}
DASHED = (0, (4, 2))


class Point(NamedTuple):
    """A model's place in the figure: cache in bytes, WER in per cent and its interval."""

    cache: float
    wer: float
    low: float
    high: float


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """The points that no other one beats in one coordinate without losing in the other.

    Smaller is better in both. A lower WER counts where the intervals do not overlap; sorted by
    cache.
    """
    front: list[Point] = []
    for point in sorted(set(points)):
        if not front or point.high < front[-1].low:
            front.append(point)
    return front


def wer_against_cache(models: Sequence[Entry], narrow: bool = False) -> Figure | None:
    """A panel for each test set and mode: WER over allocated bytes, with Pareto front."""
    found: dict[str, dict[Entry, Point]] = {}
    for mode in ("offline", "streaming"):
        for entry in models:
            held = entry.profile.bounded()
            for name, rates in entry.profile.wer.get(mode, {}).items():
                if held and held.allocated.attention and rates.wer is not None:
                    low, high = rates.wer_interval or (rates.wer, rates.wer)
                    point = Point(float(held.allocated.attention), rates.wer, low, high)
                    found.setdefault(f"{name}, {mode}", {})[entry] = point
    if not found:
        return None
    figure, axes = style.panels(len(found), narrow, 3.3)
    # all panels have the same kind of axis, so that they can be compared
    ranges = [
        [wer for p in points.values() for wer in (p.low, p.high)] for points in found.values()
    ]
    logarithmic = min(map(min, ranges)) > 0 and any(max(r) / min(r) > 5 for r in ranges)
    fronts = [pareto_front(list(points.values())) for points in found.values()]
    for axis, (title, points), front in zip(axes, found.items(), fronts, strict=True):
        _scatter(axis, points, front, logarithmic)
        axis.set_title(title)
    shown = [entry for entry in models if any(entry in points for points in found.values())]
    handles = _legend(shown, joined=any(len(front) > 1 for front in fronts))
    figure.legend(handles=handles, loc="outside upper left", ncols=2 if narrow else 4)
    style.lay_out(figure)
    for axis, points in zip(axes, found.values(), strict=True):
        # encoder and origin are seen in the marker
        names = {entry: entry.short.replace(f" ({entry.origin})", "") for entry in points}
        style.label_points(axis, [(p.cache, p.wer, names[entry]) for entry, p in points.items()])
    return figure


def _scatter(
    axis: Axes, points: Mapping[Entry, Point], front: Sequence[Point], logarithmic: bool
) -> None:
    """Points with intervals, a thin line through each encoder's trained models, the front."""
    trained = [entry for entry in points if entry.origin == "trained"]
    for members in by_encoder(trained).values():
        line = sorted(points[entry] for entry in members)
        axis.plot([p.cache for p in line], [p.wer for p in line], color=GRID, lw=1.2, zorder=1)
    if len(front) > 1:
        look: Any = {"color": MUTED, "lw": 1.4, "ls": DASHED, "drawstyle": "steps-post"}
        caches, rates = [p.cache for p in front], [p.wer for p in front]
        axis.plot(caches, rates, label="Pareto front", zorder=2, **look)
    for entry, p in points.items():
        fill = _marker(entry.marker, entry.origin, entry.colour, entry.colour)
        axis.vlines(p.cache, p.low, p.high, color=entry.colour, lw=1.2, alpha=0.6, zorder=2)
        axis.plot([p.cache], [p.wer], label=entry.name, zorder=3, **fill)
    sizes = [p.cache for p in points.values()]
    style.log_axis(axis.xaxis, size, sizes, narrow=True)
    axis.set_xlim(min(sizes) / 1.9, max(sizes) * 1.9)
    low, high = min(p.low for p in points.values()), max(p.high for p in points.values())
    if logarithmic:
        style.log_axis(axis.yaxis, lambda y: f"{y:g} %", [low, high], narrow=True)
        axis.set_ylim(low / 1.3, high * 1.3)
        axis.set_ylabel("WER (%, logarithmic)")
    else:
        margin = 0.15 * (high - low) + 0.02 * high + 0.05
        axis.set_ylim(max(low - margin, 0.0), high + margin)
        axis.yaxis.set_major_locator(MaxNLocator(5))
        axis.yaxis.set_major_formatter(ScalarFormatter(useOffset=False))
        axis.set_ylabel("WER (%)")
    axis.set_xlabel("cache of one stream, allocated (logarithmic)")
    axis.grid(axis="y")


def _marker(marker: str, origin: str, colour: str, fill: str) -> dict[str, Any]:
    """Arguments of a line that is one marker; its filling shows where the weights come from."""
    return {
        "ls": "none",
        "marker": marker,
        "color": colour,
        "markerfacecolor": fill,
        "markerfacecoloralt": PAPER,
        "fillstyle": FILLS[origin],
        "markersize": 8,
        "markeredgewidth": 1.4,
    }


def _legend(models: Sequence[Entry], joined: bool) -> list[Line2D]:
    """Of the encoders, the origins where they differ, and the front where there is one."""
    signs = [(name, group[0].marker, "trained") for name, group in by_encoder(models).items()]
    origins = [name for name in ORIGINS if any(entry.origin == name for entry in models)]
    if origins != ["trained"]:
        signs += [(ORIGINS[name], "o", name) for name in origins]
    handles = [Line2D([], [], label=text, **_marker(m, o, INK, MUTED)) for text, m, o in signs]
    if joined:
        handles.append(Line2D([], [], color=MUTED, ls=DASHED, label="Pareto front"))
    return handles
