"""Streams of one encoder that differ in their settings, or move between batches and processes."""

import copy
import pickle
import threading
from typing import Any

import pytest
import torch
from small_encoders import FEATURES, assert_close, build, encode, encoders
from streams import STREAMED, Feeder, streaming, utterances

from espnet_kv.cache import EncoderState, State

streamed = pytest.mark.parametrize("attention", STREAMED.values(), ids=STREAMED)
SETTINGS: list[dict[str, Any]] = [
    {"chunk_size": 4, "left_chunks": 2},
    {"chunk_size": 16, "left_chunks": 0},
    {"chunk_size": 3, "left_chunks": -1},
]


@encoders
@streamed
def test_streams_with_settings_of_their_own_share_an_encoder(name, attention):
    encoder = build(name, causal=True, **attention)  # the YAML says nothing about chunks
    feeders = [Feeder(encoder, utterances(25), **settings) for settings in SETTINGS]
    while not all(feeder.done for feeder in feeders):
        for feeder in feeders:
            if not feeder.done:
                feeder.feed([9])
    for feeder in feeders:
        feeder.check()
    assert (encoder.chunk_size, encoder.left_chunks) == (0, -1)


@pytest.mark.parametrize("name", ["kv_conformer", "kv_transformer"])
def test_threads_with_settings_of_their_own_share_an_encoder(name):
    encoder = build(name, causal=True)
    feeders = [Feeder(encoder, utterances(60), **settings) for settings in SETTINGS * 2]
    wrong: list[BaseException] = []

    def run(feeder: Feeder) -> None:
        try:
            feeder.run(7).check()
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=run, args=(feeder,)) for feeder in feeders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@encoders
def test_a_pass_under_other_chunks_is_that_of_an_encoder_made_for_them(name):
    encoder = build(name, chunk_size=4)
    other = build(name, chunk_size=3, left_chunks=1)
    other.load_state_dict(encoder.state_dict())
    (x,) = utterances(25)
    before = encode(encoder, x)
    with encoder.chunks(chunk_size=3, left_chunks=1):
        assert_close(encode(encoder, x), encode(other, x), 0)
        with encoder.chunks(chunk_size=0):
            whole = encode(encoder, x)
    assert_close(encode(encoder, x), before, 0)
    assert not torch.allclose(whole, before, atol=1e-3)


def test_passes_of_other_threads_keep_their_chunks():
    encoder = build("kv_transformer", chunk_size=4)
    (x,) = utterances(25)
    expected, got = encode(encoder, x), []
    with encoder.chunks(chunk_size=2, left_chunks=0):
        thread = threading.Thread(target=lambda: got.append(encode(encoder, x)))
        thread.start()
        thread.join()
    assert_close(got[0], expected, 0)


@pytest.mark.parametrize("settings", [{"chunk_size": -1}, {"left_chunks": 1.5}], ids=str)
def test_wrong_settings_are_named(settings):
    encoder = streaming("kv_conformer")
    (key,) = settings
    with pytest.raises(ValueError, match=key), encoder.chunks(**settings):
        pass
    with pytest.raises(ValueError, match=key):
        encoder.init_state(**settings)


@pytest.mark.parametrize(
    ("name", "conf", "word"),
    [
        ("kv_branchformer", {"merge_method": "learned_ave"}, "learned_ave"),
        ("kv_transformer", {"input_layer": None}, "input_layer"),
        ("kv_conformer", {"rel_pos_type": "legacy"}, "rel_pos_type"),
    ],
    ids=["learned_ave", "input_layer", "legacy"],
)
def test_an_encoder_without_chunks_refuses_a_pass_in_chunks(name, conf, word):
    encoder = build(name, **conf)
    with pytest.raises(ValueError, match=word), encoder.chunks(chunk_size=4):
        pass


@encoders
@streamed
@pytest.mark.parametrize("left", [2, -1])
def test_a_stream_goes_on_after_it_was_pickled(name, attention, left):
    feeder = Feeder(streaming(name, 4, left, **attention), utterances(20, 26), empty=1e4)
    feeder.feed([31, 40])
    for copied in (pickle.loads(pickle.dumps(feeder.state)), copy.deepcopy(feeder.state)):
        twin = copy.copy(feeder)
        twin.state, twin.out = copied, [list(pieces) for pieces in feeder.out]
        twin.run(size=17).check()
    feeder.run(size=17).check()


def test_an_encoder_of_other_sizes_refuses_a_pickled_stream():
    state = pickle.dumps(streaming("kv_conformer", **STREAMED["mla"]).init_state())
    other = streaming("kv_conformer", attention_type="mla", attention_conf={"kv_rank": 7})
    with pytest.raises(ValueError, match="another encoder"):
        other.forward_chunk(torch.randn(1, 20, FEATURES), pickle.loads(state))


