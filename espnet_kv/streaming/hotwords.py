"""Phrases that the CTC search prefers.

The phrases form an Aho-Corasick automaton over tokens (a trie with links to the longest suffix
that is also in the trie; Aho and Corasick 1975). Its state after a token sequence is the longest
end of the sequence that begins a phrase.
"""

import math
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from espnet2.text.abs_tokenizer import AbsTokenizer
from torch import Tensor

from espnet_kv.errors import ArgumentError, UserError
from espnet_kv.streaming.recordings import read_lines

HIGHEST_SCORE = 100
ALLOWED_SCORES = f"allowed: above 0, at most {HIGHEST_SCORE}"


class Matched:
    """A state of the automaton.

    Attributes:
        children: token -> the state one token longer.
        suffix: state of the longest shorter suffix; the root has itself.
        open: score given for the beginning of a phrase that is not complete.
        complete: score of the phrases that end here.
        tokens: tokens that continue a phrase, without the first tokens of phrases.
    """

    __slots__ = ("children", "complete", "open", "suffix", "tokens")

    def __init__(self) -> None:
        self.children: dict[int, Matched] = {}
        self.suffix = self
        self.open = self.complete = 0.0
        self.tokens: frozenset[int] = frozenset()


class Hotwords:
    """Scores of token sequences for the phrases in them.

    Every token that continues a phrase gives the score of the phrase. If the phrase is not
    completed, the scores of its tokens are taken back. A complete phrase keeps them, and so does a
    phrase within another one. After a phrase that begins no longer one, the automaton starts anew:
    repeated tokens do not complete the same phrase again and again.

    Args:
        phrases: (tokens, score per token, above 0) of each phrase.
    """

    def __init__(self, phrases: Iterable[tuple[Sequence[int], float]]):
        self.root = Matched()
        for tokens, score in phrases:
            state = self.root
            for count, token in enumerate(tokens, start=1):
                state = state.children.setdefault(token, Matched())
                if count < len(tokens):
                    state.open = max(state.open, count * score)
            state.complete += len(tokens) * score
        queue = deque([self.root])
        while queue:  # shorter sequences first, because a state builds on its suffix
            state = queue.popleft()
            for token, child in state.children.items():
                child.suffix = self.root
                if state is not self.root:
                    child.suffix = self._longest(state.suffix, token)
                if child.children:
                    child.open = max(child.open, child.suffix.open)
                child.complete += child.suffix.complete
                child.tokens = child.suffix.tokens.union(child.children)
                queue.append(child)
        first = list(self.root.children)
        self._first = torch.tensor(first, dtype=torch.long)
        self._gains = torch.tensor([self.step(self.root, token)[1] for token in first])

    def step(self, state: Matched, token: int) -> tuple[Matched, float]:
        """The state after another token, and the score that this token gives or takes back."""
        after = self._longest(state, token)
        score = after.open + after.complete - state.open
        return after if after.children else self.root, score

    def _longest(self, state: Matched, token: int) -> Matched:
        """The state of the longest end of `state` and `token` in the trie."""
        while token not in state.children and state is not self.root:
            state = state.suffix
        return state.children.get(token, self.root)

    def with_first_tokens(self, log_probs: Tensor) -> Tensor:
        """(T, V) log-probabilities with the scores of tokens that begin a phrase."""
        gains = self._gains.to(log_probs).expand(len(log_probs), -1)
        return log_probs.index_add(1, self._first.to(log_probs.device), gains)


def read_hotwords(
    file: Path | str, score: float, tokenizer: AbsTokenizer | None, token_list: Sequence[str]
) -> Hotwords:
    """Read phrases, one per line, each optionally with a tab and its score per token.

    Args:
        file: text in UTF-8; lines without text are skipped.
        score: score per token of the other phrases.
        tokenizer, token_list: those of the model.

    Raises:
        UserError: the file is missing or has no phrase, a score is not a number in the allowed
            range, a phrase occurs twice or has a token outside the vocabulary, or the model has
            no tokenizer. Names the file and the line, or the option.
    """
    if not _allowed(score):
        raise ArgumentError("--hotwords_score", f"{score}: {ALLOWED_SCORES}")
    if tokenizer is None:
        raise UserError(f"--hotwords {file}: the model has no tokenizer; give token_type")
    numbers = {token: number for number, token in enumerate(token_list)}
    found: dict[tuple[int, ...], float] = {}
    for place, line in enumerate(read_lines(file), start=1):
        if not line.strip():
            continue
        text, tab, own = line.strip("\r").partition("\t")
        tokens = tokenizer.text2tokens(text.strip()) if text.strip() else []
        if not tokens:
            raise UserError(f"{file}:{place}: expected `phrase` or `phrase<tab>score`")
        for token in tokens:
            if token not in numbers:
                raise UserError(
                    f"{file}:{place}: {text.strip()!r} has the token {token!r}, which is not in "
                    "the vocabulary of the model: write the phrase as in the training text"
                )
        ids = tuple(numbers[token] for token in tokens)
        if ids in found:
            raise UserError(f"{file}:{place}: {text.strip()!r} occurs twice; keep one of the lines")
        found[ids] = _number(own, f"{file}:{place}") if tab else score
    if not found:
        raise UserError(f"{file} has no phrase: write one on each line, or leave out --hotwords")
    return Hotwords(found.items())


def _number(text: str, place: str) -> float:
    try:
        score = float(text)
    except ValueError:
        score = math.nan
    if not _allowed(score):
        raise UserError(f"{place}: score {text.strip()!r}: {ALLOWED_SCORES}")
    return score


def _allowed(score: float) -> bool:
    return 0 < score <= HIGHEST_SCORE
