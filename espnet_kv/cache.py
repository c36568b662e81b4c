"""What a stream leaves behind between two chunks, as objects that know their bytes.

Shape letters: B streams, R of them in a step, Q frames of a chunk, N slots, S slots in use,
G key/value heads, H heads, f size of a feature map, K frames that a convolution looks back.
"""

import copy
import dataclasses
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from espnet_kv.codec import build_codec
from espnet_kv.state import KINDS, State, StateSpec
from espnet_kv.step import Step


class FrameState(State):
    """One or more vectors per frame, for the frames in reach, in a ring of slots.

    Args:
        spec: what it has in common with the other states.
        vectors: (G, size) of each vector of a frame: G groups of `size` numbers.
    """

    kind = "attention"

    def __init__(self, spec: StateSpec, vectors: Sequence[tuple[int, int]]):
        self.groups = [groups for groups, _ in vectors]
        self.codecs = [build_codec(spec.cache_dtype, size, spec.dtype) for _, size in vectors]
        self.tensors = [
            torch.zeros(spec.batch_size, groups, spec.slots, width, dtype=dtype, device=spec.device)
            for groups, codec in zip(self.groups, self.codecs, strict=True)
            for width, dtype in codec.layout
        ]
        self.held = [0] * spec.batch_size

    def append(self, step: Step, *new: Tensor) -> list[Tensor]:
        """Store the frames of a chunk.

        Args:
            step: says which streams, and where.
            new: (R, G, Q, size) of each vector.

        Returns:
            What the chunk may look at, slot by slot: (R, G, S, size) of each vector.
        """
        streams = range(len(self.held)) if step.rows is None else step.rows.tolist()
        for stream, frames in zip(streams, step.lengths, strict=True):
            self.held[stream] += frames
        self._grow(step.slots)
        kept = iter(self.tensors)
        for codec, x in zip(self.codecs, new, strict=True):
            for encoded in codec.encode(x):
                step.put(next(kept), encoded)
        return self.read(step, new[0].dtype)

    def read(self, step: Step, dtype: torch.dtype) -> list[Tensor]:
        """What a chunk may look at, slot by slot: (R, G, S, size) of each vector."""
        kept = iter(self.tensors)
        return [
            codec.decode([step.get(next(kept)) for _ in codec.layout], dtype)
            for codec in self.codecs
        ]

    def trim(self, frames: int) -> None:
        self.held = [min(held, frames) for held in self.held]

    def select(self, rows: Sequence[int]) -> Self:
        selected = super().select(rows)
        selected.held = [self.held[row] for row in rows]
        return selected

    def join(self, others: Sequence[Self]) -> Self:
        slots = max(state.tensors[0].size(2) for state in (self, *others))
        for state in (self, *others):
            state._grow(slots)
        joined = super().join(others)
        joined.held = [held for state in (self, *others) for held in state.held]
        return joined

    def _grow(self, slots: int) -> None:
        """Take more slots, where the left context is unbounded: the ring has not wrapped then."""
        for i, tensor in enumerate(self.tensors):
            if slots > tensor.size(2):
                bigger = tensor.new_zeros(*tensor.shape[:2], slots, tensor.size(3))
                bigger[:, :, : tensor.size(2)] = tensor
                self.tensors[i] = bigger

    def keep(self, order: Tensor, held: Sequence[int]) -> None:
        """Keep slots order (B, U) of each stream and nothing else, in this order, in [0, U).

        held: of these, the first held[b] are in use.
        """
        for tensor in self.tensors:
            index = order[:, None, :, None].expand(-1, tensor.size(1), -1, tensor.size(3))
            tensor[:, :, : order.size(1)] = tensor.gather(2, index)
        self.held = list(held)

    @property
    def frame_nbytes(self) -> int:
        """Bytes of a frame, read off the storage."""
        return sum(tensor[:1, :, :1].nbytes for tensor in self.tensors)

    @property
    def nbytes(self) -> int:
        return sum(self.held) * self.frame_nbytes

    @property
    def nbytes_analytic(self) -> int:
        per_frame = zip(self.groups, self.codecs, strict=True)
        return sum(self.held) * sum(groups * codec.nbytes for groups, codec in per_frame)


class KVState(FrameState):
    """Keys and values: 2 G d_k numbers a frame."""

    def __init__(self, spec: StateSpec, kv_heads: int, d_k: int):
        super().__init__(spec, [(kv_heads, d_k), (kv_heads, d_k)])


class InputState(FrameState):
    """The layer's input, from which keys and values are projected anew: D numbers a frame."""

    def __init__(self, spec: StateSpec, n_feat: int):
        super().__init__(spec, [(1, n_feat)])


class LatentState(FrameState):
    """The latent of multi-head latent attention: r numbers a frame."""

    def __init__(self, spec: StateSpec, kv_rank: int):
        super().__init__(spec, [(1, kv_rank)])


