"""Results of streaming recognition: ESPnet's tuple, with times and confidences."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from espnet2.bin.asr_inference_streaming import Hypothesis
from espnet2.text.abs_tokenizer import AbsTokenizer
from espnet2.text.token_id_converter import TokenIDConverter
from espnet2.text.word_tokenizer import WordTokenizer
from espnet2.train.abs_espnet_model import AbsESPnetModel

from espnet_kv.streaming.ctc import CTCHypothesis

SPACE = "<space>"  # ESPnet's token between words of characters
WORD_STARTS = ("▁", "Ġ")  # first character of a word in sentencepiece and byte-level BPE
DIGITS = 3  # of seconds, confidences and scores in JSON


class Timed(NamedTuple):
    """A token or word with its place in the stream.

    Attributes:
        text: the token, or the text of the word.
        start: seconds from the beginning of the stream to its first encoder frame.
        end: seconds from the beginning of the stream to the end of its last encoder frame.
        confidence: 0 to 1. Token: its highest CTC posterior in its frames. Word: the lowest
            confidence of its tokens.
    """

    text: str
    start: float
    end: float
    confidence: float


class _Fields(NamedTuple):
    text: str | None
    token: list[str]
    token_int: list[int]
    hypothesis: Hypothesis


class Result(_Fields):
    """(text, token, token_int, hypothesis), as returned by ESPnet's Speech2Text, with times.

    Frames of a token are those of the most probable CTC alignment. CTC writes a token in few
    frames, so that the gap to the next token may belong to either of them.

    Attributes:
        start, end: seconds from the beginning of the stream to the beginning and the end of the
            segment; with several segments, of the first and of the last one.
        tokens: the tokens, timed.
        words: the words, timed. Empty if the model has no tokenizer.
    """

    start: float
    end: float
    tokens: Sequence[Timed]
    words: Sequence[Timed]

    def __new__(
        cls,
        text: str | None,
        token: list[str],
        token_int: list[int],
        hypothesis: Hypothesis,
        *,
        bounds: tuple[float, float] = (0.0, 0.0),
        tokens: Sequence[Timed] = (),
        words: Sequence[Timed] = (),
    ):
        self = super().__new__(cls, text, token, token_int, hypothesis)
        self.start, self.end = bounds
        self.tokens, self.words = tokens, words
        return self

    def as_dict(self) -> dict[str, Any]:
        """Text, score, times and confidences as plain values, for JSON."""
        return {
            "start": round(self.start, DIGITS),
            "end": round(self.end, DIGITS),
            "text": self.text,
            "score": round(float(self.hypothesis.score), DIGITS),
            "words": [_entry("word", *word) for word in self.words],
            "tokens": [_entry("token", *token) for token in self.tokens],
        }


def words_of(tokens: Sequence[Timed], tokenizer: AbsTokenizer | None) -> list[Timed]:
    """Group tokens into words, by the space between characters or the first character of pieces.

    Args:
        tokenizer: that of the model; without one there are no words.
    """
    if tokenizer is None:
        return []
    groups: list[list[Timed]] = [[]]
    for token in tokens:
        if token.text == SPACE:
            groups.append([])
        elif token.text.startswith(WORD_STARTS) or isinstance(tokenizer, WordTokenizer):
            groups.append([token])
        else:
            groups[-1].append(token)
    words = []
    for group in filter(None, groups):
        text = tokenizer.tokens2text([token.text for token in group]).strip()
        confidence = min(token.confidence for token in group)
        words.append(Timed(text, group[0].start, group[-1].end, confidence))
    return [word for word in words if word.text]


class ResultBuilder:
    """Builds the results of a model.

    Args:
        model: its token list, and its tokens for the ends of a sentence, are used.
        tokenizer: None: results have no text and no words.
        frame_seconds: duration of an encoder frame.
    """

    def __init__(self, model: AbsESPnetModel, tokenizer: AbsTokenizer | None, frame_seconds: float):
        self._converter = TokenIDConverter(token_list=model.token_list)
        self._ends = model.sos, model.eos
        self._tokenizer, self._frame_seconds = tokenizer, frame_seconds

    def of_segment(
        self,
        hypothesis: CTCHypothesis,
        score: float,
        scores: dict[str, float],
        frames: tuple[int, int],
    ) -> Result:
        """The result of a hypothesis.

        Args:
            score, scores: of the hypothesis in all, and by scorer.
            frames: first frame of the segment in the stream, and the frame after its last one.
        """
        first, end = frames
        names = self._converter.ids2tokens(hypothesis.tokens)
        tokens = [
            Timed(
                name,
                (first + span.start) * self._frame_seconds,
                (first + span.end) * self._frame_seconds,
                min(1.0, math.exp(span.peak)),  # rounding errors can exceed 1
            )
            for name, span in zip(names, hypothesis.spans, strict=True)
        ]
        bounds = first * self._frame_seconds, end * self._frame_seconds
        return self.build(hypothesis.tokens, tokens, score, scores, bounds)

    def build(
        self,
        token_int: list[int],
        tokens: list[Timed],
        score: float,
        scores: dict[str, float],
        bounds: tuple[float, float],
    ) -> Result:
        """The result of a token sequence; bounds: start and end in seconds."""
        token = [timed.text for timed in tokens]
        text = None if self._tokenizer is None else self._tokenizer.tokens2text(token)
        sos, eos = self._ends
        hypothesis = Hypothesis(
            yseq=torch.tensor([sos, *token_int, eos]), score=score, scores=scores
        )
        words = words_of(tokens, self._tokenizer)
        return Result(text, token, token_int, hypothesis, bounds=bounds, tokens=tokens, words=words)

    def join(self, results: Sequence[Result]) -> Result:
        """Join the results of consecutive segments, one or more, into one."""
        if len(results) == 1:
            return results[0]
        scores: dict[str, float] = {}
        for result in results:
            for name, score in result.hypothesis.scores.items():
                scores[name] = scores.get(name, 0.0) + score
        return self.build(
            [token for result in results for token in result.token_int],
            [token for result in results for token in result.tokens],
            sum(result.hypothesis.score for result in results),
            scores,
            (results[0].start, results[-1].end),
        )


def _entry(kind: str, text: str, start: float, end: float, confidence: float) -> dict[str, Any]:
    return {
        kind: text,
        "start": round(start, DIGITS),
        "end": round(end, DIGITS),
        "confidence": round(confidence, DIGITS),
    }
