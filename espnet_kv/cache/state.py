"""State of one module for a batch of streams between two chunks.

Streams share only the storage: they may have different lengths, and join or leave the batch at
any chunk. Row b of each tensor belongs to the stream in place b.

Shape letters: P places, R streams of a step, Q frames of a chunk, N slots, S slots in use,
G key/value heads, H heads, f size of a feature map, K frames of left context of a convolution.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from espnet_kv.cache.codec import build_codec
from espnet_kv.cache.step import CacheStep

KINDS = ("attention", "conv", "input")


@dataclass(frozen=True)
class StateSpec:
    """Settings common to all states of an encoder or decoder.

    Attributes:
        batch_size: P, places for streams.
        slots: N, capacity of a ring in frames.
        cache_dtype: see `espnet_kv.cache.codec`.
        dtype: type of the model.
        device: device of the storage.
    """

    batch_size: int
    slots: int
    cache_dtype: str | None
    dtype: torch.dtype
    device: torch.device


class State(ABC):
    """State of one module for each stream.

    The method `append` of a subclass stores new data and returns the input of the module.

    Attributes:
        kind: name under which the bytes are counted, one of KINDS.
        tensors: the storage; the first dimension is the place of a stream.
    """

    kind: ClassVar[str]
    tensors: list[Tensor]

    @abstractmethod
    def nbytes(self, held: Sequence[int]) -> int:
        """Bytes in use, from the storage; `held`: number of frames of each stream."""

    @property
    def places(self) -> int:
        """P."""
        return self.tensors[0].size(0)

    @property
    def layout(self) -> tuple:
        """Type and shapes; streams can be copied between states of equal layout."""
        return type(self), *((t.dtype, *self._shape(t, 0, 0)) for t in self.tensors)

    @property
    def capacity_bytes(self) -> int:
        """Bytes of the allocated storage."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self.tensors)

    def resized(self, places: int, slots: int) -> Self:
        """An empty state with the same settings and other numbers of places and slots."""
        new = copy.copy(self)
        new.tensors = [t.new_zeros(self._shape(t, places, slots)) for t in self.tensors]
        return new

    def _shape(self, tensor: Tensor, places: int, slots: int) -> tuple[int, ...]:
        return (places, *tensor.shape[1:])

    def copy_from(self, source: Self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy streams from places `sources` of another or this state to places `targets`."""
        for tensor, other in zip(self.tensors, source.tensors, strict=True):
            for here, there in zip(targets, sources, strict=True):
                tensor[here].copy_(other[there])

    def clear(self, places: Sequence[int]) -> None:
        """Start new streams in these places."""
        for tensor in self.tensors:
            for place in places:
                tensor[place].zero_()

    def to(self, device: torch.device) -> None:
        """Move the storage."""
        self.tensors = [tensor.to(device) for tensor in self.tensors]


class FrameState(State):
    """One or more vectors per frame, for the visible frames, in a ring of slots.

    Args:
        spec: common settings.
        vectors: (G, size) of each vector of a frame: G groups of `size` numbers.
    """

    kind = "attention"

    def __init__(self, spec: StateSpec, vectors: Sequence[tuple[int, int]]):
        self.codecs = [build_codec(spec.cache_dtype, size, spec.dtype) for _, size in vectors]
        groups = [groups for groups, _ in vectors]
        self.tensors = [
            torch.zeros(spec.batch_size, count, spec.slots, width, dtype=dtype, device=spec.device)
            for count, codec in zip(groups, self.codecs, strict=True)
            for width, dtype in codec.layout
        ]

    @property
    def slots(self) -> int:
        """N."""
        return self.tensors[0].size(2)

    def append(self, step: CacheStep, *new: Tensor) -> list[Tensor]:
        """Store the frames of a chunk.

        Args:
            step: streams and slots of the chunk.
            new: each vector of the new frames, (R, G, Q, size).

        Returns:
            Each vector of the slots in use, (R, G, S, size).
        """
        stored = iter(self.tensors)
        for codec, x in zip(self.codecs, new, strict=True):
            for encoded in codec.encode(x):
                step.put(next(stored), encoded)
        return self.read(step, new[0].dtype)

    def read(self, step: CacheStep, dtype: torch.dtype) -> list[Tensor]:
        """Read each vector of the slots in use, (R, G, S, size)."""
        stored = iter(self.tensors)
        return [
            codec.decode([step.get(next(stored)) for _ in codec.layout], dtype)
            for codec in self.codecs
        ]

    def grow(self, slots: int) -> None:
        """Enlarge the ring, which must not have wrapped yet."""
        larger = self.resized(self.places, slots)
        for tensor, old in zip(larger.tensors, self.tensors, strict=True):
            tensor[:, :, : old.size(2)] = old
        self.tensors = larger.tensors

    def keep(self, order: Tensor) -> None:
        """Keep the slots `order` (P, U) of each place, in this order, in slots [0, U)."""
        for tensor in self.tensors:
            index = order[:, None, :, None].expand(-1, tensor.size(1), -1, tensor.size(3))
            tensor[:, :, : order.size(1)] = tensor.gather(2, index)

    def _shape(self, tensor: Tensor, places: int, slots: int) -> tuple[int, ...]:
        return (places, tensor.size(1), slots, tensor.size(3))

    def copy_from(self, source: Self, sources: Sequence[int], targets: Sequence[int]) -> None:
        slots = min(self.slots, source.slots)
        for tensor, other in zip(self.tensors, source.tensors, strict=True):
            for here, there in zip(targets, sources, strict=True):
                tensor[here, :, :slots].copy_(other[there, :, :slots])
                tensor[here, :, slots:].zero_()  # a NaN there would affect the next stream

    @property
    def frame_nbytes(self) -> int:
        """Bytes of one frame of one stream, from the storage."""
        return self.capacity_bytes // max(1, self.places * self.slots)

    def nbytes(self, held: Sequence[int]) -> int:
        return sum(held) * self.frame_nbytes


class ConstantState(State):
    """State whose size does not depend on the number of frames."""

    def nbytes(self, held: Sequence[int]) -> int:
        return len(held) * self.capacity_bytes // max(1, self.places)


class SumState(ConstantState):
    """Running sums of linear attention: H f (d_v + 1) numbers per stream, constant in time.

    Always float32 or wider; `cache_dtype` is ignored, because a low-precision accumulator loses
    small updates over a long stream.
    """

    kind = "attention"

    def __init__(self, spec: StateSpec, n_head: int, features: int, d_v: int):
        dtype = torch.promote_types(spec.dtype, torch.float32)
        sizes = (spec.batch_size, n_head, features, d_v + 1)
        self.tensors = [torch.zeros(sizes, dtype=dtype, device=spec.device)]

    @classmethod
    def holding(cls, sums: Tensor) -> Self:
        """Create a state with these sums, (P, H, f, d_v + 1)."""
        state = cls.__new__(cls)
        state.tensors = [sums]
        return state

    def read(self, step: CacheStep) -> Tensor:
        """(R, H, f, d_v + 1): sums of phi(k) v' and, in the last column, of phi(k)."""
        return step.rows_of(self.tensors[0])

    def append(self, step: CacheStep, sums: Tensor) -> None:
        """Replace the sums (R, H, f, d_v + 1) of the streams of the step."""
        step.put_rows(self.tensors[0], sums)


class ConvState(ConstantState):
    """The last K input frames of a causal convolution with kernel K + 1."""

    kind = "conv"

    def __init__(self, spec: StateSpec, channels: int, frames: int):
        self.codec = build_codec(spec.cache_dtype, channels, spec.dtype)
        self.frames = frames
        # zeros decode to zeros, which is the padding of a causal convolution
        self.tensors = [
            torch.zeros(spec.batch_size, frames, width, dtype=dtype, device=spec.device)
            for width, dtype in self.codec.layout
        ]

    def append(self, step: CacheStep, x: Tensor) -> Tensor:
        """Prepend the K previous frames: (R, channels, Q) -> (R, channels, K + Q)."""
        held = [step.rows_of(tensor) for tensor in self.tensors]
        padded = torch.cat([self.codec.decode(held, x.dtype).transpose(1, 2), x], dim=2)
        new = self.codec.encode(padded[:, :, padded.size(2) - self.frames :].transpose(1, 2))
        for tensor, encoded in zip(self.tensors, new, strict=True):
            step.put_rows(tensor, encoded)
        return padded
