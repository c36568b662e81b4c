"""A stream gives what one pass over the whole gives, however it is cut up and kept company."""

import copy
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_encoders import OURS, assert_close, build, encode, encoders, position_conf, positions
from streams import STREAMED, Feeder, streaming, utterances

from espnet_kv.cache import EncoderState

streamed = pytest.mark.parametrize("attention", STREAMED.values(), ids=STREAMED)
lefts = pytest.mark.parametrize("left", [0, 2, -1], ids=["left0", "left2", "all"])


@encoders
@streamed
@lefts
@pytest.mark.parametrize("chunk", [1, 4, 16])
@pytest.mark.parametrize("frames", [[10], [14, 9, 14]], ids=["one", "three"])
def test_a_stream_is_one_pass(name, attention, chunk, left, frames):
    """The last chunk is a ragged one, and streams of a batch end at different times."""
    encoder = streaming(name, chunk, left, **attention)
    lengths = [chunk * 4 + 3 if n == 14 else n for n in frames]
    Feeder(encoder, utterances(*lengths)).run(size=11).check()


@encoders
@positions
@streamed
def test_every_position_encoding(name, rel_pos, attention):
    encoder = streaming(name, **attention, **position_conf(name, rel_pos))
    Feeder(encoder, utterances(23, 17)).run(size=9).check()


@pytest.mark.parametrize(
    "conf",
    [
        {"input_layer": "conv2d1"},
        {"input_layer": "conv2d2"},
        {"input_layer": "conv2d6"},
        {"input_layer": "conv2d8"},
        {"input_layer": "linear"},
        {"zero_triu": True},
        {"normalize_before": False},
        {"concat_after": True},
        {"macaron_style": False},
        {"use_cnn_module": False},
        {"interctc_layer_idx": [1]},
        {"selfattention_layer_type": "selfattn", "pos_enc_layer_type": "scaled_abs_pos"},
        {"selfattention_layer_type": "selfattn", "pos_enc_layer_type": "abs_pos", "qk_norm": True},
    ],
    ids=str,
)
def test_options_of_espnet(conf):
    encoder = streaming("kv_conformer", **conf)
    feeder = Feeder(encoder, [torch.randn(150, 20), torch.randn(97, 20)]).run(size=13)
    for x, pieces in zip(feeder.xs, feeder.out, strict=True):
        with torch.no_grad():
            y = encoder(x[None], torch.tensor([len(x)]))[0]
        y = y[0] if isinstance(y, tuple) else y
        assert_close(torch.cat(pieces), y[0])


@pytest.mark.parametrize("merge", ["concat", "fixed_ave"])
def test_merge_methods_of_branchformer(merge):
    Feeder(streaming("kv_branchformer", merge_method=merge), utterances(19)).run(size=5).check()


