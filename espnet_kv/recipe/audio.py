"""Reading of wav.scp entries (files, ark entries, pipes) as mono float32 samples."""

import hashlib
import io
import math
import os
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import numpy as np

from espnet_kv.channels import to_mono
from espnet_kv.sound_files import RATES, in_scale, read_sound

OVERSHOOT = 0.5
"""Seconds by which a segment may end after its recording, as in Kaldi."""


class AudioError(Exception):
    """The audio of one utterance cannot be used; the message is the reason."""


@dataclass(frozen=True)
class Audio:
    """Mono samples (T,) in float32, and notes on conversions."""

    samples: np.ndarray
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Recording:
    """A decoded wav.scp entry: mono samples (T,) in float32 within [-1, 1], rate in Hz."""

    samples: np.ndarray
    rate: int
    notes: tuple[str, ...] = ()

    def cut(self, start: float, end: float | None) -> "Recording":
        """The part from `start` to `end` in seconds (None: to the end of the recording).

        Raises:
            AudioError: the part is empty, or ends more than OVERSHOOT after the recording.
        """
        seconds = len(self.samples) / self.rate
        if start >= seconds or (end is not None and end > seconds + OVERSHOOT):
            bad = f"starts at {start:g} s" if start >= seconds else f"ends at {end:g} s"
            raise AudioError(f"the segment {bad}, but the recording lasts {seconds:.2f} s")
        stop = None if end is None else round(end * self.rate)
        samples = self.samples[round(start * self.rate) : stop]
        if len(samples) == 0:
            raise AudioError(f"the segment from {start:g} s holds no sample")
        return Recording(samples, self.rate, self.notes)

    def at(self, fs: int) -> Audio:
        """The samples at `fs` Hz."""
        if self.rate == fs:
            return Audio(self.samples, self.notes)
        note = f"resampled from {self.rate} Hz to {fs} Hz"
        return Audio(resample(self.samples, self.rate, fs), (*self.notes, note))


def read_recording(entry: str, *, allow_pipes: bool = False) -> Recording:
    """Read one wav.scp entry: an audio file, `file.ark:offset`, or a command that ends in `|`.

    Channels are mixed (`to_mono`). Float audio in the scale of 16-bit integers is divided by 32768.
    Both add a note.

    Args:
        allow_pipes: run commands; otherwise a command is an AudioError.

    Raises:
        AudioError: the audio is missing, in an unknown format, corrupt, cut short, empty or
            out of scale, or its command fails.
    """
    samples, rate = _decode(entry, allow_pipes)
    try:
        samples, scaled = in_scale(samples)
    except ValueError as error:
        raise AudioError(f"audio out of scale: {entry}: {error}") from None
    mono, mixed = to_mono(samples)
    return Recording(mono, rate, tuple(note for note in (scaled, mixed) if note is not None))


def read_audio(entry: str, *, allow_pipes: bool = False) -> tuple[np.ndarray, int]:
    """Samples (T,) of one wav.scp entry in float32 within [-1, 1], and the rate in Hz.

    Raises:
        AudioError: as `read_recording`.
    """
    recording = read_recording(entry, allow_pipes=allow_pipes)
    return recording.samples, recording.rate


def read_audio_at(entry: str, fs: int, *, allow_pipes: bool = False) -> Audio:
    """Read one wav.scp entry as mono audio at `fs` Hz, with notes on conversions.

    Raises:
        AudioError: as `read_recording`.
    """
    return read_recording(entry, allow_pipes=allow_pipes).at(fs)


