"""The corpora of the recipe, and stage 1: from nothing, or an existing tree, to data/SET."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from espnet_kv.errors import UserError
from espnet_kv.recipe.corpora.download import download_subset
from espnet_kv.recipe.corpora.librispeech import read_subset
from espnet_kv.recipe.corpora.synth import SynthOptions, generate
from espnet_kv.recipe.datadir import DataDir

__all__ = ["CORPORA", "Corpus", "SynthOptions", "prepare"]


@dataclass(frozen=True)
class Corpus:
    """A corpus in LibriSpeech's layout.

    sets: data directory -> the subsets of which it is made.
    obtain: (corpus, download_dir, nj, synth options) -> the tree, downloaded or generated.
    """

    name: str
    train_set: str
    valid_set: str
    test_sets: tuple[str, ...]
    sets: Mapping[str, tuple[str, ...]]
    obtain: Callable[["Corpus", Path, int, SynthOptions], Path]

    @property
    def subsets(self) -> list[str]:
        """Every subset once, in the order of `sets`."""
        return list(dict.fromkeys(subset for made_of in self.sets.values() for subset in made_of))


def _download(corpus: Corpus, download_dir: Path, nj: int, options: SynthOptions) -> Path:
    for subset in corpus.subsets:
        tree = download_subset(subset, download_dir)
    return tree


def _synthesize(corpus: Corpus, download_dir: Path, nj: int, options: SynthOptions) -> Path:
    tree = download_dir / "synth" / "LibriSpeech"
    generate(tree, options, nj)
    return tree


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

CORPORA = {
    corpus.name: corpus
    for corpus in (
        Corpus("librispeech_100", *_MAIN_SETS_100, _SETS_100, _download),
        Corpus(
            "mini_librispeech", "train_clean_5", "dev_clean_2", ("dev_clean_2",), _SETS_MINI,
            _download,
        ),
        Corpus("synth", *_MAIN_SETS_100, _SETS_100, _synthesize),
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
) -> Corpus:
    """Write the Kaldi data directories `data_dir`/SET of a corpus.

    Args:
        corpus: a key of CORPORA.
        librispeech: an existing tree to read instead of downloading one; synth, which
            is cheap to make and no LibriSpeech, does not heed it.
        download_dir: where downloaded or generated audio goes; what is there is reused.
        nj: processes that generate audio.
        synth: sizes of the synth corpus, else its defaults.

    Returns:
        The corpus, which knows which set is for what.

    Raises:
        UserError: the corpus is unknown, or its audio is missing, damaged or malformed.
    """
    if corpus not in CORPORA:
        raise UserError(f"unknown corpus {corpus!r}: choose one of {', '.join(CORPORA)}")
    chosen = CORPORA[corpus]
    if librispeech is None or chosen.obtain is _synthesize:
        tree = chosen.obtain(chosen, download_dir, nj, synth or SynthOptions())
    else:
        tree = librispeech
    subsets = {subset: read_subset(tree, subset) for subset in chosen.subsets}
    for name, made_of in chosen.sets.items():
        data = DataDir.combine(subsets[subset] for subset in made_of)
        data.write(data_dir / name)
        speakers = len(set(data.utt2spk.values()))
        print(f"  {data_dir / name}: {len(data.wav_scp)} utterances, {speakers} speakers")
    return chosen
