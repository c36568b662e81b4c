"""The unmodified sherpa-onnx decodes exported graphs to the text of the streaming recognizer."""

import jiwer
import numpy as np
import pytest
import torch
from small_models import RATE, TOKENS, build, speech

sherpa_onnx = pytest.importorskip("sherpa_onnx", reason="sherpa-onnx is not installed")
pytest.importorskip("onnx", reason="the extra [serve] is not installed")

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
    return [torch.cat([speech(letters), TAIL]) for letters in WORDS]


@pytest.fixture(scope="module", params=ATTENTIONS)
def model(request, tmp_path_factory):
    """A model with Kaldi's features, its arguments, a folder and features of recordings."""
    folder = tmp_path_factory.mktemp(request.param)
    conf = {"attention_type": request.param, "attention_conf": ATTENTIONS[request.param]}
    model, args = build(folder, frontend="kaldi_fbank", encoder_conf=conf)
    features = [model.frontend(x[None], torch.tensor([len(x)]))[0][0] for x in recordings()]
    return model, args, folder, features


def test_sherpa_onnx_gives_our_text(model):
    model, args, folder, features = model
    export(model, features, folder, layout="wenet")
    ours = StreamingRecognizer(asr_model=model, asr_train_args=args, beam_size=1, ctc_weight=1.0)
    expected = ["".join(ours(x)[0][1]) for x in recordings()]
    assert sum(map(len, expected)) > 20
    assert decoded(folder, "model.onnx") == expected
    assert jiwer.cer(expected, decoded(folder, "model.int8.onnx")) <= 0.05


def decoded(folder, graph) -> list[str]:
    """The text of all recordings, decoded by sherpa-onnx."""
    recognizer = sherpa_onnx.OnlineRecognizer.from_wenet_ctc(
        model=str(folder / graph),
        tokens=str(folder / "tokens.txt"),
        chunk_size=4,
        num_left_chunks=2,
        feature_dim=20,
        num_threads=1,
    )
    streams = []
    for samples in recordings():
        streams.append(recognizer.create_stream())
        streams[-1].accept_waveform(RATE, np.asarray(samples))
        streams[-1].input_finished()
    while ready := [stream for stream in streams if recognizer.is_ready(stream)]:
        recognizer.decode_streams(ready)
    return [recognizer.get_result(stream) for stream in streams]


def test_tokens_are_named_as_sherpa_onnx_expects(tmp_path):
    write_tokens(TOKENS, tmp_path / "tokens.txt")
    expected = "<blk> 0\n<unk> 1\nA 2\nB 3\n<sos/eos> 4\n"
    assert (tmp_path / "tokens.txt").read_text() == expected