def resample(samples: np.ndarray, rate: int, fs: int) -> np.ndarray:
    """Samples (T,) at `rate` Hz -> samples (ceil(T fs / rate),) at `fs` Hz."""
    common = math.gcd(rate, fs)
    if (rate // common) * (fs // common) > 4_000_000:
        # torchaudio stores a filter for every pair of phases: gigabytes for 44101 Hz.
        from scipy.signal import resample_poly

        return resample_poly(samples, fs // common, rate // common).astype(np.float32)
    import torch
    from torchaudio.functional import resample as sinc_resample

    # One thread: the last bit depends on the number of threads, and the processes of
    # parallel_map use all cores already.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return sinc_resample(torch.from_numpy(samples), rate, fs).numpy()
    finally:
        torch.set_num_threads(threads)


def to_int16(samples: np.ndarray) -> np.ndarray:
    """Float samples within [-1, 1] -> int16; lossless for audio read from 16 bits."""
    return np.clip(np.rint(samples * 32768.0), -32768, 32767).astype(np.int16)


def audio_file(utt: str, suffix: str) -> str:
    """A file name for any utterance id, with special characters quoted and limited length."""
    name = quote(utt, safe="")
    if len(name) > 200:
        name = f"{name[:100]}-{hashlib.sha256(utt.encode()).hexdigest()}"
    return f"{name}.{suffix}"


def file_of(entry: str) -> str | None:
    """The file of a wav.scp entry, which may be `file.ark:offset`; None: a command."""
    if entry.rstrip().endswith("|"):
        return None
    path, _, offset = entry.rpartition(":")
    return path if path and offset.isdigit() and not os.path.exists(entry) else entry


def _decode(entry: str, allow_pipes: bool) -> tuple[np.ndarray, int]:
    """Samples (T, channels) in float32, and their rate."""
    path = file_of(entry)
    try:
        if path is None:
            if not allow_pipes:
                raise AudioError(f"{entry} is a command, and commands are not allowed to run here")
            samples, rate = read_sound(io.BytesIO(_output(entry.rstrip().rstrip("|"))))
        else:
            _check_file(path)
            if path != entry:
                samples, rate = _decode_ark(path, int(entry.rpartition(":")[2]))
            else:
                with open(path, "rb") as file:
                    samples, rate = read_sound(file)
    except AudioError:
        raise
    except PermissionError:
        raise AudioError(f"no permission to read {path}") from None
    except Exception as error:  # a damaged header can cause any exception
        why = " ".join(str(error).split())
        raise AudioError(f"corrupt audio: {entry}: {why or type(error).__name__}") from error
    if len(samples) == 0:
        raise AudioError(f"empty audio: {entry}")
    if not np.isfinite(samples).all():
        raise AudioError(f"corrupt audio: {entry}: samples are not finite")
    if not RATES[0] <= rate <= RATES[1]:
        raise AudioError(f"corrupt audio: {entry}: the header states {rate} samples a second")
    return samples, rate


def _check_file(path: str) -> None:
    if os.path.islink(path) and not os.path.exists(path):
        raise AudioError(f"missing file: {path} is a link to {os.readlink(path)}")
    if not os.path.exists(path):
        raise AudioError(f"missing file: {path}")
    if not os.path.isfile(path):
        kind = "a directory" if os.path.isdir(path) else "no regular file"
        raise AudioError(f"no audio file: {path} is {kind}")
    if os.path.getsize(path) == 0:
        raise AudioError(f"corrupt audio: {path}: the file has no content")


def _output(command: str) -> bytes:
    """The output of a command in wav.scp, run by bash."""
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
    )
    if done.returncode:
        message = " ".join(done.stderr.decode(errors="replace").split())[-300:]
        raise AudioError(
            f"command failed with status {done.returncode}: {command.strip()}: "
            f"{message or 'it wrote no message'}"
        )
    if not done.stdout:
        raise AudioError(f"empty audio: the command wrote nothing: {command.strip()}")
    return done.stdout


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a new path of the same suffix, whose file becomes `path` in one step.

    A cluster may have a second worker write the same file, where the first one does not answer.
    `remove_unfinished` takes away what a worker that was killed left behind.
    """
    partial = path.with_name(f"{_UNFINISHED}{uuid.uuid4().hex}{path.suffix}")
    yield partial
    os.replace(partial, path)


def write_audio(path: Path, samples: np.ndarray, rate: int) -> None:
    """Write 16-bit samples (T,) to a file in one step, in the format of its suffix."""
    import soundfile

    with replacing(path) as partial:
        soundfile.write(partial, samples, rate, subtype="PCM_16")


def remove_unfinished(folder: Path) -> None:
    """Remove from `folder` and those below it what `replacing` has not ended."""
    for partial in folder.rglob(f"{_UNFINISHED}*"):
        partial.unlink(missing_ok=True)


_UNFINISHED = ".unfinished-"


def _decode_ark(path: str, offset: int) -> tuple[np.ndarray, int]:
    import kaldiio

    with open(path, "rb") as file:
        if offset >= file.seek(0, os.SEEK_END):
            raise AudioError(f"corrupt audio: {path}:{offset}: the file ends before this offset")
        file.seek(offset)
        magic = file.read(5)
        if magic[:3] == b"PKL":  # kaldiio would run code in it
            raise AudioError(
                f"corrupt audio: {path}:{offset} is a Python pickle, which is not read"
            )
        if magic == b"AUDIO":
            length = int.from_bytes(file.read(file.read(1)[0]), "little")
            return read_sound(io.BytesIO(file.read(length)))
        if magic[:4] in (b"RIFF", b"fLaC"):
            file.seek(offset)
            # The size in a wav header; 0 or very large: everything up to the end.
            size = int.from_bytes((head := file.read(8))[4:], "little") if magic[:1] == b"R" else 0
            return read_sound(io.BytesIO(head + file.read(size or -1)))
    rate, samples = kaldiio.load_mat(f"{path}:{offset}")
    if np.issubdtype(samples.dtype, np.integer):
        samples = samples / -float(np.iinfo(samples.dtype).min)
    return samples.astype(np.float32).reshape(len(samples), -1), rate
