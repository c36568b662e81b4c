"""Features that are not encoded yet.

Shape letters: B streams, R selected streams, T frames, F feature size.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


class Features:
    """Features of each stream that are not encoded yet, (frames, F).

    These are the frames of an incomplete chunk and the left context of the subsampling. The
    tensors are replaced and never written to, so that states may share them.

    Attributes:
        size: F.
        tensors: features of each stream.
    """

    def __init__(self, size: int, tensors: Sequence[Tensor]):
        self.size, self.tensors = size, list(tensors)

    @property
    def lengths(self) -> list[int]:
        """Frames of each stream."""
        return [tensor.size(0) for tensor in self.tensors]

    def append(self, xs: Tensor, lengths: Sequence[int]) -> None:
        """Add lengths[b] frames of xs (B, T, F) to stream b."""
        pairs = zip(self.tensors, xs, lengths, strict=True)
        self.tensors = [torch.cat([held, x[:length]]) for held, x, length in pairs]

    def read(self, streams: Sequence[int], first: Sequence[int], frames: int) -> Tensor:
        """Features (R, frames, F) of some streams from frame first[r] on, padded with zeros."""
        pieces = [self.tensors[s][f : f + frames] for s, f in zip(streams, first, strict=True)]
        return pad_sequence(pieces, batch_first=True)

    def keep(self, frames: Sequence[int]) -> None:
        """Keep the newest frames[b] of stream b, and free the storage of the others."""
        pairs = zip(self.tensors, frames, strict=True)
        self.tensors = [tensor[tensor.size(0) - n :].clone() for tensor, n in pairs]

    def select(self, streams: Sequence[int]) -> "Features":
        """Features of some streams."""
        return Features(self.size, [self.tensors[stream] for stream in streams])

    @property
    def nbytes(self) -> int:
        """Bytes of the storage."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self.tensors)
