"""bin.export as a command: what it writes, and what it refuses in one line."""

import json

import pytest
from small_models import save, write_scp

pytest.importorskip("onnx", reason="the extra [serve] is not installed")
pytest.importorskip("onnxruntime", reason="the extra [serve] is not installed")

from espnet_kv.bin.export import main

LETTERS = ("ABBAAB", "BBAABA", "BABAAB")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> tuple[list[str], list[str]]:
    """Options that name a model with ESPnet's features, and a wav.scp of tones."""
    folder = tmp_path_factory.mktemp("model")
    return save(folder), ["--check_scp", str(write_scp(folder, LETTERS))]


def test_it_writes_graphs_tokens_and_shapes(model, tmp_path, capsys):
    files, check = model
    out = tmp_path / "onnx"
    assert main([*files, *check, "--cache_dtype", "int8", "--output_dir", str(out)]) == 0
    assert sorted(path.name for path in out.iterdir()) == [
        "export.json",
        "model.int8.onnx",
        "model.onnx",
        "tokens.txt",
    ]
    record = json.loads((out / "export.json").read_text())
    # 2 latents of 8 numbers and a scale for 8 frames; 2 x 4 inputs of 32 numbers and a scale
    assert record["cache_bytes"] == 2 * 8 * (8 + 2) + 2 * 4 * (32 + 2)
    assert (record["attention"], record["chunk_size"], record["left_chunks"]) == ("mla r8", 4, 2)
    assert record["checks"]["model.onnx"]["chunks"] >= 50
    assert "model.onnx: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--left_chunks", "-1"], "error: --left_chunks -1: a cache of all frames grows"),
        (["--layout", "wenet"], "error: --layout wenet: sherpa-onnx computes Kaldi's features"),
        (["--layout", "nemo"], "error: --layout nemo: sherpa-onnx computes those of NeMo, and the"),
        (["--features", "fitted"], "error: --features fitted: --layout plain takes the model's"),
        (["--chunk_size", "0"], "argument --chunk_size: '0' is not a whole number"),
        (["--check_utterances", "1"], "the comparison needs 50: give more or longer recordings"),
        (["--check_scp", "missing.scp"], "missing.scp does not exist"),
    ],
)
def test_what_cannot_be_exported_is_said_in_one_line(model, tmp_path, capsys, options, said):
    files, check = model
    out = tmp_path / "onnx"
    assert main([*files, *check, "--output_dir", str(out), *options]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert said in error
    assert list(tmp_path.iterdir()) == []


def test_a_recording_that_cannot_be_read_is_named(model, tmp_path, capsys):
    files, _ = model
    scp = tmp_path / "wav.scp"
    scp.write_text("u1 nowhere.wav\n")
    assert main([*files, "--check_scp", str(scp), "--output_dir", str(tmp_path / "onnx")]) == 1
    assert f"error: {scp}: u1: nowhere.wav does not exist" in capsys.readouterr().err


def test_a_directory_is_not_overwritten(model, tmp_path, capsys):
    files, check = model
    assert main([*files, *check, "--output_dir", str(tmp_path)]) == 1
    assert f"--output_dir {tmp_path} exists" in capsys.readouterr().err
