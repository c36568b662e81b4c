"""Audio as users have it: cut, out of scale, foreign and behind pipes."""

import os
import re
import shlex
from pathlib import Path

import kaldiio
import numpy as np
import pytest
import soundfile
from recordings import FS, speech

from espnet_kv.errors import UserError
from espnet_kv.recipe.audio import AudioError, read_audio, read_audio_at, read_recording
from espnet_kv.recipe.datadir import DataDir, require_conserved
from espnet_kv.recipe.format import format_audio
from espnet_kv.recipe.perturb import perturb_speed


def write_data(directory: Path, wav_scp: dict[str, str]) -> Path:
    DataDir(wav_scp, dict.fromkeys(wav_scp, "HELLO"), dict.fromkeys(wav_scp, "s")).write(directory)
    return directory


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Five good utterances."""
    entries = {}
    for i in range(5):
        entries[f"u{i}"] = str(tmp_path / f"u{i}.wav")
        soundfile.write(entries[f"u{i}"], speech(1 + i / 10, i), FS, subtype="PCM_16")
    return write_data(tmp_path / "data" / "set", entries)


def add(corpus: Path, utt: str, entry: object, text: str = "HELLO") -> None:
    data = DataDir.read(corpus, allow_pipes=True)
    data.wav_scp[utt], data.text[utt], data.utt2spk[utt] = str(entry), text, "s"
    data.write(corpus)


CONTAINERS = [
    ("WAV", "PCM_16"), ("WAV", "FLOAT"), ("WAV", "PCM_24"), ("WAV", "ULAW"),
    ("WAV", "IMA_ADPCM"), ("WAV", "GSM610"), ("WAVEX", "PCM_16"), ("RF64", "PCM_16"),
    ("AIFF", "PCM_16"), ("AIFF", "FLOAT"), ("AU", "PCM_16"), ("W64", "PCM_16"),
    ("CAF", "PCM_16"), ("NIST", "PCM_16"), ("OGG", "VORBIS"), ("OGG", "OPUS"),
    ("MP3", "MPEG_LAYER_III"), ("FLAC", "PCM_16"),
]  # fmt: skip


@pytest.mark.parametrize(("container", "subtype"), CONTAINERS)
@pytest.mark.parametrize("kept", [0.5, 0.97])
def test_a_file_cut_short_does_not_keep_its_whole_transcript(tmp_path, container, subtype, kept):
    path = tmp_path / "a.audio"
    soundfile.write(path, speech(2), FS, format=container, subtype=subtype)
    samples, rate = read_audio(str(path))
    assert rate == FS and abs(len(samples) - 2 * FS) < 1000
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(AudioError, match=r"corrupt audio: .*a\.audio: .*(cut short|lost sync)"):
        read_audio(str(path))


@pytest.mark.parametrize("write_function", [None, "soundfile"])
def test_an_ark_cut_short_loses_its_last_utterance_only(tmp_path, write_function):
    ark, scp = tmp_path / "a.ark", tmp_path / "a.scp"
    with kaldiio.WriteHelper(f"ark,scp:{ark},{scp}", write_function=write_function) as writer:
        for utt in ("u1", "u2"):
            writer(utt, (FS, np.arange(5000, dtype=np.int16)))
    first, last = (line.split()[1] for line in scp.read_text().splitlines())
    ark.write_bytes(ark.read_bytes()[:-900])
    assert len(read_audio(first)[0]) == 5000
    with pytest.raises(AudioError, match="corrupt audio"):
        read_audio(last)


def test_a_streamed_flac_without_a_length_is_read(tmp_path):
    path = tmp_path / "a.flac"
    soundfile.write(path, speech(2), FS)
    content = bytearray(path.read_bytes())
    content[21] &= 0xF0
    content[22:26] = bytes(4)
    path.write_bytes(content)
    assert len(read_audio(str(path))[0]) == 2 * FS


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (b"\0\0\0\x20ftypM4A ", "MPEG-4 audio.*ffmpeg -i INPUT OUTPUT.wav"),
        (b"\x1aE\xdf\xa3", "WebM.*ffmpeg"),
        (b"\xff\xf1P\x80", "AAC.*ffmpeg"),
        (b"0&\xb2u\x8ef\xcf\x11", "WMA.*ffmpeg"),
        (b"#!AMR\n", "AMR.*ffmpeg"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"no audio at all", "Format not recognised; if it is audio, convert it to wav: ffmpeg"),
    ],
    ids=lambda value: "" if isinstance(value, bytes) else value.split(".")[0],
)
def test_what_libsndfile_cannot_read_is_named_with_the_way_out(tmp_path, start, message):
    (tmp_path / "a.wav").write_bytes(start + bytes(3000))
    with pytest.raises(AudioError, match=message) as caught:
        read_audio(str(tmp_path / "a.wav"))
    assert "a.wav" in str(caught.value) and "\n" not in str(caught.value)


def test_what_is_no_file_is_named(tmp_path):
    (tmp_path / "folder.wav").mkdir()
    (tmp_path / "link.wav").symlink_to(tmp_path / "gone.wav")
    (tmp_path / "empty.wav").touch()
    os.mkfifo(tmp_path / "fifo.wav")
    for name, message in {
        "folder.wav": "is a directory",
        "link.wav": "is a link to .*gone.wav",
        "empty.wav": "no content",
        "fifo.wav": "no regular file",
        "gone.wav": "missing file",
        "gone.ark:17": r"missing file: .*gone\.ark$",
    }.items():
        with pytest.raises(AudioError, match=message):
            read_audio(str(tmp_path / name))


def test_a_file_without_permission_is_named(tmp_path, monkeypatch):
    path = tmp_path / "a.wav"
    soundfile.write(path, speech(), FS)

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)  # root may read everything
    with pytest.raises(AudioError, match=r"no permission to read .*a\.wav"):
        read_audio(str(path))


@pytest.mark.parametrize("offset", ["999999", "3"])
def test_a_bad_ark_offset_is_no_traceback(tmp_path, offset):
    kaldiio.save_ark(str(tmp_path / "a.ark"), {"utt": (FS, np.arange(999, dtype=np.int16))})
    with pytest.raises(AudioError, match=rf"corrupt audio: .*a\.ark:{offset}"):
        read_audio(f"{tmp_path}/a.ark:{offset}")


def test_a_pickle_in_an_ark_is_not_run(tmp_path):
    (tmp_path / "a.ark").write_bytes(b"utt PKLcos\nsystem\n(S'touch hacked'\ntR.")
    with pytest.raises(AudioError, match="is a Python pickle"):
        read_audio(f"{tmp_path}/a.ark:4")


def test_floats_in_the_scale_of_integers_are_scaled_and_noted(corpus, tmp_path, capsys):
    soundfile.write(tmp_path / "big.wav", speech() * 32768, FS, subtype="FLOAT")
    add(corpus, "big", tmp_path / "big.wav")
    format_audio(corpus, tmp_path / "dump")
    _, samples = kaldiio.load_scp(str(tmp_path / "dump" / "wav.scp"))["big"]
    np.testing.assert_allclose(samples, speech(), atol=1e-4)
    assert "big: scaled down by 32768" in capsys.readouterr().err


def test_floats_slightly_above_full_scale_are_clipped_and_noted(tmp_path):
    loud = speech() * 4  # up to 1.2
    soundfile.write(tmp_path / "loud.wav", loud, FS, subtype="FLOAT")
    recording = read_recording(str(tmp_path / "loud.wav"))
    np.testing.assert_array_equal(recording.samples, loud.clip(-1, 1))
    assert re.match(r"clipped, its samples reach 1\.20", recording.notes[0])


@pytest.mark.parametrize("scale", [10, 1e6, 2.0**31])
def test_audio_of_no_known_scale_is_refused(tmp_path, scale):
    soundfile.write(tmp_path / "a.wav", speech() * scale, FS, subtype="FLOAT")
    with pytest.raises(AudioError, match=r"out of scale: .*a\.wav: samples reach \d"):
        read_audio(str(tmp_path / "a.wav"))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_samples_that_are_no_numbers_are_refused(tmp_path, value):
    samples = speech()
    samples[100] = value
    soundfile.write(tmp_path / "a.wav", samples, FS, subtype="FLOAT")
    with pytest.raises(AudioError, match="samples are not finite"):
        read_audio(str(tmp_path / "a.wav"))


def test_channels_in_antiphase_are_not_averaged_to_silence(corpus, tmp_path, capsys):
    soundfile.write(tmp_path / "anti.wav", np.stack([speech(), -speech()], axis=1), FS)
    add(corpus, "anti", tmp_path / "anti.wav")
    format_audio(corpus, tmp_path / "dump")
    _, samples = kaldiio.load_scp(str(tmp_path / "dump" / "wav.scp"))["anti"]
    np.testing.assert_allclose(samples, speech(), atol=1e-4)
    assert "anti: channel 0 of 2 used, because the channels cancel out" in capsys.readouterr().err


def test_speech_on_one_channel_alone_is_averaged_as_ever(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.stack([speech() * 0, speech()], axis=1), FS)
    recording = read_recording(str(tmp_path / "a.wav"))
    assert recording.notes == ("2 channels averaged to mono",)
    np.testing.assert_allclose(recording.samples, speech() / 2, atol=1e-4)


@pytest.mark.parametrize("rate", [44101, 15999, 7919, 96000])
def test_odd_sampling_rates_neither_fail_nor_fill_the_memory(tmp_path, rate):
    time = np.arange(rate) / rate
    soundfile.write(tmp_path / "a.wav", 0.5 * np.sin(2 * np.pi * 440 * time), rate)
    samples = read_audio_at(str(tmp_path / "a.wav"), FS).samples
    assert abs(len(samples) - FS) <= 1 and samples.dtype == np.float32
    assert np.argmax(np.abs(np.fft.rfft(samples))) == pytest.approx(440, abs=1)


def test_a_header_of_eight_hertz_is_damage(tmp_path):
    soundfile.write(tmp_path / "a.wav", speech(0.1), 8)
    with pytest.raises(AudioError, match="the header states 8 samples a second"):
        read_audio(str(tmp_path / "a.wav"))


# --- test sets


@pytest.mark.parametrize("fault", ["cut", "missing", "no transcript", "no speaker"])
def test_a_test_set_never_loses_an_utterance(corpus, tmp_path, fault):
    data = DataDir.read(corpus)
    if fault == "cut":
        path = Path(data.wav_scp["u2"])
        path.write_bytes(path.read_bytes()[:5000])
    elif fault == "missing":
        Path(data.wav_scp["u2"]).unlink()
    elif fault == "no transcript":
        del data.text["u2"]
        data.write(corpus)
    else:
        del data.utt2spk["u2"]
        data.write(corpus)
    format_audio(corpus, tmp_path / "train")
    assert "u2" not in DataDir.read(tmp_path / "train").wav_scp
    with pytest.raises(UserError, match=r"format set: 1 of 5 utterances of a test set .*u2: .*fix"):
        format_audio(corpus, tmp_path / "new" / "test", keep_all=True)
    assert not (tmp_path / "new" / "test").exists()


def test_a_test_utterance_with_an_empty_reference_is_kept(corpus, tmp_path):
    data = DataDir.read(corpus)
    data.text["u1"] = ""
    data.write(corpus)
    format_audio(corpus, tmp_path / "test", keep_all=True)
    assert "u1\n" in (tmp_path / "test" / "text").read_text()
    assert len(DataDir.read(tmp_path / "test").wav_scp) == 5
    format_audio(corpus, tmp_path / "train")
    assert "u1 empty transcript\n" in (tmp_path / "train" / "dropped").read_text()


def test_what_came_in_is_what_was_kept_and_dropped(corpus, tmp_path):
    add(corpus, "gone", "/nowhere.wav")
    format_audio(corpus, tmp_path / "dump")
    kept = set(DataDir.read(tmp_path / "dump").wav_scp)
    dropped = {line.split()[0] for line in (tmp_path / "dump" / "dropped").open()}
    assert kept | dropped == set(DataDir.read(corpus).wav_scp) and not kept & dropped
    for lost in (["u1"], ["u1", "u2", "u2"], ["u1", "u2", "u3"]):
        with pytest.raises(RuntimeError, match="lost or counted twice"):
            require_conserved("set", ["u1", "u2"], lost, {})


# --- pipes


def pipe(path: Path) -> str:
    return f"cat {shlex.quote(str(path))} |"


def test_a_pipe_runs_only_where_it_is_allowed(corpus, tmp_path):
    soundfile.write(tmp_path / "a b.wav", speech(), FS)
    add(corpus, "piped", pipe(tmp_path / "a b.wav"))
    for stage in (format_audio, lambda src, dst: perturb_speed(src, dst, [0.9, 1.0])):
        with pytest.raises(UserError, match=r"wav\.scp:1: piped is a pipe, .* allow_pipes"):
            stage(corpus, tmp_path / "refused")
    with pytest.raises(AudioError, match="not allowed to run"):
        read_audio(pipe(tmp_path / "a b.wav"))
    perturb_speed(corpus, tmp_path / "sp", [0.9, 1.0], allow_pipes=True)
    format_audio(tmp_path / "sp", tmp_path / "dump", allow_pipes=True, keep_all=True)
    dump = kaldiio.load_scp(str(tmp_path / "dump" / "wav.scp"))
    np.testing.assert_allclose(dump["piped"][1], speech(), atol=1e-4)
    assert len(dump["sp0.9-piped"][1]) == pytest.approx(FS / 0.9, abs=1)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("no-such-program x |", "status 127: no-such-program x: .*not found"),
        ("echo first >&2; echo the disk is gone >&2; exit 3 |", "status 3: .*the disk is gone"),
        ("false | cat |", "status 1: false | cat"),
        ("true |", "wrote nothing"),
        ("echo hello |", "Format not recognised"),
    ],
)
def test_a_command_that_fails_says_how(corpus, tmp_path, command, message):
    add(corpus, "piped", command)
    format_audio(corpus, tmp_path / "dump", allow_pipes=True)
    dropped = (tmp_path / "dump" / "dropped").read_text()
    assert re.search(rf"^piped .*{message}", dropped) and dropped.count("\n") == 1


def test_ids_too_long_for_a_file_name_are_no_obstacle(corpus, tmp_path):
    utt = "长" * 100
    add(corpus, utt, tmp_path / "u0.wav")
    perturb_speed(corpus, tmp_path / "sp", [0.9])
    format_audio(corpus, tmp_path / "dump", audio_format="wav", keep_all=True)
    assert read_audio(DataDir.read(tmp_path / "dump").wav_scp[utt])[0].shape == (FS,)
