"""Features of a waveform in pieces are those that ESPnet computes of the whole file."""

import itertools

import pytest
import torch
from espnet2.asr.frontend.default import DefaultFrontend
from espnet2.asr.frontend.fused import FusedFrontends
from espnet2.layers.global_mvn import GlobalMVN
from espnet2.layers.utterance_mvn import UtteranceMVN
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import config

from espnet_kv.encoder.kaldi_fbank import KaldiFbankFrontend
from espnet_kv.errors import ConfigError, UserError
from espnet_kv.streaming.frontend import StreamingFrontend, TooShortError

CONFS = {
    "espnet": {},  # n_fft 512, hop 128
    "librispeech": {"n_fft": 512, "win_length": 400, "hop_length": 160},
    "hop_is_n_fft": {"n_fft": 256, "hop_length": 256, "n_mels": 20},
    "hop_beyond_n_fft": {"n_fft": 128, "hop_length": 300, "n_mels": 10},
    "odd_n_fft": {"n_fft": 255, "hop_length": 100, "n_mels": 20},
    "no_center": {"n_fft": 400, "hop_length": 160, "center": False},
    "no_window": {"n_fft": 256, "hop_length": 80, "window": None, "normalized": True},
}
FRONTENDS = {name: DefaultFrontend(**conf).eval() for name, conf in CONFS.items()} | {
    "kaldi": KaldiFbankFrontend().eval(),
    "kaldi_8k": KaldiFbankFrontend(
        "8k", n_mels=23, win_length=256, hop_length=80, fmax=3700
    ).eval(),
}


def least_samples(name: str) -> int:
    """Samples of the shortest file with a frame."""
    if name.startswith("kaldi"):
        return FRONTENDS[name].win_length
    n_fft = FRONTENDS[name].stft.n_fft
    return n_fft if name == "no_center" else n_fft // 2 + 1


def whole(frontend, speech: torch.Tensor, normalize=None) -> torch.Tensor:
    """What ESPnet's model computes of a file."""
    features, lengths = frontend(speech[None], torch.tensor([len(speech)]))
    return features[0] if normalize is None else normalize(features, lengths)[0][0]


def in_pieces(streaming: StreamingFrontend, pieces) -> torch.Tensor:
    features = []
    for number, piece in enumerate(pieces, start=1):
        features.append(streaming(piece, is_final=number == len(pieces)))
        assert streaming.nbytes < piece.element_size() * (streaming.n_fft + streaming.hop_length)
    return torch.cat(features)


