"""Reading audio: any file or ark entry of a wav.scp becomes mono float32 samples."""

import contextlib
import os
import re
import wave
from dataclasses import dataclass

import numpy as np

from espnet_kv.recipe.pool import parallel_map as parallel_map


class AudioError(Exception):
    """Why the audio of one utterance cannot be used, in a few words."""


@dataclass(frozen=True)
class Audio:
    """Mono samples (T,) in float32 and what had to be changed to get them."""

    samples: np.ndarray
    notes: tuple[str, ...] = ()


def read_audio(entry: str) -> tuple[np.ndarray, int]:
    """Read one wav.scp entry: a flac or wav file, or `file.ark:offset`.

    Returns the samples (T,) in float32 within [-1, 1], channels averaged, and the rate in Hz.

    Raises:
        AudioError: the file is missing, corrupt, cut short or holds no samples.
    """
    samples, rate = _decode(entry)
    return samples.mean(axis=1), rate


def read_audio_at(entry: str, fs: int) -> Audio:
    """Read one wav.scp entry as mono audio at `fs` Hz, noting what had to be converted.

    Raises:
        AudioError: as `read_audio`.
    """
    samples, rate = _decode(entry)
    notes = []
    if samples.shape[1] > 1:
        notes.append(f"{samples.shape[1]} channels averaged to mono")
    mono = samples.mean(axis=1)
    if rate != fs:
        notes.append(f"resampled from {rate} Hz to {fs} Hz")
        mono = resample(mono, rate, fs)
    return Audio(mono, tuple(notes))


def resample(samples: np.ndarray, rate: int, fs: int) -> np.ndarray:
    """Samples (T,) at `rate` Hz -> samples (ceil(T fs / rate),) at `fs` Hz."""
    import torch
    from torchaudio.functional import resample as sinc_resample

    # One thread, because the last bit depends on how many share the sum, and the processes
    # of parallel_map fill the cores already.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return sinc_resample(torch.from_numpy(samples), rate, fs).numpy()
    finally:
        torch.set_num_threads(threads)


def to_int16(samples: np.ndarray) -> np.ndarray:
    """Float samples within [-1, 1] -> int16; lossless for audio that was 16-bit before."""
    return np.clip(np.rint(samples * 32768.0), -32768, 32767).astype(np.int16)


def _decode(entry: str) -> tuple[np.ndarray, int]:
    """Samples (T, channels) in float32, and their rate."""
    if entry.rstrip().endswith("|"):
        raise AudioError("a piped command is not supported: write its audio to a file")
    is_ark = re.search(r"\.ark:\d+$", entry) is not None
    path = entry.rsplit(":", 1)[0] if is_ark else entry
    if not os.path.isfile(path):
        raise AudioError(f"missing file: {path}")
    try:
        samples, rate = _decode_ark(entry) if is_ark else _decode_file(entry)
    except AudioError:
        raise
    except Exception as error:  # decoders raise whatever a damaged header leads them to
        raise AudioError(f"corrupt audio: {entry}: {error}") from error
    if len(samples) == 0:
        raise AudioError(f"empty audio: {entry}")
    if not np.isfinite(samples).all():
        raise AudioError(f"corrupt audio: {entry}: samples are not finite")
    return samples, rate


def _decode_ark(entry: str) -> tuple[np.ndarray, int]:
    import kaldiio

    rate, samples = kaldiio.load_mat(entry)
    if np.issubdtype(samples.dtype, np.integer):
        samples = samples / -float(np.iinfo(samples.dtype).min)
    return samples.astype(np.float32).reshape(len(samples), -1), rate


def _decode_file(path: str) -> tuple[np.ndarray, int]:
    import soundfile

    samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    if _promised_frames(path) > len(samples):
        raise AudioError(f"corrupt audio: {path}: the file is cut short")
    return samples, rate


def _promised_frames(path: str) -> int:
    """Frames that a wav header announces; 0 where there is no such promise.

    libsndfile reads a truncated wav without a word, unlike a truncated flac.
    """
    with contextlib.suppress(wave.Error, EOFError), wave.open(path) as header:
        size = header.getnframes() * header.getnchannels() * header.getsampwidth()
        # A program writing wav into a pipe cannot know the size and leaves about 2 GiB.
        return header.getnframes() if size < 0x7FFF0000 else 0
    return 0
