"""The unmodified sherpa-onnx decodes exported graphs to the text of the streaming recognizer."""

import json
from pathlib import Path

import jiwer
import numpy as np
import pytest
import small_models
import torch
from small_models import RATE, TOKENS, build, speech

sherpa_onnx = pytest.importorskip("sherpa_onnx", reason="sherpa-onnx is not installed")
onnx = pytest.importorskip("onnx", reason="the extra [serve] is not installed")

from espnet_kv.errors import UserError  # noqa: E402
from espnet_kv.export.exporter import export, write_tokens  # noqa: E402
from espnet_kv.streaming.recognizer import StreamingRecognizer  # noqa: E402

ATTENTIONS = {
    "mha": {},
    "gqa": {"num_kv_heads": 2},
    "mla": {"kv_rank": 8},
    "linear": {},
}
TAIL = torch.zeros(RATE // 2)  # the chunk after the last word
WORDS = ("ABBAAB", "BBAABA", "BABAAB", "AABBA", "BAB", "ABAB", "BBBA", "AAB")


def recordings() -> list[torch.Tensor]:
    return [noisy(torch.cat([speech(letters), TAIL])) for letters in WORDS]


def noisy(audio: torch.Tensor) -> torch.Tensor:
    """Audio in noise that is above the lowest energy of sherpa-onnx's features."""
    return audio + 0.01 * torch.randn(len(audio), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("attention", "layout", "frontend"),
    [
        ("mha", "wenet", "kaldi_fbank"),
        ("gqa", "wenet", "kaldi_fbank"),
        ("mla", "wenet", "kaldi_fbank"),
        ("linear", "wenet", "kaldi_fbank"),
        ("mla", "wenet", "default"),
        ("mha", "nemo", "default"),
        ("mla", "nemo", "default"),
        ("linear", "nemo", "default"),
        ("mla", "nemo", "kaldi_fbank"),
    ],
)
def test_sherpa_onnx_gives_our_text(tmp_path, monkeypatch, attention, layout, frontend):
    monkeypatch.setattr(small_models, "speech", lambda *args: noisy(speech(*args)))  # of the fit
    conf = {"attention_type": attention, "attention_conf": ATTENTIONS[attention]}
    model, args = build(tmp_path, frontend=frontend, encoder_conf=conf)
    exact = (layout, frontend) == ("wenet", "kaldi_fbank")
    folder = tmp_path / layout
    folder.mkdir()
    options = {} if exact else {"features": "fitted"}
    export(model, recordings(), folder, layout=layout, int8=attention == "mla", **options)
    features = json.loads((folder / "export.json").read_text())["features"]
    assert features["nat"] < (1e-3 if exact else 0.3) and features["tokens"] == 0
    ours = StreamingRecognizer(asr_model=model, asr_train_args=args, beam_size=1, ctc_weight=1.0)
    expected = ["".join(ours(x)[0][1]) for x in recordings()]
    assert sum(map(len, expected)) > 20
    assert decoded(folder / "model.onnx") == expected
    if attention == "mla":
        assert jiwer.cer(expected, decoded(folder / "model.int8.onnx")) <= 0.05
        quantised = [node.op_type for node in nodes(folder / "model.int8.onnx", "/graph/")]
        assert "DynamicQuantizeLinear" in quantised
        # the map of features stays in fp32
        kinds = {node.op_type for node in nodes(folder / "model.int8.onnx", "/mapping/")}
        assert kinds == (set() if exact else {"Exp", "MatMul", "Constant", "Clip", "Log"})


def nodes(graph: Path, scope: str) -> list:
    return [node for node in onnx.load(graph).graph.node if scope in node.name]


def test_a_model_without_any_cache(tmp_path, monkeypatch):
    """The rows of nemo_ctc have one number at least."""
    monkeypatch.setattr(small_models, "speech", lambda *args: noisy(speech(*args)))  # of the fit
    model, _ = build(tmp_path, encoder="kv_transformer")
    (tmp_path / "nemo").mkdir()
    options = {"layout": "nemo", "features": "fitted", "left_chunks": 0, "int8": False}
    found = export(model, recordings(), tmp_path / "nemo", **options)["model.onnx"]
    assert found.log_probs < 1e-5 and found.ragged < 1e-5


def recognizer_of(graph: Path):
    options = {"model": str(graph), "tokens": str(graph.with_name("tokens.txt"))}
    options |= {"feature_dim": 20, "num_threads": 1}
    if graph.parent.name == "nemo":
        return sherpa_onnx.OnlineRecognizer.from_nemo_ctc(**options)
    return sherpa_onnx.OnlineRecognizer.from_wenet_ctc(chunk_size=4, num_left_chunks=2, **options)


def decoded(graph: Path) -> list[str]:
    """The text of all recordings, decoded together by sherpa-onnx.

    The streams have different lengths and get their audio at different speeds, so that those of one
    batch have different ages.
    """
    recognizer = recognizer_of(graph)
    streams = [(recognizer.create_stream(), np.asarray(samples)) for samples in recordings()]
    fed = [0] * len(streams)
    while True:
        for number, (stream, samples) in enumerate(streams):
            if fed[number] < len(samples):
                size = 5000 + 1000 * number
                stream.accept_waveform(RATE, samples[fed[number] :][:size])
                fed[number] += size
                if fed[number] >= len(samples):
                    stream.input_finished()
        while ready := [stream for stream, _ in streams if recognizer.is_ready(stream)]:
            recognizer.decode_streams(ready)
        if all(done >= len(x) for done, (_, x) in zip(fed, streams, strict=True)):
            return [recognizer.get_result(stream) for stream, _ in streams]


@pytest.mark.parametrize("layout", ["nemo", "wenet"])
def test_features_that_cannot_be_mapped_are_refused(tmp_path, layout):
    """Digital silence has no energy that sherpa-onnx tells: the tokens around it change."""
    model, _ = build(tmp_path)
    silent = [torch.cat([speech(letters), TAIL]) for letters in WORDS]
    (tmp_path / layout).mkdir()
    with pytest.raises(UserError, match=r"features of sherpa-onnx disagree with the model's: 0\."):
        export(model, silent, tmp_path / layout, layout=layout, features="fitted")
    assert not list((tmp_path / layout).iterdir())


def test_tokens_are_named_as_sherpa_onnx_expects(tmp_path):
    write_tokens(TOKENS, tmp_path / "tokens.txt")
    expected = "<blk> 0\n<unk> 1\nA 2\nB 3\n<sos/eos> 4\n"
    assert (tmp_path / "tokens.txt").read_text() == expected
