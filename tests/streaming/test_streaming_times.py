"""Times and confidences of tokens, words and segments against audio whose tones are known."""

import itertools
import pickle

import pytest
import torch
from espnet2.text.char_tokenizer import CharTokenizer
from espnet2.text.word_tokenizer import WordTokenizer
from small_models import FRAME, RATE, TOKENS, build, sounds, speech

from espnet_kv.streaming.recognizer import StreamingRecognizer
from espnet_kv.streaming.transcript import Timed, words_of

SECONDS = FRAME / RATE  # of an encoder frame
LETTERS = "AB__BA_AAB"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build(tmp_path_factory.mktemp("model"))


@pytest.fixture
def recognizer(model):
    def make(**options) -> StreamingRecognizer:
        return StreamingRecognizer(
            asr_model=model[0], asr_train_args=model[1], **{"ctc_weight": 0.9} | options
        )

    return make


def tones(letters: str) -> list[tuple[str, float, float]]:
    """(letter, start, end) of each tone of `speech(letters)`, from its samples."""
    heard, found, start = sounds(letters, 0.4, 0.3).tolist(), [], 0
    for token, group in itertools.groupby(heard):
        end = start + len(list(group))
        if token:
            found.append((TOKENS[token], start / RATE, end / RATE))
        start = end
    return found


def assert_times(tokens, expected, tolerance: float = 3 * SECONDS) -> None:
    assert [token.text for token in tokens] == [letter for letter, _, _ in expected]
    for token, (_, start, end) in zip(tokens, expected, strict=True):
        assert token.start == pytest.approx(start, abs=tolerance)
        assert token.end == pytest.approx(end, abs=tolerance)
        assert 0.5 < token.confidence <= 1


class TestTokens:
    @pytest.mark.parametrize("beam_size", [1, 5], ids=["greedy", "beam"])
    def test_they_are_where_their_tones_are(self, recognizer, beam_size):
        (result,) = recognizer(beam_size=beam_size)(speech(LETTERS))
        assert_times(result.tokens, tones(LETTERS))

    def test_after_leading_silence_the_start_is_not_0(self, recognizer):
        (result,) = recognizer()(speech("___A"))
        assert_times(result.tokens, [("A", 2.4, 2.8)])

    @pytest.mark.parametrize("piece", [700, 16000])
    @pytest.mark.parametrize(
        "endpoints",
        [{"endpoint_silence_ms": 600}, {"endpoint_silence_ms": 120}, {"max_segment_seconds": 1.5}],
        ids=["pauses", "short pauses", "longest"],
    )
    def test_they_count_from_the_beginning_of_the_stream(self, recognizer, endpoints, piece):
        stream, segments = recognizer(**endpoints), []
        for samples in speech(LETTERS).split(piece):
            segments += stream.accept(samples)
        segments += stream.accept(torch.zeros(0), is_final=True)
        assert len(segments) > 1
        tokens = [token for (best, *_) in segments for token in best.tokens]
        assert_times(tokens, tones(LETTERS))
        assert list(stream.join(segments)[0].tokens) == tokens

    def test_the_next_stream_counts_anew(self, recognizer):
        stream = recognizer(endpoint_silence_ms=600)
        first, second = stream(speech(LETTERS)), stream(speech(LETTERS))
        assert first[0].tokens == second[0].tokens
        stream(speech("AAA"), is_final=False)
        stream.reset()
        assert stream(speech(LETTERS))[0].tokens == first[0].tokens

    def test_so_does_the_open_segment(self, recognizer):
        stream = recognizer(endpoint_silence_ms=600)
        stream.accept(speech("AB__B"))
        assert_times(stream.partial.tokens, tones("AB__B")[2:])

    def test_each_hypothesis_has_its_own(self, recognizer):
        results = recognizer(nbest=5)(speech("ABBA"))
        assert len(results) == 5
        for result in results:
            assert [token.text for token in result.tokens] == result.token
            assert all(0 <= token.confidence <= 1 for token in result.tokens)

    def test_the_confidence_is_the_posterior(self, model, recognizer):
        """Of a token at its best frame, under ESPnet's model on the whole."""
        network, _ = model
        audio = speech("AB")
        (result,) = recognizer(beam_size=3, ctc_weight=1.0)(audio)
        with torch.no_grad():
            encoded, _ = network.encode(audio[None], torch.tensor([len(audio)]))
            posteriors = network.ctc.softmax(encoded)[0]
        for token, number in zip(result.tokens, result.token_int, strict=True):
            frames = posteriors[round(token.start / SECONDS) : round(token.end / SECONDS), number]
            assert token.confidence == pytest.approx(float(frames.max()), abs=1e-4)


class TestSegments:
    def test_their_bounds_are_those_of_their_audio(self, recognizer):
        stream, audio = recognizer(endpoint_silence_ms=600), speech("AB__BA_")
        segments = stream.accept(audio, is_final=True)
        (first, *_), (second, *_) = segments
        _, b, c, d = tones("AB__BA_")
        assert first.start == 0 and b[2] + 0.6 <= first.end + 3 * SECONDS
        assert first.end <= second.start <= c[1] and d[2] <= second.end + 3 * SECONDS
        assert second.end <= len(audio) / RATE
        (joined,) = stream.join(segments)
        assert (joined.start, joined.end) == (first.start, second.end)

    def test_without_endpoints_it_is_the_whole_stream(self, recognizer):
        audio = speech("AB")
        (result,) = recognizer()(audio)
        assert result.start == 0
        assert len(audio) / RATE - 3 * SECONDS < result.end <= len(audio) / RATE

    def test_results_can_be_sent_to_another_process(self, recognizer):
        (result,) = recognizer()(speech("AB"))
        copy = pickle.loads(pickle.dumps(result))
        assert copy.as_dict() == result.as_dict() and copy.as_dict()["words"][0]["word"] == "AB"


def timed(*tokens: str) -> list[Timed]:
    return [Timed(text, n, n + 0.5, 1 / (n + 1)) for n, text in enumerate(tokens)]


class Pieces(CharTokenizer):
    """Joins sentencepiece's pieces."""

    def tokens2text(self, tokens) -> str:
        return "".join(tokens).replace("▁", " ").strip()


class TestWords:
    def test_characters(self):
        tokens = timed("<space>", "O", "N", "<space>", "<space>", "I", "T")
        words = words_of(tokens, CharTokenizer())
        assert words == [("ON", 1, 2.5, pytest.approx(1 / 3)), ("IT", 5, 6.5, pytest.approx(1 / 7))]

    def test_pieces(self):
        """A word begins with ▁, which may be a piece of its own; a cut word may lack it."""
        words = words_of(timed("ing", "▁the", "▁", "c", "at", "▁"), Pieces())
        assert [word[:3] for word in words] == [("ing", 0, 0.5), ("the", 1, 1.5), ("cat", 2, 4.5)]

    def test_words_are_tokens(self):
        words = words_of(timed("one", "two"), WordTokenizer())
        assert [word.text for word in words] == ["one", "two"]

    def test_none(self):
        assert words_of([], CharTokenizer()) == words_of(timed("a"), None) == []
