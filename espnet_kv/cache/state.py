"""What one module stores of a batch of streams between two chunks.

Every state serves streams that share nothing but the storage: they may differ in age, and join or
leave a running batch. Row b of each tensor belongs to the stream in place b.

Shape letters: P places, R streams of a step, Q frames of a chunk, N slots, S slots in use,
G key/value heads, H heads, f size of a feature map, K frames that a convolution looks back.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from espnet_kv.cache.codec import build_codec
from espnet_kv.cache.step import Step

KINDS = ("attention", "conv", "input")


@dataclass(frozen=True)
class StateSpec:
    """What the states of an encoder or decoder have in common.

    Attributes:
        batch_size: P, places for streams.
        slots: N, frames that a ring has room for.
        cache_dtype: see `espnet_kv.cache.codec`.
        dtype: of the model.
        device: of the storage.
    """

    batch_size: int
    slots: int
    cache_dtype: str | None
    dtype: torch.dtype
    device: torch.device


class State(ABC):
    """What one module stores of each stream.

    A subclass has an `append`, which takes what is new and returns what the module needs.

    Attributes:
        kind: under which name its bytes are counted, one of KINDS.
        tensors: the storage; the first dimension is the place of a stream.
    """

    kind: ClassVar[str]
    tensors: list[Tensor]

    @abstractmethod
    def nbytes(self, held: Sequence[int]) -> int:
        """Bytes of streams that hold so many frames each, read off the storage."""

    @property
    def places(self) -> int:
        """P."""
        return self.tensors[0].size(0)

    @property
    def layout(self) -> tuple:
        """What states must have in common for streams to move from one to the other."""
        return type(self), *((t.dtype, *self._shape(t, 0, 0)) for t in self.tensors)

    @property
    def capacity_bytes(self) -> int:
        """Bytes of the storage, in use or not."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self.tensors)

    def resized(self, places: int, slots: int) -> Self:
        """An empty state like this one with room for other numbers of streams and frames."""
        new = copy.copy(self)
        new.tensors = [t.new_zeros(self._shape(t, places, slots)) for t in self.tensors]
        return new

    def _shape(self, tensor: Tensor, places: int, slots: int) -> tuple[int, ...]:
        return (places, *tensor.shape[1:])

    def copy_from(self, source: Self, theirs: Sequence[int], ours: Sequence[int]) -> None:
        """Copy streams from places `theirs` of another state, or of this one, to places `ours`."""
        for tensor, other in zip(self.tensors, source.tensors, strict=True):
            for here, there in zip(ours, theirs, strict=True):
                tensor[here].copy_(other[there])

    def clear(self, places: Sequence[int]) -> None:
        """Make new streams in these places."""
        for tensor in self.tensors:
            for place in places:
                tensor[place].zero_()

    def to(self, device: torch.device) -> None:
        """Move the storage."""
        self.tensors = [tensor.to(device) for tensor in self.tensors]


class FrameState(State):
    """One or more vectors per frame, for the frames in reach, in a ring of slots.

    Args:
        spec: what it has in common with the other states.
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

    def append(self, step: Step, *new: Tensor) -> list[Tensor]:
        """Store the frames of a chunk.

        Args:
            step: says which streams, and where.
            new: (R, G, Q, size) of each vector.

        Returns:
            What the chunk may attend to, slot by slot: (R, G, S, size) of each vector.
        """
        stored = iter(self.tensors)
        for codec, x in zip(self.codecs, new, strict=True):
            for encoded in codec.encode(x):
                step.put(next(stored), encoded)
        return self.read(step, new[0].dtype)

    def read(self, step: Step, dtype: torch.dtype) -> list[Tensor]:
        """What a chunk may attend to, slot by slot: (R, G, S, size) of each vector."""
        stored = iter(self.tensors)
        return [
            codec.decode([step.get(next(stored)) for _ in codec.layout], dtype)
            for codec in self.codecs
        ]

    def grow(self, slots: int) -> None:
        """Make room for more frames; the ring has not wrapped yet."""
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

    def copy_from(self, source: Self, theirs: Sequence[int], ours: Sequence[int]) -> None:
        slots = min(self.slots, source.slots)
        for tensor, other in zip(self.tensors, source.tensors, strict=True):
            for here, there in zip(ours, theirs, strict=True):
                tensor[here, :, :slots].copy_(other[there, :, :slots])
                tensor[here, :, slots:].zero_()  # a NaN left there would reach the next stream

    @property
    def frame_nbytes(self) -> int:
        """Bytes of one frame of one stream, read off the storage."""
        return self.capacity_bytes // max(1, self.places * self.slots)

    def nbytes(self, held: Sequence[int]) -> int:
        return sum(held) * self.frame_nbytes


class ConstantState(State):
    """Storage that does not depend on how many frames a stream has."""

    def nbytes(self, held: Sequence[int]) -> int:
        return len(held) * self.capacity_bytes // max(1, self.places)


class SumState(ConstantState):
    """Sums over all frames, in float32 or wider: H f (d_v + 1) numbers of a stream.

    cache_dtype does not apply: the terms added over an hour would be lost in rounding.
    """

    kind = "attention"

    def __init__(self, spec: StateSpec, n_head: int, features: int, d_v: int):
        dtype = torch.promote_types(spec.dtype, torch.float32)
        sizes = (spec.batch_size, n_head, features, d_v + 1)
        self.tensors = [torch.zeros(sizes, dtype=dtype, device=spec.device)]

    @classmethod
    def holding(cls, sums: Tensor) -> Self:
        """A state of these sums, (P, H, f, d_v + 1)."""
        state = cls.__new__(cls)
        state.tensors = [sums]
        return state

    def read(self, step: Step) -> Tensor:
        """(R, H, f, d_v + 1): sum of phi(k) v' and, in the last column, of phi(k)."""
        return step.rows_of(self.tensors[0])

    def append(self, step: Step, sums: Tensor) -> None:
        """Replace the sums (R, H, f, d_v + 1) of the streams that take the step."""
        step.put_rows(self.tensors[0], sums)


class ConvState(ConstantState):
    """The last K input frames of a causal convolution with kernel K + 1."""

    kind = "conv"

    def __init__(self, spec: StateSpec, channels: int, frames: int):
        self.codec = build_codec(spec.cache_dtype, channels, spec.dtype)
        self.frames = frames
        # a causal convolution is padded with zeros, and storage of zeros decodes to zeros
        self.tensors = [
            torch.zeros(spec.batch_size, frames, width, dtype=dtype, device=spec.device)
            for width, dtype in self.codec.layout
        ]

    def append(self, step: Step, x: Tensor) -> Tensor:
        """(R, channels, Q) -> (R, channels, K + Q), preceded by the K frames before."""
        held = [step.rows_of(tensor) for tensor in self.tensors]
        seen = torch.cat([self.codec.decode(held, x.dtype).transpose(1, 2), x], dim=2)
        new = self.codec.encode(seen[:, :, seen.size(2) - self.frames :].transpose(1, 2))
        for tensor, encoded in zip(self.tensors, new, strict=True):
            step.put_rows(tensor, encoded)
        return seen
