"""The encoders are ESPnet's own, name for name and number for number, where they promise to be."""

import naive
import pytest
import torch
from espnet2.asr.ctc import CTC
from espnet2.utils.get_default_kwargs import get_default_kwargs
from small_encoders import (
    BLOCKS,
    FEATURES,
    OURS,
    SIZE,
    STOCK,
    assert_close,
    batch,
    build,
    build_stock,
    encoders,
    outputs,
    pair,
    position_conf,
    positions,
)
from torch import nn


@pytest.mark.parametrize("lengths", [(61,), (95,), (97, 61, 30)], ids=str)
@positions
@encoders
def test_mha_is_the_stock_encoder(name, rel_pos, lengths):
    conf = position_conf(name, rel_pos)
    x, x_lengths = batch(*lengths)
    stock, ours = pair(name, {"use_sdpa": True}, **conf)
    expected, got = outputs(stock, x, x_lengths), outputs(ours, x, x_lengths)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    stock, ours = pair(name, {"use_sdpa": False}, **conf)
    assert_close(outputs(ours, x, x_lengths), outputs(stock, x, x_lengths))


@encoders
def test_training_is_that_of_the_stock_encoder(name):
    stock, ours = pair(name, {"use_sdpa": True})
    x, lengths = batch(97, 61)
    gradients = []
    for encoder in (stock, ours):
        encoder.train()
        y, y_lengths, _ = encoder(x, lengths)
        real = torch.arange(y.size(1)) < y_lengths[:, None]
        y[real].pow(3).mean().backward()
        gradients.append({n: p.grad for n, p in encoder.named_parameters()})
    assert_close(gradients[1], gradients[0])


@encoders
def test_blocks_of_queries_in_an_encoder(name, monkeypatch):
    monkeypatch.setattr("espnet_kv.attention.softmax.QUERY_BLOCK", 8)
    x, lengths = batch(103, 61)  # 25 frames after subsampling: the last block is one query
    stock, ours = pair(name, {"use_sdpa": True})
    assert_close(outputs(ours, x, lengths), outputs(stock, x, lengths))


@encoders
def test_state_dict_keys_are_the_stock_ones(name):
    for conf in ({}, {"causal": True, "chunk_size": 4}, position_conf(name, False)):
        stock_conf = {k: v for k, v in conf.items() if k not in ("causal", "chunk_size")}
        stock = build_stock(name, **stock_conf).state_dict()
        ours = build(name, **conf).state_dict()
        assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in stock.items()}


@encoders
def test_parameters_come_in_the_stock_order(name):
    """Optimizer states go by it: a stock checkpoint.pth resumes with the right moments."""
    ours, stock = build(name), build_stock(name)
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in stock.named_parameters()]


def test_naive_positions_are_those_of_espnet():
    encoder = build("kv_conformer")
    for frames in (1, 7, 24):
        _, table = encoder.embed.pos_enc(torch.zeros(1, frames, SIZE))
        assert_close(table.double(), naive.position_table(frames, SIZE))


SHARED_OPTIONS = {
    "zero_triu": {"zero_triu": True},
    "scaled_abs_pos": {"pos_enc_layer_type": "scaled_abs_pos", "selfattn": True},
    "qk_norm": {"qk_norm": True, "pos_enc_layer_type": "abs_pos", "selfattn": True},
    "qk_norm-ignored": {"qk_norm": True},
    "linear-input": {"input_layer": "linear"},
    "conv2d1": {"input_layer": "conv2d1"},
    "conv2d2": {"input_layer": "conv2d2"},
    "conv2d6": {"input_layer": "conv2d6"},
    "conv2d8": {"input_layer": "conv2d8"},
    "legacy": {"rel_pos_type": "legacy"},
    "legacy-selfattn": {
        "rel_pos_type": "legacy",
        "pos_enc_layer_type": "abs_pos",
        "selfattn": True,
    },
    "flash": {"use_flash_attn": True, "pos_enc_layer_type": "abs_pos", "selfattn": True},
}
OWN_OPTIONS = {
    "kv_conformer": {
        "conv-positions": {"pos_enc_layer_type": "conv", "selfattn": True},
        "post-norm": {"normalize_before": False},
        "concat_after": {"concat_after": True},
        "conv1d": {"positionwise_layer_type": "conv1d"},
        "conv1d-linear": {"positionwise_layer_type": "conv1d-linear"},
        "no-cnn": {"use_cnn_module": False, "macaron_style": False},
        "relu": {"activation_type": "relu"},
        "no-input-layer": {"input_layer": None},
        "max_pos_emb_len": {"max_pos_emb_len": 3},
    },
    "kv_branchformer": {
        "no-attention": {"use_attn": False},
        "no-cgmlp": {"use_cgmlp": False},
        "learned_ave": {"merge_method": "learned_ave"},
        "fixed_ave": {"merge_method": "fixed_ave", "cgmlp_weight": 0.3},
        "fixed_ave-attention": {"merge_method": "fixed_ave", "cgmlp_weight": 0.0},
        "fixed_ave-cgmlp": {"merge_method": "fixed_ave", "cgmlp_weight": 1.0},
        "weights-per-block": {"merge_method": "fixed_ave", "cgmlp_weight": [0.0, 0.7]},
        "gate": {"gate_activation": "tanh", "use_linear_after_conv": True},
        "fast_selfattn": {
            "attention_layer_type": "fast_selfattn",
            "pos_enc_layer_type": "abs_pos",
        },
    },
    "kv_e_branchformer": {
        "conv-positions": {"pos_enc_layer_type": "conv", "selfattn": True},
        "no-ffn": {"use_ffn": False, "macaron_ffn": False},
        "relu": {"ffn_activation_type": "relu"},
        "gate": {"gate_activation": "tanh", "use_linear_after_conv": True},
        "fast_selfattn": {
            "attention_layer_type": "fast_selfattn",
            "pos_enc_layer_type": "abs_pos",
        },
        "conv1d2": {"input_layer": "conv1d2"},
        "no-input-layer": {"input_layer": None},
        "max_pos_emb_len": {"max_pos_emb_len": 3},
    },
}


