"""Transcribe a file, or raw audio from standard input as it arrives."""

import argparse
import json
import os
import signal
import sys
import time
import unicodedata
from collections.abc import Sequence
from typing import TextIO

from espnet_kv.bin.model_options import add_model_options, find_model
from espnet_kv.bin.streaming_options import add_live_options, build_recognizer
from espnet_kv.cli import HelpFormatter, command
from espnet_kv.errors import UserError
from espnet_kv.espnet.parser import Parser

REDRAW_SECONDS = 0.1
HIGHEST_RATE = 768_000


def get_parser() -> argparse.ArgumentParser:
    """The options of this command, with the names of asr_inference_streaming."""
    parser = Parser(
        prog="python -m espnet_kv.bin.stream",
        description="Transcribe an audio file, or raw 16-bit mono audio from standard input while "
        "it arrives. Final text goes to standard output, one line per segment. A terminal also "
        "shows the current words, the real-time factor and the cache size.",
        formatter_class=HelpFormatter,
    )
    add = parser.add_argument
    add("audio", help="A file, or - for standard input")
    add_model_options(add)
    add(
        "--format",
        choices=["text", "json"],
        default="text",
        help="json: one object per segment, with times in seconds and confidences of words and "
        "tokens",
    )
    add("--rate", type=int, help="Samples per second of standard input; default: the model's")
    add_live_options(parser)
    return parser


@command
def main(cmd: Sequence[str] | None = None) -> int:
    """Transcribe until the audio ends or Ctrl-C.

    Args:
        cmd: the options; None: sys.argv.

    Returns:
        Exit status: 0; 130 after Ctrl-C, 141 when standard output is closed.
    """
    return _transcribe(get_parser().parse_args(cmd))


def _transcribe(args: argparse.Namespace) -> int:
    import numpy as np

    from espnet_kv.streaming.frontend import TooShortError
    from espnet_kv.streaming.meter import Meter
    from espnet_kv.streaming.sources import FileSource, PipeSource, Stream

    if args.rate is not None and (args.audio != "-" or not 1 <= args.rate <= HIGHEST_RATE):
        raise UserError(
            f"--rate {args.rate}: from 1 to {HIGHEST_RATE}, and for standard input (-) only"
        )
    file = FileSource(args.audio) if args.audio != "-" else None  # before the model is loaded
    find_model(args)
    recognizer = build_recognizer(args)
    source = file or PipeSource(args.rate or recognizer.sample_rate)
    if not file and recognizer.left_chunks < 0:
        print(
            "note: --left_chunks -1: the left context is unbounded, so the cache may grow with the "
            "stream; give e.g. --left_chunks 4 to bound it",
            file=sys.stderr,
        )
    for note in file.notes if file else ():
        print(f"note: {args.audio}: {note}", file=sys.stderr)
    if source.rate != recognizer.sample_rate:
        print(
            f"note: {source.rate} samples per second are resampled to the "
            f"{recognizer.sample_rate} of the model",
            file=sys.stderr,
        )
    stream, meter = Stream(source, recognizer.sample_rate), Meter(recognizer)
    with Display(meter, args.format) as display:
        for piece in stream:
            display.show(meter.accept(piece))
        try:
            display.show(meter.accept(np.zeros(0, np.float32), is_final=True))
        except TooShortError:
            if not stream.interrupted:
                raise
    return 128 + signal.SIGINT if stream.interrupted else 0


class Display:
    """Prints final segments on standard output, and the open one and the meter on a terminal."""

    def __init__(self, meter, form: str) -> None:
        self._meter, self._form = meter, form
        terminals = [stream for stream in (sys.stderr, sys.stdout) if stream.isatty()]
        self._live: TextIO | None = terminals[0] if terminals else None
        self._text, self._drawn = "", 0.0  # text on the terminal, and the time it was drawn

    def __enter__(self) -> "Display":
        return self

    def __exit__(self, *exception) -> None:
        self._erase()
        if exception[0] is None:
            print(self._meter.summary(), file=sys.stderr)

    def show(self, segments: list) -> None:
        """Print the segments that ended, and draw the open one."""
        for result, *_ in segments:
            self._erase()
            if self._form == "json":
                print(json.dumps(result.as_dict(), ensure_ascii=False), flush=True)
            else:
                print(_text(result), flush=True)
        if self._live is not None:
            text = _text(self._meter.recognizer.partial)
            if segments or text != self._text or time.monotonic() - self._drawn >= REDRAW_SECONDS:
                self._text, self._drawn = text, time.monotonic()
                self._draw(text)

    def _draw(self, text: str) -> None:
        assert self._live is not None
        meter = self._meter
        head = ""
        if self._live is sys.stderr:
            head = (
                f"[{meter.audio_seconds:.1f} s, RTF {meter.real_time_factor:.2f}, "
                f"cache {meter.cache_nbytes / 1000:.1f} kB] "
            )
        # the size of a terminal is 0 if it was never set
        width = (os.get_terminal_size(self._live.fileno()).columns or 80) - 1
        line = (head + _tail(text, width - len(head)))[:width]
        print(f"\r\x1b[K{line}", end="", file=self._live, flush=True)

    def _erase(self) -> None:
        if self._live is not None:
            print("\r\x1b[K", end="", file=self._live, flush=True)


def _text(result) -> str:
    return " ".join(result.token) if result.text is None else result.text


def _tail(text: str, width: int) -> str:
    """The longest end of `text` that fits in `width` columns of a terminal."""
    columns = 0
    for n, character in enumerate(reversed(text)):
        columns += 2 if unicodedata.east_asian_width(character) in "WF" else 1
        if columns > width:
            return text[len(text) - n :]
    return text


if __name__ == "__main__":
    sys.exit(main())
