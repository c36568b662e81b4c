"""Import of a user's Kaldi data directories."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from espnet_kv.errors import UserError
from espnet_kv.files import new_directory
from espnet_kv.recipe.audio import file_of
from espnet_kv.recipe.datadir import DataDir, entries, require_conserved

MARK = "source"
"""File in each directory of `import_sources` with the path of the source directory."""


def name_sources(paths: Iterable[Path], data_dir: Path) -> dict[str, Path]:
    """Choose the name of each data directory in `data_dir`.

    The name is the last part of the path. If it is used twice, or if `data_dir`/NAME is one of the
    user's directories, the name of the parent folder is prepended, then a number appended. A path
    that occurs twice gets one name.

    Returns:
        name -> directory, in the order of `paths`, symbolic links followed.

    Raises:
        UserError: a path is not a directory.
    """
    sources: dict[str, Path] = {}
    resolved = list(dict.fromkeys(Path(path).resolve() for path in paths))
    for path in resolved:
        if not path.is_dir():
            raise UserError(f"{path} is not a data directory: it does not exist")
        stem = "_".join(path.name.split()) or "data"
        parent = "_".join(path.parent.name.split()) or "root"
        tries = [stem, f"{parent}_{stem}", *(f"{parent}_{stem}_{n}" for n in range(2, 99))]
        for name in tries:
            # speed perturbation writes to data_dir/NAME_sp
            clash = {name, f"{name}_sp", name.removesuffix("_sp")} & sources.keys()
            if not clash and (data_dir / name).resolve() not in resolved:
                break
        sources[name] = path
    return sources


def import_sources(
    data_dir: Path, sources: Mapping[str, Path], *, allow_pipes: bool = False
) -> None:
    """Write `data_dir`/NAME for every data directory, with absolute audio paths.

    All directories are read before the first is written. No utterance is dropped here; stage 3
    names and counts unusable utterances.

    Raises:
        UserError: as DataDir.read; a directory has no transcripts or none of its audio files
            exists; or `data_dir`/NAME was not written by this function.
    """
    read: dict[str, DataDir] = {}
    for name, source in sources.items():
        target = data_dir / name
        if target.exists() and not (target / MARK).is_file():
            raise UserError(
                f"{target} exists and was not made of a data directory by this recipe; move it "
                "away, or choose another data_dir"
            )
        data = DataDir.read(source, allow_pipes=allow_pipes)
        if not data.text:
            raise UserError(f"{source / 'text'} is missing: training and scoring need transcripts")
        _require_audio(source, data)
        data.wav_scp = {
            utt: entry if file_of(entry) is None else os.path.abspath(entry)
            for utt, entry in data.wav_scp.items()
        }
        read[name] = data
    for name, data in read.items():
        target = data_dir / name
        with new_directory(target) as partial:
            data.write_files(partial)
            (partial / MARK).write_text(f"{sources[name]}\n", encoding="utf-8")
        require_conserved(name, data.wav_scp, DataDir.read(target, allow_pipes=True).wav_scp, {})
        speakers = len(set(data.utt2spk.values()))
        print(
            f"  {target}: {len(data.wav_scp)} utterances{_hours(sources[name], data)}, "
            f"{speakers} speakers (of {sources[name]})",
            flush=True,
        )


def _require_audio(source: Path, data: DataDir) -> None:
    files = {entry: file_of(entry) for entry in data.wav_scp.values()}
    missing = [entry for entry, file in files.items() if file and not os.path.exists(file)]
    if len(missing) == len(files):
        raise UserError(
            f"{source / 'wav.scp'}: none of its {len(files)} audio files exists (the first: "
            f"{missing[0]}); relative paths count from {Path.cwd()} or {source.absolute().parent}"
        )


def _hours(source: Path, data: DataDir) -> str:
    """The hours of speech, if known from `segments` or `utt2dur`."""
    seconds: dict[str, float] = {
        utt: part.end - part.start for utt, part in data.segments.items() if part.end is not None
    }
    if not seconds and (source / "utt2dur").is_file():
        durations: dict[str, str] = {}
        for _, _, utt, value in entries(source / "utt2dur", into=durations):
            durations[utt] = value
        try:
            seconds = {u: float(value) for u, value in durations.items() if u in data.wav_scp}
        except ValueError:
            return ""
    complete = seconds and seconds.keys() == data.wav_scp.keys()
    return f", {sum(seconds.values()) / 3600:.1f} h" if complete else ""
