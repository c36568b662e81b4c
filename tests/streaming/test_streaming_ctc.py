"""CTC search in pieces against sums over all alignments, ESPnet's CTC loss and naive beams."""

import gc
import itertools
import math
import sys

import numpy as np
import pytest
import torch
from espnet2.asr.ctc import CTC
from hypothesis import given, settings
from hypothesis import strategies as st
from naive_ctc import BLANK, draw, naive_beam

from espnet_kv.streaming import ctc
from espnet_kv.streaming.ctc import GreedySearch, PrefixBeamSearch, build_search
from espnet_kv.streaming.endpoint import Endpointer


def collapse(alignment, blank: int = BLANK) -> tuple[int, ...]:
    return tuple(token for token, _ in itertools.groupby(alignment) if token != blank)


def exhaustive(log_probs: torch.Tensor, blank: int = BLANK) -> dict[tuple[int, ...], float]:
    """Every token sequence with the sum over all of its alignments."""
    frames, tokens = log_probs.shape
    sums: dict[tuple[int, ...], float] = {}
    for alignment in itertools.product(range(tokens), repeat=frames):
        score = sum(float(log_probs[t, token]) for t, token in enumerate(alignment))
        key = collapse(alignment, blank)
        sums[key] = np.logaddexp(sums.get(key, -math.inf), score)
    return sums


def found(search, count: int = 10**6) -> dict[tuple[int, ...], float]:
    return {tuple(hypothesis.tokens): hypothesis.score for hypothesis in search.nbest(count)}


def assert_same(got: dict, expected: dict, tolerance: float = 1e-6) -> None:
    assert got.keys() == expected.keys()
    assert got == pytest.approx(expected, abs=tolerance)


class TestPrefixBeamSearch:
    @pytest.mark.parametrize("blank", [0, 2])
    @pytest.mark.parametrize(("frames", "tokens"), [(1, 4), (6, 3), (5, 4), (7, 2)])
    def test_with_room_for_all_it_sums_over_every_alignment(self, frames, tokens, blank):
        blank = min(blank, tokens - 1)
        log_probs = draw(frames, tokens)
        search = PrefixBeamSearch(10**6, blank)
        search.advance(log_probs)
        assert_same(found(search), exhaustive(log_probs, blank))

    @pytest.mark.parametrize("beam_size", [2, 3, 7, 30])
    @pytest.mark.parametrize("seed", range(4))
    def test_a_narrow_beam_keeps_what_a_naive_one_keeps(self, beam_size, seed):
        """Though the naive one tries every token."""
        log_probs = draw(25, 12, seed, sharpness=1.5)
        search = PrefixBeamSearch(beam_size)
        search.advance(log_probs)
        assert_same(found(search), naive_beam(log_probs, beam_size))

    def test_a_demoted_repetition_makes_room_for_the_next_token(self):
        """Of 0.4 only half is a new token, so that those of 0.3 and 0.29 are the best two."""
        rows = [[0.0, 1.0, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0], [0.01, 0.4, 0.3, 0.29]]
        search = PrefixBeamSearch(2)
        search.advance(torch.tensor(rows).log())
        assert_same(found(search), {(1, 2): math.log(0.3), (1, 3): math.log(0.29)})

    def test_hypotheses_have_espnets_ctc_score(self):
        log_probs = draw(12, 4)
        search = PrefixBeamSearch(20000)
        search.advance(log_probs)
        espnet = CTC(odim=4, encoder_output_size=1, reduce=False)
        for hypothesis in search.nbest(5):
            if not hypothesis.tokens:
                continue
            loss = espnet.loss_fn(
                log_probs[:, None],
                torch.tensor(hypothesis.tokens),
                torch.tensor([12]),
                torch.tensor([len(hypothesis.tokens)]),
            )
            assert hypothesis.score == pytest.approx(-float(loss), abs=1e-4)

    def test_best_come_first(self):
        search = PrefixBeamSearch(10)
        search.advance(draw(20, 6))
        scores = [hypothesis.score for hypothesis in search.nbest(10)]
        assert scores == sorted(scores, reverse=True) and len(set(scores)) == 10
        assert search.nbest(3) == search.nbest(10)[:3]

    def test_before_the_first_frame_there_is_the_empty_hypothesis(self):
        assert found(PrefixBeamSearch(4)) == {(): 0.0}

    def test_impossible_tokens_stay_out(self):
        log_probs = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]).log()
        search = PrefixBeamSearch(10)
        search.advance(log_probs)
        possible = {k: v for k, v in found(search).items() if v > -math.inf}
        assert_same(possible, {(1,): math.log(0.5), (1, 1): math.log(0.5)})

    @pytest.mark.parametrize(("beam_size", "seed"), [(3, 218), (4, 152), (5, 86), (5, 152)])
    def test_a_prefix_that_comes_back_is_merged_with_its_descendants(self, beam_size, seed):
        """Frames in which, say, A leaves the beam while AB stays, comes back and grows a B."""
        log_probs = draw(12, 3, seed)
        search = PrefixBeamSearch(beam_size)
        search.advance(log_probs)
        assert_same(found(search), naive_beam(log_probs, beam_size))


