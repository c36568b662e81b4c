"""Reading of the recordings that a wav.scp names."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import soxr

from espnet_kv.channels import to_mono
from espnet_kv.errors import UserError
from espnet_kv.files import read_text
from espnet_kv.sound_files import in_scale
from espnet_kv.streaming.sources import read_file, reason


def read_scp(file: Path | str) -> dict[str, str]:
    """Read a wav.scp or another list: utterance -> the rest of its line.

    Raises:
        UserError: the file is missing, not text, or empty, or a line is malformed or repeats an
            utterance; names file and line.
    """
    entries: dict[str, str] = {}
    for number, line in enumerate(read_lines(file), start=1):
        words = line.split(maxsplit=1)
        if len(words) != 2:
            raise UserError(f"{file}:{number}: expected `utterance path`, found {line.strip()!r}")
        if words[0] in entries:
            raise UserError(
                f"{file}:{number}: utterance {words[0]} occurs twice; keep one of the lines"
            )
        entries[words[0]] = words[1].rstrip()
    if not entries:
        raise UserError(f"{file} names no utterance")
    return entries


def entry_kind(entry: str) -> str:
    """ESPnet's type of the audio of an entry of a wav.scp: kaldi_ark for archive.ark:offset."""
    return "kaldi_ark" if re.search(r"\.ark:\d+$", entry) else "sound"


def read_recording(entry: str, kind: str | None) -> tuple[np.ndarray, int | None]:
    """Read the audio of an entry of a wav.scp, as ESPnet does.

    Args:
        entry: a file, or archive.ark:offset.
        kind: sound or kaldi_ark, as in --data_path_and_name_and_type. None: what the entry is.

    Returns:
        Samples (N,) or (N, channels), integers scaled to -1 to 1, and samples per second; None if
        an archive states no rate.

    Raises:
        UserError: the file is missing, not audio, truncated, or has samples that are not finite.
    """
    if entry.endswith("|"):
        raise UserError(f"{entry}: a command is not run here; write its audio to a file")
    rate: int | None
    kind = kind or entry_kind(entry)
    if kind == "sound":
        if entry_kind(entry) != kind:
            raise UserError(f"{entry} is in an archive: give its type as kaldi_ark, not sound")
        samples, rate = read_file(entry, "float64")
        samples = samples[:, 0] if samples.shape[1] == 1 else samples
    else:
        samples, rate = _read_archive(entry)
    if not np.isfinite(samples).all():
        raise UserError(f"{entry} holds samples that are infinite or NaN")
    if np.issubdtype(samples.dtype, np.integer):
        samples = samples / -float(np.iinfo(samples.dtype).min)
    return samples, rate


def read_utterance(
    entry: str,
    kind: str | None,
    rate: int,
    channels: bool = False,
    note: Callable[[str], object] = lambda text: None,
) -> np.ndarray:
    """Read the audio of an entry of a wav.scp in the format of a model.

    Args:
        entry, kind: as in `read_recording`.
        rate: samples per second of the model; other audio is resampled.
        channels: whether the model takes several channels; if not, they are mixed (`to_mono`).
        note: called with a sentence on each change of the audio.

    Returns:
        (N,) samples, or (N, channels) if `channels` is set and the audio has several.

    Raises:
        UserError: as `read_recording`, or the samples are out of scale.
    """
    samples, found = read_recording(entry, kind)
    if found is not None or samples.ndim == 1:  # else it can be a matrix of features
        try:
            samples, changed = in_scale(samples)
        except ValueError as error:
            raise UserError(f"{entry}: {error}") from error
        if changed is not None:
            note(f"audio {changed}")
    if samples.ndim > 1 and not channels and found is not None:
        samples, changed = to_mono(samples)
        if changed is not None:
            note(changed)
    if found in (None, rate):
        return samples
    note(f"audio of {found} samples per second is resampled to {rate}, the rate of the model")
    return soxr.resample(samples, found, rate) if len(samples) else samples


def model_rate(frontend_conf: Any) -> int:
    """Samples per second of a model, from the frontend_conf of its config.yaml."""
    import humanfriendly

    rate = (frontend_conf or {}).get("fs") or 16000
    return humanfriendly.parse_size(rate) if isinstance(rate, str) else int(rate)


def read_lines(file: Path | str) -> list[str]:
    """The lines of a text file in UTF-8.

    Raises:
        UserError: the file is missing or not in UTF-8.
    """
    text = read_text(file)
    if text.startswith("\ufeff"):
        raise UserError(f"{file}:1: remove the byte order mark before the first key")
    lines = text.split("\n")
    return lines[:-1] if lines[-1] == "" else lines


def _read_archive(entry: str) -> tuple[np.ndarray, int | None]:
    from omniio import kaldi

    file = re.sub(r":\d+$", "", entry)
    if not Path(file).is_file():
        raise UserError(f"{file} does not exist")
    try:
        found = kaldi.load_mat(entry)
    except Exception as error:  # a damaged archive can cause any exception
        raise UserError(f"{entry} cannot be read as a Kaldi archive: {reason(error)}") from error
    if not isinstance(found, tuple):
        return found, None
    rate, samples = found if isinstance(found[0], int) else found[::-1]
    return samples, rate
