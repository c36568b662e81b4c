"""Reading of Kaldi's files: ids, transcripts and segments."""

import codecs
import math
import re
import unicodedata
from collections.abc import Collection, Container, Iterator, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path

from espnet_kv.errors import UserError

# Spaces of sentencepiece in addition to those of str.split() (NBSP, U+3000, ...).
_SPACES = str.maketrans(dict.fromkeys("\u200b\u200c\u200e\u200f\u2581\ufeff", " "))
# Characters that sentencepiece removes or that result from a wrong encoding.
_BROKEN = re.compile("[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\ufffd]")


@dataclass(frozen=True)
class Segment:
    """The part of a recording that is one utterance: a line of `segments`.

    recording: id of the recording in wav.scp.
    start, end: seconds; end None: the end of the recording.
    where: file:line, for messages.
    """

    recording: str
    start: float
    end: float | None
    where: str = field(default="", compare=False)


def split_words(text: str) -> str:
    """Normalise white space: the words of `text`, separated by single spaces.

    White space includes all spaces of Python, ESPnet and sentencepiece (NBSP, U+3000, tabs,
    zero-width spaces, `▁`), so that references have the same words as hypotheses.
    """
    return " ".join(text.translate(_SPACES).split())


def entries(
    file: Path, into: Collection[str], *, may_be_empty: bool = False
) -> Iterator[tuple[Path, int, str, str]]:
    """Read `KEY VALUE` lines: yields (file, line number, key, value, which may be empty).

    Lines may end in LF or CRLF, and blank lines at the end are allowed. Any white space separates
    key and value. A byte order mark is removed.

    Args:
        into: keys so far; the caller adds the yielded keys to it.

    Raises:
        UserError: the file is missing, empty or not UTF-8, a line is empty or has a control
            character, or its key is in `into`.
    """
    blank, empty, last = 0, True, chr(0x10FFFF) if into else ""
    for line, entry in enumerate(_lines(file), 1):
        if not entry.strip():
            blank = blank or line
            continue
        key, *rest = entry.lstrip("\ufeff").split(maxsplit=1) or [""]
        if blank or not key:
            raise UserError(f"{file}:{blank or line}: empty line; remove it")
        if broken := _BROKEN.search(entry):
            raise UserError(
                f"{file}:{line}: utterance {_shown(key)} has the character "
                f"U+{ord(broken[0]):04X}, which is not text; remove it or fix the encoding"
            )
        if not key.isascii() and any(unicodedata.category(char) == "Cf" for char in key):
            raise UserError(
                f"{file}:{line}: the id {_shown(key)} has an invisible character; remove it"
            )
        if key <= last and key in into:  # most files are sorted
            raise UserError(f"{file}:{line}: utterance {key} occurs twice; keep one of the lines")
        empty, last = False, max(last, key)
        yield file, line, key, rest[0].strip() if rest else ""
    if empty and not may_be_empty:
        raise UserError(f"{file} is empty")


def read_segments(
    file: Path, recordings: Container[str], into: MutableMapping[str, Segment]
) -> None:
    """Read a file `segments` into `into`: utterance -> its part of a recording.

    Raises:
        UserError: as `entries`; a line is not `utterance recording start end`, its recording is
            not in `recordings`, or its end (-1: end of the recording) is not after its start.
    """
    for _, line, utt, value in entries(file, into=into):
        where = f"{file}:{line}"
        try:
            recording, *times = value.split()
            start, end = map(float, times)
            if not (math.isfinite(start) and math.isfinite(end)):
                raise ValueError
        except ValueError:
            raise UserError(
                f"{where}: expected `utterance recording start end`, got {f'{utt} {value}'!r}"
            ) from None
        if recording not in recordings:
            raise UserError(f"{where}: recording {recording} of {utt} is not in wav.scp")
        if start < 0 or (end <= start and end != -1):
            raise UserError(
                f"{where}: {utt} lasts from {start:g} s to {end:g} s; the start must be at least "
                "0 and the end after it, or -1 for the end of the recording"
            )
        into[utt] = Segment(recording, start, None if end == -1 else end, where)


def read_speakers(directory: Path, into: MutableMapping[str, str]) -> None:
    """Read utt2spk, or spk2utt if it is missing, into `into`: utterance -> speaker.

    Raises:
        UserError: as `entries`; both files are missing, or a line is malformed.
    """
    path, inverse = directory / "utt2spk", directory / "spk2utt"
    if path.exists() or not inverse.exists():
        try:
            for file, line, utt, speaker in entries(path, into=into):
                if len(speaker.split()) != 1:
                    raise UserError(f"{file}:{line}: expected `utterance speaker`, got {speaker!r}")
                into[utt] = speaker
        except UserError:
            if path.exists() or not directory.is_dir():
                raise
            raise UserError(
                f"{path} is missing, and so is spk2utt; where speakers are unknown, make every "
                "utterance a speaker of its own (lines `utterance utterance`)"
            ) from None
        return
    seen: set[str] = set()
    for file, line, speaker, utts in entries(inverse, into=seen):
        seen.add(speaker)
        for utt in utts.split():
            if utt in into:
                raise UserError(f"{file}:{line}: utterance {utt} occurs twice; keep one of them")
            into[utt] = speaker


def _lines(file: Path) -> Iterator[str]:
    """The lines of a text file of any size."""
    try:
        with file.open("rb") as content:
            if content.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
                raise UserError(f"{file}: UTF-16, not UTF-8; convert it: iconv -f UTF-16 -t UTF-8")
        with file.open(encoding="utf-8") as lines:
            yield from lines
    except FileNotFoundError:
        raise UserError(f"{file} is missing; run the stage that writes {file.parent}") from None
    except IsADirectoryError:
        raise UserError(f"{file} is a directory, where a file should be") from None
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(
            f"{file}: not UTF-8 at {_first_not_utf8(file)}; convert it first, for example: iconv "
            "-f LATIN1 -t UTF-8"
        ) from None


def _first_not_utf8(file: Path) -> str:
    begin = 0
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                return f"byte {begin + error.start} (line {number})"
            begin += len(line)
    return f"byte {begin}"


def _shown(key: str) -> str:
    return key if key.isprintable() else ascii(key)
