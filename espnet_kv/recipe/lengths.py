"""Stage 4: leave out utterances that are too short or too long to train on."""

import shutil
from collections import Counter
from pathlib import Path

from espnet_kv.errors import UserError
from espnet_kv.recipe.atomic import add_data, new_directory, write_text
from espnet_kv.recipe.audio import AudioError, read_audio
from espnet_kv.recipe.datadir import DataDir
from espnet_kv.recipe.progress import warn_each

SHORTEST = 0.1
"""Seconds below which convolutional subsampling has too few frames for a single output."""


def filter_lengths(src: Path, dst: Path, min_seconds: float, max_seconds: float) -> None:
    """Write data directory `dst`: the utterances of the dump `src` that last long enough.

    Kept are min_seconds <= length <= max_seconds (and never below SHORTEST) with a
    transcript. The audio stays where it is, in `src`. `dst/dropped` holds each utterance
    left out and its reason, which are also warned of and counted by reason.

    Raises:
        UserError: `src` is no dump of stage 3, or no utterance is left.
    """
    if src.resolve() == dst.resolve():
        raise UserError(f"the length filter cannot write over its own input {src}")
    if not 0 <= min_seconds < max_seconds:
        raise UserError(
            f"utterance lengths from {min_seconds} s to {max_seconds} s leave nothing: "
            "the shortest must be at least 0 and below the longest"
        )
    data = DataDir.read(src)
    num_samples = _num_samples(src, data)
    rate = _rate(src, data)
    shortest = max(min_seconds, SHORTEST)

    dropped: dict[str, str] = {}
    reasons: Counter[str] = Counter()
    for utt in sorted(data.wav_scp):
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

    kept = [utt for utt in data.wav_scp if utt not in dropped]
    counts = ", ".join(f"{number} {reason}" for reason, number in sorted(reasons.items()))
    if not kept:
        raise UserError(
            f"{src}: no utterance lasts from {shortest:g} s to {max_seconds:g} s ({counts})"
        )
    with new_directory(dst) as partial:
        add_data(data.subset(kept), partial)
        for name in ("feats_type", "audio_format"):
            shutil.copyfile(src / name, partial / name)
        write_text(
            partial / "utt2num_samples",
            "".join(f"{utt} {num_samples[utt]}\n" for utt in sorted(kept)),
        )
        write_text(
            partial / "dropped", "".join(f"{utt} {reason}\n" for utt, reason in dropped.items())
        )
    label = f"lengths {src.name}"
    warn_each(label, dropped, f"utterances dropped: {counts}")
    print(f"  {label}: kept {len(kept)} of {len(data.wav_scp)}", flush=True)


def _num_samples(src: Path, data: DataDir) -> dict[str, int]:
    for name in ("utt2num_samples", "feats_type", "audio_format"):
        if not (src / name).is_file():
            raise UserError(f"{src / name} is missing: format the audio first (stage 3)")
    lines = (src / "utt2num_samples").read_text(encoding="utf-8").splitlines()
    num_samples = {utt: int(number) for utt, number in map(str.split, lines)}
    missing = data.wav_scp.keys() - num_samples.keys()
    if missing:
        raise UserError(
            f"{src / 'utt2num_samples'} lacks {min(missing)}: format the audio again (stage 3)"
        )
    return num_samples


def _rate(src: Path, data: DataDir) -> int:
    """The sampling rate in Hz, which a dump has in common and states in its audio alone."""
    entry = next(iter(data.wav_scp.values()))
    try:
        return read_audio(entry)[1]
    except AudioError as error:
        raise UserError(f"{src}: {error}; format the audio again (stage 3)") from error
