"""Refused configurations; copies and other precisions of an encoder."""

import copy
import pickle

import pytest
import torch
from small_encoders import (
    FEATURES,
    OURS,
    assert_close,
    attentions,
    batch,
    build,
    encode,
    encoders,
)
from torch import nn

from espnet_kv.bin import asr_train
from espnet_kv.errors import UserError

CHUNK = {"chunk_size": 4}
DYNAMIC = {"dynamic_chunk_training": True}
CAUSAL = {"causal": True}
REFUSED = [
    ("kv_conformer", {"kv_rank": 8}, ["kv_rank", "KVConformerEncoder", "attention_conf"]),
    ("kv_branchformer", {"linear_units": 8}, ["linear_units", "cgmlp_linear_units"]),
    ("kv_conformer", {"attention_type": "flash"}, ["attention_type", "flash", "mha, gqa, mla"]),
    ("kv_conformer", {"attention_type": "mla", "attention_conf": {"rank": 4}}, ["rank", "kv_rank"]),
    (
        "kv_conformer",
        {"attention_type": "mla", "attention_conf": {"kv_rank": 33}},
        ["kv_rank", "33", "1 to 32"],
    ),
    ("kv_conformer", {"attention_conf": {"kv_rank": 8}}, ["kv_rank", "mha"]),
    ("kv_conformer", {"attention_type": "mla", "attention_conf": 64}, ["attention_conf", "64"]),
    ("kv_conformer", {"attention_type": "mla", "attention_conf": "r"}, ["attention_conf", "r"]),
    ("kv_conformer", {"attention_heads": 3}, ["attention_heads", "3", "16"]),
    ("kv_conformer", {"chunk_size": -1}, ["chunk_size", "-1", "0"]),
    ("kv_conformer", {"chunk_size": 4.0}, ["chunk_size", "4.0", "0"]),
    ("kv_conformer", {"chunk_size": True}, ["chunk_size", "True"]),
    ("kv_conformer", {"chunk_size": None}, ["chunk_size", "None", "0"]),
    ("kv_conformer", {"left_chunks": -2}, ["left_chunks", "-2", "-1"]),
    ("kv_conformer", {"left_chunks": "all"}, ["left_chunks", "all", "-1"]),
    ("kv_conformer", {"dynamic_chunk_training": "yes"}, ["dynamic_chunk_training", "yes", "true"]),
    ("kv_conformer", {"causal": 1}, ["causal", "1", "true, false"]),
    ("kv_conformer", {"cnn_module_kernel": 6, **CAUSAL}, ["cnn_module_kernel", "6", "odd"]),
    ("kv_branchformer", {"cgmlp_conv_kernel": 8, **CAUSAL}, ["cgmlp_conv_kernel", "8", "odd"]),
    ("kv_e_branchformer", {"cgmlp_conv_kernel": 8, **CAUSAL}, ["cgmlp_conv_kernel", "8", "odd"]),
    ("kv_e_branchformer", {"merge_conv_kernel": 4, **CAUSAL}, ["merge_conv_kernel", "4", "odd"]),
    ("kv_branchformer", {"merge_method": "learned_ave", **CHUNK}, ["merge_method", "fixed_ave"]),
    ("kv_branchformer", {"merge_method": "learned_ave", **DYNAMIC}, ["merge_method", "fixed_ave"]),
    ("kv_branchformer", {"merge_method": "learned_ave", **CAUSAL}, ["merge_method", "fixed_ave"]),
    (
        "kv_conformer",
        {"ctc_trim": True, "interctc_layer_idx": [1], **CHUNK},
        ["ctc_trim", "chunk"],
    ),
    ("kv_conformer", {"positionwise_layer_type": "conv1d", **CAUSAL}, ["conv1d", "linear"]),
    ("kv_conformer", {"positionwise_layer_type": "conv1d-linear", **CAUSAL}, ["conv1d", "linear"]),
    (
        "kv_conformer",
        {
            "pos_enc_layer_type": "conv",
            "selfattention_layer_type": "selfattn",
            **CAUSAL,
        },
        ["pos_enc_layer_type", "conv", "causal"],
    ),
    *[
        (name, {"rel_pos_type": "legacy", **conf}, ["rel_pos_type", "legacy", "latest"])
        for name in OURS
        for conf in (CHUNK, DYNAMIC, {"attention_type": "mla"})
    ],
    *[
        (
            name,
            {
                "attention_layer_type": "fast_selfattn",
                "pos_enc_layer_type": "abs_pos",
                "attention_type": "gqa",
            },
            ["fast_selfattn", "rel_selfattn"],
        )
        for name in ("kv_branchformer", "kv_e_branchformer")
    ],
    ("kv_conformer", {"zero_triu": True, "attention_type": "linear"}, ["zero_triu", "linear"]),
    (
        "kv_conformer",
        {
            "qk_norm": True,
            "attention_type": "gqa",
            "selfattention_layer_type": "selfattn",
            "pos_enc_layer_type": "abs_pos",
        },
        ["qk_norm", "gqa"],
    ),
    ("kv_branchformer", {"input_layer": None, "output_size": FEATURES, **CHUNK}, ["input_layer"]),
]


