"""Stage 1 with incomplete trees; digits and speechocean762 from tiny folders of their kind."""

import os
import re
import shutil
import signal
import tarfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
from recordings import content

from espnet_kv.errors import UserError
from espnet_kv.recipe import corpora
from espnet_kv.recipe.corpora import CORPORA, DigitsOptions, espeak, prepare, synth
from espnet_kv.recipe.corpora import digits as digits_corpus
from espnet_kv.recipe.corpora.librispeech import read_subset
from espnet_kv.recipe.corpora.synth import SynthOptions
from espnet_kv.recipe.corpora.tree import is_built
from espnet_kv.recipe.datadir import DataDir
from espnet_kv.recipe.format import format_audio

NEEDED = CORPORA["librispeech_100"].subsets


def add_chapter(folder: Path, chapter: str, lines: list[str], audio: list[str]) -> None:
    folder = folder / chapter.replace("-", "/")
    folder.mkdir(parents=True)
    (folder / f"{chapter}.trans.txt").write_text("".join(f"{line}\n" for line in lines))
    for name in audio:
        soundfile.write(folder / name, np.full(1600, 0.1), 16000, format="FLAC")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for number, subset in enumerate(NEEDED, 1):
        folder = tmp_path / "LibriSpeech" / subset
        utts = [f"{number}-7-000{i}" for i in range(3)]
        add_chapter(
            folder, f"{number}-7", [f"{u} HELLO" for u in utts], [f"{u}.flac" for u in utts]
        )
    return tmp_path / "LibriSpeech"


def prepared(tree: Path, tmp_path: Path, **options) -> Path:
    prepare(
        "librispeech_100",
        tmp_path / "data",
        librispeech=tree,
        download_dir=tmp_path / "no",
        **options,
    )
    return tmp_path / "data"


# --- LibriSpeech


def test_subsets_that_are_missing_are_listed_in_one_line(tree, tmp_path):
    for subset in ("dev-other", "test-other"):
        (tree / subset).rename(tmp_path / subset)
    with pytest.raises(UserError, match="lacks dev-other, test-other ") as caught:
        prepared(tree, tmp_path)
    assert "(train-clean-100, dev-clean, test-clean found)" in str(caught.value)
    assert "\n" not in str(caught.value) and not (tmp_path / "data").exists()


@pytest.mark.parametrize("root", ["gone", "file"])
def test_a_tree_that_is_none_is_named(tmp_path, root):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=rf"{root} lacks train-clean-100, .*\(no subset found\)"):
        prepared(tmp_path / root, tmp_path)


def test_a_tree_in_capitals_is_read(tree, tmp_path):
    expected = read_subset(tree, "dev-clean")
    chapter = tree / "dev-clean" / "2" / "7"
    for file in list(chapter.iterdir()):
        file.rename(chapter / file.name.upper())
    (tree / "dev-clean").rename(tree / "Dev-Clean")
    tree.rename(tmp_path / "LIBRISPEECH")
    data = read_subset(tmp_path, "dev-clean")
    assert (data.text, data.utt2spk) == (expected.text, expected.utt2spk)
    assert data.wav_scp["2-7-0000"].endswith("LIBRISPEECH/Dev-Clean/2/7/2-7-0000.FLAC")


def test_what_macos_leaves_behind_is_no_data(tree):
    chapter = tree / "dev-clean" / "2" / "7"
    (chapter / "._2-7-0000.flac").write_bytes(b"Mac OS X")
    (chapter / "._2-7.trans.txt").write_bytes(b"\x00\x05\x16\x07Mac OS X")
    (tree / "dev-clean" / ".DS_Store").write_bytes(b"\0\0")
    (tree / "dev-clean" / "2" / "._7").mkdir()
    assert len(read_subset(tree, "dev-clean").wav_scp) == 3


@pytest.mark.parametrize("fault", ["empty transcripts", "no audio", "no transcript"])
def test_an_incomplete_test_set_is_refused_and_training_data_dropped(tree, tmp_path, fault):
    for subset, number in (("train-clean-100", 1), ("test-clean", 4)):
        chapter = tree / subset / str(number) / "7"
        transcripts = chapter / f"{number}-7.trans.txt"
        lines = transcripts.read_text().splitlines(keepends=True)
        if fault == "empty transcripts":
            transcripts.write_text("")
            add_chapter(
                tree / subset, f"{number}-8", [f"{number}-8-000{i} A" for i in range(4)],
                [f"{number}-8-000{i}.flac" for i in range(4)],
            )  # fmt: skip
        elif fault == "no audio":
            (chapter / f"{number}-7-0002.flac").unlink()
        else:
            transcripts.write_text("".join(lines[:2]))
    data = prepared(tree, tmp_path)
    format_audio(data / "train_clean_100", tmp_path / "train")
    lost = (tmp_path / "train" / "dropped").read_text().splitlines()
    assert len(lost) == (3 if fault == "empty transcripts" else 1)
    with pytest.raises(UserError, match=rf"test_clean: {len(lost)} of \d utterances of a test set"):
        format_audio(data / "test_clean", tmp_path / "test", keep_all=True)


