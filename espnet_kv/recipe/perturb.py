"""Stage 2: speed perturbation, slower and faster copies of every utterance."""

import itertools
from dataclasses import dataclass
from pathlib import Path

from espnet_kv.cli import progress, refuse_mostly_dropped, warn_each
from espnet_kv.errors import UserError
from espnet_kv.files import new_directory, write_text
from espnet_kv.recipe.audio import (
    AudioError,
    audio_file,
    read_recording,
    remove_unfinished,
    resample,
    to_int16,
    write_audio,
)
from espnet_kv.recipe.datadir import DataDir, Segment, add_data, dropped_lines, require_conserved
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
    data = DataDir.read(src, allow_pipes=allow_pipes)
    label = f"perturb {src.name}"
    prefixes = {factor: f"sp{factor}-" for factor in factors if factor != 1}
    with new_directory(dst) as partial:
        (partial / "wav").mkdir()
        perturbed = data if 1 in factors else DataDir()
        for prefix in prefixes.values():
            perturbed = DataDir.combine([perturbed, _renamed(data, prefix, dst)])
        before = set(perturbed.wav_scp)
        jobs = [
            _Job(
                entry,
                tuple(
                    _Copy(
                        name := prefix + utt, factor, data.segments.get(utt), _file(partial, name)
                    )
                    for utt in utts
                    for factor, prefix in prefixes.items()
                ),
                allow_pipes,
            )
            for entry, utts in data.by_recording().items()
        ]

        dropped: dict[str, str] = {}
        notes: dict[str, str] = {}
        copies = [copy.utt for job in jobs for copy in job.copies]
        outcomes = itertools.chain.from_iterable(parallel_map(_perturb, jobs, nj))
        counter = progress(label, len(copies))
        for utt, (reason, note) in zip(copies, outcomes, strict=True):
            counter.update()
            if note:
                notes[utt] = note
            if reason:
                dropped[utt] = reason
                for table in (perturbed.wav_scp, perturbed.text, perturbed.utt2spk):
                    table.pop(utt, None)
        counter.close()
        remove_unfinished(partial)
        warn_each(label, notes, "copies were made of audio that had to be converted")
        warn_each(label, dropped, f"of {len(copies)} copies cannot be made")
        refuse_mostly_dropped(label, dropped, len(copies))
        require_conserved(label, before, perturbed.wav_scp, dropped)
        add_data(perturbed, partial)
        write_text(partial / "dropped", dropped_lines(dropped))


@dataclass(frozen=True, slots=True)
class _Copy:
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


def _file(directory: Path, utt: str) -> Path:
    return directory / "wav" / audio_file(utt, "flac")


def _renamed(data: DataDir, prefix: str, dst: Path) -> DataDir:
    return DataDir(
        {prefix + utt: str(_file(dst, prefix + utt)) for utt in data.wav_scp},
        {prefix + utt: words for utt, words in data.text.items()},
        {prefix + utt: prefix + speaker for utt, speaker in data.utt2spk.items()},
    )


def _check(src: Path, dst: Path, factors: list[float]) -> None:
    if src.resolve() == dst.resolve():
        raise UserError(f"speed perturbation cannot write over its own input {src}")
    if not factors or len(set(factors)) < len(factors):
        raise UserError(f"speed factors must be given and differ from each other: {factors}")
    for factor in factors:
        if not 0.1 <= factor <= 10:
            raise UserError(f"speed factor {factor} is outside 0.1 to 10")


def _perturb(job: _Job) -> list[tuple[str, str]]:
    """Write the copies of one recording; return (reason of failure, notes) of each copy."""
    try:
        whole = read_recording(job.entry, allow_pipes=job.allow_pipes)
    except AudioError as error:
        return [(str(error), "")] * len(job.copies)
    outcomes = []
    for copy in job.copies:
        part = copy.segment
        try:
            recording = whole.cut(part.start, part.end) if part else whole
        except AudioError as error:
            outcomes.append((f"{part.where if part else copy.utt}: {error}", ""))
            continue
        # Resample as if the input had a rate higher by the factor; only the ratio matters.
        samples = resample(recording.samples, round(1000 * copy.factor), 1000)
        write_audio(copy.path, to_int16(samples), recording.rate)
        outcomes.append(("", ", ".join(recording.notes)))
    return outcomes