def runs(alignment, log_probs: torch.Tensor) -> list[tuple[int, int, float]]:
    """(first frame, frame after the last, highest log-probability) of each token."""
    found, start = [], 0
    for token, group in itertools.groupby(alignment):
        end = start + len(list(group))
        if token != BLANK:
            found.append((start, end, float(log_probs[start:end, token].max())))
        start = end
    return found


class TestFrames:
    @pytest.mark.parametrize("seed", range(5))
    def test_tokens_have_the_frames_of_the_most_probable_alignment(self, seed):
        log_probs = draw(6, 4, seed)
        best: dict[tuple[int, ...], tuple[float, tuple[int, ...]]] = {}
        for alignment in itertools.product(range(4), repeat=6):
            score = sum(float(log_probs[t, token]) for t, token in enumerate(alignment))
            best[collapse(alignment)] = max(
                best.get(collapse(alignment), (-math.inf, ())), (score, alignment)
            )
        search = PrefixBeamSearch(10**6)
        search.advance(log_probs)
        hypotheses = search.nbest(10**6)
        assert len(hypotheses) == len(best)
        for hypothesis in hypotheses:
            _, alignment = best[tuple(hypothesis.tokens)]
            assert hypothesis.spans == runs(alignment, log_probs)

    @pytest.mark.parametrize("beam_size", [1, 4])
    def test_they_are_those_of_clear_audio(self, beam_size):
        alignment = [0, 0, 0, 2, 2, 0, 2, 1, 1, 1, 0, 0]
        sure = torch.full((len(alignment), 4), 0.01)
        sure[range(len(alignment)), alignment] = 0.97
        sure[8, 1] = 0.98
        search = build_search(beam_size)
        search.advance(sure.log())
        ((tokens, _, spans, _),) = search.nbest(1)
        assert tokens == [2, 2, 1]
        assert [(span.start, span.end) for span in spans] == [(3, 5), (6, 7), (7, 10)]
        assert [math.exp(span.peak) for span in spans] == pytest.approx([0.97, 0.97, 0.98])

    @pytest.mark.parametrize("beam_size", [1, 2, 5])
    @pytest.mark.parametrize("last", [None, 2])
    @pytest.mark.parametrize("seed", [0, 86, 152, 218])
    def test_every_token_has_its_own(self, beam_size, last, seed):
        """Also for prefixes that left the beam and came back, and after a token that was cut."""
        search = build_search(beam_size, BLANK, last)
        log_probs = draw(30, 3, seed)
        search.advance(log_probs)
        for tokens, _, spans, _ in search.nbest(beam_size):
            assert len(spans) == len(tokens)
            bounds = [bound for start, end, _ in spans for bound in (start, end)]
            assert bounds == sorted(bounds) and all(start < end for start, end, _ in spans)
            for token, (start, end, peak) in zip(tokens, spans, strict=True):
                assert peak == float(log_probs[start:end, token].max())
            repeated = [a == b for a, b in itertools.pairwise(tokens)]
            gaps = [b.start - a.end for a, b in itertools.pairwise(spans)]
            assert all(gap > 0 for gap, same in zip(gaps, repeated, strict=True) if same)


class TestCost:
    def test_a_frame_never_walks_along_its_prefixes(self, monkeypatch):
        search = PrefixBeamSearch(5)
        monkeypatch.setattr(ctc._Prefix, "tokens", lambda self: pytest.fail("walked"))
        search.advance(draw(200, 8))

    def test_branches_that_left_the_beam_are_freed(self):
        """Hypotheses that differ at one place only share the rest: one node per token."""
        frames, beam = 400, 6
        sure = torch.full((frames, 5), -12.0)
        for t in range(frames):
            sure[t, (0, 1, 0, 2)[t % 4]] = -1e-4
        search = PrefixBeamSearch(beam)
        search.advance(sure)
        tokens = len(search.nbest(1)[0].tokens)
        assert tokens == frames // 2
        gc.collect()
        alive = sum(isinstance(thing, ctc._Prefix) for thing in gc.get_objects())
        assert tokens <= alive <= tokens * beam + 1
        del search
        gc.collect()
        assert not any(isinstance(thing, ctc._Prefix) for thing in gc.get_objects())

    def test_a_very_long_hypothesis_can_be_dropped(self):
        """Freeing a chain of nodes must not recurse once per node."""
        search = PrefixBeamSearch(1)
        count = 20 * sys.getrecursionlimit()
        one_hot = torch.eye(3)[torch.arange(count) % 2 + 1]
        search.advance(one_hot.clamp_min(1e-9).log())
        assert len(search.nbest(1)[0].tokens) == count
        del search
        gc.collect()


