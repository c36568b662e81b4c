"""Exported graphs give what forward_chunk gives, for every encoder and attention that streams."""

import json

import pytest
from exports import PAIRS, exported

pytest.importorskip("onnxruntime", reason="the extra [serve] is not installed")
pytest.importorskip("onnx", reason="the extra [serve] is not installed")


@pytest.mark.parametrize(("encoder", "attention"), PAIRS)
def test_a_graph_equals_forward_chunk_for_streams_of_all_ages(tmp_path, encoder, attention):
    *_, found = exported(tmp_path, encoder, attention)
    assert found["model.onnx"].chunks >= 50
    assert found["model.onnx"].log_probs < 1e-5
    assert found["model.onnx"].ragged < 1e-5
    assert found["model.onnx"].tokens == 0
    assert found["model.int8.onnx"].tokens < 5


@pytest.mark.parametrize(("attention", "cache_dtype"), [("mha", "bf16"), ("mla", "fp16")])
def test_caches_may_be_rounded(tmp_path, attention, cache_dtype):
    model, _, found = exported(tmp_path, attention=attention, cache_dtype=cache_dtype)
    record = json.loads((tmp_path / "onnx/export.json").read_text())
    stream = model.encoder.init_state(chunk_size=4, left_chunks=2, cache_dtype=cache_dtype)
    footprints = stream.footprints
    assert record["cache_bytes"] == sum(f.nbytes([8], cache_dtype) for f in footprints)
    assert found["model.onnx"].tokens < 1
