"""The encoder kv_whisper: parameters and output are ESPnet's; long audio is refused."""

import pytest
import torch
from espnet2.asr.encoder.whisper_encoder import OpenAIWhisperEncoder
from small_encoders import assert_close
from small_whisper import ATTENTIONS, DIMS, SIZE, WINDOW, encoder, encoders

from espnet_kv.encoder.whisper_encoder import KVWhisperEncoder
from espnet_kv.errors import ConfigError, UserError

RATE = 16000


@pytest.mark.parametrize("do_pad_trim", [False, True])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_output_is_espnets(do_pad_trim, mode):
    stock, ours = encoders(do_pad_trim=do_pad_trim)
    assert list(ours.state_dict()) == list(stock.state_dict())
    audio, lengths = torch.randn(3, 5000), torch.tensor([5000, 3210, 800])
    results = [getattr(model, mode)()(audio, lengths) for model in (ours, stock)]
    assert_close(results[0][0], results[1][0], 1e-5)
    assert results[0][1].tolist() == results[1][1].tolist()
    assert results[0][0].shape[1:] == (WINDOW if do_pad_trim else 16, SIZE)


def test_specaug_and_dropout_of_the_same_seed_are_espnets():
    conf = {"apply_time_warp": False, "time_mask_width_range": [0, 9], "apply_freq_mask": True}
    stock, ours = encoders(use_specaug=True, specaug_conf=conf, dropout_rate=0.2)
    results = []
    for model in (ours, stock):
        torch.manual_seed(4)
        results.append(model.train()(torch.ones(2, 4000), torch.tensor([4000, 3000]))[0])
    assert_close(*results, 1e-5)


@pytest.mark.parametrize("kind", [kind for kind in ATTENTIONS if kind != "mha"])
def test_other_attentions(kind):
    name, conf = ATTENTIONS[kind]
    model = encoder(attention_type=name, attention_conf=conf)
    ys, lengths, _ = model(torch.randn(2, 4000), torch.tensor([4000, 3000]))
    assert ys.shape == (2, 13, SIZE) and ys.isfinite().all() and lengths.tolist() == [13, 9]
    ys.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("do_pad_trim", [False, True])
def test_audio_longer_than_30_s_is_refused(do_pad_trim):
    model = encoder(do_pad_trim=do_pad_trim)
    long = torch.zeros(2, 31 * RATE)
    with pytest.raises(UserError, match=r"31\.00 s is longer than the 30 s .* cut it") as caught:
        model(long, torch.tensor([RATE, 31 * RATE]))
    assert "\n" not in str(caught.value)
    longest = torch.zeros(1, 30 * RATE)
    assert model(longest, torch.tensor([30 * RATE]))[0].size(1) == WINDOW


def test_models_of_16_bits():
    model = encoder()
    audio, lengths = torch.randn(1, 4000), torch.tensor([4000])
    want = model(audio, lengths)[0]
    ys = model.to(torch.bfloat16)(audio, lengths)[0]
    assert ys.dtype == torch.bfloat16
    assert_close(ys.float(), want, 0.1)


def test_128_mel_bins():
    model = KVWhisperEncoder(whisper_model=None, dims=DIMS | {"n_mels": 128})
    assert model(torch.randn(1, 4000), torch.tensor([4000]))[0].shape == (1, 13, SIZE)


@pytest.mark.parametrize(
    ("conf", "message"),
    [
        ({"attention_type": "mlaa"}, "attention_type: unknown 'mlaa'"),
        ({"attention_type": "linear", "attention_conf": {"decay": 0.9}}, "decay"),
        ({"attention_type": "gqa", "attention_conf": {"num_kv_heads": [1, 2, 3]}}, "num_kv_heads"),
        ({"dims": None}, "give dims"),
    ],
)
def test_a_wrong_option_is_one_line(conf, message):
    with pytest.raises((ConfigError, UserError), match=message):
        KVWhisperEncoder(**{"whisper_model": None, "dims": DIMS} | conf)


def test_espnet_knows_it_by_its_name():
    assert "Whisper" in KVWhisperEncoder.__name__
    assert issubclass(KVWhisperEncoder, OpenAIWhisperEncoder)
