"""Recordings that `segments` cuts into utterances, as in Kaldi."""

import re
from pathlib import Path

import kaldiio
import numpy as np
import pytest
import soundfile
from recordings import FS, content, speech

from espnet_kv.errors import UserError
from espnet_kv.recipe.audio import read_recording
from espnet_kv.recipe.corpora import prepare
from espnet_kv.recipe.datadir import DataDir, Segment
from espnet_kv.recipe.format import format_audio
from espnet_kv.recipe.lengths import filter_lengths
from espnet_kv.recipe.perturb import perturb_speed


@pytest.fixture
def meeting(tmp_path: Path) -> Path:
    """Three segments of one recording of 3 s, one of another."""
    soundfile.write(tmp_path / "long.wav", speech(3), FS, subtype="PCM_16")
    soundfile.write(tmp_path / "short.flac", speech(1, 1), FS, subtype="PCM_16")
    directory = tmp_path / "data" / "meeting"
    directory.mkdir(parents=True)
    (directory / "wav.scp").write_text(f"A {tmp_path}/long.wav\nB {tmp_path}/short.flac\n")
    (directory / "segments").write_text("a1 A 0.5 1.25\na2 A 1 2\na3 A 2.5 -1\nb1 B 0.0 1.30\n")
    (directory / "text").write_text("a1 ONE\na2 TWO\na3 THREE\nb1 FOUR\n")
    (directory / "utt2spk").write_text("a1 s\na2 s\na3 t\nb1 t\n")
    (directory / "reco2dur").write_text("A 3.0\nB 1.0\n")
    return directory


def test_segments_are_cut_out_of_their_recordings(meeting, tmp_path, monkeypatch):
    decoded = []
    monkeypatch.setattr(
        "espnet_kv.recipe.format.read_recording",
        lambda entry, **options: decoded.append(entry) or read_recording(entry, **options),
    )
    format_audio(meeting, tmp_path / "dump", keep_all=True)
    assert len(decoded) == 2, "a recording is decoded once, not once a segment"
    dump = kaldiio.load_scp(str(tmp_path / "dump" / "wav.scp"))
    long, short = speech(3), speech(1, 1)
    for utt, expected in {
        "a1": long[8000:20000],
        "a2": long[16000:32000],
        "a3": long[40000:],
        "b1": short,  # 0.3 s too long: Kaldi cuts it at the end
    }.items():
        np.testing.assert_allclose(dump[utt][1], expected, atol=1e-4)
    assert not (tmp_path / "dump" / "segments").exists()


def test_perturbed_segments_last_as_long_as_they_should(meeting, tmp_path):
    perturb_speed(meeting, tmp_path / "sp", [0.9, 1.0, 1.1])
    assert DataDir.read(tmp_path / "sp").segments["a2"] == Segment("A", 1.0, 2.0)
    format_audio(tmp_path / "sp", tmp_path / "dump", keep_all=True)
    counts = dict(line.split() for line in (tmp_path / "dump" / "utt2num_samples").open())
    assert len(counts) == 12 and counts["a2"] == "16000"
    assert int(counts["sp0.9-a2"]) == pytest.approx(FS / 0.9, abs=1)
    assert int(counts["sp1.1-a1"]) == pytest.approx(0.75 * FS / 1.1, abs=1)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a4 A 2.0 1.0", "a4 lasts from 2 s to 1 s"),
        ("a4 A 1.0 1.0", "a4 lasts from 1 s to 1 s"),
        ("a4 A -1 2", "start must be at least 0"),
        ("a4 C 0 1", "recording C of a4 is not in wav.scp"),
        ("a4 A 0", "expected `utterance recording start end`"),
        ("a4 A 0 1 2", "expected `utterance recording start end`"),
        ("a4 A nan 1", "expected `utterance recording start end`"),
        ("a4 A 0,5 1,5", "expected `utterance recording start end`"),
        ("a1 A 0 1", "a1 occurs twice"),
    ],
)
def test_a_bad_segment_is_named_by_file_and_line(meeting, line, message):
    with (meeting / "segments").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(UserError, match=rf"segments:5: .*{message}"):
        DataDir.read(meeting)


@pytest.mark.parametrize(("times", "message"), [("3.5 4", "starts at 3.5"), ("2 4", "ends at 4")])
def test_a_segment_beyond_its_recording_is_dropped_or_refused(meeting, tmp_path, times, message):
    for name, line in {"segments": f"a4 A {times}", "text": "a4 X", "utt2spk": "a4 s"}.items():
        with (meeting / name).open("a") as file:
            file.write(line + "\n")
    format_audio(meeting, tmp_path / "dump")
    dropped = (tmp_path / "dump" / "dropped").read_text()
    assert re.match(rf"a4 .*segments:5: the segment {message} s.*lasts 3\.00 s\n$", dropped)
    with pytest.raises(UserError, match=r"a4: .*segments:5"):
        format_audio(meeting, tmp_path / "test", keep_all=True)


def test_segments_survive_being_written(meeting, tmp_path):
    data = DataDir.read(meeting)
    data.write(tmp_path / "copy")
    assert DataDir.read(tmp_path / "copy") == data
    assert set(data.subset(["a1", "b1"]).segments) == {"a1", "b1"}


def test_more_jobs_than_recordings_give_the_same_bytes(meeting, tmp_path):
    results = []
    for nj in (1, 32):  # 2 and stage 2: tests/recipe/test_audio_stages.py
        format_audio(meeting, tmp_path / "dump", 8000, nj=nj)
        results.append(content(tmp_path / "dump"))
    assert results[0] == results[1]


def test_a_user_s_segments_and_pipes_go_through_every_data_stage(meeting, tmp_path, capsys):
    (meeting / "wav.scp").write_text(f"A cat {tmp_path}/long.wav |\nB {tmp_path}/short.flac\n")
    (meeting / "segments").write_text("a1 A 0.5 1.25\na2 A 1 2\na3 A 2.5 3\nb1 B 0.0 1.0\n")
    options = {"download_dir": tmp_path, "sources": {"mine": meeting}}
    with pytest.raises(UserError, match=r"wav\.scp:1: A is a pipe"):
        prepare("kaldi", tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    prepare("kaldi", tmp_path / "out", allow_pipes=True, **options)
    assert "4 utterances, 0.0 h, 2 speakers" in capsys.readouterr().out
    perturb_speed(tmp_path / "out" / "mine", tmp_path / "sp", [1.0, 1.1], allow_pipes=True)
    format_audio(tmp_path / "sp", tmp_path / "dump", keep_all=True, allow_pipes=True)
    filter_lengths(tmp_path / "dump", tmp_path / "kept", 0.5, 20)
    kept = set(DataDir.read(tmp_path / "kept").wav_scp)
    assert kept == {"a1", "a2", "a3", "b1", "sp1.1-a1", "sp1.1-a2", "sp1.1-b1"}
