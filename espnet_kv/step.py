"""One chunk of some streams on its way through an encoder.

ESPnet's blocks have one slot that reaches the attention, pos_emb, and none that reaches the
convolutions. A `Step` rides in that slot, as `Chunks` does in one pass, and stands in `running`
for the rest; each module finds its own state in it.

Shape letters: R streams that take the step, Q frames of the chunk, N slots, S slots in use.
"""

from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


class Step:
    """Where the frames of a chunk are stored, and which stored frames they see.

    The slots of a store are a ring: frame i of a stream lies in slot i mod N. Keys never move;
    the position term, which is small, is brought into their order instead.

    Args:
        states: state of every module that has one, by its `state_index`.
        rows: the streams of the batch that take this step; None: all of them.
        starts: frames that each of these streams had before.
        lengths: frames that each adds now.
        held: frames before the chunk that each may look at (and the states still hold).
        slots: N.
        chunk_size: C.
        device: of the model.

    Attributes:
        rows: (R,) indices, or None for all.
        write: where the Q new frames go: a slice of slots, or (R, Q) slots of each stream.
        read: S; the slots [0, S) are read.
        order: of the newest S frames, the place in time that lies in slot 0 where the slots are
            only turned round, or (R, 1, 1, S) of each slot.
        visible: (R, 1, 1, S) bool, the slots that may be seen; None: all. Of hypotheses,
            (R, 1, Q, S), added to the logits.
        valid: (R, 1, Q, 1) bool, the frames of the chunk that exist; None: all.
        pos_emb: (1, N+C-1, D), ESPnet's relative positions from N - 1 down to -(C - 1); None
            without relative positions. Set by the encoder.
    """

    pos_emb: Tensor | None = None
    # the Q "frames" are hypotheses of one utterance, which do not see one another
    apart: bool = False

    @classmethod
    def whole(cls, memory: Tensor) -> "Step":
        """The one step in which encoded utterances (B, T, D) are stored."""
        b, t = memory.shape[:2]
        return cls((), None, [0] * b, [t] * b, [0] * b, t, t, memory.device)

    def __init__(
        self,
        states: Sequence[Any],
        rows: list[int] | None,
        starts: list[int],
        lengths: list[int],
        held: list[int],
        slots: int,
        chunk_size: int,
        device: torch.device,
    ):
        self.states = states
        self.slots, self.chunk_size = slots, chunk_size
        self.starts, self.lengths = starts, lengths
        frames = max(lengths)
        self.read = min(slots, max(starts) + frames)
        self.rows = None if rows is None else torch.tensor(rows, device=device)
        self.visible = self.valid = None
        alike = len(set(zip(starts, lengths, held, strict=True))) == 1
        if alike:  # the rule; what follows is for streams of different ages and for ragged ends
            first = starts[0] % slots
            self.write: slice | Tensor = slice(first, first + frames)
            wrapped = starts[0] + frames > slots
            self.order: int | Tensor = -(first + frames) % slots if wrapped else 0
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
        if not alike:
            self.write = begin + torch.arange(frames, device=device)
            self.order = (self.read - 1 - age).clamp(min=0)[:, None, None, :]
        if len(set(lengths)) > 1:
            self.valid = (torch.arange(frames, device=device) < frames - short)[:, None, :, None]

    def put(self, stored: Tensor, new: Tensor) -> None:
        """Write the chunk's (R, G, Q, n) into stored (B, G, N, n)."""
        if self.rows is None and isinstance(self.write, slice):
            stored[:, :, self.write] = new
            return
        rows, slots = self.rows, self.write
        if rows is None:
            rows = torch.arange(stored.size(0), device=stored.device)
        if isinstance(slots, slice):
            slots = torch.arange(slots.start, slots.stop, device=stored.device)[None]
        stored[rows[:, None], :, slots] = new.transpose(1, 2)  # (R, Q, G, n)

    def get(self, stored: Tensor) -> Tensor:
        """The slots in use, (R, G, S, n), of stored (B, G, N, n)."""
        in_use = stored[:, :, : self.read]
        return in_use if self.rows is None else in_use[self.rows]

    def arrange(self, bias: Tensor) -> Tensor:
        """(R, H, Q, S) with the newest frame last -> the same in the order of the slots."""
        if isinstance(self.order, int):
            return torch.cat([bias[..., self.order :], bias[..., : self.order]], dim=-1)
        return bias.gather(-1, self.order.expand_as(bias))


@dataclass(frozen=True)
class Memory:
    """Encoded utterances as a decoder's cross-attention keeps them; rides in the mask slot.

    states: of every cross-attention module, by its `state_index`. whole: the step that stored
    them. visible: (B, 1, 1, T) bool, the frames that exist; None: all.
    """

    states: Sequence[Any]
    whole: Step
    visible: Tensor | None


# the step that the encoder of this thread or task is taking
running: ContextVar[Step | None] = ContextVar("running", default=None)