def test_an_utterance_twice_in_a_chapter_is_named(tree):
    chapter = tree / "dev-clean" / "2" / "7"
    (chapter / "2-7-0000.FLAC").write_bytes((chapter / "2-7-0000.flac").read_bytes())
    with pytest.raises(UserError, match=r"there is also .*2-7-0000\.FLAC; keep one"):
        read_subset(tree, "dev-clean")


# --- digits


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """Two speakers, each digit a tone of its own, 12 recordings each."""
    folder = tmp_path_factory.mktemp("fsdd") / "recordings"
    folder.mkdir()
    for speaker in ("ann", "bob"):
        for digit in range(10):
            for number in range(12):
                rng = np.random.default_rng([digit, number, ord(speaker[0])])
                sound = 0.2 * np.sin(np.arange(800) * (digit + 2) / 10) + rng.normal(0, 0.01, 800)
                soundfile.write(folder / f"{digit}_{speaker}_{number}.wav", sound, 8000)
    return folder.parent


TINY = DigitsOptions(train=3, dev=1, test=2)


def test_digits_are_strings_of_recordings_that_no_other_set_has(checkout):
    used: dict[str, set[int]] = {}
    utterances = digits_corpus.plan(checkout, DigitsOptions())
    assert len(utterances) == 2 * (250 + 2 * 15 + 2 * 30)
    for utterance in utterances:
        assert 3 <= len(utterance.words.split()) == len(utterance.clips) <= 7
        for word, clip in zip(utterance.words.split(), utterance.clips, strict=True):
            digit, speaker, number = clip.stem.split("_")
            assert digits_corpus._WORDS[int(digit)] == word
            assert utterance.id.startswith(f"{speaker}-")
            used.setdefault(utterance.path.parts[0].split("-")[0], set()).add(int(number))
    assert used == {"train": {10, 11}, "dev": {5, 6, 7, 8, 9}, "test": {0, 1, 2, 3, 4}}


def test_digits_come_as_the_sets_of_the_tables(checkout, tmp_path):
    options = {"source": checkout, "digits": TINY}
    corpus = prepare("digits", tmp_path / "data", download_dir=tmp_path / "one", **options)
    sizes = {name: len(DataDir.read(tmp_path / "data" / name).wav_scp) for name in corpus.sets}
    assert sizes == {
        "train_clean_100": 6, "dev": 4, "dev_clean": 2, "dev_other": 2,
        "test_clean": 4, "test_other": 4,
    }  # fmt: skip
    data = DataDir.read(tmp_path / "data" / "test_clean")
    samples, rate = soundfile.read(data.wav_scp["ann-104-0000"])
    words = data.text["ann-104-0000"].split()
    assert rate == 16000 and set(words) <= {w.upper() for w in digits_corpus._WORDS}
    assert 0.1 * len(words) < len(samples) / rate < 0.31 * len(words) + 0.2
    assert 0.4 < np.abs(samples).max() < 0.6
    tree = tmp_path / "one" / "digits" / "LibriSpeech"
    first = content(tree)
    digits_corpus.generate(tmp_path / "two", checkout / "recordings", TINY, nj=2)
    assert content(tmp_path / "two") == first
    digits_corpus.generate(tree, checkout, DigitsOptions(train=3, dev=1, test=2, seed=1))
    assert content(tree) != first


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ("empty", r"holds no recordings/DIGIT_SPEAKER_NUMBER\.wav: give the folder"),
        ("partial", r"dev-clean needs a recording 7_ann_N\.wav of seven with N 5 to 9"),
        ("damaged", r"corrupt audio: .*\.wav.*give a complete checkout"),
    ],
)
def test_an_incomplete_checkout_is_named(checkout, tmp_path, spoil, message):
    (tmp_path / "fsdd" / "recordings").mkdir(parents=True)
    for clip in (checkout / "recordings").iterdir() if spoil != "empty" else ():
        copy = tmp_path / "fsdd" / "recordings" / clip.name
        if spoil == "damaged":
            copy.write_bytes(clip.read_bytes()[:700])
        elif not re.match(r"7_ann_[5-9]\.", clip.name):
            os.link(clip, copy)
    with pytest.raises(UserError, match=message):
        digits_corpus.generate(tmp_path / "tree", tmp_path / "fsdd", TINY)
    assert [path.name for path in tmp_path.iterdir()] == ["fsdd"]


def archive(folder: Path, name: str, to: Path) -> None:
    to.parent.mkdir(parents=True)
    with tarfile.open(to, "w:gz") as tar:
        tar.add(folder, name)


