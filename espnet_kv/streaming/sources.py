"""Streams of audio from a file, or raw from a pipe."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import numpy as np
import soundfile
import soxr

from espnet_kv.channels import channel_note, loud_channel
from espnet_kv.containers import container_of
from espnet_kv.errors import UserError, one_line
from espnet_kv.sound_files import CutShortError, blocks, join, open_sound, scale_of

FILE_PIECE_SECONDS = 0.2
# most bytes to read from a pipe at once; a read returns the available bytes without waiting
PIPE_BYTES = 1 << 16
START_BYTES = 16  # of a pipe, to know a container by


class FileSource:
    """Pieces of an audio file, converted to mono as in `to_mono` and scaled as in `scale_of`.

    Attributes:
        rate: samples per second.
        notes: notes on changes of the samples.

    Raises:
        UserError: the file is missing, not audio, or out of scale; also while reading.
    """

    def __init__(self, path: Path | str):
        self._path = path
        self.notes: list[str] = []
        self._channel: int | None = None
        self._divisor = 1.0
        sound = open_audio(path)
        self.rate = sound.samplerate
        if sound.channels > 1 or not sound.subtype.startswith("PCM"):
            self._look(sound)
            sound = open_audio(path)
        self._pieces = self._blocks(sound)

    def _look(self, sound: soundfile.SoundFile) -> None:
        """Find out from the whole file what to do with its samples, and close it."""
        peak, channels = 0.0, sound.channels

        def seen() -> Iterator[np.ndarray]:
            nonlocal peak
            for block in self._blocks(sound):
                if not np.isfinite(block).all():
                    raise UserError(f"{self._path} holds samples that are infinite or NaN")
                peak = max(peak, float(np.abs(block).max()))
                yield block

        self._channel = loud_channel(seen())
        if channels > 1:
            self.notes.append(
                f"{channels} channels averaged to mono"
                if self._channel is None
                else channel_note(self._channel, channels)
            )
        try:
            self._divisor, note = scale_of(peak)
        except ValueError as error:
            raise UserError(f"{self._path}: {error}") from error
        self.notes += [] if note is None else [note]

    def _blocks(self, sound: soundfile.SoundFile) -> Iterator[np.ndarray]:
        """The samples in pieces, (N, channels) float32 each."""
        with sound, _reading(self._path):
            yield from blocks(sound, int(FILE_PIECE_SECONDS * self.rate))

    def read(self) -> np.ndarray:
        """The next samples, (N,) float32; N = 0 at the end."""
        piece = next(self._pieces, None)
        if piece is None:
            return np.zeros(0, np.float32)
        piece = (piece / self._divisor).clip(-1, 1)
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
        while len(data) < (START_BYTES if first else 2):
            more = os.read(self._fd, PIPE_BYTES)
            if not more:
                break
            data += more
        if first and not data:
            raise UserError("standard input has no audio: it ended at once")
        if first and (kind := container_of(data)) is not None:
            raise UserError(
                f"standard input holds a {kind} file, not raw 16-bit samples: name the file instead"
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
    """Open an audio file (`sound_files.open_sound`).

    Raises:
        UserError: the file is missing, not audio, shorter than stated in its header, or in a format
            of which that cannot be said.
    """
    if Path(path).is_dir():
        raise UserError(f"{path} is a directory; name an audio file")
    if not Path(path).exists():
        raise UserError(f"{path} does not exist")
    if not os.access(path, os.R_OK):
        raise UserError(f"{path} cannot be read: change its permissions")
    with open(path, "rb") as file:
        try:
            return open_sound(file)
        except CutShortError:
            raise truncated(path) from None
        except ValueError as error:
            raise UserError(f"{path} cannot be read as audio: {reason(error)}") from error


def read_file(path: Path | str, dtype: str) -> tuple[np.ndarray, int]:
    """All samples (N, channels) of an audio file, and samples per second.

    Raises:
        UserError: see `open_audio`.
    """
    with open_audio(path) as sound, _reading(path):
        return join(blocks(sound, 1 << 20, dtype), sound), sound.samplerate


@contextmanager
def _reading(path: Path | str) -> Iterator[None]:
    """Context manager within which errors of `sound_files.blocks` name the file."""
    try:
        yield
    except CutShortError:
        raise truncated(path) from None
    except ValueError as error:
        raise UserError(f"{path} cannot be read to its end: {error}") from error


def truncated(path: Path | str) -> UserError:
    """The error for a truncated file."""
    return UserError(
        f"{path} is cut short: it has less audio than its header states; copy it again"
    )


def reason(error: Exception) -> str:
    """The message of an error of a reader, in one line."""
    return one_line(error) or type(error).__name__
