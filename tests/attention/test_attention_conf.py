"""Wrong values of attention_type and attention_conf are refused by name."""

import pytest

from espnet_kv.attention import build_attention
from espnet_kv.errors import ConfigError

HEADS, SIZE = 4, 16


@pytest.mark.parametrize(
    ("attention_type", "conf", "told"),
    [
        ("mla", {"kv_rank": 0}, ["kv_rank", "0", "1 to 32"]),
        ("mla", {"kv_rank": 33}, ["kv_rank", "33", "1 to 32"]),
        ("mla", {"kv_rank": -4}, ["kv_rank", "-4", "1 to 32"]),
        ("mla", {"kv_rank": "64"}, ["kv_rank", "'64'", "1 to 32"]),
        ("mla", {"kv_rank": 8.0}, ["kv_rank", "8.0", "1 to 32"]),
        ("mla", {"kv_rank": 2.5}, ["kv_rank", "2.5", "1 to 32", "fraction", "at most 2"]),
        ("mla", {"kv_rank": 0.0}, ["kv_rank", "0.0", "1 to 32", "fraction"]),
        ("mla", {"kv_rank": -0.25}, ["kv_rank", "-0.25", "1 to 32", "fraction"]),
        ("mla", {"kv_rank": float("nan")}, ["kv_rank", "nan", "1 to 32", "fraction"]),
        ("mla", {"kv_rank": True}, ["kv_rank", "True", "1 to 32"]),
        ("mla", {"kv_rank": None}, ["kv_rank", "None", "1 to 32"]),
        ("mla", {"rank": 8}, ["rank", "mla", "kv_rank"]),
        ("gqa", {"num_kv_heads": 3}, ["num_kv_heads", "3", "attention_heads 4", "1, 2, 4"]),
        ("gqa", {"num_kv_heads": 0}, ["num_kv_heads", "0", "1, 2, 4"]),
        ("gqa", {"num_kv_heads": 8}, ["num_kv_heads", "8", "1, 2, 4"]),
        ("gqa", {"num_kv_heads": "2"}, ["num_kv_heads", "'2'", "1, 2, 4"]),
        ("gqa", {"kv_rank": 8}, ["kv_rank", "gqa", "num_kv_heads"]),
        ("mha", {"num_kv_heads": 4}, ["num_kv_heads", "mha", "cache"]),
        ("mha", {"cache": "latent"}, ["cache", "latent", "kv, input"]),
        ("linear", {"feature_map": "cosine"}, ["feature_map", "cosine", "elu, relu, hedgehog"]),
        ("linear", {"feature_map": None}, ["feature_map", "None", "elu, relu, hedgehog"]),
        ("linear", {"feature_map": ["elu"]}, ["feature_map", "elu", "elu, relu, hedgehog"]),
        ("linear", {"decay": 0}, ["decay", "0", "(0, 1]"]),
        ("linear", {"decay": 1.5}, ["decay", "1.5", "(0, 1]"]),
        ("linear", {"decay": float("nan")}, ["decay", "nan", "(0, 1]"]),
        ("linear", {"decay": "0.9"}, ["decay", "'0.9'", "(0, 1]"]),
        ("linear", {"decay": True}, ["decay", "True", "(0, 1]"]),
        ("flash", {}, ["attention_type", "flash", "mha, gqa, mla, linear"]),
        (None, {}, ["attention_type", "None", "mha, gqa, mla, linear"]),
        (["mha"], {}, ["attention_type", "mha", "mha, gqa, mla, linear"]),
    ],
    ids=str,
)
def test_wrong_values_are_named(attention_type, conf, told):
    with pytest.raises(ValueError) as caught:
        build_attention(attention_type, conf, HEADS, SIZE)
    assert isinstance(caught.value, ConfigError)
    for word in told:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("heads", [0, -1, 3])
def test_heads_must_divide_the_model_size(heads):
    with pytest.raises(ValueError, match=rf"attention_heads: {heads} .*16"):
        build_attention("mha", {}, heads, SIZE)


@pytest.mark.parametrize(
    ("attention_type", "option", "taken"),
    [
        ("mha", "qk_norm", True),
        ("mla", "qk_norm", False),
        ("gqa", "qk_norm", False),
        ("mla", "zero_triu", True),
        ("linear", "zero_triu", False),
    ],
)
def test_options_of_espnet_are_taken_or_refused(attention_type, option, taken):
    build_attention(attention_type, {}, HEADS, 64, **{option: False})
    if taken:
        build_attention(attention_type, {}, HEADS, 64, **{option: True})
    else:
        with pytest.raises(ValueError, match=rf"{option}.*{attention_type}"):
            build_attention(attention_type, {}, HEADS, 64, **{option: True})


@pytest.mark.parametrize(
    ("fraction", "size", "rank"),
    [
        (0.25, 256, 64),
        (0.25, 144, 36),
        (0.25, 80, 20),
        (0.1, 16, 2),  # 1.6 rounded
        (0.001, 16, 1),  # never none
        (2.0, 16, 32),
        (1.0, 16, 16),  # the whole size; the integer 1 is one number
        (1, 16, 1),
    ],
)
def test_a_fraction_is_that_of_the_model_size(fraction, size, rank):
    attention = build_attention("mla", {"kv_rank": fraction}, 4, size)
    assert attention.kv_rank == rank
    assert attention.cached_vector_sizes == [(1, rank)]
    assert attention.label == f"mla r{rank}"
