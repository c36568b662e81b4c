"""A chunk of streaming as a function of tensors, whose caches are arguments and results.

Shape letters: B streams, C chunk_size, L frames of left context, F feature size, D model size,
V vocabulary.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from espnet_kv.attention import attention_label
from espnet_kv.cache.state import FrameState, State, StateSpec
from espnet_kv.cache.step import CacheStep
from espnet_kv.errors import ArgumentError


class GraphStep(CacheStep):
    """One chunk of B streams, with the cached frames in the order of time.

    Stored tensors are not changed; `updated` returns the tensors that replace them. All L + C
    frames are read, whatever the age of a stream, and frames that do not exist are hidden. So no
    shape depends on the data, and streams of all ages share a batch.

    Args:
        states: states of the modules, which hold the caches of the streams.
        tables: see CacheStep; empty: absolute positions.
        frames: (B,) frames of each stream before the chunk.
        lengths: (B,) frames of each stream in the chunk, at most C.
        chunk_size: C.
        left: L.
    """

    def __init__(
        self,
        states: Sequence[State],
        tables: Sequence[Tensor | None],
        frames: Tensor,
        lengths: Tensor,
        chunk_size: int,
        left: int,
    ):
        self.states, self.tables = states, tables
        self.read = left + chunk_size
        self.window = slice(0, left + 2 * chunk_size - 1)
        key, new = torch.arange(self.read)[None], torch.arange(chunk_size)[None]
        held = frames.clamp(max=left)[:, None]
        visible = (key >= left - held) & (key < left + lengths[:, None])  # (B, S)
        self.visible = visible[:, None, None]
        lowest = torch.finfo(torch.float32).min
        self._added = torch.zeros(1).masked_fill(~self.visible, lowest)  # (B, 1, 1, S)
        self.valid = (new < lengths[:, None])[:, None, :, None]
        if not tables:
            self.positions = frames[:, None] + new  # (B, C)
        self._updated: dict[int, Tensor] = {}

    def hide(self, bias: Tensor) -> Tensor:
        return bias + self._added  # takes half the time of ONNX's Where

    def updated(self) -> list[Tensor]:
        """The caches after the chunk, in the order of the states and their tensors."""
        return [self._updated[id(tensor)] for state in self.states for tensor in state.tensors]

    def put(self, stored: Tensor, new: Tensor) -> None:
        self._updated[id(stored)] = torch.cat([stored, new], dim=2)

    def get(self, stored: Tensor) -> Tensor:
        longer = self._updated[id(stored)]
        self._updated[id(stored)] = longer[:, :, longer.size(2) - stored.size(2) :]
        return longer

    def rows_of(self, stored: Tensor) -> Tensor:
        return stored

    def put_rows(self, stored: Tensor, new: Tensor) -> None:
        self._updated[id(stored)] = new


class StreamingGraph(nn.Module):
    """Normalisation, encoder and CTC for one chunk of B streams.

    Args:
        model: ESPnetASRModel with an encoder that streams, in eval mode on the CPU.
        chunk_size: C; None: the encoder's setting.
        left_chunks: chunks of left context; None: the encoder's setting.
        cache_dtype: see `StreamingEncoder.init_state`.

    Attributes:
        window: features of a chunk, of which the last `window - shift` are the first of the next.
        shift: new features of a chunk.

    Raises:
        ConfigError (a ValueError): the encoder cannot stream, or a value is not allowed.
        ArgumentError: left_chunks is -1 (all).
    """

    def __init__(
        self,
        model: Any,
        chunk_size: int | None = None,
        left_chunks: int | None = None,
        cache_dtype: str | None = None,
    ):
        super().__init__()
        encoder = model.encoder
        stream = encoder.init_state(
            chunk_size=chunk_size, left_chunks=left_chunks, cache_dtype=cache_dtype
        )
        self.chunk_size, self.left_chunks = stream.chunk_size, stream.left_chunks
        self.cache_dtype = cache_dtype
        if self.left_chunks < 0:
            raise ArgumentError(
                "left_chunks",
                "-1: a cache of all frames grows with the stream, and a graph has caches of one "
                "size; give a number of chunks, e.g. 4",
            )
        self.left = self.left_chunks * self.chunk_size
        self.encoder, self.ctc, self.normalize = encoder, model.ctc, model.normalize
        self.shift, self.window = encoder.chunk_features(self.chunk_size)
        self.features = encoder.input_size
        spec = StateSpec(1, self.left, cache_dtype, stream.dtype, torch.device("cpu"))
        self.states = encoder.module_states(spec)
        self.attention = attention_label(encoder)
        with torch.no_grad():
            self.tables = encoder.position_tables(self.left + self.chunk_size, self.chunk_size)

    def caches(self, batch_size: int = 1) -> list[Tensor]:
        """The caches of new streams, each (B, ...)."""
        new = [state.resized(batch_size, self.left) for state in self.states]
        return [tensor for state in new for tensor in state.tensors]

    def cache_names(self) -> list[str]:
        """A name for each of `caches`: kind and module, e.g. attention_0_1 (second of module 0)."""
        return [
            f"{state.kind}_{module}_{index}"
            for module, state in enumerate(self.states)
            for index in range(len(state.tensors))
        ]

    def kinds(self) -> list[str]:
        """What each of `caches` belongs to: attention or conv."""
        return [state.kind for state in self.states for _ in state.tensors]

    def per_frame(self) -> list[bool]:
        """Whether each of `caches` holds L frames in its third dimension."""
        return [isinstance(state, FrameState) for state in self.states for _ in state.tensors]

    def forward(
        self, features: Tensor, frames: Tensor, lengths: Tensor, *caches: Tensor
    ) -> tuple[Tensor, ...]:
        """Encode one chunk.

        Args:
            features: (B, window, F), before normalisation. Features after the end are ignored.
            frames: (B,) int64, encoder frames of each stream before this chunk.
            lengths: (B,) int64, encoder frames in this chunk; less than C in the last chunk only.
            caches: as returned by the previous chunk, or `caches` of new streams.

        Returns:
            log_probs (B, C, V), natural logarithms, and encoder_out (B, C, D), the first `lengths`
            frames of them valid; then the caches after the chunk.
        """
        remaining, states = iter(caches), []
        for state in self.states:
            states.append(copy.copy(state))
            states[-1].tensors = [next(remaining) for _ in state.tensors]
        step = GraphStep(states, self.tables, frames, lengths, self.chunk_size, self.left)
        size = 0 * frames + features.size(1)  # depends on frames, which is an input of all graphs
        if self.normalize is not None:
            features, _ = self.normalize(features, size)
        encoded = self.encoder.run_step(features, size, step)
        return (self.ctc.log_softmax(encoded), encoded, *step.updated())
