"""What recognizes on a CPU has packed weights, and hears the same."""

import copy

import pytest
import torch
from small_models import build, save, speech

from espnet_kv import packed
from espnet_kv.espnet.inference import Speech2Text
from espnet_kv.packed import PackedLinear
from espnet_kv.streaming.recognizer import StreamingRecognizer

LETTERS = ("ABBA", "B", "AAAB")


def packed_layers(module):
    return sum(isinstance(layer, PackedLinear) for layer in module.modules())


@pytest.fixture
def small_weights(monkeypatch):
    """Those of the tests' models are packed too."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("torch has no oneDNN")
    monkeypatch.setattr(packed, "LEAST_NUMBERS", 1)


def test_the_recognizer(tmp_path, small_weights):
    model, args = build(tmp_path)
    options = {"asr_train_args": args, "chunk_size": 8, "left_chunks": 2, "ctc_weight": 0.9}
    recognizer = StreamingRecognizer(asr_model=model, **options)
    assert packed_layers(model.encoder) > 0
    assert packed_layers(model.ctc) == 1
    again = StreamingRecognizer(asr_model=model, **options)  # the same model
    packed.LEAST_NUMBERS = 1 << 30
    plain = StreamingRecognizer(asr_model=build(tmp_path)[0], **options)
    assert packed_layers(plain.asr_model) == 0
    for letters in LETTERS:
        expected = plain(speech(letters))[0]
        assert expected[0] == letters
        for result in (recognizer(speech(letters))[0], again(speech(letters))[0]):
            assert result[:3] == expected[:3]
            assert result[3].score == pytest.approx(expected[3].score, rel=1e-5)


def test_a_model_in_another_type_stays_as_it_is(tmp_path, small_weights):
    model, args = build(tmp_path)
    found = StreamingRecognizer(
        asr_model=copy.deepcopy(model), asr_train_args=args, chunk_size=8, dtype="float64"
    )
    assert packed_layers(found.asr_model) == 0
    assert found(speech("ABBA"))[0][0] == "ABBA"


@pytest.mark.parametrize("quantize", [False, True])
def test_asr_inference(tmp_path, small_weights, quantize):
    files = dict(zip(("asr_train_config", "asr_model_file"), save(tmp_path)[1::2], strict=True))
    options = {"ctc_weight": 1.0, "beam_size": 3, "quantize_asr_model": quantize}
    found = Speech2Text(**files, **options)
    # quantised layers are not linear layers of torch any more
    assert (packed_layers(found.asr_model.encoder) > 0) is not quantize
    for letters in LETTERS:
        assert found(speech(letters))[0][0] == letters
