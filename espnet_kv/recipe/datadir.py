"""Kaldi data directories: wav.scp, segments, text, utt2spk, spk2utt."""

import functools
import os
import shutil
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from espnet_kv.cli import warn_each
from espnet_kv.errors import UserError
from espnet_kv.recipe.audio import file_of
from espnet_kv.recipe.kaldi import Segment, entries, read_segments, read_speakers, split_words

__all__ = ["DataDir", "Segment", "dropped_lines", "entries", "require_conserved"]


@dataclass
class DataDir:
    """One Kaldi data directory in memory. The keys of all maps are utterance ids.

    wav_scp: utterance -> path of an audio file, `file.ark:offset`, or a command that ends in `|`;
        for a segment, that of the whole recording.
    text: utterance -> transcript (words separated by single spaces).
    utt2spk: utterance -> speaker.
    segments: utterance -> part of a recording; no entry: the whole recording.
    """

    wav_scp: dict[str, str] = field(default_factory=dict)
    text: dict[str, str] = field(default_factory=dict)
    utt2spk: dict[str, str] = field(default_factory=dict)
    segments: dict[str, Segment] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path, *, allow_pipes: bool = False) -> "DataDir":
        """Read `path`; if `text` is missing, there are no transcripts.

        Relative audio paths are relative to the working directory or, if missing there, to the
        parent of `path`. The second case prints a line and makes the paths absolute.

        Args:
            allow_pipes: accept commands in wav.scp, which are run when the audio is read.

        Raises:
            UserError: wav.scp or both utt2spk and spk2utt are missing, or a line is malformed,
                repeats an utterance, or has a command; the message names file:line.
        """
        path = Path(path)
        if not path.is_dir():
            raise UserError(
                f"{path / 'wav.scp'} is missing, and so is its directory; check the path, or run "
                "the stage that writes it"
            )
        data = cls()
        recordings: dict[str, str] = {}
        for file, line, utt, audio in entries(path / "wav.scp", into=recordings):
            if not audio:
                raise UserError(f"{file}:{line}: expected `utterance path`, found only {utt!r}")
            if audio.endswith("|") and not allow_pipes:
                raise UserError(
                    f"{file}:{line}: {utt} is a pipe, a command that runs only with allow_pipes "
                    "true; or format the data first, so that wav.scp names audio files"
                )
            recordings[utt] = audio
        _find_relative(recordings, path)
        if (path / "segments").exists():
            segments = read_segments(path / "segments", recordings)
            data.wav_scp = {utt: recordings[part.recording] for utt, part in segments.items()}
            whole = {utt: Segment(utt, 0.0, None) for utt in segments}
            data.segments = {u: part for u, part in segments.items() if part != whole[u]}
        else:
            data.wav_scp = recordings
        if (path / "text").exists():
            for _, _, utt, words in entries(path / "text", into=data.text):
                data.text[utt] = split_words(words)
        data.utt2spk = read_speakers(path)
        return data

    def write(self, path: Path) -> None:
        """Replace the directory `path` and all of its files by this data, atomically.

        Raises:
            UserError: an id or a value cannot be written to a Kaldi file.
        """
        path = Path(path)
        new, old = (path.with_name(f".{path.name}.{tag}") for tag in ("new", "old"))
        for directory in (new, old):
            shutil.rmtree(directory, ignore_errors=True)
        new.mkdir(parents=True)
        try:
            self.write_files(new)
        except BaseException:
            shutil.rmtree(new)
            raise
        if path.exists():
            os.replace(path, old)
        os.replace(new, path)
        shutil.rmtree(old, ignore_errors=True)

    def write_files(self, directory: Path) -> None:
        """Write the Kaldi files, sorted in the C locale, into a directory.

        Empty `text` and `segments` are not written. Raises UserError as `write`.
        """
        spk2utt: dict[str, list[str]] = {}
        for utt in sorted(self.utt2spk):
            spk2utt.setdefault(self.utt2spk[utt], []).append(utt)
        recordings, segments = self._recordings()
        files = {
            "wav.scp": recordings,
            "segments": segments,
            "text": self.text,
            "utt2spk": self.utt2spk,
            "spk2utt": {speaker: " ".join(utts) for speaker, utts in spk2utt.items()},
        }
        for optional in ("segments", "text"):
            if not files[optional]:
                del files[optional]
        for name, table in files.items():
            with open(directory / name, "w", encoding="utf-8", newline="\n") as out:
                for key in sorted(table):  # code points sort as UTF-8 bytes do
                    if len(key.split()) != 1 or "\n" in table[key]:
                        raise UserError(f"{name}: cannot write {key!r}: {table[key]!r}")
                    out.write(f"{key} {table[key]}".rstrip(" ") + "\n")

    def _recordings(self) -> tuple[dict[str, str], dict[str, str]]:
        """The lines of wav.scp and of segments."""
        if not self.segments:
            return self.wav_scp, {}
        recordings: dict[str, str] = {}
        segments: dict[str, str] = {}
        for utt, audio in self.wav_scp.items():
            part = self.segments.get(utt, Segment(utt, 0.0, None))
            if recordings.setdefault(part.recording, audio) != audio:
                raise UserError(
                    f"wav.scp: recording {part.recording} would be {recordings[part.recording]} "
                    f"and {audio}; give each recording its own id"
                )
            end = -1 if part.end is None else part.end
            segments[utt] = f"{part.recording} {part.start!r} {end!r}"
        return recordings, segments

    def subset(self, keys: Iterable[str]) -> "DataDir":
        """Only the utterances `keys`. Raises KeyError if one has no audio."""
        keys = list(keys)
        return DataDir(
            wav_scp={utt: self.wav_scp[utt] for utt in keys},
            text={utt: self.text[utt] for utt in keys if utt in self.text},
            utt2spk={utt: self.utt2spk[utt] for utt in keys if utt in self.utt2spk},
            segments={utt: self.segments[utt] for utt in keys if utt in self.segments},
        )

    def by_recording(self) -> dict[str, list[str]]:
        """wav.scp entry -> its utterances, to decode each recording once."""
        recordings: dict[str, list[str]] = {}
        for utt, entry in self.wav_scp.items():
            recordings.setdefault(entry, []).append(utt)
        return recordings

    @classmethod
    def combine(cls, dirs: Iterable["DataDir"]) -> "DataDir":
        """All utterances of `dirs`. Raises UserError if two of them share an id."""
        result = cls()
        for data in dirs:
            shared = result.wav_scp.keys() & data.wav_scp.keys()
            if shared:
                raise UserError(
                    f"{len(shared)} utterance ids occur in two of the data directories to "
                    f"combine (first: {min(shared)}); give each utterance its own id"
                )
            result.wav_scp |= data.wav_scp
            result.text |= data.text
            result.utt2spk |= data.utt2spk
            result.segments |= data.segments
        return result

    def check(self, name: str, *, keep_all: bool = False) -> tuple["DataDir", dict[str, str]]:
        """Drop utterances that cannot be trained on, with a warning on stderr.

        Args:
            name: name of the data in the warnings.
            keep_all: for test sets: keep empty transcripts, and raise an error for utterances that
                cannot be scored.

        Returns:
            The clean data, and utterance -> reason for the dropped utterances.

        Raises:
            UserError: no utterance is left, or with `keep_all` one would be dropped.
        """
        dropped: dict[str, str] = {}
        for utt in sorted(self.wav_scp.keys() | self.text.keys()):
            if utt not in self.wav_scp:
                dropped[utt] = "no audio"
            elif utt not in self.text:
                dropped[utt] = "no transcript"
            elif not self.text[utt].strip() and not keep_all:
                dropped[utt] = "empty transcript"
            elif not self.utt2spk.get(utt):
                dropped[utt] = "no speaker"
        clean = self.subset(utt for utt in sorted(self.wav_scp) if utt not in dropped)
        reasons = ", ".join(f"{n} {why}" for why, n in sorted(Counter(dropped.values()).items()))
        if not clean.wav_scp:
            raise UserError(f"{name}: no usable utterance ({reasons or 'the directory is empty'})")
        total = len(dropped) + len(clean.wav_scp)
        if keep_all:
            refuse_dropped(name, dropped, total)
        warn_each(name, dropped, f"of {total} utterances dropped ({reasons})")
        return clean, dropped