@settings(max_examples=40, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("attention", ["mha", "mla", "decay"])
def test_any_split(attention, data):
    """Each stream gets pieces of its own sizes, none included."""
    torch.manual_seed(0)
    chunk, left = data.draw(st.integers(1, 6)), data.draw(st.integers(-1, 3))
    encoder = streaming("kv_conformer", chunk, left, num_blocks=1, **STREAMED[attention])
    frames = data.draw(st.lists(st.integers(1, 20), min_size=1, max_size=3))
    feeder = Feeder(encoder, utterances(*frames), empty=1e4)
    while not feeder.done:
        sizes = data.draw(st.lists(st.integers(0, 40), min_size=len(frames), max_size=len(frames)))
        feeder.feed([max(sizes[0], 1), *sizes[1:]] if not any(sizes) else sizes)
    feeder.check()


@encoders
@streamed
@lefts
def test_streams_are_dropped_and_reordered(name, attention, left):
    feeder = Feeder(streaming(name, 4, left, **attention), utterances(20, 26, 23))
    feeder.feed([31, 31, 31])
    everybody = copy.copy(feeder)
    everybody.out = [list(pieces) for pieces in feeder.out]
    feeder.select([2, 0])
    feeder.run(size=17).check()
    # nor has the selection touched the state that it was taken from
    everybody.run(size=17).check()


@encoders
@streamed
@lefts
def test_streams_join_a_running_batch(name, attention, left):
    encoder = streaming(name, 4, left, **attention)
    feeder = Feeder(encoder, utterances(90))
    while feeder.state.frames[0] < 70:  # an unbounded left context has grown by then
        feeder.feed([27])
    late = Feeder(encoder, utterances(21, 12), empty=1e4)
    late.feed([5, 9])
    feeder.join(late)
    feeder.run(size=10).check()


@encoders
def test_streams_of_different_ages_have_positions_of_their_own(name):
    """Absolute ones, which a frame carries into the cache."""
    encoder = streaming(name, **position_conf(name, rel_pos=False))
    feeder = Feeder(encoder, utterances(40))
    feeder.feed([90])
    late = Feeder(encoder, utterances(21, 12), empty=1e4)
    feeder.join(late)
    feeder.run(size=10).check()


@encoders
def test_convolutions_of_many_frames(name, monkeypatch):
    """Those of few are written out; all tests but this one have few."""
    monkeypatch.setattr("espnet_kv.encoder.causal.FEW_PRODUCTS", 0)
    Feeder(streaming(name), utterances(23, 17)).run(size=9).check()


def test_an_ended_stream_waits_for_the_others():
    encoder = streaming("kv_conformer")
    feeder = Feeder(encoder, utterances(5, 30)).run(size=20)
    assert feeder.state.finished == [True, True]
    assert feeder.state.frames == [5, 30]
    feeder.check()


def test_too_short_for_a_frame_gives_none():
    encoder = streaming("kv_conformer")
    ys, state = encoder.forward_chunk(torch.randn(1, 6, 20), encoder.init_state(), is_final=True)
    assert ys.shape == (1, 0, 16)
    assert state.emitted == [0]


def test_an_empty_last_piece_flushes():
    encoder = streaming("kv_conformer", chunk=8)
    (x,) = utterances(11)
    first, state = encoder.forward_chunk(x[None], encoder.init_state())
    rest, state = encoder.forward_chunk(x[None, :0], state, is_final=True)
    assert (first.size(1), rest.size(1)) == (8, 3)
    assert_close(torch.cat([first, rest], dim=1)[0], encode(encoder, x))


def test_float64_is_exact():
    encoder = streaming("kv_conformer", attention_type="linear").double()
    Feeder(encoder, [x.double() for x in utterances(40)]).run(size=30).check(tolerance=1e-12)


def test_bfloat16_runs():
    encoder = streaming("kv_conformer", **STREAMED["mla"]).bfloat16()
    feeder = Feeder(encoder, [x.bfloat16() for x in utterances(40)]).run(size=30)
    assert feeder.out[0][0].dtype == torch.bfloat16
    feeder.check(tolerance=0.2)


@encoders
def test_chunk_and_left_context_are_those_of_the_state(name):
    """A model serves any setting, and a running stream keeps its own."""
    encoder = streaming(name, 4, 1)
    feeder = Feeder(encoder, utterances(30))
    feeder.feed([50])
    encoder.chunk_size, encoder.left_chunks = 3, -1
    Feeder(encoder, utterances(25)).run(size=12).check()
    feeder.run(size=12)
    encoder.chunk_size, encoder.left_chunks = 4, 1
    feeder.check()


def test_new_weights_are_seen():
    """Position tables that are kept between chunks follow the weights."""
    encoder, other = streaming("kv_conformer"), streaming("kv_conformer")
    Feeder(encoder, utterances(20)).run(size=20).check()
    encoder.load_state_dict(other.state_dict())
    Feeder(encoder, utterances(20)).run(size=20).check()
    optimizer = torch.optim.SGD(encoder.parameters(), lr=1.0)
    encoder.encoders[0].self_attn.linear_pos.weight.grad = torch.randn(16, 16)
    optimizer.step()
    Feeder(encoder, utterances(20)).run(size=20).check()


def test_inference_mode():
    with torch.inference_mode():
        Feeder(streaming("kv_conformer"), utterances(20)).run(size=20).check()


def test_one_model_serves_many_threads():
    encoder = streaming("kv_conformer", **STREAMED["mla"])
    feeders = [Feeder(encoder, utterances(60)) for _ in range(4)]
    threads = [threading.Thread(target=feeder.run, args=(7,)) for feeder in feeders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for feeder in feeders:
        feeder.check()


@pytest.mark.parametrize("queries,keys,rank", [(1, 300, 3), (64, 64, 31), (5, 5, 16)])
def test_absorbed_and_expanded_agree(queries, keys, rank):
    encoder = streaming("kv_conformer", attention_type="mla", attention_conf={"kv_rank": rank})
    attention = encoder.encoders[0].self_attn
    q, latent = torch.randn(2, 4, queries, 4), torch.randn(2, 1, keys, rank)
    bias = torch.randn(2, 4, queries, keys)
    assert_close(
        attention.attend_absorbed(q, latent, bias), attention.attend_expanded(q, latent, bias)
    )


def test_the_cheaper_way_is_taken():
    """Small latents of a long context are absorbed; large ones of a short context written out."""
    conf = {"attention_type": "mla", "output_size": 64}
    small = streaming("kv_conformer", attention_conf={"kv_rank": 4}, **conf).encoders[0].self_attn
    large = streaming("kv_conformer", attention_conf={"kv_rank": 128}, **conf).encoders[0].self_attn
    assert small.absorbing_is_cheaper(16, 272)
    assert not large.absorbing_is_cheaper(256, 256)


# what is used wrongly, how, and words of the complaint
WRONG = {
    "another encoder's state": (lambda e, x: e.forward_chunk(x, _other().init_state()), "another"),
    "another batch": (lambda e, x: e.forward_chunk(x, e.init_state(3)), "state of 3"),
    "another width": (lambda e, x: e.forward_chunk(x[..., :19], e.init_state()), "(B, T, 20)"),
    "no batch": (lambda e, x: e.forward_chunk(x[0], e.init_state()), "(B, T, 20)"),
    "too long a length": (
        lambda e, x: e.forward_chunk(x, e.init_state(), lengths=[61]),
        "lengths [61]",
    ),
    "after the end": (
        lambda e, x: e.forward_chunk(x, e.forward_chunk(x, e.init_state(), True)[1]),
        "stream 0 has ended",
    ),
    "training": (lambda e, x: e.train().forward_chunk(x, e.init_state()), "eval()"),
    "cache_dtype": (lambda e, x: e.init_state(cache_dtype="int3"), "int3"),
    "batch_size": (lambda e, x: e.init_state(0), "batch_size: 0"),
    "join": (
        lambda e, x: EncoderState.join([e.init_state(), e.init_state(cache_dtype="int8")]),
        "do not join",
    ),
}


def _other():
    return streaming("kv_conformer")


@pytest.mark.parametrize("wrong,words", WRONG.values(), ids=WRONG)
def test_wrong_use_is_told(wrong, words):
    with pytest.raises(ValueError) as caught:
        wrong(streaming("kv_conformer"), torch.randn(1, 60, 20))
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "conf,words",
    [
        ({"chunk_size": 0}, ["chunk_size", "0"]),
        ({"causal": False}, ["causal", "true"]),
        (
            {
                "pos_enc_layer_type": "conv",
                "selfattention_layer_type": "selfattn",
                "causal": False,
            },
            ["pos_enc_layer_type", "conv"],
        ),
        ({"input_layer": None}, ["input_layer"]),
        ({"input_layer": "embed"}, ["input_layer"]),
        (
            {
                "rel_pos_type": "legacy",
                "pos_enc_layer_type": "legacy_rel_pos",
                "selfattention_layer_type": "legacy_rel_selfattn",
            },
            ["legacy_rel_selfattn", "ESPnet's own attention"],
        ),
    ],
    ids=str,
)
def test_what_cannot_stream_says_why(conf, words):
    conf = {"causal": True, "chunk_size": 0} | conf
    encoder = build("kv_conformer", **conf)
    if "chunk_size" not in words:
        encoder.chunk_size = 4
    with pytest.raises(ValueError) as caught:
        encoder.init_state()
    assert all(word in str(caught.value) for word in words)


def test_select_checks_its_rows():
    with pytest.raises(IndexError, match="state of 2"):
        streaming(next(iter(OURS))).init_state(2).select([2])