class LinearState(State):
    """The sums of linear attention, in float32 or better: H f (d_v + 1) numbers for ever.

    cache_dtype does not touch it: what is added to it over an hour would be lost in rounding.
    """

    kind = "attention"

    def __init__(self, spec: StateSpec, n_head: int, features: int, d_v: int):
        dtype = torch.promote_types(spec.dtype, torch.float32)
        sizes = (spec.batch_size, n_head, features, d_v + 1)
        self.tensors = [torch.zeros(sizes, dtype=dtype, device=spec.device)]

    @classmethod
    def holding(cls, sums: Tensor) -> Self:
        """A state of these sums, (B, H, f, d_v + 1)."""
        state = cls.__new__(cls)
        state.tensors = [sums]
        return state

    def read(self, step: Step) -> Tensor:
        """(R, H, f, d_v + 1): sum of phi(k) v' and, in the last column, of phi(k)."""
        return self.tensors[0] if step.rows is None else self.tensors[0][step.rows]

    def append(self, step: Step, sums: Tensor) -> None:
        """Replace the sums (R, H, f, d_v + 1) of the streams that take the step."""
        if step.rows is None:
            self.tensors[0].copy_(sums)
        else:
            self.tensors[0][step.rows] = sums

    @property
    def nbytes_analytic(self) -> int:
        b, h, f, columns = self.tensors[0].shape
        return b * h * f * columns * self.tensors[0].element_size()


class ConvState(State):
    """The last K input frames of a causal convolution of kernel K + 1."""

    kind = "conv"

    def __init__(self, spec: StateSpec, channels: int, frames: int):
        self.codec = build_codec(spec.cache_dtype, channels, spec.dtype)
        self.frames = frames
        # before the first frame a convolution sees zeros
        silence = torch.zeros(spec.batch_size, frames, channels, device=spec.device)
        self.tensors = self.codec.encode(silence.to(spec.dtype))

    def append(self, step: Step, x: Tensor) -> Tensor:
        """(R, channels, Q) -> (R, channels, K + Q), the K frames before in front."""
        held = [tensor if step.rows is None else tensor[step.rows] for tensor in self.tensors]
        seen = torch.cat([self.codec.decode(held, x.dtype).transpose(1, 2), x], dim=2)
        new = self.codec.encode(seen[:, :, seen.size(2) - self.frames :].transpose(1, 2))
        for tensor, encoded in zip(self.tensors, new, strict=True):
            if step.rows is None:
                tensor.copy_(encoded)
            else:
                tensor[step.rows] = encoded
        return seen

    @property
    def nbytes_analytic(self) -> int:
        return self.tensors[0].size(0) * self.frames * self.codec.nbytes


class FeatureState(State):
    """Features that are not encoded yet, (frames, F) of each stream.

    Subsampling looks back a few frames, and a chunk waits for its last one.
    """

    kind = "input"

    def __init__(self, spec: StateSpec, size: int):
        empty = torch.zeros(0, size, dtype=spec.dtype, device=spec.device)
        self.size = size
        self.tensors = [empty.clone() for _ in range(spec.batch_size)]

    @property
    def lengths(self) -> list[int]:
        return [tensor.size(0) for tensor in self.tensors]

    def append(self, xs: Tensor, lengths: Sequence[int]) -> None:
        """Add lengths[b] frames of xs (B, T, F) to stream b."""
        pairs = zip(self.tensors, xs, lengths, strict=True)
        self.tensors = [torch.cat([held, x[:length]]) for held, x, length in pairs]

    def read(self, rows: Sequence[int], first: Sequence[int], frames: int) -> Tensor:
        """(R, frames, F) of streams `rows`, from frame first[r] on; past the end zeros."""
        pieces = [self.tensors[r][f : f + frames] for r, f in zip(rows, first, strict=True)]
        return pad_sequence(pieces, batch_first=True)

    def trim(self, frames: int) -> None:
        self.keep([min(frames, length) for length in self.lengths])

    def keep(self, frames: Sequence[int]) -> None:
        """Keep the newest frames[b] of stream b, and nothing alive behind them."""
        pairs = zip(self.tensors, frames, strict=True)
        self.tensors = [tensor[tensor.size(0) - n :].clone() for tensor, n in pairs]

    def select(self, rows: Sequence[int]) -> Self:
        selected = copy.copy(self)
        selected.tensors = [self.tensors[row].clone() for row in rows]
        return selected

    def join(self, others: Sequence[Self]) -> Self:
        joined = copy.copy(self)
        joined.tensors = [t.clone() for state in (self, *others) for t in state.tensors]
        return joined

    @property
    def nbytes_analytic(self) -> int:
        return sum(self.lengths) * self.size * self.tensors[0].element_size() if self.tensors else 0


