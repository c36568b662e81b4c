"""The recipe's streaming decoding: stages 12 and 13 with --use_streaming true."""

import re
from pathlib import Path

import pytest
import soundfile
from commands import assert_one_line, run
from small_models import RATE, TOKENS, save, speech

from espnet_kv.recipe.__main__ import main as recipe_main
from espnet_kv.recipe.layout import Layout
from espnet_kv.recipe.options import parse

REPO = Path(__file__).parents[2]
LETTERS = {"u1": "ABBA", "u2": "B", "u3": "AB__BA"}


@pytest.fixture
def experiment(tmp_path, monkeypatch) -> list[str]:
    """What stages 1 to 11 would leave; options for the stages after them."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "conf").symlink_to(REPO / "conf")
    (tmp_path / "train.yaml").write_text("encoder: kv_conformer\n")
    dump = tmp_path / "dump/raw/test"
    dump.mkdir(parents=True)
    for key, letters in LETTERS.items():
        soundfile.write(tmp_path / f"{key}.wav", speech(letters).numpy(), RATE)
    (dump / "wav.scp").write_text("".join(f"{k} {tmp_path}/{k}.wav\n" for k in LETTERS))
    (dump / "text").write_text("".join(f"{k} {v.replace('_', '')}\n" for k, v in LETTERS.items()))
    for file in ("utt2spk", "spk2utt"):
        (dump / file).write_text("".join(f"{k} {k}\n" for k in LETTERS))
    (tmp_path / "data/en_token_list/char").mkdir(parents=True)
    (tmp_path / "data/en_token_list/char/tokens.txt").write_text("\n".join(TOKENS) + "\n")
    exp = tmp_path / "exp/asr_x"
    exp.mkdir(parents=True)
    save(exp)
    (exp / "model.pth").rename(exp / "valid.acc.ave.pth")
    return [
        *["--stage", "12", "--stop_stage", "13", "--asr_config", "train.yaml"],
        *["--asr_tag", "x", "--test_sets", "test", "--audio_format", "wav"],
        *["--token_type", "char", "--speed_perturb_factors", "", "--inference_nj", "2"],
    ]


def test_stages_12_and_13_stream_and_score(experiment):
    arguments = "--chunk_size 4 --left_chunks 2 --cache_dtype int8 --ctc_weight 0.95"
    options = (*experiment, "--use_streaming", "true", "--inference_args", arguments)
    ended = run(recipe_main, *options)
    assert ended.returncode == 0, ended.stderr
    (decoded,) = Path("exp/asr_x").glob("decode_*")
    assert decoded.name == (
        "decode_asr_streaming_chunk_size4_left_chunks2_cache_dtypeint8_ctc_weight0.95"
        "_asr_model_valid.acc.ave"
    )
    assert (decoded / "test/text").read_text() == "u1 ABBA\nu2 B\nu3 ABBA\n"
    log = (decoded / "test/logdir/asr_inference.1.log").read_text()
    assert "real-time factor" in log and "cache at most" in log
    row = f"|{decoded.name}/test|3|3|100.0|0.0|0.0|0.0|0.0|0.0|"
    assert row in Path("exp/RESULTS.md").read_text()
    again = run(recipe_main, *options)
    assert f"{decoded}/test is up to date" in again.stdout


def test_an_exported_graph_decodes_and_decodes_again_when_it_was_exported_again(experiment):
    pytest.importorskip("onnx", reason="the extra [serve] is not installed")
    pytest.importorskip("onnxruntime", reason="the extra [serve] is not installed")
    export = [*experiment, "--stage", "export", "--stop_stage", "export", "--export_args"]
    chunks = "--chunk_size 2 --left_chunks 4"
    decode = (*experiment, "--use_streaming", "true", "--inference_args", f"--engine onnx {chunks}")
    decode += ("--inference_nj", "1")
    assert_one_line(run(recipe_main, *decode), "onnx/model.onnx is not there: export the model")
    for cache_dtype in ("fp32", "fp16"):
        ended = run(recipe_main, *export, f"{chunks} --cache_dtype {cache_dtype} --int8 false")
        assert ended.returncode == 0, ended.stderr
        ended = run(recipe_main, *decode)
        if cache_dtype == "fp16":  # the graph is another one, and the decoding does not name it
            assert "exp/asr_x/onnx/model.onnx changed" in ended.stdout
        assert ended.returncode == 0, ended.stderr
        (decoded,) = Path("exp/asr_x").glob("decode_*")
        assert (decoded / "test/text").read_text() == "u1 ABBA\nu2 B\nu3 ABBA\n"
        assert f"{decoded}/test is up to date" in run(recipe_main, *decode).stdout


def test_a_bad_argument_is_told_by_the_stage(experiment):
    options = ("--use_streaming", "true", "--inference_args", "--cache_dtype int3")
    ended = run(recipe_main, *experiment, *options)
    assert_one_line(ended, "int3")
    # either of the two jobs may be the first to fail
    assert re.search(r"asr_inference\.[12]\.log", ended.stderr)


def test_the_decoding_has_a_name_of_its_own(experiment):
    def name(*options: str) -> str:
        return Layout(parse([*experiment, *options])).inference_name

    streaming = ("--use_streaming", "true")
    offline = name()
    assert offline == "decode_asr_asr_model_valid.acc.ave"
    assert name(*streaming) == "decode_asr_streaming_asr_model_valid.acc.ave"
    given = ("--inference_config", "conf/decode_asr.yaml")
    assert name(*given) == offline != name(*streaming, *given)
    names = {name(*streaming, "--inference_args", f"--chunk_size {n}") for n in (8, 16)}
    assert len(names) == 2


@pytest.mark.parametrize("name", ["use_lm", "use_ngram"])
def test_a_language_model_is_refused(experiment, name):
    ended = run(recipe_main, *experiment, "--use_streaming", "true", f"--{name}", "true")
    assert_one_line(ended, f"--{name} true: streaming decodes with the model alone")
