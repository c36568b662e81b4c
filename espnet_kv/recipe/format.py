"""Stage 3: one clean dump of the audio, as ESPnet's training reads it."""

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from espnet_kv.errors import UserError
from espnet_kv.recipe.atomic import add_data, new_directory, write_text
from espnet_kv.recipe.audio import AudioError, parallel_map, read_audio_at, to_int16
from espnet_kv.recipe.datadir import DataDir
from espnet_kv.recipe.progress import Progress, refuse_mostly_dropped, warn_each

AUDIO_FORMATS = ("flac.ark", "wav.ark", "flac", "wav")


def format_audio(
    src: Path, dst: Path, fs: int = 16000, audio_format: str = "flac.ark", nj: int = 1
) -> None:
    """Write data directory `dst`: the audio of `src` as 16-bit mono at `fs` Hz.

    An ark format packs all audio into `dst/data_wav.ark` (ESPnet's type kaldi_ark), the
    others make one file per utterance in `dst/wav` (type sound). Beside the Kaldi files
    stand feats_type, audio_format, utt2num_samples and `dropped`: utterances left out
    because audio or transcript is missing, corrupt or empty, each with its reason.

    Raises:
        UserError: an unknown format, or more than half of the utterances are unusable.
    """
    if audio_format not in AUDIO_FORMATS:
        raise UserError(
            f"audio_format {audio_format} is unknown: use one of {', '.join(AUDIO_FORMATS)}"
        )
    if src.resolve() == dst.resolve():
        raise UserError(f"formatting cannot write over its own input {src}")
    label = f"format {src.name}"
    data = DataDir.read(src)
    total = len(data.wav_scp.keys() | data.text.keys())
    data, dropped = data.check(label)
    container, _, ark = audio_format.partition(".")
    jobs = [_Job(utt, entry, fs, container, bool(ark)) for utt, entry in data.wav_scp.items()]

    with new_directory(dst) as partial:
        wav_scp: dict[str, str] = {}
        num_samples: dict[str, int] = {}
        unreadable: dict[str, str] = {}
        notes: dict[str, str] = {}
        progress = Progress(label, len(jobs))
        with _ArkStore(partial, dst) if ark else _FileStore(partial, dst, container) as store:
            for done in parallel_map(_format, jobs, nj):
                progress.step()
                if done.unreadable:
                    unreadable[done.utt] = done.unreadable
                    continue
                wav_scp[done.utt] = store.add(done.utt, done.encoded)
                num_samples[done.utt] = done.num_samples
                if done.notes:
                    notes[done.utt] = ", ".join(done.notes)

        warn_each(label, notes, f"utterances were converted to mono at {fs} Hz")
        warn_each(label, unreadable, "utterances dropped for their audio")
        dropped |= unreadable
        refuse_mostly_dropped(label, dropped, total)
        data = data.subset(wav_scp)
        add_data(DataDir(wav_scp, data.text, data.utt2spk), partial)
        write_text(partial / "feats_type", "raw\n")
        write_text(partial / "audio_format", f"{audio_format}\n")
        write_text(partial / "utt2num_samples", _lines(num_samples))
        write_text(partial / "dropped", _lines(dropped))


@dataclass(frozen=True)
class _Job:
    utt: str
    entry: str
    fs: int
    container: str
    ark: bool


@dataclass(frozen=True)
class _Formatted:
    utt: str
    encoded: bytes = b""
    num_samples: int = 0
    notes: tuple[str, ...] = ()
    unreadable: str = ""


def _format(job: _Job) -> _Formatted:
    """Decode, convert and encode one utterance; runs in a worker process."""
    try:
        audio = read_audio_at(job.entry, job.fs)
    except AudioError as error:
        return _Formatted(job.utt, unreadable=str(error))
    samples = to_int16(audio.samples)
    buffer = io.BytesIO()
    if job.ark:
        import kaldiio

        kaldiio.save_ark(
            buffer,
            {job.utt: (job.fs, samples)},
            write_function="soundfile",
            write_kwargs={"format": job.container, "subtype": "PCM_16"},
        )
    else:
        import soundfile

        soundfile.write(buffer, samples, job.fs, format=job.container, subtype="PCM_16")
    return _Formatted(job.utt, buffer.getvalue(), len(samples), audio.notes)


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
        # A record is `utt AUDIO...`; an entry points behind the id and its space.
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
        file = f"wav/{quote(utt, safe='')}.{self._suffix}"
        (self._partial / file).write_bytes(encoded)
        return str(self._dst / file)


def _lines(table: Mapping[str, object]) -> str:
    return "".join(f"{utt} {table[utt]}\n" for utt in sorted(table))
