"""--engine onnx of stream and asr_inference_streaming."""

import subprocess
from pathlib import Path

import pytest
import soundfile
from commands import assert_one_line, run
from exports import LETTERS
from small_models import RATE, save, speech, write_scp

pytest.importorskip("onnx", reason="the extra [serve] is not installed")
pytest.importorskip("onnxruntime", reason="the extra [serve] is not installed")

from espnet_kv.bin import asr_inference_streaming, export, stream

SPOKEN = {"u1": "ABBA", "u2": "B", "u3": "AB__BA"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tones")
    for name, letters in SPOKEN.items():
        soundfile.write(folder / f"{name}.wav", speech(letters).numpy(), RATE)
    return folder


@pytest.fixture(scope="module")
def model(folder) -> list[str]:
    """Options that name a model, beside which there are its graphs."""
    files = save(folder)
    check = ["--check_scp", str(write_scp(folder, LETTERS)), "--output_dir", str(folder / "onnx")]
    assert export.main([*files, *check]) == 0
    return files


@pytest.fixture
def decode(folder, model, tmp_path):
    """Decodes SPOKEN with some options, into tmp_path/out."""
    scp = tmp_path / "wav.scp"
    scp.write_text("".join(f"{name} {folder}/{name}.wav\n" for name in SPOKEN))

    def decode(*options: str) -> subprocess.CompletedProcess:
        return run(
            asr_inference_streaming.main,
            *model,
            *["--data_path_and_name_and_type", f"{scp},speech,sound"],
            *["--output_dir", str(tmp_path / "out"), "--num_workers", "0"],
            *options,
        )

    return decode


@pytest.mark.parametrize("graph", [None, "model.onnx", "model.int8.onnx"])
def test_a_recording_is_transcribed_by_a_graph(folder, model, graph):
    named = ["--onnx_model", str(folder / "onnx" / graph)] if graph else []
    ended = run(stream.main, *model, "--engine", "onnx", *named, str(folder / "u3.wav"))
    assert (ended.returncode, ended.stdout) == (0, "AB\nBA\n"), ended.stderr
    # 2 latents of 8 numbers for 8 frames, and 2 x 4 inputs of convolutions of 32 numbers
    assert f"attention {2 * 8 * 8 * 4}, conv {2 * 4 * 32 * 4}" in ended.stderr


def test_result_files_are_those_of_torch(decode, tmp_path):
    results = []
    for options in ([], ["--engine", "onnx", "--chunk_size", "4", "--simulate_chunk_ms", "130"]):
        ended = decode("--ctc_weight", "0.6", "--nbest", "2", *options)
        assert ended.returncode == 0, ended.stderr
        found = {file: file.read_text().splitlines() for file in tmp_path.glob("out/*best*/*")}
        scores = [found.pop(file) for file in list(found) if file.name == "score"]
        numbers = [float(line.split()[1]) for lines in scores for line in lines]
        results.append((found, numbers))
    (torchs, expected), (graphs, scores) = results
    assert graphs == torchs
    assert graphs[tmp_path / "out/1best_recog/text"] == ["u1 ABBA", "u2 B", "u3 ABBA"]
    assert scores == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--engine", "onnx", "--left_chunks", "4"], "--left_chunks 4: .*exported with 2"),
        (["--engine", "onnx", "--chunk_size", "16"], "--chunk_size 16: .*exported with 4"),
        (["--engine", "onnx", "--cache_dtype", "int4"], "--cache_dtype int4: .*exported with fp32"),
        (["--engine", "onnx", "--ngpu", "1"], "--ngpu 1: --engine onnx runs on the CPU"),
        (["--engine", "onnx", "--dtype", "float16"], "--dtype float16: a graph in onnxruntime"),
        (["--engine", "onnx", "--onnx_model", "no.onnx"], "no.onnx is not there: export the model"),
        (["--engine", "jax"], "--engine: invalid choice: 'jax'"),
        (["--onnx_model", "x.onnx"], "--onnx_model x.onnx: goes with --engine onnx"),
    ],
    ids=lambda x: ",".join(x[-2:]) if isinstance(x, list) else "",
)
def test_what_cannot_be_used_is_refused_in_one_line(folder, model, decode, tmp_path, options, said):
    assert_one_line(run(stream.main, *model, *options, str(folder / "u1.wav")), said)
    assert_one_line(decode(*options), said)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_a_model_that_was_not_exported(tmp_path, folder, model):
    files = save(tmp_path)
    ended = run(stream.main, *files, "--engine", "onnx", str(folder / "u1.wav"))
    assert_one_line(ended, "onnx/model.onnx is not there: export the model")
    # the graph of another model is no way out
    files = save(tmp_path, encoder_conf={"attention_conf": {"kv_rank": 4}})
    graph = ["--onnx_model", str(folder / "onnx/model.onnx")]
    ended = run(stream.main, *files, "--engine", "onnx", *graph, str(folder / "u1.wav"))
    assert_one_line(ended, "attention: mla r8 in the graph, mla r4 in the model")