def refuse_dropped(name: str, dropped: Mapping[str, str], total: int) -> None:
    """Stop if a test set would lose utterances.

    Raises:
        UserError: `dropped` is not empty; names up to three utterances and reasons.
    """
    if dropped:
        first = "; ".join(f"{utt}: {dropped[utt]}" for utt in list(dropped)[:3])
        more = f"; and {len(dropped) - 3} more" if len(dropped) > 3 else ""
        raise UserError(
            f"{name}: {len(dropped)} of {total} utterances of a test set cannot be used "
            f"({first}{more}); fix them, or remove their lines from the data directory"
        )


def require_conserved(
    name: str, before: Iterable[str], kept: Collection[str], dropped: Collection[str]
) -> None:
    """Check that each utterance was either kept or dropped.

    Raises:
        RuntimeError: utterances were lost, added, or both kept and dropped.
    """
    before, after = set(before), Counter([*kept, *dropped])
    wrong = sorted(before ^ after.keys()) + sorted(utt for utt, n in after.items() if n > 1)
    if wrong:
        raise RuntimeError(
            f"{name}: {len(before)} utterances became {len(kept)} kept and {len(dropped)} "
            f"dropped; the first that is lost or counted twice: {wrong[0]}"
        )


def dropped_lines(dropped: Mapping[str, str]) -> str:
    """The content of a file `dropped`: sorted lines of utterance and reason."""
    return "".join(f"{utt} {dropped[utt]}\n" for utt in sorted(dropped))


def _find_relative(recordings: dict[str, str], directory: Path) -> None:
    """Make paths absolute that are relative to the parent of the data directory."""
    parent = directory.absolute().parent
    found = 0
    for key, entry in recordings.items():
        file = file_of(entry)
        if file is None or os.path.isabs(file) or os.path.exists(file):
            continue
        if os.path.exists(parent / file):
            recordings[key] = str(parent / entry)
            found += 1
    if found:
        _say_once(f"  {directory / 'wav.scp'}: {found} relative paths count from {parent}")


@functools.cache
def _say_once(line: str) -> None:
    print(line, flush=True)


def add_data(data: DataDir, directory: Path) -> None:
    """Write the Kaldi files of `data` into `directory`, and keep its other files."""
    data.write(directory / "kaldi")  # DataDir.write replaces a whole directory
    for file in (directory / "kaldi").iterdir():
        file.replace(directory / file.name)
    (directory / "kaldi").rmdir()