@pytest.mark.parametrize(
    ("name", "conf"),
    [
        pytest.param(name, conf, id=f"{name}-{option}")
        for name in OURS
        for option, conf in (SHARED_OPTIONS | OWN_OPTIONS[name]).items()
    ],
)
def test_every_argument_of_espnet_is_accepted(name, conf):
    conf = dict(conf)
    if conf.pop("selfattn", False):
        conf[OURS[name].layer_type_key] = "selfattn"
    features = SIZE if conf.get("input_layer", "") is None else FEATURES
    stock, ours = pair(name, {"use_sdpa": True}, features=features, **conf)
    x, lengths = batch(121, 95, features=features)
    assert_close(outputs(ours, x, lengths), outputs(stock, x, lengths))


@pytest.mark.parametrize(
    ("name", "conf"),
    [
        ("kv_conformer", {"stochastic_depth_rate": 0.5}),
        ("kv_conformer", {"stochastic_depth_rate": [0.1, 0.9]}),
        ("kv_conformer", {"layer_drop_rate": 0.5}),
        ("kv_branchformer", {"stochastic_depth_rate": 0.5}),
        ("kv_branchformer", {"merge_method": "learned_ave", "attn_branch_drop_rate": 0.5}),
        ("kv_e_branchformer", {"layer_drop_rate": 0.5}),
        ("kv_e_branchformer", {"gradient_checkpoint_layers": [0, 1, 2]}),
    ],
    ids=str,
)
def test_training_options_of_espnet(name, conf):
    stock, ours = pair(name, {"use_sdpa": True}, **conf)
    x, lengths = batch(61, 47)
    for seed in range(4):
        seen = []
        for encoder in (stock, ours):
            torch.manual_seed(seed)
            y, _, _ = encoder.train()(x, lengths)
            encoder.zero_grad()
            y.pow(2).sum().backward()
            grads = {n: p.grad for n, p in encoder.named_parameters() if p.grad is not None}
            seen.append({"output": y.detach(), **grads})
        assert_close(seen[1], seen[0], 1e-4)


@pytest.mark.parametrize("name", ["kv_conformer", "kv_e_branchformer"])
@pytest.mark.parametrize("conditioning", [False, True])
@pytest.mark.parametrize("chunking", [{}, {"chunk_size": 4}], ids=["full", "chunk4"])
def test_intermediate_ctc_and_hidden_states(name, conditioning, chunking):
    conf = {"interctc_layer_idx": [1], "interctc_use_conditioning": conditioning}
    stock = build_stock(name, **conf)
    ours = build(name, **conf, **chunking)
    for encoder in (stock, ours):
        encoder.conditioning_layer = nn.Linear(7, SIZE)
    ours.load_state_dict(stock.state_dict())
    x, lengths = batch(61, 47)
    ctc = CTC(odim=7, encoder_output_size=SIZE)
    with torch.no_grad():
        (y, intermediate), _, _ = ours(x, lengths, ctc=ctc)
        (expected, expected_intermediate), _, _ = stock(x, lengths, ctc=ctc)
        everything = ours(x, lengths, ctc=ctc, return_all_hs=True)[0][1]
    assert [i for i, _ in intermediate] == [1]
    assert everything
    if not chunking:
        assert_close(y, expected)
        assert_close(intermediate[0][1], expected_intermediate[0][1])


@pytest.mark.parametrize("chunking", [{}, {"chunk_size": 4}], ids=["full", "chunk4"])
def test_e_branchformer_up_to_a_layer(chunking):
    encoder = build("kv_e_branchformer", **chunking)
    x, lengths = batch(61)
    with torch.no_grad():
        up_to_1, _, _ = encoder(x, lengths, max_layer=1)
        (_, hidden), _, _ = encoder(x, lengths, return_all_hs=True)
    assert len(hidden) == BLOCKS
    assert_close(up_to_1, encoder.after_norm(hidden[0]).detach())


def test_ctc_trim_goes_on_working_without_chunks():
    conf = {"interctc_layer_idx": [1], "ctc_trim": True}
    stock, ours = pair("kv_conformer", {"use_sdpa": True}, **conf)
    x, lengths = batch(61)
    ctc = CTC(odim=7, encoder_output_size=SIZE)
    with torch.no_grad():
        assert_close(ours(x, lengths, ctc=ctc)[0][0], stock(x, lengths, ctc=ctc)[0][0])


@encoders
def test_arguments_are_listed_for_espnet(name):
    """--print_config shows ESPnet's arguments and ours with their defaults."""
    stock, ours = get_default_kwargs(STOCK[name]), get_default_kwargs(OURS[name])
    assert stock.items() <= ours.items()
    assert ours["attention_type"] == "mha"
    assert set(ours) - set(stock) == {
        "attention_type",
        "attention_conf",
        "chunk_size",
        "left_chunks",
        "dynamic_chunk_training",
        "causal",
    }
