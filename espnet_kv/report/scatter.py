"""Word error rate against cache size, where each model is a point."""

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, ScalarFormatter

from espnet_kv.report.labels import label_points
from espnet_kv.report.looks import (
    FILLS,
    GRID,
    INK,
    MARKERS,
    MUTED,
    OTHER_MARKER,
    PAPER,
    Entry,
    by_encoder,
    fine_ticks,
    lay_out,
    log_axis,
    panels,
    size,
)
from espnet_kv.report.models import origin

WORDS = {
    "trained": "trained from scratch",
    "converted": "converted",
    "fine-tuned": "converted and fine-tuned",
}


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other one beats in one coordinate without losing in the other.

    Smaller is better in both; sorted by the first.
    """
    front: list[tuple[float, float]] = []
    for point in sorted(set(points)):
        if not front or point[1] < front[-1][1]:
            front.append(point)
    return front


def wer_against_cache(entries: Sequence[Entry], narrow: bool = False) -> Figure | None:
    """A panel for each test set and mode: WER over allocated bytes, with Pareto front."""
    found: dict[tuple[str, str], list[tuple[Entry, float, float]]] = {}
    for mode in ("offline", "streaming"):
        for entry in entries:
            allocated = entry.profile.allocated()
            for name, rates in entry.profile.wer.get(mode, {}).items():
                if allocated and allocated.attention and rates.wer is not None:
                    point = (entry, float(allocated.attention), rates.wer)
                    found.setdefault((mode, name), []).append(point)
    if not found:
        return None
    figure, axes = panels(len(found), narrow, 3.3)
    # in all panels or in none, so that they can be looked at side by side
    ranges = [[wer for _, _, wer in points] for points in found.values()]
    logarithmic = min(map(min, ranges)) > 0 and any(max(r) / min(r) > 5 for r in ranges)
    for axis, ((mode, name), points) in zip(axes, found.items(), strict=True):
        _draw(axis, points, logarithmic)
        axis.set_title(f"{name}, {mode}")
    drawn = [entry for entry in entries if any(entry is e for ps in found.values() for e, *_ in ps)]
    figure.legend(handles=_legend(drawn), loc="outside upper left", ncols=2 if narrow else 4)
    lay_out(figure)
    for axis, points in zip(axes, found.values(), strict=True):
        front = pareto_front([(x, y) for _, x, y in points])
        label_points(axis, [(x, y, _text(entry)) for entry, x, y in points], front)
    return figure


def _text(entry: Entry) -> str:
    """Its name but for what the marker says: encoder and origin."""
    return entry.short.replace(f" ({origin(entry.profile)})", "")


def _draw(axis: Axes, points: Sequence[tuple[Entry, float, float]], logarithmic: bool) -> None:
    """Points, a thin line through those of one encoder that were trained, and the front."""
    place = {entry: (x, y) for entry, x, y in points}
    trained = [entry for entry in place if origin(entry.profile) == "trained"]
    for members in by_encoder(trained).values():
        xs, ys = zip(*sorted(place[entry] for entry in members), strict=True)
        axis.plot(xs, ys, color=GRID, lw=1.2, zorder=1)
    xs, ys = zip(*pareto_front(list(place.values())), strict=True)
    axis.plot(
        xs,
        ys,
        color=MUTED,
        lw=1.4,
        ls=(0, (4, 2)),
        drawstyle="steps-post",
        zorder=2,
        label="Pareto front",
    )
    for entry, (x, y) in place.items():
        axis.plot([x], [y], ls="none", zorder=3, label=entry.name, **entry.marker)
    sizes, rates = [x for x, _ in place.values()], [y for _, y in place.values()]
    log_axis(axis.xaxis, size, fine_ticks(sizes))
    axis.set_xlim(min(sizes) / 1.9, max(sizes) * 1.9)
    low, high = min(rates), max(rates)
    if logarithmic:
        log_axis(axis.yaxis, lambda y: f"{y:g} %", fine_ticks(rates))
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


def _legend(entries: Sequence[Entry]) -> list[Line2D]:
    def sign(label: str, marker: str, fill: Any = "full") -> Line2D:
        look: dict[str, Any] = {"color": INK, "markerfacecolor": MUTED, "markerfacecoloralt": PAPER}
        return Line2D([], [], ls="", marker=marker, fillstyle=fill, ms=7, label=label, **look)

    handles = [sign(name, MARKERS.get(name, OTHER_MARKER)) for name in by_encoder(entries)]
    origins = [name for name in FILLS if any(origin(e.profile) == name for e in entries)]
    if origins != ["trained"]:
        handles += [sign(WORDS[name], "o", FILLS[name]) for name in origins]
    handles.append(Line2D([], [], color=MUTED, ls=(0, (4, 2)), label="Pareto front"))
    return handles
