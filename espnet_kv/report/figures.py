"""The figures of a report: what there is, saving them, and putting them into a page."""

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from espnet_kv.files import new_file
from espnet_kv.report import bars, curves, scatter
from espnet_kv.report.looks import GRID, INK, MUTED, PAPER, Entry, style


@dataclass(frozen=True)
class Plot:
    """A kind of figure.

    stem: its file name without suffix.
    about: what it shows, as its caption.
    columns: where their keys start so, they hold the numbers that it shows.
    draw: models, narrow -> the figure, or None where no model has what it shows.
    """

    stem: str
    title: str
    about: str
    columns: tuple[str, ...]
    draw: Callable[[Sequence[Entry], bool], Figure | None]


PLOTS = (
    Plot(
        "wer_cache",
        "Word error rate against cache size",
        "Cache: bytes allocated for the attention of one stream. "
        "Below and to the left is better; the dashed line joins the models that no other beats in "
        "both. Colour is attention, marker is encoder.",
        ("cache_attention_allocated", "wer_"),
        scatter.wer_against_cache,
    ),
    Plot(
        "cache_size",
        "Cache size",
        "Bytes allocated for one stream at the longest audio, bounded by left_chunks; held are "
        "those of the frames that may still be attended to.",
        ("cache_attention_allocated", "cache_conv", "cache_input"),
        bars.cache_size,
    ),
    Plot(
        "cache_growth",
        "Cache over the length of the audio",
        "Bytes allocated for attention, with left context bounded by left_chunks and without "
        "bound: unbounded storage doubles as it fills.",
        ("cache_attention_allocated", "unbounded_allocated", "bytes_per_second"),
        curves.cache_growth,
    ),
    Plot(
        "cache_dtype",
        "Cache in fewer bits",
        "Bytes allocated for attention in each cache_dtype; scales of int8 and int4 count.",
        ("cache_attention_allocated",),
        bars.cache_dtypes,
    ),
    Plot(
        "inference_time",
        "Inference time",
        "First token: from the first sample, the audio that it has to wait for included.",
        ("chunk_ms_p", "utterance_ms_p", "first_token_ms_p"),
        bars.inference_time,
    ),
    Plot(
        "time_growth",
        "Time over the length of the audio",
        "Time of the encoder for a whole utterance.",
        ("rtf",),
        curves.time_growth,
    ),
    Plot(
        "hour",
        "An hour of audio in one stream",
        "Median time of a chunk in each minute.",
        ("chunk_ms_p50",),
        curves.hour,
    ),
    Plot(
        "peak_memory",
        "Peak memory",
        "At the longest audio, over what the loaded model holds by itself.",
        ("streaming_bytes", "offline_bytes"),
        bars.peak_memory,
    ),
    Plot(
        "memory_growth",
        "Memory over the length of the audio",
        "Peaks over what the loaded model holds by itself.",
        ("streaming_bytes", "offline_bytes"),
        curves.memory_growth,
    ),
)


def save(figure: Figure, stem: Path) -> list[Path]:
    """Write `figure` as stem.png and stem.svg, each in one step; the same figure, the same file."""
    paths = [stem.with_name(f"{stem.name}{suffix}") for suffix in (".png", ".svg")]
    for path in paths:
        with style(), matplotlib.rc_context({"svg.hashsalt": stem.name}), new_file(path) as partial:
            metadata = {"Date": None} if path.suffix == ".svg" else {"Software": None}
            figure.savefig(partial, dpi=180, metadata=metadata)
    return paths


def inline_svg(figure: Figure, prefix: str) -> str:
    """`figure` as an <svg> element whose neutral colours and fonts are the page's.

    Args:
        prefix: stands before every id, so that two figures in a page do not share one.
    """
    text = io.StringIO()
    with style(), matplotlib.rc_context({"svg.hashsalt": prefix}):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}-", svg)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg)
    svg = svg.replace("xlink:href", "href")
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r"'DejaVu Sans'[^;\"]*", "sans-serif", svg)
    for colour, name in ((INK, "ink"), (MUTED, "muted"), (GRID, "grid"), (PAPER, "paper")):
        svg = svg.replace(colour, f"var(--{name})")
    return svg.strip()
