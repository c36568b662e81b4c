"""Incremental CTC search: best path and prefix beam search.

Both take log-probabilities in pieces of any size. The result does not depend on how the frames
are split, and the time per frame does not grow with the stream. Each token has the frames that the
most probable alignment of its hypothesis gives it; blank frames belong to no token.

Shape letters: T frames, V vocabulary, K prefixes in the beam.
"""

import heapq
import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from espnet_kv.streaming.hotwords import Hotwords, Matched

NEVER = -math.inf


class Span(NamedTuple):
    """Frames of a token.

    Attributes:
        start: its first frame, counted from the beginning of the search.
        end: the frame after its last one.
        peak: its highest natural-log probability in these frames.
    """

    start: int
    end: int
    peak: float


class CTCHypothesis(NamedTuple):
    """A token sequence.

    Attributes:
        tokens: the tokens.
        score: natural-log probability.
        spans: frames of each token.
        bonus: score of the hotwords in it.
    """

    tokens: list[int]
    score: float
    spans: list[Span]
    bonus: float = 0.0


class CTCSearch(Protocol):
    """Interface of a search over the frames of one segment."""

    def advance(self, log_probs: Tensor) -> None:
        """Process the next frames, (T, V) natural-log probabilities, T >= 0."""

    def nbest(self, count: int) -> list[CTCHypothesis]:
        """The best hypotheses so far, best first; at least 1 and at most `count`."""


def build_search(
    beam_size: int, blank: int = 0, last: int | None = None, hotwords: Hotwords | None = None
) -> CTCSearch:
    """Build a best-path search for beam_size 1, else a prefix beam search.

    Args:
        hotwords: phrases that a prefix beam search prefers; the best path has no use for them.
        last: token of the previous frame if the segment begins within a token; its repetition is
            not a new token.
    """
    if beam_size == 1:
        return GreedySearch(blank, last)
    return PrefixBeamSearch(beam_size, blank, last, hotwords)


class GreedySearch:
    """Most probable alignment: the best token of each frame, without repetitions and blanks."""

    def __init__(self, blank: int = 0, last: int | None = None):
        self._blank = blank
        self._last = blank if last is None else last
        self._frame = 0
        self._best = CTCHypothesis([], 0.0, [])

    def advance(self, log_probs: Tensor) -> None:
        """Process the next frames, (T, V) natural-log probabilities, T >= 0."""
        tokens, score, spans, _ = self._best
        for value, token in zip(*(part.tolist() for part in log_probs.max(dim=-1)), strict=True):
            if token not in (self._blank, self._last):
                tokens.append(token)
                spans.append(Span(self._frame, self._frame + 1, value))
            elif token == self._last != self._blank and spans:  # none: it began before the search
                spans[-1] = _longer(spans[-1], self._frame, value)
            self._last = token
            self._frame += 1
            score += value
        self._best = CTCHypothesis(tokens, score, spans)

    def nbest(self, count: int = 1) -> list[CTCHypothesis]:
        """The only hypothesis, with the score of its best alignment."""
        tokens, score, spans, _ = self._best
        return [CTCHypothesis(list(tokens), score, list(spans))]


def _longer(span: Span, frame: int, log_prob: float) -> Span:
    return Span(span.start, frame + 1, max(span.peak, log_prob))


class _Path(NamedTuple):
    """The last token of an alignment, and the path of the tokens before it."""

    before: "_Path | None"
    span: Span


class _Alignment(NamedTuple):
    """Log-probability of one alignment, and the path of its tokens."""

    score: float
    path: _Path | None


class _Prefix:
    """A token sequence as its last token and a link to the shorter sequence.

    Only longer prefixes and the beam refer to it, so branches that left the beam are freed.
    """

    __slots__ = ("__weakref__", "bonus", "matched", "parent", "token")

    def __init__(self, parent: "_Prefix | None", token: int, matched: Matched, bonus: float):
        self.parent, self.token = parent, token
        # state of the hotwords, and their score so far
        self.matched, self.bonus = matched, bonus

    def tokens(self) -> list[int]:
        tokens, prefix = [], self
        while prefix.parent is not None:
            tokens.append(prefix.token)
            prefix = prefix.parent
        return tokens[::-1]