def test_digits_and_speechocean_are_downloaded_once(checkout, ocean, tmp_path, monkeypatch):
    mirror, downloads = tmp_path / "mirror", tmp_path / "downloads"
    archive(checkout, "free-spoken-digit-dataset-1.0.10", mirror / "v1.0.10.tar.gz")
    archive(ocean, "speechocean762", mirror / "101" / "speechocean762.tar.gz")
    monkeypatch.setattr(digits_corpus, "URL", f"file://{mirror}/v1.0.10.tar.gz")
    monkeypatch.setenv("OPENSLR_URL", f"file://{mirror}")
    for _ in range(2):
        prepare("digits", tmp_path / "one", download_dir=downloads, digits=TINY)
        prepare("speechocean762", tmp_path / "two", download_dir=downloads)
        shutil.rmtree(mirror, ignore_errors=True)
    assert len(DataDir.read(tmp_path / "one" / "train_clean_100").wav_scp) == 6
    assert len(DataDir.read(tmp_path / "two" / "train").wav_scp) == 6


def test_digits_options_are_checked():
    for options in ({"train": 0}, {"test": -1}, {"seed": -1}):
        with pytest.raises(UserError, match=f"digits option {next(iter(options))}="):
            DigitsOptions(**options)


# --- speechocean762


@pytest.fixture
def ocean(tmp_path: Path) -> Path:
    root = tmp_path / "speechocean762"
    (root / "WAVE").mkdir(parents=True)
    for name, speakers in {"train": 5, "test": 2}.items():
        (root / name).mkdir()
        files: dict[str, list[str]] = {"wav.scp": [], "text": [], "utt2spk": []}
        for speaker in range(speakers):
            for number in range(2):
                utt = f"{name == 'test':d}{number}{speaker}"
                audio = f"WAVE/{utt}.ogg"
                soundfile.write(root / audio, np.full(4800, 0.1), 16000, subtype="OPUS")
                for file, value in zip(files, (audio, "A B", f"00{speaker}"), strict=True):
                    files[file].append(f"{utt}\t{value}\n")
        for file, lines in files.items():
            (root / name / file).write_text("".join(sorted(lines)))
    return root


@pytest.mark.parametrize("where", [".", ".."])
def test_speechocean_has_a_dev_set_of_speakers_of_its_own(ocean, tmp_path, where):
    corpus = prepare(
        "speechocean762", tmp_path / "data", source=ocean / where, download_dir=tmp_path / "no"
    )
    assert (corpus.train_set, corpus.valid_set, corpus.test_sets) == ("train", "dev", ("test",))
    sets = {name: DataDir.read(tmp_path / "data" / name) for name in corpus.sets}
    assert set(sets["dev"].utt2spk.values()) == {"000", "002"}
    assert set(sets["train"].utt2spk.values()) == {"001", "003", "004"}
    assert {name: len(data.text) for name, data in sets.items()} == {
        "train": 6,
        "dev": 4,
        "test": 4,
    }
    format_audio(tmp_path / "data" / "test", tmp_path / "dump", keep_all=True)


def test_a_folder_that_is_no_speechocean_is_named(tmp_path):
    with pytest.raises(
        UserError, match=r"train/wav\.scp is missing: give the folder of speechocean"
    ):
        prepare("speechocean762", tmp_path / "data", source=tmp_path, download_dir=tmp_path)


# --- the synthesizer


def test_the_reason_why_espeak_fails_reaches_the_user(monkeypatch):
    voice = espeak.Voice("gmw/en-US")
    with pytest.raises(UserError, match=r"voice 'gmw/en-XX': it has no such voice; try: pip"):
        espeak.speak("hello", espeak.Voice("gmw/en-XX"))

    def fails(*args):
        raise ValueError("the dictionary is gone")

    monkeypatch.setattr(espeak, "_speak_here", fails)
    with pytest.raises(UserError, match=r"voice 'gmw/en-US': the dictionary is gone$"):
        espeak.speak("hello", voice)
    monkeypatch.setattr(espeak, "_speak_here", lambda *args: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(UserError, match=r"killed by signal 9 \(Killed\).*check the memory"):
        espeak.speak("hello", voice)


def test_an_empty_stamp_of_a_generated_corpus_is_no_traceback(tmp_path, monkeypatch):
    options = SynthOptions(train=50, dev=1, test=1)
    monkeypatch.setattr(synth, "render", lambda utterance: np.zeros(160, np.int16))
    synth.generate(tmp_path / "tree", options)
    (tmp_path / "tree" / "synth.json").write_text("")
    synth.generate(tmp_path / "tree", options)
    assert (tmp_path / "tree" / "synth.json").read_text()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file is not a folder"):
        is_built(tmp_path / "file", "synth", {})


# --- defaults


@pytest.mark.parametrize("corpus", CORPORA.values(), ids=lambda corpus: corpus.name)
def test_the_defaults_of_a_corpus_are_options_and_files_that_there_are(corpus):
    from espnet_kv.recipe.options import parser

    repository = Path(corpora.__file__).parents[3]
    known = vars(parser().parse_args([]))
    for name, value in corpus.defaults.items():
        assert name in known
        if isinstance(value, Path):
            assert (repository / value).is_file()


def test_corpus_kaldi_needs_directories(tmp_path):
    with pytest.raises(UserError, match="corpus kaldi needs `sources`"):
        prepare("kaldi", tmp_path / "data", download_dir=tmp_path)
