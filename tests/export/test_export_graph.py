"""Exported graphs give what forward_chunk gives, for every encoder and attention that streams."""

import json

import pytest
from exports import PAIRS

pytest.importorskip("onnxruntime", reason="the extra [serve] is not installed")
onnx = pytest.importorskip("onnx", reason="the extra [serve] is not installed")


@pytest.mark.parametrize(("encoder", "attention"), PAIRS)
def test_a_graph_equals_forward_chunk_for_streams_of_all_ages(exported, encoder, attention):
    found = exported(encoder, attention).found
    assert found["model.onnx"].chunks >= 50
    assert found["model.onnx"].log_probs < 1e-5
    assert found["model.onnx"].ragged < 1e-5
    assert found["model.onnx"].tokens == 0
    assert found["model.int8.onnx"].tokens < 5


@pytest.mark.parametrize(("encoder", "attention"), PAIRS)
def test_a_graph_holds_what_it_uses(exported, encoder, attention):
    """onnxruntime warns of constants without a use, and computes sizes that are fixed each time."""
    graph = onnx.load(exported(encoder, attention).graph).graph
    used = {name for node in graph.node for name in node.input}
    used.update(output.name for output in graph.output)
    assert used >= {tensor.name for tensor in graph.initializer}
    assert all(used.intersection(node.output) for node in graph.node)
    counted = sum(node.op_type == "Shape" for node in graph.node)
    assert counted < 0.03 * len(graph.node)


@pytest.mark.parametrize(("encoder", "attention"), PAIRS)
def test_products_of_the_int8_graph(exported, encoder, attention):
    """Weights have a scale for each output. What follows the gate of a cgMLP stays in fp32."""
    graph = onnx.load(exported(encoder, attention).graph.with_name("model.int8.onnx")).graph
    sizes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    quantised = [node for node in graph.node if node.op_type == "MatMulInteger"]
    assert len(quantised) > 10
    weights = [node.input[1] for node in quantised if len(sizes[node.input[1]]) == 2]
    assert weights
    for name in weights:
        scale = sizes[name.replace("_quantized", "_scale")]
        assert scale == sizes[name][1:]
    floats = [
        node.name for node in graph.node if node.op_type == "MatMul" and node.input[1] in sizes
    ]
    gated = "branchformer" in encoder
    assert len(floats) == (2 if gated else 0)  # blocks
    assert all("/cgmlp/channel_proj2/" in name for name in floats)


@pytest.mark.parametrize("cache_dtype", ["fp16", "bf16", "int8"])
def test_caches_may_be_rounded(exported, cache_dtype):
    model, _, graph, found = exported(cache_dtype=cache_dtype, int8=False)
    record = json.loads(graph.with_name("export.json").read_text())
    stream = model.encoder.init_state(chunk_size=4, left_chunks=2, cache_dtype=cache_dtype)
    footprints = stream.footprints
    assert record["cache_bytes"] == sum(f.nbytes([8], cache_dtype) for f in footprints)
    assert found["model.onnx"].tokens < 1
