"""Where a chunk is written in the cache and which cached frames it may attend to.

ESPnet's blocks call attention and convolutions without an argument for state. The encoder or
decoder therefore sets the context variable `current_step` to a `CacheStep` while it calls its
blocks, and each module reads its state from `CacheStep.states` by its `state_index`. Masks are
passed as arguments instead, because a checkpointed layer is computed again in the backward pass.

Shape letters: P places, R streams of the step, Q frames of the chunk, N slots, S slots in use.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor


class CacheStep(ABC):
    """Access to the states of the modules for one call of an encoder or decoder.

    Attributes:
        states: states of the modules, by `state_index`.
        tables: position tables of the attention modules, by `state_index`; None: no relative
            positions.
        positions: (R, Q), frame numbers, for absolute positions.
        memory: encoded utterances for the cross-attention of a decoder.
        read: S; the slots [0, S) are read.
        window: range of a position table for the keys in [0, S).
        visible: broadcastable to (R, H, Q, S): bool (True: visible) or added to the logits;
            None: everything is visible.
        hidden: the negation of a bool `visible`.
        valid: (R, 1, Q, 1) bool, the frames of the chunk that exist; None: all.
    """

    states: Sequence[Any]
    tables: Sequence[Tensor | None] = ()
    positions: Tensor | None = None
    memory: Any = None
    read: int
    window: slice
    visible: Tensor | None = None
    hidden: Tensor | None = None
    valid: Tensor | None = None

    @abstractmethod
    def put(self, stored: Tensor, new: Tensor) -> None:
        """Write the chunk's (R, G, Q, n) into stored (P, G, N, n)."""

    @abstractmethod
    def get(self, stored: Tensor) -> Tensor:
        """Read the slots in use, (R, G, S, n), of stored (P, G, N, n)."""

    @abstractmethod
    def rows_of(self, stored: Tensor) -> Tensor:
        """Read the rows (R, ...) of the streams of this step from stored (P, ...)."""

    @abstractmethod
    def put_rows(self, stored: Tensor, new: Tensor) -> None:
        """Replace the rows (R, ...) of the streams of this step in stored (P, ...)."""

    def to_slot_order(self, bias: Tensor) -> Tensor:
        """Reorder the keys of (R, H, Q, S) from the order of time to the order of the slots."""
        return bias

    def hide(self, bias: Tensor) -> Tensor:
        """(R, H, Q, S) with the minimum for keys that are not visible."""
        if self.hidden is None:
            return bias
        return bias.masked_fill(self.hidden, torch.finfo(bias.dtype).min)

    def rows_per_sum(self, x: Tensor) -> Tensor:
        """Reshape (R, Q, D) to one row per sum; here the frames of a stream share a sum."""
        return x


class ChunkStep(CacheStep):
    """One chunk of some streams in the ring buffers of an encoder.

    The slots of a store are a ring: frame i of a stream is in slot i mod N. Keys are never moved;
    the position term, which is small, is reordered instead. Index tensors are made here, once per
    chunk, from numbers on the CPU, so that no layer synchronises with the device.

    Args:
        states, tables: see CacheStep.
        places: place of each stream. Places 0 to R - 1 in order are read without a copy.
        starts: frames of each stream before the chunk.
        lengths: frames of each stream in the chunk.
        held: frames before the chunk that each stream may attend to.
        slots: N.
        device: device of the states.
    """

    def __init__(
        self,
        states: Sequence[Any],
        tables: Sequence[Tensor | None],
        places: Sequence[int],
        starts: Sequence[int],
        lengths: Sequence[int],
        held: Sequence[int],
        slots: int,
        device: torch.device,
    ):
        self.states, self.tables = states, tables
        self.count, frames = len(places), max(lengths)
        self.read = min(slots, max(starts) + frames)
        self.window = slice(slots - self.read, slots + frames - 1)
        # None: the places [0, R)
        self.rows: Tensor | None = None
        # (R, 1) places as indices for writing; None: not needed
        self._write_rows: Tensor | None = None
        if list(places) != list(range(self.count)):
            self.rows = torch.tensor(places, device=device)
            self._write_rows = self.rows[:, None]
        # slots of the Q new frames: (Q,) for all streams, or (R, Q) for each
        self.write: Tensor
        # maps slots to time: index of each slot's frame among the newest S frames, (S,) for all
        # streams or (R, 1, 1, S) for each; None: slots are in the order of time
        self.order: Tensor | None = None
        self.rotation = 0  # that index of slot 0, if it is the same for all streams
        uniform = len(set(zip(starts, lengths, held, strict=True))) == 1
        if uniform:  # the usual case; otherwise streams differ in age or end within the chunk
            first = starts[0] % slots
            self.write = torch.arange(first, first + frames, device=device)
            if starts[0] + frames > slots:
                self.rotation = -(first + frames) % slots
                self.order = (torch.arange(slots, device=device) + self.rotation) % slots
            if held[0] + frames >= self.read:
                return
            starts, lengths, held = starts[:1], lengths[:1], held[:1]
        begin = torch.tensor(starts, device=device)[:, None] % slots  # (R, 1), as the next three
        held_frames = torch.tensor(held, device=device)[:, None]
        short = frames - torch.tensor(lengths, device=device)[:, None]
        # age of the frame in each slot; 0: the last frame of the chunk
        age = (begin + frames - 1 - torch.arange(self.read, device=device)) % slots  # (R, S)
        seen = (age >= short) & (age < held_frames + frames)
        self.visible = seen[:, None, None, :]
        self.hidden = ~self.visible
        if not uniform:
            self.write = begin + torch.arange(frames, device=device)
            if self._write_rows is None:
                self._write_rows = torch.arange(self.count, device=device)[:, None]
            self.order = (self.read - 1 - age).clamp(min=0)[:, None, None, :]
        if len(set(lengths)) > 1:
            self.valid = (torch.arange(frames, device=device) < frames - short)[:, None, :, None]

    def put(self, stored: Tensor, new: Tensor) -> None:
        if self._write_rows is None:
            stored[: self.count].index_copy_(2, self.write, new)
        else:
            stored[self._write_rows, :, self.write] = new.transpose(1, 2)  # (R, Q, G, n)

    def get(self, stored: Tensor) -> Tensor:
        if self.rows is None:
            return stored[: self.count, :, : self.read]
        return stored[:, :, : self.read][self.rows]

    def rows_of(self, stored: Tensor) -> Tensor:
        return stored[: self.count] if self.rows is None else stored[self.rows]

    def put_rows(self, stored: Tensor, new: Tensor) -> None:
        if self.rows is None:
            stored[: self.count].copy_(new)
        else:
            stored[self.rows] = new

    def to_slot_order(self, bias: Tensor) -> Tensor:
        if self.order is None:
            return bias
        if self.order.dim() > 1:
            return bias.gather(-1, self.order.expand_as(bias))
        # the rotation as a Python number would cause a recompilation for each chunk
        if torch.compiler.is_compiling():
            return bias.index_select(-1, self.order)
        if self.rotation == 0:
            return bias
        return torch.cat([bias[..., self.rotation :], bias[..., : self.rotation]], dim=-1)


# the current step of the encoder or decoder in this thread or task
current_step: ContextVar[CacheStep | None] = ContextVar("current_step", default=None)


@contextmanager
def active_step(step: CacheStep) -> Iterator[None]:
    """Make `step` the current step of this thread or task within the block."""
    token = current_step.set(step)
    try:
        yield
    finally:
        current_step.reset(token)
