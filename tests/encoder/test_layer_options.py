"""attention_conf with a value for every layer."""

import pytest
import torch
from small_encoders import BLOCKS, OURS, build, encoders
from streams import Feeder, streaming, utterances

from espnet_kv.decoder.transformer import KVTransformerDecoder
from espnet_kv.errors import ConfigError

RANKS = {"attention_type": "mla", "attention_conf": {"kv_rank": [5, 3]}}


@encoders
def test_every_block_has_its_own_rank(name):
    encoder = build(name, **RANKS)
    found = [getattr(block, OURS[name].attention_slot).kv_rank for block in encoder.encoders]
    assert found == [5, 3]


@pytest.mark.parametrize(
    ("conf", "nbytes"),
    [
        (RANKS, (5 + 3) * 8 * 4),
        ({"attention_type": "gqa", "attention_conf": {"num_kv_heads": [1, 4]}}, 2 * 4 * 5 * 8 * 4),
    ],
    ids=["mla", "gqa"],
)
def test_streams_hold_what_each_layer_needs(conf, nbytes):
    encoder = streaming("kv_conformer", chunk=4, left=2, **conf)  # 8 frames of fp32 held
    feeder = Feeder(encoder, utterances(19, 23)).run(size=9)
    feeder.check()
    assert feeder.state.nbytes_by_kind()["attention"] == 2 * nbytes


def test_options_of_one_value_go_with_lists():
    conf = {"decay": [0.9, 0.5], "feature_map": "relu"}
    encoder = build("kv_conformer", attention_type="linear", attention_conf=conf)
    assert [block.self_attn.decay for block in encoder.encoders] == [0.9, 0.5]


@pytest.mark.parametrize("places", [("self",), ("src",), ("self", "src")], ids="-".join)
def test_decoder_layers_too(places):
    confs = {"self": {"kv_rank": [4, 3]}, "src": {"kv_rank": [2, 6]}}
    options = {f"{place}_attention_conf": confs[place] for place in places}
    options |= {f"{place}_attention_type": "mla" for place in places}
    decoder = KVTransformerDecoder(11, 16, num_blocks=2, linear_units=8, **options)
    for place in places:
        ranks = [getattr(layer, f"{place}_attn").kv_rank for layer in decoder.decoders]
        assert ranks == confs[place]["kv_rank"]
    state = decoder.init_state(torch.randn(7, 16))
    decoder.eval().score(torch.tensor([1]), state, torch.randn(7, 16))


@pytest.mark.parametrize("ranks", [[5], [5, 3, 4], []], ids=len)
@encoders
def test_another_number_of_values_is_refused(name, ranks):
    told = rf"^attention_conf.kv_rank: {len(ranks)} values for {BLOCKS} layers"
    with pytest.raises(ConfigError, match=told):
        build(name, attention_type="mla", attention_conf={"kv_rank": ranks})


def test_another_number_of_values_is_refused_in_a_decoder():
    told = r"^src_attention_conf.kv_rank: 3 values for 6 layers"
    with pytest.raises(ConfigError, match=told):
        KVTransformerDecoder(
            11, 16, src_attention_type="mla", src_attention_conf={"kv_rank": [1, 2, 3]}
        )


@pytest.mark.parametrize("value", [[5, 0], [5, 33], [5, "4"], [5, [4]]], ids=str)
def test_a_wrong_value_in_a_list_is_named(value):
    with pytest.raises(ConfigError, match=r"^attention_conf.kv_rank: .*1 to 32"):
        build("kv_conformer", attention_type="mla", attention_conf={"kv_rank": value})