class PrefixBeamSearch:
    """Prefix beam search (arXiv 1408.2873) without a language model.

    The score of a prefix is the sum over its alignments. With a beam of all prefixes, scores are
    the exact CTC log-probabilities; otherwise alignments of pruned prefixes are missing. The most
    probable alignment of each prefix gives the frames of its tokens.

    Args:
        beam_size: K.
        blank: CTC blank.
        last: token of the previous frame, see `build_search`.
        hotwords: their scores are added when prefixes are compared.
    """

    def __init__(
        self,
        beam_size: int,
        blank: int = 0,
        last: int | None = None,
        hotwords: Hotwords | None = None,
    ):
        self._beam_size, self._blank = beam_size, blank
        self._hotwords = Hotwords(()) if hotwords is None else hotwords
        # (prefix, token) -> the live prefix one token longer; a sequence that returns to the beam
        # is the same object, so that its longer prefixes still refer to it
        self._children: WeakValueDictionary[tuple[_Prefix, int], _Prefix] = WeakValueDictionary()
        root = _Prefix(None, blank if last is None else last, self._hotwords.root, 0.0)
        # prefix -> log-probability of its alignments that end in blank, and of the others
        self._beam = {root: (0.0, NEVER) if last is None else (NEVER, 0.0)}
        # prefix -> the best of its alignments that end in blank, and of the others
        in_blank, in_token = self._beam[root]
        self._aligned = {root: (_Alignment(in_blank, None), _Alignment(in_token, None))}
        self._frame = 0

    def advance(self, log_probs: Tensor) -> None:
        """Process the next frames, (T, V) natural-log probabilities, T >= 0."""
        # The K best continuations of a prefix are among the K + 1 best tokens of the frame: only
        # its last token has another order, because only alignments that end in blank repeat it.
        count = min(self._beam_size + 1, log_probs.size(1) - 1)
        others = log_probs.index_fill(1, torch.tensor(self._blank, device=log_probs.device), NEVER)
        candidates = others.topk(count, dim=1).indices.tolist()
        if self._hotwords.root.children:  # the best may also be tokens that begin a phrase
            begun = self._hotwords.with_first_tokens(others).topk(count, dim=1).indices.tolist()
            candidates = [list({*a, *b}) for a, b in zip(candidates, begun, strict=True)]
        for frame, tokens in zip(log_probs.cpu().numpy(), candidates, strict=True):
            # blank is a candidate if all other tokens are impossible
            self._step(frame, [token for token in tokens if token != self._blank])

    def nbest(self, count: int = 1) -> list[CTCHypothesis]:
        """The best prefixes so far, best first; at least 1 and at most `count`."""
        scored = []
        for prefix, ends in self._beam.items():
            score, bonus = _add(*ends), prefix.bonus - prefix.matched.open
            scored.append((score + bonus, score, bonus, prefix))
        return [
            CTCHypothesis(p.tokens(), score, _spans(_better(*self._aligned[p]).path), bonus)
            for _, score, bonus, p in sorted(scored, key=_score)[:count]
        ]

    def _step(self, frame: Sequence[float], tokens: list[int]) -> None:
        totals = {prefix: _add(*ends) for prefix, ends in self._beam.items()}
        blank = float(frame[self._blank])
        grown: list[tuple[float, _Prefix, int | None, tuple[float, float]]] = []
        for prefix, (_, in_token) in self._beam.items():
            before = in_token  # the token continues
            if prefix.parent in self._beam:  # or begins in this frame
                before = _add(before, self._before(prefix.parent, prefix.token, totals))
            ends = totals[prefix] + blank, before + float(frame[prefix.token])
            grown.append((_add(*ends) + prefix.bonus, prefix, None, ends))
        for prefix in self._beam:
            for token in prefix.matched.tokens.union(tokens) if prefix.matched.tokens else tokens:
                if self._children.get((prefix, token)) in self._beam:
                    continue  # counted above
                score = self._before(prefix, token, totals) + float(frame[token])
                if score > NEVER:
                    _, bonus = self._matched(prefix, token)
                    grown.append((score + bonus, prefix, token, (NEVER, score)))
        best = heapq.nsmallest(self._beam_size, grown, key=_score)
        aligned = [self._align(prefix, token, frame) for _, prefix, token, _ in best]
        self._beam = {self._child(prefix, token): ends for _, prefix, token, ends in best}
        self._aligned = dict(zip(self._beam, aligned, strict=True))
        self._frame += 1

    def _align(
        self, prefix: _Prefix, token: int | None, frame: Sequence[float]
    ) -> tuple[_Alignment, _Alignment]:
        """The best alignments of `prefix`, or of `prefix` and a new token, after this frame."""
        if token is not None:
            begun = self._begun(prefix, token, float(frame[token]))
            return _Alignment(NEVER, begun.path), begun
        best, (score, path) = _better(*self._aligned[prefix]), self._aligned[prefix][1]
        blank = _Alignment(best.score + float(frame[self._blank]), best.path)
        value = float(frame[prefix.token])
        if path is not None:
            path = _Path(path.before, _longer(path.span, self._frame, value))
        held = _Alignment(score + value, path)
        if prefix.parent in self._beam:
            held = _better(held, self._begun(prefix.parent, prefix.token, value))
        return blank, held

    def _begun(self, prefix: _Prefix, token: int, value: float) -> _Alignment:
        """The best alignment of `prefix` with `token` as a new token in this frame."""
        in_blank, in_token = self._aligned[prefix]
        before = in_blank if token == prefix.token else _better(in_blank, in_token)
        span = Span(self._frame, self._frame + 1, value)
        return _Alignment(before.score + value, _Path(before.path, span))

    def _before(self, prefix: _Prefix, token: int, totals: dict[_Prefix, float]) -> float:
        """Log-probability of the alignments of `prefix` that allow `token` as a new token."""
        return self._beam[prefix][0] if token == prefix.token else totals[prefix]

    def _child(self, prefix: _Prefix, token: int | None) -> _Prefix:
        if token is None:
            return prefix
        child = self._children.get((prefix, token))
        if child is None:
            child = _Prefix(prefix, token, *self._matched(prefix, token))
            self._children[prefix, token] = child
        return child

    def _matched(self, prefix: _Prefix, token: int) -> tuple[Matched, float]:
        """State and score of the hotwords after `prefix` and `token`."""
        matched, score = self._hotwords.step(prefix.matched, token)
        return matched, prefix.bonus + score


def _better(a: _Alignment, b: _Alignment) -> _Alignment:
    return a if a.score >= b.score else b


def _spans(path: _Path | None) -> list[Span]:
    spans = []
    while path is not None:
        spans.append(path.span)
        path = path.before
    return spans[::-1]


def _score(entry: tuple) -> float:
    return -entry[0]


def _add(a: float, b: float) -> float:
    """log(exp(a) + exp(b))."""
    low, high = (a, b) if a < b else (b, a)
    return high if low == NEVER else high + math.log1p(math.exp(low - high))
