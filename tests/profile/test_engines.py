"""Exported graphs in a profile: what is measured, and which graphs are left out or refused."""

import copy
import dataclasses
import shutil

import pytest
from exports import Exported
from small_models import CHUNKS, RATE, speech

pytest.importorskip("onnx", reason="the extra [serve] is not installed")
pytest.importorskip("onnxruntime", reason="the extra [serve] is not installed")

from espnet_kv.errors import UserError
from espnet_kv.export.onnx_engine import OnnxEngine
from espnet_kv.profile.engines import find_engines, measure_engines
from espnet_kv.profile.sound import Sound
from espnet_kv.profile.subject import Source, Subject

LATENTS = 2 * 8 * 8 * 4  # bytes: 2 layers, 8 frames of left context, rank 8
RING = LATENTS * 12 // 8  # torch has room for a chunk more


def subject_of(made: Exported, **changes) -> Subject:
    """The experiment whose directory onnx holds the graphs."""
    source = Source("config.yaml", str(made.graph.parents[1] / "model.pth"))
    return dataclasses.replace(
        Subject(source, made.model, made.args, "cpu", CHUNKS["chunk_size"], CHUNKS["left_chunks"]),
        **changes,
    )


@pytest.fixture
def said() -> list[str]:
    return []


def test_graphs_are_measured_beside_torch(exported, said):
    subject = subject_of(exported())
    sound = Sound("tones", RATE, [speech("AB").numpy(), speech("B").numpy()])
    engines = find_engines(subject, None, OnnxEngine, said.append)
    found = measure_engines(subject, sound, engines, {"beam_size": 2}, said.append)
    assert list(found) == ["torch", "onnx", "onnx int8"]
    assert len(said) == 3 and "left out" not in "".join(said)
    for name, stream in found.items():
        assert 0 < stream.chunk_ms.p50 <= stream.chunk_ms.p99 and stream.streaming_rtf > 0
        assert stream.bytes.attention == LATENTS and stream.cache_dtype is None
        assert stream.allocated.attention == (RING if name == "torch" else LATENTS)
        assert stream.bytes.conv == stream.allocated.conv == 2 * 4 * 32 * 4


def test_only_torch_is_not_measured_twice(exported, said):
    subject = subject_of(exported())
    assert find_engines(subject, "torch", OnnxEngine, said.append) == {}
    assert measure_engines(subject, None, {}, {}, said.append) == {}
    assert said == []


def other_weights(subject: Subject) -> Subject:
    model = copy.deepcopy(subject.model)
    model.ctc.ctc_lo.bias.data += 1
    return dataclasses.replace(subject, model=model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_weights, "is the graph of another model .*other weights"),
        (lambda s: dataclasses.replace(s, left_chunks=3), "left_chunks 3: .* exported with 2"),
    ],
    ids=["weights", "settings"],
)
def test_a_graph_that_does_not_fit_is_left_out_or_refused(exported, said, change, message):
    subject = change(subject_of(exported()))
    assert find_engines(subject, None, OnnxEngine, said.append) == {}
    assert len(said) == 2 and all("is left out: " in line for line in said)
    with pytest.raises(UserError, match=message):
        find_engines(subject, "onnx", OnnxEngine, said.append)


def test_without_a_graph(exported, said, tmp_path):
    made = exported()
    (tmp_path / "onnx").mkdir()
    alone = made._replace(graph=tmp_path / "onnx/model.onnx")
    assert find_engines(subject_of(alone), None, OnnxEngine, said.append) == {} and said == []
    with pytest.raises(UserError, match=r"model\.onnx is not there: export the model"):
        find_engines(subject_of(alone), "onnx", OnnxEngine, said.append)
    shutil.copy(made.graph, alone.graph)  # without the one in int8
    assert list(find_engines(subject_of(alone), "onnx", OnnxEngine, said.append)) == ["onnx"]
    random = subject_of(alone, source=Source(config={}))
    assert find_engines(random, None, OnnxEngine, said.append) == {}
    with pytest.raises(UserError, match="engine onnx: for a trained model"):
        find_engines(random, "onnx", OnnxEngine, said.append)
