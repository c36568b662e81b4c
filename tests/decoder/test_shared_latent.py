"""Cross-attention of all layers with one latent (shared_latent: true)."""

import copy

import pytest
import torch
from small_decoders import SIZE, build

from espnet_kv.attention import attention_label
from espnet_kv.encoder.encoders import KVConformerEncoder
from espnet_kv.errors import ConfigError, UserError
from espnet_kv.profile.analytic import decoder_bytes

BLOCKS, RANK, FRAMES = 3, 6, 9
TOKENS = torch.tensor([[3, 7, 1, 4], [3, 2, 2, 9]])


def decoder(shared: bool, **conf):
    src = {"kv_rank": RANK} | ({"shared_latent": True} if shared else {})
    conf = {"src_attention_type": "mla", "src_attention_conf": src} | conf
    return build(num_blocks=BLOCKS, **conf)


@pytest.fixture
def alike():
    """One with a latent for all layers, and one with equal latents of each."""
    one, each = decoder(True), decoder(False)
    each.load_state_dict(one.state_dict(), strict=True)
    return one, each


def scored(model, encoded):
    """Log-probabilities of the last tokens, and the search."""
    state = model.init_state(encoded)
    scores, states = model.batch_score(TOKENS, [state] * 2, encoded.expand(2, -1, -1))
    return scores, states[0].search


def test_one_latent_is_kept_for_all_layers(alike):
    encoded = torch.randn(FRAMES, SIZE)
    (got, one), (expected, each) = (scored(model, encoded) for model in alike)
    torch.testing.assert_close(got, expected)
    assert one.nbytes_by_kind()["cross"] == 4 * RANK * FRAMES
    assert each.nbytes_by_kind()["cross"] == BLOCKS * 4 * RANK * FRAMES
    for search in (one, each):
        assert search.nbytes_by_kind() == search.nbytes_analytic()
        assert search.capacity_by_kind()["cross"] == search.nbytes_by_kind()["cross"]
    assert one.nbytes_by_kind()["self"] == each.nbytes_by_kind()["self"]


@pytest.mark.parametrize("cache_dtype", ["int8", "int4"])
def test_it_is_quantised_once(alike, cache_dtype):
    encoded = torch.randn(FRAMES, SIZE)
    for model in alike:
        model.cache_dtype = cache_dtype
    (got, one), (expected, each) = (scored(model, encoded) for model in alike)
    torch.testing.assert_close(got, expected)
    assert BLOCKS * one.nbytes_by_kind()["cross"] == each.nbytes_by_kind()["cross"]


def test_a_search_scores_as_training_does(alike):
    model, _ = alike
    encoded = torch.randn(2, FRAMES, SIZE)
    lengths = torch.tensor([FRAMES, FRAMES - 3])
    with torch.no_grad():
        logits, _ = model(encoded, lengths, TOKENS, torch.tensor([4, 4]))
    state = model.batch_init_state(encoded, lengths)
    mask = (torch.arange(FRAMES) < lengths[:, None])[:, None]
    got, _ = model.batch_score(TOKENS, [state] * 2, encoded, xs_mask=mask)
    torch.testing.assert_close(got, logits[:, -1].log_softmax(-1), rtol=1e-4, atol=1e-5)


def test_an_encoder_output_that_grows_replaces_the_latent(alike):
    encoded = torch.randn(2 * FRAMES, SIZE)
    found = []
    for model in alike:
        state = model.init_state(encoded[:FRAMES])
        _, states = model.batch_score(TOKENS[:1, :3], [state], encoded[None, :FRAMES])
        # the tokens before saw the shorter output
        scores, states = model.batch_score(TOKENS[:1], states, encoded[None])
        found.append((scores, states[0].search.nbytes_by_kind()["cross"]))
    (got, one), (expected, each) = found
    torch.testing.assert_close(got, expected)
    assert BLOCKS * one == each == BLOCKS * 4 * RANK * 2 * FRAMES


def test_a_latent_of_each_layer_is_not_loaded_into_one(alike):
    """Without a check the last layer's would be kept, and nothing would be said."""
    one, _ = alike
    before = copy.deepcopy(one.state_dict())
    own = decoder(False).state_dict()
    for given, strict in ((own, True), (own, False), (before | one_of(own), False)):
        with pytest.raises(UserError, match="does not fit") as refused:
            copy.deepcopy(one).load_state_dict(given, strict=strict)
        assert "decoders.1.src_attn.linear_kv_down" in str(refused.value)
        assert "shared_latent" in str(refused.value)
    one.load_state_dict({key: value.half() for key, value in before.items()})
    broken = {key: value * torch.nan for key, value in before.items()}
    one.load_state_dict(broken)  # whoever loads a file checks it for NaN
    one.load_state_dict(before)


def one_of(state):
    key = "decoders.1.src_attn.linear_kv_down.weight"
    return {key: state[key]}


def test_it_is_one_weight_in_training_and_in_copies(alike):
    for model in (alike[0], copy.deepcopy(alike[0])):
        downs = {id(attention.linear_kv_down) for attention in model.src_attentions}
        assert len(downs) == 1
        names = [n for n, _ in model.named_parameters() if "linear_kv_down" in n]
        assert names == ["decoders.0.src_attn.linear_kv_down.weight"]
        assert attention_label(model, cross=True) == f"mla r{RANK} of all layers"


def test_its_bytes_follow_from_the_configuration(alike):
    conf = {
        "attention_heads": 4,
        "num_blocks": BLOCKS,
        "self_attention_type": "mha",
        "self_attention_conf": None,
        "src_attention_type": "mla",
    }
    for shared, layers in ((True, 1), (False, BLOCKS)):
        src = {"kv_rank": RANK, "shared_latent": shared}
        found = decoder_bytes(conf | {"src_attention_conf": src}, SIZE, 5, 1, FRAMES)
        assert found["decoder_cross"] == layers * 4 * RANK * FRAMES


@pytest.mark.parametrize(
    ("conf", "message"),
    [
        ({"src_attention_type": "mha"}, "does not go with attention_type mha"),
        ({"src_attention_conf": {"kv_rank": [5, 6, 5]}}, "one kv_rank, not one per layer"),
        ({"src_attention_conf": {"shared_latent": "yes"}}, r"'yes' \(allowed: true, false\)"),
        ({"src_attention_conf": {"shared_latents": True}}, "mla does not take it"),
        ({"self_attention_conf": {}, "self_attention_type": "mla"}, "self_attention_conf"),
    ],
    ids=["mha", "ranks", "value", "name", "self"],
)
def test_what_cannot_share_is_refused(conf, message):
    place = "self" if "self_attention_conf" in conf else "src"
    key = f"{place}_attention_conf"
    conf = {"src_attention_type": "mla"} | conf
    conf[key] = {"shared_latent": True} | conf.get(key, {})
    with pytest.raises(ConfigError, match=message) as refused:
        build(num_blocks=BLOCKS, **conf)
    assert key in str(refused.value) and "shared_latent" in str(refused.value)


def test_an_encoder_has_no_such_latent():
    sizes = {"output_size": SIZE, "attention_heads": 4}
    conf = {"kv_rank": 4, "shared_latent": True}
    with pytest.raises(ConfigError, match=r"attention_conf.shared_latent: mla does not take it"):
        KVConformerEncoder(20, attention_type="mla", attention_conf=conf, **sizes)
