"""The synth corpus: sentences of a small grammar, spoken by eSpeak NG in many voices.

It is a tree in LibriSpeech's layout, so that it is prepared like real data.
"""

import dataclasses
import itertools
import random
import zlib
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np

from espnet_kv.errors import UserError
from espnet_kv.recipe.corpora import acoustics, espeak
from espnet_kv.recipe.corpora.grammar import Grammar
from espnet_kv.recipe.corpora.tree import SAMPLE_RATE, build_tree, is_built

_VERSION = 1  # increase it when the same options give other samples


@dataclass(frozen=True)
class SynthOptions:
    """Sizes in utterances. `dev` is the size of dev-clean and of dev-other, `test` that of
    test-clean and of test-other."""

    train: int = 2400
    dev: int = 60
    test: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("train", "dev", "test"):
            if getattr(self, name) < 1:
                raise UserError(f"synth option {name}={getattr(self, name)}: must be at least 1")
        if self.seed < 0:
            raise UserError(f"synth option seed={self.seed}: must not be negative")


def _voices(accents: list[str], variants: list[str]) -> list[str]:
    return [f"gmw/{accent}{variant}" for variant in variants for accent in accents]


# test-clean and dev-clean use the voices of training. The voices of "other" have a variant (vocal
# tract and larynx) that training lacks, and half of them a new accent.
_SEEN = _voices(
    ["en-US", "en", "en-GB-x-rp", "en-US-nyc"],
    ["", "+m1", "+m3", "+m7", "+f2", "+f3"],
)
_UNSEEN = _voices(
    ["en-US", "en", "en-GB-x-gbclan", "en-GB-scotland"],
    ["+m2", "+m4", "+m8", "+f4", "+f5", "+klatt3"],
)


@dataclass(frozen=True)
class Condition:
    """Ranges of the uniform distributions for each utterance.

    rate: words a minute. pitch: steps of eSpeak's scale around the voice's own. snr: dB.
    rt60: seconds. reverb: energy of the room's tail, dB below the direct sound.
    """

    voices: list[str]
    rate: tuple[int, int]
    pitch: tuple[int, int]
    snr: tuple[float, float]
    rt60: tuple[float, float]
    reverb: tuple[float, float]


CLEAN = Condition(_SEEN, (175, 215), (-8, 8), (20, 35), (0.1, 0.25), (-22, -15))
OTHER = Condition(_UNSEEN, (160, 240), (-15, 15), (10, 25), (0.2, 0.4), (-12, -6))
CONDITIONS = {
    "train-clean-100": CLEAN,
    "dev-clean": CLEAN,
    "dev-other": OTHER,
    "test-clean": CLEAN,
    "test-other": OTHER,
}


@dataclass(frozen=True)
class Utterance:
    """One utterance. path: file of the audio, relative to the tree."""

    id: str
    path: Path
    words: str
    condition: Condition
    voice: str
    seed: int


def plan(options: SynthOptions) -> list[Utterance]:
    """Choose the utterances: different sentences, and all words of dev and test are in train.

    Raises:
        UserError: this is not possible with the given sizes.
    """
    sizes = [options.train, options.dev, options.dev, options.test, options.test]
    sentences = iter(_sentences(options.train, sum(sizes[1:]), options.seed))
    utterances = []
    for number, (subset, size) in enumerate(zip(CONDITIONS, sizes, strict=True), 1):
        condition = CONDITIONS[subset]
        order = list(enumerate(condition.voices, 100 if condition is CLEAN else 200))
        random.Random(f"{options.seed} {subset}").shuffle(order)
        speakers = itertools.islice(itertools.cycle(order), size)
        # A voice is a speaker; its utterances in one subset are a chapter.
        for index, (speaker, voice) in enumerate(speakers):
            chapter = f"{speaker}-{1000 * number + speaker}"
            utt = f"{chapter}-{index // len(order):04d}"
            path = Path(subset, *chapter.split("-"), f"{utt}.flac")
            utterances.append(Utterance(utt, path, next(sentences), condition, voice, options.seed))
    return utterances


def _sentences(train: int, held_out: int, seed: int) -> list[str]:
    grammar = Grammar(seed)
    sentences: dict[str, None] = {}  # an ordered set
    vocabulary: set[str] = set()
    for _ in range(300 * (train + held_out)):
        if len(sentences) == train + held_out:
            return list(sentences)
        sentence = grammar.sentence()
        if len(sentences) < train:
            vocabulary.update(sentence.split())
        elif not vocabulary.issuperset(sentence.split()):
            continue
        sentences[sentence] = None
    raise UserError(
        f"synth option train={train}: too few sentences to cover the words of {held_out} others, "
        "or more than the grammar has; use 50 to 20000"
    )


def render(utterance: Utterance) -> np.ndarray:
    """Synthesise an utterance with reverberation and noise; int16 samples (N,) at SAMPLE_RATE.

    The samples depend only on the utterance, not on earlier calls.
    """
    rng = np.random.default_rng([utterance.seed, zlib.crc32(utterance.id.encode())])
    condition = utterance.condition
    voice = espeak.Voice(
        utterance.voice,
        rate=int(rng.integers(*condition.rate, endpoint=True)),
        pitch=50 + int(rng.integers(*condition.pitch, endpoint=True)),
        pitch_range=int(rng.integers(35, 65, endpoint=True)),
    )
    speech = espeak.speak(utterance.words, voice) / 32768
    speech = acoustics.resample(speech, espeak.SAMPLE_RATE, SAMPLE_RATE)
    before, after = (int(seconds * SAMPLE_RATE) for seconds in rng.uniform(0.05, 0.2, size=2))
    signal = np.pad(speech, (before, after))
    signal = acoustics.reverberate(
        signal, rng.uniform(*condition.rt60), rng.uniform(*condition.reverb), SAMPLE_RATE, rng
    )
    kind = str(rng.choice(["white", "pink", "hum"]))
    signal = acoustics.add_noise(signal, kind, rng.uniform(*condition.snr), SAMPLE_RATE, rng)
    peak = 10 ** (rng.uniform(-12, -1) / 20)
    return np.round(signal * (32767 * peak / np.abs(signal).max())).astype(np.int16)


def generate(tree: Path, options: SynthOptions, nj: int = 1) -> None:
    """Write the corpus to the folder `tree` with `nj` processes, unless it exists.

    The audio does not depend on `nj`. A tree with other options is replaced.

    Raises:
        UserError: `tree` has other contents, or eSpeak NG is not installed.
    """
    try:
        spoken_by = metadata.version("espeakng-loader")
    except metadata.PackageNotFoundError:
        raise UserError(
            "the synth corpus is spoken by eSpeak NG: pip install espeakng-loader"
        ) from None
    stamp = {"version": _VERSION, "espeakng-loader": spoken_by, **dataclasses.asdict(options)}
    if not is_built(tree, "synth", stamp):
        build_tree(tree, "synth", stamp, plan(options), render, nj)
