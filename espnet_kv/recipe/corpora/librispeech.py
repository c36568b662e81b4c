"""LibriSpeech's layout, SUBSET/SPEAKER/CHAPTER/{*.flac,*.trans.txt}, as a data directory."""

from pathlib import Path

from espnet_kv.errors import UserError
from espnet_kv.recipe.datadir import DataDir, entries


def find_subset(root: Path, subset: str) -> Path:
    """The folder of `subset`; `root` is the folder LibriSpeech or the one that holds it.

    Raises:
        UserError: there is none.
    """
    for folder in (root / subset, root / "LibriSpeech" / subset):
        if folder.is_dir():
            return folder
    raise UserError(
        f"{root / subset} does not exist: set LIBRISPEECH (in db.sh or the environment) to the "
        f"folder that holds {subset}, or leave it empty to download"
    )


def read_subset(root: Path, subset: str) -> DataDir:
    """Read one subset, ids as Kaldi's and ESPnet's LibriSpeech recipes give them.

    An utterance is SPEAKER-CHAPTER-NUMBER, its speaker SPEAKER-CHAPTER. What lacks its
    audio or its transcript is dropped with a warning that names it.

    Raises:
        UserError: the subset is missing or empty, or an id is malformed or occurs twice.
    """
    folder = find_subset(root, subset).absolute()
    data = DataDir()
    for chapter in sorted(path for path in folder.glob("*/*") if path.is_dir()):
        speaker = f"{chapter.parent.name}-{chapter.name}"
        for audio in sorted(chapter.glob("[!.]*.flac")):  # macOS leaves ._NAME.flac files
            utt = audio.stem
            if not utt.startswith(f"{speaker}-") or len(utt.split()) != 1:
                raise UserError(f"{audio}: expected a name like {speaker}-0000.flac")
            data.wav_scp[utt] = str(audio)
            data.utt2spk[utt] = speaker
        for transcripts in sorted(chapter.glob("[!.]*.trans.txt")):
            for _, _, utt, words in entries(transcripts, into=data.text):
                data.text[utt] = " ".join(words.split())
    if not data.wav_scp:
        raise UserError(f"{folder} holds no SPEAKER/CHAPTER/*.flac: is it LibriSpeech's layout?")
    return data.check(subset)[0]
