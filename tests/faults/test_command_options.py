"""Numbers and masks that mean nothing, in options, configurations and arguments."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import assert_one_line, run, run_module
from small_encoders import OURS
from small_models import CHUNKS, RATE, build, save, speech
from streams import streaming

from espnet_kv.bin import asr_inference, asr_inference_streaming, convert, profile, report, stream
from espnet_kv.cache import EncoderState
from espnet_kv.convert.record import read_wer, update_report
from espnet_kv.errors import ArgumentError, ConfigError, UserError
from espnet_kv.streaming.recognizer import StreamingRecognizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tones")
    save(folder)
    (folder / "wav.scp").write_text(f"u1 {folder}/u1.wav\n")
    (folder / "u1.wav").write_bytes(b"")
    return folder


def one_error(status: int, said: str, capsys) -> None:
    assert_one_line(argparse.Namespace(returncode=status, stderr=capsys.readouterr().err), said)


def options(folder: Path, out: Path) -> dict:
    model = ["--asr_train_config", f"{folder}/config.yaml"]
    model += [f"--asr_model_file={folder}/model.pth"]
    data = ["--data_path_and_name_and_type", f"{folder}/wav.scp,speech,sound"]
    data += ["--output_dir", str(out), "--num_workers", "0"]
    return {
        "offline": (asr_inference.main, [*model, *data]),
        "streaming": (asr_inference_streaming.main, [*model, *data]),
        "stream": (stream.main, [*model, "-"]),
        "profile": (profile.main, [*model, "--output", str(out / "p.json")]),
        "convert": (convert.main, [*model, "--output_dir", str(out), "--attention_type", "mla"]),
    }


NUMBERS = [
    ("offline", ["--beam_size", "6"], "--beam_size 6 is more than the 5 tokens"),
    ("offline", ["--beam_size", "0"], "--beam_size 0: allowed: whole"),
    ("offline", ["--nbest", "9", "--beam_size", "3"], "--nbest 9 is more than beam_size 3"),
    ("offline", ["--ctc_weight", "1.5"], "--ctc_weight 1.5: allowed: 0 to 1"),
    ("offline", ["--ctc_weight=nan"], "--ctc_weight nan"),
    ("offline", ["--batch_size", "1000000000"], "--batch_size 1000000000"),
    ("offline", ["--batch_size", "0"], "--batch_size 0"),
    ("offline", ["--ngpu", "-1"], "--ngpu -1"),
    ("offline", ["--ngpu", "2"], "--ngpu 2"),
    ("offline", ["--seed", "-5"], "--seed -5"),
    ("offline", ["--lm_file", "lm.pth"], "--lm_file needs --lm_train_config"),
    ("offline", ["--lm_train_config", "lm.yaml"], "--lm_train_config needs --lm_file"),
    ("offline", ["--dtype", "int8"], "--dtype: invalid choice"),
    ("offline", ["--unknown", "1"], "unrecognized arguments: --unknown"),
    ("offline", ["--data_path_and_name_and_type", "wav.scp"], "is not PATH,NAME,TYPE"),
    ("offline", ["--maxlenratio", "1e308"], "--maxlenratio 1e.308: allowed: -1e.06 to 1e.06"),
    ("offline", ["--minlenratio", "1e308"], "--minlenratio 1e.308: allowed"),
    ("offline", ["--quantize_modules", "Bogus"], "--quantize_modules Bogus: torch.nn has no"),
    ("offline", ["--token_type", "bpe"], "--token_type bpe: the model has char tokens; leave it"),
    ("offline", ["--enh_s2t_task", "true"], "--enh_s2t_task true does not go with this model"),
    ("offline", ["--multi_asr", "true"], "--multi_asr true is for models of several speakers"),
    ("offline", ["--time_sync", "true"], "--time_sync true: ESPnet.s own decoding fails"),
    ("offline", ["--partial_ar", "true"], "--partial_ar true does not go with this model"),
    ("streaming", ["--token_type", "bpe"], "--token_type bpe: the model has char tokens"),
    ("stream", ["--token_type", "bpe"], "--token_type bpe: the model has char tokens"),
    ("stream", ["--penalty", "nan"], "--penalty nan: a finite number"),
    ("stream", ["--beam_size", "1000000000"], "--beam_size 1000000000: allowed: whole numbers"),
    ("stream", ["--endpoint_silence_ms", "inf"], "--endpoint_silence_ms inf: a finite number"),
    ("stream", ["--max_segment_seconds", "inf"], "--max_segment_seconds inf: a finite number"),
    ("streaming", ["--max_segment_seconds", "-1"], "--max_segment_seconds -1.0: allowed: 0 or"),
    ("streaming", ["--nbest", "21"], "--nbest 21 is more than beam_size"),
    ("streaming", ["--left_chunks", "1000000000000"], "--left_chunks 1000000000000: at most"),
    ("streaming", ["--chunk_size", "99999999"], "--chunk_size 99999999"),
    ("streaming", ["--simulate_chunk_ms", "1e300"], "--simulate_chunk_ms"),
    ("stream", ["--left_chunks", "1000000000000"], "--left_chunks 1000000000000: at most"),
    ("stream", ["--rate", "99999999999"], "--rate 99999999999"),
    ("stream", ["--ngpu", "-1"], "--ngpu -1"),
    ("profile", ["--lengths", "1e12"], "--lengths 1e12: give seconds, at most 86400"),
    ("profile", ["--lengths", "5", "nan"], "--lengths 5 nan"),
    ("profile", ["--left_chunks", "1000000000"], "--left_chunks 1000000000: at most"),
    ("profile", ["--seed", "-1"], "--seed: '-1' is not a whole number from 0"),
    ("profile", ["--threads", "1000000000"], "--threads: '1000000000'"),
    ("profile", ["--repeats", "9" * 5000], "--repeats"),
    ("convert", ["--kv_rank", "4", "--seed", "-1"], "--seed: '-1'"),
    ("convert", ["--kv_rank", "4", "--calibration_minutes", "inf"], "'inf' is not more than 0"),
    ("convert", ["--attention_type=linear", "--transfer_steps", "-1"], "--transfer_steps: '-1'"),
]


@pytest.mark.parametrize(
    ("name", "given", "said"), NUMBERS, ids=[f"{n}{' '.join(g)[:30]}" for n, g, _ in NUMBERS]
)
def test_numbers_that_mean_nothing(name, given, said, folder, tmp_path, capsys):
    main, others = options(folder, tmp_path / "out")[name]
    one_error(main([*others, *given]), said, capsys)
    assert not (tmp_path / "out").exists()


DATA = {
    "no speech": ("{f}/wav.scp,foo,sound", "one must have the name speech"),
    "another": ("{f}/wav.scp,speech,sound {f}/wav.scp,text,text", "text,text: allowed names: "),
    "twice": ("{f}/wav.scp,speech,sound {f}/wav.scp,speech,sound", "give speech once"),
    "type": ("{f}/wav.scp,speech,bogus", "speech,bogus: allowed types: sound, "),
}


@pytest.mark.parametrize(("data", "said"), DATA.values(), ids=DATA)
@pytest.mark.parametrize("way", ["offline", "streaming"])
def test_data_of_another_name_or_type(way, data, said, folder, tmp_path, capsys):
    main, (*others, _, _, out, at, workers, none) = options(folder, tmp_path / "out")[way]
    others += [out, at, workers, none]
    for one in data.format(f=folder).split():
        others += ["--data_path_and_name_and_type", one]
    one_error(main(others), f"--data_path_and_name_and_type .*{said}", capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("way", ["offline", "streaming"])
@pytest.mark.parametrize("text", ["beam_size: 2.5", "ctc_weight: [1]", "nbest: true"])
def test_numbers_of_another_type_in_a_yaml(way, text, folder, tmp_path, capsys):
    (tmp_path / "decode.yaml").write_text(text)
    main, others = options(folder, tmp_path / "out")[way]
    status = main([*others, "--config", str(tmp_path / "decode.yaml")])
    one_error(status, f"--{text.partition(':')[0]} ", capsys)


@pytest.mark.parametrize(
    "text", ["beam_size: ten", "ctc_weight: 7", "beam_size: 9", "penalty: .nan"]
)
def test_a_search_that_cannot_be_profiled(text, folder, tmp_path, capsys):
    from espnet_kv.profile.beam_search import Recognizer
    from espnet_kv.profile.subject import Source, Subject

    source = Source(f"{folder}/config.yaml", f"{folder}/model.pth")
    subject = Subject.load(source, "cpu", **CHUNKS)
    key, value = text.split(": ")
    given = {"ten": "ten", ".nan": float("nan")}.get(value) or int(value)
    with pytest.raises(ConfigError, match=f"^{key}"):
        Recognizer(subject, {key: given})


class TestStreamNumbers:
    @pytest.fixture
    def state(self):
        return streaming(next(iter(OURS))).init_state(3)

    @pytest.mark.parametrize(
        "mask",
        [
            [True, False, True],
            np.array([True, False, True]),
            torch.tensor([True, False, True]),
            [np.True_, np.False_, np.True_],
            (torch.tensor(True), torch.tensor(False)),
        ],
        ids=["list", "numpy", "torch", "numpy items", "torch items"],
    )
    def test_a_mask_is_refused(self, state, mask):
        with pytest.raises(ValueError, match=r"a mask names no streams; .*enumerate\(mask\)"):
            state.select(mask)

    @pytest.mark.parametrize("rows", [[0.0], ["1"], [[1]], 1, [None]], ids=str)
    def test_what_is_no_number_is_refused(self, state, rows):
        with pytest.raises(ValueError, match="rows "):
            state.select(rows)

    @pytest.mark.parametrize("rows", [[3], [-1], np.array([0, 7])], ids=str)
    def test_streams_that_do_not_exist(self, state, rows):
        with pytest.raises(IndexError):
            state.select(rows)

    @pytest.mark.parametrize(
        "rows",
        [[2, 0], np.array([2, 0]), torch.tensor([2, 0]), (2, 0), iter([2, 0])],
        ids=lambda rows: type(rows).__name__,
    )
    def test_numbers_of_every_kind_are_taken(self, state, rows):
        state.frames = [1, 2, 3]
        assert state.select(rows).frames == [3, 1]

    def test_forks_and_none_at_all(self, state):
        assert state.select([1, 1]).batch_size == 2
        empty = state.select([])
        assert empty.batch_size == 0
        assert EncoderState.join([empty, state]).batch_size == 3
        with pytest.raises(ValueError, match="no state to join"):
            EncoderState.join([])


def test_the_end_of_a_stream_may_be_a_bool_of_numpy(tmp_path):
    model, args = build(tmp_path)
    recognizer = StreamingRecognizer(asr_model=model, asr_train_args=args, ctc_weight=1.0)
    expected = recognizer(speech("AB"), is_final=True)[0][0]
    assert recognizer(speech("AB")[:RATE], is_final=np.bool_(False))
    assert recognizer(speech("AB")[RATE:], is_final=np.bool_(True))[0][0] == expected == "AB"


def test_a_model_of_float64_is_not_profiled(tmp_path):
    from espnet_kv.profile.run import model_dtype

    model, _ = build(tmp_path)
    model.encoder.double()
    with pytest.raises(UserError, match=r"torch.float64 cannot be profiled"):
        model_dtype(argparse.Namespace(encoder=model.encoder))


@pytest.mark.parametrize("content", ["", "{", "[]", "[" * 20000, "{}", "\x00"], ids=range(6))
def test_a_damaged_profile_is_named(content, tmp_path, capsys):
    (tmp_path / "profile.json").write_text(content)
    status = report.main([str(tmp_path / "profile.json"), "--output", str(tmp_path / "report")])
    one_error(status, "profile.json.*stage 14", capsys)
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize(
    "content", ["", "[" * 20000, json.dumps({"schema": "espnet_kv.conversion/2"})], ids=range(3)
)
def test_a_damaged_record_of_a_conversion_is_named(content, tmp_path):
    file = tmp_path / "conversion.json"
    file.write_text(content)
    with pytest.raises(UserError, match=r"conversion.json is damaged.*convert again"):
        update_report(tmp_path, {})
    assert file.read_text() == content and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("content", ["", "| Sum/Avg | x |", "| Sum/Avg |"])
def test_a_damaged_score_is_named(content, tmp_path):
    file = tmp_path / "decode_x/test/score_wer/result.txt"
    file.parent.mkdir(parents=True)
    file.write_text(content)
    with pytest.raises(UserError, match=r"result.txt .*stage 13"):
        read_wer(tmp_path)


@pytest.mark.parametrize(
    ("name", "said"),
    [("exp", "is the model that is converted"), ("a:b", "splits paths at a colon")],
)
def test_a_conversion_goes_to_a_directory_of_its_own(name, said, folder, tmp_path, capsys):
    out = folder if name == "exp" else tmp_path / name
    main, others = options(folder, out)["convert"]
    before = sorted(folder.iterdir())
    one_error(main([*others, "--kv_rank", "4"]), said, capsys)
    assert sorted(folder.iterdir()) == before and not (tmp_path / name).exists()


def test_calls_name_arguments_and_commands_options(folder, tmp_path, capsys):
    files = {"asr_train_config": folder / "config.yaml", "asr_model_file": folder / "model.pth"}
    with pytest.raises(ArgumentError, match=r"^chunk_size 0: "):
        StreamingRecognizer(**files, chunk_size=0)
    main, others = options(folder, tmp_path / "out")["stream"]
    one_error(main([*others, "--chunk_size", "0"]), "--chunk_size 0: ", capsys)


LIGHT = ("convert", "profile", "report", "stream")
"""Commands whose options are their own: --help and wrong options need no torch."""
ESPNETS = (
    "asr_inference",
    "asr_inference_streaming",
    "asr_train",
    "lm_calc_perplexity",
    "lm_train",
)
"""Commands with options of ESPnet, whose parsers are in modules that load torch."""


@pytest.mark.parametrize("name", LIGHT + ESPNETS)
def test_help_says_what_helps(name):
    """Also where ESPnet's own text holds a bare %; no default of None."""
    ended = run(run_module, f"espnet_kv.bin.{name}", "--help")
    assert ended.returncode == 0 and "--" in ended.stdout, ended.stderr
    assert "default: None" not in ended.stdout and not ended.stderr


@pytest.mark.parametrize("name", [*LIGHT, "asr_inference"])
def test_a_new_process_answers_at_once_and_without_a_line_of_espnets(name):
    code = (
        f"import runpy, sys\nsys.argv = ['x', '--help']\n"
        f"try: runpy.run_module('espnet_kv.bin.{name}', run_name='__main__')\n"
        f"finally: print('torch' in sys.modules)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 0 and "--" in ended.stdout and not ended.stderr
    assert ended.stdout.endswith(f"{name not in LIGHT}\n")
