"""Figures with a row for each model: cache size, inference time, peak memory, cache_dtype."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.legend_handler import HandlerTuple
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from espnet_kv.report.looks import (
    CONV,
    GRID,
    INPUT,
    MUTED,
    Entry,
    fine_ticks,
    lay_out,
    log_axis,
    milliseconds,
    on_ticks,
    panels,
    size,
)
from espnet_kv.report.profiles import Spread

Bars = Sequence[tuple[Entry, float, float | None]]
"""Model, length of its bar, reach of the thin line on it."""


def cache_size(entries: Sequence[Entry], narrow: bool = False) -> Figure | None:
    """What is allocated for a stream: attention, convolution and input, stacked."""
    shown = [(entry, kinds) for entry in entries if (kinds := entry.profile.allocated())]
    if not shown:
        return None
    figure, (axis,), rows = _rows([entry for entry, _ in shown], 1, narrow)
    left = [0.0] * len(shown)
    colours = [[entry.colour for entry, _ in shown], [CONV] * len(shown), [INPUT] * len(shown)]
    for kind, colour in zip(("attention", "conv", "input"), colours, strict=True):
        values = [float(getattr(kinds, kind)) for _, kinds in shown]
        axis.barh(rows, values, height=0.62, left=left, color=colour, label=kind)
        left = [a + b for a, b in zip(left, values, strict=True)]
    for row, (entry, kinds) in zip(rows, shown, strict=True):
        text = f"{size(kinds.attention)} of {size(kinds.total)}"
        held = entry.profile.held()
        if held and not narrow:
            text += f"; held {size(held.attention)}"
        _beside(axis, kinds.total, row, text)
    _value_axis(axis, max(kinds.total for _, kinds in shown), size, room=0.45)
    axis.set_xlabel("allocated for one stream, attention first")
    colours_used = dict.fromkeys(entry.colour for entry, _ in shown)
    attention: Any = tuple(Patch(color=colour) for colour in colours_used)
    figure.legend(
        [attention, Patch(color=CONV), Patch(color=INPUT)],
        ["attention", "convolution", "input"],
        loc="outside upper left",
        handler_map={tuple: HandlerTuple(ndivide=None, pad=0.2)},
        ncols=3,
    )
    lay_out(figure)
    return figure


def inference_time(entries: Sequence[Entry], narrow: bool = False) -> Figure | None:
    """Median and 95th percentile of a chunk, of an utterance, and of the first token."""
    parts: dict[str, Callable[[Entry], Spread]] = {
        "one chunk, streamed": lambda e: e.profile.time.chunk_ms,
        "whole utterance, offline": lambda e: e.profile.time.utterance_ms,
        "first token": lambda e: e.profile.time.first_token_ms,
    }
    shown = {
        title: values
        for title, part in parts.items()
        if (values := [(e, part(e)) for e in entries if part(e).p50 is not None])
    }
    return _measured(
        {
            title: [(entry, spread.p50 or 0.0, spread.p95) for entry, spread in values]
            for title, values in shown.items()
        },
        milliseconds,
        narrow,
        "median; the thin line reaches the 95th percentile",
    )


def peak_memory(entries: Sequence[Entry], narrow: bool = False) -> Figure | None:
    """Peak over what the loaded model holds by itself, at the longest audio."""
    parts: dict[str, Callable[[Entry], int | None]] = {
        "streaming": lambda e: e.profile.memory.streaming_bytes,
        "whole utterance, offline": lambda e: e.profile.memory.offline_bytes,
    }
    shown: dict[str, Bars] = {
        title: values
        for title, part in parts.items()
        if (values := [(e, float(v), None) for e in entries if (v := part(e)) is not None])
    }
    return _measured(shown, size, narrow, "peak over the loaded model's own")


def cache_dtypes(entries: Sequence[Entry], narrow: bool = False) -> Figure | None:
    """The attention cache in each cache_dtype, allocated, on a logarithmic axis."""
    shown = [
        (entry, sizes)
        for entry in entries
        if len(
            sizes := {
                dtype: kinds.attention
                for dtype in entry.profile.cache
                if (kinds := entry.profile.allocated(dtype)) and kinds.attention
            }
        )
        > 1
    ]
    if not shown:
        return None
    figure, (axis,), rows = _rows([entry for entry, _ in shown], 1, narrow, 0.44)
    for row, (entry, sizes) in zip(rows, shown, strict=True):
        axis.plot(list(sizes.values()), [row] * len(sizes), color=entry.colour, lw=1.5, zorder=1)
        axis.plot(
            list(sizes.values()),
            [row] * len(sizes),
            "o",
            color=entry.colour,
            ms=6,
            label=entry.name,
        )
        together: dict[int, list[str]] = {}
        for dtype, value in sizes.items():
            together.setdefault(value, []).append(dtype)
        for value, dtypes in together.items():
            axis.annotate(
                " ".join(dtypes),
                (value, row),
                xytext=(0, 5),
                textcoords="offset points",
                ha="center",
                fontsize=7.5,
            )
    values = [value for _, sizes in shown for value in sizes.values()]
    log_axis(axis.xaxis, size, fine_ticks(values, narrow))
    axis.set_xlim(min(values) / 1.5, max(values) * 1.5)
    axis.grid(axis="x")
    axis.set_xlabel("cache of one stream, allocated (logarithmic)")
    lay_out(figure)
    return figure


def _measured(
    shown: Mapping[str, Bars],
    written: Callable[[float], str],
    narrow: bool,
    label: str,
) -> Figure | None:
    """A panel for each title: a bar for each (model, value, reach of its thin line or None)."""
    if not shown:
        return None
    entries = list(dict.fromkeys(entry for values in shown.values() for entry, *_ in values))
    figure, axes, places = _rows(entries, len(shown), narrow)
    room = 0.3 if narrow else 0.16 * (1 + len(axes))  # for the values beside the bars
    row_of = dict(zip(entries, places, strict=True))
    for axis, (title, values) in zip(axes, shown.items(), strict=True):
        rows = [row_of[entry] for entry, *_ in values]
        colours = [entry.colour for entry, *_ in values]
        axis.barh(rows, [value for _, value, _ in values], height=0.62, color=colours)
        for row, (_, value, reach) in zip(rows, values, strict=True):
            if reach is not None:
                axis.plot([value, max(value, reach)], [row, row], color=MUTED, lw=1.2)
            _beside(axis, max(value, reach or 0.0), row, written(value))
        _value_axis(axis, max(max(v, r or 0.0) for _, v, r in values), written, room=room)
        axis.set_title(title)
    figure.supxlabel(label, fontsize=9)
    lay_out(figure)
    return figure


def _rows(
    entries: Sequence[Entry], count: int, narrow: bool, height: float = 0.3
) -> tuple[Figure, list[Axes], list[float]]:
    """Panels with a named row for each model, encoders a little apart."""
    rows, place = [], 0.0
    for n, entry in enumerate(entries):
        place += 0.0 if n == 0 else 1.0 if entry.encoder == entries[n - 1].encoder else 1.5
        rows.append(place)
    tall = 1.1 + (height + 0.14 * narrow) * (place + 1)
    figure, axes = panels(count, narrow, tall, columns=count, sharey=True)
    axes[0].set_ylim(place + 0.7, -0.7)
    for axis in axes:
        if narrow:  # names stand above their bars
            axis.set_yticks([])
            for row, entry in zip(rows, entries, strict=True):
                axis.text(
                    0.0,
                    row - 0.33,
                    entry.name,
                    fontsize=8,
                    va="bottom",
                    transform=axis.get_yaxis_transform(),
                )
        else:
            axis.set_yticks(rows, [entry.name for entry in entries])
        axis.tick_params(axis="y", length=0)
        axis.spines["left"].set_visible(False)
    return figure, axes, rows


def _beside(axis: Axes, value: float, row: float, text: str) -> None:
    axis.annotate(
        text, (value, row), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8
    )


def _value_axis(axis: Axes, largest: float, written: Callable[[float], str], room: float) -> None:
    axis.set_xlim(0, (largest or 1.0) * (1 + room))
    axis.xaxis.set_major_locator(MaxNLocator(3))
    axis.xaxis.set_major_formatter(on_ticks(written))
    axis.grid(axis="x", color=GRID)