class TestGreedy:
    @given(st.lists(st.integers(0, 3), max_size=30))
    @settings(max_examples=50, deadline=None)
    def test_it_is_the_best_path_collapsed(self, path):
        log_probs = draw(len(path), 4, seed=len(path))
        for t, token in enumerate(path):
            log_probs[t, token] = 1.0 + t
        search = build_search(1)
        search.advance(log_probs)
        (best,) = search.nbest(5)
        assert tuple(best.tokens) == collapse(path)
        assert best.score == pytest.approx(sum(1.0 + t for t in range(len(path))))

    def test_beam_size_one_is_greedy(self):
        assert isinstance(build_search(1), GreedySearch)
        assert isinstance(build_search(2), PrefixBeamSearch)

    def test_what_it_gave_does_not_change_later(self):
        search = GreedySearch()
        search.advance(draw(5, 4))
        (before,) = search.nbest()
        kept = list(before.tokens)
        search.advance(draw(50, 4, seed=1))
        assert before.tokens == kept


@pytest.mark.parametrize("beam_size", [1, 4])
@given(cuts=st.lists(st.integers(0, 40), max_size=8))
@settings(max_examples=20, deadline=None)
def test_the_result_does_not_depend_on_how_frames_are_split(beam_size, cuts):
    log_probs = draw(40, 7, seed=3)
    at_once, in_pieces = build_search(beam_size), build_search(beam_size)
    at_once.advance(log_probs)
    bounds = [0, *sorted(cuts), 40]
    for start, stop in itertools.pairwise(bounds):
        in_pieces.advance(log_probs[start:stop])
    assert in_pieces.nbest(9) == at_once.nbest(9)  # bit by bit


@pytest.mark.parametrize("beam_size", [1, 10**6])
@pytest.mark.parametrize("last", [1, 2])
def test_a_segment_may_begin_within_a_token(beam_size, last):
    """As if a frame with that token for sure had come before, whose token is not written again."""
    log_probs = draw(5, 4, seed=5)
    sure = torch.full((1, 4), -math.inf)
    sure[0, last] = 0.0
    whole = torch.cat([sure, log_probs])
    search = build_search(beam_size, BLANK, last)
    search.advance(log_probs)
    if beam_size == 1:
        assert search.nbest(1)[0].tokens == list(collapse(whole.argmax(-1).tolist()))[1:]
    else:
        expected = {k[1:]: v for k, v in exhaustive(whole).items() if v > -math.inf}
        assert_same(found(search), expected)


class TestEndpointer:
    def segments(self, endpointer: Endpointer, best: list[int]) -> list[list[int]]:
        parts, segments = list(endpointer.pieces(best)), [[]]
        for piece, ends in parts:
            segments[-1] += best[piece]
            if ends:
                segments.append([])
        return segments

    def test_a_pause_ends_a_segment_at_its_frame(self):
        best = [1, 0, 0, 2, 0, 0, 0, 0, 3]
        got = self.segments(Endpointer(BLANK, silence_frames=3), best)
        assert got == [[1, 0, 0, 2, 0, 0, 0], [0, 3]]

    def test_silence_ends_segments_again_and_again(self):
        assert self.segments(Endpointer(BLANK, 3), [0] * 8) == [[0] * 3, [0] * 3, [0] * 2]

    def test_off_nothing_ends(self):
        endpointer = Endpointer(BLANK)
        assert not endpointer.active
        assert self.segments(endpointer, [0, 1] * 50) == [[0, 1] * 50]

    def test_a_long_segment_ends_at_a_blank_where_there_is_one(self):
        best = [1, 0, 2, 2, 2, 2, 2, 0, 3, 3, 3, 3]
        assert self.segments(Endpointer(BLANK, 0, max_frames=8), best) == [best[:8], best[8:]]
        best = [1, 0, 2, 2, 2, 2, 0, 2, 3, 3, 3, 3]
        assert self.segments(Endpointer(BLANK, 0, max_frames=8), best) == [best[:7], best[7:]]
        assert self.segments(Endpointer(BLANK, 0, max_frames=4), [1] * 9) == [
            [1] * 4,
            [1] * 4,
            [1],
        ]

    @given(st.lists(st.integers(0, 1), max_size=60), st.lists(st.integers(0, 60), max_size=6))
    @settings(max_examples=50, deadline=None)
    def test_the_cuts_do_not_depend_on_how_frames_are_split(self, best, cuts):
        at_once = self.segments(Endpointer(BLANK, 4, 12), best)
        endpointer, got = Endpointer(BLANK, 4, 12), [[]]
        bounds = [0, *sorted(min(cut, len(best)) for cut in cuts), len(best)]
        for start, stop in itertools.pairwise(bounds):
            first, *more = self.segments(endpointer, best[start:stop])
            got[-1] += first
            got += more
        assert got == at_once
