"""Stages 2 to 4 on tiny recordings, sound and spoilt."""

import os
from pathlib import Path

import kaldiio
import numpy as np
import pytest
import soundfile

from espnet_kv.errors import UserError
from espnet_kv.recipe.audio import AudioError, read_audio, read_audio_at
from espnet_kv.recipe.datadir import DataDir
from espnet_kv.recipe.format import AUDIO_FORMATS, format_audio
from espnet_kv.recipe.lengths import filter_lengths
from espnet_kv.recipe.perturb import perturb_speed
from espnet_kv.recipe.pool import parallel_map


def tone(seconds: float, rate: int = 16000, hertz: float = 440.0) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype("f4")


def pitch(samples: np.ndarray, rate: int = 16000) -> float:
    return float(np.argmax(np.abs(np.fft.rfft(samples))) * rate / len(samples))


def tree(directory: Path) -> dict[str, bytes]:
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Six good utterances of 1.0 to 1.5 s by two speakers, flac and wav."""
    audio = tmp_path / "audio"
    audio.mkdir()
    data = DataDir()
    for i in range(6):
        utt = f"spk{i % 2}-utt{i}"
        path = audio / f"{utt}.{'wav' if i % 2 else 'flac'}"
        noise = np.random.default_rng(i).uniform(-0.3, 0.3, 16000 + 1600 * i)
        soundfile.write(path, noise, 16000, subtype="PCM_16")
        data.wav_scp[utt] = str(path)
        data.text[utt] = f"HELLO NUMBER {i}"
        data.utt2spk[utt] = f"spk{i % 2}"
    data.write(tmp_path / "train")
    return tmp_path / "train"


def add(corpus: Path, utt: str, path: Path, text: str = "HELLO") -> None:
    data = DataDir.read(corpus)
    data.wav_scp[utt], data.text[utt], data.utt2spk[utt] = str(path), text, "spk0"
    data.write(corpus)


def spoil(corpus: Path) -> dict[str, str]:
    """Add one utterance of every unusable kind; utterance -> part of the reason for it."""
    audio = corpus.parent / "audio"
    for kind, size in (("flac", 9000), ("wav", 20000)):
        whole = audio / f"whole.{kind}"
        soundfile.write(whole, tone(1), 16000, subtype="PCM_16")
        (audio / f"cut.{kind}").write_bytes(whole.read_bytes()[:size])
    (audio / "words.wav").write_text("this is no audio")
    (audio / "nothing.flac").write_bytes(b"")
    soundfile.write(audio / "empty.wav", np.zeros(0), 16000)
    soundfile.write(audio / "nan.wav", np.full(800, np.nan), 16000, subtype="FLOAT")
    add(corpus, "bad-cutflac", audio / "cut.flac")
    add(corpus, "bad-cutwav", audio / "cut.wav")
    add(corpus, "bad-words", audio / "words.wav")
    add(corpus, "bad-missing", audio / "nowhere.flac")
    add(corpus, "bad-empty", audio / "empty.wav")
    add(corpus, "bad-text", audio / "whole.wav", text="")
    return {
        "bad-cutflac": "corrupt",
        "bad-cutwav": "cut short",
        "bad-words": "corrupt",
        "bad-missing": "missing file",
        "bad-empty": "empty audio",
        "bad-text": "empty transcript",
    }


@pytest.mark.parametrize("name", ["nothing.flac", "nan.wav", "cut.flac", "empty.wav", "gone.wav"])
def test_read_audio_refuses(corpus: Path, name: str):
    spoil(corpus)
    with pytest.raises(AudioError, match=name):
        read_audio(str(corpus.parent / "audio" / name))


def test_read_audio_from_damaged_ark(tmp_path: Path):
    ark = tmp_path / "a.ark"
    kaldiio.save_ark(str(ark), {"utt": (16000, np.arange(999, dtype=np.int16))})
    samples, rate = read_audio(f"{ark}:4")
    assert rate == 16000
    np.testing.assert_array_equal(samples, np.arange(999, dtype=np.float32) / 32768)
    for offset in (0, 7, 5000):
        with pytest.raises(AudioError, match="corrupt"):
            read_audio(f"{ark}:{offset}")
    with pytest.raises(AudioError, match="missing"):
        read_audio(f"{tmp_path}/b.ark:4")


def test_streamed_wav_header_is_no_damage(tmp_path: Path):
    soundfile.write(tmp_path / "a.wav", tone(0.5), 16000, subtype="PCM_16")
    content = bytearray((tmp_path / "a.wav").read_bytes())
    content[40:44] = (0x7FFFF000).to_bytes(4, "little")  # as sox leaves it in a pipe
    (tmp_path / "a.wav").write_bytes(content)
    assert len(read_audio(str(tmp_path / "a.wav"))[0]) == 8000


def test_stereo_and_other_rates_are_converted(tmp_path: Path):
    left, right = tone(1, 44100, 300), np.zeros(44100, dtype="f4")
    soundfile.write(tmp_path / "s.wav", np.stack([left, right], axis=1), 44100)
    audio = read_audio_at(str(tmp_path / "s.wav"), 16000)
    assert audio.notes == ("2 channels averaged to mono", "resampled from 44100 Hz to 16000 Hz")
    assert audio.samples.shape == (16000,) and audio.samples.dtype == np.float32
    np.testing.assert_allclose(audio.samples[500:-500], tone(1, hertz=300)[500:-500] / 2, atol=2e-3)


@pytest.mark.parametrize("audio_format", AUDIO_FORMATS)
def test_format_keeps_the_samples(corpus: Path, tmp_path: Path, audio_format: str):
    dump = tmp_path / "dump" / "train"
    format_audio(corpus, dump, audio_format=audio_format)
    source, data = DataDir.read(corpus), DataDir.read(dump)
    assert (data.text, data.utt2spk) == (source.text, source.utt2spk)
    assert (dump / "audio_format").read_text() == f"{audio_format}\n"
    assert (dump / "feats_type").read_text() == "raw\n"
    assert (dump / "dropped").read_text() == ""
    counts = dict(line.split() for line in (dump / "utt2num_samples").read_text().splitlines())
    for utt, entry in data.wav_scp.items():
        original, _ = soundfile.read(source.wav_scp[utt])
        if audio_format.endswith("ark"):
            rate, samples = kaldiio.load_scp(str(dump / "wav.scp"))[utt]
        else:
            samples, rate = soundfile.read(entry)
        assert rate == 16000 and int(counts[utt]) == len(samples)
        np.testing.assert_array_equal(samples, original)


@pytest.mark.parametrize("nj", [1, 2])
def test_every_part_of_the_data_has_an_ark(corpus: Path, tmp_path: Path, monkeypatch, nj: int):
    format_audio(corpus, tmp_path / "whole", nj=nj)
    monkeypatch.setattr("espnet_kv.recipe.format.PART", (4, 4))
    format_audio(corpus, tmp_path / "parts", nj=nj)
    arks = {path.name for path in (tmp_path / "parts").glob("*.ark")}
    assert arks == {"data_wav.1.ark", "data_wav.2.ark"}
    whole, parts = (kaldiio.load_scp(str(tmp_path / d / "wav.scp")) for d in ("whole", "parts"))
    assert list(whole) == list(parts) and len(whole) == 6
    for utt in whole:
        np.testing.assert_array_equal(whole[utt][1], parts[utt][1])
    for name in ("text", "utt2spk", "spk2utt", "utt2num_samples"):
        assert (tmp_path / "whole" / name).read_text() == (tmp_path / "parts" / name).read_text()
    assert {path.name for path in (tmp_path / "parts").iterdir()} == arks | {
        *("wav.scp", "text", "utt2spk", "spk2utt", "utt2num_samples", "dropped", "feats_type"),
        "audio_format",
    }


def test_espnet_reads_the_dumps_alike(corpus: Path, tmp_path: Path):
    from espnet2.train.dataset import kaldi_loader, sound_loader

    format_audio(corpus, tmp_path / "ark", audio_format="flac.ark")
    format_audio(corpus, tmp_path / "flac", audio_format="flac")
    ark = kaldi_loader(str(tmp_path / "ark" / "wav.scp"), float_dtype="float32")
    flac = sound_loader(str(tmp_path / "flac" / "wav.scp"), float_dtype="float32")
    assert set(ark) == set(flac) == set(DataDir.read(corpus).wav_scp)
    for utt in ark:
        np.testing.assert_array_equal(ark[utt], flac[utt])
        np.testing.assert_array_equal(ark[utt], read_audio(DataDir.read(corpus).wav_scp[utt])[0])


def test_format_names_what_it_drops(corpus: Path, tmp_path: Path, capsys):
    expected = spoil(corpus)
    good = set(DataDir.read(corpus).wav_scp) - set(expected)
    format_audio(corpus, tmp_path / "dump")
    assert set(DataDir.read(tmp_path / "dump").wav_scp) == good
    dropped = dict(
        line.split(" ", 1) for line in (tmp_path / "dump" / "dropped").read_text().splitlines()
    )
    warnings = capsys.readouterr().err
    assert dropped.keys() == expected.keys()
    for utt, reason in expected.items():
        assert reason in dropped[utt]
        assert utt in warnings
    assert "5 utterances dropped for their audio" in warnings


def test_format_notes_conversions(corpus: Path, tmp_path: Path, capsys):
    soundfile.write(tmp_path / "s.wav", np.stack([tone(1, 44100)] * 2, axis=1), 44100)
    soundfile.write(tmp_path / "n.wav", tone(1, 8000), 8000)
    add(corpus, "odd-stereo", tmp_path / "s.wav")
    add(corpus, "odd-narrow", tmp_path / "n.wav")
    format_audio(corpus, tmp_path / "dump")
    warnings = capsys.readouterr().err
    assert "odd-stereo: 2 channels averaged to mono, resampled from 44100 Hz" in warnings
    assert "odd-narrow: resampled from 8000 Hz to 16000 Hz" in warnings
    assert "2 utterances were converted" in warnings
    for utt in ("odd-stereo", "odd-narrow"):
        rate, samples = kaldiio.load_scp(str(tmp_path / "dump" / "wav.scp"))[utt]
        assert (rate, len(samples)) == (16000, 16000)
        assert pitch(samples) == pytest.approx(440, abs=2)


def test_format_refuses_when_most_is_unusable(corpus: Path, tmp_path: Path):
    data = DataDir.read(corpus)
    for utt in list(data.wav_scp)[:4]:
        data.wav_scp[utt] = "/nowhere/a.flac"
    data.write(corpus)
    with pytest.raises(UserError, match=r"4 of 6 utterances.*missing file: /nowhere/a.flac"):
        format_audio(corpus, tmp_path / "dump" / "train")
    assert list((tmp_path / "dump").iterdir()) == []


def test_format_refuses_wrong_calls(corpus: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"mp3 is unknown: use one of flac.ark"):
        format_audio(corpus, tmp_path / "dump", audio_format="mp3")
    with pytest.raises(UserError, match="its own input"):
        format_audio(corpus, corpus)
    with (corpus / "wav.scp").open("a") as scp:
        scp.write("spk0-utt0 again.flac\n")
    with pytest.raises(UserError, match=r"spk0-utt0 occurs twice"):
        format_audio(corpus, tmp_path / "dump")


def test_interrupted_format_leaves_the_old_dump(corpus: Path, tmp_path: Path, monkeypatch):
    dump = tmp_path / "dump"
    format_audio(corpus, dump)
    before = tree(dump)

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("espnet_kv.recipe.format.write_text", interrupt)
        with pytest.raises(KeyboardInterrupt):
            format_audio(corpus, dump)
    assert tree(dump) == before
    (tmp_path / ".dump.partial").mkdir()  # as a kill leaves it
    (tmp_path / ".dump.partial" / "data_wav.1.ark").write_bytes(b"half")
    format_audio(corpus, dump)
    assert tree(dump) == before
    assert not (tmp_path / ".dump.partial").exists()


def test_killed_worker_is_told():
    with pytest.raises(UserError, match=r"worker process was killed.*smaller --nj"):
        list(parallel_map(os._exit, [1, 1], nj=2))


def test_perturb_changes_tempo_and_pitch(tmp_path: Path):
    soundfile.write(tmp_path / "a.flac", tone(2), 16000)
    DataDir({"u": str(tmp_path / "a.flac")}, {"u": "HI"}, {"u": "s"}).write(tmp_path / "src")
    perturb_speed(tmp_path / "src", tmp_path / "sp", [0.9, 1.0, 1.1])
    data = DataDir.read(tmp_path / "sp")
    assert data.utt2spk == {"sp0.9-u": "sp0.9-s", "u": "s", "sp1.1-u": "sp1.1-s"}
    assert set(data.text.values()) == {"HI"}
    assert data.wav_scp["u"] == str(tmp_path / "a.flac")
    for factor in (0.9, 1.1):
        path = data.wav_scp[f"sp{factor}-u"]
        samples, rate = soundfile.read(path)
        assert soundfile.info(path).subtype == "PCM_16"
        assert rate == 16000
        assert len(samples) == pytest.approx(32000 / factor, abs=1)
        assert pitch(samples) == pytest.approx(440 * factor, abs=1)
        assert np.abs(samples).max() == pytest.approx(0.5, abs=0.02)


def test_stages_give_the_same_bytes_whatever_nj(corpus: Path, tmp_path: Path):
    trees = []
    for nj in (1, 2):
        perturb_speed(corpus, tmp_path / "sp", [0.9, 1.0], nj=nj)
        format_audio(tmp_path / "sp", tmp_path / "dump", nj=nj)
        trees.append((tree(tmp_path / "sp"), tree(tmp_path / "dump")))
    assert trees[0] == trees[1]
    assert len(trees[0][0]) == 6 + 5  # perturbed files; wav.scp text utt2spk spk2utt dropped


def test_perturb_reports_unreadable_audio_and_bad_factors(corpus: Path, tmp_path: Path, capsys):
    add(corpus, "bad-missing", Path("/nowhere.flac"))
    perturb_speed(corpus, tmp_path / "sp", [1.0, 1.1])
    data = DataDir.read(tmp_path / "sp")
    assert "sp1.1-bad-missing" not in data.wav_scp
    assert "bad-missing" in data.wav_scp  # stage 3 drops it, and records why
    assert "sp1.1-bad-missing: missing file: /nowhere.flac" in capsys.readouterr().err
    for factors in ([], [0.9, 0.9], [0.0], [float("nan")]):
        with pytest.raises(UserError, match="factor"):
            perturb_speed(corpus, tmp_path / "sp", factors)


def test_lengths_filter_drops_and_counts(corpus: Path, tmp_path: Path, capsys):
    soundfile.write(tmp_path / "blip.wav", tone(0.02), 16000)
    soundfile.write(tmp_path / "tenth.wav", tone(0.1), 16000)
    add(corpus, "odd-blip", tmp_path / "blip.wav")
    add(corpus, "odd-tenth", tmp_path / "tenth.wav")
    dump, train = tmp_path / "org", tmp_path / "train"
    format_audio(corpus, dump)
    filter_lengths(dump, train, min_seconds=0, max_seconds=1.35)

    whole, kept = DataDir.read(dump), DataDir.read(train)
    assert set(whole.wav_scp) - set(kept.wav_scp) == {"odd-blip", "spk0-utt4", "spk1-utt5"}
    assert all(kept.wav_scp[utt] == whole.wav_scp[utt] for utt in kept.wav_scp)
    assert not list(train.glob("*.ark"))
    assert (train / "audio_format").read_text() == "flac.ark\n"
    assert {line.split()[0] for line in (train / "utt2num_samples").open()} == set(kept.wav_scp)
    dropped = (train / "dropped").read_text()
    assert "odd-blip too short: 0.02 s, the least is 0.1 s\n" in dropped
    assert "spk1-utt5 too long: 1.50 s, the most is 1.35 s\n" in dropped
    printed = capsys.readouterr()
    assert "odd-blip: too short: 0.02 s" in printed.err
    assert "3 utterances dropped: 2 too long, 1 too short" in printed.err
    assert "kept 5 of 8" in printed.out

    before = tree(train)
    filter_lengths(dump, train, min_seconds=0, max_seconds=1.35)
    assert tree(train) == before


def test_lengths_filter_refuses(corpus: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"utt2num_samples is missing: format .* \(stage 3\)"):
        filter_lengths(corpus, tmp_path / "kept", 0.1, 20)
    format_audio(corpus, tmp_path / "org")
    with pytest.raises(UserError, match=r"no utterance lasts from 5 s to 9 s \(6 too short\)"):
        filter_lengths(tmp_path / "org", tmp_path / "kept", 5, 9)
    with pytest.raises(UserError, match="below the longest"):
        filter_lengths(tmp_path / "org", tmp_path / "kept", 20, 2)
    assert not (tmp_path / "kept").exists()
