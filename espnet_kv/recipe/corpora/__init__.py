"""The corpora of the recipe, and stage 1: download, generate or read data, and write data/SET."""

import dataclasses
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from espnet_kv.errors import UserError
from espnet_kv.recipe.corpora import digits as digits_corpus
from espnet_kv.recipe.corpora import librispeech as libri
from espnet_kv.recipe.corpora import speechocean
from espnet_kv.recipe.corpora.digits import DigitsOptions
from espnet_kv.recipe.corpora.download import download_subset
from espnet_kv.recipe.corpora.own import import_sources, name_sources
from espnet_kv.recipe.corpora.synth import SynthOptions, generate
from espnet_kv.recipe.datadir import DataDir

__all__ = ["CORPORA", "Corpus", "DigitsOptions", "SynthOptions", "name_sources", "prepare"]


@dataclass(frozen=True)
class Request:
    """Arguments of `prepare` for obtaining a corpus."""

    download_dir: Path
    nj: int
    source: Path | None
    synth: SynthOptions
    digits: DigitsOptions


@dataclass(frozen=True)
class Corpus:
    """A corpus and its default options.

    sets: data directory -> its subsets.
    obtain: (corpus, request) -> the folder to read: existing, downloaded or generated.
    load: (folder, subset) -> all its data; stage 3 drops or refuses unusable utterances.
    defaults: recipe option -> default value for the corpus; inference_config is for offline
        decoding.
    """

    name: str
    train_set: str
    valid_set: str
    test_sets: tuple[str, ...]
    sets: Mapping[str, tuple[str, ...]]
    obtain: Callable[["Corpus", Request], Path]
    load: Callable[[Path, str], DataDir] = libri.load_subset
    defaults: Mapping[str, Any] = field(default_factory=dict)

    @property
    def subsets(self) -> list[str]:
        """All subsets without duplicates, in the order of `sets`."""
        return list(dict.fromkeys(subset for made_of in self.sets.values() for subset in made_of))


def _librispeech(corpus: Corpus, request: Request) -> Path:
    if request.source is not None:
        libri.require_subsets(request.source, corpus.subsets)
        return request.source
    for subset in corpus.subsets:
        tree = download_subset(subset, request.download_dir)
    return tree


def _synthesize(corpus: Corpus, request: Request) -> Path:
    tree = request.download_dir / "synth" / "LibriSpeech"
    generate(tree, request.synth, request.nj)
    return tree


def _join_digits(corpus: Corpus, request: Request) -> Path:
    folder = request.download_dir / "digits"
    source = request.source or digits_corpus.download(folder)
    digits_corpus.generate(folder / "LibriSpeech", source, request.digits, request.nj)
    return folder / "LibriSpeech"


def _speechocean(corpus: Corpus, request: Request) -> Path:
    return request.source or speechocean.download(request.download_dir)


def _no_folder(corpus: Corpus, request: Request) -> Path:
    raise UserError("corpus kaldi is made of `sources`: name -> data directory")


_SETS_100 = {
    "train_clean_100": ("train-clean-100",),
    "dev": ("dev-clean", "dev-other"),
    "dev_clean": ("dev-clean",),
    "dev_other": ("dev-other",),
    "test_clean": ("test-clean",),
    "test_other": ("test-other",),
}
_MAIN_SETS_100 = ("train_clean_100", "dev", ("test_clean", "test_other"))
_SETS_MINI = {"train_clean_5": ("train-clean-5",), "dev_clean_2": ("dev-clean-2",)}
_SMALL = {
    "speed_perturb_factors": "",
    "overlay": Path("conf/overlays/small.yaml"),
    "lm_config": Path("conf/train_lm_small.yaml"),
    "inference_config": Path("conf/decode_asr_fast.yaml"),
}