@encoders
@streamed
@pytest.mark.parametrize("left", [2, -1])
def test_a_stream_begins_in_place_of_another(name, attention, left):
    encoder = streaming(name, 4, left, **attention)
    feeder = Feeder(encoder, utterances(20, 26, 23), empty=1e4)
    feeder.feed([60, 60, 60])
    tensors = [t.data_ptr() for s in feeder.state.store.states for t in s.tensors]
    feeder.state.reset([1])
    assert [t.data_ptr() for s in feeder.state.store.states for t in s.tensors] == tensors
    feeder.xs[1], feeder.fed[1], feeder.out[1] = utterances(15)[0], 0, []
    feeder.run(size=13).check()


def test_a_stream_of_nan_leaves_nothing_to_the_next_one():
    encoder = streaming("kv_conformer", **STREAMED["mha"])
    state = encoder.init_state(2)
    encoder.forward_chunk(torch.full((2, 90, FEATURES), torch.nan), state)
    state.reset()
    feeder = Feeder(encoder, utterances(9, 21), empty=0.0)
    feeder.state = state
    feeder.run(size=13).check()


@pytest.mark.parametrize(
    "mask",
    [[True, False, True], torch.tensor([True, False, True]), iter([True, False])],
    ids=["list", "tensor", "iterator"],
)
def test_a_mask_is_refused(mask):
    with pytest.raises(ValueError, match="mask"):
        streaming("kv_conformer").init_state(3).select(mask)


def test_a_stream_that_is_listed_twice_forks():
    feeder = Feeder(streaming("kv_conformer"), utterances(20))
    feeder.feed([31])
    feeder.state = feeder.state.select(torch.tensor([0, 0]))
    rest = feeder.xs[0][31:], torch.randn_like(feeder.xs[0][31:])
    feeder.xs = [torch.cat([feeder.xs[0][:31], end]) for end in rest]
    feeder.fed, feeder.out = [31, 31], [list(feeder.out[0]) for _ in range(2)]
    feeder.run(size=9).check()


class Copied:
    """Bytes that states copy within it."""

    def __init__(self, monkeypatch):
        self.nbytes = 0
        self._monkeypatch = monkeypatch

    def __enter__(self) -> "Copied":
        for cls in (State, *State.__subclasses__()):
            if "copy_from" in vars(cls):
                self._watch(cls)
        return self

    def _watch(self, cls: type) -> None:
        copy_from = cls.copy_from  # type: ignore[attr-defined]

        def watched(state, source, theirs, ours):
            per_stream = source.capacity_bytes // source.places
            self.nbytes += per_stream * len(theirs)
            copy_from(state, source, theirs, ours)

        self._monkeypatch.setattr(cls, "copy_from", watched)

    def __exit__(self, *_: Any) -> None:
        self._monkeypatch.undo()


@pytest.mark.parametrize("left", [2, -1])
def test_one_of_many_streams_leaves_and_another_one_joins(left, monkeypatch):
    """Neither copies the streams that stay, once the batch has had its size."""
    encoder = streaming("kv_conformer", 4, left)
    state = encoder.init_state(64)
    one = encoder.init_state(1).store.capacity_bytes
    x = torch.randn(64, 40, FEATURES)
    _, state = encoder.forward_chunk(x, state)
    with Copied(monkeypatch) as copied:
        for leaves in (5, 63, 0):
            state = state.select([row for row in range(64) if row != leaves])
            assert copied.nbytes == 0
            state = EncoderState.join([state, encoder.init_state(1)])
            assert copied.nbytes == one
            _, state = encoder.forward_chunk(x, state)
            assert copied.nbytes == one  # the newcomer has the place of the one that left
            copied.nbytes = 0
        alone = state.select([7])
        assert copied.nbytes == one
        assert alone.store.capacity_bytes == one
        state = state.select(range(1, 64))  # without one to take its place, the last one moves
        copied.nbytes = 0
        encoder.forward_chunk(x[1:], state)
        assert copied.nbytes <= one


def test_a_batch_that_grows_copies_each_stream_a_few_times(monkeypatch):
    encoder = streaming("kv_conformer")
    one = encoder.init_state(1).store.capacity_bytes
    with Copied(monkeypatch) as copied:
        state = encoder.init_state(16)
        for _ in range(48):
            state = EncoderState.join([state, encoder.init_state(1)])
        assert copied.nbytes < 8 * 64 * one
    assert state.store.capacity_bytes <= 1.25 * 64 * one


def test_storage_follows_the_streams_that_are_left():
    """A short stream selected from a batch with a long one, without bound on the left context."""
    encoder = streaming("kv_conformer", 4, -1)
    state = encoder.init_state(3)
    lengths = [4000, 40, 40]
    _, state = encoder.forward_chunk(torch.randn(3, 4000, FEATURES), state, lengths=lengths)
    assert state.slots > 512
    fresh = encoder.init_state(2)
    assert state.select([1, 2]).store.capacity_bytes == fresh.store.capacity_bytes
    assert state.select([0]).slots > 512
