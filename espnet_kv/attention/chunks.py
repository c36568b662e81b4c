"""Chunked visibility, shared by every attention.

Shape letters: Q queries, S keys, T frames, D model size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Chunks:
    """The chunk mask of one pass, given to attention in place of ESPnet's pos_emb.

    Frame i belongs to chunk i // size and sees the frames of its own chunk and of `left` chunks
    before it, as in U2 (arXiv 2012.05481).

    Attributes:
        pos_emb: (1, 2T-1, D) with relative positions, None without.
        size: frames in a chunk; 0: one chunk holds the whole utterance.
        left: chunks before its own that a frame sees; -1: all.
    """

    pos_emb: Tensor | None
    size: int
    left: int = -1

    def key_range(self, first: int, last: int, frames: int) -> tuple[int, int]:
        """The keys [start, stop) that the queries [first, last) see between them."""
        start = 0 if self.left < 0 else max(0, (first // self.size - self.left) * self.size)
        stop = min(frames, -(-last // self.size) * self.size)
        return start, stop

    def visible(self, queries: Tensor, keys: Tensor) -> Tensor:
        """(Q, S) bool: whether the frame numbered queries[i] sees the frame keys[j]."""
        ahead = queries[:, None] // self.size - keys[None, :] // self.size  # chunks back
        return (ahead >= 0) if self.left < 0 else (ahead >= 0) & (ahead <= self.left)


def draw_chunks(frames: int, generator: torch.Generator | None = None) -> tuple[int, int]:
    """Draw (chunk_size, left_chunks) for one training batch, as U2 does.

    Half of the batches see the whole utterance (chunk_size 0), the others chunks of 1 to 25
    frames with all or with a random number of the chunks before.

    Args:
        frames: of the batch after subsampling.
    """

    def upto(n: int) -> int:
        return int(torch.randint(n, (1,), generator=generator))

    if upto(2):
        return 0, -1
    size = 1 + upto(25)
    left = -1 if upto(2) else upto(-(-frames // size) + 1)
    return size, left
