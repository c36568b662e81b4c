"""Figures with a line for each model: cache, time and memory over the length of the audio."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from espnet_kv.report.labels import label_ends, room_for
from espnet_kv.report.looks import (
    INK,
    Entry,
    by_encoder,
    fine_ticks,
    lay_out,
    length_axis,
    log_axis,
    milliseconds,
    panels,
    size,
)

Points = list[tuple[float, float]]


def cache_growth(entries: Sequence[Entry], narrow: bool = False) -> Figure | None:
    """Bytes allocated for attention over seconds of audio: bounded by left_chunks, or unbounded."""

    def points(entry: Entry, side: str) -> Points:
        cache = entry.profile.own_cache
        return [
            (length.seconds, held.allocated.attention)
            for length in sorted(cache.lengths if cache else (), key=lambda length: length.seconds)
            if (held := getattr(length, side)) and held.allocated and held.allocated.attention
        ]

    sides = {"unbounded": "sees all that came before", "bounded": "bounded by left_chunks"}
    return _by_encoder(entries, narrow, sides, points, size, "cache, allocated")


def time_growth(entries: Sequence[Entry], narrow: bool = False) -> Figure | None:
    """ms that the encoder takes for a whole utterance, over its length."""

    def points(entry: Entry, _: str) -> Points:
        return sorted(
            (length.seconds, length.encode_ms)
            for length in entry.profile.time.lengths
            if length.encode_ms
        )

    return _by_encoder(entries, narrow, {"": ""}, points, milliseconds, "whole utterance")


def memory_growth(entries: Sequence[Entry], narrow: bool = False) -> Figure | None:
    """Peak bytes of a whole utterance and of a stream, over the length of the audio."""

    def points(entry: Entry, mode: str) -> Points:
        found = [(m.seconds, getattr(m, f"{mode}_bytes")) for m in entry.profile.memory.lengths]
        return sorted((seconds, value) for seconds, value in found if value)

    modes = {"offline": "whole utterance", "streaming": "streamed"}
    return _by_encoder(entries, narrow, modes, points, size, "peak memory")


def hour(entries: Sequence[Entry], narrow: bool = False) -> Figure | None:
    """Median ms of a chunk in each minute of an hour of audio."""
    groups = by_encoder([entry for entry in entries if entry.profile.time.hour])
    if not groups:
        return None
    figure, axes = panels(len(groups), narrow, 3.0, sharex=True, sharey=True)
    every = [minute for entry in entries for minute in entry.profile.time.hour]
    last = max(minute.minute for minute in every)
    room = room_for([entry.short for entry in entries], narrow)
    ends = []
    for axis, (encoder, members) in zip(axes, groups.items(), strict=True):
        lines = {
            entry: sorted((float(m.minute), m.chunk_ms) for m in entry.profile.time.hour)
            for entry in members
        }
        for entry, points in lines.items():
            _line(axis, points, color=entry.colour, lw=1.4, label=entry.name)
        ends.append(_ends(lines))
        axis.set_xlim(0, max(last, 1) / (1 - room))
        axis.set_ylim(0, max(minute.chunk_ms for minute in every) * 1.15)
        axis.set_xticks([tick for tick in range(0, 61, 15) if tick <= last + 1])
        _finish(axis, encoder, "minute of the stream", "a chunk, median (ms)")
    lay_out(figure)
    for axis, named in zip(axes, ends, strict=True):
        label_ends(axis, named)
    return figure


def _by_encoder(
    entries: Sequence[Entry],
    narrow: bool,
    lines: Mapping[str, str],
    points: Callable[[Entry, str], Points],
    written: Callable[[float], str],
    label: str,
) -> Figure | None:
    """A panel for each encoder, both axes logarithmic.

    Args:
        lines: what `points` gives for a model -> the legend's word for it. The first line of
            each model is drawn through and named, the second is dashed.
    """
    found = {entry: {which: points(entry, which) for which in lines} for entry in entries}
    groups = by_encoder([entry for entry, drawn in found.items() if any(drawn.values())])
    if not groups:
        return None
    figure, axes = panels(len(groups), narrow, 3.2, sharex=True, sharey=True)
    room = room_for([entry.short for entry in found], narrow)
    every = [point for drawn in found.values() for line in drawn.values() for point in line]
    first, ends = next(iter(lines)), []
    for axis, (encoder, members) in zip(axes, groups.items(), strict=True):
        for entry in members:
            for which, dashes in zip(lines, ("-", "--"), strict=False):
                name = f"{entry.name}, {which}" if which else entry.name
                look = {"ls": dashes, "lw": 1.6, "marker": ".", "ms": 5}
                _line(axis, found[entry][which], color=entry.colour, label=name, **look)
        ends.append(_ends({entry: found[entry][first] for entry in members}))
        log_axis(axis.yaxis, written, fine_ticks([y for _, y in every]))
        length_axis(axis, [x for x, _ in every], room)
        _finish(axis, encoder, "length of the audio (logarithmic)", f"{label} (logarithmic)")
    if len(lines) > 1:
        handles = [
            Line2D([], [], color=INK, ls=dashes, label=word)
            for dashes, word in zip(("-", "--"), lines.values(), strict=True)
        ]
        figure.legend(handles=handles, loc="outside upper left", ncols=1 if narrow else 2)
    lay_out(figure)
    for axis, named in zip(axes, ends, strict=True):
        label_ends(axis, named)
    return figure


def _line(axis: Axes, points: Points, **look: Any) -> None:
    if points:
        axis.plot([x for x, _ in points], [y for _, y in points], **look)


def _ends(lines: dict[Entry, Points]) -> list[tuple[float, float, str, str]]:
    """What stands beside the end of each line, in the terms of `label_ends`."""
    return [(*points[-1], entry.short, entry.colour) for entry, points in lines.items() if points]


def _finish(axis: Axes, encoder: str, x: str, y: str) -> None:
    axis.set_title(encoder)
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.grid(axis="y")
    axis.tick_params(labelleft=True, labelbottom=True)
