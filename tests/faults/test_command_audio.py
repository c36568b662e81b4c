"""Audio that is short, cut, missing, of another rate or no audio, in all commands that read it."""

import argparse
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr
from commands import assert_one_line
from small_models import RATE, save, speech

from espnet_kv.bin import asr_inference, asr_inference_streaming, convert, profile, stream
from espnet_kv.containers import container_of
from espnet_kv.errors import UserError
from espnet_kv.espnet.parser import path_name_type
from espnet_kv.recipe import audio
from espnet_kv.streaming.recordings import read_recording, read_utterance
from espnet_kv.streaming.sources import FileSource, Stream

DECODERS = {"offline": asr_inference.main, "streaming": asr_inference_streaming.main}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model of tones and whole recordings, u1 to u3."""
    folder = tmp_path_factory.mktemp("tones")
    save(folder, encoder_conf={"attention_type": "mha", "attention_conf": None})
    for n, letters in enumerate(("ABBA", "B", "AB_BA"), start=1):
        soundfile.write(folder / f"u{n}.wav", speech(letters).numpy(), RATE)
    return folder


@pytest.fixture
def files(folder) -> list[str]:
    return [
        *["--asr_train_config", f"{folder}/config.yaml"],
        *["--asr_model_file", f"{folder}/model.pth"],
    ]


@pytest.fixture
def decode(folder, files, tmp_path):
    """Decode lines of a wav.scp; the status, and the files that were written."""

    def decode(main, lines: str, *options: str, name: str = "wav.scp"):
        scp = tmp_path / name
        scp.parent.mkdir(exist_ok=True, parents=True)
        scp.write_text(lines.format(f=folder, t=tmp_path))
        out = tmp_path / "out"
        arguments = [*files, "--data_path_and_name_and_type", f"{scp},speech,sound"]
        arguments += ["--output_dir", str(out), "--num_workers", "0", "--beam_size", "3"]
        status = main([*arguments, *options])
        found = {}
        for file in out.glob("1best_recog/*"):
            rows = (line.partition(" ") for line in file.read_text().splitlines())
            found[file.name] = {key: value for key, _, value in rows}
        return status, found

    return decode


def one_error(status: int, said: str, capsys) -> None:
    assert_one_line(argparse.Namespace(returncode=status, stderr=capsys.readouterr().err), said)


@pytest.mark.parametrize("batch", ["1", "4"])
@pytest.mark.parametrize("samples", [0, 160, 600], ids=["empty", "10 ms", "38 ms"])
def test_an_utterance_of_10_ms_has_an_empty_text(samples, batch, decode, tmp_path):
    soundfile.write(tmp_path / "short.wav", np.zeros(samples), RATE)
    lines = "s {t}/short.wav\nu1 {f}/u1.wav\nu2 {f}/u2.wav\n"
    status, short = decode(asr_inference.main, lines, "--batch_size", batch)
    assert status == 0 and set(short) == {"text", "token", "token_int", "score"}
    assert all(list(rows) == ["s", "u1", "u2"] for rows in short.values())
    assert short["text"]["s"] == short["token"]["s"] == short["token_int"]["s"] == ""
    _, alone = decode(asr_inference.main, lines.split("\n", 1)[1])
    assert {key: alone["text"][key] for key in ("u1", "u2")} == alone["text"]
    assert short["text"] == {"s": ""} | alone["text"]


def cut(folder: Path, tmp_path: Path, name: str, **options) -> Path:
    whole, file = tmp_path / f"whole.{name}", tmp_path / f"cut.{name}"
    soundfile.write(whole, speech("ABAB").numpy(), RATE, **options)
    file.write_bytes(whole.read_bytes()[: whole.stat().st_size * 2 // 3])
    return file


CONTAINERS = {
    "wav": {},
    "float.wav": {"subtype": "FLOAT"},
    "flac": {},
    "aiff": {},
    "au": {"subtype": "PCM_16"},
    "w64": {},
    "rf64": {"format": "RF64"},
    "ogg": {},
    "opus": {"format": "OGG", "subtype": "OPUS"},
    "mp3": {},
    "nist": {"format": "NIST", "subtype": "PCM_16"},
    "caf": {"format": "CAF", "subtype": "PCM_16"},
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_a_file_that_was_cut_is_told_whatever_its_format(name, folder, tmp_path):
    file = cut(folder, tmp_path, name, **CONTAINERS[name])
    with pytest.raises(UserError, match=f"cut.{name} "):
        read_recording(str(file), "sound")
    with pytest.raises(UserError, match=f"cut.{name} "):
        list(Stream(FileSource(file), RATE))
    whole = tmp_path / f"whole.{name}"
    assert len(read_recording(str(whole), "sound")[0]) == pytest.approx(
        len(speech("ABAB")), abs=2e3
    )
    assert sum(map(len, Stream(FileSource(whole), RATE))) > 0


@pytest.mark.parametrize("form", ["VOC", "AVR", "MAT5"])
def test_a_format_whose_end_is_not_known_is_refused(form, folder, tmp_path):
    file = tmp_path / "sound.bin"
    soundfile.write(file, speech("AB").numpy(), RATE, format=form, subtype="PCM_16")
    said = f"sound.bin cannot be read as audio: whether {form} is complete .*ffmpeg"
    for read in (FileSource, lambda file: read_recording(str(file), "sound")):
        with pytest.raises(UserError, match=said):
            read(file)


def test_flac_of_unknown_length_is_read(folder, tmp_path):
    """An encoder that writes into a pipe cannot go back to state the number of samples."""
    soundfile.write(tmp_path / "known.flac", speech("ABBA").numpy(), RATE)
    content = bytearray((tmp_path / "known.flac").read_bytes())
    content[21] &= 0xF0  # 36 bits from the middle of byte 21 on
    content[22:26] = bytes(4)
    (tmp_path / "unknown.flac").write_bytes(content)
    expected = soundfile.read(tmp_path / "known.flac")[0]
    for samples in readings(tmp_path / "unknown.flac"):
        np.testing.assert_allclose(samples, expected, atol=1e-6)


@pytest.mark.parametrize("rate", [1, 999, 768001, 2147483647])
def test_a_rate_that_no_audio_has_is_told(rate, folder, tmp_path):
    content = bytearray((folder / "u1.wav").read_bytes())
    content[24:28] = struct.pack("<I", rate)
    (tmp_path / "rate.wav").write_bytes(content)
    said = f"rate.wav cannot be read as audio: the header states {rate} samples a second"
    for read in (FileSource, lambda file: read_recording(str(file), "sound")):
        with pytest.raises(UserError, match=said):
            read(tmp_path / "rate.wav")


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize(
    ("factor", "note"),
    [(32768, "scaled down by 32768"), (1.4, "clipped, its samples reach 1.40")],
    ids=["integers", "loud"],
)
def test_every_way_to_read_scales_floats_alike(factor, note, channels, tmp_path, caplog):
    left = speech("AB").numpy()
    left = np.stack([left / np.abs(left).max(), left * 0.1][:channels], axis=1)
    soundfile.write(tmp_path / "f.wav", left * factor, RATE, subtype="FLOAT")
    recipe, *others = readings(tmp_path / "f.wav")
    assert np.abs(recipe).max() <= 1
    for samples in others:
        np.testing.assert_allclose(samples, recipe, atol=1e-6)
    notes = []
    read_utterance(str(tmp_path / "f.wav"), "sound", RATE, note=notes.append)
    assert note in notes[0]
    assert any(note in said for said in FileSource(tmp_path / "f.wav").notes)


@pytest.mark.parametrize("factor", [10, 1e30])
def test_samples_of_no_known_scale_are_refused(factor, tmp_path):
    loud = speech("AB").numpy()
    soundfile.write(tmp_path / "f.wav", loud / np.abs(loud).max() * factor, RATE, subtype="FLOAT")
    for read in (FileSource, lambda file: read_utterance(str(file), "sound", RATE)):
        with pytest.raises(UserError, match=r"f.wav: samples reach 1.*; scale the audio to one"):
            read(tmp_path / "f.wav")


@pytest.mark.parametrize("name", CONTAINERS)
def test_a_file_on_standard_input_is_told_from_raw_audio(name, folder, tmp_path):
    soundfile.write(tmp_path / f"a.{name}", speech("ABBA").numpy(), RATE, **CONTAINERS[name])
    content = (tmp_path / f"a.{name}").read_bytes()
    known = {"float.wav": "WAV", "rf64": "WAV", "opus": "Ogg", "ogg": "Ogg"}
    assert container_of(content[:65536]) == known.get(name, name.upper())
    raw = (speech("ABBA").numpy() * 32767).astype("<i2")
    for start in (raw, raw[2000:], raw[:3], np.full(9000, -1025, "<i2")):
        assert container_of(start.tobytes()) is None


@pytest.mark.parametrize("size", [0xFFFFFFFF, 0x7FFFF000], ids=["unknown", "2 GiB"])
def test_a_wav_that_was_written_into_a_pipe_is_whole(size, folder, tmp_path):
    content = bytearray((folder / "u1.wav").read_bytes())
    at = content.index(b"data") + 4
    content[at : at + 4] = struct.pack("<I", size)
    (tmp_path / "pipe.wav").write_bytes(content)
    samples, _ = read_recording(str(tmp_path / "pipe.wav"), "sound")
    np.testing.assert_array_equal(samples, soundfile.read(folder / "u1.wav")[0])


AUDIO = {
    "missing": (None, "u2: {t}/bad.flac does not exist"),
    "cut": ("cut", "u2: {t}/bad.flac "),
    "text": (b"no audio", "u2: {t}/bad.flac cannot be read as audio"),
    "nan": ("nan", "u2: {t}/bad.flac holds samples that are infinite or NaN"),
}


@pytest.mark.parametrize(("kind", "workers"), [*((k, "0") for k in AUDIO), ("cut", "1")])
@pytest.mark.parametrize("way", DECODERS)
def test_a_file_that_cannot_be_read_is_named_with_its_key(
    way, kind, workers, decode, tmp_path, folder, capsys
):
    content, said = AUDIO[kind]
    if content == "cut":
        cut(folder, tmp_path, "flac").rename(tmp_path / "bad.flac")
    elif content == "nan":
        samples = speech("AB").numpy()
        samples[100] = np.nan
        soundfile.write(tmp_path / "bad.flac", samples, RATE, format="WAV", subtype="FLOAT")
    elif content is not None:
        (tmp_path / "bad.flac").write_bytes(content)
    lines = "u1 {f}/u1.wav\nu2 {t}/bad.flac\n"
    status, found = decode(DECODERS[way], lines, "--num_workers", workers)
    one_error(status, said.format(t=tmp_path), capsys)
    assert not found and not (tmp_path / "out").exists()


@pytest.mark.parametrize("way", DECODERS)
@pytest.mark.parametrize("rate", [8000, 44100])
def test_audio_of_another_rate_is_resampled_with_a_note(way, rate, decode, tmp_path, caplog):
    samples = soxr.resample(speech("ABBA").numpy(), RATE, rate)
    soundfile.write(tmp_path / "other.wav", samples, rate, subtype="FLOAT")
    back = soxr.resample(samples, rate, RATE)
    soundfile.write(tmp_path / "same.wav", back, RATE, subtype="FLOAT")
    lines = "a {t}/other.wav\nb {t}/same.wav\n"
    status, found = decode(DECODERS[way], lines)
    assert status == 0 and found["token_int"]["a"] == found["token_int"]["b"] != ""
    (note,) = {record.message for record in caplog.records if "resampled" in record.message}
    assert f"{rate} samples per second" in note and f"{RATE}" in note


def test_channels_are_averaged_unless_they_cancel_each_other(tmp_path):
    left = speech("AB").numpy()
    soundfile.write(tmp_path / "right.wav", np.stack([0 * left, left], axis=1), RATE)
    np.testing.assert_allclose(
        read_utterance(str(tmp_path / "right.wav"), "sound", RATE), left / 2, atol=1e-4
    )
    soundfile.write(tmp_path / "anti.wav", np.stack([0 * left, left, -left], axis=1), RATE)
    for samples in readings(tmp_path / "anti.wav"):
        np.testing.assert_allclose(samples, left, atol=1e-4)


@pytest.mark.parametrize("weights", [(0, 1), (1, 1), (1, -1), (0.5, -0.5, 0.02), (0, 0)], ids=str)
def test_every_way_to_read_makes_the_same_of_several_channels(tmp_path, weights):
    left = speech("AB").numpy()
    soundfile.write(tmp_path / "a.wav", np.stack([w * left for w in weights], axis=1), RATE)
    recipe, *others = readings(tmp_path / "a.wav")
    for samples in others:
        np.testing.assert_allclose(samples, recipe, atol=1e-6)


def readings(file) -> list[np.ndarray]:
    """The samples of a file as the recipe, the decoding commands and `stream` read them."""
    return [
        audio.read_recording(str(file)).samples,
        read_utterance(str(file), "sound", RATE),
        np.concatenate(list(Stream(FileSource(file), RATE))),
    ]


LISTS = {
    "empty": ("", "wav.scp names no utterance"),
    "twice": ("u1 {f}/u1.wav\nu1 {f}/u2.wav\n", "wav.scp:2: utterance u1 occurs twice"),
    "no path": ("u1 {f}/u1.wav\nu2\n", "wav.scp:2: expected"),
    "empty line": ("\nu1 {f}/u1.wav\n", "wav.scp:1: expected"),
    "mark": ("\ufeffu1 {f}/u1.wav\n", "wav.scp:1: remove the byte order mark"),
    "command": ("u1 cat {f}/u1.wav |\n", r"u1: cat .*\| *: a command is not run here"),
}


@pytest.mark.parametrize(("lines", "said"), LISTS.values(), ids=LISTS)
@pytest.mark.parametrize("way", DECODERS)
def test_lists_that_cannot_be_used(way, lines, said, decode, capsys):
    status, _ = decode(DECODERS[way], lines)
    one_error(status, said, capsys)


@pytest.mark.parametrize("way", DECODERS)
def test_keys_that_the_data_does_not_have(way, decode, tmp_path, capsys):
    lines = "u1 {f}/u1.wav\nu2 {f}/u2.wav\nu3 {f}/u3.wav\n"
    keys = tmp_path / "keys"
    keys.write_text("u3\nu1\n")  # in another order than the data
    _, found = decode(DECODERS[way], lines, "--key_file", str(keys))
    assert set(found["text"]) == {"u1", "u3"}
    for content, said in (("u1\nu9\n", "the data has no utterance u9"), ("", "names no utt")):
        keys.write_text(content)
        status, _ = decode(DECODERS[way], lines, "--key_file", str(keys))
        one_error(status, f"--key_file {keys}:? {said}", capsys)


@pytest.mark.parametrize("name", ["a,b/wav.scp", "run #1/x y/wav.scp", "$(echo 'q')/wav.scp"])
@pytest.mark.parametrize("way", DECODERS)
def test_paths_that_other_parsers_read_otherwise(way, name, decode):
    status, found = decode(DECODERS[way], "u2 {f}/u2.wav\n", name=name)
    assert status == 0 and found["text"]["u2"]


def test_a_list_of_a_yaml_is_read_as_espnet_reads_it():
    assert path_name_type("['a,b.scp', 'speech', 'sound']") == ("a,b.scp", "speech", "sound")


def test_calibration_names_what_it_leaves_out(folder, files, tmp_path, capsys):
    lines = [f"u{n} {folder}/u{n}.wav\n" for n in (1, 2, 3)]
    soundfile.write(tmp_path / "s.wav", np.zeros(4000), RATE)
    (tmp_path / "wav.scp").write_text("".join([*lines, f"short1 {tmp_path}/s.wav\n"]))
    options = [*files, "--output_dir", f"{tmp_path}/out", "--attention_type", "mla"]
    options += ["--kv_rank", "4", "--calibration_scp", f"{tmp_path}/wav.scp"]
    assert convert.main(options) == 0
    said = capsys.readouterr().err
    assert (
        "warning: 1 utterances of the calibration audio left out, shorter than 0.5 s: short1"
        in said
    )


@pytest.mark.parametrize("name", ["missing", "cut"])
def test_calibration_and_profile_name_utterance_and_file(name, folder, files, tmp_path, capsys):
    if name == "cut":
        cut(folder, tmp_path, "flac").rename(tmp_path / "bad.flac")
    (tmp_path / "wav.scp").write_text(f"u1 {folder}/u1.wav\nu2 {tmp_path}/bad.flac\n")
    options = ["--output_dir", f"{tmp_path}/out", "--attention_type", "mla", "--kv_rank", "4"]
    options += ["--calibration_scp", f"{tmp_path}/wav.scp"]
    said = f"wav.scp: u2: {tmp_path}/bad.flac"
    one_error(convert.main([*files, *options]), said, capsys)
    options = ["--wav_scp", f"{tmp_path}/wav.scp", "--output", f"{tmp_path}/p.json"]
    options += ["--chunk_size", "4", "--lengths", "2"]
    one_error(profile.main([*files, *options]), said, capsys)
    assert {p.name for p in tmp_path.iterdir()} <= {"wav.scp", "bad.flac", "whole.flac"}


def test_a_cut_file_ends_stream_with_one_line(folder, files, tmp_path, capsys):
    file = cut(folder, tmp_path, "wav")
    one_error(stream.main([*files, str(file)]), "cut.wav is cut short", capsys)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
@pytest.mark.parametrize("fast", ["true", "false"])
def test_other_number_types_find_the_same_words(dtype, fast, decode):
    lines = "u1 {f}/u1.wav\nu2 {f}/u2.wav\n"
    options = ["--ctc_weight", "0.9", "--fast_ctc", fast, "--ctc_window_margin", "0"]
    _, expected = decode(asr_inference.main, lines, *options)
    for batch in ("1", "2"):
        status, found = decode(
            asr_inference.main, lines, *options, "--dtype", dtype, "--batch_size", batch
        )
        assert status == 0 and found["token_int"] == expected["token_int"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_without_permission_to_read(folder, tmp_path):
    file = tmp_path / "secret.wav"
    file.write_bytes((folder / "u1.wav").read_bytes())
    file.chmod(0)
    with pytest.raises(UserError, match="change its permissions"):
        read_recording(str(file), "sound")
