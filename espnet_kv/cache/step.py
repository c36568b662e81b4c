"""Where a module reads and writes its state while its encoder or decoder runs with a cache.

ESPnet's blocks call attention and convolutions without an argument for state. The encoder or
decoder therefore puts a `Step` into `running`, a context variable, while it calls its blocks; each
module finds its own state in `Step.states` by its `state_index`. Masks do not travel this way: they
are arguments, because a checkpointed layer is computed again in the backward pass.

Shape letters: P places, R streams that take the step, Q frames of the chunk, N slots, S slots in
use.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor


class Step(ABC):
    """Access to the states of the modules for one call of an encoder or decoder.

    Attributes:
        states: state of every module that has one, by its `state_index`.
        tables: position table of every attention module, by its `state_index`; None: no relative
            positions.
        positions: (R, Q) numbers of the frames, where positions are absolute.
        memory: of a decoder, what its cross-attention modules attend to.
        read: S; the slots [0, S) are read.
        window: the part of a position table that the keys in [0, S) need.
        visible: broadcastable to (R, H, Q, S): bool (True: visible) or added to the logits;
            None: everything is visible.
        hidden: not visible, where `visible` is bool.
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
        """The slots in use, (R, G, S, n), of stored (P, G, N, n)."""

    @abstractmethod
    def rows_of(self, stored: Tensor) -> Tensor:
        """(R, ...) of stored (P, ...): what the streams of this step have."""

    @abstractmethod
    def put_rows(self, stored: Tensor, new: Tensor) -> None:
        """Replace (R, ...) of stored (P, ...)."""

    def arrange(self, bias: Tensor) -> Tensor:
        """(R, H, Q, S) with the newest frame last -> the same in the order of the slots."""
        return bias

    def per_sum(self, x: Tensor) -> Tensor:
        """(R, Q, D) -> one row for each sum: frames of a stream share one."""
        return x


class ChunkStep(Step):
    """A chunk of some streams in the rings of an encoder.

    The slots of a store are a ring: frame i of a stream lies in slot i mod N. Keys never move;
    the position term, which is small, is brought into their order instead. Index tensors are made
    here, once per chunk, and the numbers behind them stay on the CPU: no layer waits for the
    device.

    Args:
        states, tables: see Step.
        places: of the streams that take this step. Places 0 to R - 1 in order are read without a
            copy.
        starts: frames that each of these streams had before.
        lengths: frames that each adds now.
        held: frames before the chunk that each may attend to.
        slots: N.
        device: of the states.
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
        # (R, 1) places, where a write needs them as indices
        self._where: Tensor | None = None
        if list(places) != list(range(self.count)):
            self.rows = torch.tensor(places, device=device)
            self._where = self.rows[:, None]
        # where the Q new frames go: (Q,) slots of all streams, or (R, Q) of each
        self.write: Tensor
        # of the newest S frames, in the order of time, the one that lies in each slot: (S,) for
        # all streams, or (R, 1, 1, S) of each; None: slots are in the order of time
        self.order: Tensor | None = None
        self.turn = 0  # place in that order of slot 0, where all streams are alike
        alike = len(set(zip(starts, lengths, held, strict=True))) == 1
        if alike:  # the usual case; the rest is for streams of different ages and ragged ends
            first = starts[0] % slots
            self.write = torch.arange(first, first + frames, device=device)
            if starts[0] + frames > slots:
                self.turn = -(first + frames) % slots
                self.order = (torch.arange(slots, device=device) + self.turn) % slots
            if held[0] + frames >= self.read:
                return
            starts, lengths, held = starts[:1], lengths[:1], held[:1]
        begin = torch.tensor(starts, device=device)[:, None] % slots  # (R, 1), as the next three
        held_frames = torch.tensor(held, device=device)[:, None]
        short = frames - torch.tensor(lengths, device=device)[:, None]
        # how old is what lies in each slot? 0: the last frame of the chunk
        age = (begin + frames - 1 - torch.arange(self.read, device=device)) % slots  # (R, S)
        seen = (age >= short) & (age < held_frames + frames)
        self.visible = seen[:, None, None, :]
        self.hidden = ~self.visible
        if not alike:
            self.write = begin + torch.arange(frames, device=device)
            if self._where is None:
                self._where = torch.arange(self.count, device=device)[:, None]
            self.order = (self.read - 1 - age).clamp(min=0)[:, None, None, :]
        if len(set(lengths)) > 1:
            self.valid = (torch.arange(frames, device=device) < frames - short)[:, None, :, None]

    def put(self, stored: Tensor, new: Tensor) -> None:
        if self._where is None:
            stored[: self.count].index_copy_(2, self.write, new)
        else:
            stored[self._where, :, self.write] = new.transpose(1, 2)  # (R, Q, G, n)

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

    def arrange(self, bias: Tensor) -> Tensor:
        if self.order is None:
            return bias
        if self.order.dim() > 1:
            return bias.gather(-1, self.order.expand_as(bias))
        # a compiled graph that knew the turn as a number would be compiled again for the next chunk
        if torch.compiler.is_compiling():
            return bias.index_select(-1, self.order)
        if self.turn == 0:
            return bias
        return torch.cat([bias[..., self.turn :], bias[..., : self.turn]], dim=-1)


# the step that the encoder or decoder of this thread or task is taking
running: ContextVar[Step | None] = ContextVar("running", default=None)


@contextmanager
def taking(step: Step) -> Iterator[None]:
    """Within it, the modules that this thread or task calls take part in `step`."""
    token = running.set(step)
    try:
        yield
    finally:
        running.reset(token)
