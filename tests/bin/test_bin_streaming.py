"""asr_inference_streaming and stream as commands."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
import termios
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr
import torch
import yaml
from commands import Forked, assert_one_line, run
from small_models import CHUNKS, RATE, save, speech

from espnet_kv.bin import asr_inference_streaming, stream
from espnet_kv.streaming.sources import FileSource, Stream

REPO = Path(__file__).parents[2]
LETTERS = {"u1": "ABBA", "u2": "B", "u3": "AB__BA"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("tones")


@pytest.fixture(scope="module")
def model(folder) -> list[str]:
    """Options that name a model."""
    return save(folder)


@pytest.fixture(scope="module")
def audio(folder, model) -> dict[str, Path]:
    paths = {}
    for name, letters in LETTERS.items():
        paths[name] = folder / f"{name}.wav"
        soundfile.write(paths[name], speech(letters).numpy(), RATE)
    return paths


def pcm(letters: str, **kwargs) -> bytes:
    return (32767 * speech(letters, **kwargs)).numpy().astype("<i2").tobytes()


class TestDecoding:
    @pytest.fixture(scope="class")
    def wav_scp(self, folder, audio) -> Path:
        (folder / "wav.scp").write_text("".join(f"{k} {path}\n" for k, path in audio.items()))
        return folder / "wav.scp"

    @pytest.fixture
    def decode(self, model, wav_scp, tmp_path):
        def decode(*options: str, scp: Path = wav_scp) -> subprocess.CompletedProcess:
            return run(
                asr_inference_streaming.main,
                *model,
                *["--data_path_and_name_and_type", f"{scp},speech,sound"],
                *["--output_dir", str(tmp_path / "out"), "--num_workers", "0"],
                *["--ctc_weight", "0.9", "--beam_size", "5", *options],
            )

        return decode

    def files(self, tmp_path: Path, best: int = 1) -> dict[str, dict[str, str]]:
        found = {}
        for file in (tmp_path / f"out/{best}best_recog").iterdir():
            lines = (line.partition(" ") for line in file.read_text().splitlines())
            found[file.name] = {key: value for key, _, value in lines}
        return found

    def test_result_files_are_espnets(self, decode, tmp_path):
        ended = decode("--nbest", "2")
        assert ended.returncode == 0, ended.stderr
        first, second = self.files(tmp_path), self.files(tmp_path, best=2)
        assert first.keys() == {"text", "token", "token_int", "score"}
        assert first["text"] == {"u1": "ABBA", "u2": "B", "u3": "ABBA"}
        assert first["token"]["u1"] == "A B B A" and first["token_int"]["u1"] == "2 3 3 2"
        assert float(first["score"]["u1"]) > float(second["score"]["u1"])

    def test_it_says_what_it_cost(self, decode):
        (line,) = (line for line in decode().stderr.splitlines() if "real-time factor" in line)
        seconds = sum(len(speech(letters)) for letters in LETTERS.values()) / RATE
        assert f"for {seconds:.1f} s of audio" in line
        # 2 layers, rank 8, chunk_size * (left_chunks + 1) frames of 4 bytes
        assert f"attention {2 * 8 * 4 * 2 * 4}" in line and "conv " in line

    def test_pieces_make_no_difference(self, decode, tmp_path):
        results = []
        for options in ((), ("--simulate_chunk_ms", "35"), ("--sim_chunk_length", "777")):
            assert decode(*options).returncode == 0
            found = self.files(tmp_path)
            scores = found.pop("score")
            results.append((found, [round(float(score), 2) for score in scores.values()]))
        assert results[0] == results[1] == results[2]

    def test_segments_make_the_same_text(self, decode, tmp_path):
        assert decode("--endpoint_silence_ms", "500").returncode == 0
        assert self.files(tmp_path)["text"] == {"u1": "ABBA", "u2": "B", "u3": "ABBA"}

    def test_hotwords_change_the_text(self, decode, tmp_path):
        (tmp_path / "hotwords.txt").write_text("BBB\n")
        hotwords = ("--hotwords", str(tmp_path / "hotwords.txt"))
        for score, found in (("0.01", False), ("30", True)):
            assert decode(*hotwords, "--hotwords_score", score).returncode == 0
            assert ("BBB" in self.files(tmp_path)["text"]["u1"]) == found

    def test_options_come_from_the_yaml_and_the_command_line_wins(self, decode, tmp_path):
        config = REPO / "conf/decode_asr_streaming.yaml"
        ended = decode("--config", str(config), "--chunk_size", "4", "--cache_dtype", "int8")
        assert ended.returncode == 0, ended.stderr
        assert self.files(tmp_path)["text"]["u1"] == "ABBA"
        # 4 left chunks as the YAML says, of 4 frames as the command line says; int8 and a scale
        assert f"attention {2 * (8 + 2) * 4 * 4}" in ended.stderr

    def test_an_utterance_that_is_too_short_has_no_text(self, decode, wav_scp, tmp_path):
        short = tmp_path / "short.wav"
        soundfile.write(short, np.zeros(100), RATE)
        scp = tmp_path / "wav.scp"
        scp.write_text(f"u0 {short}\n" + wav_scp.read_text())
        ended = decode(scp=scp)
        assert ended.returncode == 0, ended.stderr
        assert "WARNING: u0: 100 samples of audio are too few" in ended.stderr
        assert self.files(tmp_path)["text"] == {"u0": "", "u1": "ABBA", "u2": "B", "u3": "ABBA"}

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            (["--lm_file", "lm.pth"], "--lm_file lm.pth: streaming does not use it"),
            (["--batch_size", "8"], "--batch_size 8: streaming does not use it"),
            (["--maxlenratio", "0.5"], "--maxlenratio 0.5"),
            (["--normalize_length", "true"], "--normalize_length True"),
            (["--ngram_file", "4gram.bin"], "unrecognized arguments: --ngram_file"),
            (["--chunk_size", "0"], "--chunk_size 0"),
            (["--beam_size", "many"], "beam_size: invalid int value: 'many'"),
            (["--key_file", "nothing.scp"], "nothing.scp does not exist"),
            (
                ["--simulate_chunk_ms", "5", "--sim_chunk_length", "5"],
                "give one",
            ),
            (["--config", "nothing.yaml"], "No such file: nothing.yaml"),
            (["--asr_model_file", "nothing.pth"], "nothing.pth does not exist"),
        ],
        ids=lambda x: x[0] if isinstance(x, list) else "",
    )
    def test_what_cannot_be_used_is_refused_in_one_line(self, decode, options, said):
        assert_one_line(decode(*options), said)

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("batch_size: 8", "--batch_size 8"),
            ("ngram_weight: 0.9", "unrecognized arguments: ngram_weight"),
            ("a: [", "--config: .*expected"),
        ],
    )
    def test_so_is_what_the_yaml_says(self, decode, tmp_path, text, said):
        (tmp_path / "decode.yaml").write_text(text)
        assert_one_line(decode("--config", str(tmp_path / "decode.yaml")), said)

    def test_so_is_audio_that_cannot_be_read(self, decode, wav_scp, tmp_path):
        scp = tmp_path / "wav.scp"
        for content, said in ((b"no audio", "bad.wav"), (None, "bad.wav")):
            bad = tmp_path / "bad.wav"
            bad.unlink(missing_ok=True)
            if content:
                bad.write_bytes(content)
            scp.write_text(wav_scp.read_text() + f"u4 {bad}\n")
            assert_one_line(decode(scp=scp), f"u4: .*{said}")

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    def test_so_is_a_gpu_that_is_not_there(self, decode):
        assert_one_line(decode("--ngpu", "1"), "--ngpu 1: no GPU was found")

    def test_python_m_espnet_kv_puts_it_in_the_place_of_espnets(self, model, folder, wav_scp):
        """As asr.sh --use_streaming true --python "python3 -m espnet_kv" calls it."""
        from espnet_kv.__main__ import main

        def espnets(arguments: list[str]) -> None:
            sys.argv = ["python -m espnet_kv", "-m", "espnet2.bin.asr_inference_streaming"]
            sys.argv += arguments
            main()

        options = [
            *["--batch_size", "1", "--ngpu", "0", "--num_workers", "0"],
            *["--data_path_and_name_and_type", f"{wav_scp},speech,sound"],
            *["--output_dir", str(folder / "by_espnet")],
        ]
        ended = run(espnets, *model, *options)
        assert ended.returncode == 0, ended.stderr
        assert (folder / "by_espnet/1best_recog/text").exists()
        # another encoder is ESPnet's own business
        other = folder / "other.yaml"
        config = yaml.safe_load((folder / "config.yaml").read_text())
        other.write_text(yaml.safe_dump(config | {"encoder": "conformer"}))
        ended = run(espnets, *options, "--asr_train_config", str(other), *model[2:])
        assert "espnet2/bin/asr_inference_streaming.py" in ended.stderr
        # ESPnet's command does not know packs
        ended = run(espnets, *options, "--model_tag", str(folder / "gone.zip"))
        assert_one_line(ended, "gone.zip")


class TestStream:
    def test_a_file_becomes_a_line_per_pause(self, model, audio):
        ended = run(stream.main, *model, str(audio["u3"]))
        assert (ended.returncode, ended.stdout) == (0, "AB\nBA\n")
        (line,) = ended.stderr.splitlines()
        assert line.startswith("real-time factor") and "cache at most" in line

    def test_json_has_times_and_confidences(self, model, audio):
        ended = run(stream.main, *model, "--format", "json", str(audio["u3"]))
        first, second = map(json.loads, ended.stdout.splitlines())
        assert (first["text"], second["text"]) == ("AB", "BA")
        ((word, start, end, confidence),) = (tuple(word.values()) for word in second["words"])
        assert word == "BA" and 0.5 < confidence <= 1
        assert [token["token"] for token in second["tokens"]] == ["B", "A"]
        # each letter has 0.4 s, the pause between two 0.3 s
        assert start == pytest.approx(0.3 + 4 * 0.7, abs=0.12)
        assert end == pytest.approx(start + 0.4 + 0.7, abs=0.12)
        assert 0 == first["start"] < first["end"] < start < end <= second["end"]

    def test_hotwords(self, model, audio, tmp_path):
        hotwords = tmp_path / "hotwords.txt"
        hotwords.write_text("AB\nBB\t30\n")
        ended = run(stream.main, *model, "--hotwords", str(hotwords), str(audio["u3"]))
        assert ended.returncode == 0 and "BB" in ended.stdout
        hotwords.write_text("AB\nBB\tmany\n")
        ended = run(stream.main, *model, "--hotwords", str(hotwords), str(audio["u3"]))
        assert_one_line(ended, "hotwords.txt:2: score 'many'")
        ended = run(stream.main, *model, "--hotwords", str(tmp_path / "gone"), str(audio["u3"]))
        assert_one_line(ended, "gone does not exist")

    def test_speech_without_a_pause_is_cut_in_the_end(self, model, folder):
        """Else what is held for an open segment would grow with the stream."""
        soundfile.write(folder / "long.wav", speech("AB" * 25).numpy(), RATE)
        lines = run(stream.main, *model, str(folder / "long.wav")).stdout.splitlines()
        assert len(lines) > 1 and "".join(lines) == "AB" * 25

    def test_another_rate_format_and_stereo(self, model, folder):
        samples = soxr.resample(speech("AB__BA").numpy(), RATE, 44100)
        soundfile.write(folder / "cd.flac", np.stack([samples, samples], axis=1), 44100)
        assert run(stream.main, *model, str(folder / "cd.flac")).stdout == "AB\nBA\n"

    @pytest.mark.parametrize("rate", [8000, 44100, 48000])
    def test_resampling_has_no_seams(self, tmp_path, rate, monkeypatch):
        samples = np.random.default_rng(0).uniform(-0.9, 0.9, 9001).astype(np.float32)
        soundfile.write(tmp_path / "x.wav", samples, rate, subtype="FLOAT")
        monkeypatch.setattr("espnet_kv.streaming.sources.FILE_PIECE_SECONDS", 0.0123)
        pieces = list(Stream(FileSource(tmp_path / "x.wav"), 16000))
        assert len(pieces) > 10
        np.testing.assert_array_equal(np.concatenate(pieces), soxr.resample(samples, rate, 16000))

    def test_lines_come_while_audio_comes(self, model):
        child = Forked(stream.main, [*model, "-"])
        data = pcm("AB__")
        for start in range(0, len(data), 3331):  # samples torn in two
            child.stdin.write(data[start : start + 3331])
        assert child.stdout.readline() == "AB\n"  # and standard input is still open
        ended = child.finish(pcm("B"))
        assert (ended.returncode, ended.stdout) == (0, "B\n")

    def test_it_works_within_a_pipeline(self, model, folder):
        """cat FILE | stream - | cat."""
        (folder / "x.raw").write_bytes(pcm("AB__BA"))
        before = subprocess.Popen(["cat", folder / "x.raw"], stdout=subprocess.PIPE)
        after = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        given, taken = before.stdout.fileno(), after.stdin.fileno()
        child = Forked(stream.main, [*model, "-"], stdin=given, stdout=taken)
        before.stdout.close()
        after.stdin.close()
        told = child.stderr.read()
        assert os.waitstatus_to_exitcode(os.waitpid(child.pid, 0)[1]) == 0, told
        assert after.stdout.read() == "AB\nBA\n"
        assert before.wait() == after.wait() == 0

    def test_another_rate_of_standard_input(self, model):
        data = soxr.resample(speech("ABA").numpy(), RATE, 32000)
        raw = (32767 * data).astype("<i2").tobytes()
        assert run(stream.main, *model, "--rate", "32000", "-", data=raw).stdout == "ABA\n"

    def test_ctrl_c_prints_the_words_so_far(self, model):
        child = Forked(stream.main, [*model, "-"])
        child.stdin.write(pcm("BA__AB"))
        assert child.stdout.readline() == "BA\n"
        os.kill(child.pid, signal.SIGINT)
        assert child.stdout.readline() == "AB\n"
        ended = child.finish()
        assert ended.returncode == 128 + signal.SIGINT
        assert "Traceback" not in ended.stderr and "real-time factor" in ended.stderr

    def test_it_ends_quietly_when_nobody_reads_on(self, model):
        child = Forked(stream.main, [*model, "-"])
        child.stdin.write(pcm("AB__"))
        assert child.stdout.readline() == "AB\n"
        child.stdout.close()
        child.stdin.write(pcm("AB__"))
        child.stdin.close()
        assert child.stderr.read() == ""
        _, status = os.waitpid(child.pid, 0)
        assert os.waitstatus_to_exitcode(status) == 128 + signal.SIGPIPE

    @pytest.mark.parametrize("columns", [0, 60, 20], ids=["unknown", "60", "20"])
    def test_on_a_terminal_words_and_meter_are_redrawn_on_one_line(self, model, columns):
        ours, theirs = pty.openpty()
        termios.tcsetwinsize(theirs, (24, columns))
        child = Forked(stream.main, [*model, "-"], stdout=theirs, stderr=theirs)
        os.close(theirs)
        drawn = b""

        def read_until(pattern: bytes) -> None:
            nonlocal drawn
            while not re.search(pattern, drawn):
                drawn += os.read(ours, 4096)

        meter = rb"\r\x1b\[K\[[\d.]+ s, RTF "
        child.stdin.write(pcm("AB"))
        read_until(meter + (rb"[\d.]+, cache [\d.]+ kB\] A" if columns != 20 else b""))
        child.stdin.write(pcm("__"))
        read_until(rb"\r\x1b\[KAB\r\n")  # the open line was erased, then the final one written
        child.stdin.close()
        read_until(b"real-time factor")
        assert os.waitpid(child.pid, 0)[1] == 0
        os.close(ours)
        lines = re.findall(rb"\x1b\[K(\[[^\r]*)", drawn)
        assert lines and all(len(line) < (columns or 80) for line in lines)

    def test_wide_characters_do_not_break_the_line(self):
        assert stream._tail("abcdef", 4) == "cdef"
        assert stream._tail("ab", 4) == "ab"
        assert stream._tail("日本語", 4) == "本語"
        assert stream._tail("日本語", 5) == "本語"

    @pytest.mark.parametrize(
        ("arguments", "data", "said"),
        [
            (["nothing.wav"], b"", "nothing.wav does not exist"),
            ([__file__], b"", "cannot be read as audio"),
            (["-"], b"", "standard input has no audio"),
            (["-"], b"\0\0", "1 samples of audio are too few"),
            (["-"], b"RIFF....WAVEfmt ", "standard input holds a WAV file"),
            (["--rate", "8000", __file__], b"", "--rate 8000"),
            (["--rate", "0", "-"], b"", "--rate 0"),
            (["--chunk_size", "-1", "-"], b"", "--chunk_size -1"),
            (["--beam", "-"], b"", "--beam"),
            (["--format", "xml", "-"], b"", "--format.*xml"),
            ([], b"", "audio"),
        ],
        ids=[
            "missing",
            "text",
            "empty",
            "short",
            "wav",
            "rate",
            "rate0",
            "chunks",
            "beam",
            "form",
            "none",
        ],
    )
    def test_what_cannot_be_used_is_refused_in_one_line(self, model, arguments, data, said):
        assert_one_line(run(stream.main, *model, *arguments, data=data), said)

    def test_so_is_a_terminal_as_its_input(self, model):
        ours, theirs = pty.openpty()
        ended = Forked(stream.main, [*model, "-"], stdin=theirs).finish()
        assert_one_line(ended, "standard input is a terminal.*arecord")
        os.close(ours)

    def test_so_is_a_file_that_is_cut_short(self, model, folder):
        whole = folder / "whole.flac"
        soundfile.write(whole, speech("ABAB").numpy(), RATE)
        cut = folder / "cut.flac"
        cut.write_bytes(whole.read_bytes()[:6000])
        assert_one_line(run(stream.main, *model, str(cut)), "cut.flac cannot be read")


def test_the_streaming_configuration_fits_both_commands():
    config = yaml.safe_load((REPO / "conf/decode_asr_streaming.yaml").read_text())
    for parser in (asr_inference_streaming.get_parser(), stream.get_parser()):
        known = {action.dest for action in parser._actions}
        assert config.keys() <= known
    assert config["chunk_size"] > 0 and config.keys() >= CHUNKS.keys()
