"""Streams of audio from a file, or raw from a pipe."""

import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import numpy as np
import soundfile
import soxr

from espnet_kv.channels import channel_note, loud_channel
from espnet_kv.errors import UserError, one_line

FILE_PIECE_SECONDS = 0.2
# most bytes to read from a pipe at once; a read returns the available bytes without waiting
PIPE_BYTES = 1 << 16
HEADERS = {b"RIFF": "WAV", b"fLaC": "FLAC", b"OggS": "Ogg"}
# in libsndfile's log of a header: bytes of audio in the header, and in the file
PROMISED = re.compile(
    r"^ *(?:data|SSND|Data Size|riff|Riff size) *: (\d+) \(should be (\d+)\)", re.M
)
# programs that write into a pipe put about 2 or 4 GiB for the unknown size
UNKNOWN_BYTES = 0x7FFF0000


class FileSource:
    """Pieces of an audio file, converted to mono as in `to_mono`.

    Attributes:
        rate: samples per second.
        notes: notes on the conversion to mono.

    Raises:
        UserError: the file is missing or not audio; also while reading.
    """

    def __init__(self, path: Path | str):
        self._path = path
        self._file = open_audio(path)
        self._frames = 0
        self.rate = self._file.samplerate
        self.notes: list[str] = []
        self._channel = None
        if (channels := self._file.channels) > 1:
            self._channel = loud_channel(self._blocks())
            self._file.seek(0)
            self.notes.append(
                f"{channels} channels averaged to mono"
                if self._channel is None
                else channel_note(self._channel, channels)
            )

    def _blocks(self) -> Iterator[np.ndarray]:
        """The rest of the file in pieces, (N, channels) float32 each."""
        while len(piece := self._read()):
            yield piece

    def _read(self) -> np.ndarray:
        try:
            return self._file.read(
                int(FILE_PIECE_SECONDS * self.rate) or 1, dtype="float32", always_2d=True
            )
        except soundfile.LibsndfileError as error:
            raise UserError(f"{self._path} cannot be read to its end: {reason(error)}") from error

    def read(self) -> np.ndarray:
        """The next samples, (N,) float32; N = 0 at the end."""
        piece = self._read()
        self._frames += len(piece)
        if not len(piece) and self._frames < self._file.frames:
            raise truncated(self._path)
        return piece.mean(axis=1) if self._channel is None else piece[:, self._channel]


class PipeSource:
    """Raw 16-bit little-endian mono samples from standard input.

    Raises:
        UserError: standard input is a terminal, or a file with a header.
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
        """Wait for samples and return those available, (N,) float32; N = 0 at the end."""
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
    """The pieces of a source at the sampling rate of a model.

    Ctrl-C ends the stream at once while it waits for audio, else before the next piece. A second
    Ctrl-C raises KeyboardInterrupt as usual.

    Args:
        source: FileSource or PipeSource.
        rate: samples per second of the pieces; audio of another rate is resampled continuously.
    """

    def __init__(self, source: FileSource | PipeSource, rate: int):
        self._source = source
        self._resampler = None
        if source.rate != rate:
            self._resampler = soxr.ResampleStream(source.rate, rate, 1, dtype="float32")
        self.interrupted = False
        self._waiting = False

    def __iter__(self) -> Iterator[np.ndarray]:
        """Yield (N,) float32 pieces, N >= 0, until the stream has ended."""
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


def open_audio(path: Path | str) -> soundfile.SoundFile:
    """Open an audio file that libsndfile reads.

    Raises:
        UserError: the file is missing, not audio, or shorter than stated in its header.
    """
    if Path(path).is_dir():
        raise UserError(f"{path} is a directory; name an audio file")
    if not Path(path).exists():
        raise UserError(f"{path} does not exist")
    if not os.access(path, os.R_OK):
        raise UserError(f"{path} cannot be read: change its permissions")
    try:
        file = soundfile.SoundFile(path)
    except soundfile.LibsndfileError as error:
        raise UserError(f"{path} cannot be read as audio: {reason(error)}") from error
    for promised, there in PROMISED.findall(file.extra_info):
        if int(there) < int(promised) < UNKNOWN_BYTES:
            raise truncated(path)
    if file.format == "OGG" and not _has_last_page(path):
        raise truncated(path)
    return file


def _has_last_page(path: Path | str) -> bool:
    """Whether the last page of an Ogg file is marked as last; a page has at most 64 KiB."""
    with open(path, "rb") as file:
        file.seek(max(0, os.path.getsize(path) - (1 << 17)))
        tail = file.read()
    page = tail.rfind(b"OggS")
    return page >= 0 and len(tail) > page + 5 and bool(tail[page + 5] & 4)


def truncated(path: Path | str) -> UserError:
    """The error for a truncated file."""
    return UserError(
        f"{path} is cut short: it has less audio than its header states; copy it again"
    )


def reason(error: Exception) -> str:
    """The message of an error of a reader, in one line."""
    return one_line(error) or type(error).__name__
