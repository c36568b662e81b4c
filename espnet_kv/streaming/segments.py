"""Search of the segments of a stream: CTC, endpoints, rescoring by the attention decoder."""

from dataclasses import dataclass, field

import torch
from espnet2.train.abs_espnet_model import AbsESPnetModel
from torch import Tensor

from espnet_kv.streaming.ctc import CTCHypothesis, CTCSearch, build_search
from espnet_kv.streaming.endpoint import Endpointer
from espnet_kv.streaming.hotwords import Hotwords
from espnet_kv.streaming.transcript import Result, ResultBuilder


@dataclass(eq=False)
class OpenStream:
    """What the search holds of a stream.

    Attributes:
        endpointer: finds the ends of segments.
        search: the search of the open segment.
        encoder_out: (T, D) each, encoder output of the open segment, for rescoring.
        first: first frame of the open segment in the stream.
        frames: frames of the stream so far.
    """

    endpointer: Endpointer
    search: CTCSearch
    encoder_out: list[Tensor] = field(default_factory=list)
    first: int = 0
    frames: int = 0

    def begin_segment(self, search: CTCSearch) -> None:
        """Begin a segment with a new search at the next frame."""
        self.search, self.encoder_out, self.first = search, [], self.frames
        self.endpointer.reset()

    @property
    def nbytes(self) -> int:
        """Bytes of the encoder output held."""
        return sum(frames.untyped_storage().nbytes() for frames in self.encoder_out)


class SegmentDecoder:
    """Turns encoder frames of streams into results; the streams share one decoder.

    Args:
        model: its CTC and its attention decoder are used.
        results: builds the results.
        beam_size, ctc_weight, penalty, nbest: see `StreamingRecognizer`.
        silence_frames, max_frames: see `Endpointer`.
        hotwords: phrases that the search prefers.
    """

    def __init__(
        self,
        model: AbsESPnetModel,
        results: ResultBuilder,
        *,
        beam_size: int,
        ctc_weight: float,
        penalty: float,
        nbest: int,
        silence_frames: int,
        max_frames: int,
        hotwords: Hotwords | None = None,
    ):
        self.results = results
        self._model = model
        self._beam_size, self._penalty, self._nbest = beam_size, penalty, nbest
        self.ctc_weight = 1.0 if model.decoder is None else ctc_weight
        self._bounds = silence_frames, max_frames
        self._hotwords = hotwords

    def open_stream(self) -> OpenStream:
        """The search of a new stream, for `advance` and `end_segment`."""
        endpointer = Endpointer(self._model.blank_id, *self._bounds)
        return OpenStream(endpointer, self._new_search())

    def advance(self, stream: OpenStream, encoded: Tensor, log_probs: Tensor) -> list[list[Result]]:
        """Search the next frames of a stream; return the results of segments that ended in them.

        Args:
            encoded: (T', D) encoder frames, T' >= 0.
            log_probs: (T', V), natural logarithms on the CPU.
        """
        ended = []
        best = log_probs.argmax(dim=-1).tolist()
        for piece, ends in stream.endpointer.pieces(best):
            stream.search.advance(log_probs[piece])
            stream.frames += piece.stop - piece.start
            if self.ctc_weight < 1:
                stream.encoder_out.append(encoded[piece].clone())
            if ends:
                ended += self.end_segment(stream)
                last = best[piece.stop - 1]
                stream.begin_segment(
                    self._new_search(None if last == self._model.blank_id else last)
                )
        return ended

    def end_segment(self, stream: OpenStream) -> list[list[Result]]:
        """The n-best results of the open segment in a list; the list is empty for a pause."""
        hypotheses = stream.search.nbest(self._beam_size)
        if not hypotheses[0].tokens and stream.endpointer.active:
            return []
        decoder = self._attention_scores(hypotheses, stream.encoder_out)
        results = []
        for hypothesis, attention in zip(hypotheses, decoder, strict=True):
            tokens, ctc, _, bonus = hypothesis
            scores = {"ctc": ctc, "length_bonus": float(len(tokens))}
            score = self.ctc_weight * ctc + self._penalty * len(tokens) + bonus
            if self._hotwords is not None:
                scores["hotwords"] = bonus
            if self.ctc_weight < 1:
                scores["decoder"] = attention
                score += (1 - self.ctc_weight) * attention
            results.append((score, hypothesis, scores))
        results.sort(key=lambda result: -result[0])
        return [[self._result(stream, h, score, s) for score, h, s in results[: self._nbest]]]

    def best(self, stream: OpenStream) -> Result:
        """The best result of the open segment of a stream, without rescoring."""
        (best,) = stream.search.nbest(1)
        return self._result(stream, best, best.score + best.bonus, {"ctc": best.score})

    def _new_search(self, last: int | None = None) -> CTCSearch:
        """last: token of the previous frame if the segment begins within a token."""
        return build_search(self._beam_size, self._model.blank_id, last, self._hotwords)

    def _attention_scores(
        self, hypotheses: list[CTCHypothesis], encoder_out: list[Tensor]
    ) -> list[float]:
        """Log-probability of each hypothesis and <eos> in the attention decoder."""
        if not encoder_out:
            return [0.0] * len(hypotheses)
        count = len(hypotheses)
        encoded = torch.cat(encoder_out)[None].expand(count, -1, -1)
        tokens = [
            torch.tensor(h.tokens, dtype=torch.long, device=encoded.device) for h in hypotheses
        ]
        nll = self._model.batchify_nll(
            encoded,
            torch.full((count,), encoded.size(1), device=encoded.device),
            torch.nn.utils.rnn.pad_sequence(tokens, True, self._model.ignore_id),
            torch.tensor([len(t) for t in tokens], device=encoded.device),
        )
        return (-nll).tolist()

    def _result(
        self,
        stream: OpenStream,
        hypothesis: CTCHypothesis,
        score: float,
        scores: dict[str, float],
    ) -> Result:
        """The result of the open segment for one of its hypotheses."""
        return self.results.of_segment(hypothesis, score, scores, (stream.first, stream.frames))
