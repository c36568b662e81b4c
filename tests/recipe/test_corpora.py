"""Stage 1: trees in LibriSpeech's layout become Kaldi data directories."""

import pytest

from espnet_kv.errors import UserError
from espnet_kv.recipe import corpora
from espnet_kv.recipe.corpora import CORPORA, prepare
from espnet_kv.recipe.corpora.librispeech import read_subset
from espnet_kv.recipe.datadir import DataDir


def add_chapter(tree, subset, chapter, texts, audio=None):
    """Write a chapter; `audio` lists the utterances that have some, else all."""
    folder = tree / subset / chapter.replace("-", "/")
    folder.mkdir(parents=True)
    lines = [f"{chapter}-{number} {text}\n" for number, text in texts.items()]
    (folder / f"{chapter}.trans.txt").write_text("".join(lines))
    for number in texts if audio is None else audio:
        (folder / f"{chapter}-{number}.flac").write_bytes(b"fLaC")
    return folder


@pytest.fixture
def tree(tmp_path):
    tree = tmp_path / "LibriSpeech"
    for speaker, subset in enumerate(CORPORA["librispeech_100"].subsets, 10):
        add_chapter(tree, subset, f"{speaker}-7", {"0001": "SEVEN ONE", "0000": "SEVEN"})
        add_chapter(tree, subset, f"{speaker}-12", {"0000": "TWELVE"})
    return tree


def test_ids_and_speakers_are_kaldi_s(tree):
    data = read_subset(tree, "dev-clean")
    folder = tree / "dev-clean" / "11"
    assert data == DataDir(
        wav_scp={
            "11-12-0000": f"{folder}/12/11-12-0000.flac",
            "11-7-0000": f"{folder}/7/11-7-0000.flac",
            "11-7-0001": f"{folder}/7/11-7-0001.flac",
        },
        text={"11-12-0000": "TWELVE", "11-7-0000": "SEVEN", "11-7-0001": "SEVEN ONE"},
        utt2spk={"11-12-0000": "11-12", "11-7-0000": "11-7", "11-7-0001": "11-7"},
    )


def test_the_tree_or_its_parent_will_do_and_relative_too(tree, tmp_path, monkeypatch):
    assert read_subset(tree.parent, "test-other") == read_subset(tree, "test-other")
    monkeypatch.chdir(tree)
    assert read_subset(tree.relative_to(tree), "dev-clean") == read_subset(tree, "dev-clean")


def test_what_is_incomplete_is_dropped_and_named(tree, capsys):
    folder = add_chapter(
        tree, "dev-clean", "99-1", {"0000": "KEPT", "0001": "", "0002": "UNHEARD"}, ["0000", "0001"]
    )
    (folder / "99-1-0003.flac").write_bytes(b"fLaC")
    (folder / "._99-1-0000.flac").write_bytes(b"left by macOS")
    data = read_subset(tree, "dev-clean")
    assert sorted(utt for utt in data.wav_scp if utt.startswith("99")) == ["99-1-0000"]
    warnings = capsys.readouterr().err
    assert "99-1-0001: empty transcript" in warnings
    assert "99-1-0002: no audio" in warnings
    assert "99-1-0003: no transcript" in warnings
    assert "3 of 7 utterances dropped" in warnings


def test_a_transcript_that_occurs_twice_is_refused(tree):
    folder = tree / "dev-clean" / "11" / "7"
    with open(folder / "11-7.trans.txt", "a") as transcripts:
        transcripts.write("11-7-0000 AGAIN\n")
    with pytest.raises(UserError, match=r"11-7\.trans\.txt:3: utterance 11-7-0000 occurs twice"):
        read_subset(tree, "dev-clean")


def test_audio_in_the_wrong_folder_is_refused(tree):
    (tree / "dev-clean" / "11" / "7" / "11-12-0000.flac").write_bytes(b"fLaC")
    with pytest.raises(UserError, match=r"7/11-12-0000\.flac: expected a name like 11-7-0000"):
        read_subset(tree, "dev-clean")


def test_a_missing_or_empty_subset_says_what_to_set(tree):
    with pytest.raises(UserError, match=r"LibriSpeech/train-clean-360 does not exist.*LIBRISPEECH"):
        read_subset(tree, "train-clean-360")
    (tree / "train-clean-360").mkdir()
    with pytest.raises(UserError, match=r"train-clean-360 holds no"):
        read_subset(tree, "train-clean-360")


def test_prepare_writes_espnet_s_sets(tree, tmp_path):
    data_dir = tmp_path / "data"
    corpus = prepare(
        "librispeech_100", data_dir, librispeech=tree, download_dir=tmp_path / "downloads"
    )
    assert (corpus.train_set, corpus.valid_set) == ("train_clean_100", "dev")
    assert corpus.test_sets == ("test_clean", "test_other", "dev_clean", "dev_other")
    assert sorted(path.name for path in data_dir.iterdir()) == sorted(corpus.sets)
    assert DataDir.read(data_dir / "dev") == DataDir.combine(
        DataDir.read(data_dir / name) for name in ("dev_clean", "dev_other")
    )
    assert list(DataDir.read(data_dir / "train_clean_100").wav_scp) == [
        "10-12-0000", "10-7-0000", "10-7-0001",
    ]  # fmt: skip
    assert not (tmp_path / "downloads").exists()


def test_prepare_downloads_what_is_not_there(tmp_path, monkeypatch):
    asked = []

    def download_subset(subset, into):
        asked.append(subset)
        add_chapter(into / "LibriSpeech", subset, f"{len(asked)}-1", {"0000": "HELLO"})
        return into / "LibriSpeech"

    monkeypatch.setattr(corpora, "download_subset", download_subset)
    corpus = prepare("mini_librispeech", tmp_path / "data", download_dir=tmp_path / "downloads")
    assert asked == ["train-clean-5", "dev-clean-2"]
    for name in (corpus.train_set, corpus.valid_set, *corpus.test_sets):
        assert list(DataDir.read(tmp_path / "data" / name).text.values()) == ["HELLO"]


def test_prepare_reads_everything_before_it_writes(tree, tmp_path):
    (tree / "test-other").rename(tree / "elsewhere")
    with pytest.raises(UserError, match=r"LibriSpeech lacks test-other \(train-clean-100, dev-"):
        prepare("librispeech_100", tmp_path / "data", librispeech=tree, download_dir=tmp_path)
    assert not (tmp_path / "data").exists()


def test_an_unknown_corpus_is_refused(tmp_path):
    with pytest.raises(
        UserError, match="unknown corpus 'tedlium': choose one of librispeech_100, "
    ):
        prepare("tedlium", tmp_path / "data", download_dir=tmp_path)


@pytest.mark.parametrize(
    "corpus",
    [corpus for corpus in CORPORA.values() if corpus.name != "kaldi"],  # its sets are the user's
    ids=lambda corpus: corpus.name,
)
def test_every_named_set_is_made(corpus):
    assert {corpus.train_set, corpus.valid_set, *corpus.test_sets} <= set(corpus.sets)
