"""The digits corpus: strings of digits from recordings of the free-spoken-digit-dataset.

Single digits of a few speakers (8 kHz, CC BY-SA 4.0) are joined to strings of 3 to 7, with pauses
and a little noise. Training, dev and test sets use different recordings. The corpus is a tree in
LibriSpeech's layout, so that it is prepared like real data.
"""

import dataclasses
import functools
import random
import re
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from espnet_kv.errors import UserError
from espnet_kv.recipe.audio import AudioError, read_audio_at
from espnet_kv.recipe.corpora.download import fetch_and_extract
from espnet_kv.recipe.corpora.tree import SAMPLE_RATE, build_tree, is_built

URL = "https://github.com/Jakobovski/free-spoken-digit-dataset/archive/refs/tags/v1.0.10.tar.gz"
_INSTEAD = "give the folder of a checkout of the free-spoken-digit-dataset"
_VERSION = 1  # increase it when the same options give other samples
_WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
# Number of the first and the last recording of each digit; None: no limit.
_RECORDINGS: dict[str, tuple[int, int | None]] = {
    "train-clean-100": (10, None),
    "dev-clean": (5, 9),
    "dev-other": (5, 9),
    "test-clean": (0, 4),
    "test-other": (0, 4),
}


@dataclass(frozen=True)
class DigitsOptions:
    """Sizes in strings per speaker. `dev` is the size of dev-clean and of dev-other, `test` that of
    test-clean and of test-other."""

    train: int = 250
    dev: int = 15
    test: int = 30
    seed: int = 20261123

    def __post_init__(self) -> None:
        for name in ("train", "dev", "test"):
            if getattr(self, name) < 1:
                raise UserError(f"digits option {name}={getattr(self, name)}: must be at least 1")
        if self.seed < 0:
            raise UserError(f"digits option seed={self.seed}: must not be negative")


@dataclass(frozen=True)
class Utterance:
    """One string of digits. path: file of the audio, relative to the tree."""

    id: str
    path: Path
    words: str
    clips: tuple[Path, ...]
    seed: int


def download(into: Path) -> Path:
    """Download and extract the dataset once; return the folder of its recordings.

    Raises:
        UserError: as `fetch_and_extract`, or the archive has no recordings.
    """
    fetch_and_extract(URL, into, into / "recordings.complete", instead=_INSTEAD)
    folders = sorted(into.glob("free-spoken-digit-dataset*/recordings"))
    if not folders:
        raise UserError(f"{into} holds no free-spoken-digit-dataset*/recordings: {_INSTEAD}")
    return folders[-1]


def plan(source: Path, options: DigitsOptions) -> list[Utterance]:
    """Choose the utterances of the corpus.

    Raises:
        UserError: `source` has no recordings, or needed recordings of a speaker are missing.
    """
    clips = _clips(source)
    utterances = []
    for chapter, (subset, (first, last)) in enumerate(_RECORDINGS.items(), 101):
        size = getattr(options, subset.split("-")[0])
        for speaker in sorted({speaker for speaker, _ in clips}):
            choice = []
            for digit, word in enumerate(_WORDS):
                numbered = clips.get((speaker, digit), {})
                span = [n for n in sorted(numbered) if first <= n and (last is None or n <= last)]
                if not span:
                    wanted = f"{first} to {last}" if last is not None else f"{first} or more"
                    raise UserError(
                        f"{source}: {subset} needs a recording {digit}_{speaker}_N.wav of {word} "
                        f"with N {wanted}; give a complete checkout"
                    )
                choice.append([numbered[n] for n in span])
            draw = random.Random(f"{options.seed} {subset} {speaker}")
            for number in range(size):
                digits = [draw.randrange(10) for _ in range(draw.randint(3, 7))]
                utt = f"{speaker}-{chapter}-{number:04d}"
                utterances.append(
                    Utterance(
                        utt,
                        Path(subset, speaker, str(chapter), f"{utt}.flac"),
                        " ".join(_WORDS[digit] for digit in digits),
                        tuple(draw.choice(choice[digit]) for digit in digits),
                        options.seed,
                    )
                )
    return utterances


def render(utterance: Utterance) -> np.ndarray:
    """Join the digits of an utterance to int16 samples (N,) at SAMPLE_RATE.

    Raises:
        UserError: a recording cannot be read.
    """
    rng = np.random.default_rng([utterance.seed, zlib.crc32(utterance.id.encode())])

    def pause(least: float) -> np.ndarray:
        return np.zeros(int(SAMPLE_RATE * rng.uniform(least, 0.2)))

    parts = [pause(0.05)]
    for path in utterance.clips:
        parts += [_read_clip(path), pause(0.025)]
    speech = np.concatenate(parts)
    noise = 10 ** rng.uniform(-3.3, -2.3) * rng.standard_normal(len(speech))
    return np.clip(np.rint(32767 * (speech + noise)), -32768, 32767).astype(np.int16)


@functools.lru_cache(maxsize=4096)  # all recordings of the dataset, each used many times
def _read_clip(path: Path) -> np.ndarray:
    try:
        clip = read_audio_at(str(path), SAMPLE_RATE).samples
    except AudioError as error:
        raise UserError(f"{error}; give a complete checkout") from None
    # Half of full scale, so that the level does not identify speaker or digit.
    return 0.5 * clip / max(float(np.abs(clip).max()), 1e-4)


def generate(tree: Path, source: Path, options: DigitsOptions, nj: int = 1) -> None:
    """Write the corpus to the folder `tree` with `nj` processes, unless it exists.

    The audio does not depend on `nj`. A tree with other options or recordings is replaced.

    Args:
        source: a checkout of the dataset, or its folder `recordings`.

    Raises:
        UserError: as `plan` and `render`, or `tree` has other contents.
    """
    utterances = plan(source, options)
    recordings = sorted({clip.name for utterance in utterances for clip in utterance.clips})
    content = zlib.crc32(
        b"".join(f"{clip} ".encode() for clip in recordings)
        + b"".join((_folder(source) / clip).read_bytes() for clip in recordings)
    )
    stamp = {"version": _VERSION, "recordings": content, **dataclasses.asdict(options)}
    if not is_built(tree, "digits", stamp):
        build_tree(tree, "digits", stamp, utterances, render, nj)


def _folder(source: Path) -> Path:
    return source / "recordings" if (source / "recordings").is_dir() else source


def _clips(source: Path) -> dict[tuple[str, int], dict[int, Path]]:
    """(speaker, digit) -> number -> file."""
    clips: dict[tuple[str, int], dict[int, Path]] = {}
    for path in sorted(_folder(source.absolute()).glob("*.wav")):
        if match := re.fullmatch(r"(\d)_([A-Za-z0-9]+)_(\d+)\.wav", path.name):
            digit, speaker, number = match.groups()
            clips.setdefault((speaker, int(digit)), {})[int(number)] = path
    if not clips:
        raise UserError(
            f"{source} holds no recordings/DIGIT_SPEAKER_NUMBER.wav: {_INSTEAD}, or none to "
            "download it"
        )
    return clips
