"""Stage 3: a clean dump of the audio in ESPnet's format."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from espnet_kv.cli import progress, refuse_mostly_dropped, warn_each
from espnet_kv.errors import UserError
from espnet_kv.files import new_directory, write_text
from espnet_kv.recipe.audio import (
    AudioError,
    audio_file,
    read_recording,
    remove_unfinished,
    replacing,
    to_int16,
    write_audio,
)
from espnet_kv.recipe.datadir import (
    DataDir,
    Segment,
    refuse_dropped,
    require_conserved,
    write_lines,
)
from espnet_kv.recipe.disk_table import Table
from espnet_kv.recipe.pool import parallel_map

AUDIO_FORMATS = ("flac.ark", "wav.ark", "flac", "wav")
PART = (16, 1024)
"""Fewest and most utterances of a part: of an ark, and of what is lost with a worker."""


def format_audio(
    src: Path,
    dst: Path,
    fs: int = 16000,
    audio_format: str = "flac.ark",
    nj: int = 1,
    *,
    keep_all: bool = False,
    allow_pipes: bool = False,
) -> None:
    """Write data directory `dst`: the audio of `src` as 16-bit mono at `fs` Hz.

    An ark format packs the audio of each part of the data into `dst/data_wav.N.ark` (ESPnet's type
    kaldi_ark). The other formats write one file per utterance to `dst/wav` (type sound). The
    processes that encode the audio write it, so that neither it nor the tables stay in the memory
    of the run. Segments are cut out of their recordings. Other files are feats_type, audio_format,
    utt2num_samples and `dropped`, the list of utterances with missing, corrupt or empty audio or
    transcript, and the reasons. The output does not depend on `nj`.

    Args:
        keep_all: for test sets: keep empty transcripts; any unusable utterance is an error.
        allow_pipes: run commands in wav.scp.

    Raises:
        UserError: the format is unknown, more than half of the utterances are unusable, or with
            `keep_all` one is unusable.
    """
    if audio_format not in AUDIO_FORMATS:
        raise UserError(
            f"audio_format {audio_format} is unknown: use one of {', '.join(AUDIO_FORMATS)}"
        )
    if src.resolve() == dst.resolve():
        raise UserError(f"formatting cannot write over its own input {src}")
    label = f"format {src.name}"
    data = DataDir.read(src, allow_pipes=allow_pipes, on_disk=True)
    total = sum(1 for _ in data.utterances())
    before = data.utterances()
    data, dropped = data.check(label, keep_all=keep_all)
    clean = len(data.wav_scp)

    with new_directory(dst) as partial:
        if not audio_format.endswith("ark"):
            (partial / "wav").mkdir()
        kept = DataDir.on_disk()
        num_samples, unreadable, notes = Table[int](), Table[str](), Table[str]()
        parts = _parts(data, _Target(partial, dst, fs, audio_format, allow_pipes))
        results = itertools.chain.from_iterable(parallel_map(_format, parts, nj))
        with progress(label, clean) as counter:
            for done in results:
                counter.update()
                if done.unreadable:
                    unreadable[done.utt] = dropped[done.utt] = done.unreadable
                    continue
                kept.wav_scp[done.utt] = done.entry
                kept.text[done.utt] = data.text[done.utt]
                kept.utt2spk[done.utt] = data.utt2spk[done.utt]
                num_samples[done.utt] = done.num_samples
                if done.notes:
                    notes[done.utt] = ", ".join(done.notes)
        remove_unfinished(partial)

        if keep_all:
            refuse_dropped(label, unreadable, total)
        warn_each(label, notes, f"utterances were converted to mono at {fs} Hz")
        warn_each(label, unreadable, "utterances dropped for their audio")
        refuse_mostly_dropped(label, dropped, total)
        require_conserved(label, before, kept.wav_scp, dropped)
        kept.write_files(partial)
        write_text(partial / "feats_type", "raw\n")
        write_text(partial / "audio_format", f"{audio_format}\n")
        write_lines(partial / "utt2num_samples", num_samples)
        write_lines(partial / "dropped", dropped)


@dataclass(frozen=True, slots=True)
class _Target:
    """Where audio is written (`partial`, renamed to `dst` in the end), and how."""

    partial: Path
    dst: Path
    fs: int
    audio_format: str
    allow_pipes: bool


@dataclass(frozen=True, slots=True)
class _Part:
    """Some recordings with the utterances in them, which one process formats."""

    number: int
    recordings: Sequence[tuple[str, Sequence[tuple[str, Segment | None]]]]
    target: _Target


@dataclass(frozen=True, slots=True)
class _Formatted:
    """One utterance: its entry in wav.scp, or why it cannot be read."""

    utt: str
    entry: str = ""
    num_samples: int = 0
    notes: tuple[str, ...] = ()
    unreadable: str = ""


def _parts(data: DataDir, target: _Target) -> Iterator[_Part]:
    """Parts of whole recordings, of a size that depends on the data alone."""
    size = min(max(PART[0], len(data.wav_scp) // 256), PART[1])
    number, held, recordings = 1, 0, list[tuple[str, list[tuple[str, Segment | None]]]]()
    segments = data.segments or {}
    for entry, utts in data.recordings():
        recordings.append((entry, [(utt, segments.get(utt)) for utt in utts]))
        held += len(utts)
        if held >= size:
            yield _Part(number, recordings, target)
            number, held, recordings = number + 1, 0, []
    if recordings:
        yield _Part(number, recordings, target)


def _format(part: _Part) -> list[_Formatted]:
    """Decode recordings, cut, convert and encode their utterances; runs in a worker process."""
    if part.target.audio_format.endswith("ark"):
        name = f"data_wav.{part.number}.ark"
        with replacing(part.target.partial / name) as file, file.open("wb") as ark:
            place = part.target.dst / name
            return [
                done for each in part.recordings for done in _cut(*each, part.target, place, ark)
            ]
    return [done for each in part.recordings for done in _cut(*each, part.target)]


def _cut(
    entry: str,
    parts: Sequence[tuple[str, Segment | None]],
    target: _Target,
    place: Path | None = None,
    ark: BinaryIO | None = None,
) -> Iterator[_Formatted]:
    """Write the utterances of one recording, to an ark, which will be at `place`, or to files."""
    try:
        recording = read_recording(entry, allow_pipes=target.allow_pipes)
    except AudioError as error:
        yield from (_Formatted(utt, unreadable=str(error)) for utt, _ in parts)
        return
    for utt, part in parts:
        try:
            audio = (recording.cut(part.start, part.end) if part else recording).at(target.fs)
        except AudioError as error:
            yield _Formatted(utt, unreadable=f"{part.where if part else utt}: {error}")
            continue
        samples = to_int16(audio.samples)
        if ark is None:
            file = f"wav/{audio_file(utt, target.audio_format)}"
            write_audio(target.partial / file, samples, target.fs)
            written = str(target.dst / file)
        else:
            # a record is `utt AUDIO...`; the offset is that of the audio
            written = f"{place}:{ark.tell() + len(utt.encode()) + 1}"
            _append(ark, utt, samples, target)
        yield _Formatted(utt, written, len(samples), audio.notes)


def _append(ark: BinaryIO, utt: str, samples: np.ndarray, target: _Target) -> None:
    import kaldiio

    container = target.audio_format.removesuffix(".ark")
    kaldiio.save_ark(
        ark,
        {utt: (target.fs, samples)},
        write_function="soundfile",
        write_kwargs={"format": container, "subtype": "PCM_16"},
    )
