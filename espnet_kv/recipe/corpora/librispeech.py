"""LibriSpeech's layout, SUBSET/SPEAKER/CHAPTER/{*.flac,*.trans.txt}, as a data directory."""

from collections.abc import Sequence
from pathlib import Path

from espnet_kv.errors import UserError
from espnet_kv.recipe.datadir import DataDir, entries
from espnet_kv.recipe.kaldi import split_words


def find_subset(root: Path, subset: str) -> Path:
    """The folder of `subset`; `root` is the folder LibriSpeech or its parent.

    Names may be in upper case, as on some file systems.

    Raises:
        UserError: the folder does not exist.
    """
    found = _subsets(root).get(subset.lower())
    if found is None:
        raise UserError(
            f"{root / subset} does not exist: set LIBRISPEECH (in db.sh or the environment) to the "
            f"folder that holds {subset}, or leave it empty to download"
        )
    return found


def require_subsets(root: Path, needed: Sequence[str]) -> None:
    """Check that all subsets exist.

    Raises:
        UserError: some are missing; lists missing and existing subsets.
    """
    there = _subsets(root)
    missing = [subset for subset in needed if subset.lower() not in there]
    if missing:
        found = [subset for subset in needed if subset not in missing]
        raise UserError(
            f"{root} lacks {', '.join(missing)} ({', '.join(found) or 'no subset'} found): set "
            "LIBRISPEECH (in db.sh or the environment) to a folder that holds all of "
            f"{', '.join(needed)}, or leave it empty to download them"
        )


def read_subset(root: Path, subset: str) -> DataDir:
    """The utterances of `load_subset` with audio and transcript; others are dropped with a warning.

    Raises UserError as `load_subset`.
    """
    return load_subset(root, subset).check(subset)[0]


def load_subset(root: Path, subset: str) -> DataDir:
    """Read one subset, with the ids of Kaldi's and ESPnet's LibriSpeech recipes.

    An utterance is SPEAKER-CHAPTER-NUMBER, its speaker SPEAKER-CHAPTER. Utterances without audio
    or transcript are kept, so that stage 3 can name them.

    Raises:
        UserError: the subset is missing or empty, or an id is malformed or occurs twice.
    """
    folder = find_subset(root, subset).absolute()
    data = DataDir()
    for chapter in sorted(path for path in folder.glob("[!.]*/[!.]*") if path.is_dir()):
        speaker = f"{chapter.parent.name}-{chapter.name}"
        # macOS leaves ._NAME.flac files
        files = sorted(file for file in chapter.iterdir() if not file.name.startswith("."))
        for audio in files:
            if audio.suffix.lower() != ".flac":
                continue
            utt = audio.stem
            if not utt.startswith(f"{speaker}-") or len(utt.split()) != 1:
                raise UserError(f"{audio}: expected a name like {speaker}-0000.flac")
            if utt in data.wav_scp:
                raise UserError(f"{audio}: there is also {data.wav_scp[utt]}; keep one of them")
            data.wav_scp[utt] = str(audio)
            data.utt2spk[utt] = speaker
        for transcripts in files:
            if transcripts.name.lower().endswith(".trans.txt"):
                for _, _, utt, words in entries(transcripts, into=data.text, may_be_empty=True):
                    data.text[utt] = split_words(words)
    if not data.wav_scp:
        raise UserError(f"{folder} holds no SPEAKER/CHAPTER/*.flac: is it LibriSpeech's layout?")
    return data


def _subsets(root: Path) -> dict[str, Path]:
    """Lower-case name -> folder, for all folders in `root` and in its LibriSpeech."""
    subsets: dict[str, Path] = {}
    for folder in (root, *(f for f in _folders(root) if f.name.lower() == "librispeech")):
        for path in _folders(folder):
            subsets.setdefault(path.name.lower(), path)
    return subsets


def _folders(root: Path) -> list[Path]:
    if not root.is_dir():
        return []
    return sorted(path for path in root.iterdir() if path.is_dir())
