"""Names of audio containers, and whether a file is truncated; libsndfile reads most such files
without an error."""

import os
import re
import struct
from collections.abc import Iterator
from itertools import islice
from typing import BinaryIO

CHECKED = {"WAV", "WAVEX", "RF64", "AIFF", "AU", "W64", "CAF", "FLAC", "OGG", "MP3", "NIST"}
"""libsndfile's names of the containers that `is_cut_short` (or the decoder) can check."""

# A program that writes into a pipe puts 0, or about 2 or 4 GiB, for the unknown size.
_STREAMED = 0x7F000000
_W64 = bytes.fromhex("726966662e91cf11a5d628db04c10000")  # `riff`, its GUID
_KBITS_V1 = (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)
_KBITS_V2 = (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)
_MP3_RATES = {3: (44100, 48000, 32000), 2: (22050, 24000, 16000), 0: (11025, 12000, 8000)}


_NAMES = (
    (rb"RIFF|RIFX|RF64|BW64", "WAV"),
    (re.escape(_W64), "W64"),
    (rb"FORM....AIF", "AIFF"),
    (rb"\.snd|dns\.", "AU"),
    (rb"caff", "CAF"),
    (rb"fLaC", "FLAC"),
    (rb"OggS", "Ogg"),
    (rb"NIST_1A", "NIST"),
    (rb"ID3[\x02-\x04]", "MP3"),
    (rb"....ftyp", "MPEG-4"),
    (rb"\x1aE\xdf\xa3", "WebM or Matroska"),
)


def container_of(start: bytes) -> str | None:
    """Name the container that a file with these first bytes is; None: none that is known.

    Args:
        start: 16 bytes or more; mp3 without tags is recognised from three frames.
    """
    for pattern, name in _NAMES:
        if re.match(pattern, start, re.DOTALL):
            return name
    return "MP3" if len(list(islice(_mp3_frames(start, 0), 3))) == 3 else None


def is_cut_short(stream: BinaryIO) -> bool:
    """Whether an audio file is shorter than stated in its header; False if it cannot be decided.

    flac is not checked here, because its decoder fails for truncated files.

    Args:
        stream: the seekable file, at any position.
    """
    size = stream.seek(0, os.SEEK_END)
    stream.seek(0)
    start = stream.read(16)
    if start[:4] in (b"RIFF", b"RF64", b"BW64", b"RIFX"):
        order = ">" if start[:4] == b"RIFX" else "<"
        return _data_end(stream, size, _chunks(stream, 12, f"{order}4sI"), (b"data",))
    if start[:4] == b"FORM":
        return _data_end(stream, size, _chunks(stream, 12, ">4sI"), (b"SSND",))
    if start == _W64:
        return _data_end(stream, size, _w64_chunks(stream), (b"data",))
    if start[:4] == b"caff":
        return _data_end(stream, size, _chunks(stream, 8, ">4sQ", pad=1), (b"data",))
    if start[:4] in (b".snd", b"dns."):
        offset, length = struct.unpack((">" if start[:1] == b"." else "<") + "II", start[4:12])
        return 0 < length < _STREAMED and offset + length > size
    if start[:4] == b"NIST":
        return _nist_end(stream) > size
    if start[:4] == b"OggS":
        return not _ends_with_last_ogg_page(stream, size)
    if start[:3] == b"ID3" or (len(start) > 1 and start[0] == 0xFF and start[1] & 0xE6 == 0xE2):
        return _mp3_end(stream) > size
    return False


def _chunks(
    stream: BinaryIO, position: int, header: str, pad: int = 2
) -> Iterator[tuple[bytes, int, int]]:
    """(name, first byte, length) of every chunk from `position` on."""
    length = struct.calcsize(header)
    while True:
        stream.seek(position)
        read = stream.read(length)
        if len(read) < length:
            return
        name, size = struct.unpack(header, read)
        yield name, position + length, size
        position += length + size + size % pad


def _w64_chunks(stream: BinaryIO) -> Iterator[tuple[bytes, int, int]]:
    position = 40
    while True:
        stream.seek(position)
        read = stream.read(24)
        if len(read) < 24:
            return
        size = struct.unpack("<Q", read[16:])[0]  # counts its own header
        yield read[:4], position + 24, max(size, 24) - 24
        position += max(24, (size + 7) // 8 * 8)


def _data_end(
    stream: BinaryIO, size: int, chunks: Iterator[tuple[bytes, int, int]], names: tuple[bytes, ...]
) -> bool:
    sizes_64 = None
    for name, start, length in chunks:
        if name == b"ds64":
            stream.seek(start)
            read = stream.read(16)
            sizes_64 = struct.unpack("<Q", read[8:16])[0] if len(read) == 16 else None
        elif name in names:
            if length == 0xFFFFFFFF and sizes_64:
                length = sizes_64
            elif length == 0 or _STREAMED <= length < 1 << 32 or length >= 1 << 63:
                return False
            return start + length > size
    return True


def _nist_end(stream: BinaryIO) -> int:
    stream.seek(8)
    try:
        header = int(stream.read(8))
        stream.seek(0)
        lines = map(str.split, stream.read(header).decode("latin-1").splitlines())
        fields = {line[0]: line[-1] for line in lines if len(line) == 3}
        sizes = [fields[f] for f in ("sample_count", "sample_n_bytes")]
        channels = fields.get("channel_count", "1")
        return header + int(sizes[0]) * int(sizes[1]) * int(channels)
    except (ValueError, KeyError):
        return 0


def _ends_with_last_ogg_page(stream: BinaryIO, size: int) -> bool:
    """Whether the last page is complete and has the flag of a last page."""
    start = max(0, size - 2 * 65307)  # two pages of the largest size
    stream.seek(start)
    tail = stream.read()
    page = tail.rfind(b"OggS")
    if page < 0 or len(tail) < page + 27:
        return False
    segments = tail[page + 27 : page + 27 + tail[page + 26]]
    complete = len(segments) == tail[page + 26] and (
        page + 27 + len(segments) + sum(segments) <= len(tail)
    )
    return complete and bool(tail[page + 5] & 4)


def _mp3_end(stream: BinaryIO) -> int:
    """The expected end of the last frame of layer III; data after the frames is ignored."""
    stream.seek(0)
    content = stream.read()
    position = 0
    if content[:3] == b"ID3" and len(content) >= 10:
        a, b, c, d = content[6:10]
        position = 10 + (a << 21 | b << 14 | c << 7 | d)
    for end in _mp3_frames(content, position):
        position = end
    return position


def _mp3_frames(content: bytes, position: int) -> Iterator[int]:
    """Yield the expected end of each frame of layer III from `position` on."""
    while position + 4 <= len(content):
        sync, flags, rates = content[position], content[position + 1], content[position + 2]
        version = flags >> 3 & 3
        if sync != 0xFF or flags & 0xE6 != 0xE2 or version == 1 or rates >> 2 & 3 == 3:
            break
        kbits = _KBITS_V1 if version == 3 else _KBITS_V2
        if rates >> 4 in (0, 15):
            break
        slots = 144000 if version == 3 else 72000
        rate = _MP3_RATES[version][rates >> 2 & 3]
        position += slots * kbits[rates >> 4] // rate + (rates >> 1 & 1)
        yield position
