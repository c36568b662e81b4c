"""Incremental CTC search: best path and prefix beam search.

Both take log-probabilities in pieces of any size. The result does not depend on how the frames
are split, and the time per frame does not grow with the stream.

Shape letters: T frames, V vocabulary, K prefixes in the beam.
"""

import heapq
import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor

NEVER = -math.inf


class CTCHypothesis(NamedTuple):
    """A token sequence and its natural-log probability."""

    tokens: list[int]
    score: float


class CTCSearch(Protocol):
    """Interface of a search over the frames of one segment."""

    def advance(self, log_probs: Tensor) -> None:
        """Process the next frames, (T, V) natural-log probabilities, T >= 0."""

    def nbest(self, count: int) -> list[CTCHypothesis]:
        """The best hypotheses so far, best first; at least 1 and at most `count`."""


def build_search(beam_size: int, blank: int = 0, last: int | None = None) -> CTCSearch:
    """Build a best-path search for beam_size 1, else a prefix beam search.

    Args:
        last: token of the previous frame if the segment begins within a token; its repetition is
            not a new token.
    """
    if beam_size == 1:
        return GreedySearch(blank, last)
    return PrefixBeamSearch(beam_size, blank, last)


class GreedySearch:
    """Most probable alignment: the best token of each frame, without repetitions and blanks."""

    def __init__(self, blank: int = 0, last: int | None = None):
        self._blank = blank
        self._last = blank if last is None else last
        self._best = CTCHypothesis([], 0.0)

    def advance(self, log_probs: Tensor) -> None:
        """Process the next frames, (T, V) natural-log probabilities, T >= 0."""
        tokens, score = self._best
        for value, token in zip(*(part.tolist() for part in log_probs.max(dim=-1)), strict=True):
            if token not in (self._blank, self._last):
                tokens.append(token)
            self._last = token
            score += value
        self._best = CTCHypothesis(tokens, score)

    def nbest(self, count: int = 1) -> list[CTCHypothesis]:
        """The only hypothesis, with the score of its best alignment."""
        return [CTCHypothesis(list(self._best.tokens), self._best.score)]


class _Prefix:
    """A token sequence as its last token and a link to the shorter sequence.

    Only longer prefixes and the beam refer to it, so branches that left the beam are freed.
    """

    __slots__ = ("__weakref__", "parent", "token")

    def __init__(self, parent: "_Prefix | None", token: int):
        self.parent, self.token = parent, token

    def tokens(self) -> list[int]:
        tokens, prefix = [], self
        while prefix.parent is not None:
            tokens.append(prefix.token)
            prefix = prefix.parent
        return tokens[::-1]


class PrefixBeamSearch:
    """Prefix beam search (arXiv 1408.2873) without a language model.

    The score of a prefix is the sum over its alignments. With a beam of all prefixes, scores are
    the exact CTC log-probabilities; otherwise alignments of pruned prefixes are missing.

    Args:
        beam_size: K.
        blank: CTC blank.
        last: token of the previous frame, see `build_search`.
    """

    def __init__(self, beam_size: int, blank: int = 0, last: int | None = None):
        self._beam_size, self._blank = beam_size, blank
        # (prefix, token) -> the live prefix one token longer; a sequence that returns to the beam
        # is the same object, so that its longer prefixes still refer to it
        self._children: WeakValueDictionary[tuple[_Prefix, int], _Prefix] = WeakValueDictionary()
        root = _Prefix(None, blank if last is None else last)
        # prefix -> log-probability of its alignments that end in blank, and of the others
        self._beam = {root: (0.0, NEVER) if last is None else (NEVER, 0.0)}

    def advance(self, log_probs: Tensor) -> None:
        """Process the next frames, (T, V) natural-log probabilities, T >= 0."""
        # The K best continuations of a prefix are among the K + 1 best tokens of the frame: only
        # its last token has another order, because only alignments that end in blank repeat it.
        count = min(self._beam_size + 1, log_probs.size(1) - 1)
        others = log_probs.index_fill(1, torch.tensor(self._blank, device=log_probs.device), NEVER)
        candidates = others.topk(count, dim=1).indices.tolist()
        for frame, tokens in zip(log_probs.cpu().numpy(), candidates, strict=True):
            # blank is a candidate if all other tokens are impossible
            self._step(frame, [token for token in tokens if token != self._blank])

    def nbest(self, count: int = 1) -> list[CTCHypothesis]:
        """The best prefixes so far, best first; at least 1 and at most `count`."""
        scored = sorted(((_add(*ends), prefix) for prefix, ends in self._beam.items()), key=_score)
        return [CTCHypothesis(prefix.tokens(), score) for score, prefix in scored[:count]]

    def _step(self, frame: Sequence[float], tokens: list[int]) -> None:
        totals = {prefix: _add(*ends) for prefix, ends in self._beam.items()}
        blank = float(frame[self._blank])
        grown: list[tuple[float, _Prefix, int | None, tuple[float, float]]] = []
        for prefix, (_, in_token) in self._beam.items():
            before = in_token  # the token continues
            if prefix.parent in self._beam:  # or begins in this frame
                before = _add(before, self._before(prefix.parent, prefix.token, totals))
            ends = totals[prefix] + blank, before + float(frame[prefix.token])
            grown.append((_add(*ends), prefix, None, ends))
        for prefix in self._beam:
            for token in tokens:
                if self._children.get((prefix, token)) in self._beam:
                    continue  # counted above
                score = self._before(prefix, token, totals) + float(frame[token])
                if score > NEVER:
                    grown.append((score, prefix, token, (NEVER, score)))
        best = heapq.nsmallest(self._beam_size, grown, key=_score)
        self._beam = {self._child(prefix, token): ends for _, prefix, token, ends in best}

    def _before(self, prefix: _Prefix, token: int, totals: dict[_Prefix, float]) -> float:
        """Log-probability of the alignments of `prefix` that allow `token` as a new token."""
        return self._beam[prefix][0] if token == prefix.token else totals[prefix]

    def _child(self, prefix: _Prefix, token: int | None) -> _Prefix:
        if token is None:
            return prefix
        child = self._children.get((prefix, token))
        if child is None:
            child = self._children[prefix, token] = _Prefix(prefix, token)
        return child


def _score(entry: tuple) -> float:
    return -entry[0]


def _add(a: float, b: float) -> float:
    """log(exp(a) + exp(b))."""
    low, high = (a, b) if a < b else (b, a)
    return high if low == NEVER else high + math.log1p(math.exp(low - high))
