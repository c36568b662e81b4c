"""Stage 2: speed perturbation, which makes slower and faster copies of every utterance."""

from pathlib import Path
from urllib.parse import quote

from espnet_kv.errors import UserError
from espnet_kv.recipe.atomic import add_data, new_directory
from espnet_kv.recipe.audio import AudioError, parallel_map, read_audio, resample, to_int16
from espnet_kv.recipe.datadir import DataDir
from espnet_kv.recipe.progress import Progress, refuse_mostly_dropped, warn_each

_Job = tuple[str, float, Path]  # wav.scp entry, speed factor, file to write


def perturb_speed(src: Path, dst: Path, factors: list[float], nj: int = 1) -> None:
    """Write data directory `dst`: `src` once for every speed factor.

    A copy at 0.9 lasts 1/0.9 times as long and sounds lower (as `sox speed` does); its ids
    are `sp0.9-UTT` and `sp0.9-SPK`, its audio is 16-bit flac in `dst/wav`. Factor 1.0 keeps
    ids and original files. Audio that cannot be read has no copies, with a warning.

    Raises:
        UserError: a factor is repeated or outside 0.1..10, or most audio cannot be read.
    """
    _check(src, dst, factors)
    data = DataDir.read(src)
    label = f"perturb {src.name}"
    perturbed = DataDir()
    jobs: dict[str, _Job] = {}
    with new_directory(dst) as partial:
        (partial / "wav").mkdir()
        for factor in factors:
            prefix = "" if factor == 1 else f"sp{factor}-"
            copy = _renamed(data, prefix)
            if prefix:
                for utt, entry in copy.wav_scp.items():
                    file = f"wav/{quote(utt, safe='')}.flac"
                    copy.wav_scp[utt] = str(dst / file)
                    jobs[utt] = (entry, factor, partial / file)
            perturbed = DataDir.combine([perturbed, copy])

        dropped = {}
        progress = Progress(label, len(jobs))
        outcomes = parallel_map(_perturb, list(jobs.values()), nj)
        for utt, reason in zip(jobs, outcomes, strict=True):
            progress.step()
            if reason:
                dropped[utt] = reason
                for table in (perturbed.wav_scp, perturbed.text, perturbed.utt2spk):
                    table.pop(utt, None)
        warn_each(label, dropped, f"of {len(jobs)} copies cannot be made")
        refuse_mostly_dropped(label, dropped, len(jobs))
        add_data(perturbed, partial)


def _renamed(data: DataDir, prefix: str) -> DataDir:
    return DataDir(
        {prefix + utt: entry for utt, entry in data.wav_scp.items()},
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


def _perturb(job: _Job) -> str | None:
    """Write one perturbed file; returns why it could not be done."""
    import soundfile

    entry, factor, path = job
    try:
        samples, rate = read_audio(entry)
    except AudioError as error:
        return str(error)
    # Only the ratio matters: resampling as if the input had been recorded faster.
    samples = resample(samples, round(1000 * factor), 1000)
    soundfile.write(path, to_int16(samples), rate, format="FLAC", subtype="PCM_16")
    return None
