"""Kaldi data directories: wav.scp, segments, text, utt2spk, spk2utt."""

import functools
import heapq
import os
import shutil
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from itertools import groupby, islice
from pathlib import Path
from typing import Any

from espnet_kv.cli import warn_each
from espnet_kv.errors import UserError
from espnet_kv.files import read_text
from espnet_kv.recipe.audio import file_of
from espnet_kv.recipe.disk_table import Table
from espnet_kv.recipe.kaldi import Segment, entries, read_segments, read_speakers, split_words

__all__ = ["DataDir", "Segment", "entries", "require_conserved", "write_lines"]


@dataclass
class DataDir:
    """One Kaldi data directory in memory, or in tables on disk. All keys are utterance ids.

    wav_scp: utterance -> path of an audio file, `file.ark:offset`, or a command that ends in `|`;
        for a segment, that of the whole recording.
    text: utterance -> transcript (words separated by single spaces).
    utt2spk: utterance -> speaker.
    segments: utterance -> part of a recording; no entry: the whole recording.
    """

    wav_scp: MutableMapping[str, str] = field(default_factory=dict)
    text: MutableMapping[str, str] = field(default_factory=dict)
    utt2spk: MutableMapping[str, str] = field(default_factory=dict)
    segments: MutableMapping[str, Segment] = field(default_factory=dict)

    @classmethod
    def on_disk(cls) -> "DataDir":
        """An empty one whose memory does not grow with the number of utterances."""
        return cls(Table(), Table(), Table(), Table())

    @classmethod
    def read(cls, path: Path, *, allow_pipes: bool = False, on_disk: bool = False) -> "DataDir":
        """Read `path`; if `text` is missing, there are no transcripts.

        Relative audio paths are relative to the working directory or, if missing there, to the
        parent of `path`. The second case prints a line and makes the paths absolute.

        Args:
            allow_pipes: accept commands in wav.scp, which are run when the audio is read.
            on_disk: keep the tables on disk.

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
        data = cls.on_disk() if on_disk else cls()
        recordings = data._like(data.wav_scp)
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
            segments = data._like(data.segments)
            read_segments(path / "segments", recordings, segments)
            for utt, part in segments.items():
                data.wav_scp[utt] = recordings[part.recording]
                if part != Segment(utt, 0.0, None):
                    data.segments[utt] = part
        else:
            data.wav_scp = recordings
        if (path / "text").exists():
            for _, _, utt, words in entries(path / "text", into=data.text):
                data.text[utt] = split_words(words)
        read_speakers(path, data.utt2spk)
        return data

    @staticmethod
    def _like[Value](table: MutableMapping[str, Value]) -> MutableMapping[str, Value]:
        """An empty table of the same kind."""
        return type(table)()

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
        speakers = self._like(self.utt2spk)
        for utt, speaker in self.utt2spk.items():
            speakers[f"{speaker}\0{utt}"] = ""
        files: dict[str, Iterable[tuple[str, str]]] = {
            "wav.scp": _sorted(self.wav_scp),
            "text": _sorted(self.text),
            "utt2spk": _sorted(self.utt2spk),
            "spk2utt": ((name, " ".join(utts)) for name, utts in _grouped(speakers)),
        }
        if self.segments:
            files["wav.scp"] = _sorted(self._recordings())
            files["segments"] = ((utt, self._part(utt)) for utt in in_order(self.wav_scp))
        if not self.text:
            del files["text"]
        for name, table in files.items():
            write_lines(directory / name, table)

    def _recordings(self) -> MutableMapping[str, str]:
        """The lines of wav.scp where there are segments."""
        recordings = self._like(self.wav_scp)
        for utt, audio in self.wav_scp.items():
            recording = self.segments[utt].recording if utt in self.segments else utt
            if recordings.setdefault(recording, audio) != audio:
                raise UserError(
                    f"wav.scp: recording {recording} would be {recordings[recording]} "
                    f"and {audio}; give each recording its own id"
                )
        return recordings

    def _part(self, utt: str) -> str:
        """The line of segments of one utterance, without its id."""
        part = self.segments.get(utt, Segment(utt, 0.0, None))
        return f"{part.recording} {part.start!r} {-1 if part.end is None else part.end!r}"

    def subset(self, keys: Iterable[str]) -> "DataDir":
        """Only the utterances `keys`. Raises KeyError if one has no audio."""
        kept = DataDir(*map(self._like, self._tables()))
        for utt in keys:
            kept.wav_scp[utt] = self.wav_scp[utt]
            for ours, theirs in zip(self._tables()[1:], kept._tables()[1:], strict=True):
                if utt in ours:
                    theirs[utt] = ours[utt]
        return kept

    def update(self, data: "DataDir") -> None:
        """Add the utterances of `data`."""
        for ours, theirs in zip(self._tables(), data._tables(), strict=True):
            ours.update(theirs)

    def _tables(self) -> tuple[MutableMapping[str, Any], ...]:
        return self.wav_scp, self.text, self.utt2spk, self.segments

    def utterances(self) -> Iterator[str]:
        """The sorted ids of all that have audio or a transcript."""
        both = heapq.merge(in_order(self.wav_scp), in_order(self.text))
        return (utt for utt, _ in groupby(both))

    def recordings(self) -> Iterator[tuple[str, list[str]]]:
        """Entries of wav.scp with their utterances, to decode each recording once.

        They are sorted by utterance, because paths depend on where the data lies.
        """
        firsts, pairs = self._like(self.wav_scp), self._like(self.wav_scp)
        for utt, entry in _sorted(self.wav_scp):
            pairs[f"{firsts.setdefault(entry, utt)}\0{utt}"] = ""
        return ((self.wav_scp[first], list(utts)) for first, utts in _grouped(pairs))

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
            result.update(data)
        return result

    def check(
        self, name: str, *, keep_all: bool = False
    ) -> tuple["DataDir", MutableMapping[str, str]]:
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
        dropped = self._like(self.text)
        for utt in self.utterances():
            if utt not in self.wav_scp:
                dropped[utt] = "no audio"
            elif utt not in self.text:
                dropped[utt] = "no transcript"
            elif not self.text[utt].strip() and not keep_all:
                dropped[utt] = "empty transcript"
            elif not self.utt2spk.get(utt):
                dropped[utt] = "no speaker"
        clean = self
        if dropped:
            clean = self.subset(utt for utt in in_order(self.wav_scp) if utt not in dropped)
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
        first = "; ".join(f"{utt}: {dropped[utt]}" for utt in islice(dropped, 3))
        more = f"; and {len(dropped) - 3} more" if len(dropped) > 3 else ""
        raise UserError(
            f"{name}: {len(dropped)} of {total} utterances of a test set cannot be used "
            f"({first}{more}); fix them, or remove their lines from the data directory"
        )


def require_keys(files: Mapping[str, Path], dump: Path, way_out: str) -> None:
    """Check that the lines of files are of the utterances of a data directory, one for each.

    Args:
        files: by their names in the message. way_out: what to do otherwise.

    Raises:
        UserError: an utterance is missing, unknown, or there twice.
    """
    wanted = DataDir.read(dump).wav_scp.keys()
    for name, file in files.items():
        found = [words[0] for line in read_text(file).splitlines() if (words := line.split())]
        if len(found) != len(wanted) or set(found) != wanted:
            differ = sorted(wanted ^ set(found)) or ["one of them twice"]
            raise UserError(
                f"{name} has {len(found)} utterances where {dump} has {len(wanted)} (the first "
                f"that differs: {differ[0]}): {way_out}"
            )


def require_conserved(
    name: str, before: Iterable[str], kept: Collection[str], dropped: Collection[str]
) -> None:
    """Check that each utterance was either kept or dropped.

    Raises:
        RuntimeError: utterances were lost, added, or both kept and dropped.
    """
    number, wrong = 0, ""
    for utt in before:
        number += 1
        if (utt in kept) == (utt in dropped):
            wrong = wrong or f" (the first: {utt})"
    if wrong or len(kept) + len(dropped) != number:
        raise RuntimeError(
            f"{name}: utterances were lost or counted twice{wrong}: {number} became {len(kept)} "
            f"kept and {len(dropped)} dropped"
        )


def in_order(table: Mapping[str, Any]) -> Iterable[str]:
    """The sorted keys of a table."""
    return table if isinstance(table, Table) else sorted(table)


def _grouped(pairs: Mapping[str, Any]) -> Iterator[tuple[str, Iterator[str]]]:
    """The sorted keys `NAME\\0UTTERANCE` of a table by their names."""
    names = groupby(in_order(pairs), key=lambda key: key.partition("\0")[0])
    return ((name, (key.partition("\0")[2] for key in keys)) for name, keys in names)


def _sorted[Value](table: Mapping[str, Value]) -> Iterable[tuple[str, Value]]:
    # code points sort as UTF-8 bytes do, as in the C locale
    return table.items() if isinstance(table, Table) else sorted(table.items())


def write_lines(file: Path, table: Mapping[str, object] | Iterable[tuple[str, object]]) -> None:
    """Write a Kaldi file: `KEY VALUE` lines, those of a mapping sorted by key.

    Raises:
        UserError: a key or a value cannot be written to a Kaldi file.
    """
    rows = _sorted(table) if isinstance(table, Mapping) else table
    with file.open("w", encoding="utf-8", newline="\n") as out:
        for key, value in rows:
            line = f"{key} {value}".rstrip(" ")
            if len(key.split()) != 1 or "\n" in line:
                raise UserError(f"{file.name}: cannot write {key!r}: {value!r}")
            out.write(f"{line}\n")


def _find_relative(recordings: MutableMapping[str, str], directory: Path) -> None:
    """Make paths absolute that are relative to the parent of the data directory."""
    parent = directory.absolute().parent
    found = type(recordings)()
    for key, entry in recordings.items():
        file = file_of(entry)
        if file is None or os.path.isabs(file) or os.path.exists(file):
            continue
        if os.path.exists(parent / file):
            found[key] = str(parent / entry)
    recordings.update(found)
    if found:
        _say_once(f"  {directory / 'wav.scp'}: {len(found)} relative paths count from {parent}")


@functools.cache
def _say_once(line: str) -> None:
    print(line, flush=True)
