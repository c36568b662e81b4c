"""Types of the options of the recipe."""

import argparse
import math
import shlex
from pathlib import Path

import humanfriendly


def path_or_none(text: str) -> Path | None:
    """A path; None for an empty text."""
    return Path(text) if text else None


def hertz(text: str) -> int:
    """16000, or as ESPnet's asr.sh writes it, 16k."""
    try:
        rate = humanfriendly.parse_size(text)
    except humanfriendly.InvalidSize:
        rate = 0
    if rate < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no sampling rate, such as 16000 or 16k")
    return rate


def tag(text: str) -> str:
    """A part of a directory's name."""
    if text in (".", "..") or "/" in text or "\0" in text:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be part of a directory's name")
    return text


def shell_words(text: str) -> str:
    """Words, such as options of another command, quoted as in a shell."""
    try:
        shlex.split(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {str(error).lower()}") from error
    return text


def seconds(text: str) -> float:
    """A length of time."""
    length = float(text)
    if not (math.isfinite(length) and length >= 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")
    return length


def share(text: str) -> float:
    """A part of a whole."""
    part = float(text)
    if not 0 < part <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not above 0 and at most 1")
    return part