@dataclass
class EncoderState:
    """Everything an encoder keeps of a batch of streams between two chunks.

    Attributes:
        owner: the encoder.
        chunk_size, left_chunks: of the encoder when the state was made.
        slots: N of the rings.
        states: of the encoder's modules, by their state_index.
        features: what is not encoded yet.
        frames: frames encoded so far, of each stream.
        emitted: frames that the last call gave, of each stream.
        finished: streams that had their last piece.
    """

    owner: weakref.ref
    chunk_size: int
    left_chunks: int
    slots: int
    states: list[Any]
    features: FeatureState
    frames: list[int]
    emitted: list[int]
    finished: list[bool]

    @property
    def batch_size(self) -> int:
        return len(self.frames)

    @property
    def held(self) -> list[int]:
        """How many of its frames the next chunk may look at, of each stream; sums see all."""
        counts = (state.held for state in self.states if isinstance(state, FrameState))
        return next(counts, self.frames)

    @property
    def _all(self) -> list[State]:
        return [*self.states, self.features]

    def select(self, rows: Sequence[int]) -> "EncoderState":
        """These streams, in this order, as a state of their own: drops, reorders, forks.

        Args:
            rows: numbers of streams, each from 0 to batch_size - 1, a number as often as wanted;
                none: a state of no streams, to which others can be joined.

        Raises:
            ValueError: rows is a mask or holds something else than whole numbers.
            IndexError: there is no such stream; negative numbers name none.
        """
        rows = _whole_numbers(rows)
        if not all(0 <= row < self.batch_size for row in rows):
            raise IndexError(f"streams {rows} of a state of {self.batch_size}")
        return dataclasses.replace(
            self,
            states=[state.select(rows) for state in self.states],
            features=self.features.select(rows),
            frames=[self.frames[row] for row in rows],
            emitted=[self.emitted[row] for row in rows],
            finished=[self.finished[row] for row in rows],
        )

    @staticmethod
    def join(parts: Sequence["EncoderState"]) -> "EncoderState":
        """The streams of all parts in one batch.

        Raises:
            ValueError: there are no parts, or they come from different encoders, or differ in
                their chunks or cache_dtype.
        """
        if not parts:
            raise ValueError("parts: there is no state to join")
        first, *others = parts
        for other in others:
            if first._fingerprint != other._fingerprint:
                raise ValueError(
                    "states of different encoders, chunk_size, left_chunks or cache_dtype do not "
                    "join"
                )
        groups = zip(*(part.states for part in parts), strict=True)
        return dataclasses.replace(
            first,
            slots=max(part.slots for part in parts),
            states=[state.join(rest) for state, *rest in groups],
            features=first.features.join([part.features for part in others]),
            frames=[n for part in parts for n in part.frames],
            emitted=[n for part in parts for n in part.emitted],
            finished=[done for part in parts for done in part.finished],
        )

    def trim(self, frames: int) -> None:
        """Let later chunks look at no more than the newest `frames` frames.

        The sums of linear attention cannot forget.
        """
        for state in self.states:
            state.trim(frames)

    @property
    def _fingerprint(self) -> tuple:
        kept = tuple(t.dtype for state in self.states for t in state.tensors)
        return self.owner(), self.chunk_size, self.left_chunks, kept

    def to(self, device: torch.device) -> "EncoderState":
        """Move the storage; returns self."""
        for state in self._all:
            state.to(device)
        return self

    @property
    def nbytes(self) -> int:
        """Bytes of what is held now, read off the storage."""
        return sum(state.nbytes for state in self._all)

    @property
    def nbytes_analytic(self) -> int:
        """What nbytes should be, by arithmetic."""
        return sum(state.nbytes_analytic for state in self._all)

    @property
    def capacity_bytes(self) -> int:
        """Bytes of the storage, whether in use or not."""
        return sum(state.capacity_bytes for state in self._all)

    def nbytes_by_kind(self) -> dict[str, int]:
        """nbytes apart: {"attention": .., "conv": .., "input": ..}."""
        return {kind: sum(s.nbytes for s in self._all if s.kind == kind) for kind in KINDS}


def _whole_numbers(rows: Any) -> list[int]:
    """Numbers of streams as plain integers: of a sequence, an array or a tensor."""
    numbers = rows.tolist() if hasattr(rows, "tolist") else rows
    try:
        numbers = [row.item() if hasattr(row, "item") else row for row in numbers]
    except TypeError:
        raise ValueError(f"rows {rows!r}: give a sequence of stream numbers, e.g. [1]") from None
    if any(isinstance(row, bool) for row in numbers):
        way_out = "[n for n, keep in enumerate(mask) if keep]"
        raise ValueError(f"rows {numbers}: a mask names no streams; give numbers, e.g. {way_out}")
    if not all(isinstance(row, int) for row in numbers):
        raise ValueError(f"rows {numbers}: give whole numbers of streams, e.g. [2, 0]")
    return numbers
