"""Features as the real sherpa-onnx computes them, and the map from them to a model's."""

import math

import numpy as np
import pytest
import torch
from espnet2.asr.frontend.default import DefaultFrontend
from small_models import RATE, speech
from torch import nn

from espnet_kv.encoder.kaldi_fbank import KaldiFbankFrontend
from espnet_kv.errors import UserError
from espnet_kv.export.runtime_features import (
    EDGE,
    FLOOR,
    INT16,
    RUNTIMES,
    FittedFeatures,
    fit,
    kaldi_features,
    model_features,
    nemo_features,
)
from espnet_kv.streaming.frontend import StreamingFrontend

BANDS, LEVELS = 20, 2000
LOWEST, STEPS = -30.0, 50  # of the values that a probe tells, and values per nat


class Probe(nn.Module):
    """A model `nemo_ctc` whose token for frame n tells the value of band n modulo BANDS.

    Neighbours are odd and even, because a token that repeats is written once.
    """

    def forward(self, x, length, channel, time, frames):
        value = x[:, :, 0].gather(1, (frames % BANDS)[:, None])[:, 0]
        level = ((value - LOWEST) * STEPS).clamp(0, LEVELS - 1).long()
        scores = nn.functional.one_hot(1 + 2 * level + frames % 2, 2 * LEVELS + 1).float()
        return scores[:, None] + 0 * length, length, channel + 0, time + 0, frames + 1


@pytest.mark.filterwarnings("ignore")
def test_nemo_features_are_those_of_sherpa_onnx(tmp_path):
    onnx = pytest.importorskip("onnx", reason="the extra [serve] is not installed")
    sherpa_onnx = pytest.importorskip("sherpa_onnx", reason="sherpa-onnx is not installed")
    one, number = torch.ones(1, dtype=torch.long), torch.zeros(1, dtype=torch.long)
    state = torch.zeros(1, 1, 1, 1)
    path = tmp_path / "probe.onnx"
    names = ["x", "length", "channel", "time", "frames"]
    torch.onnx.export(
        Probe(),
        (torch.zeros(1, BANDS, 1), one, state, state, number),
        str(path),
        input_names=names,
        output_names=[f"next_{name}" for name in names],
        opset_version=17,
        dynamo=False,
    )
    sizes = {f"cache_last_{c}_dim{n}": 1 for c in ("channel", "time") for n in (1, 2, 3)}
    sizes |= dict.fromkeys(("window_size", "chunk_shift", "subsampling_factor"), 1)
    sizes |= {"vocab_size": 2 * LEVELS}
    model = onnx.load(path)
    onnx.helper.set_model_props(model, {key: str(size) for key, size in sizes.items()})
    onnx.save(model, path)
    tokens = tmp_path / "tokens.txt"
    tokens.write_text("<blk> 0\n" + "".join(f"{n} {n}\n" for n in range(1, 2 * LEVELS + 1)))
    recognizer = sherpa_onnx.OnlineRecognizer.from_nemo_ctc(
        model=str(path), tokens=str(tokens), feature_dim=BANDS, num_threads=1
    )
    stream, audio = recognizer.create_stream(), speech("ABBA")
    stream.accept_waveform(RATE, audio.numpy())
    stream.input_finished()
    while recognizer.is_ready(stream):
        recognizer.decode_streams([stream])
    told = np.array([(int(token) - 1) // 2 for token in recognizer.tokens(stream)])
    expected = nemo_features(audio, RATE, BANDS)
    frames = torch.arange(len(told))
    assert len(told) == len(expected) - 1  # it waits for one frame more than a window
    difference = told / STEPS + LOWEST + 0.5 / STEPS - expected[frames, frames % BANDS].numpy()
    assert np.abs(difference).max() < 1.2 / STEPS / 2


def noisy(letters: str) -> torch.Tensor:
    """Tones in noise that is above the lowest energy of the features."""
    audio = speech(letters)
    return audio + 0.01 * torch.randn(len(audio))


class TestFit:
    @pytest.mark.parametrize(
        ("runtime", "frontend", "most"),
        [
            ("nemo", DefaultFrontend(fs=RATE, hop_length=160, win_length=400, n_mels=BANDS), 0.1),
            ("kaldi", DefaultFrontend(fs=RATE, hop_length=160, win_length=400, n_mels=BANDS), 0.2),
            ("nemo", KaldiFbankFrontend(RATE, BANDS), 0.2),
        ],
        ids=["nemo", "kaldi", "nemo-to-kaldi"],
    )
    def test_other_recordings_have_features_near_the_models(self, runtime, frontend, most):
        frontend = StreamingFrontend(frontend)
        offset = -2 * math.log(INT16) if runtime == "kaldi" else 0.0

        def pair(letters: str):
            audio = noisy(letters)
            x = RUNTIMES[runtime](audio, RATE, BANDS) + offset
            y = model_features(frontend, audio)
            last = min(len(x), len(y)) - EDGE
            return x[EDGE:last], y[EDGE:last]

        xs, ys = zip(*map(pair, ("ABBA", "BAAB", "AAB_B")), strict=True)
        mapping = fit(xs, ys, math.log(FLOOR) + offset)
        assert (mapping.weight >= 0).all()
        x, y = pair("BABBA")
        assert (mapping(x) - y).abs().mean() < most
        shifted = (mapping(x[1:]) - y[:-1]).abs().mean()
        assert shifted > 2 * (mapping(x) - y).abs().mean()  # frames are aligned

    def test_a_map_that_is_known_is_found(self):
        weight = torch.rand(BANDS, BANDS) * (torch.rand(BANDS, BANDS) < 0.2) + torch.eye(BANDS)
        x = 3 * torch.randn(500, BANDS)
        found = fit([x[:300], x[300:]], list(FittedFeatures(weight)(x).split([300, 200])), -99.0)
        torch.testing.assert_close(found.weight, weight, atol=1e-3, rtol=1e-3)


def test_frames_of_kaldi_are_aligned_with_the_models_own():
    audio = noisy("AB")
    own = model_features(StreamingFrontend(KaldiFbankFrontend(RATE, BANDS)), audio)
    runtime = kaldi_features(audio, RATE, BANDS) - 2 * math.log(INT16)
    torch.testing.assert_close(runtime, own, atol=1e-4, rtol=0)


def test_frames_of_another_distance_are_refused():
    frontend = StreamingFrontend(DefaultFrontend(fs=RATE))  # ESPnet's default: 8 ms
    with pytest.raises(UserError, match=r"hop_length: 128: .* every 10 ms, 160 samples"):
        model_features(frontend, noisy("A"))
