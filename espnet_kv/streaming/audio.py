"""Audio as it arrives: from a file, or raw from a pipe."""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import numpy as np
import soundfile
import soxr

from espnet_kv.errors import UserError

FILE_PIECE_SECONDS = 0.2
# at most this much is taken from a pipe at once; what is there is taken, without waiting for more
PIPE_BYTES = 1 << 16
HEADERS = {b"RIFF": "WAV", b"fLaC": "FLAC", b"OggS": "Ogg"}


class FileSource:
    """Pieces of an audio file that libsndfile reads, channels averaged.

    Raises:
        UserError: the file is missing or no audio, here or while reading.
    """

    def __init__(self, path: Path | str):
        self._path = path
        if not Path(path).is_file():
            raise UserError(f"{path} does not exist")
        try:
            self._file = soundfile.SoundFile(path)
        except soundfile.LibsndfileError as error:
            raise UserError(f"{path} cannot be read as audio: {error}") from error
        self.rate = self._file.samplerate

    def read(self) -> np.ndarray:
        """The next samples, (N,) float32; none at the end."""
        try:
            piece = self._file.read(
                int(FILE_PIECE_SECONDS * self.rate) or 1, dtype="float32", always_2d=True
            )
        except soundfile.LibsndfileError as error:
            raise UserError(f"{self._path} cannot be read to its end: {error}") from error
        return piece.mean(axis=1)


class PipeSource:
    """Raw 16-bit little-endian mono samples from standard input, as they come.

    Raises:
        UserError: standard input is a terminal, or holds a file with a header.
    """

    def __init__(self, rate: int):
        if sys.stdin.isatty():
            raise UserError(
                "standard input is a terminal: pipe raw audio into it, e.g. "
                f"arecord -q -t raw -f S16_LE -c 1 -r {rate} | ..., or name a file"
            )
        self.rate = rate
        self._fd = sys.stdin.fileno()
        self._rest: bytes | None = None  # half a sample

    def read(self) -> np.ndarray:
        """The samples that are there, (N,) float32, at least one; none at the end."""
        first = self._rest is None
        data = self._rest or b""
        while len(data) < (4 if first else 2):
            more = os.read(self._fd, PIPE_BYTES)
            if not more:
                break
            data += more
        if first and data[:4] in HEADERS:
            raise UserError(
                f"standard input holds a {HEADERS[data[:4]]} file, not raw 16-bit samples: name "
                "the file instead"
            )
        whole = len(data) // 2 * 2
        self._rest = data[whole:]
        return np.frombuffer(data[:whole], "<i2").astype(np.float32) / 32768


class Stream:
    """The pieces of a source at the rate that a model takes.

    Ctrl-C ends the stream: at once where it waits for audio, else before the next piece, never
    within the work on one. A second Ctrl-C is Python's own.

    Args:
        source: FileSource or PipeSource.
        rate: samples per second of the pieces; what comes at another rate is resampled, without
            a seam between pieces.
    """

    def __init__(self, source: FileSource | PipeSource, rate: int):
        self._source = source
        self._resampler = None
        if source.rate != rate:
            self._resampler = soxr.ResampleStream(source.rate, rate, 1, dtype="float32")
        self.interrupted = False
        self._waiting = False

    def __iter__(self) -> Iterator[np.ndarray]:
        """(N,) float32 pieces, N >= 0, until the stream has ended."""
        self._before = signal.signal(signal.SIGINT, self._interrupt)
        try:
            while not self.interrupted and len(piece := self._read()):
                yield piece if self._resampler is None else self._resampler.resample_chunk(piece)
        finally:
            signal.signal(signal.SIGINT, self._before)
        if self._resampler is not None:
            yield self._resampler.resample_chunk(np.zeros(0, np.float32), last=True)

    def _read(self) -> np.ndarray:
        self._waiting = True
        try:
            return self._source.read()
        except KeyboardInterrupt:
            return np.zeros(0, np.float32)
        finally:
            self._waiting = False

    def _interrupt(self, signum: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, self._before)
        self.interrupted = True
        if self._waiting:
            raise KeyboardInterrupt
