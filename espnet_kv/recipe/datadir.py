"""Kaldi data directories: wav.scp, text, utt2spk, spk2utt."""

import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from espnet_kv.errors import UserError
from espnet_kv.recipe.progress import warn_each


@dataclass
class DataDir:
    """One Kaldi data directory in memory. Keys of every map are utterance ids.

    wav_scp: utterance -> path of an audio file, or `file.ark:offset`.
    text: utterance -> transcript (words split by single spaces).
    utt2spk: utterance -> speaker.
    """

    wav_scp: dict[str, str] = field(default_factory=dict)
    text: dict[str, str] = field(default_factory=dict)
    utt2spk: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> "DataDir":
        """Read `path`; a data directory without `text` gives an empty one.

        Raises:
            UserError: wav.scp or utt2spk is missing, or a line is malformed, repeats an
                utterance, or holds a pipe command; the message says file:line.
        """
        path = Path(path)
        data = cls()
        for file, line, utt, audio in entries(path / "wav.scp", into=data.wav_scp):
            if not audio:
                raise UserError(f"{file}:{line}: expected `utterance path`, found only {utt!r}")
            if audio.endswith("|"):
                raise UserError(
                    f"{file}:{line}: {utt} is a pipe command, which is not run here; "
                    "format the data first, so that wav.scp names audio files"
                )
            data.wav_scp[utt] = audio
        if (path / "text").exists():
            for _, _, utt, words in entries(path / "text", into=data.text):
                data.text[utt] = " ".join(words.split())
        for file, line, utt, speaker in entries(path / "utt2spk", into=data.utt2spk):
            if len(speaker.split()) != 1:
                raise UserError(f"{file}:{line}: expected `utterance speaker`, got {speaker!r}")
            data.utt2spk[utt] = speaker
        return data

    def write(self, path: Path) -> None:
        """Replace the directory `path` by this data, in one step.

        Whatever else lay in the directory described the old data and goes with it.

        Raises:
            UserError: an id or a value cannot stand in a Kaldi file.
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
        """Write the Kaldi files, sorted as Kaldi wants it (C locale), into a directory.

        `text` is left out where there are no transcripts. Raises UserError as `write`.
        """
        spk2utt: dict[str, list[str]] = {}
        for utt in sorted(self.utt2spk):
            spk2utt.setdefault(self.utt2spk[utt], []).append(utt)
        files = {
            "wav.scp": self.wav_scp,
            "text": self.text,
            "utt2spk": self.utt2spk,
            "spk2utt": {speaker: " ".join(utts) for speaker, utts in spk2utt.items()},
        }
        if not self.text:
            del files["text"]
        for name, entries in files.items():
            with open(directory / name, "w", encoding="utf-8", newline="\n") as out:
                for key in sorted(entries):  # code points sort as UTF-8 bytes do
                    if len(key.split()) != 1 or "\n" in entries[key]:
                        raise UserError(f"{name}: cannot write {key!r}: {entries[key]!r}")
                    out.write(f"{key} {entries[key]}".rstrip(" ") + "\n")

    def subset(self, keys: Iterable[str]) -> "DataDir":
        """The utterances `keys` alone. Raises KeyError where one has no audio."""
        keys = list(keys)
        return DataDir(
            wav_scp={utt: self.wav_scp[utt] for utt in keys},
            text={utt: self.text[utt] for utt in keys if utt in self.text},
            utt2spk={utt: self.utt2spk[utt] for utt in keys if utt in self.utt2spk},
        )

    @classmethod
    def combine(cls, dirs: Iterable["DataDir"]) -> "DataDir":
        """All utterances of `dirs`. Raises UserError where two of them share an id."""
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
        return result

    def check(self, name: str) -> tuple["DataDir", dict[str, str]]:
        """Drop utterances that cannot be trained on or scored, with a warning on stderr.

        Args:
            name: what the data is called in the warnings.

        Returns:
            The clean data, and utterance -> reason for what was dropped.

        Raises:
            UserError: nothing is left.
        """
        dropped: dict[str, str] = {}
        for utt in sorted(self.wav_scp.keys() | self.text.keys()):
            if utt not in self.wav_scp:
                dropped[utt] = "no audio"
            elif utt not in self.text:
                dropped[utt] = "no transcript"
            elif not self.text[utt].strip():
                dropped[utt] = "empty transcript"
            elif not self.utt2spk.get(utt):
                dropped[utt] = "no speaker"
        clean = self.subset(utt for utt in sorted(self.wav_scp) if utt not in dropped)
        reasons = ", ".join(f"{n} {why}" for why, n in sorted(Counter(dropped.values()).items()))
        if not clean.wav_scp:
            raise UserError(f"{name}: no usable utterance ({reasons or 'the directory is empty'})")
        total = len(dropped) + len(clean.wav_scp)
        warn_each(name, dropped, f"of {total} utterances dropped ({reasons})")
        return clean, dropped


def entries(file: Path, into: dict[str, str]) -> Iterator[tuple[Path, int, str, str]]:
    """Read `KEY VALUE` lines: yields (file, line number, key, value, which may be empty).

    Raises:
        UserError: the file is missing, empty or not UTF-8, a line is empty, or its key is in
            `into`, to which the caller adds what it is given.
    """
    try:
        content = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{file} is missing; run the stage that writes {file.parent}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 at byte {error.start}; convert it first") from None
    for line, entry in enumerate(content.removesuffix("\n").split("\n"), 1):
        key, *rest = entry.split(maxsplit=1) or [""]
        if not key:
            if not content:
                raise UserError(f"{file} is empty")
            raise UserError(f"{file}:{line}: empty line; remove it")
        if key in into:
            raise UserError(f"{file}:{line}: utterance {key} occurs twice; keep one of the lines")
        yield file, line, key, rest[0].strip() if rest else ""
