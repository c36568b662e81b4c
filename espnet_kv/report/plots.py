"""The figures of a report: bars per model, and curves over the length of the audio."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.legend_handler import HandlerTuple
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from espnet_kv.report import style
from espnet_kv.report.comparison import Entry, by_encoder
from espnet_kv.report.style import CONV, GRID, INK, INPUT, MUTED, milliseconds, size
from espnet_kv.report.wer_cache import wer_against_cache

Points = list[tuple[float, float]]
OFFLINE = "whole utterance, offline"


def cache_size(models: Sequence[Entry], narrow: bool = False) -> Figure | None:
    """Bytes allocated for a stream: attention, convolution and input, stacked."""
    shown = [(entry, held) for entry in models if (held := entry.profile.bounded())]
    if not shown:
        return None
    figure, (axis,), rows = _rows([entry for entry, _ in shown], 1, narrow)
    left = [0.0] * len(shown)
    colours = [[entry.colour for entry, _ in shown], [CONV] * len(shown), [INPUT] * len(shown)]
    for kind, colour in zip(("attention", "conv", "input"), colours, strict=True):
        values = [float(getattr(held.allocated, kind)) for _, held in shown]
        axis.barh(rows, values, height=0.62, left=left, color=colour, label=kind)
        left = [a + b for a, b in zip(left, values, strict=True)]
    for row, (_, held) in zip(rows, shown, strict=True):
        text = f"{size(held.allocated.attention)} of {size(held.allocated.total)}"
        text += "" if narrow else f"; held {size(held.bytes.attention)}"
        _beside(axis, held.allocated.total, row, text)
    _value_axis(axis, max(held.allocated.total for _, held in shown), size, room=0.45)
    axis.set_xlabel("allocated for one stream, attention first")
    attention: Any = tuple(Patch(color=c) for c in dict.fromkeys(colours[0]))
    figure.legend(
        [attention, Patch(color=CONV), Patch(color=INPUT)],
        ["attention", "convolution", "input"],
        loc="outside upper left",
        handler_map={tuple: HandlerTuple(ndivide=None, pad=0.2)},
        ncols=3,
    )
    style.lay_out(figure)
    return figure


def inference_time(models: Sequence[Entry], narrow: bool = False) -> Figure | None:
    """Median and 95th percentile of a chunk, of an utterance, and of the first token."""

    def bar(entry: Entry, part: str) -> tuple[float, float] | None:
        spread = getattr(entry.profile.time, f"{part}_ms")
        return (spread.p50, spread.p95) if spread else None

    parts = {"chunk": "one chunk, streamed", "utterance": OFFLINE, "first_token": "first token"}
    label = "median; the thin line ends at the 95th percentile"
    return _bars(models, narrow, parts, bar, milliseconds, label)


def peak_memory(models: Sequence[Entry], narrow: bool = False) -> Figure | None:
    """Peak above what the loaded model takes, at the longest audio."""

    def bar(entry: Entry, mode: str) -> tuple[float, float] | None:
        peak = getattr(entry.profile.memory, f"{mode}_bytes")
        return None if peak is None else (peak, peak)

    modes = {"streaming": "streaming", "offline": OFFLINE}
    return _bars(models, narrow, modes, bar, size, "peak above the loaded model")


def cache_dtypes(models: Sequence[Entry], narrow: bool = False) -> Figure | None:
    """The attention cache in each cache_dtype, allocated, on a logarithmic axis."""
    shown: dict[Entry, dict[str, int]] = {}
    for entry in models:
        held = {dtype: entry.profile.bounded(dtype) for dtype in entry.profile.cache}
        sizes = {d: h.allocated.attention for d, h in held.items() if h and h.allocated.attention}
        if len(sizes) > 1:
            shown[entry] = sizes
    if not shown:
        return None
    figure, (axis,), rows = _rows(list(shown), 1, narrow, 0.44)
    for row, (entry, sizes) in zip(rows, shown.items(), strict=True):
        points = list(sizes.values())
        axis.plot(points, [row] * len(points), "o-", color=entry.colour, lw=1.5, label=entry.name)
        for value in dict.fromkeys(points):
            dtypes = " ".join(dtype for dtype, own in sizes.items() if own == value)
            place: Any = {"xytext": (0, 5), "textcoords": "offset points", "ha": "center"}
            axis.annotate(dtypes, (value, row), fontsize=7.5, **place)
    values = [value for sizes in shown.values() for value in sizes.values()]
    style.log_axis(axis.xaxis, size, values, narrow)
    axis.set_xlim(min(values) / 1.5, max(values) * 1.5)
    axis.grid(axis="x")
    axis.set_xlabel("cache of one stream, allocated (logarithmic)")
    style.lay_out(figure)
    return figure


def _bars(
    models: Sequence[Entry],
    narrow: bool,
    parts: Mapping[str, str],
    bar: Callable[[Entry, str], tuple[float, float] | None],
    text: Callable[[float], str],
    label: str,
) -> Figure | None:
    """A panel for each part that is known, with a bar for each model.

    Args:
        parts: second argument of `bar` -> the panel's title.
        bar: length of a bar, and end of the thin line on it.
        text: writes a length beside its bar.
    """
    found = {
        title: {entry: lengths for entry in models if (lengths := bar(entry, part))}
        for part, title in parts.items()
    }
    found = {title: bars for title, bars in found.items() if bars}
    if not found:
        return None
    known = [entry for entry in models if any(entry in bars for bars in found.values())]
    figure, axes, rows = _rows(known, len(found), narrow)
    room = 0.3 if narrow else 0.16 * (1 + len(axes))  # for the texts beside the bars
    for axis, (title, bars) in zip(axes, found.items(), strict=True):
        for entry, row in zip(known, rows, strict=True):
            if entry in bars:
                length, end = bars[entry]
                axis.barh(row, length, height=0.62, color=entry.colour)
                if end > length:
                    axis.plot([length, end], [row, row], color=MUTED, lw=1.2)
                _beside(axis, max(length, end), row, text(length))
        _value_axis(axis, max(map(max, bars.values())), text, room)
        axis.set_title(title)
    figure.supxlabel(label, fontsize=9)
    style.lay_out(figure)
    return figure


def _rows(
    models: Sequence[Entry], count: int, narrow: bool, height: float = 0.3
) -> tuple[Figure, list[Axes], list[float]]:
    """Panels with a named row for each model, and a gap between encoders."""
    rows, place = [], 0.0
    for n, entry in enumerate(models):
        place += 0.0 if n == 0 else 1.0 if entry.encoder == models[n - 1].encoder else 1.5
        rows.append(place)
    tall = 1.1 + (height + 0.14 * narrow) * (place + 1)
    figure, axes = style.panels(count, narrow, tall, columns=count, sharey=True)
    axes[0].set_ylim(place + 0.7, -0.7)
    for axis in axes:
        if narrow:  # names stand above their bars
            axis.set_yticks([])
            place_of = axis.get_yaxis_transform()
            for row, entry in zip(rows, models, strict=True):
                axis.text(0, row - 0.33, entry.name, fontsize=8, va="bottom", transform=place_of)
        else:
            axis.set_yticks(rows, [entry.name for entry in models])
        axis.tick_params(axis="y", length=0)
        axis.spines["left"].set_visible(False)
    return figure, axes, rows


def _beside(axis: Axes, value: float, row: float, text: str) -> None:
    place: Any = {"xytext": (4, 0), "textcoords": "offset points", "va": "center"}
    axis.annotate(text, (value, row), fontsize=8, **place)


def _value_axis(axis: Axes, largest: float, text: Callable[[float], str], room: float) -> None:
    axis.set_xlim(0, (largest or 1.0) * (1 + room))
    axis.xaxis.set_major_locator(MaxNLocator(3))
    axis.xaxis.set_major_formatter(style.on_ticks(text))
    axis.grid(axis="x", color=GRID)


def cache_growth(models: Sequence[Entry], narrow: bool = False) -> Figure | None:
    """Bytes allocated for attention over seconds of audio: bounded by left_chunks, or unbounded."""

    def points(entry: Entry, side: str) -> Points:
        cache = entry.profile.own_cache
        held = (
            [(length.seconds, getattr(length, side)) for length in cache.lengths] if cache else []
        )
        return [(seconds, h.allocated.attention) for seconds, h in held if h]

    sides = {"unbounded": "unbounded left context", "bounded": "bounded by left_chunks"}
    return _curves(models, narrow, sides, points, size, "cache, allocated")


def time_growth(models: Sequence[Entry], narrow: bool = False) -> Figure | None:
    """ms that the encoder takes for a whole utterance, over its length."""

    def points(entry: Entry, _: str) -> Points:
        return [(t.seconds, t.encode_ms) for t in entry.profile.time.lengths if t.encode_ms]

    return _curves(models, narrow, {"": ""}, points, milliseconds, "whole utterance")


def memory_growth(models: Sequence[Entry], narrow: bool = False) -> Figure | None:
    """Peak bytes of a whole utterance and of a stream, over the length of the audio."""

    def points(entry: Entry, mode: str) -> Points:
        return [(m.seconds, getattr(m, f"{mode}_bytes")) for m in entry.profile.memory.lengths]

    modes = {"offline": "whole utterance", "streaming": "streamed"}
    return _curves(models, narrow, modes, points, size, "peak memory")


def hour(models: Sequence[Entry], narrow: bool = False) -> Figure | None:
    """Median ms of a chunk in each minute of an hour of audio."""

    def points(entry: Entry, _: str) -> Points:
        return [(float(m.minute), m.chunk_ms) for m in entry.profile.time.hour]

    return _curves(models, narrow, {"": ""}, points, None, "chunk, median (ms)")


def _curves(
    models: Sequence[Entry],
    narrow: bool,
    lines: Mapping[str, str],
    points: Callable[[Entry, str], Points],
    text: Callable[[float], str] | None,
    label: str,
) -> Figure | None:
    """A panel for each encoder, and in it the lines of each model.

    Args:
        lines: second argument of `points` -> its name in the legend. The first line of a model
            is solid and named, the second is dashed.
        text: writes a value beside a tick; both axes are logarithmic then, x in seconds. None: both
            are linear, x in minutes.
    """
    found = {
        entry: {which: sorted(p for p in points(entry, which) if p[1]) for which in lines}
        for entry in models
    }
    groups = by_encoder([entry for entry, drawn in found.items() if any(drawn.values())])
    if not groups:
        return None
    figure, axes = style.panels(len(groups), narrow, 3.2, sharex=True, sharey=True)
    room = style.room_for([entry.short for entry in models], narrow)
    every = [point for drawn in found.values() for line in drawn.values() for point in line]
    xs, ys = [x for x, _ in every], [y for _, y in every]
    for axis, (encoder, members) in zip(axes, groups.items(), strict=True):
        for entry in members:
            for which, dashes in zip(lines, ("-", "--"), strict=False):
                if line := found[entry][which]:
                    name = f"{entry.name}, {which}" if which else entry.name
                    look: Any = {"ls": dashes, "lw": 1.6, "marker": "." if text else "", "ms": 5}
                    axis.plot(*zip(*line, strict=True), color=entry.colour, label=name, **look)
        if text:
            style.log_axis(axis.yaxis, text, ys, narrow=True)
            style.length_axis(axis, xs, room)
            axis.set(xlabel="length of the audio (logarithmic)", ylabel=f"{label} (logarithmic)")
        else:
            axis.set(xlim=(0, max(*xs, 1) / (1 - room)), ylim=(0, max(ys) * 1.15))
            axis.set_xticks([tick for tick in range(0, 61, 15) if tick <= max(xs) + 1])
            axis.set(xlabel="minute of the stream", ylabel=label)
        axis.set_title(encoder)
        axis.grid(axis="y")
        axis.tick_params(labelleft=True, labelbottom=True)
    if len(lines) > 1:
        handles = [
            Line2D([], [], color=INK, ls=dashes, label=word)
            for dashes, word in zip(("-", "--"), lines.values(), strict=True)
        ]
        figure.legend(handles=handles, loc="outside upper left", ncols=1 if narrow else 2)
    style.lay_out(figure)
    for axis, members in zip(axes, groups.values(), strict=True):
        first = [(found[entry][next(iter(lines))], entry) for entry in members]
        ends = [(*line[-1], entry.short, entry.colour) for line, entry in first if line]
        style.label_ends(axis, ends)
    return figure


PLOTS: dict[str, Callable[[Sequence[Entry], bool], Figure | None]] = {
    "wer_cache": wer_against_cache,
    "cache_size": cache_size,
    "cache_growth": cache_growth,
    "cache_dtype": cache_dtypes,
    "inference_time": inference_time,
    "time_growth": time_growth,
    "hour": hour,
    "peak_memory": peak_memory,
    "memory_growth": memory_growth,
}
"""Name of a file, without suffix -> what draws it for (models, narrow); None: nothing to show."""
