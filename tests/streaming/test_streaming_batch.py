"""Streams in a batch against each of them alone in a StreamingRecognizer."""

import functools
import itertools
import random
from collections import defaultdict
from collections.abc import Callable

import pytest
import torch
from exports import ATTENTIONS as GRAPHS
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import FRAME, RATE, build, speech
from streams import STREAMED

from espnet_kv.errors import UserError
from espnet_kv.streaming.batch import StreamingBatch
from espnet_kv.streaming.recognizer import StreamingRecognizer

ENCODERS = ("kv_branchformer", "kv_e_branchformer", "kv_transformer")
LETTERS = ("ABBA", "B", "AB__BA_", "AAAB_B", "_")
OPTIONS = {"ctc_weight": 0.9, "nbest": 2, "endpoint_silence_ms": 300}
SIZES = (0, 1, 37, 160, 999, 2560, 5000, 20000, 80000)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Builds each model once."""
    built = {}

    def model(name: str = "mla"):
        if name not in built:
            attention = {"attention_conf": {}} | STREAMED.get(name, STREAMED["mla"])
            encoder = {"encoder": name} if name in ENCODERS else {}
            built[name] = build(tmp_path_factory.mktemp(name), encoder_conf=attention, **encoder)
        return built[name]

    return model


@pytest.fixture(params=["torch", "onnx"])
def recognizer(request, models):
    """Makes recognizers that run the model, or its graph."""
    if request.param == "onnx":
        graph = request.getfixturevalue("graphs")("mla")

    def make(**options) -> StreamingRecognizer:
        if request.param == "onnx":
            return graph(**options)
        model, args = models()
        return StreamingRecognizer(asr_model=model, asr_train_args=args, **OPTIONS | options)

    return make


@pytest.fixture(scope="module")
def graphs(exported):
    """Gives a maker of recognizers that run the graph of a model."""
    pytest.importorskip("onnx", reason="the extra [serve] is not installed")
    pytest.importorskip("onnxruntime", reason="the extra [serve] is not installed")
    from espnet_kv.export.onnx_engine import OnnxEngine

    def graph(attention: str, encoder: str = "kv_conformer", file: str = "model.onnx"):
        model, args, path, _ = exported(encoder, attention)
        engine = functools.partial(OnnxEngine, path.with_name(file))
        return functools.partial(
            StreamingRecognizer, asr_model=model, asr_train_args=args, engine=engine, **OPTIONS
        )

    return graph


def recorded(recognizer: StreamingRecognizer) -> dict[object, list[torch.Tensor]]:
    """The log-probabilities that each stream will be searched in."""
    seen, advance = defaultdict(list), recognizer.decoder.advance

    def recording(stream, encoded, log_probs):
        seen[stream].append(log_probs)
        return advance(stream, encoded, log_probs)

    recognizer.decoder.advance = recording
    return seen


def alone(recognizer: StreamingRecognizer, audio: torch.Tensor):
    """(segments, log-probabilities) of a stream in one piece."""
    seen = recorded(recognizer)
    segments = recognizer.accept(audio, is_final=True)
    return segments, torch.cat(next(iter(seen.values())))


def assert_same(segments, expected) -> None:
    assert len(segments) == len(expected)
    for results, others in zip(segments, expected, strict=True):
        for result, other in zip(results, others, strict=True):
            assert result[:3] == other[:3]
            assert (result.start, result.end) == (other.start, other.end)
            assert result.hypothesis.scores == pytest.approx(other.hypothesis.scores, abs=1e-3)
            for token, twin in zip(result.tokens, other.tokens, strict=True):
                assert token[:3] == twin[:3]
                assert token.confidence == pytest.approx(twin.confidence, abs=1e-4)


@pytest.mark.parametrize(
    ("name", "left_chunks"),
    zip([*STREAMED, *ENCODERS], itertools.cycle((2, -1)), strict=False),
)
@settings(max_examples=3, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_any_arrival_gives_what_each_stream_gives_alone(models, name, left_chunks, seed):
    model, args = models(name)
    make = functools.partial(
        StreamingRecognizer, asr_model=model, asr_train_args=args, left_chunks=left_chunks
    )
    check_arrivals(functools.partial(make, **OPTIONS), random.Random(seed))


@pytest.mark.parametrize(
    ("attention", "encoder"),
    [(a, "kv_transformer" if a == "gqa" else "kv_conformer") for a in GRAPHS],
)
@settings(max_examples=3, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_streams_of_all_ages_share_runs_of_a_graph(graphs, attention, encoder, seed):
    check_arrivals(graphs(attention, encoder), random.Random(seed))


def check_arrivals(recognizer: Callable[[], StreamingRecognizer], draw: random.Random) -> None:
    """Compare streams in a batch, that get pieces at random, with each of them alone."""
    audios = {key: speech(letters) for key, letters in enumerate(LETTERS)}
    expected = {key: alone(recognizer(), audio) for key, audio in audios.items()}
    together = recognizer()
    seen = recorded(together)
    batch = StreamingBatch(together, slots=draw.randint(1, 4))
    ended, searches, fed = defaultdict(list), {}, dict.fromkeys(audios, 0)
    open_keys = set(audios)
    while open_keys:
        pieces, final = {}, set()
        for key in draw.sample(sorted(open_keys), draw.randint(1, len(open_keys))):
            size = draw.choice(SIZES)
            pieces[key] = audios[key][fed[key] : fed[key] + size]
            fed[key] += size
            if fed[key] >= len(audios[key]):
                final.add(key)
        open_keys -= final
        for key, results in batch.accept(pieces, final).items():
            ended[key] += results
        searches |= {key: batch._members[key].search for key in batch.streams}
    assert batch.streams == []
    for key, (segments, log_probs) in expected.items():
        assert_same(ended[key], segments)
        if key in searches:  # else it came in one piece
            torch.testing.assert_close(torch.cat(seen[searches[key]]), log_probs, atol=1e-4, rtol=0)


class TestSlots:
    def storage(self, batch: StreamingBatch) -> list[int]:
        """Addresses of the rings; a graph returns its caches in new storage."""
        store = getattr(batch._state, "store", None)
        states = store.states if store else []
        return [tensor.data_ptr() for state in states for tensor in state.tensors]

    def test_who_joins_takes_a_free_row_without_allocation(self, recognizer):
        batch = StreamingBatch(recognizer(), slots=3)
        batch.accept({key: speech("AB") for key in "abc"})
        before = self.storage(batch)
        for key in "defg":
            batch.drop(batch.streams[0])
            batch.accept({key: speech("BA")[: 9 * FRAME]})
            assert self.storage(batch) == before and batch.slots == 3
        assert batch.streams == ["e", "f", "g"]

    def test_a_used_row_is_as_good_as_new(self, recognizer):
        expected = recognizer().accept(speech("ABBA"), is_final=True)
        batch = StreamingBatch(recognizer())
        batch.accept({"left": speech("BBBB")})
        batch.drop("left")
        assert batch.nbytes_by_kind() == StreamingBatch(recognizer()).nbytes_by_kind()
        for key in range(3):
            assert_same(batch.accept({key: speech("ABBA")}, {key})[key], expected)
        assert batch.slots == 1

    def test_rows_are_doubled_when_all_are_taken(self, recognizer):
        expected = {key: recognizer().accept(speech("AB" + key), is_final=True) for key in "AB_"}
        batch, rest, ended = StreamingBatch(recognizer()), {}, {}
        for key in "AB_":
            audio = speech("AB" + key)
            rest[key] = audio[len(audio) // 2 :]
            ended |= batch.accept({key: audio[: len(audio) // 2]})
        assert batch.slots == 4
        for key, segments in batch.accept(rest, final=rest).items():
            assert_same(ended[key] + segments, expected[key])

    @pytest.mark.parametrize("slots", [0, -1, 1.5, True])
    def test_slots_are_counted(self, recognizer, slots):
        with pytest.raises(ValueError, match="is not allowed"):
            StreamingBatch(recognizer(), slots)


class TestStreams:
    def test_partial_results_and_segments_come_while_it_runs(self, recognizer):
        batch = StreamingBatch(recognizer(endpoint_silence_ms=600), slots=2)
        ended = batch.accept({"a": speech("AB__B"), "b": speech("A")})
        assert [results[0].text for results in ended["a"]] == ["AB"]
        assert ended["b"] == []
        assert (batch.partial("a").text, batch.partial("b").text) == ("B", "A")

    def test_very_long_pieces_are_taken_in_parts(self, recognizer, monkeypatch):
        audios = {key: speech(letters) for key, letters in enumerate(LETTERS)}
        expected = {k: recognizer().accept(audio, is_final=True) for k, audio in audios.items()}
        monkeypatch.setattr("espnet_kv.streaming.batch.LONGEST_PIECE_SECONDS", 1)
        batch, sizes = StreamingBatch(recognizer(), slots=2), []
        encode = batch._encode
        batch._encode = lambda members, features, final: (
            sizes.extend(map(len, features)) or encode(members, features, final)
        )
        for key, segments in batch.accept(audios, final=audios).items():
            assert_same(segments, expected[key])
        assert 100 <= max(sizes) <= 102  # frames of features in a second, and at the borders

    def test_a_long_wait_changes_nothing(self, recognizer):
        audio = speech("ABBA")
        expected = recognizer().accept(audio, is_final=True)
        batch = StreamingBatch(recognizer(), slots=2)
        ended = batch.accept({"waits": audio[:30000]})["waits"]
        for number in range(3):
            batch.accept({number: speech("BABAB")}, {number})
        ended += batch.accept({"waits": audio[30000:]}, {"waits"})["waits"]
        assert_same(ended, expected)

    def test_the_recognizers_own_stream_is_another(self, recognizer):
        one = recognizer()
        expected = one.accept(speech("ABBA"), is_final=True)
        batch = StreamingBatch(one)
        ended = one.accept(speech("ABBA")[:20000])
        assert_same(batch.accept({0: speech("ABBA")}, {0})[0], expected)
        assert_same(ended + one.accept(speech("ABBA")[20000:], is_final=True), expected)

    def test_a_stream_that_is_too_short_disturbs_no_other(self, recognizer, caplog):
        expected = recognizer().accept(speech("AB"), is_final=True)
        batch = StreamingBatch(recognizer())
        ended = batch.accept({"short": torch.zeros(50), "b": speech("AB")}, {"short", "b"})
        assert ended["short"] == [] and "stream short: 50 samples" in caplog.text
        assert_same(ended["b"], expected)
        assert batch.streams == []

    def test_bad_samples_name_their_stream_and_nothing_is_processed(self, recognizer):
        batch = StreamingBatch(recognizer())
        audio = speech("AB")
        for bad in (torch.full((9,), torch.nan), torch.zeros(9, dtype=torch.int16)):
            with pytest.raises(UserError, match=r"stream b: .*(NaN|int16)"):
                batch.accept({"a": audio, "b": bad})
        with pytest.raises(KeyError):
            batch.accept({"a": audio}, {"b"})
        assert batch.streams == []
        for gone in (batch.partial, batch.drop):
            with pytest.raises(KeyError):
                gone("a")

    def test_memory_does_not_grow(self, recognizer):
        batch = StreamingBatch(recognizer(left_chunks=2), slots=2)
        held = []
        for _ in range(4):
            for piece in speech("ABBA_BA__B_").split(RATE):
                batch.accept({"a": piece, "b": piece})
            held.append(sum(batch.nbytes_by_kind().values()))
        assert held[-1] <= 1.1 * held[0]

    def test_nothing_at_all(self, recognizer):
        batch = StreamingBatch(recognizer())
        assert batch.accept({}) == {}
        assert batch.accept({"a": torch.zeros(0)}) == {"a": []}
        assert batch.partial("a").text == ""

    def test_bytes_held_are_those_of_streams_and_capacity_those_of_rows(self, recognizer):
        batch = StreamingBatch(recognizer(), slots=4)
        batch.accept({"a": speech("AB"), "b": speech("BA")})
        two = batch.nbytes_by_kind()["attention"]
        batch.drop("a")
        assert 0 < 2 * batch.nbytes_by_kind()["attention"] == two
        assert 2 * two <= batch.capacity_bytes


def test_a_graph_with_weights_in_int8_gives_the_text_of_each_stream_alone(graphs):
    """Its activations are quantised for all streams of a run, so scores may differ a little."""
    make = graphs("mla", file="model.int8.onnx")
    audios = {letters: speech(letters) for letters in LETTERS}
    ended = StreamingBatch(make(), slots=2).accept(audios, final=audios)
    for letters, audio in audios.items():
        expected = make().accept(audio, is_final=True)
        assert [r[0].text for r in ended[letters]] == [r[0].text for r in expected]
