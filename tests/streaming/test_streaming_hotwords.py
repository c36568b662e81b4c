"""Hotwords in the CTC search against scores counted anew for every prefix, and their file."""

import math
from pathlib import Path

import pytest
import torch
from espnet2.text.char_tokenizer import CharTokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from naive_ctc import BLANK, draw, naive_beam
from small_models import TOKENS, build, speech

from espnet_kv.errors import UserError
from espnet_kv.streaming.batch import StreamingBatch
from espnet_kv.streaming.ctc import PrefixBeamSearch, build_search
from espnet_kv.streaming.hotwords import Hotwords, read_hotwords
from espnet_kv.streaming.recognizer import StreamingRecognizer

type Phrases = list[tuple[tuple[int, ...], float]]
PHRASES: dict[str, Phrases] = {
    "one": [((3, 1, 2), 1.5)],
    "single token": [((4,), 2.0)],
    "repeated tokens": [((2, 2, 1), 1.0), ((1, 1), 0.5)],
    "prefixes and suffixes of others": [((1, 2, 3, 4), 1.0), ((2, 3), 2.5), ((2, 3, 1), 0.7)],
    "a phrase ends within another": [((1, 2, 3, 2), 1.0), ((2, 3), 2.0), ((3, 4), 0.5)],
    "rare first tokens": [((11, 10), 3.0), ((9, 11, 10, 9), 4.0)],
    "none": [],
}


def counted(prefix: tuple[int, ...], phrases: Phrases) -> tuple[float, float]:
    """(score of the phrases in `prefix`, highest score of a phrase that its end begins)."""
    complete, start = 0.0, 0  # start: tokens before it belong to a phrase that is over
    for end in range(1, len(prefix) + 1):
        tails = [prefix[first:end] for first in range(start, end)]
        complete += sum(score * len(phrase) for phrase, score in phrases if phrase in tails)
        longest = next((t for t in tails if any(p[: len(t)] == t for p, _ in phrases)), ())
        longer = any(p[: len(longest)] == longest != p for p, _ in phrases)
        if longest and not longer:
            start = end
    tails = [prefix[first:] for first in range(start, len(prefix))]
    begun = [len(t) * score for t in tails for p, score in phrases if p[: len(t)] == t != p]
    return complete, max(begun, default=0.0)


@pytest.mark.parametrize("phrases", PHRASES.values(), ids=PHRASES)
class TestAgainstCounting:
    @settings(max_examples=100, deadline=None)
    @given(tokens=st.lists(st.sampled_from([1, 2, 3, 4, 9, 10, 11]), max_size=15))
    def test_scores_of_sequences(self, phrases, tokens):
        hotwords = Hotwords(phrases)
        state, total = hotwords.root, 0.0
        for count, token in enumerate(tokens, start=1):
            state, score = hotwords.step(state, token)
            total += score
            prefix = tuple(tokens[:count])
            complete, begun = counted(prefix, phrases)
            assert (state.open, total) == pytest.approx((begun, complete + begun))

    @pytest.mark.parametrize("beam_size", [2, 5, 30])
    @pytest.mark.parametrize("seed", range(3))
    def test_the_beam_is_that_of_a_search_that_tries_every_token(self, phrases, beam_size, seed):
        log_probs = draw(25, 12, seed, sharpness=1.5)
        search = PrefixBeamSearch(beam_size, hotwords=Hotwords(phrases))
        search.advance(log_probs[:9])
        search.advance(log_probs[9:])
        found = search.nbest(beam_size)
        expected = naive_beam(log_probs, beam_size, lambda prefix: sum(counted(prefix, phrases)))
        got = {tuple(hypothesis.tokens): hypothesis.score for hypothesis in found}
        assert got == pytest.approx(expected, abs=1e-5)
        for hypothesis in found:  # what was begun only is taken back
            complete, _ = counted(tuple(hypothesis.tokens), phrases)
            assert hypothesis.bonus == pytest.approx(complete, abs=1e-9)
        totals = [hypothesis.score + hypothesis.bonus for hypothesis in found]
        assert totals == sorted(totals, reverse=True)


class TestSearch:
    def best(self, rows: list[list[float]], phrases: Phrases, beam_size: int = 3) -> list[int]:
        search = build_search(beam_size, BLANK, hotwords=Hotwords(phrases))
        search.advance(torch.tensor(rows).clamp_min(1e-9).log())
        return search.nbest(1)[0].tokens

    def test_a_phrase_wins_against_what_is_a_little_better(self):
        rows = [[0.02, 0.58, 0.3, 0.1], [0.02, 0.3, 0.1, 0.58]]
        assert self.best(rows, []) == [1, 3]
        assert self.best(rows, [((2, 3), 1.0)]) == [2, 3]

    def test_its_beginning_alone_wins_nothing(self):
        rows = [[0.02, 0.58, 0.3, 0.1], [0.02, 0.96, 0.01, 0.01]]
        assert self.best(rows, [((2, 3), 1.0)]) == self.best(rows, []) == [1]

    def test_its_beginning_stays_in_a_narrow_beam(self):
        """Else the phrase would be lost before it is complete."""
        rows = [[0.0, 0.5, 0.3, 0.2], [1.0, 0.0, 0.0, 0.0], [0.0, 0.01, 0.0, 0.99]]
        narrow = [((2, 3), 0.6)]
        assert self.best(rows, narrow, beam_size=2) == [2, 3]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build(tmp_path_factory.mktemp("model"))


