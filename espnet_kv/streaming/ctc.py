"""CTC search over frames as they come: the best path, and prefix beam search.

Both take log-probabilities in pieces of any size; the result does not depend on how the frames
are split, and a frame costs the same however long the stream already is.

Shape letters: T frames, V tokens of the vocabulary, K prefixes in the beam.
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
    """What a search over the frames of one segment offers."""

    def advance(self, log_probs: Tensor) -> None:
        """Take the next frames, (T, V) natural-log probabilities, T >= 0."""

    def nbest(self, count: int) -> list[CTCHypothesis]:
        """The `count` best hypotheses so far, best first; at least one, maybe fewer than asked."""


def build_search(beam_size: int, blank: int = 0, last: int | None = None) -> CTCSearch:
    """The best path where beam_size is 1, else a prefix beam search of that many prefixes.

    Args:
        last: token of the frame before the first, where the segment begins within a token: its
            repetition is no new token.
    """
    if beam_size == 1:
        return GreedySearch(blank, last)
    return PrefixBeamSearch(beam_size, blank, last)


class GreedySearch:
    """The most probable alignment: best token of every frame, repetitions and blanks removed."""

    def __init__(self, blank: int = 0, last: int | None = None):
        self._blank = blank
        self._last = blank if last is None else last
        self._best = CTCHypothesis([], 0.0)

    def advance(self, log_probs: Tensor) -> None:
        """Take the next frames, (T, V) natural-log probabilities, T >= 0."""
        tokens, score = self._best
        for value, token in zip(*(part.tolist() for part in log_probs.max(dim=-1)), strict=True):
            if token not in (self._blank, self._last):
                tokens.append(token)
            self._last = token
            score += value
        self._best = CTCHypothesis(tokens, score)

    def nbest(self, count: int = 1) -> list[CTCHypothesis]:
        """The one hypothesis; its score is the alignment's, not the sum over alignments."""
        return [CTCHypothesis(list(self._best.tokens), self._best.score)]


class _Prefix:
    """A token sequence as its last token and a link to the sequence before it.

    Only longer prefixes and the beam hold it, so a branch that left the beam frees itself.
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
    """Keeps the `beam_size` most probable prefixes, each summed over its alignments.

    Prefix beam search of arXiv 1408.2873, without a language model. The only pruning is the beam:
    with room for all prefixes the scores are the exact CTC log-probabilities, else they lack
    the alignments whose prefixes fell out.

    Args:
        beam_size: K.
        blank: token that separates repetitions.
        last: token of the frame before the first, see `build_search`.
    """

    def __init__(self, beam_size: int, blank: int = 0, last: int | None = None):
        self._beam_size, self._blank = beam_size, blank
        # (prefix, token) -> the prefix one token longer, while somebody holds it: a sequence
        # that leaves the beam and comes back is the same object to those that grew out of it
        self._children: WeakValueDictionary[tuple[_Prefix, int], _Prefix] = WeakValueDictionary()
        root = _Prefix(None, blank if last is None else last)
        # prefix -> log-probability of its alignments that end in blank, and of the others
        self._beam = {root: (0.0, NEVER) if last is None else (NEVER, 0.0)}

    def advance(self, log_probs: Tensor) -> None:
        """Take the next frames, (T, V) natural-log probabilities, T >= 0."""
        # Of the continuations of one prefix, K + 1 tokens hold the K best: all but its own last
        # token, which only alignments that end in blank may repeat, are ordered by the frame.
        count = min(self._beam_size + 1, log_probs.size(1) - 1)
        others = log_probs.index_fill(1, torch.tensor(self._blank, device=log_probs.device), NEVER)
        candidates = others.topk(count, dim=1).indices.tolist()
        for frame, tokens in zip(log_probs.cpu().numpy(), candidates, strict=True):
            # blank is among them where all other tokens are impossible
            self._step(frame, [token for token in tokens if token != self._blank])

    def nbest(self, count: int = 1) -> list[CTCHypothesis]:
        """The `count` best prefixes so far, best first; at least one, maybe fewer than asked."""
        scored = sorted(((_add(*ends), prefix) for prefix, ends in self._beam.items()), key=_score)
        return [CTCHypothesis(prefix.tokens(), score) for score, prefix in scored[:count]]

    def _step(self, frame: Sequence[float], tokens: list[int]) -> None:
        totals = {prefix: _add(*ends) for prefix, ends in self._beam.items()}
        blank = float(frame[self._blank])
        grown: list[tuple[float, _Prefix, int | None, tuple[float, float]]] = []
        for prefix, (_, in_token) in self._beam.items():
            before = in_token  # the token goes on
            if prefix.parent in self._beam:  # or begins here, after the prefix before it
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
        """Log-probability of the alignments of `prefix` after which `token` is a new token."""
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