@pytest.mark.parametrize(
    ("name", "conf", "told"),
    [pytest.param(*case, id=f"{case[0]}-{case[1]}") for case in REFUSED],
)
def test_refusals_name_the_key(name, conf, told):
    with pytest.raises(ValueError) as caught:
        build(name, **conf)
    assert isinstance(caught.value, UserError)
    for word in told:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def _pickled(encoder: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(encoder))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, _pickled], ids=["deepcopy", "pickle"])
@encoders
def test_a_copy_goes_its_own_way(name, duplicate):
    encoder = build(name, chunk_size=4, causal=True)
    x = torch.randn(95, FEATURES)
    chunked = encode(encoder, x)
    twin = duplicate(encoder)
    assert torch.equal(encode(twin, x), chunked)
    twin.chunk_size = 0
    whole = build(name, causal=True)
    whole.load_state_dict(encoder.state_dict())
    assert torch.equal(encode(twin, x), encode(whole, x))
    assert torch.equal(encode(encoder, x), chunked)

    state = encoder.state_dict()
    state.popitem()
    twin.load_guard.remove()
    twin.load_state_dict(state, strict=False)
    with pytest.raises(UserError, match="missing keys"):
        encoder.load_state_dict(state, strict=False)


@attentions
def test_dynamic_quantisation(attention):
    """asr_inference --quantize_asr_model true copies the model and swaps its Linear modules."""
    encoder = build("kv_conformer", **attention, chunk_size=4)
    x = torch.randn(95, FEATURES)
    quantized = torch.ao.quantization.quantize_dynamic(encoder, {nn.Linear}, dtype=torch.qint8)
    assert_close(encode(quantized, x), encode(encoder, x), 0.3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@attentions
@encoders
def test_half_precision(name, attention, dtype):
    encoder = build(name, **attention, chunk_size=4, causal=True).to(dtype)
    y = encode(encoder, torch.randn(95, FEATURES, dtype=dtype))
    assert y.dtype == dtype
    assert y.isfinite().all()


@attentions
@encoders
def test_mixed_precision_training(name, attention):
    encoder = build(name, **attention, dynamic_chunk_training=True).train()
    x, lengths = batch(95, 61)
    for _ in range(4):
        with torch.autocast("cpu", torch.bfloat16):
            y, _, _ = encoder(x, lengths)
        y.float().pow(2).mean().backward()
    assert all(p.grad.isfinite().all() for p in encoder.parameters())


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["attention_type=mla", "attention_conf={kv_rank: 0}"], "kv_rank: 0"),
        (["attention_type=flash"], "attention_type: unknown 'flash'"),
        (["no_such_key=1"], "encoder_conf.no_such_key"),
    ],
    ids=["value", "type", "key"],
)
def test_asr_train_says_it_in_one_line(options, told, tmp_path, capsys):
    (tmp_path / "tokens.txt").write_text("<blank>\n<unk>\nA\n<sos/eos>\n")
    command = ["--encoder", "kv_conformer", "--encoder_conf", "rel_pos_type=latest"]
    for option in options:
        command += ["--encoder_conf", option]
    command += ["--token_list", str(tmp_path / "tokens.txt"), "--output_dir", str(tmp_path / "exp")]
    assert asr_train.main([*command, "--dry_run", "true", "--ngpu", "0"]) == 1
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert told in errors[0]