def assert_same(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.fixture
def normalize(tmp_path) -> GlobalMVN:
    config(tmp_path)
    return GlobalMVN(tmp_path / "feats_stats.npz")


@pytest.mark.parametrize("name", FRONTENDS)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_any_pieces_give_the_whole_files_features(name, data):
    frontend = FRONTENDS[name]
    streaming = StreamingFrontend(frontend)
    least = least_samples(name)
    length = data.draw(st.integers(least, least + 2000), label="length")
    cuts = data.draw(st.lists(st.integers(0, length), max_size=12), label="cuts")
    generator = torch.Generator().manual_seed(length)
    speech = torch.randn(length, generator=generator)
    speech[length // 2 :] *= data.draw(st.sampled_from([0.0, 1e-4, 1.0]), label="loudness")
    bounds = [0, *sorted(cuts), length]
    pieces = [speech[a:b] for a, b in itertools.pairwise(bounds)]
    assert_same(in_pieces(streaming, pieces), whole(frontend, speech))


@pytest.mark.parametrize("name", FRONTENDS)
@pytest.mark.parametrize("beyond", [0, 1, 2, 50])
def test_shortest_files_and_single_samples(name, beyond):
    frontend = FRONTENDS[name]
    speech = torch.randn(least_samples(name) + beyond)
    expected = whole(frontend, speech)
    assert_same(in_pieces(StreamingFrontend(frontend), speech.split(1)), expected)
    # the end may come as a piece without samples
    assert_same(in_pieces(StreamingFrontend(frontend), [speech, speech[:0]]), expected)


@pytest.mark.parametrize("name", FRONTENDS)
def test_a_file_without_a_frame_is_refused_as_by_espnet(name):
    frontend = FRONTENDS[name]
    speech = torch.randn(least_samples(name) - 1)
    with pytest.raises((RuntimeError, AssertionError)):
        whole(frontend, speech)
    streaming = StreamingFrontend(frontend)
    with pytest.raises(TooShortError, match=f"{len(speech)} samples .* at least {len(speech) + 1}"):
        in_pieces(streaming, speech.split(7))
    longer = torch.randn(3 * streaming.n_fft)  # and forgotten: the next file is not spoilt
    assert_same(in_pieces(streaming, longer.split(100)), whole(frontend, longer))


def test_global_mvn_is_applied(normalize):
    frontend = DefaultFrontend(n_mels=20).eval()
    speech = torch.randn(5000)
    expected = whole(frontend, speech, normalize)
    assert (expected - whole(frontend, speech)).abs().max() > 1
    assert_same(in_pieces(StreamingFrontend(frontend, normalize), speech.split(333)), expected)


def test_a_pure_tone_keeps_its_quiet_bands():
    """Bands some 100 dB below the tone are rounding errors of the FFT: the same ones, though."""
    frontend = FRONTENDS["librispeech"]
    speech = 0.9 * torch.sin(2 * torch.pi * 1000 / 16000 * torch.arange(16000))
    speech[8000:] = 0
    assert_same(in_pieces(StreamingFrontend(frontend), speech.split(77)), whole(frontend, speech))


def test_one_file_after_the_other():
    frontend = FRONTENDS["espnet"]
    streaming = StreamingFrontend(frontend)
    for length in (1000, 300, 4000):
        speech = torch.randn(length)
        assert_same(in_pieces(streaming, speech.split(130)), whole(frontend, speech))
    streaming(torch.randn(999))
    streaming.reset()
    assert streaming.nbytes == 0
    assert_same(in_pieces(streaming, speech.split(130)), whole(frontend, speech))


def test_several_channels_are_averaged():
    frontend = FRONTENDS["espnet"]
    speech = torch.randn(3000, 2)
    expected = whole(frontend, speech.mean(dim=1))
    assert_same(in_pieces(StreamingFrontend(frontend), speech.split(500)), expected)


def test_the_models_own_frontend_is_left_as_it_was():
    frontend = DefaultFrontend().eval()
    speech = torch.randn(2000)
    before = whole(frontend, speech)
    in_pieces(StreamingFrontend(frontend), speech.split(100))
    assert frontend.stft.center
    assert torch.equal(whole(frontend, speech), before)


def test_double_precision_stays():
    frontend = DefaultFrontend().double().eval()
    speech = torch.randn(3000, dtype=torch.float64)
    got = in_pieces(StreamingFrontend(frontend), speech.float().double().split(300))
    assert got.dtype == torch.float64


def wpe() -> DefaultFrontend:
    return DefaultFrontend(n_fft=64, n_mels=4, frontend_conf={"use_wpe": True, "wunits": 2})


@pytest.mark.parametrize(
    ("frontend", "normalizing", "said"),
    [
        (lambda: DefaultFrontend(), UtteranceMVN(), "UtteranceMVN needs the whole utterance.*glo"),
        (lambda: DefaultFrontend(apply_stft=False), None, "apply_stft: false does not stream"),
        (wpe, None, "use_wpe: true needs the whole utterance"),
        (lambda: None, None, "frontend: none does not stream"),
        (
            lambda: FusedFrontends(
                frontends=[{"frontend_type": "default"}], align_method="linear_projection"
            ),
            None,
            "frontend: FusedFrontends does not stream",
        ),
    ],
    ids=["utterance_mvn", "apply_stft", "wpe", "none", "fused"],
)
def test_what_cannot_stream_is_refused_in_one_line(frontend, normalizing, said):
    with pytest.raises(ConfigError, match=said) as caught:
        StreamingFrontend(frontend(), normalizing)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("speech", "said"),
    [
        (torch.zeros(100, dtype=torch.int16), "int16: scale it"),
        (torch.tensor([0.0, float("nan")]), "infinite or NaN"),
        (torch.zeros(1, 2, 3), r"shape \(1, 2, 3\)"),
    ],
    ids=["int16", "nan", "3d"],
)
def test_what_is_no_waveform_is_refused(speech, said):
    with pytest.raises(UserError, match=said):
        StreamingFrontend(FRONTENDS["espnet"])(speech)
