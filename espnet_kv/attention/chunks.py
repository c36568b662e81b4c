"""The chunk mask, shared by all attention mechanisms.

Shape letters: Q queries, S keys, T frames, D model size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Chunks:
    """The chunk mask of one pass, passed to attention in place of ESPnet's pos_emb.

    Frame i belongs to chunk i // size and attends to the frames of its own chunk and of `left`
    chunks before it, as in U2 (arXiv 2012.05481).

    Attributes:
        pos_emb: (1, 2T-1, D), relative positions; None: no relative positions.
        size: frames in a chunk; 0: one chunk holds the whole utterance.
        left: number of chunks of left context; -1: all.
    """

    pos_emb: Tensor | None
    size: int
    left: int = -1

    def key_range(self, first: int, last: int, frames: int) -> tuple[int, int]:
        """Range [start, stop) of all keys visible to any of the queries [first, last)."""
        start = 0 if self.left < 0 else max(0, (first // self.size - self.left) * self.size)
        stop = min(frames, -(-last // self.size) * self.size)
        return start, stop

    def visible(self, queries: Tensor, keys: Tensor) -> Tensor:
        """(Q, S) bool: whether frame keys[j] is visible to frame queries[i]."""
        back = queries[:, None] // self.size - keys[None, :] // self.size  # in chunks
        return (back >= 0) if self.left < 0 else (back >= 0) & (back <= self.left)


def draw_chunks(frames: int, generator: torch.Generator | None = None) -> tuple[int, int]:
    """Draw (chunk_size, left_chunks) for one training batch, as U2 does.

    Half of the batches use the whole utterance (chunk_size 0). The others use chunks of 1 to 25
    frames, with all or with a random number of chunks of left context.

    Args:
        frames: length of the batch after subsampling.
    """

    def below(n: int) -> int:
        return int(torch.randint(n, (1,), generator=generator))

    if below(2):
        return 0, -1
    size = 1 + below(25)
    left = -1 if below(2) else below(-(-frames // size) + 1)
    return size, left
