"""Exported graphs give what forward_chunk gives, for every encoder and attention that streams."""

import json

import pytest
from small_models import build, write_scp

onnxruntime = pytest.importorskip("onnxruntime", reason="the extra [serve] is not installed")
pytest.importorskip("onnx", reason="the extra [serve] is not installed")

from espnet_kv.export.exporter import export, read_features  # noqa: E402

ATTENTIONS = {
    "mha": {},
    "gqa": {"num_kv_heads": 2},
    "mla": {"kv_rank": 8},
    "linear": {"feature_map": "hedgehog", "decay": 0.9},
}
LETTERS = ("ABBAAB", "BBAABA", "BABAAB", "AABBA", "BAB", "ABAB")


@pytest.fixture(scope="module")
def scp(tmp_path_factory):
    """A wav.scp of tones, 60 chunks of 4 frames and more."""
    return write_scp(tmp_path_factory.mktemp("tones"), LETTERS)


def exported(folder, scp, encoder="kv_conformer", attention="mla", **options):
    conf = {"attention_type": attention, "attention_conf": ATTENTIONS[attention]}
    model, _ = build(folder, encoder=encoder, encoder_conf=conf)
    features = read_features(model, scp, "sound", len(LETTERS))
    out = folder / "out"
    out.mkdir()
    return model, out, export(model, features, out, **options)


@pytest.mark.parametrize(
    ("encoder", "attention"),
    [
        *(("kv_conformer", attention) for attention in ATTENTIONS),
        ("kv_branchformer", "gqa"),
        ("kv_e_branchformer", "linear"),
        ("kv_transformer", "gqa"),
    ],
)
def test_a_graph_equals_forward_chunk_for_streams_of_all_ages(tmp_path, scp, encoder, attention):
    _, _, found = exported(tmp_path, scp, encoder, attention)
    assert found["model.onnx"].chunks >= 50
    assert found["model.onnx"].log_probs < 1e-5
    assert found["model.onnx"].ragged < 1e-5
    assert found["model.onnx"].tokens == 0
    assert found["model.int8.onnx"].tokens < 5


@pytest.mark.parametrize(("attention", "cache_dtype"), [("mha", "bf16"), ("mla", "fp16")])
def test_caches_may_be_rounded(tmp_path, scp, attention, cache_dtype):
    model, _, found = exported(tmp_path, scp, attention=attention, cache_dtype=cache_dtype)
    record = json.loads((tmp_path / "out/export.json").read_text())
    stream = model.encoder.init_state(chunk_size=4, left_chunks=2, cache_dtype=cache_dtype)
    footprints = stream.footprints
    assert record["cache_bytes"] == sum(f.nbytes([8], cache_dtype) for f in footprints)
    assert found["model.onnx"].tokens < 1