CORPORA = {
    corpus.name: corpus
    for corpus in (
        Corpus(
            "librispeech_100", "train_clean_100", "dev",
            ("test_clean", "test_other", "dev_clean", "dev_other"), _SETS_100, _librispeech,
        ),
        Corpus(
            "mini_librispeech", "train_clean_5", "dev_clean_2", ("dev_clean_2",), _SETS_MINI,
            _librispeech, defaults={"nbpe": 1000},
        ),
        Corpus(
            "synth", *_MAIN_SETS_100, _SETS_100, _synthesize, defaults={"nbpe": 40, **_SMALL}
        ),
        Corpus(
            "digits", *_MAIN_SETS_100, _SETS_100, _join_digits, defaults={"nbpe": 29, **_SMALL}
        ),
        Corpus(
            "speechocean762", "train", "dev", ("test",),
            {name: (name,) for name in ("train", "dev", "test")},
            _speechocean, speechocean.load_subset,
            {"nbpe": 500, "overlay": Path("conf/overlays/medium.yaml")},
        ),
        Corpus("kaldi", "", "", (), {}, _no_folder),
    )
}  # fmt: skip


def prepare(
    corpus: str,
    data_dir: Path,
    *,
    librispeech: Path | None = None,
    download_dir: Path,
    nj: int = 1,
    synth: SynthOptions | None = None,
    digits: DigitsOptions | None = None,
    source: Path | None = None,
    sources: Mapping[str, Path] | None = None,
    allow_pipes: bool = False,
) -> Corpus:
    """Write the Kaldi data directories `data_dir`/SET of a corpus.

    Args:
        corpus: a key of CORPORA.
        librispeech: an existing tree to read instead of downloading it; only for corpora from
            LibriSpeech.
        download_dir: directory of downloaded or generated audio; existing audio is reused.
        nj: number of processes that generate audio.
        synth: sizes of the synth corpus; None: the defaults.
        digits: sizes of the digits corpus; None: the defaults.
        source: an existing folder of digits (a checkout of the dataset) or speechocean762 to
            read instead of downloading it.
        sources: for corpus kaldi: SET -> data directory (see `name_sources`).
        allow_pipes: for corpus kaldi: allow commands in wav.scp.

    Returns:
        The corpus; for kaldi with the given sets.

    Raises:
        UserError: the corpus is unknown, or its audio is missing, damaged or malformed.
    """
    if corpus not in CORPORA:
        raise UserError(f"unknown corpus {corpus!r}: choose one of {', '.join(CORPORA)}")
    chosen = CORPORA[corpus]
    if corpus == "kaldi":
        if not sources:
            raise UserError("corpus kaldi needs `sources`: name -> data directory")
        import_sources(data_dir, sources, allow_pipes=allow_pipes)
        warn_overlap({name: DataDir.read(data_dir / name, allow_pipes=True) for name in sources})
        return dataclasses.replace(chosen, sets={name: (name,) for name in sources})
    given = librispeech if chosen.obtain is _librispeech else source
    request = Request(download_dir, nj, given, synth or SynthOptions(), digits or DigitsOptions())
    tree = chosen.obtain(chosen, request)
    subsets = {subset: chosen.load(tree, subset) for subset in chosen.subsets}
    sets: dict[str, DataDir] = {}
    for name, made_of in chosen.sets.items():
        data = sets[name] = DataDir.combine(subsets[subset] for subset in made_of)
        data.write(data_dir / name)
        speakers = len(set(data.utt2spk.values()))
        incomplete = len(data.wav_scp.keys() ^ data.text.keys())
        print(
            f"  {data_dir / name}: {len(data.wav_scp)} utterances, {speakers} speakers"
            + (f"; {incomplete} lack audio or transcript" if incomplete else "")
        )
    warn_overlap({name: sets[name] for name in (chosen.train_set, *chosen.test_sets)})
    return chosen


def warn_overlap(sets: Mapping[str, DataDir]) -> None:
    """Warn on stderr if the first set (training) shares utterances with another set.

    Utterances are compared by id and by audio.
    """
    (train, first), *others = sets.items()
    audio = {_audio(first, utt) for utt in first.wav_scp}
    for name, data in others:
        shared = [u for u in data.wav_scp if u in first.wav_scp or _audio(data, u) in audio]
        if shared:
            print(
                f"warning: {len(shared)} of {len(data.wav_scp)} utterances of {name} are in "
                f"{train} as well (the first: {shared[0]}); scores on them are not meaningful",
                file=sys.stderr,
                flush=True,
            )


def _audio(data: DataDir, utt: str) -> tuple[str, float, float | None]:
    part = data.segments.get(utt)
    return (data.wav_scp[utt], *((part.start, part.end) if part else (0.0, None)))
