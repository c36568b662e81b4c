"""Kaldi data directories: what is read is what was written, and bad lines are named."""

import re

import pytest

from espnet_kv.errors import UserError
from espnet_kv.recipe.datadir import DataDir


@pytest.fixture
def data():
    return DataDir(
        wav_scp={"b-2": "/with space/b 2.flac", "a-1": "raw/data.ark:13", "B-3": "b3.flac"},
        text={"b-2": "TWO WORDS", "a-1": "ÉTÉ", "B-3": "THREE"},
        utt2spk={"b-2": "b", "a-1": "a", "B-3": "b"},
    )


def write(path, **files):
    path.mkdir()
    content = {"wav_scp": "u1 u1.wav\nu2 u2.wav\n", "utt2spk": "u1 s\nu2 s\n"} | files
    for name, lines in content.items():
        if lines is not None:
            (path / name.replace("_", ".")).write_text(lines, encoding="utf-8")
    return path


def test_round_trip_sorted_as_kaldi_wants_it(tmp_path, data):
    data.write(tmp_path / "data" / "train")
    assert DataDir.read(tmp_path / "data" / "train") == data
    content = {file.name: file.read_text("utf-8") for file in (tmp_path / "data/train").iterdir()}
    assert content == {
        "wav.scp": "B-3 b3.flac\na-1 raw/data.ark:13\nb-2 /with space/b 2.flac\n",
        "text": "B-3 THREE\na-1 ÉTÉ\nb-2 TWO WORDS\n",
        "utt2spk": "B-3 b\na-1 a\nb-2 b\n",
        "spk2utt": "a a-1\nb B-3 b-2\n",
    }


def test_write_replaces_the_whole_directory(tmp_path, data):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "utt2num_samples").write_text("stale 1\n")
    data.write(tmp_path / "train")
    data.subset(["a-1"]).write(tmp_path / "train")
    assert list(DataDir.read(tmp_path / "train").wav_scp) == ["a-1"]
    assert not (tmp_path / "train" / "utt2num_samples").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["train"]


def test_a_value_that_would_break_the_file_leaves_the_old_one(tmp_path, data):
    data.write(tmp_path / "train")
    for broken in ({"a 1": "x.wav"}, {"a1": "x.wav\nb1 y.wav"}):
        with pytest.raises(UserError, match=r"wav\.scp: cannot write"):
            DataDir(wav_scp=broken).write(tmp_path / "train")
    assert DataDir.read(tmp_path / "train") == data
    assert [path.name for path in tmp_path.iterdir()] == ["train"]


def test_text_may_be_absent_and_transcripts_may_be_empty(tmp_path):
    assert DataDir.read(write(tmp_path / "untold")).text == {}
    told = DataDir.read(write(tmp_path / "told", text="u1\nu2  TWO \t WORDS\r\n"))
    assert told.text == {"u1": "", "u2": "TWO WORDS"}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"wav_scp": None}, r"wav\.scp is missing"),
        ({"utt2spk": None}, r"utt2spk is missing"),
        ({"wav_scp": ""}, r"wav\.scp is empty"),
        ({"wav_scp": "u1 u1.wav\n\nu2 u2.wav\n"}, r"wav\.scp:2: empty line"),
        ({"wav_scp": "u1 u1.wav\nu2\n"}, r"wav\.scp:2: .*'u2'"),
        ({"wav_scp": "u1 a.wav\nu2 b.wav\nu1 c.wav\n"}, r"wav\.scp:3: utterance u1 occurs twice"),
        ({"wav_scp": "u1 flac -cd u1.flac |\n"}, r"wav\.scp:1: u1 is a pipe.*format the data"),
        ({"text": "u1 ONE\nu1 ONE\n"}, r"text:2: utterance u1 occurs twice"),
        ({"utt2spk": "u1 s\nu2 s t\n"}, r"utt2spk:2: .*'s t'"),
        ({"utt2spk": "u1 s\nu2\n"}, r"utt2spk:2: expected"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input_is_named_in_one_line(tmp_path, files, message):
    with pytest.raises(UserError, match=message) as caught:
        DataDir.read(write(tmp_path / "data", **files))
    assert "\n" not in str(caught.value)


def test_text_that_is_not_utf8_is_named(tmp_path):
    path = write(tmp_path / "data")
    (path / "text").write_bytes(b"u1 caf\xe9\n")
    with pytest.raises(UserError, match=r"text: not UTF-8 at byte 6"):
        DataDir.read(path)


def test_subset_keeps_what_is_asked_for(data):
    assert data.subset(["B-3"]) == DataDir({"B-3": "b3.flac"}, {"B-3": "THREE"}, {"B-3": "b"})
    with pytest.raises(KeyError, match="unknown"):
        data.subset(["unknown"])


def test_combine_refuses_shared_ids(data):
    parts = [data.subset(["a-1"]), data.subset(["b-2", "B-3"])]
    assert DataDir.combine(parts) == data
    with pytest.raises(UserError, match=r"2 utterance ids .*first: B-3"):
        DataDir.combine([data, parts[1]])


def test_check_drops_names_and_counts(capsys):
    utts = ["good", "untold", "empty", "speakerless"]
    data = DataDir(
        wav_scp={utt: f"{utt}.wav" for utt in utts},
        text={"good": "YES", "empty": " ", "speakerless": "WHO", "silent": "NO AUDIO"},
        utt2spk={"good": "s", "untold": "s", "empty": "s", "silent": "s"},
    )
    clean, dropped = data.check("train")
    assert clean == DataDir({"good": "good.wav"}, {"good": "YES"}, {"good": "s"})
    assert dropped == {
        "untold": "no transcript",
        "empty": "empty transcript",
        "speakerless": "no speaker",
        "silent": "no audio",
    }
    warnings = capsys.readouterr().err
    for utt, reason in dropped.items():
        assert re.search(rf"train: {utt}: {reason}\n", warnings)
    assert "4 of 5 utterances dropped" in warnings


def test_check_is_silent_where_nothing_is_wrong(data, capsys):
    assert data.check("train") == (data, {})
    assert capsys.readouterr().err == ""


def test_check_refuses_when_nothing_is_left(data):
    with pytest.raises(UserError, match=r"train: no usable utterance \(3 no transcript\)"):
        DataDir(data.wav_scp, {}, data.utt2spk).check("train")
