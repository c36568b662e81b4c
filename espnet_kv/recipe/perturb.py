"""Stage 2: speed perturbation, slower and faster copies of every utterance."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from espnet_kv.cli import progress, refuse_mostly_dropped, warn_each
from espnet_kv.errors import UserError
from espnet_kv.files import new_directory
from espnet_kv.recipe.audio import (
    AudioError,
    audio_file,
    read_recording,
    remove_unfinished,
    resample,
    to_int16,
    write_audio,
)
from espnet_kv.recipe.datadir import DataDir, Segment, require_conserved, write_lines
from espnet_kv.recipe.disk_table import Table
from espnet_kv.recipe.pool import parallel_map


def perturb_speed(
    src: Path, dst: Path, factors: list[float], nj: int = 1, *, allow_pipes: bool = False
) -> None:
    """Write data directory `dst`: a copy of `src` for every speed factor.

    A copy at 0.9 lasts 1/0.9 times as long and has a lower pitch (like `sox speed`). Its ids are
    `sp0.9-UTT` and `sp0.9-SPK`, and its audio is 16-bit flac in `dst/wav`. Factor 1.0 keeps ids,
    original files and segments. Copies of unreadable audio are dropped with a warning and listed
    in `dst/dropped`. The output does not depend on `nj`.

    Args:
        allow_pipes: run commands in wav.scp.

    Raises:
        UserError: a factor is repeated or outside 0.1..10, or most audio cannot be read.
    """
    _check(src, dst, factors)
    data = DataDir.read(src, allow_pipes=allow_pipes, on_disk=True)
    label = f"perturb {src.name}"
    prefixes = {f"sp{factor}-": factor for factor in factors if factor != 1}
    originals = data if 1 in factors else DataDir()
    names = (prefix + utt for prefix in prefixes for utt in data.wav_scp)
    if shared := next((name for name in names if name in originals.wav_scp), ""):
        raise UserError(f"{src}: {shared} would be the id of a copy; give it another id")
    before = itertools.chain(originals.wav_scp, (p + utt for p in prefixes for utt in data.wav_scp))
    number = len(data.wav_scp) * len(prefixes)
    with new_directory(dst) as partial:
        (partial / "wav").mkdir()
        perturbed, dropped, notes = DataDir.on_disk(), Table[str](), Table[str]()
        perturbed.update(originals)
        jobs = _jobs(data, prefixes, partial, allow_pipes)
        chunks = itertools.batched(jobs, max(1, min(16, len(data.wav_scp) // (4 * nj))))
        with progress(label, number) as counter:
            for done in itertools.chain.from_iterable(parallel_map(_perturb_all, chunks, nj)):
                counter.update()
                utt = done.prefix + done.utt
                if done.note:
                    notes[utt] = done.note
                if done.reason:
                    dropped[utt] = done.reason
                    continue
                perturbed.wav_scp[utt] = str(_file(dst, utt))
                if done.utt in data.text:
                    perturbed.text[utt] = data.text[done.utt]
                if done.utt in data.utt2spk:
                    perturbed.utt2spk[utt] = done.prefix + data.utt2spk[done.utt]
        remove_unfinished(partial)
        warn_each(label, notes, "copies were made of audio that had to be converted")
        warn_each(label, dropped, f"of {number} copies cannot be made")
        refuse_mostly_dropped(label, dropped, number)
        require_conserved(label, before, perturbed.wav_scp, dropped)
        perturbed.write_files(partial)
        write_lines(partial / "dropped", dropped)


@dataclass(frozen=True, slots=True)
class _Copy:
    prefix: str
    utt: str
    factor: float
    segment: Segment | None
    path: Path


@dataclass(frozen=True, slots=True)
class _Job:
    """One recording and the copies to make of the utterances in it."""

    entry: str
    copies: tuple[_Copy, ...]
    allow_pipes: bool


@dataclass(frozen=True, slots=True)
class _Done:
    """A copy, with the reason if it could not be made, and notes on conversions."""

    prefix: str
    utt: str
    reason: str = ""
    note: str = ""


def _jobs(
    data: DataDir, prefixes: Mapping[str, float], partial: Path, allow_pipes: bool
) -> Iterator[_Job]:
    for entry, utts in data.recordings():
        copies = tuple(
            _Copy(prefix, utt, factor, data.segments.get(utt), _file(partial, prefix + utt))
            for utt in utts
            for prefix, factor in prefixes.items()
        )
        yield _Job(entry, copies, allow_pipes)


def _file(directory: Path, utt: str) -> Path:
    return directory / "wav" / audio_file(utt, "flac")


def _check(src: Path, dst: Path, factors: list[float]) -> None:
    if src.resolve() == dst.resolve():
        raise UserError(f"speed perturbation cannot write over its own input {src}")
    if not factors or len(set(factors)) < len(factors):
        raise UserError(f"speed factors must be given and differ from each other: {factors}")
    for factor in factors:
        if not 0.1 <= factor <= 10:
            raise UserError(f"speed factor {factor} is outside 0.1 to 10")


def _perturb_all(jobs: Sequence[_Job]) -> list[_Done]:
    """Write the copies of some recordings; runs in a worker process."""
    return [done for job in jobs for done in _perturb(job)]


def _perturb(job: _Job) -> Iterator[_Done]:
    try:
        whole = read_recording(job.entry, allow_pipes=job.allow_pipes)
    except AudioError as error:
        yield from (_Done(copy.prefix, copy.utt, str(error)) for copy in job.copies)
        return
    for copy in job.copies:
        part = copy.segment
        try:
            recording = whole.cut(part.start, part.end) if part else whole
        except AudioError as error:
            where = part.where if part else copy.prefix + copy.utt
            yield _Done(copy.prefix, copy.utt, f"{where}: {error}")
            continue
        # Resample as if the input had a rate higher by the factor; only the ratio matters.
        samples = resample(recording.samples, round(1000 * copy.factor), 1000)
        write_audio(copy.path, to_int16(samples), recording.rate)
        yield _Done(copy.prefix, copy.utt, note=", ".join(recording.notes))
