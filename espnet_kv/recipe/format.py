"""Stage 3: a clean dump of the audio in ESPnet's format."""

import io
import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from espnet_kv.cli import progress, refuse_mostly_dropped, warn_each
from espnet_kv.errors import UserError
from espnet_kv.files import new_directory, write_text
from espnet_kv.recipe.audio import AudioError, audio_file, read_recording, to_int16
from espnet_kv.recipe.datadir import (
    DataDir,
    Segment,
    add_data,
    dropped_lines,
    refuse_dropped,
    require_conserved,
)
from espnet_kv.recipe.pool import parallel_map

AUDIO_FORMATS = ("flac.ark", "wav.ark", "flac", "wav")


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

    An ark format packs all audio into `dst/data_wav.ark` (ESPnet's type kaldi_ark). The other
    formats write one file per utterance to `dst/wav` (type sound). Segments are cut out of their
    recordings. Other files are feats_type, audio_format, utt2num_samples and `dropped`, the list
    of utterances with missing, corrupt or empty audio or transcript, and the reasons. The output
    does not depend on `nj`.

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
    data = DataDir.read(src, allow_pipes=allow_pipes)
    before = data.wav_scp.keys() | data.text.keys()
    data, dropped = data.check(label, keep_all=keep_all)
    container, _, ark = audio_format.partition(".")
    jobs = [
        _Job(
            entry,
            tuple((utt, data.segments.get(utt)) for utt in utts),
            fs,
            container,
            bool(ark),
            allow_pipes,
        )
        for entry, utts in data.by_recording().items()
    ]

    with new_directory(dst) as partial:
        wav_scp: dict[str, str] = {}
        num_samples: dict[str, int] = {}
        unreadable: dict[str, str] = {}
        notes: dict[str, str] = {}
        with (
            progress(label, len(data.wav_scp)) as counter,
            _ArkStore(partial, dst) if ark else _FileStore(partial, dst, container) as store,
        ):
            for done in itertools.chain.from_iterable(parallel_map(_format, jobs, nj)):
                counter.update()
                if done.unreadable:
                    unreadable[done.utt] = done.unreadable
                    continue
                wav_scp[done.utt] = store.add(done.utt, done.encoded)
                num_samples[done.utt] = done.num_samples
                if done.notes:
                    notes[done.utt] = ", ".join(done.notes)

        if keep_all:
            refuse_dropped(label, unreadable, len(before))
        warn_each(label, notes, f"utterances were converted to mono at {fs} Hz")
        warn_each(label, unreadable, "utterances dropped for their audio")
        dropped |= unreadable
        refuse_mostly_dropped(label, dropped, len(before))
        require_conserved(label, before, wav_scp, dropped)
        data = data.subset(wav_scp)
        add_data(DataDir(wav_scp, data.text, data.utt2spk), partial)
        write_text(partial / "feats_type", "raw\n")
        write_text(partial / "audio_format", f"{audio_format}\n")
        write_text(
            partial / "utt2num_samples",
            "".join(f"{utt} {num_samples[utt]}\n" for utt in sorted(num_samples)),
        )
        write_text(partial / "dropped", dropped_lines(dropped))


@dataclass(frozen=True, slots=True)
class _Job:
    """One recording: `parts` are the utterances in it."""

    entry: str
    parts: tuple[tuple[str, Segment | None], ...]
    fs: int
    container: str
    ark: bool
    allow_pipes: bool


@dataclass(frozen=True, slots=True)
class _Formatted:
    utt: str
    encoded: bytes = b""
    num_samples: int = 0
    notes: tuple[str, ...] = ()
    unreadable: str = ""


def _format(job: _Job) -> list[_Formatted]:
    """Decode a recording, cut, convert and encode its utterances; runs in a worker process."""
    try:
        recording = read_recording(job.entry, allow_pipes=job.allow_pipes)
    except AudioError as error:
        return [_Formatted(utt, unreadable=str(error)) for utt, _ in job.parts]
    results = []
    for utt, part in job.parts:
        try:
            audio = (recording.cut(part.start, part.end) if part else recording).at(job.fs)
        except AudioError as error:
            results.append(_Formatted(utt, unreadable=f"{part.where if part else utt}: {error}"))
            continue
        samples = to_int16(audio.samples)
        encoded = _encode(job, utt, samples)
        results.append(_Formatted(utt, encoded, len(samples), audio.notes))
    return results


def _encode(job: _Job, utt: str, samples: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    if job.ark:
        import kaldiio

        kaldiio.save_ark(
            buffer,
            {utt: (job.fs, samples)},
            write_function="soundfile",
            write_kwargs={"format": job.container, "subtype": "PCM_16"},
        )
    else:
        import soundfile

        soundfile.write(buffer, samples, job.fs, format=job.container, subtype="PCM_16")
    return buffer.getvalue()


class _ArkStore:
    """All utterances in one ark; entries are `dst/data_wav.ark:offset`."""

    def __init__(self, partial: Path, dst: Path) -> None:
        self._path = dst / "data_wav.ark"
        self._file = (partial / "data_wav.ark").open("wb")

    def __enter__(self) -> "_ArkStore":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, utt: str, record: bytes) -> str:
        # A record is `utt AUDIO...`; the offset is that of the audio.
        offset = self._file.tell() + len(utt.encode()) + 1
        self._file.write(record)
        return f"{self._path}:{offset}"


class _FileStore:
    """One file per utterance in `dst/wav`."""

    def __init__(self, partial: Path, dst: Path, container: str) -> None:
        self._partial, self._dst, self._suffix = partial, dst, container
        (partial / "wav").mkdir()

    def __enter__(self) -> "_FileStore":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def add(self, utt: str, encoded: bytes) -> str:
        file = f"wav/{audio_file(utt, self._suffix)}"
        (self._partial / file).write_bytes(encoded)
        return str(self._dst / file)
