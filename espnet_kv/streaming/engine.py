"""What encodes streams for the recognizer: the interface, and the model itself in PyTorch.

Shape letters: T features, F feature size, T' encoder frames, D model size, V vocabulary.
"""

import logging
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from espnet_kv.cache.stream import EncoderState
from espnet_kv.errors import ArgumentError, UserError
from espnet_kv.packed import pack_weights

# limit for a cache that is allocated at the start: some hours of audio
MOST_FRAMES = 1_000_000


class StreamState(Protocol):
    """Caches and features of B streams, one per row, between two pieces."""

    @property
    def batch_size(self) -> int:
        """B."""

    @staticmethod
    def join(parts: Sequence[Any], /) -> Any:
        """One state of the rows of all parts, in this order; the parts are not used again."""

    def reset(self, rows: Iterable[int], /) -> None:
        """Replace the streams of these rows by new ones, in place."""

    def nbytes_by_kind(self) -> dict[str, int]:
        """Bytes held: attention, conv, input."""

    def capacity_by_kind(self) -> dict[str, int]:
        """Bytes allocated: attention, conv, input and, for an engine with such tables, position."""

    @property
    def capacity_bytes(self) -> int:
        """Their sum."""


class Engine[S: StreamState](Protocol):
    """Encoder and CTC of a model, for streams with the same settings.

    Attributes:
        chunk_size: encoder frames in a chunk.
        left_chunks: chunks of left context; -1: all.
        cache_dtype: number format of the caches; None: the model's type.
        normalize: what normalises the features before `encode`; None: nothing has to.
    """

    chunk_size: int
    left_chunks: int
    cache_dtype: str | None
    normalize: nn.Module | None

    def init_state(self, streams: int = 1) -> S:
        """The state of new streams.

        Raises:
            ValueError: `streams` is not a positive integer.
        """

    def encode_rows(
        self, features: Tensor, state: S, is_final: Sequence[bool], lengths: Sequence[int]
    ) -> tuple[list[tuple[Tensor, Tensor]], S]:
        """Encode the chunks that these features complete, for streams of any age.

        Args:
            features: (B, T, F), T >= 0.
            state: of the streams; it may be changed in place.
            is_final: for each row: the stream ends with these features, and its last chunk may be
                short.
            lengths: valid features of each row; 0: it waits.

        Returns:
            For each row log_probs (T', V), natural logarithms in float32 on the CPU, and
            encoder_out (T', D); the state for the next call.
        """

    def encode(self, features: Tensor, state: S, is_final: bool) -> tuple[Tensor, Tensor, S]:
        """`encode_rows` of one stream with the features (T, F)."""
        (row,), state = self.encode_rows(features[None], state, [is_final], [len(features)])
        return *row, state


class EngineBuilder(Protocol):
    """Makes the engine of a model; a class such as TorchEngine."""

    def __call__(
        self,
        model: Any,
        chunk_size: int | None = None,
        left_chunks: int | None = None,
        cache_dtype: str | None = None,
    ) -> Engine:
        """The engine.

        Args:
            model: ESPnetASRModel in eval mode, on its device and in its type.
            chunk_size, left_chunks, cache_dtype: see StreamingRecognizer; None: the engine's own.
        """


class TorchEngine(Engine[EncoderState]):
    """Encoder and CTC of the model, run by PyTorch.

    Args:
        model: see EngineBuilder; the weights of its encoder and CTC are packed in place.
        chunk_size, left_chunks, cache_dtype: see EngineBuilder.

    Raises:
        UserError: a value is not allowed, or the encoder cannot stream.
    """

    def __init__(
        self,
        model: Any,
        chunk_size: int | None = None,
        left_chunks: int | None = None,
        cache_dtype: str | None = None,
    ):
        self._encoder, self._ctc, self.normalize = model.encoder, model.ctc, model.normalize
        self.chunk_size, self.left_chunks = _chunks(model.encoder, chunk_size, left_chunks)
        self.cache_dtype = cache_dtype
        pack_weights(model.encoder)
        pack_weights(model.ctc)

    def init_state(self, streams: int = 1) -> EncoderState:
        """See Engine."""
        return self._encoder.init_state(
            streams,
            chunk_size=self.chunk_size,
            left_chunks=self.left_chunks,
            cache_dtype=self.cache_dtype,
        )

    def encode_rows(
        self,
        features: Tensor,
        state: EncoderState,
        is_final: Sequence[bool],
        lengths: Sequence[int],
    ) -> tuple[list[tuple[Tensor, Tensor]], EncoderState]:
        """See Engine."""
        ys, state = self._encoder.forward_chunk(features, state, is_final, lengths)
        rows = [frames[:count] for frames, count in zip(ys, state.emitted, strict=True)]
        # one call for all streams
        log_probs = self._ctc.log_softmax(torch.cat(rows)[None])[0].float().cpu()
        parts = log_probs.split([len(frames) for frames in rows])
        return list(zip(parts, rows, strict=True)), state


def _chunks(encoder: Any, chunk_size: int | None, left_chunks: int | None) -> tuple[int, int]:
    """Check and return chunk_size and left_chunks of the streams."""
    if chunk_size is None and encoder.chunk_size == 0:
        raise UserError(
            "the model has no chunk size of its own (chunk_size: 0): give chunk_size, "
            "e.g. chunk_size 16"
        )
    if chunk_size is not None and (type(chunk_size) is not int or chunk_size < 1):
        raise ArgumentError("chunk_size", f"{chunk_size}: allowed: 1 or more encoder frames")
    if left_chunks is not None and (type(left_chunks) is not int or left_chunks < -1):
        raise ArgumentError("left_chunks", f"{left_chunks}: allowed: -1 (all) or more chunks")
    size, left = chunk_size or encoder.chunk_size, left_chunks
    left = encoder.left_chunks if left is None else left
    if size * (max(left, 0) + 1) > MOST_FRAMES:
        name, value = ("chunk_size", size) if left_chunks is None else ("left_chunks", left)
        raise ArgumentError(
            name,
            f"{value}: at most {MOST_FRAMES} encoder frames are held; give smaller numbers or "
            "left_chunks -1 for all",
        )
    if encoder.chunk_size == 0 and not encoder.dynamic_chunk_training:
        logging.warning("the model was trained on whole utterances only, without chunks")
    return size, left
