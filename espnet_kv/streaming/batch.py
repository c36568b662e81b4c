"""Streaming recognition of many streams at once, in one batch of the encoder."""

import logging
from collections.abc import Collection, Hashable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from espnet_kv.errors import UserError
from espnet_kv.streaming.frontend import StreamingFrontend, TooShortError, checked
from espnet_kv.streaming.recognizer import LONGEST_PIECE_SECONDS, StreamingRecognizer
from espnet_kv.streaming.segments import OpenStream
from espnet_kv.streaming.transcript import Result


@dataclass(eq=False)
class _Member:
    """A stream of the batch, and its row in the encoder's state."""

    row: int
    frontend: StreamingFrontend
    search: OpenStream


class StreamingBatch:
    """Recognizes streams of different ages together; each result equals that of the stream alone.

        batch = StreamingBatch(StreamingRecognizer(config, model, chunk_size=16), slots=8)
        ended = batch.accept({"a": piece, "b": piece})        # a new key joins
        ended = batch.accept({"b": piece}, final={"b"})       # a waits, b ends and leaves
        text = batch.partial("a").text                        # so far

    The chunks that the pieces of a call complete are encoded together. The state of the encoder has
    a fixed number of rows (slots). A stream that joins takes a free one, and a row is cleared in
    place when its stream leaves, so nothing is copied or allocated. If all rows are taken, their
    number is doubled.

    Args:
        recognizer: its model and its settings are used. Its own stream is not touched.
        slots: number of rows at the start, 1 or more.

    Raises:
        ValueError: slots is not a positive integer.
    """

    def __init__(self, recognizer: StreamingRecognizer, slots: int = 1):
        self.recognizer = recognizer
        self._engine = recognizer.engine
        self._state = self._engine.init_state(slots)
        self._members: dict[Hashable, _Member] = {}

    @property
    def streams(self) -> list[Hashable]:
        """Keys of the open streams, in the order in which they joined."""
        return list(self._members)

    @property
    def slots(self) -> int:
        """Number of rows."""
        return self._state.batch_size

    @torch.no_grad()
    def accept(
        self,
        pieces: Mapping[Hashable, Tensor | np.ndarray],
        final: Collection[Hashable] = (),
    ) -> dict[Hashable, list[list[Result]]]:
        """Process pieces of some streams and return the segments that ended in them.

        Args:
            pieces: stream -> (N,) samples between -1 and 1 at the model's rate, N >= 0. A key
                without an open stream begins one. The streams that are left out wait.
            final: the streams of `pieces` that end with their piece. They leave the batch.

        Returns:
            For each stream of `pieces` its ended segments, as `StreamingRecognizer.accept`. For a
            stream that ended before its first features there are none, and a warning is logged.

        Raises:
            UserError: the samples of a stream are not finite floating-point numbers.
            KeyError: `final` names a stream without a piece.
            Nothing was processed in either case.
        """
        longest = LONGEST_PIECE_SECONDS * self.recognizer.sample_rate
        parts = {key: self._samples(key, piece).split(longest) for key, piece in pieces.items()}
        last = {key: len(parts[key]) - 1 for key in final}
        ended: dict[Hashable, list[list[Result]]] = {key: [] for key in parts}
        for number in range(max(map(len, parts.values()), default=0)):
            now = {key: split[number] for key, split in parts.items() if number < len(split)}
            for key, results in self._advance(now, {k for k in now if last.get(k) == number}):
                if results[0].token_int:
                    ended[key].append(results)
        return ended

    def partial(self, key: Hashable) -> Result:
        """The best result of the open segment of a stream, without rescoring.

        Raises:
            KeyError: there is no such stream.
        """
        return self.recognizer.decoder.best(self._members[key].search)

    def drop(self, key: Hashable) -> None:
        """Discard a stream; its row is free.

        Raises:
            KeyError: there is no such stream.
        """
        self._state.reset([self._members.pop(key).row])

    def nbytes_by_kind(self) -> dict[str, int]:
        """Bytes held between two calls, as in `StreamingRecognizer`, for all streams."""
        members = self._members.values()
        return self._state.nbytes_by_kind() | {
            "waveform": sum(member.frontend.nbytes for member in members),
            "encoder_out": sum(member.search.nbytes for member in members),
        }

    @property
    def capacity_bytes(self) -> int:
        """Bytes allocated for the encoder's state."""
        return self._state.capacity_bytes

    def _advance(
        self, pieces: Mapping[Hashable, Tensor], final: set[Hashable]
    ) -> list[tuple[Hashable, list[Result]]]:
        """Process short pieces; return the segments that ended, each with its stream."""
        features = self._features(pieces, final)
        if not features:
            return []
        decoder, members = self.recognizer.decoder, [self._members[key] for key in features]
        encoded = self._encode(members, list(features.values()), [key in final for key in features])
        ended = []
        for key, member, (log_probs, frames) in zip(features, members, encoded, strict=True):
            results = decoder.advance(member.search, frames, log_probs)
            if key in final:
                results += decoder.end_segment(member.search)
                self.drop(key)
            ended += [(key, result) for result in results]
        return ended

    def _samples(self, key: Hashable, piece: Tensor | np.ndarray) -> Tensor:
        try:
            return checked(torch.as_tensor(piece).to(self.recognizer.device))
        except UserError as error:
            raise UserError(f"stream {key}: {error}") from error

    def _features(
        self, pieces: Mapping[Hashable, Tensor], final: set[Hashable]
    ) -> dict[Hashable, Tensor]:
        """The new features (T, F) of the streams that have some, or end."""
        features = {}
        for key, piece in pieces.items():
            member = self._members.get(key) or self._join(key)
            try:
                new = member.frontend(piece, key in final)
            except TooShortError as error:
                logging.warning(f"stream {key}: {error}; it has no text")
                self.drop(key)
                continue
            if len(new) or key in final:
                features[key] = new.to(self.recognizer.dtype)
        return features

    def _encode(
        self, members: list[_Member], features: list[Tensor], final: list[bool]
    ) -> list[tuple[Tensor, Tensor]]:
        """Encode features (T, F) of some streams -> log_probs (T', V), encoder_out (T', D) each."""
        rows = [member.row for member in members]
        lengths, ends = [0] * self.slots, [False] * self.slots
        for row, new, last in zip(rows, features, final, strict=True):
            lengths[row], ends[row] = len(new), last
        padded = pad_sequence(features, batch_first=True)
        xs = padded.new_zeros(self.slots, *padded.shape[1:])  # (B, T, F)
        xs[rows] = padded
        encoded, self._state = self._engine.encode_rows(xs, self._state, ends, lengths)
        return [encoded[row] for row in rows]

    def _join(self, key: Hashable) -> _Member:
        taken = {member.row for member in self._members.values()}
        row = next((row for row in range(self.slots) if row not in taken), self.slots)
        if row == self.slots:
            self._state = self._state.join([self._state, self._engine.init_state(self.slots)])
        model = self.recognizer.asr_model
        frontend = StreamingFrontend(model.frontend, self._engine.normalize)
        member = _Member(row, frontend, self.recognizer.decoder.open_stream())
        self._members[key] = member
        return member