@pytest.fixture
def recognizer(model, tmp_path):
    def make(text: str | None = None, **options) -> StreamingRecognizer:
        if text is not None:
            options["hotwords"] = tmp_path / "hotwords.txt"
            options["hotwords"].write_text(text)
        return StreamingRecognizer(
            asr_model=model[0], asr_train_args=model[1], **{"ctc_weight": 0.9} | options
        )

    return make


class TestRecognizer:
    def test_a_strong_phrase_changes_the_text(self, recognizer):
        audio = speech("ABBA")
        assert recognizer()(audio)[0].text == "ABBA"
        ((text, _, _, hypothesis),) = recognizer("BBB\t9\n")(audio)
        scores = hypothesis.scores
        assert scores["hotwords"] == 3 * 9 * text.count("BBB") > 0
        expected = 0.9 * scores["ctc"] + 0.1 * scores["decoder"] + scores["hotwords"]
        assert hypothesis.score == pytest.approx(expected)

    def test_the_score_of_the_file_wins_against_the_option(self, recognizer):
        audio = speech("ABBA")
        for text, score in (("ABBA", 3.0), ("ABBA\t2", 2.0), ("BB\t1\nABBA\n\n", 3.0 + 0.5)):
            (result,) = recognizer(text, hotwords_score=3.0)(audio)
            assert result.text == "ABBA"
            assert result.hypothesis.scores["hotwords"] == pytest.approx(4 * score)

    def test_the_open_segment_has_them_too(self, recognizer):
        stream = recognizer("BBB\t9")
        stream.accept(speech("ABBA"))
        assert "BBB" in stream.partial.text

    def test_so_do_streams_in_a_batch(self, recognizer):
        expected = recognizer("BBB\t9")(speech("ABBA"))[0]
        batch = StreamingBatch(recognizer("BBB\t9"), slots=2)
        audio = speech("ABBA")
        batch.accept({"x": audio[:9000], "y": audio})
        ended = batch.accept({"x": audio[9000:]}, {"x"})["x"]
        assert ended[0][0].text == expected.text

    def test_a_missing_beam_is_named(self, recognizer):
        with pytest.raises(UserError, match="--hotwords needs a beam: give beam_size 2"):
            recognizer("AB", beam_size=1)

    @pytest.mark.parametrize("score", [0, -1.0, math.nan, math.inf, 101])
    def test_so_is_a_score_that_is_not_allowed(self, recognizer, score):
        with pytest.raises(UserError, match=f"--hotwords_score {score}: allowed: above 0"):
            recognizer("AB", hotwords_score=score)


class TestFile:
    def refused(self, file: Path, said: str) -> None:
        with pytest.raises(UserError, match=said) as caught:
            read_hotwords(file, 1.5, CharTokenizer(), TOKENS)
        assert "\n" not in str(caught.value) and str(file) in str(caught.value)

    @pytest.mark.parametrize(
        ("content", "said"),
        [
            (b"", "has no phrase"),
            (b"\n \n", "has no phrase"),
            (b"AB\nAxB\t2\n", ":2: 'AxB' has the token 'x', which is not in the vocabulary"),
            (b"AB\n\nBA\tmany\n", ":3: score 'many': allowed: above 0, at most 100"),
            (b"AB\t0\n", ":1: score '0'"),
            (b"AB\t-2\n", ":1: score '-2'"),
            (b"AB\tnan\n", ":1: score 'nan'"),
            (b"AB\tinf\n", ":1: score 'inf'"),
            (b"AB\t\n", ":1: score ''"),
            (b"AB\t1\t2\n", ":1: score '1\\\\t2'"),
            (b"\t2\n", ":1: expected `phrase`"),
            (b"AB\nBA\nAB\t2\n", ":3: 'AB' occurs twice"),
            (b"AB\n\xff\n", "not UTF-8 at byte 3"),
        ],
    )
    def test_what_cannot_be_used_is_refused_in_one_line(self, tmp_path, content, said):
        file = tmp_path / "hotwords.txt"
        file.write_bytes(content)
        self.refused(file, said)

    def test_so_is_a_missing_one(self, tmp_path):
        self.refused(tmp_path / "gone.txt", "does not exist")

    def test_lines_of_windows_and_spaces_around(self, tmp_path):
        file = tmp_path / "hotwords.txt"
        file.write_bytes(b" AB \t2\r\nBA\r\n")
        root = read_hotwords(file, 1.5, CharTokenizer(), TOKENS).root
        scores = {}
        for first, second in ((2, 3), (3, 2)):
            scores[first] = root.children[first].children[second].complete
        assert scores == {2: 4.0, 3: 3.0}

    def test_a_model_without_tokenizer(self, tmp_path):
        with pytest.raises(UserError, match=r"--hotwords .*no tokenizer; give token_type"):
            read_hotwords(tmp_path / "x", 1.5, None, TOKENS)
