"""Stage 4: drop utterances that are too short or too long for training."""

import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from espnet_kv.cli import warn_each
from espnet_kv.errors import UserError
from espnet_kv.files import new_directory
from espnet_kv.recipe.audio import AudioError, read_audio
from espnet_kv.recipe.datadir import DataDir, entries, require_conserved, write_lines
from espnet_kv.recipe.disk_table import Table

SHORTEST = 0.1
"""Fewest seconds for which the usual subsampling (conv2d) has an output."""

# Input frames needed for one output of an input layer, as in ESPnet's check_short_utt.
FRAMES = {
    "conv1d1": 5,
    "conv1d2": 5,
    "conv1d3": 7,
    "conv2d": 7,
    "conv2d1": 5,
    "conv2d2": 7,
    "conv2d6": 11,
    "conv2d8": 15,
    "linear": 1,
}


def shortest_seconds(config: Mapping[str, Any], fs: int = 16000) -> float:
    """Fewest seconds of audio for one encoder output of a model.

    Args:
        config: a training configuration: frontend, frontend_conf, encoder_conf.
        fs: sampling rate of the audio in Hz.
    """
    layer = (config.get("encoder_conf") or {}).get("input_layer", "conv2d")
    frames = FRAMES.get(layer, FRAMES["conv2d"])
    conf = config.get("frontend_conf") or {}
    if (config.get("frontend") or "default") != "default":
        return frames * 0.02  # frames of pretrained front ends have at most 20 ms
    hop, n_fft = int(conf.get("hop_length", 128)), int(conf.get("n_fft", 512))
    if conf.get("center", True):
        # Frames are centred on multiples of hop; reflection at the ends needs half a window.
        samples = max((frames - 1) * hop, n_fft // 2 + 1)
    else:
        samples = (frames - 1) * hop + n_fft
    return samples / fs


def filter_lengths(
    src: Path,
    dst: Path,
    min_seconds: float,
    max_seconds: float,
    *,
    shortest_seconds: float = SHORTEST,
) -> None:
    """Write data directory `dst`: the utterances of the dump `src` with an allowed length.

    Utterances with a transcript and min_seconds <= length <= max_seconds are kept, unless they are
    shorter than shortest_seconds, the minimum of the model (see the function of this name). The
    audio stays in `src`. Dropped utterances and reasons are printed as warnings and written to
    `dst/dropped`.

    Raises:
        UserError: `src` is not a dump of stage 3, or no utterance is left.
    """
    if src.resolve() == dst.resolve():
        raise UserError(f"the length filter cannot write over its own input {src}")
    if not 0 <= min_seconds < max_seconds:
        raise UserError(
            f"utterance lengths from {min_seconds} s to {max_seconds} s leave nothing: "
            "the shortest must be at least 0 and below the longest"
        )
    data = DataDir.read(src, on_disk=True)
    num_samples = _num_samples(src, data)
    rate = _rate(src, data)
    shortest = max(min_seconds, shortest_seconds)

    dropped = Table[str]()
    reasons: Counter[str] = Counter()
    for utt in data.wav_scp:
        seconds = num_samples[utt] / rate
        if not data.text.get(utt, "").strip():
            reason, detail = "empty transcript", ""
        elif seconds < shortest:
            reason, detail = "too short", f": {seconds:.2f} s, the least is {shortest:g} s"
        elif seconds > max_seconds:
            reason, detail = "too long", f": {seconds:.2f} s, the most is {max_seconds:g} s"
        else:
            continue
        dropped[utt] = reason + detail
        reasons[reason] += 1

    kept = data.subset(utt for utt in data.wav_scp if utt not in dropped)
    counts = ", ".join(f"{number} {reason}" for reason, number in sorted(reasons.items()))
    if not kept.wav_scp:
        raise UserError(
            f"{src}: no utterance lasts from {shortest:g} s to {max_seconds:g} s ({counts})"
        )
    label = f"lengths {src.name}"
    require_conserved(label, data.wav_scp, kept.wav_scp, dropped)
    with new_directory(dst) as partial:
        kept.write_files(partial)
        for name in ("feats_type", "audio_format"):
            shutil.copyfile(src / name, partial / name)
        write_lines(partial / "utt2num_samples", ((utt, num_samples[utt]) for utt in kept.wav_scp))
        write_lines(partial / "dropped", dropped)
    warn_each(label, dropped, f"utterances dropped: {counts}")
    print(f"  {label}: kept {len(kept.wav_scp)} of {len(data.wav_scp)}", flush=True)


def _num_samples(src: Path, data: DataDir) -> Table[int]:
    for name in ("utt2num_samples", "feats_type", "audio_format"):
        if not (src / name).is_file():
            raise UserError(f"{src / name} is missing: format the audio first (stage 3)")
    num_samples = Table[int]()
    for file, line, utt, number in entries(src / "utt2num_samples", into=num_samples):
        if not number.isdecimal():
            raise UserError(
                f"{file}:{line}: no number of samples: format the audio again (stage 3)"
            )
        num_samples[utt] = int(number)
    if missing := next((utt for utt in data.wav_scp if utt not in num_samples), ""):
        raise UserError(
            f"{src / 'utt2num_samples'} lacks {missing}: format the audio again (stage 3)"
        )
    return num_samples


def _rate(src: Path, data: DataDir) -> int:
    """The sampling rate of a dump in Hz, read from the first audio; a dump has one rate."""
    entry = next(iter(data.wav_scp.values()))
    try:
        return read_audio(entry)[1]
    except AudioError as error:
        raise UserError(f"{src}: {error}; format the audio again (stage 3)") from error
