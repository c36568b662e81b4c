"""Sound files with the checks that libsndfile leaves out, and the scale of their samples."""

import re
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

import numpy as np

from espnet_kv.containers import CHECKED, is_cut_short

RATES = (1000, 768000)
"""Range of sampling rates in Hz; a header with another rate is damaged."""
CLIPPED_TO = 1.5
"""Float samples up to this factor of full scale are clipped; lossy codecs produce them."""


class CutShortError(ValueError):
    """A file has less audio than its header states."""

    def __init__(self) -> None:
        super().__init__("the file is cut short")


def open_sound(file: BinaryIO) -> Any:
    """Open a sound file; one with a name can be closed afterwards.

    Returns:
        A soundfile.SoundFile to read once from the beginning to the end.

    Raises:
        ValueError: it is no sound that can be read, or it is cut short; says why.
    """
    import soundfile

    class Sound(soundfile.SoundFile):
        """A sound without seeking, which flac of unknown length does not support."""

        def seekable(self) -> bool:
            return False

    if is_cut_short(file):
        raise CutShortError
    file.seek(0)
    start = file.read(512)
    file.seek(0)
    try:
        sound = Sound(getattr(file, "name", file))  # libsndfile reads a named file faster
    except soundfile.LibsndfileError as error:
        unknown = f"{str(error).rpartition(': ')[2].rstrip('.')}; {_CONVERT}"
        raise ValueError(_foreign(start) or unknown) from None
    if sound.format not in CHECKED:
        sound.close()
        raise ValueError(f"whether {sound.format} is complete cannot be determined; {_CONVERT}")
    if not RATES[0] <= sound.samplerate <= RATES[1]:
        sound.close()
        raise ValueError(f"the header states {sound.samplerate} samples a second")
    return sound


def blocks(sound: Any, frames: int, dtype: str = "float32") -> Iterator[np.ndarray]:
    """Yield the samples of an opened sound in pieces of at most `frames`, (N, channels) each.

    Raises:
        ValueError: it cannot be read to its end, or has less audio than its header states.
    """
    import soundfile

    count = 0
    while True:
        try:
            block = sound.read(frames, dtype=dtype, always_2d=True)
        except soundfile.LibsndfileError as error:
            raise ValueError(" ".join(str(error).split())) from None
        if not len(block):
            break
        count += len(block)
        yield block
    # the number of frames in an mp3 header may be wrong by the codec's delay
    slack = 2 * 1152 if sound.format == "MP3" else 0
    if count + slack < sound.frames < 1 << 62:  # flac of unknown length states 2^63 - 1
        raise CutShortError


def read_sound(file: BinaryIO, dtype: str = "float32") -> tuple[np.ndarray, int]:
    """All samples (T, channels) of a sound file, and their rate.

    Raises:
        ValueError: see `open_sound` and `blocks`.
    """
    with open_sound(file) as sound:
        return join(blocks(sound, 1 << 20, dtype), sound), sound.samplerate


def join(pieces: Iterable[np.ndarray], sound: Any) -> np.ndarray:
    """The pieces of a sound as one array (T, channels)."""
    read = list(pieces)
    return np.concatenate(read) if read else np.zeros((0, sound.channels), np.float32)


def scale_of(peak: float) -> tuple[float, str | None]:
    """What divides samples with this largest magnitude, before they are clipped, and a note on it.

    Raises:
        ValueError: the scale is neither that of floats nor of 16-bit integers.
    """
    if peak <= 1:
        return 1.0, None
    if peak <= CLIPPED_TO:
        return 1.0, f"clipped, its samples reach {peak:.2f} of full scale"
    if 64 <= peak <= CLIPPED_TO * 32768:
        return 32768.0, "scaled down by 32768, floats in the scale of integers"
    raise ValueError(
        f"samples reach {peak:.6g}, where floats end at 1 and 16-bit integers at 32768; scale the "
        "audio to one of them"
    )


def in_scale(samples: np.ndarray) -> tuple[np.ndarray, str | None]:
    """Samples within [-1, 1], and a note if they were changed.

    Raises:
        ValueError: see `scale_of`.
    """
    divisor, note = scale_of(float(np.abs(samples).max(initial=0)))
    return (samples, None) if note is None else ((samples / divisor).clip(-1, 1), note)


_CONVERT = "if it is audio, convert it to wav: ffmpeg -i INPUT OUTPUT.wav"
_FOREIGN = (
    (r"....ftyp", f"MPEG-4 audio (m4a, mp4) cannot be read; {_CONVERT}"),
    (r"\x1aE\xdf\xa3", f"WebM or Matroska cannot be read; {_CONVERT}"),
    (r"\xff[\xf0\xf1\xf8\xf9]", f"AAC cannot be read; {_CONVERT}"),
    (r"0&\xb2u", f"WMA cannot be read; {_CONVERT}"),
    (r"#!AMR", f"AMR cannot be read; {_CONVERT}"),
    (r"FLV", f"Flash video cannot be read; {_CONVERT}"),
    (r"NIST.*shorten", "compressed SPHERE cannot be read; convert it: sph2pipe -f wav IN OUT.wav"),
    (r"version https://git-lfs", "this is a pointer of Git LFS, not the audio: git lfs pull"),
    (r"\s*<(!doctype )?html", "this is a web page, not audio: download it again"),
)


def _foreign(start: bytes) -> str:
    """Name the format of a file that libsndfile cannot read, by its first bytes; empty: unknown."""
    text = start.decode("latin-1")
    for pattern, what in _FOREIGN:
        if re.match(pattern, text, re.DOTALL | re.IGNORECASE):
            return what
    return ""
