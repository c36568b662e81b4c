"""Relative positions and chunked visibility, shared by every attention.

Shape letters: B batch, H heads, Q queries, S keys, T frames, D model size, d_k head size.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Chunks:
    """What a chunked encoder hands its attention in ESPnet's pos_emb slot.

    Frame i belongs to chunk i // size and sees the frames of its own chunk and of `left`
    chunks before it (-1: of all chunks before it), as in U2 (arXiv 2012.05481).

    pos_emb: (1, 2T-1, D) with relative positions, None without.
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
        """(Q, S) bool: may the frame numbered queries[i] look at the frame keys[j]?"""
        ahead = queries[:, None] // self.size - keys[None, :] // self.size  # chunks back
        return (ahead >= 0) if self.left < 0 else (ahead >= 0) & (ahead <= self.left)


def rel_shift(scores: Tensor, keys: int) -> Tensor:
    """Line relative-position scores up with keys, without copying.

    The queries are the last Q of `keys` frames and the position axis runs from the largest
    distance to the smallest, as ESPnet's RelPositionalEncoding orders it, so query i meets key
    j at position Q - 1 - i + j (Transformer-XL, arXiv 1901.02860, appendix B).

    Args:
        scores: (B, H, Q, S+Q-1), contiguous in its last two dimensions.
        keys: S.

    Returns:
        (B, H, Q, S), a view of `scores`.
    """
    b, h, q, width = scores.shape
    stride = scores.stride()
    return scores.as_strided(
        (b, h, q, keys),
        (stride[0], stride[1], width - 1, 1),
        scores.storage_offset() + q - 1,
    )


def sinusoid(positions: Tensor, size: int) -> Tensor:
    """Absolute positions (...) -> (..., size), as ESPnet's PositionalEncoding tabulates them.

    Computed where they are needed: a table would grow with the stream (arXiv 1706.03762, 3.5).
    """
    rates = torch.exp(
        torch.arange(0, size, 2, dtype=torch.float32, device=positions.device)
        * -(math.log(10000.0) / size)
    )
    angles = positions.float()[..., None] * rates
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2)[..., :size]


def at_positions(encoding: Any, x: Tensor, positions: Tensor) -> Tensor:
    """What ESPnet's PositionalEncoding or ScaledPositionalEncoding gives for frames of a stream.

    Args:
        encoding: the module.
        x: (B, T, D), or (N, D) of one position.
        positions: broadcastable to x without D.
    """
    absolute = sinusoid(positions, x.size(-1)).to(x.dtype)
    if hasattr(encoding, "alpha"):  # the scaled one
        return x + encoding.alpha * absolute
    return x * encoding.xscale + absolute


def draw_chunks(frames: int, generator: torch.Generator | None = None) -> tuple[int, int]:
    """Draw (chunk_size, left_chunks) for one training batch, as U2 does.

    Half of the batches see the whole utterance (chunk_size 0), the others chunks of 1 to 25
    frames with all or with a random number of the chunks before.
    """

    def upto(n: int) -> int:
        return int(torch.randint(n, (1,), generator=generator))

    if upto(2):
        return 0, -1
    size = 1 + upto(25)
    left = -1 if upto(2) else upto(-(-frames // size) + 1)
    return size, left
