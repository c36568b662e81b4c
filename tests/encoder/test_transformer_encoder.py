"""kv_transformer as an encoder: ESPnet's, with chunks and a cache."""

import copy

import pytest
import torch
from espnet2.utils.get_default_kwargs import get_default_kwargs
from small_encoders import (
    FEATURES,
    SIZE,
    assert_close,
    attentions,
    batch,
    build,
    build_stock,
    encode,
    outputs,
    pair,
)
from streams import STREAMED, Feeder, streaming, utterances

from espnet_kv.encoder.encoders import KVTransformerEncoder
from espnet_kv.errors import ConfigError

NAME = "kv_transformer"
OPTIONS = {
    "plain": {},
    "qk_norm": {"qk_norm": True},
    "flash": {"use_flash_attn": True},
    "post-norm": {"normalize_before": False},
    "concat_after": {"concat_after": True},
    "linear-input": {"input_layer": "linear"},
    "conv1d2": {"input_layer": "conv1d2"},
    "conv2d6": {"input_layer": "conv2d6"},
    "no-input-layer": {"input_layer": None},
    "wav2vec": {"input_layer": "wav2vec"},
    "conv-positions": {"input_layer": "linear", "pos_enc_layer_type": "conv"},
    "conv1d": {"positionwise_layer_type": "conv1d", "positionwise_conv_kernel_size": 3},
}


@pytest.mark.parametrize("conf", OPTIONS.values(), ids=OPTIONS)
def test_mha_is_the_stock_encoder(conf):
    features = SIZE if conf.get("input_layer") == "wav2vec" else FEATURES
    x, lengths = batch(97, 61, 30, features=features)
    stock, ours = pair(NAME, {"use_sdpa": False}, features=features, **conf)
    assert list(ours.state_dict()) == list(stock.state_dict())
    assert_close(outputs(ours, x, lengths), outputs(stock, x, lengths))


def test_training_is_that_of_the_stock_encoder():
    stock, ours = pair(NAME, {"use_sdpa": True})
    x, lengths = batch(97, 61)
    gradients = []
    for encoder in (stock, ours):
        encoder.train()
        encoder(x, lengths)[0].pow(3).mean().backward()
        gradients.append({n: p.grad for n, p in encoder.named_parameters()})
    assert_close(gradients[1], gradients[0])


def test_arguments_are_listed_for_espnet():
    stock, ours = (
        get_default_kwargs(type(build_stock(NAME))),
        get_default_kwargs(KVTransformerEncoder),
    )
    assert stock.items() <= ours.items()
    assert ours["attention_type"] == "mha"


@attentions
def test_neighbours_change_nothing_and_chunks_hide_what_is_beyond(attention):
    encoder = build(NAME, **attention, chunk_size=4, left_chunks=1)
    x, lengths = batch(95, 190, 31)
    together = outputs(encoder, x, lengths)
    for utterance, length, got in zip(x, lengths, together, strict=True):
        assert_close(got, encode(encoder, utterance[:length]))
    changed = x[1].clone()
    changed[4 * 7 + 7 :] += 1  # what frame 8, the first of the third chunk, begins to read
    before, after = together[1], encode(encoder, changed)
    assert_close(after[:8], before[:8], 1e-6)
    assert (after[8] - before[8]).abs().max() > 1e-3


def test_whole_utterances_after_chunks():
    encoder = build(NAME, chunk_size=4)
    x = torch.randn(95, FEATURES)
    chunked = encode(encoder, x)
    encoder.chunk_size = 0
    whole = encode(encoder, x)
    stock = build_stock(NAME)
    stock.load_state_dict(encoder.state_dict())
    assert_close(whole, encode(stock, x))
    assert not torch.allclose(whole, chunked, atol=1e-3)


def test_dynamic_chunks_are_those_of_the_batch():
    encoder = build(NAME, dynamic_chunk_training=True).train()
    x, lengths = batch(190)
    outs = []
    for seed in range(8):
        torch.manual_seed(seed)
        outs.append(encoder(x, lengths)[0].detach())
    assert any(not torch.allclose(out, outs[0], atol=1e-3) for out in outs[1:])


@pytest.mark.parametrize("attention", STREAMED.values(), ids=STREAMED)
def test_a_stream_is_one_pass(attention):
    for left in (0, -1):
        encoder = streaming(NAME, 4, left, **attention)
        Feeder(encoder, utterances(19, 9)).run(size=11).check()


def test_a_copy_streams_by_itself():
    encoder = streaming(NAME, 4, 2)
    double = copy.deepcopy(encoder).double()
    Feeder(encoder, utterances(9)).run(size=11).check()
    Feeder(double, [x.double() for x in utterances(9)]).run(size=11).check()


@pytest.mark.parametrize(
    ("conf", "told"),
    [
        ({"rel_pos_type": "latest"}, "encoder_conf.rel_pos_type: .*no such argument"),
        ({"positionwise_layer_type": "conv1d", "causal": True}, "positionwise_layer_type"),
        ({"qk_norm": True, "attention_type": "mla"}, "qk_norm.*mla"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_refusals_name_the_key(conf, told):
    with pytest.raises(ConfigError, match=told):
        build(NAME, **conf)
